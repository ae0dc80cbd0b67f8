"""The bridge's wire format: every message, and the one way to put it into frames and to take it out again.

A message is a ZeroMQ multipart message between a client's DEALER and the service's ROUTER socket:

    frame 1   8 bytes: `LTBRID` and the protocol version, an unsigned number of 2 bytes, little-endian
    frame 2   MessagePack map with `type`, the name of one of the structs below, and its fields
    frame 3   only where `num_bytes` is above 0: that many bytes, as the message says

Nothing is decoded before version, number of frames and sizes are checked. Fields that are added come last and have a
default; fields that a reader does not know are skipped. Requests have a `request_id`, which one reply repeats as
`reply_to`; a request may be sent again, with the same or another id, and does what it asks for once. PROTOCOL.md has
the conversations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import msgspec

from longtail.engine.config import SamplingConfig
from longtail.engine.packed_groups import PackedGroup, pack_group, unpack_group
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Group, Round, Trajectory
from longtail.scheduler.errors import InvalidInputError, LongtailError, shown

PROTOCOL_VERSION = 1
MAX_HEADER_BYTES = 1 << 18
MAX_CHUNK_BYTES = 1 << 24
MAX_PROMPTS_BYTES = 1 << 26
MAX_DELIVERY_BYTES = 1 << 30
#: Tokens that the branches of a group leave out: as many as a delivery could hold of whole trajectories.
MAX_SHARED_TOKENS = MAX_DELIVERY_BYTES // 16
#: So long, at least, a connection may need for one frame before either side gives it up.
LINK_TIMEOUT_MS = 20_000
#: Of what a client calls itself, a round or a push.
MAX_NAME_CHARS = 200

_SIGNATURE = b"LTBRID"
_PREFIX = _SIGNATURE + PROTOCOL_VERSION.to_bytes(2, "little")

#: Bytes of one element. Names are torch's; all are stored little-endian.
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip

Buffer = bytes | bytearray | memoryview
WireProblem = Literal["signature", "version", "frames", "size", "header", "type", "payload"]
#: Why a request was refused; `message` of `Refused` has the words.
RefusalCode = Literal[
    "invalid",  # a field is wrong: see `field`, `expected`, `got`
    "session",  # say hello first: the service does not know the sender (any more)
    "busy",  # another consumer has the engine, or another round or push runs
    "epoch",  # the cursor is of another store of deliveries
    "gap",  # prompts or chunks are missing before this one
    "weights",  # the engine has to get weights first
    "full",  # a bound on memory or disk is reached; try again later
    "verification",  # what was pushed is not what was announced; the old version serves
    "apply",  # the new weights did not load; the old version was put back and serves
    "engine",  # the engine died or timed out
    "wire",  # the message could not be read
    "cancelled",  # somebody asked for the end of the round
    "unsupported",  # this engine or transport can't
]
EngineState = Literal["idle", "running", "throttled", "updating", "needs_weights", "dead"]
Transport = Literal["zmq", "shm"]
Result = TypeVar("Result", Group, Round, Trajectory)


class WireError(LongtailError, ValueError):
    """A message that is not one of this protocol, or breaks its bounds.

    Attributes:
        problem: which check failed.
        request_id: of the message, where that much could be read.

    """

    def __init__(self, problem: WireProblem, expected: str, got: object, request_id: int | None = None) -> None:
        self.problem = problem
        self.expected = expected
        self.got = shown(got)
        self.request_id = request_id
        super().__init__(f"{problem}: expected {expected}, got {self.got}")


def _tag(class_name: str) -> str:
    """`StartRound` is `start_round` on the wire."""
    return re.sub("(?<!^)(?=[A-Z])", "_", class_name).lower()


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=_tag, omit_defaults=True):
    """Root of all messages; `num_bytes` is the length of the third frame."""


class Cursor(msgspec.Struct, frozen=True):
    """A position in a service's stream of deliveries: everything up to `seq` of the store `epoch`."""

    epoch: str
    seq: int


class TensorSpec(msgspec.Struct, frozen=True):
    """A tensor: C-contiguous, little-endian, `dtype` one of `ITEM_BYTES`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor."""
        return self.numel * ITEM_BYTES[self.dtype]


# ---- client to service ---------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """Begin, or take up, the session of `consumer`. Answered by `Welcome`.

    Attributes:
        consumer: name of the trainer, the same after a restart.
        instance: random name of this process's client; a newer one takes the session over.
        cursor: what the consumer has used for good, so that it must not come again; `None` goes on where the service
            last heard of.
        credit: how many deliveries beyond the cursor may be sent unasked.
        received: deliveries up to here this client has, used or not: they need not be sent again. 0 if it has none.

    """

    request_id: int
    consumer: str
    instance: str
    cursor: Cursor | None = None
    credit: int = 0
    received: int = 0


class Goodbye(Message, frozen=True):
    """The client leaves; what it did not acknowledge stays."""

    request_id: int


class Ping(Message, frozen=True):
    """A sign of life. Answered by `Heartbeat`."""


class AppendPrompts(Message, frozen=True):
    """Prompts for the positions from `first` of the consumer's prompts. Answered by `PromptsAppended`.

    The third frame is a MessagePack array of `Prompt`. Positions that are there already are skipped; a gap is refused.
    """

    request_id: int
    first: int
    group_size: int
    num_bytes: int


class StartRound(Message, frozen=True):
    """Run a round; with `target_groups=None` a stream of groups, until it is cancelled. Answered by `RoundAccepted`.

    Attributes:
        round_id: names the round: the same id again starts nothing, among the last 1000 of its kind.
        num_groups: of a stream, groups in flight.
        carry: draw on the appended prompts and carry unfinished groups over; a round that does not has its own
            prompts in the third frame, as `AppendPrompts` has them, and returns cut groups too.
        preview: send trajectories as they end, too (`Preview`).

    """

    request_id: int
    round_id: str
    group_size: int
    sampling: SamplingConfig
    target_groups: int | None = None
    num_groups: int = 0
    over_provision: float | None = None
    carry: bool = True
    preview: bool = False
    num_bytes: int = 0


class CancelRound(Message, frozen=True):
    """End a round or a stream; unfinished groups are carried. Answered by `Done`, also if it has ended."""

    request_id: int
    round_id: str


class Credit(Message, frozen=True):
    """Deliveries up to `seq` may be sent."""

    seq: int


class Ack(Message, frozen=True):
    """The consumer has used everything up to `seq` for good. Answered by `Done`."""

    request_id: int
    seq: int


class BeginWeights(Message, frozen=True):
    """Begin a push. Answered by `WeightsReady`.

    Attributes:
        push_id: random.
        version: of the new weights, above the engine's.
        base_version: the engine's version, to which tensors are differences; `None` for a full push.
        transport: where the bytes of the chunks are: in the third frame, or in the service's shared memory.

    """

    request_id: int
    push_id: str
    version: int
    base_version: int | None = None
    transport: Transport = "zmq"


class WeightsTensor(Message, frozen=True):
    """Tensor number `index` of a push begins; its `payload_bytes` follow in chunks.

    Attributes:
        num_changed: of a difference, how many elements changed. Its bytes are their flat indices, ascending, as
            unsigned little-endian numbers of 4 bytes (8 where the tensor has 2**32 elements or more), then their
            values.
        payload_bytes: what follows.

    """

    push_id: str
    index: int
    spec: TensorSpec
    payload_bytes: int
    num_changed: int | None = None


class WeightsChunk(Message, frozen=True):
    """Bytes `[offset, offset + length)` of the current tensor, in order.

    Attributes:
        serial: counts the chunks of a push from 0.
        slot: where the bytes are in shared memory; with `None` they are the third frame.
        checksum: in a tensor's last chunk: XXH3-128 of the whole new tensor, 32 hexadecimal digits.

    """

    push_id: str
    serial: int
    offset: int
    length: int
    slot: int | None = None
    checksum: str | None = None
    num_bytes: int = 0


class WeightsParts(Message, frozen=True):
    """Several of these messages in one, in their order; only the last may have bytes in the third frame."""

    push_id: str
    parts: list[WeightsTensor | WeightsChunk]
    num_bytes: int = 0


class CommitWeights(Message, frozen=True):
    """All tensors were sent: verify and apply. Answered by `WeightsApplied`.

    Attributes:
        digest: see `manifest.digest_of`: of the names and checksums of all tensors of the new version, unchanged ones
            included.

    """

    request_id: int
    push_id: str
    num_tensors: int
    digest: str


class AbortWeights(Message, frozen=True):
    """Forget a push."""

    push_id: str


class ControlWeights(Message, frozen=True):
    """A step of one of vLLM's own weight transfers (NCCL, CUDA IPC), whose bytes take another way. Answered by `Done`.

    Attributes:
        op: the method of vLLM's `VLLMWeightSyncClient` without `weight`: what it does is in vLLM's documentation.
        info: its argument.
        version: of the new weights, with `finish`.

    """

    request_id: int
    op: Literal["init", "start", "update", "finish"]
    info: dict[str, Any] = {}
    version: int | None = None


class AskChecksum(Message, frozen=True):
    """Compute checksums of the weights that the model runs with. Answered by `Checksum`."""

    request_id: int


# ---- service to client ---------------------------------------------------------------------------------------------


class Status(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the service is doing.

    Attributes:
        reason: why it is throttled, or dead.
        weight_version: of the engine.
        num_unacked: deliveries that the consumer has not acknowledged.
        num_running: requests in the engine.
        num_prompts: appended so far; `num_prompts_used` of them were submitted.
        counters: totals since the service began, such as `output_tokens`, `throttled_s`.

    """

    state: EngineState
    reason: str | None = None
    weight_version: int = 0
    num_unacked: int = 0
    num_running: int = 0
    num_prompts: int = 0
    num_prompts_used: int = 0
    counters: dict[str, float] = {}


class RingSpec(msgspec.Struct, frozen=True):
    """Shared memory of `num_slots` slots of `slot_bytes`, reached by `path` on the service's host.

    Attributes:
        token: the first bytes of the memory, in hexadecimal: whoever finds them there sees the same memory.
        data_offset: where slot 0 begins.

    """

    path: str
    token: str
    data_offset: int
    slot_bytes: int
    num_slots: int


class Welcome(Message, frozen=True):
    """The session is open.

    Attributes:
        engine_id: of the service's state, the same after a restart if there is a journal.
        epoch: of its stream of deliveries.
        acked: everything up to here is done with. `last_seq` is the newest delivery.
        weights_needed: a version that must be pushed before rounds run, because it was pushed to this state and
            the engine does not have it.
        ring: the service's shared memory for chunks, if there is any.

    """

    reply_to: int
    engine_id: str
    epoch: str
    acked: int
    last_seq: int
    model: str
    max_model_len: int
    vocab_size: int
    heartbeat_s: float
    status: Status
    weights_needed: int | None = None
    ring: RingSpec | None = None
    server: str = ""


class Done(Message, frozen=True):
    """A request was carried out; `note` says so where there was nothing to do."""

    reply_to: int
    note: str = ""


class Refused(Message, frozen=True):
    """A request, a push or a message was refused, and changed nothing.

    Attributes:
        reply_to: the request; `None` for what has none.
        push_id: of the push that is over now.

    """

    code: RefusalCode
    message: str
    reply_to: int | None = None
    field: str = ""
    expected: str = ""
    got: str = ""
    push_id: str | None = None


class PromptsAppended(Message, frozen=True):
    """There are `num_prompts` prompts now; `num_known` of the request's were there before."""

    reply_to: int
    num_prompts: int
    num_known: int = 0


class RoundAccepted(Message, frozen=True):
    """The round's state: `started` by this request, `queued`, `running` or `done` since an earlier one."""

    reply_to: int
    round_id: str
    state: Literal["started", "queued", "running", "done"]


class Delivery(Message, frozen=True):
    """One entry of the stream of deliveries, sent until it is acknowledged.

    Attributes:
        seq: counts from 1 without gaps.
        kind: what the third frame is, in MessagePack: a `Group`, or the `Round` that has ended, without its groups.

    """

    seq: int
    round_id: str
    kind: Literal["group", "round"]
    num_bytes: int


class Preview(Message, frozen=True):
    """A `Trajectory` (third frame) has ended. Dropped when the client is slow; `Delivery` has it in its group."""

    round_id: str
    num_bytes: int


class RoundFailed(Message, frozen=True):
    """A round ended without a result; starting it again is allowed."""

    round_id: str
    code: RefusalCode
    message: str
    field: str = ""
    expected: str = ""
    got: str = ""


class WeightsReady(Message, frozen=True):
    """Chunks are welcome, at most `window` ahead of the last `WeightsCredit`, of at most `chunk_bytes` each."""

    reply_to: int
    push_id: str
    window: int
    chunk_bytes: int


class WeightsCredit(Message, frozen=True):
    """Chunks up to `serial` were taken; their slots are free."""

    push_id: str
    serial: int


class WeightsApplied(Message, frozen=True):
    """The engine samples from the new version.

    Attributes:
        pause_s: for how long no step ran. `num_bytes_received` counts the payload.

    """

    reply_to: int
    push_id: str
    version: int
    digest: str
    pause_s: float
    num_bytes_received: int


class Checksum(Message, frozen=True):
    """Of the running model.

    Attributes:
        digest: of the version that was pushed last and applied whole, as in `CommitWeights`; `None` if there was none.
        model: of the tensors that the engine computes with, which it may have fused or packed.

    """

    reply_to: int
    version: int
    digest: str | None
    model: str


class Heartbeat(Message, frozen=True):
    """Sent at least every `heartbeat_s`."""

    status: Status


ToService = (
    Hello | Goodbye | Ping | AppendPrompts | StartRound | CancelRound | Credit | Ack | BeginWeights | WeightsTensor
    | WeightsChunk | WeightsParts | CommitWeights | AbortWeights | ControlWeights | AskChecksum
)  # fmt: skip
ToClient = (
    Welcome | Done | Refused | PromptsAppended | RoundAccepted | Delivery | Preview | RoundFailed | WeightsReady
    | WeightsCredit | WeightsApplied | Checksum | Heartbeat
)  # fmt: skip

#: Most bytes of the third frame, by type; the others have none.
_PAYLOAD_BYTES: dict[type[Message], int] = {
    AppendPrompts: MAX_PROMPTS_BYTES,
    StartRound: MAX_PROMPTS_BYTES,
    WeightsChunk: MAX_CHUNK_BYTES,
    WeightsParts: MAX_CHUNK_BYTES,
    Delivery: MAX_DELIVERY_BYTES,
    Preview: MAX_DELIVERY_BYTES,
}
_NAMES = ("consumer", "instance", "round_id", "push_id")
_encoder = msgspec.msgpack.Encoder()
_to_service: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToService)
_to_client: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToClient)
_prompts = msgspec.msgpack.Decoder(list[Prompt])
_results: dict[type[Any], msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(PackedGroup if kind is Group else kind) for kind in (Group, Round, Trajectory)
}


def encode(message: Message, payload: Buffer | None = None) -> list[Buffer]:
    """The frames of a message; `payload` is not copied.

    Raises:
        WireError: the header is too long, because of a text in it.

    """
    assert getattr(message, "num_bytes", 0) == (0 if payload is None else memoryview(payload).nbytes)
    header = _encoder.encode(message)
    if len(header) > MAX_HEADER_BYTES:
        what = f"a header of at most {MAX_HEADER_BYTES} bytes for {type(message).__name__}"
        raise WireError("size", what, len(header), getattr(message, "request_id", None))
    return [_PREFIX, header] if payload is None else [_PREFIX, header, payload]


def encode_payload(value: Any) -> bytes:
    """What goes into a third frame: a `Group`, a `Round`, a `Trajectory` or a list of prompts.

    A group goes as a `PackedGroup`: what its trajectories share by branches is sent once.
    """
    return _encoder.encode(pack_group(value) if isinstance(value, Group) else value)


def decode_to_service(frames: Sequence[Buffer]) -> tuple[ToService, memoryview]:
    """A message to the service and its third frame, empty if there is none.

    Raises:
        WireError: the frames are not such a message. Its causes have an `InvalidInputError` if the message could be
            read, and a value is out of its bounds.

    """
    message, payload = _decode(frames, _to_service)
    for name in _NAMES:
        if len(value := getattr(message, name, "")) > MAX_NAME_CHARS:
            cause = InvalidInputError(name, f"at most {MAX_NAME_CHARS} characters", value)
            raise WireError("header", cause.expected, value, getattr(message, "request_id", None)) from cause
    return message, payload


def decode_to_client(frames: Sequence[Buffer]) -> tuple[ToClient, memoryview]:
    """A message to a client, see `decode_to_service`."""
    return _decode(frames, _to_client)


def decode_prompts(payload: Buffer) -> list[Prompt]:
    """The prompts of a third frame; whether the model can take them is not known here.

    Raises:
        WireError: it has none.

    """
    prompts: list[Prompt] = _decode_payload(payload, _prompts)
    return prompts


def decode_result(payload: Buffer, kind: type[Result]) -> Result:
    """The result of a third frame.

    Raises:
        WireError: it is not one.

    """
    result: Any = _decode_payload(payload, _results[kind])
    if isinstance(result, PackedGroup):
        num_shared = sum(max(0, one.num_shared) for one in result.trajectories)
        if num_shared > MAX_SHARED_TOKENS:
            raise WireError("payload", f"at most {MAX_SHARED_TOKENS} tokens that branches share", num_shared)
        try:
            result = unpack_group(result)
        except ValueError as error:
            raise WireError("payload", str(error), bytes(memoryview(payload)[:60])) from error
    value: Result = result
    return value


def _decode(frames: Sequence[Buffer], decoder: msgspec.msgpack.Decoder[Any]) -> tuple[Any, memoryview]:
    if not 2 <= len(frames) <= 3:
        raise WireError("frames", "2 or 3 frames", len(frames))
    prefix = bytes(memoryview(frames[0])[: len(_PREFIX) + 1])
    if len(prefix) != len(_PREFIX) or not prefix.startswith(_SIGNATURE):
        raise WireError("signature", f"a first frame of {_SIGNATURE!r} and a version", prefix)
    if prefix != _PREFIX:
        version = int.from_bytes(prefix[len(_SIGNATURE) :], "little")
        raise WireError("version", f"protocol version {PROTOCOL_VERSION}", version)
    if (num_bytes := memoryview(frames[1]).nbytes) > MAX_HEADER_BYTES:
        raise WireError("size", f"a header of at most {MAX_HEADER_BYTES} bytes", num_bytes)
    try:
        message = decoder.decode(frames[1])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        is_type = "$.type" in str(error) or "missing required field `type`" in str(error)
        problem: WireProblem = "type" if is_type else "header"
        raise WireError(problem, str(error), bytes(frames[1])[:60], _request_id(frames[1])) from error
    payload = memoryview(frames[2]).cast("B") if len(frames) == 3 else memoryview(b"")
    announced, limit = getattr(message, "num_bytes", 0), _PAYLOAD_BYTES.get(type(message), 0)
    if not 0 <= announced <= limit:
        what = f"0 to {limit} bytes after {type(message).__name__}"
        raise WireError("size", what, announced, getattr(message, "request_id", None))
    if payload.nbytes != announced or (len(frames) == 3) != (announced > 0):
        got = f"{payload.nbytes} in {len(frames)} frames"
        raise WireError("size", f"{announced} bytes in a third frame", got, getattr(message, "request_id", None))
    return message, payload


class _AnyRequest(msgspec.Struct):
    request_id: int | None = None


def _request_id(header: Buffer) -> int | None:
    """Of a header that is not right as a whole, so that its sender can be told."""
    try:
        return msgspec.msgpack.decode(header, type=_AnyRequest).request_id
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


def _decode_payload(payload: Buffer, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError("payload", str(error), bytes(memoryview(payload)[:60])) from error
