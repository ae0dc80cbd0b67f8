"""The asyncio client: the same calls and errors, without holding up the event loop."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_service import ScriptedService, make_group

from longtail.trainer_bridge import wire
from longtail.trainer_bridge.async_client import AsyncBridgeClient
from longtail.trainer_bridge.client import BridgeClient
from longtail.trainer_bridge.errors import (
    BridgeClosedError,
    BridgeRefusedError,
    BridgeTimeoutError,
    InvalidInputError,
)

PROMPTS = [[1, 2, 3]] * 8


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with ScriptedService() as running:
        yield running


def connect(service: ScriptedService, **arguments: Any) -> AsyncBridgeClient:
    return AsyncBridgeClient(service.address, **{"connect_timeout_s": 10.0, "timeout_s": 10.0} | arguments)


def test_it_has_the_calls_of_the_blocking_client() -> None:
    for name, method in inspect.getmembers(BridgeClient, inspect.isfunction):
        if not name.startswith("_"):
            mine = inspect.signature(getattr(AsyncBridgeClient, name))
            assert list(mine.parameters.values()) == list(inspect.signature(method).parameters.values()), name
    assert inspect.signature(AsyncBridgeClient).parameters == inspect.signature(BridgeClient).parameters


def test_rounds_acknowledgements_and_status(service: ScriptedService) -> None:
    async def run() -> None:
        async with connect(service) as client:
            seen: list[str] = []
            round_ = await client.rollout(
                PROMPTS, target_groups=2, round_id="a", on_trajectory=lambda one: seen.append(one.trajectory_id)
            )
            assert [group.group_id for group in round_.groups] == ["a/0", "a/1"]
            assert len(seen) == 4
            await client.ack()
            assert service.store.acked == 3
            assert await client.append_prompts([[7]]) == 9
            assert (await client.ask_status()).num_prompts == 9
            assert (await client.checksum()).version == 3
            with pytest.raises(InvalidInputError, match="round_id"):
                await client.rollout(PROMPTS, target_groups=1, round_id="")

    asyncio.run(run())


def test_several_rounds_and_a_ticking_loop(service: ScriptedService) -> None:
    service.finishes_rounds = False

    async def run() -> None:
        async with connect(service) as client:
            running = [
                asyncio.create_task(client.rollout(PROMPTS, target_groups=i + 1, round_id=f"r{i}")) for i in range(3)
            ]
            ticks = 0
            while sum(isinstance(one, wire.StartRound) for one in list(service.received)) < 3:
                await asyncio.sleep(0.005)
                ticks += 1
            assert ticks
            for i in range(3):
                service.do(lambda i=i: service.finish_round(f"r{i}"))  # type: ignore[misc]
            assert [len(round_.groups) for round_ in await asyncio.gather(*running)] == [1, 2, 3]

    asyncio.run(run())


def test_trajectories_as_they_end(service: ScriptedService) -> None:
    service.finishes_rounds = False

    async def run() -> None:
        async with connect(service) as client:
            stream = client.stream_trajectories(PROMPTS, target_groups=1, round_id="a")
            with pytest.raises(RuntimeError):
                _ = stream.round
            first = asyncio.ensure_future(anext(stream))
            while not service.running:
                await asyncio.sleep(0.005)
            service.preview("a", make_group("a", 0).trajectories[1])
            assert (await first).trajectory_id == "a/0/1"
            service.do(lambda: service.finish_round("a"))
            assert [one.trajectory_id async for one in stream] == ["a/0/0"]
            assert len(stream.round.groups) == 1

    asyncio.run(run())


def test_a_stream(service: ScriptedService) -> None:
    async def run() -> None:
        async with connect(service) as client:
            async with client.stream(PROMPTS, stream_id="s") as stream:
                first = asyncio.ensure_future(anext(stream))
                while not service.running:
                    await asyncio.sleep(0.005)
                service.put_groups("s", 4)
                assert (await first).group_id == "s/0"
                assert (await anext(stream)).group_id == "s/1"
                assert client.cursor.seq == 2
            assert [group async for group in stream] == []
            service.wait_for(wire.CancelRound)

    asyncio.run(run())


def test_cancellation_cancels_the_round(service: ScriptedService) -> None:
    service.finishes_rounds = False

    async def run() -> None:
        async with connect(service) as client:
            task = asyncio.create_task(client.rollout(PROMPTS, target_groups=1, round_id="a"))
            while not service.running:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await asyncio.to_thread(service.wait_for, wire.CancelRound))[0].round_id == "a"
            service.do(lambda: setattr(service, "finishes_rounds", True))
            assert (await client.rollout(PROMPTS, target_groups=1, round_id="b")).round_id == "b"

    asyncio.run(run())


def test_time_runs_out_and_the_round_can_be_asked_for_again(service: ScriptedService) -> None:
    service.finishes_rounds = False

    async def run() -> None:
        async with connect(service) as client:
            began = time.monotonic()
            with pytest.raises(BridgeTimeoutError, match="round a"):
                await client.rollout(PROMPTS, target_groups=1, round_id="a", timeout_s=0.2)
            assert time.monotonic() - began < 5
            service.do(lambda: service.finish_round("a"))
            assert (await client.rollout(PROMPTS, target_groups=1, round_id="a")).round_id == "a"

    asyncio.run(run())


def test_what_can_not_be_reached_or_is_closed(service: ScriptedService) -> None:
    async def run() -> None:
        with pytest.raises(BridgeTimeoutError, match="nobody listens"):
            async with AsyncBridgeClient("tcp://127.0.0.1:9", connect_timeout_s=0.3):
                pass
        async with connect(service, consumer="one") as client:
            with pytest.raises(BridgeRefusedError, match="busy"):
                async with connect(service, consumer="two"):
                    pass
            waiting = asyncio.create_task(client.rollout(target_groups=1, round_id="never", timeout_s=10))
        result = (await asyncio.gather(waiting, return_exceptions=True))[0]
        assert isinstance(result, BridgeClosedError) or result.round_id == "never"  # type: ignore[union-attr]
        with pytest.raises(BridgeClosedError):
            await client.ack()

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["round", "stream"])
def test_a_start_whose_time_is_up_can_be_tried_again(service: ScriptedService, kind: str) -> None:
    service.answers[wire.StartRound] = lambda message, payload: True

    async def run() -> None:
        async with connect(service) as client:
            running: Any
            if kind == "round":
                running = client.stream_trajectories(PROMPTS, target_groups=1, round_id="a", timeout_s=0.3)
            else:
                running = client.stream(PROMPTS, stream_id="a", timeout_s=0.3)
            for _ in range(2):
                with pytest.raises(BridgeTimeoutError, match="the round a to be accepted"):
                    await anext(running)
            service.do(service.answers.clear)
            if kind == "stream":
                service.put_groups("a", 1)
            running._timeout_s = 10.0
            assert await anext(running)

    asyncio.run(run())
