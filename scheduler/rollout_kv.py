"""The KV of a scheduler's requests across cuts and weight changes: parked, taken up again, kept or computed again.

`RolloutMixin` asks it when a member is about to run, is cut, or when the weights change. Nothing is set up before it
is needed: an engine that never parks and never changes its weights has vLLM's own queue and prefix cache.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from longtail.scheduler.kv_parking import KvParking, PrefixCacheGate, cannot_park
from longtail.scheduler.kv_policy import KvPolicy, KvVersions

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

    from longtail.scheduler.member import Member
    from longtail.scheduler.rollout_scheduler import RolloutMixin

    #: As `Scheduler._get_local_prefix_cache_hit` answers: blocks, number of tokens, and two things for hybrid models.
    Hit = tuple[KVCacheBlocks, int, int, bool]


class RolloutKv:
    """See the module. `version` is the weights' version that the scheduler was told last."""

    def __init__(self, scheduler: RolloutMixin) -> None:
        self._scheduler = scheduler
        self._parking: KvParking | None = None
        self._gate: PrefixCacheGate | None = None
        self._chosen: dict[str, tuple[str | None, KvVersions | None]] = {}
        #: Versions of older weights in the KV of requests that are no members.
        self._older: dict[str, set[int]] = {}
        self.version = 0
        self.refusal = cannot_park(scheduler)

    @property
    def has_own_hits(self) -> bool:
        """Whether `choose` could say anything else than the prefix cache."""
        has_parked = self._parking is not None and len(self._parking.lot) > 0
        return has_parked or bool(self._chosen) or (self._gate is not None and self._gate.has_older_blocks)

    def choose(self, request: Request, member: Member | None, hit: Hit) -> Hit:
        """The KV that a request begins with if it is scheduled now: what the prefix cache has, or what is parked."""
        versions = None if self._gate is None else self._gate.versions_of(hit[0], hit[1], self.version)
        if versions is not None and (request.num_preemptions or (member is not None and member.frontier)):
            # Old weights' blocks are for new requests, if at all: this one had KV, which its policy gave up.
            hit, versions = (self._scheduler.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False), None
        key = None if member is None else member.park
        parked = None if key is None or self._parking is None else self._parking.hit(key, request)
        if parked is not None and parked[1] >= hit[1]:
            assert self._parking is not None
            assert key is not None
            hit, versions = (*parked, 0, False), self._parking.lot[key].versions.upto(parked[1])
        else:
            key = None
        if self._gate is not None:
            # Before it is scheduled: a block that it fills in its first step would be published in the same call.
            is_older = versions is not None and versions.all != {self.version}
            (self._gate.close if is_older else self._gate.open)([request.request_id])
        if member is not None:
            self._chosen[request.request_id] = (key, versions)
        elif versions is not None:
            self._older[request.request_id] = versions.all
        else:
            self._older.pop(request.request_id, None)
        return hit

    def enter_batch(self, member: Member, start: int, now: float) -> None:
        """A member joins the batch with KV for `[0, start)`, which `choose` chose if it was asked."""
        key, versions = self._chosen.pop(member.request.request_id, (None, None))
        if member.park is not None:
            self.forget([member.park])
        member.enter_batch(start, versions, self.version, now, was_parked=key is not None)

    def park(self, member: Member) -> None:
        """Keep the KV of a running member that is about to be stopped, if its cut says so and there is any."""
        if member.park is None or member.start is None or self.refusal is not None:
            return
        num_tokens = member.num_valid
        if num_tokens == 0 or member.kv is None:
            return
        self._lot_opened().park(member.park, member.request, num_tokens, member.kv, member.kv_policy)

    def share(self, key: str, member: Member, num_tokens: int) -> int:
        """Park under `key` what a live member has for at most `num_tokens`; returns for how many there is KV."""
        if member.start is None or member.kv is None:
            # It waits: what is parked for it, if it was cut, is for its branches too.
            return 0 if member.park is None else self.copy(key, member.park, num_tokens)
        num_tokens = min(num_tokens, member.num_valid)
        if num_tokens <= 0:
            return 0
        self._lot_opened().share(key, member.request, num_tokens, member.kv, member.kv_policy)
        return num_tokens

    def copy(self, key: str, source: str, num_tokens: int) -> int:
        """Park under `key` too what is parked under `source`; see `KvParking.copy`."""
        return 0 if self._parking is None else self._parking.copy(key, source, num_tokens)

    def _lot_opened(self) -> KvParking:
        if self._parking is None:
            self._parking = KvParking(self._scheduler)
        return self._parking

    def forget(self, keys: Iterable[str]) -> None:
        """Give up what is parked under these keys."""
        if self._parking is not None:
            self._parking.forget(keys)

    def end(self, request_ids: Collection[str]) -> None:
        """These requests left, or lost their KV."""
        for request_id in request_ids:
            self._chosen.pop(request_id, None)
            self._older.pop(request_id, None)
        if self._gate is not None:
            self._gate.open(request_ids)

    def change_weights(self, version: int, members: Mapping[str, Member], others: KvPolicy, share_prefix: bool) -> None:
        """The model has new weights from the next step on.

        Running members follow their policy, other requests `others`. What must not be kept is preempted, so that its
        KV is computed again. With `share_prefix` new requests may still hit blocks of older weights.
        """
        scheduler = self._scheduler
        if self._gate is None:
            self._gate = PrefixCacheGate(scheduler)
        if self._parking is not None:
            self._parking.forget(self._parking.lot.outdated(version))
        if share_prefix:
            self._gate.remember_versions(self.version)
        keep: list[Request] = []
        preempt: list[Request] = []
        for request in scheduler.running:
            member = members.get(request.request_id)
            policy = others if member is None else member.kv_policy
            if member is None:
                versions = self._older.get(request.request_id, set()) | {self.version}
            else:
                versions = {self.version} if member.kv is None else member.kv.all
            (keep if policy.keeps(versions, version) else preempt).append(request)
        scheduler.running = keep
        now = time.monotonic()
        # Last first: each is put in front of the waiting ones.
        for request in reversed(preempt):
            if (member := members.get(request.request_id)) is not None:
                member.num_renewals += 1
            scheduler._preempt_request(request, now, drop_stale_output=True)
            scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        if not share_prefix:
            self._gate.withdraw_all()
        before, self.version = self.version, version
        self._gate.close(request.request_id for request in keep)
        for request in keep:
            if (member := members.get(request.request_id)) is None:
                self._older.setdefault(request.request_id, set()).add(before)
            else:
                member.change_weights(version)

    def counters(self) -> dict[str, Any]:
        """Plain numbers for the front end."""
        lot = None if self._parking is None else self._parking.lot
        return {
            "weight_version": self.version,
            "parked_trajectories": 0 if lot is None else len(lot),
            "parked_tokens": 0 if lot is None else lot.num_tokens,
            "parked_total": 0 if lot is None else lot.num_parked_total,
            "parked_lost_tokens": 0 if lot is None else lot.num_lost_tokens,
            "cannot_park": self.refusal or "",
        }
