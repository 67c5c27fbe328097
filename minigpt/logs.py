"""Logs of one JSON object a line, which a full disk, a kill and a resume leave whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

from minigpt.files import sync_file, write_durably


class JsonLines:
    """A file of one JSON object a line. Each write is whole or not at all; what cannot be written is kept for later."""

    def __init__(self, path: Path):
        self.path = path
        self.pending = b""
        self.last_step = None
        """The step that the file is to be cut back to before anything is appended; None where it need not be."""

    def write(self, record: dict) -> None:
        """Append a record. Raises OSError where the disk refuses; the next write then brings it too."""
        self.pending += (json.dumps(finite(record), ensure_ascii=False) + "\n").encode()
        self.flush()

    def flush(self) -> None:
        """Append what is pending, after a cut that is still to be made."""
        if self.last_step is not None:
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
            write_durably(self.path, b"".join(line for line in lines if _is_until(line, self.last_step)))
            self.last_step = None
        if not self.pending:
            return
        with open(self.path, "ab", buffering=0) as file:
            end, rest = file.tell(), memoryview(self.pending)
            try:
                while rest:
                    rest = rest[file.write(rest):]      # a disk that fills up takes a part before it refuses
            except OSError:
                file.truncate(end)
                raise
        self.pending = b""

    def sync(self) -> None:
        """Wait until all of it is on disk."""
        self.flush()
        if self.path.exists():
            sync_file(self.path)

    def cut_back(self, step: int) -> None:
        """Drop every line that is from after `step`, or not whole."""
        self.pending, self.last_step = b"", step
        self.flush()


def _is_until(line, step):
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def finite(record: dict) -> dict:
    """JSON knows no NaN and no infinity: such numbers become their names."""
    return {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()}
