"""MinHash: of each text a short signature, whose components agree with those of another as often as the texts are alike.

Words       A word is a run of what is not Unicode white space, with A-Z in lower case and without punctuation: what is in
            ASCII neither letter, digit nor white space (control characters too), « and », the soft hyphen, the byte
            order mark, the punctuation and the invisible marks of the blocks General Punctuation and CJK Symbols, and
            full-width punctuation. What is nothing but punctuation is no word. An ideograph or a kana is a word of its
            own, since those scripts set no spaces. Other letters stay as they are: É and é are two letters, and so are
            é composed and é decomposed (normalise before). Bytes that are no UTF-8 count as letters.
Shingles    The set of a text's runs of n words; a shorter text has one, of all its words. Two texts are alike by the
            Jaccard similarity of their sets, |A ∩ B| / |A ∪ B| (Broder 1997, On the resemblance and containment of
            documents; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.2).
Signature   P components; each agrees with that of another text with probability J, so the share of equal components
            estimates J. They are made by the sketch of Dahlgaard, Knudsen and Thorup (Fast Similarity Sketching, FOCS
            2017, 2): a pass hashes each shingle into one of P bins, which keeps its least; passes with new hashes follow
            for the bins that are still empty, and after P passes each pass fills one bin. It costs about P log P + n
            hashes for n shingles. Its first pass is one-permutation hashing, whose empty bins Shrivastava (2017, Optimal
            densification) copies from full ones; that is 1.6 times as fast, but at 20 shingles its error is 1.6 times
            as large, and duplicates among short texts are common. Error here: at most sqrt(J (1 - J) / P), what P
            independent permutations have, and 0.7 times that where n <= P.
Law         A signature depends on its text, `ngram_words`, P and `seed` alone; never on the other texts, the block, the
            process or the machine. Signatures are comparable where these three are the same.
No words    Such a text has no signature: each component is NO_SIGNATURE, which no other text's is.

Import this module where it is needed: numba takes its time.

Legend   N texts, B bytes of all of them, W words, P components of a signature, S shingles of a text.
"""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.text.buffers import text_buffers

NGRAM_WORDS = 3
"""With a tenth of the words replaced by others, the Jaccard similarity of texts of 200 to 400 words is 0.67 for runs of 2
words, 0.56 for 3, 0.48 for 4 and 0.41 for 5 (standard deviation 0.01 to 0.03); that of texts that have nothing to do with one
another is below 0.13, 0.07, 0.05 and 0.05 for 9,999 pairs of 10,000. Three words keep both far from the threshold."""
NUM_BANDS = 32
ROWS_PER_BAND = 3
"""`near_duplicates.recall` gives the share that is found."""
NO_SIGNATURE = np.uint32(0xFFFFFFFF)

_SLICE_BYTES = 1 << 18  # text whose words are hashed at once: their hashes stay in the cache
_SPACE, _DROPPED, _LOOK = np.uint8(0), np.uint8(1), np.uint8(2)
_FIRST_LETTER = np.uint8(3)
# What _multibyte finds beside _SPACE, _DROPPED and _FIRST_LETTER.
_IDEOGRAPH = np.uint8(4)

# FNV-1a (Fowler, Noll and Vo, 64 bits) over the bytes of a word, and odd multipliers of full width for the rest.
_BASIS = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x00000100000001B3)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)
_LARGEST = np.uint32(0xFFFFFFFE)


def signatures(
    texts: pa.Array,
    *,
    ngram_words: int = NGRAM_WORDS,
    num_bands: int = NUM_BANDS,
    rows_per_band: int = ROWS_PER_BAND,
    seed: int = 0,
) -> npt.NDArray[np.uint32]:
    """Signatures uint32[N, P] with P = num_bands * rows_per_band; texts are string or large_string without nulls."""
    if min(ngram_words, num_bands, rows_per_band) < 1:
        raise ValueError(
            f"expected ngram_words, num_bands and rows_per_band of at least 1, found {ngram_words}, {num_bands} and "
            f"{rows_per_band}"
        )
    signature_NP = np.empty((len(texts), num_bands * rows_per_band), np.uint32)
    start = 0
    for word_W, end_N1 in hashed_words(texts):
        stop = start + len(end_N1) - 1
        _sketch(word_W, end_N1, ngram_words, np.uint64(seed), signature_NP[start:stop])
        start = stop
    return signature_NP


def band_keys(
    signature_NP: npt.NDArray[np.uint32], *, num_bands: int = NUM_BANDS, rows_per_band: int = ROWS_PER_BAND
) -> npt.NDArray[np.uint64]:
    """Keys uint64[num_bands + 1, N]: texts with the same key in a row of this are candidates.

    Row k < num_bands holds the key of band k, that is of the signature's components [k * rows_per_band, (k + 1) *
    rows_per_band); the last row that of the whole signature, where equal texts meet whatever the other rows hold.
    The key of a text without a signature is 0, and nobody else's.
    """
    if signature_NP.shape[1] != num_bands * rows_per_band:
        raise ValueError(
            f"expected signatures of num_bands * rows_per_band = {num_bands} * {rows_per_band} components, found "
            f"{signature_NP.shape[1]}"
        )
    key_KN = np.empty((num_bands + 1, len(signature_NP)), np.uint64)
    _hash_bands(np.ascontiguousarray(signature_NP), rows_per_band, key_KN)
    return key_KN


def hashed_words(texts: pa.Array) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
    """The hashes of the words, for some texts after the other: word_W and end_N1.

    The words of the i-th of these texts are word_W[end_N1[i] : end_N1[i + 1]]. The buffers are used again for the next
    texts: what is to be kept must be copied.
    """
    data_B, offset_N1 = text_buffers(texts)
    # A view that can't be written: buffers of either kind are one type to the compiler.
    data_B = data_B.view()
    data_B.flags.writeable = False
    word_W = np.empty(0, np.uint64)
    start = 0
    while start < len(texts):
        stop = int(np.searchsorted(offset_N1, offset_N1[start] + _SLICE_BYTES, "right")) - 1
        stop = min(max(stop, start + 1), len(texts))
        # Two words are apart by a byte, or are ideographs of three.
        most = int(offset_N1[stop] - offset_N1[start]) // 2 + stop - start
        if len(word_W) < most:
            word_W = np.empty(most, np.uint64)
        end_N1 = np.empty(stop - start + 1, np.int64)
        _hash_words(data_B, offset_N1[start : stop + 1], _kinds(), word_W, end_N1)
        yield word_W, end_N1
        start = stop


def _kinds() -> npt.NDArray[np.uint8]:
    """What each byte is: white space, dropped, the first of several that must be looked at, or the letter to hash."""
    kind_256 = np.full(256, _DROPPED, np.uint8)
    for byte in range(128):
        character = chr(byte)
        if character.isspace():
            kind_256[byte] = _SPACE
        elif character.isalnum():
            kind_256[byte] = ord(character.lower())
    kind_256[128:] = np.arange(128, 256)
    kind_256[[0xC2, 0xE1, 0xE2, *range(0xE3, 0xEA), 0xEF, 0xF0]] = _LOOK
    return kind_256


# ── kernels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def _multibyte(data_B, position, end):  # type: ignore[no-untyped-def]
    """What the character is that begins with a byte of kind _LOOK, and its bytes."""
    lead = data_B[position]
    length = 2 if lead == 0xC2 else 4 if lead == 0xF0 else 3
    if position + length > end:
        return _FIRST_LETTER, 1
    second = np.int64(data_B[position + 1]) & 0x3F
    if lead == 0xC2:  # U+0080 to U+00BF
        if second == 0x05 or second == 0x20:
            return _SPACE, length
        if second == 0x2B or second == 0x2D or second == 0x3B:
            return _DROPPED, length
        return _FIRST_LETTER, 1
    if lead == 0xF0:  # U+10000 to U+3FFFF, of which the last two planes are ideographs
        return (_IDEOGRAPH, length) if second >= 0x20 else (_FIRST_LETTER, 1)
    code = (np.int64(lead) & 0x0F) << 12 | second << 6 | (np.int64(data_B[position + 2]) & 0x3F)
    if code == 0x1680 or code == 0x3000:
        return _SPACE, length
    if code >= 0x2000 and code <= 0x206F:
        if code <= 0x200A or code == 0x2028 or code == 0x2029 or code == 0x202F or code == 0x205F:
            return _SPACE, length
        return _DROPPED, length
    if code < 0x2E80:
        return _FIRST_LETTER, 1
    if code > 0x3000 and code < 0x3040:
        return (_IDEOGRAPH, length) if code >= 0x3005 and code <= 0x3007 else (_DROPPED, length)
    if code < 0xA000:
        # Hangul is written with spaces; the units of U+3200 to U+33FF are symbols.
        symbol = (code >= 0x3130 and code <= 0x318F) or (code >= 0x3200 and code <= 0x33FF)
        return (_FIRST_LETTER, 1) if symbol else (_IDEOGRAPH, length)
    if code >= 0xF900 and code <= 0xFAFF:
        return _IDEOGRAPH, length
    if (
        code == 0xFEFF
        or (code >= 0xFF01 and code <= 0xFF0F)
        or (code >= 0xFF1A and code <= 0xFF20)
        or (code >= 0xFF3B and code <= 0xFF40)
        or (code >= 0xFF5B and code <= 0xFF65)
    ):
        return _DROPPED, length
    return _FIRST_LETTER, 1


@numba.njit(cache=True, nogil=True)
def _mixed(value):  # type: ignore[no-untyped-def]
    """A bijection of 64 bits in which each bit depends on all (the finaliser of SplitMix64; Steele et al. 2014, OOPSLA)."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_A
    value = (value ^ (value >> np.uint64(27))) * _MIX_B
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _hash_words(data_B, offset_N1, kind_256, word_W, end_N1):  # type: ignore[no-untyped-def]
    """Writes the hash of each word, and where each text's words end."""
    count = 0
    end_N1[0] = 0
    for i in range(len(offset_N1) - 1):
        position = offset_N1[i]
        end = offset_N1[i + 1]
        value = _BASIS
        within = False
        while position < end:
            kind = kind_256[data_B[position]]
            if kind >= _FIRST_LETTER:
                value = (value ^ np.uint64(kind)) * _PRIME
                within = True
                position += 1
                continue
            length = 1
            if kind == _LOOK:
                kind, length = _multibyte(data_B, position, end)
                if kind == _FIRST_LETTER:
                    value = (value ^ np.uint64(data_B[position])) * _PRIME
                    within = True
                    position += 1
                    continue
            if kind != _DROPPED:
                if within:
                    word_W[count] = _mixed(value)
                    count += 1
                    value = _BASIS
                    within = False
                if kind == _IDEOGRAPH:
                    for q in range(position, position + length):
                        value = (value ^ np.uint64(data_B[q])) * _PRIME
                    word_W[count] = _mixed(value)
                    count += 1
                    value = _BASIS
            position += length
        if within:
            word_W[count] = _mixed(value)
            count += 1
        end_N1[i + 1] = count


@numba.njit(cache=True, nogil=True)
def _sketch(word_W, end_N1, ngram_words, seed, signature_NP):  # type: ignore[no-untyped-def]
    bins = signature_NP.shape[1]
    shingle_S = np.empty(end_N1[-1], np.uint64)
    pass_P = np.empty(bins, np.int64)  # in which pass each bin was filled; 0: not yet
    start = _mixed(seed + _GOLDEN)
    for i in range(len(end_N1) - 1):
        signature_P = signature_NP[i]
        signature_P[:] = NO_SIGNATURE
        begin = end_N1[i]
        words = end_N1[i + 1] - begin
        if words == 0:
            continue
        length = min(ngram_words, words)
        shingles = words - length + 1
        for s in range(shingles):
            value = start
            for q in range(begin + s, begin + s + length):
                value = value * _GOLDEN + word_W[q]
            shingle_S[s] = _mixed(value)
        pass_P[:] = 0
        filled = 0
        number = 0
        while filled < bins:
            number += 1
            salt = np.uint64(number) * _GOLDEN
            if number <= bins:
                for s in range(shingles):
                    value = (shingle_S[s] ^ salt) * _MIX_A
                    value = (value ^ (value >> _HALF)) * _MIX_B
                    b = np.int64(((value >> _HALF) * np.uint64(bins)) >> _HALF)
                    component = min(np.uint32(value), _LARGEST)
                    if pass_P[b] == 0:
                        pass_P[b] = number
                        signature_P[b] = component
                        filled += 1
                    elif pass_P[b] == number and component < signature_P[b]:
                        signature_P[b] = component
            else:
                b = number - bins - 1
                if pass_P[b] == 0:
                    for s in range(shingles):
                        value = (shingle_S[s] ^ salt) * _MIX_A
                        value = (value ^ (value >> _HALF)) * _MIX_B
                        signature_P[b] = min(signature_P[b], min(np.uint32(value), _LARGEST))
                    filled += 1


@numba.njit(cache=True, nogil=True)
def _hash_bands(signature_NP, rows_per_band, key_KN):  # type: ignore[no-untyped-def]
    bands = key_KN.shape[0] - 1
    for i in range(len(signature_NP)):
        signature_P = signature_NP[i]
        if signature_P[0] == NO_SIGNATURE:
            key_KN[:, i] = np.uint64(0)
            continue
        whole = _GOLDEN
        for k in range(bands):
            value = _GOLDEN
            for p in range(k * rows_per_band, (k + 1) * rows_per_band):
                value = _mixed(value ^ np.uint64(signature_P[p])) + _GOLDEN
            key_KN[k, i] = max(value, np.uint64(1))
            whole = _mixed(whole ^ value) + _GOLDEN
        key_KN[bands, i] = max(whole, np.uint64(1))
