"""Files: written whole or not at all, and locks that hold between processes and end with them."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
from marks import slow

from minigpt.files import locked, read_json, read_sealed, sha256_of, write_durably, write_sealed

HOLDER = """
import sys, time
from minigpt.files import locked
with locked(__import__("pathlib").Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_sha256(tmp_path):
    content = os.urandom(300_001)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_durably(path, b"old")
    assert path.read_bytes() == b"old"

    def fail(descriptor):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            write_durably(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_durably(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_lock_holds_between_processes_and_ends_with_a_killed_one(tmp_path):
    lock = tmp_path / "locks" / "a"
    with subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        waits = []

        def on_wait():
            waits.append(True)
            holder.send_signal(signal.SIGKILL)

        with locked(lock, on_wait):
            assert waits == [True] and holder.wait() == -signal.SIGKILL
    with locked(lock, on_wait):                         # nobody holds it now
        assert waits == [True]


@pytest.mark.parametrize("indent", [None, slow(1)])
def test_every_byte_of_a_sealed_file_counts(tmp_path, indent):
    path, content = tmp_path / "a.json", {"files": {"b": {"bytes": 3}}, "é": [1, 2]}
    write_sealed(path, content, indent)
    whole = path.read_bytes()
    assert read_sealed(path) == content and json.loads(whole).keys() == {"files", "é", "sha256"}
    damaged = [whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1:]
               for place in range(len(whole)) for bit in range(8)]
    damaged += [whole[:place] + whole[place + 1:] for place in range(len(whole))]
    damaged += [whole[:place] + added + whole[place:] for place in range(len(whole) + 1)
                for added in (b" ", b"\0", b"1")]
    for data in set(damaged) - {whole}:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="a.json: damaged"):
            read_sealed(path)


@pytest.mark.parametrize("content", [b"", b"[", b"\xff", b"[" * 100_000, b"\x80\x04\x95."])
def test_what_is_no_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="a.json: damaged, not JSON"):
        read_json(tmp_path / "a.json")


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="a.json: not a file"):
        read_json(tmp_path / "a.json")
