"""Typed errors of the engine; the shared roots are in `longtail.scheduler.errors`."""

from __future__ import annotations

from longtail.scheduler.errors import InvalidInputError, LongtailError, shown


class PatchLedgerError(LongtailError, RuntimeError):
    """The patch ledger is not in, or the vLLM it would change is not the one it was written for."""


class ModelSourceError(LongtailError, RuntimeError):
    """A checkpoint folder is missing, incomplete or does not match its checksum."""


class EngineDeadError(LongtailError, RuntimeError):
    """The engine core stopped; what was in flight is gone.

    Attributes:
        phase: what the engine was doing, e.g. `rollout`.
        num_in_flight: trajectories that had no final output when the engine died.

    """

    def __init__(self, phase: str, cause: str, num_in_flight: int = 0) -> None:
        self.phase = phase
        self.num_in_flight = num_in_flight
        super().__init__(
            f"the engine core died during {phase} ({cause}); "
            f"{num_in_flight} trajectories in flight have no final output"
        )


class EngineTimeoutError(LongtailError, TimeoutError):
    """A bounded wait ran out.

    Attributes:
        waited_for: whom and what the caller waited for.
        timeout_s: the bound, in seconds.

    """

    def __init__(self, waited_for: str, timeout_s: float) -> None:
        self.waited_for = waited_for
        self.timeout_s = timeout_s
        super().__init__(f"waited {timeout_s:g} s for {waited_for}")


class WeightsApplyError(LongtailError, RuntimeError):
    """New weights did not load. The engine has its old ones, and goes on with them.

    Attributes:
        code: what a trainer is told, see `longtail.trainer_bridge.wire.RefusalCode`.

    """

    code = "apply"


class WeightsHookError(LongtailError, RuntimeError):
    """The engine has new weights, and a hook that was told of them failed.

    Attributes:
        version: of the weights.
        pause_s: for how long no step ran.

    """

    def __init__(self, version: int, pause_s: float, error: Exception) -> None:
        self.version = version
        self.pause_s = pause_s
        super().__init__(f"the engine has the weights of version {version}, but a hook failed: {error}")


__all__ = [
    "EngineDeadError",
    "EngineTimeoutError",
    "InvalidInputError",
    "LongtailError",
    "ModelSourceError",
    "PatchLedgerError",
    "WeightsApplyError",
    "WeightsHookError",
    "shown",
]
