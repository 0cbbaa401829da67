"""The picture of the loop, as SVG that lies in the page: a ring where there is room for one, a column on a telephone.

Every part is a link to the view that has more of it. What a part is doing is told by words and by the form of its mark, and
only then by colour. Whatever comes from records is made visible (`shown`), cut to its box and escaped here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

from aifactory.ingest.page_text import columns, cut, shown
from aifactory.page.loop import ORDER, Part

_BOX, _HIGH, _GAP = 188, 100, 30
_TOP, _BOTTOM = 4, 190
_EM = 0.56
"""Of a letter, over the height of its text."""
_COLUMNS: Mapping[str, tuple[int, int]] = {
    "ingest": (0, _TOP),
    "tokenize": (1, _TOP),
    "train": (2, _TOP),
    "evaluate": (3, _TOP),
    "promote": (4, _TOP),
    "serve": (4, _BOTTOM),
    "traffic": (3, _BOTTOM),
    "feedback": (2, _BOTTOM),
    "improve": (1, _BOTTOM),
    "sources": (0, _BOTTOM),
}
"""Where the parts stand in the ring: column, and height of the upper edge."""
_WIDE = 5 * _BOX + 4 * _GAP
_ROW, _ROW_GAP, _LEFT, _NARROW = 56, 20, 22, 320
_PAD = 14


def ring(parts: Sequence[Part]) -> str:
    """For a screen: the way out on top, the way back below."""
    found = {part.name: part for part in parts}
    ways = [_way(each, after, found) for each, after in pairwise(_OUT)]
    ways += [_way(each, after, found) for each, after in pairwise(_BACK)]
    boxes = "".join(_box(found[name], x=_x(column), y=y) for name, (column, y) in _COLUMNS.items())
    down, up = _x(4) + _BOX / 2, _x(0) + 46
    mid = (_TOP + _HIGH + _BOTTOM) / 2
    back = f"M{_x(1) + 60} {_BOTTOM}V{mid}H{_x(0) + 130}V{_TOP + _HIGH + 3}"
    ways += [
        _path(f"M{down} {_TOP + _HIGH}V{_BOTTOM - 3}", found["serve"]),
        _path(f"M{up} {_BOTTOM}V{_TOP + _HIGH + 3}", found["ingest"]),
        _path(back, found["improve"]),
    ]
    return _svg(f"{''.join(ways)}{boxes}", "ring", _WIDE, _BOTTOM + _HIGH + 6)


def column(parts: Sequence[Part]) -> str:
    """For a telephone: from the top down, and back up along the edge."""
    found = {part.name: part for part in parts}
    heights = {name: 4 + at * (_ROW + _ROW_GAP) for at, name in enumerate(ORDER)}
    ways = [
        _path(f"M{_LEFT + 40} {heights[name] + _ROW}V{heights[after] - 3}", found[after])
        for name, after in pairwise(ORDER)
    ]
    low, high = heights["improve"] + _ROW / 2, heights["ingest"] + _ROW / 2
    ways.append(_path(f"M{_LEFT} {low}H7V{high}H{_LEFT - 3}", found["improve"]))
    rows = "".join(_row(found[name], y=heights[name]) for name in ORDER)
    return _svg(f"{''.join(ways)}{rows}", "column", _NARROW, heights[ORDER[-1]] + _ROW + 4)


_OUT = ("ingest", "tokenize", "train", "evaluate", "promote")
_BACK = ("serve", "traffic", "feedback", "improve")


def _x(at: int) -> int:
    return at * (_BOX + _GAP)


def _way(name: str, after: str, found: Mapping[str, Part]) -> str:
    (start, y), (end, _) = _COLUMNS[name], _COLUMNS[after]
    height = y + _HIGH / 2
    if end > start:
        return _path(f"M{_x(start) + _BOX} {height}H{_x(end) - 3}", found[after])
    return _path(f"M{_x(start)} {height}H{_x(end) + _BOX + 3}", found[after])


def _path(way: str, towards: Part) -> str:
    kind = "way busy" if towards.state == "working" else "way"
    return f'<path class="{kind}" d="{way}"/>'


def _box(part: Part, *, x: float, y: float) -> str:
    now, figure = (
        cut(shown(text), (_BOX - 2 * _PAD) / (_EM * high)) for text, high in ((part.now, 14), (part.figure, 13))
    )
    return _link(
        part,
        now,
        figure,
        f'<rect class="box" x="{x + 1}" y="{y + 1}" width="{_BOX - 2}" height="{_HIGH - 2}" rx="10"/>'
        f'<text class="verb" x="{x + _PAD}" y="{y + 28}">{part.name}</text> {_mark(part, x + _BOX - _PAD - 8, y + 23)}'
        f'<text class="now" x="{x + _PAD}" y="{y + 55}">{escape(now)}</text> '
        f'<text class="figure" x="{x + _PAD}" y="{y + 78}">{escape(figure)}</text>'
        + _bar(part, x + _PAD, y + _HIGH - 15, _BOX - 2 * _PAD),
    )


def _row(part: Part, *, y: float) -> str:
    width = _NARROW - _LEFT - 2
    now = cut(shown(part.now), (width - 2 * 10 - 22 - 12) / (_EM * 13) - columns(part.name) * 1.25)
    figure = cut(shown(part.figure), (width - 20) / (_EM * 13))
    return _link(
        part,
        now,
        figure,
        f'<rect class="box" x="{_LEFT + 1}" y="{y + 1}" width="{width - 2}" height="{_ROW - 2}" rx="8"/>'
        f'<text x="{_LEFT + 10}" y="{y + 23}"><tspan class="verb">{part.name}</tspan> <tspan class="now" dx="6">'
        f"{escape(now)}</tspan></text> {_mark(part, _LEFT + width - 16, y + 18)}"
        f'<text class="figure" x="{_LEFT + 10}" y="{y + 43}">{escape(figure)}</text>'
        + _bar(part, _LEFT + 10, y + _ROW - 8, width - 20),
    )


def _link(part: Part, now: str, figure: str, drawn: str) -> str:
    """What it is called begins with what is seen of it, word for word: who speaks to a computer says that (WCAG 2.5.3)."""
    label = escape(f"{part.name} {now} {figure}, {part.state}")
    return f'<a class="part {part.state}" href="/{escape(part.view)}" aria-label="{label}">{drawn}</a>'


def _mark(part: Part, x: float, y: float) -> str:
    """A ring with a dot: working; a disc: ready; a ring: waiting; a triangle: trouble."""
    match part.state:
        case "working":
            return f'<circle class="mark" cx="{x}" cy="{y}" r="7"/><circle class="dot" cx="{x}" cy="{y}" r="3"/>'
        case "ready":
            return f'<circle class="mark full" cx="{x}" cy="{y}" r="5"/>'
        case "waiting":
            return f'<circle class="mark" cx="{x}" cy="{y}" r="5"/>'
        case _:
            return f'<path class="mark full" d="M{x - 8} {y + 7}L{x} {y - 8}L{x + 8} {y + 7}Z"/>'


def _bar(part: Part, x: float, y: float, width: float) -> str:
    if part.done is None:
        return ""
    done = max(2.0, min(1.0, part.done) * width)
    return (
        f'<rect class="well" x="{x}" y="{y}" width="{width}" height="4" rx="2"/>'
        f'<rect class="done" x="{x}" y="{y}" width="{done:.1f}" height="4" rx="2"/>'
    )


def _svg(drawn: str, kind: str, width: float, height: float) -> str:
    arrow = (
        f'<defs><marker id="arrow-{kind}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0L8 4L0 8Z"/></marker></defs>'
    )
    return (
        f'<svg class="loop {kind}" role="group" aria-label="The loop, part by part" viewBox="0 0 {width} {height}">{arrow}'
        f"{drawn}</svg>"
    )
