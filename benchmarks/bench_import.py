"""What `minigpt import` and `minigpt export` cost: the memory and time that a model of a few gigabytes takes.

    python -m benchmarks.bench_import [--gigabytes 3] [--dtype bfloat16] [--json FILE]

A Llama of random weights is written in several files, the embedding its largest tensor, imported, exported and imported
again, each in a process of its own. Of each the largest resident memory and the seconds are given; both weights that
were imported must be the same bytes. Disk: about four times the gigabytes, of float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import harness
from minigpt import hf
from minigpt.config import ModelConfig
from minigpt.families import FAMILIES
from minigpt.files import sha256_of

WIDTH = 2048
VERB = r"""
import re, sys, time
from pathlib import Path
from minigpt.hf import export_model, import_model
began = time.perf_counter()
{"import": import_model, "export": export_model}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), warn=lambda line: 0)
seconds = time.perf_counter() - began
print(1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]), seconds)
"""


def write_model(folder: Path, gigabytes: float, dtype: torch.dtype) -> dict:
    """A Llama of about that size in float32, a file a layer; gives its bytes and those of the largest tensor."""
    layer = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * 4 * WIDTH)
    depth = max(1, round(gigabytes * 1e9 * 2 / 3 / layer))
    model = ModelConfig(vocab_size=max(256, round(gigabytes * 1e9 / 3 / 4 / WIDTH)), context_length=64, depth=depth,
                        width=WIDTH, num_heads=16, mlp="swiglu", mlp_width=4 * WIDTH, qk_norm=False)
    family, shapes, files, sizes = FAMILIES["llama"], hf.shapes_of(model), {}, []
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **family.config(model)}), "utf-8")
    tensors = {name: shape for pair in family.pairs(model) for name, shape in zip(
        pair.theirs, pair.shapes(shapes[pair.ours]), strict=True)}
    generator = torch.Generator().manual_seed(0)
    for part in sorted({name.rpartition("layers.")[2].partition(".")[0] for name in tensors}):
        group = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in tensors.items()
                 if name.rpartition("layers.")[2].partition(".")[0] == part}
        save_file(group, folder / f"part-{part}.safetensors")
        files |= dict.fromkeys(group, f"part-{part}.safetensors")
        sizes += [4 * tensor.numel() for tensor in group.values()]
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": files}), "utf-8")
    return {"float32_bytes": sum(sizes), "largest_tensor_bytes": max(sizes)}


def measure(verb: str, source: Path, out: Path) -> dict:
    """Peak resident bytes and seconds of a verb in a process of its own."""
    command = [sys.executable, "-c", VERB, verb, str(source), str(out)]
    peak, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return {"peak_bytes": int(peak), "seconds": float(seconds)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What import and export of a large model cost.")
    parser.add_argument("--gigabytes", type=float, default=3, help="of the model in float32 (default 3)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                        help="of the files that are imported (default float32)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as directory:
        theirs, ours, written, again = (Path(directory, name) for name in ("theirs", "ours", "written", "again"))
        result = {"benchmark": "import", "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                  "python": platform.python_version(), "torch": torch.__version__, "dtype": arguments.dtype,
                  **write_model(theirs, arguments.gigabytes, getattr(torch, arguments.dtype))}
        for name, verb, source, out in (("import", "import", theirs, ours), ("export", "export", ours, written),
                                        ("import_again", "import", written, again)):
            result |= {f"{name}_{key}": value for key, value in measure(verb, source, out).items()}
        result["same_bytes"] = sha256_of(ours / hf.WEIGHTS) == sha256_of(again / hf.WEIGHTS)
    for key, value in result.items():
        shown = f"{value / 1e9:,.3f} GB" if key.endswith("_bytes") and key != "same_bytes" else value
        print(f"{key:28} {shown:,.1f}" if isinstance(shown, float) else f"{key:28} {shown}")
    harness.save(arguments.json, result)
    print(json.dumps(result))
    if not result["same_bytes"]:
        sys.exit("error: the weights that were imported again are others")


if __name__ == "__main__":
    main()
