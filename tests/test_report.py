"""The classification report: numbers equal to scikit-learn's, a text and a page that hold all of them."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from minigpt.page import STYLE
from minigpt.report import METRICS, SCORES, _width, classification_report, report_html, report_text

LABELS = [0, 0, 0, 1, 1, 3]
PROBABILITIES = [[0.9, 0.1, 0, 0], [0.6, 0.2, 0.2, 0], [0.25, 0.5, 0.25, 0], [0.2, 0.7, 0.1, 0], [1, 0, 0, 0],
                 [0, 0.8, 0.1, 0.1]]
NAMES = ["体育新闻", "<b>&\"'\x1b[31m", "never\nthere", "politics/international/of the north-west"]


def example(names=NAMES):
    """Six texts: class 2 is neither true nor predicted, class 3 true and never predicted."""
    return classification_report(LABELS, PROBABILITIES, names)


def random_predictions(n, K, seed):
    """Labels and probabilities of which some classes have no texts and others are never predicted."""
    random = np.random.default_rng(seed)
    labels = random.choice(random.permutation(K)[:random.integers(1, K + 1)], n)
    logits = 2 * random.normal(size=(n, K)) + 2 * (labels[:, None] == np.arange(K))
    logits[:, random.permutation(K)[:random.integers(0, K)]] -= 20
    p = np.exp(logits - logits.max(1, keepdims=True))
    return labels, p / p.sum(1, keepdims=True)


def pets():
    """400 texts of three classes, in which no count is zero."""
    report = classification_report(*random_predictions(400, 3, 7), ["cat", "dog", "bird"])
    assert np.all(report["confusion"])
    return report


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_the_numbers_are_those_of_scikit_learn(n, K, seed):
    """Of any number of texts and classes, also classes without texts and classes that are never predicted."""
    labels, p = random_predictions(n, K, seed)
    report, predicted, classes = classification_report(labels, p, [str(k) for k in range(K)]), p.argmax(1), range(K)
    *scores, support = metrics.precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0)
    for name, expected in zip(SCORES, scores):
        np.testing.assert_allclose([row[name] for row in report["classes"]], expected, rtol=1e-12, atol=0)
    assert [row["support"] for row in report["classes"]] == support.tolist()
    assert [row["predicted"] for row in report["classes"]] == np.bincount(predicted, minlength=K).tolist()
    for average in ("macro", "weighted"):
        expected = metrics.precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0,
                                                           average=average)[:3]
        np.testing.assert_allclose(list(report[average].values()), expected, rtol=1e-12, atol=0)
    assert report["confusion"] == metrics.confusion_matrix(labels, predicted, labels=classes).tolist()
    assert report["n"] == n and report["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    if K > 1:                                           # scikit-learn has neither of one class
        assert report["log_loss"] == pytest.approx(metrics.log_loss(labels, p, labels=classes), rel=1e-9)
        assert report["brier"] == pytest.approx(
            metrics.brier_score_loss(labels, p, labels=classes, scale_by_half=False), rel=1e-9)


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 15), st.integers(0, 2**32 - 1), st.booleans())
def test_calibration_is_that_of_a_loop(n, K, bins, seed, at_edges):
    """Also of a confidence that lies on an edge: it belongs to the bin below."""
    labels, p = random_predictions(n, K, seed)
    if at_edges and K > 1:
        confidence = np.ceil(p.max(1) * 10) / 10
        p = np.where(np.arange(K) == p.argmax(1)[:, None], confidence[:, None], (1 - confidence[:, None]) / (K - 1))
    found = classification_report(labels, p, [str(k) for k in range(K)], bins)["calibration"]
    error, total = 0, 0
    assert len(found["bins"]) == bins and found["bins"][-1]["high"] == 1
    for m, row in enumerate(found["bins"]):
        assert (row["low"], row["high"]) == (m / bins, (m + 1) / bins)
        inside = [(max(q), int(np.argmax(q) == y)) for q, y in zip(p, labels) if row["low"] < max(q) <= row["high"]]
        if row["high"] == 1:                            # of probabilities that sum to a little more than 1
            inside += [(max(q), int(np.argmax(q) == y)) for q, y in zip(p, labels) if max(q) > 1]
        assert row["count"] == len(inside)
        if not inside:
            assert row["confidence"] is None and row["accuracy"] is None
            continue
        confidence, accuracy = np.mean(inside, axis=0)
        assert (row["confidence"], row["accuracy"]) == pytest.approx((confidence, accuracy))
        error, total = error + len(inside) / n * abs(accuracy - confidence), total + len(inside)
    assert total == n and found["expected_calibration_error"] == pytest.approx(error)


def test_an_example_by_hand():
    """Every number of six texts; what divides by zero is 0, and an average counts it."""
    report = example()
    assert report["n"] == 6 and report["accuracy"] == 0.5
    assert report["confusion"] == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    third = pytest.approx(1 / 3)
    assert [list(row.values())[1:] for row in report["classes"]] == [
        [pytest.approx(2 / 3)] * 3 + [3, 3], [third, 0.5, pytest.approx(0.4), 2, 3], [0.0] * 3 + [0, 0],
        [0.0] * 3 + [1, 0]]
    assert report["macro"] == pytest.approx(dict(precision=1 / 4, recall=7 / 24, f1=4 / 15))
    assert report["weighted"] == pytest.approx(dict(precision=4 / 9, recall=1 / 2, f1=7 / 15))
    nats = -np.log([0.9, 0.6, 0.25, 0.7, np.finfo(float).tiny, 0.1])
    assert report["log_loss"] == pytest.approx(nats.mean()) and nats.max() == pytest.approx(708.4, abs=0.01)
    squares = [0.02, 0.24, 0.875, 0.14, 2, 1.46]
    assert report["brier"] == pytest.approx(sum(squares) / 6)
    assert [row["count"] for row in report["calibration"]["bins"]] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert report["calibration"]["expected_calibration_error"] == pytest.approx((0.5 + 0.4 + 0.3 + 0.8 + 0.1 + 1) / 6)
    assert {name: metric(report) for name, metric in METRICS.items()} == pytest.approx(
        dict(accuracy=1 / 2, macro_f1=4 / 15, weighted_f1=7 / 15))


def test_a_single_class_has_no_error():
    report = classification_report([0, 0], [[1.0], [1.0]], ["only"])
    assert report["accuracy"] == report["macro"]["f1"] == 1 and report["confusion"] == [[2]]
    assert [report["brier"], report["calibration"]["expected_calibration_error"]] == [0, 0]
    assert str(report["log_loss"]) == "0.0"             # not -0.0
    assert "only" in report_text(report) and "only" in report_html(report)


def test_float16_probabilities_and_small_labels():
    """A 16-bit softmax sums to 1 within TOLERANCE, and labels of 8 bits do not overflow over 20 classes."""
    labels, p = random_predictions(50, 20, 3)
    names = [str(k) for k in range(20)]
    report = classification_report(labels.astype(np.uint8), p.astype(np.float16), names)
    assert report["confusion"] == classification_report(labels.tolist(), p.tolist(), names)["confusion"]


def test_json_keeps_all_of_it():
    report = example()
    again = json.loads(json.dumps(report, allow_nan=False))
    assert again == report and report_text(again) == report_text(report) and report_html(again) == report_html(report)


def numbers(report):
    """All that a reader of the report must find, as it is written there."""
    rows = [*report["classes"], report["macro"], report["weighted"]]
    bins = [row for row in report["calibration"]["bins"] if row["count"]]
    exact = [report["accuracy"], report["log_loss"], report["brier"], *(row[name] for row in rows for name in SCORES),
             report["calibration"]["expected_calibration_error"],
             *(row[name] for row in bins for name in ("confidence", "accuracy"))]
    whole = [report["n"], *(row["support"] for row in report["classes"]), *sum(report["confusion"], []),
             *(row["count"] for row in bins)]
    return [f"{value:.4f}" for value in exact] + [str(value) for value in whole]


def test_the_text_has_every_number():
    """Of random predictions: rows of the table and of the matrix stand beside their names."""
    report = pets()
    text = report_text(report, "pets")
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["pets"] and lines[2] == ["class", *SCORES, "support"]
    assert set(numbers(report)) <= set(re.findall(r"[\d.]+(?![\d.])", text))
    for row, counts in zip(report["classes"], report["confusion"]):
        assert [row["name"], *(f"{row[name]:.4f}" for name in SCORES), str(row["support"])] in lines
        assert [row["name"], *map(str, counts)] in lines
    assert ["macro", "average", *(f"{value:.4f}" for value in report["macro"].values()), "400"] in lines
    assert ["accuracy", f"{report['accuracy']:.4f}", "400"] in lines
    assert (f"log loss {report['log_loss']:.4f}, Brier score {report['brier']:.4f}, expected calibration error "
            f"{report['calibration']['expected_calibration_error']:.4f}") in text


def test_the_text_is_aligned_and_steers_no_terminal():
    """Wide and long names stand in columns; an escape sequence, a line feed and a bidi override are written out."""
    text = report_text(example([*NAMES[:3], NAMES[3] + "\u202e"]), "a\x07b")
    assert all(char.isprintable() or char == "\n" for char in text)
    assert r"\x1b[31m" in text and r"never\nthere" in text and r"a\x07b" in text and r"\u202e" in text
    tables = [[line for line in part.splitlines() if not line.startswith(("confusion matrix", "log loss"))]
              for part in text.split("\n\n")[1:]]
    assert len(tables) == 4 and [len(table) for table in tables] == [5, 3, 5, 7]
    for table in tables:
        assert len({_width(line) for line in table}) == 1
    assert (_width("天a"), _width("e\u0301"), _width("می\u200cشود")) == (3, 1, 5)
    assert max(map(len, text.splitlines())) <= 120


def test_names_that_differ_at_their_ends_stay_apart():
    """What is cut out of a long name is its middle."""
    text = report_text(classification_report([0, 1], np.eye(2), ["a" * 60 + "x", "a" * 60 + "y"]))
    assert len({line.split()[0] for line in text.splitlines() if line.startswith("aaa")}) == 2


def test_a_matrix_too_wide_for_a_terminal():
    """The pairs that are confused most often stand in its place, the most frequent first, and no right ones."""
    labels, predicted = [0] * 9 + [1] * 5 + [2] * 3 + [7, 8], [0] * 9 + [4] * 5 + [5] * 3 + [6, 8]
    names = [f"the class {k}" for k in range(30)]
    lines = report_text(classification_report(labels, np.eye(30)[predicted], names)).splitlines()
    start = lines.index("most frequent confusions")
    assert [line.split() for line in lines[start + 1:lines.index("", start)]] == [
        ["true", "predicted", "texts"], "the class 1 the class 4 5".split(), "the class 2 the class 5 3".split(),
        "the class 7 the class 6 1".split()]
    assert "confusion matrix" in report_text(classification_report(labels, np.eye(30)[predicted], list("a" * 30)))


class Page(HTMLParser):
    """Tags in order, cells by row, visible text; fails where tags do not nest."""

    VOID = {"meta", "rect", "circle", "path", "br"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.rows, self.text = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


def test_the_page_stands_alone_and_escapes_names():
    """Nothing to fetch or to run; names and title come back as they were but for their control characters."""
    html = report_html(example(), "</title><script>alert(1)</script>")
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>") and not re.search(r"<script|https?:|url\(|@import|src=|href=", html, re.I)
    assert {"script", "link", "img", "iframe", "b"}.isdisjoint(tag for tag, _ in page.tags)
    assert ("meta", {"charset": "utf-8"}) in page.tags
    assert any(attributes.get("name") == "viewport" for tag, attributes in page.tags if tag == "meta")
    assert page.text.count("</title><script>alert(1)</script>") == 2
    written = ["体育新闻", "<b>&\"'\\x1b[31m", r"never\nthere", NAMES[3]]
    assert [row[0] for row in page.rows if len(row) == 5][1:5] == written
    assert ["true \\ predicted", *written] in page.rows
    assert [attributes["title"] for tag, attributes in page.tags if tag == "th" and "title" in attributes] == written
    assert "\x1b" not in html and "<title>Classification report</title>" in report_html(example())


def test_the_page_has_every_number():
    """Also the shares that colour the matrix, and the bars of the diagram, which are no text."""
    report = pets()
    page = Page(report_html(report))
    assert set(numbers(report)) <= {text.strip() for text in page.text}
    for name, value in (("accuracy", report["accuracy"]), ("macro F1", report["macro"]["f1"]),
                        ("log loss", report["log_loss"]), ("Brier score", report["brier"]),
                        ("expected calibration error", report["calibration"]["expected_calibration_error"])):
        assert page.text[page.text.index(name) + 1] == f"{value:.4f}"
    shares = [float(attributes["style"].removeprefix("--share:")) for tag, attributes in page.tags
              if tag == "td" and "style" in attributes]
    confusion = np.array(report["confusion"])
    np.testing.assert_allclose(shares, (confusion / np.maximum(confusion.sum(1, keepdims=True), 1)).ravel(), atol=5e-4)
    bars = [[float(attributes[key]) for key in ("x", "y", "width", "height")] for tag, attributes in page.tags
            if tag == "rect"]
    np.testing.assert_allclose(bars, [
        [300 * row["low"], 300 - 300 * row["accuracy"], 300 / 10, 300 * row["accuracy"]]
        for row in report["calibration"]["bins"] if row["count"]], atol=0.051)


def test_numbers_are_legible_on_every_colour():
    """Contrast of the ink on page and on heat, between which all shares lie, is at least 4.5 (WCAG 2.1), light or dark.

    Luminance grows or falls all the way from page to heat, so what lies between them has no less than the lower one.
    """
    def luminance(color):
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in np.array(color) / 255]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    schemes = re.findall(r"--page: ([\d ]+); --ink: ([\d ]+); .*--heat: ([\d ]+)", STYLE)
    assert len(schemes) == 2
    for scheme in schemes:
        page, ink, heat = (np.array(color.split(), int) for color in scheme)
        for share in np.linspace(0, 1, 11):
            low, high = sorted([luminance(ink), luminance(page + share * (heat - page))])
            assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("labels, p, bins, message", [
    ([], np.zeros((0, 2)), 10, "there are no texts to report on"),
    ([0, 1], [[1, 0]], 10, r"labels of shape \(2,\) and 2 names do not fit probabilities of shape \(1, 2\)"),
    ([0], [[1, 0, 0]], 10, r"labels of shape \(1,\) and 2 names do not fit probabilities of shape \(1, 3\)"),
    ([[0]], [[1, 0]], 10, r"labels of shape \(1, 1\) and 2 names"),
    (0, [1, 0], 10, r"labels of shape \(\) and 2 names"),
    ([0.0], [[1, 0]], 10, "labels must be whole numbers, not float64"),
    ([0], [[1, 0]], 0, "0 bins are too few; the least is 1"),
    ([0, 2], [[1, 0], [1, 0]], 10, "label 2 of text 1 is not between 0 and 1"),
    ([-1], [[1, 0]], 10, "label -1 of text 0 is not between 0 and 1"),
    ([0, 0], [[1, 0], [1, np.nan]], 10, "the probabilities of text 1 are not all finite and at least 0"),
    ([0], [[np.inf, 0]], 10, "the probabilities of text 0 are not all finite"),
    ([0], [[1.5, -0.5]], 10, "the probabilities of text 0 are not all finite and at least 0"),
    ([0, 1], [[1, 0], [0.5, 0.498]], 10, "the probabilities of text 1 sum to 0.998, not to 1"),
    ([0], [[0.9, 0.2]], 10, "the probabilities of text 0 sum to 1.1, not to 1"),
])
def test_what_cannot_be_reported(labels, p, bins, message):
    with pytest.raises(ValueError, match=message) as error:
        classification_report(labels, p, ["a", "b"], bins)
    assert "\n" not in str(error.value)


def test_probabilities_within_the_tolerance():
    """A sum of a little less or more than 1 is taken; a confidence above 1 counts in the last bin."""
    assert classification_report([1], [[0.4, 0.5995]], ["a", "b"])["accuracy"] == 1
    report = classification_report([0], [[1.0005, 0]], ["a", "b"])
    assert report["calibration"]["bins"][-1]["count"] == 1


def test_it_needs_neither_torch_nor_scikit_learn():
    code = "import sys, minigpt.report; print({'torch', 'sklearn', 'scipy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
