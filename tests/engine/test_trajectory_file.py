"""Trajectory files: whole lines after a kill, one writer, continuing, and one attempt a group for readers."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from longtail.engine.errors import InvalidInputError
from longtail.engine.run_settings import RunSettings, check_same, load_settings, save_settings, settings_path
from longtail.engine.trajectory import Timings, TokenCounts, Trajectory, VersionSpan
from longtail.engine.trajectory_file import (
    TrajectoryFileError,
    TrajectoryWriter,
    index_file,
    read_groups,
    read_trajectories,
)


def make(
    group: str = "g", index: int = 0, *, round_id: str = "r", length: int = 3, end: str = "stop", **fields: Any
) -> Trajectory:
    rng = random.Random(f"{round_id}/{group}/{index}")
    return Trajectory(
        **{
            "trajectory_id": f"{round_id}/{group}/{index}",
            "round_id": round_id,
            "group_id": group,
            "index": index,
            "prompt_token_ids": [1, 2, 3],
            "output_token_ids": [rng.randrange(49152) for _ in range(length)],
            "logprobs": [-rng.random() for _ in range(length)],
            "source_mask": [1] * length,
            "weight_versions": [VersionSpan("0", 0, length)] if length else [],
            "finish_reason": end,
            "stop_reason": "rollout_cut" if end == "abort" else None,
            "text": "a line\nbreak,   and ünicode",
            "timings": Timings(submitted_s=0.0, finished_s=1 / 3),
            "tokens": TokenCounts(scheduled=length + 3),
            "metadata": {"task": "t", "entry": {"answer": "42"}},
            **fields,
        }
    )


def write(path: Path, *trajectories: Trajectory, mode: Any = "new") -> None:
    with TrajectoryWriter(path, mode) as writer:
        for trajectory in trajectories:
            writer.append(trajectory)


def test_what_is_written_reads_back_equal_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    trajectories = [make(index=i, length=50 * i) for i in range(4)]
    write(path, *trajectories)
    assert list(read_trajectories(path)) == trajectories
    lines = path.read_bytes().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[1])["logprobs"] == trajectories[1].logprobs


WRITE_UNTIL_KILLED = """
import sys
from test_trajectory_file import make
from longtail.engine.trajectory_file import TrajectoryWriter
path, attempt = sys.argv[1], sys.argv[2]
if attempt == "naive":
    file = open(path, "ab", buffering=1 << 24)
    append = lambda trajectory: file.write(__import__("msgspec").json.encode(trajectory) + b"\\n")
else:
    append = TrajectoryWriter(path, "new" if attempt == "0" else "continue").append
for i in range(10**9):
    # From one page to most of a MB, so that kills fall inside writes.
    append(make(f"g{i}", round_id=f"r{attempt}", length=(i % 5) ** 4 * 100))
    print(i, flush=True)
"""


def write_until_killed(path: Path, attempt: str, seconds: float) -> int:
    """The number of appends that a child reported as done before it was killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", WRITE_UNTIL_KILLED, str(path), attempt],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "0\n"
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    num_reported = 1 + len(child.stdout.read().splitlines())
    assert child.wait() == -signal.SIGKILL
    return num_reported


def test_a_writer_that_is_killed_leaves_only_whole_lines_for_readers_and_for_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    rng = random.Random(20)
    total = 0
    for attempt in range(5):
        num_reported = write_until_killed(path, str(attempt), rng.random() * 0.2)
        found = list(read_trajectories(path))
        # Every append that returned is there, and at most the one in flight besides.
        assert total + num_reported - 1 <= len(found) <= total + num_reported + 1
        assert all(t == make(t.group_id, round_id=t.round_id, length=len(t.logprobs)) for t in found[total:])
        total = len(found)
    write(path, mode="continue")
    assert path.read_bytes().endswith(b"\n")
    assert len(path.read_bytes().splitlines()) == total


def test_a_writer_with_a_buffer_would_lose_lines_that_it_reported(tmp_path: Path) -> None:
    """Negative control of the kill test."""
    path = tmp_path / "out.jsonl"
    num_lost = 0
    for _ in range(3):
        path.unlink(missing_ok=True)
        num_lost += write_until_killed(path, "naive", 0.05) - len(list(read_trajectories(path)))
    assert num_lost >= 3


def test_a_torn_last_line_is_skipped_by_readers_and_cut_off_when_the_file_is_continued(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Libraries that other tests load set the root logger's level.
    caplog.set_level(logging.WARNING, logger="longtail")
    path = tmp_path / "out.jsonl"
    first, second = make(index=0), make(index=1)
    write(path, first, second)
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    # Every place where the last line can be torn, and what a power failure can leave.
    for end in range(start, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert list(read_trajectories(path)) == [first], end
    for tail in (whole[start : start + 90], b"\0" * 500, b"\xff\xfe{", b'{"trajectory_id": \n'):
        path.write_bytes(whole[:start] + tail)
        caplog.clear()
        with TrajectoryWriter(path, "continue") as writer:
            assert writer.num_torn_bytes == len(tail)
            assert len(writer.index) == 1
            writer.append(second)
        assert "torn last line" in caplog.text
        assert path.read_bytes() == whole


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, make(index=0), make(index=1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert len(list(read_trajectories(path))) == 2
    write(path, make(index=2), mode="continue")
    assert [t.index for t in read_trajectories(path)] == [0, 1, 2]
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda lines: [lines[0], lines[1][:40], lines[2]], 2),
        (lambda lines: [b"", *lines], 1),
        (lambda lines: [lines[0], b'{"some": "object"}', lines[2]], 2),
        (lambda lines: [*lines, b'{"some": "object"}'], 4),
        (lambda lines: [*lines, lines[2].replace(b'"source_mask":[1,1,1]', b'"source_mask":[1,1]')], 4),
        (lambda lines: [lines[0], b"\xff" + lines[1], lines[2]], 2),
    ],
)
def test_a_line_that_no_kill_explains_is_an_error_with_its_number_and_stays(
    tmp_path: Path, damage: Any, line: int
) -> None:
    path = tmp_path / "out.jsonl"
    write(path, *(make(index=i) for i in range(3)))
    damaged = b"\n".join(damage(path.read_bytes().splitlines())) + b"\n"
    path.write_bytes(damaged)
    for act in (lambda: list(read_trajectories(path)), lambda: TrajectoryWriter(path, "continue")):
        with pytest.raises(TrajectoryFileError) as caught:
            act()
        assert caught.value.line == line
        assert f"{path}:{line}:" in str(caught.value)
    assert path.read_bytes() == damaged


def test_two_writers_cannot_have_one_file_and_the_lock_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with TrajectoryWriter(path) as writer:
        writer.append(make(index=0))
        # Reading opens and closes the file, which would drop a POSIX record lock.
        assert len(list(read_trajectories(path))) == 1
        for mode in ("new", "continue"):
            with pytest.raises(TrajectoryFileError, match="another run"):
                TrajectoryWriter(path, mode, lock_timeout_s=0.0)  # type: ignore[arg-type]
        writer.append(make(index=1))
    write(path, make(index=2), mode="continue")
    assert len(list(read_trajectories(path))) == 3


def test_a_new_file_is_never_written_over_and_a_missing_one_never_continued(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(TrajectoryFileError, match="No such file"):
        TrajectoryWriter(path, "continue")
    path.touch()
    write(path, make(index=0))
    before = path.read_bytes()
    with pytest.raises(TrajectoryFileError, match="continue it"):
        TrajectoryWriter(path)
    assert path.read_bytes() == before
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path, tmp_path / "pipe", tmp_path / "none" / "out.jsonl"):
        with pytest.raises(TrajectoryFileError):
            TrajectoryWriter(bad)


def test_a_trajectory_that_would_not_read_back_or_is_there_already_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with TrajectoryWriter(path) as writer:
        writer.append(make(index=0))
        before = path.read_bytes()
        for bad in (
            make(index=1, logprobs=[-1.0, float("nan"), -1.0]),
            make(index=1, logprobs=[-1.0, float("-inf"), -1.0]),
            make(index=1, metadata={"entry": object()}),
            make(index=1, text="\ud800"),
            make(index="1"),  # type: ignore[arg-type]
            make(index=0),
        ):
            with pytest.raises(InvalidInputError, match="trajectory"):
                writer.append(bad)
            assert path.read_bytes() == before
        writer.append(make(index=1))
    with pytest.raises(TrajectoryFileError, match="closed"):
        writer.append(make(index=2))


FILL_THE_DISK = """
import json, resource, sys
from test_trajectory_file import make
from longtail.engine.trajectory_file import TrajectoryFileError, TrajectoryWriter
path, limit = sys.argv[1], int(sys.argv[2])
writer = TrajectoryWriter(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
num_written, problem = 0, None
try:
    for i in range(1000):
        writer.append(make(f"g{i}", length=100))
        num_written += 1
except TrajectoryFileError as error:
    problem = str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
size = writer.path.stat().st_size
writer.append(make("after", length=100))
writer.close()
print(json.dumps([num_written, problem, size]))
"""


def test_a_full_disk_is_an_error_that_leaves_the_file_at_a_whole_line_and_the_writer_usable(tmp_path: Path) -> None:
    """A file-size limit makes the kernel take half a line and then refuse, as a full disk does."""
    path = tmp_path / "out.jsonl"
    limit = 10_007
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(path), str(limit)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    num_written, problem, size = json.loads(done.stdout)
    assert num_written >= 2
    assert problem.startswith(f"{path}: could not take a line of")
    # The limit falls inside a line, so the cut back was needed.
    assert 0 < limit - size < 5_000
    assert len(list(read_trajectories(path))) == num_written + 1


def test_a_short_write_is_finished_and_an_interrupted_one_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    real_write = os.write
    with TrajectoryWriter(path) as writer:
        monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, bytes(data)[:100]))
        writer.append(make(index=0))
        calls = 0

        def interrupted(fd: int, data: Any) -> int:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise KeyboardInterrupt
            return real_write(fd, bytes(data)[:100])

        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.append(make(index=1))
        monkeypatch.setattr(os, "write", lambda fd, data: 0)
        with pytest.raises(TrajectoryFileError, match="could not take"):
            writer.append(make(index=1))
        monkeypatch.undo()
        writer.append(make(index=1))
    assert list(read_trajectories(path)) == [make(index=0), make(index=1)]


def test_nothing_follows_a_torn_line_that_could_not_be_cut_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    real_write = os.write
    writer = TrajectoryWriter(path)
    writer.append(make(index=0))

    def half(fd: int, data: Any) -> int:
        monkeypatch.setattr(os, "write", refused)
        return real_write(fd, bytes(data)[:100])

    def refused(*args: Any) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "write", half)
    monkeypatch.setattr(os, "ftruncate", refused)
    with pytest.raises(TrajectoryFileError, match="broken"):
        writer.append(make(index=1))
    monkeypatch.undo()
    with pytest.raises(TrajectoryFileError, match="closed"):
        writer.append(make(index=2))
    write(path, make(index=2), mode="continue")
    assert [t.index for t in read_trajectories(path)] == [0, 2]


def test_a_group_counts_once_and_its_attempts_are_never_mixed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(
        path,
        make("done", 1),
        make("done", 0, end="length"),
        make("cut", 0),
        make("cut", 1, end="abort"),
        make("killed", 1),
        make("failed", 0, end="error"),
        make("failed", 1),
    )
    index = index_file(path)
    assert index.complete_groups(2) == ["done"]
    wanted = ["done", "killed", "cut", "never", "failed"]
    assert index.missing_groups(wanted, 2) == ["killed", "cut", "never", "failed"]

    with TrajectoryWriter(path, "continue") as writer:
        assert writer.index.missing_groups(wanted, 2) == ["killed", "cut", "never", "failed"]
        # Member 1 of `cut` and member 0 of `killed` finish now; only the mix of attempts would be complete.
        writer.append(make("cut", 1, round_id="r2"))
        writer.append(make("killed", 0, round_id="r2"))
        writer.append(make("failed", 1, round_id="r2"))
        assert writer.index.complete_groups(2) == ["done"]
        writer.append(make("failed", 0, round_id="r2"))
        assert writer.index.complete_groups(2) == ["done", "failed"]

    groups = {group.group_id: group for group in read_groups(path, 2)}
    assert {name: group.complete for name, group in groups.items()} == {
        "done": True,
        "cut": False,
        "killed": False,
        "failed": True,
    }
    found = {name: [(t.round_id, t.index) for t in group.trajectories] for name, group in groups.items()}
    assert found == {
        "done": [("r", 0), ("r", 1)],
        "cut": [("r2", 1)],
        "killed": [("r2", 0)],
        "failed": [("r2", 0), ("r2", 1)],
    }
    assert groups["done"].metadata == make().metadata

    # A group that is complete stays so, whatever comes later.
    write(path, make("done", 0, round_id="r3", end="abort"), mode="continue")
    assert next(read_groups(path, 2)).trajectories == [make("done", 0, end="length"), make("done", 1)]
    # Negative control: with the size of another run nothing would be complete, and too small a one is refused.
    assert index_file(path).complete_groups(3) == []
    with pytest.raises(InvalidInputError, match="group_size"):
        index_file(path).complete_groups(1)


def test_a_trajectory_id_twice_in_a_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, make(index=0), make(index=1))
    path.write_bytes(path.read_bytes() + path.read_bytes())
    with pytest.raises(TrajectoryFileError, match="twice") as caught:
        TrajectoryWriter(path, "continue")
    assert caught.value.line == 3


def test_a_file_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with TrajectoryWriter(path) as writer:
        reader = read_trajectories(path)
        writer.append(make(index=0))
        assert next(reader).index == 0
        writer.append(make(index=1))
        assert [t.index for t in reader] == [1]


SETTINGS = RunSettings(
    model="smollm2",
    task="gsm_symbolic",
    num_prompts=8,
    group_size=4,
    target_groups=4,
    over_provision=2.0,
    seed=7,
    sampling={"temperature": 1.0, "stop": ["x"], "max_tokens": 64},
)


def test_settings_come_back_and_replace_the_old_ones_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    save_settings(path, msgspec.structs.replace(SETTINGS, seed=1))
    assert save_settings(path, SETTINGS) == settings_path(path) == tmp_path / "out.jsonl.run.json"
    assert load_settings(path) == SETTINGS
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl.run.json"]


def test_settings_given_again_must_be_the_same(tmp_path: Path) -> None:
    check_same(SETTINGS, {"model": "smollm2", "seed": None, "sampling": {"stop": ("x",), "temperature": 1}})
    for given, field in (
        ({"model": "other"}, "model"),
        ({"group_size": 8}, "group_size"),
        ({"sampling": {"temperature": 0.7}}, "sampling.temperature"),
        ({"prompts_file": "p.jsonl"}, "prompts_file"),
        ({"colour": "red"}, "colour"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            check_same(SETTINGS, given)
        assert caught.value.field == field


def test_settings_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for content, problem in (
        (None, "No such file"),
        (b"{", "not the settings"),
        (b"[]", "not the settings"),
        (b'{"format": 99}', "format 99"),
        (b'{"format": 1, "model": "m"}', "num_prompts"),
        (b'{"format": 1, "model": "m", "num_prompts": 1, "colour": 1}', "colour"),
    ):
        if content is not None:
            settings_path(path).write_bytes(content)
        with pytest.raises(TrajectoryFileError, match=problem):
            load_settings(path)
