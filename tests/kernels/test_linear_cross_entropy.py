"""The fused head and loss equals an explicit float64 formula: ignored targets, smoothing, z-loss, softcap, reductions.

torch's own cross_entropy is a second oracle for what it covers.
"""

import importlib
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
import torch.utils._python_dispatch
from compare import STRIDES, assert_close, check_error_ratio, check_op, run_op, with_strides

import kernels
from kernels import reference

N, C, V = 13, 6, 11


def formula(targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean"):
    """Target by target: (1 - e) (lse - z_y) + e (lse - mean z) + z_loss lse²."""
    def loss(hidden, weight):
        losses = []
        for h, y in zip(hidden.reshape(-1, C), targets.flatten().tolist()):
            z = (weight * h).sum(-1)                                                # (V,)
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            lse = z.exp().sum().log()
            if y == ignore_index:
                losses.append(0 * lse)
            else:
                losses.append((1 - label_smoothing) * (lse - z[y]) + label_smoothing * (lse - z.mean())
                              + z_loss * lse ** 2)
        losses = torch.stack(losses)
        if reduction == "none":
            return losses.reshape(targets.shape)
        return losses.sum() / (1 if reduction == "sum" else max(1, int((targets != ignore_index).sum())))
    return loss


def hidden_and_weight(shape=(N,), dtype=torch.float32):
    torch.manual_seed(0)
    return [2 * torch.randn(*shape, C).to(dtype), torch.randn(V, C).to(dtype)]


def some_targets(shape=(N,), ignored=-100):
    targets = torch.randint(0, V, shape, generator=torch.Generator().manual_seed(1))
    targets.view(-1)[1::3] = ignored
    return targets


def op(targets, **options):
    return lambda hidden, weight: kernels.linear_cross_entropy(hidden, weight, targets, **options)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("label_smoothing, z_loss, softcap", [*itertools.product([0.0, 0.2], [0.0, 0.1], [None, 3.0])])
def test_values_and_gradients(label_smoothing, z_loss, softcap, reduction):
    options = dict(label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, reduction=reduction)
    check_op(op(some_targets(), **options), formula(some_targets(), **options), hidden_and_weight(), 3e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_equals_torch_cross_entropy(reduction, label_smoothing):
    targets = some_targets()
    options = dict(reduction=reduction, label_smoothing=label_smoothing)
    check_op(op(targets, **options), lambda hidden, weight: F.cross_entropy(hidden @ weight.mT, targets, **options),
             hidden_and_weight(), 3e-6)


def test_mean_is_the_default_and_ignore_index_is_free():
    targets = some_targets(ignored=4)
    check_op(op(targets, ignore_index=4), formula(targets, ignore_index=4, reduction="mean"), hidden_and_weight(), 3e-6)


@pytest.mark.parametrize("kind", STRIDES)
def test_any_leading_shape_and_strides(kind):
    shape = (3, 5)
    targets = some_targets(shape).mT.contiguous().mT
    for reduction in ("sum", "none"):
        check_op(op(targets, reduction=reduction), formula(targets, reduction=reduction),
                 [with_strides(x, kind) for x in hidden_and_weight(shape)], 3e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("size", [N, 0])
def test_nothing_to_predict_gives_zero_and_zero_gradients(size, reduction):
    targets = torch.full((size,), -100)
    (loss,), grads, _ = run_op(op(targets, reduction=reduction, z_loss=0.1, label_smoothing=0.1),
                               hidden_and_weight((size,)))
    assert (loss == 0).all() and loss.shape == (targets.shape if reduction == "none" else ())
    assert all((grad == 0).all() for grad in grads)


def test_ignored_rows_have_no_gradient_and_no_say():
    hidden, weight = hidden_and_weight()
    targets = some_targets()
    ignored = targets == -100
    _, (grad, _), _ = run_op(op(targets, z_loss=0.1, label_smoothing=0.1, reduction="sum"), [hidden, weight])
    assert (grad[ignored] == 0).all() and (grad[~ignored] != 0).any(-1).all()
    other = torch.where(ignored[:, None], 7.0, hidden)
    assert torch.equal(op(targets)(hidden, weight), op(targets)(other, weight))


def test_large_logits_stay_finite():
    hidden, weight = hidden_and_weight()
    loss = kernels.linear_cross_entropy(1e4 * hidden, weight, some_targets())
    assert_close(loss, F.cross_entropy(1e4 * hidden.double() @ weight.double().mT, some_targets()), 1e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bfloat16_is_as_exact_as_plain_pytorch(softcap):
    def plain(hidden, weight):
        z = hidden @ weight.mT
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return F.cross_entropy(z.float(), some_targets())

    check_error_ratio(op(some_targets(), softcap=softcap), plain, formula(some_targets(), softcap=softcap),
                      hidden_and_weight(dtype=torch.bfloat16))


def test_float32_weight_with_bfloat16_hidden_keeps_its_dtype():
    hidden, weight = hidden_and_weight()
    weight.requires_grad_()
    loss = kernels.linear_cross_entropy(hidden.bfloat16(), weight, some_targets())
    loss.backward()
    assert loss.dtype == torch.float32 and weight.grad.dtype == torch.float32
    assert_close(loss, formula(some_targets())(hidden.double(), weight.double()), 0.02)


@pytest.mark.parametrize("rows_at_a_time", [1, 5, 13])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_chunks_change_nothing(monkeypatch, rows_at_a_time, reduction):
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(reference, "CHUNK_ROWS", rows_at_a_time)
    options = dict(label_smoothing=0.1, z_loss=0.1, softcap=3.0, reduction=reduction)
    check_op(op(some_targets(), **options), formula(some_targets(), **options), hidden_and_weight(), 3e-6)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(frozen):
    gradients = []
    for frozen_now in (None, frozen):
        inputs = [x.requires_grad_(number != frozen_now) for number, x in enumerate(hidden_and_weight())]
        kernels.linear_cross_entropy(*inputs, some_targets(), reduction="sum").backward()
        gradients.append([x.grad for x in inputs])
    assert gradients[1][frozen] is None
    assert torch.equal(gradients[0][1 - frozen], gradients[1][1 - frozen]) and gradients[0][1 - frozen].abs().sum() > 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_made_without_need(monkeypatch, mode):
    """Regression: evaluation under no_grad paid for both gradients, 2.5 times the time of the loss alone."""
    inputs = [x.requires_grad_() for x in hidden_and_weight()]
    expected = op(some_targets())(*inputs)

    def refuse(*_):
        raise AssertionError("a gradient was made")

    if kernels.explain()["linear_cross_entropy"][0] == "triton":
        monkeypatch.setattr(sys.modules["kernels.linear_cross_entropy"], "add_product", refuse)
    else:
        monkeypatch.setattr(torch.Tensor, "scatter_add_", refuse)
    with mode():
        assert torch.equal(op(some_targets())(*inputs), expected)
    with pytest.raises(AssertionError, match="a gradient was made"):
        op(some_targets())(*inputs)


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    hidden, weight = (x.requires_grad_() for x in hidden_and_weight())
    with torch.autocast("cpu", torch.bfloat16):
        loss = kernels.linear_cross_entropy(hidden, weight, some_targets(), reduction="sum")
    expected = F.cross_entropy((hidden.bfloat16() @ weight.bfloat16().T).float(), some_targets(), reduction="sum")
    exact = kernels.linear_cross_entropy(hidden, weight, some_targets(), reduction="sum")
    assert loss.dtype is torch.float32 and abs(loss - expected) < 1e-6 * expected < 1e-2 * abs(exact - expected)
    loss.backward()
    assert hidden.grad.dtype is weight.grad.dtype is torch.float32 and weight.grad.abs().sum() > 1


@pytest.mark.parametrize("change, message", [
    (dict(hidden=torch.zeros(3, 7)), r"takes hidden \(..., C\), weight \(V, C\) and targets \(...\), not \(3, 7\), "),
    (dict(weight=torch.zeros(6)), "takes hidden"),
    (dict(weight=torch.zeros(0, 6)), "takes hidden"),
    (dict(targets=torch.zeros(4, dtype=torch.int64)), "takes hidden"),
    (dict(hidden=[1.0]), r"hidden = \[1.0\] is list, not a tensor"),
    (dict(hidden=torch.zeros(3, 6, dtype=torch.int64)), "hidden is torch.int64; it must be floating"),
    (dict(targets=torch.zeros(3, dtype=torch.int32)), "targets are torch.int32; they must be torch.int64"),
    (dict(targets=torch.zeros(3, dtype=torch.int64, device="meta")), "targets is on meta, hidden on cpu"),
    (dict(label_smoothing=1.5), r"label_smoothing = 1.5 is not in \[0, 1\]"),
    (dict(label_smoothing=None), "label_smoothing = None is NoneType, not a number"),
    (dict(z_loss=-1.0), "z_loss = -1.0 is not a finite number of 0 or more"),
    (dict(softcap=0.0), "softcap = 0.0 is not a finite number above 0"),
    (dict(ignore_index=1.0), "ignore_index = 1.0 is float, not a whole number"),
    (dict(reduction="max"), "reduction 'max' is none of: sum, mean, none"),
])
def test_arguments_that_do_not_fit_are_named(change, message):
    given = dict(hidden=torch.zeros(3, 6), weight=torch.zeros(11, 6), targets=torch.zeros(3, dtype=torch.int64))
    given |= change
    with pytest.raises(ValueError, match=f"^linear_cross_entropy:? {message}"):
        kernels.linear_cross_entropy(given.pop("hidden"), given.pop("weight"), given.pop("targets"), **given)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_second_derivative_is_refused(reduction):
    inputs = [x.requires_grad_() for x in hidden_and_weight()]
    loss = kernels.linear_cross_entropy(*inputs, some_targets(), reduction=reduction).square().sum()
    grad, *_ = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|no second derivative"):
        grad.sum().backward()


@pytest.fixture
def module():
    return importlib.import_module("kernels.linear_cross_entropy")


@pytest.fixture
def small_pieces(monkeypatch, module):
    """Blocks, slabs and chunks so small that 13 rows of 11 logits fill several of each."""
    for name, value in dict(BLOCK=4, LEAST_ROWS=2, SLAB_BYTES=1, CHUNK_ROWS=6, ROW_ALIGNMENT=4).items():
        monkeypatch.setattr(module, name, value)


@pytest.mark.triton
@pytest.mark.parametrize("V", [11, 8, 3])
@pytest.mark.parametrize("options", [dict(reduction="sum"), dict(label_smoothing=0.2, z_loss=0.1, softcap=3.0),
                                     dict(label_smoothing=0.2, reduction="none")], ids=str)
def test_blocks_slabs_and_chunks_change_nothing(small_pieces, V, options):
    hidden, weight = hidden_and_weight()
    targets = some_targets()
    targets[targets >= V] = 2
    check_op(op(targets, **options), formula(targets, **options), [hidden, weight[:V]], 3e-6)


@pytest.mark.triton
def test_the_logits_never_exist_in_full(small_pieces, monkeypatch):
    sizes = []

    class Sized(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **options or {})
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    hidden, weight = (x.requires_grad_() for x in hidden_and_weight())
    with Sized():
        kernels.linear_cross_entropy(hidden, weight, some_targets(), reduction="sum").backward()
    assert max(sizes) == max(6 * 12, N * C)             # a chunk's padded logits, and the gradient of hidden


@pytest.mark.triton
def test_a_target_beyond_the_vocabulary_makes_the_loss_nan():
    """On a GPU a look at the targets would wait for them; a loss that is not finite is seen by every training loop."""
    for bad in (V, -1, -101):
        targets = some_targets()
        targets[0] = bad
        losses = kernels.linear_cross_entropy(*hidden_and_weight(), targets, reduction="none")
        assert losses[0].isnan() and losses[1:].isfinite().all()


@pytest.mark.triton
def test_logits_that_are_not_finite_show_where_they_count():
    hidden, weight = hidden_and_weight()
    targets = some_targets()
    hidden[0] = torch.nan
    for row, value in ((0, True), (1, False)):
        hidden[row] = torch.nan
        losses = kernels.linear_cross_entropy(hidden, weight, targets, reduction="none")
        assert losses[row].isnan().item() is value      # the second target is ignored
    _, (grad, _), _ = run_op(op(targets, reduction="none"), [hidden, weight])
    assert not grad[1].any() and grad[0].isnan().all()


@pytest.mark.triton
def test_float16_is_as_exact_as_plain_pytorch(module):
    targets = some_targets()

    def plain(hidden, weight):
        return F.cross_entropy((hidden @ weight.mT).float(), targets, reduction="sum").to(hidden.dtype)

    check_error_ratio(lambda *x: op(targets, reduction="sum")(*x).to(torch.float16), plain,
                      formula(targets, reduction="sum"), hidden_and_weight(dtype=torch.float16))


@pytest.mark.triton
def test_opcheck(module):
    hidden, weight = (x.requires_grad_() for x in hidden_and_weight())
    targets, settings = some_targets(), (-100, 0.1, 0.1, 3.0)
    torch.library.opcheck(module.loss_sum, (hidden, weight, targets, *settings, True, True))
    torch.library.opcheck(module.loss_each, (hidden, weight, targets, *settings))
    torch.library.opcheck(module.backward, (torch.randn(N), hidden.detach(), weight.detach(), targets, *settings, True,
                                            False))


@pytest.mark.triton
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_caller_is_one_graph(reduction):
    compiled = torch.compile(op(some_targets(), reduction=reduction), fullgraph=True, backend="aot_eager")
    actual, actual_grads, grads = run_op(compiled, hidden_and_weight())
    expected, expected_grads, _ = run_op(op(some_targets(), reduction=reduction), hidden_and_weight(), grads)
    for pair in zip(actual + actual_grads, expected + expected_grads, strict=True):
        assert_close(*pair, 1e-6)


@pytest.mark.triton
def test_float64_is_refused():
    hidden, weight = hidden_and_weight(dtype=torch.float64)
    with pytest.raises(ValueError, match="hidden is torch.float64; the Triton kernel takes torch.float32, "):
        kernels.linear_cross_entropy(hidden, weight, some_targets())


@pytest.mark.parametrize("dtype, factor", [(torch.float16, 65536.0), (torch.bfloat16, 1.5038)])
def test_the_incoming_gradient_is_not_rounded_to_16_bits(dtype, factor):
    """Regression: a loss scale of 65536 overflowed in float16; in bfloat16 this one became 1.5, 0.25 % less."""
    targets = some_targets()
    hidden, weight = (x / 16 for x in hidden_and_weight(dtype=dtype))
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(formula(targets, reduction="sum")(*exact) * factor, exact)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    actual = torch.autograd.grad(kernels.linear_cross_entropy(*leaves, targets, reduction="sum") * factor, leaves)
    for ours, theirs in zip(actual, expected, strict=True):
        size = (ours.double() * theirs).sum() / theirs.square().sum()      # 1 but for roundings that are not alike
        assert ours.dtype == dtype and abs(size.item() - 1) < 0.0015
