"""Prompts by position: durable, idempotent, bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from longtail.engine import journal
from longtail.engine.journal import Journal, JournalError
from longtail.engine.prompt_source import PromptSource
from longtail.engine.prompts import Prompt
from longtail.trainer_bridge.service.prompt_log import PromptLog
from longtail.trainer_bridge.service.refusals import Refusal


def prompts(first: int, count: int) -> list[Prompt]:
    return [Prompt(token_ids=[i, i + 1], group_id=f"g{i}", metadata={"answer": i}) for i in range(first, first + count)]


def test_positions_are_kept_and_known_ones_skipped() -> None:
    log = PromptLog()
    assert log.append(prompts(0, 3), 0) == 0
    assert log.append(prompts(1, 4), 1) == 2
    assert log.append(prompts(0, 2), 0) == 2
    assert len(log) == 5
    assert list(log) == prompts(0, 5)
    assert log[1:3] == prompts(1, 2)


def test_a_gap_is_refused_and_changes_nothing() -> None:
    log = PromptLog()
    log.append(prompts(0, 2), 0)
    with pytest.raises(Refusal, match="missing") as caught:
        log.append(prompts(3, 1), 3)
    assert (caught.value.code, caught.value.field, caught.value.got) == ("gap", "first", "3")
    assert len(log) == 2


def test_the_engine_draws_from_it_by_position() -> None:
    log = PromptLog()
    log.append(prompts(0, 5), 0)
    log.forget(2)
    source = PromptSource(log, 2, is_durable=True)
    assert source.draw(2) == prompts(2, 2)
    log.append(prompts(5, 2), 5)
    assert source.draw(9) == prompts(4, 3)
    with pytest.raises(IndexError, match="positions 2 to 6"):
        log[1]


def test_the_bound_is_on_what_is_held(tmp_path: Path) -> None:
    log = PromptLog(max_bytes=400)
    log.append(prompts(0, 3), 0)
    used = log.num_bytes
    with pytest.raises(Refusal, match="no room") as caught:
        log.append(prompts(3, 5), 3)
    assert caught.value.code == "full"
    assert (len(log), log.num_bytes) == (3, used)
    log.forget(3)
    assert log.num_bytes == 0
    assert log.append(prompts(3, 3), 3) == 0


def test_a_kill_after_any_byte_keeps_whole_appends(tmp_path: Path) -> None:
    path = tmp_path / "p"
    log = PromptLog(path)
    sizes = []
    for first in (0, 2, 4):
        log.append(prompts(first, 2), first)
        sizes.append(path.stat().st_size)
    log.close()
    data = path.read_bytes()
    begin = sizes[0] - 1
    for num_bytes in range(begin, len(data) + 1):
        copy = tmp_path / "copy"
        copy.write_bytes(data[:num_bytes])
        after = PromptLog(copy)
        assert list(after) == prompts(0, 2 * sum(size <= num_bytes for size in sizes))
        # The trainer repeats what it has no answer to.
        after.append(prompts(0, 6), 0)
        assert list(after) == prompts(0, 6)
        after.close()


def test_forgotten_positions_leave_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MIN_COMPACT_BYTES", 4096)
    path = tmp_path / "p"
    log = PromptLog(path)
    for first in range(0, 1000, 10):
        log.append(prompts(first, 10), first)
        log.forget(first)
    log.close()
    assert path.stat().st_size < 10_000
    again = PromptLog(path)
    assert len(again) == 1000
    assert again[999] == prompts(999, 1)[0]
    assert 0 < again.first <= 990
    again.close()


def test_what_cannot_be_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = PromptLog(tmp_path / "p")
    append = Journal.append

    def full(self: Journal, payloads: list[bytes]) -> None:
        raise JournalError(self.path, "no space left on device")

    monkeypatch.setattr(Journal, "append", full)
    with pytest.raises(JournalError):
        log.append(prompts(0, 2), 0)
    assert len(log) == 0
    monkeypatch.setattr(Journal, "append", append)
    assert log.append(prompts(0, 2), 0) == 0
    log.close()


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    with Journal(tmp_path / "p") as file:
        file.append([b"\x01"])
    with pytest.raises(JournalError, match="record 0 is not one of prompts"):
        PromptLog(tmp_path / "p")
