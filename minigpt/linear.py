"""Layers that hold most of a model's weights: in floating point, or in whole numbers of 8 or 4 bits with scales.

Made with any numbers; `GPT.draw_weights`, a checkpoint or `quantize` fills them. `product` is what a copy of a model
that only decodes replaces by a faster one (packed.py). Legend: N outputs, K inputs, G groups of a row with one scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from kernels.reference import dequantize, quantize

GROUP = 64
"""Numbers of 4 bits that share a scale, where it divides the row; elsewhere the whole row shares one."""
STORED = {8: torch.int8, 4: torch.uint8}
"""{bits: dtype}; two numbers of 4 bits lie in a byte."""


class Linear(nn.Linear):
    """x Wᵀ + bias, W (N, K)."""

    def reset_parameters(self):
        pass

    def forward(self, x):
        return self.product(x, self.bias)

    def product(self, x, bias=None):
        """x Wᵀ, and a bias where one is given: for an op that adds its own."""
        return F.linear(x, self.weight, bias)


class Embedding(nn.Embedding):
    """Row `token` of the weight (V, C)."""

    def reset_parameters(self):
        pass


class Quantized(nn.Module):
    """A weight W = q · scale, see `kernels.quantized_linear`; `weight` makes it whole, in the dtype of the scales."""

    def __init__(self, N, K, bits):
        super().__init__()
        self.bits, self.in_features, self.out_features = bits, K, N
        self.group = GROUP if bits == 4 and K % GROUP == 0 else K
        if bits == 4 and K % 2:
            raise ValueError(f"weights of 4 bits come in pairs, so {K} inputs cannot be; take 8")
        self.packed_weight = nn.Parameter(torch.empty(N, K * bits // 8, dtype=STORED[bits]), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(N, K // self.group), requires_grad=False)

    @property
    def weight(self):
        return dequantize(self.packed_weight, self.scales)

    def fill(self, weight):
        """Round a floating weight (N, K); ValueError where it is not finite."""
        for parameter, tensor in zip((self.packed_weight, self.scales), quantize(weight, self.bits, self.group)):
            parameter.copy_(tensor)


class QuantizedLinear(Quantized):
    """x Wᵀ + bias; gives the dtype of x."""

    def __init__(self, K, N, bias, bits):
        super().__init__(N, K, bits)
        self.bias = nn.Parameter(torch.empty(N)) if bias else None

    forward = Linear.forward

    def product(self, x, bias=None):
        return kernels.quantized_linear(x, self.packed_weight, self.scales, bias)


class QuantizedEmbedding(Quantized):
    """Row `token` of the weight (V, C)."""

    def __init__(self, V, C):
        super().__init__(V, C, 8)

    def forward(self, tokens):
        return self.packed_weight[tokens] * self.scales[tokens]


def linear(bits, K, N, bias):
    """A linear layer; 0 bits: floating point."""
    return QuantizedLinear(K, N, bias, bits) if bits else Linear(K, N, bias)
