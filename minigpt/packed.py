"""Products of few rows with weights laid out as a CPU's libraries read them fastest: for decoding, without gradients.

`packed(model)` gives a copy that shares every tensor with the model but has such a product in each linear layer.
"""

from __future__ import annotations

import copy
import itertools
import math

import torch

from kernels.reference import unpacked
from minigpt.linear import Linear, QuantizedLinear
from minigpt.model import GPT

CHUNK = 64
"""Tokens of a prompt that are read at a time where a row's bits must be the same among any number of rows."""
TRIED = (CHUNK, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
"""Numbers of rows."""


class PackedFloat32:
    """By MKL: for several rows; one gains nothing."""

    ROWS = 512
    """MKL is told how many to expect; with a prompt's number, fewer are as fast as can be."""

    @staticmethod
    def takes(layer):
        return isinstance(layer, Linear) and layer.weight.dtype == torch.float32 and torch.backends.mkl.is_available()

    def __init__(self, layer):
        self.weight = layer.weight.detach()
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, self.ROWS)

    def __call__(self, x, bias=None):
        return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, bias, x.numel() // x.shape[-1])


class PackedBfloat16:
    """By oneDNN."""

    @staticmethod
    def takes(layer):
        return (isinstance(layer, Linear) and layer.weight.dtype == torch.bfloat16
                and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def __init__(self, layer):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 1)

    def __call__(self, x, bias=None):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


KERNEL_COLUMNS = 16
"""Torch's kernel for 8 bits reads so many at a time, and beyond the end of a row that they do not divide."""
MOST_ROWS = 64
"""With more, it is faster to make a quantized weight whole for a product in floating point."""


class PackedInt8:
    """x is rounded to bfloat16, for which alone torch has a fast product; scales stay as they are."""

    @staticmethod
    def takes(layer):
        return isinstance(layer, QuantizedLinear) and layer.bits == 8 and layer.in_features % KERNEL_COLUMNS == 0

    def __init__(self, layer):
        self.weight, self.scales = layer.packed_weight.detach(), layer.scales.detach()[:, 0]
        self.ones, self.whole = torch.ones_like(self.scales, dtype=torch.bfloat16), layer.product

    def __call__(self, x, bias=None):
        if x.numel() > MOST_ROWS * x.shape[-1]:
            return self.whole(x, bias)
        y = torch._weight_int8pack_mm(x.flatten(0, -2).to(torch.bfloat16), self.weight, self.ones)
        y = y.view(*x.shape[:-1], -1) * self.scales
        return (y if bias is None else y + bias).to(x.dtype)


class PackedInt4:
    """x and the scales are rounded to bfloat16, for which alone torch has a fast product."""

    @staticmethod
    def takes(layer):
        return (isinstance(layer, QuantizedLinear) and layer.bits == 4 and layer.group in (32, 64, 128, 256)
                and len(layer.scales) % 16 == 0)

    def __init__(self, layer):
        whole = unpacked(layer.packed_weight.detach(), layer.scales.shape[1]).flatten(1).to(torch.int32) + 8
        self.packed, self.group = torch._convert_weight_to_int4pack_for_cpu(whole, 1), layer.group
        scales = layer.scales.detach().T                                                # (G, N)
        self.scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1).to(torch.bfloat16).contiguous()
        self.whole = layer.product

    def __call__(self, x, bias=None):
        if x.numel() > MOST_ROWS * x.shape[-1]:
            return self.whole(x, bias)
        y = torch._weight_int4pack_mm_for_cpu(x.flatten(0, -2).to(torch.bfloat16), self.packed, self.group,
                                              self.scales_and_zeros).view(*x.shape[:-1], -1)
        return (y if bias is None else y + bias).to(x.dtype)


PRODUCTS = (PackedFloat32, PackedBfloat16, PackedInt8, PackedInt4)


def packed(model: GPT) -> GPT:
    """A copy of `model`, to read tokens with; the model itself where it is on no CPU."""
    if model.device.type != "cpu":
        return model
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for layer in twin.modules():
        for product in PRODUCTS:
            if product.takes(layer):
                layer.product = product(layer)
    return twin


@torch.inference_mode()
def steady_rows(model: GPT, most: int) -> list[int]:
    """Numbers of rows, the last no less than `most`, among which a row's results have the same bits.

    `model` is a packed one. A library takes another way to a product of few rows than of many: from which number on it
    does not is found by trial. Of a pointwise op torch computes what is left over of 64 numbers in another way, so that
    all rows' numbers in the MLP together must divide by 64.
    """
    if model.device.type != "cpu":
        return [most]
    layers = [layer for layer in model.modules() if isinstance(layer, (Linear, QuantizedLinear))]
    least = 1
    for layer in {(type(layer), layer.in_features, layer.out_features): layer for layer in layers}.values():
        x = torch.randn(TRIED[0], layer.in_features, generator=torch.Generator().manual_seed(0)).to(model.dtype)
        whole = layer.product(x, layer.bias)
        for rows, fewer in itertools.pairwise(TRIED):
            if not torch.equal(layer.product(x[-fewer:], layer.bias), whole[-fewer:]):
                least = max(least, rows)
                break
    multiple = 64 // math.gcd(64, model.blocks[0].mlp.down.in_features)
    first = -(-least // multiple) * multiple
    return list(range(first, max(most, first) + multiple, multiple))
