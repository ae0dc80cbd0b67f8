"""What the front end may ask of a running scheduler, between two steps, and the answers in plain msgpack types.

What the caller did wrong comes back as `{"invalid": [field, expected, got]}`: an exception would reach it without its
type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.kv_policy import KvPolicy

if TYPE_CHECKING:
    from longtail.scheduler.rollout_scheduler import RolloutMixin

Args = Mapping[str, Any]


class SchedulerRpc:
    """Operations by name.

    `round`, `close_round` (stops its live members now) and `forget_round` take `{"round": id}` and answer the fields of
    `RoundCounts`, the first two also `num_output_tokens` of its live members, and how many requests of the engine run
    and wait. `fork` takes the fields of `ForkOrder` and answers those of `ForkPoint`.

    All others answer the counters. `counters` takes nothing. `weights` says that the model has new weights: `version`
    (int), `kv_policy` of requests that are no members, `share_prefix` (new requests may hit blocks of older weights).
    `unpark` gives up the parked KV of `keys`. `give_up_fork` takes the fields of `GivenUp`. `finish_paused` says that a
    member (`round`, `group`, `index`) that was stopped at a boundary ends there.
    """

    def __init__(self, scheduler: RolloutMixin) -> None:
        self._scheduler = scheduler
        self._ops: dict[str, Callable[[Args], dict[str, Any]]] = {
            "round": self._round,
            "close_round": self._close_round,
            "forget_round": self._forget_round,
            "fork": self._fork,
            "give_up_fork": self._give_up_fork,
            "finish_paused": self._finish_paused,
            "counters": self._counters,
            "weights": self._weights,
            "unpark": self._unpark,
        }

    def answer(self, op: str, args: Args) -> dict[str, Any]:
        """Answer one operation; see the class."""
        try:
            if op not in self._ops:
                raise InvalidInputError("op", "one of " + ", ".join(self._ops), op)
            return self._ops[op](args)
        except InvalidInputError as error:
            return {"invalid": [error.field, error.expected, error.got]}

    # ---- rounds ------------------------------------------------------------------------------------------------

    def _round(self, args: Args) -> dict[str, Any]:
        round_id, scheduler = _string(args, "round"), self._scheduler
        counts = asdict(scheduler._book.counts(round_id))
        num_running, num_waiting = scheduler.get_request_counts()
        live = (scheduler._members[request_id] for request_id in scheduler._book.live_members(round_id))
        return counts | {
            "num_output_tokens": sum(member.num_new_tokens for member in live),
            "num_running": num_running,
            "num_waiting": num_waiting,
        }

    def _close_round(self, args: Args) -> dict[str, Any]:
        self._scheduler._close_round(_string(args, "round"))
        return self._round(args)

    def _forget_round(self, args: Args) -> dict[str, Any]:
        round_id, book = _string(args, "round"), self._scheduler._book
        keys = book.kept_keys(round_id)
        counts = book.forget(round_id)
        self._scheduler._kv.forget(keys)
        return asdict(counts)

    # ---- members -----------------------------------------------------------------------------------------------

    def _fork(self, args: Args) -> dict[str, Any]:
        point: dict[str, Any] = msgspec.to_builtins(self._scheduler._forking.fork(args))
        return point

    def _give_up_fork(self, args: Args) -> dict[str, Any]:
        self._scheduler._forking.give_up(args)
        return self._counters(args)

    def _finish_paused(self, args: Args) -> dict[str, Any]:
        round_id, group_id, index = _string(args, "round"), _string(args, "group"), _integer(args, "index")
        self._scheduler._kv.forget(self._scheduler._book.finish_paused(round_id, group_id, index))
        return self._counters(args)

    def _unpark(self, args: Args) -> dict[str, Any]:
        keys = args.get("keys")
        if not isinstance(keys, (list, tuple)) or not all(isinstance(key, str) for key in keys):
            raise InvalidInputError("keys", "a list of strings", keys)
        self._scheduler._kv.forget(keys)
        return self._counters(args)

    # ---- the engine --------------------------------------------------------------------------------------------

    def _weights(self, args: Args) -> dict[str, Any]:
        scheduler = self._scheduler
        version = _integer(args, "version")
        if version <= scheduler._kv.version:
            raise InvalidInputError("version", f"an integer above {scheduler._kv.version}", version)
        policy = KvPolicy.parse(args.get("kv_policy", "fresh"))
        scheduler._kv.change_weights(version, scheduler._members, policy, bool(args.get("share_prefix")))
        return self._counters(args)

    def _counters(self, args: Args) -> dict[str, Any]:
        scheduler = self._scheduler
        num_running, num_waiting = scheduler.get_request_counts()
        return asdict(scheduler._book.totals) | {
            "live_rounds": scheduler._book.num_live_rounds,
            "live_members": len(scheduler._members),
            "running": num_running,
            "waiting": num_waiting,
            "free_blocks": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            **scheduler._kv.counters(),
        }


def _string(args: Args, name: str) -> str:
    value = args.get(name)
    if not isinstance(value, str):
        raise InvalidInputError(name, "a string", value)
    return value


def _integer(args: Args, name: str) -> int:
    value = args.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInputError(name, "an integer", value)
    return value
