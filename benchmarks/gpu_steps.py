"""The steps of `benchmarks.gpu_check`: what they are, how one runs as a process of its own, what is told of it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("kernels/*.py", "minigpt/*.py", "benchmarks/*.py", "tests/compare.py")
"""What results depend on."""
FIRST_CHECKS = {"descriptors": 60, "compiled": 120, "training": 120, "repeats": 90}
"""{name: the most seconds}; then, of each type:"""
CHECKS = ("attention-masks", "attention-heads", "attention-tiles", "attention-shapes", "layer_norm", "rms_norm",
          "linear_cross_entropy", "pointwise", "inference")
DTYPES = ("bfloat16", "float16", "float32")
MOST_SECONDS_TO_DIE = 10
"""Of a killed process, until its end is no longer waited for."""
NEEDED_TO_RESUME = ("numpy", "safetensors", "sentencepiece")
"""By a training run, beside torch."""
TINY = {"attention": ["--tokens", "64", "--width", "32", "--lengths", "32", "--head-sizes", "16", "--repeats", "2"],
        "layer_norm": ["--rows", "8", "--widths", "32", "--repeats", "2"],
        "rms_norm": ["--rows", "8", "--widths", "32", "--repeats", "2"],
        "linear_cross_entropy": ["--sizes", "8x8x40", "--repeats", "2"],
        "activations": ["--rows", "8", "--widths", "32", "--repeats", "2"],
        "rotary": ["--tokens", "32", "--lengths", "16", "--repeats", "2"],
        "split_heads": ["--repeats", "2"],
        "decode_attention": ["--lengths", "16", "--repeats", "2"],
        "quantized_linear": ["--sizes", "128", "--repeats", "2"],
        "decode": ["--new-tokens", "4", "--repeats", "1"],
        "train": ["--model.preset=tiny", "--model.context_length=16", "--model.depth=1", "--model.width=32",
                  "--model.vocab_size=512", "--train.batch_size=2", "--repeats", "2"]}
"""What benchmarks are given on a CPU."""


def _by_exit_code(code: int, result: dict) -> bool:
    return code == 0


def _none_differed(code: int, result: dict) -> bool:
    """Of few kills none may fall within a save, which the crash test counts as a failure."""
    return bool(result) and result["identical"] == result["kills"]


@dataclass(frozen=True)
class Step:
    """One command that writes a JSON object to the file after --json."""

    name: str
    command: list[str]
    """Python's arguments."""
    seconds: float
    """The most it may take."""
    alone: bool = False
    """Nothing else runs at the same time."""
    decides: bool = True
    """It must pass for the exit code to be 0."""
    passed: Callable[[int, dict], bool] = _by_exit_code


def steps(device: str, peers: list[str]) -> list[Step]:
    """All of them, those of most worth first: checks, then speed."""
    checks = {f"{group}-{dtype}": 180 for dtype in DTYPES for group in CHECKS}
    found = [Step(name, ["-m", "benchmarks.checks", name], seconds, decides=name != "descriptors")
             for name, seconds in (FIRST_CHECKS | checks).items()]
    if all(map(importlib.util.find_spec, NEEDED_TO_RESUME)):
        found.append(Step("resume", ["-m", "benchmarks.crash_test", "--kills", "8", "--workers", "4"], 150,
                          passed=_none_differed))
    found.append(Step("offsets", ["-m", "benchmarks.checks", "offsets"], 60, alone=True))
    nanogpt = any(peer.startswith("nanogpt=") for peer in peers)
    speeds = {
        "attention": ("attention", 120, ["--paths", "triton", "triton_one_pass"]),
        "train": ("train", 90, ["--paths", "triton", "reference", "plain", *["nanogpt"] * nanogpt]),
        "train-profile": ("train", 60, ["--profile"]),
        "attention-sdpa": ("attention", 60, ["--paths", "sdpa_flash", *["sdpa_cudnn"] * (device == "cuda")]),
        "attention-flex": ("attention", 120, ["--paths", "flex"]),
        "rms_norm": ("rms_norm", 100, []),
        "layer_norm": ("layer_norm", 100, []),
        "linear_cross_entropy": ("linear_cross_entropy", 90, []),
        "decode_attention": ("decode_attention", 60, []),
        "quantized_linear": ("quantized_linear", 60, []),
        "decode": ("decode", 150, ["--shape", "toy" if device == "cpu" else "1b", "--dtypes", "bfloat16", "--paths",
                                   "engine", "--prompts", "32"]),
        "activations": ("activations", 60, []),
        "rotary": ("rotary", 60, []),
        "split_heads": ("split_heads", 60, []),
        "train-compiled": ("train", 240, ["--paths", "triton_compiled", "compiled", *["nanogpt_compiled"] * nanogpt]),
        "attention-plain": ("attention", 150, ["--paths", "plain", "compiled"]),
    }
    for name, (op, seconds, words) in speeds.items():
        command = ["-m", f"benchmarks.bench_{op}", *(TINY[op] if device == "cpu" else []), *words]
        command += [word for peer in peers for word in ("--peer", peer)]
        if name != "attention-flex" or device == "cuda":
            found.append(Step(f"speed-{name}", command, seconds, alone=True, decides=False))
    return found


class Process:
    """A step that runs, with its process group, so that what it has started ends with it."""

    def __init__(self, step: Step, device: str):
        self.step, self.began = step, time.monotonic()
        self.folder = tempfile.TemporaryDirectory(prefix="gpu_check_")
        self.file, self.output = Path(self.folder.name, "result.json"), Path(self.folder.name, "output")
        environment = os.environ | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *step.command, "--device", device, "--json", str(self.file)], stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def finish(self, seconds: float) -> tuple[dict, str]:
        """What came of it after at most so many seconds, and its output."""
        state = None
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            state = "timed out"
        self.kill()
        try:
            code = self.process.wait(MOST_SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:               # it hangs in the driver
            code, state = None, "timed out"
        output = self.output.read_text("utf-8", errors="replace")
        result = {}
        with contextlib.suppress(OSError, ValueError):
            result = json.loads(self.file.read_text("utf-8"))
        self.folder.cleanup()
        state = state or ("passed" if self.step.passed(code, result) else "failed")
        outcome = {"state": state, "seconds": round(time.monotonic() - self.began, 1)}
        if state != "passed":
            outcome["error"] = _error(state, code, result, output, seconds)
        return outcome | {"result": result}, output


def _error(state, code, result, output, seconds):
    """One line that says why a step did not pass."""
    if state == "timed out":
        return f"it had not ended after {seconds:.0f} s, which it was given"
    failed = [case for case in result.get("cases", ()) if case["state"] == "failed"]
    if failed:
        return f"{len(failed)} of {len(result['cases'])} failed: {failed[0]['case']}: {failed[0]['error']}"
    lines = [line for line in output.splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1][:300] if lines else 'no output'}"


def told(outcome: dict) -> str:
    """A step's outcome in a few words."""
    result = outcome.get("result") or {}
    words = [outcome["error"]] if "error" in outcome else []
    if "check" in result:
        words.append(f"{result['passed']} passed" + f", {result['cannot_run']} cannot run" * bool(result["cannot_run"]))
        if reference := [op for op, path in result["paths"].items() if path != "triton" and op in result["check"]]:
            words.append(f"{reference[0]} on the reference")
    if "rate" in result:
        raised = sum("error" in row for row in result["results"])
        words.append(f"{len(result['results'])} rows" + f", {raised} of them errors" * bool(raised))
    if result.get("step_seconds"):
        words.append(f"a step of {result['step_seconds'] * 1e3:.4g} ms in {len(result['groups'])} groups")
    if "identical" in result:
        words.append(f"{result['identical']} of {result['kills']} killed runs ended identical")
    return "; ".join(words)


def sources() -> dict:
    """The commit, where git knows it, and the SHA-256 of all sources that results depend on."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in SOURCES for file in ROOT.glob(pattern)):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    commit = None
    with contextlib.suppress(OSError):                  # there may be no git
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"commit": commit or None, "source": digest.hexdigest()}
