"""The picture of a plan: what a run costs over how long it takes, a line for each accelerator, a point for each number of them.

SVG that stands alone, with its own colours for light and dark; the bytes depend on the plans alone. Both scales are logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from aifactory.plan.training import TrainingPlan

_WIDTH, _HEIGHT = 720, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 46, 52
_MOST_TICKS = 8
_NUMBERS = [step * 10.0**decade for decade in range(-12, 16) for step in (1, 1.5, 2, 3, 5, 7)]
_TIMES = [
    *(seconds / 3600 for seconds in (1e-3, 1e-2, 0.1, 1, 3, 10, 30)),
    *(minutes / 60 for minutes in (1, 3, 10, 30)),
    *(1, 3, 8),
    *(24 * days for days in (1, 3, 10, 30, 100)),
    *(8766 * years for years in (1, 3, 10, 30, 100, 1e3, 1e4, 1e5)),
]
"""Hours."""
_SHAPES = ("circle", "square", "diamond", "triangle", "cross", "bar")
_STYLE = """
svg{font:13px system-ui,sans-serif;background:#fff;color:#1a1a1a}
text{fill:currentColor}
.tick{font-size:12px;fill:#555}
.guide{stroke:#ddd}
.s0{--c:#0b62a8}.s1{--c:#b3410e}.s2{--c:#2b7a2b}.s3{--c:#7a3fa0}.s4{--c:#8a6d00}.s5{--c:#a8234f}
.line{fill:none;stroke:var(--c);stroke-width:2}
.point{fill:var(--c);stroke:#fff}
@media(prefers-color-scheme:dark){svg{background:#161616;color:#eee}.tick{fill:#aaa}.guide{stroke:#333}.point{stroke:#161616}
.s0{--c:#6cb6ff}.s1{--c:#ff9d6b}.s2{--c:#7ed07e}.s3{--c:#cda2ee}.s4{--c:#e3c75a}.s5{--c:#ff8fb2}}
""".replace("\n", "")


def tradeoff_svg(plans: Sequence[TrainingPlan], *, title: str, currency: str) -> str:
    """Of plans that fit, in any order; money where all have a price, else kilowatt-hours.

    Raises   ValueError where there is none.
    """
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        raise ValueError("expected a plan that fits, found none")
    has_money = all(plan.footprint.money for plan in fitting)
    unit = currency if has_money else "kWh"

    def cost(plan: TrainingPlan) -> float:
        return (plan.footprint.money if has_money else plan.footprint.kwh) or 0.0

    x, x_ticks = _scale([plan.hours for plan in fitting], _LEFT, _WIDTH - _RIGHT, _TIMES)
    y, y_ticks = _scale([cost(plan) for plan in fitting], _HEIGHT - _BOTTOM, _TOP, _NUMBERS)
    parts = [f'<text x="{_LEFT}" y="22" font-weight="600">{escape(title)}</text>']
    for tick in x_ticks:
        parts.append(_guide(x(tick), x(tick), _TOP, _HEIGHT - _BOTTOM))
        parts.append(_tick(x(tick), _HEIGHT - _BOTTOM + 18, "middle", hours_words(tick)))
    for tick in y_ticks:
        parts.append(_guide(_LEFT, _WIDTH - _RIGHT, y(tick), y(tick)))
        parts.append(_tick(_LEFT - 8, y(tick) + 4, "end", short(tick)))
    parts.append(
        f'<text x="{(_WIDTH + _LEFT) // 2}" y="{_HEIGHT - 12}" text-anchor="middle">time, with interruptions</text>'
    )
    parts.append(f'<text x="8" y="{_TOP - 8}">{escape(unit)}</text>')
    for number, name in enumerate(dict.fromkeys(plan.accelerator for plan in fitting)):
        of_name = sorted((plan for plan in fitting if plan.accelerator == name), key=lambda plan: plan.count)
        parts.append(_series(number, of_name, x, y, cost, unit))
    body = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><style>{_STYLE}</style>{body}</svg>\n'
    )


def short(value: float) -> str:
    """A number in few letters: 1.2M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def hours_words(hours: float) -> str:
    """A time as people say it."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 1:
        return f"{hours * 60:.2g} min"
    if hours < 48:
        return f"{hours:.3g} h"
    if hours < 8766:
        return f"{hours / 24:.3g} d"
    return "1 year" if hours == 8766 else f"{hours / 8766:.3g} years"


def _series(
    number: int,
    plans: Sequence[TrainingPlan],
    x: Callable[[float], float],
    y: Callable[[float], float],
    cost: Callable[[TrainingPlan], float],
    unit: str,
) -> str:
    at = [(x(plan.hours), y(cost(plan))) for plan in plans]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in at)
    parts = [f'<g class="s{number % len(_SHAPES)}">', f'<polyline class="line" points="{path}"/>']
    for plan, (px, py) in zip(plans, at, strict=True):
        said = (
            f"{plan.count} {plan.accelerator}, {plan.layout.words}: {hours_words(plan.hours)}, {short(cost(plan))} {unit}, "
            f"{short(plan.tokens_per_s)} tokens/s"
        )
        parts.append(
            f'<g class="point"><title>{escape(said)}</title>{_mark(_SHAPES[number % len(_SHAPES)], px, py)}</g>'
        )
    # The largest and the smallest number are named; all others say theirs when they are pointed at.
    for at_end, below in ((0, 18), (-1, -8)):
        plan, (px, py) = plans[at_end], at[at_end]
        side = "end" if px > _WIDTH / 2 else "start"
        text = f"{plan.count:,} {plan.accelerator}"
        parts.append(f'<text x="{px:.1f}" y="{py + below:.1f}" text-anchor="{side}">{escape(text)}</text>')
        if len(plans) == 1:
            break
    return "".join([*parts, "</g>"])


def _mark(shape: str, x: float, y: float) -> str:
    points = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
        "triangle": ((0, -6), (6, 5), (-6, 5)),
        "cross": (
            (-2, -6),
            (2, -6),
            (2, -2),
            (6, -2),
            (6, 2),
            (2, 2),
            (2, 6),
            (-2, 6),
            (-2, 2),
            (-6, 2),
            (-6, -2),
            (-2, -2),
        ),
        "bar": ((-2, -7), (2, -7), (2, 7), (-2, 7)),
    }
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in points[shape])
    return f'<polygon points="{corners}"/>'


def _guide(x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="guide" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _tick(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _scale(
    values: Sequence[float], begin: float, end: float, known: Sequence[float]
) -> tuple[Callable[[float], float], list[float]]:
    """A logarithmic scale with those of the known ticks that lie on it, at most so many that they can be read."""
    low, high = math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08
    ticks = [tick for tick in known if low <= math.log10(tick) <= high]
    while len(ticks) > _MOST_TICKS:
        ticks = ticks[::2]
    if not ticks:
        ticks = [10 ** ((low + high) / 2)]

    def at(value: float) -> float:
        return begin + (math.log10(value) - low) / (high - low) * (end - begin)

    return at, ticks
