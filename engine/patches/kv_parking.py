"""What the scheduler's parking and weight versions lean on: the sources that they were written against.

No class of vLLM is changed. `longtail.scheduler.kv_parking` replaces three things in the objects of one engine, at its
first park or weight change: the pool's queue of free blocks (parked ones go last), the coordinator's `cache_blocks`
(KV of mixed versions is not published) and, where prefix caching is off, the managers' `enable_caching` (parked blocks
are taken up as prefix-cache hits).
"""

from __future__ import annotations

from longtail.engine.patches.entry import Entry, Source

_COORDINATOR = "vllm.v1.core.kv_cache_coordinator"
_UTILS = "vllm.v1.core.kv_cache_utils"
_POOL = "vllm.v1.core.block_pool"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager"
_SCHEDULER = "vllm.v1.core.sched.scheduler"

ENTRY = Entry(
    name="kv-parking",
    what="The KV of cut members stays readable in the pool, and is taken up again as a prefix-cache hit.",
    why="A client that aborts and submits again loses KV that nobody else needs.",
    upstream=(),
    versions=("0.32.0",),
    where="everywhere",
    changes=(),
    relies_on=tuple(
        Source(module, name, fingerprint)
        for module, name, fingerprint in (
            (_POOL, "BlockPool.unpin_blocks", "0504bd2092ad5dc1"),
            (_POOL, "BlockPool.touch", "e835644469bff7fc"),
            (_POOL, "BlockPool.free_blocks", "b4e7973f4052c8e6"),
            (_POOL, "BlockPool.get_new_blocks", "4a7fd7ea20eb8b20"),
            (_POOL, "BlockPool.reset_prefix_cache", "88bba7adebd5cae4"),
            (_POOL, "BlockPool.evict_blocks", "30ff603d1ad4d33e"),
            (_POOL, "BlockPool.cache_full_blocks", "627956ae3c9933c8"),
            (_UTILS, "make_block_hash_with_group_id", "e2faf6ba61833782"),
            (_UTILS, "FreeKVCacheBlockQueue", "607ee0252fcba2b6"),
            ("vllm.v1.core.kv_cache_manager", "KVCacheManager.allocate_slots", "fa8fe3ef9b92bf87"),
            (_COORDINATOR, "KVCacheCoordinator.cache_blocks", "06015355f362c9bb"),
            (_COORDINATOR, "KVCacheCoordinator.allocate_new_computed_blocks", "77d7eeea419d5b5e"),
            (_MANAGER, "SingleTypeKVCacheManager.get_num_blocks_to_allocate", "c1b47b7466664d2d"),
            (_MANAGER, "SingleTypeKVCacheManager.add_local_computed_blocks", "7e09d433ca27c45a"),
            (_MANAGER, "SingleTypeKVCacheManager.allocate_new_blocks", "f1862d4f639aac8f"),
            (_MANAGER, "SingleTypeKVCacheManager.pop_blocks_for_free", "7485ddebdb813efc"),
            (_SCHEDULER, "Scheduler._get_local_prefix_cache_hit", "67c70b761f94aa73"),
            (_SCHEDULER, "Scheduler.schedule", "9bccda83b4fd34af"),
            (_SCHEDULER, "Scheduler.update_from_output", "118a85f8ea703095"),
            (_SCHEDULER, "Scheduler._free_request", "929f84fb248f15ac"),
            (_SCHEDULER, "Scheduler._free_blocks", "102ed5de605b8182"),
            (_SCHEDULER, "Scheduler._preempt_request", "3c74a6f3e8b7d175"),
            (_SCHEDULER, "Scheduler.reset_prefix_cache", "ba071afd425a7c6f"),
        )
    ),
)
