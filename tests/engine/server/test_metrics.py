"""longtail's series on `/metrics`."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from server_process import ServerProcess, read_lines
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from longtail.engine.errors import EngineTimeoutError
from longtail.engine.server import metrics
from longtail.engine.server.metrics import CountersCollector, FreshCounters

COUNTERS = {
    "rounds": 3,
    "cuts": 2,
    "complete_groups": 5,
    "cut_members": 7,
    "kept_tokens": 11,
    "steps": 13,
    "idle_slot_steps": 17,
    "parked_total": 5,
    "parked_lost_tokens": 9,
    "parked_trajectories": 2,
    "parked_tokens": 31,
    "live_rounds": 1,
    "live_members": 19,
    "running": 23,
    "waiting": 29,
    "free_blocks": 31,
}


def test_a_round_moves_the_counters_by_what_it_was(http: httpx.Client, server: ServerProcess) -> None:
    before = server.metrics()
    budgets = [3, 5, 300, 300]
    body = {
        "prompts": [{"token_ids": [7, 8, 9], "max_tokens": budget} for budget in budgets],
        "target_groups": 2,
        "sampling": {"ignore_eos": True, "temperature": 0},
    }
    *_, last = read_lines(http.post("/v1/rollouts", json=body))
    after = server.wait_idle()
    moved = {name: after[name] - before[name] for name in after}
    assert moved["longtail_rounds_total"] == 1
    assert moved["longtail_round_cuts_total"] == 1
    assert moved["longtail_cut_members_total"] == 2
    assert moved["longtail_complete_groups_total"] == 2
    assert moved["longtail_kept_tokens_total"] == 8
    assert moved["longtail_idle_slot_steps_total"] == last["stats"]["idle_slot_steps"] > 0
    assert after["longtail_live_rounds"] == after["longtail_live_members"] == 0
    assert after["longtail_free_kv_blocks"] == before["longtail_free_kv_blocks"] > 0
    assert after["longtail_counters_age_seconds"] < 5


def test_vllms_own_series_are_there_too(http: httpx.Client) -> None:
    assert "vllm:num_requests_running" in http.get("/metrics").text


class FakeLink:
    """Answers, hangs or fails."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.num_asked = 0

    async def rpc(self, op: str, *, timeout_s: float, **args: Any) -> dict[str, Any]:
        self.num_asked += 1
        if self.answer is None:
            await asyncio.sleep(60)
        if isinstance(self.answer, Exception):
            raise self.answer
        answer: dict[str, Any] = self.answer
        return answer


def scrape(link: FakeLink, collector: CountersCollector, times: int = 1, path: str = "/metrics") -> str:
    """What the registry says when the app behind the middleware is reached."""
    registry = CollectorRegistry()
    registry.register(collector)
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(generate_latest(registry).decode())

    async def run() -> None:
        owner = Starlette()
        owner.state.longtail_link = link
        fresh = FreshCounters(app, collector)
        scope = {"type": "http", "path": path, "app": owner}
        await asyncio.gather(*(fresh(scope, None, None) for _ in range(times)))  # type: ignore[arg-type]

    asyncio.run(run())
    assert len(seen) == times
    return seen[-1]


def test_a_scrape_has_fresh_values() -> None:
    text = scrape(FakeLink(COUNTERS), CountersCollector())
    for line in ("longtail_rounds_total 3.0", "longtail_kept_tokens_total 11.0", "longtail_free_kv_blocks 31.0"):
        assert line in text.splitlines()
    values = {float(line.split()[1]) for line in text.splitlines() if line.startswith("longtail_")}
    assert values >= set(COUNTERS.values())


@pytest.mark.parametrize("answer", [None, EngineTimeoutError("the engine", 1.0)])
def test_a_scheduler_that_does_not_answer_does_not_break_the_scrape(
    answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "SCRAPE_TIMEOUT_S", 0.05)
    collector = CountersCollector()
    assert "longtail_rounds_total" not in scrape(FakeLink(answer), collector)
    collector.update(COUNTERS)
    assert "longtail_rounds_total 3.0" in scrape(FakeLink(answer), collector)


def test_the_age_says_how_old_the_values_are() -> None:
    collector = CountersCollector()
    (age,) = (metric.samples[0].value for metric in collector.collect())
    assert age == math.inf
    collector.update(COUNTERS)
    assert list(collector.collect())[-1].samples[0].value < 1


def test_scrapes_at_one_time_ask_once_and_other_paths_do_not_ask() -> None:
    link = FakeLink(COUNTERS)
    scrape(link, CountersCollector(), times=5)
    assert link.num_asked == 1
    scrape(link, CountersCollector(), path="/health")
    assert link.num_asked == 1
