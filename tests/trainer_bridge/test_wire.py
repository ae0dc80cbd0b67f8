"""The wire format: what is sent comes back, and what is wrong is named before anything is decoded."""

from __future__ import annotations

import struct
from typing import Any, get_args

import msgspec
import pytest
from wire_examples import TO_CLIENT, TO_SERVICE, trajectory

from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Branch, Group, Trajectory
from longtail.trainer_bridge import wire

PREFIX = b"LTBRID" + struct.pack("<H", wire.PROTOCOL_VERSION)


def test_every_message_is_here() -> None:
    assert {type(message) for message, _ in TO_SERVICE} == set(get_args(wire.ToService))
    assert {type(message) for message, _ in TO_CLIENT} == set(get_args(wire.ToClient))


@pytest.mark.parametrize(("message", "payload"), TO_SERVICE, ids=lambda value: type(value).__name__)
def test_messages_to_the_service_come_back(message: Any, payload: bytes | None) -> None:
    decoded, rest = wire.decode_to_service(wire.encode(message, payload))
    assert decoded == message
    assert bytes(rest) == (payload or b"")
    with pytest.raises(wire.WireError):
        wire.decode_to_client(wire.encode(message, payload))


@pytest.mark.parametrize(("message", "payload"), TO_CLIENT, ids=lambda value: type(value).__name__)
def test_messages_to_the_client_come_back(message: Any, payload: bytes | None) -> None:
    decoded, rest = wire.decode_to_client(wire.encode(message, payload))
    assert decoded == message
    assert bytes(rest) == (payload or b"")


def test_the_payload_is_not_copied() -> None:
    payload = bytearray(b"abc")
    message = wire.WeightsChunk(push_id="p", serial=0, offset=0, length=3, num_bytes=3)
    frames = wire.encode(message, payload)
    assert frames[2] is payload
    _, rest = wire.decode_to_service(frames)
    payload[0] = ord("x")
    assert bytes(rest) == b"xbc"


def test_fields_of_a_later_version_are_skipped() -> None:
    fields = msgspec.to_builtins(wire.Credit(seq=4)) | {"since_version_9": {"a": [1]}}
    message, _ = wire.decode_to_service([PREFIX, msgspec.msgpack.encode(fields)])
    assert message == wire.Credit(seq=4)


@pytest.mark.parametrize(
    ("frames", "problem"),
    [
        ([], "frames"),
        ([PREFIX], "frames"),
        ([PREFIX, b"\x80", b"", b""], "frames"),
        ([b"", b"\x80"], "signature"),
        ([b"GET / HTTP/1.1\r\n", b"\x80"], "signature"),
        ([PREFIX + b"\0", b"\x80"], "signature"),
        ([b"LTBRID" + struct.pack("<H", 2), b"\x80"], "version"),
        ([PREFIX, b""], "header"),
        ([PREFIX, b"\x80"], "type"),
        ([PREFIX, msgspec.msgpack.encode({"type": "shutdown"})], "type"),
        ([PREFIX, msgspec.msgpack.encode({"type": 3})], "type"),
        ([PREFIX, msgspec.msgpack.encode({"type": "credit"})], "header"),
        ([PREFIX, msgspec.msgpack.encode({"type": "credit", "seq": "four"})], "header"),
        ([PREFIX, msgspec.msgpack.encode({"type": "ping"}) + b"\0"], "header"),
        ([PREFIX, b"\x91" * 100_000], "header"),
        ([PREFIX, bytes(wire.MAX_HEADER_BYTES + 1)], "size"),
        ([PREFIX, msgspec.msgpack.encode({"type": "ping"}), b"x"], "size"),
        (wire.encode(wire.Delivery(seq=1, round_id="r", kind="group", num_bytes=2), b"ab"), "type"),
    ],
)
def test_what_is_wrong_is_named(frames: list[bytes], problem: str) -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.decode_to_service(frames)
    assert caught.value.problem == problem


@pytest.mark.parametrize("num_bytes", [-1, 0, 2, 4, wire.MAX_CHUNK_BYTES + 1, 2**63])
def test_a_payload_of_another_size_is_refused(num_bytes: int) -> None:
    header = {"type": "weights_chunk", "push_id": "p", "serial": 0, "offset": 0, "length": 3, "num_bytes": num_bytes}
    with pytest.raises(wire.WireError) as caught:
        wire.decode_to_service([PREFIX, msgspec.msgpack.encode(header), b"abc"])
    assert caught.value.problem == "size"


def test_the_sender_of_a_wrong_request_can_be_told() -> None:
    fields = msgspec.to_builtins(TO_SERVICE[4][0])
    fields["sampling"]["top_p"] = 2.0
    with pytest.raises(wire.WireError, match=r"sampling\.top_p.*\(0, 1\]") as caught:
        wire.decode_to_service([PREFIX, msgspec.msgpack.encode(fields)])
    assert caught.value.request_id == 4


def test_a_message_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(wire.WireError, match="at most 262144 bytes for CancelRound") as caught:
        wire.encode(wire.CancelRound(request_id=4, round_id="x" * wire.MAX_HEADER_BYTES))
    assert (caught.value.problem, caught.value.request_id) == ("size", 4)


def test_results_come_back_exactly() -> None:
    group = Group(group_id="g", trajectories=[trajectory(), trajectory(index=1, seed=2**63 - 1)], complete=True)
    assert wire.decode_result(wire.encode_payload(group), Group) == group


def test_branches_may_not_share_more_than_a_delivery_could_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small message must not become a large group: two branches that share two tokens each are four."""
    children = [trajectory(index=index, branch=Branch(of=0, at=2)) for index in (1, 2)]
    group = Group(group_id="g", trajectories=[trajectory(), *children], complete=True)
    payload = wire.encode_payload(group)
    monkeypatch.setattr(wire, "MAX_SHARED_TOKENS", 4)
    assert wire.decode_result(payload, Group) == group
    monkeypatch.setattr(wire, "MAX_SHARED_TOKENS", 3)
    with pytest.raises(wire.WireError, match="at most 3 tokens that branches share") as caught:
        wire.decode_result(payload, Group)
    assert caught.value.problem == "payload"


def test_a_trajectory_whose_arrays_differ_in_length_is_refused() -> None:
    fields = msgspec.to_builtins(trajectory())
    fields["logprobs"].pop()
    with pytest.raises(wire.WireError, match="logprobs has length 2") as caught:
        wire.decode_result(msgspec.msgpack.encode(fields), Trajectory)
    assert caught.value.problem == "payload"


def test_prompts_come_back() -> None:
    prompts = [Prompt(token_ids=[1, 2], metadata={"a": 1}, max_tokens=[3, 4]), Prompt(text="x", group_id="g", seed=1)]
    assert wire.decode_prompts(wire.encode_payload(prompts)) == prompts
