"""Does what takes longer than the thread of the socket may take: one request after the other, in their order.

Prompts are tokenised and written, acknowledgements written, rounds handed on once their prompts are read. Order
matters: a round that was asked for after prompts finds them. What waits is bounded in number and in bytes. A journal
that takes nothing more ends the service: only the next one can open it anew.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longtail.engine.errors import InvalidInputError
from longtail.engine.journal import JournalError
from longtail.engine.prompts import Prompt, tokenize_prompts
from longtail.scheduler.errors import LongtailError
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.service.engine_port import Engine
from longtail.trainer_bridge.service.outbox import Outbox
from longtail.trainer_bridge.service.prompt_log import PromptLog
from longtail.trainer_bridge.service.refusals import Refusal, refused
from longtail.trainer_bridge.service.round_jobs import RoundJobs

MAX_WAITING = 1024
MAX_WAITING_BYTES = 2 * wire.MAX_PROMPTS_BYTES
MAX_GROUP_SIZE = 1 << 16

_logger = logging.getLogger("longtail.trainer_bridge.service.clerk")

Request = wire.AppendPrompts | wire.StartRound | wire.CancelRound | wire.Ack
#: Called with an answer and whom it is for; in the clerk's thread, must not block.
Answer = Callable[[bytes, wire.Message], None]


@dataclass(frozen=True, slots=True)
class _Forget:
    """A consumer said in its hello what it has."""

    seq: int


class Clerk:
    """See the module."""

    def __init__(
        self,
        engine: Engine,
        outbox: Outbox,
        prompts: PromptLog,
        rounds: RoundJobs,
        answer: Answer,
        fail: Callable[[Exception], None],
    ) -> None:
        self._engine = engine
        self._outbox = outbox
        self._prompts = prompts
        self._rounds = rounds
        self._answer = answer
        self._fail = fail
        self._lock = threading.Lock()
        self._num_waiting = 0
        self._num_bytes = 0
        self._requests: queue.SimpleQueue[tuple[bytes, Request | _Forget, memoryview] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="longtail-bridge-clerk", daemon=True)
        self._thread.start()

    def take(self, sender: bytes, request: Request, payload: memoryview) -> None:
        """Do this next; the answer goes to `sender`.

        Raises:
            Refusal: too much waits.

        """
        with self._lock:
            if self._num_waiting >= MAX_WAITING or self._num_bytes + payload.nbytes > MAX_WAITING_BYTES:
                raise Refusal("full", f"{self._num_waiting} requests wait, {self._num_bytes} bytes")
            self._num_waiting += 1
            self._num_bytes += payload.nbytes
        self._requests.put((sender, request, payload))

    def forget(self, seq: int) -> None:
        """Deliveries up to `seq` are done with, as a hello said."""
        with self._lock:
            self._num_waiting += 1
        self._requests.put((b"", _Forget(seq), memoryview(b"")))

    def close(self, timeout_s: float = 10.0) -> bool:
        """Do what waits, then end; whether it ended in time."""
        self._requests.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (item := self._requests.get()) is not None:
            sender, request, payload = item
            reply_to = getattr(request, "request_id", None)
            broken: JournalError | None = None
            try:
                answer: wire.Message | None = self._do(request, payload)
            except LongtailError as error:
                answer = refused(error, reply_to)
                broken = error if isinstance(error, JournalError) and error.is_broken else None
            except Exception as error:
                _logger.exception("a request failed; this is a bug")
                answer = refused(error, reply_to)
            with self._lock:
                self._num_waiting -= 1
                self._num_bytes -= payload.nbytes
            if answer is not None and sender:
                self._answer(sender, answer)
            if broken is not None:
                self._fail(broken)
            del item, request, payload  # a large frame must not live until the next request

    def _do(self, request: Request | _Forget, payload: memoryview) -> wire.Message | None:
        match request:
            case wire.AppendPrompts():
                return self._append(request, payload)
            case wire.StartRound():
                return self._start(request, payload)
            case wire.CancelRound():
                note = "" if self._rounds.cancel(request.round_id) else "no such round runs"
                return wire.Done(reply_to=request.request_id, note=note)
            case wire.Ack():
                note = "" if self._outbox.ack(request.seq) else "acknowledged before"
                return wire.Done(reply_to=request.request_id, note=note)
            case _Forget():
                self._outbox.ack(request.seq)
                return None

    def _append(self, request: wire.AppendPrompts, payload: memoryview) -> wire.PromptsAppended:
        if request.first < 0:
            raise InvalidInputError("first", "a position from 0", request.first)
        prompts = self._tokenized(payload, request.group_size, request.first)
        self._prompts.forget(self._engine.num_prompts_used)
        num_known = self._prompts.append(prompts, request.first)
        return wire.PromptsAppended(reply_to=request.request_id, num_prompts=len(self._prompts), num_known=num_known)

    def _start(self, request: wire.StartRound, payload: memoryview) -> wire.RoundAccepted:
        if request.carry and request.num_bytes:
            raise InvalidInputError("num_bytes", "0: a round that carries over has the prompts that were appended", 1)
        prompts = None if request.carry else self._tokenized(payload, request.group_size, 0)
        state = self._rounds.start(request, prompts)
        return wire.RoundAccepted(reply_to=request.request_id, round_id=request.round_id, state=state)

    def _tokenized(self, payload: memoryview, group_size: int, first: int) -> list[Prompt]:
        """The prompts of a third frame with their token ids, whatever they were."""
        if not 1 <= group_size <= MAX_GROUP_SIZE:
            raise InvalidInputError("group_size", f"an integer in [1, {MAX_GROUP_SIZE}]", group_size)
        prompts: Sequence[Prompt] = wire.decode_prompts(payload) if payload.nbytes else []
        checked = tokenize_prompts(prompts, group_size, self._engine.tokenizer, self._engine.limits, first=first)
        return [
            Prompt(
                token_ids=tokens.token_ids,
                group_id=prompt.group_id,
                max_tokens=prompt.max_tokens,
                seed=prompt.seed,
                metadata=prompt.metadata,
            )
            for prompt, tokens in zip(prompts, checked, strict=True)
        ]
