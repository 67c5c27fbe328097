"""Which tokens of a row are hidden, to be predicted: single ones, whole words or spans."""

from __future__ import annotations

import re

import numpy as np

from minigpt.config import Config
from minigpt.tokenizer import Tokenizer, text_of

IGNORED = -100
"""Stands among targets where nothing is to be predicted."""
WORD = re.compile(r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|\S")
"""A word, or one character of a script without spaces between words, or of punctuation."""
SPAN_STOP, LONGEST_SPAN = 0.2, 10
"""A span of tokens ends behind each with that probability (arXiv 1907.10529, section 3.1)."""


class Masking:
    """Hides chosen tokens (BERT, arXiv 1810.04805, section 3.1).

    Each unit of text (`objective.mask_unit`) is chosen with `mask_probability`; of what is chosen 80 % are shown as
    <mask>, 10 % as a random text token, 10 % as they are: each token by itself, a span as a whole. Special tokens are
    never chosen. The choice in row n is a function of the seed and n.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer):
        if tokenizer.roles.mask is None:
            raise ValueError(f"objective.name = {config.objective.name} needs a tokenizer with a mask token, and this "
                             "one has none; take another (tokenizer.path) or train one")
        self.config, self.tokenizer, self.seed = config.objective, tokenizer, config.train.seed
        self.words = Words(tokenizer) if config.objective.mask_unit == "word" else None
        self.is_text = ~tokenizer.is_special
        self.text_ids = np.flatnonzero(self.is_text)

    def __call__(self, rows: np.ndarray, first: int, training: bool, lengths: np.ndarray | None = None):
        """(inputs, targets), each (B, T), of rows (B, T) that are numbered from `first`.

        `lengths` (B,) leave the padding out, on which the choice then does not depend.
        """
        inputs, targets = rows.copy(), np.full_like(rows, IGNORED)
        for number, row in enumerate(rows):
            row = row if lengths is None else row[:lengths[number]]
            random = np.random.default_rng([self.seed, first + number, int(training)])
            unit = self.units(row, random)
            chosen = (random.random(len(row)) < self.config.mask_probability)[unit] & self.is_text[row]
            fate = random.random(len(row))
            if self.config.mask_unit == "span":
                fate = fate[unit]
            other = self.text_ids[random.integers(len(self.text_ids), size=len(row))]
            masked, replaced = chosen & (fate < 0.8), chosen & (fate >= 0.8) & (fate < 0.9)
            targets[number, :len(row)][chosen] = row[chosen]
            inputs[number, :len(row)][masked] = self.tokenizer.roles.mask
            inputs[number, :len(row)][replaced] = other[replaced]
        return inputs, targets

    def units(self, row: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """(T,): tokens of one row with the same number are chosen together."""
        if self.config.mask_unit == "word":
            return self.words(row)
        if self.config.mask_unit == "token":
            return np.arange(len(row))
        sizes = np.minimum(random.geometric(SPAN_STOP, len(row)), LONGEST_SPAN)
        units = np.repeat(np.arange(len(row)), sizes)[:len(row)]
        stretch = np.cumsum(~self.is_text[row])         # no span goes across a special token
        return np.unique(units + len(row) * stretch, return_inverse=True)[1]


class Words:
    """words(row (T,)): of each token the number of its word, that of its first character that is no space.

    A token that has none is by itself, as is a special one, which parts words. A Chinese character is a word.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.token_bytes = [token or b"\0" for token in tokenizer.token_bytes]
        self.sizes = np.array([len(token) for token in self.token_bytes])
        self.spaces = np.array([len(token) - len(token.lstrip()) for token in self.token_bytes])    # in front

    def __call__(self, row: np.ndarray) -> np.ndarray:
        sizes, spaces = self.sizes[row], self.spaces[row]
        text, places = text_of(b"".join([self.token_bytes[token] for token in row.tolist()]))
        starts = np.fromiter((match.start() for match in WORD.finditer(text)), np.int64)
        units = np.searchsorted(places[starts], np.cumsum(sizes) - sizes + spaces, "right")
        alone = spaces == sizes
        units[alone] = len(starts) + 1 + np.arange(alone.sum())
        return np.unique(units, return_inverse=True)[1]
