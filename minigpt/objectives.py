"""What a model is trained to do: rows of tokens to inputs and targets, and summed losses by part.

    objective = make_objective(config, tokenizer, dataset.train)
    mixture = objective.at(step)                            # the parts that are trained at a step, with their weights
    batches = mixture.draw(first=0, count=16)               # training rows 0 to 15 of each of its tasks

A task, and a mixture of them, has `weights` {part: weight in the loss}, `counts(batch)` {part: number of targets}, with
no forward pass, and `losses(model, batch)` {part: summed loss}. The loop divides sums by counts over all micro-batches
of a step, so that many small batches equal one big one. Row n of each task is a function of the seed and n alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from minigpt import report
from minigpt.config import Config
from minigpt.data import Dealer, in_order
from minigpt.labelled import LabelledRows, LabelledSplit
from minigpt.masking import IGNORED, Masking
from minigpt.sentences import Pairs
from minigpt.shards import Split
from minigpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Batch:
    inputs: torch.Tensor
    """(B, T) int64."""
    targets: torch.Tensor | None = None
    """(B, T) int64, IGNORED where nothing is to be predicted."""
    document_ids: torch.Tensor | None = None
    """(B, T): tokens with unlike ids do not see one another."""
    token_types: torch.Tensor | None = None
    """(B, T): 0, or 1 in the second of two texts."""
    labels: torch.Tensor | None = None
    """(B,) int64, what the pooled heads are to tell."""
    lengths: torch.Tensor | None = None
    """(B,): tokens before the padding."""
    numbers: torch.Tensor | None = None
    """(B,): of each row the number of the text that it is of."""
    task: Task | None = None
    """What made it."""

    def to(self, device: torch.device) -> Batch:
        return dataclasses.replace(self, **{
            field.name: value.to(device, non_blocking=True) for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)})


def _tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


class Task:
    """What one forward pass is trained on: one part of an objective, or several.

    `split` is the text that `draw` draws from. Raises ValueError where it cannot serve.
    """

    parts: tuple[str, ...]
    measured: tuple[str, ...] = ()
    """What `metrics` gives; of each the highest is the best."""

    def __init__(self, config: Config, tokenizer: Tokenizer, split: Split | None = None,
                 weights: dict[str, float] | None = None):
        self.weights = weights or dict.fromkeys(self.parts, 1.0)
        self.config, self.tokenizer, self.seed = config, tokenizer, config.train.seed
        self.T, self.roles = config.model.context_length, tokenizer.roles
        self.check()
        self.dealer = self.deal(split) if split is not None else None

    def check(self):
        """Raise ValueError where this tokenizer or model cannot serve."""

    def draw(self, first: int, count: int) -> list[Batch]:
        """Training rows first to first + count - 1."""
        raise NotImplementedError

    def sources(self, number: int) -> list[tuple[str, int]]:
        """Where the text of a training row begins: document and byte."""
        return [self.dealer.source(number)]

    def metrics(self, found: dict[str, list]) -> dict[str, float]:
        """The `measured` numbers of an evaluation, from what `losses` noted in `found`."""
        return {name: torch.cat(found[name]).double().mean().item() for name in self.measured if name in found}


class Windows(Task):
    """A task on windows of the whole text."""

    extra = 0
    """Tokens that a row holds beyond the context."""

    def deal(self, split):
        return Dealer(split, self.T, extra=self.extra, order=self.config.data.order, seed=self.seed)

    def draw(self, first, count):
        return [self.batch(self.dealer.rows(first, count), first)]

    def in_order(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """The whole of a split, each token in one row, as it is evaluated."""
        number = 0
        for rows in in_order(split, self.T, self.extra, batch_size, self.roles.padding):
            yield self.batch(rows, number, training=False)
            number += len(rows)

    def document_ids(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """(B, T) of tokens (B, T), where documents are to be hidden from one another."""
        return (inputs == self.roles.document_start).cumsum(1) if self.config.data.document_mask else None


class CausalLM(Windows):
    """Predict each next token: the loss is -log p(token t + 1 | tokens 0..t)."""

    parts, extra = ("causal",), 1

    def batch(self, rows: np.ndarray, first: int, training: bool = True) -> Batch:
        """rows (B, T + extra) of tokens, numbered from `first`. In evaluation special tokens are no targets."""
        inputs, targets = _tensor(rows[:, :-1]), rows[:, 1:]
        if not training:
            targets = np.where(self.tokenizer.is_special[targets], IGNORED, targets)
        return Batch(inputs, _tensor(targets), self.document_ids(inputs), task=self)

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"causal": int((batch.targets != IGNORED).sum())}

    def losses(self, model, batch: Batch, found: dict | None = None) -> dict[str, torch.Tensor]:
        hidden = model.hidden(batch.inputs, causal=True, document_ids=batch.document_ids)
        return {"causal": model.head.loss(hidden, batch.targets, ignore_index=IGNORED, reduction="sum")}


def masked_loss(model, hidden: torch.Tensor, targets: torch.Tensor, found: dict | None) -> torch.Tensor:
    """Summed cross-entropy of the targets that are not IGNORED; the head reads these positions only."""
    chosen = targets != IGNORED
    hidden, targets = hidden[chosen], targets[chosen]
    if found is not None:
        found.setdefault("val_masked_accuracy", []).append(model.head(hidden).argmax(-1) == targets)
    return model.head.loss(hidden, targets, reduction="sum")


class MaskedLM(Windows):
    """Predict chosen tokens from both sides; see Masking."""

    parts, measured = ("masked",), ("val_masked_accuracy",)

    def check(self):
        self.masking = Masking(self.config, self.tokenizer)

    def batch(self, rows, first, training=True):
        inputs, targets = map(_tensor, self.masking(rows, first, training))
        ids, padding = self.document_ids(inputs), inputs == self.roles.padding
        if padding.any():                               # text does not see the padding behind it
            ids = (torch.zeros_like(inputs) if ids is None else ids).masked_fill(padding, -1)
        return Batch(inputs, targets, ids, task=self)

    def counts(self, batch):
        return {"masked": int((batch.targets != IGNORED).sum())}

    def losses(self, model, batch, found=None):
        hidden = model.hidden(batch.inputs, causal=False, document_ids=batch.document_ids)
        return {"masked": masked_loss(model, hidden, batch.targets, found)}


def text_rows(texts: list[tuple], T: int, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Rows <s> A </s> or <s> A </s> B </s> of texts (ids of A, ids of B or None), as long as the longest, at most T.

    `inputs` (B, T), `token_types` (1 from B on), `lengths` (B,) and, where there is padding, `document_ids` (-1 in it).
    """
    roles = tokenizer.roles
    start, separator = [roles.document_start], [roles.separator]
    parts = [[start, *(piece for text in pair if text is not None for piece in (text, separator))] for pair in texts]
    lengths = np.array([sum(map(len, row)) for row in parts])
    assert lengths.max() <= T
    inputs = np.full((len(parts), lengths.max()), roles.padding, np.int64)
    types = np.zeros_like(inputs)
    for number, row in enumerate(parts):
        inputs[number, :lengths[number]] = np.concatenate(row)
        types[number, sum(map(len, row[:3])):lengths[number]] = 1
    rows = {"inputs": inputs, "token_types": types, "lengths": lengths}
    if lengths.min() < lengths.max():
        rows["document_ids"] = np.where(np.arange(inputs.shape[1]) < lengths[:, None], 0, -1)
    return rows


class NextSentence(Task):
    """Whether the second of two stretches of text follows the first, or is from another document (BERT, section 3.1).

    Labels are 0 for what follows and 1 for the others, about half. With the part "masked" tokens of the same rows are
    hidden, and both losses come from one forward pass.
    """

    parts, measured = ("next_sentence",), ("val_next_sentence_accuracy",)

    def check(self):
        if self.config.model.token_types == 1:
            raise ValueError("model.token_types = 1 tells no two texts apart; next_sentence takes 2 or more")
        self.masking = Masking(self.config, self.tokenizer) if "masked" in self.weights else None
        self._held_out = None

    def deal(self, split):
        return Pairs(split, self.tokenizer.token_bytes, self.T - 3, self.seed)

    def draw(self, first, count):
        return [self.batch([self.dealer.draw(number) for number in range(first, first + count)], first)]

    def in_order(self, split, batch_size):
        """Pairs from the front of a split to its back, as they are evaluated."""
        if self._held_out is None or self._held_out.split is not split:
            self._held_out = self.deal(split)           # which takes seconds
        pairs, number = [], 0
        for pair in self._held_out.in_order():
            pairs.append(pair)
            if len(pairs) == batch_size:
                yield self.batch(pairs, number, training=False)
                pairs, number = [], number + batch_size
        if pairs:
            yield self.batch(pairs, number, training=False)

    def batch(self, pairs: list[tuple], first: int, training: bool = True) -> Batch:
        """Pairs (tokens, tokens, whether the second is a random one), numbered from `first`."""
        rows = text_rows([pair[:2] for pair in pairs], self.T, self.tokenizer)
        if self.masking:
            rows["inputs"], rows["targets"] = self.masking(rows["inputs"], first, training, rows["lengths"])
        rows["labels"] = np.array([is_random for *_, is_random in pairs], np.int64)
        return Batch(**{name: _tensor(array) for name, array in rows.items()}, task=self)

    def counts(self, batch):
        counts = {"masked": int((batch.targets != IGNORED).sum())} if self.masking else {}
        return counts | {"next_sentence": len(batch.labels)}

    def losses(self, model, batch, found=None):
        hidden = model.hidden(batch.inputs, causal=model.pools_causally, document_ids=batch.document_ids,
                              token_types=batch.token_types)
        losses = {"masked": masked_loss(model, hidden, batch.targets, found)} if self.masking else {}
        logits = model.next_sentence_logits(hidden, batch.lengths)
        if found is not None:
            found.setdefault("val_next_sentence_accuracy", []).append(logits.argmax(-1) == batch.labels)
        return losses | {"next_sentence": F.cross_entropy(logits, batch.labels, reduction="sum")}


class MaskedNextSentence(NextSentence):
    """Both of BERT's losses on the same rows."""

    parts = ("masked", "next_sentence")
    measured = MaskedLM.measured + NextSentence.measured

    def check(self):
        super().check()
        if self.config.model.pooling == "last":
            raise ValueError("model.pooling = last makes attention causal, and hidden tokens are to be predicted from "
                             "both sides; set model.pooling=first, or leave masked or next_sentence out of the sum")


class Classification(Task):
    """Tell the class of a text, or of a pair of texts: the loss is -log p(class), times the class's weight.

    A text beyond the context is cut (`data.long_texts`); the mean of the probabilities of its pieces counts.
    """

    parts, measured = ("classification",), tuple(f"val_{name}" for name in report.METRICS)

    def check(self):
        if self.T < 4:
            raise ValueError(f"model.context_length = {self.T} is too small for a text and the tokens around it")
        self.class_weights = None

    def deal(self, split: LabelledSplit):
        if self.config.objective.class_weights == "balanced":
            counts = np.bincount(split.labels, minlength=len(split.classes))
            self.class_weights = torch.tensor(len(split.labels) / len(counts) / np.maximum(counts, 1)).float()
        return LabelledRows(split, self.T, self.config.data.long_texts, self.seed)

    def draw(self, first, count):
        return [self.batch(self.dealer, [self.dealer.place(number) for number in range(first, first + count)])]

    def in_order(self, split, batch_size):
        """The texts of a split as they stand."""
        rows = LabelledRows(split, self.T, self.config.data.long_texts, self.seed)
        for first in range(0, len(rows.rows), batch_size):
            yield self.batch(rows, range(first, min(first + batch_size, len(rows.rows))))

    def batch(self, rows: LabelledRows, places) -> Batch:
        """The rows at some places."""
        texts, numbers = zip(*(rows.rows[place] for place in places))
        arrays = text_rows(texts, self.T, self.tokenizer)
        arrays |= {"labels": rows.split.labels[list(numbers)], "numbers": np.array(numbers)}
        return Batch(**{name: _tensor(array) for name, array in arrays.items()}, task=self)

    def counts(self, batch):
        weights = self.class_weights
        return {"classification": len(batch.labels) if weights is None else weights[batch.labels.cpu()].sum().item()}

    def losses(self, model, batch, found=None):
        logits = class_logits(model, batch)
        if found is not None:
            found.setdefault(self, []).append((batch.numbers, batch.labels, logits.softmax(-1)))
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        return {"classification": F.cross_entropy(logits, batch.labels, weights, reduction="sum")}

    def metrics(self, found):
        if self not in found:
            return {}
        numbers, labels, probabilities = map(torch.cat, zip(*found[self]))
        if not probabilities.isfinite().all():
            return dict.fromkeys(self.measured, math.nan)
        labels, probabilities = by_text(numbers, labels), by_text(numbers, probabilities)
        names = self.config.objective.classes
        whole = report.classification_report(labels.numpy(), probabilities.numpy(), names)
        return {f"val_{name}": of(whole) for name, of in report.METRICS.items()}


def class_logits(model, batch: Batch) -> torch.Tensor:
    """(B, classes) in float32."""
    types = batch.token_types if model.config.token_types > 1 else None
    hidden = model.hidden(batch.inputs, causal=model.pools_causally, document_ids=batch.document_ids, token_types=types)
    return model.class_logits(hidden, batch.lengths)


def by_text(numbers: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The mean of `values` (rows, ...) over the rows of each text (rows,), on the CPU; of whole numbers the first."""
    numbers, values = numbers.cpu(), values.cpu()
    texts, place, counts = numbers.unique(return_inverse=True, return_counts=True)
    if not values.is_floating_point():
        return torch.empty(len(texts), dtype=values.dtype).index_copy_(0, place, values)
    sums = torch.zeros(len(texts), *values.shape[1:], dtype=torch.float64).index_add_(0, place, values.double())
    return sums / counts[:, None]


TASKS = (MaskedNextSentence, CausalLM, MaskedLM, NextSentence, Classification)
"""In the order in which they are looked for: the first takes its parts out of a sum."""


class Mixture:
    """Tasks whose weighted losses are added, from step `first` on. Each draws rows of its own: n rows are n of each."""

    def __init__(self, tasks: list[Task], first: int = 0):
        self.tasks, self.first = tasks, first
        self.weights = {part: weight for task in tasks for part, weight in task.weights.items()}
        self.measured = [name for task in tasks for name in task.measured]

    def draw(self, first: int, count: int) -> list[Batch]:
        """Training rows first to first + count - 1 of each task."""
        return [batch for task in self.tasks for batch in task.draw(first, count)]

    def in_order(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """A whole split, for each task in turn."""
        for task in self.tasks:
            yield from task.in_order(split, batch_size)

    def sources(self, number: int) -> list[tuple[str, int]]:
        """Where the text of a training row of each task begins: document and byte."""
        return [source for task in self.tasks for source in task.sources(number)]

    def counts(self, batch: Batch) -> dict[str, int]:
        return batch.task.counts(batch)

    def losses(self, model, batch: Batch, found: dict | None = None) -> dict[str, torch.Tensor]:
        """With `found`, what tells of right and wrong answers is noted in it, by part."""
        return batch.task.losses(model, batch, found)

    def metrics(self, found: dict[str, list]) -> dict[str, float]:
        """Numbers of an evaluation besides the losses."""
        return {name: value for task in self.tasks for name, value in task.metrics(found).items()}


class Objective:
    """What `config.objective.name` says: a mixture for each step.

    `evaluated` is what the held-out text is measured by at all steps: the last mixture, and with no weight the parts
    that only earlier ones have.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, split: Split | None = None):
        made = {}                                       # a task that several phases have is one

        def task_of(kind, weights):
            key = kind, *weights.items()
            if key not in made:
                made[key] = kind(config, tokenizer, split, weights)
            return made[key]

        self.phases, evaluated = [], []
        for first, weights in config.objective.phases:
            tasks, left = [], dict(weights)
            for kind in TASKS:
                if left.keys() >= set(kind.parts):
                    tasks.append(task_of(kind, {part: left.pop(part) for part in kind.parts}))
            self.phases.append(Mixture(tasks, first))
        seen = set()
        for task in [task for mixture in reversed(self.phases) for task in mixture.tasks]:
            if not seen & set(task.parts):
                evaluated.append(task)
                seen |= set(task.parts)
        self.evaluated = Mixture(evaluated)
        last = self.phases[-1].weights
        self.evaluated.weights = {part: last.get(part, 0.0) for part in self.evaluated.weights}

    def at(self, step: int) -> Mixture:
        """What is trained at a step, counted from 0."""
        return next(mixture for mixture in reversed(self.phases) if mixture.first <= step)


class CompiledHidden:
    """What an objective needs of a model, with `hidden` compiled."""

    def __init__(self, model):
        self._model, self.hidden = model, torch.compile(model.hidden)

    def __getattr__(self, name):
        return getattr(self._model, name)


def make_objective(config: Config, tokenizer: Tokenizer, split: Split | None = None) -> Objective:
    """The objective that `config.objective` describes, on a text to train on."""
    return Objective(config, tokenizer, split)
