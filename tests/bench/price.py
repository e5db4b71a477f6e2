"""What can be trained at the price of LoRA? Seconds a step and peak memory by method and density.

    python tests/bench/price.py
    python tests/bench/price.py --model smollm2 --batch 3 --tokens 160 --variants "random block.*|grad 0.01"

The variants take turns in one process, step by step, and ratios are taken pair by pair, as in step.py. The
seconds are the processor's, of one thread, so that other work beside it counts less than on the clock. Peaks
are those of fresh processes that take three steps. Rows are appended to data/results/price.jsonl.
"""

import argparse
import copy
import functools
import json
import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import data  # noqa: E402
import recipes  # noqa: E402
import score  # noqa: E402
import step  # noqa: E402
import torch  # noqa: E402
from studies import ADAPT  # noqa: E402

METHODS = ADAPT | {
    "full": lambda model, batches, density: step.full(model, None, density),
    "grad": functools.partial(recipes.by_metric, metric="grad"),
    "random": functools.partial(recipes.by_metric, metric="random"),
    "magnitude": functools.partial(recipes.by_metric, metric="magnitude"),
}
LORA = "lora", 0.01
PRICED = [LORA, ("lora", 0.03), ("lora", 0.1), ("full", 1.0)]
PRICED += [("random block", density) for density in (0.01, 0.03, 0.1, 0.2)]
PRICED += [("random columns", density) for density in (0.01, 0.03, 0.1)]
PRICED += [("grad", density) for density in (0.01, 0.03, 0.1)]
PRICED += [("random", density) for density in (0.001, 0.01, 0.03)]
PRICED += [("largest entries of a block", density) for density in (0.01, 0.03)]
PRICED += [("principal entries", 0.01), ("magnitude", 0.01)]


def load(args):
    """(model, batches)"""
    torch.manual_seed(0)
    model = data.load_model(args.model)
    train = data.load_examples("prose", data.load_tokenizer(args.model), args.tokens)["train"]
    return model, train.spread(8 * args.batch, args.batch)


def prepare(model, batches, method, density):
    """(a copy of the model with its method, the optimizer)"""
    model = copy.deepcopy(model)
    parameters = METHODS[method](model, batches, density=density)
    return model, step.optimizer_for(parameters)


def own_peak(args):
    """For a fresh process: the peak of three steps, without what scoring took."""
    model, batches = load(args)
    method, density = PRICED[args.only]
    model, optimizer = prepare(model, batches, method, density)
    optimizer.zero_grad()
    step.give_back_memory()
    score.forget_peak(args)
    for batch in batches[:3]:
        step.step(model, optimizer, batch)
    return score.held(args)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--variants", default=".*", help='"method density" beside LoRA: an expression')
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    if args.only is not None:
        return print(own_peak(args))
    torch.set_num_threads(1)
    model, batches = load(args)
    wanted = re.compile(args.variants).fullmatch
    chosen = [priced for priced in PRICED if priced == LORA or wanted(f"{priced[0]} {priced[1]:g}")]
    ready = {priced: prepare(model, batches, *priced) for priced in chosen}
    times = {priced: [] for priced in chosen}
    for repetition in range(args.repetitions + 2):  # the first two warm up
        for priced, (copied, optimizer) in ready.items():
            start = time.process_time()
            step.step(copied, optimizer, batches[repetition % len(batches)])
            times[priced].append(time.process_time() - start)
    for priced, seconds in times.items():
        pairs = list(zip(seconds, times[LORA]))[2:]
        argv = [sys.executable, __file__, "--only", str(PRICED.index(priced))]
        argv += ["--model", args.model, "--batch", str(args.batch), "--tokens", str(args.tokens)]
        copied, optimizer = ready[priced]
        row = {
            "bench": "price", "model": args.model, "method": priced[0], "density": priced[1],
            "trained": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
            "seconds": statistics.median(mine for mine, _ in pairs),
            "ratio": statistics.median(mine / lora for mine, lora in pairs),
            "saved_bytes": step.saved_bytes(copied, batches[0]),
            "peak_memory_bytes": int(score.fresh(argv)),
            "tokens": args.batch * args.tokens, "threads": torch.get_num_threads(),
            "versions": data.environment("cpu")["versions"],
        }  # fmt: skip
        peak = row["peak_memory_bytes"] / 1e6
        print(f"{priced}: {row['ratio']:.2f} of LoRA's step, {peak:,.0f} MB", flush=True)
        with open(ROOT / "data" / "results" / "price.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
