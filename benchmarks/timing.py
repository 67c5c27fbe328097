"""How a call is timed, what memory it takes, and the ceilings that a machine sets: a copy and a matrix product.

On a GPU the calls of a batch are queued behind a sleep and timed by CUDA events, so that what the CPU needs to launch
them is not measured; on a CPU each call is timed by itself. Callers rotate inputs that together exceed the L2 cache.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time

import torch

WARM_UP = 3
BATCH = 25
"""Calls behind one sleep; a GPU's queue holds about a thousand launches."""
SLEEP_CYCLES_PER_SECOND = 2e9
"""At least the clock of any GPU, so that a sleep lasts at least as long as asked for."""
LEAST_ROTATION = 1 << 28
"""Bytes of rotated inputs: more than twice the largest L2 cache."""
MOST_SECONDS, LEAST_REPEATS = 3.0, 10
"""Calls so slow that all repeats would take longer than this are repeated less often, but this often."""


def seconds(calls: list, device: torch.device, repeats: int) -> list[float]:
    """Of up to `repeats` calls, which take the functions in turn."""
    for call in calls[:WARM_UP] * (WARM_UP if len(calls) < WARM_UP else 1):
        call()
    turns = itertools.cycle(calls)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    next(turns)()
    launching = time.perf_counter() - began
    if on_gpu:
        torch.cuda.synchronize(device)
    repeats = min(repeats, max(LEAST_REPEATS, int(MOST_SECONDS / (time.perf_counter() - began))))
    if not on_gpu:
        return [_seconds_on_cpu(next(turns)) for _ in range(repeats)]
    times = []
    while len(times) < repeats:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(1 + min(BATCH, repeats - len(times)))]
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int((0.001 + 2 * launching * len(marks)) * SLEEP_CYCLES_PER_SECOND))
        marks[0].record()
        for mark in marks[1:]:
            next(turns)()
            mark.record()
        torch.cuda.synchronize(device)
        times += [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)]
    return times


def _seconds_on_cpu(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peak_bytes(call, device: torch.device) -> int | None:
    """The most that a call allocates beside what is there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def check_memory(what: str, num_bytes: int, device: torch.device) -> None:
    """Raise MemoryError where so many bytes are not free, before the machine is out of memory."""
    if num_bytes > (free := free_bytes(device)):
        raise MemoryError(f"{what} would take {num_bytes / 2**30:.1f} GiB of {free / 2**30:.1f} GiB that are free")


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def rotations(num_bytes: int, device: torch.device) -> int:
    """How many sets of tensors of `num_bytes` to take in turn."""
    return -(-LEAST_ROTATION // num_bytes) if device.type == "cuda" else 2


def copy_bytes_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Read and written by a copy of 1 GiB (64 MiB on a CPU)."""
    num_bytes = (1 << 30) if device.type == "cuda" else 1 << 26
    source = torch.ones(num_bytes // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / statistics.median(seconds([lambda: target.copy_(source)], device, 20))


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Of a product of two random 8192 x 8192 matrices (512 x 512 on a CPU)."""
    size = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / statistics.median(seconds([lambda: torch.mm(a, b, out=out)], device, 20))


def compiled(function):
    """torch.compile of a function whose gradient can be taken more than once."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True, dynamic=False)
