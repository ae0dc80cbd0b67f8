"""Groups that are carried over survive SIGKILL, a full disk and a torn tail: each prompt is used exactly once.

`carry_crash_child` is the process that dies. What it printed is durable; so the parent, who read it, holds every later
life to it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import carry_crash_child as child
import msgspec
import pytest

from longtail.engine import journal
from longtail.engine.group_state import RunPolicy
from longtail.engine.group_store import GroupStore
from longtail.engine.journal import JournalError

pytestmark = pytest.mark.timeout(120)

NUM_KILLS = 60
NUM_DEATHS_IN_THE_JOURNAL = 90


class Lives:
    """Lives of one process over one journal, and what they said."""

    def __init__(self, journal_path: Path) -> None:
        self._path = journal_path
        self._process = subprocess.Popen(
            [sys.executable, str(Path(child.__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._unread = b""
        self._pid: int | None = None
        self.cursor = 0
        self.last_no = 0
        self.returned: dict[str, dict[int, list[list[int]]]] = {}
        self.num_again = self.num_torn = self.num_compacted = 0

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
        self._process.wait(10)

    def live(
        self,
        seed: int,
        *,
        calls: int | None = None,
        kill_after_s: float | None = None,
        kill_after_lines: int | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """One life; returns its last words, or nothing if it was killed."""
        command = {"path": str(self._path), "seed": str(seed), "calls": calls, "num_prompts": 1 << 40, "drain": False}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command | options).encode() + b"\n")
        self._pid = self._line(10)["pid"]
        deadline = None if kill_after_s is None else time.monotonic() + kill_after_s
        end: dict[str, Any] = {}
        num_lines = 0
        marks = {self._path.read_bytes()[20:28]} if self._path.exists() else set()
        while True:
            wait_s = 10.0 if deadline is None else max(0.0, deadline - time.monotonic())
            if (deadline is not None and wait_s == 0) or num_lines == kill_after_lines:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
                deadline, num_lines = None, -(1 << 40)
                continue
            if (said := self._line(wait_s, may_fail=deadline is not None)) is None:
                continue
            if "over" in said:
                with contextlib.suppress(FileNotFoundError):
                    marks.add(self._path.read_bytes()[20:28])
                self.num_compacted += len(marks) > 1
                self._pid = None
                assert said["over"] in (0, -signal.SIGKILL), "the process failed by itself"
                return end
            num_lines += 1
            self._take(said)
            if "end" in said:
                end = said

    def _take(self, said: dict[str, Any]) -> None:
        if (cursor := said.get("cursor")) is not None:
            assert cursor >= self.cursor, "the position in the prompts went back"
            self.cursor = cursor
        if "opened" in said:
            assert said["opened"] >= self.last_no, "a round number was forgotten"
            self.num_torn += said["torn"] > 0
        if (round_id := said.get("round")) is None:
            return
        groups = {int(n): tokens for n, tokens in said["groups"].items()}
        if round_id in self.returned:
            assert said["again"]
            assert round_id == list(self.returned)[-1], "an old round was given again"
            assert groups == self.returned[round_id]
            self.num_again += 1
            return
        if "no" in said:
            assert said["no"] > self.last_no, "a round number was used twice"
            self.last_no = said["no"]
        before = {n for other in self.returned.values() for n in other}
        assert not before & groups.keys(), "a group was returned in two rounds"
        for n, tokens in groups.items():
            assert tokens == [child.tokens_of(n, index) for index in range(child.GROUP_SIZE)]
            assert not child.is_rejected(n)
        self.returned[round_id] = groups

    def _line(self, wait_s: float, may_fail: bool = False) -> Any:
        while b"\n" not in self._unread:
            assert self._process.stdout is not None
            if not select.select([self._process.stdout], [], [], wait_s)[0]:
                assert may_fail, "the process does not say anything"
                return None
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            assert read, "the process that forks is gone"
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    made = Lives(tmp_path / "groups.journal")
    yield made
    made.close()


def check_at_the_end(lives: Lives, end: dict[str, Any]) -> None:
    """Every prompt up to the cursor was used once, and is where it belongs."""
    accepted = [n for groups in lives.returned.values() for n in groups]
    held = end["carried"] + end["banked"]
    assert len(set(accepted + held)) == len(accepted + held) == len(accepted) + len(held)
    rejected = set(range(lives.cursor)) - set(accepted) - set(held)
    assert rejected == {n for n in range(lives.cursor) if child.is_rejected(n)} - set(held)
    assert end["accepted"] == len(accepted)
    assert end["filtered"] == len(rejected)
    assert not end["carried"], "what is carried goes on until it is complete"


def test_kills_at_any_moment(lives: Lives) -> None:
    rng = random.Random(1)
    for seed in range(NUM_KILLS):
        if seed % 5 == 0:
            lives.live(seed, rounds_told=rng.randint(1, 3))
        elif seed % 2:
            lives.live(seed, kill_after_s=rng.uniform(0, 0.12))
        else:
            lives.live(seed, kill_after_lines=rng.randint(1, 40))
    assert len(lives.returned) > NUM_KILLS
    assert lives.num_again > 5, "rounds are given again when nobody knows whether they arrived"
    check_at_the_end(lives, lives.live(-1, drain=True))


def test_deaths_between_and_within_system_calls(lives: Lives) -> None:
    """Also in the middle of a compaction, and of the recovery from the death before."""
    rng = random.Random(2)
    for seed in range(NUM_DEATHS_IN_THE_JOURNAL):
        lives.live(seed, calls=rng.choice((rng.randint(1, 6), rng.randint(1, 60))))
    assert lives.num_torn > 0
    assert lives.num_compacted > 5
    check_at_the_end(lives, lives.live(-1, drain=True))


def test_a_life_without_a_journal_would_be_noticed(lives: Lives, tmp_path: Path) -> None:
    """Negative control: the state of an earlier moment comes back."""
    path = tmp_path / "groups.journal"
    lives.live(0, kill_after_lines=20)
    shutil.copy(path, tmp_path / "old")
    lives.live(1, kill_after_lines=40)
    shutil.copy(tmp_path / "old", path)

    def go_on() -> None:
        for seed in range(2, 5):
            lives.live(seed, kill_after_lines=40)

    with pytest.raises(AssertionError, match=r"went back|forgotten|used twice|in two rounds"):
        go_on()


# ---- a full disk ---------------------------------------------------------------------------------------------------


class Disk:
    """The journal's disk: `room` more bytes can be written, then it is full, in the middle of a write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 1 << 60
        self.can_sync = True
        pwrite, fdatasync = os.pwrite, os.fdatasync

        def limited_pwrite(descriptor: int, data: Any, offset: int) -> int:
            if self.room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = pwrite(descriptor, bytes(data)[: self.room], offset)
            self.room -= written
            return written

        def failing_fdatasync(descriptor: int) -> None:
            if not self.can_sync:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            fdatasync(descriptor)

        monkeypatch.setattr(journal, "os", SimpleNamespace(**vars(os)))
        monkeypatch.setattr(journal.os, "pwrite", limited_pwrite)
        monkeypatch.setattr(journal.os, "fdatasync", failing_fdatasync)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(journal, "MIN_COMPACT_BYTES", 4096)
    return Disk(monkeypatch)


class Receiver:
    """Who gets the rounds of a store in this process, and what it was told is durable."""

    def __init__(self, store: GroupStore) -> None:
        self.rounds = child.Rounds(store, "receiver", tell=self._take)
        self.cursor = 0
        self.round_ids: list[str] = []
        self.accepted: list[int] = []

    def run_rounds(self, count: int) -> None:
        for _ in range(count):
            if (again := self.rounds.store.recovered) is not None:
                self._take(**child.told(again))
                self.rounds.store.recovered = None
            self.rounds.run_one()

    def check(self, store: GroupStore) -> None:
        """Every prompt that was submitted is in one place."""
        store.check()
        assert store.totals.cursor >= self.cursor
        returned = [] if store.recovered is None else [group.metadata["n"] for group in store.recovered.groups]
        unseen = [n for n in returned if n not in self.accepted]
        held = [group.prompt.metadata["n"] for group in store.groups()]
        places = self.accepted + unseen + held
        assert len(places) == len(set(places))
        rest = set(range(store.totals.cursor)) - set(places)
        assert len(rest) == store.totals.num_filtered
        assert all(map(child.is_rejected, rest))

    def _take(self, **said: Any) -> None:
        self.cursor = said.get("cursor", self.cursor)
        if "round" in said and said["round"] not in self.round_ids:
            self.round_ids.append(said["round"])
            self.accepted += said["groups"]


def as_the_next_process_finds_it(path: Path) -> GroupStore:
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    store = GroupStore(copy)
    store.close()
    return store


def check_that_the_next_process_goes_on(receiver: Receiver, path: Path) -> None:
    """The receiver's store can't be used any more; nothing that it acknowledged is gone."""
    with contextlib.suppress(JournalError):
        receiver.rounds.store.close()
    found = GroupStore(path)
    receiver.check(found)
    receiver.rounds.store = found
    receiver.run_rounds(3)
    receiver.check(found)
    found.close()


def content(store: GroupStore) -> bytes:
    return msgspec.json.encode((list(store.carried.items()), list(store.banked.items()), store.totals))


def test_a_full_disk_is_an_error_before_anything_is_acknowledged(tmp_path: Path, disk: Disk) -> None:
    num_errors = 0
    for room in range(0, 30_000, 557):
        path = tmp_path / f"{room}.journal"
        store = GroupStore(path)
        receiver = Receiver(store)
        receiver.run_rounds(3)
        for extra in (room, 0, room % 700):
            disk.room = extra
            try:
                receiver.run_rounds(6)
            except JournalError:
                num_errors += 1
            receiver.check(store)
            disk.room = 1 << 60
            receiver.check(as_the_next_process_finds_it(path))
            receiver.run_rounds(2)
        receiver.check(store)
        store.close()
        assert content(as_the_next_process_finds_it(path)) == content(store)
    assert num_errors > 100


def test_a_full_disk_loses_no_record_that_could_wait(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "groups.journal"
    store = GroupStore(path)
    receiver = Receiver(store)
    receiver.run_rounds(3)
    serial, group = next(iter(store.carried.items()))
    member = child.segment_of(group.plans(RunPolicy("wave", 1, "fresh", park=True), "0.0", [0])[0], 1, 0)[0]
    disk.room = 10
    store._written_at = -1e9
    store.end_member(serial, 0, member, 3)
    with pytest.raises(JournalError):
        store.flush()
    with pytest.raises(JournalError):
        store.submit([], store.totals.cursor + 1)
    cursor = store.totals.cursor
    disk.room = 1 << 60
    store.flush()
    found = as_the_next_process_finds_it(path)
    assert found.carried[serial].members[0] == member
    assert found.totals.cursor == cursor
    store.close()


def test_a_sync_that_fails_closes_the_journal_and_what_was_acknowledged_is_there(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "groups.journal"
    receiver = Receiver(GroupStore(path))
    receiver.run_rounds(3)
    disk.can_sync = False
    for _ in range(2):
        with pytest.raises(JournalError):
            receiver.run_rounds(1)
        disk.can_sync = True
    check_that_the_next_process_goes_on(receiver, path)


def test_a_write_that_is_interrupted_closes_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the record is in the file is not known then: to write it again would make the file unreadable."""
    path = tmp_path / "groups.journal"
    receiver = Receiver(GroupStore(path))
    receiver.run_rounds(3)
    append = journal.Journal.append

    def interrupted(self: journal.Journal, payloads: Any) -> None:
        append(self, payloads)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            receiver.run_rounds(1)
    with pytest.raises(JournalError, match="is closed"):
        receiver.run_rounds(1)
    check_that_the_next_process_goes_on(receiver, path)


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_torn_tail_of_any_length(tmp_path: Path) -> None:
    """What is left is what the store was at one of its frames; the shorter the file, the earlier."""
    path, torn = tmp_path / "groups.journal", tmp_path / "torn"
    store = GroupStore(path)
    cursors = [0]

    def note(**said: Any) -> None:
        if "cursor" in said:
            cursors.append(said["cursor"])

    rounds = child.Rounds(store, "torn", tell=note)
    append = journal.Journal.append

    def recorded(self: journal.Journal, payloads: Any) -> None:
        append(self, payloads)
        frames.append(self.num_bytes)

    frames: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Journal, "append", recorded)
        for _ in range(3):
            rounds.run_one()
        store.close()
    data = path.read_bytes()
    assert frames[-1] == len(data)
    assert len(frames) > 6
    last = 0
    near = {frame + offset for frame in frames for offset in (-1, 0, 1, 15, 16, 17)}
    for length in sorted(near | set(range(0, len(data), 97))):
        if not frames[0] <= length <= len(data):
            continue
        torn.write_bytes(data[:length])
        found = GroupStore(torn)
        found.check()
        assert found.totals.cursor in cursors
        assert found.totals.cursor >= last
        last = found.totals.cursor
        num_whole = max(frame for frame in frames if frame <= length)
        assert found.num_torn_bytes == length - num_whole
        found.close()


def test_the_journal_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MIN_COMPACT_BYTES", 1 << 16)
    path = tmp_path / "groups.journal"
    store = GroupStore(path)
    rounds = child.Rounds(store, "small")
    sizes = []
    for _ in range(400):
        rounds.run_one()
        sizes.append(path.stat().st_size)
    assert sum(a > b for a, b in itertools.pairwise(sizes)) > 10, "it is compacted again and again"
    assert max(sizes[200:]) < 3 * (1 << 16)
    assert max(sizes[200:]) < 1.5 * max(sizes[:200])
    store.close()
