"""The training loop, top to bottom: data, model, optimizer, resume, then step by step to the final line.

    train(load_config("configs/shakespeare_cpu.toml"))

A step draws all its micro-batches first and divides summed losses by the counts over all of them, so accumulation
equals one big batch. Every random choice is a function of the seed and the data position, or of a generator that the
checkpoint holds, so a resumed run goes on exactly as it would have.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch

import kernels
from minigpt import checkpoint, labelled
from minigpt.config import Config, SamplingParams
from minigpt.data import Dataset, prepare
from minigpt.device import peak_flops, pick_device, pick_dtype
from minigpt.engine import Run
from minigpt.evaluate import Stopped, evaluate
from minigpt.files import expanded, held, write_durably
from minigpt.logs import JsonLines, finite
from minigpt.model import GPT
from minigpt.objectives import CompiledHidden, make_objective
from minigpt.optim import make_optimizers, schedule, set_learning_rate
from minigpt.progress import Progress, duration, process_age
from minigpt.resume import LoopState, filled_in, open_run, random_state, restore, set_random_state
from minigpt.signals import StopFlag, stop_signals
from minigpt.tokenizer import Tokenizer
from minigpt.update import Spike, Unsound, add_gradients, apply_gradients

SETTLED_STEPS = 20
"""After so many steps of an objective the average loss is known well enough to tell a spike from it."""



class Interrupted(Exception):
    """A signal ended the run after it was saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, exit_code: int, message: str):
        super().__init__(message)
        self.exit_code = exit_code


def train(config: Config, *, resume: bool = False, out=None) -> str:
    """Train as `config` says, in `config.train.run_dir`, and give the closing line.

    Progress goes to `out`, standard output unless given. Raises ValueError or OSError for what a user can mend,
    Interrupted after SIGINT, SIGTERM or SIGHUP.
    """
    run = expanded(config.train.run_dir, "train.run_dir")
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file; name another train.run_dir")
    text = Path(os.path.expanduser(config.data.path))
    if config.data.path != "stdlib" and text.is_dir() and run.resolve().is_relative_to(text.resolve()):
        raise ValueError(f"train.run_dir = {str(run)!r} lies in data.path = {config.data.path!r}, so the run would "
                         "learn from its own logs; name another")
    progress = Progress(out)
    with held(run):
        found = open_run(run, config, resume, progress.say)
        state = LoopState.of(found)
        if found:
            state.prune(run, config)                    # a kill may have come between a save and that
        if state.is_done(config):
            more = "train.early_stopping" if state.stopped_early(config) else "train.max_steps"
            progress.say(f"{run} is finished: step {state.step}; a larger {more} goes on")
            return closing_line(state.evaluated)
        return Trainer(run, config, found, state, progress).train()


class Trainer:
    """One run in a directory that this process holds: its parts, its loop, and what the loop does."""

    def __init__(self, run: Path, config: Config, found: checkpoint.Checkpoint | None, state: LoopState,
                 progress: Progress):
        self.began = time.monotonic() - process_age()
        self.run, self.state, self.progress, say = run, state, progress, progress.say
        kernels.use(config.train.kernels)
        if config.model.weight_bits:
            raise ValueError(f"model.weight_bits = {config.model.weight_bits}: weights of whole numbers cannot be "
                             "trained; leave it out, and afterwards run `minigpt quantize`")
        self.device = pick_device(config.train.device)
        if self.device.type == "cuda":                  # on a CPU this changes no result and takes seconds
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(config.train.deterministic)
        wanted = found.state["dtype"] if found and config.train.dtype == "auto" else config.train.dtype
        self.dtype_name = pick_dtype(wanted, self.device)
        self.dtype = getattr(torch, self.dtype_name)
        torch.manual_seed(config.train.seed)

        start = self.start_of(config) if config.train.start_from and not found else None
        self.dataset = self.prepare(config, (found or start).tokenizer if found or start else None)
        if found and found.state["dataset"] != self.dataset.fingerprint:
            raise ValueError(f"{run}: the text or the tokenizer at {config.data.path} is not the one this run began "
                             "with; restore it, or begin anew in another train.run_dir")
        self.tokenizer = self.dataset.tokenizer
        config = filled_in(config, self.tokenizer, getattr(self.dataset.train, "classes", ()))
        self.config, self.micro_batch = config, state.micro_batch or config.train.batch_size
        self.objective = make_objective(config, self.tokenizer, self.dataset.train)
        known = ["val_loss", *(f"val_{part}" for part in self.objective.evaluated.weights),
                 *["val_bpb"] * config.objective.is_causal, *self.objective.evaluated.measured]
        if config.train.best_by not in known:
            raise ValueError(f"train.best_by = {config.train.best_by!r} is nothing that an evaluation gives here: "
                             f"{', '.join(known)}")

        last = self.objective.phases[-1].first
        if last >= config.train.max_steps:
            raise ValueError(f"objective.name = {config.objective.name!r}: its last part would begin at step {last}, "
                             f"and train.max_steps = {config.train.max_steps}; change one of them")
        for task in self.objective.evaluated.tasks:
            next(task.in_order(self.dataset.val, 1))    # which raises where the held-out text cannot serve

        self.model = GPT(config.model).to(self.device)
        self.optimizers = make_optimizers(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.forward = self.compiled() if config.train.compile else self.model
        if start:
            new = start.load_start(self.model, config.objective.classes)
            say(f"starting from {start.path}" + (f"; new are {', '.join(new)}" if new else ""))
        if found:
            restore(found, self.model, self.optimizers, self.scaler)
            say(f"going on from {found.path}")
            if found.state["made_with"] != self.made_with:
                say(f"note: saved with {found.state['made_with']}, going on with {self.made_with}; the last bits may "
                    "differ")
        write_durably(run / "config.json", config.to_json().encode())
        self.tokenizer.save(run / "tokenizer")
        self.metrics, self.texts = JsonLines(run / "metrics.jsonl"), JsonLines(run / "samples.jsonl")
        for log in (self.metrics, self.texts):
            log.cut_back(state.step - bool(state.owed))     # what is owed is logged when it has been made up for
        if state.step >= config.train.max_steps and not state.owed:
            state.owed = {"step": state.step, "tokens": self.tokens}
        self.flops, self.peak = self.model.flops_per_token(), peak_flops(self.device)
        self.stop = StopFlag()
        self.troubles = {}                              # {what could not be written: why}, until it could
        self.batch = (0, 0)                             # step number and first row of the batch last drawn
        self.avoided = []                               # where the rows passed over since the last record came from
        say(f"{self.dataset.name}: {len(self.dataset.train):,} tokens of {self.dataset.train.num_bytes:,} bytes to "
            f"train on, {len(self.dataset.val):,} held out; {self.model.num_parameters / 1e6:.2f}M parameters; "
            f"{self.device}, {self.dtype_name}")

    @staticmethod
    def start_of(config: Config) -> checkpoint.Checkpoint:
        """The checkpoint that a new run starts from, which must have a tokenizer."""
        start = checkpoint.find(expanded(config.train.start_from, "train.start_from"))
        if start.tokenizer is None:
            raise ValueError(f"train.start_from: {start.path} has no tokenizer; import it again with --tokenizer DIR")
        if config.tokenizer.path:
            raise ValueError("tokenizer.path does not go with train.start_from, which has one; leave it out")
        return start

    def prepare(self, config: Config, tokenizer: Tokenizer | None) -> Dataset:
        """The text to learn from, or the table of texts with labels."""
        if "classification" not in config.objective.parts:
            return prepare(config.data, config.tokenizer, self.progress.say, tokenizer)
        dataset = labelled.prepare(config.data, config.tokenizer, config.objective.classes, tokenizer)
        for split in (dataset.train, dataset.val):
            count = sum(labelled.is_long(text, config.model.context_length) for text in split.texts)
            if count:
                what = "their beginnings are" if config.data.long_texts == "truncate" else "all their pieces are"
                self.progress.say(f"{split.name}: {count} of {len(split.texts)} texts do not fit the context of "
                                  f"{config.model.context_length} tokens; {what} read (data.long_texts)")
        return dataset

    @property
    def made_with(self) -> str:
        """What the last bits of a result depend on, besides the run itself."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads"

    @property
    def tokens(self) -> int:
        """Tokens trained on so far: rows times the context, which pairs and labelled texts may not fill."""
        return self.state.step * self.rows_per_step * self.config.model.context_length

    @property
    def rows_per_step(self) -> int:
        return self.config.train.batch_size * self.config.train.accumulation_steps

    def train(self) -> str:
        """The loop: from the state as it is to the end of the run. Gives the closing line."""
        every = self.config.train
        self.progress.start(self.state.step, every.max_steps)
        self.begin_window()
        with stop_signals() as self.stop:
            while not self.state.is_done(self.config):
                try:
                    record, best = self.state.owed or self.step(), False
                    step, last = self.state.step, self.state.step >= every.max_steps
                    if last or self.state.owed or step % every.eval_every == 0:
                        record, best = self.evaluate(record)
                    if not self.state.owed and ("val_loss" in record or "skipped" in record
                                                or "avoided" in record or step % every.log_every == 0):
                        self.attempt("a log", lambda line=record: self.metrics.write(line))
                        self.begin_window()
                    if self.state.bad_steps >= every.max_bad_steps:
                        self.give_up()
                    if (last or self.stop.number or self.state.stopped_early(self.config)
                            or step % every.checkpoint_every == 0 or best and every.keep_best):
                        self.save()
                except Unsound as problem:
                    self.roll_back(problem)
                if self.stop.number:
                    self.raise_troubles()
                    raise Interrupted(128 + self.stop.number, f"stopped at step {self.state.step}, saved in {self.run}")
        self.raise_troubles()
        best = self.state.best_step
        if every.keep_best and best not in (None, self.state.step):
            self.progress.say(f"the best evaluation, {every.best_by} {self.state.best:.4f}, was at step {best}: "
                              f"{self.run / 'checkpoints' / f'step-{best:08d}'}")
        return closing_line(self.state.evaluated)

    def step(self) -> dict:
        """One optimizer step, or a skipped one, and its log record. Raises Unsound where it shows damage."""
        state, config = self.state, self.config
        began = time.monotonic()
        while state.rows in state.avoided:
            self.avoided += self.sources(state.rows)
            state.rows += self.rows_per_step
        self.batch = (state.step + 1, state.rows)
        first = self.objective.at(state.step).first
        if state.step == first:                         # the losses before were of another mixture
            state.average_loss = None
        rate = schedule(state.step, config.train.max_steps, config.optim)
        set_learning_rate(self.optimizers, rate)
        highest = math.inf
        if config.train.spike_bound and state.step - first >= SETTLED_STEPS and state.average_loss is not None:
            highest = state.average_loss + config.train.spike_bound
        record = self.within_memory(self.add_gradients)
        record |= apply_gradients(record, self.optimizers, self.scaler, config.optim.grad_clip, highest)
        state.step, state.rows, loss = state.step + 1, state.rows + self.rows_per_step, record["train_loss"]
        if "skipped" in record:
            self.progress.say(f"step {state.step} skipped: {record['skipped']}; the weights are as before; its batch "
                              f"began at {self.place()}")
            overflowed = self.scaler.is_enabled() and self.scaler.get_scale() > 1 and math.isfinite(loss)
            state.skipped_steps, state.bad_steps = state.skipped_steps + 1, 0 if overflowed else state.bad_steps + 1
        else:
            before = loss if state.average_loss is None else state.average_loss
            state.average_loss, state.bad_steps = before + (loss - before) / 10, 0
        self.window_seconds += time.monotonic() - began
        self.window_tokens += self.rows_per_step * config.model.context_length
        speed = self.window_tokens / self.window_seconds
        record = {"step": state.step, "tokens": self.tokens, **record, "lr": rate * config.optim.learning_rate,
                  "skipped_steps": state.skipped_steps, "rollbacks": state.rollbacks,
                  "elapsed_seconds": round(time.monotonic() - self.began, 3), "tokens_per_second": round(speed, 1)}
        if self.avoided:
            record["avoided"], self.avoided = self.avoided, []
        if self.peak:
            record["mfu"] = round(self.flops * speed / self.peak, 4)
        self.progress.update(state.step, loss, speed)
        return record

    def add_gradients(self) -> dict:
        """The losses and, in the parameters, the gradients of the step's rows, cut into micro-batches."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        first, stop = self.state.rows, self.state.rows + self.rows_per_step
        mixture = self.objective.at(self.state.step)
        batches = [batch for start in range(first, stop, self.micro_batch)
                   for batch in mixture.draw(start, min(self.micro_batch, stop - start))]
        return add_gradients(self.forward, mixture, batches, self.scaler, self.autocast, self.device)

    def within_memory(self, work):
        """What `work` gives, made again with half the micro-batch for as long as the GPU's memory is too small."""
        wanted, random = self.micro_batch, random_state(self.device)
        while True:
            try:
                result = work()
                break
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
            self.micro_batch = self.state.micro_batch = (self.micro_batch + 1) // 2
            set_random_state(random)
            torch.cuda.empty_cache()
        if self.micro_batch < wanted:
            self.progress.say(f"the GPU's memory is too small for {wanted} rows at once: going on with "
                              f"{self.micro_batch}, accumulated to the same step")
        return result

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype is not torch.float32 else nullcontext()

    def evaluate(self, record: dict) -> tuple[dict, bool]:
        """The record with the evaluation in it, and whether it is the best; a signal puts the evaluation off."""
        state, config = self.state, self.config
        try:
            evaluated = self.within_memory(lambda: evaluate(
                self.model, self.objective.evaluated, self.dataset.val, batch_size=self.micro_batch,
                autocast=self.autocast, should_stop=lambda: self.stop.number))
            samples = self.samples()
        except Stopped:
            state.owed = finite(record)
            return record, False
        state.owed, state.evaluated, state.evaluated_step = {}, evaluated, state.step
        number = evaluated[config.train.best_by]
        higher = config.train.best_by in self.objective.evaluated.measured
        best = math.isfinite(number) and (
            state.best is None or (number > state.best if higher else number < state.best))
        if state.step <= self.objective.phases[-1].first:       # what it is to learn in the end has not begun yet
            best = False
        elif best:
            state.best, state.best_step, state.worse_evaluations = number, state.step, 0
        else:
            state.worse_evaluations += 1
        record = record | evaluated
        self.progress.say(evaluation_line(record, state.stopped_early(config)))
        for sample in samples:
            self.attempt("a log", lambda line=sample: self.texts.write(line))
        return record, best

    def samples(self) -> list[dict]:
        """Continuations of train.sample_prompts with a fixed seed, so that those of two steps can be compared."""
        if not self.config.objective.is_causal:
            return []
        samples, run = [], Run(self.model, self.tokenizer, self.config, self.run, slots=1)
        self.model.eval()
        try:
            for prompt in self.config.train.sample_prompts:
                pieces = []
                for piece in run.stream(prompt, SamplingParams(max_new_tokens=self.config.train.sample_tokens)):
                    pieces.append(piece)
                    if self.stop.number:
                        raise Stopped
                samples.append({"step": self.state.step, "prompt": prompt, "text": "".join(pieces)})
        except ValueError as problem:                   # logits that are not finite; the run goes on without samples
            self.progress.say(f"no samples at step {self.state.step}: {problem}")
        finally:
            self.model.train()
        return samples

    def save(self) -> None:
        """Logs, then the checkpoint, so that no checkpoint is ahead of its logs; then what is no longer kept goes."""
        self.attempt("a log", lambda: [log.sync() for log in (self.metrics, self.texts)])
        self.attempt("a checkpoint", self.save_checkpoint)

    def save_checkpoint(self) -> None:
        random = {name: base64.b64encode(state.numpy().tobytes()).decode()
                  for name, state in random_state(self.device).items()}
        state = {"loop": dataclasses.asdict(self.state), "dataset": self.dataset.fingerprint,
                 "dtype": self.dtype_name, "scaler": self.scaler.state_dict(), "random": random,
                 "made_with": self.made_with}
        try:
            checkpoint.save(self.run / "checkpoints", self.state.step, model=self.model, optimizers=self.optimizers,
                            state=state, config=self.config, tokenizer=self.tokenizer)
        except checkpoint.NotFinite as problem:
            raise Unsound(f"{problem}") from None
        self.state.prune(self.run, self.config)

    def attempt(self, what: str, write) -> None:
        """Write something; where the disk refuses, say so and go on: it is tried again, and in the end it counts."""
        try:
            write()
            self.troubles.pop(what, None)
        except OSError as error:
            if what not in self.troubles or what == "a checkpoint":
                self.progress.say(f"warning: {error}; the run goes on and will try again")
            self.troubles[what] = error

    def raise_troubles(self) -> None:
        """At the end of the run: raise OSError where something is still not written."""
        for what, error in self.troubles.items():
            raise OSError(f"{what} could not be written to the end: {error}")

    def roll_back(self, problem: Unsound) -> None:
        """Go back to the newest checkpoint, and pass over the batch at which the problem showed.

        A spike before the first checkpoint only passes over the batch. Raises ValueError where there is nothing to go
        back to, or where it did not help.
        """
        before, (step, first) = self.state, self.batch
        self.progress.say(f"step {step}: {problem}; its batch began at {self.place()}")
        tries, furthest = before.tries + 1 if step <= before.furthest else 1, max(step, before.furthest)
        found = checkpoint.newest(self.run, self.progress.say)
        if tries > self.config.train.max_bad_steps or not found and not isinstance(problem, Spike):
            raise ValueError(f"step {step}: {problem}, and {'going back did not mend it' if found else NO_CHECKPOINT}; "
                             f"{ADVICE}")
        if found:
            self.state, self.avoided = LoopState.of(found), []
            self.state.micro_batch = before.micro_batch
            checkpoint.set_aside(self.run, found)
            restore(found, self.model, self.optimizers, self.scaler)
            for log in (self.metrics, self.texts):
                self.attempt("a log", lambda log=log: log.cut_back(self.state.step))
        self.state.rollbacks = before.rollbacks + 1
        self.state.avoided = sorted({*before.avoided, first})
        self.state.tries, self.state.furthest = tries, furthest
        self.begin_window()
        self.progress.say(f"going on from step {self.state.step}, without that batch")

    def give_up(self) -> None:
        """Save with the weights from before the bad steps, and raise ValueError with advice."""
        bad_steps, self.state.bad_steps = self.state.bad_steps, 0
        self.save()
        self.raise_troubles()
        raise ValueError(f"{bad_steps} steps in a row had a loss or gradient that is not finite; {self.run} is saved "
                         f"with the weights from before them. {ADVICE}")

    def sources(self, first: int) -> list[tuple[str, int]]:
        """Document and byte offset at which each row of the batch from row `first` on begins."""
        mixture = self.objective.at(self.state.step)
        return [source for row in range(first, first + self.rows_per_step) for source in mixture.sources(row)]

    def place(self) -> str:
        """Where the batch last drawn came from, in words."""
        sources = self.sources(self.batch[1])
        more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
        return ", ".join(f"{name} byte {offset}" for name, offset in sources[:3]) + more

    def begin_window(self) -> None:
        """From here on the speed is measured anew."""
        self.window_seconds, self.window_tokens = 0.0, 0

    def compiled(self):
        """The model with a compiled `hidden`, proved on one row; where that fails the plain one, and a line why."""
        try:
            fast = CompiledHidden(self.model)
            mixture = self.objective.at(self.state.step)
            for batch in mixture.draw(0, 1):
                mixture.losses(fast, batch.to(self.device))
            return fast
        except Exception as error:
            self.progress.say(f"torch.compile does not work here ({type(error).__name__}); going on without it")
            return self.model


ADVICE = "Lower optim.learning_rate, raise optim.warmup_steps or use train.dtype=float32 in a new run"
NO_CHECKPOINT = "there is no checkpoint yet to go back to"


def evaluation_line(record: dict, stopped_early: bool) -> str:
    parts = [f"step {record['step']}: validation loss {record['val_loss']:.4f}"]
    if "val_bpb" in record:
        parts.append(f"{record['val_bpb']:.4f} bits per byte")
    parts += measured(record)
    if "train_loss" in record:
        parts += [f"training loss {float(record['train_loss']):.4f}", duration(record["elapsed_seconds"])]
    return ", ".join(parts) + ("; stopping early" if stopped_early else "")


def measured(record: dict) -> list[str]:
    """An evaluation's accuracies and the like, in words."""
    return [f"{name.removeprefix('val_').replace('_', ' ')} {value:.4f}" for name, value in record.items()
            if name.startswith("val_") and name.endswith(("accuracy", "f1"))]


def closing_line(evaluated: dict) -> str:
    if "val_bpb" in evaluated:
        return ", ".join([f"final: {evaluated['val_bpb']:.4f} bits per byte", *measured(evaluated)])
    return ", ".join([f"final: {evaluated['val_loss']:.4f} nats per target", *measured(evaluated)])
