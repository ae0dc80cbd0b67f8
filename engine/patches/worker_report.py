"""Each worker tells which ledger entries it has: one method on vLLM's `WorkerBase`.

vLLM only logs a plugin that it cannot import, so that a worker could run without the ledger and nobody would know.
"""

from __future__ import annotations

from typing import Any

from longtail.engine.patches.entry import Change, Entry, Source


def _make_longtail_ledger(stock: None, owner: type) -> Any:
    def longtail_ledger(self: Any) -> dict[str, Any]:
        """The ledger state of this worker's process, as plain data."""
        import msgspec

        from longtail.engine.patches import ledger

        state: dict[str, Any] = msgspec.to_builtins(ledger.states(f"worker {self.rank}"))
        return state

    return longtail_ledger


ENTRY = Entry(
    name="worker-report",
    what="WorkerBase has `longtail_ledger()`, for `collective_rpc`.",
    why="Nothing in vLLM says whether a worker process has loaded a plugin.",
    upstream=(),
    versions=("0.32.0",),
    where="everywhere",
    changes=(Change("vllm.v1.worker.worker_base", "WorkerBase.longtail_ledger", _make_longtail_ledger),),
    relies_on=(Source("vllm.v1.serial_utils", "run_method", "7b7b64d2db5da121"),),
)
