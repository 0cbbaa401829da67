"""Traces: spans of OpenTelemetry (extra `otel`), from an HTTP request to the engine's steps, and from a cycle to its stages.

Off unless `runtime.traces` says where they go; then nothing of OpenTelemetry is loaded, and a span costs a comparison.

    request ─▶ admission, generate ─▶ engine.prefill (a chunk), engine.step (one token of every row)
    cycle ─▶ ingest, tokenize, train, evaluate, promote ─▶ make (an artifact)

A request that brings a W3C `traceparent` is a part of that trace, and sampled as it says; of others a share is. Cycles always are.
Source   W3C Trace Context; OpenTelemetry SDK, ParentBased and TraceIdRatioBased sampling.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aifactory.errors import ConfigError

if TYPE_CHECKING:
    from aifactory.config import Traces

CYCLE = "cycle"
Parent = Any
"""What a span belongs to; None: to nobody who is traced."""
_tracer: Any = None
_provider: Any = None


def start(traces: Traces | None, *, service: str) -> None:
    """Send the spans of this process where the configuration says, if it does; again, nothing happens.

    Raises   ConfigError where OpenTelemetry is not installed.
    """
    if traces is None or _tracer is not None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"expected OpenTelemetry for runtime.traces, found that it is not installed ({error.name}); pip install "
            "'aifactory[otel]', or leave runtime.traces out."
        ) from error
    resource = Resource.create({"service.name": f"aifactory-{service}"})
    provider = TracerProvider(sampler=sampler(traces.sample), resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=traces.endpoint)))
    use(provider)


def use(provider: Any) -> None:
    """Have this provider of OpenTelemetry make the spans; None: trace no more."""
    global _tracer, _provider
    _provider = provider
    _tracer = None if provider is None else provider.get_tracer("aifactory")


def flush() -> None:
    """Send what waits, before the process ends."""
    if _provider is not None:
        _provider.force_flush(5_000)


def sampler(share: float) -> Any:
    """Cycles, what has a parent that is sampled, and a share of all else."""
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased

    ratio = TraceIdRatioBased(share)

    class Root(Sampler):
        def should_sample(self, parent_context: Any, trace_id: int, name: str, *rest: Any, **named: Any) -> Any:
            chosen = ALWAYS_ON if name == CYCLE else ratio
            return chosen.should_sample(parent_context, trace_id, name, *rest, **named)

        def get_description(self) -> str:
            return f"cycles, and {share:g} of all else"

    return ParentBased(Root())


def current() -> Parent:
    """What belongs to the span that is open here; None where none is, or where it is not sampled."""
    if _tracer is None:
        return None
    from opentelemetry import context, trace

    return context.get_current() if trace.get_current_span().is_recording() else None


def trace_id() -> str | None:
    """Of the span that is open here, 32 hex digits."""
    if _tracer is None:
        return None
    from opentelemetry import trace

    found = trace.get_current_span().get_span_context()
    return f"{found.trace_id:032x}" if found.is_valid else None


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[None]:
    """A span around a block, within the one that is open here. An error that leaves the block is its status."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(name, attributes=attributes):
        yield


class OpenSpan:
    """A span that ends where it did not begin."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    @property
    def parent(self) -> Parent:
        """For spans within it; None where it is not sampled."""
        if self._span is None or not self._span.is_recording():
            return None
        from opentelemetry import trace

        return trace.set_span_in_context(self._span)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Spans that are opened in the block are within it."""
        if self._span is None:
            yield
            return
        from opentelemetry import trace

        with trace.use_span(self._span, record_exception=False, set_status_on_exception=False):
            yield

    def end(self, *, error: str | None = None, **attributes: Any) -> None:
        """End it; a second time nothing happens."""
        if self._span is None:
            return
        span, self._span = self._span, None
        span.set_attributes(attributes)
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            span.set_status(Status(StatusCode.ERROR, error))
        span.end()


_NONE = OpenSpan()


def begin(name: str, parent: Parent, **attributes: Any) -> OpenSpan:
    """Begin a span within `parent`; none where that is None."""
    if _tracer is None or parent is None:
        return _NONE
    return OpenSpan(_tracer.start_span(name, context=parent, attributes=attributes))


def begin_request(headers: Mapping[str, str], name: str, **attributes: Any) -> OpenSpan:
    """Begin the span of a request, in the trace that its headers name (`traceparent`, `tracestate`)."""
    if _tracer is None:
        return _NONE
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {key: headers[key] for key in ("traceparent", "tracestate") if key in headers}
    context = TraceContextTextMapPropagator().extract(carrier, context=Context())
    return OpenSpan(_tracer.start_span(name, context=context, kind=SpanKind.SERVER, attributes=attributes))


def record(name: str, parent: Parent, *, began_ns: int, **attributes: Any) -> None:
    """A span within `parent` that began at `began_ns` (`now`) and ends now."""
    if _tracer is not None and parent is not None:
        _tracer.start_span(name, context=parent, start_time=began_ns, attributes=attributes).end()


def now() -> int:
    """Nanoseconds since 1970."""
    return time.time_ns()
