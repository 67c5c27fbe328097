"""What both norms promise: which arguments they take, and how their kernels behave under autograd and torch.compile."""

import pytest
import torch
from compare import assert_close, check_op, run_op

import kernels
from kernels import reference

EPS = 0.1
PARAMETERS = {"layer_norm": ("weight", "bias"), "rms_norm": ("weight",)}
both = pytest.mark.parametrize("name", PARAMETERS)


def on(module, name):
    """The norm as a function of (x, residual, parameters...), each of which may be None."""
    return lambda x, residual, *parameters: getattr(module, name)(x, *parameters, EPS, residual)


def random(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def arguments(name, rows=5, width=24, dtype=torch.float32):
    return random((rows, width), (rows, width), *[(width,)] * len(PARAMETERS[name]), dtype=dtype)


BAD = {
    "no dimension": (dict(x=torch.zeros(())), r"x \(\) must be \(\.\.\., C\) with C from 1 to 65536"),
    "no width": (dict(x=torch.zeros(3, 0)), r"x \(3, 0\) must be \(\.\.\., C\) with C from 1 to 65536"),
    "too wide": (dict(x=torch.zeros(1, 65537)), r"x \(1, 65537\) must be"),
    "integers": (dict(x=torch.zeros(3, 4, dtype=torch.int64)), r"x is torch\.int64.*one of torch\.float32, "),
    "weight's shape": (dict(weight=torch.ones(3)), r"weight \(3,\) must be \(4,\), as x is \(3, 4\)"),
    "weight's dtype": (dict(weight=torch.ones(4, dtype=torch.float64)), r"weight is torch\.float64, x torch\.float32"),
    "weight's device": (dict(weight=torch.ones(4, device="meta")), r"weight is on meta, x on cpu"),
    "residual's shape": (dict(residual=torch.zeros(1, 4)), r"residual \(1, 4\) must be \(3, 4\)"),
    "eps": (dict(eps=-1e-5), r"eps = -1e-05 is not a finite number of 0 or more"),
    "eps is no number": (dict(eps="a"), r"eps = 'a' is str, not a number"),
    "x is no tensor": (dict(x=[1.0]), r"x = \[1\.0\] is list, not a tensor"),
    "weight is no tensor": (dict(weight=1.0), r"weight = 1\.0 is float, not a tensor or None"),
    "eps is NaN": (dict(eps=float("nan")), r"eps = nan is not"),
}


@both
@pytest.mark.parametrize("case", BAD)
def test_bad_input(name, case):
    changed, message = BAD[case]
    given = dict(x=torch.zeros(3, 4), eps=EPS, **dict.fromkeys(PARAMETERS[name])) | changed
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        getattr(kernels, name)(**given)


def test_a_bias_that_does_not_fit():
    with pytest.raises(ValueError, match=r"layer_norm: bias \(5,\) must be \(4,\)"):
        kernels.layer_norm(torch.zeros(3, 4), None, torch.zeros(5), EPS)


@both
def test_the_sum_is_rounded_as_the_reference_does(name):
    inputs = arguments(name, dtype=torch.bfloat16)
    assert torch.equal(on(kernels, name)(*inputs)[1], on(reference, name)(*inputs)[1])


@both
@pytest.mark.parametrize("width", [24, 5000])
@pytest.mark.parametrize("wide", ["x", "residual"])
def test_the_sum_is_as_wide_as_the_wider_of_its_terms(name, wide, width):
    """The norm and each gradient keep the dtypes of what they belong to: a branch in bfloat16, a stream in float32."""
    inputs = arguments(name, width=width)
    inputs[wide == "x"] = inputs[wide == "x"].bfloat16()
    actual, actual_grads, grads = run_op(on(kernels, name), inputs)
    expected, expected_grads, _ = run_op(on(reference, name), inputs, grads)
    assert [y.dtype for y in actual] == [y.dtype for y in expected] == [inputs[0].dtype, torch.float32]
    for x, *pair in zip(inputs, actual_grads, expected_grads, strict=True):
        assert pair[0].dtype == pair[1].dtype == x.dtype
    for pair in zip(actual + actual_grads, expected + expected_grads, strict=True):
        assert_close(*pair, 1e-5 if pair[0].dtype == torch.float32 else 0.02)


@both
def test_two_low_precisions_have_a_sum_in_float32(name):
    x, residual, *parameters = arguments(name)
    inputs = [x.bfloat16(), residual.half(), *parameters]
    actual, actual_grads, grads = run_op(on(kernels, name), inputs)
    expected, expected_grads, _ = run_op(on(reference, name), inputs, grads)
    for pair in zip(actual + actual_grads, expected + expected_grads, strict=True):
        assert pair[0].dtype == pair[1].dtype
        assert_close(*pair, 0.02)


@both
def test_autocast_leaves_the_dtype(name):
    with torch.autocast("cpu", torch.bfloat16):
        assert {y.dtype for y in on(kernels, name)(*arguments(name))} == {torch.float32}


@both
def test_no_rows(name):
    inputs = arguments(name, rows=0)
    outputs, grads, _ = run_op(on(kernels, name), inputs)
    assert [y.shape for y in outputs] == [(0, 24)] * 2
    assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, inputs))


@both
def test_more_rows_than_programs(name):
    check_op(on(kernels, name), on(reference, name), arguments(name, rows=700), 1e-5)


@both
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_has_gradients(name, used):
    """The other's incoming gradient is then None."""
    x, residual, *parameters = arguments(name)
    parameters = [p.requires_grad_() for p in parameters]

    def alone(module):
        return lambda *rows: on(module, name)(*rows, *parameters)[used]

    _, actual, grads = run_op(alone(kernels), [x, residual])
    _, expected, _ = run_op(alone(reference), [x, residual], grads)
    for pair in zip(actual, expected, strict=True):
        assert_close(*pair, 1e-5)


@both
def test_frozen_parameters_get_no_gradient(name):
    x, residual, *parameters = arguments(name)
    x.requires_grad_()
    on(kernels, name)(x, residual, *parameters)[0].sum().backward()
    assert x.grad.any() and all(p.grad is None for p in parameters)


@both
def test_slices_of_rows_and_parameters_out_of_step(name):
    wide, longer, *parameters = arguments(name, width=60)
    inputs = [wide[:, 7:31], longer[:, 30:54], *(p[::2][:24] for p in parameters)]
    packed = [x.clone() for x in inputs]
    actual, actual_grads, grads = run_op(on(kernels, name), inputs)
    expected, expected_grads, _ = run_op(on(kernels, name), packed, grads)
    assert all(map(torch.equal, actual + actual_grads, expected + expected_grads))


@pytest.mark.triton
def test_rows_that_are_contiguous_are_not_copied():
    from kernels.norm import rows_of

    x = torch.zeros(4, 3, 40)
    assert rows_of(x[..., 8:16]).data_ptr() == x[..., 8:16].data_ptr()
    assert rows_of(x[..., ::2]).stride() == (20, 1)


@pytest.mark.triton
@both
def test_offsets_over_2_31_elements(name, monkeypatch):
    """Rows 2^30 elements apart, in memory of which the system hands out only the pages that are touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    packed = arguments(name, rows=3, dtype=torch.bfloat16)
    spread = [torch.empty((1 << 31) + 24, dtype=torch.bfloat16).as_strided((3, 24), (1 << 30, 1)).copy_(x)
              for x in packed[:2]]
    grads = random((3, 24), (3, 24), dtype=torch.bfloat16)
    far = torch.empty((1 << 31) + 24, dtype=torch.bfloat16).as_strided((3, 24), (1 << 30, 1)).copy_(grads[0])
    actual, actual_grads, _ = run_op(on(kernels, name), [*spread, *packed[2:]], [far, grads[1]])
    expected, expected_grads, _ = run_op(on(kernels, name), packed, grads)
    assert all(map(torch.equal, actual + actual_grads, expected + expected_grads))


@pytest.mark.triton
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("given", ["", "weight", "bias residual", "weight bias residual"])
def test_opcheck(centred, given):
    from kernels.norm import norm, norm_backward

    rows, residual, weight, bias = arguments("layer_norm")
    inputs = [rows, weight if "weight" in given else None, bias if "bias" in given else None,
              residual if "residual" in given else None, EPS, centred]
    y, total, mean, rstd = norm(*inputs)
    for narrow_dtype in (None, torch.bfloat16):
        torch.library.opcheck(norm_backward, (y, None if inputs[3] is None else total, rows, *inputs[1:3], mean, rstd,
                                              centred, "weight" in given, narrow_dtype))
    torch.library.opcheck(norm, [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs])


@both
def test_a_compiled_caller_is_one_graph(name):
    compiled = torch.compile(on(kernels, name), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 7):
        inputs = arguments(name, rows=rows)
        actual, actual_grads, grads = run_op(compiled, inputs)
        expected, expected_grads, _ = run_op(on(kernels, name), inputs, grads)
        for pair in zip(actual + actual_grads, expected + expected_grads, strict=True):
            assert_close(*pair, 1e-6)


@pytest.mark.triton
@both
def test_a_second_derivative_is_refused(name):
    x, _, *parameters = arguments(name)
    x.requires_grad_()
    grad, = torch.autograd.grad(on(kernels, name)(x, None, *parameters).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; kernels\.use\('reference'\) has one"):
        grad.sum().backward()
    with kernels.use("reference"):
        assert torch.autograd.gradgradcheck(lambda x: on(kernels, name)(x, None, *(p.double() for p in parameters)),
                                            x.detach().double().requires_grad_())
