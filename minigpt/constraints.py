"""What a continuation may say: how it begins and ends, what stands nowhere in it, and what it matches as a whole.

All of it is decided on bytes, so it holds however the text is cut into tokens.
"""

from __future__ import annotations

import copy
from functools import reduce

import numpy as np

from minigpt import json_schema
from minigpt.config import SamplingParams
from minigpt.patterns import NEVER, Pattern, Pieces, TooLarge


def compiled(params: SamplingParams, pieces: Pieces) -> Pattern | None:
    """What the whole continuation must match."""
    if not params.json_schema:
        return pieces.pattern(params.regex) if params.regex else None
    try:
        return pieces.pattern(json_schema.to_regex(params.json_schema))
    except TooLarge:
        raise ValueError("json_schema describes more than can be kept to; lower its lengths and counts, and make more "
                         "properties required") from None


class Text:
    """The bytes of a continuation as they are drawn, and which tokens may come next.

    `end` is where the first of the stop strings to be complete begins, None as long as there is none; `sure` bytes are
    no beginning of one.
    """

    def __init__(self, params: SamplingParams, pieces: Pieces, ends: frozenset[int] = frozenset()):
        self.params, self.pieces, self.ends = params, pieces, ends
        self.stops = [stop.encode() for stop in params.stop]
        self.banned = [text.encode() for text in params.banned]
        self.beginning = pieces.spelled(params.begin_with)
        self.pattern = compiled(params, pieces)
        self.state = self.pattern.start if self.pattern else None
        self.count, self.content, self.end, self.sure = 0, b"", None, 0
        self.may_stand = ~np.any([np.zeros(len(pieces.bytes), bool), *map(pieces.containing, self.banned)], axis=0)
        self._check()

    def _check(self):
        """Raise ValueError where no text can be what is asked for."""
        params, beginning = self.params, self.params.begin_with
        for text in params.banned:
            if text in beginning:
                raise ValueError(f"begin_with = {beginning!r} has the banned {text!r} in it; change one of them")
        least = len(self.beginning)
        if self.pattern:
            state = reduce(lambda state, token: self.pattern.after(state)[token], self.beginning, self.state)
            if self.pattern.distance[state] == NEVER:
                raise ValueError(f"begin_with = {beginning!r} begins no text that matches; change one of them")
            least += int(self.pattern.distance[state])
        if least > params.max_new_tokens:
            raise ValueError(f"max_new_tokens = {params.max_new_tokens} may be too few for any text that begins and "
                             f"matches as asked; give {least} or more")

    @staticmethod
    def is_needed(params: SamplingParams) -> bool:
        """Whether the draws depend on what the text says."""
        return bool(params.stop or params.banned or params.begin_with or params.regex or params.json_schema
                    or params.min_new_tokens)

    def extended(self, token: int) -> Text:
        """The text with one more token."""
        more = copy.copy(self)
        more.add(token)
        return more

    def add(self, token: int) -> None:
        self.count += 1
        if token in self.ends:                          # which is no text
            return
        self.add_bytes(self.pieces.bytes[token])
        if self.pattern:
            self.state = int(self.pattern.after(self.state)[token])

    def add_bytes(self, piece: bytes) -> None:
        seen = len(self.content)
        self.content += piece
        self.sure = len(self.content)
        if not self.stops:
            return
        longest = max(map(len, self.stops))
        found = [(place + len(stop), place) for stop in self.stops
                 if (place := self.content.find(stop, max(0, seen - longest + 1))) >= 0]
        if found:
            self.end = self.sure = min(found)[1]
            return
        self.sure -= max((size for stop in self.stops for size in range(1, min(len(stop), 1 + len(self.content)))
                          if self.content.endswith(stop[:size])), default=0)

    @property
    def is_over(self) -> bool:
        """Whether a stop string stands in it, or it matches and nothing may follow."""
        return self.end is not None or self.pattern is not None and bool(self.pattern.is_last[self.state])

    def allowed(self) -> np.ndarray | None:
        """(V,) bool: the tokens that may come next; None where all may.

        A pattern keeps as many tokens back as a match still needs, so that it is complete by `max_new_tokens`.
        """
        if self.count < len(self.beginning):
            may = np.zeros(len(self.pieces.bytes), bool)
            may[self.beginning[self.count]] = True
            return may
        may, ends = self.may_stand.copy(), list(self.ends)
        if self.pattern:
            left = self.params.max_new_tokens - self.count - 1
            may &= self.pattern.distance[self.pattern.after(self.state)] <= left
            may[ends] = self.pattern.is_final[self.state]
        for text in self.banned:
            for size in range(1, len(text)):
                if self.content.endswith(text[:size]):
                    may &= ~self.pieces.starting_with(text[size:])
        if self.count < self.params.min_new_tokens:
            may[ends] = False
        return None if may.all() else may
