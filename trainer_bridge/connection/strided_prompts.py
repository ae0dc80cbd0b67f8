"""How a fleet's engines share the prompts of a training run: by position, so that it needs no record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longtail.engine.prompts import Prompt, as_prompt
from longtail.trainer_bridge.errors import InvalidInputError


class StridedPrompts:
    """The prompts of engine `e` of a fleet: those of `prompts` at e, e + E, e + 2E ...

    Group ids and seeds are by the position in `prompts`, as one engine would give them.
    """

    def __init__(self, prompts: Any, e: int, num_engines: int, group_size: int, seed: int | None) -> None:
        is_text = isinstance(prompts, (str, bytes))
        if is_text or not (hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")):
            raise InvalidInputError(
                "prompts", "a sequence of prompts, in which the services keep their position", prompts
            )
        self._prompts = prompts
        self._first = e
        self._stride = num_engines
        self._group_size = group_size
        self._seed = seed

    def __len__(self) -> int:
        return len(range(self._first, len(self._prompts), self._stride))

    def __getitem__(self, index: int) -> Prompt:
        position = self._first + index * self._stride
        prompt = as_prompt(self._prompts[position], f"prompts[{position}]")
        seed = None if self._seed is None else self._seed + position * self._group_size
        return replace(
            prompt,
            group_id=str(position) if prompt.group_id is None else prompt.group_id,
            seed=seed if prompt.seed is None else prompt.seed,
        )
