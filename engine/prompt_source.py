"""Where fresh prompts come from, over many rounds: a sequence with a position in it, or an iterator.

The position counts the prompts that were submitted. It is in the journal, so that after a restart the same sequence
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from longtail.engine.errors import InvalidInputError


class PromptSource:
    """Draws prompts for one run.

    Args:
        prompts: all prompts of the training run, in order (a sequence), or an iterator of prompts.
        cursor: how many were submitted before.
        leftover: drawn from an iterator before, and not submitted; they come first.
        is_durable: the position survives a restart, which an iterator's can't.

    Raises:
        InvalidInputError: `prompts` is neither.

    """

    def __init__(self, prompts: Any, cursor: int, leftover: Sequence[Any] = (), *, is_durable: bool) -> None:
        self.cursor = cursor
        self._unsubmitted: list[Any] = []
        self._sequence: Sequence[Any] | None = None
        self._iterator: Iterator[Any] | None = None
        if isinstance(prompts, Sequence) and not isinstance(prompts, (str, bytes, Mapping)):
            self._sequence = prompts
        elif isinstance(prompts, Iterable) and not isinstance(prompts, (str, bytes, Mapping)) and not is_durable:
            self._iterator = chain(leftover, prompts)
        else:
            kinds = "a sequence of prompts, whose position the journal holds" if is_durable else "prompts"
            raise InvalidInputError("prompts", kinds, prompts)

    def draw(self, count: int) -> list[Any]:
        """The next prompts, at most `count`; fewer when there are no more. They count as drawn, not as submitted."""
        drawn: list[Any] = []
        if self._sequence is not None:
            drawn = list(self._sequence[self.cursor : self.cursor + count])
        else:
            assert self._iterator is not None
            for _ in range(count):
                try:
                    drawn.append(next(self._iterator))
                except StopIteration:
                    break
            self._unsubmitted += drawn
        self.cursor += len(drawn)
        return drawn

    def submitted(self, count: int) -> None:
        """The first `count` prompts that were drawn and not submitted yet are submitted now."""
        del self._unsubmitted[:count]

    @property
    def unsubmitted(self) -> list[Any]:
        """Prompts that an iterator gave away and nobody has."""
        return list(self._unsubmitted)
