"""`speft.sparsify` and `remask`: what they change, what they refuse, what stays exact."""

import copy
import random

import pytest
import torch
import torch.nn as nn

from helpers import (
    BAD_NAMES, DTYPES, LAYERS, Dense, assert_as_found, assert_near, assert_same_adapters, assert_same_tensors,
    carrying, corrected, linears, mlp, outputs, perturb, plain, random_index, random_masks, random_mlp,
    same_bits, sample_losses, snapshot, train_steps, trained_mlp, weights_of)  # fmt: skip
from speft import SparseLinear, adapter, load_adapter, merge, remask, salience, select, sparsify


# --- sparsify -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparsify_changes_the_layers_in_place_and_freezes_everything_else(dtype, index_dtype):
    model = mlp(dtype)
    before, modules, state = outputs(model), list(model.modules()), weights_of(model)
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
    assert all(torch.equal(weight, state[name]) for name, weight in weights_of(model).items())


def test_sparsify_returns_the_non_empty_deltas_only():
    model = mlp()
    (delta,) = sparsify(model, {"0": torch.empty(0, dtype=torch.int64), "3": torch.tensor([2, 3])})
    assert delta is model[3].delta and delta.tolist() == [0, 0]
    assert type(model[0]) is SparseLinear and model[0].delta.numel() == 0
    train_steps(model, [delta], 2, seed=0)
    assert_same_tensors({"0": model[0].weight}, {"0": mlp()[0].weight})


@pytest.mark.parametrize("again", [False, True], ids=["sparsify", "remask"])
def test_a_mask_stays_what_it_was_when_the_callers_tensor_changes(again):
    models = [mlp(), mlp()]
    for model, changes in zip(models, (False, True)):
        masks = {"0": torch.arange(20), "5": torch.arange(10)}
        deltas = sparsify(model, masks)
        deltas = remask(model, masks) if again else deltas
        if changes:
            for index in masks.values():
                index += 5
        train_steps(model, deltas, 2, seed=0)
    assert_same_tensors(weights_of(models[1]), weights_of(models[0]))
    assert_same_adapters(adapter(models[1]), adapter(models[0]))


BAD_INDICES = {
    "unsorted": torch.tensor([3, 1]),
    "unsorted at the end": torch.tensor([0, 5, 7, 6]),
    "duplicate": torch.tensor([1, 1]),
    "too large": torch.tensor([0, 20]),
    "negative": torch.tensor([-1, 3]),
    "float": torch.tensor([1.0, 2.0]),
    "bool": torch.tensor([False, True]),
}


@pytest.mark.parametrize("call, start", [(sparsify, plain), (remask, carrying)], ids=["sparsify", "remask"])
@pytest.mark.parametrize("case", BAD_INDICES)
def test_wrong_indices_are_refused_and_change_nothing(case, call, start):
    model = start(mlp)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'5'.* indices .* below 20"):
        call(model, {"0": torch.tensor([1, 2]), "5": BAD_INDICES[case]})  # 5 has 20 weights
    assert_as_found(model, before)
    call(model, {"0": torch.tensor([1, 2]), "5": torch.tensor([0, 19])})


@pytest.mark.parametrize("call, start", [(sparsify, plain), (remask, carrying)], ids=["sparsify", "remask"])
@pytest.mark.parametrize("case", BAD_NAMES)
def test_wrong_names_and_tied_weights_are_refused_and_change_nothing(case, call, start):
    make, name = BAD_NAMES[case]
    model = start(make)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"no linear layer '{name}'"):
        call(model, {"0": torch.tensor([1, 2]), name: torch.tensor([0, 1])})
    assert_as_found(model, before)


# --- remask ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_remask_keeps_the_outputs_and_starts_from_zero(dtype):
    model = mlp(dtype)
    perturb(sparsify(model, random_masks(model, layers=("0", "3"))))
    for layers in (("0", "3"), ("3", "5"), ("5",), ("0", "3", "5")):
        before, learned = outputs(model), weights_of(model)
        masks = random_masks(model, density=0.3, layers=layers)
        deltas = remask(model, masks)
        for name, weight in learned.items():  # at once, before any forward pass
            assert same_bits(model.get_submodule(name).weight, weight)
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
    current = weights_of(model)
    for name, (index, values, _) in state.items():
        assert torch.equal(corrected(weights_of(base)[name], index, values), current[name])

    other = copy.deepcopy(base)
    load_adapter(other, state)
    assert same_bits(outputs(other), outputs(model))
    assert_same_tensors(weights_of(other), current)
    merged = merge(copy.deepcopy(model))
    assert_same_tensors(weights_of(merged), current)
    assert same_bits(outputs(merged), outputs(model))
    load_adapter(model, {})
    assert_same_tensors(weights_of(model), weights_of(base))
    assert same_bits(outputs(model), outputs(base))


def test_small_learned_add_up_over_remasks_of_a_bfloat16_model():
    model = nn.Sequential(nn.Linear(1, 1, bias=False, dtype=torch.bfloat16))
    model[0].weight.data.fill_(1.0)
    masks = {"0": torch.tensor([0])}
    sparsify(model, masks)
    for _ in range(125):
        (delta,) = remask(model, masks)
        delta.data.add_(2e-3)  # under half a step of bfloat16
    assert model(torch.ones(1, 1, dtype=torch.bfloat16)).item() == 1.25


# --- unusual weights and modules ------------------------------------------------------------------------


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
    assert_same_tensors(weights_of(bare), weights_of(model))
    assert_same_tensors(weights_of(merge(copy.deepcopy(bare))), weights_of(model))
    load_adapter(bare, {})
    assert_same_tensors(weights_of(bare), weights_of(mlp(dtype)))


def test_the_memory_around_a_weight_that_is_a_slice_stays_as_it_was():
    torch.manual_seed(0)
    packed = torch.randn(9, 4)
    before = packed.clone()
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    model[0].weight = nn.Parameter(packed[3:6])
    (delta,) = sparsify(model, {"0": torch.arange(12)})
    delta.data.fill_(1.0)
    assert torch.equal(weights_of(model)["0"], before[3:6] + 1)
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
    base, masks = weights_of(model), {"left.0": random_index(36, 12), "right.1": random_index(12, 5)}
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
    assert_same_tensors(weights_of(other), base)
    merge(model)
    assert type(model.left[0]) is nn.Linear and model.right[0] is model.left[0]
    assert same_bits(outputs(model), want)


def test_under_one_autocast_every_scoring_sees_the_current_weights():
    model, batches = random_mlp(3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        deltas = sparsify(model, select(salience(model, "grad", batches, sample_losses), 0.3, "global"))
        perturb(deltas, 1.0)
        inside = salience(model, "grad", batches, sample_losses)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = salience(model, "grad", batches, sample_losses)
    assert_same_tensors(inside, outside)


def test_after_scoring_the_same_autocast_sees_changed_weights():
    model, batches = random_mlp(3, torch.float32)
    losses = {}
    for scored in (False, True):
        twin = copy.deepcopy(model)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            if scored:
                salience(twin, "grad", batches, sample_losses)
            for p in twin.parameters():
                p.mul_(3)
            losses[scored] = sample_losses(twin, batches[0])
    assert same_bits(losses[True], losses[False])
