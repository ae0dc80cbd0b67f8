"""Whoever runs carrying rounds and streams, one after the other, and what it makes of what it gets.

`Caller` does what the iterators of `longtail.engine.round_stream` do with a `CarryRun`, but never waits: one item at a
time, when the test says so. `Prompts` are the trainer's, `SlowHooks` the recipe's. What comes back is held against the
prompts and against an independent replay of the faked model.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import MappingProxyType
from typing import Any, overload

import msgspec
from kv_model import VOCAB_SIZE, expected_tokens, next_token
from step_driver import StepDriver

from longtail.engine.carry_book import CarryBook
from longtail.engine.carry_config import CarryConfig
from longtail.engine.carry_run import CarryRun
from longtail.engine.config import SamplingConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.forks import Fork as AskedFork
from longtail.engine.hook_points import Append, Continue, Decision, Fork, Refused, Stop, Verdict
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Group, Round, Trajectory

#: Many prompts begin alike.
COMMON = random.Random(0).choices(range(3, VOCAB_SIZE), k=32)
#: A tenth of the vocabulary may end a segment.
BOUNDARY_TOKENS = tuple(range(3, VOCAB_SIZE, 10))
STREAM = "a stream"
_MAX_MEMBERS = 12


class Prompts(Sequence[Prompt]):
    """Random prompts for a model of `capacity` positions, which some budgets exceed; `metadata` has the position."""

    def __init__(self, seed: int, count: int, capacity: int) -> None:
        self.group_size = 1
        self.is_for_trees = False
        self.given: dict[int, Prompt] = {}
        self._seed = seed
        self._count = count
        self.capacity = capacity

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Prompt]:
        return (self[n] for n in range(self._count))

    @overload
    def __getitem__(self, key: int) -> Prompt: ...
    @overload
    def __getitem__(self, key: slice) -> list[Prompt]: ...
    def __getitem__(self, key: int | slice) -> Prompt | list[Prompt]:
        if isinstance(key, slice):
            return [self[n] for n in range(*key.indices(self._count))]
        rng = random.Random(f"{self._seed}/{key}")
        token_ids = COMMON[: rng.choice((0, 0, 7, 8, 16))] + rng.choices(range(3, VOCAB_SIZE), k=rng.randint(1, 12))
        budgets = [rng.choice((rng.randint(1, 4), rng.randint(5, 16), rng.randint(17, 32))) for _ in range(4)]
        if rng.random() < 0.05:
            budgets[0] = self.capacity
        if self.is_for_trees:
            budgets = [max(budgets)] * self.group_size
        self.given[key] = Prompt(token_ids=token_ids, max_tokens=budgets[: self.group_size], metadata={"n": key})
        return self.given[key]


class HookFailure(Exception):
    """A hook failed in a way that ends the round."""


class SlowHooks:
    """Answer when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Future[Any]]] = []

    def prepare(self, prompt: Prompt) -> Future[Prompt]:
        return self._ask(prompt)

    decides_boundaries = True

    def decide(self, trajectory: Trajectory) -> Future[Decision | Refused]:
        assert trajectory.is_paused
        return self._ask(trajectory)

    def finish_trajectory(self, trajectory: Trajectory) -> Future[Trajectory]:
        assert trajectory.ended_by_itself
        return self._ask(trajectory)

    def finish_group(self, group: Group) -> Future[Verdict]:
        return self._ask(group)

    def change_weights(self, version: int) -> Future[None]:
        raise NotImplementedError

    def answer(self, index: int, accept: bool) -> None:
        """Answer one question: a longer prompt, rewards for trajectories, a verdict on a group."""
        value, future = self.asked.pop(index % len(self.asked))
        if isinstance(value, Prompt):
            value = prepared(value)
        elif isinstance(value, Trajectory) and value.is_paused:
            value = decision_on(value)
        elif isinstance(value, Trajectory):
            value = msgspec.structs.replace(value, reward=reward_of(value))
        elif isinstance(value, Group):
            value = Verdict(group=value, rejected=None if accept else "hook: no")
        future.set_result(value)

    def fail(self, index: int) -> None:
        """One answer is an exception."""
        self.asked.pop(index % len(self.asked))[1].set_exception(HookFailure())

    def _ask(self, value: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.asked.append((value, future))
        return future


class Caller:
    """See the module.

    Args:
        prompts: the trainer's.
        config: policies of the rounds.
        has_iterator: it gives an iterator of the prompts to every round, not their sequence.
        sampling: fields of `SamplingConfig` that make boundaries or trees.

    Attributes:
        accepted: positions of the prompts whose groups it has, with the round that they came in.
        filtered: positions of the prompts whose groups were refused, with the reason.
        seen: how often what was to be tested happened.

    """

    def __init__(
        self,
        prompts: Prompts,
        config: CarryConfig,
        *,
        has_iterator: bool = False,
        sampling: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.prompts = prompts
        self._sampling = SamplingConfig(max_tokens=4, ignore_eos=True, **sampling)
        self._tree = self._sampling.tree
        prompts.is_for_trees = self._tree is not None
        self._source: Any = iter(prompts) if has_iterator else prompts
        self._group_size = self._tree.width if self._tree is not None else 2 if has_iterator else None
        self.config = config
        self.accepted: dict[int, str] = {}
        self.filtered: dict[int, str] = {}
        self.seen: Counter[str] = Counter()
        self.num_rounds = 0

    @property
    def can_fork(self) -> bool:
        """Its rounds take forks."""
        return self.config.park and self._tree is None

    def attend(self, driver: StepDriver, book: CarryBook) -> None:
        """This process has this engine and these groups; what there was of an earlier one is gone."""
        self.driver = driver
        self.book = book
        self.run: CarryRun | None = None
        self.num_turns = 0
        self.is_stream = False
        self._items: deque[Any] = deque()
        self._finishing: Future[Round | None] | None = None
        self._round: Round | None = None
        self._given: tuple[int, Group] | None = None
        held = {group.prompt.metadata["n"] for group in book.store.groups()}
        self.filtered = {n: reason for n, reason in self.filtered.items() if n not in held}
        # That a stream's group was received need not be on the disk yet.
        self.accepted = {n: where for n, where in self.accepted.items() if where != STREAM or n not in held}
        refuse = book.store.filter

        def filter_and_note(serial: int, reason: str) -> None:
            group = book.store.carried.get(serial) or book.store.banked[serial]
            refuse(serial, reason)
            self.filtered[group.prompt.metadata["n"]] = reason

        book.store.filter = filter_and_note  # type: ignore[method-assign]

    # ---- its rounds --------------------------------------------------------------------------------------------

    def start(self, target: int | None, ratio: float | None, group_size: int, num_groups: int) -> None:
        """Begin a round, or a stream (`target=None`)."""
        assert self.run is None
        if self.book.store.recovered is not None:
            target = target or 1  # a stream refuses
        group_size = self.prompts.group_size = self._group_size or group_size
        ratio = ratio if target is not None and self.config.target_carried is None else None
        self.num_rounds += 1
        self.num_turns = 0
        self._items = deque()
        self.is_stream = target is None
        run = CarryRun(
            self.driver, self.book, self._source, group_size=group_size, target_groups=target, over_provision=ratio,
            sampling=self._sampling, round_id=f"r{self.num_rounds}", num_groups=num_groups, can_fork=self.can_fork,
        )  # fmt: skip
        try:
            run.submit(self._items.append)
        except InvalidInputError:
            assert self.book.store.totals.cursor == len(self.prompts)
            assert run.has_ended
        else:
            self.run = run

    @property
    def is_waiting(self) -> bool:
        """The run goes on only when an item comes."""
        return self.run is not None and not self._items and self._finishing is None and self._round is None

    def go_on(self) -> None:
        """One turn of the iterator: it gives something to the caller, or takes an item if there is one."""
        if self.run is None or self._finishing is not None:
            return
        try:
            if self.is_stream:
                self._go_on_with_stream(self.run)
            else:
                self._go_on_with_round(self.run)
        except HookFailure:
            self.leave(is_orderly=False)

    def leave(self, is_orderly: bool) -> None:
        """The caller goes away before the end."""
        run = self.run
        assert run is not None
        if self.is_stream and is_orderly:
            self._acknowledge(run)
            run.stop()
            while run.is_stopping:
                self.driver.run_commands()
                self.driver.step()
                try:
                    while self._items and run.is_stopping:
                        run.take(self._items.popleft())
                except HookFailure:
                    break
            else:
                run.end()
        run.cancel()
        self._forget_run()

    def ask_fork(self, rng: random.Random) -> AskedFork | None:
        """Ask for branches of some trajectory, at some position, if that is possible now."""
        groups = list(self.book.store.carried.values())
        if self.run is None or self._finishing is not None or self._round is not None or not groups:
            return None
        group = rng.choice(groups)
        index = rng.randrange(len(group.members))
        at = rng.choice((None, None, rng.randint(0, 1 + group.num_tokens(index)), rng.randint(0, 12)))
        n = rng.choice((1, 1, 2, 4))
        if len(group.members) + n > _MAX_MEMBERS:
            return None
        try:
            return self.run.ask_fork(group.trajectory_id(index), at, n, None)
        except InvalidInputError as error:
            self.seen[f"forks refused, {error.field}"] += 1
            return None

    def take_fork(self, fork: AskedFork) -> bool:
        """What the scheduler said to it; false if that can't be taken yet."""
        assert self.run is not None
        try:
            ids = self.run.take_fork(fork)
        except InvalidInputError as error:
            self.seen[f"forks refused, {error.field}"] += 1
            return True
        if ids is None:
            self.seen["forks too late"] += 1
            return False
        point = fork.answer.result()
        kind = "running" if point.is_live else "parked" if point.num_kv_tokens else "without KV"
        self.seen[f"forks, {kind}"] += 1
        self.seen["branches"] += len(ids)
        return True

    def see_round(self) -> None:
        """Take note of a round that was just finished, if one was."""
        if self._finishing is None or not self._finishing.done():
            return
        finished, self._finishing = self._finishing.result(), None
        if finished is not None:
            self._round = finished
            self._check_round(finished)

    def _go_on_with_round(self, run: CarryRun) -> None:
        if self._round is not None:
            run.received()
            for group in self._round.groups:
                self._accept(group, self._round.round_id)
            self.seen["rounds"] += 1
            self._forget_run()
        elif run.settle():
            self._finishing = run.finish()
        elif self._items:
            self._take(run)

    def _go_on_with_stream(self, run: CarryRun) -> None:
        self._acknowledge(run)
        for serial, group in run.ready_groups().items():
            self._given = serial, group
            self._check_group(group, self.driver.weight_version)
            return
        if run.settle():
            run.end()
            self._forget_run()
        elif self._items:
            self._take(run)

    def _acknowledge(self, run: CarryRun) -> None:
        if self._given is not None:
            (serial, group), self._given = self._given, None
            assert serial in self.book.store.banked
            run.taken(serial)
            self._accept(group, STREAM)

    def _take(self, run: CarryRun) -> None:
        for trajectory in run.take(self._items.popleft()):
            attempt = trajectory.trajectory_id.split("/")[1]
            serial, store = int(attempt.split(".")[0]), self.book.store
            group = store.carried.get(serial) or store.banked.get(serial)
            if group is not None and group.attempt == attempt:
                self._check_trajectory(trajectory, dict(enumerate(group.members)))

    def _accept(self, group: Group, where: str) -> None:
        n = group.metadata["n"]
        assert self.accepted.get(n) in (None, where if where != STREAM else None), f"group {n} was returned twice"
        self.accepted[n] = where

    def _forget_run(self) -> None:
        self.run = self._round = self._finishing = self._given = None

    # ---- what must hold of what it gets --------------------------------------------------------------------------

    def _check_round(self, round_: Round) -> None:
        store, carry = self.book.store, round_.carry
        assert self.run is not None
        assert carry is not None
        is_again = round_.round_id != self.run.round_id
        if is_again:
            self.seen["rounds given again"] += 1
        else:
            assert carry.version == self.driver.weight_version
            before = carry.num_carried_in + carry.num_banked_in + carry.num_fresh
            assert before == carry.num_accepted + carry.num_filtered + carry.num_banked + carry.num_carried
            assert carry.num_accepted == len(round_.groups)
            assert carry.num_filtered == len(round_.filtered_groups) == sum(carry.filtered_reasons.values())
            assert carry.num_banked == len(store.banked)
            assert carry.num_carried == len(store.carried)
            for group in round_.filtered_groups:
                assert self.filtered[group.metadata["n"]] == group.rejected
            if len(round_.groups) < round_.target_groups:
                assert store.totals.cursor == len(self.prompts)
                assert not store.carried, "a round is short, and groups could go on"
            self.seen.update(
                {
                    "banked in": carry.num_banked_in,
                    "restarts": carry.num_restarts,
                    "resumes": carry.num_resumes,
                    "parked tokens taken up": carry.num_parked_tokens,
                    "recomputed tokens": carry.num_reprefilled_tokens,
                    "masked tokens": carry.num_masked_tokens,
                    "later waves": max(0, len(self.run._waves.ids) - 1),
                }
                | {f"filtered, {reason}": count for reason, count in carry.filtered_reasons.items()}
            )
        for group in round_.groups:
            self._check_group(group, self.driver.weight_version, may_be_stale=is_again)

    def _check_group(self, group: Group, version: int, may_be_stale: bool = False) -> None:
        prompt = self.prompts.given[group.metadata["n"]]
        assert isinstance(prompt.max_tokens, list)
        assert group.complete
        assert group.rejected is None
        by_index = {one.index: one for one in group.trajectories}
        if self._tree is None:
            assert list(by_index) == list(range(len(group.trajectories)))
            assert len(group.trajectories) >= len(prompt.max_tokens)
            assert all(one.branch is not None for one in group.trajectories[len(prompt.max_tokens) :])
        else:
            assert len(by_index) + group.num_dismissed == self._tree.width
            assert not group.num_dismissed or self._tree.fallback == "none"
            self.seen["dismissed"] += group.num_dismissed
            self.seen["trees"] += 1
        for trajectory in group.trajectories:
            if (branch := trajectory.branch) is None:
                continue
            assert self._tree is None or branch.at % self._tree.segment_tokens == 0
            parent = by_index[branch.of]
            for name in ("output_token_ids", "logprobs", "source_mask"):
                assert getattr(trajectory, name)[: branch.at] == getattr(parent, name)[: branch.at]
            assert token_versions(trajectory)[: branch.at] == token_versions(parent)[: branch.at]
            assert trajectory.trajectory_id.rpartition("/")[0] == parent.trajectory_id.rpartition("/")[0]
            self.seen["branches accepted"] += 1
            self.seen["branches of branches"] += parent.branch is not None
        bound = self.config.max_staleness
        for trajectory in group.trajectories:
            self._check_trajectory(trajectory, by_index)
            assert self.book.hooks is None or trajectory.reward == reward_of(trajectory)
            is_stale = [bound is not None and abs(version - one) > bound for one in token_versions(trajectory)]
            # A mask of the day when the round ended stays.
            assert all(not loss for loss, stale in zip(trajectory.loss_mask, is_stale, strict=True) if stale)
            mask = [source * (not stale) for source, stale in zip(trajectory.source_mask, is_stale, strict=True)]
            assert may_be_stale or trajectory.loss_mask == mask
            assert may_be_stale or self.config.on_stale == "mask" or not any(is_stale)

    def _check_trajectory(self, trajectory: Trajectory, members: Mapping[int, Trajectory | None]) -> None:
        """It is what the model makes of its prompt over KV of the versions that it reports."""
        prompt = self.prompts.given[trajectory.metadata["n"]]
        assert isinstance(prompt.max_tokens, list)
        tokens, versions = trajectory.output_token_ids, token_versions(trajectory)
        sequence = [*trajectory.prompt_token_ids, *tokens]
        assert trajectory.prompt_token_ids == (prompt if self.book.hooks is None else prepared(prompt)).token_ids
        has_room_for = self.prompts.capacity - len(trajectory.prompt_token_ids)
        is_at_boundary = bool(trajectory.boundaries) and trajectory.boundaries[-1].end == len(tokens)
        is_at_boundary |= tokens[-1] in self._sampling.stop_token_ids
        assert not set(tokens[:-1]) & set(self._sampling.stop_token_ids)
        assert trajectory.finish_reason == "length" or (trajectory.finish_reason == "stop" and is_at_boundary)
        budget = prompt.max_tokens[_root(trajectory, members)]
        budget = budget if self._tree is None else min(budget, self._tree.max_tokens)
        assert len(tokens) == min(budget, has_room_for) or is_at_boundary
        self._check_boundaries(trajectory)
        assert trajectory.logprobs == [
            -(token % 7) - 0.5 if source else 0.0 for token, source in zip(tokens, trajectory.source_mask, strict=True)
        ]
        assert (trajectory.segments[0].start, trajectory.segments[-1].end) == (0, len(tokens))
        used = set(versions)
        for segment in trajectory.segments:
            kv = [int(span.version) for span in segment.kv_versions for _ in range(span.start, span.end)]
            used.update(kv)
            if not trajectory.source_mask[segment.start]:
                assert not kv
                continue
            assert len(kv) == len(trajectory.prompt_token_ids) + segment.start
            assert len(set(versions[segment.start : segment.end])) == 1, "the weights change inside a segment"
            for index in range(segment.start, segment.end):
                assert tokens[index] == next_token(list(zip(sequence, kv, strict=False)), versions[index])
                kv.append(versions[index])
        if len(used) == 1 and all(trajectory.source_mask):
            assert tokens == expected_tokens(trajectory.prompt_token_ids, len(tokens), versions[0])

    def _check_boundaries(self, trajectory: Trajectory) -> None:
        """Every segment ends at its first boundary, and what was appended has the environment for its source."""
        start, mask = 0, [1] * len(trajectory.output_token_ids)
        every, token_ids = self._sampling.boundary_every, self._sampling.boundary_token_ids

        def is_boundary(position: int) -> bool:
            token = trajectory.output_token_ids[position]
            return token in token_ids or (every is not None and position + 1 - start >= every)

        for boundary in trajectory.boundaries:
            assert boundary.start == start
            assert not any(is_boundary(position) for position in range(start, boundary.end - 1))
            assert is_boundary(boundary.end - 1)
            last = trajectory.output_token_ids[boundary.end - 1]
            assert boundary.made_by == (last if last in token_ids else None)
            start = boundary.end + boundary.num_appended
            mask[boundary.end : start] = [0] * boundary.num_appended
            self.seen["boundaries"] += 1
            self.seen["appended tokens"] += boundary.num_appended
        assert not any(is_boundary(position) for position in range(start, len(mask) - 1))
        assert trajectory.source_mask == mask
        self.seen["stopped at a boundary"] += trajectory.finish_reason == "stop" and bool(trajectory.boundaries)


def _root(trajectory: Trajectory, members: Mapping[int, Trajectory | None]) -> int:
    """Index of the member that it is a branch of, in the end."""
    one: Trajectory | None = trajectory
    while one is not None and one.branch is not None:
        index = one.branch.of
        one = members[index]
    return index if trajectory.branch is not None else trajectory.index


def decision_on(trajectory: Trajectory) -> Decision | Refused:
    """What the hook decides at a boundary."""
    rng = random.Random(str(trajectory.output_token_ids))
    what = rng.choice(("continue",) * 5 + ("append",) * 4 + ("fork",) * 3 + ("stop", "wrong"))
    if what == "append":
        return Append(rng.choices(range(3, VOCAB_SIZE), k=rng.randint(1, 6)))
    if what == "fork" and trajectory.index < 6:
        return Fork(rng.randint(1, 2))
    if what == "wrong" and rng.random() < 0.3:
        return Append([VOCAB_SIZE])
    return Stop() if what == "stop" else Continue()


def prepared(prompt: Prompt) -> Prompt:
    """What the hook makes of a prompt."""
    return replace(prompt, token_ids=[*(prompt.token_ids or ()), 7])


def reward_of(trajectory: Trajectory) -> float:
    """What the hook gives a trajectory."""
    return float(sum(trajectory.output_token_ids))


def token_versions(trajectory: Trajectory) -> list[int]:
    """The version of every token."""
    return [int(span.version) for span in trajectory.weight_versions for _ in range(span.start, span.end)]
