"""How good a model is on held-out text: nats per target, how many are right and, for causal models, bits per byte."""

from __future__ import annotations

import math

import torch

from minigpt.shards import Split


class Stopped(Exception):
    """An evaluation was told to stop before its end."""


@torch.no_grad()
def evaluate(model, objective, split: Split, *, batch_size: int, autocast,
             should_stop=lambda: False) -> dict[str, float]:
    """Loss on the whole split, from front to back, in windows of the context's length or in what the objective reads.

    Gives `val_loss` (nats per target, the parts weighted), `val_<part>` for each part, `val_<part>_accuracy` or what
    else the objective measures, and for causal models `val_bpb` = summed nats / ln 2 / UTF-8 bytes of the raw text:
    each token is scored once, the first of a document is predicted from <s>, and <s> itself is no text and is not
    scored. `model` is the plain GPT, `autocast` a context manager factory. Raises Stopped as soon as `should_stop()` is
    true.
    """
    was_training = model.training
    model.eval()
    sums, counts, found = dict.fromkeys(objective.weights, 0.0), dict.fromkeys(objective.weights, 0), {}
    try:
        for batch in objective.in_order(split, batch_size):
            if should_stop():
                raise Stopped
            for part, count in objective.counts(batch).items():
                counts[part] += count
            with autocast():
                losses = objective.losses(model, batch.to(model.device), found)
            for part, loss in losses.items():
                sums[part] += loss.double().item()
    finally:
        model.train(was_training)
    means = {part: sums[part] / (counts[part] or 1) for part in sums}
    result = {"val_loss": sum(objective.weights[part] * mean for part, mean in means.items())}
    result |= {f"val_{part}": mean for part, mean in means.items()} | objective.metrics(found)
    if "causal" in sums:
        result["val_bpb"] = sums["causal"] / math.log(2) / split.num_bytes
    return result
