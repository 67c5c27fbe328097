"""Time of a training step by phase: python -m benchmarks.bench_training CONFIG [--section.key=value ...]

Random tokens, the recipe's own shape, after three steps of warm-up. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import statistics
import time

import numpy as np
import torch

from minigpt.config import load_config
from minigpt.device import pick_device, pick_dtype
from minigpt.model import GPT
from minigpt.objectives import make_objective
from minigpt.optim import make_optimizers
from minigpt.tokenizer import FIRST_BYTE, Tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default="configs/quickstart.toml")
    parser.add_argument("--steps", type=int, default=15, help="steps that are timed")
    parser.add_argument("--json", metavar="FILE", help="also write the result to a file")
    arguments, overrides = parser.parse_known_args()
    result = measure(load_config(arguments.config, overrides), arguments.steps)
    for phase in ("forward", "backward", "optimizer", "step"):
        print(f"{phase:>10}  {result[phase + '_ms']:9.1f} ms")
    print(f"{result['tokens_per_second']:,.0f} tokens/s, {result['gflops_per_second']:,.0f} GFLOP/s "
          f"({result['parameters'] / 1e6:.2f}M parameters, {result['device']}, {result['dtype']})")
    line = json.dumps(result)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


def measure(config, steps):
    device = pick_device(config.train.device)
    dtype = getattr(torch, pick_dtype(config.train.dtype, device))
    torch.manual_seed(config.train.seed)
    config = dataclasses.replace(config, model=dataclasses.replace(
        config.model, vocab_size=config.model.vocab_size or config.tokenizer.vocab_size))
    model = GPT(config.model).to(device)
    objective = make_objective(config, Tokenizer("bytes"))
    optimizers = make_optimizers(model, config.optim)
    B, T = config.train.batch_size, config.model.context_length
    random = np.random.default_rng(0)
    times = {"forward": [], "backward": [], "optimizer": [], "step": []}
    for step in range(3 + steps):
        rows = random.integers(FIRST_BYTE, config.model.vocab_size, (B, T + objective.extra))
        batch = objective.batch(rows, step * B).to(device)
        marks = [now(device)]
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            loss = sum(objective.losses(model, batch).values()) / (B * T)
        marks.append(now(device))
        loss.backward()
        marks.append(now(device))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        marks.append(now(device))
        if step >= 3:
            for phase, seconds in zip(times, [b - a for a, b in zip(marks, marks[1:])] + [marks[-1] - marks[0]]):
                times[phase].append(seconds)
    medians = {phase: statistics.median(seconds) for phase, seconds in times.items()}
    tokens_per_second = B * T / medians["step"]
    return {
        "benchmark": "training", "date": datetime.date.today().isoformat(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch."),
        "parameters": model.num_parameters, "batch_size": B, "context_length": T,
        **{f"{phase}_ms": round(1e3 * seconds, 2) for phase, seconds in medians.items()},
        "tokens_per_second": round(tokens_per_second, 1),
        "gflops_per_second": round(tokens_per_second * model.flops_per_token() / 1e9, 1),
    }


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
