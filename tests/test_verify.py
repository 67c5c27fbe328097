"""`minigpt verify`: every kind of damage is found and named, what is merely unfinished is no damage, and the exit code
says which."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny import make_text, tiny_config

from minigpt import checkpoint, cli, training
from minigpt import verify as verifying
from minigpt.config import DataConfig, TokenizerConfig
from minigpt.data import prepare
from minigpt.files import held


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_file):
    """A finished run with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    training.train(tiny_config(folder, text_file, "--train.max_steps=4", "--train.checkpoint_every=2",
                               "--train.eval_every=4", '--train.sample_prompts=["a"]', "--train.sample_tokens=4"))
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """Shards of 1000 tokens."""
    monkeypatch.setattr("minigpt.shards.SHARD_TOKENS", 1000)
    (tmp_path / "a.txt").write_text(make_text(60), "utf-8")
    return prepare(DataConfig(path=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache")),
                   TokenizerConfig(kind="bytes")).directory


@pytest.fixture
def verify(capsys):
    """verify(path) runs the command and gives its exit code and {path below `path`: (status, detail)}."""
    def verify(path):
        lines = call(capsys, str(path))[1].splitlines()
        code, out = call(capsys, str(path), "--json")
        result = json.loads(out)
        assert result.keys() == {"path", "ok", "findings"} and result["path"] == str(path)
        assert result["ok"] == (code == 0) and out.count("\n") == 1
        assert lines == [f"{finding['status']:<10}  {finding['path']}: {finding['detail']}"
                         for finding in result["findings"]]
        return code, {finding["path"].removeprefix(str(path)).strip("/"): (finding["status"], finding["detail"])
                      for finding in result["findings"]}
    return verify


def call(capsys, *arguments):
    try:
        cli.main(["verify", *arguments])
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().out


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def statuses(findings):
    return {path: status for path, (status, _) in findings.items()}


WHOLE_RUN = {"config.json", "tokenizer", "metrics.jsonl", "samples.jsonl", "checkpoints/step-00000004",
             "checkpoints/step-00000002"}


def test_a_whole_run(run, verify):
    code, findings = verify(run)
    assert code == 0 and statuses(findings) == dict.fromkeys(WHOLE_RUN, "ok")
    assert findings["checkpoints/step-00000004"][1].startswith("7 files, 0.")
    assert (findings["metrics.jsonl"][1], findings["samples.jsonl"][1]) == ("4 lines", "1 lines")


DAMAGE = {
    "a flipped byte": ("checkpoints/step-00000002/model.safetensors", flip),
    "a byte too few": ("checkpoints/step-00000004/state.json", lambda path: os.truncate(path, 9)),
    "a missing file": ("checkpoints/step-00000004/optimizer.safetensors", os.unlink),
    "a broken manifest": ("checkpoints/step-00000002/manifest.json", flip),
    "a file too many": ("checkpoints/step-00000002/more", lambda path: path.touch()),
    "a config that is no JSON": ("config.json", lambda path: os.truncate(path, 9)),
    "no config": ("config.json", os.unlink),
    "a tokenizer's model": ("tokenizer", lambda path: flip(path / "tokenizer.model")),
    "no tokenizer": ("tokenizer", shutil.rmtree),
    "no metrics": ("metrics.jsonl", os.unlink),
    "a pipe for samples": ("samples.jsonl", lambda path: (path.unlink(), os.mkfifo(path))),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_each_damage_is_named_and_the_rest_is_whole(run, verify, case):
    name, damage = DAMAGE[case]
    damage(run / name)
    code, findings = verify(run)
    assert code == 1 and findings[name][0] == "damaged" and findings[name][1]
    rest = {path: status for path, status in statuses(findings).items() if path != name}
    assert rest == dict.fromkeys((path for path in WHOLE_RUN if not name.startswith(path)), "ok")


def test_a_setting_that_is_unknown_is_named_with_its_line(run, verify):
    path = run / "config.json"
    path.write_text(path.read_text("utf-8").replace('"depth"', '"dept"'), "utf-8")
    code, findings = verify(run)
    [(place, detail)] = [(path, detail) for path, (status, detail) in findings.items() if status == "damaged"]
    assert code == 1 and place.startswith("config.json:") and detail.startswith("unknown key model.dept")


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b"3", b'"step"', b"{}", b'{"step": "2"}', b'{"step": true}',
                                  b"\xff", b"\0" * 9, b"[" * 100_000])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_line_of_a_log_that_is_no_record_is_named(run, verify, name, line):
    whole = (run / name).read_bytes()
    number = whole.count(b"\n") + 1
    (run / name).write_bytes(whole + line + b"\n" + whole)
    code, findings = verify(run)
    assert code == 1 and findings[f"{name}:{number}"] == ("damaged", "this line is no JSON object with a step")
    (run / name).write_bytes(whole + line + b"\n" + line + b"\n" + whole[:-1])
    assert verify(run)[1][f"{name}:{number}"][1].endswith(", nor are 1 lines after it")


def test_a_last_line_that_a_kill_cut_off_is_no_damage(run, verify):
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = run / name
        os.truncate(path, path.stat().st_size - 1)
    code, findings = verify(run)
    assert code == 0 and findings["metrics.jsonl"][0] == findings["samples.jsonl"][0] == "unfinished"
    assert "line 4, the last, is cut off" in findings["metrics.jsonl"][1]


def test_a_save_that_was_cut_off_is_no_damage(run, verify):
    (run / "checkpoints/step-00000002/manifest.json").unlink()
    shutil.copytree(run / "checkpoints/step-00000002", run / "checkpoints/.unfinished")
    code, findings = verify(run)
    cut_off = {"checkpoints/step-00000002", "checkpoints/.unfinished"}
    assert code == 0
    assert statuses(findings) == {name: "unfinished" if name in cut_off else "ok" for name in WHOLE_RUN | cut_off}
    for name in cut_off:
        code, findings = verify(run / name)
        assert code == 0 and statuses(findings) == {"": "unfinished"}


def test_a_manifest_that_is_gone_from_the_newest_checkpoint_is_damage(run, verify):
    """Only a removal, which takes older ones, leaves a checkpoint without; it was called unfinished."""
    (run / "checkpoints/step-00000004/manifest.json").unlink()
    code, findings = verify(run)
    assert code == 1 and findings["checkpoints/step-00000004"] == ("damaged", "manifest.json is missing")


def test_a_run_with_only_damaged_checkpoints_says_so(run, verify):
    for path in checkpoint.in_run(run):
        flip(path / "state.json")
    code, findings = verify(run)
    assert code == 1 and findings[""] == ("damaged", "no checkpoint of it is whole")


def test_a_run_without_a_checkpoint_is_fine_and_said(run, verify):
    shutil.rmtree(run / "checkpoints")
    code, findings = verify(run)
    assert code == 0 and findings[""] == ("unfinished", "it has no checkpoint yet")
    (run / "samples.jsonl").unlink()
    code, findings = verify(run)
    assert code == 0 and findings["samples.jsonl"] == ("unfinished", "not written yet")


def test_checkpoints_in_another_place_are_not_followed(run, verify, tmp_path):
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    code, findings = verify(run)
    assert code == 1 and findings["checkpoints"][0] == "damaged"


def test_a_checkpoint_by_itself(run, verify, tmp_path):
    path = run / "checkpoints/step-00000002"
    code, findings = verify(path)
    assert code == 0 and statuses(findings) == {"": "ok"}
    (tmp_path / "link").symlink_to(path)
    assert verify(tmp_path / "link")[0] == 0
    shutil.copytree(path, tmp_path / "moved")
    assert verify(tmp_path / "moved")[0] == 0
    flip(path / "tokenizer/settings.json")
    code, findings = verify(path)
    assert code == 1 and statuses(findings) == {"tokenizer/settings.json": "damaged"}


def test_a_whole_data_set(data_set, verify):
    (data_set / "stray.bin").touch()
    code, findings = verify(data_set)
    assert code == 0 and set(statuses(findings).values()) == {"ok"}
    assert findings.keys() == {"index.json", "val-00000.bin", "train-00000.bin", "train-00001.bin", "train-00002.bin"}
    assert findings["train-00001.bin"][1] == "1,000 tokens"


@pytest.mark.parametrize("damage", [flip, os.unlink, lambda path: os.truncate(path, 9)], ids=["flip", "remove", "cut"])
def test_each_file_of_a_data_set_that_is_damaged_is_named(data_set, verify, damage):
    for name in ("train-00001.bin", "val-00000.bin"):
        damage(data_set / name)
    code, findings = verify(data_set)
    damaged = {path for path, status in statuses(findings).items() if status == "damaged"}
    assert code == 1 and damaged == {"train-00001.bin", "val-00000.bin"}
    damage(data_set / "index.json")
    code, findings = verify(data_set)
    assert code == 1 and statuses(findings) == {"index.json": "damaged"}


def test_what_is_none_of_the_three_is_an_error(tmp_path, text_file, capsys):
    for path, message in ((tmp_path / "none", "no run, checkpoint or data set"), (tmp_path, "is no run, checkpoint or"),
                          (text_file, "is no run, checkpoint or")):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["verify", str(path)])
        out, error = capsys.readouterr()
        assert stopped.value.code == 2 and out == ""
        assert error.startswith("error: ") and error.count("\n") == 1 and str(path) in error and message in error
    assert tmp_path.is_dir() and not (tmp_path / "none").exists()


def test_a_run_in_use_is_checked_and_said_to_be(run, verify, monkeypatch):
    monkeypatch.setattr(verifying, "SECOND_LOOK_SECONDS", 0)
    with held(run):
        code, findings = verify(run)
        assert code == 0 and statuses(findings) == dict.fromkeys(WHOLE_RUN, "ok") | {"": "in use"}
        flip(run / "checkpoints/step-00000002/state.json")
        code, findings = verify(run)
        assert code == 1 and findings["checkpoints/step-00000002/state.json"][0] == "damaged"


def test_a_checkpoint_pruned_while_it_is_read_is_passed_over(run, verify, monkeypatch):
    monkeypatch.setattr(verifying, "SECOND_LOOK_SECONDS", 0)
    read = checkpoint.sha256_of

    def prune(path):
        if path.name == "model.safetensors" and path.parent.name == "step-00000002":
            checkpoint.delete(path.parent)
        return read(path)

    monkeypatch.setattr(checkpoint, "sha256_of", prune)
    with held(run):
        code, findings = verify(run)
    assert code == 0 and statuses(findings).keys() == WHOLE_RUN - {"checkpoints/step-00000002"} | {""}


def test_a_file_replaced_while_it_is_read_is_read_again(run, verify, monkeypatch):
    whole = (run / "tokenizer/settings.json").read_bytes()
    (run / "tokenizer/settings.json").write_bytes(whole[:9])
    monkeypatch.setattr(verifying.time, "sleep", lambda seconds: (run / "tokenizer/settings.json").write_bytes(whole))
    with held(run):
        assert verify(run)[0] == 0


def test_the_lock_is_held_while_a_run_is_read(run):
    findings = verifying.verify(run)
    next(findings)
    with pytest.raises(ValueError, match="in use by another process"), held(run):
        pass
    list(findings)
    with held(run):
        pass


def test_a_data_set_is_checked_without_torch(data_set):
    code = "import sys; from minigpt import cli; cli.main(['verify', sys.argv[1]]); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code, data_set], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"


def test_a_name_with_a_newline_forges_no_line(run, capsys):
    (run / "checkpoints/step-00000002/a\nok          all").touch()
    code, out = call(capsys, str(run))
    assert code == 1 and "a\\nok          all: not listed" in out and len(out.splitlines()) == len(WHOLE_RUN)
