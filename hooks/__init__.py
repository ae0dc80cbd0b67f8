"""Training hooks: what a recipe plugs into the life of a rollout.

A hook is a plain object with any of `on_prompt`, `on_boundary`, `on_trajectory`, `on_group` and `on_weights`, each a
plain or a coroutine function; `Hooks` runs them beside the engine, each call for a limited time and with a defined
outcome when it fails. The whole contract is the docstring of `longtail.hooks.protocol`. `RewardFunction` and
`TaskReward` set rewards; `RewardSpread`, `MeanReward` and `GroupFilter` filter groups.

    class Length:
        time_limit_s = 5.0

        def on_trajectory(self, trajectory):
            return msgspec.structs.replace(trajectory, reward=-float(len(trajectory.output_token_ids)))

    with Hooks([Length(), RewardSpread()]) as hooks:
        trajectory = hooks.finish_trajectory(trajectory).result()
"""

from longtail.hooks.errors import HookError, StuckHooksError
from longtail.hooks.filters import GroupFilter, MeanReward, RewardSpread
from longtail.hooks.protocol import Accept, Append, Continue, Decision, Fork, OnFailure, Point, Reject, Stop
from longtail.hooks.rewards import RewardFunction, TaskReward
from longtail.hooks.runner import Hooks
from longtail.hooks.stats import HookStats, PointStats

__all__ = [
    "Accept",
    "Append",
    "Continue",
    "Decision",
    "Fork",
    "GroupFilter",
    "HookError",
    "HookStats",
    "Hooks",
    "MeanReward",
    "OnFailure",
    "Point",
    "PointStats",
    "Reject",
    "RewardFunction",
    "RewardSpread",
    "Stop",
    "StuckHooksError",
    "TaskReward",
]
