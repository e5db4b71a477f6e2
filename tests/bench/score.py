"""What does scoring cost? Every metric against one plain backward pass, in time and peak memory; selection.

python tests/bench/score.py [--model smollm2] [--examples 16] [--metrics grad fisher]

The metrics take turns with the backward pass in one process, and ratios are taken pair by pair; the peaks are
those of fresh processes, on CUDA those of the device's allocator. Rows are appended to --out as JSON lines.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import data  # noqa: E402
import speft  # noqa: E402
from model import GPT  # noqa: E402


def load(args):
    """(model, batches): args.examples samples of prose, args.batch at a time."""
    model = data.load_model(args.model).to(args.device).requires_grad_(False)
    examples = data.load_examples("prose", data.load_tokenizer(args.model), args.tokens, args.device)
    return model, examples["train"].spread(args.examples, args.batch)


def backward(model, batches):
    """The yardstick: the gradient of every scored weight, accumulated by autograd over all batches."""
    for layer in speft.linear_layers(model).values():
        layer.weight.requires_grad_(True)
    for batch in batches:
        model.sample_losses(batch).sum().backward()
    model.zero_grad()
    model.requires_grad_(False)


def activations(model, batches):
    """The yardstick, with every gradient freed as soon as it has been formed: for what the passes hold."""
    for layer in speft.linear_layers(model).values():
        weight = layer.weight.requires_grad_(True)
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    backward(model, batches)


def score(model, batches, metric):
    """The scores by `metric`, or what is compared with them; "load" stands for nothing at all."""
    yardsticks = {"backward": backward, "activations": activations, "load": lambda model, batches: None}
    if metric in yardsticks:
        return yardsticks[metric](model, batches)
    return speft.salience(model, metric, batches, GPT.sample_losses)


def timed(call):
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak(args, metric, model, batches):
    """`measure` on the device, or else in a fresh process."""
    if args.device == "cuda":
        return measure(args, metric, model, batches)
    argv = [sys.executable, __file__, "--only", metric]
    for name in ("model", "device", "examples", "batch", "tokens"):
        argv += [f"--{name}", str(getattr(args, name))]
    return int(fresh(argv))


def measure(args, metric, model, batches):
    """Peak memory of scoring by `metric`, in bytes, model included; "select": what it adds to the scores."""
    scores = score(model, batches, "random") if metric == "select" else None
    forget_peak(args)  # of reading the corpora
    before = held(args)
    if metric == "select":
        speft.select(scores, 0.01, "global")
        return held(args) - before
    score(model, batches, metric)
    return held(args)


def fresh(argv):
    """What a fresh process prints that measures its peak: in it glibc gives back at once what is freed."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, base or a checkpoint")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--metrics", nargs="+", default=list(speft.METRICS), choices=speft.METRICS)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--out", default=str(ROOT / "data/results/score.jsonl"))
    args = parser.parse_args()
    model, batches = load(args)
    if args.only:
        print(measure(args, args.only, model, batches))
        return
    times = {name: [] for name in ("backward", *args.metrics)}
    for _ in range(args.repetitions):
        for name in times:
            times[name].append(timed(lambda: score(model, batches, name))[0])
    scores = score(model, batches, "grad")
    selection = statistics.median(
        timed(lambda: speft.select(scores, 0.01, "global"))[0] for _ in range(args.repetitions)
    )
    yardstick = statistics.median(times["backward"])
    print(f"{args.model}: {args.examples} x {args.tokens} tokens; selecting 1% takes {selection:.2f} s")
    del scores
    names = ("load", "select", *times, "activations")  # in this order: the last changes the model
    peaks = {name: peak(args, name, model, batches) for name in names}
    bare, held_by_passes = peaks["load"], peaks["activations"]
    layers = speft.linear_layers(model).values()
    share = peaks["select"] / sum(4 * layer.weight.numel() for layer in layers)
    print(f"and {share:.1%} of the scores' memory, the indices included")
    largest = max(layer.weight.nbytes for layer in layers)
    bound = held_by_passes + sum(4 * layer.weight.numel() for layer in layers) + 2 * largest
    print(f"the passes, the scores and two layers' gradients: {(bound - bare) / 1e6:,.0f} MB above the model")
    with open(args.out, "a") as file:
        for name, mine in times.items():
            row = {
                "bench": "score", "model": args.model, "device": args.device, "metric": name,
                "examples": args.examples,
                "tokens": args.tokens, "seconds": statistics.median(mine),
                "ratio": statistics.median(a / b for a, b in zip(mine, times["backward"])),
                "peak_memory_bytes": peaks[name], "loaded_bytes": bare, "bound_bytes": bound,
                "select_seconds": selection, "select_peak_bytes": peaks["select"],
            }  # fmt: skip
            print(f"  {name:10} {row['seconds']:7.2f} s  {row['ratio']:5.2f} x the backward pass "
                  f"({yardstick:.2f} s)  "
                  f"{(row['peak_memory_bytes'] - bare) / 1e6:,.0f} MB above the model")  # fmt: skip
            versions = data.environment(args.device)["versions"]
            file.write(json.dumps(row | {"versions": versions, "threads": torch.get_num_threads()}) + "\n")


def forget_peak(args):
    """Start to measure `held` anew, where the system can do so."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def held(args):
    """The most memory held since `forget_peak`, in bytes: of the device's allocator, or the process."""
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
