"""Checkpoints: atomic, hashed, without pickle, and enough to go on as if nothing had happened.

A checkpoint directory holds model.safetensors, optimizer.safetensors, state.json, config.json, tokenizer/ and, written
last, manifest.json with the size and SHA-256 of every other file, and of itself. It holds nothing else, no link and no
file that the manifest does not list (names that start with a dot aside), or it is no checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from minigpt.config import Config, make_config
from minigpt.files import read_json, read_sealed, sha256_of, sync_directory, sync_file, write_durably, write_sealed
from minigpt.optim import Optimizer
from minigpt.tokenizer import Tokenizer

FORMAT = 2
MANIFEST = "manifest.json"
REQUIRED = {"model.safetensors", "optimizer.safetensors", "state.json", "config.json"}
FILE_NAME = re.compile(r"(\w[\w.-]{0,99}/)?\w[\w.-]{0,99}")
NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
UNFINISHED = ".unfinished"
"""Name of the directory in which a checkpoint is written before it gets its own."""


class NotFinite(ValueError):
    """A tensor to be saved holds a number that is not finite."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file has been checked against the manifest."""

    path: Path

    @cached_property
    def config(self) -> Config:
        path = self.path / "config.json"
        try:
            return make_config(read_json(path))
        except (AttributeError, TypeError):
            raise ValueError(f"{path}: holds no sections of settings") from None

    @cached_property
    def state(self) -> dict:
        """What the loop saved: step, data position, random number generators, best so far."""
        return read_json(self.path / "state.json")

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None for a model that was imported without one."""
        if not (self.path / "tokenizer").exists():
            return None
        tokenizer = Tokenizer.load(self.path / "tokenizer")
        if tokenizer.vocab_size > self.config.model.vocab_size:
            raise ValueError(f"{self.path}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
                             f"{self.config.model.vocab_size}; they do not belong together")
        return tokenizer

    def check_depth(self) -> None:
        """Raise ValueError where config.json asks for more layers than there are tensors, before any is made."""
        with _opened(self.path / "model.safetensors") as file:
            count = len(file.keys())
        if self.config.model.depth > count:
            raise ValueError(f"{self.path / 'config.json'}: model.depth = {self.config.model.depth}, but "
                             f"model.safetensors has {count} tensors")

    def check_model(self, model: torch.nn.Module) -> None:
        """Raise ValueError unless the weights have the names, shapes and types of `model`'s, from the header alone.

        `model` may be on the meta device: what a config.json claims is then checked before memory is taken for it.
        """
        path = self.path / "model.safetensors"
        with _opened(path) as file:
            found = {name: (tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype())
                     for name in file.keys()}
        wanted = {name: (tuple(tensor.shape), DTYPES[tensor.dtype]) for name, tensor in model_tensors(model).items()}
        for name in sorted(found.keys() ^ wanted.keys()):
            raise ValueError(f"{path}: {name} is {'missing' if name in wanted else 'not part of the model'}; "
                             "the weights are of another model")
        for name in found:
            for what, here, there in zip(("shape", "type"), found[name], wanted[name]):
                if here != there:
                    raise ValueError(f"{path}: {name} has {what} {here}, the model's is {there}")

    def load_model(self, model: torch.nn.Module) -> None:
        """Copy the weights into `model`; names, shapes and types must be the same."""
        self.check_model(model)
        tensors = load_file(self.path / "model.safetensors")
        with torch.no_grad():
            for name, tensor in model_tensors(model).items():
                tensor.copy_(tensors[name])

    def load_start(self, model: torch.nn.Module, classes: list[str]) -> list[str]:
        """Copy the weights into a model that is to learn something else; gives the names of those that are new.

        These can be of the HEADS alone: where they are missing, have another shape, or tell other classes apart.
        """
        path, new, wanted = self.path / "model.safetensors", [], model_tensors(model)
        same_classes = self.config.objective.classes == classes
        with _opened(path) as file:
            names = set(file.keys())
            for name, tensor in wanted.items():
                fits = name in names and tuple(file.get_slice(name).get_shape()) == tuple(tensor.shape)
                if fits and (same_classes or not name.startswith("classifier.")):
                    with torch.no_grad():
                        tensor.copy_(file.get_tensor(name))
                elif name.startswith(HEADS):
                    new.append(name)
                else:
                    raise ValueError(f"{path}: {name} is missing or has another shape than the model's, "
                                     f"{tuple(tensor.shape)}; leave out of [model] what train.start_from decides")
        for name in sorted(names - wanted.keys()):
            raise ValueError(f"{path}: {name} is not part of the model; leave out of [model] what train.start_from "
                             "decides")
        return new

    def load_optimizers(self, model: torch.nn.Module, optimizers: list[Optimizer]) -> None:
        """Restore what `optimizer_tensors` gave when the checkpoint was saved."""
        path = self.path / "optimizer.safetensors"
        with _opened(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        parameters = dict(model.named_parameters())
        owners = {id(parameter): optimizer for optimizer in optimizers for group in optimizer.param_groups
                  for parameter in group["params"]}
        found = {}
        for name, tensor in tensors.items():
            parameter_name, _, key = name.rpartition("/")
            if parameter_name not in parameters:
                raise ValueError(f"{path}: {name} is the state of a parameter that the model does not have")
            parameter = parameters[parameter_name]
            shape = () if key == "step" else tuple(parameter.shape)
            if tuple(tensor.shape) != shape or tensor.dtype != parameter.dtype:
                raise ValueError(f"{path}: {name} is {tuple(tensor.shape)} {tensor.dtype}, not {shape} "
                                 f"{parameter.dtype}")
            found.setdefault(parameter_name, {})[key] = tensor.to(parameter.device)
        for name, state in found.items():
            optimizer = owners[id(parameters[name])]
            if state.keys() != set(optimizer.STATE):
                raise ValueError(f"{path}: {name} has the state {sorted(state)}, {type(optimizer).__name__} needs "
                                 f"{list(optimizer.STATE)}")
            optimizer.state[parameters[name]] = state


HEADS = ("pooler.", "next_sentence.", "classifier.", "token_types.")
"""Beginnings of names of the weights that one objective has and another has not."""
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8",
          torch.uint8: "U8"}
"""Safetensors' names."""


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """{name: tensor} of the weights, a tied head left out."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            tensors[name] = tensor.detach()
        seen.add(id(tensor))
    return tensors


def optimizer_tensors(model: torch.nn.Module, optimizers: list[Optimizer]) -> dict[str, torch.Tensor]:
    """{parameter/key: tensor} of every optimizer's state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {f"{names[id(parameter)]}/{key}": value for optimizer in optimizers
            for parameter, state in optimizer.state.items() for key, value in state.items()}


def _opened(path):
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None


def save(checkpoints: Path, step: int, *, model, optimizers, state: dict, config: Config, tokenizer) -> Path:
    """Write `step-<step>` under `checkpoints` and give its path.

    At every moment of it the checkpoints before are as they were. Raises NotFinite naming a tensor with a number that
    is not finite, and OSError where the disk refuses.
    """
    path, unfinished = checkpoints / f"step-{step:08d}", checkpoints / UNFINISHED
    tensors = {"model.safetensors": model_tensors(model), "optimizer.safetensors": optimizer_tensors(model, optimizers)}
    for name, tensor in (item for group in tensors.values() for item in group.items()):
        if not torch.isfinite(tensor).all():
            raise NotFinite(f"{name} holds a number that is not finite")
    try:
        delete(unfinished)
        unfinished.mkdir(parents=True)
        write(unfinished, {name: partial(save_file, {key: tensor.contiguous() for key, tensor in group.items()})
                           for name, group in tensors.items()}, state, config, tokenizer)
        replaced = path.with_name(f"{path.name}.replaced")
        if path.is_dir():                               # only where this step's evaluation came after its checkpoint
            delete(replaced)
            os.replace(path, replaced)
        os.replace(unfinished, path)
        sync_directory(checkpoints)
        sync_directory(checkpoints.parent)
        delete(replaced)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be saved ({error}); the checkpoints before it are as they were") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def write(unfinished: Path, writers: dict[str, Callable[[Path], None]], state: dict, config: Config,
          tokenizer: Tokenizer | None) -> None:
    """Fill an empty directory with a checkpoint; each of `writers` {name: function of a path} writes a file of tensors.
    """
    write_durably(unfinished / "state.json", json.dumps(state, indent=1).encode())
    for name, write_file in writers.items():
        write_file(unfinished / name)
        shutil.copymode(unfinished / "state.json", unfinished / name)       # safetensors lets nobody else read
    write_durably(unfinished / "config.json", config.to_json().encode())
    if tokenizer is not None:
        tokenizer.save(unfinished / "tokenizer")
    files = {}
    for file in sorted(file for file in unfinished.rglob("*") if file.is_file()):
        sync_file(file)
        files[file.relative_to(unfinished).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    write_sealed(unfinished / MANIFEST, {"format": FORMAT, "files": files}, indent=1)


def delete(path: Path) -> None:
    """Remove a checkpoint, its manifest first, so that half of it never looks whole; of a link only the link."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        with suppress(IsADirectoryError):
            (path / MANIFEST).unlink(missing_ok=True)
        sync_directory(path)
        shutil.rmtree(path)


def verify(path: Path) -> None:
    """Raise ValueError naming the first file of a checkpoint that is not as its manifest says."""
    manifest = path / MANIFEST
    if path.is_symlink() or manifest.is_symlink():
        raise ValueError(f"{path if path.is_symlink() else manifest}: a symbolic link; a run holds its files itself")
    try:
        content = read_sealed(manifest)
    except FileNotFoundError:
        raise ValueError(f"{path}: no checkpoint, {MANIFEST} is missing") from None
    if content.get("format") != FORMAT:
        raise ValueError(f"{manifest}: format {content.get('format')!r}, this version reads {FORMAT}")
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest}: not a manifest ({error!r})") from None
    for name in files:
        if not FILE_NAME.fullmatch(name) or ".." in name:
            raise ValueError(f"{manifest}: {name!r} lies outside the checkpoint, or is no name that it can hold")
    for name in sorted(REQUIRED - files.keys()):
        raise ValueError(f"{manifest}: does not list {name}")
    folders = {path / name.rpartition("/")[0] for name in files}
    for file in sorted(file for folder in folders for file in folder.glob("*")):
        if file.is_symlink():
            raise ValueError(f"{file}: a symbolic link; a checkpoint holds its files itself")
        name = file.relative_to(path).as_posix()
        if name not in files and name != MANIFEST and file not in folders and not file.name.startswith("."):
            raise ValueError(f"{file}: not listed in {MANIFEST}; remove it")
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file}: missing")
        if file.stat().st_size != size or sha256_of(file) != digest:
            raise ValueError(f"{file}: damaged, its size or SHA-256 is not the manifest's")


def in_run(run: Path) -> list[Path]:
    """A run's checkpoint directories, newest first, valid or not."""
    folder = run / "checkpoints"
    if folder.is_symlink():
        raise ValueError(f"{folder}: a symbolic link; a run holds its files itself (the run directory may be a link)")
    named = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=lambda path: (step_of(path), not is_replaced(path)), reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint directory is named after."""
    return int(NAME.fullmatch(path.name)[1])


def is_replaced(path: Path) -> bool:
    """Whether a checkpoint gave its name to a later one of the same step; only a crash leaves such a directory."""
    return NAME.fullmatch(path.name)[2] is not None


def newest(run: Path, warn=lambda line: print(line, file=sys.stderr)) -> Checkpoint | None:
    """The newest valid checkpoint of a run, or None; `warn` is told of each one that is passed over, and why."""
    for path in in_run(run):
        try:
            verify(path)
            return Checkpoint(path)
        except (ValueError, OSError) as error:
            warn(f"warning: {error}; the checkpoint before it is used")
    return None


def set_aside(run: Path, found: Checkpoint) -> None:
    """Rename what is newer than `found`, and so was passed over as damaged, so that it counts no longer."""
    for path in in_run(run):
        if step_of(path) > step_of(found.path) and not is_replaced(path):
            aside = path.with_name(f"{path.name}.damaged")
            delete(aside)
            os.replace(path, aside)


def find(path: str | Path) -> Checkpoint:
    """The checkpoint that a path names: itself, or a run's newest valid one."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no run or checkpoint {path}; name a directory that train.py made")
    if (path / MANIFEST).exists():
        path = path.resolve() if path.is_symlink() else path        # what the user names may be a link
        verify(path)
        return Checkpoint(path)
    found = newest(path)
    if found is None:
        raise ValueError(f"{path} holds no valid checkpoint; name a run directory or a checkpoint in it (of another's "
                         "model `minigpt import` makes one)")
    return found


def prune(run: Path, step: int, keep_last: int, best_step: int | None) -> None:
    """Of the checkpoints up to `step` delete all but the newest `keep_last` and the best one, and an unfinished one."""
    delete(run / "checkpoints" / UNFINISHED)
    until = [path for path in in_run(run) if step_of(path) <= step]
    kept = [path for path in until if not is_replaced(path)]
    kept = kept[:keep_last] + [path for path in kept if step_of(path) == best_step]
    for path in until:
        if path not in kept:
            delete(path)
