"""The client's side of `push_channel.PushChannel`."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from longtail.trainer_bridge import wire
from longtail.trainer_bridge.connection.io import ClientIO, check_sendable
from longtail.trainer_bridge.errors import BridgeTimeoutError, WeightsPushError
from longtail.trainer_bridge.weights.push_channel import PushPart, PushReply, PushRequest


class ClientPush:
    """One push of a client, a context manager; see `PushChannel`. A push that ends with an exception is aborted.

    Raises:
        WeightsPushError: entered while another push of this client runs.

    """

    def __init__(self, io: ClientIO, push_id: str) -> None:
        self.push_id = push_id
        self._io = io
        self._session = io.session
        self._changed = threading.Condition(io.lock)
        self._credited = -1
        self._failure: Exception | None = None

    def __enter__(self) -> Self:
        with self._io.lock:
            self._io.check()
            if self._session.push is not None:
                raise WeightsPushError(self.peer, "busy", "another push of this client runs")
            self._session.push = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._io.lock:
            self._session.push = None
            if error is not None:
                self._drop_unsent()
                self._session.send_push(wire.AbortWeights(push_id=self.push_id), None)
        self._io.wake()

    # ---- for the pusher ----------------------------------------------------------------------------------------

    @property
    def peer(self) -> str:
        """See `PushChannel`."""
        return self._io.address

    @property
    def welcome(self) -> wire.Welcome:
        """See `PushChannel`."""
        with self._io.lock:
            self._io.check()
            assert self._session.welcome is not None
            return self._session.welcome

    @property
    def engine_version(self) -> int | None:
        """See `PushChannel`."""
        with self._io.lock:
            self._io.check()
            assert self._session.status is not None
            return self._session.status.weight_version if self._session.weights_needed is None else None

    @property
    def credited(self) -> int:
        """See `PushChannel`."""
        return self._credited

    def next_id(self) -> int:
        """See `PushChannel`."""
        with self._io.lock:
            return self._session.next_id()

    def send(self, message: PushPart, payload: wire.Buffer | None = None) -> None:
        """See `PushChannel`."""
        check_sendable(message)
        with self._io.lock:
            self._check()
            self._session.send_push(message, payload)
        self._io.wake()

    def request(self, message: PushRequest, phase: str, timeout_s: float) -> PushReply:
        """See `PushChannel`."""
        check_sendable(message)
        replies: list[Any] = []

        def on_reply(reply: Any) -> None:
            replies.append(reply)
            self._changed.notify_all()

        with self._changed:
            self._check()
            self._session.request(message, on_reply)
        self._io.wake()
        try:
            self._wait(lambda: bool(replies), phase, timeout_s)
        finally:
            with self._io.lock:
                self._session.forget(message.request_id)
        if isinstance(replies[0], Exception):
            raise replies[0]
        reply: PushReply = replies[0]
        return reply

    def wait_credit(self, serial: int, phase: str, timeout_s: float) -> int:
        """See `PushChannel`."""
        self._wait(lambda: self._credited >= serial, phase, timeout_s)
        return self._credited

    # ---- for the session, under its lock -----------------------------------------------------------------------

    def took(self, serial: int) -> None:
        """Credit has come."""
        self._credited = max(self._credited, serial)
        self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """The push is over."""
        self._failure = self._failure or error
        self._drop_unsent()
        self._changed.notify_all()

    def _wait(self, is_there: Callable[[], bool], phase: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not is_there():
                self._check()
                if (left_s := deadline - time.monotonic()) <= 0:
                    raise BridgeTimeoutError(self.peer, phase, timeout_s, self._session.describe())
                self._changed.wait(left_s)

    def _check(self) -> None:
        self._io.check()
        if self._failure is not None:
            raise self._failure

    def _drop_unsent(self) -> None:
        """Let go of the buffers that were not sent yet."""
        outgoing = self._session.outgoing
        kept = [one for one in outgoing if not isinstance(one[0], PushPart)]
        if len(kept) != len(outgoing):
            self._session.outgoing = deque(kept)
