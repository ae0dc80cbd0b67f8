"""Client and service together, over real sockets, with an engine of glass: nothing is lost, nothing comes twice."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_rollout_engine import FakeMemory, FakeRolloutEngine
from weight_examples import MANIFEST, arrays_of, as_bytes, changed_weights, random_weights, staged_bytes

from longtail.engine.errors import InvalidInputError
from longtail.engine.trajectory import Group
from longtail.trainer_bridge.async_client import AsyncBridgeClient
from longtail.trainer_bridge.client import BridgeClient
from longtail.trainer_bridge.errors import (
    BridgeClosedError,
    BridgeError,
    BridgeRefusedError,
    BridgeTimeoutError,
    WeightsPushError,
)
from longtail.trainer_bridge.fleet import BridgeFleet
from longtail.trainer_bridge.keys import CLIENT, SERVER, ClientKeys, make_keys
from longtail.trainer_bridge.service.config import BridgeConfig
from longtail.trainer_bridge.service.service import BridgeService
from longtail.trainer_bridge.weights.ring import Ring
from longtail.trainer_bridge.weights.staging import Staging
from longtail.trainer_bridge.wire import Cursor

PROMPTS = [[i % 512, (i + 1) % 512] for i in range(2000)]


class Site:
    """An engine with its service, which can be killed and started again."""

    def __init__(self, state: Path | None = None, *, staging: Staging | None = None, **config: Any) -> None:
        self.memory = FakeMemory()
        self._staging = staging
        self._config = {"heartbeat_s": 0.1, "state": state} | config
        self.start()

    def start(self) -> None:
        self.engine = FakeRolloutEngine(self.memory)
        self.service = BridgeService(self.engine, BridgeConfig(**self._config), staging=self._staging or "own")
        self._config["address"] = self.service.address

    def restart(self) -> None:
        self.service.close()
        self.start()

    @property
    def address(self) -> str:
        return self.service.address

    def connect(self, **arguments: Any) -> BridgeClient:
        return BridgeClient(self.address, **{"connect_timeout_s": 10.0, "timeout_s": 20.0} | arguments)

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *error: object) -> None:
        self.service.close()


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as running:
        yield running


def until(is_so: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def names(groups: list[Group]) -> list[str]:
    return [group.group_id for group in groups]


def test_rounds_streams_and_evaluations(site: Site) -> None:
    with site.connect() as client:
        seen: list[str] = []
        first = client.rollout(
            PROMPTS, group_size=2, target_groups=4, on_trajectory=lambda one: seen.append(one.trajectory_id)
        )
        assert names(first.groups) == ["0", "1", "2", "3"]
        assert sorted(seen) == sorted(one.trajectory_id for one in first.trajectories)
        assert first.carry is not None
        evaluation = client.rollout([[9], [8], [7]], carry=False, group_size=2)
        assert [one.prompt_token_ids for one in evaluation.trajectories] == [[9], [9], [8], [8], [7], [7]]
        with client.stream(PROMPTS, group_size=2) as stream:
            assert names([next(stream) for _ in range(10)]) == [str(i) for i in range(4, 14)]
        client.ack()
        later = client.rollout(PROMPTS, target_groups=2)
        with client.stream(PROMPTS) as stream:
            rest = names([next(stream) for _ in range(3)])
        used = [*names(first.groups), *[str(i) for i in range(4, 14)], *names(later.groups), *rest]
        assert len(set(used)) == len(used)
        status = client.ask_status()
        assert status.num_prompts > status.num_prompts_used >= 14
        assert client.checksum().model == "model-0"


def test_wrong_prompts_and_settings_are_named(site: Site) -> None:
    with site.connect() as client:
        with pytest.raises(InvalidInputError, match=r"prompts\[1\]\.token_ids\[0\]: expected an integer in \[0, 512\)"):
            client.rollout([[1], [512]], target_groups=1)
        with pytest.raises(InvalidInputError, match=r"prompts\[0\]"):
            client.rollout(["text without a tokenizer"], carry=False)
        assert client.rollout([[1], [2]], target_groups=1).groups


def test_prompts_run_out(site: Site) -> None:
    with site.connect() as client:
        with client.stream(PROMPTS[:7]) as stream:
            assert names(list(stream)) == [str(i) for i in range(7)]
        with pytest.raises(InvalidInputError, match="no more prompts"):
            client.rollout(PROMPTS[:7], target_groups=2, round_id="a")
        with pytest.raises(InvalidInputError, match="earlier rounds took 7 prompts"):
            client.rollout(PROMPTS[:6], target_groups=2, round_id="b")
        assert names(client.rollout(PROMPTS[:9], target_groups=2, round_id="a").groups) == ["7", "8"]


def test_more_prompts_than_the_lookahead(site: Site) -> None:
    with site.connect(prefetch=8) as client:
        got: list[str] = []
        with client.stream(PROMPTS, num_groups=4) as stream:
            for group in stream:
                got.append(group.group_id)
                if len(got) % 50 == 0:
                    client.ack()
        assert got == [str(i) for i in range(2000)]


def test_a_trainer_that_acknowledges_nothing_is_told() -> None:
    with Site(max_unacked=6) as site, site.connect() as client:
        for _ in range(2):
            client.rollout(PROMPTS, target_groups=3)
        with pytest.raises(BridgeTimeoutError, match=r"throttled.*acknowledged"):
            client.rollout(PROMPTS, target_groups=3, timeout_s=0.5)
        client.ack()
        assert names(client.rollout(PROMPTS, target_groups=3).groups) == ["6", "7", "8"]


def test_the_service_restarts_between_and_within_rounds(tmp_path: Path) -> None:
    with Site(tmp_path) as site, site.connect() as client:
        got: list[str] = []
        for step in range(6):
            site.engine.may_finish.clear()
            timer = threading.Timer(0.05, site.restart)
            if step % 2:
                timer.start()
            else:
                site.engine.may_finish.set()
            got += names(client.rollout(PROMPTS, target_groups=4, round_id=f"step-{step}").groups)
            if step % 2:
                timer.join()
            if step % 3 == 2:
                client.ack()
        assert got == [str(i) for i in range(24)]


def test_a_stream_goes_on_through_restarts(tmp_path: Path) -> None:
    with Site(tmp_path) as site, site.connect(prefetch=4) as client:
        got: list[str] = []
        with client.stream(PROMPTS, num_groups=4, stream_id="s") as stream:
            for i in range(40):
                if i % 13 == 12:
                    site.restart()
                got.append(next(stream).group_id)
                if i % 7 == 6:
                    client.ack()
        assert got == [str(i) for i in range(40)]


@pytest.mark.parametrize("seed", range(4))
def test_trainer_and_service_die_at_random(tmp_path: Path, seed: int) -> None:
    """What a checkpoint has and what comes after it are all groups, each once."""
    chance = random.Random(seed)
    trained: list[str] = []
    checkpoint: tuple[Cursor | None, int, list[str]] = (None, 0, [])
    restarting = threading.Thread(target=lambda: None)
    restarting.start()
    with Site(tmp_path) as site:
        while checkpoint[1] < 12:
            cursor, step, trained = checkpoint[0], checkpoint[1], list(checkpoint[2])
            restarting.join()
            client = site.connect(cursor=cursor, prefetch=chance.choice([1, 2, 64]))
            try:
                while step < 12:
                    if chance.random() < 0.3:
                        restarting.join()
                        restarting = threading.Timer(chance.random() * 0.01, site.restart)
                        restarting.start()
                    trained += names(client.rollout(PROMPTS, target_groups=3, round_id=f"step-{step}").groups)
                    step += 1
                    if chance.random() < 0.25:
                        break  # it dies before its checkpoint
                    checkpoint = (client.cursor, step, list(trained))
                    if chance.random() < 0.25:
                        break  # and here before it could say so
                    client.ack(checkpoint[0])
            finally:
                client.close()
        restarting.join()
    assert Counter(checkpoint[2]) == Counter(str(i) for i in range(36))


def test_a_service_without_a_state_folder_is_another_one_after_a_restart(site: Site) -> None:
    with site.connect() as client:
        client.rollout(PROMPTS, target_groups=1)
        cursor = client.cursor
        site.restart()
        with pytest.raises(BridgeRefusedError) as caught:
            client.rollout(PROMPTS, target_groups=1)
        assert caught.value.code == "epoch"
    with pytest.raises(BridgeRefusedError, match="epoch"):
        site.connect(cursor=cursor)
    with site.connect() as client:
        assert client.rollout(PROMPTS, target_groups=1).groups


def test_a_stream_that_a_dead_trainer_left_is_taken_up(tmp_path: Path) -> None:
    with Site(tmp_path, max_unacked=8) as site:
        dead = site.connect(prefetch=4)
        stream = dead.stream(PROMPTS, num_groups=4)
        got = names([next(stream) for _ in range(3)])
        cursor = dead.cursor
        with site.connect(cursor=cursor, prefetch=4) as client:  # takes over
            with client.stream(PROMPTS, num_groups=4) as later:
                for _ in range(40):
                    got.append(next(later).group_id)
                    client.ack()
            assert got == [str(i) for i in range(43)]
        with pytest.raises(BridgeClosedError, match="took the session over"):
            list(stream)
        dead.close()


def test_takeover_and_another_consumer(site: Site) -> None:
    with site.connect() as old:
        with pytest.raises(BridgeRefusedError, match="busy"):
            site.connect(consumer="another")
        with site.connect() as new:
            until(lambda: old._calls.session.failure is not None)
            with pytest.raises(BridgeClosedError):
                old.ask_status()
            assert new.rollout(PROMPTS, target_groups=1).groups
    with site.connect(consumer="another") as client:
        assert client.ask_status().state == "idle"


def test_a_dead_engine_fails_the_round_and_no_more(site: Site) -> None:
    with site.connect() as client:
        client.rollout(PROMPTS, target_groups=2)
        site.engine.may_finish.clear()
        results: list[Any] = []

        def run() -> None:
            try:
                results.append(client.rollout(PROMPTS, target_groups=2))
            except BridgeError as error:
                results.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        until(lambda: site.engine.num_in_flight > 0)
        site.engine.die()
        thread.join(10)
        assert isinstance(results[0], BridgeRefusedError)
        assert results[0].code == "engine"
        client.ack()
        until(lambda: client.ask_status().state == "dead")


def test_cancelling_ends_the_round_of_another_thread(site: Site) -> None:
    site.engine.may_finish.clear()
    with site.connect() as client:
        stream = client.stream_trajectories(PROMPTS, target_groups=2, round_id="a")
        client.cancel("a")
        with pytest.raises(BridgeRefusedError, match="cancelled"):
            next(stream)
        client.cancel("unknown")
        site.engine.may_finish.set()
        assert client.rollout(PROMPTS, target_groups=2, round_id="a").groups


def test_a_push_to_a_service_that_takes_none(site: Site) -> None:
    with site.connect() as client:
        with pytest.raises(WeightsPushError):
            client.push_weights([], 1)
        assert client.weight_version == 0


def test_keys(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", (SERVER, CLIENT))
    make_keys(tmp_path / "other", (SERVER, CLIENT))
    with Site(keys=tmp_path / "keys") as site:
        keys, wrong = ClientKeys.read(tmp_path / "keys"), ClientKeys.read(tmp_path / "other")
        with site.connect(keys=keys) as client:
            assert client.rollout(PROMPTS, target_groups=1).groups
        stranger = ClientKeys(server=keys.server, public=wrong.public, secret=wrong.secret)
        with pytest.raises(BridgeError, match=r"handshake|does not accept"):
            site.connect(keys=stranger, connect_timeout_s=1.0)
        for without in (None, wrong):
            with pytest.raises(BridgeTimeoutError, match="handshake failed"):
                site.connect(keys=without, connect_timeout_s=1.0)
        with site.connect(keys=keys) as client:
            assert client.ask_status().state == "idle"


def test_asyncio(tmp_path: Path) -> None:
    async def run(site: Site) -> None:
        arguments = {"connect_timeout_s": 10.0, "timeout_s": 20.0}
        async with AsyncBridgeClient(site.address, **arguments) as client:  # type: ignore[arg-type]
            training = asyncio.create_task(client.rollout(PROMPTS, target_groups=5, round_id="a"))
            evaluation = await client.rollout([[3], [4]], carry=False)
            assert len(evaluation.groups) == 2
            assert names((await training).groups) == [str(i) for i in range(5)]
            await client.ack()
            await asyncio.to_thread(site.restart)
            assert len([one async for one in client.stream_trajectories(PROMPTS, target_groups=2, round_id="b")]) == 2
            async with client.stream(PROMPTS) as stream:
                assert names([await anext(stream) for _ in range(3)]) == ["7", "8", "9"]

    with Site(tmp_path) as site:
        asyncio.run(run(site))


def test_a_fleet(tmp_path: Path) -> None:
    sites = [Site(tmp_path / str(e)) for e in range(2)]
    try:
        with BridgeFleet.connect([site.address for site in sites], timeout_s=20.0) as fleet:
            got = names(fleet.rollout(PROMPTS, target_groups=5, round_id="a").groups)
            sites[1].restart()
            got += names(fleet.rollout(PROMPTS, target_groups=5, round_id="b").groups)
            fleet.ack()
            assert sorted(map(int, got)) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]
            ids = [one.trajectory_id for one in fleet.rollout(PROMPTS, target_groups=4, round_id="c").trajectories]
            assert len(set(ids)) == 4
    finally:
        for site in sites:
            site.service.close()


def staged_site() -> Site:
    staging = Staging(MANIFEST, version=0, ring=Ring.create(4, 64), chunk_bytes=64)
    return Site(staging=staging)


@pytest.mark.parametrize("transport", ["zmq", "shm"])
def test_weights_arrive_bit_for_bit(transport: Any) -> None:
    weights = random_weights(0)
    with staged_site() as site, site.connect() as client:
        for version, (delta, kind) in enumerate([(False, "full"), ("auto", "full"), (True, "delta")], 1):
            weights = changed_weights(weights, version, 0.05)
            report = client.push_weights(arrays_of(weights), version, delta=delta, transport=transport)
            assert (report.kind, report.transport, report.version) == (kind, transport, version)
            checksum = client.checksum()
            assert (checksum.digest, checksum.version, client.weight_version) == (report.digest, version, version)
            assert staged_bytes(site.engine.updates[-1][0]) == as_bytes(weights)
        with pytest.raises(WeightsPushError, match="version"):
            client.push_weights(arrays_of(weights), 2, transport=transport)


@pytest.mark.parametrize("transport", ["zmq", "shm"])
def test_weights_arrive_bit_for_bit_with_asyncio(transport: Any) -> None:
    async def push(site: Site) -> None:
        weights = random_weights(0)
        async with AsyncBridgeClient(site.address, connect_timeout_s=10.0, timeout_s=20.0) as client:
            for version, (delta, kind) in enumerate([("auto", "full"), (True, "delta")], 1):
                weights = changed_weights(weights, version, 0.05)
                report = await client.push_weights(arrays_of(weights), version, delta=delta, transport=transport)
                assert (report.kind, report.transport) == (kind, transport)
                assert (await client.checksum()).digest == report.digest
                assert staged_bytes(site.engine.updates[-1][0]) == as_bytes(weights)

    with staged_site() as site:
        asyncio.run(push(site))
