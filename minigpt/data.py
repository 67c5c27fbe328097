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
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from minigpt.config import DataConfig, TokenizerConfig
from minigpt.corpus import Corpus, Document, open_corpus
from minigpt.files import expanded, locked, read_sealed, sha256_of, write_sealed
from minigpt.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 26
ENCODE_BYTES = 1 << 22
"""Text that is tokenized at a time: enough to keep every core busy, little enough for memory."""
FORMAT = 2
INDEX = "index.json"
BLOCK_TOKENS = 1 << 16
"""Tokens between two places of a split whose byte counts are kept."""


@dataclass(frozen=True)
class Split:
    """One split's tokens, memory-mapped. Every document begins with <s>."""

    shards: list[np.memmap]
    documents: np.ndarray
    """(number of documents,) the token offset where each begins."""
    num_bytes: int
    """UTF-8 bytes of the raw text."""
    name: str = "the text"
    """What messages call it."""
    names: tuple[str, ...] = ()
    """Each document's file: its path in the folder that was given, or the name of the file that was."""
    first_bytes: tuple[int, ...] = ()
    """The byte of its file at which each document begins."""
    token_sizes: np.ndarray | None = None
    """(vocab_size,) how many bytes of text each token stands for."""

    def __post_init__(self):
        object.__setattr__(self, "_starts", np.cumsum([0, *map(len, self.shards)]))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64, across shards."""
        parts = []
        for shard, (first, last) in zip(self.shards, pairwise(self._starts)):
            if start < last and stop > first:
                parts.append(shard[max(0, start - first):stop - first].astype(np.int64))
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def source(self, token: int) -> tuple[str, int]:
        """The document in which the token at an offset stands, by name, and the byte of its file where it begins."""
        document = int(np.searchsorted(self.documents, token, "right")) - 1
        before = self._bytes_before(token) - self._bytes_before(int(self.documents[document]))
        return self.names[document], self.first_bytes[document] + before

    def _bytes_before(self, token):
        block = token // BLOCK_TOKENS
        return int(self._block_bytes[block]) + self._num_bytes_of(block * BLOCK_TOKENS, token)

    @cached_property
    def _block_bytes(self):
        starts = range(0, len(self), BLOCK_TOKENS)
        return np.cumsum([0, *(self._num_bytes_of(start, start + BLOCK_TOKENS) for start in starts)])

    def _num_bytes_of(self, start, stop):
        return int(self.token_sizes[self.read(start, stop)].sum())


@dataclass(frozen=True)
class Dataset:
    directory: Path
    name: str
    tokenizer: Tokenizer
    train: Split
    val: Split


def cache_directory(configured: str = "") -> Path:
    """`configured`, or `minigpt` in the user's cache directory."""
    return expanded(configured or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/minigpt", "data.cache_dir")


def prepare(data: DataConfig, tokenizer: TokenizerConfig, say=lambda line: None) -> Dataset:
    """The shards of a corpus, made at the first call and found in the cache by content after that.

    `say` is told, a line each, what takes time. Raises ValueError or FileNotFoundError naming the file at fault.
    """
    corpus = open_corpus(data.path, include=data.include, val_path=data.val_path, val_fraction=data.val_fraction)
    cache = cache_directory(data.cache_dir)
    content = corpus.fingerprint()
    lock = cache / "locks" / _key(content)
    with locked(lock, lambda: say(f"waiting for another process that prepares {corpus.name}")):
        trained = _tokenizer(corpus, content, tokenizer, cache, say)
        directory = cache / "shards" / _key(FORMAT, content, trained.fingerprint)
        if directory.exists():
            try:
                return _open(directory, corpus, trained)
            except ValueError as error:
                say(f"{error}; making the shards again")
        say(f"tokenizing {sum(d.end - d.start for d in corpus.train + corpus.val) / 1e6:.1f} MB of {corpus.name}")
        _write_shards(corpus, trained, directory)
        return _open(directory, corpus, trained)


def _key(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _tokenizer(corpus, content, config, cache, say):
    if config.path:
        return Tokenizer.load(expanded(config.path, "tokenizer.path"))
    if config.kind == "bytes":
        return Tokenizer.train((), kind="bytes")
    directory = cache / "tokenizers" / _key(FORMAT, content, config.kind, config.vocab_size, config.sample_bytes)
    try:
        return Tokenizer.load(directory)
    except FileNotFoundError:
        pass
    except ValueError as error:
        say(f"{error}; training it again")
    say(f"training a tokenizer of {config.vocab_size} tokens on {corpus.name}")
    try:
        trained = _interruptible(lambda: Tokenizer.train(_sample(corpus.train, config.sample_bytes),
                                                         vocab_size=config.vocab_size))
    except ValueError as error:
        raise ValueError(f"{corpus.name}: {error}") from None
    with _finished(directory) as unfinished:
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


class _finished:
    """A directory that appears under its name only when the block has ended well; one process at a time makes it."""

    def __init__(self, directory):
        self.directory = directory
        self.unfinished = directory.with_name(f".{directory.name}")

    def __enter__(self):
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished.mkdir(parents=True)
        return self.unfinished

    def __exit__(self, kind, error, traceback):
        if kind is None:
            shutil.rmtree(self.directory, ignore_errors=True)
            os.replace(self.unfinished, self.directory)
        else:
            shutil.rmtree(self.unfinished, ignore_errors=True)


def _write_shards(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> None:
    dtype = _dtype(tokenizer.vocab_size)
    with _finished(directory) as unfinished:
        index = {"format": FORMAT, "dtype": dtype.name, "byte_order": "little", "tokenizer": tokenizer.fingerprint,
                 "vocab_size": tokenizer.vocab_size, "splits": {}}
        for split, documents in (("train", corpus.train), ("val", corpus.val)):
            index["splits"][split] = _write_split(documents, tokenizer, dtype, unfinished, split)
        write_sealed(unfinished / INDEX, index)


def _dtype(vocab_size):
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _shard_name(split, number):
    return f"{split}-{number:05d}.bin"


def _write_split(documents, tokenizer, dtype, directory, split):
    shards, starts, total = [], [], 0
    file = None
    for starts_document, ids in _encoded(documents, tokenizer):
        tokens = np.array([tokenizer.document_start] * starts_document + ids, dtype)
        if starts_document:
            starts.append(total)
        total += len(tokens)
        while len(tokens):
            if file is None:
                shards.append({"file": _shard_name(split, len(shards)), "tokens": 0})
                file, digest = open(directory / shards[-1]["file"], "wb"), hashlib.sha256()
            room = SHARD_TOKENS - shards[-1]["tokens"]
            block = tokens[:room].tobytes()
            file.write(block)
            digest.update(block)
            shards[-1]["tokens"] += min(room, len(tokens))
            shards[-1]["sha256"] = digest.hexdigest()
            tokens = tokens[room:]
            if shards[-1]["tokens"] == SHARD_TOKENS:
                file.close()
                file = None
    if file is not None:
        file.close()
    return {"tokens": total, "bytes": sum(d.end - d.start for d in documents), "documents": starts, "shards": shards}


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[bool, list[int]]]:
    """(whether a document starts here, ids) for each piece of text, encoded a few megabytes at a time on every core."""
    pieces, size = [], 0
    for document in documents:
        for number, piece in enumerate(document.pieces()):
            pieces.append((number == 0, piece))
            size += len(piece)
            if size >= ENCODE_BYTES:
                yield from zip([first for first, _ in pieces], tokenizer.encode_batch([text for _, text in pieces]))
                pieces, size = [], 0
    yield from zip([first for first, _ in pieces], tokenizer.encode_batch([text for _, text in pieces]))


def _open(directory: Path, corpus: Corpus, tokenizer: Tokenizer) -> Dataset:
    index = read_index(directory)
    if (index["tokenizer"], index["vocab_size"]) != (tokenizer.fingerprint, tokenizer.vocab_size):
        raise ValueError(f"{directory / INDEX}: made with another tokenizer, {index['tokenizer']!r}")
    token_sizes = np.array([len(token) for token in tokenizer.token_bytes])
    splits = {}
    for name, documents in (("train", corpus.train), ("val", corpus.val)):
        split = index["splits"][name]
        num_bytes = sum(document.end - document.start for document in documents)
        if (len(split["documents"]), split["bytes"]) != (len(documents), num_bytes):
            raise ValueError(f"{directory / INDEX}: {name} has {len(split['documents'])} documents of {split['bytes']} "
                             f"bytes, the text {len(documents)} of {num_bytes}")
        shards = [open_shard(directory, index, shard) for shard in split["shards"]]
        splits[name] = Split(shards, np.array(split["documents"], np.int64), num_bytes,
                             f"{corpus.name} ({name} split)", tuple(document.name for document in documents),
                             tuple(document.start for document in documents), token_sizes)
    return Dataset(directory, corpus.name, tokenizer, **splits)


def read_index(directory: Path) -> dict:
    """What index.json says of a data set, none of it impossible. Raises ValueError naming the file and what is wrong.

    Whether the shards are what it says, `open_shard` tells.
    """
    path = directory / INDEX
    try:
        index = read_sealed(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    try:
        _check_index(index)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of this version ({error!r})") from None
    return index


def _check_index(index):
    if index["format"] != FORMAT:
        raise ValueError(f"format {index['format']!r}; this version reads {FORMAT}")
    _check_count("vocab_size", index["vocab_size"])
    for key, value in (("dtype", _dtype(index["vocab_size"]).name), ("byte_order", "little")):
        if index[key] != value:
            raise ValueError(f"{key} is {index[key]!r}, not {value!r}")
    if not isinstance(index["tokenizer"], str):
        raise ValueError(f"tokenizer {index['tokenizer']!r}; it must be text")
    if index["splits"].keys() != {"train", "val"}:
        raise ValueError(f"the splits {sorted(index['splits'])}; it must have train and val")
    for name, split in index["splits"].items():
        _check_split(name, **split)


def _check_split(name, tokens, bytes, documents, shards):
    for number, shard in enumerate(shards):
        _check_shard(_shard_name(name, number), **shard)
    _check_count(f"{name} bytes", bytes)
    if tokens != sum(shard["tokens"] for shard in shards):
        raise ValueError(f"{name} tokens {tokens!r}, not the sum of its shards'")
    whole = all(type(start) is int for start in documents)
    if not whole or documents[0] != 0 or any(start >= end for start, end in pairwise([*documents, tokens])):
        raise ValueError(f"{name} documents do not begin at whole numbers that increase from 0 to less than {tokens}")


def _check_shard(name, file, tokens, sha256):
    if file != name:
        raise ValueError(f"a shard {file!r} in the place of {name}")
    _check_count(f"{name} tokens", tokens)
    if not isinstance(sha256, str):
        raise ValueError(f"{name} sha256 {sha256!r}; it must be text")


def _check_count(what, number):
    if type(number) is not int or number < 1:
        raise ValueError(f"{what} {number!r}; it must be a whole number above 0")


def open_shard(directory: Path, index: dict, shard: dict) -> np.memmap:
    """The tokens of a shard, each byte of it checked. Raises ValueError naming the file and what is wrong."""
    path, dtype = directory / shard["file"], _dtype(index["vocab_size"])
    size = shard["tokens"] * dtype.itemsize
    if not path.is_file():
        raise ValueError(f"{path}: {'not a file' if path.exists() else 'missing'}")
    if path.stat().st_size != size:
        raise ValueError(f"{path}: damaged, its size is {path.stat().st_size} bytes and not the index's {size}")
    if sha256_of(path) != shard["sha256"]:
        raise ValueError(f"{path}: damaged, its SHA-256 is not the index's")
    tokens = np.memmap(path, dtype, "r")
    if tokens.max() >= index["vocab_size"]:
        raise ValueError(f"{path}: token {tokens.max()} is none of the vocabulary's {index['vocab_size']}")
    return tokens


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
