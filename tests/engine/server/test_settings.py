"""Settings of the server, and what it does to the environment."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from longtail.engine.config import EngineConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.server import launch
from longtail.engine.server.serve import serve
from longtail.engine.server.settings import ServerConfig, bind, is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "a.name.that.does.not.exist.invalid"])
def test_only_a_key_or_the_unsafe_flag_opens_the_server_to_others(host: str) -> None:
    with pytest.raises(InvalidInputError, match=r"server\.host"):
        ServerConfig(host=host)
    ServerConfig(host=host, api_key="k")
    ServerConfig(host=host, allow_remote_without_key=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    ServerConfig(host=host)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("port", "80"),
        ("port", True),
        ("host", ""),
        ("api_key", ""),
        ("api_key", "a b"),
        ("api_key", "schlüssel"),
        ("api_key", "a\n"),
        ("max_members", 0),
        ("max_body_bytes", 1.5),
        ("frontend_args", {"api_key": "x"}),
    ],
)
def test_a_wrong_setting_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=rf"server\.{field}") as caught:
        ServerConfig(**{field: value})
    if field == "api_key" and value:
        assert value not in str(caught.value)


def test_the_key_is_in_no_repr() -> None:
    assert "hush" not in repr(ServerConfig(api_key="hush"))


def test_port_0_is_picked_and_a_taken_port_is_an_error_before_anything_starts() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert port
        listener.listen()
        with pytest.raises(InvalidInputError, match=f"127.0.0.1:{port}"):
            serve(EngineConfig(model="unused"), port=port)
    with bind("::1" if socket.has_ipv6 else "127.0.0.1", 0) as listener:
        assert listener.getsockname()[1]


def test_an_engine_in_this_process_cannot_be_served() -> None:
    with pytest.raises(InvalidInputError, match=r"engine\.core"):
        serve(EngineConfig(model="unused", core="inline"), port=0)


@pytest.mark.parametrize(("before", "kept"), [(None, {"longtail"}), ("a,b", {"a", "b"}), ("", set())])
def test_plugins_of_the_user_stay(monkeypatch: pytest.MonkeyPatch, before: str | None, kept: set[str]) -> None:
    environ = {} if before is None else {"VLLM_PLUGINS": before}
    monkeypatch.setattr(os, "environ", environ)
    launch.set_environment(EngineConfig(model="unused"), ServerConfig())
    names = environ["VLLM_PLUGINS"].split(",")
    assert len(set(names)) == len(names)
    own = {"longtail", "longtail_rollouts"}
    if before is None:
        assert set(names) >= kept | own
    else:
        assert set(names) == kept | own
    assert "VLLM_SERVER_DEV_MODE" not in environ


def test_what_the_user_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"VLLM_ENGINE_READY_TIMEOUT_S": "7", "VLLM_LOGGING_STREAM": "ext://sys.stdout"}
    monkeypatch.setattr(os, "environ", environ)
    launch.set_environment(EngineConfig(model="unused"), ServerConfig(rl_routes=True))
    assert environ["VLLM_ENGINE_READY_TIMEOUT_S"] == "7"
    assert environ["VLLM_LOGGING_STREAM"] == "ext://sys.stdout"
    assert environ["VLLM_SERVER_DEV_MODE"] == "1"
