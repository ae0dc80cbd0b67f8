"""The one thread of a client that owns its socket: it moves messages between a `ClientSession` and the service.

Everything else happens in the threads of callers, under `lock`, which is held for no longer than a session's method
takes. `wake` makes the thread look at once. A client made before a fork belongs to the process that made it.

ZeroMQ connects again by itself; the monitor tells when, and what went wrong. Nothing is queued for a service that is
not there, since a session repeats what matters.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from longtail.trainer_bridge import wire
from longtail.trainer_bridge.connection.requests import OnReply, Request
from longtail.trainer_bridge.connection.session import ClientSession
from longtail.trainer_bridge.errors import BridgeClosedError, BridgeError, InvalidInputError
from longtail.trainer_bridge.keys import ClientKeys

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"tcp://(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]*]+):([1-9]\d{0,4})|ipc://.+")
_MAX_PORT = 65535
_POLL_S = 0.25
#: Messages that are taken in before others are sent.
_BATCH = 64
_MAX_QUEUED = 256
_RECONNECT_MS, _MAX_RECONNECT_MS = 50, 1000
_LINK_HEARTBEAT_MS = 2000
_GOODBYE_S = 1.0
_CLOSE_TIMEOUT_S = 5.0

_HANDSHAKE_NOTES = {
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed: is the service's key the right one?",
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "the handshake failed: one side wants keys and the other has none",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "the service does not accept the key of this client",
}


class ClientIO:
    """Connects when it is made, and serves `session` until `close`.

    Args:
        address: `tcp://HOST:PORT` or `ipc://PATH`.
        session: used under `lock` only.
        keys: of a service that wants them.

    Raises:
        InvalidInputError: the address is none.

    """

    def __init__(self, address: str, session: ClientSession, keys: ClientKeys | None) -> None:
        match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
        if match is None or int(match[2] or 0) > _MAX_PORT:
            raise InvalidInputError("address", "tcp://HOST:PORT of a service", address)
        self.address = address
        self.session = session
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._is_closing = False
        self._is_connected = False
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._monitor = self._socket.get_monitor_socket()
        try:
            self._connect(keys)
        except zmq.ZMQError as error:
            self._end()
            raise InvalidInputError("address", f"tcp://HOST:PORT of a service ({error})", address) from error
        self._thread = threading.Thread(target=self._run, name="longtail-bridge-client", daemon=True)
        self._thread.start()

    @property
    def lock(self) -> threading.RLock:
        """Of the session. A child of the process has a copy that may be locked for ever, and gets an error instead.

        Raises:
            BridgeClosedError: the client is another process's.

        """
        if os.getpid() != self._pid:
            raise BridgeClosedError(self.address, "the client belongs to the process that made it; connect again here")
        return self._lock

    def check(self) -> None:
        """Raise what ended the session for good, if anything has. Under `lock`.

        Raises:
            BridgeError: it was closed, taken over or refused.

        """
        if self.session.failure is not None:
            raise self.session.failure.with_traceback(None)

    def ask(self, make: Callable[[int], Request], payload: wire.Buffer | None = None) -> Future[Any]:
        """Send a request, which gets a fresh id; the future has its reply.

        Raises:
            BridgeError: see `lock` and `check`.
            InvalidInputError: it can't be sent, because it is too large, or has values that no message can have.

        """
        future = new_reply()
        with self.lock:
            self.check()
            message = make(self.session.next_id())
            check_sendable(message)
            self.session.request(message, into(future), payload)
        self.wake()
        return future

    def ask_status(self) -> Future[Any]:
        """Ask for a `Heartbeat`, see `ask`."""
        future = new_reply()
        with self.lock:
            self.check()
            self.session.ask_status(into(future))
        self.wake()
        return future

    def append_prompts(self, first: int, group_size: int, payload: bytes) -> Future[Any]:
        """Send prompts for the positions from `first` on, see `ask`."""

        def make(request_id: int) -> wire.AppendPrompts:
            num_bytes = len(payload)
            return wire.AppendPrompts(request_id=request_id, first=first, group_size=group_size, num_bytes=num_bytes)

        return self.ask(make, payload)

    def wake(self) -> None:
        """Let the thread send what the session has by now."""
        with self.lock, contextlib.suppress(BlockingIOError, OSError):  # it is awake already, or has ended
            os.write(self._wake_writer, b"\0")

    def close(self) -> None:
        """Say goodbye and end the thread; what waits gets a `BridgeClosedError`. Safe to call twice, in any thread."""
        if os.getpid() != self._pid or self._is_closing:
            return
        said = threading.Event()
        with self.lock:
            self._is_closing = True
            if self.session.is_open:
                self.session.request(wire.Goodbye(request_id=self.session.next_id()), lambda _: said.set())
            else:
                said.set()
        self.wake()
        said.wait(_GOODBYE_S)
        with self.lock:
            self.session.fail(BridgeClosedError(self.address, "the client was closed"))
        self.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_TIMEOUT_S)

    # ---- in the thread -----------------------------------------------------------------------------------------

    def _connect(self, keys: ClientKeys | None) -> None:
        socket = self._socket
        socket.linger = 0
        socket.immediate = True
        socket.sndhwm = socket.rcvhwm = _MAX_QUEUED
        socket.maxmsgsize = wire.MAX_DELIVERY_BYTES
        socket.reconnect_ivl, socket.reconnect_ivl_max = _RECONNECT_MS, _MAX_RECONNECT_MS
        socket.heartbeat_ivl, socket.heartbeat_timeout = _LINK_HEARTBEAT_MS, wire.LINK_TIMEOUT_MS
        socket.ipv6 = self.address.startswith("tcp://[")
        if keys is not None:
            keys.apply(socket)
        socket.connect(self.address)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        has_more = is_full = False
        try:
            while True:
                timeout_s = min(_POLL_S, self.session.heartbeat_s / 2)
                poller.modify(self._socket, zmq.POLLIN | (zmq.POLLOUT if is_full else 0))
                events = dict(poller.poll(0 if has_more else int(timeout_s * 1000) or 1))
                if self._wake_reader in events:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_reader, 4096)
                if self._monitor in events:
                    self._watch_connection()
                has_more = self._receive()
                with self.lock:
                    self.session.tick()
                    is_full = not self._send()
                    if self.session.failure is not None:
                        return
        except Exception as error:
            logger.exception("longtail's bridge client failed; this is a bug")
            with self.lock:
                self.session.fail(BridgeError(self.address, f"the client failed: {type(error).__name__}: {error}"))
        finally:
            self._end()

    def _receive(self) -> bool:
        """Take in what has come; whether there may be more."""
        for _ in range(_BATCH):
            try:
                frames = _receive_frames(self._socket)
            except zmq.Again:
                return False
            try:
                message, payload = wire.decode_to_client(frames)
            except wire.WireError as error:
                with self.lock:
                    self.session.unreadable(error)
                continue
            with self.lock:
                self.session.receive(message, payload)
        return True

    def _send(self) -> bool:
        """Send what the session has; false when the connection takes no more now."""
        outgoing = self.session.outgoing
        while outgoing:
            message, payload = outgoing[0]
            try:
                frames = wire.encode(message, payload)
            except Exception as error:  # one that can't be encoded must not end all others
                logger.exception("%s: a message could not be encoded", self.address)
                self.session.unsendable(error)
                outgoing = self.session.outgoing
                continue
            try:
                self._socket.send_multipart(frames, zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return False
            outgoing.popleft()
        return True

    def _watch_connection(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            kind = event["event"]
            with self.lock:
                if kind == zmq.Event.HANDSHAKE_SUCCEEDED:
                    self._is_connected = True
                    self.session.connected()
                elif kind == zmq.Event.HANDSHAKE_FAILED_AUTH:
                    self.session.fail(BridgeError(self.address, _HANDSHAKE_NOTES[zmq.Event.HANDSHAKE_FAILED_AUTH]))
                elif kind in _HANDSHAKE_NOTES:
                    self.session.disconnected(_HANDSHAKE_NOTES[zmq.Event(kind)])
                elif kind == zmq.Event.DISCONNECTED and self._is_connected:
                    self._is_connected = False
                    self.session.disconnected("the connection was lost")
                elif kind == zmq.Event.CLOSED and not self._is_connected:
                    self.session.unreachable("nobody listens there")

    def _end(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()
        with self.lock:
            os.close(self._wake_reader)
            os.close(self._wake_writer)
            self._wake_writer = -1


def check_sendable(message: wire.Message) -> None:
    """Whether a message fits into its frame.

    Raises:
        InvalidInputError: it does not.

    """
    try:
        num_bytes = len(wire.encode_payload(message))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(
            "request", f"values that a message can have ({error})", type(message).__name__
        ) from error
    if num_bytes > wire.MAX_HEADER_BYTES:
        expected = f"at most {wire.MAX_HEADER_BYTES} bytes besides prompts"
        raise InvalidInputError("request", expected, f"{type(message).__name__} of {num_bytes} bytes")


def new_reply() -> Future[Any]:
    """A future that no waiter can cancel: replies come whether anybody waits or not."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def into(future: Future[Any]) -> OnReply:
    """A callback that settles the future."""

    def settle(reply: Any) -> None:
        if isinstance(reply, Exception):
            future.set_exception(reply)
        else:
            future.set_result(reply)

    return settle


def _receive_frames(socket: zmq.Socket[Any]) -> Sequence[wire.Buffer]:
    """One message; its third frame, which may be large, is not copied."""
    frames: list[wire.Buffer] = []
    frame = socket.recv(zmq.DONTWAIT, copy=False)
    while True:
        frames.append(frame.buffer if len(frames) == 2 else frame.bytes)
        if not frame.more:
            return frames
        frame = socket.recv(zmq.DONTWAIT, copy=False)
