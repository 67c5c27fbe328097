"""The benchmarks of decoding and of import run in small, and say what they measured."""

import json

import pytest

from benchmarks import bench_decode, bench_import


def test_every_path_draws_the_same_tokens(capsys, tmp_path):
    file = tmp_path / "result.json"
    bench_decode.main(["--shape", "toy", "--dtypes", "float32", "--prompts", "5", "40", "--batches", "1", "3",
                       "--repeats", "1", "--new-tokens", "12", "--json", str(file)])
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert json.loads(file.read_text("utf-8")) == result and len(result["rows"]) == len(table) - 1 == 16
    assert {row["path"] for row in result["rows"]} == set(bench_decode.PATHS[:4])
    assert all(row["same_tokens"] == 1 and row["tokens_per_second"] > 0 for row in result["rows"])
    assert all(row["ratio"] == 1 for row in result["rows"] if row["path"] == "transformers")


@pytest.mark.parametrize("peer", ["nanogpt", "nanogpt=nowhere", "other=."])
def test_a_peer_that_is_not_there(peer):
    with pytest.raises(SystemExit, match="give nanogpt=FOLDER, a folder that holds model.py"):
        bench_decode.main(["--peer", peer])


def test_import_and_export(capsys, monkeypatch):
    monkeypatch.setattr(bench_import, "WIDTH", 64)
    bench_import.main(["--gigabytes", "0.001", "--dtype", "bfloat16"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["same_bytes"] is True and result["float32_bytes"] > result["largest_tensor_bytes"] > 3e5
    assert 5e7 < result["import_peak_bytes"] < 2e9 and result["export_seconds"] > 0
