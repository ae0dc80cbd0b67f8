"""The adapter over a real vLLM scheduler with a faked model: cut, answers, accounting, and no trace when off."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scheduler_harness
from scheduler_harness import SchedulerHarness
from vllm.config import VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.request import RequestStatus

from longtail.scheduler.metadata import CUT_STOP_REASON, report_of
from longtail.scheduler.rollout_scheduler import RolloutScheduler, make_scheduler

PROMPT = list(range(3, 23))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scheduler_harness.write_model_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def config(model_dir: Path) -> VllmConfig:
    return scheduler_harness.make_vllm_config(model_dir)


@pytest.fixture
def harness(config: VllmConfig) -> Iterator[SchedulerHarness]:
    made = SchedulerHarness(RolloutScheduler, config)
    start = made.num_free_blocks
    yield made
    made.run()
    assert made.num_free_blocks == start, "blocks leaked"
    assert made.scheduler._members == {}


def member(group: int, *, target: int, size: int = 1, index: int = 0, round_id: str = "r") -> dict[str, Any]:
    return {"round": round_id, "target_groups": target, "group": str(group), "group_size": size, "index": index}


def finals(steps: list[Any]) -> dict[str, tuple[int, EngineCoreOutput]]:
    """Final outputs by request id, with the number of the step that gave each; at most one a request."""
    found: dict[str, tuple[int, EngineCoreOutput]] = {}
    for number, (_, outputs) in enumerate(steps, start=1):
        for output in outputs:
            if output.finish_reason is not None:
                assert output.request_id not in found
                found[output.request_id] = (number, output)
    return found


def test_cut_happens_in_the_step_that_completes_the_target(harness: SchedulerHarness) -> None:
    for i in range(8):
        harness.add(f"r{i}", PROMPT, 10 * (i + 1), member(i, target=5))
    ended = finals(harness.run())
    assert {request_id: step for request_id, (step, _) in ended.items()} == {
        "r0": 10, "r1": 20, "r2": 30, "r3": 40, "r4": 50, "r5": 50, "r6": 50, "r7": 50
    }  # fmt: skip
    for request_id in ("r5", "r6", "r7"):
        output = ended[request_id][1]
        assert (output.finish_reason, output.stop_reason) == (FinishReason.ABORT, CUT_STOP_REASON)
        assert len(output.new_token_ids) == 1, "the token of the cutting step is kept"
        assert output.new_logprobs is not None
        report = report_of(output.kv_transfer_params)
        assert report is not None
        assert report.num_scheduled_tokens == len(PROMPT) + 49


def test_without_a_cut_everyone_would_have_run_to_the_end(config: VllmConfig) -> None:
    """Negative control: the same requests on the stock scheduler."""
    stock = SchedulerHarness(Scheduler, config)
    for i in range(8):
        stock.add(f"r{i}", PROMPT, 10 * (i + 1), member(i, target=5))
    assert finals(stock.run())["r7"][0] == 80


def test_group_counts_only_when_all_its_members_finished(harness: SchedulerHarness) -> None:
    lengths = {(0, 0): 5, (0, 1): 30, (1, 0): 10, (1, 1): 12}
    for (group, index), length in lengths.items():
        harness.add(f"{group}/{index}", PROMPT, length, member(group, target=1, size=2, index=index))
    ended = finals(harness.run())
    assert ended["0/1"][0] == 12
    assert ended["0/1"][1].finish_reason == FinishReason.ABORT
    assert ended["1/1"][1].finish_reason == FinishReason.LENGTH


def test_never_scheduled_members_get_their_final_output(model_dir: Path) -> None:
    small = scheduler_harness.make_vllm_config(model_dir, max_num_seqs=2)
    harness = SchedulerHarness(RolloutScheduler, small)
    for i in range(5):
        harness.add(f"r{i}", PROMPT, 6, member(i, target=1))
    ended = finals(harness.run())
    assert set(ended) == {f"r{i}" for i in range(5)}
    for i in (2, 3, 4):
        step, output = ended[f"r{i}"]
        assert (step, output.finish_reason, output.new_token_ids) == (6, FinishReason.ABORT, [])
        report = report_of(output.kv_transfer_params)
        assert report is not None
        assert report.scheduled_ts is None
        assert report.num_scheduled_tokens == 0


def test_late_member_is_answered_without_being_scheduled(harness: SchedulerHarness) -> None:
    harness.add("a", PROMPT, 3, member(0, target=1))
    harness.run()
    harness.add("late", PROMPT, 3, member(1, target=1))
    assert harness.scheduler.has_requests(), "the engine must step to deliver the answer"
    steps = harness.run()
    assert sum(scheduled.total_num_scheduled_tokens for scheduled, _ in steps) == 0
    answer = finals(steps)["late"][1]
    assert answer.stop_reason == CUT_STOP_REASON
    # vLLM's histograms would be fed the machine's uptime without these.
    assert [event.type.name for event in answer.events or []] == ["QUEUED", "SCHEDULED"]


def test_streaming_input_with_metadata_is_refused(harness: SchedulerHarness) -> None:
    for _ in range(2):
        harness.add("streamed", PROMPT, 3, member(0, target=1), resumable=True)
    answers = [output for _, outputs in harness.run() for output in outputs]
    assert [answer.finish_reason for answer in answers] == [FinishReason.ERROR] * 2
    assert all(str(answer.stop_reason).startswith("rollout") for answer in answers)


@pytest.mark.parametrize(
    ("rollout", "names"),
    [
        (member(0, target=2), "rollout.index"),
        (member(1, target=3), "rollout.target_groups"),
        (member(0, target=2, size=9, index=3), "rollout.group_size"),
        ({"round": "r", "target_groups": -1, "group": "g"}, "rollout.target_groups"),
        ({"round": 1}, "rollout.round"),
        ("not json", "rollout"),
        ({}, "rollout"),
    ],
)
def test_bad_member_gets_an_error_that_names_the_field(harness: SchedulerHarness, rollout: Any, names: str) -> None:
    harness.add("good", PROMPT, 4, member(0, target=2))
    harness.add("bad", PROMPT, 4, rollout)
    ended = finals(harness.run())
    output = ended["bad"][1]
    assert output.finish_reason == FinishReason.ERROR
    assert str(output.stop_reason).startswith(names)
    assert ended["good"] == (4, ended["good"][1])
    assert ended["good"][1].finish_reason == FinishReason.LENGTH


def test_callers_abort_leaves_the_round_open(harness: SchedulerHarness) -> None:
    for i in range(3):
        harness.add(f"r{i}", PROMPT, 5 * (i + 1), member(i, target=2))
    harness.step()
    harness.scheduler.finish_requests("r0", RequestStatus.FINISHED_ABORTED)
    ended = finals(harness.run())
    assert "r0" not in ended, "the front end answers its own aborts"
    assert ended["r2"][1].finish_reason == FinishReason.LENGTH
    assert harness.scheduler.rollout_rpc("round", {"round": "r"})["num_complete_groups"] == 2


def test_closing_a_round_stops_its_members_with_what_they_have(harness: SchedulerHarness) -> None:
    for i in range(3):
        harness.add(f"r{i}", PROMPT, 50, member(i, target=3))
    harness.step()
    counts = harness.scheduler.rollout_rpc("close_round", {"round": "r"})
    assert (counts["closed"], counts["num_cut_members"]) == (True, 3)
    ended = finals(harness.run())
    assert all(output.finish_reason == FinishReason.ABORT for _, output in ended.values())
    assert len(ended) == 3


@pytest.mark.parametrize(
    ("op", "args", "field"),
    [
        ("nonsense", {}, "op"),
        ("round", {}, "round"),
        ("round", {"round": 7}, "round"),
        ("close_round", {"round": "nowhere"}, "round"),
        ("forget_round", {"round": "nowhere"}, "round"),
    ],
)
def test_wrong_rpc_is_answered_not_raised(harness: SchedulerHarness, op: str, args: Any, field: str) -> None:
    assert harness.scheduler.rollout_rpc(op, args)["invalid"][0] == field


def test_scheduled_and_recomputed_tokens_are_exact_under_preemption(model_dir: Path) -> None:
    """A pool too small for everyone preempts; what the steps scheduled must equal what the members report."""
    config = scheduler_harness.make_vllm_config(model_dir, enable_prefix_caching=False)
    harness = SchedulerHarness(RolloutScheduler, config, num_blocks=14)
    for i in range(6):
        harness.add(f"r{i}", PROMPT, 90, member(i, target=6))
    steps = harness.run()
    scheduled = dict.fromkeys((f"r{i}" for i in range(6)), 0)
    for output, _ in steps:
        for request_id, count in output.num_scheduled_tokens.items():
            scheduled[request_id] += count
    reports = {request_id: report_of(out.kv_transfer_params) for request_id, (_, out) in finals(steps).items()}
    assert sum(report.num_preemptions for report in reports.values() if report) > 0, "the test must preempt"
    for request_id, report in reports.items():
        assert report is not None
        assert report.num_scheduled_tokens == scheduled[request_id]
        assert report.num_recomputed_tokens == scheduled[request_id] - (len(PROMPT) + 90 - 1)


def test_cached_prompt_tokens_are_reported(harness: SchedulerHarness) -> None:
    prompt = [i % 400 for i in range(3, 103)]
    harness.add("first", prompt, 2, member(0, target=2))
    harness.run()
    harness.add("second", prompt, 2, member(1, target=2))
    report = report_of(finals(harness.run())["second"][1].kv_transfer_params)
    assert report is not None
    assert report.num_cached_tokens == 96
    assert report.num_scheduled_tokens == len(prompt) + 1 - 96


def _random_workload(harness: SchedulerHarness, seed: int) -> list[tuple[Any, Any]]:
    """Arrivals, aborts and steps, equal for equal seeds; returns everything that was scheduled and emitted."""
    rng = random.Random(seed)
    log: list[tuple[Any, Any]] = []
    arrived = 0
    while arrived < 60 or harness.scheduler.has_requests():
        for _ in range(rng.randint(0, 4)):
            if arrived < 60:
                prompt = [rng.randrange(3, 9) for _ in range(rng.randint(1, 300))]
                harness.add(f"r{arrived}", prompt, rng.randint(1, 80), temperature=1.0, seed=arrived)
                arrived += 1
        if rng.random() < 0.05:
            harness.scheduler.finish_requests(f"r{rng.randrange(60)}", RequestStatus.FINISHED_ABORTED)
        scheduled, outputs = harness.step()
        log.append((_comparable(scheduled), [_comparable(output) for output in outputs]))
    return log


def _comparable(value: Any) -> Any:
    """A value without clocks and object identities."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _comparable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, EngineCoreOutput):
        return (value.request_id, value.new_token_ids, value.finish_reason, value.stop_reason, value.kv_transfer_params)
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_comparable(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, set, frozenset, type(None))) else repr(type(value))


@pytest.mark.parametrize("seed", range(3))
def test_without_metadata_every_decision_is_stock(model_dir: Path, seed: int) -> None:
    def run(cls: Any) -> list[Any]:
        config = scheduler_harness.make_vllm_config(model_dir, max_num_seqs=16, max_num_batched_tokens=256)
        return _random_workload(SchedulerHarness(cls, config, num_blocks=80), seed)

    stock, ours = run(Scheduler), run(RolloutScheduler)
    assert len(stock) > 100
    assert ours == stock
    assert run(lambda **kwargs: make_scheduler(**kwargs)) == stock
    changed = _random_workload_with_other_budget(model_dir, seed)
    assert changed != stock, "negative control: the comparison sees a different schedule"


def _random_workload_with_other_budget(model_dir: Path, seed: int) -> list[Any]:
    config = scheduler_harness.make_vllm_config(model_dir, max_num_seqs=16, max_num_batched_tokens=224)
    return _random_workload(SchedulerHarness(Scheduler, config, num_blocks=80), seed)
