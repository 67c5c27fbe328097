"""What a run goes on from: the loop's state, the checkpoint it is in, and putting everything back as it was."""

from __future__ import annotations

import base64
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import torch

from minigpt import checkpoint
from minigpt.config import Config
from minigpt.tokenizer import Tokenizer

FIXED_ON_RESUME = ("data.order", "data.document_mask", "tokenizer", "model", "objective", "train.seed",
                   "train.batch_size", "train.accumulation_steps", "train.best_by", "optim.name", "data.long_texts",
                   "data.text_columns", "data.label_column")
"""Settings that a resumed run must share with the run as it was begun. The text may have moved, not changed."""
FILLED_IN = {("model", "vocab_size"), ("model", "next_sentence"), ("model", "num_classes"), ("model", "token_types"),
             ("objective", "classes")}
"""Settings that a run itself sets, from its text and its objective; see `filled_in`."""
MOST = 1 << 62
SAVED = {"loop": dict, "dataset": str, "dtype": str, "scaler": dict, "random": dict, "made_with": str}
"""What state.json holds."""


@dataclass
class LoopState:
    """What the loop itself remembers; it is part of every checkpoint."""

    step: int = 0
    rows: int = 0
    """Position in the data: training rows dealt so far."""
    best: float | None = None
    """The best evaluation's number that train.best_by names."""
    best_step: int | None = None
    worse_evaluations: int = 0
    """Evaluations in a row that were not better than the best, for early stopping."""
    evaluated: dict = dataclasses.field(default_factory=dict)
    """Result of the last evaluation."""
    evaluated_step: int | None = None
    owed: dict = dataclasses.field(default_factory=dict)
    """The log record of this step where an interrupt came before the evaluation that was due, else empty."""
    average_loss: float | None = None
    """Running average of the training loss, to which each step adds a tenth of itself; None before the first."""
    bad_steps: int = 0
    """Steps in a row that were skipped because the loss or a gradient was not finite."""
    skipped_steps: int = 0
    """All such steps so far."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint, or would have if there had been one."""
    avoided: list = dataclasses.field(default_factory=list)
    """First rows of the batches that are passed over, because the run went back on account of them."""
    furthest: int = 0
    """The furthest step on account of which the run went back."""
    tries: int = 0
    """Times that it went back without getting beyond that step."""
    micro_batch: int = 0
    """Rows that fit the GPU's memory at once, where that is less than train.batch_size; else 0."""

    def is_done(self, config: Config) -> bool:
        """Whether the run has ended, by its last step or by early stopping, with an evaluation of where it ended."""
        last = self.step >= config.train.max_steps or self.stopped_early(config)
        return last and not self.owed and self.evaluated_step == self.step

    def prune(self, run: Path, config: Config) -> None:
        """Delete the checkpoints that are no longer kept."""
        checkpoint.prune(run, self.step, config.train.keep_last, self.best_step if config.train.keep_best else None)

    def stopped_early(self, config: Config) -> bool:
        return 0 < config.train.early_stopping <= self.worse_evaluations

    @classmethod
    def of(cls, found: checkpoint.Checkpoint | None) -> LoopState:
        """The state in a checkpoint, a new one for None; ValueError where that file holds something else."""
        if found is None:
            return cls()
        try:
            state = cls(**found.state["loop"])
            sound = (all(isinstance(getattr(state, key), kind) for key, kind in get_type_hints(cls).items())
                     and 0 <= state.step < MOST and 0 <= state.rows < MOST
                     and all(_is_record(record, key) for record, key in ((state.owed, "step"),
                                                                         (state.evaluated, "val_loss")))
                     and all(isinstance(found.state[key], kind) for key, kind in SAVED.items())
                     and found.state["dtype"] in ("float32", "bfloat16", "float16"))
        except (TypeError, KeyError):
            sound = False
        if not sound:
            raise ValueError(f"{found.path / 'state.json'}: not a state of this version")
        return state


def _is_record(record, key):
    """Whether a dictionary is empty, or one of numbers, `key` among them, and of what a log line holds besides."""
    names = {"skipped", "avoided"}
    return not record or key in record and all(
        isinstance(value, int | float) or name in names or value in ("nan", "inf", "-inf")
        for name, value in record.items())


def open_run(run: Path, config: Config, resume: bool, say) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, or None for a new run. Refuses to write over a run, and to resume another one."""
    if not any(run.iterdir()):
        return None
    if not resume:
        raise ValueError(f"{run} is not empty; go on with --resume, or name another train.run_dir")
    for path in (*run.iterdir(), *run.glob("tokenizer/*")):
        if path.is_symlink():
            raise ValueError(f"{path}: a symbolic link; a run holds its files itself (the run directory may be a link)")
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path}: neither a file nor a directory; remove it")
    known = (run / "config.json").exists() or (run / "checkpoints").exists()
    if not known and any(not path.name.startswith(".") for path in run.iterdir()):
        raise ValueError(f"{run} is not empty and is no run; name another train.run_dir")
    found = checkpoint.newest(run, say)
    if found is None:
        if checkpoint.in_run(run):
            raise ValueError(f"{run} has only damaged checkpoints; restore one, or begin anew in another train.run_dir")
        say(f"{run} has no checkpoint yet; beginning at step 0")
        return None
    check_same_run(found, config)
    checkpoint.set_aside(run, found)
    return found


def check_same_run(found: checkpoint.Checkpoint, config: Config) -> None:
    """Raise ValueError naming the first setting that cannot change within a run and did."""
    before, now = found.config.to_dict(), config.to_dict()
    for place in FIXED_ON_RESUME:
        section, _, only = place.partition(".")
        for key in [only] if only else now[section]:
            if (section, key) in FILLED_IN or (section, key) == ("tokenizer", "path"):
                continue                                # the latter is a mere place
            if before[section][key] != now[section][key]:
                raise ValueError(f"{section}.{key} = {now[section][key]!r}, but {found.path.parent.parent} was begun "
                                 f"with {before[section][key]!r}; restore it, or begin anew in another train.run_dir")


def filled_in(config: Config, tokenizer: Tokenizer, classes: tuple[str, ...]) -> Config:
    """A config with the settings in it that its objective, its tokenizer and its labels decide.

    Raises ValueError for a vocabulary that is too small.
    """
    model, objective = config.model, config.objective
    vocab_size = model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(f"model.vocab_size = {vocab_size} is less than the tokenizer's {tokenizer.vocab_size}; leave "
                         "it out, or make it at least that")
    settings = {"vocab_size": vocab_size}
    if "next_sentence" in objective.parts:
        settings |= {"next_sentence": True, "token_types": model.token_types or 2}
    if "classification" in objective.parts:
        settings["num_classes"] = len(classes)
    return dataclasses.replace(config, model=dataclasses.replace(model, **settings),
                               objective=dataclasses.replace(objective, classes=list(classes)))


def restore(found: checkpoint.Checkpoint, model, optimizers, scaler) -> None:
    """Put weights, optimizers, loss scale and random number generators back as a checkpoint holds them."""
    found.load_model(model)
    found.load_optimizers(model, optimizers)
    try:
        if scaler.is_enabled() and found.state["scaler"]:
            scaler.load_state_dict(found.state["scaler"])
        set_random_state({name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
                          for name, text in found.state["random"].items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{found.path / 'state.json'}: damaged random numbers or loss scale ({error!r})") from None


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of torch's generators, the only ones that a run draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
