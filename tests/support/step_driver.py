"""An `EngineDriver` without a thread and without an engine core: the test says when what happens.

What a caller posts waits in a queue until `run_commands`; a step is made by `step`. Below it are vLLM's real scheduler
and block pool, and a faked model that reads what it samples from out of a faked KV store. Every output is held against
what that model did: the tokens that it read, the versions of weights and KV, and what the scheduler reports of them.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from kv_model import VOCAB_SIZE, Cell, KvEngine
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request, RequestStatus

from longtail.engine.carry_config import CarryConfig
from longtail.engine.core_link import checked_answer
from longtail.engine.errors import LongtailError
from longtail.engine.prompts import PromptLimits
from longtail.scheduler.kv_policy import KvPolicy
from longtail.scheduler.metadata import EXTRA_ARGS_KEY, MemberReport, report_of
from longtail.scheduler.tree_place import BirthReport


@dataclass
class _InFlight:
    """One request as a front end sees it; `name` is unique, as vLLM's internal request ids are.

    `prefix` is what it has of another path of its tree, on top of what it was submitted with.
    """

    name: str
    request_id: str
    prompt: list[int]
    max_tokens: int
    metadata: dict[str, Any] | None
    prefix: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class StepDriver:
    """See the module.

    Args:
        kv: the scheduler harness.
        config: policies that the weights' changes and the checks need.
        version: of the weights at the start.

    Attributes:
        cut_sequences: by park key, all tokens of a member when it ended or was cut.
        seen: how often what was to be tested happened.

    """

    checks_others = True

    def __init__(self, kv: KvEngine, config: CarryConfig, version: int = 0) -> None:
        self.kv = kv
        self.config = SimpleNamespace(carry=config)
        # What one sequence can have of the pool, as when vLLM sizes the pool for one.
        kv.scheduler.max_model_len = kv.num_free_blocks * kv.model.block_size
        self.engine = SimpleNamespace(tokenizer=None, limits=PromptLimits(VOCAB_SIZE, kv.scheduler.max_model_len))
        self.weight_version = 0
        self.num_free_at_start = kv.num_free_blocks
        self.cut_sequences: dict[str, list[int]] = {}
        self.seen: Counter[str] = Counter()
        self._shared: dict[str, int] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._sinks: dict[str, Callable[[Any], object]] = {}
        self._rounds: set[str] = set()
        self._in_flight: dict[str, _InFlight] = {}
        self._numbers = itertools.count()
        #: Of trees, by round, group and path: requests, and outputs of paths that had ended before.
        self._paths: dict[tuple[str, str, int], _InFlight] = {}
        self._ended_paths: dict[tuple[str, str, int], list[int]] = {}
        self._reports: dict[str, MemberReport] = {}
        if version:
            self.change_weights(version)

    # ---- what a caller has of a driver -------------------------------------------------------------------------

    def submit(self, requests: Sequence[tuple[str, list[int], SamplingParams]], sink: Callable[[Any], object]) -> None:
        self._commands.append(lambda: self._add_all(requests, sink))

    def claim_round(self, round_id: str) -> None:
        assert round_id not in self._rounds
        self._rounds.add(round_id)

    def release_round(self, round_id: str) -> None:
        self._rounds.discard(round_id)

    def call_later(self, function: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function(self))
            except (LongtailError, RuntimeError) as error:
                future.set_exception(error)

        self._commands.append(run)
        return future

    # ---- what a command has of a driver and of its link --------------------------------------------------------

    def rpc(self, op: str, **args: Any) -> dict[str, Any]:
        if op == "fork":
            # A prefix that the parent shared is its branches' too.
            live = self.kv.scheduler._forking._live.get(args["of"])
            has_hit = live is not None and live.start is not None and not live.num_parked
            cached = live.num_cached if has_hit else self._shared.get(args["of"], 0)
            self._shared |= dict.fromkeys(args["keys"], cached)
        return checked_answer(self.kv.scheduler.rollout_rpc(op, args))

    def abandon(self, request_ids: Iterable[str]) -> None:
        gone = {one for one in request_ids if self._sinks.pop(one, None) is not None}
        names = [name for name, one in self._in_flight.items() if one.metadata and one.request_id in gone]
        self._abort(names)

    # ---- what a test does with it ------------------------------------------------------------------------------

    @property
    def num_in_flight(self) -> int:
        """Requests without a final output."""
        return len(self._in_flight)

    @property
    def num_others(self) -> int:
        """Requests in flight that belong to no round."""
        return sum(one.metadata is None for one in self._in_flight.values())

    def run_command(self) -> bool:
        """Run the oldest that was posted; false if there is none."""
        if not self._commands:
            return False
        self._commands.popleft()()
        return True

    def run_commands(self) -> None:
        """Run what was posted, as between two steps."""
        while self.run_command():
            pass

    def step(self) -> None:
        """One step of the engine, if it has anything to do."""
        if self.kv.scheduler.has_requests():
            self._take(self.kv.step()[1])
        else:
            self._take(self.kv.drain())

    @property
    def is_idle(self) -> bool:
        """Nothing will happen by itself."""
        return not (self._commands or self._in_flight or self.kv._in_flight or self.kv.scheduler.has_requests())

    def add_other(self, prompt: list[int], max_tokens: int) -> None:
        """A request without rollout metadata."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=0)
        self._add(f"other{next(self._numbers)}", prompt, params)

    def abort_other(self) -> None:
        """The client of the oldest such request goes away."""
        others = [name for name, one in self._in_flight.items() if one.metadata is None]
        self._abort(others[:1])

    def change_weights(self, version: int) -> None:
        """As `longtail.engine.weights` does it, in the driver's thread."""
        carry = self.config.carry
        self._take(self.kv.drain())
        assert not self.kv.change_weights(version, kv_policy=carry.kv_policy, share_prefix=carry.share_prefix)
        self.weight_version = version

    # ---- parts -------------------------------------------------------------------------------------------------

    def _add_all(
        self, requests: Sequence[tuple[str, list[int], SamplingParams]], sink: Callable[[Any], object]
    ) -> None:
        for request_id, token_ids, params in requests:
            assert request_id not in self._sinks, f"{request_id} is in flight already"
            self._sinks[request_id] = sink
            self._add(request_id, token_ids, params)

    def _add(self, request_id: str, token_ids: list[int], params: SamplingParams) -> None:
        name = f"{request_id}-{next(self._numbers)}"
        metadata = None if params.extra_args is None else params.extra_args[EXTRA_ARGS_KEY]
        assert params.max_tokens is not None
        one = self._in_flight[name] = _InFlight(name, request_id, list(token_ids), params.max_tokens, metadata)
        if metadata is not None and (tree := metadata.get("tree")) is not None:
            where = metadata["round"], metadata["group"]
            self._paths[(*where, tree["path"])] = one
            for ended in tree["ended"]:
                self._ended_paths[(*where, ended["path"])] = ended["token_ids"]
        self.kv.scheduler.add_request(
            Request(
                request_id=name,
                prompt_token_ids=list(token_ids),
                sampling_params=params,
                pooling_params=None,
                block_hasher=self.kv._hasher,
            )
        )

    def _abort(self, names: list[str]) -> None:
        self.kv.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
        for name in names:
            del self._in_flight[name]

    def _take(self, outputs: list[EngineCoreOutput]) -> None:
        for output in outputs:
            report = report_of(output.kv_transfer_params)
            if report is not None:
                self._reports[output.request_id] = report
        for output in outputs:
            if (one := self._in_flight.get(output.request_id)) is None:
                continue
            one.tokens += output.new_token_ids
            one.versions += [self.kv.model.version] * len(output.new_token_ids)
            if output.new_logprobs is not None:
                one.logprobs += output.new_logprobs.logprobs[: len(output.new_token_ids), 0].tolist()
            if output.finish_reason is not None:
                self._finish(one, output)

    def _finish(self, one: _InFlight, output: EngineCoreOutput) -> None:
        del self._in_flight[one.name]
        report = report_of(output.kv_transfer_params)
        if report is not None and report.birth is not None:
            self._find_prefix(one, report.birth)
            self.seen[f"births, {report.birth.reason}"] += 1
        self._check(one, output)
        if one.metadata is None:
            return
        if (key := one.metadata["park"]) is not None:
            self.cut_sequences[key] = one.prompt + one.prefix + one.tokens
        spans = [
            SimpleNamespace(version=str(version), start=places[0], end=places[-1] + 1)
            for version, places in (
                (version, [place for place, _ in run])
                for version, run in (
                    (version, list(run)) for version, run in itertools.groupby(enumerate(one.versions), lambda x: x[1])
                )
            )
        ]
        completion = SimpleNamespace(
            token_ids=one.tokens,
            logprobs=SimpleNamespace(logprobs=one.logprobs, start_indices=range(len(one.logprobs))),
            weight_versions=spans,
            finish_reason=str(output.finish_reason),
            stop_reason=output.stop_reason,
            text="",
        )
        sink = self._sinks.pop(one.request_id)
        sink(
            SimpleNamespace(
                request_id=one.request_id, outputs=[completion], kv_transfer_params=output.kv_transfer_params
            )
        )

    def _birth_of(self, one: _InFlight) -> BirthReport | None:
        known = self.kv.scheduler._members.get(one.name) or self._reports.get(one.name)
        return None if known is None else known.birth

    def _find_prefix(self, one: _InFlight, birth: BirthReport) -> None:
        """Take note of what a path has of its parent."""
        assert one.metadata is not None
        if not one.prefix:
            one.prefix = self._output_of(one.metadata, birth.parent)[: birth.at]
            assert len(one.prefix) == birth.at

    def _output_of(self, metadata: dict[str, Any], path: int) -> list[int]:
        """All output that a path of the same tree has had so far."""
        where = metadata["round"], metadata["group"], path
        if where in self._ended_paths:
            return self._ended_paths[where]
        one = self._paths[where]
        assert one.metadata is not None
        if (birth := self._birth_of(one)) is not None:
            self._find_prefix(one, birth)
        num_prior = one.metadata["num_prior_tokens"]
        return one.prompt[len(one.prompt) - num_prior :] + one.prefix + one.tokens

    def _check(self, one: _InFlight, output: EngineCoreOutput) -> None:
        """Hold the output against what the model read and did."""
        reads = {len(cells): cells for cells in self.kv.model.sampled_from.pop(one.name, [])}
        sequence = one.prompt + one.prefix + one.tokens
        num_prior = len(one.prefix) + (0 if one.metadata is None else one.metadata["num_prior_tokens"])
        assert num_prior + len(one.tokens) <= one.max_tokens
        if str(output.finish_reason) == "length":
            assert len(one.tokens) == min(
                one.max_tokens - num_prior, self.engine.limits.max_model_len - len(one.prompt) - len(one.prefix)
            )
        assert one.logprobs == [-(token % 7) - 0.5 for token in one.tokens], "log-probs of other tokens"
        report = report_of(output.kv_transfer_params)
        starts: list[int] = []
        if one.metadata is not None:
            assert report is not None
            starts = [start - num_prior for start, _ in report.segments]
            assert not one.tokens or starts[0] == 0
            assert starts == sorted(set(starts))
            self.seen["preemptions"] += report.num_preemptions
        carry = self.config.carry
        bound = KvPolicy.parse(carry.kv_policy).max_staleness
        num_shared = self._num_shared(one, report) if carry.share_prefix else 0
        expected: list[int] = []
        for index, version in enumerate(one.versions):
            place = len(one.prompt) + len(one.prefix) + index
            cells: Sequence[Cell] = reads[place]
            assert [token for token, _ in cells] == sequence[:place], f"{one.name} read the KV of other tokens"
            ages = [read for _, read in cells]
            if bound is not None and (self.checks_others or one.metadata is not None):
                too_old = [read for read in ages[num_shared:] if abs(version - read) > bound]
                assert not too_old, f"{one.name}: KV of version {too_old} under {version}, at most {bound} older"
            if report is not None:
                if index in starts:
                    expected = [
                        int(v) for v, start, end in report.segments[starts.index(index)][1] for _ in range(start, end)
                    ]
                else:
                    expected.append(version)
                assert ages == expected, f"{one.name} token {index}: KV of {ages}, reported {expected}"
            self.seen["tokens checked"] += 1

    def _num_shared(self, one: _InFlight, report: MemberReport | None) -> int:
        """For how many tokens the KV may be of any age, because the request shared a prefix when it was new."""
        if one.metadata is None or report is None:
            return len(one.prompt)
        key = one.metadata["park"]
        if report.birth is not None:
            # A prefix that the parent shared is its branches' too.
            self._shared[key] = self._shared_with(one.metadata, report.birth.parent)
        num_shared = self._shared.get(key, 0) if report.num_parked_tokens else report.num_cached_tokens
        if key is not None:
            self._shared[key] = num_shared
        return num_shared

    def _shared_with(self, metadata: dict[str, Any], path: int) -> int:
        """`_num_shared` of a path of the same tree, which runs or has ended."""
        parent = self._paths.get((metadata["round"], metadata["group"], path))
        if parent is None or parent.metadata is None:
            return len(self._output_of(metadata, path))
        if (birth := self._birth_of(parent)) is not None:
            return self._shared_with(metadata, birth.parent)
        if (live := self.kv.scheduler._members.get(parent.name)) is not None:
            num_cached, num_parked = live.num_cached, live.num_parked
        else:
            report = self._reports[parent.name]
            num_cached, num_parked = report.num_cached_tokens, report.num_parked_tokens
        return self._shared.get(parent.metadata["park"], 0) if num_parked else int(num_cached)
