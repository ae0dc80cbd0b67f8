"""The key: nothing but a short list of read-only GETs is reached without it."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from server_process import API_KEY, MAX_BODY_BYTES, ServerProcess
from starlette.routing import Mount, WebSocketRoute
from starlette.types import Message, Receive, Scope, Send

from longtail.engine.server.guard import OPEN_PATHS, BodyLimit, KeyGuard

#: Routes that must be among those found, so that the search for routes cannot come back empty.
EXPECTED = {
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("POST", "/update_weights"),
    ("POST", "/collective_rpc"),
    ("POST", "/abort_requests"),
    ("POST", "/sleep"),
    ("POST", "/wake_up"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/tokenize"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/rollouts"),
    ("DELETE", "/v1/rollouts/{round_id:path}"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/start_profile"),
    ("POST", "/inference/v1/generate"),
    ("POST", "/invocations"),
    ("POST", "/ping"),
    ("GET", "/weight_info"),
    ("GET", "/openapi.json"),
}


@pytest.fixture(scope="module")
def args(tiny_model: Path) -> Namespace:
    from vllm.config import ProfilerConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    profiler = ProfilerConfig(profiler="torch", torch_profiler_dir=str(tiny_model))
    options = vars(AsyncEngineArgs(model=str(tiny_model))) | vars(FrontendArgs())
    return Namespace(**options | {"api_key": [API_KEY], "enable_scale_out": True, "profiler_config": profiler})


def build(args: Namespace, monkeypatch: pytest.MonkeyPatch, plugins: str) -> FastAPI:
    """vLLM's app with every route that an option can switch on."""
    from vllm.entrypoints.launchers.app import build_app

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    return build_app(args, ("generate",))


@pytest.fixture
def guarded(args: Namespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[FastAPI]:
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    app = build(args, monkeypatch, "longtail,longtail_rollouts")
    yield app
    (plugin,) = app.state.endpoint_plugins
    get_prometheus_registry().unregister(plugin._collector)


def operations(app: FastAPI) -> list[tuple[str, str]]:
    """Every method and path that the app routes, mounts and websockets included."""
    found: list[tuple[str, str]] = []
    for route in app.routes:
        if isinstance(route, WebSocketRoute):
            found.append(("WEBSOCKET", route.path))
        elif isinstance(route, Mount):
            found += [(method, f"{route.path}/x") for method in ("GET", "POST")]
        else:
            found += [(method, route.path) for method in sorted(route.methods)]  # type: ignore[attr-defined]
    return found


def ask(app: FastAPI, method: str, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=10.0) as client:
            return await client.request(method, path.replace("{round_id:path}", "x"), headers=headers)

    return asyncio.run(send())


def test_every_route_but_the_open_ones_needs_the_key(guarded: FastAPI) -> None:
    found = operations(guarded)
    closed = [(m, p) for m, p in found if not (m in ("GET", "HEAD") and p in OPEN_PATHS)]
    assert set(found) >= EXPECTED
    assert len(closed) > 55
    for method, path in closed:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": API_KEY}):
            answer = ask(guarded, method, path, headers)
            assert answer.status_code == 401, (method, path, answer.text)


@pytest.mark.parametrize(("method", "path"), [("POST", "/pause"), ("POST", "/collective_rpc"), ("GET", "/server_info")])
def test_stock_leaves_them_open(args: Namespace, monkeypatch: pytest.MonkeyPatch, method: str, path: str) -> None:
    """Negative control: without the plugin the same app, with the same key, lets the request into the handler."""
    stock = build(args, monkeypatch, "longtail")
    assert (method, path) in operations(stock)
    assert ask(stock, method, path).status_code != 401
    assert ask(stock, "POST", "/v1/completions").status_code == 401


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/health"),
        ("DELETE", "/metrics"),
        ("GET", "/metrics/../pause"),
        ("GET", "/metricsx"),
        ("GET", "/metrics/"),
        ("GET", "/health/"),
        ("GET", "//health"),
        ("OPTIONS", "/pause"),
        ("GET", "/nothing"),
        ("PUT", "/v1/rollouts"),
        ("GET", "/%69s_paused"),
        ("GET", "/docs"),
    ],
)
def test_no_detour_leads_in(http: httpx.Client, server: ServerProcess, method: str, path: str) -> None:
    with server.client(headers={}) as stranger:
        assert stranger.request(method, path).status_code == 401
    assert http.request(method, path).status_code != 401


def test_the_open_paths_are_open_and_the_key_opens_the_rest(http: httpx.Client, server: ServerProcess) -> None:
    with server.client(headers={}) as stranger:
        for path in OPEN_PATHS:
            assert stranger.get(path).status_code == 200, path
        refused = stranger.post("/pause")
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert stranger.get("/is_paused").status_code == 401
        body = {"prompts": [{"token_ids": [5]}]}
        assert stranger.post("/v1/rollouts", json=body).status_code == 401
        # No body is read for a stranger: not even a huge one gets another answer.
        assert stranger.post("/v1/rollouts", content=b"x" * (2 * MAX_BODY_BYTES)).status_code == 401
    assert http.get("/is_paused").json() == {"is_paused": False}


class Recorder:
    """An app that notes what reaches it."""

    def __init__(self) -> None:
        self.reached: list[Scope] = []
        self.body = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.reached.append(scope)
        more = scope["type"] == "http"
        while more:
            message = await receive()
            self.body += message.get("body", b"")
            more = message.get("more_body", False)


def run_asgi(app: Any, scope: dict[str, Any], chunks: tuple[bytes, ...] = (b"",)) -> list[Message]:
    sent: list[Message] = []
    messages = [
        {"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)} for i, chunk in enumerate(chunks)
    ]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app({"headers": [], "path": "/x", "method": "GET", **scope}, receive, send))
    return sent


def test_websockets_need_the_key() -> None:
    app = Recorder()
    guard = KeyGuard(app, ("secret",))
    (closed,) = run_asgi(guard, {"type": "websocket", "path": "/health"})
    assert (closed["type"], closed["code"]) == ("websocket.close", 1008)
    denied = run_asgi(guard, {"type": "websocket", "extensions": {"websocket.http.response": {}}})
    assert denied[0]["status"] == 401
    assert not app.reached
    run_asgi(guard, {"type": "websocket", "headers": [(b"authorization", b"Bearer secret")]})
    run_asgi(guard, {"type": "lifespan"})
    assert [scope["type"] for scope in app.reached] == ["websocket", "lifespan"]


@pytest.mark.parametrize(
    ("value", "enters"),
    [
        (b"Bearer secret", True),
        (b"bearer other", True),
        (b"Bearer secre", False),
        (b"Bearer secret2", False),
        (b"Bearer ", False),
        (b"secret", False),
        (b"Basic secret", False),
        (b"Bearer \xff\xfe", False),
    ],
)
def test_only_a_whole_key_enters(value: bytes, enters: bool) -> None:
    app = Recorder()
    run_asgi(KeyGuard(app, ("secret", "other")), {"type": "http", "headers": [(b"authorization", value)]})
    assert bool(app.reached) is enters


def test_the_open_paths_are_relative_to_the_root_path() -> None:
    app = Recorder()
    guard = KeyGuard(app, ("secret",))
    run_asgi(guard, {"type": "http", "path": "/api/health", "root_path": "/api"})
    assert len(app.reached) == 1
    run_asgi(guard, {"type": "http", "path": "/api/pause", "root_path": "/api"})
    assert len(app.reached) == 1


def test_without_a_key_all_may_enter() -> None:
    app = Recorder()
    run_asgi(KeyGuard(app, ()), {"type": "http", "method": "POST", "path": "/pause"})
    assert len(app.reached) == 1


def test_an_announced_body_that_is_too_long_is_not_read() -> None:
    app = Recorder()
    sent = run_asgi(BodyLimit(app, 10), {"type": "http", "headers": [(b"content-length", b"11")]})
    assert sent[0]["status"] == 413
    assert not app.reached


def test_a_body_is_counted_whatever_was_announced() -> None:
    app = Recorder()
    run_asgi(BodyLimit(app, 10), {"type": "http"}, (b"12345", b"12345"))
    assert app.body == b"1234512345"
    sent = run_asgi(BodyLimit(app, 10), {"type": "http"}, (b"12345", b"12345", b"6"))
    assert sent[0]["status"] == 413
    assert b"at most 10 bytes" in sent[1]["body"]
