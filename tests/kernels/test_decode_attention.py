"""Decoding attends as attention's last query does, row by row, whatever else lies in the cache or the batch."""

import pytest
import torch
from compare import STRIDES, assert_close, assert_error_ratio, with_strides

import kernels


def tensors(B=3, S=9, H=4, H_kv=2, D=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(shape, generator=generator).to(dtype) for shape in ((B, H, D), *[(B, S, H_kv, D)] * 2)]


def formula(q, k, v, lengths, window=None, scale=None):
    """Query by query, in float64."""
    out, group = torch.zeros(q.shape, dtype=torch.float64), q.shape[1] // k.shape[2]
    for b, length in enumerate(lengths.tolist()):
        seen = range(max(0, length - (window or length)), length)
        for h in range(q.shape[1] if length else 0):
            scores = k[b, seen, h // group].double() @ q[b, h].double()
            weights = (scores * (q.shape[2] ** -0.5 if scale is None else scale)).softmax(0)
            out[b, h] = weights @ v[b, seen, h // group].double()
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("lengths", [[9, 9, 9], [1, 5, 9], [0, 8, 3]], ids=str)
def test_rows_of_their_own_length(lengths, window):
    given = [*tensors(), torch.tensor(lengths)]
    copies = [x.clone() for x in given]
    y = kernels.decode_attention(*given, window=window)
    assert_close(y, formula(*given, window=window), 1e-5)
    assert all(map(torch.equal, given, copies)) and y.dtype == torch.float32
    assert not y[torch.tensor(lengths) == 0].any()


@pytest.mark.parametrize("H, H_kv", [(1, 1), (4, 4), (6, 1), (40, 2)])
@pytest.mark.parametrize("D", [1, 16, 80])
def test_heads(H, H_kv, D):
    given = [*tensors(B=2, H=H, H_kv=H_kv, D=D), torch.tensor([7, 9], dtype=torch.int32)]
    assert_close(kernels.decode_attention(*given), formula(*given), 1e-5)


@pytest.mark.parametrize("window", [None, 300, 20])
def test_many_keys(window):
    """More than one split of the Triton kernel, its edges among the lengths."""
    lengths = torch.tensor([1, 255, 256, 257, 512, 600, 700])
    given = [*tensors(B=7, S=700, H=2, H_kv=1, D=16), lengths]
    assert_close(kernels.decode_attention(*given, window=window), formula(*given, window=window), 1e-5)


def test_it_is_the_last_query_of_attention():
    q, k, v = tensors()
    y = kernels.decode_attention(q, k, v, torch.tensor([9, 9, 9]), scale=0.3)
    assert_close(y, kernels.attention(q[:, None], k, v, causal=True, scale=0.3)[:, 0], 1e-5)


def test_the_cache_beyond_a_length_is_not_read():
    q, k, v = tensors()
    lengths = torch.tensor([3, 0, 7])
    clean = kernels.decode_attention(q, k, v, lengths, window=2)
    for row, length in enumerate(lengths.tolist()):
        for cache in (k, v):
            cache[row, length:] = torch.nan
            cache[row, :max(0, length - 2)] = torch.nan
    assert torch.equal(kernels.decode_attention(q, k, v, lengths, window=2), clean)


def test_a_row_is_the_same_in_any_batch():
    given = [*tensors(B=5, S=300), torch.tensor([300, 3, 256, 270, 10])]
    together = kernels.decode_attention(*given)
    for row in range(5):
        assert torch.equal(kernels.decode_attention(*(x[row:row + 1] for x in given))[0], together[row])
    longer = [torch.cat((x, torch.full_like(x, torch.nan)), 1) for x in given[1:3]]
    assert torch.equal(kernels.decode_attention(given[0], *longer, given[3]), together)


@pytest.mark.parametrize("kind", STRIDES)
def test_strides_are_free(kind):
    given = [with_strides(x, kind) for x in tensors()]
    lengths = torch.tensor([9, 4, 2])
    assert_close(kernels.decode_attention(*given, lengths), formula(*given, lengths), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_plain_pytorch(dtype):
    q, k, v = tensors(B=8, S=65, H=4, H_kv=4, D=32, dtype=dtype)
    lengths = torch.full((8,), 65)
    plain = torch.einsum("bhs,bshd->bhd", (torch.einsum("bhd,bshd->bhs", q, k) * 32 ** -0.5).softmax(-1), v)
    assert_error_ratio(kernels.decode_attention(q, k, v, lengths), plain, formula(q, k, v, lengths))


@pytest.mark.parametrize("change, message", [
    (dict(q=torch.zeros(3, 5, 6)), r"takes q \(B, H, D\) and caches \(B, S, H_kv, D\) with H a multiple of H_kv, not"),
    (dict(k=torch.zeros(3, 9, 2, 7)), r"not \(3, 4, 6\), \(3, 9, 2, 7\)"),
    (dict(v=torch.zeros(3, 9, 2, 6).half()), "v_cache is torch.float16, q torch.float32; all must be"),
    (dict(lengths=torch.zeros(2).long()), r"lengths \(2,\) torch.int64 on cpu must be \(3,\) integers on cpu"),
    (dict(lengths=torch.zeros(3)), r"lengths \(3,\) torch.float32"),
    (dict(lengths=[1, 2, 3]), r"lengths = \[1, 2, 3\] is list, not a tensor"),
    (dict(window=0), "window = 0; the least is 1"),
    (dict(window=2.0), "window = 2.0 is float, not a whole number or None"),
    (dict(scale=-1.0), "scale = -1.0 is not between 0 and 1e"),
])
def test_arguments_that_do_not_fit_are_named(change, message):
    q, k, v = tensors()
    given = dict(q=q, k=k, v=v, lengths=torch.tensor([1, 2, 3])) | change
    arguments = [given.pop(name) for name in ("q", "k", "v", "lengths")]
    with pytest.raises(ValueError, match=f"^decode_attention:? .*{message}"):
        kernels.decode_attention(*arguments, **given)


@pytest.mark.triton
def test_as_an_op():
    from kernels.decode_attention import op

    given = [*tensors(), torch.tensor([1, 5, 9])]
    torch.library.opcheck(op, (*given, 4, 0.5))
    compiled = torch.compile(lambda *x: kernels.decode_attention(*x, window=4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), kernels.decode_attention(*given, window=4))
    with pytest.raises(ValueError, match="a head size of 257; the Triton kernels take 1 to 256"):
        kernels.decode_attention(*tensors(D=257), given[3])


@pytest.mark.triton
def test_a_gradient_is_refused():
    q, cache = torch.ones(1, 2, 4, requires_grad=True), torch.ones(1, 3, 2, 4)
    with pytest.raises(RuntimeError, match=r"no gradient in Triton; kernels\.use\('reference'\) has one"):
        kernels.decode_attention(q, cache, cache, torch.tensor([2])).sum().backward()


def test_lengths_out_of_range_are_the_nearest_in_it():
    q, cache = torch.randn(2, 2, 4), torch.randn(2, 3, 2, 4)
    y = kernels.decode_attention(q, cache, cache, torch.tensor([-1, 9]))
    assert not y[0].any() and torch.equal(y, kernels.decode_attention(q, cache, cache, torch.tensor([0, 3])))
