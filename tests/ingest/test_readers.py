"""Laws of reading: the rows of each kind of source, and that what is malformed is a line of the ledger."""

from __future__ import annotations

import bz2
import dataclasses
import datetime
import gzip
import io
import json
import os
import random
import sqlite3
import sys
from decimal import Decimal
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from postgres import postgres_server, postgres_url  # noqa: F401 - fixtures
from pydantic import TypeAdapter
from servers import s3, s3_server, web  # noqa: F401 - fixtures

from aifactory.config.sources import Source
from aifactory.errors import ConfigError, StorageError
from aifactory.ingest import blocks, json_lines
from aifactory.ingest.columns import RAW_SCHEMA
from aifactory.ingest.json_lines import plain_rows, row_of_line
from aifactory.ingest.listing import list_pieces
from aifactory.ingest.readers import read_piece
from aifactory.ingest.shapes import Shape
from aifactory.ingest.streams import Message, add_messages
from aifactory.records.identity import canonical_json

SOURCES = TypeAdapter(Source)


def source(path="", kind="text", **options):
    values = {"name": "docs", "kind": kind, **({"path": str(path)} if path else {}), **options}
    return SOURCES.validate_python(values)


class Read:
    """All that came out of a source."""

    def __init__(self, pieces, **options):
        self.rows, self.ledger, self.sizes = [], [], []
        for piece in pieces:
            for block in read_piece(piece, **options):
                assert block.rows.schema == RAW_SCHEMA
                assert not any(column.null_count for column in block.rows.columns)
                block.rows.validate(full=True)
                self.rows += block.rows.to_pylist()
                self.sizes.append(blocks.text_bytes(block.rows))
                self.ledger += [dataclasses.asdict(line) for line in block.malformed]

    def of(self, *names):
        return [tuple(row[name] for name in names) if len(names) > 1 else row[names[0]] for row in self.rows]

    @property
    def texts(self):
        return self.of("text")

    @property
    def rules(self):
        return [(line["position"], line["rule"]) for line in self.ledger]


def read(path="", kind="text", **options):
    return Read(list_pieces([source(path, kind, **options)]).pieces)


def parquet(table, **options):
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# ── documents ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["text", "code"])
def test_each_file_is_a_row_as_it_is(write_files, kind):
    texts = {"b.py": "x = 1\r\n", "a/é.py": "\ufeffé\n", "a/empty.py": "", "c.py": "no end"}
    found = read(write_files(texts), kind, include=("**",))

    assert dict(found.of("origin", "text")) == texts
    assert {row["position"] for row in found.rows} == {0}
    assert {(row["prompt"], row["messages"], row["label"], row["weight"]) for row in found.rows} == {("", "", "", 1.0)}


def test_a_document_that_is_no_utf8_is_a_line_of_the_ledger(write_files):
    found = read(write_files({"a.txt": b"abc \xff\xfe def", "b.txt": "é".encode()[:1], "c.txt": "c"}))

    assert found.texts == ["c"]
    assert [(line["origin"], line["rule"], line["score"], line["text"]) for line in found.ledger] == [
        ("a.txt", "invalid_utf8", 4.0, r"abc \xff\xfe def"),
        ("b.txt", "invalid_utf8", 0.0, r"\xc3"),
    ]


def test_compressed_documents_are_unpacked(write_files):
    found = read(
        write_files({"a.txt.gz": gzip.compress(b"text a", mtime=0), "b.txt.bz2": bz2.compress(b"text b")}),
        include=("*",),
    )

    assert found.of("origin", "text") == [("a.txt.gz", "text a"), ("b.txt.bz2", "text b")]


def test_markdown_loses_its_front_matter_and_nothing_else(write_files):
    found = read(
        write_files(
            {
                "a.md": "---\ntitle: A\ntags: [x]\n---\n# A\n\ntext\n---\nafter a rule\n",
                "b.md": '+++\r\ntitle = "B"\r\n+++\r\n# B\r\n',
                "c.md": "# C\n---\nno: front matter\n---\n",
                "d.md": "---\nnever closed\n",
                "e.md": "---\n---\nempty front matter\n",
                "f.md": "----\na\n----\n",
            }
        ),
        "markdown",
    )

    assert found.texts == [
        "# A\n\ntext\n---\nafter a rule\n",
        "# B\r\n",
        "# C\n---\nno: front matter\n---\n",
        "---\nnever closed\n",
        "empty front matter\n",
        "----\na\n----\n",
    ]


PARAGRAPHS = [
    "The river rises in the hills above the town and runs south for ninety miles, é and ü included.",
    "In the eighteenth century three mills stood on its banks, of which one is still at work today.",
    "Every spring the meadows below the weir are flooded, and the herons come back to nest there.",
]
PAGE = (
    "<html><head><title>T</title><script>var secret = 1;</script><style>.a{{color:red}}</style></head><body>"
    "<nav><ul><li><a href='/'>Home</a></li><li><a href='/login'>Login</a></li></ul></nav>"
    "<article><h1>The river</h1>{}</article>"
    "<aside class='sidebar'><a href='/x'>Related story</a></aside>"
    "<footer>All rights reserved</footer></body></html>"
).format("".join(f"<p>{text}</p>" for text in PARAGRAPHS))


def test_of_html_the_main_text_is_kept(write_files):
    found = read(
        write_files(
            {
                "a.html": PAGE,
                "latin.html": PAGE.replace("<head>", '<head><meta charset="iso-8859-1">').encode("latin-1"),
                "empty.html": "",
                "tags.html": "<p>a\0b &#xD800; &amp; é",
            }
        ),
        "html",
    )
    text = dict(found.of("origin", "text"))

    for page in ("a.html", "latin.html"):
        assert all(paragraph in text[page] for paragraph in PARAGRAPHS)
        assert "The river" in text[page]
        assert not any(word in text[page] for word in ("Login", "secret", "color", "Related", "rights"))
    assert text["empty.html"] == ""
    assert "&" in text["tags.html"]


def test_html_that_is_nested_too_deep_takes_no_time(write_files):
    deep = {"divs.html": "<div>" * 300_000, "mixed.html": "<b><div></x>" * 100_000, "fine.html": "<div>" * 300 + "deep"}
    found = read(write_files(deep), "html")

    assert found.of("origin") == ["fine.html"]
    assert {(line["origin"], line["rule"]) for line in found.ledger} == {
        ("divs.html", "nested_too_deep"),
        ("mixed.html", "nested_too_deep"),
    }


def pdf(text):
    """A PDF of one page."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
    return data + table + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(data)


def test_of_pdf_the_text_is_kept_and_a_broken_one_is_in_the_ledger(write_files):
    pytest.importorskip("pypdf")
    whole = pdf("A sentence in a document.")
    found = read(write_files({"a.pdf": whole, "b.pdf": b"%PDF-1.4 nothing", "c.pdf": b"", "d.pdf": whole[:60]}), "pdf")

    assert found.of("origin", "text") == [("a.pdf", "A sentence in a document.")]
    assert {line["rule"] for line in found.ledger} == {"unreadable_file"}
    assert [line["origin"] for line in found.ledger] == ["b.pdf", "c.pdf", "d.pdf"]


@pytest.mark.parametrize(
    ("kind", "library", "extra"), [("pdf", "pypdf", "pdf"), ("dataset", "datasets", "hub"), ("kafka", "kafka", "kafka")]
)
def test_a_missing_extra_is_an_error_that_names_it(write_files, monkeypatch, kind, library, extra):
    options = {
        "pdf": {"path": str(write_files({"a.pdf": pdf("x")}))},
        "dataset": {"hub": "org/name"},
        "kafka": {"bootstrap_servers": "127.0.0.1:9092", "topic": "t", "allow_private": True},
    }[kind]
    monkeypatch.setitem(sys.modules, library, None)

    with pytest.raises(ConfigError, match=rf"aifactory\[{extra}\]"):
        read(kind=kind, **options)


# ── JSON lines ────────────────────────────────────────────────────────────────────────────────────────────────────────


PACKERS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_lines_are_the_same_rows(write_files, ending):
    data = lines({"text": f"row {i} é"} for i in range(500)).encode()
    found = read(write_files({f"a.jsonl{ending}": PACKERS[ending](data)}), "jsonl")

    assert found.of("position", "text") == [(i, f"row {i} é") for i in range(500)]
    assert not found.ledger


def test_positions_count_lines_and_blank_ones_are_no_rows(write_files):
    found = read(write_files({"a.jsonl": '{"text": "a"}\n\n  \n{"text": "b"}\r\n'}), "jsonl")

    assert found.of("position", "text", "user") == [(0, "a", ""), (3, "b", "")]


def test_a_byte_order_mark_is_no_part_of_the_first_line(write_files):
    found = read(write_files({"a.jsonl": '\ufeff{"text": "a"}\n{"text": "\ufeffb"}\n'}), "jsonl")

    assert found.texts == ["a", "\ufeffb"]


BAD_LINES = {
    "no json": "invalid_json",
    "[1, 2]": "invalid_json",
    '"text"': "invalid_json",
    "[" * 100_000: "invalid_json",
    '{"text":' * 50_000: "invalid_json",
    '{"text": "a"}{"text": "b"}': "invalid_json",
    '{"body": "x"}': "missing_column",
    '{"text": 5}': "wrong_type",
    '{"text": null}': "wrong_type",
    '{"text": {"a": "b"}}': "wrong_type",
    '{"text": ["a"]}': "wrong_type",
    '{"text": "a \\ud800 b", "other": 1}': "invalid_utf8",
    '{"text": "a \x00 b"}': "invalid_json",
}


def test_bad_lines_are_in_the_ledger_and_the_others_are_rows(write_files):
    good = [f"row {i}" for i in range(40)]
    raw = lines({"text": text} for text in good).encode()
    raw += "\n".join(BAD_LINES).encode() + b'\n{"text": "\xff"}\n{"text": "last"}'
    found = read(write_files({"a.jsonl": raw}), "jsonl")

    assert found.texts == [*good, "last"]
    assert {line["text"]: line["rule"] for line in found.ledger} == BAD_LINES | {r'{"text": "\xff"}': "invalid_utf8"}
    assert [line["position"] for line in found.ledger] == [40 + i for i in range(len(BAD_LINES) + 1)]
    assert found.rows[-1]["position"] == 40 + len(BAD_LINES) + 1
    assert all(line["detail"] for line in found.ledger)


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_beside_a_good_one_changes_no_other(write_files, line):
    raw = '{"text": "before"}\n' + line + '\n{"text": "after"}\n'

    found = read(write_files({"a.jsonl": raw}), "jsonl")

    assert found.of("position", "text") == [(0, "before"), (2, "after")]
    assert found.rules == [(1, BAD_LINES[line])]


def test_a_truncated_archive_gives_the_rows_before_the_damage(write_files):
    rng = random.Random(3)
    rows = [rng.randbytes(60).hex() for _ in range(20_000)]
    whole = gzip.compress(lines({"text": row} for row in rows).encode())
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    found = read(
        write_files(
            {
                "cut.jsonl.gz": whole[: len(whole) // 2],
                "damaged.jsonl.gz": bytes(damaged),
                "not.jsonl.gz": b"no gzip at all",
                "not.jsonl.zst": b"no zstd at all",
                "one.jsonl.gz": gzip.compress(b'{"text": "one"}', mtime=0),
            }
        ),
        "jsonl",
    )

    assert {line["origin"] for line in found.ledger if line["rule"] == "unreadable_file"} == {
        "cut.jsonl.gz",
        "damaged.jsonl.gz",
        "not.jsonl.gz",
        "not.jsonl.zst",
    }
    texts = dict(found.of("origin", "text"))
    assert texts["one.jsonl.gz"] == "one"
    cut = [row["text"] for row in found.rows if row["origin"] == "cut.jsonl.gz"]
    assert cut == rows[: len(cut)]
    assert len(cut) > 2000


def test_a_bomb_is_a_line_of_the_ledger_and_the_rest_goes_on(write_files):
    bomb = gzip.compress(b'{"text": "' + b"a" * 200_000_000 + b'"}\n', mtime=0)
    many = gzip.compress(b'{"text": "a"}\n' * 2_000_000, mtime=0)
    found = read(
        write_files({"a.jsonl.gz": bomb, "b.jsonl.gz": many, "c.jsonl": '{"text": "c"}\n'}), "jsonl", max_ratio=50
    )

    assert [(line["origin"], line["rule"]) for line in found.ledger] == [
        ("a.jsonl.gz", "archive_too_large"),
        ("b.jsonl.gz", "archive_too_large"),
    ]
    assert all(line["score"] > 50 for line in found.ledger)
    assert found.texts[-1] == "c"


def test_a_line_that_is_too_long_is_in_the_ledger_and_is_never_held(write_files, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_ROW_BYTES", 3_000_000)
    long = '{"text": "' + "x" * 20_000_000 + '"}'
    exact = '{"text": "' + "y" * (3_000_000 - 12) + '"}'
    raw = f'{{"text": "a"}}\n{long}\n{{"text": "b"}}\n{exact}\n{exact} \n{{"text": "c"}}\n{long}'
    for name, data in (("a.jsonl", raw.encode()), ("a.jsonl.gz", gzip.compress(raw.encode(), 1))):
        pieces = list_pieces([source(write_files({name: data}, folder=name), "jsonl", max_ratio=1e6)]).pieces
        found = Read(pieces)
        rules = [(piece.first_position + at, rule) for piece in pieces for at, rule in Read([piece]).rules]

        assert [text[:1] for text in found.texts] == ["a", "b", "y", "c"]
        assert rules == [(1, "row_too_large"), (4, "row_too_large"), (6, "row_too_large")]
        assert [line["score"] for line in found.ledger] == [len(long), len(exact) + 1, len(long)]
        assert [line["text"] for line in found.ledger] == [long[:1000], exact[:1000], long[:1000]]


def test_blocks_are_bounded_and_do_not_depend_on_the_run(write_files):
    rng = random.Random(4)
    rows = [{"text": "word " * rng.randrange(200_000)} for _ in range(80)]
    pieces = list_pieces([source(write_files({"a.jsonl": lines(rows)}), "jsonl")]).pieces

    first, again = Read(pieces), Read(pieces)

    assert first.texts == [row["text"] for row in rows]
    assert max(first.sizes) <= blocks.MAX_BLOCK_BYTES
    assert (first.sizes, first.rows) == (again.sizes, again.rows)


def test_a_large_file_read_in_parts_is_the_file(tmp_path):
    rng = random.Random(5)
    texts = [f"{i} " + "é word " * rng.randrange(200) for i in range(30_000)]
    (tmp_path / "big.jsonl").write_text(lines({"text": text} for text in texts))
    pieces = list_pieces([source(tmp_path / "big.jsonl", "jsonl")]).pieces
    assert len(pieces) > 1

    found = [(piece.first_position + row["position"], row["text"]) for piece in pieces for row in Read([piece]).rows]

    assert found == list(enumerate(texts))
    assert {row["origin"] for row in Read(pieces).rows} == {piece.spans[0].origin for piece in pieces}


# ── the fast way is the slow way ──────────────────────────────────────────────────────────────────────────────────────


def random_value(rng, depth=0):
    kinds = ["string", "number", "literal", "string", "list", "object"]
    match rng.choice(kinds[: 4 if depth > 2 else 6]):
        case "string":
            return json.dumps(random_text(rng), ensure_ascii=rng.random() < 0.5)
        case "number":
            numbers = ["0", "-0", "1", "-1.5", "1e5", "1E400", "-1e-400", "01", "+1", ".5", "1.", "--1", "0x1", "1e"]
            numbers += [
                "9" * 19,
                "9" * 20,
                "1" * 5000,
                "9223372036854775807",
                "9223372036854775808",
                "18446744073709551616",
            ]
            return rng.choice([*numbers, "0.1", "1.10", "NaN", "Infinity", "-Infinity"])
        case "literal":
            return rng.choice(["true", "false", "null", "True", "nul", ""])
        case "list":
            return "[" + ",".join(random_value(rng, depth + 1) for _ in range(rng.randrange(3))) + "]"
        case _:
            pairs = (f'"{rng.choice("abc")}":{random_value(rng, depth + 1)}' for _ in range(rng.randrange(3)))
            return "{" + ",".join(pairs) + "}"


def random_text(rng):
    alphabet = [
        "a",
        "bc ",
        "é",
        "中",
        "😀",
        "\n",
        "\t",
        '"',
        "\\",
        "/",
        "\u2028",
        "\x7f",
        "\0",
        "\ud800",
        "\udc00",
        "{",
        "[",
    ]
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(8)))


def random_turns(rng, names=("role", "content")):
    turns = []
    for _ in range(rng.randrange(4)):
        role = rng.choice(["user", "assistant", "system", "human", "gpt"])
        turn = {names[0]: role, names[1]: random_text(rng).encode("utf-8", "replace").decode()}
        if rng.random() < 0.1:
            turn[rng.choice(["name", *names])] = rng.choice([None, "x", 5, [{"type": "text", "text": "part"}]])
        turns.append(turn)
    if rng.random() < 0.8:
        turns.append({names[0]: rng.choice(["assistant", "gpt"]), names[1]: "answer"})
    return json.dumps(turns, ensure_ascii=rng.random() < 0.5)


KEYS = ["text", "prompt", "label", "user", "weight", "messages", "shared", "other", "te\\u0078t"]


def random_line(rng, is_odd):
    """A line that is an object, as a rule a regular one."""
    pairs = []
    for key in KEYS[:-2]:
        value = json.dumps(random_text(rng).encode("utf-8", "replace").decode(), ensure_ascii=rng.random() < 0.5)
        if key == "weight":
            value = rng.choice(["1", "0.5", "2e0", "0"])
        elif key == "messages":
            value = random_turns(rng)
        elif key == "shared":
            value = random_turns(rng, ("from", "value"))
        if is_odd and rng.random() < 0.3:
            value = random_value(rng)
        if not (is_odd and rng.random() < 0.1):
            pairs.append((key, value))
    pairs.append((rng.choice(KEYS) if is_odd else "other", random_value(rng) if is_odd else '{"a": [1, {"b": "}"}]}'))
    rng.shuffle(pairs)
    line = "{" + ", ".join(f'"{key}": {value}' for key, value in pairs) + "}"
    if is_odd and rng.random() < 0.2:
        at = rng.randrange(len(line))
        line = rng.choice(
            [
                line[:at],
                line[:at] + rng.choice('{}[]",:\\ \0x') + line[at + 1 :],
                line + line,
                line + ",",
                " " + line,
                line + "\r",
                line + "\x0b",
                "[" * 1200 + line,
                line[:-1] + ', "deep": ' + "[" * 1500 + "]" * 1500 + "}",
                "",
                "  ",
            ]
        )
    return line


SHAPES = [
    {},
    {"text": "text", "label": "label", "user": "user", "weight": "weight"},
    {"text": "text", "prompt": "prompt", "origin": "user"},
    {"messages": "messages"},
    {"messages": "shared", "turns": "sharegpt"},
    {"chosen": "text", "rejected": "prompt"},
    {"chosen": "messages", "rejected": "messages", "prompt": "prompt"},
    {"prompt": "messages", "completion": "text", "label": "weight"},
]


@pytest.mark.parametrize("columns", SHAPES)
def test_a_block_that_is_read_at_once_is_what_its_lines_are(columns):
    shape = Shape(source("x", "jsonl", columns=columns).columns)
    rng = random.Random(json.dumps(columns))
    plain = 0
    for _ in range(400):
        odd_share = rng.choice([0, 0, 0, 0.02, 0.3])
        data = "\n".join(random_line(rng, rng.random() < odd_share) for _ in range(rng.randrange(1, 12))) + "\n"
        raw = data.encode("utf-8", "surrogatepass")
        table = plain_rows(raw, shape, "file", 0)
        if table is None:
            continue
        plain += 1
        slow = [row_of_line(line, shape) for line in raw.split(b"\n")[:-1]]
        expected = [{**row._asdict(), "origin": row.origin or "file", "position": i} for i, row in enumerate(slow)]
        assert [{name: row[name] for name in RAW_SCHEMA.names} for row in expected] == table.to_pylist()
    assert plain > 10


def row_by_the_standard_library(line, shape):
    """A row, or the rule that it breaks."""
    try:
        values = json.loads(line.rstrip(b"\r").decode(), parse_int=lambda n: int(n) if len(n) < 4000 else float(n))
    except UnicodeDecodeError:
        return "invalid_utf8"
    except (ValueError, RecursionError):
        return "invalid_json"
    return shape.row(values) if isinstance(values, dict) else "invalid_json"


@pytest.mark.parametrize("columns", SHAPES)
def test_a_line_is_what_the_standard_library_reads(columns):
    shape = Shape(source("x", "jsonl", columns=columns).columns)
    rng = random.Random(json.dumps(columns) + "lines")
    rules = set()
    for _ in range(1500):
        line = random_line(rng, rng.random() < 0.7).encode("utf-8", "surrogatepass")
        found = row_of_line(line, shape)
        expected = row_by_the_standard_library(line, shape)
        if isinstance(expected, str):
            assert found.rule == expected
            rules.add(expected)
        else:
            assert type(found) is type(expected)
            assert found == expected or found.rule == expected.rule
    assert rules


def test_a_plain_block_is_read_at_once():
    rng = random.Random(6)
    data = lines({"text": random_text(rng).encode("utf-8", "replace").decode(), "n": i} for i in range(1000)).encode()

    for raw in (data, data.replace(b"\n", b"\r\n"), data[:-1]):
        assert len(plain_rows(raw, Shape(source("x", "jsonl").columns), "file", 0)) == 1000


def test_turns_are_written_as_everywhere_else():
    shape = Shape(source("x", "jsonl", columns={"messages": "m"}).columns)
    text = "".join(map(chr, [*range(0x250), 0x2028, 0x2029, 0xFFFF, 0x1F600]))
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]

    assert shape.row({"m": turns}).messages == canonical_json(turns[:1])


# ── shapes ────────────────────────────────────────────────────────────────────────────────────────────────────────────

USER = {"role": "user", "content": "What is two and two?"}
SYSTEM = {"role": "system", "content": "Be brief."}
FOUR = {"role": "assistant", "content": "Four."}
FIVE = {"role": "assistant", "content": "Five."}
BEFORE = '[{"content":"What is two and two?","role":"user"}]'

CONVERSATIONS = [
    ({"messages": "m"}, {"m": [USER, FOUR]}, ("", "Four.", BEFORE, "")),
    ({"messages": "m"}, {"m": [FOUR]}, ("", "Four.", "", "")),
    ({"messages": "m"}, {"m": json.dumps([USER, FOUR])}, ("", "Four.", BEFORE, "")),
    ({"messages": "m"}, {"m": [USER]}, "no_answer"),
    ({"messages": "m"}, {"m": []}, "no_answer"),
    ({"messages": "m"}, {"m": "text"}, "wrong_type"),
    ({"messages": "m"}, {"m": None}, "wrong_type"),
    ({"messages": "m"}, {"m": [USER, {"role": "assistant"}]}, "wrong_type"),
    ({"messages": "m"}, {"m": [{"role": "user", "content": [{"type": "image"}]}, FOUR]}, "wrong_type"),
    (
        {"messages": "m"},
        {"m": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, FOUR]},
        ("", "Four.", '[{"content":"ab","role":"user"}]', ""),
    ),
    (
        {"messages": "m", "turns": "sharegpt"},
        {"m": [{"from": "human", "value": "What is two and two?"}, {"from": "gpt", "value": "Four."}]},
        ("", "Four.", BEFORE, ""),
    ),
    ({"prompt": "p", "completion": "c"}, {"p": "Two?", "c": "Four."}, ("Two?", "Four.", "", "")),
    ({"prompt": "p", "text": "c"}, {"p": "Two?", "c": "Four."}, ("Two?", "Four.", "", "")),
    ({"prompt": "p"}, {"p": "Two?", "text": "Four."}, ("Two?", "Four.", "", "")),
    ({"prompt": "p", "completion": "c"}, {"p": [USER], "c": [FOUR]}, ("", "Four.", BEFORE, "")),
    ({"prompt": "p", "completion": "c"}, {"p": [USER], "c": "Four."}, ("", "Four.", BEFORE, "")),
    ({"prompt": "p", "completion": "c"}, {"p": "Two?", "c": [FOUR]}, ("Two?", "Four.", "", "")),
    ({"prompt": "p", "completion": "c"}, {"p": "Two?"}, "missing_column"),
    ({"chosen": "a", "rejected": "b"}, {"a": "Four.", "b": "Five."}, ("", "Four.", "", "Five.")),
    ({"chosen": "a", "rejected": "b", "prompt": "p"}, {"p": "?", "a": "4", "b": "5"}, ("?", "4", "", "5")),
    ({"chosen": "a", "rejected": "b"}, {"a": [USER, FOUR], "b": [USER, FIVE]}, ("", "Four.", BEFORE, "Five.")),
    (
        {"chosen": "a", "rejected": "b", "prompt": "p"},
        {"p": [USER], "a": [FOUR], "b": [FIVE]},
        ("", "Four.", BEFORE, "Five."),
    ),
    (
        {"chosen": "a", "rejected": "b", "prompt": "p"},
        {"p": "What is two and two?", "a": [USER, FOUR], "b": [USER, FIVE]},
        ("", "Four.", BEFORE, "Five."),
    ),
    (
        {"chosen": "a", "rejected": "b", "prompt": "p"},
        {"p": "What is two and two?", "a": [SYSTEM, FOUR], "b": [SYSTEM, FIVE]},
        ("", "Four.", canonical_json([USER, SYSTEM]), "Five."),
    ),
    ({"chosen": "a", "rejected": "b"}, {"a": [USER, FOUR], "b": [SYSTEM, FIVE]}, "prompts_differ"),
    ({"chosen": "a", "rejected": "b"}, {"a": [USER, FOUR], "b": "Five."}, "prompts_differ"),
    ({"chosen": "a", "rejected": "b"}, {"a": "x"}, "missing_column"),
]


@pytest.mark.parametrize(("columns", "values", "expected"), CONVERSATIONS)
def test_a_row_has_one_of_four_shapes(write_files, columns, values, expected):
    files = {"a.jsonl": lines([values]), "b.jsonl": lines([values]) + "no json\n"}  # read at once, and line by line
    found = [read(write_files(files), "jsonl", columns=columns)]
    try:
        table = pa.Table.from_pylist([values])
        found.append(read(write_files({"a.parquet": parquet(table)}), "parquet", columns=columns))
    except pa.ArrowException:
        pass  # no column holds such values

    for each in found:
        if isinstance(expected, str):
            assert {line["rule"] for line in each.ledger} - {"invalid_json"} == {expected}
            assert not each.rows
        else:
            assert set(each.of("prompt", "text", "messages", "rejected")) == {expected}


OPTIONAL = {"label": "l", "user": "u", "timestamp": "t", "weight": "w", "origin": "o"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ("", "", "", 1.0, None)),
        ({"l": None, "u": None, "t": None, "w": None, "o": None}, ("", "", "", 1.0, None)),
        ({"l": "a", "u": "b", "t": "c", "w": 2, "o": "d"}, ("a", "b", "c", 2.0, "d")),
        ({"l": 3, "u": -4, "t": 5, "w": 0}, ("3", "-4", "5", 0.0, None)),
        ({"l": True, "u": False, "w": 0.25}, ("true", "false", "", 0.25, None)),
        ({"l": 1.5, "u": 1e300, "t": 0.1}, ("1.5", "1e+300", "0.1", 1.0, None)),
        ({"w": -1}, "wrong_type"),
        ({"w": "heavy"}, "wrong_type"),
        ({"w": True}, "wrong_type"),
        ({"l": ["a"]}, "wrong_type"),
        ({"u": {"a": 1}}, "wrong_type"),
    ],
)
def test_what_is_optional_is_text_and_its_weight_a_number(write_files, values, expected):
    row = {"text": "x", **values}
    files = {"a.jsonl": lines([row]), "b.jsonl": lines([row]) + "no json\n"}
    found = [read(write_files(files), "jsonl", columns=OPTIONAL)]
    table = pa.Table.from_pylist([row])
    found.append(read(write_files({"a.parquet": parquet(table)}), "parquet", columns=OPTIONAL))

    for each in found:
        if isinstance(expected, str):
            assert {line["rule"] for line in each.ledger} - {"invalid_json"} == {expected}
            continue
        for row in each.rows:
            origin = row["origin"] if expected[4] is not None else None
            assert (row["label"], row["user"], row["timestamp"], row["weight"], origin) == expected


def test_times_are_iso_8601_whatever_their_type(write_files):
    noon = datetime.datetime(2026, 1, 2, 12, 0, 0, 500, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "text": ["a", "b"],
            "ns": pa.array([noon, None], pa.timestamp("ns", "UTC")),
            "s": pa.array([noon, None], pa.timestamp("s")),
            "day": pa.array([noon.date(), None]),
            "far": pa.array([2**62, 0], pa.int64()).cast(pa.timestamp("us")),
        }
    )
    root = write_files({"a.parquet": parquet(table)})

    def times(name):
        return read(root, "parquet", columns={"timestamp": name}).of("timestamp")

    assert times("ns") == ["2026-01-02T12:00:00.000500+00:00", ""]
    assert times("s") == ["2026-01-02T12:00:00", ""]
    assert times("day") == ["2026-01-02", ""]
    assert len(times("far")) <= 2


@pytest.mark.parametrize(
    "columns",
    [
        {"text": "a", "completion": "b", "prompt": "c"},
        {"messages": "a", "text": "b"},
        {"messages": "a", "prompt": "b"},
        {"chosen": "a"},
        {"rejected": "a"},
        {"completion": "a"},
    ],
)
def test_columns_of_two_shapes_are_refused(columns):
    with pytest.raises(ValueError, match=r"expected"):
        source("x", "jsonl", columns=columns)


# ── Parquet ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bad_tables_are_in_the_ledger_and_the_others_are_rows(write_files):
    good = parquet(pa.table({"text": [f"row {i}" for i in range(40)], "other": list(range(40))}))
    broken_text = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00\x05\x00\x00\x00"), pa.py_buffer(b"a\xffgut")
    )
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    found = read(
        write_files(
            {
                "good.parquet": good,
                "cut.parquet": good[:-100],
                "head.parquet": good[: len(good) // 2],
                "not.parquet": b"PAR1",
                "empty.parquet": b"",
                "missing.parquet": parquet(pa.table({"body": ["a"]})),
                "typed.parquet": parquet(pa.table({"text": [1, 2]})),
                "null.parquet": parquet(pa.table({"text": pa.array([None, "there"], pa.string())})),
                "utf8.parquet": parquet(pa.table({"text": broken_text})),
                "none.parquet": parquet(pa.table({"text": pa.array([], pa.string())})),
                "twice.parquet": parquet(twice),
            }
        ),
        "parquet",
    )

    assert len(found.rows) + len(found.ledger) == 40 + 4 + 1 + 2 + 2 + 2 + 1
    assert {line["origin"]: line["rule"] for line in found.ledger} == {
        "cut.parquet": "unreadable_file",
        "head.parquet": "unreadable_file",
        "not.parquet": "unreadable_file",
        "empty.parquet": "unreadable_file",
        "missing.parquet": "missing_column",
        "twice.parquet": "missing_column",
        "typed.parquet": "wrong_type",
        "null.parquet": "wrong_type",
        "utf8.parquet": "invalid_utf8",
    }
    assert {"there", "gut"} <= set(found.texts)
    assert {line["text"] for line in found.ledger if line["rule"] == "wrong_type"} == {
        "{'text': 1}",
        "{'text': 2}",
        "{'text': None}",
    }
    assert [line["text"] for line in found.ledger if line["rule"] == "invalid_utf8"] == [r"a\xff"]


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_texts_of_every_arrow_type_are_texts(write_files, kind):
    texts = ["a", "é" * 100, "", None, "a"]
    table = pa.table({"text": pa.array(texts, pa.string()).cast(kind), "label": pa.array(["x", None] * 2 + ["y"])})
    found = read(write_files({"a.parquet": parquet(table)}), "parquet", columns={"label": "label"})

    assert found.of("position", "text", "label") == [(0, "a", "x"), (1, "é" * 100, ""), (2, "", "x"), (4, "a", "y")]
    assert found.rules == [(3, "wrong_type")]


def test_a_damaged_row_group_harms_no_other(write_files):
    rng = random.Random(7)
    texts = [rng.randbytes(40).hex() for _ in range(3000)]
    sound = parquet(pa.table({"text": texts}), row_group_size=1000, compression="zstd")
    chunk = pq.ParquetFile(io.BytesIO(sound)).metadata.row_group(1).column(0)
    data = bytearray(sound)
    at = (chunk.dictionary_page_offset or chunk.data_page_offset) + 40
    data[at : at + 2000] = rng.randbytes(2000)
    found = read(write_files({"a.parquet": bytes(data)}), "parquet")

    assert [rule for _, rule in found.rules] == ["unreadable_file"]
    assert [row for row in found.of("position", "text") if not 1000 <= row[0] < 2000] == [
        (i, text) for i, text in enumerate(texts) if not 1000 <= i < 2000
    ]


def test_random_damage_of_a_file_never_raises(write_files):
    rng = random.Random(8)
    table = pa.table({"text": [rng.randbytes(20).hex() for _ in range(300)], "label": ["x"] * 300})
    saved = pa.BufferOutputStream()
    with pa.ipc.new_stream(saved, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    sound = {
        "parquet": parquet(table, row_group_size=100),
        "csv": ("text,label\n" + '"a ""b"" c",x\n' * 300).encode(),
        "jsonl": lines(table.to_pylist()).encode(),
        "warc": warc([("https://example.org/", "text/html", "200 OK", PAGE.encode(), {})] * 5),
        "html": PAGE.encode(),
        "pdf": pdf("text"),
    }
    for kind, whole in sound.items():
        files = {}
        for i in range(60):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(data))
                data[at : at + rng.randrange(8)] = rng.randbytes(rng.randrange(8))
            files[f"{i}.{kind}"] = bytes(data[: rng.choice([len(data), rng.randrange(1, len(data))])])
        found = read(write_files(files, folder=kind), kind)
        assert found.rows or found.ledger


def test_a_dictionary_that_says_a_long_text_over_and_over_is_read_in_small_blocks(write_files):
    long = "x" * 3_000_000
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 60 + [1], pa.int32()), pa.array([long, "short"]))
    data = parquet(pa.table({"text": texts}), compression="zstd")
    assert len(data) < 100_000
    pieces = list_pieces([source(write_files({"a.parquet": data}), "parquet")]).pieces

    sizes = [blocks.text_bytes(block.rows) for piece in pieces for block in read_piece(piece)]

    assert sum(sizes) == 60 * len(long) + 5
    assert max(sizes) <= blocks.MAX_BLOCK_BYTES


# ── CSV ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_records_of_csv_are_rows_and_positions_count_them(write_files):
    data = 'id,text,label\n1,"a, b\nc",x\n\n2,"say ""hi""",\n3,plain,"y"\n4\n5,last,z'
    found = read(write_files({"a.csv": data}), "csv", columns={"label": "label"})

    assert found.of("position", "text", "label") == [
        (0, "a, b\nc", "x"),
        (1, 'say "hi"', ""),
        (2, "plain", "y"),
        (4, "last", "z"),
    ]
    assert [(line["position"], line["rule"], line["text"]) for line in found.ledger] == [(3, "wrong_columns", "4")]


@pytest.mark.parametrize(
    ("name", "data", "options"),
    [
        ("a.tsv", "text\tn\na, b\t1\n", {}),
        ("a.csv", "\ufefftext,n\r\n'a, b',1\r\n", {"quote": "'"}),
        ("a.csv", "text;n\na, b;1\n", {"delimiter": ";"}),
        ("a.csv", "a\\, b,1\n", {"escape": "\\", "column_names": ("text", "n"), "quote": None}),
        ("a.csv", '"a, b",1\n', {"column_names": ("text", "n")}),
        ("a.csv.gz", gzip.compress(b'text,n\n"a, b",1\n', mtime=0), {}),
        ("a.tsv.gz", gzip.compress(b"text\tn\na, b\t1\n", mtime=0), {}),
        ("a.csv", '\n\ntext,n\n"a, b",1', {"multiline": False}),
        ("a.csv", 'n,text,more\n1,"a, b",NULL\n', {}),
    ],
)
def test_dialects_of_csv(write_files, name, data, options):
    assert read(write_files({name: data}), "csv", **options).of("position", "text") == [(0, "a, b")]


def test_bad_csv_is_in_the_ledger(write_files):
    found = read(
        write_files(
            {
                "empty.csv": "",
                "header.csv": "text,n\n",
                "missing.csv": "body,n\na,1\n",
                "twice.csv": "text,text\na,b\n",
                "utf8.csv": b"text,n\nbad \xff,1\ngood,2\n",
                "nul.csv": b"text,n\na\0b,1\n",
                "open.csv": 'text,n\n"never closed,1\nb,2\n',
                "wide.csv": "text,n\na,1,2\nb,2\n",
                "cut.csv.gz": gzip.compress(b"text,n\na,1\n", mtime=0)[:-6],
            }
        ),
        "csv",
    )

    assert [(line["origin"], line["rule"]) for line in found.ledger] == [
        ("cut.csv.gz", "unreadable_file"),
        ("missing.csv", "missing_column"),
        ("open.csv", "wrong_columns"),
        ("twice.csv", "missing_column"),
        ("utf8.csv", "invalid_utf8"),
        ("wide.csv", "wrong_columns"),
    ]
    assert dict(found.of("origin", "text")) == {"utf8.csv": "good", "nul.csv": "a\0b", "wide.csv": "b"}


def test_records_of_csv_that_are_no_utf8_are_in_the_ledger_whatever_else_is_wrong(write_files):
    odd = b"\xff|\xc3(|\xed\xa0\x80|\xf4\x90\x80\x80|\xe4\xb8"
    records = [
        b"a \xc3\xa9,1",
        odd + b",2",
        b"b \U0010ffff,3",
        b"one \xff",
        odd + b",5,\xff",
        "c \U0010ffff\ue0ff,6".encode(),
    ]
    whole = b"text,n\n" + b"\n".join(records) + b"\n"
    filler = b"d" * ((1 << 20) - len(whole) - 3)  # the character after it stands across two blocks
    found = read(write_files({"a.csv": whole + filler + "é中😀,7\n".encode() + odd + b",8\n"}), "csv")

    assert found.of("position", "text") == [
        (0, "a é"),
        (2, "b \\U0010ffff"),
        (5, "c \U0010ffff\ue0ff"),
        (6, filler.decode() + "é中😀"),
    ]
    escaped = odd.decode("utf-8", "backslashreplace")
    assert sorted((line["position"], line["rule"], line["text"]) for line in found.ledger) == [
        (1, "invalid_utf8", escaped),
        (3, "wrong_columns", "one \\xff"),
        (4, "wrong_columns", escaped + ",5,\\xff"),
        (7, "invalid_utf8", escaped),
    ]


def test_a_record_of_csv_that_is_too_long_is_in_the_ledger(write_files):
    data = b"text,n\na,1\n" + b"x" * 40_000_000 + b",2\nb,3\n"
    found = read(write_files({"a.csv": data}), "csv")

    assert found.ledger[0]["rule"] == "unreadable_file"


def test_wrong_records_keep_their_places_across_blocks(write_files):
    rng = random.Random(9)
    records, expected, wrong = [], [], []
    for i in range(60_000):
        if rng.random() < 0.01:
            records.append("one\n")
            wrong.append(i)
        else:
            records.append(f'"{i} {"word " * rng.randrange(150)}",x\n')
            expected.append(i)
    (root := write_files({"a.csv": "text,n\n" + "".join(records)}))
    for options in ({}, {"multiline": False}):
        pieces = list_pieces([source(root, "csv", **options)]).pieces
        rows = [(piece.first_position + row["position"], row["text"]) for piece in pieces for row in Read([piece]).rows]
        assert [position for position, _ in rows] == expected
        assert all(text.startswith(f"{position} ") for position, text in rows)
        ledger = [piece.first_position + line["position"] for piece in pieces for line in Read([piece]).ledger]
        assert sorted(ledger) == wrong


# ── datasets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_saved_dataset_is_read_split_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    train = [{"text": f"train {i}", "label": i % 2, "score": 0.5} for i in range(2500)]
    test = [{"text": f"test {i}", "label": i % 2, "score": 0.5} for i in range(10)]
    made = datasets.DatasetDict({"train": datasets.Dataset.from_list(train), "test": datasets.Dataset.from_list(test)})
    made.save_to_disk(tmp_path / "dict", num_shards={"train": 3, "test": 1})
    made["test"].save_to_disk(tmp_path / "one")
    (tmp_path / "dict" / "train" / "cache-1.arrow").write_bytes(b"not named in state.json")

    found = read(tmp_path / "dict", "dataset", columns={"label": "label"})
    assert found.of("text", "label") == [(row["text"], str(row["label"])) for row in train + test]
    assert found.rows[0]["origin"].startswith("train/data-00000-of-00003.arrow")
    assert read(tmp_path / "dict", "dataset", split="test").texts == [row["text"] for row in test]
    assert read(tmp_path / "one", "dataset").texts == [row["text"] for row in test]
    with pytest.raises(ConfigError, match=r"'other'.*train"):
        read(tmp_path / "dict", "dataset", split="other")


def test_a_conversation_of_a_saved_dataset_is_a_row(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"messages": [USER, FOUR]}, {"messages": [USER]}]).save_to_disk(tmp_path / "chat")

    found = read(tmp_path / "chat", "dataset", columns={"messages": "messages"})

    assert found.of("text", "messages") == [("Four.", BEFORE)]
    assert found.rules == [(1, "no_answer")]


def test_a_folder_that_is_no_dataset_is_an_error(write_files):
    with pytest.raises(ConfigError, match=r"state\.json"):
        read(write_files({"a.arrow": b""}), "dataset")
    state = json.dumps({"_data_files": [{"filename": "../secret.arrow"}]})
    write_files({"secret.arrow": b""}, folder=".")
    with pytest.raises(ConfigError, match="secret"):
        read(write_files({"state.json": state}, folder="two"), "dataset")


def test_a_large_stream_is_cut_at_batches_and_a_broken_one_is_in_the_ledger(write_files):
    rng = random.Random(10)
    table = pa.table({"text": [rng.randbytes(400).hex() for _ in range(30_000)]})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    whole = sink.getvalue()
    with_dictionary = io.BytesIO()
    encoded = pa.table({"text": table["text"][:100].combine_chunks().dictionary_encode()})
    with pa.ipc.new_stream(with_dictionary, encoded.schema) as writer:
        writer.write_table(encoded)
    names = ["a.arrow", "b.arrow", "c.arrow", "d.arrow"]
    state = json.dumps({"_data_files": [{"filename": name} for name in names]})
    contents = [whole, whole[: len(whole) // 2], b"no arrow", with_dictionary.getvalue()]
    root = write_files({"state.json": state, **dict(zip(names, contents, strict=True))})
    pieces = list_pieces([source(root, "dataset")]).pieces
    assert len(pieces) > 3

    found = Read(pieces)

    first = [(p.first_position + row["position"], row["text"]) for p in pieces[:-1] for row in Read([p]).rows]
    assert first[:30_000] == list(enumerate(table["text"].to_pylist()))
    assert found.texts[-100:] == table["text"].to_pylist()[:100]
    assert [(line["origin"], line["rule"]) for line in found.ledger] == [
        ("b.arrow", "unreadable_file"),
        ("c.arrow", "unreadable_file"),
    ]


def test_a_dataset_of_the_hub_is_read_from_the_cache_of_the_library(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "train.jsonl").write_text(lines({"text": f"row {i}"} for i in range(10)))
    monkeypatch.chdir(tmp_path)  # a folder of that name stands in for the hub
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    pieces = list_pieces([source(kind="dataset", hub="org/name")]).pieces

    assert Read(pieces).of("position", "text") == [(i, f"row {i}") for i in range(10)]
    with pytest.raises(ConfigError, match=r"'org/other'"):
        read(kind="dataset", hub="org/other")


# ── web archives ──────────────────────────────────────────────────────────────────────────────────────────────────────


def warc(pages):
    """A WARC file of responses, each after a record of another kind."""
    data = b""
    for url, kind, status, body, headers in pages:
        extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        http = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{extra}\r\n".encode() + body
        for record, content in (("metadata", b"a: b"), ("response", http)):
            data += (
                f"WARC/1.0\r\nWARC-Type: {record}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2026-01-02T03:04:05Z\r\n"
                f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n"
                f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(content)}\r\n\r\n"
            ).encode()
            data += content + b"\r\n\r\n"
    return data


def test_pages_of_an_archive_are_rows_with_their_url(write_files):
    html = PAGE.encode()
    archive = warc(
        [
            ("https://example.org/a", "text/html; charset=utf-8", "200 OK", html, {}),
            ("https://example.org/b.png", "image/png", "200 OK", b"\x89PNG", {}),
            ("https://example.org/c", "text/html", "404 Not Found", html, {}),
            (
                "https://example.org/d",
                "text/html",
                "200 OK",
                gzip.compress(html, mtime=0),
                {"Content-Encoding": "gzip"},
            ),
            ("https://example.org/e", "text/html", "200 OK", b"<div>" * 10_000, {}),
            ("https://example.org/f", "text/html", "200 OK", b"\x1b", {"Content-Encoding": "br"}),
            ("https://example.org/g", "text/html", "200 OK", gzip.compress(bytes(10**8)), {"Content-Encoding": "gzip"}),
        ]
    )
    members = b"".join(gzip.compress(b"WARC/1.0" + part, mtime=0) for part in archive.split(b"WARC/1.0")[1:])
    for name, data in (("a.warc", archive), ("a.warc.gz", members)):
        found = read(write_files({name: data}, folder=name), "warc")

        assert found.of("origin", "position", "timestamp") == [
            (f"{name}#https://example.org/a", 1, "2026-01-02T03:04:05Z"),
            (f"{name}#https://example.org/d", 7, "2026-01-02T03:04:05Z"),
        ]
        assert all(paragraph in text for paragraph in PARAGRAPHS for text in found.texts)
        assert found.rules == [(9, "nested_too_deep"), (11, "wrong_type"), (13, "archive_too_large")]


def test_a_broken_archive_of_the_web_is_in_the_ledger(write_files):
    whole = warc([("https://example.org/a", "text/html", "200 OK", PAGE.encode(), {})] * 3)
    files = {"cut.warc": whole[:-300], "not.warc": b"garbage" * 100, "cut.warc.gz": gzip.compress(whole, mtime=0)[:-20]}
    found = read(write_files(files), "warc")

    assert {(line["origin"].split("#")[0], line["rule"]) for line in found.ledger} == {
        (name, "unreadable_file") for name in files
    }
    assert len([row for row in found.rows if row["origin"].startswith("cut.warc#")]) == 2


# ── object stores, the web ────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_is_read_from_an_object_store(s3):  # noqa: F811
    table = pa.table({"text": [f"row {i}" for i in range(100)]})
    rows = lines(table.to_pylist()).encode()
    s3.put("data/a.parquet", parquet(table, row_group_size=10))
    s3.put("data/a.jsonl", rows)
    s3.put("data/b.jsonl.gz", gzip.compress(rows, mtime=0))
    s3.put("data/a.csv", b"text\n" + b"".join(b"row %d\n" % i for i in range(100)))
    s3.put("data/a.txt", b"text")
    expected = table["text"].to_pylist()
    options = {"storage_options": s3.options, "allow_private": True}

    for kind, count in (("parquet", 1), ("jsonl", 2), ("csv", 1)):
        assert read(f"s3://{s3.bucket}/data", kind, **options).texts == expected * count
    assert read(f"s3://{s3.bucket}/data/a.txt", **options).texts == ["text"]
    pieces = list_pieces([source(f"s3://{s3.bucket}/data", "jsonl", **options)]).pieces
    s3.put("data/a.jsonl", rows.replace(b"row 7", b"ROW 7"))
    with pytest.raises(StorageError, match=r"a\.jsonl"):
        Read(pieces)


def test_a_filesystem_that_fsspec_knows_is_a_place_too():
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.get_filesystem_class("memory")

    class Store(memory):  # stands in for a store whose driver is not installed
        protocol = "oss"

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix("oss:/"))

    Store.store, Store.pseudo_dirs = {}, [""]
    fsspec.register_implementation("oss", Store, clobber=True)
    for name in ("a/b.jsonl", "c.jsonl", "d.txt"):
        Store().pipe_file(f"/bucket/{name}", b'{"text": "%s"}\n' % name.encode())

    assert read("oss://bucket", "jsonl").of("origin", "text") == [("a/b.jsonl", "a/b.jsonl"), ("c.jsonl", "c.jsonl")]
    assert read("oss://bucket/*.jsonl", "jsonl").texts == ["c.jsonl"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "html"])
def test_a_file_of_the_web_is_read(web, kind):  # noqa: F811
    body = {"jsonl": b'{"text": "a"}\n', "parquet": parquet(pa.table({"text": ["a"]})), "html": b"<p>a"}[kind]
    web.pages = {"/file": (302, {"Location": "/other"}, b""), "/other": (200, {}, body)}
    pieces = list_pieces([source(web.url + "/file", kind, allow_private=True)]).pieces

    assert Read(pieces).texts == ["a"]
    web.pages["/other"] = (200, {}, body.replace(b"a", b"b"))
    with pytest.raises(StorageError, match=r"/file"):
        Read(pieces)


# ── what has changed ──────────────────────────────────────────────────────────────────────────────────────────────────


SMALL = {
    "text": ("a.txt", b"text"),
    "jsonl": ("a.jsonl", b'{"text": "a"}\n'),
    "csv": ("a.csv", b"text\na\n"),
    "parquet": ("a.parquet", parquet(pa.table({"text": ["a"]}))),
    "html": ("a.html", b"<p>text"),
}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("change", ["edit", "truncate", "delete", "fifo", "link"])
def test_a_file_that_changed_since_it_was_listed_is_not_read_under_its_old_identity(write_files, kind, change):
    name, data = SMALL[kind]
    root = write_files({name: data})
    pieces = list_pieces([source(root, kind)]).pieces
    assert Read(pieces).texts
    path = root / name
    if change == "edit":
        path.write_bytes(data.replace(b"a", b"b").replace(b"t", b"s"))
    elif change == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
        if change == "fifo":
            os.mkfifo(path)
        elif change == "link":
            path.symlink_to(write_files({name: data}, folder="outside") / name)

    with pytest.raises(StorageError, match=name.replace(".", r"\.")):
        Read(pieces)


@pytest.mark.parametrize("kind", SMALL)
def test_a_file_that_was_only_touched_or_copied_is_read(write_files, kind):
    name, data = SMALL[kind]
    root = write_files({name: data})
    pieces = list_pieces([source(root, kind)]).pieces
    before = Read(pieces).rows
    (root / name).unlink()
    write_files({name: data})

    assert Read(pieces).rows == before


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux's /proc")
def test_an_unreadable_file_is_a_line_of_the_ledger():
    for kind in ("text", "jsonl", "parquet", "csv"):
        found = read("/proc/self/mem", kind)
        assert [(line["rule"], line["origin"]) for line in found.ledger] == [("unreadable_file", "mem")]


# ── databases ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def fill(url):
    """A table of every type that has a text."""
    engine = sa.create_engine(url)
    metadata = sa.MetaData()
    table = sa.Table(
        "items",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("text", sa.Text),
        sa.Column("prompt", sa.Text),
        sa.Column("label", sa.Integer),
        sa.Column("at", sa.DateTime(timezone=True)),
        sa.Column("weight", sa.Numeric(6, 3)),
        sa.Column("turns", sa.JSON),
    )
    metadata.create_all(engine)
    noon = datetime.datetime(2026, 1, 2, 12, 0, tzinfo=datetime.UTC)
    rows = [
        {
            "id": i,
            "text": None if i == 7 else f"answer {i} é",
            "prompt": f"question {i}",
            "label": i % 3,
            "at": noon,
            "weight": Decimal("0.5"),
            "turns": [USER, FOUR],
        }
        for i in range(5000)
    ]
    with engine.begin() as connection:
        connection.execute(table.insert(), rows)
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """The options of a source whose database holds 5,000 items."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/data.db"
        fill(url)
        return {"kind": "sql", "url": url}
    url = request.getfixturevalue("postgres_url")
    fill(url)
    return {"kind": "sql", "url": url, "allow_private": True}


@pytest.mark.parametrize("relation", [{"table": "items"}, {"query": "SELECT * FROM items WHERE id < 100000;"}])
@pytest.mark.parametrize("key", [{}, {"key": "id"}])
def test_the_rows_of_a_database_are_rows(database, relation, key):
    columns = {"prompt": "prompt", "label": "label", "weight": "weight"}
    found = read(**database, **relation, **key, columns=columns)

    rows = found.of("prompt", "text", "label", "weight", "position")
    expected = [(f"question {i}", f"answer {i} é", str(i % 3), 0.5) for i in range(5000) if i != 7]
    assert sorted(row[:4] for row in rows) == sorted(expected)
    assert sorted([row[4] for row in rows] + [found.ledger[0]["position"]]) == list(range(5000))
    if key:
        assert [row[:4] for row in rows] == expected
    assert [line["rule"] for line in found.ledger] == ["wrong_type"]
    assert {row["origin"] for row in found.rows} == {"items" if "table" in relation else "query"}


def test_what_a_database_holds_decides_its_identity(database, tmp_path):
    options = {**database, "table": "items", "key": "id", "columns": {"timestamp": "at"}}
    pieces = list_pieces([source(**options)]).pieces
    assert [piece.digest for piece in list_pieces([source(**options)]).pieces] == [piece.digest for piece in pieces]
    times = set(Read(pieces).of("timestamp"))
    assert times <= {"2026-01-02T12:00:00+00:00", "2026-01-02 12:00:00.000000"}

    engine = sa.create_engine(database["url"])
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE items SET text = 'edited' WHERE id = 4999")
    engine.dispose()
    assert [piece.digest for piece in list_pieces([source(**options)]).pieces] != [piece.digest for piece in pieces]
    with pytest.raises(StorageError, match="items"):
        Read(pieces)


def test_turns_in_a_database_are_a_conversation(database):
    found = read(**database, table="items", columns={"messages": "turns"})

    assert set(found.of("text", "messages")) == {("Four.", BEFORE)}


def test_a_source_that_is_cut_reads_each_range_once(tmp_path):
    connection = sqlite3.connect(tmp_path / "data.db")
    connection.execute("CREATE TABLE items (key TEXT, text TEXT)")
    rng = random.Random(11)
    rows = [(f"k{rng.randrange(4000)}", f"{i} " + "word " * 250) for i in range(12_000)]  # keys that repeat
    connection.executemany("INSERT INTO items VALUES (?, ?)", rows)
    connection.commit()
    pieces = list_pieces([source(kind="sql", url=f"sqlite:///{tmp_path}/data.db", table="items", key="key")]).pieces
    assert len(pieces) >= 2

    found = [(piece.first_position + row["position"], row["text"]) for piece in pieces for row in Read([piece]).rows]

    assert [position for position, _ in found] == list(range(12_000))
    assert sorted(text for _, text in found) == sorted(text for _, text in rows)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"table": "nowhere"}, "nowhere"),
        ({"query": "SELEC 1"}, "syntax"),
        ({"query": "DELETE FROM items"}, "items|syntax"),
        ({"query": "ATTACH DATABASE 'other.db' AS other"}, "syntax"),
        ({"query": "SELECT load_extension('x') AS text"}, "authorized|function"),
        ({"table": "items", "columns": {"text": "nothing"}}, "nothing"),
        ({"table": "items", "key": "other"}, "whole numbers"),
        ({"table": "items", "url": "sqlite:///nowhere.db"}, "nowhere"),
        ({"table": "items", "url": "sqlite://"}, "file of SQLite"),
        ({"table": "items", "url": "sqlite:////dev/null"}, "file of SQLite"),
        ({"table": "items", "url": "no url"}, "URL"),
        ({"table": "items", "url": "sqlite:///${NO_SUCH_VARIABLE_SET}"}, "NO_SUCH_VARIABLE_SET"),
        ({"table": "items", "url": "postgresql+psycopg://user:hunter2@localhost/db"}, "allow_private"),
        ({"table": "items", "url": "postgresql+psycopg://user:hunter2@/db?host=/tmp"}, "allow_private"),
        ({"table": "items", "url": "postgresql+psycopg:///db"}, "allow_private"),
        (
            {"table": "items", "url": "postgresql+psycopg://u:hunter2@127.0.0.1:1/db", "allow_private": True},
            "OperationalError",
        ),
    ],
)
def test_a_database_that_can_not_be_read_is_an_error_without_its_password(tmp_path, options, expected):
    connection = sqlite3.connect(tmp_path / "data.db")
    connection.execute("CREATE TABLE items (text TEXT, other TEXT)")
    connection.execute("INSERT INTO items VALUES ('a', NULL)")
    connection.commit()

    with pytest.raises(ConfigError, match=expected) as caught:
        read(**{"kind": "sql", "url": f"sqlite:///{tmp_path}/data.db", **options})
    shown = str(caught.value) + str(caught.value.__cause__) + str(caught.value.__context__ is None)
    assert "hunter2" not in shown
    assert connection.execute("SELECT count(*) FROM items").fetchone() == (1,)


def test_a_password_comes_from_the_environment_and_is_in_nothing(database, monkeypatch):
    url = sa.make_url(database["url"])
    monkeypatch.setenv("TEST_DATABASE_URL", url.render_as_string(hide_password=False))
    listing = list_pieces([source(**{**database, "url": "${TEST_DATABASE_URL}"}, table="items")])

    assert len(Read(listing.pieces).rows) == 4999
    assert not url.password or url.password not in repr(listing)


def test_a_text_of_sqlite_that_is_no_utf8_is_in_the_ledger(tmp_path):
    connection = sqlite3.connect(tmp_path / "data.db")
    connection.execute("CREATE TABLE items (text)")
    connection.execute("INSERT INTO items VALUES (CAST(x'61ff62' AS TEXT)), ('good'), (5), (x'00')")
    connection.commit()
    found = read(kind="sql", url=f"sqlite:///{tmp_path}/data.db", table="items")

    assert found.texts == ["good"]
    assert sorted((line["rule"], line["text"]) for line in found.ledger) == [
        ("invalid_utf8", r"a\xffb"),
        ("wrong_type", "{'text': 5}"),
        ("wrong_type", "{'text': b'\\x00'}"),
    ]


# ── streams ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Log:
    """A broker in memory, with the methods of a consumer of kafka-python. Offsets have gaps, as compaction leaves them."""

    def __init__(self, partitions):
        self.partitions = partitions
        self.fetched = 0

    def partitions_for_topic(self, topic):
        return set(self.partitions) if topic == "events" else None

    def beginning_offsets(self, partitions):
        return {p: self.partitions[p.partition][0][0] for p in partitions}

    def end_offsets(self, partitions):
        return {p: self.partitions[p.partition][-1][0] + 1 for p in partitions}

    def assign(self, partitions):
        (self.where,) = partitions

    def seek(self, partition, offset):
        self.at = offset

    def position(self, partition):
        return self.at

    def poll(self, timeout_ms=0, max_records=None):
        found = [m for m in self.partitions[self.where.partition] if m[0] >= self.at][:500]
        if not found:
            return {}
        self.at = found[-1][0] + 1
        self.fetched += len(found)
        return {self.where: [SimpleNamespace(offset=o, timestamp=t, value=v) for o, t, v in found]}

    def close(self):
        pass


def topic(**options):
    return source(kind="kafka", bootstrap_servers="127.0.0.1:9092", topic="events", **options)


def messages(count, first=0):
    return [
        (first + i * 2, 1_767_355_445_000, json.dumps({"text": f"event {first + i * 2}"}).encode())
        for i in range(count)
    ]


def test_messages_are_rows_and_later_ones_make_new_pieces():
    pytest.importorskip("kafka")
    log = Log({0: messages(9000), 1: messages(10, first=6)})

    def listed(seen=None):
        return list_pieces([topic()], seen=seen, open_consumer=lambda _: log)

    first = listed()
    assert [(s.origin, s.start, s.stop) for p in first.pieces for s in p.spans] == [
        ("events/0", 0, 10_000),
        ("events/0", 10_000, 17_999),
        ("events/1", 6, 25),
    ]
    found = Read(first.pieces, open_consumer=lambda _: log)
    assert found.of("origin", "position", "text", "timestamp") == [
        (f"events/{p}", offset, f"event {offset}", "2026-01-02T12:04:05+00:00")
        for p, messages in log.partitions.items()
        for offset, _, _ in messages
    ]

    log.partitions[0] += messages(3000, first=18_000)
    before = log.fetched
    again = listed(json.loads(json.dumps(first.seen)))
    assert again.pieces == listed().pieces
    assert [p.digest for p in again.pieces][::3] == [first.pieces[0].digest, first.pieces[2].digest]
    assert log.fetched - before < 40_000
    log.partitions[0][5] = (10, 0, b'{"text": "another"}')
    with pytest.raises(StorageError, match="events/0"):
        Read(first.pieces, open_consumer=lambda _: log)


def test_a_topic_is_bounded_by_its_offsets():
    pytest.importorskip("kafka")
    log = Log({0: messages(100)})
    listing = list_pieces([topic(start=20, end=30)], open_consumer=lambda _: log)

    assert Read(listing.pieces, open_consumer=lambda _: log).of("position") == [20, 22, 24, 26, 28]
    with pytest.raises(ConfigError, match="'nothing'"):
        list_pieces([topic().model_copy(update={"topic": "nothing"})], open_consumer=lambda _: log)


def rows_of(messages, **options):
    builder = blocks.BlockBuilder("docs")
    list(add_messages(messages, topic(**options), builder))
    return next(builder.rest())


def test_bad_messages_are_in_the_ledger():
    values = [
        b'{"text": "a"}',
        b"no json",
        b"\xff",
        None,
        b'{"text": 5}',
        b'{"body": "x"}',
        b'{"text": "b", "at": "then"}',
    ]
    found = rows_of([Message(0, i, -1, value) for i, value in enumerate(values)], columns={"timestamp": "at"})

    assert found.rows["text"].to_pylist() == ["a", "b"]
    assert found.rows["timestamp"].to_pylist() == ["", "then"]
    assert [(line.position, line.rule) for line in found.malformed] == [
        (1, "invalid_json"),
        (2, "invalid_utf8"),
        (3, "wrong_type"),
        (4, "wrong_type"),
        (5, "missing_column"),
    ]
    texts = rows_of([Message(0, i, -1, value) for i, value in enumerate([b"plain", b"\xff"])], value="text")
    assert (texts.rows["text"].to_pylist(), texts.malformed[0].rule) == (["plain"], "invalid_utf8")


def test_a_broker_that_does_not_answer_or_has_lost_its_messages_is_an_error():
    kafka = pytest.importorskip("kafka")
    log = Log({0: messages(10)})
    pieces = list_pieces([topic()], open_consumer=lambda _: log).pieces

    def poll(**_):
        raise kafka.errors.OffsetOutOfRangeError("gone")

    log.poll = poll
    with pytest.raises(StorageError, match=r"events/0.*OffsetOutOfRange"):
        Read(pieces, open_consumer=lambda _: log)
    log.poll = lambda **_: {}
    with pytest.raises(StorageError, match=r"events/0.*found none"):
        Read(pieces, open_consumer=lambda _: log)
    unreachable = topic(allow_private=True, options={"bootstrap_timeout_ms": 200}).model_copy(
        update={"bootstrap_servers": "127.0.0.1:1"}
    )
    with pytest.raises(ConfigError, match="bootstrap_servers"):
        list_pieces([unreachable])


def test_a_broker_at_a_private_address_needs_permission():
    pytest.importorskip("kafka")
    with pytest.raises(ConfigError, match="allow_private"):
        list_pieces([topic()])
    with pytest.raises(ConfigError, match="host:port"):
        list_pieces([topic().model_copy(update={"bootstrap_servers": "localhost"})])
