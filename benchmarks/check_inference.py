"""Checks of decode_attention and quantized_linear: as exact as the reference in the same dtype; rows do not mix."""

from __future__ import annotations

import functools
import itertools

import torch
from compare import assert_error_ratio

import kernels
from kernels import reference

HEADS = {"cuda": ((32, 8, 128), (12, 12, 64), (16, 1, 256), (40, 8, 80)), "cpu": ((4, 2, 8),)}
"""H, H_kv and D."""
LENGTHS = {"cuda": ((4096, 1, 0, 255, 256, 257, 3000), (20000, 7)), "cpu": ((5, 0, 300),)}
SIZES = {"cuda": ((4096, 4096), (770, 1536)), "cpu": ((20, 48),)}
"""N and K."""
ROWS = {"cuda": (1, 16, 64, 65), "cpu": (3,)}
DTYPES = ("bfloat16", "float16", "float32")


def cases(dtype: str, device: str) -> dict:
    dtype = getattr(torch, dtype)
    found = {f"decode {heads}, lengths {lengths}, window {window}": functools.partial(
        decode, dtype, device, heads, lengths, window)
        for heads, lengths, window in itertools.product(HEADS[device], LENGTHS[device], (None, 1000))}
    for sizes, rows, bits, groups in itertools.product(SIZES[device], ROWS[device], (8, 4), (1, 12)):
        if sizes[1] % groups == 0:
            found[f"{rows} x {sizes}, {bits} bits, {groups} groups"] = functools.partial(
                product, dtype, device, sizes, rows, bits, groups)
    return found


def decode(dtype, device, heads, lengths, window):
    H, H_kv, D = heads
    B, S = len(lengths), max(lengths)
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in ((B, H, D), (B, S, H_kv, D), (B, S, H_kv, D)))
    lengths = torch.tensor(lengths, device=device)
    y = kernels.decode_attention(q, k, v, lengths, window=window)
    plain, exact = (reference.decode_attention(*(x.to(kind) for x in (q, k, v)), lengths, window=window)
                    for kind in (dtype, torch.float64))
    assert_error_ratio(y, plain, exact)
    for row in range(B):
        alone = kernels.decode_attention(*(x[row:row + 1] for x in (q, k, v, lengths)), window=window)
        assert torch.equal(alone[0], y[row]), f"row {row} depends on the batch"


def product(dtype, device, sizes, rows, bits, groups):
    N, K = sizes
    packed, scales = reference.quantize(torch.randn(N, K, device=device), bits, K // groups)
    x = torch.randn(rows, K, device=device).to(dtype)
    exact = x.double() @ reference.dequantize(packed, scales.double()).T
    y, plain = (module.quantized_linear(x, packed, scales) for module in (kernels, reference))
    assert_error_ratio(y, plain, exact)


CHECKS = {f"inference-{dtype}": functools.partial(cases, dtype) for dtype in DTYPES}
