"""A checkpoint holds what its manifest says to the byte, or it is not used."""

import json
import os
import random

import pytest
import torch
from tiny import tiny_config

import minigpt
from minigpt import checkpoint, training
from minigpt.config import ModelConfig
from minigpt.files import write_durably
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer


@pytest.fixture
def run(tmp_path, text_file):
    """A finished run with checkpoints at steps 2 and 4."""
    training.train(tiny_config(tmp_path, text_file, "--train.max_steps=4", "--train.checkpoint_every=2",
                               "--train.eval_every=4"))
    return tmp_path / "run"


def newest(run):
    return checkpoint.in_run(run)[0]


def test_the_files_are_those_of_the_format(run):
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "samples.jsonl", "tokenizer"]
    assert [path.name for path in checkpoint.in_run(run)] == ["step-00000004", "step-00000002"]
    files = {path.relative_to(newest(run)).as_posix() for path in newest(run).rglob("*") if path.is_file()}
    listed = json.loads((newest(run) / "manifest.json").read_text())["files"].keys()
    assert listed == {"model.safetensors", "optimizer.safetensors", "state.json", "config.json",
                      "tokenizer/settings.json", "tokenizer/tokenizer.model"}
    assert files == listed | {"manifest.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json",
                                  "tokenizer/tokenizer.model", "tokenizer/settings.json"])
@pytest.mark.parametrize("damage", ["flip", "add", "cut", "remove"])
def test_damage_is_found_named_and_the_checkpoint_before_it_used(run, name, damage, capsys):
    path = newest(run) / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[random.Random(name).randrange(len(content))] ^= 1
    content = content + b"\0" if damage == "add" else content[:-1] if damage == "cut" else content
    path.write_bytes(content)
    if damage == "remove":
        path.unlink()
    with pytest.raises(ValueError, match=name):
        minigpt.load(newest(run))
    assert minigpt.load(run).path.name == "step-00000002"
    warning = capsys.readouterr().err
    assert name in warning and "checkpoint before it is used" in warning


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1, "files": {}}', '{"format": 9, "files": {}}',
                                     '{"format": 1, "files": {"a": 3}}'])
def test_a_damaged_manifest_is_refused(run, content):
    (newest(run) / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json"):
        minigpt.load(newest(run))
    assert minigpt.load(run).path.name == "step-00000002"


@pytest.mark.parametrize("outside", ["../../../secret", "/etc/passwd"])
def test_a_manifest_that_points_outside_is_refused(run, outside):
    manifest = newest(run) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][outside] = content["files"]["state.json"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="outside the checkpoint"):
        minigpt.load(newest(run))


def test_a_link_in_a_checkpoint_is_refused(run):
    path = newest(run) / "state.json"
    path.rename(run / "state.json")
    path.symlink_to(run / "state.json")
    with pytest.raises(ValueError, match="outside the checkpoint"):
        minigpt.load(newest(run))


def test_without_a_manifest_it_is_no_checkpoint(run, capsys):
    (newest(run) / "manifest.json").unlink()
    assert minigpt.load(run).path.name == "step-00000002"
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="holds no valid checkpoint"):
        minigpt.load(newest(run))


def test_a_save_that_breaks_off_leaves_the_others_as_they_were(run, monkeypatch):
    """Whatever step of the save fails, the run's newest checkpoint stays the one from before."""
    opened = minigpt.load(run)

    def save():
        checkpoint.save(run / "checkpoints", 6, model=opened.model, optimizers=[], state={}, config=opened.config,
                        tokenizer=opened.tokenizer)

    for name in ("save_file", "sync_file", "sha256_of", "write_durably", "sync_directory"):
        with monkeypatch.context() as patch:
            def fail(*arguments):
                raise OSError(28, "No space left on device")

            patch.setattr(checkpoint, name, fail)
            with pytest.raises(OSError):
                save()
        assert minigpt.load(run).path.name == "step-00000004"
    save()
    assert newest(run).name == "step-00000006"
    assert not (run / "checkpoints" / checkpoint.UNFINISHED).exists()


def test_weights_of_another_model_are_refused(run):
    found = checkpoint.find(run)
    wide = GPT(ModelConfig(vocab_size=300, context_length=32, depth=2, width=64, num_heads=2))
    with pytest.raises(ValueError, match="has shape"):
        found.load_model(wide)
    deep = GPT(ModelConfig(vocab_size=300, context_length=32, depth=3, width=32, num_heads=2))
    with pytest.raises(ValueError, match="is missing"):
        found.load_model(deep)


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(run, tmp_path):
    """The manifest is right, yet the tokenizer is another one."""
    larger = Tokenizer.train(["abc def " * 200, *map(chr, range(0x4E00, 0x4F00))], vocab_size=320)
    larger.save(newest(run) / "tokenizer")
    manifest = newest(run) / "manifest.json"
    content = json.loads(manifest.read_text())
    for name in ("tokenizer/settings.json", "tokenizer/tokenizer.model"):
        path = newest(run) / name
        content["files"][name] = {"bytes": path.stat().st_size, "sha256": checkpoint.sha256_of(path)}
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tokenizer has 320 tokens and the model 300"):
        minigpt.load(newest(run))


def test_a_safetensors_file_that_is_none_is_named(run):
    found = checkpoint.Checkpoint(newest(run))
    (newest(run) / "model.safetensors").write_bytes(b"\x80\x04pickle" * 9)
    with pytest.raises(ValueError, match="model.safetensors: not a safetensors file"):
        found.load_model(GPT(found.config.model))


def test_weights_come_back_exactly_and_the_tied_head_is_stored_once(run):
    found = checkpoint.find(run)
    one, other = GPT(found.config.model), GPT(found.config.model)
    found.load_model(one)
    found.load_model(other)
    assert one.head.weight is one.embedding.weight
    assert "head.weight" not in checkpoint.model_tensors(one)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_an_interrupted_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_durably(path, b"old")

    def fail(descriptor):
        raise OSError("disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
