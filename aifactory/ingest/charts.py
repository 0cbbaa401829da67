"""Charts: the pictures of a corpus's page, as SVG that lies in the page.

pygal works out where bars, axes and labels go. Of what it writes only the drawing stays: no style, no script, no comment
with a date, no id. Colours, type and light or dark are the page's (`page_style`), by the classes that series are given, so
the bytes depend on what is drawn alone. Everything that comes from data must have gone through `page_text.shown`.
pygal is loaded with this module: about 0.06 s and 3 to 10 ms a chart, of which matplotlib would take ten times as much.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import pygal
from pygal.style import Style

from aifactory.ingest.page_text import columns

WIDTH = 400
"""Of a chart, in the units of its text, which is 12 high: as wide as a phone, so that its text can be read there."""
_TEXT = 12
_BAR = 26
_LETTER = 0.6 * _TEXT
_GAP = 12
"""Beside the labels."""
_HEADROOM = 1.1 * _TEXT
"""What pygal leaves free, over the height of the chart and as a share of the scale, for what is written at the bars."""
_STYLE = {f"{name}_font_size": _TEXT for name in ("label", "major_label", "value", "value_label", "legend", "title")}
_COLOR = re.compile(r"color-(\d+)")
_NUMBER = re.compile(r"-?\d+\.\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values that look alike."""

    tone: str
    """The class of its bars: kept, held or taken."""
    values: Sequence[int]
    written: Sequence[str]
    """What stands beside each bar; "" for nothing."""
    said: Sequence[str]
    """What a bar says when it is pointed at."""


def horizontal_bars(labels: Sequence[str], series: Sequence[Series], *, title: str) -> str:
    """One bar a label from the top down; several series are parts of it, one after the other."""
    longest = max(1, *(sum(values) for values in zip(*(each.values for each in series), strict=True)))
    height = len(labels) * _BAR
    beside = _text_width(labels) + _GAP
    # pygal leaves as much room as it thinks that letters need.
    margin = beside - max(map(len, labels)) * _LETTER
    room = 10 + _text_width([text for each in series for text in each.written])
    chart = pygal.HorizontalStackedBar(
        **_options(height),
        range=(0, longest * (WIDTH - beside) / (WIDTH - beside - room) / (1 + _HEADROOM / height)),
        show_x_labels=False,
        show_x_guides=False,
        margin_left=max(0, math.ceil(margin)),
    )
    # pygal counts from the bottom.
    chart.x_labels = list(labels)[::-1]
    backwards = [
        Series(tone=each.tone, values=each.values[::-1], written=each.written[::-1], said=each.said[::-1])
        for each in series
    ]
    return _drawn(chart, backwards, title)


def share_bar(series: Sequence[Series], *, title: str) -> str:
    """One bar of parts, as wide as the page lets it be; it has no text, which would be stretched."""
    total = sum(sum(each.values) for each in series)
    chart = pygal.HorizontalStackedBar(
        **_options(20) | {"print_values": False},
        range=(0, max(1, total)),
        show_x_labels=False,
        show_y_labels=False,
        show_x_guides=False,
    )
    chart.x_labels = [""]
    return _drawn(chart, series, title, is_stretched=True)


def histogram(labels: Sequence[str], series: Series, *, title: str, height: int = 190, every: int = 2) -> str:
    """A bar for each bin from left to right, of which every so manieth has its label below it."""
    chart = pygal.Bar(
        **_options(height),
        range=(0, max(1.0, max(series.values) * 1.12)),
        show_y_labels=False,
        show_y_guides=False,
        show_minor_x_labels=False,
        truncate_label=12,
    )
    chart.x_labels = list(labels)
    chart.x_labels_major = list(labels)[::every]
    return _drawn(chart, [series], title)


def _options(height: int) -> dict[str, Any]:
    return {
        "width": WIDTH,
        "height": height,
        "margin": 0,
        "spacing": 0,
        "show_legend": False,
        "print_values": True,
        "print_values_position": "top",
        "print_zeroes": True,
        "js": [],
        "css": [],
        "style": Style(**_STYLE),
    }


def _drawn(chart: Any, series: Sequence[Series], title: str, *, is_stretched: bool = False) -> str:
    chart.title = None
    for each in series:
        values = [
            {"value": value, "formatter": _saying(text)} for value, text in zip(each.values, each.written, strict=True)
        ]
        chart.add(each.tone, values)
    root = ElementTree.fromstring(chart.render(is_unicode=True, disable_xml_declaration=True))
    _strip(root)
    _say(root, series)
    _tone(root, [each.tone for each in series])
    for name in ("id", "class"):
        root.attrib.pop(name, None)
    root.attrib |= {"class": "chart", "role": "img", "aria-label": title}
    if is_stretched:
        root.attrib |= {"preserveAspectRatio": "none", "viewBox": _bounds(root)}
    return ElementTree.tostring(root, encoding="unicode")


def _text_width(texts: Sequence[str]) -> float:
    return max(map(columns, texts), default=0) * _LETTER


def _saying(text: str) -> Callable[[Any], str]:
    return lambda _value: text


def _strip(root: ElementTree.Element) -> None:
    """Leave the drawing alone."""
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        for name, value in node.attrib.items():
            if name != "class":
                node.set(name, _NUMBER.sub(_rounded, value))
    for parent in list(root.iter()):
        for child in list(parent):
            kind = child.get("class", "").split()
            is_empty = (child.tag == "g" and not len(child)) or (child.tag == "text" and not child.text)
            if child.tag in ("defs", "title") or "background" in kind or "tooltip-overlay" in kind or is_empty:
                parent.remove(child)


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number.group()):.1f}".removesuffix(".0")


def _say(root: ElementTree.Element, series: Sequence[Series]) -> None:
    """What each bar says when it is pointed at, in the place of pygal's notes for a script."""
    groups = [node for node in root.iter("g") if node.get("class") == "bars"]
    for each, group in zip(series, groups, strict=True):
        for bar, said in zip(group, each.said, strict=True):
            for note in bar.findall("desc"):
                bar.remove(note)
            ElementTree.SubElement(bar, "title").text = said


def _bounds(root: ElementTree.Element) -> str:
    """The viewBox that holds the bars and nothing more."""
    bars = [{name: float(bar.get(name, 0)) for name in ("x", "y", "width", "height")} for bar in root.iter("rect")]
    left, top = (min(bar[name] for bar in bars) for name in "xy")
    right = max(bar["x"] + bar["width"] for bar in bars)
    bottom = max(bar["y"] + bar["height"] for bar in bars)
    return f"{left:g} {top:g} {right - left:.4g} {bottom - top:.4g}"


def _tone(root: ElementTree.Element, tones: Sequence[str]) -> None:
    for node in root.iter():
        found = _COLOR.search(node.get("class", ""))
        if found:
            node.set("class", f"series {tones[int(found.group(1))]}")
        elif node.get("class") == "":
            del node.attrib["class"]
