"""Frozen, validated configuration: one dataclass a concern, checked when it is built.

Nothing here imports torch or vLLM, so that a command line or a launcher can build and reject a
configuration in milliseconds. What a field means on vLLM's side is decided in `vllm_args.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeVar

from longtail.engine.carry_config import CarryConfig
from longtail.engine.errors import InvalidInputError
from longtail.scheduler.tree_policy import TreeSpec

CoreMode = Literal["process", "inline"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

WeightTransfer = Literal["longtail", "nccl", "ipc"]

T = TypeVar("T")

MAX_SEED = 2**63 - 1


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bound = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
        raise InvalidInputError(name, bound, value)


def _check_float(name: str, value: object, low: float, high: float | None = None, *, open_low: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (
        not number
        or not math.isfinite(value)  # type: ignore[arg-type]
        or value < low  # type: ignore[operator]
        or (open_low and value == low)
        or (high is not None and value > high)  # type: ignore[operator]
    ):
        left = "(" if open_low else "["
        bound = f"a finite number in {left}{low:g}, {'inf)' if high is None else f'{high:g}]'}"
        raise InvalidInputError(name, bound, value)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidInputError(name, "one of " + ", ".join(choices), value)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How the CPU is used. `None` means that longtail picks, and prints what it picked.

    A field that is set, and an environment variable that the user had set before, always win over the pick.

    Attributes:
        omp_library: `intel` (libiomp5, comes with the lock), `gnu` (the libgomp that torch carries).
        omp_threads: compute threads of one engine.
        block_time_ms: how long an idle OpenMP thread spins before it sleeps (`KMP_BLOCKTIME`).
        allocator: `tcmalloc` when the system has it, or `system`.

    """

    omp_library: Literal["intel", "gnu"] | None = None
    omp_threads: int | None = None
    block_time_ms: int | None = None
    allocator: Literal["tcmalloc", "system"] | None = None

    def __post_init__(self) -> None:
        if self.omp_library is not None:
            _check_choice("runtime.omp_library", self.omp_library, ("intel", "gnu"))
        if self.omp_threads is not None:
            _check_int("runtime.omp_threads", self.omp_threads, 1, 1024)
        if self.block_time_ms is not None:
            _check_int("runtime.block_time_ms", self.block_time_ms, 0, 3_600_000)
        if self.allocator is not None:
            _check_choice("runtime.allocator", self.allocator, ("tcmalloc", "system"))


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One engine.

    Attributes:
        model: a local checkpoint folder, or a name that `longtail model` knows (`smollm2`).
        dtype: `auto` is float32 on a CPU (bfloat16 falls off a cliff without AVX-512) and the checkpoint's
            own elsewhere.
        core: `process` runs the engine core in its own process, `inline` in this one.
        max_model_len: longest prompt + output in tokens; the checkpoint's own by default.
        max_num_seqs: how many trajectories run at once.
        max_num_batched_tokens: tokens of one step; vLLM's choice by default.
        block_size: tokens of one KV block; vLLM's choice by default (a multiple of 32 on a CPU).
        kv_cache_gib: KV pool of a CPU engine in GiB.
        gpu_memory_utilization: share of a GPU's memory; vLLM's default when `None`. Has no effect on a CPU.
        enable_prefix_caching: share the KV of equal prefixes; groups profit from it.
        async_scheduling: schedule step t+1 while step t runs; vLLM's own choice by default.
        enforce_eager: no compilation and no graphs; by default true on a CPU only.
        load_tokenizer: false for token-in token-out only (no text, chat or stop strings).
        seed: of the engine; a request's own seed is in `SamplingConfig`.
        weight_version: version of the checkpoint's weights, which staleness is counted from; each later update has a
            version of its own. Not below those that the journal of `carry` has tokens of.
        weight_transfer: how new weights reach the model: `longtail`, through shared memory from
            `update_weights` and the trainer bridge, or one of vLLM's own ways, `nccl` and `ipc`, for
            `control_weights`. It costs nothing until it is used.
        carry: let rounds leave unfinished groups to the next one; `None` returns them cut.
        start_timeout_s: bound on the start of the engine.
        stall_timeout_s: bound on one engine step; a round whose engine makes no step for so long fails.
        runtime: CPU threads and libraries.
        vllm_args: further fields of vLLM's `EngineArgs`, by name; may not repeat a field above.

    """

    model: str
    dtype: Dtype = "auto"
    core: CoreMode = "process"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    kv_cache_gib: float = 2.0
    gpu_memory_utilization: float | None = None
    enable_prefix_caching: bool = True
    async_scheduling: bool | None = None
    enforce_eager: bool | None = None
    load_tokenizer: bool = True
    seed: int = 0
    weight_version: int = 0
    weight_transfer: WeightTransfer = "longtail"
    carry: CarryConfig | None = None
    start_timeout_s: float = 600.0
    stall_timeout_s: float = 600.0
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    vllm_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise InvalidInputError("engine.model", "a checkpoint folder or a known model name", self.model)
        _check_choice("engine.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _check_choice("engine.core", self.core, ("process", "inline"))
        for name in ("max_model_len", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) is not None:
                _check_int(f"engine.{name}", getattr(self, name), 1)
        _check_int("engine.max_num_seqs", self.max_num_seqs, 1)
        _check_float("engine.kv_cache_gib", self.kv_cache_gib, 0.0, open_low=True)
        if self.gpu_memory_utilization is not None:
            _check_float("engine.gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0, open_low=True)
        _check_int("engine.seed", self.seed, 0, MAX_SEED)
        _check_int("engine.weight_version", self.weight_version, 0)
        _check_choice("engine.weight_transfer", self.weight_transfer, ("longtail", "nccl", "ipc"))
        if self.carry is not None and not isinstance(self.carry, CarryConfig):
            raise InvalidInputError("engine.carry", "a CarryConfig", self.carry)
        for name in ("start_timeout_s", "stall_timeout_s"):
            _check_float(f"engine.{name}", getattr(self, name), 0.0, open_low=True)
        own = set(self.__dataclass_fields__)
        own |= {"scheduler_cls", "logprobs_mode", "skip_tokenizer_init", "weight_transfer_config"}
        for name in self.vllm_args:
            if name in own:
                raise InvalidInputError(f"engine.vllm_args.{name}", "a field that longtail does not set itself", name)


@dataclass(frozen=True, kw_only=True)
class RepetitionStop:
    """Where a trajectory ends because it repeats itself; vLLM's `RepetitionDetectionParams`.

    Attributes:
        max_pattern: longest pattern, in tokens.
        min_pattern: shortest one.
        min_count: how often it comes, one right after the other.

    """

    max_pattern: int
    min_pattern: int = 1
    min_count: int = 8

    def __post_init__(self) -> None:
        _check_int("sampling.stop_repetition.max_pattern", self.max_pattern, 1, 4096)
        _check_int("sampling.stop_repetition.min_pattern", self.min_pattern, 1, self.max_pattern)
        _check_int("sampling.stop_repetition.min_count", self.min_count, 2, 4096)


def checked_fields(kind: type[T], value: object, field: str) -> T:
    """A `kind`, which is a dataclass, or one from a mapping of its fields, as JSON has it.

    Raises:
        InvalidInputError: it is neither, or a field is none of it or is missing; named below `field`.

    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise InvalidInputError(field, f"a {kind.__name__}, or its fields", value)
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    for name in value:
        if name not in known:
            raise InvalidInputError(f"{field}.{name}", "one of " + ", ".join(known), name)
    for name, one in known.items():
        if one.default is MISSING and name not in value:
            raise InvalidInputError(f"{field}.{name}", "a value, which has no default", None)
    return kind(**value)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How every member of a group is sampled.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        top_k: 0 keeps the whole vocabulary.
        max_tokens: output budget of one trajectory in tokens.
        min_tokens: no stop before this many tokens.
        stop: strings that end a trajectory; checked inside the engine, so that a round counts them exactly.
        stop_token_ids: token ids that end a trajectory, besides the model's own end token.
        stop_at_boxed: end a trajectory with the token that completes a boxed answer, as LaTeX's `boxed` makes one.
        stop_repetition: end it as `repetition` where token ids come again and again, also across boundaries and
            resumes; `RepetitionStop`, or its fields as a mapping.
        ignore_eos: go on past the model's end token.
        boundary_every: stop for `on_boundary` hooks after so many tokens of a segment.
        boundary_token_ids: stop for them after one of these tokens.
        boundary_strings: stop for them after the token that completes one of these strings, such as a closing tag; not
            within the first `min_tokens`.
        tree: grow the members of each group as a tree, whose leaves they are; `TreeSpec`, or its fields as a mapping.
            A path has at most `depth * segment_tokens` tokens.
        seed: member `i` of group `g` of a round samples with `seed + g * group_size + i`; `None` draws from the
            engine's stream. Of rounds that carry over, `g` counts the groups of the whole run.

    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_at_boxed: bool = False
    stop_repetition: RepetitionStop | None = None
    ignore_eos: bool = False
    boundary_every: int | None = None
    boundary_token_ids: tuple[int, ...] = ()
    boundary_strings: tuple[str, ...] = ()
    tree: TreeSpec | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_float("sampling.temperature", self.temperature, 0.0, 100.0)
        _check_float("sampling.top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_int("sampling.top_k", self.top_k, 0)
        _check_int("sampling.max_tokens", self.max_tokens, 1)
        _check_int("sampling.min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("stop", "stop_token_ids", "boundary_token_ids", "boundary_strings"):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise InvalidInputError(f"sampling.{name}", "a list", getattr(self, name))
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("stop", "boundary_strings"):
            for i, text in enumerate(getattr(self, name)):
                if not isinstance(text, str) or not text:
                    raise InvalidInputError(f"sampling.{name}[{i}]", "a non-empty string", text)
        if both := set(self.stop) & set(self.boundary_strings):
            raise InvalidInputError("sampling.boundary_strings", "strings that `stop` does not have", sorted(both))
        for name in ("stop_token_ids", "boundary_token_ids"):
            for i, token_id in enumerate(getattr(self, name)):
                _check_int(f"sampling.{name}[{i}]", token_id, 0)
        if self.boundary_every is not None:
            _check_int("sampling.boundary_every", self.boundary_every, 1)
        for name in ("ignore_eos", "stop_at_boxed"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"sampling.{name}", "true or false", getattr(self, name))
        if self.stop_repetition is not None:
            value = checked_fields(RepetitionStop, self.stop_repetition, "sampling.stop_repetition")
            object.__setattr__(self, "stop_repetition", value)
        if self.tree is not None:
            object.__setattr__(self, "tree", checked_fields(TreeSpec, self.tree, "sampling.tree"))
            if self.has_boundaries:
                raise InvalidInputError("sampling.tree", "no boundaries of hooks with it", self.tree)
        if self.seed is not None:
            _check_int("sampling.seed", self.seed, 0, MAX_SEED)

    def num_members(self, group_size: int) -> int:
        """Members of a group: `group_size`, or the width of the tree, which `group_size` may say too.

        Raises:
            InvalidInputError: it says something else.

        """
        if self.tree is None:
            return group_size
        if group_size not in (1, self.tree.width):
            raise InvalidInputError("group_size", f"{self.tree.width}, the width of the tree, or nothing", group_size)
        return self.tree.width

    @property
    def has_boundaries(self) -> bool:
        """Trajectories stop for `on_boundary` hooks."""
        return self.boundary_every is not None or bool(self.boundary_token_ids or self.boundary_strings)
