"""Several processes of one run, as torchrun starts them: each takes its share, the first one speaks."""

import os
import sys
import time

import torch
import torch.distributed as dist

SECONDS = 10  # between the lines that pass by, where there is no terminal to overwrite them on
CLEAR = "\r\033[K"  # a terminal's line
last_shown = 0.0


def join_processes(device):
    """Meet the processes that torchrun has started beside this one, if it has."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")


def leave_processes():
    """The other side of `join_processes`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world():
    """(the number of this process, how many there are)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(items):
    """Of a list, what this process is to work on."""
    rank, count = rank_and_world()
    return items[rank::count]


def gather(value):
    """The values of all processes, as a list."""
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def show(line, passing=False):
    """Print a line. On a terminal the next one overwrites a passing one, elsewhere few of these are shown."""
    global last_shown
    terminal = sys.stdout.isatty()
    if rank_and_world()[0] or passing and not terminal and time.time() - last_shown < SECONDS:
        return
    last_shown = time.time()
    print((CLEAR if terminal else "") + line, end="" if passing and terminal else "\n", flush=True)


def complain(line):
    """Print what went wrong in this process, in place of a line that was passing."""
    if sys.stdout.isatty():
        print(CLEAR, end="", flush=True)
    print(line, file=sys.stderr)


class Progress:
    """Passing lines on how much of `total` is done; what is more than that is a second pass."""

    def __init__(self, doing, total, units):
        self.doing, self.total, self.units = doing, total, units
        self.done, self.start = 0, time.time()

    def count(self, more):
        """Called before `more` are worked on: what came before is done."""
        self.show(self.done)
        self.done += more

    def show(self, done):
        at = done % self.total if done > self.total else done
        left = f", {(time.time() - self.start) / done * (self.total - at):.0f} s left" if done else ""
        show(f"{self.doing}: {at} of {self.total} {self.units}{left}", passing=True)
