"""Where fresh prompts come from, over many rounds: a sequence with a position in it, or an iterator.

The position counts the prompts that were submitted. It is in the journal, so that after a restart the same sequence
goes on where it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from longtail.engine.errors import InvalidInputError


class PromptSource:
    """Draws prompts for one run.

    Args:
        prompts: all prompts of the training run, in order (anything with a length and positions), or an iterator.
        cursor: how many were submitted before.
        leftover: drawn from an iterator before, and not submitted; they come first.
        is_durable: the position survives a restart, which an iterator's can't.

    Raises:
        InvalidInputError: `prompts` is neither.

    """

    def __init__(self, prompts: Any, cursor: int, leftover: Sequence[Any] = (), *, is_durable: bool) -> None:
        self.cursor = cursor
        self._unsubmitted: list[Any] = []
        self._leftover = deque(leftover)
        self._sequence: Any = None
        self._iterator: Iterator[Any] | None = None
        is_text = isinstance(prompts, (str, bytes, Mapping))
        if not is_text and hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__"):
            self._sequence = prompts
        elif isinstance(prompts, Iterator) and not is_durable:
            self._iterator = prompts
        elif is_durable:
            raise InvalidInputError("prompts", "a sequence of prompts, whose position the journal holds", prompts)
        else:
            raise InvalidInputError("prompts", "a sequence or an iterator (`iter(...)`) of prompts", prompts)

    def draw(self, count: int) -> list[Any]:
        """The next prompts, at most `count`; fewer when there are no more. They count as drawn, not as submitted."""
        if self._iterator is None:
            stop = min(self.cursor + count, len(self._sequence))
            drawn = [self._sequence[position] for position in range(self.cursor, stop)]
        else:
            drawn = [self._leftover.popleft() for _ in range(min(count, len(self._leftover)))]
            drawn += islice(self._iterator, count - len(drawn))
            self._unsubmitted += drawn
        self.cursor += len(drawn)
        return drawn

    def submitted(self, count: int) -> None:
        """The first `count` prompts that were drawn and not submitted yet are submitted now."""
        del self._unsubmitted[:count]

    @property
    def unsubmitted(self) -> list[Any]:
        """Prompts that an iterator gave away and nobody has."""
        return [*self._unsubmitted, *self._leftover]
