"""The bridge's series for Prometheus, read from the service when it is scraped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from longtail.engine.errors import InvalidInputError
from longtail.trainer_bridge.service.service import BridgeService

#: Name of the series, key in `BridgeService.counters`, help.
_COUNTERS = (
    ("longtail_bridge_output_tokens", "output_tokens", "Output tokens of the groups that were put into the outbox."),
    ("longtail_bridge_throttled_seconds", "throttled_s", "Time that rounds waited for acknowledgements."),
    ("longtail_bridge_deliveries", "deliveries_sent", "Deliveries sent, repeated ones included."),
    ("longtail_bridge_delivery_bytes", "delivery_bytes_sent", "Bytes of them."),
    ("longtail_bridge_previews_dropped", "previews_dropped", "Previews that a slow trainer did not get."),
    ("longtail_bridge_pushes", "pushes", "Pushes of weights that were applied."),
    ("longtail_bridge_pushes_refused", "pushes_refused", "Pushes of weights that were refused, or not finished."),
    ("longtail_bridge_push_bytes", "push_bytes", "Bytes of applied pushes."),
    ("longtail_bridge_push_seconds", "push_s", "Time from the begin of a push to its end, applied ones."),
    ("longtail_bridge_pause_seconds", "pause_s", "Time that no engine step ran because of pushes."),
    ("longtail_bridge_keys_refused", "keys_refused", "Connections with a key that is not a client's."),
)
_STATES = ("idle", "running", "throttled", "updating", "needs_weights", "dead")


class BridgeCollector(Collector):
    """Reads one service."""

    def __init__(self, service: BridgeService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """What the service counts, now."""
        status = self._service.status()
        for name, key, text in _COUNTERS:
            yield CounterMetricFamily(name, text, value=status.counters[key])
        rejected = CounterMetricFamily(
            "longtail_bridge_messages_rejected", "Messages that could not be read.", labels=("problem",)
        )
        for problem, count in sorted(dict(self._service.problems).items()):
            rejected.add_metric((problem,), count)
        yield rejected
        num_left = status.num_prompts - status.num_prompts_used
        gauges = {
            "longtail_bridge_unacked": ("Deliveries that were not acknowledged.", status.num_unacked),
            "longtail_bridge_unacked_bytes": ("Bytes of them.", status.counters["unacked_bytes"]),
            "longtail_bridge_prompts_left": ("Prompts that no round used.", num_left),
            "longtail_bridge_weight_version": ("Version of the engine's weights.", status.weight_version),
            "longtail_bridge_requests_in_flight": ("Requests in the engine.", status.num_running),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        state = GaugeMetricFamily("longtail_bridge_state", "1 for the state that the service is in.", labels=("state",))
        for name in _STATES:
            state.add_metric((name,), float(name == status.state))
        yield state


class MetricsServer:
    """`/metrics` of one service, on loopback; a port of 0 lets the system pick."""

    def __init__(self, service: BridgeService, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(BridgeCollector(service))
        self._server: WSGIServer
        self._thread: threading.Thread
        try:
            self._server, self._thread = start_http_server(port, addr="127.0.0.1", registry=registry)
        except (OSError, OverflowError) as error:
            raise InvalidInputError("metrics_port", f"a port that can be listened on ({error})", port) from error
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Give the port up."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)
