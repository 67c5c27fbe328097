"""Short trainings have the same losses on the reference and on Triton, and those of golden_run.json.

    PYTHONPATH=tests python tests/kernels/test_golden_run.py       # writes golden_run.json anew, from the reference
"""

import io
import json
import tempfile
from pathlib import Path

import pytest
from tiny import make_text, tiny_config

from minigpt import training

GOLDEN = Path(__file__).with_name("golden_run.json")
RECIPES = {
    "causal": ["--model.num_heads=4", "--model.num_kv_heads=2", "--model.window=20", "--data.order=documents"],
    "masked": ["--objective.name=masked", "--model.norm=layer_norm", "--model.position=learned", "--model.bias=true"],
}


def losses(recipe: str, choice: str, folder: Path) -> list[float]:
    """Of each step, in nats per token."""
    text = folder / "text.txt"
    text.write_text(make_text(120), "utf-8")
    config = tiny_config(folder, text, "--model.depth=1", "--train.batch_size=2", "--train.max_steps=6",
                         "--train.eval_every=100", "--train.dtype=float32", f"--train.kernels={choice}",
                         *RECIPES[recipe])
    training.train(config, out=io.StringIO())
    lines = (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


@pytest.mark.parametrize("choice", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_are_the_golden_ones(recipe, choice, tmp_path):
    golden = json.loads(GOLDEN.read_text("utf-8"))[recipe]
    assert len(golden) == 6 and golden[-1] < golden[0]
    assert losses(recipe, choice, tmp_path) == pytest.approx(golden, rel=1e-5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for recipe in RECIPES:
            (inner := Path(folder, recipe)).mkdir()
            made[recipe] = losses(recipe, "reference", inner)
    GOLDEN.write_text(json.dumps(made, indent=1) + "\n", "utf-8")
