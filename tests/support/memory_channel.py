"""A push channel without sockets: what a pusher sends reaches a `Staging` at once, through the wire format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from longtail.trainer_bridge import wire
from longtail.trainer_bridge.errors import BridgeTimeoutError, PushRefusedError, WeightsPushError
from longtail.trainer_bridge.weights.staging import Staged, Staging


class MemoryChannel:
    """One push. `apply` is the engine: it gets what was staged, and may raise."""

    peer = "memory"

    def __init__(
        self,
        staging: Staging,
        push_id: str = "push",
        *,
        apply: Callable[[Staged], None] | None = None,
        welcome: wire.Welcome | None = None,
        tamper: Callable[[wire.Message, bytes], tuple[wire.Message, bytes]] | None = None,
        heard_version: int | None = None,
    ) -> None:
        self._heard_version = heard_version
        self.push_id = push_id
        self.welcome = welcome or welcome_of(staging)
        self.credited = -1
        self.most_ahead = 0
        self.sent: list[wire.Message] = []
        self.staged: Staged | None = None
        self._staging = staging
        self._apply = apply
        self._tamper = tamper
        self._failure: WeightsPushError | None = None
        self._ids = 0

    @property
    def engine_version(self) -> int | None:
        if self._heard_version is not None:
            return self._heard_version
        return None if self._staging.is_needed else self._staging.version

    def next_id(self) -> int:
        self._ids += 1
        return self._ids

    def send(self, message: Any, payload: Any = None) -> None:
        if self._failure is not None:
            raise self._failure
        decoded, body = wire.decode_to_service(wire.encode(message, payload))
        parts = decoded.parts if isinstance(decoded, wire.WeightsParts) else [decoded]
        try:
            for part in parts:
                self._take(part, body if part is parts[-1] and body.nbytes else None)
        except PushRefusedError as error:
            self._failure = self._refused(error)

    def _take(self, part: Any, payload: Any) -> None:
        if self._tamper is not None:
            part, payload = self._tamper(part, payload)
        part, body = wire.decode_to_service(wire.encode(part, payload))
        self.sent.append(part)
        if isinstance(part, wire.WeightsTensor):
            self._staging.tensor(part)
        elif isinstance(part, wire.WeightsChunk):
            self.most_ahead = max(self.most_ahead, part.serial - self.credited)
            credit = self._staging.chunk(part, body)
            self.credited = self.credited if credit is None else credit

    def request(self, message: Any, phase: str, timeout_s: float) -> Any:
        if self._failure is not None:
            raise self._failure
        self.sent.append(message)
        decoded, _ = wire.decode_to_service(wire.encode(message))
        try:
            if isinstance(decoded, wire.BeginWeights):
                ready = self._staging.begin(decoded)
                return wire.WeightsReady(reply_to=decoded.request_id, push_id=self.push_id, **ready)
            assert isinstance(decoded, wire.CommitWeights)
            self.staged = self._staging.commit(decoded)
        except PushRefusedError as error:
            raise self._refused(error) from error
        try:
            if self._apply is not None:
                self._apply(self.staged)
        except Exception as error:
            self._staging.abort()
            raise WeightsPushError(self.peer, "apply", str(error)) from error
        self._staging.applied()
        return wire.WeightsApplied(
            reply_to=decoded.request_id,
            push_id=self.push_id,
            version=self.staged.version,
            digest=self.staged.digest,
            pause_s=0.0,
            num_bytes_received=self.staged.num_bytes_received,
        )

    def wait_credit(self, serial: int, phase: str, timeout_s: float) -> int:
        if self._failure is not None:
            raise self._failure
        if self.credited < serial:
            raise BridgeTimeoutError(self.peer, phase, timeout_s)
        return self.credited

    def _refused(self, error: PushRefusedError) -> WeightsPushError:
        return WeightsPushError(self.peer, error.code, str(error), error.field, error.expected, error.got)


def welcome_of(staging: Staging) -> wire.Welcome:
    """What the service would have said when the session began."""
    return wire.Welcome(
        reply_to=0, engine_id="engine", epoch="epoch", acked=0, last_seq=0, model="model", max_model_len=1,
        vocab_size=1, heartbeat_s=1.0, ring=staging.ring,
        weights_needed=staging.version if staging.is_needed else None,
        status=wire.Status(state="idle", weight_version=staging.version),
    )  # fmt: skip
