"""A durable, crash-safe log of byte strings: what `append` returned from survives SIGKILL and power loss.

It knows nothing of what payloads mean. All it holds is read into memory at opening, so its owner keeps it bounded:
`compact` replaces the content by what still matters.

File format, version 1; u32 is a little-endian unsigned number of 4 bytes:

    header  16 bytes `longtail-journal`, u32 version, 8 bytes mark, u32 CRC-32 of the mark
    frame   8 bytes mark, u32 CRC-32 of length and body, u32 length of the body, body
    body    MessagePack array of binaries: the payloads of one `append`; at most `MAX_FRAME_BYTES` with its overhead

Recovery. A frame is on the disk before the next is begun, so only one that no other frame follows can be unfinished,
whatever the file system kept of it: less, zeros, or its end without its beginning. Frames are looked for by the mark,
which is random and new for each file, since a damaged length would make all that follows look like an unfinished
body. A frame that is not intact is *torn* and cut off if no mark follows; else it is corruption, an error that leaves
the file alone. A file no longer than a header that is all zeros or begins like one counts as empty.

Opening writes the last frame again and syncs file and folder: that frame and the rename of a compaction may be only in
memory when the last user was killed or could not sync (a kernel keeps the pages that it failed to write, as clean).

One user at a time, by an exclusive lock on the file that ends with its process (and with whatever that process forked
meanwhile). `compact` locks the new file before it gets the name, and who gets a lock checks that the name still leads
to the locked file, so there is no gap. `PATH.compacting` belongs to the journal. Instances are not thread-safe.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from zlib import crc32

import msgspec

from longtail.engine.durable_files import sync_folder
from longtail.engine.errors import InvalidInputError, LongtailError

__all__ = ["MAX_FRAME_BYTES", "Journal", "JournalError"]

logger = logging.getLogger(__name__)

# A frame is in memory whole, several times, when it is written.
MAX_FRAME_BYTES = 1 << 30

# Below this a journal is not worth compacting, nor before it has grown so many times.
MIN_COMPACT_BYTES = 1 << 22
_GROWTH = 3

_SIGNATURE = b"longtail-journal" + struct.pack("<I", 1)
_MARK_BYTES = 8
_HEADER = struct.Struct("<20s8sI")
_FRAME = struct.Struct("<8sII")
_LOCK_POLL_S = 0.05
_decoder = msgspec.msgpack.Decoder(list[bytes])


class JournalError(LongtailError, RuntimeError):
    """A journal cannot be opened or written.

    Attributes:
        path: the file.
        reason: what was expected and what came, or what the operating system refused.
        is_broken: the journal takes nothing more until it is opened anew.

    """

    def __init__(self, path: Path, reason: str, *, is_broken: bool = False) -> None:
        self.path = path
        self.reason = reason
        self.is_broken = is_broken
        super().__init__(f"{path}: {reason}")


class Journal:
    """Opens or creates a journal, in a folder that exists; a context manager.

    Args:
        path: the file; symbolic links are followed once, here.
        lock_timeout_s: how long to wait for another user of the file.

    Attributes:
        path: the file, absolute.
        payloads: what the file held when it was opened, in order.
        num_torn_bytes: what opening cut off the end.
        num_bytes: current size of the file.

    Raises:
        JournalError: another user has the file, it is no journal, a frame before the last is not intact, or the
            operating system refuses.

    """

    def __init__(self, path: str | os.PathLike[str], *, lock_timeout_s: float = 5.0) -> None:
        self.path = Path(os.path.realpath(path))
        self.payloads: list[bytes] = []
        self.num_torn_bytes = 0
        self.num_bytes = 0
        self._new_path = self.path.with_name(self.path.name + ".compacting")
        self._mark = b""
        self._broken: str | None = None
        self._compact_at = 0
        self._descriptor: int | None = None
        with self._os_errors("could not be opened"):
            descriptor = _open_locked(self.path, lock_timeout_s)
            try:
                self._recover(descriptor)
                self._new_path.unlink(missing_ok=True)
                sync_folder(self.path)
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def take(self) -> list[bytes]:
        """`payloads`, which the journal then no longer holds."""
        payloads, self.payloads = self.payloads, []
        return payloads

    def append(self, payloads: Sequence[bytes]) -> None:
        """Add payloads, after a crash all or none of them; they are on the disk when this returns.

        Raises:
            InvalidInputError: a payload is not `bytes`, or together they are too large for a frame.
            JournalError: they could not be written; the journal is as before. If what was written of them could not
                be cut off again, or not be synced, the journal takes nothing more until it is opened anew.

        """
        descriptor = self._usable_descriptor()
        if not payloads:
            return
        frame = _frame(self._mark, payloads)
        try:
            with self._os_errors(f"could not take a frame of {len(frame)} bytes"):
                _write_all(descriptor, frame, self.num_bytes)
            with self._os_errors("could not be synced", break_journal=True):
                os.fdatasync(descriptor)
        except BaseException:
            with contextlib.suppress(JournalError), self._os_errors("could not be cut back", break_journal=True):
                os.ftruncate(descriptor, self.num_bytes)
            raise
        self.num_bytes += len(frame)

    def compact(self, payloads: Sequence[bytes]) -> None:
        """Replace all that the journal holds, after a crash wholly or not at all; needs room for old and new.

        Raises:
            InvalidInputError: a payload is not `bytes`, or too large for a frame; the journal is as before.
            JournalError: the new file could not be written; the journal is as before. If the folder could not be
                synced, the journal takes nothing more until it is opened anew.

        """
        old = self._usable_descriptor()
        with self._os_errors("could not be compacted"):
            self._new_path.unlink(missing_ok=True)
            new = os.open(self._new_path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.fchmod(new, stat.S_IMODE(os.fstat(old).st_mode))
                mark = os.urandom(_MARK_BYTES)
                num_bytes = _write_all(new, _header(mark), 0)
                for payload in payloads:
                    num_bytes += _write_all(new, _frame(mark, [payload]), num_bytes)
                os.fsync(new)
                os.rename(self._new_path, self.path)
            except BaseException:
                os.close(new)
                with contextlib.suppress(OSError):
                    self._new_path.unlink()
                raise
            self._descriptor, self._mark, self.num_bytes = new, mark, num_bytes
            with contextlib.suppress(OSError):
                os.close(old)
        # Until this is done a power loss brings the old file back, and what the new one got would be gone.
        with self._os_errors("could not be renamed durably", break_journal=True):
            sync_folder(self.path)

    def compact_if_large(self, payloads: Callable[[], Sequence[bytes]]) -> None:
        """Call `compact` with what `payloads` returns if it is time.

        A failure of either is logged and forgotten for a while: all that was to be on the disk is there. A journal that
        can't be used says so at its next change.
        """
        if self.num_bytes < max(MIN_COMPACT_BYTES, self._compact_at):
            return
        try:
            self.compact(payloads())
            self._compact_at = _GROWTH * self.num_bytes
        except JournalError as error:
            logger.warning("%s could not be compacted: %s", self.path.name, error)
            self._compact_at = self.num_bytes + MIN_COMPACT_BYTES

    def close(self) -> None:
        """Release the file; safe to repeat."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with self._os_errors("could not be closed"):
                os.close(descriptor)

    def _usable_descriptor(self) -> int:
        if self._descriptor is None:
            raise JournalError(self.path, "is closed")
        if self._broken is not None:
            reason = f"takes nothing more until it is opened anew: it {self._broken}"
            raise JournalError(self.path, reason, is_broken=True)
        with self._os_errors("cannot be found under its name"):
            if not os.path.samestat(os.stat(self.path), os.fstat(self._descriptor)):
                raise JournalError(self.path, "was replaced by another file")
        return self._descriptor

    @contextlib.contextmanager
    def _os_errors(self, problem: str, *, break_journal: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"{problem} ({error.strerror or error})"
            if break_journal and self._broken is None:
                # For good: after a sync that failed the next one may succeed, without the pages that were lost.
                self._broken = reason
            raise JournalError(self.path, reason, is_broken=break_journal) from error

    def _recover(self, descriptor: int) -> None:
        """Read what is there, and make the file end at a frame that is on the disk."""
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read()
        header = data[: _HEADER.size]
        self._mark = header[len(_SIGNATURE) : len(_SIGNATURE) + _MARK_BYTES]
        if header == _header(self._mark):
            last, end = self._read_frames(data)
            kept = data[last:end]
        elif len(data) <= _HEADER.size and (_SIGNATURE.startswith(data[: len(_SIGNATURE)]) or not any(data)):
            self._mark = os.urandom(_MARK_BYTES)
            last, end, kept = 0, 0, _header(self._mark)
        else:
            raise JournalError(self.path, f"expected an intact header that begins with {_SIGNATURE!r}, got {header!r}")
        self.num_bytes = last + len(kept)
        self.num_torn_bytes = len(data) - end
        if self.num_torn_bytes:
            logger.warning("%s: cutting off a torn frame of %d bytes", self.path, self.num_torn_bytes)
            os.ftruncate(descriptor, self.num_bytes)
        _write_all(descriptor, kept, last)
        os.fsync(descriptor)

    def _read_frames(self, data: bytes) -> tuple[int, int]:
        """Collect the payloads; where the last intact frame (the header if there is none) begins and ends."""
        last, end = 0, _HEADER.size
        view = memoryview(data)
        while True:
            head = data[end : end + _FRAME.size]
            body = view[end + _FRAME.size :][: int.from_bytes(head[_FRAME.size - 4 :], "little")]
            # Also at the end of the file and where it lacks a part: both are shorter here than the head says.
            if head != _head(self._mark, body):
                break
            try:
                self.payloads += _decoder.decode(body)
            except msgspec.DecodeError as error:
                raise JournalError(self.path, f"frame at byte {end}: expected an array of binaries, {error}") from error
            last, end = end, end + len(head) + len(body)
        if (following := data.find(self._mark, end + _FRAME.size)) >= 0:
            raise JournalError(
                self.path,
                f"frame at byte {end}: expected an intact one, since another follows at byte {following}, "
                f"got {head.hex()} and a body that this does not fit",
            )
        return last, end


def _header(mark: bytes) -> bytes:
    return _HEADER.pack(_SIGNATURE, mark, crc32(mark))


def _frame(mark: bytes, payloads: Sequence[bytes]) -> bytes:
    for payload in payloads:
        if not isinstance(payload, bytes):
            raise InvalidInputError("payloads", "bytes each", payload)
    # MessagePack adds at most 5 bytes to each payload and to the array.
    if (num_bytes := sum(map(len, payloads)) + 5 * len(payloads) + 5) > MAX_FRAME_BYTES:
        raise InvalidInputError("payloads", f"at most {MAX_FRAME_BYTES} bytes for one frame", num_bytes)
    body = msgspec.msgpack.encode(list(payloads))
    return _head(mark, body) + body


def _head(mark: bytes, body: bytes | memoryview) -> bytes:
    return _FRAME.pack(mark, crc32(body, crc32(len(body).to_bytes(4, "little"))), len(body))


def _write_all(descriptor: int, data: bytes, offset: int) -> int:
    """Write at `offset`, however little the kernel takes at a time; the number of bytes."""
    num_written = 0
    while num_written < len(data):
        num_taken = os.pwrite(descriptor, memoryview(data)[num_written:], offset + num_written)
        if num_taken == 0:
            raise OSError(f"only {num_written} of {len(data)} bytes were taken")
        num_written += num_taken
    return num_written


def _open_locked(path: Path, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise JournalError(path, "expected a regular file")
            # flock, not lockf: a POSIX record lock ends when this process closes any other descriptor of the file.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return os.dup(descriptor)
        except (BlockingIOError, FileNotFoundError):
            pass
        finally:
            os.close(descriptor)
        if time.monotonic() >= deadline:
            raise JournalError(path, f"expected to be its only user, another one still had it after {timeout_s:g} s")
        time.sleep(_LOCK_POLL_S)
