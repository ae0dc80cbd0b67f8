"""An event loop in a daemon thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time


class LoopThread:
    """Runs from construction until `stop`, or to the end of the process, which it never delays."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self, deadline: float) -> None:
        """Cancel what runs, and wait until `deadline` (of `time.monotonic`) for it and for the thread to end."""
        try:
            self.loop.call_soon_threadsafe(self._cancel_all, deadline)
        except RuntimeError:  # the loop is closed
            return
        if threading.current_thread() is not self._thread:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def stop_when_idle(self) -> None:
        """End the thread once everything that runs has ended. From any thread; returns at once."""
        asyncio.run_coroutine_threadsafe(self._wind_up(None), self.loop)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()

    def _cancel_all(self, deadline: float) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        # The loop has only a weak reference to its tasks.
        self._winding_up = self.loop.create_task(self._wind_up(max(0.0, deadline - time.monotonic())))

    async def _wind_up(self, patience_s: float | None) -> None:
        if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(tasks, timeout=patience_s)
        self.loop.stop()
