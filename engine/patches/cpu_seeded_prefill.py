"""A request with its own seed may be prefilled in chunks on a CPU, and samples what it samples in one piece.

vLLM samples a token for every scheduled request, also for one whose prompt is not through, and throws that token
away. To undo the draw it moves the request's generator back by a counter that only GPU generators have: on a CPU this
raises, and the engine core dies. Here the generators of such requests are set aside while the step samples and books,
so that there is no draw to undo.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from longtail.engine.patches.entry import Change, Entry, Source


@contextmanager
def generators_aside(runner: Any) -> Iterator[None]:
    """Hide the generators of requests whose token this step discards."""
    batch = runner.input_batch
    generators: dict[int, Any] = batch.generators
    discarded = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist() if generators else ()
    aside = {row: generators.pop(row) for row in discarded if row in generators}
    try:
        yield
    finally:
        generators.update(aside)


def _make_aside(name: str) -> Any:
    """An override of the inherited method `name` that runs it with those generators hidden."""

    def make(stock: None, owner: Any) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            with generators_aside(self):
                return getattr(super(owner, self), name)(*args, **kwargs)

        method.__name__ = name
        return method

    return make


ENTRY = Entry(
    name="cpu-seeded-prefill",
    what="The CPU runner draws nothing from the generator of a request whose prompt is not through.",
    why="A per-request seed with chunked prefill kills the engine core ('CPU Generator does not use offset').",
    upstream=("vllm-project/vllm#9945 (the rewind)",),
    versions=("0.32.0",),
    where="cpu",
    changes=(
        Change("vllm.v1.worker.cpu_model_runner", "CPUModelRunner._sample", _make_aside("_sample")),
        Change("vllm.v1.worker.cpu_model_runner", "CPUModelRunner._bookkeeping_sync", _make_aside("_bookkeeping_sync")),
    ),
    relies_on=(
        Source("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._sample", "fd31d81750add26b"),
        Source("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._bookkeeping_sync", "b3385bf1e6fd1486"),
    ),
)
