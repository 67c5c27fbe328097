"""Optimizers and schedules: AdamW, Muon with one batched orthogonalisation per shape, warm-up and decay."""

from __future__ import annotations

import math

import torch

from minigpt.config import OptimConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Bring the singular values of each matrix near 1, by the quintic Newton-Schulz iteration.

    X ← a X + (b A + c A²) X with A = X Xᵀ (Muon, kellerjordan.github.io/posts/muon). matrices (N, R, C); the products
    run in bfloat16 on a GPU, in float32 on a CPU.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: for matrices inside the network (kellerjordan.github.io/posts/muon).

    m ← μ m + (1 - μ) g;  u = orthogonalize((1 - μ) g + μ m) · sqrt(max(1, R / C));
    w ← (1 - lr · weight_decay) w - lr · u. Matrices of one shape are orthogonalised as one batch.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((parameter.shape, parameter.device), []).append(parameter)
            for (shape, _), parameters in by_shape.items():
                self._step_shape(shape, parameters, group)

    def _step_shape(self, shape, parameters, group):
        grads = [parameter.grad for parameter in parameters]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = orthogonalize(torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"])))
        scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates.unbind(), alpha=-scale)


STATE_KEYS = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum"}}
"""What each optimizer remembers of a parameter."""


def make_optimizers(model: torch.nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of all parameters, each in exactly one group; a group's `peak_lr` is what the schedule scales."""
    named = list(model.named_parameters())
    in_blocks = {id(p) for p in model.blocks.parameters() if p.dim() == 2} if config.name == "muon" else set()
    inner = [p for _, p in named if id(p) in in_blocks]
    matrices = [p for _, p in named if p.dim() >= 2 and id(p) not in in_blocks]
    vectors = [p for _, p in named if p.dim() < 2]
    assert len(inner) + len(matrices) + len(vectors) == len(named)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate,
                                    betas=(config.beta1, config.beta2), eps=config.eps, fused=True)]
    if inner:
        optimizers.append(Muon(inner, lr=config.muon_learning_rate, momentum=config.muon_momentum,
                               weight_decay=config.muon_weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def schedule(step: int, max_steps: int, config: OptimConfig) -> float:
    """Part of the peak learning rate at a step, counted from 0.

    Linear warm-up to 1; then "cosine": half a cosine down; "wsd": 1 until the last `decay_fraction` of the steps, then
    a straight line down (arXiv 2404.06395). Both would reach `final_fraction` at step `max_steps`, just after the
    last, so that no step is taken at a rate of 0.
    """
    warmup = min(config.warmup_steps, max_steps)
    if step < warmup:
        return (step + 1) / warmup
    first = warmup if config.schedule == "cosine" else max(warmup, round(max_steps * (1 - config.decay_fraction)))
    if step < first:
        return 1.0
    progress = min(1.0, (step - first) / max(1, max_steps - first))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.final_fraction + (1 - config.final_fraction) * fall


def set_learning_rate(optimizers: list[torch.optim.Optimizer], part: float) -> None:
    """Set every group's rate to `part` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * part
