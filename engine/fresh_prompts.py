"""Fresh prompts on their way into a round: drawn from the caller's, prepared by the hooks, taken in in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Any

from longtail.engine.config import SamplingConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.hook_points import HookPoints
from longtail.engine.judging import Inbox
from longtail.engine.prompt_source import PromptSource
from longtail.engine.prompts import Prompt, PromptLimits, Tokenizer, as_prompt, tokenize_prompts
from longtail.engine.tree_members import check_budgets


@dataclass(frozen=True, slots=True)
class Prepared:
    """Prompts from position `first` of `source` on, when the hooks are done with them."""

    prompts: list[Future[Prompt]]
    first: int
    source: PromptSource


class FreshPrompts:
    """Draws for one run.

    Attributes:
        num_preparing: prompts that the hooks have.

    """

    def __init__(self, source: PromptSource, hooks: HookPoints | None, inbox: Inbox) -> None:
        self.source = source
        self.num_preparing = 0
        self._hooks = hooks
        self._inbox = inbox
        self._waiting: dict[int, Prepared] = {}

    def draw(self, count: int) -> list[Any]:
        """At most `count` prompts that can go in now. With hooks there are none: `Prepared` items come instead.

        Raises:
            InvalidInputError: something that is no prompt.

        """
        first = self.source.cursor
        drawn = self.source.draw(count)
        if self._hooks is None or not drawn:
            return drawn
        prompts = [as_prompt(value, f"prompts[{i}]") for i, value in enumerate(drawn, start=first)]
        self._prepare(self._hooks, prompts, first)
        return []

    def take(self, item: Prepared, cursor: int) -> Iterator[list[Prompt]]:
        """Batches that can go in, the first at position `cursor`.

        A batch whose predecessors are not here waits for them, so that the position is right after a crash.

        Raises:
            Exception: what a hook failed with that is to end the round.

        """
        if item.source is not self.source:
            return  # an earlier run's: they were drawn again
        self._waiting[item.first] = item
        while (batch := self._waiting.pop(cursor, None)) is not None:
            cursor += len(batch.prompts)
            self.num_preparing -= len(batch.prompts)
            yield [prompt.result() for prompt in batch.prompts]

    def discard_unfit(
        self, group_size: int, sampling: SamplingConfig, tokenizer: Tokenizer | None, limits: PromptLimits
    ) -> None:
        """Forget the prompts of an iterator that ended the round: they would end the next one as well."""
        names: set[str] = set()

        def is_unfit(value: Any) -> bool:
            try:
                prompt = as_prompt(value, "prompt")
                check_budgets(tokenize_prompts([prompt], group_size, tokenizer, limits), sampling)
            except InvalidInputError:
                return True
            is_doubled = prompt.group_id in names
            names.update(() if prompt.group_id is None else (prompt.group_id,))
            return is_doubled

        self.source.discard(is_unfit)

    def _prepare(self, hooks: HookPoints, prompts: Sequence[Prompt], first: int) -> None:
        prepared = Prepared([hooks.prepare(prompt) for prompt in prompts], first, self.source)
        self.num_preparing += len(prompts)
        num_left, lock = len(prompts), Lock()

        def one_done(_: Future[Prompt]) -> None:
            nonlocal num_left
            with lock:
                num_left -= 1
                is_last = num_left == 0
            if is_last:
                self._inbox.post(prepared)

        for future in prepared.prompts:
            future.add_done_callback(one_done)
