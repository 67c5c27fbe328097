"""What the benchmarks of layer_norm and rms_norm share: the grid, the paths, and what they are given."""

from __future__ import annotations

import functools
import importlib.util

import torch

from benchmarks import harness, timing
from kernels import reference

WIDTHS = (256, 512, 768, 1024, 2048, 4096, 8192, 16384)
ROWS = 32768
CPU_WIDTHS, CPU_ROWS = (256, 1024), 1024
EPS = 1e-5


def main(op: str, num_parameters: int, liger, doc: str, arguments: list[str] | None = None) -> None:
    """Measure op(x, *parameters, eps, residual), and `liger` of the same arguments where Liger is installed."""
    parser = harness.parser(doc)
    parser.add_argument("--rows", type=harness.positive, help=f"{ROWS} on a GPU, {CPU_ROWS} on a CPU")
    parser.add_argument("--widths", type=harness.positive, nargs="+")
    options = harness.parse(parser, arguments)
    on_gpu = options.device.type == "cuda"
    rows = options.rows or (ROWS if on_gpu else CPU_ROWS)
    cases = [case(rows, width, num_parameters, options.dtype, options.device)
             for width in options.widths or (WIDTHS if on_gpu else CPU_WIDTHS)]
    harness.compare(parser, options, op, harness.COPY, available(op, liger, options.device), cases, {"rows": rows})


def available(op, liger, device) -> dict[str, harness.OpPath]:
    """The paths that are there for the device, functions of (x, *parameters, eps, residual)."""
    plain = getattr(reference, op)
    triton = harness.triton_path(op, device)
    paths = {"triton": triton, "reference": plain, "compiled": timing.compiled(plain),
             "liger": liger if triton and importlib.util.find_spec("liger_kernel") else None}
    return {name: harness.OpPath(call) for name, call in paths.items() if call}


def case(rows, width, num_parameters, dtype, device) -> harness.Case:
    """A pass of either direction moves four tensors: forward reads x and residual and writes y and the sum; backward
    reads the gradients of both and the sum and writes one gradient, which is that of x and of residual."""
    num_bytes = 4 * rows * width * dtype.itemsize
    return harness.Case({"width": width}, dict.fromkeys(harness.DIRECTIONS, num_bytes), norm_of_sum, functools.partial(
        inputs, rows, width, num_parameters, dtype, device, timing.rotations(num_bytes // 2, device)))


def norm_of_sum(function, x, residual, *parameters):
    return function(x, *parameters, EPS, residual)


def inputs(rows, width, num_parameters, dtype, device, num_sets):
    def random():
        return torch.randn(rows, width, dtype=dtype, device=device)

    torch.manual_seed(0)
    parameters = [torch.rand(width, device=device).requires_grad_() for _ in range(num_parameters)]
    sets = [(random().requires_grad_(), random().requires_grad_(), *parameters) for _ in range(num_sets)]
    return sets, [random(), random()]
