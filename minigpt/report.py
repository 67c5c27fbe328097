"""How well texts were classified: one report, as numbers, as text for a terminal and as a page that stands alone.

    report = classification_report(labels, probabilities, ["ham", "spam"])
    print(report_text(report))
    Path("report.html").write_text(report_html(report, "spam"), "utf-8")

K classes, n texts.
"""

from __future__ import annotations

import unicodedata
from html import escape
from itertools import accumulate

import numpy as np

from minigpt.page import page, printable, table

METRICS = {
    "accuracy": lambda report: report["accuracy"],
    "macro_f1": lambda report: report["macro"]["f1"],
    "weighted_f1": lambda report: report["weighted"]["f1"],
}
"""{name: function of a report}; of each, more is better."""
TOLERANCE = 1e-3
"""Probabilities may sum to 1 within this much, as those of a 16-bit softmax do."""
SCORES = ("precision", "recall", "f1")
HEAD, BIN_HEAD = ("class", *SCORES, "support"), ("confidence", "mean", "accuracy", "texts")
SCREEN, NAME, COLUMN, CONFUSIONS = 120, 32, 12, 20
"""Columns of a terminal, of a class's name and of the name over a column; pairs listed where no matrix fits."""


def classification_report(labels, probabilities, names: list[str], bins: int = 10) -> dict:
    """Scores of `probabilities` (n, K) against the true classes `labels` (n,) int; class k is called names[k].

    The likeliest class is the predicted one. Gives `n`, `accuracy`, and of each of `classes`, where t texts are both
    of this class and predicted as it, `precision` = t / `predicted`, `recall` = t / `support` and
    `f1` = 2 t / (`predicted` + `support`), 0 where that divides by 0. `macro` is their mean over all K classes,
    `weighted` that by support. `confusion` (K, K): rows true, columns predicted. With y the label of a text,

        log_loss = mean -ln p_y, p_y at least 2.2e-308       brier = mean of sum_k (p_k - [k = y])^2    (Brier, 1950)

    `calibration` has `bins` of equal width over the confidence max_k p_k, low < confidence <= high, each with its mean
    `confidence` and `accuracy`, None in an empty one, and `expected_calibration_error` = sum over bins of count / n *
    |accuracy - confidence| (Guo et al., arXiv 1706.04599). All of it can be written as JSON. Raises ValueError where
    there are no texts, shapes do not fit, a label is none of the K classes, or a row is not a distribution.
    """
    labels, p, K = np.asarray(labels), np.asarray(probabilities, np.float64), len(names)
    _check(labels, p, K, bins)
    labels, n, predicted, confidence = labels.astype(np.int64), len(labels), p.argmax(1), p.max(1)
    right = predicted == labels
    confusion = np.bincount(labels * K + predicted, minlength=K * K).reshape(K, K)
    hits, support, chosen = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    scores = np.stack([hits / np.maximum(chosen, 1), hits / np.maximum(support, 1),
                       2 * hits / np.maximum(chosen + support, 1)])                                     # (3, K)

    edges = np.arange(bins + 1) / bins
    places = np.searchsorted(edges[1:-1], confidence)                                                   # (n,)
    counts, sure, good = (np.bincount(places, weights, bins) for weights in (None, confidence, right))  # (bins,)
    calibration = [dict(low=low, high=high, count=count, confidence=a / count if count else None,
                        accuracy=b / count if count else None)
                   for low, high, count, a, b in zip(*(x.tolist() for x in (edges, edges[1:], counts, sure, good)))]
    return dict(
        n=n, accuracy=float(right.mean()),
        classes=[dict(zip(("name", *SCORES, "support", "predicted"), row))
                 for row in zip(names, *scores.tolist(), support.tolist(), chosen.tolist())],
        macro=dict(zip(SCORES, scores.mean(1).tolist())),
        weighted=dict(zip(SCORES, (scores @ support / n).tolist())),
        confusion=confusion.tolist(),
        log_loss=float(np.log(1 / p[np.arange(n), labels].clip(np.finfo(np.float64).tiny)).mean()),
        brier=float(((p - np.eye(K)[labels]) ** 2).sum(1).mean()),
        calibration=dict(expected_calibration_error=float(np.abs(good - sure).sum() / n), bins=calibration))


def _check(labels, p, K, bins):
    if not labels.size:
        raise ValueError("there are no texts to report on")
    if labels.ndim != 1 or p.shape != (len(labels), K):
        raise ValueError(f"labels of shape {labels.shape} and {K} names do not fit probabilities of shape {p.shape}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be whole numbers, not {labels.dtype}")
    if bins < 1:
        raise ValueError(f"{bins} bins are too few; the least is 1")
    for place in np.flatnonzero((labels < 0) | (labels >= K))[:1]:
        raise ValueError(f"label {labels[place]} of text {place} is not between 0 and {K - 1}")
    for place in np.flatnonzero(~(np.isfinite(p) & (p >= 0)).all(1))[:1]:
        raise ValueError(f"the probabilities of text {place} are not all finite and at least 0")
    for place in np.flatnonzero(np.abs(p.sum(1) - 1) > TOLERANCE)[:1]:
        raise ValueError(f"the probabilities of text {place} sum to {p[place].sum():.6g}, not to 1")


def report_text(report: dict, title: str = "") -> str:
    """The report as a table for a terminal; wide and long names are aligned, control characters written out.

    Where the confusion matrix is wider than a terminal, the most frequent confusions are listed instead.
    """
    names = [_shortened(printable(row["name"]), NAME) for row in report["classes"]]
    heading = [printable(title), ""] if title else []
    scores = [HEAD, *_class_rows(report, names), [""] * len(HEAD), *_average_rows(report)]
    return "\n".join([*heading, *_aligned(scores), "", *_confusion_lines(report, names), "",
                      ", ".join(f"{name} {value}" for name, value in _figures(report)[2:]),
                      *_aligned([BIN_HEAD, *_bin_rows(report)])])


def report_html(report: dict, title: str = "") -> str:
    """The report as one page of HTML, without scripts and without anything to fetch, for screens, phones and paper."""
    names = [escape(printable(row["name"])) for row in report["classes"]]
    title = title or "Classification report"
    figures = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _figures(report))
    matrix = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f'<td style="--share:{count / max(1, sum(row)):.3f}">{count}</td>' for count in row) + "</tr>\n"
        for name, row in zip(names, report["confusion"]))
    columns = "".join(f'<th scope="col" title="{name}">{name}</th>' for name in names)
    return page(title, f"""<dl>{figures}</dl>
<h2>Classes</h2>
{table(HEAD, _class_rows(report, names), _average_rows(report))}
<h2>Confusion matrix</h2>
<p>Rows are the true class, columns the predicted; the stronger the colour, the larger the share of the true class.</p>
<div class="wide"><table class="matrix">
<thead><tr><th scope="col">true \\ predicted</th>{columns}</tr></thead>
<tbody>
{matrix}</tbody>
</table></div>
<h2>Calibration</h2>
<p>Where the bars end on the diagonal, a confidence of 0.8 is right in 8 of 10 texts. A dot is the mean of a bin.</p>
{_diagram(report["calibration"]["bins"])}
{table(BIN_HEAD, _bin_rows(report))}""")


def _figures(report):
    """(name, number) of what sums up the report."""
    values = {"accuracy": report["accuracy"], "macro F1": report["macro"]["f1"], "log loss": report["log_loss"],
              "Brier score": report["brier"],
              "expected calibration error": report["calibration"]["expected_calibration_error"]}
    return [(name, f"{value:.4f}") for name, value in values.items()]


def _class_rows(report, names):
    return [[name, *(f"{row[score]:.4f}" for score in SCORES), str(row["support"])]
            for name, row in zip(names, report["classes"])]


def _average_rows(report):
    n = str(report["n"])
    return [["accuracy", "", "", f"{report['accuracy']:.4f}", n],
            *([f"{kind} average", *(f"{report[kind][score]:.4f}" for score in SCORES), n]
              for kind in ("macro", "weighted"))]


def _bin_rows(report):
    return [[f"{row['low']:.3g} to {row['high']:.3g}", f"{row['confidence']:.4f}", f"{row['accuracy']:.4f}",
             str(row["count"])] for row in report["calibration"]["bins"] if row["count"]]


def _confusion_lines(report, names):
    counts = report["confusion"]
    lines = _aligned([["true \\ predicted", *(_shortened(name, COLUMN) for name in names)],
                      *([name, *map(str, row)] for name, row in zip(names, counts))])
    if max(map(_width, lines)) <= SCREEN:
        return ["confusion matrix", *lines]
    pairs = sorted((-count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if count and i != j)
    return ["most frequent confusions", *_aligned([["true", "predicted", "texts"], *(
        [names[i], names[j], str(-count)] for count, i, j in pairs[:CONFUSIONS])])]


def _aligned(rows):
    """Lines of a table: the first column to the left, the others to the right."""
    first, *widths = (max(map(_width, column)) for column in zip(*rows))
    return [(name + " " * (first - _width(name)) + "".join(
        " " * (2 + width - _width(cell)) + cell for cell, width in zip(cells, widths))).rstrip()
        for name, *cells in rows]


def _columns(char):
    """That a terminal gives a character: 2 to a wide one, 0 to a joiner and to a mark upon the one before."""
    return 0 if unicodedata.category(char) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(char) in "WF")


def _width(text):
    return sum(map(_columns, text))


def _shortened(name, width):
    """The name in at most `width` columns: of a longer one beginning and end, since either may tell two apart."""
    if _width(name) <= width:
        return name
    tail = (width - 2) // 2
    return f"{_beginning(name, width - 2 - tail)}..{_beginning(name[::-1], tail)[::-1]}"


def _beginning(text, width):
    return "".join(char for char, end in zip(text, accumulate(map(_columns, text))) if end <= width)


def _diagram(bins):
    """Reliability diagram (SVG, a square of 300): accuracy over confidence, where there are texts."""
    bars = "".join(
        f'<rect x="{300 * row["low"]:.1f}" y="{300 - 300 * row["accuracy"]:.1f}" '
        f'width="{300 * (row["high"] - row["low"]):.1f}" height="{300 * row["accuracy"]:.1f}"/>\n'
        f'<circle cx="{300 * row["confidence"]:.1f}" cy="{300 - 300 * row["accuracy"]:.1f}" r="3"/>\n'
        for row in bins if row["count"])
    ticks = "".join(f'<text x="{300 * at}" y="316">{at}</text>'
                    f'<text x="-6" y="{304 - 300 * at}" style="text-anchor:end">{at}</text>\n' for at in (0, 0.5, 1))
    return f"""<svg viewBox="-46 -8 362 348" role="img" aria-label="Accuracy by confidence; the numbers are below">
{bars}<path d="M0 0V300H300" class="axes"/>
<path d="M0 300L300 0" class="diagonal"/>
{ticks}<text x="150" y="334">confidence</text>
<text transform="translate(-34 150) rotate(-90)">accuracy</text>
</svg>"""
