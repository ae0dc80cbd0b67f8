"""Rounds that carry over, driven at random over vLLM's real scheduler and block pool.

The machines are the caller of `CarryRun`s, the clock of the engine, the hooks, other traffic, the trainer that changes
the weights, and death. What comes back is checked by `carry_caller`, what the model read by `step_driver`; here are the
books: of the store, of the scheduler and of the block pool.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import scheduler_harness
from carry_caller import BOUNDARY_TOKENS, COMMON, Caller, HookFailure, Prompts, SlowHooks
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kv_model import VOCAB_SIZE, KvEngine
from step_driver import StepDriver

from longtail.engine import group_store, journal, waves
from longtail.engine.carry_book import CarryBook, VersionChanged
from longtail.engine.carry_config import CarryConfig
from longtail.engine.group_store import GroupStore
from longtail.engine.judging import Inbox
from longtail.scheduler.kv_parking import PrefixCacheGate
from longtail.scheduler.member import Member
from longtail.scheduler.parking import ParkingLot
from longtail.scheduler.rollout_scheduler import make_scheduler
from longtail.scheduler.staleness import StalenessBound
from longtail.scheduler.tree_policy import TreeSpec

#: By block size: slots and tokens of a step.
STEP_LIMITS = {4: (6, 32), 8: (12, 64)}
#: What is not over after so many steps is stuck.
MAX_STEPS = 8000
#: How long the engine and the caller go on after something happened.
TURNS = st.sampled_from((0, 0, 1, 3, 10, 30))
CONFIGS = st.builds(
    CarryConfig,
    kv_policy=st.sampled_from(("fresh", "stale", "stale_up_to:1", "stale_up_to:2")),
    park=st.sampled_from((True, True, True, False)),
    share_prefix=st.sampled_from((False, False, False, True)),
    max_staleness=st.sampled_from((None, 0, 0, 1, 2)),
    on_stale=st.sampled_from(("mask", "restart", "drop")),
    admission=st.sampled_from(("carried_first", "nearly_complete_first", "longest_remaining_first", "fifo")),
    target_carried=st.sampled_from((None, None, 0, 3)),
)
TREES = (
    TreeSpec(width=4, depth=8, segment_tokens=4),
    TreeSpec(width=6, depth=5, segment_tokens=3, branching=3, fallback="any", split="logprob"),
    TreeSpec(width=5, depth=4, segment_tokens=5, min_roots=1, max_roots=3, synchronous=True),
    TreeSpec(width=4, depth=9, segment_tokens=2, fallback="none", transfer=False, branching=1),
)
#: Counts that no machine may end without.
MUST_HAPPEN = (
    "rounds",
    "rounds given again",
    "banked in",
    "restarts",
    "resumes",
    "parked tokens taken up",
    "parked tokens lost",
    "masked tokens",
    "preemptions",
    "later waves",
    "filtered, hook",
    "filtered, stale",
    "forks, running",
    "forks, parked",
    "forks, without KV",
    "forks too late",
    "branches accepted",
    "branches of branches",
    "boundaries",
    "appended tokens",
    "stopped at a boundary",
    "filtered, on_boundary",
    "trees",
    "births, boundary",
    "births, fallback",
    "dismissed",
)


@functools.cache
def vllm_config(folder: Path, is_async: bool, has_cache: bool, block_size: int) -> Any:
    slots, tokens = STEP_LIMITS[block_size]
    config = scheduler_harness.make_vllm_config(
        folder,
        block_size=block_size,
        enable_prefix_caching=has_cache,
        max_num_seqs=slots,
        max_num_batched_tokens=tokens,
    )
    config.scheduler_config.async_scheduling = is_async
    return config


class CarryMachine(RuleBasedStateMachine):
    """See the module."""

    folder: ClassVar[Path]
    is_async: ClassVar[bool] = False
    has_cache: ClassVar[bool] = True
    seen: ClassVar[Counter[str]]

    @initialize(
        config=CONFIGS,
        block_size=st.sampled_from((4, 8)),
        num_blocks=st.integers(30, 80),
        num_prompts=st.sampled_from((12, 1000, 1000)),
        is_judged=st.booleans(),
        is_durable=st.booleans(),
        has_iterator=st.booleans(),
        sampling=st.sampled_from(
            (
                {},
                {"boundary_every": 3},
                {"boundary_every": 9},
                {"boundary_token_ids": BOUNDARY_TOKENS},
                {"boundary_every": 7, "boundary_token_ids": BOUNDARY_TOKENS},
                *({"tree": tree} for tree in TREES),
                *({"tree": tree, "stop_token_ids": BOUNDARY_TOKENS[::2]} for tree in TREES),
            )
        ),
        seed=st.integers(0, 1000),
    )
    def begin(
        self,
        config: CarryConfig,
        block_size: int,
        num_blocks: int,
        num_prompts: int,
        is_judged: bool,
        is_durable: bool,
        has_iterator: bool,
        sampling: dict[str, Any],
        seed: int,
    ) -> None:
        self.rng = random.Random(seed)
        self.is_judged = is_judged
        self.num_between = 0
        self.temporary = tempfile.TemporaryDirectory() if is_durable else None
        if self.temporary is not None:
            config = dataclasses.replace(config, journal=Path(self.temporary.name) / "journal")
        self.config = config
        self.shape = block_size, num_blocks
        self.caller = Caller(
            Prompts(seed, num_prompts, block_size * (num_blocks - 1)),
            config,
            has_iterator=has_iterator and not is_durable,
            sampling=sampling if self._takes(sampling, config) else {},
        )
        self._start_process(0)

    def _takes(self, sampling: dict[str, Any], config: CarryConfig) -> bool:
        """Boundaries need hooks, trees need parked KV."""
        return config.park if "tree" in sampling else self.is_judged

    def _start_process(self, version: int) -> None:
        block_size, num_blocks = self.shape
        engine = KvEngine(
            make_scheduler, vllm_config(self.folder, self.is_async, self.has_cache, block_size), num_blocks
        )
        self.driver = StepDriver(engine, self.config, version)
        self.hooks = SlowHooks() if self.is_judged else None
        self.book = CarryBook(self.config, self.hooks, self.driver.weight_version)
        self.caller.attend(self.driver, self.book)

    # ---- the caller --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.caller.run is None)
    @rule(
        goal=st.integers(1, 4),
        ratio=st.sampled_from((None, 1.5, 2.0, 3.0)),
        group_size=st.integers(1, 4),
        is_stream=st.sampled_from((False, False, False, True)),
    )
    def start(self, goal: int, ratio: float | None, group_size: int, is_stream: bool) -> None:
        self.num_between = 0
        self.caller.start(None if is_stream else goal, ratio, group_size, num_groups=goal + 1)

    @precondition(lambda self: self.caller.run is not None)
    @rule(turns=st.sampled_from((1, 4, 15, 40, 80)), hooks_answer=st.sampled_from((True, True, False)))
    def go_on(self, turns: int, hooks_answer: bool) -> None:
        for turn in range(turns):
            for place in range(3):
                if hooks_answer and self.hooks is not None and self.hooks.asked:
                    self.hooks.answer(turn + place, accept=turn % 4 > 0)
            self._turn()

    @precondition(lambda self: self._may_happen())
    @rule(num_steps=st.sampled_from((0, 1, 3, 10, 25)), num_items=st.sampled_from((0, 1, 2, 8)))
    def be_ahead(self, num_steps: int, num_items: int) -> None:
        """The engine is ahead of its caller, who then takes some of what there is."""
        self._run_commands()
        for _ in range(num_steps):
            self.driver.step()
            self._run_commands()
        for _ in range(num_items):
            self.caller.go_on()
        self._go_on(0)

    @precondition(lambda self: self.caller.num_turns > 40)
    @rule(how=st.sampled_from(("cancelled", "closed", "killed", "killed")))
    def is_cut_short(self, how: str) -> None:
        """The caller goes away before the end, or the whole process does."""
        self.caller.num_turns = 0
        if how == "killed" and self.temporary is not None:
            self._die()
        elif self.caller.run is not None:
            self.caller.leave(is_orderly=how == "closed")

    def _die(self) -> None:
        """The next process has the journal, and the weights of the trainer."""
        cursor = self.book.store.totals.cursor
        assert self.book.store._journal is not None
        self.book.store._journal.close()
        self._start_process(self.driver.weight_version)
        assert self.book.store.totals.cursor == cursor, "prompts are skipped, or used twice"

    @precondition(lambda self: self.caller.run is not None)
    @rule(times=st.integers(1, 3), num_turns=st.sampled_from((0, 0, 0, 1, 5)), patience=st.booleans(), turns=TURNS)
    def fork(self, times: int, num_turns: int, patience: bool, turns: int) -> None:
        """Some trajectory gets branches; the caller may go on while the scheduler is asked."""
        for _ in range(times):
            run, fork = self.caller.run, self.caller.ask_fork(self.rng)
            if run is None or fork is None:
                continue
            self._go_on(num_turns)
            for _ in range(MAX_STEPS if patience else 1):
                self._run_commands()
                if self.caller.run is not run or self.caller.take_fork(fork):
                    break
                self._go_on(1)
            else:
                assert not patience, "a fork waits for nothing"
            run.end_fork(fork)
        self._go_on(turns)

    def _may_happen(self) -> bool:
        """Not much happens between two rounds."""
        return self.caller.run is not None or self.num_between < 3

    def _go_on(self, turns: int) -> None:
        self.num_between += self.caller.run is None
        for _ in range(turns):
            if self.caller.run is not None:
                self._turn()

    def _turn(self) -> None:
        """The engine makes a step, and the caller takes what there is."""
        self.caller.num_turns += 1
        self._run_commands()
        self.driver.step()
        for _ in range(100):
            if self.caller.run is None or self.caller.is_waiting:
                break
            self.caller.go_on()
            self.caller.see_round()
        self.caller.go_on()

    def _run_commands(self) -> None:
        while self.driver.run_command():
            self.caller.see_round()

    # ---- the hooks, the trainer, other traffic, death --------------------------------------------------------------

    @precondition(lambda self: self.hooks is not None and self.hooks.asked)
    @rule(
        index=st.integers(0, 7), count=st.integers(1, 8), what=st.sampled_from((True, True, True, False, HookFailure))
    )
    def answer(self, index: int, count: int, what: Any) -> None:
        """Hooks accept, reject or fail."""
        for place in range(count):
            if self.hooks is not None and self.hooks.asked:
                self.hooks.answer(index + place, accept=what is not False)
        if what is HookFailure and self.hooks is not None and self.hooks.asked:
            self.hooks.fail(index)

    @precondition(lambda self: self._may_happen())
    @rule(by=st.sampled_from((1, 1, 1, 2)), turns=TURNS)
    def change_weights(self, by: int, turns: int) -> None:
        def change(_: Any) -> None:
            self.driver.change_weights(self.driver.weight_version + by)
            self.book.inbox.post_to_run(VersionChanged())

        self.driver.call_later(change)
        self._go_on(turns)

    @precondition(lambda self: self._may_happen())
    @rule(
        what=st.sampled_from(("small", "small", "large", "whole pool", "abort", "reset", "reset all")),
        length=st.integers(1, 60),
        max_tokens=st.integers(1, 40),
        turns=TURNS,
    )
    def other_traffic(self, what: str, length: int, max_tokens: int, turns: int) -> None:
        capacity = self.driver.engine.limits.max_model_len
        if what == "reset":
            self._reset_prefix_cache()
        elif what == "reset all":
            assert self.driver.kv.scheduler.reset_prefix_cache(reset_running_requests=True)
        elif what == "abort":
            self.driver.abort_other()
        elif self.driver.num_others < 5:
            if what == "whole pool":
                length, max_tokens = capacity - 2, 2
            elif what == "small":
                length, max_tokens = 1 + length // 8, 1 + max_tokens // 8
            prompt = COMMON[: self.rng.choice((0, 8, 16))] + self.rng.choices(range(3, VOCAB_SIZE), k=length)
            self.driver.add_other(prompt[: capacity - max_tokens], max_tokens)
        self._go_on(turns)

    def _reset_prefix_cache(self) -> None:
        is_done = self.driver.kv.scheduler.reset_prefix_cache()
        if not self.driver.kv.scheduler.running and not self.driver.kv._in_flight:
            assert is_done, "parked KV blocks a reset of the prefix cache"

    # ---- what must hold ----------------------------------------------------------------------------------------

    @invariant()
    def every_group_is_in_one_place(self) -> None:
        store, caller = self.book.store, self.caller
        store.check()
        places = Counter([*caller.accepted, *caller.filtered])
        places.update(group.prompt.metadata["n"] for group in store.groups())
        if store.recovered is not None:
            recovered = {group.metadata["n"] for group in store.recovered.groups}
            assert all(caller.accepted.get(n) in (None, store.recovered.round_id) for n in recovered)
            places.update(recovered - caller.accepted.keys())
        expected = Counter(range(store.totals.cursor))
        assert places == expected, f"too often {places - expected}, missing {expected - places}"
        assert store.totals.num_submitted == store.totals.cursor
        assert store.totals.num_filtered == len(caller.filtered)
        for reason in caller.filtered.values():
            is_hooks = reason == "hook: no" or reason.startswith("on_boundary: appended")
            assert is_hooks or (reason, self.config.on_stale) == ("stale", "drop"), reason

    @invariant()
    def no_member_is_beyond_its_budget(self) -> None:
        for group in self.book.store.groups():
            for index, member in enumerate(group.members):
                if member is not None:
                    has_room_for = self.caller.prompts.capacity - len(group.prompt.token_ids)
                    budget = min(group.budget(index), has_room_for)
                    assert group.num_tokens(index) <= budget
                    is_at_boundary = bool(member.boundaries) and member.boundaries[-1].end == group.num_tokens(index)
                    is_stopped = member.finish_reason == "stop" or is_at_boundary
                    assert not member.ended_by_itself or is_stopped or group.num_tokens(index) == budget

    @invariant()
    def the_pool_is_sane(self) -> None:
        kv, pool = self.driver.kv, self.driver.kv.scheduler.kv_cache_manager.block_pool
        free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        assert len(set(free)) == len(free) == kv.num_free_blocks
        assert not any(pool.blocks[block_id].ref_cnt for block_id in free)
        if not kv.scheduler.running and not kv._in_flight:
            assert len(free) == self.driver.num_free_at_start, "blocks leaked"
        if (parking := kv.scheduler._kv._parking) is None:
            return
        unparked = [parking.lot.owns(block_id) for block_id in free]
        assert unparked == sorted(unparked), "a parked block is taken before a free one"
        for key in parking.lot:
            parked = parking.lot[key]
            (block_ids,) = parked.block_ids
            size = kv.model.block_size
            readable = block_ids[: -(-parked.num_tokens // size)]
            assert len(readable) * size >= parked.num_tokens > 0
            assert all(block_id in pool._reuse_watchers for block_id in readable), "nobody will say that it is lost"
            versions = [int(version) for version, *run in parked.versions.spans(parked.num_tokens) for _ in range(*run)]
            cells = [kv.model.blocks[readable[place // size]].get(place % size) for place in range(len(versions))]
            assert cells == list(zip(parked.token_ids, versions, strict=False)), f"parked KV of {key}"

    # ---- the end -----------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if sys.exception() is None and hasattr(self, "driver"):
                self._end()
        finally:
            if getattr(self, "temporary", None) is not None:
                self.book.close()
                self.temporary.cleanup()

    def _end(self) -> None:
        """Whatever happened before: what goes on ends, and nothing is left behind."""
        for _ in range(MAX_STEPS):
            if self.caller.run is not None and self.caller.is_stream:
                self.caller.leave(is_orderly=True)
            was_stuck = self._is_stuck()
            while self.hooks is not None and self.hooks.asked:
                self.hooks.answer(0, accept=True)
            self._turn()
            if self.caller.run is None:
                break
            assert not (was_stuck and self._is_stuck()), "a round waits for nothing"
        assert self.caller.run is None, "a round does not end"
        for _ in range(MAX_STEPS):
            self._run_commands()
            self.driver.step()
            if self.driver.is_idle:
                break
        assert self.driver.is_idle, "requests do not end"
        self.every_group_is_in_one_place()
        self.the_pool_is_sane()
        counters = self.driver.rpc("counters")
        assert counters["live_members"] == counters["live_rounds"] == counters["running"] == counters["waiting"] == 0
        self._only_what_goes_on_is_parked()
        self._reset_prefix_cache()
        assert self.driver.rpc("counters")["parked_trajectories"] == 0
        assert self.driver.kv.num_free_blocks == self.driver.num_free_at_start
        self.caller.seen["parked tokens lost"] += counters["parked_lost_tokens"]
        self.caller.seen.update(self.driver.seen)
        type(self).seen.update(self.caller.seen)

    def _is_stuck(self) -> bool:
        is_asked = self.hooks is not None and bool(self.hooks.asked)
        return self.caller.is_waiting and self.driver.is_idle and not is_asked

    def _only_what_goes_on_is_parked(self) -> None:
        if (parking := self.driver.kv.scheduler._kv._parking) is not None:
            # Members that are unborn may need what others have that ended.
            carried = self.book.store.carried.values()
            going_on = {
                group.park_key(index)
                for group in carried
                for index in (group.unfinished if group.sampling.tree is None else range(len(group.members)))
            }
            assert set(parking.lot) <= going_on


class SyncMachine(CarryMachine):
    pass


class AsyncMachine(CarryMachine):
    is_async = True


class SyncUncachedMachine(CarryMachine):
    has_cache = False


class AsyncUncachedMachine(CarryMachine):
    is_async = True
    has_cache = False


MACHINES = [SyncMachine, AsyncMachine, SyncUncachedMachine, AsyncUncachedMachine]
SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=80,
    stateful_step_count=60,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module", autouse=True)
def _model_dir(tmp_path_factory: pytest.TempPathFactory) -> None:
    CarryMachine.folder = scheduler_harness.write_model_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    set_constants(monkeypatch.setattr)


def set_constants(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Nothing depends on the time, and what is rare happens."""
    set_attribute(group_store, "_FLUSH_INTERVAL_S", float("inf"))
    set_attribute(journal, "MIN_COMPACT_BYTES", 1 << 14)
    set_attribute(waves, "_MAX_WAVE_GROUPS", 5)


@pytest.mark.parametrize("machine", MACHINES)
def test_rounds_carry_over(machine: type[CarryMachine]) -> None:
    machine.seen = Counter()
    run_state_machine_as_test(machine, settings=SETTINGS)


def test_everything_happened() -> None:
    """The machines above were not idle."""
    if not all(hasattr(machine, "seen") for machine in MACHINES):
        pytest.skip("after all of them")
    seen = sum((machine.seen for machine in MACHINES), Counter())
    assert all(seen[what] > 0 for what in MUST_HAPPEN), seen


def _do_nothing(*_: object, **__: object) -> None:
    """A mutation."""


MUTATIONS = {
    "parked KV ignores that its blocks are gone": (ParkingLot, "lose", _do_nothing),
    "older KV stays in the prefix cache": (PrefixCacheGate, "withdraw_all", _do_nothing),
    "a weight change is not noted": (Member, "change_weights", _do_nothing),
    "no token is too stale": (StalenessBound, "exceeded", lambda *_: False),
    "banked groups are lost": (GroupStore, "bank", lambda self, serial, *_: self.carried.pop(serial)),
    "nothing is on the disk": (GroupStore, "flush", _do_nothing),
    "answers of hooks are lost": (Inbox, "post", _do_nothing),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_machines_notice(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls."""
    target, name, value = MUTATIONS[mutation]
    monkeypatch.setattr(target, name, value)
    SyncMachine.seen = Counter()
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(SyncMachine, settings=settings(SETTINGS, max_examples=400, phases=[Phase.generate]))
