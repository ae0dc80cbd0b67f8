"""The TRL adapter: an unmodified `GRPOTrainer` on rollouts from longtail."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_service import FakeService
from safetensors.torch import load_file
from tiny_trl import BATCH_SIZE, GROUP_SIZE, MAX_TOKENS, NUM_STEPS, QUESTIONS, length_reward, ratios, tiny_trainer

from longtail.engine import CarryConfig, EngineConfig, Prompt, RolloutEngine, SamplingConfig
from longtail.engine.trajectory import Round, Trajectory
from longtail.trainer_bridge import BridgeClient, BridgeError, BridgeService, WeightsPushError
from longtail.trainer_bridge.errors import InvalidInputError
from longtail.trainer_bridge.trl_rollout import LongtailRollout
from longtail.trainer_bridge.weights.checkpoint_tensors import checkpoint_tensors
from longtail.trainer_bridge.weights.manifest import checksum, digest_of

ONE = pytest.approx(1, abs=1e-3)


# ---- without an engine ---------------------------------------------------------------------------------------------


def test_rewards_see_what_trl_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    def judge(prompts: list[Any], completions: list[Any], number: list[int], trajectory: list[Any], **_: Any) -> Any:
        assert [QUESTIONS[i] for i in number] == prompts
        token_ids = trainer.processing_class(text=prompts)["input_ids"]
        assert token_ids == [one.prompt_token_ids for one in trajectory]
        assert trainer.processing_class.batch_decode([one.output_token_ids for one in trajectory], True) == completions
        return length_reward(completions)

    service = FakeService(tiny_model)
    with LongtailRollout(service) as rollout:
        trainer = tiny_trainer(tiny_model, tmp_path, rollout, judge)
        trainer.train()
    assert service.calls == ["push 1", "round", "ack", "push 2", "round", "ack", "push 3", "round", "ack"]
    assert not service.closed  # it was given


def test_chat_prompts_are_answered(tiny_model: Path, tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with LongtailRollout(FakeService(tiny_model)) as rollout:
        trainer = tiny_trainer(tiny_model, tmp_path, rollout, dataset={"prompt": chats}, max_steps=1)
        trainer.train()
        assert [ids[-1] for ids in trainer._tokenize_prompts([chats[0]])[0]]
        expected, _, _ = trainer._tokenize_prompts([chats[0]])
        trainer.model.train()
        answer = rollout([chats[0]] * GROUP_SIZE, trainer)
    assert answer["prompt_ids"] == [list(expected[0])] * GROUP_SIZE


def test_nothing_is_pushed_while_the_weights_stay(tiny_model: Path, tmp_path: Path) -> None:
    # Two generations a step, and an evaluation of two batches after each.
    service = FakeService(tiny_model)
    with LongtailRollout(service) as rollout:
        trainer = tiny_trainer(
            tiny_model, tmp_path, rollout, max_steps=2, gradient_accumulation_steps=2, steps_per_generation=1,
            eval_strategy="steps", eval_steps=1, num_generations_eval=2, max_completion_length=2,
        )  # fmt: skip
        trainer.train()
        pushed = [call for call in service.calls if call != "ack"]
        step = ["round", "round"]
        assert pushed == ["push 1", *step, "push 2", *step, *step, "push 3", *step]
        trainer.evaluate()  # the training may have ended with the weights of its best step
        assert [call for call in service.calls if call != "ack"][len(pushed) :] == ["push 4", "round", "round"]
        rollout.weights_changed()
        trainer.evaluate()
    assert service.calls.count("push 5") == 1


@pytest.mark.parametrize(
    ("engine", "needed", "steps", "versions"),
    [
        (0, None, [0, 1, 2], [1, 2, 3]),
        (0, None, [40, 42], [40, 42]),  # a trainer that goes on, a new engine; two steps a generation
        (7, None, [0, 1], [8, 9]),
        (7, 11, [3, 4], [11, 12]),  # tokens of version 11 are in the journal
        (2, None, [5, 6, 0, 1], [5, 6, 7, 8]),  # trained a second time
    ],
)
def test_versions_follow_the_steps_and_never_go_back(
    engine: int, needed: int | None, steps: list[int], versions: list[int]
) -> None:
    pushed: list[int] = []
    service = SimpleNamespace(address="fake", weight_version=engine, weights_needed=needed)

    def push_weights(named_tensors: Any, version: int, **options: Any) -> None:
        assert list(named_tensors) == [("w", 1)]
        pushed.append(version)  # what the client knows of the engine's version may be a heartbeat old

    service.push_weights = push_weights
    rollout = LongtailRollout(service, named_tensors=lambda model: [("w", 1)])
    accelerator = SimpleNamespace(unwrap_model=lambda model, **_: model)
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=0), is_in_train=True, model=None, accelerator=accelerator
    )
    for step in steps:
        trainer.state.global_step = step
        rollout._push_if_changed(trainer)
        rollout._push_if_changed(trainer)
    assert pushed == versions


def test_each_round_has_numbers_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    service = FakeService(tiny_model)
    with LongtailRollout(service, seed=5, stop=("END",)) as rollout:
        tiny_trainer(tiny_model, tmp_path, rollout).train()
    assert [sampling.seed for sampling in service.sampling] == [5 + step * BATCH_SIZE for step in range(NUM_STEPS)]
    assert {(one.stop, one.max_tokens, one.temperature) for one in service.sampling} == {(("END",), MAX_TOKENS, 0.8)}


def test_prompts_in_another_order_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    service = FakeService(tiny_model)
    rollout = LongtailRollout(service)
    trainer = tiny_trainer(tiny_model, tmp_path, rollout)
    with pytest.raises(InvalidInputError, match=r"prompts\[0\]: expected the same prompt 4 times"):
        rollout([QUESTIONS[0], QUESTIONS[1]] * GROUP_SIZE, trainer)
    assert "round" not in service.calls


def test_a_group_that_was_not_completed_ends_the_training(tiny_model: Path, tmp_path: Path) -> None:
    import msgspec

    class Failing(FakeService):
        def rollout(self, prompts: Any, **options: Any) -> Round:
            round_ = super().rollout(prompts, **options)
            group = round_.groups[0]
            cut = msgspec.structs.replace(group.trajectories[2], finish_reason="abort", stop_reason="it was aborted")
            members = [*group.trajectories[:2], cut, *group.trajectories[3:]]
            group = msgspec.structs.replace(group, trajectories=members, complete=False)
            return msgspec.structs.replace(round_, groups=[group, *round_.groups[1:]])

    service = Failing(tiny_model)
    with pytest.raises(BridgeError, match=r"prompt 1 of round r0 .* \(abort: it was aborted\)"):  # noqa: SIM117
        with LongtailRollout(service) as rollout:
            tiny_trainer(tiny_model, tmp_path, rollout).train()
    assert service.calls == ["push 1", "round"]  # not acknowledged


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"over_provision": 2.0}, "over_provision"),
        ({"carry": True}, "over_provision"),
        ({"stop": ("",)}, "sampling.stop[0]"),
        ({"seed": -1}, "sampling.seed"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        LongtailRollout(SimpleNamespace(), **arguments)
    assert caught.value.field == field


def test_how_to_get_trl_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'longtail\[trl\]'"):
        LongtailRollout(SimpleNamespace())


# ---- with an engine, over the bridge -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tiny_config: EngineConfig) -> Iterator[BridgeService]:
    config = dataclasses.replace(tiny_config, carry=CarryConfig(max_staleness=2))
    with RolloutEngine(config) as engine, BridgeService(engine) as running:
        yield running


def test_training_is_on_policy_and_the_engine_has_the_trainers_weights(
    service: BridgeService, tiny_model: Path, tmp_path: Path
) -> None:
    with BridgeClient(service.address) as client:
        before = client.weight_version
        with LongtailRollout(client) as rollout:
            versions: list[int] = []

            def judge(completions: list[Any], trajectory: list[Trajectory], **_: Any) -> list[float]:
                versions.extend({int(span.version) for one in trajectory for span in one.weight_versions})
                return length_reward(completions)

            trainer = tiny_trainer(tiny_model, tmp_path, rollout, judge)
            trainer.train()
            trained = ratios(trainer)
            assert trained == [(ONE, ONE)] * NUM_STEPS
            assert versions == [before + 1, before + 2, before + 3]
            assert client.ask_status().num_unacked > 0  # TRL may not have done with it

            trainer.evaluate()  # of the trained weights
            assert client.weight_version == rollout.last_push.version == before + 4
        assert client.ask_status().num_unacked == 0
        tensors = dict(checkpoint_tensors(trainer.model))
        digest = digest_of({name: checksum(tensor.cpu().numpy()) for name, tensor in tensors.items()})
        assert client.checksum().digest == digest
        untrained = load_file(tiny_model / "model.safetensors")
        assert any(not torch.equal(tensor, untrained[name]) for name, tensor in tensors.items())

        prompts = trainer.processing_class(text=QUESTIONS)["input_ids"]
        greedy = SamplingConfig(temperature=0, max_tokens=16)
        round_ = client.rollout([Prompt(token_ids=ids) for ids in prompts], sampling=greedy, carry=False)
        client.ack()
        ours = {tuple(one.prompt_token_ids): one.output_token_ids for one in round_.trajectories}
        trainer.model.eval()
        for ids in prompts:
            out = trainer.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16)[0, len(ids) :]
            assert ours[tuple(ids)] == out.tolist()


class NeverPushing(LongtailRollout):
    """What a trainer would do that forgets the engine."""

    def _push_if_changed(self, trainer: Any) -> None:
        pass


def test_without_pushes_the_ratio_drifts_away(service: BridgeService, tiny_model: Path, tmp_path: Path) -> None:
    with BridgeClient(service.address) as client:
        with LongtailRollout(client) as rollout:  # the engine gets the untrained weights
            tiny_trainer(tiny_model, tmp_path, rollout).evaluate()
        with NeverPushing(client) as rollout:
            trainer = tiny_trainer(tiny_model, tmp_path, rollout)
            trainer.train()
    first, *later = ratios(trainer)
    assert first == (ONE, ONE)
    assert all(not 0.9 < lowest <= highest < 1.1 for lowest, highest in later)


@pytest.mark.parametrize("what", ["name", "missing", "dtype"])
def test_weights_that_are_not_the_checkpoints_are_refused(
    service: BridgeService, tiny_model: Path, tmp_path: Path, what: str
) -> None:
    def named_tensors(model: Any) -> Iterator[tuple[str, Any]]:
        for position, (name, tensor) in enumerate(checkpoint_tensors(model)):
            if what == "name":
                yield f"policy.{name}", tensor
            elif what == "dtype":
                yield name, tensor.bfloat16()
            elif position > 0:
                yield name, tensor

    with BridgeClient(service.address) as client:
        before = client.checksum()
        rollout = LongtailRollout(client, named_tensors=named_tensors)
        trainer = tiny_trainer(tiny_model, tmp_path, rollout)
        with pytest.raises(WeightsPushError, match=r"model\.|lm_head"):
            trainer.train()
        after = client.checksum()
    assert (after.version, after.model) == (before.version, before.model)
    assert rollout.last_round is None


def test_rounds_carry_over_under_trl(service: BridgeService, tiny_model: Path, tmp_path: Path) -> None:
    def judge(
        prompts: list[Any], completions: list[Any], number: list[int], trajectory: list[Trajectory], **_: Any
    ) -> list[float]:
        assert [QUESTIONS[i] for i in number] == prompts
        assert trainer.processing_class(text=prompts)["input_ids"] == [one.prompt_token_ids for one in trajectory]
        ages.append(
            {rollout.last_push.version - int(span.version) for one in trajectory for span in one.weight_versions}
        )
        return length_reward(completions)

    ages: list[set[int]] = []
    with LongtailRollout(service.address, carry=True, over_provision=2.0) as rollout:
        trainer = tiny_trainer(
            tiny_model, tmp_path, rollout, rollout.reward(judge), max_steps=4, max_completion_length=40,
            learning_rate=1e-3, vllm_importance_sampling_mode="token_truncate",
        )  # fmt: skip
        trainer.train()
    assert len(ages) == 4
    for age, ratio in zip(ages, ratios(trainer), strict=True):
        assert (ratio == (ONE, ONE)) == (age == {0})
    assert any(age != {0} for age in ages)


@pytest.mark.parametrize("carry", [True, False])
def test_a_batch_that_was_not_trained_on_comes_again_only_if_it_carries_over(
    service: BridgeService, tiny_model: Path, tmp_path: Path, carry: bool
) -> None:
    class TrainerDied(Exception):
        pass

    seen: list[list[str]] = []

    def judge(completions: list[Any], trajectory: list[Trajectory], **_: Any) -> list[float]:
        seen.append([one.trajectory_id for one in trajectory])
        if len(seen) == 2:
            raise TrainerDied
        return length_reward(completions)

    for is_second in (False, True):
        rollout = LongtailRollout(service.address, carry=carry, over_provision=2.0 if carry else None)
        reward = rollout.reward(judge) if carry else judge
        trainer = tiny_trainer(tiny_model, tmp_path, rollout, reward, max_steps=2)
        if is_second:
            with rollout:
                trainer.train()
        else:
            with pytest.raises(TrainerDied), rollout:
                trainer.train()
    assert len(seen) == 4
    assert (seen[2] == seen[1]) == carry
    assert len({name for batch in (seen[0], *seen[2:]) for name in batch}) == 3 * BATCH_SIZE
    with BridgeClient(service.address, consumer="trl") as client:
        assert client.ask_status().num_unacked == 0
