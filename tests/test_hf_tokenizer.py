"""Tokenizers of others: the same ids as their own libraries give, and ours as transformers reads them."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from test_tokenizer import CHINESE, HARD, fault
from tiny import make_text
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minigpt import hf_tokenizer
from minigpt.tokenizer import Roles, Tokenizer

TEXTS = [make_text(200), "def f(x):\n    return  x\r\n" * 9, "naïve café — 天地 👩‍👧 " * 9, CHINESE,
         "<|endoftext|> <s>" * 9]
CONFIG = {"bos_token_id": None, "eos_token_id": None}
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)))


def byte_level(vocab_size=500):
    """GPT-2's kind, as the tokenizers library trains it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return made


def llama_3():
    """Byte-level with its own way to split, merges passed over for whole words, and <s> before each text."""
    made = byte_level()
    pattern = tokenizers.Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    made.add_tokens(["<tool_call>"])
    begin = made.token_to_id("<|begin_of_text|>")
    made.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)])
    return made


def word_piece():
    made = tokenizers.BertWordPieceTokenizer(lowercase=True)
    made.train_from_iterator(TEXTS, vocab_size=400, show_progress=False)
    made = made._tokenizer
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[
        (name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")])
    return made


def sentencepiece_model(**options):
    """As Llama 2 has it: <unk>, <s>, </s>, bytes, a space in front."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(TEXTS).splitlines()), model_writer=model, minloglevel=2, **dict(
            model_type="bpe", vocab_size=420, hard_vocab_limit=False, byte_fallback=True, character_coverage=0.99,
            normalization_rule_name="identity", remove_extra_whitespaces=False) | options)
    return model.getvalue()


def saved(folder, model, name="tokenizer.json", **said):
    (folder / name).write_bytes(model if isinstance(model, bytes) else model.to_str().encode())
    (folder / "tokenizer_config.json").write_text(json.dumps(said), "utf-8")
    return folder


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """{kind: (the Tokenizer that is read, their encode)}"""
    made = {}
    for name, theirs, said in (("byte level", byte_level(), dict(eos_token="<|endoftext|>")),
                               ("llama 3", llama_3(), dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")),
                               ("word piece", word_piece(), dict(cls_token="[CLS]", sep_token="[SEP]",
                                                                 mask_token="[MASK]", pad_token="[PAD]"))):
        theirs.encode_special_tokens = True
        folder = saved(tmp_path_factory.mktemp("tokenizer"), theirs, **said)
        made[name] = (hf_tokenizer.read(folder, CONFIG),
                      lambda text, theirs=theirs: theirs.encode(text, add_special_tokens=False).ids)
    folder = saved(tmp_path_factory.mktemp("tokenizer"), sentencepiece_model(), "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    made["llama 2"] = hf_tokenizer.read(folder, CONFIG), processor.encode
    return made


EVERY_KIND = pytest.mark.parametrize("kind", ["byte level", "llama 3", "llama 2", "word piece"])
LOSSLESS = pytest.mark.parametrize("kind", ["byte level", "llama 3", "llama 2"])


@EVERY_KIND
def test_ids_of_hard_texts_are_theirs(kind, kinds):
    tokenizer, encode = kinds[kind]
    texts = [*HARD, "<|endoftext|>", "<|begin_of_text|>a<|eot_id|>", "[CLS] a [MASK]", "<tool_call>x</tool_call>",
             "if __name__ == '__main__':\n\tmain()  # 1234567"]
    assert tokenizer.encode_batch(texts) == [encode(text) for text in texts]
    assert not any(tokenizer.is_special[ids].any() for ids in tokenizer.encode_batch(texts) if ids
                   if kind != "word piece"), "text gives no special token"


@EVERY_KIND
@settings(max_examples=200)
@given(text=ANY_TEXT)
def test_ids_of_any_text_are_theirs(kind, kinds, text):
    tokenizer, encode = kinds[kind]
    assert tokenizer.encode(text) == encode(text)


@LOSSLESS
@settings(max_examples=200)
@given(text=ANY_TEXT)
def test_texts_come_back(kind, kinds, text):
    tokenizer, _ = kinds[kind]
    text = text.replace("\u2581", "_")                  # which SentencePiece takes for a space
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if kind != "llama 2":
        assert tokenizer.decode_bytes(ids) == text.encode()


def test_words_come_back_of_word_piece(kinds):
    tokenizer, _ = kinds["word piece"]
    assert tokenizer.decode(tokenizer.encode("the King shall return")) == "the king shall return"


def test_roles(kinds):
    id_of = {kind: tokenizer.special_tokens for kind, (tokenizer, _) in kinds.items()}
    end = id_of["byte level"]["<|endoftext|>"]
    assert kinds["byte level"][0].roles == Roles(end, (end,), end, None, ())
    begin, eot = id_of["llama 3"]["<|begin_of_text|>"], id_of["llama 3"]["<|eot_id|>"]
    assert kinds["llama 3"][0].roles == Roles(begin, (eot,), eot, None, (begin,))
    assert kinds["llama 2"][0].roles == Roles(1, (2,), 2, None, (1,))
    bert = id_of["word piece"]
    assert kinds["word piece"][0].roles == Roles(bert["[CLS]"], (bert["[SEP]"],), bert["[PAD]"], bert["[MASK]"],
                                                 (bert["[CLS]"],))
    assert kinds["llama 3"][0].never_sampled.nonzero()[0].tolist() == [end, begin]


@pytest.mark.parametrize("said, config, generation, roles", [
    ({}, dict(eos_token_id=0), {}, Roles(0, (0,), 0, None, ())),
    (dict(eos_token={"content": "<a>"}), dict(eos_token_id=500), {}, Roles(500, (500,), 500, None, ())),
    (dict(bos_token="<b>"), dict(bos_token_id=0), dict(eos_token_id=[0, 500]), Roles(501, (0, 500), 0, None, ())),
    (dict(bos_token=None, pad_token="<b>"), dict(bos_token_id=0, eos_token_id=9000), {}, Roles(0, (0,), 501, None, ())),
])
def test_roles_by_name_and_by_number(said, config, generation, roles, tmp_path):
    """A number counts where it is a special token: GPT-2's config has 50256 whatever the vocabulary."""
    theirs = byte_level()
    theirs.add_special_tokens(["<a>", "<b>"])
    saved(tmp_path, theirs, **said)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    assert hf_tokenizer.read(tmp_path, config).roles == roles


def test_vocabulary_and_merges_are_a_tokenizer(tmp_path):
    theirs = byte_level()
    theirs.model.save(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    tokenizer = hf_tokenizer.read(tmp_path, CONFIG)
    theirs.encode_special_tokens = True
    for text in [*HARD, *TEXTS]:
        assert tokenizer.encode(text) == theirs.encode(text).ids
    assert tokenizer.roles.document_start == theirs.token_to_id("<|endoftext|>")


def test_a_list_of_words_is_a_tokenizer(tmp_path):
    theirs = word_piece()
    theirs.model.save(str(tmp_path))
    tokenizer = hf_tokenizer.read(tmp_path, CONFIG)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert tokenizer.roles.mask == theirs.token_to_id("[MASK]")


@EVERY_KIND
def test_saved_and_loaded(kind, kinds, tmp_path):
    tokenizer, _ = kinds[kind]
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.roles == tokenizer.roles and again.fingerprint == tokenizer.fingerprint
    assert again.theirs == tokenizer.theirs and again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    settings_file = tmp_path / "settings.json"
    whole = json.loads(settings_file.read_text("utf-8"))
    for roles in ({"document_start": 10**6}, {"document_start": "a"}, {"other": 1}, [], {"end_tokens": 3}):
        settings_file.write_text(json.dumps(whole | {"roles": roles}), "utf-8")
        assert "the tokenizer" in fault(Tokenizer.load, tmp_path)


@EVERY_KIND
def test_transformers_reads_what_is_written(kind, kinds, tmp_path):
    from transformers import AutoTokenizer

    tokenizer, _ = kinds[kind]
    hf_tokenizer.write(tmp_path, tokenizer, 77)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 77
    for text in [*HARD, *TEXTS]:
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == tokenizer.encode(text)
    assert theirs("the king").input_ids[:len(tokenizer.roles.prompt_start)] == list(tokenizer.roles.prompt_start)
    if kind == "word piece":
        return
    assert theirs.eos_token_id == tokenizer.roles.end_tokens[0]
    again = hf_tokenizer.read(tmp_path, hf_tokenizer.ids_of(tokenizer))
    assert again.roles == tokenizer.roles and again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


OURS = {"bpe": lambda: Tokenizer.train(TEXTS, 600), "bytes": lambda: Tokenizer.train((), kind="bytes")}


@pytest.fixture(scope="module", params=OURS)
def ours_and_theirs(request, tmp_path_factory):
    """A tokenizer of ours, and what transformers reads of what is written of it."""
    from transformers import AutoTokenizer

    ours, folder = OURS[request.param](), tmp_path_factory.mktemp("ours")
    hf_tokenizer.write(folder, ours, 77)
    return ours, AutoTokenizer.from_pretrained(folder)


@settings(max_examples=300)
@given(text=ANY_TEXT)
def test_transformers_gives_the_ids_of_ours(ours_and_theirs, text):
    """But for SentencePiece's own character of a space."""
    ours, theirs = ours_and_theirs
    text = text.replace("\u2581", "_")
    ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("size", [2000, slow(200_000)])
def test_transformers_gives_the_ids_of_a_long_text(ours_and_theirs, size):
    ours, theirs = ours_and_theirs
    text = "".join(TEXTS)[:size]
    assert theirs.encode(text, split_special_tokens=True) == [ours.roles.document_start, *ours.encode(text)]
    names = [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id, theirs.unk_token_id]
    assert names == [1, 1, 3, 4, 0]


def test_a_chat_template_is_kept(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    saved(tmp_path / "in", byte_level(), eos_token="<|endoftext|>")
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    hf_tokenizer.write(tmp_path / "out", hf_tokenizer.read(tmp_path / "in", CONFIG), 77)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"


def test_no_tokenizer(tmp_path):
    assert hf_tokenizer.read(tmp_path, CONFIG) is None


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.json", b"{", "tokenizer.json: the tokenizers library cannot read it"),
    ("tokenizer.json", b"", "tokenizer.json: the tokenizers library cannot read it"),
    ("tokenizer.json", byte_level().to_str().encode(), "no token is named that begins or ends a text"),
    ("tokenizer.model", b"", "tokenizer.model: "),
    ("tokenizer.model", sentencepiece_model()[:500], "tokenizer.model: "),
    ("tokenizer.model", sentencepiece_model(normalization_rule_name="nmt_nfkc"), "changes the text (its normalizer)"),
    ("tokenizer.model", sentencepiece_model(model_type="unigram", vocab_size=400), "no byte-pair encoding"),
    ("vocab.json", b'{"a": 0}', "merges.txt is missing beside it"),
    ("tokenizer.model", sentencepiece_model(user_defined_symbols=["<sep>"]), "symbols that its user defined"),
    ("vocab.txt", b"a\nb\n", "vocab.txt: the token [PAD] is missing"),
    ("tokenizer.json", byte_level().to_str().replace('"!":1,', '"!":1000000000,').encode(), "has the id 1000000000"),
])
def test_what_cannot_be_read(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    found = fault(hf_tokenizer.read, tmp_path, CONFIG)
    assert message in found and str(tmp_path / name) in found and "\n" not in found


def test_vocabularies_of_unknown_kinds(tmp_path):
    byte_level().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}', "utf-8")
    assert "how a Qwen2Tokenizer splits a text is not known" in fault(hf_tokenizer.read, tmp_path, CONFIG)
    (tmp_path / "tokenizer_config.json").write_text("[]", "utf-8")
    assert "tokenizer_config.json: not a JSON object" in fault(hf_tokenizer.read, tmp_path, CONFIG)


@pytest.mark.parametrize("vocabulary", ["vocab.json", "vocab.txt"])
@pytest.mark.parametrize("told", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_that_are_added_to_a_vocabulary(vocabulary, told, tmp_path):
    """Regression: they were dropped, and with them the padding."""
    theirs = byte_level() if vocabulary == "vocab.json" else word_piece()
    theirs.model.save(str(tmp_path))
    size = theirs.get_vocab_size()
    said = {"pad_token": "<|pad|>", "unk_token": "[UNK]" if vocabulary == "vocab.txt" else None}
    if told == "added_tokens.json":
        (tmp_path / told).write_text(json.dumps({"<tool>": size, "<|pad|>": size + 1}), "utf-8")
    else:
        said["added_tokens_decoder"] = {str(size): {"content": "<tool>", "special": False},
                                        str(size + 1): {"content": "<|pad|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said), "utf-8")
    tokenizer = hf_tokenizer.read(tmp_path, CONFIG)
    theirs.add_tokens(["<tool>"])
    theirs.add_special_tokens(["<|pad|>"])
    assert tokenizer.encode("a <tool> b") == theirs.encode("a <tool> b", add_special_tokens=False).ids
    assert size in tokenizer.encode("a <tool> b") and tokenizer.roles.padding == size + 1
    assert tokenizer.vocab_size == size + 2 and size + 1 not in tokenizer.encode("<|pad|>")


def test_padding_that_is_another_token_is_not_written(kinds):
    """Regression: transformers learns nothing of its padding token, which was the end token of such a model."""
    assert hf_tokenizer.ids_of(kinds["llama 2"][0])["pad_token_id"] is None
    tokenizer = kinds["word piece"][0]
    assert hf_tokenizer.ids_of(tokenizer)["pad_token_id"] == tokenizer.special_tokens["[PAD]"]


def test_ids_of_a_sentencepiece_model_are_its_own(tmp_path):
    saved(tmp_path, sentencepiece_model(unk_id=3, bos_id=0, eos_id=1, pad_id=2), "tokenizer.model")
    assert hf_tokenizer.read(tmp_path, CONFIG).roles == Roles(0, (1,), 2, None, (0,))


def test_an_end_of_word_suffix_is_a_space(tmp_path):
    """Regression: it was shown as </w>."""
    theirs = tokenizers.CharBPETokenizer()
    theirs.train_from_iterator(TEXTS, vocab_size=300, show_progress=False, special_tokens=["<unk>", "<s>"])
    saved(tmp_path, theirs._tokenizer, bos_token="<s>")
    tokenizer = hf_tokenizer.read(tmp_path, CONFIG)
    ids = tokenizer.encode("the king shall")
    assert tokenizer.decode(ids) == "the king shall" and tokenizer.decode_bytes(ids) == b"the king shall "


def test_a_tokenizer_without_common_letters(tmp_path):
    theirs = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "天": 1, "<s>": 2}, unk_token="[UNK]"))
    theirs.add_special_tokens(["<s>"])
    theirs.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    assert hf_tokenizer.read(saved(tmp_path, theirs, bos_token="<s>"), CONFIG).roles.prompt_start == (2,)


def test_a_text_that_the_library_cannot_encode(tmp_path):
    """Regression: it raises Exception itself, which ended in a traceback."""
    theirs = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="[UNK]"))
    theirs.add_special_tokens(["<s>"])
    tokenizer = hf_tokenizer.read(saved(tmp_path, theirs, bos_token="<s>"), CONFIG)
    assert tokenizer.encode("a") == [0]
    assert "the tokenizer cannot encode the text" in fault(tokenizer.encode, "b")


@pytest.mark.parametrize("file, content, message", [
    ("chat_template.jinja", b"\xff", "chat_template.jinja: byte 0 is not UTF-8"),
    ("merges.txt", b"a\xff", "merges.txt: byte 1 is not UTF-8"),
    ("merges.txt", b"#version\nq z\n", "'q z' in merges.txt is no merge of two of its tokens to a third"),
    ("tokenizer_config.json", b'{"eos_token": 5}', "tokenizer_config.json: eos_token = 5 is no token's text"),
    ("tokenizer_config.json", b"[]", "tokenizer_config.json: not a JSON object"),
])
def test_files_beside_a_vocabulary_that_cannot_be_read(file, content, message, tmp_path):
    byte_level().model.save(str(tmp_path))
    (tmp_path / file).write_bytes(content)
    assert message in fault(hf_tokenizer.read, tmp_path, CONFIG)


def test_no_class_is_no_fault(tmp_path):
    byte_level().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": null}', "utf-8")
    assert hf_tokenizer.read(tmp_path, CONFIG).vocab_size == 500


@pytest.mark.parametrize("said", [False, True])
def test_tokens_added_to_sentencepiece(said, tmp_path):
    saved(tmp_path, sentencepiece_model(), "tokenizer.model",
          **{"added_tokens_decoder": {"420": {"content": "<pad>"}}} if said else {})
    if not said:
        (tmp_path / "added_tokens.json").write_text('{"<pad>": 420}', "utf-8")
    assert "tokenizer.model: '<pad>' is added to it by another file" in fault(hf_tokenizer.read, tmp_path, CONFIG)
