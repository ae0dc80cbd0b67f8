"""Forks in a running engine: against the parent, against fresh requests with the same prefix, and in distribution."""

from __future__ import annotations

import asyncio
import queue
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chi2

from longtail.engine import AsyncRolloutEngine, EngineConfig, Prompt, RolloutEngine, SamplingConfig, Trajectory
from longtail.engine.carry_config import CarryConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.round_stream import RoundStream
from longtail.engine.trajectory import Branch

_rng = random.Random(3)
PROMPT = [_rng.randrange(3, 512) for _ in range(45)]
#: A distribution test that is right fails with this probability; it is seeded, so it fails always or never.
FALSE_ALARM_RATE = 1e-4
GREEDY = SamplingConfig(temperature=0.0, ignore_eos=True, max_tokens=200)
SAMPLED = SamplingConfig(temperature=1.0, top_p=0.9, ignore_eos=True, max_tokens=200, seed=5)


def config_of(tiny_model: Path, **changes: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "core": "process", "block_size": 32, "max_model_len": 512, "max_num_seqs": 16, "kv_cache_gib": 0.05,
    }  # fmt: skip
    return EngineConfig(model=str(tiny_model), **(defaults | changes))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[RolloutEngine]:
    with RolloutEngine(config_of(tiny_model, carry=CarryConfig())) as running:
        yield running


def begin(
    engine: RolloutEngine, sampling: SamplingConfig, max_tokens: list[int] | None = None, **changes: Any
) -> RoundStream:
    """One group, of one member unless there are budgets for more."""
    arguments: dict[str, Any] = {"round_id": "r", "carry": False, "can_fork": True, "sampling": sampling}
    arguments["group_size"] = 1 if max_tokens is None else len(max_tokens)
    return engine.stream_trajectories([Prompt(token_ids=PROMPT, max_tokens=max_tokens)], **(arguments | changes))


def fork_when_there(stream: RoundStream, trajectory_id: str, at: int, **changes: Any) -> list[str]:
    """Fork as soon as the trajectory has so many tokens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return stream.fork(trajectory_id, at=at, **changes)
        except InvalidInputError as error:
            if error.field != "at" or time.monotonic() > deadline:
                raise
            time.sleep(0.001)


def by_id(stream: RoundStream) -> dict[str, Trajectory]:
    found = {trajectory.trajectory_id: trajectory for trajectory in stream}
    assert stream.round.complete_groups
    assert {t.trajectory_id for t in stream.round.trajectories} == found.keys()
    return found


def check_costs(branches: Sequence[Trajectory]) -> None:
    """What a branch cost: a token through the model for each that it sampled."""
    for branch in branches:
        assert branch.branch is not None
        assert branch.tokens.recomputed == 0
        assert branch.tokens.scheduled == branch.num_own_tokens
        assert branch.tokens.parked == len(PROMPT) + branch.branch.at - 1


@pytest.mark.parametrize("changes", [{}, {"enable_prefix_caching": False}, {"block_size": 64}], ids=str)
def test_a_greedy_branch_is_its_parent(tiny_model: Path, changes: dict[str, Any]) -> None:
    with RolloutEngine(config_of(tiny_model, core="inline", **changes)) as engine:
        check_greedy_branches(engine)


@pytest.mark.usefixtures("forced_async_scheduling")
def test_a_greedy_branch_is_its_parent_with_asynchronous_scheduling(tiny_model: Path) -> None:
    with RolloutEngine(config_of(tiny_model, core="inline")) as engine:
        assert engine._driver.engine.link._inline_core.batch_queue_size == 2
        check_greedy_branches(engine, runs_ahead=1)


def check_greedy_branches(engine: RolloutEngine, runs_ahead: int = 0) -> None:
    whole = engine.rollout([Prompt(token_ids=PROMPT)], sampling=GREEDY, carry=False).trajectories[0]
    stream = begin(engine, GREEDY)
    ids = fork_when_there(stream, "r/0/0", 30, n=2)
    ids += fork_when_there(stream, "r/0/0", 51)
    ids += fork_when_there(stream, "r/0/0", 12)  # a rewind
    ids += fork_when_there(stream, ids[0], 60)
    ids += stream.fork("r/0/0")
    assert ids == [f"r/0/{index}" for index in range(1, 7)]
    found = by_id(stream)
    assert len(found) == 7
    for trajectory in found.values():
        assert trajectory.output_token_ids == whole.output_token_ids
        assert trajectory.logprobs == pytest.approx(whole.logprobs, abs=1e-5)
        assert trajectory.finish_reason == whole.finish_reason
        assert trajectory.text == whole.text
    branches = [found[one] for one in ids]
    places = [(0, 30), (0, 30), (0, 51), (0, 12), (1, 60)]
    assert [one.branch for one in branches[:5]] == [Branch(of=of, at=at) for of, at in places]
    for branch in branches:
        assert branch.tokens.recomputed == 0
        assert branch.tokens.scheduled - branch.num_own_tokens in range(runs_ahead + 1)
    stats = stream.round.stats
    assert stats.num_output_tokens == sum(t.num_own_tokens for t in found.values()) < 7 * 200
    assert engine.counters()["parked_trajectories"] == 0


def test_without_the_copy_of_the_tail_a_branch_is_wrong(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    with RolloutEngine(config_of(tiny_model, core="inline")) as engine:
        whole = engine.rollout([Prompt(token_ids=PROMPT)], sampling=GREEDY, carry=False).trajectories[0]
        manager = engine._driver.engine.link._inline_core.scheduler.kv_cache_manager
        take = manager.take_kv_cache_block_copies
        monkeypatch.setattr(manager, "take_kv_cache_block_copies", lambda: ([], take()[1]))
        stream = begin(engine, GREEDY)
        (branch,) = fork_when_there(stream, "r/0/0", 30)
        found = by_id(stream)
    assert found["r/0/0"].output_token_ids == whole.output_token_ids
    assert found[branch].output_token_ids != whole.output_token_ids


def test_a_seeded_branch_is_a_fresh_request_with_the_same_prefix(engine: RolloutEngine) -> None:
    stream = begin(engine, SAMPLED)
    ids = fork_when_there(stream, "r/0/0", 40, n=3, seeds=[11, 12, 13])
    derived = stream.fork("r/0/0", at=21, n=2)
    found = by_id(stream)
    check_costs([found[one] for one in ids + derived])
    assert len({found[one].seed for one in found}) == 6, "every branch has its own"
    for one in ids + derived:
        branch = found[one]
        assert branch.branch is not None
        at = branch.branch.at
        prefix = found["r/0/0"].output_token_ids[:at]
        assert branch.output_token_ids[:at] == prefix
        assert branch.logprobs[:at] == found["r/0/0"].logprobs[:at]
        fresh = Prompt(token_ids=PROMPT + prefix, seed=branch.seed, max_tokens=200 - at)
        (expected,) = engine.rollout([fresh], sampling=SAMPLED, carry=False).trajectories
        assert branch.output_token_ids[at:] == expected.output_token_ids
        assert branch.logprobs[at:] == pytest.approx(expected.logprobs, abs=1e-5)
        assert branch.output_token_ids != found["r/0/0"].output_token_ids


def test_stop_strings_and_min_tokens_see_what_a_branch_inherited(engine: RolloutEngine) -> None:
    """Forked at every one of its last tokens, a trajectory ends as it ended."""
    sampling = SamplingConfig(temperature=0.0, ignore_eos=True, max_tokens=200, min_tokens=25)
    (whole,) = engine.rollout([Prompt(token_ids=PROMPT)], sampling=sampling, carry=False).trajectories
    assert whole.text is not None
    stop = whole.text[40:46]  # some tokens long
    sampling = SamplingConfig(temperature=0.0, ignore_eos=True, max_tokens=200, stop=(stop,), min_tokens=25)
    (whole,) = engine.rollout([Prompt(token_ids=PROMPT)], sampling=sampling, carry=False).trajectories
    assert whole.stop_reason == stop
    num_tokens = len(whole.output_token_ids)
    assert 25 <= num_tokens < 200
    stream = engine.stream_trajectories(
        [Prompt(token_ids=PROMPT), Prompt(token_ids=PROMPT[::-1])], round_id="r", carry=False, can_fork=True,
        sampling=sampling, group_size=2,
    )  # fmt: skip
    ids: list[str] = []
    for at in range(num_tokens - 5, num_tokens):
        ids += fork_when_there(stream, "r/0/0", at)
    found = by_id(stream)
    for one in ids:
        branch = found[one]
        assert (branch.output_token_ids, branch.text) == (whole.output_token_ids, whole.text)
        assert (branch.finish_reason, branch.stop_reason) == ("stop", stop)


def sampled(engine: RolloutEngine, name: str, prompt: list[int], max_tokens: int, prior: int | None) -> Any:
    """A raw request with penalties; with `prior` so many tokens of the prompt are output that it goes on from."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    metadata = {"round": name, "target_groups": 1, "group": "0", "num_prior_tokens": prior}
    params = SamplingParams(
        temperature=0.0, presence_penalty=1.5, frequency_penalty=0.8, repetition_penalty=1.2, min_tokens=40,
        stop_token_ids=list(range(3, 200)), max_tokens=max_tokens, logprobs=0, ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY, extra_args=None if prior is None else {"rollout": metadata},
    )  # fmt: skip
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
    engine._driver.submit([(name, prompt, params)], answer.put)
    return answer.get(timeout=60).outputs[0]


def test_penalties_and_min_tokens_see_what_was_sampled_before(engine: RolloutEngine) -> None:
    whole = list(sampled(engine, "whole", PROMPT, 60, None).token_ids)
    assert 40 < len(whole) < 60, "it ends at a stop token, and not before min_tokens allow it"
    for prior in (1, 20, 39):
        going_on = sampled(engine, f"on-{prior}", PROMPT + whole[:prior], 60, prior)
        assert list(going_on.token_ids) == whole[prior:]
    as_prompt = sampled(engine, "prompt", PROMPT + whole[:20], 60, None)
    assert list(as_prompt.token_ids) != whole[20:], "negative control: as a prompt they are not seen"


# ---- distribution ------------------------------------------------------------------------------------------------


def chi_square(observed: Counter[Any], expected: dict[Any, float]) -> float:
    """P-value of counts under these expected counts."""
    assert set(observed) <= set(expected)
    statistic = sum((observed[key] - count) ** 2 / count for key, count in expected.items())
    return float(chi2.sf(statistic, len(expected) - 1))


def first_tokens(engine: RolloutEngine, n: int, **changes: Any) -> tuple[list[int], list[float]]:
    """First own tokens of `n` branches of one trajectory at one position, and their probabilities by token."""
    sampling = SamplingConfig(temperature=1.5, top_k=4, ignore_eos=True, **changes.pop("sampling", {}))
    # The second member keeps the group open until the first is forked.
    stream = begin(engine, sampling, max_tokens=[21, 300])
    ids = fork_when_there(stream, "r/0/0", 20, n=n, **changes)
    found = by_id(stream)
    branches = [found[one] for one in ids]
    check_costs(branches)
    return [one.output_token_ids[20] for one in branches], [one.logprobs[20] for one in branches]


@pytest.mark.parametrize("sampling", [{"seed": 17}, {}], ids=["seeded", "engine's stream"])
def test_siblings_are_unbiased_and_independent(engine: RolloutEngine, sampling: dict[str, Any]) -> None:
    n = 2000
    tokens, logprobs = first_tokens(engine, n, sampling=sampling)
    probabilities = {token: 2.718281828459045**logprob for token, logprob in zip(tokens, logprobs, strict=True)}
    assert len(probabilities) == 4
    assert sum(probabilities.values()) == pytest.approx(1.0, abs=1e-4)
    assert chi_square(Counter(tokens), {t: n * p for t, p in probabilities.items()}) > FALSE_ALARM_RATE
    pairs = Counter(zip(tokens[::2], tokens[1::2], strict=True))
    expected = {(a, b): n / 2 * p * q for a, p in probabilities.items() for b, q in probabilities.items()}
    assert chi_square(pairs, expected) > FALSE_ALARM_RATE


def test_siblings_with_one_seed_are_noticed(engine: RolloutEngine) -> None:
    """Negative control: the test above fails for branches that share their random numbers in pairs."""
    n = 2000
    seeds = [place // 2 for place in range(n)]
    tokens, logprobs = first_tokens(engine, n, seeds=seeds)
    probabilities = {token: 2.718281828459045**logprob for token, logprob in zip(tokens, logprobs, strict=True)}
    pairs = Counter(zip(tokens[::2], tokens[1::2], strict=True))
    expected = {(a, b): n / 2 * p * q for a, p in probabilities.items() for b, q in probabilities.items()}
    assert chi_square(pairs, expected) < 1e-12


# ---- streams and rounds ------------------------------------------------------------------------------------------


def test_branches_are_carried_over_like_any_member(engine: RolloutEngine) -> None:
    """Forked in one round, cut with it, returned by the next; then the same group again, uninterrupted."""
    prompts = [Prompt(token_ids=PROMPT, max_tokens=200), *(Prompt(token_ids=PROMPT[:9], max_tokens=20),) * 8]
    arguments: dict[str, Any] = {"target_groups": 2, "over_provision": 2.0, "sampling": GREEDY, "can_fork": True}
    stream = engine.stream_trajectories(prompts, round_id="c", **arguments)
    ids = fork_when_there(stream, "c/0.0/0", 5, n=2) + stream.fork("c/0.0/0")
    list(stream)
    carried = stream.round.carry
    assert carried is not None
    assert carried.num_carried >= 1
    rounds = [stream.round]
    while not any(group.group_id == "0" for one in rounds for group in one.groups):
        later = engine.stream_trajectories(prompts, **arguments)
        list(later)
        rounds.append(later.round)
    (group,) = [group for one in rounds for group in one.groups if group.group_id == "0"]
    assert [t.trajectory_id for t in group.trajectories] == ["c/0.0/0", *ids]
    whole = group.trajectories[0]
    for branch in group.trajectories[1:]:
        assert branch.output_token_ids == whole.output_token_ids
        assert branch.tokens.recomputed == 0
    assert sum(one.carry.num_reprefilled_tokens for one in rounds if one.carry is not None) == 0


def test_forks_of_what_is_not_there_are_refused(engine: RolloutEngine) -> None:
    stream = begin(engine, GREEDY)
    for trajectory_id, arguments, field in (
        ("r/0/1", {}, "trajectory_id"),
        ("other", {}, "trajectory_id"),
        ("r/0/0", {"at": 200}, "at"),
        ("r/0/0", {"at": -1}, "at"),
        ("r/0/0", {"n": 0}, "n"),
        ("r/0/0", {"n": 2, "seeds": [1]}, "seeds"),
        ("r/0/0", {"n": 1, "seeds": ["x"]}, "seeds[0]"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            stream.fork(trajectory_id, **arguments)
        assert caught.value.field == field
    (only,) = by_id(stream).values()
    with pytest.raises(InvalidInputError):
        stream.fork(only.trajectory_id, at=3)
    plain = begin(engine, GREEDY, can_fork=False)
    with pytest.raises(InvalidInputError, match="can_fork=True"):
        plain.fork("r/0/0")
    list(plain)


def test_a_fork_after_one_that_was_given_up(engine: RolloutEngine) -> None:
    stream = begin(engine, GREEDY)
    while (given_up := stream._run.ask_fork("r/0/0", None, 2, None)) is None:
        pass
    given_up.answer.result(10)
    stream._run.end_fork(given_up)
    ids = stream.fork("r/0/0")
    assert ids == ["r/0/1"]
    assert {t.finish_reason for t in by_id(stream).values()} == {"length"}
    assert stream.round.stats.num_complete_groups == 1
    assert engine.counters()["parked_trajectories"] == 0


@pytest.mark.parametrize("carry", [False, True])
def test_a_fork_after_the_end_starts_nothing(engine: RolloutEngine, carry: bool) -> None:
    arguments: dict[str, Any] = {"target_groups": 1, "over_provision": 2.0} if carry else {}
    prompts = [Prompt(token_ids=PROMPT, max_tokens=length) for length in (200, 8, 200, 8)]
    given: Any = iter(prompts) if carry else prompts
    stream = engine.stream_trajectories(given, sampling=GREEDY, can_fork=True, carry=carry, **arguments)
    list(stream)
    before = engine.num_prompts_used
    for trajectory_id in (f"{stream.round.round_id}/0/0", f"{stream.round.round_id}/0.0/0"):
        with pytest.raises(InvalidInputError):
            stream.fork(trajectory_id, at=3)
    assert (engine.num_prompts_used, engine.num_in_flight) == (before, 0)
    closed = begin(engine, GREEDY)
    closed.close()
    with pytest.raises(InvalidInputError, match="a round that is not over"):
        closed.fork("r/0/0", at=0)


def test_a_cancelled_fork_leaves_its_round_as_it_was(tiny_model: Path) -> None:
    async def run() -> None:
        async with AsyncRolloutEngine(config_of(tiny_model)) as engine:
            stream = engine.stream_trajectories(
                [Prompt(token_ids=PROMPT)], round_id="r", can_fork=True, sampling=GREEDY
            )
            for _ in range(5):
                forking = asyncio.create_task(stream.fork("r/0/0", n=3))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                forking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await forking
            ids = await stream.fork("r/0/0")
            found = {one.trajectory_id: one async for one in stream}
            assert set(found) == {"r/0/0", *ids}
            assert stream.round.stats.num_complete_groups == 1
            assert (await engine.counters())["parked_trajectories"] == 0

    asyncio.run(run())


def test_forks_from_another_task(tiny_model: Path) -> None:
    async def run() -> None:
        async with AsyncRolloutEngine(config_of(tiny_model, carry=CarryConfig())) as engine:
            stream = engine.stream_trajectories(
                [Prompt(token_ids=PROMPT)], round_id="r", carry=False, can_fork=True, sampling=GREEDY
            )

            async def collect() -> list[Trajectory]:
                return [trajectory async for trajectory in stream]

            collecting = asyncio.create_task(collect())
            await asyncio.sleep(0.05)
            ids = [one for found in await asyncio.gather(*(stream.fork("r/0/0") for _ in range(4))) for one in found]
            found = {one.trajectory_id: one for one in await collecting}
            assert sorted(ids) == [f"r/0/{index}" for index in range(1, 5)]
            assert all(found[one].output_token_ids == found["r/0/0"].output_token_ids for one in ids)
            groups = engine.stream([Prompt(token_ids=PROMPT)], num_groups=1, sampling=GREEDY, can_fork=True)
            forking = asyncio.create_task(anext(groups))
            while True:
                try:
                    serial = f"{groups._run.round_id}/0.0/0"
                    (branch,) = await groups.fork(serial, at=7)
                    break
                except InvalidInputError as error:
                    if error.field not in ("at", "trajectory_id"):
                        raise
                    await asyncio.sleep(0.001)
            group = await forking
            assert [t.trajectory_id for t in group.trajectories] == [serial, branch]
            await groups.aclose()

    asyncio.run(run())
