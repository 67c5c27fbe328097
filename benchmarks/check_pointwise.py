"""Checks of rotary, split_heads and the activations: as exact, against float64, as the reference in the same dtype."""

from __future__ import annotations

import functools

import torch

import kernels
from benchmarks import precision
from kernels import reference

SHAPES = {"cuda": ((4096, 3072), (1000, 770), (33, 8192), (100_000, 24)), "cpu": ((5, 24), (3, 1100))}
HEADS = {"cuda": ((4, 1024, 16, 4, 128), (2, 1000, 12, 12, 64), (2, 100, 3, 1, 80)), "cpu": ((2, 9, 2, 1, 6),)}
"""B, T, H, H_kv and D."""


def pointwise(dtype: str, device: str) -> dict:
    found, dtype = {}, getattr(torch, dtype)
    for shape in SHAPES[device]:
        given = functools.partial(check, dtype, device)
        found |= {f"swiglu {shape}": functools.partial(given, "swiglu", shape, shape),
                  f"gelu, bias {shape}": functools.partial(given, "gelu", shape, shape[1:]),
                  f"gelu by erf {shape}": functools.partial(given, "gelu", shape, approximate="none"),
                  f"squared_relu {shape}": functools.partial(given, "squared_relu", shape)}
    for sizes in HEADS[device]:
        for positions in (False, True):
            found[f"rotary {sizes}{', positions' * positions}"] = functools.partial(
                check_rotary, dtype, device, positions, *sizes)
        for parts in (("norm",), ("rotary",), ("norm", "rotary")):
            found[f"split_heads {sizes}, {' and '.join(parts)}"] = functools.partial(
                check_split_heads, dtype, device, parts, *sizes)
    return found


def check(dtype, device, op, *shapes, **options):
    precision.check(functools.partial(getattr(kernels, op), **options),
                    functools.partial(getattr(reference, op), **options),
                    [torch.randn(shape, device=device).to(dtype) for shape in shapes])


def angles_of(positions, D, device):
    return torch.arange(positions, device=device)[:, None] / 100 ** (torch.arange(0, D, 2, device=device) / D)


def check_split_heads(dtype, device, parts, B, T, H, H_kv, D):
    angles = angles_of(T, D, device)

    def on(module):
        def split(x, *weights):
            tables = (angles.cos().to(x.dtype), angles.sin().to(x.dtype)) if "rotary" in parts else (None, None)
            q, k, v = module.split_heads(x, (H, H_kv, H_kv), *(weights or (None, None)), 1e-5, *tables)
            return q, k, v.clone()
        return split

    shapes = [(B, T, H + 2 * H_kv, D), *[(D,)] * 2 * ("norm" in parts)]
    precision.check(on(kernels), on(reference), [torch.randn(shape, device=device).to(dtype) for shape in shapes])


def check_rotary(dtype, device, with_positions, B, T, H, H_kv, D):
    angles = angles_of(2 * T, D, device)
    positions = torch.randint(2 * T, (B, T), device=device) if with_positions else None
    fused = torch.randn(B, T, H + 2 * H_kv, D, device=device).to(dtype)

    def on(module):
        return lambda q, k: module.rotary(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype), positions)

    precision.check(on(kernels), on(reference), list(fused.split((H, H_kv, H_kv), dim=2)[:2]))


CHECKS = {f"pointwise-{dtype}": functools.partial(pointwise, dtype) for dtype in precision.DTYPES}
