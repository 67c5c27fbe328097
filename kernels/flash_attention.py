"""The Triton kernels of `attention`: softmax(scale · q kᵀ + mask) v without ever holding the (T, S) weights.

Forward: FlashAttention-2's online softmax (arXiv 2307.08691), in base 2. Backward: two kernels, one for a block of keys
(dK and dV, over all queries that see them), one for a block of queries (dQ), so that no sum depends on an order of
arrival; or the first alone, which then adds dQ atomically: fewer products, and not deterministic.

Legend: B batch, T queries, S keys, H query heads, H_kv key-value heads, GROUP = H / H_kv, D head size, M and N the
queries and the keys of a tile. Query i stands at i + S - T among the keys. Scores are in units of log2: s = q kᵀ ·
factor, factor = scale · log2 e > 0, and lse = log2 Σ 2^s, +inf where no key is visible. A pointer or number that is
None switches its part of the code off.
"""

import triton
import triton.language as tl

from kernels.common import dot, round_to

CHUNK = tl.constexpr(1024)
"""Document ids that are compared at a time when a program looks for the range it has to visit."""


@triton.jit
def _load(ptr, rows, stride, num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECKED: tl.constexpr):
    """A (rows, BLOCK_D) tile, with zeros beyond the head's D numbers and, where CHECKED, beyond the last row."""
    columns = tl.arange(0, BLOCK_D)
    places = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if D < BLOCK_D:
        if CHECKED:
            return tl.load(places, mask=(rows[:, None] < num_rows) & (columns[None, :] < D), other=0.0)
        return tl.load(places, mask=(rows == rows)[:, None] & (columns[None, :] < D), other=0.0)
    if CHECKED:
        return tl.load(places, mask=rows[:, None] < num_rows, other=0.0)
    return tl.load(places)


@triton.jit
def _store(ptr, tile, rows, stride, num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a (rows, D) tile, rounded to the type of the memory."""
    columns = tl.arange(0, BLOCK_D)
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], round_to(tile, ptr.dtype.element_ty),
             mask=(rows[:, None] < num_rows) & (columns[None, :] < D))


@triton.jit
def _block_and_head(length, BLOCK: tl.constexpr):
    """The block of rows and the head, in 64 bits, that a program works on."""
    blocks = tl.cdiv(length, BLOCK)
    return tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)


@triton.jit
def _visible(at, keys, S, window, at_documents, key_documents, CAUSAL: tl.constexpr):
    """Which queries see which keys; `at` are the queries' places among the keys. Both have a dimension of 1."""
    visible = (keys < S) & (at == at)
    if CAUSAL:
        visible = visible & (keys <= at)
    if window is not None:
        visible = visible & (at - keys < window)
    if at_documents is not None:
        visible = visible & (at_documents == key_documents)
    return visible


@triton.jit
def _mix(x):
    """32 bits to 32 bits, one to one, each bit of x turning each of the result's about half of the time (lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(seed_ptr, threshold, head, queries, keys):
    """Which attention weights dropout keeps: those whose 32 random bits are at least `threshold`.

    Philox (Salmon et al., 2011) makes two random numbers of the seed and the head; hashes of them with the query and
    then the key are the bits, for an eighth of the arithmetic that Philox would take for each weight.
    """
    number = head.to(tl.uint32)
    one, other, _, _ = tl.philox(tl.load(seed_ptr), number, number * 0, number * 0, number * 0)
    of_query = _mix(_mix(queries.to(tl.uint32) + one) ^ other)
    return _mix(of_query + keys.to(tl.uint32) * 0x9E3779B9) >= threshold.to(tl.uint32)


@triton.jit
def _range_of_documents(document_ids_ptr, rows, first, last, length):
    """The part of [first, last) outside of which no document id is one of those of `rows`.

    Exact where ids never fall, as in packed text; in any order of ids, all that is needed lies in it.
    """
    inside = rows < length
    own = tl.load(document_ids_ptr + rows, mask=inside, other=0)
    lowest = tl.min(tl.where(inside, own, 2147483647), 0)
    highest = tl.max(tl.where(inside, own, -2147483648), 0)
    begin, end = last, first
    for start in range(first, last, CHUNK):
        places = start + tl.arange(0, CHUNK)
        ids = tl.load(document_ids_ptr + places, mask=places < last, other=0)
        shared = (places < last) & (ids >= lowest) & (ids <= highest)
        begin = tl.minimum(begin, tl.min(tl.where(shared, places, last), 0))
        end = tl.maximum(end, tl.max(tl.where(shared, places + 1, first), 0))
    return begin, end


@triton.jit
def _key_range(block, T, S, window, document_ids_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               CAUSAL: tl.constexpr):
    """Blocks of keys that a block of queries visits: first, first seen by all of it, end of those, end.

    Between the first two and the last two some of the queries do not see some of the keys.
    """
    low = block * BLOCK_M
    high = tl.minimum(low + BLOCK_M, T) - 1
    shift = S - T
    first, last = S * 0, S
    whole_first, whole_last = first, last
    if CAUSAL:
        last = tl.minimum(S, tl.maximum(high + shift + 1, 0))
        whole_last = tl.minimum(S, tl.maximum(low + shift + 1, 0))
    if window is not None:
        first = tl.maximum(low + shift - window + 1, 0)
        whole_first = tl.maximum(high + shift - window + 1, 0)
    if document_ids_ptr is not None:
        first, last = _range_of_documents(document_ids_ptr, low + tl.arange(0, BLOCK_M), first, last, T)
        whole_last = first
    first = first // BLOCK_N * BLOCK_N
    whole_first = tl.minimum(tl.maximum(tl.cdiv(whole_first, BLOCK_N) * BLOCK_N, first), tl.maximum(last, first))
    whole_last = tl.minimum(tl.maximum(whole_last // BLOCK_N * BLOCK_N, whole_first), tl.maximum(last, first))
    return first, whole_first, whole_last, last


@triton.jit
def _forward_blocks(acc, top, total, q, first, last, k_ptr, v_ptr, document_ids_ptr, k_stride, v_stride, at, queries,
                    documents, head, S, window, factor, seed_ptr, threshold, D: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """Go on with the softmax over the keys [first, last); `top` is the largest score so far, `total` the sum of 2^."""
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, keys, k_stride, S, D, BLOCK_D, MASKED)                     # (N, D)
        s = dot(q, tl.trans(k))                                                     # (M, N), without the factor
        if MASKED:
            key_documents = None
            if document_ids_ptr is not None:
                key_documents = tl.load(document_ids_ptr + keys, mask=keys < S, other=0)[None, :]
            s = tl.where(_visible(at[:, None], keys[None, :], S, window, documents, key_documents, CAUSAL), s,
                         float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * factor)
        base = higher
        if MASKED:
            base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.math.exp2(s * factor - base[:, None])
        faded = tl.math.exp2(top - base)
        total = total * faded + tl.sum(p, 1)
        if seed_ptr is not None:
            p = tl.where(_kept(seed_ptr, threshold, head, queries[:, None], keys[None, :]), p, 0.0)
        v = _load(v_ptr, keys, v_stride, S, D, BLOCK_D, MASKED)
        acc = acc * faded[:, None] + dot(round_to(p, v.dtype), v)                   # (M, D)
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["threshold"])
def attention_forward(q_ptr, k_ptr, v_ptr, document_ids_ptr, seed_ptr, out_ptr, lse_ptr,
                      q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
                      lse_row, T, S, H, GROUP, window, factor, threshold, rescale,
                      D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      CAUSAL: tl.constexpr):
    """out = softmax(scale · q kᵀ + mask) v and lse = log2 Σ 2^s, for BLOCK_M queries of one head.

    One read of q, and of the visible k and v; one write of out (B, T, H, D), contiguous, and lse, whose B · H rows are
    `lse_row` long, +inf beyond T.
    """
    block, head = _block_and_head(T, BLOCK_M)
    block = tl.cdiv(T, BLOCK_M) - 1 - block                                         # causal: the longest rows first
    b, h = head // H, head % H
    k_ptr += b * k_batch + h // GROUP * k_head
    v_ptr += b * v_batch + h // GROUP * v_head
    if document_ids_ptr is not None:
        document_ids_ptr += b * T
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    at = queries + (S - T)
    q = _load(q_ptr + b * q_batch + h * q_head, queries, q_row, T, D, BLOCK_D, True)    # (M, D)
    documents = None
    if document_ids_ptr is not None:
        documents = tl.load(document_ids_ptr + queries, mask=queries < T, other=0)[:, None]
    first, whole_first, whole_last, last = _key_range(block, T, S, window, document_ids_ptr, BLOCK_M, BLOCK_N, CAUSAL)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if window is not None:
        acc, top, total = _forward_blocks(
            acc, top, total, q, first, whole_first, k_ptr, v_ptr, document_ids_ptr, k_row, v_row, at, queries,
            documents, head, S, window, factor, seed_ptr, threshold, D, BLOCK_D, BLOCK_N, CAUSAL, True)
    if document_ids_ptr is None:
        acc, top, total = _forward_blocks(
            acc, top, total, q, whole_first, whole_last, k_ptr, v_ptr, document_ids_ptr, k_row, v_row, at, queries,
            documents, head, S, window, factor, seed_ptr, threshold, D, BLOCK_D, BLOCK_N, CAUSAL, False)
    acc, top, total = _forward_blocks(
        acc, top, total, q, whole_last, last, k_ptr, v_ptr, document_ids_ptr, k_row, v_row, at, queries,
        documents, head, S, window, factor, seed_ptr, threshold, D, BLOCK_D, BLOCK_N, CAUSAL, True)
    seen = (total > 0) & (queries < T)
    acc = acc * tl.where(seen, rescale / tl.where(seen, total, 1.0), 0.0)[:, None]
    lse = tl.where(seen, top + tl.math.log2(tl.where(seen, total, 1.0)), float("inf"))
    tl.store(lse_ptr + head * lse_row + queries, lse, mask=queries < lse_row)
    _store(out_ptr + (b * T * H + h) * D, acc, queries, H * D, T, D, BLOCK_D)


@triton.jit
def attention_delta(out_ptr, grad_ptr, delta_ptr, grad_batch, grad_row, grad_head, lse_row, T, H, D: tl.constexpr,
                    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """delta = Σ_d out · grad, the part of the softmax's gradient that a whole row shares; it is laid out as lse."""
    block, head = _block_and_head(lse_row, BLOCK_M)
    b, h = head // H, head % H
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    out = _load(out_ptr + (b * T * H + h) * D, queries, H * D, T, D, BLOCK_D, True).to(tl.float32)
    grad_ptr += b * grad_batch + h * grad_head
    grad = _load(grad_ptr, queries, grad_row, T, D, BLOCK_D, True).to(tl.float32)
    tl.store(delta_ptr + head * lse_row + queries, tl.sum(out * grad, 1), mask=queries < lse_row)


@triton.jit(do_not_specialize=["threshold"])
def attention_backward_keys(q_ptr, k_ptr, v_ptr, document_ids_ptr, seed_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
                            dk_ptr, dv_ptr, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
                            grad_batch, grad_row, grad_head, dk_batch, dk_row,
                            lse_row, T, S, H, GROUP, window, factor, scale, threshold, rescale,
                            D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                            CAUSAL: tl.constexpr):
    """dK and dV of BLOCK_N keys of one key-value head, over its GROUP query heads.

    p = 2^(s - lse);  dV = pᵀ dO;  dS = p ∘ (dO vᵀ - delta);  dK = scale · dSᵀ q;  and where dq_ptr is given, dQ / scale
    += dS k in float32, contiguous. Rows of the tiles are keys: in the other form ptxas serializes all WGMMAs.
    """
    H_kv = H // GROUP
    block, pair = _block_and_head(S, BLOCK_N)
    b, h_kv = pair // H_kv, pair % H_kv
    shift = S - T
    low = block * BLOCK_N
    keys = low + tl.arange(0, BLOCK_N)
    k = _load(k_ptr + b * k_batch + h_kv * k_head, keys, k_row, S, D, BLOCK_D, True)    # (N, D)
    v = _load(v_ptr + b * v_batch + h_kv * v_head, keys, v_row, S, D, BLOCK_D, True)
    first, last = T * 0, T
    if CAUSAL:
        first = tl.minimum(tl.maximum(low - shift, 0), T)
    if window is not None:
        last = tl.minimum(tl.maximum(tl.minimum(low + BLOCK_N, S) - 1 - shift + window, 0), T)
    key_documents = None
    if document_ids_ptr is not None:
        document_ids_ptr += b * T
        key_documents = tl.load(document_ids_ptr + keys, mask=keys < S, other=0)[:, None]
        first, last = _range_of_documents(document_ids_ptr, keys, first, last, S)
    first = first // BLOCK_M * BLOCK_M
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(0, GROUP):
        h = h_kv * GROUP + member
        head = b * H + h
        for start in range(first, last, BLOCK_M):
            queries = start + tl.arange(0, BLOCK_M)
            inside = queries < T
            q = _load(q_ptr + b * q_batch + h * q_head, queries, q_row, T, D, BLOCK_D, True)            # (M, D)
            grad = _load(grad_ptr + b * grad_batch + h * grad_head, queries, grad_row, T, D, BLOCK_D, True)
            lse = tl.load(lse_ptr + head * lse_row + queries, mask=queries < lse_row, other=float("inf"))
            delta = tl.load(delta_ptr + head * lse_row + queries, mask=queries < lse_row, other=0.0)
            p = tl.math.exp2(dot(k, tl.trans(q)) * factor - lse[None, :])           # (N, M)
            if CAUSAL or window is not None or document_ids_ptr is not None or dq_ptr is not None:
                documents = None
                if document_ids_ptr is not None:
                    documents = tl.load(document_ids_ptr + queries, mask=inside, other=0)[None, :]
                p = tl.where(_visible((queries + shift)[None, :], keys[:, None], S, window, documents, key_documents,
                                      CAUSAL), p, 0.0)
            if seed_ptr is None:
                dv += dot(round_to(p, grad.dtype), grad)                            # (N, D)
                dp = dot(v, tl.trans(grad))
            else:
                kept = _kept(seed_ptr, threshold, head, queries[None, :], keys[:, None])
                dv += dot(round_to(tl.where(kept, p * rescale, 0.0), grad.dtype), grad)
                dp = tl.where(kept, dot(v, tl.trans(grad)) * rescale, 0.0)
            ds = round_to(p * (dp - delta[None, :]), q.dtype)
            dk += dot(ds, q)
            if dq_ptr is not None:
                columns = tl.arange(0, BLOCK_D)
                rows = b * T * H + h + queries.to(tl.int64) * H
                tl.atomic_add(dq_ptr + rows[:, None] * D + columns[None, :], dot(tl.trans(ds), k),
                              mask=inside[:, None] & (columns[None, :] < D), sem="relaxed")
    place = b * dk_batch + h_kv * D
    _store(dk_ptr + place, dk * scale, keys, dk_row, S, D, BLOCK_D)
    _store(dv_ptr + place, dv, keys, dk_row, S, D, BLOCK_D)


@triton.jit
def _backward_blocks(dq, q, grad, lse, delta, first, last, k_ptr, v_ptr, document_ids_ptr, k_stride, v_stride, at,
                     queries, documents, head, S, window, factor, seed_ptr, threshold, rescale, D: tl.constexpr,
                     BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """Add what the keys [first, last) give to dQ / scale of a block of queries."""
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, keys, k_stride, S, D, BLOCK_D, MASKED)                     # (N, D)
        v = _load(v_ptr, keys, v_stride, S, D, BLOCK_D, MASKED)
        p = tl.math.exp2(dot(q, tl.trans(k)) * factor - lse[:, None])               # (M, N)
        if MASKED:
            key_documents = None
            if document_ids_ptr is not None:
                key_documents = tl.load(document_ids_ptr + keys, mask=keys < S, other=0)[None, :]
            p = tl.where(_visible(at[:, None], keys[None, :], S, window, documents, key_documents, CAUSAL), p, 0.0)
        dp = dot(grad, tl.trans(v))
        if seed_ptr is not None:
            dp = tl.where(_kept(seed_ptr, threshold, head, queries[:, None], keys[None, :]), dp * rescale, 0.0)
        dq += dot(round_to(p * (dp - delta[:, None]), k.dtype), k)                  # (M, D)
    return dq


@triton.jit(do_not_specialize=["threshold"])
def attention_backward_queries(q_ptr, k_ptr, v_ptr, document_ids_ptr, seed_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
                               q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
                               grad_batch, grad_row, grad_head, dq_batch, dq_row,
                               lse_row, T, S, H, GROUP, window, factor, scale, threshold, rescale,
                               D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                               CAUSAL: tl.constexpr):
    """dQ = scale · dS k of BLOCK_M queries of one head."""
    block, head = _block_and_head(T, BLOCK_M)
    block = tl.cdiv(T, BLOCK_M) - 1 - block                                         # causal: the longest rows first
    b, h = head // H, head % H
    k_ptr += b * k_batch + h // GROUP * k_head
    v_ptr += b * v_batch + h // GROUP * v_head
    if document_ids_ptr is not None:
        document_ids_ptr += b * T
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    at = queries + (S - T)
    q = _load(q_ptr + b * q_batch + h * q_head, queries, q_row, T, D, BLOCK_D, True)    # (M, D)
    grad = _load(grad_ptr + b * grad_batch + h * grad_head, queries, grad_row, T, D, BLOCK_D, True)
    lse = tl.load(lse_ptr + head * lse_row + queries, mask=queries < T, other=float("inf"))
    delta = tl.load(delta_ptr + head * lse_row + queries, mask=queries < T, other=0.0)
    documents = None
    if document_ids_ptr is not None:
        documents = tl.load(document_ids_ptr + queries, mask=queries < T, other=0)[:, None]
    first, whole_first, whole_last, last = _key_range(block, T, S, window, document_ids_ptr, BLOCK_M, BLOCK_N, CAUSAL)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if window is not None:
        dq = _backward_blocks(
            dq, q, grad, lse, delta, first, whole_first, k_ptr, v_ptr, document_ids_ptr, k_row, v_row, at, queries,
            documents, head, S, window, factor, seed_ptr, threshold, rescale, D, BLOCK_D, BLOCK_N, CAUSAL, True)
    if document_ids_ptr is None:
        dq = _backward_blocks(
            dq, q, grad, lse, delta, whole_first, whole_last, k_ptr, v_ptr, document_ids_ptr, k_row, v_row, at,
            queries, documents, head, S, window, factor, seed_ptr, threshold, rescale, D, BLOCK_D, BLOCK_N, CAUSAL,
            False)
    dq = _backward_blocks(
        dq, q, grad, lse, delta, whole_last, last, k_ptr, v_ptr, document_ids_ptr, k_row, v_row, at, queries,
        documents, head, S, window, factor, seed_ptr, threshold, rescale, D, BLOCK_D, BLOCK_N, CAUSAL, True)
    _store(dq_ptr + b * dq_batch + h * D, dq * scale, queries, dq_row, T, D, BLOCK_D)
