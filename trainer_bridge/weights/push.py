"""The trainer's side of a push of weights: tensors in, chunks out.

`named_tensors` is any iterable of (name, array) and is read once: while later tensors are still being made, earlier
ones travel. At most a window of chunks is under way, so that a push needs no memory in proportion to the model; only
one that keeps a base for differences does, a copy of the model in host memory. An array must stay as it is until the
push has ended: it is sent from where it is.

    pusher = WeightPusher()
    report = pusher.push(channel, model.named_parameters(), version=3, delta="auto")

Names, shapes and dtypes are those of the engine's checkpoint. Whatever goes wrong, the engine goes on with the
version that it had. One push at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from longtail.trainer_bridge.errors import InvalidInputError, WeightsPushError
from longtail.trainer_bridge.weights.base_weights import BaseWeights
from longtail.trainer_bridge.weights.host_tensors import HostTensor, host_tensor
from longtail.trainer_bridge.weights.manifest import digest_of
from longtail.trainer_bridge.weights.push_channel import PushChannel
from longtail.trainer_bridge.weights.ring import Ring
from longtail.trainer_bridge.weights.vllm_sync import VllmTransfer
from longtail.trainer_bridge.wire import (
    BeginWeights,
    CommitWeights,
    RingSpec,
    Transport,
    WeightsApplied,
    WeightsChunk,
    WeightsParts,
    WeightsReady,
    WeightsTensor,
)

VllmTransport = Literal["nccl", "ipc"]
PushTransport = Literal["auto", "zmq", "shm", "nccl", "ipc"]
#: Chunks in one message: at most this share of the window, so that the service works on some while others are made.
_WINDOW_SHARE, _MAX_CHUNKS = 4, 64

Phase = Literal["begin", "produce", "encode", "send", "wait", "apply", "total"]


@dataclass(frozen=True, slots=True)
class PushProgress:
    """How far a push is: tensors and payload bytes that were handed to the client."""

    num_tensors: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PushReport:
    """A push that was applied.

    Attributes:
        version: of the weights.
        kind: whole tensors, or differences.
        transport: which way the bytes took.
        num_tensors: that were sent.
        num_bytes: payload.
        model_bytes: of all tensors.
        pause_s: for how long the engine made no step; of vLLM's transports, the whole transfer.
        seconds: of the trainer's thread, by phase: until the service was ready (`begin`), in `named_tensors`
            (`produce`), differences, copies and checksums (`encode`), queueing messages (`send`), for the service to
            take chunks (`wait`), from the last tensor until the engine had the weights (`apply`), and in `total`.
        digest: of the version; vLLM's transports have none.

    """

    version: int
    kind: Literal["full", "delta"]
    transport: Transport | VllmTransport
    num_tensors: int
    num_bytes: int
    model_bytes: int
    pause_s: float
    seconds: dict[Phase, float]
    digest: str


class WeightPusher:
    """Pushes to one engine, and keeps between pushes what differences need."""

    def __init__(self) -> None:
        self._base = BaseWeights()
        self._ring: tuple[RingSpec, Ring] | None = None
        self._vllm: VllmTransfer | None = None

    def remember(self, named_tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Take the weights that the engine has, such as those of its checkpoint, as the base of differences.

        Raises:
            InvalidInputError: a tensor is none.

        """
        self._base.forget()
        for name, array in named_tensors:
            self._base.keep(name, host_tensor(name, array).data)
        self._base.accept(version)

    def push(
        self,
        channel: PushChannel,
        named_tensors: Iterable[tuple[str, Any]],
        version: int,
        *,
        delta: bool | Literal["auto"] = False,
        transport: PushTransport = "auto",
        init_info: Any = None,
        timeout_s: float = 600.0,
        on_progress: Callable[[PushProgress], None] | None = None,
    ) -> PushReport:
        """Push weights and wait until the engine has them.

        Args:
            channel: to the service, for this push.
            named_tensors: names, shapes and dtypes of the checkpoint, in any order. Tensors of torch may be on a GPU.
            version: above the engine's.
            delta: send only the elements that changed since the version that this pusher pushed before, or
                remembered; true refuses if that is not the engine's, `auto` sends whole weights then. Other than
                false, it keeps a copy of the weights.
            transport: by default shared memory if the service is on this host, messages otherwise; `nccl` and `ipc`
                are vLLM's own, see `vllm_sync.py`.
            init_info: vLLM's `NCCLTrainerInitInfo` or `IPCTrainerInitInfo`, for those.
            timeout_s: bound on each wait for the service.
            on_progress: called after each tensor.

        Raises:
            InvalidInputError: an argument or a tensor is wrong.
            WeightsPushError: the service refused the push, or lost it.
            BridgeTimeoutError, BridgeClosedError: it does not answer, or the client was closed.

        """
        if isinstance(version, bool) or not isinstance(version, int) or version < 0:
            raise InvalidInputError("version", "an integer of 0 or more", version)
        if delta not in (True, False, "auto"):
            raise InvalidInputError("delta", "true, false or auto", delta)
        if transport in ("nccl", "ipc"):
            return self._push_by_vllm(channel, named_tensors, version, delta, transport, init_info, timeout_s)
        base = self._base if delta else None
        if base is None:
            self._base.forget()
        ring = self._pick_ring(channel, transport)
        base_version = None if base is None else self._base_version(channel, strict=delta is True)
        if base is not None and base_version is None:
            base.forget()
        run = _Run(channel, base, base_version, ring, timeout_s, on_progress)
        with run.clock("total"), self._rejecting():
            run.begin(version)
            run.send_all(named_tensors)
            applied = run.commit()
        if base is not None:
            base.accept(version)
        return run.report(version, applied)

    def close(self) -> None:
        """Give up memory: the ring, and the base of differences."""
        self._base.close()
        if self._ring is not None:
            self._ring[1].close()
            self._ring = None

    def _push_by_vllm(
        self,
        channel: PushChannel,
        named_tensors: Iterable[tuple[str, Any]],
        version: int,
        delta: bool | str,
        transport: VllmTransport,
        init_info: Any,
        timeout_s: float,
    ) -> PushReport:
        if delta is True:
            raise InvalidInputError("delta", f"false, because {transport} sends whole weights", delta)
        if getattr(init_info, "backend", None) != transport:
            raise InvalidInputError("init_info", f"vLLM's trainer init info of {transport}", init_info)
        self._base.forget()
        if self._vllm is None or self._vllm.init_info != init_info:
            self._vllm = VllmTransfer(init_info)
        start = time.perf_counter()
        num_tensors, num_bytes = self._vllm.push(channel, named_tensors, version, timeout_s)
        seconds = time.perf_counter() - start
        return PushReport(
            version=version,
            kind="full",
            transport=transport,
            num_tensors=num_tensors,
            num_bytes=num_bytes,
            model_bytes=num_bytes,
            pause_s=seconds,
            seconds={"total": seconds},
            digest="",
        )

    def _base_version(self, channel: PushChannel, *, strict: bool) -> int | None:
        """The base of a difference, if it is what the engine has; the service refuses if that has changed since."""
        base, engine = self._base.version, channel.engine_version
        if base is not None and base == engine:
            return base
        if strict:
            raise InvalidInputError("delta", f"auto, or version {engine} pushed or remembered by this client", base)
        return None

    def _pick_ring(self, channel: PushChannel, transport: str) -> Ring | None:
        if transport not in ("auto", "zmq", "shm"):
            raise InvalidInputError("transport", "auto, zmq, shm, nccl or ipc", transport)
        spec = channel.welcome.ring
        if transport == "zmq" or (spec is None and transport == "auto"):
            return None
        if spec is None:
            raise InvalidInputError("transport", "zmq, because the service has no shared memory", transport)
        if self._ring is None or self._ring[0] != spec:
            try:
                self._ring = (spec, Ring.attach(spec))
            except InvalidInputError as error:
                if transport == "auto":
                    return None
                raise InvalidInputError("transport", f"zmq, because {error}", transport) from error
        return self._ring[1]

    @contextmanager
    def _rejecting(self) -> Iterator[None]:
        try:
            yield
        except WeightsPushError as error:
            self._base.reject()
            if error.field == "base_version" or error.code == "verification":
                self._base.forget()
            raise
        except BaseException:
            # It may have been applied all the same.
            self._base.forget()
            raise


@dataclass(slots=True)
class _Run:
    """One push."""

    channel: PushChannel
    base: BaseWeights | None
    base_version: int | None
    ring: Ring | None
    timeout_s: float
    on_progress: Callable[[PushProgress], None] | None
    seconds: dict[Phase, float] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    window: int = 1
    chunk_bytes: int = 1
    parts: list[WeightsTensor | WeightsChunk] = field(default_factory=list)
    serial: int = 0
    num_sent: int = 0
    num_bytes: int = 0
    model_bytes: int = 0
    began: float = field(default_factory=time.perf_counter)

    @contextmanager
    def clock(self, phase: Phase) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(phase, start)

    def _add(self, phase: Phase, start: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @property
    def transport(self) -> Transport:
        return "zmq" if self.ring is None else "shm"

    def begin(self, version: int) -> None:
        channel = self.channel
        message = BeginWeights(
            request_id=channel.next_id(),
            push_id=channel.push_id,
            version=version,
            base_version=self.base_version,
            transport=self.transport,
        )
        with self.clock("begin"):
            ready = channel.request(message, "the service to take weights", self.timeout_s)
        assert isinstance(ready, WeightsReady)
        self.window, self.chunk_bytes = ready.window, ready.chunk_bytes

    def send_all(self, named_tensors: Iterable[tuple[str, Any]]) -> None:
        start = time.perf_counter()
        for pair in named_tensors:
            self._add("produce", start)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise InvalidInputError("named_tensors", "(name, tensor) pairs, as of named_parameters()", pair)
            name, array = pair
            if not isinstance(name, str) or name in self.checksums:
                raise InvalidInputError("named_tensors", "each name once", name)
            with self.clock("encode"):
                tensor = host_tensor(name, array)
            self.model_bytes += len(tensor.data)
            self._send_tensor(tensor)
            if self.on_progress is not None:
                self.on_progress(PushProgress(self.num_sent, self.num_bytes, time.perf_counter() - self.began))
            start = time.perf_counter()
        self._add("produce", start)

    def commit(self) -> WeightsApplied:
        channel = self.channel
        self._flush()
        message = CommitWeights(
            request_id=channel.next_id(),
            push_id=channel.push_id,
            num_tensors=self.num_sent,
            digest=digest_of(self.checksums),
        )
        with self.clock("apply"):
            applied = channel.request(message, "the weights to be applied", self.timeout_s)
        assert isinstance(applied, WeightsApplied)
        return applied

    def report(self, version: int, applied: WeightsApplied) -> PushReport:
        return PushReport(
            version=version,
            kind="full" if self.base_version is None else "delta",
            transport=self.transport,
            num_tensors=self.num_sent,
            num_bytes=self.num_bytes,
            model_bytes=self.model_bytes,
            pause_s=applied.pause_s,
            seconds=dict(self.seconds),
            digest=applied.digest,
        )

    def _send_tensor(self, tensor: HostTensor) -> None:
        if self.base is None or self.base_version is None:
            self._send_whole(tensor)
            return
        name = tensor.spec.name
        with self.clock("encode"):
            difference = self.base.difference(tensor)
        if difference.checksum is None:
            self._send_whole(tensor)
            return
        self.checksums[name] = new_checksum = difference.checksum
        if difference.num_changed:
            self._announce(tensor, len(difference.payload), difference.num_changed)
            self._send_bytes(difference.payload, lambda: new_checksum, None)

    def _send_whole(self, tensor: HostTensor) -> None:
        hasher = xxhash.xxh3_128()
        self._announce(tensor, len(tensor.data), None)
        self._send_bytes(tensor.data, hasher.hexdigest, hasher)
        self.checksums[tensor.spec.name] = hasher.hexdigest()
        if self.base is not None:
            with self.clock("encode"):
                self.base.keep(tensor.spec.name, tensor.data)

    def _announce(self, tensor: HostTensor, num_bytes: int, num_changed: int | None) -> None:
        message = WeightsTensor(
            push_id=self.channel.push_id,
            index=self.num_sent,
            spec=tensor.spec,
            payload_bytes=num_bytes,
            num_changed=num_changed,
        )
        self.parts.append(message)
        self.num_sent += 1

    def _send_bytes(self, data: npt.NDArray[np.uint8], checksum: Callable[[], str], hasher: Any) -> None:
        """Chunks of one tensor; `hasher` gets its bytes, and `checksum` gives what it says then."""
        for offset in range(0, max(1, len(data)), self.chunk_bytes):
            chunk = data[offset : offset + self.chunk_bytes]
            self._wait_for_room()
            start = time.perf_counter()
            if self.ring is None:
                if hasher is not None:
                    hasher.update(chunk)
            else:
                slot = self.ring.slot(self.serial)
                slot[: len(chunk)] = chunk
                if hasher is not None:
                    # What the service will read, which is still in the cache.
                    hasher.update(slot[: len(chunk)])
            self._add("encode", start)
            is_last = offset + len(chunk) == len(data)
            in_message = self.ring is None and len(chunk) > 0
            message = WeightsChunk(
                push_id=self.channel.push_id,
                serial=self.serial,
                offset=offset,
                length=len(chunk),
                slot=None if self.ring is None else self.serial % self.window,
                checksum=checksum() if is_last else None,
                num_bytes=len(chunk) if in_message else 0,
            )
            self.parts.append(message)
            self.serial += 1
            self.num_bytes += len(chunk)
            if in_message or self.serial % min(max(1, self.window // _WINDOW_SHARE), _MAX_CHUNKS) == 0:
                self._flush(chunk if in_message else None)

    def _flush(self, payload: npt.NDArray[np.uint8] | None = None) -> None:
        """Send what has gathered; `payload` are the bytes of the last part."""
        if not self.parts:
            return
        num_bytes = 0 if payload is None else len(payload)
        message = WeightsParts(push_id=self.channel.push_id, parts=self.parts, num_bytes=num_bytes)
        with self.clock("send"):
            self.channel.send(message, None if payload is None else payload.data)
        self.parts = []

    def _wait_for_room(self) -> None:
        if (lowest := self.serial - self.window) > self.channel.credited:
            self._flush()
            with self.clock("wait"):
                self.channel.wait_credit(lowest, f"chunk {lowest} of the weights to be taken", self.timeout_s)
