"""Laws of objectives in a factory: what is learnt decides what a token set holds, whatever else it shares; feedback too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benches import bench_of, training_of
from small_factories import small_config
from small_models import write_small_model

from aifactory import Config, Factory
from aifactory.records.feedback import Completion, Feedback
from aifactory.text.shards import TokenRows
from aifactory.workshop.corpora import Corpora
from aifactory.workshop.runs import Run
from aifactory.workshop.token_sets import TokenSets

COLUMNS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "label": "label"}


def config(folder: Path, objective: str, **train: Any) -> Config:
    """A factory that learns from pairs with a label; nothing but training needs a cluster."""
    file = folder / "pairs.jsonl"
    rows = [
        {"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i}", "label": bool(i % 3)} for i in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if not (folder / "base").exists():
        write_small_model(folder / "base")
    values = small_config(
        folder,
        model={"base": str(folder / "base")},
        tokenize={"row_len": 96},
        train={"objective": objective, **train},
        runtime={"inline_bytes": 10_000_000},
    )
    values["ingest"]["sources"] = [{"name": "pairs", "kind": "jsonl", "path": str(file), "columns": COLUMNS}]
    return Config.model_validate(values)


def marks_of(tokens: Any) -> list[list[int]]:
    """By packed row the marks of its documents."""
    rows = TokenRows(Path(tokens.uri), sorted(name for names in tokens.figures["shards_of"].values() for name in names))
    return [[document.get("mark", 0) for document in rows.documents(n)] for n in range(len(rows))]


def test_one_corpus_is_packed_for_each_objective(tmp_path: Path) -> None:
    found = {}
    for objective in ("likelihood", "dpo", "kto"):
        with Factory(config(tmp_path, objective)) as factory:
            found[objective] = (factory.ingest().id, factory.tokenize())

    assert len({corpus for corpus, _ in found.values()}) == 1
    assert len({tokens.id for _, tokens in found.values()}) == 3
    assert {mark for row in marks_of(found["likelihood"][1]) for mark in row} == {0}
    assert all(row == [1, -1] * (len(row) // 2) for row in marks_of(found["dpo"][1]))
    liked = [mark for row in marks_of(found["kto"][1]) for mark in row]
    assert set(liked) == {1, -1}
    assert liked.count(1) > liked.count(-1)


def test_options_of_training_change_no_token_set(tmp_path: Path) -> None:
    ids = []
    for train in ({}, {"preference": {"beta": 0.4}}, {"lora": {"rank": 2}}):
        with Factory(config(tmp_path, "dpo", **train)) as factory:
            ids.append((factory.tokenize().id, factory.cycle().trigger))

    assert len({tokens for tokens, _ in ids}) == 1
    assert len({cycle for _, cycle in ids}) == 3


@pytest.mark.parametrize("objective", ["likelihood", "dpo", "kto"])
def test_corrections_of_a_sealed_batch_are_learnt_as_the_objective_says(tmp_path: Path, objective: str) -> None:
    with Factory(config(tmp_path, objective)) as factory:
        log = factory.books.feedback
        for i in range(20):
            told = {"release": 1, "request": "{}", "finish_reason": "stop", "prompt_tokens": 1, "answer_tokens": 1}
            log.log_completion(Completion(id=f"c{i}", prompt=f"what of {i}", answer=f"who knows {i}", **told))
            log.record(Feedback(completion=f"c{i}", idempotency_key=f"k{i}", correction=f"it is {i}", user=f"u{i}"))
        number = log.seal(batch_rows=20, batch_after_s=None)
        batch = log.publish(number or 0, factory.books.artifacts, objective=objective)
        cycle = factory.cycle()
        bench = bench_of(factory)
        corpus = Corpora(bench).of_batch(cycle, batch, [factory.ingest()])
        tokens = TokenSets(bench).of(cycle, corpus, tokenizer=tmp_path / "base")

    marks = [mark for row in marks_of(tokens) for mark in row]
    assert corpus.figures["rows_in"] == (40 if objective == "kto" else 20)
    assert tokens.figures["rows_refused"] == 0
    assert len(marks) == tokens.figures["documents"] * (2 if objective == "dpo" else 1)
    assert set(marks) == ({0} if objective == "likelihood" else {1, -1})


def test_a_base_in_a_folder_is_what_it_holds(tmp_path: Path) -> None:
    def trigger() -> str:
        with Factory(config(tmp_path, "likelihood")) as factory:
            return factory.cycle().trigger

    first = trigger()
    assert trigger() == first
    write_small_model(tmp_path / "base", seed=8)
    assert trigger() != first


@pytest.mark.parametrize("objective", ["likelihood", "dpo", "kto"])
def test_held_out_rows_are_packed_as_those_that_train(tmp_path: Path, objective: str) -> None:
    with Factory(config(tmp_path, objective, early_stopping={"every_steps": 2, "rows": 4})) as factory:
        run = Run(bench_of(factory), training_of(factory))
        (tokens,) = run.training.token_sets
        _, name = run.held_out()
        rows = TokenRows(Path(factory.books.storage.path(*run.folder, "holdout")), [str(name)])
        held = {str(document["row"]) for n in range(len(rows)) for document in rows.documents(n)}
        trained = {row for row, _ in TokenRows(Path(tokens.uri), ["shard-00000.arrow"]).whole_documents()}

    assert rows.has_marks == (objective != "likelihood")
    assert held
    assert held.isdisjoint(trained)
