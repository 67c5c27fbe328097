"""Fine-tuned classifiers, their probabilities, vectors of texts and missing words: each against numbers by hand."""

import csv
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from sklearn import metrics
from test_cli import fails
from test_training import metrics_of, run_lines, saved_steps
from tiny import WORDS, make_text, tiny_config
from twins import random_model

import minigpt
from minigpt import checkpoint, cli, training
from minigpt.classify import classify, classify_table, embed, fill
from minigpt.config import Config, ObjectiveConfig
from minigpt.engine import Run
from minigpt.labelled import Row, read_table, split_of
from minigpt.tokenizer import Roles, Tokenizer

BYTES, BPE = Tokenizer("bytes"), Tokenizer.train([make_text(300)], 300)
START, END, MASK = (BYTES.special_tokens[name] for name in ("<s>", "</s>", "<mask>"))
T = 16
QUICK = ["--train.dtype=float32", "--train.eval_every=1000", "--train.checkpoint_every=1000", "--train.batch_size=16",
         "--train.max_steps=40", "--train.log_every=10", "--optim.learning_rate=0.01"]


def write_table(path, names, rows, seed):
    random.Random(seed).shuffle(rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def themes(seed):
    """60, 30 and 15 texts, each class with words of its own but for every fifth; 7 are longer than the context."""
    chance = random.Random(seed)
    for number, (label, size) in enumerate((("-1", 60), ("b", 30), ("a", 15))):
        for place in range(size):
            own, length = WORDS[7 * number:7 * number + 6], 40 if place % 15 == 14 else 6
            yield " ".join(chance.choice(WORDS if i % 5 == 4 else own) for i in range(length)), label


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file):
    """Tables, and for each objective of a language model a short run to start from."""
    folder = tmp_path_factory.mktemp("classify")
    for seed, name in enumerate(("train", "val")):
        write_table(folder / f"{name}.csv", ("text", "label"), [*themes(seed)], seed)
        write_table(folder / f"pairs-{name}.csv", ("one", "other", "label"), 3 * [
            (one, other, "yes" if one == other else "no") for one in "pqrs" for other in f"pqrs{one}{one}"], seed)
    for name in ("causal", "masked"):
        (folder / name).mkdir()
        run_lines(tiny_config(folder / name, text_file, f"--objective.name={name}", *QUICK, "--train.max_steps=10"))
    return folder


def tuned(folder, name, *overrides, **options):
    """(config, what was said) of a run on the table."""
    (folder / name).mkdir(exist_ok=True)
    config = tiny_config(folder / name, folder / "train.csv", f"--data.val_path={folder}/val.csv", *QUICK,
                         "--objective.name=classification", *overrides)
    return config, run_lines(config, **options)[1]


@pytest.fixture(scope="module")
def windowed(folder):
    """From a masked start, which it goes on to learn; of long texts all pieces are read."""
    return tuned(folder, "windowed", f"--train.start_from={folder}/masked/run", "--data.long_texts=window",
                 "--objective.name=classification+masked:0.2", "--objective.class_weights=balanced",
                 '--objective.classes=["b", "a", "-1"]')


@pytest.fixture(scope="module")
def causal(folder):
    """From a causal start; of long texts the beginnings are read."""
    return tuned(folder, "truncated", f"--train.start_from={folder}/causal/run")


@pytest.fixture(scope="module")
def pairs(folder):
    """From no start: whether two texts are the same word."""
    return tuned(folder, "pairs", f"--data.path={folder}/pairs-train.csv", f"--data.val_path={folder}/pairs-val.csv",
                 '--data.text_columns=["one", "other"]', "--tokenizer.kind=bytes", "--train.max_steps=80")


@pytest.mark.parametrize("name", ["windowed", "causal", "pairs"])
def test_it_learns_and_measures_as_scikit_learn(name, request):
    """Far above the commonest class, and the last evaluation is that of the checkpoint's own predictions."""
    config, lines = request.getfixturevalue(name)
    last = metrics_of(config)[-1]
    labels, probabilities = classify_table(minigpt.load(config.train.run_dir), config.data.val_path)
    predicted = probabilities.argmax(1)
    assert last["val_accuracy"] > 0.9 > 0.6 > np.bincount(labels).max() / len(labels)
    assert last["val_accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    for average in ("macro", "weighted"):
        assert last[f"val_{average}_f1"] == pytest.approx(metrics.f1_score(labels, predicted, average=average))
    assert last["val_loss"] == pytest.approx(last["val_classification"] + 0.2 * last.get("val_masked", 0))
    assert f", accuracy {last['val_accuracy']:.4f}, macro f1 {last['val_macro_f1']:.4f}, " in lines[-1]


def test_what_is_begun_with(folder, windowed, causal, pairs):
    """Tokenizer and pooling are those of the start, and new heads and texts beyond the context are told of."""
    for (config, lines), start, pooling, said, classes in (
            (windowed, "masked", "first", "all their pieces are", ["b", "a", "-1"]),
            (causal, "causal", "last", "their beginnings are", ["-1", "a", "b"])):
        before, run = checkpoint.find(folder / start / "run"), minigpt.load(config.train.run_dir)
        assert run.model.config.pooling == pooling and run.tokenizer.fingerprint == before.tokenizer.fingerprint
        assert run.config.objective.classes == classes
        assert lines[:3] == [f"{folder}/train.csv ({name} split): 7 of 105 texts do not fit the context of 32 tokens; "
                             f"{said} read (data.long_texts)" for name in ("train", "val")] + [
            f"starting from {before.path}; new are pooler.dense.weight, pooler.dense.bias, classifier.weight, "
            "classifier.bias"]
    assert not any("do not fit" in line or "starting" in line for line in pairs[1])


def test_resumed_equals_straight_through(folder, tmp_path, monkeypatch):
    """Weights, optimizers and numbers of a run that was killed in its sixth step, bit by bit."""
    ends, step = [], training.Trainer.step
    for name in ("straight", "killed"):
        options = ["--objective.name=classification+masked:0.2", "--train.max_steps=8", "--train.checkpoint_every=3",
                   f"--train.start_from={folder}/masked/run", "--model.dropout=0.1", "--train.log_every=1",
                   f"--train.run_dir={tmp_path}/{name}"]
        if name == "killed":
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr(training.Trainer, "step", lambda self: 1 / (self.state.step < 5) and step(self))
                tuned(folder, "resumed", *options)
            assert saved_steps(tmp_path / name) == [3]
        config, _ = tuned(folder, "resumed", *options, resume=name == "killed")
        records = [{key: value for key, value in record.items() if key not in ("elapsed_seconds", "tokens_per_second")}
                   for record in metrics_of(config)]
        end = tmp_path / name / "checkpoints/step-00000008"
        ends.append([records, *((end / f"{part}.safetensors").read_bytes() for part in ("model", "optimizer"))])
    assert ends[0] == ends[1] and len(ends[0][0]) == 8
    with pytest.raises(ValueError, match="the text or the tokenizer at .* is not the one this run began with"):
        tuned(folder, "resumed", *options, "--train.max_steps=9", f"--data.path={folder}/val.csv", resume=True)


def test_the_best_macro_f1_is_kept_and_ends_a_run(folder, monkeypatch):
    """The highest, not the last nor that of the least loss; as high again is no better."""
    numbers = iter([(3.0, 0.2), (2.0, 0.6), (1.0, 0.5), (0.9, 0.6), (0.8, 0.9)])
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: dict(zip(("val_loss", "val_macro_f1"), next(numbers))))
    config, _ = tuned(folder, "best", "--train.best_by=val_macro_f1", "--train.early_stopping=2",
                      "--train.eval_every=2", "--train.keep_last=1")
    assert saved_steps(Path(config.train.run_dir)) == [4, 8]
    loop = checkpoint.find(config.train.run_dir).state["loop"]
    assert (loop["best"], loop["best_step"], loop["step"]) == (0.6, 4, 8)
    with pytest.raises(ValueError, match="train.best_by = 'val_bpb' is nothing that an evaluation gives here: val_loss,"
                       " val_classification, val_accuracy, val_macro_f1, val_weighted_f1"):
        tuned(folder, "other", "--train.best_by=val_bpb")


def output(capsys, *arguments):
    capsys.readouterr()
    cli.main(list(map(str, arguments)))
    return capsys.readouterr().out.splitlines()


def test_the_command_classify(windowed, tmp_path, capsys):
    """Of a table the probabilities are those of the evaluation; they sum to 1, and the label is the likeliest."""
    run, table, names = windowed[0].train.run_dir, windowed[0].data.val_path, ["b", "a", "-1"]
    _, wanted = classify_table(minigpt.load(run), table, 7)
    texts = [text for row in read_table(table, ["text"], None) for text in row.texts]
    (tmp_path / "t.txt").write_text("\r\n".join(texts), "utf-8")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    for arguments in (["--file", table], ["--file", tmp_path / "t.txt"], ["--text", *texts[:9], "--text", *texts[9:]],
                      ["--file", tmp_path / "t.jsonl", "--batch-size=3"], ["--text", *texts[:9], "--file", table]):
        rows = [json.loads(line) for line in output(capsys, "classify", run, *arguments, "--json")][-len(texts):]
        found = np.array([[row["probabilities"][name] for name in names] for row in rows])
        assert [row["text"] for row in rows] == texts and [*rows[0]["probabilities"]] == names
        assert np.abs(found - wanted).max() < 1e-5 and np.abs(found.sum(1) - 1).max() < 1e-6
        assert [row["label"] for row in rows] == [names[best] for best in found.argmax(1)]
    lines = output(capsys, "classify", run, "--text", "a\tb", "--file", table)
    for row, text, line in zip(rows, texts, lines[1:], strict=True):
        assert line == f"{row['probabilities'][row['label']]:.4f}  {row['label']}  {text[:80]}{'…' * (len(text) > 80)}"
    assert lines[0].endswith(r"  a\tb")


def test_the_command_classifies_pairs(pairs, tmp_path, capsys):
    """From the command line and from a table, and what is no pair is refused; embed takes the first of each."""
    run = pairs[0].train.run_dir
    (tmp_path / "t.jsonl").write_text('{"other": "q", "one": "p"}\n{"other": "s", "one": "s"}\n', "utf-8")
    for arguments in (["--text", "p", "q", "--text", "s", "s"], ["--file", tmp_path / "t.jsonl"]):
        rows = [json.loads(line) for line in output(capsys, "classify", run, *arguments, "--json")]
        assert [(row["text"], row["label"]) for row in rows] == [(["p", "q"], "no"), (["s", "s"], "yes")]
    assert output(capsys, "classify", run, "--text", "p", "q")[0].endswith("  no  p | q")
    vectors = output(capsys, "embed", run, "--text", "p", "q", "--file", tmp_path / "t.jsonl")
    assert [json.loads(line)["text"] for line in vectors] == ["p", "q", "p", "s"]
    (tmp_path / "t.txt").write_text("p\n", "utf-8")
    for arguments in (["--text", "p"], ["--text", "p", "q", "p"], ["--file", str(tmp_path / "t.txt")]):
        assert "text 1: the model was trained on one and other, so give a pair" in fails(
            capsys, cli.classify, run, *arguments)


def test_the_report_of_the_command_eval(causal, tmp_path, capsys):
    """Its numbers are the training's, and its page holds them."""
    run, table, last = causal[0].train.run_dir, causal[0].data.val_path, metrics_of(causal[0])[-1]
    line, = output(capsys, "eval", run, "--labelled", table, "--json", "--html", tmp_path / "r.html")
    found = json.loads(line)["labelled"]
    assert [found["accuracy"], found["macro"]["f1"]] == pytest.approx([last["val_accuracy"], last["val_macro_f1"]])
    assert [(row["name"], row["support"]) for row in found["classes"]] == [("-1", 60), ("a", 15), ("b", 30)]
    for text in ("\n".join(output(capsys, "eval", run, "--labelled", table)), (tmp_path / "r.html").read_text("utf-8")):
        assert f"{run} on {table}" in text and f"{found['accuracy']:.4f}" in text


def test_what_the_commands_refuse(folder, windowed, tmp_path, capsys, monkeypatch):
    """One line tells what is wrong, and where."""
    monkeypatch.chdir(tmp_path)
    run, plain = windowed[0].train.run_dir, str(folder / "causal/run")
    (tmp_path / "bad.csv").write_text("text,label\nx,a\ny,c\n", "utf-8")
    (tmp_path / "words.csv").write_text("words\nx\n", "utf-8")
    for command, path, *arguments, message in (
            (cli.classify, plain, "--text", "a", "trained with the objective 'causal', so it tells no classes"),
            (cli.evaluate, plain, "--labelled", "bad.csv", "so it tells no classes; fine-tune it first"),
            (cli.evaluate, run, "--labelled", "bad.csv", "bad.csv:3: the label 'c' is unknown; those trained on are b"),
            (cli.evaluate, run, "--html", "r.html", "--text", "bad.csv", "--html is the report of --labelled; give"),
            (cli.classify, run, "no text; give --text or --file"),
            (cli.classify, run, "--text", "a", " ", "text 2 is empty; give some words"),
            (cli.classify, run, "--file", "words.csv", "words.csv:2: no column 'text'; there are words"),
            (cli.classify, run, "--file", "none.csv", "none.csv: No such file"),
            (cli.classify, run, "--file", "none.pdf", "none.pdf: a table is a file that ends in"),
            (cli.classify, run, "--text", "a", "--batch-size=0", "--batch-size 0 is too small"),
            (cli.embed, plain, "--text", "a", "--pooling=first", "the first token sees nothing of the text"),
            (cli.embed, plain, "--text", "a", "--nearest=0", "--nearest 0 is too small"),
            (cli.embed, plain, "--text", "a", "--out=v.bin", "--out v.bin: must end in .npy"),
            (cli.embed, plain, "--text", "a", "--out=no/v.npy", "--out no/v.npy: there is no such folder"),
            (cli.embed, plain, "--text", "a", "--query= ", "--query is empty; give some words"),
            (cli.evaluate, run, "--labelled", "bad.csv", "--html", "bad.csv", "--html bad.csv: must end in .html"),
            (cli.sample, run, "--fill", "[MASK]", "--prompt", "a", "--fill goes with neither --prompt nor --stream"),
            (cli.sample, run, "--fill", "[MASK]", "--candidates=0", "--candidates 0 is not between 1 and"),
            (cli.sample, plain, "--fill", "[MASK]", "objective 'causal', so it cannot fill in blanks"),
            (cli.sample, run, "--fill", "no blank", "the text has no [MASK]"),
            (cli.sample, run, "--fill", "天" * 20 + "[MASK]", "tokens, more than the context of 32")):
        assert message in fails(capsys, command, path, *arguments)


def random_run(name="masked", tokenizer=BYTES, more=0, **settings):
    """A run of a random model, with `more` tokens than its tokenizer has."""
    model = random_model(5, **dict(vocab_size=tokenizer.vocab_size + more, context_length=T) | settings)
    return Run(model, tokenizer, Config(model=model.config, objective=ObjectiveConfig(name)), "a run")


@torch.no_grad()
@pytest.mark.parametrize("name, pooling, settings", [
    ("masked", "mean", dict()), ("masked", "first", dict()), ("masked", "last", dict()),
    ("causal", "mean", dict(window=5)), ("classification", "last", dict(pooling="last", num_classes=2))])
def test_vectors_are_those_of_the_hidden_ones(name, pooling, settings):
    """Of texts in one piece and in several, whatever stands beside them in a batch."""
    texts, wanted = ["ab", "the king of it", "the king of it!", "天地" * 7, "x" * 43], []
    run = random_run(name, **settings)
    for text in texts:
        ids = BYTES.encode(text)
        pieces = [run.model.hidden(torch.tensor([[START, *ids[start:start + T - 2], END]]), causal=name != "masked")[0]
                  for start in range(0, len(ids), T - 2)]
        of_text = torch.cat([hidden[1:-1] for hidden in pieces])
        vector = {"mean": of_text.mean(0), "first": pieces[0][0], "last": pieces[-1][-1]}[pooling]
        wanted.append((vector / vector.norm()).numpy())
    for batch_size in (1, 2, 32):
        found = embed(run, texts, pooling, batch_size)
        assert found.dtype == np.float32 and np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
        assert found.shape == (5, 24) and np.abs(found - wanted).max() < 1e-5
    assert np.abs(embed(run, texts[::-1], pooling)[::-1] - wanted).max() < 1e-5


@pytest.mark.parametrize("start, pooling", [("causal", "mean"), ("causal", "last"), ("masked", "first")])
def test_the_command_embed(folder, tmp_path, capsys, start, pooling):
    """A text is most like itself, with similarity 1; the vectors are written as they are shown."""
    run, texts = folder / start / "run", ["the king said", "night and day", "my sword", "the queen said " * 9]
    arguments = ["embed", run, f"--pooling={pooling}", "--text", *texts]
    wanted = embed(minigpt.load(run), texts, pooling)
    shown = [json.loads(line) for line in output(capsys, *arguments)]
    assert [row["text"] for row in shown] == texts and np.abs([row["vector"] for row in shown] - wanted).max() < 1e-6
    assert output(capsys, *arguments, f"--out={tmp_path}/v.npy") == []
    assert np.abs(np.load(tmp_path / "v.npy") - wanted).max() < 1e-6
    rows = [json.loads(line) for line in output(capsys, *arguments, "--query", texts[2], "--nearest=3", "--json")]
    alike = wanted @ wanted[2]
    order = np.argsort(-alike)[:3]
    assert [row["text"] for row in rows] == [texts[place] for place in order] and order[0] == 2
    assert [row["similarity"] for row in rows] == pytest.approx([1, *alike[order[1:]]], abs=1e-5)
    assert output(capsys, *arguments, "--query", texts[2])[0] == f"1.0000  {texts[2]}"


WORD_LEVEL = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[S]": 0, "[BLANK]": 1, "[E]": 2, "a": 3, "b": 4}))
WORD_LEVEL.normalizer = tokenizers.normalizers.Replace("z", "")
WORD_LEVEL.add_special_tokens(["[S]", "[BLANK]", "[E]"])
WORD_LEVEL.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
OTHER, MASKLESS = (Tokenizer("tokenizers", WORD_LEVEL.to_str().encode(), Roles(0, (2,), 2, mask, (0,)))
                   for mask in (1, None))


@torch.no_grad()
@pytest.mark.parametrize("tokenizer, settings, text, pieces", [
    (BPE, dict(more=7), "The king [MASK] and [MASK]<mask> lord", ["The king", MASK, " and", MASK, MASK, " lord"]),
    (BPE, dict(), "[MASK] king\n[MASK]", [MASK, " king\n", MASK]),
    (BYTES, dict(), "a [MASK] b", ["a ", MASK, " b"]), (BPE, dict(next_sentence=True), "a [MASK]", ["a", MASK, END]),
    (OTHER, dict(), "a [BLANK] b <mask>", ["a", 1, "b", 1, 2]),
])
def test_missing_words(tokenizer, settings, text, pieces):
    """The likeliest tokens of a softmax over what is no special token, also where as many are asked for as there are.

    Regression: special tokens came last, with a probability of 0.
    """
    run, ids = random_run(tokenizer=tokenizer, **settings), [tokenizer.roles.document_start]
    for piece in pieces:
        ids += tokenizer.encode(piece) if isinstance(piece, str) else [piece]
    places, texts = np.array(ids) == tokenizer.roles.mask, np.flatnonzero(~tokenizer.is_special)
    wanted = run.model(torch.tensor([ids]), causal=False)[0, places][:, texts].softmax(-1).numpy()
    names = np.array([tokenizer.token_bytes[id].decode("utf-8", "replace") for id in texts])
    for candidates in (2, 10_000):
        blanks = fill(run, text, candidates)
        for blank, row in zip(blanks, wanted, strict=True):
            best = np.argsort(-row)[:candidates]
            assert [probability for _, probability in blank] == pytest.approx(row[best].tolist(), abs=1e-6)
            assert all(abs(row[names == name] - probability).min() < 1e-6 for name, probability in blank)


def test_the_command_fills(folder, capsys):
    """Each blank with its candidates, as text and as JSON."""
    run, text = folder / "masked/run", "The king [MASK] and [MASK] lord."
    blanks = fill(minigpt.load(run), text, 3)
    line, = output(capsys, "sample", run, "--fill", text, "--candidates=3", "--json")
    assert json.loads(line) == {"text": text, "blanks": [
        [{"token": token, "probability": probability} for token, probability in blank] for blank in blanks]}
    lines = [f"{probability:.4f}  {token!r}" for blank in blanks for token, probability in blank]
    assert output(capsys, "sample", run, "--fill", text, "--candidates=3") == [
        "--- blank 1 ---", *lines[:3], "--- blank 2 ---", *lines[3:]]
    assert len(output(capsys, "sample", run, "--fill", "[MASK]")) == 5


def test_what_cannot_be_told():
    """No tokenizer, no mask token, a context without room, no token of a text, weights that are not finite.

    Regression: a text without a token was left out, and the answers to others moved up to it.
    """
    run, short, damaged = random_run(), random_run(context_length=2), random_run("classification", num_classes=2)
    objective = ObjectiveConfig("classification", classes=["a", "b"])
    damaged.config = dataclasses.replace(damaged.config, objective=objective)
    torch.nn.init.constant_(damaged.model.final_norm.weight, torch.nan)
    bare, broken = Run(run.model, None, run.config, "m"), Run(damaged.model, BYTES, run.config, "m")
    rows = [Row(("a", "b"), "x", "t:1"), Row(("a", "z"), "x", "t:2")]
    for function, *arguments, message in (
            (embed, bare, ["a"], "has no tokenizer"), (fill, bare, "[MASK]", "has no tokenizer"),
            (fill, random_run(tokenizer=MASKLESS), "[MASK]", "cannot fill in blanks"),
            (fill, run, "a" * 15 + "[MASK]", "17 tokens, more than the context of 16"),
            (embed, short, ["a"], "a context of 2 tokens is too small"),
            (embed, short, ["a"], "last", "a context of 2 tokens is too small"),
            (embed, run, ["a", ""], "text 2 is empty"), (embed, run, ["a"], "max", "pooling = 'max' is none of"),
            (embed, random_run(tokenizer=OTHER), ["a", "z"], "text 2: the tokenizer has no token for it"),
            (split_of, rows, ["x", "y"], OTHER, "t", "t:2: the tokenizer has no token for a text"),
            (classify, run, [("a",)], "so it tells no classes"),
            (classify, damaged, [("a", "b")], "text 1: the model was trained on text, so give single texts"),
            (classify, damaged, [("a",)], "not finite, so its weights are damaged"),
            (embed, damaged, ["a"], "not finite"), (fill, broken, "[MASK]", "not finite")):
        with pytest.raises(ValueError, match=message):
            function(*arguments)
    assert len(fill(run, "a" * 14 + "[MASK]")) == 1
