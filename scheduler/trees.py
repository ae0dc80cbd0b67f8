"""Grows trees in a running scheduler: members of a tree that wait to be born, and how they are.

All members of a tree are submitted at once. Those that begin at the prompt run; the others are *unborn*: vLLM does not
know of them, until `TreePolicy` says whose branch they are. Then the tokens of that path become their output, its KV is
parked under their key, and they are requests like any other, in front of those that wait. A path that goes on at its
boundary is never stopped; in a synchronous tree it is preempted with its KV parked until the level is complete.

What happens to members is only noted while it happens: whoever tells of ends, cuts or tokens calls `settle` when all of
them are told, and then others begin or go on. So nobody is born of, or waits for, a path that is about to end in the
same step or abort.

A tree begins when the pool has room for it as it is planned, or when no other tree runs. The KV of paths that ended
stays readable as long as members are unborn; it counts as free, and goes when nothing else does.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.member_requests import inherit
from longtail.scheduler.metadata import EXTRA_ARGS_KEY
from longtail.scheduler.path_values import PathValues, values_of
from longtail.scheduler.tree_arrival import LivePath, PastPath, Tree, check_member
from longtail.scheduler.tree_place import BirthReport
from longtail.scheduler.tree_policy import Birth, TreePolicy, TreeStep

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.request import Request

    from longtail.scheduler.member import Member
    from longtail.scheduler.metadata import RolloutMetadata
    from longtail.scheduler.rollout_scheduler import RolloutMixin


class Trees:
    """The trees of one scheduler. False while there is none."""

    def __init__(self, scheduler: RolloutMixin) -> None:
        self._scheduler = scheduler
        self._trees: dict[tuple[str, str], Tree] = {}
        self._tree_of: dict[str, tuple[Tree, int]] = {}
        #: All members are there, and the pool has no room.
        self._queue: deque[Tree] = deque()
        self._num_planned_tokens = 0
        #: What happened since `settle`: paths that ended (and whether by themselves), paths at boundaries, trees that
        #: lost members.
        self._ended: list[tuple[Tree, int, LivePath, bool]] = []
        self._reached: list[tuple[Tree, int]] = []
        self._changed: dict[tuple[str, str], Tree] = {}

    def __bool__(self) -> bool:
        return bool(self._trees)

    # ---- members -----------------------------------------------------------------------------------------------

    def check(self, metadata: RolloutMetadata, request: Request) -> None:
        """Check a member that arrives against its tree.

        Raises:
            InvalidInputError: names the field.

        """
        if not self._trees and metadata.tree is None:
            return
        model = self._scheduler.vllm_config.model_config
        check_member(
            metadata,
            request,
            self._trees.get((metadata.round, metadata.group)),
            is_known=self._scheduler._book.knows_group(metadata.round, metadata.group),
            vocab_size=model.get_vocab_size(),
            max_len=self._scheduler.max_model_len,
        )

    def arrive(self, member: Member, metadata: RolloutMetadata) -> None:
        """A checked member of a tree is there; the tree begins with the last one."""
        place = metadata.tree
        assert place is not None
        key = metadata.round, metadata.group
        if (tree := self._trees.get(key)) is None:
            tree = self._trees[key] = Tree.of(member, metadata, place)
        tree.arrive(member, metadata, place)
        self._tree_of[member.request.request_id] = tree, place.path
        if tree.num_missing:
            return
        if tree.unknown:
            self._refuse(tree)
            return
        self._queue.append(tree)
        self._begin_queued()

    def _refuse(self, tree: Tree) -> None:
        """A tree can't begin: all are there, and yet paths are missing."""
        what = f"paths that, with those of the {len(tree.live)} members, are all of [0, {tree.spec.width})"
        got = f"nothing of {tree.unknown}"
        error = InvalidInputError(f"{EXTRA_ARGS_KEY}.tree.ended", what, got)
        for path in tree.live.values():
            del self._tree_of[path.member.request.request_id]
            self._scheduler.refuse(path.member, error)
        tree.live.clear()
        self._forget_if_over(tree)

    def unborn(self, request_ids: Iterable[str] | None) -> list[Request]:
        """Those of the requests, or of all requests, that vLLM does not know of."""
        request_ids = self._tree_of if request_ids is None else self._tree_of.keys() & request_ids
        known, members = self._scheduler.requests, self._scheduler._members
        return [members[one].request for one in request_ids if one not in known]

    def keeps(self, member: Member) -> bool:
        """Whether a member that is unborn may need the KV of this one, which ends by itself."""
        tree, _ = self._tree_of.get(member.request.request_id, (None, 0))
        return tree is not None and tree.policy is not None and not tree.is_grown

    # ---- what happens ------------------------------------------------------------------------------------------

    def grow(self, output: EngineCoreOutput) -> None:
        """A request has tokens of this step, and has not ended."""
        tree, index = self._tree_of.get(output.request_id, (None, 0))
        if tree is None or tree.is_grown:
            return
        path = tree.live[index]
        _note(tree, path, output)
        if path.num_segments < path.member.request.num_output_tokens // tree.spec.segment_tokens:
            self._reached.append((tree, index))

    def end(self, member: Member, output: EngineCoreOutput | None, *, by_itself: bool) -> None:
        """A member has ended, with the tokens of `output` if there are any."""
        tree, index = self._tree_of.pop(member.request.request_id, (None, 0))
        if tree is None:
            return
        path = tree.live.pop(index)
        self._changed[tree.key] = tree
        if tree.policy is None:
            tree.gone.add(index)
        elif member.is_unborn:
            tree.policy.drop(index)
        elif not tree.is_grown:
            if output is not None:
                _note(tree, path, output)
            tree.past[index] = PastPath(array("i", member.request.output_token_ids), path.values, member.park)
            self._ended.append((tree, index, path, by_itself))
        elif member.park is not None:
            # It may have been about to go on, and ended with a token that was on its way.
            self._scheduler._kv.forget([member.park])

    def cut(self, member: Member) -> None:
        """A member is gone because its round is over, with all others of its tree.

        What paths that ended have stays parked: the tree may go on in another round.
        """
        tree, index = self._tree_of.pop(member.request.request_id, (None, 0))
        if tree is not None:
            del tree.live[index]
            tree.past.clear()
            self._changed[tree.key] = tree

    def settle(self) -> None:
        """Everything that happened is told: members begin, go on, or are dismissed."""
        ended, self._ended = self._ended, []
        for tree, index, path, by_itself in ended:
            policy, num_tokens = tree.policy, path.member.request.num_output_tokens
            assert policy is not None
            if not tree.spec.synchronous and tree.live:
                # Its end is no boundary.
                self._ask(tree, index, path, num_tokens - 1)
            policy.end(index, num_tokens, by_itself=by_itself)
        reached, self._reached = self._reached, []
        for tree, index in reached:
            path = tree.live[index]
            self._ask(tree, index, path, path.member.request.num_output_tokens)
        changed, self._changed = self._changed, {}
        for tree in changed.values():
            if tree.policy is not None and tree.live:
                self._do(tree, tree.policy.settle())
            self._forget_if_over(tree)
        if changed:
            self._begin_queued()

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
            tree = self._queue.popleft()
            self._begin(tree)
            self._forget_if_over(tree)

    def _begin(self, tree: Tree) -> None:
        begun = {
            index: replace(path.values.figures(path.num_segments), num_tokens=path.member.request.num_output_tokens)
            for index, path in tree.live.items()
            if path.place.has_begun
        }
        policy = tree.policy = TreePolicy(tree.spec, tree.seed, begun, tree.earlier)
        for index in tree.gone:
            tree.past[index] = PastPath((), PathValues(tree.spec.segment_tokens))
            policy.drop(index)
        step = policy.begin()
        for index in step.going_on:
            member = tree.live[index].member
            if member.is_unborn:
                member.begin(None)
            self._scheduler.start(member)
        self._do(tree, replace(step, going_on=[]))

    def _forget_if_over(self, tree: Tree) -> None:
        if tree.live:
            return
        del self._trees[tree.key]
        self._forget_past(tree)
        if tree.policy is not None:
            self._num_planned_tokens -= tree.num_kv_tokens
        elif tree in self._queue:
            self._queue.remove(tree)

    def _forget_past(self, tree: Tree) -> None:
        """Nobody will be born inside of paths that ended."""
        self._scheduler._kv.forget([one.park for one in tree.past.values() if one.park is not None])
        tree.past.clear()

    # ---- boundaries --------------------------------------------------------------------------------------------

    def _ask(self, tree: Tree, index: int, path: LivePath, num_tokens: int) -> None:
        """Tell the policy of the boundaries that a path has passed, unless it waits for others at one."""
        policy = tree.policy
        assert policy is not None
        while path.num_segments < num_tokens // tree.spec.segment_tokens and not policy.is_waiting(index):
            path.num_segments += 1
            self._do(tree, policy.reach(index, path.values.figures(path.num_segments)), index)

    def _do(self, tree: Tree, step: TreeStep, asked: int | None = None) -> None:
        """Do what the policy says; `asked` is the path that it was told of, if that is at a boundary."""
        policy = tree.policy
        assert policy is not None
        if asked is not None and asked not in step.going_on:
            self._hold(tree.live[asked].member)
        first = [self._bear(tree, birth).request for birth in step.births]
        if first:
            self._scheduler.waiting.remove_requests(first)
        resumed = [(index, tree.live[index]) for index in step.going_on if index != asked]
        first += [path.member.request for _, path in resumed]
        for request in reversed(first):
            self._scheduler.waiting.prepend_request(request)
        for index in step.dismissed:
            member = tree.live.pop(index).member
            del self._tree_of[member.request.request_id]
            self._scheduler.dismiss(member)
        if not policy.num_unborn and not tree.is_grown:
            tree.is_grown = True
            self._forget_past(tree)
        for index, path in resumed:
            self._ask(tree, index, path, path.member.request.num_output_tokens)

    def _bear(self, tree: Tree, birth: Birth) -> Member:
        """A member begins as a branch."""
        scheduler, kv = self._scheduler, self._scheduler._kv
        child, parent = tree.live[birth.child], tree.live.get(birth.parent)
        member, request = child.member, child.member.request
        assert member.park is not None
        # The last token goes through the model again: what is sampled after it is its own.
        num_kv_tokens = request.num_prompt_tokens + birth.at - 1
        token_ids: Sequence[int]
        if parent is not None:
            token_ids, values = parent.member.request.output_token_ids[: birth.at], parent.values
            kv.share(member.park, parent.member, num_kv_tokens)
        else:
            ended = tree.past[birth.parent]
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
        scheduler.deferred_waiting.discard(request)


def _note(tree: Tree, path: LivePath, output: EngineCoreOutput) -> None:
    """Take in what the tree splits by."""
    if tree.spec.split != "uniform" and output.new_token_ids:
        assert output.new_logprobs is not None
        rows = output.new_logprobs.logprobs[: len(output.new_token_ids)]
        path.values.extend(values_of(tree.spec.split, rows))
