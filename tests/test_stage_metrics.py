"""What a stage makes is counted once, as its figures have it; what it waited for is in the books, and the status names it."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_factories import small_config

from aifactory import Config, Factory
from aifactory.bottleneck import MEASURED
from aifactory.config import Site
from aifactory.errors import EmptyCorpusError
from aifactory.observe import metrics
from aifactory.observe.energy import Energy, count_joules
from aifactory.observe.meter import AnyMetric


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meters as a process has them that has just begun."""
    for metric in metrics.meters.metrics.values():
        monkeypatch.setattr(metric, "_series", {})


def values(metric: AnyMetric) -> dict[tuple[str, ...], float]:
    return {tuple(each.labels.values()): each.value for each in metric.samples()}


def test_a_stage_is_counted_when_it_makes_something_and_not_when_it_is_there_already(tmp_path: Path) -> None:
    with Factory(Config.model_validate(small_config(tmp_path))) as factory:
        corpus, tokens = factory.ingest(), factory.tokenize()
        factory.tokenize()
        events = [event for name in ("ingested", "tokenized") for event in factory.books.journal.events(event=name)]
        report = factory.status()

    figures = corpus.figures
    assert values(metrics.INGEST_ROWS) == {
        ("kept",): figures["rows_kept"] - figures["rows_holdout"],
        ("holdout",): figures["rows_holdout"],
        ("rejected",): figures["rows_rejected"],
        ("erased",): 0,
    }
    assert values(metrics.TOKENIZE_TOKENS) == {(): tokens.figures["tokens"]}
    joules = {stage: value for (stage, _, state), value in values(metrics.ENERGY).items() if state == "busy"}
    assert joules == {"ingest": corpus.record.joules, "tokenize": tokens.record.joules}
    counts = {labels["stage"]: series.counts for labels, series in metrics.STAGE_SECONDS.series()}
    assert {stage: sum(found) for stage, found in counts.items()} == {"ingest": 1, "tokenize": 1}

    # The same artifact, made again, waits for something else: it is no figure of it.
    assert MEASURED not in figures
    assert [event.detail[MEASURED]["kind"] for event in events] == ["tasks", "tasks"]
    assert all(event.detail[MEASURED]["used"]["cpu_s"] > 0 for event in events)
    assert {each["stage"] for each in report.bottlenecks} == {"ingest", "tokenize"}
    assert sum(line.startswith("Bottleneck of ") for line in report.lines()) == 2


def test_a_stage_that_fails_is_counted_as_failed_alone(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config["ingest"]["steps"] = [{"step": "length", "min_bytes": 10_000_000}]
    with Factory(Config.model_validate(config)) as factory, pytest.raises(EmptyCorpusError):
        factory.ingest()
    assert values(metrics.STAGE_FAILURES) == {("ingest",): 1}
    assert values(metrics.INGEST_ROWS) == values(metrics.ENERGY) == {}


def test_joules_become_money_by_the_price_and_the_building() -> None:
    used = Energy(joules=7.2e6, source="rapl", seconds=60.0)
    count_joules(used, Site(), stage="train")
    assert values(metrics.MONEY) == {}
    count_joules(used, Site(price_per_kwh=0.3, pue=1.5, currency="EUR"), stage="serve", busy_share=0.25)
    assert values(metrics.MONEY) == {("serve", "EUR"): pytest.approx(2 * 1.5 * 0.3)}
    assert values(metrics.ENERGY) == {
        ("train", "rapl", "busy"): 7.2e6,
        ("train", "rapl", "idle"): 0.0,
        ("serve", "rapl", "busy"): pytest.approx(1.8e6),
        ("serve", "rapl", "idle"): pytest.approx(5.4e6),
    }
