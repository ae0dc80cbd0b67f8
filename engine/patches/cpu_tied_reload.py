"""New weights on a CPU reach an output layer that shares its weight with the embedding.

On a CPU every linear layer computes with a packed copy of its weight. Stock's layerwise reload packs a layer again when
its weights have come; a checkpoint of tied weights has the shared one under the embedding's name only, so that the
output layer keeps the packed copy of the old weights and the model goes on with a head that is not its own.
"""

from __future__ import annotations

from typing import Any

from longtail.engine.patches.entry import Change, Entry, Source

_LAYERWISE = "vllm.model_executor.model_loader.reload.layerwise"


def _make_finalize(stock: Any, owner: Any) -> Any:
    from functools import wraps

    @wraps(stock)
    def finalize_layerwise_processing(model: Any, model_config: Any) -> None:
        stale = [layer for layer in model.modules() if _was_not_loaded(layer, owner.get_layerwise_info(layer))]
        stock(model, model_config)
        for layer in stale:
            layer.quant_method.process_weights_after_loading(layer)

    return finalize_layerwise_processing


def _was_not_loaded(layer: Any, info: Any) -> bool:
    """A packed layer that got nothing in this reload, and has the weight that it was packed from."""
    if not hasattr(layer, "cpu_linear") or not info.can_load() or info.load_numel > 0 or info.kernel_tensors is None:
        return False
    weight = info.kernel_tensors[0].get("weight")
    return weight is not None and weight.numel() > 0


ENTRY = Entry(
    name="cpu-tied-reload",
    what="A reload on a CPU packs output layers with tied weights again.",
    why="After new weights a model with tied embeddings computes its logits with the old ones.",
    upstream=(),
    versions=("0.32.0",),
    where="cpu",
    changes=(Change(_LAYERWISE, "finalize_layerwise_processing", _make_finalize, "fe9f0b96668f49af"),),
    relies_on=(
        Source(_LAYERWISE, "finalize_layerwise_reload", "bccf179d5b05f178"),
        Source("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", "ec79d3cea7cf1256"),
    ),
)
