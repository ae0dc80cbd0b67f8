"""Stock vLLM in a process of its own, without longtail's plugin: `python stock_reference.py MODEL < jobs.json`.

Reads a JSON list of `{"prompts": [[ids]], "params": {...}}` and writes a JSON list of lists of
`{"token_ids", "logprobs", "finish_reason", "stop_reason", "text"}`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_stock(model: Path, jobs: list[dict[str, Any]], **llm_args: Any) -> list[list[dict[str, Any]]]:
    """Run the jobs on stock vLLM in a fresh process."""
    environ = os.environ | {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    result = subprocess.run(
        [sys.executable, __file__, str(model), json.dumps(llm_args)],
        input=json.dumps(jobs), capture_output=True, text=True, env=environ, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    answer: list[list[dict[str, Any]]] = json.loads(result.stdout.splitlines()[-1])
    return answer


def _main() -> None:
    from vllm import LLM, SamplingParams

    model, llm_args = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(
        model=model, dtype="float32", enforce_eager=True, block_size=32, max_model_len=1024,
        kv_cache_memory_bytes=100 << 20, logprobs_mode="processed_logprobs", **llm_args,
    )  # fmt: skip
    answers = []
    for job in json.load(sys.stdin):
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        outputs = llm.generate(prompts, SamplingParams(logprobs=0, **job["params"]), use_tqdm=False)
        answers.append(
            [
                {
                    "token_ids": list(one.token_ids),
                    "logprobs": [
                        position[token].logprob for position, token in zip(one.logprobs, one.token_ids, strict=True)
                    ],
                    "finish_reason": one.finish_reason,
                    "stop_reason": one.stop_reason,
                    "text": one.text,
                }
                for one in (output.outputs[0] for output in outputs)
            ]
        )
    print(json.dumps(answers))


if __name__ == "__main__":
    _main()
