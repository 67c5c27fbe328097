"""Everything that needs a GPU, within 8 minutes: checks of the kernels, then their benchmarks.

    python -m benchmarks.gpu_check [--out benchmarks/results] [--peer liger=PATH] [--steps NAME ...] [--fresh]

Each step is a process of its own and has its own time; what fails or takes too long costs no other step. Checks run at
the same time, benchmarks alone. After each step the results are in OUT/gpu_check.json, its output in gpu_check.log;
plots follow where matplotlib is there. Run again, the command goes on: steps that passed on the same sources, device,
torch and triton are kept; what has not run yet is run, then what did not pass. The last line is one JSON object; the
exit code is 1 where a check failed or has not ended, 130 after Ctrl-C. --device cpu tries it all in small.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import gpu_steps, harness, report
from minigpt.cli import Parser
from minigpt.files import read_json, write_durably

SECONDS = 450
"""What all steps may take together; starting and drawing are left 30 of the 8 minutes."""
LEAST_SECONDS = 10
"""A step is not begun with less."""
MOST_AT_ONCE = 12
"""Checks at the same time, whose tensors share the GPU's memory."""
STOPPED = float("-inf")
"""The deadline after Ctrl-C."""
IDENTITY = ("source", "device", "torch", "triton")
"""What must be the same for a recorded step to count."""


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", default="benchmarks/results", metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=harness.positive, default=SECONDS, help="for all steps (default %(default)s)")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="some of the steps, in their own order")
    parser.add_argument("--fresh", action="store_true", help="forget what is recorded")
    harness.add_peers(parser)
    options = parser.parse_args(arguments)
    harness.check_device(parser, options.device)
    peers = [f"{peer.partition('=')[0]}={harness.folder_of_peer(parser, peer)}" for peer in options.peer]
    steps = gpu_steps.steps(options.device, peers)
    if unknown := set(options.steps or ()) - {step.name for step in steps}:
        parser.error(f"no step {', '.join(sorted(unknown))}; there is: {', '.join(step.name for step in steps)}")
    steps = [step for step in steps if step.name in (options.steps or [step.name])]
    try:
        record = Record(Path(options.out), options.device, options.fresh)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(Check(steps, record, options.device, options.seconds).run())


class Record:
    """gpu_check.json: where the steps ran, and {name: what came of it}. Rewritten whole after each step."""

    def __init__(self, folder: Path, device: str, fresh: bool):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "gpu_check.json"
        self.content = {"benchmark": "gpu_check", **harness.machine(torch.device(device)), **gpu_steps.sources(),
                        "steps": {}}
        before = read_json(self.file) if self.file.exists() and not fresh else {}
        if not isinstance(before, dict):
            raise ValueError(f"{self.file} is no record of this command; move it away, or take --fresh")
        if all(before.get(key) == self.content[key] for key in IDENTITY):
            self.content["steps"] = before.get("steps", {})
        elif before:
            print(f"{self.file} is about another {next(k for k in IDENTITY if before.get(k) != self.content[k])}; anew")
        if not self.steps:
            (folder / "gpu_check.log").write_text("", "utf-8")

    @property
    def steps(self) -> dict:
        return self.content["steps"]

    def add(self, name: str, outcome: dict, output: str) -> None:
        self.steps[name] = outcome
        write_durably(self.file, json.dumps(self.content, indent=1).encode() + b"\n")
        with open(self.folder / "gpu_check.log", "a", encoding="utf-8") as file:
            file.write(f"=== {name}: {outcome['state']} after {outcome['seconds']} s\n{output}\n")


class Check:
    """Runs the steps that are left, until the time is over."""

    def __init__(self, steps: list[gpu_steps.Step], record: Record, device: str, seconds: float):
        self.record, self.device, self.steps = record, device, steps
        self.deadline = time.monotonic() + seconds
        self.running: set[gpu_steps.Process] = set()
        self.lock = threading.Lock()

    def run(self) -> int:
        """All steps; the exit code."""
        began = time.monotonic()
        left = [step for step in self.steps if self.state(step) != "passed"]
        left.sort(key=lambda step: self.state(step) != "not run")
        for step in self.steps:
            if step not in left:
                print(f"{step.name}: {self.state(step)} before")
        pool = ThreadPoolExecutor(max(1, min(MOST_AT_ONCE, (os.cpu_count() or 1) * 3 // 4)))
        try:
            together = [step for step in left if not step.alone]
            for finished in [pool.submit(self.run_step, step) for step in together]:
                finished.result()
            for step in left:
                if step.alone:
                    self.run_step(step)
        except KeyboardInterrupt:
            with self.lock:
                self.deadline = STOPPED                 # no other begins
                for process in self.running:
                    process.kill()
            pool.shutdown(cancel_futures=True)
            print(f"stopped; what has ended is in {self.record.file}, the same command goes on")
            return 130
        pool.shutdown()
        return self.finish(time.monotonic() - began)

    def state(self, step):
        return self.record.steps.get(step.name, {}).get("state", "not run")

    def run_step(self, step):
        with self.lock:
            seconds = min(step.seconds, self.deadline - time.monotonic())
            if seconds < min(LEAST_SECONDS, step.seconds):
                return
            try:
                process = gpu_steps.Process(step, self.device)
            except OSError as error:
                print(f"{step.name}: not run: {error}", flush=True)
                return
            self.running.add(process)
        outcome, output = process.finish(seconds)
        with self.lock:
            self.running.discard(process)
            if self.deadline == STOPPED:
                return                                  # killed with this process, which is no outcome
            try:
                self.record.add(step.name, outcome, output)
            except OSError as error:                    # it is told at the end all the same
                print(f"{self.record.file} could not be written: {error}", flush=True)
        print(f"{step.name}: {outcome['state']} after {outcome['seconds']} s  {outcome.get('error', '')}", flush=True)

    def finish(self, seconds) -> int:
        """The plots, the tables, the last line, the exit code."""
        measured = report.merged([result for outcome in self.record.steps.values()
                                  if "rate" in (result := outcome["result"]) and result["results"]])
        plots = [f"{name}.png" for name in measured if importlib.util.find_spec("matplotlib")]
        for name, result in measured.items():
            print("\n" + "\n".join(report.table(result)))
            if plots:
                report.draw(result, str(self.record.folder / f"{name}.png"))
        print(f"\n{'step':<32}{'state':<10}{'seconds':>8}  what came of it")
        for step in self.steps:
            outcome = self.record.steps.get(step.name, {})
            print(f"{step.name:<32}{self.state(step):<10}{outcome.get('seconds', ''):>8}  {gpu_steps.told(outcome)}")
        states = {step.name: self.state(step) for step in self.steps}
        unproved = [step.name for step in self.steps if step.decides and states[step.name] != "passed"]
        print(json.dumps({
            **{key: value for key, value in self.record.content.items() if key != "steps"},
            "seconds": round(seconds, 1), "file": str(self.record.file), "plots": plots, "unproved": unproved,
            **{state.replace(" ", "_"): [name for name in states if states[name] == state]
               for state in ("passed", "failed", "timed out", "not run")}}))
        return 1 if unproved else 0


if __name__ == "__main__":
    main()
