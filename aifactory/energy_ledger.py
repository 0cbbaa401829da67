"""The energy ledger: every joule on the books, told by stage, by cycle, by release and by key. Each of these adds up to all of them,
to the millijoule, and idle ones have a line of their own.

Stages    what the books have of ingest, tokenize, train and evaluate
Serving   what replicas have entered (`serve/metering.py`): of it, the share of the time in which somebody was being answered goes to
          the answers by their tokens, the rest is idle
Releases  what the cycle has used that made it, and its answers
Estimates are told apart from what counters said. Not on the books: a killed process since it last told; the actor that watches, the
proxy and Ray itself; whatever a machine draws while no replica runs on it.

Counters are of a whole machine: where a stage and a replica were both counted by them at the same time, the replica's share of that
time is taken to be in the stage's and is told as `counted_twice_j`, which is in no sum.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from aifactory.plan.footprint import Footprint, from_energy
from aifactory.plan.tradeoff import short
from aifactory.proof.audit import moment
from aifactory.records.books import Books
from aifactory.records.journal import Event
from aifactory.serve.metering import EVENT as METERED

STAGES = {"ingested": "ingest", "tokenized": "tokenize", "trained": "train", "evaluated": "evaluate"}
IDLE = "idle"
UNTOLD = "answers that were not kept"
"""Embeddings, and what was broken off or refused."""
_PER_JOULE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a table."""

    name: str
    millijoules: int
    estimated_millijoules: int
    """Of them, by no counter."""
    requests: int = 0
    answer_tokens: int = 0

    @property
    def joules(self) -> float:
        return self.millijoules / _PER_JOULE


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyLedger:
    """What a factory has used, in a time."""

    factory: str
    since: float | None
    until: float | None
    total: Line
    by_stage: Sequence[Line]
    by_cycle: Sequence[Line]
    by_release: Sequence[Line]
    by_key: Sequence[Line]
    counted_twice_j: float
    footprint: Footprint
    currency: str
    joules_per_answer_token: float | None
    """Of serving, idle time included; None where nothing was answered."""

    def to_json(self) -> dict[str, Any]:
        def told(lines: Sequence[Line]) -> list[dict[str, Any]]:
            return [asdict(line) | {"joules": line.joules} for line in lines]

        return {
            "factory": self.factory,
            "since": self.since,
            "until": self.until,
            "total": told([self.total])[0],
            **{name: told(getattr(self, name)) for name in ("by_stage", "by_cycle", "by_release", "by_key")},
            "counted_twice_j": self.counted_twice_j,
            "joules_per_answer_token": self.joules_per_answer_token,
            "footprint": asdict(self.footprint),
            "currency": self.currency,
        }

    def lines(self) -> Iterator[str]:
        total = self.total
        estimated = f"{total.estimated_millijoules / total.millijoules:.0%}" if total.millijoules else "none"
        yield f"{self.factory}: {total.joules:,.3f} J on the books, of which {estimated} are an estimate"
        for title, found in (
            ("stage", self.by_stage),
            ("cycle", self.by_cycle),
            ("release", self.by_release),
            ("key", self.by_key),
        ):
            yield ""
            yield f"  {'by ' + title:<40}{'J':>16}{'share':>8}{'estimated':>11}{'requests':>10}{'answer tokens':>15}"
            for line in found:
                share = line.millijoules / total.millijoules if total.millijoules else 0.0
                part = line.estimated_millijoules / line.millijoules if line.millijoules else 0.0
                counts = f"{line.requests:>10,}{line.answer_tokens:>15,}" if line.requests else ""
                yield f"  {line.name:<40}{line.joules:>16,.3f}{share:>8.1%}{part:>11.0%}{counts}"
        used = self.footprint
        yield ""
        money = "" if used.money is None else f", {used.money:.4g} {self.currency}"
        yield (
            f"  {used.machine_kwh:.4g} kWh of the machines, {used.kwh:.4g} of the building, {short(used.litres)} litres, "
            f"{short(1000 * used.tonnes_co2)} kg of CO2{money} (runtime.site)"
        )
        if self.joules_per_answer_token is not None:
            yield f"  a token of an answer takes {self.joules_per_answer_token:.4g} J, idle time included"
        if self.counted_twice_j:
            yield f"  {self.counted_twice_j:,.0f} J of replicas were counted with stages that ran beside them, and are in no sum"


def read_energy(books: Books, *, since: str | None = None, until: str | None = None) -> EnergyLedger:
    """The ledger of what was entered from `since` on and before `until`; times in ISO 8601.

    Raises   ConfigError where one of them is no time.
    """
    first, last = (None if text is None else moment(text) for text in (since, until))

    def is_asked(event: Event) -> bool:
        return (first is None or event.at >= first) and (last is None or event.at < last)

    stages = [event for name in STAGES for event in books.journal.events(event=name) if is_asked(event)]
    metered = [event for event in books.journal.events(event=METERED) if is_asked(event)]
    names = {cycle.trigger: f"cycle {cycle.number} ({cycle.trigger})" for cycle in books.journal.cycles()}
    makers = {release.trigger: release.name for release in books.registry.releases()}
    releases = {release.number: release.name for release in books.registry.releases()}
    return _ledger(books, stages, metered, names, makers, releases, first, last)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts by their weights; the parts add up to it (largest remainders; Hamilton's method).

    Weights are at least 0; where all are 0 nothing is given away.
    """
    whole = sum(map(Fraction, weights))
    if not whole:
        return [0] * len(weights)
    exact = [total * Fraction(weight) / whole for weight in weights]
    parts = [int(each) for each in exact]
    by_remainder = sorted(range(len(parts)), key=lambda at: (parts[at] - exact[at], at))
    for at in by_remainder[: total - sum(parts)]:
        parts[at] += 1
    return parts


class _Sums:
    """Millijoules by name, in the order of their first."""

    def __init__(self) -> None:
        self._found: dict[str, list[int]] = {}

    def add(self, name: str, millijoules: int, *, is_estimate: bool, requests: int = 0, answer_tokens: int = 0) -> None:
        line = self._found.setdefault(name, [0, 0, 0, 0])
        line[0] += millijoules
        line[1] += millijoules if is_estimate else 0
        line[2] += requests
        line[3] += answer_tokens

    def lines(self, *, last: Sequence[str] = ()) -> list[Line]:
        """The names in `last` come at the end."""
        order = [name for name in self._found if name not in last] + [name for name in last if name in self._found]
        return [
            Line(
                name=name,
                millijoules=self._found[name][0],
                estimated_millijoules=self._found[name][1],
                requests=self._found[name][2],
                answer_tokens=self._found[name][3],
            )
            for name in order
        ]


def _ledger(
    books: Books,
    stages: Sequence[Event],
    metered: Sequence[Event],
    cycles: Mapping[str, str],
    makers: Mapping[str, str],
    releases: Mapping[int, str],
    first: float | None,
    last: float | None,
) -> EnergyLedger:
    site = books.config.runtime.site
    total, by_stage, by_cycle, by_release, by_key = (_Sums() for _ in range(5))
    for event in stages:
        millijoules, is_estimate = _of(event)
        trigger = event.trigger or ""
        for sums, name in (
            (total, "all"),
            (by_stage, STAGES[event.event]),
            (by_cycle, cycles.get(trigger, "no cycle")),
            (by_release, makers.get(trigger, "cycles that made no release")),
            (by_key, "stages"),
        ):
            sums.add(name, millijoules, is_estimate=is_estimate)
    overlap = _overlaps(stages)
    served = twice = tokens = 0
    for event in metered:
        millijoules, is_estimate = _of(event)
        counted = millijoules - round(millijoules * overlap(event))
        twice += millijoules - counted
        served += counted
        busy_share = min(1.0, float(event.detail["busy_s"]) / event.seconds) if event.seconds else 0.0
        busy = round(counted * busy_share)
        answers: Sequence[Mapping[str, Any]] = event.detail["answers"]
        weights = [each["answer_tokens"] + site.prompt_token_share * each["prompt_tokens"] for each in answers]
        parts = apportion(busy, weights)
        for sums, name in ((total, "all"), (by_stage, "serve"), (by_cycle, "serve")):
            sums.add(name, busy, is_estimate=is_estimate)
        for each, part in zip(answers, parts, strict=True):
            counts = {"requests": each["requests"], "answer_tokens": each["answer_tokens"]}
            tokens += each["answer_tokens"]
            name = releases.get(each["release"], f"release {each['release']}")
            by_release.add(name, part, is_estimate=is_estimate, **counts)
            by_key.add(each["key"], part, is_estimate=is_estimate, **counts)
        untold = busy - sum(parts)
        if untold:
            by_release.add(UNTOLD, untold, is_estimate=is_estimate)
            by_key.add(UNTOLD, untold, is_estimate=is_estimate)
        total.add("all", counted - busy, is_estimate=is_estimate)
        for sums in (by_stage, by_cycle, by_release, by_key):
            sums.add(IDLE, counted - busy, is_estimate=is_estimate)
    whole = (total.lines() or [Line(name="all", millijoules=0, estimated_millijoules=0)])[0]
    at_the_end = ("cycles that made no release", "stages", "serve", UNTOLD, IDLE)
    return EnergyLedger(
        factory=books.config.name,
        since=first,
        until=last,
        total=whole,
        by_stage=by_stage.lines(last=at_the_end),
        by_cycle=by_cycle.lines(last=at_the_end),
        by_release=by_release.lines(last=at_the_end),
        by_key=by_key.lines(last=at_the_end),
        counted_twice_j=twice / _PER_JOULE,
        footprint=from_energy(whole.joules / 3.6e6, site),
        currency=site.currency,
        joules_per_answer_token=served / _PER_JOULE / tokens if tokens else None,
    )


def _of(event: Event) -> tuple[int, bool]:
    """Millijoules, and whether they are an estimate."""
    return round((event.joules or 0.0) * _PER_JOULE), (event.joules_source or "estimate") == "estimate"


def _overlaps(stages: Sequence[Event]) -> Callable[[Event], float]:
    """The share of the time of a replica's event in which stages were counted by counters, as it was itself."""
    spans = sorted(
        (event.at - (event.seconds or 0.0), event.at)
        for event in stages
        if event.joules_source not in (None, "estimate") and event.seconds
    )
    merged: list[list[float]] = []
    for begun, ended in spans:
        if merged and begun <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], ended)
        else:
            merged.append([begun, ended])
    begins = [begun for begun, _ in merged]
    before = [0.0]
    for at, (begun, ended) in enumerate(merged):
        before.append(before[at] + ended - begun)

    def until(moment_: float) -> float:
        at = bisect_right(begins, moment_)
        return before[at] - (max(0.0, merged[at - 1][1] - moment_) if at else 0.0)

    def share(event: Event) -> float:
        if event.joules_source in (None, "estimate") or not merged:
            return 0.0
        begun, ended = float(event.detail["begun"]), float(event.detail["ended"])
        return min(1.0, (until(ended) - until(begun)) / (ended - begun)) if ended > begun else 0.0

    return share
