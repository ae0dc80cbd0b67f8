"""Slots of shared memory through which a trainer on the engine's host hands over the bytes of weights.

The service makes the ring, a trainer attaches to it by the `RingSpec` of `Welcome`. Who may write a slot or read it is
said by messages: the trainer writes slot `serial % num_slots` and announces it, the service copies it and gives credit.
The ring is small, so that it stays in the processor's cache.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt

from longtail.engine.errors import InvalidInputError
from longtail.engine.shared_memory import SharedMemory
from longtail.trainer_bridge.wire import RingSpec

_DATA_OFFSET = 4096


class Ring:
    """The slots, in the service or in a trainer.

    Attributes:
        spec: by which a trainer attaches.

    """

    def __init__(self, memory: SharedMemory, spec: RingSpec) -> None:
        self.spec = spec
        self._memory = memory
        self._bytes = np.frombuffer(memory.buffer, np.uint8)

    @classmethod
    def create(cls, num_slots: int = 8, slot_bytes: int = 1 << 20) -> Self:
        """The service's side.

        Raises:
            InvalidInputError: there would be no slot, or an empty one.
            OSError: the system has no such memory.

        """
        for field, value in (("num_slots", num_slots), ("slot_bytes", slot_bytes)):
            if value < 1:
                raise InvalidInputError(field, "1 or more", value)
        memory = SharedMemory.create("longtail-ring", _DATA_OFFSET + num_slots * slot_bytes)
        return cls(memory, RingSpec(memory.path, memory.token, _DATA_OFFSET, slot_bytes, num_slots))

    @classmethod
    def attach(cls, spec: RingSpec) -> Self:
        """The trainer's side.

        Raises:
            InvalidInputError: the memory cannot be reached, because the service runs on another host, in another
                container or as another user; or it is not as `spec` says.

        """
        memory = SharedMemory.open(spec.path, spec.token, field="ring.path")
        room = memory.num_bytes - spec.data_offset
        if spec.data_offset < _DATA_OFFSET or spec.slot_bytes < 1 or not 1 <= spec.num_slots <= room // spec.slot_bytes:
            raise InvalidInputError("ring", f"slots within {memory.num_bytes} bytes", spec)
        return cls(memory, spec)

    def slot(self, serial: int) -> npt.NDArray[np.uint8]:
        """The slot of chunk `serial`, a view of shape [slot_bytes]."""
        spec = self.spec
        start = spec.data_offset + serial % spec.num_slots * spec.slot_bytes
        return self._bytes[start : start + spec.slot_bytes]

    def close(self) -> None:
        """Give it up; the memory goes with the last view of it."""
        self._bytes = self._bytes[:0]
        self._memory.close()
