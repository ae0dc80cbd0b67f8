"""What tests of engines share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def forced_async_scheduling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU platform sets `async_scheduling = False` unconditionally; put it back afterwards."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__

    def forced(cls: Any, vllm_config: Any) -> None:
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(forced))
