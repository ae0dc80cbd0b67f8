"""What the paths of a tree are told apart by: log-probabilities, or entropies, of their tokens, by segment. No vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from longtail.scheduler.tree_policy import PathFigures, SplitBy

#: Log-probabilities that the engine gives for each position where trees split by entropy, besides the sampled one.
NUM_ENTROPY_LOGPROBS = 20

_LOWEST = -9999.0


class PathValues:
    """The values of one path.

    Args:
        segment_tokens: length of a segment.
        sums: at every boundary of a path that goes on, the sum of what is before it, and last that of all tokens.
        num_tokens: that it has.

    """

    def __init__(self, segment_tokens: int, sums: Sequence[float] = (), num_tokens: int = 0) -> None:
        self._segment_tokens = segment_tokens
        self._num_tokens = num_tokens
        self._sums = list(sums[: num_tokens // segment_tokens])
        self._total = sums[-1] if sums else 0.0

    def extend(self, values: Sequence[float]) -> None:
        """Tokens were sampled."""
        for value in values:
            self._total += value
            self._num_tokens += 1
            if self._num_tokens % self._segment_tokens == 0:
                self._sums.append(self._total)

    def upto(self, num_segments: int) -> PathValues:
        """Of a branch that begins after so many segments."""
        return PathValues(self._segment_tokens, self._sums[:num_segments], num_segments * self._segment_tokens)

    def figures(self, num_segments: int) -> PathFigures:
        """Of a path at the end of that segment; zeros where nothing was noted."""
        size = self._segment_tokens
        sums = [0.0, *self._sums]
        if not 0 < num_segments < len(sums):
            return PathFigures(num_tokens=num_segments * size)
        return PathFigures(
            num_tokens=num_segments * size,
            path_mean=sums[num_segments] / (num_segments * size),
            segment_mean=(sums[num_segments] - sums[num_segments - 1]) / size,
        )


def sums_of(split: SplitBy, logprobs: Sequence[float], segment_tokens: int) -> list[float]:
    """`PathValues`' sums of a path of which the log-probs of all tokens are known.

    Entropies are not: what a token was worth in surprise has the same mean.
    """
    values = _finite(np.asarray(logprobs, dtype=np.float64))
    totals = np.cumsum(values if split == "logprob" else -values)
    return [*totals[segment_tokens - 1 :: segment_tokens].tolist(), *totals[-1:].tolist()]


def values_of(split: SplitBy, logprobs: npt.NDArray[np.float32]) -> list[float]:
    """What a tree splits by, of some tokens.

    Args:
        split: not `uniform`.
        logprobs: [tokens, 1 + N]: of the sampled token, then of the N most likely ones, of which entropy needs some.

    Returns:
        One value a token. Entropies, in nats, take all that the N leave for one token more: they are a lower bound.

    """
    finite = _finite(logprobs.astype(np.float64))
    if split == "logprob":
        return list(map(float, finite[:, 0]))
    top = finite[:, 1:]
    mass = np.exp(top)
    rest = np.clip(1.0 - mass.sum(axis=1), 0.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(mass > 0, mass * top, 0.0).sum(axis=1) + np.where(rest > 1e-6, rest * np.log(rest), 0.0)
    return list(map(float, -terms))


def _finite(logprobs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A model that makes NaNs must not stop the scheduler; the lowest is vLLM's own bound."""
    return np.nan_to_num(logprobs, nan=_LOWEST, posinf=0.0, neginf=_LOWEST)
