"""Hugging Face's models as transformers saves them become ours and back: same logits, same gradients, same bytes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, rms
from safetensors.torch import load_file
from test_hf import changed
from twins import LLAMA3, bert_twins, gpt2_twins, llama_twins, random_model

import minigpt
from minigpt import hf
from minigpt.config import ModelConfig, SamplingParams
from minigpt.engine import Engine
from minigpt.families import FAMILIES, Unsupported, family_for
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer

DEFAULT_ROPE = ({"rope_type": "default", "rope_theta": 500.0}, dict(rope_base=500.0))
TWINS = {
    "gpt2": gpt2_twins,
    "gpt2, wide": lambda: gpt2_twins(context_length=20, seed=3),
    "llama": lambda: llama_twins("Llama"),
    "llama, llama3 rope": lambda: llama_twins("Llama", rope=LLAMA3),
    "llama, plain rope": lambda: llama_twins("Llama", rope=DEFAULT_ROPE),
    "mistral": lambda: llama_twins("Mistral", sliding_window=5),
    "mistral, no window": lambda: llama_twins("Mistral", sliding_window=None),
    "qwen2": lambda: llama_twins("Qwen2"),
    "qwen3": lambda: llama_twins("Qwen3"),
    "llama, biases of attention": lambda: llama_twins("Llama", attention_bias=True),
    "llama, biases": lambda: llama_twins("Llama", attention_bias=True, mlp_bias=True),
    "qwen3, biases of attention": lambda: llama_twins("Qwen3", attention_bias=True),
    "qwen2, window": lambda: llama_twins("Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=0),
    "qwen3, window": lambda: llama_twins("Qwen3", use_sliding_window=True, sliding_window=5, max_window_layers=0),
    "bert": bert_twins, "bert, next sentence": lambda: bert_twins("BertForPreTraining"),
}
every_twin = pytest.mark.parametrize("name", TWINS)
CLASSES = {"bert": "AutoModelForMaskedLM", "bert, next sentence": "AutoModelForPreTraining"}
"""Of transformers, for what is no AutoModelForCausalLM."""
TOKENS = torch.randint(0, 53, (3, 16), generator=torch.Generator().manual_seed(1))
BERT = dict(mlp="gelu_erf", norm="layer_norm", norm_position="post", embedding_norm=True, token_types=2,
            head_transform=True, position="learned", qk_norm=False, bias=True)


def read(directory: Path) -> GPT:
    """The model of the checkpoint that `minigpt import` makes of a directory."""
    out = directory.with_name(f"{directory.name}.imported")
    if not out.exists():
        hf.import_model(directory, out, warn=lambda line: None)
    return minigpt.load(out, "cpu").model


@pytest.fixture
def saved(tmp_path):
    """save(name, **options): the folder of a model of TWINS, as transformers saves it, and the model."""
    def save(name="llama", **options):
        theirs, _ = TWINS[name]()
        theirs.save_pretrained(tmp_path / "theirs", **options)
        return tmp_path / "theirs", theirs
    return save


@every_twin
def test_logits_loss_and_gradients_are_those_of_transformers(name, saved):
    folder, theirs = saved(name)
    ours = read(folder)
    causal, output = name not in CLASSES, theirs(TOKENS)
    expected = output[0]
    assert rms(expected) > 0.5
    assert_close(ours(TOKENS, causal=causal), expected, 1e-5)
    targets = TOKENS[:, 1:] if causal else TOKENS.roll(3, 1)[:, 1:]
    hidden = ours.hidden(TOKENS, causal=causal)
    losses = [ours.head.loss(hidden[:, :-1], targets, reduction="mean"),
              F.cross_entropy(expected[:, :-1].flatten(0, 1), targets.flatten())]
    if ours.config.next_sentence:
        pairs = ours.next_sentence_logits(hidden, torch.full((3,), 16)), output.seq_relationship_logits
        losses = [loss + F.cross_entropy(logits, torch.tensor([0, 1, 1])) for loss, logits in zip(losses, pairs)]
    assert_close(*(loss.detach() for loss in losses), 1e-5)
    for loss in losses:
        loss.backward()
    grads = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for pair in FAMILIES[theirs.config.model_type].pairs(ours.config):
        expected = torch.cat([pair.rows_of(grads.pop(key)) for key in pair.theirs])
        assert_close(ours.get_parameter(pair.ours).grad, expected, 2e-4, pair.ours)
    assert not grads, "a weight of theirs has no counterpart"


@every_twin
def test_what_is_exported_transformers_loads_and_importing_it_again_changes_no_bit(name, saved, tmp_path):
    import transformers

    folder, theirs = saved(name)
    first, written = read(folder), tmp_path / "written"
    hf.export_model(tmp_path / "theirs.imported", written, warn=lambda line: None)
    kind = getattr(transformers, CLASSES.get(name, "AutoModelForCausalLM"))
    back = kind.from_pretrained(written, attn_implementation=theirs.config._attn_implementation).eval()
    assert type(back) is type(theirs) or name == "mistral, no window"      # which is a Llama
    with torch.no_grad():
        one, other = back(TOKENS), theirs(TOKENS)
    assert all(torch.equal(one[key], other[key]) for key in other if key.endswith("logits"))
    original, copy = (load_file(path / hf.WEIGHTS) for path in (folder, written))
    assert original.keys() == copy.keys() and all(torch.equal(original[key], copy[key]) for key in copy)
    assert read(written).config == first.config
    for file in ("model.safetensors", "config.json"):
        one, other = (tmp_path / f"{path}.imported" / file for path in ("theirs", "written"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", [name for name in TWINS if name not in CLASSES])
def test_greedy_text_is_that_of_transformers(name, saved):
    folder, theirs = saved(name)
    prompt = TOKENS[0, :4]
    expected = theirs.generate(prompt[None], max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    engine = Engine(read(folder), Tokenizer.train((), kind="bytes"))
    engine.never = torch.zeros(0, dtype=torch.int64)
    engine.ends = frozenset()
    request = engine.submit(prompt.tolist(), SamplingParams(max_new_tokens=10, temperature=0.0))
    while engine.step():
        pass
    assert request.drawn == expected[0, 4:].tolist()


SETTINGS = {
    "a base beside rope_parameters": ("llama", dict(
        rope_parameters={"rope_type": "linear", "factor": 2.0}, rope_theta=555.0)),
    "rope_scaling wins": ("llama, plain rope", dict(rope_scaling={"rope_type": "linear", "factor": 4.0})),
    "llama3 without its first context": ("llama", dict(rope_parameters={
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0})),
    "llama has no window": ("llama", dict(sliding_window=5, use_sliding_window=True)),
    "mistral has no switch": ("mistral", dict(use_sliding_window=False)),
    "windows from layer 28 on": ("qwen2", dict(use_sliding_window=True, sliding_window=5, layer_types=...,
                                               max_window_layers=...)),
    "windows from the last layer on": ("qwen2", dict(use_sliding_window=True, sliding_window=5, layer_types=...,
                                                     max_window_layers=2)),
    "windows everywhere": ("qwen2", dict(use_sliding_window=True, sliding_window=5, layer_types=...,
                                         max_window_layers=0)),
    "windows switched off": ("qwen3", dict(use_sliding_window=False, sliding_window=5)),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_read_as_transformers_reads_them(case, saved):
    """Regression: each of these gave other logits, without a word."""
    from transformers import AutoModelForCausalLM

    name, keys = SETTINGS[case]
    folder, _ = saved(name)
    changed(folder, **keys)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert_close(read(folder)(TOKENS), theirs(TOKENS).logits.detach(), 1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_head_that_is_not_what_it_is_tied_to(name, saved):
    """Regression: transformers keeps both where they differ; the head was dropped."""
    from transformers import AutoModelForCausalLM

    folder, _ = saved(name)
    changed(folder, tie_word_embeddings=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ours = read(folder)
    assert not ours.config.tied_embeddings
    assert_close(ours(TOKENS), theirs(TOKENS).logits.detach(), 1e-5)


def test_token_types_are_those_of_transformers(saved):
    folder, theirs = saved("bert")
    types = torch.randint(0, 2, TOKENS.shape, generator=torch.Generator().manual_seed(2))
    expected = theirs(TOKENS, token_type_ids=types).logits
    ours = read(folder)
    assert_close(ours(TOKENS, causal=False, token_types=types), expected, 1e-5)
    assert not torch.allclose(ours(TOKENS, causal=False), expected, rtol=0.01)


def test_next_sentence_logits_are_those_of_transformers(saved):
    folder, theirs = saved("bert, next sentence")
    lengths = torch.tensor([16, 9, 12])
    text = torch.arange(16) < lengths[:, None]
    types = ((torch.arange(16) > 4) & text).long()
    expected = theirs(TOKENS, attention_mask=text.long(), token_type_ids=types).seq_relationship_logits
    ours, documents = read(folder), torch.where(text, 0, -1)

    def logits(**context):
        return ours.next_sentence_logits(ours.hidden(TOKENS, causal=False, **context), lengths)
    assert_close(logits(token_types=types, document_ids=documents), expected, 1e-5)
    for other in (logits(token_types=types), logits(document_ids=documents)):
        assert not torch.allclose(other, expected, rtol=0.01)


@pytest.mark.parametrize("compiled", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt(bias, compiled, tmp_path):
    """Its model is GPT-2 with GELU by erf, products the other way round, and biases that can be missing."""
    theirs, _ = gpt2_twins(activation_function="gelu")
    if not bias:
        for key, tensor in theirs.named_parameters():
            if key.endswith("bias"):
                tensor.data.zero_()
    tensors = {key: tensor.T.contiguous() if ".c_" in key and tensor.dim() == 2 else tensor
               for key, tensor in theirs.state_dict().items() if bias or not key.endswith("bias")}
    torch.save({"model": {compiled + key: tensor for key, tensor in tensors.items()}, "iter_num": 7,
                "best_val_loss": torch.tensor(2.5), "config": {"dataset": "x"}, "optimizer": {"state": {}},
                "model_args": dict(n_layer=2, n_head=4, n_embd=24, block_size=16, bias=bias, vocab_size=53,
                                   dropout=0.1)}, tmp_path / "ckpt.pt")
    hf.import_model(tmp_path, tmp_path / "out", warn=lambda line: None)
    ours = minigpt.load(tmp_path / "out").model
    expected = theirs(TOKENS).logits
    assert_close(ours(TOKENS), expected.detach(), 1e-5)
    for logits in (ours(TOKENS), expected):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    assert_close(ours.embedding.weight.grad, theirs.transformer.wte.weight.grad, 1e-4)
    if bias:
        hf.export_model(tmp_path / "out", tmp_path / "back", warn=lambda line: None)
        again = type(theirs).from_pretrained(tmp_path / "back")
        assert torch.equal(again(TOKENS).logits, expected)
    assert any(name.endswith("bias") for name, _ in ours.named_parameters()) == bias


@pytest.mark.parametrize("settings, named", [
    (dict(mlp="squared_relu", qk_norm=False), "model.mlp = 'squared_relu' has no counterpart in llama"),
    (dict(norm_position="post", norm="layer_norm", mlp="gelu", position="learned", qk_norm=False, bias=True),
     "model.norm_position = 'post' has no counterpart in gpt2"),
    (dict(mlp="swiglu", qkv_bias=True), "has no counterpart in qwen"),
    (dict(mlp="swiglu", position="none"), "model.position = 'none' has no counterpart in qwen3"),
    (dict(mlp="swiglu", num_classes=3), "model.num_classes = 3 has no counterpart in qwen3"),
    (dict(mlp="swiglu", next_sentence=True), "model.next_sentence = True has no counterpart in qwen3"),
    (dict(BERT, num_classes=3), "model.num_classes = 3 has no counterpart in bert"),
    (dict(BERT, next_sentence=True, pooling="last"), "model.pooling = 'last' has no counterpart in bert"),
])
def test_models_that_no_family_has(settings, named):
    with pytest.raises(Unsupported, match=named):
        family_for(ModelConfig(vocab_size=10, width=24, num_heads=2, **settings), "causal")


@pytest.mark.parametrize("settings", [dict(width=100, num_heads=3, head_size=32), dict(width=24, num_heads=5,
                                                                                        head_size=8)])
def test_rules_of_other_families_do_not_matter(settings):
    """Regression: GPT-2's rule for the width refused a Qwen 3."""
    assert family_for(ModelConfig(vocab_size=10, mlp="swiglu", **settings), "causal")[0] == "qwen3"
    with pytest.raises(Unsupported, match="none of the families that can be written has such a model"):
        family_for(ModelConfig(vocab_size=10, position="learned", width=100, num_heads=3, head_size=31), "causal")


@pytest.mark.parametrize("kind, objectives", [
    ("qwen3", ["masked", "masked+next_sentence", "classification", "causal,masked@9"]),
    ("bert", ["causal", "next_sentence", "classification", "masked,causal@9"])])
def test_a_family_is_trained_for_one_objective(kind, objectives):
    settings = BERT if kind == "bert" else dict(mlp="swiglu")
    for objective in objectives:
        with pytest.raises(Unsupported) as error:
            family_for(ModelConfig(vocab_size=10, **settings), objective)
        assert f"objective.name = {objective!r} has no counterpart in {kind}" in str(error.value)


@pytest.mark.parametrize("kind, settings", [
    ("gpt2", dict(norm="layer_norm", mlp="gelu", position="learned", qk_norm=False, bias=True)),
    ("gpt2", dict(norm="layer_norm", mlp="gelu_erf", position="learned", qk_norm=False, bias=True, mlp_width=30)),
    ("llama", dict(mlp="swiglu", qk_norm=False)), ("llama", dict(mlp="swiglu", qk_norm=False, bias=True)),
    ("mistral", dict(mlp="swiglu", qk_norm=False, window=7)),
    ("qwen2", dict(mlp="swiglu", qk_norm=False, qkv_bias=True)), ("qwen3", dict(mlp="swiglu")), ("bert", BERT),
    ("bert", dict(BERT, next_sentence=True)), ("bert", dict(BERT, pooling="last"))])    # without a head that pools
def test_the_family_of_a_model_of_ours(kind, settings):
    for objective in ["masked", "masked+next_sentence:0.5"] if kind == "bert" else ["causal", "masked,causal@9"]:
        assert family_for(random_model(**settings).config, objective)[0] == kind
