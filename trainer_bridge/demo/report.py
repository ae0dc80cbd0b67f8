"""The web page of a training run: what was learnt, and what it cost, over the steps.

It is a page like those of rounds (`engine.cli.report`): it loads and runs nothing, every figure is a table cell with
`data-key` and `data-value`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean, median

from longtail.engine.cli.report import card, render_page, settings_card, tiles_row, write_page
from longtail.trainer_bridge.demo.charts import Bars, Line, bar_chart, legend, line_chart
from longtail.trainer_bridge.demo.loop import Evaluation, StepRecord

_MAX_AGE = 4
_MAX_CHARS = 1200
_COLUMNS = (
    "step", "reward", "held out", "length", "longest", "staleness", "tokens/s", "idle", "rollout", "train", "update",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with its answers before and after training, and what they earned."""

    before: str
    before_reward: float
    after: str
    after_reward: float


@dataclass(frozen=True)
class RunRecord:
    """What there is to report."""

    title: str
    steps: Sequence[StepRecord]
    evaluations: Sequence[Evaluation]
    samples: Sequence[Sample]
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Figure:
    """A number of the whole run: for programs, and for people."""

    key: str
    words: str
    value: float
    shown: str


def figures(run: RunRecord) -> list[Figure]:
    """The plain numbers of a run of at least one step and one evaluation."""
    steps, first, last = run.steps, run.evaluations[0], run.evaluations[-1]
    seconds = sum(step.seconds for step in steps)
    tokens = sum(step.num_tokens for step in steps)
    rollout_s, train_s = sum(step.rollout_s for step in steps), sum(step.train_s for step in steps)
    updates = sorted(step.update_s for step in steps)
    stale = fmean(step.mean_staleness for step in steps)
    off_policy = fmean(1 - step.staleness.get(0, 0.0) for step in steps)

    def share(part: float) -> str:
        return f"{part / seconds:.0%}"

    return [
        Figure("first_reward", "held-out reward before", first.reward, f"{first.reward:.3f}"),
        Figure("last_reward", "held-out reward after", last.reward, f"{last.reward:.3f}"),
        Figure("num_steps", "optimiser steps", len(steps), f"{len(steps)}"),
        Figure("seconds", "seconds of steps, evaluations not counted", seconds, f"{seconds:.1f}"),
        Figure("rollout_share", "of it rolling out", rollout_s / seconds, share(rollout_s)),
        Figure("train_share", "… training", train_s / seconds, share(train_s)),
        Figure("update_share", "… pushing weights", sum(updates) / seconds, share(sum(updates))),
        Figure("num_tokens", "tokens generated", tokens, f"{tokens:,}"),
        Figure("tokens_per_s", "tokens a second while rolling out", tokens / rollout_s, f"{tokens / rollout_s:,.0f}"),
        Figure("update_s", "median time of a weight update", median(updates), f"{median(updates) * 1e3:.0f} ms"),
        Figure("pause_s", "… of it, the engine stood still", median(s.pause_s for s in steps),
               f"{median(s.pause_s for s in steps) * 1e3:.0f} ms"),
        Figure("idle_share", "idle share of the batch", i := fmean(s.idle_share for s in steps), f"{i:.0%}"),
        Figure("mean_staleness", "age of a trained token in versions", stale, f"{stale:.2f}"),
        Figure("off_policy_share", "tokens of older weights", off_policy, f"{off_policy:.0%}"),
    ]  # fmt: skip


def write_run_report(path: str | os.PathLike[str], run: RunRecord) -> None:
    """Write the page to `path`, in one step."""
    write_page(path, render_run(run))


def render_run(run: RunRecord) -> str:
    """The page as a string."""
    if not run.steps or not run.evaluations:
        return render_page(run.title, ['<p class="lead">There was no step to report on.</p>'])
    body = [
        f'<p class="lead">{escape(headline(run))}</p>',
        _tiles(run),
        _reward_card(run),
        _length_card(run),
        _staleness_card(run),
        _time_card(run),
        _speed_card(run),
        _samples_card(run.samples),
        _figures_card(run),
        _steps_card(run),
        settings_card(run.settings),
    ]
    return render_page(run.title, body)


def headline(run: RunRecord) -> str:
    """What happened, in sentences for a newcomer."""
    first, last, seconds = run.evaluations[0], run.evaluations[-1], sum(step.seconds for step in run.steps)
    return (
        f"In {len(run.steps)} steps and {seconds:.0f} seconds the held-out reward went from {first.reward:.3f} to "
        f"{last.reward:.3f}. The engine generated {sum(step.num_tokens for step in run.steps):,} tokens; engine and "
        "trainer were two processes, which spoke over the bridge."
    )


def _tiles(run: RunRecord) -> str:
    found = {figure.key: figure for figure in figures(run)}
    return tiles_row(
        [
            (f"{found['first_reward'].shown} → {found['last_reward'].shown}", "held-out reward before and after"),
            (found["tokens_per_s"].shown, "tokens a second while rolling out"),
            (found["update_s"].shown, f"for a weight update; the engine stood still for {found['pause_s'].shown}"),
            (found["idle_share"].shown, f"of the batch idle; {found['off_policy_share'].shown} of the tokens stale"),
        ]
    )


def _reward_card(run: RunRecord) -> str:
    lines = [
        Line("training reward", "curve-b", [(step.step, step.reward) for step in run.steps]),
        Line("held-out reward", "curve-a", [(e.step, e.reward) for e in run.evaluations], has_dots=True),
    ]
    caption = (
        "Mean reward of a step's trajectories, and of answers to problems that are never trained on. Rounds that carry "
        "over return short answers first, which are right more often: the held-out curve is the one to trust."
    )
    picture = line_chart(lines, "Reward over the steps", "{:.2f}".format, high=1.0)
    return card("Reward", caption, legend([(line.words, line.kind) for line in lines[::-1]]), picture)


def _length_card(run: RunRecord) -> str:
    lines = [
        Line("longest", "curve-b", [(step.step, float(step.max_length)) for step in run.steps]),
        Line("mean", "curve-a", [(step.step, step.mean_length) for step in run.steps]),
    ]
    caption = (
        "Output tokens of the trajectories that a step trained on. The longest is many times the mean: a round that "
        "waits for it has a nearly empty batch most of the time."
    )
    picture = line_chart(lines, "Response length over the steps", "{:,.0f}".format)
    return card("Response length", caption, legend([(line.words, line.kind) for line in lines[::-1]]), picture)


def _staleness_card(run: RunRecord) -> str:
    kinds = [(f"{age} version{'s' * (age != 1)}" + (" or more" * (age == _MAX_AGE)), f"age-{age}") for age in range(5)]
    heights = [
        [
            sum(part for age, part in step.staleness.items() if min(age, _MAX_AGE) == layer)
            for layer in range(_MAX_AGE + 1)
        ]
        for step in run.steps
    ]
    caption = (
        "Share of the trained tokens by age: how many weight versions lie between the weights that sampled a token and "
        "those that are trained on it. The trainer weighs each token by the ratio of the two policies, cut off at 2."
    )
    bars = Bars(kinds, [step.step for step in run.steps], heights)
    return card("Staleness", caption, legend(kinds), bar_chart(bars, "Staleness over the steps", "{:.0%}".format, 1.0))


def _time_card(run: RunRecord) -> str:
    kinds = [("rolling out", "kept"), ("training", "cut"), ("pushing weights", "failed")]
    bars = Bars(
        kinds, [step.step for step in run.steps], [(step.rollout_s, step.train_s, step.update_s) for step in run.steps]
    )
    caption = "Seconds of each step. A push of weights ends when the engine samples from them."
    picture = bar_chart(bars, "Seconds of the steps", "{:.3g} s".format)
    return card("Where the time goes", caption, legend(kinds), picture)


def _speed_card(run: RunRecord) -> str:
    speed = line_chart(
        [Line("tokens a second", "curve-a", [(step.step, step.tokens_per_s) for step in run.steps])],
        "Tokens a second over the steps",
        "{:,.0f}".format,
    )
    idle = line_chart(
        [Line("idle share", "curve-b", [(step.step, step.idle_share) for step in run.steps])],
        "Idle share of the batch over the steps",
        "{:.0%}".format,
        high=1.0,
    )
    keys = legend([("tokens generated a second (above)", "curve-a"), ("idle share of the batch (below)", "curve-b")])
    caption = "While rolling out. A slot of the batch is idle in a step when fewer trajectories run than at the peak."
    return card("Speed of generation", caption, keys, speed + idle)


def _samples_card(samples: Sequence[Sample]) -> str:
    def answer(when: str, words: str, reward: float) -> str:
        return f"<dl><dt>{when}</dt><dd>reward {reward:g}</dd></dl><pre>{escape(_clipped(words))}</pre>"

    parts = [
        '<div class="sample">'
        + answer("before", sample.before, sample.before_reward)
        + answer("after", sample.after, sample.after_reward)
        + "</div>"
        for sample in samples
    ]
    return f'<div class="card long"><h3>Held-out problems</h3>{"".join(parts)}</div>' if parts else ""


def _clipped(words: str) -> str:
    return words if len(words) <= _MAX_CHARS else f"{words[:_MAX_CHARS]} […{len(words) - _MAX_CHARS:,} characters more]"


def _figures_card(run: RunRecord) -> str:
    rows = "".join(
        f'<tr><td>{escape(f.words)}</td><td data-key="{f.key}" data-value="{f.value}">{escape(f.shown)}</td></tr>'
        for f in figures(run)
    )
    return f'<div class="card long"><h3>The figures</h3><div class="columns"><table>{rows}</table></div></div>'


def _steps_card(run: RunRecord) -> str:
    held_out = {evaluation.step: f"{evaluation.reward:.3f}" for evaluation in run.evaluations}
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{cell}</td>"
            for cell in (
                step.step, f"{step.reward:.3f}", held_out.get(step.step, ""), f"{step.mean_length:.0f}",
                step.max_length, f"{step.mean_staleness:.2f}", f"{step.tokens_per_s:,.0f}", f"{step.idle_share:.0%}",
                f"{step.rollout_s:.2f} s", f"{step.train_s:.2f} s", f"{step.update_s * 1e3:.0f} ms",
            )
        )
        + "</tr>"
        for step in run.steps
    )  # fmt: skip
    columns = "".join(f"<th>{word}</th>" for word in _COLUMNS)
    return (
        '<div class="card long"><h3>All steps</h3><div class="scroll"><table class="rounds">'
        f"<thead><tr>{columns}</tr></thead>{rows}</table></div></div>"
    )
