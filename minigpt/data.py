"""Text to token shards to batches, with an exact position.

    dataset = prepare(config.data, config.tokenizer)        # cached by content; trains the tokenizer where needed
    dealer = Dealer(dataset.train, context_length, extra=1, order="windows", seed=1)
    tokens = dealer.rows(first=0, count=16)                 # (16, T + 1); row n is a function of the seed and n alone
    name, byte = dealer.source(7)                           # where in the text row 7 begins

The position in the data is one number, the rows dealt so far, so saving it is exact.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigpt.config import DataConfig, TokenizerConfig
from minigpt.corpus import Document, open_corpus
from minigpt.files import expanded, locked, made_whole
from minigpt.shards import FORMAT, Split, open_splits, write_shards
from minigpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Dataset:
    fingerprint: str
    """Of the text, its splits and the tokenizer."""
    name: str
    tokenizer: Tokenizer
    train: Split
    val: Split
    directory: Path | None = None
    """Where the shards are, of a data set that is on disk."""


def cache_directory(configured: str = "") -> Path:
    """`configured`, or `minigpt` in the user's cache directory."""
    return expanded(configured or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/minigpt", "data.cache_dir")


def prepare(data: DataConfig, settings: TokenizerConfig, say=lambda line: None,
            tokenizer: Tokenizer | None = None) -> Dataset:
    """The shards of a corpus, made at the first call and found in the cache by content after that.

    `say` is told, a line each, what takes time. Where no tokenizer is given, `settings` tell which. Raises ValueError
    or FileNotFoundError naming the file at fault.
    """
    corpus = open_corpus(data.path, include=data.include, val_path=data.val_path, val_fraction=data.val_fraction)
    cache = cache_directory(data.cache_dir)
    content = corpus.fingerprint()
    lock = cache / "locks" / _key(content)
    with locked(lock, lambda: say(f"waiting for another process that prepares {corpus.name}")):
        trained = tokenizer or _tokenizer(corpus, content, settings, cache, say)
        key = _key(FORMAT, content, trained.fingerprint)
        directory = cache / "shards" / key
        if directory.exists():
            try:
                return Dataset(key, corpus.name, trained, **open_splits(directory, corpus, trained),
                               directory=directory)
            except ValueError as error:
                say(f"{error}; making the shards again")
        say(f"tokenizing {sum(d.end - d.start for d in corpus.train + corpus.val) / 1e6:.1f} MB of {corpus.name}")
        write_shards(corpus, trained, directory)
        return Dataset(key, corpus.name, trained, **open_splits(directory, corpus, trained), directory=directory)


def _key(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def new_tokenizer(settings: TokenizerConfig, name: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that settings tell of; one that must be learnt is learnt from texts, of what messages call `name`.
    """
    if settings.path:
        return Tokenizer.load(expanded(settings.path, "tokenizer.path"))
    if settings.kind == "bytes":
        return Tokenizer.train((), kind="bytes")
    try:
        return _interruptible(lambda: Tokenizer.train(texts(), vocab_size=settings.vocab_size))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _tokenizer(corpus, content, config, cache, say):
    if config.path or config.kind == "bytes":
        return new_tokenizer(config, corpus.name, tuple)
    directory = cache / "tokenizers" / _key(FORMAT, content, config.kind, config.vocab_size, config.sample_bytes)
    try:
        return Tokenizer.load(directory)
    except FileNotFoundError:
        pass
    except ValueError as error:
        say(f"{error}; training it again")
    say(f"training a tokenizer of {config.vocab_size} tokens on {corpus.name}")
    trained = new_tokenizer(config, corpus.name, lambda: _sample(corpus.train, config.sample_bytes))
    with made_whole(directory) as unfinished:
        trained.save(unfinished)
    return trained


def _interruptible(function):
    """function(), on a thread of its own, so that Ctrl-C is heard while it works outside Python."""
    outcome = {}

    def call():
        try:
            outcome["result"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _sample(documents: tuple[Document, ...], most: int) -> Iterator[str]:
    """All text, or, of more than `most` bytes, pieces evenly spread over it."""
    total = sum(document.end - document.start for document in documents)
    seen = taken = 0
    for document in documents:
        for piece in document.pieces():
            size = len(piece.encode())
            if taken * total <= seen * most:            # the sample has not got ahead of its share of what is seen
                taken += size
                yield piece
            seen += size


class Dealer:
    """Deals training rows of T + `extra` tokens in an order that is a function of the seed.

    Row n belongs to epoch n // rows_per_epoch. With order "windows" an epoch cuts the whole text at a random offset
    into windows that share their first token with the last of the one before, and shuffles them; with "documents" it
    shuffles the documents, strings them together and cuts that.
    """

    def __init__(self, split: Split, length: int, *, extra: int, order: str, seed: int):
        usable = len(split) - extra
        if usable < length:
            raise ValueError(f"{split.name} has {len(split)} tokens, fewer than one context of {length + extra}; "
                             "give more text or a smaller model.context_length")
        self.split, self.length, self.extra, self.order, self.seed = split, length, extra, order, seed
        whole_rows = usable // length if order == "documents" else (usable - length + 1) // length
        self.rows_per_epoch = max(1, whole_rows)                # windows: some room is left, so that offsets differ
        self._offsets = usable - self.rows_per_epoch * length + 1
        self._epoch = None

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows first to first + count - 1, (count, T + extra) int64."""
        return np.stack([self._row(number) for number in range(first, first + count)])

    def source(self, number: int) -> tuple[str, int]:
        """The document in which a row begins, by name, and the byte of its file at which it does.

        A token of several bytes, so also a row, may begin within a character. `<s>` stands where its document begins.
        """
        start = self._start(number)
        if self.order == "documents":
            start += self._shift(int(np.searchsorted(self._stops, start, "right")))
        return self.split.source(start)

    def _row(self, number):
        start = self._start(number)
        read = self.split.read if self.order == "windows" else self._read_documents
        return read(start, start + self.length + self.extra)

    def _start(self, number):
        """Where a row begins in the split, or, with order "documents", in its epoch's string of documents."""
        epoch, row = divmod(number, self.rows_per_epoch)
        if epoch != self._epoch:
            self._deal(epoch)
        return self._offset + int(self._windows[row]) * self.length if self.order == "windows" else row * self.length

    def _deal(self, epoch):
        random = np.random.default_rng([self.seed, epoch])
        if self.order == "windows":
            self._offset = int(random.integers(self._offsets))
            self._windows = random.permutation(self.rows_per_epoch)
        else:
            ends = np.append(self.split.documents[1:], len(self.split))
            order = random.permutation(len(ends))
            self._firsts = self.split.documents[order]
            self._stops = np.cumsum((ends - self.split.documents)[order])
        self._epoch = epoch

    def _read_documents(self, start, stop):
        parts = []
        document = int(np.searchsorted(self._stops, start, "right"))
        while start < stop:
            end = min(stop, int(self._stops[document]))
            shift = self._shift(document)
            parts.append(self.split.read(start + shift, end + shift))
            start, document = end, document + 1
        return np.concatenate(parts)

    def _shift(self, document):
        """What leads from a place in the epoch's string, in its n-th document, to the place in the split."""
        return int(self._firsts[document]) - (int(self._stops[document - 1]) if document else 0)


def in_order(split: Split, length: int, extra: int, batch_size: int, pad: int) -> Iterator[np.ndarray]:
    """The whole split from front to back, (B, T + extra); each token stands in one row (the overlap of `extra` aside).

    The last row is filled up with `pad`.
    """
    starts = range(0, max(1, len(split) - extra), length)
    for first in range(0, len(starts), batch_size):
        batch = starts[first:first + batch_size]
        rows = np.full((len(batch), length + extra), pad, np.int64)
        for row, start in zip(rows, batch):
            tokens = split.read(start, start + length + extra)
            row[:len(tokens)] = tokens
        yield rows
