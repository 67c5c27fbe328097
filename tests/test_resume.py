"""A run that is killed and resumed ends with the very bytes of one that was never stopped."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import TINY

from minigpt import cli

ROOT = Path(__file__).parent.parent
VARIANTS = {
    "causal": ["--model.dropout=0.1", "--optim.name=muon", "--train.accumulation_steps=2"],
    "masked": ["--model.dropout=0.1", "--optim.name=adamw", "--objective.name=masked", "--data.order=documents"],
}


def arguments(tmp_path, name, text, *more):
    (tmp_path / "tiny.toml").touch()
    return [str(tmp_path / "tiny.toml"), *TINY, f"--data.path={text}", f"--train.run_dir={tmp_path / name}",
            "--train.max_steps=40", "--train.checkpoint_every=3", "--train.eval_every=7", "--train.early_stopping=5",
            *more]


@pytest.mark.serial
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_equals_never_stopped(tmp_path, text_file, variant):
    """Killed twice by SIGKILL, each time at a random moment after its first step, then resumed to its end."""
    cli.train(arguments(tmp_path, "straight", text_file, *VARIANTS[variant]))
    metrics = tmp_path / "killed/metrics.jsonl"
    chance = random.Random(variant)
    for _ in range(2):
        before = metrics.read_bytes() if metrics.exists() else b""
        child = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments(tmp_path, "killed", text_file, *VARIANTS[variant]),
             "--resume"], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
        while not metrics.exists() or metrics.read_bytes() == before:
            assert child.poll() is None
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        assert child.poll() is None, "it ended before it could be killed"
        child.kill()
        child.wait()
    cli.train([*arguments(tmp_path, "killed", text_file, *VARIANTS[variant]), "--resume"])
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        straight, killed = (tmp_path / run / "checkpoints/step-00000040" / name for run in ("straight", "killed"))
        assert straight.read_bytes() == killed.read_bytes(), name
