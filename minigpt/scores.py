"""Numbers that can be compared: bits per byte and perplexity of texts, multiple choice, BLEU, chrF and ROUGE.

    run = minigpt.load("runs/mine")
    rows = score_texts(run, ["book.txt"])
    row = score_choices(run, read_items("questions.jsonl", CHOICES))
    row = score_generation(run, read_items("prompts.jsonl", GENERATION))

Every interval is one of 95 % confidence.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from minigpt import checkpoint
from minigpt.config import SamplingParams
from minigpt.corpus import Document, beginning, list_documents, open_corpus
from minigpt.files import named
from minigpt.masking import IGNORED

Z = 1.959964
"""Of the normal distribution, 95 % lies within so many standard deviations."""
MOST_BYTES = 1 << 18
"""Of a run's held-out text, where no other is given."""
LARGEST_LOG = math.log(sys.float_info.max)
GENERATION = {"prompt": str, "references": list}
CHOICES = {"prompt": str, "choices": list, "answer": int}
"""{key: type} of one JSON object a line."""


@torch.no_grad()
def token_nats(model, ids: np.ndarray, stride: int, batch_size: int) -> np.ndarray:
    """-log p of each of ids[1:], (len(ids) - 1,) float64, given the ids before it, in windows of the context's length.

    A window begins every `stride` ids and scores what none before it has: each id is scored once, with at least
    context_length - stride ids before it, or all that there are.
    """
    T, device, total = model.config.context_length, model.device, len(ids) - 1
    starts = range(0, max(1, total - T + stride), stride)
    nats = np.empty(total)
    if not total:
        return nats
    for first in range(0, len(starts), batch_size):
        batch = starts[first:first + batch_size]
        inputs = torch.zeros(len(batch), min(T, total), dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        for row, start in enumerate(batch):
            end, scored = min(start + T, total), start + T - stride if start else 0
            inputs[row, :end - start] = torch.from_numpy(ids[start:end].astype(np.int64))
            targets[row, scored - start:end - start] = torch.from_numpy(ids[scored + 1:end + 1].astype(np.int64))
        chosen = (targets != IGNORED).to(device)
        losses = model.head.loss(model.hidden(inputs.to(device))[chosen], targets.to(device)[chosen], reduction="none")
        begin = batch[0] + T - stride if batch[0] else 0
        nats[begin:begin + len(losses)] = losses.double().cpu().numpy()
    return nats


def score_texts(run, paths: Iterable[str], **options) -> list[dict]:
    """`score_documents` of files or folders of UTF-8 text."""
    return score_documents(run, (document for path in paths for document in list_documents(path, key="--text")),
                           **options)


def measured_on(run, paths: list[str]) -> list[Document]:
    """The files of `paths`, or the beginning of the text that was held out when the run was trained.

    Raises ValueError where there is neither.
    """
    if paths:
        return [document for path in paths for document in list_documents(path, key="--text")]
    data = run.config.data
    try:
        if "imported" in checkpoint.find(run.path).state:
            raise ValueError("it was imported")
        if "classification" in run.config.objective.parts:
            raise ValueError("it was trained on a table")
        held_out = open_corpus(data.path, include=data.include, val_path=data.val_path, val_fraction=data.val_fraction)
    except (OSError, ValueError) as error:
        raise ValueError(f"{run.path}: there is no text to measure it on ({error}); give some by --text") from None
    return beginning(held_out.val, MOST_BYTES)


def score_documents(run, documents: Iterable[Document], *, stride: int = 0, batch_size: int = 8) -> list[dict]:
    """For each file, and last for all of them together: bytes, tokens, bits per byte and perplexity, with intervals.

    bits per byte = sum of -log2 p over all tokens / UTF-8 bytes of the raw text; perplexity = exp of the mean -log p of
    a token. The first token is predicted from what starts a document. `stride` (0: half the context) is that of
    `token_nats`. Intervals take the windows as independent samples of a ratio (Cochran, Sampling Techniques, 6.4);
    None for fewer than two. Raises ValueError for a stride beyond the context and a text that is not UTF-8.
    """
    must_be_causal(run)
    T = run.model.config.context_length
    stride = stride or max(1, T // 2)
    if not 1 <= stride <= T:
        raise ValueError(f"a stride of {stride} is not between 1 and the context of {T} tokens")
    rows, windows = [], []
    for document in documents:
        ids = [run.tokenizer.roles.document_start]
        for piece in document.pieces():
            ids += run.tokenizer.encode(piece)
        if len(ids) == 1 or run.tokenizer.is_special[ids[1:]].any():
            raise ValueError(f"{document.path}: the tokenizer has no token for some of it, so that bits per byte would "
                             "leave that out; take another text or a tokenizer that has every byte")
        sizes = np.array([len(run.tokenizer.token_bytes[id]) for id in ids[1:]], float)
        nats = token_nats(run.model, np.array(ids), stride, batch_size)
        sizes *= (document.end - document.start) / sizes.sum()      # a tokenizer may change the text, and so its bytes
        cuts = np.arange(0, len(nats), stride)
        windows.append(np.stack([np.add.reduceat(x, cuts) for x in (nats, sizes, np.ones(len(nats)))]))
        rows.append({"file": document.name} | _text_row(windows[-1]))
    if len(rows) > 1:
        rows.append({"file": "all"} | _text_row(np.concatenate(windows, axis=1)))
    return rows


def _text_row(windows):
    nats, sizes, tokens = windows
    bits, bits_interval = ratio(nats / math.log(2), sizes)
    mean, mean_interval = ratio(nats, tokens)
    return {"bytes": round(sizes.sum()), "tokens": int(tokens.sum()), "bits_per_byte": bits,
            "bits_per_byte_interval": bits_interval, "perplexity": _exp(mean),
            "perplexity_interval": mean_interval and [_exp(end) for end in mean_interval]}


def _exp(x):
    """None beyond the largest number."""
    return math.exp(x) if x < LARGEST_LOG else None


def ratio(x: np.ndarray, y: np.ndarray) -> tuple[float, list[float] | None]:
    """sum x / sum y over samples (n,), and its interval by the variance of the residuals x - ratio · y."""
    value, n = x.sum() / y.sum(), len(x)
    if n < 2:
        return float(value), None
    error = Z * math.sqrt(n / (n - 1) * np.square(x - value * y).sum()) / y.sum()
    return float(value), [float(value - error), float(value + error)]


def proportion(hits: int, n: int) -> tuple[float, list[float]]:
    """hits / n and its Wilson interval (Wilson, 1927)."""
    p, spread = hits / n, Z * Z / n
    middle, half = p + spread / 2, Z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return p, [(middle - half) / (1 + spread), (middle + half) / (1 + spread)]


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context, with what stands before a prompt, and of what follows it.

    Both are encoded as one text; spaces at the end of the context count as the beginning of what follows. An empty
    context is the start of a document. Raises ValueError where nothing follows.
    """
    kept = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    before = tokenizer.encode(kept) if kept else []
    if len(whole) <= len(before):
        raise ValueError(f"{continuation!r} is empty, or adds no token to what stands before it; give a longer text")
    roles = tokenizer.roles
    start = roles.prompt_start if before else roles.prompt_start or [roles.document_start]
    return [*start, *whole[:len(before)]], whole[len(before):]


@torch.no_grad()
def log_likelihoods(model, pairs: list[tuple[list[int], list[int]]], batch_size: int) -> list[tuple[float, bool]]:
    """For each (context ids, following ids): log p of what follows, and whether it is what greedy decoding gives.

    Of a context too long for the model its end is taken. Raises ValueError where what follows does not fit alone.
    """
    T, device = model.config.context_length, model.device
    for pair in pairs:
        check_fits(model, pair)
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][0]) - len(pairs[index][1]))
    results = [None] * len(pairs)
    for first in range(0, len(order), batch_size):
        batch = order[first:first + batch_size]
        rows = [(before + after)[-T - 1:] for before, after in map(pairs.__getitem__, batch)]
        inputs = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
        for row, ids in enumerate(rows):
            inputs[row, :len(ids) - 1] = torch.tensor(ids[:-1])
        hidden = model.hidden(inputs.to(device))
        for row, index in enumerate(batch):
            after = pairs[index][1]
            end = len(rows[row]) - 1
            logits = model.head(hidden[row, end - len(after):end]).float().log_softmax(-1)              # (n, V)
            targets = torch.tensor(after, device=device)
            total = logits.gather(1, targets[:, None]).double().sum().item()
            results[index] = total, bool((logits.argmax(-1) == targets).all())
    return results


def check_fits(model, pair: tuple[list[int], list[int]]) -> None:
    """Raise ValueError where what follows a context does not fit the model's own alone."""
    if len(pair[1]) > model.config.context_length:
        raise ValueError(f"a text of {len(pair[1])} tokens does not fit the context of {model.config.context_length}; "
                         "give a shorter one")


@contextmanager
def _place(item):
    """A ValueError in this block names the file and the line of an item."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{item['place']}: {error}" if "place" in item else str(error)) from None


def score_choices(run, items: list[dict], *, batch_size: int = 8) -> dict:
    """Multiple choice: how often the likeliest choice is the answer, by log p and by log p per UTF-8 byte of it."""
    must_be_causal(run)
    pairs = []
    for item in items:
        with _place(item):
            for choice in item["choices"]:
                pairs.append(encode_pair(run.tokenizer, item["prompt"], choice))
                check_fits(run.model, pairs[-1])
    found = iter(log_likelihoods(run.model, pairs, batch_size))
    hits = [0, 0]
    for item in items:
        logs = np.array([next(found)[0] for _ in item["choices"]])
        sizes = [len(choice.encode()) for choice in item["choices"]]
        for which, score in enumerate((logs, logs / sizes)):
            hits[which] += int(score.argmax()) == item["answer"]
    row = {"questions": len(items)}
    for name, count in zip(("accuracy", "accuracy_per_byte"), hits):
        row[name], row[f"{name}_interval"] = proportion(count, len(items))
    return row


def score_generation(run, items: list[dict], max_new_tokens: int = 128) -> dict:
    """Continue each prompt with the likeliest tokens and compare with its references; see `compare`."""
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    outputs = []
    for item in items:
        with _place(item):
            outputs.append(run.generate(item["prompt"], params))
    return compare(outputs, [item["references"] for item in items])


def compare(outputs: list[str], references: list[list[str]]) -> dict:
    """Corpus BLEU and chrF (sacrebleu, whose signature is given) and the mean F-measure of ROUGE-1, 2 and L.

    Each output has one or more references; of ROUGE its best counts. Scores are from 0 to 100. Intervals of BLEU and
    chrF are by bootstrap. Raises ValueError where the packages are missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ValueError(f"scores of generated text need the package {error.name}; install it with pip install "
                         "'minigpt[eval]'") from None
    row, most = {"outputs": len(outputs)}, max(map(len, references))
    streams = [[given[number] if number < len(given) else None for given in references] for number in range(most)]
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        many = len(outputs) > 1
        score = metric.corpus_score(outputs, streams, n_bootstrap=1000) if many else metric.corpus_score(
            outputs, streams)
        row[name], row[f"{name}_signature"] = score.score, str(metric.get_signature())
        row[f"{name}_interval"] = [score._mean - score._ci, score._mean + score._ci] if many else None
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    found = [scorer.score_multi(given, output) for given, output in zip(references, outputs)]
    for name in scorer.rouge_types:
        scores = np.array([100 * score[name].fmeasure for score in found])
        row[name], row[f"{name}_interval"] = ratio(scores, np.ones(len(scores)))
    return row


def read_items(path: str | Path, keys: dict[str, type]) -> list[dict]:
    """The objects of a JSON Lines file, each with those keys. Raises ValueError naming the line and what it must be."""
    path, items = Path(path), []
    with named(path):
        lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            for key, kind in keys.items():
                if type(item[key]) is not kind:
                    raise TypeError
            for text in (text for key in ("references", "choices") for text in item.get(key, ())):
                text.encode()
            if keys is CHOICES and not 0 <= item["answer"] < len(item["choices"]) or [] in item.values():
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            wanted = ", ".join(f"{key} ({kind.__name__})" for key, kind in keys.items())
            raise ValueError(f"{path}:{number}: must be a JSON object with {wanted}; texts in the lists, and an answer "
                             "is the place of a choice, from 0") from None
        items.append(item | {"place": f"{path}:{number}"})
    if not items:
        raise ValueError(f"{path}: holds no item; give a JSON object a line")
    return items


def must_be_causal(run) -> None:
    """Raise ValueError where a run gives no text a probability."""
    if run.tokenizer is None:
        raise ValueError(f"{run.path}: has no tokenizer; import it again with --tokenizer DIR")
    if not run.config.objective.is_causal:
        raise ValueError(f"{run.path}: trained with the objective {run.config.objective.name!r}; only a causal model "
                         "gives the probability of a text")
