"""A service that does what a test tells it: a ROUTER in a thread, driven by `wire.py`, without an engine.

It keeps what a service with a state folder keeps (`Store`), so that another one on the same port goes on with it. A
test changes what is sent by `on_send`, and what is answered by `answers`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
import zmq
from wire_examples import trajectory

from longtail.engine.trajectory import Group, Round, RoundStats, Trajectory
from longtail.trainer_bridge import wire

HEARTBEAT_S = 0.1
STATS = RoundStats(
    num_submitted_groups=0, num_complete_groups=0, num_cut_groups=0, num_failed_groups=0, num_cut_members=0,
    num_output_tokens=0, num_kept_tokens=0, num_scheduled_tokens=0, num_recomputed_tokens=0, num_steps=0,
    idle_slot_steps=0, peak_running=0, seconds=0.0,
)  # fmt: skip


def make_group(round_id: str, number: int, members: int = 2) -> Group:
    name = f"{round_id}/{number}"
    return Group(
        group_id=name,
        trajectories=[trajectory(trajectory_id=f"{name}/{i}", round_id=round_id, index=i) for i in range(members)],
        complete=True,
    )


@dataclass
class Store:
    """What survives a restart."""

    epoch: str = "epoch-1"
    deliveries: dict[int, tuple[str, str, bytes]] = field(default_factory=dict)
    last_seq: int = 0
    acked: int = 0
    prompts: list[Any] = field(default_factory=list)
    num_used: int = 0
    ended: set[str] = field(default_factory=set)

    def put(self, round_id: str, value: Group | Round) -> None:
        self.last_seq += 1
        kind = "group" if isinstance(value, Group) else "round"
        self.deliveries[self.last_seq] = (round_id, kind, wire.encode_payload(value))
        if kind == "round":
            self.ended.add(round_id)

    def put_round(self, round_id: str, num_groups: int) -> None:
        for number in range(num_groups):
            self.put(round_id, make_group(round_id, number))
        self.put(round_id, Round(round_id=round_id, target_groups=num_groups, groups=[], stats=STATS))

    def ack(self, seq: int) -> None:
        self.acked = max(self.acked, seq)
        for known in [one for one in self.deliveries if one <= seq]:
            del self.deliveries[known]


#: Gets a message to be sent, and returns those to be sent in its place.
OnSend = Callable[[wire.Message, bytes | None], list[tuple[wire.Message, bytes | None]]]


class ScriptedService:
    """See the module.

    Attributes:
        store: what it keeps.
        received: every message that came, in order.
        answers: called instead of the usual answer to messages of a type; returns whether it dealt with it.
        on_send: changes what is sent.
        is_silent: it takes messages in and does nothing else.
        finishes_rounds: a round that is started ends at once.

    """

    def __init__(self, store: Store | None = None, *, port: int = 0, on_send: OnSend | None = None) -> None:
        self.store = store or Store()
        self.received: list[Any] = []
        self.answers: dict[type[wire.Message], Callable[[Any, memoryview], bool]] = {}
        self.on_send = on_send
        self.is_silent = False
        self.finishes_rounds = True
        self.status = wire.Status(state="idle")
        self.weights_needed: int | None = None
        self.running: dict[str, wire.StartRound] = {}
        self.payloads: dict[str, bytes] = {}
        self.consumer: str | None = None
        self.instance: str | None = None
        self.displaced: set[str] = set()
        self._client: bytes | None = None
        self._next_seq = 1
        self._credit = 0
        self._said = 0.0
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._bind(port)
        self.port = int(self._socket.last_endpoint.rpartition(b":")[2])
        self.address = f"tcp://127.0.0.1:{self.port}"
        self._is_ending = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _bind(self, port: int) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                self._socket.bind(f"tcp://127.0.0.1:{port or '*'}")
                return
            except zmq.ZMQError:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Die: nothing more is sent, not even a farewell."""
        self._is_ending.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        if self.failure is not None:
            raise self.failure

    def restart(self, **changes: Any) -> ScriptedService:
        """Another one with the same store on the same port; this one is dead."""
        self.close()
        return ScriptedService(changes.pop("store", self.store), port=self.port, **changes)

    def do(self, action: Callable[[], None]) -> None:
        """Run something in the thread of the service, and wait until it was."""
        done = threading.Event()

        def run() -> None:
            action()
            done.set()

        self._commands.put(run)
        assert done.wait(10)

    def deliver(self, round_id: str, num_groups: int) -> None:
        self.do(lambda: self.store.put_round(round_id, num_groups))

    def put_groups(self, round_id: str, num_groups: int, name: str | None = None) -> None:
        """Deliver groups of a stream, whose ids begin with `name`."""
        groups = [make_group(name or round_id, number) for number in range(num_groups)]

        def put() -> None:
            for group in groups:
                self.store.put(round_id, group)

        self.do(put)

    def preview(self, round_id: str, value: Trajectory) -> None:
        payload = wire.encode_payload(value)
        self.do(lambda: self.send(wire.Preview(round_id=round_id, num_bytes=len(payload)), payload))

    def say(self, message: wire.Message) -> None:
        self.do(lambda: self.send(message))

    def forget_client(self) -> None:
        """Know nobody, as after a restart."""

        def forget() -> None:
            self._client = None

        self.do(forget)

    def wait_for(self, kind: type[wire.Message], count: int = 1, timeout_s: float = 10.0) -> list[Any]:
        """Wait until so many messages of a type have come."""
        deadline = time.monotonic() + timeout_s
        while len(found := [one for one in list(self.received) if type(one) is kind]) < count:
            assert time.monotonic() < deadline, f"no {kind.__name__}: {self.received}"
            time.sleep(0.005)
        return found

    # ---- in the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_ending.is_set():
                while not self._commands.empty():
                    self._commands.get()()
                if self._socket.poll(5):
                    routing_id, *frames = self._socket.recv_multipart()
                    message, payload = wire.decode_to_service(frames)
                    self.received.append(message)
                    if not self.is_silent:
                        self._answer(routing_id, message, payload)
                if not self.is_silent:
                    self._deliver()
                    if self._client is not None and time.monotonic() - self._said > HEARTBEAT_S:
                        self.send(wire.Heartbeat(status=self._status()))
        except BaseException as error:
            self.failure = error
        finally:
            self._socket.close()
            self._context.term()

    def _status(self) -> wire.Status:
        return msgspec.structs.replace(
            self.status,
            num_unacked=self.store.last_seq - self.store.acked,
            num_prompts=len(self.store.prompts),
            num_prompts_used=self.store.num_used,
        )

    def send(self, message: wire.Message, payload: bytes | None = None, *, to: bytes | None = None) -> None:
        self._said = time.monotonic()
        outgoing = [(message, payload)] if self.on_send is None else self.on_send(message, payload)
        if (client := to or self._client) is not None:
            for one, frame in outgoing:
                self._socket.send_multipart([client, *wire.encode(one, frame)])

    def _deliver(self) -> None:
        while self._client is not None and self._next_seq <= min(self._credit, self.store.last_seq):
            seq, self._next_seq = self._next_seq, self._next_seq + 1
            round_id, kind, payload = self.store.deliveries[seq]
            delivery = wire.Delivery(seq=seq, round_id=round_id, kind=kind, num_bytes=len(payload))  # type: ignore[arg-type]
            self.send(delivery, payload)

    def _answer(self, routing_id: bytes, message: Any, payload: memoryview) -> None:
        if isinstance(message, wire.Hello):
            self._greet(routing_id, message)
            return
        if routing_id != self._client:
            reply_to = getattr(message, "request_id", None)
            self.send(wire.Refused(code="session", message="who are you?", reply_to=reply_to), to=routing_id)
            return
        answer = self.answers.get(type(message))
        if answer is not None and answer(message, payload):
            return
        match message:
            case wire.Credit():
                self._credit = max(self._credit, message.seq)
            case wire.Ping():
                self.send(wire.Heartbeat(status=self._status()))
            case wire.Goodbye():
                self.send(wire.Done(reply_to=message.request_id))
                self._client = self.consumer = None
            case wire.Ack():
                self.store.ack(message.seq)
                self.send(wire.Done(reply_to=message.request_id))
            case wire.AppendPrompts():
                known = len(self.store.prompts) - message.first
                assert known >= 0
                self.store.prompts += wire.decode_prompts(payload)[known:]
                self.send(wire.PromptsAppended(reply_to=message.request_id, num_prompts=len(self.store.prompts)))
            case wire.StartRound():
                self._start(message, bytes(payload))
            case wire.CancelRound():
                was_running = self.running.pop(message.round_id, None)
                self.send(wire.Done(reply_to=message.request_id))
                if was_running is not None and was_running.target_groups is None:
                    self.store.put(
                        message.round_id, Round(round_id=message.round_id, target_groups=0, groups=[], stats=STATS)
                    )
                elif was_running is not None:
                    self.send(wire.RoundFailed(round_id=message.round_id, code="cancelled", message="it was cancelled"))
            case wire.AskChecksum():
                self.send(wire.Checksum(reply_to=message.request_id, version=3, digest=None, model="m"))

    def _greet(self, routing_id: bytes, message: wire.Hello) -> None:
        def refuse(code: wire.RefusalCode) -> None:
            self.send(wire.Refused(code=code, message="no", reply_to=message.request_id), to=routing_id)

        if message.instance in self.displaced or (self.consumer not in (None, message.consumer)):
            refuse("busy")
            return
        if message.cursor is not None and message.cursor.epoch != self.store.epoch:
            refuse("epoch")
            return
        if self.instance not in (None, message.instance) and self._client is not None:
            self.displaced.add(str(self.instance))
            self.send(wire.Refused(code="busy", message="another client came"))
        self._client, self.consumer, self.instance = routing_id, message.consumer, message.instance
        if message.cursor is not None:
            self.store.ack(message.cursor.seq)
        self._next_seq = self.store.acked + 1
        self._credit = self.store.acked + message.credit
        welcome = wire.Welcome(
            reply_to=message.request_id, engine_id="engine", epoch=self.store.epoch, acked=self.store.acked,
            last_seq=self.store.last_seq, model="tiny", max_model_len=64, vocab_size=512, heartbeat_s=HEARTBEAT_S,
            status=self._status(), weights_needed=self.weights_needed,
        )  # fmt: skip
        self.send(welcome)

    def _start(self, message: wire.StartRound, payload: bytes) -> None:
        self.payloads[message.round_id] = payload
        if message.round_id in self.store.ended:
            state = "done"
        elif message.round_id in self.running:
            state = "running"
        else:
            state = "started"
            self.running[message.round_id] = message
        self.send(wire.RoundAccepted(reply_to=message.request_id, round_id=message.round_id, state=state))  # type: ignore[arg-type]
        if state == "started" and self.finishes_rounds and message.target_groups is not None:
            self.finish_round(message.round_id)

    def finish_round(self, round_id: str) -> None:
        """In the thread of the service."""
        start = self.running.pop(round_id)
        self.store.num_used = min(self.store.num_used + (start.target_groups or 0), len(self.store.prompts))
        self.store.put_round(round_id, start.target_groups or 0)


def dropping(indices: set[int], kind: type[wire.Message] = wire.Delivery) -> OnSend:
    """Loses those of a type, counted from 0."""
    count = deque([0])

    def on_send(message: wire.Message, payload: bytes | None) -> list[tuple[wire.Message, bytes | None]]:
        if not isinstance(message, kind):
            return [(message, payload)]
        count[0] += 1
        return [] if count[0] - 1 in indices else [(message, payload)]

    return on_send
