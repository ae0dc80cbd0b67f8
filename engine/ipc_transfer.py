"""vLLM's CUDA IPC weight transfer for handles that came as plain data: backend `longtail_ipc`.

A handle is what torch rebuilds a tensor of another process from: classes, a dtype, numbers and bytes. Stock sends it as
a pickle, and takes it only where it may unpickle what it is sent. Here classes and dtypes come by name, and only those
that a weight can have are known. Has not run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo

from longtail.engine.errors import InvalidInputError
from longtail.engine.weight_manifest import ITEM_BYTES

_TENSORS = {"Tensor": torch.Tensor, "Parameter": torch.Tensor}
_STORAGES = {"TypedStorage": torch.storage.TypedStorage, "UntypedStorage": torch.UntypedStorage}
#: Places in the arguments of torch's `rebuild_cuda_tensor`, of which there are `_NUM_ARGUMENTS`.
_CLASS, _SIZE, _STRIDE, _STORAGE, _DTYPE = 0, 1, 2, 4, 5
_NUM_ARGUMENTS = 15


class PlainIPCWeightTransferEngine(IPCWeightTransferEngine):
    """See the module."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        """See vLLM.

        Raises:
            InvalidInputError: a handle is none.

        """
        handles = update_dict.get("ipc_handles")
        if isinstance(handles, dict):
            rebuilt: Any = rebuilt_handles(handles)
        elif isinstance(handles, list):
            rebuilt = [rebuilt_handles(one) for one in handles]
        else:
            raise InvalidInputError("update_info.ipc_handles", "handles", handles)
        return super().parse_update_info({**update_dict, "ipc_handles": rebuilt})


def rebuilt_handles(plain: Any) -> dict[str, tuple[Any, ...]]:
    """The handles of one tensor by GPU.

    Raises:
        InvalidInputError: one is none.

    """
    try:
        return {str(gpu): _rebuilt(arguments) for gpu, arguments in plain.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            "update_info.ipc_handles", "the arguments of rebuild_cuda_tensor", repr(error)
        ) from error


def _rebuilt(plain: list[Any]) -> tuple[Any, ...]:
    if len(plain) != _NUM_ARGUMENTS:
        raise ValueError(f"{len(plain)} arguments")
    if plain[_DTYPE] not in ITEM_BYTES:
        raise ValueError(f"dtype {plain[_DTYPE]}")
    arguments = list(plain)
    arguments[_CLASS] = _TENSORS[plain[_CLASS]]
    arguments[_STORAGE] = _STORAGES[plain[_STORAGE]]
    arguments[_DTYPE] = getattr(torch, plain[_DTYPE])
    for place in (_SIZE, _STRIDE):
        arguments[place] = tuple(int(size) for size in plain[place])
    return tuple(arguments)
