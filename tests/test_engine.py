"""Text from a model: cached decoding equals a full forward, in any batch, streamed or not, past the context too."""

import itertools
from pathlib import Path

import pytest
import torch
from compare import assert_close
from twins import gpt2_twins, random_model

from minigpt import engine
from minigpt.config import Config, ObjectiveConfig, SamplingParams
from minigpt.engine import KVCache, Run, decode
from minigpt.tokenizer import FIRST_BYTE, SPECIAL_TOKENS, Tokenizer

TOKENIZER = Tokenizer("bytes")
V, START, END = TOKENIZER.vocab_size, SPECIAL_TOKENS["<s>"], SPECIAL_TOKENS["</s>"]
CPU = torch.device("cpu")
VARIANTS = [
    dict(), dict(window=3), dict(num_kv_heads=2, head_size=10), dict(num_kv_heads=1, mlp="swiglu", rope_scale=4.0),
    dict(position="learned", norm="layer_norm", bias=True, qk_norm=False, mlp="gelu"), dict(position="none", window=5),
    dict(norm_position="post", num_kv_heads=2, window=1), dict(qkv_bias=True, tied_embeddings=False),
]


def model_of(seed=0, context_length=24, **settings):
    return random_model(seed, **dict(vocab_size=V, context_length=context_length) | settings)


def run_of(model, objective="causal"):
    return Run(model, TOKENIZER, Config(model=model.config, objective=ObjectiveConfig(name=objective)), Path("a run"))


def ids(model, prompt, params, **options):
    """Prompt's ids and the ids that `decode` draws, for one row."""
    return [int(token) for token in decode(model, prompt, params, never=TOKENIZER.never_sampled, **options)]


GREEDY = SamplingParams(temperature=0.0, max_new_tokens=15)
RANDOM = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=30, seed=3)


@pytest.mark.parametrize("chunks", [[1] * 24, [24], [7, 1, 1, 5, 10], [2] * 12], ids=str)
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@torch.no_grad()
def test_cached_logits_equal_a_full_forward_at_every_position(settings, chunks):
    model = model_of(**settings)
    tokens = torch.randint(0, V, (3, 24), generator=torch.Generator().manual_seed(0))
    full = model(tokens)                                                            # (B, T, V)
    cache = KVCache(model.config, 3, 24, CPU, torch.float32)
    parts = [model(chunk, cache=cache) for chunk in tokens.split(chunks, dim=1)]
    assert cache.length == 24
    assert_close(torch.cat(parts, dim=1), full, 1e-5)


@torch.no_grad()
def test_a_cache_that_forgets_is_noticed():
    """The comparison above can fail: one key of one layer overwritten shows."""
    model = model_of()
    tokens = torch.randint(0, V, (1, 24), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 1, 24, CPU, torch.float32)
    model(tokens[:, :23], cache=cache)
    cache.keys[1, 0, 5] = 0
    with pytest.raises(AssertionError, match="off by"):
        assert_close(model(tokens[:, 23:], cache=cache), model(tokens)[:, 23:], 1e-5)


@torch.no_grad()
def naive(model, prompt, params):
    """The whole context anew for every token, and its second half when it is full; greedy."""
    everything, context = list(prompt), list(prompt)[-model.config.context_length:]
    never = [token for token in range(FIRST_BYTE) if token not in (START, END)]
    for _ in range(params.max_new_tokens):
        if len(context) > model.config.context_length:
            context = everything[-(model.config.context_length // 2 + 1):]
        logits = model(torch.tensor([context]))[0, -1]
        logits[never] = -torch.inf
        token = int(logits.argmax())
        everything.append(token)
        context.append(token)
    return everything[len(prompt):]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_greedy_equals_full_forwards(settings):
    for seed in range(3):
        model = model_of(seed, **settings)
        assert ids(model, [START, 70, 80], GREEDY) == naive(model, [START, 70, 80], GREEDY)


@pytest.mark.parametrize("context_length", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("prompt_length", [1, 5, 9, 40])
def test_going_past_the_context(context_length, prompt_length):
    """Also prompts longer than the context, of which the end is read."""
    params = SamplingParams(temperature=0.0, max_new_tokens=30)
    prompt = [START, *range(60, 59 + prompt_length)]
    for settings in (dict(), dict(position="learned")):
        model = model_of(context_length=context_length, **settings)
        made = ids(model, prompt, params)
        assert made == naive(model, prompt, params) and len(made) == 30


def test_greedy_equals_generate_of_transformers():
    texts = set()
    for seed, prompt in enumerate(([START], [START, 100, 7, 200], [START, *range(20, 40)])):
        theirs, ours = gpt2_twins(vocab_size=V, context_length=40, seed=seed)
        made = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                               do_sample=False, max_new_tokens=20, suppress_tokens=[0, 3, 4], eos_token_id=None,
                               pad_token_id=3)[0, len(prompt):].tolist()
        assert ids(ours, prompt, SamplingParams(temperature=0.0, max_new_tokens=20)) == made
        texts.add(tuple(made))
    assert len(texts) == 3 and max(len(set(text)) for text in texts) > 2


def test_text_is_a_function_of_the_seed():
    run = run_of(model_of())
    texts = [run.generate("To be", SamplingParams(seed=seed, temperature=1.0, max_new_tokens=40))
             for seed in (0, 1, 2, 0)]
    assert texts[0] == texts[3] and len(set(texts)) == 3


@pytest.mark.parametrize("settings", VARIANTS[:5], ids=str)
@pytest.mark.parametrize("prompt", [None, "To be", "or not to be, that is the question"])
def test_samples_equal_streams_row_by_row(settings, prompt):
    run = run_of(model_of(**settings))
    samples = run.samples(prompt, RANDOM, 4)
    streams = ["".join(run.stream(prompt, RANDOM, row)) for row in range(4)]
    assert samples == streams
    assert len(set(samples)) == 4
    assert run.generate(prompt, RANDOM) == streams[0]


def test_a_list_of_prompts_is_continued_one_by_one():
    run = run_of(model_of())
    prompts = ["a", "Now is the winter", "a"]
    texts = run.generate(prompts, RANDOM)
    assert texts == ["".join(run.stream(prompt, RANDOM, row)) for row, prompt in enumerate(prompts)]
    assert texts[0] != texts[2], "equal prompts draw from generators of their own"
    assert run.generate([], RANDOM) == []


def test_none_starts_a_new_document():
    run = run_of(model_of())
    assert run.encode_prompt(None) == [START]
    assert run.encode_prompt("ab") == [START, *TOKENIZER.encode("ab")]
    assert run.generate(None, GREEDY) == TOKENIZER.decode(itertools.takewhile(
        lambda token: token >= FIRST_BYTE, naive(run.model, [START], GREEDY)))


@pytest.mark.parametrize("data, pieces", [
    ("né 日本🙂!".encode(), list("né 日本🙂!")),
    (b"\xe6A\xff\xe6\x97", ["\ufffdA", "\ufffd", "\ufffd"]),
    (b"\xf0\x9f\x99", ["\ufffd"]),
])
def test_pieces_are_whole_characters(monkeypatch, data, pieces):
    """Bytes that make no character give U+FFFD, at the end too."""
    monkeypatch.setattr(engine, "decode", lambda *_, **__: (torch.tensor([FIRST_BYTE + byte]) for byte in data))
    run = run_of(model_of())
    assert list(run.stream("x")) == pieces
    assert run.samples("x", RANDOM, 1) == ["".join(pieces)] == [data.decode(errors="replace")]


def test_pieces_of_a_random_model_join_to_its_text():
    run = run_of(model_of())
    for seed in range(10):
        params = SamplingParams(temperature=1.5, top_p=1.0, max_new_tokens=60, seed=seed)
        pieces = list(run.stream("é", params))
        assert all(pieces) and "".join(pieces) == run.generate("é", params)
        assert "".join(pieces).encode().decode() == "".join(pieces)


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


def token(character):
    return FIRST_BYTE + ord(character)


def test_special_tokens_are_never_drawn():
    model = constant_model({0: 9.0, 3: 9.0, 4: 9.0, token("a"): 1.0, token("b"): 0.0})
    assert ids(model, [START], GREEDY) == [token("a")] * 15
    drawn = set(ids(model, [START], SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=200)))
    assert drawn >= {token("a"), token("b")} and not drawn & {0, 3, 4}


def test_rows_of_the_model_without_a_token_are_never_drawn():
    """Regression: a model.vocab_size above the tokenizer's ended in an IndexError when such an id was drawn."""
    run = run_of(constant_model({V: 9.0, V + 3: 9.0, token("a"): 1.0}, vocab_size=V + 4))
    assert run.generate("x", GREEDY) == "a" * 15
    assert run.samples("x", GREEDY, 2) == ["a" * 15] * 2


@pytest.mark.parametrize("end", [START, END])
def test_an_end_token_ends_the_text(end):
    """Each row on its own: with a chance of a half a token, texts are of many lengths, 1 on average."""
    run = run_of(constant_model({end: 5.0, token("a"): 5.0}))
    params = SamplingParams(temperature=1.0, top_p=0.99, max_new_tokens=50)
    texts = run.samples("x", params, 200)
    assert texts[:20] == ["".join(run.stream("x", params, row)) for row in range(20)]
    assert {text.strip("a") for text in texts} == {""}
    assert 0.5 < sum(map(len, texts)) / 200 < 1.5 and len(set(texts)) > 4
    assert run_of(constant_model({end: 5.0})).generate("x", GREEDY) == ""


def test_the_repetition_penalty_covers_the_prompt():
    run = run_of(constant_model({token("a"): 3.0, token("b"): 2.0, token("c"): 1.9}))
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, max_new_tokens=4)
    assert run.generate("x", params) == "abca"
    assert run.generate("a", params) == "bcaa"
    assert run.generate("a" + "x" * 20, params) == "bcaa", "also what has left the context counts"


@pytest.mark.parametrize("prompt, objective, message", [
    ("", "causal", "the prompt is empty"), ("x", "masked", "a run: trained with the objective 'masked'"),
    (None, "masked", "cannot continue text"), ("a\ud800", "causal", "surrogate")])
def test_what_cannot_be_continued(prompt, objective, message):
    run = run_of(model_of(), objective)
    for call in (lambda: run.generate(prompt), lambda: list(run.stream(prompt)),
                 lambda: run.samples(prompt, RANDOM, 2), lambda: run.generate([prompt])):
        with pytest.raises(ValueError, match=message):
            call()
