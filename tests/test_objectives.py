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
from minigpt.labelled import Row
from minigpt.labelled import split_of as split_of_rows
from minigpt.masking import IGNORED, Words
from minigpt.objectives import CausalLM, make_objective
from minigpt.shards import Split
from minigpt.tokenizer import FIRST_BYTE, SPECIAL_TOKENS, Tokenizer
from minigpt.update import add_gradients, apply_gradients

TOKENIZER = Tokenizer("bytes")
START, END, PAD, MASK = (SPECIAL_TOKENS[name] for name in ("<s>", "</s>", "<pad>", "<mask>"))
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


@pytest.mark.parametrize("text, words", [
    ("the cat, sat", ["the", " cat", ",", " sat"]), ("don't stop.\n\nNow", ["don", "'", "t", " stop", ".", "\n\nNow"]),
    ("今天 rain下雨", ["今", "天", " rain", "下", "雨"]), ("naïve café №5", ["naïve", " café", " №", "5"]),
    ("  a", ["  a"]), ("snake_case x=1", ["snake_case", " x", "=", "1"]),
])
def test_whole_words(text, words):
    """Tokens of a word have one number; a Chinese character is a word, and spaces may go with what follows."""
    row = np.array(TOKENIZER.encode(text))
    units = Words(TOKENIZER)(row)
    letters = [TOKENIZER.token_bytes[token].strip() for token in row]
    found = {}
    for unit, letter in zip(units, letters):
        found[unit] = found.get(unit, b"") + letter
    assert [word for word in found.values() if word] == [word.strip().encode() for word in words]


def test_words_of_a_row_that_begins_within_a_character():
    row = np.array(TOKENIZER.encode("é日 ab")[1:])
    assert len(Words(TOKENIZER)(row)) == len(row)
    row = np.array([START, *TOKENIZER.encode("ab"), START, *TOKENIZER.encode("ab"), PAD, PAD])
    units = Words(TOKENIZER)(row)
    assert len(set(units[[0, 3, 6, 7]])) == 4 and units[1] == units[2]
    row = np.array([START, *TOKENIZER.encode("ab"), END, *TOKENIZER.encode("cd")])
    units = Words(TOKENIZER)(row)
    assert units[1] == units[2] != units[4] == units[5], "a special token parts words"


@pytest.mark.parametrize("probability", [0.15, 0.4])
@pytest.mark.parametrize("unit", ["word", "span"])
def test_words_and_spans_are_chosen_as_a_whole(unit, probability):
    text = "the quick brown fox jumped over a lazy dog and then it was seen no more. " * 60
    rows = np.array(TOKENIZER.encode(text)[:4096]).reshape(16, 256)
    rows[:, 100] = START
    batch = objective("masked", mask_unit=unit, mask_probability=probability).batch(rows, 0)
    inputs, chosen = batch.inputs.numpy(), batch.targets.numpy() != IGNORED
    n = (rows != START).sum()
    assert abs(chosen.sum() / n - probability) < 5 * math.sqrt(probability * (1 - probability) * 6 / n)
    assert not chosen[rows == START].any()
    if unit == "word":
        for row, picked in zip(rows, chosen):
            units = Words(TOKENIZER)(row)
            letters = row != TOKENIZER.encode(" ")[0]
            assert all(len(set(picked[(units == one) & letters].tolist())) <= 1 for one in np.unique(units))
        return
    runs, fates = [], []
    for shown, picked in zip(inputs, chosen):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], picked, [0]])))
        for start, stop in edges.reshape(-1, 2):
            runs.append(stop - start)
            fates.append((shown[start:stop] == MASK).mean())
    if probability < 0.2:                               # of spans side by side there are few
        assert 3 < np.mean(runs) < 6 and np.mean([fate in (0, 1) for fate in fates]) > 0.85
    assert max(runs) > 5


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


WORDS = "ab cde fg hijk lmn op".split()


def labelled_texts(n=24, seed=0):
    """Texts of 2 to 9 short sentences in three classes, one of them rare: what every objective can learn from."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        words = random.choice(WORDS, (random.integers(2, 10), 2))
        sentences = [f"{first.capitalize()} {second}." for first, second in words]
        rows.append(Row((" ".join(sentences),), "abb"[number % 3] if number % 5 else "c", f"table:{number}"))
    return split_of_rows(rows, ["a", "b", "c"], TOKENIZER, "the table")


EVERY = ["causal", "masked", "next_sentence", "masked+next_sentence:0.5", "classification",
         "causal+masked:0.3+next_sentence:0.2", "classification+masked:0.5+next_sentence:0.1"]
LONG = 32


def update(name, splits, clip=0.0):
    """(change of every weight, result) of one step of plain gradient descent on 8 rows, split into micro-batches."""
    mixture, model = mixture_of(name), pooled_model()
    before = [p.detach().clone() for p in model.parameters()]
    batches = [batch for first, last in splits for batch in mixture.draw(100 + first, last - first)]
    scaler, optimizers = torch.amp.GradScaler("cpu", enabled=False), [torch.optim.SGD(model.parameters(), lr=1.0)]
    result = add_gradients(model, mixture, batches, scaler, nullcontext, torch.device("cpu"))
    result |= apply_gradients(result, optimizers, scaler, clip)
    counts = [tuple(mixture.counts(batch).values()) for batch in batches]
    return [before - after.detach() for before, after in zip(before, model.parameters())], result, counts


def mixture_of(name, **settings):
    """What is trained at first, on `labelled_texts`."""
    config = Config(data=DataConfig(document_mask=True), model=ModelConfig(context_length=LONG),
                    objective=ObjectiveConfig(name=name, class_weights="balanced", classes=["a", "b", "c"], **settings))
    return make_objective(config, TOKENIZER, labelled_texts()).at(0)


def pooled_model(**settings):
    return random_model(0, vocab_size=TOKENIZER.vocab_size, context_length=LONG, next_sentence=True, token_types=2,
                        num_classes=3, **settings)


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("splits", [[(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 5), (5, 8)], [(0, 7), (7, 8)]], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_micro_batches_equal_one_big_batch(name, splits, clip):
    big, big_result, _ = update(name, [(0, 8)], clip)
    small, small_result, counts = update(name, splits, clip)
    assert len(set(counts)) > 1 or name == "causal" or len({last - first for first, last in splits}) == 1, (
        "the counts must be uneven for the test to tell")
    for number, pair in enumerate(zip(small, big)):
        assert_close(*pair, 2e-4, f"parameter {number}")
    assert small_result == pytest.approx(big_result, rel=1e-5) and big_result["grad_norm"] > 2 * clip
    assert big_result.keys() == {"train_loss", "grad_norm", *mixture_of(name).weights}


@pytest.mark.parametrize("name", ["masked", "classification", EVERY[-1]])
def test_micro_batches_are_not_averaged_one_by_one(name):
    """The comparison above can fail: the mean of the means of uneven micro-batches is another gradient."""
    big, _, _ = update(name, [(0, 8)])
    halves = [update(name, [split])[0] for split in ((0, 7), (7, 8))]
    naive = [(one + two) / 2 for one, two in zip(*halves)]
    assert max(largest_error(*pair) for pair in zip(naive, big) if pair[1].any()) > 0.1


def on_a_rank(rank, folder, names):
    """The gradients of the rows of one of two processes, averaged over both as DistributedDataParallel does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for name in names:
        mixture, model = mixture_of(name), pooled_model()
        first, last = ((0, 5), (5, 8))[rank]
        batches = [batch for row in range(first, last, 2) for batch in mixture.draw(100 + row, min(2, last - row))]
        result = add_gradients(model, mixture, batches, torch.amp.GradScaler("cpu", enabled=False), nullcontext,
                               torch.device("cpu"))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.distributed.all_reduce(parameter.grad)
        found[name] = [parameter.grad / 2 for parameter in model.parameters()], result
    torch.distributed.destroy_process_group()
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.mark.serial
def test_two_ranks_equal_one_big_batch(tmp_path):
    """Rows 0 to 4 in one process and 5 to 7 in another, in micro-batches of two, for every objective."""
    torch.multiprocessing.spawn(on_a_rank, (str(tmp_path), EVERY), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in EVERY:
        wanted, wanted_result, _ = update(name, [(0, 8)])
        for gradients, result in (found[name] for found in ranks):
            for number, pair in enumerate(zip(gradients, wanted)):
                assert_close(*pair, 2e-4, f"{name}, parameter {number}")
            assert result == pytest.approx({key: wanted_result[key] for key in result}, rel=1e-5)


def test_each_part_is_logged_and_weighed():
    _, result, _ = update(EVERY[-1], [(0, 8)])
    assert result["train_loss"] == pytest.approx(
        result["classification"] + 0.5 * result["masked"] + 0.1 * result["next_sentence"])
    assert len({round(result[part], 3) for part in ("classification", "masked", "next_sentence")}) == 3


def test_an_objective_changes_at_its_steps():
    config = Config(model=ModelConfig(context_length=LONG), objective=ObjectiveConfig(
        name="masked,causal:2+masked@5,causal+next_sentence@9"))
    objective = make_objective(config, TOKENIZER, labelled_texts())
    parts = [set(objective.at(step).weights) for step in (0, 4, 5, 8, 9, 1000)]
    assert parts == [{"masked"}] * 2 + [{"causal", "masked"}] * 2 + [{"causal", "next_sentence"}] * 2
    assert objective.at(5).weights == {"causal": 2, "masked": 1}
    assert objective.evaluated.weights == {"causal": 1, "next_sentence": 1, "masked": 0}
    found = evaluate(pooled_model(), objective.evaluated, labelled_texts(seed=1), batch_size=4, autocast=nullcontext)
    assert found["val_loss"] == pytest.approx(found["val_causal"] + found["val_next_sentence"])
    assert found["val_masked"] > 0 and found["val_bpb"] > 0 and 0 < found["val_next_sentence_accuracy"] < 1


def test_a_pair_becomes_a_row():
    """<s> A </s> B </s>, token types 1 from B on, label 1 where B is a random one."""
    task = mixture_of("next_sentence").tasks[0]
    batch = task.batch([(np.array([10, 11, 12]), np.array([13]), True), (np.array([20]), np.array([21]), False)], 0)
    assert batch.inputs.tolist() == [[START, 10, 11, 12, END, 13, END], [START, 20, END, 21, END, PAD, PAD]]
    assert batch.token_types.tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0]]
    assert batch.document_ids.tolist() == [[0] * 7, [0] * 5 + [-1] * 2]
    assert batch.lengths.tolist() == [7, 5] and batch.labels.tolist() == [1, 0]


def test_next_sentence_and_masked_share_a_row_and_special_tokens_are_never_hidden():
    task = mixture_of("masked+next_sentence", mask_probability=0.9).tasks[0]
    batch, plain = task.draw(0, 8)[0], mixture_of("next_sentence").tasks[0].draw(0, 8)[0]
    chosen = batch.targets != IGNORED
    assert torch.equal(torch.where(chosen, batch.targets, batch.inputs), plain.inputs)
    special = plain.inputs < FIRST_BYTE
    assert not (chosen & special).any() and chosen[~special].float().mean() > 0.8
    assert torch.equal(batch.labels, plain.labels)


def test_masks_do_not_depend_on_the_padding():
    """Regression: rows as long as the longest beside them drew other masks than alone."""
    task = mixture_of("masked+next_sentence", mask_unit="span", mask_probability=0.5).tasks[0]
    whole, padded = task.draw(0, 64)[0], 0
    for number in range(64):
        alone = task.draw(number, 1)[0]
        length = int(alone.lengths[0])
        padded += length < whole.inputs.shape[1]
        assert torch.equal(alone.inputs[0], whole.inputs[number, :length])
        assert torch.equal(alone.targets[0], whole.targets[number, :length])
    assert padded > 3


def test_what_counts_as_a_right_answer():
    """Accuracies are of the logits' largest, by hand."""
    model, mixture = pooled_model(), mixture_of("masked+next_sentence")
    found = evaluate(model, mixture, labelled_texts(), batch_size=5, autocast=nullcontext)
    hits, pairs = [], []
    for batch in mixture.in_order(labelled_texts(), 1):
        hidden = model.hidden(batch.inputs, causal=False, token_types=batch.token_types)
        chosen = batch.targets != IGNORED
        hits += (model.head(hidden)[chosen].argmax(-1) == batch.targets[chosen]).tolist()
        logits = model.next_sentence(torch.tanh(model.pooler.dense(hidden[:, 0])))
        pairs += (logits.argmax(-1) == batch.labels).tolist()
    assert found["val_masked_accuracy"] == pytest.approx(np.mean(hits)) and len(hits) > 50
    assert found["val_next_sentence_accuracy"] == pytest.approx(np.mean(pairs)) and 0 < np.mean(pairs) < 1


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_what_the_pooler_reads(pooling):
    """Of rows of 3 and 5 tokens, whatever stands in the padding."""
    model, hidden = pooled_model(pooling=pooling), torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    hidden[0, 3:] = 1e6
    read = {"first": lambda row, length: row[0], "last": lambda row, length: row[length - 1],
            "mean": lambda row, length: row[:length].mean(0)}[pooling]
    for number, length in enumerate((3, 5)):
        pooled = model.pooler.dense(read(hidden[number], length)).tanh()
        for logits, head in ((model.class_logits, model.classifier), (model.next_sentence_logits, model.next_sentence)):
            assert_close(logits(hidden, torch.tensor([3, 5]))[number], head(pooled), 1e-4)


@pytest.mark.parametrize("name, settings, message", [
    ("masked+next_sentence", dict(pooling="last"), "model.pooling = last makes attention causal"),
    ("next_sentence", dict(token_types=1), "model.token_types = 1 tells no two texts apart"),
    ("next_sentence", dict(context_length=4), "model.context_length = 4 has no room for two sentences"),
    ("classification", dict(context_length=3), "model.context_length = 3 is too small for a text"),
])
def test_a_model_that_cannot_serve_is_refused(name, settings, message):
    config = Config(model=ModelConfig(**settings), objective=ObjectiveConfig(name=name))
    with pytest.raises(ValueError, match=message):
        make_objective(config, TOKENIZER, labelled_texts())


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
