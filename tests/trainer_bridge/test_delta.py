"""Differences between two versions of a tensor."""

from __future__ import annotations

from typing import Any

import array_api_strict
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from longtail.trainer_bridge.weights.delta import Delta, apply, bits_of, changed, index_bytes

DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


@st.composite
def versions(draw: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Two arrays of one dtype and shape, 0-d and empty ones too; any bits, few or many of them changed."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=8))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    old = bytearray(draw(st.binary(min_size=size, max_size=size)))
    new = bytearray(old)
    for place in draw(st.lists(st.integers(0, max(size - 1, 0)), max_size=6)) if size else []:
        new[place] ^= draw(st.integers(1, 255))
    if draw(st.booleans()):
        new = bytearray(draw(st.binary(min_size=size, max_size=size)))
    return (np.frombuffer(old, dtype).reshape(shape), np.frombuffer(new, dtype).reshape(shape))


@settings(max_examples=300, deadline=None)
@given(versions(), st.integers(1, 9))
def test_what_changed_makes_the_one_the_other(pair: tuple[npt.NDArray[Any], npt.NDArray[Any]], block: int) -> None:
    old, new = (bits_of(array, array.dtype.itemsize) for array in pair)
    delta = changed(old, new, block=block)
    assert delta.indices.dtype == np.uint32
    assert delta.values.dtype == new.dtype
    assert (np.diff(delta.indices.astype(np.int64)) > 0).all()
    assert len(delta.indices) == (old != new).sum(), "nothing that stays is sent"
    target = old.copy()
    undo = Delta(delta.indices, target[delta.indices])
    apply(target, delta)
    assert target.tobytes() == new.tobytes()
    apply(target, undo)
    assert target.tobytes() == old.tobytes()


@settings(max_examples=100, deadline=None)
@given(versions(), st.integers(1, 9))
def test_any_array_library_that_follows_the_standard(
    pair: tuple[npt.NDArray[Any], npt.NDArray[Any]], block: int
) -> None:
    old, new = (bits_of(array, array.dtype.itemsize) for array in pair)
    expected = changed(old, new)
    found = changed(array_api_strict.asarray(old.copy()), array_api_strict.asarray(new.copy()), block=block)
    assert type(found.indices) is type(array_api_strict.asarray([1]))
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(one, np.asarray(other))
        assert one.dtype == np.asarray(other).dtype


def test_bits_count_and_not_values() -> None:
    nan, other_nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    old = np.array([nan, nan, 0.0, -0.0, 1.0], np.float32)
    new = np.array([nan, other_nan, -0.0, -0.0, 1.0], np.float32)
    delta = changed(bits_of(old, 4), bits_of(new, 4))
    assert delta.indices.tolist() == [1, 2]
    assert delta.values.tolist() == [0x7FC00001, 0x80000000]
    assert np.flatnonzero(old != new).tolist() == [0, 1], "comparing values would be wrong both ways"


def test_parts_of_a_tensor_have_its_indices() -> None:
    old, new = np.zeros(100, np.uint32), np.zeros(100, np.uint32)
    new[[3, 60, 99]] = 7
    parts = [changed(old[s : s + 25], new[s : s + 25], start=s, numel=100) for s in range(0, 100, 25)]
    assert np.concatenate([part.indices for part in parts]).tolist() == [3, 60, 99]


def test_indices_grow_with_the_tensor() -> None:
    assert (index_bytes(0), index_bytes(2**32 - 1), index_bytes(2**32)) == (4, 4, 8)
    old, new = np.zeros(2, np.uint8), np.array([0, 1], np.uint8)
    delta = changed(old, new, start=2**32, numel=2**33)
    assert delta.indices.dtype == np.uint64
    assert delta.indices.tolist() == [2**32 + 1]


def test_arrays_that_do_not_match_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        changed(np.zeros(2, np.uint8), np.zeros(3, np.uint8))
    with pytest.raises(AssertionError):
        changed(np.zeros(2, np.uint8), np.zeros(2, np.uint16))
