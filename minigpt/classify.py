"""Classes, vectors and missing words of texts: what a model that was trained for them gives.

    run = minigpt.load("runs/reviews")
    probabilities = classify(run, [("A fine book.",)])                  # (1, classes)
    vectors = embed(run, ["A fine book.", "The tax year 2024"])         # (2, C)
    blanks = fill(run, "The capital of [MASK] is")                      # [[(" France", 0.31), ...]]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from minigpt.labelled import fitted, read_table, split_of
from minigpt.objectives import Batch, by_text, class_logits, text_rows

POOLINGS = ("mean", "first", "last")
MASKS = ("[MASK]", "<mask>")
"""Each stands for a hidden token, besides the tokenizer's own name of it."""


def _rows(run, texts, batch_size, long_texts) -> Iterator[tuple[torch.Tensor, Batch]]:
    """(number of the text of each row, a batch of rows) of texts (ids, ids or None), alike long ones together."""
    T = run.model.config.context_length
    rows = [(piece, number) for number, text in enumerate(texts) for piece in fitted(text, T, long_texts)]
    rows.sort(key=lambda row: -sum(len(part) for part in row[0] if part is not None))
    for first in range(0, len(rows), batch_size):
        pieces, numbers = zip(*rows[first:first + batch_size])
        arrays = {name: torch.from_numpy(array) for name, array in text_rows(pieces, T, run.tokenizer).items()}
        yield torch.tensor(numbers), Batch(**arrays).to(run.model.device)


def _encoded(run, texts):
    """Texts, each one or a pair, as (ids, ids or None). Raises ValueError for an empty one."""
    T = run.model.config.context_length
    if run.tokenizer is None:
        raise ValueError(f"{run.path}: has no tokenizer; import it again with --tokenizer DIR")
    if T < 3:
        raise ValueError(f"{run.path}: a context of {T} tokens is too small for a text and the tokens around it")
    for number, text in enumerate(texts, 1):
        if not all(part.strip() for part in text):
            raise ValueError(f"text {number} is empty; give some words")
    ids = iter(run.tokenizer.encode_batch([part for text in texts for part in text]))
    encoded = [(next(ids), next(ids) if len(text) == 2 else None) for text in texts]
    for number, parts in enumerate(encoded, 1):
        if [] in parts:
            raise ValueError(f"text {number}: the tokenizer has no token for it; give some words")
    return encoded


def _finite(run, values):
    """What a model gave. Raises ValueError where it is not finite."""
    if not torch.isfinite(values).all():
        raise ValueError(f"{run.path}: the model's output is not finite, so its weights are damaged")
    return values


def classify(run, texts: list[tuple[str, ...]], batch_size: int = 32) -> np.ndarray:
    """Probabilities (n, classes) float64 of texts, each (text,) or (text, text); their names: `classes_of(run)`.

    A text beyond the context is cut as in training (`data.long_texts`).
    """
    classes_of(run)
    columns = run.config.data.text_columns
    for number, text in enumerate(texts, 1):
        if len(text) != len(columns):
            raise ValueError(f"text {number}: the model was trained on {' and '.join(columns)}, so give "
                             f"{'a pair' if len(columns) == 2 else 'single texts'}")
    return _probabilities(run, _encoded(run, texts), batch_size)


@torch.no_grad()
def _probabilities(run, encoded, batch_size):
    numbers, found = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, run.model.config.num_classes)]
    for of_rows, batch in _rows(run, encoded, batch_size, run.config.data.long_texts):
        numbers.append(of_rows)
        found.append(_finite(run, class_logits(run.model, batch)).softmax(-1).cpu())
    return by_text(torch.cat(numbers), torch.cat(found)).numpy()


def classify_table(run, path: str, batch_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """(labels (n,), probabilities (n, classes)) of a table with labels.

    Raises ValueError naming the line of a label that is unknown to the model.
    """
    data, classes = run.config.data, classes_of(run)
    rows = read_table(path, data.text_columns, data.label_column)
    split = split_of(rows, classes, run.tokenizer, path)
    return split.labels, _probabilities(run, split.texts, batch_size)


def classes_of(run) -> list[str]:
    """The names of a classifier's classes. Raises ValueError for a run that is none."""
    if not run.model.config.num_classes or not run.config.objective.classes:
        raise ValueError(f"{run.path}: trained with the objective {run.config.objective.name!r}, so it tells no "
                         "classes; fine-tune it first (train.start_from, objective.name=classification)")
    return run.config.objective.classes


def reads_causally(run) -> bool:
    """Whether a token of this model sees those before it alone."""
    return run.config.objective.is_causal or run.model.pools_causally


@torch.no_grad()
def embed(run, texts: list[str], pooling: str = "mean", batch_size: int = 32) -> np.ndarray:
    """Vectors (n, C) float32 of length 1: of each text the mean of its tokens' final hidden vectors.

    Or that of what stands before the text ("first": it sees the text in a masked model) or behind it ("last": in a
    causal one). A text beyond the context is read in pieces: of these the mean is over all tokens, "first" is of the
    first piece and "last" of the last.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling = {pooling!r} is none of: {', '.join(POOLINGS)}")
    if pooling == "first" and reads_causally(run):
        raise ValueError(f"pooling = first: in {run.path} the first token sees nothing of the text; take mean or last")
    sums = torch.zeros(len(texts), run.model.config.width, dtype=torch.float64)
    long_texts = "truncate" if pooling == "first" else "window"
    encoded = _encoded(run, [(text,) for text in texts])
    if pooling == "last":                               # the last piece alone
        room = run.model.config.context_length - 2
        encoded = [(ids[(len(ids) - 1) // room * room:], None) for ids, _ in encoded]
    for numbers, batch in _rows(run, encoded, batch_size, long_texts):
        hidden = run.model.hidden(batch.inputs, causal=reads_causally(run), document_ids=batch.document_ids)
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = batch.lengths[:, None] - 1
        kept = {"mean": (places > 0) & (places < last), "first": (places == 0).expand(len(hidden), -1),
                "last": places == last}[pooling]                                                        # (B, T)
        sums.index_add_(0, numbers, (hidden.double() * kept[..., None]).sum(1).cpu())
    return F.normalize(_finite(run, sums)).float().numpy()


@torch.no_grad()
def fill(run, text: str, candidates: int = 5) -> list[list[tuple[str, float]]]:
    """For each [MASK] of a text, the likeliest tokens in its place and their probabilities, the likeliest first.

    Each is told with the others hidden. A space before [MASK] is a part of the token where the tokenizer has it so.
    Raises ValueError for a model that was not trained to, and for a text without [MASK] or beyond the context.
    """
    tokenizer, model = run.tokenizer, run.model
    if tokenizer is None:
        raise ValueError(f"{run.path}: has no tokenizer; import it again with --tokenizer DIR")
    if "masked" not in run.config.objective.parts or tokenizer.roles.mask is None:
        raise ValueError(f"{run.path}: trained with the objective {run.config.objective.name!r}, so it cannot fill in "
                         "blanks; take a masked model")
    own = next((name for name, id in tokenizer.special_tokens.items() if id == tokenizer.roles.mask), MASKS[0])
    for name in (*MASKS, own):
        text = text.replace(name, MASKS[0])
    parts = text.split(MASKS[0])
    if len(parts) == 1:
        raise ValueError(f"the text has no {MASKS[0]}; put one where a token is missing")
    if any(len(token) > 1 and token.startswith(b" ") for token in tokenizer.token_bytes):
        parts[:-1] = [part.removesuffix(" ") for part in parts[:-1]]
    roles, ids = tokenizer.roles, []
    for part in parts:
        ids += [*(tokenizer.encode(part) if part else []), roles.mask]
    is_closed = model.config.next_sentence or tokenizer.kind not in ("bpe", "bytes")    # as its training texts were
    ids = [roles.document_start, *ids[:-1], *[roles.separator] * is_closed]
    if len(ids) > model.config.context_length:
        raise ValueError(f"the text has {len(ids)} tokens, more than the context of {model.config.context_length}; "
                         "give a shorter one")
    tokens = torch.tensor([ids], device=model.device)
    logits = model.head(model.hidden(tokens, causal=False)[0][tokens[0] == roles.mask]).float()
    text_ids = np.flatnonzero(~tokenizer.is_special)
    probabilities = _finite(run, logits[:, torch.from_numpy(text_ids).to(logits.device)].softmax(-1))
    best = probabilities.topk(min(candidates, len(text_ids)))
    return [[(tokenizer.token_bytes[text_ids[place]].decode("utf-8", "replace"), probability)
             for place, probability in zip(*row)] for row in zip(best.indices.tolist(), best.values.tolist())]
