"""vLLM's routes for trainers take longtail's segments of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import ServerProcess
from tiny_model import write_tiny_model

from longtail.engine.weight_manifest import stored_tensors
from longtail.engine.weight_segment import Manifest, WeightSegment


def segment_of(folder: Path) -> WeightSegment:
    segment = WeightSegment.create(Manifest.of_checkpoint(folder))
    for entry, path, offset in stored_tensors(folder):
        with path.open("rb") as file:
            file.seek(offset)
            file.readinto(segment.bytes_of(entry.name))  # type: ignore[arg-type]
    return segment


def info_of(segment: WeightSegment, base: WeightSegment | None) -> dict[str, Any]:
    info: dict[str, Any] = {"path": segment.path, "token": segment.token}
    return info if base is None else info | {"base": {"path": base.path, "token": base.token}}


def state_of(client: httpx.Client) -> tuple[Any, Any]:
    """Checksums of the model, and what it says."""
    checksums = client.post("/weight_checker", json={"action": "checksum"}).raise_for_status().json()["checksums"]
    request = {"prompt": [5, 6, 7, 8], "max_tokens": 8, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    answer = client.post("/v1/completions", json=request | {"return_token_ids": True}).raise_for_status().json()
    return checksums, (answer["choices"][0]["text"], answer["choices"][0]["logprobs"]["token_logprobs"])


def push(client: httpx.Client, update_info: dict[str, Any], version: str) -> httpx.Response:
    """All steps of an update; the answer of the one that takes the weights."""
    client.post("/pause", params={"mode": "keep"}).raise_for_status()
    try:
        client.post("/start_weight_update").raise_for_status()
        answer = client.post("/update_weights", json={"update_info": update_info})
        if answer.is_success:
            client.post("/finish_weight_update", json={"weight_version": version}).raise_for_status()
        return answer
    finally:
        client.post("/resume").raise_for_status()


def client_of(server: ServerProcess) -> httpx.Client:
    """vLLM closes the connection after an error, which a connection that is kept would run into."""
    return server.client(limits=httpx.Limits(max_keepalive_connections=0))


def test_an_update_by_http(server: ServerProcess, tiny_model: Path, tmp_path: Path) -> None:
    other = segment_of(write_tiny_model(tmp_path, seed=1))
    own = segment_of(tiny_model)
    with client_of(server) as client:
        first = state_of(client)
        client.post("/init_weight_transfer_engine", json={"init_info": {}}).raise_for_status()
        push(client, info_of(other, None), "1").raise_for_status()
        second = state_of(client)
        assert first[0].keys() == second[0].keys()
        packed = [name for name in first[0] if name.endswith(".packed")]
        assert packed
        assert all(first[0][name] != second[0][name] for name in packed)
        assert first[1] != second[1]
        assert client.get("/weight_info").json() == {"weight_version": "1"}
        for wrong in (
            info_of(own, other) | {"token": "0" * 32},
            info_of(own, None),
            info_of(own, other) | {"checksums": {}},
            {"names": ["a"]},
        ):
            assert push(client, wrong, "2").is_error
            assert state_of(client) == second
        assert client.get("/weight_info").json() == {"weight_version": "1"}
        push(client, info_of(own, other), "3").raise_for_status()
        assert state_of(client) == first


@pytest.mark.parametrize("path", ["/update_weights", "/finish_weight_update"])
def test_steps_out_of_order_are_refused(server: ServerProcess, path: str) -> None:
    with client_of(server) as client:
        before = state_of(client)
        body = {"update_info": {}} if path == "/update_weights" else {}
        assert client.post(path, json=body).is_error
        assert state_of(client) == before
