"""The commands: what a user gets wrong is one line and exit code 2; interrupts save; output is what was asked for."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import TINY

from minigpt import checkpoint, cli

ROOT = Path(__file__).parent.parent


def train_arguments(tmp_path, text, *more):
    config = tmp_path / "tiny.toml"
    config.touch()
    return [str(config), *TINY, f"--data.path={text}", f"--train.run_dir={tmp_path / 'run'}", *more]


@pytest.fixture
def run(tmp_path, text_file, capsys):
    cli.train(train_arguments(tmp_path, text_file))
    capsys.readouterr()
    return tmp_path / "run"


def fails(capsys, command, *arguments):
    """The one line that a command which must fail leaves on standard error."""
    with pytest.raises(SystemExit) as stopped:
        command(list(arguments))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_training_and_sampling_do_without_the_compiler(tmp_path, text_file):
    """torch._dynamo takes as long to load as torch itself."""
    code = ("import sys; from minigpt import cli; cli.train(sys.argv[2:]); cli.sample([sys.argv[1]])\n"
            "print('torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run"), *train_arguments(tmp_path, text_file)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_sample_output(run, capsys):
    arguments = [str(run), "--prompt", "The king", "--max-new-tokens=20", "--seed=3"]

    def output(*more):
        cli.sample([*arguments, *more])
        return capsys.readouterr().out

    plain = output()
    assert plain.startswith("The king") and plain == output("--stream") == output()
    samples = [json.loads(line) for line in output("--json", "--num-samples=3").splitlines()]
    assert [sample["prompt"] for sample in samples] == ["The king"] * 3
    assert len({sample["text"] for sample in samples}) > 1
    assert plain == f"The king{samples[0]['text']}\n"
    assert output("--temperature=0") == output("--temperature=0", "--seed=4")
    assert output("--seed=4") != plain
    assert plain == output("--invariant") == output("--past-context=slide")     # within the context
    cli.sample([str(run), "--max-new-tokens=5"])
    assert capsys.readouterr().out


def test_main_knows_its_verbs(run, capsys):
    cli.main(["sample", str(run), "--prompt", "A", "--max-new-tokens=2"])
    assert capsys.readouterr().out.startswith("A")
    cli.main(["--help"])
    assert "usage: minigpt {train,sample" in capsys.readouterr().out


@pytest.mark.parametrize("error, line", [
    (OSError(errno.ENOSPC, "No space left"), "error: No space left; make room or name a place on another disk"),
    (OSError(errno.EROFS, "Read-only", "/x"), "error: /x: Read-only; name a place on a disk that can be written"),
    (OSError(errno.ENXIO, "No such device", b"/x"), "error: /x: No such device; mend this or name another"),
    (OSError("/x could not be saved"), "error: /x could not be saved"),
    (ValueError("a\nb\x1b[2J\udc80"), r"error: a\nb\x1b[2J\udc80"),
])
def test_an_error_is_one_line_with_its_place_and_its_mend(capsys, error, line):
    """It was `[Errno 28] No space left on device`, and the control characters of a path went to the terminal."""
    def command(arguments):
        def fail():
            raise error
        cli._run(fail, "stopped")
    assert fails(capsys, command) == line


def process(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment, **options)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.mark.serial
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_prints_the_command_that_goes_on(tmp_path, text_file, number):
    arguments = train_arguments(tmp_path, text_file, "--train.max_steps=100000", "--train.checkpoint_every=100000",
                                "--train.eval_every=100000")
    child = process(str(ROOT / "train.py"), *arguments)
    metrics = tmp_path / "run/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 500)
    began = time.monotonic()
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert child.returncode == 128 + number and "Traceback" not in err
    command = out.splitlines()[-1].removeprefix("go on with: ")
    stopped_at = len(metrics.read_text().splitlines())
    assert command.endswith("--resume") and f"stopped at step {stopped_at}, saved" in out
    assert checkpoint.find(tmp_path / "run").state["loop"]["step"] == stopped_at
    if number == signal.SIGTERM:
        return
    again = subprocess.run(shlex.split(command.replace("max_steps=100000", f"max_steps={stopped_at + 5}")),
                           capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert again.returncode == 0 and "going on from" in again.stdout
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, stopped_at + 6))


@pytest.mark.serial
def test_an_interrupt_before_the_first_step_prints_the_command_too(tmp_path):
    """While the tokenizer is trained or the text is read there is nothing to save, and the command begins anew."""
    text = tmp_path / "long.txt"
    text.write_text("".join(f"{number} bottles of beer {number * 7919} on the wall\n" for number in range(300_000)))
    child = process(str(ROOT / "train.py"), *train_arguments(tmp_path, text, "--tokenizer.vocab_size=8000"))
    assert "training a tokenizer" in child.stdout.readline()
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert child.returncode == 130 and "Traceback" not in err
    assert "go on with:" in err and err.rstrip().endswith("--resume")


def test_what_does_not_fit_in_memory_is_said(run, tmp_path, text_file, capsys, monkeypatch):
    """The commonest failure on a GPU ended in a traceback."""
    config = train_arguments(tmp_path, text_file, "--train.run_dir=" + str(tmp_path / "other"))
    assert "not enough memory" in fails(capsys, cli.train, *config, "--model.width=131072", "--model.depth=10000",
                                        "--model.num_heads=1")
    assert "10000" in fails(capsys, cli.sample, str(run), "--num-samples=100000000000")


def test_closed_standard_streams_are_no_error(run, tmp_path):
    """They are None in Python, and the command failed on them."""
    command = f"exec {shlex.quote(sys.executable)} {ROOT / 'sample.py'} {run} --prompt A --max-new-tokens 2 >&- 2>&-"
    assert subprocess.run(command, shell=True, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0


@pytest.mark.serial
def test_a_reader_that_goes_away_is_no_error(run):
    child = process(str(ROOT / "sample.py"), str(run), "--prompt", "The", "--num-samples=500", "--max-new-tokens=50")
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == ""
    child.wait(timeout=60)


def test_a_sample_tells_how_it_ended(run, capsys):
    cli.sample([str(run), "--max-new-tokens=30", "--temperature=1", "--seed=1", "--json", "--log-probabilities=2"])
    plain = json.loads(capsys.readouterr().out)
    assert plain["reason"] in ("length", "end") and len(plain["tokens"]) > 5
    assert all(len(token["likeliest"]) == 2 and token["log_probability"] < 0 for token in plain["tokens"])
    stop = plain["text"][4:6]
    cli.sample([str(run), "--max-new-tokens=30", "--temperature=1", "--seed=1", "--json", "--stop", stop, "--stop=@@"])
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["text"] == plain["text"][:plain["text"].index(stop)] and stopped["reason"] == "stop"
    cli.sample([str(run), "--max-new-tokens=5", "--logit-bias", "70:1e6,71:-1e6"])
    assert len(set(capsys.readouterr().out.strip())) <= 1
    assert "is not written ID:BIAS,ID:BIAS" in fails(capsys, cli.sample, str(run), "--logit-bias=x")
    assert "logit_bias: 9999 is no token" in fails(capsys, cli.sample, str(run), "--logit-bias=9999:1")
    assert "are shown with --json" in fails(capsys, cli.sample, str(run), "--log-probabilities=2")
    assert "stop has an empty text" in fails(capsys, cli.sample, str(run), "--stop=")
