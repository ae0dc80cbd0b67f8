"""longtail as a worker process for `partial_rollout.py`; `partial_rollout_arms.py` has the jobs that make rounds.

Besides, `{"calibrate": {"seed", "vocab_size"}}` answers samples of step times, in four arrays as `fit_step_model`
takes them, and `{"answer": {"prompts", "group_size", "max_tokens", "stop_token_id"}}` the lengths of the model's own
answers.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from longtail.engine import EngineConfig, Prompt, RolloutEngine, SamplingConfig
from longtail.engine.carry_config import CarryConfig

#: Staler groups than this are dropped, which only a jump of the version at the end of a run makes them.
_FORGET_VERSIONS = 1000
#: Without a seed, as in the stock arms: stock vLLM's CPU engine dies of one when a prefill takes more than one step.
_FORCED = SamplingConfig(ignore_eos=True, max_tokens=1024)


def main() -> None:
    """Serve jobs until stdin ends. Arguments: the model folder, fields of `EngineConfig` as JSON, the KV policy."""
    carry = CarryConfig(kv_policy=sys.argv[3], max_staleness=_FORGET_VERSIONS, on_stale="drop")
    with RolloutEngine(EngineConfig(model=sys.argv[1], carry=carry, **json.loads(sys.argv[2]))) as engine:
        print(json.dumps({"ready": True}), flush=True)
        rounds: Rounds | None = None
        for line in sys.stdin:
            answer: dict[str, Any] = {}
            match json.loads(line):
                case {"begin": begin}:
                    rounds = Rounds(engine, **begin)
                case {"calibrate": job}:
                    answer = calibrate(engine, **job)
                case {"answer": job}:
                    answer = {"lengths": answer_lengths(engine, **job)}
                case _:
                    assert rounds is not None
                    answer = rounds.run_round()
            print(json.dumps(answer), flush=True)


class Rounds:
    """One run of rounds, with nothing carried at its beginning."""

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: list[list[int]],
        lengths: list[list[int]],
        target_groups: int,
        num_groups: int,
    ) -> None:
        self._engine = engine
        self._arguments = {
            "group_size": len(lengths[0]), "target_groups": target_groups,
            "over_provision": num_groups / target_groups, "sampling": _FORCED,
        }  # fmt: skip
        engine.declare_weights(engine.weight_version + 2 * _FORGET_VERSIONS)
        self._forget()
        self._prompts = _forced(prompts, lengths)

    def run_round(self) -> dict[str, Any]:
        """Change the weights, then collect a round."""
        start, cpu_start = time.perf_counter(), time.process_time()
        self._engine.declare_weights()
        got = self._engine.rollout(self._prompts, **self._arguments)
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        stats, carry = got.stats, got.carry
        assert carry is not None
        assert carry.num_accepted == self._arguments["target_groups"], "too few prompts"
        # The last token of each run of a member has not been through the model.
        num_runs = carry.num_fresh * self._arguments["group_size"] + carry.num_resumes
        return {
            "seconds": seconds,
            "cpu_s": cpu_s,
            "lengths": [len(t.output_token_ids) for t in got.trajectories],
            "staleness": carry.staleness,
            "num_fresh": carry.num_fresh,
            "num_steps": stats.num_steps,
            "num_sampled": stats.num_output_tokens,
            "num_prefilled": max(0, stats.num_scheduled_tokens - stats.num_output_tokens + num_runs),
            "num_reprefilled": carry.num_reprefilled_tokens,
        }

    def _forget(self) -> None:
        """End what the jump of the version leaves over: groups without a token are too young to be dropped."""
        arguments = self._arguments | {"over_provision": 1.0}
        target, group_size = arguments["target_groups"], arguments["group_size"]
        while True:
            prompts = _forced([[100 + i] * 40 for i in range(target)], [[8] * group_size] * target)
            carry = self._engine.rollout(prompts, **arguments).carry
            assert carry is not None
            if carry.num_carried == carry.num_banked == 0:
                return


@dataclass(frozen=True)
class Calibration:
    """A round of its own: `num_groups` groups of `group_size`, all members of one length."""

    num_groups: int
    group_size: int
    prompt_tokens: int
    length: int


# Batches of 1 to 32 with short and (one group, whose members share a prompt) long contexts, and prefill alone.
CALIBRATIONS = (
    *(Calibration(batch, 1, 16, 12) for batch in (1, 4, 16, 32)),
    *(Calibration(1, batch, 480, 12) for batch in (4, 32)),
    *(Calibration(groups, 1, tokens, 1) for groups, tokens in ((1, 48), (4, 48), (16, 32), (1, 512), (2, 512))),
)


def calibrate(engine: RolloutEngine, seed: int, vocab_size: int) -> dict[str, list[float]]:
    """Step times from small rounds that carry nothing.

    Of a round of equal lengths the core's own times say what its prefill took, and the decode steps after it.
    """
    rng = random.Random(seed)
    rows: list[tuple[float, float, float, float]] = []
    for c in CALIBRATIONS:
        prompts = [[rng.randrange(vocab_size) for _ in range(c.prompt_tokens)] for _ in range(c.num_groups)]
        lengths = [[c.length] * c.group_size] * c.num_groups
        got = engine.rollout(list(_forced(prompts, lengths)), group_size=c.group_size, carry=False, sampling=_FORCED)
        times = [t.timings for t in got.trajectories]
        batch, context = len(times), len(times) * c.prompt_tokens
        first_s = max(t.first_token_s or 0.0 for t in times)
        if c.length == 1:
            rows.append((batch, context, context, first_s - min(t.scheduled_s or 0.0 for t in times)))
        else:
            seconds = (max(t.finished_s or 0.0 for t in times) - first_s) / (c.length - 1)
            rows += [(batch, context + batch * done, 0, seconds) for done in range(1, c.length)]
    names = ("batch", "context_tokens", "prefill_tokens", "seconds")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def answer_lengths(
    engine: RolloutEngine, prompts: list[list[int]], group_size: int, max_tokens: int, stop_token_id: int
) -> list[list[int]]:
    """How long the model's answers are, by prompt."""
    sampling = SamplingConfig(max_tokens=max_tokens, stop_token_ids=(stop_token_id,))
    got = engine.rollout(
        [Prompt(token_ids=ids) for ids in prompts], group_size=group_size, sampling=sampling, carry=False
    )
    return [[len(t.output_token_ids) for t in group.trajectories] for group in got.groups]


def _forced(prompts: list[list[int]], lengths: list[list[int]]) -> Iterator[Prompt]:
    return iter([Prompt(token_ids=ids, max_tokens=row) for ids, row in zip(prompts, lengths, strict=True)])


if __name__ == "__main__":
    main()
