"""The workshop: each stage with its identity. What a stage makes is looked for by its fingerprint before it is made.

A fingerprint holds the stage's recipe, its inputs' fingerprints and its code version; the runtime is in none of them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from aifactory.cluster.tasks import RunTasks
from aifactory.config import Columns, Config, Ingest, Train
from aifactory.ingest.pipeline import CODE_VERSION as INGEST_VERSION
from aifactory.ingest.pipeline import ingest_files
from aifactory.ingest.sources import SourceFile
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
from aifactory.records.rows import read_corpus
from aifactory.records.storage import StoredFile

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

    # ── ingest ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def ingest_sources(self, cycle: Cycle, files: Sequence[SourceFile]) -> Corpus:
        """The corpus of the configuration's sources."""
        return self._ingest(cycle, files, self.config.ingest, [cycle.bound.sources_digest], [], None)

    def ingest_batch(self, cycle: Cycle, batch: FeedbackBatch, ancestors: Sequence[Corpus]) -> Corpus:
        """The corpus of one feedback batch: no row of it that an ancestor has trained or was judged on."""
        recipe = self.config.ingest.model_copy(
            update={"holdout_share": self.config.improve.holdout_share, "filters": ()}
        )
        folder = self.books.artifacts.fetch(batch)
        files = [
            SourceFile(
                source=FEEDBACK,
                kind="parquet",
                origin=batch.id,
                path=str(folder / file.name),
                num_bytes=file.num_bytes,
                sha256=file.sha256,
                columns=Columns(text="text", prompt="prompt"),
            )
            for file in batch.record.files
        ]
        return self._ingest(cycle, files, recipe, [batch.fingerprint], ancestors, batch)

    def _ingest(
        self,
        cycle: Cycle,
        files: Sequence[SourceFile],
        recipe: Ingest,
        contents: Sequence[str],
        ancestors: Sequence[Corpus],
        batch: FeedbackBatch | None,
    ) -> Corpus:
        plain = self.config.recipe("ingest")["ingest"]
        if batch is not None:
            plain = {"holdout_share": recipe.holdout_share, "normalize": recipe.normalize}

        def make(target: tuple[str, ...]) -> Made:
            ingested = ingest_files(
                files,
                recipe=recipe,
                storage=self.books.storage,
                target=target,
                is_feedback=batch is not None,
                seen=self._seen(ancestors),
                run=self.run_tasks(),
            )
            return Made(files=ingested.files, figures=ingested.figures)

        return self._make(
            cycle,
            "ingested",
            Corpus,
            INGEST_VERSION,
            recipe=plain,
            contents=contents,
            inputs=[*ancestors, *([batch] if batch is not None else [])],
            make=make,
            num_cpus=self.config.runtime.data_tasks * self.config.runtime.cpus_per_worker,
        )

    def _seen(self, ancestors: Sequence[Corpus]) -> dict[str, str]:
        """Content hashes of all rows that an ancestor has trained or was judged on, and their sides."""
        seen: dict[str, str] = {}
        for corpus in ancestors:
            for _, table in read_corpus(self.books.storage, corpus, columns=["content_hash", "side"]):
                seen.update(zip(table["content_hash"].to_pylist(), table["side"].to_pylist(), strict=True))
        return seen

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

        def make(target: tuple[str, ...]) -> Made:
            tokenized = tokenize_corpus(
                corpus,
                recipe=self.config.tokenize,
                tokenizer_folder=folder,
                storage=self.books.storage,
                target=target,
                run=self.run_tasks(),
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
            return Made(files=[StoredFile(**file) for file in exported["files"]], figures=exported["figures"])

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
        from aifactory.tokens.pipeline import shard_names
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
                RowSet(shards=stored(tokens, shard_names(tokens.record.files)), share=share)
                for tokens, share in zip(token_sets, shares, strict=True)
            ),
            micro_batch_rows=runtime.micro_batch_rows,
            checkpoint_every_steps=runtime.checkpoint_every_steps,
            num_threads=max(1, int(runtime.cpus_per_worker)),
            parallel=runtime.parallel,
        )

    # ── evaluate ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def evaluate(
        self, cycle: Cycle, model: Model, *, champion: Model | None, sources: Corpus, feedback: Sequence[Corpus]
    ) -> Scorecard:
        """The scorecard of a model beside the one in production."""
        from aifactory.evaluate.pipeline import CODE_VERSION, evaluate_model

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
            )
            return Made(files=evaluated.files, figures=evaluated.figures)

        return self._make(
            cycle,
            "evaluated",
            Scorecard,
            CODE_VERSION,
            recipe=self.config.recipe("evaluate")["evaluate"],
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
        runtime = self.config.runtime
        return {
            "workers": runtime.workers,
            "threads_per_worker": max(1, int(runtime.cpus_per_worker)),
            "micro_batch_rows": runtime.micro_batch_rows,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "cpu_flags": _cpu_flags(),
            **{name: version(name) for name in _LIBRARIES},
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
