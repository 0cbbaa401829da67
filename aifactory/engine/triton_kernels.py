"""Kernels of decode steps and prompts of a Llama-like model, for CUDA, in Triton. Imported only where Triton is.

    one row    x ─▶ project(norm) ─▶ attend ─▶ project ─▶ + x ─▶ project(norm, gate) ─▶ project ─▶ + x
    several    x ─▶ normalize ─▶ (product) ─▶ attend ─▶ (product) ─▶ normalize(+ x) ─▶ (product) ─▶ gate ─▶ (product) ─▶ ...
    prompts    as several, with turn ─▶ attend_prompts in place of attend

Of one row each weight is read once, by as many programs as there are blocks of its rows; a norm is one number, which each
program finds on its way through x, so it is no kernel of its own. Five kernels a layer, six where contexts are long. A weight
is the first to leave the cache: nothing reads it again in this step.

Law      x, sums and softmax are in fp32, and so is all of one row; products of several rows are of the weights' type.
Source   online softmax over blocks: Dao et al. 2022, "FlashAttention", arXiv:2205.14135, algorithm 1; its parts side by side
         and merged: Dao et al. 2023, "Flash-Decoding", https://crfm.stanford.edu/2023/10/12/flashdecoding.html; rotary
         positions: Su et al. 2021, arXiv:2104.09864, section 3.4.2, halves as in transformers' `rotate_half`.
Legend   B rows, Q tokens of prompts, K inputs and N outputs of a projection, H heads of keys and values, G queries of each, D width of a head,
         T positions of a row of the cache, P parts of a context.
"""

# Triton's compiler reads annotations as they are: no postponed ones here.
import triton
import triton.language as tl


@triton.jit
def project(
    x_K,
    gain_K,
    weight_NK,
    bias_N,
    out_N,
    K,
    N,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    ADDS: tl.constexpr,
):
    """out = norm(x) W^T + bias for one x, of the rows [pid * BLOCK_N, ...) of W.

    HAS_NORM  x is taken as norm(x) * gain, by the root of its mean square
    IS_GATED  W has 2 N rows: the result is silu(x W1^T) * x W2^T
    ADDS      to what is in `out`
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = (n < N)[:, None]
    rows = weight_NK + n.to(tl.int64)[:, None] * K
    gated_rows = weight_NK + (n + N).to(tl.int64)[:, None] * K
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    gated = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        inside = is_n & (k < K)[None, :]
        w = tl.load(rows + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_K + k, mask=k < K, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            x = x * tl.load(gain_K + k, mask=k < K, other=0.0).to(tl.float32)
        sums += w.to(tl.float32) * x[None, :]
        if IS_GATED:
            w = tl.load(gated_rows + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            gated += w.to(tl.float32) * x[None, :]
    y = tl.sum(sums, axis=1)
    up = tl.sum(gated, axis=1)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
        y = y * scale
        up = up * scale
    if IS_GATED:
        y = y * tl.sigmoid(y) * up
    n_ok = n < N
    if HAS_BIAS:
        y += tl.load(bias_N + n, mask=n_ok, other=0.0).to(tl.float32)
    if ADDS:
        y += tl.load(out_N + n, mask=n_ok, other=0.0)
    tl.store(out_N + n, y, mask=n_ok)


@triton.jit
def normalize(x_BK, y_BK, gain_K, out_BK, K, eps, BLOCK_K: tl.constexpr, ADDS: tl.constexpr):
    """out = norm(x) * gain, of one row; before that x += y where it ADDS."""
    row = tl.program_id(0).to(tl.int64) * K
    k = tl.arange(0, BLOCK_K)
    is_k = k < K
    x = tl.load(x_BK + row + k, mask=is_k, other=0.0)
    if ADDS:
        x += tl.load(y_BK + row + k, mask=is_k, other=0.0).to(tl.float32)
        tl.store(x_BK + row + k, x, mask=is_k)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
    tl.store(out_BK + row + k, x * scale * tl.load(gain_K + k, mask=is_k, other=0.0).to(tl.float32), mask=is_k)


@triton.jit
def gate(y_BN, out_BN, N, BLOCK_N: tl.constexpr):
    """out = silu(y1) * y2, y1 and y2 the halves of a row of y."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = n < N
    y = tl.load(y_BN + row * 2 * N + n, mask=is_n, other=0.0).to(tl.float32)
    up = tl.load(y_BN + row * 2 * N + N + n, mask=is_n, other=0.0).to(tl.float32)
    tl.store(out_BN + row * N + n, y * tl.sigmoid(y) * up, mask=is_n)


@triton.jit
def attend(
    qkv_BN,
    keys_SHTD,
    values_SHTD,
    mask_ST,
    cos_TD,
    sin_TD,
    q_gain_D,
    k_gain_D,
    positions_B,
    rows_B,
    out_BHGD,
    sums_BHPGD,
    most_BHPG,
    weight_BHPG,
    T,
    scaling,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST_PART: tl.constexpr,
    HAS_GAINS: tl.constexpr,
):
    """Write a token's key and value at its position, and attend from it to all positions of its row up to that.

    QUERIES   G rounded up, at least 16
    PARTS     1: the result goes to `out`. Else each part of the context leaves its own for `merge`.
    """
    b, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_B + b).to(tl.int64)
    position = tl.load(positions_B + b)
    d = tl.arange(0, D)
    other_d = (d + D // 2) % D
    sign = tl.where(d < D // 2, -1.0, 1.0)
    cos = tl.load(cos_TD + position * D + d)
    sin = tl.load(sin_TD + position * D + d) * sign
    g = tl.arange(0, QUERIES)
    is_g = g < G
    qkv = qkv_BN + b.to(tl.int64) * ((G + 2) * H * D)
    q_rows = qkv + (h * G + g)[:, None] * D
    q = tl.load(q_rows + d[None, :], mask=is_g[:, None], other=0.0).to(tl.float32)
    q_other = tl.load(q_rows + other_d[None, :], mask=is_g[:, None], other=0.0).to(tl.float32)
    k_row = qkv + (G * H + h) * D
    k = tl.load(k_row + d).to(tl.float32)
    k_other = tl.load(k_row + other_d).to(tl.float32)
    if HAS_GAINS:
        q_scale = tl.rsqrt(tl.sum(q * q, axis=1) / D + eps)[:, None]
        q = q * q_scale * tl.load(q_gain_D + d).to(tl.float32)[None, :]
        q_other = q_other * q_scale * tl.load(q_gain_D + other_d).to(tl.float32)[None, :]
        k_scale = tl.rsqrt(tl.sum(k * k, axis=0) / D + eps)
        k = k * k_scale * tl.load(k_gain_D + d).to(tl.float32)
        k_other = k_other * k_scale * tl.load(k_gain_D + other_d).to(tl.float32)
    dtype = keys_SHTD.dtype.element_ty
    q = (q * cos[None, :] + q_other * sin[None, :]).to(dtype)
    k = (k * cos + k_other * sin).to(dtype)
    v = tl.load(qkv + ((G + 1) * H + h) * D + d).to(dtype)
    states = (row * H + h) * T * D
    length = T
    if PARTS > 1:
        length = tl.maximum(LEAST_PART, tl.cdiv(tl.cdiv(position + 1, PARTS), BLOCK_T) * BLOCK_T)
    begin = part * length
    if part == 0:
        tl.store(keys_SHTD + states + position * D + d, k)
        tl.store(values_SHTD + states + position * D + d, v)
        if h == 0:
            tl.store(mask_ST + row * T + position, 0.0)

    # The token itself is not read back from the cache, where another thread has just put it.
    is_its = (begin <= position) & (position < begin + length)
    own = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scaling
    most = tl.where(is_its, own, float("-inf"))
    weight = tl.where(is_its, tl.full((QUERIES,), 1.0, tl.float32), 0.0)
    sums = weight[:, None] * v.to(tl.float32)[None, :]
    end = tl.minimum(begin + length, position)
    for t_begin in range(begin, end, BLOCK_T):
        t = t_begin + tl.arange(0, BLOCK_T)
        is_t = t < end
        place = states + t[:, None] * D + d[None, :]
        keys = tl.load(keys_SHTD + place, mask=is_t[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scaling
        scores = tl.where(is_t[None, :], scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, axis=1))
        shrink = tl.exp(most - new_most)
        each = tl.exp(scores - new_most[:, None])
        weight = weight * shrink + tl.sum(each, axis=1)
        values = tl.load(values_SHTD + place, mask=is_t[:, None], other=0.0)
        sums = sums * shrink[:, None] + tl.dot(each.to(dtype), values, input_precision="ieee")
        most = new_most
    if PARTS == 1:
        out = out_BHGD + ((b * H + h) * G + g)[:, None] * D + d[None, :]
        tl.store(out, sums / weight[:, None], mask=is_g[:, None])
    else:
        each_g = ((b * H + h) * PARTS + part) * G + g
        tl.store(sums_BHPGD + each_g[:, None] * D + d[None, :], sums, mask=is_g[:, None])
        tl.store(most_BHPG + each_g, most, mask=is_g)
        tl.store(weight_BHPG + each_g, weight, mask=is_g)


@triton.jit
def merge(
    sums_BHPGD,
    most_BHPG,
    weight_BHPG,
    out_BHGD,
    G: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One head's result from those of the parts of its context. A part without positions has -inf and zeros."""
    head, g = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, PARTS)
    d = tl.arange(0, D)
    each = (head * PARTS + part) * G + g
    most = tl.load(most_BHPG + each)
    share = tl.exp(most - tl.max(most, axis=0))
    sums = tl.load(sums_BHPGD + each[:, None] * D + d[None, :])
    total = tl.sum(share * tl.load(weight_BHPG + each), axis=0)
    tl.store(out_BHGD + (head * G + g) * D + d, tl.sum(sums * share[:, None], axis=0) / total)


@triton.jit
def turn(
    qkv_QN,
    keys_SHTD,
    values_SHTD,
    cos_TD,
    sin_TD,
    q_gain_D,
    k_gain_D,
    positions_Q,
    rows_Q,
    q_QHGD,
    num_tokens,
    T,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HAS_GAINS: tl.constexpr,
):
    """Turn queries and keys to their positions; write keys and values to their rows. One program a head of q, k or v."""
    head = tl.program_id(1)
    i = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_i = i < num_tokens
    inside = is_i[:, None]
    row = tl.load(rows_Q + i, mask=is_i, other=0)
    position = tl.load(positions_Q + i, mask=is_i, other=0)
    d = tl.arange(0, D)
    x_rows = qkv_QN + i.to(tl.int64)[:, None] * ((G + 2) * H * D) + head * D
    x = tl.load(x_rows + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if head >= (G + 1) * H:
        place = ((row * H + head - (G + 1) * H) * T + position)[:, None] * D + d[None, :]
        tl.store(values_SHTD + place, x, mask=inside)
    else:
        other_d = (d + D // 2) % D
        other = tl.load(x_rows + other_d[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_GAINS:
            scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
            gain_D = q_gain_D
            if head >= G * H:
                gain_D = k_gain_D
            x = x * scale * tl.load(gain_D + d).to(tl.float32)[None, :]
            other = other * scale * tl.load(gain_D + other_d).to(tl.float32)[None, :]
        at = position[:, None] * D + d[None, :]
        cos = tl.load(cos_TD + at, mask=inside, other=0.0)
        sin = tl.load(sin_TD + at, mask=inside, other=0.0) * tl.where(d < D // 2, -1.0, 1.0)[None, :]
        x = x * cos + other * sin
        if head < G * H:
            tl.store(q_QHGD + i.to(tl.int64)[:, None] * (G * H * D) + head * D + d[None, :], x, mask=inside)
        else:
            place = ((row * H + head - G * H) * T + position)[:, None] * D + d[None, :]
            tl.store(keys_SHTD + place, x, mask=inside)


@triton.jit
def attend_prompts(
    q_QHGD,
    keys_SHTD,
    values_SHTD,
    blocks_B4,
    out_QHGD,
    T,
    scaling,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Attend from each token of a block to all positions of its row up to its own.

    QUERIES   G rounded up to a power of two; a program has those of BLOCK_Q tokens
    """
    block, h = blocks_B4 + tl.program_id(0) * 4, tl.program_id(1)
    first, count = tl.load(block), tl.load(block + 1)
    row, begin = tl.load(block + 2).to(tl.int64), tl.load(block + 3)
    m = tl.arange(0, BLOCK_Q * QUERIES)
    i = m // QUERIES
    g = m % QUERIES
    inside = ((i < count) & (g < G))[:, None]
    d = tl.arange(0, D)
    q_at = ((first + i).to(tl.int64) * (H * G) + h * G + g)[:, None] * D + d[None, :]
    q = tl.load(q_QHGD + q_at, mask=inside, other=0.0)
    states = (row * H + h) * T * D
    sums = tl.zeros((BLOCK_Q * QUERIES, D), tl.float32)
    most = tl.full((BLOCK_Q * QUERIES,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_Q * QUERIES,), tl.float32)
    end = begin + count
    for t_begin in range(0, end, BLOCK_T):
        t = t_begin + tl.arange(0, BLOCK_T)
        is_t = (t < end)[:, None]
        place = states + t[:, None] * D + d[None, :]
        keys = tl.load(keys_SHTD + place, mask=is_t, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scaling
        scores = tl.where(t[None, :] <= (begin + i)[:, None], scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, axis=1))
        shrink = tl.exp(most - new_most)
        each = tl.exp(scores - new_most[:, None])
        weight = weight * shrink + tl.sum(each, axis=1)
        values = tl.load(values_SHTD + place, mask=is_t, other=0.0)
        sums = sums * shrink[:, None] + tl.dot(each.to(values.dtype), values, input_precision="ieee")
        most = new_most
    tl.store(out_QHGD + q_at, sums / weight[:, None], mask=inside)
