"""The metrics port: this process's meters, on the port where Ray shows its own to Prometheus.

Ray takes 5 to 10 µs for a number, so meters gather by themselves and are handed over every few seconds. Counters are handed over
as what was added. Of a histogram Ray's agent keeps the middles of buckets alone, which makes its sum a guess: its buckets, sum
and count are gauges with the names that Prometheus' histograms have, so `histogram_quantile` and `rate` read them as usual.
Ray forgets gauges that were not set for two of its reports: all are set each time.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from aifactory.observe.events import log_event
from aifactory.observe.meter import Counter, Meters
from aifactory.observe.metrics import meters

FLUSH_S = 4.0
"""Less than Ray's own interval of reports (10 s by default)."""
_LE = "le"


class MetricsPort:
    """Hands meters over to Ray."""

    def __init__(self, source: Meters) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._metrics: dict[str, Any] = {}
        self._handed: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def flush(self) -> None:
        """Hand over what there is now; nothing where this process is not connected to Ray."""
        if not _is_connected():
            return
        with self._lock:
            for metric, samples in self._source.samples():
                for sample in samples:
                    labels = dict(sample.labels)
                    ours = self._metric(sample.name, metric.meaning, tuple(labels), counts=isinstance(metric, Counter))
                    if not isinstance(metric, Counter):
                        ours.set(sample.value, tags=labels)
                        continue
                    key = (sample.name, tuple(labels.items()))
                    added = sample.value - self._handed.get(key, 0.0)
                    if added > 0:  # Ray takes no 0
                        ours.inc(added, tags=labels)
                        self._handed[key] = sample.value

    def _metric(self, name: str, meaning: str, labels: tuple[str, ...], *, counts: bool) -> Any:
        if name not in self._metrics:
            from ray.util.metrics import Counter as RayCounter
            from ray.util.metrics import Gauge as RayGauge

            self._metrics[name] = (RayCounter if counts else RayGauge)(name, description=meaning, tag_keys=labels)
        return self._metrics[name]


_port = MetricsPort(meters)
_exporting = threading.Event()
_starting = threading.Lock()


def export(factory: str) -> None:
    """Show this process's meters as the factory's on Ray's port, from now on; a process has one factory."""
    meters.identity["factory"] = factory
    with _starting:
        if _exporting.is_set():
            return
        _exporting.set()
    threading.Thread(target=_flush_for_ever, name="metrics-port", daemon=True).start()


def flush() -> None:
    """Hand over now, before this process leaves Ray; nothing where nothing is exported."""
    if _exporting.is_set():
        _port.flush()


def _flush_for_ever() -> None:
    said = ""
    while True:
        threading.Event().wait(FLUSH_S)
        try:
            _port.flush()
            said = ""
        except Exception as error:  # what is measured is no reason to stop
            text = f"metrics were not handed over to Ray: {type(error).__name__}: {error}"
            if text != said:
                said = text
                log_event("warned", of=text)


def _is_connected() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())
