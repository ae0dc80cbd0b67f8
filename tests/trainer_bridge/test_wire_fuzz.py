"""The decoder under mutated messages: it names a problem or gives a message of the protocol, and nothing else.

100,000 messages in all, seeded. Half of them are damaged as bytes (bits, cuts, insertions, repeated, swapped and lost
frames), half as values, so that they are well-formed MessagePack and get further.
"""

from __future__ import annotations

import copy
import random
import resource
from collections import Counter
from typing import Any

import msgspec
import pytest
from wire_examples import TO_CLIENT, TO_SERVICE, trajectory

from longtail.engine.trajectory import Group
from longtail.trainer_bridge import wire

NUM_MESSAGES = 100_000
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 1e308, float("nan"), float("inf"), "", "x" * 300, "\0",
    "\ud7ff", b"", b"\xff" * 40, [], [[]] * 20, {}, {"type": "ping"}, {"": None}, [None] * 100,
]  # fmt: skip


def corpus() -> list[list[bytes]]:
    """Valid messages in both directions."""
    return [[bytes(frame) for frame in wire.encode(*case)] for case in (*TO_SERVICE, *TO_CLIENT)]


def damage_bytes(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    frames = list(frames)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(frames)) if frames else 0
        frame = bytearray(frames[place]) if frames else bytearray()
        match rng.randrange(8):
            case 0 if frame:
                frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
            case 1:
                del frame[rng.randint(0, len(frame)) :]
            case 2:
                at = rng.randint(0, len(frame))
                frame[at:at] = rng.randbytes(rng.randint(1, 30))
            case 3 if frame:
                frame[rng.randrange(len(frame))] = rng.choice(b"\xc1\xc6\xdb\xdd\xdf\x9f\x8f\xff\x00")
            case 4:
                frames.insert(place, bytes(frame))
            case 5 if frames:
                del frames[place]
                continue
            case 6:
                rng.shuffle(frames)
                continue
        if frames:
            frames[place] = bytes(frame)
    return frames


def damage_values(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    fields = msgspec.msgpack.decode(frames[1])
    for _ in range(rng.randint(1, 3)):
        target: Any = fields
        while True:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(target[key], (dict, list)) and target[key] and rng.random() < 0.7:
                target = target[key]
                continue
            if isinstance(target, dict) and rng.random() < 0.2:
                del target[key]
            else:
                target[key] = copy.deepcopy(rng.choice(ODD_VALUES))
            break
    return [frames[0], msgspec.msgpack.encode(fields), *frames[2:]]


@pytest.mark.parametrize("damage", [damage_bytes, damage_values])
def test_mutated_messages_never_get_through_as_anything_else(damage: Any) -> None:
    rng = random.Random(20261124)
    valid = corpus()
    outcomes: Counter[str] = Counter()
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(NUM_MESSAGES // 2):
        frames = damage(rng, rng.choice(valid))
        decode = wire.decode_to_service if rng.random() < 0.5 else wire.decode_to_client
        try:
            message, payload = decode(frames)
        except wire.WireError as error:
            outcomes[error.problem] += 1
        else:
            assert isinstance(message, wire.Message)
            assert payload.nbytes == getattr(message, "num_bytes", 0)
            outcomes["decoded"] += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 64 << 10
    # It reaches every check, and some messages survive their damage: it is not all caught by the first.
    wanted = {"frames", "signature", "size", "header", "type", "decoded"} if damage is damage_bytes else {"type"}
    assert all(outcomes[name] > 100 for name in wanted | {"header", "decoded"}), outcomes


def test_mutated_results_never_get_through_as_anything_else() -> None:
    rng = random.Random(4)
    payload = wire.encode_payload(Group(group_id="g", trajectories=[trajectory()] * 3, complete=True))
    outcomes: Counter[str] = Counter()
    for _ in range(5_000):
        damaged = bytearray(payload)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if rng.random() < 0.3:
            del damaged[rng.randint(1, len(damaged)) :]
        try:
            group = wire.decode_result(
                damaged[: rng.randint(1, len(damaged))] if rng.random() < 0.3 else damaged, Group
            )
        except wire.WireError as error:
            outcomes[error.problem] += 1
        else:
            assert all(len(t.logprobs) == len(t.output_token_ids) for t in group.trajectories)
            outcomes["decoded"] += 1
    assert outcomes["payload"] > 100, outcomes
    assert outcomes["decoded"] > 100, outcomes
