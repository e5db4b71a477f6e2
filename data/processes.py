"""Several processes of one run, as torchrun starts them: each takes its share, the first one speaks."""

import os
import sys
import time

import torch
import torch.distributed as dist

SECONDS = 10  # between the lines that pass by, where there is no terminal to overwrite them on
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


def processes():
    """(the number of this process, how many there are)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(items):
    """Of a list, what this process is to work on."""
    rank, count = processes()
    return items[rank::count]


def gather(value):
    """The values of all processes, as a list."""
    values = [value] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def show(line, passing=False):
    """Print a line. One that is only passing is overwritten by the next on a terminal, else shown now and then."""
    global last_shown
    terminal = sys.stdout.isatty()
    if processes()[0] or passing and not terminal and time.time() - last_shown < SECONDS:
        return
    last_shown = time.time()
    print(("\r\033[K" if terminal else "") + line, end="" if passing and terminal else "\n", flush=True)
