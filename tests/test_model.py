"""The model equals transformers' GPT-2, Llama, Mistral, Qwen2 and Qwen3 and torch's encoder, weight for weight.

Beyond that: parameter and FLOP counts, what each position may see, dropout, ties, and the limits of the context.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, largest_error, rms
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from twins import LLAMA3, gpt2_twins, llama_twins, random_model, rename

import kernels
from minigpt.cache import KVCache, Prefill
from minigpt.config import PRESETS, ModelConfig, make_config
from minigpt.model import GPT


def tokens(B=3, T=16, V=53):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))


def preset(name, **settings):
    return make_config({"model": {"preset": name, **settings}}).model


@pytest.mark.parametrize("name, vocab_size, count", [
    ("gpt2", 50257, 124_439_808), ("gpt2-medium", 50257, 354_823_168), ("gpt2-large", 50257, 774_030_080),
    ("gpt2-xl", 50257, 1_557_611_200), ("tiny", 4096, 1_312_128), ("small", 4096, 5_771_264),
    ("base", 4096, 88_101_120)])
def test_parameters_of_the_presets(name, vocab_size, count):
    """The GPT-2 counts are those of the released models; the others are what the docstring of PRESETS rounds."""
    with torch.device("meta"):
        model = GPT(preset(name, vocab_size=vocab_size))
    assert model.num_parameters == count


def test_no_preset_is_left_out():
    assert set(PRESETS) == {"tiny", "small", "base", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}


def test_feed_forward_widths():
    """Regression: gelu and squared_relu too were rounded up to a multiple of 32; only swiglu's 8/3 width is."""
    for width, mlp, hidden in ((10, "gelu", 40), (10, "squared_relu", 40), (10, "swiglu", 32), (96, "swiglu", 256),
                               (97, "swiglu", 288)):
        block = GPT(ModelConfig(vocab_size=5, width=width, num_heads=1, mlp=mlp, position="none")).blocks[0]
        assert block.mlp.down.in_features == hidden


def same_logits(theirs, ours, tolerance):
    with torch.no_grad():
        expected, actual = theirs(tokens()).logits, ours(tokens())
    assert rms(expected) > 0.5 and actual.dtype == torch.float32
    assert_close(actual, expected, tolerance)


def test_equals_gpt2():
    same_logits(*gpt2_twins(), 1e-5)


@pytest.mark.parametrize("kind, settings", [
    ("Llama", {}), ("Llama", {"rope": LLAMA3}), ("Mistral", {"sliding_window": 5}), ("Qwen2", {}), ("Qwen3", {})])
def test_equals_models_of_the_modern_style(kind, settings):
    """Grouped queries, rotary positions with base and scale, SwiGLU; also windows, QKV biases and QK-norm."""
    same_logits(*llama_twins(kind, **settings), 1e-5)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_equals_the_encoder_of_torch(norm_position):
    model = random_model(bias=True, norm="layer_norm", mlp="gelu", qk_norm=False, position="none",
                         norm_position=norm_position)
    x = model.embedding(tokens())
    for block in model.blocks:
        layer = torch.nn.TransformerEncoderLayer(24, 4, 96, 0.0, lambda y: F.gelu(y, approximate="tanh"),
                                                 batch_first=True, norm_first=norm_position == "pre").eval()
        names = {"attention.qkv.": "self_attn.in_proj_", "attention.out": "self_attn.out_proj", "mlp.up": "linear1",
                 "mlp.down": "linear2", "attention_norm": "norm1", "mlp_norm": "norm2"}
        layer.load_state_dict({rename(name, names): tensor for name, tensor in block.state_dict().items()})
        x = layer(x)
    if norm_position == "pre":
        x = model.final_norm(x)
    assert_close(model.hidden(tokens(), causal=False), x, 1e-5)


VARIANTS = [dict(norm=norm, mlp=mlp, position=position, norm_position=norm_position,
                 bias=bool(number % 2), qk_norm=bool(number // 2 % 2), num_kv_heads=(0, 1, 2)[number % 3],
                 head_size=(0, 10)[number // 3 % 2], window=(0, 3)[number // 5 % 2], tied_embeddings=number % 4 < 2,
                 qkv_bias=(None, True, False)[number // 4 % 3])
            for number, (norm, mlp, position, norm_position) in enumerate(itertools.product(
                ("layer_norm", "rms_norm"), ("gelu", "gelu_erf", "swiglu", "squared_relu"),
                ("rotary", "learned", "none"), ("pre", "post")))]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_every_variant_runs_and_reaches_every_weight(settings):
    model = random_model(**settings)
    for causal in (True, False):
        model.zero_grad()
        logits = model(tokens(), causal=causal)
        assert logits.shape == (3, 16, 53) and logits.isfinite().all()
        F.cross_entropy(logits.flatten(0, 1), tokens().flatten()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def changed(model, position, **context):
    """Positions whose logits change when the token at `position` does."""
    before, after = tokens(1), tokens(1)
    after[0, position] = (after[0, position] + 1) % 53
    with torch.no_grad():
        difference = (model(before, **context) - model(after, **context)).abs().amax(-1)[0]
    assert difference.isfinite().all()
    return (difference > 1e-4).nonzero().flatten().tolist()


@pytest.mark.parametrize("settings", VARIANTS[::5], ids=str)
def test_causal_models_do_not_see_the_future(settings):
    model = random_model(**settings | dict(window=0))
    for position in (0, 7, 15):
        assert changed(model, position) == list(range(position, 16))


@pytest.mark.parametrize("settings", VARIANTS[::5], ids=str)
def test_bidirectional_models_see_both_sides(settings):
    model = random_model(**settings | dict(window=0))
    for position in (0, 7, 15):
        assert changed(model, position, causal=False) == list(range(16))


@pytest.mark.parametrize("depth, window", [(1, 1), (1, 4), (2, 4), (3, 3)])
def test_a_window_reaches_as_far_as_the_layers_add_up(depth, window):
    model = random_model(depth=depth, window=window)
    assert changed(model, 2) == list(range(2, 2 + depth * (window - 1) + 1))


def test_documents_are_computed_as_if_alone():
    model = random_model(position="learned")
    text = tokens(2)
    ids = torch.tensor([[0] * 7 + [1] * 9, [4] * 3 + [2] * 13])
    positions = torch.tensor([[*range(7), *range(9)], [*range(3), *range(13)]])
    for causal in (True, False):
        together = model(text, causal=causal, document_ids=ids, positions=positions)
        for row, cut in ((0, 7), (1, 3)):
            alone = [model(part[None], causal=causal)[0] for part in (text[row, :cut], text[row, cut:])]
            assert_close(together[row], torch.cat(alone), 1e-5)
    assert largest_error(model(text, positions=positions), together) > 0.1


def test_positions_shift_learned_embeddings_and_leave_rotary_scores():
    learned, rotary = random_model(position="learned"), random_model(position="rotary")
    shifted = torch.arange(4, 14)
    text = tokens(T=10)
    assert_close(rotary(text, positions=shifted), rotary(text), 1e-5)
    assert largest_error(learned(text, positions=shifted), learned(text)) > 0.1


def test_dropout_acts_in_training_only(monkeypatch):
    model, plain = random_model(dropout=0.2), random_model()
    drops = []
    attention = kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *qkv, dropout_p, **options: drops.append(dropout_p) or attention(
        *qkv, dropout_p=dropout_p, **options))
    assert torch.equal(model(tokens()), plain(tokens()))
    assert drops == [0.0] * 4
    model.train()
    torch.manual_seed(0)
    one, two = model(tokens()), model(tokens())
    assert drops[4:] == [0.2] * 4
    assert largest_error(one, two) > 0.1
    torch.manual_seed(0)
    assert torch.equal(model(tokens()), one)
    plain.train()
    assert torch.equal(plain(tokens()), plain.eval()(tokens()))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_dropout_stands_behind_the_embedding_and_every_sub_layer(norm_position):
    """Each dropout is given what the embedding, an attention or an MLP has put out."""
    model = random_model(dropout=0.2, norm_position=norm_position)
    put_out, dropped = [model.embedding(tokens())], []
    for block in model.blocks:
        for layer in (block.attention, block.mlp):
            layer.register_forward_hook(lambda module, inputs, output: put_out.append(output))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, inputs, output: dropped.append((module.p, *inputs)))
    model(tokens())
    assert [p for p, _ in dropped] == [0.2] * (1 + 2 * len(model.blocks))
    assert all(torch.equal(x, y) for (_, x), y in zip(dropped, put_out, strict=True))


def test_bfloat16_autocast_is_near_float32():
    model = random_model()
    exact = model(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(tokens())
        loss = kernels.linear_cross_entropy(hidden, model.head.weight, tokens())
        rough = model(tokens())
    loss.backward()
    assert rough.dtype == torch.float32 and 1e-4 < largest_error(rough, exact) < 0.3
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_a_tied_head_is_the_embedding():
    tied, untied = GPT(ModelConfig(vocab_size=53)), GPT(ModelConfig(vocab_size=53, tied_embeddings=False))
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    assert untied.num_parameters - tied.num_parameters == 53 * 256


def test_initial_weights_are_a_function_of_the_seed():
    def weights(seed):
        torch.manual_seed(seed)
        return GPT(ModelConfig(vocab_size=500, bias=True, tied_embeddings=False)).state_dict()

    one, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])
    for name, std in (("embedding", 0.02), ("head", 0.02), ("blocks.3.attention.qkv", 0.02), ("blocks.3.mlp.up", 0.02),
                      ("blocks.0.attention.out", 0.02 / 8 ** 0.5), ("blocks.0.mlp.down", 0.02 / 8 ** 0.5)):
        assert one[name + ".weight"].std().item() == pytest.approx(std, rel=0.02), name
    assert not one["blocks.0.mlp.up.bias"].any()


@pytest.mark.parametrize("settings", [{}, dict(mlp="swiglu", num_kv_heads=2, head_size=10, tied_embeddings=False,
                                               bias=True, position="learned")], ids=["default", "untied"])
def test_flops_per_token_are_those_of_the_matrix_products(settings):
    """Counted while they run: forward and backward, with attention as plain products and causal masks in full."""
    model = random_model(**settings)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens()).sum().backward()
    assert counter.get_total_flops() == model.flops_per_token() * tokens().numel()


def test_flops_grow_with_the_context():
    model = random_model()
    assert model.flops_per_token(8) == model.flops_per_token() - 12 * 2 * 24 * 8


@pytest.mark.parametrize("position", ["rotary", "learned", "none"])
def test_more_tokens_than_the_context_are_refused(position):
    """Regression: rotary and learned positions broke inside torch, and a model without positions said nothing."""
    model = random_model(position=position)
    assert model(tokens(T=16)).shape == (3, 16, 53)
    message = "17 tokens are more than this model's context_length = 16"
    with pytest.raises(ValueError, match=message):
        model(tokens(T=17))
    cache = KVCache(model.config, 1, 16, torch.device("cpu"), torch.float32)
    model.hidden(tokens(B=1, T=10), cache=Prefill(cache, (0, 0, 10)))
    with pytest.raises(ValueError, match="17 tokens are more than a slot of the cache holds, 16"):
        model.hidden(tokens(B=1, T=7), cache=Prefill(cache, (0, 10, 7)))


def test_what_a_model_cannot_be():
    with pytest.raises(ValueError, match="vocab_size is 0"):
        GPT(ModelConfig())
    with pytest.raises(ValueError, match="no token types"):
        random_model()(tokens(), token_types=torch.zeros(3, 16, dtype=torch.int64))
