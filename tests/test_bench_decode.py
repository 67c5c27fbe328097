"""The benchmarks of decoding, of guesses and of import run in small, and say what they measured."""

import json

import pytest
from tiny import make_text

from benchmarks import bench_decode, bench_import, bench_speculative
from minigpt import cli


def test_every_path_draws_the_same_tokens(capsys, tmp_path):
    file = tmp_path / "result.json"
    bench_decode.main(["--shape", "toy", "--dtypes", "float32", "int8", "--prompts", "5", "40", "--batches", "1", "3",
                       "--repeats", "1", "--new-tokens", "12", "--json", str(file)])
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert json.loads(file.read_text("utf-8")) == result and len(result["rows"]) == len(table) - 1 == 28
    assert {row["path"] for row in result["rows"]} == set(bench_decode.PATHS[:4])
    assert all(row["same_tokens"] == 1 and row["tokens_per_second"] > 0 for row in result["rows"])
    assert all(row["ratio"] == 1 for row in result["rows"] if row["path"] == "transformers")
    assert all(row["weight_bytes_per_second"] > row["ratio"] > 0 for row in result["rows"])


def test_guesses_are_measured(capsys, tmp_path):
    (tmp_path / "text.txt").write_text(make_text(900), "utf-8")
    for name, width in (("run", 32), ("draft", 16)):
        cli.train(["configs/quickstart.toml", f"--data.path={tmp_path}/text.txt", f"--train.run_dir={tmp_path}/{name}",
                   "--model.depth=1", f"--model.width={width}", "--model.num_heads=2", "--model.context_length=48",
                   "--train.max_steps=2", "--tokenizer.vocab_size=300", "--train.batch_size=2"])
    capsys.readouterr()
    bench_speculative.main([str(tmp_path / "run"), "--draft", str(tmp_path / "draft"), "--prompts", "2",
                            "--new-tokens", "10", "--repeats", "1"])
    *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert len(rows) == len(table) - 1 == 6 and [row["path"] for row in rows[:3]] == ["engine", "lookup", "draft"]
    assert all(row["tokens_per_second"] > 0 and row["tokens_a_pass"] > 0.8 for row in rows)
    with pytest.raises(SystemExit):
        bench_speculative.main([str(tmp_path / "run"), "--draft", str(tmp_path / "nowhere")])
    assert "error: no run or checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("peer, message", [("nanogpt", "no model lies in"), ("nanogpt=nowhere", "no model lies in"),
                                           ("other=.", "there is liger, nanogpt, as NAME=PATH")])
def test_a_peer_that_is_not_there(peer, message, capsys):
    with pytest.raises(SystemExit):
        bench_decode.main(["--peer", peer])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("benchmark, flags", [
    (bench_decode, "--batches 0"), (bench_decode, "--repeats 0"), (bench_decode, "--new-tokens 0"),
    (bench_decode, "--json nowhere/x.json"), (bench_decode, "--dtypes int8 --paths transformers"),
    (bench_speculative, "run --draft run --prompts -3"), (bench_speculative, "run --draft run --temperatures -1"),
    (bench_speculative, "run --draft run --json nowhere/x.json")])
def test_bad_flags_are_one_line(benchmark, flags, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(flags.split())
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and not out


def test_import_and_export(capsys, monkeypatch):
    monkeypatch.setattr(bench_import, "WIDTH", 64)
    bench_import.main(["--gigabytes", "0.001", "--dtype", "bfloat16"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["same_bytes"] is True and result["float32_bytes"] > result["largest_tensor_bytes"] > 3e5
    assert 5e7 < result["import_peak_bytes"] < 2e9 and result["export_seconds"] > 0
