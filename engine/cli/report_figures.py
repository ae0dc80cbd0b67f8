"""The figures of a report, and the tables that show them.

Each figure has a key, and its cell carries `data-key` and `data-value` (empty when there is none), so that a program
can read the page too.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from longtail.engine.cli.round_summary import RoundSummary

#: A row of a table of figures: key, words, value for programs, value for people.
Figure = tuple[str, str, float | int | None, str]


def figures(summary: RoundSummary) -> dict[str, list[Figure]]:
    """All figures of the page, by heading."""
    stats, lengths = summary.round.stats, summary.lengths
    num_waiting = summary.num_cut_waiting
    counts = summary.outcomes
    quantiles: list[Figure] = []
    for key, words, q in (
        ("median", "median", 0.5),
        ("p90", "90th percentile", 0.9),
        ("p99", "99th percentile", 0.99),
        ("max", "longest", 1.0),
    ):
        quantile = lengths.quantile(q)
        value = None if quantile is None else quantile.value
        quantiles.append((f"length_{key}", words, value, "n/a" if quantile is None else str(quantile)))
    return {
        "Groups": [
            _whole("num_submitted_groups", "submitted", stats.num_submitted_groups),
            _whole("target_groups", "target", summary.round.target_groups),
            _whole("num_complete_groups", "complete", stats.num_complete_groups),
            _whole("num_cut_groups", "cut when the target was reached", stats.num_cut_groups),
            _whole("num_failed_groups", "failed or aborted", stats.num_failed_groups),
        ],
        "Trajectories": [
            _whole("num_trajectories", "submitted", summary.num_trajectories),
            _whole("num_kept", "ended by themselves, group complete", counts["kept"]),
            _whole("num_unused", "ended by themselves, group not complete", counts["unused"]),
            _whole("num_out_of_budget", "… of both: token budget used up", summary.num_out_of_budget),
            _whole("num_cut_running", "cut while they ran", counts["cut"] - num_waiting),
            _whole("num_cut_waiting", "cut before they started", num_waiting),
            _whole("num_failed", "failed or aborted", counts["failed"]),
        ],
        "Output length in tokens": [
            *quantiles,
            ("top_tenth_share", "share of the longest tenth", top := lengths.top_share(0.9), shown_number(top, ".1%")),
        ],
        "Tokens": [
            _whole("num_output_tokens", "generated", stats.num_output_tokens),
            _whole("num_kept_tokens", "kept: in complete groups", stats.num_kept_tokens),
            _whole("num_dropped_tokens", "thrown away: in other groups", summary.num_dropped_tokens),
            _whole("num_scheduled_tokens", "through the model, prompts included", stats.num_scheduled_tokens),
            _whole("num_recomputed_tokens", "… of these computed a second time", stats.num_recomputed_tokens),
        ],
        "Speed": [
            ("seconds", "seconds", stats.seconds, f"{stats.seconds:.2f}"),
            (
                "tokens_per_s",
                "tokens generated a second",
                summary.tokens_per_s,
                shown_number(summary.tokens_per_s, ",.1f"),
            ),
            (
                "kept_tokens_per_s",
                "tokens kept a second",
                summary.kept_tokens_per_s,
                shown_number(summary.kept_tokens_per_s, ",.1f"),
            ),
            _whole("num_steps", "engine steps", stats.num_steps),
        ],
        "Batch": [
            _whole("peak_running", "most trajectories at once", stats.peak_running),
            (
                "idle_share",
                "idle share of the batch, by time",
                summary.occupancy.idle_share,
                shown_number(summary.occupancy.idle_share, ".1%"),
            ),
            (
                "idle_step_share",
                "idle share of the batch, by engine steps",
                summary.idle_step_share,
                shown_number(summary.idle_step_share, ".1%"),
            ),
        ],
    }


def figures_card(summary: RoundSummary) -> str:
    """All figures of one round as tables."""
    tables = []
    for heading, rows in figures(summary).items():
        cells = "".join(
            f'<tr><td>{escape(words)}</td><td data-key="{key}" data-value="{"" if value is None else value}">'
            f"{escape(shown)}</td></tr>"
            for key, words, value, shown in rows
        )
        tables.append(f'<table><thead><tr><th colspan="2">{escape(heading)}</th></tr></thead>{cells}</table>')
    return f'<div class="card long"><h3>The figures</h3><div class="columns">{"".join(tables)}</div></div>'


def rounds_table(summaries: Sequence[RoundSummary]) -> str:
    """The main figures, one line a round."""
    columns = {
        "complete": "num_complete_groups",
        "cut": "num_cut_groups",
        "median": "length_median",
        "longest": "length_max",
        "kept tokens": "num_kept_tokens",
        "thrown away": "num_dropped_tokens",
        "seconds": "seconds",
        "tokens/s": "tokens_per_s",
        "idle": "idle_share",
    }
    rows = []
    for summary in summaries:
        shown = {key: text for group in figures(summary).values() for key, _, _, text in group}
        cells = "".join(f"<td>{escape(shown[key])}</td>" for key in columns.values())
        rows.append(f"<tr><td>{escape(summary.round.round_id)}</td>{cells}</tr>")
    head = "".join(f"<th>{head}</th>" for head in ("round", *columns))
    return (
        f'<div class="card long"><h3>{len(summaries)} rounds</h3><div class="scroll"><table class="rounds">'
        f"<thead><tr>{head}</tr></thead>{''.join(rows)}</table></div></div>"
    )


def _whole(key: str, words: str, value: int) -> Figure:
    return key, words, value, f"{value:,}"


def shown_number(value: float | None, form: str) -> str:
    """`value` in the format `form`, or `n/a`."""
    return "n/a" if value is None else format(value, form)
