"""The picture of a run's losses, as an SVG file that stands alone.

pygal works out where the axes, their labels and the line go. Of what it writes only the drawing stays: no script, no
comment with a date, no id, so the bytes depend on the losses alone. It is light or dark as its reader likes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import pygal
from pygal.style import Style

WIDTH, HEIGHT = 720, 320
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #59636e; }
.axis.y text { text-anchor: end; } .axis.x text { text-anchor: middle; } .title { text-anchor: middle; }
.guide, .axis > .line { stroke: #e3e5e8; fill: none; } .series .line { stroke: #d1492c; stroke-width: 2; fill: none; }
.paper { fill: #fdfdfc; }
@media (prefers-color-scheme: dark) {
  text { fill: #9ba5b0; } .guide, .axis > .line { stroke: #2c3137; } .series .line { stroke: #ff7f5e; }
  .paper { fill: #14171a; }
}
"""
_NUMBER = re.compile(r"-?\d+\.\d+")


def loss_chart(points: Sequence[tuple[int, float]], *, title: str = "Training loss") -> str:
    """SVG of a curve of (steps done, loss in nats per token), as `run_log.curve` makes it."""
    chart = pygal.XY(
        width=WIDTH,
        height=HEIGHT,
        js=[],
        css=[],
        show_legend=False,
        show_dots=len(points) == 1,
        margin=16,
        spacing=12,
        x_title="steps",
        y_title="loss (nats per token)",
        xrange=(0, max(1, *(step for step, _ in points), 1)),
        x_value_formatter=lambda step: f"{step:,.0f}",
        style=Style(**{f"{name}_font_size": 13 for name in ("label", "major_label", "title")}),
    )
    chart.x_labels = _ticks(max((step for step, _ in points), default=1))
    chart.add("loss", list(points))
    root = ElementTree.fromstring(chart.render(is_unicode=True, disable_xml_declaration=True))
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
    for parent in list(root.iter()):
        for child in list(parent):
            kind = child.get("class", "").split()
            is_empty = child.tag == "g" and not len(child)
            if child.tag in ("defs", "title") or {"overlay", "background"} & set(kind) or is_empty:
                parent.remove(child)
    for node in root.iter():
        for name, value in node.attrib.items():
            node.set(name, _NUMBER.sub(lambda number: f"{float(number.group()):.1f}".removesuffix(".0"), value))
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {WIDTH} {HEIGHT}",
        "role": "img",
        "aria-label": title,
    }
    head = [ElementTree.Element("title"), ElementTree.Element("style")]
    head[0].text, head[1].text = title, _STYLE
    paper = ElementTree.Element("rect", {"class": "paper", "width": "100%", "height": "100%"})
    root[:0] = [*head, paper]
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _ticks(last: int) -> list[int]:
    """Round numbers of steps from 0 to `last`, about five."""
    rough = max(1.0, last / 5)
    power = 10 ** math.floor(math.log10(rough))
    width = max(1, int(next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= rough)))
    return list(range(0, last + 1, width))
