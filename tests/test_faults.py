"""Faults from outside, in real processes: a full disk, a directory that may not be written to, signals, a closed pipe,
a clock that jumps. The run says what happened, and what it had is not lost."""

import ctypes
import fcntl
import itertools
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from test_cli import process, train_arguments, wait_for
from tiny import tiny_config

from minigpt import checkpoint, cli, training

ROOT = Path(__file__).parent.parent
LONG = ["--train.max_steps=1000000", "--train.checkpoint_every=20", "--train.eval_every=1000000",
        "--train.keep_best=false"]
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


class Training:
    """A `train.py` process whose lines are read as they come."""

    def __init__(self, tmp_path, text, *more, **options):
        self.run = tmp_path / "run"
        self.child = process(str(ROOT / "train.py"), *train_arguments(tmp_path, text, *LONG, *more), **options)
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.child.stdout:
            self.lines.append(line)

    def said(self, words):
        return sum(words in line for line in self.lines)

    def wait_for_checkpoint(self):
        before = self.steps()
        wait_for(lambda: self.steps() and self.steps() != before)

    def steps(self):
        return [checkpoint.step_of(path) for path in checkpoint.in_run(self.run)]

    def ends(self, number):
        """The exit code and standard error after a signal."""
        self.child.send_signal(number)
        error = self.child.stderr.read()
        return self.child.wait(timeout=60), error

    def records(self):
        return [json.loads(line)["step"] for line in (self.run / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def started(tmp_path, text_file):
    made = []

    def start(*more, **options):
        made.append(Training(tmp_path, text_file, *more, **options))
        return made[-1]

    yield start
    for training_process in made:
        training_process.child.kill()
        training_process.child.communicate()


@pytest.mark.serial
def test_a_disk_that_is_full_for_a_while_costs_nothing(started):
    """The kernel refuses files beyond 3 kB, the logs' lines too; when it no longer does, all of it is written."""
    running = started()
    running.wait_for_checkpoint()
    resource.prlimit(running.child.pid, resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    wait_for(lambda: running.said("could not be saved") >= 2)
    kept = running.steps()
    assert checkpoint.find(running.run).path.name == f"step-{kept[0]:08d}"
    assert running.said("the run goes on and will try again") >= 3          # of them one for the logs
    resource.prlimit(running.child.pid, resource.RLIMIT_FSIZE, UNLIMITED)
    running.wait_for_checkpoint()
    code, error = running.ends(signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "Traceback" not in error
    assert running.records() == list(range(1, checkpoint.find(running.run).state["loop"]["step"] + 1))


@pytest.mark.serial
def test_where_the_last_save_fails_too_the_exit_code_says_so(started, capsys):
    running = started()
    running.wait_for_checkpoint()
    resource.prlimit(running.child.pid, resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    wait_for(lambda: running.said("could not be saved"))
    kept = running.steps()
    code, error = running.ends(signal.SIGTERM)
    assert code == 2 and "Traceback" not in error
    assert "error: " in error and "could not be written to the end" in error and "File too large" in error
    assert running.steps() == kept and checkpoint.find(running.run).path.name == f"step-{kept[0]:08d}"
    cli.main(["verify", str(running.run)])
    assert f"ok          {running.run / 'checkpoints'}" in capsys.readouterr().out


def without_capabilities():
    """Root may write everywhere; the program that is started after this may not."""
    if os.getuid() == 0:
        for capability in range(64):
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)                # PR_CAPBSET_DROP


@pytest.mark.serial
def test_a_directory_that_becomes_read_only_costs_nothing(started):
    running = started(preexec_fn=without_capabilities)
    running.wait_for_checkpoint()
    folder = running.run / "checkpoints"
    folder.chmod(0o555)
    try:
        wait_for(lambda: running.said("could not be saved") >= 2)
        assert "Permission denied" in "".join(running.lines)
        checkpoint.find(running.run)
    finally:
        folder.chmod(0o755)
    running.wait_for_checkpoint()
    assert running.ends(signal.SIGINT)[0] == 128 + signal.SIGINT
    step = checkpoint.find(running.run).state["loop"]["step"]
    assert running.records()[-1] == step and running.said(f"stopped at step {step}, saved in")


@pytest.mark.serial
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_a_step_of_many_micro_batches_is_answered_within_that_step_and_five_seconds(started, number):
    running = started("--train.accumulation_steps=50")
    wait_for(lambda: (running.run / "metrics.jsonl").exists() and len(running.records()) > 1)
    step_seconds = 50 * 4 * 32 / json.loads((running.run / "metrics.jsonl").read_text().splitlines()[1])[
        "tokens_per_second"]
    began = time.monotonic()
    code, error = running.ends(number)
    assert time.monotonic() - began < step_seconds + 5 and code == 128 + number
    assert checkpoint.find(running.run).state["loop"]["step"] == running.records()[-1]


@pytest.mark.serial
def test_a_second_signal_stops_at_once_without_harm(started):
    options = ["--train.accumulation_steps=100", "--train.checkpoint_every=1"]
    running = started(*options)
    running.wait_for_checkpoint()
    running.child.send_signal(signal.SIGTERM)
    wait_for(lambda: "once more stops at once" in running.child.stderr.readline())
    began = time.monotonic()
    assert running.ends(signal.SIGINT)[0] == -signal.SIGINT and time.monotonic() - began < 2
    assert checkpoint.find(running.run).state["loop"]["step"] >= 1
    again = started(*options, "--resume")
    wait_for(lambda: again.said("going on from"))


@pytest.mark.serial
def test_a_terminal_that_is_closed_ends_the_training_saved(tmp_path, text_file):
    """The line that is printed for a signal could not be, and ended the run without a checkpoint."""
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *train_arguments(tmp_path, text_file, *LONG)], stdin=follower,
        stdout=follower, stderr=follower, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(follower)
    reader = threading.Thread(target=lambda: os.read(leader, 1 << 20), daemon=True)
    reader.start()
    metrics = tmp_path / "run/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 500)
    reader.join()
    os.close(leader)
    assert child.wait(timeout=60) == 128 + signal.SIGHUP
    step = checkpoint.find(tmp_path / "run").state["loop"]["step"]
    assert json.loads(metrics.read_text("utf-8").splitlines()[-1])["step"] == step


@pytest.mark.serial
def test_a_signal_that_was_to_be_ignored_is_ignored(started):
    """`nohup` did not keep SIGHUP from ending the run."""
    running = started(preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN)
                                          for number in (signal.SIGHUP, signal.SIGINT)])
    running.wait_for_checkpoint()
    running.child.send_signal(signal.SIGHUP)
    running.child.send_signal(signal.SIGINT)
    running.wait_for_checkpoint()
    assert running.ends(signal.SIGTERM)[0] == 128 + signal.SIGTERM


@pytest.mark.serial
@pytest.mark.parametrize("number", [None, signal.SIGINT])
def test_a_reader_that_goes_away_does_not_end_the_training(started, tmp_path, text_file, number):
    """`train.py ... | head` ended the run without a checkpoint, and so did Ctrl-C with `| tee`, which it ends too."""
    arguments = train_arguments(tmp_path, text_file, *LONG[1:], "--train.max_steps=60", "--train.eval_every=20")
    child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    child.stdout.readline()
    child.stdout.close()
    if number:
        wait_for(lambda: checkpoint.in_run(tmp_path / "run"))
        child.send_signal(number)
    error = child.stderr.read()
    child.wait(timeout=60)
    assert b"Traceback" not in error
    found = checkpoint.find(tmp_path / "run").state["loop"]["step"]
    assert found == 60 if number is None else found >= 20


def test_a_clock_that_jumps_changes_nothing(tmp_path, text_file, monkeypatch):
    """Hundreds of days forward and back at every look at it, and files that seem older than they are."""
    ends, real, looks = [], time.time, itertools.count()
    for name, clock in (("straight", real), ("jumping", lambda: real() + (-1) ** next(looks) * 86400.0 * 300)):
        monkeypatch.setattr(time, "time", clock)
        (tmp_path / name).mkdir()
        run = tmp_path / name / "run"
        training.train(tiny_config(tmp_path / name, text_file, "--train.max_steps=8"))
        if name == "jumping":
            for age, path in enumerate(checkpoint.in_run(run)):
                os.utime(path, (10**9 + age, 10**9 + age))
        assert checkpoint.find(run).path.name == "step-00000008"
        training.train(tiny_config(tmp_path / name, text_file), resume=True)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        assert [record["step"] for record in records] == list(range(1, 13))
        assert all(record["elapsed_seconds"] > 0 and record["tokens_per_second"] > 0 for record in records)
        ends.append([(checkpoint.in_run(run)[0] / file).read_bytes()
                     for file in ("model.safetensors", "optimizer.safetensors", "state.json")])
    assert ends[0] == ends[1]
