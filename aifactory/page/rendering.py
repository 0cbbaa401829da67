"""Rendering: values to HTML, by templates in `views/` that escape everything, and to JSON.

Whatever a template writes goes through `shown` first, so that what can't be seen in a name is seen; pictures alone are markup, and
they escape what they write themselves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import jinja2
import orjson
from markupsafe import Markup

from aifactory.ingest.charts import Series, horizontal_bars
from aifactory.ingest.page_style import STYLE
from aifactory.ingest.page_text import cut, shown
from aifactory.page import charts
from aifactory.page.charts import Stack
from aifactory.page.drift import LiveAnswers
from aifactory.page.loop import Loop
from aifactory.page.loop_picture import column, ring
from aifactory.page.releases import Finding, ReleaseLine
from aifactory.page.runs import Run
from aifactory.page.traffic import Traffic
from aifactory.proof.cycle_charts import Whisker, curve, intervals
from aifactory.proof.cycle_page import CYCLE_STYLE

_LABEL = 22
_MOST_BARS = 12
_NOTHING = "–"


class Rendering:
    """The templates, and the files that they name."""

    def __init__(self) -> None:
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("aifactory.page", "views"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            finalize=_visible,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(FILTERS)
        self._templates.globals.update(PICTURES)
        own = resources.files("aifactory.page").joinpath("files")
        self.files: Mapping[str, tuple[str, bytes]] = {
            "page.css": ("text/css", (STYLE + CYCLE_STYLE + own.joinpath("page.css").read_text("utf-8")).encode()),
            "page.js": ("text/javascript", own.joinpath("page.js").read_bytes()),
        }
        """By name its media type and content."""
        self._templates.globals["files"] = {
            name.replace(".", "_"): f"/files/{name}?{hashlib.sha256(data).hexdigest()[:12]}"
            for name, (_, data) in self.files.items()
        }

    def html(self, template: str, **values: Any) -> str:
        """A whole page."""
        return self._templates.get_template(f"{template}.html").render(**values)


def to_json(value: Any) -> bytes:
    """Values as JSON; a number that has no form in it is null."""
    return orjson.dumps(value, default=_plain, option=orjson.OPT_PASSTHROUGH_DATACLASS)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"expected a value that has a form in JSON, found a {type(value).__name__}")


def _visible(value: Any) -> Any:
    if isinstance(value, Markup):
        return value
    if value is None:
        return _NOTHING
    return shown(value, keep="\n") if isinstance(value, str) else value


# ── numbers and times ─────────────────────────────────────────────────────────────────────────────────────────────────


def ago(at: float | None, now: float) -> str:
    """3 min ago."""
    if at is None:
        return _NOTHING
    seconds = now - at
    return f"{lasting(max(0.0, seconds))} ago" if seconds >= 1 else "now"


def lasting(seconds: float | None) -> str:
    """12 s, 3 min, 5 h, 2 days."""
    if seconds is None:
        return _NOTHING
    for unit, size, until in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < until:
            return f"{seconds / size:.0f}\u00a0{unit}"
    return f"{seconds / 86_400:.0f}\u00a0days"


def when(at: float | None) -> str:
    """2026-11-26 18:04 UTC."""
    return _NOTHING if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d\u00a0%H:%M\u00a0UTC")


def iso(at: float) -> str:
    """For the attribute of a time."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def count(number: float | None) -> str:
    """1,234."""
    return _NOTHING if number is None else f"{number:,.0f}"


def decimal(number: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """1.234; −0.201 where it is signed."""
    if number is None:
        return _NOTHING
    return f"{number:{'+' if signed else ''},.{digits}f}".replace("-", "−")


def figure(number: float | None) -> str:
    """Three digits that say something: 0.00025, 1.23, 1,230."""
    if number is None:
        return _NOTHING
    if number == 0 or abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.{max(0, 2 - math.floor(math.log10(abs(number))))}f}"


def percent(share: float | None, digits: int = 0) -> str:
    """12 %."""
    return _NOTHING if share is None else f"{100 * share:.{digits}f}\u00a0%"


def interval(values: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """1.234 [1.200, 1.270]."""
    if not values:
        return _NOTHING
    estimate, low, high = (decimal(values[name], signed=signed) for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


def verdict(change: Mapping[str, Any] | None) -> str:
    """What an interval of a change in bits per byte says."""
    if not change:
        return "nothing to compare with"
    return "better" if change["high"] < 0 else "worse" if change["low"] > 0 else "no difference found"


def summary(reasons: Sequence[str]) -> str:
    """Reasons in a line: what did not pass, or how many checks did."""
    left = [reason for reason in reasons if not reason.startswith("passed")]
    if reasons and not left:
        return f"{len(reasons)} check{'' if len(reasons) == 1 else 's'} passed"
    return "; ".join(left)


def short(artifact: str | None) -> str:
    """model/0123456789ab…"""
    if artifact is None:
        return _NOTHING
    kind, slash, name = artifact.partition("/")
    return f"{kind}{slash}{name[:12]}" if slash else artifact


def joules(number: float | None) -> str:
    """1.2 kJ."""
    if number is None:
        return _NOTHING
    for unit, size in (("GJ", 1e9), ("MJ", 1e6), ("kJ", 1e3)):
        if number >= size:
            return f"{number / size:,.3g}\u00a0{unit}"
    return f"{number:,.3g}\u00a0J"


FILTERS: Mapping[str, Any] = {
    "ago": ago,
    "lasting": lasting,
    "when": when,
    "iso": iso,
    "count": count,
    "decimal": decimal,
    "figure": figure,
    "percent": percent,
    "interval": interval,
    "verdict": verdict,
    "short": short,
    "summary": summary,
    "joules": joules,
}

# ── pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def loop_picture(loop: Loop) -> Markup:
    """The loop, wide and narrow; the style shows the one that there is room for."""
    return Markup(ring(loop.parts) + column(loop.parts))


def loss_picture(run: Run) -> Markup:
    """The losses of a run; nothing before the first."""
    if not run.curve:
        return Markup("")
    return Markup(curve(run.curve, title=f"Loss of {shown(run.model)} over its steps, nats per token"))


def findings_picture(release: ReleaseLine) -> Markup:
    """The bits per byte of a release on each set, beside the release before."""
    whiskers = []
    for finding in release.findings:
        whiskers.append(_whisker(finding, finding.candidate, finding.set, "kept"))
        if finding.champion:
            whiskers.append(_whisker(finding, finding.champion, "  before", "held"))
    return (
        Markup(intervals(whiskers, title=f"Bits per byte of {shown(release.name)}, by set")) if whiskers else Markup("")
    )


def changes_picture(release: ReleaseLine) -> Markup:
    """What changed over the release before; nothing where there is none."""
    changed = [(finding, finding.change) for finding in release.findings if finding.change]
    whiskers = [
        _whisker(
            finding,
            change,
            finding.set,
            {"better": "kept", "worse": "taken"}.get(verdict(change), "held"),
            said=f"{finding.set}: {interval(change, signed=True)} bits per byte, {verdict(change)}",
        )
        for finding, change in changed
        if change is not None
    ]
    title = f"Change of {shown(release.name)} in bits per byte"
    return Markup(intervals(whiskers, title=title, zero=True)) if whiskers else Markup("")


def _whisker(finding: Finding, values: Mapping[str, Any], label: str, tone: str, *, said: str = "") -> Whisker:
    return Whisker(
        label=label.strip(),
        tone=tone,
        low=values["low"],
        estimate=values["estimate"],
        high=values["high"],
        said=said or f"{finding.set}, {label.strip()}: {interval(values)} bits per byte",
    )


def traffic_picture(seen: Traffic) -> Markup:
    """Requests over the span by release; nothing where there were none."""
    if not seen.requests:
        return Markup("")
    stacks = [Stack(label=each.release, values=each.by_column) for each in reversed(seen.by_release)]
    title = f"Requests from {when(seen.since)} to {when(seen.until)}: {seen.requests:,}"
    return Markup(charts.stacked_columns(stacks, since=seen.since, until=seen.until, title=title))


def drift_picture(seen: LiveAnswers) -> Markup:
    """Live answers beside their standard; nothing before both are known."""
    if not seen.groups or seen.standard is None or seen.limit is None:
        return Markup("")
    lines = [("standard", seen.standard), ("limit", seen.limit)]
    return Markup(
        charts.levels(
            seen.groups, lines=lines, title=f"Bits per byte of live answers of {shown(seen.release)}, in their order"
        )
    )


def bars(named: Mapping[str, float], unit: str, title: str) -> Markup:
    """A bar for each, the longest names cut; what is beyond a dozen is summed up."""
    shares = list(named.items())[:_MOST_BARS]
    if len(named) > _MOST_BARS:
        shares.append((f"{len(named) - _MOST_BARS} more", sum(list(named.values())[_MOST_BARS:])))
    if not any(round(number) for _, number in shares):
        return Markup("")
    labels = [cut(shown(name).replace("_", " "), _LABEL) for name, _ in shares]
    numbers = [round(number) for _, number in shares]
    written = [f"{number:,}{unit and f' {unit}'}" for number in numbers]
    said = [f"{label}: {text}" for label, text in zip(labels, written, strict=True)]
    return Markup(
        horizontal_bars(labels, [Series(tone="kept", values=numbers, written=written, said=said)], title=shown(title))
    )


def meter(done: float, title: str) -> Markup:
    """A bar of what was done."""
    return Markup(charts.meter(done, title=title))


def named_joules(lines: Sequence[Any]) -> dict[str, float]:
    """Lines of the energy ledger as what `bars` draws."""
    return {line.name: line.joules for line in lines}


PICTURES: Mapping[str, Any] = {
    "loop_picture": loop_picture,
    "loss_picture": loss_picture,
    "findings_picture": findings_picture,
    "changes_picture": changes_picture,
    "traffic_picture": traffic_picture,
    "drift_picture": drift_picture,
    "bars": bars,
    "meter": meter,
    "named_joules": named_joules,
}
