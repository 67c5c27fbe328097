"""Files: written whole or not at all, and locks that hold between processes and end with them."""

import hashlib
import os
import signal
import subprocess
import sys

import pytest

from minigpt.files import locked, sha256_of, write_durably

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
