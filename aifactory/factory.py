"""The factory: one turn of the loop, top to bottom, and a method for each verb.

     sources ─ingest─▶ Corpus ─tokenize─▶ TokenSet ─train─▶ Model ─evaluate─▶ Scorecard ─promote─▶ Release ─serve─▶ answers
        ▲                                                     ▲                                                      │
        │                                                     └─ parent: the release in production            scores, feedback
        └──────────── the feedback log is a source like any other ◀── decide: Wait | Retrain ◀── improve ◀────────────┘

Every stage looks for its record first and returns it: a crash is healed by the same command, and a run in which nothing
changed does nothing. What a cycle reads is bound when it begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from aifactory.cluster import metrics_port
from aifactory.cluster.placement import (
    asked_for_data,
    asked_for_serving,
    asked_for_training,
    cluster_hosts,
    cluster_nodes,
    number_fitting,
    require_placement,
    require_shared_state,
)
from aifactory.cluster.session import connect, disconnect
from aifactory.cluster.tasks import RunTasks, ray_tasks
from aifactory.config import Config, FeedbackSource, Source, Train
from aifactory.errors import PlacementError, StateError
from aifactory.evaluate.evidence import evidence_of, evidence_of_best
from aifactory.evaluate.gate import Promote, Reject, best_of, judge
from aifactory.ingest.listing import Listing, list_pieces
from aifactory.ingest.readers import read_piece
from aifactory.observe import metrics, tracing
from aifactory.observe.events import log_event, log_to_stderr
from aifactory.records.artifacts import Corpus, FeedbackBatch, Model, Scorecard, TokenSet
from aifactory.records.books import Books
from aifactory.records.identity import fingerprint
from aifactory.records.journal import Bound, Cycle
from aifactory.records.registry import REFERENCE, Release
from aifactory.records.trials import ShareOf, Trial, TrialKind
from aifactory.workshop.answer_checks import AnswerChecks
from aifactory.workshop.bench import Bench
from aifactory.workshop.corpora import Corpora
from aifactory.workshop.fixed_best import fixed_best
from aifactory.workshop.judging import GradeAnswers, require_measured
from aifactory.workshop.masking import mask_of
from aifactory.workshop.models import Models
from aifactory.workshop.scorecards import Scorecards
from aifactory.workshop.token_sets import TokenSets

if TYPE_CHECKING:
    from aifactory.energy_ledger import EnergyLedger
    from aifactory.improve.decision import Decision
    from aifactory.improve.requests import RetrainAsked
    from aifactory.ledger import LedgerReport, Restored
    from aifactory.proof.audit import AuditReport
    from aifactory.proof.diff import ReleaseDiff
    from aifactory.proof.explain import CycleStory
    from aifactory.proof.forget import Forgotten
    from aifactory.proof.forget_check import ProofCheck
    from aifactory.proof.verify import Verification
    from aifactory.records.keys import Keys
    from aifactory.records.lineage import LineageNode
    from aifactory.report import Report
    from aifactory.serve.app import Endpoint
    from aifactory.trace import TraceReport
    from aifactory.upkeep.backup import BackedUp
    from aifactory.upkeep.collect import Collected
    from aifactory.upkeep.recovery import Recovered
    from aifactory.workshop.judging import JudgeMeasurement

RUN_SECTIONS = ("ingest", "tokenize", "model", "train", "evaluate", "promote")
"""What these say, and what the sources hold, identifies the cycle that `run` asks for."""
FROM_PRODUCTION = "registry:production"
_SEEN_FILES = ("listing", "seen.json")
"""What the sources' files looked like when they were last read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What a cycle trains and is judged on, oldest first: the sources' corpus, then one for each feedback batch."""

    corpora: Sequence[Corpus]
    token_sets: Sequence[TokenSet]

    @property
    def sources(self) -> Corpus:
        return self.corpora[0]

    @property
    def feedback(self) -> Sequence[Corpus]:
        return self.corpora[1:]


class Factory:
    """An AI factory: its configuration, its books, and the verbs of the loop.

    Every verb may be called alone: it first sees to what it needs, which costs nothing where that is there already.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        tracing.start(config.runtime.traces, service=config.name)
        self.books = Books(config)
        bench = Bench(self.books, run_tasks=self._run_tasks)
        self._corpora = Corpora(bench)
        self._token_sets = TokenSets(bench)
        self._models = Models(bench, runs_at_once=self._runs_at_once)
        self._scorecards = Scorecards(bench)
        self._started_ray = False
        self._serves = False
        self._connected = False

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Self:
        """A factory from a configuration file and dotted overrides such as `train.max_steps=10`."""
        return cls(Config.from_yaml(path, overrides))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the books, and end a Ray that was started here with all that runs in it, after the last answers."""
        metrics_port.flush()
        tracing.flush()
        if self._started_ray:
            try:
                if self._serves:
                    self._end_serving()
            finally:
                disconnect()
                self._started_ray = self._connected = self._serves = False
        self.books.close()

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def turn(self, cycle: Cycle) -> Release | Reject:
        """One turn of the loop, from what the cycle is bound to, to a release or to the reasons why there is none."""
        cycle = self.books.journal.claim(cycle)
        log_event("turning", cycle=cycle.number, trigger=cycle.trigger, attempt=cycle.attempt)
        with tracing.span(tracing.CYCLE, number=cycle.number, trigger=cycle.trigger, attempt=cycle.attempt):
            with tracing.span("ingest"):
                corpora = self._ingest(cycle)
            with tracing.span("tokenize"):
                material = self._tokenize(cycle, corpora)
            with tracing.span("train"):
                candidates = self._train(cycle, material)
            with tracing.span("evaluate"):
                scorecards = [self._evaluate(cycle, material, model) for model in candidates]
            with tracing.span("promote"):
                model, scorecard = self._choose(cycle, candidates, scorecards)
                return self._promote(cycle, model, scorecard, of=len(candidates))

    def run(self) -> Report:
        """The main job: a cycle over the sources; with `traffic`, on until simulated users have closed the loop."""
        from aifactory.report import Report

        cycle = self.cycle()
        if cycle.state == "running":
            self.turn(cycle)
        if self.config.traffic is not None:
            from aifactory.traffic.rehearsal import rehearse

            rehearse(self.books, _ServedLoop(self), self._user_texts)
        return Report.of(self.books)

    def turn_begun(self, trigger: str) -> Release | Reject:
        """Turn a cycle that somebody began, if it has not ended."""
        cycle = self.books.journal.cycle(trigger)
        if cycle is None:
            raise StateError(f"expected the cycle {trigger}, found none in the factory {self.config.name}.")
        return self.turn(cycle) if cycle.state == "running" else self.outcome(cycle)

    # ── the verbs ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def ingest(self) -> Corpus:
        """Sources to a corpus."""
        return self._ingest(self.cycle())[0]

    def tokenize(self) -> TokenSet:
        """Corpus to a token set."""
        cycle = self.cycle()
        return self._tokenize(cycle, self._ingest(cycle)).token_sets[0]

    def train(self) -> Model:
        """Token set to a model; with `train.candidates` to one for each, of which this is the first."""
        cycle = self.cycle()
        return self._train(cycle, self._tokenize(cycle, self._ingest(cycle)))[0]

    def evaluate(self) -> Scorecard:
        """Model to a scorecard; with `train.candidates` that of the best."""
        cycle = self.cycle()
        material = self._tokenize(cycle, self._ingest(cycle))
        candidates = self._train(cycle, material)
        scorecards = [self._evaluate(cycle, material, model) for model in candidates]
        return self._choose(cycle, candidates, scorecards)[1]

    def promote(self, *, trial: bool = False, reason: str = "asked for") -> Release | Reject:
        """Scorecard to a release, if the gate lets it pass. What was decided before stays decided.

        trial    put the release that is on trial into production, and nothing else; `reason` is for the audit
        """
        if trial:
            release = self.books.registry.promote_trial(reason={"reason": reason})
            log_event("promoted", release=release.name, reason=reason)
            return release
        cycle = self.cycle()
        if cycle.state == "running":
            return self.turn(cycle)
        return self.outcome(cycle)

    def canary(
        self,
        release: str,
        *,
        share: float,
        by: ShareOf | None = None,
        reason: str = "asked for",
        despite_quarantine: bool = False,
    ) -> Trial:
        """Have a release answer a share of the keys, or of the requests, in production's place; replicas follow by themselves.

        by                    key: who asks, the user of a key where requests name one; request: each by itself. Default: as
                              the trial goes by already, else key
        despite_quarantine    though it was withdrawn or rolled back for cause
        """
        return self._try(release, "canary", share=share, by=by, reason=reason, despite_quarantine=despite_quarantine)

    def shadow(
        self, release: str, *, share: float, reason: str = "asked for", despite_quarantine: bool = False
    ) -> Trial:
        """Have a release answer a share of the requests a second time, which nobody sees."""
        return self._try(release, "shadow", share=share, by=None, reason=reason, despite_quarantine=despite_quarantine)

    def withdraw(self, *, reason: str = "asked for", quarantine: bool = False) -> Release:
        """End the trial; production takes all again. With `quarantine` the release is neither tried nor served again."""
        release = self.books.registry.withdraw(reason={"reason": reason}, quarantine=quarantine)
        log_event("withdrawn", release=release.name, reason=reason, quarantined=quarantine)
        return release

    def rollback(
        self,
        *,
        to: int | None = None,
        reason: str = "asked for",
        quarantine: bool = False,
        despite_quarantine: bool = False,
    ) -> Release:
        """Serve an older release again: the one before, or the one of this number.

        quarantine            the one that is served now is neither tried nor served again
        despite_quarantine    serve the one of this number though it is in quarantine
        """
        release = self.books.registry.rollback(
            to=to, reason=reason, quarantine=quarantine, despite_quarantine=despite_quarantine
        )
        log_event("rolled_back", release=release.name, reason=reason)
        return release

    def serve(self) -> Endpoint:
        """Serve the release in production; returns when it answers. It follows every promotion by itself."""
        from aifactory.serve.app import start

        if self.books.registry.production() is None:
            raise StateError(
                f"expected a release of the factory {self.config.name} in production, found none; run a cycle first: "
                "aifactory run CONFIG."
            )
        self._connect()
        require_placement(asked_for_serving(self.config), cluster_nodes())
        try:
            require_placement(asked_for_serving(self.config, most=True), cluster_nodes())
        except PlacementError as error:
            log_event("warned", of=f"not all replicas that the endpoint may grow to have a place now: {error}")
        self._serves = True
        return start(self.books, mask=mask_of(self.config))

    def improve(self) -> None:
        """Start the evaluation actor: it scores what is served, decides, and starts cycles by itself."""
        from aifactory.evaluate.pipeline import score_tasks
        from aifactory.improve.evaluator import start
        from aifactory.workshop.prompt_languages import identify_languages

        require_measured(self.books)
        self._connect()
        score = partial(score_tasks, chat_fallback=self.config.serve.chat_fallback)
        guards = self.config.evaluate.guards
        check = None if guards is None else AnswerChecks(self.books, guards)
        judge = self.config.evaluate.judge if self.config.improve.live_judge is not None else None
        grade = None if judge is None else GradeAnswers(judge)
        start(self.books, score=score, turn=turn_begun, check=check, grade=grade, identify=identify_languages)

    def retrain(
        self,
        *,
        reason: str = "asked for",
        despite_cooldown: bool = False,
        key: str | None = None,
        withdraw: bool = False,
    ) -> RetrainAsked:
        """Ask the evaluation actor for one retrain of the release in production; it is on disk when this returns.

        reason             why, for the audit and the reasons of the decision
        despite_cooldown   it need not wait for a cool-down; the daily limit, the budget and the gate hold
        key                who repeats himself with the same key has asked once
        withdraw           in place of that, withdraw the requests that no cycle has taken up yet
        """
        from aifactory.improve.requests import ask, withdraw_open

        if withdraw:
            return withdraw_open(self.books, reason=reason)
        return ask(self.books, reason=reason, despite_cooldown=despite_cooldown, key=key)

    def wait(self) -> None:
        """Stay until interrupted; then end what was started here."""
        import threading

        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            log_event("stopping", factory=self.config.name)

    def look(self) -> Decision:
        """One look of the evaluation actor, here and now: what it would decide."""
        from aifactory.improve.evaluation import decide_now

        return decide_now(self.books)

    def judge(self, labelled: str) -> JudgeMeasurement:
        """How far the judge of the configuration agrees with people, on a file that they have labelled; it is kept."""
        from aifactory.workshop.judging import measure_judge

        return measure_judge(self.books, labelled)

    def status(self) -> Report:
        """What there is: cycles, releases, feedback, joules."""
        from aifactory.report import Report

        return Report.of(self.books)

    def lineage(self, subject: str) -> LineageNode:
        """What an answer, a release or an artifact was made from, down to the feedback batches and the corpora."""
        from aifactory.report import lineage_of

        return lineage_of(self.books, subject)

    def rejected(self, *, rule: str | None = None, corpus: str | None = None, limit: int = 10) -> LedgerReport:
        """What was rejected and why: counts by rule, and some rows, of a corpus or of the newest one."""
        from aifactory.ledger import read_rejected

        return read_rejected(self.books, rule=rule, corpus_id=corpus, limit=limit)

    def gc(self, *, dry_run: bool = False, caches: bool = False, give_up: str | None = None) -> Collected:
        """Delete what no release, cycle or proof needs; see `upkeep.collect`."""
        from aifactory.upkeep.collect import collect

        return collect(self.books, dry_run=dry_run, caches=caches, give_up=give_up)

    def backup(self, target: str, *, keep: int = 7) -> BackedUp:
        """Database and artifacts, consistent with one another, in another place; see `upkeep.backup`."""
        from aifactory.upkeep.backup import back_up

        return back_up(self.books, target, keep=keep)

    def recover(self, source: str, *, snapshot: str | None = None) -> Recovered:
        """What was lost, from a backup; see `upkeep.recovery`."""
        from aifactory.upkeep.recovery import recover

        return recover(self.books, source, snapshot=snapshot)

    def restore(self, rule: str, *, corpus: str | None = None) -> Restored:
        """Bring rows back in the next cycle that a rule has rejected."""
        from aifactory.ledger import restore_rejected

        return restore_rejected(self.books, rule=rule, corpus_id=corpus)

    def trace(
        self,
        text: str | None = None,
        *,
        completion: str | None = None,
        release: str | None = None,
        limit: int = 10,
        similar: int = 10,
    ) -> TraceReport:
        """The training rows that share the longest spans with a text, or with the answer of a completion; and the `similar` ones that
        resemble it, or the answer and its prompt, most by their words (0: those are not looked for, which takes two readings of all)."""
        from aifactory.trace import trace_text

        return trace_text(self.books, text=text, completion=completion, release=release, limit=limit, similar=similar)

    def audit(
        self,
        *,
        subject: str | None = None,
        action: str | None = None,
        since: str | None = None,
        until: str | None = None,
        expect: str | None = None,
        limit: int = 20,
    ) -> AuditReport:
        """Who or what did what, and whether every line of that stands as it was written."""
        from aifactory.proof.audit import read_audit

        return read_audit(
            self.books, subject=subject, action=action, since=since, until=until, expect=expect, limit=limit
        )

    def energy(self, *, since: str | None = None, until: str | None = None) -> EnergyLedger:
        """Joules by stage, cycle, release and key; each of these adds up to all of them."""
        from aifactory.energy_ledger import read_energy

        return read_energy(self.books, since=since, until=until)

    @property
    def keys(self) -> Keys:
        """The API keys of the endpoint: `create`, `rotate`, `revoke`, `limit`, `all`. Each change is on disk, and in the audit,
        when it returns; replicas see it within `runtime.gateway.keys_refresh_s`."""
        return self.books.keys

    def diff(
        self, first: str, second: str, *, prompts: str | None = None, limit: int = 8, max_tokens: int = 48
    ) -> ReleaseDiff:
        """Two releases side by side: data, recipe, scores, and what they answer to prompts of a file or of the holdout."""
        from aifactory.proof.diff import diff_releases

        return diff_releases(self.books, first, second, prompts=prompts, limit=limit, max_tokens=max_tokens)

    def explain(self, cycle: str, *, html: str | None = None) -> CycleStory:
        """What came in, was rejected, trained, found, decided and spent in a cycle; also as a page with pictures."""
        from aifactory.proof.explain import explain_cycle

        return explain_cycle(self.books, cycle, html=html)

    def verify(self, release: str, *, from_scratch: bool = False) -> Verification:
        """A release made again from its record in a clean place, compared with what it was, artifact by artifact."""
        from aifactory.proof.verify import verify_release

        return verify_release(self.books, release, run_tasks=self._run_tasks, from_scratch=from_scratch)

    def forget(self, where: str, *, dry_run: bool = False) -> Forgotten:
        """Rows that somebody asked to forget erased from everything, with all that learnt from them; with a proof."""
        from aifactory.proof.forget import forget_rows

        return forget_rows(self.books, where, turn=lambda cycle: self.turn_begun(cycle.trigger), dry_run=dry_run)

    def check_forgotten(self, proof: str) -> ProofCheck:
        """Whether a proof of `forget`, a file or an id, is as it was written and still true."""
        from aifactory.proof.forget_check import check_proof

        return check_proof(self.books, proof)

    # ── cycles ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _listing(self) -> Listing:
        """What the sources hold; files that look as they did when they were read last are not read again."""
        seen = self.books.storage.read_bytes(*_SEEN_FILES)
        listing = list_pieces(self._sources(), seen=None if seen is None else json.loads(seen))
        if listing.bytes_read:
            self.books.storage.write_bytes(json.dumps(listing.seen).encode(), *_SEEN_FILES)
        return listing

    def _sources(self) -> list[Source]:
        """The sources of the configuration; a log of feedback that names no database is this factory's own."""
        sources = list(self.config.ingest.sources)
        if any(isinstance(source, FeedbackSource) for source in sources):
            self.books.feedback.counts()  # its tables are there, even before anything else was written
        own = (self.config.name, self.books.database.url.render_as_string(hide_password=False))
        return [source.belonging_to(*own) if isinstance(source, FeedbackSource) else source for source in sources]

    def cycle(self) -> Cycle:
        """The cycle that this configuration and what its sources hold ask for; begun if it is new."""
        recipe = self.config.recipe(*RUN_SECTIONS)
        sources_digest = self._listing.digest
        restored = self._restored()
        models = self._corpora.step_models.now()
        inputs = [sources_digest, *(f"{corpus}:{rule}" for corpus, rule in restored)]
        # What was erased does not come back: without it the same sources ask for another release.
        tombstones = self._corpora.tombstones()
        erased = "" if tombstones is None else tombstones.digest(source.name for source in self.config.ingest.sources)
        inputs += [f"erased:{erased}"] if erased else []
        # A folder is what it holds. A release is what it is called, as for model.base: what this cycle itself puts into
        # production would else begin the next.
        inputs += [name if name.startswith(REFERENCE) else digest for name, digest in models]
        if self.config.model.base is not None and Path(self.config.model.base).expanduser().is_dir():
            from aifactory.train.base import digest_folder

            inputs.append(digest_folder(Path(self.config.model.base).expanduser()))
        identity = fingerprint(stage="run", code_version=1, recipe=recipe, inputs=inputs)
        production = self.books.registry.production()
        from_production = self.config.model.base == FROM_PRODUCTION
        if from_production and production is None:
            raise StateError(
                f"expected a release in production for model.base {FROM_PRODUCTION}, found none; run a cycle with another "
                "base first."
            )
        bound = Bound(
            kind="run",
            sources_digest=sources_digest,
            parent=production.model if production is not None and from_production else None,
            champion=None if production is None else production.number,
            holdouts=self._holdouts(recipe["ingest"], sources_digest, restored, models),
            restored=restored,
            models=models,
        )
        return self.books.journal.open_cycle(f"run-{identity[:16]}", recipe=recipe, bound=bound)

    def _holdouts(
        self,
        ingest: Mapping[str, Any],
        sources_digest: str,
        restored: Sequence[tuple[str, str]],
        models: Sequence[tuple[str, str]],
    ) -> list[str]:
        """The corpora of the cycles before: nothing that they hold out trains in this one.

        A cycle over the same sources by the same recipe and models makes the same corpus, and so is bound to the same ones.
        """
        for cycle in self.books.journal.cycles():
            bound = cycle.bound
            same = bound.kind == "run" and bound.sources_digest == sources_digest
            same = same and _asked(bound.models) == _asked(models)
            if same and cycle.recipe["ingest"] == ingest and [*map(tuple, bound.restored)] == list(restored):
                return self.books.journal.left_of(bound.holdouts)
        return self.books.journal.corpora()

    def _restored(self) -> list[tuple[str, str]]:
        """Corpus and rule of what was brought back from the ledgers, in order."""
        events = self.books.journal.events(event="restored")
        return list(dict.fromkeys((event.detail["corpus"], event.detail["rule"]) for event in events))

    def outcome(self, cycle: Cycle) -> Release | Reject:
        """How a cycle ended, or which release of it is on trial. Raises StateError while it runs."""
        if cycle.decision is None:
            raise StateError(f"expected the cycle {cycle.trigger} to have ended, found it {cycle.state}.")
        if cycle.state == "rejected":
            return Reject(reasons=tuple(cycle.decision["reasons"]), refused=tuple(cycle.decision.get("refused", ())))
        for release in self.books.registry.releases():
            if release.trigger == cycle.trigger:
                return release
        return Reject(reasons=tuple(cycle.decision["reasons"]))

    # ── the stages of a cycle ─────────────────────────────────────────────────────────────────────────────────────────

    def _ingest(self, cycle: Cycle) -> list[Corpus]:
        """The corpora of the parent first: what it has trained on is replayed. Then what is new."""
        artifacts = self.books.artifacts
        if cycle.bound.corpora:  # what an erasure has left, of whose sources nothing is read
            return [artifacts.get(Corpus, corpus_id) for corpus_id in cycle.bound.corpora]
        parent = self._parent(cycle)
        seen = {} if parent is None or cycle.bound.kind == "run" else self._trained_on(parent)
        corpora = [artifacts.get(Corpus, corpus_id) for corpus_id in seen]
        if not corpora:
            corpora = [self._corpora.of_sources(cycle, self._listing.pieces)]
        known = {input_id for corpus in corpora for input_id in corpus.record.inputs}
        for batch_id in cycle.bound.batches:
            if batch_id not in known:
                batch = artifacts.get(FeedbackBatch, batch_id)
                self.books.lineage.add(batch)
                corpora.append(self._corpora.of_batch(cycle, batch, corpora))
        return corpora

    def _tokenize(self, cycle: Cycle, corpora: Sequence[Corpus]) -> Material:
        tokenizer: Model | Path | None = self._parent(cycle) or self._base_folder()
        if tokenizer is None and self.config.tokenize.tokenizer != "train":
            tokenizer = Path(self.config.tokenize.tokenizer).expanduser()
        earlier = {} if not isinstance(tokenizer, Model) else self._trained_on(tokenizer)
        # The parent may have been trained by another objective, on the same rows packed for that.
        earlier = {corpus: tokens for corpus, tokens in earlier.items() if self._fits(tokens)}
        token_sets = [
            earlier.get(corpus.id) or self._token_sets.of(cycle, corpus, tokenizer=tokenizer) for corpus in corpora
        ]
        return Material(corpora=corpora, token_sets=token_sets)

    def _train(self, cycle: Cycle, material: Material) -> list[Model]:
        """A model for each candidate; side by side where there is room."""
        recipes, shares = self._recipes_of(cycle, material)
        base = self._parent(cycle) or self._base_folder()
        return self._models.of(cycle, material.token_sets, recipes=recipes, shares=shares, base=base)

    def _evaluate(self, cycle: Cycle, material: Material, model: Model) -> Scorecard:
        champion = None
        if cycle.bound.champion is not None:
            release = self.books.registry.release(cycle.bound.champion)
            assert release is not None, cycle.bound
            champion = self.books.artifacts.get(Model, release.model)
        parent = self._parent(cycle)
        seen = {} if parent is None else self._trained_on(parent)
        return self._scorecards.of(
            cycle,
            model,
            champion=champion,
            sources=material.sources,
            feedback=material.feedback,
            new=[c for c in material.feedback if c.id not in seen] if cycle.bound.is_retrain else (),
            best=fixed_best(self.books, cycle, material.sources),
        )

    def _choose(
        self, cycle: Cycle, candidates: Sequence[Model], scorecards: Sequence[Scorecard]
    ) -> tuple[Model, Scorecard]:
        """The candidate with the best holdout; with several, what they were compared by is entered into the books."""
        best = best_of([evidence_of(scorecard.figures) for scorecard in scorecards])
        model, scorecard = candidates[best], scorecards[best]
        if len(candidates) > 1 and not self.books.journal.events(event="chosen", cycle=cycle.trigger):
            compared = [
                {
                    "model": m.id,
                    "scorecard": s.id,
                    "differs": dict(differs),
                    "holdout": s.figures["holdout"]["candidate"],
                }
                for m, s, differs in zip(candidates, scorecards, self.config.train.candidates, strict=True)
            ]
            detail = {"candidates": compared, "scorecard": scorecard.id}
            self.books.journal.write(
                "chosen", cycle=cycle.trigger, attempt=cycle.attempt, subject=model.id, detail=detail
            )
            log_event("chosen", cycle=cycle.number, artifact=model.id, of=len(candidates))
        return model, scorecard

    def _promote(self, cycle: Cycle, model: Model, scorecard: Scorecard, *, of: int) -> Release | Reject:
        """Judge, then apply the verdict in one transaction. The model was chosen `of` so many.

        Where there is a release to compare it with in use, and that is asked for, it goes on trial first; not where it is to
        replace one that must not go on: the successor of an erasure.
        """
        evidence = evidence_of_best(self.books.storage, scorecard, self.config.evaluate, of=of)
        verdict = judge(evidence, self.config.promote)
        metrics.PROMOTE_DECISIONS.add(decision="promote" if isinstance(verdict, Promote) else "reject")
        decision = verdict.to_json()
        trial = self.config.improve.trial
        is_compared_in_use = cycle.bound.champion is not None and cycle.bound.replaces is None
        if isinstance(verdict, Promote) and trial is not None and is_compared_in_use:
            kind, share = trial.steps[0]
            release = self.books.registry.begin_trial(
                cycle, kind, share=share, by=trial.by, model=model.id, scorecard=scorecard.id, decision=decision
            )
            log_event("on_trial", cycle=cycle.number, release=release.name, kind=kind, share=share)
            return release
        if isinstance(verdict, Promote):
            release = self.books.registry.promote(cycle, model=model.id, scorecard=scorecard.id, decision=decision)
            log_event("promoted", cycle=cycle.number, release=release.name)
            return release
        self.books.registry.reject(cycle, scorecard=scorecard.id, decision=decision)
        log_event("rejected", cycle=cycle.number, reasons="; ".join(verdict.reasons))
        return verdict

    def _try(
        self,
        release: str,
        kind: TrialKind,
        *,
        share: float,
        by: ShareOf | None,
        reason: str,
        despite_quarantine: bool,
    ) -> Trial:
        number = self.books.registry.named(release).number
        trial = self.books.registry.try_out(
            number, kind, share=share, by=by, reason={"reason": reason}, despite_quarantine=despite_quarantine
        )
        log_event("tried", release=trial.name, kind=trial.kind, share=trial.share, by=trial.by)
        return trial

    # ── what a cycle starts from ──────────────────────────────────────────────────────────────────────────────────────

    def _parent(self, cycle: Cycle) -> Model | None:
        return None if cycle.bound.parent is None else self.books.artifacts.get(Model, cycle.bound.parent)

    def _base_folder(self) -> Path | None:
        base = self.config.model.base
        if base is None or base == FROM_PRODUCTION:
            return None
        from aifactory.train.base import resolve_base

        return resolve_base(base)

    def _trained_on(self, model: Model) -> dict[str, TokenSet]:
        """The token sets that a model was trained on, by the id of their corpus."""
        ids = [input_id for input_id in model.record.inputs if input_id.startswith("tokens/")]
        token_sets = [self.books.artifacts.get(TokenSet, token_id) for token_id in ids]
        return {self.books.artifacts.left_of(Corpus, tokens.record.inputs[0]).id: tokens for tokens in token_sets}

    def _fits(self, tokens: TokenSet) -> bool:
        """Whether a token set was packed for the objective that is asked for now."""
        return bool(tokens.record.recipe.get("objective", "likelihood") == self.config.train.objective)

    def _recipes_of(self, cycle: Cycle, material: Material) -> tuple[Sequence[Train], list[float]]:
        """The recipes of training, one for each candidate, and the share of each token set in a batch."""
        feedback = material.token_sets[1:]
        if not feedback and not cycle.bound.is_retrain:
            return self.config.train.recipes(), [1.0]
        recipe = self.config.train.model_copy(update={"candidates": ()})
        retrain = self.config.improve.retrain
        rows = sum(tokens.num_rows for tokens in feedback)
        shares = [retrain.feedback_share * tokens.num_rows / rows for tokens in feedback]
        # Without feedback it was asked for by somebody, and learns more of what its parent was taught.
        shares = [1 - sum(shares), *shares]
        if cycle.bound.kind == "forget" and cycle.bound.parent is None:
            return [recipe], shares  # all from the beginning: as long as a first training is
        recipe = recipe.model_copy(
            update={
                "max_steps": cycle.bound.max_steps or retrain.max_steps,
                "learning_rate": retrain.learning_rate,
                # Another order than that of the parent's first steps, or the replay would repeat just those.
                "seed": recipe.seed + max(1, len(feedback)),
            }
        )
        return [recipe], shares

    def _user_texts(self) -> list[tuple[str, str]]:
        """What the simulated users know, a user for each text."""
        assert self.config.traffic is not None
        return [
            (f"{piece.source}:{user or origin}", text)
            for piece in list_pieces([self.config.traffic.source]).pieces
            for block in read_piece(piece)
            for user, origin, text in zip(
                *(block.rows[name].to_pylist() for name in ("user", "origin", "text")), strict=True
            )
        ]

    # ── the cluster ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _run_tasks(self) -> RunTasks:
        self._connect()
        runtime = self.config.runtime
        return ray_tasks(concurrency=runtime.data_tasks, cpus_per_task=runtime.cpus_per_worker)

    def _runs_at_once(self, most: int) -> int:
        """How many training runs fit beside one another, and beside what is served."""
        self._connect()
        beside = asked_for_serving(self.config) if self._serves_too() else []
        return number_fitting(asked_for_training(self.config), cluster_nodes(), beside=beside, most=most)

    def _connect(self) -> None:
        """Connect to the cluster once, and see that what will run at the same time fits on it.

        Raises   PlacementError.
        """
        if self._connected:
            return
        self._started_ray = connect(self.config.name)
        metrics_port.export(self.config.name)
        beside = asked_for_serving(self.config) if self._serves_too() else []
        for stage in (asked_for_data(self.config), asked_for_training(self.config)):
            require_placement([*beside, *stage], cluster_nodes())
        require_shared_state(
            cluster_hosts(), sqlite=self.books.database.is_sqlite, local_storage=self.books.storage.is_local
        )
        self._connected = True

    def _end_serving(self) -> None:
        from aifactory.serve.app import stop

        stop(self.config.name, drain_timeout_s=self.config.runtime.endpoint.drain_timeout_s)

    def _serves_too(self) -> bool:
        """Whether a replica runs beside the stages: it will (traffic), or it does."""
        from aifactory.serve.app import is_running

        return self.config.traffic is not None or is_running(self.config.name)


def _asked(models: Sequence[tuple[str, str]]) -> list[str]:
    """Which models were asked, whatever they are called."""
    return [found for _, found in models]


class _ServedLoop:
    """The loop of a factory as simulated users see it."""

    def __init__(self, factory: Factory) -> None:
        self._factory = factory

    def open(self) -> tuple[str, str]:
        endpoint = self._factory.serve()
        self._factory.improve()
        return endpoint.url, endpoint.model

    def is_settled(self) -> bool:
        from aifactory.improve.evaluation import is_settled

        return is_settled(self._factory.books)

    def close(self) -> None:
        from aifactory.improve.evaluator import stop as stop_evaluator

        stop_evaluator(self._factory.config.name)
        self._factory._end_serving()


def turn_begun(config: Config, trigger: str) -> None:
    """Turn the cycle of this trigger: what the evaluation actor starts, as a Ray job or in the same cluster."""
    log_to_stderr()
    with Factory(config) as factory:
        factory.turn_begun(trigger)
