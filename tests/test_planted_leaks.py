"""Users who correct answers by rows that are held out, or nearly so: none of it trains, in this cycle or a later one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from here_loops import begin_drift, here, rows_that_train

from aifactory import Config, Factory
from aifactory.improve.evaluation import published_batches
from aifactory.proof.explain import CycleStory
from aifactory.records.artifacts import Corpus, FeedbackBatch, TokenSet
from aifactory.records.feedback import Completion, Feedback
from aifactory.records.journal import Cycle
from aifactory.text.shards import TokenRows

QUARANTINE = ({"step": "near_duplicates"}, {"step": "decontaminate"})
FORMS = ("exact", "near", "quoted")
HONEST = 40


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is asked, and what should be answered."""

    prompt: str
    text: str


def said(chance: random.Random, count: int) -> str:
    return " ".join(f"{chance.choice('bdfgklmnprst')}{chance.randrange(10**4)}" for _ in range(count))


def question(chance: random.Random) -> Row:
    return Row(prompt=said(chance, 10), text=said(chance, 40))


def planted(row: Row, form: str, chance: random.Random) -> Row:
    """A held-out row as a user gives it back: as it is, with two words changed, or quoted in an answer to something else."""
    if form == "exact":
        return row
    if form == "near":
        words = row.text.split()
        for at in chance.sample(range(len(words)), 2):
            words[at] = said(chance, 1)
        return Row(prompt=row.prompt, text=" ".join(words))
    return Row(prompt=said(chance, 10), text=f"{said(chance, 30)} {row.text} {said(chance, 30)}")


def config_of(folder: Path, steps: Sequence[dict[str, Any]] = QUARANTINE, *, quarantine: float | None = 0.4) -> Config:
    file = folder / "rows" / "rows.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True)
        chance = random.Random(0)
        rows = [question(chance) for _ in range(100)]
        file.write_text("".join(json.dumps({"q": r.prompt, "a": r.text}) + "\n" for r in rows), encoding="utf-8")
    source = {
        "name": "rows",
        "kind": "jsonl",
        "path": str(file.parent),
        "columns": {"prompt": "q", "completion": "a"},
    }
    return Config.model_validate(
        {
            "name": "small",
            "ingest": {
                "sources": [source],
                "holdout_share": 0.3,
                "steps": list(steps),
                "quarantine_similarity": quarantine,
            },
            "tokenize": {"vocab_size": 400, "row_len": 256},
            "model": {"architecture": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "context_length": 256}},
            "train": {"max_steps": 2, "global_batch_rows": 4, "warmup_steps": 0},
            "evaluate": {"max_tasks": 20, "bootstrap_samples": 100},
            "improve": {"retrain": {"max_steps": 2}, "trust": None},
            "runtime": {"storage": str(folder / "storage"), "workers": 1, "inline_bytes": 10_000_000},
        }
    )


def put_into_production(factory: Factory, cycle: Cycle) -> None:
    """Whatever the gate would say of so small a model: this is about what it is trained on."""
    material = factory._tokenize(cycle, factory._ingest(cycle))
    claimed = factory.books.journal.claim(cycle)
    (model,) = factory._train(claimed, material)
    card = factory._evaluate(claimed, material, model)
    factory.books.registry.promote(claimed, model=model.id, scorecard=card.id, decision={"reasons": ["test"]})


def held_out(factory: Factory, corpus_id: str) -> list[dict[str, Any]]:
    folder = Path(factory.books.storage.path(*corpus_id.split("/")))
    return [row for file in sorted(folder.glob("holdout-*.parquet")) for row in pq.read_table(file).to_pylist()]


def correct(factory: Factory, rows: Sequence[Row], name: str) -> FeedbackBatch:
    """So many answers, each corrected by somebody, sealed into a batch."""
    log = factory.books.feedback
    for number, row in enumerate(rows):
        told = {"request": "{}", "finish_reason": "stop", "prompt_tokens": 1, "answer_tokens": 1}
        log.log_completion(
            Completion(id=f"cmpl-{name}-{number}", release=1, prompt=row.prompt, answer="no idea", **told)
        )
        user, key = f"user-{number % 12}", f"{name}-{number}"
        log.record(Feedback(idempotency_key=key, completion=f"cmpl-{name}-{number}", user=user, correction=row.text))
    assert log.seal(batch_rows=len(rows), batch_after_s=None) is not None
    return published_batches(factory.books)[-1]


def corpus_of(factory: Factory, batch: FeedbackBatch) -> Corpus:
    """What was ingested of a batch."""
    (found,) = [
        corpus
        for name in factory.books.journal.corpora()
        if batch.id in (corpus := factory.books.artifacts.get(Corpus, name)).record.inputs
    ]
    return found


def packed_rows(factory: Factory, cycle: Cycle) -> set[str]:
    """Ids of all rows that a cycle trains on."""
    material = factory._tokenize(cycle, factory._ingest(cycle))
    return {row for tokens in material.token_sets for row in rows_of(factory, tokens)}


def rows_of(factory: Factory, tokens: TokenSet) -> set[str]:
    folder = factory.books.artifacts.fetch(tokens)
    shards = sorted(file.name for file in folder.glob("shard-*.arrow"))
    rows = TokenRows(folder, shards)
    return {document["row"] for index in range(len(rows)) for document in rows.documents(index)}


def without_quarantine(folder: Path, copy: Path, trigger: str, batch: FeedbackBatch, drop: str) -> Corpus:
    """The control: the same batch in a copy of the factory in which nothing is compared with what is held out.

    drop    steps: near copies are still found; near: exact ones are; all: nothing earlier is known at all
    """
    shutil.copytree(folder, copy)
    with here(config_of(copy, steps=(), quarantine=0.4 if drop == "steps" else None)) as factory:
        cycle = factory.books.journal.cycle(trigger)
        assert cycle is not None
        if drop != "all":
            return corpus_of_cycle(factory, cycle, batch)
        return factory._corpora.of_batch(replace(cycle, bound=replace(cycle.bound, holdouts=())), batch, [])


def train_texts(factory_folder: Path, corpus: Corpus) -> set[str]:
    with here(config_of(factory_folder)) as factory:
        return {row["text"] for row in rows_that_train(factory, corpus.id)}


@pytest.mark.parametrize("outcome", ["promoted", pytest.param("rejected", marks=pytest.mark.slow)])
def test_a_correction_that_is_a_row_held_out_or_nearly_one_trains_neither_now_nor_later(
    outcome: str, tmp_path: Path
) -> None:
    folder = tmp_path / "factory"
    chance = random.Random(1)
    with here(config_of(folder)) as factory:
        put_into_production(factory, factory.cycle())
        sources = factory.books.journal.corpora()[0]
        kept_back = [Row(prompt=row["prompt"], text=row["text"]) for row in held_out(factory, sources)]
        assert len(kept_back) >= 20
        leaks = {form: [planted(row, form, chance) for row in kept_back] for form in FORMS}
        honest = [question(chance) for _ in range(HONEST)]

        # Now: one batch of honest corrections and of leaks in every form.
        batch = correct(factory, [*honest, *(row for rows in leaks.values() for row in rows)], "first")
        cycle = begin_drift(factory)
        if outcome == "promoted":
            put_into_production(factory, cycle)
        else:
            material = factory._tokenize(cycle, factory._ingest(cycle))
            claimed = factory.books.journal.claim(cycle)
            (model,) = factory._train(claimed, material)
            card = factory._evaluate(claimed, material, model)
            factory.books.registry.reject(claimed, scorecard=card.id, decision={"reasons": ["test"]})
        first = corpus_of(factory, batch)
        assert_nothing_leaked(factory, cycle, first, leaks)
        story = factory.explain(cycle.trigger)
        assert_named(factory, story, first, leaks)

        # Later: leaks of what the sources hold out, and of what that batch itself has held out, with new words between.
        texts = {row["text"] for row in held_out(factory, first.id)}
        own = [row for row in honest if row.text in texts]
        assert len(own) >= 5
        later = {form: [planted(row, form, chance) for row in [*kept_back[:8], *own]] for form in FORMS}
        more = [question(chance) for _ in range(HONEST)]
        second_batch = correct(factory, [*more, *(row for rows in later.values() for row in rows)], "second")
        begun = later_cycle(factory)
        assert_nothing_leaked(factory, begun, corpus_of_cycle(factory, begun, second_batch), later)

    # The control: it is the quarantine that keeps them out.
    without_steps = without_quarantine(folder, tmp_path / "without-steps", cycle.trigger, batch, "steps")
    found = train_texts(tmp_path / "without-steps", without_steps)
    for form in ("exact", "near"):
        assert not found & {row.text for row in leaks[form]}, f"{form} copies are found without any step"
    assert len(found & {row.text for row in leaks["quoted"]}) >= len(kept_back) / 2
    without_near = without_quarantine(folder, tmp_path / "without-near", cycle.trigger, batch, "near")
    found = train_texts(tmp_path / "without-near", without_near)
    assert not found & {row.text for row in leaks["exact"]}, "exact copies are found in any case"
    for form in ("near", "quoted"):
        assert len(found & {row.text for row in leaks[form]}) >= len(kept_back) / 2, form
    without_all = without_quarantine(folder, tmp_path / "without-all", cycle.trigger, batch, "all")
    found = train_texts(tmp_path / "without-all", without_all)
    assert len(found & {row.text for row in leaks["exact"]}) >= len(kept_back) / 2


def later_cycle(factory: Factory) -> Cycle:
    """Another retrain, on the batches that are there now."""
    production = factory.books.registry.production()
    (last, *_) = reversed(factory.books.journal.cycles())
    assert production is not None
    bound = replace(
        last.bound,
        batches=[batch.id for batch in published_batches(factory.books)],
        parent=production.model,
        champion=production.number,
        holdouts=factory.books.journal.corpora(),
    )
    return factory.books.journal.open_cycle("drift-fedcba9876543210", recipe=last.recipe, bound=bound)


def corpus_of_cycle(factory: Factory, cycle: Cycle, batch: FeedbackBatch) -> Corpus:
    return next(corpus for corpus in factory._ingest(cycle) if batch.id in corpus.record.inputs)


def assert_nothing_leaked(factory: Factory, cycle: Cycle, corpus: Corpus, leaks: dict[str, list[Row]]) -> None:
    """No row that was planted is among those that train, neither in the corpora nor in what is packed for training."""
    texts = {row.text for rows in leaks.values() for row in rows}
    trains = [row for each in factory._ingest(cycle) for row in rows_that_train(factory, each.id)]
    assert not {row["text"] for row in trains} & texts
    packed = packed_rows(factory, cycle)
    assert packed
    assert packed <= {row["id"] for row in trains}
    # Whoever is honest is believed: what is new is there.
    assert sum(row["text"] not in texts for row in rows_that_train(factory, corpus.id)) >= HONEST / 2


def assert_named(factory: Factory, story: CycleStory, corpus: Corpus, leaks: dict[str, list[Row]]) -> None:
    """The ledger has every leak with the row that it is like, and the cycle's story counts them by what was found."""
    number, quotes = len(leaks["exact"]), {row.text for row in leaks["quoted"]}
    rules = story.rejected_by_rule
    exact = sum(rules.get(rule, 0) for rule in ("holdout_leak", "seen_by_ancestor"))
    near = sum(rules.get(rule, 0) for rule in ("near_holdout_leak", "near_seen_by_ancestor"))
    assert exact == number, rules
    assert near == number, rules
    # A passage in a row that is itself held out trains nobody.
    apart = sum(row["text"] in quotes for row in held_out(factory, corpus.id))
    assert rules["contaminated"] + apart == number, rules
    lines = "\n".join(story.lines())
    assert all(f"rejected    {rules[rule]:,} {rule}" in lines for rule in rules)
    ids = {row["id"] for row in held_out(factory, factory.books.journal.corpora()[0])}
    for rule in ("holdout_leak", "near_holdout_leak"):
        report = factory.rejected(rule=rule, corpus=corpus.id, limit=100)
        assert {row["detail"].removeprefix("like ") for row in report.rows} <= ids
    quoted = factory.rejected(rule="contaminated", corpus=corpus.id, limit=100)
    assert all("its longest passage has 40 words" in row["detail"] for row in quoted.rows)
