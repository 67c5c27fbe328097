"""A checkpoint holds what its manifest says to the byte, or it is not used."""

import json
import os
import pickle
import random
import shutil
import signal
import struct
import sys

import pytest
import torch
from marks import slow
from safetensors.torch import save_file
from tiny import tiny_config

import minigpt
from minigpt import checkpoint, training
from minigpt.config import ModelConfig
from minigpt.files import sha256_of, write_durably, write_sealed
from minigpt.model import GPT
from minigpt.optim import make_optimizers
from minigpt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_file):
    """A finished run with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    training.train(tiny_config(folder, text_file, "--train.max_steps=4", "--train.checkpoint_every=2",
                               "--train.eval_every=4"))
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def forge(path, more=()):
    """Give a checkpoint a manifest that is right for its files as they are now, as whoever changed them could."""
    files = {file.relative_to(path).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
             for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"}
    write_sealed(path / "manifest.json", {"format": checkpoint.FORMAT, "files": files | dict(more)}, indent=1)


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


def test_every_byte_of_a_manifest_counts(run):
    manifest = newest(run) / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(0, len(whole), 3):
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1:])
        with pytest.raises(ValueError, match="manifest.json: damaged"):
            checkpoint.verify(newest(run))
    assert minigpt.load(run).path.name == "step-00000002"


@pytest.mark.parametrize("content", [{"format": 1, "files": {}}, {"format": 2}, {"format": 2, "files": []},
                                     {"format": 2, "files": {}}, {"format": 2, "files": {"state.json": 3}}])
def test_a_manifest_of_another_kind_is_refused(run, content):
    write_sealed(newest(run) / "manifest.json", content)
    with pytest.raises(ValueError, match="manifest.json: (format|not a manifest|does not list)"):
        minigpt.load(newest(run))
    assert minigpt.load(run).path.name == "step-00000002"


@pytest.mark.parametrize("outside", ["../../../secret", "/etc/passwd", "tokenizer/../../step-00000002/state.json",
                                     "tokenizer/..", "..", ".", "a/b/c", "", "\x1b[2J", "x" * 300, "a\0", ".hidden"])
def test_a_manifest_that_points_outside_is_refused(run, outside):
    forge(newest(run), {outside: {"bytes": 1, "sha256": ""}})
    with pytest.raises(ValueError, match="outside the checkpoint"):
        minigpt.load(newest(run))


@pytest.mark.parametrize("name", ["state.json", "tokenizer", "manifest.json"])
def test_a_link_in_a_checkpoint_is_refused(run, name):
    path = newest(run) / name
    path.rename(run / "moved")
    path.symlink_to(run / "moved")
    with pytest.raises(ValueError, match=f"{name}: a symbolic link"):
        minigpt.load(newest(run))
    assert minigpt.load(run).path.name == "step-00000002"


def test_a_run_whose_checkpoints_lie_elsewhere_is_refused(run, tmp_path, capsys):
    """Pruning would have deleted files outside the run."""
    newest(run).rename(tmp_path / "elsewhere")
    (run / "checkpoints/step-00000004").symlink_to(tmp_path / "elsewhere")
    assert minigpt.load(run).path.name == "step-00000002"
    assert "step-00000004: a symbolic link" in capsys.readouterr().err
    checkpoint.prune(run, 4, 0, None)
    assert list((run / "checkpoints").iterdir()) == [] and (tmp_path / "elsewhere/manifest.json").exists()
    (run / "checkpoints").rmdir()
    (run / "checkpoints").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="checkpoints: a symbolic link"):
        minigpt.load(run)


def test_a_link_to_a_run_or_a_checkpoint_may_be_named(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    assert minigpt.load(tmp_path / "link").path.name == "step-00000004"
    (tmp_path / "best").symlink_to(run / "checkpoints/step-00000002")
    assert minigpt.load(tmp_path / "best").path.name == "step-00000002"


@pytest.mark.parametrize("name", ["model.pkl", "tokenizer/tokenizer.pickle", "more/pytorch_model.bin"])
def test_a_file_that_the_manifest_does_not_list_is_refused(run, name):
    (newest(run) / name).parent.mkdir(exist_ok=True)
    (newest(run) / name).write_bytes(b"\x80\x04.")
    listed = name.replace("more/pytorch_model.bin", "more")
    with pytest.raises(ValueError, match=f"{listed}: not listed in manifest.json; remove it"):
        minigpt.load(newest(run))


def test_a_pipe_in_a_checkpoint_is_not_waited_for(run):
    (newest(run) / "state.json").unlink()
    os.mkfifo(newest(run) / "state.json")
    with pytest.raises(ValueError, match="state.json: missing"):
        checkpoint.verify(newest(run))


class Trap:
    """Unpickling it would be seen."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json",
                                  "tokenizer/settings.json", "tokenizer/tokenizer.model"])
def test_a_pickle_in_any_place_is_refused_and_never_run(run, name, text_file):
    """Under a manifest that is right, so that nothing but the reading of the file itself can refuse it."""
    (newest(run) / name).write_bytes(pickle.dumps(Trap()))
    forge(newest(run))
    config = tiny_config(run.parent, text_file, "--train.max_steps=6")
    with pytest.raises(ValueError, match="model.safetensors|optimizer.safetensors|state.json|config.json|tokenizer"):
        training.train(config, resume=True)
    assert not Trap.sprung


HEADERS = {
    "huge": struct.pack("<Q", 1 << 62) + b"{}",
    "longer than the file": struct.pack("<Q", 90_000_000) + b"{}",
    "a hundred megabytes of spaces": struct.pack("<Q", 100_000_000) + b"{}" + b" " * 99_999_998,
    "deep": struct.pack("<Q", 1_000_000) + b"[" * 1_000_000,
    "outside the data": struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(64),
    "no JSON": struct.pack("<Q", 4) + b"\x80\x04K.",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_safetensors_header_is_refused(run, name):
    (newest(run) / "model.safetensors").write_bytes(HEADERS[name])
    forge(newest(run))
    with pytest.raises(ValueError, match="model.safetensors(: not a safetensors file|.* missing| has 0 tensors)"):
        minigpt.load(newest(run))


def test_a_config_that_claims_a_huge_model_takes_no_memory(run):
    """Weights were allocated as config.json said, before they were compared with those that are there."""
    config = json.loads((newest(run) / "config.json").read_text())
    config["model"] |= {"width": 1 << 17, "num_heads": 1, "mlp_width": 1 << 20}
    (newest(run) / "config.json").write_text(json.dumps(config))
    forge(newest(run))
    with pytest.raises(ValueError, match="model.safetensors: .* has shape"):
        minigpt.load(newest(run))


@pytest.mark.parametrize("entry", [{"bytes": float("inf"), "sha256": ""}, {"bytes": None, "sha256": 3}, {}, 3, None,
                                   {"bytes": -1, "sha256": ""}, {"bytes": 10**400, "sha256": []}])
def test_an_entry_of_a_manifest_that_says_nothing_is_refused(run, entry):
    forge(newest(run), {"state.json": entry})
    with pytest.raises(ValueError, match="manifest.json: not a manifest|state.json: damaged"):
        minigpt.load(newest(run))


def test_a_manifest_of_gigabytes_is_not_read(run):
    with open(newest(run) / "manifest.json", "r+b") as file:
        file.truncate(6 << 30)
    with pytest.raises(ValueError, match="manifest.json: damaged, 6442450944 bytes are more than it can have"):
        minigpt.load(newest(run))


def test_folders_that_nobody_listed_are_not_walked(run):
    """Of 1500 in one another the walk ended in a RecursionError."""
    (newest(run) / "tokenizer" / "/".join("a" * 50)).mkdir(parents=True)
    with pytest.raises(ValueError, match="tokenizer/a: not listed"):
        minigpt.load(newest(run))


def test_a_config_of_more_layers_than_there_are_tensors_is_refused_at_once(run):
    """It took 40 seconds to make the layers."""
    config = json.loads((newest(run) / "config.json").read_text())
    config["model"]["depth"] = 10_000
    (newest(run) / "config.json").write_text(json.dumps(config))
    forge(newest(run))
    with pytest.raises(ValueError, match="config.json: model.depth = 10000, but model.safetensors has"):
        minigpt.load(newest(run))


def test_a_checkpoint_that_cannot_be_read_is_passed_over(run, monkeypatch, capsys):
    """A bad sector ended the command, with no word of the file."""
    whole = checkpoint.sha256_of

    def fails(path):
        if "step-00000004/model" in str(path):
            raise OSError(5, "Input/output error", str(path))
        return whole(path)

    monkeypatch.setattr(checkpoint, "sha256_of", fails)
    assert minigpt.load(run).path.name == "step-00000002"
    assert "Input/output error" in (error := capsys.readouterr().err) and "step-00000004/model.safetensors" in error


def test_a_directory_in_the_place_of_a_manifest_is_replaced(run):
    opened = minigpt.load(run / "checkpoints/step-00000002")
    (newest(run) / "manifest.json").unlink()
    (newest(run) / "manifest.json").mkdir()
    with pytest.raises(ValueError, match="manifest.json: not a file"):
        checkpoint.verify(newest(run))
    save_again(run, 4, opened)
    assert minigpt.load(run).path.name == "step-00000004"


def test_a_checkpoint_is_as_readable_as_other_files(run):
    """Its weights could be read by nobody else."""
    assert len({(newest(run) / name).stat().st_mode for name in checkpoint.REQUIRED}) == 1


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_without_any_manifest_is_not_begun_anew(run, text_file, kept):
    for path in checkpoint.in_run(run)[kept:]:
        (path / "manifest.json").unlink()
    config = tiny_config(run.parent, text_file, "--train.max_steps=6")
    if kept:
        training.train(config, resume=True)
        assert checkpoint.find(run).path.name == "step-00000006"
        return
    with pytest.raises(ValueError, match="has only damaged checkpoints"):
        training.train(config, resume=True)
    assert len(checkpoint.in_run(run)) == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "tokenizer/tokenizer.model", ".config.json.unfinished"])
def test_a_pipe_in_a_run_is_refused(run, text_file, name):
    """Resuming waited for it for ever."""
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(ValueError, match=f"{name}: neither a file nor a directory; remove it"):
        training.train(tiny_config(run.parent, text_file, "--train.max_steps=6"), resume=True)


STATES = ["[]", "3", "{}", '{"loop": {}}', '{"loop": {"step": "four"}}', '{"loop": {"unknown": 1}}',
          '{"loop": {"step": 4, "rows": -3}}', '{"loop": {"step": 1e300}}', '{"loop": {"owed": {"a": 1}}}',
          '{"loop": {"owed": {"step": 4, "train_loss": [1]}}}', '{"loop": {"evaluated": {"val_loss": "x"}}}',
          '{"loop": {"step": 4, "rows": 16, "best_loss": null}}']


@pytest.mark.parametrize("content", STATES)
def test_a_state_of_another_kind_is_refused(run, text_file, content):
    (newest(run) / "state.json").write_text(content)
    forge(newest(run))
    with pytest.raises(ValueError, match="state.json: "):
        training.train(tiny_config(run.parent, text_file, "--train.max_steps=6"), resume=True)


@pytest.mark.parametrize("key", ["random", "dataset", "dtype", "loop"])
@pytest.mark.parametrize("value", [None, 3, {"cpu": "AAAA"}, {"cpu": 3}, [[]]])
def test_a_damaged_entry_of_the_state_is_refused(run, text_file, key, value):
    path = newest(run) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    forge(newest(run))
    with pytest.raises(ValueError, match="state.json: |is not the one this run began with"):
        training.train(tiny_config(run.parent, text_file, "--train.max_steps=6"), resume=True)


def optimizer_file(run, change):
    """Rewrite optimizer.safetensors of a run's newest checkpoint as `change` says, and give what loads it."""
    path = newest(run) / "optimizer.safetensors"
    with checkpoint._opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(change(tensors), path)
    found = checkpoint.Checkpoint(newest(run))
    model = GPT(found.config.model)
    return lambda: found.load_optimizers(model, make_optimizers(model, found.config.optim))


@pytest.mark.parametrize("change, problem", [
    (lambda t: {"embedding.weight": t["embedding.weight/step"]}, "that the model does not have"),
    (lambda t: t | {"none.weight/step": t["embedding.weight/step"].clone()}, "that the model does not have"),
    (lambda t: {name: v for name, v in t.items() if name != "embedding.weight/exp_avg"}, "needs"),
    (lambda t: t | {"embedding.weight/more": t["embedding.weight/exp_avg"].clone()}, "needs"),
    (lambda t: t | {"embedding.weight/exp_avg": torch.zeros(())}, r"\(\) torch.float32, not \(300, 32\)"),
    (lambda t: t | {"embedding.weight/exp_avg": torch.zeros(300, 32, dtype=torch.float16)}, "torch.float16, not"),
])
def test_optimizer_state_of_another_model_is_refused(run, change, problem):
    """What was missing was begun anew in silence."""
    with pytest.raises(ValueError, match=f"optimizer.safetensors: .*{problem}"):
        optimizer_file(run, change)()
    optimizer_file(run, dict)


def test_without_a_manifest_it_is_no_checkpoint(run, capsys):
    """A run without any manifest was begun anew in silence."""
    (newest(run) / "manifest.json").unlink()
    assert minigpt.load(run).path.name == "step-00000002"
    assert "step-00000004: no checkpoint, manifest.json is missing; the checkpoint before it is used" in (
        capsys.readouterr().err)
    with pytest.raises(ValueError, match="holds no valid checkpoint"):
        minigpt.load(newest(run))


def save_again(run, step, opened):
    """What the loop does at a checkpoint that is the only one to be kept."""
    checkpoint.save(run / "checkpoints", step, model=opened.model, optimizers=[], state={}, config=opened.config,
                    tokenizer=opened.tokenizer)
    checkpoint.prune(run, step, keep_last=1, best_step=None)


@pytest.mark.parametrize("step", [4, 6])
def test_a_save_that_breaks_off_leaves_the_others_as_they_were(run, monkeypatch, step):
    """Whatever step of the save fails, the run's newest checkpoint stays the one from before."""
    opened = minigpt.load(run)
    for name in ("save_file", "sync_file", "sha256_of", "write_durably", "write_sealed"):
        with monkeypatch.context() as patch:
            def fail(*arguments, **options):
                raise OSError(28, "No space left on device")

            patch.setattr(checkpoint, name, fail)
            with pytest.raises(OSError, match="could not be saved .*No space left"):
                save_again(run, step, opened)
        assert minigpt.load(run).path.name == "step-00000004"
        assert not (run / "checkpoints" / checkpoint.UNFINISHED).exists()
    save_again(run, step, opened)
    assert [path.name for path in checkpoint.in_run(run)] == [f"step-{step:08d}"]


@pytest.mark.parametrize("step", [4, slow(6)])
def test_killed_at_any_operation_of_a_save_the_newest_checkpoint_is_whole(finished, tmp_path, step, capsys):
    """A child process is killed at its first, second, ... file operation, each time from the same beginning.

    Saving a step again (4) deleted its checkpoint before the new one had the name; with keep_last=1 none was left.
    """
    def count(event, arguments):
        nonlocal left
        if event.startswith(("open", "os.", "shutil.")) and str(arguments[0]).startswith(str(run)):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    opened, killed = minigpt.load(finished), 0
    while True:
        run = shutil.copytree(finished, tmp_path / str(killed))
        checkpoint.prune(run, 4, 1, None)
        child = os.fork()
        if child == 0:
            left = killed
            sys.addaudithook(count)
            save_again(run, step, opened)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        found = minigpt.load(run)
        assert found.path.name.startswith(("step-00000004", f"step-{step:08d}"))
        save_again(run, step, opened)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{step:08d}"]
        shutil.rmtree(run)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
    assert killed > 30 and capsys.readouterr().err == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_not_saved(run, value):
    opened = minigpt.load(run)
    opened.model.blocks[1].mlp.up.weight.data[3, 5] = value
    with pytest.raises(checkpoint.NotFinite, match="blocks.1.mlp.up.weight"):
        checkpoint.save(run / "checkpoints", 6, model=opened.model, optimizers=[], state={}, config=opened.config,
                        tokenizer=opened.tokenizer)
    assert [path.name for path in (run / "checkpoints").iterdir()].count("step-00000006") == 0


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
    forge(newest(run))
    with pytest.raises(ValueError, match="tokenizer has 320 tokens and the model 300"):
        minigpt.load(newest(run))


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
