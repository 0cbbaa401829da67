"""A run of a training: its folder, what its workers are handed, the rows that it is validated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aifactory.records.artifacts import Artifact, Corpus, Model
from aifactory.workshop.bench import Bench, Folder
from aifactory.workshop.training import Training

if TYPE_CHECKING:
    from aifactory.train.work import Work


@dataclass(frozen=True, slots=True)
class Run:
    """The run that makes the model of a training. Whoever asks for the same model goes on with the same run."""

    bench: Bench
    training: Training

    @property
    def folder(self) -> Folder:
        """Where it leaves checkpoints and what a person looks at."""
        return "runs", f"train-{self.training.identity.fingerprint[:16]}"

    def work(self) -> Work:
        """What a worker is handed; the rows that it is validated on are packed by then."""
        from aifactory.train.execution import Execution
        from aifactory.train.trackers import tracker_environment
        from aifactory.train.work import RowSet, Stored, Work

        every, held_out = self.held_out()
        training, recipe, runtime = self.training, self.training.recipe, self.bench.config.runtime
        books, tokens = self.bench.books, self.training.token_sets[0]

        def stored(artifact: Artifact, names: Sequence[str]) -> Stored:
            return Stored(folder=books.artifacts.folder(artifact.kind, artifact.fingerprint), names=tuple(names))

        return Work(
            storage=books.storage,
            run_folder=self.folder,
            model_folder=self.bench.folder(training.identity),
            recipe=recipe,
            architecture=training.architecture,
            base=stored(training.base, _names(training.base)) if isinstance(training.base, Model) else training.base,
            tokenizer=stored(tokens, _names(tokens, "tokenizer/")),
            row_sets=tuple(
                RowSet(shards=stored(tokens, names), share=drawn.share) for tokens, names, drawn in training.drawn()
            ),
            micro_batch_rows=runtime.micro_batch_rows,
            checkpoint_every_steps=runtime.checkpoint_every_steps,
            num_threads=recipe.threads or max(1, int(runtime.cpus_per_worker)),
            parallel=runtime.parallel,
            shard_workers=runtime.shard_workers,
            factory=self.bench.config.name,
            trackers=runtime.trackers,
            environment=tracker_environment(),
            execution=Execution(**runtime.execution.model_dump()),
            keep_checkpoints=runtime.keep_checkpoints,
            hang_timeout_s=runtime.hang_timeout_s,
            held_out=None if held_out is None else Stored(folder=(*self.folder, "holdout"), names=(held_out,)),
            validate_every_steps=every,
            validates_itself=False,
        )

    def held_out(self) -> tuple[int, str | None]:
        """Every how many steps it is validated, and the file of the rows that it is validated on; none where it is not."""
        recipe, config, books = self.training.recipe, self.bench.config, self.bench.books
        stopping, runtime = recipe.early_stopping, config.runtime
        every = runtime.validate_every_steps if stopping is None else stopping.every_steps
        if every is None:
            return 0, None
        from aifactory.tokens.holdout import pack_held_out
        from aifactory.tokens.pipeline import TOKENIZER_FOLDER

        first = self.training.token_sets[0]
        names = _names(first, f"{TOKENIZER_FOLDER}/")
        file = pack_held_out(
            [books.artifacts.left_of(Corpus, tokens.record.inputs[0]) for tokens in self.training.token_sets],
            tokenizer_folder=books.artifacts.fetch(first, names) / TOKENIZER_FOLDER,
            chat_fallback=config.serve.chat_fallback,
            row_len=first.figures["row_len"],
            rows=runtime.validate_rows if stopping is None else stopping.rows,
            storage=books.storage,
            target=(*self.folder, "holdout"),
            objective=recipe.objective,
        )
        return every, file

    def clear(self) -> None:
        """The record is there, so nobody resumes the run any more: only what a person looks at is left of it."""
        from aifactory.train.run_log import KEPT

        storage = self.bench.books.storage
        for name in storage.names(*self.folder):
            if name not in KEPT:
                storage.delete_any(*self.folder, name)


def _names(artifact: Artifact, prefix: str = "") -> list[str]:
    return [file.name for file in artifact.record.files if file.name.startswith(prefix)]
