"""Kill a training run (SIGKILL) at random moments, always resume it, and compare with one left in peace.

    python tests/bench/kills.py --kills 50

Prints the kills survived and the steps redone; ends with an error if an adapter differs by a bit, or if more
steps than lie between two checkpoints were lost by a kill.
"""

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import random
import re
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
RUN += f" --eval-examples 2 --eval-every 100 --checkpoint-every {EVERY} --resume --out"
STARTING = 5  # seconds in which a run starts
KINDS = {"static": "", "dynamic": "--mask dynamic --refresh 6 --metric snip", "random": "--metric random"}


def child(argv, log):
    """A run in a fresh process, which writes what it prints into the file `log`."""
    torch.set_num_threads(1)
    with open(log, "w", buffering=1) as file, contextlib.redirect_stdout(file):
        train.main(argv)


def start(kind, out):
    """Start (or resume) a run of this kind; returns its process and the file of what it prints."""
    log = Path(out) / "printed"
    Path(out).mkdir(exist_ok=True)
    log.write_text("")
    process = processes().Process(target=child, args=([*RUN.split(), str(out), *KINDS[kind].split()], log))
    process.start()
    return process, log


def processes():
    """Processes forked from one that has imported torch and read the corpora: they start in no time."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    return context


def digest(out):
    """A hash of the adapter that a run left, its settings aside, which name the folder."""
    saved = torch.load(Path(out) / "adapter.pt", weights_only=True)["adapter"]
    content = hashlib.sha256()
    for name, (index, values, shape) in saved.items():
        content.update(f"{name} {shape}".encode() + index.numpy().tobytes() + values.numpy().tobytes())
    return content.hexdigest()


def steps_done(printed):
    return max(map(int, re.findall(r"^step (\d+)/", printed, re.M)), default=0)


def wait(process, log, step, seconds):
    """Until the run has printed this step and then that time has passed, or until the run has ended."""
    while process.is_alive() and steps_done(log.read_text()) < step:
        time.sleep(0.002)
    process.join(seconds)


def survive(kind, kills, folder, seed=0):
    """Kill runs of this kind that many times in all; returns (kills, runs finished, steps redone)."""
    chance = random.Random(f"{kind} {seed}")
    whole, _ = start(kind, Path(folder) / "whole")  # in peace, beside the others
    killed = finished = redone = 0
    while killed < kills or finished == 0:
        out, reached = Path(folder) / f"run{finished}", 0
        while True:
            process, log = start(kind, out)
            if killed < kills:
                step = chance.randrange(STEPS + STEPS // 4)  # some runs may end
                wait(process, log, step, chance.uniform(0, 0.1 if step else STARTING))
            else:
                process.join()
            was_alive = process.is_alive()
            process.kill()
            process.join()
            printed = log.read_text()
            went_on = int((re.findall(r"going on after step (\d+)", printed) or [reached])[0])
            assert reached - went_on <= EVERY, f"step {reached} was done, but the run went on after {went_on}"
            redone += reached - went_on
            reached = max(reached, steps_done(printed))
            if not was_alive:
                assert process.exitcode == 0, f"exit code {process.exitcode}"
                break
            killed += 1
        whole.join()
        assert digest(out) == digest(Path(folder) / "whole"), f"{kind}: the resumed run's adapter differs"
        finished += 1
    return killed, finished, redone


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how many in all (default: 50)")
    kills = parser.parse_args().kills
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            killed, finished, redone = survive(kind, -(-kills // len(KINDS)), folder)
        print(f"{kind}: {killed} kills survived, {finished} runs equal bit for bit, {redone} steps redone")


if __name__ == "__main__":
    main()
