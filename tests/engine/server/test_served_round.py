"""How a served round ends when its members end at the same time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from longtail.engine.config import SamplingConfig
from longtail.engine.prompts import PromptLimits
from longtail.engine.rounds import plan_round
from longtail.engine.server.served_round import ServedRound


def test_members_that_end_while_the_scheduler_is_asked_leave_nothing_behind() -> None:
    asked: list[str] = []
    ended: list[str] = []

    async def scenario() -> None:
        member_may_end = asyncio.Event()

        class Link:
            async def rpc(self, op: str, **args: Any) -> dict[str, Any]:
                asked.append(op)
                member_may_end.set()
                await asyncio.sleep(0.05)
                return {}

        plan = plan_round(
            [[1]], group_size=1, target_groups=None, over_provision=None, sampling=SamplingConfig(), round_id="r",
            tokenizer=None, limits=PromptLimits(16, 16),
        )  # fmt: skip
        engine: Any = SimpleNamespace()
        link: Any = Link()
        served = ServedRound(engine, link, plan, None, stall_timeout_s=5, on_end=lambda: ended.append("r"))
        member = asyncio.create_task(member_may_end.wait())
        members: set[Any] = served._members
        members.add(member)
        member.add_done_callback(members.discard)
        await served.end()

    asyncio.run(scenario())
    assert asked == ["close_round", "forget_round"]
    assert ended == ["r"]
