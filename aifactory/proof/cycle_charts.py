"""Pictures of a cycle's page, as SVG that lies in the page: intervals beside one another, and a curve of losses.

Colours, type and light or dark are the page's, by the classes of the shapes; the bytes depend on what is drawn alone.
Everything that comes from data must have gone through `page_text.shown`; it is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from aifactory.ingest.charts import WIDTH
from aifactory.ingest.page_text import columns

_LINE = 30
_LETTER = 7.2
_TEXT = 12
_FOOT = 22
_TICKS = 4
_CURVE_HEIGHT = 190


@dataclass(frozen=True, slots=True, kw_only=True)
class Whisker:
    """An estimate and its interval."""

    label: str
    tone: str
    """The class of its shape: kept, held or taken."""
    low: float
    estimate: float
    high: float
    said: str
    """What it says when it is pointed at."""


def intervals(whiskers: Sequence[Whisker], *, title: str, zero: bool = False) -> str:
    """One line an interval from the top down, on one scale.

    zero   whether 0 is marked, and on the scale in any case
    """
    left = max(columns(each.label) for each in whiskers) * _LETTER + 12
    values = [value for each in whiskers for value in (each.low, each.high)] + ([0.0] if zero else [])
    ticks = ticks_of(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    height = _LINE * len(whiskers) + _FOOT
    # Half a label of the scale stands out beyond its last tick.
    right = WIDTH - 20

    def x(value: float) -> str:
        return _number(left + (value - low) / (high - low) * (right - left))

    bottom = height - _FOOT
    parts = []
    for tick in ticks:
        kind = "guide zero" if zero and tick == 0 else "guide"
        parts.append(f'<line class="{kind}" x1="{x(tick)}" x2="{x(tick)}" y1="4" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x(tick)}" y="{height - 6}">{_tick(tick, ticks)}</text>')
    for number, each in enumerate(whiskers):
        y = _LINE * number + _LINE // 2
        parts.append(
            f'<text x="0" y="{y + 4}">{escape(each.label)}</text>'
            f'<g class="whisker {each.tone}"><title>{escape(each.said)}</title>'
            f'<line x1="{x(each.low)}" x2="{x(each.high)}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{x(each.estimate)}" cy="{y}" r="5"/></g>'
        )
    return _svg(parts, height, title)


def curve(points: Sequence[tuple[int, float]], *, title: str) -> str:
    """The losses of a run over its steps."""
    ticks_y = ticks_of(min(loss for _, loss in points), max(loss for _, loss in points))
    last = max(1, max(step for step, _ in points))
    ticks_x = [tick for tick in ticks_of(0, last) if tick == int(tick) and tick <= last]
    low, high = ticks_y[0], ticks_y[-1]
    left = max(columns(_tick(tick, ticks_y)) for tick in ticks_y) * _LETTER + 8
    right, bottom = WIDTH - 20, _CURVE_HEIGHT - _FOOT

    def x(step: float) -> str:
        return _number(left + step / last * (right - left))

    def y(loss: float) -> str:
        return _number(8 + (high - loss) / (high - low) * (bottom - 8))

    parts = []
    for tick in ticks_y:
        parts.append(f'<line class="guide" x1="{_number(left)}" x2="{right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(
            f'<text class="tick side" x="{_number(left - 6)}" y="{_number(float(y(tick)) + 4)}">{_tick(tick, ticks_y)}</text>'
        )
    parts += [f'<text class="tick" x="{x(tick)}" y="{_CURVE_HEIGHT - 6}">{tick:,.0f}</text>' for tick in ticks_x]
    way = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
    parts.append(f'<polyline class="curve" points="{way}"/>')
    if len(points) == 1:
        parts.append(f'<g class="whisker kept"><circle cx="{x(points[0][0])}" cy="{y(points[0][1])}" r="4"/></g>')
    return _svg(parts, _CURVE_HEIGHT, title)


def ticks_of(low: float, high: float) -> list[float]:
    """Round numbers around a range, about five of them; at least two."""
    rough = max(high - low, abs(high) * 1e-3, 1e-6) / _TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) + 0.0 for number in range(first, max(last, first + 1) + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += step * 10**digits < 2.6 and round(step * 10**digits, 6) % 1 != 0
    return f"{value:.{digits}f}".replace("-", "−")


def _svg(parts: Sequence[str], height: int, title: str) -> str:
    return (
        f'<svg class="chart drawn" role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {height}">'
        + "".join(parts)
        + "</svg>"
    )


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
