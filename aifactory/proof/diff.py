"""Two releases side by side: what they were trained on, by which recipe, how they score, what they answer."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aifactory.errors import BadRequestError, ConfigError
from aifactory.evaluate.statistics import ratio_interval
from aifactory.records.artifacts import Corpus, Model, Scorecard, TokenSet
from aifactory.records.books import Books
from aifactory.records.registry import Release
from aifactory.records.rows import read_corpus
from aifactory.trace import token_sets_of

MAX_PROMPTS = 1000
_SETS = ("holdout", "target", "known")
_SHOWN_CHARS = 160
_SLOTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two."""

    name: str
    model: str
    scorecard: str
    trigger: str
    created_at: float
    corpora: Sequence[str]
    """What it and its ancestors were trained on."""
    execution: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Ids of what both have, and of what only one has."""

    both: Sequence[str]
    only_first: Sequence[str]
    only_second: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """Rows of one source that trained both releases, or only one."""

    both: int
    only_first: int
    only_second: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePair:
    """Bits per byte on a set of tasks; lower is better."""

    set: str
    first: Mapping[str, Any] | None
    """Estimate, interval, and number of tasks, by its own scorecard."""
    second: Mapping[str, Any] | None
    change: Mapping[str, Any] | None
    """Second minus first on the tasks that both scorecards have, pair by pair; none where they share none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPair:
    """What both say to a prompt, greedily."""

    prompt: str
    expected: str | None
    """What the held-out row says; none for a prompt of a file."""
    first: str | None
    second: str | None
    error: str | None = None
    """Why there is no answer: the prompt does not fit, or the chat template refuses it."""

    @property
    def is_equal(self) -> bool:
        return self.error is None and self.first == self.second


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseDiff:
    """All of it."""

    first: Side
    second: Side
    sources: Shared
    corpora: Shared
    batches: Shared
    rows: Mapping[str, RowCounts]
    """By source: rows that train, by their ids."""
    recipe: Mapping[str, tuple[Any, Any]]
    """Fields that differ, by their dotted names; null where one has no such field."""
    execution: Mapping[str, tuple[Any, Any]]
    """The same of the execution under which the models were trained; it bears no identity."""
    scores: Sequence[ScorePair]
    max_tokens: int
    answers: Sequence[AnswerPair]

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        plain["answers"] = [asdict(pair) | {"is_equal": pair.is_equal} for pair in self.answers]
        return plain

    def lines(self) -> list[str]:
        """The comparison as text."""
        first, second = self.first.name, self.second.name
        lines = [f"{first} ({self.first.model}) and {second} ({self.second.model})"]
        for name, shared in (("sources", self.sources), ("corpora", self.corpora), ("batches", self.batches)):
            parts = ((f"both: {_names(shared.both)}"), f"only {first}: {_names(shared.only_first)}")
            lines.append(f"  {name:<10} {'; '.join(parts)}; only {second}: {_names(shared.only_second)}")
        for source, rows in self.rows.items():
            lines.append(
                f"  rows       {source}: {rows.both:,} in both, {rows.only_first:,} only in {first}, {rows.only_second:,} only in "
                f"{second}"
            )
        for what, fields in (("recipe", self.recipe), ("execution", self.execution)):
            lines += [f"  {what:<10} {name}: {_value(a)} → {_value(b)}" for name, (a, b) in fields.items()]
            if not fields:
                lines.append(f"  {what:<10} the same")
        for pair in self.scores:
            change = ""
            if pair.change is not None:
                change = f", change {_interval(pair.change)} on {pair.change['num_examples']} tasks of both"
            lines.append(f"  {pair.set:<10} {_interval(pair.first)} → {_interval(pair.second)} bits per byte{change}")
        equal = sum(pair.is_equal for pair in self.answers)
        lines.append(
            f"Answers to {len(self.answers)} prompts, greedy, at most {self.max_tokens} tokens: {equal} are equal."
        )
        for answer in self.answers:
            lines += ["", f"  prompt      {_end(answer.prompt)}"]
            if answer.error is not None:
                lines.append(f"  no answer   {answer.error}")
                continue
            width = max(11, len(first), len(second))
            said = [("expected", answer.expected), (first, answer.first), (second, answer.second)]
            lines += [f"  {who:<{width}} {_begin(text)}" for who, text in said if text is not None]
        return lines


def diff_releases(
    books: Books,
    first: str,
    second: str,
    *,
    prompts: str | None,
    limit: int,
    max_tokens: int,
) -> ReleaseDiff:
    """Compare two releases.

    prompts      a file of prompts: JSON lines with `prompt` or `messages`, or a text with one in each line. None: tasks of the
                 rows that the second holds out
    limit        most prompts; 0 asks nothing, and loads no model
    max_tokens   of each answer
    Raises       ConfigError, StateError, StorageError.
    """
    if not 0 <= limit <= MAX_PROMPTS or max_tokens < 1:
        raise ConfigError(
            f"expected 0 to {MAX_PROMPTS} prompts and answers of at least one token, found {limit} and {max_tokens}."
        )
    asked = None if prompts is None else _read_prompts(Path(prompts), limit)
    releases = [books.registry.named(name) for name in (first, second)]
    models = [books.artifacts.get(Model, release.model) for release in releases]
    trained_on = [token_sets_of(books, release) for release in releases]
    corpora = [
        [books.artifacts.left_of(Corpus, tokens.record.inputs[0]) for tokens in token_sets] for token_sets in trained_on
    ]
    cards = [_scorecard(books, release) for release in releases]
    tasks = asked if asked is not None else _held_out(books, corpora[1], limit)
    recipes = [
        _recipe(model, token_sets, of, card)
        for model, token_sets, of, card in zip(models, trained_on, corpora, cards, strict=True)
    ]
    return ReleaseDiff(
        first=_side(releases[0], models[0], corpora[0]),
        second=_side(releases[1], models[1], corpora[1]),
        sources=_shared(*([name for corpus in of for name in corpus.figures["sources"]] for of in corpora)),
        corpora=_shared(*([corpus.id for corpus in of] for of in corpora)),
        batches=_shared(
            *([each for corpus in of for each in corpus.record.inputs if each.startswith("batch/")] for of in corpora)
        ),
        rows=_rows(books, *corpora),
        recipe=_differing(*recipes),
        execution=_differing(*(dict(_flat(model.record.execution)) for model in models)),
        scores=_scores(books, *cards),
        max_tokens=max_tokens,
        answers=_answers(books, models, tasks, max_tokens),
    )


def _side(release: Release, model: Model, corpora: Sequence[Corpus]) -> Side:
    return Side(
        name=release.name,
        model=release.model,
        scorecard=release.scorecard,
        trigger=release.trigger,
        created_at=release.created_at,
        corpora=[corpus.id for corpus in corpora],
        execution=model.record.execution,
    )


def _scorecard(books: Books, release: Release) -> Scorecard:
    return books.artifacts.left_of(Scorecard, release.scorecard)


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _shared(first: Sequence[str], second: Sequence[str]) -> Shared:
    return Shared(
        both=[each for each in dict.fromkeys(first) if each in second],
        only_first=[each for each in dict.fromkeys(first) if each not in second],
        only_second=[each for each in dict.fromkeys(second) if each not in first],
    )


def _rows(books: Books, first: Sequence[Corpus], second: Sequence[Corpus]) -> dict[str, RowCounts]:
    """Rows that train, by source; corpora that both have are counted, the others compared row by row."""
    names = {corpus.id for corpus in first} & {corpus.id for corpus in second}
    counts: dict[str, list[int]] = {}
    for corpus in first:
        if corpus.id in names:
            for table in _training_rows(books, corpus):
                for source, number in _counted(table["source"]):
                    counts.setdefault(source, [0, 0, 0])[0] += number
    own = [
        pa.concat_tables(
            [
                _EMPTY,
                *(table for corpus in of if corpus.id not in names for table in _training_rows(books, corpus)),
            ]
        )
        for of in (first, second)
    ]
    ids = [table["id"].combine_chunks() for table in own]
    for at, (table, others) in enumerate(zip(own, reversed(ids), strict=True)):
        in_both = pc.is_in(table["id"], value_set=others)
        for source, number in _counted(table["source"].filter(pc.invert(in_both))):
            counts.setdefault(source, [0, 0, 0])[1 + at] += number
        if at == 0:
            for source, number in _counted(table["source"].filter(in_both)):
                counts.setdefault(source, [0, 0, 0])[0] += number
    return {
        source: RowCounts(both=both, only_first=only_first, only_second=only_second)
        for source, (both, only_first, only_second) in sorted(counts.items())
    }


_EMPTY = pa.table({"id": pa.array([], pa.string()), "source": pa.array([], pa.string())})


def _training_rows(books: Books, corpus: Corpus) -> Iterator[pa.Table]:
    for _, table in read_corpus(books.storage, corpus, columns=["id", "source", "side"]):
        rows = table.filter(pc.equal(table["side"], "train")).select(["id", "source"])
        yield rows.cast(_EMPTY.schema)


def _counted(column: pa.ChunkedArray) -> Iterator[tuple[str, int]]:
    for each in pc.value_counts(column).to_pylist():
        yield each["values"], each["counts"]


# ── recipe ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _recipe(
    model: Model, token_sets: Sequence[TokenSet], corpora: Sequence[Corpus], scorecard: Scorecard
) -> dict[str, Any]:
    """What made the release, from the records of what it was made of, by dotted names."""
    made: dict[str, Any] = {"code": {}}
    ordered = [("train", model), ("tokenize", token_sets[0]), ("ingest", corpora[0]), ("evaluate", scorecard)]
    for name, artifact in reversed(ordered):
        recipe = dict(artifact.record.recipe)
        if name == "train":
            made |= {"train": recipe.pop("train", {}), "model": recipe}
        else:
            made[name] = recipe
        made["code"][name] = artifact.record.code_version
    if sources := made["ingest"].get("sources"):
        made["ingest"]["sources"] = {source["name"]: source for source in sources}
    return dict(_flat(made))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    found = [pair for key, each in items for pair in _flat(each, f"{prefix}.{key}" if prefix else str(key))]
    yield from found or ([(prefix, value)] if prefix else [])


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*first, *second])
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


# ── scores ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _scores(books: Books, first: Scorecard, second: Scorecard) -> list[ScorePair]:
    tables = [_examples(books, card) for card in (first, second)]
    recipe = second.record.recipe
    pairs = []
    for name in _SETS:
        found = [(card.figures.get(name) or {}).get("candidate") for card in (first, second)]
        if not any(found):
            continue
        bits = [{(row["row"], row["number"]): row for row in table if row["set"] == name} for table in tables]
        both = [task for task in bits[0] if task in bits[1]]
        change = None
        if both:
            change = ratio_interval(
                [bits[1][task]["candidate"] - bits[0][task]["candidate"] for task in both],
                [bits[0][task]["bytes"] for task in both],
                [bits[0][task]["cluster"] for task in both],
                confidence=recipe["confidence"],
                samples=recipe["bootstrap_samples"],
            ).to_json()
        pairs.append(ScorePair(set=name, first=found[0], second=found[1], change=change))
    return pairs


def _examples(books: Books, card: Scorecard) -> list[dict[str, Any]]:
    from aifactory.evaluate.evidence import EXAMPLES_FILE

    data = books.storage.read_bytes(card.kind, card.fingerprint[:16], EXAMPLES_FILE)
    if data is None:
        return []  # its figures are in the record, and are compared
    columns = ["set", "row", "number", "cluster", "bytes", "candidate"]
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data), columns=columns).to_pylist()
    return rows


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: str
    messages: str = ""
    expected: str | None = None


def _read_prompts(file: Path, limit: int) -> list[_Prompt]:
    """Prompts of a file, the first so many. Raises ConfigError naming the line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a file of prompts at {file}, found: {error}.") from error
    prompts: list[_Prompt] = []
    for number, line in enumerate(lines, start=1):
        if len(prompts) == limit:
            break
        if not line.strip():
            continue
        prompts.append(_Prompt(line) if file.suffix != ".jsonl" else _prompt_of(line, f"{file}:{number}"))
    if not prompts and limit:
        raise ConfigError(f"expected prompts in {file}, found none; write one in each line.")
    return prompts


def _prompt_of(line: str, where: str) -> _Prompt:
    try:
        told = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"expected JSON at {where}, found: {error}.") from error
    if isinstance(told, dict) and isinstance(told.get("prompt"), str):
        return _Prompt(told["prompt"])
    turns = told.get("messages") if isinstance(told, dict) else None
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        text = "\n".join(str(turn.get("content", "")) for turn in turns)
        return _Prompt(text, json.dumps(turns, ensure_ascii=False))
    raise ConfigError(
        f'expected an object with "prompt" (a text) or "messages" (turns) at {where}, found {line[:80]!r}.'
    )


def _held_out(books: Books, corpora: Sequence[Corpus], limit: int) -> list[_Prompt]:
    """Tasks of rows that are held out, cut as those on which a release is judged."""
    if not limit:
        return []
    from aifactory.evaluate.examples import tasks_of

    recipe = books.config.evaluate.model_copy(update={"max_tasks": limit})
    found = tasks_of(corpora[:1], "holdout", "holdout", recipe, books.storage, frozenset())
    return [_Prompt(each.task.asked, each.task.messages, each.task.answer) for each in found]


def _answers(books: Books, models: Sequence[Model], prompts: Sequence[_Prompt], max_tokens: int) -> list[AnswerPair]:
    """Each model is loaded, asked and let go before the next."""
    if not prompts:
        return []
    said = [_say(books, model, prompts, max_tokens) for model in models]
    pairs = []
    for prompt, first, second in zip(prompts, *said, strict=True):
        error = next((str(each) for each in (first, second) if isinstance(each, Exception)), None)
        texts = [None if error is not None else str(each) for each in (first, second)]
        pairs.append(
            AnswerPair(prompt=prompt.text, expected=prompt.expected, first=texts[0], second=texts[1], error=error)
        )
    return pairs


def _say(books: Books, model: Model, prompts: Sequence[_Prompt], max_tokens: int) -> list[str | BadRequestError]:
    """The greedy answer to each prompt, or why there is none."""
    import torch

    from aifactory.engine.engine import TorchEngine
    from aifactory.engine.protocol import Delta, GenerationRequest, Sampling
    from aifactory.text.documents import chat_prompt_tokens, prompt_tokens
    from aifactory.text.tokenizer import load_tokenizer

    folder = books.artifacts.fetch(model)
    tokenizer = load_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = TorchEngine.from_folder(folder, device=device, num_slots=_SLOTS, max_queued=len(prompts))
    texts: list[list[str]] = [[] for _ in prompts]
    errors: dict[int, BadRequestError] = {}
    ended = [threading.Event() for _ in prompts]

    def hear(at: int, delta: Delta) -> None:
        texts[at].append(delta.text)
        if delta.error is not None:
            errors[at] = BadRequestError(delta.error)
        if delta.finish_reason is not None:
            ended[at].set()

    try:
        for at, prompt in enumerate(prompts):
            try:
                ids = (
                    chat_prompt_tokens(
                        tokenizer, json.loads(prompt.messages), fallback=books.config.serve.chat_fallback
                    )
                    if prompt.messages
                    else prompt_tokens(tokenizer, prompt.text)
                )
                sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
                request = GenerationRequest(id=str(at), prompt_ids=tuple(ids), sampling=sampling)
                engine.submit(request, partial(hear, at))
            except BadRequestError as error:
                errors[at] = error
                ended[at].set()
        for each in ended:
            each.wait()
    finally:
        engine.close(0.0)
    return [errors.get(at) or "".join(parts) for at, parts in enumerate(texts)]


# ── as text ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"


def _interval(values: Mapping[str, Any] | None) -> str:
    return "none" if values is None else f"{values['estimate']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"


def _begin(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"


def _end(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARS else "…" + text[1 - _SHOWN_CHARS :]
