"""Scores trajectories that share prefixes, siblings of a prompt or leaves of a tree: a shared token is forwarded once.

The rows of a batch become sequences in which a token stands once for all rows that have it after the same tokens. A
mask lets it attend to those alone, its position is that in its row, and its log-probability is read off the token
before it, for every row that has it. Gradients add up over the rows by themselves.

This needs a causal model that takes a mask [B, 1, S, S], added to the attention's scores, and `position_ids`, as those
of transformers do with eager or SDPA attention; memory for that mask grows with S squared. Whether tokens are equal is
all that counts: who sampled them, and whether a branch was recorded, does not matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtail.trainer_bridge.errors import InvalidInputError

#: A row joins others if it has at least this share of its tokens in common with one of them. With less, as with a chat
#: template before unrelated prompts, attention over the longer sequence costs more than the tokens that it saves.
MIN_SHARE = 0.5


@dataclass(frozen=True)
class Packing:
    """Rows of a batch as `B` sequences of `S` places.

    Attributes:
        token_ids: int64 [B, S], padded with 0.
        position_ids: int64 [B, S], the column of the row that a token is in, padding left aside.
        allowed: bool [B, S, S], whether the place in the second dimension attends to that in the third.
        place: int64 [N, L], where in the flattened [B * S] a row's token stands; 0 at padding.
        num_row_tokens: tokens of all rows; `num_tokens` stand in the sequences.

    """

    token_ids: Tensor
    position_ids: Tensor
    allowed: Tensor
    place: Tensor
    num_row_tokens: int
    num_tokens: int


def check_model(model: nn.Module, name: str = "model") -> None:
    """Check, as far as that can be seen, that a model can be given packed sequences.

    Raises:
        InvalidInputError: its `forward` takes no attention mask or no positions, or it does not attend by that mask
            alone, in all layers.

    """
    accepted = inspect.signature(model.forward).parameters
    for parameter in ("attention_mask", "position_ids"):
        if parameter not in accepted:
            what = f"a model whose forward takes `{parameter}`, because of share_prefixes"
            raise InvalidInputError(name, what, type(model).__name__)
    config = getattr(model, "config", None)
    layers = set(getattr(config, "layer_types", None) or ())
    has_window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if layers - {"full_attention"} or (has_window and not layers):
        raise InvalidInputError(name, "full attention in every layer, because of share_prefixes", sorted(layers))
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        raise InvalidInputError(name, "eager or sdpa attention, because of share_prefixes", attention)


def pack_prefixes(token_ids: Tensor, attention_mask: Tensor) -> Packing:
    """Pack all rows.

    Args:
        token_ids: int64 [N, L], padded on either side.
        attention_mask: [N, L], 0 at padding.

    """
    rows = [ids[kept.bool()].tolist() for ids, kept in zip(token_ids, attention_mask, strict=True)]
    sequences: list[_Sequence] = []
    where: dict[int, tuple[int, list[int]]] = {}
    previous: list[int] | None = None
    for row, shared in _sorted_with_shared(rows):
        if previous is None or not _joins(shared, len(rows[row])):
            sequences.append(_Sequence())
            path: list[int] = []
        else:
            path = previous[:shared]
        previous = sequences[-1].add(rows[row], path)
        where[row] = len(sequences) - 1, previous
    size = max((len(sequence.token_ids) for sequence in sequences), default=0)
    device = token_ids.device
    place = torch.zeros_like(token_ids)
    for row, (number, path) in where.items():
        place[row, attention_mask[row].bool()] = torch.tensor(path, device=device) + number * size
    padded = [sequence.padded(size) for sequence in sequences]
    return Packing(
        token_ids=torch.stack([ids for ids, _, _ in padded]).to(device),
        position_ids=torch.stack([positions for _, positions, _ in padded]).to(device),
        allowed=torch.stack([allowed for _, _, allowed in padded]).to(device),
        place=place,
        num_row_tokens=sum(map(len, rows)),
        num_tokens=sum(len(sequence.token_ids) for sequence in sequences),
    )


def packed_logits(model: nn.Module, packing: Packing) -> Tensor:
    """The model's logits at every place, [B * S, vocabulary]."""
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(packing.allowed.shape, dtype=dtype, device=packing.allowed.device)
    mask = mask.masked_fill(~packing.allowed, torch.finfo(dtype).min).unsqueeze(1)
    offered = {"attention_mask": mask, "position_ids": packing.position_ids, "use_cache": False}
    if "use_cache" not in inspect.signature(model.forward).parameters:
        del offered["use_cache"]
    output = model(packing.token_ids, **offered)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.flatten(0, 1)


def shared_first(token_ids: Tensor, attention_mask: Tensor, rows: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Split rows into lots of at most `budget` places, or one row, those that share prefixes in one lot if they fit."""
    tokens = {row: token_ids[row][attention_mask[row].bool()].tolist() for row in rows}
    lot: list[int] = []
    longest = current = count = 0
    for place, shared in _sorted_with_shared([tokens[row] for row in rows]):
        row, length = rows[place], len(tokens[rows[place]])
        begins = not lot or not _joins(shared, length)
        now = length if begins else current + length - shared
        if lot and max(longest, now) * (count + begins) > budget:
            yield lot
            lot, longest, count, begins, now = [], 0, 0, True, length
        lot.append(row)
        count += begins
        longest, current = max(longest, now), now
    if lot:
        yield lot


def _joins(shared: int, length: int) -> bool:
    return shared > 0 and shared >= MIN_SHARE * length


class _Sequence:
    """One packed sequence while it grows."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._positions: list[int] = []
        self._paths: list[tuple[int, list[int]]] = []

    def add(self, tokens: list[int], shared: list[int]) -> list[int]:
        """Add a row whose first tokens stand at the places `shared`; returns the places of all."""
        first = len(self.token_ids)
        new = tokens[len(shared) :]
        self.token_ids += new
        self._positions += range(len(shared), len(tokens))
        self._paths.append((first, shared))
        return [*shared, *range(first, first + len(new))]

    def padded(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [size], positions [size], and who attends to whom [size, size]; padding attends to itself."""
        allowed = torch.eye(size, dtype=torch.bool)
        ends = [first for first, _ in self._paths[1:]] + [len(self.token_ids)]
        for (first, shared), end in zip(self._paths, ends, strict=True):
            allowed[first:end, first:end] = torch.ones(end - first, end - first, dtype=torch.bool).tril()
            allowed[first:end, shared] = True
        padding = [0] * (size - len(self.token_ids))
        return torch.tensor(self.token_ids + padding), torch.tensor(self._positions + padding), allowed


def _sorted_with_shared(rows: Sequence[list[int]]) -> Iterator[tuple[int, int]]:
    """Rows in the order of their tokens, each with how many it shares with the one before: with none it shares more."""
    previous: list[int] = []
    for row in sorted(range(len(rows)), key=lambda row: rows[row]):
        tokens = rows[row]
        shared = next(
            (i for i, (a, b) in enumerate(zip(tokens, previous, strict=False)) if a != b),
            min(len(tokens), len(previous)),
        )
        yield row, shared
        previous = tokens
