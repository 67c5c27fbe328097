"""`rotary` on Triton: queries and keys turned in one launch, each read and written once, in float32 inside.

The gradient of a turn is the turn back, so one kernel serves both directions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import Launch, next_power_of_2, round_to
from kernels.pointwise import check_dtypes
from kernels.reference import check_rotary

NUMBERS, WARPS = 1024, 4
"""Pairs of one head that a program turns at a time, 8 a thread."""


@triton.jit
def _turn(x_ptr, out_ptr, offsets, out_offsets, cos, sin, inside, HALF: tl.constexpr):
    a = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_offsets, round_to(a * cos - b * sin, out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + out_offsets + HALF, round_to(b * cos + a * sin, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotary(q_ptr, k_ptr, cos_ptr, sin_ptr, position_ptr, q_out_ptr, k_out_ptr, M, T, table_rows, q_batch, q_row,
            q_head, k_batch, k_row, k_head, position_batch, H: tl.constexpr, H_KV: tl.constexpr, HALF: tl.constexpr,
            BACK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """All heads of ROWS tokens of the M = B · T."""
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (tokens < M)[:, None] & (cols < HALF)[None, :]
    batch, t = tokens // T, tokens % T
    place = t
    if position_ptr is not None:
        place = tl.load(position_ptr + batch * position_batch + t, mask=tokens < M, other=0).to(tl.int64)
    known = inside & ((place >= 0) & (place < table_rows))[:, None]
    angle = place[:, None] * HALF + cols[None, :]
    cos = tl.load(cos_ptr + angle, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=known, other=float("nan")).to(tl.float32)
    if BACK:
        sin = -sin
    from_q = (batch * q_batch + t * q_row)[:, None] + cols[None, :]
    to_q = tokens[:, None] * (H * HALF * 2) + cols[None, :]
    for head in range(H):
        _turn(q_ptr + head * q_head, q_out_ptr + head * HALF * 2, from_q, to_q, cos, sin, inside, HALF)
    from_k = (batch * k_batch + t * k_row)[:, None] + cols[None, :]
    to_k = tokens[:, None] * (H_KV * HALF * 2) + cols[None, :]
    for head in range(H_KV):
        _turn(k_ptr + head * k_head, k_out_ptr + head * HALF * 2, from_k, to_k, cos, sin, inside, HALF)


def lint_cases():
    """Heads of 64 and 128 numbers in bfloat16, views of one projection, with and without positions."""
    for D in (64, 128):
        q, k, _ = torch.empty(8, 1024, 16 + 2 * 4, D, dtype=torch.bfloat16, device="meta").split((16, 4, 4), 2)
        table = torch.empty(1024, D // 2, device="meta")
        positions = torch.empty(8, 1024, dtype=torch.int64, device="meta")
        out = torch.empty(q.shape, dtype=q.dtype, device="meta"), torch.empty(k.shape, dtype=q.dtype, device="meta")
        yield turn(q, k, table, table, None, *out, False).lint_case(str(D))
        yield turn(q, k, table, table, positions, *out, True).lint_case(f"{D} back, positions")


def turn(q, k, cos, sin, positions, q_out, k_out, back) -> Launch:
    (B, T, H, D), H_kv = q.shape, k.shape[2]
    block = next_power_of_2(D // 2)
    rows = max(1, min(NUMBERS // block, next_power_of_2(B * T)))
    return Launch(
        _rotary, (triton.cdiv(B * T, rows),),
        dict(q_ptr=q, k_ptr=k, cos_ptr=cos, sin_ptr=sin, position_ptr=positions, q_out_ptr=q_out, k_out_ptr=k_out,
             M=B * T, T=T, table_rows=len(cos), q_batch=q.stride(0), q_row=q.stride(1), q_head=q.stride(2),
             k_batch=k.stride(0), k_row=k.stride(1), k_head=k.stride(2),
             position_batch=0 if positions is None or positions.dim() == 1 else positions.stride(0)),
        dict(H=H, H_KV=H_kv, HALF=D // 2, BACK=back, ROWS=rows, BLOCK=block), dict(num_warps=WARPS))


@torch.library.custom_op("minigpt::rotary", mutates_args=())
def op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, back: bool) -> tuple[Tensor, Tensor]:
    """New q and k, turned; with `back` the other way."""
    outs = outputs(q, k, cos, sin, positions, back)
    with torch.cuda.device_of(q):
        turn(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k)), cos.contiguous(), sin.contiguous(),
             None if positions is None else positions.contiguous(), *outs, back).run()
    return outs


@op.register_fake
def outputs(q, k, cos, sin, positions, back):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def save_for_backward(ctx, inputs, output):
    _, _, cos, sin, positions, ctx.back = inputs
    ctx.save_for_backward(cos, sin, positions)


def backward(ctx, grad_q, grad_k):
    return *op(grad_q, grad_k, *ctx.saved_tensors, not ctx.back), None, None, None, None


op.register_autograd(backward, setup_context=save_for_backward)


def rotary(q, k, cos, sin, positions=None):
    check_rotary(q, k, cos, sin, positions)
    check_dtypes("rotary", q=q, cos=cos, sin=sin)
    return op(q, k, cos, sin, positions, False)
