"""A push of weights in the service: takes its messages, checks them, and puts the weights together in shared memory.

    staging.begin(message)
    staging.prepare()                       in another thread, before WeightsReady is sent
    staging.tensor(message)
    credit = staging.chunk(message, payload)
    staged = staging.commit(message)        in another thread: names, shapes, dtypes, completeness, every checksum
    ... the engine takes staged.update_info ...
    staging.applied()                       or `abort()` when it went back to what it had

The weights of the engine's version stay as they are until `applied`, so that a push may end anywhere; the engine goes
back to them, too, when it can't load the new ones. Before the first push there is no such copy, and it goes back to
its checkpoint. Host memory: twice the checkpoint, plus the differences of one push.

A violation raises `PushRefusedError` and ends the push. Nothing larger than what was announced, and fits the
checkpoint, is allocated. Calls are short but for `prepare` and `commit`, beside which nothing else may be called. No
sockets, and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from longtail.engine.errors import InvalidInputError
from longtail.engine.weight_manifest import Manifest
from longtail.trainer_bridge.errors import PushRefusedError
from longtail.trainer_bridge.weights.delta import index_bytes
from longtail.trainer_bridge.weights.manifest import digest_of, is_checksum
from longtail.trainer_bridge.weights.ring import Ring
from longtail.trainer_bridge.weights.staged_weights import StagedWeights
from longtail.trainer_bridge.wire import (
    ITEM_BYTES,
    MAX_CHUNK_BYTES,
    BeginWeights,
    Buffer,
    CommitWeights,
    RingSpec,
    WeightsChunk,
    WeightsTensor,
)


@dataclass(frozen=True, slots=True)
class Staged:
    """Weights that are complete and verified.

    Attributes:
        update_info: for `RolloutEngine.update_weights`.
        version: of the weights.
        digest: of all their tensors.
        num_bytes_received: payload of the push.
        is_known: the engine has this version, and these are its weights: the answer to an earlier push was lost.

    """

    update_info: dict[str, Any]
    version: int
    digest: str
    num_bytes_received: int
    is_known: bool = False


@dataclass(slots=True)
class _Tensor:
    """The tensor that is being received."""

    name: str
    target: npt.NDArray[np.uint8]
    num_changed: int | None
    offset: int = 0
    hasher: Any = field(default_factory=xxhash.xxh3_128)


@dataclass(slots=True)
class _Push:
    push_id: str
    version: int
    is_delta: bool
    uses_ring: bool
    window: int
    chunk_bytes: int
    number: int
    tensor: _Tensor | None = None
    num_tensors: int = 0
    next_serial: int = 0
    credited: int = -1
    num_bytes: int = 0
    is_complete: bool = False
    checksums: dict[str, str] = field(default_factory=dict)
    #: Works a difference in, or waits until that is done.
    work: list[Callable[[], object]] = field(default_factory=list)


class Staging:
    """One engine's pushes, one at a time.

    Args:
        manifest: the tensors of the model's checkpoint.
        version: of the weights that the engine has.
        checkpoint: folder that has exactly these weights, for the first difference; `None` if there is none.
        window: chunks that may be under way when they come in messages.
        chunk_bytes: bound on such a chunk.
        ring: for chunks in shared memory.
        is_needed: the engine's weights are not those of `version`: it must get whole ones, of that or a later version.
        executor: of one thread, works differences in while more arrive; by default they wait for `commit`.

    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        version: int,
        checkpoint: Path | None = None,
        window: int = 8,
        chunk_bytes: int = 1 << 22,
        ring: Ring | None = None,
        is_needed: bool = False,
        executor: Executor | None = None,
    ) -> None:
        assert window >= 1
        assert 1 <= chunk_bytes <= MAX_CHUNK_BYTES
        self.version = version
        self.is_needed = is_needed
        self._manifest = manifest
        self._window = window
        self._chunk_bytes = chunk_bytes
        self._ring = ring
        self._executor = executor
        self._weights = StagedWeights(manifest, None if is_needed else checkpoint)
        self._push: _Push | None = None

    @property
    def ring(self) -> RingSpec | None:
        """For `Welcome`."""
        return None if self._ring is None else self._ring.spec

    @property
    def digest(self) -> str | None:
        """Of the engine's version, if it was pushed or is the base of differences."""
        return None if self._weights.checksums is None else digest_of(self._weights.checksums)

    @property
    def push_id(self) -> str | None:
        """Of the push under way."""
        return None if self._push is None else self._push.push_id

    def begin(self, message: BeginWeights) -> dict[str, int]:
        """Begin a push; returns `window` and `chunk_bytes` for `WeightsReady`.

        Raises:
            PushRefusedError: another one is under way, or this one does not fit the engine's version.

        """
        if self._push is not None:
            raise PushRefusedError("busy", "push_id", "no other push under way", self._push.push_id)
        is_delta = message.base_version is not None
        # The engine's own version may come again, and is compared: perhaps its trainer never heard that it was applied.
        lowest = self.version if self.is_needed or self._weights.checksums is not None else self.version + 1
        if message.version < lowest:
            next_version = self.version if self.is_needed else self.version + 1
            raise PushRefusedError("invalid", "version", f"{next_version} or above", message.version)
        if is_delta and self.is_needed:
            raise PushRefusedError("weights", "base_version", "none: whole weights are needed", message.base_version)
        if is_delta and message.base_version != self.version:
            raise PushRefusedError("invalid", "base_version", f"{self.version}", message.base_version)
        if is_delta and not self._weights.can_be_base:
            raise PushRefusedError("unsupported", "base_version", "none: no copy of it is here", message.base_version)
        if (uses_ring := message.transport == "shm") and self._ring is None:
            raise PushRefusedError("unsupported", "transport", "zmq, because there is no ring", message.transport)
        spec = self.ring if uses_ring else None
        window, chunk_bytes = (self._window, self._chunk_bytes) if spec is None else (spec.num_slots, spec.slot_bytes)
        number = self._weights.begin()
        self._push = _Push(message.push_id, message.version, is_delta, uses_ring, window, chunk_bytes, number)
        return {"window": window, "chunk_bytes": chunk_bytes}

    def prepare(self) -> None:
        """Take the memory that the push needs; its first tensor does it otherwise. Takes long the first time.

        Raises:
            PushRefusedError: there is not so much memory, or the checkpoint, of which a copy is wanted, is unusable.

        """
        if (push := self._push) is None:
            return
        with self._ending(push):
            try:
                self._weights.prepare(with_mirror=push.is_delta)
            except InvalidInputError as error:
                expected = "none, because the checkpoint cannot be read"
                raise PushRefusedError("unsupported", "base_version", expected, str(error)) from error
            except OSError as error:
                expected = f"{self._manifest.num_bytes} bytes of memory"
                raise PushRefusedError("full", "push", expected, str(error)) from error

    def tensor(self, message: WeightsTensor) -> None:
        """Begin the next tensor.

        Raises:
            PushRefusedError: it is none of the checkpoint's, or was there already.

        """
        push = self._open(message.push_id)
        self.prepare()
        with self._ending(push):
            if push.tensor is not None:
                raise PushRefusedError("gap", "tensors", f"the rest of {push.tensor.name} first", message.spec.name)
            if message.index != push.num_tensors:
                raise PushRefusedError("gap", "index", str(push.num_tensors), message.index)
            num_bytes = self._checked_payload(push, message)
            if message.payload_bytes != num_bytes:
                where = f"tensors[{message.spec.name}].payload_bytes"
                raise PushRefusedError("invalid", where, str(num_bytes), message.payload_bytes)
            name = message.spec.name
            target = self._weights.receive(name) if message.num_changed is None else np.empty(num_bytes, np.uint8)
            push.tensor = _Tensor(name, target, message.num_changed)
            push.num_tensors += 1

    def chunk(self, message: WeightsChunk, payload: Buffer = b"") -> int | None:
        """Take the next bytes of the tensor; returns the serial for `WeightsCredit` when it is time for one.

        Raises:
            PushRefusedError: they are not the next ones, or not what was announced.

        """
        push = self._open(message.push_id)
        with self._ending(push):
            if (tensor := push.tensor) is None:
                raise PushRefusedError("gap", "chunk", "a tensor first", f"chunk {message.serial}")
            self._check_chunk(push, tensor, message)
            target = tensor.target[tensor.offset : tensor.offset + message.length]
            target[:] = self._source(push, message, payload)
            push.next_serial += 1
            push.num_bytes += message.length
            tensor.offset += message.length
            if tensor.num_changed is None:
                # What was copied, not what it was copied from: the ring is the trainer's memory, too.
                tensor.hasher.update(target)
            if message.checksum is not None:
                self._end_tensor(push, tensor, message.checksum)
            if message.serial - push.credited < max(1, push.window // 4):
                return None
            push.credited = message.serial
            return message.serial

    def commit(self, message: CommitWeights) -> Staged:
        """Check that all was sent and is right. Takes long where differences have to be worked in.

        Raises:
            PushRefusedError: something is missing, or not what was announced.

        """
        push = self._open(message.push_id)
        self.prepare()
        with self._ending(push):
            if push.tensor is not None:
                raise PushRefusedError("gap", "commit", f"the rest of {push.tensor.name} first", "commit")
            if message.num_tensors != push.num_tensors:
                raise PushRefusedError("gap", "num_tensors", str(push.num_tensors), message.num_tensors)
            checksums = self._new_checksums(push)
            if missing := [name for name in self._manifest.entries if name not in checksums]:
                expected = f"all {len(self._manifest)} tensors of the checkpoint"
                raise PushRefusedError("invalid", "tensors", expected, f"no {', '.join(missing[:3])}")
            digest = digest_of(checksums)
            if message.digest != digest:
                raise PushRefusedError("verification", "digest", digest, message.digest)
            for work in push.work:
                work()
            if push.is_delta:
                self._weights.complete(set(push.checksums))
            if (is_known := push.version == self.version and not self.is_needed) and digest != self.digest:
                expected = f"{self.version + 1} or above, because version {self.version} has other weights"
                raise PushRefusedError("invalid", "version", expected, push.version)
            push.is_complete = True
            return Staged(self._weights.update_info(), push.version, digest, push.num_bytes, is_known)

    def applied(self) -> None:
        """The engine has the new weights."""
        push = self._push
        assert push is not None
        assert push.is_complete
        self._weights.take_turns(self._new_checksums(push))
        self.version = push.version
        self.is_needed = False
        self._push = None

    def abort(self, push_id: str | None = None) -> bool:
        """Forget the push under way, if it is this one or none is named; says whether it did."""
        push = self._push
        if push is None or push_id not in (None, push.push_id):
            return False
        self._end(push)
        return True

    def close(self) -> None:
        """Give the memory back."""
        self._push = None
        self._weights.close()
        if self._ring is not None:
            self._ring.close()

    # ---- within ---------------------------------------------------------------------------------------------------

    def _open(self, push_id: str) -> _Push:
        """The push that messages may go on with; those of another one do not end it."""
        push = self._push
        if push is None or push.push_id != push_id or push.is_complete:
            raise PushRefusedError("gap", "push_id", "a push that was begun and is not over", push_id)
        return push

    @contextmanager
    def _ending(self, push: _Push) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._end(push)
            raise

    def _end(self, push: _Push) -> None:
        if self._push is push:
            self._push = None
            self._weights.drop()

    def _new_checksums(self, push: _Push) -> dict[str, str]:
        """Of all tensors after the push, as far as they were sent."""
        return {**((self._weights.checksums or {}) if push.is_delta else {}), **push.checksums}

    def _checked_payload(self, push: _Push, message: WeightsTensor) -> int:
        """Bytes that have to follow a tensor's announcement."""
        spec = message.spec
        where = f"tensors[{spec.name}]"
        if (entry := self._manifest.entries.get(spec.name)) is None:
            raise PushRefusedError("invalid", "tensors", "only tensors that the checkpoint has", spec.name)
        if spec.name in push.checksums:
            raise PushRefusedError("invalid", where, "each tensor once", "it a second time")
        if spec.dtype != entry.dtype:
            raise PushRefusedError("invalid", f"{where}.dtype", entry.dtype, spec.dtype)
        if spec.shape != entry.shape:
            raise PushRefusedError("invalid", f"{where}.shape", str(entry.shape), spec.shape)
        if message.num_changed is None:
            return entry.num_bytes
        num_bytes = message.num_changed * (index_bytes(entry.numel) + ITEM_BYTES[entry.dtype])
        if not push.is_delta:
            raise PushRefusedError("invalid", f"{where}.num_changed", "none in whole weights", message.num_changed)
        if message.num_changed < 0 or num_bytes > entry.num_bytes:
            expected = "a difference that is not larger than the tensor"
            raise PushRefusedError("invalid", f"{where}.num_changed", expected, message.num_changed)
        return num_bytes

    def _check_chunk(self, push: _Push, tensor: _Tensor, message: WeightsChunk) -> None:
        where = f"tensors[{tensor.name}].chunk"
        if message.serial != push.next_serial:
            raise PushRefusedError("gap", f"{where}.serial", str(push.next_serial), message.serial)
        if message.offset != tensor.offset:
            raise PushRefusedError("gap", f"{where}.offset", str(tensor.offset), message.offset)
        left = len(tensor.target) - tensor.offset
        low, high = min(1, left), min(left, push.chunk_bytes)
        if not low <= message.length <= high:
            raise PushRefusedError("invalid", f"{where}.length", f"{low} to {high}", message.length)
        is_last = message.length == left
        if (message.checksum is not None) != is_last:
            expected = "a checksum, because it is the last" if is_last else "none, because it is not the last"
            raise PushRefusedError("invalid", f"{where}.checksum", expected, message.checksum)
        if message.checksum is not None and not is_checksum(message.checksum):
            raise PushRefusedError("invalid", f"{where}.checksum", "32 hexadecimal digits", message.checksum)

    def _source(self, push: _Push, message: WeightsChunk, payload: Buffer) -> npt.NDArray[np.uint8]:
        num_bytes = memoryview(payload).nbytes
        got = f"slot {message.slot} and {num_bytes} bytes"
        if not push.uses_ring:
            if message.slot is not None or num_bytes != message.length:
                raise PushRefusedError("invalid", "chunk", f"{message.length} bytes in the message", got)
            return np.frombuffer(payload, np.uint8)
        assert self._ring is not None
        slot = message.serial % push.window
        if message.slot != slot or num_bytes:
            raise PushRefusedError("invalid", "chunk.slot", f"slot {slot} and no bytes in the message", got)
        return self._ring.slot(message.serial)[: message.length]

    def _end_tensor(self, push: _Push, tensor: _Tensor, announced: str) -> None:
        push.tensor = None
        push.checksums[tensor.name] = announced
        if tensor.num_changed is None:
            if (found := tensor.hasher.hexdigest()) != announced:
                raise PushRefusedError("verification", f"tensors[{tensor.name}].checksum", announced, found)
            self._weights.received(tensor.name, found)
            return
        arguments = (push.number, tensor.name, tensor.target, tensor.num_changed, announced)
        if self._executor is None:
            push.work.append(lambda: self._weights.work_in(*arguments))
        else:
            push.work.append(self._executor.submit(self._weights.work_in, *arguments).result)
