"""`SparseLinear` under autograd, against plain autograd through a dense weight."""

import gc
import weakref

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from helpers import (
    DTYPES, Dense, Memory, assert_near, corrected, memory, probe, random_index, same_bits, sparse_layer,
    trained_mlp)  # fmt: skip
from speft import adapter, remask, sparsify

SHAPES = [(1, 1), (1, 7), (6, 1), (16, 8), (33, 65), (512, 24), (24, 512), (192, 160)]  # (out, in)
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
        if shape == (192, 160) and mask not in ("sparse", "half"):
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
    with torch.set_grad_enabled(grad), Memory() as taken:
        layer(x)
    assert 0 < taken.largest <= 8 * 256
    assert memory(layer.weight) == before


def test_the_backward_pass_frees_each_dense_gradient_before_the_next():
    torch.manual_seed(8)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    deltas = sparsify(model, {str(i): random_index(64 * 64, 200) for i in range(8)})
    loss = model(torch.randn(2, 64)).sum()
    with Memory() as taken:
        loss.backward()
    assert all(delta.grad is not None for delta in deltas)
    assert 0 < taken.peak < 2 * 64 * 64 * 4


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
    assert layer.index.tolist() == [1, 4, 11] and layer.index.dtype == torch.int64
    assert set(dict(layer.named_buffers())) == {"known", "original"}  # the rest is for a second mask


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
