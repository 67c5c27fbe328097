"""A model and a text small enough that a whole run takes a second or two."""

import random
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


def tiny_run(folder: Path) -> Path:
    """A run of four steps in `folder`."""
    from minigpt.training import train

    (folder / "text.txt").write_text(make_text(300), "utf-8")
    train(tiny_config(folder, folder / "text.txt", "--train.max_steps=4"))
    return folder / "run"


WORDS = "the a of king queen said to and from with shall not love death night day sword crown my thy lord".split()


def make_text(num_lines: int, seed: int = 0) -> str:
    """Lines of words that have something to learn in them: a word follows from the two before it, mostly."""
    chance = random.Random(seed)
    lines = []
    for number in range(num_lines):
        line = [chance.choice(WORDS) for _ in range(2)]
        for _ in range(chance.randrange(4, 12)):
            guess = (WORDS.index(line[-1]) * 7 + WORDS.index(line[-2]) * 3) % len(WORDS)
            line.append(WORDS[guess] if chance.random() < 0.8 else chance.choice(WORDS))
        lines.append(" ".join(line).capitalize() + ".")
        if number % 9 == 8:
            lines.append("")
    return "\n".join(lines) + "\n"
