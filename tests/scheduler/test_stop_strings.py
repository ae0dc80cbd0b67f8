"""What ends a member within the tokens of one step: found at its token, and what is after it is taken back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

from longtail.scheduler.boxed import BOXED_STOP_REASON
from longtail.scheduler.member import Member
from longtail.scheduler.rollout_scheduler import _say_what_stopped
from longtail.scheduler.stop_strings import Hit, StopStringWatch

TEXT = "so \\boxed{4} is it. END and more"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


class Watched:
    """A request that has `text` token by token, in steps of any size."""

    def __init__(
        self, tokenizer: Any, *, stop: tuple[str, ...] = (), at_boxed: bool = False, min_tokens: int = 0
    ) -> None:
        self.tokens: list[int] = tokenizer.encode(TEXT, add_special_tokens=False)
        self.ends = [len(tokenizer.decode(self.tokens[: i + 1])) for i in range(len(self.tokens))]
        params = SamplingParams(max_tokens=99, min_tokens=min_tokens, logprobs=0)
        self.request = Request("x", [5, 6], params, None)
        model_config: Any = SimpleNamespace(skip_tokenizer_init=False)
        self.watch = StopStringWatch(model_config)
        self.watch._tokenizer = tokenizer
        self.watch.watch(self.request, stop, at_boxed=at_boxed)

    def token_of(self, text: str) -> int:
        """How many tokens it takes to have `text` whole."""
        end = TEXT.index(text) + len(text)
        return next(count for count, length in enumerate(self.ends, start=1) if length >= end)

    def run(self, size: int) -> tuple[int, Hit] | None:
        """The first hit, and how many tokens came before its step."""
        for start in range(0, len(self.tokens), size):
            step = self.tokens[start : start + size]
            self.request.append_output_token_ids(step)
            if (hit := self.watch.first_hit("x", step)) is not None:
                return start, hit
        return None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_the_first_end_is_found_at_its_token_whatever_the_size_of_a_step(tokenizer: Any, size: int) -> None:
    for stop, at_boxed, what in (
        (("END", "is"), False, "is"),
        (("END",), True, "4}"),
        (("4",), True, "4"),
        (("END", "boxed_answer"), False, "END"),
    ):
        one = Watched(tokenizer, stop=stop, at_boxed=at_boxed)
        found = one.run(size)
        assert found is not None
        start, hit = found
        assert start + hit.num_tokens == one.token_of(what)
        assert hit.text == (None if what == "4}" else what)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_an_answer_before_min_tokens_is_none(tokenizer: Any, size: int) -> None:
    at = Watched(tokenizer).token_of("4}")
    exact = Watched(tokenizer, at_boxed=True, min_tokens=at).run(size)
    assert exact is not None
    assert exact[0] + exact[1].num_tokens == at
    assert Watched(tokenizer, at_boxed=True, min_tokens=at + 1).run(size) is None


@pytest.mark.parametrize(("at_boxed", "stop", "kept", "reason"), [
    (True, (), "4}", BOXED_STOP_REASON),
    (False, ("it",), "it", "it"),
])  # fmt: skip
def test_tokens_after_its_end_are_taken_back(
    tokenizer: Any, at_boxed: bool, stop: tuple[str, ...], kept: str, reason: str
) -> None:
    one = Watched(tokenizer, at_boxed=at_boxed, stop=stop)
    found = one.run(100)
    assert found is not None
    tokens = list(one.tokens)
    column = np.zeros((len(tokens), 1), dtype=np.float32)
    output = EngineCoreOutput(
        "x", list(tokens), new_logprobs=LogprobsLists(np.array(tokens)[:, None], column, column[:, 0], None)
    )
    member = Member(one.request, 0.0, 0.0, stop=stop, stops_at_boxed=at_boxed)
    _say_what_stopped(member, output, found[1])
    count = one.token_of(kept)
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, reason)
    assert output.new_token_ids == list(one.request.output_token_ids) == tokens[:count]
    assert list(one.request.all_token_ids) == [5, 6, *tokens[:count]]
    assert output.new_logprobs is not None
    assert len(output.new_logprobs.logprobs) == count


def test_what_the_front_end_finds_itself_has_no_reason_from_here(tokenizer: Any) -> None:
    one = Watched(tokenizer, stop=("4}",))
    found = one.run(100)
    assert found is not None
    output = EngineCoreOutput("x", list(one.tokens))
    _say_what_stopped(Member(one.request, 0.0, 0.0), output, found[1])
    assert output.finish_reason is None
    assert len(output.new_token_ids) == one.token_of("4}")
