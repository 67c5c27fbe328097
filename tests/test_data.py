"""Data: shards hold the raw text and nothing else, damage is found and mended, and every row is where it should be."""

import json
import os
import random
import re
import threading

import numpy as np
import pytest
from tiny import make_text

from minigpt import data, shards
from minigpt.config import DataConfig, TokenizerConfig
from minigpt.corpus import open_corpus
from minigpt.data import Dealer, in_order, prepare
from minigpt.files import read_sealed, sha256_of, write_sealed
from minigpt.shards import Split
from minigpt.tokenizer import SPECIAL_TOKENS, Roles, Tokenizer

START = SPECIAL_TOKENS["<s>"]
BYTES = TokenizerConfig(kind="bytes")
BPE = TokenizerConfig(vocab_size=300)


@pytest.fixture
def folder(tmp_path):
    """Thirty files of 200 to 2000 bytes."""
    chance = random.Random(0)
    (tmp_path / "text").mkdir()
    for number in range(30):
        text = make_text(40, seed=number)[:chance.randrange(200, 2000)] + "天\t\u2581\r\n" * (number % 3)
        (tmp_path / "text" / f"{number}.txt").write_text(text, "utf-8", newline="")
    return tmp_path / "text"


@pytest.fixture
def make(tmp_path):
    """make(path, tokenizer, **data) prepares with a cache of the test's own; make.lines is what it said this time."""
    def make(path, tokenizer=BYTES, **options):
        make.lines = []
        return prepare(DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **options), tokenizer,
                       make.lines.append)
    return make


def documents_of(split):
    """The tokens of each document."""
    return np.split(split.read(0, len(split)), split.documents[1:])


def split_of(num_tokens, num_documents=1, seed=0, shards=1):
    """A Split whose token at position n is n + 10, but <s> where documents start."""
    tokens = np.arange(num_tokens) + 10
    starts = np.array(sorted({0, *random.Random(seed).sample(range(1, num_tokens), num_documents - 1)}))
    return Split(np.array_split(tokens, shards), starts, num_tokens)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_shards_hold_the_raw_text_of_every_document(folder, make, tokenizer):
    dataset = make(folder, tokenizer)
    corpus = open_corpus(str(folder))
    assert len(dataset.train.documents) == len(corpus.train) and len(dataset.val.documents) == len(corpus.val)
    for split, documents in ((dataset.train, corpus.train), (dataset.val, corpus.val)):
        raw = [document.path.read_bytes() for document in documents]
        tokens = documents_of(split)
        assert [ids[0] for ids in tokens] == [START] * len(raw)
        assert all((ids[1:] >= 5).all() for ids in tokens)
        assert [dataset.tokenizer.decode_bytes(ids) for ids in tokens] == raw
        assert split.num_bytes == sum(map(len, raw))


def test_a_document_of_many_pieces_has_one_start(tmp_path, make, monkeypatch):
    monkeypatch.setattr("minigpt.corpus.PIECE_BYTES", 100)
    monkeypatch.setattr(shards, "ENCODE_BYTES", 350)
    (tmp_path / "a.txt").write_text(make_text(200), "utf-8")
    dataset = make(tmp_path / "a.txt", BPE)
    tokens = dataset.train.read(0, len(dataset.train))
    assert (tokens == START).sum() == 1 and tokens[0] == START
    text = dataset.tokenizer.decode(tokens) + dataset.tokenizer.decode(dataset.val.read(0, len(dataset.val)))
    assert text == make_text(200)


def test_the_index(folder, make):
    dataset = make(folder)
    index = json.loads((dataset.directory / "index.json").read_text())
    assert (index["dtype"], index["byte_order"]) == ("uint16", "little")
    assert (index["tokenizer"], index["vocab_size"]) == (dataset.tokenizer.fingerprint, 261)
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        entry = index["splits"][name]
        assert (entry["tokens"], entry["bytes"]) == (len(split), split.num_bytes)
        assert entry["documents"] == split.documents.tolist()
        [shard] = entry["shards"]
        assert shard["tokens"] == len(split) and shard["sha256"] == sha256_of(dataset.directory / shard["file"])
        stored = np.fromfile(dataset.directory / shard["file"], "<u2")
        assert (stored == split.read(0, len(split))).all()


class WideTokenizer:
    """Bytes as the last 256 ids."""

    fingerprint, token_bytes, roles = "wide", [], Roles(document_start=START)

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode_batch(self, texts):
        return [[self.vocab_size - 256 + byte for byte in text.encode()] for text in texts]


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, "uint16"), (65_537, "uint32"), (70_300, "uint32")])
def test_large_vocabularies_take_32_bits(folder, make, monkeypatch, vocab_size, dtype):
    monkeypatch.setattr(data, "_tokenizer", lambda *arguments: WideTokenizer(vocab_size))
    dataset = make(folder)
    assert json.loads((dataset.directory / "index.json").read_text())["dtype"] == dtype
    first = open_corpus(str(folder)).train[0].path.read_bytes()[:49]
    assert dataset.train.read(1, 50).tolist() == [vocab_size - 256 + byte for byte in first]


@pytest.mark.parametrize("shard_tokens", [97, 1000])
def test_many_shards_are_one_text(folder, make, monkeypatch, shard_tokens):
    monkeypatch.setattr(shards, "SHARD_TOKENS", shard_tokens)
    dataset = make(folder)
    raw = b"".join(b"\0" + document.path.read_bytes() for document in open_corpus(str(folder)).train)
    starts = set(dataset.train.documents.tolist())
    expected = [START if place in starts else byte + 5 for place, byte in enumerate(raw)]
    assert len(dataset.train) == len(expected) and len(dataset.train.shards) == -(-len(expected) // shard_tokens)
    assert all(len(shard) == shard_tokens for shard in dataset.train.shards[:-1])
    chance = random.Random(0)
    for start in [0, shard_tokens - 1, shard_tokens, *(chance.randrange(len(expected)) for _ in range(50))]:
        for stop in (start, start + 1, start + shard_tokens, start + 3 * shard_tokens + 1, len(expected)):
            assert dataset.train.read(start, stop).tolist() == expected[start:stop]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_a_second_call_makes_nothing_again(folder, make, tmp_path, tokenizer):
    first = make(folder, tokenizer)
    assert any("tokenizing" in line for line in make.lines)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/*/*")}
    second = make(folder, tokenizer)
    assert make.lines == [] and second.directory == first.directory
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/*/*")} == times


def test_the_cache_is_keyed_by_content_and_by_the_tokenizers_settings(folder, make, tmp_path):
    directories = {make(folder, tokenizer).directory for tokenizer in (BYTES, BPE, TokenizerConfig(vocab_size=301))}
    assert len(directories) == 3
    (folder / "3.txt").write_text((folder / "3.txt").read_text("utf-8").replace("king", "KING"), "utf-8")
    directories |= {make(folder, BPE).directory, make(folder, BPE, val_fraction=0.3).directory}
    assert len(directories) == 5
    folder.rename(tmp_path / "moved")
    assert make(tmp_path / "moved", BPE).directory in directories and make.lines == []


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def instead(path, make):
    path.unlink()
    make(path)


def change(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / "train-00000.bin", 1001),
    "a cut shard": lambda folder: os.truncate(folder / "val-00000.bin", 10),
    "a missing shard": lambda folder: (folder / "train-00000.bin").unlink(),
    "an empty index": lambda folder: (folder / "index.json").write_bytes(b""),
    "half an index": lambda folder: os.truncate(folder / "index.json", 200),
    "an index of nothing": lambda folder: (folder / "index.json").write_bytes(b"[]"),
    "an index that is no UTF-8": lambda folder: (folder / "index.json").write_bytes(b"\xff"),
    "a missing index": lambda folder: (folder / "index.json").unlink(),
    "a pipe for a shard": lambda folder: instead(folder / "val-00000.bin", os.mkfifo),
    "a device for a shard": lambda folder: instead(folder / "val-00000.bin", lambda path: path.symlink_to("/dev/zero")),
    "a folder for a shard": lambda folder: instead(folder / "val-00000.bin", os.mkdir),
    "a pipe for the index": lambda folder: instead(folder / "index.json", os.mkfifo),
    "a changed count of bytes": lambda folder: change(folder / "index.json", '"bytes": ', '"bytes": 1'),
    "a changed document": lambda folder: change(folder / "index.json", '"documents": [0, ', '"documents": [0, 1, '),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_said_and_mended(folder, make, damage):
    """A changed index.json, and with it wrong bits per byte, went unseen; of a missing one nothing was said."""
    first = make(folder)
    expected = [first.train.read(0, 10**6), first.val.read(0, 10**6), first.train.documents, first.train.num_bytes]
    before = (first.directory / "index.json").read_bytes()
    DAMAGE[damage](first.directory)
    again = make(folder)
    assert str(again.directory) in make.lines[0] and "making the shards again" in make.lines[0]
    got = [again.train.read(0, 10**6), again.val.read(0, 10**6), again.train.documents, again.train.num_bytes]
    assert all(np.array_equal(a, b) for a, b in zip(expected, got))
    assert (again.directory / "index.json").read_bytes() == before
    make(folder)
    assert make.lines == []


@pytest.mark.parametrize("damage", ["flip", "remove", "add"])
def test_each_byte_of_each_file_counts(tmp_path, make, monkeypatch, damage):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 700)
    (tmp_path / "a.txt").write_text(make_text(60), "utf-8")
    directory = make(tmp_path / "a.txt").directory
    whole = {path: path.read_bytes() for path in sorted(directory.iterdir())}
    assert len(whole) == 6
    chance = random.Random(damage)
    for path, content in whole.items():
        for place in {0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(6))}:
            damaged = bytearray(content)
            if damage == "flip":
                damaged[place] ^= 1 << chance.randrange(8)
            elif damage == "remove":
                del damaged[place]
            else:
                damaged.insert(place and place + 1, chance.randrange(256))
            path.write_bytes(damaged)
            make(tmp_path / "a.txt")
            assert make.lines[0].startswith(f"{path}: ") and make.lines[0].endswith("; making the shards again")
            assert {path: path.read_bytes() for path in sorted(directory.iterdir())} == whole


def test_a_stray_file_beside_the_shards_is_not_read(folder, make):
    directory = make(folder).directory
    os.mkfifo(directory / "train-00001.bin")
    (directory / ".index.json.unfinished").write_bytes(b"{")
    make(folder)
    assert make.lines == []


def reseal(directory, alter):
    """Change what index.json says, and seal it anew."""
    index = read_sealed(directory / "index.json")
    alter(index)
    write_sealed(directory / "index.json", index)


def shard(**changes):
    return lambda index: index["splits"]["train"]["shards"][0].update(changes)


def train(**changes):
    return lambda index: index["splits"]["train"].update(changes)


HOSTILE = {
    "a shard in the folder above": (shard(file="../train-00000.bin"), "shard '../train-00000.bin' in the place of"),
    "a shard by its whole path": (shard(file="/etc/passwd"), "shard '/etc/passwd' in the place of train-00000.bin"),
    "a shard in a folder": (shard(file="a/train-00000.bin"), "shard 'a/train-00000.bin' in the place of"),
    "the other split's shard": (shard(file="val-00000.bin"), "shard 'val-00000.bin' in the place of train-00000.bin"),
    "a shard of any name": (shard(file="train-0.bin"), "shard 'train-0.bin' in the place of train-00000.bin"),
    "a shard whose name is no text": (shard(file=["a"]), r"shard \['a'\] in the place of"),
    "a shard twice": (lambda index: index["splits"]["train"]["shards"].append(index["splits"]["train"]["shards"][0]),
                      "shard 'train-00000.bin' in the place of train-00001.bin"),
    "a shard without tokens": (shard(tokens=0), "tokens 0; it must be a whole number above 0"),
    "a shard with a number for a hash": (shard(sha256=7), "train-00000.bin sha256 7; it must be text"),
    "a shard of less than nothing": (shard(tokens=-2), "tokens -2; it must be a whole number above 0"),
    "a shard of half a token": (shard(tokens=1.5), "tokens 1.5; it must be a whole number above 0"),
    "another dtype": (lambda index: index.update(dtype="float64"), "dtype is 'float64', not 'uint16'"),
    "a wider dtype": (lambda index: index.update(dtype="uint32"), "dtype is 'uint32', not 'uint16'"),
    "a dtype that is a list": (lambda index: index.update(dtype=["<u2"]), "dtype is .*, not 'uint16'"),
    "another byte order": (lambda index: index.update(byte_order="big"), "byte_order is 'big', not 'little'"),
    "another format": (lambda index: index.update(format=99), "format 99; this version reads 2"),
    "a vocabulary of no size": (lambda index: index.update(vocab_size=None), "vocab_size None; it must be a whole"),
    "a smaller vocabulary": (lambda index: index.update(vocab_size=100), "made with another tokenizer"),
    "another tokenizer": (lambda index: index.update(tokenizer="0" * 64), "another tokenizer, '0000"),
    "a tokenizer that is no text": (lambda index: index.update(tokenizer=None), "tokenizer None; it must be text"),
    "no validation split": (lambda index: index["splits"].pop("val"), r"splits \['train'\]; it must have train and"),
    "a third split": (lambda index: index["splits"].update(test={}), "splits .*'test'.*it must have train and val"),
    "splits in a list": (lambda index: index.update(splits=[]), "not an index of this version"),
    "a count of tokens too many": (train(tokens=10**6), "train tokens 1000000, not the sum of its shards'"),
    "bytes below nothing": (train(bytes=-1), "train bytes -1; it must be a whole number above 0"),
    "a true count of bytes": (train(bytes=True), "train bytes True; it must be a whole number above 0"),
    "bytes too many": (train(bytes=10**30), "train has 27 documents of 10{30} bytes, the text 27 of"),
    "no documents": (train(documents=[]), "not an index of this version"),
    "a document less": (lambda index: index["splits"]["train"]["documents"].pop(), "train has 26 documents"),
    **{f"documents at {starts}": (train(documents=starts), "train documents do not begin at whole numbers")
       for starts in ([1, 5], [0, -5], [0, 5, 5], [0, 9, 5], [0, 5.0], [0, True], [0, "5"], [0, 10**6], [0, 10**30],
                      [0, None], "05")},
    **{f"no {key}": (lambda index, key=key: index.pop(key), f"not an index of this version .*{key}")
       for key in ("format", "dtype", "byte_order", "tokenizer", "vocab_size", "splits")},
    **{f"a split without {key}": (lambda index, key=key: index["splits"]["val"].pop(key), f"of this version .*{key}")
       for key in ("tokens", "bytes", "documents", "shards")},
    **{f"a shard without {key}": (lambda index, key=key: index["splits"]["val"]["shards"][0].pop(key), f"{key}")
       for key in ("file", "tokens", "sha256")},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_index_that_says_what_cannot_be_is_refused_though_its_seal_is_right(folder, make, case):
    alter, message = HOSTILE[case]
    directory = make(folder).directory
    reseal(directory, alter)
    make(folder)
    [said] = [line for line in make.lines if line.endswith("; making the shards again")]
    assert said.startswith(f"{directory / 'index.json'}: ") and re.search(message, said)
    make(folder)
    assert make.lines == []


def test_a_token_beyond_the_vocabulary_is_refused_though_the_hash_is_right(folder, make):
    directory = make(folder).directory
    path = directory / "val-00000.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[-1] = 261
    path.write_bytes(tokens.tobytes())
    reseal(directory, lambda index: index["splits"]["val"]["shards"][0].update(sha256=sha256_of(path)))
    make(folder)
    assert make.lines[0].startswith(f"{path}: token 261 is none of the vocabulary's 261; ")


def test_a_damaged_tokenizer_is_said_and_mended(folder, make, tmp_path):
    first = make(folder, BPE)
    [path] = tmp_path.glob("cache/tokenizers/*/tokenizer.model")
    flip(path, 100)
    again = make(folder, BPE)
    assert str(path.parent) in make.lines[0] and "training it again" in make.lines[0]
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_a_preparation_that_was_killed_leaves_nothing_that_counts(folder, make, monkeypatch, tmp_path):
    def killed(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_sealed", killed)
        with pytest.raises(KeyboardInterrupt):
            make(folder)
    assert not list(tmp_path.glob("cache/shards/*"))
    patch_free = make(folder)
    rest = patch_free.directory.with_name(f".{patch_free.directory.name}")
    patch_free.directory.rename(rest)                   # as a process leaves it that is killed outright
    (rest / "index.json").unlink()
    assert len(make(folder).train) == len(patch_free.train)
    assert not rest.exists()


def test_two_at_a_time_do_the_work_once(folder, tmp_path):
    """Both made the shards, and the second removed the first's from under it."""
    lines, datasets = [], []
    config = DataConfig(path=str(folder), cache_dir=str(tmp_path / "cache"))
    threads = [threading.Thread(target=lambda: datasets.append(prepare(config, BPE, lines.append))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({dataset.tokenizer.fingerprint for dataset in datasets}) == 1 and len(datasets) == 4
    assert sum("tokenizing" in line for line in lines) == sum("training a tokenizer" in line for line in lines) == 1


def test_the_tokenizer_never_sees_validation_text(tmp_path, make, monkeypatch):
    seen = []
    train = Tokenizer.train
    monkeypatch.setattr(Tokenizer, "train", lambda documents, **options: train(
        [seen.append(document) or document for document in documents], **options))
    text = make_text(300)
    (tmp_path / "a.txt").write_text(text + "qzx" * 2000, "utf-8")
    dataset = make(tmp_path / "a.txt", BPE, val_fraction=0.2)
    assert "".join(seen) == dataset.tokenizer.decode(dataset.train.read(0, 10**6))
    seen.clear()
    (tmp_path / "val.txt").write_text("secret", "utf-8")
    make(tmp_path / "a.txt", BPE, val_path=str(tmp_path / "val.txt"))
    assert "".join(seen) == text + "qzx" * 2000


def test_a_saved_tokenizer_is_used_as_it_is(folder, make, tmp_path):
    saved = Tokenizer.train([make_text(50)], vocab_size=280)
    saved.save(tmp_path / "saved")
    dataset = make(folder, TokenizerConfig(path=str(tmp_path / "saved"), vocab_size=5000))
    assert dataset.tokenizer.fingerprint == saved.fingerprint
    assert not any("training" in line for line in make.lines)
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        make(folder, TokenizerConfig(path=str(tmp_path / "none")))


def test_a_vocabulary_the_text_does_not_allow_is_caught_before_tokenizing(folder, make):
    with pytest.raises(ValueError, match=f"{folder}: vocab_size = 9999 is too large.*possible are 262 to"):
        make(folder, TokenizerConfig(vocab_size=9999))
    assert not any("tokenizing" in line for line in make.lines)


@pytest.mark.parametrize("most", [1000, 5000, 20_000, 10**9])
def test_the_sample_is_spread_evenly_and_as_large_as_asked(folder, monkeypatch, most):
    """Of a text below one piece nothing was taken, and of a few large files among small ones far too much."""
    monkeypatch.setattr("minigpt.corpus.PIECE_BYTES", 200)
    documents = open_corpus(str(folder)).train
    sample = list(data._sample(documents, most))
    size, total = len("".join(sample).encode()), sum(document.end for document in documents)
    assert min(most, total) <= size + 200 and size <= min(most + 200, total)
    pieces = [piece for document in documents for piece in document.pieces()]
    if most >= 5000:
        places = [pieces.index(piece) / len(pieces) for piece in sample]
        assert places[0] < 0.1 and places[-1] > 0.9 and np.diff(places).max() < 0.15


def test_the_cache_stands_where_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_directory("~/here") == tmp_path / "here"
    assert data.cache_directory() == tmp_path / "xdg" / "minigpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_directory() == tmp_path / ".cache" / "minigpt"


def dealer_of(split, length, extra, order, seed=1):
    return Dealer(split, length, extra=extra, order=order, seed=seed)


ORDERS = pytest.mark.parametrize("order", ["windows", "documents"])
EXTRAS = pytest.mark.parametrize("extra", [0, 1])


@ORDERS
@EXTRAS
def test_a_row_is_a_function_of_seed_and_number(order, extra):
    split = split_of(1003, 17, shards=3)
    rows = dealer_of(split, 32, extra, order).rows(0, 150)
    assert rows.shape == (150, 32 + extra) and rows.dtype == np.int64
    for count in (1, 4, 7):
        dealer = dealer_of(split, 32, extra, order)
        for first in random.Random(count).sample(range(150 - count), 20):
            assert (dealer.rows(first, count) == rows[first:first + count]).all()
    assert not (dealer_of(split, 32, extra, order, seed=2).rows(0, 150) == rows).all()


@EXTRAS
@pytest.mark.parametrize("tokens", [1000, 1024, 1025, 1031, 2047])
def test_an_epoch_of_windows_has_each_target_once_and_misses_little(tokens, extra):
    """Offsets differ, so that over many epochs every token is a target; the text's last ones never were."""
    length = 32
    dealer = dealer_of(split_of(tokens), length, extra, "windows")
    seen, orders = set(), set()
    for epoch in range(300):
        rows = dealer.rows(epoch * dealer.rows_per_epoch, dealer.rows_per_epoch)
        assert (np.diff(rows, axis=1) == 1).all()
        targets = rows[:, extra:].ravel()
        assert len(np.unique(targets)) == len(targets) >= tokens - extra - 2 * length + 1
        seen |= set(targets.tolist())
        orders.add(tuple(rows[:, 0] // length))
    assert len(orders) > 290
    assert len(seen) >= tokens - extra - 1


@EXTRAS
@pytest.mark.parametrize("tokens, documents", [(1000, 1), (1003, 9), (1031, 200)])
def test_an_epoch_of_documents_has_each_token_once_and_keeps_documents_whole(tokens, documents, extra):
    length = 32
    split = split_of(tokens, documents)
    dealer = dealer_of(split, length, extra, "documents")
    assert dealer.rows_per_epoch == (tokens - extra) // length
    epochs = []
    for epoch in range(3):
        rows = dealer.rows(epoch * dealer.rows_per_epoch, dealer.rows_per_epoch)
        string = np.concatenate([rows[:, :length].ravel(), rows[-1, length:]]) - 10
        if extra:
            assert (rows[1:, 0] == rows[:-1, -1]).all()
        assert len(np.unique(string)) == len(string) > tokens - length
        starts, ends = set(split.documents.tolist()), set((split.documents[1:] - 1).tolist()) | {tokens - 1}
        for here, then in zip(string, string[1:]):
            assert then in starts if here in ends else then == here + 1
        assert string[0] in starts
        epochs.append(string.tolist())
    assert (epochs[0] != epochs[1] != epochs[2]) == (documents > 1)


def check_source(dealer, tokenizer, number, folder):
    """The file's bytes at the row's source are those of the row's tokens up to the next <s>; gives the source."""
    [row] = dealer.rows(number, 1)
    name, offset = dealer.source(number)
    tokens, *others = np.split(row, np.flatnonzero(row[1:] == START) + 1)
    expected, content = tokenizer.decode_bytes(tokens), (folder / name).read_bytes()
    assert type(offset) is int and content[offset:offset + len(expected)] == expected
    if row[0] == START:
        assert offset == dealer.split.first_bytes[dealer.split.names.index(name)]
    if others:
        assert offset + len(expected) == len(content)
    return name, offset


@ORDERS
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("length", [7, 60])
def test_the_source_of_a_row_is_where_the_text_has_it(folder, make, monkeypatch, order, tokenizer, length):
    """Across shards and blocks, in files named in folders, within characters, in many epochs."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 999)
    monkeypatch.setattr(shards, "BLOCK_TOKENS", 100)
    (folder / "in").mkdir()
    for number in range(4):
        text = "".join(chr(random.Random(number).randrange(0x4E00, 0x9FFF)) + "é😀" for _ in range(200))
        (folder / "in" / f"{number} 天.txt").write_text(text, "utf-8")
    dataset = make(folder, tokenizer)
    sources = []
    for split in (dataset.train, dataset.val):
        dealer = dealer_of(split, length, 1, order)
        for number in random.Random(length).sample(range(3 * dealer.rows_per_epoch), 60):
            sources.append(check_source(dealer, dataset.tokenizer, number, folder))
            assert dealer_of(split, length, 1, order).source(number) == sources[-1]
    assert len({name for name, _ in sources}) > 15
    heads = [(folder / name).read_bytes()[offset] for name, offset in sources if "天" in name]
    assert any(head & 0xC0 == 0x80 for head in heads) and any(head & 0xC0 != 0x80 for head in heads)


@ORDERS
def test_each_document_is_the_source_of_its_start(folder, make, order):
    split = make(folder).train
    dealer = dealer_of(split, 1, 0, order)
    starts = [dealer.source(number) for number in range(len(split)) if dealer.rows(number, 1) == START]
    assert sorted(starts) == sorted((document.name, 0) for document in open_corpus(str(folder)).train)


@ORDERS
def test_the_source_in_a_single_file_counts_from_the_files_begin(tmp_path, make, order):
    """The held-out split of a file is its last part."""
    (tmp_path / "a.txt").write_text("天é" * 500, "utf-8")
    dataset = make(tmp_path / "a.txt", val_fraction=0.3)
    for split, first in ((dataset.train, 0), (dataset.val, 1750)):
        assert (split.names, split.first_bytes) == (("a.txt",), (first,))
        dealer = dealer_of(split, 16, 1, order)
        sources = [check_source(dealer, dataset.tokenizer, number, tmp_path) for number in range(40)]
        assert min(offset for _, offset in sources) >= first


def test_names_are_those_of_the_text_as_it_is_now(folder, make, tmp_path):
    """The shards are found by content, wherever the text has moved to."""
    (tmp_path / "val.txt").write_text("held out", "utf-8")
    make(folder, val_path=str(tmp_path / "val.txt"))
    (tmp_path / "moved").mkdir()
    folder.rename(tmp_path / "moved" / "sub")
    split = make(tmp_path / "moved", val_path=str(tmp_path / "val.txt")).train
    assert make.lines == []
    assert split.names == tuple(sorted(f"sub/{number}.txt" for number in range(30)))


@ORDERS
@EXTRAS
@pytest.mark.parametrize("length", [1, 5, 11])
def test_corpora_of_one_to_three_contexts(length, extra, order):
    for tokens in range(length + extra, 3 * length + extra + 2):
        split = split_of(tokens, min(3, tokens))
        dealer = dealer_of(split, length, extra, order)
        rows = dealer.rows(0, 10 * dealer.rows_per_epoch)
        assert rows.shape[1] == length + extra and rows.min() >= 10 and rows.max() < tokens + 10
        for epoch in rows.reshape(10, dealer.rows_per_epoch, -1):
            targets = epoch[:, extra:]
            assert len(np.unique(targets)) == targets.size > tokens - extra - 2 * length
        if order == "windows":
            targets = dealer.rows(0, 99 * length)[:, extra:]
            assert set(targets.ravel().tolist()) == set(range(10 + extra, tokens + 10))


@ORDERS
@EXTRAS
def test_a_corpus_below_one_context(order, extra, tmp_path, make):
    with pytest.raises(ValueError, match=f"has {31 + extra} tokens, fewer than one context of {32 + extra}"):
        dealer_of(split_of(31 + extra), 32, extra, order)
    (tmp_path / "short.txt").write_text("some text", "utf-8")
    split = make(tmp_path / "short.txt", val_fraction=0.2).train
    with pytest.raises(ValueError, match=f"{tmp_path / 'short.txt'}.* has 9 tokens.*smaller model.context_length"):
        dealer_of(split, 32, extra, order)


@EXTRAS
@pytest.mark.parametrize("tokens", [2, 31, 32, 33, 34, 64, 65, 66, 200])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_in_order_scores_every_token_once(tokens, batch_size, extra):
    length, pad = 32, 3
    batches = list(in_order(split_of(tokens), length, extra, batch_size, pad))
    assert all(len(batch) == batch_size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= batch_size
    rows = np.concatenate(batches)
    assert rows.shape[1] == length + extra
    targets = rows[:, extra:].ravel()
    assert targets[:tokens - extra].tolist() == list(range(10 + extra, tokens + 10))
    assert (targets[tokens - extra:] == pad).all() and len(targets) - (tokens - extra) < length
    assert (rows[1:, :extra] == rows[:-1, length:]).all()
