"""Every logits processor equals that of transformers, alone and in order; draws have the right frequencies."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from minigpt import sampling
from minigpt.config import SamplingParams


def random_case(seed, B=3, V=31, N=9, ties=False):
    """Logits (B, V), some of them -inf, and tokens (B, N) with repetitions."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(B, V, generator=generator)
    if ties:
        logits = logits.round()
    logits[:, 0] = -torch.inf
    return logits, torch.randint(0, V, (B, N), generator=generator)


def check(ours, theirs, seed, ties):
    """`ours` and `theirs` take (tokens, logits) and give the very same numbers; the input is left as it was."""
    logits, tokens = random_case(seed, ties=ties)
    before = logits.clone()
    made = ours(tokens, logits)
    assert torch.equal(logits, before), "the logits were written to"
    assert made.dtype == torch.float32 and torch.equal(made, theirs(tokens, logits.clone()))
    return made, before


seeds = st.integers(0, 2**31)


@given(seeds, st.floats(0.1, 5.0), st.booleans())
def test_repetition_penalty(seed, penalty, ties):
    made, before = check(lambda tokens, logits: sampling.repetition_penalty(logits, tokens, penalty),
                         RepetitionPenaltyLogitsProcessor(penalty=penalty), seed, ties)
    assert not torch.equal(made, before) or abs(penalty - 1) < 1e-6 or ties


@given(seeds, st.floats(0.01, 10.0), st.booleans())
def test_temperature(seed, value, ties):
    check(lambda tokens, logits: sampling.temperature(logits, value), TemperatureLogitsWarper(value), seed, ties)


@given(seeds, st.integers(1, 40), st.booleans())
def test_top_k(seed, k, ties):
    made, before = check(lambda tokens, logits: sampling.top_k(logits, k), TopKLogitsWarper(top_k=k), seed, ties)
    assert (made.isfinite().sum(-1) >= min(k, 30)).all()
    assert ties or (made.isfinite().sum(-1) == min(k, 30)).all()


def test_top_k_keeps_all_that_tie_with_the_last():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    assert sampling.top_k(logits, 2).isfinite().tolist() == [[True, False, True, True, True, False]]
    assert sampling.top_k(logits, 1).isfinite().tolist() == [[True] + [False] * 5]


@given(seeds, st.floats(0.0, 1.0), st.booleans())
def test_top_p(seed, p, ties):
    made, before = check(lambda tokens, logits: sampling.top_p(logits, p), TopPLogitsWarper(p), seed, ties)
    kept = made.isfinite()
    probabilities = before.softmax(-1)
    assert kept.any(-1).all()
    assert ((probabilities * kept).sum(-1) >= p - 1e-5).all()
    least = torch.where(kept, probabilities, 2.0).amin(-1)
    assert ((probabilities * kept).sum(-1) - least <= p + 1e-5).all(), "one token fewer would have done"


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 0.97])
def test_top_p_of_a_large_vocabulary(p):
    """The nucleus is found among the likeliest, where it lies there, else by a sort; each row as if it were alone."""
    V = 8 * sampling.CANDIDATES
    spread = torch.tensor([[6.0], [0.1], [3.0]])            # of the second, 97 % lie in more tokens than are looked at
    logits = spread * torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    made = sampling.top_p(logits, p)
    assert torch.equal(made, TopPLogitsWarper(p)(None, logits.clone()))
    assert torch.equal(made, torch.cat([sampling.top_p(row[None], p) for row in logits]))
    assert (made[1].isfinite().sum() > sampling.CANDIDATES) == (p > 0.2)


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    for p, kept in ((0.0, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.91, 4), (1.0, 4)):
        assert sampling.top_p(logits, p).isfinite().sum() == kept, p


@given(seeds, st.floats(0.0, 1.0), st.booleans())
def test_min_p(seed, p, ties):
    made, before = check(lambda tokens, logits: sampling.min_p(logits, p), MinPLogitsWarper(p), seed, ties)
    probabilities = before.softmax(-1)
    assert torch.equal(made.isfinite(), (probabilities >= p * probabilities.amax(-1, keepdim=True)) & before.isfinite())


@given(seeds, st.floats(0.01, 0.99), st.booleans())
def test_typical(seed, p, ties):
    made, before = check(lambda tokens, logits: sampling.typical(logits, p), TypicalLogitsWarper(p), seed, ties)
    kept = made.isfinite()
    assert ((before.softmax(-1) * kept).sum(-1) >= p - 1e-5).all() and kept.any(-1).all()


@given(seeds, st.integers(1, 4), st.integers(1, 12))
def test_no_repeat_ngram(seed, n, length):
    """Also against the words of its definition: with such an id the last n tokens would stand twice."""
    logits, _ = random_case(seed, V=4)
    tokens = torch.randint(0, 4, (3, length), generator=torch.Generator().manual_seed(seed))
    made = sampling.no_repeat_ngram(logits, tokens, n)
    assert torch.equal(made, NoRepeatNGramLogitsProcessor(n)(tokens, logits.clone()))
    for row, text in enumerate(tokens.tolist()):
        runs = [text[start:start + n] for start in range(length - n + 1)]
        for id in range(1, 4):
            assert made[row, id].isinf() == ((text + [id])[length + 1 - n:] in runs and length >= n)


@given(seeds, st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_penalties_are_openais(seed, presence, frequency):
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c[j] counted among what was drawn."""
    logits, tokens = random_case(seed)
    made = sampling.presence_and_frequency_penalty(logits, tokens, presence, frequency)
    for row, text in enumerate(tokens.tolist()):
        for id in range(logits.shape[1]):
            wanted = logits[row, id] - text.count(id) * frequency - float(id in text) * presence
            assert made[row, id] == pytest.approx(wanted.item(), abs=1e-4)


@given(seeds, st.sampled_from([1.0, 0.7, 1.3]), st.sampled_from([1.0, 0.2, 3.0]), st.sampled_from([0, 1, 5, 100]),
       st.sampled_from([1.0, 0.0, 0.5, 0.95]))
def test_all_in_order(seed, penalty, temperature, top_k, top_p):
    """The list that `generate` of transformers makes for the same settings."""
    theirs = LogitsProcessorList()
    if penalty != 1:
        theirs.append(RepetitionPenaltyLogitsProcessor(penalty=penalty))
    if temperature != 1:
        theirs.append(TemperatureLogitsWarper(temperature))
    if top_k:
        theirs.append(TopKLogitsWarper(top_k=top_k))
    if top_p < 1:
        theirs.append(TopPLogitsWarper(top_p))
    params = SamplingParams(repetition_penalty=penalty, temperature=temperature, top_k=top_k, top_p=top_p)
    check(lambda tokens, logits: sampling.process(logits, tokens, params), theirs, seed, False)


def test_the_order_is_that_of_generate():
    """The processors that transformers' own `generate` uses, in its order."""
    from transformers import GenerationConfig
    from twins import gpt2_twins

    model, _ = gpt2_twins()
    for min_p, typical_p in ((0.05, 0.7), (0.3, 0.4), (0.1, 0.9)):
        settings = dict(repetition_penalty=1.5, temperature=1.7, top_k=25, top_p=0.97, min_p=min_p, typical_p=typical_p)
        config = GenerationConfig(do_sample=True, no_repeat_ngram_size=2, sequence_bias=[[[3], 2.0], [[9], -1.5]],
                                  **settings)
        theirs = model._get_logits_processor(config, input_ids_seq_length=9, device="cpu")
        assert len(theirs) == 8
        params = SamplingParams(no_repeat_ngram=2, logit_bias={3: 2.0, 9: -1.5}, **settings)
        for seed in range(40):
            check(lambda tokens, logits, params=params: sampling.process(logits, tokens, params), theirs, seed, False)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_temperature_zero_is_greedy_after_the_penalty():
    for seed in range(20):
        logits, tokens = random_case(seed)
        params = SamplingParams(temperature=0.0, top_k=1, top_p=0.1)
        assert torch.equal(sampling.sample(logits, tokens, params, generators(0, 0, 0)), logits.argmax(-1))
    logits, tokens = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[1, 1]])
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert sampling.sample(logits, tokens, params, generators(0)).tolist() == [2]


@pytest.mark.parametrize("settings", [dict(temperature=1.0, top_p=1.0), dict(temperature=0.5, top_p=1.0),
                                      dict(temperature=1.0, top_k=4, top_p=1.0), dict(temperature=1.0, top_p=0.7),
                                      dict(temperature=1.5, repetition_penalty=2.0, top_k=7, top_p=0.9)], ids=str)
def test_frequencies_of_the_draws(settings):
    """Chi-squared of 4000 draws at a fixed seed is within 4 standard deviations of its mean."""
    params = SamplingParams(**settings)
    logits = torch.linspace(-1, 2, 10)[None]
    tokens = torch.tensor([[9, 3]])
    expected = sampling.process(logits, tokens, params).softmax(-1)[0]
    generator = generators(5)
    draws = torch.cat([sampling.sample(logits, tokens, params, generator) for _ in range(4000)])
    counts = torch.bincount(draws, minlength=10)
    possible = expected > 0
    assert not counts[~possible].any()

    def too_far(frequencies):
        degrees, means = int(possible.sum()) - 1, 4000 * frequencies[possible]
        return ((counts[possible] - means) ** 2 / means).sum() > degrees + 4 * math.sqrt(2 * degrees)

    assert not too_far(expected)
    assert too_far(expected.sqrt() / expected.sqrt().sum()), "the test cannot tell"


def test_rows_draw_from_generators_of_their_own():
    logits, tokens = random_case(0, B=1)
    logits, tokens = logits.expand(4, -1) / 4, tokens.expand(4, -1)
    params = SamplingParams(temperature=1.0, top_p=1.0)

    def draw(rows, *seeds):
        own = generators(*seeds)
        return torch.stack([sampling.sample(logits[:rows], tokens[:rows], params, own) for _ in range(30)], dim=1)

    together = draw(4, 1, 2, 3, 1)
    assert torch.equal(together[0], together[3])
    assert not torch.equal(together[0], together[1])
    for row, seed in enumerate((1, 2, 3)):
        assert torch.equal(draw(1, seed)[0], together[row])


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 17] = 0.0
    params = SamplingParams(temperature=2.0, top_k=5, top_p=1.0)
    assert {sampling.sample(logits, torch.zeros(1, 1, dtype=torch.int64), params, generators(seed)).item()
            for seed in range(200)} == {17}


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-38, 1e-45, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
    """Regression: logits divided by it overflowed, and the draw ended in an error of torch about inf and nan."""
    logits, tokens = random_case(3)
    params = SamplingParams(temperature=temperature)
    assert torch.equal(sampling.sample(logits, tokens, params, generators(1, 2, 3)), logits.argmax(-1))


def test_presence_and_frequency_count_what_was_drawn_and_not_the_prompt():
    logits, tokens = torch.zeros(1, 5), torch.tensor([[1, 1, 2, 3, 3]])
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, temperature=1.0, top_p=1.0)
    assert sampling.process(logits, tokens, params, num_prompt=2).tolist() == [[0.0, 0.0, -1.5, -2.0, 0.0]]
