"""Engines of SmolLM2 in worker processes for benchmarks that compare longtail with stock vLLM in one run.

Every engine has its core in its caller's process, the same size, and longtail's run-time settings in its environment:
they are the best known for stock too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_io

from longtail.engine import RuntimeConfig
from longtail.engine.runtime import pick_runtime

_KV_CACHE_GIB = 1.0
_ONLY_STOCK = {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}


def start_longtail(script: str, model_dir: Path, size: Mapping[str, Any], *args: str) -> bench_io.Worker:
    """Start `script`, which gets the folder, fields of `EngineConfig` as JSON, and `args`."""
    config = {"core": "inline", "kv_cache_gib": _KV_CACHE_GIB, "load_tokenizer": False, **size}
    return _start(script, model_dir, [json.dumps(config), *args], {})


def start_stock(script: str, model_dir: Path, size: Mapping[str, Any], **changes: Any) -> bench_io.Worker:
    """Start `script` without longtail's plugin; it gets the folder, and fields of vLLM's `EngineArgs` as JSON."""
    engine_args = {
        "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": int(_KV_CACHE_GIB * (1 << 30)),
        "logprobs_mode": "processed_logprobs", "skip_tokenizer_init": True, **size, **changes,
    }  # fmt: skip
    return _start(script, model_dir, [json.dumps(engine_args)], _ONLY_STOCK)


def _start(script: str, model_dir: Path, args: Sequence[str], extra: Mapping[str, str]) -> bench_io.Worker:
    variables = pick_runtime(RuntimeConfig(), model_dir=model_dir).environment()
    environ = os.environ | variables | {"VLLM_LOGGING_LEVEL": "ERROR"} | extra
    command = [sys.executable, str(Path(__file__).with_name(script)), str(model_dir), *args]
    return bench_io.Worker(command, environ)
