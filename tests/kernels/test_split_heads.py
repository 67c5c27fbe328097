"""Queries, keys and values of a fused projection, normalised and turned as in float64, and one gradient of them all."""

import pytest
import torch
from compare import STRIDES, assert_close, check_error_ratio, check_op, run_op, with_strides
from marks import slow

import kernels
from kernels import reference

EPS = 0.1
POSITIONS = [None, torch.tensor([5, 0, 3, 3, 8, 1, 2]),
             torch.tensor([[0, 1, 2, 0, 1, 0, 8], [8, 7, 6, 5, 4, 3, 2], [1] * 7])]
PARTS = {"views": (False, False), "norm": (True, False), "rotary": (False, True), "norm, rotary": (True, True)}
HEADS = (4, 2, 2)


def table(D, N=9):
    angles = torch.rand(N, D // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 6 - 3
    return angles.cos(), angles.sin()


def formula(heads, tables=None, positions=None):
    """As a function of x and, with a norm, of two weights."""
    def finish(x, weight):
        if weight is not None:
            x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        if tables is None:
            return x
        first, second = x[..., :x.shape[-1] // 2], x[..., x.shape[-1] // 2:]
        at = torch.arange(x.shape[1]) if positions is None else positions
        turned = torch.complex(first, second) * torch.complex(*tables)[at.expand(x.shape[:2])][:, :, None]
        return torch.cat((turned.real, turned.imag), dim=-1)

    def split(x, q_weight=None, k_weight=None):
        q, k, v = x.split(heads, dim=2)
        return finish(q, q_weight), finish(k, k_weight), v.clone()
    return split


def op(heads, tables=None, positions=None, module=kernels):
    cos, sin = (None, None) if tables is None else (x.float() for x in tables)
    return lambda x, q_weight=None, k_weight=None: module.split_heads(
        x, heads, q_weight, k_weight, EPS, cos, sin, positions)


def inputs(part, D=6, heads=HEADS, dtype=torch.float32, B=3, T=7):
    torch.manual_seed(0)
    weights = [torch.randn(D).to(dtype) for _ in range(2)] if PARTS[part][0] else []
    return [torch.randn(B, T, sum(heads), D).to(dtype), *weights]


def tables_of(part, D=6):
    return table(D) if PARTS[part][1] else None


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("D, heads", [(6, HEADS), (2, (3, 1, 1)), slow(34, (2, 2, 2)), slow(80, (5, 1, 1))])
def test_values_and_gradients(part, D, heads):
    tables = tables_of(part, D)
    check_op(op(heads, tables), formula(heads, tables), inputs(part, D, heads), 1e-5)


@pytest.mark.parametrize("positions", POSITIONS[1:], ids=["(T,)", "(B, T)"])
def test_positions(positions):
    tables = table(6)
    check_op(op(HEADS, tables, positions), formula(HEADS, tables, positions), inputs("norm, rotary"), 1e-5)


@pytest.mark.parametrize("kind", STRIDES[1:])
@pytest.mark.parametrize("part", ["views", "norm, rotary"])
def test_strides_are_free(part, kind):
    x, *weights = inputs(part)
    weights = [with_strides(weight, "sliced" if kind == "sliced" else "contiguous") for weight in weights]
    check_op(op(HEADS, tables_of(part)), formula(HEADS, tables_of(part)), [with_strides(x, kind), *weights], 1e-5)


def test_a_norm_of_odd_heads():
    check_op(op(HEADS), formula(HEADS), inputs("norm", D=5), 1e-5)


@pytest.mark.parametrize("part", ["norm", "norm, rotary"])
def test_low_precision_is_as_exact_as_plain_pytorch(part):
    """With weights in float32, as under autocast."""
    x, *weights = inputs(part, D=16, dtype=torch.bfloat16)
    given, tables = [x, *(weight.float() for weight in weights)], tables_of(part, 16)
    check_error_ratio(op(HEADS, tables), op(HEADS, tables, module=reference), formula(HEADS, tables), given)


@pytest.mark.triton
def test_more_tokens_than_programs():
    tables = table(16, 300)
    check_op(op(HEADS, tables), formula(HEADS, tables), inputs("norm, rotary", 16, B=8, T=300), 1e-5)


@pytest.mark.parametrize("part", PARTS)
def test_no_tokens(part):
    given = inputs(part, T=0)
    outputs, grads, _ = run_op(op(HEADS, tables_of(part)), given)
    assert [y.shape for y in outputs] == [(3, 0, heads, 6) for heads in HEADS]
    assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, given))


def test_values_are_left_where_they_lie():
    x, *weights = inputs("norm, rotary")
    v = op(HEADS, table(6))(x, *weights)[2]
    assert v.data_ptr() == x[:, :, 6:].data_ptr() and v.stride() == x.stride()
    assert all(part.data_ptr() == plain.data_ptr() for part, plain in zip(op(HEADS)(x), x.split(HEADS, 2)))


@pytest.mark.triton
@pytest.mark.parametrize("sizes", [HEADS, (1, 1, 1)])
@pytest.mark.parametrize("joined", [True, False, "expanded", "swapped"])
def test_gradients_of_views_are_joined_without_a_copy_where_they_lie_together(joined, sizes):
    x = torch.randn(2, 3, sum(sizes), 5, requires_grad=True)
    whole = torch.randn(x.shape)
    grads = list(whole.split(sizes, 2))
    if joined == "expanded":
        grads = [grad[..., :1].expand(grad.shape) for grad in grads]
    elif joined == "swapped":
        grads = [grads[0], grads[2], grads[1]]
    elif not joined:
        grads = [grad.clone() for grad in grads]
    grad, = torch.autograd.grad(op(list(sizes))(x), x, grads)
    assert torch.equal(grad, torch.cat(grads, 2))
    assert (grad.data_ptr() == whole.data_ptr()) == (joined is True)


def test_frozen_weights_and_one_output_alone():
    x, *weights = inputs("norm, rotary")
    x.requires_grad_()
    for used in range(3):
        grad, = torch.autograd.grad(op(HEADS, table(6))(x, *weights)[used].square().sum(), x)
        leaf = x.detach().double().requires_grad_()
        expected, = torch.autograd.grad(formula(HEADS, table(6))(leaf, *(w.double() for w in weights))[used]
                                        .square().sum(), leaf)
        assert_close(grad, expected, 1e-5)


def test_positions_that_are_not_in_the_tables_give_nan_or_an_error():
    x, *weights = inputs("norm, rotary")
    if kernels.explain()["split_heads"][0] == "triton":
        q, k, v = op(HEADS, table(6), torch.tensor([0, 1, 9, 2, -1, 3, 4]))(x, *weights)
        assert all(y[:, [2, 4]].isnan().all() and y[:, [0, 1, 3, 5, 6]].isfinite().all() for y in (q, k))
    else:
        with pytest.raises(IndexError):
            op(HEADS, table(6), torch.tensor([0, 1, 9, 2, 1, 3, 4]))(x, *weights)


@pytest.mark.triton
@pytest.mark.parametrize("part", ["norm", "norm, rotary"])
def test_opcheck(part):
    from kernels.split_heads import backward, forward

    x, *weights = inputs(part)
    tables = (None, None) if tables_of(part) is None else [y.float() for y in table(6)]
    torch.library.opcheck(forward, (x, *weights, *tables, None, 4, 2, EPS))
    for of_weights in (True, False):
        torch.library.opcheck(backward, (*x.split(HEADS, 2), x, *weights, *tables, POSITIONS[1], EPS, of_weights))


@pytest.mark.parametrize("part", ["views", "norm, rotary"])
def test_a_compiled_caller_is_one_graph(part):
    tables = tables_of(part)
    compiled = torch.compile(op(HEADS, tables), fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (3, 2):
        given = inputs(part, B=B)
        actual, actual_grads, grads = run_op(compiled, given)
        expected, expected_grads, _ = run_op(op(HEADS, tables), given, grads)
        for pair in zip(actual + actual_grads, expected + expected_grads, strict=True):
            assert_close(*pair, 1e-6)


@pytest.mark.triton
def test_a_second_derivative_is_refused():
    x, *weights = inputs("norm, rotary")
    x.requires_grad_()
    grad, = torch.autograd.grad(op(HEADS, table(6))(x, *weights)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*kernels\.use\('reference'\) has one"):
        grad.sum().backward()


X, W, COS = torch.zeros(2, 7, 8, 6), torch.ones(6), torch.ones(9, 3)


@pytest.mark.parametrize("given, message", [
    (dict(x=X[0]), r"split_heads takes x \(B, T, H \+ 2 H_kv, D\) and heads \(H, H_kv, H_kv\), not \(7, 8, 6\) and"),
    (dict(heads=(4, 2)), r"not \(2, 7, 8, 6\) and \(4, 2\)"),
    (dict(heads=(4, 1, 3)), r"and \(4, 1, 3\)"),
    (dict(heads=(4, 4, 4)), r"and \(4, 4, 4\)"),
    (dict(heads=(8, 0, 0)), r"and \(8, 0, 0\)"),
    (dict(q_weight=W), "q_weight and k_weight go together; give both or neither"),
    (dict(sin=COS), "cos and sin go together; give both or neither"),
    (dict(q_weight=W, k_weight=W[1:]), r"split_heads: k_weight \(5,\) must be \(6,\)"),
    (dict(q_weight=W, k_weight=W, eps=-1.0), "split_heads: eps = -1.0 is not a finite number"),
    (dict(cos=COS, sin=COS[:, :2]), r"split_heads: cos \(9, 3\) and sin \(9, 2\) must be \(N, D/2\)"),
    (dict(cos=COS[:6], sin=COS[:6]), "split_heads: 7 tokens, and cos and sin for 6 positions"),
    (dict(cos=COS, sin=COS, positions=torch.zeros(7)), r"split_heads: positions \(7,\) torch.float32 must be"),
    (dict(x=[0]), r"split_heads: x = \[0\] is list, not a tensor"),
], ids=str)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        kernels.split_heads(**dict(x=X, heads=HEADS) | given)


@pytest.mark.triton
def test_float64_is_not_taken():
    with pytest.raises(ValueError, match=r"split_heads: x is torch\.float64; the Triton kernels take"):
        kernels.split_heads(X.double(), HEADS)
