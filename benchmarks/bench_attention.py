"""Speed of attention, forward and backward:

    python -m benchmarks.bench_attention [--device cuda] [--lengths 1024 8192] [--head-sizes 64] [--masks causal]
        [--paths triton sdpa_cudnn] [--json FILE] [--plot FILE]

The Triton kernels, with the deterministic backward (triton) and the one-pass one (triton_one_pass), against plain
PyTorch with all scores in memory (plain), torch.compile of that (compiled), PyTorch's own FlashAttention (sdpa_flash)
and cuDNN (sdpa_cudnn), and FlexAttention (flex). TFLOP/s count 4 B H T² D floating-point operations forward, half of
them with a causal mask, and 2.5 times as many backward, whatever a path computes. Queries, keys and values are views of
one fused projection, as in the model. The last line is one JSON object.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import formula, harness, timing

MASKS = ("causal", "full")
HEAD_SIZES, LENGTHS = (64, 128), (512, 1024, 2048, 4096, 8192, 16384)
TOKENS, WIDTH = 16384, 2048
"""Batch x length and heads x head size; on a CPU less:"""
CPU_HEAD_SIZES, CPU_LENGTHS, CPU_TOKENS, CPU_WIDTH = (64,), (256, 512), 512, 128
SCORES_AT_ONCE = 6
"""Tensors of scores that plain PyTorch holds at a time in its backward pass."""


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    parser.add_argument("--head-sizes", type=harness.positive, nargs="+")
    parser.add_argument("--lengths", type=harness.positive, nargs="+")
    parser.add_argument("--tokens", type=harness.positive, help=f"batch x length: {TOKENS} on a GPU, else {CPU_TOKENS}")
    parser.add_argument("--width", type=harness.positive, help=f"heads x head size: {WIDTH}, else {CPU_WIDTH}")
    options = harness.parse(parser, arguments)
    on_gpu = options.device.type == "cuda"
    tokens = options.tokens or (TOKENS if on_gpu else CPU_TOKENS)
    width = options.width or (WIDTH if on_gpu else CPU_WIDTH)
    lengths = options.lengths or (LENGTHS if on_gpu else CPU_LENGTHS)
    head_sizes = options.head_sizes or (HEAD_SIZES if on_gpu else CPU_HEAD_SIZES)
    for name, whole, parts in (("lengths", tokens, lengths), ("head-sizes", width, head_sizes)):
        if wrong := [part for part in parts if whole % part]:
            parser.error(f"--{name} {wrong[0]} does not divide {whole}")
    cases = [case(tokens // T, T, width // D, D, mask == "causal", options.dtype, options.device)
             for mask, D, T in itertools.product(options.masks, head_sizes, lengths)]
    harness.compare(parser, options, "attention", harness.MATMUL, available(options.device), cases,
                    {"tokens": tokens, "width": width})


def available(device) -> dict[str, harness.OpPath]:
    """The paths that are there for the device, functions of (q, k, v, causal)."""
    paths = {"triton": harness.triton_path("attention", device),
             "sdpa_flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION)}
    if device.type == "cuda":
        paths |= {"sdpa_cudnn": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION), "flex": flex()}
    paths = {name: harness.OpPath(call) for name, call in paths.items() if call}
    if "triton" in paths:
        one_pass = functools.partial(paths["triton"].call, deterministic=False)
        paths = {"triton": paths["triton"], "triton_one_pass": harness.OpPath(one_pass, ("backward",))} | paths
    return paths | {"compiled": harness.OpPath(timing.compiled(formula.attention), check=check_that_scores_fit),
                    "plain": harness.OpPath(formula.attention, check=check_that_scores_fit)}


def case(B, T, H, D, causal, dtype, device) -> harness.Case:
    flops = 4 * B * H * T**2 * D / (2 if causal else 1)
    sets = timing.rotations(4 * B * T * H * D * dtype.itemsize, device)
    return harness.Case({"mask": "causal" if causal else "full", "head_size": D, "length": T},
                        {"forward": flops, "backward": 2.5 * flops}, functools.partial(attend, causal),
                        functools.partial(inputs, B, T, H, D, dtype, device, sets))


def attend(causal, function, q, k, v):
    return function(q, k, v, causal=causal)


def inputs(B, T, H, D, dtype, device, num_sets):
    """q, k, v (B, T, H, D) as views of one tensor, and a gradient."""
    torch.manual_seed(0)
    fused = [torch.randn(B, T, 3 * H, D, dtype=dtype, device=device) for _ in range(num_sets)]
    sets = [[x.detach().requires_grad_() for x in qkv.split(H, dim=2)] for qkv in fused]
    return sets, [torch.randn(B, T, H, D, dtype=dtype, device=device)]


def sdpa(backend, q, k, v, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def flex():
    """FlexAttention, compiled; a causal mask is made once for a length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    run = timing.compiled(flex_attention)

    @functools.cache
    def block_mask(T, device):
        return create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)

    def attention(q, k, v, causal):
        mask = block_mask(q.shape[1], q.device) if causal else None
        return run(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)

    return attention


def check_that_scores_fit(q, k, v):
    """Raise MemoryError before the machine is out of memory."""
    B, T, H, _ = q.shape
    timing.check_memory("the scores", SCORES_AT_ONCE * B * H * T**2 * q.element_size(), q.device)


if __name__ == "__main__":
    main()
