"""Errors of the hooks; the shared roots are in `longtail.scheduler.errors`."""

from __future__ import annotations

from longtail.scheduler.errors import InvalidInputError, LongtailError, shown


class HookError(LongtailError, RuntimeError):
    """A hook failed, and its failure ends the round. `__cause__` is what the hook raised, if it raised.

    Attributes:
        hook: position and name of the hook, e.g. `hooks[0] (Judge)`.
        point: the method that failed, e.g. `on_trajectory`.
        subject: what it was called for, e.g. `trajectory 7/g3/0`.
        what: what happened, e.g. `took longer than 60 s`.

    """

    def __init__(self, hook: str, point: str, subject: str, what: str) -> None:
        self.hook = hook
        self.point = point
        self.subject = subject
        self.what = what
        super().__init__(f"{point} of {hook} failed for {subject}: {what}")


class StuckHooksError(HookError):
    """So many threads are held by hooks past their time limit that no further one is started for a call.

    It ends the round whatever `on_failure` says. Calls are taken again once some of the threads have come back.
    """


__all__ = ["HookError", "InvalidInputError", "LongtailError", "StuckHooksError", "shown"]
