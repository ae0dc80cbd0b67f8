"""The blocking client against a service that does what a test tells it, over real sockets."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import zmq
from scripted_service import ScriptedService, Store, dropping, make_group
from wire_examples import trajectory

from longtail.engine.config import SamplingConfig
from longtail.engine.prompts import Prompt
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.client import BridgeClient
from longtail.trainer_bridge.connection.prompts import _PACKET_PROMPTS
from longtail.trainer_bridge.errors import (
    BridgeClosedError,
    BridgeError,
    BridgeRefusedError,
    BridgeTimeoutError,
    InvalidInputError,
    WeightsPushError,
)

PROMPTS = [[1, 2, 3]] * 8


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with ScriptedService() as running:
        yield running


def connect(service: ScriptedService, **arguments: Any) -> BridgeClient:
    return BridgeClient(service.address, **{"connect_timeout_s": 10.0, "timeout_s": 10.0} | arguments)


def until(is_so: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def in_thread(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function(*arguments, **options))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


# ---- rounds ----------------------------------------------------------------------------------------------------


def test_a_round_comes_whole(service: ScriptedService) -> None:
    with connect(service) as client:
        round_ = client.rollout(PROMPTS, group_size=2, target_groups=3, round_id="a", sampling=SamplingConfig(seed=1))
        assert [group.group_id for group in round_.groups] == ["a/0", "a/1", "a/2"]
        assert round_.groups[0] == make_group("a", 0)
        assert client.cursor == wire.Cursor("epoch-1", 4)
        assert service.store.acked == 0
        client.ack()
        assert service.store.acked == client.acked == 4
    (start,) = [one for one in service.received if isinstance(one, wire.StartRound)]
    assert (start.group_size, start.target_groups, start.carry, start.preview) == (2, 3, True, False)
    assert start.sampling == SamplingConfig(seed=1)
    assert [prompt.token_ids for prompt in service.store.prompts] == PROMPTS
    assert isinstance(service.received[-1], wire.Goodbye)


def test_every_trajectory_is_shown_once(service: ScriptedService) -> None:
    service.finishes_rounds = False
    with connect(service) as client:
        stream = client.stream_trajectories(PROMPTS, target_groups=2, round_id="a")
        seen = make_group("a", 0).trajectories[1]
        for _ in range(2):
            service.preview("a", seen)
        service.preview("b", make_group("b", 7).trajectories[0])
        assert next(stream) == seen
        with pytest.raises(RuntimeError):
            _ = stream.round
        service.do(lambda: service.finish_round("a"))
        assert [one.trajectory_id for one in stream] == ["a/0/0", "a/1/0", "a/1/1"]
        assert len(stream.round.groups) == 2
        assert list(stream) == []


def test_on_trajectory_is_called(service: ScriptedService) -> None:
    with connect(service) as client:
        seen: list[str] = []
        client.rollout(PROMPTS, target_groups=2, round_id="a", on_trajectory=lambda one: seen.append(one.trajectory_id))
        assert sorted(seen) == ["a/0/0", "a/0/1", "a/1/0", "a/1/1"]


def test_an_evaluation_has_its_own_prompts(service: ScriptedService) -> None:
    with connect(service) as client:
        prompts = ["text", [{"role": "user", "content": "hello"}], Prompt(token_ids=[4], metadata={"answer": 3})]
        round_ = client.rollout(prompts, carry=False)
        assert len(round_.groups) == 3
        sent = wire.decode_prompts(service.payloads[round_.round_id])
        assert [(one.text, one.messages, one.token_ids) for one in sent] == [
            ("text", None, None), (None, [{"role": "user", "content": "hello"}], None), (None, None, [4]),
        ]  # fmt: skip
        assert sent[2].metadata == {"answer": 3}
        assert service.store.prompts == []


def test_prompts_are_topped_up_and_no_more(service: ScriptedService) -> None:
    class Endless:
        looked_at = 0

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, position: int) -> list[int]:
            self.looked_at = max(self.looked_at, position)
            return [position]

    prompts = Endless()
    with connect(service) as client:
        for step in range(1, 4):
            client.rollout(prompts, target_groups=200, round_id=f"step-{step}")
            assert service.store.num_used == 200 * step
            assert len(service.store.prompts) == 200 * step + 824
            assert prompts.looked_at == 200 * step + 823
    assert [one.token_ids for one in service.store.prompts] == [[i] for i in range(len(service.store.prompts))]


def test_a_running_round_is_given_prompts(service: ScriptedService) -> None:
    service.finishes_rounds = False
    with connect(service) as client:
        thread, results = in_thread(client.rollout, [[i] for i in range(2000)], target_groups=1, round_id="a")
        service.wait_for(wire.StartRound)
        assert len(service.store.prompts) == 1024

        def use() -> None:
            service.store.num_used = 600

        service.do(use)
        until(lambda: len(service.store.prompts) == 1280)
        service.do(lambda: service.finish_round("a"))
        thread.join(10)
        assert len(results[0].groups) == 1


def test_a_full_service_is_no_error_while_it_has_prompts(service: ScriptedService) -> None:
    def refuse(message: wire.AppendPrompts, payload: memoryview) -> bool:
        if message.first == 0:
            return False
        service.send(wire.Refused(code="full", message="no room", reply_to=message.request_id))
        return True

    service.answers[wire.AppendPrompts] = refuse
    with connect(service) as client:
        assert client.rollout([[1]] * 600, target_groups=200, round_id="a").round_id == "a"
        service.do(lambda: setattr(service.store, "num_used", _PACKET_PROMPTS))
        client.ask_status()
        with pytest.raises(BridgeRefusedError, match="no room"):
            client.rollout([[1]] * 600, target_groups=200, round_id="b")


def test_prompts_are_appended(service: ScriptedService) -> None:
    with connect(service) as client:
        assert client.append_prompts([[i] for i in range(600)]) == 600
        assert client.append_prompts(["x", "y"]) == 602
        assert client.append_prompts(["y", "z"], first=601) == 603
        assert [one.text for one in service.store.prompts[600:]] == ["x", "y", "z"]
        with pytest.raises(InvalidInputError, match=r"prompts\[604\]"):
            client.append_prompts(["x", 7])
        assert client.rollout(target_groups=1, round_id="a").round_id == "a"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompts": "text", "target_groups": 1}, "prompts"),
        ({"prompts": iter([[1]]), "target_groups": 1}, "prompts"),
        ({"prompts": [], "carry": False}, "prompts"),
        ({"prompts": [b"x"], "carry": False}, r"prompts\[0\]"),
        ({"prompts": [[np.int64(3)]], "carry": False}, r"prompts\[0\]"),
        ({"prompts": [Prompt(token_ids=[1], metadata={"x": object()})], "carry": False}, r"prompts\[0\]"),
        ({"prompts": PROMPTS}, "target_groups"),
        ({"prompts": PROMPTS, "target_groups": 0}, "target_groups"),
        ({"prompts": PROMPTS, "target_groups": 1, "group_size": 1.5}, "group_size"),
        ({"prompts": PROMPTS, "target_groups": 1, "over_provision": 0.5}, "over_provision"),
        ({"prompts": PROMPTS, "target_groups": 1, "sampling": {}}, "sampling"),
        ({"prompts": PROMPTS, "target_groups": 1, "round_id": ""}, "round_id"),
        ({"prompts": PROMPTS, "target_groups": 1, "round_id": "~round-1"}, "round_id"),
        ({"prompts": PROMPTS, "target_groups": 1, "timeout_s": 0}, "timeout_s"),
        ({"prompts": PROMPTS, "target_groups": 1, "timeout_s": float("nan")}, "timeout_s"),
    ],
)
def test_wrong_arguments_start_nothing(service: ScriptedService, arguments: dict[str, Any], field: str) -> None:
    with connect(service) as client:
        with pytest.raises(InvalidInputError, match=field):
            client.rollout(**arguments)
        assert client.rollout(PROMPTS, target_groups=1, round_id="fine").round_id == "fine"
    assert [one.round_id for one in service.received if isinstance(one, wire.StartRound)] == ["fine"]


def test_two_may_not_read_the_same_round(service: ScriptedService) -> None:
    service.finishes_rounds = False
    with connect(service) as client:
        stream = client.stream_trajectories(PROMPTS, target_groups=1, round_id="a")
        with pytest.raises(InvalidInputError, match="round_id"):
            client.rollout(PROMPTS, target_groups=1, round_id="a")
        stream.close()


def test_rounds_at_a_time_come_to_whom_they_belong(service: ScriptedService) -> None:
    service.finishes_rounds = False
    with connect(service) as client:
        running = [in_thread(client.rollout, PROMPTS, target_groups=i + 1, round_id=f"r{i}") for i in range(4)]
        service.wait_for(wire.StartRound, 4)
        for i in (2, 0, 3, 1):
            service.do(lambda i=i: service.finish_round(f"r{i}"))  # type: ignore[misc]
        for i, (thread, results) in enumerate(running):
            thread.join(10)
            assert [group.group_id for group in results[0].groups] == [f"r{i}/{j}" for j in range(i + 1)]
        assert client.cursor.seq == service.store.last_seq


def test_closing_a_round_cancels_it(service: ScriptedService) -> None:
    service.finishes_rounds = False
    with connect(service) as client:
        client.stream_trajectories(PROMPTS, target_groups=1, round_id="a").close()
        client.stream_trajectories(PROMPTS, target_groups=1, round_id="b")  # is dropped
        assert [one.round_id for one in service.wait_for(wire.CancelRound, 2)] == ["a", "b"]

        def interrupt(_: Any) -> None:
            raise KeyboardInterrupt

        threading.Timer(0.2, lambda: service.preview("c", make_group("c", 0).trajectories[0])).start()
        with pytest.raises(KeyboardInterrupt):
            client.rollout(PROMPTS, target_groups=1, round_id="c", on_trajectory=interrupt)
        assert service.wait_for(wire.CancelRound, 3)[2].round_id == "c"


def test_a_round_that_failed_says_why(service: ScriptedService) -> None:
    service.finishes_rounds = False
    with connect(service) as client:
        thread, results = in_thread(client.rollout, PROMPTS, target_groups=1, round_id="a")
        service.wait_for(wire.StartRound)
        service.say(wire.RoundFailed(round_id="a", code="engine", message="the engine core died"))
        thread.join(10)
        assert isinstance(results[0], BridgeRefusedError)
        assert (results[0].code, results[0].peer) == ("engine", service.address)

        thread, results = in_thread(client.rollout, PROMPTS, target_groups=1, round_id="b")
        service.wait_for(wire.StartRound, 2)
        failed = wire.RoundFailed(round_id="b", code="invalid", message="m", field="prompts", expected="more", got="8")
        service.say(failed)
        thread.join(10)
        assert isinstance(results[0], InvalidInputError)

        service.do(lambda: service.running.clear())
        service.finishes_rounds = True
        assert client.rollout(PROMPTS, target_groups=1, round_id="a").round_id == "a"


# ---- streams ---------------------------------------------------------------------------------------------------


def test_a_stream_gives_groups_until_it_is_closed(service: ScriptedService) -> None:
    with connect(service, prefetch=4) as client:
        with client.stream(PROMPTS, group_size=2, num_groups=3) as stream:
            service.put_groups(stream.stream_id, 20, "s")
            for i in range(5):
                assert next(stream).group_id == f"s/{i}"
                assert client.cursor.seq == i + 1
                client.ack()
                assert service.store.acked == i + 1
            deliveries = service._next_seq - 1
            assert 5 <= deliveries <= 10, "no more than the prefetch allows"
        assert service.wait_for(wire.CancelRound)[0].round_id == stream.stream_id
        assert list(stream) == []
        with client.stream(PROMPTS) as later:
            assert [next(later).group_id for _ in range(15)] == [f"s/{i}" for i in range(5, 20)]
            until(lambda: client.cursor.seq == 21)  # the end of the first stream is nobody's
    (start, _) = [one for one in service.received if isinstance(one, wire.StartRound)]
    assert (start.target_groups, start.num_groups, start.group_size) == (None, 3, 2)


def test_a_stream_ends_with_the_prompts(service: ScriptedService) -> None:
    with connect(service) as client:
        stream = client.stream(PROMPTS, stream_id="s")
        service.do(lambda: setattr(service.store, "num_used", 8))
        service.deliver("s", 2)
        assert [group.group_id for group in stream] == ["s/0", "s/1"]
        assert client.cursor.seq == 3
        stream.close()


def test_a_stream_that_ran_out_of_prompts_goes_on_with_more(service: ScriptedService) -> None:
    prompts = [[i] for i in range(2000)]
    with connect(service) as client:
        stream = client.stream(prompts, stream_id="s")
        assert len(service.store.prompts) == 1024
        for end in (1024, 2000):
            service.do(lambda end=end: setattr(service.store, "num_used", end))  # type: ignore[misc]
            service.deliver("s" if end == 1024 else "s~1", 2)
            if end == 1024:
                assert [next(stream).group_id for _ in range(2)] == ["s/0", "s/1"]
                thread, results = in_thread(next, stream)
                assert service.wait_for(wire.StartRound, 2)[1].round_id == "s~1"
                assert len(service.store.prompts) == 2000
        thread.join(10)
        assert results[0].group_id == "s~1/0"
        assert [group.group_id for group in stream] == ["s~1/1"]
        assert stream.stream_id == "s"
        client.ack()
    with connect(service) as client:
        assert list(client.stream(prompts, stream_id="s")) == []


def test_an_evaluation_runs_while_a_stream_is_not_read(service: ScriptedService) -> None:
    with connect(service, prefetch=2) as client, client.stream(PROMPTS, stream_id="s") as stream:
        service.put_groups("s", 20)
        assert len(client.rollout(PROMPTS, carry=False).groups) == 8
        assert client.cursor.seq == 0
        assert [next(stream).group_id for _ in range(20)] == [f"s/{i}" for i in range(20)]
        until(lambda: client.cursor.seq == service.store.last_seq)


# ---- faults ----------------------------------------------------------------------------------------------------


def test_a_service_that_restarts_is_waited_for() -> None:
    service = ScriptedService()
    service.finishes_rounds = False
    with connect(service) as client:
        thread, results = in_thread(client.rollout, PROMPTS, target_groups=2, round_id="a")
        service.wait_for(wire.StartRound)
        service = service.restart()
        try:
            service.wait_for(wire.StartRound)
            thread.join(10)
            assert len(results[0].groups) == 2
            client.ack()
            assert service.store.acked == 3
        finally:
            service.close()


def test_nothing_is_lost_when_it_restarts_in_the_middle_of_a_stream() -> None:
    service = ScriptedService()
    client = connect(service, prefetch=3)
    try:
        stream = client.stream(PROMPTS, stream_id="s")
        taken = []
        for restart in range(4):
            service.put_groups("s", 6)
            taken += [next(stream) for _ in range(5)]
            if restart % 2:
                client.ack()
            service = service.restart()
        taken += [next(stream) for _ in range(4)]
        assert [group.group_id for group in taken] == [f"s/{i}" for i in range(6)] * 4
        assert client.cursor.seq == 24
    finally:
        client.close()
        service.close()


def test_lost_and_repeated_deliveries_do_not_matter() -> None:
    def twice(message: wire.Message, payload: bytes | None) -> list[tuple[wire.Message, bytes | None]]:
        return drop(message, payload) * 2

    drop = dropping({1, 2, 6, 11})
    with ScriptedService(on_send=twice) as service, connect(service) as client:
        round_ = client.rollout(PROMPTS, target_groups=8, round_id="a")
        assert [group.group_id for group in round_.groups] == [f"a/{i}" for i in range(8)]
        assert client._calls.session.num_gaps >= 1
        assert client._calls.session.num_duplicates >= 8


def test_a_client_that_is_forgotten_says_hello_again(service: ScriptedService) -> None:
    with connect(service) as client:
        service.forget_client()
        client.rollout(PROMPTS, target_groups=1, round_id="a")
        assert len(service.wait_for(wire.Hello, 2)) == 2


def test_a_restarted_trainer_gets_what_its_checkpoint_does_not_have(service: ScriptedService) -> None:
    with connect(service) as client:
        client.rollout(PROMPTS, target_groups=2, round_id="step-1")
        checkpoint = client.cursor
        client.rollout(PROMPTS, target_groups=2, round_id="step-2")
        client.ack(checkpoint)
        with pytest.raises(InvalidInputError, match="cursor"):
            client.ack(wire.Cursor("epoch-1", 7))
        with pytest.raises(InvalidInputError, match="cursor"):
            client.ack(wire.Cursor("another", 1))
    with connect(service, cursor=checkpoint) as client:
        assert client.cursor == checkpoint
        assert len(client.rollout(PROMPTS, target_groups=2, round_id="step-2").groups) == 2
        assert client.cursor.seq == 6
        client.rollout(PROMPTS, target_groups=1, round_id="step-3")
    assert service.store.ended == {"step-1", "step-2", "step-3"}


def test_a_round_without_a_name_that_an_earlier_process_did_not_get_comes_first(service: ScriptedService) -> None:
    with connect(service) as client:
        lost = client.rollout(PROMPTS, target_groups=2).round_id
        client.rollout(PROMPTS, carry=False)
    service.do(lambda: service.store.put_round("named", 1))
    with connect(service) as client:
        assert client.rollout(PROMPTS, target_groups=3).round_id == lost
        assert client.cursor.seq == 12, "the evaluation is of no use"
        until(lambda: client.unclaimed_rounds == ["named"])
        new = client.rollout(PROMPTS, target_groups=3)
        assert new.round_id not in (lost, "named")
        assert client.cursor.seq == 12
        client.discard("named")
        assert client.cursor.seq == 18


def test_an_older_round_that_ends_meanwhile_comes_first(service: ScriptedService) -> None:
    service.finishes_rounds = False
    with connect(service) as client:
        with pytest.raises(BridgeTimeoutError):
            client.rollout(PROMPTS, target_groups=2, timeout_s=0.2)
        (old,) = list(service.running)
    with connect(service) as client:
        thread, results = in_thread(client.rollout, PROMPTS, target_groups=3)
        service.wait_for(wire.StartRound, 2)
        service.do(lambda: service.finish_round(old))
        thread.join(10)
        assert results[0].round_id == old
        (new,) = list(service.running)
        service.do(lambda: service.finish_round(new))
        assert client.rollout(PROMPTS, target_groups=9).round_id == new
        assert client.cursor.seq == 7


def test_a_round_whose_time_is_up_can_be_asked_for_again(service: ScriptedService) -> None:
    service.finishes_rounds = False
    service.status = wire.Status(state="throttled", reason="9 deliveries are not acknowledged")
    with connect(service) as client:
        client.ask_status()
        with pytest.raises(BridgeTimeoutError) as caught:
            client.rollout(PROMPTS, target_groups=1, round_id="a", timeout_s=0.3)
        assert (caught.value.peer, caught.value.timeout_s) == (service.address, 0.3)
        assert "round a" in caught.value.phase
        assert "throttled: 9 deliveries are not acknowledged" in str(caught.value)
        service.do(lambda: service.finish_round("a"))
        assert client.rollout(PROMPTS, target_groups=1, round_id="a").round_id == "a"
        assert not [one for one in service.received if isinstance(one, wire.CancelRound)]


def test_a_silent_service_is_named(service: ScriptedService) -> None:
    with connect(service) as client:
        service.do(lambda: setattr(service, "is_silent", True))
        until(lambda: time.monotonic() - client._calls.session._last_heard > 0.5)
        for call, phase in (
            (client.ask_status, "the service's status"),
            (client.checksum, "the checksum"),
            (lambda timeout_s: client.append_prompts(PROMPTS, timeout_s=timeout_s), "prompts from 0 on to be appended"),
            (
                lambda timeout_s: client.rollout(target_groups=1, round_id="b", timeout_s=timeout_s),
                "the round b to be accepted",
            ),
            (lambda timeout_s: client.cancel("a", timeout_s=timeout_s), "round a to be cancelled"),
        ):
            with pytest.raises(BridgeTimeoutError, match="nothing was heard for") as caught:
                call(timeout_s=0.1)
            assert phase in caught.value.phase
        service.do(lambda: setattr(service, "is_silent", False))
        assert client.rollout(PROMPTS, target_groups=1).groups


def test_nobody_listens() -> None:
    with ScriptedService() as service:
        address = service.address
    with pytest.raises(BridgeTimeoutError, match="welcome") as caught:
        BridgeClient(address, connect_timeout_s=0.5)
    assert address in str(caught.value)
    assert "nobody listens there" in str(caught.value)


def test_a_peer_that_is_no_service() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(BridgeTimeoutError, match="accepted the connection and does not answer"):
            BridgeClient(f"tcp://127.0.0.1:{port}", connect_timeout_s=0.5)
        first = router.recv_multipart()[0]
        thread, results = in_thread(BridgeClient, f"tcp://127.0.0.1:{port}", connect_timeout_s=10)
        while (frames := router.recv_multipart())[0] == first:
            pass
        router.send_multipart([frames[0], b"LTBRID\x02\x00", b"x"])
        thread.join(10)
        assert isinstance(results[0], BridgeError)
        assert "version" in str(results[0])
        router.linger = 0


@pytest.mark.parametrize(
    "address", ["127.0.0.1:3", "tcp://127.0.0.1", "tcp://*:5", "inproc://x", "tcp://127.0.0.1:99999", "tcp://a b:1", 3]
)
def test_what_is_no_address(address: Any) -> None:
    with pytest.raises(InvalidInputError, match="address"):
        BridgeClient(address)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"consumer": ""}, "consumer"),
        ({"prefetch": 0}, "prefetch"),
        ({"cursor": ("epoch", 1)}, "cursor"),
        ({"keys": "folder"}, "keys"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"connect_timeout_s": "1"}, "connect_timeout_s|timeout_s"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError, match=field):
        BridgeClient("tcp://127.0.0.1:9", **arguments)


def test_another_consumer_is_refused(service: ScriptedService) -> None:
    with connect(service, consumer="one"):
        with pytest.raises(BridgeRefusedError) as caught:
            connect(service, consumer="two")
        assert caught.value.code == "busy"
    with connect(service, consumer="two"):
        pass


def test_the_newer_client_of_a_consumer_takes_over(service: ScriptedService) -> None:
    old = connect(service)
    thread, results = in_thread(old.checksum)
    with connect(service) as new:
        thread.join(10)
        until(lambda: old._calls.session.failure is not None)
        for call in (old.checksum, old.ack, lambda: old.rollout(PROMPTS, target_groups=1), lambda: old.status):
            with pytest.raises(BridgeClosedError, match="is another client's"):
                call()
        old.close()
        assert new.rollout(PROMPTS, target_groups=1).groups
    del results


def test_another_store_is_refused() -> None:
    service = ScriptedService()
    client = connect(service)
    client.rollout(PROMPTS, target_groups=1, round_id="a")
    service = service.restart(store=Store(epoch="epoch-2"))
    try:
        until(lambda: client._calls.session.failure is not None)
        with pytest.raises(BridgeRefusedError) as caught:
            client.rollout(PROMPTS, target_groups=1, round_id="b")
        assert caught.value.code == "epoch"
        with pytest.raises(BridgeRefusedError, match="epoch"):
            connect(service, cursor=wire.Cursor("epoch-1", 2))
        with connect(service) as fresh:
            assert fresh.epoch == "epoch-2"
    finally:
        client.close()
        service.close()


def test_a_closed_client_says_so(service: ScriptedService) -> None:
    service.finishes_rounds = False
    client = connect(service)
    thread, results = in_thread(client.rollout, PROMPTS, target_groups=1, round_id="a")
    service.wait_for(wire.StartRound)
    stream = client.stream(PROMPTS, stream_id="s")
    client.close()
    client.close()
    thread.join(10)
    assert isinstance(results[0], BridgeClosedError)
    with pytest.raises(BridgeClosedError):
        next(stream)
    stream.close()
    for call in (
        client.ack, client.checksum, client.ask_status, lambda: client.cursor, lambda: client.welcome,
        lambda: client.append_prompts([[1]]), lambda: client.push_weights([], 1), lambda: client.cancel("a"),
        lambda: client.rollout(PROMPTS, target_groups=1),
    ):  # fmt: skip
        with pytest.raises(BridgeClosedError, match="closed"):
            call()
    assert not [one for one in threading.enumerate() if one.name == "longtail-bridge-client"]


def test_a_client_is_not_for_the_children_of_its_process(service: ScriptedService) -> None:
    with connect(service) as client:
        held, let_go = threading.Event(), threading.Event()

        def hold_lock() -> None:
            with client._calls.io.lock:
                held.set()
                let_go.wait()

        holder, _ = in_thread(hold_lock)
        held.wait()
        child = os.fork()  # with the lock of a thread that the child does not have
        if child == 0:
            try:
                client.ask_status()
            except BridgeClosedError:
                os._exit(7)
            os._exit(1)
        let_go.set()
        holder.join()
        until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert client.ask_status().state == "idle"


def test_clients_leave_no_files_or_threads_behind(service: ScriptedService) -> None:
    connect(service).close()
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        connect(service).close()
        with pytest.raises(BridgeTimeoutError):
            BridgeClient("tcp://127.0.0.1:9", connect_timeout_s=0.05)
    until(lambda: len(os.listdir("/proc/self/fd")) <= files and threading.active_count() <= threads)


def test_an_unreadable_delivery_is_no_group(service: ScriptedService) -> None:
    with connect(service) as client:
        stream = client.stream(PROMPTS, stream_id="s")

        def spoil() -> None:
            service.store.put("s", make_group("s", 0))
            service.store.deliveries[1] = ("s", "group", b"\x93abc")

        service.do(spoil)
        with pytest.raises(BridgeError, match=r"delivery 1 .* could not be read"):
            next(stream)
        assert client.cursor.seq == 0


# ---- pushes ----------------------------------------------------------------------------------------------------


def begin(channel: Any) -> wire.BeginWeights:
    return wire.BeginWeights(request_id=channel.next_id(), push_id="p", version=1)


def ready(service: ScriptedService) -> None:
    def answer(message: wire.BeginWeights, payload: memoryview) -> bool:
        service.send(wire.WeightsReady(reply_to=message.request_id, push_id="p", window=2, chunk_bytes=8))
        return True

    service.answers[wire.BeginWeights] = answer


def chunk(serial: int) -> wire.WeightsChunk:
    return wire.WeightsChunk(push_id="p", serial=serial, offset=8 * serial, length=8, num_bytes=8)


def test_a_push_sends_and_waits(service: ScriptedService) -> None:
    ready(service)
    chunks: list[bytes] = []

    def take(message: wire.WeightsChunk, payload: memoryview) -> bool:
        chunks.append(bytes(payload))
        service.send(wire.WeightsCredit(push_id="p", serial=message.serial))
        return True

    def apply(message: wire.CommitWeights, payload: memoryview) -> bool:
        applied = wire.WeightsApplied(
            reply_to=message.request_id, push_id="p", version=5, digest="d", pause_s=0.1, num_bytes_received=24
        )
        service.send(applied)
        return True

    service.answers |= {wire.WeightsChunk: take, wire.CommitWeights: apply}
    service.weights_needed = 5
    with connect(service) as client:
        assert client.weights_needed == 5
        with client._calls.push_channel("p") as channel:
            with pytest.raises(WeightsPushError, match="busy"), client._calls.push_channel("q"):
                pass
            reply = channel.request(begin(channel), "the service to be ready", 5.0)
            assert isinstance(reply, wire.WeightsReady)
            for serial in range(3):
                channel.send(chunk(serial), memoryview(bytes([serial]) * 8))
                assert channel.wait_credit(serial, "credit", 5.0) == serial
            with pytest.raises(BridgeTimeoutError, match="chunk 3"):
                channel.wait_credit(3, "chunk 3 to be taken", 0.1)
            commit = wire.CommitWeights(request_id=channel.next_id(), push_id="p", num_tensors=1, digest="d")
            assert isinstance(channel.request(commit, "the weights to be applied", 5.0), wire.WeightsApplied)
        assert chunks == [bytes([serial]) * 8 for serial in range(3)]
        assert (client.weight_version, client.weights_needed) == (5, None)


def test_a_push_that_was_refused_or_lost_says_so(service: ScriptedService) -> None:
    ready(service)

    def push(ended_by: Callable[[], None]) -> None:
        with client._calls.push_channel("p") as channel:
            channel.request(begin(channel), "ready", 5.0)
            ended_by()
            channel.wait_credit(0, "credit", 5.0)

    with connect(service) as client:
        refused = wire.Refused(code="verification", message="wrong bytes", push_id="p")
        with pytest.raises(WeightsPushError) as caught:
            push(lambda: service.say(refused))
        assert caught.value.code == "verification"
        assert service.wait_for(wire.AbortWeights)[0].push_id == "p"
        with pytest.raises(WeightsPushError) as caught:
            push(service.forget_client)
        assert caught.value.code == "session"
        assert client.ask_status().state == "idle"


def test_a_push_waits_for_a_service_that_is_not_there_yet() -> None:
    service = ScriptedService()
    with connect(service) as client:
        service.close()
        until(lambda: not client._calls.session.is_open)
        with client._calls.push_channel("p") as channel:
            thread, results = in_thread(channel.request, begin(channel), "ready", 10.0)
            service = ScriptedService(service.store, port=service.port)
            ready(service)
            try:
                thread.join(10)
                assert isinstance(results[0], wire.WeightsReady)
            finally:
                service.close()


def test_trajectories_are_what_was_sent(service: ScriptedService) -> None:
    service.finishes_rounds = False
    with connect(service) as client:
        stream = client.stream_trajectories(PROMPTS, target_groups=1, round_id="a")
        service.preview("a", trajectory())
        assert next(stream) == trajectory()
        stream.close()


def test_what_is_too_large_for_a_message_is_refused_to_its_caller_alone(service: ScriptedService) -> None:
    with connect(service) as client:
        for sampling in (SamplingConfig(stop=("x" * 270_000,)), SamplingConfig(stop=("\ud800",))):
            with pytest.raises(InvalidInputError, match="request"):
                client.rollout(PROMPTS, target_groups=1, round_id="a", sampling=sampling)
        assert client.rollout(PROMPTS, target_groups=1, round_id="a").groups


def test_the_thread_survives_a_message_that_can_not_be_encoded(service: ScriptedService) -> None:
    with connect(service) as client:
        replies: list[Any] = []
        with client._calls.io.lock:
            session = client._calls.session
            session.request(wire.CancelRound(request_id=session.next_id(), round_id=object()), replies.append)  # type: ignore[arg-type]
        client._calls.io.wake()
        until(lambda: bool(replies))
        assert isinstance(replies[0], InvalidInputError)
        assert client.ask_status().state == "idle"
