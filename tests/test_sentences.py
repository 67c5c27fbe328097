"""Sentences begin where a reader would say, tokens are cut there, and pairs are what they are labelled as."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt import sentences
from minigpt.sentences import LONGEST, Pairs, sentence_starts, token_starts
from minigpt.shards import Split
from minigpt.tokenizer import Tokenizer

BYTES = Tokenizer("bytes")
START = BYTES.roles.document_start


def cut(text):
    starts = sentence_starts(text)
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]


@pytest.mark.parametrize("whole", [
    ["It rained. ", "We stayed in! ", "Did we?\n", "Yes."],
    ["“Really?” ", "She left."], ["(He came.) ", "Then he went."], ["Wait... what? ", "No."],
    ["Mr. Smith and J. R. R. Tolkien met Dr. No on Jan. 5th. ", "They spoke, e.g. of Fig. 3 and the U.S. army."],
    ["It costs $3.50 at example.com. ", "Cheap."], ["A heading\n\n", "and its text\n  \n", "and more"],
    ["今天下雨。", "我们没有出门！", "“真的吗？”", "她问。\n", "是的……", "好吧"], ["GPT是模型。", "It is. ", "对。"],
    ["No stop"], [" leading. ", "Two."], ["x"], ["the king said so. ", "then a queen came."],
])
def test_sentences_of_english_and_chinese(whole):
    assert cut("".join(whole)) == whole


@pytest.mark.parametrize("text", [unit * 20_000 for unit in (".", "!", " ", "x.", "\n ", "。」")])
def test_time_is_linear(text):
    """Regression: a run of 20,000 dots took 17 seconds."""
    assert "".join(cut(text)) == text


def test_what_has_no_full_stop_is_cut_at_lines():
    lines = [f"    value_{number} = {number}\n" for number in range(100)]
    parts = cut("".join(lines))
    assert "".join(parts) == "".join(lines) and len(parts) > 4
    assert all(len(part) <= LONGEST and part.endswith("\n") for part in parts)
    assert [len(part) for part in cut("y" * 1000)] == [LONGEST, LONGEST, 200]


@given(st.text(alphabet="ab A.!?。\n\"” é日", max_size=80))
def test_sentences_are_the_whole_text(text):
    parts = cut(text)
    assert "".join(parts) == text and all(parts)


@given(st.text(alphabet="ab A.!?。\n é日", min_size=1, max_size=60), st.integers(0, 3), st.booleans())
def test_tokens_are_cut_where_sentences_begin(text, dropped, bpe):
    """Also of a text that begins within a character; spaces between two sentences may lie on either side."""
    tokenizer = BPE if bpe else BYTES
    ids = np.array(tokenizer.encode(text)[dropped:], np.int64)
    if not len(ids):
        return
    starts = token_starts(ids, tokenizer.token_bytes)
    assert starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < len(ids)
    found = b"".join(tokenizer.token_bytes[id] for id in ids).decode("utf-8", "replace")
    parts = [b"".join(tokenizer.token_bytes[id] for id in ids[a:b]).decode("utf-8", "replace").strip()
             for a, b in zip(starts, [*starts[1:], len(ids)])]
    if not bpe:
        assert [part for part in parts if part] == [part.strip() for part in cut(found) if part.strip()]


BPE = Tokenizer.train(["It rained. We stayed in. 今天下雨。 ab aa ba. A b! é? " * 9], vocab_size=310)


def split_of(documents):
    tokens = [[START, *BYTES.encode(document)] for document in documents]
    sizes = np.array([len(token) for token in BYTES.token_bytes])
    return Split([np.concatenate(tokens)], np.cumsum([0, *map(len, tokens)])[:-1],
                 sum(len(document.encode()) for document in documents), names=tuple(map(str, range(len(documents)))),
                 first_bytes=(0,) * len(documents), token_sizes=sizes)


LETTERS = "ABCDEF"
DOCUMENTS = [" ".join(f"{letter}{number:02d}x." for number in range(3 + 9 * place))
             for place, letter in enumerate(LETTERS)]
"""Sentences that say which document they are of, and which of it."""


def told(tokens):
    """(document, number) of each whole sentence in some tokens."""
    words = BYTES.decode(tokens.tolist()).split()
    return [(word[0], int(word[1:3])) for word in words if len(word) == 5]


@pytest.fixture(scope="module")
def pairs():
    return Pairs(split_of(DOCUMENTS), BYTES.token_bytes, 40, seed=3)


def test_a_pair_is_neighbours_or_of_two_documents(pairs):
    """Both stretches are of one document each and meet, the real ones, where a sentence begins."""
    random_ones, lengths, n = 0, [], 400
    for number in range(n):
        first, second, is_random = pairs.draw(number)
        assert 0 < len(first) and 0 < len(second) and len(first) + len(second) <= 40
        random_ones += is_random
        lengths.append(len(first) + len(second))
        a, b = BYTES.decode(first.tolist()), BYTES.decode(second.tolist())
        assert a.endswith("."), "it ends where a sentence does"
        assert sum(a.lstrip("0123456789x. ") in document for document in DOCUMENTS) == 1 or len(a) < 6
        if is_random:
            letters = [{letter for letter in text if letter in LETTERS} for text in (a, b)]
            assert not letters[0] & letters[1]
        else:
            assert sum(a + b in document for document in DOCUMENTS) == 1
        assert b[0] == " "
    assert abs(random_ones - n / 2) < 5 * (n / 4) ** 0.5
    assert np.mean(lengths) > 27 and min(lengths) < 20, "most fill the room, some are short"


def shapes(found):
    """What one sees of pairs without reading them."""
    ends = [(BYTES.decode(a.tolist()), BYTES.decode(b.tolist())) for a, b, _ in found]
    features = [(len(a), len(b), len(sentence_starts(a)), len(sentence_starts(b)), b[-1] == ".", a[0].isupper())
                for a, b in ends]
    return np.array(features, float), np.array([label for *_, label in found])


def test_shapes_do_not_tell_the_label():
    """Regression: a random second stretch had two sentences at least, and others one; counting them gave 66 %."""
    from sklearn.ensemble import GradientBoostingClassifier

    chance = np.random.default_rng(0)
    documents = [" ".join("".join(chance.choice(list("abcdef"), chance.integers(3, 30))).capitalize() + "."
                          for _ in range(chance.integers(3, 40))) for _ in range(60)]
    dealer = Pairs(split_of(documents), BYTES.token_bytes, 61, seed=0)
    features, labels = shapes([dealer.draw(number) for number in range(4000)])
    accuracies = []
    for columns in ([0, 1], [2, 3], [4], [5], range(6)):
        fitted = GradientBoostingClassifier(n_estimators=40).fit(features[:2000][:, columns], labels[:2000])
        accuracies.append(fitted.score(features[2000:][:, columns], labels[2000:]))
    assert max(accuracies) < 0.5 + 3.5 * 0.5 / 2000 ** 0.5, accuracies


def test_an_epoch_begins_once_at_each_sentence_but_the_first_ones(pairs):
    count = len(pairs.starts)
    assert count == sum(len(document.split()) - 1 for document in DOCUMENTS)
    for epoch in range(2):
        starts = [pairs.source(number) for number in range(epoch * count, (epoch + 1) * count)]
        assert len(set(starts)) == count
    assert [pairs._sentence(number) for number in range(count)] != [
        pairs._sentence(number) for number in range(count, 2 * count)]


def test_a_pair_is_a_function_of_seed_and_number(pairs):
    def drawn(dealer, numbers):
        return [(*map(bytes, dealer.draw(number)[:2]), dealer.draw(number)[2]) for number in numbers]

    again = Pairs(pairs.split, BYTES.token_bytes, 40, seed=3)
    assert drawn(pairs, range(300, 310)) == drawn(again, range(300, 310))
    assert drawn(again, [5, 301, 5])[0] == drawn(again, [5])[0]
    assert drawn(Pairs(pairs.split, BYTES.token_bytes, 40, seed=4), range(20)) != drawn(pairs, range(20))


def test_held_out_pairs_go_through_every_document_in_order(pairs):
    found = list(pairs.in_order())
    firsts = [told(first)[-1:] for first, _, _ in found]
    firsts = [place for places in firsts for place in places]
    assert firsts == sorted(firsts) and len(set(firsts)) == len(firsts)
    assert {letter for letter, _ in firsts} == set(LETTERS)
    total = sum(map(len, DOCUMENTS))
    assert 0.5 * total < sum(len(first) + len(second) for first, second, _ in found) < 2 * total
    assert [is_random for *_, is_random in found].count(True) not in (0, len(found))


def test_where_no_other_document_is_as_long_the_longest_is_taken():
    dealer = Pairs(split_of(["A b. " * 50, "C d. E f.", "G h. I j."]), BYTES.token_bytes, 60, seed=0)
    for number in range(100):
        first, second, is_random = dealer.draw(number)
        assert len(first) and len(second) and len(first) + len(second) <= 60


@pytest.mark.parametrize("documents", [["One. Two. Three."], ["One. Two.", "Only one"], ["One", "Two"]])
def test_one_document_is_too_few(documents):
    with pytest.raises(ValueError, match="needs two documents with two sentences each; give a folder"):
        Pairs(split_of(documents), BYTES.token_bytes, 40, 0)


def test_a_context_without_room_is_refused():
    with pytest.raises(ValueError, match="model.context_length = 4 has no room for two sentences"):
        Pairs(split_of(DOCUMENTS), BYTES.token_bytes, 1, 0)


def test_long_documents_are_looked_at_in_blocks(monkeypatch):
    """The same sentences, but for one more where a block ends."""
    whole = Pairs(split_of(DOCUMENTS), BYTES.token_bytes, 40, seed=0)
    monkeypatch.setattr(sentences, "BLOCK_TOKENS", 100)
    blocks = Pairs(split_of(DOCUMENTS), BYTES.token_bytes, 40, seed=0)
    more = set(blocks.starts) - set(whole.starts)
    assert set(whole.starts) <= set(blocks.starts) and 0 < len(more) <= sum(len(text) // 100 for text in DOCUMENTS)
