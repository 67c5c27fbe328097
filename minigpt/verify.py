"""Whether what was written is still whole: the findings of `minigpt verify PATH` for a run, a checkpoint or a data set.

    for finding in verify(Path("runs/mine")):
        print(finding)

The run's lock is held meanwhile. A run that another process is training in is checked all the same: what is not whole
there is looked at once more, since it may have been about to be replaced, and a checkpoint that is gone was pruned.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from minigpt.config import load_config
from minigpt.files import held
from minigpt.shards import INDEX, open_shard, read_index
from minigpt.tokenizer import Tokenizer

SECOND_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Finding:
    path: str
    status: str
    """One of "ok", "damaged", "unfinished" (what a kill leaves behind, or a save under way; no damage), "in use"."""
    detail: str

    def __str__(self):
        return f"{self.status:<10}  {self.path}: {self.detail}"


class Unfinished(Exception):
    """Something was not written to its end; nothing reads it."""


def verify(path: Path) -> Iterator[Finding]:
    """A finding for each thing in `path`. Raises ValueError or FileNotFoundError where it is nothing that is known."""
    if not path.exists():
        raise FileNotFoundError(f"no run, checkpoint or data set {path}; name a directory that train.py made")
    if (path / INDEX).exists() or (path / "train-00000.bin").exists():
        return _data_set(path)
    from minigpt import checkpoint  # loads torch

    place = path.resolve()                              # what the user names may be a link
    named = place.name == checkpoint.UNFINISHED or checkpoint.NAME.fullmatch(place.name)
    if place.is_dir() and named or (place / checkpoint.MANIFEST).exists():
        return iter([_look(place if path.is_symlink() else path, _checkpoint)])
    if not (path / "checkpoints").exists() and any(path.glob("*.safetensors")):
        raise ValueError(f"{path} is a model in Hugging Face's form and no run; `minigpt import` makes a checkpoint of "
                         "it")
    if (path / "config.json").exists() or (path / "checkpoints").exists():
        return _run(path)
    raise ValueError(f"{path} is no run, checkpoint or data set; name a directory that holds config.json, "
                     f"{checkpoint.MANIFEST} or {INDEX}")


def _look(path: Path, check: Callable[[Path], str], in_use: bool = False) -> Finding:
    """What `check` says of a path: it gives a word on what is whole, and raises for what is not."""
    try:
        return Finding(str(path), "ok", check(path))
    except Unfinished as error:
        return Finding(str(path), "unfinished", str(error))
    except (ValueError, OSError) as error:
        if in_use:
            time.sleep(SECOND_LOOK_SECONDS)
            return _look(path, check)
        return _damage(path, error)


def _damage(path, error):
    """The finding of an error, whose message begins with the path of a file, in most cases one below `path`."""
    by_system = isinstance(error, OSError) and error.filename
    message = f"{error.filename}: {error.strerror}" if by_system else str(error)
    if not message.startswith(str(path)):
        return Finding(str(path), "damaged", message)
    below, _, detail = message.removeprefix(str(path)).partition(": ")
    return Finding(f"{path}{below}", "damaged", detail)


def _run(run: Path) -> Iterator[Finding]:
    from minigpt import checkpoint

    with ExitStack() as lock:
        in_use = False
        try:
            lock.enter_context(held(run))
        except ValueError:
            in_use = True
            yield Finding(str(run), "in use", "another process works in it; what it changes is looked at twice")
        try:
            checkpoints = checkpoint.in_run(run)
        except ValueError as error:
            yield _damage(run, error)
            return
        for name, check in (("config.json", _config), ("tokenizer", _tokenizer), ("metrics.jsonl", _log),
                            ("samples.jsonl", _log)):
            if checkpoints or os.path.lexists(run / name):
                yield _look(run / name, check, in_use)
            else:
                yield Finding(str(run / name), "unfinished", "not written yet")
        statuses = set()
        for path in checkpoints:
            finding = _look(path, _checkpoint, in_use)
            if in_use and not path.exists():
                statuses.add("pruned")
                continue
            if finding.status == "unfinished" and "ok" not in statuses:
                finding = Finding(finding.path, "damaged", f"{checkpoint.MANIFEST} is missing")
            statuses.add(finding.status)
            yield finding
        cut_off = run / "checkpoints" / checkpoint.UNFINISHED
        if cut_off.exists():
            yield _look(cut_off, _checkpoint)
        if "damaged" in statuses and "ok" not in statuses:
            yield Finding(str(run), "damaged", "no checkpoint of it is whole")
        elif statuses <= {"unfinished"}:
            yield Finding(str(run), "unfinished", "it has no checkpoint yet")


def _checkpoint(path):
    from minigpt import checkpoint

    if path.name == checkpoint.UNFINISHED or not os.path.lexists(path / checkpoint.MANIFEST):
        raise Unfinished("a save or a removal that did not come to its end; it is never used")
    checkpoint.verify(path)
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    return f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"


def _config(path):
    load_config(path)
    return "every setting is known"


def _tokenizer(path):
    return f"{Tokenizer.load(path).vocab_size} tokens"


def _log(path):
    if not path.is_file():
        raise ValueError(f"{path}: missing, or not a file")
    count, bad, cut_off = 0, [], False
    with open(path, "rb") as file:
        for count, line in enumerate(file, 1):
            cut_off = not line.endswith(b"\n")
            if not cut_off and not _has_step(line):
                bad.append(count)
    if bad:
        others = f", nor are {len(bad) - 1} lines after it" if len(bad) > 1 else ""
        raise ValueError(f"{path}:{bad[0]}: this line is no JSON object with a step{others}")
    if cut_off:
        raise Unfinished(f"line {count}, the last, is cut off; --resume drops it")
    return f"{count} lines"


def _has_step(line):
    try:
        return type(json.loads(line)["step"]) is int
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def _data_set(directory: Path) -> Iterator[Finding]:
    try:
        index = read_index(directory)
    except (ValueError, OSError) as error:
        yield _damage(directory, error)
        return
    splits = index["splits"]
    yield Finding(str(directory / INDEX), "ok", f"{splits['train']['tokens']:,} tokens to train on, "
                                                f"{splits['val']['tokens']:,} held out")
    for shard in [*splits["train"]["shards"], *splits["val"]["shards"]]:
        yield _look(directory / shard["file"],
                    lambda path, shard=shard: f"{len(open_shard(directory, index, shard)):,} tokens")
