"""The outbox loses nothing and takes nothing twice, wherever the process dies."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtail.engine import journal
from longtail.engine.errors import InvalidInputError
from longtail.engine.journal import Journal, JournalError
from longtail.trainer_bridge.service import outbox
from longtail.trainer_bridge.service.outbox import MAX_GROUP_KEYS, MAX_TAKEN_IDS, Outbox
from longtail.trainer_bridge.service.refusals import Refusal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deliveries.journal"


def compact(box: Outbox) -> None:
    assert box._journal is not None
    box._journal.compact(box._compacted())


def shown(box: Outbox) -> list[tuple[int, str, str, bytes]]:
    entries = [box.entry(seq) for seq in range(box.acked + 1, box.last_seq + 1)]
    return [entry[:4] for entry in entries if entry is not None]


#: Everything that an outbox does. Each step may be made again, as engine and trainer do after a crash.
STEPS: list[Callable[[Outbox], object]] = [
    lambda box: box.put_round("a", [b"a0", b"a1"], b"end a"),
    lambda box: box.ack(2),
    lambda box: box.is_group_taken("x/0") or box.put_group("s", b"s0", "x/0"),
    lambda box: box.put_round("b", [b"b0"], b"end b"),
    lambda box: box.ack(5),
    lambda box: box.put_round("s", [], b"end s"),
]
FINAL = [(6, "b", "round", b"end b"), (7, "s", "round", b"end s")]


def test_entries_are_numbered_and_forgotten_when_acknowledged() -> None:
    box = Outbox()
    for step in STEPS:
        step(box)
    assert shown(box) == FINAL
    assert (box.num_unacked, box.num_unacked_bytes) == (2, 10)
    assert box.ack(7) == 2
    assert box.ack(7) == box.ack(3) == 0
    assert (box.num_unacked, box.num_unacked_bytes, box.entry(7)) == (0, 0, None)


def test_what_was_never_delivered_cannot_be_acknowledged() -> None:
    box = Outbox()
    box.put_round("a", [], b"end")
    with pytest.raises(InvalidInputError, match="seq: expected at most 1"):
        box.ack(2)
    assert box.num_unacked == 1


def test_a_round_is_taken_once() -> None:
    box = Outbox()
    assert box.put_round("a", [b"0"], b"end")
    assert not box.put_round("a", [b"other"], b"end")
    assert box.is_taken("a")
    assert len(shown(box)) == 2


def test_epoch_and_id_last_as_long_as_the_file(path: Path) -> None:
    first = Outbox(path)
    names = (first.epoch, first.engine_id)
    first.close()
    again = Outbox(path)
    assert (again.epoch, again.engine_id) == names
    again.close()
    assert Outbox().epoch != names[0]


def test_a_kill_after_any_byte_that_was_written_loses_and_doubles_nothing(path: Path, tmp_path: Path) -> None:
    """The file as each crash leaves it: cut after every byte. What a step returned from before is there, whole."""
    box = Outbox(path)
    sizes, states = [path.stat().st_size], [shown(box)]
    for step in STEPS:
        step(box)
        sizes.append(path.stat().st_size)
        states.append(shown(box))
    data = path.read_bytes()
    box.close()
    copy = tmp_path / "copy"
    for num_bytes in range(sizes[0], len(data) + 1):
        copy.write_bytes(data[:num_bytes])
        after = Outbox(copy)
        num_done = sum(size <= num_bytes for size in sizes) - 1
        assert shown(after) == states[num_done], num_bytes
        for step in STEPS[max(0, num_done - 1) :]:  # the last that was done is perhaps not known to be
            step(after)
        assert shown(after) == FINAL, num_bytes
        after.close()


def test_the_test_above_can_fail(path: Path) -> None:
    """Without memory of ids a round would be there twice."""
    box = Outbox(path)
    box.put_round("a", [b"a0"], b"end a")
    box._taken.clear()
    assert box.put_round("a", [b"a0"], b"end a")
    assert len(shown(box)) == 4
    box.close()


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("number", range(len(STEPS)))
def test_a_write_that_fails_can_be_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_written: bool
) -> None:
    """The disk is full at write `number`; or the process dies right after it, and the next one does it again."""
    box = Outbox(path)
    append, countdown = Journal.append, iter([False] * number + [True])

    def failing(self: Journal, payloads: list[bytes]) -> None:
        fails = next(countdown, False)
        if is_written or not fails:
            append(self, payloads)
        if fails:
            raise JournalError(self.path, "no space left on device")

    monkeypatch.setattr(Journal, "append", failing)
    for i, step in enumerate(STEPS):
        if i == number:
            before = shown(box)
            with pytest.raises(JournalError):
                step(box)
            assert shown(box) == before
            if is_written:
                box.close()
                box = Outbox(path)
        step(box)
    assert shown(box) == FINAL
    box.close()


def test_a_round_of_several_frames_goes_on_where_a_crash_stopped_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_MAX_FRAME_BYTES", 8)
    groups = [bytes([i]) * 5 for i in range(6)]
    append, count = Journal.append, 0

    def dying(self: Journal, payloads: list[bytes]) -> None:
        nonlocal count
        count += 1
        if count > 4:  # the state and three frames
            raise JournalError(self.path, "gone")
        append(self, payloads)

    monkeypatch.setattr(Journal, "append", dying)
    box = Outbox(path)
    with pytest.raises(JournalError):
        box.put_round("a", groups, b"end")
    assert box.num_unacked == 3
    box.close()
    monkeypatch.setattr(Journal, "append", append)
    after = Outbox(path)
    after.ack(2)
    compact(after)
    after.close()
    again = Outbox(path)
    assert not again.is_taken("a")
    assert again.put_round("a", groups, b"end")
    assert [entry[3] for entry in shown(again)] == [*groups[2:], b"end"]
    again.close()


@pytest.mark.parametrize("compacts", [False, True])
def test_a_round_with_the_id_of_a_stream_that_a_crash_ended_is_whole(path: Path, compacts: bool) -> None:
    box = Outbox(path)
    for i in range(3):
        box.put_group("x", b"s", f"k/{i}")
    if compacts:
        compact(box)
    box.close()
    again = Outbox(path)
    again.put_round("x", [b"0", b"1"], b"end")
    assert [entry[3] for entry in shown(again)] == [b"s", b"s", b"s", b"0", b"1", b"end"]
    again.close()


def test_compaction_keeps_everything_that_matters_and_bounds_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MIN_COMPACT_BYTES", 4096)
    box = Outbox(path)
    box.put_group("s", b"g", "k/9")
    for i in range(300):
        box.put_round(f"r{i}", [bytes(100)], b"end")
        box.ack(box.last_seq - 1)

    def state(box: Outbox) -> tuple[object, ...]:
        return (shown(box), list(box._group_keys), box.epoch, box.last_seq, list(box._taken), box._num_put)

    before = state(box)
    box.close()
    assert path.stat().st_size < 16_000
    again = Outbox(path)
    assert state(again) == before
    assert again.is_group_taken("k/9")
    again.close()


def test_a_compaction_that_fails_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MIN_COMPACT_BYTES", 1)

    def full(self: Journal, payloads: list[bytes]) -> None:
        raise JournalError(self.path, "no space left on device")

    monkeypatch.setattr(Journal, "compact", full)
    box = Outbox(path)
    for i in range(5):
        assert box.put_round(f"r{i}", [b"x"], b"end")
    box.close()
    again = Outbox(path)
    assert again.num_unacked == 10
    again.close()


def test_so_many_ids_are_remembered() -> None:
    box = Outbox()
    for i in range(MAX_TAKEN_IDS + 10):
        box.put_round(str(i), [], b"")
    assert not box.is_taken("9")
    assert box.is_taken("10")


@pytest.mark.parametrize("compacts", [False, True])
def test_rounds_of_their_own_do_not_make_others_be_forgotten(path: Path, compacts: bool) -> None:
    box = Outbox(path)
    box.put_round("train", [b"g"], b"end")
    for i in range(MAX_TAKEN_IDS):
        box.put_round(f"eval-{i}", [], b"", is_own=True)
    if compacts:
        compact(box)
    box.close()
    again = Outbox(path)
    again.put_round("eval-last", [], b"", is_own=True)
    assert again.is_taken("train")
    assert not again.is_taken("eval-0")
    assert again.is_taken("eval-1")
    assert not again.put_round("eval-1", [], b"")
    again.close()


@pytest.mark.parametrize("compacts", [False, True])
def test_groups_of_streams_are_known_after_others_came(path: Path, compacts: bool) -> None:
    box = Outbox(path)
    for i in range(MAX_GROUP_KEYS + 2):
        if i < 2 or i > MAX_GROUP_KEYS - 3:
            box.put_group("s", b"g", f"k/{i}")
        else:
            box._group_keys[f"k/{i}"] = None  # as if, without the disk
    assert not box.is_group_taken("k/1")
    assert box.is_group_taken("k/2")
    box.ack(box.last_seq)
    if compacts:
        compact(box)
        assert path.stat().st_size < 100_000
    box.close()
    again = Outbox(path)
    assert again.is_group_taken(f"k/{MAX_GROUP_KEYS + 1}")
    assert again.is_group_taken(f"k/{MAX_GROUP_KEYS - 1}")
    assert again.is_group_taken("k/2") is compacts
    again.close()


def test_a_file_that_has_the_last_key_only_is_read(path: Path) -> None:
    state = {"type": "_State", "epoch": "e", "engine_id": "i", "stream_key": "k/9"}
    with Journal(path) as journal:
        journal.append([msgspec.msgpack.encode(state)])
    box = Outbox(path)
    assert box.is_group_taken("k/9")
    box.close()


def test_a_file_of_something_else_is_named(path: Path) -> None:
    with Journal(path) as journal:
        journal.append([b"\x81\xa1a\x01"])
    with pytest.raises(JournalError, match="record 0 is not one of deliveries"):
        Outbox(path)
    with pytest.raises(JournalError):  # and it was not damaged, or left locked
        Outbox(path)


def test_two_services_cannot_have_one_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Outbox(path)
    real = Journal.__init__
    monkeypatch.setattr(Journal, "__init__", lambda self, path: real(self, path, lock_timeout_s=0.1))
    with pytest.raises(JournalError, match="only user"):
        Outbox(path)
    box.close()


def test_too_long_a_delivery_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_DELIVERY_BYTES", 5000)
    box = Outbox()
    with pytest.raises(Refusal, match="too long") as caught:
        box.put_round("a", [b"", bytes(1000)], b"")
    assert caught.value.code == "full"
    assert box.num_unacked == 0


def test_room_comes_back_with_an_acknowledgement() -> None:
    box = Outbox(max_unacked=2, max_unacked_bytes=100)
    box.put_round("a", [bytes(10)], b"end")
    assert not box.has_room
    waited: list[float] = []

    def wait() -> None:
        started = time.monotonic()
        box.wait_for_room(lambda: False)
        waited.append(time.monotonic() - started)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    box.ack(1)
    thread.join(5)
    assert len(waited) == 1
    assert waited[0] < 0.45  # woken, not polled
    box.put_round("b", [], bytes(101))
    assert not box.has_room
    box.wait_for_room(lambda: True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("rgak"), st.integers(0, 12)), max_size=30))
def test_any_history_is_the_same_after_reading_it_again(tmp_path_factory, steps) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("box")
    box = Outbox(folder / "d")
    for i, (kind, number) in enumerate(steps):
        if kind == "r":
            box.put_round(f"r{number}", [bytes([i])] * (number % 3), b"end", is_own=number % 4 == 1)
        elif kind == "g":
            box.put_group("s", bytes([i]), f"k/{i}")
        elif kind == "a":
            box.ack(min(box.last_seq, number * 2))
        else:
            compact(box)

    def state(box: Outbox) -> tuple[object, ...]:
        ids = (list(box._group_keys), list(box._taken), list(box._taken_own))
        return (shown(box), box.acked, box.last_seq, ids, box._num_put)

    before = state(box)
    assert sum(len(entry[3]) for entry in shown(box)) == box.num_unacked_bytes
    assert [entry[0] for entry in shown(box)] == list(range(box.acked + 1, box.last_seq + 1))
    box.close()
    again = Outbox(folder / "d")
    assert state(again) == before
    again.close()
    shutil.rmtree(folder)
