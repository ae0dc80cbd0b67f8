"""The JSON of `/v1/rollouts`: the request body, checked, and the lines of the answer.

A body of the wrong shape is an `InvalidInputError` that names the field, by its path in the body. What the prompts and
numbers mean is checked where every caller's are: in `longtail.engine.rounds` and `longtail.engine.config`.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from longtail.engine.config import SamplingConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import RoundStats, Trajectory

_JSON_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_NAMED_FIELD = re.compile(r"Object (?P<problem>contains unknown|missing required) field `(?P<name>[^`]*)`")


class PromptBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One prompt; see `longtail.engine.prompts.Prompt`."""

    token_ids: list[Any] | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    group_id: str | None = None
    max_tokens: int | list[Any] | None = None
    seed: int | None = None
    metadata: dict[str, Any] = {}


class RolloutBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/rollouts`; see `RolloutEngine.stream` for the arguments.

    Attributes:
        prompts: one a group.
        sampling: fields of `SamplingConfig`.

    """

    prompts: list[Any]
    group_size: int = 1
    target_groups: int | None = None
    over_provision: float | None = None
    sampling: dict[str, Any] = {}
    round_id: str | None = None

    def checked_prompts(self) -> list[Prompt]:
        """The prompts as the engine takes them.

        Raises:
            InvalidInputError: names the prompt by its position, e.g. `prompts[3].text`.

        """
        return [
            Prompt(**msgspec.structs.asdict(_convert(prompt, PromptBody, f"prompts[{i}]")))
            for i, prompt in enumerate(self.prompts)
        ]

    def checked_sampling(self) -> SamplingConfig:
        """The sampling parameters.

        Raises:
            InvalidInputError: names the field, e.g. `sampling.top_p`.

        """
        known = SamplingConfig.__dataclass_fields__
        for name in self.sampling:
            if name not in known:
                raise InvalidInputError(f"sampling.{name}", "one of " + ", ".join(known), name)
        return SamplingConfig(**self.sampling)


class TrajectoryLine(Trajectory, frozen=True, kw_only=True, tag="trajectory", tag_field="type"):
    """One trajectory, as soon as it has ended."""


class RoundLine(msgspec.Struct, frozen=True, kw_only=True, tag="round", tag_field="type"):
    """The last line of a round that came to its end, cut or not."""

    round_id: str
    target_groups: int
    stats: RoundStats


class ErrorLine(msgspec.Struct, frozen=True, kw_only=True, tag="error", tag_field="type"):
    """The last line of a round that did not come to its end; `error` as in `longtail.engine.server.problems`."""

    round_id: str
    error: dict[str, Any]


#: What a client decodes a line with: `msgspec.json.decode(line, type=Line)`.
Line = TrajectoryLine | RoundLine | ErrorLine

_encoder = msgspec.json.Encoder()


def encode_line(line: Line) -> bytes:
    """One line of NDJSON."""
    return _encoder.encode(line) + b"\n"


def trajectory_line(trajectory: Trajectory) -> TrajectoryLine:
    """A trajectory as a line."""
    return TrajectoryLine(**{name: getattr(trajectory, name) for name in Trajectory.__struct_fields__})


def parse_body(value: Any) -> RolloutBody:
    """The body of `POST /v1/rollouts` from its JSON.

    Raises:
        InvalidInputError: names the field, or `body` when it is no object.

    """
    body: RolloutBody = _convert(value, RolloutBody, "")
    return body


def _convert(value: Any, kind: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message = str(error)
        match = _JSON_PATH.search(message)
        path = match["path"] if match else ""
        expected = (message[: match.start()] if match else message).removeprefix("Expected ")
        got = _look_up(value, path)
        if (named := _NAMED_FIELD.match(expected)) is not None:
            path = f"{path}.{named['name']}" if path else named["name"]
            is_missing = named["problem"] == "missing required"
            expected, got = ("it to be there", "nothing") if is_missing else ("no such field", named["name"])
        raise InvalidInputError(".".join(part for part in (where, path) if part) or "body", expected, got) from error


def _look_up(value: Any, path: str) -> Any:
    """What is at `path`, as far as the path says: msgspec writes `[...]` for any place in a list."""
    for name in path.split(".") if path else ():
        if not isinstance(value, dict) or name not in value:
            return value
        value = value[name]
    return value
