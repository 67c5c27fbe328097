"""What the README says can be done, can be done, and the tree it prints is the tree there is."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_text

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SHORT = ["--train.max_steps=3", "--train.eval_every=3", "--model.depth=1", "--model.width=32", "--model.num_heads=2",
         "--model.context_length=32", "--tokenizer.vocab_size=300", "--train.batch_size=2"]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                            capture_output=True, check=True).stdout.split("\n")
    return sorted(name for name in listed if name and (ROOT / name).exists())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with a folder of texts in it, where the commands leave what they leave."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    texts = copy / "my_texts"
    texts.mkdir()
    (texts / "book.txt").write_text(make_text(800), "utf-8")
    for number in range(8):
        (texts / f"{number}.txt").write_text(make_text(100, seed=number), "utf-8")
    return copy


def run(checkout, words):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": "."}
    return subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True, timeout=110)


def test_there_are_commands():
    assert len(COMMANDS) >= 8 and COMMANDS[:2] == ["make quickstart", "make test"]


def test_every_command_works(checkout):
    """In the README's order, training shortened; `make` commands are looked at, not run."""
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "make":
            result = run(checkout, [*words, "-n"])
        elif words[1] == "train.py" and "--help" not in words:
            result = run(checkout, [*words, *SHORT])
            assert re.fullmatch(r"final: \d+\.\d{4} bits per byte", result.stdout.splitlines()[-1]), result.stderr
        else:
            result = run(checkout, words)
            assert result.stdout.strip(), command
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    for block in blocks("python"):
        result = run(checkout, [sys.executable, "-c", block])
        assert result.returncode == 0 and result.stdout.strip(), f"{block}\n{result.stderr}"


def test_the_quickstart_is_what_make_runs(checkout):
    recipe = run(checkout, ["make", "-n", "quickstart"]).stdout.replace("\\\n", "")
    lines = [line for line in recipe.splitlines() if "train.py" in line or "sample.py" in line]
    assert len(lines) == 2
    for line, more in zip(lines, (SHORT, [])):
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
