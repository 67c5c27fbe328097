"""Packed products are the plain ones, whatever the number of rows; a recorded step gives the bits of the model."""

import pytest
import torch
from compare import assert_close
from twins import random_model

from kernels.reference import dequantize
from minigpt import flat
from minigpt.cache import Decode, KVCache, Prefill
from minigpt.flat import FlatStep, GraphStep
from minigpt.linear import Linear, QuantizedLinear
from minigpt.packed import PRODUCTS, packed, steady_rows
from minigpt.quantize import quantized

VARIANTS = [dict(), dict(norm="layer_norm", position="learned", mlp="gelu", bias=True, qk_norm=False),
            dict(mlp="swiglu", num_kv_heads=1, window=3), dict(norm_position="post", mlp="gelu_erf", position="none"),
            dict(tied_embeddings=False, embedding_norm=True, token_types=2, qkv_bias=True)]


def layer(dtype, N, K, bits=0):
    made = QuantizedLinear(K, N, True, bits) if bits else Linear(K, N, True).to(dtype)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N))
    with torch.no_grad():
        made.fill(weight) if bits else made.weight.copy_(weight)
        made.bias.copy_(weight[:, 0])
    return made


@pytest.mark.parametrize("dtype, bits", [(torch.float32, 0), (torch.bfloat16, 0), (torch.float32, 8),
                                         (torch.float32, 4)])
@pytest.mark.parametrize("N, K", [(96, 64), (48, 192), (33, 100)])
@torch.inference_mode()
def test_products(dtype, bits, N, K):
    """As near to float64's as one in the same precision is; numbers of rows to beyond a prompt's."""
    plain = layer(dtype, N, K, bits)
    product = next((kind(plain) for kind in PRODUCTS if kind.takes(plain)), None)
    if product is None:                                 # columns or groups that torch's kernels do not take
        assert bits and (N, K) == (33, 100)
        return
    weight = dequantize(plain.packed_weight, plain.scales).double() if bits else plain.weight.double()
    for rows in (1, 2, 7, 16, 65, 600):
        x = torch.randn(1, rows, K, generator=torch.Generator().manual_seed(rows)).to(dtype)
        exact = x.double() @ weight.T
        for bias in (None, plain.bias):
            y = product(x, bias)
            assert y.shape == (1, rows, N) and y.dtype == dtype
            assert_close(y.double(), exact + (0 if bias is None else bias.double()),
                         5e-6 if dtype == torch.float32 and not bits else 4e-2)


def test_a_packed_copy_shares_its_tensors():
    model = random_model(width=64, num_heads=2)
    twin = packed(model)
    for (name, one), (_, other) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        assert one.data_ptr() == other.data_ptr(), name
    layers = [module for module in twin.modules() if isinstance(module, Linear)]
    assert all("product" in module.__dict__ for module in layers) and len(layers) == 4 * 2 + 1
    assert not any("product" in module.__dict__ for module in model.modules())


def test_rows_that_give_a_row_the_same_bits():
    """Found by trial: a product that is another with fewer than 6 rows is not trusted with them."""
    model = packed(random_model(width=64, num_heads=2, mlp_width=96))
    rows = steady_rows(model, 5)
    assert rows == list(range(rows[0], rows[-1] + 1, 2)) and rows[0] % 2 == 0 and rows[-1] in (5, 6) or rows[0] > 5
    down = model.blocks[1].mlp.down
    exact = down.product
    down.product = lambda x, bias=None: exact(x, bias) * (1 if len(x) >= 6 else 1 + 2**-20)
    assert steady_rows(model, 3) == [6] and steady_rows(model, 7) == [6, 8]
    down.product = lambda x, bias=None: exact(x, bias) * (1 + len(x) * 2**-20)
    assert steady_rows(model, 3) == [64]


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@torch.inference_mode()
def test_a_recorded_step_gives_the_models_bits(settings, bits):
    """At other tokens, slots and lengths than those that it was recorded with."""
    model = random_model(width=64, num_heads=2, context_length=40, **settings)
    model = packed(quantized(model, bits) if bits else model)
    chance = torch.Generator().manual_seed(1)
    cache = KVCache(model.config, 4, 40, torch.device("cpu"), torch.float32)
    for tensor in (cache.keys, cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=chance))
    step = FlatStep(model)
    for lengths in ({0: 3, 1: 5}, {0: 4, 1: 6}, {1: 39, 3: 0}, {0: -1, 2: 17}):
        tokens = torch.randint(0, model.config.vocab_size, (1, 2), generator=chance)
        made = step(tokens, Decode(cache, lengths))
        assert torch.equal(made, model.head(model.hidden(tokens, cache=Decode(cache, lengths))[0]))
    assert step.runs.keys() == {2} and made.shape == (2, model.config.vocab_size)
    tokens = torch.randint(0, model.config.vocab_size, (1, 5), generator=chance)
    for start in (0, 3, 30):
        made = step(tokens, Prefill(cache, (2, start, 5)))
        assert torch.equal(made, model.head(model.hidden(tokens, cache=Prefill(cache, (2, start, 5)))[0]))


@torch.inference_mode()
def test_a_step_that_writes_to_what_it_has_is_not_recorded():
    model = random_model(vocab_size=11)
    cache = KVCache(model.config, 1, 8, torch.device("cpu"), torch.float32)
    norm, sums = model.final_norm.forward, torch.zeros(1, 1, 24)
    model.final_norm.forward = lambda x, residual: (sums.add_(norm(x, residual)[0]).clone(), residual)
    step, view = FlatStep(model), Decode(cache, {0: 0})
    for token in (5, 5, 7):
        before = sums.clone()
        made = step(torch.tensor([[token]]), view)
        after, _ = sums.clone(), sums.copy_(before)
        assert torch.equal(made, model.head(model.hidden(torch.tensor([[token]]), cache=view)[0]))
        assert torch.equal(sums, after)
    assert step.runs == {1: None}


@torch.inference_mode()
def test_a_step_in_a_graph_takes_new_tokens_and_lengths(monkeypatch):
    """What a graph replays works in the memory of its first step; here a replay is a call, as there is no GPU."""
    calls = []
    monkeypatch.setattr(flat, "captured", lambda function: calls.append(1) or function)
    model = random_model(context_length=40)
    caches = [KVCache(model.config, 3, 40, torch.device("cpu"), torch.float32) for _ in range(2)]
    step = GraphStep(model, caches[0], 2)
    for number, lengths in enumerate(({0: 0, 1: 5}, {0: 1, 1: -1}, {0: 2, 1: 6})):
        tokens = torch.tensor([[number, 9 - number]])
        made = step(tokens, Decode(caches[0], lengths)).clone()
        assert torch.equal(made, model.head(model.hidden(tokens, cache=Decode(caches[1], lengths))[0]))
    assert calls == [1] and torch.equal(caches[0].keys, caches[1].keys)
