"""Kills training runs at random instants: python -m benchmarks.crash_test [--kills 200] [--device cuda] [--json FILE]

Each trial starts a run from nothing, kills it by SIGKILL at a random instant, looks for its newest checkpoint, resumes
it to its end and compares that with a run that was never stopped: every byte of the last checkpoint, the names of those
that were kept, and the log but for its times. Of four trials one is killed at any instant, one within a save, one after
its first checkpoint, and one was stopped by SIGTERM and resumed before. The last line of the output is one JSON object;
the exit code is 1 where a trial failed or none was killed within a save, and the directories of failures are kept.

The runs are processes forked from one that has torch imported, so that no instant is wasted on importing it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SHAPE = ["--tokenizer.vocab_size=300", "--model.context_length=32", "--model.depth=2", "--model.width=32",
         "--model.num_heads=2", "--model.dropout=0.1", "--train.batch_size=4", "--train.accumulation_steps=2",
         "--train.max_steps=40", "--train.checkpoint_every=1", "--train.eval_every=8", "--train.log_every=1",
         "--train.deterministic=true", "--optim.warmup_steps=2"]
VARIANTS = {
    "causal, Muon": ["--optim.name=muon", "--train.keep_last=1"],
    "masked, AdamW, documents, early stopping": [
        "--objective.name=masked", "--optim.name=adamw", "--data.order=documents", "--train.early_stopping=2",
        "--optim.learning_rate=0.02"],
    "causal, AdamW, float16, spikes": [
        "--train.dtype=float16", "--optim.name=adamw", "--optim.learning_rate=0.01", "--train.batch_size=1",
        "--train.spike_bound=0.6", "--train.seed=2"],
}
TIMES = {"elapsed_seconds", "tokens_per_second", "mfu"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--workers", type=int, default=2, help="trials at the same time")
    parser.add_argument("--json", metavar="FILE", help="also write the result to a file")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="crash_test_"))
    result = crash(folder, arguments.kills, arguments.device, arguments.seed, arguments.workers, print)
    line = json.dumps(result)
    if arguments.json:
        Path(arguments.json).write_text(line + "\n", "utf-8")
    if result["unreadable"] or result["different"]:
        print(f"the failed trials are in {folder}")
    else:
        shutil.rmtree(folder)
    print(line)
    sys.exit(bool(result["unreadable"] or result["different"] or not result["killed_in_a_save"]))


def crash(folder: Path, kills: int, device="cpu", seed=0, workers=2, say=lambda line: None) -> dict:
    """Run the trials in `folder`, which keeps those that failed, and count them."""
    import torch

    began = time.monotonic()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minigpt.cli", "minigpt.training", "torch._dynamo"])     # AdamW wants the last
    os.environ["OMP_NUM_THREADS"] = "1"
    text = folder / "text.txt"
    text.write_text(make_text(), "utf-8")
    start(context, folder / "warm", ["--none"]).join_code()         # torch is imported once, by what forks the others

    def never_stopped(name):
        run, command = folder / name, [*SHAPE, *VARIANTS[name], f"--train.device={device}", f"--data.path={text}"]
        started = time.monotonic()
        if code := start(context, run, command).join_code():
            raise RuntimeError(f"the run that is not to be stopped ended with {code}: {run / 'output'}")
        return command, time.monotonic() - started, end_of(run)

    def trial(number):
        return killed_and_resumed(context, seed + number, folder / str(number), *straight[number % len(straight)])

    with ThreadPoolExecutor(workers) as pool:
        straight = list(pool.map(never_stopped, VARIANTS))
        rollbacks = [end["records"][-1]["rollbacks"] for _, _, end in straight]
        for name, (_, seconds, _), count in zip(VARIANTS, straight, rollbacks):
            say(f"{name}: {seconds:.1f} s without a stop, {count} rollbacks")
        outcomes = []
        for number, outcome in enumerate(pool.map(trial, range(kills))):
            outcomes.append(outcome)
            if outcome["problem"]:
                say(f"trial {number}: {outcome['problem']}")
            if (number + 1) % 20 == 0:
                say(f"{number + 1} of {kills} killed and resumed")
    return {
        "benchmark": "crash_test", "date": datetime.date.today().isoformat(), "torch": torch.__version__,
        "python": sys.version.split()[0], "device": device, "seed": seed, "kills": kills,
        "killed_before_a_checkpoint": sum(outcome["moment"] == "before a checkpoint" for outcome in outcomes),
        "killed_in_a_save": sum(outcome["moment"] == "in a save" for outcome in outcomes),
        "unreadable": sum(outcome["problem"] == "unreadable" for outcome in outcomes),
        "different": sum(bool(outcome["problem"]) and outcome["problem"] != "unreadable" for outcome in outcomes),
        "identical": sum(not outcome["problem"] for outcome in outcomes),
        "rollbacks_of_the_variants": rollbacks,
        "seconds": round(time.monotonic() - began, 1),
    }


def killed_and_resumed(context, number, folder, command, seconds, wanted):
    """One trial: {"moment" of the kill, "problem" or None}."""
    from minigpt import checkpoint

    chance = random.Random(number)
    saving = folder / "run/checkpoints" / checkpoint.UNFINISHED

    def wait(process, condition):
        while not condition() and process.is_alive():
            time.sleep(0.0005)

    def first_checkpoint():
        return any(folder.glob("run/checkpoints/step-*"))

    while True:
        process, left = start(context, folder, command), seconds
        if number % 4:
            wait(process, first_checkpoint)
            left = seconds * 0.8
        if number % 4 == 3:
            time.sleep(chance.uniform(0, left / 2))
            process.terminate()
            process.join_code()
            process, left = start(context, folder, [*command, "--resume"]), left / 2
        time.sleep(chance.uniform(0, left))
        if number % 4 == 1:
            wait(process, saving.exists)
            time.sleep(chance.uniform(0, 0.02))
        process.kill()
        if process.join_code() != 0:
            break
        shutil.rmtree(folder)                           # it had ended already: no kill
    warnings = []
    found = checkpoint.newest(folder / "run", warnings.append)
    there = {path.name for path in (folder / "run/checkpoints").glob("*")}
    unfinished = {name for name in there if not checkpoint.NAME.fullmatch(name) or name.endswith(".replaced")}
    moment = "in a save" if unfinished else "between saves" if found else "before a checkpoint"
    if warnings or (there - unfinished and not found):
        return {"moment": moment, "problem": "unreadable"}
    code = start(context, folder, [*command, "--resume"]).join_code()
    if code:
        return {"moment": moment, "problem": f"resuming ended with {code}"}
    end = end_of(folder)
    for part in wanted:
        if end[part] != wanted[part]:
            return {"moment": moment, "problem": f"another end: {part}"}
    shutil.rmtree(folder)
    return {"moment": moment, "problem": None}


class start:
    """A process that trains in `folder`/run, with a cache of its own."""

    def __init__(self, context, folder, command):
        folder.mkdir(exist_ok=True)
        (folder / "tiny.toml").touch()
        argv = [str(folder / "tiny.toml"), *command, f"--train.run_dir={folder / 'run'}",
                f"--data.cache_dir={folder / 'cache'}"]
        self.process = context.Process(target=train, args=(argv, folder / "output"))
        self.process.start()
        self.kill, self.terminate = self.process.kill, self.process.terminate
        self.is_alive = self.process.is_alive

    def join_code(self):
        self.process.join()
        return self.process.exitcode


def train(argv, output):
    """What a child process does."""
    import torch

    from minigpt import cli

    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    cli.train(argv)


def end_of(folder):
    """What two runs that ended alike have in common, by name."""
    from minigpt import checkpoint

    last, *_ = checkpoint.in_run(folder / "run")
    with open(folder / "run/metrics.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return {
        **{name: (last / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors", "state.json")},
        "checkpoints": sorted(path.name for path in (folder / "run/checkpoints").iterdir()),
        "records": [{key: value for key, value in record.items() if key not in TIMES} for record in records],
    }


def make_text() -> str:
    """About 25 kB of lines that are alike, with a stretch of noise in their midst."""
    chance = random.Random(0)
    words = "the a of king queen said to and from with shall not love death night day sword crown my thy lord".split()
    lines = [" ".join(chance.choices(words, k=8)) for _ in range(600)]
    lines[300:320] = ["".join(chr(chance.randrange(0x4E00, 0x9FFF)) for _ in range(20)) for _ in range(20)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
