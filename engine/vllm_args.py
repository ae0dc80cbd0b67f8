"""From an `EngineConfig` to vLLM's own configuration.

This is the one place that knows which vLLM option a field of ours sets, and which options every longtail engine
needs: our scheduler, and processed log-probabilities (the distribution that a token was sampled from, which is what a
PPO ratio divides by; vLLM's default is the raw one).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtail.engine.config import EngineConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.weight_backend import VLLM_BACKENDS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

    from longtail.engine.rounds import MemberPlan

SCHEDULER = "longtail.scheduler.rollout_scheduler.make_scheduler"
LOGPROBS_MODE = "processed_logprobs"

_GIB = 1 << 30


def engine_args(config: EngineConfig, model_dir: Path, *, on_cpu: bool) -> dict[str, Any]:
    """Keyword arguments for vLLM's `EngineArgs`."""
    args: dict[str, Any] = {
        "model": str(model_dir),
        "served_model_name": config.model,
        "dtype": "float32" if on_cpu and config.dtype == "auto" else config.dtype,
        "max_num_seqs": config.max_num_seqs,
        "enable_prefix_caching": config.enable_prefix_caching,
        "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
        "skip_tokenizer_init": not config.load_tokenizer,
        "seed": config.seed,
        "scheduler_cls": SCHEDULER,
        "logprobs_mode": LOGPROBS_MODE,
        "async_scheduling": config.async_scheduling,
        "weight_transfer_config": {"backend": VLLM_BACKENDS[config.weight_transfer]},
    }
    if on_cpu:
        args["kv_cache_memory_bytes"] = int(config.kv_cache_gib * _GIB)
    for name in ("max_model_len", "max_num_batched_tokens", "block_size", "gpu_memory_utilization"):
        if (value := getattr(config, name)) is not None:
            args[name] = value
    return args | dict(config.vllm_args)


def build_vllm_config(config: EngineConfig, model_dir: Path) -> VllmConfig:
    """Build and check vLLM's configuration; reads only the checkpoint's small files.

    Raises:
        InvalidInputError: `vllm_args` names an option that vLLM does not have, or vLLM refuses the combination.

    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in config.vllm_args:
        if name not in known:
            raise InvalidInputError(f"engine.vllm_args.{name}", "a field of vLLM's EngineArgs", name)
    try:
        args = EngineArgs(**engine_args(config, model_dir, on_cpu=current_platform.is_cpu()))
        vllm_config = args.create_engine_config()
    except (ValueError, NotImplementedError) as error:
        raise InvalidInputError("engine", f"a configuration that vLLM takes ({error})", config.model) from error
    if config.async_scheduling and not vllm_config.scheduler_config.async_scheduling:
        raise InvalidInputError("engine.async_scheduling", "unset, because vLLM turns it off here", True)
    parallel = vllm_config.parallel_config
    if current_platform.is_cpu() and parallel.world_size == 1:
        # vLLM puts a CPU worker into one more process only to set its OpenMP environment, which `runtime.py` has set.
        parallel.distributed_executor_backend = "uni"
    return vllm_config


def sampling_params(member: MemberPlan) -> SamplingParams:
    """vLLM's sampling parameters of one member: final output only, log-prob of every sampled token."""
    import msgspec
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, SamplingParams

    from longtail.scheduler.metadata import EXTRA_ARGS_KEY
    from longtail.scheduler.path_values import NUM_ENTROPY_LOGPROBS

    sampling, tree = member.sampling, member.sampling.tree
    repetition = sampling.stop_repetition
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=member.max_tokens,
        min_tokens=min(sampling.min_tokens, member.max_tokens),
        stop=None if member.has_late_text else list(sampling.stop) or None,
        detokenize=not member.has_late_text,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        ignore_eos=sampling.ignore_eos,
        repetition_detection=None
        if repetition is None
        else RepetitionDetectionParams(
            max_pattern_size=repetition.max_pattern,
            min_pattern_size=repetition.min_pattern,
            min_count=repetition.min_count,
        ),
        seed=member.seed,
        logprobs=NUM_ENTROPY_LOGPROBS if tree is not None and tree.split == "entropy" else 0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={EXTRA_ARGS_KEY: msgspec.to_builtins(member.metadata)},
    )
