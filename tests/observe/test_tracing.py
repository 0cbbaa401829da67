"""Laws of spans beside requests: off they load nothing; a cycle is always traced, with its stages in it, and so are errors."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from aifactory.config import Traces
from aifactory.errors import ConfigError
from aifactory.factory import Factory
from aifactory.observe import tracing


@pytest.fixture
def spans():
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=tracing.sampler(0.0))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield exporter
    tracing.use(None)


class Turned(Factory):
    """A factory whose stages are not the matter here."""

    def __init__(self, *, fails: bool = False) -> None:
        journal = SimpleNamespace(claim=lambda cycle: cycle)
        self.books = SimpleNamespace(journal=journal)  # type: ignore[assignment]
        self._fails = fails

    def _ingest(self, cycle):
        return ["corpus"]

    def _tokenize(self, cycle, corpora):
        return "material"

    def _train(self, cycle, material):
        if self._fails:
            raise RuntimeError("no room")
        return ["model"]

    def _evaluate(self, cycle, material, model):
        return "scorecard"

    def _choose(self, cycle, candidates, scorecards):
        return candidates[0], scorecards[0]

    def _promote(self, cycle, model, scorecard, *, of):
        return "release"


CYCLE = SimpleNamespace(number=3, trigger="drift-1", attempt=2)


def test_a_cycle_is_always_traced_with_its_stages_in_it(spans) -> None:
    assert Turned().turn(CYCLE) == "release"  # type: ignore[arg-type,comparison-overlap]
    *stages, cycle = spans.get_finished_spans()
    assert (cycle.name, cycle.parent) == ("cycle", None)
    assert dict(cycle.attributes) == {"number": 3, "trigger": "drift-1", "attempt": 2}
    assert [stage.name for stage in stages] == ["ingest", "tokenize", "train", "evaluate", "promote"]
    assert {stage.parent.span_id for stage in stages} == {cycle.context.span_id}


def test_a_stage_that_fails_says_so_and_so_does_its_cycle(spans) -> None:
    with pytest.raises(RuntimeError, match="no room"):
        Turned(fails=True).turn(CYCLE)  # type: ignore[arg-type]
    ended = {span.name: span.status.status_code for span in spans.get_finished_spans()}
    assert ended == {
        "ingest": StatusCode.UNSET,
        "tokenize": StatusCode.UNSET,
        "train": StatusCode.ERROR,
        "cycle": StatusCode.ERROR,
    }


def test_what_is_logged_within_a_span_names_its_trace(spans) -> None:
    assert tracing.trace_id() is None
    with tracing.span(tracing.CYCLE):
        inside = tracing.trace_id()
    assert inside == f"{spans.get_finished_spans()[0].context.trace_id:032x}"


def test_off_nothing_of_opentelemetry_is_loaded() -> None:
    code = (
        "import sys\nfrom aifactory.observe import tracing\ntracing.start(None, service='a')\n"
        "with tracing.span('cycle', number=1): assert tracing.current() is None and tracing.trace_id() is None\n"
        "tracing.begin_request({'traceparent': 'x'}, 'request').end()\n"
        "tracing.record('engine.step', None, began_ns=0)\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_where_the_sdk_is_missing_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'aifactory\[otel\]'"):
        tracing.start(Traces(), service="a")
