"""Stop strings inside the engine, for members of rounds only.

Stock vLLM looks for stop strings in the front end and then aborts the request, a step or more late; the scheduler
can't tell that abort from a caller's, so a group whose members end at a stop string would never be complete. Here
the same detokenizer class runs in the engine core, in the step that samples the token, and only for requests that
are members of a round and have stop strings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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

    def watch(self, request: Request) -> None:
        """Watch `request` if it has stop strings (the front end refuses them without a tokenizer)."""
        params = request.sampling_params
        if params is None or not params.stop or self._model_config.skip_tokenizer_init:
            return
        if self._tokenizer is None:
            self._tokenizer = cached_tokenizer_from_config(self._model_config)
        # It reads only prompt_token_ids, sampling_params and request_id, which Request has under the same names.
        detokenizer = IncrementalDetokenizer.from_new_request(self._tokenizer, request)  # type: ignore[arg-type]
        self._detokenizers[request.request_id] = detokenizer

    def hit(self, request_id: str, new_token_ids: list[int]) -> bool:
        """Whether the tokens of this step complete a stop string of `request_id`."""
        detokenizer = self._detokenizers.get(request_id)
        return detokenizer is not None and detokenizer.update(new_token_ids, False) is not None

    def forget(self, request_id: str) -> None:
        """Stop watching; unknown ids are ignored."""
        self._detokenizers.pop(request_id, None)
