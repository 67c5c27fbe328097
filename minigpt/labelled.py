"""Tables of texts with labels: CSV and TSV with a header, and JSON Lines; as a data set in memory, and as rows.

    rows = read_table("reviews.csv", ["text"], "label")
    dataset = prepare(config.data, config.tokenizer, classes=[], tokenizer=tokenizer)
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigpt.config import DataConfig, TokenizerConfig
from minigpt.data import Dataset, new_tokenizer
from minigpt.files import expanded, named
from minigpt.shards import Split
from minigpt.tokenizer import Tokenizer

SUFFIXES = (".csv", ".tsv", ".jsonl")
MOST_CLASSES = 1 << 16
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can write and UTF-8 cannot."""


@dataclass(frozen=True)
class Row:
    texts: tuple[str, ...]
    """One, or two of a pair."""
    label: str | None
    """None where no column of labels was asked for."""
    place: str
    """File and line."""


@dataclass(frozen=True)
class LabelledSplit(Split):
    """Texts with labels; as a Split each text, or pair, is a document."""

    texts: tuple[tuple[np.ndarray, np.ndarray | None], ...] = ()
    """(ids, ids of the second of a pair, or None)"""
    labels: np.ndarray | None = None
    """(number of texts,) classes by number."""
    classes: tuple[str, ...] = ()


def read_table(path: str | Path, text_columns: list[str], label_column: str | None) -> list[Row]:
    """The rows of a table. Raises ValueError naming file and line of a missing column, an empty text or a bad line."""
    path = expanded(str(path), "the table")
    columns, rows = [*text_columns, *([label_column] if label_column else [])], []
    for line, values in _records(path):
        place = f"{path}:{line}"
        for column in columns:
            if column not in values:
                raise ValueError(f"{place}: no column {column!r}; there are {', '.join(map(str, values))} (data."
                                 "text_columns and data.label_column name those to read)")
        texts = [values[column] for column in text_columns]
        for column, text in zip(text_columns, texts):
            if not _is_text(text):
                raise ValueError(f"{place}: {column} is empty, or no text; mend the row or leave it out")
        label = values[label_column] if label_column else None
        if label_column:
            label = json.dumps(label) if isinstance(label, int) else label      # true, not Python's True
            if not _is_text(label):
                raise ValueError(f"{place}: {label_column} is empty, or no label (a text, a whole number or a truth "
                                 "value); mend the row or leave it out")
            label = label.strip()
        rows.append(Row(tuple(texts), label, place))
    if not rows:
        raise ValueError(f"{path}: holds no row; give some")
    return rows


def _is_text(value):
    return isinstance(value, str) and value.strip() and not SURROGATE.search(value)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a file of UTF-8 text that are not blank."""
    text = _text(expanded(str(path), "the file")).replace("\r\n", "\n")
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path}: holds no text; give a line for each")
    return lines


def _text(path):
    with named(path):
        content = path.read_bytes()
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8 text") from None


def _records(path) -> Iterator[tuple[int, dict]]:
    """(line, {column: value}) of each row of a file."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: a table is a file that ends in .csv, .tsv or .jsonl; name one")
    text = _text(path)
    if suffix == ".jsonl":
        yield from _objects(path, text)
        return
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))        # a cell may be as long as the file
    is_csv = suffix == ".csv"                           # of TSV a quote is a character like others
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="," if is_csv else "\t", strict=True,
                        quoting=csv.QUOTE_MINIMAL if is_csv else csv.QUOTE_NONE)
    header, line = None, 1
    try:
        for cells in reader:
            if cells and header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise ValueError(f"{path}:{line}: a column stands twice in the header; rename one")
            elif cells:
                if len(cells) != len(header):
                    raise ValueError(f"{path}:{line}: has {len(cells)} cells, the header {len(header)}; mend the row "
                                     "(in CSV a text with a comma in it stands between double quotes)")
                yield line, dict(zip(header, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: not a row of a table ({error}); in CSV a text with quotes stands between "
                         "double quotes, and each of its own is doubled") from None


def _objects(path, text):
    for line, words in enumerate(text.split("\n"), 1):
        if not words.strip():
            continue
        try:
            values = json.loads(words)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ValueError(f"{path}:{line}: no JSON object; write one a line")
        yield line, values


def prepare(data: DataConfig, settings: TokenizerConfig, classes: list[str],
            tokenizer: Tokenizer | None = None) -> Dataset:
    """The texts of the table `data.path`, some of them held out, as LabelledSplits.

    `classes` are their names in order; where none are given, those of the labels to train on, sorted. A tokenizer is
    learnt from the texts where none is given. Raises ValueError naming the place of what cannot be learnt from.
    """
    rows = read_table(data.path, data.text_columns, data.label_column)
    if data.val_path:
        held_out = read_table(data.val_path, data.text_columns, data.label_column)
    else:
        chosen = _held_out(rows, max(1, round(data.val_fraction * len(rows))))
        if not chosen:
            raise ValueError(f"{data.path}: has no two rows of one label, and some must be held out; give more, or "
                             "data.val_path")
        rows, held_out = ([row for number, row in enumerate(rows) if (number in chosen) == wanted]
                          for wanted in (False, True))
    if len(classes) == 1:
        raise ValueError(f"objective.classes = {classes} names one; a classifier tells two apart, or more")
    classes = classes or sorted({row.label for row in rows}, key=_by_number)
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise ValueError(f"{data.path}: {data.label_column} has {len(classes)} labels ({', '.join(classes[:3])}) in "
                         f"the rows to train on; a classifier tells 2 to {MOST_CLASSES} apart")
    if len(set(classes)) < len(classes):
        raise ValueError(f"objective.classes = {classes} names one twice; keep one of them")
    if tokenizer is None:
        tokenizer = new_tokenizer(settings, data.path, lambda: _sample(rows, settings.sample_bytes))
    splits = [split_of(part, classes, tokenizer, f"{data.path} ({name} split)")
              for part, name in ((rows, "train"), (held_out, "val"))]
    content = [[[row.texts, row.label] for row in part] for part in (rows, held_out)]
    digest = hashlib.sha256(json.dumps([content, classes, tokenizer.fingerprint]).encode()).hexdigest()
    return Dataset(digest[:32], data.path, tokenizer, *splits)


def _sample(rows, most):
    """The texts of the first rows, up to so many bytes."""
    for row in rows:
        yield from row.texts
        most -= sum(len(text.encode()) for text in row.texts)
        if most <= 0:
            break


def _held_out(rows, count):
    """The numbers of `count` rows, or fewer, drawn so that the last row of a class is none of them."""
    left, chosen = Counter(row.label for row in rows), set()
    for number in np.random.default_rng(0).permutation(len(rows)).tolist():
        if len(chosen) < count and left[rows[number].label] > 1:
            chosen.add(number)
            left[rows[number].label] -= 1
    return chosen


def _by_number(label):
    """Whole numbers in their order, before other labels in theirs."""
    is_number = label.removeprefix("-").isdecimal() and len(label) < 19
    return (0, int(label), label) if is_number else (1, 0, label)


def split_of(rows: list[Row], classes: list[str], tokenizer: Tokenizer, name: str) -> LabelledSplit:
    """Rows as a split. Raises ValueError naming the place of an unknown label or of a text without a token."""
    numbers = {label: number for number, label in enumerate(classes)}
    for row in rows:
        if row.label not in numbers:
            raise ValueError(f"{row.place}: the label {row.label!r} is unknown; those trained on are "
                             f"{', '.join(classes[:20])}")
    encoded = iter(tokenizer.encode_batch([text for row in rows for text in row.texts]))
    texts, tokens, start = [], [], np.array([tokenizer.roles.document_start], np.int32)
    for row in rows:
        ids = [np.array(next(encoded), np.int32) for _ in row.texts]
        if not all(map(len, ids)):
            raise ValueError(f"{row.place}: the tokenizer has no token for a text; mend the row or leave it out")
        texts.append((ids[0], ids[1] if len(ids) == 2 else None))
        tokens.append(np.concatenate([start, *ids]))
    return LabelledSplit(
        shards=[np.concatenate(tokens)], documents=np.cumsum([0, *map(len, tokens)])[:-1],
        num_bytes=sum(len(text.encode()) for row in rows for text in row.texts), name=name,
        names=tuple(row.place for row in rows), first_bytes=(0,) * len(rows),
        token_sizes=np.array([len(token) for token in tokenizer.token_bytes]), texts=tuple(texts),
        labels=np.array([numbers[row.label] for row in rows]), classes=tuple(classes))


class LabelledRows:
    """The texts of a split as rows that fit the context, in an order that is shuffled each epoch."""

    def __init__(self, split: LabelledSplit, T: int, long_texts: str, seed: int):
        self.split, self.seed, self._epoch = split, seed, None
        self.rows = [(piece, number) for number, text in enumerate(split.texts)
                     for piece in fitted(text, T, long_texts)]
        """(text or pair, its number)"""

    def place(self, number: int) -> int:
        """The row that is training row `number`, a function of the seed and the number."""
        epoch, place = divmod(number, len(self.rows))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            self._epoch = epoch
        return int(self._order[place])

    def source(self, number: int) -> tuple[str, int]:
        """The row of the table that training row `number` is of, as file and line, and byte 0."""
        return self.split.names[self.rows[self.place(number)][1]], 0


def fitted(text: tuple[np.ndarray, np.ndarray | None], T: int, long_texts: str) -> list[tuple]:
    """A text, or pair, as texts or pairs that fit rows of T tokens.

    "truncate" gives one, of a pair with what is longer cut first; "window" all pieces of a single text.
    """
    first, second = text
    if second is None:
        room = T - 2
        pieces = range(0, len(first), room) if long_texts == "window" else [0]
        return [(first[start:start + room], None) for start in pieces]
    room = T - 3
    kept = min(len(first), max(room - len(second), math.ceil(room / 2)))
    return [(first[:kept], second[:room - kept])]


def is_long(text: tuple[np.ndarray, np.ndarray | None], T: int) -> bool:
    """Whether a text, or pair, does not fit a row of T tokens."""
    first, second = text
    return len(first) > T - 2 if second is None else len(first) + len(second) > T - 3
