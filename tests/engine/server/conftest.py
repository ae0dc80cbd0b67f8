"""One server for every test that leaves it as it found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_process import MAX_BODY_BYTES, MAX_MEMBERS, ServerProcess, running_server


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log_file = tmp_path_factory.mktemp("server") / "server.log"
    limits = {"max_body_bytes": MAX_BODY_BYTES, "max_members": MAX_MEMBERS}
    with running_server(tiny_model, log_file, rl_routes=True, **limits) as running:
        yield running


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    """A client with the key; the engine is idle before and after."""
    server.wait_idle()
    with server.client() as client:
        yield client
    server.wait_idle()
