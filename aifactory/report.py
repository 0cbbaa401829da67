"""Reports: what there is and what happened, from the books alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aifactory.bottleneck import of_stages
from aifactory.errors import StateError
from aifactory.records.books import Books
from aifactory.records.journal import Cycle
from aifactory.records.lineage import LineageNode

_STAGES = ("ingested", "tokenized", "trained", "evaluated")


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleReport:
    """One cycle: what it made, what it found, what was decided and why."""

    number: int
    trigger: str
    state: str
    rows_kept: int
    rows_rejected: int
    rejected_by_rule: Mapping[str, int]
    tokens: int
    tokens_per_s: float | None
    seconds: float
    joules: float
    joules_source: str
    scores: Mapping[str, Any]
    """By set of tasks: bits per byte of the candidate, the release before and the baselines, with intervals."""
    candidates: Sequence[Mapping[str, Any]]
    """Of several: what each has different, its model, its scorecard, its holdout, and whether it was chosen."""
    reasons: Sequence[str]
    artifacts: Sequence[str]
    pages: Sequence[str]
    """Where the page of each corpus lies, for a person to open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialReport:
    """The release on trial beside production, and what came of it by now."""

    release: str
    kind: str
    share: float
    by: str
    since: float
    """When its share, or its kind, last changed; seconds since 1970, UTC."""
    loaded_by: Sequence[str]
    """The replicas that have it."""
    refused: Sequence[str]
    """Why replicas did not load it."""
    outcomes: Mapping[str, Mapping[str, int]]
    """By release, the one in production too: requests since the trial began that were answered, and that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A factory at a glance."""

    factory: str
    storage: str
    production: str | None
    trial: TrialReport | None
    quarantined: Mapping[str, Mapping[str, Any]]
    """Releases that are neither tried nor served again, with the reasons."""
    releases: Sequence[str]
    cycles: Sequence[CycleReport]
    feedback: Mapping[str, int]
    decisions: Sequence[Mapping[str, Any]]
    drifts: Sequence[Mapping[str, Any]]
    """Where users began to ask something else of a release."""
    guards_broken: Sequence[Mapping[str, Any]]
    """Where answers held what they may not, more often than is tolerated."""
    judged_bad: Sequence[Mapping[str, Any]]
    """Where a judge found more answers bad than is tolerated."""
    requests: Sequence[Mapping[str, Any]]
    """For a retrain, that no cycle has taken up."""
    rehearsals: Sequence[Mapping[str, Any]]
    bottlenecks: Sequence[Mapping[str, Any]]
    """What each stage waited for when it last ran, and the option that would help."""
    joules: float
    joules_source: str

    @classmethod
    def of(cls, books: Books) -> Report:
        """Read the books."""
        production = books.registry.production()
        cycles = [_cycle_report(books, cycle) for cycle in books.journal.cycles()]
        sources = {source for cycle in cycles if cycle.joules for source in cycle.joules_source.split("+")}
        return cls(
            factory=books.config.name,
            storage=books.storage.root,
            production=None if production is None else production.name,
            trial=_trial_report(books),
            quarantined={f"{books.config.name}-r{n}": why for n, why in books.registry.quarantined().items()},
            releases=[release.name for release in books.registry.releases()],
            cycles=cycles,
            feedback=books.feedback.counts(),
            decisions=[event.detail for event in books.journal.events(event="decided")],
            drifts=[{"release": e.subject, **e.detail} for e in books.journal.events(event="drifted")],
            guards_broken=[{"release": e.subject, **e.detail} for e in books.journal.events(event="guard_broken")],
            judged_bad=[{"release": e.subject, **e.detail} for e in books.journal.events(event="judged_bad")],
            requests=[asdict(request) for request in books.retrain_requests.open()],
            rehearsals=[event.detail for event in books.journal.events(event="rehearsed")],
            bottlenecks=[each.to_json() for each in of_stages(books.journal.events())],
            joules=sum(cycle.joules for cycle in cycles),
            joules_source="+".join(sorted(sources)) or "estimate",
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [f"Factory {self.factory}: {self.production or 'no release yet'} in production. Books: {self.storage}"]
        if self.trial is not None:
            lines += _trial_lines(self.trial)
        for name, why in self.quarantined.items():
            lines.append(f"{name} is in quarantine: " + "; ".join(why.get("reasons", [why.get("reason", "")])))
        for cycle in self.cycles:
            lines += _cycle_lines(cycle)
        for rehearsal in self.rehearsals:
            answered = ", ".join(f"{number} by {name}" for name, number in rehearsal["answered_by"].items())
            first = f" (the first: {rehearsal['failures'][0]})" if rehearsal["failures"] else ""
            lines.append(
                f"Traffic: {rehearsal['requests']} requests, {rehearsal['failed']} failed{first}; "
                f"answered {answered or 'none'}; {rehearsal['corrections']} corrections."
            )
        for drift in self.drifts:
            lines.append(f"What users ask of {drift['release']} has changed: {drift['said']}")
        for judged in self.judged_bad:
            lines.append(f"Answers of {judged['release']}: {judged['said']}")
        for request in self.requests:
            lines.append(f"The request {request['id']} for a retrain is open: {request['reason']}")
        for broken in self.guards_broken:
            lines.append(f"Answers of {broken['release']}: {broken['said']}")
        for decision in self.decisions:
            lines.append(f"The evaluation actor decided to {decision['decision']}: " + "; ".join(decision["reasons"]))
        for each in self.bottlenecks:
            lines.append(
                f"Bottleneck of {each['stage']}: {each['of']} ({each['share']:.0%}): {each['reasons'][0]}. {each['options'][0]}"
            )
        lines.append(
            f"Feedback: {self.feedback['feedback']} on {self.feedback['completions']} answers, "
            f"{self.feedback['batches']} batches sealed. Energy of the stages: {self.joules:,.0f} J ({self.joules_source})."
        )
        return lines


def lineage_of(books: Books, subject: str) -> LineageNode:
    """The lineage of an artifact, a release or an answer, by its id or name.

    Raises   StateError if nothing has that id.
    """
    if subject.startswith(("cmpl-", "chatcmpl-")):
        completion = books.feedback.completion(subject)
        if completion is not None:
            parents = [lineage_of(books, f"{books.config.name}-r{completion.release}")]
            adapter = json.loads(completion.request).get("adapter")
            if adapter is not None:
                made = books.lineage.tree(adapter["origin"]) if adapter["origin"] else None
                name = f"{adapter['name']} {adapter['digest'][:16]}"
                parents.append(_node(name, "adapter", *([] if made is None else [made])))
            return _node(subject, "completion", *parents)
        if (erasure := books.erasures.of_completion(subject)) is not None:
            return _node(f"{subject} (erased by {erasure})", "completion")
    for release in books.registry.releases():
        if release.name == subject:
            parents = [tree for tree in map(books.lineage.tree, (release.model, release.scorecard)) if tree is not None]
            return _node(subject, "release", *parents)
    tree = books.lineage.tree(subject)
    if tree is None:
        raise StateError(
            f"expected the id of an answer, a release or an artifact of the factory {books.config.name}, found {subject!r}; "
            "`aifactory status` names them."
        )
    return tree


def _node(subject: str, kind: str, *parents: LineageNode) -> LineageNode:
    return LineageNode(id=subject, kind=kind, digest=None, uri=None, parents=parents)


def _trial_report(books: Books) -> TrialReport | None:
    trial = books.registry.trial()
    if trial is None:
        return None

    def events(event: str) -> list[Mapping[str, Any]]:
        return [e.detail for e in books.journal.events(event=event) if e.detail.get("trial") == trial.begun]

    found: dict[str, dict[str, int]] = {}
    for outcome in books.registry.trial_log.outcomes(since=trial.begun):
        counts = found.setdefault(f"{trial.factory}-r{outcome.release}", {"answered": 0, "failed": 0})
        counts["failed" if outcome.failed else "answered"] += 1
    return TrialReport(
        release=trial.name,
        kind=trial.kind,
        share=trial.share,
        by=trial.by,
        since=trial.at,
        loaded_by=[detail["replica"] for detail in events("trial_loaded")],
        refused=[detail["reason"] for detail in events("load_failed")],
        outcomes=found,
    )


def _trial_lines(trial: TrialReport) -> list[str]:
    of_what = "requests" if trial.by == "request" else "keys"
    how = "answers them a second time, unseen" if trial.kind == "shadow" else "answers them"
    lines = [f"On trial: {trial.release}, {trial.kind}, {trial.share:.1%} of the {of_what}: it {how}"]
    lines += [f"  not loaded  {reason}" for reason in trial.refused]
    for name, counts in sorted(trial.outcomes.items()):
        lines.append(f"  {name:<11} {counts['answered']} answered, {counts['failed']} failed since it began")
    return lines


def _cycle_report(books: Books, cycle: Cycle) -> CycleReport:
    # The journal has the figures of what was made, so a report needs no artifact that may be gone; each counts once.
    events = {e.subject: e for e in books.journal.events(cycle=cycle.trigger) if e.event in _STAGES and e.subject}
    made = list(events.values())
    corpora = [event.detail for event in made if event.event == "ingested"]
    chosen = next(iter(books.journal.events(event="chosen", cycle=cycle.trigger)), None)
    trained, evaluated = ([event for event in made if event.event == name] for name in ("trained", "evaluated"))
    candidates: list[dict[str, Any]] = []
    if chosen is not None:
        # What was chosen may have been made in an earlier cycle.
        trained = [e for e in books.journal.events(event="trained") if e.subject == chosen.subject]
        evaluated = [e for e in books.journal.events(event="evaluated") if e.subject == chosen.detail["scorecard"]]
        candidates = [{**each, "chosen": each["model"] == chosen.subject} for each in chosen.detail["candidates"]]
    rules: dict[str, int] = {}
    for corpus in corpora:
        for rule, number in corpus["rejected_by_rule"].items():
            rules[rule] = rules.get(rule, 0) + number
    return CycleReport(
        number=cycle.number,
        trigger=cycle.trigger,
        state=cycle.state,
        rows_kept=sum(corpus["rows_kept"] for corpus in corpora),
        rows_rejected=sum(corpus["rows_rejected"] for corpus in corpora),
        rejected_by_rule=rules,
        tokens=sum(event.detail["tokens"] for event in made if event.event == "tokenized"),
        tokens_per_s=trained[-1].detail["tokens_per_s"] if trained else None,
        seconds=sum(event.seconds or 0.0 for event in made),
        joules=sum(event.joules or 0.0 for event in made),
        joules_source="+".join(sorted({event.joules_source or "estimate" for event in made})) or "estimate",
        scores=dict(evaluated[-1].detail) if evaluated else {},
        candidates=candidates,
        reasons=[] if cycle.decision is None else list(cycle.decision["reasons"]),
        artifacts=list(events),
        pages=[books.storage.path(name, "report.html") for name, event in events.items() if event.event == "ingested"],
    )


def _cycle_lines(cycle: CycleReport) -> list[str]:
    rules = ", ".join(f"{number} {rule}" for rule, number in sorted(cycle.rejected_by_rule.items()))
    rate = "" if cycle.tokens_per_s is None else f", trained at {cycle.tokens_per_s:,.0f} tokens/s"
    lines = [f"Cycle {cycle.number} ({cycle.trigger}): {cycle.state}"]
    if not cycle.artifacts:
        lines.append("  nothing made")
    if cycle.rows_kept or cycle.rows_rejected:
        rows = f"{cycle.rows_kept:,} kept, {cycle.rows_rejected:,} rejected" + (f" ({rules})" if rules else "")
        lines.append(f"  rows        {rows}")
    lines += [f"  page        {page}" for page in cycle.pages]
    if cycle.tokens or rate:
        lines.append(f"  tokens      {cycle.tokens:,}{rate}")
    if cycle.artifacts:
        cost = f"{cycle.seconds:.0f} s in the stages, {cycle.joules:,.0f} J ({cycle.joules_source})"
        lines.append(f"  cost        {cost}")
    for each in cycle.candidates:
        differs = ", ".join(f"{name}: {value}" for name, value in each["differs"].items()) or "as train says"
        mark = " (chosen)" if each["chosen"] else ""
        lines.append(f"  candidate   {differs}: {_interval(each['holdout'])} bits per byte, {each['model']}{mark}")
    for name in ("holdout", "target", "known"):
        comparison = cycle.scores.get(name)
        if comparison:
            lines.append(f"  {name:<11} {_comparison(comparison)}, {_MEANING[name]}")
    if cycle.scores:
        lines.append(
            f"  baselines   on the holdout: unigram {cycle.scores['unigram_bits_per_byte']:.3f}, gzip "
            f"{cycle.scores['gzip_bits_per_byte']:.3f} bits per byte"
        )
    return lines + [f"  {reason}" for reason in cycle.reasons]


_MEANING = {
    "holdout": "rows of the sources that never trained",
    "target": "corrections that never trained",
    "known": "rows that it was taught: the standard for its live answers",
}


def _comparison(comparison: Mapping[str, Any]) -> str:
    parts = [f"{_interval(comparison['candidate'])} bits per byte"]
    if comparison["champion"]:
        parts.append(f"before {_interval(comparison['champion'])}, change {_interval(comparison['over_champion'])}")
    return ", ".join(parts) + f", {comparison['candidate']['num_examples']} tasks"


def _interval(values: Mapping[str, float]) -> str:
    return f"{values['estimate']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"
