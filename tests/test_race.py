"""A race times whole processes, ours and any other's, and tells when each reached a target."""

import json
import sys

import pytest
from tiny import TINY

from benchmarks import race
from benchmarks.race import Curve


def test_when_a_target_is_reached():
    curve = Curve([(1.0, 3.0), (2.0, 2.5), (3.0, 2.6), (4.0, 2.0)], 5.0)
    assert [curve.reached(target) for target in (3.0, 2.7, 2.5, 2.4, 2.0, 1.9)] == [1.0, 2.0, 2.0, 5.0, 5.0, None]
    assert [curve.at(seconds) for seconds in (0.5, 1.0, 3.5, 9.0)] == [None, 3.0, 2.6, 2.0] and curve.last == 2.0


PEER = """
import time
for bits in (4.0, 2.0):
    time.sleep(0.3)
    print("step, val loss", bits)
time.sleep(0.4)
"""


def test_a_race(tmp_path, text_file, capsys):
    recipe, peer = tmp_path / "tiny.toml", tmp_path / "peer.py"
    recipe.write_text("", "utf-8")
    peer.write_text(PEER, "utf-8")
    out, drawing = tmp_path / "race.json", tmp_path / "race.svg"
    settings = [word for setting in TINY for word in ("--set", setting.removeprefix("--"))]
    race.main([str(recipe), "--text", str(text_file), "--times", "2", "--target", "3.5", "--at", "0.5", *settings,
               "--peer", f"{sys.executable} peer.py", "--peer-dir", str(tmp_path), "--peer-loss", "val loss ([0-9.]+)",
               "--peer-scale", "1.5", "--json", str(out), "--plot", str(drawing)])
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result == json.loads(out.read_text()) and drawing.read_text().count("<svg") == 1
    mine, other = result["rows"]
    assert len(mine["curves"]) == 2 and all(len(curve) == 2 for curve in mine["curves"] + other["curves"])
    assert other["bits_per_byte"] == {"median": 3.0, "least": 3.0, "most": 3.0} and other["bits_at"]["median"] == 6.0
    for row in (other, mine):
        assert row["seconds"]["least"] > max(point[0] for curve in row["curves"] for point in curve)
    assert 1.0 < other["seconds"]["median"] == other["to_target"]["median"] and other["reached"] == 2
    assert 0 < mine["bits_per_byte"]["median"] < 8 and mine["seconds"]["least"] > 0.5
    assert [line.split(":")[0] for line in lines[:4]] == ["minigpt", "peer", "peer", "minigpt"]


@pytest.mark.parametrize("arguments, message", [
    (["--peer", "python x.py"], "go together"), (["--peer-loss", "("], "'(' is no regular expression"),
    (["--peer", "python -c exit(3)", "--peer-loss", "x"], "exit code 3"), (["--times", "0"], "whole number"),
    (["--peer", "python -c print()", "--peer-loss", "x(.)"], "no line of the peer's output has it"),
    (["--peer-dir", "nowhere", "--peer", "x", "--peer-loss", "x"], "no such folder")])
def test_what_is_no_race(arguments, message, tmp_path, text_file, capsys, monkeypatch):
    monkeypatch.setattr(race, "ours", lambda *_: Curve([(1.0, 3.0)], 1.0))
    with pytest.raises(SystemExit) as stopped:
        race.main(["x.toml", "--text", str(text_file), *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and message in error
