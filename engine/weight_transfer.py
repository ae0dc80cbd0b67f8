"""vLLM's weight transfer backend `longtail`: new weights from shared memory, whole or not at all.

`update_info`, the same through `RolloutEngine.update_weights` and through vLLM's `/update_weights`:

    path, token     of a `WeightSegment` with every tensor of the checkpoint
    base            path and token of one with the weights that the model has, or `checkpoint` if it has those of the
                    folder that it was loaded from last; may be left out for the first
    checksums       XXH3-128 of every tensor by name, 32 hexadecimal digits; without it whoever sends this has compared

All of it is checked before the first byte of the model changes. Then vLLM's layerwise reload replaces one layer after
the other, because kernels may have their own form of a weight (a CPU's linear layers keep nothing else). What that
leaves when it fails is a mixture: layers with new weights, layers on the meta device, one in between, and loaders that
collect. So the layers are made whole first and then loaded again from the base, or the checkpoint on disk.

Imports torch and vLLM: it is for workers, which vLLM's factory imports it in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

from longtail.engine.errors import InvalidInputError, WeightsApplyError
from longtail.engine.weight_answers import WeightsLostError
from longtail.engine.weight_manifest import Manifest
from longtail.engine.weight_segment import WeightSegment

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig

#: A front end has two segments, which take turns.
_KEPT_SEGMENTS = 2


@dataclass
class SegmentInitInfo(WeightTransferInitInfo):
    """There is nothing to agree on."""


@dataclass
class SegmentPlace:
    """Where a segment is."""

    path: str
    token: str


@dataclass
class SegmentUpdateInfo(WeightTransferUpdateInfo):
    """See the module."""

    path: str
    token: str
    base: SegmentPlace | Literal["checkpoint"] | None = None
    checksums: dict[str, str] | None = None


class LongtailWeightTransferEngine(WeightTransferEngine[SegmentInitInfo, SegmentUpdateInfo]):
    """The backend in one worker."""

    init_info_cls = SegmentInitInfo
    update_info_cls = SegmentUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._manifest: Manifest | None = None
        self._segments: dict[str, WeightSegment] = {}
        self._has_pushed = False

    def init_transfer_engine(self, init_info: SegmentInitInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing to do: the model is touched when everything is known to be right."""

    def finish_weight_update(self) -> None:
        """Nothing to do: the weights are in when `update_weights` returns."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> SegmentUpdateInfo:
        """See `WeightTransferEngine`.

        Raises:
            InvalidInputError: a field is wrong.

        """
        known = {field.name for field in fields(SegmentUpdateInfo)}
        if unknown := sorted(update_dict.keys() - known):
            raise InvalidInputError("update_info", "the fields " + ", ".join(sorted(known)), unknown)
        try:
            return msgspec.convert(update_dict, SegmentUpdateInfo)
        except msgspec.ValidationError as error:
            raise InvalidInputError("update_info", "path, token, base, checksums", str(error)) from error

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Replace the model's weights.

        Raises:
            InvalidInputError: they are not the model's; nothing was changed.
            WeightsApplyError: they did not load; the model has the old ones.
            WeightsLostError: the old ones did not load either.

        """
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SegmentUpdateInfo) -> None:
        """See `update_weights`."""
        segment = self._open(update_info.path, update_info.token, "update_info.path")
        base = self._base(update_info)
        if update_info.checksums is not None:
            _check_content(segment, update_info.checksums)
        try:
            self._load(segment)
        except BaseException as error:
            try:
                self._put_back(base)
            except BaseException as second:
                raise WeightsLostError(
                    f"new weights did not load ({error!r}), nor the old ones ({second!r})"
                ) from error
            if not isinstance(error, Exception):
                raise
            raise WeightsApplyError(f"new weights did not load, the old ones are back: {error!r}") from error
        self._has_pushed = True

    def restore(self, update_info: dict[str, Any]) -> None:
        """Put back what an update has replaced.

        Raises:
            WeightsLostError: that did not load.

        """
        try:
            self._put_back(self._base(self.parse_update_info(update_info), is_applied=True))
        except Exception as error:
            raise WeightsLostError(f"the old weights did not load: {error!r}") from error

    def shutdown(self) -> None:
        """Give up the segments."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()

    def _open(self, path: str, token: str, field: str) -> WeightSegment:
        """A segment with the checkpoint's tensors; the last ones stay mapped."""
        segment = self._segments.pop(token, None)
        if segment is None or segment.path != path:
            segment = WeightSegment.open(path, token, field=field)
            if self._manifest is None:
                self._manifest = Manifest.of_checkpoint(Path(self.model_config.model))
            self._manifest.check_same(segment.manifest, f"{field.rpartition('.')[0]}.tensors")
        self._segments[token] = segment
        while len(self._segments) > _KEPT_SEGMENTS:
            self._segments.pop(next(iter(self._segments)))
        return segment

    def _base(self, update_info: SegmentUpdateInfo, *, is_applied: bool = False) -> WeightSegment | None:
        base = update_info.base
        if isinstance(base, SegmentPlace):
            return self._open(base.path, base.token, "update_info.base.path")
        if base is None and self._has_pushed and not is_applied:
            raise InvalidInputError("update_info.base", "the segment that the model's weights came from", None)
        return None

    def _load(self, segment: WeightSegment) -> None:
        layerwise.initialize_layerwise_reload(self.model)
        self._fill((entry.name, segment.tensor(entry.name)) for entry in segment.manifest)

    def _put_back(self, base: WeightSegment | None) -> None:
        _make_layers_whole(self.model)
        if base is not None:
            self._load(base)
            return
        loader: Any = get_model_loader(self.vllm_config.load_config)
        layerwise.initialize_layerwise_reload(self.model)
        self._fill(loader.get_all_weights(self.model_config, self.model))

    def _fill(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        model: Any = self.model
        with torch.no_grad(), _without_warnings():
            model.load_weights(weights)
            layerwise.finalize_layerwise_processing(self.model, self.model_config)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """vLLM warns of layers that got no weights: here they are those that the checkpoint has none for."""
    logger = logging.getLogger(layerwise.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_content(segment: WeightSegment, checksums: dict[str, str]) -> None:
    import xxhash

    for entry in segment.manifest:
        found = xxhash.xxh3_128_hexdigest(segment.bytes_of(entry.name).data)
        if checksums.get(entry.name) != found:
            field = f"update_info.checksums[{entry.name}]"
            raise InvalidInputError(field, f"{found}, as the segment has it", checksums.get(entry.name))


def _make_layers_whole(model: Any) -> None:
    """End a layerwise reload that failed somewhere: every layer has the tensors again that it computes with.

    What is in them is old in one layer and new in another.
    """
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None:
            layerwise._place_kernel_tensors(layer, info)
        info.reset()  # type: ignore[no-untyped-call]
        for tensor in get_layer_tensors(layer).values():
            if hasattr(tensor, "weight_loader"):
                tensor.weight_loader = layerwise._get_original_loader(tensor)
    layerwise.LOADING_LAYERS.clear()
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload
