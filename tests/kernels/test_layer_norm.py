"""LayerNorm equals its formula in float64, with gradients, with and without residual, weight and bias."""

import pytest
import torch
from compare import STRIDES, assert_close, check_error_ratio, check_op, with_strides

import kernels

EPS = 0.1


def formula(x, weight=None, bias=None, residual=None):
    total = x if residual is None else x + residual
    centred = total - total.sum(-1, keepdim=True) / total.shape[-1]
    y = centred / ((centred ** 2).sum(-1, keepdim=True) / total.shape[-1] + EPS) ** 0.5
    y = y * (1 if weight is None else weight) + (0 if bias is None else bias)
    return y if residual is None else (y, total)


def named(names, function):
    """`function` of keyword arguments as one of positional tensors."""
    return lambda *tensors: function(**dict(zip(names, tensors)))


def op(x, weight=None, bias=None, residual=None):
    return kernels.layer_norm(x, weight, bias, EPS, residual)


def tensors(names, shape=(3, 5, 7), dtype=torch.float32):
    torch.manual_seed(0)
    return [(3 * torch.randn(shape if name in ("x", "residual") else shape[-1:]) + 1).to(dtype) for name in names]


PARTS = [("x",), ("x", "weight"), ("x", "bias"), ("x", "weight", "bias"), ("x", "residual"),
         ("x", "weight", "residual"), ("x", "bias", "residual"), ("x", "weight", "bias", "residual")]


@pytest.mark.parametrize("names", PARTS, ids="-".join)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 65), (2, 2, 3, 2), (33,)], ids=str)
def test_values_and_gradients(names, shape):
    check_op(named(names, op), named(names, formula), tensors(names, shape), 1e-5)


@pytest.mark.parametrize("kind", STRIDES)
def test_strides_are_free(kind):
    names = ("x", "weight", "bias", "residual")
    inputs = [with_strides(x, kind) if x.dim() > 1 else x for x in tensors(names)]
    check_op(named(names, op), named(names, formula), inputs, 3e-6)


@pytest.mark.triton
@pytest.mark.parametrize("width", [1, 3, 770, 1025, 10000])
def test_odd_widths(width):
    check_op(named(PARTS[-1], op), named(PARTS[-1], formula), tensors(PARTS[-1], (5, width)), 1e-5)


@pytest.mark.triton
@pytest.mark.parametrize("names", [("x",), PARTS[-1]], ids="-".join)
def test_rows_wider_than_the_registers(names):
    check_op(named(names, op), named(names, formula), tensors(names, (3, 20000)), 1e-5)


@pytest.mark.triton
def test_the_widest_rows():
    check_op(named(PARTS[-1], op), named(PARTS[-1], formula), tensors(PARTS[-1], (2, 65536)), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("names", PARTS, ids="-".join)
def test_low_precision_is_as_exact_as_plain_pytorch(names, dtype):
    check_error_ratio(named(names, op), named(names, formula), named(names, formula), tensors(names, (9, 65), dtype))


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(9, 770), (3, 20000)], ids=str)
def test_bfloat16_in_wider_rows(shape):
    check_error_ratio(named(PARTS[-1], op), named(PARTS[-1], formula), named(PARTS[-1], formula),
                      tensors(PARTS[-1], shape, torch.bfloat16))


@pytest.mark.parametrize("width", [64, pytest.param(20000, marks=pytest.mark.triton)])
def test_a_large_mean_does_not_cancel_the_variance(width):
    """As E[x²] - E[x]² it would be off by 6 in float32, at a variance of 1."""
    x = 1e4 + torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    assert_close(kernels.layer_norm(x, None, None, EPS), formula(x.double()), 3e-3)


def test_gradients_of_low_precision_weights_are_summed_in_float32():
    """Regression: torch's CPU layer_norm sums them in bfloat16, which was 7 % off over 8192 rows."""
    x, grad = torch.randn(2, 8192, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, bias = (torch.ones(16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    kernels.layer_norm(x, weight, bias, EPS).backward(grad)
    exact = (grad.double() * formula(x.double())).sum(0)
    assert_close(weight.grad, exact, 0.02)
    assert_close(bias.grad, grad.double().sum(0), 0.02)


def test_float32_parameters_with_bfloat16_input():
    """As under autocast: the output takes the input's dtype, the parameters' gradients keep their own."""
    x, weight, bias = tensors(("x", "weight", "bias"))
    weight.requires_grad_()
    y = kernels.layer_norm(x.bfloat16(), weight, bias, EPS)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32 and weight.grad.any()
