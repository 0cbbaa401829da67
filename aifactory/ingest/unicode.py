"""Unicode: texts repaired and brought to one normal form.

Law      Each text becomes what `repair_text` makes of it, which is `ftfy.fix_text` with the fixes below, or
         `unicodedata.normalize` where no fix is on. Whole columns are looked at first, so that only the few rows that
         ftfy may change ever become Python strings in its hands.
Fixes    mojibake    text decoded in a wrong encoding, and C1 controls (ftfy's fix_encoding and fix_c1_controls)
         line_ends   CR LF, CR, U+2028, U+2029 and U+0085 become LF (fix_line_breaks)
         controls    control characters without an effect, byte order marks and terminal escapes are removed
                     (remove_control_chars, remove_terminal_escapes); tab, LF and form feed stay
         entities    `&eacute;` becomes é, line by line up to the first with a `<` in it (unescape_html="auto")
         Never on: straight quotes for curly ones, ligatures taken apart, full width to half width. They change text
         that isn't broken; the last two are what the form "nfkc" is for.
Forms    none, nfc, nfkc (Unicode Standard Annex 15) of this Python's Unicode version (`unicodedata.unidata_version`).

Which rows can't change. ASCII is its own normal form and no mojibake. A text that ftfy's `is_bad` finds nothing in, in
none of its lines, has no mojibake for it either; `is_bad` is a regular expression, and RE2 runs one over the column
that matches wherever that one does. The other fixes are sets of characters, and entities a regular expression again.
A normal form is asked for of every text that isn't ASCII; if that changes the text, it is looked at again.

Legend   N texts.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aifactory.text.buffers import text_array, text_buffers

if TYPE_CHECKING:
    from ftfy import TextFixerConfig

Form = Literal["none", "nfc", "nfkc"]
Bools = npt.NDArray[np.bool_]

_FORMS: dict[Form, Literal["NFC", "NFKC"] | None] = {"none": None, "nfc": "NFC", "nfkc": "NFKC"}
_WIDE_LINE_ENDS = r"[\x{85}\x{2028}\x{2029}]"
_NOT_ASCII = r"[^\x00-\x7f]"
# All before U+0300, and the dashes, quotes and dots of General Punctuation, are their own NFC and no mark to what comes
# before them, in every version of Unicode.
_NOT_SURELY_NFC = r"[^\x00-\x{2ff}\x{2002}-\x{2027}]"
# The work arrays of so many bytes stay in the cache.
_PIECE_BYTES = 1 << 18
# ftfy cuts lines that are longer than this many characters, and fixes the parts.
_LONGEST_LINE = 1_000_000


@dataclass(frozen=True, slots=True)
class Fixes:
    """What is repaired; the module's docstring says what each is."""

    form: Form = "nfc"
    mojibake: bool = True
    line_ends: bool = True
    controls: bool = True
    entities: bool = False

    @property
    def by_ftfy(self) -> bool:
        return self.mojibake or self.line_ends or self.controls or self.entities


@dataclass(frozen=True, slots=True)
class Repaired:
    """N texts, repaired."""

    texts: pa.Array
    changed_N: Bools
    figures: dict[str, int]
    """They add up over blocks: rows; rows_changed; rows_mended, those of them that ftfy changed (mojibake, controls,
    entities; the others got line ends or their normal form alone); rows_looked_at, those that ftfy was asked about;
    bytes_in and bytes_out."""


def repair_text(text: str, fixes: Fixes) -> str:
    """One text, repaired: the definition of what `repair` does to a column."""
    if fixes.by_ftfy:
        import ftfy

        return ftfy.fix_text(text, _config(fixes))
    form = _FORMS[fixes.form]
    return text if form is None else unicodedata.normalize(form, text)


def repair(texts: pa.Array, fixes: Fixes) -> Repaired:
    """The texts, repaired."""
    wide_N = ~_bools(pc.string_is_ascii(texts))
    suspect_N, breaks_N = _look(texts, wide_N, fixes)
    changed_N = np.zeros(len(texts), np.bool_)
    done = texts

    rows_N = breaks_N & ~suspect_N
    if rows_N.any():
        done = pc.replace_with_mask(done, pa.array(rows_N), _unix_line_ends(done.filter(pa.array(rows_N))))
        changed_N |= rows_N

    form = _FORMS[fixes.form]
    rows_N = wide_N & ~suspect_N
    if form is not None and rows_N.any():
        rows = np.flatnonzero(rows_N)
        if form == "NFC":
            rows = rows[_matches(done.filter(pa.array(rows_N)), _NOT_SURELY_NFC)]
        found: dict[int, str] = {}
        for row, text in zip(rows.tolist(), done.take(pa.array(rows)).to_pylist(), strict=True):
            formed_text = unicodedata.normalize(form, text)
            if formed_text != text:
                found[row] = formed_text
        if found:
            rows = np.fromiter(found, np.int64, len(found))
            formed = pa.array(found.values(), texts.type)
            again_F, _ = _look(formed, ~_bools(pc.string_is_ascii(formed)), fixes)
            if fixes.by_ftfy:
                again_F |= pc.binary_length(formed).to_numpy(zero_copy_only=False) > _LONGEST_LINE
            suspect_N[rows[again_F]] = True
            rows_N = np.zeros(len(texts), np.bool_)
            rows_N[rows[~again_F]] = True
            done = pc.replace_with_mask(done, pa.array(rows_N), formed.filter(pa.array(~again_F)))
            changed_N |= rows_N

    mended = 0
    if suspect_N.any():
        before = texts.filter(pa.array(suspect_N)).to_pylist()
        after = [repair_text(text, fixes) for text in before]
        done = pc.replace_with_mask(done, pa.array(suspect_N), pa.array(after, texts.type))
        changed_N[suspect_N] = [old != new for old, new in zip(before, after, strict=True)]
        mended = int(changed_N[suspect_N].sum())
    return Repaired(
        texts=done,
        changed_N=changed_N,
        figures={
            "rows": len(texts),
            "rows_changed": int(changed_N.sum()),
            "rows_mended": mended,
            "rows_looked_at": int(suspect_N.sum()),
            "bytes_in": pc.sum(pc.binary_length(texts)).as_py() or 0,
            "bytes_out": pc.sum(pc.binary_length(done)).as_py() or 0,
        },
    )


# ── which rows may change ─────────────────────────────────────────────────────────────────────────────────────────────


def _look(texts: pa.Array, wide_N: Bools, fixes: Fixes) -> tuple[Bools, Bools]:
    """Which texts ftfy may do more to than line ends, and which have line ends that are changed."""
    suspect_N = np.zeros(len(texts), np.bool_)
    breaks_N = np.zeros(len(texts), np.bool_)
    controls = _controls() if fixes.controls else ()
    if fixes.line_ends or fixes.controls:
        of_interest = np.zeros(256, np.bool_)
        of_interest[[c for c in controls if c < 0x80]] = True
        of_interest[0x0D] |= fixes.line_ends
        place_P, byte_P, offsets_N1 = _control_bytes(texts, of_interest)
        breaks_N = _have_any(place_P[byte_P == 0x0D], offsets_N1)
        suspect_N = _have_any(place_P[byte_P != 0x0D], offsets_N1)
    if fixes.entities:
        from ftfy.chardata import HTML_ENTITY_RE

        suspect_N |= _matches(texts, HTML_ENTITY_RE.pattern)

    patterns = [_badness()] if fixes.mojibake else []
    if wide := [c for c in controls if c >= 0x80]:
        patterns.append("[" + "".join(rf"\x{{{c:x}}}" for c in wide) + "]")
    line_ends = [_WIDE_LINE_ENDS] if fixes.line_ends else []
    if wide_N.any() and patterns + line_ends:
        # One pass over all, and what it was that matched is asked of the few rows where anything did.
        rows = np.flatnonzero(wide_N)
        rows = rows[_matches(texts.filter(pa.array(wide_N)), "|".join(patterns + line_ends))]
        some = texts.take(pa.array(rows))
        if patterns:
            suspect_N[rows] |= _matches(some, "|".join(patterns))
        if line_ends:
            breaks_N[rows] |= _matches(some, _WIDE_LINE_ENDS)
    return suspect_N, breaks_N


def _control_bytes(
    texts: pa.Array, of_interest: Bools
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Where the control bytes of interest are, counted from the first text's beginning, which, and the offsets from there."""
    data_B, offsets_N1 = text_buffers(texts)
    data_B = data_B[offsets_N1[0] : offsets_N1[-1]]
    places = [np.zeros(0, np.int64)]
    for start in range(0, len(data_B), _PIECE_BYTES):
        piece = data_B[start : start + _PIECE_BYTES]
        place = np.flatnonzero((piece < 0x20) | (piece == 0x7F))
        places.append(place[of_interest[piece[place]]] + start)
    place_P = np.concatenate(places)
    return place_P, data_B[place_P], offsets_N1 - offsets_N1[0]


def _have_any(place_P: npt.NDArray[np.int64], offsets_N1: npt.NDArray[np.int64]) -> Bools:
    """Which rows one of the places or more lies in."""
    return np.diff(np.searchsorted(place_P, offsets_N1)) > 0


def _unix_line_ends(texts: pa.Array) -> pa.Array:
    """The texts with LF for every other line end."""
    data_B, offsets_N1 = text_buffers(texts)
    data_B = data_B[offsets_N1[0] : offsets_N1[-1]].copy()
    offsets_N1 = offsets_N1 - offsets_N1[0]
    return_P = np.flatnonzero(data_B == 0x0D)
    follows_P = np.append(data_B, 0)[return_P + 1] == 0x0A
    # The LF after a CR that ends a text is the next text's.
    follows_P &= ~np.isin(return_P + 1, offsets_N1)
    data_B[return_P[~follows_P]] = 0x0A
    dropped_P = return_P[follows_P]
    unix = text_array(np.delete(data_B, dropped_P), offsets_N1 - np.searchsorted(dropped_P, offsets_N1))
    for line_end in ("\u2028", "\u2029", "\u0085"):
        unix = pc.replace_substring(unix, line_end, "\n")
    return unix.cast(texts.type)


def _matches(texts: pa.Array, pattern: str) -> Bools:
    return _bools(pc.match_substring_regex(texts, "(?s)" + pattern))


def _bools(values: pa.Array) -> Bools:
    found: Bools = values.to_numpy(zero_copy_only=False)
    return found


def _config(fixes: Fixes) -> TextFixerConfig:
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        unescape_html="auto" if fixes.entities else False,
        fix_encoding=fixes.mojibake,
        fix_c1_controls=fixes.mojibake,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=fixes.line_ends,
        fix_surrogates=False,  # UTF-8 holds none
        remove_terminal_escapes=fixes.controls,
        remove_control_chars=fixes.controls,
        normalization=_FORMS[fixes.form],
        max_decode_length=_LONGEST_LINE,
        explain=False,
    )


def _controls() -> tuple[int, ...]:
    """The code points that ftfy removes; the one that begins terminal escapes is among them."""
    from ftfy.chardata import CONTROL_CHARS

    return tuple(CONTROL_CHARS)


@lru_cache(maxsize=1)
def _badness() -> str:
    from ftfy.badness import BADNESS_RE

    return widened(BADNESS_RE)


def widened(pattern: re.Pattern[str]) -> str:
    r"""A pattern for RE2 that matches in every text in which `pattern` matches in one of the lines or more.

    RE2 has no verbose syntax, and its \s and \w are ASCII's. Anchors are left out, so that a line may begin anywhere.
    For a pattern with anything else in it that RE2 reads in another way this is one that matches all but ASCII.
    """
    if pattern.flags & ~(re.VERBOSE | re.UNICODE):
        return _NOT_ASCII
    # What str.isspace() takes for white space; and all that isn't punctuation, as \w never is but for the underscore.
    escapes = {r"\s": r"[\t-\r\x1c-\x1f\x{85}\p{Z}]", r"\w": r"(?:_|[^\t-\r\x1c-\x1f\x{85}\p{Z}\p{P}])"}
    source = pattern.pattern
    parts: list[str] = []
    in_class = False
    i = 0
    while i < len(source):
        part = source[i]
        if part == "\\":
            part = source[i : i + 4] if source.startswith(r"\x", i) else source[i : i + 2]
            if not part.startswith(r"\x") and (in_class or part not in escapes):
                return _NOT_ASCII
            parts.append(escapes.get(part, part))
        elif in_class:
            parts.append(part)
            in_class = part != "]"
        elif part == "[":
            parts.append(part)
            in_class = True
        elif part == "#" and pattern.flags & re.VERBOSE:
            part = source[i : (source + "\n").index("\n", i)]
        elif part == "$" or source.startswith("(?", i):
            return _NOT_ASCII
        elif part != "^" and not (part.isspace() and pattern.flags & re.VERBOSE):
            parts.append(part)
        i += len(part)
    return "".join(parts)
