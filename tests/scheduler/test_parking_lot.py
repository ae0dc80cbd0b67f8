"""The book-keeping of parked KV against a plain model of it."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from longtail.scheduler.kv_policy import FRESH, KvPolicy, KvVersions
from longtail.scheduler.parking import Parked, ParkingLot

BLOCK_SIZE = 4


def parked(block_ids: list[int], num_tokens: int, policy: KvPolicy = FRESH, version: int = 0) -> Parked:
    token_ids = array("i", range(num_tokens))
    return Parked(num_tokens, token_ids, (tuple(block_ids),), KvVersions([(0, version)]), policy)


@given(st.lists(st.tuples(st.sampled_from(["park", "remove", "lose"]), st.integers(0, 4), st.integers(0, 11))))
def test_owners_and_lengths_follow_every_change(changes: list[tuple[str, int, int]]) -> None:
    lot = ParkingLot([BLOCK_SIZE])
    plain: dict[str, tuple[list[int], int]] = {}  # key -> blocks, readable tokens
    lost: set[int] = set()
    for what, number, block in changes:
        key = f"k{number}"
        if what == "park":
            blocks = [b for b in range(block, block + 3) if b not in lost]
            if not blocks:
                continue
            lot.park(key, parked(blocks, len(blocks) * BLOCK_SIZE - 1))
            plain[key] = (blocks, len(blocks) * BLOCK_SIZE - 1)
        elif what == "remove":
            before = {b for blocks, _ in plain.values() for b in blocks}
            gone, _ = plain.pop(key, ([], 0))
            after = {b for blocks, _ in plain.values() for b in blocks}
            assert set(lot.remove(key)) == ((before - after) & set(gone)) - lost
        else:
            lot.lose(block)
            lost.add(block)
            for other, (blocks, num_tokens) in list(plain.items()):
                if block in blocks:
                    num_tokens = min(num_tokens, blocks.index(block) * BLOCK_SIZE)
                    plain[other] = (blocks, num_tokens)
                    if not num_tokens:
                        del plain[other]
        assert {key: lot[key].num_tokens for key in lot} == {key: n for key, (_, n) in plain.items()}
        owned = {b for blocks, _ in plain.values() for b in blocks} - lost
        assert {b for b in range(15) if lot.owns(b)} == owned


def test_kv_is_given_to_its_own_sequence_only() -> None:
    entry = parked([0, 1], 7)
    assert entry.fits(list(range(7)))
    assert entry.fits([*range(7), 99])
    assert entry.fits(list(range(6))), "of a branch that begins before its end"
    assert not entry.fits([99, *range(1, 7)])
    assert not entry.fits([*range(6), 99])


def test_outdated_by_policy() -> None:
    lot = ParkingLot([BLOCK_SIZE])
    lot.park("fresh", parked([0], 3))
    lot.park("stale", parked([1], 3, KvPolicy(None)))
    lot.park("up to 2", parked([2], 3, KvPolicy(2)))
    assert lot.outdated(0) == []
    assert lot.outdated(1) == ["fresh"]
    assert lot.outdated(3) == ["fresh", "up to 2"]
