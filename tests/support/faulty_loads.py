"""A worker whose next loads of weights fail somewhere in the middle; for `worker_extension_cls`."""

from __future__ import annotations

from typing import Any


class FaultyLoads:
    """Methods for `collective_rpc`."""

    def longtail_test_fail(self, where: str, number: int, times: int = 1) -> None:
        """Fail `times` loads.

        Args:
            where: `layer`, before the layer is touched; `packing`, in the middle of one; `finalize`, when all layers
                have their weights; `source`, where a tensor is read.
            number: of the layer or tensor, from 0.
            times: how many loads.

        """
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod
        from vllm.model_executor.model_loader.reload import layerwise

        from longtail.engine.weight_segment import WeightSegment

        owner, name = {
            "layer": (layerwise, "_layerwise_process"),
            "packing": (UnquantizedLinearMethod, "process_weights_after_loading"),
            "finalize": (layerwise, "finalize_layerwise_processing"),
            "source": (WeightSegment, "tensor"),
        }[where]
        stock: Any = getattr(owner, name)
        left = [number] * times

        def failing(*args: Any, **options: Any) -> Any:
            if left and left[0] == 0:
                left.pop(0)
                if not left:
                    setattr(owner, name, stock)
                if where in ("packing", "finalize"):
                    stock(*args, **options)
                raise RuntimeError("injected")
            if left:
                left[0] -= 1
            return stock(*args, **options)

        setattr(owner, name, failing)
