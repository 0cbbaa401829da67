"""Near-duplicates: which rows resemble one another over the whole corpus and earlier ones, and which of them survive.

Phase 1   a task for each block of rows: `minhash.signatures`, kept in a file, and `minhash.band_keys`
Phase 2   a task for each row of the keys, over all blocks: `similar_pairs`; reads the signatures of rows that meet
Phase 3   one task: `settle`; reads the signatures of rows that stand in a pair
`near_duplicates` is all of it in one process. Functions of arrays alone; rows are counted through the blocks.

Candidates  Rows that agree in all components of a band (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4);
            `recall` is the share of pairs that meet in one band or more. Equal texts always meet.
Similar     Two rows whose signatures agree in a share of at least `threshold`: an estimate of their Jaccard similarity J,
            with a standard error of at most sqrt(J (1 - J) / P). Only similar rows are called duplicates.
Standing    Earlier rows (those of earlier corpora) come first, then the holdout, then what trains; within each, the lower
            priority. Earlier rows are never dropped.
Law 1       A new row that trains is dropped where it is similar to a row of the holdout, earlier or new, which may itself be
            dropped (it could be restored). Such a row is no reason to drop another.
Law 2       The others are taken in the order of their standing; a row is dropped where it is similar to one that was
            kept before it in its component (the rows that pairs connect). So in a chain A ~ B ~ C in which A and C are not
            similar, A and C stay: no row is dropped for a row that it doesn't resemble. Every dropped row resembles the
            row that is named for it, and no two kept rows make a pair.
Bounds      Against quadratic cost in corpora made from templates: a row is compared with at most _MOST_COMPARED new rows of
            a bucket that are not similar to one another, and in its component with that many kept rows and rows of the
            holdout beside those that it makes a pair with. Comparison with earlier rows and with the holdout of the
            same bucket knows no bound.
Same        The result depends on the rows and their standing alone: not on where blocks are cut, nor on the order of
            blocks, bands or pairs, as long as no two rows share a priority (of two that do the one that is counted first goes first).
Memory      Beside the signatures' file: `similar_pairs` about 40 bytes a row; `settle` 50 a row and 100 a pair; and in both the
            signatures of _CHUNK_ROWS rows, or of the largest bucket or component where that is more.

Import this module where it is needed: numba takes its time.

Legend   N rows in all blocks, P components of a signature, K rows of keys, C pairs, M rows that stand in a bucket or a pair,
         G buckets or components.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from aifactory.ingest.minhash import NUM_BANDS, ROWS_PER_BAND, band_keys

THRESHOLD = 0.45
"""With runs of 3 words that is one word in seven replaced. Texts of 200 to 400 words of which one word in ten was replaced have
a similarity of 0.56 (standard deviation 0.016), estimated by 96 components within 0.045: two and a half deviations above.
It is made for documents. Of requests of eight words it calls those alike that differ in one word or two, a sixth of 15,000
labelled ones: there take 0.8.
"""

_MOST_COMPARED = 256
_CHUNK_ROWS = 1 << 16

Signatures = Sequence[npt.NDArray[np.uint32]]
"""The blocks' signatures [rows of the block, P], one after the other; mapped into memory or not."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Who goes before whom, for N rows.

    Raises   ValueError where the arrays differ in length.
    """

    priority_N: npt.NDArray[np.int64]
    """The lower goes first among the earlier rows, among the new ones of the holdout, and among the new ones that train."""
    is_holdout_N: npt.NDArray[np.bool_]
    """Else the row trains."""
    is_earlier_N: npt.NDArray[np.bool_]
    """Rows of earlier corpora."""

    def __post_init__(self) -> None:
        lengths = (len(self.priority_N), len(self.is_holdout_N), len(self.is_earlier_N))
        if len(set(lengths)) != 1:
            raise ValueError(f"expected priority, holdout and earlier of the same rows, found {lengths} values")

    def order(self, row_M: npt.NDArray[np.int64], group_M: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """What sorts the rows by group, then by standing."""
        new_M = ~self.is_earlier_N[row_M]
        return np.lexsort((row_M, self.priority_N[row_M], new_M & ~self.is_holdout_N[row_M], new_M, group_M))


@dataclass(frozen=True, slots=True)
class Settled:
    """What becomes of N rows. A row is dropped where `survivor_N` or `holdout_N` names a row."""

    survivor_N: npt.NDArray[np.int64]
    """The kept row that this one is most similar to (law 2); -1 where there is none."""
    similarity_N: npt.NDArray[np.float64]
    """The estimated Jaccard similarity to it; 0 where there is none."""
    holdout_N: npt.NDArray[np.int64]
    """Of a new row that trains, the row of the holdout that it is most similar to, kept or not (law 1); -1 where there is none."""
    holdout_similarity_N: npt.NDArray[np.float64]
    """The estimated Jaccard similarity to it; 0 where there is none."""

    @property
    def dropped(self) -> npt.NDArray[np.bool_]:
        """Which of the N rows are dropped."""
        return (self.survivor_N >= 0) | (self.holdout_N >= 0)


def recall(similarity: float, num_bands: int = NUM_BANDS, rows_per_band: int = ROWS_PER_BAND) -> float:
    """The share of pairs of this Jaccard similarity J that become candidates: 1 - (1 - J^rows_per_band)^num_bands.

    The S-curve of Mining of Massive Datasets, 3.4.2; its steepest point is near (1 / num_bands)^(1 / rows_per_band), 0.31
    by default. By default 0.81 at 0.37, 0.95 at 0.45, 0.987 at 0.5, 0.998 at 0.56, and 1 - 10^-8 at 0.76. Of the
    candidates with J near the threshold, about half are then found similar.
    """
    return 1.0 - (1.0 - similarity**rows_per_band) ** num_bands


def similar_pairs(
    key_N: npt.NDArray[np.uint64], signatures: Signatures, standing: Standing, *, threshold: float = THRESHOLD
) -> npt.NDArray[np.int64]:
    """Pairs int64[C, 2] of similar rows that share a key; the first stands before the second, which is a new row.

    Not all of them, but what `settle` needs: each new row with the first earlier row and, where it trains, with the first
    row of the holdout that it is similar to; otherwise with each leader, that is each new row which is similar to none before it.
    Rows that follow the same leader need no pair, since `settle` compares the rows of a component; of two that follow different
    ones, the pair is left to the other bands.
    """
    needed = _equal_components(signatures, threshold)
    pairs = [np.empty((0, 2), np.int64)]
    row_M, end_G = _buckets(key_N, standing)
    for start, stop, end_g in _chunks(end_G):
        row_m = row_M[start:stop]
        pair_C2 = _link(
            _gather(signatures, row_m), end_g, standing.is_holdout_N[row_m], standing.is_earlier_N[row_m], needed
        )
        pairs.append(row_m[pair_C2])
    return np.concatenate(pairs)


def settle(
    pairs: Sequence[npt.NDArray[np.int64]], signatures: Signatures, standing: Standing, *, threshold: float = THRESHOLD
) -> Settled:
    """What becomes of each row, from the pairs of all rows of the keys."""
    needed = _equal_components(signatures, threshold)
    count = len(standing.priority_N)
    settled = Settled(
        survivor_N=np.full(count, -1, np.int64),
        similarity_N=np.zeros(count),
        holdout_N=np.full(count, -1, np.int64),
        holdout_similarity_N=np.zeros(count),
    )
    pair_C2 = np.concatenate([np.empty((0, 2), np.int64), *pairs])
    if not len(pair_C2):
        return settled
    stands_N = np.zeros(count, np.bool_)
    stands_N[pair_C2] = True
    row_M = np.flatnonzero(stands_N)
    pair_C2 = (np.cumsum(stands_N) - 1)[pair_C2]
    component_M = _components(pair_C2, len(row_M))

    # From here on rows are numbered by component and standing.
    order_M = standing.order(row_M, component_M)
    row_M, component_M = row_M[order_M], component_M[order_M]
    number_M = np.empty_like(order_M)
    number_M[order_M] = np.arange(len(order_M))
    pair_C2 = number_M[pair_C2]
    # Bands find the same pair again and again. (numpy.unique hashes, which takes far longer than sorting.)
    code_C = np.sort(pair_C2[:, 1] * len(row_M) + pair_C2[:, 0])
    code_C = code_C[np.append(True, code_C[1:] != code_C[:-1])]
    partner_C, second_C = code_C % len(row_M), code_C // len(row_M)
    partner_end_M1 = np.searchsorted(second_C, np.arange(len(row_M) + 1))
    end_G = np.append(np.flatnonzero(component_M[1:] != component_M[:-1]) + 1, len(row_M))

    for start, stop, end_g in _chunks(end_G):
        row_m = row_M[start:stop]
        signature_mP = _gather(signatures, row_m)
        found_4m = _settle(
            signature_mP,
            end_g,
            standing.is_holdout_N[row_m],
            standing.is_earlier_N[row_m],
            partner_C[partner_end_M1[start] : partner_end_M1[stop]] - start,
            partner_end_M1[start : stop + 1] - partner_end_M1[start],
            needed,
        )
        components = signature_mP.shape[1]
        for named_m, equal_m, row_N, similarity_N in (
            (found_4m[0], found_4m[1], settled.survivor_N, settled.similarity_N),
            (found_4m[2], found_4m[3], settled.holdout_N, settled.holdout_similarity_N),
        ):
            is_named_m = named_m >= 0
            row_N[row_m[is_named_m]] = row_m[named_m[is_named_m]]
            similarity_N[row_m[is_named_m]] = equal_m[is_named_m] / components
    return settled


def near_duplicates(
    signatures: Signatures,
    standing: Standing,
    *,
    num_bands: int = NUM_BANDS,
    rows_per_band: int = ROWS_PER_BAND,
    threshold: float = THRESHOLD,
) -> Settled:
    """All phases in this process, for corpora whose keys fit into memory (8 bytes a row and band)."""
    blocks = [band_keys(block, num_bands=num_bands, rows_per_band=rows_per_band) for block in signatures]
    key_KN = np.concatenate(blocks, axis=1) if blocks else np.empty((0, 0), np.uint64)
    pairs = [similar_pairs(key_N, signatures, standing, threshold=threshold) for key_N in key_KN]
    return settle(pairs, signatures, standing, threshold=threshold)


# ── buckets, chunks, components ───────────────────────────────────────────────────────────────────────────────────────


def _equal_components(signatures: Signatures, threshold: float) -> int:
    """How many components must agree."""
    if not 0 < threshold <= 1:
        raise ValueError(f"expected a threshold above 0 and of at most 1, found {threshold}")
    components = signatures[0].shape[1] if len(signatures) else 1
    # A threshold that is a whole number of components is met by as many, whatever the product is rounded to.
    return math.ceil(threshold * components - 1e-9)


def _buckets(key_N: npt.NDArray[np.uint64], standing: Standing) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows of the keys that two rows or more have, of which one is new, sorted by key and standing; where each key ends."""
    if not len(key_N):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    order_N = np.argsort(key_N)
    key_sorted_N = key_N[order_N]
    first_G = np.flatnonzero(np.append(True, key_sorted_N[1:] != key_sorted_N[:-1]))
    length_G = np.diff(first_G, append=len(key_N))
    new_G = np.add.reduceat(~standing.is_earlier_N[order_N], first_G, dtype=np.int64)
    is_bucket_G = (length_G > 1) & (new_G > 0) & (key_sorted_N[first_G] != 0)
    row_M = order_N[np.repeat(is_bucket_G, length_G)]
    group_M = np.repeat(np.arange(np.count_nonzero(is_bucket_G)), length_G[is_bucket_G])
    return row_M[standing.order(row_M, group_M)], np.cumsum(length_G[is_bucket_G])


def _chunks(end_G: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
    """Whole groups of at most _CHUNK_ROWS rows together, or one that is larger: where they begin and end, and the ends of
    each counted from there."""
    group = start = 0
    while group < len(end_G):
        after = max(int(np.searchsorted(end_G, start + _CHUNK_ROWS, "right")), group + 1)
        stop = int(end_G[after - 1])
        yield start, stop, end_G[group:after] - start
        group, start = after, stop


def _gather(signatures: Signatures, row_M: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """The signatures of the rows, uint32[M, P]."""
    first_row = np.cumsum([0, *(len(block) for block in signatures)])
    # In the order in which they lie in the files.
    place_M = np.argsort(row_M)
    bound_of_block = np.searchsorted(row_M[place_M], first_row)
    signature_MP = np.empty((len(row_M), signatures[0].shape[1]), np.uint32)
    for block, begin, end in zip(range(len(signatures)), bound_of_block[:-1], bound_of_block[1:], strict=True):
        if begin < end:
            place = place_M[begin:end]
            signature_MP[place] = signatures[block][row_M[place] - first_row[block]]
    return signature_MP


@numba.njit(cache=True, nogil=True)
def _components(pair_C2, count):  # type: ignore[no-untyped-def]
    """The least row that each of `count` rows is connected with, by union-find with path halving."""
    parent_M = np.arange(count)
    for c in range(len(pair_C2)):
        a, b = pair_C2[c, 0], pair_C2[c, 1]
        while parent_M[a] != a:
            parent_M[a] = parent_M[parent_M[a]]
            a = parent_M[a]
        while parent_M[b] != b:
            parent_M[b] = parent_M[parent_M[b]]
            b = parent_M[b]
        parent_M[max(a, b)] = min(a, b)
    # A parent is never the greater, so that all parents before a row already name the least.
    for m in range(count):
        parent_M[m] = parent_M[parent_M[m]]
    return parent_M


# ── comparisons ───────────────────────────────────────────────────────────────────────────────────────────────────────


@numba.njit(cache=True, nogil=True)
def _equal(signature_MP, a, b):  # type: ignore[no-untyped-def]
    """How many components of two rows agree."""
    count = np.int64(0)
    for p in range(signature_MP.shape[1]):
        count += signature_MP[a, p] == signature_MP[b, p]
    return count


@numba.njit(cache=True, nogil=True)
def _first_similar(signature_MP, m, others, needed):  # type: ignore[no-untyped-def]
    """The first of the others that is similar to row m; -1 where none is."""
    for other in others:
        if _equal(signature_MP, other, m) >= needed:
            return other
    return np.int64(-1)


@numba.njit(cache=True, nogil=True)
def _link(signature_MP, end_G, is_holdout_M, is_earlier_M, needed):  # type: ignore[no-untyped-def]
    """The pairs of `similar_pairs`, for rows sorted by bucket and standing."""
    pair_C2 = np.empty((len(signature_MP), 2), np.int64)
    count = 0
    earlier = np.empty(len(signature_MP), np.int64)
    holdout = np.empty(len(signature_MP), np.int64)
    leaders = np.empty(_MOST_COMPARED, np.int64)
    begin = 0
    for end in end_G:
        earlier_count = holdout_count = leader_count = 0
        for m in range(begin, end):
            if count + _MOST_COMPARED + 2 > len(pair_C2):
                grown = np.empty((2 * len(pair_C2) + _MOST_COMPARED + 2, 2), np.int64)
                grown[:count] = pair_C2[:count]
                pair_C2 = grown
            is_paired = False
            if not is_earlier_M[m]:
                # The first earlier row may be one of the holdout too, but then the pair is found once more at most.
                for others in (earlier[:earlier_count], holdout[: 0 if is_holdout_M[m] else holdout_count]):
                    other = _first_similar(signature_MP, m, others, needed)
                    if other >= 0:
                        pair_C2[count] = other, m
                        count += 1
                        is_paired = True
                # A row that is dropped for certain is no reason to drop another, so that it meets no leader.
                if not is_paired:
                    for leader in leaders[:leader_count]:
                        if _equal(signature_MP, leader, m) >= needed:
                            pair_C2[count] = leader, m
                            count += 1
                            is_paired = True
                    if not is_paired and leader_count < _MOST_COMPARED:
                        leaders[leader_count] = m
                        leader_count += 1
            else:
                earlier[earlier_count] = m
                earlier_count += 1
            if is_holdout_M[m]:
                holdout[holdout_count] = m
                holdout_count += 1
        begin = end
    return pair_C2[:count]


@numba.njit(cache=True, nogil=True)
def _settle(signature_MP, end_G, is_holdout_M, is_earlier_M, partner_C, partner_end_M1, needed):  # type: ignore[no-untyped-def]
    """For rows sorted by component and standing: the kept row that each is dropped for and how many components agree, and the
    same for the row of the holdout; -1 where there is none.

    The partners of row m, which stand before it, are partner_C[partner_end_M1[m] : partner_end_M1[m + 1]].
    """
    found_4M = np.full((4, len(signature_MP)), -1, np.int64)
    is_kept_M = np.zeros(len(signature_MP), np.bool_)
    kept = np.empty(_MOST_COMPARED, np.int64)
    holdout = np.empty(_MOST_COMPARED, np.int64)
    begin = 0
    for end in end_G:
        kept_count = holdout_count = 0
        for m in range(begin, end):
            if not is_earlier_M[m]:
                partners = partner_C[partner_end_M1[m] : partner_end_M1[m + 1]]
                for others in (kept[:kept_count], partners):
                    for other in others:
                        if is_kept_M[other]:
                            equal = _equal(signature_MP, other, m)
                            if equal >= needed and equal > found_4M[1, m]:
                                found_4M[0, m], found_4M[1, m] = other, equal
                if not is_holdout_M[m]:
                    for others in (holdout[:holdout_count], partners):
                        for other in others:
                            if is_holdout_M[other]:
                                equal = _equal(signature_MP, other, m)
                                if equal >= needed and equal > found_4M[3, m]:
                                    found_4M[2, m], found_4M[3, m] = other, equal
            if found_4M[0, m] < 0 and found_4M[2, m] < 0:
                is_kept_M[m] = True
                if kept_count < _MOST_COMPARED:
                    kept[kept_count] = m
                    kept_count += 1
            if is_holdout_M[m] and holdout_count < _MOST_COMPARED:
                holdout[holdout_count] = m
                holdout_count += 1
        begin = end
    return found_4M
