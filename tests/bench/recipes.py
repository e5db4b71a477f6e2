"""Recipes in search of one that beats LoRA: masks that cost little, or that choose well. For `train.main`.

Each is `(model, batches, density) -> parameters`: it makes the model ready and returns what is trained.

principal: Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for
Reasoning-Focused Supervised Fine-Tuning", ICML 2025 (arXiv 2506.00772).
random_columns: Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025
(arXiv 2503.01905).
"""

import functools

import baselines
import data
import speft
import torch
from model import GPT


def weights_of(model):
    return {name: layer.weight.data for name, layer in speft.linear_layers(model).items()}


def within_layers(model, scores, density):
    """Train the top `density` of every layer by these scores; returns the deltas."""
    return speft.sparsify(model, speft.select(scores, density, "local"))


def by_metric(model, batches, density, metric):
    """What `train.py --metric METRIC` trains."""
    scores = speft.salience(model, metric, batches, GPT.sample_losses)
    return speft.sparsify(model, speft.select(scores, density, "global"))


# --- lines: whole rows or columns, whose gradient is one small product ---


def random_columns(model, batches, density):
    """PaCA: all outgoing weights of some random inputs."""
    scores = {name: torch.rand(1, w.shape[1]).expand_as(w) for name, w in weights_of(model).items()}
    return within_layers(model, scores, density)


def random_rows(model, batches, density):
    """All incoming weights of some random outputs."""
    scores = {name: torch.rand(len(w), 1).expand_as(w) for name, w in weights_of(model).items()}
    return within_layers(model, scores, density)


def inputs_norms(model, batches):
    """{layer: the mean square (in,) of each of its inputs over a batch's positions, summed over batches}"""
    squares = {}

    def look(name, module, args):
        squares[name] = squares.get(name, 0) + args[0].square().flatten(0, -2).mean(0)

    layers = speft.linear_layers(model).items()
    hooks = [layer.register_forward_pre_hook(functools.partial(look, name)) for name, layer in layers]
    data.mean_loss(model, batches)
    for hook in hooks:
        hook.remove()
    return squares


def active_columns(model, batches, density):
    """All outgoing weights of the inputs that are largest on the scoring examples."""
    norms = inputs_norms(model, batches)
    scores = {name: norms[name].expand_as(w) for name, w in weights_of(model).items()}
    return within_layers(model, scores, density)


# --- blocks: some rows crossed with some columns ---


def share_below(values):
    """For each of the values the share that are smaller."""
    return values.argsort().argsort() / len(values)


def heavy_block(model, batches, density):
    """The rows of largest norm crossed with the columns of largest norm."""
    scores = {}
    for name, w in weights_of(model).items():
        rows, columns = share_below(w.norm(dim=1)), share_below(w.norm(dim=0))
        scores[name] = torch.minimum(rows[:, None], columns[None])
    return within_layers(model, scores, density)


def within_block(model, batches, density, spread, score):
    """The entries of highest `score(weight)` in a random block of every layer, `spread` times as large."""
    larger = baselines.block_mask(model, min(1.0, spread * density))
    scores = {}
    for name, w in weights_of(model).items():
        scores[name] = torch.full(w.shape, -1.0, device=w.device)
        scores[name].view(-1)[larger[name]] = score(w).view(-1)[larger[name]].float()
    return within_layers(model, scores, density)


# --- a choice by weight or gradient ---


def principal(model, batches, density):
    """LIFT: the largest entries of each weight's best approximation, of an eighth of its rank."""
    scores = {}
    for name, w in weights_of(model).items():
        u, s, v = torch.linalg.svd(w.float(), full_matrices=False)
        kept = max(1, len(s) // 8)
        scores[name] = ((u[:, :kept] * s[:kept]) @ v[:kept]).abs()
    return within_layers(model, scores, density)


def agreed(model, batches, density):
    """In each layer the entries on whose gradient the examples agree: its mean over its root mean square."""
    mean = speft.salience(model, "grad", batches, GPT.sample_losses)
    square = speft.salience(model, "fisher", batches, GPT.sample_losses)
    scores = {name: mean[name] / square[name].sqrt().clamp(min=1e-30) for name in mean}
    return within_layers(model, scores, density)


def capped(score, count, limit):
    """Flat indices of the `count` highest scores, no line holding over `limit` times its fair share."""
    n_rows, n_columns = score.shape
    share = limit * count / score.numel()
    room_of_row = [max(1, round(share * n_columns))] * n_rows
    room_of_column = [max(1, round(share * n_rows))] * n_columns
    kept = []
    for place in score.flatten().argsort(descending=True).tolist():
        row, column = divmod(place, n_columns)
        if len(kept) < count and room_of_row[row] and room_of_column[column]:
            room_of_row[row] -= 1
            room_of_column[column] -= 1
            kept.append(place)
    return torch.tensor(sorted(kept))


def grad_capped(model, batches, density, limit):
    """The gradient's choice in each layer, with a cap on what a row and a column may hold."""
    scores = speft.salience(model, "grad", batches, GPT.sample_losses)
    indices = {name: capped(s, max(1, round(density * s.numel())), limit) for name, s in scores.items()}
    return speft.sparsify(model, indices)


# --- masks for `baselines.relative`, which gives each layer a rate by the size of its weights ---


def random_mask(model, batches, density):
    """{layer: indices} of random entries, the same share of every layer."""
    return speft.select(speft.salience(model, "random", batches, None), density, "local")


def block_mask(model, batches, density):
    return baselines.block_mask(model, density)


# --- beyond the linear layers' weights ---


def with_norms_and_biases(model, batches, density, method):
    """Norms' gains and all biases as well, and `method` for what they leave of the budget."""
    others = [p for p in model.parameters() if p.dim() == 1]
    total = sum(w.numel() for w in weights_of(model).values())
    parameters = method(model, batches, density - sum(p.numel() for p in others) / total)
    for parameter in others:
        parameter.requires_grad_(True)
    return parameters + others


RECIPES = {
    "principal entries": principal,
    "random columns": random_columns,
    "random rows": random_rows,
    "active columns": active_columns,
    "heavy block": heavy_block,
    "random entries of a block": functools.partial(within_block, spread=4, score=torch.rand_like),
    "largest entries of a block": functools.partial(within_block, spread=8, score=torch.abs),
    "grad capped": functools.partial(grad_capped, limit=2),
    "entries of agreed gradient": agreed,
    "random at layers' rates": functools.partial(baselines.relative, mask=random_mask),
    "block at layers' rates": functools.partial(baselines.relative, mask=block_mask),
    "block, norms and biases": functools.partial(with_norms_and_biases, method=baselines.block),
}
# Masks that are trained with another optimizer than AdamW, see studies.py.
OTHERWISE_TRAINED = {
    "grad by momentum": functools.partial(by_metric, metric="grad"),
    "random by momentum": functools.partial(by_metric, metric="random"),
    "magnitude by momentum": functools.partial(by_metric, metric="magnitude"),
    "grad moved entries by momentum": functools.partial(baselines.moved, lines=False),
    "grad, a moment a layer": functools.partial(by_metric, metric="grad"),
    "random, a moment a layer": functools.partial(by_metric, metric="random"),
}
