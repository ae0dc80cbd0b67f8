"""The front end changes a worker's weights and hears what became of it: two methods on vLLM's `WorkerBase`.

They go through vLLM's own steps (`start_weight_update`, `update_weights`, `finish_weight_update`). Those raise what
went wrong, and an exception loses its type on its way to the front end; one of several workers that raises says
nothing of the others. So each worker answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longtail.engine.patches.entry import Change, Entry, Source

_WORKER = "vllm.v1.worker.gpu_worker"
_FACTORY = "vllm.distributed.weight_transfer.factory"
_LAYERWISE = "vllm.model_executor.model_loader.reload.layerwise"


def _make_update(stock: None, owner: type) -> Any:
    def longtail_update_weights(self: Any, update_info: Mapping[str, Any]) -> dict[str, Any]:
        """Make one whole update. The answer is empty, or says what `engine.weights` reads out of it."""
        from longtail.engine.weight_answers import answered

        def update() -> None:
            self.start_weight_update()
            self.update_weights(dict(update_info))
            self.finish_weight_update()

        return answered(update)

    return longtail_update_weights


def _make_restore(stock: None, owner: type) -> Any:
    def longtail_restore_weights(self: Any, update_info: Mapping[str, Any]) -> dict[str, Any]:
        """Put back what `update_info` replaced, in a worker where it was applied."""
        from longtail.engine.weight_answers import answered

        return answered(lambda: self.weight_transfer_engine.restore(dict(update_info)))

    return longtail_restore_weights


ENTRY = Entry(
    name="worker-weights",
    what="WorkerBase has `longtail_update_weights` and `longtail_restore_weights`, for `collective_rpc`.",
    why="A failed update of weights reaches the front end as text, and from one worker only.",
    upstream=(),
    versions=("0.32.0",),
    where="everywhere",
    changes=(
        Change("vllm.v1.worker.worker_base", "WorkerBase.longtail_update_weights", _make_update),
        Change("vllm.v1.worker.worker_base", "WorkerBase.longtail_restore_weights", _make_restore),
    ),
    relies_on=(
        Source(_WORKER, "Worker._start_weight_update", "6fe3508c79b8fc0e"),
        Source(_WORKER, "Worker.update_weights", "394df6f235233b6c"),
        Source(_WORKER, "Worker.finish_weight_update", "4d92c8686081ba35"),
        Source(
            "vllm.distributed.weight_transfer.factory", "WeightTransferEngineFactory.create_engine", "d989b1375577c7de"
        ),
        Source(_LAYERWISE, "initialize_layerwise_reload", "7ca1974bc999d2f2"),
        Source(_LAYERWISE, "make_online_process_loader", "ab106742d3c24340"),
        Source(_LAYERWISE, "_layerwise_process", "475b8ac29687caa9"),
        Source(_LAYERWISE, "_place_kernel_tensors", "97f42e39dd63b76f"),
    ),
)
