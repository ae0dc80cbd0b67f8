"""The staging of pushed weights that a service makes for its engine, from the engine's checkpoint."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

from longtail.engine.models import resolve_model
from longtail.engine.weight_backend import LONGTAIL_BACKEND
from longtail.engine.weight_manifest import Manifest
from longtail.scheduler.errors import LongtailError
from longtail.trainer_bridge.service.config import BridgeConfig
from longtail.trainer_bridge.service.engine_port import Engine
from longtail.trainer_bridge.weights.ring import Ring
from longtail.trainer_bridge.weights.staging import Staging

_logger = logging.getLogger("longtail.trainer_bridge.service.own_staging")


class OwnStaging:
    """A staging with the thread that works differences in; `close` gives both up."""

    def __init__(self, staging: Staging, executor: ThreadPoolExecutor) -> None:
        self.staging = staging
        self._executor = executor

    def close(self) -> None:
        """When nothing is being applied any more."""
        self._executor.shutdown(cancel_futures=True)
        self.staging.close()


def own_staging(engine: Engine, config: BridgeConfig, weights_needed: int | None) -> OwnStaging | None:
    """Made for the engine's checkpoint; `None` where that has no weights to go by, or vLLM's own transfer is used.

    Args:
        engine: which has the checkpoint's weights, or newer ones.
        config: sizes.
        weights_needed: the engine has other weights than its version says, and needs those of this one.

    """
    if engine.config.weight_transfer != LONGTAIL_BACKEND:
        return None
    try:
        folder = resolve_model(engine.config.model)
        manifest = Manifest.of_checkpoint(folder)
        ring = Ring.create(config.num_slots, config.slot_bytes)
    except (LongtailError, OSError) as error:
        _logger.warning("no weights can be pushed to this engine: %s", error)
        return None
    is_loaded = engine.weight_version == engine.config.weight_version
    executor = ThreadPoolExecutor(1, thread_name_prefix="longtail-bridge-delta")
    staging = Staging(
        manifest,
        version=engine.weight_version if weights_needed is None else weights_needed,
        checkpoint=folder if is_loaded else None,
        window=config.num_chunks,
        chunk_bytes=config.chunk_bytes,
        ring=ring,
        is_needed=weights_needed is not None,
        executor=executor,
    )
    return OwnStaging(staging, executor)
