"""Changes the engine's weights between two steps, and tells everybody who has to know.

Nothing is in flight meanwhile: the scheduler is paused and drained, so that every token has the version of the weights
that it was sampled from, with asynchronous scheduling too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from longtail.engine.carry_config import CarryConfig
from longtail.engine.errors import InvalidInputError

if TYPE_CHECKING:
    from longtail.engine.core_link import CoreLink
    from longtail.engine.driver import EngineDriver


def checked_version(version: int | None, current: int) -> int:
    """The version of the next weights: one more by default. It never goes back: a version names one set of weights.

    Raises:
        InvalidInputError: it is not a later version.

    """
    if version is None:
        return current + 1
    if isinstance(version, bool) or not isinstance(version, int) or version <= current:
        raise InvalidInputError("version", f"an integer above {current}, the current version", version)
    return version


def checked_checkpoint(path: str | os.PathLike[str]) -> str:
    """A folder with weights.

    Raises:
        InvalidInputError: there are none.

    """
    if not any(Path(path).glob("*.safetensors")):
        raise InvalidInputError("checkpoint", "a folder with .safetensors files", str(path))
    return str(path)


def change_weights(driver: EngineDriver, link: CoreLink, version: int, checkpoint: str | None) -> None:
    """Load `checkpoint`, or nothing where the caller changed the weights himself, and make `version` the current one.

    Runs in the driver's thread. When loading fails half-way, the engine has some of the new weights under the old
    version: load again before the next round.
    """
    carry = driver.config.carry or CarryConfig()
    link.call("pause_scheduler", "keep", False)
    try:
        driver.drain()
        if checkpoint is not None:
            link.call("collective_rpc", "reload_weights", None, (), {"weights_path": checkpoint})
        link.call("set_weight_version", str(version))
        link.rpc("weights", version=version, kv_policy=carry.kv_policy, share_prefix=carry.share_prefix)
        driver.weight_version = version
    finally:
        link.call("resume_scheduler")


def declare_first_version(link: CoreLink, version: int) -> None:
    """Name the weights that the engine has started with."""
    link.call("set_weight_version", str(version))
    if version:
        link.rpc("weights", version=version)
