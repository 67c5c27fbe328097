"""Where sentences begin, and pairs of neighbouring ones: what next-sentence prediction learns from.

    starts = sentence_starts("It rained. We stayed in.")            # [0, 11]
    pairs = Pairs(split, tokenizer.token_bytes, length=125, seed=1)
    first, second, is_random = pairs.draw(7)

Rules without a list of languages: they are made for English and Chinese, and of code they give blocks of lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from minigpt.shards import Split
from minigpt.tokenizer import text_of

LONGEST = 400
"""Characters of a sentence; a longer one is cut at a line's or a word's end."""
BLOCK_TOKENS = 1 << 20
"""Tokens that are looked at together; a sentence ends where they do."""
TRIES = 100
"""Sentences that are looked at for one of another document with enough behind it."""
SHORT = 0.1
"""Part of the pairs that are shorter than the context, down to an eighth (BERT, arXiv 1810.04805, appendix A.2)."""
CLOSERS = "\"'”’»)\\]」』）】》〉"
FULL_STOPS = re.compile(                                # each begins where a run does, so that time is linear
    rf"[。！？｡…]++[{CLOSERS}]*+\s*+"                     # Chinese and Japanese have no space behind
    rf"|(?<![.!?])[.!?]++[{CLOSERS}]*+\s++"
    r"|(?<![^\S\n])[^\S\n]*+\n[^\S\n]*+\n\s*+")           # a blank line
ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“‘])(?:[A-Z]|(?:[A-Za-z]\.)+[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|Rev|Gen|Col|Capt|Lt|Sgt|Hon|St|Jr|Sr|Messrs|"
    r"No|Nos|Vol|Ch|Fig|Figs|Eq|Eqs|Sec|pp|ed|eds|vs|cf|etc|al|Inc|Ltd|Co|Corp|approx|viz|Jan|Feb|Mar|Apr|Jun|Jul|Aug|"
    r"Sept|Sep|Oct|Nov|Dec)\.\s+$")


def sentence_starts(text: str) -> list[int]:
    """The characters at which sentences begin; the first begins at 0, and each takes the spaces behind it.

    A sentence ends at 。！？, at . ! ? before a space, at a blank line, and at LONGEST characters. A full stop does not
    end one behind an abbreviation or an initial, nor before a small letter in a text that has capitals.
    """
    starts, has_capitals = [0], text != text.lower()
    for stop in FULL_STOPS.finditer(text):
        place = stop.end()
        if place == len(text) or place == stop.start():
            continue
        if stop[0].lstrip().startswith(".") and "\n\n" not in stop[0]:
            behind_abbreviation = ABBREVIATION.search(text, max(0, stop.start() - 12), place)
            if behind_abbreviation or has_capitals and text[place].islower():
                continue
        starts += _cuts(text, starts[-1], place)
        starts.append(place)
    starts += _cuts(text, starts[-1], len(text))
    return starts if text else []


def _cuts(text, start, end):
    """Where a sentence of text[start:end] is cut as too long."""
    cuts = []
    while end - start > LONGEST:
        half, last = start + LONGEST // 2, start + LONGEST
        start = text.rfind("\n", half, last) + 1 or text.rfind(" ", half, last) + 1 or last
        cuts.append(start)
    return cuts


def token_starts(tokens: np.ndarray, token_bytes: list[bytes]) -> np.ndarray:
    """Of a document's tokens those at which its sentences begin, the first at 0, ascending.

    A token that reaches over the end of a sentence belongs to the one before, but for a space it begins with.
    """
    pieces = [token_bytes[token] for token in tokens]
    text, places = text_of(b"".join(pieces))
    starts = []
    for start in sentence_starts(text):                 # the spaces behind a sentence may be in the next one's token
        while start and text[start - 1].isspace():
            start -= 1
        starts.append(start)
    begins = np.cumsum([0, *map(len, pieces)])[:-1]
    found = np.searchsorted(begins, places[np.array(starts, np.int64)], "left")
    return np.unique(found[found < len(tokens)])


class Pairs:
    """Two stretches that meet where a sentence begins, or, half of the time, the second from another document.

    Together they have `length` tokens or a little less. Where they meet, and how many tokens each has, is drawn before
    it is drawn whether the second is another one, which then begins at a sentence too and is as long: neither lengths
    nor beginnings nor ends tell the label. Pair n is a function of the seed and n: an epoch takes each sentence but the
    first ones of their documents as the beginning of a second stretch once. Raises ValueError where fewer than two
    documents have two sentences.
    """

    def __init__(self, split: Split, token_bytes: list[bytes], length: int, seed: int):
        if length < 2:
            raise ValueError(f"model.context_length = {length + 3} has no room for two sentences and the three tokens "
                             "around them; make it larger")
        self.split, self.length, self.seed, self._epoch = split, length, seed, None
        starts, numbers = [], []                        # of sentences but the first ones, and their documents' numbers
        self.begins = split.documents + 1               # behind <s>
        self.ends = np.append(split.documents[1:], len(split))
        for number, (begin, end) in enumerate(zip(self.begins.tolist(), self.ends.tolist())):
            for block in range(begin, end, BLOCK_TOKENS):
                tokens = split.read(block, min(block + BLOCK_TOKENS, end))
                found = block + token_starts(tokens, token_bytes)
                starts.append(found[found > begin])
                numbers += [number] * len(starts[-1])
        self.starts, self.numbers = np.concatenate([*starts, np.empty(0, np.int64)]), np.array(numbers, np.int64)
        if len(np.unique(self.numbers)) < 2:
            raise ValueError(f"{split.name}: next-sentence prediction needs two documents with two sentences each; "
                             "give a folder of more files (data.path, data.val_path), or leave out next_sentence")

    def draw(self, number: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Pair `number` of the training: tokens of the first, of the second, whether the second is a random one."""
        return self._pair(self._sentence(number), number, True)

    def source(self, number: int) -> tuple[str, int]:
        """The document that pair `number` is of, by name, and the byte of its file at which its stretches meet."""
        return self.split.source(int(self.starts[self._sentence(number)]))

    def in_order(self) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
        """Pairs from front to back: the next where at least a quarter of one lies behind the one before."""
        number, document, reached = 0, -1, 0
        for sentence, (start, its_document) in enumerate(zip(self.starts.tolist(), self.numbers.tolist())):
            if its_document != document or start >= reached:
                first, second, is_random = self._pair(sentence, number, False)
                yield first, second, is_random
                number, document = number + 1, its_document
                reached = start + len(second) + self.length // 4

    def _sentence(self, number):
        epoch, place = divmod(number, len(self.starts))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.starts))
            self._epoch = epoch
        return int(self._order[place])

    def _room(self, sentence):
        """Tokens from a sentence on to the end of its document."""
        return int(self.ends[self.numbers[sentence]] - self.starts[sentence])

    def _pair(self, sentence, number, training):
        random = np.random.default_rng([self.seed, number, int(training), 1])
        start, length = int(self.starts[sentence]), self.length
        if random.random() < SHORT:
            length = int(random.integers(max(2, length // 8), length + 1))
        wanted = int(random.integers(max(1, length // 4), length - length // 4 + (length < 4)))
        before = min(wanted, length - 1, start - int(self.begins[self.numbers[sentence]]))
        after, room = length - before, self._room(sentence)
        if after >= room:                               # or a second stretch would tell by its end that it is no other
            after = int(random.integers(1, room + 1))
        is_random = bool(random.random() < 0.5)
        other = int(self.starts[self._elsewhere(sentence, after, random)]) if is_random else start
        return self.split.read(start - before, start), self.split.read(other, other + after), is_random

    def _elsewhere(self, sentence, size, random):
        """A sentence of another document, with `size` tokens to its end, or, where few have as many, with most."""
        best = None
        for _ in range(TRIES):
            other = int(random.integers(len(self.starts)))
            if self.numbers[other] == self.numbers[sentence]:
                continue
            if self._room(other) >= size:
                return other
            if best is None or self._room(other) > self._room(best):
                best = other
        if best is None:                                # nearly all sentences are of this one document
            others = np.flatnonzero(self.numbers != self.numbers[sentence])
            best = int(others[random.integers(len(others))])
        return best
