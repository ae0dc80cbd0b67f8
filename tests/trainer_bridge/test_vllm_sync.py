"""vLLM's own transfers: that the control messages are right. The transfers themselves need GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scripted_service import ScriptedService

from longtail.trainer_bridge import BridgeClient, wire
from longtail.trainer_bridge.errors import InvalidInputError
from longtail.trainer_bridge.weights.push import WeightPusher
from longtail.trainer_bridge.weights.vllm_sync import BridgeWeightSync, VllmTransfer


class ControlChannel:
    """Records requests, which go through the wire format."""

    peer = "fake"
    push_id = "p"

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def next_id(self) -> int:
        return len(self.sent) + 1

    def request(self, message: Any, phase: str, timeout_s: float) -> Any:
        decoded, _ = wire.decode_to_service(wire.encode(message))
        self.sent.append(decoded)
        return wire.Done(reply_to=message.request_id)


def sync_of(channel: ControlChannel) -> BridgeWeightSync:
    sync = BridgeWeightSync()
    sync.open(channel, 3, 1.0)  # type: ignore[arg-type]
    return sync


# What torch's `reduce_tensor` gives for a CUDA tensor, but for the handles themselves.
ARGUMENTS = (
    torch.Tensor, torch.Size([2, 3]), (3, 1), 0, torch.storage.TypedStorage, torch.bfloat16, 0, b"handle", 512, 0,
    False, b"counter", 1, b"event", True,
)  # fmt: skip


def test_the_client_has_vllms_protocol() -> None:
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

    assert isinstance(BridgeWeightSync(), VLLMWeightSyncClient)


def test_each_call_is_a_control_message() -> None:
    channel = ControlChannel()
    sync = sync_of(channel)
    sync.init_weight_transfer_engine({"master_address": "10.0.0.1", "master_port": 1234})
    sync.start_weight_update()
    sync.update_weights({"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]})
    sync.finish_weight_update("9")
    assert [(one.op, one.version) for one in channel.sent] == [
        ("init", None), ("start", None), ("update", None), ("finish", 3),
    ]  # fmt: skip
    assert channel.sent[0].info == {"master_address": "10.0.0.1", "master_port": 1234}
    assert channel.sent[2].info == {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}
    assert len({one.request_id for one in channel.sent}) == 4


@pytest.mark.parametrize("is_packed", [True, False])
def test_ipc_handles_come_out_as_they_went_in(is_packed: bool) -> None:
    from longtail.engine.ipc_transfer import rebuilt_handles

    channel = ControlChannel()
    handles = {"GPU-1": ARGUMENTS}
    sync_of(channel).update_weights({"names": ["a"], "ipc_handles": handles if is_packed else [handles, handles]})
    plain = channel.sent[0].info["ipc_handles"]
    for one in [plain] if is_packed else plain:
        assert rebuilt_handles(one) == {"GPU-1": ARGUMENTS}


@pytest.mark.parametrize(
    ("place", "value"), [(0, "Popen"), (4, "object"), (5, "complex64"), (5, "__builtins__"), (1, "x"), (None, None)]
)
def test_handles_that_are_none_are_refused(place: int | None, value: Any) -> None:
    from longtail.engine.ipc_transfer import rebuilt_handles

    channel = ControlChannel()
    sync_of(channel).update_weights({"names": ["a"], "ipc_handles": {"GPU-1": ARGUMENTS}})
    plain = channel.sent[0].info["ipc_handles"]
    rebuilt_handles(plain)
    if place is None:
        plain["GPU-1"].pop()
    else:
        plain["GPU-1"][place] = value
    with pytest.raises(InvalidInputError, match="ipc_handles"):
        rebuilt_handles(plain)


def test_vllms_ipc_engine_takes_plain_handles() -> None:
    from longtail.engine.ipc_transfer import PlainIPCWeightTransferEngine

    channel = ControlChannel()
    fields = {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}
    sync_of(channel).update_weights({**fields, "ipc_handles": [{"GPU-1": ARGUMENTS}]})
    engine = PlainIPCWeightTransferEngine.__new__(PlainIPCWeightTransferEngine)
    info = engine.parse_update_info(channel.sent[0].info)
    assert info.ipc_handles == [{"GPU-1": ARGUMENTS}]
    for wrong in ({**fields}, {**fields, "ipc_handles_pickled": "x"}, {**fields, "ipc_handles": 3}):
        with pytest.raises(InvalidInputError, match="ipc_handles"):
            engine.parse_update_info(wrong)


def test_what_does_not_fit_into_a_header_is_refused() -> None:
    channel = ControlChannel()
    with pytest.raises(InvalidInputError, match="packed=True"):
        sync_of(channel).update_weights({"names": ["x" * 1000] * 300})
    assert channel.sent == []


class InitInfo:
    backend = "nccl"


TENSORS = [("a", torch.zeros(2, 3)), ("b", torch.nn.Parameter(torch.ones(4)))]
NAMES = {"names": [["a", "torch.float32", [2, 3]], ["b", "torch.float32", [4]]]}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand-ins for the engine that would send the tensors."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    made: list[Any] = []

    class Engine:
        def __init__(self, client: Any, source: Any) -> None:
            made.append(self)
            self.client, self.source = client, source
            client.init_weight_transfer_engine({"master_port": 1})

        def send_weights(self) -> None:
            names = [(one.name, str(one.dtype), one.shape) for one in self.source.metadata()]
            assert [name for name, _ in self.source] == [name for name, *_ in names]
            self.client.start_weight_update()
            self.client.update_weights({"names": [list(one) for one in names]})
            self.client.finish_weight_update()

    monkeypatch.setattr(
        WeightTransferTrainerFactory,
        "trainer_init",
        classmethod(lambda cls, init_info, *, client, source: Engine(client, source)),
    )
    return made


def test_a_push_goes_through_vllms_engine(engines: list[Any]) -> None:
    pusher, init_info = WeightPusher(), InitInfo()
    for version, ops in ((5, ["init", "start", "update", "finish"]), (6, ["start", "update", "finish"])):
        channel: Any = ControlChannel()
        report = pusher.push(channel, iter(TENSORS), version, transport="nccl", init_info=init_info)
        assert [one.op for one in channel.sent] == ops
        assert channel.sent[-1].version == version
        assert channel.sent[-2].info == NAMES
        assert (report.kind, report.transport, report.num_tensors, report.num_bytes) == ("full", "nccl", 2, 40)
    assert len(engines) == 1
    with pytest.raises(InvalidInputError, match="delta"):
        pusher.push(channel, TENSORS, 7, transport="nccl", init_info=init_info, delta=True)
    with pytest.raises(InvalidInputError, match="init_info"):
        pusher.push(channel, TENSORS, 7, transport="ipc", init_info=init_info)


def test_a_clients_push_goes_through_vllms_engine(engines: list[Any]) -> None:
    with ScriptedService() as service:

        def do(message: wire.ControlWeights, payload: memoryview) -> bool:
            service.send(wire.Done(reply_to=message.request_id))
            return True

        service.answers[wire.ControlWeights] = do
        with BridgeClient(service.address, timeout_s=10.0) as client:
            report = client.push_weights(iter(TENSORS), 5, transport="nccl", init_info=InitInfo())
            assert (report.transport, report.version, report.num_bytes) == ("nccl", 5, 40)
            with pytest.raises(InvalidInputError, match="init_info"):
                client.push_weights(TENSORS, 6, transport="ipc")
        sent = [one for one in service.received if isinstance(one, wire.ControlWeights)]
    assert [(one.op, one.version) for one in sent] == [("init", None), ("start", None), ("update", None), ("finish", 5)]
    assert sent[2].info == NAMES


def test_an_engine_that_failed_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    class Engine:
        def send_weights(self) -> None:
            raise RuntimeError("NCCL")

    made: list[Engine] = []

    def trainer_init(cls: Any, init_info: Any, **options: Any) -> Engine:
        made.append(Engine())
        return made[-1]

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", classmethod(trainer_init))
    transfer = VllmTransfer(None)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="NCCL"):
            transfer.push(ControlChannel(), [], 1, 1.0)  # type: ignore[arg-type]
    assert len(made) == 2
