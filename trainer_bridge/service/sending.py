"""What goes out of the service: to the trainer in its order and for sure, to anybody else now or not at all.

Messages for the trainer wait while its connection is full, deliveries in the outbox, previews not at all. It belongs
to the thread of the socket.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from longtail.trainer_bridge import wire
from longtail.trainer_bridge.service.door import Door, Sent
from longtail.trainer_bridge.service.outbox import Outbox
from longtail.trainer_bridge.service.refusals import refused
from longtail.trainer_bridge.service.session import Reception

#: Messages that wait for a trainer that does not read; with more it has lost its session.
MAX_WAITING = 4096
_BATCH = 64

_logger = logging.getLogger("longtail.trainer_bridge.service.sending")


class Sender:
    """See the module.

    Args:
        door: takes the messages.
        reception: knows the trainer.
        outbox: has the deliveries.
        lost: called when the trainer has lost its session, because it can't be reached or does not read.

    Attributes:
        is_blocked: the connection took no more; to be tried again soon.
        num_deliveries: sent, repeated ones included; `num_delivery_bytes` their payloads.
        num_previews_dropped: because the trainer did not read.

    """

    def __init__(self, door: Door, reception: Reception, outbox: Outbox, lost: Callable[[], None]) -> None:
        self.is_blocked = False
        self.num_deliveries = 0
        self.num_delivery_bytes = 0
        self.num_previews_dropped = 0
        self._door = door
        self._reception = reception
        self._outbox = outbox
        self._lost = lost
        self._waiting: deque[list[wire.Buffer]] = deque()

    def answer(self, receiver: bytes, message: wire.Message) -> None:
        """Send to whoever asked."""
        if self._reception.is_known(receiver):
            self.tell(message)
        else:
            self._door.send(receiver, _frames(message))

    def tell(self, message: wire.Message, payload: bytes | None = None) -> None:
        """Send to the trainer, if there is one."""
        session = self._reception.session
        if session is None or not self._reception.is_known(session.sender):
            return
        if self._waiting and isinstance(message, (wire.Preview, wire.Heartbeat)):
            self.num_previews_dropped += isinstance(message, wire.Preview)
            return
        self._waiting.append(_frames(message, payload))
        self.flush()
        if len(self._waiting) > MAX_WAITING:
            _logger.warning("%s does not read: it has to say hello again", session.consumer)
            self._lose(session.sender)

    def flush(self) -> None:
        """Send what waits, as far as the connection takes it."""
        self.is_blocked = False
        while self._waiting and (session := self._reception.session) is not None:
            if self._has_failed(self._door.send(session.sender, self._waiting[0]), session.sender):
                return
            self._waiting.popleft()

    def deliver(self, last_seq: int) -> None:
        """Send what lies in the outbox up to `last_seq`, as far as there is credit and the connection takes it."""
        self._reception.skip(self._outbox.acked)
        for _ in range(_BATCH):
            if self._waiting or (seq := self._reception.next_seq(last_seq)) is None:
                return
            session, entry = self._reception.session, self._outbox.entry(seq)
            if entry is None or session is None:  # acknowledged this very moment
                return
            header = wire.Delivery(seq=seq, round_id=entry.round_id, kind=entry.kind, num_bytes=len(entry.payload))
            if self._has_failed(self._door.send(session.sender, wire.encode(header, entry.payload)), session.sender):
                return
            self._reception.sent()
            self.num_deliveries += 1
            self.num_delivery_bytes += len(entry.payload)
        self._door.ring()  # there may be more

    def forget(self) -> None:
        """What waits was for another client, or another connection."""
        self._waiting.clear()

    def _has_failed(self, sent: Sent, receiver: bytes) -> bool:
        """Whether a message has to wait, or can't be sent at all."""
        self.is_blocked = sent == "full"
        if sent == "gone":
            self._lose(receiver)
        return sent != "sent"

    def _lose(self, receiver: bytes) -> None:
        self.forget()
        if self._reception.lose(receiver):
            self._lost()


def _frames(message: wire.Message, payload: bytes | None = None) -> list[wire.Buffer]:
    """Of the message, or of one that says that it is too long: whoever waits for it must hear of it."""
    try:
        return wire.encode(message, payload)
    except wire.WireError as error:
        _logger.exception("a message can't be sent; this is a bug")
        return wire.encode(refused(error, getattr(message, "reply_to", None)))
