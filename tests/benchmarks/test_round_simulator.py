"""The round simulator against a reference that makes every token on its own, and against closed forms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from round_simulator import (
    FleetConfig,
    RoundReport,
    RoundSimulator,
    StepModel,
    fit_step_model,
    validate,
)
from round_sweep import STEP, Cell, Sweep, lognormal_lengths

from longtail.scheduler.admission import AdaptiveOverProvision, AdmissionPolicy, FixedOverProvision
from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.kv_policy import KvPolicy
from longtail.scheduler.staleness import StalenessBound

UNIT_STEP = StepModel(1.0, 0.0, 0.0, 0.0)


@dataclass
class RefMember:
    length: int
    versions: list[int] = field(default_factory=list)
    kv_version: int | None = None

    @property
    def ended(self) -> bool:
        return len(self.versions) == self.length


@dataclass
class RefGroup:
    serial: int
    born: int
    members: list[RefMember]
    engine: int | None = None
    prompt_version: int | None = None

    @property
    def complete(self) -> bool:
        return all(member.ended for member in self.members)

    def versions(self) -> list[int]:
        return [version for member in self.members for version in member.versions]


class Reference:
    """Rounds one token at a time; shares nothing with the simulator but the configuration."""

    def __init__(self, config: FleetConfig, lengths: Iterator[list[int]], ratio: float) -> None:
        self.config, self.lengths, self.ratio = config, lengths, ratio
        self.version, self.serials = 0, count()
        self.carried: list[RefGroup] = []
        self.banked: list[RefGroup] = []

    def run_round(self) -> dict[str, Any]:
        self.stats: Counter[str] = Counter()
        self._apply_bound()
        config = self.config
        total = max(config.target_groups, math.ceil(self.ratio * config.target_groups))
        fresh = [
            RefGroup(next(self.serials), self.version, [RefMember(n) for n in next(self.lengths)])
            for _ in range(total - len(self.carried) - len(self.banked))
        ]
        queues = self._queues(self.carried, fresh)
        seconds, done, late = self._run(queues, self.carried + fresh)
        order = sorted([(0.0, group.serial, group) for group in self.banked] + done, key=lambda entry: entry[:2])
        groups = [group for _, _, group in order]
        accepted = groups[: config.target_groups]
        self.banked = sorted(groups[config.target_groups :] + late, key=lambda g: g.serial)
        self.carried = sorted((g for g in self.carried + fresh if not g.complete), key=lambda g: g.serial)
        ages = [self.version - version for group in accepted for version in group.versions()]
        limit = math.inf if config.bound.max_staleness is None else config.bound.max_staleness
        self.version += 1
        return {
            "seconds": seconds,
            "accepted": [group.serial for group in accepted],
            "banked": [group.serial for group in self.banked],
            "carried": {group.serial: [len(member.versions) for member in group.members] for group in self.carried},
            "staleness": Counter(ages),
            "trained": Counter(age for age in ages if age <= limit),
            "slot_s": self.stats.pop("slot_s", 0),
            "stats": self.stats,
        }

    def _apply_bound(self) -> None:
        limit, action = self.config.bound.max_staleness, self.config.bound.action
        for group in self.carried + self.banked:
            if limit is None or action == "mask" or all(self.version - v <= limit for v in group.versions()):
                continue
            self.stats["lost"] += len(group.versions())
            where = self.banked if group in self.banked else self.carried
            where.remove(group)
            if action == "restart":
                group.members = [RefMember(n) for n in next(self.lengths)]
                group.born = self.version
                self.carried.append(group)
                self.stats["restarted"] += 1
            else:
                self.stats["dropped"] += 1

    def _queues(self, carried: list[RefGroup], fresh: list[RefGroup]) -> list[list[tuple[RefGroup, RefMember]]]:
        def unfinished(group: RefGroup) -> int:
            return sum(not member.ended for member in group.members)

        load = [sum(unfinished(g) for g in carried if g.engine == e) for e in range(self.config.num_engines)]
        queues: list[list[tuple[RefGroup, RefMember]]] = [[] for _ in load]
        orders: dict[str, Callable[[RefGroup], tuple[int, ...]]] = {
            "carried_first": lambda g: (g.born, g.serial),
            "nearly_complete_first": lambda g: (unfinished(g), g.born, g.serial),
            "fifo": lambda g: (g.serial,),
        }
        for group in sorted(carried, key=orders[self.config.admission.name]) + fresh:
            if group.engine is None:
                group.engine = load.index(min(load))
                load[group.engine] += unfinished(group)
            queues[group.engine] += [(group, member) for member in group.members if not member.ended]
        return queues

    def _run(self, queues: list[list[tuple[RefGroup, RefMember]]], active: list[RefGroup]) -> tuple[float, list, list]:
        running: list[list[tuple[RefGroup, RefMember]]] = [[] for _ in queues]
        done: list[tuple[float, int, RefGroup]] = []
        late: list[RefGroup] = []
        cut = 0.0 if len(self.banked) >= self.config.target_groups else None
        ends = {e: self._start_step(queues[e], running[e], 0.0) for e in range(len(queues))} if cut is None else {}
        last = 0.0
        while any(end is not None for end in ends.values()):
            last = min(end for end in ends.values() if end is not None)
            due = [e for e, end in ends.items() if end == last]
            for e in due:
                for _, member in running[e]:
                    member.versions.append(self.version)
                    self.stats["generated"] += 1
                for group in {id(group): group for group, member in running[e] if member.ended}.values():
                    if group.complete:
                        done.append((last, group.serial, group)) if cut is None else late.append(group)
                running[e] = [(group, member) for group, member in running[e] if not member.ended]
                ends[e] = None
            if cut is None and len(done) + len(self.banked) >= self.config.target_groups:
                cut = last
            if cut is None:
                for e in due:
                    ends[e] = self._start_step(queues[e], running[e], last)
        return last, done, late

    def _start_step(self, queue: list, running: list, now: float) -> float | None:
        step, prefill = self.config.step, 0
        while queue and len(running) < self.config.max_num_seqs:
            group, member = queue.pop(0)
            running.append((group, member))
            num_tokens = self.config.prompt_tokens + len(member.versions)
            block_size = self.config.block_size
            if block_size is not None and group.prompt_version == self.version:
                num_tokens -= (self.config.prompt_tokens - 1) // block_size * block_size
            limit = self.config.kv_policy.max_staleness
            if member.kv_version is None or (limit is not None and self.version - member.kv_version > limit):
                prefill += num_tokens
                self.stats["reprefill"] += 0 if member.kv_version is None else num_tokens
                member.kv_version = group.prompt_version = self.version
        if not running:
            return None
        self.stats["prefill"] += prefill
        context = sum(self.config.prompt_tokens + len(member.versions) for _, member in running)
        seconds = step.a_s + step.b_s * len(running) + step.c_s * context + step.prefill_s_per_token * prefill
        self.stats["slot_s"] += len(running) * seconds
        return now + seconds


def agree(report: RoundReport, simulator: RoundSimulator, expected: dict[str, Any]) -> None:
    assert report.seconds == pytest.approx(expected["seconds"], rel=1e-9)
    assert report.slot_s == pytest.approx(expected["slot_s"], rel=1e-9)
    assert list(report.accepted) == expected["accepted"]
    assert [group.serial for group in simulator.banked] == expected["banked"]
    carried = {group.serial: [member.done for member in group.members] for group in simulator.carried}
    assert carried == expected["carried"]
    assert report.staleness == expected["staleness"]
    assert report.trained == expected["trained"]
    stats = expected["stats"]
    assert report.generated_tokens == stats["generated"]
    assert (report.prefill_tokens, report.reprefill_tokens) == (stats["prefill"], stats["reprefill"])
    assert (report.lost_tokens, report.num_dropped) == (stats["lost"], stats["dropped"])
    assert report.num_restarted == stats["restarted"]


def lengths_of(seed: int, group_size: int, longest: int) -> Iterator[list[int]]:
    rng = np.random.default_rng(seed)
    while True:
        yield rng.integers(1, longest, group_size, endpoint=True).tolist()


def dyadic(most: int, over: int) -> st.SearchStrategy[float]:
    """Numbers whose sums are exact, so that steps of two engines end at the same time or clearly do not."""
    return st.integers(0, most).map(lambda n: n / over)


bounds = st.builds(StalenessBound, st.sampled_from([None, 0, 1, 2]), st.sampled_from(["mask", "restart", "drop"]))
fleets = st.builds(
    FleetConfig,
    step=st.builds(StepModel, st.integers(1, 64).map(lambda n: n / 64), dyadic(8, 256), dyadic(8, 1024), dyadic(8, 64)),
    num_engines=st.integers(1, 3),
    max_num_seqs=st.integers(1, 4),
    target_groups=st.integers(1, 5),
    prompt_tokens=st.integers(1, 9),
    block_size=st.sampled_from([None, 2, 4]),
    kv_policy=st.sampled_from([KvPolicy(0), KvPolicy(None), KvPolicy(1)]),
    bound=bounds,
    admission=st.sampled_from([AdmissionPolicy(name) for name in ("carried_first", "nearly_complete_first", "fifo")]),
)
seconds = st.floats(1e-4, 1.0)


@settings(max_examples=250, deadline=None)
@given(fleets, st.sampled_from([1, 1.25, 1.5, 2, 3]), st.integers(0, 999), st.integers(1, 3), st.integers(1, 14))
def test_agrees_with_the_reference(config: FleetConfig, ratio: float, seed: int, size: int, longest: int) -> None:
    simulator = RoundSimulator(config, lengths_of(seed, size, longest), FixedOverProvision(ratio))
    reference = Reference(config, lengths_of(seed, size, longest), ratio)
    for _ in range(5):
        agree(simulator.run_round(), simulator, reference.run_round())


@settings(max_examples=100, deadline=None)
@given(
    fleets,
    st.builds(StepModel, seconds, st.floats(0, 0.1), st.floats(0, 0.01), st.floats(0, 0.1)),
    st.integers(0, 999),
)
def test_agrees_with_the_reference_for_any_step_model(config: FleetConfig, step: StepModel, seed: int) -> None:
    config = replace(config, step=step, num_engines=1)
    simulator = RoundSimulator(config, lengths_of(seed, 2, 40), FixedOverProvision(2))
    reference = Reference(config, lengths_of(seed, 2, 40), 2)
    for _ in range(4):
        agree(simulator.run_round(), simulator, reference.run_round())


def fleet(**changes: Any) -> FleetConfig:
    fields = {"step": UNIT_STEP, "num_engines": 1, "max_num_seqs": 64, "target_groups": 4, "prompt_tokens": 0}
    return FleetConfig(**(fields | changes))


def run(config: FleetConfig, lengths: Iterator[list[int]], ratio: float, num_rounds: int) -> list[RoundReport]:
    simulator = RoundSimulator(config, lengths, FixedOverProvision(ratio))
    return [simulator.run_round() for _ in range(num_rounds)]


def constant(length: int, group_size: int) -> Iterator[list[int]]:
    while True:
        yield [length] * group_size


def test_constant_lengths_with_free_slots_cost_one_wide_round_in_two() -> None:
    step, length, prompt = StepModel(0.01, 0.002, 3e-6, 1e-4), 100, 20

    def wide(batch: int) -> float:
        per_step = step.a_s + step.b_s * batch + step.c_s * batch * prompt
        grown = step.c_s * batch * length * (length - 1) / 2
        return length * per_step + grown + step.prefill_s_per_token * batch * prompt

    config = fleet(step=step, prompt_tokens=prompt)
    synchronous = sum(report.seconds for report in run(config, constant(length, 2), 1, 6))
    over = run(config, constant(length, 2), 2, 6)
    assert synchronous == pytest.approx(6 * wide(8), rel=1e-12)
    assert [report.seconds for report in over] == pytest.approx([wide(16), 0] * 3, rel=1e-12)
    assert synchronous / sum(report.seconds for report in over) == pytest.approx(2 * wide(8) / wide(16), rel=1e-12)
    assert over[1].staleness == {1: 4 * 2 * length}


def test_constant_lengths_without_free_slots_gain_nothing() -> None:
    config = fleet(max_num_seqs=8)
    assert [report.seconds for report in run(config, constant(100, 2), 2, 4)] == [100] * 4


def test_one_straggler_among_equals() -> None:
    lengths = [[30], [10], [10], [10], [10]]
    config = fleet(target_groups=1)
    assert [report.seconds for report in run(config, iter(lengths), 1, 4)] == [30, 10, 10, 10]
    over = run(config, iter(lengths), 2, 4)
    assert [report.seconds for report in over] == [10, 10, 10, 0]
    assert [report.accepted for report in over] == [(1,), (2,), (0,), (3,)]
    assert over[2].staleness == {2: 10, 1: 10, 0: 10}


def test_over_provision_one_is_synchronous() -> None:
    config = fleet(num_engines=3, max_num_seqs=3)
    for index, report in enumerate(run(config, lengths_of(3, 2, 50), 1, 8)):
        assert sorted(report.accepted) == [4 * index + i for i in range(4)]
        assert (report.num_carried, report.num_banked, report.reprefill_tokens) == (0, 0, 0)
        assert set(report.staleness) == {0}


def test_stale_kv_pays_no_resume_and_fresh_kv_pays_for_every_token_so_far() -> None:
    lengths = [[30], [10], [10], [10], [10]]
    config = fleet(target_groups=1, prompt_tokens=7, step=StepModel(1.0, 0.0, 0.0, 0.5))
    fresh = run(config, iter(lengths), 2, 3)
    assert [report.reprefill_tokens for report in fresh] == [0, 17, 27]
    assert fresh[1].seconds == 10 + 0.5 * (17 + 7)
    stale = run(replace(config, kv_policy=KvPolicy(None)), iter(lengths), 2, 3)
    assert [report.reprefill_tokens for report in stale] == [0, 0, 0]
    assert stale[1].seconds == 10 + 0.5 * 7


@pytest.mark.parametrize("action", ["mask", "restart", "drop"])
@pytest.mark.parametrize("ratio", [1, 1.5, 3])
def test_no_group_is_lost(action: str, ratio: float) -> None:
    config = fleet(num_engines=2, max_num_seqs=6, bound=StalenessBound(0, action))  # type: ignore[arg-type]
    simulator = RoundSimulator(config, lengths_of(5, 3, 60), FixedOverProvision(ratio))
    submitted, accepted, dropped = 0, [], 0
    for _ in range(12):
        report = simulator.run_round()
        submitted += report.num_fresh
        accepted += report.accepted
        dropped += report.num_dropped
        assert len(report.accepted) == 4
        assert submitted == simulator.num_submitted
        assert submitted == len(accepted) + dropped + report.num_carried + report.num_banked
    assert len(set(accepted)) == len(accepted)
    assert (dropped > 0) == (action == "drop" and ratio > 1)


@pytest.mark.parametrize("action", ["mask", "restart", "drop"])
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_no_trained_token_is_beyond_the_bound(action: str, limit: int) -> None:
    config = fleet(max_num_seqs=16, bound=StalenessBound(limit, action))  # type: ignore[arg-type]
    reports = run(config, lengths_of(5, 2, 60), 3, 15)
    trained = sum((report.trained for report in reports), Counter())
    masked = sum(report.num_masked_groups for report in reports)
    assert max(trained) <= limit
    assert (masked > 0) == (action == "mask")
    # Negative control: without the bound, the same rounds do train on staler tokens.
    unbounded = run(replace(config, bound=StalenessBound()), lengths_of(5, 2, 60), 3, 15)
    assert max(sum((report.trained for report in unbounded), Counter())) > limit


def test_deterministic() -> None:
    def reports(seed: int) -> list[RoundReport]:
        lengths = lognormal_lengths(seed, median=50, sigma=1, max_tokens=400, group_size=4, correlation=0.3)
        return run(fleet(num_engines=4, prompt_tokens=9), lengths, 2, 5)

    assert reports(1) == reports(1)
    assert reports(1) != reports(2)


def test_a_source_that_runs_dry_ends_the_last_round_early() -> None:
    reports = run(fleet(), iter([[5], [6], [7]]), 2, 2)
    assert reports[0].accepted == (0, 1, 2)
    assert reports[0].seconds == 7
    assert reports[1].accepted == ()


def test_adaptive_leaves_what_it_is_told_and_shrinks_when_the_pool_is_full() -> None:
    def started(capacity: int | None) -> list[int]:
        config = fleet(target_groups=8, kv_capacity_tokens=capacity, prompt_tokens=10)
        simulator = RoundSimulator(config, lengths_of(2, 2, 60), AdaptiveOverProvision(8))
        return [simulator.run_round().num_started for _ in range(8)]

    assert min(started(None)) == 16
    assert min(started(400)) < 14


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_lognormal_lengths_have_their_median_and_spread(correlation: float) -> None:
    source = lognormal_lengths(0, median=200, sigma=1, max_tokens=4000, group_size=8, correlation=correlation)
    drawn = np.array([next(source) for _ in range(4000)])
    logs = np.log(drawn[drawn < 4000])
    assert np.median(drawn) == pytest.approx(200, rel=0.05)
    assert np.std(logs) == pytest.approx(1, rel=0.05)
    assert (drawn.min() >= 1, drawn.max()) == (True, 4000)
    shared = np.corrcoef(np.log(drawn[:, 0]), np.log(drawn[:, 1]))[0, 1]
    assert shared == pytest.approx(correlation, abs=0.06)


def test_fit_finds_the_model_it_was_made_from() -> None:
    rng = np.random.default_rng(0)
    batch = rng.integers(1, 256, 200)
    context = batch * rng.integers(100, 4000, 200)
    prefill = rng.integers(0, 2, 200) * rng.integers(0, 9000, 200)
    true = StepModel(6e-3, 2e-5, 17e-9, 34e-6)
    seconds = true.a_s + true.b_s * batch + true.c_s * context + true.prefill_s_per_token * prefill
    fitted = fit_step_model(batch, context, prefill, seconds)
    for name in ("a_s", "b_s", "c_s", "prefill_s_per_token"):
        assert getattr(fitted, name) == pytest.approx(getattr(true, name), rel=1e-6)


def test_fit_has_no_negative_coefficient() -> None:
    fitted = fit_step_model([1, 2, 3, 4, 5], [10, 10, 10, 10, 10], [0, 0, 0, 0, 0], [5.0, 4.0, 3.0, 2.0, 1.0])
    assert fitted.b_s == fitted.prefill_s_per_token == 0
    assert fitted.seconds(1, 3, 10, 0) == pytest.approx(3)
    with pytest.raises(InvalidInputError):
        fit_step_model([1, 2], [1, 2], [0, 0], [1.0, 2.0])


def test_a_step_takes_time() -> None:
    with pytest.raises(InvalidInputError):
        StepModel(0.0, 0.0, 1.0, 1.0)
    with pytest.raises(InvalidInputError):
        StepModel(1.0, -1.0, 0.0, 0.0)


def test_validate_is_the_ratio_of_rates() -> None:
    source = lengths_of(1, 3, 40)
    lengths = [next(source) for _ in range(40)]
    step = StepModel(0.02, 0.001, 1e-5, 1e-3)
    config = fleet(step=step, max_num_seqs=8, target_groups=3, prompt_tokens=12, kv_policy=KvPolicy(None))
    reports = run(config, iter(lengths), 2, 5)
    rate = sum(report.accepted_tokens for report in reports) / sum(report.seconds for report in reports)
    measured: dict[str, Any] = {
        "step_model": {"a_s": 0.02, "b_s": 0.001, "c_s": 1e-5, "prefill_s_per_token": 1e-3},
        "rounds": [None] * 5,
        "config": {
            "num_engines": 1, "max_num_seqs": 8, "target_groups": 3, "group_size": 3, "over_provision": 2.0,
            "kv_policy": "stale", "prompt_tokens": 12, "block_size": None,
        },
        "lengths": lengths,
        "measured_tokens_per_s": rate,
    }  # fmt: skip
    assert validate(measured) == pytest.approx(1, rel=1e-12)
    assert validate(measured | {"measured_tokens_per_s": 2 * rate}) == pytest.approx(0.5, rel=1e-12)


def test_sweep_compares_every_cell_with_its_synchronous_one() -> None:
    sweep = Sweep(STEP, num_seeds=2, warm_up=1, num_rounds=3)
    for cell in (Cell(num_engines=1), Cell(num_engines=1, kv="stale"), Cell(num_engines=1, max_staleness=0)):
        figures = sweep(cell)
        assert (figures["gain"], figures["trained_gain"], figures["off_policy_share"]) == (1, 1, 0)
    over = sweep(Cell(num_engines=1, ratio=2, max_staleness=0))
    assert over["gain"] > 1.2 > 1 > over["trained_gain"]
    assert sum(over["staleness_share"].values()) == pytest.approx(1)
    assert over["started_ratio"] == 2
