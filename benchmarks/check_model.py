"""Checks of the kernels within a model: under torch.compile, and in a short training beside the reference."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from compare import assert_close, run_op

import kernels
from minigpt.config import ModelConfig
from minigpt.model import GPT
from minigpt.optim import AdamW

SHAPE = {"cuda": dict(context_length=256, depth=4, width=256, num_heads=4, vocab_size=512),
         "cpu": dict(context_length=16, depth=1, width=16, num_heads=2, vocab_size=32)}
BATCH, STEPS, LEARNING_RATE = {"cuda": 16, "cpu": 2}, {"cuda": 40, "cpu": 3}, {"cuda": 1e-3, "cpu": 1e-2}
MOST_APART = {"float32": 1e-3, "bfloat16": 1e-2}
"""By how much of the loss two curves may differ at any step."""
EPS = 1e-5


def compiled(device: str) -> dict:
    """A block that calls the ops compiles to one graph, and gives what it gives by itself."""
    def block(x, residual, weight, bias, projection):
        x, residual = kernels.layer_norm(x, weight, bias, EPS, residual)
        q, k, v = F.linear(x, projection).unflatten(-1, (-1, 16)).chunk(3, dim=2)
        return kernels.rms_norm(kernels.attention(q, k, v, causal=True).flatten(-2), weight, EPS, residual)

    def check(lengths):
        torch._dynamo.reset()
        run = torch.compile(block, fullgraph=True)
        for T in lengths:
            with torch.device(device):                  # which torch.compile cannot trace
                inputs = [torch.randn(shape) for shape in ((2, T, 32), (2, T, 32), (32,), (32,), (96, 32))]
                expected, expected_gradients, incoming = run_op(block, inputs)
            y, gradients, _ = run_op(run, inputs, incoming)
            for number, pair in enumerate(zip(y + gradients, expected + expected_gradients)):
                assert_close(*pair, 1e-4, f"length {T}, tensor {number}")

    return {f"lengths {lengths}": functools.partial(check, lengths) for lengths in ((64,), (64, 100, 36))}


def training(device: str) -> dict:
    """Models that begin alike and see the same batch have the same losses on the kernels and on the reference."""
    def check(norm, dtype):
        curves = {}
        for choice in ("reference", "triton"):
            with kernels.use(choice):
                curves[choice] = losses(device, norm, getattr(torch, dtype))
        apart = max(abs(a - b) / a for a, b in zip(curves["reference"], curves["triton"]))
        assert apart <= MOST_APART[dtype], f"{apart:.2%} of the loss apart; {MOST_APART[dtype]:.2%} is allowed"
        assert curves["triton"][-1] < curves["triton"][0], "nothing was learnt"
        return {"most_apart": apart, "losses": curves}

    return {f"{norm}, {dtype}": functools.partial(check, norm, dtype)
            for norm in ("rms_norm", "layer_norm") for dtype in MOST_APART}


def losses(device, norm, dtype):
    """Of each step of a training on one batch: counting modulo the vocabulary, by strides of 1 to 4."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SHAPE[device], norm=norm, bias=True)).to(device)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE[device])
    T, V = model.config.context_length, model.config.vocab_size
    first, stride = torch.randint(0, V, (BATCH[device], 1)), torch.randint(1, 5, (BATCH[device], 1))
    tokens = ((first + stride * torch.arange(T + 1)) % V).to(device)                # (B, T + 1)
    curve = []
    for _ in range(STEPS[device]):
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            loss = kernels.linear_cross_entropy(model.hidden(tokens[:, :-1]), model.head.weight, tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve).tolist()


CHECKS = {"compiled": compiled, "training": training}
