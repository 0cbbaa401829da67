"""The story of a cycle, from the journal: what came in, what was rejected, trained, found and decided, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from aifactory.bottleneck import Bottleneck, of_stages
from aifactory.errors import ConfigError, StorageError
from aifactory.records.artifacts import Corpus
from aifactory.records.books import Books
from aifactory.records.journal import ERASED, Cycle, Event
from aifactory.records.lineage import LineageNode

_STAGES = ("ingested", "tokenized", "trained", "evaluated")
SETS = {
    "holdout": "rows of the sources that never trained",
    "target": "corrections that never trained",
    "known": "rows that it was taught: the standard for its live answers",
}
Verdict = Literal["better", "worse", "no difference found", "nothing to compare with"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusStory:
    """Rows that the cycle worked with."""

    id: str
    is_new: bool
    """Made in this cycle; else taken over from an earlier one."""
    batch: str | None
    """The feedback batch that it was made of, if it was."""
    rows_in: int
    rows_kept: int
    rows_holdout: int
    rows_rejected: int
    sources: Mapping[str, Mapping[str, int]]
    """By source: kept, rejected."""
    rejected_by_rule: Mapping[str, int]
    steps: Sequence[str]
    """Names of the steps that looked at the rows."""
    page: str
    """Where its page lies, for a person to open."""
    attacks: Sequence[str] = ()
    """What of the feedback was not believed, and why, in words."""
    erased_by: str | None = None
    """The erasure by which rows of it are gone, and the page with them; what is left is `left`."""
    erased_rows: int = 0
    left: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStory:
    """A model that was trained, or taken from an earlier cycle which had trained the same."""

    model: str
    parent: str | None
    """The model of the factory from which it began; None: another base, or from scratch."""
    is_chosen: bool
    differs: Mapping[str, Any]
    """What this candidate has different from the recipe; empty where there is one."""
    parameters: int
    steps: int
    tokens: int
    tokens_per_s: float
    final_loss: float
    """Nats per token, mean of the last tenth of the steps."""
    precision: str
    curve: Sequence[tuple[int, float]]
    """Steps done, and the loss there."""
    mixture: Sequence[Mapping[str, Any]]
    """Of each token set: sources, share of a batch, times read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreStory:
    """Bits per byte on a set of tasks; lower is better."""

    set: str
    candidate: Mapping[str, Any]
    """Estimate, low, high, confidence, num_examples, num_clusters."""
    champion: Mapping[str, Any] | None
    change: Mapping[str, Any] | None
    """Candidate minus the release before, pair by pair."""
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class CostStory:
    """What the making of one artifact took."""

    stage: str
    artifact: str
    seconds: float
    joules: float
    joules_source: str
    """rapl, nvml (measured) or estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleStory:
    """One cycle, told from its beginning to its end."""

    factory: str
    number: int
    trigger: str
    kind: str
    state: str
    opened_at: float
    """Seconds since 1970, UTC."""
    closed_at: float | None
    why_begun: Sequence[str]
    attempts: int
    failed_attempts: Sequence[str]
    corpora: Sequence[CorpusStory]
    batches: Sequence[str]
    """Feedback batches that it was bound to."""
    trainings: Sequence[TrainingStory]
    scores: Sequence[ScoreStory]
    release: str | None
    """The release that came of it."""
    champion: str | None
    """The release with which its candidate was compared."""
    reasons: Sequence[str]
    costs: Sequence[CostStory]
    bottlenecks: Sequence[Bottleneck] = ()
    """What each stage of it waited for, and the option that would help."""

    @property
    def seconds(self) -> float:
        """Of the stages, one after another."""
        return sum(cost.seconds for cost in self.costs)

    @property
    def joules(self) -> float:
        return sum(cost.joules for cost in self.costs)

    @property
    def joules_source(self) -> str:
        return "+".join(sorted({cost.joules_source for cost in self.costs})) or "estimate"

    @property
    def rejected_by_rule(self) -> dict[str, int]:
        """Over the corpora that were made in this cycle, most first."""
        rules: dict[str, int] = {}
        for corpus in self.corpora:
            if corpus.is_new:
                for rule, number in corpus.rejected_by_rule.items():
                    rules[rule] = rules.get(rule, 0) + number
        return dict(sorted(rules.items(), key=lambda item: (-item[1], item[0])))

    def to_json(self) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in ("seconds", "joules", "joules_source", "rejected_by_rule")}
        return asdict(self) | told

    def lines(self) -> list[str]:
        """The story as text."""
        lines = [f"Cycle {self.number} of {self.factory} ({self.trigger}): {self.state}"]
        lines += [f"  begun       {reason}" for reason in self.why_begun]
        lines += [f"  failed      {error}" for error in self.failed_attempts]
        for corpus in self.corpora:
            of = f"feedback {corpus.batch}" if corpus.batch is not None else ", ".join(corpus.sources)
            came = "came in" if corpus.is_new else "taken over"
            lines.append(
                f"  {came:<11} {of}: {corpus.rows_in:,} rows, {corpus.rows_kept:,} kept ({corpus.rows_holdout:,} held out), "
                f"{corpus.rows_rejected:,} rejected ({corpus.id})"
                + (
                    f"; {corpus.erased_rows:,} of them erased by {corpus.erased_by}, what is left is {corpus.left or 'nothing'}"
                    if corpus.erased_by is not None
                    else ""
                )
            )
        lines += [f"  distrusted  {attack}" for corpus in self.corpora if corpus.is_new for attack in corpus.attacks]
        lines += [f"  rejected    {number:,} {rule}" for rule, number in self.rejected_by_rule.items()]
        for each in self.trainings:
            differs = ", ".join(f"{name}: {value}" for name, value in each.differs.items())
            lines.append(
                f"  trained     {each.model}{f' ({differs})' if differs else ''} from {each.parent or 'its base'}: "
                f"{each.steps:,} steps, {each.tokens:,} tokens at {each.tokens_per_s:,.0f} tokens/s, loss {each.final_loss:.3f}"
                + (" (chosen)" if each.is_chosen and len(self.trainings) > 1 else "")
            )
        for score in self.scores:
            before = "" if score.champion is None else f", before {interval(score.champion)}"
            change = "" if score.change is None else f", change {interval(score.change, signed=True)}"
            lines.append(
                f"  {score.set:<11} {score.verdict}: {interval(score.candidate)} bits per byte{before}{change}, "
                f"{score.candidate['num_examples']} tasks, {SETS[score.set]}"
            )
        decided = f"{self.state}" + (f" as {self.release}" if self.release is not None else "")
        lines.append(f"  decided     {decided}")
        lines += [f"              {reason}" for reason in self.reasons]
        for cost in self.costs:
            lines.append(
                f"  cost        {cost.stage} {cost.artifact}: {cost.seconds:,.1f} s, {cost.joules:,.0f} J ({cost.joules_source})"
            )
        lines += [f"  bottleneck  {each.line}" for each in self.bottlenecks]
        return [
            *lines,
            f"  in all      {self.seconds:,.1f} s in the stages, {self.joules:,.0f} J ({self.joules_source})",
        ]


def explain_cycle(books: Books, name: str, *, html: str | None = None) -> CycleStory:
    """The story of the cycle with this number or trigger, or which made the release of this name.

    html   a file for the same as a page with pictures
    Raises   ConfigError if there is none; StorageError if the page can't be written.
    """
    story = _story(books, _cycle_named(books, name))
    if html is not None:
        from aifactory.proof.cycle_page import cycle_page

        try:
            Path(html).expanduser().write_bytes(cycle_page(story))
        except OSError as error:
            raise StorageError(f"expected to write the page of the cycle to {html}, found: {error}.") from error
    return story


def interval(values: Mapping[str, Any], *, signed: bool = False) -> str:
    """1.234 [1.200, 1.270]."""
    sign = "+" if signed else ""
    return f"{values['estimate']:{sign}.3f} [{values['low']:{sign}.3f}, {values['high']:{sign}.3f}]"


def _cycle_named(books: Books, name: str) -> Cycle:
    cycles = books.journal.cycles()
    trigger = next((release.trigger for release in books.registry.releases() if release.name == name), name)
    for cycle in cycles:
        if trigger in (cycle.trigger, str(cycle.number)):
            return cycle
    known = ", ".join(f"{cycle.number} ({cycle.trigger})" for cycle in cycles)
    raise ConfigError(
        f"expected a cycle of the factory {books.config.name}, by its number, its trigger or its release, found {name!r}; "
        f"there are: {known or 'none yet'}."
    )


def _story(books: Books, cycle: Cycle) -> CycleStory:
    events = books.journal.events()
    of_cycle = [event for event in events if event.trigger == cycle.trigger]
    made = list({e.subject: e for e in of_cycle if e.event in _STAGES and e.subject}.values())
    release = next((each for each in books.registry.releases() if each.trigger == cycle.trigger), None)
    chosen = next((event for event in of_cycle if event.event == "chosen"), None)
    trained = [event.subject for event in made if event.event == "trained" and event.subject]
    model = release.model if release is not None else None
    compared: Sequence[Mapping[str, Any]] = ()
    if chosen is not None:
        model, compared = chosen.subject, chosen.detail["candidates"]
    model = model or (trained[-1] if trained else None)
    models = [each["model"] for each in compared] or list(dict.fromkeys([*trained, *([model] if model else [])]))
    return CycleStory(
        factory=books.config.name,
        number=cycle.number,
        trigger=cycle.trigger,
        kind=cycle.bound.kind,
        state=cycle.state,
        opened_at=cycle.opened_at,
        closed_at=cycle.closed_at,
        why_begun=_why_begun(cycle, events),
        attempts=cycle.attempt,
        failed_attempts=[e.detail["error"] for e in of_cycle if e.event == "attempt_failed"],
        corpora=_corpora(books, events, made, models),
        batches=list(cycle.bound.batches),
        trainings=_trainings(books, events, models, compared, model),
        scores=_scores(_scorecard(events, of_cycle, release.scorecard if release is not None else None)),
        release=None if release is None else release.name,
        champion=None if cycle.bound.champion is None else f"{books.config.name}-r{cycle.bound.champion}",
        reasons=[] if cycle.decision is None else list(cycle.decision["reasons"]),
        costs=[
            CostStory(
                stage=event.event,
                artifact=str(event.subject),
                seconds=event.seconds or 0.0,
                joules=event.joules or 0.0,
                joules_source=event.joules_source or "estimate",
            )
            for event in made
        ],
        bottlenecks=of_stages(made),
    )


def _why_begun(cycle: Cycle, events: Sequence[Event]) -> list[str]:
    if cycle.bound.kind == "forget":
        return ["the release in production had learnt from rows that were erased"]
    if not cycle.bound.is_retrain:
        return ["a command asked for a release of these sources by this recipe"]
    begun = next((e.seq for e in events if e.event == "cycle_begun" and e.trigger == cycle.trigger), None)
    decided = [e for e in events if e.event == "decided" and (begun is None or e.seq < begun)]
    last = next((e for e in reversed(decided) if e.detail["decision"] == "retrain"), None)
    # The actor begins a cycle and only then says what it decided.
    first_after = next((e for e in events if e.event == "decided" and begun is not None and e.seq > begun), None)
    if first_after is not None and first_after.detail["decision"] == "retrain":
        last = first_after
    return ["a retrain was asked for"] if last is None else list(last.detail["reasons"])


def _corpora(books: Books, events: Sequence[Event], made: Sequence[Event], models: Iterable[str]) -> list[CorpusStory]:
    """Those that the cycle made, and those of its models that were there before, oldest first."""
    ingested = {e.subject: e for e in events if e.event == "ingested" and e.subject}
    erased = {e.subject: e.detail for e in events if e.event == ERASED and "successor" in e.detail}
    new = {event.subject for event in made if event.event == "ingested"}
    trees = [tree for tree in map(books.lineage.tree, models) if tree is not None]
    used = {corpus for tree in trees for corpus in _corpora_of(tree)} | new
    stories = []
    for corpus, event in ingested.items():
        if corpus not in used:
            continue
        figures, tree = event.detail, books.lineage.tree(corpus)
        parents = [] if tree is None else [parent.id for parent in tree.parents]
        stories.append(
            CorpusStory(
                id=corpus,
                is_new=corpus in new,
                batch=next((each for each in parents if each.startswith("batch/")), None),
                rows_in=figures["rows_in"],
                rows_kept=figures["rows_kept"],
                rows_holdout=figures.get("rows_holdout", 0),
                rows_rejected=figures["rows_rejected"],
                sources=figures.get("sources", {}),
                rejected_by_rule=figures["rejected_by_rule"],
                steps=[step["step"] for step in figures.get("steps", ())],
                page=books.storage.path(*corpus.split("/"), "report.html"),
                attacks=figures.get("trust", {}).get("attacks", ()),
                erased_by=erased[corpus]["erasure"] if corpus in erased else None,
                erased_rows=sum(erased[corpus]["rows"].values()) if corpus in erased else 0,
                left=erased[corpus]["successor"] if corpus in erased else None,
            )
        )
    return stories


def _corpora_of(model: LineageNode) -> Iterable[str]:
    """What a model's own token sets were made of."""
    for tokens in model.parents:
        if tokens.kind == "tokens":
            yield from (corpus.id for corpus in tokens.parents if corpus.kind == Corpus.kind)


def _trainings(
    books: Books,
    events: Sequence[Event],
    models: Sequence[str],
    compared: Sequence[Mapping[str, Any]],
    chosen: str | None,
) -> list[TrainingStory]:
    trained = {e.subject: e.detail for e in events if e.event == "trained"}
    differs = {each["model"]: each["differs"] for each in compared}
    stories = []
    for model in models:
        figures, tree = trained.get(model), books.lineage.tree(model)
        if figures is None:
            continue
        parents = [] if tree is None else [parent.id for parent in tree.parents if parent.kind == "model"]
        stories.append(
            TrainingStory(
                model=model,
                parent=parents[0] if parents else None,
                is_chosen=model == chosen,
                differs=differs.get(model, {}),
                parameters=figures.get("parameters", 0),
                steps=figures.get("steps", 0),
                tokens=figures.get("tokens", 0),
                tokens_per_s=figures.get("tokens_per_s") or 0.0,
                final_loss=figures.get("final_loss") or 0.0,
                precision=figures.get("precision", ""),
                curve=[(step, loss) for step, loss in figures.get("curve") or () if loss is not None],
                mixture=figures.get("mixture", ()),
            )
        )
    return stories


def _scorecard(events: Sequence[Event], of_cycle: Sequence[Event], released: str | None) -> Mapping[str, Any]:
    """The figures of the scorecard that was judged, or of the last one; empty where there is none yet."""
    rejected = next((e.subject for e in of_cycle if e.event == "rejected"), None)
    evaluated = {e.subject: e for e in events if e.event == "evaluated"}
    judged = evaluated.get(released or rejected)
    last = next((e for e in reversed(of_cycle) if e.event == "evaluated"), None)
    found = judged or last
    return {} if found is None else found.detail


def _scores(figures: Mapping[str, Any]) -> list[ScoreStory]:
    return [
        ScoreStory(
            set=name,
            candidate=found["candidate"],
            champion=found["champion"],
            change=found["over_champion"],
            verdict=_verdict(found["over_champion"]),
        )
        for name in SETS
        if (found := figures.get(name))
    ]


def _verdict(change: Mapping[str, Any] | None) -> Verdict:
    """What an interval of the change says: better where all of it lies below 0."""
    if change is None:
        return "nothing to compare with"
    if change["high"] < 0:
        return "better"
    return "worse" if change["low"] > 0 else "no difference found"
