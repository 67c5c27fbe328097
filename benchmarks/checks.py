"""One group of checks of the kernels, on the machine at hand:

    python -m benchmarks.checks attention-heads-bfloat16 [--device cuda] [--json FILE]

Every case is tried and printed, and what one raises costs no other. On a CPU the sizes are tiny and the kernels run in
Triton's interpreter (TRITON_INTERPRET=1). The last line is one JSON object; the exit code is 1 where a case failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from pathlib import Path

import torch

import kernels
from benchmarks import harness
from kernels import dispatch
from minigpt.cli import Parser

MODULES = ("check_attention", "check_norms", "check_pointwise", "check_linear_cross_entropy", "check_inference",
           "check_machine", "check_model")
"""Each has CHECKS: {name: function of the type of device that gives {case: function of no arguments}}."""


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=available())
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="also write the result to a file")
    options = parser.parse_args(arguments)
    harness.check_device(parser, options.device)
    if problem := dispatch.obstacle(options.device):
        parser.error(problem)
    result = run(available()[options.name](options.device), options.name, options.device, options.json)
    print(json.dumps(result))
    sys.exit(result["failed"] > 0)


def available() -> dict:
    """All checks by name."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))        # `compare` is what the tests compare with
    return {name: make for module in MODULES
            for name, make in importlib.import_module(f"benchmarks.{module}").CHECKS.items()}


def run(cases: dict, name: str, device: str, file: str | None = None) -> dict:
    """Try the cases in turn; the file is rewritten after each."""
    with kernels.use("triton"):
        paths = {op: path for op, (path, _) in kernels.explain().items()}
    result = {"check": name, **harness.machine(torch.device(device)), "paths": paths, "passed": 0, "failed": 0,
              "cannot_run": 0, "cases": []}
    for case, function in cases.items():
        began, found = time.perf_counter(), {}
        try:
            with kernels.use("triton"):
                torch.manual_seed(0)
                found = function() or {}
            state = "passed"
        except MemoryError as error:                    # the machine is too small
            state, found = "cannot_run", {"error": str(error)}
        except Exception as error:
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            state, found = "failed", {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
        if device == "cuda":
            torch.cuda.empty_cache()
        result[state] += 1
        seconds = round(time.perf_counter() - began, 2)
        result["cases"].append({"case": case, "state": state, "seconds": seconds, **found})
        print(f"{state:>10} {seconds:7.2f} s  {case}  {found.get('error', '')}", flush=True)
        harness.save(file, result)
    return result


if __name__ == "__main__":
    main()
