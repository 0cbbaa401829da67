"""The trace of a text: the training rows that share the longest spans with it, and those that resemble it by their words.

The first are found by an index, the second by reading all rows of the release's lineage, twice, a thousand at a time.
They resemble it. That the model said what it said because of them is more than can be known from this.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aifactory.errors import ConfigError, ErasedError, StateError, StorageError
from aifactory.records.artifacts import Corpus, Model, TokenSet
from aifactory.records.books import Books
from aifactory.records.lineage import LineageNode
from aifactory.records.registry import Release
from aifactory.records.rows import read_corpus
from aifactory.text.resemblance import Resemblance
from aifactory.text.tasks import Task

if TYPE_CHECKING:
    from aifactory.text.tokenizer import TextTokenizer
    from aifactory.tokens.spans import SharingRow

_SHOWN_CHARS = 160
_SHOWN_WORDS = 6
_ROWS_AT_ONCE = 1000
_NAMED = ("id", "source", "origin", "position")


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRow:
    """A row that trained, and the longest span that it shares with the text."""

    id: str
    source: str
    origin: str
    position: int
    """Which row of its origin it is (see CORPUS_SCHEMA)."""
    span: str
    tokens: int
    num_bytes: int
    text_byte: int
    """The byte of the text at which the span begins."""
    text_token: int
    row_token: int
    """The token of the row's document at which it begins: [bos], then the prompt, then the text."""
    covered_tokens: int
    """Tokens of the text that lie in any span which the row shares with it."""
    spans: int
    corpus: str
    token_set: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a release comes from."""

    cycle: str
    """Trigger of the cycle that made it; `aifactory explain` tells its story."""
    model: str
    run: str | None
    """Folder of the training run, with its checkpoints and its log; None where the model was erased, and that with it."""
    recipe: Mapping[str, Any] | None
    """What the model was trained by, with all that bears identity; None where it was erased."""
    rows: Mapping[str, int]
    """By corpus how many of its rows trained the model or its ancestors. `TraceReport.token_sets` hold their ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarRow:
    """A row that trained, and how much it has in common with the text by its words (`text.resemblance`)."""

    id: str
    source: str
    origin: str
    position: int
    similarity: float
    """With all that was compared: about 1 for a row that says just that, 0 for one that shares no word with it."""
    answer: float
    """With the answer, or the text, alone."""
    prompt: float | None
    """With the prompt alone; none where a text is traced."""
    shared: Sequence[str]
    """Words that they share, the rarest first."""
    text: str
    """How the row begins."""
    corpus: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceReport:
    """The rows that share most with a text, by the longest span, then by what is covered of the text, then by id; and those that
    resemble it most."""

    release: str | None
    """The release whose training rows were searched; None where none was made yet."""
    completion: str | None
    token_sets: Sequence[str]
    text_tokens: int
    rows: Sequence[TracedRow]
    num_rows: int
    """Rows that share any span that was found."""
    left_out: int
    """Places of the text's commonest runs that were not compared."""
    similar: Sequence[SimilarRow] = ()
    """The rows that resemble the text, or the answer and its prompt, most; the most similar first."""
    erased: Sequence[str] = ()
    """What can't be searched or named any more, since somebody asked to forget it, and by which erasure."""
    origin: Origin | None = None
    """Of the release; None where there is none."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as text."""
        what = f"the answer {self.completion}" if self.completion is not None else "the text"
        of = f"the rows that trained {self.release}" if self.release is not None else f"{', '.join(self.token_sets)}"
        lines = [
            f"{self.num_rows:,} of {of} share a span with {what} ({self.text_tokens:,} tokens)"
            + (f"; those that share most, {len(self.rows)}:" if self.rows else ".")
        ]
        if self.origin is not None:
            rows = ", ".join(f"{number:,} of {corpus}" for corpus, number in self.origin.rows.items())
            lines.insert(
                0, f"{self.release}: {self.origin.model}, made by {self.origin.cycle}, trained on {rows or 'no rows'}."
            )
        for row in self.rows:
            span = " ".join(row.span.split())
            lines += [
                f"{row.tokens} tokens, {row.num_bytes} bytes, from byte {row.text_byte} of the text  "
                f"{row.source}:{row.origin}:{row.position} from token {row.row_token}  (id {row.id}, {row.corpus})",
                f"    {span if len(span) <= _SHOWN_CHARS else span[: _SHOWN_CHARS - 1] + '…'}",
            ]
        if self.similar:
            of_what = "the text" if self.completion is None else "the answer and its prompt"
            lines.append(f"Those that resemble {of_what} most by their words:")
        for similar in self.similar:
            parts = "" if similar.prompt is None else f" (answer {similar.answer:.2f}, prompt {similar.prompt:.2f})"
            lines += [
                f"{similar.similarity:.2f}{parts}  {similar.source}:{similar.origin}:{similar.position}  (id {similar.id}, "
                f"{similar.corpus})  shares {', '.join(similar.shared)}",
                f"    {' '.join(similar.text.split())}",
            ]
        lines += [f"Erased: {each}" for each in self.erased]
        if self.left_out:
            lines.append(
                f"{self.left_out:,} places of the commonest runs were not compared: rows that share nothing but those may be "
                "missing."
            )
        if self.rows or self.similar:
            lines.append("These rows resemble it; whether it comes from them is not known from this.")
        return lines


def trace_text(
    books: Books, *, text: str | None, completion: str | None, release: str | None, limit: int, similar: int = 10
) -> TraceReport:
    """The rows that share the longest spans with a text, or with the answer of a completion, and the `similar` rows that resemble it,
    or the answer and its prompt, most.

    Searched are the token sets on which the model of the release was trained, and its ancestors: the release that gave the
    answer; or the one that is named, by default the one in production; or the newest token set, where nothing was
    released yet.
    Raises   ConfigError for an unknown name and a text that is too short; StateError where there are no tokens yet;
             StorageError.
    """
    from aifactory.tokens.spans import GUARANTEED, find_rows

    if (text is None) == (completion is None) or (completion is not None and release is not None):
        raise ConfigError("expected either a text, with or without a release, or a completion; found neither or both.")
    if limit < 1:
        raise ConfigError(f"expected to show at least one row, found a limit of {limit}.")
    if similar < 0:
        raise ConfigError(f"expected to show no similar row or some, found a number of {similar}.")
    prompt: str | None = None
    if completion is None:
        assert text is not None
        searched = _release_named(books, release)
    elif (erasure := books.erasures.of_completion(completion)) is not None:
        return TraceReport(
            release=None,
            completion=completion,
            token_sets=(),
            text_tokens=0,
            rows=(),
            num_rows=0,
            left_out=0,
            erased=[f"the answer {completion} itself, by {erasure}"],
        )
    else:
        text, prompt, searched = _answer_of(books, completion)
    token_sets, erased = _token_sets(books, searched)
    num_rows = left_out = text_tokens = 0
    rows: list[tuple[SharingRow, TokenSet, TextTokenizer, list[int]]] = []
    for tokens in token_sets:
        tokenizer = tokenizer_of(books, tokens)
        ids = tokenizer.encode(text)
        if len(ids) < GUARANTEED and completion is not None and similar:
            continue  # an answer is as short as it is; its words are compared all the same
        if len(ids) < GUARANTEED:
            raise ConfigError(
                f"expected a text of at least {GUARANTEED} tokens to trace, found {len(ids)} ({len(text.encode())} bytes): a "
                "shorter one can stand in a row and not be found. Give more of the text."
            )
        names = {file.name for file in tokens.record.files}
        found = find_rows(ids, _shards(tokens), names, partial(books.artifacts.fetch, tokens), limit=limit)
        rows += [(row, tokens, tokenizer, ids) for row in found.rows]
        num_rows, left_out = num_rows + found.num_rows, left_out + found.left_out
        text_tokens = max(text_tokens, len(ids))
    rows.sort(key=lambda item: (-item[0].length, -item[0].covered, item[0].row, item[1].id))
    return TraceReport(
        release=None if searched is None else searched.name,
        completion=completion,
        token_sets=[tokens.id for tokens in token_sets],
        text_tokens=text_tokens,
        rows=_named(books, rows[:limit]),
        num_rows=num_rows,
        left_out=left_out,
        similar=_similar(books, token_sets, text, prompt, similar) if similar else (),
        erased=erased,
        origin=None if searched is None else _origin_of(books, searched, token_sets),
    )


def _origin_of(books: Books, release: Release, token_sets: Sequence[TokenSet]) -> Origin:
    """The cycle, run and recipe of a release, and how many rows of which corpora it comes from."""
    gone = books.artifacts.erased(release.model) is not None
    record = None if gone else books.artifacts.get(Model, release.model).record
    run = None if record is None else books.storage.path("runs", f"train-{record.fingerprint[:16]}")
    return Origin(
        cycle=release.trigger,
        model=release.model,
        run=run,
        recipe=None if record is None else record.recipe,
        rows={tokens.record.inputs[0]: int(tokens.figures["documents"]) for tokens in token_sets},
    )


# ── where is searched ─────────────────────────────────────────────────────────────────────────────────────────────────


def _release_named(books: Books, name: str | None) -> Release | None:
    """The release of this name; without a name the one in production, or None where there is none yet."""
    if name is None:
        return books.registry.production()
    releases = {release.name: release for release in books.registry.releases()}
    if name not in releases:
        raise ConfigError(f"expected one of the releases {', '.join(releases) or '(none yet)'}, found {name!r}.")
    return releases[name]


def _answer_of(books: Books, completion_id: str) -> tuple[str, str, Release]:
    """The answer of a completion, its prompt and the release that gave it."""
    completion = books.feedback.completion(completion_id)
    if completion is None:
        raise ConfigError(
            f"expected the id of an answer that the factory {books.config.name} gave, found {completion_id!r}; it is the `id` "
            "of the response, cmpl-… or chatcmpl-…."
        )
    release = books.registry.release(completion.release)
    if release is None:
        raise StateError(
            f"expected release {completion.release}, which gave {completion_id}, found none of this number."
        )
    return completion.answer, Task(completion.prompt, "", completion.messages).asked, release


def _token_sets(books: Books, release: Release | None) -> tuple[list[TokenSet], list[str]]:
    """What the model of a release was trained on, and what its ancestors were; the newest token set without a release. And what
    of it was erased: then what is left of its corpus is searched, where a token set was made of it since."""
    if release is None:
        made = [event.subject for event in books.journal.events(event="tokenized") if event.subject is not None]
        if not made:
            raise StateError(
                f"expected a token set of the factory {books.config.name}, found none; run: aifactory tokenize CONFIG."
            )
        erased = books.journal.erased()
        left = [token_id for token_id in made if token_id not in erased]
        return ([books.artifacts.get(TokenSet, left[-1])] if left else []), []
    try:
        return token_sets_of(books, release), []
    except ErasedError:
        tree = books.lineage.tree(release.model)
        if tree is None:
            raise
        return _of_tree(books, tree)


def _of_tree(books: Books, model: LineageNode) -> tuple[list[TokenSet], list[str]]:
    """The token sets below a model as the books tell of them, since its own record may be gone."""
    found: dict[str, TokenSet] = {}
    told: dict[str, None] = {}
    models = [model]
    for node in models:
        models += [parent for parent in node.parents if parent.kind == Model.kind and parent not in models]
        for tokens in (parent for parent in node.parents if parent.kind == TokenSet.kind):
            erased = books.artifacts.erased(tokens.id)
            if erased is None:
                found[tokens.id] = books.artifacts.get(TokenSet, tokens.id)
                continue
            (corpus,) = (parent.id for parent in tokens.parents if parent.kind == Corpus.kind)
            gone = books.artifacts.erased(corpus)
            rows = 0 if gone is None else sum(gone.rows.values())
            told[f"{rows:,} rows of {corpus}, of which {tokens.id} was made, by {erased.erasure}"] = None
            for left in books.lineage.children(*books.journal.left_of([corpus]), kind=TokenSet.kind):
                if books.artifacts.erased(left) is None:
                    found[left] = books.artifacts.get(TokenSet, left)
    return list(found.values()), list(told)


def token_sets_of(books: Books, release: Release) -> list[TokenSet]:
    """What the model of a release was trained on, and what its ancestors were."""
    found: dict[str, None] = {}
    models = [release.model]
    for model_id in models:
        for input_id in books.artifacts.get(Model, model_id).record.inputs:
            if input_id.startswith("tokens/"):
                found[input_id] = None
            elif input_id.startswith("model/") and input_id not in models:
                models.append(input_id)  # is walked too, since the list is still being read
    return [books.artifacts.get(TokenSet, token_id) for token_id in found]


def _shards(tokens: TokenSet) -> list[str]:
    from aifactory.tokens.pipeline import shard_names

    return shard_names(tokens.record.files)


def tokenizer_of(books: Books, tokens: TokenSet) -> TextTokenizer:
    """The tokenizer of a token set; it stays loaded for the next call."""
    from aifactory.tokens.pipeline import TOKENIZER_FOLDER

    files = [file for file in tokens.record.files if file.name.startswith(f"{TOKENIZER_FOLDER}/")]
    folder = books.artifacts.fetch(tokens, [file.name for file in files])
    return _load(folder / TOKENIZER_FOLDER, tuple(file.sha256 for file in files))


@lru_cache(maxsize=2)
def _load(folder: Path, digests: tuple[str, ...]) -> TextTokenizer:
    """The tokenizer in a folder; `digests` tell what lies in it."""
    from aifactory.text.tokenizer import load_tokenizer

    return load_tokenizer(folder)


# ── what was found ────────────────────────────────────────────────────────────────────────────────────────────────────


def _named(books: Books, found: Sequence[tuple[SharingRow, TokenSet, TextTokenizer, list[int]]]) -> list[TracedRow]:
    """The rows with what the corpus says of where they come from."""
    from aifactory.tokens.pipeline import part_of

    corpora = {tokens.id: books.artifacts.left_of(Corpus, tokens.record.inputs[0]) for _, tokens, _, _ in found}
    wanted: dict[tuple[str, str], set[str]] = {}
    for row, tokens, _, _ in found:
        wanted.setdefault((tokens.id, row.shard), set()).add(row.row)
    said = {
        (token_id, shard): _rows_of(books, corpora[token_id], part_of(shard, corpora[token_id]), ids)
        for (token_id, shard), ids in wanted.items()
    }
    traced = []
    for row, tokens, tokenizer, ids in found:
        span = ids[row.text_begin : row.text_begin + row.length]
        origin = said[tokens.id, row.shard][row.row]
        traced.append(
            TracedRow(
                id=row.row,
                source=origin["source"],
                origin=origin["origin"],
                position=origin["position"],
                span=tokenizer.decode(span),
                tokens=row.length,
                num_bytes=_num_bytes(tokenizer, span),
                text_byte=_num_bytes(tokenizer, ids[: row.text_begin]),
                text_token=row.text_begin,
                row_token=row.row_begin,
                covered_tokens=row.covered,
                spans=row.num_spans,
                corpus=corpora[tokens.id].id,
                token_set=tokens.id,
            )
        )
    return traced


def _similar(
    books: Books, token_sets: Sequence[TokenSet], text: str, prompt: str | None, limit: int
) -> list[SimilarRow]:
    """The rows that trained and have most in common with a text, or with an answer and its prompt; memory holds some rows at a time."""
    resemblance = Resemblance([text] if prompt is None else [text, prompt])
    corpora = {
        corpus.id: corpus
        for corpus in (books.artifacts.left_of(Corpus, tokens.record.inputs[0]) for tokens in token_sets)
    }
    for corpus in corpora.values():
        for rows, _ in _some_rows(books, corpus, ("prompt", "text", "messages")):
            resemblance.count(rows)
    shares_P = resemblance.shares()
    best: list[tuple[float, str, int, SimilarRow]] = []  # a heap; the least similar comes first
    order = count()
    for corpus in corpora.values():
        for rows, table in _some_rows(books, corpus, (*_NAMED, "prompt", "text", "messages")):
            scores_NP = resemblance.score(rows)
            whole_N = scores_NP @ shares_P
            for i in np.argsort(-whole_N, kind="stable")[:limit].tolist():
                if whole_N[i] <= 0 or (len(best) == limit and whole_N[i] < best[0][0]):
                    break
                row = table.slice(i, 1).to_pylist()[0]
                similar = SimilarRow(
                    **{name: row[name] for name in _NAMED},
                    similarity=float(whole_N[i]),
                    answer=float(scores_NP[i, 0]),
                    prompt=None if prompt is None else float(scores_NP[i, 1]),
                    shared=resemblance.shared(rows[i].as_py(), limit=_SHOWN_WORDS),
                    text=(row["text"] or row["prompt"])[:_SHOWN_CHARS],
                    corpus=corpus.id,
                )
                # Of equals the one whose id comes first.
                heapq.heappush(best, (similar.similarity, _reversed(similar.id), next(order), similar))
                if len(best) > limit:
                    heapq.heappop(best)
    return [each[-1] for each in sorted(best, reverse=True)]


def _some_rows(books: Books, corpus: Corpus, columns: Sequence[str]) -> Iterator[tuple[pa.Array, pa.Table]]:
    """The rows of a corpus that train, some at a time: what each says in one text, and the columns."""
    for _, part in read_corpus(books.storage, corpus, columns=columns, side="train"):
        for at in range(0, part.num_rows, _ROWS_AT_ONCE):
            table = part.slice(at, _ROWS_AT_ONCE).combine_chunks()
            said = [table[name].cast(pa.large_string()) for name in ("prompt", "text", "messages")]
            joined = pc.binary_join_element_wise(*said, pa.scalar("\n", pa.large_string()))
            yield joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined, table


def _reversed(text: str) -> str:
    """A text that sorts the other way round."""
    return "".join(chr(0x10FFFF - ord(char)) for char in text)


def _rows_of(books: Books, corpus: Corpus, part: str, ids: set[str]) -> Mapping[str, Mapping[str, Any]]:
    """What one part of a corpus says of these rows, all of which it must hold; by id."""
    try:
        table = pq.read_table(books.artifacts.fetch(corpus, [part]) / part, columns=list(_NAMED), use_threads=False)
    except FileNotFoundError as error:
        raise StorageError(
            f"expected {corpus.uri}/{part}, found no such file; move the corpus away and ingest again."
        ) from error
    rows = {
        row_id: table.slice(at, 1).to_pylist()[0] for at, row_id in enumerate(table["id"].to_pylist()) if row_id in ids
    }
    if missing := sorted(ids - set(rows)):
        raise StorageError(
            f"expected the row {missing[0]} in {corpus.uri}/{part}, found it elsewhere or gone: the token set was made of "
            "another corpus. Move both away and run again."
        )
    return rows


def _num_bytes(tokenizer: TextTokenizer, ids: Sequence[int]) -> int:
    return sum(len(tokenizer.bytes_of(token_id)) for token_id in ids)
