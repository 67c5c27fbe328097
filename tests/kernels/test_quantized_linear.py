"""Weights of 8 and 4 bits: what is packed, the product with it, and the gradient of its input."""

import pytest
import torch
from compare import STRIDES, assert_close, check_error_ratio, check_op, run_op, with_strides

import kernels
from kernels.reference import dequantize, quantize

CASES = [(8, None), (8, 16), (4, None), (4, 16), (4, 2)]


def weight_of(N=24, K=48, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def x_of(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("bits, group_size", CASES)
def test_quantized_numbers_are_the_nearest(bits, group_size):
    weight = weight_of()
    packed, scales = quantize(weight, bits, group_size)
    assert packed.nbytes == weight.numel() * bits // 8 and scales.shape == (24, 48 // (group_size or 48))
    error = (dequantize(packed, scales) - weight).abs().view(24, scales.shape[1], -1)
    assert (error <= scales[..., None] * (0.5 + 1e-5)).all() and error.any()
    largest = weight.abs().view(24, scales.shape[1], -1).amax(-1)
    assert torch.allclose(scales * (127 if bits == 8 else 7), largest)


def test_packed_by_hand():
    packed, scales = quantize(torch.tensor([[7.0, -7.0, 0.4, -1.6], [0.0, 0.0, 0.0, 0.0]]), 4)
    assert scales.tolist() == [[1.0], [0.0]]
    assert packed.tolist() == [[15 | 8 << 4, 1 | 6 << 4], [8 | 8 << 4] * 2]     # 7 and 0, -7 and -2, each plus 8
    assert dequantize(packed, scales).tolist() == [[7, -7, 0, -2], [0] * 4]
    assert quantize(torch.tensor([[1.0, -0.5]]), 8)[0].tolist() == [[127, -64]]


@pytest.mark.parametrize("shape", [(48,), (1, 48), (3, 5, 48), (17, 48), (70, 48), (0, 48)], ids=str)
@pytest.mark.parametrize("bits, group_size", CASES)
def test_values_and_gradients(bits, group_size, shape):
    packed, scales = quantize(weight_of(), bits, group_size)
    bias = torch.arange(24.0)
    check_op(lambda x: kernels.quantized_linear(x, packed, scales, bias),
             lambda x: x @ dequantize(packed, scales.double()).T + bias.double(), [x_of(*shape)], 1e-5)


@pytest.mark.parametrize("N, K, group_size", [(33, 300, None), (5, 320, 160), (100, 130, 26)])
@pytest.mark.parametrize("bits", [8, 4])
def test_sizes_that_no_tile_divides(bits, N, K, group_size):
    packed, scales = quantize(weight_of(N, K), bits, group_size)
    check_op(lambda x: kernels.quantized_linear(x, packed, scales),
             lambda x: x @ dequantize(packed, scales.double()).T, [x_of(3, K)], 1e-5)


@pytest.mark.parametrize("kind", STRIDES)
def test_strides_are_free(kind):
    packed, scales = quantize(weight_of(), 4, 16)
    check_op(lambda x: kernels.quantized_linear(x, packed.T.contiguous().T, scales.T.contiguous().T),
             lambda x: x @ dequantize(packed, scales.double()).T, [with_strides(x_of(3, 4, 48), kind)], 1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_plain_pytorch(dtype, bits):
    packed, scales = quantize(weight_of(), bits, 16)
    exact = dequantize(packed, scales.double())
    check_error_ratio(lambda x: kernels.quantized_linear(x, packed, scales),
                      lambda x: (x.float() @ exact.to(dtype).float().T).to(dtype), lambda x: x @ exact.T,
                      [x_of(9, 48, dtype=dtype)])


def test_only_x_has_a_gradient():
    packed, scales = quantize(weight_of(), 8)
    scales.requires_grad_()
    bias = torch.zeros(24, requires_grad=True)
    kernels.quantized_linear(x_of(3, 48).requires_grad_(), packed, scales, bias).sum().backward()
    assert scales.grad is None and bias.grad is None


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(3, 47)), r"a weight of N = 24, K = 48 does not go with x \(3, 47\), scales \(24, 3\)"),
    (dict(x=torch.zeros(3, 48).int()), "x is torch.int32; it must be floating"),
    (dict(packed=torch.zeros(24, 48)), "packed_weight is torch.float32 on cpu; it must be torch.int8, or torch.uint8"),
    (dict(packed=torch.zeros(48, dtype=torch.int8)), r"takes x \(..., K\), packed_weight \(N, K or K/2\)"),
    (dict(scales=torch.zeros(24, 5)), r"K = 48 does not go with x \(3, 48\), scales \(24, 5\)"),
    (dict(scales=torch.zeros(24, 16), packed=torch.zeros(24, 24, dtype=torch.uint8)), "does not go with"),
    (dict(bias=torch.zeros(23)), r"and bias \(23,\)"),
    (dict(bias=1.0), "bias = 1.0 is float, not a tensor"),
])
def test_arguments_that_do_not_fit_are_named(change, message):
    packed, scales = quantize(weight_of(), 8, 16)
    given = dict(x=torch.zeros(3, 48), packed=packed, scales=scales, bias=None) | change
    with pytest.raises(ValueError, match=f"^quantized_linear:? {message}|^quantized_linear: .*{message}"):
        kernels.quantized_linear(*given.values())


@pytest.mark.parametrize("bits, group_size, message", [
    (3, None, "bits = 3 is none of: 8, 4"), (8, 5, "group_size = 5 must divide K = 48"),
    (4, 3, "group_size = 3 must divide K = 48, and be even"), (8, 0, "group_size = 0 must divide")])
def test_what_cannot_be_quantized(bits, group_size, message):
    with pytest.raises(ValueError, match=f"quantize: {message}"):
        quantize(weight_of(), bits, group_size)
    with pytest.raises(ValueError, match="quantize: the weight holds numbers that are not finite"):
        quantize(torch.tensor([[torch.nan, 1.0]]), 8)


@pytest.mark.triton
@pytest.mark.parametrize("rows", [2, 70])
def test_as_an_op(rows):
    from kernels.quantized_linear import op

    packed, scales = quantize(weight_of(), 4, 16)
    torch.library.opcheck(op, (x_of(rows, 48).requires_grad_(), packed, scales, None))
    compiled = torch.compile(lambda x: kernels.quantized_linear(x, packed, scales), fullgraph=True, backend="aot_eager")
    actual, actual_grads, grads = run_op(compiled, [x_of(rows, 48)])
    expected, expected_grads, _ = run_op(lambda x: kernels.quantized_linear(x, packed, scales), [x_of(rows, 48)], grads)
    for pair in zip(actual + actual_grads, expected + expected_grads, strict=True):
        assert_close(*pair, 1e-6)


@pytest.mark.parametrize("rows", [3, 65])
def test_autocast_leaves_the_dtype(rows):
    """Regression: from 65 rows on, where a plain product takes over, the output was in autocast's dtype."""
    packed, scales = quantize(weight_of(), 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = kernels.quantized_linear(x_of(rows, 48), packed, scales)
    assert y.dtype == torch.float32
    assert torch.equal(y, kernels.quantized_linear(x_of(rows, 48), packed, scales))


def test_scales_in_16_bits_round_no_weight():
    """Regression: from 65 rows on, and in the gradient, the weight was rounded to the dtype of the scales."""
    packed, scales = quantize(weight_of(), 8, 16)
    low = scales.bfloat16()
    check_op(lambda x: kernels.quantized_linear(x, packed, low),
             lambda x: x @ dequantize(packed, low.double()).T, [x_of(65, 48)], 1e-5)
