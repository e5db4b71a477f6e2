"""The sparse layer with its weight gradient formed only where the mask lies: a prototype, with its plan.

`speft.SparseLinear` forms a layer's whole weight gradient and gathers the entries of delta from it. Salience
puts these entries into few rows and columns, so that most of that product can be left out, exactly.
tests/bench/step.py measures what this saves.
"""

import sys
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

import speft  # noqa: E402

COPY = 50  # copying a row or column out takes about as long as multiplying by this many (measured on CPUs)


class CoveredLinear(speft.SparseLinear):
    """A SparseLinear whose backward pass follows `cover`.

    An empty mask trains nothing: its delta gets no gradient.
    """

    def forward(self, x):
        self.sync()
        trained = self.delta.requires_grad and len(self.delta)
        if self.weight.requires_grad or not trained:  # being scored, or frozen
            return F.linear(x, self.weight, self.bias)
        x_rows = x.reshape(-1, self.in_features)
        y = CoveredGradient.apply(x_rows, self.weight, self.bias, self.delta, *self.cover())
        return y.view(*x.shape[:-1], self.out_features)

    def cover(self):
        """`cover` of the mask, planned again only when `index` has changed, be it in place (a state dict)."""
        planned = self.__dict__.get("planned")
        if planned is None or planned[0] is not self.index or planned[1] != self.index._version:
            self.planned = self.index, self.index._version, cover(self.index, *self.weight.shape)
        return self.planned[2]


def sparsify(model, indices):
    """speft.sparsify, with covered layers."""
    deltas = speft.sparsify(model, indices)
    for name in indices:
        model.get_submodule(name).__class__ = CoveredLinear
    return deltas


def cover(index, n_rows, n_columns):
    """Which part of the weight's gradient to form, so that it holds all the entries `index` and little else.

    Salience forms lines: most of the entries that matter lie in a few columns (input features) or a few rows
    (outputs). Every entry of the gradient dyᵀ x is a product of one column of dy and one of x, so that
        x[:, columns]ᵀ dy   and   dy[:, rows]ᵀ x[:, others]
    are exactly those parts of it (the first transposed, which multiplies faster). `columns` are the crowded
    ones, whole; the entries outside them lie in the rectangle rows x others. How crowded a column must be is
    tried out: the cheapest split is taken.

    Returns [places, columns, rows, others], where places (k,) says where the entries stand in the two
    products, laid flat one after the other; or only [index], places in dyᵀ x, where no split is cheaper.
    """
    row, column = index // n_columns, index % n_columns
    crowd = column.bincount(minlength=n_columns)[column]  # the number of entries in the same column
    cheapest, best = n_rows * n_columns, None
    for exponent in range(n_rows.bit_length() + 1):
        crowded = crowd >= 2**exponent
        lines = column[crowded].unique(), row[~crowded].unique(), column[~crowded].unique()
        columns, rows, others = map(len, lines)
        cost = n_rows * columns + rows * others + COPY * (columns + rows + others)
        if cost < cheapest:
            cheapest, best = cost, (crowded, lines)
    if best is None:
        return [index]
    crowded, (columns, rows, others) = best
    in_first = torch.searchsorted(columns, column) * n_rows + row
    in_second = torch.searchsorted(rows, row) * len(others) + torch.searchsorted(others, column)
    places = torch.where(crowded, in_first, n_rows * len(columns) + in_second)
    return [places, columns, rows, others]


class CoveredGradient(torch.autograd.Function):
    """y = x Wᵀ + b for x (N, in); of the gradient of W only what `cover` planned is formed, for delta."""

    @staticmethod
    def forward(ctx, x, weight, bias, delta, places, *lines):
        kept = [x]
        if lines and 4 * (len(lines[0]) + len(lines[2])) < x.size(1):
            # Copies of a few columns, and x can go. Of more columns x is the smaller thing to keep, since
            # often two or three layers read the same x.
            kept = [x.index_select(1, columns) for columns in lines[::2]]
        ctx.save_for_backward(weight, places, *kept, *lines)
        ctx.n_kept = len(kept)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, places, *kept_and_lines = ctx.saved_tensors
        # Under autocast dy is narrower than the weight and x.
        kept = [x.to(dy.dtype) for x in kept_and_lines[: ctx.n_kept]]
        lines = kept_and_lines[ctx.n_kept :]
        dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        if lines:
            columns, rows, others = lines
            if len(kept) == 1:
                kept = [kept[0].index_select(1, columns), kept[0].index_select(1, others)]
            first, second = kept[0].T @ dy, dy.index_select(1, rows).T @ kept[1]
            dweight = torch.cat((first.view(-1), second.view(-1)))
        else:
            dweight = (dy.T @ kept[0]).view(-1)
        return dx, None, dbias, dweight[places].float(), None, *(None for _ in lines)
