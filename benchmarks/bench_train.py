"""Speed and memory of a whole training step, as the training loop takes it:

    python -m benchmarks.bench_train [CONFIG] [--section.key=value ...] [--device cuda] [--paths triton] [--repeats 100]
        [--peer nanogpt=PATH] [--profile] [--json FILE] [--plot FILE]

Random tokens through the recipe's model, loss, clipping and optimizers (on a GPU one micro-batch of configs/gpt2.toml,
on a CPU configs/quickstart.toml): on the Triton kernels (triton), with the model compiled around them
(triton_compiled), on the PyTorch reference (reference), in plain PyTorch with all logits at once (plain), torch.compile
of that (compiled), and nanoGPT's model and optimizer at the same shape (nanogpt, nanogpt_compiled). MFU is of the data
sheet's dense 16-bit peak. --profile prints the step on the Triton kernels by groups of them instead, beside the least
time that each needs; without a GPU, that of an H100 and no other. The last line is one JSON object.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import io
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import kernels
from benchmarks import harness, report, roofline, timing
from kernels import dispatch
from minigpt.config import Config, load_config
from minigpt.device import peak_flops
from minigpt.model import GPT
from minigpt.objectives import CausalLM, CompiledHidden
from minigpt.optim import make_optimizers
from minigpt.tokenizer import FIRST_BYTE, Tokenizer
from minigpt.update import add_gradients, apply_gradients

RECIPES = {"cuda": ["configs/gpt2.toml", "--train.accumulation_steps=1"], "cpu": ["configs/quickstart.toml"]}
"""What is measured where no CONFIG is given."""
WARM_UP, PROFILED = 3, 5
"""Steps."""
MOST_SECONDS, LEAST_REPEATS = 10.0, 5
"""Steps so slow that all repeats would take longer than this are repeated less often, but this often."""
BATCHES = 4
"""Different ones, taken in turn."""
LOGIT_BYTES = 12
"""For each logit that plain PyTorch holds at a time: in bfloat16, in float32, and a gradient."""


def main(arguments: list[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    overrides = [word for word in words if re.match(r"--\w+\.", word)]
    parser = harness.parser(__doc__)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a recipe (TOML)")
    parser.add_argument("--profile", action="store_true", help="the step by groups of kernels")
    if "--profile" in words:
        parser.set_defaults(dtype="bfloat16")           # in which floors are known without a GPU
    options = harness.parse(parser, [word for word in words if word not in overrides])
    recipe = [options.config] if options.config else RECIPES["cuda" if options.profile else options.device.type]
    paths = available(options)
    try:
        config = read_config(recipe[0], recipe[1:] + overrides)
        harness.save(options.json, {})
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.profile and options.device.type == "cpu" and options.dtype != torch.bfloat16:
        parser.error("--profile without a GPU: floors are known for bfloat16 alone; leave --dtype out")
    if options.profile and (options.paths or options.plot):
        parser.error("--profile is of the path triton, and no plot; leave --paths and --plot out")
    if unknown := set(options.paths or ()) - paths.keys():
        parser.error(f"no path {', '.join(sorted(unknown))} here; there is: {', '.join(paths)}")
    shape = {"recipe": recipe[0], "parameters": empty_model(config).num_parameters, "batch": config.train.batch_size,
             "length": config.model.context_length, "accumulation": config.train.accumulation_steps}
    result = {"benchmark": "train", **harness.machine(options.device),
              "dtype": str(options.dtype).removeprefix("torch."), **shape}
    print(", ".join([result["dtype"], *(f"{name} {value}" for name, value in shape.items())]))
    if options.profile:
        result |= {"benchmark": "train_profile", **profile(config, options)}
    else:
        result |= {"rate": "tokens_per_s", "labels": ["batch", "length"], "complete": False, "results": []}
        compare({name: paths[name] for name in options.paths or paths}, config, options, result)
    harness.save(options.json, result)
    print(json.dumps(result))
    if all("error" in row for row in result.get("results", [{}])):
        sys.exit(1)


def read_config(file: str, overrides: list[str]) -> Config:
    """The recipe with the vocabulary that its tokenizer is to have."""
    config = load_config(file, overrides)
    if config.objective.name != "causal":
        raise ValueError(f"objective.name = {config.objective.name!r}: what is measured here is causal; leave it out")
    if config.data.document_mask:
        raise ValueError("data.document_mask = true: not all paths can hide documents; leave it out")
    vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
    if vocab_size <= FIRST_BYTE:
        raise ValueError(f"model.vocab_size = {vocab_size} is too small; make it more than {FIRST_BYTE}")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def empty_model(config) -> GPT:
    """Without memory, to be counted."""
    with torch.device("meta"):
        return GPT(config.model, initial=False)


def compare(paths, config, options, result) -> None:
    """Measure the paths one after the other, each alone in memory, into result["results"]."""
    print(f"{'path':>17}{'median ms':>11}{'p10':>10}{'p90':>10}{'tokens/s':>12}{'MFU':>8}{'peak MiB':>10}{'loss':>9}")
    for name, path in paths.items():
        row = {"direction": "step", "batch": result["batch"], "length": result["length"], "path": name}
        row |= figures(path, config, options)
        result["results"].append(row)
        print(f"{name:>17}{shown(row)}", flush=True)
        harness.save(options.json, result)
    result["complete"] = True
    if options.plot:
        report.draw(result, options.plot)


def figures(path, config, options) -> dict:
    """Of a path: times in ms, tokens per second, MFU, peak memory and the first loss, or the error."""
    try:
        return measured(path, config, options)
    except Exception as error:                          # what one path raises must not cost the others' figures
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
    finally:
        torch._dynamo.reset()


def measured(path, config, options) -> dict:
    device, on_gpu = options.device, options.device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
    torch.manual_seed(config.train.seed)
    step, steps = path(config, device, options.dtype), batches(config)
    first_loss = step(steps[0])
    for number in range(WARM_UP):
        step(steps[number % BATCHES])
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    while len(times) < options.repeats and (len(times) < LEAST_REPEATS or sum(times) < MOST_SECONDS):
        synchronize(device)
        began = time.perf_counter()
        step(steps[len(times) % BATCHES])
        synchronize(device)
        times.append(time.perf_counter() - began)
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    median = statistics.median(times)
    speed = config.train.batch_size * config.train.accumulation_steps * config.model.context_length / median
    found = {"median_ms": median * 1e3, "p10_ms": tenths[0] * 1e3, "p90_ms": tenths[-1] * 1e3, "tokens_per_s": speed}
    if peak := peak_flops(device):
        found["mfu"] = speed * empty_model(config).flops_per_token() / peak
    return {name: float(f"{value:.5g}") for name, value in found.items()} | {
        "peak_bytes": torch.cuda.max_memory_allocated(device) - before if on_gpu else None,
        "first_loss": round(first_loss, 4), "repeats": len(times)}


def shown(row) -> str:
    if "error" in row:
        return f"  {row['error']}"
    mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    return (f"{row['median_ms']:11.2f}{row['p10_ms']:10.2f}{row['p90_ms']:10.2f}{row['tokens_per_s']:12,.0f}{mfu:>8}"
            f"{peak:>10}{row['first_loss']:9.4f}")


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batches(config) -> list[list]:
    """Of random tokens: BATCHES steps, each a list of micro-batches."""
    objective, random = CausalLM(config, Tokenizer("bytes")), np.random.default_rng(0)
    shape = (config.train.batch_size, config.model.context_length + objective.extra)

    def batch():
        return objective.batch(random.integers(FIRST_BYTE, config.model.vocab_size, shape), 0)
    return [[batch() for _ in range(config.train.accumulation_steps)] for _ in range(BATCHES)]


def available(options) -> dict[str, Callable]:
    """The paths that are there; each makes of (config, device, dtype) a function that takes a step on micro-batches."""
    paths = {}
    if not dispatch.obstacle(options.device.type):
        paths |= {"triton": Own("triton"), "triton_compiled": Own("triton", compiled=True)}
    paths |= {"reference": Own("reference"), "plain": Own("reference", AllLogits),
              "compiled": Own("reference", AllLogits, compiled=True)}
    if any(peer.startswith("nanogpt=") for peer in options.peer):
        paths |= {"nanogpt": nanogpt, "nanogpt_compiled": functools.partial(nanogpt, compiled=True)}
    return paths


class AllLogits(CausalLM):
    """The loss that a function of inputs and targets gives."""

    def losses(self, loss, batch, found=None):
        return {"causal": loss(batch.inputs, batch.targets)}


@dataclass(frozen=True)
class Own:
    """This project's model, loss and optimizers on a choice of kernels."""

    kernels: str
    all_logits: bool = False
    """In plain PyTorch, at once."""
    compiled: bool = False

    def __call__(self, config, device, dtype):
        model = GPT(config.model)
        if device.type != "cpu":                        # where it may be one without memory, which cannot be moved
            model = model.to(device)
        optimizers = make_optimizers(model, config.optim)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype is not torch.float32)
        objective = (AllLogits if self.all_logits else CausalLM)(config, Tokenizer("bytes"))
        forward = self.forward(model, config, device)

        def step(micro_batches, within=torch.profiler.record_function):
            with kernels.use(self.kernels):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                losses = add_gradients(forward, objective, micro_batches, scaler, autocast, device)
                with within(roofline.UPDATE):
                    apply_gradients(losses, optimizers, scaler, config.optim.grad_clip)
            return losses["train_loss"]
        return step

    def forward(self, model, config, device):
        """What the objective computes its losses with."""
        if not self.all_logits:
            return CompiledHidden(model) if self.compiled else model
        logits = config.train.batch_size * config.model.context_length * config.model.vocab_size
        timing.check_memory("the logits", LOGIT_BYTES * logits, device)

        def loss(inputs, targets):
            return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
        return torch.compile(loss) if self.compiled else loss


def not_nanogpts(config) -> list[str]:
    """What nanoGPT's model and training have otherwise."""
    model = config.model
    its_own = {
        "model.mlp": (model.mlp, "gelu"), "model.norm": (model.norm, "layer_norm"),
        "model.norm_position": (model.norm_position, "pre"), "model.position": (model.position, "learned"),
        "model.qk_norm": (model.qk_norm, False), "model.tied_embeddings": (model.tied_embeddings, True),
        "model.num_kv_heads": (model.H_kv, model.num_heads), "model.window": (model.window, 0),
        "model.head_size": (model.D, model.width // model.num_heads),
        "model.mlp_width": (model.mlp_width or 4 * model.width, 4 * model.width),
        "model.qkv_bias": (model.qkv_bias in (None, model.bias), True), "optim.name": (config.optim.name, "adamw")}
    return [key for key, (here, there) in its_own.items() if here != there]


def nanogpt(config, device, dtype, compiled=False):
    """nanoGPT's model and optimizer at the shape of the recipe, in a step as that of its training script."""
    if differ := not_nanogpts(config):
        raise ValueError(f"nanoGPT has another {', '.join(differ)}; take a recipe of GPT-2's kind")
    peer, shape, optim = importlib.import_module(harness.PEERS["nanogpt"]), config.model, config.optim
    with contextlib.redirect_stdout(io.StringIO()):     # it prints what it makes
        model = peer.GPT(peer.GPTConfig(
            block_size=shape.context_length, vocab_size=shape.vocab_size, n_layer=shape.depth, n_head=shape.num_heads,
            n_embd=shape.width, dropout=shape.dropout, bias=shape.bias)).to(device)
        optimizer = model.configure_optimizers(optim.weight_decay, optim.learning_rate, (optim.beta1, optim.beta2),
                                               device.type)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    forward = torch.compile(model) if compiled else model

    def step(micro_batches):
        total = 0.0
        for batch in micro_batches:
            batch = batch.to(device)
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                loss = forward(batch.inputs, batch.targets)[1] / len(micro_batches)
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return float(total)
    return step


def profile(config, options) -> dict:
    """Print the table of groups; they, the rates that floors are counted with, and the seconds of a measured step."""
    on_gpu = options.device.type == "cuda"
    rates = roofline.H100
    if on_gpu:
        rates = tuple(find(options.device, options.dtype)
                      for find in (timing.copy_bytes_per_second, timing.matmul_flops_per_second))
    steps, path = batches(config), Own("triton")

    def make():
        return functools.partial(path(config, torch.device("cpu"), options.dtype), steps[0])

    groups, seconds = roofline.count(make, rates), None
    if on_gpu:
        step = path(config, options.device, options.dtype)
        for number in range(WARM_UP):
            step(steps[number])
        synchronize(options.device)
        began = time.perf_counter()
        for number in range(PROFILED):
            step(steps[number % BATCHES])
        synchronize(options.device)
        seconds = (time.perf_counter() - began) / PROFILED
        with torch.profiler.profile() as profiler:
            for number in range(PROFILED):
                step(steps[number % BATCHES])
            synchronize(options.device)
        roofline.measure(profiler.events(), groups, PROFILED, roofline.on_gpu)
    print(f"floors at {rates[0] / 1e12:.4g} TB/s and {rates[1] / 1e12:.4g} TFLOP/s"
          + ("" if on_gpu else ", which an H100 reached; nothing was measured here"))
    print("\n".join(roofline.table(groups, seconds)))
    return {"tb_per_s": rates[0] / 1e12, "tflop_per_s": rates[1] / 1e12, "step_seconds": seconds,
            "groups": {name: dataclasses.asdict(group) for name, group in groups.items()}}


if __name__ == "__main__":
    main()
