"""One self-contained HTML page about one round or several: what it collected, and its two pictures.

The page loads nothing and runs nothing: style and SVG are inline, there is no script, and its content
security policy forbids both even if a string of a model got past the escaping. Every figure is a table cell
with `data-key` and `data-value`, so that a program can read the page as well. The page shows; it does not
judge rewards, and it does not keep the trajectories (the JSONL file does).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from longtail.engine.cli.report_figures import figures_card, rounds_table, shown_number
from longtail.engine.cli.report_histogram import histogram_svg
from longtail.engine.cli.report_samples import samples_card
from longtail.engine.cli.report_timeline import Timeline, timeline_svg
from longtail.engine.cli.report_tree import MAX_TREES, tree_caption, tree_svg, trees_of
from longtail.engine.cli.round_summary import Outcome, RoundSummary, counted
from longtail.engine.trajectory import Group, Round

_TEMPLATE = "report_template.html"

_OUTCOME_WORDS: dict[Outcome, str] = {
    "kept": "ended by itself, its group is complete",
    "unused": "ended by itself, its group is not complete",
    "cut": "cut",
    "failed": "failed or aborted",
}


def write_report(
    path: str | os.PathLike[str], round: Round | Sequence[Round], *, title: str, settings: Mapping[str, str]
) -> None:
    """Write the page about `round` to `path`."""
    rounds = [round] if isinstance(round, Round) else list(round)
    write_page(path, render_report(rounds, title=title, settings=settings))


def write_page(path: str | os.PathLike[str], page: str) -> None:
    """Write a page in one step: a reader sees the old file or the whole new one."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    # A lone surrogate in a model's text has no UTF-8; as a character reference it is just one odd character.
    partial.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    os.replace(partial, target)


def render_report(rounds: Sequence[Round], *, title: str, settings: Mapping[str, str]) -> str:
    """The page as a string."""
    summaries = [RoundSummary.of(round) for round in rounds]
    body = ["" if summaries else '<p class="lead">There was no round to report on.</p>']
    if len(summaries) > 1:
        body.append(rounds_table(summaries))
    body.extend(_round_section(summary, with_heading=len(summaries) > 1) for summary in summaries)
    body.append(settings_card(settings))
    return render_page(title, body)


def render_page(title: str, body: Sequence[str]) -> str:
    """A page of these parts, which are HTML; empty ones are left out."""
    template = files("longtail.engine.cli").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body="\n".join(part for part in body if part))


def settings_card(settings: Mapping[str, str]) -> str:
    """What the run was asked for."""
    if not settings:
        return ""
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in settings.items())
    return f'<div class="card long settings"><h3>Settings</h3><table>{rows}</table></div>'


def _round_section(summary: RoundSummary, with_heading: bool) -> str:
    round = summary.round
    parts = [f'<section data-round="{escape(round.round_id)}">']
    if with_heading:
        parts.append(f"<h2>Round {escape(round.round_id)}</h2>")
    parts.append(f'<p class="lead">{escape(headline(summary))}</p>')
    parts.append(_tiles(summary))
    parts.append(_histogram_card(summary))
    parts.append(_timeline_card(summary))
    parts.append(_trees_card(round))
    parts.append(figures_card(summary))
    parts.append(samples_card(round))
    parts.append("</section>")
    return "\n".join(part for part in parts if part)


def headline(summary: RoundSummary) -> str:
    """What happened, in sentences for a newcomer."""
    round, stats = summary.round, summary.round.stats
    if not summary.num_trajectories:
        return "This round had no trajectories."
    words = [
        f"{stats.num_complete_groups:,} of {stats.num_submitted_groups:,} groups were complete after "
        f"{stats.seconds:.1f} s; the target was {round.target_groups:,}."
    ]
    num_running = summary.outcomes["cut"] - summary.num_cut_waiting
    if summary.outcomes["cut"]:
        stopped = f"{counted(num_running, 'trajectory', 'trajectories')} in the middle of an answer"
        waiting = f" and {summary.num_cut_waiting} that had not started" if summary.num_cut_waiting else ""
        words.append(f"At that moment the scheduler cut the round: it stopped {stopped}{waiting}.")
    elif stats.num_complete_groups < round.target_groups:
        words.append("The round could not reach its target.")
    else:
        words.append("No trajectory had to be cut.")
    if summary.outcomes["failed"]:
        words.append(f"{counted(summary.outcomes['failed'], 'trajectory', 'trajectories')} failed or were aborted.")
    if summary.kept_share is not None:
        words.append(f"{summary.kept_share:.0%} of the generated tokens are in complete groups and can be trained on.")
    return " ".join(words)


def _tiles(summary: RoundSummary) -> str:
    stats, lengths, idle = summary.round.stats, summary.lengths, summary.occupancy.idle_share
    median, longest = lengths.quantile(0.5), lengths.quantile(1.0)
    tiles = [
        (
            f"{stats.num_complete_groups:,}",
            f"complete groups (target {summary.round.target_groups}, submitted {stats.num_submitted_groups})",
        ),
        (
            shown_number(summary.tokens_per_s, ",.0f"),
            f"tokens a second ({stats.num_output_tokens:,} in {stats.seconds:.1f}\u00a0s)",
        ),
        ("n/a" if median is None else str(median), f"tokens in the median answer; longest {longest or 'n/a'}"),
        (shown_number(idle, ".0%"), f"of the batch idle (at most {summary.occupancy.peak} ran at once)"),
    ]
    return tiles_row(tiles)


def tiles_row(tiles: Iterable[tuple[str, str]]) -> str:
    """The main figures: each a number, and what it is."""
    cells = "".join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in tiles)
    return f'<div class="tiles">{cells}</div>'


def _histogram_card(summary: RoundSummary) -> str:
    lengths = summary.lengths
    picture = histogram_svg(summary)
    if not picture:
        return card("How long the answers are", "No trajectory started, so there are no lengths.")
    caption = ["Each bar counts the trajectories whose output had so many tokens."]
    if (share := lengths.top_share(0.9)) is not None and len(lengths.all) >= 10:
        caption.append(
            f"The right end is the long tail: the longest tenth of the trajectories holds {share:.0%} of all output "
            "tokens, and a round that waits for all of them takes as long as the longest."
        )
    keys = [("kept", "ended by itself", len(lengths.ended))]
    if lengths.stopped:
        keys.append(("cut-hatch", "stopped before its end", len(lengths.stopped)))
        caption.append(
            "A hatched trajectory was stopped before its end: it is counted at the length it had, and its "
            "own length is not known, only that it is at least that (statisticians say censored). A "
            "median or percentile that such a trajectory could still raise is marked ≥."
        )
    if summary.num_out_of_budget:
        caption.append(f"Ended because the token budget was used up: {summary.num_out_of_budget}.")
    if summary.num_never_started:
        caption.append(f"Never started, so not in this picture: {summary.num_never_started}.")
    return card("How long the answers are", " ".join(caption), _legend(keys), picture)


def _timeline_card(summary: RoundSummary) -> str:
    timeline = Timeline.of(summary.round.groups)
    picture = timeline_svg(summary, timeline)
    if not picture:
        return card("When each trajectory ran", "There are no trajectories to draw.")
    caption = [
        "Each bar is one trajectory, from its first step in the batch to its last; the members of a group lie "
        "together on one shade, complete groups on top in the order in which they were complete. A thin grey "
        "line is the wait for a place in the batch. Point at a bar for its details."
    ]
    if summary.cut_s is not None:
        caption.append(
            f"At {summary.cut_s:.1f} s {summary.why}: in that step the scheduler cut the round, and what still ran "
            "ends there."
        )
    if summary.occupancy.idle_share is not None:
        idle = summary.occupancy.idle_share
        caption.append("Below, how many trajectories ran at each moment.")
        caption.append(
            f"The hatched area is places of the batch that stood empty: {idle:.0%} of all over the round."
            if idle >= 0.005
            else "Every place of the batch was in use nearly all the time."
        )
    if len(timeline.rows) < timeline.num_trajectories:
        caption.append(
            f"To stay readable the bars are a sample of whole groups, taken evenly: {len(timeline.rows)} of "
            f"{timeline.num_trajectories:,} trajectories. The lower picture counts all."
        )
    present = [(outcome, _OUTCOME_WORDS[outcome], number) for outcome, number in summary.outcomes.items() if number]
    return card("When each trajectory ran", " ".join(caption), _legend(present), picture)


def _trees_card(round: Round) -> str:
    """The trees of a round, the first one open and the others to be opened."""
    trees = trees_of(round.groups)
    if not trees:
        return ""
    caption = (
        "Each row is a trajectory and its bar the tokens of its own; a line leads to them from the trajectory that it "
        "left, whose tokens before that are its too. A bar is red for the group's lowest reward and blue for its "
        "highest, or, where all have the same or none, blue if it can be trained on. Point at a bar for its details."
    )
    parts = [
        f'<details class="tree" data-group="{escape(group.group_id)}"{"" if place else " open"}>'
        f"<summary>Group {escape(group.group_id)}: {_num(group)}</summary>"
        f'<p class="soft">{escape(tree_caption(group))}</p><div class="scroll">{tree_svg(group)}</div></details>'
        for place, group in enumerate(trees[:MAX_TREES])
    ]
    left_out = len(trees) - MAX_TREES
    more = f'<p class="soft">{left_out:,} further groups have branches.</p>' if left_out > 0 else ""
    return (
        f'<figure class="card long"><h3>Trees</h3><figcaption>{escape(caption)}</figcaption>'
        f"{''.join(parts)}{more}</figure>"
    )


def _num(group: Group) -> str:
    return counted(len(group.trajectories), "trajectory", "trajectories")


def _legend(keys: Iterable[tuple[str, str, int]]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 22 12" aria-hidden="true"><rect class="{kind}" x="0.5" y="0.5" width="21" height="11"/>'
        f"</svg>{escape(words)} ({number:,})</li>"
        for kind, words, number in keys
    )
    return f'<ul class="legend">{items}</ul>'


def card(heading: str, caption: str, *parts: str) -> str:
    """A picture with its heading and caption; `parts` are the legend and the picture, both HTML, or nothing."""
    keys, picture = parts if parts else ("", "")
    body = f'{keys}<div class="scroll">{picture}</div>' if picture else ""
    return f'<figure class="card"><h3>{escape(heading)}</h3><figcaption>{escape(caption)}</figcaption>{body}</figure>'
