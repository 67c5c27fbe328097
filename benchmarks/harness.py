"""How the benchmarks of ops are timed and reported.

On a GPU the calls of a batch are queued behind a sleep and timed by CUDA events, so that what the CPU needs to launch
them is not measured; on a CPU each call is timed by itself. Callers rotate inputs that together exceed the L2 cache.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import platform
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


def parser(doc: str) -> argparse.ArgumentParser:
    """With the options that all benchmarks of ops have."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    options.add_argument("--repeats", type=int, help="calls that are timed, 100 on a GPU, 20 on a CPU")
    options.add_argument("--json", metavar="FILE", help="also write the result to a file")
    return options


def finish(result: dict, file: str | None) -> None:
    """Print the result as one line of JSON, the last, and write it to a file where one is given."""
    line = json.dumps(result)
    if file:
        with open(file, "w", encoding="utf-8") as opened:
            opened.write(line + "\n")
    print(line)


def seconds(calls: list, device: torch.device, repeats: int) -> list[float]:
    """Of `repeats` calls, which take the functions in turn."""
    for call in calls[:WARM_UP] * (WARM_UP if len(calls) < WARM_UP else 1):
        call()
    turns = itertools.cycle(calls)
    if device.type != "cuda":
        return [_seconds_on_cpu(next(turns)) for _ in range(repeats)]
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    next(turns)()
    launching = time.perf_counter() - began
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


def measure(calls: list, device: torch.device, repeats: int, num_bytes: int, copy: float) -> dict:
    """Time of a call in ms, TB/s at `num_bytes` a call, that as a share of `copy` bytes/s, and peak memory on a GPU."""
    times = seconds(calls, device, repeats)
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    median = statistics.median(times)
    return {
        "median_ms": round(median * 1e3, 5), "p10_ms": round(tenths[0] * 1e3, 5), "p90_ms": round(tenths[-1] * 1e3, 5),
        "tb_per_s": round(num_bytes / median / 1e12, 4), "share_of_copy": round(num_bytes / median / copy, 3),
        "peak_bytes": peak_bytes(calls[0], device),
    }


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


def copy_bytes_per_second(device: torch.device) -> float:
    """Read and written by a copy of 1 GiB (64 MiB on a CPU)."""
    source = torch.ones((1 << 30) if device.type == "cuda" else 1 << 26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(seconds([lambda: target.copy_(source)], device, 20))


def rotations(num_bytes: int, device: torch.device) -> int:
    """How many sets of inputs of `num_bytes` to take in turn."""
    return max(2, -(-LEAST_ROTATION // num_bytes)) if device.type == "cuda" else 2


def compiled(function):
    """torch.compile of a function whose gradient can be taken more than once."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True, dynamic=False)


def machine(device: torch.device) -> dict:
    version = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("triton")
    return {
        "date": datetime.date.today().isoformat(), "torch": torch.__version__, "triton": version,
        "python": platform.python_version(), "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
    }
