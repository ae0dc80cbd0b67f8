"""The weights of a transformers model under the names that its checkpoint has, for `push_weights`.

Does not know the engine's checkpoint: the service compares names, shapes and dtypes with it and refuses a push that
differs, before anything changes. Imports neither torch nor transformers; the model brings them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longtail.trainer_bridge.errors import InvalidInputError


def checkpoint_tensors(model: Any, dtype: str | None = None) -> Iterator[tuple[str, Any]]:
    """Name and tensor of everything that `save_pretrained` writes, where it renames nothing.

    A tied weight comes once, under the name of the weight that it is tied to. No tensor is copied, unless its dtype
    changes.

    Args:
        model: a transformers model with whole tensors, not wrapped.
        dtype: what floating-point tensors are cast to, such as `bfloat16`, for a trainer that keeps its weights in
            another dtype than the checkpoint; by default they come as they are.

    Raises:
        InvalidInputError: the model has adapters or quantised weights, which the checkpoint does not have, or a tensor
            that is not whole in this process.

    """
    if getattr(model, "peft_config", None):
        raise InvalidInputError(
            "model", "a model without PEFT adapters, or named_tensors that merges them", type(model).__name__
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise InvalidInputError(
            "model", "a model that is not quantised, or named_tensors that dequantises it", type(model).__name__
        )
    state = model.state_dict()
    # transformers 5 has the tied ones of this model, 4 those that the class could tie.
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    own = {tensor.data_ptr() for name, tensor in state.items() if name not in tied}
    for name, tensor in state.items():
        if name in tied and tensor.data_ptr() in own:
            continue
        if tensor.device.type == "meta" or hasattr(tensor, "full_tensor"):
            raise InvalidInputError(f"model.{name}", "a whole tensor in this process", type(tensor).__name__)
        yield name, _cast(tensor.detach(), dtype)


def _cast(tensor: Any, dtype: str | None) -> Any:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    import torch

    return tensor.to(getattr(torch, dtype))
