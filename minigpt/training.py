"""The training loop, top to bottom: data, model, optimizer, resume, then step by step to the final line.

    train(load_config("configs/shakespeare_cpu.toml"))

A step draws all its micro-batches first and divides summed losses by the counts over all of them, so accumulation
equals one big batch. Every random choice is a function of the seed and the data position, or of a generator that the
checkpoint holds, so a resumed run goes on exactly as it would have.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
from minigpt import checkpoint
from minigpt.config import Config, SamplingParams
from minigpt.data import Dealer, prepare
from minigpt.device import peak_flops, pick_device, pick_dtype
from minigpt.engine import Run
from minigpt.evaluate import Stopped, evaluate
from minigpt.files import held, write_durably
from minigpt.model import GPT
from minigpt.objectives import make_objective
from minigpt.optim import make_optimizers, schedule, set_learning_rate
from minigpt.progress import Progress, duration, process_age

FIXED_ON_RESUME = ("data.order", "data.document_mask", "tokenizer", "model", "objective", "train.seed",
                   "train.batch_size", "train.accumulation_steps", "optim.name")
"""Settings that a resumed run must share with the run as it was begun. The text may have moved, not changed."""


@dataclass
class LoopState:
    """What the loop itself remembers; it is part of every checkpoint."""

    step: int = 0
    rows: int = 0
    """Position in the data: training rows dealt so far."""
    best_loss: float = math.inf
    best_step: int | None = None
    worse_evaluations: int = 0
    """Evaluations in a row without a lower validation loss, for early stopping."""
    evaluated: dict = dataclasses.field(default_factory=dict)
    """Result of the last evaluation."""
    evaluated_step: int | None = None
    owed: dict = dataclasses.field(default_factory=dict)
    """The log record of this step where an interrupt came before the evaluation that was due, else empty."""

    def is_done(self, config: Config) -> bool:
        """Whether the run has ended, by its last step or by early stopping, with an evaluation of where it ended."""
        last = self.step >= config.train.max_steps or self.stopped_early(config)
        return last and not self.owed and self.evaluated_step == self.step

    def stopped_early(self, config: Config) -> bool:
        return 0 < config.train.early_stopping <= self.worse_evaluations


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
    run = Path(config.train.run_dir).expanduser()
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file; name another train.run_dir")
    with held(run):
        return train_in(run, config, resume, Progress(out))


def train_in(run: Path, config: Config, resume: bool, progress: Progress) -> str:
    """`train` in a run directory that this process holds."""
    began = time.monotonic() - process_age()
    say = progress.say
    found = open_run(run, config, resume, say)
    state = LoopState(**found.state["loop"]) if found else LoopState()
    if state.is_done(config):
        more = "train.early_stopping" if state.stopped_early(config) else "train.max_steps"
        say(f"{run} is finished: step {state.step}; a larger {more} goes on")
        return closing_line(state.evaluated)

    kernels.use(config.train.kernels)
    device = pick_device(config.train.device)
    wanted = found.state["dtype"] if found and config.train.dtype == "auto" else config.train.dtype
    dtype_name = pick_dtype(wanted, device)
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(config.train.seed)

    dataset = prepare(config.data, config.tokenizer, say)
    tokenizer = found.tokenizer if found else dataset.tokenizer
    if found and found.state["dataset"] != dataset.directory.name:
        raise ValueError(f"{run}: the text or the tokenizer at {config.data.path} is not the one this run began with; "
                         "restore it, or begin anew in another train.run_dir")
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(f"model.vocab_size = {vocab_size} is less than the tokenizer's {tokenizer.vocab_size}")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    objective = make_objective(config, tokenizer)
    T, B, A = config.model.context_length, config.train.batch_size, config.train.accumulation_steps
    dealer = Dealer(dataset.train, T, extra=objective.extra, order=config.data.order, seed=config.train.seed)

    model = GPT(config.model).to(device)
    optimizers = make_optimizers(model, config.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    forward = compiled(model, config, objective, dealer, device, say) if config.train.compile else model
    if found:
        restore(found, model, optimizers, scaler)
        say(f"going on from {found.path}")
        if state.step >= config.train.max_steps and not state.owed:
            state.owed = {"step": state.step, "tokens": state.rows * T}
    start_files(run, config, tokenizer, state.step)
    metrics, texts = JsonLines(run / "metrics.jsonl"), JsonLines(run / "samples.jsonl")
    say(f"{dataset.name}: {len(dataset.train):,} tokens of {dataset.train.num_bytes:,} bytes to train on, "
        f"{len(dataset.val):,} held out; {model.num_parameters / 1e6:.2f}M parameters; {device}, {dtype_name}")

    def autocast():
        return torch.autocast(device.type, dtype) if dtype is not torch.float32 else nullcontext()

    def save():
        loop = {"loop": dataclasses.asdict(state), "dataset": dataset.directory.name, "dtype": dtype_name,
                "scaler": scaler.state_dict(), "random": random_state(device)}
        checkpoint.save(run / "checkpoints", state.step, model=model, optimizers=optimizers, state=loop,
                        config=config, tokenizer=tokenizer)
        checkpoint.prune(run, state.step, config.train.keep_last, state.best_step if config.train.keep_best else None)

    progress.start(state.step, config.train.max_steps)
    flops, peak = model.flops_per_token(), peak_flops(device)
    bad_steps, train_seconds, train_tokens = 0, 0.0, 0
    with stop_signals() as stop:
        while not state.is_done(config):
            record = state.owed
            if not record:
                step_began = time.monotonic()
                rate = schedule(state.step, config.train.max_steps, config.optim)
                set_learning_rate(optimizers, rate)
                batches = [objective.batch(dealer.rows(first, B), first)
                           for first in range(state.rows, state.rows + A * B, B)]
                totals = train_step(forward, objective, batches, optimizers, scaler, config.optim.grad_clip, autocast,
                                    device)
                state.step, state.rows = state.step + 1, state.rows + A * B
                train_seconds, train_tokens = train_seconds + time.monotonic() - step_began, train_tokens + A * B * T
                record = {"step": state.step, "tokens": state.rows * T, **totals,
                          "lr": rate * config.optim.learning_rate,
                          "elapsed_seconds": round(time.monotonic() - began, 3),
                          "tokens_per_second": round(train_tokens / train_seconds, 1)}
                if peak:
                    record["mfu"] = round(flops * train_tokens / train_seconds / peak, 4)
                overflowed = scaler.is_enabled() and scaler.get_scale() > 1 and math.isfinite(totals["train_loss"])
                bad_steps = bad_steps + 1 if "skipped" in totals and not overflowed else 0
                if "skipped" in totals:
                    say(f"step {state.step} skipped: {totals['skipped']}; the weights are as before")
                if bad_steps >= config.train.max_bad_steps:
                    metrics.write(finite(record))
                    save()
                    raise ValueError(
                        f"{bad_steps} steps in a row had a loss or gradient that is not finite; {run} is saved with "
                        "the weights from before them. Lower optim.learning_rate, raise optim.warmup_steps or use "
                        "train.dtype=float32 in a new run")
                progress.update(state.step, totals["train_loss"], train_tokens / train_seconds)

            last = state.step >= config.train.max_steps
            best = False
            if last or state.owed or state.step % config.train.eval_every == 0:
                try:
                    state.evaluated = evaluate(model, objective, dataset.val, context_length=T, batch_size=B,
                                               autocast=autocast, should_stop=lambda: stop.number)
                    state.owed, state.evaluated_step = {}, state.step
                    best = state.evaluated["val_loss"] < state.best_loss
                    note_evaluation(state, best)
                    record = record | state.evaluated
                    say(evaluation_line(record, state.stopped_early(config)))
                    write_samples(texts, state.step, Run(model, tokenizer, config, run), config)
                except Stopped:
                    state.owed = finite(record)
            if not state.owed and ("val_loss" in record or state.step % config.train.log_every == 0):
                metrics.write(finite(record))
                train_seconds, train_tokens = 0.0, 0
            if (last or stop.number or state.stopped_early(config) or state.step % config.train.checkpoint_every == 0
                    or best and config.train.keep_best):
                save()
            if stop.number:
                raise Interrupted(128 + stop.number, f"stopped at step {state.step}, saved in {run}")
    return closing_line(state.evaluated)


def train_step(model, objective, batches, optimizers, scaler, grad_clip, autocast, device) -> dict:
    """One update from all micro-batches, or none where the loss or a gradient is not finite ("skipped" says which).

    Gives `train_loss`, each part's loss by its name, and `grad_norm`.
    """
    counts = {}
    for batch in batches:
        for part, count in objective.counts(batch).items():
            counts[part] = counts.get(part, 0) + count
    sums = dict.fromkeys(counts, 0.0)
    for batch in batches:
        with autocast():
            losses = objective.losses(model, batch.to(device))
        loss = sum(objective.weights[part] * losses[part] / max(1, counts[part]) for part in losses)
        scaler.scale(loss).backward()
        for part in losses:
            sums[part] = sums[part] + losses[part].detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf).item()
    means = {part: float(sums[part]) / max(1, counts[part]) for part in sums}
    result = {"train_loss": sum(objective.weights[part] * mean for part, mean in means.items()), **means,
              "grad_norm": norm}
    if not math.isfinite(result["train_loss"]):
        result["skipped"] = f"the loss is {result['train_loss']}"
    elif math.isfinite(norm):
        for optimizer in optimizers:
            scaler.step(optimizer)
    else:
        result["skipped"] = f"the gradient's norm is {norm}"
    if scaler.is_enabled():
        scaler.update()                                 # where a gradient overflowed, to half the loss scale
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return result


def open_run(run: Path, config: Config, resume: bool, say) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, or None for a new run. Refuses to write over a run, and to resume another one."""
    if not any(run.iterdir()):
        return None
    if not resume:
        raise ValueError(f"{run} is not empty; go on with --resume, or name another train.run_dir")
    found = checkpoint.newest(run, say)
    if found is None:
        if checkpoint.in_run(run) and any((path / checkpoint.MANIFEST).exists() for path in checkpoint.in_run(run)):
            raise ValueError(f"{run} has only damaged checkpoints; restore one, or begin anew in another train.run_dir")
        say(f"{run} has no checkpoint yet; beginning at step 0")
        return None
    check_same_run(found, config)
    return found


def check_same_run(found: checkpoint.Checkpoint, config: Config) -> None:
    """Raise ValueError naming the first setting that cannot change within a run and did."""
    before, now = found.config.to_dict(), config.to_dict()
    for place in FIXED_ON_RESUME:
        section, _, only = place.partition(".")
        for key in [only] if only else now[section]:
            if (section, key) in (("model", "vocab_size"), ("tokenizer", "path")):
                continue                                # the run fills in the first; the second is a mere place
            if before[section][key] != now[section][key]:
                raise ValueError(f"{section}.{key} = {now[section][key]!r}, but {found.path.parent.parent} was begun "
                                 f"with {before[section][key]!r}; restore it, or begin anew in another train.run_dir")


def restore(found, model, optimizers, scaler) -> None:
    """Put weights, optimizers, loss scale and random number generators back as a checkpoint holds them."""
    found.load_model(model)
    found.load_optimizers(model, optimizers)
    if scaler.is_enabled() and found.state["scaler"]:
        scaler.load_state_dict(found.state["scaler"])
    random = {name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
              for name, text in found.state["random"].items()}
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def random_state(device: torch.device) -> dict[str, str]:
    """State of torch's generators, in base64."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def start_files(run: Path, config: Config, tokenizer, step: int) -> None:
    """Write config and tokenizer, and cut the logs back to `step`."""
    write_durably(run / "config.json", config.to_json().encode())
    tokenizer.save(run / "tokenizer")
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (run / name).read_bytes().splitlines(keepends=True) if (run / name).exists() else []
        write_durably(run / name, b"".join(line for line in lines if is_until(line, step)))


def is_until(line: bytes, step: int) -> bool:
    """Whether a log line is whole and not from after `step`."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


class JsonLines:
    """Appends one JSON object a line, each in one write."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, record: dict) -> None:
        with open(self.path, "ab") as file:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def finite(record: dict) -> dict:
    """JSON knows no NaN and no infinity: such numbers become their names."""
    return {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()}


def note_evaluation(state: LoopState, best: bool) -> None:
    if best:
        state.best_loss, state.best_step, state.worse_evaluations = state.evaluated["val_loss"], state.step, 0
    else:
        state.worse_evaluations += 1


def evaluation_line(record: dict, stopped_early: bool) -> str:
    parts = [f"step {record['step']}: validation loss {record['val_loss']:.4f}"]
    if "val_bpb" in record:
        parts.append(f"{record['val_bpb']:.4f} bits per byte")
    if "train_loss" in record:
        parts += [f"training loss {float(record['train_loss']):.4f}", duration(record["elapsed_seconds"])]
    return ", ".join(parts) + ("; stopping early" if stopped_early else "")


def closing_line(evaluated: dict) -> str:
    if "val_bpb" in evaluated:
        return f"final: {evaluated['val_bpb']:.4f} bits per byte"
    return f"final: {evaluated['val_loss']:.4f} nats per target"


def write_samples(texts: JsonLines, step: int, run: Run, config: Config) -> None:
    """Continue each of train.sample_prompts with a fixed seed, so that samples of two steps can be compared."""
    if config.objective.name != "causal":
        return
    params = SamplingParams(max_new_tokens=config.train.sample_tokens)
    run.model.eval()
    try:
        for prompt in config.train.sample_prompts:
            texts.write({"step": step, "prompt": prompt, "text": run.generate(prompt, params)})
    finally:
        run.model.train()


def compiled(model, config, objective, dealer, device, say):
    """The model with a compiled `hidden`, proved on one row; the plain model, and one line why, where that fails."""
    try:
        fast = CompiledHidden(model)
        batch = objective.batch(dealer.rows(0, 1), 0).to(device)
        objective.losses(fast, batch)
        return fast
    except Exception as error:
        say(f"torch.compile does not work here ({type(error).__name__}); going on without it")
        return model


class CompiledHidden:
    """What an objective needs of a model, with `hidden` compiled."""

    def __init__(self, model: GPT):
        self.head, self.hidden = model.head, torch.compile(model.hidden)


class StopFlag:
    number = 0
    """The signal that asked the run to stop, 0 while none has."""


@contextmanager
def stop_signals():
    """SIGINT, SIGTERM and SIGHUP set a flag once; a second one ends the process as if nothing handled it."""
    flag = StopFlag()

    def handle(number, frame):
        flag.number = number
        for stop in before:
            signal.signal(stop, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more stops at once\n")

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, handle)
    except ValueError:                                  # not the main thread: signals are someone else's
        pass
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
