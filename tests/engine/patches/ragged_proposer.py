"""A drafter for tests: for each request 0 to K tokens, drawn from a few that the target often samples."""

from __future__ import annotations

import random
from typing import Any

HOT_TOKENS = (8, 12, 19, 21, 30)


class RaggedProposer:
    def __init__(self, vllm_config: Any) -> None:
        self._max_drafts = vllm_config.speculative_config.num_speculative_tokens
        self._random = random.Random(0)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        pass

    def propose(self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        return [
            self._random.choices(HOT_TOKENS, k=self._random.randint(0, self._max_drafts)) if sampled else []
            for sampled in sampled_token_ids
        ]
