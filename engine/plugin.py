"""vLLM's way in: the `vllm.general_plugins` entry point, which puts the patch ledger into every vLLM process.

vLLM loads general plugins in the front end, in the engine core, in each worker and in its model-inspection helper.
Importing this module must not fail and costs nothing: vLLM logs a plugin that cannot be imported and goes on without
it. What `register` raises does stop the process.
"""

from __future__ import annotations


def register() -> None:
    """Put the ledger and the weight transfer backends into this process.

    Raises:
        PatchLedgerError: this vLLM is not the one that the ledger was written for.

    """
    from longtail.engine.patches import ledger

    try:
        ledger.apply()
    except Exception:
        import vllm.plugins

        # vLLM marks its plugins as loaded first: without this, a second attempt in this process would run unpatched.
        vllm.plugins.plugins_loaded = False
        raise
    from longtail.engine.weight_backend import register_backends

    register_backends()
