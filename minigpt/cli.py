"""The `minigpt` command: every verb a thin call. What a user can mend is one line and exit code 2, no traceback."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path

from minigpt.config import SamplingParams, default_run_dir, field_docs, help_text, load_config

MOST_SAMPLES = 10_000
"""More would not fit in memory at once; run the command again with other seeds."""
MENDS = {
    errno.EACCES: "change its permissions or name another",
    errno.EPERM: "change its permissions or name another",
    errno.EROFS: "name a place on a disk that can be written",
    errno.ENOSPC: "make room or name a place on another disk",
    errno.EDQUOT: "make room or name a place on another disk",
    errno.ENAMETOOLONG: "name a shorter one",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "a file stands where a directory should, so name another",
    errno.EEXIST: "move it away or name another",
    errno.ENOENT: "restore it or name another",
    errno.ELOOP: "mend its symbolic links or name another",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk or name a place on another one",
}
"""What a user does about an error of the operating system."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        _fail(f"{message}; {self.prog} --help lists what there is")


def train(argv: list[str] | None = None) -> None:
    """`train.py CONFIG [--section.key=value ...] [--resume]`"""
    parser = Parser(
        prog="train.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="train.py CONFIG [--section.key=value ...] [--resume]",
        description="Train a model as a TOML file says (or the config.json of a run).", epilog=help_text())
    parser.add_argument("config", help="TOML or JSON file, see configs/")
    parser.add_argument("--resume", action="store_true", help="go on with the run where it was stopped, else begin it")
    arguments, overrides = parser.parse_known_args(argv)
    go_on = _command_line(["--resume"])
    _run(lambda: _train(arguments, overrides, go_on), f"go on with: {go_on}")


def _train(arguments, overrides, go_on):
    config = load_config(arguments.config, overrides)
    if not config.train.run_dir:
        run_dir = default_run_dir(Path(arguments.config))
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=run_dir))
    from minigpt import training

    try:
        _tell(training.train(config, resume=arguments.resume), sys.stdout)
    except training.Interrupted as stopped:
        _tell(f"{stopped}\ngo on with: {go_on}", sys.stdout)
        sys.exit(stopped.exit_code)


def sample(argv: list[str] | None = None) -> None:
    """`sample.py RUN_OR_CHECKPOINT --prompt TEXT [...]`"""
    parser = Parser(prog="sample.py", allow_abbrev=False, description="Sample text from a run or checkpoint.")
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--prompt", help="text to continue; without it a new document is begun")
    parser.add_argument("--fill", metavar="TEXT",
                        help="of a masked model: the likeliest tokens for each [MASK] in TEXT")
    parser.add_argument("--candidates", type=int, default=5, metavar="N", help="how many of them (default 5)")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="how many samples (default 1)")
    parser.add_argument("--stream", action="store_true", help="print text as it is drawn")
    parser.add_argument("--json", action="store_true", help="one JSON object a sample: prompt and text")
    parser.add_argument("--past-context", default="reread", choices=("reread", "slide"),
                        help="when the context is full: read its second half again (default), or keep that as it is")
    parser.add_argument("--lookup", type=int, default=0, metavar="N",
                        help="guess N tokens at a time from what was said before: faster on repetitive text")
    parser.add_argument("--draft", metavar="RUN_OR_CHECKPOINT",
                        help="a smaller model with the same tokenizer, which guesses tokens ahead")
    parser.add_argument("--invariant", action="store_true", help="the same text whatever else is decoded beside it")
    parser.add_argument("--device", help="torch device (default: CUDA where there is one, else the CPU)")
    _add_sampling(parser)
    arguments = parser.parse_args(argv)
    _run(lambda: _sample(arguments), "stopped")


def _add_sampling(parser, without=()):
    """A flag for each field of SamplingParams."""
    docs = {name: doc.replace("%", "%%") for name, doc in field_docs(SamplingParams).items()}
    kinds = {bool: dict(action="store_true"), int: dict(type=int, metavar="N"), float: dict(type=float, metavar="X"),
             str: dict(metavar="TEXT")}
    written = {
        "stop": dict(action="append", metavar="TEXT"), "banned": dict(action="append", metavar="TEXT"),
        "stop_tokens": dict(action="append", type=int, metavar="ID"),
        "logit_bias": dict(type=_biases, metavar="ID:BIAS,..."), "json_schema": dict(type=_schema, metavar="FILE|JSON"),
        "early_stopping": dict(choices=("full", "likely", "never"))}
    for name, default in dataclasses.asdict(SamplingParams()).items():
        if name in without:
            continue
        how = written.get(name) or kinds[type(default)]
        more = "May be repeated." if how.get("action") == "append" else f"(default {default})" if default else ""
        parser.add_argument("--" + name.replace("_", "-"), help=f"{docs[name]} {more}".strip(), default=default, **how)


def _sampling(arguments, without=()):
    return SamplingParams(**{name: getattr(arguments, name) for name in dataclasses.asdict(SamplingParams())
                             if name not in without})


def _schema(text):
    """JSON, or the file that it is in."""
    if text.strip() in ("", "true", "false") or text.lstrip()[:1] in ("{", "["):
        return text
    try:
        return Path(text).read_text("utf-8-sig")
    except OSError as error:
        raise argparse.ArgumentTypeError(_in_words(error)) from None
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: not UTF-8; save it as UTF-8") from None


def _biases(text):
    try:
        return {int(id): float(bias) for id, bias in (part.split(":") for part in text.split(",") if part)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not written ID:BIAS,ID:BIAS") from None


def _sample(arguments):
    if not 1 <= arguments.num_samples <= MOST_SAMPLES:
        raise ValueError(f"--num-samples {arguments.num_samples} is not between 1 and {MOST_SAMPLES}")
    if arguments.fill is not None:
        _fill(arguments)
        return
    if arguments.log_probabilities and not arguments.json:
        raise ValueError("--log-probabilities are shown with --json; give that too")
    if arguments.stream and (arguments.json or arguments.num_samples > 1):
        raise ValueError("--stream prints one sample as text; leave out --json and --num-samples")
    params = _sampling(arguments)
    from minigpt.engine import MOST_SLOTS, load

    run = load(arguments.path, arguments.device, past_context=arguments.past_context, invariant=arguments.invariant,
               lookup=arguments.lookup, draft=arguments.draft, slots=params.rows if params.rows > MOST_SLOTS else 0)
    prompt = arguments.prompt
    if arguments.stream:
        pieces = run.stream(prompt, params)
        print("" if params.echo else prompt or "", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    for number, sample in enumerate(run.samples(prompt, params, arguments.num_samples)):
        if arguments.json:
            row = {"prompt": prompt, "text": sample.text, "reason": sample.reason}
            row |= {} if sample.score is None else {"score": sample.score}
            print(json.dumps(row | ({"tokens": sample.tokens} if sample.tokens else {}), ensure_ascii=False))
        else:
            header = f"--- sample {number + 1} ---\n" if arguments.num_samples > 1 else ""
            print(f"{header}{'' if params.echo else prompt or ''}{sample.text}")


SWEPT = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
         "frequency_penalty", "no_repeat_ngram", "num_beams", "length_penalty", "num_beam_groups", "diversity_penalty",
         "penalty_alpha")
NOT_GIVEN = (*SWEPT, "echo", "log_probabilities")
"""Settings that a sweep varies, or decides itself."""
MOST_SETTINGS = 500


def sweep(argv: list[str] | None = None) -> None:
    """`minigpt sweep RUN_OR_CHECKPOINT --temperature 0.6,0.8 --top-p 0.9,1.0 [...]`"""
    parser = Parser(prog="minigpt sweep", allow_abbrev=False,
                    description="Samples under many settings side by side: repetition, diversity, perplexity.")
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--prompt", help="text to continue; without it new documents are begun")
    parser.add_argument("--num-samples", type=int, default=4, metavar="N", help="samples of each setting (default 4)")
    parser.add_argument("--html", metavar="FILE", help="write figures and samples as a page, too")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables and texts")
    parser.add_argument("--device", help="torch device (default: CUDA where there is one, else the CPU)")
    docs, defaults = field_docs(SamplingParams), dataclasses.asdict(SamplingParams())
    for name in SWEPT:
        parser.add_argument("--" + name.replace("_", "-"), type=_values(type(defaults[name])), metavar="X,...",
                            default=[], help=f"{docs[name]} Several values are tried in turn.".replace("%", "%%"))
    _add_sampling(parser, without=NOT_GIVEN)
    arguments = parser.parse_args(argv)
    _run(lambda: _sweep(arguments), "stopped")


def _values(kind):
    def values(text):
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them") from None
    return values


def _sweep(arguments):
    from minigpt import sweep
    from minigpt.engine import MOST_SLOTS, load
    from minigpt.files import write_durably

    if not 1 <= arguments.num_samples <= MOST_SAMPLES:
        raise ValueError(f"--num-samples {arguments.num_samples} is not between 1 and {MOST_SAMPLES}")
    if arguments.html is not None:
        _check_new_file("--html", arguments.html, ".html")
    values = {name: getattr(arguments, name) for name in SWEPT if getattr(arguments, name)}
    if (count := math.prod(map(len, values.values()))) > MOST_SETTINGS:
        raise ValueError(f"{count} combinations are more than {MOST_SETTINGS}; give fewer values")
    settings = sweep.grid(_sampling(arguments, without=NOT_GIVEN), values)
    if importlib.util.find_spec("sacrebleu") is None:
        _warn("self-BLEU is left out: it needs the package sacrebleu; pip install 'minigpt[eval]'")
    rows = max(params.rows for _, params in settings)
    run = load(arguments.path, arguments.device, slots=rows if rows > MOST_SLOTS else 0)
    found = []
    for row in sweep.sweep(run, arguments.prompt, settings, arguments.num_samples):
        found.append(row)
        if not arguments.json:
            print(f"--- {sweep.title(row, list(values))} ---")
            for number, text in enumerate(row["samples"], 1):
                print(f"[{number}] {sweep.shown(text)}")
    if arguments.html is not None:
        write_durably(Path(arguments.html), sweep.sweep_html(found, arguments.prompt).encode())
    if arguments.json:
        print(json.dumps({"run": arguments.path, "prompt": arguments.prompt, "rows": found}, ensure_ascii=False))
    else:
        _table([{name: value for name, value in row.items() if name != "samples"} for row in found])
        print(sweep.EXPLAINED)


def _fill(arguments):
    if arguments.prompt is not None or arguments.stream:
        raise ValueError("--fill goes with neither --prompt nor --stream; leave them out")
    if not 1 <= arguments.candidates <= MOST_SAMPLES:
        raise ValueError(f"--candidates {arguments.candidates} is not between 1 and {MOST_SAMPLES}")
    from minigpt.classify import fill
    from minigpt.engine import load

    blanks = fill(load(arguments.path, arguments.device), arguments.fill, arguments.candidates)
    if arguments.json:
        found = [[{"token": token, "probability": probability} for token, probability in blank] for blank in blanks]
        print(json.dumps({"text": arguments.fill, "blanks": found}, ensure_ascii=False))
        return
    for number, blank in enumerate(blanks, 1):
        if len(blanks) > 1:
            print(f"--- blank {number} ---")
        for token, probability in blank:
            print(f"{probability:.4f}  {token!r}")


def verify(argv: list[str] | None = None) -> None:
    """`minigpt verify PATH [--json]`"""
    parser = Parser(prog="minigpt verify", allow_abbrev=False,
                    description="Check every byte of a run, a checkpoint or a data set; exit code 1 where one is lost.")
    parser.add_argument("path", metavar="PATH", help="a run, a checkpoint or a directory of shards")
    parser.add_argument("--json", action="store_true", help="one JSON object: path, ok and findings")
    arguments = parser.parse_args(argv)
    _run(lambda: _verify(arguments), "stopped")


def _verify(arguments):
    from minigpt.verify import verify

    findings = []
    for finding in verify(Path(arguments.path)):
        findings.append(dataclasses.asdict(finding))
        if not arguments.json:
            print(_one_line(finding), flush=True)
    ok = all(finding["status"] != "damaged" for finding in findings)
    if arguments.json:
        print(json.dumps({"path": arguments.path, "ok": ok, "findings": findings}, ensure_ascii=False), flush=True)
    if not ok:
        sys.exit(1)


def import_(argv: list[str] | None = None) -> None:
    """`minigpt import SOURCE OUT [--tokenizer DIR]`"""
    parser = Parser(prog="minigpt import", allow_abbrev=False,
                    description="Make a checkpoint of another's model, to sample from, evaluate or export.")
    parser.add_argument("source", metavar="SOURCE", help="a directory of Hugging Face's (config.json, safetensors and "
                        "tokenizer files), or nanoGPT's ckpt.pt")
    parser.add_argument("out", metavar="OUT", help="the checkpoint directory to write")
    parser.add_argument("--tokenizer", metavar="DIR", help="where the tokenizer's files are, if not beside the model")
    arguments = parser.parse_args(argv)

    def command():
        from minigpt.hf import import_model

        _tell(import_model(Path(arguments.source), Path(arguments.out),
                           arguments.tokenizer and Path(arguments.tokenizer), _warn), sys.stdout)
    _run(_undone_by_signals(command), "stopped; nothing was written")


def export(argv: list[str] | None = None) -> None:
    """`minigpt export RUN_OR_CHECKPOINT OUT`"""
    parser = Parser(prog="minigpt export", allow_abbrev=False,
                    description="Write a model so that transformers, and what reads its files, loads it.")
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("out", metavar="OUT", help="the directory to write")
    arguments = parser.parse_args(argv)

    def command():
        from minigpt.hf import export_model

        _tell(export_model(Path(arguments.path), Path(arguments.out), _warn), sys.stdout)
    _run(_undone_by_signals(command), "stopped; nothing was written")


def evaluate(argv: list[str] | None = None) -> None:
    """`minigpt eval RUN_OR_CHECKPOINT [--text PATH ...] [--choices FILE] [--generation FILE] [--tasks NAME ...]`"""
    parser = Parser(prog="minigpt eval", allow_abbrev=False,
                    description="Measure a model; every interval is of 95 % confidence.")
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--text", nargs="+", default=[], metavar="PATH",
                        help="files or folders of UTF-8 text: bits per byte and perplexity of each file and of all")
    parser.add_argument("--stride", type=int, default=0, metavar="N",
                        help="tokens between two windows of a text, each scored once (default: half the context)")
    parser.add_argument("--choices", metavar="FILE",
                        help="multiple choice; a JSON object a line: prompt, choices, answer (from 0)")
    parser.add_argument("--generation", metavar="FILE",
                        help="BLEU, chrF and ROUGE of greedy text; a JSON object a line: prompt, references")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N",
                        help="longest text for --generation (default 128)")
    parser.add_argument("--labelled", metavar="FILE",
                        help="a classifier's report on a table with labels (.csv, .tsv or .jsonl)")
    parser.add_argument("--html", metavar="FILE", help="write that report as a page, too")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="tasks of lm-evaluation-harness")
    parser.add_argument("--include-path", metavar="DIR", help="folder with tasks of your own for --tasks")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question of --tasks")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each of --tasks")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at a time (default 8)")
    parser.add_argument("--device", help="torch device (default: CUDA where there is one, else the CPU)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    _run(lambda: _evaluate(arguments), "stopped")


def _evaluate(arguments):
    if not (arguments.text or arguments.choices or arguments.generation or arguments.labelled or arguments.tasks):
        raise ValueError("nothing to measure; give --text, --choices, --generation, --labelled or --tasks")
    if arguments.html and not arguments.labelled:
        raise ValueError("--html is the report of --labelled; give that too")
    if arguments.html:
        _check_new_file("--html", arguments.html, ".html")
    for flag, value, least in (("--batch-size", arguments.batch_size, 1), ("--stride", arguments.stride, 0),
                               ("--limit", arguments.limit, 1), ("--num-fewshot", arguments.num_fewshot, 0)):
        if value is not None and value < least:
            raise ValueError(f"{flag} {value} is too small; the least is {least}")
    SamplingParams(max_new_tokens=arguments.max_new_tokens)     # which refuses what is no length
    from minigpt import scores
    from minigpt.engine import load

    choices = arguments.choices and scores.read_items(arguments.choices, scores.CHOICES)
    generation = arguments.generation and scores.read_items(arguments.generation, scores.GENERATION)
    run, found = load(arguments.path, arguments.device), {"run": arguments.path}
    if arguments.text:
        found["texts"] = scores.score_texts(run, arguments.text, stride=arguments.stride,
                                            batch_size=arguments.batch_size)
    if choices:
        found["choices"] = scores.score_choices(run, choices, batch_size=arguments.batch_size)
    if generation:
        found["generation"] = scores.score_generation(run, generation, arguments.max_new_tokens)
    if arguments.labelled:
        from minigpt import classify, report
        from minigpt.files import write_durably

        labels, probabilities = classify.classify_table(run, arguments.labelled, arguments.batch_size)
        found["labelled"] = report.classification_report(labels, probabilities, classify.classes_of(run))
        title = f"{arguments.path} on {arguments.labelled}"
        if arguments.html:
            write_durably(Path(arguments.html), report.report_html(found["labelled"], title).encode())
    if arguments.tasks:
        from minigpt.harness import run_tasks

        found["tasks"] = run_tasks(run, arguments.tasks, include_path=arguments.include_path, limit=arguments.limit,
                                   num_fewshot=arguments.num_fewshot, batch_size=arguments.batch_size)
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False))
        return
    rows = [{"task": task, "metric": name, "value": value} for task, metrics in found.get("tasks", {}).items()
            for name, value in metrics.items() if isinstance(value, float)]
    for part in (found.get("texts"), [found.get("choices")], [found.get("generation")], rows):
        if part and part[0]:
            _table(part)
    if arguments.labelled:
        print(report.report_text(found["labelled"], title))


def _table(rows):
    """Print rows of the same keys; an interval stands beside its value, a signature nowhere."""
    names = [name for name in rows[0] if not name.endswith(("_interval", "_signature"))]
    lines = [[name.replace("_", " ") for name in names], *([_cell(row, name) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def _cell(row, name):
    value, interval = row[name], row.get(f"{name}_interval")
    if value is None:
        return "-"
    if isinstance(value, str):
        return _one_line(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval and None not in interval else "")


def classify(argv: list[str] | None = None) -> None:
    """`minigpt classify RUN_OR_CHECKPOINT [--text TEXT [TEXT] ...] [--file FILE]`"""
    parser = Parser(prog="minigpt classify", allow_abbrev=False,
                    description="The class of each text, with its probability, by a model that was fine-tuned for it.")
    _add_texts(parser, "a text; of pairs two behind one --text")
    arguments = parser.parse_args(argv)

    def command():
        from minigpt import classify as of
        from minigpt.engine import load

        run = load(arguments.path, arguments.device)
        names = of.classes_of(run)
        texts = _texts(arguments, run.config.data.text_columns)
        for text, row in zip(texts, of.classify(run, texts, arguments.batch_size).tolist()):
            best = max(range(len(names)), key=row.__getitem__)
            if arguments.json:
                print(json.dumps({"text": text[0] if len(text) == 1 else text, "label": names[best],
                                  "probabilities": dict(zip(names, row))}, ensure_ascii=False))
            else:
                words = _one_line(" | ".join(text))
                print(f"{row[best]:.4f}  {_one_line(names[best])}  {words[:80]}{'…' * (len(words) > 80)}")
    _run(command, "stopped")


def embed(argv: list[str] | None = None) -> None:
    """`minigpt embed RUN_OR_CHECKPOINT [--text TEXT ...] [--file FILE] [--query TEXT] [--out FILE]`"""
    parser = Parser(prog="minigpt embed", allow_abbrev=False, description="A vector of length 1 for each text.")
    _add_texts(parser, "a text")
    parser.add_argument("--pooling", default="mean", choices=("mean", "first", "last"),
                        help="what a vector is of: the mean of the text's tokens (default), or what stands before it "
                        "(masked models) or behind it (causal ones)")
    parser.add_argument("--query", metavar="TEXT", help="show the texts that are most alike to this one")
    parser.add_argument("--nearest", type=int, default=5, metavar="N", help="how many of them (default 5)")
    parser.add_argument("--out", metavar="FILE", help="write the vectors there, as numpy's .npy (n, C) float32")
    arguments = parser.parse_args(argv)
    _run(lambda: _embed(arguments), "stopped")


def _embed(arguments):
    import numpy as np

    from minigpt.classify import embed
    from minigpt.engine import load

    if arguments.nearest < 1:
        raise ValueError(f"--nearest {arguments.nearest} is too small; the least is 1")
    if arguments.out:
        _check_new_file("--out", arguments.out, ".npy")
    if arguments.query is not None and not arguments.query.strip():
        raise ValueError("--query is empty; give some words")
    run = load(arguments.path, arguments.device)
    texts = [text for text, in _texts(arguments, run.config.data.text_columns[:1])]
    vectors = embed(run, texts, arguments.pooling, arguments.batch_size)
    if arguments.out:
        np.save(arguments.out, vectors)
    if arguments.query is not None:
        alike = vectors @ embed(run, [arguments.query], arguments.pooling)[0]
        for place in np.argsort(-alike)[:arguments.nearest]:
            row = {"similarity": float(alike[place]), "text": texts[place]}
            print(json.dumps(row, ensure_ascii=False) if arguments.json
                  else f"{row['similarity']:.4f}  {_one_line(row['text'])}")
    elif not arguments.out:
        for text, vector in zip(texts, vectors.tolist()):
            print(json.dumps({"text": text, "vector": vector}, ensure_ascii=False))


def _check_new_file(flag, path, suffix):
    """Raise ValueError where a file cannot be written, before the work that fills it."""
    if not path.endswith(suffix):
        raise ValueError(f"{flag} {path}: must end in {suffix}")
    if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
        raise ValueError(f"{flag} {path}: there is no such folder, or it is one itself; name a file in one")


def _add_texts(parser, of_text):
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--text", nargs="+", action="append", default=[], metavar="TEXT", help=of_text)
    parser.add_argument("--file", metavar="FILE", help="a text a line (.txt), or a table (.csv, .tsv or .jsonl) with "
                        "the columns of text that the model was trained on")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts at a time (default 32)")
    parser.add_argument("--device", help="torch device (default: CUDA where there is one, else the CPU)")
    parser.add_argument("--json", action="store_true", help="one JSON object a text")


def _texts(arguments, columns):
    """The texts of --text and --file, each as (text,), or (text, text) for two columns."""
    from minigpt.labelled import read_lines, read_table

    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size} is too small; the least is 1")
    texts = []
    for words in arguments.text:
        texts += [(word,) for word in words] if len(columns) == 1 else [tuple(words)]
    if arguments.file and arguments.file.endswith(".txt"):
        texts += [(line,) for line in read_lines(arguments.file)]
    elif arguments.file:
        texts += [row.texts for row in read_table(arguments.file, columns, None)]
    if not texts:
        raise ValueError("no text; give --text or --file")
    return texts


def tokenizer_report(argv: list[str] | None = None) -> None:
    """`minigpt tokenizer-report PATH [--text PATH ...]`"""
    parser = Parser(prog="minigpt tokenizer-report", allow_abbrev=False,
                    description="How well a tokenizer compresses texts of many kinds, and whether they come back.")
    parser.add_argument("path", metavar="PATH", help="a run, a checkpoint, a directory of a tokenizer (ours or "
                        "Hugging Face's)")
    parser.add_argument("--text", nargs="+", default=[], metavar="PATH",
                        help="files or folders of UTF-8 text of your own, besides the samples")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    _run(lambda: _tokenizer_report(arguments), "stopped")


def _tokenizer_report(arguments):
    from minigpt.tokenizer_report import find_tokenizer, report

    found = report(find_tokenizer(Path(arguments.path)), arguments.text)
    if arguments.json:
        print(json.dumps({"path": arguments.path, **found}, ensure_ascii=False))
        return
    print(f"{found['kind']}, {found['vocab_size']} tokens")
    _table([row | {"comes_back": "yes" if row["comes_back"] else "NO"} for row in found["texts"]])
    print("longest: " + ", ".join(repr(text) for text in found["longest"]))
    print(f"{found['unused']} tokens are in none of these texts, among them: "
          + ", ".join(repr(text) for text in found["unused_examples"]))


def quantize(argv: list[str] | None = None) -> None:
    """`minigpt quantize RUN_OR_CHECKPOINT --bits 8|4 [--out DIR] [--text PATH ...]`"""
    parser = Parser(prog="minigpt quantize", allow_abbrev=False,
                    description="Round a model's weights to 8 or 4 bits, and show what that costs and gains.")
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--bits", type=int, choices=(8, 4), required=True,
                        help="of each weight; embedding and head take 8 in any case")
    parser.add_argument("--out", metavar="DIR", help="the checkpoint to write (default: RUN_OR_CHECKPOINT-int8, -int4)")
    parser.add_argument("--text", nargs="+", default=[], metavar="PATH",
                        help="files or folders of UTF-8 text to measure on (default: the run's held-out text)")
    parser.add_argument("--device", help="torch device (default: CUDA where there is one, else the CPU)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args(argv)

    def command():
        from minigpt.quantize import quantize

        path = Path(arguments.path)
        named = path if path.name else path.resolve()
        named = named.parent.parent if named.parent.name == "checkpoints" else named    # after the run, and beside it
        out = Path(arguments.out) if arguments.out else named.with_name(f"{named.name}-int{arguments.bits}")
        rows = quantize(path, out, arguments.bits, arguments.text, arguments.device)
        if arguments.json:
            print(json.dumps({"path": str(out), "rows": rows}, ensure_ascii=False))
            return
        _table([row | {"tokens_per_second": f"{row['tokens_per_second']:.1f}"} for row in rows])
        _tell(str(out), sys.stdout)
    _run(_undone_by_signals(command), "stopped; nothing was written")


def _undone_by_signals(command):
    """A command that a signal to end leaves like an error, so that what it has begun is removed."""
    def run():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, lambda received, frame: sys.exit(128 + received))
        command()
    return run


def _warn(line):
    _tell(_one_line(line), sys.stderr)


VERBS = {"train": train, "sample": sample, "sweep": sweep, "classify": classify, "embed": embed, "verify": verify,
         "import": import_, "export": export, "eval": evaluate, "quantize": quantize,
         "tokenizer-report": tokenizer_report}


def main(argv: list[str] | None = None) -> None:
    """`minigpt VERB ...`"""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in VERBS:
        VERBS[argv[0]](argv[1:])
        return
    usage = f"usage: minigpt {{{','.join(VERBS)}}} ...   (minigpt VERB --help tells more)"
    if argv in (["--help"], ["-h"]):
        print(usage)
        return
    near = difflib.get_close_matches(argv[0], VERBS, n=1) if argv else []
    what = f"unknown verb {argv[0]!r}" if argv else "a verb is missing"
    _fail(f"{what}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"))


def _run(command, on_interrupt) -> None:
    """Run a command; a user's error becomes one line and exit code 2, an interrupt `on_interrupt` and 130."""
    sys.stdout = sys.stdout or open(os.devnull, "w")    # None where the shell has closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")   # a terminal that is not UTF-8 shows what it cannot print
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:                             # the reader went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        _tell(f"\n{on_interrupt}", sys.stderr)
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(130)                                   # the end of Python would abort a thread that is outside it
    except (ValueError, OSError) as error:
        _fail(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        _fail(f"not enough memory; lower train.batch_size (and raise train.accumulation_steps), the model's size or "
              f"the number of samples ({str(error).partition(chr(10))[0]})")


def _fail(error):
    _tell(f"error: {_one_line(_in_words(error))}", sys.stderr)
    sys.exit(2)


def _tell(text, stream):
    """Print a line; where nobody can read it any more, as after a terminal was closed, the command goes on."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _one_line(message):
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(message))


def _in_words(error):
    """The message of an error; where the operating system gave it, with the file before and the mend behind."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{place}{error.strerror}; {MENDS.get(error.errno, 'mend this or name another')}"


def _command_line(more):
    """The command that started this process, with `more` behind it."""
    words = [*sys.argv, *(word for word in more if word not in sys.argv)]
    if words[0].endswith("__main__.py"):
        words[:1] = ["-m", "minigpt"]
    if words[0].endswith(".py") or words[0] == "-m":
        python = sys.executable
        with suppress(FileNotFoundError):               # the current directory may have been removed
            if python.startswith(os.getcwd()):
                python = os.path.relpath(python)
        words = [python, *words]
    return shlex.join(words)
