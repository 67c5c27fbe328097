"""`minigpt quantize`: a checkpoint whose linear layers and embedding hold whole numbers, and what that costs and gains.

Weights are rounded to the nearest of 8 or 4 bits times a scale (`kernels.reference.quantize`): with 8 a scale a row,
with 4 one for each 64 numbers. Embedding and head take 8 bits always.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from minigpt import checkpoint
from minigpt.config import SamplingParams
from minigpt.engine import Run, load
from minigpt.hf import check_free, new_directory
from minigpt.linear import Quantized
from minigpt.model import GPT
from minigpt.scores import measured_on, must_be_causal, score_documents

TOKENS, REPEATS = 64, 3
"""Drawn at a time, and how often, to measure the speed."""


def quantized(model: GPT, bits: int) -> GPT:
    """A model with the weights of `model` rounded to 8 or 4 bits; the others are copies."""
    with torch.device(model.device):
        made = GPT(dataclasses.replace(model.config, weight_bits=bits), initial=False).eval()
    with torch.no_grad():
        rounded = {name for name, module in made.named_modules() if isinstance(module, Quantized)}
        for name in rounded:
            made.get_submodule(name).fill(model.get_submodule(name).weight)
        for name, parameter in made.named_parameters():
            if name.rpartition(".")[0] not in rounded or name.endswith(".bias"):
                parameter.copy_(model.get_parameter(name))
    return made


def quantize(source: Path, out: Path, bits: int, texts: list[str], device: str | None = None) -> list[dict]:
    """Write the checkpoint `out`, whole or not at all; gives a row for `source` and one for `out`.

    Each has `weights`, `bytes` that these take, `bits_per_byte` and `tokens_per_second` of one text at a time.
    ValueError for a model that is quantized already, or is not causal, and where there is no text to measure on.
    """
    check_free(out)
    before = load(source, device)
    must_be_causal(before)
    if before.model.config.weight_bits:
        raise ValueError(f"{source}: has {before.model.config.weight_bits} bits already; quantize what it was made "
                         "from")
    documents = measured_on(before, texts)
    made = quantized(before.model, bits)
    config = dataclasses.replace(before.config, model=made.config)
    after = Run(made, before.tokenizer, config, out)
    rows = [_row("float32", before, documents), _row(f"{bits} bits", after, documents)]
    for run, row in zip((before, after), rows):
        row["tokens_per_second"] = _speed(run)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in checkpoint.model_tensors(made).items()}
    with new_directory(out) as unfinished:
        checkpoint.write(unfinished, {"model.safetensors": partial(save_file, tensors),
                                      "optimizer.safetensors": partial(save_file, {})},
                         {"quantized": {"bits": bits, "from": str(before.path)}}, config, before.tokenizer)
    return rows


def _row(name, run, documents):
    size = sum(tensor.nbytes for tensor in checkpoint.model_tensors(run.model).values())
    return {"weights": name, "bytes": size, "bits_per_byte": score_documents(run, documents)[-1]["bits_per_byte"]}


def _speed(run):
    run.engine.ends, seconds = frozenset(), []
    count = min(TOKENS, run.engine.length - 1)
    for _ in range(1 + REPEATS):                        # the first warms up
        request = run.engine.submit(run.encode_prompt(None), SamplingParams(temperature=0.0, max_new_tokens=count))
        began = time.perf_counter()
        while run.engine.step():
            pass
        seconds.append(time.perf_counter() - began)
        if request.error:
            raise request.error
    return count / statistics.median(seconds[1:])
