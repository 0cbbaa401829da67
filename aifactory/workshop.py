"""The workshop: each stage with its identity. What a stage makes is looked for by its fingerprint before it is made.

A fingerprint holds the stage's recipe, its inputs' fingerprints and its code version; the runtime is in none of them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow.compute as pc

from aifactory.cluster.tasks import RunTasks, run_here, run_threads
from aifactory.config import Columns, Config, Ingest, NearDuplicatesStep, ParquetSource, Train
from aifactory.errors import StateError, StorageError, TrainingError
from aifactory.ingest.decisions import Earlier
from aifactory.ingest.index import Index, held_out, joined, read_index, sign, signature_recipe
from aifactory.ingest.listing import Piece, list_pieces
from aifactory.ingest.model_scores import StepModel, Stored
from aifactory.ingest.pipeline import CODE_VERSION as INGEST_VERSION
from aifactory.ingest.pipeline import Work, ingest_pieces
from aifactory.ingest.steps import step_recipes
from aifactory.model_card import CARD, CHART, model_card
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

    def __init__(
        self,
        config: Config,
        books: Books,
        *,
        run_tasks: Callable[[], RunTasks],
        runs_at_once: Callable[[int], int] = lambda most: 1,
    ) -> None:
        """`run_tasks` connects to the cluster: it is called only where something is to be made. `runs_at_once`, too: it says
        how many training runs there is room for, at most so many.
        """
        self.config = config
        self.books = books
        self.run_tasks = run_tasks
        self.runs_at_once = runs_at_once
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
        recipe["chat_fallback"] = self.chat_fallback
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
                chat_fallback=self.chat_fallback,
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
    def chat_fallback(self) -> str:
        """The template of chats for a tokenizer that has none: the server's."""
        return self.config.serve.chat_template or "none"

    # ── train ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def train(
        self,
        cycle: Cycle,
        token_sets: Sequence[TokenSet],
        *,
        recipes: Sequence[Train],
        shares: Sequence[float],
        base: Model | Path | None,
    ) -> list[Model]:
        """For each recipe a model trained on the token sets, mixed by `shares`, from `base` or from scratch.

        As many are trained at once as there is room for. Where one fails the others are trained to their ends, and wait in
        the storage for the same command.
        """

        def train(recipe: Train, at_once: int) -> Model:
            try:
                return self._train(cycle, token_sets, recipe, shares, base, at_once=at_once)
            except TrainingError as error:
                if len(recipes) == 1:
                    raise
                raise TrainingError(
                    f"train.candidates[{recipes.index(recipe)}]: {error} The other candidates are trained all the same; "
                    "without this one the same command goes on with them."
                ) from error

        missing = [recipe for recipe in recipes if self._trained(token_sets, recipe, shares, base) is None]
        if len(missing) > 1:
            at_once = self.runs_at_once(len(missing))
            log_event("training", candidates=len(missing), at_once=at_once)
            run_threads([partial(train, recipe, at_once) for recipe in missing], at_once=at_once)
        return [train(recipe, 1) for recipe in recipes]

    def _trained(
        self, token_sets: Sequence[TokenSet], recipe: Train, shares: Sequence[float], base: Model | Path | None
    ) -> Model | None:
        """The model that a recipe asks for, if it is there."""
        from aifactory.train.trainer import CODE_VERSION

        identity = self._training_identity(token_sets, recipe, shares, base)
        return self.books.artifacts.find(Model, _fingerprint_of(Model, CODE_VERSION, **identity))

    def _training_identity(
        self, token_sets: Sequence[TokenSet], recipe: Train, shares: Sequence[float], base: Model | Path | None
    ) -> dict[str, Any]:
        """What identifies a model: recipe, contents and inputs, as `_make` takes them."""
        contents: list[str] = []
        if isinstance(base, Path):
            from aifactory.train.base import digest_folder

            contents = [digest_folder(base)]
        plain: dict[str, Any] = {"train": recipe.model_dump(mode="json"), "shares": list(shares)}
        if base is None:
            plain["architecture"] = self.config.model.architecture.model_dump(mode="json")
        inputs = [*token_sets, *([base] if isinstance(base, Model) else [])]
        return {"recipe": plain, "contents": contents, "inputs": inputs}

    def _train(
        self,
        cycle: Cycle,
        token_sets: Sequence[TokenSet],
        recipe: Train,
        shares: Sequence[float],
        base: Model | Path | None,
        *,
        at_once: int,
    ) -> Model:
        from aifactory.tokens.pipeline import sources_of
        from aifactory.train.trainer import CODE_VERSION, prove, train_on_ray

        def make(target: tuple[str, ...]) -> Made:
            run = self.run_tasks()
            task = self._work(target, token_sets, recipe, shares, base)
            exported = train_on_ray(task, name=f"train-{target[-1]}", runtime=self.config.runtime)
            # Law 7, before there is a record: a process that never saw the trainer loads what it exported.
            (parity,) = run(prove, [(task, self.config.promote.parity_tolerance)])
            # Law 3: what was read of which rows, and how often, stands in the record of the model.
            mixed = [
                {"tokens": tokens.id, "sources": sources_of(tokens, names), **asdict(drawn)}
                for tokens, names, drawn in self._drawn(token_sets, recipe, shares)
            ]
            files = [StoredFile(**file) for file in exported["files"]]
            return Made(files=files, figures=exported["figures"] | {"mixture": mixed, "parity": parity})

        model = self._make(
            cycle,
            "trained",
            Model,
            CODE_VERSION,
            **self._training_identity(token_sets, recipe, shares, base),
            make=make,
            num_cpus=self.config.runtime.most_workers * self.config.runtime.cpus_per_worker,
            share=1 / at_once,
            train=recipe,
        )
        self._clear_run("runs", f"train-{model.fingerprint[:16]}")
        self._write_card(model, None)
        return model

    def _write_card(self, model: Model, scorecard: Scorecard | None) -> None:
        """What a person reads of a model; without a scorecard only where there is no card yet."""
        from aifactory.train.loss_chart import loss_chart

        storage, folder = self.books.storage, self.books.artifacts.folder(model.kind, model.fingerprint)
        old = storage.read_bytes(*folder, CARD)
        if old is not None and scorecard is None:
            return
        inputs = model.record.inputs
        token_sets = [self.books.artifacts.get(TokenSet, each) for each in inputs if each.startswith(TokenSet.kind)]
        parent = next((each for each in inputs if each.startswith(Model.kind)), None)
        recipes = [recipe.model_dump(mode="json") for recipe in self.config.train.recipes()]
        card = model_card(
            self.config.name,
            model,
            corpora=[self.books.artifacts.get(Corpus, tokens.record.inputs[0]) for tokens in token_sets],
            scorecard=scorecard,
            base=None if "architecture" in model.record.recipe else _public_name(self.config.model.base),
            parent=parent,
            num_candidates=len(recipes) if model.record.recipe["train"] in recipes else 1,
            licenses={source.name: source.license for source in self.config.ingest.sources if source.license},
        ).encode()
        if card != old:
            if curve := model.figures.get("curve"):
                storage.write_bytes(loss_chart([(step, loss) for step, loss in curve]).encode(), *folder, CHART)
            storage.write_bytes(card, *folder, CARD)

    def _clear_run(self, *folder: str) -> None:
        """The record is there, so nobody resumes the run any more: only what a person looks at is left of it."""
        from aifactory.train.run_log import KEPT

        for name in self.books.storage.names(*folder):
            if name not in KEPT:
                self.books.storage.delete_any(*folder, name)

    def _work(
        self,
        target: tuple[str, ...],
        token_sets: Sequence[TokenSet],
        recipe: Train,
        shares: Sequence[float],
        base: Model | Path | None,
    ) -> Any:
        from aifactory.train.execution import Execution
        from aifactory.train.trackers import tracker_environment
        from aifactory.train.work import RowSet, Stored, Work

        run_folder = ("runs", f"train-{target[-1]}")
        every, held_out = self._held_out(token_sets, recipe, run_folder)

        def stored(artifact: Artifact, names: Sequence[str]) -> Stored:
            return Stored(folder=self.books.artifacts.folder(artifact.kind, artifact.fingerprint), names=tuple(names))

        def names(artifact: Artifact, prefix: str = "") -> list[str]:
            return [file.name for file in artifact.record.files if file.name.startswith(prefix)]

        runtime = self.config.runtime
        return Work(
            storage=self.books.storage,
            run_folder=run_folder,
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
            factory=self.config.name,
            trackers=runtime.trackers,
            environment=tracker_environment(),
            execution=Execution(**runtime.execution.model_dump()),
            keep_checkpoints=runtime.keep_checkpoints,
            hang_timeout_s=runtime.hang_timeout_s,
            held_out=None if held_out is None else Stored(folder=(*run_folder, "holdout"), names=(held_out,)),
            validate_every_steps=every,
            validates_itself=False,
        )

    def _held_out(
        self, token_sets: Sequence[TokenSet], recipe: Train, run_folder: tuple[str, ...]
    ) -> tuple[int, str | None]:
        """Every how many steps a run is validated, and the file of the rows that it is validated on; none where it is not."""
        stopping, runtime = recipe.early_stopping, self.config.runtime
        every = runtime.validate_every_steps if stopping is None else stopping.every_steps
        if every is None:
            return 0, None
        from aifactory.tokens.holdout import pack_held_out
        from aifactory.tokens.pipeline import TOKENIZER_FOLDER

        first = token_sets[0]
        names = [file.name for file in first.record.files if file.name.startswith(f"{TOKENIZER_FOLDER}/")]
        file = pack_held_out(
            [self.books.artifacts.get(Corpus, tokens.record.inputs[0]) for tokens in token_sets],
            tokenizer_folder=self.books.artifacts.fetch(first, names) / TOKENIZER_FOLDER,
            chat_fallback=self.chat_fallback,
            row_len=first.figures["row_len"],
            rows=runtime.validate_rows if stopping is None else stopping.rows,
            storage=self.books.storage,
            target=(*run_folder, "holdout"),
            objective=recipe.objective,
        )
        return every, file

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

        plain = dict(self.config.recipe("evaluate")["evaluate"]) | {"chat_fallback": self.chat_fallback}
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
                chat_fallback=self.chat_fallback,
            )
            return Made(files=evaluated.files, figures=evaluated.figures)

        scorecard = self._make(
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
        self._write_card(model, scorecard)
        return scorecard

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
        share: float = 1.0,
        train: Train | None = None,
    ) -> Noun:
        """The artifact with this identity: as it is there, or made, published, and then entered into the books.

        share   of the node's energy, where as much again runs beside it
        train   the recipe by which it runs, where the configuration's is not that
        """
        identity = _fingerprint_of(noun, code_version, recipe=recipe, contents=contents, inputs=inputs)
        books = self.books
        artifact = books.artifacts.find(noun, identity)
        if artifact is None:
            watts = self.config.runtime.watts_per_cpu
            with measured(num_cpus=num_cpus, watts_per_cpu=watts, share=share) as energy:
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
                    execution=self._execution(train or self.config.train),
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

    def _execution(self, train: Train) -> dict[str, Any]:
        runtime = self.config.runtime
        return {
            "workers": runtime.workers,
            "threads_per_worker": train.threads or max(1, int(runtime.cpus_per_worker)),
            "micro_batch_rows": train.micro_batch_rows or runtime.micro_batch_rows,
            "parallel": "tree" if train.is_across_workers else runtime.parallel,
            "step": runtime.execution.model_dump(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "cpu_flags": _cpu_flags(),
            **{name: version(name) for name in (*_LIBRARIES, *(["peft"] if train.lora else []))},
        }


def _fingerprint_of(
    noun: type[Artifact],
    code_version: int,
    *,
    recipe: Mapping[str, Any],
    contents: Sequence[str],
    inputs: Sequence[Artifact],
) -> str:
    return fingerprint(
        stage=noun.kind,
        code_version=code_version,
        recipe=recipe,
        inputs=[*contents, *(artifact.fingerprint for artifact in inputs)],
    )


def _public_name(base: str | None) -> str | None:
    """A hub id as it is; of a folder the last part alone, as a card goes where the folder does not."""
    folder = None if base is None else Path(base).expanduser()
    return folder.resolve().name if folder is not None and folder.is_dir() else base


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
