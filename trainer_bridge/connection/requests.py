"""The requests of a client that have no reply yet, and what a refusal is to their caller. Not thread-safe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from longtail.trainer_bridge import wire
from longtail.trainer_bridge.errors import BridgeRefusedError, InvalidInputError, WeightsPushError

Request = (
    wire.AppendPrompts | wire.StartRound | wire.CancelRound | wire.Ack | wire.BeginWeights | wire.CommitWeights
    | wire.ControlWeights | wire.AskChecksum | wire.Goodbye
)  # fmt: skip
#: Gets the reply, or an exception. Must not block.
OnReply = Callable[[Any], None]

_REPEAT_S = 5.0
#: Answered at once by any service that has heard them.
_REPEATED = (wire.AppendPrompts, wire.StartRound, wire.CancelRound, wire.Ack)
#: A push is over with its session, because its chunks are. A commit has them all, and is asked again.
_OF_ONE_SESSION = (wire.BeginWeights, wire.ControlWeights)
_OF_A_PUSH = (*_OF_ONE_SESSION, wire.CommitWeights)


@dataclass(slots=True)
class OpenRequest:
    """A request without a reply."""

    message: Request
    payload: wire.Buffer | None
    on_reply: OnReply
    again_at: float = 0.0
    again_s: float = _REPEAT_S
    is_sent: bool = False

    def sent(self, now: float) -> None:
        """It goes out."""
        self.is_sent = True
        self.again_at = now + self.again_s


class OpenRequests:
    """The requests of a session, in the order in which they were made."""

    def __init__(self) -> None:
        self._open: dict[int, OpenRequest] = {}

    def __iter__(self) -> Iterator[OpenRequest]:
        return iter(list(self._open.values()))

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._open

    def add(self, request: OpenRequest) -> None:
        """A request that is new."""
        self._open[request.message.request_id] = request

    def pop(self, request_id: int | None) -> OpenRequest | None:
        """Take a request out, if it is here."""
        return None if request_id is None else self._open.pop(request_id, None)

    def clear(self) -> list[OnReply]:
        """Take all of them out."""
        waiting = [request.on_reply for request in self]
        self._open.clear()
        return waiting

    def due(self, now: float) -> Iterator[OpenRequest]:
        """Those to be sent again, because so long there was no reply; ever more rarely."""
        for request in self:
            if isinstance(request.message, _REPEATED) and request.is_sent and now >= request.again_at:
                request.again_s *= 2
                yield request

    def of_the_session(self) -> Iterator[OpenRequest]:
        """Those that end with the session in which they were sent; they are taken out."""
        for request_id, request in list(self._open.items()):
            if isinstance(request.message, _OF_ONE_SESSION) and request.is_sent:
                del self._open[request_id]
                yield request

    @property
    def has_push(self) -> bool:
        """A push is to begin, or is committed: it can outlive the session."""
        return any(isinstance(one.message, (wire.BeginWeights, wire.CommitWeights)) for one in self)


def refusal(peer: str, message: wire.Refused, request: Request | None = None, *, is_push: bool = False) -> Exception:
    """What a refusal is to the caller: `InvalidInputError` where a field of the call was wrong."""
    is_push = is_push or isinstance(request, _OF_A_PUSH)
    if message.code == "invalid" and message.field and not is_push:
        error = InvalidInputError(message.field, message.expected, message.got)
        error.got = message.got  # the service has made it text already
        error.args = (f"{message.field}: expected {message.expected}, got {message.got}",)
        return error
    kind = WeightsPushError if is_push else BridgeRefusedError
    return kind(peer, message.code, message.message, message.field, message.expected, message.got)
