"""Beam and contrastive search against transformers, brute force and their definitions, and in an engine's company."""

import itertools
import math

import pytest
import torch
from decoding import END, START, TOKENIZER, finished, model_of, run_of
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import gpt2_twins, random_model

from minigpt.cache import KVCache
from minigpt.config import SamplingParams
from minigpt.engine import Engine
from minigpt.search import BeamSearch

V = TOKENIZER.vocab_size
ENDS = frozenset({1, 2})


def searched(engine, prompt, **settings):
    """[(tokens, score)] of a search, the best first."""
    request = engine.submit(prompt, SamplingParams(**settings))
    finished(engine, request)
    assert request.tokens == request.found[0].tokens
    return [(each.tokens[len(prompt):], each.score) for each in request.found]


class AllTokens:
    """A tokenizer of which any id may be drawn; 1 and 2 end a text."""

    def __init__(self, vocab_size, ends=(1, 2)):
        import numpy as np

        self.never_sampled, self.token_bytes = np.zeros(vocab_size, bool), [b"x"] * vocab_size
        self.roles = type("Roles", (), {"end_tokens": ends})


@pytest.mark.parametrize("early_stopping", ["full", "likely", "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("num_beams, penalty", [(2, 1.0), (5, 1.0), (4, 1.4)])
def test_beams_are_those_of_transformers(num_beams, penalty, length_penalty, early_stopping):
    """All texts and scores, of models that end some texts early; with two tokens that end a text."""
    ended = 0
    for seed in range(3):
        theirs, ours = gpt2_twins(vocab_size=20, context_length=40, seed=seed)
        prompt = [3, 7, 11 + seed]
        made = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 3, dtype=torch.int64), do_sample=False,
            num_beams=num_beams, num_return_sequences=num_beams, length_penalty=length_penalty, max_new_tokens=12,
            early_stopping={"full": True, "likely": False, "never": "never"}[early_stopping], eos_token_id=[1, 2],
            pad_token_id=0, repetition_penalty=penalty, return_dict_in_generate=True, output_scores=True)
        wanted = []
        for tokens, score in zip(made.sequences[:, 3:].tolist(), made.sequences_scores.tolist()):
            end = next((place for place, token in enumerate(tokens) if token in (1, 2)), len(tokens) - 1)
            wanted.append((tokens[:end + 1], score))
        found = searched(Engine(ours, AllTokens(20)), prompt, num_beams=num_beams, length_penalty=length_penalty,
                         max_new_tokens=12, early_stopping=early_stopping, repetition_penalty=penalty)
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
        assert [score for _, score in found] == pytest.approx([score for _, score in wanted], rel=1e-4)
        ended += sum(tokens[-1] in (1, 2) for tokens, _ in wanted)
    assert ended, "no text has ended before max_new_tokens"


class Table:
    """Logits (V,) after each text, drawn once; texts end with token 1."""

    def __init__(self, seed, vocab_size):
        self.seed, self.vocab_size = seed, vocab_size

    def __call__(self, tokens):
        generator = torch.Generator().manual_seed(hash((self.seed, *tokens)) % 2**31)
        return 2 * torch.randn(self.vocab_size, generator=generator)


def run_search(table, search):
    while not search.is_done:
        search.advance(torch.stack([table(row) for row in search.state.rows]))
    return search.state.found


def every_text(table, params, prompt=(0,), end=1):
    """{text: the sum of its log-probabilities} of all texts that end or are of full length."""
    texts, open_ones = {}, {(): 0.0}
    for _ in range(params.max_new_tokens):
        longer = {}
        for text, total in open_ones.items():
            for token, value in enumerate(table([*prompt, *text]).log_softmax(-1).tolist()):
                longer[text + (token,)] = total + value
        texts |= {text: total for text, total in longer.items() if text[-1] == end}
        open_ones = {text: total for text, total in longer.items() if text[-1] != end}
    return texts | open_ones


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([-1.0, 0.0, 0.7, 1.0, 2.0]))
def test_enough_beams_find_the_best_of_all_texts(seed, length_penalty):
    """With as many beams as there are texts nothing is left out, whatever the sign of the length penalty."""
    table = Table(seed, 4)
    params = SamplingParams(num_beams=120, length_penalty=length_penalty, max_new_tokens=4, early_stopping="never")
    found = run_search(table, BeamSearch([0], params, frozenset({1}), None, torch.Generator()))
    texts = every_text(table, params)
    best = sorted(((total / len(text) ** length_penalty, text) for text, total in texts.items()), reverse=True)
    assert len(found) == 120 and len(best) == 1 + 3 + 9 + 27 * 4
    for hypothesis, (score, text) in zip(found, best):
        assert hypothesis.score == pytest.approx(score, rel=1e-4) and hypothesis.tokens == [0, *text]


def test_few_beams_may_miss_the_best():
    """The test above can fail: one beam less wide finds less."""
    missed = 0
    for seed in range(20):
        table, params = Table(seed, 4), SamplingParams(num_beams=2, max_new_tokens=4)
        found = run_search(table, BeamSearch([0], params, frozenset({1}), None, torch.Generator()))
        best = max(total / len(text) for text, total in every_text(table, params).items())
        assert found[0].score <= best + 1e-5
        missed += found[0].score < best - 1e-5
    assert missed


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0]))
def test_a_search_that_stops_never_early_loses_nothing(seed, length_penalty):
    """It stops where none under way can become better, so it finds what a search finds that does not stop."""
    table = Table(seed, 5)
    params = SamplingParams(num_beams=2, length_penalty=length_penalty, max_new_tokens=7, early_stopping="never")
    search = BeamSearch([0], params, frozenset({1}), None, torch.Generator())
    endless = BeamSearch([0], params, frozenset({1}), None, torch.Generator())
    endless._is_over = lambda best, ended: False
    found, wanted = run_search(table, search), run_search(table, endless)
    assert [(each.tokens, each.score) for each in found] == [(each.tokens, each.score) for each in wanted]


def test_beams_go_on_beside_many_that_end():
    """Each of four ends is likelier than any other token, and as many beams as were asked for go on."""
    logits = torch.tensor([0.0, 5.0, 5.1, 5.2, 5.3, 0.1, 0.2, 0.3])
    params = SamplingParams(num_beams=3, max_new_tokens=9, length_penalty=5.0, early_stopping="never")
    search = BeamSearch([0], params, frozenset({1, 2, 3, 4}), None, torch.Generator())
    search.advance(logits[None])
    assert [row[-1] for row in search.state.rows] == [7, 6, 5]
    search.advance(logits.expand(3, -1))
    assert len(search.state.rows) == 3


def naive_groups(table, params, groups):
    """Diverse beam search word for word, without ends: the groups in turn, a token the dearer the more took it."""
    size = params.num_beams // groups
    beams = [[((0,), 0.0)] for _ in range(groups)]
    for _ in range(params.max_new_tokens):
        taken = []
        for group in range(groups):
            grown = []
            for text, total in beams[group]:
                for token, value in enumerate(table(list(text)).log_softmax(-1).tolist()):
                    cost = params.diversity_penalty * taken.count(token)
                    grown.append((total + value - cost, (*text, token), total + value))
            best = sorted(grown, reverse=True)[:size]
            beams[group] = [(text, total) for _, text, total in best]
            taken += [text[-1] for text, _ in beams[group]]
    found = [(total / params.max_new_tokens ** params.length_penalty, text) for group in beams for text, total in group]
    return sorted(found, reverse=True)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([(4, 2), (6, 3), (3, 3)]), st.sampled_from([0.3, 1.0, 8.0]))
def test_diverse_groups(seed, shape, penalty):
    table, (num_beams, groups) = Table(seed, 7), shape
    params = SamplingParams(num_beams=num_beams, num_beam_groups=groups, diversity_penalty=penalty, max_new_tokens=5)
    found = run_search(table, BeamSearch([0], params, frozenset(), None, torch.Generator()))
    wanted = naive_groups(table, params, groups)
    assert [tuple(each.tokens) for each in found] == [text for _, text in wanted]
    assert [each.score for each in found] == pytest.approx([score for score, _ in wanted], rel=1e-4)
    if penalty == 8.0 and shape == (3, 3):
        assert len({text[1] for _, text in wanted}) == 3, "a token that others took is dear"


def test_sampled_beams_are_drawn_without_replacement():
    """Of 4 of 5 tokens, drawn one by one by their probabilities, the best two stay: the frequencies are those."""
    logits, wanted = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]), {}
    p = (logits / 0.8).softmax(-1).tolist()
    for order in itertools.permutations(range(5), 4):
        chance, left = 1.0, 1.0
        for token in order:
            chance *= p[token] / left
            left -= p[token]
        best = tuple(sorted(order, key=lambda token: -p[token])[:2])
        wanted[best] = wanted.get(best, 0.0) + chance
    params = SamplingParams(num_beams=2, sample_beams=True, temperature=0.8, top_p=1.0, max_new_tokens=2)
    counts, generator, draws = dict.fromkeys(wanted, 0), torch.Generator().manual_seed(0), 3000
    for _ in range(draws):
        search = BeamSearch([0], params, frozenset(), None, generator)
        search.advance(logits[None])
        counts[tuple(row[-1] for row in search.state.rows)] += 1
    squares = sum((counts[best] - draws * chance) ** 2 / (draws * chance) for best, chance in wanted.items())
    degrees = len(wanted) - 1
    assert degrees > 1 and squares < degrees + 4 * math.sqrt(2 * degrees), (counts, wanted)


@torch.no_grad()
def naive_contrastive(model, prompt, k, alpha, count):
    """The whole text anew for every candidate."""
    tokens = list(prompt)
    for _ in range(count):
        p = model(torch.tensor([tokens]))[0, -1].softmax(-1)
        scores = []
        for token in p.topk(k).indices.tolist():
            h = model.hidden(torch.tensor([[*tokens, token]]))[0]
            alike = torch.nn.functional.cosine_similarity(h[-1:], h[:-1]).max().item()
            scores.append(((1 - alpha) * p[token].item() - alpha * alike, token))
        tokens.append(max(scores)[1])
        if tokens[-1] in (1, 2):
            break
    return tokens[len(prompt):]


@pytest.mark.parametrize("k, alpha", [(2, 0.6), (5, 0.3), (5, 1.0), (3, 0.05)])
def test_contrastive_search(k, alpha):
    texts = set()
    for seed in range(4):
        _, model = gpt2_twins(vocab_size=20, context_length=40, seed=seed)
        prompt = [3, 7, 11 + seed]
        made = searched(Engine(model, AllTokens(20)), prompt, penalty_alpha=alpha, top_k=k, max_new_tokens=15)
        assert made[0][0] == naive_contrastive(model, prompt, k, alpha, 15)
        texts.add(tuple(made[0][0]))
    assert len(texts) > 1


def test_contrastive_search_is_greedy_without_its_penalty():
    _, model = gpt2_twins(vocab_size=20, context_length=40, seed=1)
    engine = Engine(model, AllTokens(20))
    greedy = engine.submit([3, 7], SamplingParams(temperature=0.0, max_new_tokens=15))
    made, = finished(engine, greedy)
    assert searched(engine, [3, 7], penalty_alpha=1e-6, top_k=4, max_new_tokens=15)[0][0] == made
    assert searched(engine, [3, 7], penalty_alpha=0.9, top_k=4, max_new_tokens=15)[0][0] != made


SEARCHES = [dict(num_beams=3), dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
            dict(num_beams=2, sample_beams=True), dict(penalty_alpha=0.6, top_k=3)]


@pytest.mark.parametrize("past_context", ["reread", "slide"])
@pytest.mark.parametrize("settings", SEARCHES, ids=str)
def test_a_search_in_company_finds_what_it_finds_alone(settings, past_context):
    """Past the context too, with texts that come and go beside it, and more searches than slots."""
    model = model_of(context_length=20)

    greedy = dict(temperature=0.0)
    jobs = [([START, *range(60, 60 + size)], SamplingParams(max_new_tokens=length, **each)) for size, length, each in (
        (3, 30, settings), (30, 9, greedy), (5, 24, settings), (1, 40, greedy), (40, 12, settings))]

    def results(*requests):
        return [[(each.tokens, each.score) for each in request.found] or request.tokens for request in requests]

    options = dict(slots=5, invariant=True, past_context=past_context)
    alone = []
    for job in jobs:
        engine = Engine(model, TOKENIZER, **options)
        request = engine.submit(*job)
        finished(engine, request)
        alone += results(request)
    engine = Engine(model, TOKENIZER, **options)
    requests = [engine.submit(*job) for job in jobs]
    finished(engine, *requests)
    assert results(*requests) == alone
    assert not engine.active and len(engine.left) == 5


@pytest.mark.parametrize("context_length", [64, 24])
@pytest.mark.parametrize("settings", [
    dict(num_beams=6, length_penalty=0.0), dict(penalty_alpha=0.6, top_k=3),
    dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5, length_penalty=0.0)], ids=str)
def test_scores_are_those_of_full_forwards(settings, context_length):
    """A cache that was copied wrongly would show, past the context too: each text is read anew, token by token."""
    model = random_model(vocab_size=V, context_length=context_length, num_kv_heads=2)
    engine, prompt = Engine(model, TOKENIZER), [START, *range(60, 80)]
    request = engine.submit(prompt, SamplingParams(max_new_tokens=30, **settings))
    finished(engine, request)
    assert len(request.found) == len({tuple(each.tokens) for each in request.found}) == settings.get("num_beams", 1)
    for each in request.found:
        context, total = list(prompt), 0.0
        for token in each.tokens[len(prompt):]:
            total += engine.possible(model(torch.tensor([context]))[0]).log_softmax(-1)[-1, token].item()
            context.append(token)
            if len(context) > context_length:
                context = context[-(context_length // 2 + 1):]
        assert each.score == pytest.approx(total, abs=1e-3)


def test_a_cancelled_search_gives_its_slots_back():
    engine = Engine(model_of(), TOKENIZER, slots=4)
    request = engine.submit([START, 70], SamplingParams(num_beams=4, max_new_tokens=1000))
    waiting = engine.submit([START, 80], SamplingParams(num_beams=2, max_new_tokens=3))
    for _ in range(5):
        engine.step()
    assert len(engine.active) == 4 and not waiting.found
    request.cancel()
    finished(engine, waiting)
    assert waiting.found and len(engine.left) == 4 and not engine.active


def test_a_slot_that_a_search_leaves_serves_others_well():
    """What it holds is what its tokens say, so that another may take it over."""
    model, prompt = model_of(context_length=64), [START, *range(60, 100)]
    engine = Engine(model, TOKENIZER, slots=3)
    found = searched(engine, prompt, num_beams=3, max_new_tokens=10)
    params = SamplingParams(temperature=0.0, max_new_tokens=10)
    for tokens, _ in found:
        again = engine.submit([*prompt, *tokens[:-1]], params)
        fresh = Engine(model, TOKENIZER, slots=3)
        assert finished(engine, again) == finished(fresh, fresh.submit([*prompt, *tokens[:-1]], params))


def failing(original, number, after):
    """A function whose call of that number is broken off by Ctrl-C, before or after it has done its work."""
    calls = itertools.count(1)

    def call(*arguments):
        fails = next(calls) == number
        if fails and not after:
            raise KeyboardInterrupt
        result = original(*arguments)
        if fails:
            raise KeyboardInterrupt
        return result
    return call


@pytest.mark.parametrize("settings", SEARCHES, ids=str)
def test_a_search_that_is_broken_off_goes_on(settings):
    """Ctrl-C anywhere among the engine's own calls: the next steps find what is found without."""
    model, params = model_of(), SamplingParams(max_new_tokens=8, **settings)

    def found(engine):
        request = engine.submit([START, 70, 80], params)
        broken_off = 0
        while not request.is_done:
            try:
                engine.step()
            except KeyboardInterrupt:
                broken_off += 1
        assert request.error is None
        return broken_off, [(each.tokens, round(each.score, 3)) for each in request.found]

    _, wanted = found(Engine(model, TOKENIZER, slots=4))
    places = [(Engine, name) for name in (
        "_settle", "_read", "_decode", "_draw", "_advance", "_give_slot", "_free", "_end_search")] + [(KVCache, "move")]
    breaks = 0
    for (owner, name), number, after in itertools.product(places, range(1, 12, 2), (False, True)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            engine = Engine(model, TOKENIZER, slots=4)
            monkeypatch.setattr(owner, name, failing(getattr(owner, name), number, after))
            broken_off, texts = found(engine)
        assert texts == wanted or "sample_beams" in settings, (name, number, after)     # that may be drawn anew
        breaks += broken_off
    assert breaks > 40


def test_samples_of_a_search_are_the_best_first():
    run = run_of(model_of(context_length=64))
    params = SamplingParams(num_beams=4, max_new_tokens=12, log_probabilities=2)
    samples = run.samples("To be", params, 3)
    assert [sample.score for sample in samples] == sorted((sample.score for sample in samples), reverse=True)
    assert len({sample.text for sample in samples}) == 3
    assert samples[0].text == run.generate("To be", params) == "".join(run.stream("To be", params))
    for sample in samples:
        assert sum(token["log_probability"] for token in sample.tokens) / len(sample.tokens) == pytest.approx(
            sample.score, rel=1e-4)
        assert all(len(token["likeliest"]) == 2 for token in sample.tokens)
    assert run.generate(["To be", "or not"], params) == [run.generate("To be", params), run.generate("or not", params)]
    with pytest.raises(ValueError, match="5 samples of num_beams = 4 are too many; ask for 4 or fewer"):
        run.samples("To be", params, 5)


@pytest.mark.parametrize("settings, message", [
    (dict(num_beams=3, num_beam_groups=2, diversity_penalty=1.0), "no multiple"),
    (dict(num_beams=4, num_beam_groups=2), "go together"), (dict(num_beams=4, diversity_penalty=1.0), "go together"),
    (dict(sample_beams=True), "num_beams of 2 or more"), (dict(penalty_alpha=0.5), "top_k = 0"),
    (dict(penalty_alpha=0.5, top_k=4, num_beams=2), "does not go with num_beams"),
    (dict(num_beams=4, early_stopping="maybe"), "none of: full, likely, never")])
def test_what_a_search_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_a_search_wider_than_the_engine_is_refused():
    with pytest.raises(ValueError, match="= 5 is more than the engine's slots, 4; give fewer"):
        Engine(model_of(), TOKENIZER, slots=4).submit([START], SamplingParams(num_beams=5))


def test_a_model_that_gives_nan_ends_the_search():
    model = model_of()
    with torch.no_grad():
        model.head.weight[END] = torch.nan
    engine = Engine(model, TOKENIZER, slots=3)
    request = engine.submit([START], SamplingParams(num_beams=3))
    while engine.step():
        pass
    assert "not finite" in str(request.error) and len(engine.left) == 3
