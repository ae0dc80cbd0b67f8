"""New weights: takes the messages of a push, and applies what was pushed in a thread of its own.

All methods but `close` belong to the thread of the socket, which a push's chunks come to and which must not wait for
the engine; the thread of this module has one thing to do at a time, and `post`s what comes of it back. While it
has a push (to prepare its base, or to apply it), nothing else touches the staging.

One push at a time. The outcome of the last one is remembered, because its answer may be lost with a connection and is
then asked for again. What still arrives of a push that is over was sent before its sender knew, and is passed over.

vLLM's own transfers have nobody to end them when the trainer goes between `start` and `finish`: the engine is paused
then, with weights of two versions, and `fail` is called.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from msgspec.structs import replace

from longtail.engine.errors import EngineTimeoutError, WeightsHookError
from longtail.scheduler.errors import LongtailError
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.service.engine_port import Engine, Staged, WeightStaging
from longtail.trainer_bridge.service.refusals import Refusal, refused

_logger = logging.getLogger("longtail.trainer_bridge.service.weight_jobs")

Send = Callable[[bytes, wire.Message], None]


@dataclass(slots=True)
class _Push:
    begun: wire.BeginWeights
    sender: bytes
    request_id: int
    ready: wire.WeightsReady
    is_held: bool = False  # by the other thread
    is_applying: bool = False
    is_dropped: bool = False
    num_bytes: int = 0
    started_s: float = field(default_factory=time.monotonic)


class WeightJobs:
    """See the module.

    Args:
        engine: gets the weights.
        staging: `None` where the engine can take none.
        send: a message to a client, in the socket's thread.
        post: run a function in the socket's thread; may be called in any.
        fail: called when nobody knows any more which weights the engine has, or it can't go on.
        weights_needed: see `wire.Welcome`.
        remember_version: makes durable that the engine has a version; called before its trainer hears of it.

    Attributes:
        weights_needed: `None` once they came.
        is_updating: the engine is being changed.
        num_pushes: that were applied, which took `push_s` from begin to end and paused the engine for `pause_s`.

    """

    def __init__(
        self,
        engine: Engine,
        staging: WeightStaging | None,
        *,
        send: Send,
        post: Callable[[Callable[[], None]], None],
        fail: Callable[[Exception], None],
        weights_needed: int | None = None,
        remember_version: Callable[[int], None] = lambda version: None,
    ) -> None:
        self.weights_needed = weights_needed
        self.is_updating = False
        self.num_pushes = 0
        self.num_refused = 0
        self.num_bytes = 0
        self.push_s = 0.0
        self.pause_s = 0.0
        self._engine = engine
        self._staging = staging
        self._send = send
        self._post = post
        self._fail = fail
        self._remember_version = remember_version
        self._push: _Push | None = None
        self._last: tuple[str, wire.Message] | None = None
        self._over: str | None = None
        self._num_tasks = 0
        self._is_transferring = False
        self._is_left = False
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="longtail-bridge-weights", daemon=True)
        self._thread.start()

    @property
    def ring(self) -> wire.RingSpec | None:
        """Shared memory for chunks."""
        return None if self._staging is None else self._staging.ring

    def close(self, timeout_s: float) -> bool:
        """Finish what is being applied; whether that ended in time."""
        self._tasks.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ---- messages ----------------------------------------------------------------------------------------------

    def begin(self, sender: bytes, message: wire.BeginWeights) -> None:
        """Begin a push; one that was not committed is forgotten for it.

        Raises:
            Refusal: something is being applied, or the engine takes no weights.
            Exception: what the staging refuses it for.

        """
        if self._staging is None:
            raise Refusal("unsupported", "this engine takes no weights")
        push = self._push
        if push is not None and push.begun.push_id == message.push_id and not push.is_applying:
            # It is asked again, perhaps over another connection.
            push.sender, push.request_id, push.is_dropped = sender, message.request_id, False
            if not push.is_held:
                self._send(sender, replace(push.ready, reply_to=message.request_id))
            return
        self._check_free()
        self.drop("another push began")
        sizes = self._staging.begin(message)
        ready = wire.WeightsReady(reply_to=0, push_id=message.push_id, **sizes)
        self._push = push = _Push(message, sender, message.request_id, ready, is_held=True)
        self._put(partial(self._prepare, push, self._staging))

    def tensor(self, message: wire.WeightsTensor) -> None:
        """A tensor of the push begins."""
        if (push := self._current(message.push_id)) is not None and self._staging is not None:
            with self._refusing(push):
                self._staging.tensor(message)

    def chunk(self, message: wire.WeightsChunk, payload: memoryview) -> None:
        """Bytes of the push."""
        if (push := self._current(message.push_id)) is not None and self._staging is not None:
            push.num_bytes += message.length
            with self._refusing(push):
                serial = self._staging.chunk(message, payload)
                if serial is not None:
                    self._send(push.sender, wire.WeightsCredit(push_id=message.push_id, serial=serial))

    def parts(self, message: wire.WeightsParts, payload: memoryview) -> None:
        """Several of them."""
        if (push := self._current(message.push_id)) is None:
            return
        with self._refusing(push):
            _check_parts(message)
        for part in message.parts:
            if isinstance(part, wire.WeightsTensor):
                self.tensor(part)
            else:
                self.chunk(part, payload if part.num_bytes else memoryview(b""))

    def commit(self, sender: bytes, message: wire.CommitWeights) -> None:
        """Apply the push, or say again what became of it.

        Raises:
            Refusal: there is no such push, or it is being prepared; that ends it.

        """
        if self._last is not None and self._last[0] == message.push_id:
            self._send(sender, replace(self._last[1], reply_to=message.request_id))
            return
        push = self._push
        if push is None or push.begun.push_id != message.push_id or self._staging is None:
            raise Refusal("gap", "no such push is under way", field="push_id", got=message.push_id)
        if push.is_held and not push.is_applying:
            push.is_dropped = True
            raise Refusal("gap", "the push is not ready yet", field="push_id", got=message.push_id)
        push.sender, push.request_id = sender, message.request_id
        if not push.is_held:
            push.is_held = push.is_applying = self.is_updating = True
            self._put(partial(self._apply, push, message, self._staging))

    def abort(self, message: wire.AbortWeights) -> None:
        """Forget a push, unless it is being applied; one of vLLM's own that has started can't be forgotten."""
        if self._push is None:
            self._is_left = True
            self._check_left()
        elif self._push.begun.push_id == message.push_id:
            self.drop("it was aborted", tell=False)

    def leave(self, why: str) -> None:
        """The trainer is gone, or has another connection: forget what it had under way."""
        self.drop(why, tell=False)
        self._is_left = True
        self._check_left()

    def drop(self, why: str, *, tell: bool = True) -> None:
        """Forget the push that is not committed, if there is one."""
        push = self._push
        if push is None or push.is_held:
            if push is not None:
                push.is_dropped = True  # where it is only being prepared
            return
        if tell:
            self._send(push.sender, refused(Refusal("gap", why), push_id=push.begun.push_id))
        self.num_refused += 1
        self._end()

    def control(self, sender: bytes, message: wire.ControlWeights) -> None:
        """A step of one of vLLM's own transfers.

        Raises:
            Refusal: something is being applied.

        """
        self._check_free()
        self.drop("vLLM's own transfer began")

        def step() -> wire.Message:
            may_repeat = self.weights_needed is not None
            try:
                self._engine.control_weights(message.op, dict(message.info), message.version, may_repeat=may_repeat)
            except EngineTimeoutError as error:
                self._fail(error)  # nobody knows what it does, or did
                raise
            if message.op == "finish":
                self._make_durable(self._engine.weight_version)
            return wire.Done(reply_to=message.request_id)

        def note(answer: wire.Message) -> None:
            # No step runs from start to finish, however long the trainer takes.
            if isinstance(answer, wire.Done) and message.op in ("start", "finish"):
                self._is_transferring = message.op == "start"
            self.is_updating = self._is_transferring
            if message.op == "finish" and isinstance(answer, wire.Done):
                self._note_version(message.version)
            self._check_left()

        self._is_left = False
        self.is_updating = self.is_updating or message.op != "init"
        self._do(sender, message.request_id, step, then=note)

    def checksum(self, sender: bytes, message: wire.AskChecksum) -> None:
        """Compute checksums of the running model.

        Raises:
            Refusal: something is being applied.

        """
        self._check_free()

        def ask() -> wire.Message:
            model = self._engine.weights_checksum()
            digest = None if self._staging is None else self._staging.digest
            return wire.Checksum(
                reply_to=message.request_id, version=self._engine.weight_version, digest=digest, model=model
            )

        self._do(sender, message.request_id, ask)

    def _put(self, task: Callable[[], None]) -> None:
        """Have the thread do something, at the end of which it posts a function that counts it as done."""
        self._num_tasks += 1
        self._tasks.put(task)

    def _check_free(self) -> None:
        if self._num_tasks:
            raise Refusal("busy", "the engine's weights are being changed or read")

    def _current(self, push_id: str) -> _Push | None:
        """The push that a message belongs to; its sender hears once that there is none."""
        push = self._push
        if push is not None and push.begun.push_id == push_id and not push.is_held:
            return push
        if push_id != self._over:
            self._over = push_id
            raise Refusal("gap", "no such push is under way", field="push_id", got=push_id)
        return None

    @contextlib.contextmanager
    def _refusing(self, push: _Push) -> Iterator[None]:
        """What the staging refuses in this block ends the push, and its sender is told."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, LongtailError):
                _logger.exception("the staging failed; this is a bug")
            self.num_refused += 1
            self._end()
            self._send(push.sender, refused(error, push_id=push.begun.push_id))

    def _end(self) -> None:
        if self._push is not None:
            self._over = self._push.begun.push_id
            self._push = None
            if self._staging is not None:
                self._staging.abort()

    # ---- in the thread of this module --------------------------------------------------------------------------

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _prepare(self, push: _Push, staging: WeightStaging) -> None:
        answer: wire.WeightsReady | wire.Refused = push.ready
        try:
            staging.prepare()
        except Exception as error:
            answer = refused(error, 0, push.begun.push_id)
        self._post(lambda: self._prepared(push, answer))

    def _apply(self, push: _Push, message: wire.CommitWeights, staging: WeightStaging) -> None:
        outcome: wire.Message
        pause_s = 0.0
        step: Literal["staged", "engine"] = "staged"
        try:
            staged = staging.commit(message)
            step = "engine"
            if staged.is_known:
                staging.abort()
            else:
                pause_s = self._update_engine(staged, push.begun.version)
                staging.applied()
                self._make_durable(push.begun.version)
        except Exception as error:
            outcome = refused(_as_refusal(error, step), message.request_id, push.begun.push_id)
            _logger.warning("push %s of version %d failed", push.begun.push_id, push.begun.version, exc_info=True)
            if isinstance(error, EngineTimeoutError):
                # It may read the weights still, or have them: nobody knows what it samples from.
                self._fail(error)
            else:
                _quietly(staging.abort)
        else:
            outcome = wire.WeightsApplied(
                reply_to=message.request_id,
                push_id=push.begun.push_id,
                version=push.begun.version,
                digest=message.digest,
                pause_s=pause_s,
                num_bytes_received=push.num_bytes,
            )
        self._post(lambda: self._applied(push, outcome, pause_s))

    def _make_durable(self, version: int) -> None:
        """So that the next service knows which weights its engine lacks; without that this one can't go on."""
        try:
            self._remember_version(version)
        except OSError as error:
            self._fail(error)

    def _update_engine(self, staged: Staged, version: int) -> float:
        """Returns the pause in seconds; a hook that fails afterwards changes nothing of it."""
        may_repeat = self.weights_needed is not None
        try:
            return self._engine.update_weights(staged.update_info, version, may_repeat=may_repeat)
        except WeightsHookError as error:
            _logger.warning("%s", error)
            return error.pause_s

    def _do(
        self,
        sender: bytes,
        request_id: int,
        function: Callable[[], wire.Message],
        *,
        then: Callable[[wire.Message], None] | None = None,
    ) -> None:
        """Answer a request with what `function` returns, after `then` was told of it in the socket's thread."""

        def task() -> None:
            try:
                answer = function()
            except Exception as error:
                answer = refused(_as_refusal(error, "engine"), request_id)
                _logger.warning("a request about weights failed", exc_info=True)

            def tell() -> None:
                self._num_tasks -= 1
                if then is not None:
                    then(answer)
                self._send(sender, answer)

            self._post(tell)

        self._put(task)

    # ---- in the socket's thread again --------------------------------------------------------------------------

    def _prepared(self, push: _Push, answer: wire.WeightsReady | wire.Refused) -> None:
        self._num_tasks -= 1
        push.is_held = False
        if push.is_dropped and isinstance(answer, wire.WeightsReady):
            answer = refused(Refusal("gap", "it was aborted"), 0, push.begun.push_id)
        if isinstance(answer, wire.Refused):
            self.drop("it could not be prepared", tell=False)
        self._send(push.sender, replace(answer, reply_to=push.request_id))

    def _applied(self, push: _Push, outcome: wire.Message, pause_s: float) -> None:
        self._num_tasks -= 1
        self.is_updating = False
        self._last = (push.begun.push_id, outcome)
        self._over, self._push = push.begun.push_id, None
        if isinstance(outcome, wire.WeightsApplied):
            self.num_pushes += 1
            self.num_bytes += push.num_bytes
            self.push_s += time.monotonic() - push.started_s
            self.pause_s += pause_s
            self._note_version(push.begun.version)
        else:
            self.num_refused += 1
        self._send(push.sender, replace(outcome, reply_to=push.request_id))

    def _check_left(self) -> None:
        """Nobody is there to finish a transfer; an engine that died of it is paused no more."""
        if self._is_left and self._is_transferring and self._engine.how_it_ended() is None:
            self._is_transferring = False
            what = "the trainer left or failed in vLLM's weight transfer after its start: the engine can't go on"
            self._fail(Refusal("engine", what))

    def _note_version(self, version: int | None) -> None:
        if self.weights_needed is not None and version is not None and version >= self.weights_needed:
            self.weights_needed = None


def _check_parts(message: wire.WeightsParts) -> None:
    """They are of the same push, and the bytes are those of the last one."""
    for part in message.parts:
        if part.push_id != message.push_id:
            raise Refusal("invalid", "a part of another push", field="parts.push_id", got=part.push_id)
    announced = [0 if isinstance(part, wire.WeightsTensor) else part.num_bytes for part in message.parts] or [0]
    if announced[-1] != message.num_bytes or any(announced[:-1]):
        expected = f"{message.num_bytes} bytes, of the last part"
        raise Refusal("invalid", "the bytes belong to no part", field="num_bytes", expected=expected, got=announced)


def _as_refusal(error: Exception, step: Literal["staged", "engine"]) -> Exception:
    """What vLLM says of weights that do not load is a failed apply, and no death."""
    if step == "staged" or isinstance(error, LongtailError):
        return error
    return Refusal("apply", f"{type(error).__name__}: {error}")


def _quietly(function: Callable[[], object]) -> None:
    try:
        function()
    except Exception:
        _logger.exception("the staging of a failed push could not be emptied")
