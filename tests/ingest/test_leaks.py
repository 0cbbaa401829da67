"""Laws of leaks: nothing trains that copies, or nearly copies, what this cycle or an earlier one holds out."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from corpus_rows import corpus_table
from said_words import replaced, words

from aifactory.cluster.tasks import run_here
from aifactory.config import NearDuplicatesStep
from aifactory.ingest import listing
from aifactory.ingest.decisions import Earlier
from aifactory.ingest.index import held_out, index_bytes, index_of, read_index
from aifactory.ingest.leaks import LEAK
from aifactory.ingest.sketches import Sketches
from aifactory.records.artifacts import Corpus, Record, digest_of
from aifactory.records.rows import CORPUS_SCHEMA
from aifactory.records.storage import StoredFile

SHARE = 0.25
NEAR = {"step": "near_duplicates"}
DECONTAMINATE = {"step": "decontaminate"}
FIRST, SECOND = ("corpus", "1" * 16), ("corpus", "2" * 16)


def sides(rows):
    """On which side each row of the source is, by what the factory does with its key."""
    table = corpus_table(rows, source="docs", keyed_by_file=False, holdout_share=SHARE)
    return table["side"].to_pylist()


def on_side(side, make):
    """The first row that `make` makes which is on this side."""
    for _ in range(200):
        row = make()
        if sides([row]) == [side]:
            return row
    raise AssertionError(f"no row on the side {side}")


def text_rows(rng, count, side, length=100):
    return [on_side(side, lambda: {"text": " ".join(words(rng, length))}) for _ in range(count)]


def files_of(rows, number=3):
    """The rows in so many files, each a part of its own."""
    return {f"{i}.jsonl": "".join(json.dumps(row) + "\n" for row in rows[i::number]) for i in range(number)}


def corpus_of(made):
    """The corpus as the books have it."""
    files = [StoredFile(name=n, num_bytes=len(d), sha256=hashlib.sha256(d).hexdigest()) for n, d in made.bytes.items()]
    record = Record(
        kind="corpus",
        fingerprint=made.folder.name.ljust(64, "0"),
        digest=digest_of(files),
        code_version=1,
        recipe={},
        inputs=[],
        files=files,
        figures=made.figures,
    )
    return Corpus(record=record, uri=str(made.folder))


def earlier_holdouts(made):
    return Earlier(holdouts=held_out(made.index), corpora=[corpus_of(made)])


def recipe_of(*steps, quarantine=None):
    return {"holdout_share": SHARE, "steps": list(steps), "quarantine_similarity": quarantine}


@pytest.fixture
def each_file_is_a_part(monkeypatch):
    monkeypatch.setattr(listing, "MIN_BYTES", 0)
    monkeypatch.setattr(listing, "ends_group", lambda origin, added: True)


@pytest.fixture
def cycle(each_file_is_a_part, write_files, ingest):
    """Ingests rows, in three files."""

    def turn(rows, folder, *steps, quarantine=None, **options):
        root = write_files(files_of(rows), folder=folder)
        return ingest(root, "jsonl", recipe=recipe_of(*steps, quarantine=quarantine), **options)

    return turn


def line_of(made, row):
    """What the ledger says of a row that was planted."""
    (line,) = [line for line in made.ledger if line["text"] == row["text"]]
    return line


def id_of(made, row):
    (kept,) = [each for each in made.kept if each["text"] == row["text"]]
    return kept["id"]


# ── within one corpus ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_near_copy_of_a_row_of_the_holdout_is_in_the_ledger_with_the_id_that_it_is_like(cycle):
    rng = random.Random(1)
    held = text_rows(rng, 5, "holdout")
    rows = text_rows(rng, 20, "train") + held
    leaks = [on_side("train", lambda row=row: {"text": replaced(rng, row["text"], 3)}) for row in held]

    made = cycle(rows + leaks, "one", NEAR)

    assert made.figures["rejected_by_rule"] == {"near_holdout_leak": 5}
    for row, leak in zip(held, leaks, strict=True):
        line = line_of(made, leak)
        assert line["detail"] == f"like {id_of(made, row)}"
        assert 0.45 <= line["score"] <= 1


def test_a_copy_of_a_row_of_the_holdout_stands_in_the_ledger_with_the_id_that_it_is_like(write_files, ingest):
    rng = random.Random(2)
    texts = {f"{i}.txt": " ".join(words(rng, 50)) for i in range(40)}
    alone = ingest(write_files(texts, "alone"), storage="alone")
    held = {row["origin"]: row for row in alone.kept if row["side"] == "holdout"}
    assert len(held) > 3

    made = ingest(write_files(texts | {f"copy-of-{name}": row["text"] for name, row in held.items()}, "both"))

    assert {row["side"] for row in made.kept if row["text"] in {each["text"] for each in held.values()}} == {"holdout"}
    stays = {row["text"]: row["id"] for row in made.kept}
    assert sorted(line["text"] for line in made.ledger) == sorted(row["text"] for row in held.values())
    for line in made.ledger:
        assert (line["rule"], line["score"], line["detail"]) == ("duplicate", 1.0, f"like {stays[line['text']]}")


def test_a_passage_of_a_holdout_in_a_long_row_is_found_and_measured(cycle):
    rng = random.Random(3)
    held = text_rows(rng, 4, "holdout")

    def quoting(row):
        return {"text": " ".join([*words(rng, 2000), replaced(rng, row["text"], 2), *words(rng, 2000)])}

    leaks = [on_side("train", lambda row=row: quoting(row)) for row in held]
    made = cycle(text_rows(rng, 20, "train") + held + leaks, "one", NEAR, DECONTAMINATE)

    assert made.figures["rejected_by_rule"] == {LEAK: 4}
    for leak in leaks:
        line = line_of(made, leak)
        assert line["score"] < 0.05
        assert int(line["detail"].split()[-2]) >= 50


@pytest.mark.parametrize("seed", range(3))
def test_what_leaks_is_what_sets_of_runs_of_words_say(cycle, seed):
    rng = random.Random(seed)
    held = text_rows(rng, 6, "holdout", length=80)
    common = words(rng, 30)
    held.append(on_side("holdout", lambda: {"text": " ".join([*common, *words(rng, 40)])}))

    def quoting():
        of = rng.choice(held)["text"].split()
        start, length = rng.randrange(len(of)), rng.choice([5, 13, 20, 40, 80])
        before, after = rng.choice([0, 5, 40]), rng.choice([0, 40, 160])
        return {"text": " ".join([*words(rng, before), *of[start : start + length], *words(rng, after)])}

    def form():
        return {"text": " ".join([*common, *words(rng, 20)])}

    training = [on_side("train", quoting) for _ in range(60)] + [on_side("train", form) for _ in range(12)]
    training += text_rows(rng, 5, "train")
    training = list({row["text"]: row for row in training}.values())

    made = cycle(held + training, "one", DECONTAMINATE)

    def runs(text):
        said = text.split()
        return [] if len(said) < 8 else [tuple(said[i : i + 13]) for i in range(max(len(said) - 12, 1))]

    known = {run for row in held for run in runs(row["text"])}
    seen = Counter(run for row in training for run in set(runs(row["text"])))
    known -= {run for run, count in seen.items() if count > 10}
    expected = {}
    for row in training:
        found = [at for at, run in enumerate(runs(row["text"])) if run in known]
        # All that is quoted here is one piece, so that the words of a passage are those of all its runs.
        covered = len({at + i for at in found for i in range(min(13, len(row["text"].split())))})
        share = len(found) / max(len(runs(row["text"])), 1)
        if share >= 0.2 or covered >= 50:
            expected[row["text"]] = pytest.approx(share)
    assert 5 < len(expected) < 60
    assert {line["text"]: line["score"] for line in made.ledger} == expected
    assert {line["rule"] for line in made.ledger} == {LEAK}


FORMS = {
    "prompt": ({"prompt": "prompt", "text": "text"}, lambda asked, answer: {"prompt": asked, "text": answer}),
    "messages": (
        {"messages": "turns"},
        lambda asked, answer: {
            "turns": [
                {
                    "role": "system",
                    "content": "Answer as well as you can and in no more than ten words, please, my friend.",
                },
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answer},
            ]
        },
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_was_asked_in_a_row_of_the_holdout_leaks_whoever_says_it(write_files, ingest, form):
    rng = random.Random(4)
    columns, row_of = FORMS[form]

    def paragraphs():
        return "".join(f'{" ".join(words(rng, 6))}: "{" ".join(words(rng, 6))}"\n' for _ in range(9))

    def made_of(rows, name, *steps):
        return ingest(
            write_files(files_of(rows), name), "jsonl", columns=columns, recipe=recipe_of(*steps), storage=name
        )

    rows = [row_of(paragraphs(), " ".join(words(rng, 30))) for _ in range(9)]
    held = [row for row in made_of(rows, "alone").kept if row["side"] == "holdout"]
    assert held
    asked = [row["prompt"] or json.loads(row["messages"])[-1]["content"] for row in held]
    # Asked again, and answered with it; each often enough that some of them would train.
    again = [row_of(question, " ".join(words(rng, 30))) for question in asked for _ in range(4)]
    answers = [row_of(" ".join(words(rng, 5)), question) for question in asked for _ in range(4)]

    alone = made_of(rows + again + answers, "undecided")
    made = made_of(rows + again + answers, "decided", DECONTAMINATE)

    planted = {(row["prompt"], row["messages"], row["text"]) for row in alone.kept if row["side"] == "train"}
    planted -= {(row["prompt"], row["messages"], row["text"]) for row in made_of(rows, "alone").kept}
    assert len(planted) > 4
    assert made.figures["rejected_by_rule"] == {LEAK: len(planted)}
    assert {row["text"] for row in made.ledger} == {text for _, _, text in planted}


def test_a_row_of_the_holdout_is_no_leak(cycle):
    rng = random.Random(5)
    (one,) = text_rows(rng, 1, "holdout")
    other = on_side("holdout", lambda: {"text": one["text"] + " " + " ".join(words(rng, 100))})

    made = cycle([one, other, *text_rows(rng, 10, "train")], "one", DECONTAMINATE)

    assert made.ledger == []
    assert made.figures["rows_holdout"] == 2


# ── across cycles ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_copy_of_what_an_earlier_cycle_held_out_trains(cycle):
    rng = random.Random(6)
    held = text_rows(rng, 3, "holdout")
    before = cycle(text_rows(rng, 10, "train") + held, "before", target=FIRST)
    near = [on_side("train", lambda row=row: {"text": replaced(rng, row["text"], 3)}) for row in held]
    long = [
        on_side("train", lambda row=row: {"text": " ".join([*words(rng, 900), row["text"], *words(rng, 900)])})
        for row in held
    ]
    news = text_rows(rng, 10, "train")

    made = cycle(
        news + near + long, "now", NEAR, DECONTAMINATE, target=SECOND, earlier=earlier_holdouts(signed(before))
    )

    assert made.figures["rejected_by_rule"] == {LEAK: 3, "near_holdout_leak": 3}
    for row, leak in zip(held, near, strict=True):
        assert line_of(made, leak)["detail"] == f"like {id_of(before, row)}"
    assert {line_of(made, leak)["rule"] for leak in long} == {LEAK}
    assert {row["text"] for row in made.kept} == {row["text"] for row in news}


def signed(made):
    """A corpus with the signatures that the step asks for, as the workshop sees to it."""
    table = pa.Table.from_pylist(made.kept, schema=CORPUS_SCHEMA)
    made.index = index_of(table, near=NearDuplicatesStep(step="near_duplicates"))
    return made


def test_an_exact_copy_of_what_an_earlier_cycle_held_out_is_in_the_ledger_with_its_id(write_files, ingest):
    rng = random.Random(7)
    texts = {f"{i}.txt": " ".join(words(rng, 50)) for i in range(40)}
    before = ingest(write_files(texts, "before"), target=FIRST)
    # Under another name a file is another row, most often of the other side.
    again = {f"again-{name}": text for name, text in texts.items()}
    new = {f"new-{i}.txt": " ".join(words(rng, 50)) for i in range(10)}

    made = ingest(write_files(again | new, "now"), target=SECOND, earlier=earlier_holdouts(before))

    ids = {row["text"]: row["id"] for row in before.kept if row["side"] == "holdout"}
    assert {line["rule"] for line in made.ledger} == {"holdout_leak"}
    assert len(made.ledger) > 2
    assert all(line["detail"] == f"like {ids[line['text']]}" for line in made.ledger)
    assert made.texts("train").isdisjoint(before.texts("holdout"))
    # What trained there, and here does again, is no leak: this cycle begins from a fresh model.
    assert made.texts("train") & before.texts("train")


def test_a_duplicate_across_two_cycles_is_in_the_ledger_with_the_id_of_what_an_ancestor_has_seen(cycle):
    rng = random.Random(8)
    before = signed(cycle(text_rows(rng, 10, "train") + text_rows(rng, 2, "holdout"), "before", target=FIRST))
    trained = [{"text": text} for text in sorted(before.texts("train"))]
    again = trained[:3]
    near = [on_side("train", lambda row=row: {"text": replaced(rng, row["text"], 3)}) for row in trained[3:6]]

    made = cycle(
        text_rows(rng, 10, "train") + again + near,
        "now",
        NEAR,
        target=SECOND,
        earlier=Earlier(ancestors=before.index, corpora=[corpus_of(before)]),
    )

    assert made.figures["rejected_by_rule"] == {"seen_by_ancestor": 3, "near_seen_by_ancestor": 3}
    for row, copy in [*zip(again, again, strict=True), *zip(trained[3:6], near, strict=True)]:
        assert line_of(made, copy)["detail"] == f"like {id_of(before, row)}"


def test_rows_that_were_brought_back_do_not_get_round_the_quarantine(cycle):
    rng = random.Random(9)
    (held,) = text_rows(rng, 1, "holdout")
    before = signed(cycle([*text_rows(rng, 10, "train"), held], "before", target=FIRST))
    leaks = {
        "near_holdout_leak": on_side("train", lambda: {"text": replaced(rng, held["text"], 3)}),
        LEAK: on_side("train", lambda: {"text": " ".join([*words(rng, 300), held["text"]])}),
    }
    steps = [{"step": "length", "max_bytes": 500}, NEAR, DECONTAMINATE]
    rows = [*leaks.values(), *text_rows(rng, 10, "train", length=30)]
    first = cycle(rows, "now", *steps, target=SECOND)
    assert first.figures["rejected_by_rule"] == {"length": 2}
    keys = frozenset(line["key"] for line in first.ledger)

    again = cycle(
        rows,
        "now",
        *steps,
        target=SECOND,
        earlier=earlier_holdouts(before),
        restored=dict.fromkeys(["length", *leaks, "holdout_leak"], keys),
    )

    assert {line["rule"]: line["text"] for line in again.ledger} == {rule: row["text"] for rule, row in leaks.items()}


# ── who makes it, and how often ───────────────────────────────────────────────────────────────────────────────────────


def leaky_rows(seed):
    """Rows among which there are copies of those of the holdout, of each kind."""
    rng = random.Random(seed)
    held = text_rows(rng, 6, "holdout")
    near = [on_side("train", lambda row=row: {"text": replaced(rng, row["text"], 3)}) for row in held[:3]]
    long = [on_side("train", lambda row=row: {"text": " ".join([*words(rng, 300), row["text"]])}) for row in held[3:]]
    rows = held + near + long + text_rows(rng, 20, "train")
    rng.shuffle(rows)
    return rows


def test_a_second_pass_over_the_same_data_makes_nothing(cycle):
    before = cycle(leaky_rows(10), "before", target=FIRST)
    done = Counter()

    def counting(function, items):
        done[function.__name__] += len(items)
        return run_here(function, items)

    turn = {"earlier": Earlier(corpora=[corpus_of(before)]), "target": SECOND, "run": counting}
    rows = leaky_rows(11)
    first = cycle(rows, "now", NEAR, DECONTAMINATE, **turn)
    made = dict(done)
    done.clear()
    again = cycle(rows, "now", NEAR, DECONTAMINATE, **turn)

    assert {name for name, count in made.items() if count} == set(done)
    assert len(made) == 6, "two passes over the parts, and four that look for leaks"
    assert not done.total()
    assert again.bytes == first.bytes

    # With one row more its part is made anew; no other is read again, and what was held out before neither.
    (more,) = text_rows(random.Random(12), 1, "train")
    cycle([*rows, more], "more", NEAR, DECONTAMINATE, **turn)
    assert (done["_read_part"], done["_ngrams_of_part"], done["_ngrams_of_corpus"]) == (1, 1, 0)


def backwards(function, items):
    return run_here(function, items[::-1])[::-1]


def shuffled(function, items):
    order = list(range(len(items)))
    random.Random(len(items)).shuffle(order)
    results = {at: function(*items[at]) for at in order}
    return [results[at] for at in range(len(items))]


@pytest.mark.parametrize("run", [backwards, shuffled])
def test_leaks_do_not_depend_on_the_order_in_which_parts_are_made(cycle, run):
    rows = leaky_rows(13)
    made = cycle(rows, "now", NEAR, DECONTAMINATE)
    again = cycle(rows, "now", NEAR, DECONTAMINATE, run=run, storage="again")

    assert made.figures["pieces"] == 3
    assert made.figures["rejected_by_rule"] == {LEAK: 3, "near_holdout_leak": 3}
    assert again.bytes == made.bytes


def test_leaks_do_not_depend_on_the_files_in_which_rows_lie(each_file_is_a_part, write_files, ingest):
    rows = leaky_rows(14)
    found = [
        {(line["text"], line["rule"], line["score"], line["detail"]) for line in made.ledger}
        for made in (
            ingest(
                write_files(files_of(rows, number), folder=str(number)),
                "jsonl",
                recipe=recipe_of(NEAR, DECONTAMINATE),
                storage=str(number),
            )
            for number in (1, 2, 5)
        )
    ]
    assert len(found[0]) == 6
    assert found[0] == found[1] == found[2]


# ── where no step looks for them ──────────────────────────────────────────────────────────────────────────────────────


def test_without_any_step_a_near_copy_of_what_is_held_out_here_does_not_train(cycle):
    rng = random.Random(4)
    held = text_rows(rng, 5, "holdout", length=50)
    rows = text_rows(rng, 20, "train", length=50) + held
    leaks = [on_side("train", lambda row=row: {"text": replaced(rng, row["text"], 2)}) for row in held]

    made = cycle(rows + leaks, "one", quarantine=0.4)

    assert made.figures["rejected_by_rule"] == {"near_holdout_leak": 5}
    for row, leak in zip(held, leaks, strict=True):
        line = line_of(made, leak)
        assert line["detail"] == f"like {id_of(made, row)}"
        assert 0.4 <= line["score"] <= 1
    assert {row["text"] for row in made.kept} == {row["text"] for row in rows}

    # The control.
    assert not cycle(rows + leaks, "two").ledger


@pytest.mark.parametrize("is_ancestor", [True, False])
def test_without_any_step_a_near_copy_of_what_an_earlier_cycle_held_out_does_not_train(cycle, is_ancestor):
    rng = random.Random(5)
    before = cycle(text_rows(rng, 10, "train") + text_rows(rng, 6, "holdout"), "before", target=FIRST, quarantine=0.4)
    held = [row for row in before.kept if row["side"] == "holdout"]
    leaks = [on_side("train", lambda row=row: {"text": replaced(rng, row["text"], 3)}) for row in held]
    news = text_rows(rng, 10, "train")
    ancestor = Earlier(ancestors=before.index, corpora=[corpus_of(before)])
    earlier = ancestor if is_ancestor else earlier_holdouts(before)

    made = cycle(news + leaks, "now", target=SECOND, earlier=earlier, quarantine=0.4)

    assert made.figures["rejected_by_rule"] == {"near_holdout_leak": 6}
    for row, leak in zip(held, leaks, strict=True):
        assert line_of(made, leak)["detail"] == f"like {row['id']}"
    assert {row["text"] for row in made.kept} == {row["text"] for row in news}


def test_short_rows_of_one_form_all_train(cycle):
    rng = random.Random(6)
    rows = [
        {"text": f"please tell me what the weather is going to be like today in {place}"} for place in words(rng, 80)
    ]

    made = cycle(rows, "one", quarantine=0.4)

    assert len(made.kept) == 80


def test_a_corpus_without_rows_to_compare_is_no_trouble(cycle):
    rng = random.Random(7)
    rows = [{"text": word} for word in words(rng, 30)]

    made = cycle(rows, "one", quarantine=0.4)

    assert len(made.kept) == 30


def test_a_corpus_keeps_the_sketches_of_what_it_holds_out_alone(cycle):
    rng = random.Random(8)
    rows = [*text_rows(rng, 8, "train"), {"text": "short"}, *text_rows(rng, 2, "holdout")]

    made = cycle(rows, "one", quarantine=0.4)

    again = read_index(index_bytes(made.index))
    held = Sketches.of(pa.array(sorted(made.texts("holdout"))))
    assert len(again.sketches) == len(made.kept)
    assert sorted(again.sketches.hash_M) == sorted(held.hash_M)
    assert {int(count) for count in np.diff(again.sketches.end_N1)} == {0, 32}
    assert (np.diff(again.sketches.end_N1) > 0).tolist() == again.is_holdout_N.tolist()
