"""`BridgeService`: an engine, for a trainer in another process, over one ZeroMQ socket.

One thread owns the socket (`door.py`) and knows who the trainer is (`session.py`). It answers what it can at once and
never waits: requests that write or tokenise go to the clerk, rounds to the threads of `round_jobs.py`, weights to that
of `weight_jobs.py`. These leave what they have to say in a box and ring the bell. Deliveries lie in the outbox, and go
out as far as there is credit; everything else goes out when it is said, or waits in order until the trainer reads.

When a thread of the service fails, or nothing more can be written, `failure` says why, and the owner is to close the
service, as `longtail serve` does. A dead engine does not end it: what runs is answered, what was delivered can be
fetched, and the owner decides.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

from longtail.engine.errors import EngineDeadError, EngineTimeoutError
from longtail.scheduler.errors import LongtailError
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.service.clerk import Clerk
from longtail.trainer_bridge.service.config import BridgeConfig
from longtail.trainer_bridge.service.door import Door
from longtail.trainer_bridge.service.engine_port import Engine, WeightStaging
from longtail.trainer_bridge.service.own_staging import OwnStaging, own_staging
from longtail.trainer_bridge.service.refusals import Refusal, refused, short
from longtail.trainer_bridge.service.round_jobs import RoundJobs
from longtail.trainer_bridge.service.sending import Sender
from longtail.trainer_bridge.service.session import Reception
from longtail.trainer_bridge.service.state_folder import open_state, remember_version
from longtail.trainer_bridge.service.weight_jobs import WeightJobs

_MAX_BOX = 256
_BATCH = 64
_RETRY_S = 0.01
_CLOSE_TIMEOUT_S = 60.0

_logger = logging.getLogger("longtail.trainer_bridge.service.service")


class BridgeService:
    """See the module; a context manager. Methods may be called from any thread.

    Args:
        engine: runs the rounds; the service does not close it. Nobody else may run rounds that carry over
            on it, or change its weights, while the service has it.
        config: of the service.
        staging: takes pushed weights, `None` refuses them; by default one for the engine's checkpoint.
        weights_needed: the engine was started with the weights of an older version than it was told, so that rounds
            are refused until this one, or a later one, was pushed.
        door: already bound, see `Door`; the service closes it.

    Attributes:
        address: where clients connect.
        failure: what ended the service before `close`.
        problems: messages that could not be read, by `WireProblem`.

    Raises:
        InvalidInputError: a setting is wrong, or the state folder does not belong to the engine.
        JournalError: the state folder can't be used.

    """

    def __init__(
        self,
        engine: Engine,
        config: BridgeConfig | None = None,
        *,
        staging: WeightStaging | Literal["own"] | None = "own",
        weights_needed: int | None = None,
        door: Door | None = None,
    ) -> None:
        self.config = config or BridgeConfig()
        self.failure: Exception | None = None
        self.problems: Counter[str] = Counter()
        self._engine = engine
        self._box: deque[Callable[[], None]] = deque()
        self._is_closed = False
        self._is_stopping = threading.Event()
        self._engine_death: str | None = None
        self._said_s = 0.0
        self._checked_s = 0.0
        self._num_previews_dropped = 0
        self._door = door or Door(self.config)
        self.address = self._door.address
        self._reception = Reception(self.config.heartbeat_s)
        self._own: OwnStaging | None = None
        try:
            if staging == "own":
                self._own = own_staging(engine, self.config, weights_needed)
                pushed: WeightStaging | None = None if self._own is None else self._own.staging
            else:
                pushed = staging
            self._outbox, self._prompts = open_state(engine, self.config)
        except BaseException:
            self._door.close()
            if self._own is not None:
                self._own.close()
            raise
        self._sender = Sender(self._door, self._reception, self._outbox, self._lost)
        self._rounds = RoundJobs(
            engine,
            self._outbox,
            self._prompts,
            tell=self._tell,
            changed=self._door.ring,
            fail=self._fail,
            max_prompt_bytes=self.config.max_prompt_bytes,
        )
        self._weights = WeightJobs(
            engine,
            pushed,
            send=self._sender.answer,
            post=self._post,
            fail=self._fail,
            weights_needed=weights_needed,
            remember_version=self._remember_version,
        )
        self._clerk = Clerk(engine, self._outbox, self._prompts, self._rounds, self._answer, self._fail)
        self._thread = threading.Thread(target=self._run, name="longtail-bridge", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def engine_id(self) -> str:
        """Of the state folder, or of this service if there is none."""
        return self._outbox.engine_id

    @property
    def server_key(self) -> str | None:
        """Public key that clients have to know."""
        return self._door.server_key

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """End it: rounds are stopped, what was acknowledged and returned is written. Safe to call twice.

        Raises:
            EngineTimeoutError: a thread did not end in time; the state folder is given up all the same.

        """
        if self._is_closed:
            return
        self._is_closed = True
        deadline = time.monotonic() + timeout_s

        def left() -> float:
            return max(0.1, deadline - time.monotonic())

        # Those who produce first, then the one that writes, then the one that sends what they said.
        late = [
            name
            for name, has_ended in (
                ("a round", self._rounds.close(left())),
                ("an update of weights", self._weights.close(left())),
                ("a request", self._clerk.close(left())),
            )
            if not has_ended
        ]
        self._is_stopping.set()
        self._door.ring()
        self._thread.join(left())
        if self._thread.is_alive():
            late.append("the socket")
        self._close_files()
        if self._own is not None:
            self._own.close()
        if late:
            raise EngineTimeoutError(f"{' and '.join(late)} of the bridge to end", timeout_s)

    def status(self) -> wire.Status:
        """What the service is doing."""
        state, reason = self._state()
        return wire.Status(
            state=state,
            reason=None if reason is None else short(reason),
            weight_version=self._engine.weight_version,
            num_unacked=self._outbox.num_unacked,
            num_running=self._engine.num_in_flight,
            num_prompts=len(self._prompts),
            num_prompts_used=self._engine.num_prompts_used,
            counters=self.counters(),
        )

    def counters(self) -> dict[str, float]:
        """Totals since the service began."""
        return {
            "output_tokens": float(self._rounds.num_output_tokens),
            "throttled_s": self._rounds.throttled_s,
            "deliveries_sent": float(self._sender.num_deliveries),
            "delivery_bytes_sent": float(self._sender.num_delivery_bytes),
            "previews_dropped": float(self._num_previews_dropped + self._sender.num_previews_dropped),
            "unacked_bytes": float(self._outbox.num_unacked_bytes),
            "pushes": float(self._weights.num_pushes),
            "pushes_refused": float(self._weights.num_refused),
            "push_bytes": float(self._weights.num_bytes),
            "push_s": self._weights.push_s,
            "pause_s": self._weights.pause_s,
            "messages_rejected": float(self.problems.total()),
            "keys_refused": float(self._door.num_keys_refused),
        }

    def _state(self) -> tuple[wire.EngineState, str | None]:
        if (death := self._engine_death) is not None:
            return "dead", death
        if self._weights.is_updating:
            return "updating", None
        if (needed := self._weights.weights_needed) is not None:
            return "needs_weights", f"the engine had version {needed} before it was started; push it, or a later one"
        if (trouble := self._rounds.trouble) is not None:
            return "throttled", trouble
        if self._rounds.is_throttled:
            box = self._outbox
            return "throttled", f"{box.num_unacked} deliveries, {box.num_unacked_bytes} bytes, are not acknowledged"
        return ("running" if self._rounds.num_jobs else "idle"), None

    # ---- in any thread -----------------------------------------------------------------------------------------

    def _post(self, function: Callable[[], None]) -> None:
        self._box.append(function)
        self._door.ring()

    def _answer(self, receiver: bytes, message: wire.Message) -> None:
        self._post(lambda: self._sender.answer(receiver, message))

    def _tell(self, message: wire.Message, payload: bytes | None) -> None:
        if isinstance(message, wire.Preview) and len(self._box) > _MAX_BOX:
            self._num_previews_dropped += 1
            return
        self._post(lambda: self._sender.tell(message, payload))

    def _remember_version(self, version: int) -> None:
        if self.config.state is not None:
            remember_version(self.config.state, version)

    def _fail(self, error: Exception) -> None:
        _logger.error("the bridge ends: %s", error)
        self.failure = self.failure or error

    # ---- in the thread of the socket ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_stopping.is_set():
                self._door.wait(_RETRY_S if self._sender.is_blocked else self.config.heartbeat_s / 4)
                self._turn()
            self._turn()
        except Exception as error:
            _logger.exception("the thread of the bridge's socket failed; this is a bug")
            self._fail(error)
        finally:
            self._door.close()

    def _turn(self) -> None:
        """Everything that is to do now, in shares that leave nobody waiting."""
        last_seq = self._outbox.last_seq  # before the box: previews of a round come before its deliveries
        for _ in range(len(self._box)):
            self._box.popleft()()
        for sender, frames in self._door.messages(_BATCH):
            self._take(sender, frames)
        self._sender.flush()
        self._sender.deliver(last_seq)
        now = time.monotonic()
        if now - self._checked_s >= self.config.heartbeat_s / 2:
            self._checked_s = now
            self._check_engine()
        if now - self._said_s >= self.config.heartbeat_s:
            self._heartbeat()

    def _take(self, sender: bytes, frames: list[memoryview]) -> None:
        """Answer one message; whatever is wrong with it, only its sender is told."""
        message: wire.ToService | None = None
        try:
            message, payload = wire.decode_to_service(frames)
            if isinstance(message, wire.Hello):
                self._greet(sender, message)
            elif self._reception.is_known(sender):
                self._reception.hear(sender, time.monotonic())
                self._handle(sender, message, payload)
            else:
                raise Refusal("session", "say hello first")
        except Exception as error:
            reply_to = getattr(message, "request_id", None)
            if isinstance(error, wire.WireError):
                self.problems[error.problem] += 1
                reply_to = error.request_id if message is None else reply_to
            elif not isinstance(error, LongtailError):
                _logger.exception("a message failed; this is a bug")
            try:
                self._sender.answer(sender, refused(error, reply_to, getattr(message, "push_id", None)))
            except Exception:
                _logger.exception("an answer could not be sent; this is a bug")

    def _greet(self, sender: bytes, hello: wire.Hello) -> None:
        box = self._outbox
        greeting = self._reception.greet(
            sender, hello, time.monotonic(), epoch=box.epoch, acked=box.acked, last_seq=box.last_seq
        )
        if greeting.displaced is not None:
            error = Refusal("busy", f"a client of the consumer {hello.consumer!r} took the session over")
            self._door.send(greeting.displaced, wire.encode(refused(error)))
        if greeting.is_new:
            self._sender.forget()
            self._weights.leave("the session was lost")
        used = greeting.used
        if used > box.acked:
            self._clerk.forget(used)
        self._sender.answer(
            sender,
            wire.Welcome(
                reply_to=hello.request_id,
                engine_id=box.engine_id,
                epoch=box.epoch,
                acked=used,
                last_seq=box.last_seq,
                model=self._engine.config.model,
                max_model_len=self._engine.limits.max_model_len,
                vocab_size=self._engine.limits.vocab_size,
                heartbeat_s=self.config.heartbeat_s,
                status=self.status(),
                weights_needed=self._weights.weights_needed,
                ring=self._weights.ring,
                server=f"longtail, protocol {wire.PROTOCOL_VERSION}",
            ),
        )

    def _handle(self, sender: bytes, message: wire.ToService, payload: memoryview) -> None:
        match message:
            case wire.Ping():
                self._heartbeat()
            case wire.Credit():
                self._reception.grant(message.seq)
            case wire.Goodbye():
                self._sender.answer(sender, wire.Done(reply_to=message.request_id))
                self._reception.leave(sender)
                self._weights.leave("the client left")
            case wire.StartRound():
                self._check_can_run()
                self._clerk.take(sender, message, payload)
            case wire.AppendPrompts() | wire.CancelRound() | wire.Ack():
                self._clerk.take(sender, message, payload)
            case wire.WeightsChunk():
                self._weights.chunk(message, payload)
            case wire.WeightsParts():
                self._weights.parts(message, payload)
            case wire.WeightsTensor():
                self._weights.tensor(message)
            case wire.AbortWeights():
                self._weights.abort(message)
            case wire.CommitWeights():
                self._weights.commit(sender, message)
            case wire.BeginWeights():
                self._check_alive()
                self._weights.begin(sender, message)
            case wire.ControlWeights():
                self._check_alive()
                self._weights.control(sender, message)
            case wire.AskChecksum():
                self._check_alive()
                self._weights.checksum(sender, message)

    def _check_alive(self) -> None:
        if self._engine_death is not None:
            raise Refusal("engine", self._engine_death)

    def _check_can_run(self) -> None:
        self._check_alive()
        if (needed := self._weights.weights_needed) is not None:
            raise Refusal(
                "weights",
                f"the engine lacks weights that it had: push version {needed} or above, then ask for the round again",
                field="version",
                expected=f"at least {needed}",
                got="the weights that the model was loaded with",
            )

    def _check_engine(self) -> None:
        if self._engine_death is None and (death := self._engine.how_it_ended()) is not None:
            self._engine_death = death
            _logger.error("the engine is dead: %s", death)
            self._rounds.end(EngineDeadError("rollout", death))
            self._heartbeat()

    def _heartbeat(self) -> None:
        self._said_s = time.monotonic()
        self._sender.tell(wire.Heartbeat(status=self.status()))

    def _lost(self) -> None:
        self._weights.leave("the connection was lost")

    def _close_files(self) -> None:
        self._outbox.close()
        self._prompts.close()
