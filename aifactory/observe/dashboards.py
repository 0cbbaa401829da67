"""The dashboard: panels over the list of metrics, and the JSON that Grafana loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aifactory.observe import metrics as m
from aifactory.observe.promql import Query, increase, quantile, rate, seconds, times, value

_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture."""

    title: str
    unit: str
    """Grafana's name of it."""
    queries: Sequence[Query]
    about: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels that belong together."""

    title: str
    panels: Sequence[Panel]


def rows() -> list[Row]:
    """All panels, row by row."""
    return [
        Row("Answers", _answers()),
        Row("Queue, engine and cache", _engine()),
        Row("Cycles", _cycles()),
        Row("Training", _training()),
        Row("Improvement", _improvement()),
        Row("Energy and money", _energy()),
    ]


def _answers() -> list[Panel]:
    return [
        Panel("Requests", "reqps", [rate(m.SERVE_REQUESTS, "route", "status")], "By route and HTTP status"),
        Panel(
            "Failed requests",
            "percentunit",
            [rate(m.SERVE_REQUESTS, status="5..").over(rate(m.SERVE_REQUESTS))],
            "Share of 5xx",
        ),
        Panel("Refused requests", "reqps", [rate(m.SERVE_REFUSED, "code")], "By the code of their error"),
        Panel("Requests by release", "reqps", [rate(m.SERVE_REQUESTS, "release")]),
        Panel("Tokens of answers", "none", [rate(m.SERVE_ANSWER_TOKENS, "release")], "A second"),
        Panel("Tokens of prompts", "none", [rate(m.SERVE_PROMPT_TOKENS, "release")], "A second"),
        Panel("Time to first token", "s", [quantile(q, m.SERVE_FIRST_TOKEN, "release") for q in (0.5, 0.95, 0.99)]),
        Panel("Time between tokens", "s", [quantile(q, m.SERVE_BETWEEN_TOKENS, "release") for q in (0.5, 0.95, 0.99)]),
        Panel("Time to the head of the answer", "s", [quantile(0.95, m.SERVE_REQUEST_SECONDS, "route")]),
        Panel("How answers end", "ops", [rate(m.SERVE_ANSWERS, "end")]),
        Panel("Release by replica", "none", [value(m.SERVE_RELEASE, of="max"), value(m.SERVE_RELEASE, of="min")]),
        Panel("Swaps", "none", [increase(m.SERVE_SWAPS, "outcome", window="1h")], "In the last hour"),
        Panel("Time of a swap", "s", [quantile(0.95, m.SERVE_SWAP_SECONDS, window="1d")], "Of the last day"),
        Panel("Replicas lost", "none", [increase(m.SERVE_LOST, window="1h")], "In the last hour, as fronts saw it"),
        Panel("Feedback", "ops", [rate(m.FEEDBACK, "outcome")]),
    ]


def _engine() -> list[Panel]:
    return [
        Panel("Waiting", "none", [value(m.SERVE_WAITING)], "Answers that wait for the engine"),
        Panel("Running, of slots", "percentunit", [value(m.SERVE_RUNNING).over(value(m.SERVE_SLOTS))]),
        Panel("Open requests", "none", [value(m.SERVE_OPEN)]),
        Panel("Wait for the engine", "s", [quantile(q, m.SERVE_QUEUE_SECONDS) for q in (0.5, 0.95, 0.99)]),
        Panel(
            "Time in steps",
            "percentunit",
            [seconds(m.ENGINE_STEP_SECONDS, "phase")],
            "1: one engine works all the time",
        ),
        Panel("Time of a step", "s", [quantile(0.95, m.ENGINE_STEP_SECONDS, "phase")]),
        Panel("Tokens of engines", "none", [rate(m.ENGINE_TOKENS, "phase")], "Read and made, a second"),
        Panel(
            "Rows of a decode step",
            "none",
            [rate(m.ENGINE_TOKENS, phase="decode").over(times(m.ENGINE_STEP_SECONDS, phase="decode"))],
            "How many answers share one step",
        ),
        Panel("Cache", "none", [value(m.SERVE_CACHE, "state")], "Tokens"),
        Panel("Prompt tokens not read again", "none", [value(m.SERVE_REUSED)]),
    ]


def _cycles() -> list[Panel]:
    return [
        Panel("Time of a stage", "s", [quantile(0.5, m.STAGE_SECONDS, "stage", window="1d")], "Median of the last day"),
        Panel("Failed makings", "none", [increase(m.STAGE_FAILURES, "stage", window="1h")], "In the last hour"),
        Panel("CPU time of drivers", "percentunit", [rate(m.STAGE_CPU_SECONDS, "stage")], "CPUs"),
        Panel("Rows", "none", [increase(m.INGEST_ROWS, "outcome", window="1h")], "In the last hour"),
        Panel("Rejected rows", "none", [increase(m.INGEST_REJECTED_ROWS, "rule", window="1h")], "In the last hour"),
        Panel("Text kept", "bytes", [increase(m.INGEST_BYTES, window="1h")], "In the last hour"),
        Panel("Tokens packed", "none", [increase(m.TOKENIZE_TOKENS, window="1h")], "In the last hour"),
        Panel("Rows packed", "none", [increase(m.TOKENIZE_ROWS, window="1h")], "In the last hour"),
        Panel("Scores", "none", [value(m.EVALUATE_BITS, "set", "model", of="max")], "Bits per byte; lower is better"),
        Panel(
            "Verdicts of the gate", "none", [increase(m.PROMOTE_DECISIONS, "decision", window="1d")], "In the last day"
        ),
    ]


def _training() -> list[Panel]:
    return [
        Panel("Loss", "none", [value(m.TRAIN_LOSS, of="max")], "Nats a token"),
        Panel("Tokens a second", "none", [value(m.TRAIN_RATE)]),
        Panel("Model FLOPs utilisation", "percentunit", [value(m.TRAIN_MFU, of="max")]),
        Panel("Norm of the gradient", "none", [value(m.TRAIN_NORM, of="max")]),
        Panel("Steps", "none", [rate(m.TRAIN_STEPS)], "A second"),
        Panel("Tokens trained", "none", [rate(m.TRAIN_TOKENS)], "A second"),
        Panel("Waiting for data", "percentunit", [rate(m.TRAIN_WAIT)], "Share of the time"),
        Panel("Waiting for checkpoints", "percentunit", [rate(m.TRAIN_STALL)], "Share of the time"),
        Panel("Batches left out", "none", [increase(m.TRAIN_SKIPPED, window="1h")], "In the last hour"),
    ]


def _improvement() -> list[Panel]:
    live, standard = value(m.IMPROVE_LIVE, of="max"), value(m.IMPROVE_STANDARD, of="max")
    return [
        Panel(
            "Live answers and their standard",
            "none",
            [Query(live.text, "live"), Query(standard.text, "standard")],
            "Bits per byte; lower is better",
        ),
        Panel("Answers scored", "none", [value(m.IMPROVE_SCORED, of="max")]),
        Panel("Users ask something else", "none", [value(m.IMPROVE_DRIFT, of="max")]),
        Panel("Decisions", "ops", [rate(m.IMPROVE_DECISIONS, "decision")]),
        Panel("Looks", "ops", [rate(m.IMPROVE_TICKS, "outcome")]),
        Panel("Feedback not sealed", "none", [value(m.IMPROVE_WAITING, of="max")]),
        Panel("Batches not read", "none", [value(m.IMPROVE_BATCHES, of="max")]),
        Panel("Cycles running", "none", [value(m.IMPROVE_RUNNING, of="max")]),
    ]


def _energy() -> list[Panel]:
    per_token = rate(m.ENERGY, stage="serve", window="30m").over(rate(m.SERVE_ANSWER_TOKENS, window="30m"))
    return [
        Panel("Power", "watt", [rate(m.ENERGY, "stage", "state", window="30m")], "As stages and replicas tell it"),
        Panel("Measured or estimated", "joule", [increase(m.ENERGY, "source", window="1d")], "Of the last day"),
        Panel("Energy of a token of an answer", "joule", [per_token], "Idle time included"),
        Panel("Money", "none", [increase(m.MONEY, "stage", "currency", window="1d")], "Of the last day"),
    ]


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana imports it."""
    return {
        "title": "AI factory",
        "uid": "aifactory",
        "tags": ["aifactory", "ray"],
        "editable": True,
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": list(_variables())},
        "panels": list(_panels()),
    }


def _variables() -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}}
    names = f"label_values({m.PREFIX}{m.SERVE_SLOTS.name}, factory)"
    yield {
        "name": "factory",
        "label": "Factory",
        "type": "query",
        "datasource": _SOURCE,
        "definition": names,
        "query": {"query": names, "refId": "factory"},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _panels() -> Iterator[dict[str, Any]]:
    number = y = 0
    for row in rows():
        number += 1
        place = {"x": 0, "y": y, "w": _COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": place, "panels": []}
        y += 1
        for at, panel in enumerate(row.panels):
            number += 1
            column, line = at % (_COLUMNS // _WIDTH), at // (_COLUMNS // _WIDTH)
            yield {
                "id": number,
                "type": "timeseries",
                "title": panel.title,
                "description": panel.about,
                "datasource": _SOURCE,
                "gridPos": {"x": column * _WIDTH, "y": y + line * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
                "fieldConfig": {
                    "defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 10, "showPoints": "never"}},
                    "overrides": [],
                },
                "options": {
                    "legend": {"displayMode": "list", "placement": "bottom"},
                    "tooltip": {"mode": "multi", "sort": "desc"},
                },
                "targets": [
                    {
                        "refId": chr(ord("A") + index),
                        "datasource": _SOURCE,
                        "expr": query.text,
                        "legendFormat": " ".join(["{{factory}}", query.legend]).strip(),
                        "range": True,
                    }
                    for index, query in enumerate(panel.queries)
                ],
            }
        y += _HEIGHT * -(-len(row.panels) // (_COLUMNS // _WIDTH))
