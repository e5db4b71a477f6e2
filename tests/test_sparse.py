"""The sparse half of speft: masks, the sparse layer, the dynamic step, adapters and merging.

Every expectation is computed another way: a Python sort for `select`, plain autograd through a dense weight
for `SparseLinear`, and bits compared with an untouched base for what must be exact.
"""

import copy
import gc
import io
import math
import random
import weakref

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from model import GPT, GPTConfig
from speft import SparseLinear, adapter, load_adapter, merge, remask, salience, select, sparsify

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
LAYERS = ("0", "3", "5")  # the linear layers of `mlp`


# ------------------------------------------------------------------------------------------------ helpers


def mlp(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.ReLU(inplace=True),
        nn.LayerNorm(8),
        nn.Linear(8, 5, bias=False),
        nn.Tanh(),
        nn.Linear(5, 4),
    )
    with torch.no_grad():
        model[0].weight[0] = -0.0  # -0.0 + d - d is +0.0: taking off by subtraction shows here
    return model.to(dtype)


def tiny_gpt(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=32, block_size=8, n_layer=2, n_head=2, n_embd=16))


def random_index(numel, count):
    return torch.randperm(numel)[:count].sort().values


def random_masks(model, density=0.4, layers=LAYERS):
    numels = {name: model.get_submodule(name).weight.numel() for name in layers}
    return {name: random_index(n, max(1, round(density * n))) for name, n in numels.items()}


def perturb(deltas, scale=0.1):
    for delta in deltas:
        delta.data.add_(scale * torch.randn_like(delta))


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def weights(model):
    model.state_dict()  # brings the weights up to date, also where delta was changed since the last forward
    return {name: module.weight.detach().clone() for name, module in linears(model).items()}


def corrected(weight, index, values):
    """weight + values, added in float32 or better and rounded once to the weight's type: the dense oracle."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    flat = weight.to(wide).flatten().index_add(0, index.long(), values.to(wide))
    return flat.view(weight.shape).to(weight.dtype)


def same_bits(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8))


def assert_same_tensors(got, want):
    assert list(got) == list(want)
    for name in want:
        assert same_bits(got[name], want[name]), name


def assert_same_adapters(got, want):
    assert set(got) == set(want)
    for name, (index, values, shape) in want.items():
        assert torch.equal(got[name][0], index), name
        assert same_bits(got[name][1], values), name
        assert tuple(got[name][2]) == tuple(shape), name


def assert_near(got, want, dtype):
    """Equal up to the rounding of a sum in `dtype`, relative to the largest entry."""
    assert got.dtype == want.dtype and got.shape == want.shape
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    if dtype is torch.float64 and got.dtype is torch.float32:
        tolerance = 1e-6
    if want.numel():
        assert (got - want).abs().max() <= tolerance * want.abs().max()


def snapshot(model):
    """Everything that a refused call must leave alone."""
    return {
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "adapter": copy.deepcopy(adapter(model)),
    }


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now["types"] == before["types"]
    assert now["parameters"] == before["parameters"]
    assert_same_tensors(now["state"], before["state"])
    assert_same_adapters(now["adapter"], before["adapter"])


def train_steps(model, deltas, steps, seed):
    """A few AdamW steps on random data with an optimizer of their own."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(deltas, lr=0.05, weight_decay=0.1)
    dtype = next(m.weight.dtype for m in linears(model).values())
    for _ in range(steps):
        x, y = torch.randn(7, 6, generator=generator), torch.randn(7, 4, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(x.to(dtype)), y.to(dtype)).backward()
        optimizer.step()


def trained_mlp(dtype=torch.float32, seed=0, steps=3):
    model = mlp(dtype, seed)
    deltas = sparsify(model, random_masks(model))
    train_steps(model, deltas, steps, seed)
    return model, deltas


def probe(dtype):
    return torch.randn(11, 6, generator=torch.Generator().manual_seed(99)).to(dtype)


def outputs(model):
    with torch.no_grad():
        return model(probe(next(m.weight.dtype for m in linears(model).values())))


class Allocations(TorchDispatchMode):
    """The sizes of all tensors that operators return in memory of their own."""

    def __init__(self):
        super().__init__()
        self.numels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and memory(t) not in given:
                self.numels.append(t.untyped_storage().nbytes() // t.element_size())
        return result


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


# ------------------------------------------------------------------------------------------------- select


def by_sorting(scores, density, scope):
    """The naive ranking: highest score first, then the earlier layer, then the lower index."""
    entries = [
        (-value, layer, i)
        for layer, tensor in enumerate(scores.values())
        for i, value in enumerate(tensor.flatten().tolist())
    ]
    if scope == "global":
        kept = sorted(entries)[: round(density * len(entries))]
    else:
        kept = []
        for layer in range(len(scores)):
            own = sorted(entry for entry in entries if entry[1] == layer)
            kept += own[: max(1, round(density * len(own)))]
    return {name: sorted(i for _, at, i in kept if at == layer) for layer, name in enumerate(scores)}


DENORMAL = 2.0**-149
SCORES = {
    "normal": lambda shape: torch.randn(shape),
    "few values": lambda shape: torch.randint(-2, 3, shape).float(),
    "signed zeros": lambda shape: torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, -1.0])[torch.randint(6, shape)],
    "infinite": lambda shape: torch.tensor([-math.inf, -1, -0.0, 0, 1, math.inf])[torch.randint(6, shape)],
    "denormal": lambda shape: torch.randint(-3, 4, shape).float() * DENORMAL,
    "negative": lambda shape: -torch.rand(shape) - 1,
    "equal": lambda shape: torch.full(shape, -0.25),
    "extreme": lambda shape: torch.tensor([3.4e38, -3.4e38, 1.2e-38, -1.2e-38, 0])[torch.randint(5, shape)],
}


def random_scores(kind):
    shapes = [(random.randint(1, 9), random.randint(1, 9)) for _ in range(random.randint(1, 5))]
    return {f"layer.{i}": SCORES[kind](shape) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("kind", SCORES)
def test_select_agrees_with_a_naive_sort(kind, scope, seed):
    random.seed(seed)
    torch.manual_seed(seed)
    for density in (1, 1.0, 0.5, 0.25, *(random.uniform(0.01, 1) for _ in range(8))):
        scores = random_scores(kind)
        total = sum(s.numel() for s in scores.values())
        if scope == "global" and round(density * total) == 0:
            density = 0.75
        before = {name: tensor.clone() for name, tensor in scores.items()}
        masks = select(scores, density, scope)
        want = by_sorting(scores, density, scope)
        assert list(masks) == list(scores)
        for name, index in masks.items():
            assert index.dtype == torch.int64 and index.dim() == 1
            assert index.tolist() == want[name], (density, name)
        assert_same_tensors(scores, before)


@pytest.mark.parametrize("density", [1e-5, 0.013, 0.5, 0.999])
def test_select_counts_exactly_in_large_layers_with_many_ties(density):
    torch.manual_seed(0)
    shapes = [(300, 250), (70, 90), (250, 300)]
    scores = {str(shape): torch.randn(shape).mul(50).round().abs() for shape in shapes}
    flat = torch.cat([s.flatten() for s in scores.values()])
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[: round(density * len(flat))]] = True
    want = [part.nonzero().squeeze(1) for part in kept.split([s.numel() for s in scores.values()])]
    masks = select(scores, density, "global")
    assert all(torch.equal(got, expected) for got, expected in zip(masks.values(), want, strict=True))


def test_select_rounds_a_half_to_even_as_python_does():
    assert len(select({"a": torch.rand(1, 5)}, 0.5, "global")["a"]) == 2
    assert len(select({"a": torch.rand(1, 7)}, 0.5, "local")["a"]) == 4


def test_select_gives_layers_without_a_kept_weight_an_empty_entry():
    scores = {"low": torch.zeros(3, 3), "high": torch.ones(2, 2), "last": torch.zeros(1, 4)}
    masks = select(scores, 4 / 17, "global")
    assert list(masks) == ["low", "high", "last"]
    assert [index.tolist() for index in masks.values()] == [[], [0, 1, 2, 3], []]


@pytest.mark.parametrize("scope", ["global", "local"])
def test_select_counts_row_major_also_for_non_contiguous_scores(scope):
    torch.manual_seed(0)
    scores = {"a": torch.randn(5, 4).t(), "b": torch.randn(6, 6)[::2, 1::2]}
    assert {n: i.tolist() for n, i in select(scores, 0.3, scope).items()} == by_sorting(scores, 0.3, scope)


def test_select_takes_scores_that_require_a_gradient():
    scores = {"a": torch.randn(30, 20)}
    wanted = select(scores, 0.1, "global")["a"]
    assert torch.equal(select({"a": scores["a"].requires_grad_()}, 0.1, "global")["a"], wanted)


def test_select_local_keeps_at_least_one_weight_of_each_layer():
    masks = select({"a": torch.rand(2, 2), "b": torch.tensor([[0.0, 2.0, 1.0]])}, 0.01, "local")
    assert len(masks["a"]) == 1 and masks["b"].tolist() == [1]


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf, -math.inf, "0.1", None])
def test_select_refuses_a_wrong_density(density, scope):
    with pytest.raises(ValueError, match="density"):
        select({"a": torch.rand(4, 4)}, density, scope)


def test_select_refuses_a_global_count_of_zero():
    with pytest.raises(ValueError):
        select({"a": torch.rand(2, 3), "b": torch.rand(2, 2)}, 0.05, "global")


def test_select_refuses_an_unknown_scope():
    with pytest.raises(ValueError):
        select({"a": torch.rand(2, 3)}, 0.5, "layer")


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("sign", [1, -1])
def test_select_refuses_nan_scores(sign, scope, density):
    scores = {"a": torch.rand(4, 4), "b": torch.rand(3, 3)}
    scores["b"][1, 1] = math.copysign(math.nan, sign)
    with pytest.raises(ValueError):
        select(scores, density, scope)


@pytest.mark.parametrize("spread", ["normal", "few values"])
def test_global_selection_forms_no_copy_of_all_scores(spread):
    torch.manual_seed(0)
    scores = {str(i): SCORES[spread]((40, 50)) for i in range(6)}
    with Allocations() as allocations:
        select(scores, 0.1, "global")
    assert allocations.numels, "the mode saw nothing"
    # Two of the six layers leave room for an operator's outputs, and none for a copy of half of all.
    assert max(allocations.numels) <= 2 * 40 * 50


# ------------------------------------------------------------------------------ SparseLinear and autograd

SHAPES = [(1, 1), (1, 7), (6, 1), (16, 8), (33, 65), (512, 24), (24, 512), (512, 512)]  # (out, in)
LEADING = [(), (5,), (2, 3)]
TAILS = {
    "sum": lambda y: y.sum(),  # an expanded gradient
    "square": lambda y: (y * y).sum(),
    "inplace relu": lambda y: (nn.ReLU(inplace=True)(y) ** 2).sum(),
    "inplace add": lambda y: (y.add_(1.0) ** 2).sum(),
}


def masks_of(out_features, in_features):
    numel = out_features * in_features
    return {
        "empty": torch.empty(0, dtype=torch.int64),
        "first": torch.tensor([0]),
        "last": torch.tensor([numel - 1]),
        "row": torch.arange(in_features) + (out_features - 1) * in_features,
        "column": torch.arange(out_features) * in_features,
        "sparse": random_index(numel, max(1, numel // 50)),
        "half": random_index(numel, max(1, numel // 2)),
        "full": torch.arange(numel),
    }


def sparse_layer(shape, index, bias=True, dtype=torch.float32):
    """A SparseLinear with a random delta, and its base weight and bias."""
    layer = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    base = layer.weight.detach().clone()
    sparsify(nn.Sequential(layer), {"0": index})
    layer.delta.data.copy_(torch.randn(len(index)) / shape[1] ** 0.5)
    return layer, base


class Dense(nn.Module):
    """The oracle: delta scattered into a dense weight, and nothing but autograd."""

    def __init__(self, layer, base):
        super().__init__()
        self.base, self.index = base, layer.index.clone()
        self.delta = nn.Parameter(layer.delta.detach().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x):
        return F.linear(x, corrected(self.base, self.index, self.delta), self.bias)


def gradients(layer, x, loss, x_grad=True):
    """The output and the gradients of delta (None for an empty mask, which trains none), bias and input."""
    x = x.detach().clone().requires_grad_(x_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(True)
    y = layer(x)
    out = y.detach().clone()
    loss(y).backward()
    ddelta = layer.delta.grad if len(layer.delta) else None
    return out, ddelta, None if layer.bias is None else layer.bias.grad, x.grad


def assert_gradients_near(got, want, dtype):
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            assert_near(g, w, dtype)


@pytest.mark.parametrize("leading", LEADING, ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_those_of_a_dense_masked_weight(dtype, shape, leading):
    torch.manual_seed(1)
    for mask, index in masks_of(*shape).items():
        if shape == (512, 512) and mask not in ("sparse", "half"):
            continue
        for i, (tail, loss) in enumerate(TAILS.items()):
            layer, base = sparse_layer(shape, index, bias=i % 2 == 0, dtype=dtype)
            dense = Dense(layer, base)
            x = torch.randn(*leading, shape[1]).to(dtype)
            got = gradients(layer, x, loss)
            assert_gradients_near(got, gradients(dense, x, loss), dtype)
            assert layer.delta.grad is None or layer.delta.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["empty", "last", "half", "full"])
def test_gradients_for_inputs_that_need_none_or_are_empty_or_strided(mask, dtype):
    torch.manual_seed(2)
    index = masks_of(12, 10)[mask]
    plain = torch.randn(4, 10)
    for x in (plain, plain[:0], torch.randn(10, 4).t(), plain[:1].expand(4, 10)):
        for x_grad in (True, False):
            layer, base = sparse_layer((12, 10), index, dtype=dtype)
            x = x.to(dtype)
            want = gradients(Dense(layer, base), x, TAILS["square"], x_grad)
            assert_gradients_near(gradients(layer, x, TAILS["square"], x_grad), want, dtype)


def test_strided_inputs_and_output_gradients_through_a_permute():
    torch.manual_seed(2)
    layer, base = sparse_layer((6, 8), random_index(48, 20))
    x = torch.randn(3, 8, 5, requires_grad=True)
    for module in (layer, dense := Dense(layer, base)):
        (module(x.transpose(1, 2)).transpose(1, 2) * torch.arange(5)).pow(2).sum().backward()
    assert_near(layer.delta.grad, dense.delta.grad, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_accumulate_over_backward_passes(dtype):
    torch.manual_seed(3)
    layer, base = sparse_layer((9, 7), random_index(63, 30), dtype=dtype)
    dense = Dense(layer, base)
    for _ in range(3):
        x = torch.randn(4, 7).to(dtype)
        layer(x).square().sum().backward()
        dense(x).square().sum().backward()
    assert_near(layer.delta.grad, dense.delta.grad, dtype)


def test_two_forwards_before_one_backward():
    torch.manual_seed(4)
    layer, base = sparse_layer((7, 7), random_index(49, 20))
    dense = Dense(layer, base)
    x, z = torch.randn(4, 7), torch.randn(2, 7)
    for module in (layer, dense):
        (module(module(x)).square().sum() + module(z).sum()).backward()  # also the layer after itself
    assert_near(layer.delta.grad, dense.delta.grad, torch.float32)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same_and_training_goes_on_after(context):
    torch.manual_seed(5)
    layer, base = sparse_layer((9, 7), random_index(63, 30))
    dense, x = Dense(layer, base), torch.randn(4, 7)
    with context():
        y = layer(x)
    assert not y.requires_grad and torch.equal(y, dense(x))
    loss = TAILS["square"]
    assert_gradients_near(gradients(layer, x, loss), gradients(dense, x, loss), torch.float32)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["last", "half", "full"])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(backward_inside, mask, dtype, x_dtype):
    torch.manual_seed(6)
    layer, base = sparse_layer((20, 30), masks_of(20, 30)[mask], dtype=dtype)
    dense, x = Dense(layer, base), torch.randn(8, 30).to(x_dtype)
    results = []
    for module in (layer, dense):
        module.bias.requires_grad_(True)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(leaf)
            loss = y.square().sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        results.append((y.detach(), module.delta.grad, module.bias.grad, leaf.grad))
    assert results[0][0].dtype == torch.bfloat16
    assert layer.delta.grad.dtype == torch.float32
    assert_gradients_near(*results, torch.bfloat16)


def test_under_one_autocast_every_forward_sees_the_current_delta():
    # Autocast keeps the casts of trainable weights until the context ends.
    torch.manual_seed(6)
    layer, base = sparse_layer((20, 30), random_index(600, 300))
    x = torch.randn(8, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()
        layer.delta.data.add_(1.0)
        y = layer(x)
        want = F.linear(x, corrected(base, layer.index, layer.delta.detach()), layer.bias)
    assert_near(y.detach(), want.detach(), torch.bfloat16)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_checkpointing(dtype, use_reentrant):
    model, deltas = trained_mlp(dtype)
    x = probe(dtype).requires_grad_()

    def run(forward):
        for delta in deltas:
            delta.grad = None
        x.grad = None
        forward().square().sum().backward()
        return [delta.grad.clone() for delta in deltas] + [x.grad.clone()]

    def halves():
        h = checkpoint(model[:3], x, use_reentrant=use_reentrant)
        return checkpoint(model[3:], h, use_reentrant=use_reentrant)

    for got, want in zip(run(halves), run(lambda: model(x)), strict=True):
        assert_near(got, want, dtype)


@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(96,), (4, 24)], ids=["2d", "3d"])
def test_autograd_saves_the_input_itself_and_no_dense_copy_of_the_weight(leading, dtype, x_grad):
    torch.manual_seed(7)
    layer, _ = sparse_layer((128, 160), random_index(128 * 160, 1000), dtype=dtype)
    x = torch.randn(*leading, 160).to(dtype).requires_grad_(x_grad)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    ours = {memory(t) for t in (x, *layer.parameters(), *layer.buffers())}
    assert memory(x) in {memory(t) for t in saved}, "the input is kept, but not with save_for_backward"
    plan = 1000 + 128 + 160  # places, rows and columns
    assert sum(t.numel() for t in saved if memory(t) not in ours) <= plan


@pytest.mark.parametrize("x_grad", [True, False])
def test_the_backward_pass_reads_only_what_autograd_saved(x_grad):
    # As with offloading: after the forward pass nothing but the packed copies is intact.
    torch.manual_seed(7)
    layer, base = sparse_layer((10, 12), random_index(120, 60))
    x = torch.randn(6, 12)
    want = gradients(Dense(layer, base), x, TAILS["square"], x_grad)
    x = x.clone().requires_grad_(x_grad)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        y = layer(x)
    x.data.zero_()
    layer.weight.data.zero_()
    y.backward(2 * y.detach())
    assert_near(layer.delta.grad, want[1], torch.float32)
    if x_grad:
        assert_near(x.grad, want[3], torch.float32)


def test_nothing_but_saved_tensors_keeps_the_input_alive():
    layer, _ = sparse_layer((10, 12), random_index(120, 60))
    x = torch.randn(6, 12)
    alive = weakref.ref(x)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        y = layer(x)
    del x
    gc.collect()
    assert y.requires_grad and alive() is None


def test_changing_the_input_in_place_before_backward_is_an_error():
    layer, _ = sparse_layer((5, 5), torch.arange(25))
    x = torch.randn(3, 5)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_forward_pass_allocates_no_second_weight(dtype, grad):
    torch.manual_seed(8)
    layer, _ = sparse_layer((256, 256), random_index(256 * 256, 600), dtype=dtype)
    x = torch.randn(2, 4, 256).to(dtype)
    before = memory(layer.weight)
    with torch.set_grad_enabled(grad), Allocations() as allocations:
        layer(x)
    assert allocations.numels, "the mode saw nothing"
    assert max(allocations.numels) <= 8 * 256
    assert memory(layer.weight) == before


class Alive(TorchDispatchMode):
    """The most tensors of at least `numel` entries that were alive at once, of those made under the mode."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.most, self.made = numel, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        large = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.numel() >= self.numel]
        self.made += [weakref.ref(t) for t in large if memory(t) not in given]
        self.most = max(self.most, sum(ref() is not None for ref in self.made))
        return result


def test_the_backward_pass_frees_each_dense_gradient_before_the_next():
    torch.manual_seed(8)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    deltas = sparsify(model, {str(i): random_index(64 * 64, 200) for i in range(8)})
    loss = model(torch.randn(2, 64)).sum()
    with Alive(64 * 64) as alive:
        loss.backward()
    assert all(delta.grad is not None for delta in deltas)
    assert alive.most <= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_a_new_layer_is_a_linear_with_a_frozen_weight_and_a_zero_float32_delta(dtype, index_dtype):
    index = torch.tensor([1, 4, 11], dtype=index_dtype)
    layer = nn.Linear(4, 3, bias=False, dtype=dtype)
    sparsify(nn.Sequential(layer), {"0": index})
    assert isinstance(layer, nn.Linear) and layer.weight.shape == (3, 4) and layer.bias is None
    assert layer.weight.dtype == dtype and not layer.weight.requires_grad
    assert isinstance(layer.delta, nn.Parameter) and layer.delta.requires_grad
    assert same_bits(layer.delta, torch.zeros(3))
    assert dict(layer.named_buffers())["index"].tolist() == [1, 4, 11]


def test_delta_is_float32_whatever_the_default_type():
    torch.set_default_dtype(torch.float64)
    try:
        model = nn.Sequential(nn.Linear(4, 3))
        (delta,) = sparsify(model, {"0": torch.tensor([2])})
        assert model[0].weight.dtype == torch.float64 and delta.dtype == torch.float32
        delta.data.fill_(0.5)
        (delta,) = remask(model, {"0": torch.tensor([1, 2])})
        assert delta.dtype == adapter(model)["0"][1].dtype == torch.float32
        assert adapter(model)["0"][1].tolist() == [0, 0.5]
    finally:
        torch.set_default_dtype(torch.float32)


def test_small_steps_on_a_bfloat16_weight_accumulate_in_float32():
    model = nn.Sequential(nn.Linear(1, 1, bias=False, dtype=torch.bfloat16))
    model[0].weight.data.fill_(1.0)
    deltas = sparsify(model, {"0": torch.tensor([0])})
    optimizer = torch.optim.SGD(deltas, lr=1e-3)  # at 1 the steps of bfloat16 are 2**-7
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    for _ in range(250):
        optimizer.zero_grad()
        (-model(x)).sum().backward()
        optimizer.step()
    assert model(x).item() == 1.25
    assert adapter(model)["0"][1].item() == pytest.approx(0.25, abs=1e-5)


# ------------------------------------------------------------- the weight is right however delta was changed


def by_fused_adamw(deltas):
    for delta in deltas:
        delta.grad = torch.randn_like(delta)
    torch.optim.AdamW(deltas, lr=0.1, fused=True).step()


def by_vector(deltas):
    vector_to_parameters(torch.randn(sum(d.numel() for d in deltas)), deltas)


CHANGES = {"data.add_": perturb, "fused AdamW": by_fused_adamw, "vector_to_parameters": by_vector}


def seen_by_forward(model, name, base):
    layer = model.get_submodule(name)
    with torch.no_grad():
        return layer(torch.eye(layer.in_features, dtype=base.dtype)).t()  # exact: one product is not zero


def seen_by_adapter(model, name, base):
    index, values, _ = adapter(model)[name]
    return corrected(base, index, values)


def seen_by_copy(model, name, base):
    return seen_by_forward(copy.deepcopy(model), name, base)


def seen_by_remask(model, name, base):
    remask(model, {})
    return seen_by_forward(model, name, base)


READERS = {
    "forward": seen_by_forward,
    "state_dict": lambda model, name, base: model.state_dict()[f"{name}.weight"],
    "submodule's state_dict": lambda model, name, base: model.get_submodule(name).state_dict()["weight"],
    "adapter": seen_by_adapter,
    "merge": lambda model, name, base: merge(model).get_submodule(name).weight.detach(),
    "deepcopy": seen_by_copy,
    "remask": seen_by_remask,
}


def unbiased(dtype):
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4, bias=False)).to(dtype)
    return model, weights(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("reader", READERS)
def test_the_weight_is_right_after_any_change_of_delta(reader, change, dtype):
    model, base = unbiased(dtype)
    masks = random_masks(model, layers=("0", "2"))
    deltas = sparsify(model, masks)
    for _ in range(2):  # the second time over a weight that already carries a correction
        outputs(model)
        CHANGES[change](deltas)
    want = {n: corrected(base[n], masks[n], model.get_submodule(n).delta.detach()) for n in masks}
    for name in masks:
        assert not torch.equal(want[name], base[name])
        assert torch.equal(READERS[reader](model, name, base[name]), want[name])
        if reader == "merge":
            break  # the second layer is merged by then


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_magnitude_scores_are_right_after_any_change_of_delta(change, dtype):
    model, base = unbiased(dtype)
    masks = random_masks(model, layers=("0", "2"))
    deltas = sparsify(model, masks)
    outputs(model)
    CHANGES[change](deltas)
    scores = salience(model, "magnitude", [], None)
    for name in masks:
        want = corrected(base[name], masks[name], model.get_submodule(name).delta.detach())
        assert torch.equal(scores[name], want.abs().float())


@pytest.mark.parametrize("change", CHANGES)
def test_taking_an_adapter_off_restores_the_base_after_any_change_of_delta(change):
    model = mlp()
    base = weights(model)
    deltas = sparsify(model, random_masks(model))
    outputs(model)
    CHANGES[change](deltas)
    load_adapter(model, {})
    assert_same_tensors(weights(model), base)


# ------------------------------------------------------------------------------ copies, casts, checkpoints


def after_steps(model, masks):
    train_steps(model, [model.get_submodule(n).delta for n in masks], 3, seed=1)


def after_a_remask(model, masks):
    after_steps(model, masks)
    remask(model, masks)
    after_steps(model, masks)


STAGES = {"fresh": lambda model, masks: None, "after steps": after_steps, "after a remask": after_a_remask}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_deep_copy_is_independent_and_trains_on_alike(dtype, stage):
    model = mlp(dtype)
    base, masks = weights(model), random_masks(model)
    sparsify(model, masks)
    STAGES[stage](model, masks)
    twin = copy.deepcopy(model)
    before = outputs(twin)
    assert same_bits(before, outputs(model))
    after_steps(model, masks)
    assert same_bits(outputs(twin), before), "training the original changed the copy"
    assert not torch.equal(outputs(model), before)
    after_steps(twin, masks)
    assert same_bits(outputs(twin), outputs(model))
    assert_same_adapters(adapter(twin), adapter(model))
    load_adapter(twin, {})
    assert_same_tensors(weights(twin), base)
    assert not torch.equal(outputs(model), outputs(twin))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", ["untrained", "other base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_dict_round_trip(dtype, target, assign):
    model = mlp(dtype)
    base, masks = weights(model), random_masks(model)
    deltas = sparsify(model, masks)
    train_steps(model, deltas, 3, seed=0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {"0.weight", "0.index", "0.delta"} <= set(state)

    other = mlp(dtype, seed=0 if target == "untrained" else 5)
    others = sparsify(other, masks)
    if target == "other base":
        train_steps(other, others, 2, seed=3)
    other.load_state_dict(state, assign=assign)
    assert same_bits(outputs(other), outputs(model))
    assert_same_adapters(adapter(other), adapter(model))
    after_steps(model, masks)
    after_steps(other, masks)
    assert same_bits(outputs(other), outputs(model))
    load_adapter(other, {})
    assert_same_tensors(weights(other), base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_dict_round_trip_between_models_of_the_same_masks(dtype):
    model, other = mlp(dtype), mlp(dtype, seed=5)
    base = weights(model)
    masks = [random_masks(model), random_masks(model, layers=("0", "3"))]
    for m in (model, other):
        perturb(sparsify(m, masks[0]))
        perturb(remask(m, masks[1]))
    other.load_state_dict(model.state_dict())
    assert same_bits(outputs(other), outputs(model))
    assert_same_adapters(adapter(other), adapter(model))
    load_adapter(other, {})
    assert_same_tensors(weights(other), base)


def test_the_weights_of_a_state_dict_fit_a_plain_model():
    model, _ = trained_mlp()
    plain = mlp(seed=5)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    assert same_bits(outputs(plain), outputs(model))


CASTS = {
    "to bfloat16": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to float64": (lambda m: m.to(torch.float64), torch.float64),
    "double": (lambda m: m.double(), torch.float64),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to device and type": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16], ids=str)
def test_a_cast_keeps_delta_and_its_gradient_in_float32(start, cast):
    model, deltas = trained_mlp(start)
    before = [delta.detach().clone() for delta in deltas]
    grads = [delta.grad.clone() for delta in deltas]
    carried = adapter(model)
    convert, dtype = CASTS[cast]
    assert convert(model) is model
    kept = [model.get_submodule(name).delta for name in LAYERS]
    assert [id(delta) for delta in kept] == [id(delta) for delta in deltas], "an optimizer holds others"
    for delta, value, grad in zip(deltas, before, grads, strict=True):
        assert same_bits(delta, value) and same_bits(delta.grad, grad)
        delta.grad = None
    assert all(m.weight.dtype == dtype for m in linears(model).values())
    assert_same_adapters(adapter(model), carried)
    outputs(model)
    model(probe(dtype)).square().sum().backward()
    assert all(delta.grad.dtype == torch.float32 and delta.grad.abs().sum() > 0 for delta in deltas)
    train_steps(model, deltas, 1, seed=0)
    assert all(delta.dtype == torch.float32 for delta in deltas)


def trained(model, deltas):
    outputs(model)


def with_pending_change(model, deltas):
    outputs(model)
    perturb(deltas)


def with_entries_that_left_the_mask(model, deltas):
    perturb(remask(model, random_masks(model, density=0.1, layers=("0", "5"))))


@pytest.mark.parametrize("state", [trained, with_pending_change, with_entries_that_left_the_mask])
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_model_is_the_cast_base_with_the_same_correction(cast, state):
    model, deltas = trained_mlp()
    state(model, deltas)
    convert, _ = CASTS[cast]
    base = convert(mlp())
    other = copy.deepcopy(base)
    load_adapter(other, adapter(model))
    convert(model)
    assert_same_tensors(weights(model), weights(other))
    assert same_bits(outputs(model), outputs(other))
    remask(model, random_masks(model))
    assert same_bits(outputs(model), outputs(other))
    load_adapter(model, {})
    assert_same_tensors(weights(model), weights(base))


# ---------------------------------------------------------------------------------------------- sparsify


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparsify_changes_the_layers_in_place_and_freezes_everything_else(dtype, index_dtype):
    model = mlp(dtype)
    before, modules, state = outputs(model), list(model.modules()), weights(model)
    masks = {name: index.to(index_dtype) for name, index in random_masks(model, layers=("0", "5")).items()}
    deltas = sparsify(model, masks)
    assert list(model.modules()) == modules
    assert [type(model.get_submodule(n)) for n in LAYERS] == [SparseLinear, nn.Linear, SparseLinear]
    assert {id(d) for d in deltas} == {id(model[0].delta), id(model[5].delta)} and len(deltas) == 2
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(d) for d in deltas}
    for name, index in masks.items():
        assert model.get_submodule(name).index.tolist() == index.tolist()
        assert same_bits(model.get_submodule(name).delta, torch.zeros(len(index)))
    assert same_bits(outputs(model), before)
    assert all(torch.equal(weight, state[name]) for name, weight in weights(model).items())


def test_sparsify_returns_the_non_empty_deltas_only():
    model = mlp()
    (delta,) = sparsify(model, {"0": torch.empty(0, dtype=torch.int64), "3": torch.tensor([2, 3])})
    assert delta is model[3].delta and delta.tolist() == [0, 0]
    assert type(model[0]) is SparseLinear and model[0].delta.numel() == 0
    train_steps(model, [delta], 2, seed=0)
    assert_same_tensors({"0": model[0].weight}, {"0": mlp()[0].weight})


BAD_INDICES = {
    "unsorted": torch.tensor([3, 1]),
    "unsorted at the end": torch.tensor([0, 5, 7, 6]),
    "duplicate": torch.tensor([1, 1]),
    "too large": torch.tensor([0, 20]),
    "negative": torch.tensor([-1, 3]),
    "float": torch.tensor([1.0, 2.0]),
    "bool": torch.tensor([False, True]),
}


def half_tied():
    model = mlp()
    model.embedding = nn.Embedding(4, 5)
    model.embedding.weight = model[5].weight
    return model


def tied_in_memory():
    # What load_state_dict(assign=True) makes of a tied head: two parameters, one memory.
    model = mlp()
    model.embedding = nn.Embedding(4, 5)
    model.embedding.weight = nn.Parameter(model[5].weight.data)
    return model


def tied_linears():
    model = mlp()
    model.twin = nn.Linear(5, 4)
    model.twin.weight = model[5].weight
    return model


def with_attention():
    model = mlp()
    model.attention = nn.MultiheadAttention(4, 2)
    return model


BAD_NAMES = {
    "unknown": (mlp, "7"),
    "empty name": (mlp, ""),
    "no linear layer": (mlp, "2"),
    "a parameter": (mlp, "0.weight"),
    "tied to an embedding": (half_tied, "5"),
    "tied to an embedding in memory": (tied_in_memory, "5"),
    "tied to a linear": (tied_linears, "5"),
    "bypassed by its parent": (with_attention, "attention.out_proj"),
}


def plain(make):
    return make()


def carrying(make):
    """A model that is sparse already, after a remask and some steps."""
    model = make()
    perturb(sparsify(model, random_masks(model, layers=("0", "3"))))
    perturb(remask(model, random_masks(model, layers=("0",))))
    return model


@pytest.mark.parametrize("call, start", [(sparsify, plain), (remask, carrying)], ids=["sparsify", "remask"])
@pytest.mark.parametrize("case", BAD_INDICES)
def test_wrong_indices_are_refused_and_change_nothing(case, call, start):
    model = start(mlp)
    before = snapshot(model)
    with pytest.raises(ValueError):
        call(model, {"0": torch.tensor([1, 2]), "5": BAD_INDICES[case]})  # 5 has 20 weights
    assert_unchanged(model, before)
    call(model, {"0": torch.tensor([1, 2]), "5": torch.tensor([0, 19])})


@pytest.mark.parametrize("call, start", [(sparsify, plain), (remask, carrying)], ids=["sparsify", "remask"])
@pytest.mark.parametrize("case", BAD_NAMES)
def test_wrong_names_and_tied_weights_are_refused_and_change_nothing(case, call, start):
    make, name = BAD_NAMES[case]
    model = start(make)
    before = snapshot(model)
    with pytest.raises(ValueError):
        call(model, {"0": torch.tensor([1, 2]), name: torch.tensor([0, 1])})
    assert_unchanged(model, before)


# ------------------------------------------------------------------------------------------------ remask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_remask_keeps_the_outputs_and_starts_from_zero(dtype):
    model = mlp(dtype)
    perturb(sparsify(model, random_masks(model, layers=("0", "3"))))
    for layers in (("0", "3"), ("3", "5"), ("5",), ("0", "3", "5")):
        before = outputs(model)
        masks = random_masks(model, density=0.3, layers=layers)
        deltas = remask(model, masks)
        assert same_bits(outputs(model), before)
        assert {id(d) for d in deltas} == {id(model.get_submodule(n).delta) for n in layers}
        trainable = [p for p in model.parameters() if p.requires_grad and p.numel()]
        assert {id(p) for p in trainable} == {id(d) for d in deltas}
        for name in LAYERS:
            layer = model.get_submodule(name)
            if isinstance(layer, SparseLinear):
                want = masks.get(name, torch.empty(0, dtype=torch.int64))
                assert layer.index.tolist() == want.tolist()
                assert same_bits(layer.delta, torch.zeros(len(want)))
        perturb(deltas)


def test_remask_to_nothing_keeps_the_outputs():
    model, _ = trained_mlp()
    before = outputs(model)
    assert remask(model, {}) == []
    assert same_bits(outputs(model), before)
    assert all(model.get_submodule(name).delta.numel() == 0 for name in LAYERS)


@pytest.mark.parametrize("forward_between", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_over_many_remasks_base_and_correction_stay_exact(dtype, seed, forward_between):
    base = mlp(dtype, seed)
    model = copy.deepcopy(base)
    masks = random_masks(model, density=0.3)
    touched = {name: set(index.tolist()) for name, index in masks.items()}
    perturb(sparsify(model, masks))
    for step in range(10):
        layers = LAYERS if step % 3 else random.Random(step + seed).sample(LAYERS, 2)
        masks = random_masks(model, density=0.1 + 0.05 * step, layers=layers)
        before = outputs(model) if forward_between else None
        deltas = remask(model, masks)
        if forward_between:
            assert same_bits(outputs(model), before)
        for name in layers:
            touched[name] |= set(masks[name].tolist())
        perturb(deltas, scale=10.0 ** -(step % 4))  # many magnitudes: sums that round

    state = adapter(model)
    assert {name: set(index.tolist()) for name, (index, _, _) in state.items()} == touched
    current = weights(model)
    for name, (index, values, _) in state.items():
        assert torch.equal(corrected(weights(base)[name], index, values), current[name])

    other = copy.deepcopy(base)
    load_adapter(other, state)
    assert same_bits(outputs(other), outputs(model))
    assert_same_tensors(weights(other), current)
    merged = merge(copy.deepcopy(model))
    assert_same_tensors(weights(merged), current)
    assert same_bits(outputs(merged), outputs(model))
    load_adapter(model, {})
    assert_same_tensors(weights(model), weights(base))
    assert same_bits(outputs(model), outputs(base))


def test_small_corrections_add_up_over_remasks_of_a_bfloat16_model():
    model = nn.Sequential(nn.Linear(1, 1, bias=False, dtype=torch.bfloat16))
    model[0].weight.data.fill_(1.0)
    masks = {"0": torch.tensor([0])}
    sparsify(model, masks)
    for _ in range(125):
        (delta,) = remask(model, masks)
        delta.data.add_(2e-3)  # under half a step of bfloat16
    assert model(torch.ones(1, 1, dtype=torch.bfloat16)).item() == 1.25


# --------------------------------------------------------------------------------------- adapter and merge


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_an_adapter_names_indices_values_and_shape(dtype, index_dtype):
    model = mlp(dtype)
    masks = random_masks(model, layers=("0", "5"))
    deltas = sparsify(model, {name: index.to(index_dtype) for name, index in masks.items()})
    perturb(deltas)
    state = adapter(model)
    assert set(state) == {"0", "5"}
    for name, (index, values, shape) in state.items():
        assert index.dtype == torch.int64 and torch.equal(index, masks[name])
        assert same_bits(values, model.get_submodule(name).delta.detach())
        assert isinstance(shape, tuple) and shape == tuple(model.get_submodule(name).weight.shape)
        assert not values.requires_grad


def test_a_plain_model_has_an_empty_adapter():
    assert adapter(mlp()) == {}


def test_an_adapter_is_a_snapshot():
    model, deltas = trained_mlp()
    state = adapter(model)
    kept = copy.deepcopy(state)
    after_steps(model, LAYERS)
    assert_same_adapters(state, kept)
    other = mlp()
    train_steps(other, load_adapter(other, state), 2, seed=4)
    assert_same_adapters(state, kept)


def test_an_adapter_survives_saving():
    model, _ = trained_mlp()
    file = io.BytesIO()
    torch.save(adapter(model), file)
    file.seek(0)
    other = mlp()
    load_adapter(other, torch.load(file, weights_only=True))
    assert same_bits(outputs(other), outputs(model))


@pytest.mark.parametrize("start", ["plain", "sparse", "trained"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loaded_adapter_gives_equal_outputs_and_trains_on_alike(dtype, start):
    model, deltas = trained_mlp(dtype)
    other = mlp(dtype)
    if start != "plain":
        others = sparsify(other, random_masks(other, layers=("0", "3")))
    if start == "trained":
        train_steps(other, others, 2, seed=8)
    loaded = load_adapter(other, adapter(model))
    assert same_bits(outputs(other), outputs(model))
    assert_same_adapters(adapter(other), adapter(model))
    assert {id(p) for p in other.parameters() if p.requires_grad and p.numel()} == {id(d) for d in loaded}
    train_steps(model, deltas, 3, seed=5)
    train_steps(other, loaded, 3, seed=5)
    assert same_bits(outputs(other), outputs(model))
    assert_same_adapters(adapter(other), adapter(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_after_the_same_remask_a_loaded_dynamic_run_trains_on_alike(dtype):
    model, _ = trained_mlp(dtype)
    for seed in range(3):
        train_steps(model, remask(model, random_masks(model)), 2, seed)
    other = mlp(dtype)
    load_adapter(other, adapter(model))
    torch.manual_seed(6)
    masks = random_masks(model, layers=("0", "3"))
    train_steps(model, remask(model, masks), 3, seed=9)
    train_steps(other, remask(other, masks), 3, seed=9)
    assert same_bits(outputs(other), outputs(model))
    assert_same_adapters(adapter(other), adapter(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_adapter_replaces_the_first_and_none_restores_the_base(dtype):
    base = mlp(dtype)
    states = []
    for seed in range(2):
        model = copy.deepcopy(base)
        torch.manual_seed(seed)
        perturb(sparsify(model, random_masks(model, layers=LAYERS[seed:])))
        states.append(adapter(model))
        want = outputs(model)  # of the second, after the loop

    other = copy.deepcopy(base)
    load_adapter(other, states[0])
    assert not torch.equal(outputs(other), want)
    load_adapter(other, states[1])
    assert same_bits(outputs(other), want)
    state = {name: item for name, item in adapter(other).items() if len(item[0])}
    assert_same_adapters(state, states[1])
    assert load_adapter(other, {}) == []
    assert_same_tensors(weights(other), weights(base))
    assert same_bits(outputs(other), outputs(base))
    assert all(len(index) == 0 for index, _, _ in adapter(other).values())


def test_load_adapter_takes_int32_indices():
    model, _ = trained_mlp()
    state = {name: (index.int(), values, shape) for name, (index, values, shape) in adapter(model).items()}
    other = mlp()
    load_adapter(other, state)
    assert same_bits(outputs(other), outputs(model))


BAD_ENTRIES = {  # for a weight of (4, 5)
    "shape transposed": (torch.tensor([0, 1]), torch.ones(2), (5, 4)),
    "shape larger": (torch.tensor([0, 1]), torch.ones(2), (4, 6)),
    "nan": (torch.tensor([0, 1]), torch.tensor([1.0, math.nan]), (4, 5)),
    "infinite": (torch.tensor([0, 1]), torch.tensor([-math.inf, 1.0]), (4, 5)),
    "float indices": (torch.tensor([0.0, 1.0]), torch.ones(2), (4, 5)),
    "integer values": (torch.tensor([0, 1]), torch.ones(2, dtype=torch.int64), (4, 5)),
    "float64 values": (torch.tensor([0, 1]), torch.ones(2, dtype=torch.float64), (4, 5)),
    "duplicate": (torch.tensor([1, 1]), torch.ones(2), (4, 5)),
    "unsorted": (torch.tensor([2, 1]), torch.ones(2), (4, 5)),
    "too large": (torch.tensor([0, 20]), torch.ones(2), (4, 5)),
    "negative": (torch.tensor([-1, 0]), torch.ones(2), (4, 5)),
    "too few values": (torch.tensor([0, 1]), torch.ones(1), (4, 5)),
    "too many values": (torch.tensor([0, 1]), torch.ones(3), (4, 5)),
}


@pytest.mark.parametrize("start", [plain, carrying])
@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_wrong_adapter_is_refused_and_changes_nothing(case, start):
    model = start(mlp)
    before = snapshot(model)
    good = (torch.tensor([3, 4]), torch.tensor([1.0, 2.0]), (8, 6))
    with pytest.raises(ValueError):
        load_adapter(model, {"0": good, "5": BAD_ENTRIES[case]})
    assert_unchanged(model, before)
    load_adapter(model, {"0": good})


@pytest.mark.parametrize("start", [plain, carrying])
@pytest.mark.parametrize("case", [*BAD_NAMES])
def test_an_adapter_for_other_layers_is_refused_and_changes_nothing(case, start):
    make, name = BAD_NAMES[case]
    model = start(make)
    before = snapshot(model)
    good = (torch.tensor([3, 4]), torch.tensor([1.0, 2.0]), (8, 6))
    shape = (4, 4) if "attention" in name else (4, 5)
    with pytest.raises(ValueError):
        load_adapter(model, {"0": good, name: (torch.tensor([0]), torch.ones(1), shape)})
    assert_unchanged(model, before)


@pytest.mark.parametrize("forward_before", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_leaves_plain_linears_with_the_corrected_weight(dtype, forward_before):
    model, deltas = trained_mlp(dtype)
    base, state = mlp(dtype), adapter(model)
    want = outputs(model) if forward_before else outputs(copy.deepcopy(model))
    merged = merge(model)
    assert merged is model
    assert all(type(module) is nn.Linear for module in linears(merged).values())
    assert list(merged.state_dict()) == list(base.state_dict())
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in base.named_parameters()}
    assert same_bits(outputs(merged), want)
    for name, (index, values, _) in state.items():
        assert same_bits(merged.get_submodule(name).weight, corrected(weights(base)[name], index, values))
    assert adapter(merged) == {}
    perturb(sparsify(merged, random_masks(merged)))  # a merged model is a base like any other
    assert not torch.equal(outputs(merged), want)


def test_merge_of_a_plain_model_changes_nothing():
    model = mlp()
    before = snapshot(model)
    assert merge(model) is model
    assert_unchanged(model, before)


# ----------------------------------------------------------------------------- unusual weights and modules


def transposed(weight):
    return weight.t().contiguous().t()


def every_second(weight):
    wide = torch.zeros(weight.size(0), 2 * weight.size(1), dtype=weight.dtype)
    wide[:, ::2] = weight
    return wide[:, ::2]


LAYOUTS = {"transposed": transposed, "every second": every_second}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_non_contiguous_weight_works_as_a_contiguous_one(dtype, layout):
    model, other = mlp(dtype), mlp(dtype)
    for module in linears(other).values():
        module.weight = nn.Parameter(LAYOUTS[layout](module.weight.detach()))
        assert not module.weight.is_contiguous()
    bare = copy.deepcopy(other)
    masks = random_masks(model)
    for m in (model, other):
        train_steps(m, sparsify(m, masks), 3, seed=0)
        train_steps(m, remask(m, random_masks(mlp(dtype, seed=1))), 2, seed=1)
    assert_near(outputs(other), outputs(model), dtype)
    # Products of strided matrices may round differently, what the correction does to the weight may not.
    load_adapter(bare, adapter(model))
    assert_same_tensors(weights(bare), weights(model))
    assert_same_tensors(weights(merge(copy.deepcopy(bare))), weights(model))
    load_adapter(bare, {})
    assert_same_tensors(weights(bare), weights(mlp(dtype)))


def test_the_memory_around_a_weight_that_is_a_slice_stays_as_it_was():
    torch.manual_seed(0)
    packed = torch.randn(9, 4)
    before = packed.clone()
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    model[0].weight = nn.Parameter(packed[3:6])
    (delta,) = sparsify(model, {"0": torch.arange(12)})
    delta.data.fill_(1.0)
    assert torch.equal(weights(model)["0"], before[3:6] + 1)
    assert torch.equal(model(torch.eye(4)).t(), before[3:6] + 1)
    assert torch.equal(packed[:3], before[:3]) and torch.equal(packed[6:], before[6:])


class TwoParents(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shared = nn.Linear(6, 6)
        self.left = nn.Sequential(shared, nn.Tanh())
        self.right = nn.Sequential(shared, nn.Linear(6, 2))

    def forward(self, x):
        return self.right(self.left(x))


def test_a_module_with_two_parents_is_one_layer():
    model = TwoParents()
    base, masks = weights(model), {"left.0": random_index(36, 12), "right.1": random_index(12, 5)}
    deltas = sparsify(model, masks)
    assert len(deltas) == 2 and model.left[0] is model.right[0]
    perturb(deltas)
    dense = Dense(model.left[0], base["left.0"])
    outer = Dense(model.right[1], base["right.1"])
    x = torch.randn(5, 6)
    model(x).square().sum().backward()
    outer(dense(torch.tanh(dense(x)))).square().sum().backward()
    assert_near(model.left[0].delta.grad, dense.delta.grad, torch.float32)
    state, want = adapter(model), outputs(model)
    assert set(state) == {"left.0", "right.1"}
    other = TwoParents()
    assert len(load_adapter(other, state)) == 2
    assert same_bits(outputs(other), want)
    perturb(remask(other, {"left.0": torch.tensor([0, 35])}))
    assert not torch.equal(outputs(other), want)
    load_adapter(other, {})
    assert_same_tensors(weights(other), base)
    merge(model)
    assert type(model.left[0]) is nn.Linear and model.right[0] is model.left[0]
    assert same_bits(outputs(model), want)


# --------------------------------------------------------------------------------------------- toy training


def regression():
    torch.manual_seed(11)
    x = torch.randn(64, 6)
    return x, torch.stack((x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3] - x[:, 4], x[:, 5] ** 2), dim=1)


def sample_losses(model, batch):
    return (model(batch[0]) - batch[1]).square().mean(1)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("refreshes", [1, 4], ids=["static", "dynamic"])
def test_training_lowers_the_loss_and_changes_masked_entries_only(refreshes, scope):
    batch = regression()
    model = mlp()
    before = sample_losses(model, batch).mean().item()
    union = {name: set() for name in LAYERS}
    for refresh in range(refreshes):
        masks = select(salience(model, "grad", [batch], sample_losses), 0.15, scope)
        deltas = remask(model, masks) if refresh else sparsify(model, masks)
        optimizer = torch.optim.AdamW(deltas, lr=0.03, weight_decay=0)
        for name, index in masks.items():
            union[name] |= set(index.tolist())
        for _ in range(40 // refreshes):
            optimizer.zero_grad()
            sample_losses(model, batch).mean().backward()
            optimizer.step()
    assert sample_losses(model, batch).mean().item() < 0.85 * before
    after, base = merge(model).state_dict(), mlp().state_dict()
    for name, tensor in after.items():
        changed = set((tensor != base[name]).flatten().nonzero().squeeze(1).tolist())
        allowed = union[name.removesuffix(".weight")] if name.removesuffix(".weight") in union else set()
        assert changed <= allowed, name
        assert len(changed) >= 0.5 * len(allowed), name


@pytest.mark.parametrize("refreshes", [1, 3], ids=["static", "dynamic"])
def test_a_gpt_trains_sparsely_and_its_adapter_gives_the_same_logits(refreshes):
    base = tiny_gpt()
    model = copy.deepcopy(base)
    tokens = torch.randint(32, (6, 9))
    batch = (tokens[:, :-1], tokens[:, 1:])

    def loss_fn(model, batch):
        return model(*batch, reduction="none")[1]

    before = loss_fn(model, batch).mean().item()
    for refresh in range(refreshes):
        masks = select(salience(model, "grad", [batch], loss_fn), 0.05, "global")
        deltas = remask(model, masks) if refresh else sparsify(model, masks)
        optimizer = torch.optim.AdamW(deltas, lr=0.01, fused=True)
        for _ in range(12 // refreshes):
            optimizer.zero_grad()
            loss_fn(model, batch).mean().backward()
            optimizer.step()
    assert loss_fn(model, batch).mean().item() < before - 0.1
    other = copy.deepcopy(base)
    load_adapter(other, adapter(model))
    with torch.no_grad():
        logits = model(batch[0])[0]
        assert same_bits(other(batch[0])[0], logits)
        assert same_bits(merge(model)(batch[0])[0], logits)
        load_adapter(other, {})
        assert same_bits(other(batch[0])[0], base(batch[0])[0])
