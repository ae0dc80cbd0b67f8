"""`RolloutEngine`: rollouts in a trainer's own process; `async_rollout_engine.py` is the same for asyncio.

Both are thin: their streams wait for what `EngineDriver` delivers, one with a queue and one with an event loop. Every
method checks its arguments before anything is submitted, and every wait is bounded by the configuration's timeouts.

They are not thread-safe against `close()`, but several rounds may run at once, of which one may carry over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, get_args

from longtail.engine.carry_book import CarryBook, VersionChanged
from longtail.engine.carry_run import CarryRun
from longtail.engine.config import EngineConfig, SamplingConfig
from longtail.engine.driver import EngineDriver
from longtail.engine.errors import InvalidInputError, WeightsHookError
from longtail.engine.hook_points import HookPoints
from longtail.engine.prompts import PromptLimits, Tokenizer
from longtail.engine.round_run import RoundProgress, RoundRun
from longtail.engine.round_stream import GroupStream, RoundStream
from longtail.engine.trajectory import Round, Trajectory
from longtail.engine.weights import (
    ControlOp,
    change_weights,
    check_backend,
    checked_checkpoint,
    checked_version,
    control_weights,
    update_weights,
    weights_checksum,
)

if TYPE_CHECKING:
    from longtail.engine.core_link import CoreLink


class EngineAndBook:
    """What the two facades have in common: one driver, and what is kept between rounds."""

    def __init__(self, config: EngineConfig, hooks: HookPoints | None) -> None:
        if hooks is not None and config.carry is None:
            raise InvalidInputError("hooks", "EngineConfig.carry with them, whose rounds call them", hooks)
        self.hooks = hooks
        self.book = None if config.carry is None else CarryBook(config.carry, hooks, config.weight_version)
        try:
            self.driver = EngineDriver(config)
        except BaseException:
            if self.book is not None:
                self.book.close()
            raise

    def run(
        self,
        prompts: Any,
        *,
        group_size: int,
        target_groups: int | None,
        over_provision: float | None,
        sampling: SamplingConfig,
        round_id: str | None,
        carry: bool,
        can_fork: bool = False,
    ) -> RoundRun | CarryRun:
        """A round, which carries over if the engine is set to, it has a target, and the caller does not object."""
        arguments: dict[str, Any] = {
            "group_size": group_size, "over_provision": over_provision, "sampling": sampling, "round_id": round_id,
            "can_fork": can_fork,
        }  # fmt: skip
        if self.book is None or not carry:
            return RoundRun(self.driver, prompts, target_groups=target_groups, **arguments)
        if target_groups is None:
            raise InvalidInputError("target_groups", "a number, because the rounds of this engine carry over", None)
        return CarryRun(self.driver, self.book, prompts, target_groups=target_groups, **arguments)

    def stream(
        self,
        prompts: Any,
        *,
        group_size: int,
        num_groups: int,
        sampling: SamplingConfig,
        can_fork: bool,
    ) -> CarryRun:
        """A stream without rounds."""
        if self.book is None:
            raise InvalidInputError("engine.carry", "a CarryConfig, because a stream carries groups over", None)
        return CarryRun(
            self.driver, self.book, prompts, group_size=group_size, target_groups=None, over_provision=None,
            sampling=sampling, round_id=None, num_groups=num_groups, can_fork=can_fork,
        )  # fmt: skip

    def change_weights(self, version: int | None, checkpoint: str | os.PathLike[str] | None) -> Future[int]:
        """Change the weights between two steps; the future has the new version."""
        folder = None if checkpoint is None else checked_checkpoint(checkpoint)

        def change(link: CoreLink) -> int:
            new = checked_version(version, self.driver.weight_version)
            change_weights(self.driver, link, new, folder)
            self._tell_run()
            return new

        return self.driver.call_later(change)

    def update_weights(self, update_info: Mapping[str, Any], version: int, *, may_repeat: bool) -> Future[float]:
        """Load pushed weights between two steps; the future has the pause in seconds."""
        check_backend(self.driver, is_own=True)

        def update(link: CoreLink) -> float:
            new = checked_version(version, self.driver.weight_version, may_repeat=may_repeat)
            pause_s = update_weights(self.driver, link, new, update_info)
            self._tell_run()
            return pause_s

        return self.driver.call_later(update)

    def control_weights(
        self, op: ControlOp, info: Mapping[str, Any], version: int | None, *, may_repeat: bool
    ) -> Future[None]:
        """One step of vLLM's own weight transfer, between two steps of the engine."""
        if op not in get_args(ControlOp):
            raise InvalidInputError("op", "one of " + ", ".join(get_args(ControlOp)), op)
        check_backend(self.driver, is_own=False)

        def step(link: CoreLink) -> None:
            current = self.driver.weight_version
            new = checked_version(version, current, may_repeat=may_repeat) if op == "finish" else None
            control_weights(self.driver, link, op, info, new)
            if op == "finish":
                self._tell_run()

        return self.driver.call_later(step)

    def weights_checksum(self) -> Future[str]:
        """Of the running model, between two steps."""
        return self.driver.call_later(weights_checksum)

    def _tell_run(self) -> None:
        if self.book is not None:
            self.book.inbox.post_to_run(VersionChanged())

    def tell_hooks(self, version: int) -> Future[None]:
        """Call the hooks for new weights."""
        if self.hooks is not None:
            return self.hooks.change_weights(version)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def counters(self) -> Future[dict[str, Any]]:
        """The scheduler's counters."""
        return self.driver.call_later(lambda link: link.rpc("counters"))

    def close(self) -> None:
        """Stop the engine, then give up the journal."""
        try:
            self.driver.close()
        finally:
            if self.book is not None:
                self.book.close()


class RolloutEngine:
    """A rollout engine with plain blocking calls. Use it as a context manager.

    Args:
        config: the engine's configuration, or just the model's name.
        hooks: called by rounds that carry over, see `longtail.hooks`.

    Raises:
        ModelSourceError, InvalidInputError, PatchLedgerError, EngineTimeoutError: the engine can't start.
        JournalError: the journal of `config.carry` can't be used.

    """

    def __init__(self, config: EngineConfig | str, hooks: HookPoints | None = None) -> None:
        self.config = EngineConfig(model=config) if isinstance(config, str) else config
        self._engine = EngineAndBook(self.config, hooks)
        self._driver = self._engine.driver

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, `None` when the engine was started without."""
        return self._driver.engine.tokenizer

    @property
    def core_pids(self) -> tuple[int, ...]:
        """Process ids of the engine core; empty when it runs inline."""
        return self._driver.engine.link.pids

    @property
    def weight_version(self) -> int:
        """Version of the weights that the engine samples from."""
        return self._driver.weight_version

    @property
    def limits(self) -> PromptLimits:
        """What prompts the model can take."""
        return self._driver.engine.limits

    @property
    def num_in_flight(self) -> int:
        """Requests that have not ended."""
        return self._driver.num_in_flight

    @property
    def num_prompts_used(self) -> int:
        """Position in the prompts of rounds that carry over: how many were submitted, after a restart too."""
        return 0 if self._engine.book is None else self._engine.book.store.totals.cursor

    @property
    def round_to_give_again(self) -> str | None:
        """Id of a round that was complete when the last process died: the next one that carries over returns it."""
        recovered = None if self._engine.book is None else self._engine.book.store.recovered
        return None if recovered is None else recovered.round_id

    def how_it_ended(self) -> str | None:
        """What ended the engine; `None` while it lives."""
        return self._driver.how_it_ended()

    def rollout(
        self,
        prompts: Any,
        *,
        group_size: int = 1,
        target_groups: int | None = None,
        over_provision: float | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        round_id: str | None = None,
        carry: bool = True,
        on_trajectory: Callable[[Trajectory], None] | None = None,
        on_progress: Callable[[RoundProgress], None] | None = None,
    ) -> Round:
        """Collect one round and return it whole.

        Arguments and errors are those of `stream_trajectories`; `on_trajectory` is called with each trajectory as it
        finishes.
        """
        stream = self.stream_trajectories(
            prompts,
            group_size=group_size,
            target_groups=target_groups,
            over_provision=over_provision,
            sampling=sampling,
            round_id=round_id,
            carry=carry,
            on_progress=on_progress,
        )
        for trajectory in stream:
            if on_trajectory is not None:
                on_trajectory(trajectory)
        return stream.round

    def stream_trajectories(
        self,
        prompts: Any,
        *,
        group_size: int = 1,
        target_groups: int | None = None,
        over_provision: float | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        round_id: str | None = None,
        carry: bool = True,
        can_fork: bool = False,
        on_progress: Callable[[RoundProgress], None] | None = None,
    ) -> RoundStream:
        """Submit one round; iterate over its trajectories as they finish, before any hook has seen them.

        With `EngineConfig.carry` the round begins with the groups that earlier rounds left, unfinished ones and
        complete ones, and takes as many fresh prompts as it needs besides; it returns exactly `target_groups` groups
        and keeps the rest for the next round. A round that was complete when the last process died, so that its caller
        may not have got it, is returned first, under its own id.

        Args:
            prompts: token ids, text, chat messages or `Prompt`s, one a group. Of a round that carries over: all
                prompts of the training run, a sequence in which the engine keeps its position, or an iterator.
            group_size: samples of each prompt.
            target_groups: end the round when so many groups are complete; all of them by default. Every other
                member is stopped in that very step and returned with what it has, `finish_reason="abort"`; a round
                that carries over keeps them.
            over_provision: have `ceil(over_provision * target_groups)` groups in flight, 1 by default; not together
                with `CarryConfig.target_carried`. A round that does not carry over uses only so many of the prompts.
            sampling: how every member is sampled.
            round_id: unique among the engine's running rounds; random by default.
            carry: false for a round of its own, such as an evaluation, in an engine that carries over.
            can_fork: `RoundStream.fork` may branch its trajectories; costs a few bytes a token in the engine core.
            on_progress: called about twice a second with the scheduler's numbers, as far as its steps allow.

        Raises:
            InvalidInputError: an argument is wrong; nothing was submitted.
            EngineDeadError: the engine is dead or closed.
            EngineTimeoutError: it made no step for `stall_timeout_s`.
            JournalError: the journal could not be written. Groups that it does not have were not submitted, and a round
                that it does not have is not returned.
            HookError: a hook failed whose outcome is to end the round.

        """
        run = self._engine.run(
            prompts,
            group_size=group_size,
            target_groups=target_groups,
            over_provision=over_provision,
            sampling=sampling,
            round_id=round_id,
            carry=carry,
            can_fork=can_fork,
        )
        return RoundStream(self._driver, run, on_progress)

    def stream(
        self,
        prompts: Any,
        *,
        group_size: int = 1,
        num_groups: int = 64,
        sampling: SamplingConfig = SamplingConfig(),
        can_fork: bool = False,
    ) -> GroupStream:
        """Groups as they are complete, without rounds, for as long as there are prompts; needs `EngineConfig.carry`.

        Args:
            prompts: as for a round that carries over.
            group_size: samples of each prompt.
            num_groups: groups in flight; a group that is given away is replaced by a fresh one.
            sampling: how every member is sampled.
            can_fork: see `stream_trajectories`.

        Raises:
            Exception: those of `stream_trajectories`.

        """
        run = self._engine.stream(
            prompts, group_size=group_size, num_groups=num_groups, sampling=sampling, can_fork=can_fork
        )
        return GroupStream(self._driver, run)

    def load_weights(self, checkpoint: str | os.PathLike[str], version: int | None = None) -> int:
        """Load other weights of the same model, between two steps of whatever runs; returns their version.

        Args:
            checkpoint: a folder with safetensors files.
            version: above the current one; one more by default.

        Raises:
            InvalidInputError: there are no weights, or the version is not above the current one.
            Exception: what vLLM says of weights that do not fit, or a hook failed with.

        """
        return self._change_weights(version, checkpoint, "the weights to be loaded")

    def declare_weights(self, version: int | None = None) -> int:
        """Say that you have changed the weights yourself; see `load_weights`.

        Nothing may run between the change and this: tokens in between would have the old version.
        """
        return self._change_weights(version, None, "the new version")

    def update_weights(self, update_info: Mapping[str, Any], version: int, *, may_repeat: bool = False) -> float:
        """Load weights that lie in shared memory, between two steps of whatever runs: all of them, or none.

        Args:
            update_info: see `weight_transfer.py`.
            version: above the current one.
            may_repeat: it may also be the current one, where the engine was started with other weights than its
                `weight_version` says, and nothing was sampled from them.

        Returns:
            For how long no step ran, in seconds.

        Raises:
            InvalidInputError: they are not the model's, or the version is not above the current one.
            WeightsApplyError: they did not load; the engine goes on with those that it had.
            WeightsLostError: those did not load either; the engine is dead.
            WeightsHookError: the engine has the new weights, and a hook failed.

        """
        pause_s = self._driver.wait(
            self._engine.update_weights(update_info, version, may_repeat=may_repeat), "the weights to be loaded"
        )
        try:
            self._driver.wait(self._engine.tell_hooks(version), "the hooks for new weights")
        except Exception as error:
            raise WeightsHookError(version, pause_s, error) from error
        return pause_s

    def control_weights(
        self, op: ControlOp, info: Mapping[str, Any], version: int | None = None, *, may_repeat: bool = False
    ) -> None:
        """Make a step of vLLM's own weight transfer, in an engine with that `EngineConfig.weight_transfer`.

        Generation pauses from `start` to `finish`.

        Args:
            op: what vLLM's `VLLMWeightSyncClient` has a method for: `init`, `start`, `update`, `finish`.
            info: its argument.
            version: of the new weights, above the current one; with `finish`, one more by default.
            may_repeat: see `update_weights`.

        Raises:
            InvalidInputError: the step is not the next one, or the engine has another backend.
            Exception: what vLLM says. After `start` the engine is dead then, because vLLM can't put weights back.

        """
        future = self._engine.control_weights(op, info, version, may_repeat=may_repeat)
        self._driver.wait(future, f"vLLM to {op} a transfer of weights")
        if op == "finish":
            self._driver.wait(self._engine.tell_hooks(self.weight_version), "the hooks for new weights")

    def weights_checksum(self) -> str:
        """A checksum of the tensors that the model computes with, which may be fused or packed. Takes long."""
        return self._driver.wait(self._engine.weights_checksum(), "checksums of the weights")

    def counters(self) -> dict[str, Any]:
        """The scheduler's counters: rounds, cuts, cut members, kept tokens, free blocks, queues, parked KV."""
        return self._driver.wait(self._engine.counters(), "the scheduler's counters")

    def close(self) -> None:
        """Stop the engine. Safe to call twice."""
        self._engine.close()

    def _change_weights(self, version: int | None, checkpoint: str | os.PathLike[str] | None, what: str) -> int:
        new = self._driver.wait(self._engine.change_weights(version, checkpoint), what)
        self._driver.wait(self._engine.tell_hooks(new), "the hooks for new weights")
        return new
