"""What does a training step cost? Time and memory of sparse fine-tuning against its alternatives.

python tests/bench/step.py [--model smollm2] [--device cuda] [--densities 0.01 0.001] [--masks grad random]

Of the masks, "block" is a random block of every layer (baselines.py); the others are metrics.

The variants take turns in one process, step by step, and the ratios are taken pair by pair: a machine that
gets slower gets slower for all. Before that every sparse variant's gradients are compared with autograd's
through the dense weight. Rows are appended to --out as JSON lines.

On a CPU much of a step may be page faults: glibc gives freed memory back to the system, which then hands it
out again page by page. MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_MMAP_THRESHOLD_=8000000000 in the environment
makes it keep what it has; the rows say which it was, and how many faults a step took.
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import baselines  # noqa: E402
import data  # noqa: E402
import score  # noqa: E402
import speft  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

BILLION = GPTConfig(  # the shape of a Llama with a billion weights, which get random values
    vocab_size=32000, block_size=2048, n_layer=22, n_head=32, n_embd=2048, n_kv_head=4, n_inner=5632,
    activation="silu", gated_mlp=True, rms_norm=True, qkv_bias=False, out_bias=False, mlp_bias=False,
    tied_head=False, rope_theta=10000.0,
)  # fmt: skip


def losses(model, batch):
    return model(*batch, reduction="none")[1]


# --- the variants: each takes (model, indices, density) and returns the parameters to train ---


def frozen(model, indices, density):
    """The floor: no weight gradient at all. Only the first layer's input asks for one, as in training."""
    model.requires_grad_(False)
    first = speft.linear_layers(model)[next(iter(indices))]
    first.register_forward_pre_hook(lambda module, args: args[0].detach().requires_grad_())
    return []


def full(model, indices, density):
    return list(model.requires_grad_(True).parameters())


def lora(model, indices, density):
    return baselines.lora(model, None, density)


def peft_lora(model, indices, density):
    """Hugging Face's layer, with the ranks of `lora`."""
    import peft

    chosen = baselines.ranks({name: speft.linear_layers(model)[name] for name in indices}, density)
    exact = {f"^{name.replace('.', '[.]')}$": rank for name, rank in chosen.items()}
    config = peft.LoraConfig(target_modules=list(chosen), r=1, rank_pattern=exact, lora_dropout=0.0)
    peft.inject_adapter_in_model(config, model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Scattered(nn.Module):
    """The authors' way: each forward pass scatters delta into a fresh dense weight."""

    def __init__(self, linear, index):
        super().__init__()
        self.linear, self.index = linear, index.to(linear.weight.device)
        self.delta = nn.Parameter(torch.zeros(len(index), device=linear.weight.device))

    def forward(self, x):
        weight = self.linear.weight
        values = self.delta.to(weight.dtype)
        dense = torch.zeros_like(weight).view(-1).index_add(0, self.index, values).view_as(weight)
        return F.linear(x, weight + dense, self.linear.bias)


def scatter(model, indices, density):
    model.requires_grad_(False)
    parameters = []
    for name, index in indices.items():
        parent, _, child = name.rpartition(".")
        layer = Scattered(model.get_submodule(name), index)
        setattr(model.get_submodule(parent), child, layer)
        parameters.append(layer.delta)
    return parameters


def gather(model, indices, density):
    """This project's layer with the dense gradient: formed, gathered and freed."""
    deltas = speft.sparsify(model, indices)
    for name in indices:
        layer = model.get_submodule(name)
        n_rows, n_columns = layer.weight.shape
        places = layer.index % n_columns * n_rows + layer.index // n_columns  # in the whole of xᵀ dy
        columns = torch.arange(n_columns, device=places.device)
        layer.planned = places, columns, columns[:0], n_columns
    return deltas


def cover(model, indices, density):
    """This project's layer: of the gradient it forms the lines that the mask lies in."""
    return speft.sparsify(model, indices)


VARIANTS = {f.__name__: f for f in (frozen, full, lora, peft_lora, scatter, gather, cover)}

# --- measuring ---


def load(args):
    """(model, batches): the model, and batches of args.batch x args.tokens of real text if it can read."""
    dtype = getattr(torch, args.dtype)
    if args.model == "billion":
        with torch.device(args.device):
            model = GPT(BILLION).to(dtype)
        shape = (args.batches, 2, args.batch, args.tokens)
        ids = torch.randint(BILLION.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        return model, [tuple(batch) for batch in ids.to(args.device)]
    model = data.load_model(args.model, dtype).to(args.device)
    examples = data.load_examples("prose", data.load_tokenizer(args.model), args.tokens, args.device)
    return model, examples["train"].spread(args.batches * args.batch, args.batch)


def optimizer_for(parameters):
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None


def step(model, optimizer, batch):
    loss = losses(model, batch).mean()
    loss.backward()
    if optimizer:
        optimizer.step()
        optimizer.zero_grad()


def synchronize(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def saved_bytes(model, batch):
    """Bytes that autograd keeps for the backward pass, the model's own tensors aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    for layer in model.modules():
        if isinstance(layer, speft.SparseLinear) and len(layer.delta):
            own |= {t.untyped_storage().data_ptr() for t in layer.planned[:3]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that kept itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = losses(model, batch).mean()
    del loss
    return sum(kept.values())


def check_gradients(model, indices, batch):
    """The largest relative difference between a layer's delta gradient and autograd's dense one."""
    dense = copy.deepcopy(model)
    full(dense, indices, None)
    losses(dense, batch).mean().backward()
    wanted = {name: layer.weight.grad for name, layer in speft.linear_layers(dense).items()}
    del dense
    differences = []
    for variant in (cover, gather):
        other = copy.deepcopy(model)
        variant(other, indices, None)
        losses(other, batch).mean().backward()
        for name, index in indices.items():
            if len(index):
                want = wanted[name].view(-1)[index].float()
                difference = other.get_submodule(name).delta.grad - want
                differences.append(difference.norm() / want.norm().clamp(min=1e-30))
    return torch.stack(differences).max().item()


def masks(model, batches, args):
    """{(mask, density): indices}"""
    chosen = {}
    for mask in args.masks:
        scores = None if mask == "block" else speft.salience(model, mask, batches, losses)
        for density in args.densities:
            if mask == "block":
                chosen[mask, density] = baselines.block_mask(model, density)
            else:
                chosen[mask, density] = speft.select(scores, density, args.scope)
    return chosen


def give_back_memory():
    """Free the models of the last comparison, and have glibc return to the system what they held."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def resident_peak(args, variant, mask, density):
    """Peak memory of three steps in a fresh process, the model included."""
    argv = [sys.executable, __file__, "--only", variant, "--masks", mask, "--densities", str(density)]
    for name in ("model", "device", "dtype", "scope", "batch", "tokens", "cache"):
        argv += [f"--{name}", str(getattr(args, name))]
    return int(score.fresh(argv))


def run_one(args):
    """The other side of `resident_peak`: the masks come from a file, so that scoring is not counted."""
    model, batches = load(args)
    indices = torch.load(args.cache, map_location="cpu")[args.masks[0], args.densities[0]]
    score.forget_peak(args)  # of the loading
    optimizer = optimizer_for(VARIANTS[args.only](model, indices, args.densities[0]))
    for batch in (batches * 3)[:3]:
        step(model, optimizer, batch)
    print(score.held(args))


def compare(model, batches, mask, density, indices, args):
    """Measure every variant with this mask; returns a row each."""
    entries = sum(len(index) for index in indices.values())
    error = check_gradients(model, indices, batches[0])
    print(f"{args.model} {mask} {density}: {entries:,} entries; gradients differ by {error:.1e} at most")
    if not error <= (1e-5 if args.dtype == "float32" else 0.1):  # so that NaN is refused, too
        raise SystemExit("the gradients are wrong: nothing was timed")
    scope = "local" if mask == "block" else args.scope
    rows, ready, peaks = [], {}, {}
    for name in args.variants:
        gc.collect()
        others = torch.cuda.memory_allocated() if args.device == "cuda" else 0
        copied = copy.deepcopy(model)
        try:
            parameters = VARIANTS[name](copied, indices, density)
        except ImportError as missing:
            print(f"{name}: left out ({missing})")
            continue
        optimizer = optimizer_for(parameters)
        score.forget_peak(args)  # of the making
        for _ in range(2):
            step(copied, optimizer, batches[0])  # warm up
        peaks[name] = score.held(args) - others if args.device == "cuda" else None
        ready[name] = copied, optimizer
        state = optimizer.state.values() if optimizer else []
        rows.append({
            "bench": "step", "model": args.model, "mask": mask, "scope": scope, "density": density,
            "variant": name, "trained": sum(parameter.numel() for parameter in parameters),
            "saved_bytes": saved_bytes(copied, batches[0]), "gradient_error": error,
            "optimizer_bytes": sum(t.nbytes for s in state for t in s.values()),
            "tokens": args.batch * args.tokens, "dtype": args.dtype, "device": args.device,
        })  # fmt: skip
    times, faults = {name: [] for name in ready}, {name: [] for name in ready}
    for repetition in range(args.repetitions):
        for name, (copied, optimizer) in ready.items():
            synchronize(args)
            start, faults_before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            step(copied, optimizer, batches[repetition % len(batches)])
            synchronize(args)
            times[name].append(time.perf_counter() - start)
            faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before)
    for row in rows:
        mine = times[row["variant"]]
        row["seconds"] = statistics.median(mine)
        row["page_faults"] = statistics.median(faults[row["variant"]])
        row["allocator"] = "keeps memory" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "default"
        row["ratios"] = {name: statistics.median(a / b for a, b in zip(mine, theirs))
                         for name, theirs in times.items()}  # fmt: skip
        row |= data.environment(args.device) | {"threads": torch.get_num_threads()}
        row["peak_memory_bytes"] = peaks[row["variant"]]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, base, billion or a checkpoint")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.01, 0.001, 0.05])
    parser.add_argument("--masks", nargs="+", default=["grad", "block", "magnitude", "random"])
    parser.add_argument("--scope", default="global")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=3, help="examples a step")
    parser.add_argument("--tokens", type=int, default=160, help="tokens an example")
    parser.add_argument("--batches", type=int, default=11, help="batches to score with and to step through")
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument(
        "--peak", action="store_true", help="on a CPU: also measure peaks, in fresh processes"
    )
    parser.add_argument("--cache", default="/tmp/speft-step-masks.pt", help="where the masks go for --peak")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", default=str(ROOT / "data/results/step.jsonl"))
    args = parser.parse_args()
    if args.only:
        return run_one(args)
    torch.manual_seed(0)
    model, batches = load(args)
    chosen = masks(model, batches, args)
    torch.save(chosen, args.cache)
    for (mask, density), indices in chosen.items():
        give_back_memory()
        rows = compare(model, batches, mask, density, indices, args)
        for row in rows:
            if args.peak and args.device == "cpu":
                row["peak_memory_bytes"] = resident_peak(args, row["variant"], mask, density)
            ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
            peak = (row["peak_memory_bytes"] or 0) / 1e6
            print(f"  {row['variant']:10} {row['trained']:>11,} trained  {row['seconds']:.3f} s  "
                  f"saved {row['saved_bytes'] / 1e6:,.0f} MB  peak {peak:,.0f} MB  ratios: {ratios}",
                  flush=True)  # fmt: skip
        with open(args.out, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
