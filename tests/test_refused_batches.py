"""A batch of lies among good ones: real stages in this process, and the decision that keeps it out."""

from __future__ import annotations

from pathlib import Path

import pytest
from here_loops import NoLauncher, begin_drift, give_corrections, here, tiny_config

from aifactory.evaluate.gate import Reject
from aifactory.evaluate.pipeline import score_tasks
from aifactory.improve.decision import Wait
from aifactory.improve.evaluation import Evaluation, decide_now, published_batches


@pytest.mark.slow
def test_a_batch_of_lies_beside_a_good_one_is_refused_by_name_and_the_good_one_is_not(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, promote={"min_tasks": 10, "min_clusters": 4})
    with here(config) as factory:
        factory.turn(factory.cycle())
        assert give_corrections(factory) == 1
        assert give_corrections(factory, documents=range(6, 14), lie_from=1) == 2
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
