"""Meters: counters, gauges and histograms of one process. Adding to one is a lock and an addition, so hot paths may; whoever
exports them asks for all samples now and then. Pure Python: what knows Ray is `cluster/metrics_port.py`.

Names    `aifactory_<room>_<what>_<unit>`, counters end in `_total` (Prometheus: "Metric and label naming")
Law      a metric has no more than MOST_SERIES sets of labels: what comes beyond is counted under the label value "other", so
         that no user's input can fill the memory of a process, or of Prometheus.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

Kind = Literal["counter", "gauge", "histogram"]
UNITS = (
    "bits_per_byte", "bytes", "count", "info", "joules", "money", "nats", "number", "ratio", "rows", "seconds", "steps",
    "tokens", "tokens_per_second",
)  # fmt: skip
"""What a name must say at its end; of a counter before `_total`, where what is counted may stand in its place."""
MOST_SERIES = 1_000
OTHER = "other"
_NAME = re.compile(r"aifactory(_[a-z0-9]+)+")
_LABEL = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Sample:
    """One number, as Prometheus has it."""

    name: str
    labels: Mapping[str, str]
    value: float


class CounterSeries:
    """What only grows."""

    __slots__ = ("_lock", "value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Raises ValueError below 0."""
        if amount < 0:
            raise ValueError(f"expected at least 0, found {amount}")
        with self._lock:
            self.value += amount


class GaugeSeries:
    """What goes up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        self.value = float(value)


class HistogramSeries:
    """How values are distributed, and their sum."""

    __slots__ = ("_bounds", "_lock", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._lock = threading.Lock()
        self.counts = [0] * (len(bounds) + 1)
        """By bucket, those beyond the last bound at the end; not cumulative."""
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, so often."""
        bucket = bisect_left(self._bounds, value)
        with self._lock:
            self.counts[bucket] += times
            self.sum += value * times


Series = TypeVar("Series", CounterSeries, GaugeSeries, HistogramSeries)


class Metric(ABC, Generic[Series]):
    """A metric: its name, what it means, and its series by the values of its labels."""

    kind: ClassVar[Kind]

    def __init__(self, name: str, meaning: str, *labels: str) -> None:
        """Raises ValueError where the name says no unit."""
        stem = name.removesuffix("_total")
        says_unit = any(stem.endswith(f"_{unit}") for unit in UNITS)
        if not _NAME.fullmatch(name) or (name != stem) != (self.kind == "counter") or not (says_unit or name != stem):
            raise ValueError(f"expected aifactory_<room>_<what>_<unit>, with _total for counters alone, found {name!r}")
        if not all(_LABEL.fullmatch(label) for label in labels):
            raise ValueError(f"expected labels in lower case, found {labels}")
        self.name, self.meaning, self.labels = name, meaning, labels
        self._lock = threading.Lock()
        self._series: dict[tuple[str, ...], Series] = {}

    def of(self, **values: str) -> Series:
        """The series of these values of the labels; whoever adds often keeps it.

        Raises   ValueError where they are not the metric's labels.
        """
        key = tuple([values[label] for label in self.labels if label in values])
        if len(key) != len(self.labels) or len(values) != len(self.labels):
            raise ValueError(f"expected the labels {self.labels} for {self.name}, found {tuple(values)}")
        found = self._series.get(key)
        if found is not None:
            return found
        with self._lock:
            if key not in self._series and len(self._series) >= MOST_SERIES:
                key = (OTHER,) * len(self.labels)
            return self._series.setdefault(key, self._new())

    @property
    def exported_names(self) -> tuple[str, ...]:
        """The names of its samples."""
        return (self.name,)

    def series(self) -> list[tuple[dict[str, str], Series]]:
        with self._lock:
            return [(dict(zip(self.labels, key, strict=True)), each) for key, each in self._series.items()]

    @abstractmethod
    def _new(self) -> Series: ...

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """Its numbers now."""


class Counter(Metric[CounterSeries]):
    """Counts or sums up; from 0 at the start of the process."""

    kind = "counter"

    def add(self, amount: float = 1.0, **values: str) -> None:
        self.of(**values).add(amount)

    def _new(self) -> CounterSeries:
        return CounterSeries()

    def samples(self) -> Iterator[Sample]:
        for labels, series in self.series():
            yield Sample(self.name, labels, series.value)


class Gauge(Metric[GaugeSeries]):
    """The newest value."""

    kind = "gauge"

    def set(self, value: float, **values: str) -> None:
        self.of(**values).set(value)

    def _new(self) -> GaugeSeries:
        return GaugeSeries()

    def samples(self) -> Iterator[Sample]:
        for labels, series in self.series():
            yield Sample(self.name, labels, series.value)


class Histogram(Metric[HistogramSeries]):
    """A distribution, by buckets."""

    kind = "histogram"

    def __init__(self, name: str, meaning: str, *labels: str, bounds: Sequence[float]) -> None:
        """`bounds` are the upper ends of the buckets, rising; what is larger is counted too."""
        super().__init__(name, meaning, *labels)
        if list(bounds) != sorted(set(bounds)) or not bounds:
            raise ValueError(f"expected rising bounds for {name}, found {bounds}")
        self.bounds = tuple(map(float, bounds))

    def observe(self, value: float, times: int = 1, **values: str) -> None:
        self.of(**values).observe(value, times)

    @property
    def exported_names(self) -> tuple[str, ...]:
        return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")

    def _new(self) -> HistogramSeries:
        return HistogramSeries(self.bounds)

    def samples(self) -> Iterator[Sample]:
        bucket, sum_, count = self.exported_names
        for labels, series in self.series():
            counts, total = list(series.counts), 0
            for bound, number in zip((*self.bounds, float("inf")), counts, strict=True):
                total += number
                yield Sample(bucket, {**labels, "le": _number(bound)}, total)
            yield Sample(sum_, labels, series.sum)
            yield Sample(count, labels, total)


AnyMetric = Counter | Gauge | Histogram


class Meters:
    """All metrics of a process, whose process it is, and what must be looked at before they are read."""

    def __init__(self) -> None:
        self.metrics: dict[str, AnyMetric] = {}
        self.identity: dict[str, str] = {"factory": ""}
        """Labels that every sample has."""
        self._looks: dict[object, Callable[[], None]] = {}

    def counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return self._add(Counter(name, meaning, *labels))

    def gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return self._add(Gauge(name, meaning, *labels))

    def histogram(self, name: str, meaning: str, *labels: str, bounds: Sequence[float]) -> Histogram:
        return self._add(Histogram(name, meaning, *labels, bounds=bounds))

    def before_reading(self, look: Callable[[], None]) -> Callable[[], None]:
        """Call `look` before each reading, to set gauges of what is cheaper to look at than to count; what is returned ends that."""
        key = object()
        self._looks[key] = look
        return lambda: self._looks.pop(key, None) and None

    def look(self) -> None:
        """Have all gauges set that are looked at; one that can't be is left as it is."""
        for look in list(self._looks.values()):
            try:
                look()
            except Exception:
                continue

    def samples(self) -> Iterator[tuple[AnyMetric, list[Sample]]]:
        """Every metric with its numbers now, each with the labels of the process."""
        self.look()
        for metric in self.metrics.values():
            yield (
                metric,
                [Sample(each.name, {**self.identity, **each.labels}, each.value) for each in metric.samples()],
            )

    def text(self, *, prefix: str = "") -> str:
        """All of it in Prometheus' text format (version 0.0.4), for processes without Ray."""
        lines = []
        for metric, samples in self.samples():
            lines += [f"# HELP {prefix}{metric.name} {metric.meaning}", f"# TYPE {prefix}{metric.name} {metric.kind}"]
            for each in samples:
                labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in each.labels.items())
                lines.append(f"{prefix}{each.name}{{{labels}}} {_number(each.value)}")
        return "\n".join([*lines, ""])

    def _add(self, metric: AnyMetricT) -> AnyMetricT:
        if metric.name in self.metrics:
            raise ValueError(f"expected each metric once, found {metric.name} again")
        self.metrics[metric.name] = metric
        return metric


AnyMetricT = TypeVar("AnyMetricT", Counter, Gauge, Histogram)


def _number(value: float) -> str:
    return "+Inf" if value == float("inf") else f"{value:.17g}" if value % 1 else f"{value:.0f}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
