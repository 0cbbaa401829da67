"""Language: which language each text is in, by py3langid's model, and which rows are kept for it.

Model    py3langid (Barbaresi; after langid.py, Lui and Baldwin, ACL 2012): an automaton over bytes counts the n-grams
         that it knows, naive Bayes over 142 languages weighs log(1 + count), a softmax with temperature sqrt(bytes)
         gives probabilities. The tables come from the installed package; this file walks them over Arrow's buffers.
Law      Code and probability are those of `py3langid.langid.LanguageIdentifier` with `norm_probs=True` for the first
         `sample_bytes` of each text, up to the rounding of its float32 sums; and a text's are the same whatever else
         is in its block.
         One difference: text in which the model knows no n-gram at all (empty, say) has the code `und`
         with probability 0, where py3langid gives all languages the same probability and names one of them.
Codes    ISO 639 as the model has them; `zxx` is no language (code, numbers, logs), `und` undetermined.
Raises   ConfigError for a code that the model doesn't have.

Loading the model takes about 0.7 s and 100 MB, once for each process. Import this module where it is needed: numba takes its time.

Legend   N texts, B bytes of all of them, K classes of the model, F features (n-grams), S states of the automaton.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aifactory.errors import ConfigError
from aifactory.ingest.columns import Verdicts
from aifactory.text.buffers import text_buffers

SAMPLE_BYTES = 1024
"""How much of a text is read. Of 2,667 documents in 87 languages (translated messages of programs) the model names
98.3 % rightly by 512 bytes, 98.9 % by 1,024, 99.1 % by 2,048 and 99.2 % by 4,096."""
UNDETERMINED = "und"
RULES = ("language", "language_uncertain")

_SLICE_ROWS = 4096  # rows whose N x K scores are held at once
_BATCH_ROWS = 96  # rows whose scores lie in the cache while the weights of a feature, which don't, are added to them
_STEPS = 1 << 14  # bytes of a text that are walked before what was found in them is counted
_NON_ASCII, _LOWER, _UPPER = 1, 2, 4

# The types of the kernels' arrays, stated so that each kernel is compiled once.
_BYTES = numba.types.Array(numba.uint8, 1, "C", readonly=True)
_I32 = numba.int32[::1]
_I32_2 = numba.int32[:, ::1]
_U32 = numba.uint32[::1]
_I64 = numba.int64[::1]
_F32 = numba.float32[::1]
_F32_2 = numba.float32[:, ::1]
_F64_2 = numba.float64[:, ::1]


@dataclass(frozen=True, slots=True)
class Languages:
    """What N texts are written in."""

    codes: pa.Array
    """string[N]."""
    probability_N: npt.NDArray[np.float64]
    figures: dict[str, int]
    """`rows`, and `language:CODE` for each code that was found; they add up over blocks."""


def language_codes() -> tuple[str, ...]:
    """The codes that can be found, sorted."""
    return tuple(sorted({*_model().codes, UNDETERMINED}))


def languages(texts: pa.Array, *, sample_bytes: int = SAMPLE_BYTES) -> Languages:
    """The most probable language of each text, by its first `sample_bytes` (0: by all of it)."""
    model = _model()
    count = len(texts)
    best_N = np.zeros(count, np.int64)
    probability_N = np.zeros(count, np.float64)
    for start, p_NK, known_N in _distributions(texts, sample_bytes):
        rows = slice(start, start + len(p_NK))
        best_N[rows] = np.where(known_N > 0, p_NK.argmax(axis=1), len(model.codes))
        probability_N[rows] = np.where(known_N > 0, p_NK.max(axis=1), 0.0)
    codes = np.array([*model.codes, UNDETERMINED], object)
    # Two classes may share a code (a language in two scripts), but only the first of them is ever the best.
    found, counts = np.unique(best_N, return_counts=True)
    figures = {f"language:{codes[i]}": int(n) for i, n in zip(found, counts, strict=True)}
    return Languages(
        codes=pa.array(codes[best_N], pa.string()),
        probability_N=probability_N,
        figures={"rows": count} | dict(sorted(figures.items())),
    )


def ranks(texts: pa.Array, *, sample_bytes: int = SAMPLE_BYTES) -> list[list[tuple[str, float]]]:
    """All languages of each text with their probabilities, most probable first, equal ones in the model's order."""
    model = _model()
    columns = [k for k in range(len(model.codes)) if model.first_K[k] == k]
    names = [model.codes[k] for k in columns]
    ranked = []
    for _, p_NK, _ in _distributions(texts, sample_bytes):
        for p_K in p_NK[:, columns]:
            order = np.argsort(-p_K, kind="stable")
            ranked.append([(names[k], float(p_K[k])) for k in order])
    return ranked


def language_verdicts(
    texts: pa.Array, *, keep: Sequence[str] = (), min_probability: float = 0.0, sample_bytes: int = SAMPLE_BYTES
) -> tuple[Languages, Verdicts]:
    """The languages, and which texts break the rules; the score of either is the probability.

    language            the language is none of `keep`; an empty `keep` keeps all
    language_uncertain  it is, with less than `min_probability`
    """
    if unknown := sorted(set(keep) - set(language_codes())):
        raise ConfigError(
            f"expected codes of languages that py3langid's model knows, found {unknown}; "
            f"choose from {', '.join(language_codes())}."
        )
    found = languages(texts, sample_bytes=sample_bytes)
    wanted_N = np.ones(len(texts), np.bool_)
    if keep:
        wanted_N = np.isin(np.asarray(found.codes.to_numpy(zero_copy_only=False), object), list(keep))
    uncertain_N = found.probability_N < min_probability
    broken_N = np.where(~wanted_N, 1, np.where(uncertain_N, 2, 0)).astype(np.uint8)
    return found, Verdicts(rules=RULES, broken_N=broken_N, score_N=np.where(broken_N > 0, found.probability_N, 0.0))


# ── the model ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Model:
    codes: tuple[str, ...]
    first_K: npt.NDArray[np.int64]
    """The first class with the same code: its own index, but for a language in two scripts."""
    prior_K: npt.NDArray[np.float64]
    weights_FK: npt.NDArray[np.float32]
    moves: npt.NDArray[np.uint32]
    """The next state, at the row of the state plus the byte."""
    row_S: npt.NDArray[np.int32]
    """Where the row of each state begins in `moves`; states share rows."""
    feature_S: npt.NDArray[np.int32]
    """The feature that ends in each state, -1 where none does."""


@lru_cache(maxsize=1)
def _model() -> _Model:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    loaded = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    codes = tuple(loaded.nb_classes)
    weights_FK = np.asarray(loaded.nb_ptc, np.float32)
    # A softmax doesn't see what is subtracted from all classes alike, and sums of smaller numbers round less.
    weights_FK -= weights_FK.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    return _Model(
        codes=codes,
        first_K=np.array([codes.index(code) for code in codes]),
        prior_K=np.asarray(loaded.nb_pc, np.float64),
        weights_FK=weights_FK,
        moves=np.array(loaded.tk_nextmove, np.uint32),
        row_S=np.array(loaded.tk_row, np.int32) << 8,
        feature_S=np.array(loaded.tk_output, np.int32),
    )


def _distributions(
    texts: pa.Array, sample_bytes: int
) -> Iterator[tuple[int, npt.NDArray[np.float64], npt.NDArray[np.int32]]]:
    """Slice by slice: where it begins, the probabilities of its texts [N, K], how many features each has [N].

    The probability of classes that share a code stands with the first of them; the others have 0.
    """
    model = _model()
    data_B, offsets_N1 = text_buffers(texts)
    for start in range(0, len(texts), _SLICE_ROWS):
        begin_N = offsets_N1[:-1][start : start + _SLICE_ROWS]
        end_N = offsets_N1[1:][start : start + _SLICE_ROWS]
        if sample_bytes:
            end_N = _whole_characters(data_B, begin_N, np.minimum(end_N, begin_N + sample_bytes))
        score_NK, known_N = _scores(data_B, begin_N, end_N, model)
        size_N = end_N - begin_N

        # The rows whose bytes the model doesn't read as they stand.
        altered = _altered(data_B, begin_N, end_N)
        if altered:
            rows = list(altered)
            sizes = [len(text) for text in altered.values()]
            ends = np.cumsum(np.array(sizes, np.int64))
            joined_B = np.frombuffer(b"".join(altered.values()), np.uint8)
            score_NK[rows], known_N[rows] = _scores(joined_B, ends - sizes, ends, model)
            size_N[rows] = sizes

        score_NK += model.prior_K
        score_NK[known_N == 0] = 0
        score_NK /= np.sqrt(np.maximum(size_N, 1))[:, None]
        score_NK -= score_NK.max(axis=1, keepdims=True)
        np.exp(score_NK, out=score_NK)
        score_NK /= score_NK.sum(axis=1, keepdims=True)
        for k, first in enumerate(model.first_K):
            if first != k:
                score_NK[:, first] += score_NK[:, k]
                score_NK[:, k] = 0
        yield start, score_NK, known_N


def _whole_characters(
    data_B: npt.NDArray[np.uint8], begin_N: npt.NDArray[np.int64], end_N: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The ends, moved back to where a character ends."""
    end_N = end_N.copy()
    for _ in range(3):
        inside_N = (end_N > begin_N) & (end_N < len(data_B))
        inside_N[inside_N] = (data_B[end_N[inside_N]] & 0xC0) == 0x80
        end_N[inside_N] -= 1
    return end_N


def _altered(
    data_B: npt.NDArray[np.uint8], begin_N: npt.NDArray[np.int64], end_N: npt.NDArray[np.int64]
) -> dict[int, bytes]:
    """What is read instead of some rows: small letters for text that is all capitals, and NFC, as in training."""
    kinds_N = np.zeros(len(begin_N), np.uint8)
    _kinds(data_B, begin_N, end_N, kinds_N)
    altered: dict[int, bytes] = {}
    for i in np.flatnonzero((kinds_N & _NON_ASCII > 0) | (kinds_N == _UPPER)):
        text = data_B[begin_N[i] : end_N[i]].tobytes().decode()
        read = unicodedata.normalize("NFC", text.lower() if text.isupper() else text)
        if read != text:
            altered[int(i)] = read.encode()
    return altered


def _scores(
    data_B: npt.NDArray[np.uint8], begin_N: npt.NDArray[np.int64], end_N: npt.NDArray[np.int64], model: _Model
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """The sums of the weights [N, K], without the prior, and how many different features each text has [N]."""
    classes, features = len(model.codes), len(model.weights_FK)
    longest = int((end_N - begin_N).max(initial=0))
    # A batch ends early rather than hold more pairs of text and feature than this.
    pairs = max(1 << 18, min(longest, features) * 4)
    score_NK = np.zeros((len(begin_N), classes), np.float64)
    known_N = np.zeros(len(begin_N), np.int32)
    _score(
        data_B,
        begin_N,
        end_N,
        model.moves,
        model.row_S,
        model.feature_S,
        model.weights_FK,
        np.log1p(np.arange(min(longest, _STEPS) + 1, dtype=np.float32)),
        np.zeros((4, min(longest, _STEPS) + 1), np.int32),
        np.zeros(features, np.int32),
        np.full(features, -1, np.int32),
        np.zeros((3, pairs), np.int32),
        np.zeros((_BATCH_ROWS, classes), np.float32),
        score_NK,
        known_N,
    )
    return score_NK, known_N


# ── kernels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(numba.void(_BYTES, _I64, _I64, numba.uint8[::1]), cache=True, nogil=True)
def _kinds(data_B, begin_N, end_N, kinds_N):  # type: ignore[no-untyped-def]
    """_NON_ASCII, _LOWER and _UPPER by what occurs in each text; no more is read than tells which."""
    for i in range(len(begin_N)):
        kinds = np.uint8(0)
        for p in range(begin_N[i], end_N[i]):
            byte = data_B[p]
            if byte >= 0x80:
                kinds |= _NON_ASCII
                break
            if byte >= 0x61 and byte <= 0x7A:
                kinds |= _LOWER
            elif byte >= 0x41 and byte <= 0x5A:
                kinds |= _UPPER
        kinds_N[i] = kinds


@numba.njit(numba.int64(_I32, numba.int64, numba.int64, _I32, _I32, _I32_2, numba.int64), cache=True, nogil=True)
def _count(found, n, row, count_F, head_F, pairs, used):  # type: ignore[no-untyped-def]
    """Counts n features that were found in a text and opens a pair for each new one; returns how many pairs there are.

    A pair is (the feature's next pair, its text's row, the feature), and in the end its count in the feature's place.
    """
    for q in range(n):
        feature = found[q]
        if count_F[feature] == 0:
            pairs[0, used] = head_F[feature]
            pairs[1, used] = row
            pairs[2, used] = feature
            head_F[feature] = used
            used += 1
        count_F[feature] += 1
    return used


@numba.njit(numba.void(_F32_2, _F32, _I32, _I32_2, _F32_2), cache=True, nogil=True)
def _add_weights(weights_FK, log_count, head_F, pairs, sum_RK):  # type: ignore[no-untyped-def]
    """Adds up each text's weights in the order of the features, so that no sum depends on what else is in the batch."""
    for feature in range(len(head_F)):
        q = head_F[feature]
        if q < 0:
            continue
        head_F[feature] = -1
        weight_K = weights_FK[feature]
        while q >= 0:
            sum_K = sum_RK[pairs[1, q]]
            count = pairs[2, q]
            factor = log_count[count] if count < len(log_count) else np.float32(math.log1p(count))
            for k in range(len(weight_K)):
                sum_K[k] += factor * weight_K[k]
            q = pairs[0, q]


@numba.njit(
    numba.void(_BYTES, _I64, _I64, _U32, _I32, _I32, _F32_2, _F32, _I32_2, _I32, _I32, _I32_2, _F32_2, _F64_2, _I32),
    cache=True,
    nogil=True,
)
def _score(  # type: ignore[no-untyped-def]
    data_B,
    begin_N,
    end_N,
    moves,
    row_S,
    feature_S,
    weights_FK,
    log_count,
    found_4,
    count_F,
    head_F,
    pairs,
    sum_RK,
    score_NK,
    known_N,
):
    """Batches of texts: counts the features of each, then adds up the weights of all.

    count_F is 0 and head_F -1 everywhere before and after; found_4, pairs and sum_RK are room to work in.
    """
    count = len(begin_N)
    room = found_4.shape[1]
    first = 0
    while first < count:
        used = 0
        i = first
        while i < count and i - first + 4 <= len(sum_RK):
            longest = 0
            for row in range(i, min(i + 4, count)):
                longest = max(longest, end_N[row] - begin_N[row])
            if used + 4 * min(longest, len(count_F)) > pairs.shape[1]:
                break
            # Four texts in step as far as the shortest goes, then each for itself.
            steps = 0
            s0, s1, s2, s3 = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
            n0, n1, n2, n3 = 0, 0, 0, 0
            if i + 4 <= count:
                b0, b1, b2, b3 = begin_N[i], begin_N[i + 1], begin_N[i + 2], begin_N[i + 3]
                steps = min(min(end_N[i] - b0, end_N[i + 1] - b1), min(end_N[i + 2] - b2, end_N[i + 3] - b3))
                steps = min(steps, room)
                for p in range(steps):
                    s0 = moves[row_S[s0] + data_B[b0 + p]]
                    s1 = moves[row_S[s1] + data_B[b1 + p]]
                    s2 = moves[row_S[s2] + data_B[b2 + p]]
                    s3 = moves[row_S[s3] + data_B[b3 + p]]
                    f0, f1, f2, f3 = feature_S[s0], feature_S[s1], feature_S[s2], feature_S[s3]
                    found_4[0, n0] = f0
                    found_4[1, n1] = f1
                    found_4[2, n2] = f2
                    found_4[3, n3] = f3
                    n0 += f0 >= 0
                    n1 += f1 >= 0
                    n2 += f2 >= 0
                    n3 += f3 >= 0
            for lane in range(min(4, count - i)):
                state, n = s0, n0
                if lane == 1:
                    state, n = s1, n1
                elif lane == 2:
                    state, n = s2, n2
                elif lane == 3:
                    state, n = s3, n3
                row = i + lane
                found = found_4[lane]
                before = used
                p = begin_N[row] + steps
                while True:
                    used = _count(found, n, row - first, count_F, head_F, pairs, used)
                    if p == end_N[row]:
                        break
                    stop = min(end_N[row], p + room)
                    n = 0
                    while p < stop:
                        state = moves[row_S[state] + data_B[p]]
                        feature = feature_S[state]
                        found[n] = feature
                        n += feature >= 0
                        p += 1
                for q in range(before, used):
                    feature = pairs[2, q]
                    pairs[2, q] = count_F[feature]
                    count_F[feature] = 0
                known_N[row] = used - before
            i += 4
        last = min(i, count)
        sum_RK[: last - first] = 0
        _add_weights(weights_FK, log_count, head_F, pairs, sum_RK)
        for row in range(first, last):
            for k in range(weights_FK.shape[1]):
                score_NK[row, k] = sum_RK[row - first, k]
        first = last
