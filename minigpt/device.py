"""Which device and which precision to compute with."""

from __future__ import annotations

import re
import time

import torch

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12,
              "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12}
"""Dense 16-bit peaks from the vendors' data sheets, in FLOP/s."""


def pick_device(name: str | torch.device | None = "auto") -> torch.device:
    """The named device; for "auto" and None CUDA where there is one, else the CPU. Unusable: ValueError."""
    if name in ("auto", None):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device {str(name)!r} cannot be used: {reason}; take auto, cpu or, where there is a GPU, "
                         "cuda") from None


def pick_dtype(name: str, device: torch.device) -> str:
    """The dtype of matrix products; for "auto" the fastest that trains well on the device (see `train.dtype`)."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu":
        return "bfloat16" if product_seconds(torch.bfloat16) < 0.8 * product_seconds(torch.float32) else "float32"
    return "float32"


def product_seconds(dtype: torch.dtype) -> float:
    """Best time of three products of two 384 x 384 matrices on the CPU, after a first one."""
    a, times = torch.ones(384, 384, dtype=dtype), []
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return min(times[1:])


def peak_flops(device: torch.device) -> float | None:
    """The data sheet's dense 16-bit peak of a GPU in FLOP/s, None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)
