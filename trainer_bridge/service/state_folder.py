"""What a service keeps, in its state folder or in memory; it must fit what the engine keeps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from longtail.engine.errors import InvalidInputError
from longtail.trainer_bridge.service.config import BridgeConfig
from longtail.trainer_bridge.service.engine_port import Engine
from longtail.trainer_bridge.service.outbox import Outbox
from longtail.trainer_bridge.service.prompt_log import PromptLog

DELIVERIES_FILE = "deliveries.journal"
PROMPTS_FILE = "prompts.journal"


def open_state(engine: Engine, config: BridgeConfig) -> tuple[Outbox, PromptLog]:
    """Deliveries and prompts; the caller closes both.

    Raises:
        InvalidInputError: the folder can't be used, or does not belong to the engine's journal.
        JournalError: a file in it can't be used.

    """
    bounds: dict[str, Any] = {"max_unacked": config.max_unacked, "max_unacked_bytes": config.max_unacked_bytes}
    if config.state is None:
        return Outbox(**bounds), PromptLog(max_bytes=config.max_prompt_bytes)
    carry = engine.config.carry
    if carry is not None and carry.journal is None:
        what = "a CarryConfig with a journal, because without one the engine would forget what the state folder has"
        raise InvalidInputError("engine.carry.journal", what, None)
    folder = Path(config.state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"a folder that can be made ({error.strerror})"
        raise InvalidInputError("bridge.state", what, os.fspath(folder)) from error
    outbox = Outbox(folder / DELIVERIES_FILE, **bounds)
    try:
        prompts = PromptLog(folder / PROMPTS_FILE, max_bytes=config.max_prompt_bytes)
        used = engine.num_prompts_used
        if not prompts.first <= used <= len(prompts):
            prompts.close()
            got = f"positions {prompts.first} to {len(prompts)}"
            raise InvalidInputError("bridge.state", f"a log of prompts with position {used}, the engine's", got)
        return outbox, prompts
    except BaseException:
        outbox.close()
        raise
