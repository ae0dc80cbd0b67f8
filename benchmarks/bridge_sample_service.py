"""Arm of `bridge.py`: a bridge service over an engine that has its rounds ready made.

A worker of `bench_io.Worker` that answers nothing: `bridge_sample_service.py NUM_TRAJECTORIES [STATE_FOLDER]`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
from bridge_sample import sample_round

from longtail.engine.carry_config import CarryConfig
from longtail.engine.config import EngineConfig
from longtail.engine.prompts import PromptLimits
from longtail.engine.trajectory import Round
from longtail.trainer_bridge.service.config import BridgeConfig
from longtail.trainer_bridge.service.service import BridgeService


class SampleRound:
    """A round without previews."""

    def __init__(self, round_: Round) -> None:
        self.round = round_

    def __iter__(self) -> SampleRound:
        return self

    def __next__(self) -> Any:
        raise StopIteration

    def interrupt(self, error: Exception) -> None: ...

    def close(self) -> None: ...


class SampleEngine:
    """Gives the same trajectories in every round."""

    tokenizer = None
    limits = PromptLimits(vocab_size=49_152, max_model_len=4096)
    weight_version = 0
    num_in_flight = 0
    num_prompts_used = 0
    round_to_give_again = None

    def __init__(self, count: int, journal: Path | None) -> None:
        self.config = EngineConfig(model="sample", carry=CarryConfig(journal=journal))
        self._round = sample_round("r", count)

    def how_it_ended(self) -> str | None:
        return None

    def stream_trajectories(self, prompts: Any, *, round_id: str, **_: Any) -> SampleRound:
        return SampleRound(msgspec.structs.replace(self._round, round_id=round_id))


def main() -> None:
    """Serve until standard input ends."""
    state = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    engine: Any = SampleEngine(int(sys.argv[1]), None if state is None else state / "engine.journal")
    with BridgeService(engine, BridgeConfig(state=state), staging=None) as service:
        print(json.dumps({"address": service.address}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
