"""Options of the commands, each defined once: dataclasses that a command takes whole.

`command` turns a function that takes such dataclasses into one with an option for each field, which is what typer
reads, and shows errors as lines (`failures.py`). A field is `None` where the user set nothing: what was set is known,
which continuing a run needs, and a default has one home, `config.py`, where the help takes it from. Values are
checked there too. Nothing here imports torch or vLLM.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import msgspec
import typer

from longtail.engine.carry_config import CarryConfig
from longtail.engine.cli.failures import errors_as_lines
from longtail.engine.config import CoreMode, EngineConfig, RuntimeConfig, SamplingConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.server.settings import ServerConfig

DEFAULT_MODEL = "smollm2"
DEFAULT_NUM_PROMPTS = 8


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Options under one heading of the help, the yes-or-no ones under `SWITCHES` if it is set.

    A field's annotation carries its help; its default is taken from the field of that name in `DEFAULTS`.
    """

    HEADING: ClassVar[str]
    SWITCHES: ClassVar[str | None] = None
    DEFAULTS: ClassVar[type | None] = None

    def given(self) -> dict[str, Any]:
        """What the user set, as JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value not in (None, [])}


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """Which model."""

    HEADING = "Model"

    model: Annotated[
        str | None, "A local checkpoint folder, or smollm2, which is built when needed. Default: smollm2."
    ] = None


@dataclass(frozen=True, kw_only=True)
class RoundOptions(OptionGroup):
    """What to roll out."""

    HEADING = "Round"

    prompts: Annotated[
        Path | None, "JSON Lines file; a line has token_ids, text or messages, and optionally id and metadata."
    ] = None
    task: Annotated[str | None, "A reasoning-gym task by name, instead of a file; its answers are scored."] = None
    num_prompts: Annotated[
        int | None,
        "Use so many prompts. Default: target-groups x over-provision; without a target all of a file, "
        f"{DEFAULT_NUM_PROMPTS} of a task.",
    ] = None
    task_seed: Annotated[int | None, "Of the task's prompts. Default: 0."] = None
    group_size: Annotated[int | None, "Samples of each prompt. Default: 1."] = None
    target_groups: Annotated[int | None, "End the round when so many groups are complete. Default: all."] = None
    over_provision: Annotated[float | None, "Run so many prompts for each group of the target. Default: 1."] = None


@dataclass(frozen=True, kw_only=True)
class EngineOptions(OptionGroup):
    """Fields of `EngineConfig`."""

    HEADING = "Engine"
    SWITCHES = "Engine switches"
    DEFAULTS = EngineConfig

    dtype: Annotated[
        str | None, "float32, bfloat16, float16 or auto, which is float32 on a CPU, the checkpoint's own elsewhere."
    ] = None
    max_model_len: Annotated[int | None, "Longest prompt + output in tokens. Default: the checkpoint's."] = None
    max_num_seqs: Annotated[int | None, "How many trajectories run at once."] = None
    max_num_batched_tokens: Annotated[int | None, "Tokens of one step. Default: vLLM's choice."] = None
    block_size: Annotated[int | None, "Tokens of one KV block. Default: vLLM's choice."] = None
    kv_cache_gib: Annotated[float | None, "KV pool of a CPU engine in GiB."] = None
    gpu_memory_utilization: Annotated[float | None, "Share of a GPU's memory. Default: vLLM's."] = None
    enable_prefix_caching: Annotated[bool | None, "Share the KV of equal prefixes."] = None
    async_scheduling: Annotated[bool | None, "Schedule a step while another runs. Default: vLLM's choice."] = None
    enforce_eager: Annotated[bool | None, "No compilation, no graphs. Default: yes on a CPU only."] = None
    weight_transfer: Annotated[
        Literal["longtail", "nccl", "ipc"] | None, "How a trainer's weights come: through longtail, or vLLM's own way."
    ] = None
    engine_seed: Annotated[int | None, "Of the engine's own random stream. Default: 0."] = None
    start_timeout_s: Annotated[float | None, "Bound on the start of the engine, in seconds."] = None
    stall_timeout_s: Annotated[float | None, "A round fails when no step ends for so many seconds."] = None
    vllm_arg: Annotated[list[str] | None, "A further field of vLLM's EngineArgs, NAME=JSON. Repeatable."] = None


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(OptionGroup):
    """Fields of `RuntimeConfig`."""

    HEADING = "CPU (longtail picks what is not set, and prints what it picked)"

    omp_threads: Annotated[int | None, "Compute threads of the engine."] = None
    omp_library: Annotated[Literal["intel", "gnu"] | None, "OpenMP library."] = None
    block_time_ms: Annotated[int | None, "How long an idle OpenMP thread spins before it sleeps."] = None
    allocator: Annotated[Literal["tcmalloc", "system"] | None, "Memory allocator."] = None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(OptionGroup):
    """Fields of `SamplingConfig`."""

    HEADING = "Sampling"
    DEFAULTS = SamplingConfig

    def given(self) -> dict[str, Any]:
        """What the user set, as JSON values; what has fields as those."""
        fields = super().given()
        for name in ("tree", "stop_repetition"):
            if name in fields:
                fields[name] = dict(_named_value(name, part) for part in fields[name].split(","))
        return fields

    temperature: Annotated[float | None, "0 is greedy."] = None
    top_p: Annotated[float | None, "Nucleus mass in (0, 1]."] = None
    top_k: Annotated[int | None, "0 keeps the whole vocabulary."] = None
    max_tokens: Annotated[int | None, "Output budget of one trajectory in tokens."] = None
    min_tokens: Annotated[int | None, "No stop before this many tokens."] = None
    stop: Annotated[list[str] | None, "A string that ends a trajectory. Repeatable."] = None
    stop_token_ids: Annotated[list[int] | None, "A token id that ends a trajectory. Repeatable."] = None
    stop_at_boxed: Annotated[bool | None, r"End a trajectory at the end of \\boxed{...}."] = None
    stop_repetition: Annotated[
        str | None, "End it where token ids repeat: max_pattern=32,min_count=8, and min_pattern."
    ] = None
    ignore_eos: Annotated[bool | None, "Go on past the model's end token."] = None
    tree: Annotated[
        str | None,
        "Grow each group as a tree: width=16,depth=8,segment_tokens=64, and other fields of TreeSpec (see the README).",
    ] = None
    seed: Annotated[int | None, "Makes each trajectory's sampling repeatable. Default: the engine's stream."] = None


@dataclass(frozen=True, kw_only=True)
class ServerOptions(OptionGroup):
    """Fields of `ServerConfig`, besides the key."""

    HEADING = "Server"
    DEFAULTS = ServerConfig

    host: Annotated[str | None, "Address to listen on."] = None
    port: Annotated[int | None, "0 lets the system pick; the line LONGTAIL_SERVING says which."] = None
    rl_routes: Annotated[bool, "Have vLLM's routes for trainers (pause, weight update)."] = False
    allow_remote_without_key: Annotated[bool, "Listen beyond this machine although there is no key."] = False
    allowed_origins: Annotated[list[str] | None, "Origin of web pages that may call. Repeatable."] = None
    access_log: Annotated[bool, "A line for each request."] = False
    max_body_bytes: Annotated[int | None, "Longest request body."] = None
    max_members: Annotated[int | None, "Most members of one round."] = None
    frontend_arg: Annotated[list[str] | None, "A further option of vLLM's front end, NAME=JSON. Repeatable."] = None

    def given(self) -> dict[str, Any]:
        """What the user set, as arguments of `serve`."""
        fields = super().given()
        if "frontend_arg" in fields:
            fields["frontend_args"] = dict(_named_value("frontend_arg", text) for text in fields.pop("frontend_arg"))
        return fields


@dataclass(frozen=True, kw_only=True)
class BridgeOptions(OptionGroup):
    """The bridge to a trainer, fields of `BridgeConfig` besides the port of the metrics."""

    HEADING = "Bridge"

    bridge: Annotated[
        str | None, "Serve a trainer over ZeroMQ at tcp://HOST:PORT, instead of HTTP; port 0 lets the system pick."
    ] = None
    state: Annotated[
        Path | None, "Folder of what survives a restart: carried groups, prompts, deliveries. Default: in memory."
    ] = None
    keys: Annotated[Path | None, "Folder of CURVE keys (longtail keys DIR), required off loopback."] = None
    insecure_no_auth: Annotated[bool, "Listen beyond this machine although there are no keys."] = False
    metrics_port: Annotated[int | None, "Serve Prometheus series at this port of 127.0.0.1."] = None
    heartbeat_s: Annotated[float | None, "Seconds between two signs of life. Default: 1."] = None
    max_unacked: Annotated[
        int | None, "No round starts while so many deliveries are not acknowledged. Default: 4096."
    ] = None
    max_unacked_bytes: Annotated[int | None, "The same in bytes. Default: 1 GiB."] = None


@dataclass(frozen=True, kw_only=True)
class CarryOptions(OptionGroup):
    """Fields of `CarryConfig` that a bridge's rounds have."""

    HEADING = "Rounds of a bridge, which carry unfinished groups over"
    DEFAULTS = CarryConfig

    kv_policy: Annotated[str | None, "What new weights do to KV: fresh, stale or stale_up_to:k."] = None
    park: Annotated[bool | None, "Keep the KV of cut trajectories."] = None
    share_prefix: Annotated[bool | None, "Let new requests use prefix blocks of older weights."] = None
    max_staleness: Annotated[int | None, "Versions that a token may be old when returned. Default: no bound."] = None
    on_stale: Annotated[Literal["mask", "restart", "drop"] | None, "What happens beyond it."] = None
    admission: Annotated[
        Literal["carried_first", "nearly_complete_first", "longest_remaining_first", "fifo"] | None,
        "Which carried groups run first.",
    ] = None
    target_carried: Annotated[int | None, "Aim at so many carried groups a round."] = None


@dataclass(frozen=True, kw_only=True)
class DemoOptions(OptionGroup):
    """What the training demo does, fields of `DemoSettings`."""

    HEADING = "Training"

    task: Annotated[
        str | None, "euclid, or a reasoning-gym task for SmolLM2-135M (slow on few cores). Default: euclid."
    ] = None
    steps: Annotated[int | None, "Optimiser steps. Default: 60."] = None
    target_groups: Annotated[int | None, "Groups of a step. Default: 8."] = None
    group_size: Annotated[int | None, "Samples of each prompt. Default: 8."] = None
    over_provision: Annotated[float | None, "Groups in flight for each of a step; 1 waits for all. Default: 2."] = None
    learning_rate: Annotated[float | None, "Of AdamW. Default: the task's."] = None
    evaluate_every: Annotated[int | None, "Steps between two evaluations on held-out prompts. Default: 10."] = None
    num_evaluated: Annotated[int | None, "Held-out prompts of an evaluation. Default: 256."] = None
    warm_up_updates: Annotated[int | None, "Of euclid's base model, if it has to be made. Default: 700."] = None
    seed: Annotated[int | None, "Of the prompts and of the engine's sampling. Default: 0."] = None
    threads: Annotated[int | None, "Of the trainer. Default: 1 for euclid, else torch's choice."] = None


@dataclass(frozen=True, kw_only=True)
class CommonOptions(OptionGroup):
    """What every command has."""

    HEADING = "Output"

    verbose: Annotated[bool, "Show what vLLM says."] = False
    debug: Annotated[bool, "Show tracebacks."] = False


#: Options that belong to no group.
_SINGLE_OPTIONS = frozenset({"api_key", "continue", "core", "out", "overwrite", "rebuild", "report", "verify"})
#: Fields of errors whose option is called otherwise.
_NAMED = {
    "task.size": "num_prompts",
    "task.seed": "task_seed",
    "engine.seed": "engine_seed",
    "bridge.address": "bridge",
}
_SECTION = re.compile(r"^(engine|sampling|runtime|server|bridge|carry)\.")

CoreOption = Annotated[
    CoreMode | None,
    typer.Option(help="Engine core in its own process or in this one. Default: process.", rich_help_panel="Engine"),
]


def engine_fields(engine: EngineOptions, runtime: RuntimeOptions, core: CoreMode | None = None) -> dict[str, Any]:
    """What the user set of an `EngineConfig`, by its field names, as JSON values."""
    fields = engine.given()
    if "engine_seed" in fields:
        fields["seed"] = fields.pop("engine_seed")
    if "vllm_arg" in fields:
        fields["vllm_args"] = dict(_named_value("vllm_arg", text) for text in fields.pop("vllm_arg"))
    if core is not None:
        fields["core"] = core
    if chosen := runtime.given():
        fields["runtime"] = chosen
    return fields


def engine_config(model: str, fields: Mapping[str, Any]) -> EngineConfig:
    """The configuration that `engine_fields` describe.

    Raises:
        InvalidInputError: a value is wrong, or a field is none (a sidecar may have been edited).

    """
    values = dict(fields)
    try:
        runtime = RuntimeConfig(**values.pop("runtime", {}))
        return EngineConfig(model=model, runtime=runtime, **values)
    except TypeError as error:
        raise InvalidInputError("engine", f"fields of EngineConfig ({error})", fields) from error


def flag_of(field: str) -> str:
    """A field's path in an error, as the user typed it: `sampling.top_p` is `--top-p`."""
    named = _NAMED.get(field, field)
    name = _SECTION.sub("", named)
    stem = re.sub(r"\[\d+\]$", "", name)
    head, dot, inner = stem.partition(".")
    known = head in _SINGLE_OPTIONS or any(head in kind.__dataclass_fields__ for kind in OptionGroup.__subclasses__())
    if not known:
        return field
    return f"--{head.replace('_', '-')} {inner}" if dot else f"--{name.replace('_', '-')}"


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Give `function` an option for each field of the option groups that it takes; show its errors as lines."""
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type[OptionGroup]] = {}
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        if isinstance(kind, type) and issubclass(kind, OptionGroup):
            groups[parameter.name] = kind
            parameters.extend(_parameters(kind))
        else:
            parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def run(**values: Any) -> None:
        built = {
            name: kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
            for name, kind in groups.items()
        }
        with errors_as_lines(flag_of, debug=any(getattr(group, "debug", False) for group in built.values())):
            function(**values, **built)

    # What typer reads; `wraps` would show it the signature with the groups.
    run.__dict__.pop("__wrapped__")
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters(group: type[OptionGroup]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    parameters = []
    for field in dataclasses.fields(group):
        kind, text = hints[field.name].__origin__, hints[field.name].__metadata__[0]
        # typer adds the --no- form of a switch, in a column of its own, which leaves little room to a long list.
        names = (f"--{field.name.replace('_', '-')}",) if kind is bool else ()
        heading = group.SWITCHES if group.SWITCHES and kind == bool | None else group.HEADING
        option = typer.Option(*names, help=text + _default_words(group, field.name), rich_help_panel=heading)
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, option]
            )
        )
    return parameters


def _default_words(group: type[OptionGroup], name: str) -> str:
    defaults = {} if group.DEFAULTS is None else {f.name: f.default for f in dataclasses.fields(group.DEFAULTS)}
    default = defaults.get(name)
    if default in (None, (), dataclasses.MISSING):
        return ""
    if isinstance(default, bool):
        return f" Default: {'yes' if default else 'no'}."
    return f" Default: {default:g}." if isinstance(default, float) else f" Default: {default}."


def _named_value(option: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidInputError(option, "NAME=VALUE, the value as JSON or a plain string", text)
    try:
        return name.replace("-", "_"), msgspec.json.decode(value)
    except msgspec.DecodeError:
        return name.replace("-", "_"), value
