"""Tokenizers: every text comes back as it was, special tokens never come out of text, and BPE compresses well."""

import json
import random
import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from tiny import make_text

from minigpt.corpus import list_documents
from minigpt.encoders import FIRST_BYTE, MAX_ENCODE_CHARS, SPECIAL_TOKENS
from minigpt.tokenizer import MIN_VOCAB_SIZE, Tokenizer

CHINESE = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉"
NAMES = [*SPECIAL_TOKENS, "<0x41>", "<0x0A>", "<0xE2>"]
BPE = Tokenizer.train([make_text(300), "def f(x):\n    return  x\r\n" * 9,
                       "naïve café — 天地 👩‍👧 " * 9, *NAMES * 9], 600)
BOTH = pytest.mark.parametrize("tokenizer", [BPE, Tokenizer.train((), kind="bytes")], ids=lambda it: it.kind)
HARD = [
    "", " ", "  ", "\n", "\n\n\n", "\t", "\r\n\r\n", "\r", "\0", "a\0b", " a ", "\n a\n", " " * 1000,
    "a" + " " * 37 + "b\t \t",
    "\u2581", "\u2581\u2581", " \u2581 ", "a\u2581b", "\u2585", "a \u2585 b", "\ufeffa", "\ufffd",
    "\ufffe\uffff", "\U0010ffff",
    "\u00a0\u3000\u2028\u2029\x85\x0b\x0c", "\x1a\x1b\x7f", "e\u0301 = é ≠ ﬁ Å Ω ①", "ﷺ", "नमस्ते", "שלום עליכם", CHINESE,
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇪🇺 👍🏽", "\u200b\u200d\ufe0f\u202e", "\ue000\U000f0000", "".join(NAMES), *NAMES,
    "<s>the king</s>\n<mask>", "< s>", "▁<s>",
]


def check(tokenizer, text):
    """encode loses nothing, gives no special token, and its ids stand for the text's bytes in order."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(FIRST_BYTE <= id < tokenizer.vocab_size for id in ids)
    return ids


def fault(function, *arguments, **options):
    """The message of the ValueError that the call raises."""
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    return str(caught.value)


@BOTH
@settings(max_examples=300)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_lossless_for_all_of_unicode(tokenizer, text):
    check(tokenizer, text)


@BOTH
@settings(max_examples=300)
@given(parts=st.lists(st.sampled_from([*HARD, "the", " king", "of ", "café"])))
def test_lossless_for_mixtures_of_hard_texts(tokenizer, parts):
    check(tokenizer, "".join(parts))


@BOTH
@pytest.mark.parametrize("text", HARD, ids=lambda text: ascii(text)[:20])
def test_lossless_for_hard_texts(tokenizer, text):
    check(tokenizer, text)


def test_every_character_of_the_basic_plane():
    characters = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    assert [BPE.decode(ids) for ids in BPE.encode_batch(characters)] == characters
    check(BPE, "".join(characters))


@BOTH
@pytest.mark.parametrize("unit", [
    "the king said ", "天", slow("x"), slow(" "), slow("\n"), slow("👩‍👧 "), slow("a\u2581b ")], ids=ascii)
def test_a_line_of_a_megabyte(tokenizer, unit):
    check(tokenizer, unit * (1_000_000 // len(unit.encode())))


@pytest.mark.parametrize("length", [MAX_ENCODE_CHARS, MAX_ENCODE_CHARS + 1, 2 * MAX_ENCODE_CHARS + 7])
def test_texts_that_are_encoded_in_parts(length):
    """A piece border may fall anywhere: beside a newline, within a word, at U+2581, within a joined emoji."""
    chance = random.Random(length)
    words = ["king ", "of\n", "crown\u2581", "👩‍👧", "天", "<s>", " "]
    text = "".join(chance.choices(words, k=length // 2))[:length]
    assert len(text) == length
    check(BPE, text)


def test_many_lone_u2581_take_no_time():
    """Each stretch between two of them was encoded by threads of its own: 200,000 took 40 seconds instead of one."""
    text = "\u2581" * 200_000
    assert len(check(BPE, text)) == 600_000


@BOTH
def test_a_batch_equals_one_by_one(tokenizer):
    chance = random.Random(3)
    texts = [*HARD, *("".join(chance.choices(make_text(20, seed), k=200)) for seed in range(30)), "x\u2581" * 9]
    chance.shuffle(texts)
    for num_threads in (0, 1, 3):
        assert tokenizer.encode_batch(texts, num_threads) == [tokenizer.encode(text) for text in texts]
    without = [text for text in texts if "\u2581" not in text]
    assert tokenizer.encode_batch(without) == [tokenizer.encode(text) for text in without]
    assert tokenizer.encode_batch([]) == []


@BOTH
@pytest.mark.parametrize("bad", ["\ud800", "ab\udfffc", "\ude00\ud83d", "\u2581\udc80"], ids=ascii)
def test_a_lone_surrogate_is_named_with_its_place(tokenizer, bad):
    """encode raised TypeError("List elements must be str or bytes")."""
    place = next(index for index, character in enumerate(bad) if "\ud800" <= character <= "\udfff")
    says = f"lone surrogate (U+{ord(bad[place]):04X}) at position {place}"
    assert says in fault(tokenizer.encode, bad)
    assert says in fault(tokenizer.encode_batch, ["fine", bad, "fine"])
    assert says in fault(Tokenizer.train, ["fine", bad], vocab_size=300)


@BOTH
@pytest.mark.parametrize("bad", [b"bytes", 3, None, ["text"]], ids=repr)
def test_only_str_is_text(tokenizer, bad):
    assert "takes str, not" in fault(tokenizer.encode, bad)
    assert "takes str, not" in fault(tokenizer.encode_batch, ["fine", bad])
    assert "takes str, not" in fault(Tokenizer.train, [bad])


def test_a_single_text_is_no_list_of_documents():
    """Its characters were taken for documents, and a useless tokenizer was learnt in silence."""
    assert "put a single text in a list" in fault(Tokenizer.train, make_text(20), vocab_size=300)


@BOTH
def test_ids_stand_for_bytes(tokenizer):
    assert tokenizer.token_bytes[:FIRST_BYTE] == [b""] * FIRST_BYTE
    assert tokenizer.token_bytes[FIRST_BYTE:FIRST_BYTE + 256] == [bytes([value]) for value in range(256)]
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert tokenizer.is_special.tolist() == [id < FIRST_BYTE for id in range(tokenizer.vocab_size)]
    never = [SPECIAL_TOKENS[name] for name in ("<unk>", "<pad>", "<mask>")]
    assert tokenizer.never_sampled.nonzero()[0].tolist() == never and tokenizer.roles.end_tokens == (1, 2)
    assert tokenizer.special_tokens == SPECIAL_TOKENS and tokenizer.roles.document_start == SPECIAL_TOKENS["<s>"]
    assert tokenizer.decode([*SPECIAL_TOKENS.values()]) == ""
    assert tokenizer.decode(iter([FIRST_BYTE + 72, 1, FIRST_BYTE + 105])) == "Hi"


@BOTH
def test_bytes_that_are_no_text_decode_to_the_replacement_character(tokenizer):
    broken = [FIRST_BYTE + byte for byte in "é".encode()[:1] + b"a" + "天".encode()[:2]]
    assert tokenizer.decode(broken) == "\ufffda\ufffd"
    assert tokenizer.decode_bytes(broken) == "é".encode()[:1] + b"a" + "天".encode()[:2]


@BOTH
def test_ids_out_of_range(tokenizer):
    """Negative ids were taken from the vocabulary's end."""
    for bad in (-1, tokenizer.vocab_size, -tokenizer.vocab_size, 10**9):
        for function in (tokenizer.decode, tokenizer.decode_bytes):
            assert f"range of 0 to {tokenizer.vocab_size - 1}" in fault(function, [FIRST_BYTE, bad])
    assert tokenizer.decode([]) == "" and tokenizer.decode([tokenizer.vocab_size - 1])


@pytest.mark.parametrize("vocab_size", [-1, 0, 5, 261, MIN_VOCAB_SIZE - 1])
def test_a_vocabulary_that_is_too_small(vocab_size):
    says = f"vocab_size = {vocab_size} is too small; the least is {MIN_VOCAB_SIZE}"
    assert says in fault(Tokenizer.train, ["some text"], vocab_size=vocab_size)


@pytest.mark.parametrize("seed", range(12))
def test_both_ends_of_the_stated_range_work(seed):
    chance = random.Random(seed)
    blocks = [(0x20, 0x7F), (0x4E00, 0x4F00), (0x1F600, 0x1F640), (0x2580, 0x2590)]
    alphabet = [chr(chance.randrange(*chance.choice(blocks))) for _ in range(chance.choice([1, 3, 60, 400]))]
    text = "".join(chance.choice(alphabet) + " " * (chance.random() < 0.2) for _ in range(chance.choice([2, 40, 900])))
    text += "a"
    message = fault(Tokenizer.train, [text], vocab_size=100_000)
    low, high = map(int, re.search(r"possible are (\d+) to (\d+)", message).groups())
    assert "vocab_size = 100000 is too large" in message and low == MIN_VOCAB_SIZE <= high
    for vocab_size in {low, (low + high) // 2, high}:
        tokenizer = Tokenizer.train([text], vocab_size=vocab_size)
        assert tokenizer.vocab_size == vocab_size
        check(tokenizer, text)
    assert f"possible are {low} to {high}" in fault(Tokenizer.train, [text], vocab_size=high + 1)


@pytest.mark.parametrize("documents", [[], [""], ["", "\0\t", "\u2581\u2585"]])
def test_no_text_to_learn_from(documents):
    assert "no characters to learn a tokenizer from" in fault(Tokenizer.train, documents, vocab_size=300)


def test_an_unknown_kind():
    assert "'words' is none of: bpe, bytes" in fault(Tokenizer.train, ["text"], kind="words")
    assert "3 is none of: bpe, bytes" in fault(Tokenizer, 3)


@pytest.mark.parametrize("text", [CHINESE * 9, CHINESE * 400 + " ", "x" * 50, "a\n" * 9], ids=lambda it: ascii(it[:3]))
@pytest.mark.parametrize("vocab_size", [MIN_VOCAB_SIZE, MIN_VOCAB_SIZE + 1, MIN_VOCAB_SIZE + 40])
def test_texts_with_few_spaces_or_none_keep_them(text, vocab_size):
    """Without an id of its own a space came back as U+2581."""
    tokenizer = Tokenizer.train([text], vocab_size=min(vocab_size, MIN_VOCAB_SIZE + len(set(text) - {" "})))
    for other in (" ", "a b  c", CHINESE[:3] + " " + CHINESE[3:6]):
        check(tokenizer, other)


def test_chinese_with_a_small_vocabulary():
    """One id a character would leave no room for merges, and three times the ids that fit."""
    chance = random.Random(0)
    common = [chr(0x4E00 + 7 * index) for index in range(3000)]
    text = "".join(chance.choice(common[:int(3000 ** chance.random())]) for _ in range(20_000))
    tokenizer = Tokenizer.train([text], vocab_size=700)
    assert tokenizer.vocab_size == 700
    assert len(check(tokenizer, text)) < 0.6 * len(text.encode())
    check(tokenizer, CHINESE)


@pytest.mark.parametrize("reserved", ["\0", "\t", "\u2581", "\u2585"], ids=ascii)
def test_documents_with_reserved_characters_are_learnt_from(reserved):
    """SentencePiece's trainer drops a whole document for one NUL or U+2585."""
    line = f"zebra{reserved}giraffe {reserved}elephant "
    tokenizer = Tokenizer.train([line * 50, *["the king said " * 10]], vocab_size=300)
    for word in ("zebra", "giraffe", "elephant"):
        assert len(tokenizer.encode(word)) < len(word) / 2
    check(tokenizer, line)


def test_a_long_line_is_learnt_from():
    """SentencePiece's default drops every line of more than 4192 bytes."""
    tokenizer = Tokenizer.train(["hippopotamus " * 2000, "the king\n" * 5], vocab_size=290)
    assert len(tokenizer.encode("hippopotamus")) <= 2


def test_special_names_in_the_training_text_stay_text():
    texts = [f"{name}the{name} king {name}" * 30 for name in NAMES]
    tokenizer = Tokenizer.train(texts, vocab_size=278)
    for text in [*NAMES, *texts]:
        check(tokenizer, text)


def test_training_is_deterministic():
    documents = [make_text(60, seed) + CHINESE for seed in range(5)]
    first, second = (Tokenizer.train(iter(documents), vocab_size=500) for _ in range(2))
    assert first.fingerprint == second.fingerprint and first.token_bytes == second.token_bytes
    assert Tokenizer.train(documents, vocab_size=501).fingerprint != first.fingerprint
    assert Tokenizer.train(documents[1:], vocab_size=500).fingerprint != first.fingerprint


@BOTH
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "place")
    loaded = Tokenizer.load(str(tmp_path / "new" / "place"))
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.token_bytes == tokenizer.token_bytes
    assert (loaded.kind, loaded.vocab_size) == (tokenizer.kind, tokenizer.vocab_size)
    text = make_text(9, seed=4) + "".join(HARD)
    assert loaded.encode(text) == tokenizer.encode(text)


def test_kinds_have_fingerprints_of_their_own():
    assert BPE.fingerprint != Tokenizer.train((), kind="bytes").fingerprint


@pytest.mark.parametrize("name", ["settings.json", "tokenizer.model"])
def test_missing_files(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=re.escape(f"no tokenizer in {tmp_path / 'none'}")):
        Tokenizer.load(tmp_path / "none")
    BPE.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path))}: {name} is missing"):
        Tokenizer.load(tmp_path)


def damaged(content, how):
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 1
    return {"empty": b"", "cut": content[:len(content) // 2], "flipped": bytes(flipped), "other": b"\xff\0[]"}[how]


@pytest.mark.parametrize("how", ["empty", "cut", "flipped", "other"])
def test_a_damaged_model(tmp_path, how, capfd):
    BPE.save(tmp_path)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damaged(path.read_bytes(), how))
    assert str(tmp_path) in fault(Tokenizer.load, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"kind": "bpe"}', '{"kind": 3}', '{"kind": ["bpe"]}',
                                     '{"kind": "words", "fingerprint": ""}', '{"kind": "bytes", "fingerprint": ""}',
                                     '{"kind": "bpe", "fingerprint": "0"}', "\udcff"], ids=ascii)
def test_damaged_settings(tmp_path, content):
    BPE.save(tmp_path)
    (tmp_path / "settings.json").write_text(content, "utf-8", errors="surrogateescape")
    assert str(tmp_path) in fault(Tokenizer.load, tmp_path)


def test_settings_of_another_tokenizer(tmp_path):
    BPE.save(tmp_path)
    other = json.loads((tmp_path / "settings.json").read_text("utf-8")) | {"fingerprint": "0" * 64}
    (tmp_path / "settings.json").write_text(json.dumps(other), "utf-8")
    assert "not the one that settings.json names" in fault(Tokenizer.load, tmp_path)


def library_texts(step):
    """Every `step`-th file of the standard library's sources."""
    return [document.path.read_text("utf-8") for document in list_documents("stdlib")[::step]]


def bytes_per_token(texts, encoded):
    return sum(len(text.encode()) for text in texts) / sum(map(len, encoded))


def test_compression_of_the_quickstart_corpus():
    """3.49 bytes per token is what Hugging Face's byte-level BPE reaches; a quarter of the files shows it."""
    texts = library_texts(4)
    tokenizer = Tokenizer.train(texts, vocab_size=4096)
    assert bytes_per_token(texts, tokenizer.encode_batch(texts)) > 3.49


def test_compression_is_that_of_hugging_faces_byte_level_bpe_or_better():
    texts = library_texts(16)
    ours = Tokenizer.train(texts, vocab_size=1500)
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(texts, vocab_size=1500, show_progress=False)
    assert theirs.get_vocab_size() == 1500
    encoded = [encoding.ids for encoding in theirs.encode_batch(texts)]
    assert bytes_per_token(texts, ours.encode_batch(texts)) >= bytes_per_token(texts, encoded)
