"""The keys and values of tokens that were read, kept for the tokens that follow.

`GPT.hidden(tokens, cache=...)` takes a view of a KVCache: `Prefill` for many tokens of some slots, `Decode` for one
token of each. A view tells positions, stores what each layer makes and attends to what is stored.
Legend: B slots, T new tokens, S places in a slot, H_kv key-value heads, D head size.
"""

from __future__ import annotations

import torch

import kernels
from minigpt.config import ModelConfig


def alike(a: list[int], b: list[int]) -> int:
    """How many of their first tokens are the same."""
    count = min(len(a), len(b))
    if a[:count] == b[:count]:
        return count
    return next(place for place, (one, other) in enumerate(zip(a, b)) if one != other)


class KVCache:
    """Keys and values of `slots` texts of up to `length` tokens, (depth, B, H_kv, S, D) each, allocated once.

    A head's keys lie side by side: what reads them all reads memory in one piece.
    """

    def __init__(self, config: ModelConfig, slots: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (config.depth, slots, config.H_kv, length + 1, config.D)    # one place for what idle slots write
        self.length, self.last_position = length, config.context_length - 1
        self.keys = torch.zeros(shape, device=device, dtype=dtype)          # zeros: what is masked must be finite
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.layers = [(self.keys[layer].transpose(1, 2), self.values[layer].transpose(1, 2))
                       for layer in range(config.depth)]
        """Of each layer keys and values as the kernels take them, views (B, S, H_kv, D)."""

    @staticmethod
    def slot_bytes(config: ModelConfig, length: int, dtype: torch.dtype) -> int:
        """Memory of one slot."""
        return 2 * config.depth * (length + 1) * config.H_kv * config.D * dtype.itemsize

    def move(self, moves: list[tuple[int, int, int, int]]) -> None:
        """(source, target, start, stop) each: those tokens of one slot into another, of all as they were before."""
        read = [[tensor[:, source, :, start:stop].clone() for tensor in (self.keys, self.values)]
                for source, _, start, stop in moves]
        for (_, target, start, stop), (keys, values) in zip(moves, read):
            self.keys[:, target, :, start:stop], self.values[:, target, :, start:stop] = keys, values

    def slide(self, slot: int, count: int, stored: int, tables: tuple) -> None:
        """Drop the first `count` of the `stored` tokens of a slot; the others go to the front.

        Keys that `tables` (cos, sin) had turned by their positions are turned back by `count` positions.
        """
        keys, values = (tensor[:, slot, :, count:stored].clone() for tensor in (self.keys, self.values))
        if tables[0] is not None:
            back = torch.full(keys.shape[2:3], count, device=keys.device)
            by_place = keys.transpose(1, 2)                                             # (depth, stored, H_kv, D)
            keys = kernels.rotary(by_place, by_place[:, :, :1], tables[0], -tables[1], back)[0].transpose(1, 2)
        self.keys[:, slot, :, :stored - count] = keys
        self.values[:, slot, :, :stored - count] = values


class Prefill:
    """Tokens of some slots, as tokens (1, T), one slot's behind the other's: of each part its slot, start and count.

    To all but the attention these are the tokens of one text. ValueError for more tokens than a slot holds.
    """

    def __init__(self, cache: KVCache, *parts: tuple[int, int, int]):
        self.cache, self.parts, self._positions, first = cache, [], [], 0
        for slot, start, count in parts:
            if start + count > cache.length:
                raise ValueError(f"{start + count} tokens are more than a slot of the cache holds, {cache.length}")
            self.parts.append((slice(first, first + count), slice(slot, slot + 1), slice(start, start + count)))
            self._positions.append(torch.arange(start, start + count, device=cache.keys.device))
            first += count

    def positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T,), none beyond the context's last."""
        return torch.cat(self._positions).clamp(max=self.cache.last_position)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None):
        """Store k, v (1, T, H_kv, D) of a layer; gives the attention of q (1, T, H, D), each to its slot up to it."""
        keys, values = self.cache.layers[layer]
        parts = []
        for rows, slot, places in self.parts:
            keys[slot, places], values[slot, places] = k[:, rows], v[:, rows]
            parts.append(kernels.attention(q[:, rows], keys[slot, :places.stop], values[slot, :places.stop],
                                           causal=True, window=window))
        return torch.cat(parts, dim=1)


class Decode:
    """One token each of some slots, as tokens (1, B): {slot: tokens that it holds before, -1 where it is idle}.

    To all but the attention these are the tokens of one text, at positions of their own.
    """

    def __init__(self, cache: KVCache, lengths: dict[int, int]):
        places = [cache.length if length < 0 else length for length in lengths.values()]
        positions = [max(0, length) for length in lengths.values()]
        seen = [length + 1 for length in lengths.values()]                             # 0 where idle
        self.cache, self.runs = cache, []
        self.numbers = torch.tensor([list(lengths), places, positions, seen], device=cache.keys.device)
        slots, places, self._positions, self.seen = self.numbers.unbind()
        self.place = slots, places
        for row, slot in enumerate(lengths):            # neighbours in the cache are attended to in one call
            if self.runs and self.runs[-1][1].stop == slot:
                rows, slots = self.runs[-1]
                self.runs[-1] = slice(rows.start, row + 1), slice(slots.start, slot + 1)
            else:
                self.runs.append((slice(row, row + 1), slice(slot, slot + 1)))

    def take(self, other: Decode) -> None:
        """Become, in the same memory, what `other` is, a view of the same slots."""
        self.numbers.copy_(other.numbers)

    def positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,)"""
        return self._positions

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None):
        """Store k, v (1, B, H_kv, D) of a layer; gives the attention of q (1, B, H, D), each to its own slot."""
        keys, values = self.cache.layers[layer]
        keys.index_put_(self.place, k[0])
        values.index_put_(self.place, v[0])
        if len(self.runs) == 1:
            slots = self.runs[0][1]
            return kernels.decode_attention(q[0], keys[slots], values[slots], self.seen, window=window)[None]
        return torch.cat([kernels.decode_attention(q[0, rows], keys[slots], values[slots], self.seen[rows],
                                                   window=window) for rows, slots in self.runs])[None]
