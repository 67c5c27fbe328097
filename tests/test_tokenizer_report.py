"""`minigpt tokenizer-report`: counts that can be done by hand, and what does not come back."""

import json
import tomllib

import pytest
from test_cli import fails
from test_hf_tokenizer import saved, word_piece
from tiny import make_text

from minigpt import cli
from minigpt.encoders import SPACE
from minigpt.tokenizer import Tokenizer
from minigpt.tokenizer_report import TEXTS, find_tokenizer, report

SAMPLES = {name: text for group in tomllib.loads(TEXTS.read_text("utf-8")).values() for name, text in group.items()}


def test_bytes_have_one_token_each():
    found = report(Tokenizer.train((), kind="bytes"))
    assert [row["name"] for row in found["texts"]] == list(SAMPLES)
    for row in found["texts"]:
        assert row["bytes"] == row["tokens"] == len(SAMPLES[row["name"]].encode()) and row["bytes_per_token"] == 1
        assert row["comes_back"]
    assert found["unused"] == 256 - len(set("".join(SAMPLES.values()).encode())) and found["unused_examples"] == []


def test_tokens_of_a_text_of_ones_own(tmp_path):
    (tmp_path / "a.txt").write_text(make_text(50), "utf-8")
    tokenizer = Tokenizer.train([make_text(50)], 400)
    found = report(tokenizer, [str(tmp_path)])
    row = found["texts"][-1]
    ids = tokenizer.encode(make_text(50))
    assert row == {"name": "a.txt", "bytes": len(make_text(50)), "tokens": len(ids), "comes_back": True,
                   "bytes_per_token": len(make_text(50)) / len(ids)}
    used = {id for text in (*SAMPLES.values(), make_text(50)) for id in tokenizer.encode(text)}
    assert found["unused"] == 400 - 5 - len(used)
    sizes = [len(text.encode()) for text in found["longest"]]
    assert sizes == sorted((len(token) for token in tokenizer.token_bytes), reverse=True)[:20]
    assert all(text not in make_text(50) or len(text) > 1 for text in found["unused_examples"])


def test_what_does_not_come_back(tmp_path, capsys):
    saved(tmp_path, word_piece(), cls_token="[CLS]", sep_token="[SEP]")
    cli.tokenizer_report([str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    lost = {row["name"] for row in found["texts"] if not row["comes_back"]}
    assert "English" in lost and found["path"] == str(tmp_path)
    cli.tokenizer_report([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("  NO") for line in lines) == len(lost)
    assert lines[0] == f"tokenizers, {found['vocab_size']} tokens"


def test_the_samples_are_of_many_kinds():
    assert {"English", "Chinese", "Arabic", "Python", "emoji", "control"} <= SAMPLES.keys()
    assert all(text.strip() for text in SAMPLES.values()) and SPACE not in "".join(SAMPLES.values())


@pytest.mark.parametrize("name, message", [("none", "no directory"), ("", "no tokenizer; name a directory")])
def test_no_tokenizer(name, message, tmp_path, capsys):
    assert message in fails(capsys, cli.tokenizer_report, str(tmp_path / name))


def test_where_a_tokenizer_is_found(tmp_path):
    tokenizer = Tokenizer.train((), kind="bytes")
    tokenizer.save(tmp_path / "run" / "tokenizer")
    for path in (tmp_path / "run", tmp_path / "run" / "tokenizer"):
        assert find_tokenizer(path).fingerprint == tokenizer.fingerprint
