"""The reference trainer: one model, one optimizer, one process. `step` trains on groups, `save` and `load` resume.

A step of E epochs and M mini-batches makes E x M updates on the trajectories of the groups, in an order that is drawn
anew for each epoch if M > 1. One update is computed in micro-batches whose gradients add up to the mini-batch's. The
model's mode is left as it is: dropout would make every ratio noise, so call `model.eval()` if it has any.

It samples nothing, talks to nobody and knows no schedule but a linear warm-up. Mixed precision and several devices are
the model's own affair: parameters are trained in the dtype and on the device that they have.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtail.engine.trajectory import Group
from longtail.trainer_bridge import trainer_checkpoint
from longtail.trainer_bridge.errors import InvalidInputError, LongtailError
from longtail.trainer_bridge.grpo import LossSums, grpo_loss, loss_coefficients, token_logprobs
from longtail.trainer_bridge.grpo_batch import Batch, build_batch
from longtail.trainer_bridge.grpo_config import GrpoConfig, TrainerConfig
from longtail.trainer_bridge.grpo_stats import StepStats, step_stats
from longtail.trainer_bridge.prefix_packing import Packing, check_model, pack_prefixes, shared_first

logger = logging.getLogger(__name__)


class TrainingDivergedError(LongtailError):
    """A gradient is not finite; the update was not made."""


class GrpoTrainer:
    """Follows the gradient of `grpo_loss`. For one thread.

    Args:
        model: see `grpo.token_logprobs`; its parameters that require a gradient are trained.
        config: the estimator.
        settings: how it is followed.
        optimizer: instead of AdamW as `settings` has it. Over parameters of `model`.
        reference: what `kl_coef` keeps the model close to; called like `model`, never changed.

    Raises:
        InvalidInputError: `kl_coef` and `reference` do not come together, or nothing is to be trained.

    """

    def __init__(
        self,
        model: nn.Module,
        config: GrpoConfig | None = None,
        settings: TrainerConfig | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        reference: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.config = config or GrpoConfig()
        self.settings = settings or TrainerConfig()
        self.reference = reference
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise InvalidInputError("model", "at least one parameter that requires a gradient", type(model).__name__)
        if (self.config.kl_coef > 0) != (reference is not None):
            raise InvalidInputError("reference", "a model if and only if kl_coef is above 0", reference)
        self.optimizer = optimizer or torch.optim.AdamW(
            parameters,
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            eps=self.settings.eps,
            weight_decay=self.settings.weight_decay,
        )
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        if self.settings.share_prefixes:
            check_model(model)
            if reference is not None:
                check_model(reference, "reference")
        self.device = parameters[0].device
        self.num_steps = 0
        self.num_updates = 0
        self._parameters = parameters
        #: Tokens of the micro-batches of the step, and how many of them the model was given.
        self._num_row_tokens = self._num_forwarded = 0
        self._order = torch.Generator().manual_seed(self.settings.seed)

    def step(self, groups: Sequence[Group], version: int) -> StepStats:
        """Train on complete groups with the weights of now, which have the number `version`.

        Raises:
            InvalidInputError: see `build_batch`.
            TrainingDivergedError: a gradient is not finite. The update is not made, earlier ones of the step are.

        """
        started_s = time.perf_counter()
        batch = build_batch(groups, self.config, version).to(self.device)
        sums: LossSums | None = None
        loss = grad_norm = 0.0
        updates_before = self.num_updates
        self._num_forwarded = self._num_row_tokens = 0
        for minibatch in self._minibatches(self._with_logprobs(batch)):
            loss, grad_norm, more = self._update(minibatch)
            sums = more if sums is None else sums.plus(more)
        self.num_steps += 1
        if sums is None:
            logger.warning("no token of %d trajectories could be trained at version %d", len(batch.mask), version)
        return step_stats(
            groups,
            batch,
            sums,
            version=version,
            num_updates=self.num_updates - updates_before,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            saved_share=1 - self._num_forwarded / self._num_row_tokens if self._num_row_tokens else 0.0,
            seconds=time.perf_counter() - started_s,
        )

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and persistent buffers under the names of `state_dict`, tied ones once: what to push."""
        return trainer_checkpoint.named_tensors(self.model)

    def save(self, path: str | Path, extra: dict[str, Any] | None = None) -> None:
        """Write a checkpoint from which training goes on as if it had never stopped; see `trainer_checkpoint`.

        Args:
            path: a file; it is replaced at once or not at all.
            extra: what else must be resumed, such as the bridge's cursor: what JSON can say.

        Raises:
            InvalidInputError: `extra` or a value in the optimizer's state is not what JSON can say.

        """
        state = {"num_steps": self.num_steps, "num_updates": self.num_updates, "config": repr(self._configs())}
        trainer_checkpoint.write(Path(path), self.model, self.optimizer, self._order, state, extra or {})

    def load(self, path: str | Path) -> dict[str, Any]:
        """Take up a checkpoint; returns its `extra`. The optimizer's settings are the saved ones, learning rate too.

        Raises:
            FileNotFoundError: there is none.
            InvalidInputError: it is damaged, or of another model or optimizer; nothing was changed.

        """
        state, extra = trainer_checkpoint.read(Path(path), self.model, self.optimizer, self._order)
        self.num_steps, self.num_updates = state["num_steps"], state["num_updates"]
        if state["config"] != repr(self._configs()):
            logger.warning("%s was trained with other settings: %s", path, state["config"])
        return extra

    def _configs(self) -> tuple[GrpoConfig, TrainerConfig]:
        return self.config, self.settings

    def _with_logprobs(self, batch: Batch) -> Batch:
        """Add what has to be known before the first update."""
        several = self.settings.num_epochs * self.settings.num_minibatches > 1
        if several and self.config.old == "step":
            batch = dataclasses.replace(batch, old=self._logprobs(self.model, batch))
        if self.reference is not None:
            batch = dataclasses.replace(batch, reference=self._logprobs(self.reference, batch))
        return batch

    @torch.no_grad()
    def _logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        found = torch.zeros_like(batch.behaviour)
        for rows in self._micro_batches(batch):
            micro = batch.rows(rows)
            width = micro.mask.shape[1]
            found[rows, :width] = token_logprobs(model, micro, self.config, self._packing(micro)).to(found.dtype)
        return found

    def _packing(self, micro: Batch) -> Packing | None:
        return pack_prefixes(micro.token_ids, micro.attention_mask) if self.settings.share_prefixes else None

    def _minibatches(self, batch: Batch) -> Iterator[Batch]:
        count = len(batch.mask)
        for _ in range(self.settings.num_epochs):
            order = torch.arange(count)
            if self.settings.num_minibatches > 1:
                order = torch.randperm(count, generator=self._order)
            for rows in order.tensor_split(min(count, self.settings.num_minibatches)):
                minibatch = batch.rows(rows.to(self.device))
                if minibatch.mask.any():
                    yield minibatch

    def _micro_batches(self, batch: Batch) -> Iterator[Tensor]:
        """Rows with something to train within the budget of tokens: the longest first, or those that share prefixes."""
        lengths = torch.where(batch.mask.any(1), batch.attention_mask.sum(1), 0).tolist()
        if self.settings.share_prefixes:
            trained = [row for row, length in enumerate(lengths) if length]
            for lot in shared_first(batch.token_ids, batch.attention_mask, trained, self.settings.micro_batch_tokens):
                yield torch.tensor(lot, device=self.device)
            return
        rows: list[int] = []
        for row in sorted((row for row, length in enumerate(lengths) if length), key=lambda row: (-lengths[row], row)):
            if rows and lengths[rows[0]] * (len(rows) + 1) > self.settings.micro_batch_tokens:
                yield torch.tensor(rows, device=self.device)
                rows = []
            rows.append(row)
        if rows:
            yield torch.tensor(rows, device=self.device)

    def _update(self, batch: Batch) -> tuple[float, float, LossSums]:
        """One step of the optimizer; the loss and the norm of its gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        coefficients = loss_coefficients(batch.mask, self.config)
        losses: list[Tensor] = []
        sums: LossSums | None = None
        for rows in self._micro_batches(batch):
            micro = batch.rows(rows)
            packing = self._packing(micro)
            self._num_forwarded += int(micro.attention_mask.sum()) if packing is None else packing.num_tokens
            self._num_row_tokens += int(micro.attention_mask.sum())
            new = token_logprobs(self.model, micro, self.config, packing)
            loss, more = grpo_loss(new, micro, coefficients[rows], self.config)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach().double())
            sums = more if sums is None else sums.plus(more)
        assert sums is not None, "a mini-batch has a token to train"
        max_norm = self.settings.max_grad_norm
        grad_norm = nn.utils.clip_grad_norm_(self._parameters, math.inf if max_norm is None else max_norm).item()
        if not math.isfinite(grad_norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingDivergedError(f"update {self.num_updates + 1}: the gradient's norm is {grad_norm}")
        warmup = min(1.0, (self.num_updates + 1) / max(1, self.settings.warmup_updates))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * warmup
        self.optimizer.step()
        self.num_updates += 1
        return torch.stack(losses).sum().item(), grad_norm, sums
