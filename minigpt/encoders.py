"""What makes ids of text, a class for each kind of tokenizer: bytes, SentencePiece, and Hugging Face's tokenizer.json.

An encoder is made from `model`, the bytes of the file that it is saved as (`file`, None where there is none). It has
`token_bytes` (for each id the bytes it stands for, none for special tokens), `special_tokens` {name: id}, `unused` (ids
that no token has), `encode_batch(texts, num_threads)` and `decode(ids)`, of a whole text without special tokens; for
hf_tokenizer.py also `pieces()`, `id_of(name)` and `usual(role)`. `Tokenizer` is what others use.
"""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import pairwise

SPECIAL_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<mask>": 4}
"""Of our own kinds. <s> starts a document and so also ends the one before it; </s> ends a segment; <unk> is never
produced."""
FIRST_BYTE = len(SPECIAL_TOKENS)
SPACE = "\u2581"
"""SentencePiece writes a space as this character."""
SPACE_BYTES = [FIRST_BYTE + byte for byte in SPACE.encode()]
USER_DEFINED = 4
"""The type of a SentencePiece token that is matched before any merge."""
MOST_TOKENS = 1 << 22
MAX_ENCODE_CHARS = 1 << 20
"""Longer texts are encoded in pieces of this many characters, cut after a newline where one is near."""


class Bytes:
    """One token a byte, behind the special ones."""

    file, puts_space = None, False
    special_tokens, unused = SPECIAL_TOKENS, ()

    def __init__(self, model: bytes = b""):
        self.token_bytes = [b""] * FIRST_BYTE + [bytes([value]) for value in range(256)]

    def encode_batch(self, texts, num_threads):
        return [[byte + FIRST_BYTE for byte in text.encode()] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.token_bytes.__getitem__, ids)).decode("utf-8", errors="replace")

    def pieces(self) -> list[tuple[str, float | None]]:
        """Each token as SentencePiece writes it, with its score, None for special tokens and bytes."""
        return [(name, None) for name in (*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)))]


class SentencePiece:
    """A SentencePiece model as others train it: byte-pair encoding that leaves the text as it is, but for a space in
    front; a text that holds SPACE itself comes back with spaces. Raises ValueError for other models."""

    file = "tokenizer.model"
    unused = ()
    puts_space = False
    """Whether a text gets a space in front."""

    def __init__(self, model: bytes):
        import sentencepiece

        self.processor = processor = sentencepiece.SentencePieceProcessor()
        processor.load_from_serialized_proto(model)     # the constructor takes an empty model for none
        ids = range(processor.get_piece_size())
        self.special_tokens = {processor.id_to_piece(id): id for id in ids
                               if processor.is_control(id) or processor.is_unknown(id)}
        special = set(self.special_tokens.values())
        self.token_bytes = [b"" if id in special else self._bytes_of(id) for id in ids]
        self.check(model)

    def check(self, model):
        self.puts_space = self.processor.normalize("a").startswith(SPACE)
        probe, pieces = "a \ufb01\u2460  b ", range(len(self.token_bytes))
        if self.processor.normalize(probe).removeprefix(SPACE) != probe.replace(" ", SPACE):
            raise ValueError("a SentencePiece model that changes the text (its normalizer) is not supported; "
                             "save it as tokenizer.json")
        if any(self.processor.get_score(id) != round(self.processor.get_score(id)) for id in pieces):
            raise ValueError("a SentencePiece model that is no byte-pair encoding is not supported; "
                             "save it as tokenizer.json")
        if USER_DEFINED in piece_types(model):
            raise ValueError("a SentencePiece model with symbols that its user defined is not supported; "
                             "save it as tokenizer.json")

    def _bytes_of(self, id):
        piece = self.processor.id_to_piece(id)
        return bytes([int(piece[3:5], 16)]) if self.processor.is_byte(id) else piece.replace(SPACE, " ").encode()

    def encode_batch(self, texts, num_threads):
        return self.processor.encode(texts, num_threads=num_threads)

    def decode(self, ids: list[int]) -> str:
        text = b"".join(map(self.token_bytes.__getitem__, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.puts_space else text

    def pieces(self) -> list[tuple[str, float | None]]:
        """Each token as SentencePiece writes it, with its score, None for special tokens and bytes."""
        special = set(self.special_tokens.values())
        return [(self.processor.id_to_piece(id), None if id in special or self.processor.is_byte(id)
                 else self.processor.get_score(id)) for id in range(len(self.token_bytes))]

    def id_of(self, name: str) -> int | None:
        """The id of the token of that name, None where there is none."""
        id = self.processor.piece_to_id(name)
        return id if self.processor.id_to_piece(id) == name else None

    def usual(self, role: str) -> list[int]:
        """The id of the model's own token for "bos", "eos" or "pad", where it has one."""
        id = getattr(self.processor, f"{role}_id")()
        return [id] * (id >= 0)


class LosslessSentencePiece(SentencePiece):
    """The models that `Tokenizer.train` makes: they have every byte, and put no space in front. SPACE itself becomes
    its three bytes, so that every text comes back as it was."""

    def check(self, model):
        pass

    def encode_batch(self, texts, num_threads):
        if not any(len(text) > MAX_ENCODE_CHARS or SPACE in text for text in texts):
            if len(texts) == 1:
                return [self.processor.encode(texts[0])]    # without the thread that a batch is handed to
            return self.processor.encode(texts, num_threads=num_threads)
        parts = [[_cut(stretch) for stretch in text.split(SPACE)] for text in texts]
        flat = [part for stretches in parts for stretch in stretches for part in stretch]
        encoded = iter(self.processor.encode(flat, num_threads=num_threads))
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


class TokenizerJson:
    """Any tokenizer that Hugging Face's `tokenizers` library reads. The names of special tokens are text like any."""

    file = "tokenizer.json"

    def __init__(self, model: bytes):
        self._tokenizer = tokenizer_from_json(model)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        content = json.loads(model)
        added = {token["content"]: token for token in content.get("added_tokens") or []}
        bytes_of = _bytes_in(content)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        if size > MOST_TOKENS:
            raise ValueError(f"it has the id {size - 1}; the most is {MOST_TOKENS - 1}")
        self.special_tokens = {name: vocabulary[name] for name, token in added.items() if token["special"]}
        self.unused = tuple(sorted(set(range(size)) - set(vocabulary.values())))
        self.token_bytes = [b""] * size
        for name, id in vocabulary.items():
            if name not in self.special_tokens:
                self.token_bytes[id] = name.encode() if name in added else bytes_of(name)

    def encode_batch(self, texts, num_threads):
        try:
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:                      # the library raises Exception itself
            raise ValueError(f"the tokenizer cannot encode the text ({error}); mend its tokenizer.json") from None

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def id_of(self, name: str) -> int | None:
        """The id of the token of that name, None where there is none."""
        return self._tokenizer.token_to_id(name)

    def usual(self, role: str) -> list[int]:
        """None: a tokenizer.json does not tell what its special tokens are for."""
        return []

    def before(self) -> list[int]:
        """The special tokens that its template puts before a text."""
        encoding = self._tokenizer.encode("", add_special_tokens=True)
        for text in ("a", " ", *self._tokenizer.get_vocab(with_added_tokens=False)):
            with suppress(Exception):
                encoding = self._tokenizer.encode(text, add_special_tokens=True)
            if 0 in encoding.special_tokens_mask:
                return encoding.ids[:encoding.special_tokens_mask.index(0)]
        return encoding.ids


ENCODERS = {"bpe": LosslessSentencePiece, "bytes": Bytes, "sentencepiece": SentencePiece, "tokenizers": TokenizerJson}
"""{kind of tokenizer: its encoder}; the last two are others' (see hf_tokenizer.py)."""


def tokenizer_from_json(model: bytes):
    """The `tokenizers.Tokenizer` of a tokenizer.json. Raises ValueError."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("it needs the package tokenizers; install it with pip install 'minigpt[hf]'") from None
    try:
        return Tokenizer.from_buffer(model)
    except Exception as error:                          # the library raises Exception itself
        raise ValueError(f"the tokenizers library cannot read it ({error})") from None


def byte_letters() -> dict[str, int]:
    """{letter: byte} of byte-level BPE (GPT-2): printable bytes stand for themselves, the rest for letters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _bytes_in(content):
    """The function that gives the bytes of a token of a tokenizer.json."""
    kinds = set(_kinds([content.get("decoder"), content.get("pre_tokenizer")]))
    if "ByteLevel" in kinds:
        letters = byte_letters()
        return lambda name: bytes(map(letters.__getitem__, name)) if letters.keys() >= set(name) else name.encode()
    suffix = content["model"].get("end_of_word_suffix")
    if suffix:
        return lambda name: (f"{name.removesuffix(suffix)} " if name.endswith(suffix) else name).encode()
    if "WordPiece" in kinds:
        prefix = content["model"]["continuing_subword_prefix"]
        return lambda name: (name.removeprefix(prefix) if name.startswith(prefix) else f" {name}").encode()

    def sentencepiece(name):
        is_byte = len(name) == 6 and name.startswith("<0x") and name.endswith(">")
        return bytes([int(name[3:5], 16)]) if is_byte else name.replace(SPACE, " ").encode()
    return sentencepiece


def piece_types(model: bytes) -> set[int]:
    """The types of a SentencePiece model's pieces: fields 3 of the messages in its fields 1 (protocol buffers)."""
    types = set()
    for field, piece in _fields(model):
        if field == 1:
            types |= {value for number, value in _fields(piece) if number == 3}
    return types


def _fields(message):
    """(number, value) of each field of a message: a whole number, or bytes."""
    place = 0

    def number():
        nonlocal place
        value = shift = 0
        while True:
            byte, place = message[place], place + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while place < len(message):
        tag = number()
        if tag & 7 == 0:
            yield tag >> 3, number()
        else:
            size = {1: 8, 5: 4}.get(tag & 7) or number()
            yield tag >> 3, message[place:place + size]
            place += size


def _kinds(part):
    """The types of a part of a tokenizer.json and of those within it."""
    if isinstance(part, list):
        for each in part:
            yield from _kinds(each)
    elif isinstance(part, dict):
        yield part.get("type")
        for each in part.values():
            yield from _kinds(each)


def _cut(text):
    """Pieces of 1 to MAX_ENCODE_CHARS characters, cut after a newline where the second half has one."""
    ends = [0]
    while len(text) - ends[-1] > MAX_ENCODE_CHARS:
        end = ends[-1] + MAX_ENCODE_CHARS
        newline = text.rfind("\n", end - MAX_ENCODE_CHARS // 2, end)
        ends.append(newline + 1 or end)
    return [text[start:end] for start, end in pairwise([*ends, len(text)]) if start < end]
