"""The facade against stock vLLM and against transformers, with the core in its own process."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from stock_reference import run_stock

from longtail.engine import EngineConfig, Prompt, RolloutEngine, SamplingConfig, Trajectory
from longtail.engine.errors import EngineDeadError, InvalidInputError
from longtail.scheduler.metadata import CUT_STOP_REASON

if TYPE_CHECKING:
    import torch

NUM_PROMPTS, MAX_TOKENS = 6, 40
_rng = random.Random(0)
PROMPTS = [[_rng.randrange(3, 512) for _ in range(_rng.randint(4, 70))] for _ in range(NUM_PROMPTS)]
STOP = "e"


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> dict[str, list[dict[str, Any]]]:
    """What stock vLLM answers: greedy, and greedy with a stop string."""
    greedy = {"temperature": 0.0, "max_tokens": MAX_TOKENS}
    answers = run_stock(
        tiny_model,
        [{"prompts": PROMPTS, "params": greedy}, {"prompts": PROMPTS, "params": greedy | {"stop": [STOP]}}],
    )
    return {"greedy": answers[0], "stop": answers[1]}


def comparable(trajectory: Trajectory) -> tuple[Any, ...]:
    return (trajectory.output_token_ids, trajectory.finish_reason, trajectory.stop_reason, trajectory.text or "")


def expected(answer: dict[str, Any]) -> tuple[Any, ...]:
    return (answer["token_ids"], answer["finish_reason"], answer["stop_reason"], answer["text"])


def test_greedy_equals_stock_token_for_token(engine: RolloutEngine, stock: dict[str, Any]) -> None:
    got = engine.rollout(PROMPTS, sampling=SamplingConfig(temperature=0.0, max_tokens=MAX_TOKENS))
    assert [comparable(trajectory) for trajectory in got.trajectories] == [expected(a) for a in stock["greedy"]]
    for trajectory, answer in zip(got.trajectories, stock["greedy"], strict=True):
        assert trajectory.logprobs == pytest.approx(answer["logprobs"], abs=1e-5)
    assert got.stats.num_complete_groups == NUM_PROMPTS


def test_stop_strings_equal_stock_and_complete_their_group(engine: RolloutEngine, stock: dict[str, Any]) -> None:
    got = engine.rollout(PROMPTS, sampling=SamplingConfig(temperature=0.0, max_tokens=MAX_TOKENS, stop=(STOP,)))
    assert [comparable(trajectory) for trajectory in got.trajectories] == [expected(a) for a in stock["stop"]]
    assert sum(trajectory.stop_reason == STOP for trajectory in got.trajectories) >= 2, "the test must hit the string"
    assert got.stats.num_complete_groups == NUM_PROMPTS


def reference_logprobs(model: torch.nn.Module, trajectory: Trajectory, temperature: float, top_p: float) -> list[float]:
    """Log-probabilities of the output under temperature and nucleus truncation, by one transformers forward pass."""
    import torch

    ids = torch.tensor([trajectory.prompt_token_ids + trajectory.output_token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(trajectory.prompt_token_ids) - 1 : -1] / temperature
    if top_p < 1:
        ordered, order = logits.sort(descending=False)
        outside = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        outside[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))
    chosen = torch.tensor(trajectory.output_token_ids)[:, None]
    picked: list[float] = logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    return picked


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_logprobs_equal_a_transformers_forward_pass(
    engine: RolloutEngine, tiny_model: Path, temperature: float, top_p: float
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    sampling = SamplingConfig(temperature=temperature, top_p=top_p, max_tokens=MAX_TOKENS, seed=5, ignore_eos=True)
    got = engine.rollout(PROMPTS, group_size=2, sampling=sampling)
    worst = raw = 0.0
    for trajectory in got.trajectories:
        right = reference_logprobs(model, trajectory, temperature, top_p)
        worst = max(worst, *(abs(a - b) for a, b in zip(trajectory.logprobs, right, strict=True)))
        wrong = reference_logprobs(model, trajectory, 1.0, 1.0)
        raw = max(raw, *(abs(a - b) for a, b in zip(trajectory.logprobs, wrong, strict=True)))
    assert worst < 1e-3
    if temperature != 1.0:
        assert raw > 0.1, "negative control: the raw distribution is another one"


def test_seeded_rounds_repeat_and_members_differ(engine: RolloutEngine) -> None:
    sampling = SamplingConfig(max_tokens=12, seed=11, ignore_eos=True)
    first, second = (engine.rollout(PROMPTS[:2], group_size=3, sampling=sampling) for _ in range(2))
    outputs = [trajectory.output_token_ids for trajectory in first.trajectories]
    assert outputs == [trajectory.output_token_ids for trajectory in second.trajectories]
    assert len({tuple(output) for output in outputs}) == len(outputs)


def fixed_lengths(lengths: list[list[int]]) -> tuple[list[Prompt], SamplingConfig]:
    """Prompts whose members end exactly at the given lengths."""
    prompts = [Prompt(token_ids=PROMPTS[i % NUM_PROMPTS], max_tokens=row) for i, row in enumerate(lengths)]
    return prompts, SamplingConfig(ignore_eos=True, seed=1)


def test_round_is_cut_at_its_target(engine: RolloutEngine) -> None:
    prompts, sampling = fixed_lengths([[5, 8], [6, 30], [9, 9], [200, 3], [150, 150]])
    seen: list[str] = []
    got = engine.rollout(
        prompts, group_size=2, target_groups=2, sampling=sampling, on_trajectory=lambda t: seen.append(t.trajectory_id)
    )
    assert sorted(seen) == sorted(t.trajectory_id for t in got.trajectories)
    assert [group.complete for group in got.groups] == [True, False, True, False, False]
    cut = [t for t in got.trajectories if t.was_cut]
    assert {len(t.output_token_ids) for t in cut} <= {8, 9, 10}, "cut in the step of the ninth token"
    assert all(t.finish_reason == "abort" and t.stop_reason == CUT_STOP_REASON for t in cut)
    stats = got.stats
    assert stats.num_submitted_groups == stats.num_complete_groups + stats.num_cut_groups + stats.num_failed_groups == 5
    assert (stats.num_cut_groups, stats.num_cut_members) == (3, 4)
    assert stats.num_kept_tokens == 5 + 8 + 9 + 9
    for trajectory in got.trajectories:
        span = trajectory.weight_versions[0]
        assert (span.start, span.end) == (0, len(trajectory.output_token_ids))
        assert trajectory.timings.finished_s is not None


def test_trajectories_stream_in_the_order_in_which_they_finish(engine: RolloutEngine) -> None:
    prompts, sampling = fixed_lengths([[40], [5], [20]])
    stream = engine.stream_trajectories(prompts, sampling=sampling)
    assert [len(trajectory.output_token_ids) for trajectory in stream] == [5, 20, 40]
    assert stream.round.stats.num_complete_groups == 3


def test_leaving_a_stream_early_stops_the_round(engine: RolloutEngine) -> None:
    prompts, sampling = fixed_lengths([[3], [900], [900]])
    free = engine.counters()["free_blocks"]
    for _ in engine.stream_trajectories(prompts, sampling=sampling):
        break
    deadline = time.monotonic() + 20
    while engine.counters()["live_members"]:
        assert time.monotonic() < deadline
    counters = engine.counters()
    assert (counters["running"], counters["waiting"], counters["free_blocks"]) == (0, 0, free)


def test_rounds_run_side_by_side(engine: RolloutEngine) -> None:
    prompts, sampling = fixed_lengths([[30], [30], [60]])
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(engine.rollout(prompts, target_groups=2, sampling=sampling)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [result.stats.num_complete_groups for result in results] == [2, 2, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompts": [[9999]]},
        {"prompts": [[]]},
        {"prompts": [list(range(3, 500)) * 3]},
        {"prompts": [[3]], "group_size": -1},
        {"prompts": [[3]], "target_groups": 2},
        {"prompts": [[3]], "sampling": {"temperature": 1}},
    ],
)
def test_wrong_call_is_refused_and_the_engine_goes_on(engine: RolloutEngine, arguments: dict[str, Any]) -> None:
    before = engine.counters()
    with pytest.raises(InvalidInputError):
        engine.rollout(**arguments)
    assert engine.counters() == before


def test_id_of_a_running_round_is_refused_and_free_again_afterwards(engine: RolloutEngine) -> None:
    prompts, sampling = fixed_lengths([[60]])
    first = engine.stream_trajectories(prompts, sampling=sampling, round_id="twice")
    with pytest.raises(InvalidInputError, match="round_id"):
        engine.rollout(prompts, sampling=sampling, round_id="twice")
    assert [len(t.output_token_ids) for t in first] == [60]
    assert engine.rollout(prompts, sampling=sampling, round_id="twice").stats.num_complete_groups == 1


def test_round_id_of_a_cancelled_round_is_free_again(engine: RolloutEngine) -> None:
    prompts, sampling = fixed_lengths([[3], [900]])
    stream = engine.stream_trajectories(prompts, sampling=sampling, round_id="cancelled")
    next(stream)
    stream.close()
    stream.close()
    assert engine.rollout(*fixed_lengths([[4]])[:1], sampling=sampling, round_id="cancelled").stats.num_cut_groups == 0


def test_a_round_gets_nothing_of_a_cancelled_one_that_was_called_the_same(engine: RolloutEngine) -> None:
    prompts, sampling = fixed_lengths([[3], [300], [300]])
    expected = [trajectory.output_token_ids for trajectory in engine.rollout(prompts, sampling=sampling).trajectories]
    stream = engine.stream_trajectories(prompts, sampling=sampling, round_id="again")
    next(stream)
    stream.close()
    again = engine.rollout(prompts, sampling=sampling, round_id="again")
    assert [trajectory.output_token_ids for trajectory in again.trajectories] == expected
    assert again.stats.num_complete_groups == 3


def test_killed_core_is_a_typed_error_within_seconds(tiny_config: EngineConfig) -> None:
    prompts, sampling = fixed_lengths([[5], [900], [900]])
    with RolloutEngine(tiny_config) as victim:
        stream = victim.stream_trajectories(prompts, sampling=sampling)
        assert len(next(stream).output_token_ids) == 5
        for pid in victim.core_pids:
            os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(EngineDeadError) as caught:
            list(stream)
        assert time.monotonic() - start < 10
        assert caught.value.num_in_flight == 2
        assert "signal 9, Killed" in str(caught.value)
        with pytest.raises(EngineDeadError):
            victim.rollout(prompts, sampling=sampling)
        with pytest.raises(EngineDeadError):
            victim.counters()
