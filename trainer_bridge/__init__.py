"""The ZeroMQ bridge between an engine and a trainer in another process: trajectories out, weights in.

The names below are loaded on first use. Those of the client need neither vLLM nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longtail.trainer_bridge.async_client import AsyncBridgeClient
    from longtail.trainer_bridge.client import BridgeClient
    from longtail.trainer_bridge.errors import (
        BridgeClosedError,
        BridgeError,
        BridgeRefusedError,
        BridgeTimeoutError,
        WeightsPushError,
    )
    from longtail.trainer_bridge.fleet import BridgeFleet, FleetCursor
    from longtail.trainer_bridge.keys import ClientKeys
    from longtail.trainer_bridge.service.config import BridgeConfig
    from longtail.trainer_bridge.service.service import BridgeService
    from longtail.trainer_bridge.wire import Cursor

_HOMES = {
    "AsyncBridgeClient": "async_client",
    "BridgeClient": "client",
    "BridgeClosedError": "errors",
    "BridgeConfig": "service.config",
    "BridgeError": "errors",
    "BridgeFleet": "fleet",
    "BridgeRefusedError": "errors",
    "BridgeService": "service.service",
    "BridgeTimeoutError": "errors",
    "ClientKeys": "keys",
    "Cursor": "wire",
    "FleetCursor": "fleet",
    "WeightsPushError": "errors",
}

__all__ = [
    "AsyncBridgeClient",
    "BridgeClient",
    "BridgeClosedError",
    "BridgeConfig",
    "BridgeError",
    "BridgeFleet",
    "BridgeRefusedError",
    "BridgeService",
    "BridgeTimeoutError",
    "ClientKeys",
    "Cursor",
    "FleetCursor",
    "WeightsPushError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
