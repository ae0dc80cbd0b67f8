"""A `RolloutEngine` without a model: real rounds, groups and trajectories, made of their prompts, when a test says so.

`FakeMemory` is what the journal of a real engine would hold: an engine that is made with the memory of another goes on
as after a crash of that one, and gives again what nobody is known to have received.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from longtail.engine.carry_config import CarryConfig
from longtail.engine.config import EngineConfig, SamplingConfig
from longtail.engine.errors import EngineDeadError, InvalidInputError
from longtail.engine.prompts import PromptLimits, tokenize_prompts
from longtail.engine.trajectory import (
    CarryStats,
    Group,
    Round,
    RoundStats,
    Timings,
    TokenCounts,
    Trajectory,
    VersionSpan,
)

LIMITS = PromptLimits(vocab_size=512, max_model_len=256)
STEP_S = 0.002


@dataclass
class FakeMemory:
    cursor: int = 0
    num_groups: int = 0
    recovered: Round | None = None
    given: Group | None = None
    started: list[str] = field(default_factory=list)


class FakeRolloutEngine:
    """See the module.

    Attributes:
        may_finish: what a trajectory waits for before it ends; set by default.
        group_s: what a stream takes for a group.
        calls: what was started: `(kind, round_id)`.

    """

    def __init__(
        self,
        memory: FakeMemory | None = None,
        *,
        carry: bool = True,
        journal: str | None = "fake",
        weight_version: int = 0,
        num_tokens: int = 4,
        group_s: float = 0.0,
    ) -> None:
        self.memory = memory or FakeMemory()
        config = CarryConfig(journal=journal) if carry else None
        self.config = EngineConfig(model="fake", carry=config, weight_version=weight_version)
        self.tokenizer = None
        self.limits = LIMITS
        self.weight_version = weight_version
        self.num_tokens = num_tokens
        self.group_s = group_s
        self.may_finish = threading.Event()
        self.may_finish.set()
        self.calls: list[tuple[str, str | None]] = []
        self.updates: list[tuple[dict[str, Any], int]] = []
        self.may_repeat: list[bool] = []
        self.fail_with: Exception | None = None
        self.update_fails_with: Exception | None = None
        self.may_update = threading.Event()
        self.may_update.set()
        self._recovered = self.memory.recovered
        self._death: str | None = None
        self._running = 0
        self._lock = threading.Lock()
        self._carry_busy = False

    # ---- what a test does ----------------------------------------------------------------------------------------

    def die(self, cause: str = "process 7: signal 9, Killed") -> None:
        self._death = cause

    # ---- what a service sees -------------------------------------------------------------------------------------

    @property
    def num_in_flight(self) -> int:
        return self._running

    @property
    def num_prompts_used(self) -> int:
        return self.memory.cursor

    @property
    def round_to_give_again(self) -> str | None:
        return None if self._recovered is None else self._recovered.round_id

    def how_it_ended(self) -> str | None:
        return self._death

    def stream_trajectories(
        self,
        prompts: Any,
        *,
        group_size: int = 1,
        target_groups: int | None = None,
        over_provision: float | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        round_id: str | None = None,
        carry: bool = True,
        on_progress: Callable[[Any], None] | None = None,
    ) -> FakeRound:
        self._check()
        assert round_id is not None
        self.calls.append(("carry" if carry else "own", round_id))
        return FakeRound(self, prompts, group_size, target_groups, round_id, carry, sampling)

    def stream(
        self, prompts: Any, *, group_size: int = 1, num_groups: int = 64, sampling: SamplingConfig = SamplingConfig()
    ) -> FakeStream:
        self._check()
        if self._recovered is not None:
            raise InvalidInputError("stream", "rollout() first", self._recovered.round_id)
        self.calls.append(("stream", None))
        return FakeStream(self, prompts, group_size, sampling)

    def update_weights(self, update_info: Mapping[str, Any], version: int, *, may_repeat: bool = False) -> float:
        while not self.may_update.wait(STEP_S):
            self._check()
        self._check()
        if self.update_fails_with is not None:
            raise self.update_fails_with
        self.updates.append((dict(update_info), version))
        self.may_repeat.append(may_repeat)
        self.weight_version = version
        return 0.25

    def control_weights(
        self, op: str, info: Mapping[str, Any], version: int | None = None, *, may_repeat: bool = False
    ) -> None:
        if self.update_fails_with is not None:
            raise self.update_fails_with
        self.may_repeat.append(may_repeat)
        self.updates.append(({"op": op, **info}, version or 0))
        if op == "finish":
            self.weight_version = version or self.weight_version + 1

    def weights_checksum(self) -> str:
        return f"model-{self.weight_version}"

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._death is not None:
            raise EngineDeadError("rollout", self._death)
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise error

    def _claim(self, carry: bool) -> None:
        with self._lock:
            if carry and self._carry_busy:
                raise InvalidInputError("rollout", "one carrying round at a time", "a second")
            self._carry_busy = self._carry_busy or carry

    def _release(self, carry: bool) -> None:
        if carry:
            self._carry_busy = False

    def _group(self, prompt: Any, position: int, group_size: int, round_id: str, name: str) -> Group:
        (checked,) = tokenize_prompts([prompt], group_size, None, self.limits, first=position)
        members = []
        for index in range(group_size):
            tokens = [(sum(checked.token_ids) + index + i) % 512 for i in range(self.num_tokens)]
            members.append(
                Trajectory(
                    trajectory_id=f"{name}/{index}", round_id=round_id, group_id=checked.group_id, index=index,
                    prompt_token_ids=checked.token_ids, output_token_ids=tokens, logprobs=[-1.0] * len(tokens),
                    source_mask=[1] * len(tokens), finish_reason="stop", timings=Timings(submitted_s=0.0),
                    weight_versions=[VersionSpan(str(self.weight_version), 0, len(tokens))], tokens=TokenCounts(),
                    metadata=checked.metadata,
                )
            )  # fmt: skip
        return Group(group_id=checked.group_id, trajectories=members, complete=True)


class FakeRound:
    def __init__(
        self,
        engine: FakeRolloutEngine,
        prompts: Any,
        group_size: int,
        target_groups: int | None,
        round_id: str,
        carry: bool,
        sampling: SamplingConfig,
    ) -> None:
        self._engine = engine
        self._round_id = round_id
        self._carry = carry
        self._errors: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        self._has_ended = False
        self._round: Round | None = None
        memory = engine.memory
        engine._claim(carry)
        try:
            if carry and engine._recovered is not None:
                self._left: list[Trajectory] = []
                self._groups: list[Group] = []
                self._round = engine._recovered
                return
            first = memory.cursor if carry else 0
            count = len(prompts) - first if target_groups is None else min(target_groups, len(prompts) - first)
            if count <= 0:
                raise InvalidInputError("prompts", f"a prompt at position {first}", "no more prompts")
            if carry:
                memory.recovered = None
                memory.started.append(round_id)
            self._groups = []
            if carry and memory.given is not None:  # a stream's, which is banked still
                self._groups.append(memory.given)
                memory.given = None
                count -= 1
            for i in range(count):
                serial = memory.num_groups + i if carry else first + i
                name = f"{round_id}/{serial}.0" if carry else f"{round_id}/{serial}"
                self._groups.append(engine._group(prompts[first + i], first + i, group_size, round_id, name))
            self._num_fresh = count
            self._left = [trajectory for group in self._groups for trajectory in group.trajectories]
            engine._running += len(self._left)
        except BaseException:
            engine._release(carry)
            self._has_ended = True
            raise

    @property
    def round(self) -> Round:
        if self._round is None:
            raise RuntimeError("the round is there once its stream was read to the end")
        return self._round

    def __iter__(self) -> FakeRound:
        return self

    def __next__(self) -> Trajectory:
        try:
            while self._left:
                if not self._errors.empty():
                    raise self._errors.get()
                self._engine._check()
                if self._engine.may_finish.wait(STEP_S):
                    self._engine._running -= 1
                    return self._left.pop(0)
            if self._round is None:
                self._round = self._finish()
            if self._carry:
                self._engine._recovered = None
            self._end()
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def interrupt(self, error: Exception) -> None:
        self._errors.put(error)

    def close(self) -> None:
        if not self._has_ended:
            self._engine._running -= len(self._left)
            self._left = []
            self._end()

    def _finish(self) -> Round:
        memory = self._engine.memory
        round_ = fake_round(self._round_id, self._groups, carry=self._carry)
        if self._carry:
            memory.cursor += self._num_fresh
            memory.num_groups += self._num_fresh
            memory.recovered = self._engine._recovered = round_
        return round_

    def _end(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._engine._release(self._carry)


class FakeStream:
    def __init__(self, engine: FakeRolloutEngine, prompts: Any, group_size: int, sampling: SamplingConfig) -> None:
        self._engine = engine
        self._prompts = prompts
        self._group_size = group_size
        self._is_stopped = threading.Event()
        self._round_id = f"stream-{engine.memory.num_groups}"
        engine._claim(True)
        engine.memory.recovered = None
        self._has_ended = False
        self._first = True

    def __iter__(self) -> FakeStream:
        return self

    def __next__(self) -> Group:
        memory = self._engine.memory
        try:
            if self._first and memory.given is not None:
                self._first = False
                return memory.given
            self._first = False
            memory.given = None
            while not self._is_stopped.is_set():
                self._engine._check()
                if memory.cursor >= len(self._prompts):
                    break
                if self._engine.may_finish.wait(STEP_S):
                    time.sleep(self._engine.group_s)
                    name = f"{self._round_id}/{memory.num_groups}.0"
                    prompt = self._prompts[memory.cursor]
                    group = self._engine._group(prompt, memory.cursor, self._group_size, self._round_id, name)
                    memory.cursor += 1
                    memory.num_groups += 1
                    memory.given = group
                    return group
        except BaseException:
            self._end()
            raise
        self._end()
        raise StopIteration

    def stop(self) -> None:
        self._is_stopped.set()

    def close(self) -> None:
        if not self._has_ended:
            self._engine.memory.given = None
            self._end()

    def _end(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._engine._release(True)


def fake_round(round_id: str, groups: list[Group], *, carry: bool = True) -> Round:
    num_tokens = sum(len(t.output_token_ids) for group in groups for t in group.trajectories)
    stats = RoundStats(
        num_submitted_groups=len(groups), num_complete_groups=len(groups), num_cut_groups=0, num_failed_groups=0,
        num_cut_members=0, num_output_tokens=num_tokens, num_kept_tokens=num_tokens, num_scheduled_tokens=num_tokens,
        num_recomputed_tokens=0, num_steps=1, idle_slot_steps=0, peak_running=len(groups), seconds=0.1,
    )  # fmt: skip
    carried = CarryStats(
        version=0, num_carried_in=0, num_banked_in=0, num_fresh=len(groups), num_accepted=len(groups), num_filtered=0,
        num_banked=0, num_carried=0, num_judging=0, num_restarts=0, num_resumes=0, num_parked_tokens=0,
        num_reprefilled_tokens=0, filtered_reasons={}, staleness={}, num_masked_tokens=0, off_policy_share=0.0,
        mean_accepted_tokens=None, mean_all_tokens=None, length_bias=None,
    )  # fmt: skip
    return Round(
        round_id=round_id, target_groups=len(groups), groups=groups, stats=stats, carry=carried if carry else None
    )
