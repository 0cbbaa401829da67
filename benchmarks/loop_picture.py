"""The picture of the loop's benchmark: accuracy of the release in production over time, as an SVG file that stands alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 900, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 884, 34, 366
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #59636e; } .tick { text-anchor: end; } .middle { text-anchor: middle; }
.guide { stroke: #e3e5e8; } .paper { fill: #fdfdfc; } .part { fill: #f1f2f3; } .refused { stroke: #a40e26; stroke-width: 2; }
.old { stroke: #57606a; fill: #57606a; } .new { stroke: #d1492c; fill: #d1492c; } polyline { fill: none !important; }
polyline, .whisker { stroke-width: 2; } text.old, text.new { stroke: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #9ba5b0; } .guide { stroke: #2c3137; } .paper { fill: #14171a; } .part { fill: #1c2126; }
  .old { stroke: #9ba5b0; fill: #9ba5b0; } .new { stroke: #ff7f5e; fill: #ff7f5e; } .refused { stroke: #ff6b7d; }
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A release, from its first answer on; shares with their intervals: low, estimate, high."""

    at_s: float
    label: str
    old: tuple[float, float, float]
    new: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A part of the run, seconds since its beginning."""

    name: str
    begin: float
    end: float


def picture(points: Sequence[Point], spans: Sequence[Span], *, rejected: Sequence[float]) -> str:
    """SVG: steps of old and new intents with their intervals, the parts behind them, and a cross for what was rejected."""
    end = max([span.end for span in spans] + [point.at_s for point in points] + [1.0])

    def x(seconds: float) -> float:
        return round(_LEFT + max(0.0, seconds) / end * (_RIGHT - _LEFT), 1)

    def y(share: float) -> float:
        return round(_BOTTOM - min(1.0, max(0.0, share)) * (_BOTTOM - _TOP), 1)

    parts = [f'<rect class="paper" width="{_WIDTH}" height="{_HEIGHT}"/>']
    for number, span in enumerate(spans):
        if number % 2:
            parts.append(
                f'<rect class="part" x="{x(span.begin)}" y="{_TOP}" width="{round(x(span.end) - x(span.begin), 1)}" '
                f'height="{_BOTTOM - _TOP}"/>'
            )
        middle = (x(span.begin) + x(span.end)) / 2
        parts.append(
            f'<text class="middle" x="{middle:.1f}" y="{_TOP - 8 - 14 * (number % 2)}">{escape(span.name)}</text>'
        )
    for percent in range(0, 101, 20):
        at = y(percent / 100)
        parts.append(f'<line class="guide" x1="{_LEFT}" x2="{_RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{at + 4}">{percent} %</text>')
    every = next(each for each in (1, 2, 5, 10, 20, 60) if end / 60 / each <= 14)
    parts += [
        f'<text class="middle" x="{x(60 * minute)}" y="{_BOTTOM + 18}">{minute}</text>'
        for minute in range(0, int(end / 60) + 1, every)
    ]
    parts.append(f'<text class="middle" x="{(_LEFT + _RIGHT) / 2}" y="{_BOTTOM + 36}">minutes since users came</text>')
    for kind, said in (
        ("old", "100 intents that the first release was taught"),
        ("new", "50 intents that only users know"),
    ):
        line = []
        for number, point in enumerate(points):
            low, share, high = getattr(point, kind)
            begin, until = x(point.at_s), x(points[number + 1].at_s if number + 1 < len(points) else end)
            line += [f"{begin},{y(share)}", f"{until},{y(share)}"]
            parts.append(f'<line class="whisker {kind}" x1="{begin}" x2="{begin}" y1="{y(low)}" y2="{y(high)}"/>')
            parts.append(
                f'<circle class="{kind}" cx="{begin}" cy="{y(share)}" r="4"><title>{escape(point.label)}: {100 * share:.1f} % '
                f"[{100 * low:.1f}, {100 * high:.1f}]</title></circle>"
            )
        parts.append(f'<polyline class="{kind}" points="{" ".join(line)}"/>')
        left = _LEFT + (0 if kind == "old" else 400)
        parts.append(f'<text class="{kind}" x="{left}" y="{_HEIGHT - 4}">{said}</text>')
    cross = f"{_BOTTOM - 15}l10 10m0 -10l-10 10"
    parts += [
        f'<path class="refused" d="M{x(at) - 5} {cross}"><title>a candidate is rejected</title></path>'
        for at in rejected
    ]
    title = "Share of the sealed test that the release in production answers to the letter, with 95 % intervals"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">'
        f"<title>{title}</title><style>{_STYLE}</style>" + "".join(parts) + "</svg>\n"
    )
