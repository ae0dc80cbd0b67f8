"""Forks trajectories of a running scheduler: the KV of a branch is parked under the branch's own key.

A fork costs no block and computes nothing. Each branch is submitted like a trajectory that was cut and goes on: it
finds its KV when it is scheduled, shares the blocks, and copies the one that is not full. Should the pool take the
blocks before that, what is missing is computed again.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.fork_order import ForkOrder, ForkPoint, parse_given_up, parse_order
from longtail.scheduler.kv_policy import KvVersions

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.request import Request

    from longtail.scheduler.member import Member
    from longtail.scheduler.rollout_kv import RolloutKv
    from longtail.scheduler.rounds import RoundBook


def cannot_fork(request: Request) -> str | None:
    """Why branches of a request could not be sampled exactly, or `None` if they can."""
    params = request.sampling_params
    if params is None:
        return "it is no generation"
    for is_there, what in (
        (request.structured_output_request is not None, "structured output, whose grammar has a state of its own"),
        (params.prompt_logprobs is not None, "prompt_logprobs, which are computed with the prompt"),
        (bool(request.mm_features) or request.prompt_embeds is not None, "a prompt that is not tokens only"),
        (params.logprobs is None, "no log-probs, which its branches need"),
    ):
        if is_there:
            return what
    return None


class History:
    """Log-probs and weight versions of what a live member has sampled in this request."""

    def __init__(self) -> None:
        self.logprobs = array("f")
        self.versions = KvVersions([])

    def extend(self, output: EngineCoreOutput, version: int) -> None:
        """Take the tokens of one step in."""
        count = len(output.new_token_ids)
        if not count:
            return
        assert output.new_logprobs is not None
        self.versions.extend(len(self.logprobs), version)
        self.logprobs.extend(output.new_logprobs.logprobs[:count, 0].tolist())


class Forking:
    """The live members of one scheduler that may be forked. False while there is none."""

    def __init__(self, kv: RolloutKv, book: RoundBook) -> None:
        self._kv = kv
        self._book = book
        #: By park key, and by request id.
        self._live: dict[str, Member] = {}
        self._histories: dict[str, History] = {}

    def __bool__(self) -> bool:
        return bool(self._live)

    def enter(self, member: Member) -> None:
        """A member arrived that may be forked."""
        assert member.park is not None
        self._live[member.park] = member
        member.history = self._histories[member.request.request_id] = History()

    def leave(self, member: Member) -> None:
        """It ended."""
        assert member.park is not None
        self._live.pop(member.park, None)
        self._histories.pop(member.request.request_id, None)

    def note(self, output: EngineCoreOutput) -> None:
        """A request has tokens of this step."""
        if (history := self._histories.get(output.request_id)) is not None:
            history.extend(output, self._kv.version)

    def fork(self, args: Mapping[str, Any]) -> ForkPoint:
        """Answer `rollout_rpc("fork")`.

        Raises:
            InvalidInputError: there is nothing to fork at that position, or the group takes no more members.

        """
        order = parse_order(args)
        member = self._live.get(order.of)
        at = order.at
        if member is not None:
            at = _checked_position(order, member)
        elif at is None:
            raise InvalidInputError("at", "a position, because the trajectory does not run any more", None)
        index = 0
        if order.round is not None and order.group is not None:
            index = self._book.reserve(order.round, order.group, len(order.keys))
        # The last token of a branch goes through the model again: what is sampled after it is its own.
        num_tokens = order.num_prompt_tokens + at - 1
        if member is None:
            num_kv = max(self._kv.copy(key, order.of, num_tokens) for key in order.keys)
            return ForkPoint(is_live=False, at=at, index=index, num_kv_tokens=num_kv)
        num_kv = max(self._kv.share(key, member, num_tokens) for key in order.keys)
        return _point(member, at, index, num_kv)

    def give_up(self, args: Mapping[str, Any]) -> None:
        """Answer `rollout_rpc("give_up_fork")`.

        Raises:
            InvalidInputError: names the field.

        """
        given_up = parse_given_up(args)
        keys = list(given_up.keys)
        if given_up.round is not None and given_up.group is not None:
            keys += self._book.release(given_up.round, given_up.group, given_up.index, len(given_up.keys))
        self._kv.forget(keys)


def _checked_position(order: ForkOrder, member: Member) -> int:
    request = member.request
    num_prompt, num_output = request.num_prompt_tokens, request.num_output_tokens
    if order.num_prompt_tokens != num_prompt:
        raise InvalidInputError("num_prompt_tokens", f"{num_prompt}, as the trajectory has", order.num_prompt_tokens)
    if order.at is not None and order.at > num_output:
        raise InvalidInputError("at", f"at most {num_output}, the tokens that the trajectory has", order.at)
    return num_output if order.at is None else order.at


def _point(member: Member, at: int, index: int, num_kv_tokens: int) -> ForkPoint:
    history = member.history
    assert history is not None
    start = member.num_prior
    count = max(0, at - start)
    assert count <= len(history.logprobs), "a token without a log-prob"
    return ForkPoint(
        is_live=True,
        at=at,
        start=start,
        token_ids=list(member.request.output_token_ids[start:at]),
        logprobs=history.logprobs[:count].tolist(),
        versions=[(version, start + first, start + end) for version, first, end in history.versions.spans(count)],
        segments=[segment for segment in member.segments if segment[0] < at],
        index=index,
        num_kv_tokens=num_kv_tokens,
    )
