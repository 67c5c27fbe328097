"""`split_heads` on Triton: queries and keys normalised and turned in one launch, and one for the gradient of it all.

Forward each query and key is read and written once, values are left where they lie; backward the gradients of all three
are written side by side, as the projection's backward reads them. In float32 inside. Legend: M tokens, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import MOST_REGISTERS, Launch, multiprocessors, next_power_of_2, round_to, with_rows
from kernels.norm import add_partials, contiguous
from kernels.pointwise import PROGRAMS_PER_SM, check_dtypes
from kernels.reference import check_split_heads

PAIRS, WARPS = 1024, 4
"""Pairs (x_i, x_{i + D/2}) of one head that a program takes at a time, 8 a thread."""


@triton.jit
def _angles(cos_ptr, sin_ptr, position_ptr, tokens, T, M, table_rows, position_batch, cols, inside,
            HALF: tl.constexpr):
    """cos and sin of (ROWS, BLOCK) pairs, NaN where the tables have no such position, 0 where there is no pair."""
    place = tokens % T
    if position_ptr is not None:
        place = tl.load(position_ptr + tokens // T * position_batch + place, mask=tokens < M, other=0).to(tl.int64)
    known = inside & ((place >= 0) & (place < table_rows))[:, None]
    angle = place[:, None] * HALF + cols[None, :]
    cos = tl.load(cos_ptr + angle, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=known, other=float("nan")).to(tl.float32)
    return tl.where(inside, cos, 0.0), tl.where(inside, sin, 0.0)


@triton.jit
def _load_pairs(ptr, offsets, inside, HALF: tl.constexpr):
    a = tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(ptr + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(ptr, offsets, a, b, inside, HALF: tl.constexpr):
    tl.store(ptr + offsets, round_to(a, ptr.dtype.element_ty), mask=inside)
    tl.store(ptr + offsets + HALF, round_to(b, ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weights(ptr, cols, HALF: tl.constexpr):
    a = tl.load(ptr + cols, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
    b = tl.load(ptr + cols + HALF, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
    return a, b


@triton.jit
def _rstd(a, b, eps, HALF: tl.constexpr):
    return tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]


@triton.jit
def _some_heads(x_ptr, weight_ptr, out_ptr, from_x, x_head, to_out, cos, sin, cols, inside, eps, HEADS: tl.constexpr,
                HALF: tl.constexpr, TURN: tl.constexpr):
    """All query or all key heads of some tokens."""
    weight_a, weight_b = 1.0, 1.0
    if weight_ptr is not None:
        weight_a, weight_b = _weights(weight_ptr, cols, HALF)
    for head in range(HEADS):
        a, b = _load_pairs(x_ptr + head * x_head, from_x, inside, HALF)
        if weight_ptr is not None:
            rstd = _rstd(a, b, eps, HALF)
            a, b = a * rstd * weight_a, b * rstd * weight_b
        if TURN:
            a, b = a * cos - b * sin, b * cos + a * sin
        _store_pairs(out_ptr + head * (2 * HALF), to_out, a, b, inside, HALF)


@triton.jit
def _heads(q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, position_ptr, q_out_ptr, k_out_ptr, M, T,
           table_rows, q_batch, q_row, q_head, k_batch, k_row, k_head, position_batch, eps, H: tl.constexpr,
           H_KV: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """All query and key heads of ROWS tokens of the M = B · T: normalised where there are weights, then turned."""
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (tokens < M)[:, None] & (cols < HALF)[None, :]
    cos, sin = 1.0, 0.0
    if cos_ptr is not None:
        cos, sin = _angles(cos_ptr, sin_ptr, position_ptr, tokens, T, M, table_rows, position_batch, cols, inside, HALF)
        if BACK:
            sin = -sin
    batch, t = tokens // T, tokens % T
    from_q = (batch * q_batch + t * q_row)[:, None] + cols[None, :]
    to_q = tokens[:, None] * (H * HALF * 2) + cols[None, :]
    _some_heads(q_ptr, q_weight_ptr, q_out_ptr, from_q, q_head, to_q, cos, sin, cols, inside, eps, H, HALF,
                cos_ptr is not None)
    from_k = (batch * k_batch + t * k_row)[:, None] + cols[None, :]
    to_k = tokens[:, None] * (H_KV * HALF * 2) + cols[None, :]
    _some_heads(k_ptr, k_weight_ptr, k_out_ptr, from_k, k_head, to_k, cos, sin, cols, inside, eps, H_KV, HALF,
                cos_ptr is not None)


@triton.jit
def _some_gradients(grad_ptr, x_ptr, weight_ptr, out_ptr, from_grad, grad_head, from_x, x_head, to_out, cos, sin, cols,
                    inside, sum_a, sum_b, eps, HEADS: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr):
    """The gradients of all query or all key heads of some tokens, and the weight's added to the sums.

    With n = x · rstd and g = the gradient turned back, times the weight: rstd · (g - n · mean(g · n)).
    """
    weight_a, weight_b = 1.0, 1.0
    if weight_ptr is not None:
        weight_a, weight_b = _weights(weight_ptr, cols, HALF)
    for head in range(HEADS):
        grad_a, grad_b = _load_pairs(grad_ptr + head * grad_head, from_grad, inside, HALF)
        if TURN:
            grad_a, grad_b = grad_a * cos + grad_b * sin, grad_b * cos - grad_a * sin
        if weight_ptr is not None:
            a, b = _load_pairs(x_ptr + head * x_head, from_x, inside, HALF)
            rstd = _rstd(a, b, eps, HALF)
            a, b = a * rstd, b * rstd
            sum_a += tl.where(inside, grad_a * a, 0.0)
            sum_b += tl.where(inside, grad_b * b, 0.0)
            grad_a, grad_b = grad_a * weight_a, grad_b * weight_b
            mean = ((tl.sum(grad_a * a, 1) + tl.sum(grad_b * b, 1)) / (2 * HALF))[:, None]
            grad_a, grad_b = (grad_a - a * mean) * rstd, (grad_b - b * mean) * rstd
        _store_pairs(out_ptr + head * (2 * HALF), to_out, grad_a, grad_b, inside, HALF)
    return sum_a, sum_b


@triton.jit
def _heads_backward(grad_q_ptr, grad_k_ptr, grad_v_ptr, x_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
                    position_ptr, grad_x_ptr, q_sums_ptr, k_sums_ptr, M, T, table_rows, q_batch, q_row, q_head, k_batch,
                    k_row, k_head, v_batch, v_row, v_head, x_batch, x_row, x_head, position_batch, eps, H: tl.constexpr,
                    H_KV: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """All heads of every P-th group of ROWS tokens, and the sums of the weights' gradients over them."""
    D: tl.constexpr = 2 * HALF
    cols = tl.arange(0, BLOCK)
    q_sum_a = tl.zeros((ROWS, BLOCK), tl.float32)
    q_sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
    k_sum_a = tl.zeros((ROWS, BLOCK), tl.float32)
    k_sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
    for group in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        tokens = (tl.zeros((ROWS,), tl.int64) + group) * ROWS + tl.arange(0, ROWS)
        inside = (tokens < M)[:, None] & (cols < HALF)[None, :]
        cos, sin = 1.0, 0.0
        if cos_ptr is not None:
            cos, sin = _angles(cos_ptr, sin_ptr, position_ptr, tokens, T, M, table_rows, position_batch, cols, inside,
                               HALF)
        batch, t = tokens // T, tokens % T
        from_x = (batch * x_batch + t * x_row)[:, None] + cols[None, :]
        to_x = tokens[:, None] * ((H + 2 * H_KV) * D) + cols[None, :]
        from_q = (batch * q_batch + t * q_row)[:, None] + cols[None, :]
        q_sum_a, q_sum_b = _some_gradients(
            grad_q_ptr, x_ptr, q_weight_ptr, grad_x_ptr, from_q, q_head, from_x, x_head, to_x, cos, sin, cols, inside,
            q_sum_a, q_sum_b, eps, H, HALF, cos_ptr is not None)
        from_k = (batch * k_batch + t * k_row)[:, None] + cols[None, :]
        k_sum_a, k_sum_b = _some_gradients(
            grad_k_ptr, x_ptr + H * x_head, k_weight_ptr, grad_x_ptr + H * D, from_k, k_head, from_x, x_head, to_x, cos,
            sin, cols, inside, k_sum_a, k_sum_b, eps, H_KV, HALF, cos_ptr is not None)
        from_v = (batch * v_batch + t * v_row)[:, None] + cols[None, :]
        for head in range(H_KV):
            a, b = _load_pairs(grad_v_ptr + head * v_head, from_v, inside, HALF)
            _store_pairs(grad_x_ptr + (H + H_KV) * D + head * D, to_x, a, b, inside, HALF)
    if q_sums_ptr is not None:
        to_sums = tl.program_id(0) * D + cols
        tl.store(q_sums_ptr + to_sums, tl.sum(q_sum_a, 0), mask=cols < HALF)
        tl.store(q_sums_ptr + to_sums + HALF, tl.sum(q_sum_b, 0), mask=cols < HALF)
        tl.store(k_sums_ptr + to_sums, tl.sum(k_sum_a, 0), mask=cols < HALF)
        tl.store(k_sums_ptr + to_sums + HALF, tl.sum(k_sum_b, 0), mask=cols < HALF)


def lint_cases():
    """Heads of 64 and 128 numbers in bfloat16, grouped, with norms and tables and with one of them."""
    for D in (64, 128):
        x = torch.empty(8, 1024, 16 + 2 * 4, D, dtype=torch.bfloat16, device="meta")
        q, k, v = x.split((16, 4, 4), 2)
        table, weight = torch.empty(1024, D // 2, device="meta"), torch.empty(D, device="meta")
        positions = torch.empty(8, 1024, dtype=torch.int64, device="meta")
        for name, weights, tables in (("norm, rotary", (weight, weight), (table, table, positions)),
                                      ("norm", (weight, weight), (None, None, None)),
                                      ("rotary", (None, None), (table, table, None))):
            yield run_forward(q, k, *weights, *tables, q, k, 1e-5).lint_case(f"{D} {name}")
            main, *_ = run_backward(q, k, v, x, *weights, *tables, x, *weights, 1e-5)
            yield main.lint_case(f"{D} {name}")


def tile(x) -> dict[str, int]:
    """ROWS and BLOCK for heads of the size of those of x."""
    block = next_power_of_2(x.shape[3] // 2)
    return dict(ROWS=max(1, min(PAIRS // block, next_power_of_2(x.shape[0] * x.shape[1]))), BLOCK=block)


def sizes(x, cos, positions) -> dict[str, int]:
    B, T = x.shape[:2]
    position_batch = 0 if positions is None or positions.dim() == 1 else positions.stride(0)
    return dict(M=B * T, T=T, table_rows=0 if cos is None else len(cos), position_batch=position_batch)


def strides(**given) -> dict[str, int]:
    return {f"{name}_{step}": x.stride(axis) for name, x in given.items()
            for axis, step in enumerate(("batch", "row", "head"))}


def run_forward(q, k, q_weight, k_weight, cos, sin, positions, q_out, k_out, eps, back=False) -> Launch:
    constants = tile(q)
    return Launch(
        _heads, (triton.cdiv(q.shape[0] * q.shape[1], constants["ROWS"]),),
        dict(q_ptr=q, k_ptr=k, q_weight_ptr=q_weight, k_weight_ptr=k_weight, cos_ptr=cos, sin_ptr=sin,
             position_ptr=positions, q_out_ptr=q_out, k_out_ptr=k_out, **sizes(q, cos, positions),
             **strides(q=q, k=k), eps=eps),
        dict(H=q.shape[2], H_KV=k.shape[2], HALF=q.shape[3] // 2, BACK=back, **constants),
        dict(num_warps=WARPS, maxnreg=MOST_REGISTERS))


def run_backward(grad_q, grad_k, grad_v, x, q_weight, k_weight, cos, sin, positions, grad_x, grad_q_weight,
                 grad_k_weight, eps) -> list[Launch]:
    """What writes grad_x and, where they are given, the gradients of the weights."""
    constants = tile(x)
    programs, sums = triton.cdiv(x.shape[0] * x.shape[1], constants["ROWS"]), (None, None)
    if grad_q_weight is not None:
        programs = max(1, min(programs, multiprocessors(x) * PROGRAMS_PER_SM))
        sums = x.new_empty(2, programs, x.shape[3], dtype=torch.float32).unbind()
    main = Launch(
        _heads_backward, (programs,),
        dict(grad_q_ptr=grad_q, grad_k_ptr=grad_k, grad_v_ptr=grad_v, x_ptr=x, q_weight_ptr=q_weight,
             k_weight_ptr=k_weight, cos_ptr=cos, sin_ptr=sin, position_ptr=positions, grad_x_ptr=grad_x,
             q_sums_ptr=sums[0], k_sums_ptr=sums[1], **sizes(x, cos, positions),
             **strides(q=grad_q, k=grad_k, v=grad_v, x=x), eps=eps),
        dict(H=grad_q.shape[2], H_KV=grad_k.shape[2], HALF=x.shape[3] // 2, **constants),
        dict(num_warps=WARPS, maxnreg=MOST_REGISTERS))
    return [main] if grad_q_weight is None else [main, add_partials(*sums, grad_q_weight, grad_k_weight)]


@torch.library.custom_op("minigpt::split_heads", mutates_args=())
def forward(x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
            positions: Tensor | None, H: int, H_kv: int, eps: float) -> tuple[Tensor, Tensor]:
    """q and k, normalised and turned."""
    outs = outputs(x, q_weight, k_weight, cos, sin, positions, H, H_kv, eps)
    q, k, _ = with_rows(x).split((H, H_kv, H_kv), dim=2)
    with torch.cuda.device_of(x):
        run_forward(q, k, *map(contiguous, (q_weight, k_weight, cos, sin, positions)), *outs, eps).run()
    return outs


@forward.register_fake
def outputs(x, q_weight, k_weight, cos, sin, positions, H, H_kv, eps):
    B, T, _, D = x.shape
    return x.new_empty(B, T, H, D), x.new_empty(B, T, H_kv, D)


@torch.library.custom_op("minigpt::split_heads_backward", mutates_args=())
def backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, x: Tensor, q_weight: Tensor | None,
             k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, eps: float,
             of_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and, `of_weights`, of both; empty tensors where they are not asked for."""
    grad_x, *of_both = grads = backward_outputs(grad_q, grad_k, grad_v, x, q_weight, k_weight, cos, sin, positions, eps,
                                                of_weights)
    with torch.cuda.device_of(x):
        for launch in run_backward(*map(with_rows, (grad_q, grad_k, grad_v, x)),
                                   *map(contiguous, (q_weight, k_weight, cos, sin, positions)), grad_x,
                                   *(of_both if of_weights else (None, None)), eps):
            launch.run()
    return grads


@backward.register_fake
def backward_outputs(grad_q, grad_k, grad_v, x, q_weight, k_weight, cos, sin, positions, eps, of_weights):
    of_both = (q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)) if of_weights else (
        x.new_empty(0), x.new_empty(0))
    return x.new_empty(x.shape), *of_both


def no_second_derivative(ctx, *_):
    raise RuntimeError("kernels.split_heads has no second derivative in Triton; kernels.use('reference') has one")


backward.register_autograd(no_second_derivative)


class Views(torch.autograd.Function):
    """Views of some heads each; their gradients are joined without a copy where they lie as views of one tensor do,
    which is how the attention kernel leaves those of q, k and v."""

    @staticmethod
    def forward(ctx, x, heads):
        return x.split(heads, dim=2)

    @staticmethod
    def backward(ctx, *grads):
        if torch.compiler.is_compiling():               # which sees for itself that it joins what was one
            return torch.cat(grads, dim=2), None
        first, D = grads[0], grads[0].shape[3]
        storage, place, heads = first.untyped_storage()._cdata, first.storage_offset(), 0
        for grad in grads:
            if (grad.untyped_storage()._cdata, grad.storage_offset()) != (storage, place + heads * D) \
                    or grad.stride() != first.stride() or grad.stride()[2:] != (D, 1):
                return torch.cat(grads, dim=2), None
            heads += grad.shape[2]
        return first.as_strided((*first.shape[:2], heads, D), first.stride()), None


class Heads(torch.autograd.Function):
    """q and k as new tensors, v as a view; one tensor is the gradient of all three."""

    @staticmethod
    def forward(ctx, x, q_weight, k_weight, cos, sin, positions, heads, eps):
        ctx.save_for_backward(x, q_weight, k_weight, cos, sin, positions)
        ctx.eps = eps
        return *forward(x, q_weight, k_weight, cos, sin, positions, heads[0], heads[1], eps), x[:, :, -heads[2]:]

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v):
        of_weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad_x, *of_both = backward(grad_q, grad_k, grad_v, *ctx.saved_tensors, ctx.eps, of_weights)
        return grad_x, *(grad if asked else None for grad, asked in zip(of_both, ctx.needs_input_grad[1:3])), \
            *[None] * 5


def split_heads(x, heads, q_weight=None, k_weight=None, eps=1e-5, cos=None, sin=None, positions=None):
    check_split_heads(x, heads, q_weight, k_weight, eps, cos, sin, positions)
    check_dtypes("split_heads", x=x, **{name: given for name, given in dict(
        q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin).items() if given is not None})
    if q_weight is None and cos is None:
        return Views.apply(x, heads)
    if x.shape[3] % 2:                                  # a norm of odd heads, which have no pairs
        from kernels.rms_norm import rms_norm
        q, k, v = Views.apply(x, heads)
        return rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), v
    return Heads.apply(x, q_weight, k_weight, cos, sin, positions, heads, eps)
