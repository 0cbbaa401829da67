"""Marks: the places of a column of texts where a find may be, by one pass of a compiled kernel over Arrow's bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from aifactory.ingest.personal.finds import words_of

AT, NUMBER, QUAD, HEXES, ACCOUNT, FORM, ASSIGNED, URL = range(8)

_OTHER, _AT_SIGN, _DIGIT, _COLON, _EQUALS, _JOINT, _LETTER = range(7)
_CLASSES = np.zeros(256, np.uint8)
_CLASSES[ord("@")] = _AT_SIGN
_CLASSES[list(b"0123456789")] = _DIGIT
_CLASSES[ord(":")] = _COLON
_CLASSES[ord("=")] = _EQUALS
_CLASSES[list(b"_-")] = _JOINT
_CLASSES[list(b"ASBJwW/")] = _LETTER

# What a byte can be part of.
_WORD, _HEX, _SPACER, _ENDS_NAME, _ENDS_HEAD = 1, 2, 4, 8, 16
_PARTS = np.zeros(256, np.uint8)
_PARTS[[i for i in range(128) if chr(i).isalnum() or chr(i) == "_"]] |= _WORD
_PARTS[list(b"0123456789abcdefABCDEF")] |= _HEX
_PARTS[list(b" .-()/")] |= _SPACER


def _packed(words: Sequence[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    raw = [word.encode() for word in words]
    return np.frombuffer(b"".join(raw), np.uint8).copy(), np.cumsum([0, *map(len, raw)])


# How the forms of secrets begin, up to a _ or -.
_HEAD_WORDS = words_of(
    "ghp gho ghu ghs ghr github_pat sk rk whsec hf npm dop_v1 doo_v1 dor_v1 glpat pypi GOCSPX xapp "
    "xoxa xoxb xoxe xoxo xoxp xoxr xoxs"
)
_HEADS = _packed(_HEAD_WORDS)
_PARTS[[ord(head[-1]) for head in _HEAD_WORDS]] |= _ENDS_HEAD
PASSWORDS = (*words_of("password passwd passwort passphrase pwd pass contraseña senha"), "mot de passe")
KEYS = words_of(
    "secret token apikey api_key api-key accesskey access_key access-key privatekey private_key private-key secretkey "
    "secret_key secret-key signing_key signingkey encryption_key encryptionkey auth_key authkey account_key accountkey "
    "credential credentials _auth"
)
_NAMES = _packed([*PASSWORDS, *KEYS])
_PARTS[[ord(name[-1]) for name in (*PASSWORDS, *KEYS)]] |= _ENDS_NAME
_PARTS[[ord(name[-1].upper()) for name in (*PASSWORDS, *KEYS)]] |= _ENDS_NAME


def mark_places(
    data_B: npt.NDArray[np.uint8], offsets_N1: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Row, byte and mark of the places, in order."""
    room = 1024 + len(data_B) // 128
    while True:
        row_A, at_A = np.empty(room, np.int64), np.empty(room, np.int64)
        mark_A = np.empty(room, np.uint8)
        count = _mark(data_B, offsets_N1, _CLASSES, _PARTS, *_HEADS, *_NAMES, row_A, at_A, mark_A)
        if count <= room:
            return row_A[:count], at_A[:count], mark_A[:count]
        room = count


@numba.njit(cache=True, nogil=True)
def _mark(
    data_B: Any,
    offsets_N1: Any,
    class_256: Any,
    parts_256: Any,
    heads: Any,
    heads_at: Any,
    names: Any,
    names_at: Any,
    row_A: Any,
    at_A: Any,
    mark_A: Any,
) -> int:
    """Writes the places as far as there is room, and returns how many there are."""
    count = 0
    for row in range(len(offsets_N1) - 1):
        begin, end = offsets_N1[row], offsets_N1[row + 1]
        number_end = begin
        hexes_end = begin
        i = begin - 1
        while i + 1 < end:
            i += 1
            while i < end and class_256[data_B[i]] == 0:
                i += 1
            if i == end:
                break
            kind = class_256[data_B[i]]
            mark = -1
            other = -1
            if kind == 1:  # @
                if i > begin and i + 1 < end:
                    before, after = data_B[i - 1], data_B[i + 1]
                    if (parts_256[before] & 1 or before >= 0x80 or before == 0x2D or before == 0x2B) and (
                        parts_256[after] & 1 or after >= 0x80
                    ):
                        mark = 0
            elif kind == 2:  # digit
                if i < number_end:
                    continue
                digits, dots, gaps, spacers, wide, last = 0, 0, 0, 0, 0, i
                j = i
                while j < end:
                    byte = data_B[j]
                    if 0x30 <= byte <= 0x39:
                        if j > last + 1:
                            gaps += 1
                            if j == last + 2 and data_B[j - 1] == 0x2E:
                                dots += 1
                        digits += 1
                        spacers, wide, last = 0, 0, j
                    elif parts_256[byte] & 4:
                        spacers += 1
                        if spacers > 2:
                            break
                    elif byte >= 0x80:
                        wide += 1
                        if wide > 3:
                            break
                    else:
                        break
                    j += 1
                number_end = last + 1
                if digits >= 7 and (gaps or _begins(data_B, begin, i, parts_256)):
                    mark = 1
                if dots >= 3:
                    other = 2
                if (
                    i >= begin + 2
                    and i + 1 < end
                    and 0x41 <= data_B[i - 1] <= 0x5A
                    and 0x41 <= data_B[i - 2] <= 0x5A
                    and 0x30 <= data_B[i + 1] <= 0x39
                    and _begins(data_B, begin, i - 2, parts_256)
                ):
                    if count < len(row_A):
                        row_A[count], at_A[count], mark_A[count] = row, i - 2, 4
                    count += 1
            elif kind == 3 or kind == 4:  # : =
                if kind == 3 and i + 2 < end and data_B[i + 1] == 0x2F and data_B[i + 2] == 0x2F:
                    colon = False
                    for j in range(i + 3, min(end, i + 400)):
                        byte = data_B[j]
                        if byte == 0x3A:
                            colon = True
                        elif byte == 0x40:
                            if colon:
                                mark = 7
                            break
                        elif byte <= 0x22 or byte == 0x2F or byte == 0x5C:
                            break
                else:
                    # Back over spaces, quotes and brackets to the name.
                    j = i - 1
                    while j >= begin and j > i - 6:
                        byte = data_B[j]
                        if not (
                            byte == 0x20 or byte == 0x22 or byte == 0x27 or byte == 0x5C or byte == 0x5D or byte == 0x3D
                        ):
                            break
                        j -= 1
                    if (
                        j >= begin
                        and parts_256[data_B[j]] & 8
                        and _ends_in(data_B, begin, j + 1, names, names_at, parts_256, True)
                    ):
                        mark = 6
                if kind == 3 and i >= hexes_end:
                    first, stop = i, i + 1
                    while first > begin and (parts_256[data_B[first - 1]] & 2 or data_B[first - 1] == 0x3A):
                        first -= 1
                    colons, double = 0, False
                    stop = first
                    while stop < end and (parts_256[data_B[stop]] & 2 or data_B[stop] == 0x3A):
                        if data_B[stop] == 0x3A:
                            colons += 1
                            double = double or (stop + 1 < end and data_B[stop + 1] == 0x3A)
                        stop += 1
                    hexes_end = stop
                    # A colon before it may end a name.
                    single = data_B[first] == 0x3A and first + 1 < end and data_B[first + 1] != 0x3A
                    alone = single or _begins(data_B, begin, first, parts_256)
                    if (double or colons >= 7) and stop - first > colons + 1 and alone:
                        if count < len(row_A):
                            row_A[count], at_A[count], mark_A[count] = row, first, 3
                        count += 1
                    if i > begin and i + 35 < end and data_B[i + 1] == 0x41 and data_B[i + 2] == 0x41:
                        other = 5
            elif kind == 5:  # _ -
                # -----BEGIN, or the head of a form.
                pem = data_B[i] == 0x2D and i + 10 < end and data_B[i + 5] == 0x42 and data_B[i + 9] == 0x4E
                before = data_B[i - 1] if i > begin else 0
                if pem or (parts_256[before] & 16 and _ends_in(data_B, begin, i, heads, heads_at, parts_256, False)):
                    mark = 5
            else:
                byte = data_B[i]
                if i + 7 >= end:
                    continue
                b1, b2, b3, b4 = data_B[i + 1], data_B[i + 2], data_B[i + 3], data_B[i + 4]
                if byte == 0x41:  # AKIA, ASIA, ABIA, AIza
                    if (b1 == 0x49 and b2 == 0x7A and b3 == 0x61) or (b2 == 0x49 and b3 == 0x41):
                        mark = 5
                elif byte == 0x53:  # SG.
                    if b1 == 0x47 and b2 == 0x2E:
                        mark = 5
                elif byte == 0x42:  # Bearer, Basic
                    if (b1 == 0x65 and b2 == 0x61 and b3 == 0x72) or (b1 == 0x61 and b2 == 0x73 and b3 == 0x69):
                        mark = 5
                elif byte == 0x4A:  # eyJ
                    if i >= begin + 2 and data_B[i - 1] == 0x79 and data_B[i - 2] == 0x65:
                        mark = 5
                elif byte == 0x2F:  # /services/T
                    if b1 == 0x54 and i >= begin + 8 and data_B[i - 1] == 0x73 and data_B[i - 8] == 0x73:
                        mark = 5
                else:  # password is
                    if (
                        (b1 | 0x20) == 0x6F
                        and (b2 | 0x20) == 0x72
                        and ((b3 | 0x20) == 0x64 or (b3 | 0x20) == 0x74)
                        and b4 == 0x20
                        and data_B[i + 5] == 0x69
                        and data_B[i + 6] == 0x73
                    ):
                        mark = 5
            if mark >= 0:
                if count < len(row_A):
                    row_A[count], at_A[count], mark_A[count] = row, i, mark
                count += 1
            if other >= 0:
                if count < len(row_A):
                    row_A[count], at_A[count], mark_A[count] = row, i, other
                count += 1
    return count


@numba.njit(cache=True, nogil=True)
def _begins(data_B: Any, begin: int, i: int, parts_256: Any) -> bool:
    """Whether a word may begin at i: after no part of a word, or after one that is an escape's."""
    if i <= begin or not parts_256[data_B[i - 1]] & 1:
        return True
    return (i >= begin + 2 and data_B[i - 2] == 0x5C) or (i >= begin + 6 and data_B[i - 6] == 0x5C)


@numba.njit(cache=True, nogil=True)
def _ends_in(data_B: Any, begin: int, stop: int, words: Any, words_at: Any, parts_256: Any, any_case: bool) -> bool:
    """Whether one of the words stands right before `stop`: in any case and after anything, or as it is and alone."""
    if stop <= begin:
        return False
    for w in range(len(words_at) - 1):
        size = words_at[w + 1] - words_at[w]
        if stop - size < begin:
            continue
        same = True
        for k in range(1, size + 1):
            byte = data_B[stop - k]
            if any_case and 0x41 <= byte <= 0x5A:
                byte |= 0x20
            if byte != words[words_at[w + 1] - k]:
                same = False
                break
        if same and (any_case or _begins(data_B, begin, stop - size, parts_256)):
            return True
    return False
