"""The part of the weight's gradient that `speft.cover` plans is the dense one's, and small where it pays."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import sparse_layer
from speft import cover


def a_mask(kind, shape, generator):
    """Sorted flat indices of a random mask of this kind in a weight of this shape."""
    n_rows, n_columns = shape

    def some(n, share):
        return torch.randperm(n, generator=generator)[: max(1, round(share * n))]

    mask = torch.zeros(shape, dtype=torch.bool)
    if kind in ("columns", "lines"):
        mask[:, some(n_columns, 0.02)] = True
    if kind in ("rows", "lines"):
        mask[some(n_rows, 0.02)] = True
    if kind == "rectangle":
        mask[some(n_rows, 0.2)[:, None], some(n_columns, 0.2)] = True
    if kind == "uneven":  # columns of all degrees, as gradients have them
        mask = torch.rand(shape, generator=generator) < torch.rand(n_columns, generator=generator) ** 16
        mask.view(-1)[some(mask.numel(), 0)] = True
    if kind == "random":
        mask.view(-1)[some(mask.numel(), 0.1)] = True
    if kind == "one entry":
        mask.view(-1)[some(mask.numel(), 0)] = True
    if kind == "full":
        mask[:] = True
    if kind in ("columns", "rows", "lines", "rectangle"):  # no line is ever complete
        kept = torch.rand(shape, generator=generator) < 0.5
        kept.view(-1)[mask.flatten().nonzero()[0]] = True
        mask &= kept
    return mask.flatten().nonzero().squeeze(1)


KINDS = ("columns", "rows", "lines", "rectangle", "uneven", "random", "one entry", "full")


def formed(planned, n_rows):
    """How many entries of the gradient the two products hold."""
    _, columns, rows, n_crowded = planned
    return n_rows * n_crowded + len(rows) * (len(columns) - n_crowded)


@pytest.mark.parametrize("kind", KINDS)
def test_the_covered_gradient_is_the_dense_one(kind):
    # Hundreds of masks in all, wide layers included; the product dyᵀ x in float64 is the oracle.
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    dense = sparse = 0
    for trial in range(60):
        largest = 1000 if trial % 30 == 0 else 300
        shape = torch.randint(1, largest, (2,), generator=generator).tolist()
        index = a_mask(kind, shape, generator)
        layer, _ = sparse_layer(shape, index, bias=False)
        x = torch.randn(5, shape[1], generator=generator)
        dy = torch.randn(5, shape[0], generator=generator)
        layer(x).backward(dy)
        want, terms = (d.double().T @ s.double() for d, s in ((dy, x), (dy.abs(), x.abs())))
        error = (layer.delta.grad - want.view(-1)[index]).abs()
        assert (error <= 1e-6 * terms.view(-1)[index]).all()  # of what is added up, which may cancel
        share = formed(layer.planned, shape[0]) / layer.weight.numel()
        dense, sparse = dense + (share == 1), sparse + (share < 0.5)
    # Which way was taken: small layers are dense soon.
    assert dense > 40 if kind in ("random", "full") else sparse > 20


@pytest.mark.parametrize("shape", ((300, 200), (90, 400), (30, 30)))
@pytest.mark.parametrize("kind", KINDS)
def test_the_places_are_where_the_entries_stand_in_the_two_products(kind, shape):
    n_rows, n_columns = shape
    index = a_mask(kind, shape, torch.Generator().manual_seed(1))
    places, columns, rows, n_crowded = cover(index, *shape)
    columns, rows = columns.tolist(), rows.tolist()
    assert len(set(columns)) == len(columns) and len(set(rows)) == len(rows)
    # Both products are laid out by columns.
    held = [(row, column) for column in columns[:n_crowded] for row in range(n_rows)]
    held += [(row, column) for column in columns[n_crowded:] for row in rows]
    assert [held[place] for place in places] == [divmod(flat, n_columns) for flat in index.tolist()]
    if kind in ("random", "full"):
        assert n_crowded == n_columns  # the dense product
    elif shape == (300, 200):
        assert len(held) < 0.3 * n_rows * n_columns


class Work(TorchDispatchMode):
    """The time that operators take, in multiplications of a matrix product.

    Two figures of the operators themselves go into it: the multiplications, and the bytes that are read and
    written, each of which takes as long as 8 multiplications, as is usual for one core of a CPU.
    """

    def __init__(self):
        super().__init__()
        self.time = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        read, written = ([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
                         for tree in ((args, kwargs), result))  # fmt: skip
        if func.is_view or name in ("empty", "new_empty") or not any(t.numel() for t in written):
            return result
        if name == "index_select":
            read = [*written, args[2]]  # no more of it than is copied
        if name in ("mm", "addmm"):
            self.time += written[0].numel() * args[-1].size(0)
        self.time += 8 * sum(t.numel() * t.element_size() for t in (*read, *written))
        return result


def time_of_the_layer(layer, x, dy):
    """What training `layer` takes beyond what it takes frozen."""
    layer(x)  # whatever it does once
    with Work() as training:
        layer(x).backward(dy)
    layer.delta.requires_grad_(False)
    with Work() as frozen:
        layer(x)
    return training.time - frozen.time


def time_of_parts(index, limit, x, dy):
    """What it takes to form whole the columns with `limit` kept entries or more, else a rectangle."""
    row, column = index // x.size(1), index % x.size(1)
    crowded = column.bincount(minlength=x.size(1)) >= limit
    rows, others = row[~crowded[column]].unique(), column[~crowded[column]].unique()
    with Work() as work:
        whole = x if crowded.all() else x.index_select(1, crowded.nonzero().squeeze(1))
        parts = [whole.T @ dy] if crowded.any() else []
        parts += [x.index_select(1, others).T @ dy.index_select(1, rows)] if len(rows) else []
        parts[0].view(-1).index_select(0, index % parts[0].numel())  # as many entries as are kept
    return work.time


@pytest.mark.parametrize("shape", ((300, 200), (90, 400)))
@pytest.mark.parametrize("kind", KINDS)
def test_no_other_choice_of_crowded_columns_takes_much_less_time(kind, shape):
    generator = torch.Generator().manual_seed(1)
    index = a_mask(kind, shape, generator)
    layer, _ = sparse_layer(shape, index, bias=False)
    x, dy = (torch.randn(128, size, generator=generator) for size in reversed(shape))
    limits = (index % shape[1]).bincount().unique().tolist()
    shortest = min(time_of_parts(index, limit, x, dy) for limit in (0, *limits, max(limits) + 1))
    # With its one limit, `cover` takes the columns of a block whole, which salience does not form.
    assert time_of_the_layer(layer, x, dy) <= (2 if kind == "rectangle" else 1.2) * shortest


class OnCuda(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("kind", ("columns", "rows", "rectangle"))
@pytest.mark.parametrize("shape, dense", (((600, 800), True), ((1500, 900), False)))
def test_on_cuda_a_small_layer_takes_the_dense_product(kind, shape, dense):
    # There a part has to be smaller by 2^19 entries, which is more than all that the first layer has.
    index = a_mask(kind, shape, torch.Generator().manual_seed(3))
    assert cover(index, *shape)[3] < shape[1]
    places, columns, rows, n_crowded = cover(index.as_subclass(OnCuda), *shape)
    assert (n_crowded == shape[1]) == dense
    if dense:
        assert columns.tolist() == list(range(shape[1])) and not len(rows)
        assert places.tolist() == [flat % shape[1] * shape[0] + flat // shape[1] for flat in index.tolist()]
    else:
        assert torch.equal(places, cover(index, *shape)[0])


def test_a_copy_of_a_layer_that_was_given_another_mask_forms_that_masks_gradient():
    generator = torch.Generator().manual_seed(4)
    shape = (120, 90)
    masks = [a_mask("random", shape, generator) for _ in range(2)]
    layer, _ = sparse_layer(shape, masks[0])
    other, _ = sparse_layer(shape, masks[1])
    layer = copy.deepcopy(layer)
    x = torch.randn(5, 90, generator=generator)
    layer(x)  # plans the first mask
    layer.load_state_dict(other.state_dict())
    layer = copy.deepcopy(layer)
    dy = torch.randn(5, 120, generator=generator)
    layer(x).backward(dy)
    want = (dy.T @ x).view(-1)[masks[1]]
    assert torch.equal(layer.index, masks[1])
    assert (layer.delta.grad - want).norm() <= 1e-5 * want.norm()


def saved_for_backward(layer, x):
    """The shapes of what autograd keeps, besides the layer's own tensors and plan."""
    places, columns, rows, _ = layer.planned
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers(), places, columns, rows)}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return kept


def test_few_columns_of_the_input_are_kept_or_else_the_input_itself():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, 700)
    few, _ = sparse_layer((900, 700), a_mask("columns", (900, 700), generator))
    kept = saved_for_backward(few, x)
    assert sum(t.numel() for t in kept) <= 0.02 * x.numel() + 50
    for kind in ("rows", "random"):
        layer, _ = sparse_layer((900, 700), a_mask(kind, (900, 700), generator))
        assert [t.data_ptr() for t in saved_for_backward(layer, x)] == [x.data_ptr()]  # shared, not copied


def test_a_mask_that_a_state_dict_brings_gets_its_own_cover():
    generator = torch.Generator().manual_seed(3)
    shape = (300, 200)
    one, two = (torch.arange(300) * 200 + column for column in (3, 150))
    layer, _ = sparse_layer(shape, one)
    other, base = sparse_layer(shape, two)
    x, dy = torch.randn(7, 200, generator=generator), torch.randn(7, 300, generator=generator)
    layer(x).backward(dy)  # plans the cover of `one`
    layer.load_state_dict(other.state_dict())
    layer.delta.grad = None
    layer(x).backward(dy)
    torch.testing.assert_close(layer.delta.grad, (dy.T @ x).view(-1)[two], rtol=1e-5, atol=1e-5)
