"""`longtail serve --bridge`: an engine, for a trainer in another process, until it is told to stop.

The address is bound before the model loads, so that a taken port fails at once. When the trainer is served, one line
goes to stdout: `LONGTAIL_BRIDGE {"address": ..., "model": ..., "pid": ..., "engine_id": ..., "server_key": ...}`.
SIGTERM and SIGINT end it with exit code 0; rounds that ran are asked for again by the trainer. When the engine or the
state folder fails, the trainer is told, and the exit code is 1.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console

from longtail.engine.carry_config import CarryConfig
from longtail.engine.cli.engine_output import longtail_log_on
from longtail.engine.cli.failures import StoppedBySignal, signals_raise
from longtail.engine.cli.model import make_ready
from longtail.engine.cli.options import BridgeOptions, CarryOptions, engine_config
from longtail.engine.errors import EngineDeadError, InvalidInputError

if TYPE_CHECKING:
    from longtail.engine.config import EngineConfig
    from longtail.engine.rollout_engine import RolloutEngine
    from longtail.trainer_bridge.service.service import BridgeService

READY_PREFIX = "LONGTAIL_BRIDGE "
ENGINE_FILE = "engine.journal"

_POLL_S = 0.1
#: How long a trainer may take to hear that the engine is dead, in heartbeats.
_LAST_HEARTBEATS = 3


def check_options(bridge: BridgeOptions, carry: CarryOptions, server: Mapping[str, Any]) -> None:
    """Options of the bridge and of the HTTP server do not go together.

    Raises:
        InvalidInputError: names one that is out of place.

    """
    if bridge.bridge is not None:
        given, expected = server, "nothing, because with --bridge there is no HTTP server"
    else:
        given, expected = bridge.given() | carry.given(), "--bridge with it"
    for name, value in given.items():
        if value is not False:
            raise InvalidInputError(name, expected, str(value))


def serve_bridge(
    model: str, fields: Mapping[str, Any], bridge: BridgeOptions, carry: CarryOptions, console: Console
) -> None:
    """See the module.

    Args:
        model: as `EngineConfig.model`.
        fields: of `EngineConfig`, as the user set them.
        bridge: what the user set.
        carry: what the user set.
        console: for what is said to people.

    Raises:
        LongtailError: it can't start, or the engine or the state folder failed.

    """
    from longtail.trainer_bridge.service.config import BridgeConfig
    from longtail.trainer_bridge.service.door import Door

    given = bridge.given()
    port, address = given.pop("metrics_port", None), given.pop("bridge")
    settings = BridgeConfig(address=address, **given)
    journal = None if bridge.state is None else bridge.state / ENGINE_FILE
    config = engine_config(model, {**fields, "carry": CarryConfig(journal=journal, **carry.given())})
    # Standard output carries the line that says where the bridge is.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        with signals_raise(), longtail_log_on(console), Door(settings) as door:
            config, needed = _with_journal(config, journal)
            config = dataclasses.replace(config, model=str(make_ready(model, "float32", console)))
            from longtail.engine.rollout_engine import RolloutEngine
            from longtail.trainer_bridge.service.service import BridgeService

            with (
                RolloutEngine(config) as engine,
                BridgeService(engine, settings, weights_needed=needed, door=door) as service,
            ):
                _serve(engine, service, model, port)
    except StoppedBySignal:
        return


def _with_journal(config: EngineConfig, journal: Path | None) -> tuple[EngineConfig, int | None]:
    """The version that the engine has to say it has, and the weights that it needs where it does not have them."""
    from longtail.engine.carry_book import newest_version
    from longtail.trainer_bridge.service.state_folder import pushed_version

    if journal is None:
        return config, None
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"a folder that can be made ({error.strerror})"
        raise InvalidInputError("bridge.state", what, str(journal.parent)) from error
    newest = max(newest_version(journal), pushed_version(journal.parent))
    if newest <= config.weight_version:
        return config, None
    return dataclasses.replace(config, weight_version=newest), newest


def _serve(engine: RolloutEngine, service: BridgeService, model: str, port: int | None) -> None:
    from longtail.trainer_bridge.service.metrics import MetricsServer

    metrics = None if port is None else MetricsServer(service, port)
    try:
        line = {
            "address": service.address,
            "model": model,
            "pid": os.getpid(),
            "engine_id": service.engine_id,
            "server_key": service.server_key,
        }
        if metrics is not None:
            line["metrics_port"] = metrics.port
        sys.stdout.write(f"{READY_PREFIX}{msgspec.json.encode(line).decode()}\n")
        sys.stdout.flush()
        while service.failure is None and (death := engine.how_it_ended()) is None:
            time.sleep(_POLL_S)
        time.sleep(_LAST_HEARTBEATS * service.config.heartbeat_s)
        raise service.failure or EngineDeadError("serving", death or "")
    finally:
        if metrics is not None:
            metrics.close()
