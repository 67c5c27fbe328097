"""Speed of rotary positions, forward and backward:

    python -m benchmarks.bench_rotary [--device cuda] [--lengths 1024] [--paths triton] [--json FILE] [--plot FILE]

The Triton kernel against plain PyTorch and torch.compile of that, on queries and keys that are views of one fused
projection. TB/s are the bytes of queries and keys, read and written, over the median time. The last line is one JSON
object.
"""

from __future__ import annotations

import functools
import itertools

import torch

from benchmarks import harness, timing
from kernels import reference

LENGTHS, HEAD_SIZES, TOKENS, WIDTH = (1024, 8192), (64, 128), 32768, 2048
"""Width: heads x head size."""
CPU_LENGTHS, CPU_HEAD_SIZES, CPU_TOKENS, CPU_WIDTH = (128,), (64,), 512, 128


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--lengths", type=harness.positive, nargs="+")
    parser.add_argument("--tokens", type=harness.positive, help=f"batch x length: {TOKENS} on a GPU, else {CPU_TOKENS}")
    options = harness.parse(parser, arguments)
    on_gpu = options.device.type == "cuda"
    tokens = options.tokens or (TOKENS if on_gpu else CPU_TOKENS)
    lengths = options.lengths or (LENGTHS if on_gpu else CPU_LENGTHS)
    if wrong := [length for length in lengths if tokens % length]:
        parser.error(f"--lengths {wrong[0]} does not divide {tokens}")
    width = WIDTH if on_gpu else CPU_WIDTH
    cases = [case(tokens // T, T, width // D, D, options.dtype, options.device)
             for D, T in itertools.product(HEAD_SIZES if on_gpu else CPU_HEAD_SIZES, lengths)]
    harness.compare(parser, options, "rotary", harness.COPY, available(options.device), cases,
                    {"tokens": tokens, "width": width})


def available(device) -> dict[str, harness.OpPath]:
    """The paths that are there for the device, functions of (q, k, cos, sin)."""
    paths = {"triton": harness.triton_path("rotary", device), "reference": reference.rotary,
             "compiled": timing.compiled(reference.rotary)}
    return {name: harness.OpPath(call) for name, call in paths.items() if call}


def case(B, T, H, D, dtype, device) -> harness.Case:
    num_bytes = 4 * B * T * H * D * dtype.itemsize
    angles = torch.arange(T, device=device)[:, None] / 10000 ** (torch.arange(0, D, 2, device=device) / D)
    table = angles.cos(), angles.sin()
    return harness.Case({"head_size": D, "length": T}, dict.fromkeys(harness.DIRECTIONS, num_bytes),
                        lambda function, q, k: function(q, k, *table),
                        functools.partial(inputs, B, T, H, D, dtype, device, timing.rotations(num_bytes, device)))


def inputs(B, T, H, D, dtype, device, num_sets):
    def random(heads):
        return torch.randn(B, T, heads, D, dtype=dtype, device=device)

    torch.manual_seed(0)
    sets = [[x.detach().requires_grad_() for x in random(3 * H).split(H, dim=2)[:2]] for _ in range(num_sets)]
    return sets, [random(H), random(H)]


if __name__ == "__main__":
    main()
