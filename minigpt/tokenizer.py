"""Text to token ids and back, without loss: SentencePiece BPE with byte fallback, and plain bytes.

Ids 0 to 4 are the special tokens, ids 5 to 260 the 256 bytes; a BPE vocabulary goes on with characters and merges.
Special tokens never come out of plain text. `decode` joins the bytes that every id stands for.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np

from minigpt.files import write_durably

SPECIAL_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<mask>": 4}
"""<s> starts a document and so also ends the one before it; </s> ends a segment; <unk> is never produced."""
END_TOKENS = (SPECIAL_TOKENS["<s>"], SPECIAL_TOKENS["</s>"])
FIRST_BYTE = len(SPECIAL_TOKENS)
MIN_VOCAB_SIZE = FIRST_BYTE + 256 + 1
SPACE = "\u2581"
"""SentencePiece writes a space as this character, so the character itself is encoded as its three bytes."""
SPACE_BYTES = [FIRST_BYTE + byte for byte in SPACE.encode()]
RESERVED = "\0\t\u2581\u2585"
"""SentencePiece's trainer drops or splits texts with these; it is given the text between them."""
MAX_ENCODE_CHARS = 1 << 20
"""Longer texts are encoded in pieces of this many characters, cut after a newline where one is near."""


class Tokenizer:
    """A trained tokenizer: make one with `Tokenizer.train` or `Tokenizer.load`.

    Attributes: `kind` ("bpe" or "bytes"), `vocab_size`, `special_tokens` {name: id}, `fingerprint` (SHA-256 in
    hexadecimal of what decides every encoding), `token_bytes` (for each id the bytes it stands for, empty for
    special tokens), `is_special` (vocab_size,) bool, `end_tokens`, each of which, sampled, ends a text.
    """

    def __init__(self, kind: str, model: bytes = b""):
        if kind not in ("bpe", "bytes"):
            raise ValueError(f"tokenizer kind {kind!r} is none of: bpe, bytes")
        self.kind = kind
        self.special_tokens = dict(SPECIAL_TOKENS)
        self.document_start = SPECIAL_TOKENS["<s>"]
        self._model = model
        self.fingerprint = hashlib.sha256(kind.encode() + b"\0" + model).hexdigest()
        single_bytes = [bytes([value]) for value in range(256)]
        self.token_bytes = [b""] * FIRST_BYTE + single_bytes
        if kind == "bpe":
            self._processor = _processor(model)
            pieces = map(self._processor.id_to_piece, range(len(self.token_bytes), self._processor.get_piece_size()))
            self.token_bytes += [piece.replace(SPACE, " ").encode() for piece in pieces]
        self.vocab_size = len(self.token_bytes)
        self.is_special = np.arange(self.vocab_size) < FIRST_BYTE
        self.end_tokens = END_TOKENS

    @property
    def never_sampled(self) -> np.ndarray:
        """(vocab_size,) bool: special tokens that do not end a text."""
        never = self.is_special.copy()
        never[list(self.end_tokens)] = False
        return never

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int = 4096, kind: str = "bpe") -> Tokenizer:
        """Learn a vocabulary of exactly `vocab_size` ids from whole documents (kind "bytes" learns nothing).

        Byte-pair encoding (arXiv 1508.07909) within words, a word being a run of non-spaces with the space before
        it, or a run of spaces; newlines and scripts do not split a word. Raises ValueError where `vocab_size` is out
        of the range that the text allows, with that range.
        """
        if kind != "bpe":
            return cls(kind)
        if vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(f"vocab_size = {vocab_size} is too small; the least is {MIN_VOCAB_SIZE} "
                             f"({FIRST_BYTE} special tokens, 256 bytes and one character)")
        if isinstance(documents, str):
            raise ValueError("Tokenizer.train takes documents, each a str; put a single text in a list")
        encoded, characters = [], Counter()
        for document in documents:                      # kept as UTF-8: one emoji makes a str 4 bytes a character
            encoded.append(_valid(document).encode())
            characters.update(document)
        for character in RESERVED:
            del characters[character]
        if not characters:
            raise ValueError("the text has no characters to learn a tokenizer from (tabs and NULs are always bytes); "
                             "use tokenizer.kind=bytes or another text")
        encoded.append(b" ")                            # a space without an id would come back as SPACE
        for kept in _kept(characters, vocab_size):
            left_out = re.compile("[" + re.escape("".join(characters.keys() - kept)) + RESERVED + "]")
            texts = (part for document in encoded for part in left_out.split(document.decode()) if part)
            tokenizer = cls("bpe", _train_sentencepiece(texts, vocab_size))
            if tokenizer.vocab_size == vocab_size:
                break
        else:
            raise ValueError(f"vocab_size = {vocab_size} is too large for this text of {sum(characters.values())} "
                             f"characters; possible are {MIN_VOCAB_SIZE} to {tokenizer.vocab_size}")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of a text; `decode` gives the very same text back. A lone surrogate raises ValueError."""
        if self.kind == "bpe" and len(_valid(text)) <= MAX_ENCODE_CHARS and SPACE not in text:
            return self._processor.encode(text)         # without the thread that a batch is handed to
        return self.encode_batch([text], num_threads=1)[0]

    def encode_batch(self, texts: list[str], num_threads: int = 0) -> list[list[int]]:
        """The ids of each text, on `num_threads` threads (0: every core)."""
        texts = [_valid(text) for text in texts]
        if self.kind == "bytes":
            return [[byte + FIRST_BYTE for byte in text.encode()] for text in texts]
        if any(len(text) > MAX_ENCODE_CHARS or SPACE in text for text in texts):
            return self._encode_in_parts(texts, num_threads or os.cpu_count())
        return self._processor.encode(texts, num_threads=num_threads or os.cpu_count())

    def _encode_in_parts(self, texts, num_threads):
        parts = [[_cut(stretch) for stretch in text.split(SPACE)] for text in texts]
        flat = [part for stretches in parts for stretch in stretches for part in stretch]
        encoded = iter(self._processor.encode(flat, num_threads=num_threads))
        batch = []
        for stretches in parts:
            ids = []
            for index, stretch in enumerate(stretches):
                if index:
                    ids += SPACE_BYTES
                for _ in stretch:
                    ids += next(encoded)
            batch.append(ids)
        return batch

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens give nothing, bytes that are no UTF-8 give U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; unlike text they may end within a character."""
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"a token id is not in the vocabulary's range of 0 to {self.vocab_size - 1}")
        return b"".join(map(self.token_bytes.__getitem__, ids))

    def save(self, directory: str | Path) -> None:
        """Write `settings.json` and, for BPE, SentencePiece's own `tokenizer.model`, each whole or not at all."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.kind == "bpe":
            write_durably(directory / "tokenizer.model", self._model)
        write_durably(directory / "settings.json", (json.dumps(self._settings(), indent=2) + "\n").encode())

    def _settings(self):
        return {"kind": self.kind, "vocab_size": self.vocab_size, "special_tokens": self.special_tokens,
                "fingerprint": self.fingerprint}

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read what `save` wrote. Raises FileNotFoundError or, for damaged files, ValueError."""
        directory = Path(directory)
        try:
            settings = json.loads(_file(directory / "settings.json").read_text("utf-8"))
            kind = settings["kind"]
            model = _file(directory / "tokenizer.model").read_bytes() if kind == "bpe" else b""
            tokenizer = cls(kind, model)
            intact = settings == tokenizer._settings()
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{directory}: the tokenizer is damaged ({error}); restore the directory") from None
        if not intact:
            raise ValueError(f"{directory}: the tokenizer is not the one that settings.json names; restore both files")
        return tokenizer


def _file(path):
    if not path.is_file():                              # reading a pipe would wait for ever
        raise FileNotFoundError(f"no tokenizer in {path.parent}: {path.name} is missing; name a directory that holds "
                                "settings.json and, for BPE, tokenizer.model")
    return path


def _processor(model):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(model)         # the constructor takes an empty model for none
    return processor


def _train_sentencepiece(texts, vocab_size):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0, minloglevel=2,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, control_symbols=["<mask>"],
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        allow_whitespace_only_pieces=True, split_by_unicode_script=False,
        max_sentence_length=1 << 30, num_threads=os.cpu_count(),
    )
    return model.getvalue()


def _kept(characters, vocab_size):
    """The characters that get ids of their own, as two sets to try.

    First the commonest 99.9 % of the text, in at most half of the free ids; then, for a text with too few merges to
    fill the rest, all that there is room for. The space is always one of them.
    """
    ranked = [" ", *(character for character, _ in characters.most_common() if character != " ")]
    room, uncovered, common = vocab_size - FIRST_BYTE - 256, 0.001 * sum(characters.values()), len(ranked)
    while uncovered >= characters[ranked[common - 1]]:
        common -= 1
        uncovered -= characters[ranked[common]]
    return set(ranked[:min(common, max(1, room // 2))]), set(ranked[:room])


def _cut(text):
    """Pieces of 1 to MAX_ENCODE_CHARS characters, cut after a newline where the second half has one."""
    ends = [0]
    while len(text) - ends[-1] > MAX_ENCODE_CHARS:
        end = ends[-1] + MAX_ENCODE_CHARS
        newline = text.rfind("\n", end - MAX_ENCODE_CHARS // 2, end)
        ends.append(newline + 1 or end)
    return [text[start:end] for start, end in pairwise([*ends, len(text)]) if start < end]


def _valid(text):
    if not isinstance(text, str):
        raise ValueError(f"a tokenizer takes str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at position {error.start}; "
                         "it is not valid Unicode, so mend it or decode its source with errors='replace'") from None
    return text
