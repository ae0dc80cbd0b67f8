"""What a service keeps, in its state folder or in memory; it must fit what the engine keeps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from longtail.engine.durable_files import replacing
from longtail.engine.errors import InvalidInputError
from longtail.trainer_bridge.service.config import BridgeConfig
from longtail.trainer_bridge.service.engine_port import Engine
from longtail.trainer_bridge.service.outbox import Outbox
from longtail.trainer_bridge.service.prompt_log import PromptLog

DELIVERIES_FILE = "deliveries.journal"
PROMPTS_FILE = "prompts.journal"
VERSION_FILE = "weights.version"


def pushed_version(folder: str | os.PathLike[str]) -> int:
    """The newest version of weights that was pushed to a service with this state folder; 0 if none was.

    Raises:
        InvalidInputError: the file that says so can't be read.

    """
    path = Path(folder) / VERSION_FILE
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        raise InvalidInputError("bridge.state", f"a number in {path}", str(error)) from error


def remember_version(folder: str | os.PathLike[str], version: int) -> None:
    """Remember that a version was pushed; on the disk when it returns.

    Raises:
        OSError: it is not.

    """
    with replacing(Path(folder) / VERSION_FILE) as new:
        new.write_text(f"{version}\n")


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
    if (pushed := pushed_version(folder)) > engine.weight_version:
        what = f"{pushed} or above, because that version was pushed, and weights_needed if the engine does not have it"
        raise InvalidInputError("engine.weight_version", what, engine.weight_version)
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
