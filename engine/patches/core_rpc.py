"""The front end reaches the scheduler: one RPC method on vLLM's `EngineCore`.

vLLM's clients call any method of `EngineCore` by its name, between two steps, in the engine's thread
(`call_utility`); none reaches the scheduler, and `collective_rpc` goes to workers only. What the method returns
crosses a process boundary, where an exception loses its type: so a refusal is an answer with `invalid` in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longtail.engine.patches.entry import Change, Entry, Source

_WORKER_TIMEOUT_S = 60.0


def _make_rollout_rpc(stock: None, owner: type) -> Any:
    def rollout_rpc(self: Any, op: str, args: Mapping[str, Any]) -> dict[str, Any]:
        """Call `scheduler.rollout_rpc(op, args)`; `op="ledger"` reports the ledger of this process and the workers.

        The answer has `invalid` = (field, expected, got) when the caller asked for what is not there.
        """
        if op == "ledger":
            return ledger_report(self)
        scheduler_rpc = getattr(self.scheduler, "rollout_rpc", None)
        if scheduler_rpc is None:
            return {"invalid": ("scheduler_cls", "a rollout scheduler of longtail", type(self.scheduler).__name__)}
        answer: dict[str, Any] = scheduler_rpc(op, args)
        return answer

    return rollout_rpc


def ledger_report(core: Any) -> dict[str, Any]:
    """The ledger states of the engine core and its workers, as plain data; `failure` when a worker has no ledger."""
    import msgspec

    from longtail.engine.patches import ledger

    report: dict[str, Any] = {"processes": [msgspec.to_builtins(ledger.states("engine core"))]}
    try:
        report["processes"] += core.model_executor.collective_rpc("longtail_ledger", timeout=_WORKER_TIMEOUT_S)
    except (NotImplementedError, RuntimeError, TimeoutError) as error:
        report["failure"] = str(error)
    return report


ENTRY = Entry(
    name="core-rpc",
    what="EngineCore has `rollout_rpc(op, args)`, which calls the scheduler's method of that name.",
    why="No method that vLLM's clients can call reaches the scheduler.",
    upstream=(),
    versions=("0.32.0",),
    where="everywhere",
    changes=(Change("vllm.v1.engine.core", "EngineCore.rollout_rpc", _make_rollout_rpc),),
    relies_on=(
        Source("vllm.v1.engine.core", "EngineCoreProc._handle_client_request", "199cda971217582a"),
        Source("vllm.v1.engine.core", "EngineCoreProc._invoke_utility_method", "270e7fd31dd5a4d1"),
    ),
)
