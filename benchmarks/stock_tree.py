"""Stock vLLM as a worker process for `tree.py`: every leaf for itself, or TreePO's loop of a client.

The loop submits the tokens of every path again for each segment and waits for all paths of all prompts, as the sampler
that TreePO released does (`vllm_rollout_spmd.py`). Which paths branch is `TreePolicy`'s to say, in its synchronous
mode. It lives in the engine's process and drives `LLMEngine` itself: no queue and no HTTP lies between. Runs without
longtail's plugin.

Arguments: the model folder, and fields of vLLM's `EngineArgs` as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from longtail.scheduler.tree_policy import PathFigures, TreePolicy, TreeSpec, TreeStep


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
    engine: Any, arm: str, prompts: list[list[int]], tree: dict[str, Any], ignore_eos: bool, seed: int
) -> dict[str, Any]:
    """Collect as many leaves a prompt as a tree is wide."""
    engine.reset_prefix_cache()
    client = _Client(engine, ignore_eos)
    start, cpu_start = time.perf_counter(), time.process_time()
    if arm == "independent":
        spec = TreeSpec(**tree)
        paths = [_Path(list(ids), len(ids)) for ids in prompts for _ in range(spec.width)]
        client.generate(paths, spec.max_tokens)
    else:
        spec = TreeSpec(**tree, synchronous=True)
        trees = [_Tree(spec, seed + place, ids) for place, ids in enumerate(prompts)]
        while going := [(one, index) for one in trees for index in one.going]:
            level = [one.paths[index] for one, index in going]
            ended = client.generate(level, spec.segment_tokens)
            for one in trees:
                one.going = []
            for (one, index), by_itself in zip(going, ended, strict=True):
                one.take(index, by_itself=by_itself)
        paths = [path for one in trees for path in one.paths.values()]
    return {
        "seconds": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu_start,
        "num_leaves": len(paths),
        "num_computed": client.num_computed,
        "num_recomputed": client.num_recomputed,
        "num_output_tokens": sum(len(path.token_ids) - path.num_prompt for path in paths),
    }


@dataclass
class _Path:
    """A prompt with what it has so far; all but its last token had KV once, or its first `num_had`."""

    token_ids: list[int]
    num_prompt: int
    num_had: int = 0


class _Client:
    """Generates for many paths and waits for all."""

    def __init__(self, engine: Any, ignore_eos: bool) -> None:
        self._engine = engine
        self._ignore_eos = ignore_eos
        self._count = 0
        self.num_computed = 0
        self.num_recomputed = 0

    def generate(self, paths: list[_Path], max_tokens: int) -> list[bool]:
        """Up to so many tokens for each; whether it ended by itself."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=self._ignore_eos, logprobs=0, flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        by_id = {}
        for path in paths:
            self._count += 1
            by_id[str(self._count)] = path
            self._engine.add_request(str(self._count), {"prompt_token_ids": list(path.token_ids)}, params)
        ended: dict[int, bool] = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                path, completion = by_id[output.request_id], output.outputs[0]
                num_cached = output.num_cached_tokens or 0
                self.num_computed += len(path.token_ids) - num_cached + len(completion.token_ids) - 1
                self.num_recomputed += max(0, path.num_had - num_cached)
                path.token_ids += completion.token_ids
                path.num_had = len(path.token_ids) - 1
                ended[id(path)] = completion.finish_reason == "stop"
        return [ended[id(path)] for path in paths]


@dataclass
class _Tree:
    """One tree of the client."""

    spec: TreeSpec
    seed: int
    prompt: list[int]
    policy: TreePolicy = field(init=False)
    paths: dict[int, _Path] = field(init=False)
    going: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.policy = TreePolicy(self.spec, self.seed)
        self.paths = {index: _Path(list(self.prompt), len(self.prompt)) for index in self.policy.roots}
        self.going = list(self.policy.roots)

    def take(self, index: int, *, by_itself: bool) -> None:
        """A path has its segment."""
        num_tokens = len(self.paths[index].token_ids) - len(self.prompt)
        if by_itself or num_tokens >= self.spec.max_tokens:
            self.policy.end(index, num_tokens, by_itself=by_itself)
            self._do(self.policy.settle())
        else:
            self._do(self.policy.reach(index, PathFigures(num_tokens=num_tokens)))

    def _do(self, step: TreeStep) -> None:
        for birth in step.births:
            parent = self.paths[birth.parent]
            end = len(self.prompt) + birth.at
            self.paths[birth.child] = _Path(parent.token_ids[:end], len(self.prompt), min(end, parent.num_had))
        self.going += [*step.going_on, *(birth.child for birth in step.births)]


if __name__ == "__main__":
    main()
