"""BERT's pre-training follows transformers' BertForPreTraining step by step: same data, masks and initial weights."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_sentences import BYTES, DOCUMENTS, split_of
from twins import bert_twins, twin_of

from minigpt.config import Config, ObjectiveConfig, OptimConfig
from minigpt.objectives import make_objective
from minigpt.optim import make_optimizers, schedule, set_learning_rate
from minigpt.update import add_gradients, apply_gradients

STEPS, MICRO_BATCHES, CONTEXT = 10, (5, 3), 48
OPTIM = OptimConfig(name="adamw", eps=1e-6, warmup_steps=3)     # BERT's eps
TOLERANCE = 1e-6
"""For each step so far: of a loss or norm relative to it, of a weight absolute. A sum's rounding is about 1e-7 of it,
and Adam makes of 1e-9 in a gradient, over eps, 1e-6 in a weight. Found on five seeds and one or two threads: at most
3e-7 of a loss or norm, at any step, and 1.2e-6 of a weight after ten."""


def twins():
    """(transformers' model, ours), with the same random weights."""
    return bert_twins("BertForPreTraining", vocab_size=BYTES.vocab_size, max_position_embeddings=CONTEXT,
                      pad_token_id=BYTES.roles.padding, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                      attn_implementation="eager")


def mixture_of(ours):
    config = Config(model=ours.config, objective=ObjectiveConfig(name="masked+next_sentence"))
    return make_objective(config, BYTES, split_of(DOCUMENTS)).at(0)


@pytest.fixture(scope="module")
def ours():
    """(steps, 3) masked loss, next-sentence loss and gradient norm of our training in uneven micro-batches, and the
    model after it."""
    _, model = twins()
    mixture, optimizers = mixture_of(model.train()), make_optimizers(model, OPTIM)
    scaler, records, row = torch.amp.GradScaler("cpu", enabled=False), [], 0
    for step in range(STEPS):
        batches = []
        for size in MICRO_BATCHES:
            batches += mixture.draw(row, size)
            row += size
        set_learning_rate(optimizers, schedule(step, STEPS, OPTIM))
        record = add_gradients(model, mixture, batches, scaler, nullcontext, torch.device("cpu"))
        record |= apply_gradients(record, optimizers, scaler, OPTIM.grad_clip)
        for optimizer in optimizers:
            optimizer.zero_grad()
        records.append([record[name] for name in ("masked", "next_sentence", "grad_norm")])
    return torch.tensor(records), model


def train_theirs(change=lambda inputs: None, optim=OPTIM, vector_decay=0.0):
    """The same of transformers' model in one batch a step, by torch's optimizer and schedule.

    `change` may change what the model is given.
    """
    model, ours = twins()
    mixture, records, size = mixture_of(ours), [], sum(MICRO_BATCHES)
    parameters = list(model.train().parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
         {"params": [p for p in parameters if p.dim() == 1], "weight_decay": vector_decay}],
        lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    warmup, rates = optim.warmup_steps, torch.optim.lr_scheduler
    scheduler = rates.SequentialLR(optimizer, [
        rates.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1),
        rates.CosineAnnealingLR(optimizer, T_max=STEPS - warmup)], milestones=[warmup])
    for step in range(STEPS):
        batch, = mixture.draw(step * size, size)
        inputs = dict(input_ids=batch.inputs, token_type_ids=batch.token_types, labels=batch.targets,
                      next_sentence_label=batch.labels,
                      attention_mask=(torch.arange(batch.inputs.shape[1]) < batch.lengths[:, None]).long())
        change(inputs)
        output = model(**inputs)
        output.loss.backward()                          # the mean masked loss and the mean next-sentence loss
        next_sentence = F.cross_entropy(output.seq_relationship_logits, inputs["next_sentence_label"]).item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, optim.grad_clip).item()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        records.append([output.loss.item() - next_sentence, next_sentence, norm])
    return torch.tensor(records), twin_of(model, ours.config)


def weights(model):
    """Without biases of keys: all scores of a query grow by the same, so their gradient is nothing but rounding."""
    return {name: value.unflatten(0, (3, -1))[[0, 2]] if name.endswith("qkv.bias") else value
            for name, value in model.named_parameters()}


def deviation(ours, theirs):
    """The largest of all losses, norms and weights, in tolerances."""
    (records, model), (expected, other) = ours, theirs
    steps, others = torch.arange(1, STEPS + 1), weights(other)
    apart = [((records - expected).abs() / expected / steps[:, None]).max()]
    apart += [(value - others[name]).abs().max() / STEPS for name, value in weights(model).items()]
    return max(apart).item() / TOLERANCE


def test_each_step_is_that_of_transformers(ours):
    assert deviation(ours, train_theirs()) <= 1
    (records, model), initial = ours, weights(twins()[1])
    assert records[-3:, 0].mean() < 0.95 * records[:3, 0].mean() and (records[:, 2] > OPTIM.grad_clip).all()
    for name, value in weights(model).items():
        assert (value - initial[name]).abs().median() > 20 * STEPS * TOLERANCE, name


def one_token_more(inputs):
    row, place = (inputs["labels"] == -100).logical_and(inputs["attention_mask"] == 1).nonzero()[0]
    inputs["labels"][row, place] = inputs["input_ids"][row, place]


def one_token_shown(inputs):
    row, place = (inputs["labels"] != -100).nonzero()[0]
    inputs["input_ids"][row, place] = inputs["labels"][row, place]


@pytest.mark.parametrize("otherwise", [
    dict(change=one_token_more), dict(change=one_token_shown),
    dict(change=lambda inputs: inputs.update(next_sentence_label=1 - inputs["next_sentence_label"])),
    dict(change=lambda inputs: inputs.pop("token_type_ids")), dict(change=lambda inputs: inputs.pop("attention_mask")),
    dict(optim=replace(OPTIM, grad_clip=1e9)), dict(optim=replace(OPTIM, warmup_steps=4)),
    dict(vector_decay=OPTIM.weight_decay),
], ids=["one token more to predict", "a hidden token shown", "labels the other way round", "no token types",
        "padding seen", "not clipped", "a longer warm-up", "decay of vectors"])
def test_what_differs_is_far_beyond_the_tolerance(otherwise, ours):
    assert deviation(ours, train_theirs(**otherwise)) > 50
