"""Where text comes from: a file, a folder of files or the standard library, as documents in two splits.

A document is a byte range of a file and is read in pieces, so that memory does not grow with the corpus. A folder's
files are whole documents; a single file gives one document for training, its first part, and one for validation.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

PIECE_BYTES = 1 << 20
NO_STDLIB_DIRS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    path: Path
    name: str
    """Path relative to the folder that was given; decides the order and the split."""
    start: int
    end: int
    """Bytes [start, end) of the file."""

    def pieces(self) -> Iterator[str]:
        """The text in pieces of at most PIECE_BYTES, cut after a newline where there is one, else between characters.

        Raises ValueError naming file and byte where the text is not UTF-8.
        """
        with open(self.path, "rb") as file:
            file.seek(self.start)
            position, rest = self.start, b""
            while position < self.end:
                size = min(PIECE_BYTES, self.end - position)
                block = rest + file.read(size - len(rest))
                if len(block) < size:
                    raise ValueError(f"{self.path}: shrank while it was read; start again")
                cut = size if position + size == self.end else _cut(block)
                try:
                    yield block[:cut].decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{self.path}: byte {position + error.start} is not UTF-8; convert the file or "
                                     "leave it out (in training with data.include)") from None
                position, rest = position + cut, block[cut:]


def _cut(block):
    newline = block.rfind(b"\n", len(block) // 2)
    if newline >= 0:
        return newline + 1
    for back in range(1, 4):                            # a character that is cut begins at most 3 bytes before the end
        if block[-back] >= 0xC0:
            return len(block) - back
        if block[-back] < 0x80:
            break
    return len(block)


@dataclass(frozen=True)
class Corpus:
    name: str
    train: tuple[Document, ...]
    val: tuple[Document, ...]

    def fingerprint(self) -> str:
        """SHA-256 of both splits' contents; on the way every byte is checked to be UTF-8."""
        digest = hashlib.sha256()
        for split, documents in (("train", self.train), ("val", self.val)):
            for document in documents:
                digest.update(f"{split} {document.end - document.start}\n".encode())
                for piece in document.pieces():
                    digest.update(piece.encode())
        return digest.hexdigest()


def open_corpus(path: str, *, include=("*",), val_path="", val_fraction=0.1) -> Corpus:
    """The documents of `path` (a file, a folder or "stdlib") in two splits.

    With `val_path` that text is the validation split, and its files are no training text. Else, of several documents,
    each in the order of their names' SHA-256 is held out that brings the held-out bytes nearer to `val_fraction`; of a
    single document its last `val_fraction` is. Raises FileNotFoundError or ValueError naming the path.
    """
    documents = list_documents(path, include)
    if val_path:
        val = list_documents(val_path, include, "data.val_path")
        held_out = {document.path.resolve() for document in val}
        train = [document for document in documents if document.path.resolve() not in held_out]
        if not train:
            raise ValueError(f"{path}: all of it is validation text, being in {val_path} too; change data.val_path")
        return Corpus(path, tuple(train), tuple(val))
    total = sum(document.end for document in documents)
    if len(documents) == 1:
        train, val = _split_one(documents[0], val_fraction)
        return Corpus(path, (train,), (val,))
    target, held, val = val_fraction * total, 0, set()
    for document in sorted(documents, key=lambda d: hashlib.sha256(os.fsencode(d.name)).digest()):
        if abs(held + document.end - target) < abs(held - target) and len(val) < len(documents) - 1:
            val.add(document)
            held += document.end
    val = val or {min(documents, key=lambda document: document.end)}
    return Corpus(path, tuple(d for d in documents if d not in val), tuple(d for d in documents if d in val))


def _split_one(document, val_fraction):
    cut = _between_characters(document.path, document.end - int(document.end * val_fraction))
    if not 0 < cut < document.end:
        raise ValueError(f"{document.path}: {document.end} bytes are too few to hold out {val_fraction:g} of them; "
                         "give more text or data.val_path")
    return Document(document.path, document.name, 0, cut), Document(document.path, document.name, cut, document.end)


def beginning(documents: Iterable[Document], most: int) -> list[Document]:
    """The first `most` bytes of some documents, or a few more, to the end of a character."""
    found = []
    for document in documents:
        end = min(document.end, _between_characters(document.path, document.start + most))
        found.append(replace(document, end=end))
        most -= end - document.start
        if most <= 0:
            break
    return found


def _between_characters(path, position):
    with open(path, "rb") as file:
        file.seek(position)
        return position + sum(1 for _ in _continuation(file.read(4)))


def _continuation(data):
    for byte in data:
        if byte & 0xC0 != 0x80:
            return
        yield byte


def list_documents(path: str, include=("*",), key="data.path") -> list[Document]:
    """The files of `path`, sorted by name; each is one whole document. Empty files raise, naming the file.

    `key` is the setting that named the path, for messages.
    """
    if path == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(name for name in _walk(root, NO_STDLIB_DIRS) if name.endswith(".py"))
        names = [name for name in names if (root / name).stat().st_size]
        hint = f"this Python has no library sources; give a file or folder as {key}"
    else:
        root = Path(os.path.expanduser(path))
        if root.is_file():
            root, names = root.parent, [root.name]
        elif root.is_dir():
            names = sorted(name for name in _walk(root) if _included(name, include))
        else:
            what = ("neither a file nor a folder" if root.exists() else "a broken link" if root.is_symlink()
                    else "no such file or folder")
            raise FileNotFoundError(f"{key} = {path!r}: {what}; name a file or folder of UTF-8 text")
        hint = f"no file in it matches data.include = {list(include)}"
    if not names:
        raise ValueError(f"{path}: {hint}")
    documents = []
    for name in names:
        size = (root / name).stat().st_size
        if size == 0:
            raise ValueError(f"{root / name}: the file is empty; remove it or leave it out (in training with "
                             "data.include)")
        documents.append(Document(root / name, name, 0, size))
    return documents


def _walk(root, skipped=()):
    def fail(error):
        raise error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        for name in files:
            path = Path(folder) / name
            if not name.startswith(".") and (path.is_file() or not path.exists()):  # a broken link is an error, later
                yield path.relative_to(root).as_posix()


def _included(name, patterns):
    return any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(Path(name).name, pattern) for pattern in patterns)
