"""CURVE keys of the bridge: how they are made, kept in files and read.

A folder of keys has `server.key_secret` and `server.key` (the service), and for each client `NAME.key_secret` and
`NAME.key`. Files are ZeroMQ certificates, as `zmq.auth` writes them: `.key` has the public half and may be read by
anybody, `.key_secret` has both and must belong to its reader alone. The service lets in whoever has the secret of a
`.key` in its folder; a client needs its own secret and the service's `server.key`, nothing else.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
import zmq.auth

from longtail.engine.errors import InvalidInputError

SERVER = "server"
CLIENT = "client"

_KEY_CHARS = 40
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_TEMPLATE = """#   {kind} CURVE key of a longtail bridge
metadata
    name = "{name}"
curve
    public-key = "{public}"
"""


@dataclass(frozen=True, kw_only=True)
class ServerKeys:
    """The service's keys, 40 characters each in Z85.

    Attributes:
        public: what clients have to know.
        secret: of the service.
        clients: public keys that are let in, with their names.

    """

    public: bytes
    secret: bytes = field(repr=False)
    clients: dict[bytes, str]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> ServerKeys:
        """The service's keys of a folder, and every client's public one.

        Raises:
            InvalidInputError: a file is missing, no certificate, or a secret that others can read.

        """
        public, secret = _read_secret(Path(folder) / f"{SERVER}.key_secret")
        others = [path for path in sorted(Path(folder).glob("*.key")) if path.stem != SERVER]
        return cls(public=public, secret=secret, clients={_read_public(path): path.stem for path in others})


@dataclass(frozen=True, kw_only=True)
class ClientKeys:
    """A client's keys, 40 characters each in Z85.

    Attributes:
        server: the service's public key; a service without its secret half is not talked to.
        public: of the client.
        secret: of the client.

    """

    server: bytes
    public: bytes
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        for name in ("server", "public", "secret"):
            key = getattr(self, name)
            if not isinstance(key, bytes) or len(key) != _KEY_CHARS:
                raise InvalidInputError(f"keys.{name}", f"{_KEY_CHARS} bytes in Z85", "something else")

    @classmethod
    def read(cls, folder: str | os.PathLike[str], name: str = CLIENT) -> ClientKeys:
        """The keys of the client `name` in a folder.

        Raises:
            InvalidInputError: a file is missing, no certificate, or a secret that others can read.

        """
        public, secret = _read_secret(Path(folder) / f"{name}.key_secret")
        return cls(server=_read_public(Path(folder) / f"{SERVER}.key"), public=public, secret=secret)

    def apply(self, socket: zmq.Socket[Any]) -> None:
        """Make a socket that is not connected yet use them."""
        socket.curve_serverkey = self.server
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.secret


def make_keys(folder: str | os.PathLike[str], names: tuple[str, ...] = (SERVER, CLIENT)) -> list[Path]:
    """Make a pair of keys for each name, in a folder that is made when there is none; returns the files.

    Raises:
        InvalidInputError: a file exists already (keys are never replaced), or the folder can't be written.

    """
    place = Path(folder)
    for name in names:
        if not _NAME.fullmatch(name):
            raise InvalidInputError("keys", "names of letters, digits, dashes and underscores", name)
    files = {name: (place / f"{name}.key", place / f"{name}.key_secret") for name in names}
    for path in (path for pair in files.values() for path in pair):
        if path.exists():
            raise InvalidInputError("keys", "a folder without these keys, because none is replaced", str(path))
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, (public_file, secret_file) in files.items():
            public, secret = zmq.curve_keypair()
            text = _TEMPLATE.format(kind="Public", name=name, public=public.decode())
            both = _TEMPLATE.format(kind="SECRET", name=name, public=public.decode())
            _write(secret_file, f'{both}    secret-key = "{secret.decode()}"\n', 0o600)
            _write(public_file, text, 0o644)
    except OSError as error:
        raise InvalidInputError("keys", f"a folder that can be written ({error.strerror})", str(place)) from error
    return [path for pair in files.values() for path in pair]


def _write(path: Path, text: str, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "w") as file:
        os.fchmod(descriptor, mode)  # whatever the umask says
        file.write(text)


def _read_secret(path: Path) -> tuple[bytes, bytes]:
    try:
        status = path.stat()
    except OSError as error:
        raise InvalidInputError("keys", f"a file with a secret key ({error.strerror})", str(path)) from error
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = f"{path} with mode {stat.S_IMODE(status.st_mode):04o}"
        raise InvalidInputError("keys", "a secret key that only its owner can read (chmod 600)", mode)
    public, secret = _load(path)
    if secret is None:
        raise InvalidInputError("keys", "a certificate with a secret key", str(path))
    if zmq.curve_public(secret) != public:
        raise InvalidInputError("keys", "a certificate whose two keys belong together", str(path))
    return public, secret


def _read_public(path: Path) -> bytes:
    return _load(path)[0]


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise InvalidInputError("keys", f"a ZeroMQ certificate ({error})", str(path)) from error
    for key in (public, *((secret,) if secret else ())):
        if len(key) != _KEY_CHARS:
            raise InvalidInputError("keys", f"keys of {_KEY_CHARS} characters", f"{len(key)} in {path}")
    return public, secret
