"""Stock vLLM as a worker process for `round_cut.py`: rounds in on stdin, seconds out on stdout, one JSON line each.

Runs without longtail's plugin. A round is `{"prompts": [[ids]], "lengths": [[tokens by member]], "target": n |
null}`; with a target it does what a client can do with stock vLLM: step the engine, count complete groups, and abort
the rest.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    """Serve rounds until stdin ends. Arguments: the model folder and `EngineArgs` as JSON."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    args = EngineArgs(model=sys.argv[1], **json.loads(sys.argv[2]))
    engine = LLMEngine.from_vllm_config(args.create_engine_config(), disable_log_stats=True)
    print(json.dumps({"ready": True}), flush=True)
    for number, line in enumerate(sys.stdin):
        print(json.dumps(run_round(engine, number, json.loads(line))), flush=True)


def run_round(engine: Any, number: int, job: dict[str, Any]) -> dict[str, Any]:
    """Generate until every group is complete, or until `target` groups are."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    start = time.perf_counter()
    left: dict[str, int] = {}
    for group, (prompt, lengths) in enumerate(zip(job["prompts"], job["lengths"], strict=True)):
        left[str(group)] = len(lengths)
        for index, length in enumerate(lengths):
            params = SamplingParams(
                max_tokens=length, ignore_eos=True, seed=index, logprobs=0, flat_logprobs=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            engine.add_request(f"{number}/{group}/{index}", {"prompt_token_ids": prompt}, params)
    num_complete = num_tokens = 0
    target = job["target"] or len(left)
    running = {f"{number}/{group}/{index}" for group, row in enumerate(job["lengths"]) for index in range(len(row))}
    while num_complete < target:
        for output in engine.step():
            running.discard(output.request_id)
            num_tokens += len(output.outputs[0].token_ids)
            group = output.request_id.split("/")[1]
            left[group] -= 1
            num_complete += left[group] == 0
    engine.abort_request(list(running))
    seconds = time.perf_counter() - start
    while engine.has_unfinished_requests():
        engine.step()
    return {"seconds": seconds, "num_complete": num_complete, "num_tokens": num_tokens}


if __name__ == "__main__":
    main()
