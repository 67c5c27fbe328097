"""Tables of texts with labels: what a file says, what is refused and where, rows that fit a model, their loss."""

import csv
import io
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from decoding import END, START, TOKENIZER
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from sklearn.utils.class_weight import compute_class_weight
from test_cli import fails, train_arguments
from twins import random_model

from minigpt import cli
from minigpt.classify import classify
from minigpt.config import Config, DataConfig, ObjectiveConfig, TokenizerConfig
from minigpt.engine import Run
from minigpt.evaluate import evaluate
from minigpt.labelled import Row, fitted, is_long, prepare, read_lines, read_table, split_of
from minigpt.objectives import make_objective, text_rows
from minigpt.tokenizer import SPECIAL_TOKENS

PAD, T = SPECIAL_TOKENS["<pad>"], 16


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_what_csv_writes_comes_back(tmp_path, line_end, bom):
    """Quotes, delimiters and line ends within a text, with the line on which its row begins."""
    texts = ["plain", "a, b\tc", 'say "hi"', '"', "two\nlines\n\n", " 天地 ", "x\r\ny", "'"]
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=line_end).writerows(
        [["label", "number", "text"], *([f"l{i % 2} ", i, text] for i, text in enumerate(texts))])
    path = written(tmp_path / "t.CSV", bom + file.getvalue())
    rows = read_table(path, ["text"], "label")
    assert [(row.texts, row.label) for row in rows] == [((text,), f"l{i % 2}") for i, text in enumerate(texts)]
    assert [row.place for row in rows] == [f"{path}:{line}" for line in (2, 3, 4, 5, 6, 10, 11, 13)]
    assert read_table(str(path), ["text", "number"], None)[2] == Row((texts[2], "2"), None, f"{path}:4")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_quote_in_tsv_is_a_character(tmp_path, line_end):
    """Regression: two quotes in two rows made one row of them, with other rows' labels in its text."""
    lines = ["text\tlabel", '"Great, movie\tpos', "fine\tneg", 'also fine"\tneg', '"whole"\tpos']
    rows = read_table(written(tmp_path / "t.tsv", line_end.join(lines)), ["text"], "label")
    assert [(*row.texts, row.label) for row in rows] == [tuple(line.split("\t")) for line in lines[1:]]


def test_blank_lines_and_cells_of_any_length(tmp_path):
    """Regression: a blank line before the header was taken for it, and a text of 131,073 characters refused."""
    path = written(tmp_path / "t.csv", f'\r\ntext,label\r\n\r\n"{"x" * 200_000}",a\r\n\r\ny,b\r\n')
    assert [(len(row.texts[0]), row.place) for row in read_table(path, ["text"], "label")] == [
        (200_000, f"{path}:4"), (1, f"{path}:6")]


def test_json_lines(tmp_path):
    """A label is a text, a whole number or a truth value, which is told as it is written."""
    path = written(tmp_path / "t.jsonl", '\ufeff{"text": "a\\nb", "label": " x ", "more": [1]}\r\n\r\n'
                   '{"label": -7, "text": "天"}\n{"text": "d", "label": true}\n{"text": "e", "label": false}')
    assert read_table(path, ["text"], "label") == [
        Row((text,), label, f"{path}:{line}")
        for text, label, line in (("a\nb", "x", 1), ("天", "-7", 3), ("d", "true", 4), ("e", "false", 5))]


def test_lines_of_text(tmp_path):
    """Regression: of a file with CRLF each text ended with a CR."""
    assert read_lines(written(tmp_path / "t.txt", "\ufeffa b\r\n\r\n  \n c\n\u2028d")) == ["a b", " c", "\u2028d"]
    with pytest.raises(ValueError, match="holds no text"):
        read_lines(written(tmp_path / "t.txt", " \n"))


@pytest.mark.parametrize("name, content, message", [
    ("t.csv", "words,label,x\na,b,c\n", "t.csv:2: no column 'text'; there are words, label, x"),
    ("t.csv", "text,class\na,b\n", "t.csv:2: no column 'label'; there are text, class"),
    ("t.csv", 'text,label\n"a\nb",x\n"",y\n', "t.csv:4: text is empty"),
    ("t.csv", 'text,label\n"a\r\n\r\nb",x\r\nc,  \r\n', "t.csv:5: label is empty"),
    ("t.csv", 'text,label\n"\n\na",x\nb, c,y\n', "t.csv:5: has 3 cells, the header 2"),
    ("t.tsv", "text\tlabel\na\tb\nc\n", "t.tsv:3: has 1 cells, the header 2"),
    ("t.csv", 'text,label\na,x\n\n"b"c,y\nd,x\n', "t.csv:4: not a row of a table"),
    ("t.csv", 'text,label\na,x\n"b,y\nd,x\n', "t.csv:3: not a row of a table"),
    ("t.csv", "text,label,text\na,b,c\n", "t.csv:1: a column stands twice"),
    ("t.csv", b"text,label\na\xff,b\n", "t.csv: byte 12 is not UTF-8"),
    ("t.csv", b"\xef\xbb\xbftext,label\na\xff,b\n", "t.csv: byte 15 is not UTF-8"),
    ("t.jsonl", "a b\n".encode("utf-16"), "t.jsonl: byte 0 is not UTF-8"),
    ("t.csv", "", "t.csv: holds no row"), ("t.csv", "text,label\n", "t.csv: holds no row"),
    ("t.jsonl", "\n\n", "t.jsonl: holds no row"), ("t.txt", "a", "t.txt: a table is a file that ends in .csv, .tsv or"),
    ("t.jsonl", '{"text": "a", "label": "x"}\n\n["a"]\n', "t.jsonl:3: no JSON object"),
    ("t.jsonl", "[" * 100_000, "t.jsonl:1: no JSON object"), ("t.jsonl", '{"text": "a"', "t.jsonl:1: no JSON object"),
    ("t.jsonl", '{"text": "a"}\n', "t.jsonl:1: no column 'label'; there are text"),
    ("t.jsonl", '{"text": 1, "label": 1}\n', "t.jsonl:1: text is empty, or no text"),
    ("t.jsonl", '{"text": "\\ud800", "label": 1}\n', "t.jsonl:1: text is empty, or no text"),
    *[("t.jsonl", '{"text": "a", "label": ' + label + "}", "t.jsonl:1: label is empty, or no label")
      for label in ("null", "1.0", "[]", '" "', '"\\udfff"')],
    ("t.csv", "text,label\na,x\nb,x\n", "t.csv: label has 1 labels (x) in the rows to train on"),
    ("t.csv", "text,label\na,x\n", "t.csv: has no two rows of one label, and some must be held out"),
    ("nowhere.csv", None, "nowhere.csv: No such file or directory"), ("folder.csv", None, "folder.csv: Is a directory"),
])
def test_a_table_that_cannot_be_learnt_from(tmp_path, capsys, name, content, message):
    """One line names the file, the line and what is wrong, and no run is begun."""
    (tmp_path / "folder.csv").mkdir()
    if content is not None:
        written(tmp_path / name, content)
    assert message in fails(capsys, cli.train, *train_arguments(
        tmp_path, tmp_path / name, "--objective.name=classification", "--tokenizer.kind=bytes"))
    assert not (tmp_path / "run").exists()


def prepared(path, classes=(), **settings):
    return prepare(DataConfig(path=str(path), **settings), TokenizerConfig(kind="bytes"), list(classes))


def table(path, labels):
    return written(path, "text,label\n" + "".join(f"t{i},{label}\n" for i, label in enumerate(labels)))


def test_classes_are_in_order(tmp_path):
    """Whole numbers by value, before other names; of two ways to write one, each is a class, in one order always."""
    labels = ["b", "10", "9", "-1", "a", "01", "1", "001", "0001", "x1", "0"]
    found = prepared(table(tmp_path / "t.csv", labels), val_path=str(table(tmp_path / "v.csv", ["b", "0"])))
    classes = ("-1", "0", "0001", "001", "01", "1", "9", "10", "a", "b", "x1")
    assert found.train.classes == found.val.classes == classes
    assert [classes[number] for number in found.train.labels] == labels and found.val.labels.tolist() == [9, 1]


def test_given_classes_keep_their_order(tmp_path):
    """And a label that is none of them, or a name that stands twice, is refused."""
    path = table(tmp_path / "t.csv", "abababab")
    assert prepared(path, "cba").train.classes == ("c", "b", "a")
    for classes, val_path, message in (
            ("ac", "", r"t\.csv:3: the label 'b' is unknown; those trained on are a, c"),
            ("", table(tmp_path / "v.csv", "acb"), r"v\.csv:3: the label 'c' is unknown; those trained on are a, b"),
            ("aba", "", r"objective\.classes = .* names one twice"),
            ("a", "", "names one; a classifier tells two apart")):
        with pytest.raises(ValueError, match=message):
            prepared(path, classes, val_path=str(val_path))


@pytest.mark.parametrize("n, fraction, held_out", [(20, 0.1, 2), (20, 0.5, 10), (20, 1e-6, 1), (4, 0.9, 2)])
def test_what_is_held_out(tmp_path, n, fraction, held_out):
    """Each row is in one of the splits, the same at each reading; the fingerprint tells any other table or classes."""
    path = table(tmp_path / "t.csv", "ab" * (n // 2))
    found = prepared(path, "ab", val_fraction=fraction)
    assert len(found.val.texts) == held_out and sorted(found.train.names + found.val.names) == sorted(
        f"{path}:{line}" for line in range(2, n + 2))
    for split in (found.train, found.val):              # t0 is an a
        for (ids, _), label in zip(split.texts, split.labels):
            assert int(TOKENIZER.decode(ids)[1:]) % 2 == label
    again, turned = prepared(path, "ab", val_fraction=fraction), prepared(path, "ba", val_fraction=fraction)
    changed = prepared(table(path, "ab" * (n // 2 - 1) + "ba"), "ab", val_fraction=fraction)
    assert again.fingerprint == found.fingerprint not in (turned.fingerprint, changed.fingerprint)


def test_the_last_row_of_a_class_is_learnt_from(tmp_path):
    """Regression: where it was held out, the run ended with its label as an unknown one."""
    for only in range(12):
        path = table(tmp_path / "t.csv", "a" * only + "c" + "b" * (12 - only))
        found = prepared(path, val_fraction=0.5)
        assert set(found.train.labels) == set(range(len(found.train.classes))) and len(found.val.texts) == 6


@given(st.lists(st.integers(), min_size=1, max_size=40), st.integers(4, 20))
def test_windows_hold_every_token_once(ids, T):
    """And all but the last are full; what is not cut into windows has the first one's tokens."""
    windows = fitted((ids, None), T, "window")
    assert sum((first for first, _ in windows), []) == ids and all(second is None for _, second in windows)
    assert all(len(first) == T - 2 for first, _ in windows[:-1]) and 0 < len(windows[-1][0]) <= T - 2
    assert fitted((ids, None), T, "truncate") == windows[:1] and is_long((ids, None), T) == (len(windows) > 1)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(4, 16))
def test_of_a_pair_the_longer_is_cut_token_by_token(first, second, T):
    """As BERT cuts it, one token of the longer at a time, of two that are as long one of the second."""
    pair = [*range(first)], [*range(100, 100 + second)]
    kept = [pair[0][:], pair[1][:]]
    while len(kept[0]) + len(kept[1]) > T - 3:
        kept[len(kept[0]) <= len(kept[1])].pop()
    assert fitted(pair, T, "truncate") == [tuple(kept)] and is_long(pair, T) == (tuple(kept) != pair)


def test_rows():
    """<s> A </s> or <s> A </s> B </s>; 1 stands from B on, and ids of documents only beside padding."""
    rows = text_rows([([10, 11], [12]), ([13], None), ([], [14])], 9, TOKENIZER)
    assert rows["inputs"].tolist() == [[START, 10, 11, END, 12, END], [START, 13, END, PAD, PAD, PAD],
                                       [START, END, 14, END, PAD, PAD]]
    assert rows["token_types"].tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6, [0, 0, 1, 1, 0, 0]]
    assert rows["lengths"].tolist() == [6, 3, 4]
    assert rows["document_ids"].tolist() == [[0] * 6, [0] * 3 + [-1] * 3, [0] * 4 + [-1] * 2]
    assert text_rows([([10], None), ([11], None)], 9, TOKENIZER).keys() == {"inputs", "token_types", "lengths"}


def classifier(columns=1, long_texts="truncate", class_weights="none", **settings):
    """A run of a random model over bytes."""
    model = random_model(3, vocab_size=TOKENIZER.vocab_size, context_length=T, num_classes=3, **settings)
    data = DataConfig(text_columns=["text", "other"][:columns], long_texts=long_texts)
    objective = ObjectiveConfig(name="classification", classes=["a", "b", "c"], class_weights=class_weights)
    return Run(model, TOKENIZER, Config(data, model=model.config, objective=objective), "a classifier")


def by_hand(run, first, second=None):
    """Probabilities of a text or pair that fits, from the model's parts."""
    model, is_causal = run.model, run.model.config.pooling == "last"
    ids = [START, *TOKENIZER.encode(first), END]
    types = [0] * len(ids) + [1] * (len(second.encode()) + 1 if second else 0)
    ids += [*TOKENIZER.encode(second), END] if second else []
    hidden = model.hidden(torch.tensor([ids]), causal=is_causal,
                          token_types=torch.tensor([types]) if model.config.token_types else None)
    return model.classifier(model.pooler.dense(hidden[0, -1 if is_causal else 0]).tanh()).softmax(-1).tolist()


@pytest.mark.parametrize("settings", [dict(), dict(pooling="last"), dict(token_types=2, position="learned", bias=True),
                                      dict(pooling="last", window=3)], ids=str)
def test_padding_changes_no_probability(settings):
    """A text beside longer ones has the probabilities that its tokens alone give by hand; no text has none."""
    for texts in ([("a",), ("abcdefgh ij",), ("天地",), ("b",)], [("a", "bcd"), ("x y", "z"), ("king", "of it")]):
        run = classifier(len(texts[0]), **settings)
        wanted = [by_hand(run, *text) for text in texts]
        for batch_size in (1, 2, 32):
            assert np.abs(classify(run, texts, batch_size) - wanted).max() < 1e-6
        assert np.std(wanted, axis=0).max() > 1e-3 and classify(run, []).shape == (0, 3)


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_the_loss_is_of_windows_and_the_scores_are_of_texts(class_weights):
    """Windows share the label of their text, and the mean of their probabilities counts, whatever the batches are.

    The loss is the cross-entropy of each window; weights are scikit-learn's, of the texts to train on.
    """
    run = classifier(long_texts="window", class_weights=class_weights)
    texts = ["a" * 30 + "b", "x", "the king of it all, and so on and on", "the night", "tuvw" * 7]
    pieces = [[text[start:start + T - 2] for start in range(0, len(text), T - 2)] for text in texts]
    wanted = np.array([np.mean([by_hand(run, piece) for piece in parts], axis=0) for parts in pieces])
    assert np.abs(classify(run, [(text,) for text in texts], 4) - wanted).max() < 1e-6
    predicted = wanted.argmax(1)
    labels = [*predicted[:2], *(predicted[2:] + 1) % 3]     # two of five are right
    to_train_on, split = (split_of([Row((text,), "abc"[label], "t") for text, label in zip(texts, of_texts)], [*"abc"],
                                   TOKENIZER, "t") for of_texts in ([0, 0, 1, 2, 0], labels))
    weights = compute_class_weight("balanced", classes=np.arange(3), y=[0, 0, 1, 2, 0])
    weights = torch.tensor(weights if class_weights == "balanced" else [1, 1, 1]).float()
    logs, classes = zip(*((by_hand(run, piece), label) for parts, label in zip(pieces, labels) for piece in parts))
    loss = torch.nn.functional.cross_entropy(torch.tensor(logs).log(), torch.tensor(classes), weights).item()
    objective = make_objective(run.config, TOKENIZER, to_train_on)
    for batch_size in (1, 3, 32):
        found = evaluate(run.model, objective.evaluated, split, batch_size=batch_size, autocast=nullcontext)
        assert found["val_loss"] == found["val_classification"] == pytest.approx(loss, rel=1e-5)
        assert found["val_accuracy"] == 0.4
        for name in ("macro", "weighted"):
            assert found[f"val_{name}_f1"] == pytest.approx(
                metrics.f1_score(labels, predicted, labels=range(3), average=name, zero_division=0))


def test_an_epoch_has_every_row_once():
    """In another order each time, of the seed alone; a row is told with the line of its text."""
    run, sizes = classifier(long_texts="window"), range(1, 6)
    split = split_of([Row(("abcde " * size,), "ab"[size % 2], f"t:{size}") for size in sizes], [*"ab"], TOKENIZER, "t")
    task, = make_objective(run.config, TOKENIZER, split).at(0).tasks
    rows, drawn = [size for size in sizes for _ in range(-(-6 * size // (T - 2)))], []
    for first in range(0, 3 * len(rows), len(rows)):
        batch, = task.draw(first, len(rows))
        epoch = [number + 1 for number in batch.numbers.tolist()]
        assert sorted(epoch) == rows and [size % 2 for size in epoch] == batch.labels.tolist()
        assert [task.sources(first + row) for row in range(len(rows))] == [[(f"t:{size}", 0)] for size in epoch]
        drawn += epoch
    assert drawn[:len(rows)] != drawn[len(rows):2 * len(rows)] != drawn[2 * len(rows):]
    across, = make_objective(run.config, TOKENIZER, split).at(0).draw(len(rows) - 2, 4)
    assert [number + 1 for number in across.numbers.tolist()] == drawn[len(rows) - 2:len(rows) + 2]
