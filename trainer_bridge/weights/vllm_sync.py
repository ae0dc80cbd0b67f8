"""vLLM's own weight transfers, NCCL and CUDA IPC, behind `push_weights`: the bridge carries their control messages.

The trainer's half is vLLM's `NCCLTrainerWeightTransferEngine` or `IPCTrainerWeightTransferEngine`; it calls a
`VLLMWeightSyncClient`, which `BridgeWeightSync` is. The engine must have been started with the same
`EngineConfig.weight_transfer`. vLLM has to be installed where the trainer runs.

Neither has run here: both need GPUs. What is tested is that the control messages are the right ones. These transfers
are not atomic: vLLM can't put old weights back, so that the engine dies if one fails after it has started. Generation
pauses for the whole transfer, and nothing has a checksum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import msgspec

from longtail.trainer_bridge.errors import InvalidInputError
from longtail.trainer_bridge.weights.push_channel import PushChannel
from longtail.trainer_bridge.wire import MAX_HEADER_BYTES, ControlWeights

#: Room in a message's header for what is not `info`.
_MARGIN_BYTES = 1 << 10

ControlOp = Literal["init", "start", "update", "finish"]


class BridgeWeightSync:
    """vLLM's `VLLMWeightSyncClient`, for one push after another; `open` it for each."""

    def __init__(self) -> None:
        self._channel: PushChannel | None = None
        self._version = 0
        self._timeout_s = 0.0

    def open(self, channel: PushChannel, version: int, timeout_s: float) -> None:
        """What the next calls belong to."""
        self._channel, self._version, self._timeout_s = channel, version, timeout_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See vLLM."""
        self._send("init", init_info)

    def start_weight_update(self) -> None:
        """See vLLM."""
        self._send("start", {})

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """See vLLM."""
        if not isinstance(update_info, dict):
            raise InvalidInputError("update_info", "one map for all workers", update_info)
        handles = update_info.get("ipc_handles")
        self._send("update", update_info if handles is None else {**update_info, "ipc_handles": _plain(handles)})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See vLLM; the version is that of the push."""
        self._send("finish", {})

    def _send(self, op: ControlOp, info: dict[str, Any]) -> None:
        channel = self._channel
        assert channel is not None
        if (num_bytes := len(msgspec.msgpack.encode(info))) > MAX_HEADER_BYTES - _MARGIN_BYTES:
            expected = (
                f"names and handles of at most {MAX_HEADER_BYTES - _MARGIN_BYTES} bytes, such as with packed=True"
            )
            raise InvalidInputError("named_tensors", expected, f"{num_bytes} bytes")
        version = self._version if op == "finish" else None
        message = ControlWeights(request_id=channel.next_id(), op=op, info=info, version=version)
        channel.request(message, f"vLLM to {op} a transfer of weights", self._timeout_s)


class VllmTransfer:
    """The trainer's half of one of vLLM's transfers, kept from push to push.

    Args:
        init_info: vLLM's `NCCLTrainerInitInfo` or `IPCTrainerInitInfo`.

    """

    def __init__(self, init_info: Any) -> None:
        self.init_info = init_info
        self._sync = BridgeWeightSync()
        self._tensors: list[tuple[str, Any]] = []
        self._engine: Any = None

    def push(
        self, channel: PushChannel, named_tensors: Iterable[tuple[str, Any]], version: int, timeout_s: float
    ) -> tuple[int, int]:
        """Send whole weights; returns the number of tensors and of bytes. vLLM reads them twice: all are held.

        Raises:
            InvalidInputError: a tensor is none of torch's.
            Exception: what vLLM or the service says.

        """
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self._sync.open(channel, version, timeout_s)
        self._tensors = list(named_tensors)
        try:
            if self._engine is None:
                self._engine = WeightTransferTrainerFactory.trainer_init(
                    self.init_info, client=self._sync, source=_source(self._tensors_now)
                )
            self._engine.send_weights()
        except BaseException:
            self._engine = None
            raise
        finally:
            sizes = [tensor.nbytes for _, tensor in self._tensors]
            self._tensors = []
        return len(sizes), sum(sizes)

    def _tensors_now(self) -> list[tuple[str, Any]]:
        return self._tensors


def _source(tensors: Any) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, materialize_full_tensor

    class Source(WeightSource):
        """What is pushed now."""

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors()]

        def __iter__(self) -> Iterator[tuple[str, Any]]:
            for name, tensor in tensors():
                yield name, materialize_full_tensor(tensor.detach())

    return Source()


def _plain(handles: Any) -> Any:
    """CUDA IPC handles as plain data, which `ipc_transfer.py` reads: classes and dtypes by their names."""
    if isinstance(handles, Mapping):
        return {key: _plain(value) for key, value in handles.items()}
    if isinstance(handles, (list, tuple)):
        return [_plain(value) for value in handles]
    if isinstance(handles, type):
        return handles.__name__
    if handles is None or isinstance(handles, (bool, int, bytes, str)):
        return handles
    return str(handles).removeprefix("torch.")
