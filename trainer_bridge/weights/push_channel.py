"""The narrow way by which a push of weights talks to the service: `connection/push.py` has the client's side of it.

A pusher runs in its caller's thread. It sends what its window allows and waits for credit; everything that can end a
push (a refusal, a lost session, a client that is closed, a timeout) is raised by the next call of any method.

    with client.push_channel(push_id) as channel:
        ready = channel.request(BeginWeights(request_id=channel.next_id(), ...), "the service to take weights", 60.0)
        channel.send(WeightsParts(parts=[WeightsTensor(...), WeightsChunk(serial=0, ...)], ...), payload)
        channel.wait_credit(0, "chunk 0 to be taken", 60.0)
        applied = channel.request(CommitWeights(request_id=channel.next_id(), ...), "the weights to be applied", 600.0)
"""

from __future__ import annotations

from typing import Protocol

from longtail.trainer_bridge import wire

#: What a pusher sends without waiting, what it may ask, and what it gets.
PushPart = wire.WeightsTensor | wire.WeightsChunk | wire.WeightsParts
PushRequest = wire.BeginWeights | wire.CommitWeights | wire.ControlWeights
PushReply = wire.WeightsReady | wire.WeightsApplied | wire.Done


class PushChannel(Protocol):
    """One push. Its methods belong to one thread, or to several that call one at a time.

    Attributes:
        peer: address of the service, for errors.
        push_id: of the push; what is sent must have it.
        welcome: of the present session; its `ring` matters.
        engine_version: of the engine's weights, as last heard; `None` while it needs whole ones.
        credited: serial of the last chunk that the service has taken, -1 before the first.

    """

    @property
    def peer(self) -> str: ...

    @property
    def push_id(self) -> str: ...

    @property
    def welcome(self) -> wire.Welcome: ...

    @property
    def engine_version(self) -> int | None: ...

    @property
    def credited(self) -> int: ...

    def next_id(self) -> int:
        """A fresh `request_id`."""

    def send(self, message: PushPart, payload: wire.Buffer | None = None) -> None:
        """Queue a message; returns at once. Messages of a push go out in the order of the calls.

        Nothing here bounds the queue: the pusher does, by its window. `payload` is not copied. It is kept alive, and
        its content must stay as it is until credit for its chunk has come; after an error it may change at once,
        because nothing of that push is applied any more.

        Raises:
            WeightsPushError: the service refused the push, or the session it was begun in is gone.
            BridgeClosedError: the client was closed or taken over.

        """

    def request(self, message: PushRequest, phase: str, timeout_s: float) -> PushReply:
        """Send a request and wait for its reply; a commit is repeated in a new session, the rest is not.

        Args:
            message: its `request_id` is from `next_id()`.
            phase: what is waited for, as `BridgeTimeoutError` says it: "the weights to be applied".
            timeout_s: bound on the wait.

        Raises:
            WeightsPushError, BridgeClosedError: as `send`.
            BridgeTimeoutError: no reply in time. The push is not over by that; leaving its context aborts it.

        """

    def wait_credit(self, serial: int, phase: str, timeout_s: float) -> int:
        """Wait until the service has taken chunk `serial`; returns the last chunk that it has taken.

        Raises:
            Exception: those of `request`.

        """
