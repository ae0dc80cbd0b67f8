"""Kills trainer, engine core and service at random moments of a running loop, and then checks the books.

    python tests/trainer_bridge/chaos.py --kills 20 --seed 0

`make chaos` runs it. Every process is real and killed with SIGKILL. When it is over: every prompt was trained exactly
once, whatever died; each push that the trainer was told of has the digest of the weights that it pushed; and the model
has the weights of the last version, whole. The trainer checks on its way that nothing comes twice and that no token is
of weights that were never trained (`tests/support/chaos_trainer.py`).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from bridge_processes import Process, ServiceProcess, trainer_process
from chaos_trainer import digest, offer_prompts
from tiny_model import write_tiny_model

TARGETS = ("trainer", "core", "service")
GIVE_UP_S = 900.0
#: Prompts that the trainer has before it; so many are trained after the last kill.
NUM_AHEAD = 60


class Chaos:
    """One run in `folder`.

    Attributes:
        kills: what was killed so far, by target.

    """

    def __init__(self, folder: Path, model: Path, seed: int) -> None:
        self.folder = folder
        self.model = model
        self.num_prompts = NUM_AHEAD
        self.kills = dict.fromkeys(TARGETS, 0)
        self._rng = random.Random(seed)
        self.service = ServiceProcess(model, folder, ("--kv-policy", "fresh"))
        self.service.start()
        self.service.wait_ready()
        offer_prompts(folder, self.num_prompts, is_all=False)
        self.trainer: Process = trainer_process(self.service.address, model, folder)
        self.trainer.start()

    @property
    def is_done(self) -> bool:
        return (self.folder / "done").exists()

    def keep_alive(self) -> None:
        """Start again what was killed, and only that: a process that ends by itself is a failure."""
        if not self.service.is_running:
            self.service.start()
            self.service.wait_ready()
        if not self.trainer.is_running and not self.is_done:
            assert self.trainer.returncode == -9, f"the trainer failed:\n{self.trainer.log_tail()}"
            self.trainer.start()

    def kill(self, target: str) -> None:
        if target == "trainer":
            self.trainer.kill()
        elif target == "service":
            self.service.kill()
        else:
            core = self.service.core_process()
            assert core is not None
            core.kill()
            # The service says so to its trainer, and ends with an error.
            deadline = time.monotonic() + 60.0
            while self.service.is_running and time.monotonic() < deadline:
                time.sleep(0.05)
            assert self.service.returncode not in (None, 0), f"a service without a core:\n{self.service.log_tail()}"
        self.kills[target] += 1

    def run(self, targets: list[str]) -> None:
        """Kill in this order at random moments while there is work, then let it end."""
        for number, target in enumerate(targets):
            self._work_for(self._rng.uniform(0.0, 3.0))
            self.kill(target)
            self.keep_alive()
            print(f"kill {number + 1} of {len(targets)}: {target}, at step {self.state['step']}", flush=True)
        offer_prompts(self.folder, self.num_prompts, is_all=True)
        deadline = time.monotonic() + GIVE_UP_S
        while not self.is_done:
            self.keep_alive()
            assert time.monotonic() < deadline, (
                f"it does not end:\n{self.trainer.log_tail()}\n{self.service.log_tail()}"
            )
            time.sleep(0.2)
        while self.trainer.is_running and time.monotonic() < deadline:
            time.sleep(0.05)

    def _work_for(self, seconds: float) -> None:
        """Let the loop run; it does not run out of prompts."""
        until = time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0:
            if self.state["below"] + NUM_AHEAD > self.num_prompts:
                self.num_prompts += NUM_AHEAD
                offer_prompts(self.folder, self.num_prompts, is_all=False)
            time.sleep(min(0.02, left_s))

    @property
    def state(self) -> dict[str, Any]:
        """The trainer's checkpoint."""
        path = self.folder / "trainer.json"
        return json.loads(path.read_text()) if path.exists() else {"step": 0, "below": 0}

    def check(self) -> dict[str, int]:
        """The books; raises where they are wrong."""
        state = self.state
        assert state["below"] == self.num_prompts
        assert not state["others"]
        pushed = [json.loads(line) for line in (self.folder / "pushed.jsonl").read_text().splitlines()]
        for push in pushed:
            assert push["digest"] == digest(self.model, push["version"]), push
        assert (self.folder / "done").read_text() == digest(self.model, state["version"])
        return {"steps": state["step"], "pushes": len(pushed), "groups": state["below"]}

    def close(self) -> None:
        self.trainer.kill_all()
        self.service.kill_all()


def run_chaos(folder: Path, kills_each: int, seed: int) -> dict[str, int]:
    """Kill each target so often, in random order; what was done meanwhile."""
    rng = random.Random(seed)
    targets = [target for target in TARGETS for _ in range(kills_each)]
    rng.shuffle(targets)
    model = write_tiny_model(folder / "model")
    chaos = Chaos(folder, model, seed)
    try:
        chaos.run(targets)
        return chaos.check()
    finally:
        chaos.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each of the three processes")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="longtail-chaos-") as folder:
        done = run_chaos(Path(folder), flags.kills, flags.seed)
    print(
        f"{flags.kills} kills each of {', '.join(TARGETS)} in {time.monotonic() - started:.0f} s: "
        f"{done['groups']} groups were trained once each in {done['steps']} steps, {done['pushes']} pushes were whole"
    )


if __name__ == "__main__":
    main()
