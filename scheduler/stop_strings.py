"""Stop strings and boxed answers inside the engine, for members of rounds only.

Stock vLLM looks for stop strings in the front end and then aborts the request, a step or more late; the scheduler
can't tell that abort from a caller's, so a group whose members end at a stop string would never be complete. Here
the same detokenizer class runs in the engine core, in the step that samples the token, and only for requests that
are members of a round and have stop strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from longtail.scheduler.boxed import BOXED_STOP_REASON, BoxedAnswer

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.tokenizers import TokenizerLike
    from vllm.v1.request import Request


@dataclass(slots=True)
class _Watched:
    """One request; `boxed` if a boxed answer ends it."""

    request: Request
    detokenizer: Any
    boxed: BoxedAnswer | None

    def stop_at(self, token_ids: list[int]) -> str | None:
        """What ends it within these tokens."""
        text: str | None = self.detokenizer.update(token_ids, False)
        if text is None and self.boxed is not None and self.boxed.is_complete_in(self.detokenizer.output_text):
            params = self.request.sampling_params
            assert params is not None
            if self.request.num_output_tokens >= params.min_tokens:
                return BOXED_STOP_REASON
        return text


class StopStringWatch:
    """Watches the output of chosen requests for what ends them. False while it watches none."""

    def __init__(self, model_config: ModelConfig) -> None:
        self._model_config = model_config
        self._tokenizer: TokenizerLike | None = None
        self._watched: dict[str, _Watched] = {}

    def __bool__(self) -> bool:
        return bool(self._watched)

    def watch(self, request: Request, stop: Sequence[str] = (), *, at_boxed: bool = False) -> None:
        """Watch `request` for its own stop strings and for `stop`, and for boxed answers, if there is a tokenizer.

        What ends it may begin in output that it has already, but does not lie in it.
        """
        params = request.sampling_params
        if params is None or not (params.stop or stop or at_boxed) or self._model_config.skip_tokenizer_init:
            return
        if self._tokenizer is None:
            self._tokenizer = cached_tokenizer_from_config(self._model_config)
        prior = list(request.output_token_ids)
        if prior or stop or at_boxed:
            params = params.clone()
            params.detokenize = True
            params.stop = [*(params.stop or ()), *stop]
            params.min_tokens = max(params.min_tokens, len(prior))
        # It reads only these three, which Request has under the same names.
        boxed = BoxedAnswer() if at_boxed else None
        source: Any = SimpleNamespace(
            request_id=request.request_id, prompt_token_ids=request.prompt_token_ids, sampling_params=params
        )
        detokenizer = IncrementalDetokenizer.from_new_request(self._tokenizer, source)
        one = self._watched[request.request_id] = _Watched(request, detokenizer, boxed)
        one.stop_at(prior)

    def first_hit(self, request_id: str, new_token_ids: list[int]) -> tuple[int, str] | None:
        """What ends it first, and how many of the tokens it takes to complete that."""
        if (one := self._watched.get(request_id)) is None:
            return None
        texts = ((count, one.stop_at([token])) for count, token in enumerate(new_token_ids, start=1))
        return next(((count, text) for count, text in texts if text is not None), None)

    def hit(self, request_id: str, new_token_ids: list[int]) -> str | None:
        """The stop string of `request_id` that the tokens of this step complete, or `BOXED_STOP_REASON`."""
        one = self._watched.get(request_id)
        return None if one is None else one.stop_at(new_token_ids)

    def forget(self, request_id: str) -> None:
        """Stop watching; unknown ids are ignored."""
        self._watched.pop(request_id, None)
