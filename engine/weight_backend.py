"""Makes longtail's ways of taking new weights known to vLLM, as weight transfer backends."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from longtail.engine.patches.on_import import ImportHooks

LONGTAIL_BACKEND = "longtail"

#: vLLM's name for what `EngineConfig.weight_transfer` calls so.
VLLM_BACKENDS: Mapping[str, str] = {LONGTAIL_BACKEND: LONGTAIL_BACKEND, "nccl": "nccl", "ipc": "longtail_ipc"}
_CLASSES = {
    LONGTAIL_BACKEND: ("longtail.engine.weight_transfer", "LongtailWeightTransferEngine"),
    "longtail_ipc": ("longtail.engine.ipc_transfer", "PlainIPCWeightTransferEngine"),
}

_FACTORY = "vllm.distributed.weight_transfer.factory"
_hooks = ImportHooks()


def register_backends() -> None:
    """Register them in this process, as soon as vLLM's factory is imported. Safe to call again."""
    if not _hooks.is_armed(_FACTORY):
        _hooks.add(_FACTORY, _register)


def _register(factory: ModuleType) -> None:
    registry = factory.WeightTransferEngineFactory
    for backend, (module, name) in _CLASSES.items():
        if backend not in registry._registry:
            registry.register_engine(backend, module, name)
