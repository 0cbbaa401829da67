"""Scorecards: what identifies the scores of a model beside the one in production, and what evaluation is handed."""

from __future__ import annotations

from collections.abc import Sequence

from aifactory.records.artifacts import Corpus, FeedbackBatch, Model, Scorecard
from aifactory.records.journal import Cycle
from aifactory.workshop.answer_checks import AnswerChecks
from aifactory.workshop.bench import Bench, Folder, Identity, Made
from aifactory.workshop.fixed_best import FixedBest


class Scorecards:
    """Makes the scorecards of one factory."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def of(
        self,
        cycle: Cycle,
        model: Model,
        *,
        champion: Model | None,
        sources: Corpus,
        feedback: Sequence[Corpus],
        new: Sequence[Corpus] = (),
        best: FixedBest | None = None,
    ) -> Scorecard:
        """The scorecard of a model beside the one in production; `new` is the feedback on which no ancestor has trained, `best` the
        release that is best so far."""
        from aifactory.evaluate.pipeline import CODE_VERSION, evaluate_model

        config, books = self._bench.config, self._bench.books
        recipe = dict(config.recipe("evaluate")["evaluate"]) | {"chat_fallback": config.serve.chat_fallback}
        disliked: frozenset[str] = frozenset()
        if config.train.objective == "kto":
            from aifactory.tokens.preferences import DISLIKED

            # A model is not judged by how likely it finds what nobody wants to hear.
            disliked = DISLIKED
            recipe["leaves_out"] = sorted(disliked)

        new_batches = {corpus.id: batch for corpus in new if (batch := _batch_of(corpus)) is not None}

        if champion is None or (best is not None and best.model.id in (model.id, champion.id)):
            best = None  # it is compared with that one anyway

        def write(target: Folder) -> Made:
            evaluated = evaluate_model(
                candidate=model,
                champion=champion,
                sources=sources,
                feedback=feedback,
                recipe=config.evaluate,
                store=books.artifacts,
                target=target,
                run=self._bench.run_with_models(model, champion, None if best is None else best.model),
                leave_out=disliked,
                chat_fallback=config.serve.chat_fallback,
                check=None if config.evaluate.guards is None else AnswerChecks(books, config.evaluate.guards),
                new_batches=new_batches,
                lm_eval_python=config.runtime.lm_eval_python,
                best=None if best is None else (best.release, best.model),
            )
            return Made(files=evaluated.files, figures=evaluated.figures)

        identity = Identity(
            noun=Scorecard,
            code_version=CODE_VERSION,
            recipe=recipe,
            contents=[
                "champion" if champion is not None else "no champion",
                *new_batches,
                *([f"best {best.release}"] if best is not None else []),
            ],
            inputs=[
                model,
                *([champion] if champion is not None else []),
                *([best.model] if best is not None else []),
                sources,
                *feedback,
            ],
        )
        scorecard = self._bench.make(cycle, identity, write, event="evaluated", num_cpus=self._bench.data_cpus)
        self._bench.show(model, scorecard)
        return scorecard


def _batch_of(corpus: Corpus) -> str | None:
    """The id of the feedback batch that a corpus was made of."""
    return next((input_id for input_id in corpus.record.inputs if input_id.startswith(f"{FeedbackBatch.kind}/")), None)
