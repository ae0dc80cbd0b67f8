"""Rollout metadata: every wrong value is named, every right one survives the trip."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.limits import MAX_ID_CHARS
from longtail.scheduler.metadata import (
    MAX_JSON_CHARS,
    MemberReport,
    RolloutMetadata,
    metadata_of,
    parse_metadata,
    report_of,
)

GOOD: dict[str, Any] = {"round": "r", "target_groups": 4, "group": "g", "group_size": 2, "index": 1}

ids = st.text(min_size=1, max_size=MAX_ID_CHARS).filter(lambda text: text.encode("utf-8", "ignore").decode() == text)


@given(round_id=ids, group=ids, target=st.integers(1, 1_048_576), size=st.integers(1, 65_536), data=st.data())
def test_valid_metadata_survives_as_dict(round_id: str, group: str, target: int, size: int, data: Any) -> None:
    metadata = RolloutMetadata(
        round=round_id, target_groups=target, group=group, group_size=size, index=data.draw(st.integers(0, size - 1))
    )
    assert parse_metadata(msgspec.to_builtins(metadata)) == metadata


def test_valid_metadata_survives_as_json_text() -> None:
    assert parse_metadata(json.dumps(GOOD)) == parse_metadata(GOOD)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"round": 3}, "rollout.round"),
        ({"round": ""}, "rollout.round"),
        ({"round": "x" * (MAX_ID_CHARS + 1)}, "rollout.round"),
        ({"target_groups": -1}, "rollout.target_groups"),
        ({"target_groups": 0}, "rollout.target_groups"),
        ({"target_groups": "four"}, "rollout.target_groups"),
        ({"target_groups": 1.5}, "rollout.target_groups"),
        ({"target_groups": float("nan")}, "rollout.target_groups"),
        ({"target_groups": True}, "rollout.target_groups"),
        ({"target_groups": 10**12}, "rollout.target_groups"),
        ({"group": None}, "rollout.group"),
        ({"group": ["a"]}, "rollout.group"),
        ({"group_size": 0}, "rollout.group_size"),
        ({"group_size": 10**9}, "rollout.group_size"),
        ({"index": 2}, "rollout.index"),
        ({"index": -1}, "rollout.index"),
        ({"surprise": 1}, "rollout"),
    ],
)
def test_wrong_value_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_metadata(GOOD | change)
    assert caught.value.field == field
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("missing", ["round", "target_groups", "group"])
def test_missing_field_is_named(missing: str) -> None:
    with pytest.raises(InvalidInputError, match=missing):
        parse_metadata({name: value for name, value in GOOD.items() if name != missing})


@pytest.mark.parametrize(
    "value", [7, 1.5, b"x", [], [GOOD], "", "{", "[]", "null", "\ud800", "[" * 4000, "x" * (MAX_JSON_CHARS + 1), {1: 2}]
)
def test_wrong_shape_is_refused(value: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_metadata(value)
    assert caught.value.field == "rollout"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_anything_else_raises_only_our_error(value: object) -> None:
    with contextlib.suppress(InvalidInputError):
        parse_metadata(value)


def test_absent_metadata_is_no_round() -> None:
    assert metadata_of(None) is None
    assert metadata_of({}) is None
    assert metadata_of({"other": 1}) is None
    assert report_of(None) is None
    assert report_of({"other": 1}) is None


def test_report_survives_the_trip() -> None:
    report = MemberReport(opened_ts=1.0, arrived_ts=2.0, finished_ts=3.0, num_scheduled_tokens=9)
    assert report_of({"rollout": msgspec.to_builtins(report)}) == report
