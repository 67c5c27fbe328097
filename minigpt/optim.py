"""Optimizers and schedules: AdamW, Muon with one batched orthogonalisation per shape, warm-up and decay."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch.optim.adamw import adamw

from minigpt.config import OptimConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
PRODUCT_DTYPES = {"cuda": torch.bfloat16}
"""{type of device: in which its products run}, float32 on others."""


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Bring the singular values of each matrix near 1, by the quintic Newton-Schulz iteration.

    X ← a X + (b A + c A²) X with A = X Xᵀ (Muon, kellerjordan.github.io/posts/muon). matrices (N, R, C).
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(PRODUCT_DTYPES.get(matrices.device.type, torch.float32))
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class Optimizer:
    """Groups of parameters with their settings, and the state of each parameter.

    As torch.optim.Optimizer, without its closures and hooks: that one loads torch's compiler, which takes seconds.
    """

    def __init__(self, params, **settings):
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{"params": params}]
        self.param_groups = [settings | group for group in groups]
        self.state = defaultdict(dict)

    @torch.no_grad()
    def step(self):
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            if parameters := [parameter for parameter in group["params"] if parameter.grad is not None]:
                self.step_group(parameters, group)

    def zero_grad(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101), by torch's fused kernel.

    m ← β1 m + (1 - β1) g;  v ← β2 v + (1 - β2) g²;
    w ← (1 - lr · weight_decay) w - lr · m / (1 - β1ᵗ) / (sqrt(v / (1 - β2ᵗ)) + eps).
    """

    STATE = ("exp_avg", "exp_avg_sq", "step")

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def step_group(self, parameters, group):
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {"exp_avg": torch.zeros_like(parameter),
                                         "exp_avg_sq": torch.zeros_like(parameter),
                                         "step": torch.zeros((), device=parameter.device)}
        first, second, steps = ([self.state[parameter][key] for parameter in parameters] for key in self.STATE)
        beta1, beta2 = group["betas"]
        adamw(parameters, [parameter.grad for parameter in parameters], first, second, [], steps, fused=True,
              amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
              eps=group["eps"], maximize=False)


class Muon(Optimizer):
    """Momentum, orthogonalised: for matrices inside the network (kellerjordan.github.io/posts/muon).

    m ← μ m + (1 - μ) g;  u = orthogonalize((1 - μ) g + μ m) · sqrt(max(1, R / C));
    w ← (1 - lr · weight_decay) w - lr · u. Matrices of one shape are orthogonalised as one batch.
    """

    STATE = ("momentum",)

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(parameter.shape)}")

    def step_group(self, parameters, group):
        by_shape = {}
        for parameter in parameters:
            by_shape.setdefault((parameter.shape, parameter.device), []).append(parameter)
        for (shape, _), alike in by_shape.items():
            self._step_shape(shape, alike, group)

    def _step_shape(self, shape, parameters, group):
        grads = [parameter.grad for parameter in parameters]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = orthogonalize(torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"])))
        scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates.unbind(), alpha=-scale)


def make_optimizers(model: torch.nn.Module, config: OptimConfig) -> list[Optimizer]:
    """The optimizers of all parameters, each in exactly one group; a group's `peak_lr` is what the schedule scales."""
    named = list(model.named_parameters())
    in_blocks = {id(p) for p in model.blocks.parameters() if p.dim() == 2} if config.name == "muon" else set()
    inner = [p for _, p in named if id(p) in in_blocks]
    matrices = [p for _, p in named if p.dim() >= 2 and id(p) not in in_blocks]
    vectors = [p for _, p in named if p.dim() < 2]
    assert len(inner) + len(matrices) + len(vectors) == len(named)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = [AdamW([group for group in groups if group["params"]], lr=config.learning_rate,
                        betas=(config.beta1, config.beta2), eps=config.eps)]
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


def set_learning_rate(optimizers: list[Optimizer], part: float) -> None:
    """Set every group's rate to `part` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * part
