"""The ledger in running engines: exact sampling under speculation, chunked seeded prefill, refusals, second engine.

The engines run in `engine_probe.py`, once for all tests here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

FALSE_ALARM = 1e-6
UNSEEDED = 1  # this request of the probe has no seed


@pytest.fixture(scope="module")
def probe(vocab32_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out_file = tmp_path_factory.mktemp("probe") / "out.json"
    script = Path(__file__).with_name("engine_probe.py")
    done = subprocess.run(
        [sys.executable, str(script), str(vocab32_model), str(out_file)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return msgspec.json.decode(out_file.read_bytes())


def test_speculative_sampling_has_the_exact_law(probe: dict[str, Any], chi_square_p: Callable[..., float]) -> None:
    """Joint law of two tokens at temperature 0.7, top-k 8, top-p 0.9; padded and ragged drafts. False alarm 1e-6."""
    speculative = probe["speculative"]
    assert speculative["accepted"]["vllm:spec_decode_num_accepted_tokens"] > 200
    assert chi_square_p(speculative["fixed"], probe["law"]) > FALSE_ALARM
    assert chi_square_p(speculative["stock"], probe["law"]) < FALSE_ALARM


def test_the_runner_launches_the_ledger_s_kernels(probe: dict[str, Any]) -> None:
    launched = probe["speculative"]["launched"]
    assert len(launched) == 3
    assert all(module.startswith("longtail.engine.patches.") for module in launched.values())


def test_a_seeded_request_samples_the_same_in_chunks_as_in_one_piece(probe: dict[str, Any]) -> None:
    whole, chunked = probe["seeded"]["whole"], probe["seeded"]["chunked"]
    for index, (left, right) in enumerate(zip(whole, chunked, strict=True)):
        assert (left == right) is (index != UNSEEDED)
    assert "CPU Generator does not use offset" in probe["seeded"]["stock_crash"]


def test_every_process_of_a_running_engine_has_every_entry_applied(probe: dict[str, Any]) -> None:
    processes = probe["seeded"]["processes"]
    assert [process["process"] for process in processes] == ["front end", "engine core", "worker 0"]
    assert {entry["state"] for process in processes for entry in process["entries"]} == {"applied"}


def test_malformed_metadata_is_refused_before_it_is_enqueued(probe: dict[str, Any]) -> None:
    assert probe["seeded"]["refusal"] == {
        "field": "rollout.round",
        "parameter": "rollout.round",
        "text": "rollout.round: expected `str`, got `int`, got 7",
    }
    assert probe["seeded"]["unfinished"] == 0


def test_rpc_to_a_scheduler_without_rounds_is_a_typed_refusal(probe: dict[str, Any]) -> None:
    assert probe["seeded"]["no_rounds"] == {
        "invalid": ["scheduler_cls", "a rollout scheduler of longtail", "Scheduler"]
    }
