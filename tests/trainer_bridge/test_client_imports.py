"""The client installs into any trainer's environment: it imports neither vLLM nor torch, and starts no thread."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json, sys, threading
import longtail.trainer_bridge as bridge
light = sorted(sys.modules)
for name in ("AsyncBridgeClient", "BridgeClient", "BridgeError", "BridgeFleet", "ClientKeys", "Cursor", "FleetCursor"):
    getattr(bridge, name)
from longtail.trainer_bridge.weights import delta, manifest, push, ring
heavy = {"vllm", "torch", "transformers", "zmq", "numpy"}
print(json.dumps({
    "package": sorted(heavy & set(light)),
    "client": sorted(heavy & set(sys.modules)),
    "threads": threading.active_count(),
}))
"""


def test_the_client_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    assert found == {"package": [], "client": ["numpy", "zmq"], "threads": 1}


def test_every_name_is_there() -> None:
    script = "import longtail.trainer_bridge as b; [getattr(b, name) for name in b.__all__]; assert not hasattr(b, 'x')"
    subprocess.run([sys.executable, "-c", script], timeout=120, check=True)
