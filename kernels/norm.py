"""The Triton kernels of `layer_norm` and `rms_norm`, forward and backward, as torch.library ops with gradients.

Both norms are one computation: RMSNorm is LayerNorm that subtracts no mean, CENTRED False here. For a row s = x +
residual of N numbers, n = (s - mean) · rstd, y = n · weight + bias and g = grad_y · weight:
    grad_s = rstd · (g - mean(g) - n · mean(g · n)) + grad_total        without mean(g) where nothing is centred
    grad_weight = Σ grad_y · n,  grad_bias = Σ grad_y                   over all rows
Memory sets the speed, so each direction reads and writes each (M, N) tensor once where a row fits the registers.
Legend: M rows, N width, P programs, each with its row of (P, N) partial sums, which a second kernel adds in a fixed
order.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import Launch, multiprocessors, round_to
from kernels.reference import MAX_NORM_WIDTH

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORWARD = {64: (64, 4), 128: (32, 4), 256: (16, 4), 512: (8, 4), 1024: (4, 4), 2048: (2, 4), 4096: (1, 4),
           8192: (1, 8), 16384: (1, 16)}
"""{largest width: (rows at a time, warps)} with a whole row in registers, 32 numbers a thread."""
FORWARD_WIDE = (4096, 8)
"""(columns at a time, warps) for wider rows, which are read twice, the second time from L2."""
BACKWARD = {2: {64: (64, 8), 128: (32, 8), 256: (16, 8), 512: (8, 8), 1024: (4, 8), 2048: (1, 4), 4096: (1, 8),
                8192: (1, 16)},
            4: {64: (32, 8), 128: (16, 8), 256: (8, 8), 512: (4, 8), 1024: (2, 8), 2048: (1, 8), 4096: (1, 16)}}
"""{bytes of a number of the sum: as FORWARD}, 16 numbers a thread, or 8: beside the row, the sums of two gradients stay
in registers."""
BACKWARD_WIDE = {2: (1024, 4, 8), 4: (1024, 2, 8)}
"""{bytes of a number of the sum: (columns at a time, rows at a time, warps)} for wider rows, whose sums another kernel
makes first."""
PARTIALS, PARTIALS_WIDE = (64, 32), (8, 512)
"""(rows at a time, columns of a program) of the partial sums, of which wide rows have few."""
THREADS_PER_SM = 512
"""Of the persistent programs of a backward pass: four with 4 warps, two with 8, one with 16."""
REGISTERS = 65536 // THREADS_PER_SM
"""That each of those threads may have: ptxas would rather spill, for another program that never comes."""


@triton.jit
def _load(ptr, rows, stride, cols, inside):
    """A (ROWS, BLOCK) tile in float32, 0 outside."""
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sum_of_inputs(x_ptr, residual_ptr, total_ptr, rows, x_stride, residual_stride, cols, inside):
    """x + residual, rounded as it is stored."""
    total = _load(x_ptr, rows, x_stride, cols, inside)
    if residual_ptr is not None:
        total += _load(residual_ptr, rows, residual_stride, cols, inside)
        total = round_to(total, total_ptr.dtype.element_ty).to(tl.float32)
    return total


@triton.jit
def _store_outputs(normal, total, weight_ptr, bias_ptr, y_ptr, total_ptr, rows, cols, inside, N: tl.constexpr):
    """y = normal · weight + bias, and the sum where there is one."""
    offsets = rows[:, None] * N + cols[None, :]
    if total_ptr is not None:
        tl.store(total_ptr + offsets, round_to(total, total_ptr.dtype.element_ty), mask=inside)
    if weight_ptr is not None:
        normal *= tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        normal += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, round_to(normal, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm(x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr, M, x_stride,
          residual_stride, eps, N: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS whole rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    total = _sum_of_inputs(x_ptr, residual_ptr, total_ptr, rows, x_stride, residual_stride, cols, inside)
    deviation = total
    if CENTRED:
        mean = tl.sum(total, 1) / N                                                 # (ROWS,)
        tl.store(mean_ptr + rows, mean, mask=rows < M)
        deviation = tl.where(inside, total - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(deviation * deviation, 1) / N + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    _store_outputs(deviation * rstd[:, None], total, weight_ptr, bias_ptr, y_ptr, total_ptr, rows, cols, inside, N)


@triton.jit
def _norm_wide(x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr, M, x_stride,
               residual_stride, eps, N: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr):
    """One row, block by block: its statistics, merged as by Chan, Golub and LeVeque (1983), then its outputs."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)                           # (1,)
    mean = tl.zeros((1,), tl.float32)
    squares = tl.zeros((1,), tl.float32)                                            # Σ (s - mean)²
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = (cols < N)[None, :]
        deviation = _sum_of_inputs(x_ptr, residual_ptr, total_ptr, row, x_stride, residual_stride, cols, inside)
        if CENTRED:
            count = tl.sum(inside.to(tl.float32), 1)
            mean_of_block = tl.sum(deviation, 1) / count
            deviation = tl.where(inside, deviation - mean_of_block[:, None], 0.0)
            share = count / (count + start)
            squares += (mean_of_block - mean) * (mean_of_block - mean) * share * start
            mean += (mean_of_block - mean) * share
        squares += tl.sum(deviation * deviation, 1)
    rstd = tl.rsqrt(squares / N + eps)
    if CENTRED:
        tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = (cols < N)[None, :]
        total = _sum_of_inputs(x_ptr, residual_ptr, total_ptr, row, x_stride, residual_stride, cols, inside)
        normal = (total - mean[:, None]) * rstd[:, None]
        _store_outputs(normal, total, weight_ptr, bias_ptr, y_ptr, total_ptr, row, cols, inside, N)


@triton.jit
def _load_normal(total_ptr, mean_ptr, rstd_ptr, rows, total_stride, cols, inside, M, CENTRED: tl.constexpr):
    """n, a (ROWS, BLOCK) tile, and rstd, (ROWS,)."""
    normal = _load(total_ptr, rows, total_stride, cols, inside)
    if CENTRED:
        normal -= tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
    return normal * rstd[:, None], rstd


@triton.jit
def _row_sums(grad_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, sums_ptr, M, grad_stride, total_stride,
              N: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of g, where it is asked for, and of g · n over one row, to (2, M)."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)                           # (1,)
    sum_g = tl.zeros((1, BLOCK), tl.float32)
    sum_gn = tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = (cols < N)[None, :]
        g = _load(grad_ptr, row, grad_stride, cols, inside)
        normal, _ = _load_normal(total_ptr, mean_ptr, rstd_ptr, row, total_stride, cols, inside, M, CENTRED)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        sum_gn += g * normal
        if CENTRED:
            sum_g += g
    if CENTRED:
        tl.store(sums_ptr + row, tl.sum(sum_g, 1))
    tl.store(sums_ptr + M + row, tl.sum(sum_gn, 1))


@triton.jit
def _norm_backward(grad_ptr, grad_total_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, sums_ptr, grad_x_ptr,
                   narrow_ptr, weight_sums_ptr, bias_sums_ptr, M, grad_stride, grad_total_stride, total_stride,
                   N: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Every P-th group of ROWS rows, in BLOCK columns: all of them unless the rows' sums are given."""
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    for group in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=2):
        rows = (tl.zeros((ROWS,), tl.int64) + group) * ROWS + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        g = _load(grad_ptr, rows, grad_stride, cols, inside)
        normal, rstd = _load_normal(total_ptr, mean_ptr, rstd_ptr, rows, total_stride, cols, inside, M, CENTRED)
        if weight_sums_ptr is not None:
            sum_weight += g * normal
        if bias_sums_ptr is not None:
            sum_bias += g
        g *= weight
        if sums_ptr is None:
            sum_gn = tl.sum(g * normal, 1)                                          # (ROWS,)
        else:
            sum_gn = tl.load(sums_ptr + M + rows, mask=rows < M, other=0.0)
        grad_x = g - normal * (sum_gn / N)[:, None]
        if CENTRED:
            if sums_ptr is None:
                sum_g = tl.sum(g, 1)
            else:
                sum_g = tl.load(sums_ptr + rows, mask=rows < M, other=0.0)
            grad_x -= (sum_g / N)[:, None]
        grad_x *= rstd[:, None]
        if grad_total_ptr is not None:
            grad_x += _load(grad_total_ptr, rows, grad_total_stride, cols, inside)
        offsets = rows[:, None] * N + cols[None, :]
        tl.store(grad_x_ptr + offsets, round_to(grad_x, grad_x_ptr.dtype.element_ty), mask=inside)
        if narrow_ptr is not None:
            tl.store(narrow_ptr + offsets, round_to(grad_x, narrow_ptr.dtype.element_ty), mask=inside)
    partial = tl.program_id(0) * N + cols
    if weight_sums_ptr is not None:
        tl.store(weight_sums_ptr + partial, tl.sum(sum_weight, 0), mask=cols < N)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + partial, tl.sum(sum_bias, 0), mask=cols < N)


@triton.jit
def _add_partials(weight_sums_ptr, bias_sums_ptr, grad_weight_ptr, grad_bias_ptr, P, N, ROWS: tl.constexpr,
                  BLOCK: tl.constexpr):
    """Partial sums (P, N) to gradients (N,), in BLOCK columns."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if grad_weight_ptr is not None:
        _add_columns(weight_sums_ptr, grad_weight_ptr, P, cols, N, ROWS, BLOCK)
    if grad_bias_ptr is not None:
        _add_columns(bias_sums_ptr, grad_bias_ptr, P, cols, N, ROWS, BLOCK)


@triton.jit
def _add_columns(sums_ptr, grad_ptr, P, cols, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all rows in some columns."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, P, ROWS):
        rows = start + tl.arange(0, ROWS)
        total += _load(sums_ptr, rows, N, cols, (rows < P)[:, None] & (cols < N)[None, :])
    tl.store(grad_ptr + cols, round_to(tl.sum(total, 0), grad_ptr.dtype.element_ty), mask=cols < N)


def lint_cases(centred: bool):
    """Every configuration of the tables, in bfloat16 with float32 parameters and a residual in either."""
    for N, dtype in itertools.product([*FORWARD, MAX_NORM_WIDTH], (torch.bfloat16, torch.float32)):
        x, weight = torch.empty(4096, N, dtype=torch.bfloat16, device="meta"), torch.empty(N, device="meta")
        residual, narrow = (x, None) if dtype == x.dtype else (x.to(dtype), x)
        bias = weight if centred else None
        rstd = torch.empty(4096, device="meta")
        mean = rstd if centred else None
        name = f"{N} {str(dtype).removeprefix('torch.')}"
        yield forward(x, weight, bias, residual, x, residual, mean, rstd, 1e-5, centred).lint_case(name)
        *rows, parameters = backward(x, residual, residual, weight, mean, rstd, residual, narrow, weight, bias, centred)
        for launch in rows:
            yield launch.lint_case(name)
        if N in (max(BACKWARD[2]), MAX_NORM_WIDTH) and narrow is None:  # each for all widths up to it
            yield parameters.lint_case(str(N))


def rows_of(x: Tensor | None) -> Tensor | None:
    """(..., N) as (M, N), each row contiguous in memory."""
    if x is None:
        return None
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def stride_of(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def fitting(table, N):
    """(block, rows, warps) of the smallest width in a table that holds N; None where none does."""
    return next(((width, *table[width]) for width in sorted(table) if width >= N), None)


def forward(x, weight, bias, residual, y, total, mean, rstd, eps, centred) -> Launch:
    """What writes y, total, mean and rstd; x and residual are rows."""
    M, N = x.shape
    arguments = dict(
        x_ptr=x, residual_ptr=residual, weight_ptr=weight, bias_ptr=bias, y_ptr=y, total_ptr=total, mean_ptr=mean,
        rstd_ptr=rstd, M=M, x_stride=x.stride(0), residual_stride=stride_of(residual), eps=eps)
    if config := fitting(FORWARD, N):
        block, rows, warps = config
        constants = dict(N=N, CENTRED=centred, ROWS=rows, BLOCK=block)
        return Launch(_norm, (triton.cdiv(M, rows),), arguments, constants, dict(num_warps=warps))
    block, warps = FORWARD_WIDE
    return Launch(_norm_wide, (M,), arguments, dict(N=N, CENTRED=centred, BLOCK=block), dict(num_warps=warps))


def backward(grad, grad_total, total, weight, mean, rstd, grad_x, narrow, grad_weight, grad_bias,
             centred) -> list[Launch]:
    """What writes grad_x, the same in another dtype to narrow, grad_weight and grad_bias.

    grad, grad_total and total are rows.
    """
    M, N = total.shape
    launches, sums = [], None
    common = dict(grad_ptr=grad, total_ptr=total, weight_ptr=weight, mean_ptr=mean, rstd_ptr=rstd)
    sizes = dict(M=M, grad_stride=grad.stride(0), total_stride=total.stride(0))
    if config := fitting(BACKWARD[total.itemsize], N):
        block, rows, warps = config
    else:
        sums = total.new_empty(2, M, dtype=torch.float32)
        block, warps = FORWARD_WIDE
        launches.append(Launch(_row_sums, (M,), common | sizes | dict(sums_ptr=sums),
                               dict(N=N, CENTRED=centred, BLOCK=block), dict(num_warps=warps)))
        block, rows, warps = BACKWARD_WIDE[total.itemsize]
    columns = triton.cdiv(N, block)
    programs = max(1, min(triton.cdiv(M, rows), multiprocessors(total) * THREADS_PER_SM // (32 * warps) // columns))
    weight_sums, bias_sums = (None if grad is None else total.new_empty(programs, N, dtype=torch.float32)
                              for grad in (grad_weight, grad_bias))
    launches.append(Launch(
        _norm_backward, (programs, columns),
        common | sizes | dict(grad_total_ptr=grad_total, sums_ptr=sums, grad_x_ptr=grad_x, narrow_ptr=narrow,
                              weight_sums_ptr=weight_sums, bias_sums_ptr=bias_sums,
                              grad_total_stride=stride_of(grad_total)),
        dict(N=N, CENTRED=centred, ROWS=rows, BLOCK=block), dict(num_warps=warps, maxnreg=REGISTERS)))
    if grad_weight is not None or grad_bias is not None:
        launches.append(add_partials(weight_sums, bias_sums, grad_weight, grad_bias,
                                     PARTIALS if sums is None else PARTIALS_WIDE))
    return launches


def add_partials(weight_sums, bias_sums, grad_weight, grad_bias, tile=PARTIALS) -> Launch:
    """What adds the rows of (P, N) sums, of both or of one, to (N,) gradients."""
    P, N = (weight_sums if grad_bias is None else bias_sums).shape
    rows, block = tile
    return Launch(_add_partials, (triton.cdiv(N, block),),
                  dict(weight_sums_ptr=weight_sums, bias_sums_ptr=bias_sums, grad_weight_ptr=grad_weight,
                       grad_bias_ptr=grad_bias, P=P, N=N), dict(ROWS=rows, BLOCK=block), dict(num_warps=4))


@torch.library.custom_op("minigpt::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float,
         centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x + residual, mean and 1 / sqrt(var + eps) of each row; empty tensors for what there is none of."""
    y, total, mean, rstd = norm_outputs(x, weight, bias, residual, eps, centred)
    with torch.cuda.device_of(x):
        forward(rows_of(x), contiguous(weight), contiguous(bias), rows_of(residual), y,
                None if residual is None else total, mean if centred else None, rstd, eps, centred).run()
    return y, total, mean, rstd


@norm.register_fake
def norm_outputs(x, weight, bias, residual, eps, centred):
    M = x.numel() // x.shape[-1]
    total = x.new_empty(0) if residual is None else x.new_empty(
        x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    mean = x.new_empty(M if centred else 0, dtype=torch.float32)
    return x.new_empty(x.shape), total, mean, x.new_empty(M, dtype=torch.float32)


@torch.library.custom_op("minigpt::norm_backward", mutates_args=())
def norm_backward(grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, bias: Tensor | None,
                  mean: Tensor, rstd: Tensor, centred: bool, of_parameters: bool,
                  narrow_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x + residual, in the sum's dtype and in `narrow_dtype`, and `of_parameters` of weight and bias.

    Empty tensors for what there is none of.
    """
    grad_x, narrow, grad_weight, grad_bias = grads = norm_backward_outputs(
        grad, grad_total, total, weight, bias, mean, rstd, centred, of_parameters, narrow_dtype)
    with torch.cuda.device_of(total):
        for launch in backward(rows_of(grad), rows_of(grad_total), rows_of(total), contiguous(weight),
                               mean if centred else None, rstd, grad_x, narrow if narrow_dtype else None,
                               grad_weight if of_parameters and weight is not None else None,
                               grad_bias if of_parameters and bias is not None else None, centred):
            launch.run()
    return grads


@norm_backward.register_fake
def norm_backward_outputs(grad, grad_total, total, weight, bias, mean, rstd, centred, of_parameters, narrow_dtype):
    narrow = total.new_empty(total.shape, dtype=narrow_dtype) if narrow_dtype else total.new_empty(0)
    grad_weight, grad_bias = (
        total.new_empty(0) if p is None or not of_parameters else p.new_empty(p.shape) for p in (weight, bias))
    return total.new_empty(total.shape), narrow, grad_weight, grad_bias


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def save_for_backward(ctx, inputs, output):
    x, weight, bias, residual, _, ctx.centred = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, bias, mean, rstd)
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)                    # nobody may use the sum, and nobody uses the statistics


def backward_of_norm(ctx, grad, grad_total, *_):
    total, weight, bias, mean, rstd = ctx.saved_tensors
    _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    if grad is None:
        grad = torch.zeros_like(total, dtype=ctx.x_dtype)
    if ctx.residual_dtype is None:
        grad_total = None                               # of the empty tensor
    narrow_dtype = next((dtype for dtype in (ctx.x_dtype, ctx.residual_dtype) if dtype not in (total.dtype, None)),
                        None)
    grad_x, narrow, grad_weight, grad_bias = norm_backward(
        grad, grad_total, total, weight, bias, mean, rstd, ctx.centred, needs_weight or needs_bias, narrow_dtype)

    def of(dtype):
        return narrow if dtype == narrow_dtype else grad_x.to(dtype)

    return (of(ctx.x_dtype), grad_weight if needs_weight else None, grad_bias if needs_bias else None,
            None if ctx.residual_dtype is None else of(ctx.residual_dtype), None, None)


def no_second_derivative(ctx, *_):
    raise RuntimeError("the Triton norms have no second derivative; kernels.use('reference') has one")


norm.register_autograd(backward_of_norm, setup_context=save_for_backward)
norm_backward.register_autograd(no_second_derivative)
