"""Spans of a request, from the head of HTTP to the engine's steps, as the SDK's in-memory exporter has them."""

from __future__ import annotations

import time

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from aifactory.observe import tracing

ASKED = {"model": "alpha", "prompt": "the quick brown fox", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


class Spans:
    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def of(self, name: str, *, least: int = 1) -> list:
        """Those that have ended, in the order of their beginnings; waits for as many."""
        deadline = time.monotonic() + 10
        while True:
            found = [span for span in self._exporter.get_finished_spans() if span.name == name]
            if len(found) >= least:
                return sorted(found, key=lambda span: span.start_time)
            assert time.monotonic() < deadline, (name, [span.name for span in self._exporter.get_finished_spans()])
            time.sleep(0.01)

    def all(self) -> list:
        return list(self._exporter.get_finished_spans())


@pytest.fixture
def spans():
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=tracing.sampler(0.0))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield Spans(exporter)
    tracing.use(None)


def ask(endpoint, headers, *, stream=False, **fields):
    body = {**ASKED, **fields, "stream": stream}
    body.pop("ignore_eos")
    return httpx.post(f"{endpoint.url}/v1/completions", json=body, headers=headers, timeout=30)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_followed_from_its_head_to_the_steps_of_the_engine(endpoint, spans, stream) -> None:
    answer = ask(endpoint, SAMPLED, stream=stream)
    assert answer.status_code == 200
    (request,) = spans.of("request")
    (admission,), (generate,) = spans.of("admission"), spans.of("generate")
    tokens = generate.attributes["tokens"]
    prefill, steps = spans.of("engine.prefill"), spans.of("engine.step", least=tokens - 1)

    assert request.parent.span_id == int(PARENT, 16)
    assert {span.context.trace_id for span in spans.all()} == {int(TRACE, 16)}
    assert {span.parent.span_id for span in (admission, generate)} == {request.context.span_id}
    assert {span.parent.span_id for span in (*prefill, *steps)} == {generate.context.span_id}
    assert len(steps) == tokens - 1  # the first is of the prompt
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["release"] == generate.attributes["release"] == "alpha-r1"
    assert [span.attributes["rows"] for span in steps] == [1] * (tokens - 1)
    assert request.start_time <= admission.start_time <= generate.start_time
    # A stream's request ends with its last event, not with its head.
    assert generate.end_time <= request.end_time


def test_who_is_not_sampled_leaves_no_span(endpoint, spans) -> None:
    for headers in ({}, {"traceparent": f"00-{TRACE}-{PARENT}-00"}, {"traceparent": "nonsense"}):
        assert ask(endpoint, headers).status_code == 200
    assert spans.all() == []


def test_a_request_that_is_refused_is_a_span_that_says_so(endpoint, spans) -> None:
    assert ask(endpoint, SAMPLED, model="nobody").status_code == 404
    (request,) = spans.of("request")
    assert request.attributes["http.response.status_code"] == 404
    assert [span.name for span in spans.all()] == ["request"]


def test_without_a_provider_nothing_is_traced(endpoint, spans) -> None:
    tracing.use(None)
    assert ask(endpoint, SAMPLED).status_code == 200
    assert spans.all() == []
