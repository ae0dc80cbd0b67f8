"""From the two configurations to a running vLLM API server: environment, options, engine, app.

vLLM's own command line is not used: it asks for a distribution named `vllm`, which a CPU installation does not have.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtail.engine.config import EngineConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.launch import prepared_process
from longtail.engine.patches import ledger
from longtail.engine.server.endpoint import LongtailEndpoints
from longtail.engine.server.scheduler_link import SchedulerLink
from longtail.engine.server.settings import ServerConfig

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.v1.engine.async_llm import AsyncLLM

#: Plugin groups that vLLM loads whole when `VLLM_PLUGINS` is not set; endpoint plugins are never loaded unnamed.
_LOADED_UNNAMED = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
_OWN_PLUGINS = (ledger.PLUGIN_NAME, LongtailEndpoints.name)


def set_environment(config: EngineConfig, server: ServerConfig) -> None:
    """What vLLM reads from the environment; call it before vLLM is imported.

    A user's `VLLM_PLUGINS` is extended. When there is none, what vLLM would have loaded is named, so that naming
    ours takes nothing away.
    """
    named = os.environ.get("VLLM_PLUGINS")
    if named is None:
        names = [point.name for group in _LOADED_UNNAMED for point in entry_points(group=group)]
    else:
        names = [name for name in named.split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, *_OWN_PLUGINS]))
    if server.rl_routes:
        os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    os.environ.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", str(max(1, int(config.start_timeout_s))))
    # Stdout carries the line that says where the server is, and nothing that a program would have to skip.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def frontend_args(config: EngineConfig, server: ServerConfig, model_dir: Path) -> Namespace:
    """The options that vLLM's app reads, as its command line would have parsed them.

    Raises:
        InvalidInputError: `frontend_args` names an option that vLLM does not have.

    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs, validate_parsed_serve_args
    from vllm.platforms import current_platform

    from longtail.engine.vllm_args import engine_args

    defaults = vars(FrontendArgs())
    for name in server.frontend_args:
        if name not in defaults:
            raise InvalidInputError(f"server.frontend_args.{name}", "an option of vLLM's front end", name)
    engine = vars(AsyncEngineArgs(**engine_args(config, model_dir, on_cpu=current_platform.is_cpu())))
    served = engine["served_model_name"]
    own = {
        "host": server.host,
        "port": server.port,
        "api_key": [server.api_key] if server.api_key else None,
        "allowed_origins": list(server.allowed_origins),
        "disable_uvicorn_access_log": not server.access_log,
        "served_model_name": [served] if isinstance(served, str) else served,
        "longtail_server": server,
        "longtail_stall_timeout_s": config.stall_timeout_s,
    }
    args = Namespace(**(engine | defaults | dict(server.frontend_args) | own))
    try:
        validate_parsed_serve_args(args)
    except (ValueError, TypeError) as error:
        raise InvalidInputError("server.frontend_args", f"options that vLLM takes ({error})", None) from error
    return args


@asynccontextmanager
async def running_engine(
    config: EngineConfig, server: ServerConfig, model_dir: Path
) -> AsyncIterator[tuple[AsyncLLM, Namespace]]:
    """vLLM's asyncio engine, its core in a process of its own, and the options for its app.

    Raises:
        InvalidInputError: vLLM refuses the configuration.
        PatchLedgerError: a process runs without the ledger.

    """
    with prepared_process(config, model_dir):
        from longtail.engine.server.engine_client import RolloutAsyncLLM
        from longtail.engine.vllm_args import build_vllm_config

        args = frontend_args(config, server, model_dir)
        vllm_config = build_vllm_config(config, model_dir)
        engine = RolloutAsyncLLM.from_vllm_config(
            vllm_config=vllm_config,
            disable_log_stats=args.disable_log_stats,
            enable_log_requests=args.enable_log_requests,
        )
    try:
        try:
            answer = await SchedulerLink(engine).call("rollout_rpc", "ledger", {})
        except Exception as error:
            # The core answers a method that it does not have with an exception of no particular type.
            if "no attribute 'rollout_rpc'" not in str(error):
                raise
            answer = error
        ledger.verify_answer(answer)
        yield engine, args
    finally:
        engine.shutdown(timeout=vllm_config.shutdown_timeout)


async def build_server_app(engine: AsyncLLM, args: Namespace) -> FastAPI:
    """vLLM's app with our plugin in it.

    Raises:
        AssertionError: vLLM did not load the plugin, so that nothing would guard the routes.

    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    plugins: list[Any] = app.state.endpoint_plugins
    assert any(isinstance(plugin, LongtailEndpoints) for plugin in plugins), "the endpoint plugin is not in the app"
    await init_app_state(engine, app.state, args, tasks)
    return app
