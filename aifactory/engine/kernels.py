"""Kernels: a Llama-like model's forward as one compiled function that several threads run side by side.

Why      At batch 1 a step reads every weight once and does little else: it should take as long as reading them. torch's own
         matrix-vector product moves a third of what memory gives, and the many small operations between products add to it.
Threads  Every thread calls `forward` with its number; each takes some rows of a matrix after others, until none are left, and waits
         for the others at barriers (`worksharing.py`).
Law      Whatever the batch and the number of threads, a row's bits depend on its own tokens, its own cache and the processor alone
         (`vectors.py` has the order of all sums).
Weights  float32; bfloat16, read as int16; int8 with a scale for each row of the matrix; by panels (`products.py`). With bfloat16 what
         is multiplied by a matrix is rounded to it too, and so are keys and values; all else is float32, sums included.
Tiles    prompts may go through the processor's matrix unit (`tiles.py`), decode steps only with weights of bfloat16, as all then do. With
         others a token's bits depend on whether it was read or written, too.

Import this module where it is needed: numba takes its time.

Legend   B tokens of a step, O of them with logits, L layers, H hidden, N rows and K columns of a matrix, P panels of PANEL rows, D head
         dim, A heads, G heads_kv, I inner width of the MLP, V vocabulary, S slots and T positions of the cache, X adapters.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from aifactory.engine.compilation import kernel
from aifactory.engine.matrix_unit import MOST_PANELS, terms_beside
from aifactory.engine.products import (
    add,
    expand,
    gate,
    padded,
    product_block,
    product_of,
    reduce,
    scale,
)
from aifactory.engine.tiles import cut_row
from aifactory.engine.vectors import (
    LANES,
    MOST_VECTORS,
    PANEL,
    PANELS_OF_MANY,
    dot_row,
    exp_of,
    largest_of,
    panel_beside,
    panels_beside,
    pointer_to,
    round_in_place,
    sum_of,
    weigh,
)
from aifactory.engine.worksharing import PANELS_AT_LEAST, next_of, next_part, part_of, wait_for_all


@kernel
def _normalise(x_H: Any, weight_H: Any, epsilon: float, y_H: Any) -> None:
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467); y may be x, and must not hold less."""
    width = len(weight_H)
    total = np.empty(1, np.float32)
    dot_row(x_H, 0, x_H, width, total)
    factor = np.float32(1.0) / np.sqrt(total[0] / np.float32(width) + np.float32(epsilon))
    for h in range(len(weight_H)):
        y_H[h] = weight_H[h] * (x_H[h] * factor)


@kernel
def _rotate(x_D: Any, cos_D: Any, sin_D: Any) -> None:
    """Rotary positions, halves against each other, as Hugging Face lays them out (Su et al. 2021, arXiv:2104.09864)."""
    half = len(x_D) // 2
    for d in range(half):
        low, high = x_D[d], x_D[half + d]
        x_D[d] = low * cos_D[d] - high * sin_D[d]
        x_D[half + d] = high * cos_D[half + d] + low * sin_D[half + d]


@kernel
def _attend(
    q_QD: Any, keys_PD: Any, values_TD: Any, length: int, growth: int, scaling: float, scores_QT: Any, out_QD: Any
) -> None:
    """Softmax attention of up to MOST_VECTORS queries over the same keys, the first over `length` positions, the next over `growth` more."""
    num_queries, width = q_QD.shape
    longest = length + growth * (num_queries - 1)
    product_block(keys_PD, q_QD, scores_QT, num_queries, 0, (longest + PANEL - 1) // PANEL)
    for q in range(num_queries):
        scores_T = scores_QT[q]
        end = length + growth * q
        # Up to a whole vector.
        for t in range(end, (end + LANES - 1) // LANES * LANES):
            scores_T[t] = -np.inf
        exp_of(scores_T, end, largest_of(scores_T, end), np.float32(scaling))
        # Of what comes after its own position a query takes nothing.
        for t in range(end, max(longest, (end + LANES - 1) // LANES * LANES)):
            scores_T[t] = np.float32(0.0)
    scores_step, out_step = scores_QT.strides[0] // 4, out_QD.strides[0] // 4
    d = 0
    while d + PANEL * PANELS_OF_MANY <= width:
        panels_beside(values_TD, d, width, scores_QT, scores_step, num_queries, longest, out_QD[0, d:], out_step)
        d += PANEL * PANELS_OF_MANY
    while d + PANEL <= width:
        panel_beside(values_TD, d, width, scores_QT, scores_step, num_queries, longest, out_QD[0, d:], out_step)
        d += PANEL
    for q in range(num_queries):
        if d < width:
            weigh(scores_QT[q], longest, values_TD, d, width, out_QD[q])
        total = sum_of(scores_QT[q], length + growth * q)
        for i in range(width):
            out_QD[q, i] /= total


@kernel
def _states_of(address_2: Any, start: int, num_positions: int, width: int, kind: Any) -> tuple[Any, Any]:
    """One head's keys in panels, of bfloat16 by pairs of elements, and its values (T, D), which begin `start` elements on."""
    size, pairs = kind.itemsize, 4 // kind.itemsize
    keys_PD = numba.carray(
        pointer_to(address_2[0] + size * start),
        (num_positions // PANEL, width // pairs, pairs * PANEL),
        dtype=kind.dtype,
    )
    values_TD = numba.carray(pointer_to(address_2[1] + size * start), (num_positions, width), dtype=kind.dtype)
    return keys_PD, values_TD


@kernel
def _write_state(key_D: Any, value_D: Any, position: int, keys_PD: Any, values_TD: Any) -> None:
    """A token's key and value to their place."""
    per = keys_PD.shape[2] // PANEL
    if per == 1:
        for d in range(len(key_D)):
            keys_PD[position // PANEL, d, position % PANEL] = key_D[d]
            values_TD[position, d] = value_D[d]
        return
    round_in_place(key_D, len(key_D))
    round_in_place(value_D, len(value_D))
    key_bits, value_bits = key_D.view(np.int32), value_D.view(np.int32)
    for d in range(len(key_D)):
        keys_PD[position // PANEL, d // 2, position % PANEL * 2 + d % 2] = key_bits[d] >> 16
        values_TD[position, d] = value_bits[d] >> 16


@kernel
def _make_ready(x_K: Any, b: int, is_tiled: bool, left: Any, terms: int) -> None:
    """Vector b for what comes next to multiply it: rounded where it is to be of one term, and put among the tiles."""
    if terms == 1:
        round_in_place(x_K, len(x_K))
    if is_tiled:
        cut_row(x_K, b, left, terms)


@kernel
def forward(
    thread: int,
    num_threads: int,
    sync: Any,
    x_BH: Any,
    row_B: Any,
    position_B: Any,
    last_O: Any,
    adapter_B: Any,
    has_adapters: bool,
    low_rank_a: Any,
    low_rank_b: Any,
    address_L2: Any,
    kind: Any,
    shape: Any,
    weights: Any,
    scales: Any,
    biases: Any,
    norms: Any,
    head: Any,
    rotary: Any,
    buffers: Any,
    is_tiled: bool,
    left: Any,
    rights: Any,
    sums: Any,
    hidden_OH: Any,
    logits_OV: Any,
) -> None:
    """Tokens of one row or of many, from embeddings to logits; their keys and values are written into the cache.

    x_BH        the embeddings; overwritten
    row_B       of the cache, which each token belongs to; its former tokens are in the cache or in this step
    position_B  in that row
    last_O      which tokens something is wanted of: their hidden states after the last norm, in hidden_OH, and their
                logits, unless logits_OV has no columns
    adapter_B   which of the X adapters each token has, -1 for none; has_adapters whether any has one
    low_rank_a  of each of the four weights (X, L, parts * rank, columns), parts being q, k, v and gate, up; the rank, the
                same for all, is a multiple of eight; low_rank_b (X, L, P * PANEL, rank)
    address_L2  where each layer's keys (S, G, T / PANEL, D, PANEL) and values (S, G, T, D) begin; of bfloat16 keys are
                (S, G, T / PANEL, D / 2, PANEL, 2)
    kind        an array of the type that they have, float32 or int16
    shape       (A, G, D, T, I, whether queries and keys are normalised, epsilon, scaling of scores)
    weights     (L, P, K, PANEL): queries, keys and values, each of whole panels, from H columns; out, of A D; gate and up, each of
                whole panels, of H; down, of I; of bfloat16 (L, P, K / 2, 2 * PANEL), K rounded up to what a tile holds
    scales      of each of them (L, P * PANEL), (L, 0) where there are none; biases likewise
    norms       before attention (L, H), before the MLP (L, H), of queries (L, D) and keys (L, D), the last one (H,)
    head        (P, H, PANEL) with its scale (P * PANEL,) or (0,), and its bias likewise
    rotary      cosines and sines (T, D)
    buffers     of at least B rows: (B, 3 * rank), (B, H), that of queries, keys and values, (B, A D), (B, H), that of gate and up, as
                many columns as their panels have rows; of each thread (MOST_VECTORS, T)
    is_tiled    whether matrices are multiplied by tiles; the head is with weights of bfloat16 alone
    left        room for the tiles of B vectors of the longest kind; rights (threads, room for a thread's tiles of weights), sums likewise
                for its sums of B vectors
    logits_OV   likewise
    """
    num_heads, num_heads_kv, width, num_positions, num_inner, has_head_norms, epsilon, scaling = shape
    w_qkv, w_out, w_up, w_down = weights
    s_qkv, s_out, s_up, s_down = scales
    b_qkv, b_out, b_up, b_down = biases
    norm_attention, norm_mlp, norm_q, norm_k, norm_last = norms
    low, normed, qkv, attended, added, inner, scores = buffers
    never = np.int64(1) << 40
    num_rows, hidden = x_BH.shape
    num_layers, num_padded = w_qkv.shape[0], padded(num_inner)
    inner_BI = inner[:, :num_inner]
    terms = terms_beside(w_qkv)
    has_other_rows = is_tiled or terms == 1
    keys_at = padded(num_heads * width)
    values_at = keys_at + padded(num_heads_kv * width)
    group = num_heads // num_heads_kv
    row_size = num_heads_kv * num_positions * width
    cos_TD, sin_TD = rotary
    right, parts = rights[thread], sums[thread]
    together = MOST_PANELS if is_tiled else PANELS_AT_LEAST
    # Tokens of a prompt go together, those of a step have keys of their own.
    per_piece = MOST_VECTORS if num_rows > 1 and row_B[0] == row_B[1] else 1
    num_pieces = (num_rows + per_piece - 1) // per_piece
    for layer in range(num_layers):
        for b in range(thread, num_rows, num_threads):
            _normalise(x_BH[b], norm_attention[layer], epsilon, normed[b])
            _make_ready(normed[b], b, is_tiled, left, terms)
        wait_for_all(sync, num_threads)

        begin, end = next_part(sync, w_qkv.shape[1], num_threads, together)
        while begin < end:
            product_of(w_qkv[layer], normed, qkv, num_rows, begin, end, is_tiled, left, right, parts)
            scale(qkv, s_qkv[layer], b_qkv[layer], num_rows, PANEL * begin, PANEL * end)
            begin, end = next_part(sync, w_qkv.shape[1], num_threads, together)
        if has_adapters:
            reduce(thread, num_threads, low_rank_a[0], layer, normed, adapter_B, low)
            wait_for_all(sync, num_threads)
            begin, end = part_of(PANEL * w_qkv.shape[1], thread, num_threads)
            expand(low_rank_b[0], layer, low, adapter_B, qkv, begin, end, keys_at, values_at)
        wait_for_all(sync, num_threads)

        # Sixteen tokens of one head: where they follow one another, their keys are in the same lines of the cache.
        for piece in range(thread, (num_rows + PANEL - 1) // PANEL * num_heads_kv, num_threads):
            first, g = piece // num_heads_kv * PANEL, piece % num_heads_kv
            for b in range(first, min(first + PANEL, num_rows)):
                position = position_B[b]
                start = row_B[b] * row_size + g * num_positions * width
                keys_PD, values_TD = _states_of(address_L2[layer], start, num_positions, width, kind)
                key_D = qkv[b, keys_at + g * width : keys_at + (g + 1) * width]
                if has_head_norms:
                    _normalise(key_D, norm_k[layer], epsilon, key_D)
                _rotate(key_D, cos_TD[position], sin_TD[position])
                value_D = qkv[b, values_at + g * width : values_at + (g + 1) * width]
                _write_state(key_D, value_D, position, keys_PD, values_TD)
        wait_for_all(sync, num_threads)

        piece = next_of(sync)
        while piece < num_pieces * num_heads_kv:
            g = piece % num_heads_kv
            b = piece // num_heads_kv * per_piece
            last = min(num_rows, b + per_piece)
            while b < last:
                position, count = position_B[b], 1
                while b + count < last and row_B[b + count] == row_B[b] and position_B[b + count] == position + count:
                    count += 1
                start = row_B[b] * row_size + g * num_positions * width
                keys_PD, values_TD = _states_of(address_L2[layer], start, num_positions, width, kind)
                for q in range(b, b + count):
                    for a in range(g * group, (g + 1) * group):
                        q_D = qkv[q, a * width : (a + 1) * width]
                        if has_head_norms:
                            _normalise(q_D, norm_q[layer], epsilon, q_D)
                        _rotate(q_D, cos_TD[position + q - b], sin_TD[position + q - b])
                if count == 1:
                    # The heads that share these keys go together.
                    for a in range(g * group, (g + 1) * group, MOST_VECTORS):
                        shape_QD = min(MOST_VECTORS, (g + 1) * group - a), width
                        columns = slice(a * width, (a + shape_QD[0]) * width)
                        q_QD, out_QD = qkv[b, columns].reshape(shape_QD), attended[b, columns].reshape(shape_QD)
                        _attend(q_QD, keys_PD, values_TD, position + 1, 0, scaling, scores[thread], out_QD)
                else:
                    for a in range(g * group, (g + 1) * group):
                        rows, columns = slice(b, b + count), slice(a * width, (a + 1) * width)
                        q_QD, out_QD = qkv[rows, columns], attended[rows, columns]
                        _attend(q_QD, keys_PD, values_TD, position + 1, 1, scaling, scores[thread], out_QD)
                b += count
            piece = next_of(sync)
        wait_for_all(sync, num_threads)

        if has_other_rows:
            for b in range(thread, num_rows, num_threads):
                _make_ready(attended[b], b, is_tiled, left, terms)
            wait_for_all(sync, num_threads)

        begin, end = next_part(sync, w_out.shape[1], num_threads, together)
        while begin < end:
            product_of(w_out[layer], attended, added, num_rows, begin, end, is_tiled, left, right, parts)
            scale(added, s_out[layer], b_out[layer], num_rows, PANEL * begin, PANEL * end)
            if not has_adapters:
                add(x_BH, added, num_rows, PANEL * begin, PANEL * end)
            begin, end = next_part(sync, w_out.shape[1], num_threads, together)
        if has_adapters:
            reduce(thread, num_threads, low_rank_a[1], layer, attended, adapter_B, low)
            wait_for_all(sync, num_threads)
            begin, end = part_of(padded(hidden), thread, num_threads)
            expand(low_rank_b[1], layer, low, adapter_B, added, begin, end, never, never)
            add(x_BH, added, num_rows, begin, end)
        wait_for_all(sync, num_threads)

        for b in range(thread, num_rows, num_threads):
            _normalise(x_BH[b], norm_mlp[layer], epsilon, normed[b])
            _make_ready(normed[b], b, is_tiled, left, terms)
        wait_for_all(sync, num_threads)

        # The same rows of gate and up, so that their product needs no barrier.
        begin, end = next_part(sync, num_padded // PANEL, num_threads, together)
        while begin < end:
            for start in (0, num_padded // PANEL):
                product_of(
                    w_up[layer], normed, inner, num_rows, start + begin, start + end, is_tiled, left, right, parts
                )
                scale(inner, s_up[layer], b_up[layer], num_rows, PANEL * (start + begin), PANEL * (start + end))
            if not has_adapters:
                gate(inner, num_rows, num_padded, PANEL * begin, PANEL * end)
            begin, end = next_part(sync, num_padded // PANEL, num_threads, together)
        if has_adapters:
            reduce(thread, num_threads, low_rank_a[2], layer, normed, adapter_B, low)
            wait_for_all(sync, num_threads)
            begin, end = part_of(num_padded, thread, num_threads)
            for start in (0, num_padded):
                expand(low_rank_b[2], layer, low, adapter_B, inner, start + begin, start + end, num_padded, never)
            gate(inner, num_rows, num_padded, begin, end)
        wait_for_all(sync, num_threads)

        if has_other_rows:
            for b in range(thread, num_rows, num_threads):
                _make_ready(inner_BI[b], b, is_tiled, left, terms)
            wait_for_all(sync, num_threads)

        begin, end = next_part(sync, w_down.shape[1], num_threads, together)
        while begin < end:
            product_of(w_down[layer], inner_BI, added, num_rows, begin, end, is_tiled, left, right, parts)
            scale(added, s_down[layer], b_down[layer], num_rows, PANEL * begin, PANEL * end)
            if not has_adapters:
                add(x_BH, added, num_rows, PANEL * begin, PANEL * end)
            begin, end = next_part(sync, w_down.shape[1], num_threads, together)
        if has_adapters:
            reduce(thread, num_threads, low_rank_a[3], layer, inner, adapter_B, low)
            wait_for_all(sync, num_threads)
            begin, end = part_of(padded(hidden), thread, num_threads)
            expand(low_rank_b[3], layer, low, adapter_B, added, begin, end, never, never)
            add(x_BH, added, num_rows, begin, end)
        wait_for_all(sync, num_threads)

    with_logits = logits_OV.shape[1] > 0
    is_head_tiled = is_tiled and terms == 1
    for o in range(thread, len(last_O), num_threads):
        _normalise(x_BH[last_O[o]], norm_last, epsilon, hidden_OH[o])
        if with_logits:
            _make_ready(hidden_OH[o], o, is_head_tiled, left, terms)
    wait_for_all(sync, num_threads)
    if not with_logits:
        return
    w_head, s_head, b_head = head
    begin, end = next_part(sync, w_head.shape[0], num_threads, PANELS_AT_LEAST)
    while begin < end:
        product_of(w_head, hidden_OH, logits_OV, len(last_O), begin, end, is_head_tiled, left, right, parts)
        scale(logits_OV, s_head, b_head, len(last_O), PANEL * begin, PANEL * end)
        begin, end = next_part(sync, w_head.shape[0], num_threads, PANELS_AT_LEAST)
    wait_for_all(sync, num_threads)
