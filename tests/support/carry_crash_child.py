"""Rounds that carry over without vLLM, against an engine that is a few lines, for tests that kill the process.

Run as a program it reads commands from its standard input, one JSON object a line, and runs each in a process of its
own, forked from this one, so that a life costs no imports. A life prints a line for everything it was told is durable:
every cursor, every returned round; whoever reads them may kill it at any moment.

What the engine makes of a member depends on its serial, its index and its attempt only; which member ends next, and
when it is cut, is random. So is how far the process gets between two system calls of the journal: see `die_at`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import zlib
from collections.abc import Callable
from typing import Any

from longtail.engine import group_store, journal
from longtail.engine.carry_config import CarryConfig
from longtail.engine.carry_round import CarryRound
from longtail.engine.config import SamplingConfig
from longtail.engine.group_state import GroupState
from longtail.engine.group_store import GroupStore
from longtail.engine.prompts import TokenPrompt
from longtail.engine.rounds import MemberPlan
from longtail.engine.trajectory import KvSpan, Round, RoundStats, Segment, Timings, TokenCounts, Trajectory, VersionSpan
from longtail.scheduler.metadata import CUT_STOP_REASON

GROUP_SIZE = 2
TARGET_GROUPS = 3
NUM_IN_FLIGHT = 6


def length_of(serial: int, index: int) -> int:
    """Output tokens that a member makes until it stops by itself."""
    return 1 + zlib.crc32(f"length {serial} {index}".encode()) % 20


def tokens_of(serial: int, index: int) -> list[int]:
    """The whole output of a member."""
    return [zlib.crc32(f"token {serial} {index} {k}".encode()) % 1000 for k in range(length_of(serial, index))]


def is_rejected(serial: int) -> bool:
    """What the hook says of a group."""
    return zlib.crc32(f"verdict {serial}".encode()) % 4 == 0


def fresh_groups(store: GroupStore, round_: CarryRound, count: int) -> list[GroupState]:
    """The groups of the next prompts."""
    serial, cursor = store.totals.num_submitted, store.totals.cursor
    sampling = SamplingConfig(max_tokens=64)
    return [
        GroupState.new(
            serial + i,
            round_.round_no,
            round_.round_id,
            TokenPrompt(str(cursor + i), [cursor + i, 1, 2], None, None, {"n": cursor + i}),
            GROUP_SIZE,
            sampling,
        )
        for i in range(count)
    ]


def segment_of(plan: MemberPlan, num_tokens: int, version: int) -> tuple[Trajectory, int]:
    """What comes back of a member after `num_tokens` more tokens, or fewer if it ends before."""
    serial = int(plan.metadata.group.split(".")[0])
    prior = plan.metadata.num_prior_tokens
    whole = tokens_of(serial, plan.index)
    new = whole[prior : prior + num_tokens]
    is_end = prior + len(new) == len(whole)
    known = len(plan.prompt.token_ids) + prior
    trajectory = Trajectory(
        trajectory_id=plan.trajectory_id,
        round_id=plan.metadata.round,
        group_id=plan.prompt.group_id,
        index=plan.index,
        prompt_token_ids=plan.prompt.token_ids,
        output_token_ids=new,
        logprobs=[-float(token) for token in new],
        source_mask=[1] * len(new),
        weight_versions=[VersionSpan(str(version), 0, len(new))] if new else [],
        segments=[Segment(start=0, end=len(new), kv_versions=[KvSpan(str(version), 0, known)])] if new else [],
        finish_reason="stop" if is_end else "abort",
        stop_reason=None if is_end else CUT_STOP_REASON,
        timings=Timings(submitted_s=0.0),
        tokens=TokenCounts(scheduled=len(new)),
        metadata=plan.prompt.metadata,
    )
    return trajectory, known + len(new)


class Rounds:
    """Runs rounds over a store.

    Args:
        store: of the groups.
        seed: of the order in which things happen.
        config: policies.
        tell: gets what is durable.
        num_prompts: no fresh group beyond.

    """

    def __init__(
        self,
        store: GroupStore,
        seed: str,
        *,
        config: CarryConfig | None = None,
        tell: Callable[..., object] = lambda **_: None,
        num_prompts: int = 1 << 40,
    ) -> None:
        self.store = store
        self.rng = random.Random(seed)
        self.config = config or CarryConfig(max_staleness=1, on_stale="restart")
        self.tell = tell
        self.num_prompts = num_prompts
        self.version = store.totals.num_rounds // 2

    def run_one(self) -> Round | None:
        """One round; `None` when there is nothing left to run."""
        rng, store = self.rng, self.store
        self.version += rng.random() < 0.5
        round_ = CarryRound(
            store,
            round_id=f"round {store.totals.num_rounds + 1} of {rng.randrange(1 << 60):x}",
            target_groups=TARGET_GROUPS,
            config=self.config,
            version=self.version,
            is_judged=True,
        )
        verdicts = [group.serial for group in round_.complete()]
        plans: dict[str, MemberPlan] = {}
        is_open = False
        while not round_.is_full:
            missing = NUM_IN_FLIGHT - round_.num_in_play
            starting = round_.waiting()[: max(0, missing)]
            fresh = min(missing - len(starting), self.num_prompts - store.totals.cursor)
            if fresh > 0:
                groups = fresh_groups(store, round_, fresh)
                round_.add_fresh(groups, store.totals.cursor + fresh)
                self.tell(cursor=store.totals.cursor)
                starting += groups
            if starting and not is_open:
                round_.begin_wave()
                is_open = True
            plans |= {plan.request_id: plan for plan in round_.start(starting)}
            if verdicts and (rng.random() < 0.7 or not plans):
                self._judge(round_, verdicts.pop(rng.randrange(len(verdicts))))
            elif plans:
                self._end(round_, plans.pop(rng.choice(list(plans))), 1 << 30)
            else:
                break
            if rng.random() < 0.05:
                self.version += 1
                round_.change_version(self.version)
            for request_id in round_.abort:
                plans.pop(request_id, None)
            round_.abort.clear()
            verdicts += [group.serial for group in round_.complete()]
        for request_id in list(plans):
            self._end(round_, plans.pop(request_id), rng.randrange(12))
        verdicts += [group.serial for group in round_.complete()]
        while verdicts and rng.random() < 0.5:
            self._judge(round_, verdicts.pop())
        ready = round_.ready(TARGET_GROUPS)
        groups = list(ready.values())
        carry = round_.stats(groups)
        assert carry.num_carried_in + carry.num_banked_in + carry.num_fresh == (
            carry.num_accepted + carry.num_filtered + carry.num_banked + carry.num_carried
        )
        result = Round(
            round_id=round_.round_id,
            target_groups=TARGET_GROUPS,
            groups=groups,
            filtered_groups=round_.filtered,
            carry=carry,
            stats=_no_stats(),
        )
        store.end_round(result, list(ready))
        self.tell(no=round_.round_no, **told(result))
        store.recovered = None
        return result if groups or store.carried or store.totals.cursor < self.num_prompts else None

    def _end(self, round_: CarryRound, plan: MemberPlan, num_tokens: int) -> None:
        round_.end(plan.request_id, *segment_of(plan, num_tokens, self.version))

    def _judge(self, round_: CarryRound, serial: int) -> None:
        group = self.store.carried.get(serial)
        if group is not None and group.is_complete:
            members = [member for member in group.members if member is not None]
            round_.judge(serial, members, "hook: no" if is_rejected(serial) else None)


def told(round_: Round) -> dict[str, Any]:
    """A round as it is printed."""
    return {
        "round": round_.round_id,
        "groups": {g.metadata["n"]: [t.output_token_ids for t in g.trajectories] for g in round_.groups},
    }


def _no_stats() -> RoundStats:
    return RoundStats(**dict.fromkeys(RoundStats.__struct_fields__, 0))  # type: ignore[arg-type]


def die_at(num_calls: int, rng: random.Random) -> None:
    """Kill this process around the `num_calls`th system call with which the journal changes the disk.

    Before it, after it, or, where it writes, when a part is written.
    """
    left = num_calls

    def mortal(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def wrapper(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left:
                return call(*args)
            if name == "pwrite":
                descriptor, data, offset = args
                call(descriptor, bytes(data)[: rng.randrange(len(data) + 1)], offset)
            elif rng.random() < 0.5:
                call(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        return wrapper

    for name in ("pwrite", "fdatasync", "fsync", "rename", "ftruncate"):
        setattr(journal.os, name, mortal(name))


def live(
    path: str, seed: str, *, num_prompts: int, calls: int | None, drain: bool, rounds_told: int | None = None
) -> None:
    """One life of the process: open the journal, give again what may not have arrived, and go on.

    `rounds_told` ends it right after it has told so many rounds, before the next one begins.
    """
    journal.MIN_COMPACT_BYTES = 4096
    group_store._FLUSH_INTERVAL_S = 0.005
    if calls is not None:
        die_at(calls, random.Random(seed))

    def tell(**values: Any) -> None:
        os.write(1, json.dumps(values).encode() + b"\n")

    store = GroupStore(path)
    tell(opened=store.totals.num_rounds, cursor=store.totals.cursor, torn=store.num_torn_bytes)
    if store.recovered is not None:
        tell(again=True, **told(store.recovered))
        store.recovered = None
    rounds = Rounds(store, seed, tell=tell, num_prompts=store.totals.cursor if drain else num_prompts)
    while rounds.run_one() is not None:
        if rounds_told is not None and (rounds_told := rounds_told - 1) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    store.close()
    totals = store.totals
    tell(
        end=True,
        cursor=totals.cursor,
        accepted=totals.num_accepted,
        filtered=totals.num_filtered,
        carried=[group.prompt.metadata["n"] for group in store.carried.values()],
        banked=[group.prompt.metadata["n"] for group in store.banked.values()],
    )


def main() -> None:
    """Fork a life for each command; say its process id, and when it is over."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            live(**json.loads(line))
            os._exit(0)
        os.write(1, json.dumps({"pid": pid}).encode() + b"\n")
        _, status = os.waitpid(pid, 0)
        os.write(1, json.dumps({"over": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


if __name__ == "__main__":
    main()
