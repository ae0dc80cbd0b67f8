"""Boundaries over vLLM's real scheduler and block pool: where a member stops, and what going on costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_model import KvEngine, expected_tokens
from vllm.v1.engine import EngineCoreOutput, FinishReason

from longtail.scheduler.boundaries import BOUNDARY_STOP_REASON, BoundarySpec
from longtail.scheduler.metadata import report_of

PROMPT = list(range(5, 55))
BLOCK_SIZE = 8
LENGTH = 40

Make = Callable[..., KvEngine]


@given(
    st.lists(st.integers(0, 5), max_size=8),
    st.integers(0, 30),
    st.one_of(st.none(), st.integers(1, 10)),
    st.sets(st.integers(0, 5), max_size=2),
    st.integers(0, 30),
)
def test_the_first_boundary(tokens: list[int], before: int, every: int | None, ids: set[int], start: int) -> None:
    start = min(start, before)
    found = BoundarySpec(every=every, token_ids=tuple(ids), start=start).first(tokens, before)
    plain = [
        (count, token if token in ids else None)
        for count, token in enumerate(tokens, start=1)
        if token in ids or (every is not None and before + count - start >= every)
    ]
    assert found == (plain[0] if plain else None)


class Member:
    """One member of a group of `group_size`, stopped and taken up again at its boundaries."""

    def __init__(self, engine: KvEngine, name: str = "m0", place: tuple[int, int] = (0, 1), **boundary: Any) -> None:
        self.engine, self.name = engine, name
        self.index, self.group_size = place
        self.number = 0
        self.boundary = boundary
        self.tokens: list[int] = []
        self.start = 0
        self.computed = 0
        self.end: EngineCoreOutput | None = None

    def submit(self) -> None:
        self.end = None
        self.number += 1
        self.engine.add(
            f"{self.name}#{self.number}",
            PROMPT + self.tokens,
            LENGTH,
            {
                "round": "r", "target_groups": 1, "group": "g", "group_size": self.group_size, "index": self.index,
                "park": self.name, "num_prior_tokens": len(self.tokens), "num_computed_tokens": self.computed,
                "boundary": self.boundary | {"start": self.start},
            },
        )  # fmt: skip

    def run(self) -> int:
        """Until it ends or stops; returns the tokens that went through the model."""
        before = self.engine.model.num_scheduled
        while self.end is None:
            for output in self.engine.step()[1]:
                if output.request_id == f"{self.name}#{self.number}":
                    self.tokens += output.new_token_ids
                    self.end = output if output.finish_reason is not None else None
        report = report_of(self.end.kv_transfer_params)
        assert report is not None
        self.report, self.computed = report, report.num_computed_tokens
        return self.engine.model.num_scheduled - before

    @property
    def is_at_boundary(self) -> bool:
        assert self.end is not None
        return self.end.stop_reason == BOUNDARY_STOP_REASON and self.end.finish_reason is FinishReason.ABORT


def test_it_stops_after_every_so_many_tokens_and_goes_on_for_nothing(make: Make) -> None:
    member = Member(make(), every=7)
    member.submit()
    for number in range(1, 6):
        scheduled = member.run()
        assert member.is_at_boundary
        assert member.report.boundary is None
        assert len(member.tokens) == 7 * number
        first = len(PROMPT) if number == 1 else 0
        # Asynchronous scheduling has the next token on its way when a segment ends.
        assert scheduled - (first + 7 - (number == 1)) in range(member.engine._depth)
        member.start = len(member.tokens)
        member.submit()
    member.run()
    assert member.end is not None
    assert member.end.finish_reason is FinishReason.LENGTH
    assert member.tokens == expected_tokens(PROMPT, LENGTH)
    assert member.report.num_recomputed_tokens == 0


def test_it_stops_after_a_token(make: Make) -> None:
    whole = expected_tokens(PROMPT, LENGTH)
    member = Member(make(), token_ids=[whole[11]])
    member.submit()
    member.run()
    assert member.is_at_boundary
    assert member.report.boundary == whole[11]
    assert member.tokens == whole[: whole.index(whole[11]) + 1]
    member.engine.scheduler.rollout_rpc("unpark", {"keys": ["m0"]})


def test_only_what_the_environment_appended_is_prefilled(make: Make) -> None:
    member = Member(make(), every=10)
    member.submit()
    member.run()
    appended = [301, 302, 303, 304, 305]
    member.tokens += appended
    member.start = len(member.tokens)
    member.submit()
    scheduled = member.run()
    assert member.is_at_boundary
    known = PROMPT + member.tokens[:15]
    assert member.tokens[15:] == expected_tokens(known, 10)
    # The last token of the segment before, what was appended, and nine of the ten sampled.
    assert scheduled - (1 + len(appended) + 9) in range(member.engine._depth)
    assert member.report.num_recomputed_tokens == 0
    assert member.report.num_parked_tokens == len(PROMPT) + 9


def test_others_go_on_while_one_is_stopped_and_its_group_waits_for_it(make: Make) -> None:
    engine = make()
    stopped, other = Member(engine, "a", (0, 2), every=5), Member(engine, "b", (1, 2))
    stopped.submit()
    other.submit()
    stopped.run()
    assert stopped.is_at_boundary
    other.run()
    assert other.tokens[-20:] == expected_tokens(PROMPT, LENGTH)[-20:]
    assert not engine.scheduler.rollout_rpc("round", {"round": "r"})["closed"]
    engine.scheduler.rollout_rpc("finish_paused", {"round": "r", "group": "g", "index": 0})
    counts = engine.scheduler.rollout_rpc("round", {"round": "r"})
    assert (counts["num_complete_groups"], counts["num_kept_tokens"]) == (1, LENGTH + 5)
    engine.scheduler.rollout_rpc("unpark", {"keys": ["a"]})


def test_the_end_of_a_trajectory_is_no_boundary(make: Make) -> None:
    member = Member(make(), every=LENGTH)
    member.submit()
    member.run()
    assert member.end is not None
    assert member.end.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("boundary", "field"),
    [
        ({"every": 0}, "rollout.boundary.every"),
        ({"every": "x"}, "rollout.boundary.every"),
        ({"strings": [""]}, "rollout.boundary.strings"),
        ({"surprise": 1}, "rollout.boundary"),
    ],
)
def test_what_is_wrong_is_refused(make: Make, boundary: dict[str, Any], field: str) -> None:
    engine = make()
    member = Member(engine, **boundary)
    member.submit()
    member.run()
    assert member.end is not None
    assert member.end.finish_reason is FinishReason.ERROR
    assert str(member.end.stop_reason).startswith(field)


@pytest.mark.parametrize("args", [{}, {"round": "r", "group": "g"}, {"round": 1, "group": "g", "index": 0}])
def test_a_member_that_is_not_named_cannot_be_finished(make: Make, args: dict[str, Any]) -> None:
    assert "invalid" in make().scheduler.rollout_rpc("finish_paused", args)
