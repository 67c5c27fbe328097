"""Guesses at the tokens that follow, which the model checks in one pass (speculative decoding, arXiv 2211.17192).

A guesser has `guesses(tokens, count, draw)`: up to `count` pairs (token, probabilities (1, V) it was drawn with, None
where it was sure); `draw` gives one such pair, or None where nothing may come next. What comes of them
is text of the model's own distribution, whatever they are.
"""

from __future__ import annotations

import torch

from minigpt.cache import KVCache, Prefill, alike
from minigpt.flat import FlatStep
from minigpt.model import GPT
from minigpt.packed import packed


class Lookup:
    """The tokens that followed the latest earlier place of the last three, or else two (arXiv 2304.04487)."""

    def __init__(self, most: int):
        self.most = most

    def guesses(self, tokens, count, draw):
        count = min(count, self.most)
        for size in (3, 2) if count > 0 else ():
            tail = tokens[-size:]
            for start in range(len(tokens) - size - 1, -1, -1):
                if tokens[start:start + size] == tail:
                    return [(token, None) for token in tokens[start + size:start + size + count]]
        return []


class Draft:
    """What a smaller model with the same tokens draws; past its own context it goes on from the second half."""

    MOST = 4

    def __init__(self, model: GPT):
        self.model, self.length = packed(model), model.config.context_length
        self.cache = KVCache(model.config, 1, self.length, model.device, model.dtype)
        self.step = FlatStep(self.model)
        self.held = []
        """The tokens that its cache holds."""

    def guesses(self, tokens, count, draw):
        half = self.length // 2
        count = min(count, self.MOST, half)
        if count < 1:
            return []
        too_many = len(tokens) + count - self.length
        window = tokens[max(0, -(-too_many // half) * half):]
        self.held = window[:min(alike(self.held, window), len(window) - 1)]
        found = []
        while len(found) < count:
            logits = self._read(window)
            guess = draw(logits, [*tokens, *(token for token, _ in found)])
            if guess is None:
                break
            found.append(guess)
            window = [*window, found[-1][0]]
        return found

    def _read(self, window):
        """The logits (1, V) after the last token of `window`."""
        start = len(self.held)
        ids = torch.tensor([window[start:]], device=self.cache.keys.device)
        if ids.shape[1] <= 1 + self.MOST:               # as after its guesses were checked
            logits = self.step(ids, Prefill(self.cache, (0, start, ids.shape[1])))[-1:]
        else:
            hidden = self.model.hidden(ids, cache=Prefill(self.cache, (0, start, ids.shape[1])))
            logits = self.model.head(hidden[:, -1]).float()
        self.held = window
        return logits
