"""Characters: what is punctuation, a letter, a digit; and lists of words as the kernels look them up."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

_TERMINAL = (
    "21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 17D4-17D6 "
    "17D9-17DA 1803 1809 1944-1945 1AA8-1AAB 1B5A-1B5B 1B5E-1B5F 1B7D-1B7E 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049 2E2E "
    "2E3C 2E53-2E54 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE52 "
    "FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6 "
    "111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944 "
    "11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44 16E98 1BC9F 1DA88"
)
_OTHER_PUNCTUATION = (
    "0-8 B-1F 21-2F 3A-40 5B-60 7B-9F AB B4 BB 2013-2014 2019 201C-201E 2026 2236 2501 25BA 3001-3002 3008-300D 3010-3011 "
    "FF01 FF05 FF08-FF09 FF0C FF0E FF11 FF1A-FF1B FF1F FF5E"
)


def _characters(ranges: str) -> str:
    ends = (part.split("-") for part in ranges.split())
    return "".join(chr(code) for end in ends for code in range(int(end[0], 16), int(end[-1], 16) + 1))


TERMINAL_PUNCTUATION = _characters(_TERMINAL)
"""Marks that end a sentence in some script, without quotation marks: Unicode's Sentence_Terminal, but for a few."""
PUNCTUATION = "".join(sorted({*_characters(_OTHER_PUNCTUATION), *TERMINAL_PUNCTUATION}))
"""What a word must have another character than to count as one in `gopher_quality`; CCNet's list (Wenzek et al. 2020,
arXiv:1911.00359, its code), which has control characters too, and TERMINAL_PUNCTUATION."""

LETTER, WORDY, DIGIT = np.uint8(1), np.uint8(2), np.uint8(4)


@lru_cache(maxsize=1)
def kinds_of_characters() -> npt.NDArray[np.uint8]:
    """Of each code point: LETTER, WORDY (not punctuation) and DIGIT where it is that."""
    points = np.arange(0x110000, dtype=np.uint32).view("U1")
    letter, digit = np.strings.isalpha(points), np.strings.isdecimal(points)
    return letter * LETTER | ~members(PUNCTUATION) * WORDY | digit * DIGIT


@lru_cache(maxsize=4)
def members(characters: str) -> npt.NDArray[np.bool_]:
    """Of each code point whether it is one of these."""
    members = np.zeros(0x110000, np.bool_)
    members[[ord(character) for character in characters]] = True
    return members


@lru_cache(maxsize=4)
def joined(words: tuple[str, ...]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The bytes of sorted words, where each ends and the next begins, and of each byte which is the first word that it begins.

    The words that byte b begins are those from the b-th up to the (b + 1)-th of the last.
    """
    encoded = [word.encode() for word in words]
    ends = np.cumsum([0, *map(len, encoded)])
    first = np.searchsorted([word[0] for word in encoded], np.arange(257))
    return np.frombuffer(b"".join(encoded), np.uint8), ends.astype(np.int64), first.astype(np.int64)
