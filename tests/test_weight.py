"""A sparse layer's weight is right, bit for bit: however delta changed, in copies, casts and state dicts."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import vector_to_parameters

from helpers import (
    DTYPES, LAYERS, after_steps, assert_same_adapters, assert_same_tensors, corrected, linears, mlp, outputs,
    perturb, probe, random_masks, same_bits, train_steps, trained_mlp, weights_of)  # fmt: skip
from speft import adapter, load_adapter, merge, remask, salience, sparsify


# --- the weight is right however delta was changed ------------------------------------------------------


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
    return model, weights_of(model)


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
        assert torch.equal(scores[name], want.abs())


@pytest.mark.parametrize("change", CHANGES)
def test_taking_an_adapter_off_restores_the_base_after_any_change_of_delta(change):
    model = mlp()
    base = weights_of(model)
    deltas = sparsify(model, random_masks(model))
    outputs(model)
    CHANGES[change](deltas)
    load_adapter(model, {})
    assert_same_tensors(weights_of(model), base)


# --- copies, casts, checkpoints -------------------------------------------------------------------------


def after_a_remask(model, masks):
    after_steps(model, masks)
    remask(model, masks)
    after_steps(model, masks)


STAGES = {"fresh": lambda model, masks: None, "after steps": after_steps, "after a remask": after_a_remask}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_deep_copy_is_independent_and_trains_on_alike(dtype, stage):
    model = mlp(dtype)
    base, masks = weights_of(model), random_masks(model)
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
    assert_same_tensors(weights_of(twin), base)
    assert not torch.equal(outputs(model), outputs(twin))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", ["untrained", "other base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_dict_round_trip(dtype, target, assign):
    model = mlp(dtype)
    base, masks = weights_of(model), random_masks(model)
    deltas = sparsify(model, masks)
    train_steps(model, deltas, 3, seed=0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {"0.weight", "0.known", "0.original", "0.delta"} <= set(state)

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
    assert_same_tensors(weights_of(other), base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_dict_round_trip_between_models_of_the_same_masks(dtype):
    model, other = mlp(dtype), mlp(dtype, seed=5)
    base = weights_of(model)
    masks = [random_masks(model), random_masks(model, layers=("0", "3"))]
    for m in (model, other):
        perturb(sparsify(m, masks[0]))
        perturb(remask(m, masks[1]))
    other.load_state_dict(model.state_dict())
    assert same_bits(outputs(other), outputs(model))
    assert_same_adapters(adapter(other), adapter(model))
    load_adapter(other, {})
    assert_same_tensors(weights_of(other), base)


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
    assert convert(model) is model and all(convert(layer) is layer for layer in linears(model).values())
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
    stored, expected = dict(model.named_parameters()), dict(other.named_parameters())
    for name in LAYERS:  # also for who takes the parameter, not the layer's weight
        assert same_bits(stored[f"{name}.weight"].detach(), expected[f"{name}.weight"].detach())
    assert_same_tensors(weights_of(model), weights_of(other))
    assert same_bits(outputs(model), outputs(other))
    remask(model, random_masks(model))
    assert same_bits(outputs(model), outputs(other))
    load_adapter(model, {})
    assert_same_tensors(weights_of(model), weights_of(base))


# --- functional calls and flags ------------------------------------------------------------------------


def test_functional_call_trains_by_all_parameters_as_the_module_does():
    model, deltas = trained_mlp()
    twin, (x, y) = copy.deepcopy(model), (probe(torch.float32), outputs(mlp(seed=9)))
    given = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    names = [name for name in given if name.endswith("delta")]
    optimizer = torch.optim.SGD(deltas, lr=0.3)
    for _ in range(4):
        loss = (torch.func.functional_call(twin, given, x) - y).square().mean()
        for name, slope in zip(names, torch.autograd.grad(loss, [given[name] for name in names])):
            given[name] = (given[name] - 0.3 * slope).detach().requires_grad_()
        optimizer.zero_grad()
        expected = (model(x) - y).square().mean()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected)


def test_functional_call_writes_into_nothing_that_it_is_given():
    """Not into another model's weights, nor into those that a second call shares before the backward pass."""
    base, (model, _) = mlp(), trained_mlp()
    before, x = outputs(base), probe(torch.float32)
    found = torch.func.functional_call(model, base.state_dict(), x)
    assert same_bits(outputs(base), before) and same_bits(found, outputs(model))
    weights = {name: value for name, value in base.state_dict().items() if value.dim() == 2}
    transposed = {name: value.T.contiguous().T for name, value in weights.items()}
    assert same_bits(torch.func.functional_call(model, transposed, x), outputs(model))


@pytest.mark.parametrize("masks", (1, 2))
def test_two_calls_that_share_weights_have_the_gradients_of_two_models(masks):
    model, _ = trained_mlp()
    if masks == 2:
        perturb(remask(model, random_masks(model)))
    twins, x = (copy.deepcopy(model), copy.deepcopy(model)), probe(torch.float32)
    for twin, shift in zip(twins, (0.0, 0.5)):
        for name, p in twin.named_parameters():
            p.data += shift * name.endswith("delta")
    deltas = [{n: p for n, p in twin.named_parameters() if n.endswith("delta")} for twin in twins]
    corrections = [{n: p.detach().clone().requires_grad_() for n, p in own.items()} for own in deltas]
    weights = {n: p.detach() for n, p in model.named_parameters() if "delta" not in n}
    for given in ({}, weights):  # the module's own weights, and others
        first, second = (torch.func.functional_call(model, given | own, x) for own in corrections)
        wanted = [p for own in corrections for p in own.values()]
        found = torch.autograd.grad((first - second).square().mean(), wanted)
        loss = (twins[0](x) - twins[1](x)).square().mean()
        expected = torch.autograd.grad(loss, [p for own in deltas for p in own.values()])
        assert all(e.abs().max() > 0 for e in expected)
        torch.testing.assert_close(found, expected)


def test_given_weights_have_their_gradients_but_where_a_correction_stands():
    model, x = trained_mlp()[0].requires_grad_(False), probe(torch.float32)
    name, plain = f"{LAYERS[0]}.weight", merge(copy.deepcopy(model))
    given = dict(plain.named_parameters())[name].detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(torch.func.functional_call(model, {name: given}, x).square().sum(), given)
    weight = dict(plain.named_parameters())[name].requires_grad_()
    (expected,) = torch.autograd.grad(plain(x).square().sum(), weight)
    expected.view(-1)[adapter(model)[LAYERS[0]][0]] = 0
    torch.testing.assert_close(found, expected)
    assert (found != 0).any()


def test_gradcheck_takes_corrections_in_float64():
    model, _ = trained_mlp()
    given = {name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()}
    names = [name for name in given if name.endswith("delta")]

    def output(*corrections):
        other = given | dict(zip(names, corrections))
        return torch.func.functional_call(model, other, probe(torch.float64)[:2])

    assert torch.autograd.gradcheck(output, [given[name].requires_grad_() for name in names])


def test_an_ensemble_under_vmap_has_each_members_outputs():
    members = [trained_mlp()[0] for _ in range(3)]
    for member, shift in zip(members, (0.0, 0.3, -0.2)):
        for name, p in member.named_parameters():
            p.data += shift * name.endswith("delta")
    stacked = torch.func.stack_module_state(members)

    def call(params, buffers, x):
        return torch.func.functional_call(members[0], (params, buffers), (x,))

    with torch.no_grad():
        found = torch.vmap(call, in_dims=(0, 0, None))(*stacked, probe(torch.float32))
    torch.testing.assert_close(found, torch.stack([outputs(member) for member in members]))


def test_a_model_that_is_unfrozen_as_a_whole_trains_on_alike():
    model, deltas = trained_mlp()
    twin = copy.deepcopy(model)
    model.requires_grad_(False)
    model.requires_grad_(True)  # as code does that trains two models in turn
    train_steps(model, deltas, 3, seed=5)
    train_steps(twin, [twin[int(n)].delta for n in LAYERS], 3, seed=5)
    assert same_bits(outputs(model), outputs(twin))
