"""A recipe of ours against any other command that learns the same text, in turn, on this machine.

    python -m benchmarks.race configs/shakespeare_cpu.toml --text FILE --target 2.72 --times 3 \\
        --peer "python train.py config/train_shakespeare_char.py --device=cpu ..." --peer-dir FOLDER \\
        --peer-loss "val loss ([0-9.]+)" --peer-scale 1.442695 [--at 10] [--plot FILE] [--json FILE] [--set KEY=VALUE]

Time is of the whole process, from its start to its end, ours without a tokenizer, data or anything else from before. A
point of the peer's curve is a line of its output that --peer-loss finds, times --peer-scale: for nats per character of
a text of one byte a character 1 / ln 2 gives bits per byte. Ours are those of metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import harness
from minigpt.cli import Parser

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Curve:
    """One process: `points` (seconds since its start, bits per byte), and how long it ran in all."""

    points: list[tuple[float, float]]
    seconds: float

    @property
    def last(self) -> float:
        return self.points[-1][1]

    def reached(self, target: float) -> float | None:
        """When the target was first reached; at the last point only when all was saved and the process had ended."""
        for seconds, bits in self.points[:-1]:
            if bits <= target:
                return seconds
        return self.seconds if self.last <= target else None

    def at(self, seconds: float) -> float | None:
        """The last figure known by then."""
        known = [bits for moment, bits in self.points if moment <= seconds]
        return known[-1] if known else None


def ours(config: str, text: Path, more: list[str]) -> Curve:
    """A run of our recipe with nothing from before: its own cache and its own directory."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), config, f"--data.path={text}",
                   f"--train.run_dir={folder}/run", *more]
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"XDG_CACHE_HOME": folder})
        seconds = time.monotonic() - began
        records = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    return Curve([(record["elapsed_seconds"], record["val_bpb"]) for record in records if "val_bpb" in record], seconds)


def theirs(command: str, folder: Path, pattern: re.Pattern, scale: float) -> Curve:
    """A run of a command, whose lines are timed as they come."""
    points, began = [], time.monotonic()
    with subprocess.Popen(shlex.split(command), cwd=folder, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        for line in process.stdout:
            if found := pattern.search(line):
                points.append((time.monotonic() - began, scale * float(found[1])))
    if process.returncode:
        raise ValueError(f"--peer {command}: exit code {process.returncode}")
    if not points:
        raise ValueError(f"--peer-loss {pattern.pattern}: no line of the peer's output has it; mend the pattern")
    return Curve(points, time.monotonic() - began)


def summary(name: str, curves: list[Curve], target: float | None, at: float | None) -> dict:
    """Medians, and least and most."""
    def spread(values):
        values = [value for value in values if value is not None]
        return values and {"median": statistics.median(values), "least": min(values), "most": max(values)} or None

    row = {"name": name, "seconds": spread([curve.seconds for curve in curves]),
           "bits_per_byte": spread([curve.last for curve in curves])}
    if target is not None:
        times = [curve.reached(target) for curve in curves]
        row |= {"to_target": spread(times) if None not in times else None, "reached": len(curves) - times.count(None)}
    if at is not None:
        row["bits_at"] = spread([curve.at(at) for curve in curves])
    return row | {"curves": [curve.points for curve in curves]}


def table(rows: list[dict], target: float | None, at: float | None) -> list[str]:
    heads = {"seconds": "seconds in all", "bits_per_byte": "bits per byte", "to_target": f"seconds to {target}",
             "bits_at": f"bits per byte at {at} s"}
    keys = [key for key in heads if key in rows[0]]
    lines = [[""] + [heads[key] for key in keys]]
    for row in rows:
        cells = [row[key] and f"{row[key]['median']:.3f} ({row[key]['least']:.3f} to {row[key]['most']:.3f})"
                 for key in keys]
        lines.append([row["name"], *(cell or "not" for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]


def plot(rows: list[dict], target: float | None, file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, row in enumerate(rows):
        for place, curve in enumerate(row["curves"]):
            label = None if place else row["name"]
            axes.plot(*zip(*curve), marker="o", markersize=3, color=f"C{number}", label=label)
    if target is not None:
        axes.axhline(target, color="gray", linestyle="dashed")
    axes.set(xlabel="seconds since the process began", ylabel="bits per byte of held-out text", xscale="log")
    axes.legend()
    figure.savefig(file)


def _pattern(text):
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="race", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--text", type=Path, required=True, help="the text that both learn")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of ours")
    parser.add_argument("--peer", metavar="COMMAND")
    parser.add_argument("--peer-dir", type=Path, default=Path("."), help="where it runs")
    parser.add_argument("--peer-loss", type=_pattern, help="a regular expression with one group, a number")
    parser.add_argument("--peer-scale", type=float, default=1.0, help="times this, it is in bits per byte")
    parser.add_argument("--times", type=harness.positive, default=3)
    parser.add_argument("--target", type=float, help="bits per byte to reach")
    parser.add_argument("--at", type=float, help="seconds at which to compare")
    parser.add_argument("--json", metavar="FILE", help="also write the result to a file")
    parser.add_argument("--plot", metavar="FILE", help="also draw it (.png, .svg or .pdf)")
    arguments = parser.parse_args(argv)
    if bool(arguments.peer) != bool(arguments.peer_loss):
        parser.error("--peer and --peer-loss go together; give both or neither")
    if not arguments.text.is_file():
        parser.error(f"--text {arguments.text}: no such file")
    if not arguments.peer_dir.is_dir():
        parser.error(f"--peer-dir {arguments.peer_dir}: no such folder")
    for name in ("json", "plot"):
        harness.check_file(parser, name, getattr(arguments, name))
    text, contenders = arguments.text.absolute(), {}
    more = [f"--{setting}" for setting in arguments.set]
    contenders["minigpt"] = lambda: ours(arguments.config, text, more)
    if arguments.peer:
        contenders["peer"] = lambda: theirs(arguments.peer, arguments.peer_dir, arguments.peer_loss,
                                            arguments.peer_scale)
    curves = {name: [] for name in contenders}
    try:
        for turn in range(arguments.times):
            for name in list(contenders)[::-1 if turn % 2 else 1]:
                curves[name].append(contenders[name]())
                print(f"{name}: {curves[name][-1].last:.4f} bits per byte after {curves[name][-1].seconds:.1f} s",
                      flush=True)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        parser.error(str(error))
    rows = [summary(name, found, arguments.target, arguments.at) for name, found in curves.items()]
    print("\n".join(table(rows, arguments.target, arguments.at)))
    result = {"benchmark": "race", **harness.machine(torch.device("cpu")), "config": arguments.config,
              "set": arguments.set, "peer": arguments.peer, "target": arguments.target, "at": arguments.at,
              "rows": rows}
    if arguments.peer:
        mine, other = (row["to_target"] or row["seconds"] if arguments.target else row["seconds"] for row in rows)
        result["ratio"] = other["median"] / mine["median"]
        print(f"the peer takes {result['ratio']:.2f} times as long")
    if arguments.plot:
        plot(rows, arguments.target, arguments.plot)
    harness.save(arguments.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
