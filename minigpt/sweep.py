"""Samples of one prompt under many settings, side by side: how much each repeats itself, how likely the model finds it.

    settings = grid(SamplingParams(max_new_tokens=60), {"temperature": [0.6, 1.0], "top_p": [0.9, 1.0]})
    rows = list(sweep(run, "It was", settings, 4))
    Path("sweep.html").write_text(sweep_html(rows, "It was"), "utf-8")
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from html import escape
from itertools import product

from minigpt.config import SamplingParams
from minigpt.engine import Completion, Run
from minigpt.page import page, printable, table

FIGURES = ("distinct_1", "distinct_2", "distinct_3", "self_bleu", "repetition", "perplexity", "tokens")
EXPLAINED = """n-grams are of the model's tokens. distinct n: distinct n-grams of all samples / all of them. self bleu:
mean BLEU of a sample against the others, 0 to 100; the lower, the more they differ. repetition: mean share of a
sample's 4-grams that stand in it before. perplexity: of what was drawn, under the model alone. tokens: mean length."""


def grid(params: SamplingParams, values: dict[str, list]) -> list[tuple[dict, SamplingParams]]:
    """Each combination of `values`, {field of SamplingParams: values}; ValueError for one that cannot be."""
    combinations = [dict(zip(values, each)) for each in product(*values.values())]
    return [(each, dataclasses.replace(params, log_probabilities=1, **each)) for each in combinations]


def sweep(run: Run, prompt: str | None, settings: list[tuple[dict, SamplingParams]], number: int) -> Iterator[dict]:
    """Of each of the settings (see `grid`) its values, its figures and `number` samples, or what a search finds.

    All draw from the same seeds.
    """
    for values, params in settings:
        samples = run.samples(prompt, params, number if params.rows == 1 else min(number, params.num_beams))
        yield {**values, **figures(samples), "samples": [sample.text for sample in samples]}


def figures(samples: list[Completion]) -> dict[str, float | None]:
    """`FIGURES` of some samples with log-probabilities; None for what they are too few or too short for.

    With c_n the n-grams of a text: distinct_n = |set of all c_n| / all c_n (Li et al., arXiv 1510.03055), self_bleu is
    that of Zhu et al. (arXiv 1802.01886), by sacrebleu, repetition = mean of 1 - |set c_4| / |c_4| (seq-rep-4 of
    Welleck et al., arXiv 1908.04319), perplexity = exp(-mean ln p) over all tokens.
    """
    texts = [[token["id"] for token in sample.tokens if token["token"]] for sample in samples]
    values = [token["log_probability"] for sample in samples for token in sample.tokens]
    row = {}
    for n in (1, 2, 3):
        grams = [gram for text in texts for gram in _ngrams(text, n)]
        row[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else None
    repeated = [1 - len(set(grams)) / len(grams) for text in texts if (grams := _ngrams(text, 4))]
    perplexity = math.exp(-_mean(values)) if values else None
    return row | {"self_bleu": self_bleu(texts), "repetition": _mean(repeated), "perplexity": perplexity,
                  "tokens": _mean([len(text) for text in texts])}


def self_bleu(texts: list[list[int]]) -> float | None:
    """The mean BLEU of each text against all others; None for a single one, and without the package sacrebleu."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return None
    bleu, words = BLEU(tokenize="none", effective_order=True), [" ".join(map(str, text)) for text in texts if text]
    return _mean([bleu.sentence_score(text, words[:place] + words[place + 1:]).score
                  for place, text in enumerate(words)]) if len(words) > 1 else None


def _ngrams(text, n):
    return [tuple(text[start:start + n]) for start in range(len(text) - n + 1)]


def _mean(values):
    return sum(values) / len(values) if values else None


def sweep_html(rows: list[dict], prompt: str | None) -> str:
    """The figures and the samples as one page without scripts and without anything to fetch."""
    names = [name for name in rows[0] if name not in (*FIGURES, "samples")]
    heads = [name.replace("_", " ") for name in (*names, *FIGURES)]
    figures = table(heads, [[written(row[name]) for name in (*names, *FIGURES)] for row in rows])
    columns = ["settings", *(f"sample {number}" for number in range(1, 1 + max(len(row["samples"]) for row in rows)))]
    samples = table(columns, [[escape(title(row, names)), *(f'<div class="text">{escape(shown(text))}</div>' for text in
                                                          row["samples"])] for row in rows])
    given = f"<p>Prompt: <code>{escape(shown(prompt))}</code></p>" if prompt else "<p>No prompt: new documents.</p>"
    return page("Sweep of sampling", f"{given}\n<h2>Figures</h2>\n{figures}\n<p>{escape(EXPLAINED)}</p>\n"
                f"<h2>Samples</h2>\n{samples}")


def title(row: dict, names: list[str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {written(row[name])}" for name in names) or "as given"


def written(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def shown(text: str) -> str:
    """Text in which what could steer a terminal is written out, but for line breaks and tabs."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
