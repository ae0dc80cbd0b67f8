"""The service's socket, who may open it, and the bell that wakes its thread.

A `Door` is bound when it is made, so that a taken port fails before a model is loaded; what arrives then waits, within
ZeroMQ's bounds. From the first `wait` on it belongs to one thread; only `ring` may be called from others.

Bounds: a frame of more than `max_message_bytes` disconnects its sender; `_QUEUE_MESSAGES` wait for each connection in
each direction. ZeroMQ keeps the parts of a message that is not whole yet, so that a peer that never ends one is a peer
that must not be let in: keys are what keeps it out.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import zmq

from longtail.engine.errors import InvalidInputError
from longtail.trainer_bridge.keys import ServerKeys
from longtail.trainer_bridge.service.config import BridgeConfig
from longtail.trainer_bridge.wire import LINK_TIMEOUT_MS, Buffer

_QUEUE_MESSAGES = 64
_HANDSHAKE_MS = 10_000
_LINGER_MS = 1000
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_ZAP_DOMAIN = "longtail"

_logger = logging.getLogger("longtail.trainer_bridge.service.door")

Sent = Literal["sent", "full", "gone"]


class Door:
    """See the module; a context manager.

    Attributes:
        address: where it is, with the port that the system picked.
        server_key: the service's public key, `None` without keys.
        num_keys_refused: connections whose key is not among the clients'.

    Raises:
        InvalidInputError: the address can't be bound, or the keys can't be read.

    """

    def __init__(self, config: BridgeConfig) -> None:
        keys = None if config.keys is None else ServerKeys.read(config.keys)
        if keys is not None and not keys.clients:
            raise InvalidInputError("bridge.keys", "a folder with a client's public key", str(config.keys))
        if config.is_remote and keys is None:
            _logger.warning("%s is open to everybody who can reach it: there are no keys", config.address)
        self.server_key = None if keys is None else keys.public.decode()
        self.num_keys_refused = 0
        self._clients = {} if keys is None else keys.clients
        self._bell_lock = threading.Lock()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._zap = self._context.socket(zmq.REP)
            self._zap.bind(_ZAP_ADDRESS)
            self._router = self._context.socket(zmq.ROUTER)
            _set_options(self._router, config, keys)
            try:
                self._router.bind(config.address)
            except zmq.ZMQError as error:
                what = f"an address that can be listened on ({error})"
                raise InvalidInputError("bridge.address", what, config.address) from error
            self.address = str(self._router.getsockopt_string(zmq.LAST_ENDPOINT))
            self._poller = zmq.Poller()
            for source in (self._router, self._zap, self._bell):
                self._poller.register(source, zmq.POLLIN)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def ring(self) -> None:
        """Wake the thread that waits. In any thread."""
        with self._bell_lock:
            if self._bell >= 0:
                with contextlib.suppress(BlockingIOError):  # full is loud enough
                    os.eventfd_write(self._bell, 1)

    def wait(self, timeout_s: float) -> None:
        """Return when a message came, the bell rang, or after `timeout_s`; let in who has a key meanwhile."""
        ready = dict(self._poller.poll(max(0, int(timeout_s * 1000))))
        if self._bell in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)
        if self._zap in ready:
            self._check_key()

    def messages(self, limit: int) -> Iterator[tuple[bytes, list[memoryview]]]:
        """At most `limit` messages that are here, with their senders."""
        for _ in range(limit):
            try:
                sender, *frames = self._router.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            yield sender.bytes, [frame.buffer for frame in frames]

    def send(self, receiver: bytes, frames: Sequence[Buffer]) -> Sent:
        """Send a message; large frames are not copied.

        `full`: as many wait for the receiver as may. `gone`: nobody is connected under that name.
        """
        try:
            self._router.send_multipart([receiver, *frames], zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return "full"
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, zmq.EHOSTUNREACH):
                return "gone"
            raise
        return "sent"

    def close(self) -> None:
        """Send what waits, for a second at most, and give the address up. Safe to call twice."""
        with self._bell_lock:
            bell, self._bell = self._bell, -1
        if bell >= 0:
            self._context.destroy(linger=_LINGER_MS)
            os.close(bell)

    def _check_key(self) -> None:
        """Answer one request of ZeroMQ's authentication protocol (RFC 27)."""
        parts = self._zap.recv_multipart()
        version, request_id, domain, address, _identity, mechanism, *credentials = parts
        name = None
        if version == b"1.0" and domain.decode() == _ZAP_DOMAIN and mechanism == b"CURVE" and credentials:
            name = self._clients.get(zmq.utils.z85.encode(credentials[0]))
        if name is None:
            self.num_keys_refused += 1
            _logger.warning("refused a connection from %s: its key is not a client's", address.decode(errors="replace"))
        code, text = (b"400", b"unknown key") if name is None else (b"200", b"OK")
        self._zap.send_multipart([version, request_id, code, text, (name or "").encode(), b""])


def _set_options(router: zmq.Socket[Any], config: BridgeConfig, keys: ServerKeys | None) -> None:
    heartbeat_ms = max(1, int(config.heartbeat_s * 1000))
    options = {
        zmq.ROUTER_MANDATORY: 1,  # a message that nobody gets is an error, not lost
        zmq.MAXMSGSIZE: config.max_message_bytes,
        zmq.SNDHWM: _QUEUE_MESSAGES,
        zmq.RCVHWM: _QUEUE_MESSAGES,
        zmq.LINGER: _LINGER_MS,
        zmq.HANDSHAKE_IVL: _HANDSHAKE_MS,
        zmq.HEARTBEAT_IVL: heartbeat_ms,
        # Who is dead is known from the protocol's own heartbeats.
        zmq.HEARTBEAT_TIMEOUT: max(LINK_TIMEOUT_MS, 5 * heartbeat_ms),
    }
    for option, value in options.items():
        router.setsockopt(option, value)
    if config.address.startswith("tcp://["):
        router.ipv6 = True
    if keys is not None:
        router.curve_server = True
        router.curve_secretkey = keys.secret
        router.zap_domain = _ZAP_DOMAIN.encode()
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
