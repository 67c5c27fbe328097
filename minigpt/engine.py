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
import math
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
from minigpt.device import pick_device
from minigpt.flat import FlatStep, GraphStep
from minigpt.model import GPT
from minigpt.packed import CHUNK, packed, steady_rows
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

    `is_done` tells whether it has ended; `error` is a ValueError where the model's output was not finite. `cancel()`
    ends it within one step.
    """

    def __init__(self, prompt: list[int], params: SamplingParams, generator: torch.Generator):
        self.tokens, self.params, self.generator = list(prompt), params, generator
        self.num_prompt, self.is_done, self.error = len(prompt), False, None
        self.slot, self.first, self.stored = None, 0, 0
        """Its slot holds `stored` tokens from tokens[first] on."""
        self.reusable = 0
        """How many of these another request may take over."""
        alone = params.needs_text or params.min_new_tokens or params.logit_bias
        self.drawn_like = self if alone else (
            params.temperature, params.top_k, params.top_p, params.min_p, params.typical_p)
        """Requests of which this is equal are drawn together."""
        self.text = StopText(params.stop) if params.stop else None
        self.log_probabilities = []
        """Where they are asked for, of each token drawn: its own, and {id: log-probability} of the likeliest."""

    @property
    def drawn(self) -> list[int]:
        """The ids drawn so far."""
        return self.tokens[self.num_prompt:]

    @property
    def held(self) -> list[int]:
        """The tokens of its slot that another request may take over."""
        return self.tokens[self.first:self.first + self.reusable]

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
        if params.logit_bias and max(params.logit_bias) >= self.num_ids:
            raise ValueError(f"logit_bias: {max(params.logit_bias)} is no token; ids are 0 to {self.num_ids - 1}")
        request = Request(prompt, params, torch.Generator(self.device).manual_seed(_mixed(params.seed, row)))
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
            request.stored = min(request.stored, len(request.tokens) - request.first - 1)
            request.reusable = min(request.reusable, request.stored)
            if len(request.tokens) - request.first > self.length:
                self._make_room(request)
            is_behind = len(request.tokens) - request.first - request.stored > 1 or not request.stored
            (behind if is_behind else going).append(request)
        while self.queue and self.left:
            request = self.queue[0]
            if not request.is_done and self.active.get(request.slot) is not request:
                if any(alike(request.tokens, other.tokens) >= SHARED for other in behind):
                    self._read(behind)                  # then it need not read that itself
                    behind = []
                self._give_slot(request)
                behind.append(request)
            self.queue.popleft()
        if behind:
            self._read(behind)
        if self.guesser and len(self.active) == 1 and going and self._guess(going[0]):
            going = []
        if going:
            going.sort(key=lambda request: request.slot)
            self._draw(going, self._decode(going))
        self._free()
        return bool(self.active or self.queue)

    def _free(self):
        """Take the slots of requests that are done; what has one leaves it to no other, wherever a step was broken off.
        """
        for slot, request in list(self.active.items()):
            self.left.pop(slot, None)
            if request.is_done:
                self.left[slot] = request.held
                del self.active[slot]

    def _give_slot(self, request):
        """The slot that holds the longest beginning of its tokens; where another request uses that, a copy of it."""
        request.first = max(0, len(request.tokens) - self.length)
        wanted = request.tokens[request.first:-1]
        held = self.left | {slot: other.held for slot, other in self.active.items()}
        common = {slot: alike(tokens, wanted) for slot, tokens in held.items()}
        source = max(common, key=common.get)
        count = common[source] // CHUNK * CHUNK if self.invariant else common[source]
        slot = source if source in self.left and count else next(
            (slot for slot, tokens in self.left.items() if not tokens), next(iter(self.left)))
        if count and slot != source:
            self.cache.copy(source, slot, count)
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
        reader, parts, last = self._reader(1), [], {}
        for request in requests:
            size, end = CHUNK if self.invariant else PREFILL, len(request.tokens) - request.first
            parts += [(request, start, min(start + size, end)) for start in range(request.stored, end, size)]
        while parts:
            count = 1                                   # as many parts as fit into one pass
            while count < len(parts) and not self.invariant and parts[count][2] - parts[count][1] <= PREFILL - sum(
                    end - start for _, start, end in parts[:count]):
                count += 1
            for (request, _, end), row in zip(parts[:count], self._pass(reader, parts[:count])):
                last[request] = row
                request.stored = request.reusable = end
            parts = parts[count:]
        rows = torch.stack(list(last.values()))
        rows = torch.nn.functional.pad(rows, (0, 0, 0, self._rows(len(rows)) - len(rows)))
        self._draw(requests, reader.head(rows).float()[:len(requests)])

    def _pass(self, reader, parts):
        """Read tokens [start, end) of some requests; gives what the head reads after the last of each, (C,)."""
        ids, places = [], []
        for request, start, end in parts:
            tokens = request.tokens[request.first + start:request.first + end]
            ids += tokens + tokens[-1:] * (CHUNK - len(tokens) if self.invariant else 0)
            places.append((request.slot, start, CHUNK if self.invariant else end - start))
        hidden = reader.hidden(torch.tensor([ids], device=self.device), cache=Prefill(self.cache, *places))[0]
        firsts = accumulate((count for _, _, count in places[:-1]), initial=0)
        return [hidden[first + end - start - 1] for first, (_, start, end) in zip(firsts, parts)]

    def _decode(self, requests):
        """Read one token of each; gives their logits (B, V)."""
        lengths = {request.slot: request.stored for request in requests}
        last = {request.slot: request.tokens[-1] for request in requests}
        slots = sorted(self._with_idle(lengths))
        ids = torch.tensor([[last.get(slot, 0) for slot in slots]], device=self.device)
        view = Decode(self.cache, {slot: lengths.get(slot, -1) for slot in slots})
        logits = self._logits(ids, view)
        for request in requests:
            request.reusable += not self.invariant and request.reusable == request.stored
            request.stored += 1
        return logits if len(slots) == len(requests) else logits[[slot in lengths for slot in slots]]

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
            self._draw([request], logits[place:place + 1], guess)
            request.stored += 1
            if request.is_done or guess is None or request.tokens[-1] != guess[0]:
                break
        if whole and request.error is None:
            request.reusable = request.stored
        return True

    def _draw_guess(self, request, logits, tokens):
        """A draft's token, and the probabilities (1, V) it was drawn with, as the request's own are drawn."""
        logits = self._allowed(request, tokens, logits[:, :self.num_ids].index_fill_(1, self.never, -torch.inf))
        logits = sampling.process(logits, self._seen(tokens, request.params), request.params, request.num_prompt)
        top, likeliest = logits.max(-1)
        sampling.check_finite(top, "draft")
        if request.params.is_greedy:
            return int(likeliest), None
        probabilities = logits.softmax(-1)
        return int(sampling.drawn(probabilities, [request.generator])), probabilities

    def _draw(self, requests, logits, guess=None):
        """One token for each request from its row of logits (B, V); an id that no text can have is never drawn."""
        logits = logits[:, :self.num_ids].index_fill_(1, self.never, -torch.inf)
        groups = {}
        for row, request in enumerate(requests):
            if not request.is_done:
                groups.setdefault(request.drawn_like, []).append(row)
        for rows in groups.values():
            self._draw_alike([requests[row] for row in rows], logits if len(rows) == len(logits) else logits[rows],
                             guess)

    def _seen(self, tokens, params):
        """The tokens (1, N) of a text where its draws depend on them."""
        return torch.tensor([tokens], device=self.device) if params.needs_text else None

    def _allowed(self, request, tokens, logits):
        """Logits (1, V) without those of the ends of a text, where this one may not end yet."""
        if len(tokens) - request.num_prompt >= request.params.min_new_tokens:
            return logits
        return logits.index_fill(1, torch.tensor(sorted(self.ends), device=self.device), -torch.inf)

    def _draw_alike(self, requests, logits, guess):
        first = requests[0]
        tokens = self._seen(first.tokens, first.params)
        try:
            allowed = self._allowed(first, first.tokens, logits)
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
                of_all = logits[row].log_softmax(-1)
                best = of_all.topk(min(number, len(of_all)))
                likeliest = {id: value for id, value in zip(best.indices.tolist(), best.values.tolist())
                             if value > -math.inf}
                request.log_probabilities.append((of_all[token].item(), likeliest))
            request.tokens.append(token)
            enough = len(request.tokens) - request.num_prompt >= request.params.max_new_tokens
            request.is_done = enough or token in self.ends
            if request.text is not None:
                request.text.add(self.tokenizer.token_bytes[token])
                request.is_done |= request.text.end is not None


class StopText:
    """The bytes of a text as it is drawn, up to the first of some stop strings to be complete.

    `end` is where that one begins, None as long as there is none; `sure` bytes are no beginning of one.
    """

    def __init__(self, stops: list[str]):
        self.stops, self.content, self.end, self.sure = [stop.encode() for stop in stops], b"", None, 0

    def add(self, piece: bytes) -> None:
        longest, seen = max(map(len, self.stops)), len(self.content)
        self.content += piece
        found = [(place + len(stop), place) for stop in self.stops
                 if (place := self.content.find(stop, max(0, seen - longest + 1))) >= 0]
        if found:
            self.end = self.sure = min(found)[1]
            return
        held = max((size for stop in self.stops for size in range(1, len(stop)) if self.content.endswith(stop[:size])),
                   default=0)
        self.sure = len(self.content) - held


def _mixed(*numbers):
    """One 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Completion:
    """A continuation, and how it came about."""

    text: str
    reason: str
    """Why it ends: "stop" (a stop string), "end" (a token that ends a text) or "length" (max_new_tokens)."""
    tokens: list[dict]
    """Where `log_probabilities` are asked for: of each token its text, its log-probability and the likeliest ones."""


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
        return self._texts([self.engine.submit(ids, params, row) for row, ids in enumerate(encoded)])

    def samples(self, prompt: str | None, params: SamplingParams, number: int) -> list[Completion]:
        """`number` continuations of one prompt, decoded as one batch; sample i draws from (seed, i)."""
        ids = self.encode_prompt(prompt)
        requests = [self.engine.submit(ids, params, row) for row in range(number)]
        return [self._completion(*both) for both in zip(self._texts(requests), requests)]

    def _completion(self, text, request):
        def word(token):
            return self.tokenizer.token_bytes[token].decode("utf-8", errors="replace")

        tokens = [{"token": word(id), "log_probability": value, "likeliest": [
            {"token": word(other), "log_probability": its} for other, its in likeliest.items()]}
            for id, (value, likeliest) in zip(request.drawn, request.log_probabilities)]
        stopped = request.text is not None and request.text.end is not None
        ended = request.drawn and request.drawn[-1] in self.engine.ends
        return Completion(text, "stop" if stopped else "end" if ended else "length", tokens)

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
            yield from self._pieces(request)
        finally:
            request.cancel()

    def _pieces(self, request):
        """Text of a request as it is drawn; other requests go on meanwhile."""
        decoder, place, given = codecs.getincrementaldecoder("utf-8")(errors="replace"), request.num_prompt, 0
        while True:
            while place == len(request.tokens) and not request.is_done:
                self.engine.step()
            if request.error:
                raise request.error
            if place == len(request.tokens) or self.tokenizer.is_special[request.tokens[place]]:
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
