"""Shapes: from the columns of a source to rows: a text, a prompt and its answer, a conversation, a preference pair.

    prompt, answer both texts   prompt and text as they are
    a list of turns             the last turn is the answer and must be the assistant's: text; those before: messages
    a prompt that is a list     its turns come before those of the answer
    a pair                      both halves as above, over the same turns; text is the chosen one, rejected the other

`Shape.row` is what holds, row by row. `Shape.table` does the same for a whole table of Arrow, and leaves out each row
that is not plain: those go through `Shape.row`. A list of turns may also be JSON text, in `messages`.
The formats are those of the Hugging Face ecosystem: TRL's documentation, "Dataset formats and types" (standard and
conversational), and ShareGPT's `from` and `value`.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, pairwise

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.config.sources import Columns
from aifactory.ingest.blocks import Problem, Raw, describe_names, same_texts

Turns = list[tuple[str, str]]
"""Turns of a conversation: role and content."""


class BrokenText(bytes):
    """What a source calls a text, but is no UTF-8."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """What a table of N rows came to."""

    columns: dict[str, pa.Array]
    """Columns of RAW_SCHEMA for the plain rows; those that are missing are the same in every row."""
    origin: pa.Array | None
    """Where the plain rows say that they come from; "" for the file."""
    is_plain_N: npt.NDArray[np.bool_]
    """Which rows those are."""


class Shape:
    """How the columns of a source become rows."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._role, self._content = ("role", "content") if columns.turns == "openai" else ("from", "value")
        self._roles = {} if columns.turns == "openai" else {"human": "user", "gpt": "assistant"}

    # ── row by row ────────────────────────────────────────────────────────────────────────────────────────────────────

    def row(self, values: Mapping[str, object]) -> Raw | Problem:
        """One row from the values of its columns."""
        columns = self.columns
        found: dict[str, str | Turns] = {}
        for name in columns.required:
            if name not in values:
                return Problem("missing_column", 1.0, f"no {name!r} among {describe_names(list(values))}")
            value = self._spoken(values[name], name)
            if isinstance(value, Problem):
                return value
            found[name] = value
        prompt = found[columns.prompt] if columns.prompt is not None else None
        main = columns.messages or columns.chosen or columns.answer
        said = _put_together(prompt, found[main])
        if isinstance(said, Problem):
            return said
        rejected = ""
        if columns.rejected is not None:
            other = _put_together(prompt, found[columns.rejected])
            if isinstance(other, Problem):
                return other
            if other[:2] != said[:2]:
                return Problem("prompts_differ", 1.0, "what comes before the two answers differs")
            rejected = other[2]
        optional = self._optional(values)
        if isinstance(optional, Problem):
            return optional
        label, user, timestamp, origin, weight = optional
        before, asked, text = said[0], said[1], said[2]
        return Raw(asked, text, _json_of(before), rejected, label, user, timestamp, weight, origin)

    def _spoken(self, value: object, name: str) -> str | Turns | Problem:
        """A text or turns."""
        if name == self.columns.messages and isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return Problem("wrong_type", 1.0, f"expected turns in {name!r}, found a text that is no JSON")
            if isinstance(value, str):
                return Problem("wrong_type", 1.0, f"expected turns in {name!r}, found str")
        if isinstance(value, str):
            return value if _has_utf8(value) else Problem("invalid_utf8", 1.0, f"a lone surrogate in {name!r}")
        if isinstance(value, BrokenText):
            return Problem("invalid_utf8", 1.0, "a text that is no UTF-8")
        if not isinstance(value, list):
            return Problem("wrong_type", 1.0, f"expected text in {name!r}, found {type(value).__name__}")
        turns: Turns = []
        for number, turn in enumerate(value):
            role = turn.get(self._role) if isinstance(turn, dict) else None
            content = _joined(turn.get(self._content)) if isinstance(turn, dict) else None
            if not isinstance(role, str) or content is None:
                expected = f"{self._role} and {self._content} as texts in turn {number} of {name!r}"
                return Problem("wrong_type", 1.0, f"expected {expected}, found {_brief(turn)}")
            if not (_has_utf8(role) and _has_utf8(content)):
                return Problem("invalid_utf8", 1.0, f"a lone surrogate in turn {number} of {name!r}")
            turns.append((self._role_of(role), content))
        return turns

    def _role_of(self, role: str) -> str:
        return self._roles.get(role, role)

    def _optional(self, values: Mapping[str, object]) -> tuple[str, str, str, str, float] | Problem:
        columns = self.columns
        found: list[str] = []
        for name in (columns.label, columns.user, columns.timestamp, columns.origin):
            text = "" if name is None else _text_of(values.get(name), name)
            if isinstance(text, Problem):
                return text
            found.append(text)
        weight = 1.0 if columns.weight is None else _weight_of(values.get(columns.weight), columns.weight)
        if isinstance(weight, Problem):
            return weight
        return found[0], found[1], found[2], found[3], weight

    # ── a table at once ───────────────────────────────────────────────────────────────────────────────────────────────

    def table(self, table: pa.Table | pa.RecordBatch) -> Mapped:
        """The plain rows of a table that has every required column."""
        columns = self.columns
        is_plain_N = np.ones(table.num_rows, bool)
        arrays: dict[str, pa.Array] = {}
        spoken = {name: _one_array(table, name) for name in columns.required}
        if columns.messages is None and all(_is_text(array.type) for array in spoken.values()):
            asked = {"text": columns.chosen or columns.answer, "prompt": columns.prompt, "rejected": columns.rejected}
            for field, name in asked.items():
                if name is not None:
                    arrays[field] = _plain_texts(spoken[name], is_plain_N)
        elif columns.messages is not None:
            arrays |= self._messages(spoken[columns.messages], is_plain_N)
        else:
            arrays |= self._conversations(spoken, is_plain_N)
        origin = None
        for field in ("label", "user", "timestamp", "origin"):
            name = getattr(columns, field)
            if name is not None and name in table.schema.names:
                array = _optional_texts(_one_array(table, name), is_plain_N)
                if field == "origin":
                    origin = array
                else:
                    arrays[field] = array
        if columns.weight is not None and columns.weight in table.schema.names:
            arrays["weight"] = _weights(_one_array(table, columns.weight), is_plain_N)
        if not is_plain_N.all():
            mask = pa.array(is_plain_N)
            arrays = {field: array.filter(mask) for field, array in arrays.items()}
            origin = None if origin is None else origin.filter(mask)
        return Mapped(arrays, origin, is_plain_N)

    def _conversations(self, spoken: Mapping[str, pa.Array], is_plain_N: npt.NDArray[np.bool_]) -> dict[str, pa.Array]:
        columns = self.columns
        lists = {name: self._lists(array) for name, array in spoken.items()}
        main = lists[columns.chosen or columns.answer]
        prompts = lists[columns.prompt] if columns.prompt is not None else [None] * len(main)
        others = lists[columns.rejected] if columns.rejected is not None else None
        texts: list[list[str]] = [[], [], [], []]
        for i, answer in enumerate(main):
            said: Said | Problem = _ODD
            rejected = ""
            prompt = prompts[i]
            if answer is not None and (columns.prompt is None or prompt is not None):
                said = _put_together(prompt, answer)
            if others is not None and not isinstance(said, Problem):
                half = others[i]
                other = _ODD if half is None else _put_together(prompt, half)
                if isinstance(other, Problem) or other[:2] != said[:2]:
                    said = _ODD
                else:
                    rejected = other[2]
            if isinstance(said, Problem):
                is_plain_N[i] = False
                row = ("", "", "", "")
            else:
                row = (said[1], said[2], _json_of(said[0]), rejected)
            for column, value in zip(texts, row, strict=True):
                column.append(value)
        names = ("prompt", "text", "messages", "rejected")
        return {name: pa.array(column, pa.string()) for name, column in zip(names, texts, strict=True)}

    def _messages(self, array: pa.Array, is_plain_N: npt.NDArray[np.bool_]) -> dict[str, pa.Array]:
        """As `_conversations`, where nothing but a list of turns is read: the answers stay in Arrow."""
        turns = self._flat_turns(array)
        if turns is None:
            is_plain_N[:] = False
            turns = _FlatTurns.of_nothing(len(array))
        starts_N, stops_N = turns.bounds_N1[:-1], turns.bounds_N1[1:]
        roles = turns.roles
        last = [roles[stop - 1] if stop > start else None for start, stop in turns.spans()]
        ends_well_N = np.array([role == "assistant" for role in last], bool)
        odd_before_N1 = np.concatenate(([0], np.cumsum(turns.is_odd_T)))
        is_plain_N &= turns.is_list_N & ends_well_N & (odd_before_N1[stops_N] == odd_before_N1[starts_N])
        if not len(roles):
            return {"text": same_texts("", len(array))}
        answers = turns.contents.take(pa.array(np.maximum(stops_N - 1, 0)))
        is_before_T = np.zeros(len(roles), bool)
        is_before_T[_within(starts_N[is_plain_N], stops_N[is_plain_N] - 1)] = True
        bounds_N1 = np.concatenate(([0], np.cumsum(is_before_T)))[turns.bounds_N1]
        before = [
            {"content": content, "role": role}
            for content, role in zip(
                turns.contents.filter(pa.array(is_before_T)).to_pylist(),
                compress(roles, is_before_T.tolist()),
                strict=True,
            )
        ]
        said = [
            orjson.dumps(before[start:stop]) if stop > start else b"" for start, stop in pairwise(bounds_N1.tolist())
        ]
        return {"text": _plain_texts(answers, np.ones(len(array), bool)), "messages": pa.array(said, pa.string())}

    def _lists(self, array: pa.Array) -> Sequence[str | Turns | None]:
        """The value of each row, None where it is not plain."""
        if _is_text(array.type):
            try:
                texts: list[str | None] = array.to_pylist()
            except UnicodeDecodeError:
                return [None] * len(array)
            return texts
        turns = self._flat_turns(array)
        if turns is None:
            return [None] * len(array)
        contents, is_odd = turns.contents.to_pylist(), turns.is_odd_T.tolist()
        return [
            list(zip(turns.roles[start:stop], contents[start:stop], strict=True))
            if is_list and not any(is_odd[start:stop])
            else None
            for (start, stop), is_list in zip(turns.spans(), turns.is_list_N.tolist(), strict=True)
        ]

    def _flat_turns(self, array: pa.Array) -> _FlatTurns | None:
        """The turns of all rows; None where the column does not hold plain turns."""
        kind = array.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
            return None
        bounds_N1 = array.offsets.to_numpy().astype(np.int64)
        turns = array.values.slice(bounds_N1[0], bounds_N1[-1] - bounds_N1[0])
        if not all(
            turns.type.get_field_index(name) >= 0 and _is_text(turns.type.field(name).type)
            for name in (self._role, self._content)
        ):
            return None
        roles, contents = turns.field(self._role).cast(pa.large_string()), turns.field(self._content)
        if _broken_texts(roles) is not None or _broken_texts(contents) is not None:
            return None
        is_whole = pc.and_(turns.is_valid(), pc.and_(roles.is_valid(), contents.is_valid()))
        return _FlatTurns(
            roles=[self._role_of(role) for role in roles.fill_null("").to_pylist()],
            contents=contents,
            bounds_N1=bounds_N1 - bounds_N1[0],
            is_odd_T=~is_whole.to_numpy(zero_copy_only=False),
            is_list_N=array.is_valid().to_numpy(zero_copy_only=False),
        )


@dataclass(frozen=True, slots=True)
class _FlatTurns:
    """The turns of N rows, T in all."""

    roles: list[str]
    contents: pa.Array
    bounds_N1: npt.NDArray[np.int64]
    is_odd_T: npt.NDArray[np.bool_]
    """Turns without a role or a content."""
    is_list_N: npt.NDArray[np.bool_]

    @classmethod
    def of_nothing(cls, count: int) -> _FlatTurns:
        return cls(
            [], pa.array([], pa.string()), np.zeros(count + 1, np.int64), np.zeros(0, bool), np.zeros(count, bool)
        )

    def spans(self) -> list[tuple[int, int]]:
        bounds = self.bounds_N1.tolist()
        return list(pairwise(bounds))


# ── conversations ─────────────────────────────────────────────────────────────────────────────────────────────────────

Said = tuple[Turns, str, str]
"""The turns before, the prompt where it is a text, the answer."""
_ODD = Problem("", 0.0, "")


def _put_together(prompt: str | Turns | None, answer: str | Turns) -> Said | Problem:
    """What was asked and what was answered, each a text or turns."""
    if isinstance(answer, str):
        return (prompt, "", answer) if isinstance(prompt, list) else ([], prompt or "", answer)
    if not answer or answer[-1][0] != "assistant":
        found = f"the last one of {answer[-1][0]!r}" if answer else "none"
        return Problem("no_answer", 1.0, f"expected turns that end with the assistant's, found {found}")
    before, text = answer[:-1], answer[-1][1]
    if isinstance(prompt, list):
        return prompt + before, "", text
    if prompt is None or any(content == prompt for _, content in before):
        return before, "", text
    return ([("user", prompt), *before], "", text) if before else ([], prompt, text)


def _json_of(turns: Turns) -> str:
    """Turns as canonical JSON; "" where there are none."""
    if not turns:
        return ""
    return orjson.dumps([{"content": content, "role": role} for role, content in turns]).decode()


def _joined(content: object) -> str | None:
    """The text of a turn, which may be in parts; None where not all of them are text."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        return "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
    return content if isinstance(content, str) else None


# ── values ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _text_of(value: object, name: str) -> str | Problem:
    """A label, a user, a time, as text."""
    match value:
        case None:
            return ""
        case str():
            return value if _has_utf8(value) else Problem("invalid_utf8", 1.0, f"a lone surrogate in {name!r}")
        case bool():
            return "true" if value else "false"
        case float():
            return "" if math.isnan(value) else repr(value)
        case int() | decimal.Decimal() | uuid.UUID():
            return str(value)
        case datetime.date() | datetime.time():
            return value.isoformat()
        case BrokenText():
            return Problem("invalid_utf8", 1.0, "a text that is no UTF-8")
        case _:
            return Problem("wrong_type", 1.0, f"expected one value in {name!r}, found {type(value).__name__}")


def _weight_of(value: object, name: str) -> float | Problem:
    """A weight: 1 where there is none."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return 1.0
    number = math.nan
    if isinstance(value, int | float | decimal.Decimal | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if math.isfinite(number) and number >= 0:
        return number + 0.0  # no negative zero
    return Problem("wrong_type", 1.0, f"expected a weight of at least 0 in {name!r}, found {_brief(value)}")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


# ── columns ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _one_array(table: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    """A column as one array without a dictionary."""
    column = table.column(name)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(column, pa.ChunkedArray):  # more text than one array of 32-bit offsets holds
        column = pa.concat_arrays([chunk.cast(pa.large_string()) for chunk in column.chunks])
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _within(starts_N: npt.NDArray[np.int64], stops_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The numbers within N spans that do not overlap and are in order."""
    lengths_N = stops_N - starts_N
    return np.repeat(starts_N - np.cumsum(lengths_N) + lengths_N, lengths_N) + np.arange(lengths_N.sum())


def _plain_texts(array: pa.Array, is_plain_N: npt.NDArray[np.bool_]) -> pa.Array:
    """Texts without null; what is null or no UTF-8 is not plain."""
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.string())
    if array.null_count:
        is_plain_N &= array.is_valid().to_numpy(zero_copy_only=False)
        array = array.fill_null("")
    broken = _broken_texts(array)
    if broken is not None:
        is_plain_N &= ~broken
        array = pc.if_else(pa.array(broken), "", array.cast(pa.large_binary())).cast(pa.large_string())
    return array.cast(pa.string())


def _broken_texts(array: pa.Array) -> npt.NDArray[np.bool_] | None:
    """Which texts are no UTF-8; None where all are."""
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return np.array([not _decodes(data) for data in array.cast(pa.large_binary()).to_pylist()], bool)
    return None


def _decodes(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _optional_texts(array: pa.Array, is_plain_N: npt.NDArray[np.bool_]) -> pa.Array:
    """As `_text_of`, for a column."""
    kind = array.type
    if _is_text(kind):
        is_missing_N = ~array.is_valid().to_numpy(zero_copy_only=False)
        is_text_N = np.ones(len(array), bool)
        texts_N = _plain_texts(array, is_text_N)
        is_plain_N &= is_text_N | is_missing_N
        return texts_N
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return array.cast(pa.string()).fill_null("")
    texts = [_text_of(value, "") for value in _python_values(array)]
    is_plain_N &= np.array([not isinstance(text, Problem) for text in texts], bool)
    return pa.array(["" if isinstance(text, Problem) else text for text in texts], pa.string())


def _python_values(array: pa.Array) -> list[object]:
    kind = array.type
    if pa.types.is_timestamp(kind):  # Python's times end at microseconds
        array = array.cast(pa.timestamp("us", kind.tz), safe=False)
    elif pa.types.is_time64(kind):
        array = array.cast(pa.time64("us"), safe=False)
    try:
        values: list[object] = array.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):  # a time that Python has none for
        return [object()] * len(array)
    return values


def _weights(array: pa.Array, is_plain_N: npt.NDArray[np.bool_]) -> pa.Array:
    """As `_weight_of`, for a column."""
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        weights_N = array.cast(pa.float64(), safe=False).fill_null(math.nan).to_numpy(zero_copy_only=False)
        weights_N = np.where(np.isnan(weights_N), 1.0, weights_N) + 0.0
        is_plain_N &= np.isfinite(weights_N) & (weights_N >= 0)
        return pa.array(weights_N)
    weights = [_weight_of(value, "") for value in _python_values(array)]
    is_plain_N &= np.array([not isinstance(weight, Problem) for weight in weights], bool)
    return pa.array([1.0 if isinstance(weight, Problem) else weight for weight in weights], pa.float64())
