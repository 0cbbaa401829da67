"""Encoder: a column of texts -> token ids, flat, as fast as the libraries that are installed allow.

Legend   D texts, N tokens of all of them.
Laws     the ids are those of `TextTokenizer.encode`, whichever library finds them; so text is text here too: a
         special-token string inside it never becomes the control token.
Sources  Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", section 3.2 (byte pair
         encoding); Unicode Standard Annex 44 (general categories).

gigatoken is a beta and dozens of times faster than tokenizers, so it is taken only where it shows, each time that it is
opened, that it gives the same tokens on texts which are hard for a tokenizer. Two things are kept from it: special tokens,
and characters so new that two libraries, built against different versions of Unicode, may split or normalise them
differently. A text with such a character is encoded by tokenizers.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.text.buffers import text_buffers
from aifactory.text.shards import integer_type
from aifactory.text.tokenizer import TextTokenizer

Encoded = tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64]]
"""ids_N (uint16 where the vocabulary allows it, else uint32) and offsets_D1: text i is ids_N[offsets_D1[i] : offsets_D1[i + 1]]."""

_Part = tuple[Any, npt.NDArray[np.int64]]
"""The ids of some texts end to end, and how many each has."""

_CALL_BYTES = 4_000_000
"""Text given to a library at once; its own buffers are a few times that."""
_CACHE_BYTES = 128_000_000
"""Text after which gigatoken is opened anew: it remembers the tokens of every word that it meets, without a bound."""
_NEWEST_UNICODE = (16, 0)
"""The newest Unicode of Python under which both libraries were compared, character by character."""


class Encoder(Protocol):
    """Encodes texts. Thread-safe; works in the thread that calls it, without the interpreter's lock where it can."""

    library: str
    """Which library finds the tokens."""
    reason: str
    """Why not all of it goes through the faster library; "" where it does."""

    def encode_texts(self, texts: pa.Array) -> Encoded:
        """The ids of texts (string or large_string, without nulls)."""
        ...


class TokenizersEncoder:
    """Encodes by the tokenizers library."""

    library = "tokenizers"

    def __init__(self, tokenizer: TextTokenizer, *, reason: str = "") -> None:
        self._tokenizer = tokenizer
        self.reason = reason

    def encode_texts(self, texts: pa.Array) -> Encoded:
        kind = integer_type(self._tokenizer.vocab_size)
        some = _batches(texts, _CALL_BYTES // 4)
        return _join([_encode_by_tokenizers(self._tokenizer, batch, kind) for batch in some], kind)


class GigatokenEncoder:
    """Encodes by gigatoken, and by the tokenizer itself where gigatoken may not be trusted."""

    library = "gigatoken"

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Raises   ImportError without gigatoken; ValueError where it can't read the tokenizer."""
        import awkward  # type: ignore[import-untyped]
        from gigatoken.gigatoken_rs import load_hf_json

        self.reason = ""
        self._awkward = awkward
        self._load = load_hf_json
        self._tokenizer = tokenizer
        self._control_ids = np.array(sorted(tokenizer.control_ids), np.uint32)
        description = json.loads(tokenizer.tokenizer_json)
        # A special token that it doesn't know of can't be found in a text.
        added = description.get("added_tokens") or []
        self.added_tokens = [str(token["content"]) for token in added]
        description["added_tokens"] = [token for token in added if not token.get("special")]
        self._is_normalised = description.get("normalizer") is not None
        self._json = json.dumps(description, ensure_ascii=False).encode()
        self._opened = self._open()
        self._bytes_seen = 0

    def encode_texts(self, texts: pa.Array) -> Encoded:
        kind = integer_type(self._tokenizer.vocab_size)
        return _join([self._encode(some, kind) for some in _batches(texts, _CALL_BYTES)], kind)

    def _encode(self, texts: pa.Array, kind: type[np.unsignedinteger]) -> _Part:
        data, offsets = text_buffers(texts)
        if self._bytes_seen > _CACHE_BYTES:
            self._opened, self._bytes_seen = self._open(), 0
        self._bytes_seen += int(offsets[-1] - offsets[0])
        contents = self._awkward.contents
        strings = contents.ListOffsetArray(
            self._awkward.index.Index64(offsets),
            contents.NumpyArray(data, parameters={"__array__": "char"}),
            parameters={"__array__": "string"},
        )
        try:
            # On this thread alone: how many texts are encoded at once is for whoever starts the tasks to say.
            found = _guarded(self._opened.encode_batch, self._awkward.Array(strings), parallel=False).layout
        except ValueError as error:
            self.reason = f"gigatoken can't encode every text: {error}"
            self._opened = self._open()
            return _encode_by_tokenizers(self._tokenizer, texts, kind)
        ids = np.asarray(found.content.data)
        ends = np.asarray(found.offsets.data, np.int64)
        doubtful = _texts_with_doubtful_characters(data, offsets, is_normalised=self._is_normalised)
        again = np.union1d(doubtful, self._texts_with_control_ids(ids, ends))
        ids, lengths = ids.astype(kind), np.diff(ends)
        if len(again):
            pieces = np.split(ids, ends[1:-1])
            for i in again.tolist():
                pieces[i] = np.array(self._tokenizer.encode(texts[i].as_py()), kind)
                lengths[i] = len(pieces[i])
            ids = np.concatenate(pieces)
        return ids, lengths

    def _texts_with_control_ids(
        self, ids: npt.NDArray[np.uint32], ends: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        # Vocabularies in which a control string is an ordinary piece too give it to text; the tokenizer knows how not to.
        if not len(self._control_ids):
            return np.zeros(0, np.int64)
        low, high = self._control_ids[0], self._control_ids[-1]
        places = np.flatnonzero(ids - low <= high - low)  # unsigned: what is below `low` wraps around
        places = places[np.isin(ids[places], self._control_ids)]
        return np.searchsorted(ends, places, side="right") - 1

    def _open(self) -> Any:
        return _guarded(self._load, self._json)


def _guarded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function of gigatoken returns. Raises ValueError for all that it raises: a panic in it is no Exception."""
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _encode_by_tokenizers(tokenizer: TextTokenizer, texts: pa.Array, kind: type[np.unsignedinteger]) -> _Part:
    rows = tokenizer.encode_batch(texts.to_pylist())
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), kind, int(lengths.sum())), lengths


def open_encoder(tokenizer: TextTokenizer) -> Encoder:
    """The fastest encoder that gives the tokenizer's own tokens; its `reason` says why, where that is not gigatoken."""
    if tuple(map(int, unicodedata.unidata_version.split(".")[:2])) > _NEWEST_UNICODE:
        return TokenizersEncoder(
            tokenizer, reason=f"gigatoken was not compared under Unicode {unicodedata.unidata_version} of this Python"
        )
    try:
        encoder = GigatokenEncoder(tokenizer)
    except ImportError as error:
        return TokenizersEncoder(tokenizer, reason=f"gigatoken is not installed: {error}")
    except ValueError as error:
        return TokenizersEncoder(tokenizer, reason=f"gigatoken can't read this tokenizer: {error}")
    difference = _first_difference(encoder, tokenizer, hard_texts(encoder.added_tokens)) or encoder.reason
    return TokenizersEncoder(tokenizer, reason=difference) if difference else encoder


def _first_difference(encoder: Encoder, tokenizer: TextTokenizer, texts: Sequence[str]) -> str:
    """The first text for which an encoder's tokens are not the tokenizer's own; "" where there is none."""
    ids, ends = encoder.encode_texts(pa.array(texts, pa.string()))
    for text, found, expected in zip(texts, np.split(ids, ends[1:-1]), tokenizer.encode_batch(texts), strict=True):
        if found.tolist() != expected:
            return f"{encoder.library} gives other tokens for {ascii(text)[:120]}"
    return ""


def hard_texts(tokens: Sequence[str]) -> list[str]:
    """Texts on which tokenizers differ, the same each time, with these tokens as strings in them."""
    rng = random.Random(0)
    ranges = (range(0x180), range(0x180, 0x3400, 11), range(0xA000, 0xFFFE, 97), range(0x10000, 0x1FBFF, 61))
    known = [c for c in map(chr, chain(*ranges)) if unicodedata.category(c) not in ("Cn", "Cs")] + list(_SIGNS)
    words = [*_WORDS, *_SPACES, *tokens]
    texts = ["", *words]
    # Each character between a letter, a digit, a sign and a space, where the class that it is given shows.
    texts += ["".join(f"a{c}1{c}!{c} {c}" for c in known[at : at + 32]) for at in range(0, len(known), 64)]
    texts += ["".join(known[at : at + 64]) for at in range(0, len(known), 64)]
    texts += [f"a{space * number}{end}" for space in _SPACES for number in (1, 2, 40) for end in ("", "b", "1", "!")]
    # Words of any length, in which merges compete for a while.
    texts += [letters * (900 // len(letters)) for letters in ("a", "ab", "0123456789", "日本", "=-", "\n ", "e\u0301")]
    texts += ["".join(rng.choices("abcdeinrst", k=number)) for number in (15, 16, 17, 63, 64, 65, 255, 256, 257, 1500)]
    texts += [f"{before}{token}{after}" for token in tokens for before in ("", "a", " ") for after in ("b", " ", token)]
    for letters, number in ((words, 150), (known, 20), ([chr(code) for code in range(128)], 40), (_SPACES, 10)):
        texts += ["".join(rng.choices(letters, k=rng.randrange(1, 30))) for _ in range(number)]
    return texts


# Contractions, digits, what normalisation and joining change, and what other vocabularies write for bytes and spaces.
# fmt: off
_WORDS = [
    "don't", "I'LL", "we've", "'s", "'S", "x'd", "’s", "0", "12", "1234567890", "3.14", "1,000", "٣٤", "Ⅻ", "²", "½", "Straße",
    "e\u0301", "\u0301", "ก็", "नि", "한", "\u1112\u1161\u11ab", "ﬁ", "ſ", "\u212a", "İ", "\u200b", "\u200d", "\ufeff", "\ufe0f",
    "👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "👍🏽", "🇩🇪", "1\ufe0f\u20e3", "日本語", "中文。", "…", "--", "==", "!?", "\0", "\ufffd",
    "def f(x):", "a_b", "CamelCase", "https://a.b/c?d=e", "<0x0A>", "▁", "Ġ", "Ċ", "##a", "</s>", "the", "of",
]
_SPACES = [
    "\t", "\n", "\r", "\r\n", "\v", "\f", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u2029", "\u3000", " ", "  "
]
# fmt: on
_SIGNS = "一龥가힣\U00020000\U0002a6df\ue000\U000f0000\U0010fffd\U000e0041\u200b\u2028\u2029\u2160\u01c5\u0488"


# ── flat arrays ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _batches(texts: pa.Array, num_bytes: int) -> list[pa.Array]:
    """Consecutive slices of about so many bytes, none of them empty."""
    _, offsets = text_buffers(texts)
    marks = np.arange(offsets[0] + num_bytes, offsets[-1], num_bytes)
    cuts = np.unique([0, *np.searchsorted(offsets, marks).tolist(), len(texts)])
    return [texts.slice(start, end - start) for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)]


def _join(parts: list[_Part], kind: type[np.unsignedinteger]) -> Encoded:
    """One pair of flat arrays from the ids and lengths of several."""
    ids = parts[0][0] if len(parts) == 1 else np.concatenate([np.zeros(0, kind), *(ids for ids, _ in parts)])
    lengths = [np.zeros(1, np.int64), *(lengths for _, lengths in parts)]
    return ids, np.cumsum(np.concatenate(lengths))


@lru_cache(maxsize=2)
def _doubtful_characters(is_normalised: bool) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """For each code point whether libraries may take it for different things, and for each two bytes whether one of the
    characters that begin with them in UTF-8 is such a one.

    Those are the characters that this Python's Unicode doesn't know, and for a tokenizer that normalises those, too, which
    came after Unicode 3.2 and are changed by that: what was there before has been normalised alike ever since.
    """
    doubtful = np.ones(0x110000, np.bool_)
    # Beyond the first two ranges there is nothing (yet); planes 15 and 16 are for private use for ever.
    for codes in (range(0x31400), range(0xE0000, 0xE0200)):
        categories = map(unicodedata.category, map(chr, codes))
        doubtful[codes.start : codes.stop] = np.fromiter(map("Cn".__eq__, categories), np.bool_, len(codes))
    doubtful[0xF0000:] = False
    for character in map(chr, range(0x20000)) if is_normalised else ():
        made_of = unicodedata.decomposition(character)
        is_changed = bool(made_of) or unicodedata.combining(character) > 0
        if is_changed and unicodedata.ucd_3_2_0.category(character) == "Cn":
            doubtful[[ord(character), *(int(code, 16) for code in made_of.split() if code[0] != "<")]] = True
    begins = np.zeros(1 << 16, np.bool_)
    for lead, bits, low, high in ((0xC0, 0, 0x80, 0x800), (0xE0, 6, 0x800, 0x10000), (0xF0, 12, 0x10000, 0x110000)):
        blocks = np.arange(low >> bits, high >> bits)  # the code points that have two bytes in common
        pairs = (lead | blocks >> 6) << 8 | 0x80 | blocks & 0x3F
        begins[pairs] = doubtful[low:high].reshape(len(blocks), -1).any(axis=1)
    return doubtful, begins


def _texts_with_doubtful_characters(
    data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], *, is_normalised: bool
) -> npt.NDArray[np.int64]:
    """Which texts hold a character that libraries may take for different things."""
    start, end = int(offsets[0]), int(offsets[-1])
    places = start + np.flatnonzero(data[start:end] >= 0xC2)  # where a character of several bytes begins
    if not len(places):
        return np.zeros(0, np.int64)
    doubtful, begins = _doubtful_characters(is_normalised)
    places = places[begins[data[places].astype(np.uint16) << 8 | data[places + 1]]]
    byte = [data[np.minimum(places + i, end - 1)].astype(np.int64) & 0x3F for i in range(4)]
    lead = data[places].astype(np.int64)
    codes = np.where(
        lead < 0xE0,
        (lead & 0x1F) << 6 | byte[1],
        np.where(
            lead < 0xF0,
            (lead & 0x0F) << 12 | byte[1] << 6 | byte[2],
            (lead & 0x07) << 18 | byte[1] << 12 | byte[2] << 6 | byte[3],
        ),
    )
    return np.unique(np.searchsorted(offsets, places[doubtful[codes]], side="right") - 1)
