"""The pure policies of carrying rounds: staleness, admission, over-provision, KV versions."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtail.scheduler.admission import (
    AdaptiveOverProvision,
    AdmissionPolicy,
    Candidate,
    FixedOverProvision,
    RoundOutcome,
)
from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.kv_policy import FRESH, KvPolicy, KvVersions
from longtail.scheduler.staleness import GroupFate, StalenessBound, histogram

VERSIONS = st.integers(0, 6)


@st.composite
def spans(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Spans `(version, start, end)` that follow each other from 0."""
    found, at = [], 0
    for version, length in draw(st.lists(st.tuples(VERSIONS, st.integers(1, 9)), max_size=5)):
        found.append((version, at, at + length))
        at += length
    return found


# ---- staleness -----------------------------------------------------------------------------------------------------


@given(spans(), VERSIONS, st.integers(0, 4))
def test_no_token_beyond_the_bound_keeps_its_mask(parts: list[Any], current: int, bound: int) -> None:
    num_tokens = parts[-1][2] if parts else 0
    before = [1] * num_tokens
    after = StalenessBound(bound, "mask").mask(before, parts, current)
    versions = [version for version, start, end in parts for _ in range(start, end)]
    assert after == [int(abs(current - version) <= bound) for version in versions]
    assert before == [1] * num_tokens
    counts = histogram(parts, current)
    assert counts.total() == num_tokens
    assert StalenessBound(bound, "mask").num_masked(counts) == after.count(0)


@given(spans(), VERSIONS, st.integers(0, 4), st.sampled_from(["mask", "restart", "drop"]))
def test_fate_of_a_group(parts: list[Any], current: int, bound: int, action: Any) -> None:
    is_beyond = any(abs(current - version) > bound for version, _, _ in parts)
    fates = {"mask": GroupFate.KEEP, "restart": GroupFate.RESTART, "drop": GroupFate.DROP}
    expected = fates[action] if is_beyond else GroupFate.KEEP
    assert StalenessBound(bound, action).fate((version for version, _, _ in parts), current) is expected
    assert StalenessBound(None, action).fate((version for version, _, _ in parts), current) is GroupFate.KEEP


@pytest.mark.parametrize(("bound", "action"), [(-1, "mask"), (True, "mask"), (1.0, "mask"), (1, "skip")])
def test_a_bad_bound_is_refused(bound: Any, action: Any) -> None:
    with pytest.raises(InvalidInputError):
        StalenessBound(bound, action)


# ---- KV policy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "kept_ages"), [("fresh", {0}), ("stale", {0, 1, 2, 9}), ("stale_up_to:2", {0, 1, 2})])
def test_kv_policies(text: str, kept_ages: set[int]) -> None:
    policy = KvPolicy.parse(text)
    assert {age for age in (0, 1, 2, 9) if policy.keeps({10, 10 - age}, 10)} == kept_ages
    assert str(policy) == text
    assert KvPolicy.parse("stale_up_to:0") == FRESH


@pytest.mark.parametrize("text", ["", "Fresh", "stale_up_to:", "stale_up_to:-1", "stale_up_to:9999999", None, 3])
def test_a_bad_kv_policy_names_its_field(text: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"carry\.kv_policy: expected fresh, stale"):
        KvPolicy.parse(text, "carry.kv_policy")


@given(st.lists(st.tuples(st.integers(0, 30), VERSIONS), max_size=6), st.integers(1, 40))
def test_kv_versions_against_a_plain_list(changes: list[tuple[int, int]], end: int) -> None:
    """Positions from `start` on get a version, in any order of calls."""
    versions, plain = KvVersions([]), [-1] * 64
    for number, (start, version) in enumerate(changes):
        versions.extend(start, version)
        plain[start if number else 0 :] = [version] * (64 - (start if number else 0))
    if not changes:
        return
    cut = versions.upto(end)
    flat = [int(version) for version, start, stop in cut.spans(end) for _ in range(start, stop)]
    assert flat == plain[:end]
    assert cut.all == set(plain[:end])


# ---- admission -----------------------------------------------------------------------------------------------------

CANDIDATES = [
    Candidate(serial=3, age_rounds=0, num_members_left=4, num_tokens_left=400),
    Candidate(serial=1, age_rounds=2, num_members_left=3, num_tokens_left=40),
    Candidate(serial=2, age_rounds=1, num_members_left=1, num_tokens_left=900),
    Candidate(serial=0, age_rounds=0, num_members_left=4, num_tokens_left=30),  # restarted
]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("carried_first", [1, 2, 0, 3]),
        ("nearly_complete_first", [2, 1, 0, 3]),
        ("longest_remaining_first", [2, 3, 1, 0]),
        ("fifo", [0, 1, 2, 3]),
    ],
)
def test_orders_of_admission(name: Any, order: list[int]) -> None:
    for candidates in (CANDIDATES, CANDIDATES[::-1]):
        assert [candidate.serial for candidate in AdmissionPolicy(name).order(candidates)] == order


def test_an_unknown_admission_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="admission: expected one of carried_first"):
        AdmissionPolicy("random")  # type: ignore[arg-type]


# ---- over-provision ------------------------------------------------------------------------------------------------


@given(st.floats(1, 8), st.integers(1, 500))
def test_fixed_over_provision(ratio: float, target: int) -> None:
    assert FixedOverProvision(ratio).num_groups(target) == max(target, math.ceil(ratio * target))


@pytest.mark.parametrize(("num_filtered", "num_banked"), [(0, 0), (8, 0), (0, 4), (16, 8)])
def test_adaptive_over_provision_reaches_its_aim(num_filtered: int, num_banked: int) -> None:
    """With what a round refuses and has left over held fixed, it leaves as many groups as asked."""
    policy, target = AdaptiveOverProvision(target_carried=24), 32
    carried = 0
    for _ in range(12):
        started = policy.num_groups(target)
        carried = started - target - num_filtered - num_banked
        policy.observe(RoundOutcome(started, target, num_filtered, num_banked))
    assert carried == pytest.approx(24, abs=1)


def test_adaptive_over_provision_yields_to_a_full_pool_and_comes_back() -> None:
    policy, target = AdaptiveOverProvision(target_carried=64), 32
    assert policy.num_groups(target) == 96
    for _ in range(20):  # the pool holds 60 groups
        started = policy.num_groups(target)
        policy.observe(
            RoundOutcome(started, target, 0, 0, num_preemptions=int(started > 60), peak_kv_usage=started / 61)
        )
    assert 45 <= policy.num_groups(target) <= 66
    for _ in range(40):  # the pool has grown
        started = policy.num_groups(target)
        policy.observe(RoundOutcome(started, target, 0, 0))
    assert policy.num_groups(target) == 96


def test_adaptive_over_provision_never_goes_below_the_target() -> None:
    policy = AdaptiveOverProvision(target_carried=0)
    for _ in range(30):
        policy.observe(RoundOutcome(8, 8, 0, 0, num_preemptions=5))
        assert policy.num_groups(8) >= 8
    policy.observe(RoundOutcome(8, 0, 0, 0))
    assert policy.num_groups(8) >= 8
    with pytest.raises(InvalidInputError, match="target_carried"):
        AdaptiveOverProvision(-1)
