"""What tests share: a random two-layer Llama with a tokenizer, and one engine on it."""

from __future__ import annotations

import os

# Before anything imports torch or vLLM. Two-layer models are fastest on one passive thread.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_model import write_tiny_model

if TYPE_CHECKING:
    from longtail.engine import EngineConfig, RolloutEngine


#: Files whose tests take longest: they begin first, so that no process is left alone with one in the end.
LONGEST = ("test_chaos.py", "test_soak.py", "test_demo.py", "test_startup.py", "test_rollout_command.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 2-layer Llama (vocabulary 512) with a byte-level tokenizer and a chat template."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_config(tiny_model: Path) -> EngineConfig:
    """A small engine on the tiny model, core in its own process."""
    from longtail.engine import EngineConfig

    return EngineConfig(model=str(tiny_model), block_size=32, max_model_len=1024, max_num_seqs=64, kv_cache_gib=0.1)


@pytest.fixture(scope="session")
def engine(tiny_config: EngineConfig) -> Iterator[RolloutEngine]:
    """One running engine for all tests that leave it as they found it."""
    from longtail.engine import RolloutEngine

    with RolloutEngine(tiny_config) as running:
        yield running
