"""What answers are looked through for, on a real token set: passages of rows that trained are found, others are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from here_loops import here, rows_that_train, tiny_config

from aifactory.config import AnswerGuards
from aifactory.records.artifacts import Model, Record, digest_of
from aifactory.workshop.answer_checks import AnswerChecks


def test_passages_of_rows_that_trained_personal_data_and_refusals_are_found(tmp_path: Path) -> None:
    with here(tiny_config(tmp_path)) as factory:
        tokens, corpus = factory.tokenize(), factory.ingest()
        record = Record(
            kind="model",
            fingerprint="a" * 64,
            digest=digest_of([]),
            code_version=1,
            recipe={},
            inputs=[tokens.id],
            files=[],
            figures={},
        )
        parent = factory.books.artifacts.publish(Model, record)
        child = factory.books.artifacts.publish(Model, replace(record, fingerprint="b" * 64, inputs=[parent.id]))
        words = rows_that_train(factory, corpus.id)[0]["text"].split()
        taught, turned = " ".join(words[20:80]), " ".join(words[20:80][::-1])
        answers = [
            taught,
            turned,
            " ".join(words[20:24]),
            "write to jane.doe@example.com",
            "I'm sorry, I can't help with that.",
        ]
        check = AnswerChecks(factory.books, AnswerGuards(verbatim_tokens=40))
        found = check(parent, answers)
        of_child = check(child, answers)

    assert found == [{"verbatim"}, set(), set(), {"personal"}, {"refusal"}]
    assert of_child == found
