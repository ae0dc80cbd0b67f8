"""Parks the KV of requests in vLLM's block pool, and gives it as a prefix-cache hit to whoever goes on from it.

Parking uses `BlockPool.unpin_blocks`: the blocks stay readable, count as free, and the pool says when it hands one out.
Taking up again uses what vLLM does with a prefix-cache hit that ends inside a block: the hit is offered when the
request is scheduled, not before, so a request that waits holds nothing; the tail block is copied on write. It needs
no hash and works with prefix caching off. A branch is the same: the KV of a running request is parked for it while the
request goes on, which only writes to positions that the branch does not read.

`PrefixCacheGate` keeps KV of mixed weight versions out of the prefix cache.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from longtail.scheduler.kv_policy import KvPolicy, KvVersions
from longtail.scheduler.parked_queue import ParkedLastQueue
from longtail.scheduler.parking import Parked, ParkingLot

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


def cannot_park(scheduler: Scheduler) -> str | None:
    """Why KV can't be parked in this engine, or `None` if it can."""
    if scheduler.connector is not None:
        return "a KV connector may write to blocks after their request ended"
    if scheduler.use_eagle:
        return "an EAGLE-like drafter needs the hidden states of the last block"
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    for manager in managers:
        if type(manager) is not FullAttentionManager:
            return f"only full attention can be parked, and the model has {type(manager).__name__}"
        if manager.dcp_world_size * manager.pcp_world_size > 1:
            return "context parallelism"
    return None


class KvParking:
    """The parked KV of one scheduler, for which `cannot_park` said `None`."""

    def __init__(self, scheduler: Scheduler) -> None:
        manager = scheduler.kv_cache_manager
        self._create_blocks = manager.create_kv_cache_blocks
        self._managers: Sequence[Any] = manager.coordinator.single_type_managers
        self._pool = manager.block_pool
        self.lot = ParkingLot([one.block_size for one in self._managers])
        self._pool.free_block_queue = ParkedLastQueue(self._pool.free_block_queue, self.lot.owns)
        if not manager.enable_caching:
            # vLLM then refuses hits and publishes nothing, by one flag: ours are hits, and still nothing is published.
            for one in self._managers:
                one.enable_caching = True
            manager.coordinator.cache_blocks = _cache_nothing  # type: ignore[method-assign]

    def park(self, key: str, request: Request, num_tokens: int, versions: KvVersions, policy: KvPolicy) -> None:
        """Take the blocks of a request that is about to be finished; its KV is valid for `[0, num_tokens)`."""
        kept: list[list[KVCacheBlock]] = []
        for manager in self._managers:
            blocks = manager.pop_blocks_for_free(request.request_id)
            num_kept = -(-num_tokens // manager.block_size)
            self._pool.free_blocks(reversed(blocks[num_kept:]))
            kept.append(blocks[:num_kept])
        self._enter(key, request, kept, num_tokens, versions, policy)

    def share(self, key: str, request: Request, num_tokens: int, versions: KvVersions, policy: KvPolicy) -> None:
        """Park what a request has for `[0, num_tokens)` without taking it from the request."""
        shared: list[list[KVCacheBlock]] = []
        for manager in self._managers:
            blocks = manager.req_to_blocks[request.request_id][: -(-num_tokens // manager.block_size)]
            self._pool.touch(blocks)
            shared.append(blocks)
        self._enter(key, request, shared, num_tokens, versions, policy)

    def copy(self, key: str, source: str, num_tokens: int) -> int:
        """Park under `key` too what is parked under `source`, for at most `num_tokens`; for how many there is KV."""
        parked = self.lot.get(source)
        if parked is None or num_tokens <= 0:
            return 0
        entry = parked.cut_to(num_tokens, [manager.block_size for manager in self._managers])
        self._release(self.lot.park(key, entry))
        return entry.num_tokens

    def _enter(
        self,
        key: str,
        request: Request,
        groups: Sequence[Sequence[KVCacheBlock]],
        num_tokens: int,
        versions: KvVersions,
        policy: KvPolicy,
    ) -> None:
        """Take blocks in, by group, to which a reference is held: it is given up."""
        parked = Parked(
            num_tokens=num_tokens,
            token_ids=array("i", request._all_token_ids[:num_tokens]),
            block_ids=tuple(tuple(block.block_id for block in blocks) for blocks in groups),
            versions=versions.upto(num_tokens),
            policy=policy,
        )
        self._release(self.lot.park(key, parked))
        for blocks in groups:
            # The tail first: what the pool takes back from a sequence is its end.
            self._pool.unpin_blocks(reversed(blocks), self._lose)

    def hit(self, key: str, request: Request) -> tuple[KVCacheBlocks, int] | None:
        """The blocks that are parked under `key` for all tokens of a request but the last; they stay until `forget`.

        What is parked there of another sequence is forgotten.
        """
        parked = self.lot.get(key)
        if parked is not None and not parked.fits(request._all_token_ids):
            self.forget([key])
            return None
        if parked is None or (num_tokens := self._fitting(min(parked.num_tokens, request.num_tokens - 1))) <= 0:
            return None
        groups = tuple(
            [self._pool.blocks[block_id] for block_id in block_ids[: -(-num_tokens // manager.block_size)]]
            for manager, block_ids in zip(self._managers, parked.block_ids, strict=True)
        )
        return self._create_blocks(groups), num_tokens

    def _fitting(self, num_tokens: int) -> int:
        """`num_tokens`, or whole blocks where the pool has no room for the copy of one that is not full."""
        sizes = [manager.block_size for manager in self._managers]
        num_blocks = sum(-(-num_tokens // size) + (num_tokens % size > 0) for size in sizes)
        if num_blocks < self._pool.num_gpu_blocks:  # one is vLLM's null block
            return num_tokens
        return num_tokens // math.lcm(*sizes) * math.lcm(*sizes)

    def forget(self, keys: Iterable[str]) -> None:
        """Nothing is parked under these keys any more; the pool takes blocks first that nobody uses now."""
        for key in keys:
            self._release(self.lot.remove(key))

    def _release(self, block_ids: Iterable[int]) -> None:
        free = []
        for block_id in block_ids:
            self._pool._reuse_watchers.pop(block_id, None)
            block = self._pool.blocks[block_id]
            if block.ref_cnt == 0:
                self._pool.free_block_queue.remove(block)
                free.append(block)
        self._pool.free_block_queue.prepend_n(free)

    def _lose(self, block: KVCacheBlock) -> None:
        self.lot.lose(block.block_id)


class PrefixCacheGate:
    """Keeps the blocks of chosen requests out of the prefix cache, and all blocks of older weights if asked to.

    Installed when the weights change for the first time: before, it costs nothing.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._pool = scheduler.kv_cache_manager.block_pool
        coordinator = scheduler.kv_cache_manager.coordinator
        self._block_size = coordinator.single_type_managers[0].block_size
        self._closed: set[str] = set()
        #: Published hashes that are older than the weights, with their version, by `id`: a block that is filled and
        #: published again gets a hash that is equal and another object.
        self._older: dict[int, tuple[Any, int]] = {}
        self._cache_blocks = coordinator.cache_blocks
        coordinator.cache_blocks = self._cache_unless_closed  # type: ignore[method-assign]

    def close(self, request_ids: Iterable[str]) -> None:
        """The requests' KV is of more than one version from now on."""
        self._closed.update(request_ids)

    def open(self, request_ids: Iterable[str]) -> None:
        """The requests ended, or lost their KV."""
        self._closed.difference_update(request_ids)

    def withdraw_all(self) -> None:
        """No request finds any block that is in the prefix cache now."""
        hashed = {block.block_id for block in self._pool.blocks if block.block_hash is not None}
        self._pool.evict_blocks(hashed | set(self._pool.cached_block_hashes_by_block))

    def remember_versions(self, version: int) -> None:
        """The weights change from `version`, and what is published now may still be hit."""
        published = (block.block_hash for block in self._pool.blocks if block.block_hash is not None)
        self._older = {id(one): self._older.get(id(one), (one, version)) for one in published}

    @property
    def has_older_blocks(self) -> bool:
        """Whether a prefix-cache hit may be on KV of older weights."""
        return bool(self._older)

    def versions_of(self, hit: KVCacheBlocks, num_tokens: int, current: int) -> KvVersions | None:
        """Versions of a prefix-cache hit, or `None` if all of it is current."""
        if not self._older:
            return None
        versions = KvVersions([])
        block_size = self._block_size
        for index, block in enumerate(hit.blocks[0][: -(-num_tokens // block_size)]):
            _, version = self._older.get(id(block.block_hash), (None, current))
            versions.extend(index * block_size, version)
        return versions if versions.all - {current} else None

    def _cache_unless_closed(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if request.request_id not in self._closed:
            self._cache_blocks(request, *args, **kwargs)


def _cache_nothing(request: Request, num_computed_tokens: int) -> None:
    """`KVCacheCoordinator.cache_blocks` with prefix caching off."""
