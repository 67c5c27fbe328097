"""How tests compare tensors: against the size of what is expected, so that zeros never pass.

The allclose of torch adds an absolute tolerance, which accepts anything small; here a tolerance is a part of the
expected values' root mean square, and it must be less than a half.
"""

import torch


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def largest_error(actual: torch.Tensor, expected: torch.Tensor, least_rms: float = 0.0) -> float:
    """max |actual - expected| / rms(expected); infinite where actual is not finite."""
    error = (actual.double() - expected.double()).abs().max().item()
    return error / max(rms(expected), least_rms) if error == error else float("inf")


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str = "value",
                 cancelled: float = 0.0) -> None:
    """Shapes are equal and the largest error is at most `tolerance` < 0.5 times the rms of what is expected.

    Where all of the expected values are 0, all of the actual ones must be 0. Where they are 0 but for rounding, as
    sums of terms of about the size `cancelled`, the tolerance is a part of that size.
    """
    assert 0 <= tolerance < 0.5, "a tolerance of a half or more accepts noise"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert expected.isfinite().all(), f"{name}: what is expected is not finite"
    if cancelled and rms(expected) <= 1e-12 * cancelled:
        error = largest_error(actual, expected, cancelled)
    elif not expected.any():
        error = 0.0 if (actual == 0).all() else float("inf")
    else:
        error = largest_error(actual, expected)
    assert error <= tolerance, f"{name}: off by {error:.3g} of its rms; {tolerance:.3g} is allowed"


def assert_error_ratio(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, name: str = "value") -> None:
    """The error of `actual` against float64 is at most twice that of plain PyTorch in the same dtype, or one rounding.

    Both are measured relative to rms(exact), and in any case must stay below a quarter.
    """
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, not {plain.dtype}"
    one_rounding = torch.finfo(plain.dtype).eps / 2 * exact.abs().max().item() / rms(exact)
    assert_close(actual, exact, min(0.25, max(2 * largest_error(plain, exact), one_rounding)), name)


STRIDES = ("contiguous", "transposed", "sliced", "expanded")


def with_strides(x: torch.Tensor, kind: str) -> torch.Tensor:
    """A tensor of the shape of x in another memory layout; gaps hold NaN. "expanded" repeats the first item."""
    if kind == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced":
        whole = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
        whole[..., 1::2] = x
        return whole[..., 1::2]
    if kind == "expanded":
        return x[:1].expand(x.shape)
    return x


def run_op(op, inputs, grads=None):
    """Outputs of an op, its gradients, and the incoming gradients as it got them: random unless given."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if grads is None:
        grads = [with_strides(torch.randn(y.shape, dtype=torch.float64), "transposed") for y in outputs]
    given = [grad.to(y.dtype) for grad, y in zip(grads, outputs)]
    copies = [grad.clone() for grad in given]
    torch.autograd.backward(outputs, given)
    assert all(torch.equal(grad, copy) for grad, copy in zip(given, copies)), "an incoming gradient was written to"
    return [y.detach() for y in outputs], [leaf.grad for leaf in leaves], given


def check_op(op, formula, inputs, tolerance):
    """Values and gradients of `op` equal those of `formula` run in float64, and its inputs are left as they were."""
    copies = [x.clone() for x in inputs]
    actual, actual_grads, grads = run_op(op, inputs)
    expected, expected_grads, _ = run_op(formula, [x.double() for x in inputs], grads)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies)), "an input was written to"
    for number, pair in enumerate(zip(actual, expected, strict=True)):
        assert pair[0].dtype == inputs[0].dtype
        assert_close(*pair, tolerance, f"output {number}")
    for number, pair in enumerate(zip(actual_grads, expected_grads, strict=True)):
        assert_close(*pair, tolerance, f"gradient {number}", cancelled=max(map(rms, grads)))


def check_error_ratio(op, plain, formula, inputs):
    """In the inputs' low precision, `op` is at most twice as far from float64 as `plain`, values and gradients."""
    actual, actual_grads, grads = run_op(op, inputs)
    rough, rough_grads, _ = run_op(plain, inputs, grads)
    exact, exact_grads, _ = run_op(formula, [x.double() for x in inputs], grads)
    for number, values in enumerate(zip(actual, rough, exact, strict=True)):
        assert_error_ratio(*values, f"output {number}")
    for number, values in enumerate(zip(actual_grads, rough_grads, exact_grads, strict=True)):
        assert_error_ratio(*values, f"gradient {number}")
