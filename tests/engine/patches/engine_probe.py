"""Runs two vLLM engines, one after the other in this process, and writes what they did as JSON.

`python engine_probe.py MODEL_DIR OUT_FILE`; a script of its own so that stock controls, which leave an engine broken,
touch no other test. The checks on what it writes are in test_engine_level.py.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

import llvmlite.binding  # noqa: F401  as after `import numba`: stock cannot start an engine in such a process
import msgspec
import numpy as np

VOCAB = 32
NUM_SAMPLES = 3000
#: One block of 32 and one token: after the first request the block is cached, one token is left to compute, and the
#: scheduler pads that request's drafts with -1.
PROMPT = [2 + (5 * i + i * i) % 30 for i in range(33)]
SAMPLING = {"temperature": 0.7, "top_k": 8, "top_p": 0.9}

SEEDED_PROMPTS = [[2 + (7 * j + k * k) % 30 for k in range(40 + 30 * j)] for j in range(4)]
CHUNK_TOKENS = 48


@contextlib.contextmanager
def engine(model_dir: str, **args: Any) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model_dir,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=256,
        block_size=32,
        enforce_eager=True,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=64 << 20,
        **args,
    )
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: Any, prompts: list[list[int]], params: Any) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def exact_law(model_dir: str, prompt: list[int], *, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Joint probabilities of the first two tokens, by a transformers forward pass; shape [VOCAB, VOCAB]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    @torch.no_grad()
    def next_token_probs(sequences: list[list[int]]) -> np.ndarray:
        logits = model(torch.tensor(sequences)).logits[:, -1].double() / temperature
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        probs, order = logits.softmax(-1).sort(descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(1, order, probs)
        return (probs / probs.sum(-1, keepdim=True)).numpy()

    first = next_token_probs([prompt])[0]
    second = next_token_probs([[*prompt, token] for token in range(VOCAB)])
    return first[:, None] * second


def count_pairs(rows: list[list[int]]) -> list[list[int]]:
    counts = np.zeros((VOCAB, VOCAB), dtype=int)
    for row in rows:
        counts[row[0], row[1]] += 1
    return counts.tolist()


def speculative(model_dir: str) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.v1.sample import rejection_sampler

    from longtail.engine.patches import ledger

    config = {"method": "custom_class", "model": "ragged_proposer.RaggedProposer", "num_speculative_tokens": 3}
    params = SamplingParams(**SAMPLING, max_tokens=4, ignore_eos=True, detokenize=False)
    with engine(model_dir, speculative_config=config, disable_log_stats=False) as llm:
        generate(llm, [PROMPT], params)
        fixed = generate(llm, [PROMPT] * NUM_SAMPLES, params)
        launched = {
            name: getattr(rejection_sampler, f"_{name}").kernel._impl.__module__
            for name in ("expand", "rejection_random_sample", "sample_recovered_tokens")
        }
        accepted = {m.name: m.value for m in llm.get_metrics() if "spec_decode" in m.name and hasattr(m, "value")}
        # Stock control: the kernel that this engine launches, as vLLM has it.
        override = rejection_sampler._rejection_random_sample.kernel
        override._impl = ledger.stock("vllm.utils.cpu_triton_utils._rejection_random_sample_kernel_impl")
        stock = generate(llm, [PROMPT] * NUM_SAMPLES, params)
    return {"fixed": count_pairs(fixed), "stock": count_pairs(stock), "accepted": accepted, "launched": launched}


def seeded(model_dir: str) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from longtail.engine.patches import ledger

    params = [
        SamplingParams(
            temperature=1.0, seed=None if j == 1 else 10 + j, max_tokens=8, ignore_eos=True, detokenize=False
        )
        for j in range(len(SEEDED_PROMPTS))
    ]
    with engine(model_dir, enable_prefix_caching=False) as llm:
        core = llm.llm_engine.engine_core.engine_core
        report = ledger.verify_engine(lambda method, *args: getattr(core, method)(*args))
        no_rounds = core.rollout_rpc("counters", {})
        whole = generate(llm, SEEDED_PROMPTS, params)
        core.scheduler.max_num_scheduled_tokens = CHUNK_TOKENS
        chunked = generate(llm, SEEDED_PROMPTS, params)
        try:
            generate(llm, [PROMPT], SamplingParams(extra_args={"rollout": {"round": 7}}))
            refusal = {}
        except ValueError as error:
            refusal = {"field": error.field, "parameter": error.parameter, "text": str(error)}
        unfinished = llm.llm_engine.get_num_unfinished_requests()
        # Stock control.
        del CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync
        try:
            generate(llm, SEEDED_PROMPTS, params)
            crash = ""
        except RuntimeError as error:
            crash = str(error)
    return {
        "processes": msgspec.to_builtins(report),
        "no_rounds": no_rounds,
        "whole": whole,
        "chunked": chunked,
        "refusal": refusal,
        "unfinished": unfinished,
        "stock_crash": crash,
    }


def main(model_dir: str, out_file: str) -> None:
    start = time.monotonic()
    result: dict[str, Any] = {"law": exact_law(model_dir, PROMPT, **SAMPLING).tolist()}
    result["speculative"] = speculative(model_dir)
    print("speculative", time.monotonic() - start)
    result["seeded"] = seeded(model_dir)
    print("all", time.monotonic() - start)
    Path(out_file).write_bytes(msgspec.json.encode(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
