"""Laws of a corpus: no row vanishes, no holdout row trains, and the bytes depend on the files alone."""

from __future__ import annotations

import gzip
import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aifactory.cluster.tasks import run_here
from aifactory.errors import EmptyCorpusError
from aifactory.ingest.decisions import Earlier

ALPHABET = "abc de\nfé中😀 "


def random_texts(seed, number):
    rng = random.Random(seed)
    return ["".join(rng.choice(ALPHABET) for _ in range(rng.randrange(20, 80))) + f"x{i}" for i in range(number)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(table):
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def require_complete(made):
    figures = made.figures
    assert figures["rows_in"] == figures["rows_kept"] + figures["rows_rejected"] + figures["rows_erased"]
    assert figures["rows_kept"] == len(made.kept)
    assert figures["rows_rejected"] == len(made.ledger)
    assert figures["rows_holdout"] == len([row for row in made.kept if row["side"] == "holdout"])
    assert figures["bytes_kept"] == sum(len(row["text"].encode()) for row in made.kept)
    counted = {}
    for line in made.ledger:
        counted[line["rule"]] = counted.get(line["rule"], 0) + 1
        assert line["id"]
        assert line["detail"]
        assert line["score"] is not None
    assert figures["rejected_by_rule"] == counted


GOOD = {f"good-{i}.txt": text for i, text in enumerate(random_texts(0, 40))}


def test_bad_documents_are_in_the_ledger_and_the_run_goes_on(write_files, ingest):
    bad = {"broken.txt": b"abc \xff\xfe def", "cut.txt": "é".encode()[:1], "empty.txt": b"", "white.txt": " \n\t\u3000"}
    made = ingest(write_files(GOOD | bad))

    require_complete(made)
    assert made.figures["rows_in"] == 44
    assert made.rules == {
        "broken.txt": "invalid_utf8",
        "cut.txt": "invalid_utf8",
        "empty.txt": "empty",
        "white.txt": "empty",
    }
    texts = {line["origin"]: line["text"] for line in made.ledger}
    assert texts["broken.txt"] == r"abc \xff\xfe def"
    assert texts["white.txt"] == " \n\t\u3000"
    assert {line["origin"]: line["score"] for line in made.ledger}["broken.txt"] == 4.0


def test_bad_lines_are_in_the_ledger_and_the_run_goes_on(write_files, ingest):
    good = [{"text": text} for text in random_texts(1, 40)]
    bad = {
        "no json": "invalid_json",
        "[1, 2]": "invalid_json",
        '"text"': "invalid_json",
        "[" * 100_000: "invalid_json",
        '{"body": "x"}': "missing_column",
        '{"text": 5}': "wrong_type",
        '{"text": null}': "wrong_type",
        '{"text": ["a"]}': "wrong_type",
        '{"text": "a \\ud800 b", "other": 1}': "invalid_utf8",
    }
    raw = lines(good).encode() + "\n".join(bad).encode() + b'\n{"text": "\xff"}\n{"text": "  "}\n'
    made = ingest(write_files({"a.jsonl": raw}), "jsonl")

    require_complete(made)
    assert made.figures["rows_in"] == 40 + len(bad) + 2
    assert {line["text"]: line["rule"] for line in made.ledger} == bad | {
        r'{"text": "\xff"}': "invalid_utf8",
        "  ": "empty",
    }
    assert [line["position"] for line in made.ledger] == [40 + i for i in range(len(bad) + 2)]


def test_a_truncated_archive_gives_the_rows_before_the_damage(write_files, ingest):
    rng = random.Random(3)
    rows = lines({"text": rng.randbytes(60).hex()} for _ in range(2000)).encode()
    whole = gzip.compress(rows)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    made = ingest(
        write_files(
            {
                "a.jsonl": lines({"text": text} for text in random_texts(3, 20)),
                "cut.jsonl.gz": whole[: len(whole) // 2],
                "damaged.jsonl.gz": bytes(damaged),
                "not.jsonl.gz": b"no gzip at all",
                "one.jsonl.gz": gzip.compress(b'{"text": "one"}'),
            }
        ),
        "jsonl",
    )

    require_complete(made)
    broken = {line["origin"] for line in made.ledger if line["rule"] == "unreadable_file"}
    assert broken == {"cut.jsonl.gz", "damaged.jsonl.gz", "not.jsonl.gz"}
    assert "one" in {row["text"] for row in made.kept}
    assert 200 < len([row for row in made.kept if row["origin"] == "cut.jsonl.gz"]) < 1800


def test_bad_tables_are_in_the_ledger_and_the_run_goes_on(write_files, ingest):
    good = parquet(pa.table({"text": random_texts(4, 40), "other": list(range(40))}))
    broken_text = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00\x05\x00\x00\x00"), pa.py_buffer(b"a\xffgut")
    )
    made = ingest(
        write_files(
            {
                "good.parquet": good,
                "cut.parquet": good[:-100],
                "head.parquet": good[: len(good) // 2],
                "not.parquet": b"PAR1",
                "missing.parquet": parquet(pa.table({"body": ["a"]})),
                "typed.parquet": parquet(pa.table({"text": [1, 2]})),
                "null.parquet": parquet(pa.table({"text": pa.array([None, "there"], pa.string())})),
                "utf8.parquet": parquet(pa.table({"text": broken_text})),
                "none.parquet": parquet(pa.table({"text": pa.array([], pa.string())})),
            }
        ),
        "parquet",
    )

    require_complete(made)
    assert made.figures["rows_in"] == 40 + 3 + 1 + 2 + 2 + 2
    assert made.rules == {
        "cut.parquet": "unreadable_file",
        "head.parquet": "unreadable_file",
        "not.parquet": "unreadable_file",
        "missing.parquet": "missing_column",
        "typed.parquet": "wrong_type",
        "null.parquet": "wrong_type",
        "utf8.parquet": "invalid_utf8",
    }
    assert {"there", "gut"} <= {row["text"] for row in made.kept}
    assert {line["text"] for line in made.ledger if line["rule"] == "wrong_type"} == {
        "{'text': 1}",
        "{'text': 2}",
        "{'text': None}",
    }


def test_each_filter_rejects_with_its_rule_and_what_it_measured(write_files, ingest):
    files = GOOD | {
        "short.txt": "hi",
        "long.txt": "a b " * 1000,
        "digits.txt": "1234 5678 ab, " * 5,
        "wide.txt": "ab " * 150,
    }
    made = ingest(
        write_files(files),
        recipe={
            "steps": [
                {"step": "length", "min_bytes": 5, "max_bytes": 2000},
                {"step": "alphabetic", "min_share": 0.3},
                {"step": "line_length", "max_mean_chars": 300},
            ]
        },
    )

    require_complete(made)
    assert made.rules == {
        "short.txt": "length",
        "long.txt": "length",
        "digits.txt": "alphabetic",
        "wide.txt": "line_length",
    }
    scores = {line["origin"]: line["score"] for line in made.ledger}
    assert scores == {
        "short.txt": 2.0,
        "long.txt": 4000.0,
        "digits.txt": pytest.approx(2 / 11),
        "wide.txt": 450.0,
    }
    assert {line["origin"]: line["text"] for line in made.ledger}["short.txt"] == "hi"


def test_feedback_names_its_users_and_the_answers_that_were_corrected(write_files, ingest):
    rows = pa.table(
        {
            "prompt": [f"q{i}" for i in range(40)],
            "text": [f"a{i}" for i in range(40)],
            "user": [f"user-{i % 7}" for i in range(40)],
            "completion": [f"cmpl-{i}" for i in range(40)],
        }
    )
    columns = {"prompt": "prompt", "text": "text", "user": "user", "origin": "completion"}

    made = ingest(write_files({"rows.parquet": parquet(rows)}), "parquet", columns=columns)

    assert made.figures["rows_kept"] == 40
    assert {row["cluster"] for row in made.kept} == {f"user-{i}" for i in range(7)}
    assert {(row["prompt"], row["origin"]) for row in made.kept} == {(f"q{i}", f"cmpl-{i}") for i in range(40)}


def test_columns_of_a_source_that_are_called_user_or_completion_are_data(write_files, ingest):
    rows = pa.table({"user": [f"q{i}" for i in range(40)], "completion": [f"a{i}" for i in range(40)]})
    made = ingest(
        write_files({"rows.parquet": parquet(rows)}), "parquet", columns={"text": "completion", "prompt": "user"}
    )

    assert {(row["prompt"], row["text"]) for row in made.kept} == {(f"q{i}", f"a{i}") for i in range(40)}
    assert {row["origin"] for row in made.kept} == {"rows.parquet"}
    assert len({row["cluster"] for row in made.kept}) == 40


# ── duplicates and holdouts ───────────────────────────────────────────────────────────────────────────────────────────


def test_of_copies_the_one_in_the_holdout_survives_then_the_first(write_files, ingest):
    twins = {f"{c}/{name}": text for c in ("one", "two", "three") for name, text in GOOD.items()}
    made = ingest(write_files(twins))

    require_complete(made)
    assert len(made.kept) == len(GOOD)
    assert made.figures["rejected_by_rule"] == {"duplicate": 2 * len(GOOD)}
    # Alone, each copy would be on the side of its own name.
    alone = [
        ingest(write_files({n: t for n, t in twins.items() if n.startswith(c)}, c), storage=c)
        for c in ("one", "two", "three")
    ]
    sides = {row["origin"]: row["side"] for each in alone for row in each.kept}
    copies = {}
    for origin, text in sorted(twins.items()):
        copies.setdefault(text, []).append((sides[origin] != "holdout", origin))
    assert {row["text"]: row["origin"] for row in made.kept} == {text: min(each)[1] for text, each in copies.items()}
    assert made.texts("train").isdisjoint(made.texts("holdout"))
    assert len(made.texts("holdout")) > 0.4 * len(GOOD)


def test_rows_that_ancestors_trained_or_were_judged_on_are_rejected(write_files, ingest):
    before = ingest(write_files(GOOD))
    again = write_files(
        {f"renamed-{name}": text for name, text in GOOD.items()}
        | {f"new-{i}.txt": text for i, text in enumerate(random_texts(9, 30))},
        folder="again",
    )

    made = ingest(again, earlier=Earlier(ancestors=before.index), storage="f")

    require_complete(made)
    assert {row["text"] for row in made.kept}.isdisjoint(GOOD.values())
    rule_of = {line["text"]: line["rule"] for line in made.ledger}
    assert set(rule_of) == set(GOOD.values())
    assert {rule_of[text] for text in before.texts("train")} == {"seen_by_ancestor"}
    assert "holdout_leak" in {rule_of[text] for text in before.texts("holdout")}


def test_an_edited_file_never_changes_its_side_and_gets_a_new_id(write_files, ingest):
    before = ingest(write_files(GOOD))
    after = ingest(write_files({name: text + " edited" for name, text in GOOD.items()}), storage="e")

    assert {r["origin"]: (r["key"], r["side"]) for r in before.kept} == {
        r["origin"]: (r["key"], r["side"]) for r in after.kept
    }
    assert {row["id"] for row in before.kept}.isdisjoint(row["id"] for row in after.kept)


def test_ids_of_lines_do_not_depend_on_the_file_they_lie_in(write_files, ingest):
    rows = [{"text": text} for text in random_texts(5, 60)]
    one = ingest(write_files({"a.jsonl": lines(rows)}), "jsonl")
    many = ingest(
        write_files({f"{i}.jsonl": lines(rows[i::3][::-1]) for i in range(3)}, folder="many"),
        "jsonl",
        storage="d",
    )

    def identities(made):
        return {(row["id"], row["side"], row["text"]) for row in made.kept}

    assert identities(one) == identities(many)


def test_the_share_of_the_holdout_is_about_right(write_files, ingest):
    rows = lines({"text": f"row {i}"} for i in range(4000))
    made = ingest(write_files({"a.jsonl": rows}), "jsonl", recipe={"holdout_share": 0.1})

    assert made.figures["rows_holdout"] == pytest.approx(400, abs=4 * (4000 * 0.1 * 0.9) ** 0.5)


# ── bytes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def backwards(function, items):
    return run_here(function, items[::-1])[::-1]


def twice(function, items):
    run_here(function, items)
    return run_here(function, items)


@pytest.mark.parametrize("run", [backwards, twice])
def test_the_order_and_the_repetition_of_tasks_change_no_byte(write_files, ingest, run):
    rng = random.Random(6)
    files = {f"{i}.txt": text + "y" * rng.randrange(300_000) for i, text in enumerate(random_texts(6, 400))}
    root = write_files(files)

    made, again = ingest(root), ingest(root, run=run, storage="b")

    assert len([name for name in made.bytes if name.startswith("train-")]) > 2
    assert made.bytes == again.bytes
    assert made.figures == again.figures


def test_the_path_of_the_source_changes_no_byte(write_files, ingest):
    bad = {"broken.txt": b"\xff"}
    one = ingest(write_files(GOOD | bad, folder="one"))
    two = ingest(write_files(GOOD | bad, folder="two"), storage="c")

    assert one.bytes == two.bytes


def test_nothing_but_the_corpus_is_left(write_files, ingest):
    made = ingest(write_files(GOOD))

    assert made.names == [
        "README.md",
        "holdout-00000.parquet",
        "index-00000.arrow",
        "report.html",
        "train-00000.parquet",
    ]


def test_a_corpus_without_a_row_to_train_on_is_an_error_that_says_why(write_files, ingest):
    with pytest.raises(EmptyCorpusError, match=r"found 3 rows.*'empty': 3"):
        ingest(write_files({f"{i}.txt": " " * i for i in range(3)}))


def test_normalization_makes_equal_texts_equal(write_files, ingest):
    files = GOOD | {"one.txt": "caf\u00e9 au lait", "two.txt": "cafe\u0301 au lait"}

    assert ingest(write_files(files)).figures["rows_kept"] == len(GOOD) + 2
    made = ingest(write_files(files), recipe={"steps": [{"step": "unicode"}]}, storage="a")
    assert made.figures["rejected_by_rule"] == {"duplicate": 1}


def test_a_stratum_has_its_own_share_and_no_other_row_changes_its_side(write_files, ingest):
    rows = [{"text": text, "kind": "rare" if i % 10 == 0 else "common"} for i, text in enumerate(random_texts(9, 1500))]
    root = write_files({"a.jsonl": lines(rows)})
    columns = {"label": "kind"}
    plain = ingest(root, "jsonl", columns=columns, storage="plain")
    strata = ingest(
        root,
        "jsonl",
        columns=columns,
        recipe={"holdout_strata": [{"label": "rare", "source": "docs", "share": 0.6}, {"label": "rare", "share": 0.9}]},
    )

    def sides(made, label):
        return {row["key"]: row["side"] for row in made.kept if row["label"] == label}

    assert sides(strata, "common") == sides(plain, "common")
    before, after = sides(plain, "rare"), sides(strata, "rare")
    assert {key for key in before if before[key] == "holdout"} <= {key for key in after if after[key] == "holdout"}
    assert abs(sum(side == "holdout" for side in after.values()) / len(after) - 0.6) < 0.12
    told = {stratum["label"]: stratum for stratum in strata.figures["strata"]}
    assert told["rare"]["holdout"] == sum(side == "holdout" for side in after.values())
    assert told["common"]["train"] + told["common"]["holdout"] == len(sides(strata, "common"))
