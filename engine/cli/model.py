"""`longtail model`, and the same step in front of a rollout or a server: a model's folder, built if it is smollm2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from longtail.engine.errors import InvalidInputError
from longtail.engine.models import SMOLLM2, build_smollm2, resolve_model
from longtail.engine.models import Progress as BuildProgress


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
    with _shown(console) as show:
        return build_smollm2(dtype, show, verify=verify, rebuild=rebuild)


@contextmanager
def _shown(console: Console) -> Iterator[BuildProgress]:
    """A bar on a terminal, a line for each stage elsewhere; nothing when nothing is done."""
    if not console.is_terminal:
        stages: list[str] = []

        def show_line(what: str, done: float) -> None:
            if what not in stages:
                stages.append(what)
                console.print(f"{SMOLLM2}: {what}", highlight=False, markup=False, soft_wrap=True)

        yield show_line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        bar = bars.add_task("", total=1.0, visible=False)

        def show_bar(what: str, done: float) -> None:
            bars.update(bar, description=f"{SMOLLM2}: {what}", completed=done, visible=True)

        yield show_bar
