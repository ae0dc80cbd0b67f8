"""`longtail keys`: CURVE keys of a bridge, as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from longtail.engine.errors import InvalidInputError


def write_keys(folder: Path, clients: Sequence[str], console: Console) -> None:
    """Make the service's keys, unless the folder has them, and those of each client; say what goes where.

    Raises:
        InvalidInputError: a client has keys already, or the folder can't be written.

    """
    from longtail.trainer_bridge.keys import SERVER, make_keys

    names = list(dict.fromkeys(clients))
    if SERVER in names:
        raise InvalidInputError("client", f"another name, because {SERVER} is the service", SERVER)
    new = names if (folder / f"{SERVER}.key_secret").exists() else [SERVER, *names]
    try:
        paths = make_keys(folder, tuple(new))
    except InvalidInputError as error:
        raise InvalidInputError("folder", error.expected, str(folder)) from error
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)
    lines = [f"The service: longtail serve --bridge ADDRESS --keys {folder}"]
    lines += [f"{name} needs {SERVER}.key and {name}.key_secret of it, and nobody else the latter." for name in names]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
