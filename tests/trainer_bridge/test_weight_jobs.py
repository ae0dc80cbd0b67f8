"""The service's side of a push, with a staging and an engine that do what a test says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_rollout_engine import FakeRolloutEngine
from raw_bridge_client import RawBridgeClient, raw_client, wait_until

from longtail.engine.errors import EngineTimeoutError, InvalidInputError, WeightsApplyError, WeightsHookError
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.errors import PushRefusedError
from longtail.trainer_bridge.service.config import BridgeConfig
from longtail.trainer_bridge.service.service import BridgeService
from longtail.trainer_bridge.service.state_folder import pushed_version

SPEC = wire.TensorSpec("w", "float32", (2,))


class Staged(NamedTuple):
    update_info: dict[str, Any]
    is_known: bool = False


class FakeStaging:
    """Attributes: `calls`, what was done, and `may_prepare`, what `prepare` waits for."""

    ring = None
    digest = "d"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.may_prepare = threading.Event()
        self.may_prepare.set()
        self.refuses: str | None = None
        self.is_known = False
        self.push_id: str | None = None

    def begin(self, message: wire.BeginWeights) -> dict[str, int]:
        assert self.push_id is None
        self._do("begin")
        self.push_id = message.push_id
        return {"window": 4, "chunk_bytes": 1024}

    def prepare(self) -> None:
        assert self.may_prepare.wait(20)
        self._do("prepare")

    def tensor(self, message: wire.WeightsTensor) -> None:
        assert self.push_id == message.push_id
        self._do("tensor")

    def chunk(self, message: wire.WeightsChunk, payload: memoryview) -> int | None:
        assert self.push_id == message.push_id
        assert payload.nbytes == message.num_bytes
        self._do("chunk")
        return message.serial

    def commit(self, message: wire.CommitWeights) -> Staged:
        self._do("commit")
        return Staged({"where": message.push_id}, self.is_known)

    def applied(self) -> None:
        self._do("applied")
        self.push_id = None

    def abort(self) -> bool:
        self.calls.append("abort")
        self.push_id = None
        return True

    def _do(self, what: str) -> None:
        self.calls.append(what)
        if what == self.refuses:
            self.push_id = None
            raise PushRefusedError("verification", what, "better", "worse")


class Bridge(NamedTuple):
    engine: FakeRolloutEngine
    staging: FakeStaging
    service: BridgeService
    client: RawBridgeClient

    def send(self, push_id: str = "p") -> None:
        """A tensor of 8 bytes."""
        self.client.send(wire.WeightsTensor(push_id=push_id, index=0, spec=SPEC, payload_bytes=8))
        self.client.send(wire.WeightsChunk(push_id=push_id, serial=0, offset=0, length=8, num_bytes=8), bytes(8))

    def push(self, push_id: str = "p", version: int = 1) -> Any:
        assert isinstance(self.client.begin(push_id, version), wire.WeightsReady)
        self.send(push_id)
        return self.client.commit(push_id, 1, "d")


@pytest.fixture
def bridge() -> Iterator[Bridge]:
    engine, staging = FakeRolloutEngine(), FakeStaging()
    with (
        BridgeService(engine, BridgeConfig(heartbeat_s=0.1), staging=staging) as service,
        raw_client(service.address) as client,
    ):
        yield Bridge(engine, staging, service, client)
        engine.may_update.set()
        staging.may_prepare.set()


def test_a_push(bridge: Bridge) -> None:
    applied = bridge.push()
    assert applied == wire.WeightsApplied(
        reply_to=applied.reply_to, push_id="p", version=1, digest="d", pause_s=0.25, num_bytes_received=8
    )
    assert bridge.staging.calls == ["begin", "prepare", "tensor", "chunk", "commit", "applied"]
    assert bridge.engine.updates == [({"where": "p"}, 1)]
    credits = [message for message, _ in bridge.client.seen if isinstance(message, wire.WeightsCredit)]
    assert credits == [wire.WeightsCredit(push_id="p", serial=0)]
    counters = bridge.service.counters()
    assert (counters["pushes"], counters["push_bytes"], counters["pause_s"]) == (1, 8, 0.25)
    assert bridge.client.ask(wire.AskChecksum(request_id=0)) == wire.Checksum(
        reply_to=applied.reply_to + 1, version=1, digest="d", model="model-1"
    )


def test_parts_in_one_message_are_the_same(bridge: Bridge) -> None:
    bridge.client.begin("p", 1)
    tensors = [wire.WeightsTensor(push_id="p", index=i, spec=SPEC, payload_bytes=8) for i in range(2)]
    chunks = [wire.WeightsChunk(push_id="p", serial=i, offset=0, length=8, num_bytes=8 * i) for i in range(2)]
    parts: list[Any] = [tensors[0], chunks[0], tensors[1], chunks[1]]
    bridge.client.send(wire.WeightsParts(push_id="p", parts=parts, num_bytes=8), bytes(8))
    assert isinstance(bridge.client.commit("p", 2, "d"), wire.WeightsApplied)
    assert bridge.staging.calls[2:6] == ["tensor", "chunk", "tensor", "chunk"]


def test_a_part_that_is_refused_ends_the_push_and_the_rest_is_skipped(bridge: Bridge) -> None:
    bridge.staging.refuses = "tensor"
    bridge.client.begin("p", 1)
    tensor = wire.WeightsTensor(push_id="p", index=0, spec=SPEC, payload_bytes=8)
    bridge.client.send(wire.WeightsParts(push_id="p", parts=[tensor, tensor, tensor]))
    refused = bridge.client.commit("p", 1, "d")
    assert isinstance(refused, wire.Refused)
    assert bridge.staging.calls.count("tensor") == 1
    assert sum(isinstance(message, wire.Refused) for message, _ in bridge.client.seen) == 2  # the push and the commit


def test_a_pushed_version_is_known_to_the_next_service(tmp_path: Path) -> None:
    """Also where nothing was sampled from it before everything died."""
    state = tmp_path / "state"
    engine = FakeRolloutEngine()
    with (
        BridgeService(engine, BridgeConfig(heartbeat_s=0.1, state=state), staging=FakeStaging()) as service,
        raw_client(service.address) as client,
    ):
        assert isinstance(Bridge(engine, FakeStaging(), service, client).push(version=6), wire.WeightsApplied)
        assert pushed_version(state) == 6
        for op in ("start", "update", "finish"):
            client.ask(wire.ControlWeights(request_id=0, op=op, version=9))
    assert pushed_version(state) == 9
    with pytest.raises(InvalidInputError, match=r"engine\.weight_version.*9 or above"):
        BridgeService(FakeRolloutEngine(weight_version=8), BridgeConfig(state=state), staging=None)
    BridgeService(
        FakeRolloutEngine(weight_version=9), BridgeConfig(state=state), staging=None, weights_needed=9
    ).close()  # fmt: skip


def test_a_version_that_cannot_be_noted_ends_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: object, version: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("longtail.trainer_bridge.service.service.remember_version", full)
    engine = FakeRolloutEngine()
    with (
        BridgeService(engine, BridgeConfig(heartbeat_s=0.1, state=tmp_path), staging=FakeStaging()) as service,
        raw_client(service.address) as client,
    ):
        assert isinstance(Bridge(engine, FakeStaging(), service, client).push(), wire.WeightsApplied)
        wait_until(lambda: isinstance(service.failure, OSError))


def test_a_hook_that_fails_does_not_undo_a_push(bridge: Bridge) -> None:
    bridge.engine.update_fails_with = WeightsHookError(1, 0.5, RuntimeError("no disk"))
    applied = bridge.push()
    assert isinstance(applied, wire.WeightsApplied)
    assert applied.pause_s == 0.5
    assert bridge.staging.calls[-1] == "applied"


def test_weights_that_the_engine_has_already_are_not_applied_again(bridge: Bridge) -> None:
    bridge.staging.is_known = True
    applied = bridge.push()
    assert isinstance(applied, wire.WeightsApplied)
    assert applied.pause_s == 0.0
    assert bridge.engine.updates == []
    assert bridge.staging.calls[-1] == "abort"


def test_the_socket_is_not_held_up_while_the_engine_takes_the_weights(bridge: Bridge) -> None:
    bridge.engine.may_update.clear()
    assert isinstance(bridge.client.begin("p", 1), wire.WeightsReady)
    commit = wire.CommitWeights(request_id=500, push_id="p", num_tensors=0, digest="d")
    bridge.client.send(commit)
    bridge.client.wait_for(wire.Heartbeat, lambda beat: beat.status.state == "updating")
    bridge.client.wait_for(wire.Heartbeat)
    for message in (
        wire.BeginWeights(request_id=0, push_id="q", version=2),
        wire.ControlWeights(request_id=0, op="init"),
        wire.AskChecksum(request_id=0),
    ):
        assert bridge.client.ask(message).code == "busy"
    bridge.client.send(wire.AbortWeights(push_id="p"))  # too late
    assert isinstance(bridge.client.append([[1]]), wire.PromptsAppended)
    # The client connects again meanwhile, and repeats what it has no answer to.
    with raw_client(bridge.service.address) as again:
        again.send(wire.CommitWeights(request_id=700, push_id="p", num_tensors=0, digest="d"))
        bridge.engine.may_update.set()
        assert again.wait_for(wire.WeightsApplied).reply_to == 700
        assert again.commit("p", 0, "d").version == 1
    assert bridge.engine.updates == [({"where": "p"}, 1)]


@pytest.mark.parametrize("what", ["begin", "prepare", "tensor", "chunk", "commit"])
def test_what_the_staging_refuses_ends_the_push_and_is_said_once(bridge: Bridge, what: str) -> None:
    bridge.staging.refuses = what
    answer = bridge.client.begin("p", 1)
    if isinstance(answer, wire.WeightsReady):
        bridge.send()
        bridge.send()  # was under way
        answer = bridge.client.wait_for(wire.Refused) if what != "commit" else bridge.client.commit("p", 1, "d")
    assert (answer.push_id, answer.code, answer.field) == ("p", "verification", what)
    bridge.client.pump(0.2)
    refused = [message for message, _ in bridge.client.seen if isinstance(message, wire.Refused)]
    assert len(refused) == 1
    assert bridge.engine.updates == []
    bridge.staging.refuses = None
    assert isinstance(bridge.push("next"), wire.WeightsApplied)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WeightsApplyError("they did not load"), "apply"),
        (RuntimeError("vLLM says no"), "apply"),
        (InvalidInputError("version", "more", 1), "invalid"),
    ],
)
def test_an_engine_that_does_not_take_them_keeps_what_it_has(bridge: Bridge, error: Exception, code: str) -> None:
    bridge.engine.update_fails_with = error
    refused = bridge.push()
    assert (refused.push_id, refused.code) == ("p", code)
    assert bridge.staging.calls[-1] == "abort"
    assert bridge.client.commit("p", 1, "d").code == code  # the same answer again
    assert bridge.service.status().weight_version == 0
    bridge.engine.update_fails_with = None
    assert isinstance(bridge.push("next"), wire.WeightsApplied)


def test_nobody_knows_what_an_engine_has_that_did_not_answer(bridge: Bridge) -> None:
    """It may still read the weights: they must not be touched, and the service must not go on."""
    bridge.engine.update_fails_with = EngineTimeoutError("the weights to be loaded", 1.0)
    refused = bridge.push()
    assert (refused.push_id, refused.code) == ("p", "engine")
    assert "abort" not in bridge.staging.calls
    assert isinstance(bridge.service.failure, EngineTimeoutError)


def test_an_engine_that_dies_of_an_update_is_dead(bridge: Bridge) -> None:
    bridge.engine.may_update.clear()
    bridge.client.begin("p", 1)
    bridge.client.send(wire.CommitWeights(request_id=500, push_id="p", num_tensors=0, digest="d"))
    bridge.client.wait_for(wire.Heartbeat, lambda beat: beat.status.state == "updating")
    bridge.engine.die()
    refused = bridge.client.wait_for(wire.Refused)
    assert (refused.reply_to, refused.push_id, refused.code) == (500, "p", "engine")
    bridge.client.wait_for(wire.Heartbeat, lambda beat: beat.status.state == "dead")


@pytest.mark.parametrize("how", ["abort", "begin", "goodbye", "takeover", "control"])
def test_a_push_that_is_left_is_forgotten(bridge: Bridge, how: str) -> None:
    bridge.client.begin("p", 1)
    bridge.send()
    if how == "abort":
        bridge.client.send(wire.AbortWeights(push_id="p"))
    elif how == "begin":
        bridge.client.begin("q", 1)
    elif how == "goodbye":
        bridge.client.ask(wire.Goodbye(request_id=0))
    elif how == "control":
        bridge.client.ask(wire.ControlWeights(request_id=0, op="init"))
    else:
        bridge.client.hello(instance="new")
    wait_until(lambda: "abort" in bridge.staging.calls)
    if how == "goodbye":
        bridge.client.hello()
    assert bridge.client.commit("p", 1, "d").code == "gap"
    assert bridge.engine.updates[:1] != [({"where": "p"}, 1)]


def test_a_push_that_is_aborted_while_it_is_prepared(bridge: Bridge) -> None:
    bridge.staging.may_prepare.clear()
    bridge.client.send(wire.BeginWeights(request_id=500, push_id="p", version=1))
    bridge.client.send(wire.AbortWeights(push_id="p"))
    assert isinstance(bridge.client.append([[1]]), wire.PromptsAppended)  # both were taken by now
    assert bridge.staging.calls == ["begin"]  # nobody touches it meanwhile
    bridge.staging.may_prepare.set()
    refused = bridge.client.wait_for(wire.Refused)
    assert (refused.reply_to, refused.push_id, refused.code) == (500, "p", "gap")
    assert isinstance(bridge.push("next"), wire.WeightsApplied)


def test_a_commit_before_the_push_is_ready_is_refused_and_ends_it(bridge: Bridge) -> None:
    bridge.staging.may_prepare.clear()
    bridge.client.send(wire.BeginWeights(request_id=500, push_id="p", version=1))
    bridge.client.send(wire.CommitWeights(request_id=501, push_id="p", num_tensors=0, digest="d"))
    refused = bridge.client.wait_for(wire.Refused)
    assert (refused.reply_to, refused.push_id, refused.code) == (501, "p", "gap")
    bridge.staging.may_prepare.set()
    refused = bridge.client.wait_for(wire.Refused)
    assert (refused.reply_to, refused.push_id, refused.code) == (500, "p", "gap")
    assert isinstance(bridge.push("next"), wire.WeightsApplied)


def test_a_begin_that_is_repeated_while_it_is_prepared(bridge: Bridge) -> None:
    bridge.staging.may_prepare.clear()
    bridge.client.send(wire.BeginWeights(request_id=500, push_id="p", version=1))
    bridge.client.hello()
    with raw_client(bridge.service.address) as again:
        again.send(wire.BeginWeights(request_id=600, push_id="p", version=1))
        again.wait_for(wire.Heartbeat)
        bridge.staging.may_prepare.set()
        assert again.wait_for(wire.WeightsReady).reply_to == 600
    assert bridge.staging.calls == ["begin", "prepare"]


def test_a_begin_that_is_repeated_is_answered_again(bridge: Bridge) -> None:
    for _ in range(2):
        assert isinstance(bridge.client.begin("p", 1), wire.WeightsReady)
    bridge.send()
    assert isinstance(bridge.client.commit("p", 1, "d"), wire.WeightsApplied)
    assert bridge.staging.calls == ["begin", "prepare", "tensor", "chunk", "commit", "applied"]


def test_no_push_begins_before_all_that_was_asked_for_is_done(bridge: Bridge) -> None:
    """A checksum that ends while a push is applied does not make room for another one."""
    bridge.client.begin("p", 1)
    bridge.send()
    bridge.engine.may_update.clear()
    checksum, may_sum = bridge.engine.weights_checksum, threading.Event()

    def slow() -> str:
        assert may_sum.wait(20)
        return checksum()

    bridge.engine.weights_checksum = slow  # type: ignore[method-assign]
    bridge.client.send(wire.AskChecksum(request_id=500))
    bridge.client.send(wire.CommitWeights(request_id=501, push_id="p", num_tensors=1, digest="d"))
    may_sum.set()
    bridge.client.wait_for(wire.Checksum)
    assert bridge.client.begin("q", 2).code == "busy"
    bridge.engine.may_update.set()
    assert bridge.client.wait_for(wire.WeightsApplied).version == 1
    assert isinstance(bridge.push("q", 2), wire.WeightsApplied)


@pytest.mark.parametrize("what", ["push", "bytes", "no part"])
def test_parts_that_do_not_belong_together_end_the_push(bridge: Bridge, what: str) -> None:
    bridge.client.begin("p", 1)
    tensor = wire.WeightsTensor(push_id="q" if what == "push" else "p", index=0, spec=SPEC, payload_bytes=8)
    chunk = wire.WeightsChunk(push_id="p", serial=0, offset=0, length=8, num_bytes=8)
    parts: list[Any] = {"push": [tensor, chunk], "bytes": [chunk, tensor], "no part": []}[what]
    bridge.client.send(wire.WeightsParts(push_id="p", parts=parts, num_bytes=8), bytes(8))
    refused = bridge.client.wait_for(wire.Refused)
    assert (refused.push_id, refused.code) == ("p", "invalid")
    assert refused.field == ("parts.push_id" if what == "push" else "num_bytes")
    assert bridge.staging.calls == ["begin", "prepare", "abort"]


def test_messages_of_an_unknown_push_are_refused_once(bridge: Bridge) -> None:
    for _ in range(3):
        bridge.send("unknown")
    bridge.client.pump(0.2)
    refused = [message for message, _ in bridge.client.seen if isinstance(message, wire.Refused)]
    assert [(message.push_id, message.code) for message in refused] == [("unknown", "gap")]
    assert bridge.staging.calls == []


def test_vllms_own_transfer_is_stepped(bridge: Bridge) -> None:
    for op in ("init", "start", "update"):
        assert isinstance(bridge.client.ask(wire.ControlWeights(request_id=0, op=op, info={"a": 1})), wire.Done)
    assert bridge.service.status().state == "updating"
    assert isinstance(bridge.client.ask(wire.ControlWeights(request_id=0, op="finish", version=4)), wire.Done)
    assert (bridge.service.status().state, bridge.service.status().weight_version) == ("idle", 4)
    assert [info["op"] for info, _ in bridge.engine.updates] == ["init", "start", "update", "finish"]


@pytest.mark.parametrize("when", ["after start", "during start"])
@pytest.mark.parametrize("how", ["goodbye", "takeover", "gone", "abort"])
def test_a_transfer_that_nobody_can_finish_ends_the_service(bridge: Bridge, how: str, when: str) -> None:
    control, may_start = bridge.engine.control_weights, threading.Event()

    def slow(op: str, info: dict[str, Any], version: int | None = None, **options: Any) -> None:
        assert may_start.wait(20)
        control(op, info, version, **options)

    bridge.engine.control_weights = slow  # type: ignore[method-assign, assignment]
    bridge.client.send(wire.ControlWeights(request_id=500, op="start"))
    if when == "after start":
        may_start.set()
        bridge.client.wait_for(wire.Done)
    if how == "goodbye":
        bridge.client.ask(wire.Goodbye(request_id=0))
    elif how == "takeover":
        bridge.client.hello(instance="new")
    elif how == "abort":
        bridge.client.send(wire.AbortWeights(push_id="p"))
        bridge.client.ask(wire.CancelRound(request_id=0, round_id="none"))  # it was taken by now
    else:
        bridge.client.wait_for(wire.Heartbeat)  # the step was taken
        bridge.client.close()
        wait_until(lambda: bridge.service._reception.session.sender == b"")  # type: ignore[union-attr]
    assert when == "after start" or bridge.service.failure is None
    may_start.set()
    wait_until(lambda: bridge.service.failure is not None)
    assert "after its start" in str(bridge.service.failure)


def test_a_step_of_a_transfer_that_takes_too_long_ends_the_service(bridge: Bridge) -> None:
    bridge.engine.update_fails_with = EngineTimeoutError("vLLM to start a transfer of weights", 1.0)
    assert bridge.client.ask(wire.ControlWeights(request_id=0, op="start")).code == "engine"
    wait_until(lambda: isinstance(bridge.service.failure, EngineTimeoutError))


def test_vllms_transfer_may_bring_the_version_that_is_needed() -> None:
    engine = FakeRolloutEngine(weight_version=7)
    with (
        BridgeService(engine, BridgeConfig(heartbeat_s=0.1), staging=None, weights_needed=7) as service,
        raw_client(service.address) as client,
    ):
        for op in ("start", "update", "finish"):
            version = 7 if op == "finish" else None
            assert isinstance(client.ask(wire.ControlWeights(request_id=0, op=op, version=version)), wire.Done)
        assert engine.may_repeat == [True, True, True]
        assert service.status().state == "idle"


def test_a_transfer_that_was_finished_can_be_left(bridge: Bridge) -> None:
    for op in ("init", "start", "update", "finish"):
        assert isinstance(bridge.client.ask(wire.ControlWeights(request_id=0, op=op, version=4)), wire.Done)
    bridge.client.ask(wire.Goodbye(request_id=0))
    assert isinstance(bridge.client.hello(), wire.Welcome)
    bridge.client.ask(wire.ControlWeights(request_id=0, op="start"))
    bridge.engine.die()
    bridge.client.ask(wire.Goodbye(request_id=0))
    bridge.client.hello()
    assert bridge.service.failure is None  # a dead engine is not paused


def test_the_weights_that_are_needed_may_have_the_version_that_the_engine_says_it_has() -> None:
    engine = FakeRolloutEngine(weight_version=7)
    with (
        BridgeService(engine, BridgeConfig(heartbeat_s=0.1), staging=FakeStaging(), weights_needed=7) as service,
        raw_client(service.address) as client,
    ):
        bridge = Bridge(engine, FakeStaging(), service, client)
        assert isinstance(bridge.push("p", 7), wire.WeightsApplied)
        assert engine.may_repeat == [True]
        assert isinstance(bridge.push("q", 8), wire.WeightsApplied)
        assert engine.may_repeat == [True, False]
        assert service.status().state == "idle"
