"""The keys and values of tokens that were read, kept for the tokens that follow.

`GPT.hidden(tokens, cache=...)` takes a view of a KVCache: `Prefill` for some tokens of one slot, `Decode` for one token
each of many. A view tells positions, stores what each layer makes and attends to what is stored.
Legend: B slots, T new tokens, S places in a slot, H_kv key-value heads, D head size.
"""

from __future__ import annotations

import torch

import kernels
from minigpt.config import ModelConfig


class KVCache:
    """Keys and values of `slots` texts of up to `length` tokens, (depth, B, S, H_kv, D) each, allocated once."""

    def __init__(self, config: ModelConfig, slots: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (config.depth, slots, length + 1, config.H_kv, config.D)    # one place for what idle slots write
        self.length, self.last_position = length, config.context_length - 1
        self.keys = torch.zeros(shape, device=device, dtype=dtype)          # zeros: what is masked must be finite
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @staticmethod
    def slot_bytes(config: ModelConfig, length: int, dtype: torch.dtype) -> int:
        """Memory of one slot."""
        return 2 * config.depth * (length + 1) * config.H_kv * config.D * dtype.itemsize

    def copy(self, source: int, target: int, count: int) -> None:
        """The first `count` tokens of one slot into another."""
        for tensor in (self.keys, self.values):
            tensor[:, target, :count] = tensor[:, source, :count]

    def slide(self, slot: int, count: int, stored: int, tables: tuple) -> None:
        """Drop the first `count` of the `stored` tokens of a slot; the others go to the front.

        Keys that `tables` (cos, sin) had turned by their positions are turned back by `count` positions.
        """
        keys, values = (tensor[:, slot, count:stored].clone() for tensor in (self.keys, self.values))
        if tables[0] is not None:
            back = torch.full(keys.shape[1:2], count, device=keys.device)
            keys, _ = kernels.rotary(keys, keys[:, :, :1], tables[0], -tables[1], back)
        self.keys[:, slot, :stored - count] = keys
        self.values[:, slot, :stored - count] = values


class Prefill:
    """T tokens of one slot, the first of which stands at `start`."""

    def __init__(self, cache: KVCache, slot: int, start: int):
        self.cache, self.slot, self.start = cache, slot, start

    def positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T,), none beyond the context's last; ValueError for more tokens than the slot holds."""
        end = self.start + tokens.shape[1]
        if end > self.cache.length:
            raise ValueError(f"{end} tokens are more than a slot of the cache holds, {self.cache.length}")
        return torch.arange(self.start, end, device=tokens.device).clamp(max=self.cache.last_position)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None):
        """Store k, v (1, T, H_kv, D) of a layer; gives the attention of q (1, T, H, D) to all that is stored."""
        keys, values = (tensor[layer, self.slot:self.slot + 1] for tensor in (self.cache.keys, self.cache.values))
        end = self.start + q.shape[1]
        keys[:, self.start:end], values[:, self.start:end] = k, v
        return kernels.attention(q, keys[:, :end], values[:, :end], causal=True, window=window)


class Decode:
    """One token of each of the first B slots, behind the `lengths` (B,) tokens that they hold; -1: the slot is idle."""

    def __init__(self, cache: KVCache, lengths: torch.Tensor):
        self.cache, self.rows = cache, torch.arange(len(lengths), device=lengths.device)
        idle = lengths < 0
        self.places = lengths.masked_fill(idle, cache.length)
        self.seen = lengths + 1                                                        # 0 where idle
        self._positions = lengths.clamp(min=0)[:, None]

    def positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, 1)"""
        return self._positions

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None):
        """Store k, v (B, 1, H_kv, D) of a layer; gives the attention of q (B, 1, H, D), each to its own slot."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, self.places], values[self.rows, self.places] = k[:, 0], v[:, 0]
        B = len(self.rows)
        return kernels.decode_attention(q[:, 0], keys[:B], values[:B], self.seen, window=window)[:, None]
