"""Runs a server from a JSON object of arguments: `{"engine": {EngineConfig}, "serve": {arguments of serve}}`."""

from __future__ import annotations

import json
import sys

from longtail.engine.config import EngineConfig
from longtail.engine.server.serve import serve

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    serve(EngineConfig(**arguments["engine"]), **arguments["serve"])
