"""Fused attention in Triton: its tiles, its launches, and its torch.library ops with their gradients.

The kernels themselves are in `kernels.flash_attention`.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels import flash_attention
from kernels.common import MOST_REGISTERS, Launch, next_power_of_2, with_rows
from kernels.reference import check_attention

MAX_HEAD_SIZE = 256
MAX_LENGTH = 1 << 30
"""Of queries or keys: counters of rows have 32 bits."""
LSE_ALIGNMENT = 16
"""Numbers that a row of lse or delta begins at a multiple of, so that whole vectors of them are loaded for any T."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """Of the kernels for one kind of GPU, of numbers and of heads; each queries, keys, warps, stages."""

    plain: tuple
    """Forward, backward by keys, backward by queries where all or all earlier keys are visible."""
    masked: tuple
    """The same with a window, documents or dropout, which take more registers."""
    one_pass: tuple | None = None
    """Backward by keys that also adds up dQ, plain; two passes where there is none."""


TILES = {
    # (compute capability, 0 for all that have no rows of their own; bytes of a number; largest head size)
    (9, 2, 64): Tiles(((128, 64, 4, 3), (64, 128, 8, 2), (128, 64, 8, 3)),
                      ((64, 64, 4, 3), (32, 128, 8, 2), (128, 64, 8, 3)), (64, 128, 8, 2)),
    (9, 2, 128): Tiles(((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
                       ((128, 64, 8, 3), (16, 128, 8, 2), (128, 64, 8, 2)), (32, 128, 8, 1)),
    (9, 2, 256): Tiles(((128, 32, 8, 2), (16, 32, 8, 2), (64, 32, 8, 2)),
                       ((128, 32, 8, 2), (16, 32, 8, 2), (32, 32, 8, 2))),
    (10, 2, 64): Tiles(((128, 128, 8, 2), (64, 128, 8, 2), (128, 64, 8, 3)),
                       ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 3)), (32, 128, 8, 2)),
    (10, 2, 128): Tiles(((128, 64, 8, 3), (32, 128, 8, 1), (128, 64, 8, 2)),
                        ((128, 64, 8, 3), (32, 128, 8, 1), (128, 64, 8, 2)), (32, 128, 8, 2)),
    (10, 2, 256): Tiles(((128, 32, 8, 2), (32, 64, 8, 1), (64, 32, 8, 2)),
                        ((64, 32, 8, 2), (16, 64, 8, 1), (32, 32, 8, 2))),
    (0, 2, 64): Tiles(((64, 64, 4, 3), (32, 64, 4, 2), (128, 64, 8, 3)),
                      ((64, 64, 4, 3), (32, 32, 4, 2), (128, 64, 8, 2)), (32, 64, 8, 2)),
    (0, 2, 128): Tiles(((128, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2)),
                       ((128, 32, 8, 3), (32, 64, 8, 2), (64, 32, 8, 2)), (32, 64, 8, 2)),
    (0, 2, 256): Tiles(((64, 32, 8, 2), (16, 64, 8, 1), (64, 32, 8, 1)),
                       ((64, 32, 8, 1), (16, 32, 8, 2), (64, 32, 8, 1))),
    (0, 4, 64): Tiles(((64, 32, 8, 2), (32, 32, 8, 1), (64, 32, 8, 2)),
                      ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 2))),
    (0, 4, 128): Tiles(*[((32, 32, 8, 1), (16, 32, 8, 1), (32, 16, 8, 1))] * 2),
    (0, 4, 256): Tiles(*[((32, 16, 8, 1), (16, 32, 8, 1), (32, 16, 8, 1))] * 2),
}
"""The largest that were found to spill no register and, but for capabilities 9 and 10, to fit the 99 KB of shared
memory of a consumer GPU. `kernels.lint` shows both under the Triton that is installed. None was chosen by speed yet."""
DELTA_BYTES = 8192
"""Of the output that a program of attention_delta reads."""


def attention(q, k, v, *, causal, window=None, document_ids=None, dropout_p=0.0, seed=None, scale=None,
              deterministic=True):
    """`kernels.reference.attention` in Triton; head sizes up to 256, T and S up to 2^30.

    `deterministic=False` takes the faster backward, whose dQ is summed in an order that differs from run to run; under
    torch.use_deterministic_algorithms it raises ValueError. The dropout mask is a function of `seed` and the place of
    the weight; it is not the reference's.
    """
    check_attention(q, k, v, window=window, document_ids=document_ids, dropout_p=dropout_p, seed=seed,
                    scale=scale)
    if not 1 <= q.shape[3] <= MAX_HEAD_SIZE:
        raise ValueError(f"attention: a head size of {q.shape[3]}; the Triton kernels take 1 to {MAX_HEAD_SIZE}, "
                         "kernels.use('reference') any")
    if max(q.shape[1], k.shape[1]) > MAX_LENGTH:
        raise ValueError(f"attention: {q.shape[1]} queries and {k.shape[1]} keys; the Triton kernels take {MAX_LENGTH}")
    if not deterministic and torch.are_deterministic_algorithms_enabled():
        raise ValueError("attention: deterministic=False under torch.use_deterministic_algorithms; leave one out")
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(q.device.type))
                   for x in (q, k, v))
    if q.dtype not in DTYPES:
        raise ValueError(f"attention: q, k and v are {q.dtype}; the Triton kernels take "
                         f"{', '.join(map(str, DTYPES))}, kernels.use('reference') float64 too")
    key = None
    if dropout_p:
        key = (torch.randint(1 << 62, (), device=q.device) if seed is None
               else torch.full((), seed, dtype=torch.int64, device=q.device))
    if document_ids is not None:
        document_ids = document_ids.to(torch.int32)
    window = None if window is None or window >= k.shape[1] else window             # one of S hides nothing
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if scale <= 0:                                      # the kernels take their maxima before they scale
        q, scale = q * (-1 if scale else 0), -scale or 1.0
    return forward(q, k, v, document_ids, key, causal, window, dropout_p, scale, deterministic)[0]


class Call:
    """What all launches of one call share: the tensors as the kernels take them, numbers and constants."""

    def __init__(self, q, k, v, document_ids, seed, causal, window, dropout_p, scale, capability):
        q, k, v = with_rows(q), with_rows(k), with_rows(v)
        self.B, self.T, self.H, self.D = q.shape
        self.S, self.H_kv = k.shape[1:3]
        self.scale = scale
        tiles = tiles_for(capability, q.dtype.itemsize, self.D)
        masked = not document_ids is seed is window is None
        self.tiles = tiles.masked if masked else tiles.plain
        self.one_pass = None if masked else tiles.one_pass
        self.pointers = dict(q_ptr=q, k_ptr=k, v_ptr=v, seed_ptr=seed,
                             document_ids_ptr=None if document_ids is None else document_ids.contiguous())
        self.numbers = strides(q, "q") | strides(k, "k") | strides(v, "v") | dict(
            T=self.T, S=self.S, H=self.H, GROUP=self.H // self.H_kv, window=window, factor=scale * LOG2_E,
            threshold=min(round(dropout_p * 2**32), 2**32 - 1), rescale=1 / (1 - dropout_p))
        self.head = dict(D=self.D, BLOCK_D=max(16, next_power_of_2(self.D)))
        self.constants = self.head | dict(CAUSAL=causal)

    def launch(self, kernel, tile, by_keys, lse_ptr, **arguments):
        """A launch of one of the three kernels with dots, a program for each block of queries or of keys."""
        queries, keys, warps, stages = tile
        rows, length, heads = (keys, self.S, self.H_kv) if by_keys else (queries, self.T, self.H)
        options = dict(num_warps=warps, num_stages=stages)
        kind = "dot" if rows >= 64 else "small dot"
        if self.pointers["q_ptr"].dtype == torch.float32:
            kind, options["maxnreg"] = "plain", MOST_REGISTERS
        given = dict(lse_ptr=lse_ptr, lse_row=lse_ptr.stride(1), **arguments)
        return Launch(kernel, (triton.cdiv(length, rows) * self.B * heads,), self.pointers | self.numbers | given,
                      self.constants | dict(BLOCK_M=queries, BLOCK_N=keys), options, kind)

    def forward(self, out, lse) -> Launch:
        return self.launch(flash_attention.attention_forward, self.tiles[0], False, out_ptr=out, lse_ptr=lse)

    def backward(self, grad, out, lse, delta, dq, dk, dv, sums) -> list[Launch]:
        """What writes the gradients; where `sums` is given, dQ / scale is added to that instead."""
        grad = with_rows(grad)
        rows = DELTA_BYTES // (self.head["BLOCK_D"] * grad.itemsize)
        make_delta = Launch(
            flash_attention.attention_delta, (triton.cdiv(delta.shape[2], rows) * self.B * self.H,),
            dict(out_ptr=out, grad_ptr=grad, delta_ptr=delta, lse_row=delta.stride(1), T=self.T, H=self.H,
                 **strides(grad, "grad")),
            self.head | dict(BLOCK_M=rows), dict(num_warps=4, maxnreg=MOST_REGISTERS))
        given = dict(grad_ptr=grad, lse_ptr=lse, delta_ptr=delta, scale=self.scale, **strides(grad, "grad"))
        by_keys = self.launch(
            flash_attention.attention_backward_keys, self.tiles[1] if sums is None else self.one_pass, True, **given,
            dq_ptr=sums, dk_ptr=dk, dv_ptr=dv, dk_batch=dk.stride(0), dk_row=dk.stride(1))
        if sums is not None:
            return [make_delta, by_keys]
        by_queries = self.launch(
            flash_attention.attention_backward_queries, self.tiles[2], False, **given, dq_ptr=dq,
            dq_batch=dq.stride(0), dq_row=dq.stride(1))
        return [make_delta, by_keys, by_queries]


def tiles_for(capability, itemsize, D) -> Tiles:
    size = next(size for _, _, size in TILES if size >= D)
    return TILES.get((capability, itemsize, size)) or TILES[0, itemsize, size]


def capability_of(x) -> int:
    """The GPU's compute capability without its minor part; 0 in the interpreter."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0


def strides(x, name):
    return dict(zip((f"{name}_batch", f"{name}_row", f"{name}_head"), x.stride()))


def lint_cases():
    """Every tile in bfloat16 or float32, on the GPUs that it is for, with a length that no tile divides."""
    for capability, itemsize, D in TILES:
        archs = (f"sm_{10 * capability}",) if capability else tuple(
            arch for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
            if itemsize == 4 or arch not in ("sm_90", "sm_100"))
        dtype = torch.bfloat16 if itemsize == 2 else torch.float32
        numbers = f"{str(dtype).removeprefix('torch.')} {D}"
        q = torch.empty(8, 1000, 16, D, dtype=dtype, device="meta")
        shared = torch.empty(8, 1000, 4, D, dtype=dtype, device="meta")
        lse, sums = torch.empty(8, 16, 1008, device="meta"), torch.empty(q.shape, device="meta")
        ids = torch.empty(8, 1000, dtype=torch.int32, device="meta")
        seed = torch.empty((), dtype=torch.int64, device="meta")
        for name, kv, *masks in (("causal, grouped", shared, None, None, True, None, 0.0),
                                 ("full", q, None, None, False, None, 0.0),
                                 ("all masks, grouped", shared, ids, seed, True, 256, 0.1)):
            call = Call(q, kv, kv, *masks, 0.125, capability)
            if itemsize == 4 and "full" in name:        # which is what the other two have, and slow to compile
                continue
            name = f"{numbers} {name}"
            delta, *backward = call.backward(q, q, lse, lse, q, kv, kv, None)
            for launch in (call.forward(q, lse), *backward):
                yield launch.lint_case(name, archs=archs)
            if call.one_pass:
                _, by_keys = call.backward(q, q, lse, lse, q, kv, kv, sums)
                yield by_keys.lint_case(f"{name} one pass", archs=archs)
        yield delta.lint_case(numbers, archs=archs)


@torch.library.custom_op("minigpt::attention_forward", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None, seed: Tensor | None, causal: bool,
            window: int | None, dropout_p: float, scale: float, deterministic: bool) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, D), lse (B, H, at least T) in units of log2)"""
    out, lse = forward_outputs(q, k, v, document_ids, seed, causal, window, dropout_p, scale, deterministic)
    with torch.cuda.device_of(q):
        call = Call(q, k, v, document_ids, seed, causal, window, dropout_p, scale, capability_of(q))
        call.forward(out, lse).run()
    return out, lse


@forward.register_fake
def forward_outputs(q, k, v, document_ids, seed, causal, window, dropout_p, scale, deterministic):
    B, T, H, _ = q.shape
    row = (T + LSE_ALIGNMENT - 1) // LSE_ALIGNMENT * LSE_ALIGNMENT
    return q.new_empty(q.shape), q.new_empty(B, H, row, dtype=torch.float32)


@torch.library.custom_op("minigpt::attention_backward", mutates_args=())
def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, document_ids: Tensor | None,
             seed: Tensor | None, causal: bool, window: int | None, dropout_p: float, scale: float,
             deterministic: bool) -> Tensor:
    """dQ, dK and dV in one buffer, of which `split` gives views."""
    buffer = backward_outputs(grad, q, k)
    dq, dk, dv = split(buffer, q, k)
    if 0 in (q.numel(), k.numel()):
        return buffer.zero_()
    with torch.cuda.device_of(q):
        call = Call(q, k, v, document_ids, seed, causal, window, dropout_p, scale, capability_of(q))
        sums = None
        if not deterministic and call.one_pass:
            sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        for launch in call.backward(grad, out, lse, torch.empty_like(lse), dq, dk, dv, sums):
            launch.run()
    if sums is not None:
        torch.mul(sums, scale, out=dq)
    return buffer


@backward.register_fake
def backward_outputs(grad, q, k, *_):
    if q.shape[1] == k.shape[1]:
        B, T, H, D = q.shape
        return q.new_empty(B, T, H + 2 * k.shape[2], D)
    return q.new_empty(q.numel() + 2 * k.numel())


def split(buffer, q, k):
    """The gradients of q, k and v: where T = S beside one another in every row, as a fused projection lays q, k, v."""
    if buffer.dim() == 4:
        return buffer.split((q.shape[2], k.shape[2], k.shape[2]), dim=2)
    parts = buffer.split((q.numel(), k.numel(), k.numel()))
    return tuple(part.view(x.shape) for part, x in zip(parts, (q, k, k)))


def save_for_backward(ctx, inputs, output):
    q, k, v, document_ids, seed, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, document_ids, seed)
    ctx.set_materialize_grads(False)                    # nobody uses lse


def gradients(ctx, grad, _):
    if grad is None:
        return (None,) * 10
    q, k, *others = ctx.saved_tensors                   # once: activation checkpointing makes them anew each time
    return *split(backward(grad, q, k, *others, *ctx.settings), q, k), *[None] * 7


def no_second_derivative(ctx, *grads):
    raise RuntimeError("kernels.attention has no second derivative in Triton; kernels.use('reference') has one")


forward.register_autograd(gradients, setup_context=save_for_backward)
backward.register_autograd(no_second_derivative)
