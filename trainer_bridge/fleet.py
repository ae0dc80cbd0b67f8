"""`BridgeFleet`: several engines, one trainer.

Engine e of E has the prompts e, e + E, e + 2E ... of the training run, so that which prompt went where needs no record:
the order of the engines is all that has to stay. A round is one on each engine, with its share of the groups; weights
go to all at a time; each engine has its own version, cursor and acknowledgements. Which engine a trajectory is of can
be seen from its `round_id`, which ends with `.e` where the fleet's had a name.

An engine that dies or restarts is waited for as by `BridgeClient`; the others go on meanwhile. There is no stealing of
prompts: a round ends with its slowest engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import msgspec

from longtail.engine.config import SamplingConfig
from longtail.engine.trajectory import Group, Round, Trajectory
from longtail.trainer_bridge.client import BridgeClient
from longtail.trainer_bridge.connection.calls import Call, Step, check_timeout
from longtail.trainer_bridge.connection.round_reader import RoundReader, StreamReader
from longtail.trainer_bridge.connection.rounds import Bell
from longtail.trainer_bridge.connection.strided_prompts import StridedPrompts
from longtail.trainer_bridge.connection.tee import Tee
from longtail.trainer_bridge.errors import BridgeError, InvalidInputError
from longtail.trainer_bridge.keys import ClientKeys
from longtail.trainer_bridge.wire import Cursor, Status

if TYPE_CHECKING:
    from longtail.trainer_bridge.weights.push import PushReport

T = TypeVar("T")


class FleetCursor(msgspec.Struct, frozen=True):
    """The cursors of a fleet's engines, in their order; belongs into the trainer's checkpoint."""

    cursors: tuple[Cursor, ...]


@dataclass(frozen=True, slots=True)
class FleetRound:
    """The rounds of all engines, in their order; engines whose share was empty have none."""

    rounds: list[Round]

    @property
    def groups(self) -> list[Group]:
        """All groups, by engine."""
        return [group for round_ in self.rounds for group in round_.groups]

    @property
    def complete_groups(self) -> list[Group]:
        """The groups that a trainer takes."""
        return [group for round_ in self.rounds for group in round_.complete_groups]

    @property
    def filtered_groups(self) -> list[Group]:
        """Groups that were refused."""
        return [group for round_ in self.rounds for group in round_.filtered_groups]

    @property
    def trajectories(self) -> list[Trajectory]:
        """Every trajectory, by engine, group and index."""
        return [trajectory for round_ in self.rounds for trajectory in round_.trajectories]


class FleetPushError(BridgeError):
    """Some engines do not have the weights. Push the same version again: those that have it are left out.

    Attributes:
        errors: what went wrong, by engine.

    """

    def __init__(self, peer: str, errors: dict[int, Exception]) -> None:
        self.errors = errors
        super().__init__(peer, "; ".join(f"engine {e}: {error}" for e, error in errors.items()))


class BridgeFleet:
    """Several engines with the calls of one. A context manager, which closes its clients.

    Args:
        clients: one an engine, always in the same order.

    """

    def __init__(self, clients: Sequence[BridgeClient]) -> None:
        if not clients:
            raise InvalidInputError("clients", "at least one client", clients)
        self.clients = tuple(clients)

    @classmethod
    def connect(
        cls,
        addresses: Sequence[str],
        *,
        cursor: FleetCursor | None = None,
        keys: ClientKeys | Sequence[ClientKeys] | None = None,
        **arguments: Any,
    ) -> Self:
        """Connect to services, all at a time.

        Args:
            addresses: one an engine, always in the same order.
            cursor: of the checkpoint that the trainer goes on from.
            keys: for all services, or one for each.
            arguments: those of `BridgeClient`.

        Raises:
            Exception: those of `BridgeClient`.

        """
        num_engines = len(addresses)
        if isinstance(addresses, str) or not num_engines:
            raise InvalidInputError("addresses", "a list of addresses", addresses)
        cursors: Sequence[Cursor | None] = [None] * num_engines if cursor is None else cursor.cursors
        each = [keys] * num_engines if keys is None or isinstance(keys, ClientKeys) else list(keys)
        for field, values in (("cursor", cursors), ("keys", each)):
            if len(values) != num_engines:
                raise InvalidInputError(field, f"one for each of {num_engines} engines", len(values))
        with ThreadPoolExecutor(num_engines) as pool:
            opening = [
                pool.submit(BridgeClient, address, cursor=one, keys=own, **arguments)
                for address, one, own in zip(addresses, cursors, each, strict=True)
            ]
        failures = [failure for one in opening if (failure := one.exception()) is not None]
        if failures:
            for one in opening:
                if one.exception() is None:
                    one.result().close()
            raise failures[0]
        return cls([one.result() for one in opening])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def cursor(self) -> FleetCursor:
        """Everything that was handed out."""
        return FleetCursor(tuple(client.cursor for client in self.clients))

    @property
    def weight_versions(self) -> tuple[int, ...]:
        """Of the weights that each engine samples from."""
        return tuple(client.weight_version for client in self.clients)

    @property
    def statuses(self) -> tuple[Status, ...]:
        """What each service said last."""
        return tuple(client.status for client in self.clients)

    # ---- rounds ------------------------------------------------------------------------------------------------

    def rollout(
        self,
        prompts: Any = None,
        *,
        group_size: int = 1,
        target_groups: int | None = None,
        over_provision: float | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        round_id: str | None = None,
        carry: bool = True,
        on_trajectory: Callable[[Trajectory], None] | None = None,
        timeout_s: float | None = None,
    ) -> FleetRound:
        """Collect one round on all engines; see `BridgeClient.rollout`.

        If one fails, or the time is up, nothing was handed out: the same call again gets what the others have.
        """
        bound = self._bound(timeout_s)
        deadline = time.monotonic() + bound
        bell = Bell()
        group_size = sampling.num_members(group_size)
        shares = self._shares(prompts, target_groups, group_size, sampling.seed, carry=carry)
        calls: list[tuple[BridgeClient, Call[RoundReader]]] = []
        for e, (own, share) in shares.items():
            client = self.clients[e]
            name = None if round_id is None else f"{round_id}.{e}"
            call = client._calls.start_round(
                bell.ring, own, group_size=group_size, target_groups=share, over_provision=over_provision,
                sampling=sampling, round_id=name, carry=carry, preview=on_trajectory is not None,
            )  # fmt: skip
            calls.append((client, call))
        readers: list[RoundReader] = []
        is_whole = False
        try:
            _run_all(calls, readers, bound, deadline)
            rounds = self._collect([client for client, _ in calls], readers, bell, on_trajectory, bound, deadline)
            is_whole = True
        finally:
            for reader in readers:
                reader.finish() if is_whole else reader.close(cancel=reader.is_evaluation)
        return FleetRound(rounds)

    def stream(
        self,
        prompts: Any = None,
        *,
        group_size: int = 1,
        num_groups: int = 64,
        sampling: SamplingConfig = SamplingConfig(),
        stream_id: str | None = None,
        timeout_s: float | None = None,
    ) -> FleetGroupStream:
        """Groups of all engines as they are complete; see `BridgeClient.stream`. `num_groups` is shared out."""
        bound = self._bound(timeout_s)
        bell = Bell()
        group_size = sampling.num_members(group_size)
        calls: list[tuple[BridgeClient, Call[StreamReader]]] = []
        for e, (own, share) in self._shares(prompts, num_groups, group_size, sampling.seed, carry=True).items():
            call = self.clients[e]._calls.start_stream(
                bell.ring, own, group_size=group_size, num_groups=share or 1, sampling=sampling,
                stream_id=None if stream_id is None else f"{stream_id}.{e}",
            )  # fmt: skip
            calls.append((self.clients[e], call))
        readers: list[StreamReader] = []
        try:
            _run_all(calls, readers, bound, time.monotonic() + bound)
        except BaseException:
            for reader in readers:
                reader.close(cancel=True)
            raise
        return FleetGroupStream([client for client, _ in calls], readers, bell, bound)

    def cancel(self, round_id: str, *, timeout_s: float | None = None) -> None:
        """End a round or a stream on every engine."""
        for e, client in enumerate(self.clients):
            client.cancel(f"{round_id}.{e}", timeout_s=timeout_s)

    def ack(self, cursor: FleetCursor | None = None, *, timeout_s: float | None = None) -> None:
        """Say that deliveries are used for good; see `BridgeClient.ack`."""
        cursors = self.cursor if cursor is None else cursor
        if not isinstance(cursors, FleetCursor) or len(cursors.cursors) != len(self.clients):
            raise InvalidInputError("cursor", f"a FleetCursor of {len(self.clients)} engines", cursor)
        for client, one in zip(self.clients, cursors.cursors, strict=True):
            client.ack(one, timeout_s=timeout_s)

    # ---- weights -----------------------------------------------------------------------------------------------

    def push_weights(
        self,
        named_tensors: Iterable[tuple[str, Any]],
        version: int,
        *,
        delta: bool | Literal["auto"] = False,
        transport: Literal["auto", "zmq", "shm"] = "auto",
        timeout_s: float | None = None,
    ) -> list[PushReport | None]:
        """Push weights to every engine that does not have this version, at a time; `None` for those that have.

        An engine that only says it has them, because it needs them (`weights_needed`), gets them, too.

        `named_tensors` is read once, in step with the slowest engine.

        Raises:
            FleetPushError: some engines do not have them.

        """
        needing = [
            e
            for e, client in enumerate(self.clients)
            if client.weight_version != version or client.weights_needed is not None
        ]
        reports: list[PushReport | None] = [None] * len(self.clients)
        if not needing:
            return reports
        tee = Tee(len(needing))
        with ThreadPoolExecutor(len(needing)) as pool:
            pushes = {
                e: pool.submit(
                    tee.reading(i, self.clients[e].push_weights), version, delta=delta, transport=transport,
                    timeout_s=timeout_s,
                )
                for i, e in enumerate(needing)
            }  # fmt: skip
            tee.feed(named_tensors)
        # The pool has waited for all of them.
        errors: dict[int, Exception] = {}
        for e, push in pushes.items():
            error = push.exception()
            if isinstance(error, Exception):
                errors[e] = error
            else:
                reports[e] = push.result()
        if errors:
            raise FleetPushError(", ".join(self.clients[e].address for e in errors), errors)
        return reports

    def close(self) -> None:
        """Leave all services."""
        with ThreadPoolExecutor(len(self.clients)) as pool:
            list(pool.map(BridgeClient.close, self.clients))

    # ---- parts -------------------------------------------------------------------------------------------------

    def _bound(self, timeout_s: float | None) -> float:
        return self.clients[0]._timeout_s if timeout_s is None else check_timeout(timeout_s)

    def _shares(
        self, prompts: Any, total: int | None, group_size: int, seed: int | None, *, carry: bool
    ) -> dict[int, tuple[Any, int | None]]:
        """Prompts and number of groups, of those engines that have any."""
        num_engines = len(self.clients)
        shares: dict[int, tuple[Any, int | None]] = {}
        for e in range(num_engines):
            share = None if total is None else len(range(e, total, num_engines))
            own: Any = None if prompts is None else StridedPrompts(prompts, e, num_engines, group_size, seed)
            if not carry and own is not None:
                own = [own[i] for i in range(len(own))]
            if share != 0 and (carry or own):
                shares[e] = (own, share)
        return shares

    def _collect(
        self,
        clients: Sequence[BridgeClient],
        readers: Sequence[RoundReader],
        bell: Bell,
        on_trajectory: Callable[[Trajectory], None] | None,
        timeout_s: float,
        deadline: float,
    ) -> list[Round]:
        """Wait for all rounds; none is handed out."""
        rounds: dict[int, Round] = {}

        def poll() -> bool | None:
            for i, reader in enumerate(readers):
                while i not in rounds and (item := reader.poll()) is not None:
                    if isinstance(item, Round):
                        rounds[i] = item
                    elif on_trajectory is not None:
                        on_trajectory(item)
            return True if len(rounds) == len(readers) else None

        def timed_out() -> Exception:
            late = [i for i in range(len(readers)) if i not in rounds]
            phase = " and ".join(readers[i].describe() for i in late)
            return clients[late[0]]._calls.timed_out(phase, timeout_s)

        bell.wait_for(poll, lambda: False, deadline, timed_out)
        return [rounds[i] for i in range(len(readers))]


class FleetGroupStream:
    """Groups of all engines, in turns as far as there are any; see `ClientGroupStream`."""

    def __init__(
        self, clients: Sequence[BridgeClient], readers: Sequence[StreamReader], bell: Bell, timeout_s: float
    ) -> None:
        self._clients = clients
        self._readers = readers
        self._bell = bell
        self._timeout_s = timeout_s
        self._turn = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Group:
        deadline = time.monotonic() + self._timeout_s
        group = self._bell.wait_for(self._poll, self._has_ended, deadline, self._timed_out)
        if group is None:
            raise StopIteration
        return group

    def close(self) -> None:
        """End all streams; unfinished groups are carried."""
        for reader in self._readers:
            reader.close(cancel=True)
        telling = [reader.cancelling for reader in self._readers if reader.cancelling is not None]
        wait(telling, self._timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        for reader in getattr(self, "_readers", ()):
            with suppress(Exception):
                reader.close(cancel=True)

    def _poll(self) -> Group | None:
        for _ in self._readers:
            reader = self._readers[self._turn]
            self._turn = (self._turn + 1) % len(self._readers)
            if (group := reader.poll()) is not None:
                return group
        return None

    def _has_ended(self) -> bool:
        return all(reader.has_ended for reader in self._readers)

    def _timed_out(self) -> Exception:
        names = ", ".join(reader.round_id for reader in self._readers)
        return self._clients[0]._calls.timed_out(f"a group of the streams {names}", self._timeout_s)


def _run_all(
    calls: Sequence[tuple[BridgeClient, Call[T]]], results: list[T], timeout_s: float, deadline: float
) -> None:
    """Run calls at a time; `results` gets what they return, in their order, those of a failure's fellows included."""
    steps: dict[int, Step] = {}
    returned: dict[int, T] = {}
    try:
        for i in range(len(calls)):
            _go_on(i, calls[i][1], steps, returned)
        while steps:
            left_s = max(deadline - time.monotonic(), 0.0)
            if not wait([step.future for step in steps.values()], left_s, FIRST_COMPLETED).done:
                late, step = next(iter(steps.items()))
                raise calls[late][0]._calls.timed_out(step.phase, timeout_s)
            for i in [i for i, step in steps.items() if step.future.done()]:
                _go_on(i, calls[i][1], steps, returned)
    finally:
        for _, call in calls:
            call.close()
        results += [returned[i] for i in sorted(returned)]


def _go_on(i: int, call: Call[T], steps: dict[int, Step], returned: dict[int, T]) -> None:
    steps.pop(i, None)
    try:
        steps[i] = next(call)
    except StopIteration as end:
        returned[i] = end.value
