"""What Ray's metrics port shows of the meters of a process: the same names and labels, and counters that are not counted twice."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aifactory.cluster.metrics_port import MetricsPort
from aifactory.observe.meter import Meters
from aifactory.observe.metrics import PREFIX


@pytest.fixture
def made() -> Meters:
    meters = Meters()
    meters.identity["factory"] = "port"
    meters.counter("aifactory_port_rows_total", "rows", "side").add(3, side="left")
    meters.gauge("aifactory_port_waiting_count", "waiting").set(2.5)
    histogram = meters.histogram("aifactory_port_wait_seconds", "wait", bounds=[0.1, 1.0])
    histogram.observe(0.05, times=2)
    histogram.observe(0.7)
    histogram.observe(40.0)
    return meters


def test_rays_port_shows_what_was_counted_once_and_sums_as_they_are(ray_session: None, made: Meters) -> None:
    import ray

    port = MetricsPort(made)
    port.flush()
    port.flush()
    made.metrics["aifactory_port_rows_total"].add(4, side="left")  # type: ignore[union-attr]
    port.flush()
    (node,) = ray.nodes()
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    wanted = {
        (PREFIX + sample.name, *sorted(sample.labels.items())): sample.value
        for _, samples in made.samples()
        for sample in samples
    }
    found: dict[tuple[object, ...], float] = {}
    deadline = time.monotonic() + 60
    while found != wanted and time.monotonic() < deadline:
        time.sleep(1)
        port.flush()
        with urllib.request.urlopen(url, timeout=10) as page:
            families = text_string_to_metric_families(page.read().decode())
        found = {
            (
                sample.name,
                *sorted((n, v) for n, v in sample.labels.items() if n in ("factory", "side", "le")),
            ): sample.value
            for family in families
            for sample in family.samples
            if "_port_" in sample.name
        }
    assert found == wanted


_DRIVER = """
from aifactory.cluster import metrics_port
from aifactory.cluster.session import connect, disconnect
from aifactory.observe import metrics
connect("gone")
metrics_port.export("gone")
metrics.TOKENIZE_TOKENS.add(1234)
metrics_port.flush()
disconnect()
"""


def test_what_a_driver_has_counted_is_there_when_it_has_gone(ray_session: None) -> None:
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    subprocess.run([sys.executable, "-c", _DRIVER], env=environment, check=True, timeout=120)
    (node,) = ray.nodes()
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    found: list[float] = []
    deadline = time.monotonic() + 40
    while not found and time.monotonic() < deadline:
        time.sleep(1)
        with urllib.request.urlopen(url, timeout=10) as page:
            families = text_string_to_metric_families(page.read().decode())
        found = [
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == "ray_aifactory_tokenize_tokens_total" and sample.labels["factory"] == "gone"
        ]
    assert found == [1234]
