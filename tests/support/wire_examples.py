"""One message of each type, with its third frame, and a trajectory."""

from __future__ import annotations

from typing import Any

from longtail.engine.config import SamplingConfig
from longtail.engine.trajectory import Timings, TokenCounts, Trajectory, VersionSpan
from longtail.trainer_bridge import wire

SPEC = wire.TensorSpec("model.layers.0.weight", "bfloat16", (3, 5))
STATUS = wire.Status(state="throttled", reason="the trainer has 64 groups", counters={"output_tokens": 3.0})

TO_SERVICE: list[tuple[Any, bytes | None]] = [
    (wire.Hello(request_id=1, consumer="t", instance="i", cursor=wire.Cursor("e", 7), credit=3), None),
    (wire.Goodbye(request_id=2), None),
    (wire.Ping(), None),
    (wire.AppendPrompts(request_id=3, first=4, group_size=2, num_bytes=5), b"12345"),
    (wire.StartRound(request_id=4, round_id="r", group_size=2, sampling=SamplingConfig(stop=("a",), seed=3)), None),
    (wire.CancelRound(request_id=5, round_id="r"), None),
    (wire.Credit(seq=9), None),
    (wire.Ack(request_id=6, seq=9), None),
    (wire.BeginWeights(request_id=7, push_id="p", version=3, base_version=2, transport="shm"), None),
    (wire.WeightsTensor(push_id="p", index=0, spec=SPEC, payload_bytes=30), None),
    (wire.WeightsChunk(push_id="p", serial=0, offset=0, length=3, checksum="00", num_bytes=3), b"abc"),
    (wire.WeightsChunk(push_id="p", serial=1, offset=3, length=3, slot=2), None),
    (
        wire.WeightsParts(
            push_id="p",
            num_bytes=3,
            parts=[
                wire.WeightsTensor(push_id="p", index=1, spec=SPEC, payload_bytes=30, num_changed=2),
                wire.WeightsChunk(push_id="p", serial=2, offset=0, length=3, num_bytes=3),
            ],
        ),
        b"abc",
    ),
    (wire.CommitWeights(request_id=8, push_id="p", num_tensors=1, digest="00"), None),
    (wire.AbortWeights(push_id="p"), None),
    (wire.ControlWeights(request_id=9, op="update", info={"names": ["a"]}, version=3), None),
    (wire.AskChecksum(request_id=10), None),
]
TO_CLIENT: list[tuple[Any, bytes | None]] = [
    (
        wire.Welcome(
            reply_to=1, engine_id="g", epoch="e", acked=3, last_seq=9, model="m", max_model_len=64, vocab_size=9,
            heartbeat_s=1.0, status=STATUS, weights_needed=4, ring=wire.RingSpec("/proc/1/fd/3", "ab", 64, 1024, 8),
        ),
        None,
    ),
    (wire.Done(reply_to=2, note="it had ended"), None),
    (wire.Refused(code="invalid", message="m", reply_to=3, field="f", expected="e", got="g", push_id="p"), None),
    (wire.PromptsAppended(reply_to=3, num_prompts=8, num_known=2), None),
    (wire.RoundAccepted(reply_to=4, round_id="r", state="running"), None),
    (wire.Delivery(seq=1, round_id="r", kind="group", num_bytes=2), b"ab"),
    (wire.Preview(round_id="r", num_bytes=2), b"ab"),
    (wire.RoundFailed(round_id="r", code="engine", message="it died"), None),
    (wire.WeightsReady(reply_to=7, push_id="p", window=8, chunk_bytes=4096), None),
    (wire.WeightsCredit(push_id="p", serial=3), None),
    (wire.WeightsApplied(reply_to=8, push_id="p", version=3, digest="d", pause_s=0.1, num_bytes_received=30), None),
    (wire.Checksum(reply_to=10, version=3, digest=None, model="x"), None),
    (wire.Heartbeat(status=STATUS), None),
]  # fmt: skip


def trajectory(**changes: Any) -> Trajectory:
    fields: dict[str, Any] = {
        "trajectory_id": "r/0/0", "round_id": "r", "group_id": "g", "index": 0, "prompt_token_ids": [1, 2],
        "output_token_ids": [3, 4, 5], "logprobs": [-0.1, -1e-7, -3.4028234663852886e38], "source_mask": [1, 1, 0],
        "weight_versions": [VersionSpan("3", 0, 2), VersionSpan("4", 2, 3)], "finish_reason": "stop",
        "timings": Timings(submitted_s=0.0), "tokens": TokenCounts(scheduled=5), "metadata": {"answer": "ä", "n": [1]},
    }  # fmt: skip
    return Trajectory(**(fields | changes))
