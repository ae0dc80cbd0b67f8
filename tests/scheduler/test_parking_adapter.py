"""Cut, parked and taken up again over vLLM's real scheduler and block pool, with a model that notices a wrong block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kv_model import KvEngine, expected_tokens
from vllm.v1.engine import EngineCoreOutput, FinishReason

from longtail.scheduler.metadata import CUT_STOP_REASON, MemberReport, report_of

PROMPT = list(range(5, 55))
BLOCK_SIZE = 8

Make = Callable[..., KvEngine]


class Round:
    """Members of groups of one, submitted to a harness; outputs are put together over resumes."""

    def __init__(self, engine: KvEngine, prompts: dict[str, list[int]], kv_policy: str = "fresh") -> None:
        self.engine = engine
        self.prompts = prompts
        self.kv_policy = kv_policy
        self.tokens: dict[str, list[int]] = {name: [] for name in prompts}
        self.logprobs: dict[str, list[float]] = {name: [] for name in prompts}
        self.computed = dict.fromkeys(prompts, 0)
        self.reports: dict[str, MemberReport] = {}
        self.ends: dict[str, EngineCoreOutput] = {}
        self.number = 0

    def submit(self, lengths: dict[str, int], target: int) -> None:
        """A round of those members that are not at their length yet."""
        self.number += 1
        for name, length in lengths.items():
            self.engine.add(
                f"{name}#{self.number}",
                self.prompts[name] + self.tokens[name],
                length,
                {
                    "round": f"{id(self)}/{self.number}", "target_groups": target, "group": name, "park": name,
                    "kv_policy": self.kv_policy, "num_prior_tokens": len(self.tokens[name]),
                    "num_computed_tokens": self.computed[name],
                },
            )  # fmt: skip

    def take(self, outputs: list[EngineCoreOutput]) -> None:
        for output in outputs:
            name = output.request_id.split("#")[0]
            if name not in self.prompts:
                continue
            self.tokens[name] += output.new_token_ids
            if output.new_logprobs is not None:
                self.logprobs[name] += output.new_logprobs.logprobs[:, 0].tolist()
            if output.finish_reason is not None:
                self.ends[name] = output
                report = report_of(output.kv_transfer_params)
                assert report is not None
                self.reports[name] = report
                self.computed[name] = report.num_computed_tokens

    def run(self) -> int:
        """Step until nothing is left; returns the tokens that went through the model."""
        before = self.engine.model.num_scheduled
        while self.engine.scheduler.has_requests():
            self.take(self.engine.step()[1])
        self.take(self.engine.drain())
        return self.engine.model.num_scheduled - before


def prompts(count: int) -> dict[str, list[int]]:
    return {f"m{i}": [7 + i, *PROMPT] for i in range(count)}


def cut_at(engine: KvEngine, count: int, num_tokens: int, length: int, kv_policy: str = "fresh") -> Round:
    """A round whose member `short` ends after `num_tokens`, which cuts `count` others of the given length."""
    round_ = Round(engine, prompts(count) | {"short": PROMPT}, kv_policy)
    round_.submit({name: length for name in prompts(count)} | {"short": num_tokens}, target=1)
    round_.run()
    for name in prompts(count):
        assert round_.ends[name].finish_reason is FinishReason.ABORT
        assert round_.ends[name].stop_reason == CUT_STOP_REASON
        assert len(round_.tokens[name]) >= num_tokens - 1
    return round_


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_resume_costs_its_remaining_tokens_and_nothing_else(make: Make, enable_prefix_caching: bool) -> None:
    engine = make(enable_prefix_caching=enable_prefix_caching)
    round_ = cut_at(engine, 5, num_tokens=13, length=60)
    had = {name: len(round_.tokens[name]) for name in prompts(5)}
    left = sum(60 - count for count in had.values())
    round_.submit(dict.fromkeys(prompts(5), 60), target=5)
    scheduled = round_.run()
    # Asynchronous scheduling runs one step ahead of what it knows for each request that ends.
    assert left <= scheduled <= left + 5 * (engine._depth - 1)
    for name, prompt in prompts(5).items():
        assert round_.tokens[name] == expected_tokens(prompt, 60)
        assert round_.reports[name].num_parked_tokens == len(prompt) + had[name] - 1
        assert round_.reports[name].num_recomputed_tokens == 0


def test_any_number_of_resumes(make: Make) -> None:
    engine = make()
    round_ = Round(engine, prompts(1) | {f"s{i}": PROMPT for i in range(6)})
    for i in range(6):
        round_.submit({"m0": 50, f"s{i}": 6}, target=1)
        round_.run()
    round_.submit({"m0": 50}, target=1)
    round_.run()
    assert round_.tokens["m0"] == expected_tokens(prompts(1)["m0"], 50)
    assert round_.engine.scheduler.rollout_rpc("counters", {})["parked_trajectories"] == 0


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_flood_takes_parked_blocks_back_from_the_tail(make: Make, enable_prefix_caching: bool) -> None:
    engine = make(num_blocks=80, enable_prefix_caching=enable_prefix_caching)
    round_ = cut_at(engine, 4, num_tokens=13, length=60)
    parked = engine.scheduler.rollout_rpc("counters", {})
    assert parked["parked_trajectories"] == 4
    assert engine.num_free_blocks == 79, "parked blocks count as free"
    for i in range(4):
        engine.add(f"flood{i}", [200 + i] * 100, 20)
    engine.run()
    engine.drain()
    left = engine.scheduler.rollout_rpc("counters", {})
    assert left["parked_tokens"] < parked["parked_tokens"]
    assert left["parked_lost_tokens"] == parked["parked_tokens"] - left["parked_tokens"]
    round_.submit(dict.fromkeys(prompts(4), 60), target=4)
    round_.run()
    for name, prompt in prompts(4).items():
        assert round_.tokens[name] == expected_tokens(prompt, 60)
    assert sum(round_.reports[name].num_recomputed_tokens for name in prompts(4)) <= left["parked_lost_tokens"]


def test_other_traffic_takes_no_parked_block_while_another_is_free(make: Make) -> None:
    """Without the queue of its own, the parked blocks are the least recently used and go first (negative control)."""
    lost = {}
    for fair in (True, False):
        engine = make(num_blocks=120)
        cut_at(engine, 4, num_tokens=13, length=60)
        if not fair:
            queue = engine.scheduler.kv_cache_manager.block_pool.free_block_queue
            queue._is_parked = lambda block_id: False
            for block in queue.get_all_free_blocks():
                queue.remove(block)
                queue.append(block)
        for i in range(30):  # 30 evaluation requests of 5 blocks each, one after the other
            engine.add(f"evaluation{i}", [100 + i] * 30, 8)
            engine.run()
            engine.drain()
        lost[fair] = engine.scheduler.rollout_rpc("counters", {})["parked_lost_tokens"]
    assert lost[True] == 0
    assert lost[False] > 0


def test_parked_kv_never_blocks_a_cache_reset(make: Make) -> None:
    engine = make()
    round_ = cut_at(engine, 3, num_tokens=13, length=30)
    assert engine.scheduler.reset_prefix_cache()
    assert engine.scheduler.rollout_rpc("counters", {})["parked_trajectories"] == 0
    round_.submit(dict.fromkeys(prompts(3), 30), target=3)
    round_.run()
    for name, prompt in prompts(3).items():
        assert round_.tokens[name] == expected_tokens(prompt, 30)
        assert round_.reports[name].num_recomputed_tokens == len(prompt) + 12 or engine._depth > 1


def test_the_tail_is_copied_not_shared(make: Make) -> None:
    """Negative control: without the copy the model reads holes."""
    engine = make()
    round_ = cut_at(engine, 2, num_tokens=11, length=40)
    engine.model.copies_work = False
    round_.submit(dict.fromkeys(prompts(2), 40), target=2)
    round_.run()
    assert round_.tokens["m0"] != expected_tokens(prompts(2)["m0"], 40)


@pytest.mark.parametrize("num_tokens", [3, 4, 6])
def test_a_sequence_that_fills_the_pool_is_resumed(make: Make, num_tokens: int) -> None:
    """The copy of its last block would be one block too many; what is full is taken up."""
    engine = make(num_blocks=8)  # 7 of 8 tokens, and vLLM's null block
    round_ = Round(engine, {"m0": PROMPT})
    round_.submit({"m0": 6}, target=1)
    while len(round_.tokens["m0"]) < num_tokens - 1:
        round_.take(engine.step()[1])
    round_.take(engine.drain())
    engine.scheduler.rollout_rpc("close_round", {"round": f"{id(round_)}/1"})
    round_.run()
    if len(round_.tokens["m0"]) < 6:
        round_.submit({"m0": 6}, target=1)
        assert round_.run() <= BLOCK_SIZE + 6
        assert round_.reports["m0"].num_parked_tokens == 48
    assert round_.tokens["m0"] == expected_tokens(PROMPT, 6)


def test_kv_of_another_sequence_is_never_taken(make: Make) -> None:
    engine = make()
    round_ = cut_at(engine, 1, num_tokens=13, length=30)
    round_.prompts["m0"] = [99, *round_.prompts["m0"][1:]]
    round_.submit({"m0": 30}, target=1)
    round_.run()
    assert round_.reports["m0"].num_parked_tokens == 0


def test_fresh_kv_after_a_weight_change(make: Make) -> None:
    engine = make()
    round_ = cut_at(engine, 3, num_tokens=13, length=40)
    before = {name: list(tokens) for name, tokens in round_.tokens.items()}
    engine.change_weights(1)
    round_.submit(dict.fromkeys(prompts(3), 40), target=3)
    round_.run()
    for name, prompt in prompts(3).items():
        known = prompt + before[name]
        assert round_.tokens[name][len(before[name]) :] == expected_tokens(known, 40 - len(before[name]), version=1)
        assert round_.reports[name].segments == [(len(before[name]), [("1", 0, len(known))])]


def test_stale_kv_after_a_weight_change(make: Make) -> None:
    engine = make()
    round_ = cut_at(engine, 3, num_tokens=13, length=40, kv_policy="stale")
    before = {name: list(tokens) for name, tokens in round_.tokens.items()}
    engine.change_weights(1)
    left = sum(40 - len(round_.tokens[name]) for name in prompts(3))
    round_.submit(dict.fromkeys(prompts(3), 40), target=3)
    assert round_.run() <= left + 3 * (engine._depth - 1)
    for name, prompt in prompts(3).items():
        num_known = len(prompt) + len(before[name])
        # What the model really read, against what the report says of it.
        first = engine.model.sampled_from[f"{name}#2"][0]
        assert [version for _, version in first] == [0] * (num_known - 1) + [1]
        spans = [("0", 0, num_known - 1), ("1", num_known - 1, num_known)]
        assert round_.reports[name].segments == [(len(before[name]), spans)]
        fresh = expected_tokens(prompt + before[name], 40 - len(before[name]), version=1)
        assert round_.tokens[name][len(before[name]) :] != fresh, "negative control: stale KV samples other tokens"


@pytest.mark.parametrize(("policy", "is_kept"), [("stale_up_to:1", False), ("stale_up_to:2", True)])
def test_kv_is_kept_up_to_an_age(make: Make, policy: str, is_kept: bool) -> None:
    engine = make()
    round_ = cut_at(engine, 1, num_tokens=13, length=40, kv_policy=policy)
    engine.change_weights(1)
    engine.change_weights(2)
    round_.submit({"m0": 40}, target=1)
    round_.run()
    assert (round_.reports["m0"].num_parked_tokens > 0) is is_kept
    assert (round_.reports["m0"].num_recomputed_tokens == 0) is is_kept


@pytest.mark.parametrize("share_prefix", [False, True])
def test_new_requests_hit_no_prefix_of_older_weights_unless_asked(make: Make, share_prefix: bool) -> None:
    engine = make()
    engine.add("first", PROMPT, 20)
    engine.run()
    engine.drain()
    engine.change_weights(1, share_prefix=share_prefix)
    round_ = Round(engine, {"again": PROMPT})
    round_.submit({"again": 20}, target=1)
    round_.run()
    hit = len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE if share_prefix else 0
    assert round_.reports["again"].num_cached_tokens == hit
    read = engine.model.sampled_from["again#1"][0]
    assert [version for _, version in read] == [0] * hit + [1] * (len(PROMPT) - hit)
    spans = [("0", 0, hit), ("1", hit, len(PROMPT))] if hit else [("1", 0, len(PROMPT))]
    assert round_.reports["again"].segments == [(0, spans)]


def test_sharing_prefixes_of_older_weights_keeps_hits_on_current_ones(make: Make) -> None:
    engine = make()
    engine.add("first", PROMPT, 5)
    engine.run()
    engine.drain()
    engine.change_weights(1, share_prefix=True)
    round_ = cut_at(engine, 1, num_tokens=13, length=40)
    engine.scheduler.rollout_rpc("unpark", {"keys": ["m0"]})
    before = round_.computed["m0"]
    round_.submit({"m0": 40}, target=1)
    round_.run()
    report = round_.reports["m0"]
    assert report.num_cached_tokens >= before // BLOCK_SIZE * BLOCK_SIZE - BLOCK_SIZE > 0
    assert {version for _, spans in report.segments for version, *_ in spans} == {"1"}


def test_a_block_filled_again_is_of_the_weights_that_filled_it(make: Make) -> None:
    engine = make(num_blocks=8)

    def tables(name: str) -> list[int]:
        engine.step()
        return list(engine.scheduler.kv_cache_manager.get_block_ids(name)[0])

    engine.add("first", PROMPT, 2)
    first = tables("first")
    engine.run()
    engine.drain()
    engine.change_weights(1, share_prefix=True)
    for number in range(2):  # the pool hands its blocks out in reverse, and in reverse again
        engine.add(f"flood{number}", [99 + number] * 55, 1)
        engine.run()
    for name in ("filled", "shared"):
        round_ = Round(engine, {name: PROMPT})
        round_.submit({name: 2}, target=1)
        assert any(old == new for old, new in zip(first, tables(f"{name}#1"), strict=False))
        round_.run()
        assert {version for _, version in engine.model.sampled_from[f"{name}#1"][0]} == {1}
        assert {span[0] for _, spans in round_.reports[name].segments for span in spans} == {"1"}
        assert round_.reports[name].num_cached_tokens == (48 if name == "shared" else 0)


def test_stale_kv_is_never_published(make: Make) -> None:
    engine = make()
    round_ = cut_at(engine, 1, num_tokens=13, length=80, kv_policy="stale")
    engine.change_weights(1)
    round_.submit({"m0": 80}, target=1)
    round_.run()
    other = Round(engine, {"other": prompts(1)["m0"] + round_.tokens["m0"][:60]})
    other.submit({"other": 5}, target=1)
    other.run()
    assert {version for _, version in engine.model.sampled_from["other#1"][0]} == {1}


@pytest.mark.parametrize("policy", ["fresh", "stale"])
def test_running_members_follow_their_policy(make: Make, policy: str) -> None:
    engine = make()
    round_ = Round(engine, prompts(3), policy)
    round_.submit(dict.fromkeys(prompts(3), 40), target=3)
    for _ in range(12):
        round_.take(engine.step()[1])
    round_.take(engine.change_weights(1))
    before = {name: list(tokens) for name, tokens in round_.tokens.items()}
    assert all(before.values())
    round_.run()
    for name, prompt in prompts(3).items():
        num_known = len(prompt) + len(before[name])
        fresh = expected_tokens(prompt + before[name], 40 - len(before[name]), version=1)
        assert (round_.tokens[name][len(before[name]) :] == fresh) is (policy == "fresh")
        spans = [("1", 0, num_known)]
        if policy == "stale":
            spans = [("0", 0, num_known - 1), ("1", num_known - 1, num_known)]
        assert round_.reports[name].segments == [(0, [("0", 0, len(prompt))]), (len(before[name]), spans)]


@pytest.mark.parametrize(("policy", "versions"), [("stale_up_to:1", {2}), ("stale_up_to:2", {0, 1, 2})])
def test_other_running_requests_follow_the_policy_over_any_number_of_changes(
    make: Make, policy: str, versions: set[int]
) -> None:
    engine = make()
    engine.add("other", PROMPT, 40)
    for version in (1, 2):
        for _ in range(12):
            engine.step()
        engine.change_weights(version, kv_policy=policy)
    engine.run()
    assert {version for _, version in engine.model.sampled_from["other"][-1]} == versions


def test_metadata_of_a_resume_is_checked_against_the_request(make: Make) -> None:
    engine = make()
    bad = {"round": "r", "target_groups": 1, "group": "0", "num_prior_tokens": 50}
    engine.add("bad", PROMPT, 55, bad)
    (output,) = [one for _, outputs in engine.run() for one in outputs] + engine.drain()
    assert output.finish_reason is FinishReason.ERROR
    assert "num_prior_tokens: expected at most 49" in str(output.stop_reason)
