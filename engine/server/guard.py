"""The door of the server: who may come in, and with how much.

`KeyGuard` asks for the API key on every route and method, websockets included, but for a short list of read-only
GETs: what is not on the list is closed, so that a route which vLLM adds is closed too. `BodyLimit` bounds the body
of every request. Both are plain ASGI and read no body themselves.
"""

from __future__ import annotations

import hashlib
import secrets
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longtail.engine.server.problems import BodyTooLargeError, problem_response

#: Paths that GET and HEAD reach without the key. They change nothing and show no prompt, output or weight.
OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics"})

_READ_METHODS = frozenset({"GET", "HEAD"})


class KeyGuard:
    """Refuses requests without `Authorization: Bearer <key>`; lets all in when there is no key.

    A CORS preflight carries no key by definition. It ends in the CORS middleware, which is outside this one.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or not self._digests or self._may_enter(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http" or "websocket.http.response" in scope.get("extensions", {}):
            await _unauthorized()(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": "unauthorized"})

    def _may_enter(self, scope: Scope) -> bool:
        is_read = scope["type"] == "http" and scope["method"] in _READ_METHODS
        if is_read and scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS:
            return True
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(token.strip().encode())
        # No early exit, and digests of one length: the time says nothing about the keys.
        matches = [secrets.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


class BodyLimit:
    """Answers 413 to a body above `max_bytes`, before it is read when its length is announced."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await problem_response(BodyTooLargeError(self._max_bytes, f"{announced} bytes"))(scope, receive, send)
            return
        num_bytes = 0
        has_answered = False

        async def receive_bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise BodyTooLargeError(self._max_bytes, "more")
            return message

        async def note_answer(message: Message) -> None:
            nonlocal has_answered
            has_answered = True
            await send(message)

        try:
            await self._app(scope, receive_bounded, note_answer)
        except BodyTooLargeError as error:
            if has_answered:
                raise
            await problem_response(error)(scope, receive, send)


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def _unauthorized() -> JSONResponse:
    status = HTTPStatus.UNAUTHORIZED.value
    message = "this route needs the server's API key: send `Authorization: Bearer <key>`"
    body = {"message": message, "type": "UnauthorizedError", "code": status, "param": "Authorization"}
    return JSONResponse({"error": body}, status_code=status, headers={"WWW-Authenticate": "Bearer"})
