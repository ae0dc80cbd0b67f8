"""Configuration of the bridge's service, checked when it is built; what the engine does is `EngineConfig`'s.

Nothing here imports torch or vLLM.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from longtail.engine.errors import InvalidInputError
from longtail.engine.server.settings import is_loopback
from longtail.trainer_bridge.wire import MAX_CHUNK_BYTES, MAX_PROMPTS_BYTES


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """One service.

    Attributes:
        address: `tcp://HOST:PORT`, where port 0 lets the system pick, or `ipc://PATH`.
        state: folder of what must survive the service: deliveries that nobody has acknowledged, and prompts. `None`
            keeps them in memory.
        keys: folder with the service's CURVE keys and the public ones of its clients, see `keys.py`; required off
            loopback.
        insecure_no_auth: listen beyond this machine without keys, so that whoever reaches the port can use the engine
            and replace its weights.
        heartbeat_s: how often the service gives a sign of life; whom it has not heard for five times as long, it holds
            for dead.
        max_unacked: no round starts, and no group is taken from a stream, while so many deliveries are not
            acknowledged;
        max_unacked_bytes: or while they have so many bytes. A round that runs is always finished and kept.
        max_prompt_bytes: prompts that were appended and not used yet, as MessagePack; those of rounds that do not carry
            over and wait or run may take so much again.
        chunk_bytes: longest chunk of weights in a message. `num_chunks` may be under way.
        slot_bytes: of a place for a chunk in shared memory; small, so that all `num_slots` stay in a CPU's cache.

    Raises:
        InvalidInputError: a value is wrong; names the attribute.

    """

    address: str = "tcp://127.0.0.1:0"
    state: str | os.PathLike[str] | None = None
    keys: str | os.PathLike[str] | None = None
    insecure_no_auth: bool = False
    heartbeat_s: float = 1.0
    max_unacked: int = 4096
    max_unacked_bytes: int = 1 << 30
    max_prompt_bytes: int = 1 << 28
    chunk_bytes: int = 1 << 20
    num_chunks: int = 16
    slot_bytes: int = 1 << 21
    num_slots: int = 8

    def __post_init__(self) -> None:
        is_remote = _is_remote(self.address)
        for name in ("state", "keys"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), (str, os.PathLike)):
                raise InvalidInputError(f"bridge.{name}", "the path of a folder", getattr(self, name))
        if not isinstance(self.insecure_no_auth, bool):
            raise InvalidInputError("bridge.insecure_no_auth", "true or false", self.insecure_no_auth)
        if self.keys is not None and self.insecure_no_auth:
            raise InvalidInputError("bridge.insecure_no_auth", "not together with keys", True)
        if is_remote and self.keys is None and not self.insecure_no_auth:
            what = "a loopback address, because there are no keys to guard any other (make some: longtail keys DIR)"
            raise InvalidInputError("bridge.address", what, self.address)
        heartbeat: object = self.heartbeat_s
        is_number = isinstance(heartbeat, (int, float)) and not isinstance(heartbeat, bool)
        if not is_number or not math.isfinite(self.heartbeat_s) or not 0.01 <= self.heartbeat_s <= 3600:
            raise InvalidInputError("bridge.heartbeat_s", "seconds in [0.01, 3600]", heartbeat)
        bounds = {
            "max_unacked": 1 << 40, "max_unacked_bytes": 1 << 60, "max_prompt_bytes": 1 << 60,
            "chunk_bytes": MAX_CHUNK_BYTES, "num_chunks": 1024, "slot_bytes": MAX_CHUNK_BYTES, "num_slots": 1 << 16,
        }  # fmt: skip
        for name, high in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise InvalidInputError(f"bridge.{name}", f"an integer in [1, {high}]", value)
        for name in ("chunk_bytes", "slot_bytes"):
            if getattr(self, name) % 64:
                raise InvalidInputError(f"bridge.{name}", "a multiple of 64", getattr(self, name))

    @property
    def is_remote(self) -> bool:
        """Other machines can reach it."""
        return _is_remote(self.address)

    @property
    def max_message_bytes(self) -> int:
        """Longest frame that the service takes; whoever sends a longer one is disconnected."""
        return max(MAX_PROMPTS_BYTES, self.chunk_bytes)


def _is_remote(address: object) -> bool:
    """Whether an address can be reached from elsewhere.

    Raises:
        InvalidInputError: it is none.

    """
    what = "tcp://HOST:PORT or ipc://PATH"
    if not isinstance(address, str):
        raise InvalidInputError("bridge.address", what, address)
    if address.startswith("ipc://") and len(address) > len("ipc://"):
        return False
    try:
        parts = urlsplit(address.replace("*", "0.0.0.0", 1))
        host, port = parts.hostname, parts.port
    except ValueError:
        raise InvalidInputError("bridge.address", what, address) from None
    if parts.scheme != "tcp" or not host or port is None or parts.path or parts.query or parts.username is not None:
        raise InvalidInputError("bridge.address", what, address)
    return not is_loopback(host)
