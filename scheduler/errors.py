"""Errors that name what was wrong, shared by every package.

`LongtailError` is the root: catching it catches everything longtail raises on purpose. An
`InvalidInputError` is the caller's mistake; it carries the field, what was expected and what came, so
that an HTTP route can answer 4xx and a library user can fix the call. Broken invariants of our own are
`assert`, never these.
"""

from __future__ import annotations

_MAX_SHOWN_CHARS = 120


def shown(value: object) -> str:
    """`repr(value)` cut to a length that is safe to log and to send back."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 3] + "..."


class LongtailError(Exception):
    """Root of longtail's exceptions."""


class InvalidInputError(LongtailError, ValueError):
    """A field of the caller's input is wrong.

    Attributes:
        field: dotted path of the field, e.g. `sampling.top_p` or `prompts[3].token_ids[0]`.
        expected: what would have been right, in words.
        got: what came, as text cut to a safe length.

    """

    def __init__(self, field: str, expected: str, got: object) -> None:
        self.field = field
        self.expected = expected
        self.got = shown(got)
        super().__init__(f"{field}: expected {expected}, got {self.got}")
