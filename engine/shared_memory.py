"""Memory that processes of one host share: an anonymous file of one size, named by a path and a token.

The process that makes it keeps it; others of the same user open it as `/proc/<pid>/fd/<n>` for as long as that process
lives. The memory begins with a random token, so that whoever reads the expected one has the same memory, and not that
of another host or of a process that got the number since. Its size is sealed: a mapping cannot be cut off under its
reader.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import sys
import weakref
from contextlib import suppress
from typing import Self

from longtail.engine.errors import InvalidInputError

TOKEN_BYTES = 16

_PATH = re.compile(r"/proc/[1-9][0-9]{0,9}/fd/[0-9]{1,9}")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class SharedMemory:
    """`num_bytes` of memory, of which the first `TOKEN_BYTES` are the token.

    Use `create` or `open`. The mapping lives as long as this object or any view of `buffer`.

    Attributes:
        path: where other processes of this host find it.
        token: in hexadecimal.
        buffer: all of it. Of memory opened with `private` it may be written, which nobody else sees.

    """

    def __init__(self, path: str, token: str, mapping: mmap.mmap, fd: int | None) -> None:
        self.path = path
        self.token = token
        self.num_bytes = len(mapping)
        self.buffer = memoryview(mapping)
        self._mapping = mapping
        # The mapping needs no help; the descriptor is ours.
        self._close_fd = None if fd is None else weakref.finalize(self, os.close, fd)

    @classmethod
    def create(cls, name: str, num_bytes: int) -> Self:
        """New memory, all zero and all there, so that nobody fails later for want of a page.

        Raises:
            OSError: the system has no such memory, or not so much.

        """
        assert num_bytes >= TOKEN_BYTES
        # The kernel gives such memory until there is none for anybody, and then kills somebody.
        if num_bytes > (available := _available_bytes()):
            raise OSError(errno.ENOMEM, f"{num_bytes} bytes of shared memory, where {available} are available")
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, num_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            mapping = mmap.mmap(fd, num_bytes)
        except BaseException:
            os.close(fd)
            raise
        with suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        token = secrets.token_bytes(TOKEN_BYTES)
        mapping[:TOKEN_BYTES] = token
        return cls(f"/proc/{os.getpid()}/fd/{fd}", token.hex(), mapping, fd)

    @classmethod
    def open(cls, path: str, token: str, *, private: bool = False, field: str = "path") -> Self:
        """Memory that another process made.

        Args:
            path: of the memory.
            token: that it has to begin with.
            private: what is written stays in this process.
            field: of the caller's input, for errors.

        Raises:
            InvalidInputError: it is not there, not this user's, or other memory.

        """
        if not _PATH.fullmatch(path):
            raise InvalidInputError(field, "/proc/<pid>/fd/<number>", path)
        expected = "shared memory of a process on this host that this user may open"
        try:
            fd = os.open(path, (os.O_RDONLY if private else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise InvalidInputError(field, expected, f"{path}: {error.strerror}") from error
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise OSError(0, "its size is not sealed")
            if private:
                mapping = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            else:
                mapping = mmap.mmap(fd, 0)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InvalidInputError(field, expected, f"{path}: {reason}") from error
        finally:
            os.close(fd)
        if not secrets.compare_digest(mapping[:TOKEN_BYTES].hex().encode(), token.encode(errors="replace")):
            raise InvalidInputError(field, f"{expected}, with the token that came with it", f"{path}: another token")
        return cls(path, token, mapping, None)

    def close(self) -> None:
        """Give up the path; the memory goes with the last view of it. Safe to call twice."""
        if self._close_fd is not None:
            self._close_fd()
        with suppress(BufferError):
            self.buffer.release()
            self._mapping.close()


def _available_bytes() -> int:
    with open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) << 10
    return sys.maxsize
