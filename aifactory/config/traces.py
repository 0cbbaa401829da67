"""The section `runtime.traces`: where spans of OpenTelemetry go, and how many."""

from __future__ import annotations

from pydantic import Field

from aifactory.config.section import Section


class Traces(Section):
    """Spans of requests and of cycles, by OTLP over HTTP (extra `otel`)."""

    endpoint: str = Field(default="http://127.0.0.1:4318/v1/traces", pattern=r"^https?://")
    """Where a collector takes them. Default: http://127.0.0.1:4318/v1/traces."""
    sample: float = Field(default=0.01, ge=0, le=1)
    """Share of the requests that are traced, of those that do not say it themselves by a `traceparent`. Cycles always are.
    Default: 0.01."""
