"""What the demo trains on: a task with its model, ready to use.

`euclid` is the project's own small model on `euclid_task`, where a few minutes on two cores show it learning. Any other
name is a task of reasoning-gym for SmolLM2-135M, whose steps take half a minute or more on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from longtail.engine.config import SamplingConfig
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Trajectory
from longtail.trainer_bridge.demo import euclid_task

if TYPE_CHECKING:
    from torch import nn

    from longtail.trainer_bridge.demo.euclid_model import WarmUpProgress

EUCLID = "euclid"
_TRAIN_SEED, _HELD_OUT_SEED = 1, 2


@dataclass(frozen=True, kw_only=True)
class DemoTask:
    """A task and the model that learns it.

    Attributes:
        name: of both.
        folder: checkpoint that engine and trainer begin with.
        load: reads it for the trainer.
        prompts: to train on, `held_out` those to evaluate on.
        sampling: of both.
        reward: of a trajectory.
        shown: a trajectory as text for people.
        max_model_len: of the engine.
        learning_rate: of the trainer.

    """

    name: str
    folder: Path
    load: Callable[[Path], nn.Module]
    prompts: list[Prompt]
    held_out: list[Prompt]
    sampling: SamplingConfig
    reward: Callable[[Trajectory], float]
    shown: Callable[[Trajectory], str]
    max_model_len: int
    learning_rate: float


def euclid(num_prompts: int, num_held_out: int, seed: int, updates: int | None, progress: WarmUpProgress) -> DemoTask:
    """Trains the base model if the cache does not have it; `updates` is for less than the usual warm-up."""
    from longtail.trainer_bridge.demo import euclid_model

    folder = euclid_model.base_model(0, euclid_model.NUM_UPDATES if updates is None else updates, progress)
    return DemoTask(
        name="Euclid's algorithm, a Llama of 0.4 million parameters",
        folder=folder,
        load=euclid_model.load_model,
        prompts=euclid_task.prompts(_TRAIN_SEED + seed, num_prompts),
        held_out=euclid_task.prompts(0, num_held_out, held_out=True),
        sampling=SamplingConfig(max_tokens=euclid_task.MAX_ANSWER_TOKENS),
        reward=lambda t: euclid_task.score(t.prompt_token_ids, t.output_token_ids),
        shown=lambda t: euclid_task.text([*t.prompt_token_ids, *t.output_token_ids]),
        max_model_len=euclid_model.MAX_MODEL_LEN,
        learning_rate=euclid_model.LEARNING_RATE,
    )


def smollm2(name: str, num_prompts: int, num_held_out: int, seed: int, console: Console) -> DemoTask:
    """SmolLM2-135M on a task of reasoning-gym."""
    from longtail.engine.cli.model import make_ready
    from longtail.engine.tasks import load_task, score

    prompts = load_task(name, num_prompts, _TRAIN_SEED + 2 * seed)
    return DemoTask(
        name=f"{name}, SmolLM2-135M",
        folder=make_ready("smollm2", "float32", console),
        load=_load_causal,
        prompts=prompts,
        held_out=load_task(name, num_held_out, _HELD_OUT_SEED + 2 * seed),
        sampling=SamplingConfig(max_tokens=256),
        reward=lambda t: score(name, t.text, t.metadata),
        shown=lambda t: f"{t.metadata['entry']['question']}\n\n{t.text}",
        max_model_len=1024,
        learning_rate=1e-5,
    )


def _load_causal(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return model
