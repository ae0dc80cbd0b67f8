"""The lines of a trajectory file: decoding them, and an index of where each trajectory is.

What a file may hold and what its reader promises is in `trajectory_file.py`; this module neither writes nor locks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from longtail.engine.errors import InvalidInputError, LongtailError
from longtail.engine.trajectory import Trajectory

decoder = msgspec.json.Decoder(Trajectory)


class TrajectoryFileError(LongtailError, RuntimeError):
    """A trajectory file cannot be read, written or continued.

    Attributes:
        path: the file.
        line: number of the line that is wrong, 1-based, if it is one line.

    """

    def __init__(self, path: Path, problem: str, line: int | None = None) -> None:
        self.path = path
        self.line = line
        super().__init__(f"{path}{'' if line is None else f':{line}'}: {problem}")


class Place(NamedTuple):
    """One line of the file, and whether its trajectory ended as `stop`, `length` or `repetition`."""

    offset: int
    num_bytes: int
    ended_by_itself: bool


class FileIndex:
    """Where each trajectory of a file is, by group and attempt; holds no tokens."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._attempts: dict[str, dict[str, dict[int, Place]]] = {}
        self._trajectory_ids: set[str] = set()

    def __len__(self) -> int:
        """Lines, those of every attempt."""
        return len(self._trajectory_ids)

    def __contains__(self, trajectory_id: object) -> bool:
        return trajectory_id in self._trajectory_ids

    def add(self, trajectory: Trajectory, offset: int, num_bytes: int) -> None:
        """Note a line that `trajectory` has in the file."""
        attempt = self._attempts.setdefault(trajectory.group_id, {}).setdefault(trajectory.round_id, {})
        attempt[trajectory.index] = Place(offset, num_bytes, trajectory.ended_by_itself)
        self._trajectory_ids.add(trajectory.trajectory_id)

    def complete_groups(self, group_size: int) -> list[str]:
        """Ids of the groups with an attempt whose members all finished by themselves, in file order."""
        return [group_id for group_id in self._attempts if self.final_attempt(group_id, group_size)[1]]

    def missing_groups(self, group_ids: Iterable[str], group_size: int) -> list[str]:
        """Those of `group_ids` that have to be run (again), in the order given."""
        complete = set(self.complete_groups(group_size))
        return [group_id for group_id in group_ids if group_id not in complete]

    def group_ids(self) -> list[str]:
        """Every group that has a line, in file order."""
        return list(self._attempts)

    def final_attempt(self, group_id: str, group_size: int) -> tuple[list[Place], bool]:
        """The lines that count for a group, by index, and whether they make it complete."""
        places: dict[int, Place] = {}
        for places in self._attempts[group_id].values():
            if (largest := max(places)) >= group_size:
                raise InvalidInputError(
                    "group_size", f"more than {largest}, an index in group {group_id} of {self._path}", group_size
                )
            if len(places) == group_size and all(place.ended_by_itself for place in places.values()):
                return [places[index] for index in sorted(places)], True
        return [places[index] for index in sorted(places)], False


def scan(path: Path) -> Iterator[tuple[int, int, bytes, Trajectory]]:
    """Line number, offset, bytes and trajectory of every whole line."""
    offset = 0
    number = 0
    with named_os_error(path, "cannot be read"), path.open("rb") as file:
        while line := file.readline():
            number += 1
            try:
                trajectory = decoder.decode(line)
            except msgspec.ValidationError as error:
                raise TrajectoryFileError(path, f"is JSON but not a trajectory ({error})", number) from error
            except (msgspec.DecodeError, UnicodeError) as error:
                if not line.endswith(b"\n") or not file.peek(1):
                    return
                raise TrajectoryFileError(path, f"is not JSON ({error})", number) from error
            yield number, offset, line, trajectory
            offset += len(line)


@contextlib.contextmanager
def named_os_error(path: Path, problem: str) -> Iterator[None]:
    """Turn what the operating system refuses into a `TrajectoryFileError`."""
    try:
        yield
    except OSError as error:
        raise TrajectoryFileError(path, f"{problem} ({error.strerror or error})") from error
