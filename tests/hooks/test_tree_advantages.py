"""Advantages over trees against brute force on the tokens themselves."""

from __future__ import annotations

import random
import statistics

import pytest

from longtail.engine.trajectory import Branch, Group
from longtail.hooks.errors import InvalidInputError
from longtail.hooks.tree_advantages import shared_tokens, tree_advantages, whiten


@pytest.fixture
def tree(trajectory):
    """`tree(paths, rewards)`: a member a path, which is (parent or None, at, own tokens); all own tokens differ."""

    def make(paths, rewards) -> Group:
        count, members = 0, []
        for index, (parent, at, num_own) in enumerate(paths):
            prefix = [] if parent is None else members[parent].output_token_ids[:at]
            tokens = [*prefix, *range(count, count + num_own)]
            count += num_own
            members.append(
                trajectory(
                    index=index, output_token_ids=tokens, logprobs=[-1.0] * len(tokens), source_mask=[1] * len(tokens),
                    weight_versions=[type(trajectory().weight_versions[0])("0", 0, len(tokens))], segments=[],
                    branch=None if parent is None else Branch(of=parent, at=at), reward=rewards[index],
                )
            )  # fmt: skip
        return Group(group_id="g", trajectories=members, complete=True)

    return make


def random_paths(rng: random.Random):
    lengths, paths = [], []
    for index in range(rng.randint(2, 12)):
        if index and rng.random() < 0.75:
            parent = rng.randrange(index)
            at = rng.randint(0, lengths[parent])
            own = rng.randint(1, 9)
            paths.append((parent, at, own))
            lengths.append(at + own)
        else:
            paths.append((None, 0, rng.randint(1, 20)))
            lengths.append(paths[-1][2])
    return paths


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_what_two_trajectories_share_is_the_common_prefix_of_tokens_that_all_differ(tree) -> None:
    for seed in range(300):
        group = tree(random_paths(random.Random(seed)), [0.0] * 12)
        tokens = [member.output_token_ids for member in group.trajectories]
        assert shared_tokens(group) == [[common_prefix(a, b) for b in tokens] for a in tokens]


def brute_force(group: Group, segment_tokens: int | None, weights: str) -> list[float]:
    """Walk down every path token by token."""
    tokens = [member.output_token_ids for member in group.trajectories]
    rewards = [member.reward for member in group.trajectories]
    advantages = []
    for path, reward in zip(tokens, rewards, strict=True):
        levels = [list(range(len(tokens)))]
        for depth in range(1, len(path) + 1):
            subtree = [i for i, other in enumerate(tokens) if other[:depth] == path[:depth]]
            if segment_tokens is not None:
                if depth % segment_tokens == 0 and depth < len(path):
                    levels.append(subtree)
            elif subtree != levels[-1]:
                levels.append(subtree)
        kept = [level for number, level in enumerate(levels) if number == 0 or len(level) > 1]
        sizes = [len(level) if weights == "size" else 1 for level in kept]
        gains = [reward - statistics.fmean(rewards[i] for i in level) for level in kept]
        advantages.append(sum(s * g for s, g in zip(sizes, gains, strict=True)) / sum(sizes))
    return advantages


@pytest.mark.parametrize("segment_tokens", [None, 1, 4])
@pytest.mark.parametrize("weights", ["equal", "size"])
def test_against_brute_force(tree, segment_tokens, weights) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        paths = random_paths(rng)
        group = tree(paths, [rng.choice((0.0, 1.0, 0.5)) for _ in paths])
        got = tree_advantages(group, segment_tokens=segment_tokens, weights=weights)
        rewards = {member.reward for member in group.trajectories}
        expected = brute_force(group, segment_tokens, weights) if len(rewards) > 1 else [0.0] * len(paths)
        assert got == pytest.approx(expected, abs=1e-9)


def test_without_branches_it_is_the_distance_to_the_groups_mean(tree) -> None:
    """GRPO over leaves."""
    rewards = [0.0, 1.0, 1.0, 0.5]
    group = tree([(None, 0, 5)] * 4, rewards)
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    assert tree_advantages(group) == pytest.approx([reward - mean for reward in rewards])
    scaled = tree_advantages(group, divide_by_std=True)
    assert scaled == pytest.approx([(reward - mean) / std for reward in rewards], rel=1e-4)


def test_a_worked_example(tree) -> None:
    """Two roots, the first of which forks at 4: root mean 1/2, mean under the fork 1/2."""
    group = tree([(None, 0, 8), (0, 4, 4), (None, 0, 8), (None, 0, 8)], [1.0, 0.0, 1.0, 0.0])
    assert tree_advantages(group) == pytest.approx([0.5, -0.5, 0.5, -0.5])
    group = tree([(None, 0, 8), (0, 4, 4), (None, 0, 8), (None, 0, 8)], [1.0, 0.0, 0.0, 0.0])
    assert tree_advantages(group) == pytest.approx([(0.75 + 0.5) / 2, (-0.25 - 0.5) / 2, -0.25, -0.25])


def test_a_tree_with_one_root_has_its_group_once(tree) -> None:
    group = tree([(None, 0, 12), (0, 4, 4), (0, 8, 4)], [1.0, 0.0, 0.0])
    assert tree_advantages(group)[0] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_a_selection_of_a_group_knows_its_branches_by_their_index(tree) -> None:
    group = tree([(None, 0, 12), (0, 4, 4), (1, 6, 4), (0, 8, 4)], [1.0, 0.0, 0.5, 0.0])
    kept = [group.trajectories[3], group.trajectories[2], group.trajectories[0]]
    selection = Group(group_id="g", trajectories=kept, complete=True)
    # Where the branch of member 1, which is not there, left member 0 is not known.
    assert shared_tokens(selection) == [[12, 0, 8], [0, 10, 0], [8, 0, 12]]
    assert tree_advantages(selection) == pytest.approx([(-1 / 2 - 1 / 2) / 2, 0.0, (1 / 2 + 1 / 2) / 2])


def test_whitening_counts_tokens() -> None:
    white = whiten([1.0, -1.0, 3.0], [1, 2, 1])
    flat = [white[0], white[1], white[1], white[2]]
    assert statistics.fmean(flat) == pytest.approx(0.0, abs=1e-9)
    assert statistics.pstdev(flat) == pytest.approx(1.0, rel=1e-4)
    assert whiten([1.0], [0]) == [1.0]
    with pytest.raises(InvalidInputError):
        whiten([1.0], [])


def test_what_is_wrong_is_named(tree) -> None:
    group = tree([(None, 0, 5)] * 2, [0.0, 1.0])
    with pytest.raises(InvalidInputError, match="segment_tokens"):
        tree_advantages(group, segment_tokens=0)
    with pytest.raises(InvalidInputError, match="weights"):
        tree_advantages(group, weights="size-ish")
    with pytest.raises(InvalidInputError, match="reward"):
        tree_advantages(tree([(None, 0, 5)] * 2, [0.0, None]))
