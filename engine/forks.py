"""What a caller asks for when it forks a trajectory, and the answer on its way."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from longtail.engine.config import MAX_SEED
from longtail.engine.driver import EngineDriver
from longtail.engine.errors import EngineDeadError, InvalidInputError
from longtail.engine.rounds import check_count
from longtail.engine.trajectory import Trajectory
from longtail.engine.trajectory_parts import branch_seed
from longtail.scheduler.fork_order import ForkOrder, ForkPoint
from longtail.scheduler.limits import MAX_GROUP_SIZE

if TYPE_CHECKING:
    from longtail.engine.core_link import CoreLink


@dataclass(slots=True)
class Fork:
    """A fork that was asked for.

    Attributes:
        trajectory_id: of the parent.
        indices: of the branches.
        seeds: of the branches, `None` for what follows from the parent's.
        order: what the scheduler was told.
        answer: its answer.
        is_taken: the branches are members of their group.

    """

    trajectory_id: str
    indices: range
    seeds: Sequence[int] | None
    order: ForkOrder
    answer: Future[ForkPoint]
    is_taken: bool = False

    def seeds_after(self, parent: int | None) -> list[int | None]:
        """A seed for each branch."""
        return [branch_seed(parent, index) for index in self.indices] if self.seeds is None else list(self.seeds)

    def was_late(self, error: InvalidInputError) -> bool:
        """Whether the scheduler refused because it had stopped the parent already."""
        return error.field in ("round", "group") or (error.field == "at" and self.order.at is None)

    def give_up(self, driver: EngineDriver) -> None:
        """Tell the scheduler, unless the fork was taken."""
        if self.is_taken:
            return

        def forget(link: CoreLink) -> None:
            if not self.answer.cancelled() and self.answer.exception() is None:
                where = {"round": self.order.round, "group": self.order.group, "index": self.answer.result().index}
                link.rpc("give_up_fork", keys=self.order.keys, **where)

        with contextlib.suppress(EngineDeadError):
            driver.call_later(forget)


def check_fork(at: object, n: object, seeds: object, *, max_tokens: int, ended: Trajectory | None) -> None:
    """Check the arguments of a fork of a trajectory with that budget.

    Args:
        at: where to fork, in output tokens.
        n: number of branches.
        seeds: theirs.
        max_tokens: output budget of the trajectory, and so of the branches.
        ended: the trajectory, if it does not run any more.

    Raises:
        InvalidInputError: names the argument.

    """
    check_count("n", n, MAX_GROUP_SIZE)
    if seeds is not None:
        if isinstance(seeds, str) or not isinstance(seeds, Sequence) or len(seeds) != n:
            raise InvalidInputError("seeds", f"{n} integers, one a branch", seeds)
        for place, seed in enumerate(seeds):
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
                raise InvalidInputError(f"seeds[{place}]", f"an integer in [0, {MAX_SEED}]", seed)
    check_position(at, max_tokens=max_tokens, ended=ended)


def check_position(at: object, *, max_tokens: int, ended: Trajectory | None) -> None:
    """Check where to fork; see `check_fork`.

    Raises:
        InvalidInputError: names `at`.

    """
    if at is None:
        if ended is not None:
            raise InvalidInputError("at", "a position, because the trajectory does not run any more", at)
        return
    num_tokens = max_tokens if ended is None else len(ended.output_token_ids)
    # A branch that has all of a complete trajectory has nothing left to sample.
    high = min(max_tokens - 1, num_tokens - 1 if ended is not None and ended.ended_by_itself else num_tokens)
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at <= high:
        raise InvalidInputError("at", f"an integer in [0, {high}], in output tokens", at)


def ask_scheduler(driver: EngineDriver, order: ForkOrder) -> Future[ForkPoint]:
    """Send an order between two steps.

    The future raises `InvalidInputError` for what the scheduler refuses.
    """
    args = msgspec.to_builtins(order)
    return driver.call_later(lambda link: msgspec.convert(link.rpc("fork", **args), ForkPoint))
