"""Other people's modules, batches, wrappers and loops: what `speft` does is right, or refused by name."""

import copy
import functools
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.utils.prune
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import baselines
from helpers import (
    ALL, DETERMINISTIC, LAYERS, NEEDS_DATA, assert_near, assert_same_adapters,
    assert_same_tensors, corrected, mlp, outputs, perturb, probe, random_index, random_masks, random_mlp,
    sample_losses, same_bits, scramble, train_steps, trained_mlp)  # fmt: skip
from oracles import assert_close
from speft import (
    SparseLinear, adapter, linear_layers, load_adapter, merge, remask, salience, select,
    sparsify)  # fmt: skip

def fails(match, model, metric, batches, **settings):
    with pytest.raises(ValueError, match=match):
        salience(model, metric, batches, sample_losses, **settings)


def adam_steps(model, deltas, x):
    optimizer = torch.optim.AdamW(deltas, lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


# --- parents that read the weight themselves ------------------------------------------------------------


def encoder(seed=0):
    """In eval mode, where nothing requires a gradient, it reads its layers' weights and calls no layer."""
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def encoder_masks(model):
    return {name: random_index(module.weight.numel(), 20) for name, module in linear_layers(model).items()}


CHANGES = {
    "load_adapter": lambda model, deltas: load_adapter(model, changed(adapter(model))),
    "an optimizer step": lambda model, deltas: adam_steps(model, deltas, torch.randn(3, 4, 8)),
    "remask": lambda model, deltas: perturb(remask(model, encoder_masks(model))),
    "in place": lambda model, deltas: perturb(deltas),
}


def changed(state):
    return {name: (index, values + 0.5, shape) for name, (index, values, shape) in state.items()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", (torch.no_grad, torch.enable_grad))
def test_an_encoders_fast_path_sees_the_weight_at_once(mode, change):
    model, x = encoder(), torch.randn(3, 4, 8)
    deltas = sparsify(model, encoder_masks(model))
    perturb(deltas)
    before = model.eval()(x).detach()
    CHANGES[change](model.train(), deltas)
    dense = encoder()
    for name, (index, values, _) in adapter(model).items():
        weight = dense.get_submodule(name).weight
        weight.data = corrected(weight.data, index, values)
    with mode():
        found = model.eval()(x)
    assert (found - before).abs().max() > 0.01
    with torch.no_grad():
        assert same_bits(found, dense.eval()(x))
        assert same_bits(found, merge(model).eval()(x))


def test_attention_modules_are_left_out():
    """They read the weight of `out_proj` themselves, which would never be trained."""
    names = [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    assert list(linear_layers(encoder())) == names
    fails("no nn.Linear.*MultiheadAttention", nn.Sequential(nn.MultiheadAttention(4, 2)), "magnitude", [])


# --- checkpointing --------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Layers of which the second runs twice, in segments whose activations are computed again, or not."""

    def __init__(self, start, how=None):
        super().__init__()
        torch.manual_seed(0)
        self.start, self.block, self.end = start, nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)
        self.how = how

    def segment(self, x):
        return self.block(x) if self.how is None else checkpoint(self.block, x, use_reentrant=self.how)

    def forward(self, x):
        return self.end(self.segment(self.segment(self.start(x)))).flatten(1)


@pytest.mark.parametrize("how", (False, True), ids=("non-reentrant", "reentrant"))
@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_checkpointed_layers_score_as_if_they_were_not(metric, how):
    model = Checkpointed(nn.Linear(2, 4))
    batches = [(torch.randn(n, 2), torch.randn(n, 3)) for n in (3, 2)]
    expected = salience(model, metric, batches, sample_losses)
    model.how = how
    if how and metric == "grasp":  # PyTorch's own refusal
        with pytest.raises(RuntimeError, match="use_reentrant=True"):
            salience(model, metric, batches, sample_losses)
    else:
        assert_close(salience(model, metric, batches, sample_losses), expected, rtol=1e-5)


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_a_reentrant_checkpoint_without_a_gradient_is_refused(metric):
    """Its input is a frozen embedding's: the layers in it would score zero."""
    model = Checkpointed(nn.Embedding(5, 4))
    batches = [(torch.randint(5, (n, 1)), torch.randn(n, 3)) for n in (3, 2)]
    expected = salience(model, metric, batches, sample_losses)
    model.how = False
    assert_same_tensors(salience(model, metric, batches, sample_losses), expected)
    model.how = True
    fails("None of the inputs.*checkpoints: use_reentrant=False", model, metric, batches)


def test_a_warning_that_is_an_error_is_told_as_it_is():
    model, batches = random_mlp(1)

    def warn(model, batch):
        warnings.warn("the model is old", UserWarning)
        return sample_losses(model, batch)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="stopped by a warning: the model is old") as raised:
            salience(model, "grad", batches, warn)
    assert isinstance(raised.value.__cause__, UserWarning)


# --- which layers ---------------------------------------------------------------------------------------


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


COMPUTED = {
    "spectral norm, old": nn.utils.spectral_norm,
    "weight norm, old": old_weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("used", (False, True))
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_weight_is_left_out_and_the_rest_is_right(kind, used):
    torch.manual_seed(0)
    model, x = nn.Sequential(COMPUTED[kind](nn.Linear(4, 4)), nn.Linear(4, 4)).eval(), torch.randn(3, 4)
    before = model(x).detach() if used else None
    assert list(linear_layers(model)) == ["1"]
    with pytest.raises(ValueError, match="no linear layer '0'"):
        sparsify(model, {"0": torch.tensor([1])})
    sparsify(model, {"1": torch.tensor([1, 5])})
    if used:
        assert same_bits(model(x).detach(), before)


class Scaled(nn.Module):
    def forward(self, trained):
        return 3 * trained


def test_a_sparse_layer_whose_delta_is_computed_is_in_the_adapter():
    model, _ = trained_mlp(steps=0)
    nn.utils.parametrize.register_parametrization(model[0], "delta", Scaled())
    train_steps(model, [model[0].parametrizations.delta.original], 2, seed=0)
    other = mlp()
    load_adapter(other, adapter(model))
    assert list(adapter(model)) == list(LAYERS) and adapter(model)["0"][1].any()
    assert same_bits(outputs(other), outputs(model))


def with_weight(weight):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def empty(*sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return nn.Linear(*sizes)


def patched(layer):
    """As accelerate's hooks do: what the layer computes is no longer what its type says."""
    layer.forward = functools.partial(nn.Linear.forward, layer)
    return layer


def test_a_sparse_layer_that_is_patched_stays_one():
    model, deltas = trained_mlp(steps=2)
    want = adapter(model)
    patched(model[0])
    assert_same_adapters(adapter(model), want)
    assert not any(isinstance(layer, SparseLinear) for layer in merge(model))


UNFIT = {
    "int8": lambda: with_weight(torch.zeros(4, 4, dtype=torch.int8)),
    "complex": lambda: with_weight(torch.zeros(4, 4, dtype=torch.complex64)),
    "float8": lambda: with_weight(torch.zeros(4, 4).to(torch.float8_e4m3fn)),
    "no inputs": lambda: empty(0, 4),
    "no outputs": lambda: empty(4, 0),
    "another forward": lambda: patched(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_weights_that_cannot_be_trained_are_left_out(kind):
    model = nn.ModuleList((UNFIT[kind](), nn.Linear(4, 4), UNFIT[kind]()))
    assert list(linear_layers(model)) == ["1"]
    alone = nn.ModuleList((UNFIT[kind](),))
    fails("no nn.Linear.*Linear", alone, "magnitude", [])
    assert list(select(salience(model, "magnitude", [], None), 0.5, "global")) == ["1"]


def test_a_lazy_layer_has_to_be_initialised_first():
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="uninitialized"):
        linear_layers(model)
    model(torch.randn(2, 4))
    assert list(linear_layers(model)) == ["0", "2"]


class Special(nn.Linear):
    pass


def test_layers_is_a_predicate_and_the_message_names_what_there_is():
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1), Special(2, 2))
    assert list(salience(model, "magnitude", [], None, layers=lambda name: name == "0")) == ["0"]
    fails("no nn.Linear.*Special", model[1:], "magnitude", [])
    fails("no nn.Linear.*Conv1d", model[1:], "magnitude", [])


# --- wrappers -------------------------------------------------------------------------------------------

BACKENDS = ("eager", "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ("whole", "first"))
def test_a_compiled_models_names_are_the_plain_ones(part, backend):
    torch._dynamo.reset()
    model, batches = random_mlp(1)
    plain = copy.deepcopy(model)
    if part == "first":
        model[0] = torch.compile(model[0], backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    for metric in ("grad", "fisher", "synflow", *["grasp"] * (backend == "eager")):  # AOT derives only once
        expected = salience(plain, metric, batches, sample_losses)
        assert_close(salience(model, metric, batches, sample_losses), expected, rtol=1e-9, atol=1e-12)
    indices = select(salience(model, "grad", batches, sample_losses), 0.3, "global")
    deltas = sparsify(model, indices)
    perturb(deltas)
    load_adapter(plain, adapter(model))
    x = batches[0][0]
    torch.testing.assert_close(model(x), plain(x))
    model(x).sum().backward()
    plain(x).sum().backward()
    for name in indices:
        if len(indices[name]):
            compiled = linear_layers(model)[name].delta.grad
            torch.testing.assert_close(compiled, plain.get_submodule(name).delta.grad)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel_wraps_a_sparse_model(one_process):
    model, twin = (trained_mlp(steps=0)[0] for _ in range(2))
    sparsify(model, {"0": torch.empty(0, dtype=torch.int64)})  # which has no delta to wait for
    sparsify(twin, {"0": torch.empty(0, dtype=torch.int64)})
    for each in (model, twin):
        remask(each, {name: torch.arange(4) for name in LAYERS})
    wrapped = nn.parallel.DistributedDataParallel(model)
    for each, called in ((model, wrapped), (twin, twin)):
        deltas = [module.delta for module in linear_layers(each).values()]
        adam_steps(called, deltas, probe(torch.float32))
    assert_same_adapters(adapter(model), adapter(twin))


def test_an_average_of_copies_has_the_average_correction():
    model, deltas = trained_mlp()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)  # the first is taken as it is
    first = [delta.detach().clone() for delta in deltas]
    train_steps(model, deltas, 3, seed=7)
    average.update_parameters(model)
    expected = copy.deepcopy(model)
    for delta, old, new in zip((expected[int(i)].delta for i in LAYERS), first, deltas):
        delta.data.copy_((old + new.detach()) / 2)
    torch.testing.assert_close(outputs(average.module), outputs(expected))
    assert (outputs(model) - outputs(expected)).abs().max() > 1e-3


def test_functional_call_puts_other_corrections_in_place_for_one_call():
    model, _ = trained_mlp()
    other = copy.deepcopy(model)
    perturb([other[0].delta])
    before, x = outputs(model), probe(torch.float32)
    with torch.no_grad():
        found = torch.func.functional_call(model, {"0.delta": other[0].delta.detach()}, x)
    assert same_bits(found, outputs(other)) and not torch.equal(found, before)
    assert same_bits(outputs(model), before)


@pytest.mark.parametrize("way", ("pickle", "torch.save"))
def test_a_pickled_model_trains_on_alike(way):
    model, deltas = trained_mlp()
    remask(model, random_masks(model))
    if way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    for each in (model, other):
        train_steps(each, [each.get_submodule(name).delta for name in LAYERS], 2, seed=3)
    assert same_bits(outputs(other), outputs(model))
    assert_same_adapters(adapter(other), adapter(model))


def test_a_gradient_scaler_changes_nothing_but_the_range():
    model, deltas = trained_mlp(steps=0)
    other, others = trained_mlp(steps=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for each, trained in ((model, deltas), (other, others)):
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = each(probe(torch.float32)).square().mean()
            if each is model:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
    for a, b in zip(deltas, others):
        assert_near(a.detach(), b.detach(), torch.bfloat16)


# --- batches and losses ---------------------------------------------------------------------------------


class Named(nn.Module):
    """Takes its input by name and returns a dict, as the models of transformers do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y=None):
        return {"loss": None if y is None else (self.model(x) - y).square().mean(1), "out": self.model(x)}


class Encoding(dict):
    """A mapping of a type of its own."""


@pytest.mark.parametrize("kind", (dict, Encoding))
@pytest.mark.parametrize("metric", ALL)
def test_batches_may_be_dicts(metric, kind):
    model, batches = random_mlp(3)
    torch.manual_seed(0)
    expected = salience(model, metric, batches, sample_losses)
    torch.manual_seed(0)
    named = [kind(x=x, y=y) for x, y in batches]
    scores = salience(Named(model), metric, named, lambda m, batch: m(**batch)["loss"])
    assert_same_tensors(scores, {f"model.{name}": score for name, score in expected.items()})


@pytest.mark.parametrize("metric", DETERMINISTIC)
def test_batches_may_be_lists_bare_tensors_or_a_data_loader(metric):
    model, batches = random_mlp(3)
    x, y = (torch.cat(part) for part in zip(*batches))
    tuples = list(zip(x.split(4), y.split(4)))
    found = {"tuples": salience(model, metric, tuples, sample_losses)}
    for given in (map(list, tuples), DataLoader(TensorDataset(x, y), batch_size=4)):
        assert_same_tensors(salience(model, metric, given, sample_losses), found["tuples"])
    losses = {"tuple": lambda m, b: m(b[0]).square().mean(1), "bare": lambda m, b: m(b).square().mean(1)}
    for way, batch in (("tuple", (x,)), ("bare", x)):
        found[way] = salience(model, metric, [batch], losses[way])
    assert_same_tensors(found["bare"], found["tuple"])


@pytest.mark.parametrize("metric", (*NEEDS_DATA, "synflow"))
@pytest.mark.parametrize("batch", ((), {}, ("text",)))
def test_a_batch_without_tensors_is_named(batch, metric):
    model, _ = random_mlp(1)
    fails("needs data, and `batches` holds no tensors", model, metric, [batch])


SHAPES = {"(B, T)": lambda size: (size, 5), "(B, 1)": lambda size: (size, 1),
          "(1, B)": lambda size: (1, size), "(B + 1,)": lambda size: (size + 1,)}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_a_loss_of_another_shape_is_refused(metric, shape):
    """The sum over (B, T) would be T times the gradient."""

    def loss_fn(model, batch):
        return model(batch[0]).sum() * torch.ones(SHAPES[shape](len(batch[0])))

    with pytest.raises(ValueError, match="loss_fn: shape .* is not that of . losses or their mean"):
        salience(nn.Linear(3, 2), metric, [(torch.randn(2, 3),)], loss_fn)


# --- what else writes into a sparse layer, and when -----------------------------------------------------


@pytest.mark.parametrize("strict", (True, False))
def test_a_base_is_not_loaded_into_a_sparse_model(strict):
    model, _ = trained_mlp()
    before = outputs(model)
    with pytest.raises(ValueError, match="layer '0' is sparse: `merge` before loading"):
        model.load_state_dict(mlp(seed=5).state_dict(), strict=strict)
    assert same_bits(outputs(model), before)
    merge(model).load_state_dict(mlp(seed=5).state_dict(), strict=strict)
    assert same_bits(outputs(model), outputs(mlp(seed=5)))


def test_other_layers_and_corrections_alone_are_loaded():
    model, _ = trained_mlp()
    other, _ = trained_mlp(seed=1)
    state = {name: tensor for name, tensor in other.state_dict().items() if name.startswith("2.")}
    state |= {"0.delta": torch.ones_like(model[0].delta)}
    model.load_state_dict(state, strict=False)
    assert torch.equal(model[2].weight, other[2].weight) and (model[0].delta == 1).all()
    want = corrected(mlp()[0].weight.detach(), model[0].index, model[0].delta.detach())
    assert same_bits(model[0].weight.detach(), want)


@pytest.mark.parametrize("foreach", (False, True))
@pytest.mark.parametrize("sparse", (False, True))
def test_a_backward_pass_after_a_step_is_refused_as_a_linear_layers_is(sparse, foreach):
    torch.manual_seed(0)
    model = mlp()
    deltas = sparsify(model, random_masks(model)) if sparse else [model[i].weight for i in (0, 3, 5)]
    optimizer = torch.optim.AdamW(deltas, foreach=foreach)
    loss = model(probe(torch.float32)).square().sum()
    for delta in deltas:
        delta.grad = torch.randn_like(delta)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_reading_between_forward_and_backward_is_no_change():
    model, deltas = trained_mlp()
    other, others = trained_mlp()
    for each in (model, other):
        each.zero_grad()
        loss = each(probe(torch.float32)).square().sum()
        if each is model:
            model.state_dict(), adapter(model), model[0].weight, outputs(model)
        loss.backward()
    for a, b in zip(deltas, others):
        assert same_bits(a.grad, b.grad)


def test_running_statistics_drift_in_training_mode_and_are_in_no_adapter():
    """As the README says: who wants them frozen keeps those modules in eval mode."""
    torch.manual_seed(0)
    model = scramble(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    (delta,) = sparsify(model, {"0": torch.arange(5)})
    for training in (False, True):
        model[1].train(training)
        before = model[1].running_mean.clone()
        model(torch.randn(8, 4)).sum().backward()
        assert torch.equal(model[1].running_mean, before) != training
    assert list(adapter(model)) == ["0"]
    assert "BatchNorm" in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


# --- what it costs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, original", ((torch.float32, 4), (torch.bfloat16, 2)))
def test_a_trained_entry_takes_less_than_37_bytes(dtype, original):
    """Delta, its gradient and Adam's two moments take 16; where it stands, its base and its plan take 20."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024, dtype=dtype))
    index = random_index(1024 * 1024, 10486)
    (delta,) = sparsify(model, {"0": index})
    optimizer = torch.optim.AdamW([delta])
    model(torch.randn(2, 1024).to(dtype)).sum().backward()
    optimizer.step()
    layer = model[0]
    held = [delta, delta.grad, *layer.buffers(), *optimizer.state[delta].values(), *layer.planned]
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if torch.is_tensor(t)}
    assert 32 + original < sum(own.values()) / len(index) < 33 + original


class Operations(TorchDispatchMode):
    """Counts what is computed or copied: views are not."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask, most", (("random", 7.5), ("columns", 8.5), ("rows", 11.5)))
def test_a_layer_takes_few_operations_beside_lora(mask, most):
    """Frozen it takes 2.3; the original and delta are added and written in two, accumulating takes one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(10)))
    low_rank, x = copy.deepcopy(model), torch.randn(4, 8, 256)
    index = {"random": random_index(65536, 655), "columns": torch.arange(256) * 256 + 7,
             "rows": torch.arange(512)}[mask]  # fmt: skip
    sparsify(model, {str(i): index for i in range(10)})
    baselines.lora(low_rank, [], 0.01)
    taken = []
    for each in (model, low_rank):
        each(x).sum().backward()
        with Operations() as operations:
            each(x).sum().backward()
        taken.append(operations.count / len(each))
    assert taken[0] <= most < taken[1]
