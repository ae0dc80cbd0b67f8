"""The settings of a run, kept next to its trajectory file, so that continuing it needs no flags.

`save_settings` writes `<file>.run.json` whole or not at all. Settings given again when a run is continued must
agree with it: half a file sampled in one way and half in another is refused. Save them after the file's writer
is open, because the writer's lock is what keeps two runs apart.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from longtail.engine.durable_files import replacing
from longtail.engine.errors import InvalidInputError
from longtail.engine.trajectory_lines import TrajectoryFileError, named_os_error

FORMAT = 1


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides the trajectories of a run.

    Attributes:
        model: as the user named it.
        task: name of the task that the prompts come from; `None` when they come from a file.
        prompts_file: the file of prompts; `None` when they come from a task.
        prompts_sha256: checksum of the prompts file, for telling whether it is still the same.
        num_prompts: how many prompts the run has.
        group_size: samples of each prompt.
        target_groups: complete groups that end the run; `None` for all of them.
        over_provision: prompts run for each group of the target.
        seed: of the task and of sampling.
        sampling: fields of `SamplingConfig`.
        engine: fields of `EngineConfig` that were set.
        format: version of this record.

    """

    model: str
    task: str | None = None
    prompts_file: str | None = None
    prompts_sha256: str | None = None
    num_prompts: int
    group_size: int = 1
    target_groups: int | None = None
    over_provision: float | None = None
    seed: int | None = None
    sampling: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    format: int = FORMAT


def settings_path(trajectory_file: str | os.PathLike[str]) -> Path:
    """Where the settings of a trajectory file are."""
    path = Path(trajectory_file)
    return path.with_name(path.name + ".run.json")


def save_settings(trajectory_file: str | os.PathLike[str], settings: RunSettings) -> Path:
    """Write the settings next to the file, replacing those that are there."""
    path = settings_path(trajectory_file)
    with named_os_error(path, "cannot be written"), replacing(path, f".{os.getpid()}.tmp") as new:
        new.write_bytes(msgspec.json.format(msgspec.json.encode(settings)) + b"\n")
    return path


def load_settings(trajectory_file: str | os.PathLike[str]) -> RunSettings:
    """The settings of a trajectory file.

    Raises:
        TrajectoryFileError: there are none, or they are of a version that this one does not know.

    """
    path = settings_path(trajectory_file)
    with named_os_error(path, "the settings of the run cannot be read"):
        data = path.read_bytes()
    try:
        version = msgspec.json.decode(data, type=dict[str, Any]).get("format")
        if version != FORMAT:
            raise TrajectoryFileError(path, f"has format {version!r}, this version of longtail reads {FORMAT}")
        return msgspec.json.decode(data, type=RunSettings)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise TrajectoryFileError(path, f"is not the settings of a run ({error})") from error


def check_same(settings: RunSettings, given: Mapping[str, Any]) -> None:
    """Refuse settings given again that differ; `given` has only what the user set, `None` meaning not set.

    Values are compared as JSON, and dicts field by field, each under its dotted name.

    Raises:
        InvalidInputError: names the first one that differs.

    """
    recorded = msgspec.to_builtins(settings)
    for name in given:
        if name not in recorded:
            raise InvalidInputError(name, "one of " + ", ".join(recorded), name)
    _compare("", recorded, msgspec.json.decode(msgspec.json.encode(dict(given))))


def _compare(prefix: str, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        known = recorded.get(name)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            _compare(f"{prefix}{name}.", known, value)
        elif value is not None and value != known:
            raise InvalidInputError(f"{prefix}{name}", f"{known!r}, as in the run that is continued", value)
