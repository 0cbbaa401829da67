"""The loop: what each part of it is doing now, in a few words, from the books alone.

working   something is made there now, or was until the last word of it
ready     it has made something, and waits for the next
waiting   there is nothing for it to do yet
trouble   it can't do what it should
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aifactory.observe.vocabulary import EVENTS
from aifactory.page.alerts import Alert, alerts
from aifactory.page.corpora import CorpusLine, corpora
from aifactory.page.cycles import CycleLine, cycles
from aifactory.page.drift import Drift, drift
from aifactory.page.events import newest
from aifactory.page.runs import Run, runs
from aifactory.page.traffic import Traffic, traffic
from aifactory.records.audit import AuditFault
from aifactory.records.books import Books
from aifactory.records.journal import Event
from aifactory.records.registry import Standing

State = Literal["working", "ready", "waiting", "trouble"]
ORDER = ("sources", "ingest", "tokenize", "train", "evaluate", "promote", "serve", "traffic", "feedback", "improve")
"""The parts as data passes through them; improve gives it back to ingest."""
_VIEWS: Mapping[str, str] = {
    "sources": "corpora",
    "ingest": "corpora",
    "tokenize": "cycles",
    "train": "training",
    "evaluate": "releases",
    "promote": "releases",
    "serve": "traffic",
    "traffic": "traffic",
    "feedback": "feedback",
    "improve": "drift",
}
_UNTOLD = ("metered", "decided")
"""Lines of the journal that come too often, or are told elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of the loop."""

    name: str
    state: State
    now: str
    """What it is doing, in three words or so."""
    figure: str
    """What it has to show."""
    view: str
    """Where there is more of it."""
    done: float | None = None
    """Of what it is doing, from 0 to 1, where that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """A line of the journal, for a person."""

    at: float
    what: str
    of: str
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """The factory at one look."""

    factory: str
    at: float
    headline: str
    parts: Sequence[Part]
    production: str | None
    running: Sequence[CycleLine]
    runs: Sequence[Run]
    traffic: Traffic
    alerts: Sequence[Alert]
    happenings: Sequence[Happening]

    @property
    def wrong(self) -> int:
        """Alerts that need somebody now."""
        return sum(alert.severity == "now" for alert in self.alerts)


def loop(books: Books, *, audit: Sequence[AuditFault] = (), happenings: int = 10) -> Loop:
    """Look at all parts once."""
    every_run = runs(books, limit=1)
    live = [run for run in every_run if run.state != "ended"]
    last_cycles = cycles(books, limit=5)
    running = [cycle for cycle in last_cycles if cycle.state == "running"]
    made = corpora(books, limit=1)
    standing, seen, drifted = books.registry.standing(), traffic(books, "1h"), drift(books, limit=1)
    found = alerts(books, audit=audit, runs=live)
    current = next(iter(running), None)
    at_work = _stages_at_work(running, live)
    counts = books.feedback.counts()
    troubled = {alert.kind for alert in found if alert.severity == "now"}
    parts = [
        _sources(books, made),
        _ingest(at_work, made),
        _tokenize(books, at_work),
        _train(at_work, live, every_run),
        _evaluate(at_work, last_cycles),
        _promote(at_work, last_cycles, standing),
        _serve(standing, seen, "load failed" in troubled),
        _traffic(seen, counts),
        _feedback(books, counts),
        _improve(drifted, running, "tick failed" in troubled),
    ]
    return Loop(
        factory=books.config.name,
        at=books.journal.clock(),
        headline=_headline(current, live, standing, seen),
        parts=parts,
        production=None if standing.production is None else standing.production.name,
        running=running,
        runs=live,
        traffic=seen,
        alerts=found,
        happenings=[_happening(event) for event in newest(books, without=_UNTOLD, limit=happenings)],
    )


def _stages_at_work(running: Sequence[CycleLine], live: Sequence[Run]) -> set[str]:
    """Stages of the cycles that run; while a run's log grows its cycle trains, whatever the journal said last."""
    stages = {cycle.stage for cycle in running if cycle.stage is not None}
    if any(run.state == "running" for run in live):
        stages = (stages - {"ingest", "tokenize"} if len(running) == 1 else stages) | {"train"}
    return stages


def _part(name: str, state: State, now: str, figure: str, done: float | None = None) -> Part:
    return Part(name=name, state=state, now=now, figure=figure, view=_VIEWS[name], done=done)


def _sources(books: Books, made: Sequence[CorpusLine]) -> Part:
    names = [source.name for source in books.config.ingest.sources]
    figure = names[0] if len(names) == 1 else f"{len(names)} sources"
    return _part("sources", "ready" if made else "waiting", "read" if made else "not read yet", figure)


def _ingest(at_work: set[str], made: Sequence[CorpusLine]) -> Part:
    figure = "no corpus yet"
    if made:
        figure = f"{made[0].rows_kept:,} rows, {made[0].rows_rejected:,} out"
    if "ingest" in at_work:
        return _part("ingest", "working", "cleaning rows", figure)
    return _part("ingest", "ready" if made else "waiting", "done" if made else "waiting", figure)


def _tokenize(books: Books, at_work: set[str]) -> Part:
    last = next(iter(newest(books, of=["tokenized"], limit=1)), None)
    figure = "no tokens yet" if last is None else f"{last.detail.get('tokens', 0):,} tokens"
    if "tokenize" in at_work:
        return _part("tokenize", "working", "packing tokens", figure)
    return _part("tokenize", "ready" if last else "waiting", "done" if last else "waiting", figure)


def _train(at_work: set[str], live: Sequence[Run], every: Sequence[Run]) -> Part:
    if live:
        run = live[0]
        now = f"step {run.step:,} of {run.steps:,}"
        figure = "" if run.loss is None else f"loss {run.loss:.2f}"
        if (rate := run.tokens_per_s) is not None:
            figure += f", {rate:,.0f} tok/s" if rate < 10_000 else f", {rate / 1000:,.0f}k tok/s"
        return _part("train", "trouble" if run.state == "silent" else "working", now, figure.strip(", "), run.done)
    last = every[0] if every else None
    figure = "no model yet"
    if last is not None and last.loss is not None:
        figure = f"loss {last.loss:.3f}, {last.steps:,} steps"
    if "train" in at_work:
        return _part("train", "working", "starting workers", figure)
    return _part("train", "ready" if last else "waiting", "done" if last else "waiting", figure)


def _evaluate(at_work: set[str], last_cycles: Sequence[CycleLine]) -> Part:
    scored = next((cycle for cycle in last_cycles if cycle.score is not None), None)
    figure = "no scorecard yet"
    if scored is not None and scored.score is not None:
        figure = f"{scored.score['estimate']:.3f} bits per byte"
    if "evaluate" in at_work:
        return _part("evaluate", "working", "scoring tasks", figure)
    return _part("evaluate", "ready" if scored else "waiting", "done" if scored else "waiting", figure)


def _promote(at_work: set[str], last_cycles: Sequence[CycleLine], standing: Standing) -> Part:
    figure = "no release yet" if standing.production is None else f"{standing.production.name} serves"
    if standing.trial is not None:
        return _part("promote", "working", f"{standing.trial.kind} {standing.trial.share:.0%}", standing.trial.name)
    if "promote" in at_work:
        return _part("promote", "working", "judging", figure)
    ended = next((cycle for cycle in last_cycles if cycle.state != "running"), None)
    if ended is None:
        return _part("promote", "waiting", "waiting", figure)
    return _part(
        "promote", "trouble" if ended.state == "failed" else "ready", f"cycle {ended.number} {ended.state}", figure
    )


def _serve(standing: Standing, seen: Traffic, is_troubled: bool) -> Part:
    if standing.production is None:
        return _part("serve", "waiting", "nothing to serve", "no release yet")
    number = len(seen.replicas)
    figure = f"{standing.production.name}"
    if is_troubled:
        return _part("serve", "trouble", "a release won't load", figure)
    if not number:
        return _part("serve", "waiting", "no replica heard of", figure)
    busy = sum(replica.busy for replica in seen.replicas) / number
    return _part("serve", "ready", f"{number} replica{'s' if number > 1 else ''}, {busy:.0%} busy", figure)


def _traffic(seen: Traffic, counts: Mapping[str, int]) -> Part:
    now = f"{seen.requests:,} in the last hour" if seen.requests else "quiet"
    state: State = "ready" if counts["completions"] else "waiting"
    return _part("traffic", state, now, f"{counts['completions']:,} answers in all")


def _feedback(books: Books, counts: Mapping[str, int]) -> Part:
    needed = books.config.improve.batch_rows
    now = f"{counts['waiting']:,} of {needed:,} for a batch" if counts["waiting"] else "none waits"
    state: State = "ready" if counts["feedback"] else "waiting"
    figure = f"{counts['feedback']:,} in, {counts['batches']:,} batch{'' if counts['batches'] == 1 else 'es'}"
    return _part("feedback", state, now, figure)


def _improve(found: Drift, running: Sequence[CycleLine], is_troubled: bool) -> Part:
    figure = "no answer scored yet"
    seen = found.production
    if seen is not None and seen.live is not None and seen.standard is not None:
        figure = f"live {seen.live:.2f}, taught {seen.standard:.2f}"
    if is_troubled:
        return _part("improve", "trouble", "can't look", figure)
    if any(cycle.trigger.startswith(("drift-", "request-", "schedule-")) for cycle in running):
        return _part("improve", "working", "retraining", figure)
    if not found.decisions:
        return _part("improve", "waiting", "nobody watches yet", figure)
    last = found.decisions[0]
    now = (
        "decided to retrain"
        if last.decision == "retrain"
        else f"waits for {_AWAITED.get(last.awaited or '', last.awaited)}"
    )
    return _part("improve", "ready", now, figure)


_AWAITED = {
    "scores": "scores",
    "release": "a release",
    "cycle": "the cycle",
    "standard": "a standard",
    "cooldown": "a cool-down",
    "budget": "the budget",
}


def _headline(current: CycleLine | None, live: Sequence[Run], standing: Standing, seen: Traffic) -> str:
    """What the factory is doing, in a sentence."""
    if current is not None:
        doing = {
            "ingest": "reads and cleans its data",
            "tokenize": "packs tokens",
            "train": "trains",
            "evaluate": "scores its candidate",
            "promote": "judges its candidate",
        }[("train" if any(run.state == "running" for run in live) else current.stage) or "promote"]
        return f"Cycle {current.number} {doing}."
    if standing.trial is not None:
        trial, beside = standing.trial, standing.production.name if standing.production else "none"
        return f"{trial.name} is on trial beside {beside}: {trial.kind}, {trial.share:.1%} of the {trial.by}s."
    if standing.production is None:
        return "No release yet: run a first cycle."
    if seen.requests:
        return f"{standing.production.name} serves; {seen.requests:,} requests in the last hour."
    return f"{standing.production.name} is in production; nobody has asked in the last hour."


_HAPPENED = {
    "cycle_begun": "a cycle began",
    "cycle_ended": "a cycle ended",
    "cycle_on_trial": "a candidate went on trial",
    "ingested": "rows became a corpus",
    "tokenized": "tokens were packed",
    "trained": "a model was trained",
    "evaluated": "a scorecard was made",
    "chosen": "a candidate was chosen",
    "promoted": "a release took production",
    "rejected": "a candidate was rejected",
    "rolled_back": "an older release serves again",
    "sealed": "a batch of feedback was sealed",
    "swapped": "a replica took up a release",
    "trial_loaded": "a replica loaded a release on trial",
    "load_failed": "a replica could not load a release",
    "tick_failed": "the evaluation actor could not look",
    "unscored": "answers could not be scored",
    "attempt_failed": "an attempt failed",
    "drifted": "users ask something else",
    "guard_broken": "answers broke a guard",
    "judged_bad": "a judge finds answers bad",
    "retrain_requested": "a retrain was asked for",
}


def _happening(event: Event) -> Happening:
    of: Any = event.subject or event.trigger or ""
    what = _HAPPENED.get(event.event) or EVENTS.get(event.event, event.event.replace("_", " "))
    return Happening(at=event.at, what=what, of=str(of), by=event.key_id)
