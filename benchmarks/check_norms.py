"""Checks of the norms: their error against float64 is at most twice that of the PyTorch reference in the same dtype."""

from __future__ import annotations

import functools

import torch

import kernels
from benchmarks import precision
from kernels import reference

EPS = 1e-5
PARAMETERS = {"layer_norm": 2, "rms_norm": 1}
WIDTHS = {"cuda": (256, 768, 770, 1024, 4096, 8192, 16384, 65536), "cpu": (24, 100)}
NUMBERS = {"cuda": 1 << 22, "cpu": 900}
"""In a tensor, about."""


def cases(op: str, dtype: str, device: str) -> dict:
    """Every width with a residual in the same dtype and in float32, and some without."""
    found = {}
    for width in WIDTHS[device]:
        shape = (max(8, NUMBERS[device] // width), width)
        given = functools.partial(check, op, getattr(torch, dtype), device, shape)
        for residual in dict.fromkeys((dtype, "float32")):
            found[f"width {width}, {residual} residual"] = functools.partial(given, getattr(torch, residual))
        if width in (24, 768, 65536):
            found[f"width {width}"] = functools.partial(given, None)
    return found


def check(op, dtype, device, shape, residual):
    """`residual` is the dtype of one; None for no residual."""
    def on(module):
        def norm(x, *others):
            *parameters, total = others if residual else (*others, None)
            return getattr(module, op)(x, *parameters, EPS, total)
        return norm

    kinds = [(shape, dtype), *[(shape[1:], dtype)] * PARAMETERS[op], *[(shape, residual)] * bool(residual)]
    precision.check(on(kernels), on(reference), [torch.randn(s, device=device).to(kind) for s, kind in kinds])


CHECKS = {f"{op}-{dtype}": functools.partial(cases, op, dtype) for op in PARAMETERS for dtype in precision.DTYPES}
