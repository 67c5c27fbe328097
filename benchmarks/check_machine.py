"""Checks of what depends on the machine: descriptors, bit-equal repeats, and offsets beyond 32 bits."""

from __future__ import annotations

import functools

import torch
from compare import assert_close, run_op

import kernels

LENGTH, WIDTHS = {"cuda": 2000, "cpu": 37}, {"cuda": (64, 1000), "cpu": (24,)}
HUGE = {"cuda": 1 << 31, "cpu": 1 << 13}
"""Elements that 32-bit offsets do not reach; a CPU tries the same with fewer."""
EPS = 1e-5


def descriptors(device: str) -> dict:
    """A copy through tensor descriptors (TMA), made by the host and by the kernel, with a rim that no tile covers."""
    def copy(made_by):
        from benchmarks import descriptors

        x = torch.randn(200, 136, device=device).half()
        assert torch.equal(descriptors.copy(x, made_by), x), "the copy differs"

    return {f"made by the {place}": functools.partial(copy, place) for place in ("host", "device")}


def repeats(device: str) -> dict:
    """Two runs of forward and backward give the same bits."""
    T = LENGTH[device]

    def attention(x, **options):
        return kernels.attention(*x.unflatten(-1, (-1, 64)).split([4, 2, 2], dim=2), **options)

    def twice(op, *shapes):
        inputs = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
        with torch.device(device):                      # on which incoming gradients are drawn
            outputs, gradients, incoming = run_op(op, inputs)
        again, gradients_again, _ = run_op(op, inputs, incoming)
        assert all(map(torch.equal, outputs + gradients, again + gradients_again)), "the bits differ"

    fused = (2, T, 8 * 64)
    cases = {f"attention {options}": functools.partial(twice, functools.partial(attention, **options), fused)
             for options in (dict(causal=True), dict(causal=False), dict(causal=True, dropout_p=0.1, seed=1))}
    for width in WIDTHS[device]:
        rows = (8 * T, width)
        cases |= {
            f"layer_norm {width}": functools.partial(
                twice, lambda x, r, w, b: kernels.layer_norm(x, w, b, EPS, r), rows, rows, (width,), (width,)),
            f"rms_norm {width}": functools.partial(
                twice, lambda x, r, w: kernels.rms_norm(x, w, EPS, r), rows, rows, (width,)),
        }
    return cases


def offsets(device: str) -> dict:
    """The last part of huge tensors comes out as it does by itself."""
    huge = HUGE[device]

    def norm(op):
        width = 1024 if device == "cuda" else 64
        needs(device, 5 * 2 * huge)
        last_alone(op, [torch.randn(huge // width + 3, width, dtype=torch.bfloat16, device=device)], 3)

    def attention(**options):
        T, H, D = (128, 16, 128) if device == "cuda" else (16, 2, 16)
        needs(device, 9 * 2 * huge)
        fused = torch.randn(huge // (T * H * D) + 1, T, 3 * H, D, dtype=torch.bfloat16, device=device)
        last_alone(functools.partial(kernels.attention, causal=True, **options), fused.split(H, dim=2), 1)

    def far_rows():
        T, H, D = (64, 2, 64) if device == "cuda" else (16, 1, 16)
        needs(device, 2 * 2 * huge)
        apart = huge // (T - 1)
        buffer = torch.empty(apart * T, dtype=torch.bfloat16, device=device)
        far = [buffer.as_strided((1, T, H, D), (1, apart, D, 1), part * H * D) for part in range(3)]
        packed = [x.normal_().contiguous() for x in far]
        op = functools.partial(kernels.attention, causal=True)
        with torch.device(device):
            y, gradients, incoming = run_op(op, far)
        expected, expected_gradients, _ = run_op(op, packed, incoming)
        for number, pair in enumerate(zip(y + gradients, expected + expected_gradients)):
            assert_close(*pair, 0.02, f"tensor {number}")

    return {
        "rms_norm": lambda: norm(lambda x: kernels.rms_norm(x, None, EPS)),
        "layer_norm": lambda: norm(lambda x: kernels.layer_norm(x, None, None, EPS)),
        "attention, rows far apart": far_rows,
        "attention": attention,
        "attention, one pass": functools.partial(attention, deterministic=False),
    }


def last_alone(op, tensors, count):
    """The last `count` items of op(*tensors), and of its gradients, are those of the op on the last items alone."""
    def outputs(tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        y = op(*tensors)
        return y.detach(), *torch.autograd.grad(y, tensors, tensors[0].detach())

    expected = outputs([x[-count:] for x in tensors])
    for number, pair in enumerate(zip(outputs(tensors), expected)):
        assert_close(pair[0][-count:], pair[1], 0.02, f"tensor {number}")


def needs(device, num_bytes):
    """Raise MemoryError where the GPU has less."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else num_bytes
    if free < num_bytes:
        raise MemoryError(f"needs {num_bytes / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free")


CHECKS = {"descriptors": descriptors, "repeats": repeats, "offsets": offsets}
