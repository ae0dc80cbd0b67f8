"""Trees of one scheduler over a `KvEngine`: members submitted, outputs put together from their births."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from kv_model import KvEngine
from vllm.v1.engine import EngineCoreOutput, FinishReason

from longtail.scheduler.metadata import MemberReport, report_of
from longtail.scheduler.tree_place import DISMISSED_STOP_REASON
from longtail.scheduler.tree_policy import TreeSpec


class GrownTree:
    """One tree.

    Attributes:
        tokens: whole output by path, of those that ended; `own` without what a path has of another.
        reports: by path.
        ends: final outputs by path.

    """

    def __init__(
        self,
        engine: KvEngine,
        spec: TreeSpec,
        prompt: Sequence[int],
        *,
        name: str = "t",
        round_id: str = "r",
        target: int = 1,
        seed: int = 0,
        length: int | None = None,
        begun: Mapping[int, Sequence[int]] | None = None,
        ended: Mapping[int, Sequence[int]] | None = None,
        policy: str = "fresh",
        **params: Any,
    ) -> None:
        self.engine, self.spec, self.prompt, self.name = engine, spec, list(prompt), name
        self.tokens: dict[int, list[int]] = {}
        self.own: dict[int, list[int]] = {}
        self.reports: dict[int, MemberReport] = {}
        self.ends: dict[int, EngineCoreOutput] = {}
        self.prior = {index: list(tokens) for index, tokens in (begun or {}).items()}
        self.known = dict(ended or {})
        paths = [index for index in range(spec.width) if index not in self.known]
        for place, path in enumerate(paths):
            prior = self.prior.get(path, [])
            self.own[path] = []
            tree = {
                "spec": msgspec.to_builtins(spec), "seed": seed, "path": path, "has_begun": path in self.prior,
                "ended": [] if place else [
                    {"path": one, "token_ids": list(tokens), "by_itself": True, "park": f"{name}.{one}"}
                    for one, tokens in self.known.items()
                ],
            }  # fmt: skip
            engine.add(
                f"{round_id}/{name}/{path}",
                self.prompt + prior,
                length or spec.max_tokens,
                {
                    "round": round_id, "target_groups": target, "group": name, "group_size": len(paths),
                    "index": place, "park": f"{name}.{path}", "kv_policy": policy, "tree": tree,
                    "num_prior_tokens": len(prior), "num_drawn_tokens": 0,
                    "num_computed_tokens": max(0, len(self.prompt) + len(prior) - 1) if prior else 0,
                },
                **params,
            )  # fmt: skip

    def take(self, outputs: Sequence[EngineCoreOutput]) -> None:
        """Outputs of a step, of any request."""
        for output in outputs:
            name, _, path = output.request_id.rpartition("/")
            if name.rpartition("/")[2] != self.name:
                continue
            self.own[int(path)] += output.new_token_ids
            if output.finish_reason is not None:
                assert int(path) not in self.ends, "two ends"
                self.ends[int(path)] = output
                report = report_of(output.kv_transfer_params)
                assert report is not None
                self.reports[int(path)] = report

    def step(self, count: int = 1) -> None:
        """Let the engine make steps."""
        for _ in range(count):
            self.take(self.engine.step()[1])

    def run_out(self) -> None:
        """Until nothing is left."""
        while self.engine.scheduler.has_requests():
            self.step()
        self.take(self.engine.drain())

    def run(self) -> None:
        """Until nothing is left, then put the paths together."""
        self.run_out()
        self.put_together()

    def put_together(self) -> None:
        """Whole outputs of every path that began and has ended."""
        self.tokens = {path: self._whole(path) for path, one in self.reports.items() if not one.is_unborn}

    def _whole(self, path: int) -> list[int]:
        if path in self.known:
            return list(self.known[path])
        birth = self.reports[path].birth
        before = self.prior.get(path, []) if birth is None else self._whole(birth.parent)[: birth.at]
        assert birth is None or len(before) == birth.at
        return before + self.own[path]

    @property
    def dismissed(self) -> list[int]:
        """Paths that never began because their tree had no branch for them."""
        return [path for path, one in self.ends.items() if one.stop_reason == DISMISSED_STOP_REASON]

    @property
    def num_recomputed(self) -> int:
        """Tokens whose KV had been computed before."""
        return sum(report.num_recomputed_tokens for report in self.reports.values())

    def has_ended_naturally(self, path: int) -> bool:
        """Whether a path ended by itself."""
        return self.ends[path].finish_reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION)
