"""Stop strings end a text where a search in the whole of it would, however the text comes in pieces."""


import pytest
import torch
from decoding import END, START, TOKENIZER, constant_model, finished, ids, model_of, run_of
from hypothesis import given
from hypothesis import strategies as st

from minigpt.config import SamplingParams
from minigpt.constraints import Text
from minigpt.engine import Engine
from minigpt.patterns import Pieces


def naive(text, stops):
    """Where the first stop string to be complete begins, of several that end there the longest; None without any."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


def stopping(stops):
    return Text(SamplingParams(stop=stops), Pieces(TOKENIZER))


letters = st.text(alphabet="abé", min_size=1, max_size=4)


@given(st.text(alphabet="abé", max_size=24), st.lists(letters, min_size=1, max_size=3), st.data())
def test_the_end_is_that_of_a_search_in_the_whole_text(text, stops, data):
    """And what was said to be sure on the way is never taken back."""
    content, state, sure = text.encode(), stopping(stops), 0
    wanted, place = naive(content, [stop.encode() for stop in stops]), 0
    while place < len(content) and state.end is None:
        size = data.draw(st.integers(1, 5))
        state.add_bytes(content[place:place + size])
        place += size
        assert sure <= state.sure <= len(state.content) and (wanted is None or state.sure <= wanted)
        sure = state.sure
    assert state.end == wanted


def test_only_what_may_become_a_stop_string_is_held_back():
    state = stopping(["abc", "bd"])
    for piece, sure in ((b"x", 1), (b"a", 1), (b"b", 1), (b"a", 3), (b"bb", 5), (b"d", 5)):
        state.add_bytes(piece)
        assert state.sure == sure, piece
    assert state.end == 5 and state.content == b"xababbd"


PLAIN = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=40, seed=3)


def with_stop(*stop, **settings):
    return SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=40, seed=3, stop=list(stop), **settings)


def letters_model():
    """Draws a, b, c and d, evenly."""
    return constant_model(dict.fromkeys(TOKENIZER.encode("abcd"), 9.0))


def test_a_text_ends_before_its_stop_string():
    run = run_of(letters_model())
    whole = run.generate("x", PLAIN)
    assert len(whole) == 40
    for stop in (whole[7:10], whole[20], whole[39], "zz"):
        wanted = whole[:whole.index(stop)] if stop in whole else whole
        assert run.generate("x", with_stop(stop)) == wanted
        pieces = list(run.stream("x", with_stop(stop, "yy")))
        assert "".join(pieces) == wanted and all(stop not in piece for piece in pieces)
    assert run.generate("x", with_stop(whole[3:5], whole[1:3])) == whole[:whole.index(whole[1:3])]


def test_requests_that_stop_leave_their_slot_and_the_others_alone():
    model = letters_model()
    run, params = run_of(model), [with_stop("ab"), PLAIN, with_stop("d"), with_stop("zz", min_new_tokens=3)]
    engine = Engine(model, TOKENIZER, slots=2)
    prompt = run.encode_prompt("x")
    drawn = finished(engine, *(engine.submit(prompt, each, row) for row, each in enumerate(params)))
    for row, each in enumerate(params):
        alone = Engine(model, TOKENIZER, slots=1)
        assert finished(alone, alone.submit(prompt, each, row))[0] == drawn[row]
    assert len(drawn[0]) < 40 and len(drawn[1]) == 40 and TOKENIZER.decode(drawn[2]).endswith("d")


@pytest.mark.parametrize("end", [START, END])
def test_no_text_ends_before_its_least_length(end):
    model = constant_model({end: 3.0, TOKENIZER.encode("a")[0]: 3.0})
    lengths = []
    for seed in range(20):
        for least in (0, 6):
            params = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=12, min_new_tokens=least, seed=seed)
            drawn = ids(model, [START, 70], params)
            assert len(drawn) >= least and (end not in drawn[:least])
            lengths.append((least, len(drawn)))
    eager = SamplingParams(temperature=0.0, min_new_tokens=6, max_new_tokens=12)
    assert len(ids(constant_model({end: 9.0}), [START, 70], eager)) == 7, "it ends as soon as it may"
    assert min(lengths)[1] < 6 and any(least == 6 and length < 12 for least, length in lengths)


@pytest.mark.parametrize("guesser", [dict(lookup=3), dict(draft=True)])
def test_penalties_count_what_is_drawn_with_guesses_too(guesser):
    """Greedy text under every penalty is the same with and without guesses, and none of it stands twice."""
    model = model_of(3, context_length=64)
    if "draft" in guesser:
        guesser = dict(draft=model_of(4, context_length=64))
    settings = dict(temperature=0.0, max_new_tokens=30, no_repeat_ngram=2, presence_penalty=0.4, frequency_penalty=0.3,
                    min_new_tokens=30)
    plain, guessed = (ids(model, [START, 70, 71, 70], SamplingParams(**settings), **options)
                      for options in ({}, guesser))
    assert plain == guessed and len(plain) == 30
    whole = [START, 70, 71, 70, *plain]
    pairs = list(zip(whole, whole[1:]))
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("settings, message", [
    (dict(stop=["a", ""]), "stop has an empty text"), (dict(stop="a"), "stop takes a list of strings, not 'a'"),
    (dict(min_p=1.5), "min_p = 1.5 is too large; the most is 1"),
    (dict(typical_p=-1.0), "typical_p = -1.0 is too small"),
    (dict(no_repeat_ngram=-1), "no_repeat_ngram = -1 is too small; the least is 0"),
    (dict(presence_penalty=float("nan")), "presence_penalty = nan is not a finite number"),
])
def test_what_cannot_be_asked_for(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_log_probabilities_are_the_models_own():
    """Whatever the temperature and the penalties, those of a full forward at each place."""
    model = model_of(5, context_length=64)
    run = run_of(model)
    params = SamplingParams(temperature=0.7, top_k=3, repetition_penalty=1.5, max_new_tokens=12, log_probabilities=4)
    sample, = run.samples("a b", params, 1)
    prompt = run.encode_prompt("a b")
    request = run.engine.submit(prompt, params)
    drawn = finished(run.engine, request)[0]
    never = [id for id in range(5) if id not in (START, END)]
    logits = model(torch.tensor([prompt + drawn]))[0, len(prompt) - 1:-1].index_fill(1, torch.tensor(never), -torch.inf)
    wanted = logits.log_softmax(-1)
    assert len(sample.tokens) == len(drawn) == len(request.log_probabilities) and sample.reason == "length"
    for row, (id, (value, likeliest)) in enumerate(zip(drawn, request.log_probabilities)):
        assert value == pytest.approx(wanted[row, id].item(), abs=1e-4)
        assert list(likeliest) == wanted[row].topk(4).indices.tolist()
        assert list(likeliest.values()) == pytest.approx(wanted[row].topk(4).values.tolist(), abs=1e-4)
    assert [token["log_probability"] for token in sample.tokens] == pytest.approx(
        [value for value, _ in request.log_probabilities], abs=1e-4)


def test_why_a_text_ends():
    run = run_of(constant_model({START: 3.0, **dict.fromkeys(TOKENIZER.encode("ab"), 5.0)}))
    params = [SamplingParams(temperature=1.0, max_new_tokens=20, seed=seed, stop=["bbb"]) for seed in range(40)]
    reasons = {run.samples("x", each, 1)[0].reason for each in params}
    assert reasons == {"stop", "end", "length"}


def test_a_bias_forces_and_bans_tokens():
    model = model_of(1)
    a, b = TOKENIZER.encode("ab")

    def drawn(bias):
        return ids(model, [START, 70], SamplingParams(temperature=1.0, max_new_tokens=9, seed=1, logit_bias=bias))

    assert drawn({a: 1e6}) == [a] * 9
    plain = drawn({b: 0.0})
    assert plain == ids(model, [START, 70], SamplingParams(temperature=1.0, max_new_tokens=9, seed=1))
    banned = drawn(dict.fromkeys(plain, -1e6))
    assert not set(banned) & set(plain) and banned
    with pytest.raises(ValueError, match="logit_bias: 999 is no token; ids are 0 to 260"):
        drawn({999: 1.0})
    for bias in ({"a": 1.0}, {-1: 1.0}, [1]):
        with pytest.raises(ValueError, match="logit_bias takes an object of numbers by token id"):
            SamplingParams(logit_bias=bias)
