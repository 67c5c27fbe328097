"""Files that a crash cannot leave half-written, their checksums, and locks between processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def expanded(path: str, key: str) -> Path:
    """A path that a user wrote, with ~ and ~name as home directories; ValueError names `key` where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{key} = {path!r}: there is no such home directory; write the whole path") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal."""
    with named(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An error of the operating system in this block names the file; reads and writes alone do not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_json(path: Path, most_bytes: int = 1 << 26):
    """What a JSON file holds. Raises FileNotFoundError, and ValueError naming a file that is not JSON or too large."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file")         # opening a pipe would wait for ever
    with named(path):
        if path.stat().st_size > most_bytes:
            raise ValueError(f"{path}: damaged, {path.stat().st_size} bytes are more than it can have")
        data = path.read_bytes()
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from None


def write_sealed(path: Path, content: dict, indent: int | None = None) -> None:
    """Write `content` durably as a JSON object whose last key, "sha256", is the SHA-256 of every byte before it."""
    body = json.dumps(content, indent=indent)[:-1].rstrip().encode()
    write_durably(path, body + _seal(body))


def read_sealed(path: Path, most_bytes: int = 1 << 26) -> dict:
    """What `write_sealed` wrote, without the seal. Raises FileNotFoundError, and ValueError where one byte differs."""
    content = read_json(path, most_bytes)
    data = path.read_bytes()
    body, _, _ = data.rpartition(b', "sha256": ')
    if not isinstance(content, dict) or data != body + _seal(body):
        raise ValueError(f"{path}: damaged, its content is not what its SHA-256 says")
    del content["sha256"]
    return content


def _seal(body):
    return b', "sha256": "%s"}\n' % hashlib.sha256(body).hexdigest().encode()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it holds either all of `content` or what it held before.

    One process at a time may write to a path; the name of the unfinished file is fixed, so that none pile up.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with named(path), open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def made_whole(directory: Path) -> Iterator[Path]:
    """A directory to fill, which appears as `directory` only when the block has ended well, in the place of what was.

    One process at a time may make it.
    """
    unfinished = directory.with_name(f".{directory.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Wait until a file's content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_directory = sync_file


@contextmanager
def locked(path: Path, on_wait=lambda: None) -> Iterator[None]:
    """Only one process at a time is in this block; `on_wait` is called where another one is. A dead process holds none.

    The file stays, empty: removing it could hand the lock to two.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold a directory, made where there is none, for this process alone; ValueError where another process holds it.

    The lock is the kernel's, so a crash leaves none behind. Directories made here and still empty at the end go.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in made:
        with suppress(OSError):
            sync_directory(path.parent)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{directory} is in use by another process; wait for it or stop it") from None
        yield
    finally:
        os.close(descriptor)
        with suppress(OSError):
            for path in made:
                path.rmdir()
