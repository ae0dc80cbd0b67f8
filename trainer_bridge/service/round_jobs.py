"""Runs rounds and streams on the engine, and puts what they return into the outbox.

Two threads: one for rounds that carry over and streams, of which an engine runs one at a time, and one for rounds of
their own, such as evaluations. Both wait while the outbox has no room, so that a trainer that acknowledges nothing
stops the engine, and not before its round is kept.

Exactly once. The engine gives its last round again after a crash, and a stream its last group. A round is in the
outbox with its id before the next one begins, and a group before the engine hears that it was taken; what comes a
second time is known by its id and left out. A round whose delivery can't be written is held, and tried again. When the
patience for that ends nothing more begins: the engine would take the next round for a sign that it has this one.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from msgspec.structs import replace

from longtail.engine.errors import InvalidInputError
from longtail.engine.journal import JournalError
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Group, Round, RoundStats
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.service.engine_port import Engine, RunningStream
from longtail.trainer_bridge.service.outbox import Outbox
from longtail.trainer_bridge.service.prompt_log import PromptLog
from longtail.trainer_bridge.service.refusals import Refusal, round_failed

#: Rounds that wait for the one that runs, of each kind.
MAX_QUEUED = 16
MAX_ID_CHARS = 160

_RETRY_S = 0.5

_logger = logging.getLogger("longtail.trainer_bridge.service.round_jobs")


class RoundCancelled(Refusal):
    """Somebody asked for the end of a round."""

    def __init__(self) -> None:
        super().__init__("cancelled", "the round was cancelled")


class _Closing(Exception):
    """The service ends; the round is to be asked for again."""


@dataclass(eq=False, slots=True)
class _Job:
    request: wire.StartRound
    prompts: bytes | None  # as MessagePack
    is_running: bool = False
    is_cancelled: bool = False
    interrupt: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def round_id(self) -> str:
        return self.request.round_id

    @property
    def is_stream(self) -> bool:
        return self.request.carry and self.request.target_groups is None


class RoundJobs:
    """See the module.

    Args:
        engine: runs the rounds.
        outbox: takes what they return.
        prompts: what rounds that carry over draw on.
        tell: called with messages for the trainer, and their third frame; in any thread, must not block.
        changed: called when there are deliveries to send, or rounds begin or cease to wait; the same holds.
        fail: called when nothing more can be kept, so that the service has to end.
        store_patience_s: for how long a delivery that can't be written is tried.
        max_prompt_bytes: of the prompts of rounds of their own that run or wait, as MessagePack.

    Attributes:
        throttled_s: for how long rounds had to wait for room, all in all.
        num_output_tokens: in groups that were delivered.
        trouble: why a delivery can't be written now.

    """

    def __init__(
        self,
        engine: Engine,
        outbox: Outbox,
        prompts: PromptLog,
        *,
        tell: Callable[[wire.Message, bytes | None], None],
        changed: Callable[[], None],
        fail: Callable[[Exception], None],
        store_patience_s: float = 60.0,
        max_prompt_bytes: int = 1 << 28,
    ) -> None:
        self.num_output_tokens = 0
        self.trouble: str | None = None
        self._engine = engine
        self._outbox = outbox
        self._prompts = prompts
        self._tell = tell
        self._changed = changed
        self._fail = fail
        self._store_patience_s = store_patience_s
        self._max_prompt_bytes = max_prompt_bytes
        self._lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        self._closing = threading.Event()
        self._death: Exception | None = None
        self._throttled_s = 0.0
        self._throttled_since: dict[int, float] = {}
        self._queues: list[queue.SimpleQueue[_Job | None]] = [queue.SimpleQueue(), queue.SimpleQueue()]
        self._threads = [
            threading.Thread(target=self._work, args=(jobs,), name=f"longtail-bridge-{name}", daemon=True)
            for jobs, name in zip(self._queues, ("rounds", "evaluations"), strict=True)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_jobs(self) -> int:
        """Rounds that run or wait."""
        return len(self._jobs)

    @property
    def is_throttled(self) -> bool:
        """A round or a stream waits for room."""
        return bool(self._throttled_since)

    @property
    def throttled_s(self) -> float:
        """See the class."""
        now = time.monotonic()
        return self._throttled_s + sum(now - since for since in list(self._throttled_since.values()))

    def start(
        self, request: wire.StartRound, prompts: list[Prompt] | None
    ) -> Literal["started", "queued", "running", "done"]:
        """Run a round, unless one of this id runs or was delivered.

        Args:
            request: what to run.
            prompts: of a round that does not carry over.

        Raises:
            Refusal: the engine can't run it, too many wait, or the service ends.

        """
        self._check(request)
        if self._outbox.is_taken(request.round_id):
            return "done"
        encoded = None if prompts is None else wire.encode_payload(prompts)
        with self._lock:
            # One that was cancelled and has not ended yet makes room for the next of its id.
            if (known := self._jobs.get(request.round_id)) is not None and not known.is_cancelled:
                return "running" if known.is_running else "queued"
            if self._death is not None or self._closing.is_set():
                raise self._death or Refusal("session", "the service ends: say hello to the next one")
            ahead = sum(job.request.carry == request.carry for job in self._jobs.values())
            if ahead > MAX_QUEUED:
                raise Refusal("busy", f"{ahead} rounds run or wait", field="round_id", got=request.round_id)
            if encoded is not None:
                left = self._max_prompt_bytes - sum(len(job.prompts or b"") for job in self._jobs.values())
                if len(encoded) > left:
                    what = f"at most {left} bytes more before other rounds have ended"
                    raise Refusal("full", "no room for prompts", field="prompts", expected=what, got=len(encoded))
            self._jobs[request.round_id] = job = _Job(request, encoded)
            self._queues[0 if request.carry else 1].put(job)
        return "queued" if ahead else "started"

    def cancel(self, round_id: str) -> bool:
        """End a round or a stream. False if none of this id runs or waits."""
        with self._lock:
            if (job := self._jobs.get(round_id)) is None:
                return False
            self._interrupt(job)
        self._outbox.wake()
        return True

    def end(self, cause: Exception) -> None:
        """The engine is dead: what waits fails with `cause`, as does what comes."""
        self._death = cause
        self._outbox.wake()

    def close(self, timeout_s: float = 40.0) -> bool:
        """End everything, without a word to the trainer, who is to ask again; whether it ended in time."""
        self._closing.set()
        with self._lock:
            for jobs in self._queues:
                jobs.put(None)
            for job in self._jobs.values():
                self._interrupt(job)
        self._outbox.wake()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _check(self, request: wire.StartRound) -> None:
        if not 0 < len(request.round_id) <= MAX_ID_CHARS:
            raise InvalidInputError("round_id", f"1 to {MAX_ID_CHARS} characters", request.round_id)
        if request.carry and self._engine.config.carry is None:
            raise Refusal(
                "unsupported", "this engine does not carry groups over", field="carry", expected="false", got=True
            )
        if not request.carry and request.target_groups is None and request.num_groups:
            raise Refusal("invalid", "a stream carries groups over", field="carry", expected="true", got=False)

    def _interrupt(self, job: _Job) -> None:
        job.is_cancelled = True
        if job.interrupt is not None:
            job.interrupt()

    # ---- in the threads of the rounds --------------------------------------------------------------------------

    def _work(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        while (job := jobs.get()) is not None:
            failure: wire.RoundFailed | None = None
            try:
                job.is_running = True
                self._run(job)
            except _Closing:
                pass
            except Exception as error:
                if not isinstance(error, (Refusal, InvalidInputError)):
                    _logger.warning("round %s failed", job.round_id, exc_info=True)
                failure = round_failed(error, job.round_id)
            with self._lock:
                if self._jobs.get(job.round_id) is job:
                    # Told before it may be started again, so that nobody takes it for the failure of the next one.
                    if failure is not None and not self._closing.is_set():
                        self._tell(failure, None)
                    del self._jobs[job.round_id]

    def _run(self, job: _Job) -> None:
        try:
            self._run_until_kept(job)
        except RoundCancelled:
            if not job.is_stream:
                raise
            self._keep_end(job, _end_of_stream(job.round_id, 0, 0, 0.0))  # before its first group

    def _run_until_kept(self, job: _Job) -> None:
        while not self._outbox.is_taken(job.round_id):
            self._wait_for_room(job)
            if job.is_stream and self._engine.round_to_give_again is None:
                self._run_stream(job)
                return
            # A round that the engine gives again comes first, under its own id.
            self._keep_round(self._collect(job))
            self._prompts.forget(self._engine.num_prompts_used)

    def _collect(self, job: _Job) -> Round:
        request = job.request
        stream = self._engine.stream_trajectories(
            self._prompts if job.prompts is None else wire.decode_prompts(job.prompts),
            group_size=request.group_size,
            target_groups=1 if job.is_stream else request.target_groups,
            over_provision=request.over_provision,
            sampling=request.sampling,
            round_id=request.round_id,
            carry=request.carry,
        )
        try:
            self._allow_interrupt(job, lambda: stream.interrupt(RoundCancelled()))
            for trajectory in stream:
                if request.preview:
                    payload = wire.encode_payload(trajectory)
                    self._tell(wire.Preview(round_id=request.round_id, num_bytes=len(payload)), payload)
            return stream.round
        except RoundCancelled:
            self._check_cancelled(job)
            raise
        finally:
            self._allow_interrupt(job, None)
            stream.close()

    def _run_stream(self, job: _Job) -> None:
        request = job.request
        stream = self._engine.stream(
            self._prompts, group_size=request.group_size, num_groups=request.num_groups, sampling=request.sampling
        )
        self._allow_interrupt(job, stream.stop)
        try:
            counts = self._drain(job, stream)
        finally:
            self._allow_interrupt(job, None)
        if self._closing.is_set():
            raise _Closing
        self._keep_end(job, counts)

    def _keep_end(self, job: _Job, counts: Round) -> None:
        payload = wire.encode_payload(counts)
        self._keep(lambda: self._outbox.put_round(job.round_id, [], payload))

    def _drain(self, job: _Job, stream: RunningStream) -> Round:
        """Keep the groups of a stream until it ends or is to end; a round that says how much that was."""
        started, num_groups, num_tokens = time.monotonic(), 0, 0
        while True:
            try:
                self._wait_for_room(job)
            except (RoundCancelled, _Closing):
                stream.close()
                break
            # Asking for the next one tells the engine that the last one was taken.
            if (group := next(stream, None)) is None:
                break
            if self._is_new(group):
                put = partial(self._outbox.put_group, job.round_id, _encoded(group), group_key(group))
                self._keep(put)
                num_groups += 1
                num_tokens += self._count(group)
            self._prompts.forget(self._engine.num_prompts_used)
        return _end_of_stream(job.round_id, num_groups, num_tokens, time.monotonic() - started)

    def _keep_round(self, round_: Round) -> None:
        is_own = round_.carry is None
        groups = [group for group in round_.groups if is_own or self._is_new(group)]
        payloads = [_encoded(group) for group in groups]
        end = wire.encode_payload(_without_groups(round_))
        if self._keep(lambda: self._outbox.put_round(round_.round_id, payloads, end, is_own=is_own)):
            for group in groups:
                self._count(group)

    def _is_new(self, group: Group) -> bool:
        """Not one that a stream had given when the process died; others may have come since."""
        key = group_key(group)
        return key is None or not self._outbox.is_group_taken(key)

    def _keep(self, put: Callable[[], bool | None]) -> bool:
        """Write, and write again while the disk is full, say. What `put` returned."""
        deadline = time.monotonic() + self._store_patience_s
        try:
            while True:
                try:
                    return bool(put())
                except JournalError as error:
                    self.trouble = str(error)
                    # Of what is not kept, the engine's journal gives the next process what it has.
                    if self._closing.is_set():
                        raise _Closing from error
                    if time.monotonic() > deadline:
                        with self._lock:
                            self._closing.set()  # no round begins, or the engine would forget this one
                        self._fail(error)
                        raise _Closing from error
                    _logger.warning("a delivery waits: %s", error)
                self._closing.wait(_RETRY_S)
        finally:
            self.trouble = None
            self._changed()

    def _count(self, group: Group) -> int:
        num_tokens = sum(len(trajectory.output_token_ids) for trajectory in group.trajectories)
        with self._lock:
            self.num_output_tokens += num_tokens
        return num_tokens

    def _wait_for_room(self, job: _Job) -> None:
        if not self._outbox.has_room:
            me = threading.get_ident()
            _logger.warning(
                "round %s waits: %d deliveries are not acknowledged", job.round_id, self._outbox.num_unacked
            )
            self._throttled_since[me] = time.monotonic()
            self._changed()
            try:
                self._outbox.wait_for_room(lambda: job.is_cancelled or self._death is not None)
            finally:
                with self._lock:
                    self._throttled_s += time.monotonic() - self._throttled_since.pop(me)
        self._check_cancelled(job)

    def _allow_interrupt(self, job: _Job, interrupt: Callable[[], None] | None) -> None:
        """From now on a cancellation calls `interrupt`; one that came before does now."""
        with self._lock:
            job.interrupt = interrupt
            if job.is_cancelled and interrupt is not None:
                interrupt()

    def _check_cancelled(self, job: _Job) -> None:
        if self._closing.is_set():
            raise _Closing
        if job.is_cancelled:
            raise RoundCancelled
        if self._death is not None:
            raise self._death


def group_key(group: Group) -> str | None:
    """What a group is called for good, whichever round it is returned in: `ROUND/SERIAL`; `None` without members."""
    for trajectory in group.trajectories:
        return trajectory.trajectory_id.rpartition("/")[0].rpartition(".")[0] or None
    return None


def _encoded(group: Group) -> bytes:
    """A group; metadata that a hook has made unsendable is left out, because the tokens matter more."""
    try:
        return wire.encode_payload(group)
    except (TypeError, ValueError, OverflowError):
        _logger.exception("metadata of group %s can't be sent, and is left out", group.group_id)
        members = [replace(trajectory, metadata={}) for trajectory in group.trajectories]
        return wire.encode_payload(replace(group, trajectories=members, metadata={}))


def _without_groups(round_: Round) -> Round:
    return replace(round_, groups=[])


def _end_of_stream(round_id: str, num_groups: int, num_tokens: int, seconds: float) -> Round:
    stats = RoundStats(
        num_submitted_groups=num_groups, num_complete_groups=num_groups, num_cut_groups=0, num_failed_groups=0,
        num_cut_members=0, num_output_tokens=num_tokens, num_kept_tokens=num_tokens, num_scheduled_tokens=0,
        num_recomputed_tokens=0, num_steps=0, idle_slot_steps=0, peak_running=0, seconds=seconds,
    )  # fmt: skip
    return Round(round_id=round_id, target_groups=num_groups, groups=[], stats=stats)
