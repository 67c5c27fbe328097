"""Attention equals a float64 formula, mask by mask, with its gradients; rows that see no key give zeros."""

import itertools

import pytest
import torch
from compare import STRIDES, assert_close, check_error_ratio, check_op, rms, run_op, with_strides
from marks import slow

import kernels


def visible(B, T, S, causal, window, document_ids):
    """(B, 1, T, S), key by key as the definition says it."""
    mask = torch.zeros(B, 1, T, S, dtype=torch.bool)
    ids = document_ids if document_ids is None else document_ids.tolist()
    for b, i, j in itertools.product(range(B), range(T), range(S)):
        mask[b, 0, i, j] = ((not causal or j <= i + S - T)
                            and (window is None or i + S - T - j < window)
                            and (ids is None or ids[b][i] == ids[b][j]))
    return mask


def formula(q, k, v, *, causal, window=None, document_ids=None, scale=None):
    mask = visible(*q.shape[:2], k.shape[1], causal, window, document_ids)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    weights = torch.where(mask, scores, -1e9).softmax(-1) * mask                    # (B, H, T, S)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def qkv(B=2, T=7, S=7, H=4, H_kv=4, D=5, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [2 * torch.randn(B, length, heads, D).to(dtype) for length, heads in ((T, H), (S, H_kv), (S, H_kv))]


def check(inputs, **options):
    check_op(lambda q, k, v: kernels.attention(q, k, v, **options),
             lambda q, k, v: formula(q, k, v, **options), inputs, 5e-5)


DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 5]])


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T, S", [
    (3, 7), (7, 3), (1, 1), (33, 17), slow(7, 7), slow(1, 6), slow(5, 1)])
def test_masks(T, S, causal, window):
    check(qkv(B=1, T=T, S=S, H=2, H_kv=2), causal=causal, window=window)


@pytest.mark.parametrize("window", [6, 7, 8])
def test_windows_about_as_long_as_the_text(window):
    check(qkv(), causal=True, window=window)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_do_not_see_one_another(causal, window):
    check(qkv(), causal=causal, window=window, document_ids=DOCUMENTS)


@pytest.mark.parametrize("H, H_kv", [(4, 2), (6, 2), (4, 1), (1, 1), (3, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_and_multi_query_heads(H, H_kv, causal):
    check(qkv(B=1, H=H, H_kv=H_kv, S=9), causal=causal)


@pytest.mark.parametrize("scale", [0.1, 2.0, -0.3, 0.0])
def test_scale(scale):
    check(qkv(), causal=True, scale=scale)


@pytest.mark.parametrize("kinds", [*itertools.product(STRIDES[1:], repeat=3)][::5], ids="-".join)
def test_strides_are_free(kinds):
    check([with_strides(x, kind) for x, kind in zip(qkv(S=9), kinds)], causal=True)


@pytest.mark.parametrize("options", [dict(causal=True), dict(causal=False, window=1)], ids=str)
def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient(options):
    """With T = 7 and S = 3 the first four queries stand before every key."""
    inputs = qkv(S=3)
    options = options | dict(document_ids=None)
    hidden = visible(2, 7, 3, options["causal"], options.get("window"), None).any(-1)[0, 0].logical_not()   # (T,)
    if options["causal"]:
        assert hidden.tolist() == [True] * 4 + [False] * 3
    (y,), (dq, dk, dv), _ = run_op(lambda *x: kernels.attention(*x, **options), inputs)
    assert (y[:, hidden] == 0).all() and (dq[:, hidden] == 0).all()
    assert (y[:, ~hidden] != 0).any() and all(x.isfinite().all() and x.any() for x in (dk, dv))


def test_no_keys_at_all_give_zeros():
    q, k, v = qkv(S=0)
    for causal in (True, False):
        assert torch.equal(kernels.attention(q, k, v, causal=causal), torch.zeros_like(q))


def dropped_weights(seed, T=40, S=40, p=0.3, **options):
    """(B, H, T, S): with the identity for values, the output is the attention weights after dropout."""
    q, k, _ = qkv(T=T, S=S, D=S)
    v = torch.eye(S)[None, :, None].expand(2, S, 4, S)
    return kernels.attention(q, k, v, causal=True, dropout_p=p, seed=seed, **options).transpose(1, 2)


def test_seeded_dropout_is_a_function_of_the_seed():
    one = dropped_weights(5)
    torch.manual_seed(9)
    assert torch.equal(one, dropped_weights(5))
    assert not torch.equal(one, dropped_weights(6))


@pytest.mark.parametrize("seed", [None, 3])
def test_dropout_scales_the_weights_it_keeps(seed):
    """Each weight is either 0 or the weight without dropout times 1 / (1 - p), and as many are 0 as p says."""
    kept_all = dropped_weights(seed, p=0.0)
    weights = dropped_weights(seed)
    is_kept = weights != 0
    assert_close(weights[is_kept], kept_all[is_kept] / 0.7, 1e-5)
    visible_weights = kept_all > 0
    count = int(visible_weights.sum())
    part = (is_kept & visible_weights).sum() / count
    assert abs(part - 0.7) < 5 * (0.3 * 0.7 / count) ** 0.5


@pytest.mark.parametrize("options", [{}, {"window": 4}])
def test_seeded_dropout_obeys_the_causal_mask(options):
    """Regression: with T = S, seeded dropout took no mask at all and let queries see keys after them."""
    for T in (40, 13):
        weights = dropped_weights(1, T=T, **options)
        shown = visible(1, T, 40, True, options.get("window"), None)
        assert (weights * ~shown == 0).all()
        assert (weights != 0).any()


def test_seeded_dropout_is_unbiased():
    """The mean over many draws is within 5 standard errors of the output without dropout, nearly everywhere."""
    q, k, v = qkv(B=1, H=2, H_kv=1, S=9)
    exact = formula(*(x.double() for x in (q, k, v)), causal=True)
    q, k, v = (x.expand(4, -1, -1, -1) for x in (q, k, v))
    draws = torch.cat([kernels.attention(q, k, v, causal=True, dropout_p=0.25, seed=seed) for seed in range(10)])
    z = (draws.double().mean(0) - exact[0]) / (draws.double().std(0) / 40 ** 0.5)
    assert z.abs().max() < 5
    assert 0.6 < rms(z) < 1.4                           # of some 30 that are independent


def test_seeded_dropout_has_the_gradients_of_what_it_computes():
    """Against the formula with the mask that the identity for values reveals."""
    q, k, v = qkv(D=7)
    kept = kernels.attention(q, k, torch.eye(7)[None, :, None].expand(2, 7, 4, 7), causal=True, dropout_p=0.3,
                             seed=2).transpose(1, 2) != 0                           # (B, H, T, S)

    def with_mask(q, k, v):
        scores = torch.einsum("bthd,bshd->bhts", q, k) * 7 ** -0.5
        weights = torch.where(visible(2, 7, 7, True, None, None), scores, -1e9).softmax(-1) * kept / 0.7
        return torch.einsum("bhts,bshd->bthd", weights, v)

    check_op(lambda *x: kernels.attention(*x, causal=True, dropout_p=0.3, seed=2), with_mask, [q, k, v], 1e-5)


def test_seeded_dropout_with_no_visible_key_is_finite():
    (y,), grads, _ = run_op(lambda *x: kernels.attention(*x, causal=True, dropout_p=0.3, seed=2), qkv(S=3))
    assert (y[:, :4] == 0).all() and (grads[0][:, :4] == 0).all()
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


@pytest.mark.parametrize("options", [dict(causal=True), dict(causal=False), dict(causal=True, window=9),
                                     dict(causal=True, dropout_p=1e-9, seed=1)], ids=str)
def test_bfloat16_is_as_exact_as_plain_pytorch(options):
    def plain(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = visible(2, 33, 33, options["causal"], options.get("window"), None)
        weights = (q @ k.mT * 16 ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2)

    exact = {name: value for name, value in options.items() if name in ("causal", "window")}
    check_error_ratio(lambda *x: kernels.attention(*x, **options), plain, lambda *x: formula(*x, **exact),
                      qkv(T=33, S=33, D=16, dtype=torch.bfloat16))


@pytest.mark.parametrize("shapes, options, message", [
    (dict(H=3, H_kv=2), {}, "multiple of H_kv"),
    (dict(), dict(window=0), "window = 0"),
    (dict(), dict(dropout_p=1.0), "dropout_p = 1.0"),
    (dict(), dict(dropout_p=-0.1), "dropout_p = -0.1"),
    (dict(S=5), dict(document_ids=DOCUMENTS), "S = T"),
    (dict(), dict(document_ids=DOCUMENTS[:, :5]), "document_ids"),
])
def test_arguments_that_do_not_fit(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        kernels.attention(*qkv(**shapes), causal=True, **options)


@pytest.mark.parametrize("options, message", [
    (dict(q=[1.0]), r"q = \[1\.0\] is list, not a tensor"),
    (dict(v=None), "v = None is NoneType, not a tensor"),
    (dict(document_ids=[0, 1]), r"document_ids = \[0, 1\] is list, not a tensor or None"),
    (dict(document_ids=torch.zeros(2, 7)), "document_ids are torch.float32; they must be integers"),
    (dict(window=1.5), "window = 1.5 is float, not a whole number or None"),
    (dict(seed="1"), "seed = '1' is str, not a whole number or None"),
    (dict(seed=2**63), "seed = 9223372036854775808 does not fit 64 bits"),
    (dict(scale="a"), "scale = 'a' is str, not a number or None"),
    (dict(scale=float("nan")), "scale = nan is not a number below 1e"),
    (dict(scale=1e40), "scale = 1e.40 is not a number below 1e"),
    (dict(dropout_p=None), "dropout_p = None is NoneType, not a number"),
    (dict(k=torch.zeros(2, 7, 4, 5, dtype=torch.bfloat16)), "k is torch.bfloat16, q torch.float32; all must be of one"),
    (dict(k=torch.zeros(2, 7, 4, 5, device="meta")), "k is on meta, q on cpu; they must be on one device"),
])
def test_arguments_of_the_wrong_kind(options, message):
    with pytest.raises(ValueError, match=f"attention: {message}"):
        kernels.attention(**dict(zip("qkv", qkv())) | dict(causal=True) | options)


def test_tensors_may_be_named():
    """Regression: the public op took its first tensor by place only."""
    q, k, v = qkv()
    assert torch.equal(kernels.attention(q=q, k=k, v=v, causal=True), kernels.attention(q, k, v, causal=True))


def test_shapes_that_do_not_fit():
    q, k, v = qkv()
    for wrong in ((q[0], k, v), (q, k[0], v[0]), (q, k, v[:, :3]), (q[..., :3], k, v), (q[:1], k, v)):
        with pytest.raises(ValueError, match="attention takes q"):
            kernels.attention(*wrong, causal=True)
