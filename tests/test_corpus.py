"""Corpora: which files count, how they are split, pieces that add up to the file, faults named with file and byte."""

import hashlib
import os
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt import corpus as corpora
from minigpt.corpus import PIECE_BYTES, Document, beginning, list_documents, open_corpus


def write(root, contents):
    """Files under `root` from {name: text}."""
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8", newline="")
    return str(root)


def names(documents):
    return [document.name for document in documents]


def text_of(documents):
    return "".join(piece for document in documents for piece in document.pieces())


def fault(function, *arguments, **options):
    """The message of the ValueError that the call raises."""
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def read(path):
    """All text of a file as one document."""
    return text_of([Document(path, path.name, 0, path.stat().st_size)])


def test_a_file_is_one_document(tmp_path):
    write(tmp_path, {"a.txt": "žluť\r\n", ".hidden": "x"})
    [document] = list_documents(str(tmp_path / "a.txt"))
    assert (document.name, document.start, document.end) == ("a.txt", 0, 8) and text_of([document]) == "žluť\r\n"
    assert names(list_documents(str(tmp_path / ".hidden"))) == [".hidden"]


def test_a_folder_is_read_whole_in_the_order_of_names_without_hidden_files(tmp_path):
    write(tmp_path, {"b/z.txt": "1", "a.txt": "2", "b/c/d/e.md": "3", "b.txt": "4", ".git/x.txt": "5", "b/.x.txt": "6"})
    documents = list_documents(str(tmp_path))
    assert names(documents) == ["a.txt", "b.txt", "b/c/d/e.md", "b/z.txt"]
    assert text_of(documents) == "2431"


@pytest.mark.parametrize("patterns, expected", [
    (["*"], ["a.py", "b/c.py", "b/d.txt"]), (["*.py"], ["a.py", "b/c.py"]), (["b/*"], ["b/c.py", "b/d.txt"]),
    (["a.*", "*.txt"], ["a.py", "b/d.txt"]), (["[ac].py"], ["a.py", "b/c.py"])])
def test_include_patterns(tmp_path, patterns, expected):
    write(tmp_path, {"a.py": "1", "b/c.py": "2", "b/d.txt": "3"})
    assert names(list_documents(str(tmp_path), patterns)) == expected


def test_a_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", write(tmp_path, {"texts/a.txt": "1"}))
    assert names(list_documents("~/texts")) == ["a.txt"]


def test_file_names_that_are_no_unicode(tmp_path):
    """Their names could not be encoded for the split, with a message about a codec."""
    for number in range(5):
        with open(os.fsencode(tmp_path) + b"/\xff%d.txt" % number, "w") as file:
            file.write("text")
    corpus = open_corpus(str(tmp_path), val_fraction=0.2)
    assert (len(corpus.train), len(corpus.val)) == (4, 1)


def test_the_standard_library():
    documents = list_documents("stdlib")
    assert {"json/decoder.py", "argparse.py"} <= set(names(documents))
    assert not [name for name in names(documents) if not re.fullmatch(r"(?!(.*/)?tests?/|site-packages/).*\.py", name)]
    assert sum(document.end for document in documents) > 5_000_000
    corpus = open_corpus("stdlib", val_fraction=0.02)
    held_out = sum(document.end for document in corpus.val) / sum(document.end for document in documents)
    assert held_out == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("val_fraction", [0.02, 0.1, 0.5, 0.9])
def test_a_split_by_document(tmp_path, seed, val_fraction):
    chance = random.Random(seed)
    contents = {f"{seed}-{number}.txt": "x" * chance.randrange(1, 400) for number in range(300)}
    path = write(tmp_path, contents)
    corpus = open_corpus(path, val_fraction=val_fraction)
    assert not set(corpus.train) & set(corpus.val)
    assert sorted(names(corpus.train + corpus.val)) == sorted(contents) == names(list_documents(path))
    assert names(corpus.train) == sorted(names(corpus.train)) and names(corpus.val) == sorted(names(corpus.val))
    total = sum(map(len, contents.values()))
    assert sum(document.end for document in corpus.val) == pytest.approx(val_fraction * total, abs=0.005 * total)
    assert open_corpus(path, val_fraction=val_fraction) == corpus


@pytest.mark.parametrize("val_fraction", [1e-6, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sizes", [(50, 50), (1, 1), (10, 1000), (1000, 1000, 1000), (1, 145, 145, 145, 145, 145)])
def test_both_splits_have_text(tmp_path, sizes, val_fraction):
    """Two like files at a fraction of 0.9 were both held out, and nothing was left to learn from."""
    path = write(tmp_path, {f"{number}.txt": "x" * size for number, size in enumerate(sizes)})
    corpus = open_corpus(path, val_fraction=val_fraction)
    assert corpus.train and corpus.val and len(corpus.train + corpus.val) == len(sizes)


def test_the_split_follows_names_alone(tmp_path):
    """Another place, another content: the same files are held out, where sizes stay."""
    chance = random.Random(1)
    sizes = {f"{number}.txt": chance.randrange(1, 99) for number in range(40)}
    first = open_corpus(write(tmp_path / "a", {name: "x" * size for name, size in sizes.items()}))
    second = open_corpus(write(tmp_path / "b", {name: "y" * size for name, size in sizes.items()}))
    assert names(first.val) == names(second.val)


@pytest.mark.parametrize("size, val_fraction", [(1000, 0.1), (1001, 0.1), (999, 0.25), (10, 0.1), (2, 0.5)])
def test_the_last_part_of_a_single_file_is_held_out(tmp_path, size, val_fraction):
    text = "".join(chr(97 + number % 26) for number in range(size))
    corpus = open_corpus(write(tmp_path, {"a.txt": text}) + "/a.txt", val_fraction=val_fraction)
    held_out = int(size * val_fraction)
    assert text_of(corpus.train) == text[:-held_out] and text_of(corpus.val) == text[-held_out:]


@pytest.mark.parametrize("character", ["é", "天", "👩"])
@pytest.mark.parametrize("shift", range(4))
def test_a_single_file_is_cut_between_characters(tmp_path, character, shift):
    text = "x" * shift + character * 100
    corpus = open_corpus(write(tmp_path, {"a.txt": text}), val_fraction=0.3)
    train, val = text_of(corpus.train), text_of(corpus.val)
    assert train + val == text
    assert 0 <= 0.3 * len(text.encode()) - len(val.encode()) < 5


def test_a_single_file_too_small_to_split(tmp_path):
    path = write(tmp_path, {"a.txt": "five!"})
    message = fault(open_corpus, path, val_fraction=0.1)
    assert str(tmp_path / "a.txt") in message and "5 bytes are too few" in message


def test_a_validation_text_of_its_own(tmp_path):
    path = write(tmp_path / "train", {"a.txt": "abc", "b.txt": "d"})
    corpus = open_corpus(path, val_path=write(tmp_path / "val", {"c.txt": "e", "d.txt": "f"}))
    assert (text_of(corpus.train), text_of(corpus.val)) == ("abcd", "ef")


def test_validation_text_inside_the_training_folder_is_not_learnt(tmp_path):
    """It was in both splits."""
    path = write(tmp_path, {"a.txt": "abc", "sub/val.txt": "d", "b.txt": "e"})
    corpus = open_corpus(path, val_path=str(tmp_path / "sub" / ".." / "sub" / "val.txt"))
    assert (text_of(corpus.train), text_of(corpus.val)) == ("abce", "d")
    message = fault(open_corpus, path, val_path=path)
    assert path in message and "data.val_path" in message


def test_the_fingerprint_is_that_of_contents_and_split(tmp_path):
    contents = {f"{number}.txt": f"text {number}" * 9 for number in range(9)}
    first = open_corpus(write(tmp_path / "a", contents)).fingerprint()
    assert open_corpus(write(tmp_path / "b", contents)).fingerprint() == first
    assert open_corpus(str(tmp_path / "b"), val_fraction=0.5).fingerprint() != first
    moved = contents | {"3.txt": contents["3.txt"][:-1], "4.txt": contents["3.txt"][-1] + contents["4.txt"]}
    assert open_corpus(write(tmp_path / "c", moved)).fingerprint() != first
    assert open_corpus(write(tmp_path / "d", contents | {"3.txt": "TEXT 3" * 9})).fingerprint() != first


@given(text=st.text(st.sampled_from("ab\n\r é天👩"), max_size=80), piece_bytes=st.integers(4, 9))
def test_pieces_add_up_to_the_text(tmp_path_factory, text, piece_bytes):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE_BYTES", piece_bytes)
        pieces = list(Document(path, "a.txt", 0, len(text.encode())).pieces())
        assert "".join(pieces) == text
        assert all(0 < len(piece.encode()) <= piece_bytes for piece in pieces)
        start = len(text[:len(text) // 3].encode())
        end = len(text[:-1].encode())
        assert "".join(Document(path, "a.txt", start, max(start, end)).pieces()) == text[len(text) // 3:][:-1]


@given(content=st.binary(max_size=60) | st.text("ab\né天👩").map(str.encode), data=st.data())
def test_what_is_broken_is_found_at_its_byte(tmp_path_factory, content, data):
    """Wherever pieces are cut, the place is where Python's decoder puts it for the whole file."""
    place = data.draw(st.integers(0, len(content)))
    broken = data.draw(st.sampled_from([b"", b"\xff", b"\x80", b"\xe5\xa4", b"\xed\xa0\x80"]))
    content = content[:place] + broken + content[place:]
    path = tmp_path_factory.mktemp("broken") / "a.txt"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE_BYTES", 7)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            assert f"{path}: byte {error.start} is not UTF-8" in fault(read, path)
        else:
            assert read(path) == text


@pytest.mark.parametrize("broken", [b"\xff", b"\xc3", b"\xe5\xa4", b"\xf0\x9f\x91", b"\x80"], ids=repr)
@pytest.mark.parametrize("filler", [b"x", b"x" * 62 + b"\n"], ids=["one line", "lines"])
def test_broken_bytes_at_the_border_of_two_pieces(tmp_path, broken, filler):
    path = tmp_path / "a.txt"
    for place in [*range(PIECE_BYTES - 4, PIECE_BYTES + 3), 2 * PIECE_BYTES - len(broken)]:
        content = bytearray((filler * (2 * PIECE_BYTES // len(filler) + 1))[:2 * PIECE_BYTES])
        content[place:place + len(broken)] = broken
        path.write_bytes(content)
        message = fault(open_corpus(str(path)).fingerprint)
        assert f"{path}: byte {place} is not UTF-8" in message and "data.include" in message


def test_a_character_cut_off_at_the_end_of_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("text 天".encode()[:-1])
    assert f"{tmp_path / 'a.txt'}: byte 5 is not UTF-8" in fault(read, tmp_path / "a.txt")


def test_large_pieces_end_at_newlines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a line of text\n" * (3 * PIECE_BYTES // 15 + 1))
    pieces = list(Document(path, "a.txt", 0, path.stat().st_size).pieces())
    assert len(pieces) == 4 and all(piece.endswith("\n") for piece in pieces)
    assert hashlib.sha256("".join(pieces).encode()).digest() == hashlib.sha256(path.read_bytes()).digest()


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("short", "utf-8")
    assert f"{tmp_path / 'a.txt'}: shrank" in fault(text_of, [Document(tmp_path / "a.txt", "a.txt", 0, 9)])


def test_an_empty_file_is_named(tmp_path):
    path = write(tmp_path, {"a.txt": "text", "b/c.txt": ""})
    assert f"{tmp_path / 'b/c.txt'}: the file is empty" in fault(open_corpus, path)
    assert f"{tmp_path / 'b/c.txt'}: the file is empty" in fault(open_corpus, str(tmp_path / "b/c.txt"))
    assert names(list_documents(path, ["a*"])) == ["a.txt"]


def test_missing_paths_are_named(tmp_path):
    path = write(tmp_path, {"a.txt": "text"})
    missing = str(tmp_path / "none")
    for arguments in (dict(path=missing), dict(path=path, val_path=missing)):
        with pytest.raises(FileNotFoundError, match=re.escape(missing)):
            open_corpus(**arguments)
    (tmp_path / "link.txt").symlink_to(missing)
    with pytest.raises(FileNotFoundError, match="link.txt"):
        open_corpus(path)


def test_no_file_that_matches(tmp_path):
    path = write(tmp_path, {"a.txt": "text", ".b.py": "x"})
    message = fault(open_corpus, path, include=["*.py", "*.md"])
    assert path in message and "data.include = ['*.py', '*.md']" in message
    Path(tmp_path / "empty").mkdir()
    assert "no file in it matches" in fault(open_corpus, str(tmp_path / "empty"))


def test_what_is_no_file_is_no_document(tmp_path):
    """A FIFO counted as an empty file, and reading it would have waited for ever."""
    path = write(tmp_path, {"a.txt": "some text", "b.txt": "more text"})
    os.mkfifo(tmp_path / "pipe")
    assert [document.name for document in list_documents(path)] == ["a.txt", "b.txt"]


def test_the_beginning_ends_between_characters(tmp_path):
    documents = list_documents(write(tmp_path, {"a.txt": "日本", "b.txt": "né", "c.txt": "x"}))
    for most, text in ((1, "日"), (3, "日"), (4, "日本"), (6, "日本"), (7, "日本n"), (8, "日本né"), (99, "日本néx")):
        assert text_of(beginning(documents, most)) == text
