"""Refusals that name the field: vLLM's 4xx answers often say what is wrong, and leave `param`, where it belongs, empty.

`NamedRefusals` fills `param` in on the way out, from the message and the request's own fields. It changes nothing that
vLLM did say, and no answer but a 4xx in vLLM's shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

#: What a message of vLLM has in lower case when it means a field that it does not name; the first that fits counts.
_HINTS = (
    ("token id", "prompt"),
    ("decoder prompt", "prompt"),
    ("one prompt", "prompt"),
    ("input tokens", "prompt"),
    ("conversation", "messages"),
    ("content", "messages"),
    ("multimodal", "messages"),
    ("input tokens", "messages"),
    ("grammar", "structured_outputs"),
    ("grammar", "response_format"),
    ("json schema", "structured_outputs"),
    ("json schema", "response_format"),
    ("structured outputs", "structured_outputs"),
    ("choice", "structured_outputs"),
    ("pattern_size", "repetition_detection"),
    ("tool choice", "tools"),
    ("chat template", "chat_template"),
    ("chat template", "chat_template_kwargs"),
)

#: Fields whose name is in many messages that are not about them.
_COMMON_WORDS = frozenset({"model", "user"})


def named(error: Mapping[str, Any], body: Any) -> dict[str, Any]:
    """The `error` object of a refusal with `param`, and `field`, its other name, as far as they can be told."""
    param = error.get("param")
    if not param and not isinstance(body, dict):
        param = "body"
    elif not param:
        message = str(error.get("message", ""))
        words = set(re.findall(r"\w+", message))
        hinted = (field for hint, field in _HINTS if hint in message.lower() and field in body)
        said = (field for field in body if field in words and field not in _COMMON_WORDS)
        param = next(said, None) or next(hinted, None)
    return {**error, "param": param, "field": error.get("field", param)}


class NamedRefusals:
    """A `send` that holds back a 4xx in JSON until it is whole, and puts the field's name into it."""

    def __init__(self, send: Send, body: Any) -> None:
        self._send = send
        self._body = body
        self._start: Message | None = None
        self._content = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_refusal(message):
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._content += message.get("body", b"")
            if not message.get("more_body", False):
                await self._release(self._start)

    async def _release(self, start: Message) -> None:
        content = self._content
        try:
            answer = msgspec.json.decode(content)
        except msgspec.DecodeError:
            answer = None
        if isinstance(answer, dict) and isinstance(error := answer.get("error"), dict):
            content = msgspec.json.encode({**answer, "error": named(error, self._body)})
            headers = MutableHeaders(raw=list(start["headers"]))
            headers["content-length"] = str(len(content))
            start = {**start, "headers": headers.raw}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": content})


def _is_refusal(start: Message) -> bool:
    content_type = Headers(raw=start["headers"]).get("content-type", "")
    return 400 <= start["status"] < 500 and content_type.startswith("application/json")
