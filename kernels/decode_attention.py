"""`decode_attention` on Triton: the keys of a row in splits of one size, then the splits' sums put together.

The query heads that share a key head are packed into one tile, so that each key is read once. A split has as many keys
whatever the batch, so a row's result does not depend on what else is in it. Weights are powers of 2.
Legend: B rows, S keys that a cache holds, H query heads, H_kv key-value heads, D head size, GROUP = H / H_kv.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import Launch, dot, next_power_of_2, round_to, with_rows
from kernels.pointwise import check_dtypes
from kernels.reference import check_decode_attention

LOG2_E = 1.4426950408889634
SPLIT = 256
"""Keys of a program: a few dozen rows fill a GPU, and the splits' sums are a hundredth of what is read."""
TILE, TILE_FLOAT32 = 8192, 1024
"""Numbers of the keys at a time, of at most KEYS keys."""
KEYS = 64
MAX_HEAD_SIZE = 256


@triton.jit
def _seen(lengths_ptr, row, window, S):
    """The first key that a row sees, and the one behind its last."""
    end = tl.minimum(tl.load(lengths_ptr + row).to(tl.int32), S)
    begin = 0
    if window is not None:
        begin = tl.maximum(end - window, 0)
    return begin, end


@triton.jit
def _decode_split(q_ptr, k_ptr, v_ptr, lengths_ptr, sums_ptr, lse_ptr, S, q_batch, q_head, k_batch, k_row, k_head,
                  v_batch, v_row, v_head, window, factor, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr):
    """Of one split, a row and a key head: the weighted mean of the values for GROUP queries, and log2 of the weights'
    sum; nothing where the row sees no key of it."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    row, head = (tl.program_id(1) // (H // GROUP)).to(tl.int64), tl.program_id(1) % (H // GROUP)
    begin, end = _seen(lengths_ptr, row, window, S)
    first, last = tl.maximum(begin, split * SPLIT), tl.minimum(end, (split + 1) * SPLIT)
    if first < last:
        member, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        queries = head * GROUP + member
        inside = (member < GROUP)[:, None] & (dims < D)[None, :]
        q = tl.load(q_ptr + row * q_batch + queries[:, None] * q_head + dims[None, :], mask=inside, other=0.0)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        mean = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(first // BLOCK_N * BLOCK_N, last, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            shown = (keys >= first) & (keys < last)
            there = shown[:, None] & (dims < D)[None, :]
            offsets = keys.to(tl.int64)[:, None]
            k = tl.load(k_ptr + row * k_batch + head * k_head + offsets * k_row + dims[None, :], mask=there, other=0.0)
            v = tl.load(v_ptr + row * v_batch + head * v_head + offsets * v_row + dims[None, :], mask=there, other=0.0)
            scores = tl.where(shown[None, :], dot(q, k.T) * factor, float("-inf"))  # (BLOCK_M, BLOCK_N)
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            keep = tl.exp2(top - higher)
            total = total * keep + tl.sum(weights, 1)
            mean = mean * keep[:, None] + dot(round_to(weights, v.dtype), v)
            top = higher
        place = (row * H + queries) * splits + split
        tl.store(sums_ptr + place[:, None] * D + dims[None, :], mean / total[:, None], mask=inside)
        tl.store(lse_ptr + place, top + tl.log2(total), mask=member < GROUP)


@triton.jit
def _combine(sums_ptr, lse_ptr, lengths_ptr, out_ptr, S, splits, window, H: tl.constexpr, D: tl.constexpr,
             BLOCK_D: tl.constexpr, SPLIT: tl.constexpr):
    """The mean of the splits' means for one query, weighted by their sums."""
    query = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    begin, end = _seen(lengths_ptr, query // H, window, S)
    top = tl.full((), -1e38, tl.float32)
    total = tl.zeros((), tl.float32)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(begin // SPLIT, tl.cdiv(end, SPLIT)):
        lse = tl.load(lse_ptr + query * splits + split)
        higher = tl.maximum(top, lse)
        weight, keep = tl.exp2(lse - higher), tl.exp2(top - higher)
        part = tl.load(sums_ptr + (query * splits + split) * D + dims, mask=dims < D, other=0.0)
        mean = mean * keep + part * weight
        total = total * keep + weight
        top = higher
    mean /= tl.where(end > begin, total, 1.0)
    tl.store(out_ptr + query * D + dims, round_to(mean, out_ptr.dtype.element_ty), mask=dims < D)


def lint_cases():
    """Grouped heads of 64 and 128 numbers in bfloat16, with a window, and 64 in float32."""
    for dtype, D in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 64)):
        q = torch.empty(16, 32, D, dtype=dtype, device="meta")
        cache = torch.empty(16, 4096, 8, D, dtype=dtype, device="meta")
        lengths = torch.empty(16, dtype=torch.int32, device="meta")
        for launch in launches(q, cache, cache, lengths, q, 1000, 0.125):
            yield launch.lint_case(f"{str(dtype).removeprefix('torch.')} {D}")


def launches(q, k, v, lengths, out, window, scale) -> list[Launch]:
    (B, H, D), (S, H_kv) = q.shape, k.shape[1:3]
    splits, block_d = triton.cdiv(S, SPLIT), max(16, next_power_of_2(D))
    sums = q.new_empty(B, H, splits, D, dtype=torch.float32)
    lse = q.new_empty(B, H, splits, dtype=torch.float32)
    window = None if window is None or window >= S else window
    low = q.dtype != torch.float32
    head = dict(H=H, D=D, BLOCK_D=block_d, SPLIT=SPLIT)
    part = Launch(
        _decode_split, (splits, B * H_kv),
        dict(q_ptr=q, k_ptr=k, v_ptr=v, lengths_ptr=lengths, sums_ptr=sums, lse_ptr=lse, S=S, q_batch=q.stride(0),
             q_head=q.stride(1), k_batch=k.stride(0), k_row=k.stride(1), k_head=k.stride(2), v_batch=v.stride(0),
             v_row=v.stride(1), v_head=v.stride(2), window=window, factor=scale * LOG2_E),
        dict(GROUP=H // H_kv, BLOCK_M=max(16, next_power_of_2(H // H_kv)),
             BLOCK_N=max(16, min(KEYS, (TILE if low else TILE_FLOAT32) // block_d)), **head),
        dict(num_warps=4, num_stages=3 if low else 1), "small dot" if low else "plain")
    whole = Launch(_combine, (B * H,),
                   dict(sums_ptr=sums, lse_ptr=lse, lengths_ptr=lengths, out_ptr=out, S=S, splits=splits,
                        window=window), head, dict(num_warps=1), "plain")
    return [part, whole]


@torch.library.custom_op("minigpt::decode_attention", mutates_args=())
def op(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, window: int | None, scale: float) -> Tensor:
    out = q.new_empty(q.shape)
    rows = map(with_rows, (q, k_cache, v_cache))
    with torch.cuda.device_of(q):
        for launch in launches(*rows, lengths.contiguous(), out, window, scale):
            launch.run()
    return out


@op.register_fake
def _(q, k_cache, v_cache, lengths, window, scale):
    return q.new_empty(q.shape)


def no_derivative(ctx, *_):
    raise RuntimeError("kernels.decode_attention has no gradient in Triton; kernels.use('reference') has one")


op.register_autograd(no_derivative)


def decode_attention(q, k_cache, v_cache, lengths, *, window=None, scale=None):
    check_decode_attention(q, k_cache, v_cache, lengths, window, scale)
    check_dtypes("decode_attention", q=q)
    if not 1 <= q.shape[2] <= MAX_HEAD_SIZE:
        raise ValueError(f"decode_attention: a head size of {q.shape[2]}; the Triton kernels take 1 to "
                         f"{MAX_HEAD_SIZE}, kernels.use('reference') any")
    return op(q, k_cache, v_cache, lengths, window, q.shape[2] ** -0.5 if scale is None else float(scale))
