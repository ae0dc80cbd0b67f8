"""What `longtail rollout` was asked for, checked as far as that goes without an engine.

A request comes from options, or from the sidecar of a trajectory file that is to be continued; from there on both are
the same. What needs the engine's tokenizer, the length of text and chat prompts, is checked when the engine is up.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from longtail.engine.cli.options import DEFAULT_NUM_PROMPTS, RoundOptions, engine_config
from longtail.engine.config import EngineConfig, SamplingConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.models import SMOLLM2, resolve_model
from longtail.engine.prompt_file import prompts_sha256, read_prompts
from longtail.engine.prompts import Prompt, PromptLimits, tokenize_prompts
from longtail.engine.rounds import num_groups_for, plan_round
from longtail.engine.run_settings import RunSettings, check_same, load_settings
from longtail.engine.tasks import load_task
from longtail.engine.trajectory_file import index_file
from longtail.engine.tree_members import checked_width

#: Fields of `EngineConfig` that change which trajectories come out; the others change how fast, and may differ when a
#: run is continued.
_DECIDING = frozenset({"dtype", "max_model_len", "seed", "load_tokenizer", "vllm_args"})

_ANY_LENGTH = 1 << 40


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """One round to run, and the file that it goes to.

    Attributes:
        settings: those of the whole run, as its sidecar has them.
        prompts: the groups of this round.
        target_groups: complete groups that end this round.
        num_complete: groups that the file has already, from a run that is continued.

    """

    settings: RunSettings
    prompts: list[Prompt]
    target_groups: int
    sampling: SamplingConfig
    engine: EngineConfig
    out: Path
    is_continued: bool = False
    num_complete: int = 0


def new_request(
    out: Path, round_options: RoundOptions, model: str | None, sampling: Mapping[str, Any], engine: Mapping[str, Any]
) -> RolloutRequest:
    """A request from options.

    Raises:
        InvalidInputError, ModelSourceError, TaskUnavailableError: something is wrong or missing.

    """
    options = round_options
    if (options.prompts is None) == (options.task is None):
        raise InvalidInputError("prompts", "exactly one of --prompts FILE and --task NAME", options.prompts)
    settings = RunSettings(
        model=SMOLLM2 if model is None else _portable_model(model),
        task=options.task,
        prompts_file=None if options.prompts is None else str(options.prompts.expanduser().absolute()),
        num_prompts=0,
        group_size=1 if options.group_size is None else options.group_size,
        target_groups=options.target_groups,
        over_provision=options.over_provision,
        seed=(options.task_seed or 0) if options.task is not None else None,
        sampling=dict(sampling),
        engine=dict(engine),
    )
    sampling_config, config = _configs(settings, settings.engine)
    if sampling_config.tree is not None and sampling_config.tree.fallback == "none":
        what = "ended or any: in a file, a member that never began can't be told from one that is missing"
        raise InvalidInputError("sampling.tree.fallback", what, "none")
    group_size = checked_width(settings.group_size, sampling_config, can_fork=False)
    settings = msgspec.structs.replace(settings, group_size=group_size)
    prompts = _prompts(settings, _num_prompts(options))
    if options.num_prompts is not None and len(prompts) < options.num_prompts:
        raise InvalidInputError("num_prompts", f"at most the {len(prompts)} prompts there are", options.num_prompts)
    settings = msgspec.structs.replace(settings, num_prompts=len(prompts), prompts_sha256=prompts_sha256(prompts))
    target = _check_round(settings, prompts)
    _check_token_ids(prompts, config)
    return RolloutRequest(
        settings=settings, prompts=prompts, target_groups=target, sampling=sampling_config, engine=config, out=out
    )


def continued_request(
    out: Path, round_options: RoundOptions, model: str | None, sampling: Mapping[str, Any], engine: Mapping[str, Any]
) -> RolloutRequest | None:
    """The rest of the run that `out` holds; `None` when nothing is missing.

    Options that are given again must be those of the run, except those that only change how fast it is.

    Raises:
        InvalidInputError: an option differs, or the prompts are not the same any more.
        TrajectoryFileError: there is no such run.

    """
    settings = load_settings(out)
    given = round_options.given()
    if "prompts" in given:
        given["prompts_file"] = str(given.pop("prompts").expanduser().absolute())
    if "task_seed" in given:
        given["seed"] = given.pop("task_seed")
    if model is not None:
        given["model"] = _portable_model(model)
    deciding = {name: value for name, value in engine.items() if name in _DECIDING}
    for name in deciding.keys() - settings.engine.keys():
        raise InvalidInputError(f"engine.{name}", "nothing, as in the run that is continued", deciding[name])
    for name in sampling.keys() - settings.sampling.keys():
        raise InvalidInputError(f"sampling.{name}", "nothing, as in the run that is continued", sampling[name])
    check_same(settings, given | {"sampling": dict(sampling), "engine": deciding})

    sampling_config, config = _configs(settings, settings.engine | dict(engine))
    prompts = _prompts(settings, settings.num_prompts)
    if prompts_sha256(prompts) != settings.prompts_sha256:
        source = settings.prompts_file or f"task {settings.task}"
        raise InvalidInputError("prompts", "the same prompts as in the run that is continued", f"others from {source}")
    target = _check_round(settings, prompts)
    index = index_file(out)
    group_ids = [prompt.group_id for prompt in prompts if prompt.group_id is not None]
    missing = index.missing_groups(group_ids, settings.group_size)
    num_complete = len(prompts) - len(missing)
    if num_complete >= target:
        return None
    return RolloutRequest(
        settings=settings,
        prompts=_with_seeds(prompts, set(missing), settings.group_size, sampling_config.seed),
        target_groups=target - num_complete,
        sampling=sampling_config,
        engine=config,
        out=out,
        is_continued=True,
        num_complete=num_complete,
    )


def _with_seeds(prompts: Sequence[Prompt], wanted: set[str], group_size: int, seed: int | None) -> list[Prompt]:
    """The wanted prompts, sampled as at their places in the whole run.

    With fresh noise, groups that were too long to be complete would get a second chance to be short.
    """
    return [
        prompt if seed is None else dataclasses.replace(prompt, seed=seed + position * group_size)
        for position, prompt in enumerate(prompts)
        if prompt.group_id in wanted
    ]


def _portable_model(model: str) -> str:
    """A folder by its absolute path, so that the run can be continued from anywhere."""
    return model if model == SMOLLM2 else str(Path(model).expanduser().absolute())


def _configs(settings: RunSettings, engine: Mapping[str, Any]) -> tuple[SamplingConfig, EngineConfig]:
    try:
        sampling = SamplingConfig(**settings.sampling)
    except TypeError as error:
        raise InvalidInputError("sampling", f"fields of SamplingConfig ({error})", settings.sampling) from error
    return sampling, engine_config(settings.model, engine)


def _num_prompts(options: RoundOptions) -> int | None:
    if options.num_prompts is not None:
        if options.num_prompts < 1:
            raise InvalidInputError("num_prompts", "an integer >= 1", options.num_prompts)
        return options.num_prompts
    if options.target_groups is not None and math.isfinite(factor := options.over_provision or 1.0):
        return max(1, num_groups_for(options.target_groups, factor, sys.maxsize))
    return None


def _prompts(settings: RunSettings, number: int | None) -> list[Prompt]:
    if settings.task is not None:
        return load_task(settings.task, DEFAULT_NUM_PROMPTS if number is None else number, settings.seed or 0)
    assert settings.prompts_file is not None
    return read_prompts(settings.prompts_file)[:number]


def _check_round(settings: RunSettings, prompts: Sequence[Prompt]) -> int:
    """The round's target, after the checks that the engine makes, on stand-ins of one token."""
    plan = plan_round(
        [Prompt(token_ids=[0], group_id=prompt.group_id) for prompt in prompts],
        group_size=settings.group_size,
        target_groups=settings.target_groups,
        over_provision=settings.over_provision,
        sampling=SamplingConfig(),
        round_id=None,
        tokenizer=None,
        limits=PromptLimits(vocab_size=1, max_model_len=_ANY_LENGTH),
    )
    if len(plan.prompts) < len(prompts):
        expected = f"at most the {len(plan.prompts)} that target-groups x over-provision makes"
        raise InvalidInputError("num_prompts", expected, len(prompts))
    return plan.target_groups


def _check_token_ids(prompts: Sequence[Prompt], config: EngineConfig) -> None:
    """Prompts that are token ids need the model's folder only; a model that is still to be built can't say yet."""
    if config.model == SMOLLM2 or all(prompt.token_ids is None for prompt in prompts):
        return
    vocab_size = json.loads((resolve_model(config.model) / "config.json").read_bytes()).get("vocab_size")
    if isinstance(vocab_size, int):
        stand_in = Prompt(token_ids=[0])
        limits = PromptLimits(vocab_size, config.max_model_len or _ANY_LENGTH)
        tokenize_prompts([stand_in if prompt.token_ids is None else prompt for prompt in prompts], 1, None, limits)
