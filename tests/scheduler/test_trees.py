"""Trees over vLLM's real scheduler and block pool, with a model that notices a wrong block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kv_model import KvEngine, expected_tokens
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
@pytest.mark.parametrize("num_steps", [1, 8, 9, 10, 14, 15, 21])
def test_a_tree_that_is_cut_goes_on_in_another_round(make: Make, num_steps: int, spec: TreeSpec) -> None:
    engine = make()
    tree = GrownTree(engine, spec, PROMPT, lengths={0: 15}, target=2)
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
    second = GrownTree(engine, spec, PROMPT, name="t", round_id="s", begun=begun, ended=ended, lengths={0: 15})
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


@pytest.mark.parametrize("spec", [SPECS["plain"], SPECS["levels"]], ids=["plain", "levels"])
def test_a_caller_aborts_members(make: Make, spec: TreeSpec) -> None:
    for num_steps in (0, 5, 9, 11, 16, 20):
        engine = make()
        tree = GrownTree(engine, spec, PROMPT)
        tree.step(num_steps)
        gone = [path for path in (0, 1, 7) if path not in tree.ends]
        engine.scheduler.finish_requests([f"r/t/{path}" for path in gone], RequestStatus.FINISHED_ABORTED)
        tree.run_out()
        assert sorted([*tree.ends, *gone]) == list(range(8))
        engine.scheduler.rollout_rpc("close_round", {"round": "r"})
        engine.scheduler.rollout_rpc("unpark", {"keys": [f"t.{path}" for path in range(8)]})


def test_everything_is_aborted(make: Make) -> None:
    engine = make()
    tree = GrownTree(engine, SPECS["plain"], PROMPT)
    tree.step(10)
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert not engine.scheduler._members


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"can_fork": True}, "rollout.can_fork"),
        ({"boundary": {"every": 3}}, "rollout.boundary"),
        ({"park": None}, "rollout.tree"),
        ({"tree": {"spec": {"width": 4, "depth": 2, "segment_tokens": 4}, "seed": 0, "path": 4}}, "rollout.tree.path"),
        ({"tree": {"spec": {"width": 0, "depth": 2, "segment_tokens": 4}, "seed": 0, "path": 0}}, "rollout.tree"),
        ({"num_prior_tokens": 2}, "rollout.tree.has_begun"),
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
    engine.add("second", PROMPT, 8, second | {"tree": {**good["tree"], "path": 1}})
    outputs = [output for _, step in engine.run() for output in step] + engine.drain()
    ends = {output.request_id: output.finish_reason for output in outputs if output.finish_reason is not None}
    errors = dict.fromkeys(("other spec", "no tree", "same path"), FinishReason.ERROR)
    assert ends == errors | dict.fromkeys(("first", "second"), FinishReason.LENGTH)


def test_a_broken_tail_copy_is_noticed(make: Make) -> None:
    """The negative control of every test here: branches of one path would share a block that they write to."""
    engine = make()
    engine.model.copies_work = False
    tree = GrownTree(engine, SPECS["plain"], PROMPT)
    with pytest.raises((AssertionError, KeyError)):
        run_and_check(tree)
    engine.model.copies_work = True
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
