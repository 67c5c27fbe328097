"""One live line on a terminal; plain lines, now and then, where the output is a file or a pipe."""

from __future__ import annotations

import os
import sys
import time

PLAIN_SECONDS = 10.0
LIVE_SECONDS = 0.1


class Progress:
    """`say` prints a line that stays; from `start` on, `update` shows where the run is."""

    def __init__(self, out=None):
        self.out = out or sys.stdout
        self.live = self.out.isatty()
        self.width = 0

    def start(self, step: int, max_steps: int) -> None:
        self.first_step, self.max_steps = step, max_steps
        self.began = self.shown = time.monotonic()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        now = time.monotonic()
        last = step == self.max_steps
        if now - self.shown < (LIVE_SECONDS if self.live else PLAIN_SECONDS) and not last:
            return
        self.shown = now
        left = (self.max_steps - step) * (now - self.began) / max(1, step - self.first_step)
        line = (f"step {step}/{self.max_steps}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  "
                f"{duration(left)} left")
        if self.live:
            self._write("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            self._write(line + "\n")

    def say(self, line: str) -> None:
        clear = "\r" + " " * self.width + "\r" if self.live and self.width else ""
        self.width = 0
        self._write(f"{clear}{line}\n")

    def _write(self, text):
        try:
            self.out.write(text)
            self.out.flush()
        except OSError:                                 # nobody reads any more, or the disk is full: training goes on
            self.out = open(os.devnull, "w")


def process_age() -> float:
    """Seconds since this process began, imports included; 0 where the system does not tell."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            began = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
