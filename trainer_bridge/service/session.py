"""Who the service talks to: one consumer, one client of it, what that one may be sent next.

Pure state in numbers and names: it has no socket and no clock, and sends nothing. `sender` is where a message came
from, a name that ZeroMQ gives to a connection.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from longtail.trainer_bridge import wire
from longtail.trainer_bridge.service.refusals import Refusal

#: A consumer is alive while it was heard of within so many heartbeats.
ALIVE_HEARTBEATS = 5

#: Sender of a session whose connection is lost.
NOBODY = b""

_MAX_DISPLACED = 64


@dataclass(slots=True)
class Session:
    """An open session.

    Attributes:
        next_seq: the delivery to send next.
        credit_seq: the last one that may be sent.
        heard_s: when the client gave its last sign of life.

    """

    consumer: str
    instance: str
    sender: bytes
    next_seq: int
    credit_seq: int
    heard_s: float


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a hello led to.

    Attributes:
        used: the last delivery that the consumer does not want.
        displaced: sender of another client of the consumer, which has no session any more.
        is_new: another client than before, or another connection of it: what it had under way is lost.

    """

    session: Session
    used: int
    displaced: bytes | None
    is_new: bool


class Reception:
    """See the module.

    Args:
        heartbeat_s: of the service.

    Attributes:
        session: the open one.

    """

    def __init__(self, heartbeat_s: float) -> None:
        self.session: Session | None = None
        self._alive_s = ALIVE_HEARTBEATS * heartbeat_s
        # A client that lost its session must not take it back, or two would take it from each other for ever.
        self._displaced: deque[tuple[str, str]] = deque(maxlen=_MAX_DISPLACED)

    def greet(
        self, sender: bytes, hello: wire.Hello, now_s: float, *, epoch: str, acked: int, last_seq: int
    ) -> Greeting:
        """Open the session of `hello`, or take it up again.

        Deliveries go on after what the client has, the consumer has used, or has acknowledged, whichever is most.

        Raises:
            Refusal: another consumer is alive, the client lost its session to another one, or its cursor is of
                another stream of deliveries.

        """
        for name in ("consumer", "instance"):
            if not 0 < len(value := getattr(hello, name)) <= wire.MAX_NAME_CHARS:
                what = f"1 to {wire.MAX_NAME_CHARS} characters"
                raise Refusal("invalid", f"{name} is no name", field=name, expected=what, got=value)
        old = self.session
        if old is not None and old.consumer != hello.consumer and now_s - old.heard_s <= self._alive_s:
            raise Refusal("busy", f"consumer {old.consumer!r} has the engine", field="consumer", got=hello.consumer)
        if (hello.consumer, hello.instance) in self._displaced:
            raise Refusal("busy", "another client of this consumer took the session over", field="instance")
        used = _used(hello.cursor, epoch, acked, last_seq)
        is_same = old is not None and (old.consumer, old.instance) == (hello.consumer, hello.instance)
        if old is not None and not is_same and old.consumer == hello.consumer:
            self._displaced.append((old.consumer, old.instance))
        next_seq = max(used, min(hello.received, last_seq)) + 1
        self.session = Session(
            hello.consumer, hello.instance, sender, next_seq, used + max(hello.credit, 0), heard_s=now_s
        )
        return Greeting(
            self.session,
            used,
            displaced=old.sender if old is not None and not is_same and old.sender not in (sender, NOBODY) else None,
            is_new=not (is_same and old is not None and old.sender == sender),
        )

    def is_known(self, sender: bytes) -> bool:
        """`sender` has the session."""
        return self.session is not None and self.session.sender == sender != NOBODY

    def hear(self, sender: bytes, now_s: float) -> None:
        """A message came."""
        if self.session is not None and self.is_known(sender):
            self.session.heard_s = now_s

    def leave(self, sender: bytes) -> bool:
        """The client said goodbye; whether it had the session."""
        if not self.is_known(sender):
            return False
        self.session = None
        return True

    def lose(self, sender: bytes) -> bool:
        """The client can't be reached: it must say hello again, and until it counts as dead nobody else may.

        Returns whether it had the session.
        """
        if self.session is None or not self.is_known(sender):
            return False
        self.session.sender = NOBODY
        return True

    def grant(self, seq: int) -> None:
        """Deliveries up to `seq` may be sent; a lower number than before changes nothing."""
        assert self.session is not None
        self.session.credit_seq = max(self.session.credit_seq, seq)

    def next_seq(self, last_seq: int) -> int | None:
        """The delivery to send now, if there is one and credit for it."""
        session = self.session
        if session is None or session.sender == NOBODY or session.next_seq > min(session.credit_seq, last_seq):
            return None
        return session.next_seq

    def sent(self) -> None:
        """That delivery was sent."""
        assert self.session is not None
        self.session.next_seq += 1

    def skip(self, acked: int) -> None:
        """Deliveries up to `acked` need not be sent any more."""
        if self.session is not None:
            self.session.next_seq = max(self.session.next_seq, acked + 1)


def _used(cursor: wire.Cursor | None, epoch: str, acked: int, last_seq: int) -> int:
    """The last delivery that the consumer does not want."""
    if cursor is None:
        return acked
    if cursor.epoch != epoch:
        message = "the cursor is of another stream of deliveries: the service lost its state, or it is another one"
        raise Refusal("epoch", message, field="cursor.epoch", expected=epoch, got=cursor.epoch)
    if not 0 <= cursor.seq <= last_seq:
        message = "the cursor is beyond the newest delivery: the service has an older state than the consumer"
        raise Refusal("epoch", message, field="cursor.seq", expected=f"0 to {last_seq}", got=cursor.seq)
    return max(cursor.seq, acked)
