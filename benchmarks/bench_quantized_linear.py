"""Speed of a few rows times a weight of 8 or 4 bits:

    python -m benchmarks.bench_quantized_linear [--device cuda] [--rows 1] [--sizes 4096] [--paths triton] [--json FILE]
        [--plot FILE]

The Triton kernel against PyTorch that makes the weight whole first (reference), torch.compile of that, and a plain
product with a weight that was never quantized (whole). TB/s are the bytes of the packed weight over the median time, so
that of equal times fewer bits have the lower figure. The last line is one JSON object.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F

from benchmarks import harness, timing
from kernels import reference

ROWS, SIZES, CPU_ROWS, CPU_SIZES = (1, 16, 64), (4096,), (1,), (256,)
"""A weight is square."""
BITS, GROUP_SIZE = (8, 4), 128


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rows", type=harness.positive, nargs="+")
    parser.add_argument("--sizes", type=harness.positive, nargs="+")
    options = harness.parse(parser, arguments)
    on_gpu = options.device.type == "cuda"
    sizes = options.sizes or (SIZES if on_gpu else CPU_SIZES)
    if wrong := [size for size in sizes if size % GROUP_SIZE]:
        parser.error(f"--sizes {wrong[0]} is no multiple of {GROUP_SIZE}")
    cases = [case(bits, size, rows, options.dtype, options.device) for bits, size, rows in
             itertools.product(BITS, sizes, options.rows or (ROWS if on_gpu else CPU_ROWS))]
    harness.compare(parser, options, "quantized_linear", harness.COPY, available(options.device), cases,
                    {"group_size": GROUP_SIZE})


def available(device) -> dict[str, harness.OpPath]:
    """The paths that are there for the device, functions of (x, packed weight, scales, whole weight)."""
    plain = reference.quantized_linear
    paths = {"triton": harness.triton_path("quantized_linear", device), "reference": plain,
             "compiled": timing.compiled(plain)}
    paths = {name: functools.partial(quantized, call) for name, call in paths.items() if call} | {"whole": whole}
    return {name: harness.OpPath(call, ("inference",)) for name, call in paths.items()}


def quantized(call, x, packed, scales, weight):
    return call(x, packed, scales)


def whole(x, packed, scales, weight):
    return F.linear(x, weight)


def case(bits, size, rows, dtype, device) -> harness.Case:
    num_bytes = size * size * bits // 8
    return harness.Case({"bits": bits, "size": size, "rows": rows}, {"inference": num_bytes},
                        lambda function, *tensors: function(*tensors),
                        functools.partial(inputs, bits, size, rows, dtype, device, timing.rotations(num_bytes, device)))


def inputs(bits, size, rows, dtype, device, num_sets):
    torch.manual_seed(0)
    weight = torch.randn(size, size, device=device)
    packed, scales = reference.quantize(weight, bits, GROUP_SIZE)
    return [[torch.randn(rows, size, device=device).to(dtype), packed.clone(), scales, weight.to(dtype)]
            for _ in range(num_sets)], None


if __name__ == "__main__":
    main()
