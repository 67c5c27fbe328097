"""Whether the objectives learn: masked tokens, next sentences and classes of Python's own library, from held-out files.

    python -m benchmarks.learning [--steps 800] [--class-steps 100] [--seeds 2] [--work DIR] [--json FILE]

A quarter of the library's files is held out from everything. `configs/bert_cpu.toml` is trained on the others, and once
more, for half of the steps, with random labels of next sentences. Then `configs/classifier_cpu.toml` learns whether two
pieces of text are of one file, from the trained model and, with the same tokenizer and steps, from new weights.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks import harness
from minigpt import engine, objectives
from minigpt.cli import Parser
from minigpt.config import load_config
from minigpt.corpus import list_documents
from minigpt.data import prepare
from minigpt.masking import IGNORED
from minigpt.scores import proportion
from minigpt.training import train

PIECE, TABLES = 200, {"train": 1500, "val": 600}
"""Characters of a piece of a file, and rows of a table of pairs of pieces."""
CONFIGS = Path(__file__).parent.parent / "configs"


class RandomLabels(objectives.MaskedNextSentence):
    """Next sentences whose labels have nothing to do with them, in training."""

    def batch(self, pairs, first, training=True):
        batch = super().batch(pairs, first, training)
        if not training:
            return batch
        labels = [np.random.default_rng([self.seed, first + row]).integers(2) for row in range(len(pairs))]
        return dataclasses.replace(batch, labels=torch.tensor(labels))


def write_files(folder: Path) -> None:
    """The library's files in `folder`/train and `folder`/val, and tables of pairs of their pieces beside these.

    Half of the pairs are of one file, with at least one piece between them.
    """
    files = {split: [] for split in TABLES}
    for document in list_documents("stdlib"):
        digest = hashlib.sha256(document.name.encode()).digest()
        split = "val" if digest[0] < 64 else "train"
        target = folder / split / document.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(document.path, target)
        text = "".join(document.pieces())
        pieces = [text[start:start + PIECE] for start in range(0, len(text), PIECE)]
        pieces = [piece for piece in pieces if len(piece.strip()) > PIECE // 2]
        if len(pieces) > 5:
            files[split].append(pieces)
    random = np.random.default_rng(0)
    for split, count in TABLES.items():
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["first", "second", "label"])
            for number in range(count):
                one, other = random.choice(len(files[split]), 2, replace=False)
                first = int(random.integers(len(files[split][one])))
                others = files[split][other if number % 2 else one]
                places = [place for place in range(len(others)) if number % 2 or abs(place - first) > 1]
                second = others[places[int(random.integers(len(places)))]]
                table.writerow([files[split][one][first], second, ("same", "other")[number % 2]])


def trained(config: str, folder: Path, name: str, *overrides: str) -> tuple[Path, dict]:
    """(the run, its last evaluation) of a recipe."""
    run = folder / "runs" / name
    began = time.monotonic()
    train(load_config(CONFIGS / config, [*overrides, f"--train.run_dir={run}"]))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return run, [record for record in records if "val_loss" in record][-1] | {"seconds": time.monotonic() - began}


def unigram(run: Path) -> float:
    """Accuracy on the held-out targets of guessing what is shown, and the commonest token where that is <mask>."""
    config = engine.load(run, "cpu").config
    dataset = prepare(config.data, config.tokenizer, tokenizer=engine.load(run, "cpu").tokenizer)
    counts = np.bincount(dataset.train.read(0, len(dataset.train)), minlength=dataset.tokenizer.vocab_size)
    counts[dataset.tokenizer.is_special] = 0
    task, = objectives.make_objective(config, dataset.tokenizer).evaluated.tasks
    hits = []
    for batch in task.in_order(dataset.val, 64):
        guesses = torch.where(batch.inputs == dataset.tokenizer.roles.mask, int(counts.argmax()), batch.inputs)
        hits.append((guesses == batch.targets)[batch.targets != IGNORED])
    return torch.cat(hits).double().mean().item()


def pairs_held_out(run: Path) -> int:
    """How many pairs the accuracy of next sentences is of."""
    found = engine.load(run, "cpu")
    dataset = prepare(found.config.data, found.config.tokenizer, tokenizer=found.tokenizer)
    task, = objectives.make_objective(found.config, found.tokenizer).evaluated.tasks
    return sum(len(batch.labels) for batch in task.in_order(dataset.val, 64))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="learning", description="Whether the objectives learn.")
    parser.add_argument("--steps", type=harness.positive, default=800, help="of pre-training")
    parser.add_argument("--class-steps", type=harness.positive, default=100, help="of each classifier")
    parser.add_argument("--seeds", type=harness.positive, default=2, help="of classifiers")
    parser.add_argument("--work", type=Path, help="an empty folder for texts and runs (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args(argv)
    harness.check_file(parser, "json", arguments.json)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        if folder.exists() and any(folder.iterdir()):
            parser.error(f"--work {folder} is not empty; name another")
        result = measure(folder, arguments)
    harness.save(arguments.json, result)
    print(json.dumps(result))


def measure(folder, arguments):
    write_files(folder)
    text = [f"--data.path={folder}/train", f"--data.val_path={folder}/val", f"--data.cache_dir={folder}/cache",
            f"--train.max_steps={arguments.steps}", f"--train.eval_every={arguments.steps}"]
    pretrained, found = trained("bert_cpu.toml", folder, "pretrained", *text)
    with mock.patch.object(objectives, "TASKS", (RandomLabels, *objectives.TASKS[1:])):
        half = max(1, arguments.steps // 2)
        _, control = trained("bert_cpu.toml", folder, "random_labels", *text, f"--train.max_steps={half}",
                             f"--train.eval_every={half}")
    pairs = pairs_held_out(pretrained)
    rows = [{"what": "masked tokens", "accuracy": found["val_masked_accuracy"], "nats": found["val_masked"]},
            {"what": "masked tokens, the commonest", "accuracy": unigram(pretrained), "nats": None}]
    for what, record in (("next sentences", found), ("next sentences, random labels", control)):
        hits = round(record["val_next_sentence_accuracy"] * pairs)
        rows.append({"what": what, "accuracy": record["val_next_sentence_accuracy"],
                     "interval": proportion(hits, pairs)[1], "nats": record["val_next_sentence"]})
    table = [f"--data.path={folder}/train.csv", f"--data.val_path={folder}/val.csv",
             '--data.text_columns=["first", "second"]', f"--train.max_steps={arguments.class_steps}",
             f"--train.eval_every={arguments.class_steps}"]
    new = [f"--tokenizer.path={pretrained}/tokenizer", "--model.context_length=128", "--model.depth=4",
           "--model.width=128", "--model.num_heads=4", "--model.token_types=2", "--optim.learning_rate=1e-3",
           "--optim.muon_learning_rate=0.02"]
    for what, start in (("same file, from the trained model", [f"--train.start_from={pretrained}"]),
                        ("same file, from new weights", new)):
        records = [trained("classifier_cpu.toml", folder, f"{what}{seed}", *table, *start, f"--train.seed={seed}")[1]
                   for seed in range(1, arguments.seeds + 1)]
        rows.append({"what": what, **{key: sum(record[f"val_{name}"] for record in records) / len(records)
                                      for key, name in (("accuracy", "accuracy"), ("macro_f1", "macro_f1"),
                                                        ("nats", "classification"))},
                     "each": [record["val_accuracy"] for record in records]})
    print(f"{'':34} {'accuracy':>8} {'95 % interval':>16} {'nats':>7} {'macro F1':>8}")
    for row in rows:
        interval = " to ".join(f"{end:.4f}" for end in row["interval"]) if "interval" in row else ""
        print(f"{row['what']:34} {row['accuracy']:8.4f} {interval:>16} "
              + " ".join(f"{row[key]:{width}.4f}" for key, width in (("nats", 7), ("macro_f1", 8)) if row.get(key)))
    return {"benchmark": "learning", **harness.machine(torch.device("cpu")), "steps": arguments.steps,
            "class_steps": arguments.class_steps, "pairs": pairs, "seconds": round(found["seconds"]), "rows": rows}


if __name__ == "__main__":
    main()
