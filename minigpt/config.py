"""Every setting of a run: one dataclass a section, one docstring a field, read from TOML and the command line.

`load_config(path, overrides)` reads a TOML file (or the JSON that a run saves), lays `--section.key=value` over it,
checks names, types and ranges, and gives a `Config`. An absent key means the default that stands here.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
import re
import shlex
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import get_args, get_type_hints

MOST = 1 << 62
"""Whole numbers up to this one fit in 64 bits, with room to count on."""


def setting(default, *, low=None, high=None, choices=None):
    """A dataclass field with its default and, checked on construction, its inclusive range or its choices."""
    metadata = {"low": low, "high": high, "choices": choices}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """Base of the sections: checks the type and the range of every field when a section is made."""

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = check_value(field.name, getattr(self, field.name), hints[field.name], field.metadata)
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self):
        """Raise ValueError where fields contradict one another; the message names the keys."""


@dataclass(frozen=True)
class DataConfig(Section):
    path: str = setting("stdlib")
    """Text to learn from: a UTF-8 file, a folder of such files, or "stdlib", the sources of Python's own library."""
    val_path: str = setting("")
    """Text to evaluate on, a file or folder; empty: `val_fraction` of `path` is held out."""
    val_fraction: float = setting(0.1, low=1e-6, high=0.9)
    """Part that is held out: whole documents of a folder, or the last part of a single file."""
    include: list[str] = setting(["*"])
    """Glob patterns; a folder's files count whose name matches one. Names that start with a dot never count."""
    order: str = setting("windows", choices=("windows", "documents"))
    """How an epoch is dealt: "windows" shuffles windows of the whole text, "documents" shuffles documents and packs."""
    document_mask: bool = setting(False)
    """Hide packed documents from one another in attention."""
    text_columns: list[str] = setting(["text"])
    """Classification: `path` is a table (.csv or .tsv with a header, or .jsonl), and these are its columns of text:
    one, or two for pairs."""
    label_column: str = setting("label")
    """Classification: the column of labels."""
    long_texts: str = setting("truncate", choices=("truncate", "window"))
    """Classification: of a text beyond the context, "truncate" keeps the beginning; "window" cuts it into pieces, of
    which each is learnt from and the mean of their probabilities counts."""
    cache_dir: str = setting("")
    """Where tokenizers and shards are kept; empty: `minigpt` in the user's cache directory (XDG_CACHE_HOME)."""

    def check(self):
        if not self.path:
            raise ValueError('path is empty; name a file or folder of text, or "stdlib"')
        columns = [*self.text_columns, self.label_column]
        if not 2 <= len(set(columns)) == len(columns) <= 3 or not all(columns):
            raise ValueError(f"text_columns = {self.text_columns} and label_column = {self.label_column!r} must be one "
                             "column or two of text, and another of labels")
        if self.long_texts == "window" and len(self.text_columns) == 2:
            raise ValueError("long_texts = window is for single texts; of pairs in text_columns take truncate")


@dataclass(frozen=True)
class TokenizerConfig(Section):
    path: str = setting("")
    """Directory of a saved tokenizer to use as it is; empty: one is trained on the training text."""
    kind: str = setting("bpe", choices=("bpe", "bytes"))
    """"bpe": SentencePiece byte-pair encoding with byte fallback; "bytes": one token a byte."""
    vocab_size: int = setting(4096, low=262, high=1_000_000)
    """Tokens of a BPE vocabulary: 5 special ones, 256 bytes, then characters and merges."""
    sample_bytes: int = setting(24_000_000, low=1000)
    """Text that a BPE is learnt from, in bytes; of a larger corpus, evenly spread pieces are taken. Learning takes
    up to 30 bytes of memory for each (Chinese, where a word is a whole line or more)."""


@dataclass(frozen=True)
class ModelConfig(Section):
    vocab_size: int = setting(0, low=0, high=1 << 22)
    """Rows of the token embedding; in a run, 0 takes the tokenizer's size."""
    context_length: int = setting(256, low=1, high=1 << 22)
    """Longest sequence in tokens."""
    depth: int = setting(4, low=1, high=10_000)
    """Transformer blocks."""
    width: int = setting(256, low=1, high=1 << 17)
    """Size of the residual stream, C."""
    num_heads: int = setting(4, low=1)
    """Query heads, H."""
    num_kv_heads: int = setting(0, low=0)
    """Key-value heads, H_kv, a divisor of num_heads (grouped queries); 0: num_heads."""
    head_size: int = setting(0, low=0, high=1 << 14)
    """Size of one head, D; 0: width / num_heads."""
    mlp: str = setting("squared_relu", choices=("gelu", "gelu_erf", "swiglu", "squared_relu"))
    """Feed-forward: GPT-2's tanh-GELU, BERT's GELU by erf (arXiv 1606.08415), SwiGLU (arXiv 2002.05202) or squared ReLU
    (arXiv 2109.08668)."""
    mlp_width: int = setting(0, low=0, high=1 << 20)
    """Hidden size of the feed-forward; 0: 4 width, for swiglu 8/3 width rounded up to a multiple of 32."""
    norm: str = setting("rms_norm", choices=("layer_norm", "rms_norm"))
    """Normalisation."""
    norm_eps: float = setting(1e-5, low=0.0, high=1.0)
    """Added to the variance before its root."""
    norm_position: str = setting("pre", choices=("pre", "post"))
    """Norm before each sub-layer (GPT-2, Llama) or after each residual sum (BERT)."""
    embedding_norm: bool = setting(False)
    """Norm of the embedded tokens, before the first block (BERT)."""
    token_types: int = setting(0, low=0, high=1 << 16)
    """Kinds of segment that tokens are told apart by, each with a learned vector (BERT has 2); 0: none."""
    next_sentence: bool = setting(False)
    """A pooler (dense, tanh) and a head of two behind it (BERT); a run sets it where its objective has next_sentence.
    """
    num_classes: int = setting(0, low=0, high=1 << 16)
    """Outputs of a classifier behind the pooler; a run sets it where its objective has classification."""
    pooling: str = setting("first", choices=("first", "last", "mean"))
    """What the pooler reads: "first", the first token, which sees the whole text (BERT), "mean", the mean of all, or
    "last", the last, and attention is causal (a model that was trained to continue text)."""
    head_transform: bool = setting(False)
    """Before the head a linear layer, GELU and a norm, and a bias behind it (BERT); for a GELU feed-forward."""
    position: str = setting("rotary", choices=("rotary", "learned", "none"))
    """Rotary (arXiv 2104.09864), learned absolute, or no positions."""
    rope_base: float = setting(10000.0, low=1.0)
    """Base of the rotary frequencies."""
    rope_scale: float = setting(1.0, low=1e-3)
    """Rotary positions are divided by this (linear scaling, arXiv 2306.15595)."""
    rope_original_context: int = setting(0, low=0, high=1 << 22)
    """Context that a model was first trained with, before rope_scale (Llama 3.1): pairs that turn less than
    rope_low_turns times in it are slowed in full, from rope_high_turns on none is; 0: all are."""
    rope_low_turns: float = setting(1.0, low=0.0)
    """See rope_original_context."""
    rope_high_turns: float = setting(4.0, low=0.0)
    """See rope_original_context; above rope_low_turns."""
    qk_norm: bool = setting(True)
    """RMSNorm of every query and key head (arXiv 2302.05442)."""
    bias: bool = setting(False)
    """Biases in linear layers and LayerNorm."""
    qkv_bias: bool | None = setting(None)
    """Bias of the query, key and value projections alone; absent: as `bias`."""
    out_bias: bool | None = setting(None)
    """Bias of the attention's output projection alone; absent: as `bias`."""
    tied_embeddings: bool = setting(True)
    """The output head reads the token embedding's weight."""
    window: int = setting(0, low=0)
    """Sliding attention window in tokens; 0: the whole context."""
    dropout: float = setting(0.0, low=0.0, high=0.99)
    """Dropout of embeddings, attention weights and sub-layer outputs."""
    weight_bits: int = setting(0, choices=(0, 8, 4))
    """8 or 4: linear layers and embedding hold whole numbers, as `minigpt quantize` makes them; 0: floating point."""
    init_std: float = setting(0.02, low=0.0, high=1e3)
    """Standard deviation of initial weights; sub-layer outputs get init_std / sqrt(2 depth)."""

    def check(self):
        if self.head_size == 0 and self.width % self.num_heads:
            raise ValueError(f"width = {self.width} is not a multiple of num_heads = {self.num_heads}; "
                             "change one of them or set head_size")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}; "
                             "change one of them")
        if self.position == "rotary" and self.D % 2:
            size = "head_size" if self.head_size else "width / num_heads"
            raise ValueError(f"{size} = {self.D} is odd; rotary positions turn pairs, so make it even")
        if self.head_transform and not self.mlp.startswith("gelu"):
            raise ValueError(f"head_transform takes mlp = gelu or gelu_erf, not {self.mlp}; change one of them")
        if self.rope_low_turns >= self.rope_high_turns:
            raise ValueError(f"rope_low_turns = {self.rope_low_turns} is not below rope_high_turns = "
                             f"{self.rope_high_turns}; change one of them")

    @property
    def D(self) -> int:
        """Size of one head."""
        return self.head_size or self.width // self.num_heads

    @property
    def H_kv(self) -> int:
        """Number of key-value heads."""
        return self.num_kv_heads or self.num_heads


GPT2 = dict(vocab_size=50257, context_length=1024, mlp="gelu", norm="layer_norm", position="learned", qk_norm=False,
            bias=True)
PRESETS = {
    "tiny": dict(context_length=256, depth=4, width=128, num_heads=4),
    "small": dict(context_length=512, depth=6, width=256, num_heads=4),
    "base": dict(context_length=1024, depth=12, width=768, num_heads=12),
    "gpt2": dict(GPT2, depth=12, width=768, num_heads=12),
    "gpt2-medium": dict(GPT2, depth=24, width=1024, num_heads=16),
    "gpt2-large": dict(GPT2, depth=36, width=1280, num_heads=20),
    "gpt2-xl": dict(GPT2, depth=48, width=1600, num_heads=25),
}
"""`[model] preset = NAME` starts from such a row; on the command line it replaces the file's [model].
With a vocabulary of 4096 and of 50257 (GPT-2's) the parameters are:
tiny 1.3M, small 5.8M, base 88M; gpt2 124M, gpt2-medium 355M, gpt2-large 774M, gpt2-xl 1.56B."""


PARTS = ("causal", "masked", "next_sentence", "classification")


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    name: str = setting("causal")
    """"causal": predict the next token; "masked": hidden tokens from both sides (BERT, arXiv 1810.04805);
    "next_sentence": whether one stretch of text follows another; "classification": labels (see data.label_column).
    Joined by "+" their losses are added, each times the number behind ":" (masked+next_sentence:0.5); a comma and "@"
    begin another at a step (masked,causal@500)."""
    mask_probability: float = setting(0.15, low=0.001, high=0.95)
    """Masked: part of the tokens to predict. Of these 80 % become <mask>, 10 % a random token, 10 % stay."""
    mask_unit: str = setting("token", choices=("token", "word", "span"))
    """Masked: what is chosen as a whole: a token, a word (a Chinese character is one), or a span of 1 to 10 tokens (3.8
    on average), which all become the same (SpanBERT, arXiv 1907.10529)."""
    class_weights: str = setting("none", choices=("none", "balanced"))
    """Classification: "balanced" weighs each text by texts / (classes · texts of its class)."""
    classes: list[str] = setting([])
    """Classification: names of the classes in the order of the model's outputs; a run sets them from the labels."""

    def check(self):
        object.__setattr__(self, "phases", self._phases())

    def _phases(self) -> list[tuple[int, dict[str, float]]]:
        """(first step, {part: weight}) of each."""
        phases = []
        for phase in self.name.replace(" ", "").split(","):
            mixture, at, step = phase.partition("@")
            is_later = phases and step.isdecimal() and len(step) < 19 and int(step) > phases[-1][0]
            if not is_later if phases else at:
                raise ValueError(f"name = {self.name!r}: {phase!r} does not say when it begins; write the first "
                                 "without a step, the others as NAME@STEP, each later than the one before")
            phases.append((int(step or 0), self._weights(mixture)))
        return phases

    def _weights(self, mixture):
        weights = {}
        for term in mixture.split("+"):
            part, colon, weight = term.partition(":")
            if part not in PARTS:
                raise ValueError(f"name = {self.name!r}: {part!r} is none of: {', '.join(PARTS)}; "
                                 "join them by + or ,")
            if part in weights:
                raise ValueError(f"name = {self.name!r}: {part} stands twice in one sum; keep one of them")
            try:
                weights[part] = float(weight) if colon else 1.0
            except ValueError:
                weights[part] = math.nan
            if not 0 < weights[part] < math.inf:
                raise ValueError(f"name = {self.name!r}: the weight {weight!r} of {part} is no number above 0")
        return weights

    @property
    def parts(self) -> set[str]:
        """All parts that are trained at some step."""
        return {part for _, weights in self.phases for part in weights}

    @property
    def is_causal(self) -> bool:
        """Whether the model has learnt, at the end, to continue text."""
        return "causal" in self.phases[-1][1]


@dataclass(frozen=True)
class OptimConfig(Section):
    name: str = setting("muon", choices=("muon", "adamw"))
    """"muon": Muon for the matrices inside the blocks and AdamW for the rest; "adamw": AdamW for everything."""
    learning_rate: float = setting(1e-3, low=0.0, high=1e3)
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = setting(0.02, low=0.0, high=1e3)
    """Peak learning rate of Muon."""
    muon_momentum: float = setting(0.95, low=0.0, high=0.9999)
    """Nesterov momentum of Muon."""
    weight_decay: float = setting(0.1, low=0.0, high=1e3)
    """Decoupled weight decay of matrices under AdamW; vectors have none."""
    muon_weight_decay: float = setting(0.01, low=0.0, high=1e3)
    """Decoupled weight decay under Muon."""
    beta1: float = setting(0.9, low=0.0, high=0.9999)
    """AdamW's decay of the first moment."""
    beta2: float = setting(0.95, low=0.0, high=0.99999)
    """AdamW's decay of the second moment."""
    eps: float = setting(1e-8, low=0.0, high=1.0)
    """AdamW's epsilon."""
    grad_clip: float = setting(1.0, low=0.0)
    """Largest norm of all gradients together; 0: no clipping."""
    schedule: str = setting("cosine", choices=("cosine", "wsd"))
    """After the warm-up: "cosine" falls all the way; "wsd" stays, then falls in a straight line (arXiv 2404.06395)."""
    warmup_steps: int = setting(20, low=0)
    """Steps of linear warm-up."""
    decay_fraction: float = setting(0.3, low=0.0, high=1.0)
    """wsd: the last part of the steps, over which the rate falls."""
    final_fraction: float = setting(0.0, low=0.0, high=1.0)
    """Learning rate at the end, as a part of the peak."""


@dataclass(frozen=True)
class TrainConfig(Section):
    run_dir: str = setting("")
    """Where the run is kept; empty: runs/ and the config file's name."""
    start_from: str = setting("")
    """A run or checkpoint whose weights, tokenizer and [model] settings a new run begins with (fine-tuning); heads that
    it does not have are new."""
    max_steps: int = setting(1000, low=1)
    """Optimizer steps."""
    batch_size: int = setting(16, low=1, high=1 << 20)
    """Sequences in one forward and backward pass (micro-batch)."""
    accumulation_steps: int = setting(1, low=1, high=1 << 20)
    """Micro-batches in one optimizer step."""
    seed: int = setting(1, low=0)
    """Seed of the weights, the order of the data, masks and dropout."""
    device: str = setting("auto")
    """"auto" (CUDA where there is one, else the CPU) or a torch device name."""
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16", "float16"))
    """Precision of matrix products (weights stay float32). "auto": bfloat16 where the GPU has it, else float16 with a
    loss scaler; on a CPU bfloat16 only where a short probe finds it faster."""
    kernels: str = setting("auto", choices=("auto", "triton", "reference"))
    """Which implementation of the ops to use; "auto" takes what runs here."""
    compile: bool = setting(False)
    """torch.compile the model; where that fails the run goes on without it and says so."""
    eval_every: int = setting(250, low=1)
    """Steps between evaluations on the whole held-out text; the last step is always evaluated."""
    checkpoint_every: int = setting(250, low=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = setting(2, low=1)
    """Newest checkpoints that are kept."""
    keep_best: bool = setting(True)
    """Also save at, and keep, the best evaluation."""
    best_by: str = setting("val_loss")
    """Which number of an evaluation tells the best: val_loss and others that end in loss, bpb or a part's name, of
    which the lowest is, or val_accuracy, val_macro_f1, val_masked_accuracy and the like, of which the highest is."""
    early_stopping: int = setting(0, low=0)
    """Stop after so many evaluations in a row that were not better than the best; 0: never."""
    log_every: int = setting(10, low=1)
    """Steps between lines of metrics.jsonl."""
    sample_prompts: list[str] = setting([])
    """Prompts that are continued at every evaluation, into samples.jsonl (causal models)."""
    sample_tokens: int = setting(64, low=1, high=10_000_000)
    """Length of those samples in tokens."""
    max_bad_steps: int = setting(5, low=1)
    """Steps in a row with a loss or gradient that is not finite, all skipped, after which the run stops; also how often
    it goes back to a checkpoint without getting any further."""
    spike_bound: float = setting(0.0, low=0.0)
    """A training loss this far (nats) above its running average makes the run go back to its last checkpoint and pass
    over that batch; 0: never."""
    deterministic: bool = setting(False)
    """On a GPU, take only algorithms that give the same bits each time, so that a resumed run ends like one that was
    never stopped (on a CPU it does so anyway)."""

    def check(self):
        for prompt in self.sample_prompts:
            if not prompt or any("\ud800" <= character <= "\udfff" for character in prompt):
                raise ValueError(f"sample_prompts holds {prompt!r}; each must be some text, without lone surrogates")


@dataclass(frozen=True)
class SamplingParams(Section):
    """How text is sampled; `sample.py` has a flag for each. In the order in which they are applied to the logits."""

    max_new_tokens: int = setting(128, low=1, high=10_000_000)
    """Longest continuation in tokens."""
    stop: list[str] = setting([])
    """Texts that end the continuation, which ends before them."""
    stop_tokens: list[int] = setting([], low=0)
    """Token ids that end the continuation, which ends before them."""
    min_new_tokens: int = setting(0, low=0, high=10_000_000)
    """Tokens before which no token may end the text; a stop string, or a match that is complete, may."""
    begin_with: str = setting("")
    """The continuation begins with this text."""
    banned: list[str] = setting([])
    """Texts that stand nowhere in the continuation."""
    regex: str = setting("")
    """The whole continuation matches this regular expression: Python's, with re.ASCII, without anchors, look-around and
    back-references."""
    json_schema: str = setting("")
    """The whole continuation is JSON that this JSON Schema, itself JSON, describes."""
    logit_bias: dict[int, float] = setting({}, low=-1e6, high=1e6)
    """{token id: what is added to its logit}; -1000000 keeps a token out, 1000000 lets none but it in."""
    repetition_penalty: float = setting(1.0, low=1e-3, high=1e6)
    """Divides positive and multiplies negative logits of tokens that already stand in prompt or text; 1 is off."""
    presence_penalty: float = setting(0.0, low=-100.0, high=100.0)
    """Is taken from the logits of tokens that were drawn before; 0 is off."""
    frequency_penalty: float = setting(0.0, low=-100.0, high=100.0)
    """Is taken from the logits of tokens once for each time that they were drawn before; 0 is off."""
    no_repeat_ngram: int = setting(0, low=0, high=1000)
    """No run of so many tokens stands twice in prompt and text; 0 is off."""
    temperature: float = setting(0.8, low=0.0, high=1e6)
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = setting(0, low=0)
    """Sample from the k likeliest tokens (all that tie with the last of them); 0 is off."""
    top_p: float = setting(0.95, low=0.0, high=1.0)
    """Nucleus: sample from the fewest tokens whose probabilities reach top_p; 1 is off."""
    min_p: float = setting(0.0, low=0.0, high=1.0)
    """Leaves out tokens whose probability is below min_p times that of the likeliest; 0 is off."""
    typical_p: float = setting(1.0, low=0.0, high=1.0)
    """Sample from the tokens nearest to the average surprise whose probabilities reach typical_p; 1 is off."""
    num_beams: int = setting(1, low=1, high=1024)
    """Beam search with so many texts under way, of which the best is the continuation; 1 is off."""
    length_penalty: float = setting(1.0, low=-20.0, high=20.0)
    """A beam's score is the sum of its log-probabilities / length ** length_penalty; above 0 favours long texts."""
    early_stopping: str = setting("likely", choices=("full", "likely", "never"))
    """Beams stop when as many have ended as there are beams ("full"), when moreover none under way is better at its
    length ("likely"), or when none can become better ("never"); Hugging Face's true, false and never."""
    num_beam_groups: int = setting(1, low=1, high=1024)
    """Beams are as many groups that go one after the other and keep away from one another."""
    diversity_penalty: float = setting(0.0, low=0.0, high=1000.0)
    """What a token costs in a group for each beam of the groups before that has just taken it."""
    sample_beams: bool = setting(False)
    """Draw what beams go on with, by temperature, top-k and so on, instead of taking the likeliest."""
    penalty_alpha: float = setting(0.0, low=0.0, high=1.0)
    """Contrastive search among the top_k likeliest tokens: how much likeness to what stands before counts; 0 is off."""
    echo: bool = setting(False)
    """Give the prompt before the continuation."""
    seed: int = setting(0, low=0)
    """Seed of the draws; row i of several samples draws from (seed, i)."""
    log_probabilities: int = setting(0, low=0, high=1000)
    """Tell of each token drawn its log-probability, by the model alone, and those of so many likeliest ones; 0 is off.
    """

    def check(self):
        if not all(self.stop):
            raise ValueError("stop has an empty text, which stands everywhere; leave it out")
        for name, texts in (("stop", self.stop), ("banned", self.banned), ("regex", [self.regex]),
                            ("begin_with", [self.begin_with]), ("json_schema", [self.json_schema])):
            if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
                raise ValueError(f"{name} has bytes that are not UTF-8; write it in UTF-8")
        if self.stop and (self.regex or self.json_schema):
            raise ValueError("stop does not go with regex or json_schema, which say where a text ends; leave it out")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens = {self.min_new_tokens} is more than max_new_tokens = "
                             f"{self.max_new_tokens}; change one of them")
        if not all(self.banned):
            raise ValueError("banned has an empty text, which stands everywhere; leave it out")
        if self.regex and self.json_schema:
            raise ValueError("regex does not go with json_schema; leave out one of them")
        if self.num_beams % self.num_beam_groups:
            raise ValueError(f"num_beams = {self.num_beams} is no multiple of num_beam_groups = {self.num_beam_groups}")
        if (self.num_beam_groups > 1) != (self.diversity_penalty > 0):
            raise ValueError("num_beam_groups and diversity_penalty go together; give both or neither")
        if self.sample_beams and self.num_beams < 2:
            raise ValueError("sample_beams draws what beams go on with; give num_beams of 2 or more, or leave it out")
        if self.sample_beams and self.is_greedy:
            raise ValueError("sample_beams draws, and temperature = 0 does not; raise temperature, or leave out one")
        if self.penalty_alpha and self.top_k < 2:
            raise ValueError(f"penalty_alpha chooses among the top_k likeliest tokens, but top_k = {self.top_k}; give "
                             "2 or more (4 is usual)")
        if self.penalty_alpha and self.num_beams > 1:
            raise ValueError("penalty_alpha does not go with num_beams; leave out one of them")

    @property
    def rows(self) -> int:
        """Texts that are under way at a time: more than 1 where the continuation is searched for, and not drawn."""
        return self.top_k if self.penalty_alpha else self.num_beams

    @property
    def needs_text(self) -> bool:
        """Whether a draw depends on the tokens before it otherwise than by the model."""
        return (self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
                or self.no_repeat_ngram > 0)

    @property
    def is_greedy(self) -> bool:
        """A temperature so low is taken for 0: logits divided by it may overflow float32."""
        return self.temperature < 1e-6


@dataclass(frozen=True)
class Config:
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


SECTIONS = {field.name: field.default_factory for field in dataclasses.fields(Config)}


def check_value(key, value, hint, metadata):
    """The value as the field's type; ValueError names the key, what it got and what it takes."""
    if hint == list[str]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{key} takes a list of strings, not {value!r}")
        return value
    if hint == list[int]:
        if not isinstance(value, list):
            raise ValueError(f"{key} takes a list of whole numbers, not {value!r}")
        return [check_value(f"{key}[{place}]", number, int, metadata) for place, number in enumerate(value)]
    if hint == dict[int, float]:
        if not isinstance(value, dict) or not all(type(number) is int and 0 <= number < MOST for number in value):
            raise ValueError(f"{key} takes an object of numbers by token id, not {value!r}")
        return {number: check_value(f"{key}[{number}]", each, float, metadata) for number, each in value.items()}
    if type(value) is int and abs(value) > MOST:        # perhaps of more digits than Python writes
        raise ValueError(f"{key} is a whole number beyond {MOST}; write a smaller one")
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{key} = {value!r} has a NUL character; leave it out")
    kinds = get_args(hint) or (hint,)
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) not in kinds:
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise ValueError(f"{key} takes {' or '.join(names[kind] for kind in kinds if kind is not NoneType)}, "
                         f"not {value!r}")
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{key} = {value!r} is none of: {', '.join(choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} = {value} is not a finite number")
    if low is not None and value is not None and value < low:
        raise ValueError(f"{key} = {value} is too small; the least is {low}")
    if high is not None and value is not None and value > high:
        raise ValueError(f"{key} = {value} is too large; the most is {high}")
    return value


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read TOML or JSON from `path`, lay `--section.key=value` overrides over it and give the checked Config.

    Raises ValueError with file, line and key for a file that does not parse, an unknown key (the nearest known one is
    named), a wrong type or a value out of range; FileNotFoundError where there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(str(path), map(str, Path("configs").glob("*.toml")), n=1)
        mend = f"did you mean {near[0]}?" if near else "name a TOML file, or the config.json of a run"
        raise FileNotFoundError(f"no config file {path}; {mend}")
    text, tree = _read(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds no sections; a run's config.json is one object of objects")
    places = {}
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {section} stands outside a section; sections are [{'], ['.join(SECTIONS)}]")
        if section not in SECTIONS:
            line = _line_of(text, section, next(iter(values), ""))
            raise ValueError(f"{path}{line}: unknown section [{section}]{_nearest(section, SECTIONS)}")
        places |= {(section, key): f"{path}{_line_of(text, section, key)}: " for key in values}
    overrides = [_parse_override(override) for override in overrides]
    if any((section, key) == ("model", "preset") for section, key, _ in overrides):
        tree["model"] = {}                              # else the file's keys would hide the preset's
    for section, key, value in overrides:
        tree.setdefault(section, {})[key] = value
        places[section, key] = "command line: "
    start, model = tree.get("train", {}).get("start_from"), tree.get("model", {})
    if isinstance(start, str) and start and len(model) < len(dataclasses.fields(ModelConfig)):
        if "preset" in model:
            raise ValueError(f"{places['model', 'preset']}model.preset does not go with train.start_from, which has a "
                             "model already; leave out one of them")
        run = Path(tree["train"].get("run_dir") or default_run_dir(path)).expanduser()
        tree["model"] = _model_of(start, run / "config.json", places["train", "start_from"]) | model
    return make_config(tree, places)


def default_run_dir(path: Path) -> str:
    """Where the run of a config file is kept."""
    return str(path.parent) if path.name == "config.json" else f"runs/{path.stem}"


def _model_of(start, begun, place):
    """The [model] that a run starts with: of the run or checkpoint `start`, or its own, where it has `begun` already.
    """
    with suppress(OSError, ValueError, LookupError, TypeError):         # what it started from may be gone by now
        own = json.loads(begun.read_text("utf-8"))
        if own["train"]["start_from"] == start:
            return dict(own["model"])
    from minigpt import checkpoint

    try:
        found = checkpoint.find(start)
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}train.start_from: {error}") from None
    if found.config.model.weight_bits:
        raise ValueError(f"{place}train.start_from: {start} is quantized; start from what it was made of")
    model = dataclasses.asdict(found.config.model)
    return model | {"pooling": "last"} if found.config.objective.is_causal else model


def _read(path):
    """The text of a config file and what it says."""
    try:
        text = path.read_bytes().decode().removeprefix("\ufeff")
        if path.suffix == ".json":
            return text, json.loads(text, object_pairs_hook=_each_once)
        return text, tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply; a config is sections of keys") from None
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ValueError(f"{path}: not valid {kind}: {error}") from None


def _each_once(pairs):
    tree = dict(pairs)
    if len(tree) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"{twice!r} stands twice in one object; keep one of them")
    return tree


def make_config(tree: dict[str, dict], places: Mapping[tuple[str, str], str] = MappingProxyType({})) -> Config:
    """The Config of a dictionary of sections. `places` says where each (section, key) was written, for messages."""
    sections = {}
    for section, values in tree.items():
        values = dict(values)
        if section not in SECTIONS:
            where = next((place for (name, _), place in places.items() if name == section), "")
            raise ValueError(f"{where}unknown section [{section}]{_nearest(section, SECTIONS)}")
        if section == "model" and "preset" in values:
            values = _preset(values, places.get((section, "preset"), ""))
        hints = get_type_hints(SECTIONS[section])
        fields = {field.name: field for field in dataclasses.fields(SECTIONS[section])}
        for key, value in values.items():
            place = places.get((section, key), "")
            if key not in fields:
                raise ValueError(f"{place}unknown key {section}.{key}{_nearest(key, fields)}")
            try:
                values[key] = check_value(f"{section}.{key}", value, hints[key], fields[key].metadata)
            except ValueError as error:
                raise ValueError(f"{place}{error}") from None
        try:
            sections[section] = SECTIONS[section](**values)
        except ValueError as error:
            words = set(re.findall(r"\w+", str(error)))
            where = dict.fromkeys(place for (name, key), place in places.items() if name == section and key in words)
            raise ValueError(f"{''.join(where)}[{section}] {error}") from None
    return Config(**sections)


def _preset(values, place):
    name = values.pop("preset")
    if name not in list(PRESETS):
        raise ValueError(f"{place}unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name] | values


def _nearest(name, known):
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def _line_of(text, section, key):
    """":N", the line of a key in TOML or JSON text, or nothing where it is written in some other way."""
    name = rf"""["']?{re.escape(key)}["']?\s*[=:.]"""
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"""\s*(?:\[\s*|(?="\w+"\s*:\s*\{))["']?([\w-]+)["']?\s*[\]:]""", line):
            inside = header[1] == section
        elif re.match(rf"\s*{name}" if inside else rf"\s*{re.escape(section)}\s*\.\s*{name}", line):
            return f":{number}"
    return ""


def _parse_override(text):
    match = re.fullmatch(r"--(\w+)\.([\w-]+)=(.*)", text, re.DOTALL)
    if not match:
        near = re.fullmatch(r"--(\w+)\.([\w-]+)", text)
        mend = f"write it as {text}=VALUE" if near else "settings are written --section.key=value"
        raise ValueError(f"command line: {text!r} is not understood; {mend}")
    section, key, value = match.groups()
    field = {f.name: f for f in dataclasses.fields(SECTIONS[section])}.get(key) if section in SECTIONS else None
    if field is not None and get_type_hints(SECTIONS[section])[key] is str:
        return section, key, value
    if value == "null":                                 # as a run's config.json writes an absent key
        return section, key, None
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):                # no TOML, or a number of more digits than Python reads
        return section, key, value
    return section, key, parsed["value"] if len(parsed) == 1 else value


def field_docs(section: type[Section]) -> dict[str, str]:
    """{field: the docstring under it}, read from this file."""
    body = next(node.body for node in _this_file().body
                if isinstance(node, ast.ClassDef) and node.name == section.__name__)
    return {field.target.id: " ".join(docstring.value.value.split()) for field, docstring in pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(docstring, ast.Expr)}


@cache
def _this_file():
    return ast.parse(Path(__file__).read_text("utf-8"))


def help_text() -> str:
    """Every key of a config with its default and its docstring."""
    lines = []
    for section, factory in SECTIONS.items():
        lines.append(f"\n[{section}]")
        if section == "model":
            lines.append(f"  --model.preset=NAME\n        Start from a named model: {', '.join(PRESETS)}.")
        defaults = factory()
        for key, text in field_docs(factory).items():
            default = getattr(defaults, key)
            value = default if isinstance(default, str) else json.dumps(default)
            lines.append(f"  --{section}.{key}={shlex.quote(value)}\n        {text}")
    return "\n".join(lines)
