"""What rotary, swiglu, gelu and squared_relu have in common: wide and many rows, as ops, arguments that do not fit."""

import importlib
import re

import pytest
import torch
from compare import assert_close, check_op, run_op

import kernels
from kernels import reference


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ANGLES = normal(9, 4, seed=5)
OPS = {
    "rotary": (lambda q, k: kernels.rotary(q, k, ANGLES.cos(), ANGLES.sin()), [(2, 7, 4, 8), (2, 7, 2, 8)]),
    "swiglu": (kernels.swiglu, [(3, 40), (3, 40)]),
    "gelu": (kernels.gelu, [(3, 40), (40,)]),
    "squared_relu": (kernels.squared_relu, [(3, 40)]),
}


@pytest.mark.parametrize("op, shapes, tolerance", [
    ("swiglu", [(3, 1500)] * 2, 2e-6), ("gelu", [(3, 1500), (1500,)], 3e-6), ("squared_relu", [(3, 1500)], 1e-6),
    ("gelu", [(9000, 3), (3,)], 3e-6), ("swiglu", [(), ()], 1e-6), ("gelu", [()], 3e-6), ("squared_relu", [()], 1e-6),
    ("squared_relu", [(0, 5)], 1e-6), ("gelu", [(0, 5), (5,)], 1e-6)], ids=str)
def test_wide_many_few_and_no_rows(op, shapes, tolerance):
    with kernels.use("reference"):
        exact = getattr(reference, op)
    check_op(getattr(kernels, op), exact, [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)], tolerance)


def test_many_tokens_are_turned():
    angles = normal(300, 8)
    check_op(lambda q, k: kernels.rotary(q, k, angles.cos(), angles.sin()),
             lambda q, k: reference.rotary(q, k, angles.cos().double(), angles.sin().double()),
             [normal(2, 300, 2, 16), normal(2, 300, 1, 16, seed=1)], 1e-6)


@pytest.mark.parametrize("op", ["swiglu", "gelu", "squared_relu"])
def test_nan_stays(op):
    x = torch.tensor([1.0, torch.nan, -1.0])
    y = getattr(kernels, op)(*(x for _ in range(1 + (op == "swiglu"))))
    assert y.isnan().tolist() == [False, True, False]


def test_a_bias_of_another_type_leaves_that_of_x():
    """bfloat16 and a float32 bias, as under autocast."""
    x, bias = normal(5, 40, dtype=torch.bfloat16), normal(40, seed=1).requires_grad_()
    y = kernels.gelu(x.requires_grad_(), bias)
    y.backward(torch.ones_like(y))
    assert y.dtype == x.grad.dtype == torch.bfloat16 and bias.grad.dtype == torch.float32
    assert_close(y, reference.gelu(x.double(), bias.double()), 0.02)


def test_a_frozen_bias_gets_no_gradient():
    x, bias = normal(5, 40).requires_grad_(), normal(40, seed=1)
    kernels.gelu(x, bias).sum().backward()
    assert bias.grad is None and x.grad.any()


TABLE = torch.zeros(9, 4)
X, Y = torch.zeros(2, 7, 4, 8), torch.zeros(2, 7, 2, 8)


@pytest.mark.parametrize("op, arguments, message", [
    ("swiglu", (1.0, X), "swiglu: gate = 1.0 is float, not a tensor"),
    ("swiglu", (torch.zeros(2, 5),), "swiglu: gate (2, 5) must be (..., 2N), two halves, where there is no up"),
    ("swiglu", (torch.zeros(()),), "swiglu: gate () must be (..., 2N)"),
    ("swiglu", (X, Y), "swiglu: up is (2, 7, 2, 8) torch.float32, gate (2, 7, 4, 8) torch.float32; they must be alike"),
    ("swiglu", (X, X.bfloat16()), "they must be alike"),
    ("swiglu", (X.long(), X.long()), "swiglu: gate is torch.int64; it must be floating"),
    ("swiglu", (X, X.to("meta")), "swiglu: up is on meta, gate on cpu; they must be on one device"),
    ("gelu", (X, torch.zeros(7)), "gelu: bias (7,) must be (C,), as x is (2, 7, 4, 8)"),
    ("gelu", (X, None, "erf"), "gelu: approximate 'erf' is none of: tanh, none"),
    ("squared_relu", (None,), "squared_relu: x = None is NoneType, not a tensor"),
    ("squared_relu", (X.int(),), "squared_relu: x is torch.int32; it must be floating"),
    ("rotary", (X, Y[:, :6], TABLE, TABLE), "rotary takes q (B, T, H, D) and k (B, T, H_kv, D) with D even, not (2, 7"),
    ("rotary", (X[..., :7], Y[..., :7], TABLE, TABLE), "with D even, not (2, 7, 4, 7)"),
    ("rotary", (X, Y.half(), TABLE, TABLE), "rotary: k is torch.float16, q torch.float32; they must be alike"),
    ("rotary", (X, Y, TABLE, TABLE[:, :3]), "rotary: cos (9, 4) and sin (9, 3) must be (N, D/2), here D = 8"),
    ("rotary", (X, Y, TABLE[:6], TABLE[:6]), "rotary: 7 tokens, and cos and sin for 6 positions"),
    ("rotary", (X, Y, TABLE, TABLE, torch.zeros(2).long()), "rotary: positions (2,) torch.int64 must be (T,)"),
    ("rotary", (X, Y, TABLE, TABLE, torch.zeros(7)), "rotary: positions (7,) torch.float32 must be (T,) or (B, T)"),
    ("rotary", (X, Y, TABLE, TABLE, [0, 1]), "rotary: positions = [0, 1] is list, not a tensor or None"),
])
def test_arguments_that_do_not_fit_are_named(op, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(kernels, op)(*arguments)


@pytest.mark.triton
@pytest.mark.parametrize("op", OPS)
def test_float64_is_refused(op):
    run, shapes = OPS[op]
    with pytest.raises(ValueError, match=f"{op}: .* is torch.float64; the Triton kernels take torch.float32, "):
        run(*(normal(*shape).double() for shape in shapes))


@pytest.mark.triton
def test_a_position_without_angles_gives_nan():
    """On a GPU a look at the positions would wait for them."""
    positions = torch.tensor([0, 1, 9, -1, 2, 3, 4])
    for y in kernels.rotary(normal(2, 7, 4, 8), normal(2, 7, 2, 8), ANGLES.cos(), ANGLES.sin(), positions):
        assert y.isnan().all((0, 2, 3)).tolist() == [False, False, True, True, False, False, False]
        assert y[:, [0, 1, 4, 5, 6]].isfinite().all()


@pytest.mark.triton
@pytest.mark.parametrize("op", OPS)
def test_a_compiled_caller_is_one_graph(op):
    run, shapes = OPS[op]
    inputs = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    actual, actual_grads, grads = run_op(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs)
    expected, expected_grads, _ = run_op(run, inputs, grads)
    for pair in zip(actual + actual_grads, expected + expected_grads, strict=True):
        assert_close(*pair, 1e-6)


@pytest.mark.triton
def test_opcheck():
    rotary, swiglu, gelu, squared_relu = (importlib.import_module(f"kernels.{op}") for op in OPS)
    x, y, bias = (normal(3, 40, seed=1).requires_grad_(), normal(3, 40).requires_grad_(), normal(40).requires_grad_())
    torch.library.opcheck(swiglu.forward, (x, y))
    torch.library.opcheck(swiglu.forward_of_halves, (x,))
    torch.library.opcheck(gelu.forward, (x, bias, "tanh"))
    torch.library.opcheck(gelu.forward, (x, None, "none"))
    torch.library.opcheck(squared_relu.forward, (x,))
    q, k = normal(2, 7, 4, 8).requires_grad_(), normal(2, 7, 2, 8).requires_grad_()
    torch.library.opcheck(rotary.op, (q, k, ANGLES.cos(), ANGLES.sin(), None, False))


@pytest.mark.triton
@pytest.mark.parametrize("op", ["swiglu", "gelu", "squared_relu"])
def test_a_second_derivative_is_refused(op):
    run, shapes = OPS[op]
    leaves = [normal(*shape).requires_grad_() for shape in shapes]
    grad, *_ = torch.autograd.grad(run(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; kernels\.use\('reference'\) has one"):
        grad.sum().backward()
