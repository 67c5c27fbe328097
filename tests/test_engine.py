"""Text from a model: cached decoding equals a full forward, in any batch, streamed or not, past the context too."""

import contextlib
import itertools
import random

import pytest
import torch
from compare import assert_close
from decoding import END, START, TOKENIZER, V, constant_model, finished, ids, model_of, run_of
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import gpt2_twins, random_model

from minigpt import engine as engine_module
from minigpt import sampling
from minigpt.cache import Decode, KVCache, Prefill
from minigpt.config import SamplingParams
from minigpt.engine import Engine
from minigpt.tokenizer import FIRST_BYTE

CPU = torch.device("cpu")
VARIANTS = [
    dict(), dict(window=3), dict(num_kv_heads=2, head_size=10), dict(num_kv_heads=1, mlp="swiglu", rope_scale=4.0),
    dict(position="learned", norm="layer_norm", bias=True, qk_norm=False, mlp="gelu"), dict(position="none", window=5),
    dict(norm_position="post", num_kv_heads=2, window=1), dict(qkv_bias=True, tied_embeddings=False),
]


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
    starts = itertools.accumulate(chunks[:-1], initial=0)
    parts = []
    for start, chunk in zip(starts, tokens.split(chunks, dim=1), strict=True):
        if chunk.shape[1] == 1:
            view = Decode(cache, dict.fromkeys(range(3), start))
            parts.append(model(chunk.T, cache=view).transpose(0, 1))
        else:
            parts.append(torch.cat([model(chunk[slot:slot + 1], cache=Prefill(cache, (slot, start, chunk.shape[1])))
                                    for slot in range(3)]))
    assert_close(torch.cat(parts, dim=1), full, 1e-5)


@torch.no_grad()
def test_a_cache_that_forgets_is_noticed():
    """The comparison above can fail: one key of one layer overwritten shows."""
    model = model_of()
    tokens = torch.randint(0, V, (1, 24), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 1, 24, CPU, torch.float32)
    model(tokens[:, :23], cache=Prefill(cache, (0, 0, 23)))
    cache.keys[1, 0, :, 5] = 0
    with pytest.raises(AssertionError, match="off by"):
        assert_close(model(tokens[:, 23:], cache=Decode(cache, {0: 23})), model(tokens)[:, 23:], 1e-5)


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
        if token in (START, END):
            break
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
    for position in ("rotary", "learned"):
        model = model_of(context_length=context_length, position=position)
        made = ids(model, prompt, params)
        assert made == naive(model, prompt, params) and (len(made) == 30 or made[-1] in (START, END))


def test_greedy_equals_generate_of_transformers():
    texts = set()
    for seed, prompt in enumerate(([START], [START, 100, 7, 200], [START, *range(20, 40)])):
        theirs, ours = gpt2_twins(vocab_size=V, context_length=40, seed=seed)
        made = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                               do_sample=False, max_new_tokens=20, suppress_tokens=[0, 3, 4], eos_token_id=[START, END],
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
    samples = [sample.text for sample in run.samples(prompt, RANDOM, 4)]
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
    run = run_of(model_of())
    drawn = iter([FIRST_BYTE + byte for byte in data + data])
    monkeypatch.setattr(sampling, "sample", lambda *_: torch.tensor([next(drawn)]))
    params = SamplingParams(max_new_tokens=len(data))
    assert list(run.stream("x", params)) == pieces
    whole, = run.samples("x", params, 1)
    assert whole.text == "".join(pieces) == data.decode(errors="replace")


def test_pieces_of_a_random_model_join_to_its_text():
    run = run_of(model_of())
    for seed in range(10):
        params = SamplingParams(temperature=1.5, top_p=1.0, max_new_tokens=60, seed=seed)
        pieces = list(run.stream("é", params))
        assert all(pieces) and "".join(pieces) == run.generate("é", params)
        assert "".join(pieces).encode().decode() == "".join(pieces)


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
    assert [sample.text for sample in run.samples("x", GREEDY, 2)] == ["a" * 15] * 2


@pytest.mark.parametrize("end", [START, END])
def test_an_end_token_ends_the_text(end):
    """Each row on its own: with a chance of a half a token, texts are of many lengths, 1 on average."""
    run = run_of(constant_model({end: 5.0, token("a"): 5.0}))
    params = SamplingParams(temperature=1.0, top_p=0.99, max_new_tokens=50)
    texts = [sample.text for sample in run.samples("x", params, 200)]
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


def prompts(count, longest=30, seed=0):
    chance = random.Random(seed)
    return [[START, *(chance.randrange(FIRST_BYTE, V) for _ in range(chance.randrange(longest)))] for _ in range(count)]


@pytest.mark.parametrize("settings, slots", [*((settings, 2) for settings in VARIANTS), ({}, 1), ({}, 5)], ids=str)
def test_a_batch_of_unequal_prompts_gives_the_tokens_of_each_alone(settings, slots):
    """More requests than slots, and a context that some of them outgrow."""
    model = model_of(**settings)
    engine = Engine(model, TOKENIZER, slots=slots)
    jobs = [(prompt, SamplingParams(temperature=temperature, max_new_tokens=3 + 4 * number, seed=number))
            for number, (prompt, temperature) in enumerate(zip(prompts(7), (0.0, 1.0, 0.7, 0.0, 1.3, 1.0, 0.0)))]
    requests = [engine.submit(*job) for job in jobs]
    assert finished(engine, *requests) == [ids(model, *job) for job in jobs]
    assert not engine.active and not engine.queue and len(engine.left) == slots


def logits_of(monkeypatch):
    """{request: the bytes of all logits that its tokens were drawn from}, as an engine goes on."""
    seen, draw = {}, Engine._draw

    def record(self, requests, logits, *others):
        for request, row in zip(requests, logits, strict=True):
            seen.setdefault(request, []).append(row.numpy().tobytes())
        draw(self, requests, logits, *others)
    monkeypatch.setattr(Engine, "_draw", record)
    return seen


WIDE = random_model(vocab_size=V, context_length=160, depth=2, width=128, num_heads=4, num_kv_heads=2)
SHARED = [START, *range(60, 180)]
request_mixes = st.lists(st.tuples(
    st.integers(0, 3),                                                      # steps before it arrives
    st.one_of(st.integers(1, 130).map(lambda n: SHARED[:n]),
              st.lists(st.integers(FIRST_BYTE, V - 1), min_size=1, max_size=200)),
    st.integers(1, 40), st.sampled_from([0.0, 1.0, 1.5]), st.integers(0, 3)), min_size=2, max_size=7)


GELU = random_model(vocab_size=V, context_length=160, depth=1, width=40, num_heads=4, mlp="gelu", bias=True)
"""Whose widths are no multiples of those that a processor takes at a time."""


@settings(max_examples=10)
@given(mix=request_mixes, past_context=st.sampled_from(["reread", "slide"]), model=st.sampled_from([WIDE, GELU]))
def test_an_invariant_engine_gives_a_request_the_same_bits_in_any_company(mix, past_context, model):
    """Alone in an engine of its own, or among others that come and go and share its beginning."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = logits_of(monkeypatch)
        options = dict(invariant=True, past_context=past_context)
        engine, requests = Engine(model, TOKENIZER, slots=4, **options), []
        for wait, prompt, length, temperature, seed in mix:
            for _ in range(wait):
                engine.step()
            requests.append(engine.submit(prompt, SamplingParams(
                temperature=temperature, max_new_tokens=length, seed=seed, top_p=0.9)))
        together = finished(engine, *requests)
        for request, made in zip(requests, together):
            alone = Engine(model, TOKENIZER, slots=1, **options)
            again = alone.submit(request.tokens[:request.num_prompt], request.params)
            assert finished(alone, again) == [made] and seen[again] == seen[request]


def test_an_engine_that_is_not_invariant_gives_other_bits(monkeypatch):
    """The test above can fail: a product of one row is not that of four."""
    seen = logits_of(monkeypatch)
    requests = []
    for slots in (1, 4):
        engine = Engine(WIDE, TOKENIZER, slots=slots)
        requests.append([engine.submit(prompt, GREEDY) for prompt in prompts(4, 60)])
        finished(engine, *requests[-1])
    assert any(seen[one] != seen[other] for one, other in zip(*requests))


@pytest.mark.parametrize("invariant", [False, True])
def test_a_shared_beginning_is_read_once(invariant, monkeypatch):
    read = []
    hidden = WIDE.hidden
    monkeypatch.setattr(WIDE, "hidden", lambda tokens, **rest: (
        read.append(tokens.shape[1] if isinstance(rest["cache"], Prefill) else 0), hidden(tokens, **rest))[1])
    engine = Engine(WIDE, TOKENIZER, slots=3, invariant=invariant)
    requests = [engine.submit([*SHARED, 7, number], GREEDY) for number in (8, 9, 10)]
    texts = finished(engine, *requests)
    size = 64                                           # an invariant engine shares whole chunks
    assert [count for count in read if count] == ([size] * 4 if invariant else [123, 1, 1])
    assert texts == [ids(WIDE, [*SHARED, 7, number], GREEDY) for number in (8, 9, 10)]


def test_a_conversation_keeps_its_cache_between_turns(monkeypatch):
    read = []
    hidden = WIDE.hidden
    monkeypatch.setattr(WIDE, "hidden", lambda tokens, **rest: (
        read.append(tokens.shape[1]), hidden(tokens, **rest))[1])
    engine = Engine(WIDE, TOKENIZER, slots=2)
    first = engine.submit(SHARED[:50], GREEDY)
    other = engine.submit(prompts(1, 30, seed=4)[0], GREEDY)
    finished(engine, first, other)
    turn = [*first.tokens, 70, 71, 72]
    read.clear()
    second = engine.submit(turn, GREEDY)
    finished(engine, second)
    assert read[0] == 4 and set(read[1:]) <= {1}        # the last token drawn was not read yet
    assert second.drawn == ids(WIDE, turn, GREEDY)


@pytest.mark.parametrize("settings", [dict(), dict(position="none"), dict(window=3)], ids=str)
@pytest.mark.parametrize("invariant", [False, True])
def test_sliding_keeps_the_last_tokens_as_they_were(settings, invariant):
    """In a model of one layer, keys and values are functions of a token and its distance: each token is drawn after
    exactly those tokens that were not forgotten."""
    model, length = model_of(depth=1, context_length=9, tied_embeddings=False, **settings), 40
    params = SamplingParams(temperature=0.0, max_new_tokens=length)
    prompt = [START, 70, 80]
    tokens, first = list(prompt), 0
    with torch.no_grad():
        while len(tokens) < len(prompt) + length:
            if len(tokens) - first > 9:
                first = len(tokens) - 9 // 2 - 1
            logits = model(torch.tensor([tokens[first:]]))[0, -1]
            logits[TOKENIZER.never_sampled] = -torch.inf
            tokens.append(int(logits.argmax()))
    made = ids(model, prompt, params, ends=False, past_context="slide", invariant=invariant)
    assert made == tokens[len(prompt):] and len(set(made)) > 3


def test_what_past_context_can_be():
    with pytest.raises(ValueError, match="'forget' is none of: reread, slide"):
        Engine(model_of(), TOKENIZER, past_context="forget")
    with pytest.raises(ValueError, match="slide is not for a model with learned positions"):
        Engine(model_of(**VARIANTS[4]), TOKENIZER, past_context="slide")


def test_a_cancelled_request_ends_within_a_step_and_the_others_go_on():
    model = model_of()
    engine = Engine(model, TOKENIZER, slots=2)
    engine.ends = ()
    requests = [engine.submit(prompt, RANDOM, row) for row, prompt in enumerate(prompts(5, 9, seed=1))]
    engine.step()
    assert list(engine.active.values()) == requests[:2] and len(engine.queue) == 3
    requests[0].cancel()
    requests[3].cancel()                                # in the queue
    before = len(requests[0].tokens)
    engine.step()
    assert set(engine.active.values()) == {requests[1], requests[2]}
    texts = finished(engine, *requests)
    assert len(requests[0].tokens) == before and texts[3] == []
    for row in (1, 2, 4):
        alone = Engine(model, TOKENIZER, slots=1)
        alone.ends = ()
        again = alone.submit(requests[row].tokens[:requests[row].num_prompt], RANDOM, row)
        assert finished(alone, again) == [texts[row]]


def test_a_stream_that_is_left_gives_its_slot_back():
    run = run_of(model_of())
    stream = run.stream("To be", RANDOM)
    next(stream)
    assert len(run.engine.active) == 1
    stream.close()
    assert not run.engine.step() and not run.engine.active
    assert run.generate("To be", RANDOM) == "".join(run_of(model_of()).stream("To be", RANDOM))


def test_streams_that_are_read_in_turn():
    run = run_of(model_of())
    params = [SamplingParams(temperature=1.0, max_new_tokens=12, seed=seed) for seed in range(3)]
    streams = [run.stream("To be", each) for each in params]
    texts = ["", "", ""]
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces)]
    assert texts == [run_of(model_of()).generate("To be", each) for each in params]


def test_a_model_that_gives_nan_fails_its_request_and_no_other():
    """One prompt's embedding is NaN; the others in the same batch go on."""
    model = model_of()
    with torch.no_grad():
        model.embedding.weight[200] = torch.nan
        model.head.weight = torch.nn.Parameter(model.embedding.weight.nan_to_num())
    engine = Engine(model, TOKENIZER, slots=3)
    good, bad, other = (engine.submit([START, token], GREEDY) for token in (70, 200, 80))
    while engine.step():
        pass
    assert "the model's output is not finite" in str(bad.error) and bad.drawn == []
    assert [good.drawn, other.drawn] == [ids(model, [START, token], GREEDY) for token in (70, 80)]
    run = run_of(model)
    with pytest.raises(ValueError, match="not finite"):
        run.generate("\u00c3", GREEDY)                  # whose first byte is token 200
    assert run.generate("a", GREEDY)


def test_memory_is_bounded_before_anything_is_decoded():
    model = model_of()
    size = KVCache.slot_bytes(model.config, 24, torch.float32)
    assert size == 2 * 2 * 25 * 24 * 4
    cache = Engine(model, TOKENIZER, slots=3).cache
    assert 3 * size == cache.keys.nbytes + cache.values.nbytes
    assert Engine(model, TOKENIZER).slots == engine_module.MOST_SLOTS
    assert Engine(model, TOKENIZER, length=7).cache.length == 7
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(engine_module, "CACHE_BYTES", 2 * size)
        assert Engine(model, TOKENIZER).slots == 2
        monkeypatch.setattr(engine_module, "CACHE_BYTES", size // 5)
        small = Engine(model, TOKENIZER)
        assert (small.slots, small.length) == (1, 4) and finished(small, small.submit([START, *range(60, 70)], GREEDY))


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="the prompt has no token"):
        Engine(model_of(), TOKENIZER).submit([], GREEDY)


def test_a_shorter_slot_goes_past_its_end_as_the_context_does():
    model = model_of(context_length=24)
    shorter = model_of(context_length=8)                # the same weights: positions have none
    prompt = prompts(1, 30, seed=2)[0]
    assert ids(model, prompt, GREEDY, length=8) == ids(shorter, prompt, GREEDY)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("prompt", [[START, 70, 80], [START, *[60, 61, 62, 63] * 5], [START, 70, 71, 70, 71]], ids=len)
def test_guesses_change_no_greedy_text(settings, prompt):
    """Nor do they past the context, where the draft must not outgrow the slot."""
    model = model_of(**settings)
    params = SamplingParams(temperature=0.0, max_new_tokens=40)
    assert ids(model, prompt, params, lookup=4) == ids(model, prompt, params)


def test_guesses_save_steps_where_a_text_repeats_itself():
    steps = []
    for lookup in (0, 6):
        engine = Engine(WIDE, TOKENIZER, slots=1, lookup=lookup)
        engine.ends = ()
        request = engine.submit([START, *[60, 61, 62] * 8], SamplingParams(temperature=0.0, max_new_tokens=60))
        steps.append(1)
        while engine.step():
            steps[-1] += 1
        assert len(request.drawn) == 60
    assert steps[0] >= 59 and steps[1] < 55


@pytest.mark.parametrize("guess", range(4))
def test_a_guess_leaves_the_distribution_as_it_is(guess):
    logits = torch.tensor([[1.0, 0.2, -0.5, -torch.inf]])
    params, generator = SamplingParams(temperature=1.0, top_p=1.0), torch.Generator().manual_seed(0)
    drawn = torch.cat([sampling.sample(logits, None, params, [generator], (guess, None)) for _ in range(8000)])
    expected = logits.softmax(-1)[0]
    error = (drawn.bincount(minlength=4) / 8000 - expected).abs()
    assert (error <= 4 * (expected * (1 - expected) / 8000).sqrt()).all()


def test_texts_with_guesses_are_drawn_from_the_same_distribution():
    """Of three tokens whose probabilities are the same after every text, so that each place can be counted."""
    logits = {token("a"): 1.0, token("b"): 0.5, token("c"): -0.5}
    engine = Engine(constant_model(logits), TOKENIZER, slots=1, lookup=3)
    params, prompt = SamplingParams(temperature=1.0, top_p=1.0, top_k=3, max_new_tokens=2), TOKENIZER.encode("abab")
    count = 500
    requests = [engine.submit([START, *prompt], params, row) for row in range(count)]
    drawn = torch.tensor(finished(engine, *requests))                                   # (count, 2)
    expected = torch.tensor(list(logits.values())).softmax(0)
    for place in drawn.T:
        found = torch.tensor([(place == one).sum() for one in logits]) / count
        assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()
    both = ((drawn[:, 0] == token("a")) & (drawn[:, 1] == token("b"))).double().mean()  # which were guessed
    assert abs(both - expected[0] * expected[1]) <= 4 * (expected[0] * expected[1] / count) ** 0.5


@pytest.mark.parametrize("options, message", [
    (dict(lookup=-1), "lookup = -1 is no whole number"), (dict(slots=-1), "slots = -1"),
    (dict(length=2.5), "length = 2.5"),
    (dict(lookup=4, invariant=True), "neither lookup nor a draft goes with invariant")])
def test_what_an_engine_can_be(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(model_of(), TOKENIZER, **options)


def test_a_request_is_served_wherever_the_giving_of_its_slot_was_broken_off():
    """Regression: one that had its slot's number but not the slot was dropped; a slot could be given twice."""
    model = model_of()

    class Broken(dict):
        """Raises once, before or after it takes or loses an item."""

        def __init__(self, items, method, after):
            super().__init__(items)
            self.method, self.after = method, after

        def _do(self, method, *arguments):
            stops, self.method = self.method == method, None if self.method == method else self.method
            if stops and not self.after:
                raise KeyboardInterrupt
            result = getattr(dict, method)(self, *arguments)
            if stops:
                raise KeyboardInterrupt
            return result

        __setitem__ = lambda self, *arguments: self._do("__setitem__", *arguments)          # noqa: E731
        __delitem__ = lambda self, *arguments: self._do("__delitem__", *arguments)          # noqa: E731
        pop = lambda self, *arguments: self._do("pop", *arguments)                          # noqa: E731

    jobs = [([START, token], GREEDY) for token in (70, 80, 90)]
    for name, method in (("active", "__setitem__"), ("active", "__delitem__"), ("left", "pop"),
                         ("left", "__setitem__")):
        for after in (False, True):
            engine = Engine(model, TOKENIZER, slots=2)
            setattr(engine, name, Broken(getattr(engine, name), method, after))
            requests = [engine.submit(*job) for job in jobs]
            with contextlib.suppress(KeyboardInterrupt):
                finished(engine, *requests)
            assert getattr(engine, name).method is None
            assert finished(engine, *requests) == [ids(model, *job) for job in jobs]
            assert len(engine.left) == 2 and not engine.active


@pytest.mark.parametrize("token", [-1, V, "a", 1.0])
def test_what_is_no_token_is_refused_and_hurts_no_other(token):
    engine = Engine(model_of(), TOKENIZER)
    good = engine.submit([START, 70], GREEDY)
    with pytest.raises(ValueError, match="is no token; ids are whole numbers from 0 to"):
        engine.submit([START, token], GREEDY)
    assert finished(engine, good) == [ids(model_of(), [START, 70], GREEDY)]


def test_the_padding_of_a_chunk_is_no_part_of_a_text():
    """Regression: a chunk was filled up with token 0, whose numbers may be bad though the text does not hold it."""
    model = model_of()
    expected = ids(model, [START, 70], GREEDY, invariant=True)
    with torch.no_grad():
        model.embedding.weight[0] = torch.nan
        model.head.weight = torch.nn.Parameter(model.embedding.weight.nan_to_num())
    assert ids(model, [START, 70], GREEDY, invariant=True) == expected


@pytest.mark.parametrize("options", [dict(), dict(past_context="slide"), dict(invariant=True), dict(lookup=3)], ids=str)
def test_a_step_that_is_broken_off_is_made_up_for(options, monkeypatch):
    """Ctrl-C before or after calls that matter: the texts of all requests are those of an engine left in peace."""
    model = model_of(context_length=12)
    jobs = [(prompt, SamplingParams(temperature=0.0, max_new_tokens=14)) for prompt in
            (*prompts(3, 9), [START, *[60, 61] * 3], [START, *[60, 61] * 3, 70])]
    in_peace = Engine(model, TOKENIZER, slots=2, **options)
    expected = finished(in_peace, *[in_peace.submit(*job) for job in jobs])
    calls, stop_at = [0], [0]

    def broken(owner, name):
        whole = getattr(owner, name)

        def part(*arguments, **rest):
            calls[0] += 1
            if calls[0] == stop_at[0]:
                raise KeyboardInterrupt
            result = whole(*arguments, **rest)
            calls[0] += 1
            if calls[0] == stop_at[0]:
                raise KeyboardInterrupt
            return result
        monkeypatch.setattr(owner, name, part)

    broken(model, "hidden")
    for owner, name in ((sampling, "sample"), (KVCache, "move"), (Engine, "_give_slot"), (Engine, "_free"),
                        (Engine, "_make_room")):
        broken(owner, name)
    engine = Engine(model, TOKENIZER, slots=2, **options)
    assert finished(engine, *[engine.submit(*job) for job in jobs]) == expected and calls[0] > 100
    for stop_at[0] in random.Random(0).sample(range(1, calls[0] + 1), 8):
        calls[0] = 0
        engine = Engine(model, TOKENIZER, slots=2, **options)
        requests = [engine.submit(*job) for job in jobs]
        for _ in range(2):                              # the second time nothing is broken off
            with contextlib.suppress(KeyboardInterrupt):
                assert finished(engine, *requests) == expected, stop_at
        assert calls[0] > stop_at[0] and len(engine.left) == 2 and not engine.active and not engine.queue
