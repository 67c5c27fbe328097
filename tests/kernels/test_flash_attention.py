"""The Triton kernels of attention over many small tiles, and as ops: strides, saved tensors, compile, gradients."""

import itertools

import pytest
import torch
import torch.utils.checkpoint
from compare import assert_close, check_error_ratio, check_op, run_op
from marks import slow
from test_attention import formula, qkv, visible

import kernels

pytestmark = pytest.mark.triton


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So small that a short text fills many of them."""
    import triton.language as tl

    from kernels import flash_attention
    from kernels.attention import TILES, Tiles

    forward, by_keys, by_queries = (32, 16, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1)
    for key in TILES:
        monkeypatch.setitem(TILES, key, Tiles(*[(forward, by_keys, by_queries)] * 2, by_keys))
    monkeypatch.setattr(flash_attention, "CHUNK", tl.constexpr(32))


def one_pass_or_two(options):
    """Tests run under torch.use_deterministic_algorithms, which refuses the one-pass backward."""
    if not options.get("deterministic", True):
        torch.use_deterministic_algorithms(False)


def check(inputs, tolerance=5e-5, **options):
    one_pass_or_two(options)
    exact = {name: value for name, value in options.items() if name != "deterministic"}
    check_op(lambda *x: kernels.attention(*x, **options), lambda *x: formula(*x, **exact), inputs, tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T, S", [(50, 50), (97, 97), (33, 70), (70, 33), (1, 65), (64, 64)])
def test_lengths(T, S, causal):
    check(qkv(B=1, T=T, S=S, H=2, H_kv=2, D=16), causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T, S", [(97, 97), (33, 70)])
def test_one_pass(T, S, causal):
    check(qkv(B=1, T=T, S=S, H=2, H_kv=1, D=16), causal=causal, deterministic=False)


@pytest.mark.parametrize("window", [1, 16, 40])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T, S", [(33, 81), slow(70, 70), slow(60, 37)])
def test_windows(T, S, causal, window):
    check(qkv(B=1, T=T, S=S, H=2, H_kv=1, D=16), causal=causal, window=window)


def in_order(lengths):
    return torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])


DOCUMENTS = {
    "one": torch.zeros(70, dtype=torch.int64),
    "three": in_order([20, 33, 17]),
    "each its own": torch.arange(70),
    "short": in_order([3] * 23 + [1]),
    "padded": torch.cat((in_order([40]), torch.full((30,), -1))),
    "falling": -in_order([20, 33, 17]),
    "mixed": torch.randint(-2, 3, (70,), generator=torch.Generator().manual_seed(0)),
    "extreme": torch.tensor([2**31 - 1, -2**31]).repeat_interleave(35),
}


@pytest.mark.parametrize("ids, causal, window, H", [
    *((ids, True, None, 1) for ids in DOCUMENTS),
    *((ids, *others) for ids in ("three", "mixed") for others in ((False, None, 1), (True, 21, 2)))])
def test_documents(ids, causal, window, H):
    """The second row has other documents than the first."""
    document_ids = torch.stack((DOCUMENTS[ids], DOCUMENTS["three"].flip(0)))
    check(qkv(T=70, S=70, H=H, H_kv=1, D=16), causal=causal, window=window, document_ids=document_ids)


def test_keys_of_other_documents_are_not_read():
    """What a program need not visit it does not: a NaN among them would show, as 0 · NaN in the products."""
    ids = in_order([32, 64])[None]
    q, k, v = qkv(B=1, T=96, S=96, H=1, H_kv=1, D=16)
    clean, *_ = run_op(lambda *x: kernels.attention(*x, causal=False, document_ids=ids), [q, k, v])
    v[:, 32:] = torch.nan
    (y,), _, _ = run_op(lambda *x: kernels.attention(*x, causal=False, document_ids=ids), [q, k, v])
    assert torch.equal(y[:, :32], clean[0][:, :32]) and y[:, 32:].isnan().all()


@pytest.mark.parametrize("H, H_kv", [(4, 2), (6, 2), (4, 1)])
def test_grouped_heads(H, H_kv):
    check(qkv(B=1, T=40, S=55, H=H, H_kv=H_kv, D=16), causal=True)


@pytest.mark.parametrize("D", [1, 3, 16, 24, 33, 80, 96, 128, 256])
def test_head_sizes(D):
    check(qkv(B=1, T=40, S=40, H=2, H_kv=1, D=D), causal=True)


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_scales_of_any_sign(scale):
    """Regression: maxima taken before a scale that is not positive are no maxima after it."""
    check(qkv(B=1, T=40, S=40, H=2, H_kv=2, D=16), causal=True, scale=scale)


@pytest.mark.parametrize("deterministic", [True, False])
def test_scores_far_below_zero_beside_missing_keys(deterministic):
    """A tile's keys beyond the last have score 0 and so 2^230 times the others' weights: none of them may count."""
    q, k, v = qkv(B=1, T=40, S=37, H=1, H_kv=1, D=16)
    check([1 + q / 20, k / 20 - 10, v], 3e-4, causal=False, deterministic=deterministic, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
@pytest.mark.parametrize("options", [dict(causal=True), dict(causal=False), dict(causal=True, window=20),
                                     dict(causal=True, deterministic=False)], ids=str)
def test_half_precision_is_as_exact_as_plain_pytorch(options, dtype):
    one_pass_or_two(options)
    mask = visible(1, 65, 65, options["causal"], options.get("window"), None)

    def plain(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.mT * 32 ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2)

    exact = {name: value for name, value in options.items() if name != "deterministic"}
    check_error_ratio(lambda *x: kernels.attention(*x, **options), plain, lambda *x: formula(*x, **exact),
                      qkv(B=1, T=65, S=65, H=2, H_kv=2, D=32, dtype=dtype))


def fused_projection(T=40, H=2, H_kv=1, D=16):
    """q, k and v, views of one (B, T, H + 2 H_kv, D)."""
    return torch.cat(qkv(T=T, S=T, H=H, H_kv=H_kv, D=D), dim=2).split((H, H_kv, H_kv), dim=2)


def test_views_of_a_fused_projection_and_gradients_in_one_buffer():
    views = fused_projection()
    assert not views[0].is_contiguous()
    check(views, causal=True)
    leaves = [x.detach().requires_grad_() for x in views]
    grads = torch.autograd.grad(kernels.attention(*leaves, causal=True).sum(), leaves)
    for one, view in zip(grads, views, strict=True):
        assert one.untyped_storage().data_ptr() == grads[0].untyped_storage().data_ptr()
        assert (one.stride(), one.storage_offset()) == (view.stride(), view.storage_offset())


def test_views_are_not_copied():
    from kernels.attention import Call

    q, k, v = fused_projection()
    call = Call(q, k, v, None, None, True, None, 0.0, 1.0, 0)
    assert [call.pointers[f"{name}_ptr"].data_ptr() for name in "qkv"] == [x.data_ptr() for x in (q, k, v)]
    strided = qkv(D=32)[0][..., ::2]
    assert Call(strided, strided, strided, None, None, True, None, 0.0, 1.0, 0).pointers["q_ptr"].is_contiguous()


def test_saved_tensors_are_left_as_they_were():
    saved = []

    def pack(x):
        saved.append((x, x.clone()))
        return x

    ids = DOCUMENTS["three"][None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        leaves = [x.requires_grad_() for x in qkv(B=1, T=70, S=70, H=2, H_kv=2, D=16)]
        y = kernels.attention(*leaves, causal=True, window=30, document_ids=ids, dropout_p=0.2, seed=1)
    y.backward(torch.randn_like(y))
    assert len(saved) == 7 and all(torch.equal(x, copy) for x, copy in saved)


def test_activation_checkpointing():
    """Regression: the backward unpacked its saved tensors twice, which checkpointing refuses."""
    leaves = [x.requires_grad_() for x in qkv(B=1, T=40, S=40, H=2, H_kv=1, D=16)]

    def op(q, k, v):
        return kernels.attention(q, k, v, causal=True, dropout_p=0.2)

    grads = []
    for run in (op, lambda *x: torch.utils.checkpoint.checkpoint(op, *x, use_reentrant=False)):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    assert all(map(torch.equal, *grads))


def test_offsets_over_2_31_elements(monkeypatch):
    """Rows 2^31 elements apart, in memory of which the system hands out only the pages that are touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    inputs = [x.bfloat16() for x in qkv(B=1, T=2, S=2, H=2, H_kv=2, D=16)]
    grad = torch.randn(1, 2, 2, 16).bfloat16()

    def spread(x):
        far = torch.empty((1 << 31) + 32, dtype=x.dtype).as_strided(x.shape, (1 << 31, 1 << 31, 16, 1))
        return far.copy_(x)

    actual, actual_grads, _ = run_op(lambda *x: kernels.attention(*x, causal=True), [spread(x) for x in inputs],
                                     [spread(grad)])
    expected, expected_grads, _ = run_op(lambda *x: kernels.attention(*x, causal=True), inputs, [grad])
    assert all(map(torch.equal, actual + actual_grads, expected + expected_grads))


@pytest.mark.parametrize("shapes", [dict(B=0), dict(T=0), dict(S=0), dict(H=0), dict(T=0, S=0)], ids=str)
def test_nothing_to_attend_to(shapes):
    (y,), grads, _ = run_op(lambda *x: kernels.attention(*x, causal=True), qkv(**shapes))
    assert not y.any() and not any(grad.any() for grad in grads)


def kept_weights(seed, p=0.3, B=2, H=2, T=48):
    """(B, H, T, T), true where dropout keeps a weight: with equal scores and the identity for values."""
    zeros = torch.zeros(B, T, H, T)
    return kernels.attention(zeros, zeros, torch.eye(T)[None, :, None].expand_as(zeros), causal=False, dropout_p=p,
                             seed=seed).transpose(1, 2) != 0


def test_dropout_keeps_as_many_everywhere_and_no_two_alike():
    """Every query, key, head, batch row and seed keeps 0.7, and neighbours in each of them agree by chance alone."""
    kept = torch.stack([kept_weights(seed) for seed in (0, 1, 2**40, -5)]).double()     # (seeds, B, H, T, T)
    for dim in range(kept.dim()):
        others = [other for other in range(kept.dim()) if other != dim]
        count = kept.numel() / kept.shape[dim]
        assert (kept.mean(others) - 0.7).abs().max() < 4.5 * (0.21 / count) ** 0.5
        agree = ((kept - 0.7) * (kept.roll(1, dim) - 0.7)).mean() / 0.21
        assert abs(agree) < 4.5 / kept.numel() ** 0.5
    pairs = kept.flatten(0, 3)[:240] - 0.7                                # (queries, T)
    correlation = pairs @ pairs.T / 0.21 / 48
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 6 / 48 ** 0.5


@pytest.mark.parametrize("p", [1e-10, 0.5, 0.75, 1 - 1e-10])
def test_dropout_at_its_ends(p):
    kept = kept_weights(7, p)
    assert abs(kept.double().mean() - (1 - p)) < 4.5 * (p * (1 - p) / kept.numel()) ** 0.5 + 1e-9


@pytest.mark.parametrize("options", [dict(causal=True), dict(causal=False, window=30),
                                     dict(causal=True, document_ids=DOCUMENTS["three"][None, :50]),
                                     dict(causal=True, deterministic=False)], ids=str)
def test_dropout_is_the_same_in_all_kernels(options):
    """Values and gradients against the formula with the mask that the identity for values reveals."""
    one_pass_or_two(options)
    q, k, v = qkv(B=1, T=50, S=50, H=2, H_kv=1, D=16)
    shown = visible(1, 50, 50, options["causal"], options.get("window"), options.get("document_ids"))
    kept = kept_weights(2, B=1, H=2, T=50)

    def with_mask(q, k, v):
        weights = torch.where(shown, torch.einsum("bthd,bsxd->bhts", q, k) / 4, -1e9).softmax(-1) * shown
        return torch.einsum("bhts,bsxd->bthd", weights * kept / 0.7, v)

    check_op(lambda *x: kernels.attention(*x, dropout_p=0.3, seed=2, **options), with_mask, [q, k, v], 5e-5)


def test_dropout_without_a_seed_is_torch_s_generator_s():
    q, k, v = qkv(B=1, T=40, S=40, H=2, H_kv=1)

    def drawn():
        torch.manual_seed(3)
        return [kernels.attention(q, k, v, causal=True, dropout_p=0.3) for _ in range(2)]

    one, other = drawn()
    assert not torch.equal(one, other)
    assert all(map(torch.equal, (one, other), drawn()))


def test_two_passes_are_bit_equal_each_time():
    inputs, grads = qkv(B=1, T=70, S=70, H=2, H_kv=1, D=16), [torch.randn(1, 70, 2, 16)]
    runs = [run_op(lambda *x: kernels.attention(*x, causal=True), inputs, grads) for _ in range(2)]
    assert all(map(torch.equal, runs[0][0] + runs[0][1], runs[1][0] + runs[1][1]))


def test_one_pass_is_refused_where_determinism_is_asked_for():
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="attention: deterministic=False under torch.use_deterministic_algorithms"):
            kernels.attention(*qkv(), causal=True, deterministic=False)
        assert kernels.attention(*qkv(), causal=True).any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("S, given, deterministic", [
    (20, "", False), (20, "document_ids seed", True), slow(20, "", True), slow(9, "seed", True)])
def test_opcheck(S, given, deterministic):
    from kernels.attention import backward, forward

    q, k, v = qkv(B=1, T=20, S=S, H=2, H_kv=1, D=16)
    ids = torch.zeros(1, 20, dtype=torch.int32) if "document_ids" in given else None
    seed = torch.tensor(3) if "seed" in given else None
    settings = (True, 7 if given else None, 0.3 if "seed" in given else 0.0, 0.25, deterministic)
    out, lse = forward(q, k, v, ids, seed, *settings)
    torch.library.opcheck(backward, (torch.randn_like(out), q, k, v, out, lse, ids, seed, *settings))
    torch.library.opcheck(forward, (*(x.requires_grad_() for x in (q, k, v)), ids, seed, *settings))


@pytest.mark.parametrize("options", [
    dict(causal=True), slow(dict(causal=False, window=9, dropout_p=0.2, seed=4))], ids=str)
def test_a_compiled_caller_is_one_graph(options):
    compiled = torch.compile(lambda *x: kernels.attention(*x, **options), fullgraph=True, backend="aot_eager",
                             dynamic=True)
    for T, S in ((20, 20), (33, 33), (33, 20)):
        inputs = qkv(B=1, T=T, S=S, H=2, H_kv=1, D=16)
        actual, actual_grads, grads = run_op(compiled, inputs)
        expected, expected_grads, _ = run_op(lambda *x: kernels.attention(*x, **options), inputs, grads)
        for pair in zip(actual + actual_grads, expected + expected_grads, strict=True):
            assert_close(*pair, 1e-6)


def test_autocast_decides_the_dtype():
    q, k, v = qkv(T=20, S=20, D=16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = kernels.attention(q, k.bfloat16(), v, causal=True)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, kernels.attention(*(x.bfloat16() for x in (q, k, v)), causal=True))


def test_a_second_derivative_is_refused():
    leaves = [x.requires_grad_() for x in qkv()]
    grad, *_ = torch.autograd.grad(kernels.attention(*leaves, causal=True).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*kernels\.use\('reference'\) has one"):
        grad.sum().backward()


@pytest.mark.parametrize("change, message", [
    (dict(D=257), r"a head size of 257; the Triton kernels take 1 to 256, kernels\.use\('reference'\) any"),
    (dict(D=0), "a head size of 0; the Triton kernels take 1 to 256"),
    (dict(dtype=torch.float64), "q, k and v are torch.float64; the Triton kernels take torch.bfloat16, torch.float16"),
])
def test_what_the_kernels_do_not_take(change, message):
    with pytest.raises(ValueError, match=f"attention: {message}"):
        kernels.attention(*qkv(**change), causal=True)


def test_lengths_beyond_32_bits_are_refused():
    x = torch.zeros(1, 1, 1, 16).expand(1, 2**30 + 1, 1, 16)
    with pytest.raises(ValueError, match="attention: 1073741825 queries and 1073741825 keys; the Triton kernels "):
        kernels.attention(x, x, x, causal=True)


def test_tiles_for_every_gpu():
    """GPUs without rows of their own, and float32 everywhere, take those of capability 0."""
    from kernels.attention import TILES, tiles_for

    for capability, itemsize, D in itertools.product((0, 8, 9, 10, 12), (2, 4), range(1, 257)):
        own = [key for key in TILES if key[0] == capability and key[1] == itemsize]
        assert tiles_for(capability, itemsize, D) is TILES[
            capability if own else 0, itemsize, 64 if D <= 64 else 128 if D <= 128 else 256]
