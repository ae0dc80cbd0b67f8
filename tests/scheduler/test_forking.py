"""Forks over vLLM's real scheduler and block pool, with a model that notices a wrong block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kv_model import KvEngine, expected_tokens
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.request import RequestStatus

from longtail.scheduler.metadata import CUT_STOP_REASON, MemberReport, report_of

PROMPT = list(range(5, 55))
BLOCK_SIZE = 8
LENGTH = 40

Make = Callable[..., KvEngine]


@pytest.fixture(params=[True, False], ids=["cache", "no cache"])
def make(make: Make, request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[KvEngine] = []

    def build(*args: Any, **config: Any) -> KvEngine:
        made.append(make(*args, enable_prefix_caching=request.param, **config))
        return made[-1]

    yield build
    for engine in made:
        engine.run()
        engine.drain()
        assert engine.scheduler.reset_prefix_cache()
        assert engine.scheduler.rollout_rpc("counters", {})["parked_trajectories"] == 0


class Tree:
    """One group whose first member is `m0`; members are forked from it, outputs put together."""

    def __init__(self, engine: KvEngine, target: int = 1, prompt: list[int] = PROMPT, policy: str = "fresh") -> None:
        self.engine = engine
        self.prompt = prompt
        self.target = target
        self.policy = policy
        self.tokens: dict[str, list[int]] = {"m0": []}
        self.reports: dict[str, MemberReport] = {}
        self.ends: dict[str, EngineCoreOutput] = {}
        self.add("m0", 0, [], 1, LENGTH)

    def add(self, name: str, index: int, prior: list[int], group_size: int, length: int = LENGTH) -> None:
        self.tokens[name] = list(prior)
        self.engine.add(
            name,
            self.prompt + prior,
            length,
            {
                "round": "r", "target_groups": self.target, "group": "g", "group_size": group_size, "index": index,
                "park": name, "kv_policy": self.policy, "num_prior_tokens": len(prior), "num_drawn_tokens": 0,
                "num_computed_tokens": max(0, len(self.prompt) + len(prior) - 1) if prior else 0, "can_fork": True,
            },
        )  # fmt: skip

    def fork(self, parent: str, names: list[str], at: int | None = None, **changes: Any) -> dict[str, Any]:
        order = {
            "of": parent, "keys": names, "at": at, "num_prompt_tokens": len(self.prompt), "round": "r", "group": "g",
        } | changes  # fmt: skip
        return self.engine.scheduler.rollout_rpc("fork", order)

    def branch(self, of: str, names: list[str], at: int | None = None) -> dict[str, Any]:
        """Fork, and submit the branches."""
        point = self.fork(of, names, at)
        assert "invalid" not in point, point
        known = self.tokens[of] if not point["is_live"] else self.tokens[of][: point["start"]] + point["token_ids"]
        for place, name in enumerate(names):
            self.add(name, point["index"] + place, known[: point["at"]], point["index"] + len(names))
        return point

    def take(self, outputs: list[EngineCoreOutput]) -> None:
        for output in outputs:
            if (tokens := self.tokens.get(output.request_id)) is None:
                continue
            tokens += output.new_token_ids
            if output.finish_reason is not None:
                self.ends[output.request_id] = output
                report = report_of(output.kv_transfer_params)
                assert report is not None
                self.reports[output.request_id] = report

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.take(self.engine.step()[1])

    def run(self) -> None:
        while self.engine.scheduler.has_requests():
            self.step()
        self.take(self.engine.drain())

    def check(self, version: int = 0, length: int = LENGTH) -> None:
        """All ended by themselves with what an uninterrupted request has; nothing was computed again."""
        for name, tokens in self.tokens.items():
            assert self.ends[name].finish_reason is FinishReason.LENGTH
            assert tokens == expected_tokens(self.prompt, length, version), name

    def num_recomputed(self) -> int:
        """Tokens that went through the model, and were sampled neither by it nor of the prompt, at most once."""
        return sum(report.num_recomputed_tokens for report in self.reports.values())


@pytest.mark.parametrize("num_steps", [3, 7, 8, 20])
def test_a_running_trajectory_is_forked_where_it_is(make: Make, num_steps: int) -> None:
    tree = Tree(make())
    tree.step(num_steps)
    tree.engine.drain() if tree.engine._depth == 1 else None
    before = tree.engine.model.num_scheduled
    point = tree.branch("m0", ["a", "b", "c"])
    assert point["is_live"]
    assert point["index"] == 1
    left = LENGTH - point["at"]
    tree.run()
    tree.check()
    # A branch costs what it samples, and nothing else; so does the parent.
    scheduled = tree.engine.model.num_scheduled - before
    assert 4 * left - (tree.engine._depth - 1) <= scheduled <= 4 * (left + tree.engine._depth - 1)
    assert tree.num_recomputed() == 0
    for name in "abc":
        assert tree.reports[name].num_parked_tokens == len(PROMPT) + point["at"] - 1
        assert tree.reports[name].num_scheduled_tokens - left in range(tree.engine._depth)


@pytest.mark.parametrize("at", [0, 1, 6, 13, 14, 15, 24])
def test_a_fork_at_a_past_position_is_a_rewind(make: Make, at: int) -> None:
    tree = Tree(make())
    tree.step(27)
    point = tree.branch("m0", ["a", "b"], at)
    assert point["at"] == at
    assert point["num_kv_tokens"] == len(PROMPT) + at - 1
    tree.run()
    tree.check()
    assert tree.num_recomputed() == 0


def test_branches_of_branches_that_wait(make: Make) -> None:
    """Four slots: most branches wait, hold nothing, and are forked while they do."""
    engine = make(max_num_seqs=4)
    tree = Tree(engine)
    tree.step(10)
    tree.branch("m0", ["a", "b", "c", "d", "e"])
    tree.step(2)
    before = engine.num_free_blocks
    tree.branch("e", ["f", "g"])
    tree.branch("d", ["h"], 5)
    assert engine.num_free_blocks == before
    tree.run()
    tree.check()
    assert tree.num_recomputed() == 0


def test_a_finished_trajectory_is_forked_while_its_group_is_not_complete(make: Make) -> None:
    tree = Tree(make())
    tree.step(10)
    point = tree.fork("m0", ["late"])  # holds the group open
    while "m0" not in tree.ends:
        tree.step()
    finished = tree.branch("m0", ["a"], 21)
    assert not finished["is_live"]
    assert finished["num_kv_tokens"] == len(PROMPT) + 20
    tree.add("late", point["index"], expected_tokens(PROMPT, point["at"]), 2)
    tree.run()
    tree.check()
    assert tree.num_recomputed() == 0


def test_what_was_kept_for_forks_is_given_up_with_the_group(make: Make) -> None:
    engine = make()
    tree = Tree(engine)
    tree.run()
    assert engine.scheduler.rollout_rpc("counters", {})["parked_trajectories"] == 0
    assert tree.fork("m0", ["a"], 3)["invalid"][0] == "round", "it is complete, so its round is over"
    engine.scheduler.rollout_rpc("forget_round", {"round": "r"})


def test_what_was_kept_for_forks_is_given_up_with_the_round(make: Make) -> None:
    engine = make()
    tree = Tree(engine)
    tree.step(10)
    tree.fork("m0", ["a", "b"])
    tree.run()
    assert engine.scheduler.rollout_rpc("counters", {})["parked_trajectories"] == 3
    engine.scheduler.rollout_rpc("unpark", {"keys": ["a", "b"]})
    engine.scheduler.rollout_rpc("forget_round", {"round": "r"})
    assert engine.scheduler.rollout_rpc("counters", {})["parked_trajectories"] == 0


def test_a_parked_trajectory_is_forked(make: Make) -> None:
    engine = make()
    tree = Tree(engine, target=2)
    tree.step(15)
    tree.take(engine.drain())
    engine.scheduler.rollout_rpc("close_round", {"round": "r"})
    tree.run()
    assert tree.ends["m0"].stop_reason == CUT_STOP_REASON
    had = len(tree.tokens["m0"])
    engine.scheduler.rollout_rpc("forget_round", {"round": "r"})
    point = tree.fork("m0", ["a", "b"], 9, round=None, group=None)
    assert point["num_kv_tokens"] == len(PROMPT) + 8
    for place, (name, prior) in enumerate({"m0": had, "a": 9, "b": 9}.items()):
        tree.add(name, place, expected_tokens(PROMPT, prior), 3)
    tree.run()
    tree.check()
    assert tree.num_recomputed() == 0


def test_without_a_free_block_a_branch_is_computed_again(make: Make) -> None:
    engine = make(num_blocks=14)  # 13 of 8 tokens; one sequence needs 12
    tree = Tree(engine)
    tree.step(30)
    engine.add("other", [300] * 8, 2)
    tree.step(2)
    assert engine.num_free_blocks <= 3
    tree.branch("m0", ["a", "b", "c"])
    tree.run()
    tree.check()
    assert any(report.num_preemptions for report in tree.reports.values())


def test_a_flood_takes_a_waiting_branchs_kv(make: Make) -> None:
    """What the parent does not hold any more is the pool's; what is missing is computed again, the rest is not."""
    engine = make(num_blocks=40)
    tree = Tree(engine)
    tree.step(30)
    point = tree.fork("m0", ["a"])
    engine.scheduler.finish_requests("m0", RequestStatus.FINISHED_ABORTED)
    del tree.tokens["m0"]
    engine.add("flood", [300] * 250, 2)
    engine.run()
    engine.drain()
    known = expected_tokens(PROMPT, point["at"])
    tree.add("a", point["index"], known, 2)
    tree.run()
    tree.check()
    num_lost = engine.scheduler.rollout_rpc("counters", {})["parked_lost_tokens"]
    assert 0 < num_lost < len(PROMPT) + point["at"] - 1
    assert 0 <= tree.reports["a"].num_recomputed_tokens <= num_lost


def test_the_tail_is_copied_not_shared(make: Make) -> None:
    """Negative control: without the copy a branch reads holes, or what its parent writes."""
    engine = make()
    tree = Tree(engine)
    tree.step(12)
    engine.model.copies_work = False
    tree.branch("m0", ["a"])
    tree.run()
    assert tree.tokens["m0"] == expected_tokens(PROMPT, LENGTH)
    assert tree.tokens["a"] != expected_tokens(PROMPT, LENGTH)


@pytest.mark.parametrize("policy", ["fresh", "stale"])
def test_a_branch_follows_its_policy_when_the_weights_change_before_it_begins(make: Make, policy: str) -> None:
    engine = make()
    tree = Tree(engine, policy=policy)
    tree.step(12)
    tree.take(engine.drain())
    point = tree.branch("m0", ["a"])
    tree.take(engine.change_weights(1))
    tree.run()
    at, num_known = point["at"], len(PROMPT) + point["at"]
    known = PROMPT + expected_tokens(PROMPT, at)
    fresh = expected_tokens(known, LENGTH - at, version=1)
    assert (tree.tokens["a"][at:] == fresh) is (policy == "fresh")
    spans = [("1", 0, num_known)] if policy == "fresh" else [("0", 0, num_known - 1), ("1", num_known - 1, num_known)]
    assert tree.reports["a"].segments == [(at, spans)]


def test_the_scheduler_says_what_a_live_trajectory_has(make: Make) -> None:
    engine = make()
    tree = Tree(engine, policy="stale")
    tree.step(12)
    tree.take(engine.change_weights(1))
    had = len(tree.tokens["m0"])
    tree.step(9)
    tree.take(engine.drain())
    point = tree.fork("m0", ["a"])
    assert point["token_ids"] == tree.tokens["m0"]
    assert point["logprobs"] == [-(token % 7) - 0.5 for token in tree.tokens["m0"]]
    assert point["versions"] == [("0", 0, had), ("1", had, point["at"])]
    assert [start for start, _ in point["segments"]] == [0, had]
    earlier = tree.fork("m0", ["b"], had - 2)
    assert earlier["token_ids"] == tree.tokens["m0"][: had - 2]
    assert earlier["versions"] == [("0", 0, had - 2)]
    assert [start for start, _ in earlier["segments"]] == [0]
    engine.scheduler.rollout_rpc("give_up_fork", {"keys": ["a", "b"], "round": "r", "group": "g", "index": 1})


def test_a_group_is_not_complete_before_its_branches(make: Make) -> None:
    engine = make()
    tree = Tree(engine)
    tree.step(10)
    point = tree.fork("m0", ["a", "b"])
    tree.run()
    counts = engine.scheduler.rollout_rpc("round", {"round": "r"})
    assert not counts["closed"]
    tree.add("a", point["index"], expected_tokens(PROMPT, point["at"]), 2)
    tree.run()
    assert not engine.scheduler.rollout_rpc("round", {"round": "r"})["closed"]
    engine.scheduler.rollout_rpc("give_up_fork", {"keys": ["b"], "round": "r", "group": "g", "index": 2})
    counts = engine.scheduler.rollout_rpc("round", {"round": "r"})
    assert counts["num_complete_groups"] == 1
    tree.check()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"of": "nobody"}, "at"),
        ({"at": 99}, "at"),
        ({"at": -1}, "at"),
        ({"num_prompt_tokens": 3}, "num_prompt_tokens"),
        ({"keys": []}, "keys"),
        ({"keys": ["a", "a"]}, "keys"),
        ({"keys": ["m0"]}, "keys"),
        ({"keys": ["x" * 300]}, "keys"),
        ({"round": "other"}, "round"),
        ({"round": None}, "group"),
        ({"group": "other"}, "group"),
        ({"surprise": 1}, "fork"),
        ({"at": "now"}, "fork"),
    ],
)
def test_what_is_wrong_is_refused_and_everything_goes_on(make: Make, changes: dict[str, Any], field: str) -> None:
    engine = make()
    tree = Tree(engine)
    tree.step(10)
    answer = tree.fork("m0", ["a"], **changes)
    assert answer["invalid"][0] == field
    tree.run()
    tree.check()


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logprobs": None}, "no log-probs"),
        ({"structured_outputs": StructuredOutputsParams(regex="a+")}, "structured output"),
    ],
)
def test_what_could_not_be_forked_exactly_is_refused_when_it_arrives(
    make: Make, params: dict[str, Any], reason: str
) -> None:
    engine = make()
    metadata = {"round": "r", "target_groups": 1, "group": "g", "park": "m0", "can_fork": True}
    engine.add("m0", PROMPT, LENGTH, metadata, **params)
    (output,) = [one for _, outputs in engine.run() for one in outputs] + engine.drain()
    assert output.finish_reason is FinishReason.ERROR
    assert str(output.stop_reason).startswith("rollout.can_fork: expected false, because of")
    assert reason in str(output.stop_reason)


def test_a_budget_that_the_prior_tokens_use_up_is_refused(make: Make) -> None:
    engine = make()
    metadata = {"round": "r", "target_groups": 1, "group": "g", "num_prior_tokens": 40}
    engine.add("m0", PROMPT, 40, metadata)
    (output,) = [one for _, outputs in engine.run() for one in outputs] + engine.drain()
    assert output.finish_reason is FinishReason.ERROR
    assert str(output.stop_reason).startswith("max_tokens: expected more than the 40 prior tokens")
