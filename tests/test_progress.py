"""What a run shows while it works: on a terminal a line that is overwritten, elsewhere one now and then."""

import importlib
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
import train
from runs import argv, write_pairs, write_tiny

ROOT = Path(__file__).parents[1]
SHOW = """
import sys
sys.path.insert(0, {root!r})
import data
data.show("reading")
data.show("a long line that passes", passing=True)
data.show("short", passing=True)
data.show("a line that stays")
data.show("another long line that passes", passing=True)
data.complain("an error")
"""


def on_a_terminal(*command):
    """What a command writes to a terminal, its standard error included."""
    ours, its = pty.openpty()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=its, stderr=its, stdin=its)
    os.close(its)
    written = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # what Linux says at the end
            break
        if not chunk:
            break
        written += chunk
    os.close(ours)
    assert process.wait(60) is not None
    return written.decode()


def screen(written):
    """The lines that a person sees: \\r goes back to the start of the line, \\033[K clears the rest of it."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        seen = ""
        for part in re.split(r"(\r|\033\[K)", line):
            if part == "\r":
                at = 0
            elif part == "\033[K":
                seen = seen[:at]
            else:
                at = len(seen) if not seen else at
                seen, at = seen[:at] + part + seen[at + len(part) :], at + len(part)
        lines.append(seen)
    return lines


@pytest.mark.slow
def test_a_terminals_passing_lines_leave_no_rests():
    written = on_a_terminal("-c", SHOW.format(root=str(ROOT)))
    assert "a long line that passes" in written and "short" in written
    assert screen(written) == ["reading", "a line that stays", "an error", ""]


def test_elsewhere_passing_lines_come_at_most_every_ten_seconds(monkeypatch, capsys):
    now = 1000.0
    room = importlib.import_module("data.processes")
    monkeypatch.setattr(room.time, "time", lambda: now)
    monkeypatch.setattr(room, "last_shown", 0.0)
    for second in range(0, 35):
        now = 1000.0 + second
        data.show(f"second {second}", passing=True)
    data.show("this one stays")
    data.show("this one passes", passing=True)
    assert capsys.readouterr().out == "second 0\nsecond 10\nsecond 20\nsecond 30\nthis one stays\n"


@pytest.mark.slow
def test_a_run_says_from_the_start_what_it_does(tmp_path, monkeypatch):
    tiny, pairs = write_tiny(tmp_path / "tiny"), write_pairs(tmp_path / "pairs.jsonl")
    shown = []
    for module in ("data", "data.processes", "data.report"):
        monkeypatch.setattr(f"{module}.show", lambda line, passing=False: shown.append((line, passing)))
    flags = argv(tiny, tmp_path / "out", "--data", pairs, "--score-examples", 6)
    train.main(flags)
    lines = [line for line, _ in shown]
    assert shown[0] == (f"reading {tiny} and {pairs}", False)
    scoring = [line for line, passing in shown if passing and line.startswith("scoring")]
    for done, line in zip((0, 2, 4), scoring, strict=True):
        assert re.fullmatch(rf"scoring: {done} of 6 examples" + r", \d+ s left" * (done > 0), line)
    steps = [passing for line, passing in shown if line.startswith("step")]
    assert steps == [False] + 6 * [True] + [False]  # the first and the last stay
    assert lines[-1].endswith(f"see {tmp_path / 'out'}")


@pytest.mark.slow
def test_a_runs_lines_on_a_terminal(tmp_path):
    tiny, pairs = write_tiny(tmp_path / "tiny"), write_pairs(tmp_path / "pairs.jsonl")
    start = time.time()
    seen = screen(on_a_terminal(ROOT / "train.py", *argv(tiny, tmp_path / "out", "--data", pairs)))
    assert time.time() - start < 120
    begun = [re.split(r"[ :]", line)[0] for line in seen]
    assert begun[0] == "reading" and begun.count("step") == 2 and "scoring" not in begun
