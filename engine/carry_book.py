"""What an engine that carries groups over keeps between its rounds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from longtail.engine.carry_config import CarryConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.group_store import GroupStore
from longtail.engine.hook_points import HookPoints
from longtail.engine.judging import Inbox, Judging
from longtail.scheduler.admission import AdaptiveOverProvision


@dataclass(frozen=True, slots=True)
class VersionChanged:
    """The engine has new weights; `EngineDriver.weight_version` says which."""


class CarryBook:
    """See the module.

    Args:
        config: policies of the rounds, and the journal.
        hooks: what the rounds call.
        version: of the weights that the engine begins with.

    Raises:
        JournalError: the journal can't be used.
        InvalidInputError: the journal has tokens of later versions, so that two sets of weights would have one.

    """

    def __init__(self, config: CarryConfig, hooks: HookPoints | None, version: int) -> None:
        self.config = config
        self.hooks = hooks
        self.inbox = Inbox()
        self.store = GroupStore(config.journal)
        self.judging = None if hooks is None else Judging(hooks, self.inbox)
        self.adaptive = None if config.target_carried is None else AdaptiveOverProvision(config.target_carried)
        self.leftover: list[Any] = []
        self.is_busy = False
        newest = max(self.store.versions(), default=0)
        if version < newest:
            self.close()
            what = f"at least {newest}, the newest version that the journal has tokens of"
            raise InvalidInputError("engine.weight_version", what, version)

    def close(self) -> None:
        """Give up the journal."""
        self.store.close()


def newest_version(journal: str | os.PathLike[str]) -> int:
    """The newest weight version that a journal has tokens of; 0 where it has none, or is not there.

    Raises:
        JournalError: the file is another's, in use, or holds what this version can't read.

    """
    if not os.path.exists(journal):
        return 0
    store = GroupStore(journal)
    try:
        return max(store.versions(), default=0)
    finally:
        store.close()
