"""Token shards on disk: little-endian `.bin` files and `index.json`, every byte of them checked before it is used.

    write_shards(corpus, tokenizer, directory)
    splits = open_splits(directory, corpus, tokenizer)      # {"train": Split, "val": Split}
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from minigpt.corpus import Corpus, Document
from minigpt.files import made_whole, read_sealed, sha256_of, write_sealed
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


def write_shards(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> None:
    """Tokenize a corpus into a data set that appears in `directory` when it is whole."""
    dtype = _dtype(tokenizer.vocab_size)
    with made_whole(directory) as unfinished:
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
        tokens = np.array([tokenizer.roles.document_start] * starts_document + ids, dtype)
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


def open_splits(directory: Path, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Split]:
    """A data set's splits. Raises ValueError naming the file that is not whole or not of this corpus and tokenizer."""
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
    return splits


def read_index(directory: Path) -> dict:
    """What index.json says of a data set, none of it impossible. Raises ValueError naming the file and what is wrong.

    Whether the shards are what it says, `open_shard` tells.
    """
    path = directory / INDEX
    try:
        index = read_sealed(path, most_bytes=1 << 34)
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
