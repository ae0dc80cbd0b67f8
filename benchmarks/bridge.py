"""What does the bridge cost: weights in, trajectories out?

Weights: `longtail serve --bridge` holds SmolLM2-135M in float32 (540 MB), a trainer in this process pushes to it, whole
and as differences of 1 % of the elements, by shared memory and by ZeroMQ over loopback. Every repetition measures a
memcpy of the same bytes beside them (one thread, warm pages). A push is *transfer* (made, checksummed, sent, put
together, verified; the engine samples meanwhile) and *apply* (vLLM replaces its layers; nothing is sampled). Ratios to
memcpy are of the transfer; those of the whole push are given too, and that one is vLLM's reload for the most part. The
same is measured while the engine generates, and what generating loses is compared with the pause that is reported.

Trajectories of 1,000 tokens, 8 a group, in rounds: from a service process without a model to a `Round` of
`Trajectory`s here, with deliveries in memory and on the disk; against JSON lines over HTTP (msgspec's JSON, streamed)
and against pickle over ZeroMQ, both of which acknowledge and keep nothing.

Last line: one JSON object with `shm_vs_memcpy`, `zmq_vs_memcpy` (bytes a second of the transfer over memcpy's),
`bare_zmq_vs_memcpy` (the same bytes over a bare socket, neither checked nor kept: a bound on `zmq_vs_memcpy`),
`shm_push_vs_memcpy`, `zmq_push_vs_memcpy` (of the whole push), `delta_speedup` (whole push by ZeroMQ over the
difference by ZeroMQ, both with apply), `delta_transfer_speedup` (both without), `delta_bytes_ratio`, `pause_share`
(pause over push by ZeroMQ while the engine generates), `lost_per_push_s` (what generating loses by such a push),
`trajectories_per_s_*`, `extra_bytes_service` and `extra_bytes_trainer` (peak memory over before the first push, as
multiples of the model's bytes), medians and ranges.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bench_io
import bridge_bare
import bridge_http
import bridge_pickle
import httpx
import numpy as np
import psutil
import zmq

from longtail.engine.config import SamplingConfig
from longtail.engine.models import resolve_model
from longtail.engine.prompts import Prompt
from longtail.engine.weight_manifest import stored_tensors
from longtail.trainer_bridge import BridgeClient
from longtail.trainer_bridge.demo.engine_process import EngineProcess
from longtail.trainer_bridge.weights.push import PushReport

CHANGED_SHARE = 0.01
HERE = Path(__file__).parent

Weights = dict[str, "np.ndarray[Any, Any]"]


def main() -> None:
    """Run both parts and print the figures."""
    flags = bench_io.parse_flags(__doc__)
    figures = _measure_trajectories(num_trajectories=400 if flags.quick else 2000, num_rounds=3 if flags.quick else 7)
    figures |= _measure_pushes(num_rounds=2 if flags.quick else 7)
    bench_io.report("bridge", figures, flags.json)


# ---- weights ---------------------------------------------------------------------------------------------------------


def _measure_pushes(num_rounds: int) -> dict[str, Any]:
    model = resolve_model("smollm2")
    weights: Weights = {
        stored.entry.name: np.fromfile(stored.path, "<f4", stored.entry.numel, offset=stored.offset).reshape(
            stored.entry.shape
        )
        for stored in stored_tensors(model)
    }
    num_bytes = sum(array.nbytes for array in weights.values())
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    reports: dict[str, list[PushReport]] = {}
    ratios: dict[str, list[float]] = {}
    with (
        TemporaryDirectory() as folder,
        _service(model, folder) as service,
        BridgeClient(service.address) as client,
        _peaks(service.pid) as peaks,
        _bare(num_bytes) as send_bare,
    ):
        trainer = Trainer(client, weights)
        peaks.begin()
        for _ in range(num_rounds):
            copy_s = _seconds(lambda: np.copyto(target, source))
            bare_s = _seconds(lambda: send_bare(weights.values()))
            ratios.setdefault("bare_zmq_vs_memcpy", []).append(copy_s / bare_s)
            done = trainer.push_all()
            for arm, report in done.items():
                reports.setdefault(arm, []).append(report)
            for arm in ("shm", "zmq"):
                ratios.setdefault(f"{arm}_vs_memcpy", []).append(copy_s / _transfer_s(done[arm]))
                ratios.setdefault(f"{arm}_push_vs_memcpy", []).append(copy_s / done[arm].seconds["total"])
            full, delta = done["zmq"], done["delta_zmq"]
            ratios.setdefault("memcpy_gb_per_s", []).append(num_bytes / copy_s / 1e9)
            ratios.setdefault("delta_speedup", []).append(full.seconds["total"] / delta.seconds["total"])
            ratios.setdefault("delta_transfer_speedup", []).append(_transfer_s(full) / _transfer_s(delta))
            ratios.setdefault("delta_bytes_ratio", []).append(full.num_bytes / delta.num_bytes)
        peaks.end()
        busy = _measure_busy(trainer, client, num_rounds)
    _print_pushes(reports, busy["reports"])
    extra = {f"extra_bytes_{who}": round(peak / num_bytes, 2) for who, peak in peaks.extra.items()}
    figures: dict[str, Any] = {"model_bytes": num_bytes}
    for key, values in ratios.items():
        figures |= bench_io.ratio_figures(key, values)
    pauses = [report.pause_s / report.seconds["total"] for report in busy["reports"]["zmq"]]
    figures |= bench_io.ratio_figures("pause_share", pauses)
    figures |= bench_io.ratio_figures("pause_s", [report.pause_s for report in busy["reports"]["zmq"]])
    return figures | bench_io.ratio_figures("lost_per_push_s", busy["lost_s"]) | extra


class Trainer:
    """Pushes the same weights again and again, a part of them changed where differences are sent."""

    def __init__(self, client: BridgeClient, weights: Weights) -> None:
        self._client = client
        self._weights = weights
        self._version = 0
        self._rng = np.random.default_rng(0)

    def push(self, **options: Any) -> PushReport:
        """The next version."""
        self._version += 1
        return self._client.push_weights(self._weights.items(), self._version, **options)

    def push_all(self) -> dict[str, PushReport]:
        """One push of each kind."""
        done = {arm: self.push(transport=arm) for arm in ("shm", "zmq")}
        self.push(delta="auto")  # whole, and kept as the base
        for arm in ("shm", "zmq"):
            self._change()
            done[f"delta_{arm}"] = self.push(delta=True, transport=arm)
        return done

    def _change(self) -> None:
        for array in self._weights.values():
            flat = array.reshape(-1)
            places = self._rng.integers(0, flat.size, max(1, int(flat.size * CHANGED_SHARE)))
            flat[places] += np.float32(1e-5)


@contextmanager
def _bare(num_bytes: int) -> Iterator[Callable[[Iterable[np.ndarray[Any, Any]]], None]]:
    """Sends arrays over a socket of its own, to a process that does nothing with them."""
    command = [sys.executable, str(HERE / "bridge_bare.py")]
    with bench_io.Worker(command, os.environ) as worker, zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.connect(worker.ready["address"])

        def send(arrays: Iterable[np.ndarray[Any, Any]]) -> None:
            worker.ask({"num_bytes": num_bytes})
            bridge_bare.send(socket, arrays)

        yield send


def _measure_busy(trainer: Trainer, client: BridgeClient, num_rounds: int) -> dict[str, Any]:
    """Push while the engine generates: the reports, and by how much a push makes a fixed round longer."""
    reports: dict[str, list[PushReport]] = {"shm": [], "zmq": []}
    lost: list[float] = []
    generate = _round_of(client)
    generate()
    for _ in range(num_rounds):
        alone_s = _seconds(generate)
        thread = threading.Thread(target=generate)
        began = time.perf_counter()
        thread.start()
        time.sleep(0.2 * alone_s)
        for arm, done in reports.items():
            done.append(trainer.push(transport=arm))
        thread.join()
        lost.append((time.perf_counter() - began - alone_s) / len(reports))
    return {"reports": reports, "lost_s": lost}


def _round_of(client: BridgeClient) -> Callable[[], Any]:
    prompts = [Prompt(token_ids=[504, 2365, 100 + i]) for i in range(16)]
    sampling = SamplingConfig(max_tokens=128, ignore_eos=True, seed=0)
    return lambda: client.rollout(prompts, sampling=sampling, carry=False)


def _transfer_s(report: PushReport) -> float:
    return report.seconds["total"] - report.pause_s


def _service(model: Path, folder: str) -> EngineProcess:
    options = (
        "--block-size", "32", "--max-model-len", "512", "--max-num-seqs", "32", "--kv-cache-gib", "0.5",
    )  # fmt: skip
    log = Path(folder) / "service.log"
    return EngineProcess(str(model), options, log, environ=bench_io.unset_environ())


class Peaks:
    """Peak resident memory of the service's processes and of this one, over what they had at `begin`."""

    def __init__(self, pid: int) -> None:
        self._service = psutil.Process(pid)
        self._own = psutil.Process()
        self._before: dict[str, int] = {}
        self._is_on = False
        self.extra: dict[str, int] = {"service": 0, "trainer": 0}

    def begin(self) -> None:
        """From now on."""
        self._before = self._now()
        self._is_on = True

    def end(self) -> None:
        """No more."""
        self._is_on = False

    def sample(self) -> None:
        """Look once."""
        if self._is_on:
            now = self._now()
            self.extra = {who: max(peak, now[who] - self._before[who]) for who, peak in self.extra.items()}

    def _now(self) -> dict[str, int]:
        # The engine core maps the service's segments: its share of them is counted once, there.
        core = sum(child.memory_info().rss - child.memory_info().shared for child in self._service.children(True))
        return {"service": self._service.memory_info().rss + core, "trainer": self._own.memory_info().rss}


@contextmanager
def _peaks(pid: int) -> Iterator[Peaks]:
    peaks, over = Peaks(pid), threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peaks.sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


def _print_pushes(idle: dict[str, list[PushReport]], busy: dict[str, list[PushReport]]) -> None:
    print(f"\n{'push':<22} {'MB':>7} {'transfer s':>11} {'apply s':>8} {'in all s':>9}")
    rows = [*idle.items(), *((f"{arm}, generating", done) for arm, done in busy.items())]
    for arm, done in rows:
        numbers = [bench_io.median(list(map(of, done))) for of in (_megabytes, _transfer_s, _pause_s, _total_s)]
        print(f"{arm:<22} {numbers[0]:>7.1f} {numbers[1]:>11.3f} {numbers[2]:>8.3f} {numbers[3]:>9.3f}")


def _megabytes(report: PushReport) -> float:
    return report.num_bytes / 1e6


def _pause_s(report: PushReport) -> float:
    return report.pause_s


def _total_s(report: PushReport) -> float:
    return report.seconds["total"]


# ---- trajectories ----------------------------------------------------------------------------------------------------


def _measure_trajectories(num_trajectories: int, num_rounds: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {}
    with TemporaryDirectory() as folder:
        arms = {
            "bridge": _bridge_arm(num_trajectories, None),
            "bridge_on_disk": _bridge_arm(num_trajectories, Path(folder)),
            "json_http": _http_arm(num_trajectories),
            "pickle_zmq": _pickle_arm(num_trajectories),
        }
        started = {name: next(arm) for name, arm in arms.items()}
        for number in range(num_rounds + 1):
            for name, receive in started.items():
                seconds = _seconds(receive)
                if number:  # the first one warms up
                    rates.setdefault(name, []).append(num_trajectories / seconds)
        for arm in arms.values():
            arm.close()
    print(f"{'trajectories of 1,000 tokens':<30} {'a second':>10} {'range':>18}")
    for name, values in rates.items():
        print(f"{name:<30} {bench_io.median(values):>10.0f} {f'({min(values):.0f}, {max(values):.0f})':>18}")
    figures: dict[str, Any] = {}
    for name, values in rates.items():
        figures |= bench_io.ratio_figures(f"trajectories_per_s_{name}", values)
    for other in ("json_http", "pickle_zmq"):
        ratios = [ours / theirs for ours, theirs in zip(rates["bridge"], rates[other], strict=True)]
        figures |= bench_io.ratio_figures(f"bridge_vs_{other}", ratios)
    return figures


def _bridge_arm(count: int, state: Path | None) -> Iterator[Callable[[], object]]:
    command = [sys.executable, str(HERE / "bridge_sample_service.py"), str(count), *([str(state)] if state else [])]
    with bench_io.Worker(command, os.environ) as worker, BridgeClient(worker.ready["address"]) as client:
        client.append_prompts([Prompt(token_ids=[1])])

        def receive() -> None:
            round_ = client.rollout(target_groups=count // 8, group_size=8)
            assert len(round_.trajectories) == count
            client.ack()

        yield receive


def _http_arm(count: int) -> Iterator[Callable[[], object]]:
    command = [sys.executable, str(HERE / "bridge_http.py")]
    with bench_io.Worker(command, os.environ) as worker, httpx.Client(base_url=worker.ready["address"]) as client:
        worker.ask({"count": count})
        yield lambda: bridge_http.receive(client, count)


def _pickle_arm(count: int) -> Iterator[Callable[[], object]]:
    command = [sys.executable, str(HERE / "bridge_pickle.py")]
    with bench_io.Worker(command, os.environ) as worker, zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.connect(worker.ready["address"])
        worker.ask({"count": count})

        def receive() -> None:
            worker.ask({"count": count})
            bridge_pickle.receive(socket, count)

        yield receive


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
