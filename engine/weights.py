"""Changes the engine's weights between two steps, and tells everybody who has to know.

Nothing is in flight meanwhile: the scheduler is paused and drained, so that every token has the version of the weights
that it was sampled from, with asynchronous scheduling too. Functions that take a driver run in its thread.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longtail.engine.carry_config import CarryConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.weight_answers import WeightsLostError, raise_worst
from longtail.engine.weight_backend import LONGTAIL_BACKEND

if TYPE_CHECKING:
    from longtail.engine.core_link import CoreLink
    from longtail.engine.driver import EngineDriver

#: A step of one of vLLM's own weight transfers.
ControlOp = Literal["init", "start", "update", "finish"]


def checked_version(version: int | None, current: int, *, may_repeat: bool = False) -> int:
    """The version of the next weights: one more by default. It never goes back: a version names one set of weights.

    Raises:
        InvalidInputError: it is not a later version, or the same one where that may be.

    """
    if version is None:
        return current + 1
    lowest = current if may_repeat else current + 1
    if isinstance(version, bool) or not isinstance(version, int) or version < lowest:
        relation = "of at least" if may_repeat else "above"
        raise InvalidInputError("version", f"an integer {relation} {current}, the current version", version)
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

    When loading fails half-way, the engine has some of the new weights under the old version: load again before the
    next round.
    """
    link.call("pause_scheduler", "keep", False)
    try:
        driver.drain()
        if checkpoint is not None:
            link.call("collective_rpc", "reload_weights", None, (), {"weights_path": checkpoint})
        _set_version(driver, link, version)
        driver.segment_token = None
    finally:
        link.call("resume_scheduler")


def update_weights(driver: EngineDriver, link: CoreLink, version: int, update_info: Mapping[str, Any]) -> float:
    """Load weights from a `WeightSegment` and make `version` the current one; returns the pause in seconds.

    Raises:
        InvalidInputError: they are not the model's; nothing was changed.
        WeightsApplyError: they did not load; the old ones are back.
        WeightsLostError: the old ones did not load either; the engine was given up.

    """
    base = update_info.get("base")
    token = base.get("token") if isinstance(base, Mapping) else None
    if driver.segment_token is not None and token != driver.segment_token:
        raise InvalidInputError("update_info.base", "the segment that the engine's weights came from", base)
    if driver.segment_token is None and base is None:
        update_info = {**update_info, "base": "checkpoint"}
    began = time.monotonic()
    link.call("pause_scheduler", "keep", False)
    try:
        driver.drain()
        answers = _on_workers(link, "longtail_update_weights", update_info)
        is_changed = [not answer for answer in answers]
        if any(is_changed) and not all(is_changed):
            answers += _on_workers(link, "longtail_restore_weights", update_info)
        raise_worst(answers)
        try:
            _set_version(driver, link, version)
        except Exception as error:
            raise WeightsLostError(f"the new weights are in, but not their version: {error!r}") from error
        driver.segment_token = update_info["token"]
    except WeightsLostError as error:
        driver.give_up("a change of weights", error)
        raise
    finally:
        if not driver.is_given_up:
            link.call("resume_scheduler")
    return time.monotonic() - began


def control_weights(
    driver: EngineDriver, link: CoreLink, op: ControlOp, info: Mapping[str, Any], version: int | None
) -> None:
    """One step of vLLM's own weight transfer; no step of the engine runs from `start` to `finish`.

    Raises:
        InvalidInputError: another step comes next.
        Exception: what vLLM says. A step after `start` that fails leaves weights of two versions, and vLLM can't put
            the old ones back: the engine was given up.

    """
    if op == "init":
        link.call("collective_rpc", "init_weight_transfer_engine", None, (), {"init_info": dict(info)})
        return
    if (op == "start") is driver.is_paused:
        raise InvalidInputError("op", "update or finish after start" if driver.is_paused else "start first", op)
    if op == "start":
        link.call("pause_scheduler", "keep", False)
        try:
            driver.drain()
            link.call("collective_rpc", "start_weight_update")
        except BaseException:
            link.call("resume_scheduler")
            raise
        driver.is_paused = True
        return
    try:
        if op == "update":
            link.call("collective_rpc", "update_weights", None, (), {"update_info": dict(info)})
            return
        assert version is not None
        link.call("collective_rpc", "finish_weight_update")
        _set_version(driver, link, version)
    except Exception as error:
        driver.give_up("a change of weights", error)
        raise
    driver.segment_token = None
    driver.is_paused = False
    link.call("resume_scheduler")


def weights_checksum(link: CoreLink) -> str:
    """SHA-256 over vLLM's digests of the tensors that the model computes with, 64 hexadecimal digits."""
    digests: dict[str, str] = {}
    for worker in link.call("compute_weight_checksums"):
        digests.update(worker)
    return hashlib.sha256("".join(f"{name}\0{digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def check_backend(driver: EngineDriver, *, is_own: bool) -> None:
    """The engine was started with longtail's weight transfer backend, or with one of vLLM's.

    Raises:
        InvalidInputError: it was not.

    """
    backend = driver.config.weight_transfer
    if (backend == LONGTAIL_BACKEND) is not is_own:
        expected = LONGTAIL_BACKEND if is_own else "one of vLLM's own, for its own transfer"
        raise InvalidInputError("engine.weight_transfer", expected, backend)


def declare_first_version(link: CoreLink, version: int) -> None:
    """Name the weights that the engine has started with."""
    link.call("set_weight_version", str(version))
    if version:
        link.rpc("weights", version=version)


def _set_version(driver: EngineDriver, link: CoreLink, version: int) -> None:
    if version == driver.weight_version:
        # Other weights under the version that the engine was started with: no KV of those before may be hit.
        link.call("reset_prefix_cache")
        return
    carry = driver.config.carry or CarryConfig()
    link.call("set_weight_version", str(version))
    link.rpc("weights", version=version, kv_policy=carry.kv_policy, share_prefix=carry.share_prefix)
    driver.weight_version = version


def _on_workers(link: CoreLink, method: str, update_info: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(link.call("collective_rpc", method, None, (), {"update_info": dict(update_info)}))
