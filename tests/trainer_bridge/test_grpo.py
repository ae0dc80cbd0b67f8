"""Each estimator against a closed form, an enumeration of all outcomes, or plain loops and finite differences."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from grpo_examples import TablePolicy, make_group, make_trajectory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longtail.engine.config import SamplingConfig
from longtail.engine.trajectory import Branch
from longtail.hooks.tree_advantages import tree_advantages
from longtail.trainer_bridge.errors import InvalidInputError
from longtail.trainer_bridge.grpo import (
    Batch,
    GrpoConfig,
    build_batch,
    group_advantages,
    grpo_loss,
    importance_weights,
    k3,
    kl_penalty,
    loss_coefficients,
    policy_ratio,
    token_logprobs,
)

torch.set_num_threads(1)
INF = math.inf
#: Nothing clipped, nothing cut off, no division by anything that depends on the sample.
PLAIN = GrpoConfig(
    clip_low=INF, clip_high=INF, weight_cap=INF, divide_by_std=False, aggregate="fixed", fixed_divisor=1.0
)


# Expected gradients. A group is two outputs for the prompt [0] over a vocabulary of 3.

SIZE = 3
REWARDS = {output: float(output[0] == 2) + 0.5 * float(output[-1] == 1) for n in (1, 2) for output in
           itertools.product(range(SIZE), repeat=n)}  # fmt: skip


def table_logprobs(policies: Sequence[TablePolicy], output: Sequence[int]) -> Tensor:
    """Token t under the t-th policy."""
    before = (0, *output)
    rows = [policy.table[before[t]].log_softmax(0)[output[t]] for t, policy in enumerate(policies)]
    return torch.stack(rows)


def gradient_of_reward(policy: TablePolicy, length: int) -> Tensor:
    """By enumeration, and by autograd through the probabilities themselves."""
    outputs = itertools.product(range(SIZE), repeat=length)
    expected = sum(table_logprobs([policy] * length, y).sum().exp() * REWARDS[y] for y in outputs)
    assert isinstance(expected, Tensor)
    return torch.autograd.grad(expected, policy.table)[0]


def expected_gradient(policy: TablePolicy, behaviour: Sequence[TablePolicy], config: GrpoConfig) -> Tensor:
    """Of minus the loss, over all groups of two outputs that the behaviour policies can produce."""
    outputs = list(itertools.product(range(SIZE), repeat=len(behaviour)))
    logprobs = {y: table_logprobs(behaviour, y).detach() for y in outputs}
    total = torch.zeros_like(policy.table)
    for pair in itertools.product(outputs, repeat=2):
        group = make_group([make_trajectory([0], y, logprobs[y].tolist(), REWARDS[y]) for y in pair])
        batch = build_batch([group], config, 0, dtype=torch.float64)
        new = token_logprobs(policy, batch, config)
        loss, _ = grpo_loss(new, batch, loss_coefficients(batch.mask, config), config)
        probability = math.exp(sum(logprobs[y].sum().item() for y in pair))
        total -= probability * torch.autograd.grad(loss, policy.table)[0]
    return total


def test_on_policy_the_expected_gradient_is_that_of_the_reward() -> None:
    policy = TablePolicy(SIZE, 1)
    for length, config in itertools.product((1, 2), (PLAIN, dataclasses.replace(PLAIN, weight_cap=None))):
        estimate = expected_gradient(policy, [policy] * length, config)
        # the mean of two rewards contains the trajectory's own: (G - 1) / G = 1/2
        torch.testing.assert_close(estimate, 0.5 * gradient_of_reward(policy, length), rtol=0, atol=1e-14)


@pytest.mark.parametrize("change", [{}, {"old": "behaviour"}, {"weight_level": "sequence"}])
def test_off_policy_bandit_is_exact_with_each_kind_of_weight(change: dict[str, Any]) -> None:
    policy, older = TablePolicy(SIZE, 1), TablePolicy(SIZE, 5, 1.5)
    estimate = expected_gradient(policy, [older], dataclasses.replace(PLAIN, **change))
    torch.testing.assert_close(estimate, 0.5 * gradient_of_reward(policy, 1), rtol=0, atol=1e-14)


def test_a_partial_rollout_of_two_versions_is_exact_with_sequence_weights() -> None:
    policy, versions = TablePolicy(SIZE, 1), [TablePolicy(SIZE, 5, 1.5), TablePolicy(SIZE, 8, 1.5)]
    truth = 0.5 * gradient_of_reward(policy, 2)
    exact = expected_gradient(policy, versions, dataclasses.replace(PLAIN, weight_level="sequence"))
    torch.testing.assert_close(exact, truth, rtol=0, atol=1e-14)

    # What is cheaper is biased, as documented: token weights by the distribution of the prefixes and of what follows...
    by_token = expected_gradient(policy, versions, PLAIN)
    assert (by_token - truth).norm() > 0.02 * truth.norm()
    # ...and no weights by everything.
    without = expected_gradient(policy, versions, dataclasses.replace(PLAIN, weight_cap=None))
    assert (without - truth).norm() > (by_token - truth).norm()


def test_without_weights_the_bandit_is_biased() -> None:
    policy, older = TablePolicy(SIZE, 1), TablePolicy(SIZE, 5, 1.5)
    truth = 0.5 * gradient_of_reward(policy, 1)
    biased = expected_gradient(policy, [older], dataclasses.replace(PLAIN, weight_cap=None))
    assert (biased - truth).norm() > 0.1 * truth.norm()


@pytest.mark.parametrize("cap", [1.0, 1.5, 3.0, INF])
def test_the_bias_of_truncation_is_what_was_cut_off(cap: float) -> None:
    policy, older = TablePolicy(SIZE, 1), TablePolicy(SIZE, 5, 1.5)
    truth = 0.5 * gradient_of_reward(policy, 1)
    bias = expected_gradient(policy, [older], dataclasses.replace(PLAIN, weight_cap=cap)) - truth
    new, old = policy.table[0].softmax(0).detach(), older.table[0].softmax(0).detach()
    lost = (new - cap * old).clamp(min=0).sum()  # probability mass of pi that the cap takes away
    # |A| is at most half the range of the rewards in a group of two, and the score's norm at most sqrt(2)
    assert bias.norm() <= lost * 0.75 * math.sqrt(2) + 1e-14
    if cap == INF:
        assert bias.norm() < 1e-14
    elif lost > 0:
        assert bias.norm() > 1e-4


def test_the_kl_penalty_has_the_gradient_of_the_divergence() -> None:
    policy, older, reference = TablePolicy(SIZE, 1), TablePolicy(SIZE, 5, 1.5), TablePolicy(SIZE, 8, 1.5)
    new, old, ref = (p.table[0].log_softmax(0) for p in (policy, older, reference))
    old, ref = old.detach(), ref.detach()
    divergence = (new.exp() * (new - ref)).sum()
    assert (k3(new, ref) >= 0).all()
    torch.testing.assert_close((new.exp() * k3(new, ref)).sum(), divergence)  # its expectation is the divergence

    def gradient(of: Tensor) -> Tensor:
        return torch.autograd.grad(of, policy.table, retain_graph=True)[0]

    wanted = gradient(divergence)
    torch.testing.assert_close(gradient((old.exp() * kl_penalty(new, old, ref)).sum()), wanted)  # off-policy
    torch.testing.assert_close(gradient((new.detach().exp() * kl_penalty(new, new.detach(), ref)).sum()), wanted)
    # Negative control: k3 by itself follows the divergence the other way round, as documented.
    other_way = gradient((ref.exp() * (ref - new)).sum())
    torch.testing.assert_close(gradient((new.detach().exp() * k3(new, ref)).sum()), other_way)
    assert (other_way - wanted).norm() > 0.1 * wanted.norm()


@given(st.floats(-100, 0), st.floats(-100, 0))
def test_k3_is_never_negative(a: float, b: float) -> None:
    estimate = k3(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    assert -1e-15 <= estimate < INF  # rounding


# The loss, written in plain loops.


def plain_loss(new: list[list[float]], old: list[list[float]], batch: Batch, config: GrpoConfig) -> float:
    mask, behaviour, advantages = batch.mask.tolist(), batch.behaviour.tolist(), batch.advantages.tolist()
    rows = range(len(mask))
    trained = [[t for t in range(len(mask[i])) if mask[i][t]] for i in rows]
    num_tokens = sum(len(ts) for ts in trained)
    num_with_any = sum(bool(ts) for ts in trained)
    loss = 0.0
    for i in rows:
        for t in trained[i]:
            centre = behaviour if config.old == "behaviour" else old
            ratio = math.exp(new[i][t] - centre[i][t])
            if config.ratio == "sequence":
                ratio = math.prod(math.exp(new[i][s] - centre[i][s]) for s in trained[i]) ** (1 / len(trained[i]))
            weight = math.exp(centre[i][t] - behaviour[i][t])
            if config.weight_level == "sequence":
                weight = math.prod(math.exp(centre[i][s] - behaviour[i][s]) for s in trained[i])
            weight = 1.0 if config.weight_cap is None else min(weight, config.weight_cap)
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            token = -weight * min(ratio * advantages[i], clipped * advantages[i])
            if config.kl_coef:
                assert batch.reference is not None
                d = batch.reference[i, t].item() - new[i][t]
                token += config.kl_coef * weight * math.exp(new[i][t] - centre[i][t]) * (math.exp(d) - 1 - d)
            if config.aggregate == "token_mean":
                loss += token / num_tokens
            elif config.aggregate == "sequence_mean":
                loss += token / len(trained[i]) / num_with_any
            else:
                loss += token / (config.fixed_divisor or config.sampling.max_tokens) / len(mask)
    return loss


def random_batch(seed: int) -> tuple[Tensor, Tensor, Batch]:
    """`new`, `old` and a batch of 3 x 6, at least one token trained and one row not."""
    generator = torch.Generator().manual_seed(seed)

    def logprobs() -> Tensor:
        return -2 * torch.rand(3, 6, generator=generator, dtype=torch.float64) * mask

    mask = torch.rand(3, 6, generator=generator) < 0.6
    mask[:, 0], mask[0, 1], mask[2] = False, True, mask[2] & (seed % 2 == 0)
    behaviour, new, old, reference = (logprobs() for _ in range(4))
    advantages = torch.randn(3, generator=generator, dtype=torch.float64)
    ids = torch.zeros(3, 6, dtype=torch.int64)
    return new, old, Batch(ids, ids + 1, mask, behaviour, advantages, ids, old=old, reference=reference)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000), st.sampled_from(["step", "behaviour"]), st.sampled_from(["token", "sequence"]),
    st.sampled_from(["token", "sequence"]), st.sampled_from(["token_mean", "sequence_mean", "fixed"]),
    st.sampled_from([None, 1.0, 2.0, INF]), st.sampled_from([0.0, 0.3]),
    st.sampled_from([(0.2, 0.28), (INF, INF), (0.0, 0.1)]),
)  # fmt: skip
def test_the_loss_and_its_gradient_are_those_of_plain_loops(
    seed: int, old_is: Any, level: Any, ratio: Any, aggregate: Any, cap: float | None, kl: float, clip: Sequence[float]
) -> None:  # fmt: skip
    config = GrpoConfig(
        old=old_is, weight_level=level, ratio=ratio, aggregate=aggregate, weight_cap=cap, kl_coef=kl,
        clip_low=clip[0], clip_high=clip[1], fixed_divisor=7.0,
    )  # fmt: skip
    new, old, batch = random_batch(seed)
    new.requires_grad_()
    loss, sums = grpo_loss(new, batch, loss_coefficients(batch.mask, config), config)
    lists = new.tolist(), old.tolist()
    assert loss.item() == pytest.approx(plain_loss(*lists, batch, config), rel=1e-12, abs=1e-14)
    assert sums.tokens == batch.mask.sum()

    gradient = torch.autograd.grad(loss, new)[0]
    assert (gradient[~batch.mask] == 0).all()
    centre = batch.behaviour if old_is == "behaviour" else old
    ratios = policy_ratio(new.detach(), centre, batch.mask, config)
    h = 1e-6
    for i, t in batch.mask.nonzero().tolist():
        if min(abs(ratios[i, t] - 1 + clip[0]), abs(ratios[i, t] - 1 - clip[1])) < 1e-4:
            continue  # no derivative at the bound
        above, below = new.tolist(), new.tolist()
        above[i][t] += h
        below[i][t] -= h
        slope = (plain_loss(above, lists[1], batch, config) - plain_loss(below, lists[1], batch, config)) / (2 * h)
        assert gradient[i, t].item() == pytest.approx(slope, rel=1e-6, abs=1e-7)


def one_token(advantage: float, ratio: float, config: GrpoConfig, behaviour: float = -1.0) -> tuple[float, float, Any]:
    """The loss of one token with old = -1, its derivative by the new log-probability, and the sums."""
    mask = torch.tensor([[False, True]])
    old = torch.tensor([[0.0, -1.0]], dtype=torch.float64)
    new = (old + math.log(ratio) * mask).requires_grad_()
    before = torch.tensor([[0.0, behaviour]], dtype=torch.float64)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    batch = Batch(ids, ids + 1, mask, before, torch.tensor([advantage], dtype=torch.float64), ids, old=old)
    loss, sums = grpo_loss(new, batch, loss_coefficients(mask, config), config)
    return loss.item(), torch.autograd.grad(loss, new)[0][0, 1].item(), sums


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves", "low", "high"),
    [
        (1.0, 1.0, True, 0, 0),
        (1.0, 1.27, True, 0, 0),  # inside DAPO's upper bound, outside PPO's
        (1.0, 1.29, False, 0, 1),
        (1.0, 0.5, True, 0, 0),  # worse than before: pulled back whatever the distance
        (-1.0, 0.81, True, 0, 0),
        (-1.0, 0.79, False, 1, 0),
        (-1.0, 3.0, True, 0, 0),
        (0.0, 1.0, False, 0, 0),
    ],
)
def test_clip_regions(advantage: float, ratio: float, moves: bool, low: int, high: int) -> None:
    loss, slope, sums = one_token(advantage, ratio, GrpoConfig())
    clipped = ratio if moves or advantage == 0 else (1.28 if advantage > 0 else 0.8)
    assert loss == pytest.approx(-clipped * advantage)
    assert slope == pytest.approx(-ratio * advantage if moves else 0.0)
    assert (sums.clipped_low, sums.clipped_high) == (low, high)


def test_the_bounds_are_not_each_other() -> None:
    upper, lower = GrpoConfig(clip_low=0.1, clip_high=0.4), GrpoConfig(clip_low=0.4, clip_high=0.1)
    assert one_token(1.0, 1.3, upper)[1] != 0
    assert one_token(1.0, 1.3, lower)[1] == 0
    assert one_token(-1.0, 0.7, upper)[1] == 0
    assert one_token(-1.0, 0.7, lower)[1] != 0


def test_the_importance_weight_is_cut_off_and_has_no_gradient() -> None:
    _, slope, sums = one_token(1.0, 1.0, GrpoConfig(), behaviour=-1.0 - math.log(5))  # old / behaviour = 5
    assert slope == pytest.approx(-2.0)
    assert (sums.weight, sums.truncated) == (2.0, 1)
    assert sums.lag == pytest.approx(5.0)
    _, slope, sums = one_token(1.0, 1.0, GrpoConfig(weight_cap=INF), behaviour=-1.0 - math.log(5))
    assert slope == pytest.approx(-5.0)
    assert sums.truncated == 0
    _, slope, _ = one_token(1.0, 1.0, GrpoConfig(), behaviour=-1.0 + math.log(4))  # never raised
    assert slope == pytest.approx(-0.25)


def test_a_stale_token_keeps_its_gradient_only_if_the_clip_is_centred_on_the_step() -> None:
    behaviour = -1.0 - math.log(1.5)  # sampled when it was less probable by 1.5
    assert one_token(1.0, 1.0, GrpoConfig(old="step"), behaviour)[1] == pytest.approx(-1.5)
    assert one_token(1.0, 1.0, GrpoConfig(old="behaviour"), behaviour)[1] == 0.0


def test_enormous_ratios_stay_finite() -> None:
    mask = torch.tensor([[False, True, True]])
    new = torch.tensor([[0.0, -0.1, -300.0]], requires_grad=True)  # float32
    behaviour = torch.tensor([[0.0, -300.0, -0.1]])
    ids = torch.zeros(1, 3, dtype=torch.int64)
    for advantage, old_is in itertools.product((1.0, -1.0), ("step", "behaviour")):
        config = GrpoConfig(old=old_is, weight_cap=INF, kl_coef=0.1)
        batch = Batch(ids, ids + 1, mask, behaviour, torch.tensor([advantage]), ids, reference=behaviour)
        loss, sums = grpo_loss(new, batch, loss_coefficients(mask, config), config)
        assert torch.autograd.grad(loss, new)[0].isfinite().all()
        assert all(value.isfinite() for value in (loss, *sums))


def test_the_three_means_by_hand() -> None:
    mask = torch.tensor([[False, True, False, False], [False, True, True, True], [False] * 4])
    losses = torch.tensor([[9.0, 4.0, 9.0, 9.0], [9.0, 1.0, 2.0, 3.0], [9.0] * 4], dtype=torch.float64)

    def mean(**change: Any) -> float:
        coefficients = loss_coefficients(mask, GrpoConfig(**change))
        return float((coefficients.unsqueeze(1) * losses * mask).sum())

    assert mean(aggregate="token_mean") == pytest.approx((4 + 1 + 2 + 3) / 4)
    assert mean(aggregate="sequence_mean") == pytest.approx((4 / 1 + (1 + 2 + 3) / 3) / 2)
    assert mean(aggregate="fixed", fixed_divisor=8) == pytest.approx((4 + 6) / 8 / 3)
    assert mean(aggregate="fixed", sampling=SamplingConfig(max_tokens=16)) == pytest.approx((4 + 6) / 16 / 3)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    for aggregate in ("token_mean", "sequence_mean", "fixed"):
        assert loss_coefficients(nothing, GrpoConfig(aggregate=aggregate)).tolist() == [0, 0]


def test_gspo_by_hand() -> None:
    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])
    new = torch.tensor([[0.0, -1.0, -2.0, 0.0], [0.0, -0.5, 0.0, 0.0]])
    old = torch.tensor([[0.0, -1.5, -1.7, 0.0], [0.0, -0.2, 0.0, 0.0]])
    ratio = policy_ratio(new, old, mask, GrpoConfig(ratio="sequence"))
    first, second = math.exp((0.5 - 0.3) / 2), math.exp(-0.3)
    torch.testing.assert_close(ratio, torch.tensor([[1.0, first, first, 1.0], [1.0, second, 1.0, 1.0]]))
    weights = importance_weights(new, old, mask, GrpoConfig(weight_level="sequence"))
    assert weights[0, 1:3].tolist() == pytest.approx([math.exp(0.2)] * 2)


# Batches.


def test_what_is_trained() -> None:
    """Of tokens that the model sampled, those that `loss_mask` leaves and that are not too old."""
    versions = [3, 3, 4, 5, 5, 6, 6]
    trajectory = make_trajectory(
        [1, 2], [10, 11, 12, 13, 14, 15, 16], [-0.1, -0.2, -0.3, -0.4, math.nan, -0.6, -0.7], 1.0,
        versions=versions, source_mask=[1, 1, 1, 1, 0, 1, 1], loss_mask=[1, 1, 1, 1, 0, 0, 1],
    )  # fmt: skip
    other = make_trajectory([3], [4], [-1.0], 0.0, versions=[6])
    by_bound = {
        None: [1, 1, 1, 1, 0, 0, 1],
        3: [1, 1, 1, 1, 0, 0, 1],
        2: [0, 0, 1, 1, 0, 0, 1],
        1: [0, 0, 0, 1, 0, 0, 1],
        0: [0, 0, 0, 0, 0, 0, 1],
    }
    for bound, trained in by_bound.items():
        batch = build_batch([make_group([trajectory, other])], GrpoConfig(max_staleness=bound), 6)
        assert batch.mask[0].int().tolist() == [0, 0, *trained]
        assert batch.staleness[0].tolist() == [-1, -1, 3, 3, 2, 1, -1, 0, 0]
        assert batch.behaviour[0, 2:].tolist() == pytest.approx([-0.1 * (t + 1) * trained[t] for t in range(7)])
    assert batch.token_ids.tolist() == [[1, 2, 10, 11, 12, 13, 14, 15, 16], [3, 4, *[0] * 7]]
    assert batch.attention_mask.sum(1).tolist() == [9, 2]
    newer = build_batch([make_group([trajectory, other])], GrpoConfig(max_staleness=1), 4)  # a trainer that went back
    assert newer.mask[0].int().tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]


def test_the_default_loss_mask_is_the_source_mask() -> None:
    trajectory = make_trajectory([1], [2, 3], source_mask=[0, 1])
    batch = build_batch([make_group([trajectory, trajectory])], GrpoConfig(), 0)
    assert batch.mask.tolist() == [[False, False, True]] * 2


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9), st.booleans())
def test_advantages_are_centred_and_equal_rewards_have_none(rewards: list[float], divide_by_std: bool) -> None:
    config = GrpoConfig(divide_by_std=divide_by_std)
    advantages = group_advantages(rewards, config)
    assert sum(advantages) == pytest.approx(0.0, abs=1e-6 * max(1, *map(abs, rewards)) * (1e6 if divide_by_std else 1))
    assert group_advantages([rewards[0]] * len(rewards), config) == [0.0] * len(rewards)
    assert sorted(range(len(rewards)), key=lambda i: rewards[i]) == sorted(
        range(len(rewards)), key=lambda i: (advantages[i], rewards[i])
    )


def test_advantages_by_hand() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 1.0], GrpoConfig(divide_by_std=False)) == [0.5, -0.5, -0.5, 0.5]
    by_std = group_advantages([1.0, 2.0, 3.0], GrpoConfig())
    assert by_std == pytest.approx([-1.0, 0.0, 1.0], abs=1e-5)
    batch = build_batch(
        [make_group([make_trajectory([1], [2], reward=r) for r in rewards]) for rewards in ((0.0, 4.0), (1.0, 1.0))],
        GrpoConfig(divide_by_std=False), 0,
    )  # fmt: skip
    assert batch.advantages.tolist() == [-2.0, 2.0, 0.0, 0.0]  # of its own group each


GOOD = make_trajectory([1], [2, 3], reward=1.0)


@pytest.mark.parametrize(
    ("field", "group"),
    [
        ("groups[0]", make_group([GOOD, GOOD], complete=False)),
        ("groups[0]", make_group([GOOD, GOOD], rejected="all equal")),
        ("groups[0]", make_group([GOOD])),
        ("groups[0].trajectories[1].reward", make_group([GOOD, make_trajectory([1], [2], reward=None)])),
        ("groups[0].trajectories[1].reward", make_group([GOOD, make_trajectory([1], [2], reward=math.nan)])),
        ("groups[0].trajectories[1].prompt_token_ids", make_group([GOOD, make_trajectory([], [2])])),
        ("groups[0].trajectories[0].logprobs[1]", make_group([make_trajectory([1], [2, 3], [-1, math.nan]), GOOD])),
        ("groups[0].trajectories[0].logprobs[0]", make_group([make_trajectory([1], [2, 3], [0.5, -1]), GOOD])),
        ("groups[0].trajectories[0].weight_versions", make_group([make_trajectory([1], [2], versions=["a"]), GOOD])),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_named(field: str, group: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        build_batch([group], GrpoConfig(), 0)
    assert caught.value.field == field


def test_no_groups_are_a_mistake() -> None:
    with pytest.raises(InvalidInputError, match="groups"):
        build_batch([], GrpoConfig(), 0)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("sampling", {"sampling": {"temperature": 1.0}}),
        ("sampling.temperature", {"sampling": SamplingConfig(temperature=0.0)}),
        ("sampling.top_p", {"sampling": SamplingConfig(top_p=0.9)}),
        ("sampling.top_k", {"sampling": SamplingConfig(top_k=50)}),
        ("sampling.min_tokens", {"sampling": SamplingConfig(min_tokens=4)}),
        ("old", {"old": "new"}),
        ("ratio", {"ratio": "tokens"}),
        ("weight_level", {"weight_level": None}),
        ("aggregate", {"aggregate": "mean"}),
        ("divide_by_std", {"divide_by_std": "yes"}),
        ("clip_low", {"clip_low": -0.1}),
        ("clip_high", {"clip_high": math.nan}),
        ("weight_cap", {"weight_cap": 0.5}),
        ("fixed_divisor", {"fixed_divisor": 0}),
        ("kl_coef", {"kl_coef": INF}),
        ("max_staleness", {"max_staleness": 1.5}),
        ("max_staleness", {"max_staleness": -1}),
    ],
)
def test_a_wrong_setting_is_named(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        GrpoConfig(**change)
    assert caught.value.field == field


# Log-probabilities of models.


class FixedLogits(nn.Module):
    def __init__(self, *shape: int, seed: int = 0) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))

    def forward(self, token_ids: Tensor) -> Tensor:
        assert token_ids.shape == self.logits.shape[:2]
        return self.logits


def test_logprobs_are_taken_at_the_temperature_and_one_place_earlier() -> None:
    config = GrpoConfig(sampling=SamplingConfig(temperature=0.7))
    batch = build_batch([make_group([make_trajectory([1, 2], [3, 0]), make_trajectory([2], [1])])], config, 0)
    model = FixedLogits(2, 4, 5)
    found = token_logprobs(model, batch, config)
    processed = (model.logits / 0.7).log_softmax(2)
    wanted = torch.zeros(2, 4)
    wanted[0, 2], wanted[0, 3], wanted[1, 1] = processed[0, 1, 3], processed[0, 2, 0], processed[1, 0, 1]
    torch.testing.assert_close(found, wanted)


def test_masked_tokens_have_no_gradient() -> None:
    trajectories = [
        make_trajectory([1], [2, 3, 1, 0], reward=1.0, loss_mask=[1, 0, 1, 0], versions=[5, 5, 2, 5]),
        make_trajectory([1], [2], reward=0.0, versions=[5]),
    ]
    config = GrpoConfig(max_staleness=1)
    batch = build_batch([make_group(trajectories)], config, 5)
    model = FixedLogits(2, 5, 4)
    loss, _ = grpo_loss(token_logprobs(model, batch, config), batch, loss_coefficients(batch.mask, config), config)
    loss.backward()
    assert model.logits.grad is not None
    touched = model.logits.grad.abs().sum(2) > 0
    assert touched.tolist() == [[True, False, False, False, False], [True, False, False, False, False]]


def test_bfloat16_logits_are_summed_in_float32() -> None:
    config = GrpoConfig()
    batch = build_batch([make_group([make_trajectory([1], [2]), make_trajectory([2], [1])])], config, 0)
    found = token_logprobs(FixedLogits(2, 2, 100).bfloat16(), batch, config)
    assert found.dtype == torch.float32


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, use_cache=False)
    ).float()  # fmt: skip


def test_padding_does_not_leak(llama: Any) -> None:
    """On either side, of any token, or none at all: the same log-probabilities and the same gradient."""
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        drawn: list[int] = torch.randint(0, 32, (count,), generator=generator).tolist()
        return drawn

    pairs = [(2, 9), (11, 1), (1, 3), (4, 4)]
    group = make_group([make_trajectory(ids(p), ids(n), reward=float(n)) for p, n in pairs])
    config = GrpoConfig()

    def outcome(pad_id: int, pad_left: bool) -> tuple[list[Tensor], Tensor]:
        batch = build_batch([group], config, 0, pad_id=pad_id, pad_left=pad_left)
        llama.zero_grad()
        new = token_logprobs(llama, batch, config)
        loss, _ = grpo_loss(new, batch, loss_coefficients(batch.mask, config), config)
        loss.backward()
        return [
            row[kept] for row, kept in zip(new.detach(), batch.mask, strict=True)
        ], llama.lm_head.weight.grad.clone()

    rows, gradient = outcome(0, False)
    for other in ((7, False), (0, True), (7, True)):
        other_rows, other_gradient = outcome(*other)
        torch.testing.assert_close(other_rows, rows, rtol=0, atol=2e-6)
        torch.testing.assert_close(other_gradient, gradient, rtol=0, atol=2e-6)
    for i in range(len(pairs)):
        batch = build_batch([group], config, 0).rows(torch.tensor([i]))
        assert batch.token_ids.shape[1] == sum(pairs[i])
        torch.testing.assert_close(token_logprobs(llama, batch, config)[batch.mask], rows[i], rtol=0, atol=2e-6)
    # Negative control: a model that is not told of the padding on the left sees it.
    batch = build_batch([group], config, 0, pad_left=True)
    blind = token_logprobs(
        llama, dataclasses.replace(batch, attention_mask=torch.ones_like(batch.attention_mask)), config
    )
    assert (blind[1][batch.mask[1]] - rows[1]).abs().max() < 1e-4  # the longest row has none
    assert (blind[2][batch.mask[2]] - rows[2]).abs().max() > 1e-4


def test_tree_advantages_are_those_of_the_hooks() -> None:
    rewards = [1.0, 0.0, 0.0]
    made = [make_trajectory([1], [2, 3, 4 + index], reward=reward) for index, reward in enumerate(rewards)]
    members = [msgspec.structs.replace(one, index=index) for index, one in enumerate(made)]
    members[1] = msgspec.structs.replace(members[1], branch=Branch(of=0, at=2))
    config = GrpoConfig(advantage="tree", divide_by_std=False)
    batch = build_batch([make_group(members)], config, 0, dtype=torch.float64)
    assert batch.advantages.tolist() == pytest.approx(tree_advantages(make_group(members)))
    assert batch.advantages.tolist() == pytest.approx([(2 / 3 + 1 / 2) / 2, (-1 / 3 - 1 / 2) / 2, -1 / 3])
