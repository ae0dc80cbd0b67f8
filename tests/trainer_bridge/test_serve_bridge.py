"""The bridge with a real engine: in this process, and as `longtail serve --bridge` in its own."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from bridge_processes import ServiceProcess
from raw_bridge_client import RawBridgeClient, raw_client, tensors_of, wait_until
from typer.testing import CliRunner

from longtail.engine import CarryConfig, EngineConfig, RolloutEngine, SamplingConfig, TreeSpec
from longtail.engine.cli.app import app
from longtail.engine.trajectory import Group
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.keys import ClientKeys
from longtail.trainer_bridge.service.config import BridgeConfig
from longtail.trainer_bridge.service.service import BridgeService
from longtail.trainer_bridge.weights.manifest import digest_of

PROMPTS = [[5 + i, 9, 11] for i in range(200)]
LONG = SamplingConfig(max_tokens=200, ignore_eos=True, seed=3)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[RolloutEngine]:
    config = EngineConfig(
        model=str(tiny_model), core="inline", block_size=32, max_model_len=256, max_num_seqs=16, kv_cache_gib=0.1,
        carry=CarryConfig(),
    )  # fmt: skip
    with RolloutEngine(config) as running:
        yield running


@pytest.fixture(scope="module")
def service(engine: RolloutEngine) -> Iterator[BridgeService]:
    with BridgeService(engine, BridgeConfig(heartbeat_s=0.2)) as service:
        yield service
        assert service.failure is None


@pytest.fixture
def client(service: BridgeService, request: pytest.FixtureRequest) -> Iterator[RawBridgeClient]:
    """Its own name for each test; the prompts are there."""
    with raw_client(service.address, instance=request.node.name[:200], credit=1 << 30) as client:
        client.append(PROMPTS)
        yield client
        client.ack(service._outbox.last_seq)


def check(groups: list[Group]) -> None:
    for group in groups:
        assert group.complete
        for trajectory in group.trajectories:
            assert trajectory.prompt_token_ids == PROMPTS[int(group.group_id)]
            assert len(trajectory.logprobs) == len(trajectory.output_token_ids) > 0


# ---- in this process ---------------------------------------------------------------------------------------------


def test_rounds_streams_and_evaluations(client: RawBridgeClient) -> None:
    client.start("r1", 3, preview=True, over_provision=1.5)
    groups, end = client.read_round("r1")
    check(groups)
    assert len(groups) == 3
    assert end.carry is not None
    previews = [wire.decode_result(p, wire.Trajectory) for m, p in client.seen if isinstance(m, wire.Preview)]
    assert {t.trajectory_id for t in previews} >= {t.trajectory_id for g in groups for t in g.trajectories}

    client.start("s", None, num_groups=3)
    wait_until(lambda: bool(client.receive(0.1)) and len(client.groups("s")) >= 5)
    client.start("eval", 2, prompts=[[7, 7, 7], [8, 8, 8]])  # beside it
    evaluated, end = client.read_round("eval")
    assert [group.trajectories[0].prompt_token_ids for group in evaluated] == [[7, 7, 7], [8, 8, 8]]
    assert end.carry is None
    client.ask(wire.CancelRound(request_id=0, round_id="s"))
    streamed, end = client.read_round("s")
    check(streamed)
    assert end.stats.num_complete_groups == len(streamed)

    client.start("r2", 2)
    client.read_round("r2")
    ids = client.trajectory_ids()
    assert len(ids) == len(set(ids))
    names = [group.group_id for group in client.groups() if group not in evaluated]
    assert sorted(map(int, names)) == list(range(len(names)))  # no prompt was lost or used twice


def test_a_cancelled_round_stops_at_once_and_its_groups_go_on_in_the_next(
    client: RawBridgeClient, engine: RolloutEngine
) -> None:
    first = engine.num_prompts_used
    client.start("long", 8, sampling=LONG)
    wait_until(lambda: engine.num_in_flight > 0)
    client.ask(wire.CancelRound(request_id=0, round_id="long"))
    failed = client.wait_for(wire.RoundFailed)
    assert (failed.round_id, failed.code) == ("long", "cancelled")
    wait_until(lambda: engine.num_in_flight == 0)
    client.start("after", 8)
    groups, end = client.read_round("after", 60)
    check(groups)
    names = [int(group.group_id) for group in groups]
    assert names == list(range(names[0], names[0] + 8))  # what earlier rounds left comes first
    assert names[0] <= first
    assert end.carry is not None
    assert end.carry.num_carried_in >= 8


def test_a_stream_that_is_cancelled_keeps_the_tokens_of_what_ran(
    client: RawBridgeClient, engine: RolloutEngine
) -> None:
    client.start("long-stream", None, num_groups=4, sampling=LONG)
    wait_until(lambda: engine.num_in_flight == 8)
    time.sleep(0.3)
    client.ask(wire.CancelRound(request_id=0, round_id="long-stream"))
    client.read_round("long-stream")
    assert engine.num_in_flight == 0
    client.start("after-stream", 4, sampling=LONG)
    _, end = client.read_round("after-stream", 60)
    assert end.carry is not None
    assert end.carry.num_resumes > 0
    assert end.carry.num_parked_tokens > 0


def test_weights_go_through_the_wire_into_the_running_model(
    client: RawBridgeClient, engine: RolloutEngine, tiny_model: Path
) -> None:
    before = client.ask(wire.AskChecksum(request_id=0))
    client.start("through", 2, sampling=LONG)
    wait_until(lambda: engine.num_in_flight > 0)
    applied = client.push("p1", 1, tensors_of(tiny_model, scale=1.5))
    assert isinstance(applied, wire.WeightsApplied), applied
    assert (applied.push_id, applied.version) == ("p1", 1)
    assert 0 < applied.pause_s < 30
    assert client.commit("p1", 0, "again").version == 1  # the answer was lost: it is given again
    after = client.ask(wire.AskChecksum(request_id=0))
    assert (after.version, after.digest) == (1, applied.digest)
    assert after.model != before.model
    groups, _ = client.read_round("through", 60)
    versions = {span.version for group in groups for t in group.trajectories for span in t.weight_versions}
    assert "1" in versions
    back = client.push("p2", 2, tensors_of(tiny_model))
    assert isinstance(back, wire.WeightsApplied)
    assert client.ask(wire.AskChecksum(request_id=0)).model == before.model


def test_a_push_that_lies_or_is_broken_off_changes_nothing(
    client: RawBridgeClient, engine: RolloutEngine, tiny_model: Path, service: BridgeService
) -> None:
    before = client.ask(wire.AskChecksum(request_id=0))
    tensors = tensors_of(tiny_model, scale=3.0)
    (name, (spec, data)), *_ = tensors.items()
    version = engine.weight_version + 1

    assert isinstance(client.begin("lie", version), wire.WeightsReady)
    client.send_tensor("lie", 0, spec, data, 0, wrong=True)
    client.send_tensor("lie", 1, spec, data, 1)  # was under way: passed over
    refused = client.wait_for(wire.Refused)
    assert (refused.push_id, refused.code) == ("lie", "verification")
    assert name in refused.field

    assert isinstance(client.begin("half", version), wire.WeightsReady)
    checksums = {name: client.send_tensor("half", 0, spec, data, 0)}
    refused = client.commit("half", 1, digest_of(checksums))
    assert (refused.push_id, refused.code) == ("half", "invalid")

    assert isinstance(client.begin("left", version), wire.WeightsReady)
    client.send_tensor("left", 0, spec, data, 0)
    client.send(wire.AbortWeights(push_id="left"))
    refused = client.commit("left", 1, "0" * 32)
    assert (refused.push_id, refused.code) == ("left", "gap")

    refused = client.begin("old", engine.weight_version - 1)
    assert (refused.push_id, refused.code, refused.field) == ("old", "invalid", "version")

    client.send_tensor("unknown", 0, spec, data, 0)
    refused = client.wait_for(wire.Refused)
    assert (refused.push_id, refused.code) == ("unknown", "gap")

    assert isinstance(client.begin("lost", version), wire.WeightsReady)
    client.hello(instance="another")  # takes over on the same connection
    client.send_tensor("lost", 0, spec, data, 0)
    refused = client.commit("lost", 1, "0" * 32)
    assert refused.code == "gap"

    refused = client.ask(wire.ControlWeights(request_id=0, op="init"))
    assert (refused.code, refused.field) == ("invalid", "engine.weight_transfer")
    after = client.ask(wire.AskChecksum(request_id=0))
    assert (after.version, after.model) == (before.version, before.model)
    assert service.status().state == "idle"
    applied = client.push("good", version, tensors)
    assert isinstance(applied, wire.WeightsApplied)


# ---- as a command ------------------------------------------------------------------------------------------------


@pytest.fixture
def process(tiny_model: Path, tmp_path: Path) -> Iterator[ServiceProcess]:
    keys = tmp_path / "keys"
    result = CliRunner().invoke(app, ["keys", str(keys)])
    assert result.exit_code == 0, result.output
    options = ["--keys", str(keys), "--heartbeat-s", "0.3", "--metrics-port", "0"]
    running = ServiceProcess(tiny_model, tmp_path, options)
    running.start()
    try:
        yield running.wait_ready()
    finally:
        running.kill_all()


def test_a_service_from_start_to_end(process: ServiceProcess, tmp_path: Path, tiny_model: Path) -> None:
    """Killed in a round after a push, started again, its core killed, started again, told to stop."""
    keys = ClientKeys.read(tmp_path / "keys")
    ready = process.ready
    assert ready["server_key"] == keys.server.decode()
    assert set(ready) == {"address", "model", "pid", "engine_id", "server_key", "metrics_port"}
    with raw_client(process.address, keys=keys, instance="1") as client:
        client.append(PROMPTS)
        client.start("r0", 4)
        client.read_round("r0")
        client.ack(2)
        first = client.trajectory_ids()
        assert isinstance(client.push("p", 3, tensors_of(tiny_model)), wire.WeightsApplied)
        client.start("s", None, num_groups=4, sampling=LONG)
        client.wait_for(wire.Heartbeat, lambda beat: beat.status.num_running == 8)
        time.sleep(0.3)
        client.ask(wire.CancelRound(request_id=0, round_id="s"))  # members are cut, with tokens of version 3
        client.read_round("s")
        client.start("r1", 40, sampling=LONG)
        client.wait_for(wire.Heartbeat, lambda beat: beat.status.num_running > 0)
        epoch, acked_to = client.welcome.epoch, 2  # type: ignore[attr-defined]
        seen = max(client.deliveries)
    with urllib.request.urlopen(f"http://127.0.0.1:{ready['metrics_port']}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    assert 'longtail_bridge_state{state="running"} 1.0' in text
    assert "longtail_bridge_pushes_total 1.0" in text
    process.kill()

    process.start()
    process.wait_ready()
    assert process.ready["engine_id"] == ready["engine_id"]
    with raw_client(process.address, keys=keys, instance="1") as client:
        welcome = client.welcome  # type: ignore[attr-defined]
        assert (welcome.epoch, welcome.acked, welcome.last_seq) == (epoch, acked_to, seen)
        assert welcome.weights_needed == 3
        assert client.start("r1", 40, sampling=LONG).code == "weights"
        assert client.begin("old", 2).code == "invalid"
        assert isinstance(client.push("p", 3, tensors_of(tiny_model)), wire.WeightsApplied)
        assert client.start("r0", 4).state == "done"
        assert client.start("r1", 40, sampling=LONG).state == "started"
        client.read_round("r1", 60)
        assert sorted(client.deliveries) == list(range(acked_to + 1, max(client.deliveries) + 1))
        again = client.trajectory_ids()
        assert again[: len(first) - 2 * acked_to] == first[2 * acked_to :]
        assert len(again) == len(set(again))
        assert not set(first[: 2 * acked_to]) & set(again)

        client.start("r2", 40, sampling=LONG)
        client.wait_for(wire.Heartbeat, lambda beat: beat.status.num_running > 0)
        core = process.core_process()
        assert core is not None
        core.kill()
        failed = client.wait_for(wire.RoundFailed, timeout_s=30)
        assert (failed.round_id, failed.code) == ("r2", "engine")
        beat = client.wait_for(wire.Heartbeat, lambda beat: beat.status.state == "dead", timeout_s=30)
        assert "signal 9" in (beat.status.reason or "")
    wait_until(lambda: not process.is_running, 60)
    assert process.returncode == 1
    assert "signal 9" in process.log_tail()

    process.start()
    process.wait_ready()
    left = process.descendants()
    with raw_client(process.address, keys=keys, instance="2") as client:
        client.ack(client.welcome.last_seq)  # type: ignore[attr-defined]
        assert process.stop() == 0
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive
    assert "Traceback" not in process.log_file.read_text().rpartition("---- start")[2]


def test_a_stop_while_it_starts_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    running = ServiceProcess(tiny_model, tmp_path)
    running.start()
    try:
        wait_until(lambda: len(running.descendants()) > 0 or "CPU run-time" in running.log_tail(), 120)
        left = running.descendants()
        assert running.stop() == 0
        _, alive = psutil.wait_procs(left, timeout=20)
        assert not alive
    finally:
        running.kill_all()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--bridge", "nonsense"], "--bridge: expected tcp://HOST:PORT or ipc://PATH, got 'nonsense'"),
        (["--bridge", "tcp://0.0.0.0:0"], "--bridge: expected a loopback address"),
        (["--bridge", "tcp://127.0.0.1:0", "--heartbeat-s", "0"], "--heartbeat-s: expected seconds"),
        (["--bridge", "tcp://127.0.0.1:0", "--keys", "/nowhere"], "--keys: expected a file with a secret key"),
        (["--bridge", "tcp://127.0.0.1:0", "--port", "80"], "--port: expected nothing, because with --bridge"),
        (["--bridge", "tcp://127.0.0.1:0", "--kv-policy", "what"], "--kv-policy: expected"),
        (["--bridge", "tcp://127.0.0.1:0", "--state", "/dev/null/x"], "--state: expected a folder that can be made"),
        (["--state", "/tmp/x"], "--state: expected --bridge with it"),
        (["--max-staleness", "2"], "--max-staleness: expected --bridge with it"),
    ],
)
def test_a_wrong_option_is_named_before_anything_loads(args: list[str], words: str, tiny_model: Path) -> None:
    result = CliRunner().invoke(app, ["serve", "--model", str(tiny_model), *args])
    assert result.exit_code == 2, result.output
    assert words in result.stderr


def test_a_taken_port_is_named_before_anything_loads(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started = time.monotonic()
        result = CliRunner().invoke(app, ["serve", "--model", str(tiny_model), "--bridge", f"tcp://127.0.0.1:{port}"])
        assert result.exit_code == 2
        assert "--bridge: expected an address that can be listened on (Address already in use" in result.stderr
        assert time.monotonic() - started < 5


def test_options_reach_the_engine(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longtail.engine import rollout_engine

    configs: list[EngineConfig] = []

    class Stop(Exception):
        pass

    def record(config: EngineConfig, *args: Any) -> None:
        configs.append(config)
        raise Stop

    monkeypatch.setattr(rollout_engine, "RolloutEngine", record)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    result = CliRunner().invoke(
        app,
        ["serve", "--model", str(tiny_model), "--bridge", "tcp://127.0.0.1:0", "--state", str(tmp_path / "a" / "b"),
         "--kv-policy", "stale_up_to:2", "--no-park", "--max-staleness", "3", "--on-stale", "drop",
         "--admission", "fifo", "--target-carried", "4", "--core", "inline", "--max-num-seqs", "5"],
    )  # fmt: skip
    assert result.exit_code == 1
    [config] = configs
    carry = config.carry
    assert carry is not None
    assert (carry.kv_policy, carry.park, carry.max_staleness, carry.on_stale) == ("stale_up_to:2", False, 3, "drop")
    assert (carry.admission, carry.target_carried, config.core, config.max_num_seqs) == ("fifo", 4, "inline", 5)
    assert carry.journal == tmp_path / "a" / "b" / "engine.journal"


def test_keys_are_written_and_said(tmp_path: Path) -> None:
    folder = tmp_path / "k"
    result = CliRunner().invoke(app, ["keys", str(folder), "--client", "a", "--client", "b"])
    assert result.exit_code == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.key", "a.key_secret", "b.key", "b.key_secret", "server.key", "server.key_secret"
    ]  # fmt: skip
    assert "a needs server.key and a.key_secret" in result.stdout
    before = (folder / "server.key_secret").read_bytes()
    assert CliRunner().invoke(app, ["keys", str(folder), "--client", "c"]).exit_code == 0  # the service's stay
    assert (folder / "server.key_secret").read_bytes() == before
    result = CliRunner().invoke(app, ["keys", str(folder), "--client", "a"])
    assert result.exit_code == 2
    assert "folder: expected a folder without these keys" in result.stderr


def test_trees_are_grown_for_a_trainer(client: RawBridgeClient) -> None:
    tree = TreeSpec(width=6, depth=4, segment_tokens=5)
    client.start("trees", 2, group_size=6, sampling=SamplingConfig(max_tokens=64, ignore_eos=True, seed=3, tree=tree))
    groups, end = client.read_round("trees")
    check(groups)
    assert len(groups) == 2
    for group in groups:
        by_index = {one.index: one for one in group.trajectories}
        assert sorted(by_index) == list(range(6))
        assert sum(one.branch is None for one in group.trajectories) == 1
        for one in group.trajectories:
            assert len(one.output_token_ids) == tree.max_tokens
            if one.branch is not None:
                parent = by_index[one.branch.of]
                assert one.output_token_ids[: one.branch.at] == parent.output_token_ids[: one.branch.at]
                assert one.branch.reason == "boundary"
    assert end.stats.num_complete_groups == 2


def test_a_wrong_tree_is_refused_by_name(client: RawBridgeClient) -> None:
    tree = TreeSpec(width=6, depth=4, segment_tokens=5)
    client.start("wrong", 2, group_size=4, sampling=SamplingConfig(tree=tree))
    failed = client.wait_for(wire.RoundFailed)
    assert failed.round_id == "wrong"
    assert "group_size" in failed.message
