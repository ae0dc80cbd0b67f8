"""The reference trainer's checkpoint: one safetensors file, replaced at once or not at all.

Tensors are `model.<name>` (parameters and persistent buffers, tied ones once), `optimizer.<parameter>.<name>`, the
order's generator and torch's own random state as `random.<device>`. The header's metadata has the rest as JSON under
`longtail`. Nothing in the file runs code when it is read.

A save is on the disk when `write` returns. Until then `PATH.writing` may exist, and what `PATH` held is intact.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longtail.engine.durable_files import replacing
from longtail.trainer_bridge.errors import InvalidInputError

_FORMAT = "longtail trainer 1"


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers under the names of `state_dict`; of tied ones only the first."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in seen:
            seen.add(place)
            yield name, tensor


def write(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    order: torch.Generator,
    state: dict[str, Any],
    extra: dict[str, Any],
) -> None:
    """Write everything; see the module.

    Raises:
        InvalidInputError: `extra`, or something in the optimizer's state that is no tensor, is not what JSON can say.

    """
    tensors = {f"model.{name}": tensor for name, tensor in named_tensors(model)}
    saved = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, values in saved["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{parameter}.{name}"] = value
            else:
                scalars.setdefault(str(parameter), {})[name] = value
    tensors["random.order"] = order.get_state()
    for device, values in _random_states(model).items():
        tensors[f"random.{device}"] = values
    if msgspec.json.decode(_json(extra, "extra")) != extra:
        raise InvalidInputError("extra", "what JSON gives back as it was: no tuples, NaN or keys but text", extra)
    rest = {
        "format": _FORMAT,
        "state": state,
        "extra": extra,
        "optimizer": type(optimizer).__name__,
        "param_groups": saved["param_groups"],
        "scalars": scalars,
    }
    # One key: the order of several is random, and equal states are to be equal files.
    metadata = {"longtail": _json(rest, "optimizer")}
    with replacing(path, ".writing") as new:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new, metadata)


def read(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, order: torch.Generator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put everything back where it came from; returns `state` and `extra`.

    Raises:
        FileNotFoundError: no such file.
        InvalidInputError: it is not a whole checkpoint, or one of another model or optimizer; nothing was changed.

    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except SafetensorError as error:
        raise InvalidInputError(str(path), "a checkpoint of the trainer", str(error)) from error
    try:
        rest = msgspec.json.decode(metadata["longtail"])
        if rest["format"] != _FORMAT:
            raise InvalidInputError(f"{path}: format", _FORMAT, rest["format"])
    except (KeyError, TypeError, msgspec.DecodeError) as error:
        raise InvalidInputError(str(path), "a checkpoint of the trainer", f"metadata {sorted(metadata)}") from error
    optimizer_state = _optimizer_state(path, tensors, rest, optimizer)
    targets = dict(named_tensors(model))
    stored = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    _check_same(path, "model", stored, targets)
    random = {name.removeprefix("random."): tensor for name, tensor in tensors.items() if name.startswith("random.")}
    if not {"cpu", "order"} <= random.keys():
        raise InvalidInputError(f"{path}: random state", "of the CPU and the order", sorted(random))

    with torch.no_grad():
        for name, tensor in stored.items():
            targets[name].copy_(tensor)
    optimizer.load_state_dict(optimizer_state)
    order.set_state(random["order"])
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and _device(model).type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], _device(model))
    return rest["state"], rest["extra"]


def _optimizer_state(
    path: Path, tensors: dict[str, Tensor], rest: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """What `Optimizer.load_state_dict` takes."""
    groups = [
        {name: tuple(value) if isinstance(value, list) and name != "params" else value for name, value in group.items()}
        for group in rest["param_groups"]
    ]
    here = type(optimizer).__name__, [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if (there := (rest["optimizer"], [group["params"] for group in groups])) != here:
        raise InvalidInputError(f"{path}: optimizer and its parameters", str(here), there)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["scalars"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            expected = parameters[int(index)].shape
            if tensor.dim() > 0 and tensor.shape != expected:
                raise InvalidInputError(f"{path}: {name}", f"shape {list(expected)}", list(tensor.shape))
            state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": groups}


def _check_same(path: Path, what: str, stored: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    def described(tensors: dict[str, Tensor], name: str) -> str:
        return f"{tensors[name].dtype} {list(tensors[name].shape)}" if name in tensors else "nothing"

    for name in sorted(stored.keys() | targets.keys()):
        if (got := described(stored, name)) != (expected := described(targets, name)):
            raise InvalidInputError(f"{path}: {what} {name}", expected, got)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _random_states(model: nn.Module) -> dict[str, Tensor]:
    """Random states of the CPU and of the model's device, uint8."""
    states = {"cpu": torch.get_rng_state()}
    if (device := _device(model)).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _json(value: object, name: str) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise InvalidInputError(name, "what JSON can say", str(error)) from error
