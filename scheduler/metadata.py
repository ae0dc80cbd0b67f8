"""Rollout metadata of one request: what travels from the front end to the scheduler, and its one parser.

It rides in `SamplingParams.extra_args["rollout"]` as a dict, or as the same dict in a JSON string, because
vLLM's OpenAI routes let only flat values through `vllm_xargs`. The front end parses it before a request is
enqueued, and the scheduler parses it again: an exception inside the scheduler would kill the engine, so what
comes from the network is never trusted twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from longtail.scheduler.boundaries import BoundarySpec
from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.kv_policy import KvPolicy
from longtail.scheduler.limits import MAX_GROUP_SIZE, MAX_ID_CHARS, MAX_TARGET_GROUPS
from longtail.scheduler.tree_place import BirthReport, TreePlace

EXTRA_ARGS_KEY = "rollout"

#: Stop reason of a member that the scheduler stopped, or refused, because its round was over.
CUT_STOP_REASON = "rollout_cut"

MAX_JSON_CHARS = 4_096

_JSON_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")


class RolloutMetadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The place of one request in a round.

    Attributes:
        round: id of the round; members with one id are cut together.
        target_groups: the round is cut when this many groups are complete; every member must say the same.
        group: id of the group inside the round.
        group_size: members of the group that run in this round; every member must say the same.
        index: place in the group, 0-based, below `group_size`.
        park: key under which its KV is parked when its round is cut, and looked for when it begins. `None` frees it.
        kv_policy: what a weight change does to its KV: `fresh`, `stale` or `stale_up_to:k`.
        num_prior_tokens: how many tokens at the end of its prompt are output of the same trajectory, sampled before. To
            the engine they are output: `max_tokens` and `min_tokens` of the request count them.
        num_computed_tokens: for how many tokens of its prompt there had been KV when it was stopped.
        num_drawn_tokens: how many of `num_prior_tokens` were drawn with the request's own seed; all by default.
        stop: stop strings of a trajectory that goes on; the front end, which does not know the text before, would find
            others.
        stop_at_boxed: it ends with the token that completes a boxed answer, as LaTeX's `boxed` makes one.
        boundary: where it is stopped for the front end to decide; its place in the group stays its own.
        can_fork: branches of it may be asked for under its `park` key until its group is complete or its round
            forgotten: what it needs for that is kept.
        tree: it is a path of a tree that the scheduler grows.

    """

    round: str
    target_groups: int
    group: str
    group_size: int = 1
    index: int = 0
    park: str | None = None
    kv_policy: str = "fresh"
    num_prior_tokens: int = 0
    num_computed_tokens: int = 0
    num_drawn_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_at_boxed: bool = False
    boundary: BoundarySpec | None = None
    can_fork: bool = False
    tree: TreePlace | None = None

    @property
    def num_draws(self) -> int:
        """Tokens of the prompt that the request's own seed has drawn."""
        return self.num_prior_tokens if self.num_drawn_tokens is None else self.num_drawn_tokens


class MemberReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler says of one member in its final output, under the same key of `kv_transfer_params`.

    Times are the engine core's monotonic clock, in seconds; only their differences mean anything.

    Attributes:
        opened_ts: when the round's first member arrived.
        arrived_ts: when this member arrived; `finished_ts` when it got its final output.
        scheduled_ts: first step that had it in the batch, `first_token_ts` its first output token; `None` if never.
        num_scheduled_tokens: tokens of it that went through the model.
        num_recomputed_tokens: of those, tokens whose KV had been computed before and was lost: to a preemption, to a
            weight change, or while it was cut.
        num_cached_tokens: prompt tokens that the prefix cache served at its first admission.
        num_preemptions: how often the pool took its KV.
        num_parked_tokens: positions whose parked KV it took up again.
        num_computed_tokens: positions that had KV when it ended.
        segments: `(start, kv_spans)` by segment: the output token that it begins with, counted in the trajectory, and
            `(version, start, end)` spans of the KV that was there then.
        boundary: of one that was stopped at a boundary, the string or token id that made it; `None` for a length.
        is_unborn: it is a path of a tree, and did not begin.
        birth: it began as a branch of another path, whose first tokens are not in this output.

    """

    opened_ts: float
    arrived_ts: float
    finished_ts: float
    scheduled_ts: float | None = None
    first_token_ts: float | None = None
    num_scheduled_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_parked_tokens: int = 0
    num_computed_tokens: int = 0
    segments: list[tuple[int, list[tuple[str, int, int]]]] = []
    boundary: str | int | None = None
    is_unborn: bool = False
    birth: BirthReport | None = None


def report_of(kv_transfer_params: Mapping[str, Any] | None) -> MemberReport | None:
    """The scheduler's report in a final output, or `None` when the request took part in no round."""
    value = (kv_transfer_params or {}).get(EXTRA_ARGS_KEY)
    return None if value is None else msgspec.convert(value, MemberReport)


def parse_metadata(value: object) -> RolloutMetadata:
    """Check and convert one metadata value (a dict, or a JSON string of one).

    Raises:
        InvalidInputError: names the field, what was expected and what came.

    """
    if isinstance(value, str):
        if len(value) > MAX_JSON_CHARS:
            raise InvalidInputError(EXTRA_ARGS_KEY, f"at most {MAX_JSON_CHARS} characters of JSON", value)
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise InvalidInputError(EXTRA_ARGS_KEY, f"a JSON object ({error})", value) from error
    if not isinstance(value, Mapping):
        raise InvalidInputError(EXTRA_ARGS_KEY, "an object", value)
    try:
        metadata = msgspec.convert(dict(value), RolloutMetadata)
    except msgspec.ValidationError as error:
        raise _named_error(error, value) from error
    for name in ("round", "group", "park"):
        text = getattr(metadata, name)
        if text is not None and not 0 < len(text) <= MAX_ID_CHARS:
            raise InvalidInputError(f"{EXTRA_ARGS_KEY}.{name}", f"1 to {MAX_ID_CHARS} characters", text)
    for name in ("num_prior_tokens", "num_computed_tokens"):
        if getattr(metadata, name) < 0:
            raise InvalidInputError(f"{EXTRA_ARGS_KEY}.{name}", "an integer >= 0", getattr(metadata, name))
    if not 0 <= metadata.num_draws <= metadata.num_prior_tokens:
        what = f"an integer in [0, {metadata.num_prior_tokens}], the prior tokens"
        raise InvalidInputError(f"{EXTRA_ARGS_KEY}.num_drawn_tokens", what, metadata.num_drawn_tokens)
    if metadata.can_fork and metadata.park is None:
        raise InvalidInputError(f"{EXTRA_ARGS_KEY}.can_fork", "a `park` key with it", metadata.can_fork)
    if metadata.tree is not None:
        for name in ("can_fork", "boundary"):
            if getattr(metadata, name):
                raise InvalidInputError(f"{EXTRA_ARGS_KEY}.{name}", "nothing, in a tree", getattr(metadata, name))
        if metadata.park is None:
            raise InvalidInputError(f"{EXTRA_ARGS_KEY}.tree", "a `park` key with it", metadata.tree.path)
        if metadata.num_prior_tokens and not metadata.tree.has_begun:
            what = "true, because of its prior tokens"
            raise InvalidInputError(f"{EXTRA_ARGS_KEY}.tree.has_begun", what, metadata.tree.has_begun)
        metadata.tree.check(f"{EXTRA_ARGS_KEY}.tree")
    if not all(metadata.stop):
        raise InvalidInputError(f"{EXTRA_ARGS_KEY}.stop", "non-empty strings", metadata.stop)
    if (boundary := metadata.boundary) is not None:
        where = f"{EXTRA_ARGS_KEY}.boundary"
        if boundary.every is not None and boundary.every < 1:
            raise InvalidInputError(f"{where}.every", "an integer >= 1", boundary.every)
        if not all(boundary.strings):
            raise InvalidInputError(f"{where}.strings", "non-empty strings", boundary.strings)
    KvPolicy.parse(metadata.kv_policy, f"{EXTRA_ARGS_KEY}.kv_policy")
    for name, high in (("target_groups", MAX_TARGET_GROUPS), ("group_size", MAX_GROUP_SIZE)):
        number = getattr(metadata, name)
        if not 1 <= number <= high:
            raise InvalidInputError(f"{EXTRA_ARGS_KEY}.{name}", f"an integer in [1, {high}]", number)
    if not 0 <= metadata.index < metadata.group_size:
        raise InvalidInputError(f"{EXTRA_ARGS_KEY}.index", f"an integer in [0, {metadata.group_size})", metadata.index)
    return metadata


def metadata_of(extra_args: Mapping[str, Any] | None) -> RolloutMetadata | None:
    """The metadata in a request's `extra_args`, or `None` when it takes part in no round.

    Raises:
        InvalidInputError: it is there and wrong.

    """
    if not extra_args or (value := extra_args.get(EXTRA_ARGS_KEY)) is None:
        return None
    return parse_metadata(value)


def _named_error(error: msgspec.ValidationError, value: Mapping[str, Any]) -> InvalidInputError:
    """Turn msgspec's message into ours, with the field that it names and the value found there."""
    message = str(error)
    match = _JSON_PATH.search(message)
    path = match["path"] if match else ""
    expected = (message[: match.start()] if match else message).removeprefix("Expected ")
    field = f"{EXTRA_ARGS_KEY}.{path}" if path else EXTRA_ARGS_KEY
    return InvalidInputError(field, expected, value.get(path, dict(value)) if path else dict(value))
