"""The rollout engine: facade, trajectory types, patch ledger, server and command line.

The names below are loaded on first use, so that importing a type costs no vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longtail.engine.async_rollout_engine import AsyncRolloutEngine
    from longtail.engine.carry_config import CarryConfig
    from longtail.engine.config import EngineConfig, RuntimeConfig, SamplingConfig
    from longtail.engine.prompts import Prompt
    from longtail.engine.rollout_engine import RolloutEngine
    from longtail.engine.trajectory import CarryStats, Group, Round, RoundStats, Trajectory
    from longtail.scheduler.tree_policy import TreeSpec

_HOMES = {
    "AsyncRolloutEngine": "async_rollout_engine",
    "CarryConfig": "carry_config",
    "CarryStats": "trajectory",
    "EngineConfig": "config",
    "Group": "trajectory",
    "Prompt": "prompts",
    "RolloutEngine": "rollout_engine",
    "Round": "trajectory",
    "RoundStats": "trajectory",
    "RuntimeConfig": "config",
    "SamplingConfig": "config",
    "Trajectory": "trajectory",
    "TreeSpec": "config",
}

__all__ = [
    "AsyncRolloutEngine",
    "CarryConfig",
    "CarryStats",
    "EngineConfig",
    "Group",
    "Prompt",
    "RolloutEngine",
    "Round",
    "RoundStats",
    "RuntimeConfig",
    "SamplingConfig",
    "Trajectory",
    "TreeSpec",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
