"""Where sentences begin, and pairs of neighbouring ones: what next-sentence prediction learns from.

    starts = sentence_starts("It rained. We stayed in.")            # [0, 11]
    pairs = Pairs(split, length=125, seed=1)
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
SHORT = 0.1
"""Part of the pairs that are shorter than the context, down to an eighth (BERT, arXiv 1810.04805, appendix A.2)."""
CLOSERS = "\"'”’»)\\]」』）】》〉"
FULL_STOPS = re.compile(
    rf"[。！？｡…]+[{CLOSERS}]*\s*"                       # Chinese and Japanese have no space behind
    rf"|[.!?]+[{CLOSERS}]*\s+"
    r"|[^\S\n]*\n[^\S\n]*\n\s*")                         # a blank line
ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“‘])(?:[A-Z]|(?:[A-Za-z]\.)+[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|Rev|Gen|Col|Capt|Lt|Sgt|Hon|St|Jr|Sr|Messrs|"
    r"No|Nos|Vol|Ch|Fig|Figs|Eq|Eqs|Sec|pp|ed|eds|vs|cf|etc|al|Inc|Ltd|Co|Corp|approx|viz|Jan|Feb|Mar|Apr|Jun|Jul|Aug|"
    r"Sept|Sep|Oct|Nov|Dec)\.\s+$")


def sentence_starts(text: str) -> list[int]:
    """The characters at which sentences begin; the first begins at 0, and each takes the spaces behind it.

    A sentence ends at 。！？, at . ! ? before a space, at a blank line, and at LONGEST characters. A full stop does not
    end one behind an abbreviation or an initial, nor before a small letter.
    """
    starts = [0]
    for stop in FULL_STOPS.finditer(text):
        place = stop.end()
        if place == len(text) or place == stop.start():
            continue
        if stop[0].lstrip().startswith(".") and "\n\n" not in stop[0]:
            behind_abbreviation = ABBREVIATION.search(text, max(0, stop.start() - 12), place)
            if behind_abbreviation or text[place].islower():
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
    """Two stretches of a document, or, half of the time, the second from another document.

    A pair is whole sentences, at least one each, of `length` tokens together or a little less; of what is too long the
    first loses its beginning and the second its end, so that what stood side by side still does. Pair n is a function
    of the seed and n: an epoch takes each sentence but the last ones of their documents as a beginning once. Raises
    ValueError where fewer than two documents have two sentences.
    """

    def __init__(self, split: Split, token_bytes: list[bytes], length: int, seed: int):
        if length < 2:
            raise ValueError(f"model.context_length = {length + 3} has no room for two sentences and the three tokens "
                             "around them; make it larger")
        self.split, self.length, self.seed, self._epoch = split, length, seed, None
        starts, ends, stops = [], [], []                                    # of sentences: tokens, and their document's
        for begin, end in zip(split.documents, np.append(split.documents[1:], len(split))):     # last sentence's number
            for block in range(int(begin) + 1, int(end), BLOCK_TOKENS):
                tokens = split.read(block, min(block + BLOCK_TOKENS, int(end)))
                starts += (block + token_starts(tokens, token_bytes)).tolist()
            ends += [*starts[len(ends) + 1:], int(end)][:len(starts) - len(ends)]
            stops += [len(starts)] * (len(starts) - len(stops))
        self.starts, self.ends, self.stops = (np.array(numbers, np.int64) for numbers in (starts, ends, stops))
        self.beginnings = np.flatnonzero(np.arange(len(self.stops)) + 1 < self.stops)
        if len(np.unique(self.stops[self.beginnings])) < 2:
            raise ValueError(f"{split.name}: next-sentence prediction needs two documents with two sentences each; "
                             "give a folder of more files (data.path, data.val_path), or leave out next_sentence")

    def draw(self, number: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Pair `number` of the training: tokens of the first, of the second, whether the second is a random one."""
        return self._pair(self._beginning(number), number, True)

    def source(self, number: int) -> tuple[str, int]:
        """The document in which pair `number` begins, by name, and the byte of its file at which it does."""
        return self.split.source(int(self.starts[self._beginning(number)]))

    def in_order(self) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
        """Pairs from front to back, in which each sentence stands once, but for random ones and what is cut off."""
        sentence, number = 0, 0
        while sentence < len(self.starts):
            if sentence + 1 < self.stops[sentence]:
                yield self._pair(sentence, number, False)
                number += 1
            sentence = self._end(sentence, self.length)

    def _beginning(self, number):
        epoch, place = divmod(number, len(self.beginnings))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.beginnings)
            self._epoch = epoch
        return int(self._order[place])

    def _end(self, sentence, length):
        """The sentence at which a stretch of two or more from this one on ends, in its document."""
        reached = int(np.searchsorted(self.ends, self.starts[sentence] + length)) + 1
        return min(max(reached, sentence + 2), int(self.stops[sentence]))

    def _pair(self, sentence, number, training):
        random = np.random.default_rng([self.seed, number, int(training), 1])
        length = self.length
        if random.random() < SHORT:
            length = int(random.integers(max(2, length // 8), length + 1))
        end = self._end(sentence, length)
        middle = int(random.integers(sentence + 1, end))
        first = self.starts[sentence], self.ends[middle - 1]
        is_random = bool(random.random() < 0.5)
        if is_random:
            middle = self._elsewhere(sentence, random)
            end = self._end(middle, max(1, length - (first[1] - first[0])))
        second = self.starts[middle], self.ends[end - 1]
        sizes = first[1] - first[0], second[1] - second[0]
        kept = max(length - sizes[1], min(sizes[0], (length + 1) // 2))     # of the first; half where both are long
        kept = min(kept, sizes[0])
        return (self.split.read(first[1] - kept, first[1]),
                self.split.read(second[0], min(second[1], second[0] + length - kept)), is_random)

    def _elsewhere(self, sentence, random):
        """A sentence of another document."""
        stop = int(self.stops[sentence])
        start = int(np.searchsorted(self.stops, stop))
        other = int(random.integers(len(self.starts) - (stop - start)))
        return other if other < start else other + stop - start
