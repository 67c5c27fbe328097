"""The benchmarks of ops run on a CPU in small, print a table, and end with one JSON object, as in --json's file."""

import importlib
import json
import shutil

import pytest
import torch

from benchmarks import harness
from kernels import reference

SMALL = ["--device", "cpu", "--rows", "8", "--widths", "16", "24", "--repeats", "3"]


def module(name):
    return importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("name", ["bench_layer_norm", "bench_rms_norm"])
def test_norms(name, capsys, tmp_path):
    file = tmp_path / "result.json"
    module(name).main([*SMALL, "--paths", "reference", "--json", str(file)])
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result == json.loads(file.read_text("utf-8"))
    assert f"bench_{result['benchmark']}" == name and result["copy_tb_per_s"] > 0 and result["torch"]
    assert [(row["direction"], row["width"], row["path"]) for row in result["results"]] == [
        (direction, width, "reference") for width in (16, 24) for direction in ("forward", "backward")]
    for row in result["results"]:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["peak_bytes"] is None
    assert len(table) == 2 + len(result["results"])


def test_a_path_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        module("bench_layer_norm").main([*SMALL, "--paths", "reference", "cudnn"])
    assert "no path cudnn here; there is: reference, compiled" in capsys.readouterr().err


def test_calls_are_timed_in_turn():
    seen = []
    times = harness.seconds([lambda: seen.append("a"), lambda: seen.append("b")], torch.device("cpu"), 5)
    assert len(times) == 5 and seen[-5:] == ["a", "b", "a", "b", "a"]


def test_a_path_that_fails_costs_no_other(capsys, monkeypatch):
    from benchmarks import norms

    def fails(*arguments):
        raise NotImplementedError("not\nhere")

    monkeypatch.setattr(norms, "available", lambda op, *_: {"broken": fails, "reference": getattr(reference, op)})
    module("bench_rms_norm").main(SMALL)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert {row.get("error") for row in rows if row["path"] == "broken"} == {"NotImplementedError: not"}
    assert all(row["median_ms"] > 0 for row in rows if row["path"] == "reference")


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_gradients_of_a_compiled_function_can_be_taken_again():
    x = torch.rand(4, requires_grad=True)
    y = harness.compiled(lambda x: x.sin().exp())(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
