"""Queries of Prometheus over the list of metrics. A label that a metric does not have can't be asked for.

The windows and the choice of factories are Grafana's variables; `as_asked` puts plain values in their place.
"""

from __future__ import annotations

from dataclasses import dataclass

from aifactory.observe.meter import AnyMetric, Counter, Histogram
from aifactory.observe.metrics import PREFIX

WINDOW = "$__rate_interval"
FACTORY = "$factory"


@dataclass(frozen=True, slots=True)
class Query:
    """An expression, and what each line that it gives is called."""

    text: str
    legend: str = ""

    def over(self, other: Query) -> Query:
        """This, divided by the other; nothing where the other is 0."""
        return Query(f"{self.text} / ({other.text} > 0)", self.legend)

    def minus(self, other: Query) -> Query:
        return Query(f"{self.text} - {other.text}", self.legend)


def as_asked(text: str, *, window: str = "5m", factory: str = ".*") -> str:
    """An expression with values in the place of Grafana's variables."""
    return text.replace(WINDOW, window).replace(FACTORY, factory)


def rate(metric: Counter, *by: str, window: str = WINDOW, **where: str) -> Query:
    """How fast it grows, a second."""
    return _summed(f"rate({_selector(metric.name, metric, where)}[{window}])", metric, by)


def increase(metric: Counter, *by: str, window: str, **where: str) -> Query:
    """By how much it has grown."""
    return _summed(f"increase({_selector(metric.name, metric, where)}[{window}])", metric, by)


def value(metric: AnyMetric, *by: str, of: str = "sum", **where: str) -> Query:
    """A gauge of all processes together, or the `max` or `min` of them."""
    return _summed(_selector(metric.name, metric, where), metric, by, of=of)


def quantile(q: float, metric: Histogram, *by: str, window: str = WINDOW, **where: str) -> Query:
    """The value below which a share `q` of what was counted lies."""
    _require(metric, by)
    bucket = _selector(f"{metric.name}_bucket", metric, where)
    names = ", ".join(["factory", "le", *by])
    legend = " ".join([f"p{q * 100:g}", *("{{" + name + "}}" for name in by)])
    return Query(f"histogram_quantile({q:g}, sum by ({names}) (rate({bucket}[{window}])))", legend)


def seconds(metric: Histogram, *by: str, window: str = WINDOW, **where: str) -> Query:
    """How much of a second was spent in what is timed, each second."""
    return _summed(f"rate({_selector(f'{metric.name}_sum', metric, where)}[{window}])", metric, by)


def times(metric: Histogram, *by: str, window: str = WINDOW, **where: str) -> Query:
    """How often something was counted, a second."""
    return _summed(f"rate({_selector(f'{metric.name}_count', metric, where)}[{window}])", metric, by)


def _summed(text: str, metric: AnyMetric, by: tuple[str, ...], *, of: str = "sum") -> Query:
    _require(metric, by)
    return Query(f"{of} by ({', '.join(['factory', *by])}) ({text})", " ".join("{{" + name + "}}" for name in by))


def _selector(name: str, metric: AnyMetric, where: dict[str, str]) -> str:
    _require(metric, tuple(where))
    asked = [f'factory=~"{FACTORY}"', *(f'{label}=~"{pattern}"' for label, pattern in where.items())]
    return f"{PREFIX}{name}{{{', '.join(asked)}}}"


def _require(metric: AnyMetric, labels: tuple[str, ...]) -> None:
    if unknown := [label for label in labels if label not in metric.labels]:
        raise ValueError(f"expected labels of {metric.name} among {metric.labels}, found {unknown}")
