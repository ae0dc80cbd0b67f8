"""A tiny loop with random faults for half an hour: memory, descriptors, threads, sockets and files must not grow.

    python tests/trainer_bridge/soak.py --minutes 30 --seed 0

Faults, one after the other: the trainer is killed, or stands still for seconds; a stranger sends damaged, oversize and
foreign messages, or opens connections and leaves; and one push in five breaks off in the middle or lies. The service
and its engine core are never restarted, and watched: what they have in the last third of the time is compared with the
second third. The trainer checks that no group comes twice (`tests/support/chaos_trainer.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import zmq

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from bridge_processes import ServiceProcess, trainer_process
from chaos_trainer import offer_prompts
from tiny_model import write_tiny_model
from wire_examples import TO_SERVICE

from longtail.trainer_bridge import wire

MIB = 1 << 20
NUM_PROMPTS = 10_000_000
BROKEN_SHARE = 0.2
#: Memory may wander by this much between two thirds of the time: a frame of 64 MiB comes and goes.
MEMORY_SLACK = 32 * MIB
#: Until an engine core's allocator has all that a loop needs; it goes slower and slower.
WARM_UP_MINUTES, WARM_UP_SLACK = 10.0, 96 * MIB
STATE_SLACK = 16 * MIB


@dataclass(frozen=True)
class Sample:
    """What the service has at one moment."""

    service: int
    core: int
    descriptors: int
    threads: int
    connections: int
    state_bytes: int


class Soak:
    """One run in `folder`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        model = write_tiny_model(folder / "model")
        self.service = ServiceProcess(model, folder, ("--heartbeat-s", "0.5"))
        self.service.start()
        self.service.wait_ready()
        offer_prompts(folder, NUM_PROMPTS, is_all=False)
        self.trainer = trainer_process(self.service.address, model, folder, BROKEN_SHARE)
        self.trainer.start()
        self.samples: list[Sample] = []
        self._rng = random.Random(seed)
        self._core = self.service.core_process()
        self._context = zmq.Context()

    def run(self, minutes: float, say_every_s: float = 60.0) -> None:
        began = said = time.monotonic()
        while (now := time.monotonic()) - began < 60 * minutes:
            self._rng.choice([self._kill_trainer, self._stop_trainer, self._send_rubbish, self._come_and_go])()
            time.sleep(self._rng.uniform(0.5, 2.0))
            assert self.service.is_running, self.service.log_tail()
            if not self.trainer.is_running:
                assert self.trainer.returncode == -signal.SIGKILL, self.trainer.log_tail()
                self.trainer.start()
            self.samples.append(self._look())
            if now - said > say_every_s:
                said = now
                print(f"{(now - began) / 60:.0f} min, step {self.step}: {self.samples[-1]}", flush=True)

    @property
    def step(self) -> int:
        path = self.folder / "trainer.json"
        return json.loads(path.read_text())["step"] if path.exists() else 0

    def growth(self) -> dict[str, float]:
        """By field: median of the last third minus median of the second."""
        third = len(self.samples) // 3
        middle, last = self.samples[third : 2 * third], self.samples[2 * third :]
        return {
            name: statistics.median(getattr(s, name) for s in last)
            - statistics.median(getattr(s, name) for s in middle)
            for name in Sample.__dataclass_fields__
        }

    def check(self, minutes: float) -> dict[str, float]:
        """Raises if something grew in so many minutes, or if the loop stood still."""
        growth = self.growth()
        assert growth["service"] < MEMORY_SLACK, growth
        assert growth["core"] < (WARM_UP_SLACK if minutes < WARM_UP_MINUTES else MEMORY_SLACK), growth
        assert growth["state_bytes"] < STATE_SLACK, growth
        for name in ("descriptors", "threads", "connections"):
            assert growth[name] <= 2, growth
        assert self.step > 3, self.trainer.log_tail()
        return growth

    def close(self) -> None:
        self._context.destroy(linger=0)
        self.trainer.kill_all()
        self.service.kill_all()

    # ---- faults --------------------------------------------------------------------------------------------------

    def _kill_trainer(self) -> None:
        self.trainer.kill()

    def _stop_trainer(self) -> None:
        os.kill(self.trainer.pid, signal.SIGSTOP)
        time.sleep(self._rng.uniform(1.0, 5.0))
        os.kill(self.trainer.pid, signal.SIGCONT)

    def _send_rubbish(self) -> None:
        with self._context.socket(zmq.DEALER) as socket:
            socket.linger = 500
            socket.connect(self.service.address)
            for message, payload in self._rng.choices(TO_SERVICE, k=50):
                frames = [bytearray(frame) for frame in wire.encode(message, payload)]
                frame = self._rng.choice(frames)
                frame[self._rng.randrange(len(frame))] ^= 1 << self._rng.randrange(8)
                socket.send_multipart(self._rng.sample(frames, self._rng.randint(1, len(frames))))
            socket.send(bytes(self._rng.randint(1, 100) * MIB))

    def _come_and_go(self) -> None:
        for _ in range(20):
            with self._context.socket(zmq.DEALER) as socket:
                socket.linger = 0
                socket.connect(self.service.address)
                socket.send_multipart(wire.encode(wire.Ping()))

    def _look(self) -> Sample:
        service, core = psutil.Process(self.service.pid), self._core
        assert core is not None
        state = 0
        for path in (self.folder / "state").iterdir():
            with contextlib.suppress(FileNotFoundError):  # one that has just got its name
                state += path.stat().st_size
        return Sample(
            service=service.memory_info().rss,
            core=core.memory_info().rss,
            descriptors=service.num_fds() + core.num_fds(),
            threads=service.num_threads() + core.num_threads(),
            connections=len(service.net_connections()),
            state_bytes=state,
        )


def run_soak(folder: Path, minutes: float, seed: int) -> tuple[int, dict[str, float]]:
    """Steps that the loop made, and what grew."""
    soak = Soak(folder, seed)
    try:
        soak.run(minutes)
        return soak.step, soak.check(minutes)
    finally:
        soak.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="longtail-soak-") as folder:
        steps, growth = run_soak(Path(folder), flags.minutes, flags.seed)
    print(f"{steps} steps in {flags.minutes:g} minutes; from the second to the last third: {growth}")


if __name__ == "__main__":
    main()
