"""Configuration of the HTTP server, checked when it is built; what the engine does is `EngineConfig`'s.

Nothing here imports vLLM.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longtail.engine.errors import InvalidInputError

MAX_BODY_BYTES = 32 << 20
MAX_MEMBERS = 16_384

#: Options of vLLM's front end that `ServerConfig` sets, or that a server on one socket of its own cannot have.
_OWN_FRONTEND_ARGS = frozenset({"host", "port", "api_key", "allowed_origins", "uds", "grpc_port"})


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """One HTTP server.

    Attributes:
        host: address to listen on, or a name that resolves to one.
        port: 0 lets the system pick.
        api_key: bearer token that every route needs but the read-only ones in `guard.OPEN_PATHS`; `None` for none.
        allow_remote_without_key: listen beyond loopback although there is no key, so that whoever reaches the port
            can run, pause and reload the model.
        rl_routes: vLLM's routes for trainers (`/pause`, `/update_weights`, `/collective_rpc`, ...).
        allowed_origins: origins of web pages that may call the server.
        access_log: a line for each request, on stdout.
        max_body_bytes: longest request body, of any route.
        max_members: most members (prompts x group size) of one round.
        frontend_args: further options of vLLM's front end by name, e.g. `chat_template` or `ssl_certfile`.

    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    allow_remote_without_key: bool = False
    rl_routes: bool = False
    allowed_origins: tuple[str, ...] = ()
    access_log: bool = False
    max_body_bytes: int = MAX_BODY_BYTES
    max_members: int = MAX_MEMBERS
    frontend_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise InvalidInputError("server.host", "an address, e.g. 127.0.0.1 or 0.0.0.0", self.host)
        for name, low, high in (("port", 0, 65535), ("max_body_bytes", 1, None), ("max_members", 1, None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low or (high and value > high):
                bound = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
                raise InvalidInputError(f"server.{name}", bound, value)
        if self.api_key is not None:
            key = self.api_key
            if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable() or " " in key:
                # The key itself must not end up in a log.
                raise InvalidInputError("server.api_key", "printable ASCII characters without blanks", "a key")
        elif not self.allow_remote_without_key and not is_loopback(self.host):
            raise InvalidInputError(
                "server.host", "a loopback address, because there is no API key to guard any other", self.host
            )
        for name in self.frontend_args:
            if name in _OWN_FRONTEND_ARGS:
                raise InvalidInputError(f"server.frontend_args.{name}", "an option that longtail does not set", name)


def is_loopback(host: str) -> bool:
    """Only this machine can reach `host`; a name counts when every address of it does."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening.

    Raises:
        InvalidInputError: the address cannot be used.

    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        what = f"an address that can be listened on ({error.strerror or error})"
        raise InvalidInputError("server.host", what, f"{host}:{port}") from error
    return listener
