"""Squared ReLU equals max(x, 0)² in float64, with gradients."""

import pytest
import torch
from compare import STRIDES, check_error_ratio, check_op, with_strides

import kernels


def formula(x):
    return torch.where(x > 0, x * x, 0.0)


def random(shape=(3, 5, 7), dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("shape", [(3, 5, 7), (3,), (2, 65)], ids=str)
def test_values_and_gradients(shape):
    check_op(kernels.squared_relu, formula, [random(shape)], 1e-6)


@pytest.mark.parametrize("kind", STRIDES)
def test_strides_are_free(kind):
    check_op(kernels.squared_relu, formula, [with_strides(random(), kind)], 1e-6)


def test_zero_has_no_gradient():
    x = torch.zeros(3, requires_grad=True)
    kernels.squared_relu(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3))


def test_bfloat16_is_as_exact_as_plain_pytorch():
    check_error_ratio(kernels.squared_relu, formula, formula, [random((9, 65), torch.bfloat16)])


def test_the_reference_has_a_second_derivative():
    """Regression: with create_graph=True its gradient had no graph, and nothing said so."""
    from kernels import reference

    x = random(dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(reference.squared_relu, x)
