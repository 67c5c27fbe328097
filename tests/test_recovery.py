"""What goes wrong in training is noticed in its step, named and undone: bad numbers, spikes, too little memory."""

import json
import math
import random
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from marks import slow
from test_training import metrics_of, run_lines
from tiny import tiny_config

from minigpt import checkpoint, engine, objectives, optim, update
from minigpt.model import GPT
from minigpt.optim import make_optimizers
from minigpt.tokenizer import Tokenizer


def weights_of(run):
    return dict(engine.load(run).model.named_parameters())


TASKS = {kind.parts: kind for kind in objectives.TASKS}


def as_causal(kind):
    """objectives.TASKS with another task for the part causal."""
    return tuple((TASKS | {("causal",): kind}).values())


class Broken(objectives.CausalLM):
    """Gives a loss, or a gradient, that is not finite, in the steps of `bad`."""

    bad, kind, calls = set(), "loss", 0

    def losses(self, model, batch, found=None):
        losses = super().losses(model, batch)
        if not torch.is_grad_enabled():
            return losses
        Broken.calls += 1
        if Broken.calls not in self.bad:
            return losses
        factor = math.nan if self.kind == "loss" else (model.embedding.weight.flatten()[0] * 0).sqrt() + 1
        return {part: loss * factor for part, loss in losses.items()}


def break_steps(monkeypatch, kind, bad):
    """From here on the causal objective is broken in the steps of `bad`."""
    monkeypatch.setattr(objectives, "TASKS", as_causal(Broken))
    for name, value in (("kind", kind), ("calls", 0), ("bad", bad)):
        monkeypatch.setattr(Broken, name, value)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_number_that_is_not_finite_never_reaches_the_weights(tmp_path, text_file, monkeypatch, kind):
    break_steps(monkeypatch, kind, {3, 4})
    config = tiny_config(tmp_path, text_file)
    closing, _ = run_lines(config)
    records = metrics_of(config)
    assert [record["step"] for record in records if "skipped" in record] == [3, 4]
    assert all(math.isfinite(record["train_loss"]) for record in records[4:])
    run = engine.load(tmp_path / "run")
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())


def test_a_run_stops_with_advice_after_several_bad_steps(tmp_path, text_file, monkeypatch):
    break_steps(monkeypatch, "loss", set(range(5, 100)))
    config = tiny_config(tmp_path, text_file, "--train.max_bad_steps=3")
    with pytest.raises(ValueError, match=r"3 steps in a row .* Lower optim.learning_rate"):
        run_lines(config)
    assert [json.loads(line)["step"] for line in open(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    run = engine.load(tmp_path / "run")
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())


def test_the_batch_of_a_skipped_step_is_named_and_counted(tmp_path, text_file, monkeypatch):
    break_steps(monkeypatch, "loss", {3})
    config = tiny_config(tmp_path, text_file, "--train.log_every=5")
    _, lines = run_lines(config)
    line, = [line for line in lines if "skipped" in line]
    assert line.startswith("step 3 skipped: the loss is nan; the weights are as before; its batch began at words.txt")
    assert line.endswith(" and 1 more")
    assert [(record["step"], record["skipped_steps"]) for record in metrics_of(config)] == [
        (3, 1), (5, 1), (6, 1), (10, 1), (12, 1)]


class Breaking(optim.AdamW):
    """Puts NaN into a weight, or into its own memory, in the steps of `bad`, counted over the whole test."""

    bad, calls, target = set(), 0, "weight"

    def step(self):
        super().step()
        Breaking.calls += 1
        if Breaking.calls in self.bad:
            weight = self.param_groups[0]["params"][0]
            (weight if self.target == "weight" else self.state[weight]["exp_avg"]).data[7, 3] = math.nan


@pytest.fixture
def breaking(monkeypatch):
    monkeypatch.setattr(optim, "AdamW", Breaking)
    monkeypatch.setattr(Breaking, "calls", 0)
    monkeypatch.setattr(Breaking, "target", "weight")
    return Breaking


def test_a_weight_that_is_not_finite_brings_back_the_last_checkpoint(tmp_path, text_file, breaking, monkeypatch):
    monkeypatch.setattr(Breaking, "bad", {7})
    config = tiny_config(tmp_path, text_file)
    _, lines = run_lines(config)
    problem, = [line for line in lines if "the weights are not finite after it" in line]
    assert problem.startswith("step 7: ") and "its batch began at words.txt byte" in problem
    assert "going on from step 6, without that batch" in lines
    records = metrics_of(config)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["rollbacks"] for record in records] == [0] * 6 + [1] * 6
    assert len(records[6]["avoided"]) == 4 and records[6]["avoided"][0][0] == "words.txt"
    assert all(torch.isfinite(weight).all() for weight in weights_of(tmp_path / "run").values())


def test_memory_of_the_optimizer_that_is_not_finite_is_not_saved(tmp_path, text_file, breaking, monkeypatch):
    monkeypatch.setattr(Breaking, "bad", {8})
    monkeypatch.setattr(Breaking, "target", "memory")
    config = tiny_config(tmp_path, text_file)
    _, lines = run_lines(config)
    assert any("embedding.weight/exp_avg holds a number that is not finite" in line for line in lines)
    assert metrics_of(config)[-1]["rollbacks"] == 1
    found = checkpoint.find(tmp_path / "run")
    model = GPT(found.config.model)
    optimizers = make_optimizers(model, found.config.optim)
    found.load_optimizers(model, optimizers)
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.optimizer_tensors(model, optimizers).values())


@pytest.mark.parametrize("bad, steps, message", [
    (range(2, 100), [], "step 2: the weights are not finite after it, and there is no checkpoint yet to go back to"),
    (range(6, 100), [4], "step 5: the weights are not finite after it, and going back did not mend it; Lower"),
])
def test_where_going_back_is_no_help_the_run_ends_with_advice(tmp_path, text_file, breaking, monkeypatch, bad, steps,
                                                             message):
    monkeypatch.setattr(Breaking, "bad", set(bad))
    config = tiny_config(tmp_path, text_file, "--train.eval_every=12")
    with pytest.raises(ValueError, match=message):
        run_lines(config)
    assert [checkpoint.step_of(path) for path in checkpoint.in_run(tmp_path / "run")] == steps
    if steps:
        assert all(torch.isfinite(weight).all() for weight in weights_of(tmp_path / "run").values())


@pytest.fixture
def noisy_file(tmp_path):
    """Lines that are alike, and in their midst some that nothing before them foretells."""
    chance = random.Random(0)
    lines = ["the king and the queen said to the lord of the night"] * 700
    lines[300:312] = ["".join(chr(chance.randrange(0x4E00, 0x9FFF)) for _ in range(20)) for _ in range(12)]
    path = tmp_path / "noisy.txt"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


SPIKY = ["--train.batch_size=1", "--optim.name=adamw", "--optim.learning_rate=0.02", "--train.max_steps=300",
         "--train.eval_every=300", "--train.checkpoint_every=25", "--train.spike_bound=1.5",
         "--tokenizer.vocab_size=280"]


def test_a_spike_brings_back_the_last_checkpoint_and_passes_over_its_batch(tmp_path, noisy_file):
    """Every batch that is passed over begins in the noise or on the line before it; none is, without a bound."""
    config = tiny_config(tmp_path, noisy_file, *SPIKY)
    _, lines = run_lines(config)
    records = metrics_of(config)
    assert [record["step"] for record in records] == list(range(1, 301))
    avoided = [place for record in records for place in record.get("avoided", [])]
    assert len(avoided) == records[-1]["rollbacks"] > 1
    noise = [place for place, byte in enumerate(noisy_file.read_bytes()) if byte > 127]
    assert all(name == "noisy.txt" and noise[0] - 200 < byte <= noise[-1] for name, byte in avoided)
    spikes = [line for line in lines if "the loss of" in line]
    assert len(spikes) == len(avoided) and f"its batch began at noisy.txt byte {avoided[0][1]}" in "".join(spikes)
    (tmp_path / "unbound").mkdir()
    plain = tiny_config(tmp_path / "unbound", noisy_file, *SPIKY, "--train.spike_bound=0")
    run_lines(plain)
    assert metrics_of(plain)[-1]["rollbacks"] == 0
    assert max(record["train_loss"] for record in records[60:]) < max(
        record["train_loss"] for record in metrics_of(plain)[60:]) - 1


@pytest.mark.parametrize("dtype", [slow("float32"), "float16"])
def test_a_spike_before_the_first_checkpoint_passes_over_its_batch(tmp_path, noisy_file, dtype):
    """In float16 the loss scaler was left in the middle of a step."""
    config = tiny_config(tmp_path, noisy_file, *SPIKY, "--train.checkpoint_every=300", f"--train.dtype={dtype}")
    _, lines = run_lines(config)
    records = metrics_of(config)
    assert records[-1]["rollbacks"] == sum(len(record.get("avoided", [])) for record in records) > 1
    assert [record["step"] for record in records] == list(range(1, 301))


class Small(objectives.CausalLM):
    """Has memory for `room` rows at a time, and counts the rows it was given."""

    room, sizes = 2, []

    def losses(self, model, batch, found=None):
        losses = super().losses(model, batch)
        self.sizes.append(len(batch.inputs))
        if len(batch.inputs) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return losses


@pytest.mark.parametrize("room, micro_batch, accumulation", [(1, 1, 2), (2, 2, 1), (3, 2, 2), (7, 7, 1)])
def test_too_little_memory_halves_the_micro_batch_to_the_same_result(tmp_path, text_file, monkeypatch, room,
                                                                     micro_batch, accumulation):
    """7 rows, halved to 4, 2 and 1, accumulate to the step of 7; it is said once."""
    options = ["--train.batch_size=7", f"--train.accumulation_steps={accumulation}", "--train.dtype=float32"]
    run_lines(tiny_config(tmp_path, text_file, *options))
    wanted = weights_of(tmp_path / "run")
    monkeypatch.setattr(objectives, "TASKS", as_causal(Small))
    monkeypatch.setattr(Small, "room", room)
    monkeypatch.setattr(Small, "sizes", [])
    (tmp_path / "small").mkdir()
    config = tiny_config(tmp_path / "small", text_file, *options)
    _, lines = run_lines(config)
    said = [line for line in lines if "memory is too small for 7 rows at once" in line]
    assert len(said) == (room < 7) and all(f"going on with {micro_batch}," in line for line in said)
    assert max(Small.sizes[10:]) == micro_batch
    for name, weight in weights_of(tmp_path / "small/run").items():
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=2e-4)
    assert [record["tokens"] for record in metrics_of(config)] == [
        7 * accumulation * 32 * step for step in range(1, 13)]


def test_a_halved_micro_batch_is_kept_by_a_resumed_run(tmp_path, text_file, monkeypatch):
    """It went back to whole ones, and so to other last bits."""
    monkeypatch.setattr(objectives, "TASKS", as_causal(Small))
    monkeypatch.setattr(Small, "sizes", [])
    run_lines(tiny_config(tmp_path, text_file))
    monkeypatch.setattr(Small, "room", 100)
    monkeypatch.setattr(Small, "sizes", [])
    _, lines = run_lines(tiny_config(tmp_path, text_file, "--train.max_steps=14"), resume=True)
    assert max(Small.sizes) == 2 and not any("memory" in line for line in lines)


def test_memory_too_small_for_one_row_is_an_error(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(objectives, "TASKS", as_causal(Small))
    monkeypatch.setattr(Small, "room", 0)
    with pytest.raises(torch.OutOfMemoryError):
        run_lines(tiny_config(tmp_path, text_file))


def test_one_overflow_holds_back_every_optimizer(tmp_path, text_file):
    """An infinite gradient of one optimizer's parameter let the other optimizer step, on gradients clipped to zero."""
    config = tiny_config(tmp_path, text_file)
    torch.manual_seed(0)
    model = GPT(replace(config.model, vocab_size=300))
    optimizers = make_optimizers(model, config.optim)
    objective = objectives.CausalLM(config, Tokenizer("bytes"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    batch = objective.batch(np.random.default_rng(0).integers(5, 261, (4, 33)), 0)

    def step():
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = update.add_gradients(model, objective, [batch], scaler, nullcontext, torch.device("cpu"))
        result = update.apply_gradients(losses, optimizers, scaler, 1.0)
        return result, [torch.equal(a, b) for a, b in zip(before, model.parameters())]

    assert not any(step()[1])
    handle = model.embedding.weight.register_hook(lambda grad: grad * math.inf)
    result, same = step()
    assert all(same) and result["grad_norm"] == math.inf and "norm is inf" in result["skipped"]
    assert scaler.get_scale() == 2.0
    handle.remove()
    assert not any(step()[1])


def test_an_overflow_of_float16_is_named_and_does_not_stop_the_run(tmp_path, text_file, monkeypatch):
    config = tiny_config(tmp_path, text_file, "--train.dtype=float16", "--train.max_bad_steps=1",
                         "--optim.learning_rate=3", "--optim.warmup_steps=1", "--train.max_steps=30")
    scaler = torch.amp.GradScaler

    class Eager(scaler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **{"init_scale": 2.0**40, **options})

    monkeypatch.setattr(torch.amp, "GradScaler", Eager)
    _, lines = run_lines(config)
    skipped = [record["step"] for record in metrics_of(config) if "skipped" in record]
    assert skipped and skipped[0] == 1 and len(skipped) < 30
    assert sum("skipped: the gradient's norm is" in line for line in lines) == len(skipped)
