"""The session of a client: whatever is lost, repeated or restarted, its user gets every delivery once, and in order."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtail.engine.config import SamplingConfig
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.connection.session import ClientSession
from longtail.trainer_bridge.errors import (
    BridgeClosedError,
    BridgeError,
    BridgeRefusedError,
    InvalidInputError,
    WeightsPushError,
)

NOTHING = memoryview(b"")
Message = Any


class Service:
    """The other side, as a pure model: what it keeps survives `restart`, whom it knows does not."""

    def __init__(self) -> None:
        self.epoch = "epoch"
        self.rounds: dict[int, tuple[str, str]] = {}
        self.last_seq = self.acked = 0
        self.known = False
        self.next_seq, self.credit = 1, 0
        self.started: list[str] = []

    def restart(self) -> None:
        self.known = False

    def put(self, round_id: str, kind: str) -> None:
        self.last_seq += 1
        self.rounds[self.last_seq] = (round_id, kind)

    def deliver(self) -> list[tuple[Message, memoryview]]:
        out: list[tuple[Message, memoryview]] = []
        while self.known and self.next_seq <= min(self.credit, self.last_seq):
            round_id, kind = self.rounds[self.next_seq]
            payload = memoryview(str(self.next_seq).encode())
            out.append((wire.Delivery(seq=self.next_seq, round_id=round_id, kind=kind, num_bytes=9), payload))  # type: ignore[arg-type]
            self.next_seq += 1
        return out

    def answer(self, message: Message) -> list[tuple[Message, memoryview]]:
        if isinstance(message, wire.Hello):
            self.known = True
            if message.cursor is not None:
                self.acked = max(self.acked, message.cursor.seq)
            self.next_seq, self.credit = self.acked + 1, self.acked + message.credit
            return [(self.welcome(message.request_id), NOTHING)]
        if not self.known:
            refused = wire.Refused(code="session", message="", reply_to=getattr(message, "request_id", None))
            return [(refused, NOTHING)]
        match message:
            case wire.Credit():
                self.credit = max(self.credit, message.seq)
            case wire.Ack():
                self.acked = max(self.acked, message.seq)
                return [(wire.Done(reply_to=message.request_id), NOTHING)]
            case wire.Ping():
                return [(wire.Heartbeat(status=self.status()), NOTHING)]
            case wire.StartRound():
                self.started.append(message.round_id)
                reply = wire.RoundAccepted(reply_to=message.request_id, round_id=message.round_id, state="started")
                return [(reply, NOTHING)]
        return []

    def status(self) -> wire.Status:
        return wire.Status(state="idle", num_unacked=self.last_seq - self.acked)

    def welcome(self, reply_to: int) -> wire.Welcome:
        return wire.Welcome(
            reply_to=reply_to, engine_id="g", epoch=self.epoch, acked=self.acked, last_seq=self.last_seq, model="m",
            max_model_len=64, vocab_size=9, heartbeat_s=1.0, status=self.status(),
        )  # fmt: skip


class World:
    """One client, one service, and an unreliable connection between them."""

    def __init__(self, *, prefetch: int = 4, cursor: wire.Cursor | None = None, service: Service | None = None) -> None:
        self.now = 0.0
        self.service = service or Service()
        self.session = ClientSession(
            "peer", "trainer", "instance", cursor=cursor, prefetch=prefetch, clock=lambda: self.now
        )
        self.to_service: deque[Message] = deque()
        self.to_client: deque[tuple[Message, memoryview]] = deque()
        self.shelves: dict[str, Any] = {}
        self.handed: list[int] = []
        self.is_connected = False

    def connect(self) -> None:
        if not self.is_connected:
            self.is_connected = True
            self.session.connected()

    def disconnect(self) -> None:
        if self.is_connected:
            self.is_connected = False
            self.to_service.clear()
            self.to_client.clear()
            self.service.known = False  # a new connection has a new name
            self.session.disconnected("it broke")

    def client_step(self) -> None:
        """What has come is taken in, one message at a time, and what is due goes out."""
        if self.to_client:
            message, payload = self.to_client.popleft()
            self.session.receive(message, payload)
        self.session.tick()
        if self.is_connected:
            self.to_service.extend(message for message, _ in self.session.outgoing)
            self.session.outgoing.clear()

    def service_step(self) -> None:
        if self.to_service:
            self.to_client.extend(self.service.answer(self.to_service.popleft()))
        if self.is_connected:
            self.to_client.extend(self.service.deliver())

    def lose(self) -> None:
        """A delivery is lost on the way, and nobody notices."""
        for item in self.to_client:
            if isinstance(item[0], wire.Delivery):
                self.to_client.remove(item)
                return

    def repeat(self) -> None:
        if self.to_client:
            self.to_client.append(self.to_client[0])

    def claim(self, round_id: str) -> None:
        if round_id not in self.shelves:
            self.shelves[round_id] = self.session.claim(round_id, lambda: None, is_stream=True)

    def take(self, round_id: str) -> None:
        """The user takes the next one of a stream."""
        if (shelf := self.shelves.get(round_id)) is not None and shelf.entries:
            entry = shelf.entries.popleft()
            assert bytes(entry.payload) == str(entry.seq).encode()
            self.session.hand_out([entry])
            self.handed.append(entry.seq)

    def ack(self) -> None:
        if self.session.welcome is not None:
            self.session.acknowledge(self.session.cursor.seq, lambda _: None)

    def settle(self) -> None:
        """Let everything come to rest, with nothing lost from now on."""
        self.connect()
        for _ in range(400):
            for _ in range(4):
                self.client_step()
                self.service_step()
            for round_id in list(self.shelves):
                self.take(round_id)
            if self.session.is_open and len(self.handed) == self.service.last_seq:
                return
            self.now += 0.5


ROUNDS = st.sampled_from(["a", "b"])
STEP = st.one_of(
    st.tuples(st.just("put"), ROUNDS),
    st.tuples(st.sampled_from(["claim", "take"]), ROUNDS),
    st.tuples(
        st.sampled_from(
            ["client", "service", "client", "service", "lose", "repeat", "restart", "break", "connect", "ack", "wait"]
        ),
        st.none(),
    ),
)


def play(world: World, steps: list[tuple[str, Any]]) -> None:
    for name, value in steps:
        match name:
            case "put":
                world.service.put(value, "group")
            case "claim":
                world.claim(value)
            case "take":
                world.take(value)
            case "client":
                world.client_step()
            case "service":
                world.service_step()
            case "lose":
                world.lose()
            case "repeat":
                world.repeat()
            case "restart":
                world.service.restart()
            case "break":
                world.disconnect()
            case "connect":
                world.connect()
            case "ack":
                world.ack()
            case "wait":
                world.now += 0.7
        assert world.session.failure is None
        if world.session.welcome is not None:
            check(world)


def check(world: World) -> None:
    session, service = world.session, world.service
    assert service.acked <= session.shelves.handed_up_to <= session.shelves.received <= service.last_seq
    waiting = [entry.seq for shelf in session.shelves for entry in shelf.entries]
    assert sorted(world.handed + waiting) == list(range(1, session.shelves.received + 1))


@given(st.lists(STEP, max_size=60))
@settings(max_examples=300, deadline=None)
def test_every_delivery_is_handed_out_once_and_in_order(steps: list[tuple[str, Any]]) -> None:
    world = World()
    world.connect()
    play(world, steps)
    for round_id in ("a", "b"):
        world.claim(round_id)
    world.settle()
    assert sorted(world.handed) == list(range(1, world.service.last_seq + 1))
    for round_id in ("a", "b"):
        mine = [seq for seq in world.handed if world.service.rounds[seq][0] == round_id]
        assert mine == sorted(mine)
    assert world.session.cursor == wire.Cursor("epoch", world.service.last_seq)


def test_the_property_can_fail() -> None:
    """A client that trusts the connection loses what the connection loses."""
    world = World()
    world.session._see_gap = lambda seq: setattr(world.session.shelves, "received", seq)  # type: ignore[method-assign]
    world.connect()
    world.claim("a")
    for _ in range(4):
        world.service.put("a", "group")
    for _ in range(8):
        world.client_step()
        world.service_step()
        world.lose()
    world.settle()
    assert world.handed != [1, 2, 3, 4]


@given(st.lists(STEP, max_size=40), st.lists(STEP, max_size=40))
@settings(max_examples=100, deadline=None)
def test_a_trainer_that_restarts_gets_what_its_checkpoint_does_not_have(
    before: list[tuple[str, Any]], after: list[tuple[str, Any]]
) -> None:
    first = World()
    first.connect()
    first.claim("a")
    first.claim("b")
    play(first, before)
    if first.session.welcome is None:
        return
    cursor = first.session.cursor  # goes into the checkpoint
    kept = [seq for seq in first.handed if seq <= cursor.seq]
    second = World(cursor=cursor, service=first.service)
    second.connect()
    second.handed = kept
    play(second, [step for step in after if step[0] not in ("break",)])
    second.claim("a")
    second.claim("b")
    second.settle()
    assert sorted(second.handed) == list(range(1, second.service.last_seq + 1))


def opened(**arguments: Any) -> World:
    world = World(**arguments)
    world.connect()
    for _ in range(3):
        world.client_step()
        world.service_step()
    world.client_step()
    assert world.session.is_open
    return world


def start(world: World, round_id: str, replies: list[Any], *, target_groups: int | None = 1) -> wire.StartRound:
    message = wire.StartRound(
        request_id=world.session.next_id(), round_id=round_id, group_size=1, sampling=SamplingConfig(),
        target_groups=target_groups,
    )  # fmt: skip
    world.session.request(message, replies.append)
    return message


def run(world: World, steps: int = 4) -> None:
    for _ in range(steps):
        world.client_step()
        world.service_step()
    world.client_step()


def test_a_round_is_started_again_in_a_new_session_until_its_end_has_come() -> None:
    world = opened()
    replies: list[Any] = []
    start(world, "r", replies)
    run(world)
    assert [type(one) for one in replies] == [wire.RoundAccepted]
    for restarts in (1, 2):
        world.service.restart()
        world.now += 1.0
        run(world, 8)
        assert world.service.started == ["r"] * (1 + restarts)
    world.service.put("r", "round")
    run(world)
    world.service.restart()
    world.now += 1.0
    run(world, 8)
    assert world.service.started == ["r"] * 3
    assert len(replies) == 1


def test_a_request_without_an_answer_is_asked_again() -> None:
    world = opened()
    replies: list[Any] = []
    start(world, "r", replies)
    world.client_step()
    world.to_service.clear()  # lost
    world.now += 4.9
    run(world)
    assert not replies
    world.now += 0.2
    run(world)
    assert len(replies) == 1


def test_credit_grows_as_the_user_takes() -> None:
    world = opened(prefetch=4)
    for _ in range(20):
        world.service.put("a", "group")
    run(world, 30)
    assert world.session.shelves.received == 4
    world.claim("a")
    world.take("a")
    run(world, 10)
    assert world.session.shelves.received == 5


def test_who_waits_for_a_round_gets_what_lies_behind_other_deliveries() -> None:
    world = opened(prefetch=2)
    for _ in range(10):
        world.service.put("nobodys", "group")
    world.service.put("mine", "round")
    run(world, 30)
    assert world.session.shelves.received == 2
    shelf = world.session.claim("mine", lambda: None)
    run(world, 30)
    assert shelf.has_ended
    assert world.session.shelves.unclaimed == ["nobodys"]
    assert world.session.cursor.seq == 0
    world.session.discard("nobodys")
    world.session.finish(shelf)
    assert world.session.cursor.seq == 11


def test_a_tail_that_was_lost_is_missed() -> None:
    world = opened()
    world.claim("a")
    world.service.put("a", "group")
    world.service_step()
    world.lose()
    for _ in range(20):
        world.now += 1.0
        run(world, 2)
    assert world.session.shelves.received == 1


@pytest.mark.parametrize(("round_id", "cursor", "unclaimed"), [("~eval-77", 2, []), ("eval-77", 0, ["eval-77"])])
def test_evaluations_of_an_earlier_process_are_dropped_and_rounds_that_look_like_them_are_kept(
    round_id: str, cursor: int, unclaimed: list[str]
) -> None:
    """A trainer that calls its rounds so would otherwise lose one that came before it asked for it."""
    service = Service()
    for kind in ("group", "round"):
        service.put(round_id, kind)
    world = opened(service=service)
    run(world, 6)
    assert world.session.cursor.seq == cursor
    assert world.session.shelves.unclaimed == unclaimed


def test_what_a_closed_stream_still_gave_goes_to_the_next_one() -> None:
    service = Service()
    world = opened(service=service, prefetch=16)
    first = world.session.claim("~stream-1", lambda: None, is_stream=True)
    world.session.release(first, is_over=True)
    second = world.session.claim("~stream-2", lambda: None, is_stream=True)
    service.put("~stream-1", "group")
    service.put("~stream-1", "round")
    run(world, 6)
    assert [entry.seq for entry in second.entries] == [1, 2]
    assert world.session.shelves.unclaimed == []


def test_a_stream_without_a_name_takes_up_what_such_streams_left() -> None:
    service = Service()
    for round_id in ("~stream-1", "other", "~stream-2"):
        service.put(round_id, "group")
    world = opened(service=service, prefetch=16)
    run(world, 6)
    shelf = world.session.claim("~stream-3", lambda: None, is_stream=True)
    service.put("~stream-2", "group")
    service.put("~stream-9", "group")
    run(world, 6)
    assert [entry.seq for entry in shelf.entries] == [1, 3, 4, 5]
    assert world.session.shelves.unclaimed == ["other"]


def test_another_store_ends_the_session() -> None:
    world = opened()
    replies: list[Any] = []
    world.session.ask_status(replies.append)
    world.service.epoch = "another"
    world.service.restart()
    world.now += 1.0
    run(world, 8)
    assert isinstance(world.session.failure, BridgeRefusedError)
    assert world.session.failure.code == "epoch"
    assert isinstance(replies[0], BridgeRefusedError)


def test_a_store_that_lost_deliveries_ends_the_session() -> None:
    world = opened()
    for _ in range(3):
        world.service.put("a", "group")
    run(world)
    world.service.last_seq = 2
    world.service.restart()
    world.now += 1.0
    run(world, 8)
    assert isinstance(world.session.failure, BridgeRefusedError)
    assert "3" in world.session.failure.expected


def test_a_service_that_welcomes_and_forgets_is_not_asked_all_the_time() -> None:
    world = opened()
    replies: list[Any] = []
    start(world, "r", replies)
    for _ in range(100):
        world.session.receive(wire.Refused(code="session", message="the service ends"), NOTHING)
        run(world, 2)
        world.now += 0.01
    assert world.session.num_sessions <= 7
    world.now += 1.0
    run(world, 6)
    assert len(replies) == 1


def test_a_newer_client_takes_over() -> None:
    world = opened()
    world.session.receive(wire.Refused(code="busy", message="another came"), NOTHING)
    assert isinstance(world.session.failure, BridgeClosedError)
    replies: list[Any] = []
    start(world, "r", replies)
    assert replies == [world.session.failure]


def test_a_hello_is_repeated_more_and_more_rarely() -> None:
    world = World()
    world.connect()
    hellos = []
    for _ in range(40):
        world.client_step()
        hellos += [world.now for one in world.to_service if isinstance(one, wire.Hello)]
        world.to_service.clear()
        world.now += 0.5
    assert hellos == [0.0, 1.0, 3.0, 7.0, 15.0]


def test_the_name_of_a_round_that_was_acknowledged_is_refused() -> None:
    world = opened()
    shelf = world.session.claim("old", lambda: None)
    replies: list[Any] = []
    message = start(world, "old", replies)
    world.session.receive(wire.RoundAccepted(reply_to=message.request_id, round_id="old", state="done"), NOTHING)
    assert shelf.failure is None
    world.session.receive(wire.Heartbeat(status=wire.Status(state="idle", num_unacked=1)), NOTHING)
    assert shelf.failure is None, "its deliveries may still come"
    world.session.receive(wire.Heartbeat(status=wire.Status(state="idle")), NOTHING)
    assert isinstance(shelf.failure, InvalidInputError)


def test_a_refusal_names_the_field_as_the_service_did() -> None:
    world = opened()
    replies: list[Any] = []
    message = start(world, "r", replies)
    refused = wire.Refused(
        code="invalid", message="m", reply_to=message.request_id, field="sampling.stop", expected="none", got="['a']"
    )
    world.session.receive(refused, NOTHING)
    (error,) = replies
    assert isinstance(error, InvalidInputError)
    assert (error.field, error.expected, error.got) == ("sampling.stop", "none", "['a']")
    assert str(error) == "sampling.stop: expected none, got ['a']"


class Push:
    push_id = "push"

    def __init__(self) -> None:
        self.credited: list[int] = []
        self.failures: list[Exception] = []

    def took(self, serial: int) -> None:
        self.credited.append(serial)

    def fail(self, error: Exception) -> None:
        self.failures.append(error)


def test_a_push_ends_with_its_session_but_a_commit_is_asked_again() -> None:
    world = opened()
    world.now += 1.0
    world.session.push = push = Push()
    world.session.receive(wire.WeightsCredit(push_id="push", serial=3), NOTHING)
    world.session.receive(wire.WeightsCredit(push_id="another", serial=9), NOTHING)
    assert push.credited == [3]
    world.session.receive(wire.Refused(code="session", message="", push_id="push"), NOTHING)
    assert [type(one) for one in push.failures] == [WeightsPushError]
    world.now += 1.0
    run(world, 6)
    world.now += 1.0

    world.session.push = push = Push()
    replies: list[Any] = []
    commit = wire.CommitWeights(request_id=world.session.next_id(), push_id="push", num_tensors=1, digest="0")
    world.session.request(commit, replies.append)
    world.client_step()
    world.session.receive(wire.Refused(code="session", message=""), NOTHING)
    assert push.failures == replies == []
    world.service_step()
    world.client_step()
    world.service_step()
    world.client_step()
    assert commit in world.to_service
    refused = wire.Refused(code="gap", message="chunks are missing", reply_to=commit.request_id, push_id="push")
    world.session.receive(refused, NOTHING)
    assert isinstance(replies[0], WeightsPushError)
    assert replies[0].code == "gap"


def test_another_version_of_the_protocol_ends_the_session() -> None:
    world = opened()
    world.session.unreadable(wire.WireError("payload", "a group", b"x"))
    assert world.session.failure is None
    world.session.unreadable(wire.WireError("version", "protocol version 1", 2))
    assert isinstance(world.session.failure, BridgeError)


@pytest.mark.parametrize("is_connected", [False, True])
def test_what_is_known_of_the_service_is_said(is_connected: bool) -> None:
    world = opened()
    assert world.session.describe() == "the service is idle"
    status = wire.Status(state="throttled", reason="64 deliveries are not acknowledged")
    world.session.receive(wire.Heartbeat(status=status), NOTHING)
    assert world.session.describe() == "the service is throttled: 64 deliveries are not acknowledged"
    world.now += 12.0
    assert world.session.describe() == "nothing was heard for 12 s"
    if not is_connected:
        world.disconnect()
        assert world.session.describe() == "no connection: it broke"


def late_ack(world: World, acked: int) -> None:
    """The service does an earlier client's `Ack`, after it has welcomed this one."""
    world.service.acked = acked
    world.service.next_seq = max(world.service.next_seq, acked + 1)


@pytest.mark.parametrize("is_followed", [False, True])
def test_what_an_earlier_client_acknowledged_late_is_not_waited_for(is_followed: bool) -> None:
    service = Service()
    for _ in range(4):
        service.put("old", "group")
    world = World(service=service)
    world.connect()
    world.client_step()
    world.service.answer(world.to_service[0])
    welcome = service.welcome(world.to_service.popleft().request_id)
    late_ack(world, 4)
    world.session.receive(welcome, NOTHING)
    waiting: list[Any] = []
    world.session.await_delivery(waiting.append)
    if is_followed:
        world.claim("new")
        service.put("new", "group")
    for _ in range(20):
        world.now += 1.0
        run(world, 2)
    assert world.session.shelves.received == service.last_seq
    assert waiting
    assert world.session.cursor.seq == world.session.acked == 4
    assert world.session.num_sessions <= 2
    assert world.session.failure is None


def test_a_gap_that_no_new_session_closes_is_an_error() -> None:
    world = opened()
    for _ in range(60):
        world.session.receive(wire.Delivery(seq=3, round_id="a", kind="group", num_bytes=0), NOTHING)
        world.now += 1.0
        run(world)
    assert isinstance(world.session.failure, BridgeError)
    assert "delivery 1 does not come" in str(world.session.failure)
