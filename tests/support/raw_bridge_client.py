"""A client that speaks the wire directly: a DEALER, what to send, and what has come."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import zmq

from longtail.engine.config import SamplingConfig
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Group, Round
from longtail.engine.weight_manifest import stored_tensors
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.keys import ClientKeys
from longtail.trainer_bridge.weights.manifest import checksum, digest_of

WAIT_S = 20.0
M = TypeVar("M")


class RawBridgeClient:
    """Attributes: `seen`, every message that came, with its third frame, in order; `deliveries`, by number."""

    def __init__(self, address: str, *, keys: ClientKeys | None = None, context: Any = None) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        if keys is not None:
            keys.apply(self.socket)
        self.socket.connect(address)
        self._ids = itertools.count(1)
        self.seen: list[tuple[Any, bytes]] = []
        self.deliveries: dict[int, tuple[wire.Delivery, bytes]] = {}
        self.duplicates: list[int] = []

    def __enter__(self) -> RawBridgeClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._context.destroy(linger=0)

    def send(self, message: wire.Message, payload: bytes | None = None) -> None:
        self.socket.send_multipart([bytes(frame) for frame in wire.encode(message, payload)])

    def send_frames(self, *frames: bytes) -> None:
        self.socket.send_multipart(list(frames))

    def receive(self, timeout_s: float = WAIT_S) -> tuple[Any, bytes] | None:
        """The next message."""
        if not self.socket.poll(int(timeout_s * 1000)):
            return None
        message, payload = wire.decode_to_client(self.socket.recv_multipart())
        item = (message, bytes(payload))
        self.seen.append(item)
        if isinstance(message, wire.Delivery):
            if message.seq in self.deliveries:
                self.duplicates.append(message.seq)
            self.deliveries[message.seq] = (message, item[1])
        return item

    def wait_for(self, kind: type[M], which: Callable[[M], bool] = lambda _: True, timeout_s: float = WAIT_S) -> M:
        """The next message of a kind."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            item = self.receive(left)
            if item is not None and isinstance(item[0], kind) and which(item[0]):
                return item[0]
        raise AssertionError(f"no {kind.__name__} came: {[m for m, _ in self.seen[-8:]]}")

    def ask(self, message: Any, payload: bytes | None = None, timeout_s: float = WAIT_S) -> Any:
        """The reply to a request; its `request_id` is set here."""
        message = msgspec.structs.replace(message, request_id=next(self._ids))
        self.send(message, payload)
        return self.wait_for(object, lambda m: getattr(m, "reply_to", None) == message.request_id, timeout_s)

    def hello(
        self, consumer: str = "t", instance: str = "i", cursor: wire.Cursor | None = None, credit: int = 1 << 30
    ) -> Any:
        hello = wire.Hello(request_id=0, consumer=consumer, instance=instance, cursor=cursor, credit=credit)
        return self.ask(hello)

    def append(self, prompts: Sequence[Any], first: int = 0, group_size: int = 2) -> Any:
        payload = wire.encode_payload([as_prompt(prompt) for prompt in prompts])
        message = wire.AppendPrompts(request_id=0, first=first, group_size=group_size, num_bytes=len(payload))
        return self.ask(message, payload)

    def start(
        self,
        round_id: str,
        target_groups: int | None = 2,
        *,
        prompts: Sequence[Any] | None = None,
        group_size: int = 2,
        **fields: Any,
    ) -> Any:
        payload = None if prompts is None else wire.encode_payload([as_prompt(prompt) for prompt in prompts])
        sampling = fields.pop("sampling", SamplingConfig(max_tokens=8))
        message = wire.StartRound(
            request_id=0, round_id=round_id, group_size=group_size, sampling=sampling, target_groups=target_groups,
            carry=prompts is None, num_bytes=0 if payload is None else len(payload), **fields,
        )  # fmt: skip
        return self.ask(message, payload)

    def ack(self, seq: int) -> Any:
        return self.ask(wire.Ack(request_id=0, seq=seq))

    def read_round(self, round_id: str, timeout_s: float = WAIT_S) -> tuple[list[Group], Round]:
        """Groups and end of a round, once all of it has come."""
        wait_until(lambda: self._pump() or self._end_of(round_id) is not None, timeout_s)
        end = self._end_of(round_id)
        assert end is not None
        return self.groups(round_id), end

    def groups(self, round_id: str | None = None) -> list[Group]:
        return [
            wire.decode_result(payload, Group)
            for seq, (delivery, payload) in sorted(self.deliveries.items())
            if delivery.kind == "group" and round_id in (None, delivery.round_id)
        ]

    def trajectory_ids(self) -> list[str]:
        return [t.trajectory_id for group in self.groups() for t in group.trajectories]

    def pump(self, seconds: float) -> None:
        """Take what comes for so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.receive(left)

    def begin(self, push_id: str, version: int, **fields: Any) -> Any:
        return self.ask(wire.BeginWeights(request_id=0, push_id=push_id, version=version, **fields))

    def commit(self, push_id: str, num_tensors: int, digest: str) -> Any:
        message = wire.CommitWeights(request_id=0, push_id=push_id, num_tensors=num_tensors, digest=digest)
        return self.ask(message, timeout_s=60.0)

    def send_tensor(
        self, push_id: str, index: int, spec: wire.TensorSpec, data: bytes, serial: int, *, wrong: bool = False
    ) -> str:
        """One tensor in one chunk; returns its checksum."""
        found = checksum(data)
        announced = "0" * 32 if wrong else found
        self.send(wire.WeightsTensor(push_id=push_id, index=index, spec=spec, payload_bytes=len(data)))
        chunk = wire.WeightsChunk(
            push_id=push_id, serial=serial, offset=0, length=len(data), checksum=announced, num_bytes=len(data)
        )
        self.send(chunk, data)
        return found

    def push(self, push_id: str, version: int, tensors: Mapping[str, tuple[wire.TensorSpec, bytes]]) -> Any:
        """All weights, a chunk a tensor: for small models only. The last answer."""
        ready = self.begin(push_id, version)
        if isinstance(ready, wire.Refused):
            return ready
        checksums = {}
        for index, (name, (spec, data)) in enumerate(tensors.items()):
            checksums[name] = self.send_tensor(push_id, index, spec, data, index)
        return self.commit(push_id, len(tensors), digest_of(checksums))

    def _pump(self) -> bool:
        self.receive(0.05)
        return False

    def _end_of(self, round_id: str) -> Round | None:
        for delivery, payload in self.deliveries.values():
            if delivery.kind == "round" and delivery.round_id == round_id:
                return wire.decode_result(payload, Round)
        return None


def tensors_of(folder: Path, *, scale: float = 1.0) -> dict[str, tuple[wire.TensorSpec, bytes]]:
    """All tensors of a float32 checkpoint, times `scale`."""
    tensors = {}
    for stored in stored_tensors(folder):
        entry = stored.entry
        with stored.path.open("rb") as file:
            file.seek(stored.offset)
            values = np.frombuffer(file.read(entry.num_bytes), "<f4") * np.float32(scale)
        tensors[entry.name] = (wire.TensorSpec(entry.name, entry.dtype, tuple(entry.shape)), values.tobytes())
    return tensors


def as_prompt(value: Any) -> Prompt:
    return value if isinstance(value, Prompt) else Prompt(token_ids=list(value))


def wait_until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@contextlib.contextmanager
def raw_client(address: str, **options: Any) -> Iterator[RawBridgeClient]:
    """A client that has a session."""
    keys = options.pop("keys", None)
    with RawBridgeClient(address, keys=keys) as client:
        welcome = client.hello(**options)
        assert isinstance(welcome, wire.Welcome), welcome
        client.welcome = welcome  # type: ignore[attr-defined]
        yield client
