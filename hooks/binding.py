"""From the objects of a recipe to the calls that the runner makes: looks at every hook once and refuses bad ones."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longtail.hooks.errors import InvalidInputError
from longtail.hooks.protocol import (
    DEFAULT_ON_FAILURE,
    DEFAULT_TIME_LIMIT_S,
    ON_FAILURE,
    POINTS,
    OnFailure,
    Point,
)


@dataclass(frozen=True, slots=True)
class HookCall:
    """One method of one hook.

    Attributes:
        hook: position and name, for messages.
        time_limit_s: how long one call may take, in seconds.
        on_failure: what a failure leads to at this point, `reject` only where there is a group to reject.

    """

    hook: str
    point: Point
    function: Callable[[Any], Any]
    is_async: bool
    time_limit_s: float
    on_failure: OnFailure


def bind_hooks(hooks: Sequence[object]) -> list[HookCall]:
    """The methods of all hooks, in the order of the hooks.

    Raises:
        InvalidInputError: `hooks` is no sequence, or `hooks[i]` is a class, has none of the methods, one of unknown
            name that starts with `on_`, or an attribute out of its range.

    """
    if isinstance(hooks, (str, bytes)) or not isinstance(hooks, Sequence):
        raise InvalidInputError("hooks", "a list of hooks", hooks)
    return [call for position, hook in enumerate(hooks) for call in _bind(hook, f"hooks[{position}]")]


def is_coroutine_function(function: object) -> bool:
    """Whether calling it gives a coroutine; sees through `functools.partial` and `__call__`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _bind(hook: object, where: str) -> list[HookCall]:
    if isinstance(hook, type):
        raise InvalidInputError(where, f"a hook, as in {hook.__name__}(), not its class", hook)
    _refuse_unknown_methods(hook, where)
    methods = {point: method for point in POINTS if (method := getattr(hook, point, None)) is not None}
    if not methods:
        raise InvalidInputError(where, "an object with one or more of " + ", ".join(POINTS), hook)
    time_limit_s = checked_time_limit(getattr(hook, "time_limit_s", DEFAULT_TIME_LIMIT_S), f"{where}.time_limit_s")
    on_failure = checked_on_failure(getattr(hook, "on_failure", DEFAULT_ON_FAILURE), f"{where}.on_failure")
    name = getattr(hook, "name", None)
    label = f"{where} ({name if isinstance(name, str) and name else type(hook).__name__})"
    calls = []
    for point, method in methods.items():
        if not callable(method):
            raise InvalidInputError(f"{where}.{point}", "a method", method)
        rejects = point in ("on_boundary", "on_trajectory", "on_group")
        outcome: OnFailure = "raise" if on_failure == "reject" and not rejects else on_failure
        function = _with_boundary(method) if point == "on_boundary" else method
        calls.append(HookCall(label, point, function, is_coroutine_function(method), time_limit_s, outcome))
    return calls


def _with_boundary(method: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """`on_boundary`, called with a trajectory that is at a boundary."""
    return lambda trajectory: method(trajectory, trajectory.boundaries[-1])


def _refuse_unknown_methods(hook: object, where: str) -> None:
    for name in dir(hook):
        if name.startswith("on_") and name not in POINTS and callable(getattr(hook, name, None)):
            close = difflib.get_close_matches(name, POINTS, n=1) or [", ".join(POINTS)]
            raise InvalidInputError(f"{where}.{name}", f"a known method ({close[0]}?)", hook)


def checked_time_limit(value: object, where: str) -> float:
    """`value` as seconds.

    Raises:
        InvalidInputError: it is not a finite number > 0.

    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise InvalidInputError(where, "a finite number of seconds > 0", value)
    return float(value)


def checked_on_failure(value: object, where: str) -> OnFailure:
    """`value` as one of the three outcomes.

    Raises:
        InvalidInputError: it is none of them.

    """
    if value not in ON_FAILURE:
        raise InvalidInputError(where, "one of " + ", ".join(ON_FAILURE), value)
    return value
