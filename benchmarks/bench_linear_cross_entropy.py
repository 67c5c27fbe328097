"""Speed and memory of the head and its loss, forward alone and with both gradients:

    python -m benchmarks.bench_linear_cross_entropy [--device cuda] [--sizes 32768x768x50304] [--paths triton]
        [--json FILE] [--plot FILE]

The Triton path, a chunk of the logits at a time (triton), against the chunked PyTorch reference (reference), all logits
at once in plain PyTorch (plain), torch.compile of that (compiled), torch's own chunked op where this release has one
(torch), and Liger's where it is installed. TFLOP/s count 2 N C V operations forward and 6 N C V with the gradients,
whatever a path computes. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util

import torch
import torch.nn.functional as F

from benchmarks import harness, timing
from kernels import reference

SIZES = ((8192, 2048, 32768), (8192, 4096, 151936), (32768, 768, 50304))
"""Targets, width and vocabulary; on a CPU:"""
CPU_SIZES = ((512, 64, 1024),)
LOGITS_AT_ONCE = 12
"""Bytes for each logit that plain PyTorch holds at a time: in bfloat16, in float32, and a gradient."""


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--sizes", type=size, nargs="+", metavar="NxCxV", help="targets, width and vocabulary")
    options = harness.parse(parser, arguments)
    cases = [case(*sizes, options.dtype, options.device)
             for sizes in options.sizes or (SIZES if options.device.type == "cuda" else CPU_SIZES)]
    harness.compare(parser, options, "linear_cross_entropy", harness.MATMUL, available(options.device), cases, {})


def size(text: str) -> tuple[int, ...]:
    """NxCxV, for argparse."""
    parts = text.split("x")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not targets x width x vocabulary, as in 8192x768x50304")
    return tuple(map(harness.positive, parts))


def available(device) -> dict[str, harness.OpPath]:
    """The paths that are there for the device, functions of (hidden, weight, targets) that give the mean loss."""
    triton = harness.triton_path("linear_cross_entropy", device)
    calls = {"triton": triton, "torch": getattr(F, "linear_cross_entropy", None),
             "liger": liger if triton and importlib.util.find_spec("liger_kernel") else None,
             "reference": reference.linear_cross_entropy}
    paths = {name: harness.OpPath(call, harness.WITH_GRADIENTS) for name, call in calls.items() if call}
    return paths | {name: harness.OpPath(call, harness.WITH_GRADIENTS, check_that_logits_fit)
                    for name, call in (("compiled", timing.compiled(plain)), ("plain", plain))}


def plain(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def liger(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets)


def check_that_logits_fit(hidden, weight):
    """Raise MemoryError before the machine is out of memory."""
    timing.check_memory("the logits", LOGITS_AT_ONCE * len(hidden) * len(weight), hidden.device)


def case(N, C, V, dtype, device) -> harness.Case:
    @functools.cache
    def targets():
        return torch.randint(V, (N,), device=device)

    def inputs():
        torch.manual_seed(0)
        hidden, weight = torch.randn(N, C, device=device), torch.randn(V, C, device=device) / C**0.5
        return [[x.to(dtype).requires_grad_() for x in (hidden, weight)]], [torch.ones((), device=device)]

    work = dict(zip(harness.WITH_GRADIENTS, (2 * N * C * V, 6 * N * C * V)))
    return harness.Case({"targets": N, "width": C, "vocabulary": V}, work,
                        lambda function, hidden, weight: function(hidden, weight, targets()), inputs)


if __name__ == "__main__":
    main()
