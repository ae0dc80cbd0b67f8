"""A vLLM V1 scheduler without an engine: real scheduling, faked model.

Used by `scheduler_overhead.py` and by the tests of the scheduler, so that both drive exactly the same thing. The model
"samples" a fixed token for every request whose prompt is computed; no tensor is touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

BLOCK_SIZE = 32
SAMPLED_TOKEN = 7


def write_model_config(folder: Path) -> Path:
    """Write the `config.json` of a small Llama; no weights are ever loaded."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_vllm_config(model_dir: Path, **args: Any) -> VllmConfig:
    """vLLM's configuration for the harness; `args` are `EngineArgs` fields.

    The environment stays as it is: vLLM's CPU platform writes into it what its workers preload.
    """
    defaults: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 4096, "max_num_seqs": 1024, "max_num_batched_tokens": 8192,
        "block_size": BLOCK_SIZE, "enforce_eager": True, "skip_tokenizer_init": True,
    }  # fmt: skip
    with patch.dict(os.environ):
        return EngineArgs(model=str(model_dir), **(defaults | args)).create_engine_config()


class SchedulerHarness:
    """One scheduler with its pool; build requests with it and step it.

    Args:
        scheduler_cls: the class (or factory) under test.
        config: from `make_vllm_config`.
        num_blocks: blocks of the pool, one of which vLLM keeps as its null block.

    """

    def __init__(self, scheduler_cls: Callable[..., Any], config: VllmConfig, num_blocks: int = 16_384) -> None:
        config.cache_config.num_gpu_blocks = num_blocks
        block_size = config.cache_config.block_size
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=32, dtype=torch.float32)
        self._hasher = None
        if config.cache_config.enable_prefix_caching:
            hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
            init_none_hash(hash_function)
            self._hasher = get_request_block_hasher(block_size, hash_function)
        self.scheduler: Any = scheduler_cls(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            hash_block_size=block_size,
            log_stats=True,
        )

    @property
    def num_free_blocks(self) -> int:
        """Free blocks of the pool."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        rollout: Mapping[str, Any] | str | None = None,
        *,
        resumable: bool = False,
        cache_salt: str | None = None,
        **params: Any,
    ) -> Request:
        """Enqueue a request as the engine core would; `rollout` is its metadata."""
        sampling = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            extra_args=None if rollout is None else {"rollout": rollout},
            **{"logprobs": 0} | params,
        )
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=self._hasher,
            cache_salt=cache_salt,
            resumable=resumable,
        )
        self.scheduler.add_request(request)
        return request

    def step(self) -> tuple[SchedulerOutput, list[EngineCoreOutput]]:
        """One engine step with a faked model; returns what was scheduled and what goes to the front end."""
        scheduled = self.scheduler.schedule()
        outputs = self.scheduler.update_from_output(scheduled, self.fake_model(scheduled))
        return scheduled, [output for client in outputs.values() for output in client.outputs]

    def run(self) -> list[tuple[SchedulerOutput, list[EngineCoreOutput]]]:
        """Step until nothing is left."""
        steps = []
        while self.scheduler.has_requests():
            steps.append(self.step())
        return steps

    def fake_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """What the model runner would answer: one token for each request whose prompt is computed."""
        request_ids = list(scheduled.num_scheduled_tokens)
        sampled: list[list[int]] = []
        for request_id in request_ids:
            request = self.scheduler.requests.get(request_id)
            sampled.append([SAMPLED_TOKEN] if request is not None and not request.is_prefill_chunk else [])
        rows = len(request_ids)
        return ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: row for row, request_id in enumerate(request_ids)},
            sampled_token_ids=sampled,
            logprobs=LogprobsLists(
                np.full((rows, 1), SAMPLED_TOKEN, dtype=np.int32),
                np.full((rows, 1), -1.5, dtype=np.float32),
                np.ones(rows, dtype=np.int32),
                None,
            ),
            prompt_logprobs_dict={},
            pooler_output=[],
        )
