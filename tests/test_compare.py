"""The comparison helper rejects what is wrong: zeros, NaN, other shapes, small errors, inputs written to."""

import pytest
import torch
from compare import STRIDES, assert_close, assert_error_ratio, check_error_ratio, check_op, with_strides

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_zeros_are_rejected_at_every_scale_and_tolerance(scale):
    for tolerance in (0.0, 1e-6, 0.499):
        assert_close(X * scale, X * scale, tolerance)
        with pytest.raises(AssertionError, match="off by"):
            assert_close(torch.zeros_like(X), X * scale, tolerance)


def test_one_wrong_element_is_rejected():
    wrong = X.clone()
    wrong[3, 2] += 0.01
    assert_close(wrong, X, 0.02)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(wrong, X, 0.005)


@pytest.mark.parametrize("wrong", [X * torch.nan, X * torch.inf, X.mT, X[:, :4], -X, X + 1],
                         ids=["nan", "inf", "transposed", "short", "negative", "shifted"])
def test_wrong_tensors_are_rejected(wrong):
    with pytest.raises(AssertionError):
        assert_close(wrong, X, 0.4)


def test_expected_zeros_must_be_met_exactly():
    zeros = torch.zeros(3)
    assert_close(zeros, zeros, 0.1)
    for wrong in (zeros + 1e-30, zeros * torch.nan):
        with pytest.raises(AssertionError, match="off by inf"):
            assert_close(wrong, zeros, 0.1)


def test_sums_that_cancel_are_measured_by_their_terms():
    rounding = 1e-17 * X
    assert_close(1e-7 * X, rounding, 1e-6, cancelled=1.0)
    for wrong in (1e-5 * X, X * torch.nan):
        with pytest.raises(AssertionError, match="off by"):
            assert_close(wrong, rounding, 1e-6, cancelled=1.0)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(torch.zeros_like(X), 1e-9 * X, 1e-6, cancelled=1.0)


def test_a_lax_tolerance_is_refused():
    with pytest.raises(AssertionError, match="accepts noise"):
        assert_close(X, X, 0.5)


def test_error_ratio_allows_twice_the_error_of_plain_pytorch():
    exact = torch.arange(1.0, 9.0, dtype=torch.float64)
    plain = (exact * 1.01).float()
    assert_error_ratio((exact * 1.019).float(), plain, exact)
    for wrong in (exact * 1.021, exact * 0, exact * torch.nan):
        with pytest.raises(AssertionError, match="off by"):
            assert_error_ratio(wrong.float(), plain, exact)


def test_error_ratio_rejects_zeros_where_plain_pytorch_is_bad_too():
    with pytest.raises(AssertionError, match="off by"):
        assert_error_ratio(X.float() * 0, X.float() * 0, X)


def test_check_op_sees_wrong_values_gradients_and_writes():
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return torch.zeros_like(grad)

    def writes(x):
        x.detach().mul_(2)
        return x * 1

    def double(x):
        return x * 2

    check_op(double, double, [X.clone()], 1e-12)
    for wrong, message in ((lambda x: x * 2.001, "output 0"), (NoGradient.apply, "gradient 0"), (writes, "written to")):
        with pytest.raises(AssertionError, match=message):
            check_op(wrong, double, [X.clone()], 1e-6)
    with pytest.raises(AssertionError, match="gradient 0"):
        check_error_ratio(NoGradient.apply, double, double, [X.bfloat16()])


@pytest.mark.parametrize("kind", STRIDES)
def test_strides(kind):
    y = with_strides(X, kind)
    assert y.shape == X.shape and torch.equal(y, X[:1].expand(7, 5) if kind == "expanded" else X)
    assert y.is_contiguous() == (kind == "contiguous")
