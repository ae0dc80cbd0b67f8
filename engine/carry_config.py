"""Configuration of rounds that carry unfinished groups over to the next one (active partial rollouts).

It is opt-in: a carried trajectory has tokens of more than one policy, and an engine that makes them unasked changes the
algorithm of its user.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from longtail.engine.errors import InvalidInputError
from longtail.scheduler.admission import AdaptiveOverProvision, AdmissionName, AdmissionPolicy
from longtail.scheduler.kv_policy import KvPolicy
from longtail.scheduler.staleness import StaleAction, StalenessBound


@dataclass(frozen=True, kw_only=True)
class CarryConfig:
    """What happens to the groups that a round leaves unfinished.

    Attributes:
        kv_policy: what a weight change does to the KV of a carried trajectory: `fresh` computes it again under the
            new weights, `stale` keeps it, `stale_up_to:k` keeps what is at most k versions old.
        park: keep the KV of a cut trajectory in the pool, reclaimable; otherwise a resume prefills it.
        share_prefix: let new requests hit prefix blocks of older weights.
        max_staleness: how many versions older than the weights a token may be when its group is returned; `None` is
            without a bound.
        on_stale: beyond it, `mask` the tokens (loss mask 0), `restart` the group from its prompt, or `drop` it.
        admission: which carried groups run first: `carried_first` (oldest tokens), `nearly_complete_first` (fewest
            members left), `longest_remaining_first` (largest budget left) or `fifo` (order of submission). Fresh groups
            come after them.
        target_carried: aim at so many carried groups a round, instead of a fixed `over_provision`.
        journal: file that lets carried and banked groups, the position in the prompts and the round counter survive
            the death of every process; `None` keeps them in memory. It does not hold the weights: after a restart say
            which the model has, by `EngineConfig.weight_version`.

    Raises:
        InvalidInputError: a value is wrong; names the attribute.

    """

    kv_policy: str = "fresh"
    park: bool = True
    share_prefix: bool = False
    max_staleness: int | None = None
    on_stale: StaleAction = "mask"
    admission: AdmissionName = "carried_first"
    target_carried: int | None = None
    journal: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        KvPolicy.parse(self.kv_policy, "carry.kv_policy")
        for name in ("park", "share_prefix"):
            value: Any = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidInputError(f"carry.{name}", "true or false", value)
        try:
            StalenessBound(self.max_staleness, self.on_stale)
            AdmissionPolicy(self.admission)
            if self.target_carried is not None:
                AdaptiveOverProvision(self.target_carried)
        except InvalidInputError as error:
            raise InvalidInputError(f"carry.{error.field}", error.expected, getattr(self, error.field)) from None
        if self.journal is not None and not isinstance(self.journal, (str, os.PathLike)):
            raise InvalidInputError("carry.journal", "the path of a file", self.journal)

    @property
    def bound(self) -> StalenessBound:
        """The staleness bound."""
        return StalenessBound(self.max_staleness, self.on_stale)
