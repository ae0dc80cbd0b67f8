"""vLLM's endpoint plugin of longtail: routes, guard and metrics for an app of vLLM's API server.

vLLM calls `attach_router` while it builds the app, before it adds its own middleware: so CORS is outside our guard,
and the guard is outside every route and mount. It works in a server that vLLM itself started too, with vLLM's options
in place of `ServerConfig`'s; then nothing checks that address and key go together.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException

from longtail.engine.errors import LongtailError
from longtail.engine.server import problems
from longtail.engine.server.guard import BodyLimit, KeyGuard
from longtail.engine.server.json_door import JsonDoor
from longtail.engine.server.metrics import CountersCollector, FreshCounters
from longtail.engine.server.rollouts import RolloutService, router
from longtail.engine.server.scheduler_link import SchedulerLink
from longtail.engine.server.settings import MAX_BODY_BYTES, MAX_MEMBERS, ServerConfig

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State

_STALL_TIMEOUT_S = 600.0


class LongtailEndpoints:
    """The `vllm.endpoint_plugins` entry point; its name must be in `VLLM_PLUGINS`."""

    name = "longtail_rollouts"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._collector = CountersCollector()

    def attach_router(self, app: FastAPI) -> None:
        """Add routes and middleware; the last middleware added is the outermost."""
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        app.include_router(router)
        app.add_exception_handler(LongtailError, problems.handle)
        app.add_exception_handler(problems.BodyTooLargeError, problems.handle)
        app.add_exception_handler(HTTPException, problems.handle_http)
        server: ServerConfig | None = getattr(app.state.args, "longtail_server", None)
        app.add_middleware(FreshCounters, collector=self._collector)
        app.add_middleware(JsonDoor)
        app.add_middleware(BodyLimit, max_bytes=server.max_body_bytes if server else MAX_BODY_BYTES)
        app.add_middleware(KeyGuard, keys=_keys(app.state.args))
        get_prometheus_registry().register(self._collector)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Connect the routes with the engine."""
        server: ServerConfig | None = getattr(args, "longtail_server", None)
        state.longtail_link = SchedulerLink(engine_client)
        state.longtail_rollouts = RolloutService(
            engine_client,
            state.longtail_link,
            max_members=server.max_members if server else MAX_MEMBERS,
            stall_timeout_s=getattr(args, "longtail_stall_timeout_s", _STALL_TIMEOUT_S),
        )


def _keys(args: Namespace) -> tuple[str, ...]:
    """The keys that vLLM itself would take: the option before the environment."""
    from vllm import envs

    return tuple(key for key in (args.api_key or [envs.VLLM_API_KEY]) if key)
