"""longtail's series on `/metrics`: the scheduler's counters, asked for when Prometheus scrapes.

`FreshCounters` asks before the scrape and waits at most `SCRAPE_TIMEOUT_S`. When no answer comes, the scrape goes on
with the last values, and `longtail_counters_age_seconds` says how old they are. Before the first answer there are no
series but the age, which is then infinite.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

from longtail.engine.errors import LongtailError
from longtail.engine.server.scheduler_link import SchedulerLink

SCRAPE_TIMEOUT_S = 2.0

#: Name of the series, key in the answer of the `counters` operation, help.
_COUNTERS = (
    ("longtail_rounds", "rounds", "Rounds opened."),
    ("longtail_round_cuts", "cuts", "Rounds that the scheduler ended because they had their target."),
    ("longtail_cut_members", "cut_members", "Members stopped at the end of a round, or that came after it."),
    ("longtail_complete_groups", "complete_groups", "Groups whose members all finished by themselves."),
    ("longtail_kept_tokens", "kept_tokens", "Output tokens of complete groups."),
    ("longtail_round_steps", "steps", "Engine steps with a live round."),
    (
        "longtail_idle_slot_steps",
        "idle_slot_steps",
        "Batch slots that were in use at the peak of a round and empty in a later step, summed over steps.",
    ),
    ("longtail_parked_members", "parked_total", "Members whose KV was parked at a cut."),
    ("longtail_parked_lost_tokens", "parked_lost_tokens", "Tokens whose parked KV the pool took back."),
)
_GAUGES = (
    ("longtail_live_rounds", "live_rounds", "Rounds with a member that has not ended."),
    ("longtail_live_members", "live_members", "Members of rounds that have not ended."),
    ("longtail_running_requests", "running", "Requests in the batch, members of rounds or not."),
    ("longtail_waiting_requests", "waiting", "Requests in the queue, members of rounds or not."),
    ("longtail_free_kv_blocks", "free_blocks", "KV blocks that can be allocated, cached and parked ones included."),
    ("longtail_parked_trajectories", "parked_trajectories", "Trajectories with parked KV."),
    ("longtail_parked_tokens", "parked_tokens", "Tokens whose parked KV is there."),
)


class CountersCollector(Collector):
    """Exports the last answer that it was given."""

    def __init__(self) -> None:
        self._counters: dict[str, Any] = {}
        self._answered_at = -math.inf

    def update(self, counters: dict[str, Any]) -> None:
        """Take a fresh answer of the scheduler."""
        self._counters = counters
        self._answered_at = time.monotonic()

    def collect(self) -> Iterator[Metric]:
        for name, key, text in _COUNTERS if self._counters else ():
            yield CounterMetricFamily(name, text, value=self._counters[key])
        for name, key, text in _GAUGES if self._counters else ():
            yield GaugeMetricFamily(name, text, value=self._counters[key])
        yield GaugeMetricFamily(
            "longtail_counters_age_seconds",
            "Age of longtail's series: seconds since the scheduler answered.",
            value=time.monotonic() - self._answered_at,
        )

    def describe(self) -> Iterator[Metric]:
        """Nothing: keeps the registry from collecting when it registers."""
        return iter(())


class FreshCounters:
    """ASGI middleware: before a scrape, ask the scheduler for its counters."""

    def __init__(self, app: ASGIApp, collector: CountersCollector, path: str = "/metrics") -> None:
        self._app = app
        self._collector = collector
        self._path = path
        self._asking: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) == self._path:
            link: SchedulerLink | None = getattr(scope["app"].state, "longtail_link", None)
            if link is not None:
                await self._refresh(link)
        await self._app(scope, receive, send)

    async def _refresh(self, link: SchedulerLink) -> None:
        # Scrapes at the same time share one question.
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(link))
        await asyncio.wait([self._asking], timeout=SCRAPE_TIMEOUT_S)

    async def _ask(self, link: SchedulerLink) -> None:
        try:
            self._collector.update(await link.rpc("counters", timeout_s=SCRAPE_TIMEOUT_S))
        except LongtailError:
            return
