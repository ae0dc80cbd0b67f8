"""The ring of slots in shared memory."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest

from longtail.engine.errors import InvalidInputError
from longtail.trainer_bridge.weights.ring import Ring


def test_both_sides_have_the_same_slots() -> None:
    service = Ring.create(num_slots=3, slot_bytes=16)
    trainer = Ring.attach(service.spec)
    for serial in range(7):
        trainer.slot(serial)[:] = serial + 1
        assert service.slot(serial).tolist() == [serial + 1] * 16
    assert service.slot(6).tolist() == service.slot(3).tolist() == [7] * 16
    assert service.slot(5).tolist() == [6] * 16, "slots do not overlap"


def test_a_trainer_in_another_process() -> None:
    service = Ring.create(num_slots=2, slot_bytes=8)
    code = (
        "import sys, msgspec; from longtail.trainer_bridge.weights.ring import Ring; "
        "from longtail.trainer_bridge.wire import RingSpec; "
        "Ring.attach(msgspec.json.decode(sys.argv[1], type=RingSpec)).slot(1)[:] = 9; "
        "assert not {'torch', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, msgspec.json.encode(service.spec).decode()], check=True)
    assert service.slot(1).tolist() == [9] * 8


def test_memory_that_is_not_the_services_is_refused() -> None:
    service = Ring.create(num_slots=2, slot_bytes=8)
    spec = service.spec
    replace = msgspec.structs.replace
    for wrong in (
        replace(spec, token="00" * 16),
        replace(spec, path=f"/proc/{os.getpid()}/fd/99999"),
        replace(spec, path="/etc/passwd"),
        replace(spec, num_slots=3),
        replace(spec, num_slots=0),
        replace(spec, slot_bytes=0),
        replace(spec, slot_bytes=1 << 40),
        replace(spec, data_offset=0),
        replace(spec, data_offset=1 << 40),
        replace(spec, data_offset=-4096),
    ):
        with pytest.raises(InvalidInputError, match=r"^ring"):
            Ring.attach(wrong)
    assert Ring.attach(spec).spec == spec


def test_the_error_says_where_the_memory_is_looked_for() -> None:
    service = Ring.create()
    service.close()
    with pytest.raises(InvalidInputError, match="shared memory of a process on this host that this user may open"):
        Ring.attach(service.spec)


def test_a_ring_has_slots() -> None:
    for sizes in ({"num_slots": 0}, {"slot_bytes": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(sizes))):
            Ring.create(**sizes)
