"""A real `GRPOTrainer` on the tiny model: three steps on a CPU, two groups of four a step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

NUM_STEPS = 3
GROUP_SIZE = 4
BATCH_SIZE = 8
MAX_TOKENS = 12
QUESTIONS = [f"question {i} " * (1 + i % 3) for i in range(8)]


def length_reward(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(str(completion)) % 7) for completion in completions]


def tiny_trainer(model: Path, out: Path, rollout: Any, reward: Any = length_reward, **changes: Any) -> Any:
    """Built, not run; `changes` are those of `GRPOConfig` and, by `dataset`, of the data set's columns."""
    with warnings.catch_warnings():
        # TRL drives a vLLM of its own up to 0.31, and says so wherever a later one is installed. It is not used here.
        warnings.filterwarnings("ignore", "TRL currently supports vLLM")
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    columns = changes.pop("dataset", {"prompt": QUESTIONS, "number": list(range(len(QUESTIONS)))})
    settings: dict[str, Any] = {
        "output_dir": str(out), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "per_device_train_batch_size": BATCH_SIZE, "num_generations": GROUP_SIZE, "max_steps": NUM_STEPS,
        "per_device_eval_batch_size": BATCH_SIZE, "max_completion_length": MAX_TOKENS, "temperature": 0.8,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True,
    }  # fmt: skip
    dataset = Dataset.from_dict(columns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using 'rollout_func'")
        return GRPOTrainer(
            model=str(model), args=GRPOConfig(**settings | changes), reward_funcs=reward, train_dataset=dataset,
            eval_dataset=dataset, rollout_func=rollout,
        )  # fmt: skip


def ratios(trainer: Any) -> list[tuple[float, float]]:
    """Of each step: the smallest and the largest importance ratio that TRL logged."""
    name = "sampling/importance_sampling_ratio/"
    return [(line[name + "min"], line[name + "max"]) for line in trainer.state.log_history if name + "min" in line]
