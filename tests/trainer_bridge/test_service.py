"""The service, seen from the wire: raw messages in, raw messages out, over real sockets, with an engine of glass."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq
from fake_rollout_engine import FakeMemory, FakeRolloutEngine
from raw_bridge_client import RawBridgeClient, raw_client, wait_until
from wire_examples import TO_SERVICE, trajectory

from longtail.engine.config import SamplingConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.journal import Journal, JournalError
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Group
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.service.config import BridgeConfig
from longtail.trainer_bridge.service.door import Door
from longtail.trainer_bridge.service.round_jobs import _encoded
from longtail.trainer_bridge.service.service import BridgeService

HEARTBEAT_S = 0.1
PROMPTS = [[i, i + 1, i + 2] for i in range(40)]


def config(**fields: Any) -> BridgeConfig:
    return BridgeConfig(**{"heartbeat_s": HEARTBEAT_S} | fields)


@pytest.fixture
def engine() -> FakeRolloutEngine:
    return FakeRolloutEngine()


@pytest.fixture
def service(engine: FakeRolloutEngine) -> Iterator[BridgeService]:
    with BridgeService(engine, config(), staging=None) as service:
        yield service
        assert service.failure is None


@pytest.fixture
def client(service: BridgeService) -> Iterator[RawBridgeClient]:
    with raw_client(service.address) as client:
        yield client


# ---- rounds ------------------------------------------------------------------------------------------------------


def test_a_round_comes_as_its_groups_and_then_its_end(client: RawBridgeClient) -> None:
    assert client.append(PROMPTS[:6]) == wire.PromptsAppended(reply_to=2, num_prompts=6)
    accepted = client.start("r", 4)
    assert (accepted.state, accepted.round_id) == ("started", "r")
    groups, end = client.read_round("r")
    assert [group.group_id for group in groups] == ["0", "1", "2", "3"]
    assert [group.trajectories[1].prompt_token_ids for group in groups] == PROMPTS[:4]
    assert (end.round_id, end.groups, end.carry is not None) == ("r", [], True)
    assert sorted(client.deliveries) == [1, 2, 3, 4, 5]
    groups, _ = (client.start("q", 2), client.read_round("q"))[1]
    assert [group.group_id for group in groups] == ["4", "5"]


def test_a_round_right_behind_its_prompts_finds_them(client: RawBridgeClient) -> None:
    """Without waiting for an answer in between."""
    payload = wire.encode_payload([Prompt(token_ids=ids) for ids in PROMPTS])
    client.send(wire.AppendPrompts(request_id=901, first=0, group_size=2, num_bytes=len(payload)), payload)
    client.send(wire.StartRound(request_id=902, round_id="r", group_size=2, sampling=SamplingConfig(), target_groups=9))
    groups, _ = client.read_round("r")
    assert len(groups) == 9


def test_previews_come_as_trajectories_end(client: RawBridgeClient) -> None:
    client.append(PROMPTS)
    client.start("r", 2, preview=True)
    client.read_round("r")
    previews = [message for message, _ in client.seen if isinstance(message, wire.Preview)]
    assert len(previews) == 4
    first_delivery = next(i for i, (m, _) in enumerate(client.seen) if isinstance(m, wire.Delivery))
    last_preview = max(i for i, (m, _) in enumerate(client.seen) if isinstance(m, wire.Preview))
    assert last_preview < first_delivery


def test_the_same_round_again_starts_nothing(client: RawBridgeClient, engine: FakeRolloutEngine) -> None:
    client.append(PROMPTS)
    engine.may_finish.clear()
    assert client.start("r", 2).state == "started"
    wait_until(lambda: bool(engine.calls))
    assert client.start("r", 2).state == "running"
    assert client.start("next", 2).state == "queued"
    assert client.start("next", 2).state == "queued"
    engine.may_finish.set()
    client.read_round("next")
    assert client.start("r", 2).state == "done"
    assert engine.calls == [("carry", "r"), ("carry", "next")]
    assert not client.duplicates


def test_an_evaluation_runs_beside_a_round_that_carries_over(
    client: RawBridgeClient, engine: FakeRolloutEngine, service: BridgeService
) -> None:
    client.append(PROMPTS)
    engine.may_finish.clear()
    client.start("train", 2)
    client.start("eval", 2, prompts=[[7, 7], [8, 8], [9, 9]])
    wait_until(lambda: len(engine.calls) == 2)
    assert set(engine.calls) == {("carry", "train"), ("own", "eval")}
    assert client.ask(wire.CancelRound(request_id=0, round_id="train")).note == ""
    assert client.wait_for(wire.RoundFailed).round_id == "train"
    engine.may_finish.set()
    groups, _ = client.read_round("eval")
    assert [group.trajectories[0].prompt_token_ids for group in groups] == [[7, 7], [8, 8]]
    assert engine.num_prompts_used == 0
    assert (list(service._outbox._taken), list(service._outbox._taken_own)) == ([], ["eval"])


def test_a_stream_gives_groups_until_it_is_cancelled(client: RawBridgeClient, engine: FakeRolloutEngine) -> None:
    engine.group_s = 0.05
    client.append(PROMPTS)
    assert client.start("s", None, num_groups=4).state == "started"
    wait_until(lambda: bool(client.receive(0.1)) and len(client.groups("s")) >= 3)
    engine.may_finish.clear()
    assert client.ask(wire.CancelRound(request_id=0, round_id="s")).note == ""
    groups, end = client.read_round("s")
    assert end.stats.num_complete_groups == len(groups) >= 3
    assert [group.group_id for group in groups] == [str(i) for i in range(len(groups))]
    engine.may_finish.set()
    rest, _ = (client.start("r", 2), client.read_round("r"))[1]
    assert rest[0].group_id == str(len(groups))
    assert client.ask(wire.CancelRound(request_id=0, round_id="s")).note == "no such round runs"


def test_a_stream_ends_with_its_prompts(client: RawBridgeClient) -> None:
    client.append(PROMPTS[:5])
    client.start("s", None, num_groups=4)
    groups, _ = client.read_round("s")
    assert len(groups) == 5


@pytest.mark.parametrize("is_running", [True, False])
def test_cancel(client: RawBridgeClient, engine: FakeRolloutEngine, is_running: bool) -> None:
    client.append(PROMPTS)
    engine.may_finish.clear()
    client.start("first", 2)
    wait_until(lambda: bool(engine.calls))
    client.start("second", 2)
    name = "first" if is_running else "second"
    client.ask(wire.CancelRound(request_id=0, round_id=name))
    if not is_running:
        engine.may_finish.set()
    failed = client.wait_for(wire.RoundFailed)
    assert (failed.round_id, failed.code) == (name, "cancelled")
    engine.may_finish.set()
    client.read_round("second" if is_running else "first")
    assert client.start(name, 2).state == "started"  # starting it again is allowed
    client.read_round(name)


def test_a_round_that_was_cancelled_makes_room_before_it_has_ended(
    client: RawBridgeClient, engine: FakeRolloutEngine
) -> None:
    client.append(PROMPTS)
    engine.may_finish.clear()
    client.start("first", 2)
    wait_until(lambda: bool(engine.calls))
    client.start("second", 2)
    client.ask(wire.CancelRound(request_id=0, round_id="second"))
    assert client.start("second", 2).state == "queued"
    engine.may_finish.set()
    client.read_round("second")
    assert not [message for message, _ in client.seen if isinstance(message, wire.RoundFailed)]


def test_metadata_that_cannot_be_sent_does_not_cost_the_group() -> None:
    members = [trajectory(metadata={"a": 1}), trajectory(trajectory_id="r/0/1", metadata={"x": object()})]
    group = wire.decode_result(_encoded(Group(group_id="g", trajectories=members, complete=True)), Group)
    assert [one.metadata for one in group.trajectories] == [{}, {}]
    assert [one.output_token_ids for one in group.trajectories] == [one.output_token_ids for one in members]


def test_a_round_that_fails_says_why_and_the_next_one_runs(client: RawBridgeClient, engine: FakeRolloutEngine) -> None:
    client.start("none", 2)
    failed = client.wait_for(wire.RoundFailed)
    assert (failed.code, failed.field) == ("invalid", "prompts")
    engine.fail_with = RuntimeError("a bug")
    client.append(PROMPTS)
    client.start("bug", 2)
    failed = client.wait_for(wire.RoundFailed)
    assert (failed.round_id, failed.code, failed.message) == ("bug", "engine", "RuntimeError: a bug")
    client.start("good", 2)
    client.read_round("good")


def test_an_engine_that_does_not_carry_over_runs_rounds_of_their_own() -> None:
    engine = FakeRolloutEngine(carry=False)
    with BridgeService(engine, config(), staging=None) as service, raw_client(service.address) as client:
        refused = client.start("r", 2)
        assert (refused.code, refused.field) == ("unsupported", "carry")
        client.start("own", None, prompts=PROMPTS[:3])
        groups, end = client.read_round("own")
        assert len(groups) == 3
        assert end.carry is None


# ---- deliveries --------------------------------------------------------------------------------------------------


def test_deliveries_come_as_far_as_there_is_credit(service: BridgeService) -> None:
    with raw_client(service.address, credit=2) as client:
        client.append(PROMPTS)
        client.start("r", 4)
        client.pump(0.3)
        assert sorted(client.deliveries) == [1, 2]
        client.send(wire.Credit(seq=4))
        client.pump(0.3)
        assert sorted(client.deliveries) == [1, 2, 3, 4]
        client.send(wire.Credit(seq=100))
        client.read_round("r")
        assert not client.duplicates


def test_what_is_not_acknowledged_comes_again_to_the_next_client(service: BridgeService) -> None:
    with raw_client(service.address, instance="one") as client:
        client.append(PROMPTS)
        client.start("r", 4)
        before, _ = client.read_round("r")
        assert client.ack(2).note == ""
        assert client.ack(1).note == "acknowledged before"
        refused = client.ack(99)
        assert (refused.code, refused.field) == ("invalid", "seq")
    with raw_client(service.address, instance="two") as client:
        assert (client.welcome.acked, client.welcome.last_seq) == (2, 5)  # type: ignore[attr-defined]
        after, _ = client.read_round("r")
        assert sorted(client.deliveries) == [3, 4, 5]
        assert after == before[2:]
    cursor = wire.Cursor(service._outbox.epoch, 4)
    with raw_client(service.address, instance="three", cursor=cursor) as client:
        client.pump(0.2)
        assert sorted(client.deliveries) == [5]
    wait_until(lambda: service._outbox.acked == 4)  # a cursor acknowledges


def test_a_consumer_that_acknowledges_nothing_stops_the_engine(engine: FakeRolloutEngine) -> None:
    with BridgeService(engine, config(max_unacked=5), staging=None) as service, raw_client(service.address) as client:
        client.append(PROMPTS)
        for i in range(6):
            assert client.start(f"r{i}", 2).state in ("started", "queued")
        beat = client.wait_for(wire.Heartbeat, lambda beat: beat.status.state == "throttled")
        assert "6 deliveries" in (beat.status.reason or "")
        time.sleep(0.2)
        assert [name for _, name in engine.calls] == ["r0", "r1"]
        client.ack(3)
        client.read_round("r2")
        client.wait_for(wire.Heartbeat, lambda beat: beat.status.state == "throttled")
        assert [name for _, name in engine.calls] == ["r0", "r1", "r2"]
        throttled_s = service.counters()["throttled_s"]
        assert 0.2 <= throttled_s < 10
        for i in range(3, 6):
            client.ack(max(client.deliveries))
            client.read_round(f"r{i}")
        assert not client.duplicates
        beat = client.wait_for(wire.Heartbeat, lambda beat: beat.status.state == "idle")


def test_a_stream_is_throttled_group_by_group_and_can_be_cancelled_then(engine: FakeRolloutEngine) -> None:
    with BridgeService(engine, config(max_unacked=3), staging=None) as service, raw_client(service.address) as client:
        client.append(PROMPTS)
        client.start("s", None, num_groups=4)
        client.wait_for(wire.Heartbeat, lambda beat: beat.status.state == "throttled")
        time.sleep(0.1)
        assert (service._outbox.num_unacked, engine.num_prompts_used) == (3, 3)
        client.ack(2)
        wait_until(lambda: engine.num_prompts_used == 5)
        client.ask(wire.CancelRound(request_id=0, round_id="s"))
        _, end = client.read_round("s")
        assert end.stats.num_complete_groups == 5


def test_a_round_that_waits_for_room_can_be_cancelled(engine: FakeRolloutEngine) -> None:
    with (
        BridgeService(engine, config(max_unacked_bytes=1), staging=None) as service,
        raw_client(service.address) as client,
    ):
        client.append(PROMPTS)
        client.start("r", 2)
        client.read_round("r")
        client.start("q", 2)
        client.wait_for(wire.Heartbeat, lambda beat: beat.status.state == "throttled")
        client.ask(wire.CancelRound(request_id=0, round_id="q"))
        assert client.wait_for(wire.RoundFailed).code == "cancelled"
        assert len(engine.calls) == 1


@pytest.mark.parametrize("why", ["throttled", "queued"])
def test_a_stream_that_is_cancelled_before_it_begins_ends_with_its_entry(engine: FakeRolloutEngine, why: str) -> None:
    with BridgeService(engine, config(max_unacked=3), staging=None) as service, raw_client(service.address) as client:
        client.append(PROMPTS)
        if why == "queued":
            engine.may_finish.clear()
        client.start("r", 2)
        client.start("s", None, num_groups=4)
        if why == "throttled":
            client.wait_for(wire.Heartbeat, lambda beat: beat.status.state == "throttled")
        assert client.ask(wire.CancelRound(request_id=0, round_id="s")).note == ""
        engine.may_finish.set()
        groups, end = client.read_round("s")
        assert (groups, end.round_id, end.stats.num_complete_groups) == ([], "s", 0)
        assert not [message for message, _ in client.seen if isinstance(message, wire.RoundFailed)]
        assert client.start("s", None, num_groups=4).state == "done"
        assert [name for _, name in engine.calls] == ["r"]


def test_a_client_that_does_not_read_costs_bounded_memory_and_loses_nothing() -> None:
    """More than its socket and the outbox take; then it reads."""
    engine = FakeRolloutEngine(num_tokens=5_000)
    settings = config(max_unacked_bytes=2 << 20, max_unacked=10_000)
    with BridgeService(engine, settings, staging=None) as service, raw_client(service.address) as client:
        client.append(PROMPTS * 10)
        for i in range(16):
            client.send(
                wire.StartRound(
                    request_id=5000 + i, round_id=f"r{i}", group_size=8, sampling=SamplingConfig(), target_groups=4
                )
            )
        wait_until(lambda: service.status().state == "throttled")
        largest = 5 * max(len(entry.payload) for entry in service._outbox._entries.values())
        assert 2 << 20 <= service._outbox.num_unacked_bytes < (2 << 20) + largest
        num_started = len(engine.calls)
        time.sleep(0.3)
        assert len(engine.calls) == num_started < 16
        seen: set[int] = set()
        while len(seen) < 16 * 5:
            item = client.receive()
            assert item is not None
            if isinstance(item[0], wire.Delivery):
                seen.add(item[0].seq)
                client.send(wire.Ack(request_id=6000 + item[0].seq, seq=item[0].seq))
            client.seen.clear()
            client.deliveries.clear()
        assert seen == set(range(1, 81))


# ---- sessions ----------------------------------------------------------------------------------------------------


def test_whom_the_service_does_not_know_has_to_say_hello(service: BridgeService) -> None:
    with RawBridgeClient(service.address) as stranger:
        assert stranger.append(PROMPTS).code == "session"
        assert stranger.start("r", 2).code == "session"
        stranger.send(wire.Ping())
        refused = stranger.wait_for(wire.Refused)
        assert (refused.code, refused.reply_to) == ("session", None)
        assert isinstance(stranger.hello(), wire.Welcome)


def test_one_consumer_at_a_time(client: RawBridgeClient, service: BridgeService) -> None:
    with RawBridgeClient(service.address) as other:
        refused = other.hello(consumer="other")
        assert (refused.code, refused.field) == ("busy", "consumer")
        assert isinstance(client.append(PROMPTS), wire.PromptsAppended)  # no effect on the first
        client.ask(wire.Goodbye(request_id=0))
        assert isinstance(other.hello(consumer="other"), wire.Welcome)
        assert client.append(PROMPTS).code == "session"


def test_a_dead_consumer_is_followed_by_another(service: BridgeService) -> None:
    with raw_client(service.address), RawBridgeClient(service.address) as other:
        assert other.hello(consumer="other").code == "busy"
        wait_until(lambda: isinstance(other.hello(consumer="other"), wire.Welcome))


def test_a_newer_client_of_the_same_consumer_takes_over(client: RawBridgeClient, service: BridgeService) -> None:
    client.append(PROMPTS)
    with raw_client(service.address, instance="new") as newer:
        refused = client.wait_for(wire.Refused)
        assert (refused.code, refused.reply_to) == ("busy", None)
        assert client.hello(instance="i").code == "busy"
        assert client.start("r", 2).code == "session"
        newer.start("r", 2)
        newer.read_round("r")
    assert not client.deliveries


def test_the_epoch_is_checked(service: BridgeService) -> None:
    with RawBridgeClient(service.address) as client:
        refused = client.hello(cursor=wire.Cursor("other", 3))
        assert (refused.code, refused.field) == ("epoch", "cursor.epoch")
        assert isinstance(client.hello(), wire.Welcome)


def test_heartbeats_come_by_themselves_and_for_a_ping(client: RawBridgeClient) -> None:
    client.wait_for(wire.Heartbeat)
    client.wait_for(wire.Heartbeat)
    client.send(wire.Ping())
    beat = client.wait_for(wire.Heartbeat, timeout_s=HEARTBEAT_S * 5)
    assert beat.status.state == "idle"


# ---- what is wrong -----------------------------------------------------------------------------------------------

GOOD = wire.encode(wire.Ping())
WRONG: dict[str, tuple[list[bytes], str]] = {
    "nothing": ([b""], "frames"),
    "one frame": ([bytes(GOOD[0])], "frames"),
    "four frames": ([bytes(GOOD[0]), bytes(GOOD[1]), b"", b""], "frames"),
    "another signature": ([b"HTTP/1.1", bytes(GOOD[1])], "signature"),
    "another version": ([b"LTBRID\x02\x00", bytes(GOOD[1])], "version"),
    "a long header": ([bytes(GOOD[0]), bytes(wire.MAX_HEADER_BYTES + 1)], "size"),
    "no MessagePack": ([bytes(GOOD[0]), b"\xc1\xff"], "header"),
    "half of it": ([bytes(GOOD[0]), bytes(GOOD[1])[:-2]], "header"),
    "an unknown type": ([bytes(GOOD[0]), b"\x81\xa4type\xa4what"], "type"),
    "a message of the service": ([bytes(GOOD[0]), b"\x82\xa4type\xa4done\xa8reply_to\x01"], "type"),
    "a field of another type": ([bytes(GOOD[0]), b"\x82\xa4type\xa6credit\xa3seq\xa1x"], "header"),
    "an unannounced payload": ([*map(bytes, GOOD), b"xyz"], "size"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("is_known", [True, False])
def test_what_cannot_be_read_is_answered_with_a_reason(
    name: str, is_known: bool, client: RawBridgeClient, service: BridgeService
) -> None:
    frames, problem = WRONG[name]
    client.append(PROMPTS)
    with RawBridgeClient(service.address) as stranger:
        sender = client if is_known else stranger
        sender.send_frames(*frames)
        refused = sender.wait_for(wire.Refused)
        assert (refused.code, refused.field) == ("wire", problem)
        assert refused.message
    assert service.problems[problem] == 1
    client.start("r", 2)  # nobody else noticed, and the session goes on
    client.read_round("r")


def with_long_texts(message: Any) -> Iterator[dict[str, Any]]:
    """The message as often as it has texts, each time with one that fills the header."""

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        if isinstance(value, str):
            yield path
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            yield from places(inner, (*path, key))

    for path in places(fields := msgspec.to_builtins(message)):
        if path != ("type",):
            changed = msgspec.msgpack.decode(msgspec.msgpack.encode(fields))
            target = changed
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = "x" * 70_000
            target[path[-1]] += "x" * (wire.MAX_HEADER_BYTES - len(msgspec.msgpack.encode(changed)))
            assert len(msgspec.msgpack.encode(changed)) == wire.MAX_HEADER_BYTES
            yield changed


@pytest.mark.parametrize(("message", "payload"), TO_SERVICE, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("is_known", [True, False])
def test_texts_as_long_as_a_header_are_answered(
    message: Any, payload: bytes | None, is_known: bool, client: RawBridgeClient, service: BridgeService
) -> None:
    with RawBridgeClient(service.address) as stranger:
        for fields in with_long_texts(message):
            sender = client if is_known else stranger
            sender.send_frames(bytes(GOOD[0]), msgspec.msgpack.encode(fields), *([] if payload is None else [payload]))
            if not is_known:
                stranger.wait_for(wire.Refused)
            assert client.ask(wire.CancelRound(request_id=0, round_id="none")).note == "no such round runs"
    assert service.failure is None


@pytest.mark.parametrize("name", ["consumer", "instance", "round_id", "push_id"])
def test_names_have_a_bound(name: str, client: RawBridgeClient) -> None:
    messages = {
        "consumer": wire.Hello(request_id=77, consumer="x" * 201, instance="i"),
        "instance": wire.Hello(request_id=77, consumer="t", instance="x" * 201),
        "round_id": wire.CancelRound(request_id=77, round_id="x" * 201),
        "push_id": wire.BeginWeights(request_id=77, push_id="x" * 201, version=1),
    }
    client.send(messages[name])
    refused = client.wait_for(wire.Refused)
    assert (refused.code, refused.field, refused.reply_to) == ("invalid", name, 77)
    assert refused.expected == "at most 200 characters"


def test_a_setting_of_a_round_that_is_out_of_its_bounds_is_refused_by_name(client: RawBridgeClient) -> None:
    fields = msgspec.to_builtins(
        wire.StartRound(request_id=77, round_id="r", group_size=2, sampling=SamplingConfig(), target_groups=2)
    )
    fields["sampling"]["top_p"] = 2.0
    client.send_frames(bytes(GOOD[0]), msgspec.msgpack.encode(fields))
    refused = client.wait_for(wire.Refused)
    assert (refused.code, refused.field, refused.reply_to) == ("invalid", "sampling.top_p", 77)
    assert (refused.expected, refused.got) == ("a finite number in (0, 1]", "2.0")


def test_an_answer_that_is_too_long_is_one_that_says_so(client: RawBridgeClient, service: BridgeService) -> None:
    service._clerk._do = lambda request, payload: wire.Done(reply_to=request.request_id, note="x" * (1 << 18))  # type: ignore[method-assign, union-attr]
    refused = client.ask(wire.CancelRound(request_id=0, round_id="r"))
    assert (refused.code, refused.field) == ("wire", "size")
    assert client.ask(wire.Goodbye(request_id=0)).note == ""


def test_a_payload_that_is_none_is_refused_by_name(client: RawBridgeClient) -> None:
    refused = client.ask(wire.AppendPrompts(request_id=0, first=0, group_size=2, num_bytes=3), b"\xc1\xc1\xc1")
    assert (refused.code, refused.field) == ("wire", "payload")
    refused = client.append([[1, 2], [1, 9999]])
    assert (refused.code, refused.field) == ("invalid", "prompts[1].token_ids[1]")
    refused = client.append([[1]], first=1)
    assert (refused.code, refused.field) == ("gap", "first")
    assert client.append([[1]], first=-1).field == "first"
    assert client.append([[1]], group_size=0).field == "group_size"
    assert client.append([]).code == "invalid"
    assert client.append([[1]]).num_prompts == 1


def test_a_frame_that_is_too_long_disconnects_its_sender_alone(client: RawBridgeClient, service: BridgeService) -> None:
    client.append(PROMPTS)
    process = psutil.Process()
    with RawBridgeClient(service.address) as stranger:
        before = process.memory_info().rss
        big = bytes(service.config.max_message_bytes + 1)
        stranger.send_frames(*map(bytes, GOOD), big)
        del big
        assert stranger.receive(0.5) is None
        assert process.memory_info().rss - before < 300 << 20
    client.start("r", 2)
    client.read_round("r")


def test_a_flood_is_refused_beyond_a_bound(client: RawBridgeClient, service: BridgeService) -> None:
    """The clerk is held up; what waits for it has a bound in bytes."""
    held = threading.Event()
    tokenized = service._clerk._tokenized
    service._clerk._tokenized = lambda *args: held.wait(20) and tokenized(*args)  # type: ignore[method-assign, assignment]
    payload = bytes(40 << 20)
    for i in range(4):
        client.send(wire.AppendPrompts(request_id=100 + i, first=0, group_size=2, num_bytes=len(payload)), payload)
    refused = client.wait_for(wire.Refused)
    assert (refused.code, refused.reply_to) == ("full", 103)
    held.set()
    assert client.wait_for(wire.Refused).reply_to == 100  # zeros are no prompts


def test_too_many_rounds_are_refused(client: RawBridgeClient, engine: FakeRolloutEngine) -> None:
    client.append(PROMPTS)
    engine.may_finish.clear()
    answers = [client.start(f"r{i}", 1) for i in range(20)]
    assert [answer.state for answer in answers if isinstance(answer, wire.RoundAccepted)].count("started") == 1
    refused = [answer for answer in answers if isinstance(answer, wire.Refused)]
    assert {answer.code for answer in refused} == {"busy"}
    engine.may_finish.set()


def test_prompts_of_evaluations_that_wait_have_a_bound(engine: FakeRolloutEngine) -> None:
    prompts = [[1] * 200] * 2
    limit = 250 + 2 * len(wire.encode_payload([Prompt(token_ids=ids, group_id="0") for ids in prompts]))
    settings = config(max_prompt_bytes=limit)
    with BridgeService(engine, settings, staging=None) as service, raw_client(service.address) as client:
        engine.may_finish.clear()
        assert client.start("a", None, prompts=prompts).state == "started"
        assert client.start("b", None, prompts=prompts).state == "queued"
        refused = client.start("c", None, prompts=prompts)
        assert (refused.code, refused.field) == ("full", "prompts")
        assert client.start("b", None, prompts=prompts).state == "queued"  # is not counted twice
        engine.may_finish.set()
        client.read_round("b")
        assert client.start("c", None, prompts=prompts).state == "started"
        groups, _ = client.read_round("c")
        assert [group.trajectories[0].prompt_token_ids for group in groups] == prompts


def test_replays_and_reordered_messages_do_what_they_do_once(client: RawBridgeClient) -> None:
    payload = wire.encode_payload([Prompt(token_ids=ids) for ids in PROMPTS[:4]])
    append = wire.AppendPrompts(request_id=1, first=0, group_size=2, num_bytes=len(payload))
    start = wire.StartRound(request_id=2, round_id="r", group_size=2, sampling=SamplingConfig(), target_groups=2)
    for _ in range(3):
        client.send(append, payload)
        client.send(start)
    client.send(append, payload)
    groups, _ = client.read_round("r")
    assert len(groups) == 2
    wait_until(
        lambda: bool(client.receive(0.05)) and sum(isinstance(m, wire.PromptsAppended) for m, _ in client.seen) == 4
    )
    known = [message.num_known for message, _ in client.seen if isinstance(message, wire.PromptsAppended)]
    assert known == [0, 4, 4, 4]
    states = [message.state for message, _ in client.seen if isinstance(message, wire.RoundAccepted)]
    assert states[0] == "started"
    assert "started" not in states[1:]
    assert len(client.deliveries) == 3


# ---- crashes -----------------------------------------------------------------------------------------------------


def test_a_restart_gives_again_exactly_what_was_not_acknowledged(tmp_path: Path) -> None:
    memory, settings = FakeMemory(), config(state=tmp_path / "new" / "state")
    with (
        BridgeService(FakeRolloutEngine(memory), settings, staging=None) as service,
        raw_client(service.address) as client,
    ):
        client.append(PROMPTS)
        for i in range(3):
            client.start(f"r{i}", 2)
            client.read_round(f"r{i}")
        client.ack(4)
        before = client.trajectory_ids()
        names = (service.engine_id, client.welcome.epoch)  # type: ignore[attr-defined]
    with (
        BridgeService(FakeRolloutEngine(memory), settings, staging=None) as service,
        raw_client(service.address, instance="again") as client,
    ):
        welcome = client.welcome  # type: ignore[attr-defined]
        assert (welcome.engine_id, welcome.epoch, welcome.acked, welcome.last_seq) == (*names, 4, 9)
        assert welcome.status.num_prompts == 40
        client.read_round("r2")
        assert client.trajectory_ids() == before[6:]
        assert client.start("r1", 2).state == "done"
        assert client.append(PROMPTS).num_known == 40
        groups, _ = (client.start("r3", 2), client.read_round("r3"))[1]
        assert [group.group_id for group in groups] == ["6", "7"]


def test_a_round_that_the_engine_finished_and_nobody_kept_comes_under_its_own_id(tmp_path: Path) -> None:
    """The process dies between the engine's journal and the outbox."""
    memory, settings = FakeMemory(), config(state=tmp_path)
    lost: list[str] = []
    with BridgeService(FakeRolloutEngine(memory), settings, staging=None) as service:
        service._rounds._keep_round = lambda round_: lost.append(round_.round_id) or service._rounds._closing.set()  # type: ignore[method-assign, func-returns-value]
        with raw_client(service.address) as client:
            client.append(PROMPTS)
            client.start("r", 3)
            wait_until(lambda: lost == ["r"])
    with (
        BridgeService(FakeRolloutEngine(memory), settings, staging=None) as service,
        raw_client(service.address, instance="again") as client,
    ):
        assert client.welcome.last_seq == 0  # type: ignore[attr-defined]
        client.start("next", 2)  # the trainer asks for another: the lost one comes first
        groups, _ = client.read_round("r")
        assert [group.group_id for group in groups] == ["0", "1", "2"]
        groups, _ = client.read_round("next")
        assert [group.group_id for group in groups] == ["3", "4"]


def test_a_round_that_was_kept_is_left_out_when_the_engine_gives_it_again(tmp_path: Path) -> None:
    """The process dies between the outbox and the next round's begin."""
    memory, settings = FakeMemory(), config(state=tmp_path)
    with (
        BridgeService(FakeRolloutEngine(memory), settings, staging=None) as service,
        raw_client(service.address) as client,
    ):
        client.append(PROMPTS)
        client.start("r", 3)
        client.read_round("r")
    assert memory.recovered is not None  # it would
    engine = FakeRolloutEngine(memory)
    with (
        BridgeService(engine, settings, staging=None) as service,
        raw_client(service.address, instance="again") as client,
    ):
        client.start("s", None, num_groups=1)  # a stream, before which the engine wants to be rid of it
        wait_until(lambda: bool(client.receive(0.1)) and len(client.groups("s")) >= 2)
        client.ask(wire.CancelRound(request_id=0, round_id="s"))
        client.read_round("s")
        assert [group.group_id for group in client.groups("r")] == ["0", "1", "2"]
        assert client.groups("s")[0].group_id == "3"
        assert len(set(client.trajectory_ids())) == len(client.trajectory_ids())
        assert engine.calls[0][0] == "carry"


@pytest.mark.parametrize("what", ["stream", "round"])
def test_the_last_group_of_a_stream_is_not_delivered_twice(tmp_path: Path, what: str) -> None:
    """The process dies while the engine does not know yet that the stream's last group was taken."""
    memory, settings = FakeMemory(), config(state=tmp_path, max_unacked=3)
    with (
        BridgeService(FakeRolloutEngine(memory), settings, staging=None) as service,
        raw_client(service.address) as client,
    ):
        client.append(PROMPTS)
        client.start("s", None, num_groups=2)
        wait_until(lambda: service.status().state == "throttled")
        given = memory.given
        client.pump(0.1)
    assert given is not None
    memory.given = given  # as if the process had died instead of closing the stream
    with (
        BridgeService(FakeRolloutEngine(memory), config(state=tmp_path), staging=None) as service,
        raw_client(service.address, instance="again") as client,
    ):
        assert client.start("s", None, num_groups=2).state == "started" if what == "stream" else True
        if what == "stream":
            wait_until(lambda: bool(client.receive(0.1)) and len(client.groups()) >= 6)
        else:
            client.start("r", 3)
            client.read_round("r")
        ids = client.trajectory_ids()
        assert len(ids) == len(set(ids))
        names = [group.group_id for group in client.groups()]
        assert names == [str(i) for i in range(len(names))]


def test_a_group_that_is_begun_anew_after_a_crash_is_known_when_others_come_first(tmp_path: Path) -> None:
    """It is in the outbox and not taken; the engine has newer weights then, under which it begins such groups anew."""
    memory = FakeMemory()
    with (
        BridgeService(FakeRolloutEngine(memory), config(state=tmp_path, max_unacked=3), staging=None) as service,
        raw_client(service.address) as client,
    ):
        client.append(PROMPTS)
        client.start("s", None, num_groups=2)
        wait_until(lambda: service.status().state == "throttled")
        given = memory.given
    assert given is not None
    members = [
        msgspec.structs.replace(member, trajectory_id=member.trajectory_id.replace(".0/", ".1/"))
        for member in given.trajectories
    ]
    with (
        # Slow enough that the stream does not use up all prompts before it is cancelled.
        BridgeService(FakeRolloutEngine(memory, group_s=0.05), config(state=tmp_path), staging=None) as service,
        raw_client(service.address, instance="again") as client,
    ):
        client.start("s2", None, num_groups=2)
        wait_until(lambda: bool(client.receive(0.1)) and len(client.groups("s2")) >= 3)
        client.ask(wire.CancelRound(request_id=0, round_id="s2"))
        client.read_round("s2")
        memory.given = msgspec.structs.replace(given, trajectories=members)
        client.start("r", 3)
        groups, _ = client.read_round("r")
        assert len(groups) == 2
        names = [group.group_id for group in client.groups()]
        assert names == [str(i) for i in range(len(names))]


def test_a_full_disk_holds_the_round_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: FakeRolloutEngine
) -> None:
    is_full = threading.Event()
    append = Journal.append

    def limited(self: Journal, payloads: list[bytes]) -> None:
        if is_full.is_set() and self.path.name == "deliveries.journal":
            raise JournalError(self.path, "could not take a frame (No space left on device)")
        append(self, payloads)

    monkeypatch.setattr(Journal, "append", limited)
    with BridgeService(engine, config(state=tmp_path), staging=None) as service, raw_client(service.address) as client:
        client.append(PROMPTS)
        is_full.set()
        client.start("r", 2)
        beat = client.wait_for(wire.Heartbeat, lambda beat: beat.status.state == "throttled")
        assert "No space left" in (beat.status.reason or "")
        assert not client.deliveries
        is_full.clear()
        client.read_round("r")
        client.start("q", 2)
        client.read_round("q")
        is_full.set()
        refused = client.ack(2)
        assert refused.code == "full"
        is_full.clear()
        assert client.ack(2) == wire.Done(reply_to=refused.reply_to + 1)


def test_a_disk_that_stays_full_ends_the_service_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: FakeRolloutEngine
) -> None:
    """And the engine does not hear of another round, or it would forget what could not be kept of the last one."""

    def full(self: Journal, payloads: list[bytes]) -> None:
        raise JournalError(self.path, "No space left on device")

    memory = engine.memory
    with BridgeService(engine, config(state=tmp_path), staging=None) as service, raw_client(service.address) as client:
        client.append(PROMPTS)
        service._rounds._store_patience_s = 0.2
        engine.may_finish.clear()
        client.start("r", 2)
        client.start("next", 2)
        monkeypatch.setattr(Journal, "append", full)
        engine.may_finish.set()
        wait_until(lambda: service.failure is not None)
        wait_until(lambda: service._rounds.num_jobs == 0)
        monkeypatch.undo()
        assert client.start("later", 2).code == "session"
        client.pump(0.2)
        assert not [message for message, _ in client.seen if isinstance(message, (wire.RoundFailed, wire.Delivery))]
        assert memory.started == ["r"]
    with (
        BridgeService(FakeRolloutEngine(memory), config(state=tmp_path), staging=None) as service,
        raw_client(service.address, instance="again") as client,
    ):
        client.start("next", 2)
        groups, _ = client.read_round("r")
        assert [group.group_id for group in groups] == ["0", "1"]
        client.read_round("next")


@pytest.mark.parametrize("name", ["prompts.journal", "deliveries.journal"])
def test_a_journal_that_takes_nothing_more_ends_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: FakeRolloutEngine, name: str
) -> None:
    """After an answer; not as `full`, of which the client would wait for the end."""
    fdatasync = os.fdatasync

    def failing(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name):
            raise OSError(5, "Input/output error")
        fdatasync(descriptor)

    with BridgeService(engine, config(state=tmp_path), staging=None) as service, raw_client(service.address) as client:
        client.append(PROMPTS[:4])
        client.start("r", 2)
        client.read_round("r")
        monkeypatch.setattr(os, "fdatasync", failing)

        def ask() -> Any:
            return client.append(PROMPTS[:20]) if name.startswith("prompts") else client.ack(2)

        assert "could not be synced" in ask().message
        monkeypatch.undo()
        wait_until(lambda: isinstance(service.failure, JournalError))


def test_a_state_folder_that_does_not_fit_the_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"engine\.carry\.journal"):
        BridgeService(FakeRolloutEngine(journal=None), config(state=tmp_path), staging=None)
    with pytest.raises(InvalidInputError, match=r"bridge\.state: expected a log of prompts with position 3"):
        BridgeService(FakeRolloutEngine(FakeMemory(cursor=3)), config(state=tmp_path), staging=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match=r"bridge\.state"):
        BridgeService(FakeRolloutEngine(), config(state=tmp_path / "file"), staging=None)
    with BridgeService(FakeRolloutEngine(), config(state=tmp_path), staging=None):
        pass  # and nothing is left locked


def test_a_dead_engine_answers_everything_and_deliveries_stay(
    client: RawBridgeClient, engine: FakeRolloutEngine, service: BridgeService
) -> None:
    client.append(PROMPTS)
    client.start("r", 2)
    client.read_round("r")
    engine.may_finish.clear()
    client.start("running", 2)
    client.start("waiting", 2)
    wait_until(lambda: len(engine.calls) == 2)
    engine.die()
    failed = {client.wait_for(wire.RoundFailed).round_id for _ in range(2)}
    assert failed == {"running", "waiting"}
    beat = client.wait_for(wire.Heartbeat, lambda beat: beat.status.state == "dead")
    assert "signal 9" in (beat.status.reason or "")
    refused = client.start("more", 2)
    assert (refused.code, "signal 9" in refused.message) == ("engine", True)
    assert client.ask(wire.BeginWeights(request_id=0, push_id="p", version=1)).code == "engine"
    with raw_client(service.address, instance="late") as late:
        assert late.welcome.status.state == "dead"  # type: ignore[attr-defined]
        late.read_round("r")
        assert isinstance(late.ack(3), wire.Done)


def test_a_round_that_waits_for_room_hears_that_the_engine_is_dead(engine: FakeRolloutEngine) -> None:
    with BridgeService(engine, config(max_unacked=1), staging=None) as service, raw_client(service.address) as client:
        client.append(PROMPTS)
        client.start("r", 2)
        client.read_round("r")
        client.start("q", 2)
        client.wait_for(wire.Heartbeat, lambda beat: beat.status.state == "throttled")
        engine.die()
        failed = client.wait_for(wire.RoundFailed)
        assert (failed.round_id, failed.code) == ("q", "engine")


def test_rounds_wait_for_weights_that_the_journal_has_tokens_of(engine: FakeRolloutEngine) -> None:
    with (
        BridgeService(engine, config(), staging=None, weights_needed=7) as service,
        raw_client(service.address) as client,
    ):
        assert client.welcome.weights_needed == 7  # type: ignore[attr-defined]
        assert client.welcome.status.state == "needs_weights"  # type: ignore[attr-defined]
        client.append(PROMPTS)
        refused = client.start("r", 2)
        assert (refused.code, refused.expected) == ("weights", "at least 7")
        client.ask(wire.ControlWeights(request_id=0, op="finish", version=7))
        assert client.start("r", 2).state == "started"
        client.read_round("r")


# ---- the end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["round", "stream", "evaluation", "throttled"])
def test_close_ends_whatever_runs_and_says_nothing_of_it(kind: str, engine: FakeRolloutEngine) -> None:
    service = BridgeService(engine, config(max_unacked=2), staging=None)
    num_threads = threading.active_count()
    with raw_client(service.address) as client:
        client.append(PROMPTS)
        if kind == "throttled":
            client.start("before", 2)
            client.read_round("before")
        engine.may_finish.clear()
        client.start("r", None if kind == "stream" else 2, prompts=PROMPTS[:3] if kind == "evaluation" else None)
        wait_until(lambda: bool(engine.calls) and (kind != "throttled" or service.status().state == "throttled"))
        started = time.monotonic()
        service.close()
        service.close()
        assert time.monotonic() - started < 5
        client.pump(0.1)
        assert not [message for message, _ in client.seen if isinstance(message, wire.RoundFailed)]
    assert threading.active_count() < num_threads
    assert service.failure is None


def test_a_taken_port_fails_at_once_and_leaves_nothing(service: BridgeService, engine: FakeRolloutEngine) -> None:
    num_files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(InvalidInputError, match=r"bridge\.address: expected an address that can be listened on"):
            BridgeService(engine, config(address=service.address), staging=None)
    assert len(os.listdir("/proc/self/fd")) <= num_files + 1


def test_nothing_is_left_open_after_many_services_and_clients(engine: FakeRolloutEngine) -> None:
    def once() -> None:
        with BridgeService(engine, config(), staging=None) as service, raw_client(service.address):
            pass

    once()
    counts = (len(os.listdir("/proc/self/fd")), threading.active_count())
    for _ in range(5):
        once()
    wait_until(lambda: threading.active_count() <= counts[1])
    assert len(os.listdir("/proc/self/fd")) <= counts[0] + 1


def test_a_door_that_was_bound_before_keeps_what_came(engine: FakeRolloutEngine) -> None:
    settings = config()
    with Door(settings) as door, RawBridgeClient(door.address) as client:
        client.send(wire.Hello(request_id=3, consumer="t", instance="early"))
        time.sleep(0.1)
        with BridgeService(engine, settings, staging=None, door=door):
            assert client.wait_for(wire.Welcome).reply_to == 3


def test_a_thread_of_the_service_that_fails_is_named(engine: FakeRolloutEngine) -> None:
    with BridgeService(engine, config(), staging=None) as service:
        service._door.send = lambda *args: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        with RawBridgeClient(service.address) as client:
            client.send(wire.Hello(request_id=3, consumer="t", instance="i"))
            wait_until(lambda: service.failure is not None)
        assert isinstance(service.failure, ZeroDivisionError)


def test_the_socket_has_the_bounds_that_the_door_says(service: BridgeService) -> None:
    router = service._door._router
    assert router.getsockopt(zmq.MAXMSGSIZE) == wire.MAX_PROMPTS_BYTES
    assert router.getsockopt(zmq.RCVHWM) == router.getsockopt(zmq.SNDHWM) == 64
