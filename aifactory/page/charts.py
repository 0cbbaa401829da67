"""Pictures that only the page has, as SVG: requests over time by release, and live answers beside their standard.

Colours and type are the page's, by classes. What comes from data is made visible (`shown`) and escaped here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

from aifactory.ingest.charts import WIDTH
from aifactory.ingest.page_text import columns, shown
from aifactory.proof.cycle_charts import ticks_of

TONES = 4
"""Series that are told apart by their fill; older ones share the last."""
_LETTER = 7.2
_HEIGHT, _FOOT, _HEAD = 170, 22, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """What one series holds in each part of a span."""

    label: str
    values: Sequence[int]


def stacked_columns(series: Sequence[Stack], *, since: float, until: float, title: str) -> str:
    """A column for each part of the span, of the series on top of one another: the first at the bottom."""
    number = len(series[0].values)
    totals = [sum(each.values[at] for each in series) for at in range(number)]
    ticks = [tick for tick in ticks_of(0, max(1, *totals)) if tick == int(tick)]
    left = max(columns(f"{tick:,.0f}") for tick in ticks) * _LETTER + 8
    right, bottom = WIDTH - 4, _HEIGHT - _FOOT
    scale, step = (bottom - _HEAD) / ticks[-1], (right - left) / number
    parts = []
    for tick in ticks:
        y = bottom - tick * scale
        parts.append(f'<line class="guide" x1="{left:.1f}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick side" x="{left - 6:.1f}" y="{y + 4:.1f}">{tick:,.0f}</text>')
    for at in range(number):
        low = float(bottom)
        for tone, each in enumerate(series):
            height = each.values[at] * scale
            if not height:
                continue
            low -= height
            said = (
                f"{each.label}: {each.values[at]:,} from {_clock(since + at * (until - since) / number, until - since)}"
            )
            parts.append(
                f'<rect class="tone{min(tone, TONES - 1)}" x="{left + at * step + 0.5:.1f}" y="{low:.1f}" '
                f'width="{max(1.0, step - 1):.1f}" height="{height:.1f}"><title>{escape(shown(said))}</title></rect>'
            )
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        when = _clock(since + share * (until - since), until - since)
        parts.append(
            f'<text class="tick {anchor}" x="{left + share * (right - left):.1f}" y="{_HEIGHT - 6}">{when}</text>'
        )
    return _svg(parts, title)


def levels(points: Sequence[tuple[int, float]], *, lines: Sequence[tuple[str, float]], title: str) -> str:
    """Means of groups of answers in their order, and the levels that they are compared with."""
    values = [value for _, value in points] + [value for _, value in lines]
    ticks = ticks_of(min(values), max(values))
    low, high, last = ticks[0], ticks[-1], max(1, points[-1][0])
    left = max(columns(f"{tick:.2f}") for tick in ticks) * _LETTER + 8
    right, bottom = WIDTH - 12, _HEIGHT - _FOOT

    def x(count: float) -> float:
        return left + count / last * (right - left)

    def y(value: float) -> float:
        return _HEAD + (high - value) / (high - low) * (bottom - _HEAD)

    parts = []
    for tick in ticks:
        parts.append(f'<line class="guide" x1="{left:.1f}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick side" x="{left - 6:.1f}" y="{y(tick) + 4:.1f}">{tick:.2f}</text>')
    for label, value in lines:
        said = escape(f"{label}: {value:.3f} bits per byte")
        parts.append(
            f'<line class="level {label}" x1="{left:.1f}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}">'
            f"<title>{said}</title></line>"
        )
    way = " ".join(f"{x(count):.1f},{y(value):.1f}" for count, value in points)
    parts.append(f'<polyline class="curve" points="{way}"/>')
    for count, value in points:
        said = escape(f"up to answer {count:,}: {value:.3f} bits per byte")
        parts.append(
            f'<g class="point"><title>{said}</title><circle cx="{x(count):.1f}" cy="{y(value):.1f}" r="3"/></g>'
        )
    parts.append(f'<text class="tick start" x="{left:.1f}" y="{_HEIGHT - 6}">first answer</text>')
    parts.append(f'<text class="tick end" x="{right}" y="{_HEIGHT - 6}">answer {last:,}</text>')
    return _svg(parts, title)


def meter(done: float, *, title: str) -> str:
    """A bar of what was done, from 0 to 1."""
    return (
        f'<svg class="meter" role="img" aria-label="{escape(shown(title))}" viewBox="0 0 100 6" preserveAspectRatio="none">'
        f'<rect class="well" width="100" height="6"/><rect class="done" width="{100 * max(0.0, min(1.0, done)):.1f}" height="6"/></svg>'
    )


def _clock(at: float, span: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%m-%d" if span > 2 * 86_400 else "%H:%M")


def _svg(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg class="chart drawn" role="img" aria-label="{escape(shown(title))}" viewBox="0 0 {WIDTH} {_HEIGHT}">'
        + "".join(parts)
        + "</svg>"
    )
