"""What every Triton kernel here needs: the same numbers in the interpreter and on a GPU."""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in Triton's interpreter, on the CPU."""


@triton.jit
def dot(a, b):
    """a @ b with float32 accumulation; float32 inputs are not rounded to TF32."""
    if INTERPRETED:                                     # its bfloat16 products are wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
