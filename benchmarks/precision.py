"""How exact the checks ask an op to be."""

from __future__ import annotations

import torch
from compare import check_error_ratio, check_op

DTYPES = ("bfloat16", "float16", "float32")
FLOAT32 = 1e-5
"""Part of the rms by which float32 may be off in any case: a twice of errors this small is a matter of luck."""


def check(op, plain, inputs: list[torch.Tensor]) -> None:
    """Raise AssertionError where `op`, values or gradients, is more than twice as far from `plain` in float64 as
    `plain` in the inputs' dtype is."""
    with inputs[0].device:                              # on which incoming gradients are drawn
        if inputs[0].dtype == torch.float32:
            try:
                return check_op(op, plain, inputs, FLOAT32)
            except AssertionError:
                pass                                    # large errors of plain PyTorch allow more
        check_error_ratio(op, plain, plain, inputs)
