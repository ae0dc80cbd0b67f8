"""Grows trees in a running scheduler: members of a tree that wait to be born, and how they are.

All members of a tree are submitted at once. Those that begin at the prompt run; the others are *unborn*: vLLM does not
know of them, until `TreePolicy` says whose branch they are. Then the tokens of that path become their output, its KV is
parked under their key, and they are requests like any other, first in line. A path that goes on at its boundary is
never stopped; in a synchronous tree it is preempted with its KV parked until the level is complete.

A tree begins when the pool has room for it as it is planned, or when no other tree runs. The KV of paths that ended
stays readable as long as members are unborn; it counts as free, and goes when nothing else does.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.member_requests import inherit
from longtail.scheduler.metadata import EXTRA_ARGS_KEY
from longtail.scheduler.path_values import PathValues, values_of
from longtail.scheduler.tree_place import BirthReport
from longtail.scheduler.tree_policy import Birth, PathFigures, TreePolicy, TreeSpec, TreeStep

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput

    from longtail.scheduler.member import Member
    from longtail.scheduler.metadata import RolloutMetadata
    from longtail.scheduler.rollout_scheduler import RolloutMixin
    from longtail.scheduler.tree_place import TreePlace


@dataclass(slots=True)
class _Path:
    """A member of a tree; `num_segments` of its boundaries were noticed."""

    member: Member
    metadata: RolloutMetadata
    place: TreePlace
    values: PathValues
    num_segments: int


@dataclass(slots=True)
class _EndedPath:
    """What branches of a path that ended need; `park` is the key of its KV."""

    token_ids: Sequence[int]
    values: PathValues
    park: str | None = None


@dataclass(slots=True)
class _Tree:
    """One tree.

    `paths` are its members that have not ended; `num_missing` have not arrived. `policy` is there once it has begun,
    `ended` also has paths of earlier rounds, and `num_kv_tokens` is what it is planned to need of the pool.
    """

    spec: TreeSpec
    key: tuple[str, str]
    num_missing: int
    num_kv_tokens: int
    paths: dict[int, _Path] = field(default_factory=dict)
    ended: dict[int, _EndedPath] = field(default_factory=dict)
    earlier: dict[int, tuple[int, bool]] = field(default_factory=dict)
    policy: TreePolicy | None = None


class Trees:
    """The trees of one scheduler. False while there is none."""

    def __init__(self, scheduler: RolloutMixin) -> None:
        self._scheduler = scheduler
        self._trees: dict[tuple[str, str], _Tree] = {}
        self._tree_of: dict[str, tuple[_Tree, int]] = {}
        #: All members are there, and the pool has no room.
        self._queue: deque[_Tree] = deque()
        self._num_planned_tokens = 0

    def __bool__(self) -> bool:
        return bool(self._trees)

    # ---- members -----------------------------------------------------------------------------------------------

    def check(self, metadata: RolloutMetadata) -> None:
        """Check a member that arrives against its tree.

        Raises:
            InvalidInputError: names the field.

        """
        place, tree = metadata.tree, self._trees.get((metadata.round, metadata.group))
        if tree is None:
            return
        if place is None or place.spec != tree.spec:
            what = f"{tree.spec}, as the other members of group {metadata.group!r} say"
            raise InvalidInputError(f"{EXTRA_ARGS_KEY}.tree.spec", what, None if place is None else place.spec)
        if tree.policy is not None or place.path in tree.paths:
            what = "a path that has not arrived yet, of a tree that has not begun"
            raise InvalidInputError(f"{EXTRA_ARGS_KEY}.tree.path", what, place.path)

    def arrive(self, member: Member, metadata: RolloutMetadata) -> None:
        """A member of a tree is there; the tree begins with the last one."""
        place = metadata.tree
        assert place is not None
        spec, key = place.spec, (metadata.round, metadata.group)
        if (tree := self._trees.get(key)) is None:
            planned = spec.num_planned_tokens(member.request.num_prompt_tokens)
            tree = self._trees[key] = _Tree(spec, key, metadata.group_size, planned)
        num_tokens = member.request.num_output_tokens
        values = PathValues(spec.segment_tokens, place.sums, num_tokens)
        tree.paths[place.path] = _Path(member, metadata, place, values, num_tokens // spec.segment_tokens)
        for one in place.ended:
            num_tokens = len(one.token_ids)
            tree.earlier[one.path] = num_tokens, one.by_itself
            values = PathValues(spec.segment_tokens, one.sums, num_tokens)
            tree.ended[one.path] = _EndedPath(one.token_ids, values, one.park)
        self._tree_of[member.request.request_id] = tree, place.path
        tree.num_missing -= 1
        if not tree.num_missing:
            self._queue.append(tree)
            self._begin_queued()

    def unborn(self, request_ids: Iterable[str] | None) -> list[str]:
        """Those of the requests, or all requests, that vLLM does not know of."""
        request_ids = self._tree_of if request_ids is None else request_ids
        known = self._scheduler.requests
        return [one for one in request_ids if one in self._tree_of and one not in known]

    def keeps(self, member: Member) -> bool:
        """Whether a member that is unborn may need the KV of this one, which ends by itself."""
        tree, _ = self._tree_of.get(member.request.request_id, (None, 0))
        return tree is not None and tree.policy is not None and tree.policy.num_unborn > 0

    # ---- what happens ------------------------------------------------------------------------------------------

    def grow(self, output: EngineCoreOutput) -> None:
        """A request has tokens of this step, and has not ended."""
        if (found := self._tree_of.get(output.request_id)) is not None:
            tree, index = found
            path = tree.paths[index]
            _note(tree, path, output)
            self._ask(tree, index, path, path.member.request.num_output_tokens)

    def end(self, member: Member, output: EngineCoreOutput | None, *, by_itself: bool) -> None:
        """A member has ended, with the tokens of `output` if there are any: others may begin now."""
        if (found := self._tree_of.pop(member.request.request_id, None)) is None:
            return
        tree, index = found
        path, policy = tree.paths.pop(index), tree.policy
        if policy is not None and member.is_unborn:
            policy.drop(index)
        elif policy is not None:
            if output is not None:
                _note(tree, path, output)
            token_ids = member.request.output_token_ids
            tree.ended[index] = _EndedPath(array("i", token_ids), path.values, member.park)
            if not tree.spec.synchronous:
                # Its end is no boundary.
                self._ask(tree, index, path, len(token_ids) - 1)
            self._do(tree, policy.end(index, PathFigures(num_tokens=len(token_ids)), by_itself=by_itself))
        self._forget_if_over(tree)

    def cut(self, member: Member) -> None:
        """A member is gone because its round is over: nobody begins in its place.

        What paths that ended have stays parked: the tree may go on in another round.
        """
        if (found := self._tree_of.pop(member.request.request_id, None)) is not None:
            tree, index = found
            del tree.paths[index]
            self._forget_if_over(tree)

    # ---- its beginning and its end -----------------------------------------------------------------------------

    def _begin_queued(self) -> None:
        """Let trees begin for which the pool has room, or one if none runs."""
        scheduler = self._scheduler
        num_room = scheduler.kv_cache_manager.block_pool.num_gpu_blocks * scheduler.block_size
        while self._queue:
            planned = self._num_planned_tokens + self._queue[0].num_kv_tokens
            if self._num_planned_tokens and planned > num_room:
                return
            self._num_planned_tokens = planned
            self._begin(self._queue.popleft())

    def _begin(self, tree: _Tree) -> None:
        begun = {
            index: replace(path.values.figures(path.num_segments), num_tokens=path.member.request.num_output_tokens)
            for index, path in tree.paths.items()
            if path.place.has_begun
        }
        seed = next(iter(tree.paths.values())).place.seed
        policy = tree.policy = TreePolicy(tree.spec, seed, begun, tree.earlier)
        for index in set(range(tree.spec.width)) - tree.paths.keys() - tree.earlier.keys():
            # It ended before the tree began.
            tree.ended[index] = _EndedPath((), PathValues(tree.spec.segment_tokens))
            policy.drop(index)
        step = policy.begin()
        for index in step.going_on:
            member = tree.paths[index].member
            if member.is_unborn:
                member.begin(None)
            self._scheduler.start(member)
        self._do(tree, replace(step, going_on=[]))

    def _forget_if_over(self, tree: _Tree) -> None:
        if tree.paths:
            return
        del self._trees[tree.key]
        if tree.policy is not None:
            self._num_planned_tokens -= tree.num_kv_tokens
        elif tree in self._queue:
            self._queue.remove(tree)
        self._begin_queued()

    def _forget_ended(self, tree: _Tree) -> None:
        self._scheduler._kv.forget([one.park for one in tree.ended.values() if one.park is not None])

    # ---- boundaries --------------------------------------------------------------------------------------------

    def _ask(self, tree: _Tree, index: int, path: _Path, num_tokens: int) -> None:
        """Tell the policy of the boundaries that a path has passed, unless it waits for others at one."""
        policy = tree.policy
        assert policy is not None
        while path.num_segments < num_tokens // tree.spec.segment_tokens and not policy.is_waiting(index):
            path.num_segments += 1
            self._do(tree, policy.reach(index, path.values.figures(path.num_segments)), index)

    def _do(self, tree: _Tree, step: TreeStep, asked: int | None = None) -> None:
        """Do what the policy says; `asked` is the path that it was told of, if that is at a boundary."""
        policy = tree.policy
        assert policy is not None
        if asked is not None and asked not in step.going_on:
            self._hold(tree.paths[asked].member)
        first = [self._bear(tree, birth).request for birth in step.births]
        if first:
            self._scheduler.waiting.remove_requests(first)
        resumed = [(index, tree.paths[index]) for index in step.going_on if index != asked]
        first += [path.member.request for _, path in resumed]
        for request in reversed(first):
            self._scheduler.waiting.prepend_request(request)
        for index in step.dismissed:
            member = tree.paths.pop(index).member
            del self._tree_of[member.request.request_id]
            self._scheduler.dismiss(member)
        if not policy.num_unborn:
            self._forget_ended(tree)
        for index, path in resumed:
            self._ask(tree, index, path, path.member.request.num_output_tokens)

    def _bear(self, tree: _Tree, birth: Birth) -> Member:
        """A member begins as a branch."""
        scheduler, kv = self._scheduler, self._scheduler._kv
        child, parent = tree.paths[birth.child], tree.paths.get(birth.parent)
        member, request = child.member, child.member.request
        assert member.park is not None
        # The last token goes through the model again: what is sampled after it is its own.
        num_kv_tokens = request.num_prompt_tokens + birth.at - 1
        token_ids: Sequence[int]
        if parent is not None:
            token_ids, values = parent.member.request.output_token_ids[: birth.at], parent.values
            kv.share(member.park, parent.member, num_kv_tokens)
        else:
            ended = tree.ended[birth.parent]
            token_ids, values = ended.token_ids[: birth.at], ended.values
            if ended.park is not None:
                kv.copy(member.park, ended.park, num_kv_tokens)
        child.num_segments = birth.at // tree.spec.segment_tokens
        child.values = values.upto(child.num_segments)
        inherit(request, child.metadata, list(token_ids))
        member.begin(BirthReport(parent=birth.parent, at=birth.at, reason=birth.reason, probability=birth.probability))
        scheduler.start(member)
        return member

    def _hold(self, member: Member) -> None:
        """Stop a path that waits for others, and keep its KV. A token that is on its way is still delivered."""
        scheduler, request = self._scheduler, member.request
        if request.status is RequestStatus.RUNNING:
            scheduler._kv.park(member)
            scheduler.running.remove(request)
            scheduler._preempt_request(request, time.monotonic())
            # Nobody took its KV.
            request.num_preemptions -= 1
            scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        scheduler.waiting.remove_requests([request])


def _note(tree: _Tree, path: _Path, output: EngineCoreOutput) -> None:
    """Take in what the tree splits by."""
    if tree.spec.split != "uniform" and output.new_token_ids:
        assert output.new_logprobs is not None
        rows = output.new_logprobs.logprobs[: len(output.new_token_ids)]
        path.values.extend(values_of(tree.spec.split, rows))
