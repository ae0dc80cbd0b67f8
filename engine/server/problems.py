"""What goes back to a client that did something wrong, or whose engine did: one JSON shape, one status an error.

`{"error": {"message", "type", "code", "param", "field", "expected", "got"}}`: the first four are vLLM's (and what the
`openai` client reads), the others name the wrong field. `type` is the class that the same mistake raises in Python.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from longtail.engine.errors import EngineDeadError, EngineTimeoutError, InvalidInputError


class UnknownRoundError(InvalidInputError):
    """No such round, or it is over and its stream was read to the end."""


class RoundConflictError(InvalidInputError):
    """The round id is taken."""


class MediaTypeError(InvalidInputError):
    """The body is not declared as JSON."""


class BodyTooLargeError(HTTPException):
    """The body is longer than the server takes.

    An `HTTPException` because FastAPI turns any other exception that it meets while it reads a body into a 400.
    """

    def __init__(self, max_bytes: int, got: str) -> None:
        self.problem = InvalidInputError("body", f"at most {max_bytes} bytes", got)
        super().__init__(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(self.problem))


_STATUS: tuple[tuple[type[Exception], HTTPStatus], ...] = (
    (UnknownRoundError, HTTPStatus.NOT_FOUND),
    (RoundConflictError, HTTPStatus.CONFLICT),
    (MediaTypeError, HTTPStatus.UNSUPPORTED_MEDIA_TYPE),
    (InvalidInputError, HTTPStatus.BAD_REQUEST),
    (BodyTooLargeError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (EngineDeadError, HTTPStatus.SERVICE_UNAVAILABLE),
    (EngineTimeoutError, HTTPStatus.GATEWAY_TIMEOUT),
)


def status_of(error: Exception) -> HTTPStatus:
    """The HTTP status for an error."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR)


def problem(error: Exception) -> dict[str, Any]:
    """The `error` object for an error."""
    cause = error.problem if isinstance(error, BodyTooLargeError) else error
    wrong = cause if isinstance(cause, InvalidInputError) else None
    return {
        "message": str(cause),
        "type": _type_name(error),
        "code": status_of(error).value,
        "param": wrong and wrong.field,
        "field": wrong and wrong.field,
        "expected": wrong and wrong.expected,
        "got": wrong and wrong.got,
    }


def problem_response(error: Exception) -> JSONResponse:
    """The response for an error that came before anything was sent."""
    return JSONResponse({"error": problem(error)}, status_code=status_of(error).value)


async def handle(request: Request, error: Exception) -> JSONResponse:
    """Starlette's exception handler for longtail's errors."""
    return problem_response(error)


async def handle_http(request: Request, error: Exception) -> JSONResponse:
    """For what the router itself refuses; Starlette answers in another shape."""
    assert isinstance(error, HTTPException)
    expected, got = error.detail, None
    field = {HTTPStatus.METHOD_NOT_ALLOWED: "method", HTTPStatus.NOT_FOUND: "path"}.get(HTTPStatus(error.status_code))
    if field is not None:
        got = request.method if field == "method" else request.url.path
        expected = f"one of {(error.headers or {}).get('Allow', 'others')}" if field == "method" else "a known path"
    message = error.detail if field is None else f"{field}: expected {expected}, got {got}"
    code = error.status_code
    body = {"message": message, "type": HTTPStatus(code).phrase, "code": code, "param": field, "field": field}
    return JSONResponse({"error": {**body, "expected": expected, "got": got}}, code, error.headers)


def _type_name(error: Exception) -> str:
    """The public class: the first one of longtail's in the bases, so that a private subclass does not show."""
    kinds = (kind for kind in type(error).__mro__ if kind.__module__.startswith("longtail."))
    return next((kind.__name__ for kind in kinds if kind.__module__ in _PUBLIC), type(error).__name__)


_PUBLIC = frozenset({__name__, "longtail.scheduler.errors", "longtail.engine.errors"})
