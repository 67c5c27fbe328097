"""Signals that ask a run to stop: the first is noted, so that the run can save; a second ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class StopFlag:
    number = 0
    """The signal that asked the run to stop, 0 while none has."""


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """SIGINT, SIGTERM and SIGHUP set a flag once; a second one ends the process as if nothing handled it.

    A signal that whoever started the process had it ignore, as `nohup` does, stays ignored.
    """
    flag = StopFlag()

    def handle(number, frame):
        flag.number = number
        for stop in before:
            signal.signal(stop, signal.SIG_DFL)
        with suppress(OSError):                         # the terminal may be what went away
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
    except ValueError:                                  # not the main thread: signals are someone else's
        pass
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
