"""Logits to the next token: pure functions on float32 logits (B, V), each giving new logits (B, V).

Order: repetition penalty, temperature, top-k, top-p, as in Hugging Face's `generate`.
"""

from __future__ import annotations

import torch

from minigpt.config import SamplingParams

GREEDY_BELOW = 1e-6
"""A lower temperature is taken for 0: logits divided by it may overflow float32."""


def repetition_penalty(logits: torch.Tensor, tokens: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide positive and multiply negative logits of the ids in `tokens` (B, N) by `penalty` (arXiv 1909.05858)."""
    seen = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(seen < 0, seen * penalty, seen / penalty))


def temperature(logits: torch.Tensor, value: float) -> torch.Tensor:
    """logits / value."""
    return logits / value


def top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest logits and all that tie with the last of them (arXiv 1805.04833); the others become -inf."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the fewest likeliest tokens whose probabilities sum to at least p (arXiv 1904.09751), never fewer than one.

    The others become -inf. Ties at the border are broken by a sort, as in Hugging Face's processor.
    """
    ascending, order = logits.sort(dim=-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[:, -1] = False
    return logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)


def process(logits: torch.Tensor, tokens: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """All of the above in order; `tokens` (B, N) are prompt and text so far. Greedy ends after the penalty."""
    if params.repetition_penalty != 1:
        logits = repetition_penalty(logits, tokens, params.repetition_penalty)
    if params.temperature < GREEDY_BELOW:
        return logits
    if params.temperature != 1:
        logits = temperature(logits, params.temperature)
    if params.top_k:
        logits = top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = top_p(logits, params.top_p)
    return logits


def sample(logits: torch.Tensor, tokens: torch.Tensor | None, params: SamplingParams,
           generators: list[torch.Generator], guess: int | None = None) -> torch.Tensor:
    """The next token of each row, (B,) int64; row i draws from generators[i]. Raises ValueError for NaN or inf.

    `tokens` may be None without a repetition penalty. With a `guess`, of a single row, that token is taken with its
    probability, else one of the others with theirs, so that the distribution is the same (speculative sampling,
    arXiv 2211.17192, of a draft that is sure of itself).
    """
    if not (logits < torch.inf).all():
        raise ValueError("the model's output is not finite, so its weights have diverged or are damaged; sample from "
                         "an earlier checkpoint, or train anew with a lower optim.learning_rate")
    logits = process(logits, tokens, params)
    if params.temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    probabilities = logits.softmax(-1)
    if guess is not None:
        if torch.rand((), generator=generators[0], device=logits.device) < probabilities[0, guess]:
            return torch.tensor([guess], device=logits.device)
        probabilities[0, guess] = 0
    return torch.cat([torch.multinomial(row, 1, generator=generator)
                      for row, generator in zip(probabilities, generators)])
