"""What hooks cost, and how often they fail."""

from __future__ import annotations

import threading

import msgspec

from longtail.hooks.binding import HookCall
from longtail.hooks.protocol import Point


class PointStats(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one hook since the start. Calls that `close()` interrupted are not counted.

    Attributes:
        hook: position and name, e.g. `hooks[0] (Judge)`.
        point: the method, e.g. `on_trajectory`.
        calls: calls that were decided.
        failures: of those, calls without a usable answer.
        timeouts: of the failures, calls past the time limit.
        seconds: sum over the calls of the wall time from having a thread to the answer, or to the limit.

    """

    hook: str
    point: Point
    calls: int = 0
    failures: int = 0
    timeouts: int = 0
    seconds: float = 0.0


class HookStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of all hooks.

    Attributes:
        points: by hook and method, in the order of the hooks; methods that were not called yet too.
        stuck_threads: threads that calls hold past their limit at this moment, blocked event loops included.

    """

    points: list[PointStats]
    stuck_threads: int


class Tally:
    """Counts calls. From any thread."""

    def __init__(self, calls: list[HookCall]) -> None:
        self._lock = threading.Lock()
        self._points = {(call.hook, call.point): PointStats(hook=call.hook, point=call.point) for call in calls}

    def count(self, call: HookCall, *, seconds: float, failed: bool, late: bool) -> bool:
        """Count one call; true for the first that failed."""
        with self._lock:
            before = self._points[call.hook, call.point]
            self._points[call.hook, call.point] = PointStats(
                hook=call.hook,
                point=call.point,
                calls=before.calls + 1,
                failures=before.failures + failed,
                timeouts=before.timeouts + late,
                seconds=before.seconds + seconds,
            )
        return failed and not before.failures

    def snapshot(self, stuck_threads: int) -> HookStats:
        """The counts so far."""
        with self._lock:
            return HookStats(points=list(self._points.values()), stuck_threads=stuck_threads)
