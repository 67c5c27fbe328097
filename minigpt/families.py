"""Families of models that others have: one map of settings, names and shapes for each, read in both directions.

A family's tensors are pairs: one of ours, and those of theirs that lie in it one below the other, each transposed where
theirs is. A new family is a row of FAMILIES.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from minigpt.config import ModelConfig, ObjectiveConfig
from minigpt.model import MLPS

PRETRAINED_BERT = "BertForPreTraining"
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

    def rows_of(self, theirs: torch.Tensor) -> torch.Tensor:
        """The rows of ours that one of theirs is."""
        return theirs.T if self.transposed else theirs

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
    config: Callable[[ModelConfig], dict] | None
    """The way back; None: such a model is not written."""
    pairs: Callable[[ModelConfig], Iterator[Pair]]
    prefix: str
    """What their names begin with, which files of the bare model leave out."""
    objective: str = "causal"
    """What such a model is trained for, in our word."""
    derived: tuple[str, ...] = ()
    """Ends of names of tensors that are computed, not learnt; some files hold them."""
    copies: tuple[tuple[str, str], ...] = ()
    """(a name, the name of what is kept a second time under it); where they differ, the model has no tied head."""
    can_untie: bool = True
    """Whether there is a model of the family whose head is not tied."""
    left_out: tuple[str, ...] = ()
    """Beginnings of names of tensors that have no counterpart of ours, as they serve another objective."""
    old_names: tuple[tuple[str, str], ...] = ()
    """(end of a name, the end that it has in old files)"""
    with_next_sentence: str = ""
    """The architecture of a model with that head, where there is one."""

    def architecture_of(self, model: ModelConfig) -> str:
        return self.with_next_sentence if model.next_sentence else self.architecture


def _norm(ours, theirs, biased):
    for part in ("weight", "bias")[:1 + biased]:
        yield Pair(f"{ours}.{part}", (f"{theirs}.{part}",))


def _linear(ours, theirs, biased, transposed=False, rows=()):
    yield Pair(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), transposed, rows)
    if biased:
        yield Pair(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), rows=rows)


def _must_be(given, key, wanted):
    if given.get(key, wanted) != wanted:
        raise Unsupported(f"{key} = {given[key]!r} is not supported, only {wanted!r}")


def _gpt2_settings(given):
    for key, wanted in dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                            add_cross_attention=False).items():
        _must_be(given, key, wanted)
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


def _gpt2_pairs(model, transposed=True):
    yield Pair("embedding.weight", ("transformer.wte.weight",))
    yield Pair("positions.embedding.weight", ("transformer.wpe.weight",))
    for i in range(model.depth):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        yield from _norm(f"{ours}.attention_norm", f"{theirs}.ln_1", model.bias)
        yield from _linear(f"{ours}.attention.qkv", [f"{theirs}.attn.c_attn"], model.bias, transposed)
        yield from _linear(f"{ours}.attention.out", [f"{theirs}.attn.c_proj"], model.bias, transposed)
        yield from _norm(f"{ours}.mlp_norm", f"{theirs}.ln_2", model.bias)
        yield from _linear(f"{ours}.mlp.up", [f"{theirs}.mlp.c_fc"], model.bias, transposed)
        yield from _linear(f"{ours}.mlp.down", [f"{theirs}.mlp.c_proj"], model.bias, transposed)
    yield from _norm("final_norm", "transformer.ln_f", model.bias)
    if not model.tied_embeddings:
        yield Pair("head.weight", ("lm_head.weight",))


def _nanogpt_settings(given):
    return dict(
        vocab_size=given["vocab_size"], context_length=given["block_size"], depth=given["n_layer"],
        width=given["n_embd"], num_heads=given["n_head"], mlp="gelu_erf", norm="layer_norm", position="learned",
        qk_norm=False, bias=given["bias"], dropout=given.get("dropout", 0.0))


def _bert_settings(given):
    for key, wanted in dict(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False,
                            tie_word_embeddings=True).items():
        _must_be(given, key, wanted)
    return dict(
        vocab_size=given["vocab_size"], context_length=given.get("max_position_embeddings", 512),
        depth=given["num_hidden_layers"], width=given["hidden_size"], num_heads=given["num_attention_heads"],
        mlp=_activation(given.get("hidden_act", "gelu")), mlp_width=given["intermediate_size"], norm="layer_norm",
        norm_eps=given.get("layer_norm_eps", 1e-12), norm_position="post", embedding_norm=True,
        token_types=given.get("type_vocab_size", 2), head_transform=True, position="learned", qk_norm=False, bias=True,
        next_sentence=PRETRAINED_BERT in (given.get("architectures") or ()))


def _bert_config(model):
    return {
        "vocab_size": model.vocab_size, "max_position_embeddings": model.context_length,
        "num_hidden_layers": model.depth, "hidden_size": model.width, "num_attention_heads": model.num_heads,
        "intermediate_size": _mlp_width(model), "hidden_act": "gelu_new" if model.mlp == "gelu" else "gelu",
        "layer_norm_eps": model.norm_eps, "type_vocab_size": model.token_types,
        **dict.fromkeys(("attention_probs_dropout_prob", "hidden_dropout_prob"), model.dropout)}


def _bert_pairs(model):
    embeddings, head = "bert.embeddings", "cls.predictions"
    yield Pair("embedding.weight", (f"{embeddings}.word_embeddings.weight",))
    yield Pair("positions.embedding.weight", (f"{embeddings}.position_embeddings.weight",))
    if model.token_types:
        yield Pair("token_types.weight", (f"{embeddings}.token_type_embeddings.weight",))
    yield from _norm("embedding_norm", f"{embeddings}.LayerNorm", True)
    for i in range(model.depth):
        ours, theirs = f"blocks.{i}", f"bert.encoder.layer.{i}"
        yield from _linear(f"{ours}.attention.qkv", [f"{theirs}.attention.self.{part}" for part in (
            "query", "key", "value")], True, rows=(model.width,) * 3)
        yield from _linear(f"{ours}.attention.out", [f"{theirs}.attention.output.dense"], True)
        yield from _norm(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm", True)
        yield from _linear(f"{ours}.mlp.up", [f"{theirs}.intermediate.dense"], True)
        yield from _linear(f"{ours}.mlp.down", [f"{theirs}.output.dense"], True)
        yield from _norm(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm", True)
    yield from _linear("head.transform.dense", [f"{head}.transform.dense"], True)
    yield from _norm("head.transform.norm", f"{head}.transform.LayerNorm", True)
    yield Pair("head.bias", (f"{head}.bias",))
    if model.next_sentence:
        yield from _linear("pooler.dense", ["bert.pooler.dense"], True)
        yield from _linear("next_sentence", ["cls.seq_relationship"], True)


def _llama_settings(given):
    kind = given["model_type"]
    _must_be(given, "hidden_act", "silu")
    heads, width = given["num_attention_heads"], given["hidden_size"]
    head_size = given.get("head_dim") or (128 if kind == "qwen3" else 0)
    attention_bias = kind == "qwen2" or given.get("attention_bias", False)
    return dict(
        vocab_size=given["vocab_size"], context_length=given.get("max_position_embeddings", 2048),
        depth=given["num_hidden_layers"], width=width, num_heads=heads,
        num_kv_heads=(given.get("num_key_value_heads") if kind == "llama" else given["num_key_value_heads"]) or heads,
        head_size=0 if head_size * heads == width else head_size, mlp="swiglu",
        mlp_width=given["intermediate_size"], norm="rms_norm", norm_eps=given.get("rms_norm_eps", 1e-6),
        position="rotary", **_rope_settings(given), qk_norm=kind == "qwen3", bias=given.get("mlp_bias", False),
        qkv_bias=attention_bias, out_bias=kind != "qwen2" and attention_bias,
        tied_embeddings=given.get("tie_word_embeddings", False), window=_window(given))


def _window(given):
    """Of attention in tokens, 0 for none; it must be one for all layers."""
    kind, window, depth = given["model_type"], given.get("sliding_window") or 0, given["num_hidden_layers"]
    if kind == "llama" or not window or kind != "mistral" and not given.get("use_sliding_window", False):
        return 0
    full = min(depth, 0 if kind == "mistral" else given.get("max_window_layers", 28))
    kinds = given.get("layer_types") or ["full_attention"] * full + ["sliding_attention"] * (depth - full)
    if set(kinds) == {"full_attention"}:
        return 0
    if set(kinds) != {"sliding_attention"}:
        raise Unsupported("layers with and without a sliding window are not supported")
    return window


def _rope_settings(given):
    """From `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling`, which wins, of those before."""
    for key in ("rope_parameters", "rope_scaling"):
        value = given.get(key) or {}
        if not isinstance(value, dict) or any(isinstance(part, dict) for part in value.values()):
            raise Unsupported(f"{key} = {value!r} is not supported, only one JSON object of plain values")
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    if given.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise Unsupported("partial_rotary_factor is not supported")
    if kind == "default":
        return dict(rope_base=base)
    if kind == "linear":
        return dict(rope_base=base, rope_scale=rope["factor"])
    if kind == "llama3":
        context = rope.get("original_max_position_embeddings") or given["max_position_embeddings"]
        return dict(rope_base=base, rope_scale=rope["factor"], rope_low_turns=rope["low_freq_factor"],
                    rope_high_turns=rope["high_freq_factor"], rope_original_context=context)
    raise Unsupported(f"rope type {kind!r} is not supported, only default, linear and llama3")


def _or(value, default):
    return default if value is None else value


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


def _llama_config(model, kind):
    rope = _rope_config(model)
    config = {
        "vocab_size": model.vocab_size, "max_position_embeddings": model.context_length,
        "num_hidden_layers": model.depth, "hidden_size": model.width, "intermediate_size": _mlp_width(model),
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.H_kv, "head_dim": model.D,
        "hidden_act": "silu", "rms_norm_eps": model.norm_eps, "tie_word_embeddings": model.tied_embeddings,
        "rope_parameters": rope, "rope_theta": model.rope_base, "attention_dropout": model.dropout,
        "rope_scaling": None if rope["rope_type"] == "default" else
        {key: value for key, value in rope.items() if key != "rope_theta"}}
    if kind == "llama":
        config |= {"attention_bias": _or(model.qkv_bias, model.bias), "mlp_bias": model.bias}
    else:
        config["sliding_window"] = model.window or None
    if kind == "qwen3":
        config["attention_bias"] = _or(model.qkv_bias, model.bias)
    if kind in ("qwen2", "qwen3"):
        layer = "sliding_attention" if model.window else "full_attention"
        config |= {"use_sliding_window": bool(model.window), "max_window_layers": 0 if model.window else model.depth,
                   "layer_types": [layer] * model.depth}
    return config


def _llama_pairs(model):
    yield Pair("embedding.weight", ("model.embed_tokens.weight",))
    for i in range(model.depth):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield from _norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm", False)
        yield from _linear(f"{ours}.attention.qkv", [f"{theirs}.self_attn.{part}_proj" for part in "qkv"],
                           _or(model.qkv_bias, model.bias),
                           rows=(model.num_heads * model.D, *[model.H_kv * model.D] * 2))
        yield from _linear(f"{ours}.attention.out", [f"{theirs}.self_attn.o_proj"],
                           _or(model.out_bias, model.bias))
        if model.qk_norm:
            for part in "qk":
                yield Pair(f"{ours}.attention.{part}_norm.weight", (f"{theirs}.self_attn.{part}_norm.weight",))
        yield from _norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", False)
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


def _llama(kind, architecture):
    return Family(architecture, _llama_settings, partial(_llama_config, kind=kind), _llama_pairs, "model.",
                  derived=(".rotary_emb.inv_freq",), copies=(("lm_head.weight", "model.embed_tokens.weight"),))


FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", _gpt2_settings, _gpt2_config, _gpt2_pairs, "transformer.",
                   derived=(".attn.bias", ".attn.masked_bias"),
                   copies=(("lm_head.weight", "transformer.wte.weight"),)),
    "llama": _llama("llama", "LlamaForCausalLM"), "mistral": _llama("mistral", "MistralForCausalLM"),
    "qwen2": _llama("qwen2", "Qwen2ForCausalLM"), "qwen3": _llama("qwen3", "Qwen3ForCausalLM"),
    "bert": Family("BertForMaskedLM", _bert_settings, _bert_config, _bert_pairs, "bert.", "masked",
                   derived=(".position_ids",), copies=(
                       ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
                       ("cls.predictions.decoder.bias", "cls.predictions.bias")), can_untie=False,
                   left_out=("bert.pooler.", "cls.seq_relationship."),
                   old_names=((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta")),
                   with_next_sentence=PRETRAINED_BERT),
}
"""{their model_type: the family}; SmolLM is a Llama."""
NANOGPT = Family("GPT of nanoGPT", _nanogpt_settings, None, partial(_gpt2_pairs, transposed=False), "transformer.",
                 derived=(".attn.bias",), copies=(("lm_head.weight", "transformer.wte.weight"),))


def config_of(kind: str, model: ModelConfig) -> dict:
    """What the config.json of a family says of a model."""
    family = FAMILIES[kind]
    return {"architectures": [family.architecture_of(model)], "model_type": kind, "torch_dtype": "float32",
            **family.config(model)}


def family_for(model: ModelConfig, objective: str) -> tuple[str, Family]:
    """(model_type, family) whose config.json can tell of a model, found by writing it and reading it back.

    Raises Unsupported naming a setting that no family has as the model has it.
    """
    wanted, nearest, learnt = _spelled_out(model), None, ObjectiveConfig(name=objective).phases[-1][1]
    for kind, family in FAMILIES.items():
        try:
            read = _spelled_out(ModelConfig(**family.settings(config_of(kind, model))))
        except ValueError:                              # what this family makes of it is no model
            continue
        differ = [f"model.{key} = {wanted[key]!r}" for key in wanted
                  if wanted[key] != read[key] and key not in _unused(model)]
        differ += [f"objective.name = {objective!r}"] * (family.objective not in learnt)
        if not differ:
            return kind, family
        if nearest is None or len(differ) < len(nearest[1]):
            nearest = kind, differ
    if nearest is None:
        raise Unsupported(f"none of the families that can be written has such a model: {', '.join(FAMILIES)}")
    kind, differ = nearest
    raise Unsupported(f"{differ[0]} has no counterpart in {kind}, the nearest of the families that can be written: "
                      f"{', '.join(FAMILIES)}")


def _spelled_out(model):
    """Its settings, defaults filled in."""
    return dataclasses.asdict(model) | dict(
        num_kv_heads=model.H_kv, head_size=model.D, mlp_width=_mlp_width(model),
        qkv_bias=_or(model.qkv_bias, model.bias), out_bias=_or(model.out_bias, model.bias))


def _unused(model):
    """Settings that a forward pass does not depend on."""
    rope = {"rope_base", "rope_scale"} if model.position != "rotary" else set()
    turns = {"rope_low_turns", "rope_high_turns"} if not model.rope_original_context else set()
    pooling = {"pooling"} if not model.next_sentence and not model.num_classes else set()
    return {"dropout", "init_std"} | rope | turns | pooling
