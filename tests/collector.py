"""A stand-in of an OpenTelemetry collector on loopback: one that keeps what it is sent."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

SOON_S = 5.0


class Collector:
    """What came so far. `open` lets answers go out; until then they are held back."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.meters: dict[str, list[float]] = {}
        self.instances: set[str] = set()
        self.open = threading.Event()
        self.asked = threading.Event()
        self.url = ""

    def take(self, path: str, body: bytes) -> None:
        """Keep a request's content."""
        if path == "/v1/traces":
            for traced in ExportTraceServiceRequest.FromString(body).resource_spans:
                self._about(traced.resource)
                self.spans += [span for scope in traced.scope_spans for span in scope.spans]
        else:
            assert path == "/v1/metrics", path
            for metered in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                self._about(metered.resource)
                for metric in (each for scope in metered.scope_metrics for each in scope.metrics):
                    points = getattr(metric, metric.WhichOneof("data") or "gauge").data_points
                    self.meters[metric.name] = [
                        p.sum if hasattr(p, "sum") else p.as_double or p.as_int for p in points
                    ]

    def _about(self, resource: Any) -> None:
        told = {each.key: each.value.string_value for each in resource.attributes}
        self.instances.add(f"{told['service.name']} {told['service.instance.id']}")


@contextmanager
def collecting(*, answers: bool = True) -> Iterator[Collector]:
    """Serve a collector meanwhile; one that does not answer holds every request back."""
    kept = Collector()
    if answers:
        kept.open.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept.asked.set()
            kept.open.wait(SOON_S)
            kept.take(self.path, body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Who went without the answer is a part of the test."""

    with Server(("127.0.0.1", 0), Handler) as server:
        kept.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield kept
        finally:
            kept.open.set()
            server.shutdown()
            thread.join()
