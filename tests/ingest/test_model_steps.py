"""Laws of the steps that ask a model: what it says of a row is its own, depends on that row alone, and bears its digest."""

from __future__ import annotations

import json
import math
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from benches import bench_of
from pydantic import TypeAdapter
from small_models import LINES, write_small_model

from aifactory.config import Config, Ingest, Step
from aifactory.engine.load import load_model
from aifactory.errors import ConfigError, StateError, StorageError
from aifactory.factory import Factory
from aifactory.ingest.labels import CONFIDENCE, summed
from aifactory.ingest.listing import list_pieces
from aifactory.ingest.model_scores import StepModel, bits_per_byte, label_probabilities
from aifactory.ingest.pipeline import Work
from aifactory.ingest.steps import Figures, apply_steps
from aifactory.records.artifacts import Model, Record, Scorecard, digest_of
from aifactory.records.books import Books
from aifactory.records.feedback import Completion, Feedback
from aifactory.records.journal import Bound
from aifactory.records.storage import Storage
from aifactory.text.documents import prompt_tokens
from aifactory.text.tokenizer import load_tokenizer
from aifactory.train.base import digest_folder
from aifactory.workshop.corpora import Corpora

CONTEXT = 96
PROMPT = "{prompt} Text: {text}\nKind:"
LABELS = ["code", "long prose", "poem"]
BY_MODEL = {"step": "label_by_model", "model": "judge", "prompt": PROMPT, "labels": LABELS, "keep_existing": False}
QUALITY = {"step": "model_quality", "model": "judge"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("judge"), context=CONTEXT)


@pytest.fixture(scope="module")
def judge(folder):
    return StepModel(digest=digest_folder(folder), files=folder)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def step_of(section, **options):
    return TypeAdapter(Step).validate_python({**section, **options})


def random_rows(seed, count=60, longest=12):
    rng = random.Random(seed)
    words = ["{text}", "{prompt}", "größe", "日本", "\n", "x=1", *LINES[0].split(), *LINES[1].split()]

    def text(longest):
        return " ".join(rng.choice(words) for _ in range(rng.randrange(1, longest)))

    columns = {
        "key": [f"{i}" for i in range(count)],
        "origin": [f"{i}.txt" for i in range(count)],
        "source": ["docs"] * count,
        "prompt": [text(4) if rng.random() < 0.5 else "" for _ in range(count)],
        "text": [text(longest) for _ in range(count)],
        "messages": [""] * count,
        "label": [rng.choice(["", "code", "poem", "verse"]) for _ in range(count)],
    }
    return pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))


@torch.inference_mode()
def log_probs_alone(model, before, after):
    """Of the tokens `after` those of `before`: one forward of one row."""
    ids = [*before, *after]
    log_probs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[i - 1, ids[i]]) for i in range(len(before), len(ids)))


# ── labels ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("normalised", [False, True])
def test_probabilities_are_those_of_teacher_forced_continuations_of_single_rows(judge, model, tokenizer, normalised):
    table = random_rows(1, longest=8)
    found = label_probabilities(table, step_of(BY_MODEL, length_normalised=normalised), judge)

    assert found.sum(axis=1) == pytest.approx(np.ones(len(table)))
    for row, shares in zip(table.to_pylist(), found, strict=True):
        before = prompt_tokens(tokenizer, f"{row['prompt']} Text: {row['text']}\nKind:")
        continuations = [tokenizer.encode(f" {label}") for label in LABELS]
        assert len({len(ids) for ids in continuations}) > 1
        weights = [
            math.exp(log_probs_alone(model, before, ids) / (len(ids) if normalised else 1)) for ids in continuations
        ]
        assert shares == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-4)


def test_the_label_is_the_likeliest_and_none_where_the_model_is_not_sure(judge):
    table = random_rows(2)
    shares = label_probabilities(table, step_of(BY_MODEL), judge)
    border = float(np.median(shares.max(axis=1)))
    figures = Figures()

    kept, _ = apply_steps(table, [step_of(BY_MODEL, min_confidence=border)], figures, models={"judge": judge})

    expected = [LABELS[row.argmax()] if row.max() >= border else "" for row in shares]
    assert kept["label"].to_pylist() == expected
    assert 0 < expected.count("") < len(expected)
    assert summed(figures.steps[0])["unlabelled"] == expected.count("")
    assert kept[CONFIDENCE].to_pylist() == shares.max(axis=1).tolist()


def test_a_text_that_does_not_fit_is_cut_at_its_end(judge, tokenizer):
    table = random_rows(3, 10, longest=200)
    shares = label_probabilities(table, step_of(BY_MODEL, prompt="{text} is"), judge)
    room = CONTEXT - max(len(tokenizer.encode(f" {label}")) for label in LABELS)

    cut = 0
    for text, found in zip(table["text"].to_pylist(), shares, strict=True):
        # A beginning that fits, and nearly the longest.
        fitting = [
            length for length in range(len(text) + 1) if len(prompt_tokens(tokenizer, f"{text[:length]} is")) <= room
        ]
        candidates = [
            label_probabilities(pa.table({"text": [text[:length]]}), step_of(BY_MODEL, prompt="{text} is"), judge)[
                0
            ].tolist()
            for length in fitting[-12:]
        ]
        assert found.tolist() in candidates
        cut += len(fitting) <= len(text)
    assert cut > 3


def test_at_most_so_many_bytes_are_read_in_whole_characters(judge):
    table = pa.table({"text": ["größe" * 3, "größe gr", "größe g"], "prompt": ["", "", ""]})
    shares = label_probabilities(table, step_of(BY_MODEL, max_text_bytes=3), judge)
    short = label_probabilities(pa.table({"text": ["gr"], "prompt": [""]}), step_of(BY_MODEL), judge)

    assert shares.tolist() == [short[0].tolist()] * 3


def test_a_prompt_that_leaves_no_room_for_text_is_refused(judge):
    with pytest.raises(ConfigError, match="leaves room for text within the model's context of 96 tokens"):
        label_probabilities(random_rows(4, 3), step_of(BY_MODEL, prompt="what kind of text? " * 20 + "{text}"), judge)


def test_a_classifier_filters_with_its_probability_as_the_score(judge):
    table = random_rows(5)
    shares = label_probabilities(table, step_of(BY_MODEL), judge)
    steps = [step_of(BY_MODEL), step_of({"step": "keep_labels", "keep": ["poem"]})]

    kept, (broken,) = apply_steps(table, steps, Figures(), models={"judge": judge})

    assert set(kept["label"].to_pylist()) == {"poem"}
    gone = [i for i, row in enumerate(shares) if LABELS[row.argmax()] != "poem"]
    assert 0 < len(gone) < len(table)
    assert broken.rows["key"].to_pylist() == [f"{i}" for i in gone]
    assert broken.scores == [shares[i].max() for i in gone]
    for detail, i in zip(broken.details, gone, strict=True):
        assert detail == f"the label {LABELS[shares[i].argmax()]!r}, probability {shares[i].max():.3f}"


def test_a_label_that_stays_is_certain_and_is_compared_with_the_models(judge):
    table = random_rows(6)
    found = label_probabilities(table, step_of(BY_MODEL), judge).argmax(axis=1)
    figures = Figures()

    kept, _ = apply_steps(table, [step_of(BY_MODEL, keep_existing=True)], figures, models={"judge": judge})

    before = table["label"].to_pylist()
    same = sum(name == LABELS[at] for name, at in zip(before, found, strict=True))
    agreement = summed(figures.steps[0])["agreement"]
    assert (agreement["rows"], agreement["same"]) == (len([name for name in before if name]), same)
    for name, label, confidence in zip(before, kept["label"].to_pylist(), kept[CONFIDENCE].to_pylist(), strict=True):
        assert (label, confidence) == (name, 1.0) if name else 0 < confidence < 1


# ── quality ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bits_per_byte_are_those_of_the_text_after_its_prompt(judge, model, tokenizer):
    table = random_rows(7, longest=9)
    found = bits_per_byte(table, step_of(QUALITY), judge)

    for row, bits in zip(table.to_pylist(), found, strict=True):
        nats = log_probs_alone(model, prompt_tokens(tokenizer, row["prompt"]), tokenizer.encode(row["text"]))
        assert bits == pytest.approx(-nats / math.log(2) / len(row["text"].encode()), rel=1e-5)


def test_of_a_long_text_the_beginning_counts_and_of_a_long_prompt_the_end(judge):
    table = pa.table({"text": ["größe the fox" + "x" * 500], "prompt": ["y" * 500 + "ö a bird"]})
    cut = pa.table({"text": ["größe"], "prompt": [" a bird"]})

    found = bits_per_byte(table, step_of(QUALITY, sample_bytes=8), judge)

    assert "größe t".encode()[:8] == b"gr\xc3\xb6\xc3\x9fe "
    cut = cut.set_column(0, "text", pa.array(["größe "]))
    assert found.tolist() == bits_per_byte(cut, step_of(QUALITY), judge).tolist()


def test_rows_that_surprise_too_much_or_too_little_are_in_the_ledger_and_come_back(write_files, ingest, judge):
    table = random_rows(8, 80)
    texts = [f"{text} {i}" for i, text in enumerate(table["text"].to_pylist())]
    bits = bits_per_byte(pa.table({"text": texts, "prompt": [""] * 80}), step_of(QUALITY), judge)
    low, high = np.quantile(bits, [0.25, 0.75]).tolist()
    section = QUALITY | {"min_bits_per_byte": low, "max_bits_per_byte": high}
    root = write_files({"a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts)})

    made = ingest(root, "jsonl", recipe={"steps": [section]}, models={"judge": judge})

    expected = {
        text: ("model_quality.too_surprising" if found > high else "model_quality.too_predictable", found)
        for text, found in zip(texts, bits.tolist(), strict=True)
        if not low <= found <= high
    }
    assert {line["text"]: (line["rule"], line["score"]) for line in made.ledger} == expected
    assert {rule for rule, _ in expected.values()} == {"model_quality.too_surprising", "model_quality.too_predictable"}
    assert all("bits per byte, not within" in line["detail"] for line in made.ledger)
    assert made.figures["rows_in"] == len(made.kept) + len(made.ledger) == 80

    rule = "model_quality.too_surprising"
    keys = frozenset(line["key"] for line in made.ledger if line["rule"] == rule)
    again = ingest(root, "jsonl", recipe={"steps": [section]}, models={"judge": judge}, restored={rule: keys})
    assert {line["rule"] for line in again.ledger} == {"model_quality.too_predictable"}
    assert len(again.kept) == len(made.kept) + len(keys)


# ── what it depends on ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_however_blocks_are_cut_and_rows_are_ordered(judge, threads):
    table = random_rows(9, longest=60)
    label, quality = step_of(BY_MODEL), step_of(QUALITY)
    shares, bits = label_probabilities(table, label, judge), bits_per_byte(table, quality, judge)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size in (1, 7, 59):
            blocks = [table.slice(at, size) for at in range(0, len(table), size)]
            assert np.concatenate([label_probabilities(block, label, judge) for block in blocks]).tolist() == (
                shares.tolist()
            )
            assert np.concatenate([bits_per_byte(block, quality, judge) for block in blocks]).tolist() == bits.tolist()
        order = np.random.default_rng(1).permutation(len(table))
        shuffled = table.take(pa.array(order))
        assert label_probabilities(shuffled, label, judge).tolist() == shares[order].tolist()
        assert bits_per_byte(shuffled, quality, judge).tolist() == bits[order].tolist()
    finally:
        torch.set_num_threads(before)


def test_the_bytes_of_a_corpus_do_not_depend_on_who_made_its_parts(write_files, ingest, judge):
    table = random_rows(10)
    lines = [json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(table["text"].to_pylist())]
    root = write_files({f"{i}.jsonl": "".join(lines[i::4]) for i in range(4)})
    recipe = {"steps": [{**BY_MODEL, "min_confidence": 0.5}, {"step": "keep_labels", "keep": ["poem", ""]}]}

    def elsewhere(function, items):
        """As workers get them, in another order, on other threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(3 - min(before, 2))
        try:
            return [function(*pickle.loads(pickle.dumps(item))) for item in items[::-1]][::-1]
        finally:
            torch.set_num_threads(before)

    made = ingest(root, "jsonl", recipe=recipe, models={"judge": judge})
    again = ingest(root, "jsonl", recipe=recipe, models={"judge": judge}, run=elsewhere, storage="elsewhere")

    assert made.bytes == again.bytes
    assert {row["label"] for row in made.kept} <= {"poem", ""}
    assert made.ledger
    assert set(made.kept[0]) == set(again.kept[0]) and CONFIDENCE not in made.kept[0]


@pytest.mark.slow
def test_workers_of_a_cluster_label_as_this_process_does(tmp_path, folder):
    """The function of a job lies in the job's working directory, which is on no path of a console script."""
    (tmp_path / "labels_of_job.py").write_text(
        "def label(rows): return ['long' if len(row['text']) > 40 else None for row in rows]\n"
    )
    source = tmp_path / "source"
    source.mkdir()
    for i, text in enumerate(random_rows(13, 20)["text"].to_pylist()):
        (source / f"{i}.txt").write_text(f"{text} {i}")
    (tmp_path / "job.py").write_text(ON_A_CLUSTER)

    done = subprocess.run(
        [sys.executable, "-P", "job.py", str(folder)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stderr[-4000:]
    here, there = json.loads(done.stdout.splitlines()[-1])
    assert here == there
    assert len(here) >= 3


ON_A_CLUSTER = """
import json, sys
from pathlib import Path
from aifactory.cluster.session import connect, disconnect
from aifactory.cluster.tasks import ray_tasks, run_here
from aifactory.config import Ingest
from aifactory.ingest.decisions import Earlier
from aifactory.ingest.listing import list_pieces
from aifactory.ingest.model_scores import StepModel
from aifactory.ingest.pipeline import Work, ingest_pieces
from aifactory.records.storage import Storage

recipe = Ingest.model_validate({
    "sources": [{"name": "docs", "kind": "text", "path": "source"}],
    "steps": [
        {"step": "label_by_function", "function": "labels_of_job:label"},
        {"step": "label_by_model", "model": "judge", "prompt": "{text} is", "labels": ["short", "long"]},
        {"step": "model_quality", "model": "judge", "max_bits_per_byte": 10, "min_bits_per_byte": 0},
    ],
})
models = {"judge": StepModel(digest="x", files=Path(sys.argv[1]))}

def files_of(run, root):
    work = Work.of(recipe, Storage(root), models=models)
    pieces = list_pieces(recipe.sources).pieces
    made = ingest_pieces(pieces, work, name="t", earlier=Earlier(), target=("corpus", "x"), run=run)
    return sorted([file.name, file.sha256] for file in made.files)

here = files_of(run_here, "here")
connect("tests")
there = files_of(ray_tasks(concurrency=2, cpus_per_task=0.5), "there")
disconnect()
print(json.dumps([here, there]))
"""


def test_a_part_is_what_its_model_holds_wherever_that_lies(tmp_path, write_files, folder):
    copied = shutil.copytree(folder, tmp_path / "copied")
    other = write_small_model(tmp_path / "other", seed=8, context=CONTEXT)
    root = write_files({"a.txt": "some text"})

    def identities(place, section):
        recipe = Ingest.model_validate(
            {
                "sources": [{"name": "docs", "kind": "text", "path": str(root)}],
                "steps": [{**section, "model": str(place)}],
            }
        )
        models = {str(place): StepModel(digest=digest_folder(place), files=place)}
        work = Work.of(recipe, Storage(str(tmp_path)), models=models)
        return [work.identity(piece) for piece in list_pieces(recipe.sources).pieces]

    for section in (BY_MODEL, QUALITY):
        assert identities(folder, section) == identities(copied, section)
        assert identities(folder, section) != identities(other, section)


def test_a_folder_that_is_not_on_this_machine_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"expected the model of a step at .*/gone on every machine, found no such"):
        bits_per_byte(random_rows(1, 3), step_of(QUALITY), StepModel(digest="x", files=tmp_path / "gone"))


# ── releases ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def config_of(tmp_path, *steps, name="small"):
    table = random_rows(11)
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    for i, text in enumerate(table["text"].to_pylist()):
        (source / f"{i}.txt").write_text(f"{text} {i}")
    return Config.model_validate(
        {
            "name": name,
            "ingest": {
                "sources": [{"name": "docs", "kind": "text", "path": str(source)}],
                "steps": list(steps),
                "holdout_share": 0.2,
            },
            "runtime": {"storage": str(tmp_path / "storage")},
        }
    )


def release(books: Books, place: Path) -> str:
    """Put the model of a folder into production; returns the id of its artifact."""
    number = len(books.registry.releases()) + 1
    fingerprint = f"{number:016x}" + "0" * 48
    champion = books.registry.production()
    cycle = books.journal.open_cycle(
        f"made-{number}",
        recipe={"ingest": {}},
        bound=Bound(kind="run", sources_digest="x", champion=None if champion is None else champion.number),
    )

    def publish(noun, files):
        record = Record(
            kind=noun.kind,
            fingerprint=fingerprint,
            digest=digest_of(files),
            code_version=1,
            recipe={},
            inputs=[],
            files=files,
            figures={},
        )
        return books.artifacts.publish(noun, record)

    made = publish(Model, books.storage.upload(place, *books.artifacts.folder("model", fingerprint)))
    card = publish(Scorecard, [])
    books.lineage.add(made)
    books.lineage.add(card)
    books.registry.promote(books.journal.claim(cycle), model=made.id, scorecard=card.id, decision={"reasons": []})
    return made.id


def labels_of(factory, corpus):
    from aifactory.records.rows import read_corpus

    tables = [table for _, table in read_corpus(factory.books.storage, corpus, columns=["id", "label"])]
    return {row["id"]: row["label"] for table in tables for row in table.to_pylist()}


def test_a_release_labels_the_corpus_and_stands_in_its_lineage(tmp_path, folder, judge):
    config = config_of(tmp_path, {**BY_MODEL, "model": "registry:production"})
    with Factory(config) as factory:
        made = release(factory.books, folder)
        corpus = factory.ingest()

        assert made in corpus.record.inputs
        assert made in "\n".join(factory.lineage(corpus.id).lines())
        table = pa.table({"text": [p.read_text() for p in sorted((tmp_path / "source").iterdir())]})
        table = table.append_column("prompt", pa.array([""] * len(table)))
        best = label_probabilities(table, step_of(BY_MODEL), judge).argmax(axis=1)
        expected = sorted(LABELS[at] for at in best)
        assert sorted(labels_of(factory, corpus).values()) == expected
        assert corpus.figures["labels"] == {name: expected.count(name) for name in sorted(set(expected))}


def test_a_cycle_keeps_the_model_that_it_was_bound_to_and_ends_although_production_changes(tmp_path, folder):
    other = write_small_model(tmp_path / "other", seed=8, context=CONTEXT)
    config = config_of(tmp_path, {**BY_MODEL, "model": "registry:production"})
    with Factory(config) as factory:
        first = release(factory.books, folder)
        begun = factory.cycle()
        release(factory.books, other)

    with Factory(config) as resumed:
        cycle = resumed.cycle()
        assert cycle.trigger == begun.trigger
        assert [tuple(each) for each in cycle.bound.models] == [("registry:production", first)]
        corpus = resumed.ingest()
        assert first in corpus.record.inputs

    by_number = config_of(tmp_path, {**BY_MODEL, "model": "registry:1"})
    by_name = config_of(tmp_path, {**BY_MODEL, "model": "registry:small-r2"})
    with Factory(by_number) as factory:
        asked_by_number = factory.cycle()
        # The same model by another name makes the same rows; that it was asked in another cycle is in its holdouts alone.
        assert labels_of(factory, factory.ingest()) == labels_of(factory, corpus)
    with Factory(by_name) as factory:
        assert factory.cycle().trigger not in (begun.trigger, asked_by_number.trigger)
        assert labels_of(factory, factory.ingest()) != labels_of(factory, corpus)


def test_feedback_is_labelled_by_the_model_that_its_cycle_is_bound_to_and_not_filtered_by_one(tmp_path, folder, judge):
    config = config_of(
        tmp_path,
        {**BY_MODEL, "model": "registry:production"},
        {"step": "keep_labels", "keep": ["nothing of this name"]},
        {**QUALITY, "model": "registry:production", "max_bits_per_byte": 1e-3, "min_bits_per_byte": 0},
    )
    table = random_rows(12, 20)
    texts = [f"{text} {i}" for i, text in enumerate(table["text"].to_pylist())]
    with Factory(config) as factory:
        books = factory.books
        models = [("registry:production", release(books, folder))]
        release(books, write_small_model(tmp_path / "other", seed=8, context=CONTEXT))
        for i, text in enumerate(texts):
            books.feedback.log_completion(
                Completion(
                    id=f"cmpl-{i}",
                    release=1,
                    prompt="what?",
                    answer="no",
                    request="{}",
                    finish_reason="stop",
                    prompt_tokens=1,
                    answer_tokens=1,
                )
            )
            books.feedback.record(
                Feedback(completion=f"cmpl-{i}", idempotency_key=f"k{i}", correction=text, user=f"u{i}")
            )
        number = books.feedback.seal(batch_rows=20, batch_after_s=None)
        batch = books.feedback.publish(number, books.artifacts)
        books.lineage.add(batch)
        bound = Bound(kind="drift", sources_digest="", batches=[batch.id], models=models)
        cycle = books.journal.claim(books.journal.open_cycle("drift-1", recipe={}, bound=bound))

        corpus = Corpora(bench_of(factory)).of_batch(cycle, batch, [])

        assert corpus.rows_kept == len(texts)
        said = pa.table({"text": texts, "prompt": ["what?"] * len(texts)})
        best = label_probabilities(said, step_of(BY_MODEL), judge).argmax(axis=1)
        assert sorted(labels_of(factory, corpus).values()) == sorted(LABELS[at] for at in best)


def test_a_folder_counts_by_what_it_holds_and_a_changed_one_begins_a_new_cycle(tmp_path, folder):
    first, second = (shutil.copytree(folder, tmp_path / name) for name in ("first", "second"))
    with Factory(config_of(tmp_path, {**QUALITY, "model": str(first), "max_bits_per_byte": 1e6})) as factory:
        begun, corpus = factory.cycle(), factory.ingest()
    with Factory(config_of(tmp_path, {**QUALITY, "model": str(second), "max_bits_per_byte": 1e6})) as factory:
        assert factory.cycle().trigger == begun.trigger
        assert factory.ingest().id == corpus.id
    write_small_model(first, seed=9, context=CONTEXT)
    with Factory(config_of(tmp_path, {**QUALITY, "model": str(first), "max_bits_per_byte": 1e6})) as factory:
        assert factory.cycle().trigger != begun.trigger
        assert factory.ingest().id != corpus.id


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("registry:production", StateError, "in production for registry:production, found none yet; run a cycle"),
        ("registry:7", StateError, "for registry:7, found none; name one of them"),
        ("registry:small-r2", StateError, "for registry:small-r2, found none"),
        ("nowhere/at-all", ConfigError, "at the model of a step of ingest.steps, found 'nowhere/at-all'"),
    ],
)
def test_a_model_that_is_not_there_is_named_before_anything_begins(tmp_path, name, error, message):
    with Factory(config_of(tmp_path, {**QUALITY, "model": name})) as factory:
        with pytest.raises(error) as caught:
            factory.ingest()
        assert message in str(caught.value)
        assert factory.books.journal.cycles() == []


def test_a_release_that_is_not_there_is_named_with_those_that_are(tmp_path, folder):
    with Factory(config_of(tmp_path, {**QUALITY, "model": "registry:2"})) as factory:
        release(factory.books, folder)
        with pytest.raises(StateError, match="for registry:2, found small-r1; name one of them"):
            factory.cycle()


def test_a_cycle_that_was_begun_without_the_step_says_so(tmp_path, folder):
    config = config_of(tmp_path, {**QUALITY, "model": "registry:production"})
    with Factory(config) as factory:
        release(factory.books, folder)
        cycle = factory.books.journal.open_cycle("run-old", recipe={}, bound=Bound(kind="run", sources_digest="x"))
        with pytest.raises(StateError, match="run-old to be bound to the model that registry:production stands for"):
            Corpora(bench_of(factory)).of_sources(cycle, [])
