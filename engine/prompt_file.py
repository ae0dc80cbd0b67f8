"""Prompts from a JSON Lines file, and one checksum over a list of prompts.

Each line is an object with exactly one of `token_ids` (integers), `text` (a string) and `messages` (objects with
`role` and `content`), and optionally `id` (unique in the file; the group's id) and `metadata` (an object). Lines of
blanks are skipped. Nothing is tokenised here: whether ids are in the vocabulary and prompts fit the model is
checked by the engine, which knows both.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from longtail.engine.errors import InvalidInputError
from longtail.engine.prompts import Prompt
from longtail.scheduler.limits import MAX_ID_CHARS

ROLES = ("system", "user", "assistant", "tool")

_FIELDS = ("token_ids", "text", "messages", "id", "metadata")


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Every prompt of a file, in order. A prompt without an id gets `line-<number>`.

    Raises:
        InvalidInputError: the file cannot be read or has no prompt, or a line is wrong; its `field` says where,
            e.g. `prompts.jsonl:7.messages[0].role`.

    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InvalidInputError(str(path), f"a readable file ({error.strerror or error})", str(path)) from error
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        prompt = _parse(line, where, f"line-{number}")
        assert prompt.group_id is not None
        if (first := seen.setdefault(prompt.group_id, number)) != number:
            raise InvalidInputError(f"{where}.id", f"an id that line {first} does not have", prompt.group_id)
        prompts.append(prompt)
    if not prompts:
        raise InvalidInputError(str(path), "at least one prompt, one JSON object a line", "none")
    return prompts


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """A checksum that is the same exactly when the prompts, their ids and their metadata are."""
    rows = [[p.group_id, p.token_ids, p.text, p.messages, p.metadata] for p in prompts]
    return hashlib.sha256(msgspec.json.encode(rows, order="deterministic")).hexdigest()


def _parse(line: bytes, where: str, default_id: str) -> Prompt:
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidInputError(where, f"a JSON object ({error})", line.decode(errors="replace")) from error
    if not isinstance(value, dict):
        raise InvalidInputError(where, "a JSON object", value)
    for name in value:
        if name not in _FIELDS:
            raise InvalidInputError(f"{where}.{name}", "one of the fields " + ", ".join(_FIELDS), value[name])
    kinds: dict[str, Callable[[object, str], Any]] = {
        "token_ids": _token_ids,
        "text": _text,
        "messages": _messages,
    }
    given = [name for name in kinds if name in value]
    if len(given) != 1:
        raise InvalidInputError(where, "exactly one of " + ", ".join(kinds), given)
    prompt_id = _text(value.get("id", default_id), f"{where}.id")
    if len(prompt_id) > MAX_ID_CHARS:
        raise InvalidInputError(f"{where}.id", f"1 to {MAX_ID_CHARS} characters", prompt_id)
    metadata = value.get("metadata", {})
    if not isinstance(metadata, dict):
        raise InvalidInputError(f"{where}.metadata", "an object", metadata)
    name = given[0]
    content = kinds[name](value[name], f"{where}.{name}")
    return Prompt(**{name: content}, group_id=prompt_id, metadata=metadata)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidInputError(where, "a string that is not empty", value)
    return value


def _token_ids(value: object, where: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise InvalidInputError(where, "a list of at least one token id", value)
    for i, token_id in enumerate(value):
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise InvalidInputError(f"{where}[{i}]", "an integer >= 0", token_id)
    return value


def _messages(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InvalidInputError(where, "a list of at least one message", value)
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise InvalidInputError(f"{where}[{i}]", "an object with role and content", message)
        if (role := message.get("role")) not in ROLES:
            raise InvalidInputError(f"{where}[{i}].role", "one of " + ", ".join(ROLES), role)
        if not isinstance(message.get("content"), str):
            raise InvalidInputError(f"{where}[{i}].content", "a string", message.get("content"))
    return value
