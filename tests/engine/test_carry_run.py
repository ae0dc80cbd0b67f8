"""Rounds over vLLM's real scheduler with a faked model, where something goes wrong between them and the engine."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scheduler_harness
from kv_model import KvEngine
from msgspec.structs import replace
from step_driver import StepDriver

from longtail.engine.carry_book import CarryBook, VersionChanged
from longtail.engine.carry_config import CarryConfig
from longtail.engine.carry_run import CarryRun
from longtail.engine.config import SamplingConfig
from longtail.engine.errors import EngineDeadError, InvalidInputError
from longtail.engine.hook_points import Verdict
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Group, Round, Trajectory
from longtail.scheduler.rollout_scheduler import make_scheduler
from longtail.scheduler.tree_policy import TreeSpec

PROMPTS = [[5 + n, 6, 7, 8] for n in range(20)]
SAMPLING = SamplingConfig(max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = scheduler_harness.write_model_config(tmp_path_factory.mktemp("model"))
    return scheduler_harness.make_vllm_config(folder, block_size=8, max_num_seqs=8)


class Rounds:
    """One process: an engine, a book, and the items of the current run."""

    def __init__(self, vllm_config: Any, config: CarryConfig, hooks: Any = None, version: int = 0) -> None:
        self.driver = StepDriver(KvEngine(make_scheduler, vllm_config, 80), config, version)
        self.book = CarryBook(config, hooks, version)
        self.items: deque[Any] = deque()
        self.run: CarryRun | None = None

    def start(self, prompts: Any, target: int | None, ratio: float | None = None, **arguments: Any) -> CarryRun:
        self.items.clear()
        settings: dict[str, Any] = {"group_size": 1, "sampling": SAMPLING, "round_id": None} | arguments
        self.run = CarryRun(self.driver, self.book, prompts, target_groups=target, over_provision=ratio, **settings)  # type: ignore[arg-type]
        self.run.submit(self.items.append)
        return self.run

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.driver.run_commands()
            self.driver.step()

    def take_all(self) -> list[Trajectory]:
        assert self.run is not None
        return [trajectory for _ in range(len(self.items)) for trajectory in self.run.take(self.items.popleft())]

    def finish(self) -> tuple[Round, list[Trajectory]]:
        """Run the round to its end; also the trajectories as they ended."""
        assert self.run is not None
        ended: list[Trajectory] = []
        for _ in range(500):
            if self.run.settle():
                future = self.run.finish()
                self.driver.run_commands()
                if (round_ := future.result()) is not None:
                    self.run.received()
                    return round_, ended
            self.steps(1)
            ended += self.take_all()
        raise AssertionError("the round does not end")


class AcceptAll:
    """Hooks that answer at once; a group gets metadata of theirs."""

    decides_boundaries = False

    def prepare(self, prompt: Prompt) -> Future[Prompt]:
        return answered(prompt)

    def finish_trajectory(self, trajectory: Trajectory) -> Future[Trajectory]:
        return answered(trajectory)

    def finish_group(self, group: Group) -> Future[Verdict]:
        return answered(Verdict(group=replace(group, metadata=group.metadata | {"judged": True})))

    def change_weights(self, version: int) -> Future[None]:
        return answered(None)


def answered(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def test_groups_that_a_dying_engine_aborts_are_carried(vllm_config: Any) -> None:
    rounds = Rounds(vllm_config, CarryConfig())
    run = rounds.start(PROMPTS, 2, 2.0)
    rounds.steps(5)
    assert not rounds.take_all()
    # What `EngineCoreProc` answers for every request when it gets SIGTERM.
    completion = SimpleNamespace(
        token_ids=[9, 9], logprobs=SimpleNamespace(logprobs=[-1.0, -1.0]), weight_versions=[], text="",
        finish_reason="abort", stop_reason=None,
    )  # fmt: skip
    request_id = run._round.requests()[0]
    output = SimpleNamespace(request_id=request_id, outputs=[completion], kv_transfer_params=None)
    with pytest.raises(EngineDeadError, match="aborted a member that was not cut"):
        run.take(output)
    run.cancel()
    rounds.driver.run_commands()
    assert (len(rounds.book.store.carried), rounds.book.store.totals.num_filtered) == (4, 0)
    rounds.start(PROMPTS, 2, 2.0)
    round_, _ = rounds.finish()
    assert [group.group_id for group in round_.groups] == ["0", "1"]


@pytest.mark.parametrize("bad", [3, {"token_ids": [-1]}, Prompt(token_ids=[5], group_id="0")])
def test_a_bad_prompt_of_an_iterator_ends_one_round_only(vllm_config: Any, bad: Any) -> None:
    rounds = Rounds(vllm_config, CarryConfig())
    first = PROMPTS[0] if not isinstance(bad, Prompt) else Prompt(token_ids=PROMPTS[0], group_id="0")
    prompts = iter([first, bad, *PROMPTS[1:]])
    with pytest.raises(InvalidInputError, match=r"prompts\[1\]"):
        rounds.start(prompts, 4)
    rounds.start(prompts, 4)
    round_, _ = rounds.finish()
    assert [t.prompt_token_ids for t in round_.trajectories] == PROMPTS[:4]


def test_a_prompt_iterator_that_raises_loses_no_prompt(vllm_config: Any) -> None:
    def some() -> Any:
        yield from PROMPTS[:3]
        raise OSError("the dataset is gone")

    rounds = Rounds(vllm_config, CarryConfig())
    with pytest.raises(OSError, match="gone"):
        rounds.start(some(), 5)
    rounds.start(iter(PROMPTS[3:]), 5)
    round_, _ = rounds.finish()
    assert [t.prompt_token_ids for t in round_.trajectories] == PROMPTS[:5]


def test_what_a_hook_says_of_a_group_is_in_the_round_and_in_the_journal(vllm_config: Any, tmp_path: Path) -> None:
    config = CarryConfig(journal=tmp_path / "journal")
    rounds = Rounds(vllm_config, config, AcceptAll())
    rounds.start([Prompt(token_ids=ids, metadata={"n": n}) for n, ids in enumerate(PROMPTS)], 2)
    expected = [{"n": 0, "judged": True}, {"n": 1, "judged": True}]
    round_, _ = rounds.finish()
    assert [group.metadata for group in round_.groups] == expected
    rounds.book.close()
    again = CarryBook(config, None, 0)
    assert again.store.recovered is not None
    assert [group.metadata for group in again.store.recovered.groups] == expected
    again.close()


def test_a_trajectory_is_masked_when_it_is_streamed(vllm_config: Any) -> None:
    rounds = Rounds(vllm_config, CarryConfig(max_staleness=0))
    rounds.start(PROMPTS, 2)
    rounds.steps(6)
    rounds.driver.change_weights(1)
    rounds.book.inbox.post_to_run(VersionChanged())
    round_, ended = rounds.finish()
    assert len(ended) == 2
    for trajectory in ended:
        num_old = trajectory.weight_versions[0].end
        assert 0 < num_old < 20
        assert trajectory.loss_mask == [0] * num_old + [1] * (20 - num_old)
    assert [t.loss_mask for t in round_.trajectories] == [t.loss_mask for t in ended]


def test_a_stream_that_stops_starts_no_group(vllm_config: Any) -> None:
    """Also not one that the hooks were still preparing."""
    prepared: list[Future[Prompt]] = []

    class SlowPreparation(AcceptAll):
        def prepare(self, prompt: Prompt) -> Future[Prompt]:
            prepared.append(Future())
            return prepared[-1]

    rounds = Rounds(vllm_config, CarryConfig(), SlowPreparation())
    run = rounds.start(PROMPTS, None, num_groups=3)
    for future, ids in zip(prepared[:3], PROMPTS, strict=False):
        future.set_result(Prompt(token_ids=ids))
    rounds.steps(1)
    rounds.take_all()
    run._fresh.draw(2)  # as after a group was taken
    rounds.steps(4)
    run.stop()
    for future, ids in zip(prepared[3:], PROMPTS[3:], strict=False):
        future.set_result(Prompt(token_ids=ids))
    for _ in range(5):
        rounds.steps(1)
        rounds.take_all()
    assert not run.is_stopping
    run.end()
    rounds.driver.run_commands()
    assert len(rounds.book.store.carried) == 5
    assert rounds.driver.is_idle


def test_arguments_of_a_stream(vllm_config: Any) -> None:
    rounds = Rounds(vllm_config, CarryConfig())
    for wrong in (0, 2.5, "64", True):
        with pytest.raises(InvalidInputError, match="num_groups: expected an integer in"):
            rounds.start(PROMPTS, None, num_groups=wrong)


def test_a_version_names_one_set_of_weights(vllm_config: Any, tmp_path: Path) -> None:
    config = CarryConfig(journal=tmp_path / "journal")
    rounds = Rounds(vllm_config, config, version=7)
    rounds.start(PROMPTS, 1, 3.0, group_size=2)
    rounds.finish()
    rounds.book.close()
    with pytest.raises(InvalidInputError, match=r"engine.weight_version: expected at least 7.*got 5"):
        CarryBook(config, None, 5)
    CarryBook(config, None, 7).close()


TREE = SamplingConfig(max_tokens=20, ignore_eos=True, tree=TreeSpec(width=4, depth=5, segment_tokens=4))


def test_a_tree_that_was_carried_is_not_forked_by_hand(vllm_config: Any) -> None:
    """Its members would be more than its leaves: it could never go on."""
    rounds = Rounds(vllm_config, CarryConfig())
    prompts = [
        Prompt(token_ids=ids, max_tokens=[budget] * 4) for ids, budget in zip(PROMPTS, (4, 20, 20), strict=False)
    ]
    rounds.start(prompts, 1, 3.0, sampling=TREE, round_id="a")
    rounds.finish()
    (serial, group), *_ = rounds.book.store.carried.items()
    assert any(group.num_tokens(index) > 2 for index in range(4))
    run = rounds.start(prompts, 1, 1.0, can_fork=True, round_id="b")
    for _ in range(2):
        with pytest.raises(InvalidInputError) as caught:
            run.ask_fork(f"a/{serial}.0/0", 1, 1, None)
        assert caught.value.field == "trajectory_id"
        rounds.steps(3)
    rounds.finish()
    assert all(len(one.members) == 4 for one in rounds.book.store.groups() if one.sampling.tree is not None)


def test_a_prompt_with_two_budgets_for_one_tree_ends_one_round_only(vllm_config: Any) -> None:
    rounds = Rounds(vllm_config, CarryConfig())
    prompts = iter([Prompt(token_ids=PROMPTS[0], max_tokens=[4, 8, 8, 8]), *PROMPTS[1:]])
    with pytest.raises(InvalidInputError) as caught:
        rounds.start(prompts, 1, sampling=TREE)
    assert caught.value.field == "prompts[0].max_tokens"
    rounds.start(prompts, 1, sampling=TREE)
    done, _ = rounds.finish()
    assert len(done.groups[0].trajectories) == 4
