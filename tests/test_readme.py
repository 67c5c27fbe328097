"""What the README says can be done, can be done, and the tree it prints is the tree there is."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_text

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SHORT = ["--train.max_steps=3", "--train.eval_every=3", "--model.depth=1", "--model.width=32", "--model.num_heads=2",
         "--model.context_length=32", "--tokenizer.vocab_size=300", "--train.batch_size=2"]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


TRAIN_MINE = blocks("sh")[1].splitlines()[0]
"""The command that makes the run which later commands go on with."""


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                            capture_output=True, check=True).stdout.split("\n")
    return sorted(name for name in listed if name and (ROOT / name).exists())


def fill(folder):
    """A copy of the project with a folder of texts in it, where the commands leave what they leave."""
    for name in tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    texts = folder / "my_texts"
    texts.mkdir()
    (texts / "book.txt").write_text(make_text(800), "utf-8")
    for number in range(20):
        (texts / f"{number}.txt").write_text(make_text(100, seed=number), "utf-8")
    lines = [line.rstrip(".") for line in make_text(60).split("\n") if line]
    rows = [f"{line},{'long' if len(line) > 40 else 'short'}\n" for line in lines]
    (folder / "labels.csv").write_text("".join(["text,label\n", *rows]), "utf-8")
    return folder


@pytest.fixture
def checkout(tmp_path):
    return fill(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The `runs` that TRAIN_MINE leaves, made once."""
    checkout = fill(tmp_path_factory.mktemp("trained"))
    run_command(checkout, TRAIN_MINE)
    return checkout / "runs"


def run(checkout, words):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": "."}
    return subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True, timeout=110)


def run_command(checkout, command):
    """Run a command, training shortened; what `make` would do is looked at, not done."""
    words = shlex.split(command)
    if words[0] == "make":
        words.append("-n")
    if words[1] == "train.py" and "--help" not in words or "benchmarks.bench_train" in words:
        words += SHORT
    result = run(checkout, words)
    assert result.returncode == 0 and result.stdout.strip(), f"{command}\n{result.stdout}\n{result.stderr}"
    if words[1] == "train.py" and "--help" not in words:
        unit = "nats per target.*" if "runs/bert" in command else "bits per byte"
        assert re.fullmatch(rf"final: \d+\.\d{{4}} {unit}", result.stdout.splitlines()[-1]), command


def test_there_are_commands():
    assert blocks("sh")[0] == "make quickstart\nmake test\n"
    assert TRAIN_MINE in blocks("sh")[1] and "runs/mine" in TRAIN_MINE


@pytest.mark.parametrize("block", range(len(blocks("sh"))))
def test_every_command_works(checkout, trained, block):
    commands = blocks("sh")[block].splitlines()
    if TRAIN_MINE not in commands:
        shutil.copytree(trained, checkout / "runs")
    for command in commands:
        run_command(checkout, command)


@pytest.mark.parametrize("block", range(len(blocks("python"))))
def test_every_python_example_works(checkout, trained, block):
    shutil.copytree(trained, checkout / "runs")
    result = run(checkout, [sys.executable, "-c", blocks("python")[block]])
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


def test_the_quickstart_is_what_make_runs(checkout):
    recipe = run(checkout, ["make", "-n", "quickstart"]).stdout.replace("\\\n", "")
    lines = [line for line in recipe.splitlines() if "train.py" in line or "sample.py" in line]
    assert len(lines) == 2
    for line, more in zip(lines, ([*SHORT, "--data.path=my_texts"], [])):
        words = [word for word in shlex.split(line) if word]
        result = run(checkout, [sys.executable, *words[1:], *more])
        assert result.returncode == 0, result.stderr


def test_the_layout_tree_is_the_tree():
    """Every file and folder of the tree exists, and every module, recipe and top-level file stands in it."""
    tree = next(block for block in blocks("text") if "setup.py" in block)
    named, folder = set(), ""
    for line in tree.splitlines():
        indented = line.startswith("  ")
        names = line.split("  ")[1 if indented else 0].split()
        if not indented:
            folder = names[0] if names[0].endswith("/") else ""
        named |= {(folder if indented else "") + name for name in names}
    files = set(tracked_files())
    folders = {f"{parent.as_posix()}/" for name in files for parent in Path(name).parents if parent.name}
    assert named <= files | folders, named - files - folders
    shown = {name for name in files if "/" not in name and not name.startswith(".")}
    shown |= {name for name in files if name.startswith(("minigpt/", "kernels/")) and name.endswith(".py")}
    assert shown <= named | {"minigpt/__init__.py", "minigpt/__main__.py", "kernels/__init__.py"}, shown - named
