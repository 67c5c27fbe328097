"""Logs: every line whole, whatever the disk does, and cut back to a step."""

import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.logs import JsonLines

FULL = """
import resource, sys
from pathlib import Path
from minigpt.logs import JsonLines
log = JsonLines(Path(sys.argv[1]))
for step in range(100):
    if step == 50:
        room = Path(sys.argv[1]).stat().st_size + 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    if step == 60:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        log.write({"step": step, "text": "x" * 30})
    except OSError as error:
        print(step, error.errno, room - Path(sys.argv[1]).stat().st_size)
"""


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text("utf-8").splitlines()]


def test_each_write_is_a_line(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    log.write({"step": 1, "loss": math.nan, "text": "é\n"})
    log.write({"step": 2, "loss": -math.inf, "more": [1, 2]})
    log.sync()
    assert (tmp_path / "log.jsonl").read_bytes() == (
        '{"step": 1, "loss": "nan", "text": "é\\n"}\n{"step": 2, "loss": "-inf", "more": [1, 2]}\n'.encode())


def test_what_the_disk_refuses_is_cut_off_and_written_later(tmp_path):
    """The kernel refuses to let the file grow in the midst of a line, for ten lines, in a process of its own."""
    path = tmp_path / "log.jsonl"
    made = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parent.parent)
    refused = [list(map(int, line.split())) for line in made.stdout.splitlines()]
    assert refused == [[step, errno.EFBIG, 20] for step in range(50, 60)]
    assert steps_of(path) == list(range(100))


def test_a_log_that_cannot_be_written_keeps_its_lines(tmp_path):
    path = tmp_path / "no folder/log.jsonl"
    log = JsonLines(path)
    for step in range(3):
        with pytest.raises(FileNotFoundError):
            log.write({"step": step})
    path.parent.mkdir()
    log.write({"step": 3})
    assert steps_of(path) == [0, 1, 2, 3]


def test_cutting_back_drops_later_and_broken_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n\xff\n[]\n{"step": "3"}\n{"no": 1}\n{"step": 2}\n{"step": 3}\n'
                     b'{"step": 2')
    log = JsonLines(path)
    log.cut_back(2)
    assert steps_of(path) == [1, 2, 2]
    log.cut_back(0)
    assert path.read_bytes() == b""
