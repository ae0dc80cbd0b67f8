"""Stock vLLM as a worker process for `partial_rollout.py`: synchronous rounds, and active partial rollouts by a client.

Runs without longtail's plugin, the client in the engine's process; `partial_rollout_arms.py` has the jobs.

With `num_groups` = `target_groups` a round is synchronous. With more it stops in the step in which enough groups
are complete, aborts the rest, keeps their token ids, log-probs and versions, banks surplus complete groups, and resumes
carried groups first, with prompt and tokens as the new prompt. A weight change clears the prefix cache, as vLLM's own
`pause` does unless told otherwise; it is timed as part of the round that follows.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Member:
    """One trajectory: its forced length, and what it has so far, with the version of each token's weights."""

    length: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.token_ids) == self.length


@dataclass(slots=True)
class Group:
    prompt: list[int]
    members: list[Member]

    @property
    def is_complete(self) -> bool:
        return all(member.is_done for member in self.members)


def main() -> None:
    """Serve jobs until stdin ends. Arguments: the model folder and `EngineArgs` as JSON."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    args = EngineArgs(model=sys.argv[1], **json.loads(sys.argv[2]))
    engine = LLMEngine.from_vllm_config(args.create_engine_config(), disable_log_stats=True)
    arms: dict[str, Client] = {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "begin" in job:
            arms[job["arm"]] = Client(engine, **job["begin"])
            print("{}", flush=True)
        else:
            print(json.dumps(arms[job["arm"]].run_round()), flush=True)


class Client:
    """One run of rounds; the weight version is the number of the round."""

    def __init__(
        self, engine: Any, prompts: list[list[int]], lengths: list[list[int]], target_groups: int, num_groups: int
    ) -> None:
        self._engine = engine
        self._fresh = [
            Group(prompt, [Member(length) for length in row]) for prompt, row in zip(prompts, lengths, strict=True)
        ]
        self._target_groups = target_groups
        self._num_groups = num_groups
        self._carried: list[Group] = []
        self._banked: list[Group] = []
        self._version = 0
        self._counts: Counter[str] = Counter()

    def run_round(self) -> dict[str, Any]:
        """Change the weights, then collect `target_groups` groups."""
        self._counts = Counter(num_fresh=0, num_prefilled=0, num_reprefilled=0, num_sampled=0, num_steps=0)
        start, cpu_start = time.perf_counter(), time.process_time()
        self._version += 1
        assert self._engine.reset_prefix_cache(), "blocks are in use between two rounds"
        if len(self._banked) < self._target_groups:
            self._generate()
        accepted, self._banked = self._banked[: self._target_groups], self._banked[self._target_groups :]
        times = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}

        while self._engine.has_unfinished_requests():
            self._engine.step()
        members = [member for group in accepted for member in group.members]
        staleness = Counter(self._version - version for member in members for version in member.versions)
        assert all(len(m.logprobs) == len(m.versions) == m.length for m in members)
        return {**times, "lengths": [m.length for m in members], "staleness": staleness, **self._counts}

    def _generate(self) -> None:
        """Run carried groups, then fresh ones, until enough are complete."""
        num_fresh = max(0, self._num_groups - len(self._banked) - len(self._carried))
        self._counts["num_fresh"] = num_fresh
        groups = self._carried + self._fresh[:num_fresh]
        del self._fresh[:num_fresh]
        left: dict[int, int] = {}
        running: dict[str, tuple[int, Member, int]] = {}
        for place, group in enumerate(groups):
            going_on = [member for member in group.members if not member.is_done]
            left[place] = len(going_on)
            for index, member in enumerate(going_on):
                request_id = f"{self._version}/{place}/{index}"
                self._submit(request_id, group, member)
                running[request_id] = place, member, len(group.prompt) + len(member.token_ids)
        done: list[Group] = []
        while running and len(self._banked) + len(done) < self._target_groups:
            for output in self._engine.step():
                place, member, num_prompt_tokens = running[output.request_id]
                self._take(member, output, num_prompt_tokens)
                if output.finished:
                    del running[output.request_id]
                    left[place] -= 1
                    if not left[place]:
                        done.append(groups[place])
            self._counts["num_steps"] += 1
        self._engine.abort_request(list(running))
        self._banked += done
        self._carried = [group for place, group in enumerate(groups) if left[place]]

    def _submit(self, request_id: str, group: Group, member: Member) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        # A request that is aborted says nothing any more: what a client wants to keep it takes step by step.
        keeps_parts = self._num_groups > self._target_groups
        params = SamplingParams(
            max_tokens=member.length - len(member.token_ids), ignore_eos=True, logprobs=0, flat_logprobs=True,
            output_kind=RequestOutputKind.DELTA if keeps_parts else RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        self._engine.add_request(request_id, {"prompt_token_ids": group.prompt + member.token_ids}, params)

    def _take(self, member: Member, output: Any, num_prompt_tokens: int) -> None:
        """Add an output's new tokens to its member; with its first one, count what it prefilled."""
        completion = output.outputs[0]
        num_prior = len(member.token_ids)
        num_new = len(completion.token_ids)
        if num_prior == 0 or member.versions[-1] != self._version:
            num_prefilled = num_prompt_tokens - (output.num_cached_tokens or 0)
            self._counts["num_prefilled"] += num_prefilled
            # Of the last token there was no KV.
            self._counts["num_reprefilled"] += max(0, num_prefilled - 1) if num_prior else 0
        self._counts["num_sampled"] += num_new
        member.token_ids += completion.token_ids
        member.logprobs += completion.logprobs.logprobs
        member.versions += [self._version] * num_new


if __name__ == "__main__":
    main()
