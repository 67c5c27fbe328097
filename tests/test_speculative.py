"""Guesses change the speed of a text and never its distribution."""

import pytest
import torch
from decoding import START, TOKENIZER, constant_model, finished, ids, model_of
from twins import random_model

import minigpt
from minigpt import sampling
from minigpt.config import SamplingParams
from minigpt.engine import Engine
from minigpt.speculative import Draft, Lookup

DRAFTS = {"itself": lambda: model_of(), "another": lambda: model_of(1), "of a shorter context": lambda: model_of(
    2, context_length=9), "of the least context": lambda: model_of(2, context_length=2),
    "of learned positions": lambda: model_of(3, position="learned", depth=1)}


@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS)
@pytest.mark.parametrize("length", [1, 7, 60])
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_a_draft_changes_no_greedy_text(draft, length, penalty):
    """Nor does it past the context of the model or its own."""
    params = SamplingParams(temperature=0.0, max_new_tokens=length, repetition_penalty=penalty)
    for prompt in ([START], [START, *range(60, 90)]):
        assert ids(model_of(), prompt, params, ends=False, draft=draft()) == ids(
                model_of(), prompt, params, ends=False)


def test_a_draft_that_is_right_saves_steps():
    steps = {}
    for name, draft in (("none", None), ("itself", model_of(context_length=64)),
                        ("another", model_of(1, context_length=64))):
        engine = Engine(model_of(context_length=64), TOKENIZER, slots=1, draft=draft)
        engine.ends = ()
        engine.submit([START, 70], SamplingParams(temperature=1.0, max_new_tokens=40))
        steps[name] = 1
        while engine.step():
            steps[name] += 1
    assert steps["none"] >= 40 and steps["itself"] <= 10 and 10 < steps["another"] <= 40


def test_texts_with_a_draft_are_drawn_from_the_models_distribution():
    """Of four tokens with known probabilities, by a draft that thinks otherwise; places and pairs are counted."""
    tokens = TOKENIZER.encode("abcd")
    model = constant_model(dict(zip(tokens, (1.0, 0.5, -0.5, -1.0))))
    draft = constant_model(dict(zip(tokens, (-1.0, 0.5, 1.5, 0.0))))
    count, length = 500, 3
    engine = Engine(model, TOKENIZER, slots=1, draft=draft)
    params = SamplingParams(temperature=1.0, top_p=1.0, top_k=4, max_new_tokens=length)
    drawn = torch.tensor(finished(engine, *[engine.submit([START], params, row) for row in range(count)]))
    expected = torch.tensor([1.0, 0.5, -0.5, -1.0]).softmax(0)
    for place in drawn.T:
        found = torch.tensor([(place == token).double().mean() for token in tokens])
        assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()
    for one in range(4):
        for other in range(4):
            p = expected[one] * expected[other]
            both = ((drawn[:, 1] == tokens[one]) & (drawn[:, 2] == tokens[other])).double().mean()
            assert abs(both - p) <= 4 * (p * (1 - p) / count).sqrt()


@pytest.mark.parametrize("q", [[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1], [0.0, 0.0, 0.5, 0.5]])
def test_a_guess_and_what_is_drawn_after_it_are_the_models(q):
    logits, q = torch.tensor([[1.0, 0.2, -0.5, -torch.inf]]), torch.tensor([q])
    params, generator = SamplingParams(temperature=1.0, top_p=1.0), torch.Generator().manual_seed(0)
    drawn = torch.cat([sampling.sample(logits, None, params, [generator], (int(sampling.drawn(q, [generator])), q))
                       for _ in range(8000)])
    expected = logits.softmax(-1)[0]
    error = (drawn.bincount(minlength=4) / 8000 - expected).abs()
    assert (error <= 4 * (expected * (1 - expected) / 8000).sqrt()).all()


def test_lookup_takes_what_followed_the_latest_place():
    lookup = Lookup(3)
    assert lookup.guesses([5, 6, 7, 1, 2, 5, 6, 7], 9, None) == [(1, None), (2, None), (5, None)]
    assert lookup.guesses([9, 6, 7, 3, 4, 6, 7], 2, None) == [(3, None), (4, None)]
    assert lookup.guesses([1, 2, 3], 3, None) == [] == lookup.guesses([5, 6, 1, 5, 6], 0, None)


@torch.inference_mode()
def test_a_draft_reads_no_token_twice(monkeypatch):
    draft = Draft(model_of(context_length=64))
    read, hidden = [], draft.model.hidden
    monkeypatch.setattr(draft.model, "hidden", lambda tokens, **rest: (
        read.append(tokens.shape[1]), hidden(tokens, **rest))[1])
    draw = lambda logits, tokens: (int(logits.argmax()), None)                          # noqa: E731
    tokens = [START, *range(60, 70)]
    first = draft.guesses(tokens, 3, draw)
    assert len(first) == 3 and read[0] == 11 and set(read[1:]) <= {1}
    read.clear()
    draft.guesses([*tokens, first[0][0], 99], 2, draw)  # the second guess was wrong
    assert sum(read) <= 2 and draft.held[:13] == [*tokens, first[0][0], 99]


def test_what_a_draft_can_be(tmp_path):
    for options, message in ((dict(lookup=2), "does not go with lookup"), (dict(invariant=True), "goes with invariant"),
                             (dict(), "the draft has 53 tokens, fewer than the tokenizer's")):
        with pytest.raises(ValueError, match=message):
            Engine(model_of(), TOKENIZER, draft=random_model(), **options)
    with pytest.raises(FileNotFoundError, match="no run or checkpoint"):
        minigpt.load(tmp_path / "none", draft=tmp_path)


def test_a_draft_that_gives_nan_is_named():
    draft = model_of()
    with torch.no_grad():
        draft.head.weight.fill_(torch.nan)
    for temperature in (0.0, 1.0):
        engine = Engine(model_of(), TOKENIZER, slots=1, draft=draft)
        request = engine.submit([START, 70], SamplingParams(temperature=temperature))
        while engine.step():
            pass
        assert "the draft's output is not finite" in str(request.error)
        assert not engine.active
