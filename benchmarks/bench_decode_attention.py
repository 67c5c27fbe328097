"""Speed of attention in decoding, one new token a row over the keys of its cache:

    python -m benchmarks.bench_decode_attention [--device cuda] [--batches 16] [--lengths 2048] [--paths triton]
        [--json FILE] [--plot FILE]

The Triton kernels against the reference, which takes row by row, and PyTorch's attention over the whole batch (sdpa).
Rows are full, heads grouped by four. TB/s are the bytes of the keys and values that are seen over the median time. The
last line is one JSON object.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F

from benchmarks import harness, timing
from kernels import reference

BATCHES, LENGTHS, HEADS, HEAD_SIZE = (1, 16, 64), (2048, 8192), 32, 128
CPU_BATCHES, CPU_LENGTHS, CPU_HEADS, CPU_HEAD_SIZE = (2,), (256,), 4, 16
GROUP = 4
"""Query heads that share a key head."""


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--batches", type=harness.positive, nargs="+")
    parser.add_argument("--lengths", type=harness.positive, nargs="+")
    options = harness.parse(parser, arguments)
    on_gpu = options.device.type == "cuda"
    heads = (HEADS, HEAD_SIZE) if on_gpu else (CPU_HEADS, CPU_HEAD_SIZE)
    cases = [case(B, S, *heads, options.dtype, options.device)
             for B, S in itertools.product(options.batches or (BATCHES if on_gpu else CPU_BATCHES),
                                           options.lengths or (LENGTHS if on_gpu else CPU_LENGTHS))]
    harness.compare(parser, options, "decode_attention", harness.COPY, available(options.device), cases,
                    dict(zip(("heads", "head_size"), heads)))


def available(device) -> dict[str, harness.OpPath]:
    """The paths that are there for the device, functions of (q, k, v, lengths)."""
    paths = {"triton": harness.triton_path("decode_attention", device), "sdpa": sdpa,
             "reference": reference.decode_attention}
    return {name: harness.OpPath(call, ("inference",)) for name, call in paths.items() if call}


def sdpa(q, k, v, lengths):
    return F.scaled_dot_product_attention(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)[:, :, 0]


def case(B, S, H, D, dtype, device) -> harness.Case:
    num_bytes = 2 * B * S * H // GROUP * D * dtype.itemsize
    lengths = torch.full((B,), S, device=device, dtype=torch.int32)
    return harness.Case({"batch": B, "length": S}, {"inference": num_bytes},
                        lambda function, *tensors: function(*tensors, lengths),
                        functools.partial(inputs, B, S, H, D, dtype, device, timing.rotations(num_bytes, device)))


def inputs(B, S, H, D, dtype, device, num_sets):
    torch.manual_seed(0)
    shapes = (B, H, D), (B, S, H // GROUP, D), (B, S, H // GROUP, D)
    return [[torch.randn(shape, dtype=dtype, device=device) for shape in shapes] for _ in range(num_sets)], None


if __name__ == "__main__":
    main()
