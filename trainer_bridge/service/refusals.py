"""How the service says no: what is refused is an exception here, and one message on the wire."""

from __future__ import annotations

from typing import cast, get_args

from longtail.engine.errors import EngineDeadError, EngineTimeoutError, InvalidInputError
from longtail.engine.journal import JournalError
from longtail.scheduler.errors import LongtailError, shown
from longtail.trainer_bridge import wire

_MAX_MESSAGE_CHARS = 2000
_MAX_CAUSES = 8


class Refusal(LongtailError):
    """What a client asked for is not done, and nothing was changed.

    Attributes:
        code: see `wire.RefusalCode`.
        field: that is wrong, or `""`. `expected` and `got` say how.

    """

    def __init__(
        self, code: wire.RefusalCode, message: str, *, field: str = "", expected: str = "", got: object = ""
    ) -> None:
        self.code = code
        self.field = field
        self.expected = expected
        self.got = got if isinstance(got, str) else shown(got)
        super().__init__(message)


def refusal_of(error: BaseException) -> Refusal:
    """The refusal that an exception amounts to; what nobody foresaw is the engine's."""
    match error:
        case Refusal():
            return error
        case InvalidInputError():
            return Refusal("invalid", str(error), field=error.field, expected=error.expected, got=error.got)
        case wire.WireError():
            if (cause := _wrong_value(error)) is not None:
                return refusal_of(cause)
            return Refusal("wire", str(error), field=error.problem, expected=error.expected, got=error.got)
        case JournalError():
            return Refusal("full", f"it could not be written: {error}")
        case EngineDeadError() | EngineTimeoutError():
            return Refusal("engine", str(error))
    if (code := getattr(error, "code", None)) in get_args(wire.RefusalCode):  # a push that was refused
        fields = {name: getattr(error, name, "") for name in ("field", "expected", "got")}
        return Refusal(cast(wire.RefusalCode, code), str(error), **fields)
    return Refusal("engine", f"{type(error).__name__}: {error}")


def refused(error: BaseException, reply_to: int | None = None, push_id: str | None = None) -> wire.Refused:
    """The message about it."""
    refusal = refusal_of(error)
    return wire.Refused(
        code=refusal.code,
        message=short(str(refusal)),
        reply_to=reply_to,
        field=short(refusal.field),
        expected=short(refusal.expected),
        got=short(refusal.got),
        push_id=None if push_id is None else short(push_id),
    )


def round_failed(error: BaseException, round_id: str) -> wire.RoundFailed:
    """The message about a round that it ended."""
    refusal = refusal_of(error)
    return wire.RoundFailed(
        round_id=short(round_id),
        code=refusal.code,
        message=short(str(refusal)),
        field=short(refusal.field),
        expected=short(refusal.expected),
        got=short(refusal.got),
    )


def short(text: str) -> str:
    """A text that fits into a message, whoever it came from."""
    return text if len(text) <= _MAX_MESSAGE_CHARS else text[: _MAX_MESSAGE_CHARS - 3] + "..."


def _wrong_value(error: BaseException) -> InvalidInputError | None:
    """The field that made a message, which could be read, one that is refused."""
    cause = error.__cause__
    for _ in range(_MAX_CAUSES):
        if cause is None or isinstance(cause, InvalidInputError):
            return cause
        cause = cause.__cause__
    return None
