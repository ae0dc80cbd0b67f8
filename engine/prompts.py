"""Prompts: what a caller may pass, and the token ids that the engine runs.

A prompt is token ids, text, or chat messages. Text and chat are tokenised once, here, and are token ids from then
on. Everything is checked before the first request is submitted, so a bad prompt never leaves half a round behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from longtail.engine.config import MAX_SEED
from longtail.engine.errors import InvalidInputError


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt with what travels along; give exactly one of `token_ids`, `text` and `messages`.

    Attributes:
        token_ids: int token ids, used as they are.
        text: tokenised with the tokenizer's own special tokens.
        messages: chat messages (`role`, `content`), put through the checkpoint's chat template.
        group_id: id of the group, unique among the prompts that are given together; its position by default.
        max_tokens: output budget in tokens, one for all members or one a member; `SamplingConfig`'s by default.
        seed: member `i` samples with `seed + i`; by default what `SamplingConfig.seed` gives the group's position.
        metadata: returned with every trajectory, unchanged; strings for keys, and plain data where a journal or a file
            holds it.

    """

    token_ids: Sequence[int] | None = None
    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    group_id: str | None = None
    max_tokens: int | Sequence[int] | None = None
    seed: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A checked prompt: id of its group, token ids, own budgets by member and own seed (or `None`), and metadata."""

    group_id: str
    token_ids: list[int]
    max_tokens: list[int] | None
    seed: int | None
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """What the model can take: ids in `[0, vocab_size)`, and prompts that leave room for one output token."""

    vocab_size: int
    max_model_len: int


def tokenize_prompts(
    prompts: Sequence[Any], group_size: int, tokenizer: Tokenizer | None, limits: PromptLimits, *, first: int = 0
) -> list[TokenPrompt]:
    """Check every prompt and turn it into token ids; `first` is the position of the first one.

    Raises:
        InvalidInputError: names the prompt by its position, e.g. `prompts[3].token_ids[0]`.

    """
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Sequence):
        raise InvalidInputError("prompts", "a list of prompts", prompts)
    if not prompts:
        raise InvalidInputError("prompts", "at least one prompt", prompts)
    checked: list[TokenPrompt] = []
    seen: set[str] = set()
    for position, value in enumerate(prompts, start=first):
        where = f"prompts[{position}]"
        prompt = as_prompt(value, where)
        group_id = str(position) if prompt.group_id is None else prompt.group_id
        if not isinstance(group_id, str) or not 0 < len(group_id) <= 200:
            raise InvalidInputError(f"{where}.group_id", "1 to 200 characters", group_id)
        if group_id in seen:
            raise InvalidInputError(f"{where}.group_id", "an id that no other prompt of the round has", group_id)
        if not isinstance(prompt.metadata, Mapping):
            raise InvalidInputError(f"{where}.metadata", "an object", prompt.metadata)
        if not all(isinstance(key, str) for key in prompt.metadata):
            raise InvalidInputError(f"{where}.metadata", "strings for keys", prompt.metadata)
        seen.add(group_id)
        checked.append(
            TokenPrompt(
                group_id,
                _token_ids(prompt, where, tokenizer, limits),
                _budgets(prompt.max_tokens, group_size, f"{where}.max_tokens"),
                _seed(prompt.seed, group_size, f"{where}.seed"),
                dict(prompt.metadata),
            )
        )
    return checked


def _budgets(value: int | Sequence[int] | None, group_size: int, where: str) -> list[int] | None:
    if value is None:
        return None
    budgets = [value] * group_size if isinstance(value, int) else list(value)
    if len(budgets) != group_size:
        raise InvalidInputError(where, f"one budget, or {group_size} (group_size)", value)
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise InvalidInputError(where, "integers >= 1", value)
    return budgets


def _seed(value: int | None, group_size: int, where: str) -> int | None:
    high = MAX_SEED - group_size
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high):
        raise InvalidInputError(where, f"an integer in [0, {high}]", value)
    return value


def as_prompt(value: Any, where: str) -> Prompt:
    """A prompt from anything that stands for one.

    Raises:
        InvalidInputError: names it `where`.

    """
    if isinstance(value, Prompt):
        given = [name for name in ("token_ids", "text", "messages") if getattr(value, name) is not None]
        if len(given) != 1:
            raise InvalidInputError(where, "exactly one of token_ids, text and messages", given)
        return value
    if isinstance(value, str):
        return Prompt(text=value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        if value and all(isinstance(item, Mapping) for item in value):
            return Prompt(messages=value)
        return Prompt(token_ids=value)
    raise InvalidInputError(where, "token ids, text, chat messages or a Prompt", value)


def _token_ids(prompt: Prompt, where: str, tokenizer: Tokenizer | None, limits: PromptLimits) -> list[int]:
    if prompt.token_ids is not None:
        token_ids, where = _checked_ids(prompt.token_ids, f"{where}.token_ids", limits), f"{where}.token_ids"
    elif tokenizer is None:
        raise InvalidInputError(where, "token ids, because this engine was started without a tokenizer", prompt)
    elif prompt.text is not None:
        where = f"{where}.text"
        token_ids = tokenizer.encode(_checked_text(prompt.text, where), add_special_tokens=True)
    else:
        where = f"{where}.messages"
        rendered = _render_chat(prompt.messages or (), where, tokenizer)
        token_ids = tokenizer.encode(rendered, add_special_tokens=False)
    if not token_ids:
        raise InvalidInputError(where, "at least one token", token_ids)
    if len(token_ids) >= limits.max_model_len:
        raise InvalidInputError(
            where, f"fewer than {limits.max_model_len} tokens (max_model_len)", f"{len(token_ids)} tokens"
        )
    return list(token_ids)


def _checked_ids(values: object, where: str, limits: PromptLimits) -> list[int]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        raise InvalidInputError(where, "a list of token ids", values)
    for i, token_id in enumerate(values):
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < limits.vocab_size:
            raise InvalidInputError(f"{where}[{i}]", f"an integer in [0, {limits.vocab_size})", token_id)
    return list(values)


def _checked_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise InvalidInputError(where, "a string", text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(where, f"valid Unicode ({error.reason})", text) from error
    return text


def _render_chat(messages: Sequence[Mapping[str, Any]], where: str, tokenizer: Tokenizer) -> str:
    if not messages:
        raise InvalidInputError(where, "at least one message", messages)
    conversation: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidInputError(f"{where}[{i}]", "an object with role and content", message)
        for name in ("role", "content"):
            _checked_text(message.get(name), f"{where}[{i}].{name}")
        conversation.append(dict(message))
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are arbitrary Jinja and raise what they like
        raise InvalidInputError(where, f"messages that the chat template takes ({error})", conversation) from error
