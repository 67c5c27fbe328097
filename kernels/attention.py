"""Fused attention in Triton, forward and backward, without ever holding the (T, S) weights.

Forward: FlashAttention-2's online softmax (arXiv 2307.08691), in base 2. Backward: two kernels, one for a block of keys
(dK and dV, over all queries that see them), one for a block of queries (dQ), so that no sum depends on an order of
arrival; or one kernel that adds dQ atomically, which is faster and not deterministic.

Shapes: B batch, T queries, S keys, H query heads, H_kv key-value heads, D head size. Query i stands at i + S - T among
the keys. Scores are kept in units of log2: s = q kᵀ · scale · log2 e, lse = log2 Σ 2^s, +inf where no key is visible.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.common import LintCase, dot, next_power_of_2, round_to
from kernels.reference import check_attention

MAX_HEAD_SIZE = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2_E = math.log2(math.e)
TILES = {
    # (16-bit, largest head size): forward, backward by keys, backward by queries; each queries, keys, warps, stages
    (True, 64): ((128, 64, 4, 3), (64, 128, 8, 2), (128, 64, 8, 3)),
    (True, 128): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
    (True, 256): ((64, 32, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
    (False, 64): ((64, 32, 4, 2), (32, 64, 8, 2), (64, 32, 4, 2)),
    (False, 128): ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    (False, 256): ((32, 32, 8, 1), (16, 32, 8, 1), (32, 16, 8, 1)),
}
"""Tiles to begin with: the lint shows that many of them spill, so no call takes these kernels yet."""
DELTA_ROWS = 32


def attention(q, k, v, *, causal, window=None, document_ids=None, dropout_p=0.0, seed=None, scale=None,
              deterministic=True):
    """`kernels.reference.attention` in Triton; head sizes up to 256, T and S up to 2^31 - 1.

    `deterministic=False` takes the faster backward, whose dQ is summed in an order that differs from run to run; under
    torch.use_deterministic_algorithms it raises ValueError. The dropout mask is a function of `seed` and the place of
    the weight; it is not the reference's.
    """
    check_attention(q, k, v, window=window, document_ids=document_ids, dropout_p=dropout_p)
    if q.shape[3] > MAX_HEAD_SIZE:
        raise ValueError(f"attention: a head size of {q.shape[3]}; the Triton kernels take up to {MAX_HEAD_SIZE}, "
                         "kernels.use('reference') any")
    if not deterministic and torch.are_deterministic_algorithms_enabled():
        raise ValueError("attention: deterministic=False under torch.use_deterministic_algorithms; leave one out")
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one of "
                         f"{', '.join(map(str, DTYPES))}")
    key = None
    if dropout_p:
        key = (torch.randint(1 << 62, (), device=q.device) if seed is None
               else torch.full((), seed, dtype=torch.int64, device=q.device))
    window = 0 if window is None or window >= k.shape[1] else window                # one of S hides nothing
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return forward(q, k, v, document_ids, key, causal, window, dropout_p, scale, deterministic)[0]


@triton.jit
def _offsets(rows, stride, columns):
    """Element offsets of a (rows, columns) tile whose last dimension is contiguous, in 64 bits."""
    return rows.to(tl.int64)[:, None] * stride + columns[None, :]


@triton.jit
def _load(base, rows, stride, columns, num_rows, num_columns: tl.constexpr):
    """A tile, with zeros beyond the last row and, where the tile is wider than the head, beyond the last column."""
    inside = rows[:, None] < num_rows
    if num_columns < columns.shape[0]:
        inside = inside & (columns[None, :] < num_columns)
    return tl.load(base + _offsets(rows, stride, columns), mask=inside, other=0.0)


@triton.jit
def _block_and_head(length, BLOCK: tl.constexpr):
    """The block of rows and the head, in 64 bits, that a program works on."""
    blocks = tl.cdiv(length, BLOCK)
    return tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)


@triton.jit
def _visible(at, keys, S, window, at_documents, key_documents, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
             DOCUMENTS: tl.constexpr):
    """Which queries see which keys; `at` are the queries' places among the keys. Both have a dimension of 1."""
    visible = (keys < S) & (at == at)
    if CAUSAL:
        visible = visible & (keys <= at)
    if WINDOW:
        visible = visible & (at - keys < window)
    if DOCUMENTS:
        visible = visible & (at_documents == key_documents)
    return visible


@triton.jit
def _kept(seed, threshold, head, queries, keys):
    """Which attention weights dropout keeps: those whose random 32 bits (Philox) are at least `threshold`."""
    zero = queries * 0 + keys * 0
    bits, _, _, _ = tl.philox(seed, (zero + keys).to(tl.uint32), (zero + queries).to(tl.uint32),
                              (zero + head).to(tl.uint32), (zero + 0).to(tl.uint32))
    return bits >= threshold


@triton.jit
def _forward_blocks(acc, top, total, q, first, last, K, V, DOCUMENT_IDS, stride_k, stride_v, at, queries, documents,
                    head, S, window, factor, seed, threshold,
                    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
                    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr):
    """Go on with the softmax over the keys [first, last); `top` is the largest score so far, `total` the sum of 2^."""
    columns = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load(K, keys, stride_k, columns, S, D)                                 # (N, D)
        s = dot(q, tl.trans(k)) * factor                                            # (M, N)
        if MASKED:
            key_documents = 0
            if DOCUMENTS:
                key_documents = tl.load(DOCUMENT_IDS + keys, mask=keys < S, other=0)[None, :]
            s = tl.where(_visible(at[:, None], keys[None, :], S, window, documents[:, None], key_documents, CAUSAL,
                                  WINDOW, DOCUMENTS), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        p = tl.math.exp2(s - base[:, None])
        faded = tl.math.exp2(top - base)
        total = total * faded + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(_kept(seed, threshold, head, queries[:, None], keys[None, :]), p, 0.0)
        v = _load(V, keys, stride_v, columns, S, D)
        acc = acc * faded[:, None] + dot(round_to(p, v.dtype), v)                          # (M, D)
        top = higher
    return acc, top, total


@triton.jit
def _key_range(low, high, S, shift, window, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
               DOCUMENTS: tl.constexpr):
    """Blocks of keys for the queries [low, high]: first, first seen by all, end of those, end.

    Between the first two and the last two some of the queries do not see some of the keys.
    """
    first, last = S * 0, S
    whole_first, whole_last = first, last
    if CAUSAL:
        last = tl.minimum(S, tl.maximum(high + shift + 1, 0))
        whole_last = tl.minimum(S, tl.maximum(low + shift + 1, 0))
    if WINDOW:
        first = tl.maximum(low + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        whole_first = (tl.maximum(high + shift - window + 1, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    whole_last = whole_last // BLOCK_N * BLOCK_N
    if DOCUMENTS:
        whole_last = first
    whole_first = tl.minimum(tl.maximum(whole_first, first), last)
    whole_last = tl.minimum(tl.maximum(whole_last, whole_first), last)
    return first, whole_first, whole_last, last


@triton.jit
def attention_forward(Q, K, V, DOCUMENT_IDS, OUT, LSE,
                      stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
                      T, S, H, GROUP, window, factor, SEED, threshold, rescale,
                      D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr):
    """out = softmax(scale · q kᵀ + mask) v and lse = log2 Σ 2^s, for BLOCK_M queries of one head.

    One read of q, and of the visible k and v; one write of out (B, T, H, D, contiguous) and lse (B, H, T).
    """
    block, head = _block_and_head(T, BLOCK_M)
    block = tl.cdiv(T, BLOCK_M) - 1 - block                                         # causal: the longest rows first
    b, h = head // H, head % H
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + h // GROUP * stride_kh
    V += b * stride_vb + h // GROUP * stride_vh
    if DOCUMENTS:
        DOCUMENT_IDS += b * T
    if DROPOUT:
        SEED = tl.load(SEED)
    shift = S - T
    columns = tl.arange(0, BLOCK_D)
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    at = queries + shift
    q = _load(Q, queries, stride_qt, columns, T, D)                                 # (M, D)
    documents = queries
    if DOCUMENTS:
        documents = tl.load(DOCUMENT_IDS + queries, mask=queries < T, other=0)
    first, whole_first, whole_last, last = _key_range(
        block * BLOCK_M, tl.minimum(block * BLOCK_M + BLOCK_M, T) - 1, S, shift, window, BLOCK_N, CAUSAL, WINDOW,
        DOCUMENTS)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if WINDOW:
        acc, top, total = _forward_blocks(
            acc, top, total, q, first, whole_first, K, V, DOCUMENT_IDS, stride_kt, stride_vt, at, queries, documents,
            head, S, window, factor, SEED, threshold, D, BLOCK_D, BLOCK_N, True, CAUSAL, WINDOW, DOCUMENTS, DROPOUT)
    acc, top, total = _forward_blocks(
        acc, top, total, q, whole_first, whole_last, K, V, DOCUMENT_IDS, stride_kt, stride_vt, at, queries, documents,
        head, S, window, factor, SEED, threshold, D, BLOCK_D, BLOCK_N, False, CAUSAL, WINDOW, DOCUMENTS, DROPOUT)
    acc, top, total = _forward_blocks(
        acc, top, total, q, whole_last, last, K, V, DOCUMENT_IDS, stride_kt, stride_vt, at, queries, documents,
        head, S, window, factor, SEED, threshold, D, BLOCK_D, BLOCK_N, True, CAUSAL, WINDOW, DOCUMENTS, DROPOUT)
    seen = total > 0
    acc = acc * tl.where(seen, rescale / tl.where(seen, total, 1.0), 0.0)[:, None]
    lse = tl.where(seen, top + tl.math.log2(tl.where(seen, total, 1.0)), float("inf"))
    inside = queries < T
    tl.store(LSE + head * T + queries, lse, mask=inside)
    OUT += (b * T * H + h) * D
    tl.store(OUT + _offsets(queries, H * D, columns), round_to(acc, OUT.dtype.element_ty),
             mask=inside[:, None] & (columns[None, :] < D))


@triton.jit
def attention_delta(OUT, GRAD, DELTA, stride_gb, stride_gt, stride_gh, T, H, D: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_M: tl.constexpr):
    """delta = Σ_d out · grad, the part of the softmax's gradient that a whole row shares, (B, H, T)."""
    block, head = _block_and_head(T, BLOCK_M)
    b, h = head // H, head % H
    columns = tl.arange(0, BLOCK_D)
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    out = _load(OUT + (b * T * H + h) * D, queries, H * D, columns, T, D).to(tl.float32)
    grad = _load(GRAD + b * stride_gb + h * stride_gh, queries, stride_gt, columns, T, D).to(tl.float32)
    tl.store(DELTA + head * T + queries, tl.sum(out * grad, 1), mask=queries < T)


@triton.jit
def _backward_queries(dk, dv, k, v, first, last, Q, GRAD, DQ, LSE, DELTA, DOCUMENT_IDS, stride_q, stride_g, stride_dq,
                      keys, key_documents, head, T, S, shift, window, factor, seed, threshold, rescale,
                      D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
                      CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr,
                      ATOMIC: tl.constexpr):
    """Add what the queries [first, last) give to dK and dV of a block of keys; rows of the tiles are keys."""
    columns = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        q = _load(Q, queries, stride_q, columns, T, D)                              # (M, D)
        grad = _load(GRAD, queries, stride_g, columns, T, D)
        lse = tl.load(LSE + queries, mask=queries < T, other=float("inf"))
        delta = tl.load(DELTA + queries, mask=queries < T, other=0.0)
        p = tl.math.exp2(dot(k, tl.trans(q)) * factor - lse[None, :])               # (N, M)
        if MASKED:
            documents = 0
            if DOCUMENTS:
                documents = tl.load(DOCUMENT_IDS + queries, mask=queries < T, other=0)[None, :]
            p = tl.where(_visible((queries + shift)[None, :], keys[:, None], S, window, documents,
                                  key_documents[:, None], CAUSAL, WINDOW, DOCUMENTS), p, 0.0)
        dp = dot(v, tl.trans(grad))
        if DROPOUT:
            kept = _kept(seed, threshold, head, queries[None, :], keys[:, None])
            dv += dot(round_to(tl.where(kept, p * rescale, 0.0), grad.dtype), grad)
            dp = tl.where(kept, dp * rescale, 0.0)
        else:
            dv += dot(round_to(p, grad.dtype), grad)                                       # (N, D)
        ds = round_to(p * (dp - delta[None, :]), q.dtype)
        dk += dot(ds, q)
        if ATOMIC:
            tl.atomic_add(DQ + _offsets(queries, stride_dq, columns), dot(tl.trans(ds), k),
                          mask=(queries[:, None] < T) & (columns[None, :] < D), sem="relaxed")
    return dk, dv


@triton.jit
def attention_backward_keys(Q, K, V, DOCUMENT_IDS, GRAD, LSE, DELTA, DQ, DK, DV,
                            stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
                            stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
                            T, S, H, GROUP, window, factor, scale, SEED, threshold, rescale,
                            D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                            CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr,
                            ATOMIC: tl.constexpr):
    """dK and dV, (B, S, H_kv, D), of BLOCK_N keys of one key-value head, over its GROUP query heads.

    p = 2^(s - lse);  dV = pᵀ dO;  dS = p ∘ (dO vᵀ - delta);  dK = scale · dSᵀ q;  with ATOMIC also dQ += dS k, in
    float32 and without the scale.
    """
    H_kv = H // GROUP
    block, pair = _block_and_head(S, BLOCK_N)
    b, h_kv = pair // H_kv, pair % H_kv
    shift = S - T
    columns = tl.arange(0, BLOCK_D)
    low = block * BLOCK_N
    high = tl.minimum(low + BLOCK_N, S) - 1
    keys = low + tl.arange(0, BLOCK_N)
    k = _load(K + b * stride_kb + h_kv * stride_kh, keys, stride_kt, columns, S, D)  # (N, D)
    v = _load(V + b * stride_vb + h_kv * stride_vh, keys, stride_vt, columns, S, D)
    if DOCUMENTS:
        DOCUMENT_IDS += b * T
    if DROPOUT:
        SEED = tl.load(SEED)
    key_documents = keys
    if DOCUMENTS:
        key_documents = tl.load(DOCUMENT_IDS + keys, mask=keys < S, other=0)
    first, last = T * 0, T
    if CAUSAL:
        first = tl.minimum(tl.maximum(low - shift, 0), T) // BLOCK_M * BLOCK_M
    if WINDOW:
        last = tl.minimum(tl.maximum(high - shift + window, 0), T)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(0, GROUP):
        h = h_kv * GROUP + member
        head = b * H + h
        query, grad = Q + b * stride_qb + h * stride_qh, GRAD + b * stride_gb + h * stride_gh
        dq, lse, delta = DQ + (b * T * H + h) * D, LSE + head * T, DELTA + head * T
        dk, dv = _backward_queries(
            dk, dv, k, v, first, last, query, grad, dq, lse, delta, DOCUMENT_IDS, stride_qt, stride_gt, H * D, keys,
            key_documents, head, T, S, shift, window, factor, SEED, threshold, rescale, D, BLOCK_D, BLOCK_M,
            CAUSAL or WINDOW or DOCUMENTS, CAUSAL, WINDOW, DOCUMENTS, DROPOUT, ATOMIC)
    place = (b * S * H_kv + h_kv) * D + _offsets(keys, H_kv * D, columns)
    inside = (keys[:, None] < S) & (columns[None, :] < D)
    tl.store(DK + place, round_to(dk * scale, DK.dtype.element_ty), mask=inside)
    tl.store(DV + place, round_to(dv, DV.dtype.element_ty), mask=inside)


@triton.jit
def _backward_keys(dq, q, grad, lse, delta, first, last, K, V, DOCUMENT_IDS, stride_k, stride_v, at, queries, documents,
                   head, S, window, factor, seed, threshold, rescale,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
                   CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr):
    """Add what the keys [first, last) give to dQ of a block of queries."""
    columns = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load(K, keys, stride_k, columns, S, D)                                 # (N, D)
        v = _load(V, keys, stride_v, columns, S, D)
        p = tl.math.exp2(dot(q, tl.trans(k)) * factor - lse[:, None])               # (M, N)
        if MASKED:
            key_documents = 0
            if DOCUMENTS:
                key_documents = tl.load(DOCUMENT_IDS + keys, mask=keys < S, other=0)[None, :]
            p = tl.where(_visible(at[:, None], keys[None, :], S, window, documents[:, None], key_documents, CAUSAL,
                                  WINDOW, DOCUMENTS), p, 0.0)
        dp = dot(grad, tl.trans(v))
        if DROPOUT:
            dp = tl.where(_kept(seed, threshold, head, queries[:, None], keys[None, :]), dp * rescale, 0.0)
        dq += dot(round_to(p * (dp - delta[:, None]), k.dtype), k)                       # (M, D)
    return dq


@triton.jit
def attention_backward_queries(Q, K, V, DOCUMENT_IDS, GRAD, LSE, DELTA, DQ,
                               stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
                               stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
                               T, S, H, GROUP, window, factor, scale, SEED, threshold, rescale,
                               D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                               CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
                               DROPOUT: tl.constexpr):
    """dQ = scale · dS k, (B, T, H, D), of BLOCK_M queries of one head."""
    block, head = _block_and_head(T, BLOCK_M)
    block = tl.cdiv(T, BLOCK_M) - 1 - block                                         # causal: the longest rows first
    b, h = head // H, head % H
    K += b * stride_kb + h // GROUP * stride_kh
    V += b * stride_vb + h // GROUP * stride_vh
    if DOCUMENTS:
        DOCUMENT_IDS += b * T
    if DROPOUT:
        SEED = tl.load(SEED)
    shift = S - T
    columns = tl.arange(0, BLOCK_D)
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    at = queries + shift
    inside = queries < T
    q = _load(Q + b * stride_qb + h * stride_qh, queries, stride_qt, columns, T, D)  # (M, D)
    grad = _load(GRAD + b * stride_gb + h * stride_gh, queries, stride_gt, columns, T, D)
    lse = tl.load(LSE + head * T + queries, mask=inside, other=float("inf"))
    delta = tl.load(DELTA + head * T + queries, mask=inside, other=0.0)
    documents = queries
    if DOCUMENTS:
        documents = tl.load(DOCUMENT_IDS + queries, mask=inside, other=0)
    first, whole_first, whole_last, last = _key_range(
        block * BLOCK_M, tl.minimum(block * BLOCK_M + BLOCK_M, T) - 1, S, shift, window, BLOCK_N, CAUSAL, WINDOW,
        DOCUMENTS)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW:
        dq = _backward_keys(dq, q, grad, lse, delta, first, whole_first, K, V, DOCUMENT_IDS, stride_kt, stride_vt, at,
                            queries, documents, head, S, window, factor, SEED, threshold, rescale, D, BLOCK_D, BLOCK_N,
                            True, CAUSAL, WINDOW, DOCUMENTS, DROPOUT)
    dq = _backward_keys(dq, q, grad, lse, delta, whole_first, whole_last, K, V, DOCUMENT_IDS, stride_kt, stride_vt, at,
                        queries, documents, head, S, window, factor, SEED, threshold, rescale, D, BLOCK_D, BLOCK_N,
                        False, CAUSAL, WINDOW, DOCUMENTS, DROPOUT)
    dq = _backward_keys(dq, q, grad, lse, delta, whole_last, last, K, V, DOCUMENT_IDS, stride_kt, stride_vt, at,
                        queries, documents, head, S, window, factor, SEED, threshold, rescale, D, BLOCK_D, BLOCK_N,
                        True, CAUSAL, WINDOW, DOCUMENTS, DROPOUT)
    tl.store(DQ + (b * T * H + h) * D + _offsets(queries, H * D, columns), round_to(dq * scale, DQ.dtype.element_ty),
             mask=inside[:, None] & (columns[None, :] < D))


def _tiles(D, dtype):
    """The tiles of a head size: constants and launch options of forward, backward by keys, backward by queries."""
    return [_tile(D, tile) for tile in TILES[dtype.itemsize == 2, next(size for _, size in TILES if D <= size)]]


def _tile(D, tile):
    queries, keys, warps, stages = tile
    return (dict(D=D, BLOCK_D=max(16, next_power_of_2(D)), BLOCK_M=queries, BLOCK_N=keys),
            dict(num_warps=warps, num_stages=stages))


def lint_cases():
    """Every shipped tile, in bfloat16 and float32, with the masks that change the code."""
    arguments = "Q K V DOCUMENT_IDS GRAD LSE DELTA DQ DK DV OUT".split()
    for (narrow, D), tiles in TILES.items():
        kind = "*bf16" if narrow else "*fp32"
        types = dict.fromkeys(arguments, kind) | {"DOCUMENT_IDS": "*i64", "LSE": "*fp32", "DELTA": "*fp32"}
        for masks in ("full", "causal", "causal window documents dropout"):
            flags = {name: name.lower() in masks for name in ("CAUSAL", "WINDOW", "DOCUMENTS", "DROPOUT")}
            kernels = [(attention_forward, {}), (attention_backward_keys, {"ATOMIC": False}),
                       (attention_backward_queries, {}), (attention_backward_keys, {"ATOMIC": True})]
            for (kernel, more), tile in zip(kernels, (*tiles, tiles[1])):
                constants, options = _tile(D, tile)
                constants |= flags | more
                numbers = [name for name in kernel.arg_names if name not in constants and name not in arguments]
                signature = {name: "i32" for name in numbers}
                signature |= dict.fromkeys({"factor", "scale", "rescale"} & set(numbers), "fp32")
                signature |= {"SEED": "*i64", "threshold": "i64"}
                signature = {name: (types | signature)[name] for name in kernel.arg_names if name not in constants}
                if more.get("ATOMIC"):
                    signature["DQ"] = "*fp32"
                aligned = [name for name in signature if name in types or name.startswith("stride_")]
                yield LintCase(f"{kernel.__name__}{' atomic' * more.get('ATOMIC', 0)} D{D} {kind[1:]} {masks}", kernel,
                               signature, constants, "dot" if narrow else "plain", tuple(aligned), options)


def _rows(x):
    """x itself where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _masks(document_ids, seed, causal, window, dropout_p):
    """What the kernels take for masks and dropout: pointers or stand-ins, numbers, and which of them count."""
    flags = dict(CAUSAL=causal, WINDOW=window > 0, DOCUMENTS=document_ids is not None, DROPOUT=dropout_p > 0)
    numbers = dict(threshold=min(round(dropout_p * 2**32), 2**32 - 1), rescale=1 / (1 - dropout_p))
    return flags, numbers


@torch.library.custom_op("minigpt::attention_forward", mutates_args=())
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document_ids: torch.Tensor | None,
            seed: torch.Tensor | None, causal: bool, window: int, dropout_p: float, scale: float,
            deterministic: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (B, T, H, D), lse (B, H, T) in units of log2)"""
    B, T, H, D = q.shape
    S, H_kv = k.shape[1:3]
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = _rows(q), _rows(k), _rows(v)
    document_ids = None if document_ids is None else document_ids.contiguous()
    constants, options = _tiles(D, q.dtype)[0]
    flags, numbers = _masks(document_ids, seed, causal, window, dropout_p)
    attention_forward[triton.cdiv(T, constants["BLOCK_M"]) * B * H,](
        q, k, v, q if document_ids is None else document_ids, out, lse, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], T, S, H, H // H_kv, window, scale * LOG2_E, q if seed is None else seed, **numbers,
        **constants, **flags, **options)
    return out, lse


@forward.register_fake
def _(q, k, v, document_ids, seed, causal, window, dropout_p, scale, deterministic):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("minigpt::attention_backward", mutates_args=())
def backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
             lse: torch.Tensor, document_ids: torch.Tensor | None, seed: torch.Tensor | None, causal: bool,
             window: int, dropout_p: float, scale: float,
             deterministic: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dQ, dK, dV)"""
    B, T, H, D = q.shape
    S, H_kv = k.shape[1:3]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if 0 in (q.numel(), k.numel()):
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad, q, k, v = _rows(grad), _rows(q), _rows(k), _rows(v)
    document_ids = None if document_ids is None else document_ids.contiguous()
    _, (by_keys, keys_options), (by_queries, queries_options) = _tiles(D, q.dtype)
    flags, numbers = _masks(document_ids, seed, causal, window, dropout_p)
    delta = torch.empty_like(lse)
    attention_delta[triton.cdiv(T, DELTA_ROWS) * B * H,](
        out, grad, delta, *grad.stride()[:3], T, H, D=D, BLOCK_D=by_keys["BLOCK_D"], BLOCK_M=DELTA_ROWS)
    sums = dq if deterministic else torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    pointers = (q, k, v, q if document_ids is None else document_ids, grad, lse, delta, sums)
    places = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], T, S, H, H // H_kv, window,
              scale * LOG2_E, scale, q if seed is None else seed)
    attention_backward_keys[triton.cdiv(S, by_keys["BLOCK_N"]) * B * H_kv,](
        *pointers, dk, dv, *places, **numbers, **by_keys, **flags, ATOMIC=not deterministic, **keys_options)
    if not deterministic:
        return sums.mul_(scale).to(q.dtype), dk, dv
    attention_backward_queries[triton.cdiv(T, by_queries["BLOCK_M"]) * B * H,](
        *pointers, *places, **numbers, **by_queries, **flags, **queries_options)
    return dq, dk, dv


@backward.register_fake
def _(grad, q, k, v, *others):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, document_ids, seed, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, document_ids, seed)


def _gradients(ctx, grad, _):
    return *backward(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 7


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("kernels.attention has no second derivative in Triton; kernels.use('reference') has one")


forward.register_autograd(_gradients, setup_context=_save)
backward.register_autograd(_no_second_derivative)
