"""vLLM's queue of free blocks with parked ones last: other traffic takes no parked block while another is free.

`BlockPool.unpin_blocks` puts a parked block behind the blocks that are free now; blocks that are freed later come
behind it. Requests that come and go would so push parked rollouts out of a pool that has room. Here a boundary node
divides the one linked list: blocks that somebody has parked are always after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

_BOUNDARY_ID = -2


class ParkedLastQueue(FreeKVCacheBlockQueue):
    """Takes the place of `queue`, whose blocks it takes over.

    Args:
        queue: the pool's queue, not used any more afterwards.
        is_parked: whether a block id belongs to parked KV; asked when a block is freed.

    """

    def __init__(self, queue: FreeKVCacheBlockQueue, is_parked: Callable[[int], bool]) -> None:
        super().__init__(queue.get_all_free_blocks())
        self._is_parked = is_parked
        self._boundary = KVCacheBlock(block_id=_BOUNDARY_ID)
        self._insert([self._boundary], self.fake_free_list_tail)

    def popleft(self) -> KVCacheBlock:
        """The first block that nobody has parked, or the first parked one."""
        if self.num_free_blocks == 0:
            raise ValueError("No free blocks available")
        first = self.fake_free_list_head.next_free_block
        if first is self._boundary:
            first = self._boundary.next_free_block
        assert first is not None
        self.remove(first)
        return first

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """The first `n`, in the same order."""
        assert self.num_free_blocks >= n
        return [self.popleft() for _ in range(n)]

    def append(self, block: KVCacheBlock) -> None:
        """Put a block last among its kind."""
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put blocks last among their kind, in their order."""
        parked = [block for block in blocks if self._is_parked(block.block_id)]
        if parked:
            self._insert(parked, self.fake_free_list_tail)
            blocks = [block for block in blocks if not self._is_parked(block.block_id)]
            self.num_free_blocks += len(parked)
        self._insert(blocks, self._boundary)
        self.num_free_blocks += len(blocks)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put blocks first, except parked ones, which are put last."""
        parked = [block for block in blocks if self._is_parked(block.block_id)]
        if parked:
            self.append_n(parked)
            blocks = [block for block in blocks if not self._is_parked(block.block_id)]
        super().prepend_n(blocks)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """Every free block, first to go first."""
        return [block for block in super().get_all_free_blocks() if block is not self._boundary]

    def iter_blocks_after(self, cursor: KVCacheBlock | None) -> Iterator[KVCacheBlock]:
        """See `FreeKVCacheBlockQueue`."""
        return (block for block in super().iter_blocks_after(cursor) if block is not self._boundary)

    def _insert(self, blocks: list[KVCacheBlock], before: KVCacheBlock) -> None:
        last = before.prev_free_block
        assert last is not None
        for block in blocks:
            last.next_free_block, block.prev_free_block = block, last
            last = block
        last.next_free_block, before.prev_free_block = before, last
