"""Prompts: three ways in, one list of token ids out, and every wrong value named by its place."""

from __future__ import annotations

from typing import Any

import pytest

from longtail.engine.config import SamplingConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.prompts import Prompt, PromptLimits, tokenize_prompts
from longtail.engine.rounds import plan_round

LIMITS = PromptLimits(vocab_size=512, max_model_len=64)


class CharTokenizer:
    """One token a character; a chat is its messages, one a line."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return ([1] if add_special_tokens else []) + [ord(char) % 500 for char in text]

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        if conversation[0]["role"] == "bad":
            raise ValueError("roles must alternate")
        return "".join(f"{message['role']}:{message['content']}\n" for message in conversation)


def tokenize(*prompts: Any, group_size: int = 1) -> Any:
    return tokenize_prompts(prompts, group_size, CharTokenizer(), LIMITS)


def test_the_three_kinds_of_prompts() -> None:
    messages = [{"role": "user", "content": "hi"}]
    ids, text, chat, full = tokenize(
        [5, 6], "ab", messages, Prompt(text="ab", group_id="g", metadata={"answer": 3}, max_tokens=7)
    )
    assert ids.token_ids == [5, 6]
    assert text.token_ids == [1, 97, 98]
    assert chat.token_ids == [ord(char) for char in "user:hi\n"]
    assert (full.group_id, full.metadata, full.max_tokens) == ("g", {"answer": 3}, [7])
    assert [prompt.group_id for prompt in (ids, text, chat)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ([], "prompts[0].token_ids"),
        ("", None),
        ([-1], "prompts[0].token_ids[0]"),
        ([3, 512], "prompts[0].token_ids[1]"),
        ([3, True], "prompts[0].token_ids[1]"),
        ([3, "x"], "prompts[0].token_ids[1]"),
        ([3, 4.0], "prompts[0].token_ids[1]"),
        ([3] * 64, "prompts[0].token_ids"),
        ("x" * 64, "prompts[0].text"),
        ("\ud800", "prompts[0].text"),
        (7, "prompts[0]"),
        (b"bytes", "prompts[0]"),
        (None, "prompts[0]"),
        ({"text": "x"}, "prompts[0]"),
        ([{"role": "user"}], "prompts[0].messages[0].content"),
        ([{"role": 3, "content": "x"}], "prompts[0].messages[0].role"),
        ([{"role": "bad", "content": "x"}], "prompts[0].messages"),
        (Prompt(), "prompts[0]"),
        (Prompt(text="a", token_ids=[1]), "prompts[0]"),
        (Prompt(text="a", group_id=""), "prompts[0].group_id"),
        (Prompt(text="a", metadata=[1]), "prompts[0].metadata"),  # type: ignore[arg-type]
        (Prompt(text="a", metadata={7: "x"}), "prompts[0].metadata"),  # type: ignore[dict-item]
        (Prompt(text="a", max_tokens=0), "prompts[0].max_tokens"),
        (Prompt(text="a", max_tokens=[1, 2]), "prompts[0].max_tokens"),
        (Prompt(text="a", seed=-1), "prompts[0].seed"),
        (Prompt(text="a", seed=2**63 - 1), "prompts[0].seed"),
        (Prompt(token_ids="abc"), "prompts[0].token_ids"),  # type: ignore[arg-type]
        (Prompt(messages=[3]), "prompts[0].messages[0]"),  # type: ignore[list-item]
        (Prompt(messages=[]), "prompts[0].messages"),
    ],
)
def test_wrong_prompt_is_named(prompt: Any, field: str | None) -> None:
    if field is None:
        assert tokenize(prompt)[0].token_ids == [1]  # the start token is a token
        return
    with pytest.raises(InvalidInputError) as caught:
        tokenize(prompt)
    assert caught.value.field == field


@pytest.mark.parametrize("prompts", ["text", b"", {"a": 1}, 3, None, []])
def test_prompts_must_be_a_filled_list(prompts: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        tokenize_prompts(prompts, 1, CharTokenizer(), LIMITS)
    assert caught.value.field == "prompts"


def test_group_ids_are_unique() -> None:
    with pytest.raises(InvalidInputError, match=r"prompts\[1\]\.group_id"):
        tokenize(Prompt(text="a", group_id="g"), Prompt(text="b", group_id="g"))


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(InvalidInputError, match="without a tokenizer"):
        tokenize_prompts(["text"], 1, None, LIMITS)
    assert tokenize_prompts([[4]], 1, None, LIMITS)[0].token_ids == [4]


def plan(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "prompts": [[3]] * 8, "group_size": 2, "target_groups": None, "over_provision": None,
        "sampling": SamplingConfig(), "round_id": None, "tokenizer": None, "limits": LIMITS,
    }  # fmt: skip
    return plan_round(**(arguments | changes))


def test_over_provision_takes_a_multiple_of_the_target() -> None:
    assert len(plan(target_groups=3, over_provision=1.5).prompts) == 5
    assert len(plan(target_groups=3, over_provision=1).prompts) == 3
    assert len(plan(target_groups=8, over_provision=2).prompts) == 8, "as many as there are"
    assert plan().target_groups == 8


def test_members_have_distinct_ids_and_seeds() -> None:
    members = list(plan(sampling=SamplingConfig(seed=100)).members())
    assert len({member.request_id for member in members}) == 16
    assert [member.seed for member in members] == list(range(100, 116))
    own = plan(prompts=[[3], Prompt(token_ids=[3], seed=7)], sampling=SamplingConfig(seed=100))
    assert [member.seed for member in own.members()] == [100, 101, 7, 8]
    assert [member.seed for member in plan(prompts=[[3]]).members()] == [None, None]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"group_size": 0}, "group_size"),
        ({"group_size": 10**9}, "group_size"),
        ({"group_size": 1.0}, "group_size"),
        ({"target_groups": 0}, "target_groups"),
        ({"target_groups": 9}, "target_groups"),
        ({"target_groups": True}, "target_groups"),
        ({"over_provision": 2}, "over_provision"),
        ({"over_provision": 0.5, "target_groups": 2}, "over_provision"),
        ({"over_provision": float("nan"), "target_groups": 2}, "over_provision"),
        ({"round_id": ""}, "round_id"),
        ({"round_id": 5}, "round_id"),
        ({"sampling": SamplingConfig(stop=("x",))}, "sampling.stop"),
    ],
)
def test_wrong_round_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        plan(**changes)
    assert caught.value.field == field
