"""What a worker says of an update of its weights: plain data on the way, typed errors at both ends.

{}                                      it has the new weights
{"invalid": [field, expected, got]}     nothing was changed
{"failed": text}                        they did not load, and it has the old ones
{"lost": text}                          they did not load, and the old ones did not either
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longtail.engine.errors import InvalidInputError, LongtailError, WeightsApplyError


class WeightsLostError(LongtailError, RuntimeError):
    """A model has neither the new weights nor the old ones: it must not be used any more."""


def answered(update: Callable[[], None]) -> dict[str, Any]:
    """Call `update` in a worker, and answer."""
    try:
        update()
    except InvalidInputError as error:
        return {"invalid": [error.field, error.expected, error.got]}
    except WeightsLostError as error:
        return {"lost": str(error)}
    except Exception as error:
        return {"failed": str(error) if isinstance(error, WeightsApplyError) else f"{type(error).__name__}: {error}"}
    return {}


def raise_worst(answers: Sequence[Mapping[str, Any]]) -> None:
    """Raise what the workers' answers amount to, if anything.

    Raises:
        WeightsLostError, WeightsApplyError, InvalidInputError: in this order, what one of them says.

    """
    for kind in ("lost", "failed", "invalid"):
        for answer in answers:
            if (found := answer.get(kind)) is not None:
                if kind == "invalid":
                    raise InvalidInputError(found[0], found[1], _Shown(found[2]))
                raise (WeightsLostError if kind == "lost" else WeightsApplyError)(found)


class _Shown(str):
    """Text that is a `repr` already."""

    def __repr__(self) -> str:
        return str(self)
