"""Compiles every kernel configuration that ships, with no GPU, and reads the machine code.

    python -m kernels.lint                              # sm_80, sm_90 and sm_100
    python -m kernels.lint --arch sm_90 --op layer_norm --json

Each module of `kernels.dispatch.OPS` lists its configurations in `lint_cases()`. The compiler is the installed
Triton's, so its release decides the figures. Exit code 1 where a configuration does not compile, spills registers, has
its WGMMAs serialized, needs more shared memory than there is, has a dot without the architecture's tensor cores or no
wide loads in a memory kernel, or where nothing was compiled.
"""

import argparse
import contextlib
import datetime
import functools
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_manager

from kernels import dispatch
from kernels.common import INTERPRETED, LintCase


class Arch(NamedTuple):
    """What an architecture has, from the tables of compute capabilities in NVIDIA's CUDA C++ programming guide."""

    tensor_core: str
    """Its instruction for products of 16-bit numbers; where that is another, warp-level HMMA is the slow path."""
    shared: int
    """Bytes of shared memory that a CTA can have; an SM has RESERVED more, and each CTA takes RESERVED of them."""
    threads: int
    """That an SM holds."""
    ctas: int
    """That an SM holds."""


RESERVED = 1024
REGISTERS = 65536
TENSOR_MEMORY_COLUMNS = 512
ARCHS = {
    "sm_80": Arch("HMMA", 166912, 2048, 32),
    "sm_86": Arch("HMMA", 101376, 1536, 16),
    "sm_89": Arch("HMMA", 101376, 1536, 24),
    "sm_90": Arch("HGMMA", 232448, 2048, 32),
    "sm_100": Arch("UTCHMMA", 232448, 2048, 32),
    "sm_120": Arch("HMMA", 101376, 1536, 24),
}
COLUMNS = {"case": "op/case", "arch": "arch  ", "registers": "regs", "spill_bytes": "spill", "shared_bytes": "shared",
           "warps": "warps", "tensor_core": "tensor cores", "loads": "loads", "stores": "stores",
           "cp_async": "cp.async", "tma_loads": "TMA", "ctas_per_sm": "CTAs/SM", "verdict": "verdict"}


def lint(case: LintCase, arch: str) -> dict:
    """The figures of a case compiled for an architecture, and its verdict: "ok", or all that is wrong."""
    try:
        kernel, log, opcodes = compile_ahead(case, arch)
    except Exception as error:                          # whatever the compiler's passes raise is the finding
        while error.__cause__:                          # in a function that the kernel calls
            error = error.__cause__
        print(f"{case.name} for {arch}: {type(error).__name__}: {error}", file=sys.stderr)
        return {"verdict": f"does not compile: {type(error).__name__}"}
    tensor_core = Counter(opcode.partition(".")[0] for opcode in opcodes if re.match(r"HG?MMA|UTC\w*MMA", opcode))
    limits = ARCHS[arch]
    row = {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", log))),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill stores", log))),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "tensor_core": dict(tensor_core),
        "loads": wide_of_all("LDG", opcodes),
        "stores": wide_of_all("STG", opcodes),
        "cp_async": wide_of_all("LDGSTS", opcodes),
        "tma_loads": sum(opcode.startswith("UTMALDG") for opcode in opcodes),
    }
    row["ctas_per_sm"] = ctas_per_sm(row, kernel.metadata.tmem_size, limits)
    wrong = [reason for reason, holds in {
        f"spills {row['spill_bytes']} bytes": row["spill_bytes"],
        "WGMMA serialized": "serialized" in log,
        f"shared memory over {limits.shared}": row["shared_bytes"] > limits.shared,
        "more registers than an SM has": REGISTERS < row["registers"] * 32 * row["warps"],
        f"dot without {limits.tensor_core}": case.kind == "dot" and limits.tensor_core not in tensor_core,
        "dot without tensor cores": case.kind == "small dot" and not tensor_core,
        "no wide loads": case.kind == "memory" and not (row["loads"][0] or row["cp_async"][0] or row["tma_loads"]),
    }.items() if holds]
    return row | {"verdict": "; ".join(wrong) or "ok"}


def compile_ahead(case, arch):
    """The compiled kernel, what ptxas said of it, and the opcodes of its machine code."""
    names = case.kernel.arg_names
    source = ASTSource(
        case.kernel, {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names},
        {(names.index(name),): value for name, value in case.constexprs.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned})
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    with said_by_ptxas() as log:
        kernel = triton.compile(source, target=target, options=case.options)
    log = kept(kernel, "ptxas.log", lambda: log.getvalue() or assemble(kernel, make_backend(target), case.options))
    listing = kept(kernel, "sass", lambda: disassemble(kernel))
    return kernel, log, re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", listing, re.M)


def kept(kernel, name, make):
    """A text made once and kept with the kernel in Triton's cache."""
    cache = get_cache_manager(kernel.hash)
    path = cache.get_file(name) or cache.put(make(), name, binary=False)
    return Path(path).read_text("utf-8")


@contextlib.contextmanager
def said_by_ptxas():
    """A file of what ptxas says meanwhile, and of the assembly that Triton prints where it fails."""
    with contextlib.redirect_stdout(io.StringIO()) as log, knobs.nvidia.scope():
        knobs.nvidia.dump_ptxas_log = True
        yield log


def assemble(kernel, backend, options):
    """What ptxas says of a kernel from the cache: once more, as this release calls it for this architecture."""
    with said_by_ptxas() as log:
        backend.make_cubin(kernel.asm["ptx"], {}, backend.parse_options(options), backend.target.arch)
    return log.getvalue()


def disassemble(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name], capture_output=True, text=True,
                              check=True).stdout


def wide_of_all(name, opcodes):
    """(how many move at least 128 bits, how many there are) of an instruction."""
    found = [opcode.split(".") for opcode in opcodes if opcode.partition(".")[0] == name]
    return sum(not {"128", "256"}.isdisjoint(parts) for parts in found), len(found)


def ctas_per_sm(row, tensor_memory_columns, arch):
    """How many fit; a warp takes registers by the 256, a CTA shared memory by the 128 bytes."""
    warp_registers = -(-row["registers"] * 32 // 256) * 256
    shared = -(-row["shared_bytes"] // 128) * 128 + RESERVED
    return min(REGISTERS // (warp_registers * row["warps"]), (arch.shared + RESERVED) // shared, arch.ctas,
               arch.threads // (32 * row["warps"]), TENSOR_MEMORY_COLUMNS // max(1, tensor_memory_columns))


@functools.cache
def cases(op):
    return list(importlib.import_module(f"kernels.{op}").lint_cases())


def lint_number(op, arch, number):
    """A row, of a case that another process can find too: kernels under triton.jit cannot be sent."""
    case = cases(op)[number]
    return {"case": f"{op}/{case.name}", "arch": arch} | lint(case, arch)


def line(row, width):
    """A row of the table, or its heading."""
    return "  ".join(text(row.get(column)).ljust(width if column == "case" else len(heading))
                     for column, heading in COLUMNS.items()).rstrip()


def text(value):
    if isinstance(value, dict):
        return " ".join(f"{name} {count}" for name, count in value.items()) or "-"
    if isinstance(value, tuple):
        return "{}/{}".format(*value)
    return "-" if value is None else str(value)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m kernels.lint", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--op", nargs="+", choices=dispatch.OPS, default=dispatch.OPS)
    parser.add_argument("--case", nargs="+", default=[""], metavar="TEXT", help="with one of the texts in op/case")
    parser.add_argument("--json", action="store_true", help="end with a line that is one JSON object")
    options = parser.parse_args(arguments)
    if INTERPRETED.value:
        parser.error("TRITON_INTERPRET=1 is set, and interpreted kernels are not compiled; unset it")

    shipped = [(op, arch, number) for op in options.op for arch in options.arch
               for number, case in enumerate(cases(op))
               if arch in case.archs and any(text in f"{op}/{case.name}" for text in options.case)]
    failures = [f"{op} {arch}: no kernel ships" for op in options.op for arch in options.arch
                if not any(arch in case.archs for case in cases(op))]
    failures += [f"--case {text!r} matches nothing" for text in options.case
                 if not any(text in f"{op}/{cases(op)[number].name}" for op, _, number in shipped)]
    failures += [] if shipped else ["the table is empty"]
    rows = []
    width = max((len(f"{op}/{cases(op)[number].name}") for op, _, number in shipped), default=0)
    print(f"Triton {triton.__version__}; loads, stores and cp.async: of 128 bits or more / all\n{line(COLUMNS, width)}")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("fork")) as pool:
        for row in pool.map(lint_number, *zip(*shipped)):
            rows.append(row)
            print(line(row, width), flush=True)
            failures += [] if row["verdict"] == "ok" else [f"{row['case']} {row['arch']}: {row['verdict']}"]

    print(*(f"failed: {failure}" for failure in failures), f"{len(rows)} compiled, {len(failures)} failures", sep="\n")
    if options.json:
        print(json.dumps({"triton": triton.__version__, "date": datetime.date.today().isoformat(),
                          "failures": failures, "rows": rows}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
