"""Several engines and one trainer: prompts are dealt out, rounds shared, weights pushed to all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_service import ScriptedService, Store

from longtail.engine.config import SamplingConfig
from longtail.engine.prompts import Prompt
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.connection.strided_prompts import StridedPrompts
from longtail.trainer_bridge.connection.tee import Tee
from longtail.trainer_bridge.errors import BridgeTimeoutError, InvalidInputError, WeightsPushError
from longtail.trainer_bridge.fleet import BridgeFleet, FleetCursor, FleetPushError

PROMPTS = [[i] for i in range(50)]


@pytest.fixture
def services() -> Iterator[list[ScriptedService]]:
    running = [ScriptedService(Store(epoch=f"epoch-{e}")) for e in range(3)]
    yield running
    for service in running:
        service.close()


def connect(services: list[ScriptedService], **arguments: Any) -> BridgeFleet:
    return BridgeFleet.connect([one.address for one in services], connect_timeout_s=10.0, timeout_s=10.0, **arguments)


@given(st.integers(1, 5), st.integers(0, 30), st.integers(1, 4))
def test_every_prompt_is_one_engines(num_engines: int, num_prompts: int, group_size: int) -> None:
    prompts = [[i] for i in range(num_prompts)]
    parts = [StridedPrompts(prompts, e, num_engines, group_size, 7) for e in range(num_engines)]
    dealt = [part[i] for part in parts for i in range(len(part))]
    assert sorted(one.token_ids[0] for one in dealt) == list(range(num_prompts))  # type: ignore[index]
    for one in dealt:
        position = one.token_ids[0]  # type: ignore[index]
        assert (one.group_id, one.seed) == (str(position), 7 + position * group_size)


def test_own_names_and_seeds_stay() -> None:
    (prompt,) = [StridedPrompts([Prompt(text="x", group_id="g", seed=3)], 0, 1, 2, 9)[0]]
    assert (prompt.group_id, prompt.seed) == ("g", 3)
    assert StridedPrompts(["x"], 0, 1, 2, None)[0].seed is None
    with pytest.raises(InvalidInputError, match="prompts"):
        StridedPrompts(iter(["x"]), 0, 1, 2, None)


def test_a_round_is_shared(services: list[ScriptedService]) -> None:
    with connect(services) as fleet:
        seen: list[str] = []
        round_ = fleet.rollout(
            PROMPTS, group_size=2, target_groups=7, round_id="a", sampling=SamplingConfig(seed=5),
            on_trajectory=lambda one: seen.append(one.trajectory_id),
        )  # fmt: skip
        assert [len(one.groups) for one in round_.rounds] == [3, 2, 2]
        assert [one.round_id for one in round_.rounds] == ["a.0", "a.1", "a.2"]
        assert len(round_.groups) == len(round_.complete_groups) == 7
        assert sorted(seen) == sorted(one.trajectory_id for one in round_.trajectories)
        assert [one.seq for one in fleet.cursor.cursors] == [4, 3, 3]
        fleet.ack()
        assert [one.store.acked for one in services] == [4, 3, 3]
        assert fleet.weight_versions == (0, 0, 0)
        assert [one.state for one in fleet.statuses] == ["idle"] * 3
    for e, service in enumerate(services):
        assert [one.token_ids for one in service.store.prompts] == [[i] for i in range(e, 50, 3)]
        assert service.store.prompts[1].seed == 5 + 2 * (e + 3)


def test_a_small_round_needs_not_all(services: list[ScriptedService]) -> None:
    with connect(services) as fleet:
        assert [one.round_id for one in fleet.rollout(PROMPTS, target_groups=2, round_id="a").rounds] == ["a.0", "a.1"]
        evaluation = fleet.rollout([[1], [2], [3], [4]], carry=False)
        assert [len(one.groups) for one in evaluation.rounds] == [2, 1, 1]


def test_a_restarted_trainer_goes_on(services: list[ScriptedService]) -> None:
    with connect(services) as fleet:
        fleet.rollout(PROMPTS, target_groups=3, round_id="a")
        saved = msgspec.json.encode(fleet.cursor)
        fleet.rollout(PROMPTS, target_groups=6, round_id="b")
    cursor = msgspec.json.decode(saved, type=FleetCursor)
    with connect(services, cursor=cursor) as fleet:
        assert fleet.cursor == cursor
        assert len(fleet.rollout(PROMPTS, target_groups=6, round_id="b").groups) == 6
        with pytest.raises(InvalidInputError, match="cursor"):
            fleet.ack(FleetCursor(cursor.cursors[:2]))
        fleet.ack(cursor)
    with pytest.raises(InvalidInputError, match="cursor"):
        connect(services[:2], cursor=cursor)
    with pytest.raises(Exception, match="epoch"):
        connect(services[::-1], cursor=cursor)
    for service in services:
        assert [one for one in service.received if isinstance(one, wire.StartRound)][-1].round_id.startswith("b.")


def test_one_that_is_late_loses_nothing(services: list[ScriptedService]) -> None:
    services[1].finishes_rounds = False
    with connect(services) as fleet:
        with pytest.raises(BridgeTimeoutError, match=r"round a\.1") as caught:
            fleet.rollout(PROMPTS, target_groups=3, round_id="a", timeout_s=0.5)
        assert caught.value.peer == services[1].address
        assert [one.seq for one in fleet.cursor.cursors] == [0, 0, 0]
        services[1].do(lambda: services[1].finish_round("a.1"))
        assert len(fleet.rollout(PROMPTS, target_groups=3, round_id="a").groups) == 3
        assert [one.seq for one in fleet.cursor.cursors] == [2, 2, 2]


def test_one_that_restarts_is_waited_for(services: list[ScriptedService]) -> None:
    services[2].finishes_rounds = False
    with connect(services) as fleet:
        results: list[Any] = []
        thread = threading.Thread(
            target=lambda: results.append(fleet.rollout(PROMPTS, target_groups=3, round_id="a")), daemon=True
        )
        thread.start()
        services[2].wait_for(wire.StartRound)
        services[2] = services[2].restart()
        thread.join(10)
        assert len(results[0].groups) == 3


def test_a_stream_takes_turns(services: list[ScriptedService]) -> None:
    with connect(services) as fleet:
        with fleet.stream(PROMPTS, num_groups=8, stream_id="s") as stream:
            for e in (0, 2):
                services[e].put_groups(f"s.{e}", 3)
            got = [next(stream).group_id for _ in range(6)]
            assert sorted(got) == [f"s.{e}/{i}" for e in (0, 2) for i in range(3)]
            for e in (0, 2):
                assert [one for one in got if one.startswith(f"s.{e}")] == [f"s.{e}/{i}" for i in range(3)]
        starts = [one.wait_for(wire.StartRound)[0] for one in services]
        assert [one.num_groups for one in starts] == [3, 3, 2]
        for service in services:
            service.wait_for(wire.CancelRound)


def test_a_stream_that_is_dropped_ends(services: list[ScriptedService]) -> None:
    with connect(services) as fleet:
        stream = fleet.stream(PROMPTS, num_groups=8)
        del stream
        for service in services:
            service.wait_for(wire.CancelRound)


def test_no_fleet_without_all(services: list[ScriptedService]) -> None:
    addresses = [services[0].address, "tcp://127.0.0.1:9"]
    with pytest.raises(BridgeTimeoutError, match=r"127\.0\.0\.1:9"):
        BridgeFleet.connect(addresses, connect_timeout_s=0.5)
    assert services[0].wait_for(wire.Goodbye)
    for wrong in ([], "tcp://127.0.0.1:9"):
        with pytest.raises(InvalidInputError, match="addresses"):
            BridgeFleet.connect(wrong)
    with pytest.raises(InvalidInputError, match="clients"):
        BridgeFleet([])


def test_weights_go_to_all_that_need_them(services: list[ScriptedService], monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(services) as fleet:
        reads = 0

        def tensors() -> Iterator[tuple[str, int]]:
            nonlocal reads
            reads += 1
            yield from ((f"t{i}", i) for i in range(20))

        got: dict[int, list[Any]] = {}
        fails = {1}

        for e, client in enumerate(fleet.clients):

            def push(named: Any, version: int, e: int = e, **_: Any) -> Any:
                got[e] = []
                for one in named:
                    got[e].append(one)
                    if e in fails and len(got[e]) == 3:
                        raise WeightsPushError("peer", "apply", "no")
                services[e].do(
                    lambda: setattr(services[e], "status", wire.Status(state="idle", weight_version=version))
                )
                fleet.clients[e].ask_status()
                return e

            monkeypatch.setattr(client, "push_weights", push)
        with pytest.raises(FleetPushError) as caught:
            fleet.push_weights(tensors(), 4)
        assert list(caught.value.errors) == [1]
        assert caught.value.peer == services[1].address
        assert got[0] == got[2] == [(f"t{i}", i) for i in range(20)]
        assert fleet.weight_versions == (4, 0, 4)
        fails.clear()
        assert fleet.push_weights(tensors(), 4) == [None, 1, None]
        assert fleet.push_weights(tensors(), 4) == [None, None, None]
        assert reads == 2


def test_what_the_iterable_raises_reaches_every_reader() -> None:
    tee = Tee(2)
    caught: list[BaseException] = []

    def read(items: Iterator[Any]) -> None:
        try:
            list(items)
        except ValueError as error:
            caught.append(error)

    threads = [threading.Thread(target=tee.reading(i, read)) for i in range(2)]
    for thread in threads:
        thread.start()

    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        tee.feed(items())
    for thread in threads:
        thread.join(10)
    assert len(caught) == 2


def test_the_fastest_reader_is_not_far_ahead() -> None:
    tee = Tee(2)
    produced = 0
    taken = [0, 0]
    gate = threading.Event()

    def items() -> Iterator[int]:
        nonlocal produced
        for i in range(30):
            produced = i
            yield i

    def read(i: int) -> Any:
        def run(stream: Iterator[int]) -> None:
            for _ in stream:
                taken[i] += 1
                if i == 1:
                    gate.wait(10)

        return run

    threads = [threading.Thread(target=tee.reading(i, read(i))) for i in range(2)]
    threads.append(threading.Thread(target=tee.feed, args=(items(),)))
    for thread in threads:
        thread.start()
    threads[2].join(0.3)
    assert produced <= 4
    gate.set()
    for thread in threads:
        thread.join(10)
    assert taken == [30, 30]


def test_an_engine_that_needs_the_version_it_says_it_has_gets_it(
    services: list[ScriptedService], monkeypatch: pytest.MonkeyPatch
) -> None:
    for service in services:
        service.status = wire.Status(state="idle", weight_version=5)
    services[1].status = wire.Status(state="needs_weights", weight_version=5)
    services[1].weights_needed = 5
    with connect(services) as fleet:
        for e, client in enumerate(fleet.clients):
            monkeypatch.setattr(client, "push_weights", lambda named, version, e=e, **_: (e, list(named), version))
        assert fleet.push_weights([("t", 1)], 5) == [None, (1, [("t", 1)], 5), None]
