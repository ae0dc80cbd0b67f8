"""The books of a round: completion, cut, late and duplicate members, and bounded memory."""

from __future__ import annotations

import random

import pytest

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.metadata import RolloutMetadata
from longtail.scheduler.rounds import Admission, RoundBook


def member(group: str, index: int = 0, *, size: int = 2, target: int = 1, round_id: str = "r") -> RolloutMetadata:
    return RolloutMetadata(round=round_id, target_groups=target, group=group, group_size=size, index=index)


def admit(book: RoundBook, metadata: RolloutMetadata) -> str:
    request_id = f"{metadata.round}/{metadata.group}/{metadata.index}"
    assert book.admit(request_id, metadata, now=0.0) is Admission.ADMIT
    return request_id


def test_round_is_cut_when_the_target_th_group_is_complete() -> None:
    book = RoundBook()
    a0, a1, b0, b1 = (admit(book, member(group, index)) for group in "ab" for index in (0, 1))
    book.finish(a0, 3)
    book.finish(b0, 4)
    assert book.cut_ready() == []
    book.finish(b1, 5)
    assert book.cut_ready() == [a1]
    counts = book.forget("r")
    assert (counts.num_complete_groups, counts.num_cut_members, counts.num_kept_tokens) == (1, 1, 9)


def test_half_a_group_never_completes_a_round() -> None:
    book = RoundBook()
    first = admit(book, member("a", 0))
    book.finish(first, 1)
    assert book.cut_ready() == []
    assert book.counts("r").num_complete_groups == 0


def test_groups_that_complete_in_the_same_step_all_count() -> None:
    book = RoundBook()
    ids = [admit(book, member(group, 0, size=1, target=1)) for group in "abc"]
    book.finish(ids[0], 1)
    book.finish(ids[1], 1)
    assert book.cut_ready() == [ids[2]]
    assert book.counts("r").num_complete_groups == 2


def test_late_member_of_a_closed_round_is_answered_as_cut() -> None:
    book = RoundBook()
    book.finish(admit(book, member("a", size=1)), 1)
    assert book.cut_ready() == []
    assert book.admit("late", member("b", size=1), now=1.0) is Admission.LATE
    assert book.counts("r").num_cut_members == 1


@pytest.mark.parametrize("finished", [False, True])
def test_duplicate_member_is_refused_and_the_first_is_untouched(finished: bool) -> None:
    book = RoundBook()
    first = admit(book, member("a", 0))
    if finished:
        book.finish(first, 1)
    with pytest.raises(InvalidInputError, match=r"rollout\.index"):
        book.admit("again", member("a", 0), now=0.0)
    other = admit(book, member("a", 1))
    if not finished:
        book.finish(first, 1)
    book.finish(other, 1)
    assert book.counts("r").num_complete_groups == 1


def test_place_of_an_aborted_member_can_be_taken_again() -> None:
    book = RoundBook()
    book.leave(admit(book, member("a", 0, size=1)))
    book.finish(admit(book, member("a", 0, size=1)), 1)
    assert book.counts("r").num_complete_groups == 1


@pytest.mark.parametrize(
    ("second", "field"),
    [(member("b", target=2), "rollout.target_groups"), (member("a", 1, size=3), "rollout.group_size")],
)
def test_contradicting_members_are_refused(second: RolloutMetadata, field: str) -> None:
    book = RoundBook()
    admit(book, member("a", 0))
    with pytest.raises(InvalidInputError) as caught:
        book.admit("x", second, now=0.0)
    assert caught.value.field == field
    assert book.counts("r").num_live_members == 1


def test_rounds_do_not_touch_each_other() -> None:
    book = RoundBook()
    other = admit(book, member("a", size=1, round_id="s"))
    book.finish(admit(book, member("a", size=1, round_id="r")), 1)
    assert book.cut_ready() == []
    assert book.counts("s").num_live_members == 1
    assert book.close("s") == [other]


def test_unknown_round_is_named() -> None:
    book = RoundBook()
    for ask in (book.counts, book.close, book.forget):
        with pytest.raises(InvalidInputError, match="'nowhere'"):
            ask("nowhere")


def test_live_round_cannot_be_forgotten() -> None:
    book = RoundBook()
    admit(book, member("a"))
    with pytest.raises(InvalidInputError, match="live members"):
        book.forget("r")


def test_memory_of_idle_rounds_is_bounded_and_live_ones_are_kept() -> None:
    book = RoundBook(max_idle_rounds=10)
    live = admit(book, member("a", round_id="live"))
    for i in range(100):
        book.leave(admit(book, member("a", round_id=f"r{i}")))
    assert sum(_known(book, f"r{i}") for i in range(100)) == 10
    assert book.counts("live").num_live_members == 1
    assert book.close("live") == [live]


def test_ready_round_forgotten_before_it_is_cut_still_closes() -> None:
    book = RoundBook(max_idle_rounds=1)
    ids = [admit(book, member("a", size=1, round_id=f"r{i}")) for i in range(5)]
    for request_id in ids:
        book.finish(request_id, 1)
    assert book.cut_ready() == []
    assert book.totals.cuts == 5


def test_idle_slots_are_counted_from_the_peak() -> None:
    book = RoundBook()
    admit(book, member("a"))
    for running in (2, 5, 5, 3, 1):
        book.note_step(running)
    counts = book.counts("r")
    assert (counts.num_steps, counts.peak_running, counts.idle_slot_steps) == (5, 5, 0 + 0 + 0 + 2 + 4)


def test_random_histories_keep_the_books_balanced() -> None:
    for seed in range(200):
        _random_history(random.Random(seed))


def _random_history(rng: random.Random) -> None:
    """Every admitted member ends exactly once: finished, left or cut; complete groups are exactly the full ones."""
    book = RoundBook()
    size, num_groups, target = rng.randint(1, 3), rng.randint(1, 6), rng.randint(1, 4)
    waiting = [(group, index) for group in range(num_groups) for index in range(size)]
    rng.shuffle(waiting)
    live: dict[str, str] = {}
    finished: dict[str, int] = {}
    ended = admitted = late = cut_total = 0
    while waiting or live:
        if waiting and (not live or rng.random() < 0.5):
            group, index = waiting.pop()
            request_id = f"{group}/{index}"
            if book.admit(request_id, member(str(group), index, size=size, target=target), 0.0) is Admission.ADMIT:
                live[request_id] = str(group)
                admitted += 1
            else:
                late += 1
        else:
            request_id = rng.choice(sorted(live))
            group_id = live.pop(request_id)
            if rng.random() < 0.8:
                book.finish(request_id, 1)
                finished[group_id] = finished.get(group_id, 0) + 1
            else:
                book.leave(request_id)
            ended += 1
        for request_id in book.cut_ready():
            del live[request_id]
            cut_total += 1
    counts = book.counts("r")
    assert admitted == ended + cut_total
    assert counts.num_cut_members == cut_total + late
    assert counts.num_complete_groups == sum(n == size for n in finished.values())
    assert counts.closed == (counts.num_complete_groups >= target)
    assert counts.num_live_members == 0


def _known(book: RoundBook, round_id: str) -> bool:
    try:
        book.counts(round_id)
    except InvalidInputError:
        return False
    return True


def test_a_round_that_is_complete_by_giving_up_a_branch_leaves_the_next_of_its_name_alone() -> None:
    book = RoundBook()
    a0, a1 = admit(book, member("a", 0)), admit(book, member("a", 1))
    first = book.reserve("r", "a", 1)
    book.finish(a0, 3)
    book.finish(a1, 3)
    assert book.cut_ready() == []
    book.release("r", "a", first, 1)
    assert book.counts("r").num_complete_groups == 1
    book.forget("r")
    again = admit(book, member("a", 0))
    assert book.cut_ready() == []
    assert book.live_members("r") == [again]
    book.finish(again, 3)


def test_places_of_branches_are_not_used_twice() -> None:
    book = RoundBook()
    admit(book, member("a", 0))
    admit(book, member("a", 1))
    assert book.reserve("r", "a", 2) == 2
    book.release("r", "a", 2, 2)
    assert book.reserve("r", "a", 1) == 4


def test_a_paused_member_keeps_its_place_and_may_end_there() -> None:
    book = RoundBook()
    a0, a1 = admit(book, member("a", 0)), admit(book, member("a", 1))
    book.pause(a0, 5)
    book.finish(a1, 7)
    assert book.counts("r").num_complete_groups == 0
    again = admit(book, member("a", 0))
    book.pause(again, 2)
    assert book.finish_paused("r", "a", 1) == []
    book.finish_paused("r", "a", 0)
    assert (book.counts("r").num_complete_groups, book.counts("r").num_kept_tokens) == (1, 14)
    assert book.finish_paused("nothing", "a", 0) == []
