"""`serve`: run the server until it is told to stop.

The socket is bound before the model loads, so that a taken port fails at once. When requests are served, one line
goes to stdout: `LONGTAIL_SERVING {"host": ..., "port": ..., "model": ..., "pid": ...}`. SIGTERM and SIGINT end the
requests that run, the engine core and the server; while it starts, they end the process itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from longtail.engine.config import EngineConfig
from longtail.engine.errors import EngineDeadError, InvalidInputError
from longtail.engine.models import resolve_model
from longtail.engine.server.settings import MAX_BODY_BYTES, MAX_MEMBERS, ServerConfig, bind

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI
    from vllm.v1.engine.async_llm import AsyncLLM

READY_PREFIX = "LONGTAIL_SERVING "

_POLL_S = 0.1
#: How long open connections may take to end after the engine did.
_CLOSE_TIMEOUT_S = 10


def serve(
    config: EngineConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allow_remote_without_key: bool = False,
    rl_routes: bool = False,
    allowed_origins: Sequence[str] = (),
    access_log: bool = False,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_members: int = MAX_MEMBERS,
    frontend_args: Mapping[str, Any] | None = None,
) -> None:
    """Serve a model until SIGTERM or SIGINT; call it in the main thread, under `if __name__ == "__main__"`.

    Args:
        config: the engine; its core runs in a process of its own.
        host: address to listen on.
        port: 0 lets the system pick.
        api_key: bearer token that every route needs but `/health`, `/ping`, `/version` and `/metrics`; the one in the
            environment variable `VLLM_API_KEY` when `None`.
        allow_remote_without_key: listen beyond loopback although there is no key. Unsafe.
        rl_routes: vLLM's routes for trainers (`/pause`, `/update_weights`, `/collective_rpc`, ...).
        allowed_origins: origins of web pages that may call the server.
        access_log: a line for each request, on stdout.
        max_body_bytes: longest request body.
        max_members: most members (prompts x group size) of one round.
        frontend_args: further options of vLLM's front end by name, e.g. `chat_template` or `ssl_certfile`.

    Raises:
        InvalidInputError: a setting is wrong, or the address cannot be used.
        ModelSourceError: the checkpoint is missing or incomplete.
        PatchLedgerError: a process runs without the patch ledger.
        EngineDeadError: the engine core died while the server ran.

    """
    server = ServerConfig(
        host=host,
        port=port,
        api_key=api_key or os.environ.get("VLLM_API_KEY") or None,
        allow_remote_without_key=allow_remote_without_key,
        rl_routes=rl_routes,
        allowed_origins=tuple(allowed_origins),
        access_log=access_log,
        max_body_bytes=max_body_bytes,
        max_members=max_members,
        frontend_args=frontend_args or {},
    )
    if config.core != "process":
        raise InvalidInputError("engine.core", "process, because a server needs the front end for itself", config.core)
    with bind(server.host, server.port) as listener, _interruptible():
        _run(config, server, listener)


def _run(config: EngineConfig, server: ServerConfig, listener: socket.socket) -> None:
    model_dir = resolve_model(config.model)
    from longtail.engine.server import launch

    launch.set_environment(config, server)
    import uvloop

    async def main() -> None:
        async with launch.running_engine(config, server, model_dir) as (engine, args):
            from vllm.utils.system_utils import set_ulimit

            set_ulimit()
            app = await launch.build_server_app(engine, args)
            await _serve_until_stopped(engine, app, args, listener, config.model)

    uvloop.run(main())


async def _serve_until_stopped(
    engine: AsyncLLM, app: FastAPI, args: Namespace, listener: socket.socket, model: str
) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    server = _uvicorn_server(app, args)
    app.state.server = server  # vLLM's error handlers end it through this when the engine is dead
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not (server.started or serving.done()):
            await asyncio.sleep(_POLL_S)
        if server.started:
            _announce(listener, model)
        while not (stop.is_set() or serving.done() or engine.errored):
            await asyncio.sleep(_POLL_S)
        died = engine.errored and not stop.is_set()
        server.should_exit = True
        await loop.run_in_executor(None, engine.shutdown, engine.vllm_config.shutdown_timeout)
        # vLLM forgets the requests that still wait for outputs; they must hear of it before their connections close.
        engine.output_processor.propagate_error(VllmEngineDeadError())
        await serving
    finally:
        serving.cancel()
    if died:
        raise EngineDeadError("serving", "its process ended")


def _uvicorn_server(app: FastAPI, args: Namespace) -> uvicorn.Server:
    import uvicorn
    from vllm import envs
    from vllm.entrypoints.launchers.launcher import NoSignalServer
    from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

    more: dict[str, Any] = {}
    if (log_config := get_uvicorn_log_config(args)) is not None:
        more["log_config"] = log_config
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        **({"ssl_ciphers": args.ssl_ciphers} if args.ssl_ciphers else {}),
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        **more,
    )
    return NoSignalServer(config)


def _announce(listener: socket.socket, model: str) -> None:
    host, port = listener.getsockname()[:2]
    line = msgspec.json.encode({"host": host, "port": port, "model": model, "pid": os.getpid()}).decode()
    sys.stdout.write(f"{READY_PREFIX}{line}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Until the event loop has its own handlers: let SIGTERM and SIGINT stop the start."""
    before = {number: signal.signal(number, _stop_start) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_start(*_: object) -> NoReturn:
    """End the core, its workers and this process; there is nothing to save yet.

    An exception would not do: it can be lost in an import, and is in ZeroMQ's poll, where vLLM waits for its core.
    """
    for child in multiprocessing.active_children():
        from vllm.utils.system_utils import kill_process_tree

        if child.pid is not None:
            kill_process_tree(child.pid)
        child.join(_CLOSE_TIMEOUT_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
