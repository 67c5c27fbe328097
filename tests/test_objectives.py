"""Objectives: what is predicted and scored, that accumulated micro-batches equal one big batch, and evaluation.

Evaluation is compared with a model run token by token in float64, each byte of the text scored once.
"""

import copy
import dataclasses
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from compare import assert_close, largest_error
from twins import random_model

from minigpt.config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from minigpt.data import in_order
from minigpt.evaluate import Stopped, evaluate
from minigpt.objectives import IGNORED, CausalLM, make_objective
from minigpt.shards import Split
from minigpt.tokenizer import FIRST_BYTE, SPECIAL_TOKENS, Tokenizer
from minigpt.update import add_gradients, apply_gradients

TOKENIZER = Tokenizer("bytes")
START, PAD, MASK = (SPECIAL_TOKENS[name] for name in ("<s>", "<pad>", "<mask>"))
T = 16


def objective(name, seed=1, document_mask=False, **settings):
    """The task of an objective of one part."""
    task, = make_objective(Config(
        data=DataConfig(document_mask=document_mask), train=TrainConfig(seed=seed),
        model=ModelConfig(context_length=T), objective=ObjectiveConfig(name=name, **settings)), TOKENIZER).at(0).tasks
    return task


def text_rows(B, length=T, special=0.0, seed=0):
    """(B, length) of random text tokens, each a special one with some probability."""
    random = np.random.default_rng(seed)
    rows = random.integers(FIRST_BYTE, TOKENIZER.vocab_size, (B, length))
    return np.where(random.random(rows.shape) < special, random.integers(0, FIRST_BYTE, rows.shape), rows)


def test_causal_targets_are_the_next_tokens():
    rows = text_rows(3, T + 1, special=0.2)
    batch = objective("causal").batch(rows, 0)
    assert np.array_equal(batch.inputs, rows[:, :-1]) and np.array_equal(batch.targets, rows[:, 1:])
    assert batch.document_ids is None
    assert objective("causal").counts(batch) == {"causal": 3 * T}


def test_causal_evaluation_scores_text_only():
    rows = text_rows(3, T + 1, special=0.2)
    batch = objective("causal").batch(rows, 0, training=False)
    assert np.array_equal(batch.inputs, rows[:, :-1])
    assert np.array_equal(batch.targets, np.where(rows[:, 1:] < FIRST_BYTE, IGNORED, rows[:, 1:]))
    assert objective("causal").counts(batch) == {"causal": int((rows[:, 1:] >= FIRST_BYTE).sum())}
    assert 0 < (batch.targets == IGNORED).sum() < batch.targets.numel()


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_document_ids_count_the_starts(name):
    rows = text_rows(2, 7)
    rows[0, [0, 3]] = START
    rows[1, 6] = START
    ids = objective(name, document_mask=True).batch(rows, 0).document_ids
    expected = [[1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 1]]
    assert ids.tolist() == [row[:ids.shape[1]] for row in expected]


def within(count, n, p):
    """Whether a count is within 5 standard deviations of n p."""
    return abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_masked_proportions(probability):
    """15 % of text is chosen unless told otherwise; of these 80 % become <mask>, 10 % a random token, 10 % stay."""
    rows = text_rows(400, 256, special=0.1)
    settings = {} if probability == 0.15 else {"mask_probability": probability}
    batch = objective("masked", **settings).batch(rows, 0)
    inputs, targets = batch.inputs.numpy(), batch.targets.numpy()
    chosen = targets != IGNORED
    n = int(chosen.sum())
    assert within(n, int((rows >= FIRST_BYTE).sum()), probability)
    assert np.array_equal(targets[chosen], rows[chosen])
    assert np.array_equal(inputs[~chosen], rows[~chosen])
    assert (rows[chosen] >= FIRST_BYTE).all(), "a special token was chosen"
    masked, kept = chosen & (inputs == MASK), chosen & (inputs == rows)
    other = inputs[chosen & ~masked & ~kept]
    assert within(masked.sum(), n, 0.8) and within(kept.sum(), n, 0.1 + 0.1 / 256)
    assert within(len(other), n, 0.1 * 255 / 256)
    assert other.min() >= FIRST_BYTE
    counts = np.bincount(other - FIRST_BYTE, minlength=256)
    chi_squared = ((counts - len(other) / 256) ** 2 / (len(other) / 256)).sum()
    assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)
    assert objective("masked").counts(batch) == {"masked": n}


def test_masks_are_a_function_of_seed_and_row_number():
    rows = np.repeat(text_rows(1, 64), 8, axis=0)
    whole = objective("masked").batch(rows, 40)
    for first, count in ((0, 1), (3, 5), (7, 1)):
        part = objective("masked").batch(rows[first:first + count], 40 + first)
        assert torch.equal(part.inputs, whole.inputs[first:first + count])
        assert torch.equal(part.targets, whole.targets[first:first + count])
    patterns = {tuple((row != IGNORED).tolist()) for row in whole.targets}
    patterns |= {tuple((row != IGNORED).tolist()) for row in objective("masked", seed=2).batch(rows, 40).targets}
    patterns |= {tuple((row != IGNORED).tolist()) for row in objective("masked").batch(rows, 40, False).targets}
    assert len(patterns) == 24, "the eight rows, another seed and evaluation must not share a mask"


def test_rows_are_not_written_to():
    rows = text_rows(4, T + 1, special=0.2)
    before = rows.copy()
    for name in ("causal", "masked"):
        for training in (True, False):
            objective(name).batch(rows, 0, training)
    assert np.array_equal(rows, before)


def small_model(seed=0, **settings):
    return random_model(seed, vocab_size=TOKENIZER.vocab_size, context_length=T, **settings)


def update(name, splits, clip=0.0):
    """(change of every weight, result) of one step of plain gradient descent on 8 rows, split into micro-batches."""
    task, model = objective(name), small_model()
    before = [p.detach().clone() for p in model.parameters()]
    rows = text_rows(8, T + task.extra)
    rows[:5, :T - 2] = PAD                              # masked: the first rows have little to predict
    batches = [task.batch(rows[first:last], 100 + first) for first, last in splits]
    counts = [task.counts(batch)[name] for batch in batches]
    scaler, optimizers = torch.amp.GradScaler("cpu", enabled=False), [torch.optim.SGD(model.parameters(), lr=1.0)]
    result = add_gradients(model, task, batches, scaler, nullcontext, torch.device("cpu"))
    result |= apply_gradients(result, optimizers, scaler, clip)
    return [before - after.detach() for before, after in zip(before, model.parameters())], result, counts


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("splits", [[(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 5), (5, 8)], [(0, 7), (7, 8)]], ids=str)
@pytest.mark.parametrize("name", ["causal", "masked"])
def test_micro_batches_equal_one_big_batch(name, splits, clip):
    big, big_result, _ = update(name, [(0, 8)], clip)
    small, small_result, counts = update(name, splits, clip)
    assert len(set(counts)) > 1 or name == "causal", "the counts must be uneven for the test to tell"
    for number, pair in enumerate(zip(small, big)):
        assert_close(*pair, 1e-4, f"parameter {number}")
    assert small_result == pytest.approx(big_result, rel=1e-5) and big_result["grad_norm"] > 2 * clip


def test_micro_batches_are_not_averaged_one_by_one():
    """The comparison above can fail: the mean of the means of uneven micro-batches is another gradient."""
    big, _, _ = update("masked", [(0, 8)])
    halves = [update("masked", [split])[0] for split in ((0, 5), (5, 8))]
    naive = [(one + two) / 2 for one, two in zip(*halves)]
    assert max(largest_error(*pair) for pair in zip(naive, big)) > 0.1


def test_nothing_chosen_is_a_loss_of_zero():
    task, model = objective("masked"), small_model()
    batch = task.batch(np.full((2, T), PAD), 0)
    loss = task.losses(model, batch)["masked"]
    loss.backward()
    assert task.counts(batch) == {"masked": 0} and loss == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_masked_loss_is_the_cross_entropy_of_the_chosen():
    task, model = objective("masked"), small_model()
    batch = task.batch(text_rows(4), 0)
    logits = model(batch.inputs, causal=False).double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED,
                                             reduction="sum")
    assert_close(task.losses(model, batch)["masked"], loss, 1e-6)


def split_of(texts, shard=10):
    """Documents as a Split with shards of a few tokens."""
    documents = [[START, *TOKENIZER.encode(text)] for text in texts]
    tokens = np.array(sum(documents, []), np.uint16)
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    return Split([tokens[i:i + shard] for i in range(0, len(tokens), shard)], starts,
                 sum(len(text.encode()) for text in texts))


TEXTS = ["Whither away, my love?\n", "é", "", "To the forest of Arden, where the old dukes dwell; 12 miles: 日本."]


def naive_nats(model, split):
    """{position: nats} token by token in float64, each with the tokens before it in its window of T as context."""
    model = copy.deepcopy(model).double().eval()
    tokens = torch.from_numpy(split.read(0, len(split)))
    nats = {}
    with torch.no_grad():
        for position in range(1, len(tokens)):
            window = (position - 1) // T * T
            hidden = model.hidden(tokens[None, window:position])[0, -1]
            if tokens[position] >= FIRST_BYTE:
                nats[position] = -model.head(hidden).log_softmax(-1)[tokens[position]].item()
    return nats


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], ["a"], ["x" * 15], ["x" * 16], ["x" * 17], ["x" * 32]],
                         ids=["several", "one", "short", "15", "16", "17", "32"])
def test_bits_per_byte_are_those_of_the_text_scored_token_by_token(texts):
    model, split = small_model(dropout=0.3).train(), split_of(texts)
    nats = naive_nats(model, split)
    assert len(nats) == split.num_bytes
    for batch_size in (1, 3):
        result = evaluate(model, objective("causal"), split, batch_size=batch_size, autocast=nullcontext)
        assert result.keys() == {"val_loss", "val_causal", "val_bpb"} and result["val_causal"] == result["val_loss"]
        assert result["val_bpb"] == pytest.approx(sum(nats.values()) / math.log(2) / split.num_bytes, rel=1e-6)
        assert result["val_loss"] == pytest.approx(sum(nats.values()) / len(nats), rel=1e-6)
    assert model.training


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_byte_is_scored_once(kind, text_file):
    text = text_file.read_text("utf-8")[:5000]
    tokenizer = TOKENIZER if kind == "bytes" else Tokenizer.train([text], vocab_size=400)
    config = Config(objective=ObjectiveConfig(name="causal"))
    tokens = np.array([START, *tokenizer.encode(text)])
    scored = b""
    for rows in in_order(Split([tokens], np.array([0]), len(text)), T, 1, 3, PAD):
        targets = CausalLM(config, tokenizer).batch(rows, 0, training=False).targets
        scored += tokenizer.decode_bytes(targets[targets != IGNORED].tolist())
    assert scored == text.encode()


def test_masked_evaluation_does_not_see_the_padding():
    """Regression: text in the last row attended to the <pad> tokens behind it."""
    model, split, task = small_model(), split_of(TEXTS), objective("masked", mask_probability=0.5)
    assert len(split) % T
    total, count = 0.0, 0
    for number, start in enumerate(range(0, len(split), T)):
        row = np.full((1, T), PAD)
        length = min(T, len(split) - start)
        row[0, :length] = split.read(start, start + length)
        batch = dataclasses.replace(task.batch(row, number, training=False), document_ids=None)
        batch = dataclasses.replace(batch, inputs=batch.inputs[:, :length], targets=batch.targets[:, :length])
        total += task.losses(model, batch)["masked"].item()
        count += task.counts(batch)["masked"]
    for batch_size in (1, 2, 100):
        result = evaluate(model, task, split, batch_size=batch_size, autocast=nullcontext)
        assert 0 <= result.pop("val_masked_accuracy") < 1
        assert result == dict.fromkeys(["val_loss", "val_masked"], pytest.approx(total / count, rel=1e-5))


def test_padding_is_hidden_beside_documents():
    rows = text_rows(2, 8)
    rows[:, 4] = START
    rows[1, 6:] = PAD
    ids = objective("masked", document_mask=True).batch(rows, 0, training=False).document_ids
    assert ids.tolist() == [[0] * 4 + [1] * 4, [0] * 4 + [1] * 2 + [-1] * 2]


def test_an_evaluation_that_is_told_to_stop_leaves_the_model_in_training():
    model, answers = small_model().train(), iter([False, False, True])
    with pytest.raises(Stopped):
        evaluate(model, objective("causal"), split_of(TEXTS), batch_size=1, autocast=nullcontext,
                 should_stop=lambda: next(answers))
    assert model.training
