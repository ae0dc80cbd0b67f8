"""Boxed answers in text that comes in pieces, against a search of the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from longtail.scheduler.boxed import BoxedAnswer

TEXTS = st.text(alphabet="\\boxed{}a ", max_size=60) | st.lists(
    st.sampled_from(("\\boxed{", "}", "{", "\\}", "\\{", "\\\\", "x", "\\boxed", "boxed{", "\\")), max_size=25
).map("".join)


def first_end(text: str) -> int | None:
    """Where the first boxed answer ends, by looking at the whole text for each beginning."""
    start = text.find("\\boxed{")
    if start < 0:
        return None
    depth, place = 0, start + len("\\boxed")
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] == "{":
            depth += 1
        elif text[place] == "}":
            depth -= 1
            if not depth:
                return place + 1
        place += 1
    return None


@given(TEXTS, st.lists(st.integers(1, 7), max_size=40))
def test_it_is_found_in_the_piece_that_completes_it(text: str, sizes: list[int]) -> None:
    reader, read, end = BoxedAnswer(), 0, first_end(text)
    for size in [*sizes, len(text)]:
        before, read = read, min(len(text), read + size)
        is_complete = reader.is_complete_in(text[:read])
        if end is not None and before >= end:
            return
        assert is_complete == (end is not None and before < end <= read)


def test_plain_answers() -> None:
    assert BoxedAnswer().is_complete_in("so \\boxed{\\frac{1}{2}}")
    assert not BoxedAnswer().is_complete_in("so \\boxed{\\frac{1}{2}")
    assert not BoxedAnswer().is_complete_in("boxed{1}")
    assert BoxedAnswer().is_complete_in("\\\\boxed{1}")
