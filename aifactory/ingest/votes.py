"""Votes: which answer would others give, by a naive Bayes model of words from which those who are asked are left out. A kernel.

A word of which nobody who gave an answer has said anything counts the same for every answer but for how many rows those have. So
only the answers that a word was used with are looked at, not all.

Legend   N rows, V words, C answers, Z pairs of a word and an answer that stand in a row, G groups that are asked, R rows that are asked.
"""

from __future__ import annotations

import math

import numba
import numpy as np

_I64 = numba.int64[::1]
_F64 = numba.float64[::1]
_BOOL = numba.boolean[::1]


@numba.njit(
    numba.void(
        _I64, _I64, _I64, _I64, _I64, _I64, _I64, _I64, _I64, _I64, _F64, _BOOL, _F64, _I64, _I64, _F64,
        numba.float64, numba.float64, numba.float64, _BOOL, _BOOL,
    ),
    cache=True,
    nogil=True,
)  # fmt: skip
def poll(  # type: ignore[no-untyped-def]
    first_G1,
    place_R,
    token_R1,
    token_T,
    without_G1,
    without_W,
    first_N1,
    token_M,
    pair_M,
    answer_N,
    trust_N,
    silent_N,
    rows_C,
    first_V1,
    answer_Z,
    count_Z,
    smoothing,
    least,
    certain,
    disagrees_R,
    measured_R,
):
    """Of each row that is asked: whether others disagree with its answer, and whether they can tell.

    first_G1, place_R      the rows of each group
    token_R1, token_T      the words that are asked about in each of them
    without_G1, without_W  the rows that have no vote where a group is asked
    first_N1, token_M      the words of all rows; pair_M: the pair of each and the row's answer, -1 where that has no number
    rows_C, count_Z        rows of each answer, and of each pair, each counted as its user is trusted
    first_V1, answer_Z     the pairs of each word
    """
    num_answers = len(rows_C)
    left_C = np.empty(num_answers)
    prior_C = np.empty(num_answers)
    each_C = np.empty(num_answers)
    odds_C = np.empty(num_answers)
    left_Z = count_Z.copy()
    for g in range(len(first_G1) - 1):
        left_C[:] = rows_C
        for w in range(without_G1[g], without_G1[g + 1]):
            place = without_W[w]
            if answer_N[place] < 0 or silent_N[place]:
                continue
            left_C[answer_N[place]] -= trust_N[place]
            for m in range(first_N1[place], first_N1[place + 1]):
                left_Z[pair_M[m]] -= trust_N[place]
        total = 0.0
        for c in range(num_answers):
            left_C[c] = max(left_C[c], 0.0)
            total += left_C[c]
        for c in range(num_answers):
            prior_C[c] = math.log(left_C[c] + 1) if left_C[c] >= least else -np.inf
            each_C[c] = math.log(left_C[c] + smoothing)
        for r in range(first_G1[g], first_G1[g + 1]):
            mine, number = answer_N[place_R[r]], token_R1[r + 1] - token_R1[r]
            disagrees_R[r] = measured_R[r] = False
            if mine < 0 or not number:
                continue
            for c in range(num_answers):
                odds_C[c] = prior_C[c] - number * each_C[c]
            for t in range(token_R1[r], token_R1[r + 1]):
                first, last = first_V1[token_T[t]], first_V1[token_T[t] + 1]
                said = 0.0
                for z in range(first, last):
                    said += max(left_Z[z], 0.0)
                # A row holds a word or does not; what few have said of an answer is drawn to what all say of all.
                usual = smoothing * (said + 0.5) / (total + 1)
                nothing = math.log(usual)
                for z in range(first, last):
                    if left_Z[z] > 0:
                        odds_C[answer_Z[z]] += math.log(left_Z[z] + usual) - nothing
            best, others = 0, -np.inf
            for c in range(1, num_answers):
                if odds_C[c] > odds_C[best]:
                    others = max(others, odds_C[best])
                    best = c
                else:
                    others = max(others, odds_C[c])
            if odds_C[best] > -np.inf and odds_C[best] - others >= certain:
                measured_R[r] = True
                disagrees_R[r] = best != mine
        for w in range(without_G1[g], without_G1[g + 1]):
            place = without_W[w]
            if answer_N[place] >= 0:
                for m in range(first_N1[place], first_N1[place + 1]):
                    left_Z[pair_M[m]] = count_Z[pair_M[m]]
