"""A task whose answers have long-tailed lengths by nature: Euclid's algorithm as he wrote it, by subtraction.

A problem is two different numbers below 100. An answer compares them and takes the smaller from the larger one until
both are equal: that of `48 18` is `48>18 30>18 12<18 12>06 06=06`. How many subtractions that takes is the sum of the
partial quotients of the fraction, whose mean grows without bound: half the problems need at most 11, one in a hundred
more than 72, and `99 1` needs 98. An answer is right when all of it is, so that guessing the divisor (1 in six of ten
problems) gains nothing.

A digit is its own token id; numbers have two digits, the unit first, so that a borrow is known before it is due. Some
of the problems are held out for evaluation. No torch here; `euclid_model.py` has the model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from longtail.engine.prompts import Prompt

MAX_NUMBER = 99
#: Ids 0 to 9 are digits. Each pair of numbers has a comparison after it; `EQUAL` ends the answer.
LESS, MORE, EQUAL, PAD = 10, 11, 12, 13
#: What each id is in text.
CHARACTERS = "0123456789<>=_"
VOCAB_SIZE = len(CHARACTERS)
PROMPT_TOKENS = 4
MAX_ANSWER_TOKENS = 1 + 5 * (MAX_NUMBER - 1)
NUM_HELD_OUT = 512


class Problem(NamedTuple):
    """Two different numbers from 1 to `MAX_NUMBER`."""

    left: int
    right: int


def problems(seed: int, *, held_out: bool = False) -> Iterator[Problem]:
    """Problems without end, in an order of their own for each seed: those held out, or all others."""
    pool = sorted(_HELD_OUT if held_out else _ALL - _HELD_OUT)
    rng = random.Random(f"euclid {seed}")
    while True:
        yield from rng.sample(pool, len(pool))


def prompts(seed: int, count: int, *, held_out: bool = False) -> list[Prompt]:
    """The first `count` of `problems`, for an engine."""
    drawn = problems(seed, held_out=held_out)
    return [Prompt(token_ids=prompt_ids(next(drawn))) for _ in range(count)]


def prompt_ids(problem: Problem) -> list[int]:
    """The problem's `PROMPT_TOKENS` token ids."""
    return [problem.left % 10, problem.left // 10, problem.right % 10, problem.right // 10]


def answer_ids(problem: Problem) -> list[int]:
    """The one right answer, at most `MAX_ANSWER_TOKENS` token ids."""
    return _written(_pairs(problem))[PROMPT_TOKENS:]


def demonstrated(problem: Problem, slip_rate: float, rng: random.Random) -> list[int]:
    """Prompt and answer by a pupil who forgets this share of the borrows, and goes on from the wrong difference."""
    return _written(_pairs(problem, slip_rate, rng))


def score(prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> float:
    """1 for the right answer to this prompt, 0 for any other.

    Raises:
        ValueError: the prompt is not that of a problem.

    """
    ids = list(prompt_token_ids)
    problem = Problem(ids[0] + 10 * ids[1], ids[2] + 10 * ids[3]) if len(ids) == PROMPT_TOKENS else None
    if problem not in _ALL or max(ids) > 9 or min(ids) < 0:
        raise ValueError(f"{ids} is no problem")
    return float(list(output_token_ids) == answer_ids(problem))


def text(token_ids: Sequence[int]) -> str:
    """Prompt and answer for people, such as `48>18 30>18 12<18 12>06 06=06`."""
    pairs = []
    for start in range(0, len(token_ids), PROMPT_TOKENS + 1):
        pair = [CHARACTERS[token] for token in token_ids[start : start + PROMPT_TOKENS + 1]]
        left, right, sign = pair[1::-1], pair[3:1:-1], pair[4:] or [" "]
        pairs.append("".join([*left, *sign, *right]))
    return " ".join(pairs)


def _pairs(problem: Problem, slip_rate: float = 0.0, rng: random.Random | None = None) -> list[Problem]:
    """The problem and what becomes of it."""
    left, right = problem
    pairs = [problem]
    while left != right and len(pairs) < MAX_NUMBER:
        difference = abs(left - right)
        borrows = max(left, right) % 10 < min(left, right) % 10
        if borrows and rng is not None and rng.random() < slip_rate:
            difference += 10
        left, right = (difference, right) if left > right else (left, difference)
        pairs.append(Problem(left, right))
    return pairs


def _written(pairs: Sequence[Problem]) -> list[int]:
    return [token for pair in pairs for token in (*prompt_ids(pair), _sign(pair))]


def _sign(pair: Problem) -> int:
    return EQUAL if pair.left == pair.right else LESS if pair.left < pair.right else MORE


_ALL = frozenset(Problem(a, b) for a in range(1, MAX_NUMBER + 1) for b in range(1, MAX_NUMBER + 1) if a != b)
_HELD_OUT = frozenset(random.Random("held out").sample(sorted(_ALL), NUM_HELD_OUT))
