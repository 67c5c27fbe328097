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
    ["No stop"], [" leading. ", "Two."], ["x"],
])
def test_sentences_of_english_and_chinese(whole):
    assert cut("".join(whole)) == whole


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
    random_ones, lengths, n, seen = 0, [], 400, 0
    for number in range(n):
        first, second, is_random = pairs.draw(number)
        assert 0 < len(first) and 0 < len(second) and len(first) + len(second) <= 40
        random_ones += is_random
        lengths.append(len(first) + len(second))
        a, b = told(first), told(second)
        if not a or not b:                              # of a short pair all sentences may be cut
            continue
        seen += 1
        assert len({letter for letter, _ in a}) == len({letter for letter, _ in b}) == 1
        for stretch in (a, b):
            assert [place for _, place in stretch] == list(range(stretch[0][1], stretch[0][1] + len(stretch)))
        if is_random:
            assert a[0][0] != b[0][0]
        else:
            assert b[0] == (a[-1][0], a[-1][1] + 1)
    assert seen > 0.95 * n
    assert abs(random_ones - n / 2) < 5 * (n / 4) ** 0.5
    assert np.mean(lengths) > 27 and min(lengths) < 20, "most fill the room, some are short"


def test_an_epoch_begins_once_at_each_sentence_but_the_last_ones(pairs):
    count = len(pairs.beginnings)
    assert count == sum(len(document.split()) - 1 for document in DOCUMENTS)
    for epoch in range(2):
        starts = [pairs.source(number) for number in range(epoch * count, (epoch + 1) * count)]
        assert len(set(starts)) == count
    assert [pairs._beginning(number) for number in range(count)] != [
        pairs._beginning(number) for number in range(count, 2 * count)]


def test_a_pair_is_a_function_of_seed_and_number(pairs):
    def drawn(dealer, numbers):
        return [(*map(bytes, dealer.draw(number)[:2]), dealer.draw(number)[2]) for number in numbers]

    again = Pairs(pairs.split, BYTES.token_bytes, 40, seed=3)
    assert drawn(pairs, range(300, 310)) == drawn(again, range(300, 310))
    assert drawn(again, [5, 301, 5])[0] == drawn(again, [5])[0]
    assert drawn(Pairs(pairs.split, BYTES.token_bytes, 40, seed=4), range(20)) != drawn(pairs, range(20))


def test_held_out_pairs_have_each_sentence_once_in_order(pairs):
    firsts, seen = [], []
    for first, second, is_random in pairs.in_order():
        firsts += told(first)[:1]
        seen += told(first) + (told(second) if not is_random else [])
    assert firsts == sorted(firsts) and len(seen) == len(set(seen))
    assert len({letter for letter, _ in firsts}) == len(LETTERS)
    assert [bool(is_random) for *_, is_random in pairs.in_order()].count(True) not in (0, len(firsts))


@pytest.mark.parametrize("sizes", [(3, 50, 40, 3, 37), (50, 3, 40, 37, 3), (50, 50, 40, 20, 20), (9, 9, 40, 9, 9)])
def test_of_what_is_too_long_the_middle_stays(sizes):
    """The first of a pair keeps its end and the second its beginning, each half where both are long."""
    one, two, length, *kept = sizes
    documents = ["a" * (one - 1) + ". " + "B" * (two - 2) + ".", "Other one. Here it is."]
    dealer = Pairs(split_of(documents), BYTES.token_bytes, length, seed=0)
    for number in range(200):
        first, second, is_random = dealer._pair(0, number, True)
        if not is_random and len(first) + len(second) == sum(kept):
            break
    else:
        raise AssertionError("no pair of neighbours in 200")
    assert abs(len(first) - kept[0]) <= 1 and abs(len(second) - kept[1]) <= 1
    assert BYTES.decode(first.tolist()).strip().endswith(".") and BYTES.decode(second.tolist()).strip().startswith("B")


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
    assert (blocks.starts[1:] <= blocks.ends[:-1] + 1).all() and (blocks.ends > blocks.starts).all()
