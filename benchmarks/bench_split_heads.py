"""Speed of what stands between the projection and attention, QK-norm and rotary positions, forward and backward:

    python -m benchmarks.bench_split_heads [--device cuda] [--head-sizes 64] [--paths triton] [--json FILE]
        [--plot FILE]

The Triton kernels (triton) against those of rms_norm and rotary one after the other (separate), plain PyTorch
(reference) and torch.compile of that (compiled), with as many key and value heads as query heads and with a quarter of
them. TB/s are the bytes that must be moved, of values only backward, over the median time. The last line is one JSON
object.
"""

from __future__ import annotations

import functools
import itertools

import torch

from benchmarks import harness, timing
from kernels import reference

HEAD_SIZES, GROUPS, TOKENS, LENGTH, WIDTH = (64, 128), (1, 4), 32768, 1024, 2048
"""Group: query heads for each key head. Width: query heads x head size."""
CPU_HEAD_SIZES, CPU_TOKENS, CPU_LENGTH, CPU_WIDTH = (32,), 256, 64, 128
EPS = 1e-5


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--head-sizes", type=harness.positive, nargs="+")
    options = harness.parse(parser, arguments)
    on_gpu = options.device.type == "cuda"
    tokens, length, width = (TOKENS, LENGTH, WIDTH) if on_gpu else (CPU_TOKENS, CPU_LENGTH, CPU_WIDTH)
    head_sizes = options.head_sizes or (HEAD_SIZES if on_gpu else CPU_HEAD_SIZES)
    most = max(GROUPS)
    if wrong := [D for D in head_sizes if D % 2 or width % (D * most)]:
        parser.error(f"--head-sizes {wrong[0]} is odd or does not make heads of width {width} in groups of {most}")
    cases = [case(tokens // length, length, width // D, group, D, options.dtype, options.device)
             for D, group in itertools.product(head_sizes, GROUPS)]
    harness.compare(parser, options, "split_heads", harness.COPY, available(options.device), cases,
                    {"tokens": tokens, "length": length, "width": width})


def available(device) -> dict[str, harness.OpPath]:
    """The paths that are there for the device, functions of split_heads' arguments."""
    triton = harness.triton_path("split_heads", device)
    separate = triton and functools.partial(
        in_two, harness.triton_path("rms_norm", device), harness.triton_path("rotary", device))
    paths = {"triton": triton, "separate": separate, "reference": reference.split_heads,
             "compiled": timing.compiled(reference.split_heads)}
    return {name: harness.OpPath(call) for name, call in paths.items() if call}


def in_two(rms_norm, rotary, x, heads, q_weight, k_weight, eps, cos, sin):
    q, k, v = x.split(heads, dim=2)
    return *rotary(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), cos, sin), v


def case(B, T, H, group, D, dtype, device) -> harness.Case:
    heads = (H, H // group, H // group)
    one = B * T * D * dtype.itemsize
    turned = (heads[0] + heads[1]) * one
    angles = torch.arange(T, device=device)[:, None] / 10000 ** (torch.arange(0, D, 2, device=device) / D)
    table = angles.cos(), angles.sin()

    def call(function, x, q_weight, k_weight):
        return function(x, heads, q_weight, k_weight, EPS, *table)

    work = {"forward": 2 * turned, "backward": 3 * turned + 2 * heads[2] * one}
    return harness.Case({"group": group, "head_size": D}, work, call, functools.partial(
        inputs, B, T, heads, D, dtype, device, timing.rotations(sum(heads) * one, device)))


def inputs(B, T, heads, D, dtype, device, num_sets):
    def random(heads):
        return torch.randn(B, T, heads, D, dtype=dtype, device=device)

    torch.manual_seed(0)
    weights = [torch.rand(D, device=device).requires_grad_() for _ in range(2)]
    sets = [[random(sum(heads)).requires_grad_(), *weights] for _ in range(num_sets)]
    return sets, [*random(sum(heads)).split(heads, dim=2)]


if __name__ == "__main__":
    main()
