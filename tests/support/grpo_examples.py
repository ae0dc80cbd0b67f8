"""Trajectories from lists, and policies small enough that every outcome can be enumerated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longtail.engine.trajectory import Group, Timings, TokenCounts, Trajectory, VersionSpan


def make_trajectory(
    prompt: Sequence[int],
    output: Sequence[int],
    logprobs: Sequence[float] | None = None,
    reward: float | None = 0.0,
    *,
    versions: Sequence[int] | None = None,
    source_mask: Sequence[int] | None = None,
    loss_mask: Sequence[int] | None = None,
) -> Trajectory:
    """One whose tokens have these `versions`, by default 0."""
    spans: list[VersionSpan] = []
    for t, version in enumerate(versions or [0] * len(output)):
        if spans and spans[-1].version == str(version):
            spans[-1] = VersionSpan(str(version), spans[-1].start, t + 1)
        else:
            spans.append(VersionSpan(str(version), t, t + 1))
    return Trajectory(
        trajectory_id="r/g/0", round_id="r", group_id="g", index=0, prompt_token_ids=list(prompt),
        output_token_ids=list(output), logprobs=list([-1.0] * len(output) if logprobs is None else logprobs),
        source_mask=list(source_mask or [1] * len(output)), loss_mask=list(loss_mask or []), weight_versions=spans,
        finish_reason="stop", reward=reward, timings=Timings(submitted_s=0.0), tokens=TokenCounts(),
    )  # fmt: skip


def make_group(trajectories: Sequence[Trajectory], *, complete: bool = True, rejected: str | None = None) -> Group:
    return Group(group_id="g", trajectories=list(trajectories), complete=complete, rejected=rejected)


class TablePolicy(nn.Module):
    """The logits of the next token are a row of a table, float64 by default, chosen by the token before it."""

    def __init__(self, size: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(scale * torch.randn(size, size, generator=generator, dtype=torch.float64).to(dtype))

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.table[token_ids]


class TinyTransformer(nn.Module):
    """One causal layer of width 32 with learned positions; takes no attention mask."""

    def __init__(self, size: int, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.positions = nn.Embedding(size, 32), nn.Embedding(64, 32)
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, dropout, batch_first=True)
        self.head = nn.Linear(32, size)

    def forward(self, token_ids: Tensor) -> Tensor:
        length = token_ids.shape[1]
        hidden = self.tokens(token_ids) + self.positions(torch.arange(length))
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        logits: Tensor = self.head(self.layer(hidden, src_mask=causal, is_causal=True))
        return logits
