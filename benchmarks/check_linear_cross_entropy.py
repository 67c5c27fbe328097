"""Checks of linear_cross_entropy: as exact as plain PyTorch with all logits at once, and with far less memory."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F

import kernels
from benchmarks import precision, timing

SIZES = {"cuda": ((5000, 256, 50304), (1000, 768, 50257), (300, 64, 97)), "cpu": ((60, 16, 100),)}
"""Targets, width, vocabulary."""
SETTINGS = {"plain": {}, "all options": dict(label_smoothing=0.1, z_loss=1e-3, softcap=30.0)}
LARGE = {"cuda": (32768, 768, 50304), "cpu": (400, 8, 40)}
MOST_EXTRA_BYTES = 0.7e9


def cases(dtype: str, device: str) -> dict:
    found = {f"{sizes}, {name}, {reduction}": functools.partial(check, getattr(torch, dtype), device, sizes, options,
                                                                reduction)
             for sizes, (name, options), reduction in itertools.product(SIZES[device], SETTINGS.items(),
                                                                        ("sum", "none"))}
    if dtype == "bfloat16":
        found["memory"] = functools.partial(memory, device)
    return found


def check(dtype, device, sizes, options, reduction):
    N, C, V = sizes
    targets = torch.randint(V, (N,), device=device)
    targets[::7] = -100

    def fused(hidden, weight):
        loss = kernels.linear_cross_entropy(hidden, weight, targets, reduction=reduction, **options)
        return loss.to(hidden.dtype)

    precision.check(fused, functools.partial(plain, targets, reduction, **options),
                    [torch.randn(N, C, device=device).to(dtype), (torch.randn(V, C, device=device) / C**0.5).to(dtype)])


def plain(targets, reduction, hidden, weight, label_smoothing=0.0, z_loss=0.0, softcap=None):
    """All logits at once, in float32 or float64."""
    z = F.linear(hidden, weight)
    z = z if z.dtype == torch.float64 else z.float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, targets, reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * z.logsumexp(-1).square() * (targets != -100)
    return (losses.sum() if reduction == "sum" else losses).to(hidden.dtype)


def memory(device):
    """GPT-2's head over a batch of 32 x 1024 takes less than 0.7 GB beside its inputs and gradients."""
    N, C, V = LARGE[device]
    hidden = torch.randn(N, C, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(V, C, device=device).mul(C**-0.5).requires_grad_()
    targets = torch.randint(V, (N,), device=device)

    def step():
        loss = kernels.linear_cross_entropy(hidden, weight, targets)
        return torch.autograd.grad(loss, (hidden, weight))

    peak = timing.peak_bytes(step, torch.device(device))
    if peak is not None:
        extra = peak - hidden.nbytes - weight.nbytes
        assert extra < MOST_EXTRA_BYTES, f"{extra / 1e9:.2f} GB beside the gradients, of {MOST_EXTRA_BYTES / 1e9}"
    return {"peak_bytes": peak}


CHECKS = {f"linear_cross_entropy-{dtype}": functools.partial(cases, dtype) for dtype in precision.DTYPES}
