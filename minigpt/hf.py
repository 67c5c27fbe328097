"""Hugging Face's models and ours: one map of settings, names and shapes for each family, read in both directions.

A family's tensors are pairs: one of ours, and those of theirs that lie in it one below the other, each transposed where
theirs is. Nothing here needs transformers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minigpt.checkpoint import model_tensors
from minigpt.config import ModelConfig
from minigpt.files import read_json
from minigpt.model import GPT, MLPS

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf"}
"""{theirs: our `mlp`}."""


class Unsupported(ValueError):
    """A model that has no counterpart on the other side."""


@dataclass(frozen=True)
class Pair:
    """One of our tensors, and those of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    rows: tuple[int, ...] = ()
    """Of each of several of theirs."""

    def shapes(self, ours: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Of theirs, from that of ours."""
        if self.rows:
            return [(rows, *ours[1:]) for rows in self.rows]
        return [ours[::-1] if self.transposed else ours]

    def joined(self, theirs: list[torch.Tensor]) -> torch.Tensor:
        """Ours from theirs."""
        return torch.cat(theirs) if self.rows else theirs[0].T if self.transposed else theirs[0]

    def parted(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """Theirs from ours."""
        return list(ours.split(self.rows)) if self.rows else [ours.T if self.transposed else ours]


@dataclass(frozen=True)
class Family:
    """One kind of model: what its config.json says, and how its tensors are named."""

    architecture: str
    """Theirs, a class of transformers."""
    settings: Callable[[dict], dict]
    """Their config.json to our ModelConfig's settings; Unsupported or KeyError where it cannot be."""
    config: Callable[[ModelConfig], dict]
    """The way back."""
    pairs: Callable[[ModelConfig], Iterator[Pair]]
    prefix: str
    """What their names begin with, which files of the bare model leave out."""
    derived: tuple[str, ...] = ()
    """Ends of names of tensors that are computed, not learnt; some files hold them."""


def _block_norms(i, ours, theirs, biased):
    for part in ("weight", "bias")[:1 + biased]:
        yield Pair(f"blocks.{i}.{ours}.{part}", (f"{theirs}.{part}",))


def _linear(ours, theirs, biased, transposed=False, rows=()):
    yield Pair(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), transposed, rows)
    if biased:
        yield Pair(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), rows=rows)


def _gpt2_settings(given):
    for key, wanted in dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                            add_cross_attention=False).items():
        if given.get(key, wanted) != wanted:
            raise Unsupported(f"{key} = {given[key]} is not supported")
    return dict(
        vocab_size=given["vocab_size"], context_length=given.get("n_positions", 1024), depth=given["n_layer"],
        width=given["n_embd"], num_heads=given["n_head"], mlp=_activation(given.get("activation_function", "gelu_new")),
        mlp_width=given.get("n_inner") or 0, norm="layer_norm", norm_eps=given.get("layer_norm_epsilon", 1e-5),
        position="learned", qk_norm=False, bias=True, tied_embeddings=given.get("tie_word_embeddings", True))


def _gpt2_config(model):
    return {
        "vocab_size": model.vocab_size, "n_positions": model.context_length, "n_ctx": model.context_length,
        "n_layer": model.depth, "n_embd": model.width, "n_head": model.num_heads, "n_inner": model.mlp_width or None,
        "activation_function": "gelu_new" if model.mlp == "gelu" else "gelu", "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), model.dropout)}


def _gpt2_pairs(model):
    yield Pair("embedding.weight", ("transformer.wte.weight",))
    yield Pair("positions.embedding.weight", ("transformer.wpe.weight",))
    for i in range(model.depth):
        theirs = f"transformer.h.{i}"
        yield from _block_norms(i, "attention_norm", f"{theirs}.ln_1", True)
        yield from _linear(f"blocks.{i}.attention.qkv", [f"{theirs}.attn.c_attn"], True, transposed=True)
        yield from _linear(f"blocks.{i}.attention.out", [f"{theirs}.attn.c_proj"], True, transposed=True)
        yield from _block_norms(i, "mlp_norm", f"{theirs}.ln_2", True)
        yield from _linear(f"blocks.{i}.mlp.up", [f"{theirs}.mlp.c_fc"], True, transposed=True)
        yield from _linear(f"blocks.{i}.mlp.down", [f"{theirs}.mlp.c_proj"], True, transposed=True)
    yield from _linear("final_norm", ["transformer.ln_f"], True)
    if not model.tied_embeddings:
        yield Pair("head.weight", ("lm_head.weight",))


def _llama_settings(given):
    kind = given["model_type"]
    if given.get("hidden_act", "silu") != "silu":
        raise Unsupported(f"hidden_act = {given['hidden_act']!r} is not supported, only 'silu'")
    attention_bias, mlp_bias = given.get("attention_bias", False), given.get("mlp_bias", False)
    if attention_bias != mlp_bias:
        raise Unsupported(f"attention_bias = {attention_bias} with mlp_bias = {mlp_bias} is not supported")
    heads = given["num_attention_heads"]
    return dict(
        vocab_size=given["vocab_size"], context_length=given.get("max_position_embeddings", 2048),
        depth=given["num_hidden_layers"], width=given["hidden_size"], num_heads=heads,
        num_kv_heads=given.get("num_key_value_heads", heads) if kind == "llama" else given["num_key_value_heads"],
        head_size=given.get("head_dim") or (128 if kind == "qwen3" else 0), mlp="swiglu",
        mlp_width=given["intermediate_size"], norm="rms_norm", norm_eps=given.get("rms_norm_eps", 1e-6),
        position="rotary", **_rope_settings(given), qk_norm=kind == "qwen3", bias=attention_bias,
        qkv_bias=kind == "qwen2" or None, tied_embeddings=given.get("tie_word_embeddings", False),
        window=_window(given))


def _window(given):
    """Of attention in tokens, 0 for none; it must be one for all layers."""
    window = given.get("sliding_window") or 0
    if not given.get("use_sliding_window", given["model_type"] == "mistral"):       # Qwen's switch
        return 0
    kinds = set(given.get("layer_types") or ["sliding_attention"] * bool(window))
    if kinds == {"full_attention"}:
        return 0
    if len(kinds) > 1 or "layer_types" not in given and given.get("max_window_layers", 0):
        raise Unsupported("layers with and without a sliding window are not supported")
    return window


def _rope_settings(given):
    """From `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of those before."""
    rope = given.get("rope_parameters") or {"rope_theta": given.get("rope_theta", 10000.0)} | (
        given.get("rope_scaling") or {})
    kind, base = rope.get("rope_type", rope.get("type", "default")), rope.get("rope_theta", 10000.0)
    if given.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise Unsupported("partial_rotary_factor is not supported")
    if kind == "default":
        return dict(rope_base=base)
    if kind == "linear":
        return dict(rope_base=base, rope_scale=rope["factor"])
    if kind == "llama3":
        return dict(rope_base=base, rope_scale=rope["factor"], rope_low_turns=rope["low_freq_factor"],
                    rope_high_turns=rope["high_freq_factor"],
                    rope_original_context=rope["original_max_position_embeddings"])
    raise Unsupported(f"rope type {kind!r} is not supported, only default, linear and llama3")


def _mlp_width(model):
    return model.mlp_width or MLPS[model.mlp].default_width(model.width)


def _rope_config(model):
    if model.rope_original_context:
        return {"rope_type": "llama3", "rope_theta": model.rope_base, "factor": model.rope_scale,
                "low_freq_factor": model.rope_low_turns, "high_freq_factor": model.rope_high_turns,
                "original_max_position_embeddings": model.rope_original_context}
    if model.rope_scale != 1.0:
        return {"rope_type": "linear", "rope_theta": model.rope_base, "factor": model.rope_scale}
    return {"rope_type": "default", "rope_theta": model.rope_base}


def _llama_config(model):
    rope = _rope_config(model)
    config = {
        "vocab_size": model.vocab_size, "max_position_embeddings": model.context_length,
        "num_hidden_layers": model.depth, "hidden_size": model.width, "intermediate_size": _mlp_width(model),
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.H_kv, "head_dim": model.D,
        "hidden_act": "silu", "rms_norm_eps": model.norm_eps, "tie_word_embeddings": model.tied_embeddings,
        "rope_parameters": rope, "rope_theta": model.rope_base, "attention_dropout": model.dropout,
        "rope_scaling": None if rope["rope_type"] == "default" else
        {key: value for key, value in rope.items() if key != "rope_theta"}}
    if model.window:
        config["sliding_window"] = model.window
    elif not model.qk_norm and not model.qkv_bias:
        config |= {"attention_bias": model.bias, "mlp_bias": model.bias}
    return config


def _llama_pairs(model):
    yield Pair("embedding.weight", ("model.embed_tokens.weight",))
    for i in range(model.depth):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield from _block_norms(i, "attention_norm", f"{theirs}.input_layernorm", False)
        yield from _linear(f"{ours}.attention.qkv", [f"{theirs}.self_attn.{part}_proj" for part in "qkv"],
                           model.bias if model.qkv_bias is None else model.qkv_bias,
                           rows=(model.num_heads * model.D, *[model.H_kv * model.D] * 2))
        yield from _linear(f"{ours}.attention.out", [f"{theirs}.self_attn.o_proj"], model.bias)
        if model.qk_norm:
            for part in "qk":
                yield Pair(f"{ours}.attention.{part}_norm.weight", (f"{theirs}.self_attn.{part}_norm.weight",))
        yield from _block_norms(i, "mlp_norm", f"{theirs}.post_attention_layernorm", False)
        yield from _linear(f"{ours}.mlp.gate_up", [f"{theirs}.mlp.{part}_proj" for part in ("gate", "up")], model.bias,
                           rows=(_mlp_width(model),) * 2)
        yield from _linear(f"{ours}.mlp.down", [f"{theirs}.mlp.down_proj"], model.bias)
    yield Pair("final_norm.weight", ("model.norm.weight",))
    if not model.tied_embeddings:
        yield Pair("head.weight", ("lm_head.weight",))


def _activation(name):
    if name not in ACTIVATIONS:
        raise Unsupported(f"activation {name!r} is not supported, only {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _llama(architecture):
    return Family(architecture, _llama_settings, _llama_config, _llama_pairs, "model.", (".rotary_emb.inv_freq",))


FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", _gpt2_settings, _gpt2_config, _gpt2_pairs, "transformer.",
                   (".attn.bias", ".attn.masked_bias")),
    "llama": _llama("LlamaForCausalLM"), "mistral": _llama("MistralForCausalLM"), "qwen2": _llama("Qwen2ForCausalLM"),
    "qwen3": _llama("Qwen3ForCausalLM"),
}
"""{their model_type: the family}; SmolLM is a Llama."""


class Weights:
    """The tensors of a directory of safetensors files, one or several with an index, read one at a time."""

    def __init__(self, directory: Path, files: ExitStack):
        index, single = directory / INDEX, directory / WEIGHTS
        if index.is_file():
            content = read_json(index)
            names = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise ValueError(f"{index}: holds no weight_map of file names")
            outside = sorted(name for name in set(names.values()) if Path(name).name != name or name in (".", ".."))
            if outside:
                raise ValueError(f"{index}: {outside[0]!r} lies outside the directory")
            opened = {name: self._open(directory / name, files) for name in sorted(set(names.values()))}
            self.path, self._files = index, {tensor: opened[name] for tensor, name in names.items()}
        elif single.is_file():
            file = self._open(single, files)
            self.path, self._files = single, dict.fromkeys(file.keys(), file)
        else:
            raise FileNotFoundError(f"{directory}: no {WEIGHTS} and no {INDEX}; name a directory that holds one (a "
                                    "pickle is not read: save it as safetensors first)")

    def _open(self, path, files):
        try:
            return files.enter_context(safe_open(path, "pt"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: missing, and named by {INDEX}") from None
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file, or cut off ({error})") from None

    def names(self):
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def _slice(self, name):
        try:
            return self._files[name].get_slice(name)
        except SafetensorError:
            raise ValueError(f"{self.path}: {name} is not in the file that is named for it") from None

    def tensor(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)


def read_settings(directory: Path) -> tuple[Family, ModelConfig]:
    """The family and the model that config.json tells of. Raises ValueError naming what is missing or unknown."""
    path = directory / "config.json"
    given = read_json(path)
    kind = given.get("model_type") if isinstance(given, dict) else None
    if kind not in FAMILIES:
        raise ValueError(f"{path}: model_type {kind!r} is not one that can be read: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind], ModelConfig(**FAMILIES[kind].settings(given))
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of our tensors, a tied head left out."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in model_tensors(GPT(model, initial=False)).items()}


def plan(family: Family, model: ModelConfig, weights: Weights) -> dict[Pair, list[str]]:
    """{pair: the names under which its tensors lie in the files}, their shapes checked; nothing is read yet."""
    names, shapes, found = set(weights.names()), shapes_of(model), {}
    bare = "" if any(name.startswith(family.prefix) for name in names) else family.prefix
    for pair in family.pairs(model):
        found[pair] = [name.removeprefix(bare) for name in pair.theirs]
        for name, shape in zip(found[pair], pair.shapes(shapes[pair.ours]), strict=True):
            if name not in names:
                raise ValueError(f"{weights.path}: {name} is missing; config.json tells of a model that has it")
            if weights.shape(name) != shape:
                raise ValueError(f"{weights.path}: {name} is {weights.shape(name)}, by config.json it must be {shape}")
    assert {pair.ours for pair in found} == shapes.keys()
    known = {name for group in found.values() for name in group}
    tied = {"lm_head.weight"} if model.tied_embeddings else set()
    for name in sorted(names - known - tied):
        if not name.endswith(family.derived):
            raise ValueError(f"{weights.path}: {name} is no part of the model that config.json tells of")
    return found


def read_tensors(planned: dict[Pair, list[str]], weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """(our name, our tensor in float32), one at a time."""
    for pair, names in planned.items():
        yield pair.ours, pair.joined([weights.tensor(name) for name in names]).float()


def family_for(model: ModelConfig) -> tuple[str, Family]:
    """(model_type, family) whose config.json can tell of a model, found by writing it and reading it back.

    Raises Unsupported naming a setting that no family has as the model has it.
    """
    wanted, nearest = _spelled_out(model), None
    for kind, family in FAMILIES.items():
        read = _spelled_out(ModelConfig(**family.settings({"model_type": kind} | family.config(model))))
        differ = [key for key in wanted if wanted[key] != read[key] and key not in _unused(model)]
        if not differ:
            return kind, family
        if nearest is None or len(differ) < len(nearest[1]):
            nearest = kind, differ
    kind, differ = nearest
    raise Unsupported(f"model.{differ[0]} = {wanted[differ[0]]!r} has no counterpart in {kind}, the nearest of the "
                      f"families that can be written: {', '.join(FAMILIES)}")


def _spelled_out(model):
    """Its settings, defaults filled in."""
    return dataclasses.asdict(model) | dict(
        num_kv_heads=model.H_kv, head_size=model.D, mlp_width=_mlp_width(model),
        qkv_bias=model.bias if model.qkv_bias is None else model.qkv_bias)


def _unused(model):
    """Settings that a forward pass does not depend on."""
    rope = {"rope_base", "rope_scale"} if model.position != "rotary" else set()
    turns = {"rope_low_turns", "rope_high_turns"} if not model.rope_original_context else set()
    return {"dropout", "init_std"} | rope | turns


def write(directory: Path, model: ModelConfig, ours: Callable[[str], torch.Tensor]) -> None:
    """Write config.json and model.safetensors, which transformers loads; `ours` gives a tensor by our name.

    Tensors are asked for one at a time, in float32. Raises Unsupported for a model that no family has.
    """
    kind, family = family_for(model)
    config = {"architectures": [family.architecture], "model_type": kind, "torch_dtype": "float32",
              **family.config(model)}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    shapes = shapes_of(model)
    theirs = {name: shape for pair in family.pairs(model)
              for name, shape in zip(pair.theirs, pair.shapes(shapes[pair.ours]), strict=True)}
    write_tensors(directory / WEIGHTS, theirs, (
        (name, tensor) for pair in family.pairs(model)
        for name, tensor in zip(pair.theirs, pair.parted(ours(pair.ours)), strict=True)))


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """A safetensors file of float32 tensors that come one at a time, in the order of `shapes`."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                     # so that the numbers begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), wanted in zip(tensors, shapes, strict=True):
            assert name == wanted and tuple(tensor.shape) == shapes[name] and tensor.dtype == torch.float32
            file.write(tensor.detach().contiguous().numpy())
        assert file.tell() == 8 + len(text) + end
