"""The trainer's prompts: one sequence that only grows, durable, of which used positions may be forgotten.

`RolloutEngine` draws on it by position, as on any sequence; what it will not draw again is said by `forget`. Prompts
are kept as MessagePack, so that the bound on their bytes is one on memory. Any thread may call any method.

A file of the journal begins with a `_Begin`; an `_Appended` is followed by its prompts, one payload each.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, overload

import msgspec

from longtail.engine.journal import Journal, JournalError
from longtail.engine.prompts import Prompt
from longtail.trainer_bridge.service.refusals import Refusal


class _Begin(msgspec.Struct, tag=True, frozen=True):
    first: int = 0


class _Appended(msgspec.Struct, tag=True, frozen=True):
    first: int
    count: int


class PromptLog(Sequence[Prompt]):
    """See the module.

    Args:
        path: of the journal; `None` keeps everything in memory.
        max_bytes: of the prompts that are held.

    Attributes:
        first: the lowest position that is held.
        num_bytes: of the prompts that are held.

    Raises:
        JournalError: the file is another's, in use, or holds what this version can't read.

    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, max_bytes: int = 1 << 28) -> None:
        self.first = self._end = 0
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._held: list[bytes] = []
        self._lock = threading.RLock()
        self._journal = None if path is None else Journal(path)
        try:
            if self._journal is not None and not self._replay(self._journal):
                self._journal.append([_encoder.encode(_Begin())])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up the journal."""
        with self._lock:
            if self._journal is not None:
                self._journal.close()

    def __len__(self) -> int:
        return self._end  # without the lock, which may be held while the disk writes

    @overload
    def __getitem__(self, position: int) -> Prompt: ...
    @overload
    def __getitem__(self, position: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, position: int | slice) -> Prompt | Sequence[Prompt]:
        """A prompt that is held; `IndexError` for one that was forgotten or is not there yet."""
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        with self._lock:
            place = position - self.first
            if not 0 <= place < len(self._held):
                raise IndexError(f"prompt {position}: positions {self.first} to {len(self) - 1} are here")
            payload = self._held[place]
        return _prompt_decoder.decode(payload)

    def append(self, prompts: Sequence[Prompt], first: int) -> int:
        """Take the prompts of the positions from `first`; those that are here on the disk when it returns.

        Positions that there were before are skipped; returns how many.

        Raises:
            Refusal: positions are missing before `first`, or there is no room.
            JournalError: the prompts could not be written; none of them was taken.

        """
        with self._lock:
            if first > len(self):
                what = f"at most {len(self)}, the number of prompts"
                raise Refusal("gap", "prompts are missing", field="first", expected=what, got=first)
            num_known = min(len(self) - first, len(prompts))
            payloads = [_encoder.encode(prompt) for prompt in prompts[num_known:]]
            num_bytes = sum(map(len, payloads))
            if self.num_bytes + num_bytes > self._max_bytes:
                what = f"at most {self._max_bytes - self.num_bytes} bytes more before others were used"
                raise Refusal("full", "there is no room for prompts", field="prompts", expected=what, got=num_bytes)
            if payloads and self._journal is not None:
                self._journal.append([_encoder.encode(_Appended(len(self), len(payloads))), *payloads])
            self._held += payloads
            self._end += len(payloads)
            self.num_bytes += num_bytes
            self._compact_if_large()
            return num_known

    def forget(self, first: int) -> None:
        """Positions below `first` are not drawn any more."""
        with self._lock:
            if (count := min(first - self.first, len(self._held))) > 0:
                self.num_bytes -= sum(map(len, self._held[:count]))
                del self._held[:count]
                self.first += count
                self._compact_if_large()

    def _replay(self, journal: Journal) -> bool:
        """Whether there was anything."""
        payloads = iter(journal.take())
        is_empty = True
        for number, payload in enumerate(payloads):
            try:
                record = _decoder.decode(payload)
                if isinstance(record, _Begin) != is_empty:
                    raise ValueError("a file has one beginning")
                is_empty = False
                if isinstance(record, _Begin):
                    self.first = self._end = record.first
                    continue
                if record.first != len(self):
                    raise ValueError(f"position {record.first} after {len(self)} prompts")
                self._take(payloads, record.count)
            except (msgspec.DecodeError, ValueError, StopIteration) as error:
                raise JournalError(journal.path, f"record {number} is not one of prompts ({error!r})") from error
        return not is_empty

    def _take(self, payloads: Iterator[bytes], count: int) -> None:
        for _ in range(count):
            self._held.append(next(payloads))
            self._end += 1
            self.num_bytes += len(self._held[-1])

    def _compact_if_large(self) -> None:
        if self._journal is not None:
            self._journal.compact_if_large(self._compacted)

    def _compacted(self) -> list[bytes]:
        """All that is held, as a journal begins."""
        records = [_encoder.encode(_Begin(self.first))]
        if self._held:
            records += [_encoder.encode(_Appended(self.first, len(self._held))), *self._held]
        return records


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_Begin | _Appended)
_prompt_decoder = msgspec.msgpack.Decoder(Prompt)
