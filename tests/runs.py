"""Runs of train.py as tests start them: on a tiny model, in processes of their own, ended from outside."""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import data
import train
from data.checkpoints import write_checkpoint
from kills import forkserver
from model import GPT, GPTConfig

SHAPE = dict(vocab_size=4096, block_size=64, n_layer=2, n_head=2, n_embd=32)
FLAGS = "--device cpu --steps 8 --batch-size 2 --seq-len 32 --lr 2e-3"
FLAGS += " --score-examples 4 --eval-examples 2"
PATIENCE = 120  # seconds; what takes longer hangs


def write_tiny(folder):
    """A GPT of 2 layers of 32 channels with random weights and the base's tokenizer, as a checkpoint."""
    folder.mkdir()
    base = Path(data.__file__).parent / "base"
    shutil.copy(base / "tokenizer.json", folder)
    described = json.loads((base / "config.json").read_text())
    described |= {"n_positions": SHAPE["block_size"], "n_layer": 2, "n_head": 2, "n_embd": 32}
    (folder / "config.json").write_text(json.dumps(described))
    torch.manual_seed(0)
    write_checkpoint(folder, folder, GPT(GPTConfig(**SHAPE)).state_dict(), torch.float32)
    return folder


def write_pairs(path, count=60):
    """A .jsonl file of prompts with completions of very unequal length."""
    words = "the of a model is trained on some text that was read before and more".split()
    with open(path, "w") as file:
        for n in range(count):
            pair = {"prompt": f"{words[n % 14]} {n}", "completion": " ".join(words[: 1 + n * n % 13])}
            file.write(json.dumps(pair) + "\n")
    return path


def argv(model, out, *flags):
    """A command line of a few steps of the model in the folder `model`; later flags win."""
    return [*FLAGS.split(), "--model", str(model), "--out", str(out), *map(str, flags)]


def learned(out):
    """The numbers of the adapter in `out`, as bytes."""
    saved = torch.load(out / "adapter.pt", weights_only=True)["adapter"]
    return [(name, shape, i.numpy().tobytes(), v.numpy().tobytes()) for name, (i, v, shape) in saved.items()]


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def contents(folder):
    """{file: its bytes and time of change}, to see that nothing was touched."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).iterdir()}


# --- processes ------------------------------------------------------------------------------------------


def _child(rank, count, folder, target, args):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts beside it ignores Ctrl-C
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"  # this machine alone
    out, err = (open(folder / f"{stream}-{rank}", "w", buffering=1) for stream in ("out", "err"))
    with out, err, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        torch.save(target(*args), folder / f"result-{rank}")
        data.leave_processes()


class Together:
    """`count` processes of one process group that each call target(*args); `folder` has what they print."""

    def __init__(self, count, folder, target, *args):
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make = forkserver().Process
        self.processes = [make(target=_child, args=(n, count, folder, target, args)) for n in range(count)]
        for process in self.processes:
            process.start()

    def printed(self, rank, stream="out"):
        path = self.folder / f"{stream}-{rank}"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text):
        """Until the first process has printed this, or has ended."""
        start = time.time()
        while text not in self.printed(0) and self.processes[0].is_alive() and time.time() - start < PATIENCE:
            time.sleep(0.005)

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    def exit_codes(self):
        """Those of all processes, once all have ended; fails if one hangs."""
        end = time.time() + PATIENCE
        for process in self.processes:
            process.join(max(0.0, end - time.time()))
        hang = [process.is_alive() for process in self.processes]
        self.kill()
        assert not any(hang), f"hangs: {hang}, {[self.printed(n) for n in range(len(hang))]}"
        return [process.exitcode for process in self.processes]

    def results(self):
        """What the processes' targets returned, once all have ended well."""
        codes = self.exit_codes()
        assert not any(codes), [self.printed(n, "err") for n in range(len(codes))]
        return [torch.load(self.folder / f"result-{n}", weights_only=False) for n in range(len(codes))]


def train_together(count, folder, *flags):
    """Start `count` processes of one run of train.py."""
    return Together(count, folder, train.main, list(map(str, flags)))
