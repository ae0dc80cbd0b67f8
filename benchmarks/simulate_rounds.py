"""How many groups should a round start for each one that it needs, and what does that cost?

A simulation of a fleet whose rounds are cut when N groups are complete, by the engine's own policies, over ratios of
groups in flight to N, KV policies, spreads of lengths, loads, staleness bounds and sizes of the fleet.
`round_simulator.py` says what it leaves out, `round_sweep.py` what an engine, a prompt and a length are. The baseline
is the synchronous round: ratio 1, nothing carried. The first 8 rounds of any other run are the transient and not
counted (4 where engines are compared, which has one seed).

Flags besides the two of every benchmark: `--picture PATH` (.png or .svg; by default next to the JSON),
`--measured PATH` (what `partial_rollout.py` wrote, to validate against; by default in `benchmarks/results`), and
`--step-model A,B,C,P` (your engine's: seconds a step, a member, a token of context, a prefilled token).

Last line: one JSON object. By KV policy and sigma: `best_ratio_by_sigma` (the smallest ratio within 2 per cent of the
best throughput of those whose KV the pool holds); `throughput_gain_at_2` (accepted tokens a second over synchronous,
rollout alone; median over seeds), its `_range`, and `throughput_gain_at_2_with_training`. By sigma, for ratio 2 and KV
`fresh`: `staleness_share_at_2` (accepted tokens by staleness), `off_policy_share_at_2`, `length_excess_at_2` (mean
length of accepted over that of all trajectories, minus 1), `length_excess_first_round_at_2`, `idle_share_at_2` and
`idle_share_at_1` (of the slots in use at an engine's peak), `reprefilled_per_token_at_2`. `adaptive` (asked to leave 3
N groups, by sigma: groups in flight over N, gain, KV usage); `correlated_at_2` (gain and first-round bias when half the
variance is the prompt's); `gain_at_2_by_engines`; `million_trajectories_seconds` (wall time until 4,096 engines have
1,000,000 trajectories accepted, ratio 2, one core); `validation_ratio` (simulated over measured tokens a second; null:
not validated). The file also holds every cell.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import bench_io
import round_pictures
from round_simulator import StepModel, validate
from round_sweep import STEP, Cell, Sweep, rounded

RATIOS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
SIGMAS = (0.5, 1.0, 1.5)
LOADS = (4, 16, 32, 64)
ADAPTIVE_CARRIED = 3.0
BIG_FLEET, MILLION = 4096, 1_000_000


def main() -> None:
    """Run the sweep, draw it, and print the figures."""
    own = _parse_own_flags()
    flags = bench_io.parse_flags(__doc__)
    gc.disable()  # the simulator leaves no cycles, and a full fleet is two million objects to search for them
    num_seeds, num_rounds = (1, 12) if flags.quick else (5, 16)
    sweep = Sweep(own.step_model, num_seeds=num_seeds, warm_up=8, num_rounds=num_rounds)
    for kv in ("fresh", "stale"):
        for sigma in SIGMAS:
            cells = {f"{ratio:g}": Cell(ratio=ratio, sigma=sigma, kv=kv) for ratio in RATIOS}
            cells["adaptive"] = Cell(adaptive=ADAPTIVE_CARRIED, sigma=sigma, kv=kv)
            _print_cells(f"lengths lognormal, sigma {sigma:g}; KV {kv}", sweep, cells)
    _print_cells("ratio 2, staleness bound", sweep, {_bound_name(cell): cell for cell in round_pictures.bound_cells()})
    for load in LOADS:
        cells = {f"{ratio:g}": Cell(ratio=ratio, groups_per_engine=load) for ratio in RATIOS}
        _print_cells(f"N = {load} groups an engine", sweep, cells)
    correlated = Cell(ratio=2, correlation=0.5)
    _print_cells("half of a length's variance is the prompt's", sweep, {"2": correlated})

    million_s = _time_million(own.step_model)
    fleet_sweep = Sweep(own.step_model, num_seeds=1, warm_up=4, num_rounds=num_rounds)
    fleets = {str(n): Cell(ratio=2, num_engines=n) for n in (1, 16, 256) + (BIG_FLEET,) * (not flags.quick)}
    _print_cells("ratio 2, engines", fleet_sweep, fleets)

    validation = _validate(own.measured)
    figures = _headline(sweep) | {
        "correlated_at_2": {
            "gain": sweep(correlated)["gain"],
            "length_excess_first_round": sweep(correlated)["length_excess_by_round"][0],
        },
        "gain_at_2_by_engines": {count: fleet_sweep(cell)["gain"] for count, cell in fleets.items()},
        "million_trajectories_seconds": million_s,
        "validation_ratio": validation,
        "num_seeds": num_seeds,
    }
    picture = own.picture or (flags.json.with_suffix(".png") if flags.json else None)
    if picture is not None:
        axes = round_pictures.SweepAxes(RATIOS, SIGMAS, LOADS, ADAPTIVE_CARRIED)
        round_pictures.draw(picture, sweep, axes, figures["best_ratio_by_sigma"], validation)
        print(f"picture: {picture}")
    bench_io.report("simulate_rounds", rounded(figures), flags.json)
    if flags.json is not None:
        record = json.loads(flags.json.read_text()) | {"cells": sweep.cells() + fleet_sweep.cells()}
        flags.json.write_text(json.dumps(record, indent=1) + "\n")


def _headline(sweep: Sweep) -> dict[str, Any]:
    def by_sigma(key: str, kv: str = "fresh", ratio: float = 2.0) -> dict[str, Any]:
        return {f"{sigma:g}": sweep(Cell(ratio=ratio, sigma=sigma, kv=kv))[key] for sigma in SIGMAS}

    def by_kv(key: str) -> dict[str, Any]:
        return {kv: by_sigma(key, kv) for kv in ("fresh", "stale")}

    adaptive = {f"{sigma:g}": sweep(Cell(adaptive=ADAPTIVE_CARRIED, sigma=sigma)) for sigma in SIGMAS}
    return {
        "best_ratio_by_sigma": {kv: {f"{s:g}": _best_ratio(sweep, s, kv) for s in SIGMAS} for kv in ("fresh", "stale")},
        "throughput_gain_at_2": by_kv("gain"),
        "throughput_gain_at_2_range": by_kv("gain_range"),
        "throughput_gain_at_2_with_training": by_kv("gain_with_training"),
        "staleness_share_at_2": by_sigma("staleness_share"),
        "off_policy_share_at_2": by_sigma("off_policy_share"),
        "length_excess_at_2": by_sigma("length_excess"),
        "length_excess_first_round_at_2": {s: rounds[0] for s, rounds in by_sigma("length_excess_by_round").items()},
        "idle_share_at_1": by_sigma("idle_share", ratio=1.0),
        "idle_share_at_2": by_sigma("idle_share"),
        "reprefilled_per_token_at_2": by_sigma("reprefilled_per_token"),
        "adaptive": {
            sigma: {key: cell[key] for key in ("started_ratio", "gain", "peak_kv_usage")}
            for sigma, cell in adaptive.items()
        },
    }


def _best_ratio(sweep: Sweep, sigma: float, kv: str) -> float:
    cells = {ratio: sweep(Cell(ratio=ratio, sigma=sigma, kv=kv)) for ratio in RATIOS}
    held = {ratio: cell["tokens_per_s"] for ratio, cell in cells.items() if cell["peak_kv_usage"] <= 1 or ratio == 1}
    return min(ratio for ratio, value in held.items() if value >= 0.98 * max(held.values()))


def _time_million(step: StepModel) -> float:
    """Wall seconds until `BIG_FLEET` engines have `MILLION` trajectories accepted, one core."""
    start, num_accepted = time.perf_counter(), 0
    simulator = Cell(ratio=2, num_engines=BIG_FLEET).simulator(step, 0)
    while num_accepted < MILLION:
        num_accepted += simulator.run_round().accepted_trajectories
    seconds = time.perf_counter() - start
    print(f"\n{num_accepted:,} trajectories accepted from {BIG_FLEET:,} engines, {simulator.num_drawn:,} drawn: "
          f"{seconds:.1f} s of wall time", flush=True)  # fmt: skip
    return seconds


def _validate(path: Path) -> float | None:
    measured = json.loads(path.read_text()).get("simulation") if path.exists() else None
    if measured is None:
        print(f"\nNot validated: no measured run in {path}")
        return None
    ratio = validate(measured)
    print(f"\nValidated on {path}: simulated / measured tokens per second = {ratio:.3f}")
    return ratio


#: Heading, figure, format.
_COLUMNS = (
    (" gain", "gain", "{:.2f}x"), ("with training", "gain_with_training", "{:.2f}x"),
    ("trained", "trained_gain", "{:.2f}x"), ("tokens/s", "tokens_per_s", "{:.0f}"), (" idle", "idle_share", "{:.0%}"),
    ("off-policy", "off_policy_share", "{:.0%}"), ("staleness", "mean_staleness", "{:.2f}"),
    ("in flight", "started_ratio", "{:.2f}N"), ("carried", "carried_ratio", "{:.2f}N"),
    ("re-prefill", "reprefilled_per_token", "{:.2f}"), ("  bias", "length_excess", "{:+.1%}"),
    ("restarted", "restarted_per_group", "{:.2f}"), ("dropped", "dropped_per_group", "{:.2f}"),
    ("masked", "masked_group_share", "{:.0%}"), ("  KV", "peak_kv_usage", "{:.0%}"),
)  # fmt: skip


def _print_cells(title: str, sweep: Sweep, cells: dict[str, Cell]) -> None:
    print(f"\n{title}\n" + " " * 10 + "".join(f"{heading:>{len(heading) + 2}}" for heading, *_ in _COLUMNS))
    for name, cell in cells.items():
        figures = sweep(cell)
        row = (f"{form.format(figures[key]):>{len(heading) + 2}}" for heading, key, form in _COLUMNS)
        print(f"{name:>10}{''.join(row)}", flush=True)


def _bound_name(cell: Cell) -> str:
    return "none" if cell.max_staleness is None else f"{cell.max_staleness} {cell.action}"


def _parse_own_flags() -> argparse.Namespace:
    """Takes its own flags out of the command line, and leaves the rest to `bench_io.parse_flags`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    results = Path(__file__).with_name("results")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--measured", type=Path, default=results / "partial_rollout.json")
    parser.add_argument("--step-model", type=lambda text: StepModel(*map(float, text.split(","))), default=STEP)
    own, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    return own


if __name__ == "__main__":
    main()
