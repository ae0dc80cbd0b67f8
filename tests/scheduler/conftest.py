"""Engines over vLLM's real scheduler and block pool with a model that notices a wrong block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scheduler_harness
from kv_model import KvEngine

from longtail.scheduler.rollout_scheduler import make_scheduler

BLOCK_SIZE = 8

Make = Callable[..., KvEngine]


@pytest.fixture(scope="session")
def kv_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scheduler_harness.write_model_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["sync", "async"])
def scheduling(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(kv_model_dir: Path, scheduling: str) -> Iterator[Make]:
    """`make(num_blocks, **config)`: an engine, of which no block is missing when the test is over."""
    made: list[tuple[KvEngine, int]] = []

    def build(num_blocks: int = 200, **args: Any) -> KvEngine:
        config = scheduler_harness.make_vllm_config(kv_model_dir, block_size=BLOCK_SIZE, **args)
        config.scheduler_config.async_scheduling = scheduling == "async"
        engine = KvEngine(make_scheduler, config, num_blocks)
        made.append((engine, engine.num_free_blocks))
        return engine

    yield build
    for engine, num_free in made:
        engine.run()
        engine.drain()
        assert engine.num_free_blocks == num_free, "blocks leaked"
