"""Which parked KV there is: the book-keeping of trajectories that do not run and whose KV blocks may still be readable.

A parked block belongs to the pool, which may hand it to anybody: `lose` is told then, and the trajectories that used
it keep the prefix before it. Nothing here can block a running request. This module knows block ids and lengths, no
vLLM; `kv_parking.py` moves the blocks.

Several trajectories may have parked the same block: siblings share their prompt's, branches what is before them. A
running request may use a parked block, too.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longtail.scheduler.kv_policy import KvPolicy, KvVersions


@dataclass(slots=True)
class Parked:
    """The KV of one stopped trajectory, or of a branch that has not begun.

    Attributes:
        num_tokens: KV of positions `[0, num_tokens)` is readable; shrinks when the pool takes blocks back.
        token_ids: the tokens whose KV it is, int32, at least `num_tokens` of them.
        block_ids: by KV group, the blocks of those positions in order.
        versions: of the KV.
        policy: what a weight change does to it.

    """

    num_tokens: int
    token_ids: array[int]
    block_ids: tuple[tuple[int, ...], ...]
    versions: KvVersions
    policy: KvPolicy

    def fits(self, token_ids: Sequence[int]) -> bool:
        """Whether it is KV of `token_ids`, as far as both go: KV is never given to another sequence."""
        length = min(self.num_tokens, len(token_ids))
        return array("i", token_ids[:length]) == self.token_ids[:length]

    def cut_to(self, num_tokens: int, block_sizes: Sequence[int]) -> Parked:
        """The same for at most the first `num_tokens` positions."""
        num_tokens = min(num_tokens, self.num_tokens)
        return Parked(
            num_tokens=num_tokens,
            token_ids=self.token_ids[:num_tokens],
            block_ids=tuple(
                ids[: -(-num_tokens // size)] for size, ids in zip(block_sizes, self.block_ids, strict=True)
            ),
            versions=self.versions.upto(num_tokens),
            policy=self.policy,
        )


class ParkingLot:
    """Parked trajectories by key.

    Args:
        block_sizes: tokens a block, by KV group.

    """

    def __init__(self, block_sizes: Sequence[int]) -> None:
        self._block_sizes = tuple(block_sizes)
        self._parked: dict[str, Parked] = {}
        #: Owners of a block: key -> position of its last token's end that is safe without the block.
        self._owners: dict[int, dict[str, int]] = {}
        self.num_parked_total = 0
        self.num_lost_tokens = 0

    def __len__(self) -> int:
        return len(self._parked)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parked)

    def __contains__(self, key: object) -> bool:
        return key in self._parked

    @property
    def num_tokens(self) -> int:
        """Positions with readable KV, over all trajectories."""
        return sum(parked.num_tokens for parked in self._parked.values())

    def __getitem__(self, key: str) -> Parked:
        return self._parked[key]

    def get(self, key: str) -> Parked | None:
        """What is parked under `key`."""
        return self._parked.get(key)

    def owns(self, block_id: int) -> bool:
        """Whether somebody has parked this block."""
        return block_id in self._owners

    def park(self, key: str, parked: Parked) -> list[int]:
        """Take a trajectory in; replaces what was there under its key, whose blocks nobody owns now are returned."""
        freed = self.remove(key)
        self._parked[key] = parked
        self.num_parked_total += 1
        for block_size, block_ids in zip(self._block_sizes, parked.block_ids, strict=True):
            for index, block_id in enumerate(block_ids):
                self._owners.setdefault(block_id, {})[key] = index * block_size
        return [block_id for block_id in freed if not self.owns(block_id)]

    def remove(self, key: str) -> list[int]:
        """Forget a trajectory, if it is there; returns its blocks that nobody owns any more."""
        parked = self._parked.pop(key, None)
        if parked is None:
            return []
        ownerless = []
        for block_ids in parked.block_ids:
            for block_id in block_ids:
                owners = self._owners.get(block_id)
                if owners is None or owners.pop(key, None) is None:
                    continue
                if not owners:
                    del self._owners[block_id]
                    ownerless.append(block_id)
        return ownerless

    def lose(self, block_id: int) -> None:
        """The pool has handed a block to somebody else; trajectories left without a prefix are forgotten."""
        for key, num_safe_tokens in self._owners.pop(block_id, {}).items():
            parked = self._parked[key]
            if num_safe_tokens < parked.num_tokens:
                self.num_lost_tokens += parked.num_tokens - num_safe_tokens
                parked.num_tokens = num_safe_tokens
            if parked.num_tokens == 0:
                self.remove(key)

    def outdated(self, version: int) -> list[str]:
        """Keys whose policy does not keep their KV when the weights become `version`."""
        return [key for key, parked in self._parked.items() if not parked.policy.keeps(parked.versions.all, version)]
