"""Tiny models of transformers with every tensor random and large, and minigpt models with the same weights."""

import torch

from minigpt.config import ModelConfig
from minigpt.families import FAMILIES
from minigpt.model import GPT


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter, norms and biases too, away from its initial value and large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
        mean = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0     # 1: of a norm
        parameter.data.copy_(mean + scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def random_model(seed: int = 0, **settings) -> GPT:
    """A small GPT with random weights throughout."""
    defaults = dict(vocab_size=53, context_length=16, depth=2, width=24, num_heads=4)
    return randomise(GPT(ModelConfig(**defaults | settings)), seed)


def gpt2_twins(vocab_size: int = 53, context_length: int = 16, seed: int = 0, activation_function="gelu_new"):
    """(transformers' GPT-2, ours)"""
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = randomise(GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=context_length, n_embd=24, n_layer=2, n_head=4, bos_token_id=1,
        eos_token_id=2, activation_function=activation_function)), seed)
    return theirs, twin_of(theirs, ModelConfig(
        vocab_size=vocab_size, context_length=context_length, depth=2, width=24, num_heads=4,
        mlp="gelu" if activation_function == "gelu_new" else "gelu_erf",
        norm="layer_norm", position="learned", qk_norm=False, bias=True))


LINEAR = ({"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, dict(rope_base=500.0, rope_scale=2.0))
LLAMA3 = ({"rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0, "original_max_position_embeddings": 100,
           "low_freq_factor": 1.5, "high_freq_factor": 5.0},
          dict(rope_base=500.0, rope_scale=8.0, rope_original_context=100, rope_low_turns=1.5, rope_high_turns=5.0))
"""Rotary positions in transformers' words and in ours; of the second the pairs turn 16, 4.6, 1.3, 0.4 and 0.1 times."""


def llama_twins(kind: str, seed: int = 0, rope=LINEAR, **theirs_only):
    """(transformers' Llama, Qwen2, Qwen3 or Mistral, ours), with grouped queries and a head of its own."""
    import transformers

    shape = dict(vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=16, rms_norm_eps=1e-3, tie_word_embeddings=False,
                 attn_implementation="eager", rope_parameters=rope[0])
    head_size = 6 if kind == "Qwen2" else 10
    config = getattr(transformers, kind + "Config")(**shape, head_dim=head_size, **theirs_only)
    theirs = randomise(getattr(transformers, kind + "ForCausalLM")(config), seed)
    return theirs, twin_of(theirs, ModelConfig(
        vocab_size=53, context_length=16, depth=2, width=24, num_heads=4, num_kv_heads=2, head_size=head_size,
        mlp="swiglu", mlp_width=40, norm="rms_norm", norm_eps=1e-3, position="rotary", **rope[1],
        qk_norm=kind == "Qwen3", bias=False, qkv_bias=kind == "Qwen2", tied_embeddings=False,
        window=theirs_only.get("sliding_window") or 0))


def bert_twins(kind: str = "BertForMaskedLM", seed: int = 0, **theirs_only):
    """(transformers' BertForMaskedLM or BertForPreTraining, ours).

    A padding token, whose row gets no gradient where it is read, is left out unless given.
    """
    import transformers

    config = transformers.BertConfig(**dict(
        vocab_size=53, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=16, layer_norm_eps=1e-3, pad_token_id=None) | theirs_only)
    theirs = randomise(getattr(transformers, kind)(config), seed)
    return theirs, twin_of(theirs, ModelConfig(
        vocab_size=config.vocab_size, context_length=config.max_position_embeddings, depth=2, width=24, num_heads=4,
        mlp="gelu_erf", mlp_width=40, norm="layer_norm", norm_eps=1e-3, norm_position="post", embedding_norm=True,
        token_types=2, head_transform=True, position="learned", qk_norm=False, bias=True,
        next_sentence=kind == "BertForPreTraining"))


def twin_of(theirs, config: ModelConfig) -> GPT:
    """Our model of that config, with the weights of one of transformers'."""
    tensors, ours = theirs.state_dict(), GPT(config, initial=False).eval()
    for pair in FAMILIES[theirs.config.model_type].pairs(config):
        ours.get_parameter(pair.ours).data.copy_(torch.cat([pair.rows_of(tensors[name]) for name in pair.theirs]))
    return ours


def rename(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name
