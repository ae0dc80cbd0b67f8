"""Typed errors of the bridge, on the trainer's side of it and on the engine's."""

from __future__ import annotations

from longtail.scheduler.errors import InvalidInputError, LongtailError, shown
from longtail.trainer_bridge.wire import RefusalCode, WireError


class BridgeError(LongtailError):
    """Root of what a bridge client raises, besides `InvalidInputError`.

    Attributes:
        peer: address of the service.

    """

    def __init__(self, peer: str, message: str) -> None:
        self.peer = peer
        super().__init__(f"{peer}: {message}")


class BridgeTimeoutError(BridgeError, TimeoutError):
    """A bounded wait ran out.

    Attributes:
        phase: what was waited for, in words.
        timeout_s: the bound.

    """

    def __init__(self, peer: str, phase: str, timeout_s: float, last_sign: str = "") -> None:
        self.phase = phase
        self.timeout_s = timeout_s
        super().__init__(peer, f"waited {timeout_s:g} s for {phase}" + (f" ({last_sign})" if last_sign else ""))


class BridgeClosedError(BridgeError):
    """The client was closed, or another client of the same consumer took its session over."""


class BridgeRefusedError(BridgeError):
    """The service refused what was asked for; nothing was changed.

    Attributes:
        code: see `wire.RefusalCode`.
        field: the field that is wrong, `""` if it is none.
        expected: what would have been right.
        got: what came.

    """

    def __init__(
        self, peer: str, code: RefusalCode, message: str, field: str = "", expected: str = "", got: str = ""
    ) -> None:
        self.code = code
        self.field = field
        self.expected = expected
        self.got = got
        super().__init__(peer, f"refused ({code}): {message}")


class WeightsPushError(BridgeRefusedError):
    """A push of weights did not take place: the engine goes on with the version that it had."""


class PushRefusedError(LongtailError, ValueError):
    """In the service: a push of weights is over, or was not begun, and changed nothing.

    Attributes:
        code: see `wire.RefusalCode`.
        field: what was wrong, below the message that had it.
        expected: what would have been right.
        got: what came.

    """

    def __init__(self, code: RefusalCode, field: str, expected: str, got: object) -> None:
        self.code = code
        self.field = field
        self.expected = expected
        self.got = shown(got)
        super().__init__(f"{field}: expected {expected}, got {self.got}")


__all__ = [
    "BridgeClosedError",
    "BridgeError",
    "BridgeRefusedError",
    "BridgeTimeoutError",
    "InvalidInputError",
    "LongtailError",
    "PushRefusedError",
    "WeightsPushError",
    "WireError",
    "shown",
]
