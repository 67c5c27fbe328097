"""Checkpoints: atomic, hashed, without pickle, and enough to go on as if nothing had happened.

A checkpoint directory holds model.safetensors, optimizer.safetensors, state.json, config.json, tokenizer/ and, written
last, manifest.json with the size and SHA-256 of every other file. Without a valid manifest it is no checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minigpt.config import Config, make_config
from minigpt.files import sha256_of, sync_directory, sync_file, write_durably
from minigpt.tokenizer import Tokenizer

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"step-\d{8,}")
UNFINISHED = ".unfinished"
"""Name of the directory in which a checkpoint is written before it gets its own."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file has been checked against the manifest."""

    path: Path

    @cached_property
    def config(self) -> Config:
        return make_config(json.loads((self.path / "config.json").read_text("utf-8")))

    @cached_property
    def state(self) -> dict:
        """What the loop saved: step, data position, random number generators, best so far."""
        return json.loads((self.path / "state.json").read_text("utf-8"))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.load(self.path / "tokenizer")
        if tokenizer.vocab_size > self.config.model.vocab_size:
            raise ValueError(f"{self.path}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
                             f"{self.config.model.vocab_size}; they do not belong together")
        return tokenizer

    def load_model(self, model: torch.nn.Module) -> None:
        """Copy the weights into `model`; names and shapes must be the same."""
        path = self.path / "model.safetensors"
        tensors, wanted = _load_tensors(path), model_tensors(model)
        _check_same(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()},
                    {name: tuple(tensor.shape) for name, tensor in wanted.items()})
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(tensors[name])

    def load_optimizers(self, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Restore what `optimizer_tensors` gave when the checkpoint was saved."""
        path = self.path / "optimizer.safetensors"
        tensors = _load_tensors(path)
        parameters = dict(model.named_parameters())
        owners = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups
                  for p in group["params"]}
        for name, tensor in tensors.items():
            parameter_name, key = name.rsplit("/", 1)
            if parameter_name not in parameters:
                raise ValueError(f"{path}: state of {parameter_name}, which the model does not have")
            parameter = parameters[parameter_name]
            owners[id(parameter)].state[parameter][key] = tensor.to(parameter.device)


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """{name: tensor} of the weights, a tied head left out."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            tensors[name] = tensor
        seen.add(tensor.data_ptr())
    return tensors


def optimizer_tensors(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """{parameter/key: tensor} of every optimizer's state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {f"{names[id(parameter)]}/{key}": value for optimizer in optimizers
            for parameter, state in optimizer.state.items() for key, value in state.items()}


def _check_same(path, found, wanted):
    for name in sorted(found.keys() ^ wanted.keys()):
        raise ValueError(f"{path}: {name} is {'missing' if name in wanted else 'not part of the model'}; "
                         "the weights are of another model")
    for name in found:
        if found[name] != wanted[name]:
            raise ValueError(f"{path}: {name} has shape {found[name]}, the model's is {wanted[name]}")


def _load_tensors(path):
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None


def save(checkpoints: Path, step: int, *, model, optimizers, state: dict, config: Config, tokenizer) -> Path:
    """Write `step-<step>` under `checkpoints` and give its path; a crash leaves the others as they were."""
    path, unfinished = checkpoints / f"step-{step:08d}", checkpoints / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write(unfinished, model, optimizers, state, config, tokenizer)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{path} could not be saved ({error}); the checkpoints before it are as they were") from None
    delete(path)                                        # there is one only where this step's evaluation came after it
    os.replace(unfinished, path)
    sync_directory(checkpoints)
    return path


def _write(unfinished, model, optimizers, state, config, tokenizer):
    save_file(_contiguous(model_tensors(model)), unfinished / "model.safetensors")
    save_file(_contiguous(optimizer_tensors(model, optimizers)), unfinished / "optimizer.safetensors")
    (unfinished / "state.json").write_text(json.dumps(state, indent=1), "utf-8")
    (unfinished / "config.json").write_text(config.to_json(), "utf-8")
    tokenizer.save(unfinished / "tokenizer")
    files = {}
    for file in sorted(file for file in unfinished.rglob("*") if file.is_file()):
        sync_file(file)
        files[file.relative_to(unfinished).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    sync_directory(unfinished / "tokenizer")
    write_durably(unfinished / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1).encode())


def delete(path: Path) -> None:
    """Remove a checkpoint, its manifest first, so that at no moment half of it looks whole."""
    if path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)
        sync_directory(path)
        shutil.rmtree(path)


def _contiguous(tensors):
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def verify(path: Path) -> None:
    """Raise ValueError naming the first file of a checkpoint that is not as its manifest says."""
    manifest = path / MANIFEST
    try:
        content = json.loads(manifest.read_text("utf-8"))
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        known = content["format"] == FORMAT
    except FileNotFoundError:
        raise ValueError(f"{path}: no checkpoint, {MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest}: damaged ({error!r})") from None
    if not known:
        raise ValueError(f"{manifest}: format {content['format']!r}, this version reads {FORMAT}")
    for name, (size, digest) in files.items():
        file = path / name
        if file.is_symlink() or not file.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{manifest}: {name} lies outside the checkpoint")
        if not file.is_file():
            raise ValueError(f"{file}: missing")
        if file.stat().st_size != size or sha256_of(file) != digest:
            raise ValueError(f"{file}: damaged, its size or SHA-256 is not the manifest's")
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer/settings.json"):
        if name not in files:
            raise ValueError(f"{manifest}: does not list {name}")


def in_run(run: Path) -> list[Path]:
    """A run's checkpoint directories, newest first, valid or not."""
    named = [path for path in (run / "checkpoints").glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint directory is named after."""
    return int(path.name.removeprefix("step-"))


def newest(run: Path, warn=lambda line: print(line, file=sys.stderr)) -> Checkpoint | None:
    """The newest valid checkpoint of a run, or None; `warn` is told of each damaged one that is passed over.

    One without a manifest was never finished, which a crash explains, and is passed over in silence.
    """
    for path in in_run(run):
        try:
            verify(path)
            return Checkpoint(path)
        except ValueError as error:
            if (path / MANIFEST).exists():
                warn(f"warning: {error}; the checkpoint before it is used")
    return None


def find(path: str | Path) -> Checkpoint:
    """The checkpoint that a path names: itself, or a run's newest valid one."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no run or checkpoint {path}")
    if (path / MANIFEST).exists():
        verify(path)
        return Checkpoint(path)
    found = newest(path)
    if found is None:
        raise ValueError(f"{path} holds no valid checkpoint; name a run directory or a checkpoint in it")
    return found


def prune(run: Path, step: int, keep_last: int, best_step: int | None) -> None:
    """Of the checkpoints up to `step` delete all but the newest `keep_last` and the best one.

    Later ones are damaged ones from before the run went on from here; they must not crowd out those that are whole.
    """
    for path in [path for path in in_run(run) if step_of(path) <= step][keep_last:]:
        if step_of(path) != best_step:
            delete(path)
