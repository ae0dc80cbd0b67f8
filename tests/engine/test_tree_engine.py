"""Trees in a running engine: against plain samples, against fresh requests with the same prefix, and over rounds."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chi2

from longtail.engine import AsyncRolloutEngine, EngineConfig, Prompt, RolloutEngine, SamplingConfig, Trajectory
from longtail.engine.carry_config import CarryConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.trajectory import Group, Round
from longtail.scheduler.tree_policy import TreeSpec

_rng = random.Random(3)
PROMPT = [_rng.randrange(3, 512) for _ in range(45)]
#: A distribution test that is right fails with this probability; it is seeded, so it fails always or never.
FALSE_ALARM_RATE = 1e-4
SPEC = TreeSpec(width=8, depth=4, segment_tokens=12)
SAMPLED = SamplingConfig(temperature=1.0, top_p=0.9, ignore_eos=True, max_tokens=200, seed=5, tree=SPEC)


def config_of(tiny_model: Path, **changes: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "core": "process", "block_size": 32, "max_model_len": 512, "max_num_seqs": 32, "kv_cache_gib": 0.05,
    }  # fmt: skip
    return EngineConfig(model=str(tiny_model), **(defaults | changes))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[RolloutEngine]:
    with RolloutEngine(config_of(tiny_model, carry=CarryConfig())) as running:
        yield running
        assert running.counters()["parked_trajectories"] == 0


def sampling(**changes: Any) -> SamplingConfig:
    return SamplingConfig(**({name: getattr(SAMPLED, name) for name in SAMPLED.__dataclass_fields__} | changes))


def grow(engine: RolloutEngine, *prompts: list[int], using: SamplingConfig = SAMPLED, **changes: Any) -> Round:
    arguments: dict[str, Any] = {"round_id": "r", "carry": False, "sampling": using}
    return engine.rollout([Prompt(token_ids=one) for one in prompts or (PROMPT,)], **(arguments | changes))


def check_tree(group: Group, spec: TreeSpec, num_ahead: int = 0, *, was_carried: bool = False) -> None:
    """Width, prefixes, costs."""
    by_index = {one.index: one for one in group.trajectories}
    assert sorted(by_index) == list(range(spec.width - group.num_dismissed))
    assert group.complete
    for one in group.trajectories:
        assert one.tokens.recomputed == 0
        if one.branch is None:
            continue
        parent, at = by_index[one.branch.of], one.branch.at
        assert at % spec.segment_tokens == 0
        assert one.output_token_ids[:at] == parent.output_token_ids[:at]
        assert one.logprobs[:at] == parent.logprobs[:at]
        assert one.branch.reason in ("boundary", "fallback")
        assert one.branch.probability is not None
        assert one.tokens.scheduled - one.num_own_tokens in range(num_ahead + 1)
        # A path of a synchronous tree is parked at every boundary, too.
        assert one.tokens.parked == len(one.prompt_token_ids) + at - 1 or spec.synchronous or was_carried


@pytest.mark.parametrize("changes", [{}, {"enable_prefix_caching": False}, {"block_size": 64}], ids=str)
def test_a_greedy_tree_is_one_path(tiny_model: Path, changes: dict[str, Any]) -> None:
    with RolloutEngine(config_of(tiny_model, core="inline", **changes)) as engine:
        check_greedy_tree(engine)


@pytest.mark.usefixtures("forced_async_scheduling")
def test_a_greedy_tree_is_one_path_with_asynchronous_scheduling(tiny_model: Path) -> None:
    with RolloutEngine(config_of(tiny_model, core="inline")) as engine:
        assert engine._driver.engine.link._inline_core.batch_queue_size == 2
        check_greedy_tree(engine, num_ahead=1)


def check_greedy_tree(engine: RolloutEngine, num_ahead: int = 0) -> None:
    greedy = sampling(temperature=0.0, top_p=1.0)
    (whole,) = grow(engine, using=sampling(temperature=0.0, top_p=1.0, tree=None, max_tokens=48)).trajectories
    (group,) = (made := grow(engine, using=greedy)).groups
    check_tree(group, SPEC, num_ahead)
    for one in group.trajectories:
        assert one.output_token_ids == whole.output_token_ids
        assert one.logprobs == pytest.approx(whole.logprobs, abs=1e-5)
        assert (one.finish_reason, one.text) == (whole.finish_reason, whole.text)
    assert made.stats.num_output_tokens == sum(one.num_own_tokens for one in group.trajectories) < 8 * 48
    assert engine.counters()["parked_trajectories"] == 0


def check_seeded_branches(engine: RolloutEngine, group: Group, using: SamplingConfig) -> None:
    """Each branch is what a fresh request samples that has the prefix in its prompt, and the branch's seed."""
    for one in group.trajectories:
        at = 0 if one.branch is None else one.branch.at
        fresh = engine.rollout(
            [Prompt(token_ids=one.prompt_token_ids + one.output_token_ids[:at], seed=one.seed)],
            sampling=SamplingConfig(
                temperature=using.temperature, top_p=using.top_p, ignore_eos=using.ignore_eos, seed=0,
                max_tokens=max(1, len(one.output_token_ids) - at),
            ),
            carry=False,
        ).trajectories[0]  # fmt: skip
        assert fresh.output_token_ids == one.output_token_ids[at:]
        assert one.logprobs[at:] == pytest.approx(fresh.logprobs, abs=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        TreeSpec(width=8, depth=4, segment_tokens=12, synchronous=True),
        TreeSpec(width=8, depth=5, segment_tokens=9, split="logprob", min_roots=2, max_roots=4),
        TreeSpec(width=8, depth=4, segment_tokens=12, split="entropy", synchronous=True),
        TreeSpec(width=8, depth=4, segment_tokens=12, split="entropy"),
    ],
    ids=["plain", "levels", "log-prob", "entropy by levels", "entropy"],
)
def test_seeded_branches_are_fresh_requests_with_the_same_prefix(engine: RolloutEngine, spec: TreeSpec) -> None:
    using = sampling(tree=spec)
    (group,) = grow(engine, using=using).groups
    check_tree(group, spec)
    check_seeded_branches(engine, group, using)


def test_a_tree_is_made_by_its_seed(engine: RolloutEngine) -> None:
    spec = TreeSpec(width=8, depth=4, segment_tokens=6, max_branching=4, max_roots=4, fallback="any")
    first, again, other = (
        [one.output_token_ids for one in grow(engine, using=sampling(tree=spec, seed=seed)).trajectories]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_paths_that_stop_early_are_replaced(engine: RolloutEngine) -> None:
    using = sampling(
        tree=TreeSpec(width=16, depth=3, segment_tokens=5, transfer=False), stop_token_ids=tuple(range(3, 90))
    )
    (group,) = grow(engine, using=using).groups
    check_tree(group, using.tree)  # type: ignore[arg-type]
    assert {one.finish_reason for one in group.trajectories} >= {"stop"}
    reasons = Counter(one.branch.reason for one in group.trajectories if one.branch is not None)
    assert reasons["fallback"]
    for one in group.trajectories:
        assert not set(one.output_token_ids[:-1]) & set(using.stop_token_ids)


def test_stop_strings_end_paths_also_across_boundaries(engine: RolloutEngine) -> None:
    plain = grow(engine, using=sampling(tree=None, seed=9, max_tokens=60), group_size=8).trajectories
    texts = [one.text or "" for one in plain]
    pairs = Counter(text[i : i + 2] for text in texts for i in range(len(text) - 1))
    stop = tuple(pair for pair, _ in pairs.most_common(3))
    using = sampling(tree=TreeSpec(width=8, depth=20, segment_tokens=3), stop=stop, seed=9)
    (group,) = grow(engine, using=using).groups
    check_tree(group, using.tree)  # type: ignore[arg-type]
    for one in group.trajectories:
        assert not any(text in (one.text or "") for text in stop)
        if one.finish_reason == "stop":
            assert one.stop_reason in stop
    assert any(one.finish_reason == "stop" for one in group.trajectories)


def test_without_a_fallback_a_group_is_complete_without_its_dismissed_members(engine: RolloutEngine) -> None:
    spec = TreeSpec(width=8, depth=6, segment_tokens=5, fallback="none")
    using = sampling(tree=spec, stop_token_ids=tuple(range(3, 200)))
    (group,) = grow(engine, using=using).groups
    assert group.complete
    assert len(group.trajectories) + group.num_dismissed == 8
    assert group.num_dismissed


def test_siblings_are_independent(engine: RolloutEngine) -> None:
    """The first own token of a branch, and that of its parent, are draws from one distribution."""
    spec = TreeSpec(width=2, depth=2, segment_tokens=1)
    pairs: list[tuple[int, int]] = []
    for seed in range(4):
        using = SamplingConfig(temperature=0.3, top_k=3, ignore_eos=True, max_tokens=2, seed=seed * 10_000, tree=spec)
        for group in grow(engine, *[PROMPT] * 512, using=using).groups:
            parent, child = group.trajectories
            assert child.branch is not None
            if parent.output_token_ids[0] == pairs_first(pairs, parent):
                pairs.append((parent.output_token_ids[1], child.output_token_ids[1]))
    tokens = sorted({token for pair in pairs for token in pair})
    table = Counter(pairs)
    rows, columns = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    statistic = sum(
        (table[a, b] - rows[a] * columns[b] / len(pairs)) ** 2 / (rows[a] * columns[b] / len(pairs))
        for a in tokens for b in tokens if rows[a] and columns[b]
    )  # fmt: skip
    freedom = (len(rows) - 1) * (len(columns) - 1)
    assert freedom > 0
    assert len(pairs) > 300
    assert statistic < chi2.ppf(1 - FALSE_ALARM_RATE, freedom)
    same = sum((rows[t] - columns[t]) ** 2 / (rows[t] + columns[t]) for t in tokens)
    assert same < chi2.ppf(1 - FALSE_ALARM_RATE, len(tokens) - 1)
    # Negative control: a sibling that draws with its parent's numbers.
    copied = Counter((a, a) for a, _ in pairs)
    assert sum(
        (copied[a, b] - rows[a] * rows[b] / len(pairs)) ** 2 / (rows[a] * rows[b] / len(pairs))
        for a in rows for b in rows
    ) > chi2.ppf(1 - FALSE_ALARM_RATE, freedom)  # fmt: skip


_FIRST: list[int] = []


def pairs_first(pairs: Sequence[tuple[int, int]], parent: Trajectory) -> int:
    """The first token that all pairs of the test share."""
    if not pairs:
        _FIRST[:] = parent.output_token_ids[:1]
    return _FIRST[0]


def test_a_cut_returns_what_paths_have(engine: RolloutEngine) -> None:
    budgets = [[12 * 4] * 8, [3] * 8]
    prompts = [Prompt(token_ids=PROMPT, max_tokens=budget) for budget in budgets]
    made = engine.rollout(prompts, sampling=SAMPLED, carry=False, target_groups=1, round_id="r")
    cut, complete = made.groups
    assert complete.complete
    assert len(cut.trajectories) == 8
    assert all(one.was_cut for one in cut.trajectories)
    assert engine.counters()["parked_trajectories"] == 0


def test_trees_are_carried_over_rounds(engine: RolloutEngine) -> None:
    """Trees that are cut go on in later rounds, and are what seeded requests with their prefixes sample."""
    rng = random.Random(8)
    prompts = [Prompt(token_ids=[rng.randrange(3, 512) for _ in range(20)]) for _ in range(12)]
    using = sampling(tree=TreeSpec(width=6, depth=5, segment_tokens=7), stop_token_ids=tuple(range(3, 24)), seed=50)
    groups: list[Group] = []
    carried = resumes = 0
    for number in range(4):
        made = engine.rollout(prompts, sampling=using, target_groups=2, over_provision=2.0, round_id=f"c{number}")
        assert made.carry is not None
        carried += made.carry.num_carried
        resumes += made.carry.num_resumes
        groups += made.groups
    assert carried
    assert resumes
    assert len(groups) == 8
    for group in groups:
        assert group.complete
        check_tree(group, using.tree, was_carried=True)  # type: ignore[arg-type]
        check_seeded_branches(engine, group, using)
    while engine._engine.book is not None and engine._engine.book.store.carried:
        left = len(engine._engine.book.store.carried) + len(engine._engine.book.store.banked)
        engine.rollout(prompts, sampling=using, target_groups=min(left, 2), over_provision=1.0)
        if engine.num_prompts_used == len(prompts) and left <= 2:
            break


def test_asyncio_is_the_same(tiny_model: Path) -> None:
    async def run() -> Round:
        async with AsyncRolloutEngine(config_of(tiny_model)) as engine:
            return await engine.rollout([Prompt(token_ids=PROMPT)], sampling=SAMPLED, round_id="r")

    (group,) = asyncio.run(run()).groups
    check_tree(group, SPEC)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: sampling(tree={"width": 4, "depth": 2}), "sampling.tree.segment_tokens"),
        (lambda: sampling(tree={"width": 4, "depth": 2, "segment_tokens": 3, "branches": 2}), "sampling.tree.branches"),
        (lambda: sampling(tree={"width": 0, "depth": 2, "segment_tokens": 3}), "tree.width"),
        (lambda: sampling(tree="wide"), "sampling.tree"),
        (lambda: sampling(boundary_every=4), "sampling.tree"),
    ],
)
def test_a_wrong_tree_is_refused(make: Any, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        make()
    assert caught.value.field == field


def test_wrong_arguments_are_refused(engine: RolloutEngine) -> None:
    for changes, field in (({"group_size": 4}, "group_size"),):
        with pytest.raises(InvalidInputError) as caught:
            grow(engine, **changes)  # type: ignore[arg-type]
        assert caught.value.field == field
    with pytest.raises(InvalidInputError) as caught:
        engine.stream_trajectories([PROMPT], sampling=SAMPLED, carry=False, can_fork=True)
    assert caught.value.field == "can_fork"


def test_paths_that_repeat_themselves_end(engine: RolloutEngine) -> None:
    """The pattern comes back across boundaries: a segment is shorter than it."""
    using = sampling(
        temperature=0.0, top_p=1.0, max_tokens=400, tree=TreeSpec(width=4, depth=100, segment_tokens=4),
        stop_repetition={"max_pattern": 20, "min_count": 3},
    )  # fmt: skip
    plain = sampling(temperature=0.0, top_p=1.0, max_tokens=400, tree=None)
    (whole,) = grow(engine, using=plain).trajectories
    end = next(end for end in range(3, 401) if _repeats(whole.output_token_ids[:end], 20, 3))
    assert end < 400, "greedy, the tiny model repeats itself"
    (group,) = grow(engine, using=using).groups
    for one in group.trajectories:
        assert one.output_token_ids == whole.output_token_ids[:end]
        assert one.finish_reason == "repetition"


def _repeats(tokens: Sequence[int], max_pattern: int, min_count: int) -> bool:
    sizes = range(1, min(max_pattern, len(tokens) // min_count) + 1)
    return any(tokens[-size * min_count :] == tokens[-size:] * min_count for size in sizes)


def test_boxed_answers_end_paths_and_plain_members(tiny_model: Path) -> None:
    """The tiny model's greedy text, taken for the beginning and the end of a boxed answer."""
    from longtail.scheduler import boxed

    with pytest.MonkeyPatch.context() as patch, RolloutEngine(config_of(tiny_model, core="inline")) as engine:
        greedy = sampling(temperature=0.0, top_p=1.0, tree=None, max_tokens=48)
        (whole,) = grow(engine, using=greedy).trajectories
        assert whole.text is not None
        patch.setattr(boxed.BoxedAnswer, "_read", _ends_after(whole.text[:30]))
        for tree in (None, SPEC):
            using = sampling(temperature=0.0, top_p=1.0, max_tokens=48, stop_at_boxed=True, tree=tree)
            for one in grow(engine, using=using).trajectories:
                assert (one.finish_reason, one.stop_reason) == ("stop", boxed.BOXED_STOP_REASON)
                assert one.output_token_ids == whole.output_token_ids[: len(one.output_token_ids)]
                assert one.text is not None
                assert whole.text.startswith(one.text)
                assert 30 <= len(one.text) < len(whole.text)


def _ends_after(text: str) -> Any:
    def read(self: Any, char: str) -> bool:
        self.num_chars = getattr(self, "num_chars", 0) + 1
        return bool(self.num_chars == len(text))

    return read
