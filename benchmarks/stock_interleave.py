"""Stock vLLM as a worker process for `interleave.py`: a client that submits the tokens of a trajectory again.

A segment is one request, as long as a segment may be. When it ends, the client appends what the environment says and
submits all tokens as the prompt of the next one, at once and without waiting for others. It lives in the engine's
process and drives `LLMEngine` itself: no queue and no HTTP lies between. Runs without longtail's plugin.

Arguments: the model folder, and fields of vLLM's `EngineArgs` as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    """Serve jobs until stdin ends."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    args = EngineArgs(model=sys.argv[1], **json.loads(sys.argv[2]))
    engine = LLMEngine.from_vllm_config(args.create_engine_config(), disable_log_stats=True)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(engine, **json.loads(line))), flush=True)


def run(
    engine: Any, prompts: list[list[int]], observations: list[list[list[int]]], segment_tokens: int, **_: object
) -> dict[str, Any]:
    """Collect one trajectory a prompt."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    engine.reset_prefix_cache()
    params = SamplingParams(
        max_tokens=segment_tokens, ignore_eos=True, logprobs=0, flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    start, cpu_start = time.perf_counter(), time.process_time()
    known = [list(ids) for ids in prompts]
    numbers = [0] * len(prompts)
    num_sampled = num_recomputed = 0

    def submit(place: int) -> None:
        engine.add_request(f"{place}/{numbers[place]}", {"prompt_token_ids": list(known[place])}, params)

    for place in range(len(prompts)):
        submit(place)
    while engine.has_unfinished_requests():
        for output in engine.step():
            place = int(output.request_id.split("/")[0])
            number, completion = numbers[place], output.outputs[0]
            if number:
                # Of all that was known before, the last sampled token and the observation had no KV.
                num_had = len(known[place]) - len(observations[place][number - 1]) - 1
                num_recomputed += max(0, num_had - (output.num_cached_tokens or 0))
            num_sampled += len(completion.token_ids)
            assert len(completion.logprobs.logprobs) == segment_tokens
            if number < len(observations[place]):
                known[place] += [*completion.token_ids, *observations[place][number]]
                numbers[place] += 1
                submit(place)
    times = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}
    return times | {"num_sampled": num_sampled, "num_recomputed": num_recomputed}


if __name__ == "__main__":
    main()
