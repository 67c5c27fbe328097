"""`quantized_linear` on Triton: few rows against a weight that is read as it lies, in 8 or 4 bits.

A decoding step has few rows, and reading the weight is all that takes time. With more rows than MOST_ROWS the products
take over, and the weight is made whole for cuBLAS.
Legend: M rows, N outputs, K inputs, GROUP inputs that share a scale.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import MOST_REGISTERS, Launch, dot, next_power_of_2, round_to
from kernels.pointwise import check_dtypes, no_second_derivative, rows_of
from kernels.reference import check_quantized_linear, dequantize

MOST_ROWS = 64
OUTPUTS, COLUMNS, WARPS = 32, 128, 4
"""Of a tile, which takes no more columns than a group has."""


@triton.jit
def _quantized_linear(x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, M, N, x_stride, K: tl.constexpr,
                      GROUP: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_K: tl.constexpr):
    """BLOCK_N outputs of all rows, BLOCK_K of a group's columns of the weight at a time: bytes, of one input or two."""
    rows, outputs = tl.arange(0, BLOCK_M).to(tl.int64), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    GROUPS: tl.constexpr = K // GROUP
    BYTES: tl.constexpr = GROUP // 2 if PACKED else GROUP
    BLOCKS: tl.constexpr = (BYTES + BLOCK_K - 1) // BLOCK_K
    for block in range(0, GROUPS * BLOCKS):
        group = block // BLOCKS
        within = block % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
        known = within < BYTES
        whole = tl.load(weight_ptr + outputs.to(tl.int64)[:, None] * (GROUPS * BYTES) + group * BYTES + within[None, :],
                        mask=(outputs < N)[:, None] & known[None, :], other=0)
        x_at = x_ptr + rows[:, None] * x_stride + group * GROUP + within[None, :]
        there = (rows < M)[:, None] & known[None, :]
        x = tl.load(x_at, mask=there, other=0.0)
        if PACKED:
            later = tl.load(x_at + BYTES, mask=there, other=0.0)
            high = ((whole >> 4).to(tl.int8) - 8).to(tl.float32)
            whole = (whole & 15).to(tl.int8) - 8
            part = dot(x, round_to(whole.to(tl.float32), x.dtype).T) + dot(later, round_to(high, x.dtype).T)
        else:
            part = dot(x, round_to(whole.to(tl.float32), x.dtype).T)
        scale = tl.load(scale_ptr + outputs.to(tl.int64) * GROUPS + group, mask=outputs < N, other=0.0).to(tl.float32)
        total += part * scale[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * N + outputs[None, :], round_to(total, y_ptr.dtype.element_ty),
             mask=(rows < M)[:, None] & (outputs < N)[None, :])


def lint_cases():
    """4096 x 4096 in 8 bits by row and 4 bits by groups of 128, for a row of bfloat16 and for all that are taken."""
    for M in (1, MOST_ROWS):
        x = torch.empty(M, 4096, dtype=torch.bfloat16, device="meta")
        y = torch.empty(M, 4096, dtype=torch.bfloat16, device="meta")
        for name, dtype, columns, groups in (("8 bits", torch.int8, 4096, 1), ("4 bits", torch.uint8, 2048, 32)):
            weight = torch.empty(4096, columns, dtype=dtype, device="meta")
            yield product(x, weight, torch.empty(4096, groups, device="meta"), None, y).lint_case(f"{M} x {name}")


def product(x, weight, scales, bias, y) -> Launch:
    (M, K), N = x.shape, len(weight)
    group, columns = K // scales.shape[1], weight.shape[1] // scales.shape[1]
    return Launch(
        _quantized_linear, (triton.cdiv(N, OUTPUTS),),
        dict(x_ptr=x, weight_ptr=weight, scale_ptr=scales, bias_ptr=bias, y_ptr=y, M=M, N=N, x_stride=x.stride(0)),
        dict(K=K, GROUP=group, PACKED=weight.dtype == torch.uint8, BLOCK_M=max(16, next_power_of_2(M)),
             BLOCK_N=OUTPUTS, BLOCK_K=min(COLUMNS, max(16, next_power_of_2(columns)))),
        dict(num_warps=WARPS, num_stages=3, maxnreg=MOST_REGISTERS),
        "plain" if x.dtype == torch.float32 else "small dot")


@torch.library.custom_op("minigpt::quantized_linear", mutates_args=())
def op(x: Tensor, packed_weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    rows = rows_of(x)
    if len(rows) > MOST_ROWS:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, dequantize(packed_weight, scales, x.dtype), None if bias is None else bias.to(x.dtype))
    y = x.new_empty(*x.shape[:-1], len(packed_weight))
    with torch.cuda.device_of(x):
        product(rows, packed_weight.contiguous(), scales.contiguous(), None if bias is None else bias.contiguous(),
                y).run()
    return y


@op.register_fake
def _(x, packed_weight, scales, bias):
    return x.new_empty(*x.shape[:-1], len(packed_weight))


@torch.library.custom_op("minigpt::quantized_linear_backward", mutates_args=())
def backward(grad: Tensor, packed_weight: Tensor, scales: Tensor) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        return grad @ dequantize(packed_weight, scales, grad.dtype)


@backward.register_fake
def _(grad, packed_weight, scales):
    K = packed_weight.shape[1] * (2 if packed_weight.dtype == torch.uint8 else 1)
    return grad.new_empty(*grad.shape[:-1], K)


def save_for_backward(ctx, inputs, output):
    _, packed_weight, scales, _ = inputs
    ctx.save_for_backward(packed_weight, scales)


def gradient(ctx, grad):
    return backward(grad, *ctx.saved_tensors), None, None, None


op.register_autograd(gradient, setup_context=save_for_backward)
backward.register_autograd(no_second_derivative)


def quantized_linear(x, packed_weight, scales, bias=None):
    check_quantized_linear(x, packed_weight, scales, bias)
    check_dtypes("quantized_linear", x=x, scales=scales)
    return op(x, packed_weight, scales, bias)
