"""Start a CPU engine fast: the one block to build vLLM's engine in.

`fast_start` puts these around the constructor: the CPU run-time (`runtime.py`), light imports (`light_imports.py`),
and a core process that does not import after its parent what the parent has imported. In a fresh process the core is
forked (`core_process.py`); otherwise it is a new process that is started before the imports (`early_core.py`). vLLM
also starts a Python of its own to look at a model class for the first time, which it does to keep CUDA out of the
parent; on a CPU it is done here, and takes a second instead of a start of vLLM.

Nothing of torch or vLLM may be imported before the block for its full effect; imported they may be, and then it only
takes longer. On a GPU the block only sees to it that a core ends with its parent.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from longtail.engine.config import EngineConfig
from longtail.engine.core_process import STOCK_METHODS, ForkedCores, can_fork_core, start_cores_with
from longtail.engine.early_core import EarlyCore
from longtail.engine.inline_runtime import activate_inline, load_intel
from longtail.engine.light_imports import light_imports
from longtail.engine.runtime import CpuRuntime, pick_runtime, spawn_environment


@contextmanager
def fast_start(config: EngineConfig, model_dir: Path) -> Iterator[CpuRuntime]:
    """Build vLLM's configuration and engine in this block; gives the CPU run-time that is in force.

    Raises:
        InvalidInputError: `config.runtime` or the environment asks for a library that is not there.

    """
    runtime = pick_runtime(config.runtime, model_dir=model_dir)
    if not runtime.applies:
        with start_cores_with(STOCK_METHODS):
            yield runtime
        return
    with ExitStack() as stack:
        eager = config.enforce_eager is not False
        if config.core == "inline":
            runtime = stack.enter_context(activate_inline(runtime))
            _import_core(stack, eager=eager)
            # The core, if there is one in the end, thaws the heap when it shuts down.
            stack.push(lambda kind, *_: None if kind is None else gc.unfreeze())
        elif can_fork_core(runtime) and load_intel(runtime) is None:
            cores = ForkedCores()
            _import_core(stack, eager=eager)
            stack.enter_context(start_cores_with({"spawn": cores}))
            stack.callback(gc.unfreeze)
            stack.enter_context(spawn_environment(runtime))
        else:
            core = stack.enter_context(EarlyCore.launch(runtime.environment(), eager=eager))
            stack.enter_context(light_imports(eager=eager))
            import vllm.v1.engine.llm_engine  # noqa: F401

            stack.enter_context(core.lend())
            # Only now: this process's own torch reads these variables when it is imported.
            stack.enter_context(spawn_environment(runtime))
        stack.enter_context(_inspect_models_here())
        yield runtime


def _import_core(stack: ExitStack, *, eager: bool) -> None:
    """Import what the front end and the core need."""
    # What is frozen below is not freed before it is thawed, so it must not include garbage that a trainer had before.
    gc.collect()
    stack.enter_context(light_imports(eager=eager))
    import vllm.model_executor.model_loader.default_loader
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    # vLLM freezes the heap at the end of the start, after a collection that this makes short.
    gc.freeze()


@contextmanager
def _inspect_models_here() -> Iterator[None]:
    import vllm.model_executor.models.registry as registry

    names: Any = vars(registry)
    stock = names["_run_in_subprocess"]

    def run_here(inspect: Callable[[], Any]) -> Any:
        return inspect()

    names["_run_in_subprocess"] = run_here
    try:
        yield
    finally:
        names["_run_in_subprocess"] = stock
