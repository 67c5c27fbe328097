"""Continuations that are searched for, several at a time, instead of drawn token by token.

A search has rows, texts of one length that the engine reads side by side: it takes the logits behind each, and says
which texts come next and which row each of them grew from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from minigpt import sampling
from minigpt.config import SamplingParams
from minigpt.constraints import Text


@dataclass(frozen=True)
class Hypothesis:
    """A continuation: the tokens of prompt and text, and the sum of their log-probabilities, penalties included.

    `score` is that of one that has ended.
    """

    tokens: list[int]
    text: Text | None = None
    total: float = 0.0
    score: float = -math.inf
    log_probabilities: tuple = ()


@dataclass(frozen=True)
class State:
    """Where a search stands; it goes on by replacing this as a whole.

    `rows` are texts to be read next, and `parents` the rows of the state before from which they grew. A search that is
    over has no rows, and `found`, the best first. `inside` is what the search itself goes on from.
    """

    rows: list[list[int]]
    parents: list[int]
    found: list[Hypothesis]
    inside: object


class Search:
    """What both searches share: `params.rows` rows at most, how a text grows, and what may come next."""

    needs_hidden = False
    needs_all = False
    """Whether all of the text must be read in the next step, whatever a slot holds."""

    def __init__(self, prompt: list[int], params: SamplingParams, ends: frozenset[int], text: Text | None,
                 generator: torch.Generator):
        self.params, self.ends, self.generator = params, ends, generator
        self.num_prompt = len(prompt)
        self.state = State([prompt], [], [], self.begin(Hypothesis(prompt, text)))

    @property
    def is_done(self) -> bool:
        return not self.state.rows

    def grown(self, hypothesis: Hypothesis, token: int, score: float, log_probabilities: torch.Tensor):
        """A text with one more token, of that score; the model gives the log-probabilities (V,)."""
        told, number = hypothesis.log_probabilities, self.params.log_probabilities
        return Hypothesis([*hypothesis.tokens, token], hypothesis.text and hypothesis.text.extended(token),
                          hypothesis.total + score, log_probabilities=(
                              *told, sampling.told(log_probabilities, token, number)) if number else told)

    def has_ended(self, hypothesis: Hypothesis) -> bool:
        return (hypothesis.tokens[-1] in self.ends or hypothesis.text is not None and hypothesis.text.is_over
                or len(hypothesis.tokens) - self.num_prompt >= self.params.max_new_tokens)

    def scores(self, log_probabilities: torch.Tensor, hypotheses: list[Hypothesis]) -> torch.Tensor:
        """Log-probabilities (B, V) with the penalties, and -inf for what may not come next."""
        tokens = torch.tensor([hypothesis.tokens for hypothesis in hypotheses], device=log_probabilities.device)
        scores = sampling.penalised(log_probabilities, tokens, self.params, self.num_prompt)
        return torch.stack([sampling.only(row, hypothesis.text and hypothesis.text.allowed())
                            for row, hypothesis in zip(scores, hypotheses)])


@dataclass
class Group:
    """Some beams that compete with one another: those that go on, and the best that have ended."""

    beams: list[Hypothesis]
    rows: list[int]
    """Which rows are theirs."""
    ended: list[Hypothesis]


class BeamSearch(Search):
    """The texts of the best scores that are found with `num_beams` under way.

    Each step looks at the likeliest continuations of all beams of a group. A text that ends among the best of these is
    kept with its score, the sum of its log-probabilities / length ** length_penalty; the best that go on are the next
    beams. A group is over when as many have ended as it has beams and none under way can, or seems to, become better
    (`early_stopping`). It is Hugging Face's beam search. With `sample_beams` the continuations are drawn, without
    replacement, by their probabilities after temperature, top-k and so on. Groups go one after the other, and a token
    costs `diversity_penalty` for each beam of the groups before that has just taken it (arXiv 1610.02424); the score is
    of the model alone.
    """

    def __init__(self, prompt, params, ends, text, generator):
        self.size = params.num_beams // params.num_beam_groups
        super().__init__(prompt, params, ends, text, generator)

    def begin(self, first):
        return [Group([first], [0], []) for _ in range(self.params.num_beam_groups)]

    def advance(self, logits: torch.Tensor, hidden: list | None = None) -> None:
        """Go on from the logits (B, V) behind the rows."""
        log_probabilities, groups, rows, parents = logits.log_softmax(-1), [], [], []
        taken = torch.zeros_like(logits[0])
        for group in self.state.inside:
            beams, grew_from, ended = self._next(group, log_probabilities, taken)
            groups.append(Group(beams, [*range(len(rows), len(rows) + len(beams))], ended))
            rows += [beam.tokens for beam in beams]
            parents += grew_from
        found = sorted((text for group in groups for text in group.ended), key=lambda text: -text.score)
        if not rows and not found:
            raise ValueError(sampling.NOTHING)
        self.state = State(rows, parents, found, groups)

    def _next(self, group, log_probabilities, taken):
        """(the next beams of a group, the rows they grew from, the best texts that have ended); counts what they take.
        """
        if not group.beams:
            return [], [], group.ended
        scores = self.scores(log_probabilities[group.rows], group.beams)
        if self.params.sample_beams:
            scores = sampling.truncated(scores, self.params)
        totals = torch.tensor([beam.total for beam in group.beams], device=scores.device, dtype=scores.dtype)
        sums = (scores + totals[:, None] - self.params.diversity_penalty * taken).flatten()
        order = sums
        if self.params.sample_beams:                    # the largest of p · noise are a draw without replacement
            order = sums - torch.empty_like(sums).exponential_(generator=self.generator).log()
        count = min((1 + max(1, len(self.ends))) * self.size, int(order.isfinite().sum()))
        places = order.topk(count).indices
        sums, scores, width = sums[places].tolist(), scores.flatten()[places].tolist(), scores.shape[1]
        beams, ended = [], []
        for rank, (place, total, score) in enumerate(zip(places.tolist(), sums, scores)):
            parent, token = divmod(place, width)
            text = self.grown(group.beams[parent], token, score, log_probabilities[group.rows[parent]])
            if not self.has_ended(text):
                beams.append((total, text, group.rows[parent]))
            elif rank < self.size:
                ended.append(replace(text, score=text.total / self._length(text) ** self.params.length_penalty))
        beams = sorted(beams, key=lambda beam: -beam[0])[:self.size]
        for text in [text for _, text, _ in beams] or ended:
            taken[text.tokens[-1]] += 1
        ended = sorted([*group.ended, *ended], key=lambda text: -text.score)[:self.size]
        if not beams or self._is_over(beams[0][1], ended):
            return [], [], ended
        return [text for _, text, _ in beams], [row for _, _, row in beams], ended

    def _length(self, text):
        return len(text.tokens) - self.num_prompt

    def _is_over(self, best, ended):
        """Whether no beam can, or seems to, become better than those that have ended."""
        if len(ended) < self.size:
            return False
        if self.params.early_stopping == "full":
            return True
        longest = self.params.early_stopping == "never" and self.params.length_penalty > 0
        length = self.params.max_new_tokens if longest else self._length(best)
        return best.total / length ** self.params.length_penalty <= ended[-1].score


class ContrastiveSearch(Search):
    """One text, of likely tokens that do not repeat what stands before (arXiv 2202.06417).

    Of the `top_k` likeliest tokens v it takes the one with the largest (1 - a) p(v) - a max_j cos(h_v, h_j), where a is
    `penalty_alpha`, h_v what the head reads behind v, and h_j that behind each token before.
    """

    needs_hidden = True

    @property
    def needs_all(self):
        return self.state.inside[1] is None

    def begin(self, first):
        """Candidates, texts with the probability of their last token, and h of the tokens before that, (N, C)."""
        return [(first, 1.0)], None

    def advance(self, logits: torch.Tensor, hidden: list[torch.Tensor]) -> None:
        """Go on from the logits (B, V) behind the rows, and what the head read of the tokens just read, (n, C) each."""
        normalize, (candidates, known) = torch.nn.functional.normalize, self.state.inside
        read = normalize(hidden[0][:-1].float(), dim=-1)
        known = read if known is None else torch.cat([known[:max(0, len(known) - len(read))], read])
        last = normalize(torch.stack([of_row[-1] for of_row in hidden]).float(), dim=-1)
        picked = 0
        if len(candidates) > 1:
            likely = torch.tensor([probability for _, probability in candidates], device=last.device)
            alike, alpha = (last @ known.T).amax(-1), self.params.penalty_alpha
            picked = int(((1 - alpha) * likely - alpha * alike).argmax())
        text, log_probabilities = candidates[picked][0], logits[picked].log_softmax(-1)
        if len(text.tokens) > self.num_prompt and self.has_ended(text):
            self.state = State([], [], [replace(text, score=text.total)], None)
            return
        probabilities = self.scores(log_probabilities[None], [text])[0].softmax(-1)
        best = probabilities.topk(min(self.params.top_k, int((probabilities > 0).sum())))
        values = log_probabilities[best.indices].tolist()
        candidates = [(self.grown(text, token, value, log_probabilities), probability)
                      for token, value, probability in zip(best.indices.tolist(), values, best.values.tolist())]
        if not candidates:
            raise ValueError(sampling.NOTHING)
        self.state = State([text.tokens for text, _ in candidates], [picked] * len(candidates), [],
                           (candidates, torch.cat([known, last[picked][None]])))
