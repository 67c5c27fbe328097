"""Text from a model: a key-value cache, prefill, decoding, and `load`, which opens a run or checkpoint.

    run = minigpt.load("runs/quickstart")
    text = run.generate("def main(", SamplingParams(temperature=0.8, seed=1))
    for piece in run.stream("def main("): print(piece, end="", flush=True)
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from minigpt import checkpoint, sampling
from minigpt.config import Config, ModelConfig, SamplingParams
from minigpt.device import pick_device
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer

DEFAULT = SamplingParams()


class KVCache:
    """Keys and values of the tokens so far, allocated once: (depth, B, S, H_kv, D)."""

    def __init__(self, config: ModelConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (config.depth, batch, length, config.H_kv, config.D)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's k, v (B, T, H_kv, D) behind the tokens so far; gives all of them, (B, S, H_kv, D).

        The model adds T to `length` when every layer has stored its own.
        """
        end = self.length + k.shape[1]
        self.keys[layer, :, self.length:end] = k
        self.values[layer, :, self.length:end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]


@torch.inference_mode()
def decode(model: GPT, prompt: list[int], params: SamplingParams, *, never: np.ndarray, num_rows: int = 1,
           first_row: int = 0) -> Iterator[torch.Tensor]:
    """Continue one prompt `num_rows` times: yields the rows' next tokens, (B,) int64, max_new_tokens times.

    Row i draws from a generator seeded by (seed, first_row + i). Never drawn are the ids where `never` (vocab_size,)
    bool is true, and those from its length on, where the model has more. When the context is full, its second half is
    read again as a new beginning.
    """
    config, device = model.config, model.embedding.weight.device
    generators = [torch.Generator(device).manual_seed(_mixed(params.seed, first_row + row)) for row in range(num_rows)]
    never = torch.from_numpy(never).to(device)
    everything = torch.tensor([prompt] * num_rows, device=device)                           # (B, T)
    fresh, cache = everything[:, -config.context_length:], None
    for _ in range(params.max_new_tokens):
        if cache is None or cache.length + fresh.shape[1] > config.context_length:
            if cache is not None:
                fresh = everything[:, -(config.context_length // 2 + 1):]
            length = min(config.context_length, fresh.shape[1] + params.max_new_tokens)
            cache = KVCache(config, num_rows, length, device, model.embedding.weight.dtype)
        hidden = model.hidden(fresh, cache=cache)[:, -1]                                    # (B, C)
        logits = model.head(hidden).float()[:, :len(never)].masked_fill_(never, -torch.inf)  # (B, V)
        following = sampling.sample(logits, everything, params, generators)
        yield following
        fresh = following[:, None]
        everything = torch.cat((everything, fresh), dim=1)


def _mixed(*numbers):
    """One 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Run:
    """A checkpoint, opened: `model`, `tokenizer` (None where it was imported without), `config`, and text from them."""

    def __init__(self, model: GPT, tokenizer: Tokenizer | None, config: Config, path: Path):
        self.model, self.tokenizer, self.config, self.path = model, tokenizer, config, path

    def generate(self, prompts: str | list[str] | None, params: SamplingParams = DEFAULT) -> str | list[str]:
        """The continuation of a prompt, or, of a list, one for each.

        None starts a new document. Prompt i of a list draws from (seed, i). Raises ValueError for an empty prompt
        and for a model that was not trained to continue text.
        """
        if isinstance(prompts, list):
            return ["".join(self.stream(prompt, params, row)) for row, prompt in enumerate(prompts)]
        return "".join(self.stream(prompts, params))

    def stream(self, prompt: str | None, params: SamplingParams = DEFAULT, row: int = 0) -> Iterator[str]:
        """The continuation in pieces, as it is drawn; a piece never ends within a character."""
        return self._pieces(self.encode_prompt(prompt), params, row)

    def _pieces(self, ids, params, row):
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for following in decode(self.model, ids, params, never=self.tokenizer.never_sampled, first_row=row):
            token = int(following)
            if self.tokenizer.is_special[token]:
                break
            if piece := decoder.decode(self.tokenizer.token_bytes[token]):
                yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    def samples(self, prompt: str | None, params: SamplingParams, number: int) -> list[str]:
        """`number` continuations of one prompt, decoded as one batch; sample i equals row i of `stream`."""
        ids = self.encode_prompt(prompt)
        rows, ended = [[] for _ in range(number)], [False] * number
        for following in decode(self.model, ids, params, never=self.tokenizer.never_sampled, num_rows=number):
            for row, token in enumerate(following.tolist()):
                ended[row] = ended[row] or self.tokenizer.is_special[token]
                if not ended[row]:
                    rows[row].append(token)
            if all(ended):
                break
        return [self.tokenizer.decode_bytes(row).decode("utf-8", errors="replace") for row in rows]

    def encode_prompt(self, prompt: str | None) -> list[int]:
        """The ids of a prompt behind what stands before one; of None, what stands before a document."""
        if self.tokenizer is None:
            raise ValueError(f"{self.path}: has no tokenizer; import it again with --tokenizer DIR")
        if self.config.objective.name != "causal":
            raise ValueError(f"{self.path}: trained with the objective {self.config.objective.name!r}, so it cannot "
                             "continue text; sample from a causal model")
        if prompt == "":
            raise ValueError("the prompt is empty; give some text, or none at all to start a new document")
        roles = self.tokenizer.roles
        return [roles.document_start] if prompt is None else [*roles.prompt_start, *self.tokenizer.encode(prompt)]


def load(path: str | Path, device: str | torch.device | None = None) -> Run:
    """Open a run (its newest valid checkpoint) or a checkpoint directory, checked byte by byte.

    `device`: CUDA where there is one, else the CPU, unless given. Raises FileNotFoundError or ValueError naming what
    is missing or damaged.
    """
    found = checkpoint.find(path)
    found.check_depth()
    with torch.device("meta"):
        found.check_model(GPT(found.config.model, initial=False))
    model = GPT(found.config.model, initial=False).to(pick_device(device)).eval()
    found.load_model(model)
    return Run(model, found.tokenizer, found.config, found.path)
