"""LayerNorm in Triton; its kernels are those of `kernels.norm` that subtract the mean."""

from kernels import norm
from kernels.reference import check_norm


def layer_norm(x, weight, bias, eps, residual=None):
    """`kernels.reference.layer_norm` in Triton, for float32, float16 and bfloat16; it has no second derivative."""
    check_norm("layer_norm", x, eps, residual, norm.DTYPES, weight=weight, bias=bias)
    y, total, _, _ = norm.norm(x, weight, bias, residual, eps, True)
    return y if residual is None else (y, total)


def lint_cases():
    """The configurations that ship, for `kernels.lint`."""
    return norm.lint_cases(centred=True)
