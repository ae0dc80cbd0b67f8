"""`longtail model`, and the same step in front of a rollout or a server: a model's folder, built if it is smollm2."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from longtail.engine.errors import InvalidInputError
from longtail.engine.models import SMOLLM2, build_smollm2, resolve_model


def make_ready(
    name: str,
    dtype: Literal["float32", "bfloat16"],
    console: Console,
    *,
    verify: bool = False,
    rebuild: bool = False,
) -> Path:
    """The checkpoint folder of a model; `console` shows what a build does and how far it is.

    Raises:
        InvalidInputError: only smollm2 can be verified or rebuilt.
        ModelSourceError: the model is not there, or can't be built.

    """
    if name != SMOLLM2:
        for option, value in (("verify", verify), ("rebuild", rebuild)):
            if value:
                raise InvalidInputError(option, f"not with a folder, only with {SMOLLM2}", name)
        return resolve_model(name, dtype)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar: list[object] = []
        shown = ""

        def show(what: str, done: float) -> None:
            nonlocal shown
            if not bar:
                bar.append(bars.add_task("", total=1.0))
            bars.update(bars.task_ids[0], description=what, completed=done)
            if what != shown and not console.is_terminal:
                console.print(f"{SMOLLM2}: {what}", highlight=False)
            shown = what

        return build_smollm2(dtype, show, verify=verify, rebuild=rebuild)
