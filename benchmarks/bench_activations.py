"""Speed of swiglu, gelu with a bias and squared_relu, forward and backward:

    python -m benchmarks.bench_activations [--device cuda] [--ops gelu] [--widths 3072] [--paths triton] [--json FILE]
        [--plot FILE]

The Triton kernels against plain PyTorch and torch.compile of that. The two inputs of swiglu are the halves of one
projection, as in the model. TB/s are the bytes that the op must move over the median time. The last line is one JSON
object.
"""

from __future__ import annotations

import functools
import itertools

import torch

from benchmarks import harness, timing
from kernels import reference

OPS = {"swiglu": (3, 5), "gelu": (2, 3), "squared_relu": (2, 3)}
"""{op: (M, N) tensors that it reads and writes forward, and backward}."""
WIDTHS, ROWS = (1024, 3072, 8192), 32768
CPU_WIDTHS, CPU_ROWS = (256,), 1024


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--rows", type=harness.positive, help=f"{ROWS} on a GPU, {CPU_ROWS} on a CPU")
    parser.add_argument("--widths", type=harness.positive, nargs="+")
    options = harness.parse(parser, arguments)
    on_gpu = options.device.type == "cuda"
    rows = options.rows or (ROWS if on_gpu else CPU_ROWS)
    cases = [case(op, rows, width, options.dtype, options.device)
             for op, width in itertools.product(options.ops, options.widths or (WIDTHS if on_gpu else CPU_WIDTHS))]
    harness.compare(parser, options, "activations", harness.COPY, available(options.device), cases, {"rows": rows})


def available(device) -> dict[str, harness.OpPath]:
    """The paths that are there for the device, functions of (op, *tensors)."""
    compiled = functools.cache(lambda op: timing.compiled(getattr(reference, op)))
    triton = functools.cache(lambda op: harness.triton_path(op, device))
    paths = {"triton": triton} if triton("gelu") else {}
    paths |= {"reference": functools.partial(getattr, reference), "compiled": compiled}
    return {name: harness.OpPath(lambda op, *tensors, find=find: find(op)(*tensors)) for name, find in paths.items()}


def case(op, rows, width, dtype, device) -> harness.Case:
    one = rows * width * dtype.itemsize
    work = {direction: count * one for direction, count in zip(harness.DIRECTIONS, OPS[op])}
    return harness.Case({"op": op, "width": width}, work, lambda function, *tensors: function(op, *tensors),
                        functools.partial(inputs, op, rows, width, dtype, device, timing.rotations(one, device)))


def inputs(op, rows, width, dtype, device, num_sets):
    def random(columns):
        return torch.randn(rows, columns, dtype=dtype, device=device)

    torch.manual_seed(0)
    if op == "swiglu":
        sets = [[half.detach().requires_grad_() for half in random(2 * width).chunk(2, -1)] for _ in range(num_sets)]
    else:
        bias = [torch.randn(width, device=device, dtype=dtype).requires_grad_()] * (op == "gelu")
        sets = [[random(width).requires_grad_(), *bias] for _ in range(num_sets)]
    return sets, [random(width)]


if __name__ == "__main__":
    main()
