"""Logits to the next token: pure functions on float32 logits (B, V), each giving new logits (B, V).

Order: logit bias, repetition penalty, presence and frequency penalties, no repeated n-grams, temperature, top-k, top-p,
min-p, typical. It is that of Hugging Face's `generate`, which lacks the presence and frequency penalties. What a text
may not say (constraints.py) is -inf before.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from minigpt.config import SamplingParams

CANDIDATES = 512
"""A nucleus is looked for among so many tokens first: to sort a large vocabulary takes longer than a small model."""
NOTHING = ("no token may come next: what is banned, biased and not to be repeated leaves none; loosen one of "
           "banned, begin_with, logit_bias, min_new_tokens, no_repeat_ngram, regex and json_schema")


def logit_bias(logits: torch.Tensor, bias: dict[int, float]) -> torch.Tensor:
    """logits_j + bias_j for the ids of `bias`."""
    ids = torch.tensor(list(bias), device=logits.device)
    values = torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
    return logits.index_add(1, ids, values.expand(len(logits), -1))


def repetition_penalty(logits: torch.Tensor, tokens: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide positive and multiply negative logits of the ids in `tokens` (B, N) by `penalty` (arXiv 1909.05858)."""
    seen = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(seen < 0, seen * penalty, seen / penalty))


def presence_and_frequency_penalty(logits: torch.Tensor, drawn: torch.Tensor, presence: float,
                                   frequency: float) -> torch.Tensor:
    """logits_j - frequency · c_j - presence · [c_j > 0], c_j the times that j stands in `drawn` (B, N) (OpenAI's API).
    """
    counts = torch.zeros_like(logits).scatter_add(1, drawn, torch.ones_like(drawn, dtype=logits.dtype))
    return logits - frequency * counts - presence * (counts > 0)


def no_repeat_ngram(logits: torch.Tensor, tokens: torch.Tensor, n: int) -> torch.Tensor:
    """-inf for each id that would make the last n tokens of a row stand a second time in `tokens` (B, N)."""
    if tokens.shape[1] < n:
        return logits
    runs = tokens.unfold(1, n, 1)                                                       # (B, N - n + 1, n)
    before = tokens[:, tokens.shape[1] - n + 1:]                                        # (B, n - 1)
    repeated = (runs[..., :-1] == before[:, None]).all(-1)
    banned = torch.zeros_like(logits, dtype=torch.int32).scatter_add(1, runs[..., -1], repeated.int()) > 0
    return logits.masked_fill(banned, -torch.inf)


def temperature(logits: torch.Tensor, value: float) -> torch.Tensor:
    """logits / value."""
    return logits / value


def top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest logits and all that tie with the last of them (arXiv 1805.04833); the others become -inf."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the fewest likeliest tokens whose probabilities sum to at least p (arXiv 1904.09751), never fewer than one.

    The others become -inf. Of tokens that tie at the border some are kept, as in Hugging Face's processor.
    """
    if logits.shape[-1] > CANDIDATES:
        likeliest, order = logits.softmax(-1).topk(CANDIDATES)
        if (likeliest.sum(-1) > p).all():
            removed = likeliest.cumsum(-1) - likeliest >= p                         # what stands before is enough
            removed[:, 0] = False
            kept = logits.gather(1, order).masked_fill(removed, -torch.inf)
            return torch.full_like(logits, -torch.inf).scatter(1, order, kept)
        if len(logits) > 1:                             # each alone, so that no row depends on another
            return torch.cat([top_p(row[None], p) for row in logits])
    ascending, order = logits.sort(dim=-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[:, -1] = False
    return logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)


def min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the tokens at least p times as likely as the likeliest (arXiv 2407.01082); the others become -inf."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def typical(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the tokens whose -log p is nearest to its mean, the fewest that sum to at least p, and all that tie with
    the last of them (arXiv 2202.00666); the others become -inf."""
    surprise = -logits.log_softmax(-1)
    mean = (surprise * (-surprise).exp()).nansum(-1, keepdim=True)                      # 0 · inf counts as 0
    distance = (surprise - mean).abs()
    ascending, order = distance.sort(-1)
    reached = logits.gather(1, order).softmax(-1).cumsum(-1)
    last = (reached < p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > ascending.gather(1, last), -torch.inf)


def only(logits: torch.Tensor, allowed: np.ndarray | None) -> torch.Tensor:
    """Logits (..., V) with -inf where `allowed` (V,) is False."""
    return logits if allowed is None else logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)


def penalised(logits: torch.Tensor, tokens: torch.Tensor | None, params: SamplingParams,
              num_prompt: int = 0) -> torch.Tensor:
    """From the logit bias to n-grams; `tokens` (B, N) are prompt and text so far."""
    if params.logit_bias:
        logits = logit_bias(logits, params.logit_bias)
    if params.repetition_penalty != 1:
        logits = repetition_penalty(logits, tokens, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        logits = presence_and_frequency_penalty(logits, tokens[:, num_prompt:], params.presence_penalty,
                                                params.frequency_penalty)
    if params.no_repeat_ngram:
        logits = no_repeat_ngram(logits, tokens, params.no_repeat_ngram)
    return logits


def truncated(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """From the temperature on."""
    if params.temperature != 1:
        logits = temperature(logits, params.temperature)
    if params.top_k:
        logits = top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = top_p(logits, params.top_p)
    if params.min_p:
        logits = min_p(logits, params.min_p)
    if params.typical_p < 1:
        logits = typical(logits, params.typical_p)
    return logits


def process(logits: torch.Tensor, tokens: torch.Tensor | None, params: SamplingParams,
            num_prompt: int = 0) -> torch.Tensor:
    """All of the above in order. Greedy ends before the temperature."""
    logits = penalised(logits, tokens, params, num_prompt)
    return logits if params.is_greedy else truncated(logits, params)


def told(log_probabilities: torch.Tensor, token: int, number: int) -> tuple[float, dict[int, float]]:
    """Of log-probabilities (V,) that of a token, and {id: its own} of the `number` likeliest."""
    best = log_probabilities.topk(min(number, len(log_probabilities)))
    return log_probabilities[token].item(), {
        id: value for id, value in zip(best.indices.tolist(), best.values.tolist()) if value > -math.inf}


def sample(logits: torch.Tensor, tokens: torch.Tensor | None, params: SamplingParams,
           generators: list[torch.Generator], guess: tuple[int, torch.Tensor | None] | None = None,
           num_prompt: int = 0) -> torch.Tensor:
    """The next token of each row, (B,) int64; row i draws from generators[i]. Raises ValueError for NaN or inf.

    `tokens` may be None unless `params.needs_text`; `num_prompt` of them are the prompt. With a `guess`, of a single
    row, (token, the probabilities q (1, V) that it was drawn with, None where it was sure), that token is taken with
    probability min(1, p / q), else one that is drawn from max(0, p - q): the distribution is p in any case (speculative
    sampling, arXiv 2211.17192).
    """
    logits = process(logits, tokens, params, num_prompt)
    top, likeliest = logits.max(-1) if params.is_greedy else (logits.amax(-1), None)
    check_finite(top, "model")
    if params.is_greedy:
        return likeliest
    probabilities = logits.softmax(-1)
    if guess is not None:
        token, q = guess
        if q is None:
            q = torch.zeros_like(probabilities)
            q[0, token] = 1
        if torch.rand((), generator=generators[0], device=logits.device) * q[0, token] < probabilities[0, token]:
            return torch.tensor([token], device=logits.device)
        rest = (probabilities - q).clamp_(min=0)
        probabilities = rest if rest.any() else probabilities               # p = q but for rounding
    return drawn(probabilities, generators)


def check_finite(top: torch.Tensor, model: str) -> None:
    """Raise ValueError for largest logits (B,) of which one is not finite: all are -inf, or one is NaN or inf."""
    top = top.tolist()
    if -math.inf in top:
        raise ValueError(NOTHING)
    if not all(map(math.isfinite, top)):
        raise ValueError(f"the {model}'s output is not finite, so its weights have diverged or are damaged; sample "
                         "from an earlier checkpoint, or train anew with a lower optim.learning_rate")


def drawn(probabilities: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """A token of each row (B, V), drawn by its probability, which need not sum to 1: (B,) int64.

    The first whose cumulative sum, in float64, reaches a uniform number in (0, 1] times the whole.
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    reached = [1 - torch.rand(1, generator=generator, device=sums.device, dtype=torch.float64)
               for generator in generators]
    return torch.searchsorted(sums, torch.stack(reached) * sums[:, -1:])[:, 0]
