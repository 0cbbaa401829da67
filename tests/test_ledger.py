"""The ledger, by the command: what it holds is counted and shown, and what is brought back comes back once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from small_factories import small_config

from aifactory import Config, Factory
from aifactory.cli import main
from aifactory.errors import ConfigError, StateError
from aifactory.ingest.rule_words import DECISION_RULES
from aifactory.ledger import FOR_GOOD
from aifactory.records.artifacts import Corpus

SHORT, DIGITS = 12, 5
STEPS = ({"step": "length", "min_bytes": 20}, {"step": "alphabetic", "min_share": 0.5})
SHORTER = [f"no {i:02d}" for i in range(SHORT)]
SHORT_AND_DIGITS = "0 1 2 3"


def rows_of(seed: int) -> list[Any]:
    """Rows of which some break each rule."""
    rng = random.Random(seed)
    good = [
        {"text": " ".join(rng.choice(["ab", "cde", "fghi"]) + chr(97 + i % 26) for i in range(12))} for _ in range(30)
    ]
    digits = [{"text": "1234 5678 " * 4 + str(i)} for i in range(DIGITS)]
    return [
        *good,
        *({"text": text} for text in [*SHORTER, SHORT_AND_DIGITS]),
        *digits,
        good[0],
        {"text": " "},
        {"body": "x"},
        {"text": 5},
    ]


COUNTS = {
    "alphabetic": DIGITS,
    "duplicate": 1,
    "empty": 1,
    "length": SHORT + 1,
    "missing_column": 1,
    "wrong_type": 1,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "rows" / "rows.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(0)), encoding="utf-8")
    return file


@pytest.fixture
def config_file(tmp_path: Path, source: Path) -> Path:
    section = {"name": "rows", "kind": "jsonl", "path": str(source.parent)}
    values = small_config(tmp_path, ingest={"sources": [section], "steps": list(STEPS)})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


@pytest.fixture
def factory(config_file: Path) -> Iterator[Factory]:
    """A factory that has made nothing yet. What it ingests is so little that no Ray is asked for it."""
    with Factory(Config.from_yaml(config_file)) as factory:
        yield factory


@pytest.fixture
def ingested(factory: Factory) -> Corpus:
    corpus = factory.ingest()
    assert not factory._connected
    return corpus


@pytest.fixture
def command(config_file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process; its status and what it wrote."""

    def run(verb: str, *arguments: str) -> tuple[int, str, str]:
        status = main([verb, str(config_file), *arguments])
        written = capsys.readouterr()
        return status, written.out, written.err

    return run


def again(factory: Factory) -> Corpus:
    """The corpus of the next cycle, as the command would make it: in a factory that is opened anew."""
    with Factory(factory.config) as opened:
        return opened.ingest()


def kept(corpus: Corpus) -> list[str]:
    files = [file for side in ("train", "holdout") for file in sorted(Path(corpus.uri).glob(f"{side}-*.parquet"))]
    return [text for file in files for text in pq.read_table(file)["text"].to_pylist()]


def ledger(corpus: Corpus) -> list[dict[str, Any]]:
    return [row for file in sorted(Path(corpus.uri).glob("rejected-*")) for row in pq.read_table(file).to_pylist()]


def texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


# ── what was rejected ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_counts_by_rule_are_those_of_the_ledger(factory: Factory, ingested: Corpus) -> None:
    report = factory.rejected()

    assert report.corpus == ingested.id
    assert report.by_rule == COUNTS
    assert sum(report.by_rule.values()) == ingested.rows_rejected == len(ledger(ingested))
    assert report.lines()[0] == f"Ledger of {ingested.id}: {sum(COUNTS.values())} rows rejected."
    assert [int(line.split()[0]) for line in report.lines()[1 : 1 + len(COUNTS)]] == sorted(
        COUNTS.values(), reverse=True
    )


@pytest.mark.parametrize("limit", [0, 1, 3, 5, 13, 1000])
def test_rows_are_shown_evenly_spaced_in_their_order(factory: Factory, ingested: Corpus, limit: int) -> None:
    for rule in (None, "length", "duplicate"):
        every = [row for row in ledger(ingested) if rule in (None, row["rule"])]
        shown = factory.rejected(rule=rule, limit=limit).rows

        places = [every.index(row) for row in shown]
        assert len(places) == min(limit, len(every))
        assert places == sorted(set(places))
        if places:
            gaps = [b - a for a, b in zip(places, [*places[1:], len(every)], strict=True)]
            assert places[0] == 0
            assert max(gaps) - min(gaps) <= 1


def test_the_command_says_the_same_in_text_and_json(
    factory: Factory, ingested: Corpus, command: Callable[..., tuple[int, str, str]]
) -> None:
    expected = factory.rejected(rule="length", limit=4)

    status, out, _ = command("rejected", "--rule", "length", "--limit", "4", "--json")
    assert (status, json.loads(out)) == (0, json.loads(json.dumps(expected.to_json())))
    status, out, _ = command("rejected", "--rule", "length", "--limit", "4", "--corpus", ingested.id)
    assert (status, out.splitlines()) == (0, expected.lines())
    assert all(row["text"] in out and row["id"] in out and row["detail"] in out for row in expected.rows)


def test_a_rule_that_took_nothing_names_the_nearest(
    command: Callable[..., tuple[int, str, str]], ingested: Corpus
) -> None:
    for verb in ("rejected", "restore"):
        status, out, said = command(verb, "--rule", "lenght")
        assert (status, out) == (2, "")
        assert "did you mean 'length'?" in said
        status, _, said = command(verb, "--rule", "xyz")
        assert status == 2
        assert ", ".join(COUNTS) in said


def test_a_corpus_that_is_not_there_is_named_with_those_that_are(
    command: Callable[..., tuple[int, str, str]], ingested: Corpus
) -> None:
    for arguments in (("rejected",), ("restore", "--rule", "length")):
        status, _, said = command(*arguments, "--corpus", "corpus/none")
        assert status == 2
        assert ingested.id in said
        assert "'corpus/none'" in said


def test_where_nothing_was_ingested_the_next_step_is_said(
    factory: Factory, command: Callable[..., tuple[int, str, str]]
) -> None:
    with pytest.raises(StateError, match="found none; run: aifactory ingest"):
        factory.rejected()
    for arguments in (("rejected",), ("restore", "--rule", "length")):
        status, out, said = command(*arguments)
        assert (status, out) == (1, "")
        assert "aifactory ingest" in said


def test_the_newest_corpus_is_shown_where_none_is_named(factory: Factory, ingested: Corpus, source: Path) -> None:
    with source.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "tiny"}) + "\n")
    newer = again(factory)

    assert factory.rejected().corpus == newer.id != ingested.id
    assert factory.rejected().by_rule == {**COUNTS, "length": SHORT + 2}
    assert factory.rejected(corpus=ingested.id).by_rule == COUNTS


# ── brought back ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_that_were_brought_back_are_in_the_next_corpus_and_not_in_its_ledger(
    factory: Factory, ingested: Corpus, command: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, _ = command("restore", "--rule", "length", "--json")
    assert (status, json.loads(out)) == (0, {"corpus": ingested.id, "rule": "length", "rows": SHORT + 1})

    after = again(factory)

    assert set(SHORTER) <= set(kept(after))
    assert set(SHORTER).isdisjoint(kept(ingested))
    # This one breaks a rule that nobody has lifted.
    assert SHORT_AND_DIGITS not in kept(after)
    lifted = {rule: count for rule, count in COUNTS.items() if rule != "length"}
    assert after.figures["rejected_by_rule"] == {**lifted, "alphabetic": DIGITS + 1}
    # Nothing else has changed, and no row has vanished.
    assert set(kept(after)) == set(kept(ingested)) | set(SHORTER)
    assert after.rows_in == ingested.rows_in == after.rows_kept + after.rows_rejected


def test_two_rules_are_lifted_together_and_a_second_cycle_forgets_neither(factory: Factory, ingested: Corpus) -> None:
    factory.restore("length")
    between = again(factory)
    restored = factory.restore("alphabetic")
    assert (restored.corpus, restored.rows) == (between.id, DIGITS + 1)

    after = again(factory)

    assert {*SHORTER, SHORT_AND_DIGITS} <= set(kept(after))
    assert {"length", "alphabetic"}.isdisjoint(after.figures["rejected_by_rule"])


def test_restoring_again_what_is_restored_begins_no_other_cycle(factory: Factory, ingested: Corpus) -> None:
    factory.restore("length", corpus=ingested.id)
    after = again(factory)
    factory.restore("length", corpus=ingested.id)

    assert again(factory).id == after.id
    assert len(factory.books.journal.cycles()) == 2


def test_who_brought_rows_back_is_in_the_audit_and_what_failed_is_not(
    factory: Factory, ingested: Corpus, command: Callable[..., tuple[int, str, str]]
) -> None:
    command("restore", "--rule", "lenght")
    command("restore", "--rule", "wrong_type")
    assert factory.books.journal.audited().lines == []

    command("restore", "--rule", "length")

    (entry,) = factory.books.journal.audited().lines
    detail = {"corpus": ingested.id, "rule": "length", "rows": SHORT + 1}
    assert (entry.action, entry.subject, entry.detail) == ("restore", ingested.id, detail)
    assert entry.key_id == factory.books.journal.key_id
    assert [event.detail for event in factory.books.journal.events(event="restored")] == [detail]


@pytest.mark.parametrize("rule", ["wrong_type", "missing_column"])
def test_what_never_became_a_row_is_mended_in_its_source(factory: Factory, ingested: Corpus, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"expected rows of '{rule}' that can be restored.*mend them in their source"):
        factory.restore(rule)


@pytest.mark.parametrize(("rule", "why"), [("duplicate", "was kept"), ("empty", "no text")])
def test_what_no_step_could_bring_back_is_not_promised(factory: Factory, ingested: Corpus, rule: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"found '{rule}', by which 1 rows.*stay rejected: .*{why}"):
        factory.restore(rule)
    assert factory.books.journal.events(event="restored") == []
    assert again(factory).id == ingested.id


def test_every_rule_that_looks_at_all_rows_rejects_for_good() -> None:
    assert set(FOR_GOOD) == {*DECISION_RULES, "empty"}
