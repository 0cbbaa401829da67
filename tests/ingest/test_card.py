"""Laws of the dataset card: the folder opens as it lies there, and the card says what is in it."""

from __future__ import annotations

import json
import random

import datasets
import pytest
import yaml

from aifactory.ingest.card import dataset_card
from aifactory.records.rows import CORPUS_SCHEMA, LEDGER_SCHEMA

WORDS = "the river bends where old willows lean over stones and slow water carries light to quiet fields"


def prose(number: int) -> str:
    rng = random.Random(number)
    return " ".join(rng.choices(WORDS.split(), k=60)) + f" {number}."


@pytest.fixture
def corpus(write_files, ingest):
    rows = [json.dumps({"text": prose(i), "topic": f"t{i % 3}"}) for i in range(60)]
    bad = ['{"text": "hi", "topic": "t0"}', "no json"]
    files = {"a.jsonl": "\n".join(rows), "b.jsonl": "\n".join(rows[:20] + bad)}
    return ingest(
        write_files(files),
        "jsonl",
        columns={"text": "text", "label": "topic"},
        recipe={"steps": [{"step": "length", "min_bytes": 20}, {"step": "language"}]},
    )


def head_of(card: str) -> dict:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def figures(**values):
    plain = {
        "rows_in": 1,
        "rows_kept": 1,
        "rows_rejected": 0,
        "rows_holdout": 0,
        "bytes_kept": 9,
        "rejected_by_rule": {},
    }
    return {**plain, "languages": {}, "steps": [], "corpus_steps": []} | values


def test_a_corpus_opens_as_it_lies_there_with_its_rows_and_its_ledger(corpus, tmp_path):
    opened = datasets.load_dataset(str(corpus.folder), cache_dir=str(tmp_path / "cache"))
    ledger = datasets.load_dataset(str(corpus.folder), "rejected", cache_dir=str(tmp_path / "cache"))

    assert (corpus.folder / "report.html").exists()
    assert set(opened) == {"train", "holdout"}
    for side in opened:
        assert list(opened[side]) == [row for row in corpus.kept if row["side"] == side]
    assert opened["train"].column_names == CORPUS_SCHEMA.names
    assert set(ledger) == {"train"}
    assert list(ledger["train"]) == corpus.ledger
    assert {"duplicate", "length", "invalid_json"} <= set(ledger["train"]["rule"])


def test_a_corpus_of_which_nothing_was_rejected_has_no_ledger_to_open(write_files, ingest, tmp_path):
    made = ingest(write_files({f"{i}.txt": prose(i) for i in range(20)}))

    names = datasets.get_dataset_config_names(str(made.folder), cache_dir=str(tmp_path / "cache"))

    assert names == ["default"]
    assert "rejected`" not in made.bytes["README.md"].decode().split("## Columns")[0]


def test_the_card_says_what_the_hub_asks_for(corpus):
    head = head_of(corpus.bytes["README.md"].decode())

    assert head["license"] == "unknown"
    assert head["size_categories"] == ["n<1K"]
    assert head["language"] == list(corpus.figures["languages"]) == ["en"]
    assert [config["config_name"] for config in head["configs"]] == ["default", "rejected"]


def test_every_column_is_explained(corpus):
    card = corpus.bytes["README.md"].decode()

    for field in [*CORPUS_SCHEMA, *LEDGER_SCHEMA]:
        assert f"| `{field.name}` | {field.type} | " in card


def test_the_steps_of_the_card_take_what_was_rejected(corpus):
    card = corpus.bytes["README.md"].decode()
    table = card.split("| step | rows in | rejected |\n")[1].split("\n\n")[0].splitlines()[1:]
    taken = [int(line.split("|")[3].replace(",", "")) for line in table]

    assert sum(taken) == corpus.figures["rows_rejected"] > 0


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (123_456, "100K<n<1M"),
        (10**12 - 1, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_sizes_have_the_names_of_the_hub(rows, size):
    assert head_of(dataset_card("x", figures(rows_kept=rows)))["size_categories"] == [size]


def test_codes_of_languages_stay_text_and_what_is_no_code_is_left_out():
    card = dataset_card("x", figures(languages={"no": 5, "en": 9, "not a code": 3, "yes\n---": 1}))

    assert head_of(card)["language"] == ["en", "no"]
