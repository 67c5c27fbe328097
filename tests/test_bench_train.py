"""The benchmark of a training step: its paths take the same step, and its profile counts what arithmetic says."""

import functools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_train, roofline
from minigpt import optim

L, C, B, T, V = 2, 32, 2, 16, 320
TINY = ["configs/quickstart.toml", f"--model.depth={L}", f"--model.width={C}", "--model.num_heads=2",
        f"--model.context_length={T}", f"--model.vocab_size={V}", f"--train.batch_size={B}", "--device", "cpu",
        "--repeats", "2"]
GPT2 = ["--model.norm=layer_norm", "--model.mlp=gelu", "--model.position=learned", "--model.qk_norm=false",
        "--model.bias=true", "--optim.name=adamw"]
CONFIG = bench_train.read_config(TINY[0], [word for word in TINY if "." in word and word != TINY[0]] + GPT2)
PEER = """
import torch, dataclasses
@dataclasses.dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert dataclasses.astuple(config) == (16, 320, 2, 2, 32, 0.0, True)
        print("made")
        self.table = torch.nn.Embedding(320, 320)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)
    def forward(self, inputs, targets):
        logits = self.table(inputs)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def run(capsys, *options):
    """The lines of the table and the object after it."""
    bench_train.main([*TINY, *options])
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_paths_take_the_same_step(capsys, tmp_path):
    file = tmp_path / "result.json"
    (tmp_path / "model.py").write_text(PEER, "utf-8")
    lines, result = run(capsys, *GPT2, "--peer", f"nanogpt={tmp_path}", "--train.accumulation_steps=2", "--json",
                        str(file), "--paths", "reference", "plain", "nanogpt")
    assert result == json.loads(file.read_text("utf-8")) and result["complete"] and result["accumulation"] == 2
    rows = {row["path"]: row for row in result["results"]}
    assert [*rows] == ["reference", "plain", "nanogpt"] and not any("error" in row for row in rows.values())
    assert rows["reference"]["first_loss"] == pytest.approx(rows["plain"]["first_loss"], rel=1e-4)
    for row in rows.values():
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and 4 < row["first_loss"] < 8
        assert row["tokens_per_s"] * row["median_ms"] / 1e3 == pytest.approx(2 * B * T, rel=1e-3)
    assert len(lines) == 2 + 3


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_the_compiled_path(capsys):
    _, result = run(capsys, "--model.depth=1", "--paths", "plain", "compiled")
    plain, compiled = result["results"]
    assert compiled["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-4)


def test_what_one_path_raises_costs_no_other(capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.timing.free_bytes", lambda device: 1000)
    _, result = run(capsys, "--paths", "plain", "reference")
    plain, reference = result["results"]
    assert plain["error"].startswith("MemoryError: the logits would take") and reference["median_ms"] > 0


@pytest.mark.parametrize("change, named", [
    ("--model.mlp=swiglu", "model.mlp"), ("--model.num_kv_heads=1", "model.num_kv_heads"),
    ("--model.mlp_width=64", "model.mlp_width"), ("--optim.name=muon", "optim.name"),
    ("--model.tied_embeddings=false", "model.tied_embeddings")])
def test_nanogpt_is_measured_at_its_own_shape_only(change, named, capsys, tmp_path):
    (tmp_path / "model.py").write_text(PEER, "utf-8")
    with pytest.raises(SystemExit) as stopped:
        run(capsys, *GPT2, change, "--peer", f"nanogpt={tmp_path}", "--paths", "nanogpt")
    assert stopped.value.code == 1                      # no path could be measured
    row, = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert row["error"] == f"ValueError: nanoGPT has another {named}; take a recipe of GPT-2's kind"


@pytest.mark.parametrize("options, message", [
    (["--paths", "reference", "jax"], "no path jax here; there is: reference, plain, compiled"),
    (["--objective.name=masked"], "objective.name = 'masked': what is measured here is causal; leave it out"),
    (["--model.depth=none"], "command line: model.depth"),
    (["--data.document_mask=true"], "data.document_mask = true: not all paths can hide documents; leave it out"),
    (["--model.vocab_size=4"], "model.vocab_size = 4 is too small; make it more than 5"),
    (["--profile", "--dtype", "float32"], "--profile without a GPU: floors are known for bfloat16 alone"),
    (["--json", "/tmp"], "--json /tmp: a folder; name a file in it"),
    (["--profile", "--paths", "reference"], "--profile is of the path triton, and no plot; leave --paths"),
    (["--json", "/proc/x.json"], "[Errno"),
    (["--peer", "nanogpt=."], "--peer nanogpt=.: no model lies in "),
])
def test_what_cannot_be_run_is_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_train.main([*TINY, *options])
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and not out and error.count("\n") == 1 and error.startswith(f"error: {message}")


def profile(capsys, *options):
    lines, result = run(capsys, "--profile", *options)
    return lines, result, {name: SimpleNamespace(**group) for name, group in result["groups"].items()}


def test_the_profile_counts_what_arithmetic_says(capsys):
    """In bfloat16 with a float32 stream: numbers of tokens x width, and their bytes, by hand."""
    lines, result, groups = profile(capsys, *GPT2)
    tokens, pairs = B * T, B * T * (T + 1) // 2
    assert result["step_seconds"] is None and {group.measured for group in groups.values()} == {None}
    assert groups["projections"].flops == 6 * tokens * L * 12 * C * C
    assert groups["projections"].calls == 4 * L * 3
    assert groups["head and loss"].flops == 6 * tokens * C * V
    assert groups["attention"].flops == (4 + 10) * L * pairs * C and groups["attention"].calls == 2 * L
    assert groups["activations"].num_bytes == L * (5 * tokens * 4 * C * 2 + 3 * 4 * C * 4)
    statistics, affine = 2 * tokens * 4, 2 * C * 4
    first = 4 * (tokens * C * 4) + statistics + affine                  # x and the stream are both in float32
    forward = tokens * C * (2 + 4 + 2 + 4) + statistics + affine
    backward = tokens * C * (2 + 4 + 4 + 4 + 2) + statistics + 2 * affine
    last = backward - tokens * C * 4                                    # nothing follows that uses the sum
    first_back = 4 * (tokens * C * 4) + statistics + 2 * affine
    assert groups["norms"].num_bytes == first + 2 * L * forward + (2 * L - 1) * backward + last + first_back
    floor = max(groups["attention"].num_bytes / 3.0e12, groups["attention"].flops / 798e12)
    assert groups["attention"].floor == pytest.approx(floor, rel=0.2)
    assert "copies" not in lines[2] and lines[-1].startswith("all")
    assert sum(group.floor for group in groups.values()) * 1e3 == pytest.approx(float(lines[-1].split()[-1]), rel=1e-3)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_values_are_counted_where_they_are_moved(qk_norm, capsys):
    """Two query heads, one for keys and one for values: 3 of 4 are read and written, backward all are written."""
    *_, groups = profile(capsys, "--model.num_kv_heads=1", f"--model.qk_norm={str(qk_norm).lower()}")
    head, tables, weights = B * T * C // 2 * 2, 2 * T * C // 2 // 2 * 4, 2 * C // 2 * 4 * qk_norm
    forward = 3 * head + 3 * head + tables + weights
    backward = 4 * head + 3 * head * qk_norm + 4 * head + tables + 2 * weights
    assert groups["heads"].num_bytes == L * (forward + backward)


def test_the_optimizer_is_a_group_of_its_own(capsys, monkeypatch):
    """AdamW reads and writes weight and two moments and reads the gradient; clipping reads and scales it; two norms."""
    *_, groups = profile(capsys, *GPT2)
    parameters = V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    adamw, clipping, norms = 7, 1 + 2, 1
    assert groups["clipping and optimizer"].num_bytes == pytest.approx(4 * parameters * (adamw + clipping + norms),
                                                                       rel=0.01)
    *_, groups = profile(capsys, *GPT2, "--optim.name=muon")
    newton_schulz = sum(2 * 5 * (2 * big * small**2 + small**3) * L for big, small in
                        ((3 * C, C), (C, C), (4 * C, C), (4 * C, C)))
    assert groups["clipping and optimizer"].flops == newton_schulz
    monkeypatch.setitem(optim.PRODUCT_DTYPES, "cuda", torch.float32)
    *_, wide = profile(capsys, *GPT2, "--optim.name=muon")
    assert groups["clipping and optimizer"].num_bytes < 0.8 * wide["clipping and optimizer"].num_bytes


def test_a_loss_scale_skips_no_counted_step(capsys):
    """Regression: the counter's answer to the scaler's question for overflows was yes, so no optimizer ran."""
    def make():
        step = bench_train.Own("triton")(CONFIG, torch.device("cpu"), torch.float16)
        return functools.partial(step, bench_train.batches(CONFIG)[0])

    groups = roofline.count(make, roofline.H100)
    *_, plain = profile(capsys, *GPT2)
    assert groups["clipping and optimizer"].num_bytes >= plain["clipping and optimizer"].num_bytes


def test_a_window_is_counted_as_the_pairs_it_leaves(capsys):
    *_, groups = profile(capsys, "--model.window=3")
    assert groups["attention"].flops == 14 * L * B * C * (1 + 2 + 3 * (T - 2))


def test_kernels_belong_to_the_op_that_launched_them():
    def event(*names, **more):
        made = None
        for name in names:
            made = SimpleNamespace(name=name, cpu_parent=made, kernels=[])
        made.__dict__.update(more)
        return made

    kernel = SimpleNamespace(duration=3000.0)
    groups = {"norms": roofline.Group(floor=0.001)}
    roofline.measure([
        event("minigpt::norm", kernels=[kernel]), event("minigpt::norm_backward", kernels=[kernel, kernel]),
        event("aten::linear", "aten::addmm", kernels=[kernel]), event("MmBackward0", "aten::mm", kernels=[kernel]),
        event("minigpt::linear_cross_entropy_sum", "aten::mm", kernels=[kernel]),
        event(roofline.UPDATE, "aten::bmm", kernels=[kernel]), event("aten::to", "aten::_to_copy", "aten::copy_",
                                                                     kernels=[kernel]),
        event("aten::erfinv", kernels=[kernel]), event("aten::mm")], groups, 3, roofline.on_gpu)
    assert {name: round(group.measured * 1e3, 6) for name, group in groups.items()} == {
        "norms": 3, "projections": 2, "head and loss": 1, "clipping and optimizer": 1, "casts and copies": 1,
        "other": 1}
    lines = roofline.table(groups, 0.011)
    assert lines[1].split() == ["norms", "0", "0", "0", "1", "3", "33.3%"]
    assert lines[-1].split() == ["no", "kernel", "2"] and lines[-2].split()[-2] == "9"


def test_a_real_profile_is_attributed():
    """On a CPU the time of ops stands in for that of kernels."""
    step = bench_train.Own("reference")(CONFIG, torch.device("cpu"), torch.float32)
    batch, *_ = bench_train.batches(CONFIG)
    step(batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(batch)
    groups = {}
    events = [event for event in profiler.events() if event.name != roofline.UPDATE]
    roofline.measure(events, groups, 1, lambda event: event.self_cpu_time_total / 1e6)
    assert {"projections", "clipping and optimizer", "embedding", "casts and copies"} <= groups.keys()
    whole = sum(event.self_cpu_time_total for event in events) / 1e6
    assert sum(group.measured for group in groups.values()) == pytest.approx(whole)
    assert groups["projections"].measured > 0.02 * whole < groups["clipping and optimizer"].measured


def test_bytes_of_tensors():
    x = torch.zeros(3, 4)
    assert roofline.bytes_in([x, None, (x.half(), 2)]) == 3 * 4 * (4 + 2)
    assert roofline.bytes_in(x[:1].expand(3, 4)) == 16
