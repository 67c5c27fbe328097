"""`gelu` on Triton: bias and activation in one pass; their gradients in another, the bias's summed on the way."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import Launch
from kernels.norm import add_partials
from kernels.pointwise import (
    WARPS,
    check_dtypes,
    load,
    no_second_derivative,
    rows_of,
    store,
    tile,
    tiles,
    tiles_of_programs,
)
from kernels.reference import check_gelu

TWICE = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBE = tl.constexpr(0.044715)
ROOT_OF_HALF = tl.constexpr(math.sqrt(0.5))
DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def _share(x, TANH: tl.constexpr):
    """The part of x that GELU passes on, Φ(x) or its approximation (1 + tanh(u)) / 2 = sigmoid(2u), and its slope.

    Tensors stand before constants: the interpreter makes a constant of a constant times a tensor.
    """
    if TANH:
        twice = x * (1 + x * x * CUBE) * TWICE
        small = tl.exp(-tl.abs(twice))
        share = tl.where(twice < 0, small, 1.0) / (1 + small)
        return share, small / ((1 + small) * (1 + small)) * (1 + x * x * (3 * CUBE)) * TWICE
    else:
        return 0.5 * (1 + tl.erf(x * ROOT_OF_HALF)), tl.exp(-0.5 * x * x) * DENSITY


@triton.jit
def _gelu(x_ptr, bias_ptr, y_ptr, M, x_stride, N: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr,
          BLOCK: tl.constexpr):
    rows, cols, inside = tile(M, N, ROWS, BLOCK)
    x = load(x_ptr, rows, x_stride, cols, inside)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    share, _ = _share(x, TANH)
    store(y_ptr, rows, N, cols, inside, x * share)


@triton.jit
def _gelu_backward(grad_ptr, x_ptr, bias_ptr, grad_x_ptr, bias_sums_ptr, M, grad_stride, x_stride, N: tl.constexpr,
                   TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """grad · (share + x · slope). Every P-th group of rows."""
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    for group in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        rows = (tl.zeros((ROWS,), tl.int64) + group) * ROWS + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        x = load(x_ptr, rows, x_stride, cols, inside) + bias
        grad = load(grad_ptr, rows, grad_stride, cols, inside)
        share, slope = _share(x, TANH)
        grad *= share + x * slope
        store(grad_x_ptr, rows, N, cols, inside, grad)
        if bias_sums_ptr is not None:
            sums += grad
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + tl.program_id(0) * N + cols, tl.sum(sums, 0), mask=cols < N)


def lint_cases():
    """A width of 3072 in bfloat16, with a float32 bias and without."""
    x, bias = torch.empty(4096, 3072, dtype=torch.bfloat16, device="meta"), torch.empty(3072, device="meta")
    for approximate in ("tanh", "none"):
        for name, given in (("bias", bias), ("no bias", None)):
            yield run_forward(x, given, x, approximate).lint_case(f"{approximate} {name}")
            yield run_backward(x, x, given, x, given, approximate)[0].lint_case(f"{approximate} {name}")


def run_forward(x, bias, y, approximate) -> Launch:
    grid, constants = tiles(*x.shape)
    return Launch(_gelu, grid, dict(x_ptr=x, bias_ptr=bias, y_ptr=y, M=len(x), x_stride=x.stride(0)),
                  dict(N=x.shape[1], TANH=approximate == "tanh", **constants), dict(num_warps=WARPS))


def run_backward(grad, x, bias, grad_x, grad_bias, approximate) -> list[Launch]:
    """What writes grad_x and, where it is given, grad_bias."""
    grid, constants = tiles(*x.shape) if grad_bias is None else tiles_of_programs(x)
    sums = None if grad_bias is None else x.new_empty(grid[0], x.shape[1], dtype=torch.float32)
    main = Launch(_gelu_backward, grid,
                  dict(grad_ptr=grad, x_ptr=x, bias_ptr=bias, grad_x_ptr=grad_x, bias_sums_ptr=sums, M=len(x),
                       grad_stride=grad.stride(0), x_stride=x.stride(0)),
                  dict(N=x.shape[1], TANH=approximate == "tanh", **constants), dict(num_warps=WARPS))
    return [main] if grad_bias is None else [main, add_partials(None, sums, None, grad_bias)]


@torch.library.custom_op("minigpt::gelu", mutates_args=())
def forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    y = x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        run_forward(rows_of(x), None if bias is None else bias.contiguous(), y, approximate).run()
    return y


@forward.register_fake
def _(x, bias, approximate):
    return x.new_empty(x.shape)


@torch.library.custom_op("minigpt::gelu_backward", mutates_args=())
def backward(grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str, of_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and, where it is asked for, of bias; an empty tensor where it is not."""
    grad_x, grad_bias = outputs(grad, x, bias, approximate, of_bias)
    with torch.cuda.device_of(x):
        for launch in run_backward(rows_of(grad), rows_of(x), None if bias is None else bias.contiguous(), grad_x,
                                   grad_bias if of_bias else None, approximate):
            launch.run()
    return grad_x, grad_bias


@backward.register_fake
def outputs(grad, x, bias, approximate, of_bias):
    return x.new_empty(x.shape), bias.new_empty(bias.shape) if of_bias else x.new_empty(0)


def save_for_backward(ctx, inputs, output):
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def backward_of_gelu(ctx, grad):
    of_bias = ctx.needs_input_grad[1]
    grad_x, grad_bias = backward(grad, *ctx.saved_tensors, ctx.approximate, of_bias)
    return grad_x, grad_bias if of_bias else None, None


forward.register_autograd(backward_of_gelu, setup_context=save_for_backward)
backward.register_autograd(no_second_derivative)


def gelu(x, bias=None, approximate="tanh"):
    check_gelu(x, bias, approximate)
    check_dtypes("gelu", x=x, **({} if bias is None else dict(bias=bias)))
    return forward(x, bias, approximate) if x.dim() else forward(x[None], bias, approximate)[0]
