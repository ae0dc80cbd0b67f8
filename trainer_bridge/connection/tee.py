"""One iterable for several readers in threads of their own: weights that are pushed to several engines at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import Full, Queue
from typing import Any, TypeVar

T = TypeVar("T")

#: Items that the fastest reader may be ahead of the slowest.
_MAX_AHEAD = 2
_LOOK_S = 0.05


class Tee:
    """One iterable for several readers, which is read once and never far ahead of the slowest of them."""

    def __init__(self, num_readers: int) -> None:
        self._queues: list[Queue[Any]] = [Queue(_MAX_AHEAD) for _ in range(num_readers)]
        self._has_left = [threading.Event() for _ in range(num_readers)]

    def reading(self, i: int, push: Callable[..., T]) -> Callable[..., T]:
        """`push` with what reader `i` gets as its first argument."""

        def run(*arguments: Any, **options: Any) -> T:
            try:
                return push(self._items(i), *arguments, **options)
            finally:
                self._has_left[i].set()

        return run

    def feed(self, items: Iterable[Any]) -> None:
        """Read `items` to the end; what it raises is raised by every reader, and here.

        Returns early when all readers have left.
        """
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:
            self._put(_Failed(error))
            raise
        self._put(_END)

    def _put(self, item: Any) -> bool:
        for queue, has_left in zip(self._queues, self._has_left, strict=True):
            while not has_left.is_set():
                try:
                    queue.put(item, timeout=_LOOK_S)
                    break
                except Full:
                    continue
        return not all(has_left.is_set() for has_left in self._has_left)

    def _items(self, i: int) -> Iterator[Any]:
        while (item := self._queues[i].get()) is not _END:
            if isinstance(item, _Failed):
                raise item.error
            yield item


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


_END = object()
