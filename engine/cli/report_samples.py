"""Two or three trajectories of a round as readable text: the part of a report that shows what was written.

Long texts and metadata are clipped in the middle, and say so. Everything is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from longtail.engine.cli.round_summary import end_words, has_started
from longtail.engine.trajectory import Group, Round, Trajectory

_HEAD_CHARS, _TAIL_CHARS = 900, 400
_VALUE_CHARS = 400
_MAX_METADATA = 8
_MAX_TOKEN_IDS = 120


def pick_samples(round: Round) -> list[tuple[str, Group, Trajectory]]:
    """A typical answer, the longest kept one, and the cut one that had come furthest; as many as there are."""
    members = [(group, t) for group in round.groups for t in group.trajectories]
    ended = sorted(((g, t) for g, t in members if t.ended_by_itself), key=_by_length)
    kept = [(g, t) for g, t in ended if g.complete] or ended
    cut = sorted(((g, t) for g, t in members if not t.ended_by_itself and has_started(t)), key=_by_length)
    samples = []
    if kept:
        samples.append(("A typical answer", *kept[(len(kept) - 1) // 2]))
    if len(kept) > 1:
        samples.append(("The longest answer", *kept[-1]))
    if cut:
        samples.append(("The longest that was stopped", *cut[-1]))
    return samples


def _by_length(member: tuple[Group, Trajectory]) -> int:
    return len(member[1].output_token_ids)


def samples_card(round: Round) -> str:
    """The samples of `pick_samples`, or nothing when there is none."""
    samples = "".join(_sample(*sample) for sample in pick_samples(round))
    return f'<div class="card long"><h3>Samples</h3>{samples}</div>' if samples else ""


def _sample(heading: str, group: Group, trajectory: Trajectory) -> str:
    ids = trajectory.output_token_ids
    fate = "complete" if group.complete else "not complete"
    metadata = list(_facts({**group.metadata, **trajectory.metadata}))
    facts = [
        ("trajectory", f"{trajectory.trajectory_id}, group {group.group_id} ({fate})"),
        ("length", f"{len(ids):,} tokens, ended by {end_words(trajectory)}"),
        *((str(key), _clip(str(value), _VALUE_CHARS, 0)) for key, value in metadata[:_MAX_METADATA]),
    ]
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts)
    if trajectory.text is not None:
        text = escape(_clip(trajectory.text, _HEAD_CHARS, _TAIL_CHARS))
    else:
        more = f" … and {len(ids) - _MAX_TOKEN_IDS:,} more" if len(ids) > _MAX_TOKEN_IDS else ""
        text = f'<span class="gap">no text; token ids:</span> {" ".join(map(str, ids[:_MAX_TOKEN_IDS]))}{more}'
    return f'<div class="sample"><b>{escape(heading)}</b><dl>{rows}</dl><pre>{text}</pre></div>'


def _facts(metadata: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The metadata, of nested objects the strings and numbers only: a task keeps its whole entry there."""
    for key, value in metadata.items():
        if isinstance(value, Mapping):
            yield from (
                (f"{key}.{name}", inner) for name, inner in value.items() if isinstance(inner, (str, int, float))
            )
        else:
            yield key, value


def _clip(text: str, head: int, tail: int) -> str:
    left_out = len(text) - head - tail
    if left_out <= 40:
        return text
    end = text[-tail:] if tail else ""
    return f"{text[:head]} […{left_out:,} characters left out…] {end}"
