"""Prompts over many rounds: each is drawn once, and what was drawn and not submitted is not lost."""

from __future__ import annotations

import pytest

from longtail.engine.errors import InvalidInputError
from longtail.engine.prompt_source import PromptSource


def test_a_sequence_goes_on_at_its_cursor() -> None:
    source = PromptSource(list(range(10)), 4, is_durable=True)
    assert source.draw(3) == [4, 5, 6]
    assert source.draw(9) == [7, 8, 9]
    assert source.draw(1) == []
    assert source.cursor == 10


def test_what_an_iterator_gave_and_nobody_submitted_comes_again_first() -> None:
    prompts = iter(range(10))
    first = PromptSource(prompts, 0, is_durable=False)
    assert first.draw(6) == [0, 1, 2, 3, 4, 5]
    first.submitted(1)
    second = PromptSource(prompts, 1, first.unsubmitted, is_durable=False)
    assert second.draw(2) == [1, 2], "the second draws fewer than were left over"
    assert second.unsubmitted == [1, 2, 3, 4, 5]
    second.submitted(1)
    third = PromptSource(prompts, 2, second.unsubmitted, is_durable=False)
    assert third.draw(20) == [2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("prompts", ["text", {"a": 1}, 3, {1, 2}])
def test_what_has_no_order_is_refused(prompts: object) -> None:
    with pytest.raises(InvalidInputError, match="prompts: expected a sequence or an iterator"):
        PromptSource(prompts, 0, is_durable=False)


def test_a_sequence_that_ends_before_the_position_is_another_one() -> None:
    with pytest.raises(InvalidInputError, match=r"the sequence that earlier rounds took 5 prompts of.*4 prompts"):
        PromptSource([1, 2, 3, 4], 5, is_durable=True)
    assert PromptSource([1, 2, 3, 4], 4, is_durable=True).draw(1) == []


def test_a_journal_needs_positions() -> None:
    with pytest.raises(InvalidInputError, match="whose position the journal holds"):
        PromptSource(iter([1]), 0, is_durable=True)
