"""Keys as files, and a socket that only they open."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from fake_rollout_engine import FakeRolloutEngine
from raw_bridge_client import RawBridgeClient, raw_client

from longtail.engine.errors import InvalidInputError
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.keys import ClientKeys, ServerKeys, make_keys
from longtail.trainer_bridge.service.config import BridgeConfig
from longtail.trainer_bridge.service.service import BridgeService


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "new"
    make_keys(folder)
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[BridgeService]:
    config = BridgeConfig(keys=folder, heartbeat_s=0.1)
    with BridgeService(FakeRolloutEngine(), config, staging=None) as service:
        yield service


def test_files_and_their_modes(folder: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {
        "server.key": 0o644, "server.key_secret": 0o600, "client.key": 0o644, "client.key_secret": 0o600
    }  # fmt: skip
    server, client = ServerKeys.read(folder), ClientKeys.read(folder)
    assert client.server == server.public
    assert server.clients == {client.public: "client"}
    for keys in (server, client):
        assert keys.secret.decode() not in repr(keys)
        assert zmq.curve_public(keys.secret) == keys.public
    assert client.secret.decode() not in (folder / "client.key").read_text()


def test_keys_are_never_replaced(folder: Path) -> None:
    before = (folder / "server.key_secret").read_bytes()
    with pytest.raises(InvalidInputError, match="none is replaced"):
        make_keys(folder, ("new", "server"))
    assert (folder / "server.key_secret").read_bytes() == before
    assert not (folder / "new.key").exists()


@pytest.mark.parametrize("name", ["", "../x", "a b", "a/b", ".x"])
def test_names_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="names of letters"):
        make_keys(tmp_path, (name,))


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    make_keys(tmp_path)
    for mode in (0o640, 0o604):
        os.chmod(tmp_path / "server.key_secret", mode)
        with pytest.raises(InvalidInputError, match="only its owner"):
            ServerKeys.read(tmp_path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="No such file"):
        ServerKeys.read(tmp_path)
    make_keys(tmp_path, ("server", "client", "other"))
    (tmp_path / "client.key_secret").write_text("nonsense")
    with pytest.raises(InvalidInputError, match="certificate"):
        ClientKeys.read(tmp_path)
    secret = (tmp_path / "other.key_secret").read_text().splitlines()
    (tmp_path / "server.key_secret").write_text(
        "\n".join([*(tmp_path / "server.key").read_text().splitlines(), secret[-1]]) + "\n"
    )
    with pytest.raises(InvalidInputError, match="belong together"):
        ServerKeys.read(tmp_path)
    with pytest.raises(InvalidInputError, match=r"keys\.server: expected 40 bytes"):
        ClientKeys(server=b"short", public=b"x" * 40, secret=b"x" * 40)


def test_the_key_opens(service: BridgeService, folder: Path) -> None:
    with raw_client(service.address, keys=ClientKeys.read(folder)) as client:
        assert isinstance(client.append([[1, 2]]), wire.PromptsAppended)


@pytest.mark.parametrize("which", ["none", "unknown client", "wrong server"])
def test_nothing_else_does(service: BridgeService, folder: Path, tmp_path: Path, which: str) -> None:
    make_keys(tmp_path)
    good, other = ClientKeys.read(folder), ClientKeys.read(tmp_path)
    keys = {
        "none": None,
        "unknown client": ClientKeys(server=good.server, public=other.public, secret=other.secret),
        "wrong server": ClientKeys(server=other.server, public=good.public, secret=good.secret),
    }[which]
    before = service.counters()["keys_refused"]
    with RawBridgeClient(service.address, keys=keys) as client:
        client.send(wire.Hello(request_id=1, consumer="t", instance=which))
        assert client.receive(0.6) is None
    assert (service.counters()["keys_refused"] > before) == (which == "unknown client")
    with raw_client(service.address, instance=f"after {which}", keys=good):
        pass


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://10.1.2.3:9", "tcp://[::]:0"])
def test_off_loopback_keys_are_required(address: str, folder: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"bridge\.address: expected a loopback address.*longtail keys"):
        BridgeConfig(address=address)
    assert BridgeConfig(address=address, keys=folder).is_remote
    assert BridgeConfig(address=address, insecure_no_auth=True).is_remote


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://[::1]:0", "tcp://localhost:0", "ipc:///tmp/x"])
def test_on_loopback_they_are_not(address: str) -> None:
    assert not BridgeConfig(address=address).is_remote


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:5", "tcp://127.0.0.1", "tcp://:5", "udp://127.0.0.1:5", "ipc://", 5]
)
def test_what_is_no_address_is_named(address: object) -> None:
    with pytest.raises(InvalidInputError, match=r"bridge\.address"):
        BridgeConfig(address=address)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("heartbeat_s", 0), ("heartbeat_s", True), ("heartbeat_s", float("nan")), ("max_unacked", 0),
        ("max_unacked_bytes", 1.5), ("chunk_bytes", 100), ("chunk_bytes", 1 << 30), ("num_slots", 0),
        ("state", 7), ("keys", 7), ("insecure_no_auth", "yes"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(InvalidInputError, match=rf"bridge\.{field}"):
        BridgeConfig(**{field: value})  # type: ignore[arg-type]


def test_no_auth_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="longtail")
    config = BridgeConfig(address="tcp://0.0.0.0:0", insecure_no_auth=True, heartbeat_s=0.1)
    with BridgeService(FakeRolloutEngine(), config, staging=None):
        pass
    assert "open to everybody" in caplog.text


def test_a_folder_without_clients_lets_nobody_in_and_says_so(tmp_path: Path) -> None:
    make_keys(tmp_path, ("server",))
    with pytest.raises(InvalidInputError, match="a client's public key"):
        BridgeService(FakeRolloutEngine(), BridgeConfig(keys=tmp_path), staging=None)
