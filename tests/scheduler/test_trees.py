"""Trees over vLLM's real scheduler and block pool, with a model that notices a wrong block."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kv_model import VOCAB_SIZE, KvEngine, expected_tokens
from tree_driver import GrownTree
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from longtail.scheduler.metadata import CUT_STOP_REASON
from longtail.scheduler.tree_policy import TreeSpec

PROMPT = list(range(5, 55))

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
        assert not engine.scheduler._trees
        assert not engine.scheduler._trees._num_planned_tokens
        assert not engine.scheduler._members


def check(tree: GrownTree, version: int = 0) -> None:
    """Every leaf ended by itself with what an uninterrupted request has."""
    assert len(tree.tokens) + len(tree.dismissed) == tree.spec.width
    for path, tokens in tree.tokens.items():
        assert tree.has_ended_naturally(path)
        assert tokens == expected_tokens(tree.prompt, len(tokens), version), path


def run_and_check(tree: GrownTree) -> None:
    tree.run()
    check(tree)


SPECS = {
    "plain": TreeSpec(width=8, depth=4, segment_tokens=6),
    "wide": TreeSpec(width=8, depth=6, segment_tokens=5, branching=4),
    "one path to the end": TreeSpec(width=6, depth=3, segment_tokens=7, branching=1, fallback="any"),
    "roots": TreeSpec(width=8, depth=4, segment_tokens=6, min_roots=3, max_roots=5),
    "block size": TreeSpec(width=8, depth=4, segment_tokens=8),
    "single tokens": TreeSpec(width=9, depth=5, segment_tokens=1),
    "by log-prob": TreeSpec(width=8, depth=4, segment_tokens=6, split="logprob", split_scope="segment"),
    "levels": TreeSpec(width=8, depth=4, segment_tokens=6, synchronous=True),
    "levels of single tokens": TreeSpec(width=9, depth=5, segment_tokens=1, synchronous=True),
    "levels of roots": TreeSpec(width=5, depth=4, segment_tokens=5, max_roots=3, synchronous=True),
    "levels by log-prob": TreeSpec(width=8, depth=4, segment_tokens=8, synchronous=True, split="logprob"),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_tree_has_its_leaves_and_recomputes_nothing(make: Make, name: str) -> None:
    spec = SPECS[name]
    engine = make()
    tree = GrownTree(engine, spec, PROMPT)
    tree.run()
    check(tree)
    assert {len(tokens) for tokens in tree.tokens.values()} == {spec.max_tokens}
    roots = [path for path, report in tree.reports.items() if report.birth is None]
    assert len(roots) in range(spec.min_roots, (spec.max_roots or spec.min_roots) + 1)
    # A path stops before the KV of its last token, and asynchronous scheduling runs one token ahead of an end.
    distinct = len(roots) * len(PROMPT) + sum(map(len, tree.own.values()))
    ahead = spec.width * (engine._depth - 1) * (1 + spec.synchronous * spec.depth)
    if not spec.synchronous or engine._depth == 1:
        assert tree.num_recomputed == 0
    assert engine.model.num_scheduled <= distinct + ahead
    assert engine.scheduler.rollout_rpc("round", {"round": "r"})["num_complete_groups"] == 1


def test_the_prompt_is_not_computed_again_for_roots_with_the_cache(make: Make) -> None:
    engine = make()
    tree = GrownTree(engine, TreeSpec(width=6, depth=3, segment_tokens=4), PROMPT)
    tree.run()
    check(tree)
    (root,) = (path for path, report in tree.reports.items() if report.birth is None)
    for path, report in tree.reports.items():
        if path != root:
            assert report.birth is not None
            assert report.num_parked_tokens == len(PROMPT) + report.birth.at - 1
            assert report.num_scheduled_tokens in range(len(tree.own[path]), len(tree.own[path]) + engine._depth)


def test_a_path_that_goes_on_is_not_stopped_at_its_boundary(make: Make) -> None:
    engine = make()
    tree = GrownTree(engine, TreeSpec(width=8, depth=4, segment_tokens=6), PROMPT)
    tree.step(8 + engine._depth)
    assert len(engine.scheduler.running) == 2, "it and its branch"
    scheduled = engine.step()[0].num_scheduled_tokens
    assert set(scheduled.values()) == {1}
    tree.take([])
    tree.run()
    assert all(report.num_preemptions == 0 for report in tree.reports.values())


def test_branches_decode_before_requests_that_wait(make: Make) -> None:
    engine = make(max_num_seqs=2)
    tree = GrownTree(engine, TreeSpec(width=2, depth=3, segment_tokens=4), PROMPT)
    for name, length in (("x", 4), ("y", 3), ("z", 3)):
        engine.add(name, PROMPT[:9], length)
    while not any(request.request_id.endswith("/1") for request in engine.scheduler.running):
        tree.step()
    assert {"y", "z"} <= engine.scheduler.requests.keys()
    tree.run()
    check(tree)


@pytest.mark.parametrize("spec", [SPECS["plain"], SPECS["levels"]], ids=["plain", "levels"])
def test_members_are_born_inside_of_paths_that_ended(make: Make, spec: TreeSpec) -> None:
    """The only root ends before it could branch enough: others begin inside of it, or at the prompt."""
    engine = make()
    tree = GrownTree(engine, spec, PROMPT, stop_token_ids=[expected_tokens(PROMPT, 9)[8]])
    tree.run()
    check(tree)
    assert {len(tokens) for tokens in tree.tokens.values()} == {9}
    births = [report.birth for report in tree.reports.values() if report.birth is not None]
    assert len(births) == 7
    assert {birth.reason for birth in births} == {"boundary", "fallback"}
    assert {birth.at for birth in births} == {6}
    assert tree.num_recomputed == 0 or (spec.synchronous and engine._depth == 2)


def test_an_end_at_a_boundary_is_an_end(make: Make) -> None:
    engine = make()
    tree = GrownTree(engine, SPECS["plain"], PROMPT, stop_token_ids=[expected_tokens(PROMPT, 6)[5]])
    tree.run()
    check(tree)
    assert {len(tokens) for tokens in tree.tokens.values()} == {6}
    assert {r.birth.at for r in tree.reports.values() if r.birth is not None} == {0}, "there is no boundary inside"


def test_without_a_fallback_the_rest_is_dismissed(make: Make) -> None:
    engine = make()
    spec = TreeSpec(width=8, depth=4, segment_tokens=6, fallback="none")
    tree = GrownTree(engine, spec, PROMPT, stop_token_ids=[expected_tokens(PROMPT, 9)[8]])
    tree.run()
    check(tree)
    assert len(tree.dismissed) == 6
    assert all(tree.reports[path].is_unborn for path in tree.dismissed)
    assert engine.scheduler.rollout_rpc("round", {"round": "r"})["num_complete_groups"] == 1
    assert engine.scheduler.rollout_rpc("round", {"round": "r"})["closed"]


@pytest.mark.parametrize("spec", [SPECS["plain"], SPECS["levels"]], ids=["plain", "levels"])
@pytest.mark.parametrize("num_steps", [1, 8, 9, 10, 14, 15, 16, 17])
def test_a_tree_that_is_cut_goes_on_in_another_round(make: Make, num_steps: int, spec: TreeSpec) -> None:
    engine = make()
    tree = GrownTree(engine, spec, PROMPT, length=15, target=2)
    tree.step(num_steps)
    tree.take(engine.drain())
    engine.scheduler.rollout_rpc("close_round", {"round": "r"})
    tree.run()
    assert len(tree.ends) == spec.width
    assert {end.stop_reason for end in tree.ends.values() if end.finish_reason is FinishReason.ABORT} <= {
        CUT_STOP_REASON
    }
    engine.scheduler.rollout_rpc("forget_round", {"round": "r"})
    ended = {path: tokens for path, tokens in tree.tokens.items() if tree.has_ended_naturally(path)}
    begun = {path: tokens for path, tokens in tree.tokens.items() if path not in ended}
    second = GrownTree(engine, spec, PROMPT, name="t", round_id="s", begun=begun, ended=ended, length=15)
    second.run()
    assert sorted([*second.tokens, *ended]) == list(range(spec.width))
    for path, tokens in second.tokens.items():
        assert tokens == expected_tokens(PROMPT, len(tokens)), path
    assert second.num_recomputed <= engine._depth - 1 + (spec.synchronous and engine._depth == 2) * 99


def test_a_cut_in_the_step_of_a_birth(make: Make) -> None:
    """The round has its target in the very step in which a path of another tree branches."""
    for offset in range(12):
        engine = make()
        small = GrownTree(engine, TreeSpec(width=1, depth=1, segment_tokens=8 + offset), PROMPT[:20], name="a")
        tree = GrownTree(engine, SPECS["plain"], PROMPT, name="b")
        while engine.scheduler.has_requests():
            outputs = engine.step()[1]
            small.take(outputs)
            tree.take(outputs)
        tree.put_together()
        for path, tokens in tree.tokens.items():
            assert tokens == expected_tokens(PROMPT, len(tokens)), path
        assert len(tree.ends) == 8
        engine.scheduler.rollout_rpc("unpark", {"keys": [f"b.{path}" for path in range(8)]})


@pytest.mark.parametrize("spec", [SPECS["plain"], SPECS["levels"]], ids=["plain", "levels"])
def test_a_pool_that_is_too_small_computes_again(make: Make, spec: TreeSpec) -> None:
    engine = make(num_blocks=16)
    tree = GrownTree(engine, spec, PROMPT)
    tree.run()
    check(tree)


def test_trees_wait_for_room_as_wholes(make: Make) -> None:
    """Two trees fit: the third begins when one has ended, so that nobody loses KV."""
    spec = TreeSpec(width=8, depth=4, segment_tokens=8)
    need = spec.num_planned_tokens(len(PROMPT)) // 8
    engine = make(num_blocks=2 * need + 17)
    trees = [GrownTree(engine, spec, PROMPT, name=name, target=4) for name in "abcd"]
    most = 0
    while engine.scheduler.has_requests():
        outputs = engine.step()[1]
        for tree in trees:
            tree.take(outputs)
        most = max(most, len({request.request_id.split("/")[1] for request in engine.scheduler.running}))
    for tree in trees:
        tree.take(engine.drain())
        tree.put_together()
        check(tree)
        assert tree.num_recomputed == 0
    assert most == 2


@pytest.mark.parametrize("spec", [SPECS["plain"], SPECS["levels"]], ids=["plain", "levels"])
@pytest.mark.parametrize("policy", ["fresh", "stale"])
def test_new_weights_in_the_middle_of_a_tree(make: Make, policy: str, spec: TreeSpec) -> None:
    engine = make()
    tree = GrownTree(engine, spec, PROMPT, policy=policy)
    tree.step(12)
    tree.take(engine.change_weights(1))
    tree.run()
    assert len(tree.tokens) == spec.width
    for path, report in tree.reports.items():
        assert len(tree.tokens[path]) == spec.max_tokens
        if policy == "fresh":
            assert all({v for v, *_ in spans} == {"1"} for start, spans in report.segments if start >= 12 + 2)


@pytest.mark.parametrize("name", ["plain", "levels", "levels of single tokens", "roots"])
def test_a_caller_aborts_members(make: Make, name: str) -> None:
    """Any of them, in two batches, whatever they do at the time: running, held at a boundary, or unborn."""
    engine, spec, rng = make(), SPECS[name], random.Random(name)
    for trial in range(40):
        tree = GrownTree(engine, spec, PROMPT, round_id=f"r{trial}")
        gone: set[int] = set()
        for _ in range(2):
            tree.step(rng.randrange(14))
            left = [path for path in range(spec.width) if path not in tree.ends and path not in gone]
            batch = rng.sample(left, rng.randint(0, len(left)))
            requests = engine.scheduler.finish_requests(
                [f"r{trial}/t/{path}" for path in batch], RequestStatus.FINISHED_ABORTED
            )
            assert sorted(request.request_id for request in requests) == sorted(f"r{trial}/t/{one}" for one in batch)
            gone.update(batch)
        tree.run_out()
        assert sorted([*tree.ends, *gone]) == list(range(spec.width))
        for path, end in tree.ends.items():
            assert end.finish_reason is FinishReason.LENGTH, path
        if not gone:
            tree.put_together()
            check(tree)
        engine.scheduler.rollout_rpc("close_round", {"round": f"r{trial}"})


@pytest.mark.parametrize("spec", [SPECS["plain"], SPECS["levels"]], ids=["plain", "levels"])
@pytest.mark.parametrize("num_steps", range(1, 20, 3))
def test_everything_is_aborted(make: Make, num_steps: int, spec: TreeSpec) -> None:
    """All are told of, those too that never began, and of a tree that waits for room; what ended is not kept."""
    engine = make(num_blocks=spec.num_planned_tokens(len(PROMPT)) // 8 + 9)
    trees = [GrownTree(engine, spec, PROMPT, name=name, target=2) for name in "ab"]
    for _ in range(num_steps):
        outputs = engine.step()[1]
        for tree in trees:
            tree.take(outputs)
    left = {f"r/{tree.name}/{path}" for tree in trees for path in range(8) if path not in tree.ends}
    requests = engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert {request.request_id for request in requests} == left
    assert all(request.is_finished() for request in requests)
    assert not engine.scheduler._members
    engine.step()
    engine.drain()


@pytest.mark.parametrize("name", ["plain", "roots", "levels", "levels of single tokens", "levels of roots"])
def test_paths_end_anywhere(make: Make, name: str) -> None:
    """At any token: with asynchronous scheduling a path that is held may end with the token that was on its way."""
    engine, spec = make(), SPECS[name]
    for end in range(1, spec.max_tokens + 1):
        *before, last = expected_tokens(PROMPT, end)
        ways: list[dict[str, Any]] = [{"length": end}] + [{"stop_token_ids": [last]}] * (last not in before)
        for number, how in enumerate(ways * 3):
            tree = GrownTree(engine, spec, PROMPT, round_id=f"{end} {number}", seed=number, **how)
            tree.run()
            check(tree)
            assert {len(tokens) for tokens in tree.tokens.values()} == {end}
            assert engine.scheduler.rollout_rpc("counters", {})["parked_trajectories"] == 0


def test_a_tree_of_which_nothing_can_go_on_is_dismissed_and_others_begin(make: Make) -> None:
    engine = make(num_blocks=60)
    spec = TreeSpec(width=8, depth=4, segment_tokens=6, fallback="none")
    prefix = expected_tokens(PROMPT, 9)
    over = GrownTree(engine, spec, PROMPT, name="a", target=2, ended=dict.fromkeys(range(3), prefix))
    assert not engine.scheduler._trees
    other = GrownTree(engine, spec, PROMPT, name="b", target=2)
    other.run()
    check(other)
    assert engine.scheduler.rollout_rpc("round", {"round": "r"})["num_complete_groups"] == 2
    over.take([])


def test_a_round_that_is_over_begins_no_tree_of_its_own_that_waited(make: Make) -> None:
    spec = TreeSpec(width=8, depth=4, segment_tokens=6, fallback="none")
    engine = make(num_blocks=spec.num_planned_tokens(len(PROMPT)) // 8 + 9)
    first = GrownTree(engine, spec, PROMPT, name="a", target=2)
    prefix = expected_tokens(PROMPT, 9)
    waiting = GrownTree(engine, spec, PROMPT, name="b", target=2, ended=dict.fromkeys(range(3), prefix))
    other = GrownTree(engine, spec, PROMPT, name="c", round_id="s")
    first.step(5)
    engine.scheduler.rollout_rpc("close_round", {"round": "r"})
    while engine.scheduler.has_requests():
        outputs = engine.step()[1]
        for tree in (first, waiting, other):
            tree.take(outputs)
    other.take(engine.drain())
    other.put_together()
    check(other)
    assert {end.stop_reason for end in waiting.ends.values()} == {CUT_STOP_REASON}
    engine.scheduler.rollout_rpc("unpark", {"keys": [f"a.{path}" for path in range(8)]})


def ended_path(**changes: Any) -> dict[str, Any]:
    """A tree of two, of which the second ended earlier."""
    ended = {"path": 1, "token_ids": [3, 4], "by_itself": True, **changes}
    return {"spec": {"width": 2, "depth": 2, "segment_tokens": 4}, "seed": 0, "path": 0, "ended": [ended]}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"can_fork": True}, "rollout.can_fork"),
        ({"boundary": {"every": 3}}, "rollout.boundary"),
        ({"park": None}, "rollout.tree"),
        ({"tree": {"spec": {"width": 4, "depth": 2, "segment_tokens": 4}, "seed": 0, "path": 4}}, "rollout.tree.path"),
        ({"tree": {"spec": {"width": 0, "depth": 2, "segment_tokens": 4}, "seed": 0, "path": 0}}, "rollout.tree"),
        ({"num_prior_tokens": 2}, "rollout.tree.has_begun"),
        ({"tree": ended_path(path=0)}, "rollout.tree.ended[0].path"),
        ({"tree": ended_path(path=2)}, "rollout.tree.ended[0].path"),
        ({"tree": ended_path(token_ids=[3] * 9)}, "rollout.tree.ended[0].token_ids"),
        ({"tree": ended_path(token_ids=[3, -1])}, "rollout.tree.ended[0].token_ids"),
        ({"tree": ended_path(token_ids=[VOCAB_SIZE * 1000])}, "rollout.tree.ended[0].token_ids"),
        ({"tree": ended_path(token_ids=[1 << 40])}, "rollout.tree.ended[0].token_ids"),
        ({"tree": ended_path(sums=[float("nan")])}, "rollout.tree.ended[0].sums"),
        ({"tree": ended_path() | {"sums": [float("inf")]}}, "rollout.tree.sums"),
        ({"group_size": 2, "tree": ended_path()}, "rollout.group_size"),
    ],
)
def test_what_is_wrong_is_answered(make: Make, changes: dict[str, Any], field: str) -> None:
    engine = make()
    good = {
        "round": "r", "target_groups": 1, "group": "g", "group_size": 1, "index": 0, "park": "p",
        "tree": {"spec": {"width": 1, "depth": 2, "segment_tokens": 4}, "seed": 0, "path": 0},
    }  # fmt: skip
    engine.add("bad", PROMPT, 8, good | changes)
    engine.add("good", PROMPT, 8, good)
    outputs = [output for _, step in engine.run() for output in step] + engine.drain()
    ends = {output.request_id: output for output in outputs if output.finish_reason is not None}
    assert ends["bad"].finish_reason is FinishReason.ERROR
    assert ends["bad"].stop_reason.startswith(field)
    assert ends["good"].finish_reason is FinishReason.LENGTH


def test_a_member_of_a_tree_may_not_have_stop_strings_that_the_front_end_looks_for(make: Make) -> None:
    engine = make()
    tree = GrownTree(engine, TreeSpec(width=1, depth=2, segment_tokens=4), PROMPT, stop=["x"])
    tree.run()
    assert str(tree.ends[0].stop_reason).startswith("stop: expected nothing, in a tree")


def test_a_member_that_contradicts_its_tree_is_answered(make: Make) -> None:
    engine = make()
    good = {
        "round": "r", "target_groups": 1, "group": "g", "group_size": 2, "index": 0, "park": "p",
        "tree": {"spec": {"width": 2, "depth": 2, "segment_tokens": 4}, "seed": 0, "path": 0},
    }  # fmt: skip
    engine.add("first", PROMPT, 8, good)
    second = good | {"index": 1, "park": "q"}
    engine.add(
        "other spec",
        PROMPT,
        8,
        second | {"tree": {**good["tree"], "spec": {**good["tree"]["spec"], "depth": 3}, "path": 1}},
    )
    engine.add("no tree", PROMPT, 8, {key: value for key, value in second.items() if key != "tree"})
    engine.add("same path", PROMPT, 8, second)
    right = second | {"tree": {**good["tree"], "path": 1}}
    engine.add("other seed", PROMPT, 8, second | {"tree": {**good["tree"], "path": 1, "seed": 1}})
    engine.add("other prompt", PROMPT[1:], 8, right)
    engine.add("other budget", PROMPT, 7, right)
    engine.add("other salt", PROMPT, 8, right, cache_salt="x")
    engine.add("other policy", PROMPT, 8, right | {"kv_policy": "stale"})
    engine.add("second", PROMPT, 8, right)
    engine.add("too late", PROMPT, 8, right)
    outputs = [output for _, step in engine.run() for output in step] + engine.drain()
    ends = {output.request_id: output for output in outputs if output.finish_reason is not None}
    fields = {
        "other spec": "rollout.tree.spec", "no tree": "rollout.tree", "same path": "rollout.tree.path",
        "other seed": "rollout.tree.seed", "other prompt": "prompt", "other budget": "max_tokens",
        "other salt": "cache_salt", "other policy": "rollout.kv_policy",
        "too late": "rollout.tree",
    }  # fmt: skip
    assert {name: end.stop_reason.partition(":")[0] for name, end in ends.items() if name in fields} == fields
    assert ends.keys() == {*fields, "first", "second"}
    assert ends["first"].finish_reason is ends["second"].finish_reason is FinishReason.LENGTH


def test_paths_are_neither_missing_nor_told_of_twice(make: Make) -> None:
    engine = make()
    tree = {"spec": {"width": 3, "depth": 2, "segment_tokens": 4}, "seed": 0, "path": 0}
    good = {"round": "r", "target_groups": 2, "group": "g", "group_size": 2, "index": 0, "park": "p", "tree": tree}
    second = good | {"index": 1, "park": "q"}
    ended = {"path": 0, "token_ids": [3], "by_itself": True}
    engine.add("first", PROMPT, 8, good)
    engine.add("ended is there", PROMPT, 8, second | {"tree": tree | {"path": 1, "ended": [ended]}})
    engine.add("second", PROMPT, 8, second | {"tree": tree | {"path": 1, "ended": [ended | {"path": 2}]}})
    alone = good | {"group": "h", "group_size": 1, "park": "x"}
    engine.add("two are missing", PROMPT, 8, alone)
    outputs = [output for _, step in engine.run() for output in step] + engine.drain()
    ends = {output.request_id: output for output in outputs if output.finish_reason is not None}
    assert str(ends["ended is there"].stop_reason).startswith("rollout.tree.ended[0].path")
    assert str(ends["two are missing"].stop_reason).startswith("rollout.tree.ended: expected paths that")
    assert ends["first"].finish_reason is ends["second"].finish_reason is FinishReason.LENGTH


def test_a_tree_in_a_group_that_began_without_one_is_answered(make: Make) -> None:
    engine = make()
    good = {"round": "r", "target_groups": 1, "group": "g", "group_size": 2, "index": 0, "park": "p"}
    tree = {"spec": {"width": 2, "depth": 2, "segment_tokens": 4}, "seed": 0, "path": 0}
    engine.add("first", PROMPT, 8, good)
    engine.add("tree", PROMPT, 8, good | {"index": 1, "park": "q", "tree": tree})
    outputs = [output for _, step in engine.run() for output in step] + engine.drain()
    ends = {output.request_id: output for output in outputs if output.finish_reason is not None}
    assert ends["tree"].stop_reason.startswith("rollout.tree: expected nothing, in a group")
    assert ends["first"].finish_reason is FinishReason.LENGTH


def test_a_member_of_a_tree_whose_others_were_aborted_is_answered(make: Make) -> None:
    """The others will not come: it would wait for them forever."""
    engine = make()
    tree = {"spec": {"width": 2, "depth": 2, "segment_tokens": 4}, "seed": 0, "path": 0}
    good = {"round": "r", "target_groups": 1, "group": "g", "group_size": 2, "index": 0, "park": "p", "tree": tree}
    engine.add("first", PROMPT, 8, good)
    engine.scheduler.finish_requests(["first"], RequestStatus.FINISHED_ABORTED)
    engine.add("second", PROMPT, 8, good | {"index": 1, "park": "q", "tree": tree | {"path": 1}})
    outputs = [output for _, step in engine.run() for output in step] + engine.drain()
    (end,) = outputs
    assert end.request_id == "second"
    assert str(end.stop_reason).startswith("rollout.tree: expected nothing, in a group")


def test_a_broken_tail_copy_is_noticed(make: Make) -> None:
    """The negative control of every test here: branches of one path would share a block that they write to."""
    engine = make()
    engine.model.copies_work = False
    tree = GrownTree(engine, SPECS["plain"], PROMPT)
    with pytest.raises((AssertionError, KeyError)):
        run_and_check(tree)
    engine.model.copies_work = True
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
