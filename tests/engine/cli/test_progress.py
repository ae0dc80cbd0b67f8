"""What a terminal, and a file instead of a terminal, sees of a round; the clock is the test's."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from longtail.engine.cli.progress import RoundProgress, summary_table
from longtail.engine.trajectory import (
    CUT_STOP_REASON,
    FinishReason,
    Group,
    Round,
    RoundStats,
    Timings,
    TokenCounts,
    Trajectory,
    VersionSpan,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def member(group_id: str, index: int, num_tokens: int, finish_reason: FinishReason = "stop") -> Trajectory:
    return Trajectory(
        trajectory_id=f"r/{group_id}/{index}",
        round_id="r",
        group_id=group_id,
        index=index,
        prompt_token_ids=[1],
        output_token_ids=[7] * num_tokens,
        logprobs=[-0.5] * num_tokens,
        source_mask=[1] * num_tokens,
        weight_versions=[VersionSpan("0", 0, num_tokens)] if num_tokens else [],
        finish_reason=finish_reason,
        stop_reason=CUT_STOP_REASON if finish_reason == "abort" else None,
        timings=Timings(submitted_s=0.0, scheduled_s=0.0 if num_tokens else None, finished_s=4.0),
        tokens=TokenCounts(),
    )


def small_round(round_id: str = "r") -> Round:
    """Target one of three groups: one complete (10, 20), one cut (30; never started), one failed (5; 40)."""
    groups = [
        Group(group_id="a", trajectories=[member("a", 0, 10), member("a", 1, 20)], complete=True),
        Group(group_id="b", trajectories=[member("b", 0, 30, "abort"), member("b", 1, 0, "abort")], complete=False),
        Group(group_id="c", trajectories=[member("c", 0, 5, "error"), member("c", 1, 40)], complete=False),
    ]
    stats = RoundStats(
        num_submitted_groups=3,
        num_complete_groups=1,
        num_cut_groups=1,
        num_failed_groups=1,
        num_cut_members=2,
        num_output_tokens=105,
        num_kept_tokens=30,
        num_scheduled_tokens=1234,
        num_recomputed_tokens=56,
        num_steps=40,
        idle_slot_steps=50,
        peak_running=5,
        seconds=4.0,
    )
    return Round(round_id=round_id, target_groups=1, groups=groups, stats=stats)


def cells(round: Round) -> dict[str, tuple[str, str]]:
    console = Console(record=True, width=140, file=io.StringIO())
    console.print(summary_table(round))
    lines = [line.split("│") for line in console.export_text().splitlines() if line.count("│") == 4]
    return {line[1].strip(): (line[2].strip(), line[3].strip()) for line in lines}


def plain(clock: Clock, interval_s: float = 5.0) -> tuple[RoundProgress, Console]:
    console = Console(record=True, width=60, file=io.StringIO(), force_terminal=False)
    return RoundProgress(console, clock=clock, line_interval_s=interval_s), console


def on_terminal(clock: Clock) -> tuple[RoundProgress, Console, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=110, height=30, color_system=None)
    return RoundProgress(console, clock=clock), console, out


def shown(progress: RoundProgress) -> str:
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(progress.render())
    return console.export_text()


def test_the_table_says_what_was_kept_cut_and_failed_and_why() -> None:
    found = cells(small_round())
    assert found["groups complete"] == ("1", "of 3 submitted, target 1")
    assert found["groups cut"] == ("1", "the target of 1 complete group was reached")
    assert found["groups failed"] == ("1", "1 member: error")
    assert found["trajectories cut"] == ("2", "of 6, 1 of them before they started")
    assert found["tokens generated"] == ("105", "26.2 a second")
    assert found["tokens kept"] == ("30", "in complete groups, 29% of the generated, 7.5 a second")
    assert found["tokens recomputed"] == ("56", "of 1,234 that went through the model")
    assert found["engine steps"][0] == "40"
    assert found["batch idle"] == ("25.0%", "50 empty slot-steps; at most 5 ran at once")
    assert found["seconds"][0] == "4.00"
    # started, a star for stopped: 5* 10 20 30* 40
    assert [found[f"length {name}"][0] for name in ("p50", "p90", "max")] == ["≥ 20", "≥ 40", "≥ 40"]


def test_a_round_without_anything_has_a_table() -> None:
    stats = dict.fromkeys(RoundStats.__struct_fields__, 0) | {"seconds": 0.0}
    empty = Round(round_id="none", target_groups=1, groups=[], stats=RoundStats(**stats))
    found = cells(empty)
    assert found["batch idle"][0] == "n/a"
    assert found["length p50"][0] == "n/a"
    assert found["groups cut"] == ("0", "the target of 1 complete group could not be reached")


def test_names_are_not_read_as_markup() -> None:
    console = Console(record=True, width=140, file=io.StringIO())
    console.print(summary_table(small_round("[bold]x[/nope]")))
    assert "Round [bold]x[/nope]" in console.export_text()


def test_a_group_is_done_when_its_last_member_ended_by_itself() -> None:
    clock = Clock()
    progress, _ = plain(clock)
    progress.start(3, 2, 2)
    progress.on_trajectory(member("a", 0, 10))
    assert "groups 0/2" in progress.line()
    progress.on_trajectory(member("a", 1, 20))
    assert "groups 1/2" in progress.line()
    progress.on_trajectory(member("b", 0, 5))
    progress.on_trajectory(member("b", 1, 5, "abort"))
    progress.on_trajectory(member("c", 0, 5, "error"))
    assert "groups 1/2" in progress.line()
    assert "trajectories 3/6 ended, 1 cut, 1 failed" in progress.line()


def test_lengths_so_far_are_those_of_trajectories_that_ended() -> None:
    progress, _ = plain(Clock())
    progress.start(10, 1, 10)
    assert "none ended yet" in progress.line()
    for i, num_tokens in enumerate((50, 10, 40, 20, 30)):
        progress.on_trajectory(member(f"g{i}", 0, num_tokens))
    progress.on_trajectory(member("cut", 0, 900, "abort"))
    assert "p50 30  p90 50  max 50" in progress.line()


def test_the_rate_is_that_of_the_last_ten_seconds_and_falls_when_tokens_stop() -> None:
    clock = Clock()
    progress, _ = plain(clock)
    progress.start(1, 1, 1)
    assert progress.tokens_per_s == 0.0
    total = 0
    for second in range(1, 41):  # 100 a second for 20 s, then 10 a second for 20 s
        clock.now = 100.0 + second
        total += 100 if second <= 20 else 10
        progress.on_tokens(total, 4, 0)
        if second == 20:
            assert progress.tokens_per_s == pytest.approx(100)
    assert progress.tokens_per_s == pytest.approx(10)
    assert total / 40 == pytest.approx(55)  # the control: the mean since the start is far from it
    clock.now += 30
    assert progress.tokens_per_s < 1


def test_many_calls_in_a_moment_do_not_grow_the_window() -> None:
    clock = Clock()
    progress, _ = plain(clock, interval_s=1e9)
    progress.start(1, 1, 1)
    for i in range(20_000):
        clock.now = 100.0 + i * 0.001
        progress.on_tokens(i, 4, 0)
    assert progress.tokens_per_s == pytest.approx(1000, rel=0.01)
    assert len(progress._samples) < 150


def test_without_a_terminal_there_is_one_line_every_interval_and_no_control_characters() -> None:
    clock = Clock()
    progress, console = plain(clock)
    with progress:
        progress.start(3, 2, 1)
        for i in range(1, 121):  # 12 s, ten calls a second
            clock.now = 100.0 + i / 10
            progress.on_tokens(i, 4, 2)
        progress.finish(small_round())
    text = console.export_text(clear=False)
    assert "round: 3 groups of 2, target 1 complete groups" in text
    assert re.findall(r"^ *([\d.]+) s  groups", text, re.MULTILINE) == ["5.0", "10.0"]
    assert "4 running, 2 waiting" in text
    assert text.count("groups complete") == 1
    assert "\x1b" not in text


def test_on_a_terminal_it_draws_in_place_and_gives_the_cursor_back() -> None:
    clock = Clock()
    progress, _, out = on_terminal(clock)
    with progress:
        progress.start(3, 2, 1)
        num_frames = []
        for i in range(1, 101):  # 1 s, a hundred calls
            clock.now = 100.0 + i / 100
            progress.on_tokens(i, 4, 2)
            num_frames.append(out.getvalue().count("elapsed"))
        progress.finish(small_round())
    assert num_frames[-1] <= 6
    assert len(set(num_frames)) >= 4
    text = out.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "groups complete" in text


def test_a_round_that_fails_gives_the_cursor_back() -> None:
    progress, _, out = on_terminal(Clock())
    progress.start(3, 2, 1)
    assert "\x1b[?25h" not in out.getvalue()
    with pytest.raises(KeyboardInterrupt), progress:
        raise KeyboardInterrupt
    assert "\x1b[?25h" in out.getvalue()
    progress.close()


def test_the_display_shows_both_bars_and_all_facts() -> None:
    clock = Clock()
    progress, _, _ = on_terminal(clock)
    with progress:
        progress.start(3, 2, 2)
        clock.now += 2
        progress.on_trajectory(member("a", 0, 10))
        progress.on_trajectory(member("a", 1, 30))
        progress.on_tokens(1500, 3, 1)
        text = shown(progress)
    assert "1/2 complete (3 submitted)" in text
    assert "2/6 ended, 3 running, 1 waiting" in text
    assert "1,500 (750/s)" in text
    assert "p50 10  p90 30  max 30" in text
    assert "2 s" in text


def test_the_next_round_starts_from_nothing() -> None:
    clock = Clock()
    progress, _ = plain(clock)
    for _ in range(2):
        progress.start(1, 1, 1)
        assert "groups 0/1  trajectories 0/1 ended, 0 running, 0 waiting  0 tokens" in progress.line()
        clock.now += 1
        progress.on_trajectory(member("a", 0, 10))
        progress.on_tokens(10, 1, 1)
        assert "groups 1/1" in progress.line()
