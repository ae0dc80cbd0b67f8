"""The demo, short: it runs, reports, and leaves nothing behind however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from rich.console import Console

from longtail.trainer_bridge.demo.charts import Bars, Line, bar_chart, line_chart
from longtail.trainer_bridge.demo.display import DemoDisplay
from longtail.trainer_bridge.demo.engine_process import EngineProcess, EngineProcessError
from longtail.trainer_bridge.demo.loop import Evaluation, StepRecord
from longtail.trainer_bridge.demo.report import RunRecord, Sample, figures, render_run
from longtail.trainer_bridge.demo.run import DemoSettings, run_demo
from longtail.trainer_bridge.errors import InvalidInputError

SMALL = {
    "steps": 2, "target_groups": 2, "group_size": 2, "evaluate_every": 1, "num_evaluated": 4, "warm_up_updates": 3,
    "threads": 1,
}  # fmt: skip
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One base model for all tests here."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGTAIL_CACHE", str(folder))
        yield folder


def a_step(number: int, reward: float = 0.5) -> StepRecord:
    return StepRecord(
        step=number, version=number - 1, reward=reward, reward_std=0.5, mean_length=60.0, max_length=400,
        staleness={0: 0.5, 1: 0.25, 7: 0.25}, num_tokens=5000, idle_share=0.4, rollout_s=2.0, train_s=1.0,
        update_s=0.05, pause_s=0.01, grad_norm=0.1, lag_kl=0.001, ess=0.9,
    )  # fmt: skip


def a_run(num_steps: int) -> RunRecord:
    evaluations = [
        Evaluation(step=i, reward=0.4 + 0.1 * i, mean_length=60.0, seconds=1.0) for i in range(num_steps + 1)
    ]
    samples = [Sample(before="48>18 <40>", before_reward=0.0, after="48>18 30>18", after_reward=1.0)]
    return RunRecord("<title>", [a_step(i + 1) for i in range(num_steps)], evaluations, samples, {"seed": "0"})


# ---- the real thing ----------------------------------------------------------------------------------------------


def test_two_steps_and_their_report(cache: Path, tmp_path: Path) -> None:
    report, out = tmp_path / "report.html", tmp_path / "out"
    with (tmp_path / "screen").open("w") as screen:
        run_demo(DemoSettings(**SMALL), out, report, Console(file=screen, width=200))
    steps = [msgspec.json.decode(line, type=StepRecord) for line in (out / "steps.jsonl").read_bytes().splitlines()]
    assert [(step.step, step.version) for step in steps] == [(1, 0), (2, 1)]
    assert all(step.num_tokens > 0 and step.update_s > 0 for step in steps)
    assert sum(steps[1].staleness.values()) == pytest.approx(1.0)
    page = report.read_text()
    for label in ("Reward", "Response length", "Staleness", "Seconds", "Tokens a second", "Idle share"):
        assert f'aria-label="{label}' in page
    assert 'data-key="num_steps" data-value="2"' in page
    shown = (tmp_path / "screen").read_text()
    assert "step 2/2" in shown
    assert "held-out reward after step 2" in shown
    assert not _children()


@pytest.mark.parametrize("victim", ["engine", "trainer", "ctrl-c"])
def test_either_process_ends_with_the_other(cache: Path, tmp_path: Path, victim: str) -> None:
    options = {**SMALL, "steps": 1000, "num_evaluated": 1}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    screen = tmp_path / "screen"
    with screen.open("wb") as output:
        demo = subprocess.Popen(
            [sys.executable, "-m", "longtail.engine.cli", "train-demo", *words, "--out", str(tmp_path / "out"),
             "--report", str(tmp_path / "report.html")],
            stdout=output, stderr=output, env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
    try:
        _wait_for(lambda: "step 2/" in screen.read_text() or demo.poll() is not None)
        found = re.search(r"engine (\d+) serves", screen.read_text())
        assert found, screen.read_text()
        engine = psutil.Process(int(found[1]))
        family = [engine, *engine.children(recursive=True)]
        match victim:
            case "engine":
                engine.kill()
                assert demo.wait(TIMEOUT_S) == 1
                last = screen.read_text().splitlines()[-1]
                assert f"the engine's process {engine.pid} ended (SIGKILL)" in last
                assert str(tmp_path / "out" / "engine.log") in last
            case "trainer":
                demo.kill()
                demo.wait(TIMEOUT_S)
            case _:
                demo.send_signal(signal.SIGINT)
                assert demo.wait(TIMEOUT_S) == 130
        _wait_for(lambda: not any(process.is_running() and _is_alive(process) for process in family))
    finally:
        demo.kill()
        demo.wait()


def test_an_engine_that_does_not_start_is_an_error_that_names_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(EngineProcessError, match=re.escape(str(log))) as error:
        EngineProcess(str(tmp_path / "nothing"), [], log)
    assert "exit code 2" in str(error.value)
    assert not _children()


# ---- settings, display, report -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["steps", "group_size", "over_provision", "evaluate_every"])
def test_settings_that_make_no_run_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match=name):
        DemoSettings(**{name: 0})


def test_the_display_has_the_last_steps_that_fit(tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as screen:
        console = Console(file=screen, force_terminal=True, width=140, height=20)
        clock = iter(range(10_000))
        with DemoDisplay(console, 50, clock=lambda: float(next(clock))) as display:
            for number in range(1, 41):
                display.on_phase("rollout")
                display.on_trajectory(None)
                display.on_step(a_step(number))
        text = (tmp_path / "screen").read_text()
    assert "step 41 of 50: rolling out" in text or "step 40 of 50: rolling out" in text
    assert "1 answers ended" in text


def test_the_report_reads_as_numbers_and_escapes_what_models_write() -> None:
    page = render_run(a_run(4))
    values = dict(re.findall(r'data-key="(\w+)" data-value="([^"]*)"', page))
    assert float(values["last_reward"]) == pytest.approx(0.8)
    assert float(values["seconds"]) == pytest.approx(4 * 3.05)
    assert float(values["off_policy_share"]) == pytest.approx(0.5)
    assert values.keys() == {figure.key for figure in figures(a_run(4))}
    assert "&lt;40&gt;" in page
    assert "<40>" not in page
    assert "<script" not in page
    assert "There was no step" in render_run(a_run(0))


def test_charts_put_values_where_they_belong() -> None:
    chart = line_chart([Line("x", "curve-a", [(0, 0.0), (10, 1.0)], has_dots=True)], "label", "{:.1f}".format, high=1.0)
    ((x0, y0), (x1, y1)) = re.findall(r'class="dot curve-a" cx="([\d.]+)" cy="([\d.]+)"', chart)
    assert float(x0) < float(x1)
    assert float(y0) > float(y1)
    bars = bar_chart(Bars([("a", "kept"), ("b", "cut")], [1, 2], [(1.0, 1.0), (0.0, 2.0)]), "label", "{:g}".format)
    heights = [float(height) for height in re.findall(r'<rect class="(?:kept|cut)"[^>]*height="([\d.]+)"', bars)]
    assert heights[0] == pytest.approx(heights[1], abs=0.02)
    assert heights[2] == pytest.approx(2 * heights[0], abs=0.05)
    assert line_chart([], "label", str) == bar_chart(Bars([], [], []), "label", str) == ""


def _children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "longtail.engine.cli" in " ".join(p.cmdline())]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
