"""A run that is killed and resumed ends with the very bytes of one that was never stopped."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import TINY

ROOT = Path(__file__).parent.parent
VARIANTS = {
    "causal": ["--model.dropout=0.1", "--optim.name=muon", "--train.accumulation_steps=2"],
    "masked": ["--model.dropout=0.1", "--optim.name=adamw", "--objective.name=masked", "--data.order=documents"],
}


def command(tmp_path, name, text, *more):
    (tmp_path / "tiny.toml").touch()
    return [sys.executable, str(ROOT / "train.py"), str(tmp_path / "tiny.toml"), *TINY, f"--data.path={text}",
            f"--train.run_dir={tmp_path / name}", "--train.max_steps=60", "--train.checkpoint_every=3",
            "--train.eval_every=7", "--train.early_stopping=5", *more]


@pytest.mark.serial
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_equals_never_stopped(tmp_path, text_file, variant):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command(tmp_path, "straight", text_file, *VARIANTS[variant]), check=True, env=environment,
                   capture_output=True, timeout=100)
    chance, kills = random.Random(variant), 0
    for _ in range(20):
        child = subprocess.Popen(command(tmp_path, "killed", text_file, *VARIANTS[variant], "--resume"),
                                 env=environment, stdout=subprocess.PIPE, text=True)
        if kills == 2:
            child.communicate(timeout=100)
            break
        child.stdout.readline()
        time.sleep(chance.uniform(0.3, 1.0))
        kills += child.poll() is None
        child.kill()
        child.communicate()
    assert kills == 2 and child.returncode == 0
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        straight, killed = (tmp_path / run / "checkpoints/step-00000060" / name for run in ("straight", "killed"))
        assert straight.read_bytes() == killed.read_bytes(), name
