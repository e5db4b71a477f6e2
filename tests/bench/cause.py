"""How steep and how curved is the loss along a mask's entries? For the question why the gradient's loses.

    python tests/bench/cause.py     # every mask with three seeds, about 15 minutes of one core

For a mask M of k entries and the mean loss ℓ, with its gradient g (over the 64 scoring examples) and its
Hessian H (over 16 of them) on M's entries:

    steepness       the mean of abs(g): what a step that moves every entry by η gains at first, by entry and η
    power           gᵀg
    diagonal        the mean of H's diagonal, by Hutchinson's estimate: the mean of zᵀHz / k, z random signs
    along_gradient  gᵀHg / gᵀg
    along_signs     sᵀHs / k with s = sign(g), the direction of Adam's first step
    directions      (tr H)² / tr H²: how many directions share the curvature, at most k
    moved           the loss on other training examples after θ ← θ − η s, by η

Rows are appended to data/results/cause.jsonl; those that are there are not measured again.
"""

import functools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import baselines  # noqa: E402
import data  # noqa: E402
import speft  # noqa: E402
import torch  # noqa: E402
from model import GPT  # noqa: E402

PROBES = 4
DISTANCES = [0.0, *(float(f"{digit}e{power}") for power in range(-5, 0) for digit in (1, 3))]
SCORED, CURVED = 64, 16  # examples


def by_metric(model, batches, density, metric, scope):
    return speft.select(speft.salience(model, metric, batches, GPT.sample_losses), density, scope)


MASKS = {  # (model, batches, density) -> {layer: indices}
    "grad": functools.partial(by_metric, metric="grad", scope="global"),
    "random": functools.partial(by_metric, metric="random", scope="global"),
    "magnitude": functools.partial(by_metric, metric="magnitude", scope="global"),
    "grad moved entries": functools.partial(baselines.moved_mask, lines=False),
    "grad local": functools.partial(by_metric, metric="grad", scope="local"),
}


def products(model, indices, batches, vectors):
    """(g, [H v for each v]) on the entries of a mask, which stand one layer after the other: all (k,).

    The mean loss over all examples of `batches`, which are of equal size. H v is the gradient of gᵀv.
    """
    weights = [model.get_submodule(name).weight.requires_grad_() for name in indices]

    def on_mask(tensors):
        return torch.cat([t.reshape(-1)[index] for t, index in zip(tensors, indices.values())])

    gradient, curved = 0.0, [0.0] * len(vectors)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # it has a second derivative
        for batch in batches:
            loss = model.sample_losses(batch).mean() / len(batches)
            first = on_mask(torch.autograd.grad(loss, weights, create_graph=bool(vectors)))
            for place, vector in enumerate(vectors):
                second = torch.autograd.grad(first @ vector, weights, retain_graph=True)
                curved[place] = curved[place] + on_mask(second)
            gradient = gradient + first.detach()
    model.requires_grad_(False)
    return gradient, curved


def moved_losses(model, indices, direction, batches):
    """{distance: the mean loss after moving every entry of the mask by distance · direction}"""
    sizes = [len(index) for index in indices.values()]
    losses = {}
    for distance in DISTANCES:
        parts = dict(zip(indices, (distance * direction).split(sizes)))
        before = {name: model.get_submodule(name).weight.data.clone() for name in indices}
        for name, index in indices.items():
            model.get_submodule(name).weight.data.view(-1)[index] += parts[name]
        losses[distance] = data.mean_loss(model, batches)
        for name, weight in before.items():
            model.get_submodule(name).weight.data.copy_(weight)
    return losses


def measure(mask, seed, density=0.01):
    """A row of the results file."""
    torch.manual_seed(seed)
    model = data.load_model("base").requires_grad_(False)
    train = data.load_examples("prose", data.load_tokenizer("base"), 128)["train"]
    batches = train.draw(0, SCORED, seed + 1, 8)
    torch.manual_seed(seed)
    indices = {name: index for name, index in MASKS[mask](model, batches, density).items() if len(index)}
    count = sum(map(len, indices.values()))
    probes = [torch.randint(2, (count,)) * 2.0 - 1 for _ in range(PROBES)]
    g, _ = products(model, indices, batches, [])
    signs = g.sign()
    curved = batches[: CURVED // 8]
    _, (along_g, along_signs, *along_probes) = products(model, indices, curved, [g, signs, *probes])
    traces = [(z @ hz).item() for z, hz in zip(probes, along_probes)]
    squares = [(hz @ hz).item() for hz in along_probes]
    trace, square = sum(traces) / PROBES, sum(squares) / PROBES
    return {
        "mask": mask, "seed": seed, "density": density, "entries": count,
        "steepness": g.abs().mean().item(), "power": (g @ g).item(), "diagonal": trace / count,
        "along_gradient": (g @ along_g / (g @ g)).item(), "along_signs": (signs @ along_signs).item() / count,
        "directions": trace**2 / square, "traces": traces,
        "moved": moved_losses(model, indices, -signs, train.draw(SCORED, SCORED, seed + 1, 8)),
    }  # fmt: skip


def main():
    path = ROOT / "data" / "results" / "cause.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["mask"], row["seed"]) for row in rows}
    for seed in range(3):
        for mask in MASKS:
            if (mask, seed) not in done:
                row = measure(mask, seed)
                with open(path, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    main()
