"""Rounds that carry over, in a running engine: against uninterrupted runs, and against transformers."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_model import write_tiny_model

from longtail.engine import AsyncRolloutEngine, EngineConfig, Prompt, RolloutEngine, SamplingConfig, Trajectory
from longtail.engine.carry_book import CarryBook
from longtail.engine.carry_config import CarryConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.trajectory import Group, KvSpan, Round
from longtail.hooks import Accept, Hooks, Reject

GROUP_SIZE = 2
_rng = random.Random(1)
PROMPTS = [
    Prompt(
        token_ids=[_rng.randrange(3, 512) for _ in range(_rng.randint(4, 60))],
        max_tokens=[_rng.choice([3, 9, 20, 90]) for _ in range(GROUP_SIZE)],
    )
    for _ in range(60)
]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return write_tiny_model(tmp_path_factory.mktemp("other-model"), seed=1)


def config_of(tiny_model: Path, carry: CarryConfig | None = None, **changes: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "core": "inline", "block_size": 32, "max_model_len": 512, "max_num_seqs": 16, "kv_cache_gib": 0.05,
    }  # fmt: skip
    return EngineConfig(model=str(tiny_model), carry=carry or CarryConfig(), **(defaults | changes))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[RolloutEngine]:
    # Not inline: the end of an inline engine takes torch's process groups of this process with it.
    with RolloutEngine(config_of(tiny_model, core="process")) as running:
        yield running


def by_id(trajectories: list[Trajectory]) -> dict[str, Trajectory]:
    """By group and index: the round's id is another in each run."""
    return {f"{t.group_id}/{t.index}": t for t in trajectories}


def rounds_of(
    engine: RolloutEngine, count: int, sampling: SamplingConfig, target: int = 4, prompts: list[Prompt] = PROMPTS
) -> list[Round]:
    return [
        engine.rollout(prompts, group_size=GROUP_SIZE, target_groups=target, over_provision=2.0, sampling=sampling)
        for _ in range(count)
    ]


def check_resumed(engine: RolloutEngine, sampling: SamplingConfig, prompts: list[Prompt] = PROMPTS) -> list[Trajectory]:
    """Carried trajectories equal those of one round without a cut; returns those that were resumed."""
    whole = by_id(engine.rollout(prompts, group_size=GROUP_SIZE, sampling=sampling, carry=False).trajectories)
    got = [t for one in rounds_of(engine, 6, sampling, prompts=prompts) for t in one.trajectories]
    resumed = [t for t in got if len(t.segments) > 1 or t.tokens.parked]
    assert len(resumed) >= 5, "the test must resume"
    for trajectory in got:
        expected = whole[f"{trajectory.group_id}/{trajectory.index}"]
        assert trajectory.output_token_ids == expected.output_token_ids
        assert trajectory.finish_reason == expected.finish_reason
        assert trajectory.stop_reason == expected.stop_reason
        assert trajectory.text == expected.text
        assert trajectory.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    return resumed


def reconfigure(engine: RolloutEngine, carry: CarryConfig, hooks: Any = None) -> None:
    """Give a running engine another carry configuration and an empty book, instead of starting another engine."""
    inner = engine._engine
    assert inner.book is not None
    inner.book.close()
    inner.hooks, inner.book = hooks, CarryBook(carry, hooks, inner.driver.weight_version)
    inner.driver.config = dataclasses.replace(inner.driver.config, carry=carry)


SAMPLINGS = [
    SamplingConfig(temperature=0.0, ignore_eos=True),
    SamplingConfig(temperature=1.0, top_p=0.95, ignore_eos=True, seed=5),
    SamplingConfig(temperature=1.0, stop=("e", "th"), seed=11, min_tokens=3),
]


@pytest.mark.parametrize("changes", [{}, {"enable_prefix_caching": False}, {"core": "process"}], ids=str)
def test_resumed_equals_uninterrupted(tiny_model: Path, changes: dict[str, Any]) -> None:
    with RolloutEngine(config_of(tiny_model, **changes)) as engine:
        for sampling in SAMPLINGS:
            reconfigure(engine, CarryConfig())
            resumed = check_resumed(engine, sampling)
            assert sum(t.tokens.recomputed for t in resumed) == 0
            assert sum(t.tokens.parked for t in resumed) > 0


@pytest.mark.usefixtures("forced_async_scheduling")
def test_resumed_equals_uninterrupted_with_asynchronous_scheduling(tiny_model: Path) -> None:
    with RolloutEngine(config_of(tiny_model)) as engine:
        assert engine._driver.engine.link._inline_core.batch_queue_size == 2
        for sampling in SAMPLINGS[:2]:
            reconfigure(engine, CarryConfig())
            assert sum(t.tokens.recomputed for t in check_resumed(engine, sampling)) == 0
        check_change_in_flight(engine, "stale")


def test_without_parking_a_resume_prefills_what_it_had(engine: RolloutEngine) -> None:
    reconfigure(engine, CarryConfig(park=False))
    resumed = check_resumed(engine, SAMPLINGS[1])
    assert sum(t.tokens.parked for t in resumed) == 0
    assert sum(t.tokens.recomputed for t in resumed) > 0


def test_a_stop_string_that_the_last_token_of_the_budget_completes(engine: RolloutEngine) -> None:
    """It is why the trajectory ended, resumed or not."""
    reconfigure(engine, CarryConfig())
    sampling = SAMPLINGS[2]
    whole = engine.rollout(PROMPTS, group_size=GROUP_SIZE, sampling=sampling, carry=False)
    prompts = [
        dataclasses.replace(prompt, max_tokens=[len(t.output_token_ids) for t in group.trajectories])
        for prompt, group in zip(PROMPTS, whole.groups, strict=True)
    ]
    resumed = check_resumed(engine, sampling, prompts)
    assert sum(t.stop_reason in sampling.stop for t in resumed) > 0


# ---- weights -----------------------------------------------------------------------------------------------------


class Scorer:
    """Log-probs by transformers, from KV of the versions that a trajectory names; odd ones are the other weights."""

    def __init__(self, *folders: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]

    def logprobs(self, trajectory: Trajectory, kv_version: int | None = None) -> list[float]:
        """Of every output token; with `kv_version` as if all KV were of that version."""
        import torch

        ids = trajectory.prompt_token_ids + trajectory.output_token_ids
        num_prompt = len(trajectory.prompt_token_ids)
        found: list[float] = []
        with torch.no_grad():
            for segment in trajectory.segments:
                start, end = num_prompt + segment.start, num_prompt + segment.end
                spans = segment.kv_versions if kv_version is None else [KvSpan(str(kv_version), 0, start)]
                assert (spans[0].start, spans[-1].end) == (0, start)
                cache = None
                for span in spans:  # all KV but that of the last known token, which the sampling step computes
                    last = min(span.end, start - 1)
                    if last > span.start:
                        cache = self._forward(int(span.version), ids[span.start : last], cache).past_key_values
                version = next(int(s.version) for s in trajectory.weight_versions if s.start <= segment.start < s.end)
                rows = self._forward(version, ids[start - 1 : end - 1], cache).logits[0].log_softmax(-1)
                found += [float(row[token]) for row, token in zip(rows, ids[start:end], strict=True)]
        return found

    def _forward(self, version: int, ids: list[int], cache: Any) -> Any:
        import torch

        return self.models[version % 2](torch.tensor([ids]), past_key_values=cache, use_cache=True)


@pytest.fixture(scope="module")
def scorer(tiny_model: Path, other_model: Path) -> Scorer:
    return Scorer(tiny_model, other_model)


def start_again(engine: RolloutEngine, tiny_model: Path, carry: CarryConfig, hooks: Any = None) -> None:
    """An empty book, and the first weights under an even version."""
    reconfigure(engine, carry, hooks)
    if engine.weight_version:
        engine.load_weights(tiny_model, version=engine.weight_version // 2 * 2 + 2)


def last_two_versions(engine: RolloutEngine) -> tuple[str, str]:
    return str(engine.weight_version - 1), str(engine.weight_version)


SAMPLED = SamplingConfig(temperature=1.0, ignore_eos=True, seed=7)


@pytest.mark.parametrize("policy", ["fresh", "stale", "stale_up_to:1"])
def test_log_probs_come_from_the_kv_that_the_trajectory_names(
    engine: RolloutEngine, tiny_model: Path, other_model: Path, scorer: Scorer, policy: str
) -> None:
    """Two rounds under the first weights, the rest under others; transformers scores with exactly that KV."""
    start_again(engine, tiny_model, CarryConfig(kv_policy=policy))
    rounds_of(engine, 2, SAMPLED)
    before = engine.weight_version
    assert engine.load_weights(other_model) == engine.weight_version == before + 1
    old, new = last_two_versions(engine)
    got = rounds_of(engine, 5, SAMPLED)
    spanning = [t for one in got for t in one.trajectories if len(t.weight_versions) > 1]
    assert len(spanning) >= 3
    for trajectory in spanning:
        assert trajectory.logprobs == pytest.approx(scorer.logprobs(trajectory), abs=1e-4)
        kv_of_last = {span.version for span in trajectory.segments[-1].kv_versions}
        assert kv_of_last == ({new} if policy == "fresh" else {old, new})
    stats = [one.carry for one in got]
    assert all(one is not None and one.version == engine.weight_version for one in stats)
    assert got[0].carry is not None
    assert got[0].carry.staleness[1] > 0
    assert (got[0].carry.num_reprefilled_tokens > 0) is (policy == "fresh")


def test_new_weights_change_what_is_sampled(
    engine: RolloutEngine, tiny_model: Path, other_model: Path, scorer: Scorer
) -> None:
    """Negative control of the test above: scored with KV of one version, stale trajectories are off."""
    start_again(engine, tiny_model, CarryConfig(kv_policy="stale"))
    rounds_of(engine, 2, SAMPLED)
    engine.load_weights(other_model)
    spanning = [t for one in rounds_of(engine, 5, SAMPLED) for t in one.trajectories if len(t.weight_versions) > 1]
    errors = []
    for trajectory in spanning:
        start = trajectory.weight_versions[-1].start
        wrong = scorer.logprobs(trajectory, kv_version=engine.weight_version)
        errors.append(max(abs(a - b) for a, b in zip(trajectory.logprobs[start:], wrong[start:], strict=True)))
    assert min(errors) > 0.01


@pytest.mark.parametrize("policy", ["fresh", "stale"])
def test_weights_that_change_while_a_round_runs(
    engine: RolloutEngine, tiny_model: Path, other_model: Path, scorer: Scorer, policy: str
) -> None:
    start_again(engine, tiny_model, CarryConfig(kv_policy=policy))
    stream = engine.stream_trajectories(
        PROMPTS, group_size=GROUP_SIZE, target_groups=8, over_provision=1.5, sampling=SAMPLED
    )
    next(stream)
    engine.load_weights(other_model)
    list(stream)
    old, new = last_two_versions(engine)
    spanning = [t for t in stream.round.trajectories if len(t.weight_versions) > 1]
    assert len(spanning) >= 3
    for trajectory in spanning:
        assert trajectory.logprobs == pytest.approx(scorer.logprobs(trajectory), abs=1e-4)
        kv_of_last = {span.version for span in trajectory.segments[-1].kv_versions}
        assert kv_of_last == ({new} if policy == "fresh" else {old, new})


def check_change_in_flight(engine: RolloutEngine, policy: str) -> None:
    """A declared version change between two steps leaves no token without its version."""
    reconfigure(engine, CarryConfig(kv_policy=policy))
    stream = engine.stream_trajectories(
        PROMPTS, group_size=GROUP_SIZE, target_groups=8, over_provision=1.5, sampling=SAMPLED
    )
    next(stream)
    engine.declare_weights()
    list(stream)
    spanning = [t for t in stream.round.trajectories if len(t.weight_versions) > 1]
    assert spanning
    for trajectory in spanning:
        assert [s.start for s in trajectory.segments] == [s.start for s in trajectory.weight_versions]


# ---- staleness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["mask", "restart", "drop"])
def test_no_token_beyond_the_bound_reaches_the_caller_unmasked(
    engine: RolloutEngine, tiny_model: Path, action: Any
) -> None:
    start_again(engine, tiny_model, CarryConfig(max_staleness=1, on_stale=action))
    seen: dict[str, int] = {"masked": 0, "restarted": 0, "dropped": 0}
    for _ in range(8):
        (got,) = rounds_of(engine, 1, SAMPLED)
        assert got.carry is not None
        for trajectory in got.trajectories:
            for span in trajectory.weight_versions:
                is_beyond = got.carry.version - int(span.version) > 1
                assert trajectory.loss_mask[span.start : span.end] == [int(not is_beyond)] * (span.end - span.start)
                seen["masked"] += (span.end - span.start) * is_beyond
        assert got.carry.num_masked_tokens == sum(
            count for age, count in got.carry.staleness.items() if age > 1 and action == "mask"
        )
        seen["restarted"] += got.carry.num_restarts
        seen["dropped"] += got.carry.filtered_reasons.get("stale", 0)
        assert all(group.rejected == "stale" for group in got.filtered_groups)
        engine.declare_weights()
    expected = {"mask": "masked", "restart": "restarted", "drop": "dropped"}[action]
    assert {name for name, count in seen.items() if count} == {expected}


# ---- hooks -------------------------------------------------------------------------------------------------------


def test_rejected_groups_are_replaced_until_enough_are_accepted(engine: RolloutEngine, tiny_model: Path) -> None:
    versions: list[int] = []

    class Picky:
        def on_trajectory(self, trajectory: Trajectory) -> Trajectory:
            return msgspec.structs.replace(trajectory, reward=float(len(trajectory.output_token_ids)))

        async def on_group(self, group: Group) -> Accept | Reject:
            await asyncio.sleep(0)
            return Reject("even") if int(group.group_id) % 2 == 0 else Accept()

        def on_weights(self, version: int) -> None:
            versions.append(version)

    with Hooks([Picky()]) as hooks:
        start_again(engine, tiny_model, CarryConfig(), hooks)
        returned: list[str] = []
        filtered: list[str] = []
        for got in rounds_of(engine, 4, SAMPLED):
            assert len(got.groups) == 4
            returned += [group.group_id for group in got.groups]
            filtered += [group.group_id for group in got.filtered_groups]
            assert all(t.reward == len(t.output_token_ids) for t in got.trajectories)
        assert all(int(name) % 2 for name in returned)
        assert filtered
        assert all(int(name) % 2 == 0 for name in filtered)
        assert len(set(returned + filtered)) == len(returned + filtered)
        engine.declare_weights()
        assert versions[-1] == engine.weight_version
        reconfigure(engine, CarryConfig())


def test_a_slow_judge_holds_up_neither_engine_nor_round(engine: RolloutEngine, tiny_model: Path) -> None:
    release = threading.Event()

    class Slow:
        def on_group(self, group: Group) -> Accept:
            if group.group_id == "0":
                release.wait(30)
            return Accept()

    with Hooks([Slow()]) as hooks:
        start_again(engine, tiny_model, CarryConfig(), hooks)
        sampling = SamplingConfig(temperature=0.0, ignore_eos=True, max_tokens=4)
        prompts = [[9, 8, 7 + i] for i in range(12)]
        first = engine.rollout(prompts, target_groups=3, over_provision=2.0, sampling=sampling)
        assert "0" not in {group.group_id for group in first.groups}
        assert first.carry is not None
        assert first.carry.num_judging >= 1
        release.set()
        second = engine.rollout(prompts, target_groups=4, over_provision=1.0, sampling=sampling)
        names = [group.group_id for group in first.groups + second.groups]
        assert "0" in names
        assert len(set(names)) == len(names)
        reconfigure(engine, CarryConfig())


# ---- what else a user does ------------------------------------------------------------------------------------------


def test_a_stream_gives_groups_without_rounds_and_keeps_the_rest(engine: RolloutEngine, tiny_model: Path) -> None:
    start_again(engine, tiny_model, CarryConfig())
    whole = by_id(engine.rollout(PROMPTS, group_size=GROUP_SIZE, sampling=SAMPLED, carry=False).trajectories)
    given: list[Group] = []
    with engine.stream(PROMPTS, group_size=GROUP_SIZE, num_groups=6, sampling=SAMPLED) as stream:
        for group in stream:
            given.append(group)
            if len(given) == 10:
                break
            if len(given) == 5:
                engine.declare_weights()
    store = engine._engine.book.store  # type: ignore[union-attr]
    assert any(member and member.output_token_ids for group in store.carried.values() for member in group.members)
    given += list(engine.stream(PROMPTS, group_size=GROUP_SIZE, num_groups=6, sampling=SAMPLED))
    assert sorted(int(group.group_id) for group in given) == list(range(len(PROMPTS)))
    for group in given:
        for trajectory in group.trajectories:
            assert trajectory.output_token_ids == whole[f"{group.group_id}/{trajectory.index}"].output_token_ids


def test_weights_loaded_while_a_caller_has_a_group_count_for_the_next_one(
    engine: RolloutEngine, tiny_model: Path
) -> None:
    """The bound holds under the weights of the moment at which a group is given, banked groups included."""
    start_again(engine, tiny_model, CarryConfig(max_staleness=1))
    num_masked = 0
    with engine.stream(PROMPTS, group_size=GROUP_SIZE, num_groups=8, sampling=SAMPLED) as stream:
        for number, group in enumerate(stream):
            for trajectory in group.trajectories:
                for span in trajectory.weight_versions:
                    is_beyond = engine.weight_version - int(span.version) > 1
                    assert trajectory.loss_mask[span.start : span.end] == [int(not is_beyond)] * (span.end - span.start)
                    num_masked += is_beyond
            engine.declare_weights()
            if number == 30:
                break
    assert num_masked


def test_a_group_that_restarts_in_the_middle_of_a_round_is_not_lost(engine: RolloutEngine, tiny_model: Path) -> None:
    start_again(engine, tiny_model, CarryConfig(max_staleness=0, on_stale="restart"))
    stream = engine.stream_trajectories(
        PROMPTS, group_size=GROUP_SIZE, target_groups=8, over_provision=1.5, sampling=SAMPLED
    )
    for _ in range(5):
        next(stream)
    engine.declare_weights()
    list(stream)
    assert stream.round.carry is not None
    assert stream.round.carry.num_restarts > 0
    assert stream.round.carry.filtered_reasons == {}
    assert len(stream.round.groups) == 8
    for trajectory in stream.round.trajectories:
        assert {span.version for span in trajectory.weight_versions} == {str(engine.weight_version)}


def test_a_round_that_its_caller_did_not_get_is_returned_next(engine: RolloutEngine, tiny_model: Path) -> None:
    start_again(engine, tiny_model, CarryConfig())
    stream = engine.stream_trajectories(
        PROMPTS, group_size=GROUP_SIZE, target_groups=4, over_provision=2.0, sampling=SAMPLED
    )
    run = stream._run
    while not run.settle():
        run.take(stream._items.get())
    lost = engine._driver.wait(run.finish(), "the round")  # and the caller is interrupted here
    stream.close()
    again, following = rounds_of(engine, 2, SAMPLED)
    assert again == lost
    assert following.round_id != again.round_id
    names = [group.group_id for one in (again, following) for group in one.groups]
    assert len(set(names)) == 8


def test_progress_of_a_round_whose_prompts_the_hooks_still_have(engine: RolloutEngine, tiny_model: Path) -> None:
    class Slow:
        async def on_prompt(self, prompt: Prompt) -> Prompt:
            await asyncio.sleep(1.0)
            return dataclasses.replace(prompt, metadata={"seen": True})

    seen: list[Any] = []
    with Hooks([Slow()]) as hooks:
        start_again(engine, tiny_model, CarryConfig(), hooks)
        got = engine.rollout(PROMPTS, group_size=GROUP_SIZE, target_groups=4, sampling=SAMPLED, on_progress=seen.append)
        assert all(t.metadata == {"seen": True} for t in got.trajectories)
        reconfigure(engine, CarryConfig())


def test_answers_of_hooks_that_nobody_took_are_there_in_the_next_round(engine: RolloutEngine, tiny_model: Path) -> None:
    """Every group is judged once, though the first rounds end while members and groups are with the hooks."""
    judged: list[str] = []

    class Late:
        async def on_trajectory(self, trajectory: Trajectory) -> Trajectory:
            await asyncio.sleep(0.02 * (1 + trajectory.index))
            return msgspec.structs.replace(trajectory, reward=1.0)

        async def on_group(self, group: Group) -> Accept:
            await asyncio.sleep(0.05)
            judged.append(group.group_id)
            return Accept()

    sampling = SamplingConfig(temperature=0.0, ignore_eos=True, max_tokens=4)
    prompts = [[9, 8, 7 + i] for i in range(24)]
    names: list[str] = []
    with Hooks([Late()]) as hooks:
        start_again(engine, tiny_model, CarryConfig(), hooks)
        while len(names) < 24:
            got = engine.rollout(prompts, group_size=2, target_groups=4, over_provision=2.0, sampling=sampling)
            names += [group.group_id for group in got.groups]
        reconfigure(engine, CarryConfig())
    assert sorted(names, key=int) == sorted(judged, key=int) == [str(i) for i in range(24)]


def test_evaluation_in_between_neither_resumes_nor_evicts(engine: RolloutEngine, tiny_model: Path) -> None:
    start_again(engine, tiny_model, CarryConfig())
    rounds_of(engine, 2, SAMPLED)
    before = engine.counters()
    assert before["parked_tokens"] > 0
    for _ in range(3):
        got = engine.rollout([[5, 6, 7]] * 8, sampling=SamplingConfig(max_tokens=30), carry=False)
        assert got.carry is None
    after = engine.counters()
    assert [after[name] for name in ("parked_tokens", "parked_lost_tokens")] == [before["parked_tokens"], 0]


def test_the_engine_goes_on_where_its_journal_ends(tiny_model: Path, tmp_path: Path) -> None:
    """A second engine, as after a crash: the last round again, then the carried groups, then fresh prompts."""
    carry = CarryConfig(journal=tmp_path / "groups.journal")
    config = config_of(tiny_model, carry, weight_version=3)
    with RolloutEngine(config) as first:
        whole = by_id(first.rollout(PROMPTS, group_size=GROUP_SIZE, sampling=SAMPLED, carry=False).trajectories)
        rounds = rounds_of(first, 3, SAMPLED)
    with RolloutEngine(config) as second:
        (again,) = rounds_of(second, 1, SAMPLED)
        assert again == rounds[-1]
        rounds += rounds_of(second, 3, SAMPLED)
        with pytest.raises(InvalidInputError, match="journal"):
            second.rollout(iter(PROMPTS), target_groups=1)
    names = [group.group_id for one in rounds for group in one.groups]
    assert len(set(names)) == len(names) == 24
    for trajectory in (t for one in rounds for t in one.trajectories):
        assert trajectory.output_token_ids == whole[f"{trajectory.group_id}/{trajectory.index}"].output_token_ids
        assert {span.version for span in trajectory.weight_versions} == {"3"}


def test_asyncio_rounds_and_streams(engine: RolloutEngine, tiny_model: Path) -> None:
    start_again(engine, tiny_model, CarryConfig())

    async def scenario() -> None:
        facade = AsyncRolloutEngine(engine.config)
        facade._started = engine._engine
        arguments: dict[str, Any] = {"group_size": GROUP_SIZE, "sampling": SAMPLED}
        first = await facade.rollout(PROMPTS, target_groups=4, over_provision=2.0, **arguments)
        assert await facade.declare_weights() == facade.weight_version
        names = [group.group_id for group in first.groups]
        async with facade.stream(PROMPTS, num_groups=6, **arguments) as stream:
            async for group in stream:
                names.append(group.group_id)
                if len(names) == 10:
                    break
        second = await facade.rollout(PROMPTS, target_groups=4, over_provision=2.0, **arguments)
        names += [group.group_id for group in second.groups]
        assert len(names) == len(set(names))

    asyncio.run(scenario())


def test_an_iterator_loses_no_prompt(engine: RolloutEngine, tiny_model: Path) -> None:
    start_again(engine, tiny_model, CarryConfig())
    prompts = iter([[9, 8, 7 + i] for i in range(10)])
    sampling = SamplingConfig(temperature=0.0, ignore_eos=True, max_tokens=4)
    names: list[str] = []
    while len(names) < 10:
        got = engine.rollout(prompts, target_groups=3, over_provision=1.5, sampling=sampling)
        names += [group.group_id for group in got.groups]
        assert got.groups
    assert sorted(names, key=int) == [str(i) for i in range(10)]
    with pytest.raises(InvalidInputError, match="a prompt at position 10"):
        engine.rollout(prompts, target_groups=1, sampling=sampling)


def test_adaptive_over_provision_leaves_about_as_many_groups_as_asked(engine: RolloutEngine, tiny_model: Path) -> None:
    start_again(engine, tiny_model, CarryConfig(target_carried=3))
    carried = []
    for _ in range(8):
        got = engine.rollout(PROMPTS, group_size=GROUP_SIZE, target_groups=4, sampling=SAMPLED)
        assert got.carry is not None
        carried.append(got.carry.num_carried)
    assert 2 <= sum(carried[2:]) / len(carried[2:]) <= 5
    with pytest.raises(InvalidInputError, match="target_carried"):
        engine.rollout(PROMPTS, target_groups=1, over_provision=2.0)


def test_bad_arguments_leave_everything_as_it_was(engine: RolloutEngine, tiny_model: Path) -> None:
    start_again(engine, tiny_model, CarryConfig())
    (got,) = rounds_of(engine, 1, SAMPLED)
    store = engine._engine.book.store  # type: ignore[union-attr]
    carried = list(store.carried)
    with pytest.raises(InvalidInputError, match="target_groups"):
        engine.rollout(PROMPTS)
    with pytest.raises(InvalidInputError, match="prompts"):
        engine.rollout("text", target_groups=1)
    with pytest.raises(InvalidInputError, match="version"):
        engine.declare_weights(engine.weight_version)
    with pytest.raises(InvalidInputError, match="safetensors"):
        engine.load_weights(Path(__file__).parent)
    with pytest.raises(InvalidInputError, match=r"prompts\[8\]"):
        engine.rollout([*PROMPTS[:8], [100_000]], group_size=GROUP_SIZE, target_groups=6, over_provision=1.5)
    running = engine.stream(PROMPTS, group_size=GROUP_SIZE, sampling=SAMPLED)
    with pytest.raises(InvalidInputError, match="one carrying round at a time"):
        rounds_of(engine, 1, SAMPLED)
    running.close()
    assert set(carried) <= set(store.carried) | set(store.banked)
    store.check()
    assert got.carry is not None
