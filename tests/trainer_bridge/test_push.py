"""The trainer's side of a push, against a `Staging` through the wire format."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_channel import MemoryChannel, welcome_of
from msgspec.structs import replace
from weight_examples import ENTRIES, MANIFEST, arrays_of, as_bytes, changed_weights, random_weights, staged_bytes

from longtail.engine.weight_manifest import Manifest, TensorEntry
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.errors import BridgeTimeoutError, InvalidInputError, WeightsPushError
from longtail.trainer_bridge.weights.host_tensors import host_tensor
from longtail.trainer_bridge.weights.push import PushProgress, WeightPusher
from longtail.trainer_bridge.weights.ring import Ring
from longtail.trainer_bridge.weights.staging import Staging


def staging_of(ring: bool = False, **options: Any) -> Staging:
    defaults = {"version": 0, "chunk_bytes": 50, "window": 4, "ring": Ring.create(3, 64) if ring else None}
    return Staging(MANIFEST, **(defaults | options))


def staged(channel: MemoryChannel) -> dict[str, bytes]:
    assert channel.staged is not None
    return staged_bytes(channel.staged.update_info)


# ---- whole weights and differences ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(["full", "auto", "delta"]), st.integers(0, 99), st.floats(0, 1)), max_size=8),
)
def test_versions_arrive_bit_for_bit(ring: bool, pushes: list[tuple[str, int, float]]) -> None:
    staging, pusher, weights = staging_of(ring), WeightPusher(), random_weights(0)
    has_base = False
    for version, (kind, seed, share) in enumerate([("auto", 0, 0.0), *pushes], 1):
        weights = changed_weights(weights, seed, share)
        channel = MemoryChannel(staging)
        delta: Any = {"full": False, "auto": "auto", "delta": True}[kind]
        if kind == "delta" and not has_base:
            with pytest.raises(InvalidInputError, match="delta"):
                pusher.push(channel, arrays_of(weights), version, delta=delta)
            delta = "auto"
        report = pusher.push(channel, arrays_of(weights), version, delta=delta)
        assert staged(channel) == as_bytes(weights)
        assert report.kind == ("delta" if delta and has_base else "full")
        assert report.transport == ("shm" if ring else "zmq")
        assert report.digest == staging.digest
        assert report.model_bytes == MANIFEST.num_bytes
        assert report.num_bytes == sum(one.length for one in channel.sent if isinstance(one, wire.WeightsChunk))
        assert channel.most_ahead <= (3 if ring else 4)
        has_base = bool(delta)
    pusher.close()


def test_a_difference_is_small_and_of_what_changed_only() -> None:
    staging, pusher, weights = staging_of(), WeightPusher(), random_weights(0)
    pusher.push(MemoryChannel(staging), arrays_of(weights), 1, delta="auto")
    new = {**weights, "embed": weights["embed"].copy()}
    new["embed"][8] ^= 1
    channel = MemoryChannel(staging)
    report = pusher.push(channel, arrays_of(new), 2, delta=True)
    assert (report.kind, report.num_tensors, report.num_bytes) == ("delta", 1, 8)
    report = pusher.push(MemoryChannel(staging), arrays_of(new), 3, delta=True)
    assert (report.num_tensors, report.num_bytes) == (0, 0)
    report = pusher.push(MemoryChannel(staging), arrays_of(random_weights(4)), 4, delta=True)
    assert report.num_bytes == MANIFEST.num_bytes, "what changed as a whole is sent as a whole"


def test_a_remembered_checkpoint_is_a_base(tmp_path: Any) -> None:
    from weight_examples import write_checkpoint

    weights = random_weights(0)
    staging, pusher = staging_of(checkpoint=write_checkpoint(tmp_path, weights)), WeightPusher()
    pusher.remember(arrays_of(weights), 0)
    channel = MemoryChannel(staging)
    new = changed_weights(weights, 1, 0.05)
    assert pusher.push(channel, arrays_of(new), 1, delta=True).kind == "delta"
    assert staged(channel) == as_bytes(new)


def test_the_base_is_what_the_engine_has() -> None:
    """A push that the engine could not load leaves the base as it was; whole tensors that were sent end it."""
    staging, pusher, weights = staging_of(), WeightPusher(), random_weights(0)
    pusher.push(MemoryChannel(staging), arrays_of(weights), 1, delta="auto")

    def fail(_: Any) -> None:
        raise RuntimeError("injected")

    new = changed_weights(weights, 1, 0.02)
    for _ in range(2):
        with pytest.raises(WeightsPushError, match="injected"):
            pusher.push(MemoryChannel(staging, apply=fail), arrays_of(new), 2, delta=True)
    channel = MemoryChannel(staging)
    report = pusher.push(channel, arrays_of(weights), 2, delta=True)
    assert report.num_bytes == 0 or report.num_bytes < 20, "against version 1, not against the one that failed"
    assert staged(channel) == as_bytes(weights)
    with pytest.raises(WeightsPushError, match="injected"):
        pusher.push(MemoryChannel(staging, apply=fail), arrays_of(random_weights(7)), 3, delta=True)
    channel = MemoryChannel(staging)
    assert pusher.push(channel, arrays_of(new), 3, delta="auto").kind == "full"
    assert staged(channel) == as_bytes(new)


def test_another_engine_gets_whole_weights() -> None:
    """Such as the same service, started again with its checkpoint."""
    pusher, weights = WeightPusher(), random_weights(0)
    pusher.push(MemoryChannel(staging_of()), arrays_of(weights), 5, delta="auto")
    for other in (staging_of(), staging_of(version=7), staging_of(version=5, is_needed=True)):
        with pytest.raises(InvalidInputError, match=r"delta: expected auto, or version"):
            pusher.push(MemoryChannel(other), arrays_of(weights), 8, delta=True)
        assert pusher._base.version == 5
    other = staging_of(version=5, is_needed=True)
    assert pusher.push(MemoryChannel(other), arrays_of(weights), 5, delta="auto").kind == "full"


def test_a_base_that_the_service_refuses_is_forgotten() -> None:
    staging, pusher, weights = staging_of(), WeightPusher(), random_weights(0)
    welcome = welcome_of(staging)
    pusher.push(MemoryChannel(staging, welcome=welcome), arrays_of(weights), 1, delta="auto")
    WeightPusher().push(MemoryChannel(staging), arrays_of(weights), 2)
    with pytest.raises(WeightsPushError, match="base_version"):
        pusher.push(MemoryChannel(staging, welcome=welcome, heard_version=1), arrays_of(weights), 3, delta="auto")
    assert pusher.push(MemoryChannel(staging, welcome=welcome), arrays_of(weights), 3, delta="auto").kind == "full"


def test_weights_that_were_pushed_whole_can_be_remembered_as_a_base() -> None:
    staging, pusher, weights = staging_of(), WeightPusher(), random_weights(0)
    welcome = welcome_of(staging)
    pusher.push(MemoryChannel(staging, welcome=welcome), arrays_of(weights), 1)
    pusher.remember(arrays_of(weights), 1)
    assert pusher.push(MemoryChannel(staging, welcome=welcome), arrays_of(weights), 2, delta=True).kind == "delta"
    # What was remembered is not what the engine has: noticed, and whole weights the next time.
    weights = changed_weights(weights, 3, 0.1)
    pusher.remember(arrays_of(weights), 2)
    with pytest.raises(WeightsPushError, match="digest"):
        pusher.push(MemoryChannel(staging, welcome=welcome), arrays_of(weights), 3, delta="auto")
    assert pusher.push(MemoryChannel(staging, welcome=welcome), arrays_of(weights), 3, delta="auto").kind == "full"


def test_one_session_goes_from_version_to_version() -> None:
    """Its welcome says what the engine had when it began."""
    staging, pusher, weights = staging_of(), WeightPusher(), random_weights(0)
    welcome = welcome_of(staging)
    kinds = [
        pusher.push(MemoryChannel(staging, welcome=welcome), arrays_of(weights), version, delta="auto").kind
        for version in (1, 2, 3)
    ]
    assert kinds == ["full", "delta", "delta"]


# ---- the stream -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [False, True])
def test_tensors_travel_while_later_ones_are_made(ring: bool) -> None:
    staging, weights = staging_of(ring), random_weights(0)
    channel = MemoryChannel(staging)
    seen: list[int] = []

    def produce() -> Iterator[tuple[str, Any]]:
        for name, array in arrays_of(weights):
            seen.append(sum(isinstance(one, wire.WeightsTensor) for one in channel.sent))
            yield name, array

    progress: list[PushProgress] = []
    report = WeightPusher().push(channel, produce(), 1, on_progress=progress.append)
    assert seen == list(range(len(ENTRIES)))
    assert [one.num_tensors for one in progress] == [n + 1 for n in seen]
    assert progress[-1].num_bytes == report.num_bytes == MANIFEST.num_bytes
    assert set(report.seconds) >= {"begin", "produce", "encode", "send", "apply", "total"}
    assert report.seconds["total"] >= max(report.seconds.values())


def test_no_chunk_is_sent_beyond_the_window() -> None:
    """A service that gives no credit makes the pusher wait, and then give up."""
    channel = MemoryChannel(staging_of())
    channel._staging.chunk = lambda message, payload: None  # type: ignore[method-assign]
    with pytest.raises(BridgeTimeoutError, match="chunk 0 of the weights to be taken"):
        WeightPusher().push(channel, arrays_of(random_weights(0)), 1, timeout_s=0.5)
    assert [one.serial for one in channel.sent if isinstance(one, wire.WeightsChunk)] == [0, 1, 2, 3]


def test_what_is_no_pair_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"named_tensors.*pairs"):
        WeightPusher().push(MemoryChannel(staging_of()), random_weights(0), 1)  # type: ignore[arg-type]


def test_a_trainer_that_fails_in_the_middle() -> None:
    staging, weights, pusher = staging_of(), random_weights(0), WeightPusher()

    def produce() -> Iterator[tuple[str, Any]]:
        yield arrays_of(weights)[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pusher.push(MemoryChannel(staging), produce(), 1, delta="auto")
    assert staging.version == 0
    staging.abort()
    assert pusher.push(MemoryChannel(staging), arrays_of(weights), 1, delta="auto").kind == "full"


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_bytes_that_change_on_the_way_are_noticed(ring: bool, delta: bool) -> None:
    staging, weights, pusher = staging_of(ring), random_weights(0), WeightPusher()
    pusher.push(MemoryChannel(staging), arrays_of(weights), 1, delta="auto")
    new = {**weights, "embed": weights["embed"].copy()}
    new["embed"][8] ^= 1
    service_ring = staging._ring

    def tamper(message: Any, payload: Any) -> Any:
        if isinstance(message, wire.WeightsChunk) and message.serial == 0:
            if service_ring is not None:
                service_ring.slot(0)[message.length - 1] ^= 4
            else:
                payload = bytearray(payload)
                payload[-1] ^= 4
        return message, payload

    with pytest.raises(WeightsPushError) as caught:
        pusher.push(MemoryChannel(staging, tamper=tamper), arrays_of(new), 2, delta=delta)
    assert caught.value.code == "verification"
    assert staging.version == 1
    channel = MemoryChannel(staging)
    pusher.push(channel, arrays_of(new), 2, delta="auto")
    assert staged(channel) == as_bytes(new)


# ---- what tensors may be ----------------------------------------------------------------------------------------


def test_arrays_of_every_kind() -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    array = base.numpy()
    for one in (
        base, torch.nn.Parameter(base), base.T.contiguous().T, base.clone().requires_grad_(), array,
        np.asfortranarray(array), array.astype(">f4"),
    ):  # fmt: skip
        spec, data = host_tensor("w", one)
        assert (spec.dtype, spec.shape) == ("float32", (4, 6))
        assert data.tobytes() == np.arange(24, dtype="<f4").tobytes()
    assert host_tensor("w", torch.tensor(3, dtype=torch.bfloat16))[1].tobytes() == b"\x40\x40"
    assert host_tensor("w", np.float64(1)).spec == wire.TensorSpec("w", "float64", ())
    assert host_tensor("w", torch.zeros(2, dtype=torch.float8_e4m3fn)).spec.dtype == "float8_e4m3fn"
    array = np.zeros(5)
    assert np.shares_memory(host_tensor("w", array).data, array), "what is contiguous is not copied"


def test_a_sharded_tensor_is_made_whole() -> None:
    class Sharded:
        def full_tensor(self) -> torch.Tensor:
            return torch.ones(3)

    assert host_tensor("w", Sharded()).spec == wire.TensorSpec("w", "float32", (3,))


def test_a_cupy_array_is_fetched() -> None:
    class ndarray:
        __module__ = "cupy"

        def get(self) -> Any:
            return np.ones(3, np.float32)

    ndarray.__module__ = "cupy"
    assert host_tensor("w", ndarray()).data.nbytes == 12


@pytest.mark.parametrize("array", [np.zeros(2, complex), np.array(["a"]), torch.zeros(2, dtype=torch.complex64), None])
def test_arrays_that_are_no_weights_are_refused(array: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"named_tensors\[w\]"):
        WeightPusher().push(MemoryChannel(staging_of()), [("w", array)], 1)


def test_wrong_arguments_are_refused_before_anything_is_sent() -> None:
    for field, options in {
        "version": {"version": -1}, "delta": {"delta": "always"}, "transport": {"transport": "mpi"},
        "init_info": {"transport": "nccl"},
    }.items():  # fmt: skip
        channel = MemoryChannel(staging_of())
        with pytest.raises(InvalidInputError, match=field):
            WeightPusher().push(channel, arrays_of(random_weights(0)), **({"version": 1} | options))
        assert channel.sent == []
    with pytest.raises(InvalidInputError, match="each name once"):
        WeightPusher().push(MemoryChannel(staging_of()), arrays_of(random_weights(0))[:1] * 2, 1)


@pytest.mark.parametrize("fault", ["name", "missing", "shape", "dtype", "version"])
def test_what_the_service_refuses_is_raised_with_its_words(fault: str) -> None:
    arrays, version = arrays_of(random_weights(0)), 1
    match fault:
        case "name":
            arrays[0] = ("other", arrays[0][1])
        case "missing":
            arrays.pop()
        case "shape":
            arrays[0] = ("embed", arrays[0][1].T)
        case "dtype":
            arrays[0] = ("embed", arrays[0][1].astype(np.float64))
        case "version":
            version = 0
    staging = staging_of()
    with pytest.raises(WeightsPushError) as caught:
        WeightPusher().push(MemoryChannel(staging), arrays, version)
    assert caught.value.code == "invalid"
    assert caught.value.expected
    assert staging.version == 0


# ---- transports -------------------------------------------------------------------------------------------------


def test_a_ring_that_cannot_be_reached_is_passed_over_or_named() -> None:
    staging, weights = staging_of(ring=True), random_weights(0)
    welcome = welcome_of(staging)
    assert welcome.ring is not None
    elsewhere = replace(welcome, ring=replace(welcome.ring, token="0" * 32))
    channel = MemoryChannel(staging, welcome=elsewhere)
    assert WeightPusher().push(channel, arrays_of(weights), 1).transport == "zmq"
    with pytest.raises(InvalidInputError, match=r"transport: expected zmq, because ring\.path"):
        WeightPusher().push(MemoryChannel(staging, welcome=elsewhere), arrays_of(weights), 2, transport="shm")
    with pytest.raises(InvalidInputError, match="the service has no shared memory"):
        WeightPusher().push(MemoryChannel(staging_of()), arrays_of(weights), 2, transport="shm")
    assert WeightPusher().push(MemoryChannel(staging), arrays_of(weights), 2, transport="zmq").transport == "zmq"
    assert WeightPusher().push(MemoryChannel(staging), arrays_of(weights), 3, transport="shm").transport == "shm"


def test_large_tensors_in_real_chunks() -> None:
    """Several blocks a chunk, several chunks a tensor, a tail."""
    rng = np.random.default_rng(0)
    manifest = Manifest([TensorEntry("w", "float32", (1_300_003,)), TensorEntry("v", "bfloat16", (300_001,))])
    for ring in (None, Ring.create(4, 1 << 20)):
        staging, pusher = Staging(manifest, version=0, ring=ring), WeightPusher()
        bits = {entry.name: rng.integers(0, 256, entry.num_bytes, np.uint8) for entry in manifest}
        for version in (1, 2, 3):
            arrays = [
                ("w", bits["w"].view("f4")),
                ("v", torch.from_numpy(bits["v"]).view(torch.bfloat16)),
            ]
            channel = MemoryChannel(staging)
            report = pusher.push(channel, arrays, version, delta="auto")
            assert channel.staged is not None
            found = channel.staged.update_info
            assert report.kind == ("full" if version == 1 else "delta")
            assert found["token"]
            assert staging._weights.checksums == {
                name: xxhash.xxh3_128_hexdigest(data.data) for name, data in bits.items()
            }
            for data in bits.values():
                data[rng.integers(0, len(data), len(data) // 300)] ^= 7


def test_a_trainer_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; import longtail.trainer_bridge.weights.push, longtail.trainer_bridge.weights.vllm_sync; "
        "import longtail.trainer_bridge.weights.staging; assert not {'torch', 'vllm', 'cupy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
