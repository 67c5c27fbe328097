"""GELU equals its two formulas in float64, with gradients, with and without a bias."""

import math

import pytest
import torch
from compare import STRIDES, assert_close, check_error_ratio, check_op, with_strides

import kernels


def formula(approximate):
    def gelu(x, bias=None):
        x = x if bias is None else x + bias
        if approximate == "none":
            return x / 2 * (1 + torch.erf(x / math.sqrt(2)))
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    return gelu


def op(approximate):
    return lambda x, bias=None: kernels.gelu(x, bias, approximate)


def tensors(with_bias, shape=(3, 5, 7), dtype=torch.float32):
    torch.manual_seed(0)
    return [2 * torch.randn(size).to(dtype) for size in (shape, shape[-1:])[:1 + with_bias]]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1), (2, 65), (3, 0)], ids=str)
def test_values_and_gradients(approximate, with_bias, shape):
    check_op(op(approximate), formula(approximate), tensors(with_bias, shape), 2e-6)


def test_the_two_differ_and_tanh_is_the_default():
    x = torch.linspace(-4, 4, 101)
    tanh, erf = formula("tanh")(x.double()), formula("none")(x.double())
    assert_close(kernels.gelu(x), tanh, 1e-6)
    assert (tanh - erf).abs().max() > 1e-4                  # 100 times what the tolerance above lets pass


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_strides_are_free(kind, approximate):
    x, bias = tensors(True)
    check_op(op(approximate), formula(approximate), [with_strides(x, kind), bias], 2e-6)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_bfloat16_is_as_exact_as_plain_pytorch(approximate):
    check_error_ratio(op(approximate), formula(approximate), formula(approximate),
                      tensors(True, (9, 65), torch.bfloat16))
