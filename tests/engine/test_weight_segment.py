"""Weights in shared memory, and what tensors a checkpoint has."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from longtail.engine.errors import InvalidInputError
from longtail.engine.shared_memory import SharedMemory
from longtail.engine.weight_manifest import ITEM_BYTES, Manifest, TensorEntry, stored_tensors
from longtail.engine.weight_segment import WeightSegment

ENTRIES = [
    TensorEntry("a", "float32", (3, 5)),
    TensorEntry("b", "bfloat16", (7,)),
    TensorEntry("scalar", "int64", ()),
    TensorEntry("empty", "float16", (0, 4)),
    TensorEntry("flag", "bool", (2,)),
]


@pytest.fixture
def segment() -> Iterator[WeightSegment]:
    made = WeightSegment.create(Manifest(ENTRIES))
    yield made
    made.close()


# ---- manifests ------------------------------------------------------------------------------------------------


def test_a_checkpoints_tensors_are_those_that_safetensors_finds(tiny_model: Path) -> None:
    found = {entry.name: entry for entry in Manifest.of_checkpoint(tiny_model)}
    with safe_open(tiny_model / "model.safetensors", "pt") as file:
        assert set(found) == set(file.keys())
        for stored in stored_tensors(tiny_model):
            tensor = file.get_tensor(stored.entry.name)
            assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{stored.entry.dtype}", stored.entry.shape)
            data = stored.path.read_bytes()[stored.offset : stored.offset + stored.entry.num_bytes]
            assert data == tensor.view(torch.uint8).numpy().tobytes()


def test_every_dtype_that_torch_stores(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(3, 2).to(getattr(torch, name)) for name in ITEM_BYTES}
    save_file(tensors, tmp_path / "model.safetensors")
    found = Manifest.of_checkpoint(tmp_path)
    assert {entry.name: entry.dtype for entry in found} == {name: name for name in ITEM_BYTES}
    assert found.num_bytes == sum(6 * size for size in ITEM_BYTES.values())


def test_the_bridge_has_the_same_dtypes() -> None:
    from longtail.trainer_bridge import wire

    assert dict(ITEM_BYTES) == wire.ITEM_BYTES


def test_a_checkpoint_in_parts(tmp_path: Path) -> None:
    for part in ("one", "two", "stray"):
        save_file({part: torch.zeros(2)}, tmp_path / f"{part}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"one": "one.safetensors", "two": "two.safetensors"}}))
    assert set(Manifest.of_checkpoint(tmp_path).entries) == {"one", "two"}
    index.write_text("{}")
    with pytest.raises(InvalidInputError, match="checkpoint"):
        Manifest.of_checkpoint(tmp_path)


def test_a_folder_without_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="checkpoint"):
        Manifest.of_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    whole = path.read_bytes()
    for broken in (
        whole[:-1], whole[:20], b"", b"\xff" * 8 + whole[8:], whole.replace(b'"F32"', b'"X32"'),
        whole.replace(b"[100]", b"[101]"), whole.replace(b'"a"', b'"a' + b'\\"'), b"\x02" + bytes(7) + b"[]",
    ):  # fmt: skip
        path.write_bytes(broken)
        with pytest.raises(InvalidInputError, match="checkpoint"):
            Manifest.of_checkpoint(tmp_path)
    path.write_bytes(whole)
    assert len(Manifest.of_checkpoint(tmp_path)) == 1


def test_manifests_that_are_none() -> None:
    for entries in ([TensorEntry("a", "complex64", (1,))], [TensorEntry("a", "int8", (-1,))], [ENTRIES[0]] * 2):
        with pytest.raises(InvalidInputError, match=r"tensors\[a\]"):
            Manifest(entries)


# ---- segments -------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_by_another(segment: WeightSegment) -> None:
    opened = WeightSegment.open(segment.path, segment.token)
    assert opened.manifest == segment.manifest
    generator = torch.Generator().manual_seed(0)
    for entry in ENTRIES:
        tensor = segment.tensor(entry.name)
        assert tuple(tensor.shape) == entry.shape
        assert str(tensor.dtype) == f"torch.{entry.dtype}"
        if entry.numel:
            assert segment.bytes_of(entry.name).ctypes.data % 64 == 0
            tensor.copy_(torch.rand(entry.shape, generator=generator) * 9)
    for entry in ENTRIES:
        assert torch.equal(opened.tensor(entry.name), segment.tensor(entry.name))
        assert segment.bytes_of(entry.name).tobytes() == opened.bytes_of(entry.name).tobytes()
    assert segment.tensor("a").abs().sum() > 0


def test_who_opens_a_segment_cannot_change_it(segment: WeightSegment) -> None:
    opened = WeightSegment.open(segment.path, segment.token)
    opened.tensor("a")[:] = 5
    assert segment.tensor("a").sum() == 0
    assert opened.tensor("a").sum() == 75


def test_views_outlive_the_segment() -> None:
    segment = WeightSegment.create(Manifest(ENTRIES))
    opened = WeightSegment.open(segment.path, segment.token)
    view, theirs = segment.tensor("a"), opened.bytes_of("a")
    view[:] = 3
    segment.close()
    segment.close()
    opened.close()
    del segment, opened
    gc.collect()
    assert view.sum() == 45
    assert theirs.view(np.float32).sum() == 45


def test_a_closed_segment_cannot_be_opened() -> None:
    segment = WeightSegment.create(Manifest(ENTRIES))
    path, token = segment.path, segment.token
    segment.close()
    with pytest.raises(InvalidInputError, match="path"):
        WeightSegment.open(path, token)


def test_descriptors_do_not_leak() -> None:
    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(5):
        segment = WeightSegment.create(Manifest(ENTRIES))
        WeightSegment.open(segment.path, segment.token)
        with pytest.raises(InvalidInputError):
            WeightSegment.open(segment.path, "0" * 32)
        del segment
    assert count() == before


def test_another_process_opens_it(segment: WeightSegment) -> None:
    segment.tensor("a")[:] = 2
    code = (
        "import sys; from longtail.engine.weight_segment import WeightSegment; "
        "print(WeightSegment.open(*sys.argv[1:]).bytes_of('a').view('f4').sum()); assert 'torch' not in sys.modules"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, segment.path, segment.token], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "30.0"


def test_memory_that_is_no_segment_is_refused(segment: WeightSegment) -> None:
    for path, token in [
        (segment.path, "0" * 32),
        (segment.path, ""),
        ("/proc/self/fd/3", segment.token),
        ("/dev/zero", segment.token),
        (segment.path + "/../3", segment.token),
        (f"/proc/{os.getpid()}/fd/2", segment.token),
        (f"/proc/{os.getpid()}/fd/99999", segment.token),
    ]:
        with pytest.raises(InvalidInputError, match=r"^here: expected"):
            WeightSegment.open(path, token, field="here")


@pytest.mark.parametrize("garbage", [b"\xff" * 8, (200).to_bytes(8, "little"), bytes(8)])
def test_memory_without_an_index_is_refused(garbage: bytes) -> None:
    memory = SharedMemory.create("test", 8192)
    memory.buffer[16:24] = garbage
    with pytest.raises(InvalidInputError, match="a segment of weights"):
        WeightSegment.open(memory.path, memory.token)


def test_an_index_that_points_outside_is_refused(segment: WeightSegment) -> None:
    import msgspec

    index = msgspec.msgpack.encode([("a", "float32", (3, 5), segment.num_bytes - 4)])
    memory = SharedMemory.create("test", segment.num_bytes)
    memory.buffer[16:24] = len(index).to_bytes(8, "little")
    memory.buffer[24 : 24 + len(index)] = index
    with pytest.raises(InvalidInputError, match="a segment of weights"):
        WeightSegment.open(memory.path, memory.token)


def test_the_size_of_shared_memory_is_sealed() -> None:
    memory = SharedMemory.create("test", 8192)
    fd = os.open(memory.path, os.O_RDWR)
    try:
        for size in (0, 4096, 16384):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
    finally:
        os.close(fd)


def test_an_unsealed_file_is_refused() -> None:
    """Its owner could cut it off, which kills who reads it."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 8192)
        with pytest.raises(InvalidInputError, match="not sealed"):
            SharedMemory.open(f"/proc/{os.getpid()}/fd/{fd}", "00" * 16)
    finally:
        os.close(fd)


def test_memory_that_is_not_there_is_an_error_and_not_a_crash() -> None:
    with pytest.raises(OSError, match=r"where \d+ are available"):
        SharedMemory.create("test", 1 << 60)
