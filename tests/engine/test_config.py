"""Configuration is checked when it is built, and names the field that is wrong."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from longtail.engine.config import EngineConfig, RuntimeConfig, SamplingConfig
from longtail.engine.errors import InvalidInputError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", NAN), ("temperature", INF), ("temperature", "hot"),
        ("temperature", None),
        ("top_p", 0.0), ("top_p", 1.01), ("top_p", NAN), ("top_k", -1), ("top_k", 1.5), ("max_tokens", 0),
        ("max_tokens", True), ("min_tokens", -1), ("min_tokens", 513), ("stop", "word"), ("stop", [""]), ("stop", [3]),
        ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]), ("stop_token_ids", [True]), ("ignore_eos", 1),
        ("seed", -1),
        ("seed", 2**63), ("seed", 1.0),
    ],
)  # fmt: skip
def test_wrong_sampling_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        SamplingConfig(**{field: value})
    assert caught.value.field.startswith(f"sampling.{field}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""), ("model", None), ("dtype", "int8"), ("core", "thread"), ("max_model_len", 0),
        ("max_num_seqs", 0),
        ("block_size", 1.5), ("kv_cache_gib", 0), ("kv_cache_gib", NAN), ("gpu_memory_utilization", 1.5), ("seed", -1),
        ("start_timeout_s", 0), ("stall_timeout_s", INF), ("vllm_args", {"scheduler_cls": "x"}),
        ("vllm_args", {"model": "x"}),
    ],
)  # fmt: skip
def test_wrong_engine_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        EngineConfig(**({"model": "m"} | {field: value}))
    assert caught.value.field.startswith(f"engine.{field}")


@pytest.mark.parametrize(
    ("field", "value"),
    [("omp_library", "llvm"), ("omp_threads", 0), ("block_time_ms", -1), ("allocator", "jemalloc")],
)
def test_wrong_runtime_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        RuntimeConfig(**{field: value})
    assert caught.value.field == f"runtime.{field}"


def test_lists_become_tuples_so_that_the_config_is_frozen() -> None:
    sampling = SamplingConfig(stop=["a"], stop_token_ids=[3])  # type: ignore[arg-type]
    assert (sampling.stop, sampling.stop_token_ids) == (("a",), (3,))
    assert hash(sampling)


def test_types_and_configuration_import_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; from longtail.engine import EngineConfig, SamplingConfig, Trajectory, Prompt; "
        "from longtail.scheduler import rounds; "
        "print([name for name in ('vllm', 'torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
