"""A trainer that may be killed at any moment: `python chaos_trainer.py ADDRESS FOLDER MODEL [SHARE]`.

It learns nothing, but does what a trainer must: takes rounds, checks that no group comes twice, makes its next weights
from what it has trained, writes a checkpoint, acknowledges, pushes. Weights of version v are those of the checkpoint
plus noise that v seeds, so that anybody can say what their digest is. Everything that it claims is in its folder:

    trainer.json    the checkpoint: step, version, cursor, and the prompts that were trained: all below one, and others
    pushed.jsonl    one line for each push that was applied: version and digest
    done            there are no more prompts, and all were trained

How many prompts there are is in `prompts.json`, see `offer_prompts`; it may grow until it says that these are all.

With a SHARE, so many of its pushes break off in the middle, or lie; it goes on after each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longtail.engine.config import SamplingConfig
from longtail.engine.durable_files import replacing
from longtail.engine.prompts import Prompt
from longtail.engine.weight_manifest import stored_tensors
from longtail.trainer_bridge.client import BridgeClient
from longtail.trainer_bridge.errors import BridgeError, InvalidInputError, WeightsPushError
from longtail.trainer_bridge.weights.manifest import checksum, digest_of
from longtail.trainer_bridge.wire import Cursor

GROUP_SIZE = 2
TARGET_GROUPS = 4
SAMPLING = SamplingConfig(max_tokens=48, seed=7)


class Prompts(Sequence[Prompt]):
    """Prompt i is group `str(i)`; budgets have a long tail."""

    def __init__(self, num_prompts: int) -> None:
        self._num_prompts = num_prompts

    def __len__(self) -> int:
        return self._num_prompts

    def __getitem__(self, i: Any) -> Any:
        budget = min(int(random.Random(i).lognormvariate(2.0, 1.0)) + 1, SAMPLING.max_tokens)
        return Prompt(token_ids=[5 + i % 200, 7, 11], group_id=str(i), max_tokens=budget, metadata={"i": i})


def weights_of(model: Path, version: int) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Float32 tensors of a version."""
    for stored in stored_tensors(model):
        entry = stored.entry
        assert entry.dtype == "float32"
        with stored.path.open("rb") as file:
            file.seek(stored.offset)
            data = np.frombuffer(file.read(entry.num_bytes), "<f4").reshape(entry.shape)
        if version:
            seed = int.from_bytes(hashlib.sha256(f"{entry.name} {version}".encode()).digest()[:8], "little")
            noise = np.random.default_rng(seed).standard_normal(entry.shape, dtype=np.float32)
            data = data + np.float32(1e-3) * noise
        yield entry.name, data


def digest(model: Path, version: int) -> str:
    """What the service must say of that version."""
    return digest_of({name: checksum(np.ascontiguousarray(data)) for name, data in weights_of(model, version)})


def broken(tensors: Iterator[tuple[str, np.ndarray[Any, Any]]], rng: random.Random) -> Iterator[tuple[str, Any]]:
    """Some of the tensors, then the trainer's own failure, or one with another name."""
    for number, (name, data) in enumerate(tensors):
        if number == 5:
            if rng.random() < 0.5:
                raise PushBroke("the trainer failed in the middle of a push")
            name += ".lie"
        yield name, data


def offer_prompts(folder: Path, num_prompts: int, *, is_all: bool) -> None:
    """Let the trainer of this folder train so many prompts; `is_all` ends it after them."""
    _write_json(folder / "prompts.json", {"num_prompts": num_prompts, "is_all": is_all})


class PushBroke(Exception):
    """On purpose."""


class Trainer:
    """See the module."""

    def __init__(self, address: str, folder: Path, model: Path, broken_share: float = 0.0) -> None:
        self.address = address
        self.broken_share = broken_share
        self.rng = random.Random()
        self.folder = folder
        self.model = model
        self.path = folder / "trainer.json"
        self.state: dict[str, Any] = {"step": 0, "version": 0, "cursor": None, "below": 0, "others": []}
        if self.path.exists():
            self.state = json.loads(self.path.read_text())

    def run(self) -> None:
        """Until everything was trained; goes on after any death of the service."""
        while not (self.folder / "done").exists():
            cursor = self.state["cursor"]
            try:
                with BridgeClient(
                    self.address, consumer="trainer", cursor=cursor and Cursor(*cursor), connect_timeout_s=120.0,
                    timeout_s=120.0,
                ) as client:  # fmt: skip
                    self._train(client)
            except BridgeError as error:
                print(f"trainer: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                time.sleep(0.2)

    def _train(self, client: BridgeClient) -> None:
        while True:
            self._bring_up_to_date(client)
            offered = json.loads((self.folder / "prompts.json").read_text())
            if self.state["below"] == offered["num_prompts"]:
                if offered["is_all"] and self._is_done(client):
                    return
                time.sleep(0.01)
                continue
            round_ = client.rollout(
                Prompts(offered["num_prompts"]), group_size=GROUP_SIZE, target_groups=TARGET_GROUPS, over_provision=2.0,
                sampling=SAMPLING, round_id=f"step-{self.state['step']}",
            )  # fmt: skip
            below, others = self.state["below"], set(self.state["others"])
            for group in round_.groups:
                assert group.complete, group
                assert len(group.trajectories) == GROUP_SIZE
                number = int(group.group_id)
                assert number >= below, f"group {number} came twice"
                assert number not in others, f"group {number} came twice"
                others.add(number)
                versions = [int(span.version) for t in group.trajectories for span in t.weight_versions]
                assert max(versions, default=0) <= self.state["version"], "tokens of weights that were never trained"
            while below in others:
                others.remove(below)
                below += 1
            cursor = client.cursor
            self.state = {
                "step": self.state["step"] + 1,
                "version": self.state["version"] + 1,
                "cursor": [cursor.epoch, cursor.seq],
                "below": below,
                "others": sorted(others),
            }
            _write_json(self.path, self.state)
            client.ack()

    def _is_done(self, client: BridgeClient) -> bool:
        """The model has the last weights; not where the service was restarted since they were pushed."""
        found = client.checksum().digest
        if found is None:
            return False
        assert found == digest(self.model, self.state["version"]), "the model has other weights"
        (self.folder / "done").write_text(found)
        return True

    def _bring_up_to_date(self, client: BridgeClient) -> None:
        """The engine gets the weights of the checkpoint, if it does not have them."""
        version = self.state["version"]
        while client.weight_version != version or client.weights_needed is not None:
            assert client.weight_version <= version, "the engine has weights that were never trained"
            while self.rng.random() < self.broken_share:
                with contextlib.suppress(WeightsPushError, InvalidInputError, PushBroke):
                    client.push_weights(broken(weights_of(self.model, version), self.rng), version, delta="auto")
                    raise AssertionError("a push that is not whole was taken")
            report = client.push_weights(weights_of(self.model, version), version, delta="auto")
            assert report.version == version
            if (found := client.checksum().digest) is not None:  # the service was not restarted since
                with (self.folder / "pushed.jsonl").open("a") as file:
                    file.write(json.dumps({"version": version, "digest": found}) + "\n")


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as new:
        new.write_text(json.dumps(value))


if __name__ == "__main__":
    address, folder, model, *share = sys.argv[1:]
    Trainer(address, Path(folder), Path(model), *map(float, share)).run()
