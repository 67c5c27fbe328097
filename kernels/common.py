"""What every Triton kernel here needs: the same numbers in the interpreter and on a GPU."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in Triton's interpreter, on the CPU."""


MOST_REGISTERS = 255
"""That a thread can have, said where ptxas would rather spill some of them, for programs that never come."""


@triton.jit
def dot(a, b):
    """a @ b with float32 accumulation; float32 inputs are not rounded to TF32."""
    if INTERPRETED:                                     # its bfloat16 products are wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x in another type, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:            # its own conversion cuts off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


def multiprocessors(x: torch.Tensor) -> int:
    """Of the GPU that holds x; 2 for the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def with_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class LintCase:
    """One kernel configuration that ships, for `kernels.lint` to compile ahead of time.

    A kernel module lists its cases in `lint_cases()`. `kind` says what the machine code must show: "dot" the
    architecture's own tensor-core instructions, "small dot" any (its newest take no fewer than 64 rows), "memory" wide
    (128-bit), cp.async or TMA loads, "plain" none of these (dots of float32, odd widths).
    """

    name: str
    kernel: Any
    """The function under `triton.jit`."""
    signature: dict[str, str]
    """{argument: type} of every argument that is no constexpr: "*bf16", "i32", "fp32", ..."""
    constexprs: dict[str, Any]
    """{argument: value}, arguments that are None included."""
    kind: str
    aligned: tuple[str, ...] = ()
    """Pointers and integers that are multiples of 16, as a launch with such arguments specializes them."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the launch passes besides: num_warps, num_stages, maxnreg, ..."""
    archs: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")
    """The architectures it ships for."""

    def __post_init__(self):
        assert self.kind in ("dot", "small dot", "memory", "plain"), self.kind


@dataclass(frozen=True)
class Launch:
    """A kernel with all it is called with: to run, or to compile ahead of time from meta tensors."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, torch.Tensor | int | float | None]
    constants: dict[str, int | bool]
    options: dict[str, int]
    kind: str = "memory"
    """As in LintCase."""

    def run(self):
        if not all(self.grid):
            return
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options, enable_fp_fusion=True)

    def lint_case(self, name: str, **more) -> LintCase:
        """As a launch compiles it: integers that are 1 become constants, multiples of 16 are known as such."""
        types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
                 torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8", int: "i32", float: "fp32"}
        given = {key: value for key, value in self.arguments.items()
                 if value is not None and not (isinstance(value, int) and value == 1)}
        return LintCase(
            f"{name} {self.kernel.__name__.strip('_')}", self.kernel,
            {key: types[value.dtype if isinstance(value, torch.Tensor) else type(value)]
             for key, value in given.items()},
            {key: value for key, value in self.arguments.items() if key not in given} | self.constants, self.kind,
            tuple(key for key, value in given.items()
                  if isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0),
            self.options | {"enable_fp_fusion": True}, **more)
