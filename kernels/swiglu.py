"""`swiglu` on Triton: silu(gate) · up and both gradients, each in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import Launch
from kernels.pointwise import WARPS, check_dtypes, load, no_second_derivative, rows_of, store, tile, tiles
from kernels.reference import check_swiglu


@triton.jit
def _swiglu(gate_ptr, up_ptr, y_ptr, M, gate_stride, up_stride, N: tl.constexpr, ROWS: tl.constexpr,
            BLOCK: tl.constexpr):
    rows, cols, inside = tile(M, N, ROWS, BLOCK)
    gate = load(gate_ptr, rows, gate_stride, cols, inside)
    up = load(up_ptr, rows, up_stride, cols, inside)
    store(y_ptr, rows, N, cols, inside, gate * tl.sigmoid(gate) * up)


@triton.jit
def _swiglu_backward(grad_ptr, gate_ptr, up_ptr, grads_ptr, M, grad_stride, gate_stride, up_stride, N: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """With s = sigmoid(gate): grad · up · s (1 + gate (1 - s)) and grad · gate s, side by side in (M, 2N)."""
    rows, cols, inside = tile(M, N, ROWS, BLOCK)
    grad = load(grad_ptr, rows, grad_stride, cols, inside)
    gate = load(gate_ptr, rows, gate_stride, cols, inside)
    up = load(up_ptr, rows, up_stride, cols, inside)
    sigmoid = tl.sigmoid(gate)
    store(grads_ptr, rows, 2 * N, cols, inside, grad * up * sigmoid * (1 + gate * (1 - sigmoid)))
    store(grads_ptr + N, rows, 2 * N, cols, inside, grad * gate * sigmoid)


def lint_cases():
    """A width of 3072 in bfloat16, gate and up the halves of one projection."""
    both = torch.empty(4096, 6144, dtype=torch.bfloat16, device="meta")
    gate, up = both.chunk(2, -1)
    yield run_forward(gate, up, up).lint_case("3072")
    yield run_backward(up, gate, up, both).lint_case("3072")


def run_forward(gate, up, y) -> Launch:
    M, N = gate.shape
    grid, constants = tiles(M, N)
    return Launch(_swiglu, grid, dict(gate_ptr=gate, up_ptr=up, y_ptr=y, M=M, gate_stride=gate.stride(0),
                                      up_stride=up.stride(0)), dict(N=N, **constants), dict(num_warps=WARPS))


def run_backward(grad, gate, up, grads) -> Launch:
    M, N = gate.shape
    grid, constants = tiles(M, N)
    return Launch(_swiglu_backward, grid,
                  dict(grad_ptr=grad, gate_ptr=gate, up_ptr=up, grads_ptr=grads, M=M, grad_stride=grad.stride(0),
                       gate_stride=gate.stride(0), up_stride=up.stride(0)),
                  dict(N=N, **constants), dict(num_warps=WARPS))


@torch.library.custom_op("minigpt::swiglu", mutates_args=())
def forward(gate: Tensor, up: Tensor) -> Tensor:
    y = gate.new_empty(gate.shape)
    with torch.cuda.device_of(gate):
        run_forward(rows_of(gate), rows_of(up), y).run()
    return y


@forward.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("minigpt::swiglu_backward", mutates_args=())
def backward(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The gradients of gate and up, side by side in the last dimension."""
    grads = gradients_of(grad, gate, up)
    with torch.cuda.device_of(gate):
        run_backward(rows_of(grad), rows_of(gate), rows_of(up), grads).run()
    return grads


@backward.register_fake
def gradients_of(grad, gate, up):
    return gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1])


@torch.library.custom_op("minigpt::swiglu_of_halves", mutates_args=())
def forward_of_halves(x: Tensor) -> Tensor:
    """Of gate and up side by side, so that their gradients need not be joined."""
    return forward(*x.chunk(2, -1))


@forward_of_halves.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward_of_swiglu(ctx, grad):
    return backward(grad, *ctx.saved_tensors).chunk(2, -1)


def backward_of_halves(ctx, grad):
    return backward(grad, *ctx.saved_tensors[0].chunk(2, -1))


forward.register_autograd(backward_of_swiglu, setup_context=save_for_backward)
forward_of_halves.register_autograd(backward_of_halves, setup_context=save_for_backward)
backward.register_autograd(no_second_derivative)


def swiglu(gate, up=None):
    check_swiglu(gate, up)
    check_dtypes("swiglu", gate=gate)
    if up is None:
        return forward_of_halves(gate)
    return forward(gate, up) if gate.dim() else forward(gate[None], up[None])[0]
