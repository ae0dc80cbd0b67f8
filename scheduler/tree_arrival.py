"""A tree as its members arrive: what the scheduler holds of it, and what is checked of each before it is enqueued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.metadata import EXTRA_ARGS_KEY
from longtail.scheduler.path_values import PathValues

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from longtail.scheduler.member import Member
    from longtail.scheduler.metadata import RolloutMetadata
    from longtail.scheduler.tree_place import TreePlace
    from longtail.scheduler.tree_policy import TreePolicy, TreeSpec

_TREE = f"{EXTRA_ARGS_KEY}.tree"


@dataclass(slots=True)
class LivePath:
    """A member of a tree that has not ended; `num_segments` of its boundaries were noticed."""

    member: Member
    metadata: RolloutMetadata
    place: TreePlace
    values: PathValues
    num_segments: int


@dataclass(slots=True)
class PastPath:
    """What branches of a path that ended need; `park` is the key of its KV."""

    token_ids: Sequence[int]
    values: PathValues
    park: str | None = None


@dataclass(slots=True)
class Tree:
    """One tree of a scheduler.

    Attributes:
        spec, seed, kv_policy: of the first member that arrived; the others say the same.
        request: its own; the others have the same prompt and budget.
        key: round and group.
        num_missing: members that have not arrived.
        num_kv_tokens: what it is planned to need of the pool.
        live: members that have not ended, by path, begun or not.
        past: paths inside of which members may be born, as long as there are any to be born.
        earlier: of those that ended in earlier rounds, the number of tokens, and whether it was by themselves.
        gone: paths whose members were ended before the tree began.
        policy: there once it has begun.
        is_grown: nobody is left to be born.

    """

    spec: TreeSpec
    seed: int
    kv_policy: str
    request: Request
    key: tuple[str, str]
    num_missing: int
    num_kv_tokens: int
    live: dict[int, LivePath] = field(default_factory=dict)
    past: dict[int, PastPath] = field(default_factory=dict)
    earlier: dict[int, tuple[int, bool]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    policy: TreePolicy | None = None
    is_grown: bool = False

    @staticmethod
    def of(member: Member, metadata: RolloutMetadata, place: TreePlace) -> Tree:
        """The tree that a member is the first of."""
        request, key = member.request, (metadata.round, metadata.group)
        num_kv_tokens = place.spec.num_planned_tokens(request.num_prompt_tokens, request.max_tokens)
        return Tree(place.spec, place.seed, metadata.kv_policy, request, key, metadata.group_size, num_kv_tokens)

    def arrive(self, member: Member, metadata: RolloutMetadata, place: TreePlace) -> None:
        """A checked member is there."""
        size, num_tokens = self.spec.segment_tokens, member.request.num_output_tokens
        values = PathValues(size, place.sums, num_tokens)
        self.live[place.path] = LivePath(member, metadata, place, values, num_tokens // size)
        for one in place.ended:
            num_tokens = len(one.token_ids)
            self.earlier[one.path] = num_tokens, one.by_itself
            self.past[one.path] = PastPath(one.token_ids, PathValues(size, one.sums, num_tokens), one.park)
        self.num_missing -= 1

    @property
    def unknown(self) -> list[int]:
        """Paths of which no member has said anything."""
        return [path for path in range(self.spec.width) if not self.knows(path)]

    def knows(self, path: int) -> bool:
        """Whether a path has arrived, or ended in an earlier round."""
        return path in self.live or path in self.earlier or path in self.gone


def check_member(
    metadata: RolloutMetadata, request: Request, tree: Tree | None, *, is_known: bool, vocab_size: int, max_len: int
) -> None:
    """Check a member that arrives against its tree.

    Args:
        metadata: of it.
        request: its own, with prior tokens at the end of the prompt.
        tree: that of its group, if one is there.
        is_known: its group has, or had, other members.
        vocab_size: of the model.
        max_len: tokens that a request may have, prompt included.

    Raises:
        InvalidInputError: names the field.

    """
    place = metadata.tree
    if place is None:
        if tree is not None:
            raise InvalidInputError(_TREE, "a place in the tree that the other members are of", None)
        return
    if tree is None and is_known:
        raise InvalidInputError(_TREE, "nothing, in a group that began without a tree, or whose tree is over", place)
    num_paths = metadata.group_size + len(place.ended)
    if num_paths > place.spec.width:
        what = f"at most {place.spec.width} members and paths that ended, the width of the tree"
        raise InvalidInputError(f"{EXTRA_ARGS_KEY}.group_size", what, num_paths)
    assert request.sampling_params is not None
    if request.sampling_params.stop:
        what = f"nothing, in a tree; its stop strings are `{EXTRA_ARGS_KEY}.stop`"
        raise InvalidInputError("stop", what, request.sampling_params.stop)
    _check_ended(place, request, vocab_size, max_len - _num_prompt(metadata, request))
    if tree is not None:
        _check_against(tree, place, metadata, request)


def _check_ended(place: TreePlace, request: Request, vocab_size: int, num_left: int) -> None:
    num_tokens = min(request.max_tokens, num_left)
    for index, one in enumerate(place.ended):
        field = f"{_TREE}.ended[{index}].token_ids"
        if len(one.token_ids) > num_tokens:
            raise InvalidInputError(field, f"at most {num_tokens} tokens, its budget", len(one.token_ids))
        for token_id in (min(one.token_ids, default=0), max(one.token_ids, default=0)):
            if not 0 <= token_id < vocab_size:
                raise InvalidInputError(field, f"integers in [0, {vocab_size})", token_id)


def _check_against(tree: Tree, place: TreePlace, metadata: RolloutMetadata, request: Request) -> None:
    if tree.policy is not None:
        raise InvalidInputError(_TREE, "a tree that has not begun", place.path)
    others = f"as the other members of group {metadata.group!r} say"
    if place.spec != tree.spec:
        raise InvalidInputError(f"{_TREE}.spec", f"{tree.spec}, {others}", place.spec)
    if place.seed != tree.seed:
        raise InvalidInputError(f"{_TREE}.seed", f"{tree.seed}, {others}", place.seed)
    if metadata.kv_policy != tree.kv_policy:
        raise InvalidInputError(f"{EXTRA_ARGS_KEY}.kv_policy", f"{tree.kv_policy}, {others}", metadata.kv_policy)
    for name, path in place.paths():
        if tree.knows(path):
            raise InvalidInputError(f"{_TREE}.{name}", "a path that has not arrived yet", path)
    assert request.prompt_token_ids is not None
    if request.prompt_token_ids[: _num_prompt(metadata, request)] != tree.request.prompt_token_ids:
        raise InvalidInputError("prompt", f"the prompt of the other members of group {metadata.group!r}", "another one")
    for name in ("max_tokens", "lora_request", "cache_salt"):
        value, expected = getattr(request, name), getattr(tree.request, name)
        if value != expected:
            raise InvalidInputError(name, f"{expected}, {others}", value)


def _num_prompt(metadata: RolloutMetadata, request: Request) -> int:
    return request.num_prompt_tokens - metadata.num_prior_tokens
