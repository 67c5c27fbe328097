"""How well a tokenizer compresses texts of many languages and kinds, what comes back, and which tokens are unused."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from minigpt.corpus import list_documents
from minigpt.tokenizer import Tokenizer

TEXTS = Path(__file__).with_name("tokenizer_texts.toml")
EXAMPLES = 20
"""Of the longest and of the unused tokens that are named."""


def find_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a run, a checkpoint, a directory that `Tokenizer.save` wrote, or one of Hugging Face's.

    Raises FileNotFoundError or ValueError naming what is missing or damaged.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no directory {path}; name one that holds a tokenizer")
    for directory in (path, path / "tokenizer"):
        if (directory / "settings.json").exists():
            return Tokenizer.load(directory)
    from minigpt import hf_tokenizer

    found = hf_tokenizer.read(path, hf_tokenizer.json_object(path / "config.json"))
    if found is None:
        raise FileNotFoundError(f"{path}: no tokenizer; name a directory that holds settings.json, or "
                                f"{', '.join(hf_tokenizer.FILES)}")
    return found


def report(tokenizer: Tokenizer, paths: Iterable[str] = ()) -> dict:
    """What the tokenizer makes of the sample texts and of the files of `paths`.

    Gives `kind`, `vocab_size`, `texts` (of each its `name`, `bytes`, `tokens`, `bytes_per_token` in UTF-8, and whether
    it `comes_back` as it was), `longest` tokens, and how many are `unused` in all of these texts, special ones aside,
    with `unused_examples`, the first of them that are longer than a byte.
    """
    counts, rows = Counter(), []
    for name, pieces in (*_samples(), *_files(paths)):
        size, tokens, comes_back = 0, 0, True
        for piece in pieces:
            ids = tokenizer.encode(piece)
            counts.update(ids)
            size, tokens = size + len(piece.encode()), tokens + len(ids)
            comes_back = comes_back and tokenizer.decode(ids) == piece
        rows.append({"name": name, "bytes": size, "tokens": tokens, "bytes_per_token": size / max(1, tokens),
                     "comes_back": comes_back})
    ids = [id for id in range(tokenizer.vocab_size) if not tokenizer.is_special[id]]
    unused = [id for id in ids if not counts[id]]
    longest = sorted(ids, key=lambda id: -len(tokenizer.token_bytes[id]))[:EXAMPLES]
    return {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "texts": rows,
            "longest": _texts(tokenizer, longest), "unused": len(unused), "unused_examples": _texts(
                tokenizer, [id for id in unused if len(tokenizer.token_bytes[id]) > 1][:EXAMPLES])}


def _samples():
    for texts in tomllib.loads(TEXTS.read_text("utf-8")).values():
        for name, text in texts.items():
            yield name, [text]


def _files(paths):
    for path in paths:
        for document in list_documents(path, key="--text"):
            yield document.name, document.pieces()


def _texts(tokenizer, ids):
    return [tokenizer.token_bytes[id].decode("utf-8", errors="backslashreplace") for id in ids]
