"""Traces of a real server, as a collector gets them."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.end_to_end import server as server_module
from tests.end_to_end.server import serving

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@contextmanager
def collecting_spans():
    """Yield the address of a collector and the bodies that it was sent."""
    bodies = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collecting:
        thread = threading.Thread(target=collecting.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{collecting.server_address[1]}", bodies
        collecting.shutdown()
        thread.join()


@pytest.fixture
def collector():
    with collecting_spans() as told:
        yield told


def spans_in(bodies):
    """Return what a collector was sent, by the names of spans."""
    spans = {}
    for _, body in bodies:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    spans.setdefault(span.name, []).append(span)
    return spans


def test_a_request_is_a_trace_with_a_span_for_each_stage_and_nothing_of_what_was_asked(
    collector, photographs, tmp_path, monkeypatch
):
    url, bodies = collector
    settings = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_SERVICE_NAME": "deixis",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
    }
    environment = server_module.environment
    monkeypatch.setattr(server_module, "environment", lambda **more: environment(**settings, **more))
    with serving("--traces", "true", "--log-format", "json", data_dir=tmp_path) as server, server.client() as client:
        files = [("image", photographs["chelsea"]), ("image", photographs["rocket"])]
        answer = client.post(
            "/v1/classify",
            files=files,
            data={"labels": "tabby cat, rocket", "explain": "true"},
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
        )
        assert answer.status_code == 200
        client.get("/healthz")
    assert {path for path, _ in bodies} == {"/v1/traces"}
    assert not any(b"tabby" in body for _, body in bodies)
    spans = spans_in(bodies)
    assert not any("healthz" in name for name in spans)
    (root,) = spans.pop("POST /v1/classify")
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert {name: len(found) for name, found in spans.items()} == {
        "text": 1,
        "adapt": 1,
        "explain": 1,
        "decode": 2,
        "queue": 2,
        "encode": 2,
    }
    for found in spans.values():
        for span in found:
            assert (span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id)
            assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= root.end_time_unix_nano
    (line,) = (line for line in map(json.loads, server.log) if line.get("path") == "/v1/classify")
    assert line["trace_id"] == TRACE


def test_without_the_setting_nothing_is_sent(collector, tmp_path, monkeypatch):
    url, bodies = collector
    environment = server_module.environment
    monkeypatch.setattr(
        server_module, "environment", lambda **more: environment(OTEL_EXPORTER_OTLP_ENDPOINT=url, **more)
    )
    with serving(data_dir=tmp_path) as server, server.client() as client:
        assert client.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}).status_code == 200
    assert bodies == []
