"""SwiGLU equals gate · sigmoid(gate) · up in float64, with gradients."""

import pytest
import torch
from compare import STRIDES, check_error_ratio, check_op, with_strides

import kernels


def formula(gate, up):
    return gate / (1 + (-gate).exp()) * up


def gate_and_up(shape=(3, 5, 7), dtype=torch.float32):
    torch.manual_seed(0)
    return [3 * torch.randn(shape).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (2, 65), (4, 0)], ids=str)
def test_values_and_gradients(shape):
    check_op(kernels.swiglu, formula, gate_and_up(shape), 1e-6)


@pytest.mark.parametrize("kind", STRIDES)
def test_strides_are_free(kind):
    check_op(kernels.swiglu, formula, [with_strides(x, kind) for x in gate_and_up()], 1e-6)


@pytest.mark.parametrize("op", [lambda x: kernels.swiglu(*x.chunk(2, dim=-1)), kernels.swiglu], ids=["two", "one"])
@pytest.mark.parametrize("kind", STRIDES)
def test_halves_of_one_tensor(op, kind):
    whole = with_strides(torch.cat(gate_and_up(), dim=-1), kind)
    check_op(op, lambda x: formula(*x.chunk(2, dim=-1)), [whole], 1e-6)


def test_large_inputs_stay_finite():
    gate = torch.tensor([-1e4, 1e4])
    assert torch.equal(kernels.swiglu(gate, torch.ones(2)), torch.tensor([0.0, 1e4]))


def test_bfloat16_is_as_exact_as_plain_pytorch():
    check_error_ratio(kernels.swiglu, lambda gate, up: gate * gate.sigmoid() * up, formula,
                      gate_and_up((9, 65), torch.bfloat16))
