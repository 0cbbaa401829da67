"""The workshop: each stage with its identity. What a stage makes is looked for by its fingerprint before it is made.

A fingerprint holds the stage's recipe, its inputs' fingerprints and its code version; the runtime is in none of them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow.compute as pc

from aifactory.cluster.tasks import RunTasks, run_here
from aifactory.config import Columns, Config, Ingest, NearDuplicatesStep, ParquetSource, Train
from aifactory.errors import StateError, StorageError
from aifactory.ingest.decisions import Earlier
from aifactory.ingest.index import Index, held_out, joined, read_index, sign, signature_recipe
from aifactory.ingest.listing import Piece, list_pieces
from aifactory.ingest.model_scores import StepModel, Stored
from aifactory.ingest.pipeline import CODE_VERSION as INGEST_VERSION
from aifactory.ingest.pipeline import Work, ingest_pieces
from aifactory.ingest.steps import step_recipes
from aifactory.observe.energy import measured
from aifactory.observe.events import log_event
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
from aifactory.records.identity import fingerprint
from aifactory.records.journal import Cycle
from aifactory.records.registry import REFERENCE
from aifactory.records.rows import index_names, read_ledger, read_part
from aifactory.records.storage import StoredFile

if TYPE_CHECKING:
    from aifactory.train.mixture import Drawn

Noun = TypeVar("Noun", bound=Artifact)
FEEDBACK = "feedback"
_LIBRARIES = ("ray", "torch", "transformers", "tokenizers", "pyarrow", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a stage has written."""

    files: Sequence[StoredFile]
    figures: Mapping[str, Any]


class Workshop:
    """Makes the nouns of the loop for one factory."""

    def __init__(self, config: Config, books: Books, *, run_tasks: Callable[[], RunTasks]) -> None:
        """`run_tasks` connects to the cluster: it is called only where something is to be made."""
        self.config = config
        self.books = books
        self.run_tasks = run_tasks
        self._folder_models: dict[str, StepModel] = {}

    # ── ingest ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def ingest_sources(self, cycle: Cycle, pieces: Sequence[Piece]) -> Corpus:
        """The corpus of the configuration's sources."""
        return self._ingest(cycle, pieces, self.config.ingest, [cycle.bound.sources_digest], ancestors=[], batch=None)

    def ingest_batch(self, cycle: Cycle, batch: FeedbackBatch, ancestors: Sequence[Corpus]) -> Corpus:
        """The corpus of one feedback batch: no row of it that an ancestor has trained or was judged on.

        Feedback is what a person wrote: rules for collected text would throw short answers away.
        """
        recipe = self.config.ingest.model_copy(
            update={
                "holdout_share": self.config.improve.holdout_share,
                "holdout_strata": (),
                "steps": tuple(step for step in self.config.ingest.steps if step.FOR_FEEDBACK),
            }
        )
        answers = {
            "likelihood": {"text": "text"},
            "dpo": {"chosen": "text", "rejected": "rejected"},
            "kto": {"text": "text", "label": "label"},
        }[self.config.train.objective]
        told = {"prompt": "prompt", "user": "user", "origin": "completion"}
        columns = Columns.model_validate(answers | told)
        source = ParquetSource(
            name=FEEDBACK,
            kind="parquet",
            path=str(self.books.artifacts.fetch(batch)),
            include=("*.parquet",),
            columns=columns,
        )
        pieces = list_pieces([source]).pieces
        return self._ingest(cycle, pieces, recipe, [batch.fingerprint], ancestors=ancestors, batch=batch)

    def _ingest(
        self,
        cycle: Cycle,
        pieces: Sequence[Piece],
        recipe: Ingest,
        contents: Sequence[str],
        *,
        ancestors: Sequence[Corpus],
        batch: FeedbackBatch | None,
    ) -> Corpus:
        models, releases = self._step_models(cycle, recipe)
        plain = {
            "steps": step_recipes(recipe.steps, models),
            "holdout_share": recipe.holdout_share,
            "holdout_strata": [stratum.model_dump(mode="json") for stratum in recipe.holdout_strata],
        }
        restored: Sequence[tuple[str, str]] = ()
        if batch is None:
            plain["sources"] = [source.recipe() for source in recipe.sources]
            plain["restored"] = [list(each) for each in cycle.bound.restored]
            restored = cycle.bound.restored
        elsewhere = [
            self.books.artifacts.get(Corpus, corpus_id)
            for corpus_id in cycle.bound.holdouts
            if corpus_id not in {corpus.id for corpus in ancestors}
        ]

        def make(target: tuple[str, ...]) -> Made:
            near = recipe.near_duplicates
            earlier = Earlier(
                ancestors=joined([self._index_of(corpus, near) for corpus in ancestors]),
                holdouts=joined([held_out(self._index_of(corpus, near)) for corpus in elsewhere]),
                corpora=[*ancestors, *elsewhere],
            )
            ingested = ingest_pieces(
                pieces,
                Work.of(recipe, self.books.storage, restored=self._restored(restored), models=models),
                name=self.config.name,
                earlier=earlier,
                target=target,
                run=self._run_for(sum(piece.num_bytes for piece in pieces)),
            )
            return Made(files=ingested.files, figures=ingested.figures)

        return self._make(
            cycle,
            "ingested",
            Corpus,
            INGEST_VERSION,
            recipe=plain,
            contents=contents,
            inputs=[*ancestors, *elsewhere, *([batch] if batch is not None else []), *releases],
            make=make,
            num_cpus=self.config.runtime.data_tasks * self.config.runtime.cpus_per_worker,
        )

    def bound_models(self) -> list[tuple[str, str]]:
        """What the models that steps ask are now: the id of a release's model, or the digest of a folder.

        Raises   StateError for a release that is not there; ConfigError for a folder or a hub id that is not.
        """
        names = self.config.ingest.models
        folders = [name for name in names if not name.startswith(REFERENCE)]
        return self.books.registry.bound_models(names) + [(name, self._folder_model(name).digest) for name in folders]

    def _step_models(self, cycle: Cycle, recipe: Ingest) -> tuple[dict[str, StepModel], list[Model]]:
        """The models that steps ask, by their names in the configuration; and those of them that the factory made.

        A name of the registry stands for what it stood for when the cycle began, whatever was promoted since.
        """
        bound = dict(cycle.bound.models)
        models: dict[str, StepModel] = {}
        releases: dict[str, Model] = {}
        for name in recipe.models:
            if not name.startswith(REFERENCE):
                models[name] = self._folder_model(name)
                continue
            if name not in bound:
                raise StateError(
                    f"expected the cycle {cycle.trigger} to be bound to the model that {name} stands for, found it bound to "
                    f"{sorted(bound) or 'none'}: the steps were changed since it began. Begin a new cycle: aifactory run."
                )
            model = self.books.artifacts.get(Model, bound[name])
            releases[model.id] = model
            files = Stored(
                storage=self.books.storage,
                folder=self.books.artifacts.folder(model.kind, model.fingerprint),
                names=tuple(file.name for file in model.record.files),
            )
            models[name] = StepModel(digest=model.digest, files=files)
        return models, list(releases.values())

    def _folder_model(self, name: str) -> StepModel:
        """A model by its folder or hub id; read once."""
        if name not in self._folder_models:
            from aifactory.train.base import digest_folder, resolve_base

            folder = resolve_base(name, where="the model of a step of ingest.steps").absolute()
            self._folder_models[name] = StepModel(digest=digest_folder(folder), files=folder)
        return self._folder_models[name]

    def _run_for(self, num_bytes: int) -> RunTasks:
        """How to run tasks over so much data: what is little is done here, before workers elsewhere would have started."""
        return run_here if num_bytes <= self.config.runtime.inline_bytes else self.run_tasks()

    def _index_of(self, corpus: Corpus, near: NearDuplicatesStep | None) -> Index:
        """The index of all rows of a corpus, signed as the step asks."""
        storage = self.books.storage
        recipe = None if near is None else signature_recipe(near)
        indexes = []
        for name in index_names(corpus):
            data = storage.read_bytes(corpus.kind, corpus.fingerprint[:16], name)
            if data is None:
                raise StorageError(f"expected {corpus.uri}/{name}, found no such file; ingest again from another root.")
            index = read_index(data)
            if near is not None and corpus.figures["signature"] != recipe:
                index = replace(index, signatures_NP=sign(read_part(storage, corpus, name), near))
            indexes.append(index if near is not None else replace(index, signatures_NP=None))
        return joined(indexes)

    def _restored(self, asked_for: Sequence[tuple[str, str]]) -> dict[str, frozenset[str]]:
        """By rule the keys of the rows that a person has brought back from the ledgers."""
        keys: dict[str, set[str]] = {}
        for corpus_id, rule in asked_for:
            corpus = self.books.artifacts.get(Corpus, corpus_id)
            for table in read_ledger(self.books.storage, corpus, columns=["rule", "key"]):
                found = table.filter(pc.equal(table["rule"], rule))["key"].to_pylist()
                keys.setdefault(rule, set()).update(filter(None, found))
        return {rule: frozenset(found) for rule, found in keys.items()}

    # ── tokenize ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def tokenize(self, cycle: Cycle, corpus: Corpus, *, tokenizer: Model | Path | None) -> TokenSet:
        """The token set of a corpus, with the tokenizer of a model or a folder, or one that is trained on the corpus."""
        from aifactory.tokens.pipeline import CODE_VERSION, read_tokenizer, tokenize_corpus

        recipe = self.config.recipe("tokenize")["tokenize"]
        contents: list[str] = []
        folder = self.books.artifacts.fetch(tokenizer) if isinstance(tokenizer, Model) else tokenizer
        if folder is not None:
            from aifactory.records.identity import hash_parts

            # Which tokenizer it is counts, not which model or folder it came from.
            contents = [hash_parts(*(f"{name}:{data!r}" for name, data in sorted(read_tokenizer(folder).items())))]
            recipe = {"row_len": recipe["row_len"]}
        recipe["chat_fallback"] = self._chat_fallback
        if self.config.train.is_preference:
            recipe["objective"] = self.config.train.objective

        def make(target: tuple[str, ...]) -> Made:
            tokenized = tokenize_corpus(
                corpus,
                recipe=self.config.tokenize,
                tokenizer_folder=folder,
                storage=self.books.storage,
                target=target,
                run=self._run_for(corpus.figures["bytes_kept"]),
                chat_fallback=self._chat_fallback,
                objective=self.config.train.objective,
            )
            return Made(files=tokenized.files, figures=tokenized.figures)

        return self._make(
            cycle,
            "tokenized",
            TokenSet,
            CODE_VERSION,
            recipe=recipe,
            contents=contents,
            inputs=[corpus],
            make=make,
            num_cpus=self.config.runtime.data_tasks * self.config.runtime.cpus_per_worker,
        )

    @property
    def _chat_fallback(self) -> str:
        """The template of chats for a tokenizer that has none: the server's."""
        return self.config.serve.chat_template or "none"

    # ── train ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def train(
        self,
        cycle: Cycle,
        token_sets: Sequence[TokenSet],
        *,
        recipe: Train,
        shares: Sequence[float],
        base: Model | Path | None,
    ) -> Model:
        """A model trained on the token sets, mixed by `shares`, from `base` or from scratch."""
        from aifactory.tokens.pipeline import sources_of
        from aifactory.train.trainer import CODE_VERSION, train_on_ray

        contents: list[str] = []
        if isinstance(base, Path):
            from aifactory.train.base import digest_folder

            contents = [digest_folder(base)]
        plain: dict[str, Any] = {"train": recipe.model_dump(mode="json"), "shares": list(shares)}
        if base is None:
            plain["architecture"] = self.config.model.architecture.model_dump(mode="json")

        def make(target: tuple[str, ...]) -> Made:
            self.run_tasks()
            exported = train_on_ray(
                self._work(target, token_sets, recipe, shares, base),
                name=f"train-{target[-1]}",
                runtime=self.config.runtime,
            )
            # Law 3: what was read of which rows, and how often, stands in the record of the model.
            mixed = [
                {"tokens": tokens.id, "sources": sources_of(tokens, names), **asdict(drawn)}
                for tokens, names, drawn in self._drawn(token_sets, recipe, shares)
            ]
            files = [StoredFile(**file) for file in exported["files"]]
            return Made(files=files, figures=exported["figures"] | {"mixture": mixed})

        model = self._make(
            cycle,
            "trained",
            Model,
            CODE_VERSION,
            recipe=plain,
            contents=contents,
            inputs=[*token_sets, *([base] if isinstance(base, Model) else [])],
            make=make,
            num_cpus=self.config.runtime.workers * self.config.runtime.cpus_per_worker,
        )
        # The record is there: nobody resumes this run any more.
        self.books.storage.delete("runs", f"train-{model.fingerprint[:16]}")
        return model

    def _work(
        self,
        target: tuple[str, ...],
        token_sets: Sequence[TokenSet],
        recipe: Train,
        shares: Sequence[float],
        base: Model | Path | None,
    ) -> Any:
        from aifactory.train.worker import RowSet, Stored, Work

        def stored(artifact: Artifact, names: Sequence[str]) -> Stored:
            return Stored(folder=self.books.artifacts.folder(artifact.kind, artifact.fingerprint), names=tuple(names))

        def names(artifact: Artifact, prefix: str = "") -> list[str]:
            return [file.name for file in artifact.record.files if file.name.startswith(prefix)]

        runtime = self.config.runtime
        return Work(
            storage=self.books.storage,
            run_folder=("runs", f"train-{target[-1]}"),
            model_folder=target,
            recipe=recipe,
            architecture=self.config.model.architecture,
            base=stored(base, names(base)) if isinstance(base, Model) else base,
            tokenizer=stored(token_sets[0], names(token_sets[0], "tokenizer/")),
            row_sets=tuple(
                RowSet(shards=stored(tokens, names), share=drawn.share)
                for tokens, names, drawn in self._drawn(token_sets, recipe, shares)
            ),
            micro_batch_rows=runtime.micro_batch_rows,
            checkpoint_every_steps=runtime.checkpoint_every_steps,
            num_threads=recipe.threads or max(1, int(runtime.cpus_per_worker)),
            parallel=runtime.parallel,
            shard_workers=runtime.shard_workers,
        )

    def _drawn(
        self, token_sets: Sequence[TokenSet], recipe: Train, shares: Sequence[float]
    ) -> list[tuple[TokenSet, list[str], Drawn]]:
        """What is read in a run: shards of each token set, or of each source where the sources are mixed by weight."""
        from aifactory.tokens.pipeline import shard_names
        from aifactory.train.mixture import Drawn, mix

        drawn = []
        for number, (tokens, share) in enumerate(zip(token_sets, shares, strict=True)):
            draws = share * recipe.max_steps * recipe.global_batch_rows
            if number or not recipe.mixture:
                found = Drawn(share=share, epochs=draws / tokens.num_rows)
                drawn.append((tokens, shard_names(tokens.record.files), found))
                continue
            for source, of_set in mix(tokens.figures["packed_rows_of"], recipe.mixture, draws=draws).items():
                found = Drawn(share=share * of_set.share, epochs=of_set.epochs)
                drawn.append((tokens, tokens.figures["shards_of"][source], found))
        return drawn

    # ── evaluate ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def evaluate(
        self, cycle: Cycle, model: Model, *, champion: Model | None, sources: Corpus, feedback: Sequence[Corpus]
    ) -> Scorecard:
        """The scorecard of a model beside the one in production."""
        from aifactory.evaluate.pipeline import CODE_VERSION, evaluate_model

        plain = dict(self.config.recipe("evaluate")["evaluate"])
        disliked: frozenset[str] = frozenset()
        if self.config.train.objective == "kto":
            from aifactory.tokens.preferences import DISLIKED

            # A model is not judged by how likely it finds what nobody wants to hear.
            disliked = DISLIKED
            plain["leaves_out"] = sorted(disliked)

        def make(target: tuple[str, ...]) -> Made:
            evaluated = evaluate_model(
                candidate=model,
                champion=champion,
                sources=sources,
                feedback=feedback,
                recipe=self.config.evaluate,
                store=self.books.artifacts,
                target=target,
                run=self.run_tasks(),
                leave_out=disliked,
            )
            return Made(files=evaluated.files, figures=evaluated.figures)

        return self._make(
            cycle,
            "evaluated",
            Scorecard,
            CODE_VERSION,
            recipe=plain,
            contents=["champion" if champion is not None else "no champion"],
            inputs=[model, *([champion] if champion is not None else []), sources, *feedback],
            make=make,
            num_cpus=self.config.runtime.data_tasks * self.config.runtime.cpus_per_worker,
        )

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _make(
        self,
        cycle: Cycle,
        event: str,
        noun: type[Noun],
        code_version: int,
        *,
        recipe: Mapping[str, Any],
        contents: Sequence[str],
        inputs: Sequence[Artifact],
        make: Callable[[tuple[str, ...]], Made],
        num_cpus: float,
    ) -> Noun:
        """The artifact with this identity: as it is there, or made, published, and then entered into the books."""
        identity = fingerprint(
            stage=noun.kind,
            code_version=code_version,
            recipe=recipe,
            inputs=[*contents, *(artifact.fingerprint for artifact in inputs)],
        )
        books = self.books
        artifact = books.artifacts.find(noun, identity)
        if artifact is None:
            with measured(num_cpus=num_cpus, watts_per_cpu=self.config.runtime.watts_per_cpu) as energy:
                made = make(books.artifacts.folder(noun.kind, identity))
            artifact = books.artifacts.publish(
                noun,
                Record(
                    kind=noun.kind,
                    fingerprint=identity,
                    digest=digest_of(made.files),
                    code_version=code_version,
                    recipe=recipe,
                    inputs=[*(a.id for a in inputs)],
                    files=made.files,
                    figures=made.figures,
                    execution=self._execution(),
                    seconds=energy.seconds,
                    joules=energy.joules,
                    joules_source=energy.source,
                    created_at=books.journal.clock(),
                ),
            )
        # Published but not entered, or in the index and not in the journal: the process was killed between the two. Both
        # heal here.
        books.lineage.add(artifact)
        if not any(entered.subject == artifact.id for entered in books.journal.events(event=event)):
            books.journal.write(
                event,
                cycle=cycle.trigger,
                attempt=cycle.attempt,
                subject=artifact.id,
                detail=_plain(artifact.figures),
                seconds=artifact.record.seconds,
                joules=artifact.record.joules,
                joules_source=artifact.record.joules_source,
            )
            log_event(event, cycle=cycle.number, artifact=artifact.id, **_shown(artifact))
        return artifact

    def _execution(self) -> dict[str, Any]:
        runtime, train = self.config.runtime, self.config.train
        return {
            "workers": runtime.workers,
            "threads_per_worker": train.threads or max(1, int(runtime.cpus_per_worker)),
            "micro_batch_rows": train.micro_batch_rows or runtime.micro_batch_rows,
            "parallel": "tree" if train.is_across_workers else runtime.parallel,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "cpu_flags": _cpu_flags(),
            **{name: version(name) for name in (*_LIBRARIES, *(["peft"] if train.lora else []))},
        }


def _shown(artifact: Artifact) -> dict[str, object]:
    """The figures of an artifact that a person wants to see pass by."""
    keys = ("rows_in", "rows_kept", "rows_rejected", "tokens", "packed_rows", "steps", "tokens_per_s", "final_loss")
    shown: dict[str, object] = {key: artifact.figures[key] for key in keys if key in artifact.figures}
    for name in ("holdout", "target"):
        comparison = artifact.figures.get(name)
        if isinstance(comparison, Mapping) and isinstance(comparison.get("candidate"), Mapping):
            shown[f"{name}_bits_per_byte"] = comparison["candidate"]["estimate"]
    return shown | {"seconds": artifact.record.seconds}


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures without numbers that have no JSON form."""
    return {key: None if value != value else value for key, value in figures.items()}


def _cpu_flags() -> list[str]:
    """Instruction sets that change how sums are made; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return sorted(flag for flag in flags if flag.startswith(("avx", "amx", "fma")))
