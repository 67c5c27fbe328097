"""A run that is killed and resumed ends with the very bytes of one that was never stopped."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from marks import slow
from tiny import TINY

from benchmarks import crash_test
from minigpt import cli

ROOT = Path(__file__).parent.parent


@pytest.mark.serial
@pytest.mark.parametrize("variant", [slow(name) if "spikes" not in name else name for name in crash_test.VARIANTS])
def test_killed_at_a_random_instant_and_resumed_equals_never_stopped(tmp_path, monkeypatch, variant):
    """The crash test with one kill, within a save."""
    monkeypatch.setattr(crash_test, "VARIANTS", {variant: crash_test.VARIANTS[variant]})
    result = crash_test.crash(tmp_path, kills=1, seed=1)
    assert (result["unreadable"], result["different"], result["identical"]) == (0, 0, 1)
    assert (result["rollbacks_of_the_variants"][0] > 0) == ("spikes" in variant)


@pytest.mark.serial
def test_the_command_killed_twice_equals_never_stopped(tmp_path, text_file):
    """`train.py` itself, killed each time at a random moment after its first step."""
    (tmp_path / "tiny.toml").touch()
    arguments = [str(tmp_path / "tiny.toml"), *TINY, f"--data.path={text_file}", "--train.max_steps=40",
                 "--train.checkpoint_every=3", "--train.eval_every=7", "--train.accumulation_steps=2",
                 "--model.dropout=0.1"]
    cli.train([*arguments, f"--train.run_dir={tmp_path / 'straight/run'}"])
    arguments = [*arguments, f"--train.run_dir={tmp_path / 'killed/run'}", "--resume"]
    metrics = tmp_path / "killed/run/metrics.jsonl"
    chance = random.Random(0)
    for _ in range(2):
        before = metrics.read_bytes() if metrics.exists() else b""
        child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments],
                                 env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
        while not metrics.exists() or metrics.read_bytes() == before:
            assert child.poll() is None
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        assert child.poll() is None, "it ended before it could be killed"
        child.kill()
        child.wait()
    cli.train(arguments)
    assert crash_test.end_of(tmp_path / "killed") == crash_test.end_of(tmp_path / "straight")
