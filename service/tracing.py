"""Optional OpenTelemetry traces: a span for each request and one for each of its legs.

This module is imported only when traces are wanted; nothing else here knows of OpenTelemetry.
"""

import time
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from service.intake import UNMATCHED
from service.metrics.registry import build_version
from service.scoring import Timings

# Methods that HTTP defines; a client can invent others, which must not become names.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_EXPORT_S = 3.0  # also how much longer the service may take to stop while the collector is away
_CARRIED = (b"traceparent", b"tracestate")


class Traces:
    """Where spans go. Sampling and attributes of the process follow OpenTelemetry's own variables."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("sella", build_version())
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> "Traces":
        """Send spans to an OTLP/HTTP collector, in batches, from a thread."""
        provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "sella"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_S)))
        return cls(provider)

    def request(self, method: str, scope: Scope) -> Any:
        """Return the context manager of a request's span, a child of what the request's headers name."""
        carrier = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CARRIED}
        return self._tracer.start_as_current_span(
            method,
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method},
            # A message may quote a title or an id.
            record_exception=False,
            set_status_on_exception=False,
        )

    def legs(self, parent: Span, timings: Timings) -> None:
        """Add the spans of a request's legs, which have ended already."""
        epoch_ns = time.time_ns() - time.monotonic_ns()
        context = trace.set_span_in_context(parent)
        for name, began, ended in timings.spans:
            span = self._tracer.start_span(name, context=context, start_time=epoch_ns + round(began * 1e9))
            span.end(epoch_ns + round(ended * 1e9))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class TraceRequests:
    """ASGI middleware: a span for each request, its legs below it."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self._app = app
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        with self._traces.request(method, scope) as span:
            try:
                with bound_contextvars(trace_id=trace.format_trace_id(span.get_span_context().trace_id)):
                    await self._app(scope, receive, noting)
            finally:
                self._describe(span, method, scope, status)

    def _describe(self, span: Span, method: str, scope: Scope, status: int) -> None:
        route = getattr(scope.get("route"), "path", UNMATCHED)
        state = scope.get("state", {})
        span.update_name(f"{method} {route}")
        span.set_attributes(
            {"http.route": route, "http.response.status_code": status, "sella.request_id": state.get("request_id", "")}
        )
        if status >= 500 or not status:
            span.set_status(StatusCode.ERROR)
        timings = state.get("timings")
        if timings is not None:
            self._traces.legs(span, timings)
