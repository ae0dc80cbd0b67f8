"""The task: what is right, by brute force; how long answers are; ids and text."""

from __future__ import annotations

import random
import re
from itertools import islice
from math import gcd

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtail.trainer_bridge.demo import euclid_task as task
from longtail.trainer_bridge.demo.euclid_task import Problem

problems = st.tuples(st.integers(1, 99), st.integers(1, 99)).filter(lambda p: p[0] != p[1]).map(lambda p: Problem(*p))


def is_proof(problem: Problem, words: str) -> bool:
    """Checks a text line by line, and knows nothing of ids."""
    found = [re.fullmatch(r"(\d\d)([<>=])(\d\d)", pair) for pair in words.split(" ")]
    pairs = [(int(m[1]), m[2], int(m[3])) for m in found if m]
    if len(pairs) != len(found) or not pairs or pairs[0][::2] != problem:
        return False
    for i, (left, sign, right) in enumerate(pairs):
        if sign != ("<" if left < right else ">" if left > right else "="):
            return False
        if (sign == "=") != (i == len(pairs) - 1):
            return False
        if i + 1 < len(pairs):
            wanted = (left - right, right) if left > right else (left, right - left)
            if pairs[i + 1][::2] != wanted:
                return False
    return True


@given(problems)
def test_the_answer_is_a_proof_that_ends_with_the_divisor(problem: Problem) -> None:
    prompt, answer = task.prompt_ids(problem), task.answer_ids(problem)
    words = task.text([*prompt, *answer])
    assert is_proof(problem, words)
    assert int(words[-2:]) == gcd(*problem)
    assert len(prompt) == task.PROMPT_TOKENS
    assert len(answer) <= task.MAX_ANSWER_TOKENS
    assert task.score(prompt, answer) == 1.0


@given(problems, st.data())
def test_any_other_answer_earns_nothing(problem: Problem, data: st.DataObject) -> None:
    prompt, answer = task.prompt_ids(problem), task.answer_ids(problem)
    place = data.draw(st.integers(0, len(answer) - 1))
    other = data.draw(st.integers(0, task.VOCAB_SIZE - 1).filter(lambda token: token != answer[place]))
    changed = [*answer[:place], other, *answer[place + 1 :]]
    for wrong in (changed, answer[:-1], [*answer, answer[-1]], []):
        assert task.score(prompt, wrong) == 0.0
        assert not is_proof(problem, task.text([*prompt, *wrong]))


@given(problems, st.floats(0, 1), st.integers(0, 1000))
def test_a_demonstration_is_right_exactly_when_no_borrow_was_forgotten(
    problem: Problem, rate: float, seed: int
) -> None:
    ids = task.demonstrated(problem, rate, random.Random(seed))
    prompt, answer = ids[: task.PROMPT_TOKENS], ids[task.PROMPT_TOKENS :]
    assert prompt == task.prompt_ids(problem)
    assert len(answer) <= task.MAX_ANSWER_TOKENS
    assert (task.score(prompt, answer) == 1.0) == is_proof(problem, task.text(ids))
    assert task.demonstrated(problem, 0.0, random.Random(seed)) == [*prompt, *task.answer_ids(problem)]


@pytest.mark.parametrize(
    "ids", [[1, 2, 3], [1, 2, 3, 4, 5], [0, 0, 1, 1], [5, 1, 5, 1], [1, 2, 3, task.MORE], [-1, 2, 3, 4]]
)
def test_other_prompts_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="no problem"):
        task.score(ids, [])


def test_lengths_have_a_long_tail() -> None:
    """The longest answer of 16 problems is several times the mean: that is what a synchronous round waits for."""
    lengths = sorted(len(task.answer_ids(Problem(a, b))) for a in range(1, 100) for b in range(1, 100) if a != b)
    count, mean = len(lengths), sum(lengths) / len(lengths)
    assert 40 <= lengths[count // 2] <= 60
    assert lengths[count * 99 // 100] > 6 * lengths[count // 2]
    assert lengths[-1] == task.MAX_ANSWER_TOKENS
    longest = [max(random.Random(seed).sample(lengths, 16)) for seed in range(500)]
    assert sum(longest) / len(longest) > 3 * mean


def test_held_out_problems_are_never_trained_on() -> None:
    held_out = set(islice(task.problems(0, held_out=True), task.NUM_HELD_OUT))
    trained = set(islice(task.problems(0), 99 * 98 - task.NUM_HELD_OUT))
    assert len(held_out) == task.NUM_HELD_OUT
    assert len(trained) == 99 * 98 - task.NUM_HELD_OUT
    assert not held_out & trained
    assert set(islice(task.problems(1, held_out=True), task.NUM_HELD_OUT)) == held_out


def test_a_seed_is_an_order() -> None:
    assert task.prompts(3, 50) == task.prompts(3, 60)[:50]
    assert task.prompts(3, 50) != task.prompts(4, 50)
