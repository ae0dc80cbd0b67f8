"""The figures of a report against a round that is small enough to count by hand, and what a page must never do."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from longtail.engine.cli.report import render_report, write_report
from longtail.engine.cli.report_histogram import histogram_svg
from longtail.engine.cli.report_samples import pick_samples
from longtail.engine.cli.report_svg import nice_step
from longtail.engine.cli.report_timeline import MAX_BARS, Timeline, timeline_svg
from longtail.engine.cli.report_tree import tree_svg
from longtail.engine.cli.round_summary import Lengths, Occupancy, RoundSummary
from longtail.engine.trajectory import (
    CUT_STOP_REASON,
    Branch,
    FinishReason,
    Group,
    Round,
    RoundStats,
    Timings,
    TokenCounts,
    Trajectory,
    VersionSpan,
)

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&</pre></title></svg><!--"


def member(
    name: str,
    num_tokens: int,
    start_s: float | None,
    end_s: float | None,
    finish_reason: FinishReason = "stop",
    *,
    text: str | None = "words",
    metadata: dict[str, Any] | None = None,
) -> Trajectory:
    group_id, index = name[:-1], int(name[-1])
    return Trajectory(
        trajectory_id=f"r/{group_id}/{index}",
        round_id="r",
        group_id=group_id,
        index=index,
        prompt_token_ids=[1, 2],
        output_token_ids=[7] * num_tokens,
        logprobs=[-0.5] * num_tokens,
        source_mask=[1] * num_tokens,
        weight_versions=[VersionSpan("0", 0, num_tokens)] if num_tokens else [],
        finish_reason=finish_reason,
        stop_reason=CUT_STOP_REASON if finish_reason == "abort" else None,
        text=text,
        timings=Timings(submitted_s=0.0, scheduled_s=start_s, first_token_s=start_s, finished_s=end_s),
        tokens=TokenCounts(scheduled=num_tokens + 2),
        metadata=metadata or {},
    )


def group(*members: Trajectory) -> Group:
    ended = all(t.finish_reason in ("stop", "length", "repetition") for t in members)
    return Group(group_id=members[0].group_id, trajectories=list(members), complete=ended)


def round_of(groups: list[Group], *, target: int = 2, seconds: float = 8.0, round_id: str = "r") -> Round:
    cut = [g for g in groups if any(t.was_cut for t in g.trajectories)]
    num_complete = sum(g.complete for g in groups)
    tokens = [(g, len(t.output_token_ids)) for g in groups for t in g.trajectories]
    return Round(
        round_id=round_id,
        target_groups=target,
        groups=groups,
        stats=RoundStats(
            num_submitted_groups=len(groups),
            num_complete_groups=num_complete,
            num_cut_groups=len(cut),
            num_failed_groups=len(groups) - num_complete - len(cut),
            num_cut_members=sum(t.was_cut for g in groups for t in g.trajectories),
            num_output_tokens=sum(n for _, n in tokens),
            num_kept_tokens=sum(n for g, n in tokens if g.complete),
            num_scheduled_tokens=500,
            num_recomputed_tokens=11,
            num_steps=16,
            idle_slot_steps=14,
            peak_running=4,
            seconds=seconds,
        ),
    )


def hand_made() -> Round:
    """Eight seconds, two complete groups, a cut one, one that never started and a failed one.

    Running in each second: 3 3 3 3 3 3 3 4, so 25 of 4 x 8 places are used and 7/32 are empty.
    Output lengths, stopped ones with a star: 5* 8 10 15 20 25* 30 40.
    """
    return round_of(
        [
            group(member("a0", 10, 0.0, 2.0), member("a1", 20, 0.0, 4.0)),
            group(member("b0", 30, 0.0, 6.0), member("b1", 40, 2.0, 8.0)),
            group(member("c0", 15, 4.0, 7.0), member("c1", 25, 6.0, 8.0, "abort")),
            group(member("d0", 0, None, None, "abort"), member("d1", 0, None, 8.0, "abort")),
            group(member("e0", 5, 7.0, 8.0, "error"), member("e1", 8, 7.0, 8.0, "length")),
        ]
    )


class Page(HTMLParser):
    """What a browser's parser finds: figures, elements, event handlers, addresses and visible text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.figures: dict[str, str] = {}
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.addresses: list[str] = []
        self.sections: list[str | None] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        if "data-key" in found:
            self.figures[str(found["data-key"])] = str(found["data-value"])
        if "data-round" in found:
            self.sections.append(found["data-round"])
        self.handlers += [name for name in found if name.startswith("on")]
        self.addresses += [name for name in found if name in ("src", "href", "xlink:href", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(*rounds: Round, title: str = "A title", settings: dict[str, str] | None = None) -> Page:
    return Page(render_report(rounds, title=title, settings=settings or {}))


def bars(svg: str) -> dict[tuple[str, str], int]:
    found = re.findall(r"<title>([\d, to]+) tokens: ([\d,]+) (ended|stopped)", svg)
    return {(tokens, kind): int(number) for tokens, number, kind in found}


def rows(svg: str) -> list[tuple[str, list[str]]]:
    """`(trajectory, classes of its shapes)` of each row, top to bottom."""
    return [
        (re.search(r"<title>(.*)\n", row)[1], re.findall(r'class="([a-z ]+)"', row))  # type: ignore[index]
        for row in re.findall(r'<g class="row">(.*?)</g>', svg, re.DOTALL)
    ]


def test_every_figure_is_the_one_counted_by_hand() -> None:
    expected = {
        "num_submitted_groups": 5,
        "target_groups": 2,
        "num_complete_groups": 2,
        "num_cut_groups": 2,
        "num_failed_groups": 1,
        "num_trajectories": 10,
        "num_kept": 4,
        "num_unused": 2,
        "num_out_of_budget": 1,
        "num_cut_running": 1,
        "num_cut_waiting": 2,
        "num_failed": 1,
        "length_median": 15,
        "length_p90": 40,
        "length_p99": 40,
        "length_max": 40,
        "top_tenth_share": 40 / 153,
        "num_output_tokens": 153,
        "num_kept_tokens": 100,
        "num_dropped_tokens": 53,
        "num_scheduled_tokens": 500,
        "num_recomputed_tokens": 11,
        "seconds": 8.0,
        "tokens_per_s": 153 / 8,
        "kept_tokens_per_s": 12.5,
        "num_steps": 16,
        "peak_running": 4,
        "idle_share": 7 / 32,
        "idle_step_share": 14 / 64,
    }
    assert {key: float(value) for key, value in page_of(hand_made()).figures.items()} == pytest.approx(expected)


def test_a_changed_round_changes_its_figures() -> None:
    whole = hand_made()
    before, after = page_of(whole).figures, page_of(round_of(whole.groups[:2])).figures
    assert before != after
    assert after["idle_share"] == str(1 - 18 / 24)


def test_a_quantile_is_a_lower_bound_only_when_a_stopped_trajectory_could_raise_it() -> None:
    lengths = Lengths(ended=(10, 20, 30), stopped=(25,))
    assert str(lengths.quantile(0.5)) == "20"
    assert str(lengths.quantile(0.75)) == "≥ 25"
    assert str(lengths.quantile(1.0)) == "≥ 30"
    assert str(Lengths(ended=(10, 20, 25, 30), stopped=()).quantile(1.0)) == "30"
    assert Lengths((), ()).quantile(0.5) is None


def test_letting_the_stopped_run_on_never_lowers_a_quantile_and_moves_only_bounds() -> None:
    rng = random.Random(0)
    num_moved = 0
    for _ in range(300):
        ended = sorted(rng.randrange(1, 60) for _ in range(rng.randrange(1, 12)))
        stopped = sorted(rng.randrange(1, 60) for _ in range(rng.randrange(0, 6)))
        full = Lengths(tuple(sorted(ended + [n + rng.randrange(0, 80) for n in stopped])), ())
        for q in (0.1, 0.5, 0.9, 1.0):
            seen, true = Lengths(tuple(ended), tuple(stopped)).quantile(q), full.quantile(q)
            assert seen is not None
            assert true is not None
            assert true.value >= seen.value
            if not seen.is_lower_bound:
                assert true.value == seen.value
            num_moved += true.value != seen.value
    assert num_moved > 50  # the control: with bounds taken for lengths, these would be wrong


def test_occupancy_is_the_count_of_intervals_at_every_moment() -> None:
    rng = random.Random(1)
    for _ in range(50):
        spans = [(start := rng.random() * 10, start + rng.random() * 5) for _ in range(rng.randrange(1, 30))]
        occupancy = Occupancy.of(spans)
        moments = [rng.random() * 15 for _ in range(40)]
        for moment in moments:
            level = next((count for second, count in reversed(occupancy.steps) if second <= moment), 0)
            assert level == sum(start <= moment < end for start, end in spans)
        assert occupancy.steps[-1][1] == 0
        busy = sum(end - start for start, end in spans)
        length = max(end for _, end in spans) - min(start for start, _ in spans)
        assert occupancy.idle_share == pytest.approx(1 - busy / (occupancy.peak * length))


def test_histogram_bars_hold_every_started_trajectory_once() -> None:
    svg = histogram_svg(RoundSummary.of(hand_made()))
    assert bars(svg) == {(f"{n} to {n + 4}", "ended"): 1 for n in (5, 10, 15, 20, 30, 40)} | {
        (f"{n} to {n + 4}", "stopped"): 1 for n in (5, 25)
    }
    longer = round_of([group(*(member(f"a{i}", n, 0.0, 1.0) for i, n in enumerate((0, 49, 50, 480))))])
    assert bars(histogram_svg(RoundSummary.of(longer))) == {
        ("0 to 49", "ended"): 2,
        ("50 to 99", "ended"): 1,
        ("450 to 499", "ended"): 1,
    }


def test_timeline_has_complete_groups_first_and_a_bar_for_each_that_ran() -> None:
    summary = RoundSummary.of(hand_made())
    drawn = rows(timeline_svg(summary, Timeline.of(summary.round.groups)))
    assert drawn == [
        ("r/a/0", ["kept"]),
        ("r/a/1", ["kept"]),
        ("r/b/0", ["kept"]),
        ("r/b/1", ["queued", "kept"]),
        ("r/e/0", ["queued", "failed"]),
        ("r/e/1", ["queued", "unused"]),
        ("r/c/0", ["queued", "unused"]),
        ("r/c/1", ["queued", "cut"]),
        ("r/d/1", ["queued"]),
        ("r/d/0", ["queued"]),
    ]


def test_the_cut_line_is_there_only_when_the_round_was_cut() -> None:
    cut, whole = hand_made(), round_of(hand_made().groups[:2])
    for round, expected in ((cut, 8.0), (whole, None)):
        summary = RoundSummary.of(round)
        svg = timeline_svg(summary, Timeline.of(round.groups))
        assert summary.cut_s == expected
        assert ("cut-line" in svg) == (expected is not None)


def test_the_cut_of_waiting_members_alone_is_dated_by_the_last_complete_group() -> None:
    round = round_of(
        [group(member("a0", 3, 0.0, 2.5)), group(member("b0", 0, None, None, "abort"))], target=1, seconds=3.0
    )
    assert RoundSummary.of(round).cut_s == 2.5


def test_hostile_strings_stay_text() -> None:
    bad = member("x0", 3, 0.0, 1.0, text=HOSTILE, metadata={HOSTILE: HOSTILE, "nested": {"k": [HOSTILE]}})
    cut = member("x1", 3, 0.0, 1.0, "abort", text=HOSTILE)
    bad_group = Group(group_id=HOSTILE, trajectories=[bad, cut], complete=False, metadata={"g": HOSTILE})
    rounds = [round_of([bad_group], round_id=HOSTILE), round_of([group(bad)], round_id="second")]
    page = page_of(*rounds, title=HOSTILE, settings={HOSTILE: HOSTILE})
    plain = page_of(*rounds[1:], rounds[1])
    assert not {"script", "img", "iframe", "object", "link"} & set(page.tags)
    assert not page.handlers
    assert set(page.tags) <= set(plain.tags) | {"dl", "dt", "dd"}
    assert page.sections == [HOSTILE, "second"]
    assert page.text.count("<script>alert(1)</script>") >= 10

    unescaped = render_report(rounds, title="t", settings={}).replace("&lt;", "<").replace("&gt;", ">")
    control = Page(unescaped.replace("&quot;", '"'))
    assert "script" in control.tags
    assert control.handlers


def test_a_page_is_alone_and_runs_nothing() -> None:
    markup = render_report([hand_made()], title="t", settings={"model": "m"})
    page = Page(markup)
    assert not page.addresses
    assert "script" not in page.tags
    assert set(re.findall(r"url\((.)", markup)) == {"#"}
    assert "@import" not in markup
    assert "default-src 'none'" in markup
    assert not re.search(r"https?://", markup)


@pytest.mark.parametrize("num_groups", [0, 1, 2, 250])
def test_pictures_are_well_formed_at_any_size(num_groups: int) -> None:
    rng = random.Random(num_groups)
    groups = []
    for g in range(num_groups):
        starts = [rng.random() * 5 for _ in range(8)]
        groups.append(group(*(member(f"g{g}-{i}", rng.randrange(1, 900), s, s + 3) for i, s in enumerate(starts))))
    round = round_of(groups)
    markup = render_report([round], title="t", settings={})
    for svg in re.findall(r"<svg viewBox.*?</svg>", markup, re.DOTALL):
        numbers = [float(v) for e in ElementTree.fromstring(svg).iter() for v in map(e.get, ("x", "y", "width")) if v]
        assert all(-1 <= number <= 1200 for number in numbers)
    assert not re.search(r'="[^"]*\b(nan|inf|None)\b', markup)
    drawn = rows(markup)
    assert len(drawn) == min(8 * num_groups, MAX_BARS)
    assert ("sample of whole groups" in markup) == (8 * num_groups > MAX_BARS)
    assert Page(markup).figures["num_trajectories"] == str(8 * num_groups)


def test_thinning_keeps_whole_groups_from_first_to_last() -> None:
    groups = [group(*(member(f"g{g}-{i}", 5, 0.0, 1.0 + g) for i in range(4))) for g in range(100)]
    timeline = Timeline.of(groups, max_bars=40)
    kept = [g.group_id for g, _ in timeline.rows]
    assert len(kept) == 40
    assert all(kept.count(name) == 4 for name in kept)
    assert (kept[0], kept[-1]) == ("g0-", "g99-")
    one = Timeline.of([group(*(member(f"a{i}", 5, 0.0, 1.0) for i in range(9)))], max_bars=4)
    assert (len(one.rows), one.num_trajectories) == (4, 9)


def test_a_round_in_which_nothing_ran_is_reported() -> None:
    page = page_of(round_of([group(member("a0", 0, None, None, "abort"))], target=1, seconds=0.0))
    assert page.figures["num_cut_waiting"] == "1"
    assert page.figures["idle_share"] == ""
    assert page.figures["length_median"] == ""
    assert page.figures["tokens_per_s"] == ""
    assert "No trajectory started" in page.text


def test_no_round_at_all_is_a_page_too() -> None:
    assert "There was no round" in page_of().text


def test_every_round_has_its_section_and_its_line() -> None:
    rounds = [round_of(hand_made().groups, round_id=f"r{i}") for i in range(3)]
    page = page_of(*rounds)
    assert page.sections == ["r0", "r1", "r2"]
    assert "3 rounds" in page.text


def test_samples_are_the_typical_the_longest_and_the_longest_stopped() -> None:
    assert [t.trajectory_id for _, _, t in pick_samples(hand_made())] == ["r/a/1", "r/b/1", "r/c/1"]
    assert pick_samples(round_of([])) == []


def test_long_text_is_clipped_and_says_so() -> None:
    text = "start" + "x" * 5000 + "end"
    page = page_of(round_of([group(member("a0", 3, 0.0, 1.0, text=text))]))
    assert "start" in page.text
    assert "xend" in page.text
    assert "3,708 characters left out" in page.text


def test_a_trajectory_without_text_shows_its_token_ids() -> None:
    assert "7 7 7" in page_of(round_of([group(member("a0", 3, 0.0, 1.0, text=None))])).text


def test_writing_replaces_the_file_in_one_step_and_takes_any_text(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(
        path, round_of([group(member("a0", 3, 0.0, 1.0, text="half \ud83d pair \x00"))]), title="t", settings={}
    )
    assert "half" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]
    write_report(str(path), [hand_made(), hand_made()], title="t", settings={})
    assert "2 rounds" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("at_least", "step"), [(0.03, 0.05), (1.0, 1.0), (1.1, 2.0), (6, 10.0), (50, 50.0)])
def test_steps_are_round_numbers(at_least: float, step: float) -> None:
    assert nice_step(at_least) == pytest.approx(step)


def tree_group(rewards: list[float] | None = None) -> Group:
    """`a0` to the end; `a1` and `a2` leave it, `a3` leaves `a1`, and `a4` began inside of `a0`."""
    places = {1: Branch(of=0, at=4, reason="boundary", probability=0.5), 2: Branch(of=0, at=8, reason="boundary"),
              3: Branch(of=1, at=6), 4: Branch(of=0, at=2, reason="fallback", probability=0.25)}  # fmt: skip
    members = [member(f"a{index}", 12, 0.0, 4.0) for index in range(5)]
    return group(
        *(
            msgspec.structs.replace(one, branch=places.get(one.index), reward=None if rewards is None else rewards[i])
            for i, one in enumerate(members)
        )
    )


def test_the_picture_of_a_tree_has_each_own_token_once() -> None:
    svg = ElementTree.fromstring(tree_svg(tree_group()))
    bars = [one for one in svg.iter() if one.tag.endswith("rect")]
    per_token = float(bars[0].attrib["width"]) / 12
    widths = sorted(round(float(bar.attrib["width"]) / per_token) for bar in bars)
    assert widths == [4, 6, 8, 10, 12]
    links = [one.attrib["class"] for one in svg.iter() if one.attrib.get("class", "").startswith("link")]
    assert sorted(links) == ["link", "link", "link", "link fallback"]
    titles = [one.text or "" for one in svg.iter() if one.tag.endswith("title")]
    assert any("left member 0 after 4 tokens (boundary, probability 0.5)" in title for title in titles)


def test_lines_of_a_tree_cross_no_bar() -> None:
    rng = random.Random(4)
    members = [member("a0", 40, 0.0, 4.0)]
    for index in range(1, 10):
        of = rng.randrange(index)
        start = members[of].branch.at if members[of].branch is not None else 0  # type: ignore[union-attr]
        branch = Branch(of=of, at=rng.randint(start, 30), reason="boundary")
        members.append(msgspec.structs.replace(member(f"a{index}", 40, 0.0, 4.0), branch=branch))
    svg = ElementTree.fromstring(tree_svg(group(*members)))
    bars = [
        tuple(float(one.attrib[name]) for name in ("x", "y", "width", "height"))
        for one in svg.iter() if one.tag.endswith("rect")
    ]  # fmt: skip
    for one in svg.iter():
        if one.attrib.get("class", "").startswith("link"):
            x, y1, y2 = map(float, re.findall(r"[\d.]+", one.attrib["d"]))
            assert y1 < y2
            for left, top, width, height in bars:
                inside = left + 0.2 < x < left + width - 0.2 and y1 < top + height / 2 < y2 - height
                assert not inside, "a line crosses a bar"


def test_a_report_draws_the_trees_of_its_groups() -> None:
    page = render_report([round_of([tree_group([0.0, 0.5, 1.0, 0.25, 0.75])])], title="t", settings={})
    assert page.count('<details class="tree"') == 1
    assert "5 trajectories, 4 of them branches; they have 60 tokens, of which 40 were sampled: 33% are shared" in page
    assert "Rewards from 0.00 to 1.00, mean 0.50" in page
    assert {f"reward-{shade}" for shade in (0, 1, 2, 3, 4)} <= set(re.findall(r'class="(reward-\d)"', page))
    assert "Trees</h3>" not in render_report([round_of([group(member("a0", 3, 0.0, 1.0))])], title="t", settings={})
