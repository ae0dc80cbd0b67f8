"""What longtail can do for a `GRPOTrainer`, and how its settings are said to the engine.

Everything that TRL would do to a completion and longtail would not is refused here, at the first rollout, by the name
of TRL's own argument. Reads public attributes of the trainer (trl 1.16); imports nothing of TRL.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Any

from longtail.engine.config import SamplingConfig
from longtail.trainer_bridge.errors import InvalidInputError

#: What is read of a trainer, and set (`use_vllm`). TRL calls `rollout_func` experimental: another release may differ.
_ATTRIBUTES = (
    "accelerator", "args", "chat_template", "chat_template_kwargs", "environment_factories", "eos_token_ids",
    "is_in_train", "loss_type", "max_completion_length", "min_p", "model", "num_generations", "num_generations_eval",
    "processing_class", "repetition_penalty", "reward_funcs", "state", "temperature", "tools", "top_k", "top_p",
    "train_dataset", "use_vllm", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
)  # fmt: skip
_IMAGES = {"image", "images"}


def check_trl() -> None:
    """Say how to get TRL.

    Raises:
        ModuleNotFoundError: it is not installed.

    """
    if importlib.util.find_spec("trl") is None:
        raise ModuleNotFoundError("TRL is not installed: pip install 'longtail[trl]'", name="trl")


def check_trainer(trainer: Any, *, stop: Sequence[str], own_field: str) -> None:
    """Refuse a trainer whose settings longtail would not follow.

    Args:
        trainer: a `GRPOTrainer`, fully built.
        stop: strings that end a completion.
        own_field: the column that longtail adds for the reward functions.

    Raises:
        InvalidInputError: names the setting and what it has to be.

    """
    if missing := [name for name in _ATTRIBUTES if not hasattr(trainer, name)]:
        got = f"{type(trainer).__name__} of trl {importlib.metadata.version('trl')} without {', '.join(missing)}"
        raise InvalidInputError("trainer", "a GRPOTrainer as trl 1.16 has it", got)
    args = trainer.args
    if (world_size := trainer.accelerator.num_processes) != 1:
        why = "1 process: each would ask for its own rollouts and push its own weights"
        raise InvalidInputError("accelerator.num_processes", why, world_size)
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        if getattr(trainer, name, False):
            raise InvalidInputError(f"trainer.{name}", "false: its weights are not whole in one process", True)
    if args.use_vllm:
        raise InvalidInputError("args.use_vllm", "False: the completions come from longtail", True)
    if trainer.tools:
        raise InvalidInputError("tools", "none: TRL would answer them with the trainer's own model", trainer.tools)
    if trainer.environment_factories is not None:
        raise InvalidInputError("environment_factory", "none", trainer.environment_factories)
    if hasattr(trainer.processing_class, "tokenizer"):
        got = type(trainer.processing_class).__name__
        raise InvalidInputError("processing_class", "a tokenizer: images do not go over the bridge", got)
    columns = set(getattr(trainer.train_dataset, "column_names", None) or ())
    if images := columns & _IMAGES:
        raise InvalidInputError("train_dataset", "no images", sorted(images))
    if own_field in columns:
        raise InvalidInputError("train_dataset", f"no column named {own_field}, which longtail adds", sorted(columns))
    _check_sampling(trainer, stop)


def sampling_of(trainer: Any, *, stop: Sequence[str], seed: int | None) -> SamplingConfig:
    """The trainer's sampling settings, as its own generation would have them.

    Every end token that the trainer knows ends a completion and is its last token, as TRL expects.
    """
    return SamplingConfig(
        temperature=float(trainer.temperature),
        top_p=float(trainer.top_p),
        top_k=max(0, trainer.top_k or 0),
        max_tokens=trainer.max_completion_length,
        stop=tuple(stop),
        stop_token_ids=tuple(trainer.eos_token_ids),
        seed=seed,
    )


def token_ids_of(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """Token ids of a data set's prompts, text or messages, as the trainer's own generation tokenises them."""
    first = prompts[0]
    if isinstance(first, list) and first and isinstance(first[0], dict):
        encoded = trainer.processing_class.apply_chat_template(
            conversation=list(prompts),
            chat_template=trainer.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **trainer.chat_template_kwargs,
        )
    else:
        encoded = trainer.processing_class(text=list(prompts))
    return [list(token_ids) for token_ids in encoded["input_ids"]]


def correct_for_sampling(trainer: Any) -> None:
    """Let the trainer weigh its loss by the ratio to the log-probabilities that the tokens were sampled with.

    TRL has that correction (`vllm_importance_sampling_*` of its arguments), but only while `trainer.use_vllm` is true,
    which as an argument would start a vLLM of its own. So the attribute is set, on a trainer that is built, and the two
    that TRL then reads before it calls `rollout_func`.
    """
    if trainer.vllm_importance_sampling_correction:
        trainer._last_loaded_step = trainer.state.global_step
        trainer.vllm_generation = _NothingToSync()
        trainer.use_vllm = True


class _NothingToSync:
    """Stands where TRL has its own vLLM, which it tells of new weights before each rollout: longtail has them then."""

    def sync_weights(self) -> None:
        pass


def _check_sampling(trainer: Any, stop: Sequence[str]) -> None:
    args = trainer.args
    if trainer.temperature <= 0:
        raise InvalidInputError("args.temperature", "a number above 0: TRL divides by it", trainer.temperature)
    if trainer.min_p:
        raise InvalidInputError("args.min_p", "None: longtail has no min_p", trainer.min_p)
    if trainer.repetition_penalty != 1.0:
        why = "1.0: the trainer's log-probabilities do not have it"
        raise InvalidInputError("args.repetition_penalty", why, trainer.repetition_penalty)
    if args.generation_kwargs:
        raise InvalidInputError("args.generation_kwargs", "none", args.generation_kwargs)
    if stop and args.mask_truncated_completions:
        why = "False with stop strings: TRL takes what does not end in an end token for truncated"
        raise InvalidInputError("args.mask_truncated_completions", why, True)
    if not trainer.vllm_importance_sampling_correction:
        return
    # A token's ratio would be the share that the filter leaves, and the ratio of a long completion would vanish.
    for name, value, off in (("top_p", trainer.top_p, 1.0), ("top_k", trainer.top_k or 0, 0)):
        if value != off and not (name == "top_k" and value < 0):
            why = (
                f"{off}, or vllm_importance_sampling_correction=False: longtail's log-probabilities are those of the"
                " distribution that was sampled from, the trainer's those of the whole one"
            )
            raise InvalidInputError(f"args.{name}", why, value)
    # TRL checks this itself, but only for args.use_vllm.
    mode = trainer.vllm_importance_sampling_mode
    if trainer.loss_type == "vespo" and not mode.startswith("token_"):
        raise InvalidInputError("args.vllm_importance_sampling_mode", "token_truncate or token_mask for vespo", mode)
