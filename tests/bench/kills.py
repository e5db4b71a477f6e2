"""End a training run at random moments, always resume it, and compare with one left in peace.

    python tests/bench/kills.py --kills 50

A run is ended by SIGKILL, SIGTERM or SIGINT (Ctrl-C). Prints how often, and the steps redone; ends with an
error if an adapter.pt differs by a byte, more steps than lie between two checkpoints were lost, or Ctrl-C is
not answered by one line and exit code 130.
"""

import argparse
import collections
import contextlib
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402

import train  # noqa: E402

STEPS, EVERY = 24, 4  # EVERY: steps between checkpoints
RUN = f"--device cpu --steps {STEPS} --batch-size 2 --seq-len 32 --lr 2e-3 --score-examples 4"
RUN += f" --eval-examples 2 --eval-every 1 --checkpoint-every {EVERY} --resume --out"
STARTING = 5  # seconds in which a run starts
PATIENCE = 60  # seconds in which Ctrl-C has to end a run
KINDS = {"static": "", "dynamic": "--mask dynamic --refresh 6 --metric snip", "random": "--metric random"}
STOPPED = re.compile(r"^stopped after step \d+; --resume goes on from .*'s newest checkpoint\n\Z", re.M)


def child(argv, log):
    """A run in a fresh process, which writes what it prints into the file `log`."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts beside it ignores Ctrl-C
    redirects = contextlib.redirect_stdout, contextlib.redirect_stderr
    with open(log, "w", buffering=1) as file, redirects[0](file), redirects[1](file):
        train.main(argv)


def start(kind, out):
    """Start (or resume) a run of this kind; returns its process and the file of what it prints."""
    log = Path(out) / "printed"
    Path(out).mkdir(exist_ok=True)
    log.write_text("")
    process = forkserver().Process(target=child, args=([*RUN.split(), str(out), *KINDS[kind].split()], log))
    process.start()
    return process, log


def forkserver():
    """Processes forked from one that has imported torch and read the corpora: they start in no time."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # where the server finds what it loads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    return context


def steps_done(printed):
    return max(map(int, re.findall(r"^step (\d+)/", printed, re.M)), default=0)


def wait(process, log, step, seconds):
    """Until the run has printed this step and then that time has passed, or until the run has ended."""
    while process.is_alive() and steps_done(log.read_text()) < step:
        time.sleep(0.002)
    process.join(seconds)


def end(process, log, number):
    """Send the signal, and check how the run ends; returns whether it was still running."""
    was_alive = process.is_alive()
    if was_alive:
        os.kill(process.pid, number)
    process.join(PATIENCE)
    code, printed = process.exitcode, log.read_text()
    process.kill()  # if it hangs
    ended_itself = code == 0 or not was_alive
    if number == signal.SIGINT and not ended_itself:
        assert code == 130 and STOPPED.search(printed), f"Ctrl-C: exit code {code}\n{printed}"
    assert code in (0, 130, -number), f"exit code {code}\n{printed}"
    return not ended_itself


def survive(kind, kills, folder, seed=0):
    """End runs of this kind that many times in all: ({signal: how often}, runs finished, steps redone)."""
    chance = random.Random(f"{kind} {seed}")
    whole, _ = start(kind, Path(folder) / "whole")  # in peace, beside the others
    ended, finished, redone = collections.Counter(), 0, 0
    while ended.total() < kills or finished == 0:
        out, reached, is_over = Path(folder) / f"run{finished}", 0, False
        while not is_over:
            process, log = start(kind, out)
            number = chance.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            if ended.total() < kills:
                step = chance.randrange(STEPS + STEPS // 4)  # some runs may end
                wait(process, log, step, chance.uniform(0, 0.1 if step else STARTING))
                if "reading" not in log.read_text():
                    number = signal.SIGKILL  # Python itself is still starting
                is_over = not end(process, log, number)
            else:
                process.join()
                assert process.exitcode == 0, log.read_text()
                is_over = True
            printed = log.read_text()
            went_on = int((re.findall(r"going on after step (\d+)", printed) or [reached])[0])
            assert reached - went_on <= EVERY, f"step {reached} was done, but the run went on after {went_on}"
            redone += reached - went_on
            reached = max(reached, steps_done(printed))
            if not is_over:
                ended[signal.Signals(number).name] += 1
        whole.join()
        same = [(Path(folder) / name / "adapter.pt").read_bytes() for name in (out.name, "whole")]
        assert same[0] == same[1], f"{kind}: the resumed run's adapter differs"
        finished += 1
    return ended, finished, redone


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how many in all (default: 50)")
    kills = parser.parse_args().kills
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            ended, finished, redone = survive(kind, -(-kills // len(KINDS)), folder)
        times = ", ".join(f"{count} {name}" for name, count in sorted(ended.items()))
        print(f"{kind}: {times} survived, {finished} runs equal byte for byte, {redone} steps redone")


if __name__ == "__main__":
    main()
