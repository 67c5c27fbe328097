"""How the benchmarks of ops are run and reported: every path of an op on every case, forward and backward.

A path is one way to compute the op, a case one shape of it. What a path raises costs no other row. The file that --json
names is rewritten after each row, so that a benchmark that is interrupted leaves what it has measured.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
from benchmarks import report, timing
from kernels import dispatch
from minigpt.cli import Parser
from minigpt.files import write_durably

DIRECTIONS = ("forward", "backward")
WITH_GRADIENTS = ("inference", "both")
"""Of an op that makes its gradients on the way forward: without them, and forward and backward."""
PEERS = {"liger": "liger_kernel", "nanogpt": "model"}
"""{name of a baseline from outside: the package or module that holds it}."""


@dataclass(frozen=True)
class OpPath:
    """One way to compute an op."""

    call: Callable
    directions: tuple[str, ...] = DIRECTIONS
    """Those in which it differs from the other paths."""
    check: Callable | None = None
    """check(*tensors) raises where it cannot take them."""


@dataclass(frozen=True)
class Case:
    """One shape of an op."""

    labels: dict
    """What tells it from the others: {"width": 768}."""
    work: dict[str, float]
    """{direction: bytes or FLOPs of one call}."""
    call: Callable
    """call(path's function, *tensors): the op's outputs."""
    inputs: Callable
    """() -> (sets of tensors to take in turn, gradients of the outputs)."""


@dataclass(frozen=True)
class Scale:
    """What work is counted in, and what it is measured against."""

    rate: str
    """Key of the rate in a row: "tb_per_s"."""
    unit: str
    ceiling: str
    best: Callable
    """best(device, dtype): the highest rate that was measured, per second."""


COPY = Scale("tb_per_s", "TB/s", "copy", timing.copy_bytes_per_second)
MATMUL = Scale("tflop_per_s", "TFLOP/s", "matmul", timing.matmul_flops_per_second)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parser(doc: str) -> Parser:
    """With the options that all benchmarks of ops have."""
    options = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="bfloat16 on a GPU, else float32")
    options.add_argument("--repeats", type=positive, help="most calls that are timed, 100 on a GPU, 20 on a CPU")
    options.add_argument("--paths", nargs="+", metavar="PATH", help="some of those that exist here")
    options.add_argument("--json", metavar="FILE", help="also write the result to a file")
    options.add_argument("--plot", metavar="FILE", help="also draw the result (.png, .svg or .pdf)")
    add_peers(options)
    return options


def add_peers(options: argparse.ArgumentParser) -> None:
    options.add_argument("--peer", action="append", default=[], metavar="NAME=PATH",
                         help=f"take the package of a baseline ({', '.join(PEERS)}) from a folder")


def parse(options: Parser, arguments: list[str] | None) -> argparse.Namespace:
    """The options, those about the machine filled in. Ends the process where one cannot be had."""
    chosen = options.parse_args(arguments)
    check_device(options, chosen.device)
    for peer in chosen.peer:
        sys.path.insert(0, folder_of_peer(options, peer))
    for name in ("json", "plot"):
        check_file(options, name, getattr(chosen, name))
    if chosen.plot and Path(chosen.plot).suffix not in (".png", ".svg", ".pdf"):
        options.error(f"--plot {chosen.plot}: the name must end with .png, .svg or .pdf")
    if chosen.plot and importlib.util.find_spec("matplotlib") is None:
        options.error("--plot needs matplotlib: pip install 'minigpt[viz]'")
    on_gpu = chosen.device == "cuda"
    chosen.device = torch.device(chosen.device)
    chosen.dtype = getattr(torch, chosen.dtype or ("bfloat16" if on_gpu else "float32"))
    chosen.repeats = max(2, chosen.repeats or (100 if on_gpu else 20))      # of one there are no quantiles
    return chosen


def check_device(options: Parser, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        options.error("there is no CUDA GPU here; --device cpu takes the CPU")


def check_file(options: Parser, name: str, file: str | Path | None) -> None:
    """End the process where a file that an option names cannot be made."""
    if file and not Path(file).absolute().parent.is_dir():
        options.error(f"--{name} {file}: there is no such folder")
    if file and Path(file).is_dir():
        options.error(f"--{name} {file}: a folder; name a file in it")


def folder_of_peer(options: Parser, peer: str) -> str:
    """The folder of NAME=PATH, in which the peer's package lies."""
    name, _, folder = peer.partition("=")
    if name not in PEERS:
        options.error(f"--peer {peer}: there is {', '.join(PEERS)}, as NAME=PATH")
    folder = str(Path(folder).absolute())
    if importlib.machinery.PathFinder.find_spec(PEERS[name], [folder]) is None:
        options.error(f"--peer {peer}: no {PEERS[name]} lies in {folder}")
    return folder


def triton_path(op: str, device: torch.device) -> Callable | None:
    """The op on Triton, None where it has no Triton kernel that runs on the device."""
    if dispatch.obstacle(device.type):
        return None
    with kernels.use("triton"):
        there = dispatch.path(op, device.type)[0] == "triton"
    return functools.partial(on_triton, getattr(kernels, op)) if there else None


def on_triton(function, *arguments, **options):
    with kernels.use("triton"):
        return function(*arguments, **options)


def compare(parser: Parser, options: argparse.Namespace, op: str, scale: Scale, paths: dict[str, OpPath],
            cases: list[Case], settings: dict) -> None:
    """Measure the paths on the cases, print a table, and end with one line of JSON; `settings` are told in both."""
    if unknown := set(options.paths or ()) - paths.keys():
        parser.error(f"no path {', '.join(sorted(unknown))} here; there is: {', '.join(paths)}")
    try:
        save(options.json, {})                          # a file that cannot be written is known before the measuring
    except OSError as error:
        parser.error(f"--json: {error}")
    best = scale.best(options.device, options.dtype)
    dtype = str(options.dtype).removeprefix("torch.")
    result = {"benchmark": op, **machine(options.device), "dtype": dtype, **settings,
              f"{scale.ceiling}_{scale.rate}": float(f"{best / 1e12:.5g}"), "rate": scale.rate,
              "labels": [*cases[0].labels], "complete": False, "results": []}
    print(f"{op}, {dtype}, {', '.join(f'{name} {value}' for name, value in settings.items())}; "
          f"a {scale.ceiling} runs at {best / 1e12:.4g} {scale.unit}")
    print(f"{'direction':>9}{_columns(cases[0].labels)} {'path':>15}{'median ms':>11}{'p10':>10}{'p90':>10}"
          f"{scale.unit:>11}{'of ' + scale.ceiling:>10}{'peak MiB':>10}")
    for case in cases:
        for name in options.paths or paths:
            for direction in paths[name].directions:
                row = {"direction": direction, **case.labels, "path": name}
                row |= figures(case, paths[name], direction, options, scale, best)
                result["results"].append(row)
                print(f"{direction:>9}{_columns(case.labels.values())} {name:>15}{_shown(row, scale)}", flush=True)
                save(options.json, result)
    result["complete"] = True
    save(options.json, result)
    if options.plot:
        report.draw(result, options.plot)
    print(json.dumps(result))


def figures(case: Case, path: OpPath, direction: str, options: argparse.Namespace, scale: Scale,
            best: float) -> dict:
    """Of one path on one case: times in ms, the rate, that as a share of `best`, and peak memory, or the error."""
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        sets, grads = case.inputs()
        if path.check:
            path.check(*sets[0])
        calls = calls_of(functools.partial(case.call, path.call), direction, sets, grads)
        times = timing.seconds(calls, options.device, options.repeats)
        peak = timing.peak_bytes(calls[0], options.device)
    except Exception as error:                          # what one path raises must not cost the others' figures
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    median = statistics.median(times)
    rate = case.work[direction] / median
    found = {"median_ms": median * 1e3, "p10_ms": tenths[0] * 1e3, "p90_ms": tenths[-1] * 1e3,
             scale.rate: rate / 1e12, f"share_of_{scale.ceiling}": rate / best}
    return {name: float(f"{value:.5g}") for name, value in found.items()} | {"peak_bytes": peak, "repeats": len(times)}


def calls_of(op: Callable, direction: str, sets: list, grads: list) -> list:
    """A function without arguments for each set of tensors: the op, the gradients of all that it takes, or both."""
    if direction == "forward":
        return [functools.partial(op, *tensors) for tensors in sets]
    if direction == "inference":
        return [torch.no_grad()(functools.partial(op, *tensors)) for tensors in sets]
    if direction == "both":
        return [lambda tensors=tensors: torch.autograd.grad(op(*tensors), tensors, grads) for tensors in sets]
    return [functools.partial(torch.autograd.grad, op(*tensors), tensors, grads, retain_graph=True)
            for tensors in sets]


def _columns(words):
    return "".join(f"{word!s:>13}" for word in words)


def _shown(row, scale):
    if "error" in row:
        return f"  {row['error']}"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
    return (f"{row['median_ms']:11.4f}{row['p10_ms']:10.4f}{row['p90_ms']:10.4f}{row[scale.rate]:11.4g}"
            f"{row[f'share_of_{scale.ceiling}']:10.1%}{peak:>10}")


def save(file: str | None, result: dict) -> None:
    """Write the result to the file, if there is one, as one line of JSON."""
    if file:
        write_durably(Path(file), json.dumps(result).encode() + b"\n")


def machine(device: torch.device) -> dict:
    version = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("triton")
    return {
        "date": datetime.date.today().isoformat(), "torch": torch.__version__, "triton": version,
        "python": platform.python_version(), "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
    }
