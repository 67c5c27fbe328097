"""What a model is trained to do: rows of tokens to inputs and targets, and summed losses by part.

An objective has `extra` (tokens a row holds beyond the context), `weights` {part: weight in the training loss},
`batch(rows, first, training)`, `counts(batch)` {part: number of targets}, with no forward pass, and
`losses(model, batch)` {part: summed loss}. The loop divides sums by counts over all micro-batches of a step, so that
many small batches equal one big one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from minigpt.config import Config
from minigpt.tokenizer import Tokenizer

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    inputs: torch.Tensor
    """(B, T) int64."""
    targets: torch.Tensor
    """(B, T) int64, IGNORED where nothing is to be predicted."""
    document_ids: torch.Tensor | None = None
    """(B, T): tokens with unlike ids do not see one another."""

    def to(self, device: torch.device) -> Batch:
        def move(x):
            return x if x is None else x.to(device, non_blocking=True)
        return Batch(move(self.inputs), move(self.targets), move(self.document_ids))


class CausalLM:
    """Predict each next token: the loss is -log p(token t + 1 | tokens 0..t)."""

    part = "causal"
    is_causal = True
    extra = 1

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.weights = {self.part: 1.0}
        self.tokenizer = tokenizer
        self.document_mask = config.data.document_mask
        self.config, self.seed = config.objective, config.train.seed

    def batch(self, rows: np.ndarray, first: int, training: bool = True) -> Batch:
        """rows (B, T + extra) of tokens, numbered from `first`. In evaluation special tokens are no targets."""
        inputs, targets = rows[:, :-1], rows[:, 1:]
        if not training:
            targets = np.where(self.tokenizer.is_special[targets], IGNORED, targets)
        return self._tensors(inputs, targets)

    def _tensors(self, inputs, targets):
        inputs = torch.from_numpy(np.ascontiguousarray(inputs))
        ids = (inputs == self.tokenizer.roles.document_start).cumsum(1) if self.document_mask else None
        return Batch(inputs, torch.from_numpy(np.ascontiguousarray(targets)), ids)

    def counts(self, batch: Batch) -> dict[str, int]:
        return {self.part: int((batch.targets != IGNORED).sum())}

    def losses(self, model, batch: Batch) -> dict[str, torch.Tensor]:
        hidden = model.hidden(batch.inputs, causal=True, document_ids=batch.document_ids)
        return {self.part: model.head.loss(hidden, batch.targets, ignore_index=IGNORED, reduction="sum")}


class MaskedLM(CausalLM):
    """Predict chosen tokens from both sides (BERT, arXiv 1810.04805, section 3.1).

    Each text token is chosen with `mask_probability`; of the chosen 80 % are shown as <mask>, 10 % as a random text
    token, 10 % as they are. The choice in row n is a function of the seed and n.
    """

    part = "masked"
    is_causal = False
    extra = 0

    def __init__(self, config: Config, tokenizer: Tokenizer):
        if tokenizer.roles.mask is None:
            raise ValueError("objective.name = masked needs a tokenizer with a mask token, and this one has none; "
                             "take another (tokenizer.path) or train one")
        super().__init__(config, tokenizer)

    def batch(self, rows, first, training=True):
        inputs, targets = rows.copy(), np.full_like(rows, IGNORED)
        text = ~self.tokenizer.is_special
        text_ids = np.flatnonzero(text)
        for number, row in enumerate(rows):
            random = np.random.default_rng([self.seed, first + number, int(training)])
            chosen = (random.random(len(row)) < self.config.mask_probability) & text[row]
            fate = random.random(len(row))
            other = text_ids[random.integers(len(text_ids), size=len(row))]
            targets[number, chosen] = row[chosen]
            masked, replaced = chosen & (fate < 0.8), chosen & (fate >= 0.8) & (fate < 0.9)
            inputs[number, masked] = self.tokenizer.roles.mask
            inputs[number, replaced] = other[replaced]
        made = self._tensors(inputs, targets)
        padding = made.inputs == self.tokenizer.roles.padding
        if not padding.any():
            return made
        ids = torch.zeros_like(made.inputs) if made.document_ids is None else made.document_ids
        return replace(made, document_ids=ids.masked_fill(padding, -1))     # text does not see the padding behind it

    def losses(self, model, batch):
        hidden = model.hidden(batch.inputs, causal=False, document_ids=batch.document_ids)
        chosen = batch.targets != IGNORED               # the head reads these positions only
        return {self.part: model.head.loss(hidden[chosen], batch.targets[chosen], reduction="sum")}


class CompiledHidden:
    """What an objective needs of a model, with `hidden` compiled."""

    def __init__(self, model):
        self.head, self.hidden = model.head, torch.compile(model.hidden)


OBJECTIVES = {"causal": CausalLM, "masked": MaskedLM}


def make_objective(config: Config, tokenizer: Tokenizer):
    """The objective that `config.objective.name` names."""
    return OBJECTIVES[config.objective.name](config, tokenizer)
