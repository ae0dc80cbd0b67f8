"""One engine of a simulated fleet: slots, a step-time model, and members that run from event to event.

An event is the step in which a member ends. Between two events the batch is constant and its context grows by one
token a member and step, so the time of k steps is a quadratic in k, and an event costs a few heap operations however
many tokens lie before it. `round_simulator.py` says what is left out.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.kv_policy import KvPolicy
from longtail.scheduler.staleness import Span


@dataclass(frozen=True, slots=True)
class StepModel:
    """Seconds of a step: `a_s + b_s * batch + c_s * context_tokens + prefill_s_per_token * prefill_tokens`.

    `batch` is the members that get a token in it, `context_tokens` all their tokens before it, prompts and those that
    are prefilled in this very step included; `prefill_tokens` are what it computes besides the new tokens.
    """

    a_s: float
    b_s: float
    c_s: float
    prefill_s_per_token: float

    def __post_init__(self) -> None:
        for name in ("a_s", "b_s", "c_s", "prefill_s_per_token"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise InvalidInputError(name, "a finite number >= 0", value)
        if self.a_s + self.b_s <= 0:
            raise InvalidInputError("a_s", "a_s + b_s > 0: a step takes time", self.a_s)

    def seconds(self, num_steps: int, batch: int, context_tokens: int, prefill_tokens: int) -> float:
        """Of `num_steps` steps of a constant batch, the prefill in the first."""
        growth = batch * (num_steps * (num_steps - 1) // 2)
        per_step = self.a_s + self.b_s * batch + self.c_s * context_tokens
        return num_steps * per_step + self.c_s * growth + self.prefill_s_per_token * prefill_tokens


def fit_step_model(
    batch: Sequence[float],
    context_tokens: Sequence[float],
    prefill_tokens: Sequence[float],
    seconds: Sequence[float],
) -> StepModel:
    """The model with the least squared error over measured steps, no coefficient negative.

    A coefficient whose column is all zeros, or does not vary apart from another's, comes out as 0.
    """
    from scipy.optimize import nnls  # type: ignore[import-untyped, unused-ignore]

    columns = [np.ones(len(seconds)), *(np.asarray(c, dtype=float) for c in (batch, context_tokens, prefill_tokens))]
    if len(seconds) < 4 or any(len(column) != len(seconds) for column in columns):
        raise InvalidInputError("samples", "four arrays of one length, at least 4 steps", [len(c) for c in columns])
    table = np.stack(columns, axis=1)
    scale = np.maximum(np.abs(table).max(axis=0), 1e-300)  # columns differ by six orders of magnitude
    fitted, _ = nnls(table / scale, np.asarray(seconds, dtype=float))
    a_s, b_s, c_s, prefill_s = (float(value) for value in fitted / scale)
    return StepModel(a_s, b_s, c_s, prefill_s)


@dataclass(slots=True, eq=False)
class SimGroup:
    """A group of the simulation; all its members live on one engine, whose prefix cache has its prompt's KV.

    `prompt_version` is that KV's; `None` when there is none. `born_round` is the round that its first tokens are of.
    """

    serial: int
    born_round: int
    members: list[Member] = field(default_factory=list)
    num_left: int = 0
    engine: int = -1
    prompt_version: int | None = None

    def begin(self, lengths: Iterable[int]) -> None:
        """(Re)start it with members of these lengths and no tokens."""
        self.members = [Member(self, length) for length in lengths]
        self.num_left = len(self.members)

    @property
    def num_tokens(self) -> int:
        """Output tokens that its members have so far."""
        return sum(member.done for member in self.members)

    def spans(self) -> Iterable[Span]:
        """The version spans of all its members."""
        return (span for member in self.members for span in member.spans)


@dataclass(slots=True, eq=False)
class Member:
    """A trajectory: `done` of `length` output tokens exist, in `spans` by version.

    Attributes:
        kv_version: the oldest version of its KV; `None` when there is no KV.

    """

    group: SimGroup
    length: int
    done: int = 0
    kv_version: int | None = None
    spans: list[Span] = field(default_factory=list)

    def extend(self, done: int, version: int) -> None:
        """Tokens up to `done` were sampled under `version`."""
        if done > self.done:
            self.spans.append((version, self.done, done))
            self.done = done


class SimEngine:
    """`max_num_seqs` slots that step together; waiting members enter in order when a slot is free.

    Args:
        shared_tokens: of a prompt, those that only the first of a group's members computes under a version.

    Attributes:
        now_s: end of the last step that counts, in seconds since the round began.
        next_s: end of the step in which the next member ends; infinite when nobody runs.
        slot_s: seconds that members spent in slots; `peak_running` most members at once; `peak_tokens` most
            tokens of running members at once; `prefill_tokens` and, of those, `reprefill_tokens` that had been
            computed before under older weights.

    """

    def __init__(
        self, step: StepModel, max_num_seqs: int, prompt_tokens: int, shared_tokens: int, kv_policy: KvPolicy
    ) -> None:
        self._step = step
        self._max_num_seqs = max_num_seqs
        self._prompt_tokens = prompt_tokens
        self._shared_tokens = shared_tokens
        self._kv_policy = kv_policy
        self.begin((), 0)

    def begin(self, members: Iterable[Member], version: int) -> None:
        """Start a round at time 0 with these members, first to admit first."""
        self._version = version
        self._waiting = deque(members)
        self._running: list[tuple[int, int, Member]] = []  # heap of (step after which it has ended, tie, member)
        self._num_admitted = self._steps_done = self._context = 0
        self.now_s = self.slot_s = 0.0
        self.peak_running = self.peak_tokens = 0
        self.prefill_tokens = self.reprefill_tokens = 0
        self._enter_phase()

    def advance(self) -> list[Member]:
        """Go to `next_s`; the members that end there."""
        return self._step_on(self._running[0][0] - self._steps_done, self.next_s)

    def stop(self, cut_s: float) -> list[Member]:
        """The step that `cut_s` falls in is the last; the members that end in it. All others keep their tokens."""
        ended: list[Member] = []
        if self.now_s < cut_s and self._running:
            most = self._running[0][0] - self._steps_done
            num_steps = 1 + bisect_left(range(1, most), cut_s, key=self._time_after)
            ended = self._step_on(num_steps, self._time_after(num_steps))
        for end_step, _, member in self._running:
            # One that was admitted at this very boundary has no token yet.
            member.extend(member.length - (end_step - self._steps_done), self._version)
        return ended

    def _time_after(self, num_steps: int) -> float:
        return self.now_s + self._step.seconds(num_steps, len(self._running), self._context, self._new_prefill)

    def _step_on(self, num_steps: int, end_s: float) -> list[Member]:
        for member, num_tokens in self._prefills:
            self._prefill(member, num_tokens)
        batch = len(self._running)
        self._steps_done += num_steps
        self._context += num_steps * batch
        self.peak_running = max(self.peak_running, batch)
        self.peak_tokens = max(self.peak_tokens, self._context)
        self.slot_s += batch * (end_s - self.now_s)
        self.now_s = end_s
        ended = []
        while self._running and self._running[0][0] == self._steps_done:
            member = heapq.heappop(self._running)[2]
            member.extend(member.length, self._version)
            self._context -= self._prompt_tokens + member.length
            ended.append(member)
        self._enter_phase()
        return ended

    def _enter_phase(self) -> None:
        """Fill the slots, and find the next event. Who enters has no KV before its first step: a cut may come first."""
        self._new_prefill = 0
        self._prefills: list[tuple[Member, int]] = []
        prompts: set[SimGroup] = set()
        while self._waiting and len(self._running) < self._max_num_seqs:
            member = self._waiting.popleft()
            self._num_admitted += 1
            self._context += self._prompt_tokens + member.done
            if not self._has_kv(member):
                num_tokens = self._prompt_tokens + member.done
                if member.group.prompt_version == self._version or member.group in prompts:
                    num_tokens -= self._shared_tokens
                prompts.add(member.group)
                self._prefills.append((member, num_tokens))
                self._new_prefill += num_tokens
            end_step = self._steps_done + member.length - member.done
            heapq.heappush(self._running, (end_step, self._num_admitted, member))
        self.next_s = self._time_after(self._running[0][0] - self._steps_done) if self._running else math.inf

    def _has_kv(self, member: Member) -> bool:
        return member.kv_version is not None and self._kv_policy.keeps([member.kv_version], self._version)

    def _prefill(self, member: Member, num_tokens: int) -> None:
        self.prefill_tokens += num_tokens
        if member.kv_version is not None:
            self.reprefill_tokens += num_tokens
        member.kv_version = member.group.prompt_version = self._version
