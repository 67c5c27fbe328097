"""Text to token ids and back: SentencePiece BPE with byte fallback and plain bytes, both lossless, and others' kinds.

Of our own kinds ids 0 to 4 are the special tokens, ids 5 to 260 the 256 bytes; a BPE vocabulary goes on with characters
and merges. Special tokens never come out of plain text. `decode` joins the bytes that every id stands for.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minigpt.encoders import ENCODERS, FIRST_BYTE, SPECIAL_TOKENS
from minigpt.files import write_durably

MIN_VOCAB_SIZE = FIRST_BYTE + 256 + 1
RESERVED = "\0\t\u2581\u2585"
"""SentencePiece's trainer drops or splits texts with these; it is given the text between them."""


@dataclass(frozen=True)
class Roles:
    """What the special tokens are for, by id."""

    document_start: int = SPECIAL_TOKENS["<s>"]
    """Stands before each document of a training text."""
    end_tokens: tuple[int, ...] = (SPECIAL_TOKENS["<s>"], SPECIAL_TOKENS["</s>"])
    """Each of these, sampled, ends a text."""
    padding: int = SPECIAL_TOKENS["<pad>"]
    """Fills rows that a text does not fill."""
    mask: int | None = SPECIAL_TOKENS["<mask>"]
    """Stands for a hidden token, where there is one."""
    prompt_start: tuple[int, ...] = (SPECIAL_TOKENS["<s>"],)
    """Stand before a prompt."""

    @property
    def separator(self) -> int:
        """Stands behind each of the texts in one row."""
        return self.end_tokens[-1]


class Tokenizer:
    """A trained tokenizer: make one with `Tokenizer.train` or `Tokenizer.load`.

    Attributes: `kind` ("bpe" or "bytes"; of others "sentencepiece" or "tokenizers"), `vocab_size`, `special_tokens`
    {name: id}, `fingerprint` (SHA-256 in hexadecimal of what decides every encoding), `token_bytes` (for each id the
    bytes it stands for, empty for special tokens), `is_special` (vocab_size,) bool, `roles` of special tokens,
    and `theirs`, what others say of a tokenizer of theirs and minigpt only keeps.
    """

    def __init__(self, kind: str, model: bytes = b"", roles: Roles = Roles(), theirs: dict | None = None):
        self.kind, self.model, self.roles, self.theirs = kind, model, roles, theirs or {}
        self.encoder = _encoder(kind)(model)
        self.token_bytes, self.special_tokens = self.encoder.token_bytes, self.encoder.special_tokens
        self.vocab_size = len(self.token_bytes)
        named = {roles.document_start, *roles.end_tokens, roles.padding, *roles.prompt_start, roles.mask} - {None}
        if not self.vocab_size or not 0 <= min(named) <= max(named) < self.vocab_size:
            raise ValueError(f"special tokens have the ids {sorted(named)}, and the tokenizer {self.vocab_size} tokens")
        self.is_special = np.zeros(self.vocab_size, bool)
        self.is_special[[*self.special_tokens.values(), *self.encoder.unused, *named]] = True
        content = kind.encode() + b"\0" + model
        if roles != Roles():
            content += json.dumps(asdict(roles)).encode()
        self.fingerprint = hashlib.sha256(content).hexdigest()

    @property
    def never_sampled(self) -> np.ndarray:
        """(vocab_size,) bool: special tokens that do not end a text."""
        never = self.is_special.copy()
        never[list(self.roles.end_tokens)] = False
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
        """The ids of a text. A lone surrogate raises ValueError. `decode` gives the very same text back, of our kinds.
        """
        return self.encode_batch([text], num_threads=1)[0]

    def encode_batch(self, texts: list[str], num_threads: int = 0) -> list[list[int]]:
        """The ids of each text, on `num_threads` threads (0: every core)."""
        return self.encoder.encode_batch([_valid(text) for text in texts], num_threads or os.cpu_count())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole text's ids; special tokens give nothing, bytes that are no UTF-8 give U+FFFD.

        Where the tokenizer puts a space in front of a text, it is taken away.
        """
        ids = self._checked(ids)
        return self.encoder.decode([id for id in ids if not self.is_special[id]])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; unlike text they may end within a character."""
        return b"".join(map(self.token_bytes.__getitem__, self._checked(ids)))

    def _checked(self, ids):
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"a token id is not in the vocabulary's range of 0 to {self.vocab_size - 1}")
        return ids

    def save(self, directory: str | Path) -> None:
        """Write `settings.json` and the encoder's own file, for BPE `tokenizer.model`, each whole or not at all."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.encoder.file:
            write_durably(directory / self.encoder.file, self.model)
        write_durably(directory / "settings.json", (json.dumps(self._settings(), indent=2) + "\n").encode())

    def _settings(self):
        settings = {"kind": self.kind, "vocab_size": self.vocab_size, "special_tokens": self.special_tokens,
                    "fingerprint": self.fingerprint}
        if self.roles != Roles():
            settings |= {"roles": asdict(self.roles), "theirs": self.theirs}
        return json.loads(json.dumps(settings))

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read what `save` wrote. Raises FileNotFoundError or, for damaged files, ValueError."""
        directory = Path(directory)
        try:
            settings = json.loads(_file(directory / "settings.json").read_text("utf-8"))
            file = _encoder(settings["kind"]).file
            model = _file(directory / file).read_bytes() if file else b""
            roles = {key: tuple(value) if isinstance(value, list) else value
                     for key, value in settings.get("roles", {}).items()}
            tokenizer = cls(settings["kind"], model, Roles(**roles), settings.get("theirs"))
            intact = settings == tokenizer._settings()
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{directory}: the tokenizer is damaged ({error}); restore the directory") from None
        if not intact:
            raise ValueError(f"{directory}: the tokenizer is not the one that settings.json names; restore both files")
        return tokenizer


def text_of(content: bytes) -> tuple[str, np.ndarray]:
    """The text of bytes, a lone surrogate for each that is no UTF-8, and the byte at which each character begins.

    Of n characters (n + 1,) int64: the last is the number of bytes.
    """
    text = content.decode("utf-8", errors="surrogateescape")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    sizes[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1
    return text, np.concatenate([[0], np.cumsum(sizes)])


def _encoder(kind):
    if kind not in ENCODERS:
        raise ValueError(f"tokenizer kind {kind!r} is none of: {', '.join(ENCODERS)}")
    return ENCODERS[kind]


def _file(path):
    if not path.is_file():                              # reading a pipe would wait for ever
        raise FileNotFoundError(f"no tokenizer in {path.parent}: {path.name} is missing; name a directory that holds "
                                "settings.json and what it names")
    return path


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


def _valid(text):
    if not isinstance(text, str):
        raise ValueError(f"a tokenizer takes str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at position {error.start}; "
                         "it is not valid Unicode, so mend it or decode its source with errors='replace'") from None
    return text
