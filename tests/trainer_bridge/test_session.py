"""Who has the engine: one consumer, one client, one connection."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtail.trainer_bridge import wire
from longtail.trainer_bridge.service.refusals import Refusal
from longtail.trainer_bridge.service.session import ALIVE_HEARTBEATS, Greeting, Reception

EPOCH = "e"


def greet(
    reception: Reception,
    sender: bytes = b"1",
    consumer: str = "t",
    instance: str = "i",
    *,
    cursor: wire.Cursor | None = None,
    credit: int = 100,
    now_s: float = 0.0,
    acked: int = 0,
    last_seq: int = 9,
    received: int = 0,
) -> Greeting:
    hello = wire.Hello(
        request_id=1, consumer=consumer, instance=instance, cursor=cursor, credit=credit, received=received
    )
    return reception.greet(sender, hello, now_s, epoch=EPOCH, acked=acked, last_seq=last_seq)


def refusal(reception: Reception, *args: object, **kwargs: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        greet(reception, *args, **kwargs)  # type: ignore[arg-type]
    return caught.value


def test_a_new_client_gets_what_its_cursor_lacks() -> None:
    for cursor, acked, first in ((None, 3, 4), (wire.Cursor(EPOCH, 5), 3, 6), (wire.Cursor(EPOCH, 1), 3, 4)):
        reception = Reception(1.0)
        greeting = greet(reception, cursor=cursor, acked=acked)
        assert greeting.is_new
        assert greeting.displaced is None
        assert reception.next_seq(last_seq=9) == first
        assert reception.is_known(b"1")
        assert not reception.is_known(b"2")


@pytest.mark.parametrize("seq", [-1, 10])
def test_a_cursor_that_cannot_be_is_refused(seq: int) -> None:
    assert refusal(Reception(1.0), cursor=wire.Cursor(EPOCH, seq)).code == "epoch"


def test_a_cursor_of_another_store_is_refused_and_opens_nothing() -> None:
    reception = Reception(1.0)
    error = refusal(reception, cursor=wire.Cursor("other", 1))
    assert (error.code, error.expected, error.got) == ("epoch", EPOCH, "other")
    assert reception.session is None


def test_credit_bounds_what_is_sent_and_never_shrinks() -> None:
    reception = Reception(1.0)
    greet(reception, credit=2)
    sent = []
    while (seq := reception.next_seq(last_seq=9)) is not None:
        sent.append(seq)
        reception.sent()
    assert sent == [1, 2]
    reception.grant(1)
    assert reception.next_seq(9) is None
    reception.grant(4)
    assert reception.next_seq(9) == 3
    assert reception.next_seq(2) is None  # there is none yet


def test_what_was_acknowledged_meanwhile_is_not_sent() -> None:
    reception = Reception(1.0)
    greet(reception)
    reception.skip(5)
    assert reception.next_seq(9) == 6
    reception.skip(2)
    assert reception.next_seq(9) == 6


def test_another_consumer_waits_until_the_first_is_dead() -> None:
    reception = Reception(2.0)
    greet(reception)
    reception.hear(b"1", 3.0)
    assert refusal(reception, b"2", "other", now_s=3.0 + 2.0 * ALIVE_HEARTBEATS).code == "busy"
    assert reception.is_known(b"1")
    greeting = greet(reception, b"2", "other", now_s=3.1 + 2.0 * ALIVE_HEARTBEATS)
    assert greeting.displaced == b"1"
    assert not reception.is_known(b"1")
    assert reception.leave(b"2")
    greet(reception, b"1")  # it was only silent, and nobody has the engine now


def test_what_a_client_has_is_not_sent_again() -> None:
    for received, first in ((0, 3), (5, 6), (2, 3), (99, 10), (-1, 3)):
        reception = Reception(1.0)
        greeting = greet(reception, cursor=wire.Cursor(EPOCH, 2), received=received)
        assert greeting.used == 2
        assert reception.next_seq(last_seq=12) == first


def test_a_consumer_that_left_holds_nobody_up() -> None:
    reception = Reception(1.0)
    greet(reception)
    assert reception.leave(b"1")
    assert not reception.leave(b"1")
    greet(reception, b"2", "other")
    assert reception.is_known(b"2")


def test_a_lost_connection_holds_others_up_and_takes_nothing() -> None:
    reception = Reception(1.0)
    greet(reception)
    assert reception.lose(b"1")
    assert not reception.is_known(b"1")
    assert not reception.is_known(b"")
    assert reception.next_seq(9) is None
    assert refusal(reception, b"2", "other", now_s=1.0).code == "busy"
    greeting = greet(reception, b"3", now_s=1.0)  # the same client, connected again
    assert greeting.is_new
    assert greeting.displaced is None
    assert reception.next_seq(9) == 1


def test_a_newer_client_of_the_consumer_takes_over_for_good() -> None:
    reception = Reception(1.0)
    greet(reception, b"1", instance="old")
    greeting = greet(reception, b"2", instance="new")
    assert greeting.displaced == b"1"
    error = refusal(reception, b"3", instance="old")
    assert error.code == "busy"
    assert reception.is_known(b"2")


def test_a_hello_from_the_session_itself_changes_only_where_it_is() -> None:
    reception = Reception(1.0)
    greet(reception)
    reception.sent()
    greeting = greet(reception, cursor=wire.Cursor(EPOCH, 0))
    assert not greeting.is_new
    assert greeting.displaced is None
    assert reception.next_seq(9) == 1


@pytest.mark.parametrize("name", ["consumer", "instance"])
@pytest.mark.parametrize("value", ["", "x" * 201])
def test_names_have_bounds(name: str, value: str) -> None:
    error = refusal(Reception(1.0), **{name: value})
    assert (error.code, error.field) == ("invalid", name)


@given(
    st.lists(
        st.tuples(st.sampled_from([b"1", b"2", b"3"]), st.sampled_from("tu"), st.sampled_from("ij"), st.booleans()),
        max_size=30,
    )
)
def test_at_most_one_sender_is_ever_known(steps: list[tuple[bytes, str, str, bool]]) -> None:
    reception = Reception(1.0)
    for now, (sender, consumer, instance, leaves) in enumerate(steps):
        if leaves:
            reception.leave(sender)
        else:
            with contextlib.suppress(Refusal):
                greet(reception, sender, consumer, instance, now_s=float(now))
                assert reception.is_known(sender)
        assert sum(reception.is_known(one) for one in (b"1", b"2", b"3")) <= 1
