"""`linear_cross_entropy` on Triton: products by cuBLAS around a kernel that turns logits into their gradient, in place.

Two sizes of piece. A slab's logits fit the GPU's L2 cache, so that the kernel, which reads them twice and writes them
once, hardly goes to memory. A chunk of many slabs is what the two products for the gradients take at a time: each adds
to all of the weight's gradient in float32, which is a pass over 4 V C bytes, so there should be few of them.
Legend: N targets, C width, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.common import Launch, round_to
from kernels.reference import check_linear_cross_entropy, reduced

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SLAB_BYTES = 32 << 20
"""Of logits, in the 50 MB of an H100's L2."""
LEAST_ROWS = 128
"""In a slab, and their number in one is a multiple of this."""
CHUNK_ROWS, CHUNK_BYTES = 4096, 5 << 28
"""At most so many rows in a chunk, and bytes of their logits."""
ROW_ALIGNMENT = 64
"""Rows of logits begin at multiples of so many numbers, whatever the vocabulary: their loads are wide then."""
BLOCK, WARPS = 4096, 16


@triton.jit
def _tanh(x):
    """tanh and its slope, 1 - tanh²."""
    small = tl.exp(-2 * tl.abs(x))
    tanh = (1 - small) / (1 + small)
    return tl.where(x < 0, -tanh, tanh), 4 * small / ((1 + small) * (1 + small))


@triton.jit
def _logits(z_ptr, cols, softcap, CAPPED: tl.constexpr, V: tl.constexpr, MASKED: tl.constexpr):
    """BLOCK of a row's logits in float32, -inf beyond the last, and the slope of their cap."""
    if MASKED:
        z = tl.load(z_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
    else:
        z = tl.load(z_ptr + cols).to(tl.float32)
    slope = 1.0
    if CAPPED:
        tanh, slope = _tanh(z / softcap)
        z = softcap * tanh
        if MASKED:
            z = tl.where(cols < V, z, float("-inf"))
    return z, slope


@triton.jit
def _add_block(z_ptr, cols, softcap, top, sums, total, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, V: tl.constexpr,
               MASKED: tl.constexpr):
    """The maximum so far, the sums of exp(z - maximum) lane by lane, and those of z."""
    z, _ = _logits(z_ptr, cols, softcap, CAPPED, V, MASKED)
    higher = tl.maximum(top, tl.max(z, 0))
    sums = sums * tl.exp(top - higher) + tl.exp(z - higher)
    if SMOOTHED:
        total += tl.where(cols < V, z, 0.0)
    return higher, sums, total


@triton.jit
def _replace_block(z_ptr, cols, softcap, target, lse, scale, slope_of_lse, smoothing, CAPPED: tl.constexpr,
                   V: tl.constexpr, MASKED: tl.constexpr):
    """Logits by their gradient."""
    z, slope = _logits(z_ptr, cols, softcap, CAPPED, V, MASKED)
    grad = tl.exp(z - lse) * slope_of_lse - smoothing / V - tl.where(cols == target, 1 - smoothing, 0.0)
    grad = round_to(grad * slope * scale, z_ptr.dtype.element_ty)
    if MASKED:
        tl.store(z_ptr + cols, grad, mask=cols < V)
    else:
        tl.store(z_ptr + cols, grad)


@triton.jit
def _cross_entropy(logits_ptr, target_ptr, scale_ptr, loss_ptr, stride, ignore_index, smoothing, z_loss, softcap,
                   V: tl.constexpr, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr,
                   BLOCK: tl.constexpr):
    """One row: its loss, and in place of its logits their gradient."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr = logits_ptr + row * stride
    target = tl.load(target_ptr + row)
    FULL: tl.constexpr = V // BLOCK * BLOCK
    lanes = tl.arange(0, BLOCK)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                zeros = tl.zeros((BLOCK,), z_ptr.dtype.element_ty)
                tl.store(z_ptr + start + lanes, zeros, mask=start + lanes < V)
    else:
        top = tl.full((), -1e38, tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, FULL, BLOCK):
            top, sums, total = _add_block(z_ptr, start + lanes, softcap, top, sums, total, CAPPED, SMOOTHED, V, False)
        if V > FULL:
            top, sums, total = _add_block(z_ptr, FULL + lanes, softcap, top, sums, total, CAPPED, SMOOTHED, V, True)
        lse = tl.log(tl.sum(sums, 0)) + top
        known = (target >= 0) & (target < V)
        picked = tl.load(z_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        if CAPPED:
            tanh, _ = _tanh(picked / softcap)
            picked = softcap * tanh
        loss = lse - (1 - smoothing) * picked + z_loss * lse * lse
        if SMOOTHED:
            loss -= smoothing * tl.sum(total, 0) / V
        tl.store(loss_ptr + row, loss)
        if GRADIENT:
            scale = 1.0
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + row)
            slope_of_lse = 1 + 2 * z_loss * lse
            for start in range(0, FULL, BLOCK):
                _replace_block(z_ptr, start + lanes, softcap, target, lse, scale, slope_of_lse, smoothing, CAPPED, V,
                               False)
            if V > FULL:
                _replace_block(z_ptr, FULL + lanes, softcap, target, lse, scale, slope_of_lse, smoothing, CAPPED, V,
                               True)


def lint_cases():
    """GPT-2's vocabulary, padded and not, with and without all options."""
    targets, losses = torch.empty(4096, dtype=torch.int64, device="meta"), torch.empty(4096, device="meta")
    for V in (50304, 50257):
        logits = torch.empty(256, padded(V), dtype=torch.bfloat16, device="meta")
        for name, scales, settings in (("sum", None, (-100, 0.0, 0.0, None)), ("all", losses, (-100, 0.1, 1e-4, 30.0))):
            yield softmax(logits, V, targets, scales, losses, settings, True).lint_case(f"{V} {name}")
    yield softmax(logits, V, targets, None, losses, (-100, 0.0, 0.0, None), False).lint_case(f"{V} loss alone")


def padded(V: int) -> int:
    return -(-V // ROW_ALIGNMENT) * ROW_ALIGNMENT


def softmax(logits, V, targets, scales, losses, settings, gradient) -> Launch:
    """What writes the losses and, for a `gradient`, puts it times the scales (n,) in place of the logits."""
    ignore_index, smoothing, z_loss, softcap = settings
    return Launch(
        _cross_entropy, (len(logits),),
        dict(logits_ptr=logits, target_ptr=targets, scale_ptr=scales, loss_ptr=losses, stride=logits.stride(0),
             ignore_index=ignore_index, smoothing=float(smoothing), z_loss=float(z_loss), softcap=float(softcap or 0)),
        dict(V=V, CAPPED=softcap is not None, SMOOTHED=smoothing > 0, GRADIENT=gradient, BLOCK=BLOCK),
        dict(num_warps=WARPS))


def losses_and_gradients(hidden, weight, targets, settings, scales, of_hidden, of_weight):
    """(N,) losses, and of their sum weighted by `scales` the gradients; empty tensors for what is not asked for."""
    N, V = len(hidden), len(weight)
    losses, hidden_grad, weight_grad = outputs(hidden, weight, of_hidden, of_weight)
    matrix, targets = weight.to(hidden.dtype), targets.contiguous()
    row_bytes = padded(V) * hidden.element_size()
    slab = max(LEAST_ROWS, SLAB_BYTES // row_bytes // LEAST_ROWS * LEAST_ROWS)
    gradient = of_hidden or of_weight
    chunk = slab * max(1, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes) // slab) if gradient else slab
    logits = hidden.new_empty(min(N, chunk), padded(V))
    sums = torch.zeros_like(weight_grad, dtype=torch.float32)
    for start in range(0, N, chunk):
        end = min(N, start + chunk)
        for first in range(start, end, slab):
            rows = slice(first, min(end, first + slab))
            z = logits[first - start:rows.stop - start]
            torch.mm(hidden[rows], matrix.T, out=z[:, :V])
            softmax(z, V, targets[rows], None if scales is None else scales[rows], losses[rows], settings,
                    gradient).run()
        z = logits[:end - start, :V]
        if of_hidden:
            torch.mm(z, matrix, out=hidden_grad[start:end])
        if of_weight:
            add_product(sums, z.T, hidden[start:end])
    return losses, hidden_grad, sums.to(weight.dtype)


def add_product(sums, a, b):
    """sums += a · b with float32 sums, whatever a and b are."""
    if sums.dtype == a.dtype or not sums.is_cuda:
        sums.addmm_(a.to(sums.dtype), b.to(sums.dtype))
    else:
        torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)


def outputs(hidden, weight, of_hidden, of_weight):
    return (hidden.new_empty(len(hidden), dtype=torch.float32), hidden.new_empty(hidden.shape if of_hidden else 0),
            weight.new_empty(weight.shape if of_weight else 0))


@torch.library.custom_op("minigpt::linear_cross_entropy_sum", mutates_args=())
def loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
             softcap: float | None, of_hidden: bool, of_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of all losses, and its gradients."""
    with torch.cuda.device_of(hidden):
        losses, *grads = losses_and_gradients(hidden, weight, targets, (ignore_index, label_smoothing, z_loss, softcap),
                                              None, of_hidden, of_weight)
    return losses.sum(), *grads


@loss_sum.register_fake
def _(hidden, weight, targets, ignore_index, label_smoothing, z_loss, softcap, of_hidden, of_weight):
    _, *grads = outputs(hidden, weight, of_hidden, of_weight)
    return hidden.new_empty((), dtype=torch.float32), *grads


@torch.library.custom_op("minigpt::scaled", mutates_args=())
def scaled(factor: Tensor, x: Tensor) -> Tensor:
    """x times a scalar: an op, so that a second derivative, which it knows nothing of, is refused."""
    return reference.scaled(factor, x)


@scaled.register_fake
def _(factor, x):
    return torch.empty_like(x)


@torch.library.custom_op("minigpt::linear_cross_entropy", mutates_args=())
def loss_each(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float,
              z_loss: float, softcap: float | None) -> Tensor:
    """The loss of each target; its backward makes the logits again, as only it knows what each loss counts."""
    with torch.cuda.device_of(hidden):
        return losses_and_gradients(hidden, weight, targets, (ignore_index, label_smoothing, z_loss, softcap), None,
                                    False, False)[0]


@loss_each.register_fake
def _(hidden, weight, targets, ignore_index, label_smoothing, z_loss, softcap):
    return outputs(hidden, weight, False, False)[0]


@torch.library.custom_op("minigpt::linear_cross_entropy_backward", mutates_args=())
def backward(grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float,
             z_loss: float, softcap: float | None, of_hidden: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    """The gradients of the losses (N,), each weighted by its own incoming gradient."""
    with torch.cuda.device_of(hidden):
        _, *grads = losses_and_gradients(hidden, weight, targets, (ignore_index, label_smoothing, z_loss, softcap),
                                         grad.contiguous(), of_hidden, of_weight)
    return tuple(grads)


@backward.register_fake
def _(grad, hidden, weight, targets, ignore_index, label_smoothing, z_loss, softcap, of_hidden, of_weight):
    return outputs(hidden, weight, of_hidden, of_weight)[1:]


def save_gradients(ctx, inputs, output):
    *_, of_hidden, of_weight = inputs
    _, hidden_grad, weight_grad = output
    ctx.save_for_backward(hidden_grad if of_hidden else None, weight_grad if of_weight else None)
    ctx.set_materialize_grads(False)


def backward_of_sum(ctx, grad, *_):
    return *(None if x is None or grad is None else scaled(grad, x) for x in ctx.saved_tensors), *[None] * 7


def save_inputs(ctx, inputs, output):
    hidden, weight, targets, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, targets)


def backward_of_each(ctx, grad):
    wanted = ctx.needs_input_grad[:2]
    grads = backward(grad, *ctx.saved_tensors, *ctx.settings, *wanted)
    return *(x if asked else None for x, asked in zip(grads, wanted)), *[None] * 5


def no_second_derivative(ctx, *_):
    raise RuntimeError("the Triton linear_cross_entropy has no second derivative")


loss_sum.register_autograd(backward_of_sum, setup_context=save_gradients)
scaled.register_autograd(no_second_derivative)
loss_each.register_autograd(backward_of_each, setup_context=save_inputs)
backward.register_autograd(no_second_derivative)


def linear_cross_entropy(hidden, weight, targets, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None,
                         reduction="mean"):
    check_linear_cross_entropy(hidden, weight, targets, ignore_index, label_smoothing, z_loss, softcap, reduction)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.dtype not in DTYPES:
            raise ValueError(f"linear_cross_entropy: {name} is {x.dtype}; the Triton kernel takes "
                             f"{', '.join(map(str, DTYPES))}")
    arguments = (hidden.flatten(0, -2), weight, targets.flatten(), ignore_index, float(label_smoothing), float(z_loss),
                 softcap if softcap is None else float(softcap))
    with torch.autocast(device, enabled=False):
        if reduction == "none":
            loss = loss_each(*arguments)
        else:
            wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
            loss, *_ = loss_sum(*arguments, *wanted)
    return reduced(loss, targets, ignore_index, reduction)
