r"""Finds the end of a boxed answer, `\boxed{...}`, in text that comes in pieces. Pure."""

from __future__ import annotations

#: Stop reason of a trajectory that ended with one.
BOXED_STOP_REASON = "boxed_answer"

_BEGIN = "\\boxed{"


class BoxedAnswer:
    """Reads the text of one trajectory. A brace behind a backslash is a character of the answer."""

    def __init__(self) -> None:
        self._num_read = 0
        self._num_matched = 0
        self._depth = 0
        self._is_escaped = False

    def is_complete_in(self, text: str) -> bool:
        """Whether an answer ends in what is new; `text` is all text so far."""
        new, self._num_read = text[self._num_read :], len(text)
        return any([self._read(char) for char in new])

    def _read(self, char: str) -> bool:
        if not self._depth:
            # No proper prefix of the beginning but its backslash can begin it again.
            self._num_matched = self._num_matched + 1 if char == _BEGIN[self._num_matched] else int(char == _BEGIN[0])
            if self._num_matched == len(_BEGIN):
                self._num_matched, self._depth = 0, 1
            return False
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char in "{}":
            self._depth += 1 if char == "{" else -1
            return not self._depth
        return False
