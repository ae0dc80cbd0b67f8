"""A push in the service: whatever comes, the engine's weights are a version that was pushed whole."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace
from weight_examples import (
    ENTRIES,
    ITEM_BYTES,
    MANIFEST,
    Weights,
    as_bytes,
    changed_weights,
    random_weights,
    spec_of,
    staged_bytes,
    write_checkpoint,
)  # fmt: skip

from longtail.engine.weight_manifest import Manifest, TensorEntry
from longtail.engine.weight_segment import WeightSegment
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.errors import PushRefusedError
from longtail.trainer_bridge.weights.delta import changed
from longtail.trainer_bridge.weights.manifest import checksum, digest_of, is_checksum
from longtail.trainer_bridge.weights.ring import Ring
from longtail.trainer_bridge.weights.staging import Staging

CHUNK = 50
Sent = tuple[Any, bytes]


def checksums_of(weights: Weights) -> dict[str, str]:
    return {name: checksum(data.data) for name, data in weights.items()}


def messages_of(
    weights: Weights, version: int, base: Weights | None = None, base_version: int = 0, push_id: str = "p"
) -> list[Sent]:
    """All messages of a push, by hand: what is sent here owes nothing to `push.py`."""
    begin = wire.BeginWeights(
        request_id=1, push_id=push_id, version=version, base_version=None if base is None else base_version
    )
    sent: list[Sent] = [(begin, b"")]
    serial = index = 0
    for entry in ENTRIES:
        data, num_changed = weights[entry.name].tobytes(), None
        if base is not None:
            unsigned = f"u{ITEM_BYTES[entry.dtype]}"
            delta = changed(base[entry.name].view(unsigned), weights[entry.name].view(unsigned))
            payload = delta.indices.tobytes() + delta.values.tobytes()
            if not len(delta.indices):
                continue
            if len(payload) <= len(data):
                data, num_changed = payload, len(delta.indices)
        announced = wire.WeightsTensor(
            push_id=push_id, index=index, spec=spec_of(entry.name), payload_bytes=len(data), num_changed=num_changed
        )
        sent.append((announced, b""))
        index += 1
        for offset in range(0, max(1, len(data)), CHUNK):
            part = data[offset : offset + CHUNK]
            is_last = offset + len(part) == len(data)
            sent.append((
                wire.WeightsChunk(
                    push_id=push_id, serial=serial, offset=offset, length=len(part), num_bytes=len(part),
                    checksum=checksums_of(weights)[entry.name] if is_last else None,
                ),
                part,
            ))  # fmt: skip
            serial += 1
    digest = digest_of(checksums_of(weights))
    sent.append((wire.CommitWeights(request_id=2, push_id=push_id, num_tensors=index, digest=digest), b""))
    return sent


def handle(staging: Staging, message: Any, payload: bytes = b"") -> Any:
    match message:
        case wire.BeginWeights():
            return staging.begin(message)
        case wire.WeightsTensor():
            return staging.tensor(message)
        case wire.WeightsChunk():
            return staging.chunk(message, payload)
        case wire.CommitWeights():
            return staging.commit(message)
    raise AssertionError(message)


def push(staging: Staging, sent: list[Sent]) -> Any:
    """Send all of it; what was staged."""
    return [handle(staging, *one) for one in sent][-1]


def staging_of(**options: Any) -> Staging:
    return Staging(MANIFEST, **({"version": 0, "chunk_bytes": CHUNK, "window": 4} | options))


def mirror_of(staging: Staging) -> dict[str, bytes] | None:
    """The engine's weights as the service has them."""
    segment = staging._weights._mirror
    return None if segment is None else {e.name: segment.bytes_of(e.name).tobytes() for e in ENTRIES}


# ---- what is right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_threaded", [False, True])
def test_versions_one_after_another(is_threaded: bool) -> None:
    with ThreadPoolExecutor(1) as executor:
        staging = staging_of(executor=executor if is_threaded else None)
        weights = random_weights(0)
        staged = push(staging, messages_of(weights, 1))
        assert "base" not in staged.update_info, "the engine goes back to its checkpoint"
        staging.applied()
        for version in range(2, 12):
            last, weights = weights, changed_weights(weights, version, 0.3 if version % 4 else 0.9)
            sent = messages_of(weights, version, None if version == 6 else last, version - 1)
            staged = push(staging, sent)
            assert staged_bytes(staged.update_info) == as_bytes(weights)
            assert staged_bytes(staged.update_info["base"]) == as_bytes(last)
            assert staged.version == version
            assert staged.num_bytes_received == sum(len(payload) for _, payload in sent)
            staging.applied()
            assert staging.version == version
            assert staging.digest == digest_of(checksums_of(weights))
        staging.close()


def test_the_first_difference_is_to_the_checkpoint(tmp_path: Path) -> None:
    weights = random_weights(3)
    staging = staging_of(checkpoint=write_checkpoint(tmp_path, weights))
    new = changed_weights(weights, 4)
    staged = push(staging, messages_of(new, 1, weights))
    assert staged_bytes(staged.update_info) == as_bytes(new)
    assert staged_bytes(staged.update_info["base"]) == as_bytes(weights)


def test_a_difference_of_nothing(tmp_path: Path) -> None:
    weights = random_weights(3)
    staging = staging_of(checkpoint=write_checkpoint(tmp_path, weights))
    for version in (1, 2):
        staged = push(staging, messages_of(weights, version, weights, version - 1))
        assert staged_bytes(staged.update_info) == as_bytes(weights)
        assert staged.num_bytes_received == 0
        staging.applied()


def test_a_checkpoint_that_is_gone_refuses_differences_only(tmp_path: Path) -> None:
    weights = random_weights(3)
    folder = write_checkpoint(tmp_path, weights)
    staging = staging_of(checkpoint=folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(PushRefusedError, match="checkpoint"):
        push(staging, messages_of(weights, 1, weights))
    assert staging.push_id is None
    assert push(staging, messages_of(weights, 1)).version == 1


def test_chunks_in_shared_memory() -> None:
    ring = Ring.create(num_slots=3, slot_bytes=CHUNK)
    staging, weights, trainer = staging_of(ring=ring), random_weights(5), Ring.attach(ring.spec)
    credit = -1
    for message, payload in messages_of(weights, 1):
        if isinstance(message, wire.BeginWeights):
            assert staging.begin(replace(message, transport="shm")) == {"window": 3, "chunk_bytes": CHUNK}
        elif isinstance(message, wire.WeightsChunk):
            assert message.serial - credit <= 3, "credit must come in time"
            trainer.slot(message.serial)[: len(payload)] = np.frombuffer(payload, np.uint8)
            credit = staging.chunk(replace(message, slot=message.serial % 3, num_bytes=0)) or credit
            trainer.slot(message.serial)[:] = 0
        else:
            staged = handle(staging, message)
    assert staged_bytes(staged.update_info) == as_bytes(weights)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 9])
def test_credit_never_runs_out(window: int) -> None:
    staging, credit = staging_of(window=window), -1
    for message, payload in messages_of(random_weights(0), 1):
        if isinstance(message, wire.WeightsChunk):
            assert message.serial - credit <= window
        found = handle(staging, message, payload)
        if isinstance(message, wire.WeightsChunk) and found is not None:
            assert found == message.serial
            credit = found


def test_needed_weights_may_have_the_version_that_the_engine_says_once() -> None:
    staging, weights = staging_of(version=7, is_needed=True, checkpoint=Path("never read")), random_weights(0)
    for sent in (messages_of(weights, 6), messages_of(weights, 8, weights, 7)):
        with pytest.raises(PushRefusedError):
            push(staging, sent)
    push(staging, messages_of(weights, 7))
    staging.applied()
    with pytest.raises(PushRefusedError, match="version: expected 8 or above"):
        push(staging, messages_of(random_weights(1), 7))
    push(staging, messages_of(weights, 8, weights, 7))


def test_a_version_that_comes_again_is_known_if_its_weights_are_the_same() -> None:
    """The answer to its push was lost, so that its trainer pushes it once more."""
    staging, weights = staging_of(), random_weights(0)
    assert not push(staging, messages_of(weights, 1)).is_known
    staging.applied()
    before = staging.digest, mirror_of(staging)
    for sent in (messages_of(weights, 1), messages_of(weights, 1, weights, 1)):
        assert push(staging, sent).is_known
        staging.abort()
        assert (staging.digest, mirror_of(staging)) == before
    with pytest.raises(PushRefusedError, match="because version 1 has other weights"):
        push(staging, messages_of(random_weights(1), 1))
    assert (staging.version, staging.digest, mirror_of(staging)) == (1, *before)


# ---- what is wrong ----------------------------------------------------------------------------------------------


def bad_pushes() -> dict[str, tuple[Any, str, str]]:
    """Name to (what to do with the messages, code, part of the error)."""

    def change(kind: type, place: int = 0, **fields: Any) -> Any:
        def edit(sent: list[Sent]) -> list[Sent]:
            places = [i for i, (message, _) in enumerate(sent) if isinstance(message, kind)]
            i = places[place]
            return [*sent[:i], (replace(sent[i][0], **fields), sent[i][1]), *sent[i + 1 :]]

        return edit

    def drop(kind: type, place: int = 0) -> Any:
        return lambda sent: [one for one in sent if one is not [s for s in sent if isinstance(s[0], kind)][place]]

    def repeat(kind: type, place: int = 0) -> Any:
        def edit(sent: list[Sent]) -> list[Sent]:
            one = [s for s in sent if isinstance(s[0], kind)][place]
            i = sent.index(one)
            return [*sent[:i], one, one, *sent[i + 1 :]]

        return edit

    def swap(first: int, second: int) -> Any:
        def edit(sent: list[Sent]) -> list[Sent]:
            sent = list(sent)
            sent[first], sent[second] = sent[second], sent[first]
            return sent

        return edit

    def flip(place: int) -> Any:
        def edit(sent: list[Sent]) -> list[Sent]:
            i = [i for i, (m, p) in enumerate(sent) if isinstance(m, wire.WeightsChunk) and p][place]
            payload = bytearray(sent[i][1])
            payload[len(payload) // 2] ^= 0x10
            return [*sent[:i], (sent[i][0], bytes(payload)), *sent[i + 1 :]]

        return edit

    tensor, chunk, commit = wire.WeightsTensor, wire.WeightsChunk, wire.CommitWeights
    embed = spec_of("embed")
    return {
        "unknown name": (change(tensor, spec=replace(embed, name="other")), "invalid", "tensors: expected only"),
        "wrong shape": (change(tensor, spec=replace(embed, shape=(7, 13))), "invalid", r"tensors\[embed\].shape"),
        "wrong dtype": (change(tensor, spec=replace(embed, dtype="int32")), "invalid", r"tensors\[embed\].dtype"),
        "duplicate": (change(tensor, 1, spec=embed), "invalid", r"tensors\[embed\]: expected each tensor once"),
        "wrong index": (change(tensor, 1, index=5), "gap", "index"),
        "payload too long": (change(tensor, payload_bytes=1 << 50), "invalid", "payload_bytes"),
        "payload too short": (change(tensor, payload_bytes=10), "invalid", "payload_bytes"),
        "difference in whole weights": (change(tensor, num_changed=3), "invalid", "num_changed"),
        "missing tensor": (drop(tensor, 1), "gap", "chunk: expected a tensor first"),
        "missing chunk": (drop(chunk, 1), "gap", "serial"),
        "chunk twice": (repeat(chunk, 0), "gap", "serial"),
        "last chunk twice": (repeat(chunk, -1), "gap", "chunk: expected a tensor first"),
        "chunks in another order": (swap(2, 3), "gap", "serial"),
        "chunk before its tensor": (swap(1, 2), "gap", "chunk: expected a tensor first"),
        "another offset": (change(chunk, 1, offset=51), "gap", "offset"),
        "negative length": (change(chunk, 0, length=-1, num_bytes=0), "invalid", "length"),
        "no length": (change(chunk, 0, length=0), "invalid", "length"),
        "longer than the payload": (change(chunk, 0, length=49), "invalid", "chunk: expected 49 bytes"),
        "longer than a chunk": (change(chunk, 0, length=CHUNK + 1), "invalid", "length"),
        "in a slot": (change(chunk, 0, slot=0), "invalid", "chunk"),
        "checksum too early": (change(chunk, 0, checksum="0" * 32), "invalid", "checksum"),
        "no checksum": (change(chunk, -1, checksum=None), "invalid", "checksum"),
        "checksum that is none": (change(chunk, -1, checksum="x" * 32), "invalid", "checksum"),
        "wrong checksum": (change(chunk, -1, checksum="0" * 32), "verification", r"tensors\[head\].checksum"),
        "flipped bit": (flip(0), "verification", "checksum"),
        "flipped last bit": (flip(-1), "verification", "checksum"),
        "commit too early": (lambda sent: [*sent[:3], sent[-1]], "gap", "commit"),
        "tensors left out": (lambda sent: [*sent[:-3], sent[-1]], "gap", "num_tensors"),
        "tensors left out, knowingly": (
            lambda sent: [*sent[:-3], (replace(sent[-1][0], num_tensors=len(ENTRIES) - 1), b"")], "invalid", "head",
        ),
        "wrong number": (change(commit, num_tensors=99), "gap", "num_tensors"),
        "wrong digest": (change(commit, digest="0" * 32), "verification", "digest"),
        "begun twice": (repeat(wire.BeginWeights), "busy", "push_id"),
        "version again": (change(wire.BeginWeights, version=1), "invalid", "version"),
        "another base": (change(wire.BeginWeights, base_version=0), "invalid", "base_version"),
        "no ring": (change(wire.BeginWeights, transport="shm"), "unsupported", "transport"),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_pushes())
def test_a_push_that_is_not_right_changes_nothing(name: str) -> None:
    edit, code, what = bad_pushes()[name]
    staging, weights, new = staging_of(), random_weights(0), random_weights(1)
    push(staging, messages_of(weights, 1))
    staging.applied()
    before = staging.version, staging.digest, mirror_of(staging)
    with pytest.raises(PushRefusedError, match=what) as caught:
        push(staging, edit(messages_of(new, 2)))
    assert caught.value.code == code
    assert (staging.version, staging.digest, mirror_of(staging)) == before
    staging.abort()
    staged = push(staging, messages_of(new, 2))
    assert staged_bytes(staged.update_info) == as_bytes(new), "negative control: the push itself is right"


def test_a_difference_to_what_the_service_does_not_have_is_refused() -> None:
    staging, weights = staging_of(), random_weights(0)
    with pytest.raises(PushRefusedError) as caught:
        push(staging, messages_of(weights, 1, weights, 0))
    assert (caught.value.code, caught.value.field) == ("unsupported", "base_version")


@pytest.mark.parametrize("fault", ["beyond", "order", "twice", "value", "negative", "larger"])
@pytest.mark.parametrize("is_threaded", [False, True])
def test_differences_that_are_none(fault: str, is_threaded: bool) -> None:
    manifest = Manifest([TensorEntry("w", "float32", (20,))])
    with ThreadPoolExecutor(1) as executor:
        staging = Staging(manifest, version=0, executor=executor if is_threaded else None)
        old, spec = np.arange(20, dtype="f4"), wire.TensorSpec("w", "float32", (20,))
        indices, values = np.array([3, 9], "u4"), np.array([-1, -2], "f4")
        new = old.copy()
        new[indices] = values
        begin_whole(staging, spec, old)
        before = staging.digest
        match fault:
            case "beyond":
                indices = np.array([3, 20], "u4")
            case "order":
                indices = np.array([9, 3], "u4")
            case "twice":
                indices = np.array([3, 3], "u4")
            case "value":
                indices = np.array([3, 10], "u4")
        num_changed = {"negative": -1, "larger": 21}.get(fault, 2)
        payload = indices.tobytes() + values.tobytes()
        digest = digest_of({"w": xxhash.xxh3_128_hexdigest(new)})

        def send() -> None:
            staging.begin(wire.BeginWeights(request_id=1, push_id="d", version=2, base_version=1))
            staging.tensor(
                wire.WeightsTensor(
                    push_id="d", index=0, spec=spec, payload_bytes=num_changed * 8, num_changed=num_changed
                )
            )
            last = xxhash.xxh3_128_hexdigest(new)
            staging.chunk(wire.WeightsChunk(push_id="d", serial=0, offset=0, length=16, checksum=last), payload)
            staging.commit(wire.CommitWeights(request_id=2, push_id="d", num_tensors=1, digest=digest))

        with pytest.raises(PushRefusedError, match=r"tensors\[w\]"):
            send()
        assert (staging.version, staging.digest) == (1, before)
        indices, values, num_changed = np.array([3, 9], "u4"), np.array([-1, -2], "f4"), 2
        payload = indices.tobytes() + values.tobytes()
        send()
        staging.applied()
        assert staging.digest == digest, "negative control"


def begin_whole(staging: Staging, spec: wire.TensorSpec, data: Any) -> None:
    """Push one tensor as version 1."""
    found = xxhash.xxh3_128_hexdigest(data)
    staging.begin(wire.BeginWeights(request_id=1, push_id="w", version=1))
    staging.tensor(wire.WeightsTensor(push_id="w", index=0, spec=spec, payload_bytes=data.nbytes))
    chunk = wire.WeightsChunk(push_id="w", serial=0, offset=0, length=data.nbytes, checksum=found)
    staging.chunk(chunk, data.tobytes())
    digest = digest_of({spec.name: found})
    staging.commit(wire.CommitWeights(request_id=2, push_id="w", num_tensors=1, digest=digest))
    staging.applied()


def test_messages_of_another_push_do_not_end_the_one_under_way() -> None:
    staging, weights = staging_of(), random_weights(0)
    sent = messages_of(weights, 1)
    for message, payload in sent:
        if not isinstance(message, wire.BeginWeights):
            with pytest.raises(PushRefusedError, match="push_id"):
                handle(staging, replace(message, push_id="other"), payload)
        found = handle(staging, message, payload)
    assert staged_bytes(found.update_info) == as_bytes(weights)
    assert not staging.abort("other")


class SlowExecutor(Executor):
    """Runs nothing before it is told to."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []

    def submit(self, function: Any, /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append(lambda: future.set_result(function(*args, **options)))
        return future

    def run(self) -> None:
        for work in self.waiting:
            work()
        self.waiting = []


def test_work_of_a_push_that_is_over_changes_nothing() -> None:
    executor = SlowExecutor()
    staging, weights = staging_of(executor=executor), random_weights(0)
    push(staging, messages_of(weights, 1))
    staging.applied()
    sent = messages_of(changed_weights(weights, 1, 0.3), 2, weights, 1)
    push(staging, sent[:-1])
    late = list(executor.waiting)
    assert late
    staging.abort()
    new = random_weights(2)
    push(staging, messages_of(new, 2)[:-1])
    executor.run()
    staged = handle(staging, *messages_of(new, 2)[-1])
    assert staged_bytes(staged.update_info) == as_bytes(new)


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("num_sent", [1, 4, 9, 13, 100])
def test_what_an_aborted_push_has_left_does_not_come_back(is_whole: bool, num_sent: int) -> None:
    """The spare segment is used again: what is in it must be known, or not be used."""
    staging, first = staging_of(), random_weights(0)
    second = {**first, "embed": changed_weights(first, 1, 0.1)["embed"], "head": random_weights(9)["head"]}
    third = {**second, "double": changed_weights(first, 3, 0.05)["double"]}
    assert len({checksum(w["double"].data) + checksum(w["embed"].data) for w in (first, second, third)}) == 3
    for version, weights, base in [(1, first, None), (2, second, first)]:
        push(staging, messages_of(weights, version, base, version - 1))
        staging.applied()
    wrong = random_weights(5) if is_whole else changed_weights(second, 6, 0.05)
    for message, payload in messages_of(wrong, 3, None if is_whole else second, 2)[:-1][:num_sent]:
        handle(staging, message, payload)
    staging.abort()
    staged = push(staging, messages_of(third, 3, second, 2))
    assert staged_bytes(staged.update_info) == as_bytes(third)


def test_a_difference_that_failed_does_not_come_back() -> None:
    """After a difference was worked into what was there, with the one before it, and was wrong."""
    staging, weights = staging_of(), random_weights(0)
    for version in (1, 2, 3):
        last, weights = weights, {**weights, "embed": weights["embed"].copy()}
        weights["embed"][4 * version] ^= 1
        push(staging, messages_of(weights, version, last if version > 1 else None, version - 1))
        staging.applied()
    new = {**weights, "embed": weights["embed"].copy()}
    new["embed"][100] ^= 1
    sent = messages_of(new, 4, weights, 3)
    broken = list(sent)
    broken[2] = (sent[2][0], bytes([sent[2][1][0] ^ 3]) + sent[2][1][1:])  # another index
    with pytest.raises(PushRefusedError, match="checksum"):
        push(staging, broken)
    assert staged_bytes(push(staging, sent).update_info) == as_bytes(new)


def test_nothing_is_allocated_for_what_is_only_announced() -> None:
    """A tensor of a terabyte, or a difference of one, costs nothing."""
    staging, weights = staging_of(), random_weights(0)
    push(staging, messages_of(weights, 1))
    staging.applied()
    tracemalloc.start()
    try:
        for spec, num_changed, payload_bytes in [
            (wire.TensorSpec("embed", "float32", (1 << 38,)), None, 1 << 40),
            (spec_of("embed"), 1 << 38, 1 << 41),
            (spec_of("embed"), 3, 1 << 40),
        ]:
            staging.begin(wire.BeginWeights(request_id=1, push_id="q", version=2, base_version=1))
            with pytest.raises(PushRefusedError):
                staging.tensor(
                    wire.WeightsTensor(
                        push_id="q", index=0, spec=spec, payload_bytes=payload_bytes, num_changed=num_changed
                    )
                )
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_memory_that_is_not_there_refuses_the_push(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(manifest: Manifest) -> WeightSegment:
        raise OSError(12, "Cannot allocate memory")

    staging = staging_of()
    with monkeypatch.context() as patched:
        patched.setattr(WeightSegment, "create", create)
        staging.begin(wire.BeginWeights(request_id=1, push_id="p", version=1))
        with pytest.raises(PushRefusedError) as caught:
            staging.prepare()
        assert caught.value.code == "full"
        assert staging.push_id is None
    push(staging, messages_of(random_weights(0), 1))


def test_the_digest_is_of_every_name_and_checksum() -> None:
    one = checksums_of(random_weights(0))
    assert is_checksum(digest_of(one))
    assert digest_of(dict(reversed(one.items()))) == digest_of(one)
    assert digest_of({**one, "embed": "0" * 32}) != digest_of(one)
    assert digest_of({("x" if name == "embed" else name): value for name, value in one.items()}) != digest_of(one)
    names = ["\uffff", "\U00010000", "a", ""]
    text = b"".join(n.encode() + b"\0" + b"0\n" for n in sorted(names, key=lambda name: name.encode()))
    assert digest_of(dict.fromkeys(names, "0")) == xxhash.xxh3_128_hexdigest(text)


# ---- any sequence -----------------------------------------------------------------------------------------------


class AnySequence(RuleBasedStateMachine):
    """Pushes right and wrong, that end anywhere: mirror and version are those of the last that was applied."""

    is_threaded = False

    def __init__(self) -> None:
        super().__init__()
        self.executor = ThreadPoolExecutor(1)
        self.staging = staging_of(executor=self.executor if self.is_threaded else None)
        self.weights: Weights | None = None
        self.new: Weights | None = None
        self.version = 0
        self.num_pushes = 0
        self.left: list[Sent] = []
        self.staged: Any = None

    def teardown(self) -> None:
        self.staging.close()
        self.executor.shutdown()

    @precondition(lambda self: self.staging.push_id is None)
    @rule(seed=st.integers(0, 1000), is_delta=st.booleans(), share=st.sampled_from([0.02, 0.3, 1.0]))
    def begin(self, seed: int, is_delta: bool, share: float) -> None:
        base = self.weights if is_delta else None
        self.new = random_weights(seed) if base is None else changed_weights(base, seed, share)
        self.num_pushes += 1
        sent = messages_of(self.new, self.version + 1, base, self.version, str(self.num_pushes))
        handle(self.staging, *sent[0])
        self.left = sent[1:]

    @precondition(lambda self: self.left and self.staged is None)
    @rule(count=st.integers(1, 12))
    def go_on(self, count: int) -> None:
        for message, payload in self.left[:count]:
            self.staged = handle(self.staging, message, payload)
        self.left = self.left[count:]
        if self.left:
            self.staged = None

    @precondition(lambda self: self.left and self.staged is None)
    @rule()
    def send_all(self) -> None:
        self.go_on(len(self.left))

    @precondition(lambda self: self.left and self.staged is None)
    @rule(data=st.data())
    def send_something_else(self, data: st.DataObject) -> None:
        """Any message of the push, out of order, replayed, or with a flipped bit."""
        sent = messages_of(self.new or {}, self.version + 1, None, 0, str(self.num_pushes))
        message, payload = data.draw(st.sampled_from([*sent[1:], *self.left]))
        if payload and data.draw(st.booleans()):
            place = data.draw(st.integers(0, len(payload) - 1))
            payload = payload[:place] + bytes([payload[place] ^ 1]) + payload[place + 1 :]
        try:
            found = handle(self.staging, message, payload)
        except PushRefusedError:
            assert self.staging.push_id is None
            self.left = []
            return
        if (message, payload) == self.left[0]:
            self.left = self.left[1:]
            self.staged = found if isinstance(message, wire.CommitWeights) else None
        else:
            # It was taken, such as the right tensor with wrong bytes before its end: it must not be committed.
            self.staging.abort()
            self.left = []

    @precondition(lambda self: self.staging.push_id is not None)
    @rule()
    def abort(self) -> None:
        assert self.staging.abort()
        self.left, self.staged = [], None

    @precondition(lambda self: self.staged is not None)
    @rule()
    def apply(self) -> None:
        assert self.new is not None
        assert staged_bytes(self.staged.update_info) == as_bytes(self.new)
        self.staging.applied()
        self.weights, self.version, self.staged = self.new, self.version + 1, None

    @invariant()
    def the_mirror_is_the_last_version(self) -> None:
        assert self.staging.version == self.version
        if self.weights is None:
            assert self.staging.digest is None
        else:
            assert mirror_of(self.staging) == as_bytes(self.weights)
            assert self.staging.digest == digest_of(checksums_of(self.weights))


class AnySequenceThreaded(AnySequence):
    is_threaded = True


AnySequence.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
AnySequenceThreaded.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
TestAnySequence = AnySequence.TestCase
TestAnySequenceThreaded = AnySequenceThreaded.TestCase
