"""Where a model comes from: a local checkpoint folder, or a name that is built into the user's cache.

`resolve_model` turns what a user wrote into a folder that vLLM can load, and checks that the folder has what
loading needs. It downloads nothing: a model hub's name that is no folder is an error. It does not open the
weights, and it asks for no tokenizer, because token-in token-out use needs none. The one known name is
`smollm2`; a folder of that name is reached as `./smollm2`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from longtail.engine.errors import ModelSourceError
from longtail.engine.gguf_checkpoint import Progress
from longtail.engine.smollm2 import SMOLLM2, build_smollm2, cache_root

__all__ = ["SMOLLM2", "Progress", "build_smollm2", "cache_root", "resolve_model"]

_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")
_NOT_WEIGHTS = re.compile(r"^(training_args|optimizer|scheduler|rng_state.*|adapter_model)\.(bin|pt|safetensors)$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_LFS_POINTER = b"version https://git-lfs"


def resolve_model(name_or_path: str, dtype: str = "float32", *, progress: Progress | None = None) -> Path:
    """The absolute checkpoint folder of a model that a user named.

    Args:
        name_or_path: `smollm2`, or a local folder with `config.json` and weights.
        dtype: decides which SmolLM2 is built: `bfloat16`, or float32 for everything else that an
            `EngineConfig` takes. A folder is returned as it is.
        progress: told what a build does, and how far it is.

    Raises:
        ModelSourceError: says what is missing and what to do.

    """
    if name_or_path == SMOLLM2:
        return build_smollm2("bfloat16" if dtype == "bfloat16" else "float32", progress)
    folder = Path(name_or_path).expanduser().absolute()
    if folder.is_file():
        raise ModelSourceError(f"{name_or_path} is a file; name the folder that holds config.json and the weights")
    if not folder.is_dir():
        if _HUB_ID.match(name_or_path):
            raise ModelSourceError(
                f"{name_or_path} is no folder here; longtail takes local checkpoint folders and downloads nothing. "
                f"If it is a model on a hub, fetch it first (`hf download {name_or_path} --local-dir DIR`) and name DIR"
            )
        raise ModelSourceError(f"{folder} does not exist; name a local checkpoint folder, or `{SMOLLM2}`")
    _check_checkpoint(folder)
    return folder


def _check_checkpoint(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ModelSourceError(f"{folder} has no config.json; a checkpoint folder holds config.json and the weights")
    try:
        parsed = json.loads(config.read_bytes())
    except ValueError as error:
        raise ModelSourceError(f"{config} is not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ModelSourceError(f"{config} holds no JSON object")
    wanted: set[str] = set()
    for index in sorted(folder.glob("*.index.json")):
        try:
            wanted |= set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelSourceError(f"{index} is not an index of weight files ({error!r})") from error
    if missing := sorted(name for name in wanted if not (folder / name).is_file()):
        raise ModelSourceError(f"{folder} lacks {len(missing)} weight files that its index names: {missing[:3]}")
    weights = [p for pattern in _WEIGHT_PATTERNS for p in folder.glob(pattern) if not _NOT_WEIGHTS.match(p.name)]
    if not weights:
        raise ModelSourceError(f"{folder} has no weights ({', '.join(_WEIGHT_PATTERNS)})")
    for path in weights:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ModelSourceError(f"{path} is a git-lfs pointer, not weights; run `git lfs pull` in {folder}")
