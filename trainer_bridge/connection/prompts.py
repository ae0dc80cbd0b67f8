"""Prompts on their way to a service: packed into messages, and topped up while a round uses them.

The service keeps every prompt that it was sent until it was used, so that a client sends no more of a training run's
prompts than the rounds ahead can use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from longtail.engine.prompts import Prompt, as_prompt
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.errors import InvalidInputError

_PACKET_PROMPTS = 256
#: Far below `wire.MAX_PROMPTS_BYTES`, so that one long prompt more does not matter.
_PACKET_BYTES = 1 << 23
_MIN_LOOKAHEAD = 1024

Packet = tuple[int, bytes]


def encode_prompts(prompts: Any, first: int) -> bytes:
    """The third frame for some prompts, the first at position `first`.

    Raises:
        InvalidInputError: they are none, or more than one message can have.

    """
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Sequence) or not prompts:
        raise InvalidInputError("prompts", "a list of at least one prompt", prompts)
    payload = b"".join([_array_header(len(prompts)), *(_encode(one, first + i) for i, one in enumerate(prompts))])
    if len(payload) > wire.MAX_PROMPTS_BYTES:
        raise InvalidInputError("prompts", f"at most {wire.MAX_PROMPTS_BYTES} bytes", f"{len(payload)} bytes")
    return payload


def packets(prompts: Any, first: int, stop: int | None = None) -> Iterator[Packet]:
    """Positions and third frames for the prompts `[first, stop)` of a sequence whose first has position 0."""
    stop = len(prompts) if stop is None else stop
    begin, pending, num_bytes = first, [], 0
    for position in range(first, stop):
        pending.append(_encode(prompts[position], position))
        num_bytes += len(pending[-1])
        if len(pending) == _PACKET_PROMPTS or num_bytes >= _PACKET_BYTES or position + 1 == stop:
            payload = b"".join([_array_header(len(pending)), *pending])
            if len(payload) > wire.MAX_PROMPTS_BYTES:
                where = f"prompts[{position}]"
                raise InvalidInputError(where, f"at most {wire.MAX_PROMPTS_BYTES} bytes", f"{len(payload)} bytes")
            yield begin, payload
            begin, pending, num_bytes = position + 1, [], 0


class PromptFeed:
    """The prompts of the whole training run, of which the service is to have enough at any time.

    Args:
        prompts: anything with a length and positions; the service keeps the position.
        group_size: samples of each.
        num_groups: how many groups the round is after.

    Raises:
        InvalidInputError: it is no such sequence.

    """

    def __init__(self, prompts: Any, group_size: int, num_groups: int) -> None:
        is_text = isinstance(prompts, (str, bytes, Mapping))
        if is_text or not (hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")):
            raise InvalidInputError(
                "prompts", "a sequence of prompts, in which the service keeps its position", prompts
            )
        self.group_size = group_size
        self._prompts = prompts
        self._lookahead = max(_MIN_LOOKAHEAD, 4 * num_groups)
        self._full_at: int | None = None

    def next_packet(self, status: wire.Status, *, is_running: bool) -> Packet | None:
        """What the service has to get now, if anything; while a round runs, once half of the lookahead is used.

        Raises:
            InvalidInputError: the sequence ends before the service's position in it, or has what is no prompt.

        """
        has, used = status.num_prompts, status.num_prompts_used
        if len(self._prompts) < used:
            what = f"the sequence that earlier rounds took {used} prompts of"
            raise InvalidInputError("prompts", what, f"{len(self._prompts)} prompts")
        if self._full_at == used or has >= used + self._lookahead // (2 if is_running else 1):
            return None
        return next(packets(self._prompts, has, min(len(self._prompts), used + self._lookahead)), None)

    def has_more(self, status: wire.Status) -> bool:
        """Not all of the training run's prompts were used."""
        return status.num_prompts_used < len(self._prompts)

    def refused(self, status: wire.Status) -> bool:
        """The service has no room: whether that does not matter before it has used more of what it has."""
        self._full_at = status.num_prompts_used
        return status.num_prompts > status.num_prompts_used


def _encode(value: Any, position: int) -> bytes:
    where = f"prompts[{position}]"
    prompt = as_prompt(value, where)
    try:
        return wire.encode_payload(_plain(prompt))
    except (TypeError, ValueError, OverflowError, UnicodeEncodeError, msgspec.MsgspecError) as error:
        raise InvalidInputError(where, f"plain data ({error})", value) from error


def _plain(prompt: Prompt) -> Prompt:
    """Token ids as a list: msgspec knows no other sequences."""
    if prompt.token_ids is None or isinstance(prompt.token_ids, (list, tuple)):
        return prompt
    return Prompt(
        token_ids=list(prompt.token_ids), group_id=prompt.group_id, max_tokens=prompt.max_tokens, seed=prompt.seed,
        metadata=prompt.metadata,
    )  # fmt: skip


def _array_header(length: int) -> bytes:
    """Of a MessagePack array."""
    return b"\xdd" + length.to_bytes(4, "big")
