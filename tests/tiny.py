"""A model and a text small enough that a whole run takes a second or two."""

from pathlib import Path

from minigpt.config import Config, load_config

TINY = ["--tokenizer.vocab_size=300", "--model.context_length=32", "--model.depth=2", "--model.width=32",
        "--model.num_heads=2", "--train.batch_size=4", "--train.max_steps=12", "--train.eval_every=6",
        "--train.checkpoint_every=4", "--train.log_every=1", "--optim.warmup_steps=2"]


def tiny_config(tmp_path: Path, text: Path, *overrides: str) -> Config:
    """A run in `tmp_path`/run on `text`; later overrides win."""
    path = tmp_path / "tiny.toml"
    path.write_text("", "utf-8")
    return load_config(path, [*TINY, f"--data.path={text}", f"--train.run_dir={tmp_path / 'run'}", *overrides])
