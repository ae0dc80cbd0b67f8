"""The door for JSON: what is not strict JSON of a sane shape does not reach a route.

vLLM's routes parse bodies with Python's lenient `json`, and answer some bodies that no route could mean with a 500:
deep nesting, numbers beyond 64 bits, half a surrogate pair, a number where an object belongs. `JsonDoor` reads each
body once and refuses these. It does not know what fields mean: prompts, sampling parameters and metadata are checked
by those who use them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longtail.engine.errors import InvalidInputError
from longtail.engine.server.problems import MediaTypeError, problem_response
from longtail.engine.server.refusals import NamedRefusals

#: Where the checked body is in the ASGI scope.
SCOPE_KEY = "longtail.json"

#: Levels of lists and objects. vLLM itself takes schemas of 64 levels.
MAX_DEPTH = 100

#: Fields of vLLM's bodies that its validators touch before they look at the type, and the type that they expect.
_SHAPES: Mapping[str, tuple[type, str]] = {
    "messages": (list, "a list"),
    "request_ids": (list, "a list"),
    "response_format": (dict, "an object"),
    "structured_outputs": (dict, "an object"),
    "vllm_xargs": (dict, "an object"),
}

_LEVELS = re.compile(rb'"(?:[^"\\]|\\.)*"|([\[{])|([\]}])', re.DOTALL)
_LONG_NUMBER = re.compile(rb"\d{19}")


def check_json(body: bytes) -> Any:
    """Decode a JSON body.

    Raises:
        InvalidInputError: it is not JSON in UTF-8, nested too deeply, or has a number that is not finite or not of 64
            bits; names the field where there is one, and `body` otherwise.

    """
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and (depth := _depth(body)) > MAX_DEPTH:
        raise InvalidInputError("body", f"JSON of at most {MAX_DEPTH} levels", f"{depth} levels")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError) as error:
        _refuse_nan(body)
        raise InvalidInputError("body", f"JSON in UTF-8 ({error})", body) from error
    if _LONG_NUMBER.search(body):
        for path, number in _leaves(value, ""):
            if isinstance(number, int) and not -(2**63) <= number < 2**64:
                raise InvalidInputError(path or "body", "a number of at most 64 bits", number)
    if isinstance(value, dict):
        _check_shapes(value)
    return value


class JsonDoor:
    """ASGI middleware; hands on the body that it has read, and its value under `SCOPE_KEY`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        is_upload = media_type == "multipart/form-data" and "/audio/" in scope["path"] if has_body else False
        if not has_body or is_upload:
            await self._app(scope, receive, send)
            return
        if media_type != "application/json":
            error = MediaTypeError("Content-Type", "application/json", headers.get("content-type", "nothing"))
            await problem_response(error)(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        try:
            value = scope[SCOPE_KEY] = check_json(body)
        except InvalidInputError as error:
            await problem_response(error)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), NamedRefusals(send, value))


async def _read(receive: Receive) -> bytes | None:
    """The whole body; `None` when the client went away in it."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _check_shapes(value: dict[str, Any]) -> None:
    for name, (kind, expected) in _SHAPES.items():
        if (found := value.get(name)) is not None and not isinstance(found, kind):
            raise InvalidInputError(name, expected, found)
    if "messages" in value and value["messages"] is None:
        raise InvalidInputError("messages", "a list", None)
    xargs = value.get("vllm_xargs") or {}
    if "kv_transfer_params" in xargs:
        # A flat value there, and nothing else is allowed, breaks vLLM's output processor.
        raise InvalidInputError("vllm_xargs.kv_transfer_params", "nothing", xargs["kv_transfer_params"])


def _depth(body: bytes) -> int:
    depth = deepest = 0
    for match in _LEVELS.finditer(body):
        if match.group(1):
            depth += 1
            deepest = max(deepest, depth)
        elif match.group(2):
            depth -= 1
    return deepest


def _refuse_nan(body: bytes) -> None:
    """If the only thing wrong is a `NaN` or `Infinity`, which Python and JavaScript write, name its field."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):  # Python's reader also takes UTF-16, whose depth nobody has checked
        return
    for path, number in _leaves(value, ""):
        if isinstance(number, float) and not math.isfinite(number):
            raise InvalidInputError(path or "body", "a finite number", number)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value that is no list or object, with its path; the depth is checked before."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")
    else:
        yield path, value
