"""`longtail train-demo`: the whole loop of reinforcement learning on one machine, to be watched.

This process is the trainer; the engine is another one, reached over the bridge alone. `OUT` gets `steps.jsonl`, a line
for each step as it ends, and the engine's log; the report is written at the end. Whatever ends this process ends the
engine; an engine that ends by itself is an error that names its log.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from longtail.engine.cli.failures import signals_raise
from longtail.trainer_bridge.client import BridgeClient
from longtail.trainer_bridge.demo import task as demo_task
from longtail.trainer_bridge.demo.display import DemoDisplay
from longtail.trainer_bridge.demo.engine_process import EngineProcess
from longtail.trainer_bridge.demo.loop import Evaluation, LoopConfig, StepRecord, TrainingLoop
from longtail.trainer_bridge.demo.report import RunRecord, Sample, figures, headline, write_run_report
from longtail.trainer_bridge.errors import BridgeError, InvalidInputError

if TYPE_CHECKING:
    from longtail.trainer_bridge.demo.euclid_model import WarmUpProgress
    from longtail.trainer_bridge.demo.task import DemoTask

STEPS_FILE, LOG_FILE = "steps.jsonl", "engine.log"
_NUM_SAMPLES = 2
_LINE_UPDATES = 100


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo does.

    Attributes:
        task: `euclid`, or a task of reasoning-gym.
        steps: optimiser steps.
        target_groups, group_size, over_provision: see `LoopConfig`.
        learning_rate: of AdamW; the task's by default.
        evaluate_every: steps between two evaluations, on `num_evaluated` held-out prompts.
        warm_up_updates: of euclid's base model, where the usual ones are too many.
        seed: of the prompts and of the engine's sampling.
        threads: of the trainer; by default 1 for euclid, whose model is tiny, else torch's choice.

    Raises:
        InvalidInputError: a number is too small.

    """

    task: str = demo_task.EUCLID
    steps: int = 60
    target_groups: int = 8
    group_size: int = 8
    over_provision: float = 2.0
    learning_rate: float | None = None
    evaluate_every: int = 10
    num_evaluated: int = 256
    warm_up_updates: int | None = None
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        lows = {
            "steps": 1, "target_groups": 1, "group_size": 2, "over_provision": 1, "learning_rate": 0,
            "evaluate_every": 1, "num_evaluated": 1, "warm_up_updates": 1, "seed": 0, "threads": 1,
        }  # fmt: skip
        for name, low in lows.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InvalidInputError(name, f"at least {low}", value)


def run_demo(settings: DemoSettings, out: Path, report: Path, console: Console) -> None:
    """Run the demo to its end.

    Raises:
        LongtailError: the engine did not start, ended, or did not answer.

    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    threads = settings.threads or (1 if settings.task == demo_task.EUCLID else None)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    with signals_raise():
        task = _make_task(settings, console)
        console.print(f"starting the engine on {task.folder}", soft_wrap=True, highlight=False, markup=False)
        with (
            EngineProcess(str(task.folder), _engine_options(settings, task), out / LOG_FILE) as engine,
            BridgeClient(engine.address) as client,
        ):
            engine.on_death(client.close)
            console.print(f"engine {engine.pid} serves at {engine.address}", highlight=False)
            try:
                run = _train(settings, task, client, out / STEPS_FILE, console)
            except BridgeError:
                engine.raise_if_dead()
                raise
    write_run_report(report, run)
    console.print(_figures_table(run))
    console.print(Text(headline(run), style="bold"))
    console.print(f"steps: {out / STEPS_FILE}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"report: {report}", soft_wrap=True, highlight=False, markup=False)


def _make_task(settings: DemoSettings, console: Console) -> DemoTask:
    num_prompts = int(settings.target_groups * (settings.steps + settings.over_provision + 1))
    if settings.task != demo_task.EUCLID:
        return demo_task.smollm2(settings.task, num_prompts, settings.num_evaluated, settings.seed, console)
    with _warm_up_shown(console) as show:
        return demo_task.euclid(num_prompts, settings.num_evaluated, settings.seed, settings.warm_up_updates, show)


@contextlib.contextmanager
def _warm_up_shown(console: Console) -> Iterator[WarmUpProgress]:
    """A bar on a terminal, lines elsewhere; nothing when nothing is done."""
    if not console.is_terminal:

        def show_line(update: int, of: int, loss: float) -> None:
            if update % _LINE_UPDATES == 0 or update == of:
                console.print(f"training the base model: update {update} of {of}, loss {loss:.3f}", highlight=False)

        yield show_line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        bar = bars.add_task("", total=1.0, visible=False)

        def show_bar(update: int, of: int, loss: float) -> None:
            bars.update(bar, description="training the base model", total=of, completed=update, visible=True)

        yield show_bar


def _engine_options(settings: DemoSettings, task: DemoTask) -> list[str]:
    in_flight = int(settings.target_groups * settings.group_size * settings.over_provision)
    options = {
        "max-num-seqs": max(in_flight, settings.num_evaluated), "max-model-len": task.max_model_len,
        "kv-cache-gib": 1, "engine-seed": settings.seed,
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _train(
    settings: DemoSettings, task: DemoTask, client: BridgeClient, steps_file: Path, console: Console
) -> RunRecord:
    from longtail.trainer_bridge.grpo_config import GrpoConfig, TrainerConfig
    from longtail.trainer_bridge.grpo_trainer import GrpoTrainer

    trainer = GrpoTrainer(
        task.load(task.folder),
        GrpoConfig(sampling=task.sampling),
        TrainerConfig(
            learning_rate=settings.learning_rate or task.learning_rate, warmup_updates=6, max_grad_norm=0.2,
            micro_batch_tokens=8192, seed=settings.seed,
        ),
    )  # fmt: skip
    config = LoopConfig(
        group_size=settings.group_size, target_groups=settings.target_groups, over_provision=settings.over_provision,
        sampling=task.sampling,
    )  # fmt: skip
    loop = TrainingLoop(client, trainer, task.prompts, task.reward, config)
    steps: list[StepRecord] = []
    evaluations: list[Evaluation] = []
    encode = msgspec.json.encode
    with steps_file.open("wb") as file, DemoDisplay(console, settings.steps) as display:

        def evaluate() -> None:
            display.on_phase("evaluate")
            evaluations.append(loop.evaluate(task.held_out))
            display.on_evaluation(evaluations[-1])

        evaluate()
        for number in range(1, settings.steps + 1):
            steps.append(loop.step(display.on_trajectory, display.on_phase))
            file.write(encode(steps[-1]) + b"\n")
            file.flush()
            display.on_step(steps[-1])
            if number % settings.evaluate_every == 0 or number == settings.steps:
                evaluate()
    return RunRecord(
        title=f"longtail train-demo: {task.name}",
        steps=steps,
        evaluations=evaluations,
        samples=_samples(task, evaluations[0], evaluations[-1]),
        settings={name.replace("_", " "): str(value) for name, value in asdict(settings).items() if value is not None},
    )


def _samples(task: DemoTask, first: Evaluation, last: Evaluation) -> list[Sample]:
    """Held-out problems, those first that were learnt, and of these the longest answers that are no bother to read."""
    pairs = list(zip(first.trajectories, last.trajectories, strict=True))
    pairs.sort(
        key=lambda pair: (
            (pair[0].reward or 0.0) - (pair[1].reward or 0.0),
            -min(len(pair[1].output_token_ids), 120),
        )
    )
    return [
        Sample(
            before=task.shown(before), before_reward=before.reward or 0.0,
            after=task.shown(after), after_reward=after.reward or 0.0,
        )
        for before, after in pairs[:_NUM_SAMPLES]
    ]  # fmt: skip


def _figures_table(run: RunRecord) -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for figure in figures(run):
        table.add_row(Text(figure.words), Text(figure.shown))
    return table
