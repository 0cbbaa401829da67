"""A batch of lies among good ones: real stages in this process, and the decision that keeps it out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from corpora import document
from here_loops import begin_drift, give_corrections, here, tiny_config
from small_factories import UNKNOWN

from aifactory import Factory
from aifactory.evaluate.gate import Reject
from aifactory.evaluate.pipeline import score_tasks
from aifactory.improve.decision import Wait
from aifactory.improve.evaluation import Evaluation, decide_now, published_batches
from aifactory.records.feedback import Completion, Feedback
from aifactory.records.journal import Cycle
from aifactory.text.tasks import cut_tasks


class NoLauncher:
    """Turns nothing: the cycles are turned by the test."""

    def is_turning(self, cycle: Cycle) -> bool:
        return True

    def turn(self, cycle: Cycle) -> None:
        raise AssertionError(cycle)

    def ending(self, cycle: Cycle) -> str:
        return ""


def give_lies(factory: Factory) -> None:
    """Answers, each corrected into the answer to another question."""
    texts = [(topic, document(topic, i)) for topic in UNKNOWN for i in range(6, 14)]
    tasks = [
        (t, task) for t, text in texts for task in cut_tasks(text, prompt_bytes=150, answer_bytes=300, max_tasks=2)
    ]
    answers = [task.answer for _, task in tasks]
    random.Random(1).shuffle(answers)
    for number, ((topic, task), answer) in enumerate(zip(tasks, answers, strict=True)):
        name, feedback = f"lie-{number}", factory.books.feedback
        feedback.log_completion(
            Completion(
                id=name,
                release=1,
                prompt=task.prompt,
                answer="no idea",
                request="{}",
                finish_reason="stop",
                prompt_tokens=1,
                answer_tokens=1,
            )
        )
        user = f"user-{topic}-{number % 4}"
        feedback.record(Feedback(completion=name, idempotency_key=name, user=user, correction=answer))
    assert feedback.seal(batch_rows=len(tasks), batch_after_s=None) == 2


@pytest.mark.slow
def test_a_batch_of_lies_beside_a_good_one_is_refused_by_name_and_the_good_one_is_not(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, promote={"min_tasks": 10, "min_clusters": 4})
    with here(config) as factory:
        factory.turn(factory.cycle())
        give_corrections(factory)
        give_lies(factory)
        good, bad = published_batches(factory.books)
        cycle = begin_drift(factory)

        verdict = factory.turn(cycle)

        assert isinstance(verdict, Reject)
        assert list(verdict.refused) == [bad.id], verdict.reasons
        assert factory.turn_begun(cycle.trigger) == verdict, "turned again, it stays what it is"
        assert factory.books.journal.refused_batches() == {bad.id}
        assert good.id not in verdict.refused
        # Nothing that is new is left to learn from.
        decision = decide_now(factory.books)
        assert isinstance(decision, Wait), decision
        Evaluation(factory.books, score=lambda *of: score_tasks(*of, "none"), launcher=NoLauncher()).tick()
        assert len(factory.books.journal.cycles()) == 2
