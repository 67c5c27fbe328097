"""The transformer: GPT-2, Llama-like and BERT-like models from one set of parts, picked by the config alone.

Legend: B batch, T query length, S key length (cached ones included), H query heads, H_kv key-value heads, D head size,
C width, V vocabulary. Every op that has a kernel goes through `kernels`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from minigpt.config import ModelConfig
from minigpt.linear import Embedding, Linear, QuantizedEmbedding, QuantizedLinear, linear

ALIGNMENT = 8
"""Numbers of 16 bits that tensor cores read at a time."""


class LayerNorm(nn.Module):
    """With a residual: gives the norm of the sum and the sum, from one pass."""

    def __init__(self, config, size=None):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(size or config.width))
        self.bias = nn.Parameter(torch.zeros(size or config.width)) if config.bias else None

    def forward(self, x, residual=None):
        return kernels.layer_norm(x, self.weight, self.bias, self.eps, residual)


class RMSNorm(nn.Module):
    """With a residual: gives the norm of the sum and the sum, from one pass."""

    def __init__(self, config, size=None):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(size or config.width))

    def forward(self, x, residual=None):
        return kernels.rms_norm(x, self.weight, self.eps, residual)


class NoWeight(nn.Module):
    """Stands for a norm that there is not."""

    weight = None


class NoNorm(nn.Module):
    """Gives x and the residual as they are."""

    def forward(self, x, residual):
        return x, residual


class GeluMLP(nn.Module):
    """down(gelu(up(x)))"""

    approximate = "tanh"

    @staticmethod
    def default_width(C):
        return 4 * C

    def __init__(self, config, width):
        super().__init__()
        self.up = linear(config.weight_bits, config.width, width, config.bias)
        self.down = linear(config.weight_bits, width, config.width, config.bias)

    def forward(self, x):
        return self.down(kernels.gelu(self.up.product(x), self.up.bias, self.approximate))


class ErfGeluMLP(GeluMLP):
    """down(gelu(up(x))), GELU by erf."""

    approximate = "none"


class SquaredReluMLP(GeluMLP):
    """down(max(up(x), 0)²)"""

    def forward(self, x):
        return self.down(kernels.squared_relu(self.up(x)))


class SwigluMLP(nn.Module):
    """down(silu(gate(x)) · up(x))"""

    @staticmethod
    def default_width(C):
        return 32 * math.ceil(C / 12)                   # 8/3 C, rounded up to a multiple of 32

    def __init__(self, config, width):
        super().__init__()
        self.gate_up = linear(config.weight_bits, config.width, 2 * width, config.bias)
        self.down = linear(config.weight_bits, width, config.width, config.bias)

    def forward(self, x):
        return self.down(kernels.swiglu(self.gate_up(x)))


class NoPositions(nn.Module):
    """Adds nothing to the embedding and turns no query or key."""

    tables = None, None

    def __init__(self, config):
        super().__init__()

    def add(self, x, positions):
        return x

    def angles_at(self, positions):
        """(cos, sin, positions) for `kernels.split_heads`."""
        return None, None, None


class LearnedPositions(NoPositions):
    """A learned vector for each position, added to the embedding."""

    def __init__(self, config):
        super().__init__(config)
        self.embedding = Embedding(config.context_length, config.width)

    def add(self, x, positions):
        return x + self.embedding(positions)


class RotaryPositions(NoPositions):
    """Turns pairs of query and key components by an angle that grows with the position."""

    def __init__(self, config):
        super().__init__(config)
        if torch.get_default_device().type == "meta":   # where only shapes are asked for
            cos, sin = torch.empty(2, config.context_length, config.D // 2)
        else:
            cos, sin = self.angles(config)
        self.register_buffer("cos", cos, persistent=False)                                             # (T_max, D/2)
        self.register_buffer("sin", sin, persistent=False)

    @staticmethod
    def angles(config):
        """Cosine and sine of position times frequency, computed in float64."""
        inverse = config.rope_base ** (-torch.arange(0, config.D, 2, dtype=torch.float64) / config.D)      # (D/2,)
        if config.rope_original_context:
            turns = config.rope_original_context * inverse / (2 * math.pi)
            low, high = config.rope_low_turns, config.rope_high_turns
            kept = ((turns - low) / (high - low)).clamp(0, 1)                       # part of the pair's own speed
            inverse = inverse * (kept + (1 - kept) / config.rope_scale)
        else:
            inverse = inverse / config.rope_scale
        angles = torch.arange(config.context_length, dtype=torch.float64)[:, None] * inverse
        return angles.cos().float(), angles.sin().float()

    @property
    def tables(self):
        return self.cos, self.sin

    def angles_at(self, positions):
        if positions.dim() == 1:                        # looked up once for all layers
            return self.cos[positions], self.sin[positions], None
        return self.cos, self.sin, positions


NORMS = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}
MLPS = {"gelu": GeluMLP, "gelu_erf": ErfGeluMLP, "swiglu": SwigluMLP, "squared_relu": SquaredReluMLP}
POSITIONS = {"none": NoPositions, "learned": LearnedPositions, "rotary": RotaryPositions}


class HeadTransform(nn.Module):
    """norm(gelu(dense(x))), which BERT has before the head."""

    def __init__(self, config):
        super().__init__()
        self.dense = linear(config.weight_bits, config.width, config.width, config.bias)
        self.norm = NORMS[config.norm](config)
        self.approximate = MLPS[config.mlp].approximate

    def forward(self, x):
        return self.norm(kernels.gelu(self.dense.product(x), self.dense.bias, self.approximate))


class Head(Linear):
    """Logits of hidden vectors (..., C): (..., V), with BERT's transform and bias where `head_transform` is set."""

    def __init__(self, config):
        super().__init__(config.width, config.vocab_size, config.head_transform)
        self.transform = HeadTransform(config) if config.head_transform else nn.Identity()

    def forward(self, x):
        return self.product(self.transform(x), self.bias)

    def loss(self, x, targets, **options):
        """`kernels.linear_cross_entropy` of the logits and targets (...), with its options."""
        x, weight = self.transform(x), self.weight
        if self.bias is not None:                       # one more column of the weight, and a 1 behind each vector;
            zeros = [0] * (ALIGNMENT - 1)               # with zeros to a width that tensor cores take
            x = torch.cat((x, x.new_tensor([1, *zeros]).expand(*x.shape[:-1], ALIGNMENT)), dim=-1)
            weight = torch.cat((weight, F.pad(self.bias[:, None], (0, len(zeros)))), dim=1)
        return kernels.linear_cross_entropy(x, weight, targets, **options)


class QuantizedHead(QuantizedLinear):
    """Head in 8 bits."""

    def __init__(self, config):
        super().__init__(config.width, config.vocab_size, config.head_transform, bits=8)
        self.transform = HeadTransform(config) if config.head_transform else nn.Identity()

    forward, loss = Head.forward, Head.loss


class Pooler(nn.Module):
    """tanh(dense(x)) of one vector of each row (BERT): (B, T, C) to (B, C), of rows of `lengths` (B,) tokens."""

    def __init__(self, config):
        super().__init__()
        self.dense = Linear(config.width, config.width)
        self.pool = POOLINGS[config.pooling]

    def forward(self, hidden, lengths):
        return self.dense(self.pool(hidden, lengths)).tanh()


def first(hidden, lengths):
    return hidden[:, 0]


def last(hidden, lengths):
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def mean(hidden, lengths):
    inside = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]                     # (B, T)
    return (hidden * inside[..., None]).sum(1) / lengths[:, None]


POOLINGS = {"first": first, "last": last, "mean": mean}


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values, from one fused projection."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.D = layer, config.D
        self.heads = [config.num_heads, config.H_kv, config.H_kv]
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.qkv = linear(config.weight_bits, config.width, sum(self.heads) * config.D, qkv_bias)
        out_bias = config.bias if config.out_bias is None else config.out_bias
        self.out = linear(config.weight_bits, config.num_heads * config.D, config.width, out_bias)
        self.q_norm = RMSNorm(config, config.D) if config.qk_norm else NoWeight()
        self.k_norm = RMSNorm(config, config.D) if config.qk_norm else NoWeight()
        self.eps = config.norm_eps
        self.window = config.window or None
        self.dropout = config.dropout

    def forward(self, x, angles, causal, document_ids, cache):
        q, k, v = kernels.split_heads(self.qkv(x).unflatten(-1, (-1, self.D)), self.heads, self.q_norm.weight,
                                      self.k_norm.weight, self.eps, *angles)    # (B, T, H or H_kv, D)
        if cache is not None:
            y = cache.attend(self.layer, q, k, v, self.window)                         # (B, T, H, D)
        else:
            y = kernels.attention(q, k, v, causal=causal, window=self.window, document_ids=document_ids,
                                  dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.flatten(-2))                                                 # (B, T, C)


class Block(nn.Module):
    """Attention and MLP with the norm before each. Takes and gives (x, residual), whose sum is the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        mlp = MLPS[config.mlp]
        self.attention_norm = NORMS[config.norm](config)
        self.attention = Attention(config, layer)
        self.mlp_norm = NORMS[config.norm](config)
        self.mlp = mlp(config, config.mlp_width or mlp.default_width(config.width))
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x, residual, *context):
        x, residual = self.attention_norm(x, residual)
        x = self.dropout(self.attention(x, *context))
        x, residual = self.mlp_norm(x, residual)
        return self.dropout(self.mlp(x)), residual


class PostNormBlock(Block):
    """Attention and MLP with the norm after each residual sum. x is the residual stream, `residual` passes by."""

    def forward(self, x, residual, *context):
        x, _ = self.attention_norm(x, self.dropout(self.attention(x, *context)))
        x, _ = self.mlp_norm(x, self.dropout(self.mlp(x)))
        return x, residual


BLOCKS = {"pre": Block, "post": PostNormBlock}


class GPT(nn.Module):
    """A decoder transformer, or with `causal=False` an encoder.

    `model(tokens)` takes (B, T) int64 and gives logits (B, T, V) in float32; `model.hidden` gives what the head reads,
    for the fused loss. With `initial=False` the weights are left for a checkpoint to fill.
    """

    def __init__(self, config: ModelConfig, initial: bool = True):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("model.vocab_size is 0; give the tokenizer's vocab_size")
        self.config = config
        embedding, head = (QuantizedEmbedding, QuantizedHead) if config.weight_bits else (Embedding, Head)
        self.embedding = embedding(config.vocab_size, config.width)
        self.positions = POSITIONS[config.position](config)
        self.token_types = Embedding(config.token_types, config.width) if config.token_types else None
        self.embedding_norm = NORMS[config.norm](config) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(BLOCKS[config.norm_position](config, layer) for layer in range(config.depth))
        self.final_norm = NORMS[config.norm](config) if config.norm_position == "pre" else NoNorm()
        self.head = head(config)
        self.pooler = Pooler(config) if config.next_sentence or config.num_classes else None
        self.next_sentence = Linear(config.width, 2) if config.next_sentence else None
        self.classifier = Linear(config.width, config.num_classes) if config.num_classes else None
        if config.tied_embeddings:
            for name, tensor in self.embedding.named_parameters():
                setattr(self.head, name, tensor)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        if initial:
            self.draw_weights()

    @torch.no_grad()
    def draw_weights(self):
        """Normal weights from torch's generator: std is `init_std`, less where the residual stream is added to (GPT-2).
        """
        std = self.config.init_std
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                is_output = name.endswith((".out", ".down"))
                module.weight.normal_(0.0, std / math.sqrt(2 * self.config.depth) if is_output else std)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, Embedding):
                module.weight.normal_(0.0, std)

    def hidden(self, tokens, *, causal=True, document_ids=None, token_types=None, positions=None, cache=None):
        """(B, T) tokens to (B, T, C), normalised, ready for the head.

        `document_ids` (B, T) hides documents from one another; `positions` (T,) or (B, T) are 0 to T - 1 unless
        given; `token_types` (B, T) are 0 unless given, of a model that has any; a `cache` (see cache.py) tells the
        positions and attends to the tokens before. Raises ValueError for more tokens than the context holds.
        """
        if cache is not None:
            positions = cache.positions(tokens)
        elif tokens.shape[1] > self.config.context_length:
            raise ValueError(f"{tokens.shape[1]} tokens are more than this model's context_length = "
                             f"{self.config.context_length}")
        elif positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.positions.add(self.embedding(tokens), positions)
        if self.token_types is not None:
            x = x + (self.token_types.weight[0] if token_types is None else self.token_types(token_types))
        elif token_types is not None:
            raise ValueError("this model has no token types")
        x = self.dropout(self.embedding_norm(x))
        residual, angles = torch.zeros_like(x), self.positions.angles_at(positions)
        for block in self.blocks:
            x, residual = block(x, residual, angles, causal, document_ids, cache)
        return self.final_norm(x, residual)[0]

    def next_sentence_logits(self, hidden, lengths):
        """(B, 2) from `hidden` (B, T, C) of rows of `lengths` (B,) tokens: the second text follows the first, or not.
        """
        return self.next_sentence(self.pooler(hidden, lengths)).float()

    def class_logits(self, hidden, lengths):
        """(B, num_classes) from `hidden` (B, T, C) of rows of `lengths` (B,) tokens."""
        return self.classifier(self.dropout(self.pooler(hidden, lengths))).float()

    @property
    def pools_causally(self) -> bool:
        """Whether what the pooled heads read comes from causal attention."""
        return self.config.pooling == "last"

    def forward(self, tokens, **context):
        return self.head(self.hidden(tokens, **context)).float()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of weights that are floating."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    @property
    def num_parameters(self) -> int:
        """Weights and biases, a tied head counted once; of a quantized model also scales, and two of 4 bits as one."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, context_length: int | None = None) -> float:
        """Floating-point operations of a forward and backward pass per token: 6 N + 12 · depth · H · D · T.

        N are the weights of the linear layers, the head included, pooled heads not; causal attention is counted in full
        (arXiv 2204.02311, appendix B).
        """
        config = self.config
        pooled = {self.pooler and self.pooler.dense, self.next_sentence, self.classifier}
        N = sum(module.weight.numel() for module in self.modules()
                if isinstance(module, Linear) and module not in pooled)
        return 6 * N + 12 * config.depth * config.num_heads * config.D * (context_length or config.context_length)
