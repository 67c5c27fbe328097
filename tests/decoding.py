"""What tests of decoding share: a tokenizer of bytes, small models, runs of them, and the ids that an engine draws."""

from pathlib import Path

import torch
from twins import random_model

from minigpt.config import Config, ObjectiveConfig
from minigpt.engine import Engine, Run
from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer

TOKENIZER = Tokenizer("bytes")
V, START, END = TOKENIZER.vocab_size, SPECIAL_TOKENS["<s>"], SPECIAL_TOKENS["</s>"]


def model_of(seed=0, context_length=24, **settings):
    return random_model(seed, **dict(vocab_size=V, context_length=context_length) | settings)


def run_of(model, objective="causal"):
    return Run(model, TOKENIZER, Config(model=model.config, objective=ObjectiveConfig(name=objective)), Path("a run"))


def finished(engine, *requests):
    """The ids that each request draws."""
    while engine.step():
        pass
    assert all(request.is_done and request.error is None for request in requests)
    return [request.drawn for request in requests]


def ids(model, prompt, params, ends=True, **options):
    """The ids that are drawn after one prompt."""
    engine = Engine(model, TOKENIZER, slots=1, **options)
    engine.ends = engine.ends if ends else ()
    return finished(engine, engine.submit(prompt, params))[0]


def constant_model(logits, vocab_size=V):
    """A model whose logits are the same after every text: -9, but for those that are given {id: logit}."""
    model = random_model(vocab_size=vocab_size, context_length=8, norm="layer_norm", bias=True, tied_embeddings=False)
    with torch.no_grad():
        model.final_norm.weight.zero_()
        model.final_norm.bias.copy_(torch.eye(24)[0])
        model.head.weight.fill_(-9.0)
        for token, logit in logits.items():
            model.head.weight[token] = logit
    return model
