"""AdamW and Muon equal torch's; every weight has one optimizer; schedules end where they should."""

import dataclasses
import math

import pytest
import torch
from compare import assert_close
from twins import random_model

from minigpt.config import OptimConfig
from minigpt.optim import AdamW, Muon, make_optimizers, orthogonalize, schedule, set_learning_rate

SHAPES = [(16, 16), (48, 16), (16, 48), (5, 33), (33, 5), (1, 7), (7, 1)]


def matrices(shape, count=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def steps(optimizer_class, starts, grads, **settings):
    """Weights after one step for each list of gradients."""
    parameters = [start.clone().requires_grad_() for start in starts]
    optimizer = optimizer_class(parameters, **settings)
    for now in grads:
        for parameter, grad in zip(parameters, now):
            parameter.grad = grad.clone()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("settings", [{}, dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)], ids=str)
def test_adamw_is_that_of_torch(settings):
    starts = [matrices(shape)[0] for shape in SHAPES] + [torch.ones(3), torch.zeros(())]
    grads = [[torch.randn(start.shape, generator=torch.Generator().manual_seed(seed)) for start in starts]
             for seed in range(5)]
    ours = steps(AdamW, starts, grads, **settings)
    theirs = steps(torch.optim.AdamW, starts, grads, **settings, fused=True)
    assert all(map(torch.equal, ours, theirs)) and not any(map(torch.equal, ours, starts))


@pytest.mark.parametrize("momentum, weight_decay", [(0.95, 0.0), (0.9, 0.1), (0.0, 0.1)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon_equals_that_of_torch(shape, momentum, weight_decay):
    """To the rounding of bfloat16, in which torch iterates.

    bfloat16 keeps 8 bits, a relative error of up to 2^-9 = 0.2 % an element, and each of the five Newton-Schulz
    iterations rounds three products and multiplies what was off before by up to its slope of 3.4; the errors are random
    and mostly average out, so some percent are to be expected. 4 % of the update's norm are allowed (1 to 2 % are
    seen); momentum of the right norm that is not orthogonalised is 17 % off or more.
    """
    start, grads = matrices(shape), [matrices(shape, seed=seed) for seed in range(1, 5)]
    settings = dict(lr=0.1, momentum=momentum, weight_decay=weight_decay)
    ours = steps(Muon, start, grads, **settings)[0] - start[0]
    theirs = steps(torch.optim.Muon, start, grads, **settings, nesterov=True)[0] - start[0]

    def off(update):
        return ((update - theirs).norm() / theirs.norm()).item()

    assert off(ours) < 0.04
    assert off(ours * 0) == 1 and off(ours * 1.1) > 0.04
    momenta = steps(NormalisedMomentum, start, grads, **settings)[0] - start[0]
    assert off(momenta) > 0.15


class NormalisedMomentum(Muon):
    """Muon with each update scaled to the norm of an orthogonal matrix, but not orthogonalised."""

    def _step_shape(self, shape, parameters, group):
        for p in parameters:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(momentum, group["momentum"])
            update = update * min(shape) ** 0.5 / update.norm() * max(1, shape[0] / shape[1]) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalize_applies_its_polynomial_to_the_singular_values(shape):
    """In float64 by singular value decomposition: U diag(p(p(...p(s / |X|)))) Vᵀ, p(s) = a s + b s³ + c s⁵."""
    x = torch.stack(matrices(shape, 3))
    u, s, vt = torch.linalg.svd(x.double() / x.double().norm(dim=(-2, -1), keepdim=True), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    assert_close(orthogonalize(x), u * s[:, None] @ vt, 1e-3)
    singular = torch.linalg.svdvals(orthogonalize(x))
    large = torch.linalg.svdvals(x) > 0.1 * x.norm(dim=(-2, -1))[:, None]
    assert ((singular > 0.5) & (singular < 1.3))[large].all()


def test_orthogonalize_ignores_the_scale_and_survives_zeros():
    x = torch.stack(matrices((6, 9), 2))
    assert_close(orthogonalize(1e-4 * x), orthogonalize(x), 1e-4)
    x[1] = 0
    assert not orthogonalize(x)[1].any() and orthogonalize(x)[0].any()


def test_a_batch_of_matrices_equals_one_by_one():
    starts = matrices((16, 24), 3) + matrices((24, 16), 2)
    grads = [[matrices(start.shape, seed=10 * step + number)[0] for number, start in enumerate(starts)]
             for step in range(3)]
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.1)
    together = steps(Muon, starts, grads, **settings)
    for number, start in enumerate(starts):
        alone = steps(Muon, [start], [[now[number]] for now in grads], **settings)[0]
        assert_close(together[number] - start, alone - start, 1e-5)


@pytest.mark.parametrize("optimizer_class", [AdamW, Muon])
def test_parameters_without_a_gradient_stay(optimizer_class):
    start = matrices((4, 6), 2)
    parameters = [x.clone().requires_grad_() for x in start]
    optimizer = optimizer_class(parameters, lr=0.1, weight_decay=0.5)
    parameters[1].grad = torch.ones(4, 6)
    optimizer.step()
    assert torch.equal(parameters[0], start[0]) and not torch.equal(parameters[1], start[1])
    assert list(optimizer.state) == [parameters[1]] and set(optimizer.state[parameters[1]]) == set(optimizer.STATE)
    optimizer.zero_grad()
    assert parameters[1].grad is None


def test_muon_takes_matrices_only():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Muon([torch.zeros(3, requires_grad=True)])


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("settings", [dict(), dict(bias=True, norm="layer_norm", position="learned"),
                                      dict(tied_embeddings=False)], ids=str)
def test_every_weight_is_in_one_group_and_vectors_do_not_decay(name, settings):
    model = random_model(**settings)
    config = OptimConfig(name=name, weight_decay=0.3, muon_weight_decay=0.2, learning_rate=0.01,
                         muon_learning_rate=0.05, beta1=0.8, beta2=0.9, muon_momentum=0.7)
    optimizers = make_optimizers(model, config)
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["AdamW", "Muon"][:1 + (name == "muon")]
    found = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert id(parameter) not in found, "a weight is in two groups"
                found[id(parameter)] = type(optimizer).__name__, group
    assert len(found) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        kind, group = found[id(parameter)]
        inside = name == "muon" and key.startswith("blocks.") and parameter.dim() == 2
        assert kind == ("Muon" if inside else "AdamW")
        assert group["peak_lr"] == group["lr"] == (0.05 if inside else 0.01)
        assert group["weight_decay"] == (0.0 if parameter.dim() < 2 else 0.2 if inside else 0.3)
        assert group["momentum"] == 0.7 if inside else group["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("part", [1.0, 0.25, 0.0])
def test_the_learning_rate_is_applied(part):
    """The first step of AdamW moves each weight by lr sign(g), beside decay; Muon's moves are in proportion to lr."""
    def moves(part):
        model = random_model()
        optimizers = make_optimizers(model, OptimConfig(learning_rate=0.01, weight_decay=0.0, muon_weight_decay=0.0))
        set_learning_rate(optimizers, part)
        before = [p.detach().clone() for p in model.parameters()]
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        for optimizer in optimizers:
            optimizer.step()
        return {name: (p.detach() - old, p.grad) for (name, p), old in zip(model.named_parameters(), before)}

    full = moves(1.0)
    for name, (move, grad) in moves(part).items():
        assert_close(move, part * full[name][0], 1e-3, name)
        if not (name.startswith("blocks.") and move.dim() == 2):
            assert_close(move, -0.01 * part * grad.sign(), 1e-3, name)


def test_decay_pulls_matrices_towards_zero():
    model = random_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, OptimConfig(learning_rate=0.1, weight_decay=0.5, muon_learning_rate=0.2,
                                                    muon_weight_decay=0.25))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert_close(parameter, before[name] * (0.95 if parameter.dim() == 2 else 1.0), 1e-6, name)


def rates(max_steps, **settings):
    return [schedule(step, max_steps, OptimConfig(**settings)) for step in range(max_steps)]


def test_warm_up_is_a_straight_line_to_the_peak():
    for name in ("cosine", "wsd"):
        assert rates(100, warmup_steps=4, schedule=name)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert rates(100, warmup_steps=0, schedule=name)[0] == 1.0


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine(final):
    made = rates(110, warmup_steps=10, schedule="cosine", final_fraction=final)
    expected = [final + (1 - final) * (1 + math.cos(math.pi * step / 100)) / 2 for step in range(100)]
    assert made[10:] == pytest.approx(expected)
    assert schedule(110, 110, OptimConfig(warmup_steps=10, final_fraction=final)) == pytest.approx(final)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_wsd(final):
    config = OptimConfig(warmup_steps=10, schedule="wsd", decay_fraction=0.2, final_fraction=final)
    made = [schedule(step, 100, config) for step in range(100)]
    assert made[9:81] == [1.0] * 72
    assert made[80:] == pytest.approx([1 - (1 - final) * step / 20 for step in range(20)])
    assert schedule(100, 100, config) == pytest.approx(final)
    assert schedule(99, 100, dataclasses.replace(config, decay_fraction=0.0)) == 1.0
    whole = dataclasses.replace(config, decay_fraction=1.0, final_fraction=0.0)
    assert [schedule(step, 100, whole) for step in (9, 10, 55)] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("max_steps", [1, 2, 3, 10, 97])
@pytest.mark.parametrize("warmup_steps", [0, 1, 9, 200])
def test_no_step_is_taken_at_a_rate_of_zero_or_above_the_peak(name, max_steps, warmup_steps):
    """Regression: the last step, and with max_steps = 1 the only one, had a rate of 0."""
    made = rates(max_steps, warmup_steps=warmup_steps, schedule=name)
    assert all(0 < rate <= 1 for rate in made)
    assert max(made) == 1
    peak = made.index(1)
    assert made[:peak + 1] == sorted(made[:peak + 1]) and made[peak:] == sorted(made[peak:], reverse=True)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_steps_after_the_last_keep_the_final_rate(name):
    config = OptimConfig(warmup_steps=3, schedule=name, final_fraction=0.1)
    assert [schedule(step, 20, config) for step in (20, 21, 35, 1000)] == pytest.approx([0.1] * 4)
