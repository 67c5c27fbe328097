"""`rotary` on Triton: queries and keys turned in one launch, each read and written once, in float32 inside.

The kernel is that of `split_heads`. The gradient of a turn is the turn back, so it serves both directions.
"""

import torch
from torch import Tensor

from kernels.common import with_rows
from kernels.norm import contiguous
from kernels.pointwise import check_dtypes
from kernels.reference import check_rotary
from kernels.split_heads import run_forward


def lint_cases():
    """Heads of 64 and 128 numbers in bfloat16, views of one projection, with and without positions."""
    for D in (64, 128):
        q, k, _ = torch.empty(8, 1024, 16 + 2 * 4, D, dtype=torch.bfloat16, device="meta").split((16, 4, 4), 2)
        table = torch.empty(1024, D // 2, device="meta")
        positions = torch.empty(8, 1024, dtype=torch.int64, device="meta")
        for name, back, given in (("", False, None), (" back, positions", True, positions)):
            yield run_forward(q, k, None, None, table, table, given, q, k, 0.0, back).lint_case(f"{D}{name}")


@torch.library.custom_op("minigpt::rotary", mutates_args=())
def op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, back: bool) -> tuple[Tensor, Tensor]:
    """New q and k, turned; with `back` the other way."""
    outs = outputs(q, k, cos, sin, positions, back)
    with torch.cuda.device_of(q):
        run_forward(with_rows(q), with_rows(k), None, None, *map(contiguous, (cos, sin, positions)), *outs, 0.0,
                    back).run()
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
