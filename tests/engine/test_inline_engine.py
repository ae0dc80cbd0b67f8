"""The core in this process: asyncio over it, and asynchronous scheduling, which the CPU platform never turns on."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from typing import Any

import pytest

from longtail.engine import AsyncRolloutEngine, EngineConfig, Prompt, RolloutEngine, SamplingConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.trajectory import Round

_rng = random.Random(1)
PROMPT_IDS = [[_rng.randrange(3, 512) for _ in range(_rng.randint(4, 60))] for _ in range(6)]
LENGTHS = [[7, 12], [9, 40], [11, 11], [90, 5], [60, 60], [80, 80]]
GREEDY = SamplingConfig(temperature=0.0, ignore_eos=True)


def cut_round_arguments() -> dict[str, Any]:
    """A round of six groups that is cut at its second, in the step of the twelfth token."""
    prompts = [Prompt(token_ids=ids, max_tokens=row) for ids, row in zip(PROMPT_IDS, LENGTHS, strict=True)]
    return {"prompts": prompts, "group_size": 2, "target_groups": 2, "sampling": GREEDY}


def check_cut(got: Round, reference: Round) -> None:
    """The same groups are complete, and every trajectory is the reference's, token for token."""
    assert [group.complete for group in got.groups] == [True, False, True, False, False, False]
    for ours, right in zip(got.trajectories, reference.trajectories, strict=True):
        length = len(ours.output_token_ids)
        assert ours.output_token_ids == right.output_token_ids[:length]
        assert ours.logprobs == pytest.approx(right.logprobs[:length], abs=1e-4)
        assert length == len(right.output_token_ids) or (ours.was_cut and length in (11, 12, 13))


@pytest.fixture(scope="module")
def reference(engine: RolloutEngine) -> Round:
    """The same prompts without a cut, on the shared engine."""
    return engine.rollout(**(cut_round_arguments() | {"target_groups": None}))


def inline(config: EngineConfig) -> EngineConfig:
    return dataclasses.replace(config, core="inline")


def test_asyncio_over_an_inline_core(tiny_config: EngineConfig, reference: Round) -> None:
    async def scenario() -> None:
        async with AsyncRolloutEngine(inline(tiny_config)) as engine:
            check_cut(await engine.rollout(**cut_round_arguments()), reference)
            both = await asyncio.gather(*(engine.rollout(**cut_round_arguments()) for _ in range(2)))
            for got in both:
                check_cut(got, reference)
            stream = engine.stream_trajectories([Prompt(token_ids=[5], max_tokens=n) for n in (30, 4)], sampling=GREEDY)
            assert [len(trajectory.output_token_ids) async for trajectory in stream] == [4, 30]
            assert stream.round.stats.num_complete_groups == 2
            with pytest.raises(InvalidInputError):
                await engine.rollout([[99999]])
            running = asyncio.create_task(engine.rollout(**cut_round_arguments()))
            left = 0
            while not running.done():
                try:
                    await asyncio.wait_for(engine.counters(), 0.001)
                except TimeoutError:
                    left += 1
            check_cut(await running, reference)
            assert left, "the test must leave before an answer"
            async for _ in engine.stream_trajectories(
                [Prompt(token_ids=[5], max_tokens=n) for n in (3, 900)], sampling=GREEDY
            ):
                break
            async with asyncio.timeout(20):
                while (await engine.counters())["live_members"]:
                    await asyncio.sleep(0.05)
            assert (await engine.counters())["running"] == 0

    asyncio.run(scenario())


def test_asyncio_over_a_core_process(engine: RolloutEngine, reference: Round) -> None:
    async def scenario() -> None:
        shared = AsyncRolloutEngine(engine.config)
        shared._started = engine._engine
        check_cut(await shared.rollout(**cut_round_arguments()), reference)

    asyncio.run(scenario())


def test_asyncio_facade_must_be_entered() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        AsyncRolloutEngine("smollm2").stream_trajectories([[3]])


@pytest.mark.usefixtures("forced_async_scheduling")
def test_async_scheduling_cuts_the_same_round(tiny_config: EngineConfig, reference: Round) -> None:
    with RolloutEngine(inline(tiny_config)) as engine:
        core = engine._driver.engine.llm_engine.engine_core.engine_core
        assert (type(core.scheduler).__name__, core.batch_queue_size) == ("RolloutAsyncScheduler", 2)
        free = engine.counters()["free_blocks"]
        got = engine.rollout(**cut_round_arguments())
        check_cut(got, reference)
        sampled = SamplingConfig(seed=3, max_tokens=20, top_p=0.9, temperature=0.7)
        first, second = (engine.rollout(PROMPT_IDS, group_size=2, sampling=sampled) for _ in range(2))
        assert [t.output_token_ids for t in first.trajectories] == [t.output_token_ids for t in second.trajectories]
        assert engine.counters()["free_blocks"] == free


def test_option_that_vllm_would_ignore_is_refused(tiny_config: EngineConfig) -> None:
    with pytest.raises(InvalidInputError, match="async_scheduling"):
        RolloutEngine(dataclasses.replace(tiny_config, core="inline", async_scheduling=True))
