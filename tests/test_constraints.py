"""What a text is held to, it keeps to, whatever the model: patterns, JSON, beginnings, and what may stand nowhere."""

import datetime
import json
import re

import jsonschema
import numpy as np
import pytest
import torch
from decoding import END, START, TOKENIZER, V, constant_model, finished, model_of, run_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoBadWordsLogitsProcessor
from twins import random_model

from minigpt import json_schema
from minigpt.config import SamplingParams
from minigpt.constraints import Text
from minigpt.engine import Engine
from minigpt.patterns import Pieces
from minigpt.tokenizer import FIRST_BYTE, Tokenizer

PIECES = Pieces(TOKENIZER)
WORDS = Tokenizer.train(['{"name": "a", "age": 12, "items": [true, false, null]}\n' * 40,
                         "the king and the queen " * 40, "été über 東京 \U0001f600 " * 20], vocab_size=330)
"""Tokens of several bytes, and single bytes beside them."""
MODELS = {TOKENIZER: model_of(context_length=96),
          WORDS: random_model(vocab_size=WORDS.vocab_size, context_length=96)}
HOT = dict(temperature=3.0, top_p=1.0)


def text_of(tokenizer, **settings):
    """(what a random model says, the request)"""
    engine = Engine(MODELS[tokenizer], tokenizer, slots=4)
    request = engine.submit([START], SamplingParams(**settings))
    finished(engine, request)
    drawn = [token for token in request.drawn if token not in request.ends]
    return tokenizer.decode_bytes(drawn), request


PATTERNS = ["(?:yes|no)", "[a-z]{3,9}", "a*b+c?", r"[0-9]{3}-[0-9]{4}", "é+[^x]?", "a|ab|abc*?",
            "(?:the king|the queen)( and .{2,4})*", "東京|\U0001f600{2}", r'"[^"\\]*"', "x?", "[^a-z]{4}"]


@settings(max_examples=60)
@given(st.sampled_from(PATTERNS), st.integers(0, 1000), st.integers(11, 40), st.sampled_from([TOKENIZER, WORDS]),
       st.sampled_from([dict(HOT), dict(temperature=0.0), dict(HOT, top_k=2), dict(num_beams=3),
                        dict(penalty_alpha=0.5, top_k=3), dict(HOT, repetition_penalty=1.5)]))
def test_every_text_matches_its_pattern(pattern, seed, length, tokenizer, how):
    """By Python's own engine, and within max_new_tokens, even if the model would go on for ever."""
    text, request = text_of(tokenizer, regex=pattern, seed=seed, max_new_tokens=length, **how)
    assert re.fullmatch(pattern, text.decode("utf-8")) and len(request.drawn) <= length


class Everywhere:
    """Tokens of which each is a byte, for patterns alone."""

    token_bytes = [bytes([byte]) for byte in range(256)]


BYTES = Pieces(Everywhere())
CHARACTERS = "aábc01 -\n\"\\\x00\x7f߿ࠀ一퟿\ue000\uffff\U00010000\U0001f600\U0010ffff"


@settings(max_examples=300)
@given(st.sampled_from([*PATTERNS, "[^é]*", ".*", r"\w+\s?\d", "(?i:ab|Á[b-d])*", "[一-龥]{1,2}",
                        "a{2,}?b?|[^\\W1]", "[\U00010000-\U0001f700]|[\x00-߿]{2}", "(a|b)*abb", "",
                        "(?s:.)|ab?", "^a(?:b|)$", r"[^\Dx]\S"]),
       st.text(alphabet=CHARACTERS, max_size=5) | st.binary(max_size=4).map(lambda raw: raw.decode("utf-8", "replace")))
def test_a_pattern_is_that_of_python(pattern, text):
    """Every text is accepted or not as by `re`."""
    compiled = BYTES.pattern(pattern)
    state = compiled.start
    for byte in text.encode():
        state = int(compiled.next[state, byte])
    assert bool(compiled.is_final[state]) == bool(re.fullmatch(pattern, text, re.ASCII))


@given(st.sampled_from(["é+[^x]?", ".{2}", "[^a]"]), st.binary(max_size=4))
def test_what_is_no_utf8_matches_nothing(pattern, raw):
    compiled = BYTES.pattern(pattern)
    state = compiled.start
    for byte in raw:
        state = int(compiled.next[state, byte])
    try:
        assert bool(compiled.is_final[state]) == bool(re.fullmatch(pattern, raw.decode("utf-8")))
    except UnicodeDecodeError:
        assert not compiled.is_final[state]


def test_the_way_to_an_end_is_as_long_as_it_is_said():
    """By walking it: each step on it brings the end one byte nearer."""
    for pattern in PATTERNS:
        compiled = BYTES.pattern(pattern)
        state, left = compiled.start, compiled.distance[compiled.start]
        while left:
            state = compiled.next[state][compiled.distance[compiled.next[state]].argmin()]
            assert compiled.distance[state] == left - 1
            left -= 1
        assert compiled.is_final[state]
    assert BYTES.pattern("[a-z]{3,9}").distance[BYTES.pattern("[a-z]{3,9}").start] == 3


def test_all_that_matches_can_be_said():
    """The constraint forbids nothing that it should not: of five texts each is drawn."""
    found = {text_of(WORDS, regex="the|then|een|ee|k", seed=seed, max_new_tokens=5, **HOT)[0] for seed in range(150)}
    assert found == {b"the", b"then", b"een", b"ee", b"k"}


def test_a_token_that_breaks_the_pattern_halfway_is_not_allowed():
    """Every token against a match of its own bytes, in every state on the way through a text."""
    pattern = r"the (?:king|queen)s? and [a-z ]*"
    content = b"the kings and the queen"
    state = Text(SamplingParams(regex=pattern, max_new_tokens=100), Pieces(WORDS), frozenset({END}))
    for size in range(len(content) + 1):
        allowed = state.allowed()
        assert allowed[END] == (size >= len("the kings and "))
        for token in range(FIRST_BYTE, WORDS.vocab_size):
            wanted = content[:size] + WORDS.token_bytes[token]
            assert allowed[token] == bool(partial(pattern, wanted)), (content[:size], WORDS.token_bytes[token])
        if size < len(content):
            state.add(WORDS.token_bytes.index(content[size:size + 1]))


def partial(pattern, content):
    """Whether some text that matches this pattern of ASCII begins so, by trying what may be missing."""
    tails = ["", "s", " and ", "king and ", "queen and "]
    whole = ["the king and ", "the queen and ", "the kings and ", "the queens and "]
    text = content.decode("latin-1")
    return any(each.startswith(text) for each in whole) or any(re.fullmatch(pattern, text + tail) for tail in tails)


@pytest.mark.parametrize("pattern, message", [
    ("(", "is no regular expression: missing"), ("a)(b", "is no regular expression: unbalanced"),
    ("[b-a]", "bad character"), ("a^b", r"cannot be kept to \(at\)"), (r"\bx", "without anchors"),
    ("(?=a)b", "look-around"), (r"(a)\1", "back-references"), (r"[^\x00-\U0010ffff]", "matches no text at all"),
    ("a{30}", "max_new_tokens = 8 may be too few for any text .* give 30"),
    ("(a{1000}){1000}", "counts too far; lower"), ("(a|b)*a(a|b){20}", "needs too many states; lower")])
def test_what_is_no_pattern(pattern, message):
    with pytest.raises(ValueError, match=message):
        text_of(TOKENIZER, regex=pattern, max_new_tokens=8)


SCHEMAS = [
    {"type": "object", "properties": {"name": {"type": "string", "minLength": 1, "maxLength": 4},
                                      "age": {"type": "integer", "minimum": 3, "maximum": 120}},
     "required": ["age", "name"], "additionalProperties": False},
    {"type": "array", "items": {"type": ["integer", "null"], "exclusiveMinimum": -12, "maximum": 7}, "minItems": 1,
     "maxItems": 3},
    {"enum": ["a\"b", 1.5, None, {"x": ["é", True]}, "\n\\"]}, {"const": [1, {"a": "b.c*"}]},
    {"anyOf": [{"type": "boolean"}, {"type": "number"}, {"$ref": "#/$defs/day"}],
     "$defs": {"day": {"type": "string", "format": "date"}}},
    {"type": "object", "properties": {'q"\\é': {"type": "null"}, "b": {"const": 1}, "c": {"type": "boolean"}}},
    {"type": "object", "required": ["z"], "properties": {"a": {"type": "boolean"}}},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "string", "pattern": "^[a-c]+-\\d{2}$"}, {"type": "string", "pattern": "x[yz]"},
    {"type": "string", "format": "uuid"}, {"type": "string", "format": "date-time"},
    {"type": "integer", "minimum": 98, "exclusiveMaximum": 1203}, {"type": "integer", "maximum": -5},
    {"minimum": 5}, {"title": "anything"}, {"type": "array", "maxItems": 0}, True,
    {"type": "object", "properties": {"deep": {"type": "array", "items": {"type": "object", "properties": {
        "x": {"enum": [1, 2]}}, "required": ["x"]}, "maxItems": 2}}, "required": ["deep"]},
    {"type": "string", "enum": ["a", 1, True]}, {"type": "object", "additionalProperties": False},
]


@settings(max_examples=120)
@given(st.sampled_from(SCHEMAS), st.integers(0, 1000), st.sampled_from([TOKENIZER, WORDS]), st.booleans())
def test_every_text_is_json_of_its_schema(schema, seed, tokenizer, greedy):
    """By jsonschema, with its checks of formats."""
    how = dict(temperature=0.0) if greedy else HOT
    text, _ = text_of(tokenizer, json_schema=json.dumps(schema), seed=seed, max_new_tokens=60, **how)
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(text))
    if schema == {"type": "string", "format": "date-time"}:     # which jsonschema does not look into
        assert datetime.datetime.fromisoformat(json.loads(text)).utcoffset() is not None


@given(st.integers(-10**6, 10**6), st.integers(0, 10**6), st.data())
def test_bounds_of_whole_numbers(low, more, data):
    pattern = json_schema.to_regex(json.dumps({"type": "integer", "minimum": low, "maximum": low + more}))
    high = low + more
    for number in (low, high, (low + high) // 2, data.draw(st.integers(low, high))):
        assert re.fullmatch(pattern, str(number))
    for number in (low - 1, high + 1, data.draw(st.integers(high + 1, 10**9)), data.draw(st.integers(-10**9, low - 1))):
        assert not re.fullmatch(pattern, str(number))
    assert not re.fullmatch(pattern, "-0") and not re.fullmatch(pattern, "007")


@pytest.mark.parametrize("schema, message", [
    ("{", "is no JSON"), ({"type": "integer", "multipleOf": 3}, "#: 'multipleOf' is not supported; leave it out"),
    ({"properties": {"a": {"oneOf": []}}}, "#/properties/a: 'oneOf' is not supported; write anyOf"),
    ({"type": "text"}, "type 'text' is none of: string, integer"), ({"$ref": "#/$defs/x"}, "there is no '#/\\$defs/x'"),
    ({"$ref": "#"}, "leads back to itself"), ({"type": "string", "format": "ipv4"}, "'ipv4' is none of: date"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}, "leads back to itself"),
    ({"type": "string", "pattern": ".*"}, "may match a quote"), ({"type": "string", "pattern": "("}, "no regular"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "beside 'pattern' is not supported"),
    ({"type": "string", "minLength": 5, "maxLength": 4}, "minLength = 5 is more than maxLength = 4"),
    ({"type": "array", "maxItems": 10**6}, "maxItems = 1000000 is no whole number from 0 to 1000"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "is from 5 to 4"),
    ({"type": "integer", "minimum": 1.5}, "minimum = 1.5 is no whole number"),
    ({"type": "number", "minimum": 0}, "supported of integers only"), ({"enum": []}, "no list with values"),
    ({"type": "string", "enum": [1]}, "no value is of type string"), ([], "describes no value"),
    (False, "describes no value"),
    ({"anyOf": [{"type": "null"}], "type": "null"}, "'type' beside 'anyOf' is not supported"),
])
def test_a_schema_that_cannot_be_kept_to_is_refused(schema, message):
    with pytest.raises(ValueError, match=message):
        json_schema.to_regex(schema if isinstance(schema, str) else json.dumps(schema))


@settings(max_examples=40)
@given(st.lists(st.text(alphabet="abé", min_size=1, max_size=3), min_size=1, max_size=4), st.integers(0, 1000),
       st.sampled_from([dict(HOT), dict(num_beams=2), dict(penalty_alpha=0.5, top_k=3)]))
def test_a_banned_text_stands_nowhere(banned, seed, how):
    """Said by a model that says little else, in tokens of one byte and of several."""
    words = Tokenizer.train(["ab abé aab béa éé " * 60], vocab_size=275)
    model = constant_model(dict.fromkeys(range(FIRST_BYTE + 256, words.vocab_size), 9.0)
                           | dict.fromkeys(words.encode("aé "), 9.0), words.vocab_size)
    engine = Engine(model, words, slots=3)
    request = engine.submit([START], SamplingParams(banned=banned, seed=seed, max_new_tokens=25, **how))
    finished(engine, request)
    assert not any(text.encode() in words.decode_bytes(request.drawn) for text in banned)


@given(st.lists(st.lists(st.integers(FIRST_BYTE, FIRST_BYTE + 3), min_size=1, max_size=3), min_size=1, max_size=3),
       st.lists(st.integers(FIRST_BYTE, FIRST_BYTE + 3), max_size=6))
def test_banned_texts_are_transformers_bad_words(banned, drawn):
    """Where a token is a byte, what may come next is the same; a text that is all zero bytes is no exception."""
    logits = torch.zeros(1, V)
    theirs = NoBadWordsLogitsProcessor(banned)(torch.tensor([[END, *drawn]]), logits).isinf()[0].numpy()
    text = Text(SamplingParams(banned=[TOKENIZER.decode_bytes(ids).decode() for ids in banned]), PIECES)
    for token in drawn:
        text.add(token)
    allowed = text.allowed()
    assert np.array_equal(~allowed if allowed is not None else np.zeros(V, bool), theirs)


def test_a_text_begins_as_it_must():
    run = run_of(MODELS[TOKENIZER])
    for settings_ in (dict(temperature=0.0), dict(HOT, seed=4), dict(num_beams=3), dict(penalty_alpha=0.5, top_k=2)):
        params = SamplingParams(begin_with="Sure, é", max_new_tokens=20, log_probabilities=1, **settings_)
        sample, = run.samples("Is it?", params, 1)
        assert sample.text.startswith("Sure, é") and len(sample.text) > 7
        assert len(sample.tokens) == 20 and all(token["log_probability"] < 0 for token in sample.tokens[:8])


def test_what_contradicts_itself_is_told():
    run = run_of(MODELS[TOKENIZER])
    for settings_ in (dict(regex="[ab]", banned=["a", "b"]), dict(regex="[ab]", banned=["a", "b"], num_beams=2),
                      dict(regex="a{9}", no_repeat_ngram=2), dict(regex="aa", logit_bias={}, banned=["aa"]),
                      dict(regex="[ab]", banned=["a", "b"], penalty_alpha=0.5, top_k=2)):
        with pytest.raises(ValueError, match="no token may come next: what is banned"):
            run.generate("x", SamplingParams(**settings_))
    assert run.generate("x", SamplingParams(regex="[ab]", banned=["a"])) == "b", "the engine goes on"


def test_stop_tokens():
    run = run_of(constant_model(dict.fromkeys(TOKENIZER.encode("abcd"), 9.0)))
    stop = TOKENIZER.encode("d")
    for settings_ in (dict(temperature=1.0, top_p=1.0), dict(num_beams=2, sample_beams=True, temperature=1.0)):
        params = SamplingParams(stop_tokens=stop, max_new_tokens=100, seed=2, **settings_)
        sample, = run.samples("x", params, 1)
        assert sample.reason == "stop" and "d" not in sample.text
        assert run.generate("x", params) == sample.text
    least = SamplingParams(stop_tokens=stop, max_new_tokens=100, min_new_tokens=30, temperature=1.0, top_p=1.0)
    assert len(run.generate("x", least)) >= 30
    with pytest.raises(ValueError, match="stop_tokens: 5000 is no token"):
        run.generate("x", SamplingParams(stop_tokens=[5000]))


def test_echo():
    model = MODELS[TOKENIZER]
    run, plain = run_of(model), SamplingParams(max_new_tokens=5)
    params = SamplingParams(max_new_tokens=5, echo=True, log_probabilities=1)
    text = "To be" + run.generate("To be", plain)
    sample, = run.samples("To be", params, 1)
    assert sample.text == text == run.generate("To be", params) == run.generate(["To be"], params)[0]
    assert "".join(run.stream("To be", params)) == text
    assert [token["token"] for token in sample.tokens[:5]] == list("To be") and len(sample.tokens) == 10
    ids = run.encode_prompt("To be")
    with torch.no_grad():
        wanted = run.engine.possible(model(torch.tensor([ids]))[0]).log_softmax(-1)
    for place, token in enumerate(sample.tokens[:5], 1):
        assert token["log_probability"] == pytest.approx(wanted[place - 1, ids[place]].item(), abs=1e-5)
    assert run.samples(None, params, 1)[0].tokens[0]["log_probability"] < 0


def test_beginnings_and_patterns_with_guesses():
    """A draft's guesses keep to it too, and the text is that without a draft."""
    model = MODELS[TOKENIZER]
    for settings_ in (dict(regex="[a-f ]{5,30}"), dict(begin_with="abc"), dict(banned=["a", "b"]),
                      dict(min_new_tokens=9)):
        params = SamplingParams(temperature=0.0, max_new_tokens=30, **settings_)
        texts = []
        for options in (dict(), dict(draft=model_of(5)), dict(lookup=4)):
            engine = Engine(model, TOKENIZER, slots=1, **options)
            texts += finished(engine, engine.submit([START, 70], params))
        assert texts[0] == texts[1] == texts[2]


def test_what_ends_a_text_is_no_part_of_it():
    """A stop token has bytes of its own: they neither stand in the text nor count for what it matches."""
    stop = TOKENIZER.encode("s")
    run = run_of(constant_model({stop[0]: 9.0, TOKENIZER.encode("a")[0]: 8.0}))
    for more in (dict(), dict(stop=["QQQ"]), dict(banned=["QQQ"]), dict(regex="[a-m]*"), dict(min_new_tokens=3)):
        for how in (dict(temperature=0.0), dict(num_beams=2)):
            params = SamplingParams(stop_tokens=stop, max_new_tokens=9, **more, **how)
            sample, = run.samples("x", params, 1)
            assert set(sample.text) <= {"a"} and sample.reason == "stop", (more, how)
            assert run.generate("x", params) == sample.text


@pytest.mark.parametrize("settings_, message", [
    (dict(regex="c|abcd", begin_with="ab", max_new_tokens=3), "max_new_tokens = 3 may be too few .* give 4 or more"),
    (dict(regex="yes|no", begin_with="yes!"), "'yes!' begins no text that matches"),
    (dict(begin_with="hello world", max_new_tokens=5), "give 11 or more"),
    (dict(begin_with="hello world", banned=["x", "o w"]), "has the banned 'o w' in it"),
    (dict(regex="[a-z]{4,}Q", stop=["Q"]), "stop does not go with regex"),
    (dict(min_new_tokens=9, max_new_tokens=8), "min_new_tokens = 9 is more than max_new_tokens = 8"),
    (dict(stop=["\udcff"]), "stop has bytes that are not UTF-8"),
    (dict(sample_beams=True, num_beams=2, temperature=0.0), "sample_beams draws"),
    (dict(json_schema='{"type": "array", "items": ' * 30 + "{}" + "}" * 30), "describes more than can be kept to"),
    (dict(json_schema='{"type": "array", "items": ' * 5000 + "{}" + "}" * 5000), "nests too deep"),
    (dict(regex="(" * 50_000 + "a" + ")*" * 50_000), "nests too deep; write it with fewer"),
    (dict(regex="(?u:a)"), "re.ASCII"),
])
def test_what_cannot_be_asked_for_together(settings_, message):
    with pytest.raises(ValueError, match=message):
        run_of(MODELS[TOKENIZER]).generate("x", SamplingParams(**settings_))


def test_a_dead_end_of_a_draft_is_none_of_the_model():
    """Behind a match that is complete nothing may come next; a draft that looks ahead so far just stops there."""
    for settings_ in (dict(regex="ab", min_new_tokens=5), dict(regex="[abc]{1,3}", no_repeat_ngram=1)):
        params = SamplingParams(max_new_tokens=12, temperature=1.0, **settings_)
        engine = Engine(MODELS[TOKENIZER], TOKENIZER, slots=1, draft=model_of(5))
        text = TOKENIZER.decode_bytes(finished(engine, engine.submit([START, 70], params))[0]).decode()
        assert re.fullmatch(settings_["regex"], text.removesuffix("</s>"))


def test_a_beginning_is_spelled_without_a_space_that_a_tokenizer_puts_before():
    class Spaced:
        """Encodes as SentencePiece does with a dummy prefix."""

        token_bytes = [b"", b" ", b"k", b"i", b"n", b"g", b" k", b"king", b" king", b"\xc3", b"\xa9"]

        def encode(self, text):
            return [8] if text == "king" else [1]

    pieces = Pieces(Spaced())
    assert pieces.spelled("king") == [7] and pieces.spelled(" king") == [8] and pieces.spelled("ké") == [2, 9, 10]


@pytest.mark.parametrize("kind, right, wrong", [
    ("date", ["2024-01-31", "1999-02-28"], ["2024-02-30", "2024-04-31", "2024-13-01", "24-01-01"]),
    ("time", ["23:59:59Z", "00:00:00.25+01:00"], ["24:00:00Z", "10:00:00.Z", "10:00:00", "10:60:00Z"]),
    ("date-time", ["2024-01-31T10:00:00.5-03:30"], ["2024-01-31T10:00:00.Z", "2024-01-31 10:00:00Z"]),
    ("uuid", ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000"])])
def test_formats(kind, right, wrong):
    pattern = json_schema.to_regex(json.dumps({"type": "string", "format": kind}))
    assert all(re.fullmatch(pattern, json.dumps(text)) for text in right)
    assert not any(re.fullmatch(pattern, json.dumps(text)) for text in wrong)
