"""One update of the weights: gradients of all micro-batches, checks, clipping, the optimizers' steps.

Nothing that is not finite gets into the weights, and where the weights themselves are no longer sound it is known in
the very step.
"""

from __future__ import annotations

import math

import torch

from minigpt.optim import Optimizer


class Unsound(Exception):
    """The loss or the weights show that something went wrong before; going back to a checkpoint mends it."""


class Spike(Unsound):
    """The loss of a batch is far above what the steps before had; the weights are as before."""


def parameters_of(optimizers: list[Optimizer]) -> list[torch.nn.Parameter]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def add_gradients(model, objective, batches, scaler, autocast, device) -> dict:
    """Back-propagate the micro-batches of a step, and give `train_loss` and each part's loss by its name.

    Summed losses are divided by the counts over all micro-batches of all ranks, so that any cut into micro-batches and
    ranks gives one result, once the gradients are averaged over ranks as DistributedDataParallel does.
    """
    counts = dict.fromkeys(objective.weights, 0.0)
    for batch in batches:
        for part, count in objective.counts(batch).items():
            counts[part] += count
    counts, ranks = over_ranks(counts, device)
    sums = dict.fromkeys(counts, 0.0)
    for batch in batches:
        with autocast():
            losses = objective.losses(model, batch.to(device))
        loss = sum(objective.weights[part] * losses[part] / (counts[part] or 1) for part in losses)
        scaler.scale(ranks * loss).backward()
        for part in losses:
            sums[part] = sums[part] + losses[part].detach()
    sums, _ = over_ranks({part: float(value) for part, value in sums.items()}, device)
    means = {part: value / (counts[part] or 1) for part, value in sums.items()}
    return {"train_loss": sum(objective.weights[part] * mean for part, mean in means.items()), **means}


def over_ranks(numbers: dict[str, float], device: torch.device) -> tuple[dict[str, float], int]:
    """Each number summed over all processes of torch.distributed, in float64, and how many processes there are."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return numbers, 1
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(values)
    return dict(zip(numbers, values.tolist())), torch.distributed.get_world_size()


def apply_gradients(losses: dict, optimizers, scaler, grad_clip: float, highest_loss: float = math.inf) -> dict:
    """Clip the gradients and take the optimizers' step, or none where the loss or a gradient is not finite.

    Gives `grad_norm` and, where no step was taken, "skipped", which says why. Raises Spike for a loss above
    `highest_loss`, before the step, and Unsound where the weights are not finite after it.
    """
    parameters, loss = parameters_of(optimizers), losses["train_loss"]
    if highest_loss < loss < math.inf:
        raise Spike(f"the loss of {loss:.3f} is above {highest_loss:.3f}")
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf).item()
    result = {"grad_norm": norm}
    if not math.isfinite(loss):
        result["skipped"] = f"the loss is {loss}"
    elif not math.isfinite(norm):
        result["skipped"] = f"the gradient's norm is {norm}"
    else:
        for optimizer in optimizers:
            scaler.step(optimizer)
    if scaler.is_enabled():
        scaler.update()                                 # where a gradient overflowed, to half the loss scale
    if not math.isfinite(torch.nn.utils.get_total_norm(parameters).item()):
        raise Unsound("the weights are not finite after it")
    return result
