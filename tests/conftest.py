"""Shared by all tests: one thread each, no network, a cache of their own, and small corpora."""

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("minigpt", deadline=None, derandomize=True, max_examples=100)
hypothesis.settings.load_profile("minigpt")
torch.set_num_threads(1)

WORDS = "the a of king queen said to and from with shall not love death night day sword crown my thy lord".split()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tokenizers and shards are cached for this test session only."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


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


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A single file of about 60 kB."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(make_text(1500), "utf-8")
    return path
