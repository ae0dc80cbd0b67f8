"""What the fast start swaps while an engine is built on a CPU, and puts back: no lasting change, only its sources.

`longtail.engine.startup` and `light_imports` hold the code. It is listed here so that the sources that it was written
against are checked like any other.
"""

from __future__ import annotations

from longtail.engine.patches.entry import Entry, Source

ENTRY = Entry(
    name="cpu-fast-start",
    what="While an engine is built: its core is a process that runs already, and model classes are looked at in place.",
    why="Stock vLLM starts three Pythons in turn, and imports the compilation stack that it then turns off.",
    upstream=(),
    versions=("0.32.0",),
    where="cpu",
    changes=(),
    relies_on=(
        Source("vllm.utils.system_utils", "get_mp_context", "689fcfe7a9c5e042"),
        Source("vllm.v1.engine.utils", "CoreEngineProcManager.__init__", "1a7eaa8dbc7b9be9"),
        Source("vllm.model_executor.models.registry", "_run_in_subprocess", "f2889724a1132f41"),
        Source("vllm.env_override", "_patch_inductor_fallback_allow_list", "50cf0b5a1efe05ed"),
    ),
)
