"""Groups packed and unpacked: exact, smaller, and never anything else."""

from __future__ import annotations

import itertools
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtail.engine.packed_groups import (
    PackedTrajectory,
    pack,
    pack_group,
    pack_members,
    unpack_group,
    unpack_members,
)
from longtail.engine.trajectory import (
    Branch,
    Group,
    KvSpan,
    Segment,
    Timings,
    TokenCounts,
    Trajectory,
    VersionSpan,
)
from longtail.engine.trajectory_parts import branches, joined


def part(rng: random.Random, num_tokens: int, **changes: Any) -> Trajectory:
    """What one request has sampled: versions and segments as they come."""
    cuts = sorted({0, num_tokens, *(rng.randrange(num_tokens) for _ in range(3) if num_tokens)})
    spans = list(itertools.pairwise(cuts))
    version, versions = rng.randint(0, 2), []
    for start, end in spans:
        version += rng.randint(0, 1)
        if versions and versions[-1].version == str(version):
            versions[-1] = VersionSpan(str(version), versions[-1].start, end)
        else:
            versions.append(VersionSpan(str(version), start, end))
    fields: dict[str, Any] = {
        "trajectory_id": "r/g/0", "round_id": "r", "group_id": "g", "index": 0, "prompt_token_ids": [5, 6],
        "output_token_ids": [rng.randrange(100) for _ in range(num_tokens)],
        "logprobs": [-rng.random() for _ in range(num_tokens)],
        "source_mask": [rng.randint(0, 1) for _ in range(num_tokens)],
        "weight_versions": versions,
        "segments": [Segment(start=a, end=b, kv_versions=[KvSpan("0", 0, a)]) for a, b in spans],
        "finish_reason": "stop", "timings": Timings(submitted_s=0.0), "tokens": TokenCounts(), "metadata": {"x": [1]},
    }  # fmt: skip
    return Trajectory(**fields | changes)


def tree(seed: int, num_members: int) -> Group:
    """Branches of branches, in an order in which a member may come before the one that it left."""
    rng = random.Random(seed)
    members = [part(rng, rng.randint(0, 12))]
    for index in range(1, num_members):
        parent = rng.choice(members)
        at = rng.randint(0, len(parent.output_token_ids))
        (prefix,) = branches(parent, at, {index: f"r/g/{index}"}, [index])
        own = part(rng, rng.randint(0, 8), trajectory_id=f"r/g/{index}", index=index)
        whole = joined(prefix, own)
        members.append(msgspec.structs.replace(whole, reward=rng.random(), text="words"))
    order = rng.sample(range(num_members), num_members)
    return Group(group_id="g", trajectories=[members[i] for i in order], complete=True, num_dismissed=2)


@given(st.integers(0, 10_000), st.integers(1, 12))
def test_a_group_comes_back_exactly_with_every_token_once(seed: int, num_members: int) -> None:
    group = tree(seed, num_members)
    packed = pack_group(group)
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(packed), type=type(packed))
    assert unpack_group(sent) == group
    assert sum(len(one.output_token_ids) for one in packed.trajectories) == sum(
        one.num_own_tokens for one in group.trajectories
    )


@given(st.integers(0, 10_000), st.sampled_from(("output_token_ids", "logprobs", "loss_mask", "segments")))
def test_what_was_changed_stays_whole(seed: int, name: str) -> None:
    group = tree(seed, 6)
    rng = random.Random(seed)
    place = rng.randrange(6)
    one = group.trajectories[place]
    if not one.output_token_ids:
        return
    value = list(getattr(one, name))
    if name == "segments":
        value = [Segment(start=0, end=len(one.output_token_ids), kv_versions=[])]
    else:
        value[0] = value[0] + 1
    changed = msgspec.structs.replace(one, **{name: value})
    members = [*group.trajectories[:place], changed, *group.trajectories[place + 1 :]]
    assert unpack_members(pack_members(members)) == members


def test_a_branch_whose_parent_is_not_there_is_whole() -> None:
    group = tree(3, 5)
    for one in group.trajectories:
        assert pack(one, {}).num_shared == 0
        assert pack(one, {0: None}).num_shared == 0


def test_wrong_parents_are_refused() -> None:
    good = pack(tree(1, 1).trajectories[0], {})
    cases: list[PackedTrajectory] = [
        msgspec.structs.replace(good, num_shared=3),
        msgspec.structs.replace(good, num_shared=3, branch=Branch(of=0, at=3)),
        msgspec.structs.replace(good, num_shared=-1, branch=Branch(of=7, at=3)),
        msgspec.structs.replace(good, index=1, num_shared=1000, branch=Branch(of=0, at=1000)),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=r"tokens|cover"):
            unpack_members([good, case] if case.index else [case])


def test_members_that_wait_for_each_other_are_refused() -> None:
    good = pack(tree(1, 1).trajectories[0], {})
    first = msgspec.structs.replace(good, num_shared=1, branch=Branch(of=1, at=1))
    second = msgspec.structs.replace(good, index=1, num_shared=1, branch=Branch(of=0, at=1))
    with pytest.raises(ValueError, match="nothing has its first 1 tokens"):
        unpack_members([first, second])


def test_two_members_of_one_index_stay_whole() -> None:
    group = tree(3, 5)
    members = [*group.trajectories, msgspec.structs.replace(group.trajectories[-1], index=0)]
    packed = pack_members(members)
    assert not any(one.num_shared for one in packed if one is not None)
    assert unpack_members(packed) == members


def test_a_long_chain_of_branches() -> None:
    """As long as a group may be, and every member before the one that it left."""
    first = tree(1, 1).trajectories[0]
    chain = [first]
    for index in range(1, 5000):
        (child,) = branches(chain[-1], 1, {index: f"r/g/{index}"}, [None])
        chain.append(joined(child, part(random.Random(index), 1, trajectory_id=f"r/g/{index}", index=index)))
    packed = pack_members(chain[::-1])
    assert sum(one.num_shared for one in packed if one is not None) == len(chain) - 1
    assert unpack_members(packed) == chain[::-1]
