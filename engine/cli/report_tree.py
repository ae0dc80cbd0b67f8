"""The tree of a group, as one `<svg>` element: which trajectory left which one, where, and what became of it.

A row is a trajectory, and its bar the tokens that are its own; a line leads to them from the row of the trajectory that
it left. What left a trajectory later lies nearer to it, so that no line crosses a bar.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from html import escape
from statistics import fmean

from longtail.engine.cli.report_svg import LEFT, RIGHT, WIDTH, Axis, rect, svg, text, x_ticks
from longtail.engine.cli.rewards import REWARD
from longtail.engine.cli.round_summary import end_words, outcome_of
from longtail.engine.trajectory import Group, Trajectory

#: Rows of one picture, and pictures of one round.
MAX_ROWS = 128
MAX_TREES = 24
_ROW_PX = 17.0
_LABEL_PX = 150
_NUM_SHADES = 5


def trees_of(groups: list[Group]) -> list[Group]:
    """Groups that have branches, those with the most first."""
    branched = [group for group in groups if _num_branches(group)]
    return sorted(branched, key=_num_branches, reverse=True)


def _num_branches(group: Group) -> int:
    return sum(one.branch is not None for one in group.trajectories)


def reward_of(trajectory: Trajectory) -> float | None:
    """A trajectory's reward, from a hook or from a task's verifier, if it has one that is a finite number."""
    value = trajectory.metadata.get(REWARD) if trajectory.reward is None else trajectory.reward
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def tree_caption(group: Group) -> str:
    """What the picture of a group shows, in sentences."""
    own = sum(one.num_own_tokens for one in group.trajectories)
    whole = sum(len(one.output_token_ids) for one in group.trajectories)
    branches = [one.branch for one in group.trajectories if one.branch is not None]
    fallbacks = sum(branch.reason == "fallback" for branch in branches)
    words = [
        f"{len(group.trajectories)} trajectories, {len(branches)} of them branches; they have {whole:,} tokens, of "
        f"which {own:,} were sampled: {1 - own / max(1, whole):.0%} are shared."
    ]
    if fallbacks:
        words.append(f"{fallbacks} began inside of a trajectory that had ended (dashed).")
    if group.num_dismissed:
        words.append(f"{group.num_dismissed} never began, because the tree had no branch for them.")
    if rewards := [reward for one in group.trajectories if (reward := reward_of(one)) is not None]:
        words.append(f"Rewards from {min(rewards):.2f} to {max(rewards):.2f}, mean {fmean(rewards):.2f}.")
    if len(group.trajectories) > MAX_ROWS:
        words.append(f"The picture has the first {MAX_ROWS} trajectories.")
    return " ".join(words)


def tree_svg(group: Group) -> str:
    """The picture; see the module."""
    rows = list(_in_order(group))[:MAX_ROWS]
    row_of = {one.index: row for row, one in enumerate(rows)}
    top = 12.0
    bottom = top + _ROW_PX * len(rows)
    longest = max((len(one.output_token_ids) for one in rows), default=0)
    x = Axis(max(1.0, float(longest)), LEFT, WIDTH - RIGHT - _LABEL_PX)
    parts = [x_ticks(x, bottom, x.ticks(8, whole=True), top=top)]
    parts += [_link(one, row, row_of, x, top) for row, one in enumerate(rows)]
    parts += [_bar(group, one, row, x, top) for row, one in enumerate(rows)]
    parts.append(text((x.start_px + x.end_px) / 2, bottom + 34, "output tokens", "", "middle"))
    return svg(bottom + 42, f"Tree of group {group.group_id}", parts)


def _in_order(group: Group) -> Iterator[Trajectory]:
    """Trajectories, each before its branches."""
    children: defaultdict[int | None, list[Trajectory]] = defaultdict(list)
    known = {one.index for one in group.trajectories}
    for one in group.trajectories:
        children[one.branch.of if one.branch is not None and one.branch.of in known else None].append(one)
    for own in children.values():
        own.sort(key=lambda one: (-_start(one), one.index))
    stack = children[None][::-1]
    while stack:
        one = stack.pop()
        yield one
        stack += reversed(children[one.index])


def _start(trajectory: Trajectory) -> int:
    return 0 if trajectory.branch is None else trajectory.branch.at


def _link(one: Trajectory, row: int, row_of: dict[int, int], x: Axis, top: float) -> str:
    if one.branch is None or one.branch.of not in row_of:
        return ""
    x_px = x(one.branch.at)
    y1 = top + (row_of[one.branch.of] + 0.5) * _ROW_PX
    y2 = top + (row + 0.5) * _ROW_PX
    kind = "link fallback" if one.branch.reason == "fallback" else "link"
    return f'<path class="{kind}" d="M{x_px:.1f} {y1:.1f}V{y2:.1f}"/>'


def _bar(group: Group, one: Trajectory, row: int, x: Axis, top: float) -> str:
    start, end, y = _start(one), len(one.output_token_ids), top + row * _ROW_PX
    reward = reward_of(one)
    lines = [one.trajectory_id, f"{end:,} tokens, {one.num_own_tokens:,} of its own, {end_words(one)}"]
    if (branch := one.branch) is not None:
        chance = "" if branch.probability is None else f", probability {branch.probability:.3g}"
        lines.append(f"left member {branch.of} after {branch.at:,} tokens ({branch.reason}{chance})")
    if reward is not None:
        lines.append(f"reward {reward:.3f}")
    words = end_words(one) if reward is None else f"{reward:.2f}, {end_words(one)}"
    words = words if len(words) <= 22 else words[:21] + "…"
    width = max(2.0, x(end) - x(start))
    shapes = [
        text(LEFT - 8, y + _ROW_PX * 0.72, str(one.index), "", "end"),
        rect(_shade(group, one), x(start), y + _ROW_PX * 0.18, width, _ROW_PX * 0.64),
        text(x(start) + width + 7, y + _ROW_PX * 0.72, words, ""),
    ]
    return f'<g class="row">{"".join(shapes)}<title>{escape(chr(10).join(lines))}</title></g>'


def _shade(group: Group, one: Trajectory) -> str:
    """Class of a bar: its reward's place between the group's lowest and highest, or what became of it."""
    rewards = [reward for other in group.trajectories if (reward := reward_of(other)) is not None]
    reward = reward_of(one)
    if reward is None or len(set(rewards)) < 2:
        return outcome_of(one, group)
    share = (reward - min(rewards)) / (max(rewards) - min(rewards))
    return f"reward-{min(_NUM_SHADES - 1, int(share * _NUM_SHADES))}"
