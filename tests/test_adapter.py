"""`speft.adapter`, `load_adapter`, `merge`: what was learned, off a model, onto another, bit for bit."""

import copy
import io
import math

import pytest
import torch
import torch.nn as nn

from helpers import (
    BAD_NAMES, DTYPES, LAYERS, after_steps, assert_as_found, assert_same_adapters, assert_same_tensors,
    carrying, corrected, linears, mlp, outputs, perturb, plain, random_masks, same_bits, snapshot,
    train_steps, trained_mlp, weights_of)  # fmt: skip
from speft import adapter, load_adapter, merge, remask, sparsify


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
    trained, stored = merge(copy.deepcopy(model)), dict(other.named_parameters())
    for name, module in linears(trained).items():  # also for who takes the parameter, not the layer's weight
        assert same_bits(stored[f"{name}.weight"].detach(), module.weight.detach())
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
    assert_same_tensors(weights_of(other), weights_of(base))
    assert same_bits(outputs(other), outputs(base))
    assert all(len(index) == 0 for index, _, _ in adapter(other).values())


def test_load_adapter_takes_int32_indices():
    model, _ = trained_mlp()
    state = {name: (index.int(), values, shape) for name, (index, values, shape) in adapter(model).items()}
    other = mlp()
    load_adapter(other, state)
    assert same_bits(outputs(other), outputs(model))


GOOD = torch.tensor([0, 1])
BAD_ENTRIES = {  # for a weight of (4, 5): the adapter's entry and what the message says
    "shape transposed": (GOOD, torch.ones(2), (5, 4), "shape .5, 4"),
    "shape larger": (GOOD, torch.ones(2), (4, 6), "shape .4, 6"),
    "nan": (GOOD, torch.tensor([1.0, math.nan]), (4, 5), "finite"),
    "infinite": (GOOD, torch.tensor([-math.inf, 1.0]), (4, 5), "finite"),
    "float indices": (GOOD.float(), torch.ones(2), (4, 5), "indices"),
    "integer values": (GOOD, torch.ones(2, dtype=torch.int64), (4, 5), "float32"),
    "float64 values": (GOOD, torch.ones(2, dtype=torch.float64), (4, 5), "float32"),
    "duplicate": (torch.tensor([1, 1]), torch.ones(2), (4, 5), "indices"),
    "unsorted": (torch.tensor([2, 1]), torch.ones(2), (4, 5), "indices"),
    "too large": (torch.tensor([0, 20]), torch.ones(2), (4, 5), "indices"),
    "negative": (torch.tensor([-1, 0]), torch.ones(2), (4, 5), "indices"),
    "too few values": (GOOD, torch.ones(1), (4, 5), "one an index"),
    "too many values": (GOOD, torch.ones(3), (4, 5), "one an index"),
}


@pytest.mark.parametrize("start", [plain, carrying])
@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_wrong_adapter_is_refused_and_changes_nothing(case, start):
    model = start(mlp)
    before = snapshot(model)
    good = (torch.tensor([3, 4]), torch.tensor([1.0, 2.0]), (8, 6))
    *entry, message = BAD_ENTRIES[case]
    with pytest.raises(ValueError, match=f"layer '5'.*{message}"):
        load_adapter(model, {"0": good, "5": entry})
    assert_as_found(model, before)
    load_adapter(model, {"0": good})


@pytest.mark.parametrize("start", [plain, carrying])
@pytest.mark.parametrize("case", [*BAD_NAMES])
def test_an_adapter_for_other_layers_is_refused_and_changes_nothing(case, start):
    make, name = BAD_NAMES[case]
    model = start(make)
    before = snapshot(model)
    good = (torch.tensor([3, 4]), torch.tensor([1.0, 2.0]), (8, 6))
    shape = (4, 4) if "attention" in name else (4, 5)
    with pytest.raises(ValueError, match=f"no linear layer '{name}'"):
        load_adapter(model, {"0": good, name: (torch.tensor([0]), torch.ones(1), shape)})
    assert_as_found(model, before)


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
        assert same_bits(merged.get_submodule(name).weight, corrected(weights_of(base)[name], index, values))
    assert adapter(merged) == {}
    perturb(sparsify(merged, random_masks(merged)))  # a merged model is a base like any other
    assert not torch.equal(outputs(merged), want)


def test_merge_of_a_plain_model_changes_nothing():
    model = mlp()
    before = snapshot(model)
    assert merge(model) is model
    assert_as_found(model, before)
