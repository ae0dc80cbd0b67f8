"""What the TRL adapter refuses, and that it says the rest as TRL would have it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_trl import MAX_TOKENS, tiny_trainer

from longtail.engine.config import SamplingConfig
from longtail.trainer_bridge.errors import InvalidInputError
from longtail.trainer_bridge.trl_settings import check_trainer, correct_for_sampling, sampling_of, token_ids_of


@pytest.fixture(scope="module")
def built(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_trainer(tiny_model, tmp_path_factory.mktemp("trl"), lambda prompts, trainer: {})


@pytest.fixture
def trainer(built: Any) -> Iterator[Any]:
    """A copy that may be changed."""
    changed = copy.copy(built)
    changed.args = copy.copy(built.args)
    return changed


def _check(trainer: Any, *stop: str) -> None:
    check_trainer(trainer, stop=stop, own_field="trajectory")


def test_the_defaults_of_trl_are_followed(trainer: Any) -> None:
    _check(trainer)
    _check(trainer, "\n")
    ends = tuple(trainer.eos_token_ids)
    assert trainer.processing_class.eos_token_id in ends
    assert sampling_of(trainer, stop=("\n",), seed=7) == SamplingConfig(
        temperature=0.8, max_tokens=MAX_TOKENS, stop=("\n",), stop_token_ids=ends, seed=7
    )


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("args.use_vllm", True, "args.use_vllm"),
        ("args.generation_kwargs", {"min_new_tokens": 3}, "args.generation_kwargs"),
        ("temperature", 0.0, "args.temperature"),
        ("min_p", 0.1, "args.min_p"),
        ("repetition_penalty", 1.1, "args.repetition_penalty"),
        ("top_p", 0.9, "args.top_p"),
        ("top_k", 50, "args.top_k"),
        ("tools", [print], "tools"),
        ("environment_factories", {None: object}, "environment_factory"),
        ("accelerator", SimpleNamespace(num_processes=2), "accelerator.num_processes"),
        ("is_fsdp_enabled", True, "trainer.is_fsdp_enabled"),
        ("is_deepspeed_enabled", True, "trainer.is_deepspeed_enabled"),
        ("processing_class", SimpleNamespace(tokenizer=None), "processing_class"),
        ("train_dataset", SimpleNamespace(column_names=["prompt", "image"]), "train_dataset"),
        ("train_dataset", SimpleNamespace(column_names=["prompt", "trajectory"]), "train_dataset"),
        ("loss_type", "vespo", "args.vllm_importance_sampling_mode"),
    ],
)
def test_what_longtail_would_not_do_is_refused(trainer: Any, path: str, value: Any, field: str) -> None:
    owner, _, name = path.rpartition(".")
    setattr(trainer.args if owner else trainer, name, value)
    with pytest.raises(InvalidInputError) as caught:
        _check(trainer)
    assert caught.value.field == field


def test_a_truncation_mask_is_refused_with_stop_strings(trainer: Any) -> None:
    trainer.args.mask_truncated_completions = True
    _check(trainer)
    with pytest.raises(InvalidInputError, match="mask_truncated_completions"):
        _check(trainer, "\n")


def test_top_p_is_for_those_who_do_without_the_correction(trainer: Any) -> None:
    trainer.top_p, trainer.top_k, trainer.vllm_importance_sampling_correction = 0.9, 20, False
    _check(trainer)
    sampling = sampling_of(trainer, stop=(), seed=None)
    assert (sampling.top_p, sampling.top_k) == (0.9, 20)
    correct_for_sampling(trainer)
    assert not trainer.use_vllm


def test_another_trl_is_named(trainer: Any) -> None:
    del trainer.eos_token_ids
    with pytest.raises(InvalidInputError, match=r"GRPOTrainer of trl 1\.\d+.* without eos_token_ids"):
        _check(trainer)


@pytest.mark.parametrize(
    "prompts",
    [
        ["one", "and two"],
        [[{"role": "user", "content": "one"}], [{"role": "system", "content": "s"}, {"role": "user", "content": "2"}]],
    ],
)
def test_prompts_are_tokenised_as_trl_does(trainer: Any, prompts: list[Any]) -> None:
    expected, images, _ = trainer._tokenize_prompts(prompts)
    assert images is None
    assert token_ids_of(prompts, trainer) == [list(ids) for ids in expected]
