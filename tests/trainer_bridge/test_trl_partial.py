"""TRL on rounds that carry over: the reward functions see what the completions belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_service import FakeService
from tiny_trl import BATCH_SIZE, GROUP_SIZE, NUM_STEPS, QUESTIONS, length_reward, ratios, tiny_trainer

from longtail.trainer_bridge.errors import InvalidInputError
from longtail.trainer_bridge.trl_partial import EndlessPrompts
from longtail.trainer_bridge.trl_rollout import LongtailRollout


class RecordingRollout(LongtailRollout):
    """Remembers what TRL asked for."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked: list[list[Any]] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        self.asked.append(prompts)
        return super().__call__(prompts, trainer)


@pytest.mark.parametrize("is_async", [False, True])
def test_rewards_get_the_prompts_and_columns_of_their_completions(
    tiny_model: Path, tmp_path: Path, is_async: bool
) -> None:
    seen: list[list[Any]] = []

    def judge(prompts: list[Any], completions: list[Any], number: list[int], trajectory: list[Any], **_: Any) -> Any:
        assert len(prompts) == len(completions) == len(trajectory) == BATCH_SIZE
        assert [QUESTIONS[i] for i in number] == prompts
        token_ids = trainer.processing_class(text=prompts)["input_ids"]
        assert token_ids == [one.prompt_token_ids for one in trajectory]
        texts = trainer.processing_class.batch_decode([one.output_token_ids for one in trajectory], True)
        assert texts == completions
        assert "longtail_prompts" not in _
        seen.append(prompts)
        return length_reward(completions)

    async def judge_later(**columns: Any) -> Any:
        return judge(**columns)

    service = FakeService(tiny_model)
    with RecordingRollout(service, carry=True, over_provision=2.0) as rollout:
        reward = rollout.reward(judge_later if is_async else judge)
        trainer = tiny_trainer(tiny_model, tmp_path, rollout, reward)
        trainer.train()
    assert len(seen) == NUM_STEPS
    assert seen != rollout.asked  # what an unwrapped function would have been given
    assert f"rewards/{reward.__name__}/mean" in trainer.state.log_history[0]
    assert [service.calls.count(call) for call in ("carry", "round", "ack")] == [NUM_STEPS, 0, NUM_STEPS]


def test_the_loss_mask_is_that_of_trl_too(tiny_model: Path, tmp_path: Path) -> None:
    with LongtailRollout(FakeService(tiny_model), carry=True, over_provision=1.0) as rollout:
        trainer = tiny_trainer(tiny_model, tmp_path, rollout, rollout.reward(length_reward))
        trainer.train()
    # The fake masks the first token of each completion.
    assert trainer.state.log_history[0]["completions/max_length"] <= trainer.max_completion_length - 1
    for lowest, highest in ratios(trainer):
        assert lowest == pytest.approx(1, abs=1e-3)
        assert highest == pytest.approx(1, abs=1e-3)


def test_an_evaluation_answers_what_trl_asks(tiny_model: Path, tmp_path: Path) -> None:
    evaluated: list[list[Any]] = []

    def judge(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        evaluated.append(prompts)
        return length_reward(completions)

    service = FakeService(tiny_model)
    with RecordingRollout(service, carry=True, over_provision=1.0) as rollout:
        trainer = tiny_trainer(tiny_model, tmp_path, rollout, rollout.reward(judge), num_generations_eval=2)
        trainer.evaluate()
    assert evaluated == rollout.asked
    assert service.calls == ["push 1", "round", "ack", "round", "ack"]
    assert sorted({prompt for prompts in evaluated for prompt in prompts}) == sorted(set(QUESTIONS))


def test_prompts_are_the_data_set_over_and_over(tiny_model: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(tiny_model, tmp_path, None)
    prompts, again = EndlessPrompts(trainer), EndlessPrompts(trainer)
    num_rows = len(QUESTIONS)
    rows = [prompt.metadata["row"] for prompt in prompts[: 3 * num_rows]]
    epochs = [rows[start : start + num_rows] for start in range(0, 3 * num_rows, num_rows)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [again[i].metadata["row"] for i in reversed(range(3 * num_rows))] == rows[::-1]
    assert len(prompts) > 1_000_000
    with pytest.raises(IndexError):
        prompts[len(prompts)]
    trainer.args.shuffle_dataset = False
    assert [prompt.metadata["row"] for prompt in EndlessPrompts(trainer)[:num_rows]] == list(range(num_rows))


def test_prompts_of_another_run_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    service = FakeService(tiny_model)
    asked = [QUESTIONS[0]] * GROUP_SIZE
    for columns in ({}, {"dataset": {"prompt": ["another"] * len(QUESTIONS)}}):
        rollout = LongtailRollout(service, carry=True, over_provision=2.0)
        trainer = tiny_trainer(tiny_model, tmp_path, rollout, rollout.reward(length_reward), **columns)
        trainer.model.train()
        if not columns:
            rollout(asked, trainer)
            continue
        with pytest.raises(InvalidInputError, match="a prompt of the trainer's data set"):
            rollout(asked, trainer)


def _without_reward(trainer: Any, rollout: LongtailRollout) -> None:
    trainer.reward_funcs = [rollout.reward(length_reward), length_reward]


def _of_another(trainer: Any, rollout: LongtailRollout) -> None:
    trainer.reward_funcs = [LongtailRollout(FakeServiceOf, carry=True, over_provision=1.0).reward(length_reward)]


FakeServiceOf: Any = object()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_without_reward, "reward_funcs[1]"),
        (_of_another, "reward_funcs[0]"),
        (lambda trainer, _: setattr(trainer.args, "log_completions", True), "args.log_completions"),
        (
            lambda trainer, _: setattr(trainer, "vllm_importance_sampling_correction", False),
            "args.vllm_importance_sampling_correction",
        ),
        (lambda trainer, _: setattr(trainer, "train_dataset", iter(())), "train_dataset"),
        (
            lambda trainer, _: setattr(
                trainer, "train_dataset", trainer.train_dataset.rename_column("number", "logprobs")
            ),
            "train_dataset",
        ),
    ],
)
def test_what_would_take_other_prompts_for_those_asked_is_refused(
    tiny_model: Path, tmp_path: Path, change: Any, field: str
) -> None:
    rollout = LongtailRollout(FakeService(tiny_model), carry=True, over_provision=2.0)
    trainer = tiny_trainer(tiny_model, tmp_path, rollout, rollout.reward(length_reward))
    change(trainer, rollout)
    with pytest.raises(InvalidInputError) as caught:
        rollout([QUESTIONS[0]] * GROUP_SIZE, trainer)
    assert caught.value.field == field


@pytest.mark.parametrize("function", ["a reward model", object(), dict])
def test_only_functions_are_wrapped(function: Any) -> None:
    rollout = LongtailRollout(FakeServiceOf, carry=True, over_provision=2.0)
    with pytest.raises(InvalidInputError, match="a plain or a coroutine function"):
        rollout.reward(function)
