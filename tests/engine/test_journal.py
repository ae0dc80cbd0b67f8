"""The journal: what was acknowledged survives kills, torn ends, full disks and failed syncs; nothing else is read."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtail.engine import journal as journal_module
from longtail.engine.errors import InvalidInputError
from longtail.engine.journal import Journal, JournalError

HEADER_BYTES = 32
FRAME_HEAD_BYTES = 16
FRAMES = [[b"a"], [b"", b"bc" * 10], [b"\x00" * 9], [b"longtail-journal", b"\xff"], [b"the last one", b"!"]]


@pytest.fixture
def no_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of many openings that are about bytes alone."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)


def write(path: Path, frames: list[list[bytes]]) -> list[int]:
    """Where each frame ends, the header first."""
    with Journal(path) as journal:
        ends = [journal.num_bytes]
        for frame in frames:
            journal.append(frame)
            ends.append(journal.num_bytes)
    assert ends[-1] == path.stat().st_size
    return ends


def read(path: Path, lock_timeout_s: float = 0.0) -> list[bytes]:
    with Journal(path, lock_timeout_s=lock_timeout_s) as journal:
        return journal.payloads


def flat(frames: list[list[bytes]]) -> list[bytes]:
    return [payload for frame in frames for payload in frame]


def refuse(*_: Any, number: int = errno.EIO) -> int:
    raise OSError(number, os.strerror(number))


def run_script(script: str, *arguments: object) -> Any:
    """What a fresh, single-threaded Python, which may fork, prints as JSON."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "append", "append", "compact", "reopen"]), st.lists(st.binary(max_size=60))
        )
    )
)
def test_any_sequence_of_appends_compactions_and_openings_reads_back_equal(
    steps: list[tuple[str, list[bytes]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "j"
        expected: list[bytes] = []
        journal = Journal(path)
        for action, payloads in steps:
            if action == "append":
                journal.append(payloads)
                expected += payloads
            elif action == "compact":
                journal.compact(tuple(payloads))
                expected = list(payloads)
            else:
                journal.close()
                journal = Journal(path)
                assert (journal.payloads, journal.num_torn_bytes) == (expected, 0)
            assert journal.num_bytes == path.stat().st_size
        journal.close()
        assert read(path) == expected
        assert os.listdir(folder) == ["j"]


def test_the_file_has_the_documented_format(tmp_path: Path) -> None:
    path = tmp_path / "j"
    ends = write(path, [[b"x", b"yz"]])
    data = path.read_bytes()
    mark = data[20:28]
    assert data[:20] == b"longtail-journal" + (1).to_bytes(4, "little")
    assert data[28:32] == crc32(mark).to_bytes(4, "little")
    assert ends == [HEADER_BYTES, len(data)]
    length_and_body = data[44:]
    assert data[32:40] == mark
    assert data[40:44] == crc32(length_and_body).to_bytes(4, "little")
    assert int.from_bytes(length_and_body[:4], "little") == len(length_and_body) - 4
    assert msgspec.msgpack.decode(length_and_body[4:]) == [b"x", b"yz"]


def test_an_intact_frame_of_anything_but_payloads_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "j"
    (end,) = write(path, [])
    data = path.read_bytes()
    body = msgspec.msgpack.encode([b"a", "text"])
    length = len(body).to_bytes(4, "little")
    path.write_bytes(data + data[20:28] + crc32(length + body).to_bytes(4, "little") + length + body)
    with pytest.raises(JournalError, match=f"frame at byte {end}: expected an array of binaries"):
        read(path)


def test_payloads_can_be_taken_and_are_then_no_longer_held(tmp_path: Path) -> None:
    write(tmp_path / "j", FRAMES)
    with Journal(tmp_path / "j") as journal:
        assert journal.take() == flat(FRAMES)
        assert journal.payloads == journal.take() == []
    assert read(tmp_path / "j") == flat(FRAMES)


@pytest.mark.usefixtures("no_syncs")
def test_a_file_cut_anywhere_opens_with_the_frames_that_are_whole_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Libraries that other tests load set the root logger's level.
    caplog.set_level(logging.WARNING, logger="longtail")
    path = tmp_path / "j"
    ends = write(path, FRAMES)
    data = path.read_bytes()
    for length in range(len(data) + 1):
        num_whole = sum(end <= length for end in ends[1:])
        path.write_bytes(data[:length])
        caplog.clear()
        with Journal(path) as journal:
            assert journal.payloads == flat(FRAMES[:num_whole]), length
            whole_bytes = max((end for end in ends if end <= length), default=0)
            assert journal.num_torn_bytes == length - whole_bytes
            assert ("torn" in caplog.text) == (length != whole_bytes)
            journal.append([b"next"])
        assert read(path) == [*flat(FRAMES[:num_whole]), b"next"]


@pytest.mark.usefixtures("no_syncs")
@pytest.mark.parametrize("lost", ["sectors", "all of it", "the old content behind it"])
def test_a_last_frame_of_which_a_power_loss_kept_any_part_is_cut_off(tmp_path: Path, lost: str) -> None:
    """Sectors come back in any order; a head of zeros before a whole tail is what a length alone could not explain."""
    path = tmp_path / "j"
    rng = random.Random(3)
    last = [rng.randbytes(5000)]
    ends = write(path, [*FRAMES, last])
    data = path.read_bytes()
    sector = 512
    for _ in range(200):
        damaged = bytearray(data)
        if lost == "sectors":
            for start in range(ends[-2] // sector * sector, len(data), sector):
                if rng.random() < 0.3:
                    begin, end = max(start, ends[-2]), min(start + sector, len(data))
                    damaged[begin:end] = bytes(end - begin)
        elif lost == "all of it":
            damaged[ends[-2] :] = bytes(rng.randrange(1, 10_000))
        else:
            damaged += rng.randbytes(rng.randrange(1, 100))
        path.write_bytes(damaged)
        intact = damaged[: len(data)] == data
        with Journal(path) as journal:
            assert journal.payloads == flat([*FRAMES, last] if intact else FRAMES)
            assert journal.num_torn_bytes == len(damaged) - ends[-1 if intact else -2]
            journal.append([b"next"])
        assert read(path)[-1] == b"next"


def outcomes_of_flips(path: Path, data: bytes, places: range) -> list[list[bytes] | None]:
    """What a journal reads with one byte changed, each place in turn; None for a `JournalError`."""
    outcomes: list[list[bytes] | None] = []
    for place in places:
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= mask
            path.write_bytes(damaged)
            try:
                outcomes.append(read(path))
            except JournalError:
                outcomes.append(None)
                assert path.read_bytes() == damaged
    return outcomes


@pytest.mark.usefixtures("no_syncs")
def test_a_changed_byte_is_an_error_or_in_the_last_frame_torn_and_never_other_payloads(tmp_path: Path) -> None:
    path = tmp_path / "j"
    ends = write(path, FRAMES)
    data = path.read_bytes()
    assert set(map(str, outcomes_of_flips(path, data, range(ends[-2])))) == {"None"}
    assert outcomes_of_flips(path, data, range(ends[-2], len(data))) == [flat(FRAMES[:-1])] * 3 * (len(data) - ends[-2])
    # Where the error is.
    damaged = bytearray(data)
    damaged[ends[2] - 1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(JournalError, match=f"frame at byte {ends[1]}: .* another follows at byte {ends[2]}") as caught:
        read(path)
    assert caught.value.path == path


@pytest.mark.usefixtures("no_syncs")
def test_without_the_checksum_a_changed_byte_would_be_read_as_other_payloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the test above."""
    monkeypatch.setattr(journal_module, "crc32", lambda data, start=0: 0)
    path = tmp_path / "j"
    ends = write(path, FRAMES)
    data = path.read_bytes()
    outcomes = outcomes_of_flips(path, data, range(ends[1] + FRAME_HEAD_BYTES, ends[2]))
    wrong = [found for found in outcomes if found is not None and found != flat(FRAMES)]
    assert len(wrong) > len(outcomes) // 2


def test_a_mark_is_new_for_each_file_so_a_journal_can_hold_a_journal(tmp_path: Path) -> None:
    write(tmp_path / "inner", FRAMES)
    inner = (tmp_path / "inner").read_bytes()
    ends = write(tmp_path / "outer", [[b"first"], [inner]])
    data = (tmp_path / "outer").read_bytes()
    (tmp_path / "outer").write_bytes(data[:-1])
    with Journal(tmp_path / "outer") as journal:
        assert journal.payloads == [b"first"]
        assert journal.num_torn_bytes == len(data) - 1 - ends[1]
        journal.append([inner])
        journal.compact([inner, inner])
    assert read(tmp_path / "outer") == [inner, inner]
    assert (tmp_path / "outer").read_bytes()[20:28] != data[20:28]


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b'{"trajectory_id": "r/g/0"}\n' * 9,
        bytes(HEADER_BYTES + 1),
        b"longtail-journal\x02\0\0\0",
        b"longtail-journal\x02\0\0\0" + bytes(40),
        b"longtail-journal\x01\0\0\0" + bytes(40),
        b"longtail-journey",
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    neighbour = tmp_path / "j.compacting"
    neighbour.write_bytes(b"not ours either")
    with pytest.raises(JournalError, match="expected an intact header that begins with b'longtail-journal"):
        Journal(path)
    assert path.read_bytes() == content
    assert neighbour.exists()


@pytest.mark.parametrize("content", [b"", b"\0", bytes(HEADER_BYTES), b"longtail-j", b"longtail-journal\x01\0\0\0abc"])
def test_a_file_whose_creation_was_killed_counts_as_empty(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    with Journal(path) as journal:
        assert (journal.payloads, journal.num_torn_bytes) == ([], len(content))
        assert journal.num_bytes == HEADER_BYTES == path.stat().st_size
        journal.append([b"a"])
    assert read(path) == [b"a"]


def test_what_is_no_regular_file_or_has_no_folder_is_a_journal_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for bad in (tmp_path, tmp_path / "pipe", tmp_path / "none" / "j", tmp_path / "loop", Path("/dev/full")):
        with pytest.raises(JournalError, match=str(bad)):
            Journal(bad)


def test_what_no_frame_can_hold_is_refused_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_FRAME_BYTES", 1000)
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.append([b"a"])
        for change in (journal.append, journal.compact):
            for bad in ([b"x" * 991], [b"a", "text"], b"bytes", [None], [bytearray(b"a")]):
                with pytest.raises(InvalidInputError, match="payloads: expected"):
                    change(bad)  # type: ignore[arg-type]
        # The bound is one of a frame, which a compaction makes of each payload.
        with pytest.raises(InvalidInputError, match="at most 1000 bytes for one frame, got 1215"):
            journal.append([b"x" * 600, b"y" * 600])
        journal.append([b"x" * 990])
        journal.compact([b"x" * 990, b"y" * 990])
        journal.append([])
    assert read(path) == [b"x" * 990, b"y" * 990]
    assert os.listdir(tmp_path) == ["j"]


def test_a_closed_journal_takes_nothing_and_closes_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append([b"a"])
    journal.close()
    journal.close()
    for act in (journal.append, journal.compact):
        with pytest.raises(JournalError, match="closed"):
            act([])
    assert read(tmp_path / "j") == [b"a"]


def test_nothing_is_acknowledged_for_a_file_that_was_removed_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        path.rename(tmp_path / "moved")
        with pytest.raises(JournalError, match="cannot be found under its name"):
            journal.append([b"a"])
        write(path, [[b"of another"]])
        for act in (journal.append, journal.compact):
            with pytest.raises(JournalError, match="was replaced by another file"):
                act([b"a"])
    assert read(path) == [b"of another"]


def test_a_compaction_keeps_the_mode_and_the_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real").touch(mode=0o600)
    (tmp_path / "link").symlink_to("real")
    with Journal(tmp_path / "link") as journal:
        journal.compact([b"a"])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600
    assert read(tmp_path / "real") == [b"a"]


def test_a_relative_path_outlives_a_change_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Journal("j") as journal:
        monkeypatch.chdir(tmp_path / "elsewhere")
        journal.append([b"a"])
        journal.compact([b"b"])
    assert read(tmp_path / "j") == [b"b"]
    assert os.listdir(tmp_path / "elsewhere") == []


FILL_THE_DISK = """
import json, os, resource, sys
from longtail.engine.journal import Journal, JournalError
def limit(num_bytes): resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
path = sys.argv[1]
payloads, problems = [], []
with Journal(path) as journal:
    limit(10_007)
    for action in (journal.append, journal.compact):
        try:
            for i in range(1000):
                new = [b"%d" % i * 100, b"second"]
                action(payloads + new if action == journal.compact else new)
                payloads += new
        except JournalError as error:
            problems.append(str(error))
            sizes = [journal.num_bytes, journal.path.stat().st_size]
    files = os.listdir(journal.path.parent)
    limit(resource.RLIM_INFINITY)
    journal.append([b"after"])
found = Journal(path).payloads
print(json.dumps([len(payloads), problems, sizes, files, found == payloads + [b"after"]]))
"""


def test_a_full_disk_is_an_error_that_leaves_the_journal_as_it_was_and_usable(tmp_path: Path) -> None:
    """A file-size limit makes the kernel take half a frame and then refuse, as a full disk does."""
    path = tmp_path / "j"
    num_payloads, problems, sizes, files, same = run_script(FILL_THE_DISK, path)
    assert num_payloads >= 40
    assert problems[0].startswith(f"{path}: could not take a frame of")
    assert problems[1].startswith(f"{path}: could not be compacted")
    # The limit falls inside a frame, so the cut back was needed.
    assert sizes[0] == sizes[1] < 10_007
    assert files == ["j"]
    assert same


def test_a_short_write_is_finished_and_an_interrupted_or_refused_one_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j"
    pwrite = os.pwrite
    errors: list[BaseException] = []

    def slow(descriptor: int, data: Any, offset: int) -> int:
        if errors and offset > size + 20:
            raise errors.pop()
        return pwrite(descriptor, bytes(data)[:7], offset)

    with Journal(path) as journal:
        size = journal.num_bytes
        monkeypatch.setattr(os, "pwrite", slow)
        journal.append([b"a" * 100])
        for error, expected in (
            (OSError(errno.ENOSPC, "full"), "could not take a frame of 119 bytes .full"),
            (KeyboardInterrupt(), None),
        ):
            errors.append(error)
            size = journal.num_bytes
            with pytest.raises((JournalError, KeyboardInterrupt), match=expected):
                journal.append([b"b" * 100])
            assert not errors
            assert journal.num_bytes == path.stat().st_size == size
        monkeypatch.setattr(os, "pwrite", lambda *_: 0)
        with pytest.raises(JournalError, match="only 0 of"):
            journal.append([b"b"])
        monkeypatch.undo()
        journal.append([b"c"])
    assert read(path) == [b"a" * 100, b"c"]


def test_a_sync_that_failed_is_never_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.append([b"a"])
        monkeypatch.setattr(os, "fdatasync", refuse)
        with pytest.raises(JournalError, match="could not be synced"):
            journal.append([b"b"])
        monkeypatch.undo()
        for act in (journal.append, journal.compact):
            with pytest.raises(JournalError, match="until it is opened anew: it could not be synced"):
                act([b"c"])
    assert read(path) == [b"a"]


def test_a_frame_that_cannot_be_cut_off_again_is_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    pwrite = os.pwrite

    def half(descriptor: int, data: Any, offset: int) -> int:
        monkeypatch.setattr(os, "pwrite", refuse)
        return pwrite(descriptor, bytes(data)[:20], offset)

    with Journal(path) as journal:
        journal.append([b"a"])
        monkeypatch.setattr(os, "pwrite", half)
        monkeypatch.setattr(os, "ftruncate", refuse)
        with pytest.raises(JournalError, match="could not take a frame"):
            journal.append([b"b" * 100])
        monkeypatch.undo()
        for act in (journal.append, journal.compact):
            with pytest.raises(JournalError, match="opened anew: it could not be cut back"):
                act([b"c"])
    with Journal(path) as journal:
        assert (journal.payloads, journal.num_torn_bytes) == ([b"a"], 20)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the journal asks of the operating system from here on, in order, with the file's name."""
    made: list[str] = []

    def record(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any) -> Any:
            target = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            made.append(f"{name} {Path(target).name}")
            return real(first, *rest)

        return call

    for name in ("pwrite", "ftruncate", "fsync", "fdatasync", "rename"):
        monkeypatch.setattr(os, name, record(name, getattr(os, name)))
    monkeypatch.setattr(fcntl, "flock", record("flock", fcntl.flock))
    return made


def test_all_is_on_the_disk_before_it_is_acknowledged(tmp_path: Path, calls: list[str]) -> None:
    """The order of calls is what a power loss depends on, and no test can pull the plug."""
    folder = tmp_path.name
    journal = Journal(tmp_path / "j")
    opening = ["flock j", "pwrite j", "fsync j", f"fsync {folder}"]
    assert calls == opening
    calls.clear()
    journal.append([b"a", b"b"])
    assert calls == ["pwrite j", "fdatasync j"]
    calls.clear()
    journal.compact([b"c"])
    assert calls == [
        "flock j.compacting",
        "pwrite j.compacting",
        "pwrite j.compacting",
        "fsync j.compacting",
        "rename j.compacting",
        f"fsync {folder}",
    ]
    journal.close()
    calls.clear()
    # What was there may be only in the page cache: the last frame is written again.
    Journal(tmp_path / "j").close()
    assert calls == opening
    with (tmp_path / "j").open("ab") as file:
        file.write(b"torn")
    calls.clear()
    Journal(tmp_path / "j").close()
    assert calls == ["flock j", "ftruncate j", *opening[1:]]


def test_opening_writes_the_last_frame_again_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    ends = write(path, FRAMES)
    data = path.read_bytes()
    written: list[tuple[bytes, int]] = []

    def record(descriptor: int, view: Any, offset: int) -> int:
        written.append((bytes(view), offset))
        return len(view)

    monkeypatch.setattr(os, "pwrite", record)
    assert read(path) == flat(FRAMES)
    assert written == [(data[ends[-2] :], ends[-2])]


def open_files_in(folder: Path) -> list[str]:
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(descriptor))
    return [target for target in found if target.startswith(str(folder))]


State = list[bytes]
STEPS: list[tuple[str, State]] = [
    ("append", [b"a" * 50]),
    ("append", [b"b", b"c" * 30]),
    ("compact", [b"C" * 40, b"D"]),
    ("append", [b"e" * 20]),
    ("compact", []),
    ("append", [b"f"]),
]
FAULTY = ("open", "pwrite", "ftruncate", "fsync", "fdatasync", "rename", "unlink", "stat", "fchmod")


def after(state: State, action: str, payloads: State) -> State:
    return state + payloads if action == "append" else list(payloads)


@contextlib.contextmanager
def fault_at(number: int, act: Callable[[], Any]) -> Iterator[list[str]]:
    """Call `act` in place of the system call of that number, counted from here, half way if it is a write."""
    made: list[str] = []

    def faulty(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            made.append(name)
            if len(made) - 1 == number:
                if name == "pwrite":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                act()
            return real(*args, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in FAULTY:
            patch.setattr(os, name, faulty(name, getattr(os, name)))
        patch.setattr(fcntl, "flock", faulty("flock", fcntl.flock))
        yield made


def test_a_refusal_of_any_one_system_call_loses_nothing_and_adds_nothing(tmp_path: Path) -> None:
    """Every call of a short life in turn fails once. A step that raised left all as it was, or broke the journal."""
    num_errors = num_broken = 0
    for number in range(1000):
        path = tmp_path / str(number) / "j"
        path.parent.mkdir()
        states: list[State] = [[]]
        broken = False
        with fault_at(number, lambda: refuse(number=errno.ENOSPC)) as made:
            try:
                journal = Journal(path, lock_timeout_s=0.0)
            except JournalError:
                num_errors += 1
                journal = Journal(path, lock_timeout_s=0.0)
            for action, payloads in STEPS:
                try:
                    getattr(journal, action)(payloads)
                    assert not broken
                    states = [after(states[0], action, payloads)]
                except JournalError:
                    num_errors += 1
                    if not broken and (broken := journal._broken is not None):
                        num_broken += 1
                        states.append(after(states[0], action, payloads))
            journal.close()
        assert read(path) in states, (number, made)
        assert open_files_in(path.parent) == [], (number, made)
        if len(made) <= number:
            break
    assert number > 40
    assert num_errors >= number
    # The sync of each append, and for each compaction that of the folder and opening it.
    assert num_broken == 4 + 2 * 2


KILL_AT_EACH_CALL = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_journal import STEPS, after, fault_at, read
from longtail.engine.journal import Journal
results = []
for number in range(1000):
    path = Path(sys.argv[1]) / str(number) / "j"
    path.parent.mkdir()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with fault_at(number, lambda: os.kill(os.getpid(), signal.SIGKILL)) as made:
            journal = Journal(path)
            for step in STEPS:
                getattr(journal, step[0])(step[1])
                os.write(writer, b".")
        os._exit(0)
    os.close(writer)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    num_acknowledged = len(os.read(reader, 100))
    os.close(reader)
    stale = path.with_name("j.compacting").exists()
    state = []
    for step in STEPS[:num_acknowledged]:
        state = after(state, *step)
    allowed = [state] + [after(state, *step) for step in STEPS[num_acknowledged : num_acknowledged + 1]]
    found = read(path)
    with Journal(path) as journal:
        journal.append([b"next"])
    results.append([found in allowed, found != state, stale, read(path) == [*found, b"next"], os.listdir(path.parent)])
    if not killed:
        break
print(json.dumps(results))
"""


def test_a_kill_at_any_one_system_call_leaves_the_step_whole_or_undone(tmp_path: Path) -> None:
    results = run_script(KILL_AT_EACH_CALL, tmp_path, Path(__file__).parent)
    assert len(results) > 40
    assert all(allowed for allowed, *_ in results)
    assert all(went_on and files == ["j"] for *_, went_on, files in results)
    # Kills fell between being written and being acknowledged, and between making a new file and renaming it.
    assert sum(ahead for _, ahead, *_ in results) >= 6
    assert sum(stale for _, _, stale, *_ in results) >= 8


KILL_AT_RANDOM = """
import json, os, random, signal, sys, time
from pathlib import Path
from longtail.engine.journal import Journal

def naive_compact(self, payloads):
    os.ftruncate(self._descriptor, 32)
    self.num_bytes = 32
    self.append(payloads)

def payload(number):
    # From a few bytes to some hundred pages, so that kills fall inside writes.
    return number.to_bytes(4, "little") * (4 ** (number % 8) * (50 if number % 40 == 0 else 1))

def live(path, writer):
    if sys.argv[2] == "naive":
        Journal.compact = naive_compact
    journal = Journal(path)
    payloads = journal.take()
    while True:
        for _ in range(4):
            new = [payload(number) for number in range(len(payloads), len(payloads) + 3)]
            journal.append(new)
            payloads += new
            os.write(writer, len(payloads).to_bytes(4, "little"))
        journal.compact(payloads)

rng = random.Random(30)
results = []
for kill in range(30):
    path = Path(sys.argv[1]) / str(kill // 5)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        live(path, writer)
    os.close(writer)
    acknowledged = os.read(reader, 4)
    time.sleep(rng.random() * 0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 1 << 16):
        acknowledged = more
    os.close(reader)
    stale = path.with_name(path.name + ".compacting").exists()
    with Journal(path, lock_timeout_s=0.0) as journal:
        found = journal.payloads
        num_acknowledged = int.from_bytes(acknowledged[-4:], "little")
        exact = found == [payload(number) for number in range(len(found))]
        results.append([exact, len(found) - num_acknowledged, stale])
    if len(found) < num_acknowledged:
        break
print(json.dumps(results))
"""


def test_kills_at_random_moments_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    results = run_script(KILL_AT_RANDOM, tmp_path, "journal")
    assert len(results) == 30
    assert all(exact for exact, *_ in results)
    # All of the append in flight, or nothing of it.
    assert {num_ahead for _, num_ahead, _ in results} <= {0, 3}
    assert any(stale for *_, stale in results)


def test_a_compaction_in_place_would_lose_what_was_acknowledged(tmp_path: Path) -> None:
    """Negative control of the test above."""
    results = run_script(KILL_AT_RANDOM, tmp_path, "naive")
    assert any(num_ahead < 0 for _, num_ahead, _ in results)


HOLD_UNTIL_KILLED = """
import sys, time
from longtail.engine.journal import Journal
journal = Journal(sys.argv[1])
journal.append([b"a"])
journal.compact([b"b"])
print("held", flush=True)
time.sleep(60)
"""


def test_one_process_has_the_journal_and_the_lock_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "j"
    holder = subprocess.Popen([sys.executable, "-c", HOLD_UNTIL_KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        before = path.read_bytes()
        with pytest.raises(JournalError, match="another one still had it after"):
            Journal(path, lock_timeout_s=0.1)
        assert path.read_bytes() == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert read(path) == [b"b"]


def test_the_lock_has_no_gap_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    rename = os.rename
    num_refused = 0

    def refused_around(source: Any, target: Any) -> None:
        nonlocal num_refused
        for act in (lambda: rename(source, target), lambda: None):
            with pytest.raises(JournalError, match="only user"):
                Journal(path, lock_timeout_s=0.0)
            num_refused += 1
            act()

    with Journal(path) as journal:
        journal.append([b"a"])
        monkeypatch.setattr(os, "rename", refused_around)
        journal.compact([b"b"])
        assert num_refused == 2
        with pytest.raises(JournalError, match="only user"):
            Journal(path, lock_timeout_s=0.0)


def test_who_waited_for_the_file_before_a_compaction_gets_the_one_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j"
    found: list[list[bytes]] = []
    opened, go_on = threading.Event(), threading.Event()
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if threading.current_thread() is waiter and not opened.is_set():
            opened.set()
            assert go_on.wait(10)
        flock(descriptor, operation)

    waiter = threading.Thread(target=lambda: found.append(read(path, 10.0)))
    with Journal(path) as journal:
        journal.append([b"a"])
        monkeypatch.setattr(fcntl, "flock", late)
        waiter.start()
        # The waiter has the old file open and locks it only when nobody else has it any more.
        assert opened.wait(10)
        journal.compact([b"b"])
        go_on.set()
        waiter.join(0.2)
        journal.append([b"c"])
        assert found == []
    waiter.join(10)
    assert found == [[b"b", b"c"]]


def test_a_file_that_is_removed_while_it_is_being_locked_is_not_the_one_that_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j"
    write(path, [[b"of the removed"]])
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with Journal(path) as journal:
        assert journal.payloads == []
        journal.append([b"a"])
    assert read(path) == [b"a"]
