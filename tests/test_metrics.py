"""The metrics other than SynFlow, against the paper's formulas on `torch.func` and on loops over samples."""

import collections
import dataclasses
import functools
import math

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

from helpers import (
    ALL, GPT_STYLES, NEEDS_DATA, assert_same_tensors, gpt_losses, gpt_mean_loss, linears, mean_loss,
    random_gpt, random_mlp, sample_losses)  # fmt: skip
from oracles import assert_close, func_oracle, join, joint_losses, loop_oracle, split
from speft import METRICS, salience, select


# --- the metrics that need data -------------------------------------------------------------------------


def test_the_metrics_are_the_nine():
    assert set(METRICS) == set(ALL)


@functools.cache
def mlp_oracle(metric, seed):
    model, batches = random_mlp(seed)
    return func_oracle(metric, model, batches, sample_losses)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("metric", ("magnitude", *NEEDS_DATA))
def test_mlp_agrees_with_torch_func(metric, seed):
    model, batches = random_mlp(seed)
    assert_close(salience(model, metric, batches, sample_losses), mlp_oracle(metric, seed))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("metric", ("magnitude", *NEEDS_DATA))
def test_float32_mlp_agrees_with_the_float64_oracle(metric, seed):
    model, batches = random_mlp(seed)
    model, batches = model.float(), [tuple(t.float() for t in batch) for batch in batches]
    scores = salience(model, metric, batches, sample_losses)
    assert_close(scores, mlp_oracle(metric, seed), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("style", GPT_STYLES)
@pytest.mark.parametrize("metric", ("magnitude", *NEEDS_DATA))
def test_gpt_agrees_with_a_loop_over_samples(metric, style, seed):
    model, batches = random_gpt(style, seed)
    expected = loop_oracle(metric, model, batches, gpt_losses)
    rtol, atol = (1e-5, 1e-6) if metric == "grasp" else (1e-6, 1e-8)
    assert_close(salience(model, metric, batches, gpt_losses), expected, rtol, atol)


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_float32_gpt_agrees_with_the_float64_oracle(metric):
    model, batches = random_gpt("llama")
    expected = loop_oracle(metric, model, batches, gpt_losses)
    assert_close(salience(model.float(), metric, batches, gpt_losses), expected, rtol=1e-3, atol=1e-4)


def test_gradient_agrees_with_finite_differences():
    for seed in (0, 1, 5):  # the seeds of smooth activations
        model, batches = random_mlp(seed)
        losses, theta, weights = joint_losses(model, batches, sample_losses)
        steps = 1e-5 * torch.eye(len(theta), dtype=torch.float64)
        slopes = [(losses(theta + s).mean() - losses(theta - s).mean()) / 2e-5 for s in steps]
        scores = salience(model, "force", batches, sample_losses)
        assert_close(scores, split(-torch.stack(slopes) * theta, weights), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_losses_of_samples_and_their_mean_give_the_same(metric):
    for model, batches, losses, mean in (
        (*random_mlp(4), sample_losses, mean_loss),
        (*random_gpt("gpt2"), gpt_losses, gpt_mean_loss),
    ):
        expected = salience(model, metric, batches, losses)
        assert_close(salience(model, metric, batches, mean), expected)


@pytest.mark.parametrize("metric", NEEDS_DATA)
@pytest.mark.parametrize("loss_fn", (sample_losses, mean_loss))
def test_the_split_into_batches_does_not_matter(metric, loss_fn):
    model, batches = random_mlp(7)
    whole = [tuple(torch.cat(tensors) for tensors in zip(*batches))]
    singles = [tuple(t[i : i + 1] for t in whole[0]) for i in range(len(whole[0][0]))]
    expected = salience(model, metric, whole, loss_fn)
    assert_close(salience(model, metric, batches, loss_fn), expected)
    assert_close(salience(model, metric, singles, loss_fn), expected)


@pytest.mark.parametrize("metric", (*NEEDS_DATA, "synflow"))
def test_batches_may_be_a_generator(metric):
    model, batches = random_mlp(2)
    expected = salience(model, metric, batches, sample_losses)
    assert_same_tensors(salience(model, metric, (batch for batch in batches), sample_losses), expected)


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_a_layer_that_the_loss_does_not_use_scores_zero(metric):
    model, batches = random_mlp(5)
    pair = nn.ModuleDict({"used": model, "unused": nn.Linear(3, 2).double()})
    used_losses = lambda pair, batch: sample_losses(pair["used"], batch)  # noqa: E731
    scores = salience(pair, metric, batches, used_losses)
    unused = scores.pop("unused")
    assert unused.shape == (2, 3) and not unused.any()
    assert_close(scores, {f"used.{name}": score for name, score in mlp_oracle(metric, 5).items()})


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_scoring_runs_in_eval_mode(metric):
    model, batches = random_mlp(0)
    model.append(nn.BatchNorm1d(batches[0][1].size(1)).double())
    model.append(nn.Dropout(0.9))
    with torch.no_grad():
        for buffer in (model[-2].running_mean, model[-2].running_var):
            buffer.uniform_(1, 2)
    scores = salience(model.train(), metric, batches, sample_losses)
    assert_close(scores, func_oracle(metric, model, batches, sample_losses))


# --- GRaSP and Fisher -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_fn", (lambda m, b: m(b[0]).sum(1), lambda m, b: m(b[0]).sum(1).mean()))
def test_grasp_is_zero_for_a_loss_linear_in_the_weights(loss_fn):
    torch.manual_seed(0)
    scores = salience(nn.Linear(3, 2), "grasp", [(torch.randn(4, 3),), (torch.randn(1, 3),)], loss_fn)
    assert list(scores) == [""] and scores[""].shape == (2, 3) and not scores[""].any()


class Branches(nn.Module):
    """The output is linear in `straight`, and so is a loss that sums it; in `bent` it is not."""

    def __init__(self):
        super().__init__()
        self.straight, self.bent = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.straight(x) + self.bent(x).tanh()


def test_grasp_where_one_layer_has_no_second_derivative():
    torch.manual_seed(0)
    model, batches = Branches().double(), [(torch.randn(n, 3, dtype=torch.float64),) for n in (2, 3)]
    loss_fn = lambda m, batch: m(batch[0]).sum(1)  # noqa: E731
    scores = salience(model, "grasp", batches, loss_fn)
    assert not scores["straight"].any() and scores["bent"].any()
    assert_close(scores, func_oracle("grasp", model, batches, loss_fn))


@pytest.mark.parametrize("seed", range(3))
def test_grasp_takes_the_hessian_of_the_chosen_layers_only(seed):
    model, batches = random_mlp(seed)
    names = list(linears(model))[::2]
    scores = salience(model, "grasp", batches, sample_losses, layers=names.__contains__)
    assert_close(scores, func_oracle("grasp", model, batches, sample_losses, names))
    everything = mlp_oracle("grasp", seed)
    assert any(not torch.allclose(scores[name].double(), everything[name], rtol=1e-2) for name in names)


class Twice(nn.Module):
    """One layer at two places of a pass."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(self.fc(x).tanh())


class SequenceFirst(nn.Module):
    """The linear layers see (T, B, d)."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc2(self.fc1(x.transpose(0, 1)).tanh()).transpose(0, 1)


class Flattened(SequenceFirst):
    """The linear layers see (B * T, d)."""

    def forward(self, x):
        return self.fc2(self.fc1(x.reshape(-1, 3)).tanh()).view_as(x)


class Bypassed(SequenceFirst):
    """The weight is used, the module is not called."""

    def forward(self, x):
        return self.fc2((x @ self.fc1.weight.T).tanh())


class Keywords(SequenceFirst):
    """F.linear as it may be called: without a bias, or by keyword."""

    def forward(self, x):
        return F.linear(F.linear(x, self.fc1.weight).tanh(), weight=self.fc2.weight, bias=self.fc2.bias)


class Pooled(SequenceFirst):
    """The linear layers see (B, d)."""

    def forward(self, x):
        return self.fc2(self.fc1(x.sum(1)).tanh())[:, None].expand_as(x)


class Encoder(nn.Module):
    """PyTorch's own sequence-first encoder layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.3)
        self.fc = nn.Linear(3, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.layer(self.fc(x).transpose(0, 1))).transpose(0, 1)


@pytest.mark.parametrize("sizes", ((3, 2, 1), (2, 2)))
@pytest.mark.parametrize("make", (Twice, SequenceFirst, Flattened, Bypassed, Keywords, Pooled, Encoder))
@pytest.mark.parametrize("loss_fn", (sample_losses, mean_loss))
@pytest.mark.parametrize("metric", ("grad", "grasp", "fisher"))
def test_a_network_may_use_its_weights_in_any_way(make, loss_fn, metric, sizes):
    """Two positions a sample: in a batch of two, the shape does not tell samples from positions."""
    torch.manual_seed(0)
    model = make().double()
    batches = [tuple(torch.randn(2, size, 2, 3, dtype=torch.float64)) for size in sizes]
    expected = loop_oracle(metric, model, batches, sample_losses)
    rtol, atol = (1e-5, 1e-6) if metric == "grasp" else (1e-6, 1e-8)
    assert_close(salience(model, metric, batches, loss_fn), expected, rtol, atol)


@pytest.mark.parametrize("make", (Pooled, Flattened))
@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_a_penalty_on_the_weights_in_the_loss_counts(metric, make):
    torch.manual_seed(0)
    model = make().double()
    batches = [tuple(torch.randn(2, size, 2, 3, dtype=torch.float64)) for size in (3, 2)]
    penalised = lambda m, batch: sample_losses(m, batch) + 0.3 * m.fc1.weight.square().sum()  # noqa: E731
    expected = loop_oracle(metric, model, batches, penalised)
    assert_close(salience(model, metric, batches, penalised), expected, rtol=1e-5, atol=1e-6)


# --- what a batch is ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


Named = collections.namedtuple("Named", "x y")
NESTED = {  # a batch -> the same in other containers
    "a tuple in a list": lambda x, y: [(x, y)],
    "a dict in a tuple": lambda x, y: ({"x": x}, {"y": y}),
    "a library's mapping in a tuple": lambda x, y: (collections.UserDict(x=x), "name", y),
    "a library's mapping in its own": lambda x, y: collections.UserDict(a=collections.UserDict(x=x, y=[y])),
    "a library's mapping in a named tuple": lambda x, y: Named(collections.UserDict(x=x), y),
    "a dataclass in a list": lambda x, y: [None, Pair(x, y)],
}


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Pair):
        value = {"x": value.x, "y": value.y}
    parts = value.values() if hasattr(value, "values") else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


@pytest.mark.parametrize("loss_fn", (sample_losses, mean_loss))
@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_a_batch_may_be_nested_as_it_likes(metric, kind, loss_fn):
    model, batches = random_mlp(1)
    nested = [NESTED[kind](*batch) for batch in batches]
    scores = salience(model, metric, nested, lambda m, batch: loss_fn(m, tensors_in(batch)))
    assert_same_tensors(scores, salience(model, metric, batches, loss_fn))


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_what_is_no_sample_is_passed_on_or_refused(metric):
    """Fisher, which takes batches apart, would take class weights apart as well."""
    model, batches = random_mlp(1)
    width = batches[0][1].size(1)
    for scale in (torch.arange(1.0, 1 + width, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)):
        weighted = lambda m, batch: ((m(batch[0]) - batch[1]) ** 2 * scale).mean(1)  # noqa: E731
        with_scale = lambda m, batch: ((m(batch[0]) - batch[1]) ** 2 * batch[2]).mean(1)  # noqa: E731
        more = [(*batch, scale) for batch in batches]
        if metric == "fisher":
            with pytest.raises(ValueError, match="fisher splits batches into samples"):
                salience(model, metric, more, with_scale)
        else:
            expected = salience(model, metric, batches, weighted)
            assert_same_tensors(salience(model, metric, more, with_scale), expected)


# --- SNIP and Taylor rank alike -------------------------------------------------------------------------


def assert_same_masks(model, batches, loss_fn):
    snip = salience(model, "snip", batches, loss_fn)
    taylor = salience(model, "taylor", batches, loss_fn)
    for scope in ("global", "local"):
        for density in (0.02, 0.1, 0.25, 0.5, 0.77, 1.0):
            assert_same_tensors(select(taylor, density, scope), select(snip, density, scope))


@pytest.mark.parametrize("scale", (1.0, 1e-4, 1e-9, 1e-15, 1e-20, 1e-30))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_snip_and_taylor_give_the_same_mask(dtype, scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 8)).to(dtype)
    batches = [(torch.randn(n, 12, dtype=dtype), torch.randn(n, 8, dtype=dtype)) for n in (5, 3)]
    assert_same_masks(model, batches, lambda m, batch: scale * sample_losses(m, batch))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_snip_and_taylor_break_ties_alike(dtype, seed):
    """Few distinct values and a sprinkling of float64 noise below float32's resolution: ties in abundance."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).double()
    for parameter in model.parameters():
        noise = torch.randint(-2, 3, parameter.shape) * 1e-9
        parameter.data = torch.randint(-2, 3, parameter.shape) * 0.3 + noise
    batches = [tuple(torch.randint(-1, 2, (n, width)).to(dtype) for width in (6, 4)) for n in (3, 4)]
    assert_same_masks(model.to(dtype), batches, sample_losses)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_snip_and_taylor_agree_where_products_differ_by_less_than_float32_can_tell(dtype):
    """Every product within a few units in the last place: their squares must not rank what SNIP ties."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Linear(30, 20, bias=False)
        nn.init.uniform_(model.weight, 0.3, 0.3 * (1 + 1e-6))
        model.to(dtype)
        if dtype == torch.float64:
            model.weight.data *= 1 + 1e-7 * torch.rand(20, 30, dtype=dtype)
        assert_same_masks(model, [(torch.full((2, 30), 0.7, dtype=dtype),)], lambda m, b: m(b[0]).sum(1))


# --- random ---------------------------------------------------------------------------------------------


def test_random_draws_anew_and_repeats_under_a_seed():
    model, batches = random_mlp(1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = salience(model, "random", batches, sample_losses)
    assert not torch.equal(torch.get_rng_state(), state)
    drawn = [first] + [salience(model, "random", batches, sample_losses) for _ in range(3)]
    numbers = [value for scores in drawn for score in scores.values() for value in score.flatten().tolist()]
    assert len(set(numbers)) == len(numbers)  # no stretch of one draw comes again in another
    torch.manual_seed(5)
    assert_same_tensors(salience(model, "random", batches, sample_losses), first)


def test_random_prefers_no_layer_and_no_weight():
    """A tenth of all weights falls on every layer in proportion, whatever its size, place and values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 100), nn.Linear(100, 100), nn.Linear(100, 20))
    model[1].weight.data *= 100
    scores = salience(model, "random", [], None)
    for name, index in select(scores, 0.1, "global").items():
        count = scores[name].numel()
        assert abs(len(index) - count / 10) < 5 * math.sqrt(count * 0.09)
        large = model.get_submodule(name).weight.abs().flatten()
        assert abs((large[index] > large.median()).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(len(index))
