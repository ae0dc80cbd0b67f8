"""Where fresh prompts come from, over many rounds: a sequence with a position in it, or an iterator.

The position counts the prompts that were submitted. It is in the journal, so that after a restart the same sequence
goes on where it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
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
        InvalidInputError: `prompts` is neither, or a sequence that ends before the position.

    """

    def __init__(self, prompts: Any, cursor: int, leftover: Sequence[Any] = (), *, is_durable: bool) -> None:
        self.cursor = cursor
        self._unsubmitted: list[Any] = []
        self._leftover = deque(leftover)
        self._sequence: Any = None
        self._iterator: Iterator[Any] | None = None
        is_text = isinstance(prompts, (str, bytes, Mapping))
        if not is_text and hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__"):
            if len(prompts) < cursor:
                what = f"the sequence that earlier rounds took {cursor} prompts of, or an iterator (`iter(...)`)"
                raise InvalidInputError("prompts", what, f"{len(prompts)} prompts")
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
            drawn = []
            for prompt in islice(chain(self._take_leftover(), self._iterator), count):
                self._unsubmitted.append(prompt)  # one by one: the iterator may raise
                drawn.append(prompt)
        self.cursor += len(drawn)
        return drawn

    def submitted(self, count: int) -> None:
        """The first `count` prompts that were drawn and not submitted yet are submitted now."""
        del self._unsubmitted[:count]

    def discard(self, is_unfit: Callable[[Any], bool]) -> None:
        """Forget what an iterator gave and can't be submitted: it would come first again in every round."""
        self._unsubmitted = [prompt for prompt in self._unsubmitted if not is_unfit(prompt)]

    def _take_leftover(self) -> Iterator[Any]:
        while self._leftover:
            yield self._leftover.popleft()

    @property
    def unsubmitted(self) -> list[Any]:
        """Prompts that an iterator gave away and nobody has."""
        return [*self._unsubmitted, *self._leftover]
