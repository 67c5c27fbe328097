"""The benchmarks of ops run on a CPU in small, print a table, and end with one JSON object, as in --json's file."""

import csv
import importlib
import importlib.util
import itertools
import json
import shutil
import sys

import pytest
import torch
from compare import check_op

from benchmarks import bench_attention, formula, harness, norms, report, timing
from kernels import reference

SMALL = {
    "attention": ["--tokens", "32", "--width", "16", "--lengths", "8", "16", "--head-sizes", "8", "--masks", "causal"],
    "layer_norm": ["--rows", "8", "--widths", "16", "24"],
    "rms_norm": ["--rows", "8", "--widths", "16", "24"],
    "linear_cross_entropy": ["--sizes", "16x8x40", "8x8x40"],
    "activations": ["--rows", "8", "--widths", "16", "24", "--ops", "gelu"],
    "rotary": ["--tokens", "32", "--lengths", "8", "16"],
    "split_heads": ["--head-sizes", "8"],
    "decode_attention": ["--lengths", "8", "16"],
    "quantized_linear": ["--sizes", "128", "--rows", "1"],
}
PATH = dict.fromkeys(SMALL, "reference") | {"attention": "plain"}
"""One that exists everywhere."""
LABELS = dict.fromkeys(SMALL, ("width", (16, 24))) | dict.fromkeys(
    ("attention", "rotary", "decode_attention"), ("length", (8, 16))) | {
    "linear_cross_entropy": ("targets", (16, 8)), "quantized_linear": ("bits", (8, 4)),
    "split_heads": ("group", (1, 4))}
DIRECTIONS = dict.fromkeys(SMALL, harness.DIRECTIONS) | {
    "linear_cross_entropy": harness.WITH_GRADIENTS, "decode_attention": ("inference",),
    "quantized_linear": ("inference",)}
IN_FLOPS = {"attention", "linear_cross_entropy"}
every_op = pytest.mark.parametrize("op", SMALL)


def run(op, *options):
    importlib.import_module(f"benchmarks.bench_{op}").main(["--device", "cpu", *SMALL[op], "--repeats", "3", *options])


def error_of(capsys, op, *options):
    """The one line that a command writes which cannot be run."""
    with pytest.raises(SystemExit) as stopped:
        run(op, *options)
    assert stopped.value.code == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1
    return error


@every_op
def test_a_benchmark(op, capsys, tmp_path):
    file = tmp_path / "result.json"
    run(op, "--paths", PATH[op], "--json", str(file))
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result == json.loads(file.read_text("utf-8"))
    ceiling = "matmul_tflop_per_s" if op in IN_FLOPS else "copy_tb_per_s"
    assert result["benchmark"] == op and result[ceiling] > 0 and result["torch"] and result["complete"]
    label, sizes = LABELS[op]
    assert [(row["direction"], row[label], row["path"]) for row in result["results"]] == [
        (direction, size, PATH[op]) for size in sizes for direction in DIRECTIONS[op]]
    for row in result["results"]:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["peak_bytes"] is None
        share = row[f"share_of_{ceiling.partition('_')[0]}"]
        assert share == pytest.approx(row[result["rate"]] / result[ceiling], rel=1e-3)
    assert len(table) == 2 + len(result["results"])


def test_what_attention_counts(capsys):
    """4 B H T² D operations forward, half with a causal mask, 2.5 times as many backward."""
    run("attention", "--masks", "causal", "full", "--paths", "plain")
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert len(rows) == 8
    for row in rows:
        flops = 4 * 32 * row["length"] * 16 * (1 if row["mask"] == "full" else 0.5)
        flops *= 2.5 if row["direction"] == "backward" else 1
        assert row["tflop_per_s"] * row["median_ms"] * 1e9 == pytest.approx(flops, rel=1e-3)


def test_attention_gets_views_of_one_projection_and_paths_agree():
    cpu = torch.device("cpu")
    (tensors, _), (grad,) = bench_attention.inputs(2, 16, 2, 8, torch.float32, cpu, 2)
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == 1 and not any(x.is_contiguous() for x in tensors)
    for causal in (True, False):
        def op(*qkv, causal=causal):
            return bench_attention.attend(causal, bench_attention.available(cpu)["sdpa_flash"].call, *qkv)
        check_op(op, lambda *qkv, causal=causal: formula.attention(*qkv, causal=causal), tensors, 1e-5)


DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 5]])


@pytest.mark.parametrize("S, options", [
    *itertools.product((7, 9, 3), (dict(causal=True), dict(causal=False), dict(causal=True, window=2))),
    (7, dict(causal=True, document_ids=DOCUMENTS)), (7, dict(causal=False, window=3, document_ids=DOCUMENTS))], ids=str)
def test_the_formula_of_attention_is_the_reference(S, options):
    """Which tests of the op compare with a formula of their own, key by key."""
    torch.manual_seed(0)
    qkv = [torch.randn(2, length, heads, 6, dtype=torch.float64) for length, heads in ((7, 4), (S, 2), (S, 2))]
    check_op(lambda *x: formula.attention(*x, **options), lambda *x: reference.attention(*x, **options), qkv, 1e-12)


def test_scores_that_do_not_fit_are_not_tried(capsys, monkeypatch):
    monkeypatch.setattr(timing, "free_bytes", lambda device: 6 * 4 * 2 * 32 * 8)    # enough for a length of 8
    run("attention", "--paths", "plain", "sdpa_flash")
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert {(row["path"], row["length"]) for row in rows if "error" in row} == {("plain", 16)}
    assert all("MemoryError: the scores would take" in row["error"] for row in rows if row["length"] == 16
               and row["path"] == "plain")


@pytest.mark.parametrize("op, options, message", [
    ("layer_norm", ["--paths", "reference", "cudnn"], "no path cudnn here; there is: "),
    ("attention", ["--lengths", "8", "5"], "--lengths 5 does not divide 32"),
    ("attention", ["--head-sizes", "3"], "--head-sizes 3 does not divide 16"),
    ("quantized_linear", ["--sizes", "100"], "--sizes 100 is no multiple of 128"),
    ("rotary", ["--lengths", "5"], "--lengths 5 does not divide 32"),
    ("split_heads", ["--head-sizes", "7"], "--head-sizes 7 is odd or does not make heads of width 128 in groups of 4"),
    ("linear_cross_entropy", ["--sizes", "8x8"], "argument --sizes: '8x8' is not targets x width x vocabulary, as in "),
    ("activations", ["--ops", "tanh"], "argument --ops: invalid choice: 'tanh'"),
    ("rms_norm", ["--rows", "0"], "argument --rows: '0' is not a whole number of at least 1"),
    ("rms_norm", ["--json", "/nowhere/x.json"], "--json /nowhere/x.json: there is no such folder"),
    ("rms_norm", ["--json", "/proc/x.json"], "--json: "),
    ("rms_norm", ["--plot", "x.txt"], "--plot x.txt: the name must end with .png, .svg or .pdf"),
    ("rms_norm", ["--peer", "liger=."], "--peer liger=.: no liger_kernel lies in "),
    ("rms_norm", ["--peer", "lion=."], "--peer lion=.: there is liger, nanogpt, as NAME=PATH"),
])
def test_what_cannot_be_run_is_one_line(op, options, message, capsys):
    assert error_of(capsys, op, *options).startswith(f"error: {message}")


@every_op
def test_without_matplotlib_nothing_is_measured(op, capsys, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib"
                        else found(name, *rest))
    error = error_of(capsys, op, "--plot", str(tmp_path / "plot.png"))
    assert error.startswith("error: --plot needs matplotlib: pip install 'minigpt[viz]'")


def test_without_a_gpu_the_device_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert error_of(capsys, "attention", "--device", "cuda").startswith("error: there is no CUDA GPU here")


@every_op
def test_a_plot(op, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    run(op, "--paths", PATH[op], "--plot", str(tmp_path / "plot.svg"))
    plot = (tmp_path / "plot.svg").read_text("utf-8")
    assert plot.startswith("<?xml") and len(plot) > 10_000


def test_a_table_and_a_plot_of_several_results(tmp_path):
    pytest.importorskip("matplotlib")

    def result(*rows):
        return {"benchmark": "attention", "dtype": "bfloat16", "device": "x", "torch": "2", "triton": "3", "date": "d",
                "rate": "tflop_per_s", "labels": ["mask", "length"], "results": [
                    {"direction": "forward", "mask": "full", "length": length, "path": path, **figures}
                    for path, length, figures in rows]}

    one = result(("a", 8, {"tflop_per_s": 12.345}), ("a", 16, {"error": "no"}))
    two = result(("bb", 16, {"tflop_per_s": 2}))
    merged = report.merged([one, two])["attention"]
    assert len(one["results"]) == 2 and len(merged["results"]) == 3
    assert [line.split() for line in report.table(merged)] == [
        ["attention,", "bfloat16,", "TFLOP/s"], ["direction", "mask", "length", "a", "bb"],
        ["forward", "full", "8", "12.35"], ["forward", "full", "16", "-", "2"]]
    for ending in ("png", "pdf"):
        report.draw(merged, str(tmp_path / f"plot.{ending}"))
        assert (tmp_path / f"plot.{ending}").stat().st_size > 1000


def test_a_peer_is_taken_from_its_folder(capsys, monkeypatch, tmp_path):
    """One that is put first on the path, as a benchmark without it says."""
    package = tmp_path / "liger_kernel"
    package.mkdir()
    (package / "__init__.py").write_text("HERE = 'the peer'\n", "utf-8")
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.delitem(sys.modules, "liger_kernel", raising=False)
    run("rms_norm", "--paths", "reference", "--peer", f"liger={tmp_path}")
    assert importlib.import_module("liger_kernel").HERE == "the peer"
    del sys.modules["liger_kernel"]


def test_calls_are_timed_in_turn():
    seen = []
    times = timing.seconds([lambda: seen.append("a"), lambda: seen.append("b")], torch.device("cpu"), 5)
    assert len(times) == 5 and seen[-5:] == ["b", "a", "b", "a", "b"]


def test_slow_calls_are_repeated_less_often(monkeypatch):
    monkeypatch.setattr(timing, "MOST_SECONDS", 0.0)
    assert len(timing.seconds([lambda: None], torch.device("cpu"), 50)) == timing.LEAST_REPEATS
    assert len(timing.seconds([lambda: None], torch.device("cpu"), 3)) == 3


def test_a_path_that_fails_costs_no_other_and_the_file_has_what_was_measured(capsys, monkeypatch, tmp_path):
    file = tmp_path / "result.json"
    lengths = []

    def fails(*arguments):
        lengths.append(len(json.loads(file.read_text("utf-8")).get("results", ())))
        raise NotImplementedError("not\nhere")

    monkeypatch.setattr(norms, "available", lambda op, *_: {
        name: harness.OpPath(call) for name, call in (("broken", fails), ("reference", getattr(reference, op)))})
    run("rms_norm", "--json", str(file))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert {row.get("error") for row in rows if row["path"] == "broken"} == {"NotImplementedError: not"}
    assert all(row["median_ms"] > 0 for row in rows if row["path"] == "reference")
    assert lengths == [0, 1, 4, 5]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_gradients_of_a_compiled_function_can_be_taken_again():
    x = torch.rand(4, requires_grad=True)
    y = timing.compiled(lambda x: x.sin().exp())(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_the_proof_of_learning_in_small(capsys, tmp_path, monkeypatch):
    """Every row is there, no file is both learnt from and held out, and half of the pairs are of one file."""
    from benchmarks import learning
    from minigpt import corpus

    files = [document for document in corpus.list_documents("stdlib") if document.path.stat().st_size < 20_000][:40]
    monkeypatch.setattr(learning, "list_documents", lambda path: files)
    monkeypatch.setattr(learning, "TABLES", {"train": 40, "val": 30})
    out, sizes = tmp_path / "result.json", ["--steps", "2", "--class-steps", "2", "--seeds", "1"]
    small = ["--tokenizer.kind=bytes", "--model.depth=1", "--model.width=16", "--model.num_heads=2"]
    train = learning.trained
    monkeypatch.setattr(learning, "trained", lambda config, folder, name, *overrides: train(
        config, folder, name, *overrides, *(small if config.startswith("bert") else ["--train.batch_size=8"])))
    learning.main([*sizes, "--work", str(tmp_path / "work"), "--json", str(out)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text()) and result["pairs"] > 50
    rows = {row["what"]: row["accuracy"] for row in result["rows"]}
    assert len(rows) == 6 and all(0 <= accuracy <= 1 for accuracy in rows.values())
    low, high = result["rows"][2]["interval"]
    assert low < rows["next sentences"] < high
    work = tmp_path / "work"
    train_files, val_files = ({file.relative_to(work / split) for file in (work / split).rglob("*") if file.is_file()}
                              for split in ("train", "val"))
    assert len(train_files) + len(val_files) == len(files) and val_files and not train_files & val_files
    labels = [row["label"] for row in csv.DictReader((work / "val.csv").open(newline="", encoding="utf-8"))]
    assert labels.count("same") == labels.count("other") == 15
