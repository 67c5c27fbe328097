"""The live line: rewritten in place on a terminal, seldom and plain elsewhere, with the time left."""

import io

import pytest

from minigpt import progress
from minigpt.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until `clock.now` is set."""
    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_terminal_shows_one_line_that_is_rewritten(clock):
    out = Terminal()
    shown = Progress(out)
    shown.start(0, 200)
    clock.now += 50
    shown.update(50, 3.25, 12345.6)
    assert out.getvalue() == "\rstep 50/200  loss 3.250  12,346 tokens/s  2:30 left"
    clock.now += 50
    shown.update(100, 3.0, 9.0)
    last = out.getvalue().split("\r")[-1]
    assert last.rstrip() == "step 100/200  loss 3.000  9 tokens/s  1:40 left"
    assert len(last) >= len("step 50/200  loss 3.250  12,346 tokens/s  2:30 left")
    shown.say("saved")
    assert out.getvalue().endswith("\rsaved\n")


def test_time_left_counts_from_the_step_that_the_run_went_on_from(clock):
    out = Terminal()
    shown = Progress(out)
    shown.start(900, 1000)
    clock.now += 10
    shown.update(910, 1.0, 1.0)
    assert "1:30 left" in out.getvalue()


def test_a_pipe_gets_a_plain_line_now_and_then_and_the_last(clock):
    out = io.StringIO()
    shown = Progress(out)
    shown.start(0, 100)
    for step in range(1, 101):
        clock.now += 1
        shown.update(step, 1.0, 1.0)
    lines = out.getvalue().splitlines()
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [*range(10, 101, 10)]
    assert "\r" not in out.getvalue()


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599, "59:59"),
                                           (3600, "1:00:00"), (36061, "10:01:01")])
def test_duration(seconds, text):
    assert duration(seconds) == text
