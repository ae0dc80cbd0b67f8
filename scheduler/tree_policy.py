"""Which paths of a tree branch, and when: TreePO's sampling (arXiv 2508.17445) as events of single paths.

A tree has `width` leaves, which are the members of one group. Some begin at the prompt; every other one is *born* at a
boundary of a path, whose tokens before it are its own. A path that ends gives its branches to those that go on (budget
transfer), and when none goes on while members are unborn, they are born inside of paths that ended (fallback).

Without barriers, the default, each path is asked at its own boundary and goes on at once. `synchronous` is what the
released sampler of TreePO does: paths wait at a boundary until all are there, then the branches of the level are shared
out.

No vLLM, no tokens and no clock here: the adapter says what happened and does what it is told.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.limits import MAX_GROUP_SIZE

BirthReason = Literal["boundary", "fallback"]
SplitBy = Literal["uniform", "logprob", "entropy"]
Fallback = Literal["ended", "any", "none"]

#: Below this the softmax over paths takes the best one anyway.
MIN_SPLIT_TEMPERATURE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeSpec:
    """How a tree grows. The defaults are those of TreePO's released runs, but for sizes.

    Attributes:
        width: leaves.
        depth: segments of a path, at most.
        segment_tokens: length of a segment.
        branching: paths that one path becomes at a boundary, itself included, before budget transfer.
        max_branching: draw the branching at each boundary, uniformly from `branching` to this.
        min_roots, max_roots: paths that begin at the prompt, drawn uniformly (initial divergence).
        transfer: paths that end give `branching` branches to the others.
        split: which paths get more of what is shared out: all the same (`uniform`), or by mean log-probability or
            entropy of their tokens.
        split_scope: of the whole `path`, or of its last `segment`.
        split_favours: `low` or `high` values.
        split_temperature: of the softmax over paths.
        fallback: inside of which paths unborn members begin when none goes on: those that ended by themselves before
            their budget was spent, `any`, or `none`: then they are dismissed.
        synchronous: paths wait for each other at every boundary.

    Raises:
        InvalidInputError: names the field.

    """

    width: int
    depth: int
    segment_tokens: int
    branching: int = 2
    max_branching: int | None = None
    min_roots: int = 1
    max_roots: int | None = None
    transfer: bool = True
    split: SplitBy = "uniform"
    split_scope: Literal["path", "segment"] = "path"
    split_favours: Literal["low", "high"] = "low"
    split_temperature: float = 1.0
    fallback: Fallback = "ended"
    synchronous: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("width", 1, MAX_GROUP_SIZE), ("depth", 1, 1 << 20), ("segment_tokens", 1, 1 << 30),
            ("branching", 1, MAX_GROUP_SIZE), ("min_roots", 1, MAX_GROUP_SIZE),
        ):  # fmt: skip
            _check_int(name, getattr(self, name), low, high)
        if self.max_branching is not None:
            _check_int("max_branching", self.max_branching, self.branching, MAX_GROUP_SIZE)
        if self.max_roots is not None:
            _check_int("max_roots", self.max_roots, self.min_roots, MAX_GROUP_SIZE)
        for name, choices in (
            ("transfer", (True, False)), ("synchronous", (True, False)), ("split", ("uniform", "logprob", "entropy")),
            ("split_scope", ("path", "segment")), ("split_favours", ("low", "high")),
            ("fallback", ("ended", "any", "none")),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in choices:
                raise InvalidInputError(f"tree.{name}", "one of " + ", ".join(map(str, choices)), value)
        temperature = self.split_temperature
        number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
        if not number or not MIN_SPLIT_TEMPERATURE <= temperature < math.inf:
            what = f"a finite number, at least {MIN_SPLIT_TEMPERATURE}"
            raise InvalidInputError("tree.split_temperature", what, temperature)

    @property
    def max_tokens(self) -> int:
        """Of a path."""
        return self.depth * self.segment_tokens

    def num_planned_tokens(self, num_prompt_tokens: int, max_tokens: int | None = None) -> int:
        """Positions that a tree has at its end, prompt included, if every path has `max_tokens` or all its segments."""
        roots, branching = self.max_roots or self.min_roots, self.max_branching or self.branching
        depth = self.depth if max_tokens is None else min(self.depth, -(-max_tokens // self.segment_tokens))
        paths = [min(self.width, roots)]
        while len(paths) < depth and paths[-1] < self.width:
            paths.append(min(self.width, paths[-1] * branching) if branching > 1 else self.width)
        num_segments = sum(paths) + self.width * (depth - len(paths))
        return num_prompt_tokens + num_segments * self.segment_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class PathFigures:
    """A path at a boundary or at its end.

    Attributes:
        num_tokens: output tokens, those before its birth included.
        path_mean, segment_mean: of what `TreeSpec.split` looks at, over its tokens, and over those of its last segment.

    """

    num_tokens: int
    path_mean: float = 0.0
    segment_mean: float = 0.0


@dataclass(frozen=True, slots=True)
class Birth:
    """A member begins as a branch.

    Attributes:
        child: the member.
        parent: whose first `at` output tokens it has.
        at: in tokens.
        reason: at a boundary of a path, or inside of one that ended.
        probability: of this decision, given all before: of drawing that many branches there, or that place.

    """

    child: int
    parent: int
    at: int
    reason: BirthReason
    probability: float


@dataclass(frozen=True, slots=True)
class TreeStep:
    """What follows from an event: members that are born, paths that go on, members that never will begin."""

    births: list[Birth] = field(default_factory=list)
    going_on: list[int] = field(default_factory=list)
    dismissed: list[int] = field(default_factory=list)


class TreePolicy:
    """The tree of one group; members are `0 .. width - 1`.

    Args:
        spec: how it grows.
        seed: of its decisions.
        begun: of a tree that was stopped: its paths that have not ended. What paths had given is forgotten.
        ended: of such a tree: the tokens of each path that ended, and whether it did by itself.

    Attributes:
        roots: members that begin at the prompt; none of a tree that was stopped.

    """

    def __init__(
        self,
        spec: TreeSpec,
        seed: int,
        begun: Mapping[int, PathFigures] | None = None,
        ended: Mapping[int, tuple[int, bool]] | None = None,
    ) -> None:
        self.spec = spec
        self._active: dict[int, PathFigures] = dict(begun or {})
        self._ended: dict[int, tuple[int, bool]] = dict(ended or {})
        known = self._active.keys() | self._ended.keys()
        self._rng = random.Random(f"tree {seed} {len(known)} {len(self._ended)}" if known else f"tree {seed}")
        self.roots: list[int] = []
        if not known:
            count = min(spec.width, self._rng.randint(spec.min_roots, spec.max_roots or spec.min_roots))
            self.roots = list(range(count))
            self._active = {index: PathFigures(num_tokens=0) for index in self.roots}
        self._unborn = [index for index in range(spec.width) if index not in self._active.keys() | known]
        #: Paths that wait at a boundary, in the order of their arrival.
        self._waiting: dict[int, None] = {}
        #: Branches that paths that ended have given, and nobody has taken.
        self._given = 0

    @property
    def num_unborn(self) -> int:
        """Members that have not begun."""
        return len(self._unborn)

    def begin(self) -> TreeStep:
        """The tree begins, or goes on."""
        return TreeStep(going_on=list(self._active)) if self._active else self._fall_back()

    def is_waiting(self, index: int) -> bool:
        """A path waits for others at its boundary."""
        return index in self._waiting

    def reach(self, index: int, figures: PathFigures) -> TreeStep:
        """A path is at a boundary, and not over."""
        assert index in self._active
        assert index not in self._waiting
        self._active[index] = figures
        if self.spec.synchronous and self._unborn:
            self._waiting[index] = None
            return self._level()
        births = self._branches(index, *self._draw(index))
        return TreeStep(births=births, going_on=[index])

    def end(self, index: int, num_tokens: int, *, by_itself: bool) -> None:
        """A path ended, `by_itself` or because its budget was spent, or somebody ended it; `settle` is next."""
        del self._active[index]
        self._waiting.pop(index, None)
        self._ended[index] = num_tokens, by_itself
        if self.spec.transfer:
            self._given += self.spec.branching

    def drop(self, index: int) -> None:
        """A member will never begin: one that is unborn, or before `begin` any; `settle` is next."""
        if index in self._unborn:
            self._unborn.remove(index)
        else:
            del self._active[index]
            self._ended[index] = 0, False

    def settle(self) -> TreeStep:
        """What follows from the paths that ended, and from members that will never begin."""
        return self._level() if self._active else self._fall_back()

    # ---- branches ----------------------------------------------------------------------------------------------

    def _draw(self, index: int) -> tuple[int, float]:
        """How many branches leave a path at its boundary, and how likely that was."""
        branching, chance = self._branching()
        if self.spec.split == "uniform":
            share = -(-self._given // len(self._active))
            return branching - 1 + share, chance
        wanted = ((branching - 1) * len(self._active) + self._given) * self._weights()[index]
        whole = math.floor(wanted)
        part = wanted - whole
        more = self._rng.random() < part
        return whole + more, chance * (part if more else 1 - part)

    def _branching(self) -> tuple[int, float]:
        low, high = self.spec.branching, self.spec.max_branching or self.spec.branching
        return self._rng.randint(low, high), 1 / (high - low + 1)

    def _branches(self, index: int, count: int, probability: float) -> list[Birth]:
        count = min(count, len(self._unborn))
        self._given = max(0, self._given - max(0, count - (self.spec.branching - 1)))
        children, self._unborn = self._unborn[:count], self._unborn[count:]
        figures = self._active[index]
        for child in children:
            self._active[child] = figures
        return [Birth(child, index, figures.num_tokens, "boundary", probability) for child in children]

    def _weights(self) -> dict[int, float]:
        """Softmax over active paths."""
        spec = self.spec
        sign = -1.0 if spec.split_favours == "low" else 1.0
        values = {
            index: sign * (one.path_mean if spec.split_scope == "path" else one.segment_mean) / spec.split_temperature
            for index, one in self._active.items()
        }
        top = max(values.values())
        powers = {index: math.exp(value - top) for index, value in values.items()}
        total = math.fsum(powers.values())
        return {index: power / total for index, power in powers.items()}

    # ---- levels ------------------------------------------------------------------------------------------------

    def _level(self) -> TreeStep:
        """Share out the branches of a level, once every path is at its boundary; nobody waits if none are left."""
        if not self._waiting or (self._unborn and len(self._waiting) < len(self._active)):
            return TreeStep()
        waiting, self._waiting = list(self._waiting), {}
        branching, chance = self._branching()
        budget = min(len(self._active) + len(self._unborn), branching * len(waiting) + self._given)
        if self.spec.split == "uniform":
            shares = _split_evenly(budget, len(waiting))
        else:
            weights = self._weights()
            shares = _split_by_weight(budget, [weights[index] for index in waiting])
        self._given = 0
        births = [
            birth
            for index, share in zip(waiting, shares, strict=True)
            for birth in self._branches(index, share - 1, chance)
        ]
        return TreeStep(births=births, going_on=waiting)

    # ---- fallback ----------------------------------------------------------------------------------------------

    def _fall_back(self) -> TreeStep:
        """Nobody goes on: unborn members begin inside of paths that ended, or at the prompt, or never."""
        if not self._unborn:
            return TreeStep()
        self._given = 0
        if self.spec.fallback == "none":
            dismissed, self._unborn = self._unborn, []
            return TreeStep(dismissed=dismissed)
        candidates = sorted(i for i, (_, by_itself) in self._ended.items() if by_itself or self.spec.fallback == "any")
        births: list[Birth] = []
        while self._unborn:
            parent = self._rng.choice(candidates or sorted(self._ended))
            places = self._places(self._ended[parent][0]) if candidates else [0]
            at = self._rng.choice(places)
            probability = 1 / (len(candidates or self._ended) * len(places))
            for _ in range(min(self.spec.branching, len(self._unborn))):
                child = self._unborn.pop(0)
                self._active[child] = PathFigures(num_tokens=at)
                births.append(Birth(child, parent, at, "fallback", probability))
        return TreeStep(births=births)

    def _places(self, num_tokens: int) -> Sequence[int]:
        """Boundaries inside of a path that ended; the prompt if there is none."""
        size = self.spec.segment_tokens
        last = min((num_tokens - 1) // size, self.spec.depth - 1)
        return [place * size for place in range(1, last + 1)] or [0]


def _split_evenly(budget: int, count: int) -> list[int]:
    """At least 1 each; what is left over goes to the last, as TreePO's sampler has it."""
    budget = max(budget, count)
    shares = [budget // count] * count
    shares[-1] += budget % count
    return shares


def _split_by_weight(budget: int, weights: Sequence[float]) -> list[int]:
    """At least 1 each, the rest by weight with the largest remainders rounded up."""
    free = max(0, budget - len(weights))
    exact = [free * weight for weight in weights]
    shares = [1 + math.floor(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: (math.floor(exact[i]) - exact[i], i))
    for place in order[: free - sum(math.floor(share) for share in exact)]:
        shares[place] += 1
    return shares


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidInputError(f"tree.{name}", f"an integer in [{low}, {high}]", value)
