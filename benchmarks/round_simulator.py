"""Rounds of a fleet, simulated event by event, by the policy classes that the engine itself uses.

A round: carried groups (in the order of `AdmissionPolicy`), banked ones, then fresh ones, as many in all as
`OverProvision` says. A fresh group goes as a whole to the engine with the fewest members,
a carried one back to its own. A group is complete when its last member ends; the round is cut in the step in which the
target-th group completes; every engine finishes the step it is in, and what completes in it, or at the same time, is
banked. All others are carried with their tokens. Then the weight version grows by one. At its beginning a round asks
`StalenessBound` for the fate of every carried and banked group, so a bound can only be exceeded by masked tokens.
A group that is restarted draws new lengths.

What the model leaves out:

    KV capacity     no preemption and no eviction; `peak_kv_tokens` says when a pool would have overflowed, and the
                    adaptive over-provision is told, but nothing slows down
    prefix sharing  of the prompt within a group only, and a pool holds it once for each member
    network         routing, weight transfer and the cut itself take no time; engines hear of it at once
    chunks          a prefill is part of one step, however long; the sum of seconds is that of chunked prefill
    text            lengths are independent of the weights, of staleness and of what is accepted; nothing is filtered
                    by reward; tokens are only counted
    engines         all alike; steps depend on batch and context alone (no graph sizes, no speculation)

Deterministic: equal arguments give equal results.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from simulated_engine import Member, SimEngine, SimGroup, StepModel, fit_step_model

from longtail.scheduler.admission import AdmissionPolicy, Candidate, FixedOverProvision, OverProvision, RoundOutcome
from longtail.scheduler.kv_policy import KvPolicy
from longtail.scheduler.staleness import GroupFate, StalenessBound, histogram

__all__ = ["FleetConfig", "RoundReport", "RoundSimulator", "StepModel", "fit_step_model", "validate"]

#: A complete group with when in the round, in seconds, and its serial.
_Complete = tuple[float, int, SimGroup]


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """What does not change from round to round.

    Attributes:
        max_tokens: output budget of a trajectory; only the admission `longest_remaining_first` reads it.
        block_size: of the prefix cache; `None` for an engine without one.
        kv_capacity_tokens: what the KV pool of one engine holds; see the module for what it does not do.

    """

    step: StepModel
    num_engines: int
    max_num_seqs: int
    target_groups: int
    prompt_tokens: int
    max_tokens: int = 1 << 20
    kv_policy: KvPolicy = field(default_factory=KvPolicy)
    bound: StalenessBound = field(default_factory=StalenessBound)
    admission: AdmissionPolicy = field(default_factory=AdmissionPolicy)
    block_size: int | None = None
    kv_capacity_tokens: int | None = None

    @property
    def shared_tokens(self) -> int:
        """Tokens of a prompt that only one member of a group computes: whole blocks, and not the last token."""
        return 0 if self.block_size is None else max(0, self.prompt_tokens - 1) // self.block_size * self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """One round in numbers.

    Attributes:
        seconds: from its start until the last engine has finished the step that the cut fell in.
        accepted: serials of the groups it returned.
        num_started: groups in flight or complete when it began.
        num_fresh, num_restarted, num_dropped: groups drawn, begun again and filtered when it began.
        num_carried, num_banked: groups that it leaves to the next.
        staleness: accepted tokens by staleness; `trained` leaves out masked ones.
        lost_tokens: tokens of restarted and dropped groups.
        generated_tokens, prefill_tokens, reprefill_tokens: what engines computed in it; the last are prompt and output
            tokens of carried members whose KV the policy did not keep, and part of the second.
        slot_s: seconds that members ran, summed; `peak_slot_s` is what that would be had every engine run as many as
            at its peak until the end.
        peak_kv_tokens: most tokens of running members on any engine at once.

    """

    seconds: float
    accepted: tuple[int, ...]
    accepted_trajectories: int
    accepted_tokens: int
    num_started: int
    num_fresh: int
    num_restarted: int
    num_dropped: int
    num_carried: int
    num_banked: int
    num_masked_groups: int
    staleness: Counter[int]
    trained: Counter[int]
    lost_tokens: int
    generated_tokens: int
    prefill_tokens: int
    reprefill_tokens: int
    slot_s: float
    peak_slot_s: float
    peak_kv_tokens: int


@dataclass(slots=True)
class RoundSimulator:
    """A fleet and its rounds; each group's lengths are the next item of `lengths`, as long as there are any.

    Attributes:
        version: of the weights; the number of rounds so far.
        carried, banked: groups between two rounds, by serial.
        num_submitted, num_accepted, num_filtered: groups so far; what remains is carried or banked.
        num_drawn, drawn_tokens: trajectories so far and their lengths, those of restarts included.

    """

    config: FleetConfig
    lengths: Iterator[Sequence[int]]
    over_provision: OverProvision
    version: int = 0
    carried: list[SimGroup] = field(default_factory=list)
    banked: list[SimGroup] = field(default_factory=list)
    num_submitted: int = 0
    num_accepted: int = 0
    num_filtered: int = 0
    num_drawn: int = 0
    drawn_tokens: int = 0
    _engines: list[SimEngine] = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        args = (config.step, config.max_num_seqs, config.prompt_tokens, config.shared_tokens, config.kv_policy)
        self._engines = [SimEngine(*args) for _ in range(config.num_engines)]

    def run_round(self) -> RoundReport:
        """Simulate the next round."""
        config = self.config
        num_restarted, num_dropped, lost_tokens = self._apply_bound()
        total = self.over_provision.num_groups(config.target_groups)
        fresh = self._draw_groups(total - len(self.carried) - len(self.banked))
        active = self.carried + fresh
        num_started = len(active) + len(self.banked)
        tokens_before = sum(group.num_tokens for group in active)
        self._place(fresh)

        complete, cut_s = self._run_until_cut([(0.0, group.serial, group) for group in self.banked])
        complete.sort(key=lambda entry: entry[:2])
        accepted = [group for *_, group in complete[: config.target_groups]]
        surplus = [group for *_, group in complete[config.target_groups :]]
        surplus += _completed(chain.from_iterable(engine.stop(cut_s) for engine in self._engines))
        self.banked = sorted(surplus, key=_serial)
        self.carried = sorted((group for group in active if group.num_left), key=_serial)
        report = self._report(
            accepted,
            max(engine.now_s for engine in self._engines),
            num_started=num_started,
            num_fresh=len(fresh),
            num_restarted=num_restarted,
            num_dropped=num_dropped,
            lost_tokens=lost_tokens,
            generated_tokens=sum(group.num_tokens for group in active) - tokens_before,
        )
        for group in accepted:
            group.members.clear()  # they point back at it: a round would leave half a million cycles behind
        self._close(report)
        return report

    def _apply_bound(self) -> tuple[int, int, int]:
        """Restart and drop what is too old; how many groups of each, and the tokens that they lose."""
        num_restarted = num_dropped = lost_tokens = 0
        carried: list[SimGroup] = []
        banked: list[SimGroup] = []
        for groups, kept in ((self.carried, carried), (self.banked, banked)):
            for group in groups:
                fate = self.config.bound.fate((span[0] for span in group.spans()), self.version)
                if fate is GroupFate.KEEP:
                    kept.append(group)
                    continue
                lost_tokens += group.num_tokens
                lengths = next(self.lengths, None) if fate is GroupFate.RESTART else None
                if lengths is None:
                    num_dropped += 1
                    group.members.clear()
                    continue
                num_restarted += 1
                group.born_round = self.version
                self._begin(group, lengths)
                carried.append(group)
        self.num_filtered += num_dropped
        self.carried, self.banked = carried, banked
        return num_restarted, num_dropped, lost_tokens

    def _draw_groups(self, count: int) -> list[SimGroup]:
        groups = []
        for _ in range(count):
            lengths = next(self.lengths, None)
            if lengths is None:
                break
            group = SimGroup(self.num_submitted, self.version)
            self._begin(group, lengths)
            self.num_submitted += 1
            groups.append(group)
        return groups

    def _begin(self, group: SimGroup, lengths: Sequence[int]) -> None:
        group.begin(lengths)
        self.num_drawn += len(lengths)
        self.drawn_tokens += sum(lengths)

    def _place(self, fresh: list[SimGroup]) -> None:
        """Hand each group's unfinished members to an engine: carried ones as the admission policy says, then fresh."""
        load = [0] * len(self._engines)
        for group in self.carried:
            load[group.engine] += group.num_left
        least = [(members, index) for index, members in enumerate(load)]
        heapq.heapify(least)
        queues: list[list[Member]] = [[] for _ in self._engines]
        carried = {group.serial: group for group in self.carried}
        order = self.config.admission.order(map(self._candidate, self.carried))
        for group in chain((carried[candidate.serial] for candidate in order), fresh):
            if group.engine < 0:
                members, group.engine = least[0]
                heapq.heapreplace(least, (members + group.num_left, group.engine))
            queues[group.engine].extend(member for member in group.members if member.done < member.length)
        for engine, queue in zip(self._engines, queues, strict=True):
            engine.begin(queue, self.version)

    def _candidate(self, group: SimGroup) -> Candidate:
        budget = sum(self.config.max_tokens - member.done for member in group.members if member.done < member.length)
        return Candidate(group.serial, self.version - group.born_round, group.num_left, budget)

    def _run_until_cut(self, complete: list[_Complete]) -> tuple[list[_Complete], float]:
        """Those that are complete up to the cut, and its time; if it never comes, the time of the last event."""
        target = self.config.target_groups
        cut_s = 0.0 if len(complete) >= target else math.inf
        events = [(engine.next_s, index) for index, engine in enumerate(self._engines) if engine.next_s < math.inf]
        heapq.heapify(events)
        last_s = 0.0
        while events and events[0][0] <= cut_s:
            last_s, index = events[0]
            engine = self._engines[index]
            complete += [(last_s, group.serial, group) for group in _completed(engine.advance())]
            if engine.next_s < math.inf:
                heapq.heapreplace(events, (engine.next_s, index))
            else:
                heapq.heappop(events)
            if len(complete) >= target:
                cut_s = last_s
        return complete, min(cut_s, last_s)

    def _report(self, accepted: list[SimGroup], seconds: float, **counts: int) -> RoundReport:
        version, bound = self.version, self.config.bound
        spans = [list(group.spans()) for group in accepted]
        staleness = histogram(chain.from_iterable(spans), version)
        trained, num_masked_groups = staleness, 0
        if bound.max_staleness is not None:
            fine = [[span for span in group if not bound.exceeded(span[0], version)] for group in spans]
            trained = histogram(chain.from_iterable(fine), version)
            num_masked_groups = sum(len(kept) < len(group) for kept, group in zip(fine, spans, strict=True))
        return RoundReport(
            seconds=seconds,
            accepted=tuple(group.serial for group in accepted),
            accepted_trajectories=sum(len(group.members) for group in accepted),
            accepted_tokens=sum(group.num_tokens for group in accepted),
            num_carried=len(self.carried),
            num_banked=len(self.banked),
            num_masked_groups=num_masked_groups,
            staleness=staleness,
            trained=trained,
            prefill_tokens=sum(engine.prefill_tokens for engine in self._engines),
            reprefill_tokens=sum(engine.reprefill_tokens for engine in self._engines),
            slot_s=sum(engine.slot_s for engine in self._engines),
            peak_slot_s=sum(engine.peak_running for engine in self._engines) * seconds,
            peak_kv_tokens=max(engine.peak_tokens for engine in self._engines),
            **counts,
        )

    def _close(self, report: RoundReport) -> None:
        self.num_accepted += len(report.accepted)
        self.version += 1
        kept = len(self.carried) + len(self.banked)
        assert self.num_submitted == self.num_accepted + self.num_filtered + kept, "a group was lost"
        capacity = self.config.kv_capacity_tokens
        self.over_provision.observe(
            RoundOutcome(
                num_started=report.num_started,
                num_accepted=len(report.accepted),
                num_filtered=report.num_dropped,
                num_banked=report.num_banked,
                peak_kv_usage=min(1.0, report.peak_kv_tokens / capacity) if capacity else 0.0,
            )
        )


def _serial(group: SimGroup) -> int:
    return group.serial


def _completed(ended: Iterable[Member]) -> list[SimGroup]:
    """Count the members off; the groups whose last it was."""
    groups = []
    for member in ended:
        member.group.num_left -= 1
        if member.group.num_left == 0:
            groups.append(member.group)
    return groups


def simulate_measured(measured: dict[str, Any]) -> list[RoundReport]:
    """The rounds of a real run again: its lengths, its configuration, its step model; see `validate`."""
    settings = measured["config"]
    config = FleetConfig(
        step=StepModel(**measured["step_model"]),
        num_engines=settings["num_engines"],
        max_num_seqs=settings["max_num_seqs"],
        target_groups=settings["target_groups"],
        prompt_tokens=settings["prompt_tokens"],
        block_size=settings["block_size"],
        kv_policy=KvPolicy.parse(settings["kv_policy"]),
    )
    assert all(len(row) == settings["group_size"] for row in measured["lengths"]), "a group of another size"
    simulator = RoundSimulator(config, iter(measured["lengths"]), FixedOverProvision(settings["over_provision"]))
    return [simulator.run_round() for _ in measured["rounds"]]


def validate(measured: dict[str, Any]) -> float:
    """Simulated over measured accepted tokens per second.

    Args:
        measured: `step_model` (the fields of `StepModel`), `config` (`num_engines`, `max_num_seqs`, `target_groups`,
            `group_size`, `over_provision`, `kv_policy`, `prompt_tokens`, `block_size`), `lengths` (of each group, in
            the order of submission), `rounds` (one entry a round, whatever it holds), `measured_tokens_per_s` over all
            of them.

    """
    reports = simulate_measured(measured)
    seconds = sum(report.seconds for report in reports)
    return sum(report.accepted_tokens for report in reports) / seconds / float(measured["measured_tokens_per_s"])
