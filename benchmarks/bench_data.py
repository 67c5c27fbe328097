"""What preparing text costs: encoding against raw SentencePiece, compression, and the memory that a large corpus takes.

    python -m benchmarks.bench_data [--repeats 7] [--megabytes 1000] [--json FILE]

Encoding and compression are measured on the standard library's sources with a vocabulary of 4096. With --megabytes a
text of that size is made of them, a word in forty replaced by a random one, and prepared with the default settings in
a process of its own; the largest resident memory of that process is given. Preparing takes about a second a megabyte.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece

from minigpt.corpus import list_documents
from minigpt.tokenizer import Tokenizer

VOCAB_SIZE = 4096
LETTERS = "abcdefghijklmnopqrstuvwxyzéü语言模型"
PREPARE = """
import resource, sys, time
from minigpt.config import DataConfig, TokenizerConfig
from minigpt.data import prepare
began = time.perf_counter()
prepare(DataConfig(path=sys.argv[1], cache_dir=sys.argv[2]), TokenizerConfig())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter() - began)
"""


def measure_encoding(texts: list[str], repeats: int) -> dict:
    """Seconds of training, bytes per token, and the speed of `Tokenizer.encode` and of SentencePiece itself in turn."""
    began = time.perf_counter()
    tokenizer = Tokenizer.train(texts, vocab_size=VOCAB_SIZE)
    training_seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(directory)
        raw = sentencepiece.SentencePieceProcessor(model_file=str(Path(directory, "tokenizer.model")))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    some = texts[::8]
    some_megabytes = sum(len(text.encode()) for text in some) / 1e6
    seconds = {tokenizer.encode: [], raw.encode: []}
    for repeat in range(repeats):
        for encode, times in list(seconds.items())[::-1 if repeat % 2 else 1]:
            began = time.perf_counter()
            for text in some:
                encode(text)
            times.append(time.perf_counter() - began)
    ours, theirs = (statistics.median(times) for times in seconds.values())
    began = time.perf_counter()
    batch = tokenizer.encode_batch(texts)
    batch_seconds = time.perf_counter() - began
    return {"training_seconds": training_seconds, "bytes_per_token": megabytes * 1e6 / sum(map(len, batch)),
            "encode_mb_per_second": some_megabytes / ours, "sentencepiece_mb_per_second": some_megabytes / theirs,
            "encode_to_sentencepiece": theirs / ours, "encode_batch_mb_per_second": megabytes / batch_seconds}


def write_text(path: Path, texts: list[str], megabytes: float) -> int:
    """A file of about that size; gives its bytes."""
    chance = random.Random(0)
    words = re.split(r"(\w+)", "".join(texts))
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            changed = words.copy()
            for place in chance.sample(range(1, len(words), 2), len(words) // 80):
                changed[place] = "".join(chance.choices(LETTERS, k=chance.randrange(2, 12)))
            file.write("".join(changed)[:int(megabytes * 1e6 - file.tell())])
    return path.stat().st_size


def measure_memory(texts: list[str], megabytes: float) -> dict:
    """Peak resident bytes and seconds of `prepare` on a text of that size."""
    with tempfile.TemporaryDirectory() as directory:
        size = write_text(Path(directory, "text.txt"), texts, megabytes)
        command = [sys.executable, "-c", PREPARE, f"{directory}/text.txt", f"{directory}/cache"]
        peak, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return {"prepared_bytes": size, "prepare_peak_bytes": int(peak), "prepare_seconds": float(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description="What preparing text costs.")
    parser.add_argument("--repeats", type=int, default=7, help="alternating runs of the two encoders (default 7)")
    parser.add_argument("--megabytes", type=float, default=0, help="also prepare a text of this size (default: none)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()

    texts = [document.path.read_text("utf-8") for document in list_documents("stdlib")]
    result = {"benchmark": "data", "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
              "python": platform.python_version(), "sentencepiece": sentencepiece.__version__,
              **measure_encoding(texts, arguments.repeats)}
    if arguments.megabytes:
        result |= measure_memory(texts, arguments.megabytes)
    for key, value in result.items():
        print(f"{key:28} {value:,.3f}" if isinstance(value, float) else f"{key:28} {value}")
    line = json.dumps(result)
    if arguments.json:
        arguments.json.write_text(line + "\n", "utf-8")
    print(line)


if __name__ == "__main__":
    main()
