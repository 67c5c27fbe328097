"""Checks of `kernels.attention`: its error against float64 is at most twice that of plain PyTorch in the same dtype."""

from __future__ import annotations

import functools

import torch

import kernels
from benchmarks import formula, precision

SIZES = {"cuda": (1000, (64, 80, 96, 128, 256)), "cpu": (37, (16, 24))}
"""Length, and head sizes."""
MOST_COLUMNS = 256
"""The largest head, and so the most weights of a query that one call shows."""


def heads(dtype: str, device: str) -> dict:
    """Every head size."""
    T, sizes = SIZES[device]
    return both_backwards(dtype, device, {f"head size {D}": dict(D=D, T=T, causal=True) for D in sizes})


def tiles(dtype: str, device: str) -> dict:
    """Lengths that tiles divide, as the benchmark has them."""
    T, sizes = SIZES[device]
    return both_backwards(dtype, device, {
        f"head size {D}, {mask}": dict(B=1, H=16, D=D, T=T // 64 * 128 or 32, causal=mask == "causal")
        for D in (sizes[0], sizes[-2]) for mask in ("causal", "full")})


def masks(dtype: str, device: str) -> dict:
    """Every mask, and dropout."""
    T, (D, *_) = SIZES[device]
    cases = {
        "full": dict(causal=False),
        "window": dict(causal=True, window=T // 5),
        "window, full": dict(causal=False, window=T // 5),
        "documents": dict(causal=True, documents=True),
        "documents, full, window": dict(causal=False, documents=True, window=T // 7),
        "dropout": dict(causal=True, dropout_p=0.2),
        "dropout, full": dict(causal=False, dropout_p=0.5),
    }
    return both_backwards(dtype, device, {name: dict(T=T, D=D) | options for name, options in cases.items()})


def shapes(dtype: str, device: str) -> dict:
    """Lengths that differ, shared heads, and the layout in which the model calls."""
    T, (D, *_) = SIZES[device]
    cases = {
        "fewer queries than keys": dict(T=T // 3, S=T),
        "one query": dict(T=1, S=T),
        "queries that see no key": dict(T=T, S=T // 3),
        "grouped queries": dict(T=T, H=8, H_kv=2),
        "views of one projection": dict(T=T, fused=True),
        "views of one projection, one key-value head": dict(T=T, H_kv=1, fused=True),
        "long": dict(B=1, H=2, T=4 * T),
    }
    return both_backwards(dtype, device, {name: dict(D=D, causal=True) | options for name, options in cases.items()})


def both_backwards(dtype, device, cases):
    return {f"{name}, {way}": functools.partial(check, getattr(torch, dtype), device, way == "two passes", **options)
            for name, options in cases.items() for way in ("two passes", "one pass")}


def check(dtype, device, deterministic, *, T, D, causal, S=None, B=2, H=4, H_kv=None, fused=False, documents=False,
          dropout_p=0.0, **options):
    """The op against the formula."""
    S, H_kv = S or T, H_kv or H
    if documents:
        options["document_ids"] = torch.randint(0, 7, (B, T), device=device).sort(-1).values
    exact = dict(causal=causal, **options)
    if dropout_p:
        exact |= dict(dropout_p=dropout_p, kept=kept_weights(B, T, S, H, dtype, device, dropout_p))
        options |= dict(dropout_p=dropout_p, seed=1)

    def qkv(tensors):
        return tensors if len(tensors) == 3 else tensors[0].unflatten(-1, (-1, D)).split([H, H_kv, H_kv], dim=2)

    def op(*tensors):
        return kernels.attention(*qkv(tensors), causal=causal, deterministic=deterministic, **options)

    def plain(*tensors):
        return formula.attention(*qkv(tensors), **exact)

    shapes = [(B, T, (H + 2 * H_kv) * D)] if fused else [(B, T, H, D), (B, S, H_kv, D), (B, S, H_kv, D)]
    precision.check(op, plain, [torch.randn(shape, device=device).to(dtype) for shape in shapes])


def kept_weights(B, T, S, H, dtype, device, dropout_p):
    """(B, H, T, S): which weights dropout keeps: with rows of the identity for values, each comes out by itself."""
    parts = []
    for first in range(0, S, MOST_COLUMNS):
        columns = min(MOST_COLUMNS, S - first)
        zeros = torch.zeros(1, 1, 1, columns, dtype=dtype, device=device)
        v = torch.eye(S, dtype=dtype, device=device)[:, first:first + columns].contiguous()
        q, k, v = zeros.expand(B, T, H, -1), zeros.expand(B, S, H, -1), v[None, :, None].expand(B, S, H, -1)
        y = kernels.attention(q, k, v, causal=False, dropout_p=dropout_p, seed=1)
        parts.append(y.transpose(1, 2) != 0)
    return torch.cat(parts, dim=-1)


CHECKS = {f"attention-{group.__name__}-{dtype}": functools.partial(group, dtype)
          for group in (heads, tiles, masks, shapes) for dtype in precision.DTYPES}
