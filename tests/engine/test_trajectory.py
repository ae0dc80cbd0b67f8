"""A trajectory whose arrays do not fit together can't be built, and every record survives JSON."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from longtail.engine.trajectory import Timings, TokenCounts, Trajectory, VersionSpan


def make(**changes: Any) -> Trajectory:
    fields: dict[str, Any] = {
        "trajectory_id": "r/g/0", "round_id": "r", "group_id": "g", "index": 0, "prompt_token_ids": [1],
        "output_token_ids": [4, 5, 6], "logprobs": [-0.1, -0.2, -0.3], "source_mask": [1, 1, 1],
        "weight_versions": [VersionSpan("a", 0, 2), VersionSpan("b", 2, 3)], "finish_reason": "stop",
        "timings": Timings(submitted_s=0.0), "tokens": TokenCounts(),
    }  # fmt: skip
    return Trajectory(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"logprobs": [-0.1]},
        {"source_mask": [1, 1, 1, 1]},
        {"output_token_ids": []},
        {"weight_versions": []},
        {"weight_versions": [VersionSpan("a", 0, 2)]},
        {"weight_versions": [VersionSpan("a", 0, 2), VersionSpan("b", 1, 3)]},
        {"weight_versions": [VersionSpan("a", 0, 4)]},
        {"weight_versions": [VersionSpan("a", 1, 3)]},
    ],
)
def test_arrays_of_one_trajectory_fit_together(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="r/g/0"):
        make(**changes)


def test_decoding_checks_too() -> None:
    line = msgspec.json.encode(make())
    assert msgspec.json.decode(line, type=Trajectory) == make()
    with pytest.raises(msgspec.ValidationError, match="logprobs"):
        msgspec.json.decode(line.replace(b"-0.1,", b""), type=Trajectory)


def test_cut_before_the_first_token() -> None:
    cut = make(
        output_token_ids=[],
        logprobs=[],
        source_mask=[],
        weight_versions=[],
        finish_reason="abort",
        stop_reason="rollout_cut",
    )
    assert cut.was_cut
    assert not make().was_cut
