"""What the Triton kernels of `gelu`, `swiglu` and `squared_relu` share: tiles of (M, N) rows, and sums over all rows.

Each is one pass over memory, in float32 inside. M rows of N numbers, each row contiguous, rows any distance apart: the
two halves of a projection are read where they lie.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import multiprocessors, next_power_of_2, round_to

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COLUMNS, NUMBERS, WARPS = 1024, 4096, 4
"""At most so many columns in a tile, and so many numbers, 32 a thread."""
PROGRAMS_PER_SM = 8
"""Of kernels whose programs each take many tiles, to sum over their rows: 32 warps."""


@triton.jit
def tile(M, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows (int64) and columns, and which of them exist."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return rows, cols, (rows < M)[:, None] & (cols < N)[None, :]


@triton.jit
def load(ptr, rows, stride, cols, inside):
    """A (ROWS, BLOCK) tile in float32, 0 outside."""
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, rows, stride, cols, inside, value):
    """Rounded to the type that lies there."""
    tl.store(ptr + rows[:, None] * stride + cols[None, :], round_to(value, ptr.dtype.element_ty), mask=inside)


def tiles(M: int, N: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and ROWS and BLOCK of its tiles."""
    block = min(COLUMNS, next_power_of_2(N))
    rows = min(NUMBERS // block, next_power_of_2(M))
    return (triton.cdiv(M, rows), triton.cdiv(N, block)), dict(ROWS=rows, BLOCK=block)


def tiles_of_programs(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """As `tiles`, with no more programs than run at once: program p takes the p-th group of rows and every P-th on."""
    (groups, columns), constants = tiles(*x.shape)
    return (max(1, min(groups, multiprocessors(x) * PROGRAMS_PER_SM // max(1, columns))), columns), constants


def rows_of(x: Tensor) -> Tensor:
    """(..., N) as (M, N), each row contiguous in memory; a copy only where it must be."""
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(0, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def no_second_derivative(ctx, *_):
    raise RuntimeError("the Triton activations have no second derivative; kernels.use('reference') has one")


def check_dtypes(op: str, **given: Tensor) -> None:
    """Raise ValueError for a type that the kernels do not take."""
    for name, x in given.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} is {x.dtype}; the Triton kernels take {', '.join(map(str, DTYPES))}")
