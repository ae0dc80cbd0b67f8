"""Stop strings inside the engine, for members of rounds only.

Stock vLLM looks for stop strings in the front end and then aborts the request, a step or more late; the scheduler
can't tell that abort from a caller's, so a group whose members end at a stop string would never be complete. Here
the same detokenizer class runs in the engine core, in the step that samples the token, and only for requests that
are members of a round and have stop strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.tokenizers import TokenizerLike
    from vllm.v1.request import Request


class StopStringWatch:
    """Watches the output of chosen requests for their stop strings. False while it watches none."""

    def __init__(self, model_config: ModelConfig) -> None:
        self._model_config = model_config
        self._tokenizer: TokenizerLike | None = None
        self._detokenizers: dict[str, IncrementalDetokenizer] = {}

    def __bool__(self) -> bool:
        return bool(self._detokenizers)

    def watch(self, request: Request, stop: Sequence[str] = ()) -> None:
        """Watch `request` for its own stop strings and for `stop`, if there is a tokenizer.

        A stop string may begin in output that it has already, but does not lie in it.
        """
        params = request.sampling_params
        if params is None or not (params.stop or stop) or self._model_config.skip_tokenizer_init:
            return
        if self._tokenizer is None:
            self._tokenizer = cached_tokenizer_from_config(self._model_config)
        prior = list(request.output_token_ids)
        if prior or stop:
            params = params.clone()
            params.detokenize = True
            params.stop = [*(params.stop or ()), *stop]
            params.min_tokens = max(params.min_tokens, len(prior))
        # It reads only these three, which Request has under the same names.
        source: Any = SimpleNamespace(
            request_id=request.request_id, prompt_token_ids=request.prompt_token_ids, sampling_params=params
        )
        detokenizer = IncrementalDetokenizer.from_new_request(self._tokenizer, source)
        detokenizer.update(prior, False)
        self._detokenizers[request.request_id] = detokenizer

    def first_hit(self, request_id: str, new_token_ids: list[int]) -> tuple[int, str] | None:
        """The first of these strings, and how many of the tokens it takes to complete it."""
        detokenizer = self._detokenizers.get(request_id)
        if detokenizer is None:
            return None
        texts = ((count, detokenizer.update([token], False)) for count, token in enumerate(new_token_ids, start=1))
        return next(((count, text) for count, text in texts if text is not None), None)

    def hit(self, request_id: str, new_token_ids: list[int]) -> str | None:
        """The stop string of `request_id` that the tokens of this step complete."""
        detokenizer = self._detokenizers.get(request_id)
        return None if detokenizer is None else detokenizer.update(new_token_ids, False)

    def forget(self, request_id: str) -> None:
        """Stop watching; unknown ids are ignored."""
        self._detokenizers.pop(request_id, None)
