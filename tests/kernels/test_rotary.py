"""Rotary positions turn pairs as complex numbers do, in float64, with gradients, at default and given positions."""

import pytest
import torch
from compare import STRIDES, assert_close, check_error_ratio, check_op, with_strides

import kernels


def table(N, half):
    angles = torch.rand(N, half, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 6 - 3
    return angles.cos(), angles.sin()


def formula(cos, sin, positions=None):
    """(x_i + i x_{i + D/2}) e^(i angle), head by head."""
    def turn(x):
        first, second = x[..., :x.shape[-1] // 2], x[..., x.shape[-1] // 2:]
        at = torch.arange(x.shape[1]) if positions is None else positions
        at = at.expand(x.shape[:2])                                                 # (B, T)
        turned = torch.complex(first, second) * torch.complex(cos, sin)[at][:, :, None]
        return torch.cat((turned.real, turned.imag), dim=-1)
    return lambda q, k: (turn(q), turn(k))


def qk(T=7, D=6, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(3, T, heads, D).to(dtype) for heads in (4, 2)]


POSITIONS = [None, torch.tensor([5, 0, 3, 3, 8, 1, 2]), torch.tensor([[0, 1, 2, 0, 1, 0, 8], [8, 7, 6, 5, 4, 3, 2],
                                                                       [1] * 7])]


@pytest.mark.parametrize("positions", POSITIONS, ids=["default", "(T,)", "(B, T)"])
@pytest.mark.parametrize("D", [2, 6, 34])
def test_values_and_gradients(D, positions):
    cos, sin = table(9, D // 2)
    check_op(lambda q, k: kernels.rotary(q, k, cos.float(), sin.float(), positions), formula(cos, sin, positions),
             qk(D=D), 1e-6)


@pytest.mark.parametrize("kind", STRIDES)
def test_strides_are_free(kind):
    cos, sin = table(9, 3)
    check_op(lambda q, k: kernels.rotary(q, k, cos.float(), sin.float()), formula(cos, sin),
             [with_strides(x, kind) for x in qk()], 1e-6)


def test_scores_depend_on_the_distance_alone():
    """With angles that grow with the position, q · k at (9, 4) is that at (7, 2), and not that at (7, 3)."""
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(10)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])

    def score(i, j):
        turned, _ = kernels.rotary(q, k, angles.cos(), angles.sin(), torch.tensor([i]))
        _, other = kernels.rotary(q, k, angles.cos(), angles.sin(), torch.tensor([j]))
        return (turned * other).sum()

    assert_close(score(9, 4), score(7, 2), 1e-5)
    assert abs(score(9, 4) - score(7, 3)) > 0.1


def test_bfloat16_is_as_exact_as_plain_pytorch():
    cos, sin = table(9, 3)
    low_cos, low_sin = cos.bfloat16(), sin.bfloat16()

    def plain(q, k):
        def turn(x):
            first, second = x.chunk(2, dim=-1)
            c, s = low_cos[:7, None], low_sin[:7, None]
            return torch.cat((first * c - second * s, second * c + first * s), dim=-1)
        return turn(q), turn(k)

    check_error_ratio(lambda q, k: kernels.rotary(q, k, cos.float(), sin.float()), plain, formula(cos, sin),
                      qk(dtype=torch.bfloat16))
