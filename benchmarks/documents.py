"""Documents for benchmarks: technical English out of the docstrings of the installed packages, of any size, always the same.

Sentences are taken from the docstrings and put together anew by a seeded generator, about 2 KB a document, so that no two
documents are alike but those that are planted: exact copies, and near ones in which a share of the words is replaced.

None quotes a control token: a peer would take it for one, where we encode what was written.

Two things make them more like what is collected. One sentence in ten gets a word that hardly occurs again: in texts of
people new words never end, and a tokenizer that remembers words would look faster than it is without them (Heaps 1978,
"Information Retrieval", section 7.5). And a share of the documents breaks a published rule each, or is not in Unicode NFC.
"""

from __future__ import annotations

import re
import sysconfig
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# A docstring as nearly everybody writes it. A parser would find a few more, in ten times the time.
_DOCSTRING = re.compile(r'^[ \t]*[rRuU]?"""(.*?)"""', re.DOTALL | re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PARAGRAPH = re.compile(r"\n\s*\n")
_DOCUMENT_CHARS = 2000
_RARE_SHARE = 0.1
"""Of the sentences, those with a word that hardly occurs again."""
_SYLLABLES = tuple(a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "l", "n", "r", "s"))
_REMEMBERED = 20_000
"""Documents of which a copy may be planted later."""


@dataclass(frozen=True, slots=True)
class Planted:
    """A document that is a copy of another one."""

    copy: int
    original: int
    is_exact: bool


@lru_cache(maxsize=2)
def sentences(limit: int) -> tuple[str, ...]:
    """Sentences of prose in the docstrings below the standard library and the installed packages, without repetition."""
    found: dict[str, None] = {}
    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    for file in (file for root in roots for file in sorted(root.rglob("*.py"))):
        if len(found) >= limit:
            break
        for text in _docstrings(file):
            for paragraph in _PARAGRAPH.split(text):
                for sentence in _SENTENCE.split(" ".join(paragraph.split())):
                    if _is_prose(sentence):
                        found[sentence] = None
    return tuple(found)[:limit]


def write_documents(
    folder: Path,
    num_bytes: int,
    *,
    duplicate_share: float = 0.04,
    spoilt_share: float = 0.05,
    seed: int = 1,
    file_bytes: int = 64_000_000,
    num_sentences: int = 200_000,
) -> list[Planted]:
    """Write Parquet files of documents (columns `id`, `text`) below `folder`; return what was planted.

    duplicate_share   of the documents, those that are copies, every other one of them an exact one
    spoilt_share      of the others, those that break a rule or are not in Unicode NFC
    num_sentences     different sentences in all documents together
    """
    rng = np.random.default_rng(seed)
    pool = sentences(num_sentences)
    folder.mkdir(parents=True, exist_ok=True)
    planted: list[Planted] = []
    recent: list[tuple[int, str]] = []
    rows: list[str] = []
    written = size = 0
    for number, text in enumerate(_fresh(rng, pool)):
        if recent and rng.random() < duplicate_share:
            original, source = recent[int(rng.integers(len(recent)))]
            is_exact = bool(rng.random() < 0.5)
            rows.append(source if is_exact else _varied(rng, source))
            planted.append(Planted(number, original, is_exact))
        elif rng.random() < spoilt_share:
            rows.append(_spoilt(rng, text))
        else:
            rows.append(text)
            if len(recent) < _REMEMBERED:
                recent.append((number, text))
            else:
                recent[number % _REMEMBERED] = (number, text)
        size += len(rows[-1].encode())
        if size >= file_bytes or written + size >= num_bytes:
            first = number + 1 - len(rows)
            table = pa.table({"id": pa.array(range(first, number + 1), pa.int64()), "text": rows})
            pq.write_table(table, folder / f"documents-{first:09d}.parquet", row_group_size=4000)
            written, size, rows = written + size, 0, []
        if written >= num_bytes:
            return planted
    raise AssertionError("there is always another document")


def _fresh(rng: np.random.Generator, pool: Sequence[str]) -> Iterator[str]:
    lengths = np.array([len(sentence) for sentence in pool])
    while True:
        # Enough for some thousand documents at once: a draw of its own for each sentence would cost more than the text.
        drawn = rng.integers(len(pool), size=100_000)
        texts = [pool[i] for i in drawn.tolist()]
        rare = np.flatnonzero(rng.random(len(drawn)) < _RARE_SHARE)
        for place, syllables in zip(
            rare.tolist(), rng.integers(len(_SYLLABLES), size=(len(rare), 4)).tolist(), strict=True
        ):
            word = "".join(_SYLLABLES[i] for i in syllables[: 2 + syllables[0] % 3])
            texts[place] = f"{texts[place][:-1]} {word}."
        ends = np.cumsum(lengths[drawn])
        begin = 0
        while True:
            # An integer: the ends would be converted for a float, all of them each time.
            wanted = (int(ends[begin - 1]) if begin else 0) + int(_DOCUMENT_CHARS * rng.uniform(0.6, 1.4))
            end = int(np.searchsorted(ends, wanted)) + 1
            if end >= len(drawn):
                break
            yield "\n\n".join(" ".join(texts[at : min(at + 4, end)]) for at in range(begin, end, 4))
            begin = end


def _spoilt(rng: np.random.Generator, text: str) -> str:
    """The text so that it breaks a rule of Gopher or C4, or in another form of Unicode, which breaks none."""
    match int(rng.integers(7)):
        case 0:  # too short
            return text[:200]
        case 1:  # the same again and again
            return "\n\n".join([text.split("\n\n")[0]] * 5)
        case 2:  # markup or code
            return text.replace(".", " {", 1)
        case 3:  # a list, without an end to its lines
            return text.replace(". ", "\n")
        case 4:  # signs in place of words
            return text.replace(" ", " # ")
        case 5:  # an ellipsis after every line
            return text.replace(". ", "...\n")
    return unicodedata.normalize("NFD", text.replace("e", "é"))


def _varied(rng: np.random.Generator, text: str) -> str:
    """The text with one word in ten replaced."""
    words = text.split(" ")
    for i in np.flatnonzero(rng.random(len(words)) < 0.1):
        words[i] = words[int(rng.integers(len(words)))]
    return " ".join(words)


def _docstrings(file: Path) -> list[str]:
    try:
        return _DOCSTRING.findall(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return []


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    return (
        6 <= len(words) <= 60
        and sentence[0].isupper()
        and sentence[-1] == "."
        and not any(mark in sentence for mark in ("{", "}", ">>>", "::", "__", "lorem", "<|"))
        and sum(character.isalpha() or character == " " for character in sentence) > 0.9 * len(sentence)
    )
