"""What is measured of answers, as a real Prometheus has it; and that it knows every name that dashboards and alerts ask for."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus import Programs, metric_names, prometheus, prometheus_programs, scraped

from aifactory.engine import scheduler
from aifactory.observe.alerts import alerts
from aifactory.observe.command import files
from aifactory.observe.dashboards import rows
from aifactory.observe.metrics import ENGINE_STEP_SECONDS, ENGINE_TOKENS, PREFIX, meters
from aifactory.observe.promql import as_asked
from aifactory.serve.answer_meter import watch

__all__ = ["prometheus_programs"]

PANELS = [
    (panel.title, as_asked(query.text, window="10s"))
    for row in rows()
    for panel in row.panels
    for query in panel.queries
]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meters as a process has them that has just begun."""
    for metric in meters.metrics.values():
        monkeypatch.setattr(metric, "_series", {})
    monkeypatch.setitem(meters.identity, "factory", "alpha")
    # The scheduler keeps its series.
    for phase in ("prefill", "decode"):
        monkeypatch.setattr(scheduler, f"_{phase.upper()}_SECONDS", ENGINE_STEP_SECONDS.of(phase=phase))
        monkeypatch.setattr(scheduler, f"_{phase.upper()}_TOKENS", ENGINE_TOKENS.of(phase=phase))


def touch_others() -> None:
    """A series of every metric of which the endpoint has none: those of stages that do not run here."""
    for metric in meters.metrics.values():
        if not metric.series():
            metric.of(**dict.fromkeys(metric.labels, "here"))


def test_a_real_prometheus_knows_every_name_of_dashboards_and_alerts_and_counts_as_the_gateway_does(
    endpoint, clean, prometheus_programs: Programs, tmp_path: Path
) -> None:
    stop = watch(endpoint.gateway)
    asked = {"model": "alpha", "prompt": "the quick brown", "max_tokens": 12, "temperature": 0}
    plain = httpx.post(f"{endpoint.url}/v1/completions", json=asked, timeout=30).json()
    with httpx.stream("POST", f"{endpoint.url}/v1/completions", json={**asked, "stream": True}, timeout=30) as stream:
        assert stream.read().endswith(b"[DONE]\n\n")
    assert httpx.post(f"{endpoint.url}/v1/completions", json={"model": "nobody", "prompt": "x"}).status_code == 404
    assert httpx.get(f"{endpoint.url}/no/such/path").status_code == 404
    httpx.post(f"{endpoint.url}/v1/feedback", json={"completion": plain["id"], "score": 1.0}).raise_for_status()
    touch_others()
    rules = tmp_path / "prometheus-alerts.yaml"
    rules.write_text(files()[rules.name])

    with (
        scraped(lambda: meters.text(prefix=PREFIX)) as target,
        prometheus(prometheus_programs, tmp_path, [target], rules=rules) as server,
    ):
        unknown = {text: server.unknown(text) for _, text in PANELS}
        unknown |= {alert.expression: server.unknown(alert.expression) for alert in alerts()}
        assert not {text: names for text, names in unknown.items() if names}
        for _, text in PANELS:
            server.query(text)
        for alert in alerts():
            server.query(alert.expression)
        loaded = server.ask("rules")["groups"][0]["rules"]
        assert [rule["name"] for rule in loaded] == [f"AIFactory{alert.name}" for alert in alerts()]

        def number(text: str) -> float:
            (found,) = server.query(text)
            return float(found["value"][1])

        release = '{factory="alpha", release="alpha-r1"}'
        tokens = plain["usage"]["completion_tokens"]
        assert number(f"ray_aifactory_serve_answer_tokens_total{release}") == 2 * tokens
        assert number(f"ray_aifactory_serve_prompt_tokens_total{release}") == 2 * plain["usage"]["prompt_tokens"]
        assert number(f"ray_aifactory_serve_time_to_first_token_seconds_count{release}") == 2
        assert number(f"ray_aifactory_serve_time_between_tokens_seconds_count{release}") == 2 * (tokens - 1)
        assert number("sum(ray_aifactory_serve_queue_wait_seconds_count)") == 2
        statuses = server.query(
            'sum by (status, release) (ray_aifactory_serve_requests_total{route="/v1/completions"})'
        )
        assert {(s["metric"]["status"], s["metric"]["release"]): s["value"][1] for s in statuses} == {
            ("200", "alpha-r1"): "2",
            ("404", "none"): "1",
        }
        assert number('ray_aifactory_serve_requests_total{route="unknown"}') == 1
        assert number('ray_aifactory_feedback_entries_total{outcome="counted"}') == 1
        assert number("ray_aifactory_serve_release_number") == 1
        assert number('ray_aifactory_engine_tokens_total{phase="decode"}') == 2 * (tokens - 1)
        assert number("ray_aifactory_serve_waiting_answers_count") == 0
    stop()


def test_a_name_that_exists_nowhere_is_told(prometheus_programs: Programs, clean, tmp_path: Path) -> None:
    touch_others()
    with (
        scraped(lambda: meters.text(prefix=PREFIX)) as target,
        prometheus(prometheus_programs, tmp_path, [target]) as server,
    ):
        assert server.unknown("sum by (factory) (rate(ray_aifactory_train_step_total[5m]))") == {
            "ray_aifactory_train_step_total"
        }
        with pytest.raises(AssertionError, match="parse error"):
            server.query("sum by (factory (up)")


def test_names_are_read_out_of_expressions() -> None:
    text = (
        'histogram_quantile(0.5, sum by (le, a) (rate(b_bucket{c=~"d(e)"}[5m]))) / (max by (f) (g) > 0) unless on (h) i'
    )
    assert metric_names(text) == {"b_bucket", "g", "i"}


def test_promtool_finds_nothing_wrong_with_the_files_that_are_written(
    prometheus_programs: Programs, tmp_path: Path
) -> None:
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    for arguments in (["check", "rules", "prometheus-alerts.yaml"], ["check", "config", "prometheus.yaml"]):
        done = subprocess.run(
            [prometheus_programs.tool, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    json.loads((tmp_path / "grafana-dashboard.json").read_text())


# By alert: series, as promtool writes them, over which it fires after the given time, and over which it does not.
SERVED = 'ray_aifactory_serve_requests_total{factory="f",status="%s"}'
BUCKET = 'ray_aifactory_serve_%s_seconds_bucket{factory="f",le="%s"}'
FIRING = {
    "RequestsFail": ("20m", {SERVED % 200: "0+98x60", SERVED % 500: "0+2x60"}, {SERVED % 200: "0+1000x60", SERVED % 500: "0+2x60"}),
    "RequestsRefused": ("30m", {SERVED % 200: "0+90x60", SERVED % 429: "0+10x60"}, {SERVED % 200: "0+99x60", SERVED % 429: "0+1x60"}),
    "FirstTokenLate": (
        "30m",
        {BUCKET % ("time_to_first_token", "5"): "0+90x60", BUCKET % ("time_to_first_token", "10"): "0+100x60", BUCKET % ("time_to_first_token", "+Inf"): "0+100x60"},
        {BUCKET % ("time_to_first_token", "5"): "0+99x60", BUCKET % ("time_to_first_token", "10"): "0+100x60", BUCKET % ("time_to_first_token", "+Inf"): "0+100x60"},
    ),
    "TokensSlow": (
        "30m",
        {BUCKET % ("time_between_tokens", "0.5"): "0+90x60", BUCKET % ("time_between_tokens", "1"): "0+100x60", BUCKET % ("time_between_tokens", "+Inf"): "0+100x60"},
        {BUCKET % ("time_between_tokens", "0.5"): "0+99x60", BUCKET % ("time_between_tokens", "1"): "0+100x60", BUCKET % ("time_between_tokens", "+Inf"): "0+100x60"},
    ),
    "QueueLong": (
        "20m",
        {'ray_aifactory_serve_waiting_answers_count{factory="f"}': "20x60", 'ray_aifactory_serve_slots_count{factory="f"}': "16x60"},
        {'ray_aifactory_serve_waiting_answers_count{factory="f"}': "10x60", 'ray_aifactory_serve_slots_count{factory="f"}': "16x60"},
    ),
    "CacheFull": (
        "30m",
        {'ray_aifactory_serve_cache_tokens{factory="f",state="reserved"}': "99x60", 'ray_aifactory_serve_cache_tokens{factory="f",state="most"}': "100x60"},
        {'ray_aifactory_serve_cache_tokens{factory="f",state="reserved"}': "50x60", 'ray_aifactory_serve_cache_tokens{factory="f",state="most"}': "100x60"},
    ),
    "AnswersStandStill": (
        "30m",
        {'ray_aifactory_serve_running_answers_count{factory="f"}': "3x60", 'ray_aifactory_serve_answer_tokens_total{factory="f"}': "70x60"},
        {'ray_aifactory_serve_running_answers_count{factory="f"}': "3x60", 'ray_aifactory_serve_answer_tokens_total{factory="f"}': "0+7x60"},
    ),
    "ReleaseDoesNotLoad": (
        "9m",
        {'ray_aifactory_serve_swaps_total{factory="f",outcome="load_failed"}': "0 0 0 0 0 1x60"},
        {'ray_aifactory_serve_swaps_total{factory="f",outcome="swapped"}': "0 0 0 0 0 1x60"},
    ),
    "ReplicasDisagree": (
        "30m",
        {'ray_aifactory_serve_release_number{factory="f",WorkerId="a"}': "1x60", 'ray_aifactory_serve_release_number{factory="f",WorkerId="b"}': "2x60"},
        {'ray_aifactory_serve_release_number{factory="f",WorkerId="a"}': "2x60", 'ray_aifactory_serve_release_number{factory="f",WorkerId="b"}': "2x60"},
    ),
    "ReplicaLost": ("9m", {'ray_aifactory_serve_replicas_lost_total{factory="f"}': "0 0 0 0 0 1x60"}, {'ray_aifactory_serve_replicas_lost_total{factory="f"}': "1x60"}),
    "StageFails": ("9m", {'ray_aifactory_stage_failures_total{factory="f",stage="train"}': "0 0 0 1x60"}, {'ray_aifactory_stage_failures_total{factory="f",stage="train"}': "1x60"}),
    "TrainingWaitsForData": ("30m", {'ray_aifactory_train_data_wait_seconds_total{factory="f"}': "0+30x60"}, {'ray_aifactory_train_data_wait_seconds_total{factory="f"}': "0+3x60"}),
    "BatchesLeftOut": ("9m", {'ray_aifactory_train_skipped_batches_total{factory="f"}': "0 0 0 8x60"}, {'ray_aifactory_train_skipped_batches_total{factory="f"}': "0 0 0 1x60"}),
    "EvaluatorSilent": ("40m", {'ray_aifactory_improve_ticks_total{factory="f",outcome="done"}': "7x60"}, {'ray_aifactory_improve_ticks_total{factory="f",outcome="done"}': "0+7x60"}),
    "AnswersBelowStandard": (
        "90m",
        {'ray_aifactory_improve_live_bits_per_byte{factory="f"}': "3x120", 'ray_aifactory_improve_standard_bits_per_byte{factory="f"}': "2x120"},
        {'ray_aifactory_improve_live_bits_per_byte{factory="f"}': "2x120", 'ray_aifactory_improve_standard_bits_per_byte{factory="f"}': "2x120"},
    ),
    "UsersAskSomethingElse": ("5m", {'ray_aifactory_improve_drift_count{factory="f"}': "1x60"}, {'ray_aifactory_improve_drift_count{factory="f"}': "0x60"}),
    "FeedbackUnread": ("30h", {'ray_aifactory_improve_new_batches_count{factory="f"}': "6x2000"}, {'ray_aifactory_improve_new_batches_count{factory="f"}': "5x2000"}),
}  # fmt: skip


def test_every_alert_fires_where_it_should_and_nowhere_else(prometheus_programs: Programs, tmp_path: Path) -> None:
    assert set(FIRING) == {alert.name for alert in alerts()}
    (tmp_path / "prometheus-alerts.yaml").write_text(files()["prometheus-alerts.yaml"])
    tests = []
    for name, (after, wrong, right) in FIRING.items():
        for series, fires in ((wrong, True), (right, False)):
            tests.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": each, "values": values} for each, values in series.items()],
                    "promql_expr_test": [
                        {
                            "expr": f'count(ALERTS{{alertname="AIFactory{name}", alertstate="firing"}})',
                            "eval_time": after,
                            "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                        }
                    ],
                }
            )
    file = tmp_path / "tests.yaml"
    file.write_text(
        yaml.safe_dump({"rule_files": ["prometheus-alerts.yaml"], "evaluation_interval": "1m", "tests": tests})
    )
    done = subprocess.run(
        [prometheus_programs.tool, "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
