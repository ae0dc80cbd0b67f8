"""The two copies of a model's weights that a service keeps: the engine's version, and the next one in the making.

The mirror has the engine's version and is never written. A push is put together in the spare; when the engine has it,
they change places. What a tensor of the spare holds is known by its checksum: so a difference is worked into what is
there already when that is the mirror's tensor, or the one before it with the difference that led from there, and
otherwise into a copy of the mirror's.

Knows nothing of messages. One thread makes a push, another may work differences in.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longtail.engine.errors import InvalidInputError
from longtail.engine.weight_manifest import Manifest, stored_tensors
from longtail.engine.weight_segment import WeightSegment
from longtail.trainer_bridge.errors import PushRefusedError
from longtail.trainer_bridge.weights.delta import Delta, apply, bits_of, index_bytes
from longtail.trainer_bridge.weights.manifest import checksum
from longtail.trainer_bridge.wire import ITEM_BYTES

#: A difference that led to the mirror's tensor is kept if it is at most this share of the tensor.
_KEPT_SHARE = 0.25


class StagedWeights:
    """Mirror and spare.

    Args:
        manifest: the tensors.
        checkpoint: folder with the weights that the engine has before the first push, if there is one.

    Attributes:
        checksums: of the mirror's tensors, `None` while there is no mirror.

    """

    def __init__(self, manifest: Manifest, checkpoint: Path | None) -> None:
        self.checksums: dict[str, str] | None = None
        self._manifest = manifest
        self._checkpoint = checkpoint
        self._mirror: WeightSegment | None = None
        self._spare: WeightSegment | None = None
        self._spare_checksums: dict[str, str] = {}
        #: Differences that make tensors of the spare those of the mirror.
        self._lag: dict[str, Delta] = {}
        self._received: dict[str, Delta] = {}
        self._push = 0
        self._working = threading.Lock()
        self._preparing = threading.Lock()

    @property
    def can_be_base(self) -> bool:
        """There is a mirror, or one can be made."""
        return self._mirror is not None or self._checkpoint is not None

    def prepare(self, *, with_mirror: bool) -> None:
        """Take memory, and copy the checkpoint where the mirror is wanted. Takes long the first time.

        Raises:
            OSError: there is not so much memory, or the checkpoint cannot be read.
            InvalidInputError: it is not the model's any more.

        """
        with self._preparing:
            if with_mirror and self._mirror is None:
                assert self._checkpoint is not None
                self._mirror, self.checksums = _read(self._manifest, self._checkpoint)
            if self._spare is None:
                self._spare = WeightSegment.create(self._manifest)

    # ---- a push ---------------------------------------------------------------------------------------------------

    def begin(self) -> int:
        """Begin a push; returns its number, with which `work_in` is called."""
        with self._working:
            self._push += 1
            self._received = {}
            return self._push

    def receive(self, name: str) -> npt.NDArray[np.uint8]:
        """Where a whole tensor is put; `received` comes next."""
        assert self._spare is not None
        self._spare_checksums.pop(name, None)
        self._lag.pop(name, None)
        return self._spare.bytes_of(name)

    def received(self, name: str, found: str) -> None:
        """A whole tensor is there; `found` is its checksum."""
        self._spare_checksums[name] = found

    def work_in(self, push: int, name: str, payload: npt.NDArray[np.uint8], num_changed: int, expected: str) -> None:
        """Make a tensor of the mirror's and a difference; does nothing if the push is over.

        Args:
            push: number of the push.
            name: of the tensor.
            payload: indices and values, as they are sent.
            num_changed: how many.
            expected: checksum of the new tensor.

        Raises:
            PushRefusedError: the difference is none, or gives another tensor.

        """
        entry = self._manifest.entries[name]
        indices_end = num_changed * index_bytes(entry.numel)
        delta = Delta(
            bits_of(payload[:indices_end], index_bytes(entry.numel)),
            bits_of(payload[indices_end:], ITEM_BYTES[entry.dtype]),
        )
        _check_indices(name, delta.indices, entry.numel)
        with self._working:
            if push != self._push:
                return
            assert self._spare is not None
            self._catch_up(name)
            target = self._spare.bytes_of(name)
            del self._spare_checksums[name]
            apply(bits_of(target, ITEM_BYTES[entry.dtype]), delta)
            if (found := checksum(target)) != expected:
                raise PushRefusedError("verification", f"tensors[{name}].checksum", expected, found)
            self._spare_checksums[name] = found
            self._received[name] = delta

    def complete(self, others: set[str]) -> None:
        """Bring every tensor that the push did not have up to the mirror; it had `others`."""
        with self._working:
            for entry in self._manifest:
                if entry.name not in others:
                    self._catch_up(entry.name)

    def update_info(self) -> dict[str, Any]:
        """For the engine: where the new weights are, and those that it has."""
        assert self._spare is not None
        info: dict[str, Any] = {"path": self._spare.path, "token": self._spare.token}
        if self._mirror is not None:
            info["base"] = {"path": self._mirror.path, "token": self._mirror.token}
        return info

    def take_turns(self, checksums: dict[str, str]) -> None:
        """The spare's are the engine's weights now."""
        with self._working:
            assert self._spare is not None
            assert {name: self._spare_checksums.get(name) for name in checksums} == checksums
            self._mirror, self._spare = self._spare, self._mirror
            self._spare_checksums = self.checksums or {}
            self.checksums = checksums
            self._lag = {name: delta for name, delta in self._received.items() if self._is_kept(name, delta)}
            self._received = {}
            self._push += 1

    def drop(self) -> None:
        """The push is over; waits for the tensor that is being worked in."""
        with self._working:
            self._push += 1
            self._received = {}

    def close(self) -> None:
        """Give the memory back."""
        self.drop()
        for segment in (self._mirror, self._spare):
            if segment is not None:
                segment.close()

    def _catch_up(self, name: str) -> None:
        """Make the spare's tensor the mirror's."""
        assert self._spare is not None
        assert self._mirror is not None
        assert self.checksums is not None
        lag = self._lag.pop(name, None)
        if self._spare_checksums.get(name) == self.checksums[name]:
            return
        self._spare_checksums.pop(name, None)
        target = self._spare.bytes_of(name)
        if lag is None:
            target[:] = self._mirror.bytes_of(name)
        else:
            apply(bits_of(target, ITEM_BYTES[self._manifest.entries[name].dtype]), lag)
        self._spare_checksums[name] = self.checksums[name]

    def _is_kept(self, name: str, delta: Delta) -> bool:
        num_bytes: int = delta.indices.nbytes + delta.values.nbytes
        return num_bytes <= _KEPT_SHARE * self._manifest.entries[name].num_bytes


def _check_indices(name: str, indices: npt.NDArray[Any], numel: int) -> None:
    if len(indices) and (int(indices[-1]) >= numel or not bool((indices[1:] > indices[:-1]).all())):
        expected = f"ascending indices below {numel}"
        raise PushRefusedError("invalid", f"tensors[{name}].indices", expected, f"{indices[:3]} to {indices[-1]}")


def _read(manifest: Manifest, folder: Path) -> tuple[WeightSegment, dict[str, str]]:
    stored = stored_tensors(folder)
    manifest.check_same((one.entry for one in stored), "checkpoint")
    segment = WeightSegment.create(manifest)
    checksums: dict[str, str] = {}
    for entry, path, offset in stored:
        target = segment.bytes_of(entry.name)
        with path.open("rb") as file:
            file.seek(offset)
            if file.readinto(target) != len(target):  # type: ignore[arg-type]
                raise InvalidInputError("checkpoint", f"{len(target)} bytes of {entry.name}", f"the end of {path}")
        checksums[entry.name] = checksum(target)
    return segment, checksums
