"""What sparse fine-tuning is compared with. All plugs into `train.main(argv, adapt=...)`.

    python tests/bench/baselines.py lora --data my.jsonl --lr 1e-2   # and any other of train.py's flags

The run leaves train.py's log.jsonl and result.json; --merge FOLDER writes the whole fine-tuned model. Without
--lr it is train.py's default, which is a gradient mask's; in the studies LoRA did best at 3e-3 to 1e-2.

LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685).
PiSSA: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
Models", NeurIPS 2024 (arXiv 2404.02948).
"""

import argparse
import copy
import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).parents[2]))

import data  # noqa: E402
import speft  # noqa: E402
import train  # noqa: E402
from model import GPT  # noqa: E402


class LowRankLinear(nn.Module):
    """y = x Wᵀ + b + scale · x Aᵀ Bᵀ for a frozen linear layer (W, b); A (rank, in) and B (out, rank) train.

    A and B are float32 whatever the weight's type. B is zero at first, so that nothing has changed (LoRA,
    section 4.1).
    """

    def __init__(self, linear, rank, scale):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), scale
        place = {"device": linear.weight.device, "dtype": torch.float32}
        self.A = nn.Parameter(torch.empty(rank, linear.in_features, **place))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, **place))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        low = F.linear(x, self.A.to(x.dtype))
        return self.linear(x) + F.linear(low, self.B.to(x.dtype)) * self.scale

    def merge(self):
        """The plain linear layer with the product added to its weight."""
        weight = self.linear.weight
        weight.data = (weight.data.float() + self.scale * (self.B @ self.A).detach()).to(weight.dtype)
        return self.linear


def start_principal(layer):
    """PiSSA's start (its equations 2 to 4): A B is the best approximation of W, and the rest is frozen."""
    rank, weight = len(layer.A), layer.linear.weight
    u, s, v = torch.linalg.svd(weight.data.float(), full_matrices=False)
    root = (s[:rank] / layer.scale).sqrt()
    layer.B.data = u[:, :rank] * root
    layer.A.data = root[:, None] * v[:rank]
    weight.data = (weight.data.float() - layer.scale * (layer.B @ layer.A).detach()).to(weight.dtype)


def ranks(layers, density):
    """{name: rank}: whole ranks, at least one, whose trained count comes nearest to density · weights.

    layers: {name: linear module}. The rounding of one layer is made up for in the next.
    """
    chosen, owed = {}, 0.0
    for name, layer in layers.items():
        size = layer.in_features + layer.out_features
        owed += density * layer.weight.numel()
        chosen[name] = max(1, round(owed / size))
        owed -= chosen[name] * size
    return chosen


def adapt(model, batches, density, principal=False, scale=None, layers=None):
    """Put low-rank adapters onto the linear layers of `model` and freeze the rest; returns their parameters.

    scale: alpha / rank; by default 2 for LoRA, and 1 for PiSSA. `batches` are not used.
    """
    modules = speft.linear_layers(model, layers)
    model.requires_grad_(False)
    scale = scale or (1.0 if principal else 2.0)
    parameters = []
    for name, rank in ranks(modules, density).items():
        adapted = LowRankLinear(modules[name], rank, scale)
        if principal:
            start_principal(adapted)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapted)
        parameters += [adapted.A, adapted.B]
    return parameters


def gradient_mask(model, batches, density):
    """What `train.py --metric grad` would train: {layer: indices}."""
    return speft.select(speft.salience(model, "grad", batches, GPT.sample_losses), density, "global")


def moved_mask(model, batches, density, lines):
    """{layer: indices}: the global gradient mask with its entries at random places of their layers.

    lines: whole rows and columns change places, so that entries that shared one still do; otherwise every
    entry moves by itself, and only the layers' densities are still the gradient's.
    """
    indices = gradient_mask(model, batches, density)
    for name, index in indices.items():
        n_rows, n_columns = model.get_submodule(name).weight.shape
        if lines:
            rows, columns = (torch.randperm(n).to(index.device) for n in (n_rows, n_columns))
            places = rows[index // n_columns] * n_columns + columns[index % n_columns]
        else:
            places = torch.randperm(n_rows * n_columns)[: len(index)]
        indices[name] = places.sort().values
    return indices


def moved(model, batches, density, lines):
    """Train such a mask: an ablation. Returns the deltas."""
    return speft.sparsify(model, moved_mask(model, batches, density, lines))


def block_mask(model, density):
    """{layer: indices}: of every layer, the entries where some random rows cross some random columns.

    An entry's score is the lesser of a random number of its row and one of its column: those above a
    threshold form a block, with the root of the density as its share of the rows and of the columns.
    """
    scores = {}
    for name, layer in speft.linear_layers(model).items():
        n_rows, n_columns = layer.weight.shape
        score = torch.minimum(torch.rand(n_rows, 1), torch.rand(1, n_columns))
        scores[name] = score.to(layer.weight.device)
    return speft.select(scores, density, "local")


def block(model, batches, density):
    """Train a random block of every layer: a mask without salience whose gradient is one small product."""
    return speft.sparsify(model, block_mask(model, density))


def warmed(model, batches, density):
    """Train the global gradient mask of a model that has had a pass of full fine-tuning: an ablation.

    Only the scores come from that copy, which one pass of AdamW over the scoring examples has trained.
    """
    copied = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(copied.parameters(), lr=3e-4, weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        copied.sample_losses(batch).mean().backward()
        optimizer.step()
    return speft.sparsify(model, gradient_mask(copied, batches, density))


class Scaled(nn.Module):
    """delta = scale · what is trained: under Adam, a learning rate `scale` times as large."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, trained):
        return self.scale * trained


def relative(model, batches, density, mask=gradient_mask):
    """Train a mask, by default the global gradient's, at rates relative to the sizes of layers' weights.

    A layer's rate is multiplied by the root mean square of its weights over the mean of that of all layers.
    Returns what stands in for the deltas.
    """
    speft.sparsify(model, mask(model, batches, density))
    layers = [layer for layer in model.modules() if isinstance(layer, speft.SparseLinear)]
    sizes = torch.stack([layer.weight.data.float().square().mean().sqrt() for layer in layers])
    parameters = []
    for layer, scale in zip(layers, (sizes / sizes.mean()).tolist()):
        if len(layer.delta):
            parametrize.register_parametrization(layer, "delta", Scaled(scale))
            parameters.append(layer.parametrizations.delta.original)
    return parameters


def merge(model):
    """Turn every LowRankLinear into its plain linear layer with the corrected weight; returns the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRankLinear):
                setattr(parent, name, child.merge())
    return model


lora = functools.partial(adapt, principal=False)
pissa = functools.partial(adapt, principal=True)
METHODS = {"lora": lora, "pissa": pissa, "block": block}


def main(argv=None):
    """Train by one of METHODS with train.py's flags; returns what result.json holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--merge", help="folder for the whole model")
    mine, argv = parser.parse_known_args(argv)
    args, adapted = data.parse_args(argv, speft.METRICS), []

    def adapt_and_keep(model, batches):
        adapted.append(model)
        return METHODS[mine.method](model, batches, density=args.density)

    result = train.main(argv, adapt_and_keep)
    if mine.merge and adapted:
        weights = speft.merge(merge(adapted[0])).state_dict()
        data.check_folder("merge", mine.merge)
        data.write_checkpoint(mine.merge, args.model, weights, getattr(torch, args.dtype))
    return result


if __name__ == "__main__":
    main()
