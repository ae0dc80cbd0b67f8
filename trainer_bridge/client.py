"""`BridgeClient`: an engine in another process, or on another host, with the calls of `RolloutEngine`.

    with BridgeClient("tcp://127.0.0.1:41234", cursor=checkpoint.cursor) as client:
        if client.weight_version != checkpoint.step or client.weights_needed is not None:
            client.push_weights(model.named_parameters(), version=checkpoint.step)
        for step in range(checkpoint.step, num_steps):
            round_ = client.rollout(prompts, group_size=8, target_groups=32, round_id=f"step-{step}")
            ...                          # train on round_.complete_groups
            save(model, step=step + 1, cursor=client.cursor)
            client.ack()                 # not before the checkpoint is on the disk
            client.push_weights(model.named_parameters(), version=step + 1)

The checkpoint comes before the push, so that the engine's weights are never newer than it: a trainer that died between
the two, or whose engine was restarted, pushes the checkpoint's weights before it goes on.

Every trajectory of a round comes exactly once: the service keeps what was not acknowledged, through its own death and
the trainer's, and a trainer that starts again with the cursor of its checkpoint gets what this does not contain.

A service that dies or restarts is waited for, within the bound of each call; what was asked for is asked again. Only
where it came back without the weights that it had, a round is refused (`BridgeRefusedError`, code `weights`): push them
and ask for the round again. All methods may be called from several threads. Neither vLLM nor torch is imported.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from longtail.engine.config import SamplingConfig
from longtail.engine.trajectory import Round, Trajectory
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.connection.calls import BridgeCalls, Call, check_timeout
from longtail.trainer_bridge.connection.rounds import Bell, ClientGroupStream, ClientRound
from longtail.trainer_bridge.errors import BridgeError
from longtail.trainer_bridge.keys import ClientKeys

if TYPE_CHECKING:
    from longtail.trainer_bridge.weights.push import PushProgress, PushReport, PushTransport, WeightPusher

T = TypeVar("T")


class ClientState:
    """What can be known of either client without waiting."""

    def __init__(self, calls: BridgeCalls, timeout_s: float) -> None:
        self._calls = calls
        self._timeout_s = timeout_s
        self._pusher: WeightPusher | None = None

    @property
    def address(self) -> str:
        """Of the service."""
        return self._calls.io.address

    @property
    def welcome(self) -> wire.Welcome:
        """What the service said of itself and the model when the session began."""
        return self._calls.welcome

    @property
    def engine_id(self) -> str:
        """Of the service's state."""
        return self.welcome.engine_id

    @property
    def epoch(self) -> str:
        """Of the service's stream of deliveries."""
        return self.welcome.epoch

    @property
    def status(self) -> wire.Status:
        """What the service said last of what it is doing; at most a heartbeat old while it lives."""
        return self._calls.status

    @property
    def weight_version(self) -> int:
        """Version of the weights that the engine samples from."""
        return self.status.weight_version

    @property
    def weights_needed(self) -> int | None:
        """A version that has to be pushed before rounds run: tokens of it were kept, its weights were not."""
        return self._calls.session.weights_needed

    @property
    def cursor(self) -> wire.Cursor:
        """Everything that was handed out; belongs into the trainer's checkpoint.

        A group of a stream is handed out when the iterator returns it, a round when it is whole.
        """
        return self._calls.cursor

    @property
    def acked(self) -> int:
        """Deliveries up to here were acknowledged."""
        return self._calls.session.acked

    @property
    def unclaimed_rounds(self) -> list[str]:
        """Rounds of which deliveries are here that nobody has asked for, such as an earlier process's.

        They hold up the cursor until somebody asks for them by their names, or discards them.
        """
        return self._calls.unclaimed_rounds

    def discard(self, round_id: str) -> None:
        """Give up the deliveries of a round that nobody has asked for: they count as handed out."""
        self._calls.discard(round_id)

    def _bound(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else check_timeout(timeout_s)

    def _push(self, named_tensors: Iterable[tuple[str, Any]], version: int, **options: Any) -> PushReport:
        with self._calls.push_channel(secrets.token_hex(8)) as channel:
            return self._get_pusher().push(channel, named_tensors, version, **options)

    def _get_pusher(self) -> WeightPusher:
        from longtail.trainer_bridge.weights.push import WeightPusher

        if self._pusher is None:
            self._pusher = WeightPusher()
        return self._pusher

    def _end(self) -> None:
        self._calls.io.close()
        if self._pusher is not None:
            self._pusher.close()


class BridgeClient(ClientState):
    """A client with plain blocking calls. Use it as a context manager.

    Args:
        address: `tcp://HOST:PORT` of the service, as it prints it.
        consumer: name of the trainer, the same after a restart; a service has one at a time.
        keys: of a service that is reached over a network.
        cursor: from the checkpoint that the trainer goes on from; without one, it goes on after what was acknowledged.
        prefetch: how many deliveries may wait here before they are taken.
        connect_timeout_s: bound on the wait for the service.
        timeout_s: bound on every other wait, for calls that are given none.

    Raises:
        InvalidInputError: an argument is wrong.
        BridgeTimeoutError: the service does not answer.
        BridgeRefusedError: it has another consumer (`busy`), or the cursor is of another service (`epoch`).
        BridgeError: it does not accept the keys, or speaks another version of the protocol.

    """

    def __init__(
        self,
        address: str,
        *,
        consumer: str = "trainer",
        keys: ClientKeys | None = None,
        cursor: wire.Cursor | None = None,
        prefetch: int = 64,
        connect_timeout_s: float = 60.0,
        timeout_s: float = 600.0,
    ) -> None:
        check_timeout(timeout_s)
        check_timeout(connect_timeout_s)
        calls = BridgeCalls(address, consumer=consumer, keys=keys, cursor=cursor, prefetch=prefetch)
        super().__init__(calls, timeout_s)
        try:
            self._run(calls.open(), connect_timeout_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- prompts and rounds ------------------------------------------------------------------------------------

    def append_prompts(
        self, prompts: Sequence[Any], *, first: int | None = None, group_size: int = 1, timeout_s: float | None = None
    ) -> int:
        """Append prompts to those that rounds draw on; returns how many there are at the service then.

        Rounds that are given the whole sequence do this by themselves.

        Args:
            prompts: as for `rollout`.
            first: position of the first one; those that are there already are skipped. By default after the last.
            group_size: samples of each prompt, which budgets of its own are checked against.
            timeout_s: bound on the whole call.

        Raises:
            InvalidInputError: a prompt is wrong; those before it may have been appended.
            BridgeRefusedError: there is no room (`full`), or prompts before `first` are missing (`gap`).
            BridgeTimeoutError: the service did not answer.

        """
        return self._run(self._calls.append_prompts(prompts, first=first, group_size=group_size), timeout_s)

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
    ) -> Round:
        """Collect one round and return it whole.

        Arguments and errors are those of `stream_trajectories`, but for the bound, which is on the whole call.
        `on_trajectory` is called with each trajectory once, about when it ends. A round whose time is up goes on at the
        service: the next call with its `round_id`, or both without any, gets it.
        """
        bound = self._bound(timeout_s)
        deadline = time.monotonic() + bound
        stream = self._start(
            bound, prompts, group_size=group_size, target_groups=target_groups, over_provision=over_provision,
            sampling=sampling, round_id=round_id, carry=carry, preview=on_trajectory is not None,
        )  # fmt: skip
        try:
            while True:
                try:
                    trajectory = stream.next_by(deadline)
                except StopIteration:
                    return stream.round
                if on_trajectory is not None:
                    on_trajectory(trajectory)
        except BridgeError:
            stream.leave()
            raise
        except BaseException:
            stream.close()
            raise

    def stream_trajectories(
        self,
        prompts: Any = None,
        *,
        group_size: int = 1,
        target_groups: int | None = None,
        over_provision: float | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        round_id: str | None = None,
        carry: bool = True,
        timeout_s: float | None = None,
    ) -> ClientRound:
        """Start a round, or take up one that was started before; iterate over its trajectories as they end.

        Args:
            prompts: token ids, text, chat messages or `Prompt`s, one a group. Of a round that carries over: all prompts
                of the training run, a sequence in which the service keeps its position, and of which it is sent what
                the rounds ahead can use; or none, if they were appended.
            group_size: samples of each prompt.
            target_groups: end the round when so many groups are complete; a round that does not carry over takes all
                of them by default.
            over_provision: have so many times as many groups in flight.
            sampling: how every member is sampled.
            round_id: names the round for good, such as `step-17`: the same name again, after a crash of either side,
                gets the same round, as long as it is among the last 1,000. Rounds without one are returned in the
                order in which they were begun, and one that an earlier process did not get is returned first, whatever
                it was asked for with.
            carry: false for a round of its own, such as an evaluation.
            timeout_s: bound on the start of the round, and on each wait for the next trajectory.

        Raises:
            InvalidInputError: an argument is wrong; nothing was started.
            BridgeRefusedError: the service can't run it, or it failed: `weights`, `engine`, `busy`, `cancelled` ...
            BridgeTimeoutError: the service did not answer; if it heard, the round runs.
            BridgeClosedError: the client was closed or taken over.

        """
        return self._start(
            self._bound(timeout_s), prompts, group_size=group_size, target_groups=target_groups,
            over_provision=over_provision, sampling=sampling, round_id=round_id, carry=carry, preview=True,
        )  # fmt: skip

    def stream(
        self,
        prompts: Any = None,
        *,
        group_size: int = 1,
        num_groups: int = 64,
        sampling: SamplingConfig = SamplingConfig(),
        stream_id: str | None = None,
        timeout_s: float | None = None,
    ) -> ClientGroupStream:
        """Groups as they are complete, without rounds, until the stream is closed or there are no more prompts.

        Args:
            prompts: as for a round that carries over.
            group_size: samples of each prompt.
            num_groups: groups in flight.
            sampling: how every member is sampled.
            stream_id: names the stream for good. Without one, it begins with what earlier such streams left.
            timeout_s: bound on the start, and on each wait for the next group.

        Raises:
            Exception: those of `stream_trajectories`.

        """
        bell, bound = Bell(), self._bound(timeout_s)
        call = self._calls.start_stream(
            bell.ring, prompts, group_size=group_size, num_groups=num_groups, sampling=sampling, stream_id=stream_id
        )
        return ClientGroupStream(self._calls, self._run(call, bound), bell, bound)

    def cancel(self, round_id: str, *, timeout_s: float | None = None) -> None:
        """End a round or a stream, whoever waits for it; unfinished groups are carried. Unknown ids are ignored."""
        self._run(self._calls.cancel(round_id), timeout_s)

    def ack(self, cursor: wire.Cursor | None = None, *, timeout_s: float | None = None) -> None:
        """Say that deliveries are used for good, so that the service need not keep them.

        Args:
            cursor: of the checkpoint that is on the disk; by default everything that was handed out so far.
            timeout_s: bound on the call.

        Raises:
            InvalidInputError: the cursor is of another service, or beyond what was handed out.
            BridgeTimeoutError: the service did not answer.

        """
        self._run(self._calls.ack(cursor), timeout_s)

    # ---- weights and status ------------------------------------------------------------------------------------

    def push_weights(
        self,
        named_tensors: Iterable[tuple[str, Any]],
        version: int,
        *,
        delta: bool | Literal["auto"] = False,
        transport: PushTransport = "auto",
        init_info: Any = None,
        timeout_s: float | None = None,
        on_progress: Callable[[PushProgress], None] | None = None,
    ) -> PushReport:
        """Push weights, and wait until the engine samples from them; rounds that run go on meanwhile.

        Args:
            named_tensors: name and tensor of everything in the checkpoint, in any order: torch, NumPy or
                CuPy. It is read once, and a tensor may not change before the push has ended.
            version: above the engine's.
            delta: send only what changed since the last push of this client, see `WeightPusher.push`.
            transport: by default shared memory if the service is on this host, messages otherwise; `nccl` and `ipc`
                are vLLM's own, see `weights/vllm_sync.py`.
            init_info: vLLM's `NCCLTrainerInitInfo` or `IPCTrainerInitInfo`, for those.
            timeout_s: bound on each wait for the service.
            on_progress: called after each tensor.

        Raises:
            InvalidInputError: an argument or a tensor is wrong.
            WeightsPushError: the push did not take place; the engine goes on with the version that it had.
            BridgeTimeoutError: the service did not answer.

        """
        return self._push(
            named_tensors, version, delta=delta, transport=transport, init_info=init_info,
            timeout_s=self._bound(timeout_s), on_progress=on_progress,
        )  # fmt: skip

    def remember_weights(self, named_tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Take weights that the engine has, such as its checkpoint's, as what the next delta is against."""
        self._get_pusher().remember(named_tensors, version)

    def checksum(self, *, timeout_s: float | None = None) -> wire.Checksum:
        """Checksums of the weights that the engine has, computed now."""
        return self._run(self._calls.ask_checksum(), timeout_s)

    def ask_status(self, *, timeout_s: float | None = None) -> wire.Status:
        """What the service is doing now."""
        return self._run(self._calls.ask_status(), timeout_s)

    def close(self) -> None:
        """Leave the service, which keeps what was not acknowledged. What still waits gets a `BridgeClosedError`."""
        self._end()

    # ---- parts -------------------------------------------------------------------------------------------------

    def _start(self, timeout_s: float, prompts: Any, **arguments: Any) -> ClientRound:
        bell = Bell()
        reader = self._run(self._calls.start_round(bell.ring, prompts, **arguments), timeout_s)
        return ClientRound(self._calls, reader, bell, timeout_s)

    def _run(self, call: Call[T], timeout_s: float | None) -> T:
        bound = self._bound(timeout_s)
        return run_call(self._calls, call, bound)


def run_call(calls: BridgeCalls, call: Call[T], timeout_s: float) -> T:
    """Run a call in this thread.

    Raises:
        BridgeTimeoutError: it took longer than `timeout_s`.
        Exception: what the call raises.

    """
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            step = next(call)
            if not wait((step.future,), max(deadline - time.monotonic(), 0.0)).done:
                raise calls.timed_out(step.phase, timeout_s)
    except StopIteration as returned:
        result: T = returned.value
        return result
    finally:
        call.close()
