"""What Prometheus finds on the metrics port of a cluster that serves a factory, with spans and joules of the same replica."""

from __future__ import annotations

import time
import urllib.request

import pytest
from prometheus import Programs, prometheus, prometheus_programs

from aifactory.bottleneck import MEASURED, read

__all__ = ["prometheus_programs"]
pytestmark = pytest.mark.slow


def test_a_replicas_answers_are_on_rays_port_under_the_names_of_the_dashboards(
    serve, prometheus_programs: Programs, tmp_path
) -> None:
    import ray

    served = serve(meter_s=1)
    tokens = sum(served.ask(max_tokens=20).usage.completion_tokens for _ in range(3))
    (node,) = ray.nodes()
    target = f"127.0.0.1:{node['MetricsExportPort']}"
    # By process: other tests may have served a factory of this name on the same cluster.
    wanted = 'sum by (factory, release, WorkerId) (ray_aifactory_serve_answer_tokens_total{factory="alpha"})'
    with prometheus(prometheus_programs, tmp_path, [target]) as server:
        deadline = time.monotonic() + 90
        while not (found := [each for each in server.query(wanted) if float(each["value"][1]) == tokens]):
            assert time.monotonic() < deadline, urllib.request.urlopen(f"http://{target}/metrics").read()[-3000:]
            time.sleep(1)
        assert {(each["metric"]["factory"], each["metric"]["release"]) for each in found} == {("alpha", "alpha-r1")}
        # A quantile of what was handed over as gauges, and a gauge that is looked at.
        (late,) = server.query(
            "histogram_quantile(0.5, sum by (le) (ray_aifactory_serve_time_to_first_token_seconds_bucket{factory='alpha'}))"
        )
        assert 0 < float(late["value"][1]) < 60
        (slots,) = server.query("sum(ray_aifactory_serve_slots_count{factory='alpha'})")
        assert float(slots["value"][1]) == served.factory.books.config.runtime.endpoint.slots

    def named():
        told = [event.detail for event in served.factory.books.journal.events(event="metered")]
        return [found for detail in told if (found := read(detail[MEASURED])) is not None]

    # Short answers may come and go between two looks.
    deadline = time.monotonic() + 60
    while not named():
        assert time.monotonic() < deadline, "no look has met an answer"
        served.ask(max_tokens=100)
    assert {found.stage for found in named()} == {"serve"}
