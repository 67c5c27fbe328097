"""How fast texts are drawn: the engine beside transformers' `generate` and nanoGPT's sampler, on the same weights.

    python -m benchmarks.bench_decode [--dtypes float32 bfloat16 int8 int4] [--prompts 32 512] [--batches 1 16]
        [--repeats 5] [--new-tokens 64] [--shape gpt2|toy|1b] [--device cpu] [--peer nanogpt=FOLDER]
        [--json FILE]

Random weights of GPT-2 124M, greedy, no end token. Each repeat draws the same texts by every path in turn, in another
order each time; given are medians of tokens per second, ratios to transformers', and how many tokens are those of the
dtype's first path. A toy model, of one layer, width 64 and 256 tokens, shows what Python costs.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks import harness
from minigpt.checkpoint import model_tensors
from minigpt.cli import Parser
from minigpt.config import GPT2, ModelConfig, SamplingParams
from minigpt.engine import Engine
from minigpt.families import family_for
from minigpt.model import GPT
from minigpt.quantize import quantized
from minigpt.tokenizer import Roles

SHAPES = {"gpt2": GPT2 | dict(depth=12, width=768, num_heads=12),
          "toy": GPT2 | dict(depth=1, width=64, num_heads=1, vocab_size=256),
          "1b": dict(vocab_size=128256, context_length=4096, depth=16, width=2048, num_heads=32, num_kv_heads=8,
                     mlp="swiglu", mlp_width=8192, qk_norm=False, rope_base=500000.0)}
"""The last is that of Llama 3.2 1B."""
DTYPES = {"float32": lambda model: model, "bfloat16": lambda model: copy.deepcopy(model).to(torch.bfloat16),
          "int8": partial(quantized, bits=8), "int4": partial(quantized, bits=4)}
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
    kind, family = family_for(model.config, "causal")
    config = family.config(model.config) | dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.device(model.device):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **config))
    theirs = theirs.eval().to(model.dtype)
    load(theirs, model, family.pairs(model.config))
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
        n_embd=config.width, dropout=0.0, bias=True)).eval().to(model.device, model.dtype)
    load(theirs, model, NANOGPT.pairs(config))
    return lambda prompts, count: theirs.generate(prompts, count, top_k=1)[:, prompts.shape[1]:]


@torch.no_grad()
def load(theirs, ours, pairs):
    tensors = dict(theirs.named_parameters())
    for pair in pairs:
        for name, tensor in zip(pair.theirs, pair.parted(ours.get_parameter(pair.ours)), strict=True):
            tensors[name].copy_(tensor)


def measure(paths: dict, prompts: torch.Tensor, count: int, repeats: int) -> dict:
    """For each path the median of tokens per second, and the texts."""
    seconds, texts = {path: [] for path in paths}, {}
    for repeat in range(repeats + 1):                   # the first warms up
        for path in list(paths)[::-1 if repeat % 2 else 1]:
            began = time.perf_counter()
            texts[path] = paths[path](prompts, count).cpu()
            if repeat:
                seconds[path].append(time.perf_counter() - began)
    return {path: (texts[path].numel() / statistics.median(times), texts[path]) for path, times in seconds.items()}


def rows_of(found: dict, size_of: dict[str, int]) -> list[dict]:
    """Of each (dtype, path) its speed, the ratio to transformers', how many tokens are those of the dtype's first, and
    how fast weights, `size_of` their dtype, are read where each pass reads all of them and gives a token a text.

    8 and 4 bits, which transformers alone does not do, are set beside its bfloat16, or else its float32.
    """
    rows, base = [], {}
    for (dtype, path), (speed, _) in found.items():
        if path == "transformers":
            base[dtype] = speed
    for (dtype, path), (speed, texts) in found.items():
        beside = base.get(dtype, base.get("bfloat16", base.get("float32")))
        first = next(other for (kind, _), (_, other) in found.items() if kind == dtype)
        rows.append({"dtype": dtype, "path": path, "tokens_per_second": speed, "ratio": beside and speed / beside,
                     "same_tokens": (texts == first).double().mean().item(),
                     "weight_bytes_per_second": speed / len(texts) * size_of[dtype]})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench_decode", description="How fast texts are drawn.")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--prompts", type=harness.positive, nargs="+", default=[32, 512], help="their lengths")
    parser.add_argument("--batches", type=harness.positive, nargs="+", default=[1, 16])
    parser.add_argument("--new-tokens", type=harness.positive, default=64)
    parser.add_argument("--repeats", type=harness.positive, default=5)
    parser.add_argument("--shape", default="gpt2", choices=SHAPES)
    parser.add_argument("--paths", nargs="+", default=PATHS[:4], choices=PATHS[:4])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    harness.add_peers(parser)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args(argv)
    harness.check_device(parser, arguments.device)
    harness.check_file(parser, "json", arguments.json)
    if arguments.paths == ["transformers"] and not {"float32", "bfloat16"} & set(arguments.dtypes):
        parser.error("transformers draws nothing in 8 or 4 bits; take other --dtypes or --paths")
    folders = {peer.partition("=")[0]: harness.folder_of_peer(parser, peer) for peer in arguments.peer}
    nanogpt = folders.get("nanogpt")

    result = {"benchmark": "decode", **harness.machine(torch.device(arguments.device)),
              "capability": torch.backends.cpu.get_cpu_capability(), "shape": arguments.shape,
              "new_tokens": arguments.new_tokens, "rows": []}
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = GPT(ModelConfig(**SHAPES[arguments.shape])).eval()
    models = {dtype: DTYPES[dtype](model) for dtype in arguments.dtypes}
    size_of = {dtype: sum(tensor.nbytes for tensor in model_tensors(made).values()) for dtype, made in models.items()}
    print(f"{'batch':>5} {'prompt':>6} {'dtype':>9} {'path':>17} {'tokens/s':>9} {'ratio':>6} {'same':>6} {'GB/s':>6}")
    for batch in arguments.batches:
        paths = {}
        for dtype, made in models.items():
            makers = {"engine": partial(engine_path, made, batch), "transformers": partial(transformers_path, made),
                      "engine_invariant": partial(engine_path, made, batch, invariant=True),
                      "engine_lookup": partial(engine_path, made, batch, lookup=8)}
            if made.config.weight_bits:
                del makers["transformers"]
            elif nanogpt:
                makers["nanogpt"] = partial(nanogpt_path, made, nanogpt)
            paths |= {(dtype, path): maker() for path, maker in makers.items()
                      if path in arguments.paths or path == "nanogpt"}
        for length in arguments.prompts:
            prompts = torch.randint(0, model.config.vocab_size, (batch, length),
                                    generator=torch.Generator().manual_seed(1)).to(arguments.device)
            for row in rows_of(measure(paths, prompts, arguments.new_tokens, arguments.repeats), size_of):
                result["rows"].append({"batch": batch, "prompt": length} | row)
                ratio = f"{row['ratio']:6.2f}" if row["ratio"] else f"{'-':>6}"
                print(f"{batch:5} {length:6} {row['dtype']:>9} {row['path']:>17} {row['tokens_per_second']:9.1f} "
                      f"{ratio} {row['same_tokens']:6.2f} {row['weight_bytes_per_second'] / 1e9:6.1f}", flush=True)
    harness.save(arguments.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
