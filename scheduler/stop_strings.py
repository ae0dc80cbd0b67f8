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
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from longtail.scheduler.boxed import BoxedAnswer

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.tokenizers import TokenizerLike
    from vllm.v1.request import Request


class Hit(NamedTuple):
    """What ends a request within the tokens of one step: a stop string, or `None` for a boxed answer.

    `num_tokens` of them complete it.
    """

    num_tokens: int
    text: str | None


@dataclass(slots=True)
class _Watched:
    """One request; `boxed` if a boxed answer ends it."""

    request: Request
    detokenizer: Any
    boxed: BoxedAnswer | None
    num_read: int

    def read(self, token_ids: list[int]) -> Hit | None:
        """The first that ends it within these tokens, the next of its output."""
        params = self.request.sampling_params
        assert params is not None
        for count, token_id in enumerate(token_ids, start=1):
            self.num_read += 1
            if (text := self.detokenizer.update([token_id], False)) is not None:
                return Hit(count, text)
            is_boxed = self.boxed is not None and self.boxed.is_complete_in(self.detokenizer.output_text)
            if is_boxed and self.num_read >= params.min_tokens:
                return Hit(count, None)
        return None


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
        detokenizer: Any = IncrementalDetokenizer.from_new_request(self._tokenizer, source)
        self._watched[request.request_id] = _Watched(request, detokenizer, boxed, len(prior))
        detokenizer.update(prior, False)
        if boxed is not None:
            boxed.is_complete_in(detokenizer.output_text)

    def first_hit(self, request_id: str, new_token_ids: list[int]) -> Hit | None:
        """What ends a request first within its tokens of this step."""
        one = self._watched.get(request_id)
        return None if one is None else one.read(new_token_ids)

    def forget(self, request_id: str) -> None:
        """Stop watching; unknown ids are ignored."""
        self._watched.pop(request_id, None)
