"""Texts from a model, many at a time: requests wait in a queue, share a key-value cache and come and go between steps.

    run = minigpt.load("runs/quickstart")
    text = run.generate("def main(", SamplingParams(temperature=0.8, seed=1))
    for piece in run.stream("def main("): print(piece, end="", flush=True)

    engine = Engine(run.model, run.tokenizer, slots=8)              # beneath it
    requests = [engine.submit(ids, params) for ids in prompts]
    while engine.step(): ...
"""

from __future__ import annotations

import codecs
import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
import torch

import kernels
from minigpt import checkpoint, sampling
from minigpt.cache import Decode, KVCache, Prefill, alike
from minigpt.config import Config, SamplingParams
from minigpt.constraints import Pieces, Text
from minigpt.device import pick_device
from minigpt.flat import FlatStep, GraphStep
from minigpt.model import GPT
from minigpt.packed import CHUNK, packed, steady_rows
from minigpt.search import BeamSearch, ContrastiveSearch, Search
from minigpt.speculative import Draft, Lookup
from minigpt.tokenizer import Tokenizer

DEFAULT = SamplingParams()
PREFILL = 512
"""Tokens of prompts that are read at a time: enough to keep every core busy, and a bound on memory."""
SHARED = 32
"""A request that begins with so many tokens of another waits until these are read, and takes them over."""
CACHE_BYTES = 1 << 30
PACKED_BYTES = 1 << 30
"""Weights of float32 that take more are copied to be packed only when several rows are to be read in one step."""
MOST_SLOTS = 16


class Request:
    """A text under way: `tokens` are the prompt's ids and those drawn so far.

    `is_done` tells whether it has ended; `error` is a ValueError where the model's output was not finite, or nothing
    may come next. `cancel()` ends it within one step. One that is searched for has `rows`, requests of which it is the
    first, each with a slot; when it is done, `found` are its continuations, the best first, and `tokens` that one's.
    """

    def __init__(self, prompt: list[int], params: SamplingParams, generator: torch.Generator, ends: frozenset[int],
                 text: Text | None = None):
        self.tokens, self.params, self.generator = list(prompt), params, generator
        self.ends, self.text = ends, text
        self.num_prompt, self.is_done, self.error = len(prompt), False, None
        self.slot, self.first, self.stored = None, 0, 0
        """Its slot holds `stored` tokens from tokens[first] on."""
        self.reusable = 0
        """How many of these another request may take over."""
        alone = params.needs_text or params.logit_bias or text
        self.drawn_like = self if alone else (
            params.temperature, params.top_k, params.top_p, params.min_p, params.typical_p)
        """Requests of which this is equal are drawn together."""
        self.log_probabilities = []
        """Where they are asked for, of each token drawn: its own, and {id: log-probability} of the likeliest."""
        self.search, self.rows, self.number, self.is_idle, self.found = None, [self], 0, False, []
        """A row is idle while the search has no more than `number` texts."""

    def search_with(self, search: Search) -> None:
        """Make it the first of as many rows as the search may have texts."""
        self.rows += [copy.copy(self) for _ in range(self.params.rows - 1)]
        for number, row in enumerate(self.rows):
            row.search, row.drawn_like, row.number, row.is_idle = search, search, number, number > 0

    @property
    def drawn(self) -> list[int]:
        """The ids drawn so far."""
        return self.tokens[self.num_prompt:]

    @property
    def held(self) -> list[int]:
        """The tokens of its slot that another request may take over."""
        return self.tokens[self.first:self.first + self.reusable]

    @property
    def is_left(self) -> bool:
        """Whether its slot is needed no more."""
        return self.rows[0].is_done

    def become(self, tokens: list[int]) -> None:
        """Another text, of which its slot holds what the two have in common."""
        if tokens is not self.tokens:
            self.stored = max(0, min(self.stored, alike(self.tokens, tokens) - self.first))
            self.reusable = min(self.reusable, self.stored)
            self.tokens = tokens

    def cancel(self) -> None:
        self.is_done = True


class Engine:
    """Decodes requests in `slots` of a cache that is allocated once; what finds no slot waits in a queue.

    `slots` (0: as many as fit a gigabyte, at most 16) and `length`, the tokens of each (0: the model's context, or
    what fits a gigabyte), bound the memory. The model's weights must stay as they are. `past_context`: what is done
    when a slot is full: "reread", its second half is read again as a new beginning, or "slide", the first half is
    forgotten and the second kept as it was computed (not for learned positions). With `invariant` a request gives
    the same tokens, on a CPU in float32, whatever else is in the batch: rows are as many as products of one kind take,
    and prompts are read in chunks of one size. No token is read that a slot already holds for another request, or for
    the turn before in a conversation. A request that is alone may have some tokens guessed, which are then read in one
    pass; the distribution of its texts is the same (speculative.py): with `lookup` up to so many that stood after its
    last three or two before, with a `draft`, a smaller model with the same tokenizer, those that this draws. One thread
    at a time may use it.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, slots: int = 0, length: int = 0, invariant: bool = False,
                 past_context: str = "reread", lookup: int = 0, draft: GPT | None = None):
        config, dtype = model.config, model.dtype
        if past_context not in ("reread", "slide"):
            raise ValueError(f"past_context = {past_context!r} is none of: reread, slide")
        if past_context == "slide" and model.config.position == "learned":
            raise ValueError("past_context = slide is not for a model with learned positions; take reread")
        for name, value in (("slots", slots), ("length", length), ("lookup", lookup)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} = {value} is no whole number of 0 or more")
        if invariant and (lookup or draft is not None):
            raise ValueError("neither lookup nor a draft goes with invariant, where a text must not depend on whether "
                             "it is alone; leave out one of them")
        if lookup and draft is not None:
            raise ValueError("a draft does not go with lookup; leave out one of them")
        if draft is not None and draft.config.vocab_size < len(tokenizer.never_sampled):
            raise ValueError(f"the draft has {draft.config.vocab_size} tokens, fewer than the tokenizer's "
                             f"{len(tokenizer.never_sampled)}; take one that was trained with the same tokenizer")
        self.model, self.invariant, self.past_context = model, invariant, past_context
        self.guesser = Draft(draft) if draft is not None else Lookup(lookup) if lookup else None
        fits = CACHE_BYTES // KVCache.slot_bytes(config, 0, dtype) - 1
        self.length, self.device = min(length or max(1, fits), config.context_length), model.device
        room = CACHE_BYTES // KVCache.slot_bytes(config, self.length, dtype)
        self.slots = slots or max(1, min(MOST_SLOTS, room))
        places = -(-self.length // CHUNK) * CHUNK if invariant else self.length     # a chunk is written whole
        self.rows = steady_rows(self._packed, self.slots) if invariant else range(1, self.slots + 1)
        """Numbers of rows that a step may have."""
        self.cache = KVCache(config, self.rows[-1], places, self.device, dtype)
        self.num_ids = len(tokenizer.never_sampled)
        self.never = torch.from_numpy(np.flatnonzero(tokenizer.never_sampled)).to(self.device)
        self.ends, self.tokenizer = frozenset(tokenizer.roles.end_tokens), tokenizer
        self._steps = {}
        self.queue, self.active = deque(), {}
        """Requests that wait, and {slot: request} of those that do not."""
        self.left = {slot: [] for slot in range(self.slots)}
        """{free slot: the tokens that it still holds}, the longest free first."""

    def submit(self, prompt: list[int], params: SamplingParams = DEFAULT, row: int = 0) -> Request:
        """Queue a prompt's ids; its tokens are drawn from a generator seeded by (params.seed, row)."""
        if not prompt:
            raise ValueError("the prompt has no token; give at least what starts a document")
        vocab_size = self.model.config.vocab_size
        for token in prompt:
            if not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
                raise ValueError(f"the prompt's {token!r} is no token; ids are whole numbers from 0 to "
                                 f"{vocab_size - 1}")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_tokens", params.stop_tokens)):
            if ids and max(ids) >= self.num_ids:
                raise ValueError(f"{name}: {max(ids)} is no token; ids are 0 to {self.num_ids - 1}")
        generator = torch.Generator(self.device).manual_seed(_mixed(params.seed, row))
        ends = frozenset(self.ends).union(params.stop_tokens)
        text = Text(params, self._pieces, ends) if Text.is_needed(params) else None
        request = Request(prompt, params, generator, ends, text)
        if params.rows > 1:
            kind = BeamSearch if params.num_beams > 1 else ContrastiveSearch
            request.search_with(kind(request.tokens, params, ends, text, generator))
        if len(request.rows) > self.slots:
            raise ValueError(f"num_beams, or top_k of contrastive search, = {len(request.rows)} is more than the "
                             f"engine's slots, {self.slots}; give fewer, or Engine(..., slots={len(request.rows)})")
        self.queue.append(request)
        return request

    @torch.inference_mode()
    def step(self) -> bool:
        """Draw one token for every request that has a slot, first giving slots to those that wait.

        False where there is nothing left to do. A step that an exception or Ctrl-C breaks off is made up for by the
        next: what a slot holds is noted when it is there, and a token counts as read when the next one is drawn.
        """
        self._free()
        behind, going = [], []
        for request in self.active.values():
            if request.search:
                self._settle(request)
            if request.is_idle or request.is_left:
                continue
            if request.search and request.search.needs_all:
                request.stored = 0
            request.stored = min(request.stored, len(request.tokens) - request.first - 1)
            request.reusable = min(request.reusable, request.stored)
            if len(request.tokens) - request.first > self.length:
                self._make_room(request)
            is_behind = len(request.tokens) - request.first - request.stored > 1 or not request.stored
            (behind if is_behind else going).append(request)
        late = {request.search for request in behind if request.search}
        behind += [request for request in going if request.search in late]      # the rows of a search are read together
        going = [request for request in going if request.search is None or request.search not in late]
        while self.queue:
            request = self.queue[0]
            without = [row for row in request.rows if self.active.get(row.slot) is not row]
            if len(without) > len(self.left) and not request.is_done:
                break
            if without and not request.is_done:
                is_new = request in without
                if is_new and any(alike(request.tokens, other.tokens) >= SHARED for other in behind):
                    self._read(behind)                  # then it need not read that itself
                    behind = []
                for row in without:
                    self._give_slot(row)
                behind += [request] * is_new
            self.queue.popleft()
        if behind:
            self._read(behind)
        if self.guesser and len(self.active) == 1 and going and self._guess(going[0]):
            going = []
        if going:
            going.sort(key=lambda request: request.slot)
            self._draw(going, *self._decode(going))
        self._free()
        return bool(self.active or self.queue)

    def possible(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of the ids that there are, -inf for those that no text can have; they are written to."""
        return logits[:, :self.num_ids].index_fill_(1, self.never, -torch.inf)

    def _free(self):
        """Take the slots of requests that are done; what has one leaves it to no other, wherever a step was broken off.
        """
        for slot, request in list(self.active.items()):
            self.left.pop(slot, None)
            if request.is_left:
                self.left[slot] = request.held
                del self.active[slot]

    def _give_slot(self, request):
        """The slot that holds the longest beginning of its tokens; where another request uses that, a copy of it."""
        request.first = max(0, len(request.tokens) - self.length)
        anew = request.is_idle or request.search and request.search.needs_all
        wanted = [] if anew else request.tokens[request.first:-1]
        held = self.left | {slot: other.held for slot, other in self.active.items()}
        common = {slot: alike(tokens, wanted) for slot, tokens in held.items()}
        source = max(common, key=common.get)
        count = common[source] // CHUNK * CHUNK if self.invariant else common[source]
        slot = source if source in self.left and count else next(
            (slot for slot, tokens in self.left.items() if not tokens), next(iter(self.left)))
        if count and slot != source:
            self.cache.move([(source, slot, 0, count)])
        request.slot, request.stored, request.reusable = slot, count, count
        self.active[slot] = request                     # from here on it has the slot; see _free
        self.left.pop(slot, None)

    def _make_room(self, request):
        """Of a full slot keep the second half, or nothing, so that it is read again."""
        half, full = self.length // 2, request.stored == self.length
        request.first, request.stored, request.reusable = len(request.tokens) - half - 1, 0, 0
        if self.past_context == "slide" and full:
            self.cache.slide(request.slot, self.length - half, self.length, self.model.positions.tables)
            request.stored = half

    def _read(self, requests):
        """Read all tokens that their slots do not hold yet, and draw one for each request."""
        reader, parts, hidden = self._reader(1), [], {request: [] for request in requests}
        for request in requests:
            size, end = CHUNK if self.invariant else PREFILL, len(request.tokens) - request.first
            parts += [(request, start, min(start + size, end)) for start in range(request.stored, end, size)]
        while parts:
            count = 1                                   # as many parts as fit into one pass
            while count < len(parts) and not self.invariant and parts[count][2] - parts[count][1] <= PREFILL - sum(
                    end - start for _, start, end in parts[:count]):
                count += 1
            for (request, _, end), read in zip(parts[:count], self._pass(reader, parts[:count])):
                hidden[request] = [*hidden[request], read] if request.search else [read]
                request.stored = request.reusable = end
            parts = parts[count:]
        hidden = [torch.cat(hidden[request]) for request in requests]
        rows = torch.stack([read[-1] for read in hidden])
        rows = torch.nn.functional.pad(rows, (0, 0, 0, self._rows(len(rows)) - len(rows)))
        self._draw(requests, reader.head(rows).float()[:len(requests)], hidden)

    def _pass(self, reader, parts):
        """Read tokens [start, end) of some requests; gives what the head reads of each, (end - start, C)."""
        ids, places = [], []
        for request, start, end in parts:
            tokens = request.tokens[request.first + start:request.first + end]
            ids += tokens + tokens[-1:] * (CHUNK - len(tokens) if self.invariant else 0)
            places.append((request.slot, start, CHUNK if self.invariant else end - start))
        hidden = reader.hidden(torch.tensor([ids], device=self.device), cache=Prefill(self.cache, *places))[0]
        firsts = accumulate((count for _, _, count in places[:-1]), initial=0)
        return [hidden[first:first + end - start] for first, (_, start, end) in zip(firsts, parts)]

    def _decode(self, requests):
        """Read one token of each; gives their logits (B, V), and what the head reads, (1, C) each, if need be."""
        lengths = {request.slot: request.stored for request in requests}
        last = {request.slot: request.tokens[-1] for request in requests}
        slots = sorted(self._with_idle(lengths))
        ids = torch.tensor([[last.get(slot, 0) for slot in slots]], device=self.device)
        view = Decode(self.cache, {slot: lengths.get(slot, -1) for slot in slots})
        hidden = None
        if any(request.search and request.search.needs_hidden for request in requests):
            reader = self._reader(len(slots))
            hidden = reader.hidden(ids, cache=view)[0]
            logits = reader.head(hidden).float()
        else:
            logits = self._logits(ids, view)
        for request in requests:
            request.reusable += not self.invariant and request.reusable == request.stored
            request.stored += 1
        used = [slot in lengths for slot in slots]
        hidden = None if hidden is None else hidden[used].split(1)
        return logits if len(slots) == len(requests) else logits[used], hidden

    def _with_idle(self, slots):
        """These slots and idle ones, to a number of rows; on a GPU, where rows cost nothing, all between."""
        least = 1 + max(slots) if self.device.type == "cuda" else len(slots)
        count = self._rows(least)
        idle = (slot for slot in range(count) if slot not in slots)
        return [*slots, *islice(idle, count - len(slots))]

    def _rows(self, count):
        """The least number of rows that a step may have, of `count` or more."""
        return next(rows for rows in self.rows if rows >= count)

    def _reader(self, rows):
        """The model with packed weights, or as it is where these take much memory and one row gains nothing."""
        unpacked = rows == 1 and not self.invariant and self._is_large and "_packed" not in self.__dict__
        return self.model if unpacked else self._packed

    def _logits(self, ids, view):
        """Read ids (1, T); gives the logits (T, V), by a step that was made for as many before."""
        rows, reader = ids.shape[1], self._reader(ids.shape[1])
        if self._in_graphs and isinstance(view, Decode):
            key = reader, rows
            step = self._steps.get(key) or self._steps.setdefault(key, GraphStep(reader, self.cache, rows))
        else:
            step = self._steps.get(reader) or self._steps.setdefault(reader, FlatStep(reader))
        return step(ids, view)

    @cached_property
    def _in_graphs(self):
        """The reference of the attention asks the GPU for lengths, which a graph cannot hold."""
        return self.device.type == "cuda" and kernels.explain()["decode_attention"][0] == "triton"

    @cached_property
    def _is_large(self):
        weights = [parameter for parameter in self.model.parameters() if parameter.dtype == torch.float32]
        return sum(weight.nbytes for weight in weights) > PACKED_BYTES

    @cached_property
    def _pieces(self):
        return Pieces(self.tokenizer)

    @cached_property
    def _packed(self):
        return packed(self.model)

    def _guess(self, request):
        """Read the last token and the guesses after it in one pass, and draw until one is wrong; False without any."""
        room = min(self.length - request.stored - 1,
                   request.params.max_new_tokens - len(request.tokens) + request.num_prompt - 1)
        try:
            guesses = self.guesser.guesses(request.tokens, room, partial(self._draw_guess, request))
        except ValueError as error:
            request.error, request.is_done = error, True
            return True
        if not guesses:
            return False
        ids = torch.tensor([[request.tokens[-1], *(token for token, _ in guesses)]], device=self.device)
        logits = self._logits(ids, Prefill(self.cache, (request.slot, request.stored, ids.shape[1])))
        whole = request.reusable == request.stored
        for place, guess in enumerate([*guesses, None]):
            self._draw([request], logits[place:place + 1], guess=guess)
            request.stored += 1
            if request.is_done or guess is None or request.tokens[-1] != guess[0]:
                break
        if whole and request.error is None:
            request.reusable = request.stored
        return True

    def _draw_guess(self, request, logits, tokens):
        """A draft's token, and the probabilities (1, V) it was drawn with, as the request's own are drawn.

        None where nothing may come next.
        """
        logits = self.possible(logits)
        if text := request.text:
            for token in tokens[len(request.tokens):]:
                text = text.extended(token)
            logits = sampling.only(logits, text.allowed())
        logits = sampling.process(logits, self._seen(tokens, request.params), request.params, request.num_prompt)
        top, likeliest = logits.max(-1)
        if top.item() == -torch.inf:
            return None
        sampling.check_finite(top, "draft")
        if request.params.is_greedy:
            return int(likeliest), None
        probabilities = logits.softmax(-1)
        return int(sampling.drawn(probabilities, [request.generator])), probabilities

    def _draw(self, requests, logits, hidden=None, guess=None):
        """One token for each request from its row of logits (B, V); an id that no text can have is never drawn."""
        logits = self.possible(logits)
        groups = {}
        for row, request in enumerate(requests):
            if not request.is_left:
                groups.setdefault(request.drawn_like, []).append(row)
        for rows in groups.values():
            if requests[rows[0]].search:
                rows.sort(key=lambda row: requests[row].number)
                self._advance(requests[rows[0]].rows[0], logits[rows], hidden and [hidden[row] for row in rows])
                continue
            self._draw_alike([requests[row] for row in rows], logits if len(rows) == len(logits) else logits[rows],
                             guess)

    def _seen(self, tokens, params):
        """The tokens (1, N) of a text where its draws depend on them."""
        return torch.tensor([tokens], device=self.device) if params.needs_text else None

    def _settle(self, row):
        """Make a row what its search says, wherever a step was broken off."""
        texts = row.search.state.rows
        row.is_idle = row.number >= len(texts)
        if row.search.is_done:
            self._end_search(row.rows[0])
        elif not row.is_idle:
            row.become(texts[row.number])

    def _advance(self, request, logits, hidden):
        """Go on with a search; a row that grew from another takes over what that one's slot holds."""
        search, before = request.search, [copy.copy(row) for row in request.rows]
        try:
            sampling.check_finite(logits.amax(-1), "model")
            search.advance(logits, hidden)
        except ValueError as error:
            request.error, request.is_done = error, True
            for row in request.rows:
                row.reusable = 0
            return
        if search.is_done:
            self._end_search(request)
            return
        grown = [(row, before[parent]) for row, parent in zip(request.rows, search.state.parents)]
        moves = []
        for row, parent in grown:
            if row.is_idle:
                row.stored, row.first = 0, parent.first
            self._settle(row)
            if row.slot != parent.slot:
                moves.append((parent.slot, row.slot, row.stored, parent.stored))
        self.cache.move(moves)
        for row, parent in grown:
            row.stored, row.reusable = parent.stored, parent.reusable
        for row in request.rows[len(grown):]:
            self._settle(row)

    def _end_search(self, request):
        found = request.search.state.found
        request.become(found[0].tokens)
        request.found, request.text, request.log_probabilities = found, found[0].text, found[0].log_probabilities
        request.is_done = True

    def _draw_alike(self, requests, logits, guess):
        first = requests[0]
        tokens = self._seen(first.tokens, first.params)
        try:
            allowed = sampling.only(logits, first.text.allowed()) if first.text else logits
            drawn = sampling.sample(allowed, tokens, first.params, [request.generator for request in requests], guess,
                                    first.num_prompt)
        except ValueError as error:
            if len(requests) > 1:                       # of some rows; the others go on
                for row, request in enumerate(requests):
                    self._draw_alike([request], logits[row:row + 1], guess)
                return
            first.error, first.is_done, first.reusable = error, True, 0             # NaN would spread from its slot
            return
        for row, (request, token) in enumerate(zip(requests, drawn.tolist())):
            if number := request.params.log_probabilities:
                request.log_probabilities.append(sampling.told(logits[row].log_softmax(-1), token, number))
            request.tokens.append(token)
            enough = len(request.tokens) - request.num_prompt >= request.params.max_new_tokens
            if request.text:
                request.text.add(token)
            request.is_done = enough or token in request.ends or request.text is not None and request.text.is_over


def _mixed(*numbers):
    """One 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Completion:
    """A continuation, and how it came about."""

    text: str
    reason: str
    """Why it ends: "stop" (a stop string or token), "end" (a token that ends a text, or a match that is complete) or
    "length" (max_new_tokens)."""
    tokens: list[dict]
    """Where `log_probabilities` are asked for: of each token its text, id, log-probability, and the likeliest ones."""
    score: float | None = None
    """Of one that was searched for."""


class Run:
    """A checkpoint, opened: `model`, `tokenizer` (None where it was imported without), `config`, and text from them."""

    def __init__(self, model: GPT, tokenizer: Tokenizer | None, config: Config, path: Path, **engine_options):
        self.model, self.tokenizer, self.config, self.path = model, tokenizer, config, path
        self._engine_options = engine_options

    @cached_property
    def engine(self) -> Engine:
        """Made when the first text is asked for."""
        return Engine(self.model, self.tokenizer, **self._engine_options)

    def generate(self, prompts: str | list[str] | None, params: SamplingParams = DEFAULT) -> str | list[str]:
        """The continuation of a prompt, or, of a list, one for each, decoded as one batch.

        None starts a new document. Prompt i of a list draws from (seed, i). Raises ValueError for an empty prompt
        and for a model that was not trained to continue text.
        """
        if not isinstance(prompts, list):
            return "".join(self.stream(prompts, params))
        encoded = [self.encode_prompt(prompt) for prompt in prompts]
        texts = self._texts([self.engine.submit(ids, params, row) for row, ids in enumerate(encoded)])
        return [(prompt or "") + text for prompt, text in zip(prompts, texts)] if params.echo else texts

    def samples(self, prompt: str | None, params: SamplingParams, number: int) -> list[Completion]:
        """`number` continuations of one prompt, decoded as one batch; sample i draws from (seed, i).

        Of a search they are the best that were found, the best first; ValueError for more than it has beams.
        """
        ids = self.encode_prompt(prompt)
        if params.rows > 1:
            if number > params.num_beams:
                raise ValueError(f"{number} samples of num_beams = {params.num_beams} are too many; ask for "
                                 f"{params.num_beams} or fewer")
            request = self.engine.submit(ids, params)
            self._texts([request])
            return [self._completion(prompt, request, each.tokens, each.text, each.log_probabilities, each.score)
                    for each in request.found[:number]]
        requests = [self.engine.submit(ids, params, row) for row in range(number)]
        self._texts(requests)
        return [self._completion(prompt, request, request.tokens, request.text, request.log_probabilities)
                for request in requests]

    def _completion(self, prompt, request, tokens, text, log_probabilities, score=None):
        drawn, end = tokens[request.num_prompt:], text and text.end
        ended = drawn[-1] in request.ends
        content = text.content[:end] if text else self.tokenizer.decode_bytes(drawn[:len(drawn) - ended])
        stopped = end is not None or ended and drawn[-1] not in self.engine.ends
        reason = "stop" if stopped else "end" if ended or text and text.is_over else "length"
        told = [self._told(*both) for both in zip(drawn, log_probabilities)]
        if request.params.echo and request.params.log_probabilities:
            told = self._told_of_prompt(request) + told
        before = prompt or "" if request.params.echo else ""
        return Completion(before + content.decode("utf-8", errors="replace"), reason, told, score)

    def _told(self, token, log_probabilities):
        def word(token):
            return self.tokenizer.token_bytes[token].decode("utf-8", errors="replace")

        own, likeliest = log_probabilities
        return {"token": word(token), "id": token, "log_probability": own, "likeliest": [
            {"token": word(other), "id": other, "log_probability": its} for other, its in likeliest.items()]}

    @torch.inference_mode()
    def _told_of_prompt(self, request):
        """The same of the prompt's tokens, None for what nothing stands before in the context."""
        ids = request.tokens[:request.num_prompt]
        seen = ids[-self.model.config.context_length:]
        of_all = self.engine.possible(self.model(torch.tensor([seen], device=self.model.device))[0]).log_softmax(-1)
        told = [(None, {})] * (len(ids) - len(seen) + 1) + [
            sampling.told(row, token, request.params.log_probabilities) for row, token in zip(of_all, seen[1:])]
        return [self._told(id, its) for id, its in zip(ids, told) if not self.tokenizer.is_special[id]]

    def _texts(self, requests):
        try:
            return ["".join(self._pieces(request)) for request in requests]
        finally:
            for request in requests:
                request.cancel()

    def stream(self, prompt: str | None, params: SamplingParams = DEFAULT, row: int = 0) -> Iterator[str]:
        """The continuation in pieces, as it is drawn; a piece never ends within a character.

        Several streams may be read in turn. One that is closed, or left by Ctrl-C, ends its request.
        """
        return self._stream(self.encode_prompt(prompt), params, row)

    def _stream(self, ids, params, row):
        request = self.engine.submit(ids, params, row)
        try:
            if params.echo:
                yield self.tokenizer.decode(ids)
            yield from self._pieces(request)
        finally:
            request.cancel()

    def _pieces(self, request):
        """Text of a request as it is drawn; other requests go on meanwhile."""
        decoder, place, given = codecs.getincrementaldecoder("utf-8")(errors="replace"), request.num_prompt, 0
        while True:
            while not request.is_done and (request.search or place == len(request.tokens)):
                self.engine.step()
            if request.error:
                raise request.error
            if (place == len(request.tokens) or request.tokens[place] in request.ends
                    or self.tokenizer.is_special[request.tokens[place]]):
                break
            content = self.tokenizer.token_bytes[request.tokens[place]]
            place += 1
            if request.text is not None:                # what may become a stop string is held back
                content, given = request.text.content[given:request.text.sure], request.text.sure
            if piece := decoder.decode(content):
                yield piece
        if request.text is not None and request.text.end is None and (
                piece := decoder.decode(request.text.content[given:])):
            yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    def encode_prompt(self, prompt: str | None) -> list[int]:
        """The ids of a prompt behind what stands before one; of None, what stands before a document."""
        if self.tokenizer is None:
            raise ValueError(f"{self.path}: has no tokenizer; import it again with --tokenizer DIR")
        if not self.config.objective.is_causal:
            raise ValueError(f"{self.path}: trained with the objective {self.config.objective.name!r}, so it cannot "
                             "continue text; sample from a causal model")
        if prompt == "":
            raise ValueError("the prompt is empty; give some text, or none at all to start a new document")
        roles = self.tokenizer.roles
        return [roles.document_start] if prompt is None else [*roles.prompt_start, *self.tokenizer.encode(prompt)]


def load(path: str | Path, device: str | torch.device | None = None, *, draft: str | Path | None = None,
         **engine_options) -> Run:
    """Open a run (its newest valid checkpoint) or a checkpoint directory, checked byte by byte.

    `device`: CUDA where there is one, else the CPU, unless given. `draft` is another, smaller one with the same
    tokenizer, `engine_options` are those of `Engine`. Raises FileNotFoundError or ValueError naming what is missing,
    damaged or unfit.
    """
    found = checkpoint.find(path)
    if draft is not None:
        guessing = load(draft, device)
        fingerprints = [getattr(tokenizer, "fingerprint", None) for tokenizer in (found.tokenizer, guessing.tokenizer)]
        if None in fingerprints or len(set(fingerprints)) > 1:
            raise ValueError(f"{draft}: has another tokenizer than {path}; take a draft that was trained with the same")
        engine_options["draft"] = guessing.model
    found.check_depth()
    with torch.device("meta"):
        found.check_model(GPT(found.config.model, initial=False))
    model = GPT(found.config.model, initial=False).to(pick_device(device)).eval()
    found.load_model(model)
    return Run(model, found.tokenizer, found.config, found.path, **engine_options)
