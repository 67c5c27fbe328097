"""Import of Hugging Face's directories and nanoGPT's ckpt.pt, and export; families.py has the map of names and shapes.

Tensors go from file to file in blocks: neither direction takes the memory of a model. Nothing here needs transformers.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minigpt import checkpoint, hf_tokenizer
from minigpt.checkpoint import model_tensors
from minigpt.config import Config, ModelConfig, ObjectiveConfig
from minigpt.families import FAMILIES, NANOGPT, Family, Pair, config_of, family_for
from minigpt.files import named, read_json, sync_directory, sync_file
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer

INDEX, WEIGHTS, PICKLE = "model.safetensors.index.json", "model.safetensors", "ckpt.pt"
READABLE = ("F32", "F16", "BF16")
BLOCK_BYTES = 1 << 26
"""Of a tensor that are converted and written at a time."""


class Weights:
    """The tensors of a directory of safetensors files, one or several with an index, read one at a time.

    `shapes` and `dtypes` are those of each tensor by name. A file is open only while a tensor is read from it, since
    what was read of an open file counts as memory.
    """

    def __init__(self, directory: Path):
        index, single = directory / INDEX, directory / WEIGHTS
        if single.is_file():                            # as transformers has it where both are there
            self.path, files = single, {single: None}
        elif index.is_file():
            self.path, files = index, self._indexed(directory, index)
        else:
            raise FileNotFoundError(f"{directory}: no {WEIGHTS} and no {INDEX}; name a directory that holds one (a "
                                    "pickle is not read: save it as safetensors first)")
        self.shapes, self.dtypes, self._files = {}, {}, {}
        for file, names in files.items():
            with self._open(file) as tensors:
                for name in tensors.keys() if names is None else names:
                    try:
                        entry = tensors.get_slice(name)
                    except SafetensorError:
                        raise ValueError(f"{index}: {name} is not in {file.name}, which it names for it") from None
                    self.shapes[name], self.dtypes[name] = tuple(entry.get_shape()), entry.get_dtype()
                    self._files[name] = file

    @staticmethod
    def _indexed(directory, index):
        content = read_json(index)
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"{index}: holds no weight_map of file names")
        for name in {*files, *files.values()}:
            if any("\ud800" <= character <= "\udfff" for character in name):
                raise ValueError(f"{index}: {name!r} is no name, as it has a lone surrogate")
        outside = sorted(file for file in set(files.values()) if Path(file).name != file or file in ("", ".."))
        if outside:
            raise ValueError(f"{index}: {outside[0]!r} lies outside the directory, or is no name of a file")
        names = {}
        for name, file in files.items():
            names.setdefault(directory / file, []).append(name)
        return names

    @staticmethod
    def _open(path):
        if not path.is_file():                          # opening a pipe would wait for ever
            what = "not a file" if path.exists() else "missing"
            raise FileNotFoundError(f"{path}: {what}, and named by {INDEX}")
        try:
            return safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file, or cut off ({error})") from None

    def tensor(self, name: str) -> torch.Tensor:
        with self._open(self._files[name]) as tensors:
            return tensors.get_tensor(name)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The rows of a tensor, some at a time."""
        rows, *row = self.shapes[name]
        count = _rows_of_a_block(torch.Size(row).numel())
        for start in range(0, rows, count):
            with self._open(self._files[name]) as tensors:
                yield tensors.get_slice(name)[start:start + count]


class PickledWeights:
    """The tensors of nanoGPT's ckpt.pt. Its pickle may hold tensors and plain values alone, so that no code is run."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with named(path), open(path, "rb"):         # errors of the system, as of permissions, are its own
                pass
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise ValueError(f"{path}: refused, a pickle of more than tensors and plain values, which could run code; "
                             "save it anew with its model and model_args alone") from None
        except (RuntimeError, EOFError, LookupError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.filename:
                raise
            raise ValueError(f"{path}: not a file of torch.save, of its old format, or cut off "
                             f"({str(error).splitlines()[0]})") from None
        tensors = content.get("model") if isinstance(content, dict) else None
        self.arguments = content.get("model_args") if isinstance(content, dict) else None
        if not isinstance(tensors, dict) or not isinstance(self.arguments, dict) or not all(
                isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
                for name, tensor in tensors.items()):
            raise ValueError(f"{path}: not a checkpoint of nanoGPT, which has model_args, and tensors by name in model")
        self._tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: checkpoint.DTYPES.get(tensor.dtype) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The rows of a tensor, some at a time."""
        return iter(_blocks(self._tensors[name]))


@dataclass(frozen=True)
class Found:
    """A model of others: what it is, and where its tensors lie."""

    family: Family
    model: ModelConfig
    weights: Weights | PickledWeights
    settings: dict
    """Their config.json."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{our name: shape}"""
        return shapes_of(self.model)

    @cached_property
    def bare(self) -> str:
        """What their names lack, in files of the bare model."""
        prefix = self.family.prefix
        return "" if any(name.startswith(prefix) for name in self.weights.shapes) else prefix

    def plan(self) -> tuple[dict[Pair, list[str]], list[str]]:
        """({pair: the names that its tensors have in the files}, names left out); nothing is read yet.

        Raises ValueError naming a tensor that is missing, has another shape or type, or has no place.
        """
        weights, family, bare, found = self.weights, self.family, self.bare, {}
        for pair in family.pairs(self.model):
            found[pair] = [self._name(name.removeprefix(bare)) for name in pair.theirs]
            for name, shape in zip(found[pair], pair.shapes(self.shapes[pair.ours]), strict=True):
                if weights.shapes[name] != shape:
                    raise ValueError(f"{weights.path}: {name} is {weights.shapes[name]}, by its settings it must be "
                                     f"{shape}")
                if weights.dtypes[name] not in READABLE:
                    raise ValueError(f"{weights.path}: {name} has type {weights.dtypes[name]}, which is not read, only "
                                     f"{', '.join(READABLE)}; save it as one of these")
        assert {pair.ours for pair in found} == self.shapes.keys()
        known = {name for group in found.values() for name in group}
        copies = {copy.removeprefix(bare) for copy, _ in family.copies}
        left_out = sorted(name for name in weights.shapes.keys() - known
                          if name.startswith(tuple(prefix.removeprefix(bare) for prefix in family.left_out)))
        for name in sorted(weights.shapes.keys() - known - copies - set(left_out)):
            if not name.endswith(family.derived):
                raise ValueError(f"{weights.path}: {name} is no part of the model that the settings tell of")
        return found, left_out

    def _name(self, name):
        old = {name} | {name.removesuffix(new) + old for new, old in self.family.old_names if name.endswith(new)}
        for candidate in sorted(old, key=name.__ne__):
            if candidate in self.weights.shapes:
                return candidate
        raise ValueError(f"{self.weights.path}: {name} is missing; the settings tell of a model that has it")

    def tensors(self, planned: dict[Pair, list[str]]) -> Iterator[tuple[str, torch.Tensor]]:
        """(our name, rows of our tensor), one tensor of theirs at a time, in their types.

        Raises ValueError naming a tensor with a number that is not finite.
        """
        for pair, names in planned.items():
            for name in names:
                tensor = self.weights.tensor(name)
                if not all(torch.isfinite(block).all() for block in _blocks(tensor)):
                    raise ValueError(f"{self.weights.path}: {name} holds a number that is not finite")
                yield pair.ours, pair.rows_of(tensor)

    def differing_copy(self) -> str | None:
        """The name of a tensor that is not what it should be a copy of, None where all are."""
        shapes = self.weights.shapes
        for copy, original in self.family.copies:
            copy, original = copy.removeprefix(self.bare), original.removeprefix(self.bare)
            both = copy, original
            if shapes.keys() >= set(both) and not (shapes[copy] == shapes[original] and all(
                    map(torch.equal, *map(self.weights.blocks, both)))):
                return copy
        return None


def _blocks(tensor):
    """A tensor as blocks of rows."""
    return tensor.split(_rows_of_a_block(tensor[:1].numel()))


def _rows_of_a_block(row_size):
    return max(1, BLOCK_BYTES // (4 * max(1, row_size)))


def open_model(source: Path) -> Found:
    """The model in a directory of Hugging Face's, in a ckpt.pt of nanoGPT's or in a directory that holds one.

    Raises ValueError or FileNotFoundError naming what is missing, damaged or unknown.
    """
    config, is_pickle = source / "config.json", source.is_file()
    if not source.exists():
        raise FileNotFoundError(f"no directory or file {source}; name one that holds a model")
    if is_pickle or (source / PICKLE).is_file() and not config.exists():
        weights = PickledWeights(source if is_pickle else source / PICKLE)
        return _found(NANOGPT, weights.path, weights.arguments, lambda: weights)
    given = read_json(config)
    kind = given.get("model_type") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{config}: model_type {kind!r} is not one that can be read: {', '.join(FAMILIES)}")
    return _found(FAMILIES[kind], config, given, lambda: Weights(source))


def _found(family, path, given, weights):
    try:
        model = ModelConfig(**family.settings(given))
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path}: a setting has a value of a wrong type ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    found = Found(family, model, weights(), given)
    if model.tied_embeddings and (copy := found.differing_copy()):
        if not family.can_untie:
            raise ValueError(f"{found.weights.path}: {copy} is not the tensor that it is tied to; such a model is not "
                             "supported")
        found = replace(found, model=replace(model, tied_embeddings=False))
    return found


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of our tensors, a tied head left out."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in model_tensors(GPT(model, initial=False)).items()}


def import_model(source: Path, out: Path, tokenizer: Path | None = None, warn=print) -> str:
    """Write a model of others as a checkpoint directory `out`, whole or not at all; gives a line that tells of it.

    `tokenizer`: the directory of its tokenizer's files, unless they lie beside the model. `warn` is told what is left
    out.
    """
    check_free(out)
    found = open_model(source)
    planned, left_out = found.plan()
    directory = tokenizer or (source.parent if source.is_file() else source)
    vocabulary = hf_tokenizer.read(directory, found.settings)
    if vocabulary is None:
        if tokenizer:
            raise FileNotFoundError(f"{tokenizer}: no {' or '.join(hf_tokenizer.FILES)}; name a directory with one")
    elif vocabulary.vocab_size > found.model.vocab_size:
        raise ValueError(f"{directory}: the tokenizer has {vocabulary.vocab_size} tokens and the model "
                         f"{found.model.vocab_size}; they do not belong together")
    objective = found.family.objective + ("+next_sentence" if found.model.next_sentence else "")
    config = Config(model=found.model, objective=ObjectiveConfig(name=objective))
    shapes = {pair.ours: found.shapes[pair.ours] for pair in planned}
    with new_directory(out) as unfinished:
        checkpoint.write(unfinished, {
            WEIGHTS: lambda path: write_tensors(path, shapes, found.tensors(planned)),
            "optimizer.safetensors": lambda path: save_file({}, path),
        }, {"imported": {"architecture": found.family.architecture_of(found.model)}}, config, vocabulary)
    if left_out:
        warn(f"warning: left out, as they serve another objective: {', '.join(left_out)}")
    if vocabulary is None:
        warn(f"warning: {directory} has no {' or '.join(hf_tokenizer.FILES)}; without a tokenizer the model takes "
             "token ids only; --tokenizer DIR takes one from elsewhere")
    return f"{out}: {found.family.architecture_of(found.model)}, {_size(shapes)}" + (
        "" if vocabulary is None else f", {vocabulary.vocab_size} tokens")


def export_model(source: Path, out: Path, warn=print) -> str:
    """Write a run or checkpoint as a directory `out` that transformers loads, whole or not at all.

    With its tokenizer and a model card. Raises Unsupported for a model that no family has.
    """
    check_free(out)
    found = checkpoint.find(source)
    found.check_depth()
    with torch.device("meta"):
        found.check_model(GPT(found.config.model, initial=False))
    model, tokenizer = found.config.model, found.tokenizer
    if model.weight_bits:
        raise ValueError(f"{found.path}: has weights of {model.weight_bits} bits; export what it was quantized from")

    def tensor(name):
        with safe_open(found.path / "model.safetensors", "pt") as file:
            return file.get_tensor(name)

    with new_directory(out) as unfinished:
        kind, family = write_model(unfinished, model, found.config.objective.name, tensor, tokenizer)
        if tokenizer is not None:
            hf_tokenizer.write(unfinished, tokenizer, model.context_length, model.next_sentence)
            if kind == "qwen2" and not str(tokenizer.theirs.get("tokenizer_class")).startswith("Qwen2"):
                warn("warning: for a qwen2 model AutoTokenizer splits a text as Qwen's own tokenizer does, not as this "
                     "one; load it with PreTrainedTokenizerFast.from_pretrained")
        (unfinished / "README.md").write_text(model_card(found, family, out.name), "utf-8")
        for file in unfinished.iterdir():
            sync_file(file)
    if tokenizer is None:
        warn(f"warning: {found.path} has no tokenizer, so none was written")
    return f"{out}: {family.architecture_of(model)}, {_size(shapes_of(model))}"


def model_card(found: checkpoint.Checkpoint, family: Family, name: str) -> str:
    """README.md for a directory that `export_model` writes, in Markdown."""
    model, loop = found.config.model, found.state.get("loop", {})
    causal = family.objective == "causal"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {'text-generation' if causal else 'fill-mask'}",
             "tags: [minigpt]", "---", "", f"# {name}", "",
             f"{family.architecture_of(model)} of {_size(shapes_of(model))}, written by minigpt.", "",
             "| | |", "|---|---|",
             f"| context | {model.context_length} tokens |", f"| vocabulary | {model.vocab_size} tokens |",
             f"| layers, width, heads | {model.depth}, {model.width}, {model.num_heads} |",
             f"| objective | {found.config.objective.name} |"]
    if loop:
        train = found.config.train
        tokens = loop["step"] * train.batch_size * train.accumulation_steps * model.context_length
        lines += [f"| trained for | {loop['step']} steps, {tokens:,} tokens |"]
        lines += [f"| {key.replace('_', ' ')} on held-out text | {loop['evaluated'][key]:.4f} |"
                  for key in ("val_loss", "val_bpb", "val_masked_accuracy", "val_next_sentence_accuracy")
                  if key in loop.get("evaluated", {})]
    kind = "AutoModelFor" + ("CausalLM" if causal else "PreTraining" if model.next_sentence else "MaskedLM")
    lines += ["", "```python", f"from transformers import {kind}, AutoTokenizer", "",
              f'model = {kind}.from_pretrained("{name}")']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{name}")'] * (found.tokenizer is not None)
    lines += ["```", "", "Say here what text it was trained on, its licence, and what it is not for.", ""]
    return "\n".join(lines)


def check_free(out: Path) -> None:
    """Raise ValueError where something has that name."""
    if os.path.lexists(out):
        raise ValueError(f"{out} exists already; name another, or remove it")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when the block has ended well; else nothing of it, nor of the
    directories above it that had to be made, is left."""
    above = [path for path in (out.absolute(), *out.absolute().parents)[1:] if not path.exists()]
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.absolute().with_name(f".{out.name[:100]}.{secrets.token_hex(8)}")
    unfinished.mkdir()
    done = False
    try:
        yield unfinished
        check_free(out)
        os.rename(unfinished, out)
        sync_directory(out.absolute().parent)
        done = True
    finally:
        if not done:
            shutil.rmtree(unfinished, ignore_errors=True)
            for path in above:
                with suppress(OSError):
                    path.rmdir()


def _size(shapes):
    return f"{sum(torch.Size(shape).numel() for shape in shapes.values()):,} parameters"


def write_model(directory: Path, model: ModelConfig, objective: str, ours, tokenizer: Tokenizer | None = None):
    """Write config.json, generation_config.json and model.safetensors; `ours` gives a tensor by our name.

    Tensors are asked for one at a time. Raises Unsupported for a model that no family has. Gives (model_type, family).
    """
    kind, family = family_for(model, objective)
    ids = hf_tokenizer.ids_of(tokenizer)
    for name, content in (("config.json", config_of(kind, model) | ids), ("generation_config.json", ids)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    shapes, pairs = shapes_of(model), list(family.pairs(model))
    theirs = {name: shape for pair in pairs for name, shape in zip(
        pair.theirs, pair.shapes(shapes[pair.ours]), strict=True)}
    write_tensors(directory / WEIGHTS, theirs, (part for pair in pairs for part in zip(
        pair.theirs, pair.parted(ours(pair.ours)), strict=True)))
    return kind, family


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], parts: Iterable[tuple[str, torch.Tensor]]) -> None:
    """A safetensors file of float32 tensors in the order of `shapes`; each comes as one or more parts, row after row.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                     # so that the numbers begin at a multiple of 8
    with named(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, part in parts:
            assert header[name]["data_offsets"][0] <= file.tell() - 8 - len(text) < header[name]["data_offsets"][1]
            for block in _blocks(part.detach()):
                file.write(block.float().contiguous().numpy())
        assert file.tell() == 8 + len(text) + end
