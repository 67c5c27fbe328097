"""Which tokens keep to a text: bytes of tokens, and regular expressions as automata that read bytes.

A pattern is parsed by Python's `re`, becomes a non-deterministic automaton (Thompson's construction) on the bytes of
UTF-8, and that a deterministic one (the subset construction; Aho, Lam, Sethi, Ullman, "Compilers", 3.7).
"""

from __future__ import annotations

import re
import string
from functools import cached_property, lru_cache, reduce
from re import _constants as kinds
from re import _parser

import numpy as np

from minigpt.tokenizer import Tokenizer

REMEMBERED = 256
"""States of a pattern, and ends of banned texts, of which the tokens that may follow are kept."""
MOST_STATES, MOST_WORK = 100_000, 30_000_000
"""Of an automaton, and links that are followed to make it: a hundred megabytes, and some ten seconds."""
NEVER = np.iinfo(np.int64).max
LAST = 0x10FFFF
SURROGATES = 0xD800, 0xDFFF
CATEGORIES = {kinds.CATEGORY_DIGIT: string.digits, kinds.CATEGORY_SPACE: string.whitespace,
              kinds.CATEGORY_WORD: string.ascii_letters + string.digits + "_"}
OPPOSITES = {kinds.CATEGORY_NOT_DIGIT: kinds.CATEGORY_DIGIT, kinds.CATEGORY_NOT_SPACE: kinds.CATEGORY_SPACE,
             kinds.CATEGORY_NOT_WORD: kinds.CATEGORY_WORD}


class Pieces:
    """The bytes of a tokenizer's tokens, looked through all at once; arrays are (V,) by id."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.bytes = tokenizer, tokenizer.token_bytes
        self.has_text = np.array([len(piece) > 0 for piece in self.bytes])
        self.pattern = lru_cache(16)(lambda regex: Pattern(regex, self))
        self.starting_with = lru_cache(REMEMBERED)(
            lambda text: np.array([piece.startswith(text) for piece in self.bytes]))
        self.containing = lru_cache(REMEMBERED)(lambda text: np.array([text in piece for piece in self.bytes]))

    def spelled(self, text: str) -> list[int]:
        """The ids of a text that stands behind another: the tokenizer's own, unless it puts a space before them."""
        ids, content = self.tokenizer.encode(text), text.encode()
        if b"".join(self.bytes[id] for id in ids) == content:
            return ids
        ids, ordered = [], self.table[0]                # else, again and again, the longest token that fits
        while content:
            fits = (id for id in ordered if self.has_text[id] and content.startswith(self.bytes[id]))
            ids.append(int(next(fits)))
            content = content[len(self.bytes[ids[-1]]):]
        return ids

    @cached_property
    def table(self):
        """(ids from the longest to the shortest, their bytes (V, longest), how many are longer than each place)."""
        sizes = np.array([len(piece) for piece in self.bytes])
        order, longest = np.argsort(-sizes, kind="stable"), int(sizes.max())
        text = b"".join(self.bytes[id].ljust(longest, b"\0") for id in order)
        longer = [int((sizes > place).sum()) for place in range(longest)]
        return order, np.frombuffer(text, np.uint8).reshape(-1, longest), longer


class TooLarge(ValueError):
    """A pattern whose automaton would take too much memory or time."""


def parsed(regex: str) -> _parser.SubPattern:
    """The tree of a regular expression, without `^` before and `$` behind the whole, which say nothing here."""
    try:
        tree = _parser.parse(regex, re.ASCII)
    except (re.error, OverflowError) as error:
        raise ValueError(f"{regex!r} is no regular expression: {error}") from None
    items = list(tree)
    items = items[1:] if items[:1] == [(kinds.AT, kinds.AT_BEGINNING)] else items
    tree.data = items[:-1] if items[-1:] == [(kinds.AT, kinds.AT_END)] else items
    return tree


class Automaton:
    """The non-deterministic automaton of a regular expression. State 0 is the end, `start` the first.

    `edges` of a state are (low, high, next) over bytes, `free` the states that are reached from it without reading.

    Raises ValueError for what is no regular expression of Python, and for anchors, look-around and back-references.
    It is read as with `re.ASCII`: \\d, \\w, \\s and the other case of a letter are ASCII characters.
    """

    def __init__(self, regex: str):
        self.regex, self.edges, self.free = regex, [[]], [[]]
        try:
            tree = parsed(regex)
            self.start = self._sequence(tree, 0, tree.state.flags)
        except RecursionError:
            raise ValueError(f"{regex[:60]!r} nests too deep; write it with fewer parentheses") from None

    def _state(self, edges=(), free=()):
        if len(self.edges) > MOST_STATES:
            raise TooLarge(f"{self.regex[:60]!r} counts too far; lower the numbers in braces")
        self.edges.append(list(edges))
        self.free.append(list(free))
        return len(self.edges) - 1

    def _sequence(self, items, target, flags):
        """The first state of what matches all of them and then goes to `target`."""
        for item in reversed(list(items)):
            target = self._item(*item, target, flags)
        return target

    def _item(self, kind, value, target, flags):
        if kind is kinds.BRANCH:
            return self._state(free=[self._sequence(each, target, flags) for each in value[1]])
        if kind is kinds.SUBPATTERN:
            _, more, less, inner = value
            if more & re.UNICODE:
                raise ValueError(f"{self.regex!r} has (?u:...), and patterns are read as with re.ASCII; leave it out")
            return self._sequence(inner, target, flags & ~less | more)
        if kind in (kinds.MAX_REPEAT, kinds.MIN_REPEAT):
            least, most, inner = value
            behind = target
            if most is kinds.MAXREPEAT:
                behind = self._state(free=[target])
                self.free[behind].append(self._sequence(inner, behind, flags))
            for _ in range(0 if most is kinds.MAXREPEAT else most - least):
                behind = self._state(free=[self._sequence(inner, behind, flags), target])
            return reduce(lambda behind, _: self._sequence(inner, behind, flags), range(least), behind)
        if kind in (kinds.LITERAL, kinds.NOT_LITERAL, kinds.IN, kinds.ANY):
            return self._characters(_ranges(kind, value, flags), target)
        raise ValueError(f"{self.regex!r} has what cannot be kept to ({str(kind).lower()}); write it without anchors, "
                         "look-around and back-references")

    def _characters(self, ranges, target):
        """A state that goes to `target` by any character of some ranges; what ends alike shares its states."""
        first, shared = self._state(), {(): target}
        for sequence in (sequence for low, high in ranges for sequence in _utf8(low, high)):
            for place in range(len(sequence) - 1, 0, -1):
                rest = tuple(sequence[place:])
                if rest not in shared:
                    shared[rest] = self._state([(*rest[0], shared[rest[1:]])])
            self.edges[first].append((*sequence[0], shared[tuple(sequence[1:])]))
        return first


def _ranges(kind, value, flags):
    """[(low, high)] of the characters that an item matches, in order and apart."""
    if kind is kinds.ANY:
        found = [] if flags & re.DOTALL else [(10, 10)]
        return _others(found)
    items = value if kind is kinds.IN else [(kinds.LITERAL, value)]
    negated = kind is kinds.NOT_LITERAL or items[0][0] is kinds.NEGATE
    found = []
    for what, which in items:
        if what is kinds.LITERAL:
            found.append((which, which))
        elif what is kinds.RANGE:
            found.append(which)
        elif what is kinds.CATEGORY:
            these = [(ord(char), ord(char)) for char in CATEGORIES[OPPOSITES.get(which, which)]]
            found += _others(these) if which in OPPOSITES else these
    if flags & re.IGNORECASE:
        letters = map(ord, string.ascii_letters)        # of the other case stands 32 places on, or before
        found += [(letter ^ 32, letter ^ 32) for letter in letters if any(low <= letter <= high for low, high in found)]
    return _others(found if negated else _others(found))


def _others(ranges):
    """All characters but those, as ranges in order; no surrogate, which stands in no text."""
    gaps, place = [], 0
    for low, high in sorted([*ranges, SURROGATES]):
        if low > place:
            gaps.append((place, low - 1))
        place = max(place, high + 1)
    return [*gaps, (place, LAST)] if place <= LAST else gaps


def _utf8(low, high):
    """Characters `low` to `high` as sequences of ranges of bytes, whose products they are."""
    for most in (0x7F, 0x7FF, 0xFFFF):                  # of one length
        if low <= most < high:
            return _utf8(low, most) + _utf8(most + 1, high)
    for bits in (6, 12, 18):                            # of which all but one byte are alike, or go through all
        mask = (1 << bits) - 1
        if high > 0x7F and low & ~mask != high & ~mask:
            if low & mask:
                return _utf8(low, low | mask) + _utf8((low | mask) + 1, high)
            if high & mask != mask:
                return _utf8(low, (high & ~mask) - 1) + _utf8(high & ~mask, high)
    return [list(zip(chr(low).encode(), chr(high).encode()))]


class Pattern:
    """A regular expression, which a text must match as a whole, as a deterministic automaton that reads bytes.

    `start` is the first state, `next` (S, 256) the one behind each, `is_final` (S,) tells where a match may end,
    `distance` (S,) how many bytes away the nearest such end is, `is_last` (S,) where nothing but an end may follow.
    Raises ValueError as `Automaton` does, for what matches nothing, and where the tokenizer lacks a byte.
    """

    def __init__(self, regex: str, pieces: Pieces):
        rows, finals = _deterministic(Automaton(regex))
        lost = len(rows)                                # from here there is no way to an end
        self.start, self.next = 0, np.full((lost + 1, 256), lost, np.int32)
        for state, row in enumerate(rows):
            for low, high, target in row:
                self.next[state, low:high] = target
        self.is_final = np.zeros(lost + 1, bool)
        self.is_final[finals] = True
        self.distance = np.array([*_distances(rows, finals), NEVER])
        if self.distance[self.start] == NEVER:
            raise ValueError(f"{regex!r} matches no text at all; write one that matches some")
        self.next[self.distance[self.next] == NEVER] = lost
        goes_on = self.next != lost
        self.is_last = self.is_final & ~goes_on.any(-1)
        missing = sorted({*np.flatnonzero(goes_on.any(0)).tolist()} - {
            piece[0] for piece in pieces.bytes if len(piece) == 1})
        if missing:
            raise ValueError(f"this tokenizer has no token for the byte {missing[0]:#04x} alone, so a text cannot be "
                             "held to a pattern; take a model whose tokenizer has all bytes")
        self.pieces, self.after = pieces, lru_cache(REMEMBERED)(self._after)

    def _after(self, state):
        """(V,): the state behind each token that is read in `state`."""
        order, text, longer = self.pieces.table
        states = np.full(len(order), state, np.int32)
        for place, count in enumerate(longer):
            states[:count] = self.next[states[:count], text[:count, place]]
        after = np.full(len(order), len(self.next) - 1, np.int32)
        after[order] = states
        after[~self.pieces.has_text] = len(self.next) - 1
        return after


def _deterministic(automaton):
    """([(from byte, to the one before, next state)] of each state, the final states); state 0 is the first."""
    work = 0

    def spend(amount):
        nonlocal work
        work += amount
        if work > MOST_WORK:
            raise TooLarge(f"{automaton.regex[:60]!r} needs too many states; lower the numbers in braces")

    @lru_cache(None)
    def reached(state):
        """States with edges, and the end, that are reached from here without reading."""
        found, seen, left = set(), {state}, [state]
        while left:
            at = left.pop()
            if at == 0 or automaton.edges[at]:
                found.add(at)
            left += (more := set(automaton.free[at]) - seen)
            seen |= more
        spend(len(seen))
        return frozenset(found)

    names, rows = {reached(automaton.start): 0}, []
    order = list(names)
    for states in order:
        edges = [edge for state in states for edge in automaton.edges[state]]
        bounds = sorted({low for low, _, _ in edges} | {high + 1 for _, high, _ in edges})
        row = []
        spend(len(edges) * len(bounds))
        for low, high in zip(bounds, bounds[1:]):
            parts = [reached(target) for first, last, target in edges if first <= low <= last]
            spend(sum(map(len, parts)))
            targets = frozenset().union(*parts)
            if targets:
                if targets not in names:
                    names[targets] = len(order)
                    order.append(targets)
                    spend(MOST_WORK / MOST_STATES)
                row.append((low, high, names[targets]))
        rows.append(row)
    return rows, [names[states] for states in order if 0 in states]


def _distances(rows, finals):
    """Of each state the fewest bytes to a final one, NEVER where there is no way."""
    before = [[] for _ in rows]
    for state, row in enumerate(rows):
        for _, _, target in row:
            before[target].append(state)
    distances, reached = [NEVER] * len(rows), list(finals)
    for state in finals:
        distances[state] = 0
    for state in reached:
        for other in before[state]:
            if distances[other] == NEVER:
                distances[other] = distances[state] + 1
                reached.append(other)
    return distances
