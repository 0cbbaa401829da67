"""The page on a terminal: `aifactory status`, one screen, and again and again with --watch.

Without a terminal it is plain text. What comes from records is made visible (`shown`): no name of theirs moves a cursor.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aifactory.ingest.page_text import shown
from aifactory.page.cycles import CycleLine, cycles
from aifactory.page.loop import Loop, Part, loop
from aifactory.page.releases import Releases, releases
from aifactory.page.rendering import ago, interval, joules, lasting, verdict, when
from aifactory.page.spending import EnergyBooks
from aifactory.page.traffic import Traffic
from aifactory.records.books import Books

_MARKS = {"working": "◉", "ready": "●", "waiting": "○", "trouble": "▲"}
_STYLES = {"working": "bold cyan", "ready": "", "waiting": "dim", "trouble": "bold red"}
_STATES = {"promoted": "green", "running": "cyan", "trial": "cyan", "failed": "red", "rejected": "yellow"}
_COLUMNS = "▁▂▃▄▅▆▇█"
_BAR = 14
_MOST_RELEASES, _MOST_CYCLES, _MOST_ALERTS, _MOST_HAPPENINGS = 4, 3, 4, 3
_LINE = 100
"""Columns that are taken where there is no terminal."""


def show(books: Books, out: TextIO, *, watch: bool = False, every_s: float = 2.0) -> None:
    """Write the screen once, or until interrupted."""
    console = Console(file=out, highlight=False, soft_wrap=not out.isatty(), width=None if out.isatty() else _LINE)
    energy = EnergyBooks(books)
    if not watch:
        console.print(screen(books, energy))
        return
    if not console.is_terminal:
        while True:
            console.print(screen(books, energy), Text(""))
            out.flush()
            time.sleep(every_s)
    with Live(screen(books, energy), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            live.update(screen(books, energy), refresh=True)


def screen(books: Books, energy: EnergyBooks) -> RenderableType:
    """What there is and what happens, on one screen."""
    seen, made, turned = (
        loop(books, happenings=_MOST_HAPPENINGS),
        releases(books, history=1),
        cycles(books, limit=_MOST_CYCLES),
    )
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(ratio=1)
    for label, lines in (
        ("releases", list(_releases(made, seen.at))),
        ("cycles", [_cycle(each, seen.at) for each in turned]),
        ("requests", [_requests(seen.traffic)]),
        ("energy", [_energy(energy)]),
        ("lately", list(_happenings(seen))),
        ("alerts", list(_alerts(seen))),
    ):
        for number, line in enumerate(lines or [Text("none", style="dim")]):
            facts.add_row(label if number == 0 else "", line)
    return Group(_title(seen), Text(""), _parts(seen.parts), Text(""), facts)


def _title(seen: Loop) -> Text:
    wrong = f"{seen.wrong} alert{'' if seen.wrong == 1 else 's'}" if seen.wrong else "no alerts"
    title = Text()
    title.append(seen.factory, style="bold")
    title.append(f"  {_safe(seen.headline)}  ")
    title.append(wrong, style="bold red" if seen.wrong else "dim")
    title.append(f"  {when(seen.at)}".replace("\u00a0", " "), style="dim")
    return title


def _parts(parts: Sequence[Part]) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column()
    for part in parts:
        style = _STYLES[part.state]
        now = Text(_safe(part.now), style=style)
        if part.done is not None:
            now.append(f"  {_bar(part.done)} {part.done:.0%}", style="cyan")
        table.add_row(
            Text(_MARKS[part.state], style=style),
            Text(part.name, style=style),
            now,
            Text(_safe(part.figure), style="dim"),
        )
    return table


def _releases(made: Releases, now: float) -> Iterator[Text]:
    for each in made.lines[:_MOST_RELEASES]:
        found = next(iter(each.findings), None)
        score = "" if found is None else f"  {found.set} {interval(found.candidate)}"
        role = "" if each.role == "earlier" else f"  {each.role}"
        trial = made.trial
        if trial is not None and trial.release == each.number:
            role += f" {trial.share:.1%} of the {trial.by}s"
        style = {"production": "green", "quarantined": "red"}.get(each.role, "cyan" if trial else "")
        yield Text.assemble(
            each.name, (role, style), _plain(f"{score}  {each.answers:,} answers  {ago(each.created_at, now)}")
        )
    if len(made.lines) > _MOST_RELEASES:
        yield Text(f"and {len(made.lines) - _MOST_RELEASES} older", style="dim")


def _cycle(cycle: CycleLine, now: float) -> Text:
    line = Text.assemble(f"{cycle.number} ", (cycle.state, _STATES.get(cycle.state, "")), f"  {_safe(cycle.trigger)}")
    if cycle.state == "running":
        line.append(_plain(f"  at {cycle.stage}, attempt {cycle.attempt}, last heard of {ago(cycle.heard_at, now)}"))
    elif cycle.change:
        line.append(f"  {cycle.change_on} {interval(cycle.change, signed=True)}, {verdict(cycle.change)}")
    if cycle.closed_at is not None:
        line.append(_plain(f"  took {lasting(cycle.closed_at - cycle.opened_at)}"), style="dim")
    return line


def _requests(seen: Traffic) -> Text:
    totals = (
        [sum(each.by_column[at] for each in seen.by_release) for at in range(len(seen.by_release[0].by_column))]
        if seen.by_release
        else []
    )
    most = max(totals, default=0)
    drawn = (
        "".join(_COLUMNS[-(-number * (len(_COLUMNS) - 1) // most)] if number else " " for number in totals)
        if most
        else ""
    )
    line = Text(f"{seen.requests:,} in the last hour")
    if drawn:
        line.append(f"  {drawn}", style="cyan")
    said = ", ".join(f"{each.requests:,} by {each.release}" for each in seen.by_release)
    line.append(f"  {said}" if said else "", style="dim")
    return line


def _energy(energy: EnergyBooks) -> Text:
    ledger = energy.view().ledger
    total = ledger.total
    estimated = (
        f", {total.estimated_millijoules / total.millijoules:.0%} of it an estimate" if total.millijoules else ""
    )
    money = "" if ledger.footprint.money is None else f", {ledger.footprint.money:.4g} {ledger.currency}"
    return Text(_plain(f"{joules(total.joules)} on the books{estimated}{money}"))


def _happenings(seen: Loop) -> Iterator[Text]:
    for each in seen.happenings:
        yield Text.assemble(
            (f"{_plain(ago(each.at, seen.at)):<12}", "dim"), f"{each.what}  ", (_safe(each.of)[:48], "dim")
        )


def _alerts(seen: Loop) -> Iterator[Text]:
    for each in seen.alerts[:_MOST_ALERTS]:
        yield Text.assemble(
            (each.severity, "bold red" if each.severity == "now" else "yellow"),
            f"  {_safe(each.title)}",
            (f"  {_safe(each.said)[:120]}", "dim"),
        )
    if len(seen.alerts) > _MOST_ALERTS:
        yield Text(f"and {len(seen.alerts) - _MOST_ALERTS} more", style="dim")


def _bar(done: float) -> str:
    full = round(max(0.0, min(1.0, done)) * _BAR)
    return "█" * full + "░" * (_BAR - full)


def _safe(text: str) -> str:
    return _plain(shown(text))


def _plain(text: str) -> str:
    return text.replace("\u00a0", " ")
