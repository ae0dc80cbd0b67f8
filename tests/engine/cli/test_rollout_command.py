"""`longtail rollout` on an engine that is faked, and on a real one that is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from typer.testing import CliRunner, Result

from longtail.engine.cli import rollout
from longtail.engine.cli.app import app
from longtail.engine.config import EngineConfig, SamplingConfig
from longtail.engine.errors import EngineDeadError
from longtail.engine.prompts import PromptLimits
from longtail.engine.round_run import RoundProgress
from longtail.engine.rounds import MemberPlan, plan_round
from longtail.engine.run_settings import load_settings
from longtail.engine.trajectory import Group, Round, RoundStats, Timings, TokenCounts, Trajectory, VersionSpan
from longtail.engine.trajectory_file import index_file, read_groups, read_trajectories
from longtail.scheduler.metadata import CUT_STOP_REASON

GROUP_SIZE = 2


class FakeTokenizer:
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(character) % 256 for character in text]

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        return "\n".join(message["content"] for message in conversation)


class FakeEngine:
    """Ends members in the order of their lengths, a token each a step, and cuts as the scheduler does."""

    def __init__(self, config: EngineConfig, before: dict[int, Callable[[], None]] | None = None) -> None:
        self.config = config
        self.before = before or {}
        self.groups_run: list[str] = []
        self.closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def stream_trajectories(
        self,
        prompts: Sequence[Any],
        *,
        group_size: int,
        target_groups: int,
        sampling: SamplingConfig,
        on_progress: Callable[[RoundProgress], None],
    ) -> FakeStream:
        plan = plan_round(
            prompts, group_size=group_size, target_groups=target_groups, over_provision=None, sampling=sampling,
            round_id=None, tokenizer=FakeTokenizer(), limits=PromptLimits(256, 100_000),
        )  # fmt: skip
        self.groups_run = [prompt.group_id for prompt in plan.prompts]
        return FakeStream(list(plan.members()), plan.round_id, target_groups, on_progress, self.before)


class FakeStream:
    def __init__(
        self,
        members: list[MemberPlan],
        round_id: str,
        target_groups: int,
        on_progress: Callable[[RoundProgress], None],
        before: dict[int, Callable[[], None]],
    ) -> None:
        self._members, self._round_id, self._target = members, round_id, target_groups
        self._on_progress, self._before = on_progress, before
        self.round: Any = None

    def __iter__(self) -> Iterator[Trajectory]:
        lengths = {m.request_id: random.Random(m.request_id).randint(1, 200) for m in self._members}
        ends: dict[str, int] = {}
        for member in self._members:
            group = member.metadata.group
            ends[group] = max(ends.get(group, 0), lengths[member.request_id])
        cut_at = sorted(ends.values())[self._target - 1]
        done: list[Trajectory] = []
        for member in sorted(self._members, key=lambda m: lengths[m.request_id]):
            self._before.get(len(done), lambda: None)()
            length = lengths[member.request_id]
            done.append(_trajectory(member, min(length, cut_at), was_cut=length > cut_at))
            self._on_progress(
                RoundProgress(
                    num_complete_groups=0, num_live_members=len(lengths) - len(done), num_cut_members=0,
                    num_output_tokens=10, num_steps=length, idle_slot_steps=0, peak_running=4,
                    num_running=4, num_waiting=1,
                )
            )  # fmt: skip
            yield done[-1]
        self.round = _round(self._round_id, self._target, done)


def _trajectory(member: MemberPlan, length: int, *, was_cut: bool) -> Trajectory:
    entry = member.prompt.metadata.get("entry")
    answer = entry["answer"] if entry and member.metadata.index == 0 else "no"
    return Trajectory(
        trajectory_id=member.request_id, round_id=member.metadata.round, group_id=member.metadata.group,
        index=member.metadata.index, prompt_token_ids=member.prompt.token_ids, output_token_ids=[7] * length,
        logprobs=[-0.5] * length, source_mask=[1] * length, weight_versions=[VersionSpan("0", 0, length)],
        finish_reason="abort" if was_cut else "stop", stop_reason=CUT_STOP_REASON if was_cut else None,
        text=f"<answer>{answer}</answer>", seed=member.seed, tokens=TokenCounts(scheduled=length),
        timings=Timings(submitted_s=0.0, scheduled_s=0.0, first_token_s=0.1, finished_s=length / 10),
        metadata=member.prompt.metadata,
    )  # fmt: skip


def _round(round_id: str, target: int, done: list[Trajectory]) -> Round:
    groups = []
    for group_id in dict.fromkeys(trajectory.group_id for trajectory in done):
        members = sorted((t for t in done if t.group_id == group_id), key=lambda t: t.index)
        complete = not any(t.was_cut for t in members)
        groups.append(Group(group_id=group_id, trajectories=members, complete=complete, metadata=members[0].metadata))
    num_complete = sum(group.complete for group in groups)
    stats = RoundStats(
        num_submitted_groups=len(groups), num_complete_groups=num_complete, num_cut_groups=len(groups) - num_complete,
        num_failed_groups=0, num_cut_members=sum(t.was_cut for t in done),
        num_output_tokens=sum(len(t.output_token_ids) for t in done),
        num_kept_tokens=sum(len(t.output_token_ids) for g in groups if g.complete for t in g.trajectories),
        num_scheduled_tokens=1, num_recomputed_tokens=0, num_steps=200, idle_slot_steps=5, peak_running=4, seconds=2.0,
    )  # fmt: skip
    return Round(round_id=round_id, target_groups=target, groups=groups, stats=stats)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder that passes for a checkpoint as long as nobody opens the weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 256}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": f"prompt {i}", "id": f"g{i}"}) + "\n" for i in range(8)))
    return path


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """The fake engines that were started; put trouble for the next one into `FakeEngine.before`."""
    started: list[FakeEngine] = []

    def open_engine(config: EngineConfig) -> FakeEngine:
        started.append(FakeEngine(config, TROUBLE.copy()))
        return started[-1]

    monkeypatch.setattr(rollout, "open_engine", open_engine)
    TROUBLE.clear()
    return started


TROUBLE: dict[int, Callable[[], None]] = {}


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["rollout", *(str(arg) for arg in args)])


def usable(out: Path, group_size: int = GROUP_SIZE) -> list[Group]:
    return [group for group in read_groups(out, group_size) if group.complete]


def test_a_round_ends_in_a_file_a_table_and_a_report(
    engines: list[FakeEngine], prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / "runs" / "o.jsonl", tmp_path / "pages" / "r.html"
    result = run("--prompts", prompts, "--model", model_folder, "--group-size", GROUP_SIZE, "--target-groups", 3,
                 "--over-provision", 2, "--out", out, "--report", report, "--seed", 5)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(list(read_trajectories(out))) == 6 * GROUP_SIZE  # 3 x 2 groups, those that were cut included
    assert len(usable(out)) >= 3
    assert "the target of 3 complete groups was reached" in result.stdout
    assert f"report: {report}" in result.stdout
    assert "<svg" in report.read_text()
    assert all(engine.closed for engine in engines)
    settings = load_settings(out)
    assert (settings.num_prompts, settings.group_size, settings.sampling) == (6, GROUP_SIZE, {"seed": 5})


def test_a_task_is_scored_and_its_rewards_are_written_and_shown(
    engines: list[FakeEngine], model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.jsonl"
    result = run("--task", "chain_sum", "--model", model_folder, "--group-size", GROUP_SIZE, "--target-groups", 3,
                 "--over-provision", 2, "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    trajectories = list(read_trajectories(out))
    assert any(t.was_cut for t in trajectories)
    for trajectory in trajectories:
        if trajectory.was_cut:
            assert "reward" not in trajectory.metadata  # it has no answer, which is not a wrong one
        elif trajectory.index == 0:
            assert trajectory.metadata["reward"] == 1.0  # the fake engine's member 0 knows the answer
        else:
            assert trajectory.metadata["reward"] < 1.0
    assert "mean reward" in result.stdout


def test_a_dead_engine_leaves_what_had_finished_and_continue_runs_the_rest(
    engines: list[FakeEngine], prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.jsonl"

    def die() -> None:
        raise EngineDeadError("rollout", "killed", 9)

    TROUBLE[9] = die
    first = run("--prompts", prompts, "--model", model_folder, "--group-size", GROUP_SIZE, "--out", out)
    assert first.exit_code == 1, first.output
    assert "the engine core died during rollout (killed); 9 trajectories" in first.stderr
    assert f"{out} holds 9 trajectories" in first.stderr
    assert f"longtail rollout --continue {out}" in first.stderr
    assert "Traceback" not in first.output
    assert len(list(read_trajectories(out))) == 9

    TROUBLE.clear()
    complete_before = {group.group_id for group in usable(out)}
    assert 0 < len(complete_before) < 8  # otherwise this shows nothing
    with out.open("ab") as file:
        file.write(b'{"trajectory_id": "torn')  # as a killed writer leaves it
    second = run("--continue", out)
    assert second.exit_code == 0, second.output
    assert set(engines[-1].groups_run) == {f"g{i}" for i in range(8)} - complete_before
    assert engines[-1].config == engines[0].config
    assert sorted(group.group_id for group in usable(out)) == [f"g{i}" for i in range(8)]
    assert all(json.loads(line) for line in out.read_bytes().splitlines())

    before = out.read_bytes()
    third = run("--continue", out)
    assert (third.exit_code, out.read_bytes()) == (0, before)
    assert "complete: nothing to run" in third.stdout
    assert len(engines) == 2


def test_continue_samples_each_member_with_the_seed_of_its_place(
    engines: list[FakeEngine], prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    """With fresh noise, the groups that a kill caught, the long ones, would get a second chance to be short."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "o.jsonl"

    def die() -> None:
        raise EngineDeadError("rollout", "killed", 9)

    args = ("--prompts", prompts, "--model", model_folder, "--group-size", GROUP_SIZE, "--seed", 100)
    assert run(*args, "--out", whole).exit_code == 0
    TROUBLE[9] = die
    assert run(*args, "--out", out).exit_code == 1
    TROUBLE.clear()
    assert run("--continue", out).exit_code == 0
    seeds = [{(t.group_id, t.index): t.seed for g in usable(path) for t in g.trajectories} for path in (whole, out)]
    assert seeds[0] == seeds[1]
    assert seeds[0]["g3", 1] == 100 + 3 * GROUP_SIZE + 1


def test_a_run_that_was_cut_is_complete(
    engines: list[FakeEngine], prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.jsonl"
    assert run("--prompts", prompts, "--model", model_folder, "--target-groups", 2, "--over-provision", 3,
               "--out", out).exit_code == 0  # fmt: skip
    assert any(t.was_cut for t in read_trajectories(out))
    assert "nothing to run" in run("--continue", out).stdout


def test_continue_runs_until_what_is_left_of_the_target(
    engines: list[FakeEngine], prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.jsonl"

    def die() -> None:
        raise EngineDeadError("rollout", "killed", 1)

    TROUBLE[4] = die
    assert run("--prompts", prompts, "--model", model_folder, "--target-groups", 6, "--out", out,
               "--num-prompts", 8).exit_code == 1  # fmt: skip
    assert len(usable(out, 1)) == 4
    TROUBLE.clear()
    assert run("--continue", out).exit_code == 0
    assert len(engines[-1].groups_run) == 4
    assert len(usable(out, 1)) == 6


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_which_says_how_to_go_on(
    number: int, exit_code: int, engines: list[FakeEngine], prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.jsonl"
    TROUBLE[3] = lambda: os.kill(os.getpid(), number)
    handler = signal.getsignal(number)
    result = run("--prompts", prompts, "--model", model_folder, "--out", out)
    assert result.exit_code == exit_code, result.output
    assert "stopped by SIG" in result.stderr
    assert f"--continue {out}" in result.stderr
    assert len(list(read_trajectories(out))) == 3
    assert engines[0].closed
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--group-size", "3"], "--group-size: expected 1, as in the run that is continued, got 3"),
        (["--temperature", "0.5"], "--temperature: expected nothing, as in the run that is continued, got 0.5"),
        (["--max-tokens", "9"], "--max-tokens: expected 64, as in the run that is continued, got 9"),
        (["--dtype", "bfloat16"], "--dtype: expected nothing, as in the run that is continued, got 'bfloat16'"),
        (["--model", "smollm2"], "--model: expected '"),
        (["--overwrite"], "--overwrite: expected not with --continue"),
    ],
)
def test_continue_refuses_what_would_change_the_run(
    args: list[str], words: str, engines: list[FakeEngine], prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.jsonl"
    _half_a_run(prompts, model_folder, out)
    result = run("--continue", out, *args)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(engines) == 1


def test_continue_takes_options_that_only_change_how_fast_it_is(
    engines: list[FakeEngine], prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.jsonl"
    _half_a_run(prompts, model_folder, out)
    assert run("--continue", out, "--kv-cache-gib", 0.5, "--max-tokens", 64).exit_code == 0
    assert engines[-1].config.kv_cache_gib == 0.5


def test_continue_refuses_other_prompts(
    engines: list[FakeEngine], prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.jsonl"
    _half_a_run(prompts, model_folder, out)
    prompts.write_text(prompts.read_text().replace("prompt 7", "another"))
    result = run("--continue", out)
    assert result.exit_code == 2
    assert "--prompts: expected the same prompts as in the run that is continued" in result.stderr


def _half_a_run(prompts: Path, model_folder: Path, out: Path) -> None:
    def die() -> None:
        raise EngineDeadError("rollout", "killed", 1)

    TROUBLE[4] = die
    assert run("--prompts", prompts, "--model", model_folder, "--max-tokens", 64, "--out", out).exit_code == 1
    TROUBLE.clear()


def test_continue_without_a_run_is_wrong_input(tmp_path: Path) -> None:
    result = run("--continue", tmp_path / "none.jsonl")
    assert result.exit_code == 2
    assert "none.jsonl" in result.stderr


def test_overwrite_starts_from_nothing(
    engines: list[FakeEngine], prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.jsonl"
    for _ in range(2):
        assert run("--prompts", prompts, "--model", model_folder, "--out", out, "--overwrite").exit_code == 0
        assert len(list(read_trajectories(out))) == 8


def test_a_file_that_another_run_writes_is_left_alone(
    engines: list[FakeEngine], prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.jsonl"
    inner: list[Result] = []
    args = ("--prompts", prompts, "--model", model_folder, "--out", out)
    TROUBLE[5] = lambda: inner.append(run(*args, "--overwrite"))
    assert run(*args).exit_code == 0
    assert inner[0].exit_code == 2
    assert "another run" in inner[0].stderr
    assert len(list(read_trajectories(out))) == 8


# ---- a real engine, killed ---------------------------------------------------------------------------------------


def _start(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "longtail.engine.cli", "rollout", *(str(arg) for arg in args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _num_lines(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def _wait_for_lines(out: Path, number: int, process: subprocess.Popen[str], timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while _num_lines(out) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{_num_lines(out)} lines after {timeout_s} s"
        time.sleep(0.02)


def _engine_core(process: subprocess.Popen[str]) -> psutil.Process:
    """The child with the most memory; the others are helpers of multiprocessing."""
    return max(psutil.Process(process.pid).children(), key=lambda child: child.memory_info().rss)


def test_killed_runs_leave_whole_lines_and_are_completed(tiny_model: Path, tmp_path: Path) -> None:
    """First the engine core is killed, then, in the run that continues, the whole command."""
    out, prompts = tmp_path / "o.jsonl", tmp_path / "p.jsonl"
    rng = random.Random(0)
    lines = [{"token_ids": [rng.randrange(3, 259) for _ in range(8)], "id": f"g{i}"} for i in range(16)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = _start(
        "--prompts", prompts, "--model", tiny_model, "--group-size", 2, "--out", out, "--max-tokens", 400,
        "--max-model-len", 1024, "--max-num-seqs", 8, "--kv-cache-gib", 0.1, "--block-size", 32, "--seed", 1,
    )  # fmt: skip
    _wait_for_lines(out, 4, first)
    core = _engine_core(first)
    core.kill()
    killed_at = time.monotonic()
    _, errors = first.communicate(timeout=60)
    assert time.monotonic() - killed_at < 10
    assert first.returncode == 1
    assert "error: the engine core died during rollout" in errors
    assert f"longtail rollout --continue {out}" in errors
    assert "Traceback" not in errors
    num_before = _num_lines(out)
    assert 4 <= num_before < 32  # otherwise it was not killed in mid-round
    assert len(list(read_trajectories(out))) == num_before
    assert out.read_bytes().endswith(b"\n")

    second = _start("--continue", out)
    _wait_for_lines(out, num_before + 4, second)
    core = _engine_core(second)
    second.kill()
    second.communicate(timeout=60)
    try:
        core.wait(timeout=20)  # it must not stay behind with the model in memory
    finally:
        if core.is_running():
            core.kill()
    num_before = len(list(read_trajectories(out)))
    assert out.read_bytes().endswith(b"\n")
    complete = set(index_file(out).complete_groups(2))
    assert len(complete) < 16

    third = _start("--continue", out)
    output, errors = third.communicate(timeout=240)
    assert (third.returncode, errors) == (0, "")  # what vLLM and its libraries say is in the log
    assert "Round" in output
    groups = list(read_groups(out, 2))
    assert sorted(group.group_id for group in groups) == sorted(f"g{i}" for i in range(16))
    assert all(group.complete for group in groups)
    again = {t.group_id for t in list(read_trajectories(out))[num_before:]}
    assert again.isdisjoint(complete)  # only what was missing was run


def test_a_tree_has_one_option(engines: list[FakeEngine], prompts: Path, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    options = ("--prompts", prompts, "--model", model_folder, "--out", out, "--num-prompts", 2)
    wrong = run(*options, "--tree", "width=4,depth=2,segments=8")
    assert wrong.exit_code != 0
    assert "--tree" in wrong.output
    assert "segment_tokens" in wrong.output
    assert run(*options, "--tree", "width=4,depth=2,segment_tokens=8,fallback=none").exit_code != 0
    result = run(*options, "--tree", "width=4,depth=2,segment_tokens=8,split=logprob")
    assert result.exit_code == 0, result.output
    settings = load_settings(out)
    assert settings.group_size == 4
    assert settings.sampling == {"tree": {"width": 4, "depth": 2, "segment_tokens": 8, "split": "logprob"}}
    assert len(list(read_trajectories(out))) == 8
