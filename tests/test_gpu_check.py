"""gpu-check on a CPU: each step by itself, whatever the others do; what has ended is kept; checks see what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from marks import slow

import kernels
from benchmarks import check_attention, check_machine, checks, gpu_check, gpu_steps, precision

ROOT = Path(__file__).parent.parent


def step(name, code, seconds=60, **options):
    """A step that notes its name in the file `ran` and then does `code`, with `file` as its result's file."""
    begin = f"import json, os, sys, time, subprocess\nfile = sys.argv[-1]\nopen('ran', 'a').write({name!r} + ' ')\n"
    return gpu_steps.Step(name, ["-c", begin + code], seconds, **options)


def writes(result):
    return f"open(file, 'w').write({json.dumps(result)!r})\n"


GOOD = writes({"check": "good", "passed": 2, "failed": 0, "cannot_run": 1, "paths": {"good": "reference"}})
BAD = writes({"check": "bad", "cases": [{"case": "a", "state": "passed"}, {"case": "b", "state": "failed",
                                                                           "error": "off by 3"}],
              "passed": 1, "failed": 1, "cannot_run": 0, "paths": {}}) + "sys.exit(1)"
SPEED = {"benchmark": "rms_norm", "rate": "tb_per_s", "labels": ["width"], "dtype": "bfloat16", "device": "x",
         "torch": "2", "triton": "3", "date": "today",
         "results": [{"direction": "forward", "width": 8, "path": "triton", "tb_per_s": 2.5},
                     {"direction": "forward", "width": 8, "path": "liger", "error": "no"}]}


@pytest.fixture
def driver(tmp_path, monkeypatch, capsys):
    """run(steps, *options): the exit code, standard output's lines, the record and the names of steps that ran."""
    monkeypatch.setattr(gpu_steps, "ROOT", tmp_path)                # where steps run; there are no sources
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0.01)

    def run(steps, *options):
        monkeypatch.setattr(gpu_steps, "steps", lambda device, peers: steps)
        ran = tmp_path / "ran"
        ran.write_text("", "utf-8")
        with pytest.raises(SystemExit) as stopped:
            gpu_check.main(["--device", "cpu", "--out", str(tmp_path / "out"), *options])
        lines = capsys.readouterr().out.splitlines()
        record = json.loads((tmp_path / "out/gpu_check.json").read_text("utf-8"))
        return SimpleNamespace(code=stopped.value.code, lines=lines, record=record, last=json.loads(lines[-1]),
                               ran=ran.read_text("utf-8").split(), out=tmp_path / "out")
    return run


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_steps_that_fail_or_take_too_long_cost_no_other(driver, tmp_path):
    slow = writes(SPEED) + "open('pid', 'w').write(str(subprocess.Popen(['sleep', '60']).pid)); time.sleep(60)"
    result = driver([step("good", GOOD), step("bad", BAD), step("crash", "print('broken'); os.abort()", alone=True),
                     step("slow", slow, 3, alone=True, decides=False),
                     step("speed", writes(SPEED | {"benchmark": "attention"}), alone=True, decides=False)])
    assert result.code == 1
    assert sorted(result.ran[:2]) == ["bad", "good"] and result.ran[2:] == ["crash", "slow", "speed"]
    steps = result.record["steps"]
    assert {name: outcome["state"] for name, outcome in steps.items()} == {
        "good": "passed", "bad": "failed", "crash": "failed", "slow": "timed out", "speed": "passed"}
    assert steps["bad"]["error"] == "1 of 2 failed: b: off by 3"
    assert steps["crash"]["error"] == f"exit code -{signal.SIGABRT}: broken"
    assert steps["slow"]["result"]["results"] == SPEED["results"], "what it had measured is lost"
    assert not alive((tmp_path / "pid").read_text("utf-8")), "what the step had started goes on"
    assert result.last["unproved"] == ["bad", "crash"] and result.last["timed_out"] == ["slow"]
    assert result.last["torch"] == torch.__version__ and result.last["passed"] == ["good", "speed"]
    assert "=== crash: failed after" in (result.out / "gpu_check.log").read_text("utf-8")
    assert len(list(result.out.iterdir())) <= 8
    told = {line.split()[0]: line for line in result.lines[-6:-1]}
    assert "2 passed, 1 cannot run; good on the reference" in told["good"]
    assert "which it was given; 2 rows, 1 of them errors" in told["slow"]
    assert result.lines[-9].split() == ["forward", "8", "2.5", "-"]


def test_plots_are_drawn_where_matplotlib_is_there(driver):
    pytest.importorskip("matplotlib")
    speed = step("speed", writes(SPEED), decides=False)
    result = driver([speed, step("more", writes(SPEED))])
    assert {file.name for file in result.out.iterdir()} == {"gpu_check.json", "gpu_check.log", "rms_norm.png"}
    assert result.code == 0 and result.last["plots"] == ["rms_norm.png"]


def test_going_on_keeps_what_passed_and_tries_the_others_again(driver, tmp_path):
    def steps(seconds):
        return [step("slow", "time.sleep(1.5)", seconds, alone=True), step("bad", BAD), step("good", GOOD),
                step("last", GOOD, alone=True)]

    first = driver(steps(0.2), "--steps", "slow", "bad", "good")
    assert first.ran[-1] == "slow" and first.last["timed_out"] == ["slow"]
    second = driver(steps(60))
    assert second.ran == ["bad", "last", "slow"] and second.lines[0] == "good: passed before"
    assert second.last["failed"] == ["bad"] and second.last["passed"] == ["slow", "good", "last"]
    assert driver(steps(60)).ran == ["bad"]
    log = (tmp_path / "out/gpu_check.log").read_text("utf-8")
    assert log.count("===") == 7 and log.count("=== slow") == 2


def test_a_disk_that_is_full_for_a_while_ends_no_other_step(driver, monkeypatch):
    real, writes_left = gpu_check.write_durably, iter([OSError(28, "No space left on device")])

    def write(*arguments):
        if error := next(writes_left, None):
            raise error
        real(*arguments)

    monkeypatch.setattr(gpu_check, "write_durably", write)
    result = driver([step("one", GOOD, alone=True), step("other", GOOD, alone=True)])
    assert any("could not be written: [Errno 28]" in line for line in result.lines)
    assert result.code == 0 and [*result.record["steps"]] == ["one", "other"]


def test_another_source_or_fresh_begins_anew(driver, monkeypatch):
    steps = [step("good", GOOD)]
    assert driver(steps).ran == ["good"] and driver(steps).ran == []
    assert driver(steps, "--fresh").ran == ["good"]
    monkeypatch.setattr(gpu_steps, "sources", lambda: {"commit": None, "source": "another"})
    result = driver(steps)
    assert result.ran == ["good"] and "is about another source; anew" in result.lines[0]


def test_the_sources_count_uncommitted_ones_too(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    seen = []
    for content in ("a", "b"):
        (tmp_path / "kernels/x.py").write_text(content, "utf-8")
        seen.append(gpu_steps.sources())
    assert seen[0]["source"] != seen[1]["source"] and seen[0]["commit"] is None


def test_when_the_time_is_over_the_rest_is_left(driver):
    steps = [step("long", "time.sleep(60)", alone=True), step("left", GOOD, alone=True)]
    began = time.monotonic()
    result = driver(steps, "--seconds", "1")
    assert time.monotonic() - began < 10
    assert result.ran == ["long"] and result.last["timed_out"] == ["long"] and result.last["not_run"] == ["left"]
    assert result.code == 1 and "left" not in result.record["steps"]


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from benchmarks import gpu_check, gpu_steps
from test_gpu_check import GOOD, step
gpu_steps.ROOT = Path.cwd()
gpu_steps.steps = lambda device, peers: [
    step("first", GOOD), step("second", "open('pid', 'w').write(str(os.getpid())); time.sleep({sleep})", alone={alone}),
    step("third", GOOD, alone=True)]
gpu_check.main(["--device", "cpu", "--out", "out"])
"""


@pytest.mark.parametrize("number, alone", [
    slow(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, True)])
def test_an_interrupted_check_goes_on(tmp_path, number, alone):
    def start(sleep):
        code = DRIVER.format(root=str(ROOT), tests=str(ROOT / "tests"), sleep=sleep, alone=alone)
        return subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    process = start(60)
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text("utf-8")
               and (tmp_path / "out/gpu_check.json").exists()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    pid = int((tmp_path / "pid").read_text("utf-8"))
    if number == signal.SIGKILL:
        os.kill(pid, signal.SIGKILL)                    # which nobody else could
    else:
        assert process.returncode == 130 and out.splitlines()[-1].startswith("stopped; what has ended is in out/gpu_")
        assert not alive(pid)
    assert list(json.loads((tmp_path / "out/gpu_check.json").read_text("utf-8"))["steps"]) == ["first"]
    process = start(0)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and json.loads(out.splitlines()[-1])["passed"] == ["first", "second", "third"]
    assert sorted((tmp_path / "ran").read_text("utf-8").split()) == ["first", "second", "second", "third"]


@pytest.mark.parametrize("options, message", [
    ([], "there is no CUDA GPU here; --device cpu takes the CPU"),
    (["--device", "cpu", "--steps", "training", "sing"], "no step sing; there is: descriptors, "),
    (["--device", "cpu", "--peer", "liger=."], "--peer liger=.: no liger_kernel lies in "),
    (["--device", "cpu", "--out", "setup.py"], "[Errno 17] File exists: 'setup.py'"),
    (["--device", "cpu", "--seconds", "0"], "argument --seconds: '0' is not a whole number of at least 1"),
])
def test_what_cannot_be_run_is_one_line(options, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(options)
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and not out and error.count("\n") == 1 and error.startswith(f"error: {message}")


@pytest.mark.parametrize("content", ["[]", "{", "\0"])
def test_a_record_that_cannot_be_read_is_named(content, capsys, tmp_path):
    (tmp_path / "gpu_check.json").write_text(content, "utf-8")
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--device", "cpu", "--out", str(tmp_path)])
    assert stopped.value.code == 2 and str(tmp_path / "gpu_check.json") in capsys.readouterr().err


def test_the_steps_are_all_checks_then_all_speeds():
    for device in ("cuda", "cpu"):
        steps = gpu_steps.steps(device, ["liger=/there"])
        by_check = [step.command[2] for step in steps if step.command[1] == "benchmarks.checks"]
        assert sorted(by_check) == sorted(checks.available()) and len({step.name for step in steps}) == len(steps)
        speeds = [step for step in steps if step.name.startswith("speed-")]
        assert steps[-len(speeds):] == speeds
        assert all(step.alone and not step.decides and step.command[-2:] == ["--peer", "liger=/there"]
                   for step in speeds)
        assert {step.command[1] for step in speeds} == {
            f"benchmarks.bench_{op}" for op in ("attention", "layer_norm", "rms_norm", "linear_cross_entropy", "train",
                                                "activations", "rotary", "split_heads", "decode_attention",
                                                "quantized_linear", "decode")}
        assert [step.name for step in steps if not step.decides][0] == "descriptors"


def test_a_crash_test_without_a_kill_in_a_save_passes():
    resume, = (step for step in gpu_steps.steps("cpu", []) if step.name == "resume")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_steps, "NEEDED_TO_RESUME", ("numpy", "not_installed"))
        assert "resume" not in {step.name for step in gpu_steps.steps("cpu", [])}
    assert resume.passed(1, {"identical": 8, "kills": 8})
    assert not resume.passed(1, {"identical": 7, "kills": 8}) and not resume.passed(1, {})


@pytest.mark.slow
def test_real_steps(tmp_path):
    """A check in the interpreter and a benchmark, as they are."""
    steps = ["descriptors", "speed-attention-sdpa"]
    result = subprocess.run([sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--out", str(tmp_path),
                             "--steps", *steps], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = json.loads((tmp_path / "gpu_check.json").read_text("utf-8"))["steps"]
    assert [*outcomes] == steps and outcomes[steps[0]]["result"]["paths"]["rms_norm"] == "triton"
    assert outcomes[steps[0]]["result"]["passed"] == 2 and len(outcomes[steps[1]]["result"]["results"]) == 4


def test_a_check_tells_what_passed_failed_and_could_not_run(monkeypatch, capsys, tmp_path):
    def wrong():
        raise AssertionError("off by 3\nor more")

    def too_large():
        check_machine.needs("cuda", 1 << 40)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 31))
    monkeypatch.setattr(kernels, "use", lambda choice: nullcontext())
    monkeypatch.setitem(sys.modules, "benchmarks.fakes", SimpleNamespace(CHECKS={
        "fake": lambda device: {"right": lambda: {"seen": device}, "wrong": wrong, "too large": too_large}}))
    monkeypatch.setattr(checks, "MODULES", ("fakes",))
    monkeypatch.setattr(checks.dispatch, "obstacle", lambda device: None)
    with pytest.raises(SystemExit) as stopped:
        checks.main(["fake", "--device", "cpu", "--json", str(tmp_path / "result.json")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert stopped.value.code == 1 and result == json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert (result["passed"], result["failed"], result["cannot_run"]) == (1, 1, 1)
    assert result["cases"][0]["seen"] == "cpu"
    assert [case.get("error") for case in result["cases"]] == [
        None, "AssertionError: off by 3", "needs 1024 GiB of memory, 1 are free"]


CASES = {f"{check}, {name}": case
         for check in ("attention-heads-bfloat16", "attention-tiles-bfloat16", "attention-masks-float32",
                       "attention-shapes-bfloat16", "rms_norm-float16", "layer_norm-bfloat16", "repeats", "offsets")
         for name, case in checks.available()[check]("cpu").items()}


@pytest.mark.parametrize("name", CASES)
def test_the_reference_passes_every_check(name):
    """Where tensors are made on the device that a check is about, and on no other."""
    torch.manual_seed(0)
    with torch.device("meta"):
        CASES[name]()


@pytest.mark.parametrize("check, case, wrong", [
    ("attention-masks-float32", "window, two passes", dict(window=8)),
    ("attention-masks-bfloat16", "full, one pass", dict(causal=True)),
    ("attention-masks-float32", "documents, two passes", dict(document_ids=None)),
    ("attention-masks-float16", "dropout, two passes", dict(dropout_p=0.0)),
    ("attention-shapes-bfloat16", "fewer queries than keys, two passes", dict(causal=False)),
    ("attention-heads-float32", "head size 16, one pass", dict(scale=0.251)),
])
def test_a_wrong_op_fails_its_check(check, case, wrong, monkeypatch):
    right = kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *qkv, **options: right(*qkv, **options | wrong))
    with pytest.raises(AssertionError, match="off by"):
        check_attention.CHECKS[check]("cpu")[case]()


def test_huge_tensors_that_come_out_wrong_fail_their_check(monkeypatch):
    right = kernels.rms_norm

    def wraps_around(x, *rest):
        return torch.cat([right(x[:-1], *rest), right(x[:1], *rest)]) if len(x) > 3 else right(x, *rest)

    monkeypatch.setattr(kernels, "rms_norm", wraps_around)
    with pytest.raises(AssertionError, match="tensor 0: off by"):
        check_machine.offsets("cpu")["rms_norm"]()


def test_bits_that_differ_fail_their_check(monkeypatch):
    right = kernels.rms_norm
    monkeypatch.setattr(kernels, "rms_norm", lambda x, *rest: right(x * (1 + torch.rand(())), *rest))
    with pytest.raises(AssertionError, match="the bits differ"):
        check_machine.repeats("cpu")["rms_norm 24"]()


def test_float32_may_be_off_by_a_rounding_but_not_by_more():
    def off_by(part):
        return lambda x: x * (1 + part)

    x = [torch.randn(100, generator=torch.Generator().manual_seed(0))]
    precision.check(off_by(1e-6), off_by(0), x)
    for dtype, part in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        with pytest.raises(AssertionError, match="off by"):
            precision.check(off_by(part), off_by(0), [x[0].to(dtype)])
