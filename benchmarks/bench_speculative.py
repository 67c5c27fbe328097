"""How much faster texts come when tokens are guessed: a trained model alone, with look-up, and with a smaller draft.

    python -m benchmarks.bench_speculative RUN --draft RUN [--temperatures 0 0.8] [--prompts 8] [--new-tokens 128]
        [--text PATH ...] [--device cpu] [--repeats 3] [--json FILE]

Prompts are pieces of the run's held-out text (or of --text), one text at a time. Each repeat draws all of them by every
path in turn, in another order each time; given are medians of tokens per second and tokens per pass of the model.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch

import minigpt
from benchmarks import harness
from minigpt.cli import Parser
from minigpt.config import SamplingParams
from minigpt.engine import Engine
from minigpt.scores import measured_on

PROMPT = 32
"""Tokens of a prompt."""


def prompts_of(run, texts, count):
    """Pieces of PROMPT tokens that stand evenly in a text."""
    ids = [token for document in measured_on(run, texts) for piece in document.pieces()
           for token in run.tokenizer.encode(piece)]
    if len(ids) < count * PROMPT:
        raise ValueError(f"{len(ids)} tokens of text are too few for {count} prompts; give more by --text")
    return [[run.tokenizer.roles.document_start, *ids[start:start + PROMPT]]
            for start in range(0, len(ids) - PROMPT + 1, (len(ids) - PROMPT) // max(1, count - 1))][:count]


def draw(engine, prompts, params):
    """(tokens, passes of the model) of all texts, one after another."""
    tokens = passes = 0
    for row, prompt in enumerate(prompts):
        request = engine.submit(prompt, params, row)
        passes += 1
        while engine.step():
            passes += 1
        if request.error:
            raise request.error
        tokens += len(request.drawn)
    return tokens, passes


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench_speculative", description="How much faster texts come when tokens are guessed.")
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--draft", required=True, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--prompts", type=harness.positive, default=8)
    parser.add_argument("--new-tokens", type=harness.positive, default=128)
    parser.add_argument("--text", nargs="+", default=[], metavar="PATH")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=harness.positive, default=3)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args(argv)
    harness.check_file(parser, "json", arguments.json)
    try:
        settings = [SamplingParams(temperature=temperature, max_new_tokens=arguments.new_tokens)
                    for temperature in arguments.temperatures]
        run = minigpt.load(arguments.run, arguments.device, draft=arguments.draft)
        prompts = prompts_of(run, arguments.text, arguments.prompts)
    except (OSError, ValueError) as error:
        parser.error(error)
    engines = {"engine": Engine(run.model, run.tokenizer, slots=1), "lookup": Engine(
        run.model, run.tokenizer, slots=1, lookup=8), "draft": run.engine}
    result = {"benchmark": "speculative", **harness.machine(torch.device(arguments.device)),
              "parameters": run.model.num_parameters, "draft_parameters": run.engine.guesser.model.num_parameters,
              "new_tokens": arguments.new_tokens, "rows": []}
    print(f"{'temperature':>11} {'path':>7} {'tokens/s':>9} {'ratio':>6} {'tokens a pass':>13}")
    for params in settings:
        temperature = params.temperature
        found = {path: [] for path in engines}
        for repeat in range(arguments.repeats + 1):     # the first warms up
            for path in list(engines)[::-1 if repeat % 2 else 1]:
                chosen = dataclasses.replace(params, seed=repeat)
                began = time.perf_counter()
                tokens, passes = draw(engines[path], prompts, chosen)
                if repeat:
                    found[path].append((tokens / (time.perf_counter() - began), tokens / passes))
        speeds = {path: [statistics.median(values) for values in zip(*measured)] for path, measured in found.items()}
        for path, (speed, a_pass) in speeds.items():
            ratio = speed / speeds["engine"][0]
            result["rows"].append({"temperature": temperature, "path": path, "tokens_per_second": speed,
                                   "ratio": ratio, "tokens_a_pass": a_pass})
            print(f"{temperature:11} {path:>7} {speed:9.1f} {ratio:6.2f} {a_pass:13.2f}", flush=True)
    harness.save(arguments.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
