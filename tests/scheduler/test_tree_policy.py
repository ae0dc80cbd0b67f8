"""The tree policy against its invariants, against a transcription of TreePO's sampler, and against its own odds."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.tree_policy import Birth, PathFigures, TreePolicy, TreeSpec, TreeStep

SPECS = st.builds(
    TreeSpec,
    width=st.integers(1, 24),
    depth=st.integers(1, 8),
    segment_tokens=st.integers(1, 6),
    branching=st.integers(1, 4),
    max_branching=st.one_of(st.none(), st.integers(4, 6)),
    min_roots=st.integers(1, 2),
    max_roots=st.one_of(st.none(), st.integers(2, 8)),
    transfer=st.booleans(),
    split=st.sampled_from(("uniform", "logprob", "entropy")),
    split_scope=st.sampled_from(("path", "segment")),
    split_favours=st.sampled_from(("low", "high")),
    split_temperature=st.sampled_from((0.1, 1.0, 5.0)),
    fallback=st.sampled_from(("ended", "any", "none")),
    synchronous=st.booleans(),
)


@dataclass
class Path:
    num_tokens: int
    born_at: int


class Grown:
    """Grows a tree to its end: paths move by themselves, and each token may be the last."""

    def __init__(self, spec: TreeSpec, seed: int, end_chance: float) -> None:
        self.spec = spec
        self.policy = TreePolicy(spec, seed)
        self.rng = random.Random(seed + 1)
        self.paths = {index: Path(0, 0) for index in self.policy.roots}
        self.going = list(self.policy.roots)
        self.ended: dict[int, int] = {}
        self.dismissed: list[int] = []
        self.births: list[Birth] = []
        while self.going:
            index = self.going.pop(self.rng.randrange(len(self.going)))
            self._run(index, end_chance)

    def _run(self, index: int, end_chance: float) -> None:
        """One segment of one path."""
        path = self.paths[index]
        for _ in range(self.spec.segment_tokens):
            path.num_tokens += 1
            if self.rng.random() < end_chance:
                self._end(index, by_itself=True)
                return
        if path.num_tokens >= self.spec.max_tokens:
            self._end(index, by_itself=False)
        else:
            self._take(self.policy.reach(index, self._figures(path)))

    def _end(self, index: int, *, by_itself: bool) -> None:
        self.ended[index] = self.paths[index].num_tokens
        self.policy.end(index, self.ended[index], by_itself=by_itself)
        self._take(self.policy.settle())

    def _figures(self, path: Path) -> PathFigures:
        return PathFigures(num_tokens=path.num_tokens, path_mean=-self.rng.random(), segment_mean=-self.rng.random())

    def _take(self, step: TreeStep) -> None:
        for birth in step.births:
            assert birth.child not in self.paths
            parent = self.paths[birth.parent]
            assert 0 <= birth.at <= parent.num_tokens
            assert birth.at % self.spec.segment_tokens == 0
            assert birth.at < self.spec.max_tokens
            assert 0 < birth.probability <= 1
            assert (birth.reason == "fallback") == (birth.parent in self.ended)
            self.paths[birth.child] = Path(birth.at, birth.at)
        self.births += step.births
        self.dismissed += step.dismissed
        self.going += [*step.going_on, *(birth.child for birth in step.births)]


@given(SPECS, st.integers(0, 1000), st.sampled_from((0.0, 0.02, 0.2, 1.0)))
def test_every_tree_has_its_width(spec: TreeSpec, seed: int, end_chance: float) -> None:
    tree = Grown(spec, seed, end_chance)
    assert sorted([*tree.ended, *tree.dismissed]) == list(range(spec.width))
    assert not tree.policy.num_unborn
    assert not tree.dismissed or spec.fallback == "none"
    assert all(length <= spec.depth * spec.segment_tokens for length in tree.ended.values())
    assert len(tree.births) == spec.width - len(tree.policy.roots) - len(tree.dismissed)
    low, high = spec.min_roots, spec.max_roots or spec.min_roots
    assert min(spec.width, low) <= len(tree.policy.roots) <= min(spec.width, high)


@given(SPECS, st.integers(0, 1000))
def test_the_same_events_and_seed_make_the_same_tree(spec: TreeSpec, seed: int) -> None:
    assert Grown(spec, seed, 0.1).births == Grown(spec, seed, 0.1).births


def test_without_barriers_a_path_never_waits() -> None:
    policy = TreePolicy(TreeSpec(width=8, depth=4, segment_tokens=4), 0)
    step = policy.reach(0, PathFigures(num_tokens=4))
    assert step.going_on == [0]
    assert step.births == [Birth(1, 0, 4, "boundary", 1.0)]
    assert policy.reach(0, PathFigures(num_tokens=8)).births == [Birth(2, 0, 8, "boundary", 1.0)]


def test_what_a_path_that_ends_gives_is_taken_at_the_next_boundaries() -> None:
    spec = TreeSpec(width=16, depth=4, segment_tokens=4, min_roots=3, branching=2)
    policy = TreePolicy(spec, 0)
    policy.end(0, 2, by_itself=True)
    assert policy.settle() == TreeStep()
    assert len(policy.reach(1, PathFigures(num_tokens=4)).births) == 1 + 1  # its own, and half of two
    alone = TreePolicy(replace(spec, transfer=False), 0)
    alone.end(0, 2, by_itself=True)
    assert len(alone.reach(1, PathFigures(num_tokens=4)).births) == 1


def after_the_only_end(spec: TreeSpec, num_tokens: int, *, by_itself: bool) -> TreeStep:
    policy = TreePolicy(spec, 0)
    policy.end(0, num_tokens, by_itself=by_itself)
    return policy.settle()


def test_levels_need_no_barrier_once_everybody_has_begun() -> None:
    policy = TreePolicy(TreeSpec(width=3, depth=8, segment_tokens=4, synchronous=True, min_roots=2), 0)
    assert policy.reach(0, PathFigures(num_tokens=4)) == TreeStep()
    policy.drop(2)
    assert policy.settle() == TreeStep(going_on=[0])
    assert policy.reach(1, PathFigures(num_tokens=4)) == TreeStep(going_on=[1])


def test_paths_that_end_together_are_no_parents_of_each_other_and_do_not_go_on() -> None:
    """Told one by one and settled once: two of three that wait are gone, and the level is the third one's."""
    policy = TreePolicy(TreeSpec(width=6, depth=8, segment_tokens=4, synchronous=True, min_roots=4), 0)
    for index in range(3):
        policy.reach(index, PathFigures(num_tokens=4))
    for index in (0, 1, 3):
        policy.end(index, 4, by_itself=False)
    step = policy.settle()
    assert step.going_on == [2]
    assert {birth.parent for birth in step.births} == {2}


def test_members_that_never_begin_are_dismissed_only_without_fallback() -> None:
    spec = TreeSpec(width=4, depth=2, segment_tokens=4, fallback="none")
    assert after_the_only_end(spec, 2, by_itself=True).dismissed == [1, 2, 3]
    step = after_the_only_end(replace(spec, fallback="ended"), 7, by_itself=True)
    assert [birth.at for birth in step.births] == [4, 4, 4]
    # TreePO: without a candidate it begins again from the prompt.
    step = after_the_only_end(replace(spec, fallback="ended"), 8, by_itself=False)
    assert [(birth.parent, birth.at) for birth in step.births] == [(0, 0)] * 3


# ---- TreePO's released sampler -------------------------------------------------------------------------------------


def treepo(spec: TreeSpec, ends: Callable[[tuple[int, ...], int], bool]) -> Counter[int]:
    """The levels of TreePO's sampler for one prompt, uniform split, no fallback; leaves by length in segments.

    `ends(path id, depth)` says whether the segment that makes the path `depth` long is its last. From its pseudocode:
    cap = w; budget = max(min(max(cap - D, 0), b * n + b * A), A), split evenly, the remainder to the last path.
    """
    active: list[tuple[int, ...]] = [(0,)]
    leaves: Counter[int] = Counter()
    given, depth = 0, 0
    while active:
        depth += 1
        going_on = []
        for path in active:
            if ends(path, depth) or depth >= spec.depth:
                leaves[depth] += 1
                given += spec.branching
            else:
                going_on.append(path)
        if not going_on:
            break
        count, done = len(going_on), leaves.total()
        budget = min(max(spec.width - done, 0), given + spec.branching * count)
        budget = max(budget, count)
        given = 0
        shares = [budget // count] * count
        shares[-1] += budget % count
        active = [(*path, copy) for path, share in zip(going_on, shares, strict=True) for copy in range(share)]
    return leaves


@pytest.mark.parametrize("branching", [2, 3])
def test_synchronous_trees_are_treepos(branching: int) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        spec = TreeSpec(
            width=rng.randint(2, 20), depth=rng.randint(2, 8), segment_tokens=1, branching=branching,
            fallback="none", synchronous=True,
        )  # fmt: skip
        chance = rng.choice((0.0, 0.1, 0.3))

        def ends(path: tuple[int, ...], depth: int, chance: float = chance, seed: int = seed) -> bool:
            return random.Random(f"{seed} {path} {depth}").random() < chance

        policy, ids, level = TreePolicy(spec, seed), {0: (0,)}, [0]
        leaves: Counter[int] = Counter()
        depth = 0
        while level:
            depth += 1
            steps = []
            for index in level:
                figures = PathFigures(num_tokens=depth)
                if ends(ids[index], depth) or depth >= spec.max_tokens:
                    leaves[depth] += 1
                    policy.end(index, depth, by_itself=depth < spec.max_tokens)
                    steps.append(policy.settle())
                else:
                    steps.append(policy.reach(index, figures))
            born = [birth for step in steps for birth in step.births]
            waited = [index for step in steps for index in step.going_on]
            copies = {index: [index, *(b.child for b in born if b.parent == index)] for index in waited}
            ids |= {one: (*ids[index], copy) for index in waited for copy, one in enumerate(copies[index])}
            level = [one for index in waited for one in copies[index]]
        assert leaves == treepo(spec, ends), (seed, spec)


# ---- odds ----------------------------------------------------------------------------------------------------------


def test_the_probability_of_a_draw_is_its_share() -> None:
    """Chi-square; a right policy fails with probability 1e-4, and is seeded."""
    spec = TreeSpec(width=64, depth=8, segment_tokens=4, min_roots=3, split="logprob", branching=2)
    counts: Counter[int] = Counter()
    odds: dict[int, float] = {}
    for seed in range(3000):
        policy = TreePolicy(spec, seed)
        for index, mean in enumerate((-1.0, -2.0)):
            policy._active[index] = PathFigures(num_tokens=4, path_mean=mean)
        births = policy.reach(2, PathFigures(num_tokens=4, path_mean=-1.5)).births
        counts[len(births)] += 1
        if births:
            odds[len(births)] = births[0].probability
    missing = set(counts) - set(odds)
    odds |= dict.fromkeys(missing, 1 - sum(odds.values()))
    assert sum(odds.values()) == pytest.approx(1.0)
    statistic = sum((counts[k] - 3000 * p) ** 2 / (3000 * p) for k, p in odds.items())
    assert chi2.sf(statistic, len(odds) - 1) > 1e-4


def test_fallback_chooses_paths_and_places_with_the_probability_that_it_says() -> None:
    spec = TreeSpec(width=3, depth=6, segment_tokens=4, min_roots=2, branching=2)
    counts: Counter[tuple[int, int]] = Counter()
    odds: dict[tuple[int, int], float] = {}
    for seed in range(4000):
        policy = TreePolicy(spec, seed)
        policy.end(0, 9, by_itself=True)
        policy.end(1, 17, by_itself=True)
        (birth,) = policy.settle().births
        counts[birth.parent, birth.at] += 1
        odds[birth.parent, birth.at] = birth.probability
    assert odds == {(0, 4): 1 / 4, (0, 8): 1 / 4} | {(1, at): 1 / 8 for at in (4, 8, 12, 16)}
    statistic = sum((counts[k] - 4000 * p) ** 2 / (4000 * p) for k, p in odds.items())
    assert chi2.sf(statistic, len(odds) - 1) > 1e-4
    skewed = Counter({key: count + 400 * (key == (0, 4)) for key, count in counts.items()})
    total = skewed.total()
    statistic = sum((skewed[k] - total * p) ** 2 / (total * p) for k, p in odds.items())
    assert chi2.sf(statistic, len(odds) - 1) < 1e-4, "negative control"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"width": 0}, "width"),
        ({"depth": True}, "depth"),
        ({"segment_tokens": 1.5}, "segment_tokens"),
        ({"max_branching": 1}, "max_branching"),
        ({"max_roots": 0}, "max_roots"),
        ({"split": "random"}, "split"),
        ({"split_temperature": 0.0}, "split_temperature"),
        ({"split_temperature": 1e-9}, "split_temperature"),
        ({"split_temperature": float("nan")}, "split_temperature"),
        ({"fallback": "some"}, "fallback"),
        ({"synchronous": 1.5}, "synchronous"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        TreeSpec(**({"width": 4, "depth": 2, "segment_tokens": 8} | changes))
    assert caught.value.field == f"tree.{field}"
