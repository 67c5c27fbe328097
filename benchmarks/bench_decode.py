"""How fast texts are drawn: the engine beside transformers' `generate` and nanoGPT's sampler, on the same weights.

    python -m benchmarks.bench_decode [--dtypes float32 bfloat16] [--prompts 32 512] [--batches 1 16] [--repeats 5]
        [--new-tokens 64] [--shape gpt2|toy] [--peer nanogpt=FOLDER] [--json FILE]

Random weights of GPT-2 124M, greedy, no end token. Each repeat draws the same texts by every path in turn, in another
order each time; given are medians of tokens per second, ratios to transformers', and how many tokens are those of the
first path. A toy model, of one layer, width 64 and 256 tokens, shows what Python costs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks import harness
from minigpt.config import GPT2, ModelConfig, SamplingParams
from minigpt.engine import Engine
from minigpt.families import FAMILIES
from minigpt.model import GPT
from minigpt.tokenizer import Roles

SHAPES = {"gpt2": dict(depth=12, width=768, num_heads=12), "toy": dict(depth=1, width=64, num_heads=1, vocab_size=256)}
PATHS = ("engine", "engine_invariant", "engine_lookup", "transformers", "nanogpt")


class EveryToken:
    """Stands for a tokenizer: no id is special, and none ends a text."""

    def __init__(self, vocab_size):
        self.never_sampled = torch.zeros(vocab_size, dtype=torch.bool).numpy()
        self.roles = Roles(end_tokens=())


def engine_path(model, slots, **options):
    engine = Engine(model, EveryToken(model.config.vocab_size), slots=slots, **options)

    def draw(prompts, count):
        params = SamplingParams(temperature=0.0, max_new_tokens=count)
        for slot in engine.left:
            engine.left[slot] = []                      # nothing is kept from one repeat to the next
        requests = [engine.submit(prompt, params) for prompt in prompts.tolist()]
        while engine.step():
            pass
        return torch.tensor([request.drawn for request in requests])
    return draw


def transformers_path(model):
    import transformers

    transformers.logging.set_verbosity_error()
    config = FAMILIES["gpt2"].config(model.config) | dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval().to(model.dtype)
    load(theirs, model, FAMILIES["gpt2"].pairs(model.config))
    return lambda prompts, count: theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=count,
        pad_token_id=0)[:, prompts.shape[1]:]


def nanogpt_path(model, folder):
    from minigpt.families import NANOGPT

    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder, "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = model.config
    theirs = module.GPT(module.GPTConfig(
        block_size=config.context_length, vocab_size=config.vocab_size, n_layer=config.depth, n_head=config.num_heads,
        n_embd=config.width, dropout=0.0, bias=True)).eval().to(model.dtype)
    load(theirs, model, NANOGPT.pairs(config))
    return lambda prompts, count: theirs.generate(prompts, count, top_k=1)[:, prompts.shape[1]:]


@torch.no_grad()
def load(theirs, ours, pairs):
    tensors = dict(theirs.named_parameters())
    for pair in pairs:
        for name, tensor in zip(pair.theirs, pair.parted(ours.get_parameter(pair.ours)), strict=True):
            tensors[name].copy_(tensor)


def measure(paths: dict, prompts: torch.Tensor, count: int, repeats: int) -> dict[str, dict]:
    """For each path the seconds of every repeat, and whether its texts are those of the first path."""
    seconds, texts = {name: [] for name in paths}, {}
    for repeat in range(repeats + 1):                   # the first warms up
        for name in list(paths)[::-1 if repeat % 2 else 1]:
            began = time.perf_counter()
            texts[name] = paths[name](prompts, count)
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    first = next(iter(texts.values()))
    return {name: {"tokens_per_second": first.numel() / statistics.median(times),
                   "same_tokens": (texts[name] == first).double().mean().item()} for name, times in seconds.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How fast texts are drawn.")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 512], help="their lengths")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", default="gpt2", choices=SHAPES)
    parser.add_argument("--paths", nargs="+", default=PATHS[:4], choices=PATHS[:4])
    parser.add_argument("--peer", help="nanogpt=FOLDER, which holds nanoGPT's model.py")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args(argv)
    name, _, folder = (arguments.peer or "").partition("=")
    if arguments.peer and (name != "nanogpt" or not Path(folder, "model.py").is_file()):
        sys.exit(f"error: --peer {arguments.peer}: give nanogpt=FOLDER, a folder that holds model.py")

    result = {"benchmark": "decode", **harness.machine(torch.device("cpu")),
              "capability": torch.backends.cpu.get_cpu_capability(), "shape": arguments.shape,
              "new_tokens": arguments.new_tokens, "rows": []}
    print(f"{'dtype':>9} {'batch':>5} {'prompt':>6} {'path':>17} {'tokens/s':>9} {'ratio':>6} {'same':>6}")
    for dtype in arguments.dtypes:
        torch.manual_seed(0)
        model = GPT(ModelConfig(**GPT2 | SHAPES[arguments.shape])).eval().to(getattr(torch, dtype))
        for batch in arguments.batches:
            made = {"engine": partial(engine_path, model, batch), "transformers": partial(transformers_path, model),
                    "engine_invariant": partial(engine_path, model, 16, invariant=True),
                    "engine_lookup": partial(engine_path, model, batch, lookup=8)}
            paths = {name: made[name]() for name in arguments.paths}
            if folder:
                paths["nanogpt"] = nanogpt_path(model, folder)
            for length in arguments.prompts:
                prompts = torch.randint(0, model.config.vocab_size, (batch, length),
                                        generator=torch.Generator().manual_seed(1))
                rows = measure(paths, prompts, arguments.new_tokens, arguments.repeats)
                base = rows.get("transformers", next(iter(rows.values())))["tokens_per_second"]
                for path, row in rows.items():
                    row = {"dtype": dtype, "batch": batch, "prompt": length, "path": path, **row,
                           "ratio": row["tokens_per_second"] / base}
                    result["rows"].append(row)
                    print(f"{dtype:>9} {batch:5} {length:6} {path:>17} {row['tokens_per_second']:9.1f} "
                          f"{row['ratio']:6.2f} {row['same_tokens']:6.2f}", flush=True)
    harness.save(arguments.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
