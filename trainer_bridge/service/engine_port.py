"""What the service needs of an engine: `RolloutEngine` as it is, or a test's stand-in; and of a staging of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

from longtail.engine.config import EngineConfig, SamplingConfig
from longtail.engine.prompts import PromptLimits, Tokenizer
from longtail.engine.trajectory import Group, Round, Trajectory
from longtail.trainer_bridge import wire


class RunningRound(Iterator[Trajectory], Protocol):
    """See `RoundStream`."""

    @property
    def round(self) -> Round: ...
    def interrupt(self, error: Exception) -> None: ...
    def close(self) -> None: ...


class RunningStream(Iterator[Group], Protocol):
    """See `GroupStream`."""

    def stop(self) -> None: ...
    def close(self) -> None: ...


class Engine(Protocol):
    """See `RolloutEngine`. Every method may be called from any thread, several at once."""

    @property
    def config(self) -> EngineConfig: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def limits(self) -> PromptLimits: ...
    @property
    def weight_version(self) -> int: ...
    @property
    def num_in_flight(self) -> int: ...
    @property
    def num_prompts_used(self) -> int: ...
    @property
    def round_to_give_again(self) -> str | None: ...

    def how_it_ended(self) -> str | None: ...

    def stream_trajectories(
        self,
        prompts: Any,
        *,
        group_size: int,
        target_groups: int | None,
        over_provision: float | None,
        sampling: SamplingConfig,
        round_id: str | None,
        carry: bool,
    ) -> RunningRound: ...

    def stream(self, prompts: Any, *, group_size: int, num_groups: int, sampling: SamplingConfig) -> RunningStream: ...

    def update_weights(self, update_info: Mapping[str, Any], version: int, *, may_repeat: bool = False) -> float: ...

    def control_weights(
        self,
        op: Literal["init", "start", "update", "finish"],
        info: Mapping[str, Any],
        version: int | None = None,
        *,
        may_repeat: bool = False,
    ) -> None: ...

    def weights_checksum(self) -> str: ...


class Staged(Protocol):
    """Weights that were verified, where the engine finds them, and whether it has exactly these already."""

    @property
    def is_known(self) -> bool: ...

    @property
    def update_info(self) -> dict[str, Any]: ...


class WeightStaging(Protocol):
    """See `Staging`. Its errors have `code`, `field`, `expected` and `got`."""

    @property
    def ring(self) -> wire.RingSpec | None: ...
    @property
    def digest(self) -> str | None: ...

    def begin(self, message: wire.BeginWeights) -> dict[str, int]: ...
    def prepare(self) -> None: ...
    def tensor(self, message: wire.WeightsTensor) -> None: ...
    def chunk(self, message: wire.WeightsChunk, payload: memoryview) -> int | None: ...
    def commit(self, message: wire.CommitWeights) -> Staged: ...
    def applied(self) -> None: ...
    def abort(self) -> bool: ...
