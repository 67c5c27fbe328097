"""Hugging Face's models as transformers saves them become ours and back: same logits, same gradients, same bytes."""

import json
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, rms
from safetensors.torch import load_file, save_file
from twins import LINEAR, LLAMA3, gpt2_twins, llama_twins, random_model

from minigpt import hf
from minigpt.config import ModelConfig, SamplingParams
from minigpt.engine import decode
from minigpt.model import GPT

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
}
every_twin = pytest.mark.parametrize("name", TWINS)
TOKENS = torch.randint(0, 53, (3, 16), generator=torch.Generator().manual_seed(1))


def read(directory) -> GPT:
    with ExitStack() as files:
        family, config = hf.read_settings(directory)
        weights = hf.Weights(directory, files)
        model = GPT(config, initial=False).eval()
        for name, tensor in hf.read_tensors(hf.plan(family, config, weights), weights):
            model.get_parameter(name).data.copy_(tensor)
    return model


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
    expected, actual = theirs(TOKENS).logits, ours(TOKENS)
    assert rms(expected) > 0.5
    assert_close(actual, expected, 1e-5)
    losses = [F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()) for logits in (actual, expected)]
    assert_close(*(loss.detach() for loss in losses), 1e-5)
    for loss in losses:
        loss.backward()
    grads = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for pair in hf.FAMILIES[theirs.config.model_type].pairs(ours.config):
        for key, grad in zip(pair.theirs, pair.parted(ours.get_parameter(pair.ours).grad), strict=True):
            assert_close(grad, grads.pop(key), 2e-4, key)
    assert not grads, "a weight of theirs has no counterpart"


@every_twin
def test_what_is_written_transformers_loads_and_reading_it_again_changes_no_bit(name, saved, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, theirs = saved(name)
    first = read(folder)
    (written := tmp_path / "written").mkdir()
    hf.write(written, first.config, first.get_parameter)
    back = AutoModelForCausalLM.from_pretrained(written, attn_implementation=theirs.config._attn_implementation).eval()
    assert type(back) is type(theirs) or name == "mistral, no window"      # which is a Llama
    with torch.no_grad():
        assert torch.equal(back(TOKENS).logits, theirs(TOKENS).logits)
    original, copy = (load_file(path / hf.WEIGHTS) for path in (folder, written))
    assert original.keys() == copy.keys() and all(torch.equal(original[key], copy[key]) for key in copy)
    again = read(written)
    assert again.config == first.config
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))


def test_greedy_text_is_that_of_transformers(saved):
    folder, theirs = saved("qwen3")
    prompt = TOKENS[0, :4]
    expected = theirs.generate(prompt[None], max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    drawn = decode(read(folder), prompt.tolist(), SamplingParams(max_new_tokens=10, temperature=0.0),
                   never=np.zeros(53, bool))
    assert [int(token) for token in drawn] == expected[0, 4:].tolist()


def test_several_files_and_names_without_a_prefix(saved, tmp_path):
    folder, _ = saved("gpt2", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1 and (folder / hf.INDEX).exists()
    whole = read(folder)
    bare = {key.removeprefix("transformer."): value for file in folder.glob("*.safetensors")
            for key, value in load_file(file).items()}
    (other := tmp_path / "bare").mkdir()
    bare["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)    # the causal mask, which old files hold
    save_file(bare, other / hf.WEIGHTS)
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert all(map(torch.equal, whole.state_dict().values(), read(other).state_dict().values()))


def test_low_precision_is_widened(saved, tmp_path):
    folder, theirs = saved("llama")
    theirs.bfloat16().save_pretrained(folder)
    ours = read(folder)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.embedding.weight, theirs.model.embed_tokens.weight.float())


def changed(folder, **keys):
    """config.json with keys changed, or without those that are None."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}), "utf-8")


def change_tensors(folder, change):
    tensors = load_file(folder / hf.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / hf.WEIGHTS)


@pytest.mark.parametrize("keys, message", [
    (dict(model_type="mamba"), "model_type 'mamba' is not one that can be read: gpt2, llama, mistral, qwen2, qwen3"),
    (dict(model_type=...), "model_type None is not one"),
    (dict(hidden_size=...), "config.json: hidden_size is missing"),
    (dict(hidden_act="relu"), "hidden_act = 'relu' is not supported, only 'silu'"),
    (dict(attention_bias=True), "attention_bias = True with mlp_bias = False is not supported"),
    (dict(rope_parameters={"rope_type": "yarn"}), "rope type 'yarn' is not supported, only default, linear and llama3"),
    (dict(rope_parameters={"rope_type": "linear"}), "config.json: factor is missing"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor is not supported"),
    (dict(hidden_size="wide"), "width takes a whole number, not 'wide'"),
    (dict(num_attention_heads=5), "num_heads = 5 is not a multiple of num_kv_heads = 2"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, layer_types=[
        "full_attention", "sliding_attention"]), "layers with and without a sliding window are not supported"),
])
def test_settings_that_cannot_be_read(keys, message, saved):
    folder, _ = saved()
    changed(folder, **keys)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        hf.read_settings(folder)


@pytest.mark.parametrize("keys, message", [
    (dict(activation_function="relu"), "activation 'relu' is not supported, only gelu_new, gelu_pytorch_tanh, gelu"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True is not supported"),
])
def test_settings_of_gpt2_that_cannot_be_read(keys, message, saved):
    folder, _ = saved("gpt2")
    changed(folder, **keys)
    with pytest.raises(ValueError, match=message):
        hf.read_settings(folder)


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3, DEFAULT_ROPE], ids=["linear", "llama3", "default"])
def test_rope_settings_of_transformers_4_and_5(rope, saved):
    theirs, ours = rope
    old = {key: value for key, value in theirs.items() if key != "rope_theta"}
    for keys in (dict(rope_parameters=theirs, rope_theta=...),
                 dict(rope_parameters=..., rope_theta=500.0, rope_scaling=old),
                 dict(rope_parameters=..., rope_theta=500.0,
                      rope_scaling={"type" if key == "rope_type" else key: value for key, value in old.items()})):
        folder, _ = saved()
        changed(folder, **keys)
        config = hf.read_settings(folder)[1]
        assert all(getattr(config, key) == value for key, value in ours.items())


@pytest.mark.parametrize("change, message", [
    (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is missing; config.json tells of a model"),
    (lambda tensors: tensors.update({"model.norm.weight": torch.ones(23)}),
     r"model.norm.weight is \(23,\), by config.json it must be \(24,\)"),
    (lambda tensors: tensors.update({"model.layers.2.extra": torch.ones(1)}), "model.layers.2.extra is no part of the"),
    (lambda tensors: tensors.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(8, 24)}),
     r"k_proj.weight is \(8, 24\), by config.json it must be \(20, 24\)"),
])
def test_tensors_that_do_not_fit(change, message, saved):
    folder, _ = saved()
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_files_that_cannot_be_read(saved, tmp_path):
    folder, _ = saved("gpt2", max_shard_size="20KB")
    index = json.loads((folder / hf.INDEX).read_text("utf-8"))
    shard = folder / sorted(set(index["weight_map"].values()))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=f"{shard.name}: not a safetensors file, or cut off"):
        read(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: missing, and named by {hf.INDEX}"):
        read(folder)
    shard.write_bytes(content)
    for outside in ("../x.safetensors", "/etc/x.safetensors", ".."):
        (folder / hf.INDEX).write_text(json.dumps({"weight_map": {"transformer.wte.weight": outside}}), "utf-8")
        with pytest.raises(ValueError, match="lies outside the directory"):
            read(folder)
    names = sorted(set(index["weight_map"].values()))
    swapped = {tensor: names[-1] for tensor in index["weight_map"]}
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": swapped}), "utf-8")
    with pytest.raises(ValueError, match="is not in the file that is named for it"):
        read(folder)
    (folder / hf.INDEX).write_text("[]", "utf-8")
    with pytest.raises(ValueError, match="holds no weight_map of file names"):
        read(folder)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        hf.Weights(empty, ExitStack())


@pytest.mark.parametrize("settings, named", [
    (dict(mlp="squared_relu", qk_norm=False), "model.mlp = 'squared_relu' has no counterpart in llama"),
    (dict(norm_position="post", norm="layer_norm", mlp="gelu", position="learned", qk_norm=False, bias=True),
     "model.norm_position = 'post' has no counterpart in gpt2"),
    (dict(mlp="swiglu", qkv_bias=True), "has no counterpart in qwen"),
    (dict(mlp="swiglu", position="none"), "model.position = 'none' has no counterpart in qwen3"),
])
def test_models_that_no_family_has(settings, named):
    with pytest.raises(hf.Unsupported, match=named):
        hf.family_for(ModelConfig(vocab_size=10, width=24, num_heads=2, **settings))


@pytest.mark.parametrize("kind, settings", [
    ("gpt2", dict(norm="layer_norm", mlp="gelu", position="learned", qk_norm=False, bias=True)),
    ("gpt2", dict(norm="layer_norm", mlp="gelu_erf", position="learned", qk_norm=False, bias=True, mlp_width=30)),
    ("llama", dict(mlp="swiglu", qk_norm=False)), ("llama", dict(mlp="swiglu", qk_norm=False, bias=True)),
    ("mistral", dict(mlp="swiglu", qk_norm=False, window=7)),
    ("qwen2", dict(mlp="swiglu", qk_norm=False, qkv_bias=True)), ("qwen3", dict(mlp="swiglu"))])
def test_the_family_of_a_model_of_ours(kind, settings):
    assert hf.family_for(random_model(**settings).config)[0] == kind
