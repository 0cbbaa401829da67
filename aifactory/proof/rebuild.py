"""Artifacts made again in a clean place, each compared with what its record says; or taken as they are, each file checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from aifactory.cluster.tasks import RunTasks
from aifactory.config import Config, Train
from aifactory.errors import ConfigError, ErasedError, StorageError
from aifactory.ingest.listing import Listing, list_pieces
from aifactory.observe.events import Timer, log_event
from aifactory.proof.recorded import NotRebuildableError, Recorded
from aifactory.records.artifacts import (
    Artifact,
    Corpus,
    FeedbackBatch,
    Model,
    Scorecard,
    TokenSet,
    digest_of,
)
from aifactory.records.books import Books
from aifactory.records.journal import Cycle
from aifactory.records.storage import RECORD_NAME, StoredFile
from aifactory.workshop.bench import Bench, Folder, Identity, Made
from aifactory.workshop.corpora import Corpora
from aifactory.workshop.execution import execution_of
from aifactory.workshop.fixed_best import FixedBest
from aifactory.workshop.models import Models, TrainWork
from aifactory.workshop.scorecards import Scorecards
from aifactory.workshop.token_sets import TokenSets

Noun = TypeVar("Noun", bound=Artifact)
How = Literal["rebuilt", "taken"]
_NOUNS: Mapping[str, type[Artifact]] = {noun.kind: noun for noun in (FeedbackBatch, Corpus, TokenSet, Model, Scorecard)}
_EVENTS = ("ingested", "tokenized", "trained", "evaluated")
_TOKENIZER = "tokenizer/"
_MACHINE = ("machine", "cpu_flags")
_NAMED_FILES = 5


class DiffersError(Exception):
    """An artifact is not what its record says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactCheck:
    """One artifact, compared."""

    id: str
    """Of the artifact; a tokenizer is named beside the token set that holds it."""
    how: How
    recorded: str
    """Digest in the record: SHA-256 over the names and hashes of the files."""
    found: str
    """Digest of what was rebuilt; of what was taken, as it lies in the storage."""
    files: Sequence[str]
    """Names of the files that differ or that only one of them has."""
    execution: Mapping[str, tuple[Any, Any]]
    """What of the recorded execution is another here: recorded, found."""
    seconds: float
    left_by: str | None = None
    """The erasure that left it, or left nothing of the rows that it was made from: it was taken, since nobody can make it again."""

    @property
    def is_equal(self) -> bool:
        return self.recorded == self.found and not self.files


class _CleanBench(Bench):
    """A bench that makes one known thing and nothing else."""

    def __init__(self, books: Books, config: Config, expected: Artifact, *, run_tasks: Callable[[], RunTasks]) -> None:
        super().__init__(books, run_tasks=run_tasks)
        self.config = config
        self._expected = expected

    def make(self, cycle: Cycle, identity: Identity[Noun], write: Callable[[Folder], Made], **told: Any) -> Noun:
        recorded = self._expected.record
        if identity.fingerprint != recorded.fingerprint:
            differing = {
                field: (recorded.recipe.get(field), identity.recipe.get(field))
                for field in {*recorded.recipe, *identity.recipe}
                if recorded.recipe.get(field) != identity.recipe.get(field)
            }
            said = "; ".join(
                f"{field} {shown(now)}, recorded {shown(then)}" for field, (then, now) in differing.items()
            )
            raise NotRebuildableError(
                f"{self._expected.id} would be {identity.noun.kind}/{identity.fingerprint[:16]} now: "
                + (
                    said
                    or "what it is made from is not what it was (a folder, a tokenizer or a base model that was changed)"
                )
            )
        return super().make(cycle, identity, write, **told)

    def show(self, model: Model, scorecard: Scorecard | None = None) -> None:
        """Nobody reads it here."""


class Rebuild:
    """Artifacts in the clean place, each checked once."""

    def __init__(
        self,
        books: Books,
        clean: Books,
        *,
        run_tasks: Callable[[], RunTasks],
        train_work: TrainWork,
        from_scratch: bool,
        trigger: str,
    ) -> None:
        self.checks: list[ArtifactCheck] = []
        self._books = books
        self._clean = clean
        self._recorded = Recorded(books, clean.config)
        self._run_tasks = run_tasks
        self._train_work = train_work
        self._from_scratch = from_scratch
        events = [event for event in books.journal.events() if event.event in _EVENTS and event.subject]
        self._makers = {str(event.subject): event.trigger for event in reversed(events)}
        """By artifact the trigger of the cycle that made it."""
        self._own = {trigger}
        self._there: dict[str, Artifact] = {}
        self._listings: dict[str, Listing] = {}

    def of(self, artifact_id: str, *, is_own: bool = False) -> Artifact:
        """The artifact in the clean place: rebuilt or taken, and found equal.

        is_own   whether it is what is verified, and is rebuilt in any case with what its cycle made
        Raises   NotRebuildableError, DiffersError.
        """
        if artifact_id in self._there:
            return self._there[artifact_id]
        kind = artifact_id.partition("/")[0]
        try:
            artifact = self._books.artifacts.get(_NOUNS[kind], artifact_id)
        except ErasedError as error:
            erased = self._books.artifacts.erased(artifact_id)
            assert erased is not None
            raise NotRebuildableError(f"erased by {erased.erasure} ({artifact_id})") from error
        except StorageError as error:
            raise NotRebuildableError(f"{artifact_id} is gone: {error}") from error
        maker = self._makers.get(artifact_id)
        if is_own and maker is not None:
            self._own.add(maker)
        left_by = self._left_by(artifact)
        self._there[artifact_id] = (
            self._rebuilt(artifact, self._cycle(artifact_id))
            if kind != FeedbackBatch.kind and left_by is None and (self._from_scratch or maker in self._own)
            else self._taken(artifact, left_by=left_by)
        )
        return self._there[artifact_id]

    def _left_by(self, artifact: Artifact) -> str | None:
        """The erasure that took away what an artifact was made from, where rows were erased that did not train.

        Raises   DiffersError if it is not what that erasure has noted of it.
        """
        recipe, store = artifact.record.recipe, self._books.artifacts
        if isinstance(artifact, TokenSet):
            erased = store.erased(artifact.record.inputs[0])
            return None if erased is None else erased.erasure
        if not isinstance(artifact, Corpus) or "erased_from" not in recipe:
            return None
        origin = f"{artifact.kind}/{recipe['erased_from'][:16]}"
        erased = store.erased(origin)
        erasure = None if erased is None else self._books.erasures.get(erased.erasure)
        noted = {} if erasure is None else erasure.found.get("artifacts", {}).get(origin, {})
        if erasure is None or noted.get("successor") != artifact.id or noted["successor_digest"] != artifact.digest:
            said = f"{noted['successor']} with digest {noted['successor_digest'][:16]}" if noted else "nothing"
            raise DiffersError(
                f"{artifact.id} says that it is what an erasure left of {origin}, with digest {artifact.digest[:16]}; the books "
                f"say {said}"
            )
        return erasure.id

    def _get(self, noun: type[Noun], artifact_id: str) -> Noun:
        found = self.of(artifact_id)
        assert isinstance(found, noun)
        return found

    def _cycle(self, artifact_id: str) -> Cycle:
        trigger = self._makers.get(artifact_id)
        cycle = None if trigger is None else self._books.journal.cycle(trigger)
        if cycle is None:
            raise NotRebuildableError(f"the journal does not say in which cycle {artifact_id} was made")
        return cycle

    # ── taken ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _taken(self, artifact: Artifact, *, left_by: str | None = None) -> Artifact:
        """Copy it, file by file, each with its hash; its record, and the books' index, must say the same."""
        timer = Timer()
        folder = self._books.artifacts.folder(artifact.kind, artifact.fingerprint)
        found = []
        for file in artifact.record.files:
            data = self._books.storage.read_bytes(*folder, *file.name.split("/"))
            if data is None:
                raise NotRebuildableError(f"{artifact.uri}/{file.name} is gone")
            self._clean.storage.write_bytes(data, *folder, *file.name.split("/"), durable=False)
            found.append(replace(file, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
        self._clean.storage.write_bytes(artifact.record.to_json().encode(), *folder, RECORD_NAME, durable=False)
        self._compare(artifact, found, "taken", {}, timer.seconds, left_by=left_by)
        return type(artifact)(record=artifact.record, uri=self._clean.storage.path(*folder))

    # ── rebuilt ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _rebuilt(self, artifact: Artifact, cycle: Cycle) -> Artifact:
        self._require_stored(artifact)
        _require_version(artifact)
        try:
            config = self._recorded.config_of(artifact, cycle)
            make = self._maker_of(artifact, cycle, config)
        except ValidationError as error:
            raise NotRebuildableError(
                f"{artifact.id} was made by a recipe that this version does not know: {error.errors()[0]['loc']}: "
                f"{error.errors()[0]['msg']}"
            ) from error
        train = Train.model_validate(artifact.record.recipe["train"]) if isinstance(artifact, Model) else config.train
        here = json.loads(json.dumps(execution_of(config.runtime, train)))  # as a record would say it
        recorded = artifact.record.execution
        differing = {
            name: (recorded.get(name), here.get(name))
            for name in {**recorded, **here}
            if recorded.get(name) != here.get(name)
        }
        log_event("rebuilding", artifact=artifact.id)
        timer = Timer()
        made = make()
        self._compare(artifact, made.record.files, "rebuilt", differing, timer.seconds)
        return made

    def _maker_of(self, artifact: Artifact, cycle: Cycle, config: Config) -> Callable[[], Artifact]:
        """What makes it, once all that it is made from is in the clean place."""
        record = artifact.record
        bench = _CleanBench(self._clean, config, artifact, run_tasks=self._run_tasks)
        models = [self._get(Model, each) for each in record.inputs if each.startswith("model/")]
        corpora = [self._get(Corpus, each) for each in record.inputs if each.startswith("corpus/")]
        if isinstance(artifact, Corpus):
            for corpus_id, _ in cycle.bound.restored:
                self.of(corpus_id)
            batches = [each for each in record.inputs if each.startswith("batch/")]
            if batches:
                batch = self._get(FeedbackBatch, batches[0])
                ancestors = self._ancestors(cycle, corpora)
                return lambda: Corpora(bench).of_batch(cycle, batch, ancestors)
            pieces = self._listing(config, cycle, artifact).pieces
            buried = partial(self._books.erasures.tombstones, by=record.created_at)
            return lambda: Corpora(bench, buried=buried).of_sources(cycle, pieces)
        if isinstance(artifact, TokenSet):
            tokenizer = None if "vocab_size" in record.recipe else self._tokenizer_of(cycle, config)
            return lambda: TokenSets(bench).of(cycle, corpora[0], tokenizer=tokenizer)
        if isinstance(artifact, Model):
            token_sets = [self._get(TokenSet, each) for each in record.inputs if each.startswith("tokens/")]
            base = models[0] if models else None if "architecture" in record.recipe else self._recorded.base_of(cycle)
            recipe = Train.model_validate(record.recipe["train"])
            if recipe.early_stopping is not None:  # by the held-out rows of its corpora
                for tokens in token_sets:
                    self.of(tokens.record.inputs[0])
            shares = list(record.recipe["shares"])
            made = Models(bench, train_work=self._train_work)
            return lambda: made.of(cycle, token_sets, recipes=[recipe], shares=shares, base=base)[0]
        champion = models[1] if len(models) > 1 else None
        best = FixedBest(release=artifact.figures["best"]["release"], model=models[2]) if len(models) > 2 else None
        feedback = corpora[1:]
        line = self._line(cycle)
        new = [corpus for corpus in feedback if corpus.id not in line] if cycle.bound.is_retrain else []
        return lambda: Scorecards(bench).of(
            cycle, models[0], champion=champion, sources=corpora[0], feedback=feedback, new=new, best=best
        )

    def _ancestors(self, cycle: Cycle, corpora: Sequence[Corpus]) -> list[Corpus]:
        """Of what a corpus of feedback was compared with, what its line trains on: the rest was held out elsewhere."""
        line = self._line(cycle)
        return [corpus for corpus in corpora if corpus.id in line or self._makers.get(corpus.id) == cycle.trigger]

    def _line(self, cycle: Cycle) -> set[str]:
        """The corpora on which the model that a cycle goes on from was trained, or what is left of them."""
        if cycle.bound.parent is None:
            return set()
        parent = self._books.artifacts.get(Model, cycle.bound.parent)
        token_ids = [each for each in parent.record.inputs if each.startswith("tokens/")]
        corpora = [self._books.artifacts.get(TokenSet, each).record.inputs[0] for each in token_ids]
        return {*corpora, *self._books.journal.left_of(corpora)}

    def _listing(self, config: Config, cycle: Cycle, corpus: Corpus) -> Listing:
        """What the sources hold, if it is what they held."""
        listing = self._listings.get(cycle.trigger)
        if listing is None:
            try:
                listing = self._listings[cycle.trigger] = list_pieces(config.ingest.sources)
            except ConfigError as error:
                raise NotRebuildableError(f"the sources of {corpus.id} are not there any more: {error}") from error
        if listing.digest != cycle.bound.sources_digest:
            raise NotRebuildableError(
                f"the sources of {corpus.id} hold something else than when {cycle.trigger} began (digest "
                f"{cycle.bound.sources_digest[:16]}, found {listing.digest[:16]}){self._changed_files(listing)}"
            )
        return listing

    def _changed_files(self, listing: Listing) -> str:
        """Files that are not what they were when the factory read them last, which may be after the cycle."""
        data = self._books.storage.read_bytes("listing", "seen.json")
        seen = {} if data is None else json.loads(data)
        changed = []
        for source in sorted({*seen, *listing.seen}):
            before, now = (
                {k: v[1] for k, v in each.get(source, {}).get("files", {}).items()} for each in (seen, listing.seen)
            )
            changed += [path for path in sorted({*before, *now}) if before.get(path) != now.get(path)]
        if not changed:
            return ""
        more = f" and {len(changed) - _NAMED_FILES} more" if len(changed) > _NAMED_FILES else ""
        return f"; changed, new or gone since they were read last: {', '.join(changed[:_NAMED_FILES])}{more}"

    def _tokenizer_of(self, cycle: Cycle, config: Config) -> Model | Path:
        if cycle.bound.parent is not None:
            return self._get(Model, cycle.bound.parent)
        return (
            Path(config.tokenize.tokenizer).expanduser()
            if not self._recorded.base_name(cycle)
            else self._recorded.base_of(cycle)
        )

    # ── compared ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _require_stored(self, artifact: Artifact) -> None:
        """What lies in the storage must be what the record says: that is what is served."""
        folder = self._books.artifacts.folder(artifact.kind, artifact.fingerprint)
        for file in artifact.record.files:
            data = self._books.storage.read_bytes(*folder, *file.name.split("/"))
            if data is None or hashlib.sha256(data).hexdigest() != file.sha256:
                found = "none" if data is None else f"sha256 {hashlib.sha256(data).hexdigest()[:16]}"
                raise DiffersError(
                    f"{artifact.uri}/{file.name} is not what the record of {artifact.id} says: expected sha256 "
                    f"{file.sha256[:16]}, found {found}"
                )

    def _compare(
        self,
        artifact: Artifact,
        files: Sequence[StoredFile],
        how: How,
        execution: Mapping[str, tuple[Any, Any]],
        seconds: float,
        *,
        left_by: str | None = None,
    ) -> None:
        """Keep what was found. Raises DiffersError, or NotRebuildableError where the execution is another one."""
        record = artifact.record
        tree = self._books.lineage.tree(artifact.id)
        if tree is not None and tree.digest != record.digest:
            raise DiffersError(
                f"the record of {artifact.id} says digest {record.digest[:16]}, the books {str(tree.digest)[:16]}: one of them was "
                "changed"
            )
        if digest_of(record.files) != record.digest:
            raise DiffersError(
                f"the record of {artifact.id} lists files that do not have its digest {record.digest[:16]}"
            )
        if isinstance(artifact, TokenSet):
            recorded, found = (
                [file for file in each if file.name.startswith(_TOKENIZER)] for each in (record.files, files)
            )
            self._keep(f"tokenizer of {artifact.id}", recorded, found, how, execution, 0.0, left_by)
        self._keep(artifact.id, record.files, files, how, execution, seconds, left_by)

    def _keep(
        self,
        name: str,
        recorded: Sequence[StoredFile],
        found: Sequence[StoredFile],
        how: How,
        execution: Mapping[str, tuple[Any, Any]],
        seconds: float,
        left_by: str | None,
    ) -> None:
        hashes = [{file.name: file.sha256 for file in files} for files in (recorded, found)]
        differing = sorted(each for each in {**hashes[0], **hashes[1]} if hashes[0].get(each) != hashes[1].get(each))
        check = ArtifactCheck(
            id=name,
            how=how,
            recorded=digest_of(recorded),
            found=digest_of(found),
            files=differing,
            execution=execution,
            seconds=seconds,
            left_by=left_by,
        )
        self.checks.append(check)
        if check.is_equal:
            return
        if how == "rebuilt" and execution:
            what = "another instruction set" if any(each in execution for each in _MACHINE) else "another execution"
            said = "; ".join(
                f"{field} {shown(now)}, recorded {shown(then)}" for field, (then, now) in execution.items()
            )
            raise NotRebuildableError(f"{name} comes out with other bytes under {what}: {said}")
        raise DiffersError(f"{name} is the first that differs, in {', '.join(differing)}")


def _require_version(artifact: Artifact) -> None:
    """Raises NotRebuildableError if the stage has changed what it makes since."""
    from aifactory.evaluate.pipeline import CODE_VERSION as EVALUATE
    from aifactory.ingest.pipeline import CODE_VERSION as INGEST
    from aifactory.tokens.pipeline import CODE_VERSION as TOKENIZE
    from aifactory.train.trainer import CODE_VERSION as TRAIN

    now = {Corpus.kind: INGEST, TokenSet.kind: TOKENIZE, Model.kind: TRAIN, Scorecard.kind: EVALUATE}[artifact.kind]
    if now != artifact.record.code_version:
        raise NotRebuildableError(
            f"{artifact.id} was made by version {artifact.record.code_version} of its stage, this is version {now}: use the release "
            "of this program that made it"
        )


def shown(value: Any) -> str:
    """A value as a person reads it, cut where it is long."""
    text = " ".join(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else str(value)
    return text if len(text) <= 120 else text[:119] + "…"
