"""The protocol state of one client, without sockets and threads: messages go in, messages come out.

What it guarantees, whatever is lost, repeated or restarted in between:

- Deliveries are put on their shelves in the order of `seq`, each once; one that is missing makes it say hello again.
- A request has one outcome: its reply, the refusal, or what ended the session for good. In a new session those that are
  open are repeated; a round is started again until its end has come.
- A session goes on with the store of deliveries that it began with (`epoch`), or fails.

It decodes no payloads and waits for nobody. Callbacks run inside its methods and must not block. Not thread-safe.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from longtail.trainer_bridge import wire
from longtail.trainer_bridge.connection.requests import OnReply, OpenRequest, OpenRequests, Request, refusal
from longtail.trainer_bridge.connection.shelves import Entry, Shelf, Shelves
from longtail.trainer_bridge.errors import (
    BridgeClosedError,
    BridgeError,
    BridgeRefusedError,
    InvalidInputError,
    WeightsPushError,
    WireError,
)

logger = logging.getLogger(__name__)

_HELLO_AGAIN_S = 1.0
_MAX_HELLO_AGAIN_S = 8.0
#: A service that welcomes a client and does not know it then is about to end; it is not asked all the time.
_FORGOTTEN_AT_ONCE_S = 0.5
_FORGOTTEN_AGAIN_S = 0.2
_SILENT_HEARTBEATS = 4.0
#: A service that has more than it sends, for so long, has lost it on the way.
_STARVED_HEARTBEATS = 10.0
#: A gap that is there again after so many new sessions is not the connection's fault.
_MAX_GAP_HELLOS = 5


_NO_ANSWER = "it does not answer"


class PushListener(Protocol):
    """The push that is under way, as the session sees it."""

    push_id: str

    def took(self, serial: int) -> None:
        """The service has taken the chunks up to `serial`."""

    def fail(self, error: Exception) -> None:
        """The push is over."""


class ClientSession:
    """One consumer's session, over as many connections as it takes.

    Args:
        peer: address of the service, for errors.
        consumer: name of the trainer.
        instance: random name of this client.
        cursor: where the consumer's checkpoint is.
        prefetch: how many deliveries may wait here for their user.
        clock: seconds that only grow.

    Attributes:
        outgoing: messages to be sent, with their third frames, in order; empty while there is no connection.
        failure: what ended the session for good.
        welcome: of the present session, or of the last one.
        status: the last that was heard.
        weights_needed: a version that has to be pushed before rounds run.
        shelves: what has come and was not handed out.
        acked: everything up to here is not needed again, and the service knows it.
        push: gets what is said of a push.

    """

    def __init__(
        self,
        peer: str,
        consumer: str,
        instance: str,
        *,
        cursor: wire.Cursor | None,
        prefetch: int,
        clock: Callable[[], float],
    ) -> None:
        self.peer = peer
        self.outgoing: deque[tuple[wire.Message, wire.Buffer | None]] = deque()
        self.failure: Exception | None = None
        self.welcome: wire.Welcome | None = None
        self.status: wire.Status | None = None
        self.weights_needed: int | None = None
        self.acked = self._acked_sent = 0 if cursor is None else cursor.seq
        self.shelves = Shelves(self.acked, prefetch)
        self.push: PushListener | None = None
        self.num_gaps = self.num_duplicates = self.num_sessions = 0
        self._consumer = consumer
        self._instance = instance
        self._cursor = cursor
        self._clock = clock
        self._is_connected = self._is_open = False
        self._note = _NO_ANSWER
        self._requests = OpenRequests()
        self._rounds: dict[str, tuple[wire.StartRound, wire.Buffer | None]] = {}
        self._status_waiters: list[OnReply] = []
        self._welcome_waiters: list[OnReply] = []
        self._delivery_waiters: list[OnReply] = []
        self._hellos: set[int] = set()
        self._hello_at = 0.0
        self._hello_again_s = self._gap_again_s = _HELLO_AGAIN_S
        self._gap_hello_at: float | None = None
        self._num_gap_hellos = 0
        self._last_id = 0
        self._last_sent = self._last_heard = self._last_progress = self._opened_at = clock()
        self._credit_step = max(prefetch // 4, 1)
        self._credit_sent = 0

    # ---- connection --------------------------------------------------------------------------------------------

    def connected(self) -> None:
        """A connection is there, whose other end may know nothing of this client."""
        self._is_connected = True
        self._note = "it accepted the connection and does not answer"
        self._lose_session()

    def disconnected(self, note: str) -> None:
        """There is no connection now; `note` says why, for people."""
        self._is_connected = self._is_open = False
        self._note = note
        self.outgoing.clear()

    def unreachable(self, note: str) -> None:
        """An attempt to connect failed; a note that says more stays."""
        if not self._is_connected and self._note == _NO_ANSWER:
            self._note = note

    def tick(self) -> None:
        """Send what is due: a sign of life, or again what had no answer."""
        now = self._clock()
        if self.failure is not None or not self._is_connected:
            return
        if not self._is_open:
            if now >= self._hello_at:
                self._hello()
            return
        is_starved = self._is_starving and now - self._last_progress > _STARVED_HEARTBEATS * self.heartbeat_s
        if is_starved or (self._gap_hello_at is not None and now >= self._gap_hello_at):
            self._lose_session()
            return
        for request in self._requests.due(now):
            self._send_request(request)
        if now - self._last_sent >= self.heartbeat_s:
            self._send(wire.Ping())

    @property
    def heartbeat_s(self) -> float:
        """How often both sides give a sign of life."""
        return 1.0 if self.welcome is None else self.welcome.heartbeat_s

    @property
    def is_open(self) -> bool:
        """The service knows this client, as far as it has said."""
        return self._is_open

    def fail(self, error: Exception) -> None:
        """End the session for good; everything that waits gets `error`."""
        if self.failure is not None:
            return
        self.failure = error
        self._is_open = False
        self.outgoing.clear()
        waiting = [*self._requests.clear(), *self._status_waiters, *self._welcome_waiters, *self._delivery_waiters]
        self._status_waiters, self._welcome_waiters, self._delivery_waiters = [], [], []
        for on_reply in waiting:
            on_reply(error)
        if self.push is not None:
            self.push.fail(error)
        self._tell_readers()

    def describe(self) -> str:
        """What is known of the service, for the message of a timeout."""
        if not self._is_connected:
            return f"no connection: {self._note}"
        silent_s = self._clock() - self._last_heard
        if silent_s > _SILENT_HEARTBEATS * self.heartbeat_s:
            return f"nothing was heard for {silent_s:.3g} s"
        if not self._is_open or self.status is None:
            return self._note
        text = f"the service is {self.status.state}" + (f": {self.status.reason}" if self.status.reason else "")
        if unclaimed := self.shelves.unclaimed:
            text += f"; {len(unclaimed)} rounds that nobody asked for wait here: {', '.join(unclaimed[:3])}"
        return text

    # ---- requests ----------------------------------------------------------------------------------------------

    def next_id(self) -> int:
        """A fresh `request_id`."""
        self._last_id += 1
        return self._last_id

    def request(self, message: Request, on_reply: OnReply, payload: wire.Buffer | None = None) -> None:
        """Send a request now, or as soon as there is a session; `on_reply` is called once, with reply or error."""
        if self.failure is not None:
            on_reply(self.failure)
            return
        if isinstance(message, wire.StartRound):
            self._rounds[message.round_id] = (message, payload)
        request = OpenRequest(message, payload, on_reply)
        self._requests.add(request)
        if self._is_open:
            self._send_request(request)

    def forget(self, request_id: int) -> None:
        """Nobody waits for this reply any more."""
        self._requests.pop(request_id)

    def send_push(self, message: wire.Message, payload: wire.Buffer | None) -> None:
        """Send a part of the push; without a session there is no push either."""
        if self._is_open:
            self._send(message, payload)

    def ask_status(self, on_reply: OnReply) -> None:
        """Call `on_reply` with the next `Heartbeat`."""
        if self.failure is not None:
            on_reply(self.failure)
            return
        self._status_waiters.append(on_reply)
        if self._is_open:
            self._send(wire.Ping())

    def await_welcome(self, on_reply: OnReply) -> None:
        """Call `on_reply` once there is a session."""
        if self.failure is not None or self._is_open:
            on_reply(self.failure or self.welcome)
            return
        self._welcome_waiters.append(on_reply)

    def await_delivery(self, on_reply: OnReply) -> None:
        """Call `on_reply` after the next delivery, or with what ends the session."""
        self._delivery_waiters.append(on_reply)

    def acknowledge(self, seq: int, on_reply: OnReply) -> None:
        """Tell the service that everything up to `seq` is not needed again."""

        def on_done(reply: wire.Message | Exception) -> None:
            if not isinstance(reply, Exception):
                self.acked = max(self.acked, seq)
            on_reply(reply)

        self._acked_sent = max(self._acked_sent, seq)
        self.request(wire.Ack(request_id=self.next_id(), seq=seq), on_done)

    def unsendable(self, error: Exception) -> None:
        """The first of `outgoing` can't be encoded: drop it, and tell whoever sent it."""
        message, _ = self.outgoing.popleft()
        wrong = InvalidInputError("request", f"what a message can have ({error})", type(message).__name__)
        request = self._requests.pop(getattr(message, "request_id", None))
        if isinstance(message, wire.StartRound):
            self._fail_round(message.round_id, wrong)
        if request is not None:
            request.on_reply(wrong)
        elif self.push is not None and getattr(message, "push_id", None) == self.push.push_id:
            self.push.fail(wrong)

    # ---- deliveries --------------------------------------------------------------------------------------------

    @property
    def cursor(self) -> wire.Cursor:
        """Everything before the first delivery that the user does not have."""
        assert self.welcome is not None
        return wire.Cursor(self.welcome.epoch, self.shelves.handed_up_to)

    @property
    def has_caught_up(self) -> bool:
        """What the service had when the session began is here, as far as there is room for it."""
        return self.welcome is not None and self.shelves.received >= min(self.welcome.last_seq, self._credit_sent)

    @property
    def started(self) -> list[str]:
        """Rounds that this client has started, and whose end has not come."""
        return list(self._rounds)

    def claim(self, round_id: str, on_change: Callable[[], None], *, is_stream: bool = False) -> Shelf:
        """See `Shelves.claim`."""
        shelf = self.shelves.claim(round_id, on_change, is_stream=is_stream)
        self._grant()
        return shelf

    def release(self, shelf: Shelf, *, is_over: bool) -> None:
        """Read a shelf no more; with `is_over` its round is not started again in a new session."""
        if is_over:
            self._rounds.pop(shelf.round_id, None)
        self.shelves.release(shelf, is_expected=shelf.round_id in self._rounds)
        self._grant()

    def hand_out(self, entries: Iterable[Entry]) -> None:
        """The user has these."""
        self.shelves.hand_out(entries)
        self._grant()

    def finish(self, shelf: Shelf) -> None:
        """The user has all of a round that has ended."""
        self.shelves.finish(shelf)
        self._grant()

    def discard(self, round_id: str) -> None:
        """Count what lies here of a round that nobody reads as handed out, and expect no more of it."""
        shelf = self.shelves.get(round_id)
        if shelf is not None and not shelf.is_claimed:
            self._rounds.pop(round_id, None)
            self.shelves.drop(shelf)
            self._grant()

    # ---- what comes --------------------------------------------------------------------------------------------

    def receive(self, message: wire.ToClient, payload: memoryview) -> None:
        """Take a message of the service."""
        if self.failure is not None:
            return
        self._last_heard = self._clock()
        match message:
            case wire.Delivery():
                self._take_delivery(message, payload)
            case wire.Preview():
                shelf = self.shelves.get(message.round_id)
                if shelf is not None and shelf.is_claimed:
                    shelf.previews.append(payload)
                    shelf.changed()
            case wire.Heartbeat():
                self._take_status(message)
            case wire.WeightsCredit():
                if self.push is not None and self.push.push_id == message.push_id:
                    self.push.took(message.serial)
            case wire.RoundFailed():
                words = {name: getattr(message, name) for name in ("code", "message", "field", "expected", "got")}
                self._fail_round(message.round_id, refusal(self.peer, wire.Refused(**words)))
            case wire.Welcome():
                self._take_welcome(message)
            case wire.Refused():
                self._take_refusal(message)
            case _:
                self._take_reply(message)

    def unreadable(self, error: WireError) -> None:
        """A message came that is none of this protocol."""
        self._last_heard = self._clock()
        self._note = f"a message of it could not be read: {error}"
        logger.warning("%s: a message of the service could not be read: %s", self.peer, error)
        if error.problem in ("signature", "version"):
            self.fail(BridgeError(self.peer, f"this is no service of this version of the bridge: {error}"))

    def _take_delivery(self, message: wire.Delivery, payload: memoryview) -> None:
        expected = self.shelves.received + 1
        if self.welcome is None or message.seq < expected:
            self.num_duplicates += 1
            return
        if message.seq > expected:
            self._see_gap(message.seq)
            return
        self._close_gap()
        self._last_progress = self._clock()
        is_expected = message.round_id in self._rounds
        if message.kind == "round":
            self._rounds.pop(message.round_id, None)
        self.shelves.put(Entry(message.seq, message.round_id, message.kind, payload), is_expected=is_expected)
        self._grant()
        waiters, self._delivery_waiters = self._delivery_waiters, []
        for on_reply in waiters:
            on_reply(message)

    def _see_gap(self, seq: int) -> None:
        """Say hello again: once for all that follow the gap, and ever more rarely if it is there again."""
        if not self._is_open or self._gap_hello_at is not None:
            return
        received = self.shelves.received
        self.num_gaps += 1
        if self._num_gap_hellos == _MAX_GAP_HELLOS:
            text = (
                f"delivery {received + 1} does not come, in {_MAX_GAP_HELLOS} new sessions: {seq} came after {received}"
            )
            self.fail(BridgeError(self.peer, text))
            return
        self._num_gap_hellos += 1
        logger.warning("%s: delivery %d came after %d", self.peer, seq, received)
        self._gap_hello_at = self._clock() + (0.0 if self._gap_again_s == _HELLO_AGAIN_S else self._gap_again_s)
        self._gap_again_s = min(2 * self._gap_again_s, _MAX_HELLO_AGAIN_S)

    def _close_gap(self) -> None:
        self._gap_hello_at, self._gap_again_s, self._num_gap_hellos = None, _HELLO_AGAIN_S, 0

    def _skip_acknowledged(self, acked: int) -> None:
        """An earlier client of the consumer acknowledged more than this one has, by an `Ack` that came late."""
        if acked > self.shelves.received:
            what = "%s: deliveries up to %d were acknowledged by an earlier client; this one had come to %d"
            logger.warning(what, self.peer, acked, self.shelves.received)
            self.shelves.skip(acked)
            self._close_gap()
            waiters, self._delivery_waiters = self._delivery_waiters, []
            for on_reply in waiters:
                on_reply(None)
        self.acked = max(self.acked, acked)

    def _take_status(self, message: wire.Heartbeat) -> None:
        self.status = message.status
        if self._is_open and self.welcome is not None:
            acked = self.welcome.last_seq - message.status.num_unacked  # at least
            if acked > self.shelves.received:
                self._skip_acknowledged(acked)
        waiters, self._status_waiters = self._status_waiters, []
        for on_reply in waiters:
            on_reply(message)
        if max(self.acked, self._acked_sent) + message.status.num_unacked <= self.shelves.received:
            for shelf in self.shelves:
                if not shelf.is_claimed or not shelf.is_done or shelf.has_ended:
                    continue
                shelf.is_over = True
                if not shelf.is_stream:
                    expected = "an id that is new, or whose round was not acknowledged"
                    self._fail_round(shelf.round_id, InvalidInputError("round_id", expected, shelf.round_id))
        self._tell_readers()

    def _take_reply(self, message: wire.ToClient) -> None:
        if isinstance(message, wire.RoundAccepted) and (shelf := self.shelves.get(message.round_id)) is not None:
            shelf.is_done = message.state == "done"
        if isinstance(message, wire.PromptsAppended) and self.status is not None:
            self.status = msgspec.structs.replace(self.status, num_prompts=message.num_prompts)
        if isinstance(message, wire.WeightsApplied):
            self._note_weights(message.version)
        request = self._requests.pop(getattr(message, "reply_to", None))
        if request is not None:
            asked = request.message
            if isinstance(message, wire.Done) and isinstance(asked, wire.ControlWeights) and asked.version is not None:
                self._note_weights(asked.version)
            request.on_reply(message)

    def _note_weights(self, version: int) -> None:
        """The engine has these."""
        if self.status is not None:
            self.status = msgspec.structs.replace(self.status, weight_version=version)
        if self.weights_needed is not None and version >= self.weights_needed:
            self.weights_needed = None

    def _take_refusal(self, message: wire.Refused) -> None:
        if message.code == "session":
            if self._is_open:
                logger.info("%s: the service does not know this client; saying hello again", self.peer)
                is_again = self._clock() - self._opened_at < _FORGOTTEN_AT_ONCE_S
                self._lose_session(hello_in_s=_FORGOTTEN_AGAIN_S if is_again else 0.0)
        elif message.reply_to in self._hellos:
            is_taken_over = message.code == "busy" and self.num_sessions > 0
            self.fail(self._taken_over(message) if is_taken_over else refusal(self.peer, message))
        elif (request := self._requests.pop(message.reply_to)) is not None:
            if isinstance(request.message, wire.StartRound):
                self._rounds.pop(request.message.round_id, None)
            request.on_reply(refusal(self.peer, message, request.message))
        elif self.push is not None and message.push_id == self.push.push_id:
            self.push.fail(refusal(self.peer, message, is_push=True))
        elif message.reply_to is None and message.push_id is None and message.code == "busy":
            self.fail(self._taken_over(message))
        else:
            self._refuse_repeated_start(message)

    def _refuse_repeated_start(self, message: wire.Refused) -> None:
        for start, _ in list(self._rounds.values()):
            if start.request_id == message.reply_to:
                self._fail_round(start.round_id, refusal(self.peer, message))
                return
        logger.warning("%s: refused (%s): %s", self.peer, message.code, message.message)

    def _take_welcome(self, message: wire.Welcome) -> None:
        if message.reply_to not in self._hellos:
            return  # of a hello that was repeated
        if self.welcome is None:
            self._begin(message)
        epoch = message.epoch if self._cursor is None else self._cursor.epoch
        if not self._check_store(epoch if self.welcome is None else self.welcome.epoch, message):
            return
        self.welcome, self.status, self.weights_needed = message, message.status, message.weights_needed
        self.num_sessions += 1
        self._is_open = True
        self._skip_acknowledged(message.acked)
        self._hellos.clear()
        self._opened_at = self._last_progress = self._clock()
        for request in self._requests:
            self._send_request(request)
        for start, payload in self._rounds.values():
            if start.request_id not in self._requests:
                self._send(start, payload)
        waiters, self._welcome_waiters = self._welcome_waiters, []
        for on_reply in waiters:
            on_reply(message)
        if self._status_waiters:
            self._send(wire.Ping())
        self._credit_sent = self.shelves.wanted_credit
        self._send(wire.Credit(seq=self._credit_sent))
        self._tell_readers()

    def _begin(self, message: wire.Welcome) -> None:
        """The first session goes on from where the consumer is."""
        if self._cursor is not None and message.acked > self._cursor.seq:
            what = "%s: deliveries up to %d were acknowledged, beyond the cursor %d: those between do not come again"
            logger.warning(what, self.peer, message.acked, self._cursor.seq)
        self.acked = max(self.acked, message.acked)
        self.shelves.received = self.shelves.handed_up_to = self.acked

    def _check_store(self, epoch: str, message: wire.Welcome) -> bool:
        """Whether the service has the store of deliveries that this client knows; if not, the session is over."""
        if message.epoch == epoch and message.last_seq >= self.shelves.received:
            return True
        expected = f"deliveries up to {self.shelves.received} of the store {epoch}"
        got = f"{message.last_seq} of {message.epoch}"
        text = f"the service has another store of deliveries: expected {expected}, got {got}"
        self.fail(BridgeRefusedError(self.peer, "epoch", text, "cursor", expected, got))
        return False

    # ---- parts -------------------------------------------------------------------------------------------------

    def _send(self, message: wire.Message, payload: wire.Buffer | None = None) -> None:
        assert self._is_connected
        self.outgoing.append((message, payload))
        self._last_sent = self._clock()

    def _send_request(self, request: OpenRequest) -> None:
        request.sent(self._clock())
        self._send(request.message, request.payload)

    def _hello(self) -> None:
        self._hello_at = self._clock() + self._hello_again_s
        self._hello_again_s = min(2 * self._hello_again_s, _MAX_HELLO_AGAIN_S)
        request_id = self.next_id()
        self._hellos.add(request_id)
        cursor = self._cursor if self.welcome is None else wire.Cursor(self.welcome.epoch, self.acked)
        hello = wire.Hello(
            request_id=request_id,
            consumer=self._consumer,
            instance=self._instance,
            cursor=cursor,
            credit=self.shelves.wanted_credit - self.acked,
            received=0 if self.welcome is None else self.shelves.received,
        )
        self._send(hello)

    def _lose_session(self, hello_in_s: float = 0.0) -> None:
        """Say hello (again), before anything else."""
        if self.failure is not None:
            return
        self._is_open = False
        self._gap_hello_at = None
        self._hello_again_s = _HELLO_AGAIN_S
        self.outgoing.clear()
        lost = WeightsPushError(self.peer, "session", "the session that the push began in is gone")
        for request in self._requests.of_the_session():
            request.on_reply(lost)
        if self.push is not None and not self._requests.has_push:
            self.push.fail(lost)
        self._hello_at = self._clock() + hello_in_s
        if hello_in_s == 0.0:
            self._hello()

    def _taken_over(self, message: wire.Refused) -> BridgeClosedError:
        return BridgeClosedError(self.peer, f"the session is another client's: {message.message}")

    def _fail_round(self, round_id: str, error: Exception) -> None:
        self._rounds.pop(round_id, None)
        shelf = self.shelves.get(round_id)
        if shelf is not None and shelf.is_claimed and shelf.round_id == round_id:
            shelf.failure = error
            shelf.changed()

    def _tell_readers(self) -> None:
        for shelf in self.shelves:
            shelf.changed()

    @property
    def _is_starving(self) -> bool:
        """The service has deliveries that it may send."""
        received = self.shelves.received
        has_more = self.status is not None and self.acked + self.status.num_unacked > received
        return has_more and self._credit_sent > received

    def _grant(self) -> None:
        """Let more come, in steps that are worth a message."""
        if not self._is_open:
            return
        wanted = self.shelves.wanted_credit
        if wanted >= self._credit_sent + self._credit_step or wanted > self._credit_sent <= self.shelves.received:
            self._credit_sent = wanted
            self._send(wire.Credit(seq=wanted))
