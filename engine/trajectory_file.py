"""Trajectories on disk: JSON Lines, one `Trajectory` a line and nothing else.

Writing. A line and its newline go out in one `write` to a file opened for appending, so a killed process leaves
whole lines and at most one torn last line. What the kernel has taken survives the process; to survive the
machine, the file is synced every `sync_interval_s` and on `close()`. A line is written only if it decodes again
(a NaN log-probability does not). When a write fails, the file is cut back to its last whole line before the
error is raised, and the writer stays usable. One writer a file, by an exclusive lock that ends with its process
(and with whatever that process forked meanwhile).

Reading. The last line is *torn* when it is not JSON; readers skip it and continuing cuts it off. Every other line
that is not a trajectory is an error with its number: it was not this module that wrote it.

Continuing. A group that is not complete is run again under its own group id, all its members, in a new round.
One file then holds several *attempts* of a group, told apart by `round_id`; a trajectory id is in a file at
most once. `read_groups` gives exactly one attempt of each group: the complete one, or the last one if none is.
Attempts are never mixed: the members that finish before a run is cut or killed are the short ones, so a group
put together from two attempts would be shorter than what the model samples. For the same reason give each
member the seed of its first attempt where exactness matters: with fresh noise, groups that a kill caught are
sampled a second time only because they were long. Trainers that want every token, those of cut members
included, use `read_trajectories`, which gives all lines in file order.

A round's settings are next to the file, see `run_settings.py`. Instances are not thread-safe.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec

from longtail.engine.durable_files import sync_folder
from longtail.engine.errors import InvalidInputError
from longtail.engine.trajectory import Group, Trajectory
from longtail.engine.trajectory_lines import FileIndex, TrajectoryFileError, decoder, named_os_error, scan

__all__ = ["FileIndex", "TrajectoryFileError", "TrajectoryWriter", "index_file", "read_groups", "read_trajectories"]

logger = logging.getLogger(__name__)

_LOCK_POLL_S = 0.1


class TrajectoryWriter:
    """Appends trajectories to one file; a context manager.

    Args:
        path: the file.
        mode: `new` makes it (an empty file is taken too), `continue` goes on with one that is there.
        sync_interval_s: longest time that a written line may wait to be synced to disk, if more lines come.
        lock_timeout_s: how long to wait for another writer of the file.

    Attributes:
        index: what the file holds.
        num_torn_bytes: what `continue` cut off the end.

    Raises:
        TrajectoryFileError: the file exists (`new`) or does not (`continue`), another run writes it, or a line
            other than a torn last one is not a trajectory.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mode: Literal["new", "continue"] = "new",
        *,
        sync_interval_s: float = 5.0,
        lock_timeout_s: float = 5.0,
    ) -> None:
        if mode not in ("new", "continue"):
            raise InvalidInputError("mode", "new or continue", mode)
        self.path = Path(path)
        self.index = FileIndex(self.path)
        self.num_torn_bytes = 0
        self._sync_interval_s = sync_interval_s
        self._synced_at = time.monotonic()
        self._descriptor: int | None = None
        with named_os_error(self.path, "cannot be opened"):
            if self.path.exists() and not stat.S_ISREG(self.path.stat().st_mode):
                raise TrajectoryFileError(self.path, "is not a regular file")
            create = os.O_CREAT if mode == "new" else 0
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | create, 0o666)
        try:
            with named_os_error(self.path, "cannot be prepared"):
                _lock(descriptor, self.path, lock_timeout_s)
                if mode == "continue":
                    self._take_over(descriptor)
                elif num_bytes := os.fstat(descriptor).st_size:
                    raise TrajectoryFileError(
                        self.path, f"exists and has {num_bytes} bytes; continue it, or name another file"
                    )
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

    def append(self, trajectory: Trajectory) -> None:
        """Write one line.

        Raises:
            InvalidInputError: the trajectory would not read back, or its id is in the file.
            TrajectoryFileError: it could not be written whole (disk full, quota); the file is as before.

        """
        if self._descriptor is None:
            raise TrajectoryFileError(self.path, "is closed")
        if trajectory.trajectory_id in self.index:
            raise InvalidInputError("trajectory_id", f"an id that {self.path} does not have", trajectory.trajectory_id)
        try:
            line = msgspec.json.encode(trajectory) + b"\n"
            decoder.decode(line)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidInputError(
                f"trajectory {trajectory.trajectory_id}", f"one that reads back from JSON ({error})", trajectory
            ) from error
        offset = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            with named_os_error(self.path, f"could not take a line of {len(line)} bytes"):
                _write_all(self._descriptor, line)
        except BaseException:
            self._cut_back(offset)
            raise
        self.index.add(trajectory, offset, len(line))
        if time.monotonic() - self._synced_at >= self._sync_interval_s:
            self.sync()

    def sync(self) -> None:
        """Wait until every line so far is on the disk."""
        if self._descriptor is not None:
            with named_os_error(self.path, "could not be synced"):
                os.fdatasync(self._descriptor)
            self._synced_at = time.monotonic()

    def close(self) -> None:
        """Sync and release the file; safe to repeat."""
        if self._descriptor is None:
            return
        try:
            self.sync()
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    def _cut_back(self, offset: int) -> None:
        assert self._descriptor is not None
        try:
            os.ftruncate(self._descriptor, offset)
        except OSError:
            # A torn line may be at the end now; whatever came after it would make the file unreadable.
            os.close(self._descriptor)
            self._descriptor = None

    def _take_over(self, descriptor: int) -> None:
        """Index what is there and make the file end at a whole line."""
        end = 0
        last = b"\n"
        for line_number, offset, last, trajectory in scan(self.path):
            if trajectory.trajectory_id in self.index:
                raise TrajectoryFileError(
                    self.path, f"trajectory {trajectory.trajectory_id} is there twice", line_number
                )
            self.index.add(trajectory, offset, len(last))
            end = offset + len(last)
        self.num_torn_bytes = os.fstat(descriptor).st_size - end
        if self.num_torn_bytes:
            logger.warning("%s: cutting off a torn last line of %d bytes", self.path, self.num_torn_bytes)
            os.ftruncate(descriptor, end)
        if not last.endswith(b"\n"):
            _write_all(descriptor, b"\n")


def read_trajectories(path: str | os.PathLike[str]) -> Iterator[Trajectory]:
    """Every whole line in file order, the lines of superseded attempts included; may be read while it is written.

    Raises:
        TrajectoryFileError: names the line that is not a trajectory.

    """
    for _, _, _, trajectory in scan(Path(path)):
        yield trajectory


def index_file(path: str | os.PathLike[str]) -> FileIndex:
    """What a file holds, without taking its lock or changing it."""
    index = FileIndex(Path(path))
    for _, offset, line, trajectory in scan(Path(path)):
        index.add(trajectory, offset, len(line))
    return index


def read_groups(path: str | os.PathLike[str], group_size: int) -> Iterator[Group]:
    """One attempt of each group, in file order, one group in memory at a time.

    `group_size` is that of the run (`RunSettings.group_size`). An incomplete group has the members that its last
    attempt wrote, which may be fewer.
    """
    index = index_file(path)
    with named_os_error(Path(path), "cannot be read"), Path(path).open("rb") as file:
        for group_id in index.group_ids():
            places, complete = index.final_attempt(group_id, group_size)
            trajectories = []
            for place in places:
                file.seek(place.offset)
                trajectories.append(decoder.decode(file.read(place.num_bytes)))
            yield Group(
                group_id=group_id, trajectories=trajectories, complete=complete, metadata=trajectories[0].metadata
            )


def _write_all(descriptor: int, data: bytes) -> None:
    """One `write` unless the kernel takes less; going on then finishes the line or tells why it cannot."""
    view = memoryview(data)
    while view:
        num_written = os.write(descriptor, view)
        if num_written == 0:
            raise OSError(f"only {len(data) - len(view)} of {len(data)} bytes were taken")
        view = view[num_written:]


def _lock(descriptor: int, path: Path, timeout_s: float) -> None:
    # flock, not lockf: a POSIX record lock ends when this process closes any other descriptor of the file.
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TrajectoryFileError(path, f"is being written by another run (waited {timeout_s:g} s)") from None
            time.sleep(_LOCK_POLL_S)
