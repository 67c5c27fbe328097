"""How good a model is on held-out text: nats per token and, for causal models, bits per byte."""

from __future__ import annotations

import math

import torch

from minigpt.data import in_order
from minigpt.shards import Split


class Stopped(Exception):
    """An evaluation was told to stop before its end."""


@torch.no_grad()
def evaluate(model, objective, split: Split, *, context_length: int, batch_size: int, autocast,
             should_stop=lambda: False) -> dict[str, float]:
    """Loss on the whole split, in windows of the context's length from front to back; each token is scored once.

    Gives `val_loss` (nats per target, the parts weighted as in training), `val_<part>` for each part, and for causal
    models `val_bpb` = summed nats / ln 2 / UTF-8 bytes of the raw text. The first token of a
    document is predicted from <s>; <s> itself is no text and is not scored. `model` is the plain GPT, `autocast` a
    context manager factory. Raises Stopped as soon as `should_stop()` is true.
    """
    was_training = model.training
    model.eval()
    device = model.device
    sums, counts, row = {}, {}, 0
    try:
        for rows in in_order(split, context_length, objective.extra, batch_size,
                             objective.tokenizer.roles.padding):
            if should_stop():
                raise Stopped
            batch = objective.batch(rows, row, training=False)
            row += len(rows)
            for part, count in objective.counts(batch).items():
                counts[part] = counts.get(part, 0) + count
            with autocast():
                losses = objective.losses(model, batch.to(device))
            for part, loss in losses.items():
                sums[part] = sums.get(part, 0.0) + loss.double().item()
    finally:
        model.train(was_training)
    means = {part: sums[part] / max(1, counts[part]) for part in sums}
    result = {"val_loss": sum(objective.weights[part] * mean for part, mean in means.items())}
    result |= {f"val_{part}": mean for part, mean in means.items()}
    if objective.is_causal:
        result["val_bpb"] = sum(sums.values()) / math.log(2) / split.num_bytes
    return result
