"""A release made again from its record, in a clean place, and compared with what it was, artifact by artifact.

What is rebuilt   all that the release's own cycle made: corpora, token sets, model, scorecard. With `from_scratch` also all that
                  earlier cycles made and it was made of.
What is taken     what earlier cycles made, after its files were found to be what its record and the books say; and sealed feedback,
                  which is made by nobody.
How               by the recipes in the records, bound as the cycles were, under the recorded execution. An identity that comes
                  out as another one (another version of a stage, a function or a model that was changed) ends it before any work.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from aifactory.cluster.tasks import RunTasks
from aifactory.config import (
    Architecture,
    Config,
    Evaluate,
    FeedbackSource,
    FeedbackTrust,
    HoldoutStratum,
    Improve,
    Section,
    Source,
    Step,
    StepExecution,
    Tokenize,
    Train,
)
from aifactory.errors import AIFactoryError, ConfigError, ErasedError, StorageError
from aifactory.ingest.listing import Listing, list_pieces
from aifactory.observe.events import Timer, log_event
from aifactory.records.artifacts import (
    Artifact,
    Corpus,
    FeedbackBatch,
    Model,
    Record,
    Scorecard,
    TokenSet,
    digest_of,
)
from aifactory.records.books import Books
from aifactory.records.journal import Cycle
from aifactory.records.registry import REFERENCE
from aifactory.records.storage import RECORD_NAME, StoredFile
from aifactory.workshop.bench import Bench, Folder, Identity, Made
from aifactory.workshop.corpora import Corpora
from aifactory.workshop.execution import execution_of
from aifactory.workshop.fixed_best import FixedBest
from aifactory.workshop.models import Models, TrainWork, train_and_prove
from aifactory.workshop.scorecards import Scorecards
from aifactory.workshop.token_sets import TokenSets

Noun = TypeVar("Noun", bound=Artifact)
SectionType = TypeVar("SectionType", bound=Section)
How = Literal["rebuilt", "taken"]
_NOUNS: Mapping[str, type[Artifact]] = {noun.kind: noun for noun in (FeedbackBatch, Corpus, TokenSet, Model, Scorecard)}
_EVENTS = ("ingested", "tokenized", "trained", "evaluated")
_TOKENIZER = "tokenizer/"
_MACHINE = ("machine", "cpu_flags")
_NAMED_FILES = 5


class _NotRebuildableError(Exception):
    """Why an artifact can't be made again here."""


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

    @property
    def is_equal(self) -> bool:
        return self.recorded == self.found and not self.files


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What came of it."""

    release: str
    verdict: Literal["equal", "differs", "not rebuildable"]
    reason: str
    """Which artifact differs first, or why it can't be rebuilt; empty if all are equal."""
    from_scratch: bool
    checks: Sequence[ArtifactCheck]
    """In the order in which they were made, up to the first that differs."""
    seconds: float

    @property
    def holds(self) -> bool:
        return self.verdict == "equal"

    def to_json(self) -> dict[str, Any]:
        checks = [asdict(check) | {"is_equal": check.is_equal} for check in self.checks]
        return asdict(self) | {"holds": self.holds, "checks": checks}

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [f"{self.release}: {self.verdict}" + (f": {self.reason}" if self.reason else "")]
        for check in self.checks:
            found = "equal" if check.is_equal else f"differs: {check.found[:16]}"
            lines.append(
                f"  {check.how:<8} {check.id:<36} sha256 {check.recorded[:16]}  {found}  {check.seconds:,.1f} s"
            )
            lines += [f"           {name}" for name in check.files]
        different = {name: pair for check in self.checks for name, pair in check.execution.items()}
        lines += [
            f"  here     {name}: {_shown(now)}, recorded {_shown(then)}" for name, (then, now) in different.items()
        ]
        taken = sum(check.how == "taken" for check in self.checks)
        if taken:
            lines.append(
                f"  {taken} artifacts were taken as they are"
                + (
                    ": feedback is made by nobody."
                    if self.from_scratch
                    else "; --from-scratch makes those of earlier cycles too."
                )
            )
        return [*lines, f"  {self.seconds:,.0f} s in all"]


def verify_release(
    books: Books,
    name: str,
    *,
    run_tasks: Callable[[], RunTasks],
    from_scratch: bool = False,
    train_work: TrainWork = train_and_prove,
) -> Verification:
    """Rebuild a release in a temporary storage root with books of its own, and compare.

    Raises   StateError if there is no such release.
    """
    release = books.registry.named(name)
    timer = Timer()
    with tempfile.TemporaryDirectory(prefix="aifactory-verify-") as scratch:
        place = {"storage": scratch, "state_url": f"sqlite:///{scratch}/state.db", "trackers": ()}
        config = books.config.model_copy(update={"runtime": books.config.runtime.model_copy(update=place)})
        clean = Books(config)
        rebuild = _Rebuild(
            books, clean, run_tasks=run_tasks, train_work=train_work, from_scratch=from_scratch, trigger=release.trigger
        )
        verdict: Literal["equal", "differs", "not rebuildable"] = "equal"
        reason = ""
        try:
            rebuild.of(release.model, is_own=True)
            rebuild.of(release.scorecard, is_own=True)
        except _NotRebuildableError as error:
            verdict, reason = "not rebuildable", str(error)
        except _DiffersError as error:
            verdict, reason = "differs", str(error)
        except AIFactoryError as error:
            # What the stages say of sources, models or places that are not as they were.
            verdict, reason = "not rebuildable", str(error)
        finally:
            clean.close()
    return Verification(
        release=release.name,
        verdict=verdict,
        reason=reason,
        from_scratch=from_scratch,
        checks=rebuild.checks,
        seconds=timer.seconds,
    )


class _DiffersError(Exception):
    """An artifact is not what its record says."""


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
                f"{field} {_shown(now)}, recorded {_shown(then)}" for field, (then, now) in differing.items()
            )
            raise _NotRebuildableError(
                f"{self._expected.id} would be {identity.noun.kind}/{identity.fingerprint[:16]} now: "
                + (
                    said
                    or "what it is made from is not what it was (a folder, a tokenizer or a base model that was changed)"
                )
            )
        return super().make(cycle, identity, write, **told)


class _Rebuild:
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
        Raises   _NotRebuildableError, _DiffersError.
        """
        if artifact_id in self._there:
            return self._there[artifact_id]
        kind = artifact_id.partition("/")[0]
        try:
            artifact = self._books.artifacts.get(_NOUNS[kind], artifact_id)
        except ErasedError as error:
            erased = self._books.artifacts.erased(artifact_id)
            assert erased is not None
            raise _NotRebuildableError(f"erased by {erased.erasure} ({artifact_id})") from error
        except StorageError as error:
            raise _NotRebuildableError(f"{artifact_id} is gone: {error}") from error
        maker = self._makers.get(artifact_id)
        if is_own and maker is not None:
            self._own.add(maker)
        self._there[artifact_id] = (
            self._rebuilt(artifact, self._cycle(artifact_id))
            if kind != FeedbackBatch.kind and (self._from_scratch or maker in self._own)
            else self._taken(artifact)
        )
        return self._there[artifact_id]

    def _get(self, noun: type[Noun], artifact_id: str) -> Noun:
        found = self.of(artifact_id)
        assert isinstance(found, noun)
        return found

    def _cycle(self, artifact_id: str) -> Cycle:
        trigger = self._makers.get(artifact_id)
        cycle = None if trigger is None else self._books.journal.cycle(trigger)
        if cycle is None:
            raise _NotRebuildableError(f"the journal does not say in which cycle {artifact_id} was made")
        return cycle

    # ── taken ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _taken(self, artifact: Artifact) -> Artifact:
        """Copy it, file by file, each with its hash; its record, and the books' index, must say the same."""
        timer = Timer()
        folder = self._books.artifacts.folder(artifact.kind, artifact.fingerprint)
        found = []
        for file in artifact.record.files:
            data = self._books.storage.read_bytes(*folder, *file.name.split("/"))
            if data is None:
                raise _NotRebuildableError(f"{artifact.uri}/{file.name} is gone")
            self._clean.storage.write_bytes(data, *folder, *file.name.split("/"), durable=False)
            found.append(replace(file, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
        self._clean.storage.write_bytes(artifact.record.to_json().encode(), *folder, RECORD_NAME, durable=False)
        self._compare(artifact, found, "taken", {}, timer.seconds)
        return type(artifact)(record=artifact.record, uri=self._clean.storage.path(*folder))

    # ── rebuilt ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _rebuilt(self, artifact: Artifact, cycle: Cycle) -> Artifact:
        self._require_stored(artifact)
        _require_version(artifact)
        try:
            config = self._config_of(artifact, cycle)
            make = self._maker_of(artifact, cycle, config)
        except ValidationError as error:
            raise _NotRebuildableError(
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
            return lambda: Corpora(bench).of_sources(cycle, pieces)
        if isinstance(artifact, TokenSet):
            tokenizer = None if "vocab_size" in record.recipe else self._tokenizer_of(cycle, config)
            return lambda: TokenSets(bench).of(cycle, corpora[0], tokenizer=tokenizer)
        if isinstance(artifact, Model):
            token_sets = [self._get(TokenSet, each) for each in record.inputs if each.startswith("tokens/")]
            base = models[0] if models else None if "architecture" in record.recipe else self._base_of(cycle)
            recipe = Train.model_validate(record.recipe["train"])
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
        """The corpora on which the model that a cycle goes on from was trained."""
        if cycle.bound.parent is None:
            return set()
        parent = self._books.artifacts.get(Model, cycle.bound.parent)
        token_ids = [each for each in parent.record.inputs if each.startswith("tokens/")]
        return {self._books.artifacts.get(TokenSet, each).record.inputs[0] for each in token_ids}

    def _listing(self, config: Config, cycle: Cycle, corpus: Corpus) -> Listing:
        """What the sources hold, if it is what they held."""
        listing = self._listings.get(cycle.trigger)
        if listing is None:
            try:
                listing = self._listings[cycle.trigger] = list_pieces(config.ingest.sources)
            except ConfigError as error:
                raise _NotRebuildableError(f"the sources of {corpus.id} are not there any more: {error}") from error
        if listing.digest != cycle.bound.sources_digest:
            raise _NotRebuildableError(
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

    # ── by which recipe ───────────────────────────────────────────────────────────────────────────────────────────────

    def _config_of(self, artifact: Artifact, cycle: Cycle) -> Config:
        """The configuration by which it was made: recipes of the records, places of today, the recorded execution."""
        config, recipe = self._clean.config, artifact.record.recipe
        told = cycle.recipe
        update: dict[str, Any] = {
            name: section.model_validate(self._with_places(told[name]))
            for name, section in (
                ("train", Train),
                ("tokenize", Tokenize),
                ("evaluate", Evaluate),
                ("improve", Improve),
            )
            if name in told
        }
        if "chat_fallback" in recipe:
            update["serve"] = config.serve.model_copy(update={"chat_fallback": recipe["chat_fallback"]})
        if isinstance(artifact, Corpus):
            update["ingest"] = config.ingest.model_copy(update=self._ingest_of(artifact, cycle))
            improve = update.get("improve", config.improve)
            trust = recipe.get("trust")
            as_then = {
                "holdout_share": recipe["holdout_share"],
                "trust": None if trust is None else FeedbackTrust.model_validate(trust),
            }
            update["improve"] = improve.model_copy(update=as_then)
        elif isinstance(artifact, TokenSet):
            names = [name for name in Tokenize.model_fields if name in recipe]
            tokenize = update.get("tokenize", config.tokenize)
            update["tokenize"] = tokenize.model_copy(update={name: recipe[name] for name in names})
        elif isinstance(artifact, Model) and "architecture" in recipe:
            architecture = Architecture.model_validate(recipe["architecture"])
            update["model"] = config.model.model_copy(update={"architecture": architecture})
        elif isinstance(artifact, Scorecard):
            values = {name: recipe[name] for name in Evaluate.model_fields if name in recipe}
            update["evaluate"] = Evaluate.model_validate(self._with_places(values))
        update["runtime"] = self._runtime_of(artifact.record)
        return config.model_copy(update=update)

    def _with_places(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """A recorded section, with what bears no identity as the configuration of today has it."""
        today, told = self._clean.config.evaluate, dict(section)
        if (judge := told.pop("judge", None)) is not None and today.judge is not None:
            places = {"url", "api_key", "labelled", "timeout_s", "concurrency"}
            told["judge"] = {**judge, **today.judge.model_dump(include=places)}
        if (tasks := told.pop("lm_eval", None)) is not None and today.lm_eval is not None:
            tasks = {name: value for name, value in tasks.items() if name != "include"}
            places = {"include_path", "batch_size", "timeout_s"}
            told["lm_eval"] = {**tasks, **today.lm_eval.model_dump(include=places)}
        return told  # where there is nobody to ask, what is made is told apart by its identity

    def _ingest_of(self, corpus: Corpus, cycle: Cycle) -> dict[str, Any]:
        recipe = corpus.record.recipe
        digests = {}
        for name, bound in cycle.bound.models:
            digests[self._books.artifacts.get(Model, bound).digest if name.startswith(REFERENCE) else bound] = name
        steps = []
        for step in recipe["steps"]:
            plain = {name: value for name, value in step.items() if name not in ("model_digest", "function_source")}
            if "model_digest" in step:
                if step["model_digest"] not in digests:
                    raise _NotRebuildableError(
                        f"the model that the step {step['step']} of {corpus.id} asked (sha256 {step['model_digest'][:16]}) is "
                        f"none to which {cycle.trigger} was bound"
                    )
                plain["model"] = digests[step["model_digest"]]
            steps.append(TypeAdapter(Step).validate_python(plain))
        values: dict[str, Any] = {
            "steps": tuple(steps),
            "holdout_share": recipe["holdout_share"],
            "holdout_strata": tuple(HoldoutStratum.model_validate(each) for each in recipe["holdout_strata"]),
        }
        if "sources" in recipe:
            values["sources"] = tuple(self._source_of(each, corpus) for each in recipe["sources"])
        return values

    def _source_of(self, recorded: Mapping[str, Any], corpus: Corpus) -> Source:
        """A source by its recorded recipe, at the place that the configuration names today."""
        config = self._books.config
        today = next((source for source in config.ingest.sources if source.name == recorded["name"]), None)
        if today is None or today.kind != recorded["kind"]:
            raise _NotRebuildableError(
                f"the configuration names no source {recorded['name']!r} of kind {recorded['kind']} any more, of which {corpus.id} "
                "was made"
            )
        places = {name: value for name, value in today.model_dump(mode="json").items() if name not in today.recipe()}
        source: Source = TypeAdapter(Source).validate_python({**places, **recorded})
        if isinstance(source, FeedbackSource):
            return source.belonging_to(config.name, self._books.database.url.render_as_string(hide_password=False))
        return source

    def _tokenizer_of(self, cycle: Cycle, config: Config) -> Model | Path:
        if cycle.bound.parent is not None:
            return self._get(Model, cycle.bound.parent)
        return Path(config.tokenize.tokenizer).expanduser() if not self._base_name(cycle) else self._base_of(cycle)

    def _base_of(self, cycle: Cycle) -> Path:
        from aifactory.train.base import resolve_base

        base = self._base_name(cycle)
        if base is None:
            raise _NotRebuildableError(f"{cycle.trigger} does not say from which model training began")
        return resolve_base(base)

    def _base_name(self, cycle: Cycle) -> str | None:
        base: str | None = cycle.recipe.get("model", {}).get("base", self._books.config.model.base)
        return base

    def _runtime_of(self, record: Record) -> Any:
        """Workers, threads, micro-batch and how a step is computed, as recorded."""
        runtime, told = self._clean.config.runtime, record.execution
        update: dict[str, Any] = {name: told[name] for name in ("workers", "micro_batch_rows") if name in told}
        if isinstance(update.get("workers"), list):
            update["workers"] = tuple(update["workers"])
        if told.get("parallel") in ("ddp", "fsdp"):
            update["parallel"] = told["parallel"]
        if "step" in told:
            update["execution"] = StepExecution.model_validate(told["step"])
        if "threads_per_worker" in told and max(1, int(runtime.cpus_per_worker)) != told["threads_per_worker"]:
            update["cpus_per_worker"] = float(told["threads_per_worker"])
        return runtime.model_copy(update=update)

    # ── compared ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _require_stored(self, artifact: Artifact) -> None:
        """What lies in the storage must be what the record says: that is what is served."""
        folder = self._books.artifacts.folder(artifact.kind, artifact.fingerprint)
        for file in artifact.record.files:
            data = self._books.storage.read_bytes(*folder, *file.name.split("/"))
            if data is None or hashlib.sha256(data).hexdigest() != file.sha256:
                found = "none" if data is None else f"sha256 {hashlib.sha256(data).hexdigest()[:16]}"
                raise _DiffersError(
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
    ) -> None:
        """Keep what was found. Raises _DiffersError, or _NotRebuildableError where the execution is another one."""
        record = artifact.record
        tree = self._books.lineage.tree(artifact.id)
        if tree is not None and tree.digest != record.digest:
            raise _DiffersError(
                f"the record of {artifact.id} says digest {record.digest[:16]}, the books {str(tree.digest)[:16]}: one of them was "
                "changed"
            )
        if digest_of(record.files) != record.digest:
            raise _DiffersError(
                f"the record of {artifact.id} lists files that do not have its digest {record.digest[:16]}"
            )
        if isinstance(artifact, TokenSet):
            recorded, found = (
                [file for file in each if file.name.startswith(_TOKENIZER)] for each in (record.files, files)
            )
            self._keep(f"tokenizer of {artifact.id}", recorded, found, how, execution, 0.0)
        self._keep(artifact.id, record.files, files, how, execution, seconds)

    def _keep(
        self,
        name: str,
        recorded: Sequence[StoredFile],
        found: Sequence[StoredFile],
        how: How,
        execution: Mapping[str, tuple[Any, Any]],
        seconds: float,
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
        )
        self.checks.append(check)
        if check.is_equal:
            return
        if how == "rebuilt" and execution:
            what = "another instruction set" if any(each in execution for each in _MACHINE) else "another execution"
            said = "; ".join(
                f"{field} {_shown(now)}, recorded {_shown(then)}" for field, (then, now) in execution.items()
            )
            raise _NotRebuildableError(f"{name} comes out with other bytes under {what}: {said}")
        raise _DiffersError(f"{name} is the first that differs, in {', '.join(differing)}")


def _require_version(artifact: Artifact) -> None:
    """Raises _NotRebuildableError if the stage has changed what it makes since."""
    from aifactory.evaluate.pipeline import CODE_VERSION as EVALUATE
    from aifactory.ingest.pipeline import CODE_VERSION as INGEST
    from aifactory.tokens.pipeline import CODE_VERSION as TOKENIZE
    from aifactory.train.trainer import CODE_VERSION as TRAIN

    now = {Corpus.kind: INGEST, TokenSet.kind: TOKENIZE, Model.kind: TRAIN, Scorecard.kind: EVALUATE}[artifact.kind]
    if now != artifact.record.code_version:
        raise _NotRebuildableError(
            f"{artifact.id} was made by version {artifact.record.code_version} of its stage, this is version {now}: use the release "
            "of this program that made it"
        )


def _shown(value: Any) -> str:
    text = " ".join(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else str(value)
    return text if len(text) <= 120 else text[:119] + "…"
