"""A faked model that reads what it samples from out of a faked KV store, so that a wrong block changes its tokens.

It executes what the scheduler orders: copies, block tables, prefill and decode. The KV of a position is the token there
and the weight version it was computed under. The next token is a hash of the KV of all positions, as read through the
request's block table, and of the weights' version: one block that was given away, not copied, or computed under other
weights gives other tokens. `expected_tokens` is the same without any store.
"""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scheduler_harness import SchedulerHarness
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

VOCAB_SIZE = 499

#: The KV of one position: token, version of the weights that computed it.
Cell = tuple[int, int]


def next_token(cells: Sequence[Cell], version: int) -> int:
    """What the model samples after positions with this KV."""
    flat = array("q", [number for cell in cells for number in cell])
    return 3 + zlib.crc32(flat.tobytes(), version) % (VOCAB_SIZE - 3)


def expected_tokens(prompt: Sequence[int], num_tokens: int, version: int = 0) -> list[int]:
    """The output of an uninterrupted request under one version."""
    cells = [(token, version) for token in prompt]
    for _ in range(num_tokens):
        cells.append((next_token(cells, version), version))
    return [token for token, _ in cells[len(prompt) :]]


@dataclass
class _State:
    tokens: list[int]
    block_ids: list[int]
    num_computed: int = 0


@dataclass
class KvModel:
    """Executes scheduler outputs over `num_blocks` blocks of `block_size` positions.

    Attributes:
        version: of the weights.
        copies_work: false breaks copy-on-write, for negative controls.
        sampled_from: by request, the KV that each of its tokens was sampled from.

    """

    block_size: int
    version: int = 0
    copies_work: bool = True
    blocks: dict[int, dict[int, Cell]] = field(default_factory=dict)
    states: dict[str, _State] = field(default_factory=dict)
    sampled_from: dict[str, list[tuple[Cell, ...]]] = field(default_factory=dict)
    num_scheduled: int = 0

    def execute(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step."""
        for request_id in scheduled.finished_req_ids:
            self.states.pop(request_id, None)
        for copy in scheduled.kv_cache_block_copies or ():
            if self.copies_work:
                self.blocks[copy.dst_block_id] = dict(self.blocks.get(copy.src_block_id, {}))
        starts: dict[str, int] = {}
        for new in scheduled.scheduled_new_reqs:
            assert new.prompt_token_ids is not None
            self.states[new.req_id] = _State(list(new.prompt_token_ids), list(new.block_ids[0]))
            starts[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for row, request_id in enumerate(cached.req_ids):
            state = self.states[request_id]
            new_blocks = cached.new_block_ids[row]
            if request_id in cached.resumed_req_ids:
                assert new_blocks is not None
                state.block_ids = list(new_blocks[0])
            elif new_blocks is not None:
                state.block_ids += new_blocks[0]
            if request_id in cached.all_token_ids:
                state.tokens = list(cached.all_token_ids[request_id])
            starts[request_id] = cached.num_computed_tokens[row]
        for request_id, start in starts.items():
            self.states[request_id].num_computed = start
        self._check_writes(scheduled.num_scheduled_tokens)
        rows = [self._run(rid, starts[rid], n) for rid, n in scheduled.num_scheduled_tokens.items()]
        self.num_scheduled += scheduled.total_num_scheduled_tokens
        return _output(list(scheduled.num_scheduled_tokens), rows)

    def _check_writes(self, num_scheduled: dict[str, int]) -> None:
        """Nobody writes to what another request reads in this step, unless it is the same prefix, new to both."""
        readers: dict[int, list[_State]] = {}
        for state in (self.states[request_id] for request_id in num_scheduled):
            for block_id in state.block_ids[: -(-state.num_computed // self.block_size)]:
                readers.setdefault(block_id, []).append(state)
        for request_id, count in num_scheduled.items():
            state = self.states[request_id]
            for position in range(state.num_computed, state.num_computed + count):
                for reader in readers.get(state.block_ids[position // self.block_size], ()):
                    is_read = position < reader.num_computed
                    same = state.tokens[: position + 1] == reader.tokens[: position + 1]
                    assert same or not is_read, f"{request_id} writes to position {position} of another request"

    def _run(self, request_id: str, start: int, num_tokens: int) -> list[int]:
        state = self.states[request_id]
        end = state.num_computed = start + num_tokens
        assert end <= len(state.tokens), "scheduled beyond what is known"
        for position in range(start, end):
            block, offset = divmod(position, self.block_size)
            self.blocks.setdefault(state.block_ids[block], {})[offset] = (state.tokens[position], self.version)
        if end < len(state.tokens):
            return []
        cells = tuple(
            self.blocks[state.block_ids[position // self.block_size]].get(position % self.block_size, (-1, -1))
            for position in range(end)
        )
        token = next_token(cells, self.version)
        state.tokens.append(token)
        self.sampled_from.setdefault(request_id, []).append(cells)
        return [token]


def _output(request_ids: list[str], sampled: list[list[int]]) -> ModelRunnerOutput:
    tokens = np.array([[row[0] if row else 0] for row in sampled], dtype=np.int32).reshape(len(sampled), 1)
    return ModelRunnerOutput(
        req_ids=request_ids,
        req_id_to_index={request_id: row for row, request_id in enumerate(request_ids)},
        sampled_token_ids=sampled,
        logprobs=LogprobsLists(
            tokens, -(tokens % 7).astype(np.float32) - 0.5, np.ones(len(sampled), dtype=np.int32), None
        ),
        prompt_logprobs_dict={},
        pooler_output=[],
    )


class KvEngine(SchedulerHarness):
    """The scheduler harness over a `KvModel`; with an asynchronous scheduler one step is always in flight."""

    def __init__(self, scheduler_cls: Any, config: Any, num_blocks: int) -> None:
        super().__init__(scheduler_cls, config, num_blocks)
        self.model = KvModel(config.cache_config.block_size)
        self._depth = 2 if config.scheduler_config.async_scheduling else 1
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    def step(self) -> tuple[SchedulerOutput, list[EngineCoreOutput]]:
        """Schedule a step and finish the oldest in flight, as vLLM's batch queue does."""
        scheduled = self.scheduler.schedule()
        self._in_flight.append((scheduled, self.model.execute(scheduled)))
        outputs: list[EngineCoreOutput] = []
        while len(self._in_flight) >= self._depth:
            outputs += self._finish_oldest()
        return scheduled, outputs

    def drain(self) -> list[EngineCoreOutput]:
        """Finish every step in flight."""
        outputs: list[EngineCoreOutput] = []
        while self._in_flight:
            outputs += self._finish_oldest()
        return outputs

    def change_weights(self, version: int, **args: Any) -> list[EngineCoreOutput]:
        """As the engine does it: nothing is in flight when the weights change."""
        outputs = self.drain()
        answer = self.scheduler.rollout_rpc("weights", {"version": version, **args})
        assert "invalid" not in answer, answer
        self.model.version = version
        return outputs

    def _finish_oldest(self) -> list[EngineCoreOutput]:
        scheduled, output = self._in_flight.popleft()
        clients = self.scheduler.update_from_output(scheduled, output)
        return [one for client in clients.values() for one in client.outputs]
