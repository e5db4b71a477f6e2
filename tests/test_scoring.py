"""`speft.salience`, whatever the metric: which layers, what comes back, what is left behind and refused."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn as nn

from helpers import (
    ALL, DETERMINISTIC, FIRST_ORDER, GPT_STYLES, NEEDS_DATA, Memory, assert_as_found, assert_same_tensors,
    bits, gpt_losses, gpt_mean_loss, linears, mean_loss, random_gpt, random_mlp, sample_losses, snapshot,
    twin_of, weights_of)  # fmt: skip
from oracles import assert_close, func_oracle, gpt_flow, join, loop_oracle
from speft import METRICS, salience, select, sparsify


# --- which layers, what comes back ----------------------------------------------------------------------


@pytest.mark.parametrize("metric", ALL)
def test_scores_are_of_the_weights_shape_and_of_their_own_type(metric):
    """Float32, or float64 where the weights are or where a metric needs it."""
    for dtype in (torch.float32, torch.float64):
        for model, batches, loss_fn in ((*random_mlp(6, dtype), sample_losses),
                                        (*random_gpt("llama", dtype=dtype), gpt_losses)):  # fmt: skip
            scores = salience(model, metric, batches, loss_fn)
            assert list(scores) == list(linears(model))
            for name, score in scores.items():
                weight = model.get_submodule(name).weight
                wide = dtype is torch.float64 and metric != "random" or metric in ("taylor", "synflow")
                assert score.dtype == (torch.float64 if wide else torch.float32)
                assert score.shape == weight.shape and score.is_contiguous()
                assert not score.requires_grad and score.data_ptr() != weight.data_ptr()
                assert score.isfinite().all()


@pytest.mark.parametrize("metric", ALL)
def test_the_predicate_chooses_layers_by_name(metric):
    model, batches = random_gpt("gpt2")
    asked = []

    def layers(name):
        asked.append(name)
        return name.endswith("attn.o") or name == "blocks.1.mlp.up"

    scores = salience(model, metric, batches, gpt_losses, layers=layers)
    assert list(scores) == ["blocks.0.attn.o", "blocks.1.attn.o", "blocks.1.mlp.up"]
    assert set(list(linears(model))) <= set(asked)


class Special(nn.Linear):
    """No plain linear layer: it may use its weight in any way."""


class Assorted(nn.Module):
    """A tied head, two layers that share a weight, a subclass of nn.Linear, and two plain layers."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(5, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.special = Special(4, 4)
        self.plain, self.other = nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, idx):
        x = self.special(self.second(self.first(self.wte(idx)).tanh()).tanh())
        return self.head(self.other(self.plain(x).tanh())).mean(1)


@pytest.mark.parametrize("metric", ALL)
def test_tied_shared_and_derived_layers_are_not_scored(metric):
    torch.manual_seed(0)
    model = Assorted().double()
    batches = [(torch.randint(0, 5, (n, 2)), torch.randn(n, 5, dtype=torch.float64)) for n in (2, 3)]
    scores = salience(model, metric, batches, sample_losses)
    assert list(scores) == ["plain", "other"]
    if metric in ("magnitude", *NEEDS_DATA):
        names = ["plain", "other"]
        assert_close(scores, func_oracle(metric, model, batches, sample_losses, names))


def test_a_shared_layer_is_found_before_the_predicate_narrows_the_choice():
    model = Assorted()
    with pytest.raises(ValueError, match="(?i)layer"):
        salience(model, "magnitude", [], None, layers=("head", "first").__contains__)


def test_a_metric_of_ones_own_is_one_entry(monkeypatch):
    model, batches = random_mlp(3)
    seen = {}

    def cubes(scored_model, weights, scored_batches, loss_fn):
        seen.update(weights)
        assert scored_model is model and loss_fn is sample_losses
        assert [len(batch[0]) for batch in scored_batches] == [len(batch[0]) for batch in batches]
        return {name: weight.detach() ** 3 for name, weight in weights.items()}

    monkeypatch.setitem(METRICS, "cubes", cubes)
    scores = salience(model, "cubes", batches, sample_losses)
    assert list(seen) == list(linears(model))
    assert all(weight is model.get_submodule(name).weight for name, weight in seen.items())
    assert_same_tensors(scores, {name: w**3 for name, w in weights_of(model).items()})


def test_a_metric_of_ones_own_may_need_no_data_and_draw_random_numbers(monkeypatch):
    def coin(model, weights, batches, loss_fn):
        return {name: torch.rand(weight.shape) for name, weight in weights.items()}

    monkeypatch.setitem(METRICS, "coin", coin)
    model, _ = random_mlp(1)
    first, second = (join(salience(model, "coin", None, None)) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "score",
    (
        lambda weight: weight.detach().norm(dim=1, keepdim=True),  # one a row, not spread over the row
        lambda weight: weight.detach().T,
        lambda weight: weight.detach().flatten(),
    ),
)
def test_a_score_of_another_shape_or_none_is_an_error(monkeypatch, score):
    model, batches = random_mlp(3)

    def shapeless(model, weights, batches, loss_fn):
        return {name: score(weight) for name, weight in weights.items()}

    monkeypatch.setitem(METRICS, "shapeless", shapeless)
    fails_in_the_end("shapeless.*shape", model, "shapeless", batches)
    monkeypatch.setitem(METRICS, "nothing", lambda *given: {})
    fails_in_the_end("nothing.*shape", model, "nothing", batches)


@pytest.mark.parametrize("part", ("attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "blocks.1"))
@pytest.mark.parametrize("metric", (*FIRST_ORDER, "synflow", "fisher"))
def test_a_subset_of_the_layers_scores_as_in_the_whole(metric, part):
    model, batches = random_gpt("llama")
    chosen = lambda name: part in name  # noqa: E731
    everything = salience(model, metric, batches, gpt_losses)
    scores = salience(model, metric, batches, gpt_losses, layers=chosen)
    assert_close(scores, {name: s for name, s in everything.items() if chosen(name)})


# --- the model is left as it was found ------------------------------------------------------------------


class Fuse(nn.Module):
    """The identity, until the fuse is lit: then the n-th forward pass fails, or its backward pass."""

    def __init__(self):
        super().__init__()
        self.left, self.backward_fails = None, False

    def forward(self, x):
        if self.left is not None:
            self.left -= 1
            if self.left <= 0 and self.backward_fails:
                x = x * 1
                x.register_hook(self.burn)
            elif self.left <= 0:
                self.burn(None)
        return x

    def burn(self, _):
        raise RuntimeError("the fuse has burnt")


class Counter(nn.Module):
    """Counts its forward passes in a buffer, as moving averages do, in place or by a new tensor."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x):
        if self.in_place:
            self.count += 1
        else:
            self.count = self.count + 1
        return x


def worn_model():
    """A model in the middle of something: mixed training flags, frozen parts, some gradients, a −0.0."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 4),
        nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4, bias=False), Fuse(), nn.Linear(4, 2),
    )  # fmt: skip
    model[1].running_mean.normal_()
    model[4].requires_grad_(False)
    model[5].requires_grad_(False)
    model.train()
    model[3].eval(), model[7].eval()
    with torch.no_grad():
        for layer in (model[0], model[4], model[9]):
            layer.weight[0, 1] = -0.0
    model[0].weight.grad = torch.randn(4, 3)
    model[7].weight.grad = torch.zeros(4, 4)
    model[1].bias.grad = torch.randn(4)
    batches = [(torch.randn(n, 3), torch.randn(n, 2)) for n in (3, 2)]
    return model, batches


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("grad_mode", (contextlib.nullcontext, torch.no_grad))
def test_the_model_is_left_as_found(metric, grad_mode):
    for model, batches, loss_fn in (
        (*worn_model(), sample_losses),
        (*random_gpt("gpt2", dtype=torch.float32), gpt_losses),
        (*random_gpt("llama", dtype=torch.float32), gpt_mean_loss),
    ):

        def noisy_loss(model, batch):
            return loss_fn(model, batch) + 0 * torch.rand(())  # a loss may draw random numbers

        with grad_mode():
            before = snapshot(model)
            salience(model, metric, batches, noisy_loss)
            assert_as_found(model, before, draws=1)


def test_scores_hold_no_graph_and_are_laid_out_plainly(monkeypatch):
    """Whatever a metric of one's own returns, so that it can be sent to other processes."""
    own = {
        "from the weights": lambda model, weights, *_: {name: w * w for name, w in weights.items()},
        "by columns": lambda model, weights, *_: {n: w[:1].detach().expand_as(w) for n, w in weights.items()},
    }
    for metric, function in own.items():
        monkeypatch.setitem(METRICS, metric, function)
        for score in salience(random_mlp(0)[0], metric, None, None).values():
            assert not score.requires_grad and score.is_contiguous()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
def test_gradients_of_any_type_that_a_model_already_holds_stay(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    batches = [(torch.randn(n, 3, dtype=dtype), torch.randn(n, 2, dtype=dtype)) for n in (3, 2)]
    sample_losses(model, batches[0]).sum().backward()
    before = snapshot(model)
    for draws, metric in enumerate(FIRST_ORDER, 1):
        salience(model, metric, batches, sample_losses)
        assert_as_found(model, before, draws=draws)


@pytest.mark.parametrize("metric", [*FIRST_ORDER, "grasp"])
def test_a_model_whose_loss_is_zero_has_no_salient_weight(metric):
    model, batches = random_mlp(0)
    fitted = [(x, model(x).detach()) for x, _ in batches]
    for score in salience(model, metric, fitted, sample_losses).values():
        assert not score.any()


@pytest.mark.parametrize("metric", FIRST_ORDER)
def test_first_order_scores_take_no_memory_beside_the_gradients_that_they_are_made_of(metric):
    """Gradients add up in place, over any number of batches, and become the scores."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    batches = [(torch.randn(2, 64), torch.randn(2, 64)) for _ in range(5)]
    layer = 64 * 64 * 4  # bytes
    scores = (24 if metric == "taylor" else 8) * layer  # Taylor's are of float64, made from FORCE's
    with Memory() as taken:
        salience(model, metric, batches, sample_losses)
    assert 8 * layer <= taken.peak < scores + 4 * layer


HOOKS = {
    "after accumulation": lambda parameter, hook: parameter.register_post_accumulate_grad_hook(hook),
    "before accumulation": lambda parameter, hook: parameter.register_hook(hook),
}


@pytest.mark.parametrize("when", HOOKS)
@pytest.mark.parametrize("metric", ALL)
def test_hooks_on_gradients_are_refused(metric, when):
    """An optimizer may step there, in the middle of scoring; removed, they are no hindrance."""
    model, batches = random_mlp(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = HOOKS[when](model[0].weight, lambda _: optimizer.step())
    fails("hook.*remove it", model, metric, batches)
    handle.remove()
    assert list(salience(model, metric, batches, sample_losses)) == list(linears(model))


@pytest.mark.parametrize("metric", DETERMINISTIC)
def test_a_model_whose_train_and_eval_return_nothing(metric):
    class Silent(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)

        def eval(self):
            super().eval()

    model, batches = random_mlp(2)
    silent = Silent(*model)
    expected = salience(model, metric, batches, sample_losses)
    assert_same_tensors(salience(silent, metric, batches, sample_losses), expected)


@pytest.mark.parametrize("noise", (0, 1, 7))
@pytest.mark.parametrize("metric", ALL)
def test_whatever_scoring_draws_the_callers_generator_goes_on_from_a_seed_of_its_own(metric, noise):
    """So that the next random scores are others, and a run goes on alike whatever a loss draws."""
    model, batches = random_mlp(2)
    torch.manual_seed(3)
    torch.manual_seed(torch.randint(2**63 - 1, ()).item())
    expected = torch.rand(4)
    torch.manual_seed(3)
    salience(model, metric, batches, lambda m, b: sample_losses(m, b) + 0 * torch.rand(noise).sum())
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("in_place", (True, False))
@pytest.mark.parametrize("metric", DETERMINISTIC)
def test_buffers_that_a_forward_pass_changes_are_restored(metric, in_place):
    model, batches = random_mlp(3)
    model.append(Counter(in_place))
    before = snapshot(model)
    salience(model, metric, batches, sample_losses)
    assert_as_found(model, before, draws=1)


FAILURES = [(m, n, where) for m in NEEDS_DATA for n in (1, 2) for where in ("forward", "backward", "loss")]
FAILURES += [("synflow", 1, "forward"), ("synflow", 1, "backward")]  # it makes one pass and calls no loss


@pytest.mark.parametrize(("metric", "which", "where"), FAILURES)
def test_after_a_failure_the_model_is_as_found_and_trains_on(metric, which, where):
    model, batches = worn_model()
    twin = twin_of(model)
    calls = []

    def loss_fn(model, batch):
        calls.append(None)
        losses = sample_losses(model, batch)
        torch.rand(1)
        if where == "loss" and len(calls) == which:
            model[8].burn(None)
        return losses

    before = snapshot(model)
    model[8].left, model[8].backward_fails = (None if where == "loss" else which), where == "backward"
    with pytest.raises(RuntimeError, match="burnt"):
        salience(model, metric, batches, loss_fn)
    model[8].left, model[8].backward_fails = None, False
    assert_as_found(model, before)
    kept = model[0].weight.grad
    for each in (model, twin):
        torch.manual_seed(1)
        mean_loss(each, batches[0]).backward()
    assert model[0].weight.grad is kept
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert bits(p.grad) == bits(q.grad), name


@pytest.mark.parametrize("metric", DETERMINISTIC)
def test_frozen_weights_score_like_trainable_ones(metric):
    for style in GPT_STYLES:
        model, batches = random_gpt(style)
        expected = salience(model, metric, batches, gpt_losses)
        model.requires_grad_(False)
        assert_same_tensors(salience(model, metric, batches, gpt_losses), expected)


@pytest.mark.parametrize("metric", DETERMINISTIC)
@pytest.mark.parametrize("loss_fn", (sample_losses, mean_loss))
def test_scoring_under_no_grad_gives_the_same(metric, loss_fn):
    model, batches = random_mlp(8)
    expected = salience(model, metric, batches, loss_fn)
    with torch.no_grad():
        assert_same_tensors(salience(model, metric, batches, loss_fn), expected)


# --- sparse layers, bfloat16 ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("metric", ALL)
def test_a_sparse_model_scores_like_the_merged_one(metric, seed):
    plain, batches = random_gpt("llama" if seed % 2 else "gpt2", seed, dtype=torch.float32)
    sparse = copy.deepcopy(plain)
    indices = {name: torch.randperm(w.numel())[:5].sort().values for name, w in weights_of(plain).items()}
    indices.pop("blocks.0.mlp.up")  # sparse and plain layers side by side
    sparsify(sparse, indices)
    for name, index in indices.items():
        delta = torch.randn(len(index))
        sparse.get_submodule(name).delta.data.copy_(delta)
        plain.get_submodule(name).weight.data.view(-1)[index] += delta
    twin = copy.deepcopy(sparse)
    torch.manual_seed(seed)
    scores = salience(sparse, metric, batches, gpt_losses)
    torch.manual_seed(seed)
    assert_same_tensors(scores, salience(plain, metric, batches, gpt_losses))
    assert_same_tensors(sparse.state_dict(), twin.state_dict())
    assert all(p.grad is None for p in sparse.parameters())


@pytest.mark.parametrize("metric", DETERMINISTIC)
def test_scoring_a_sparse_model_leaves_it_as_found(metric):
    model, batches = random_gpt("gpt2", dtype=torch.float32)
    deltas = sparsify(model, {name: torch.arange(3) for name in list(linears(model))})
    for delta in deltas:
        nn.init.normal_(delta)
    gpt_mean_loss(model, batches[0]).backward()
    twin = twin_of(model)
    before = snapshot(model)
    salience(model, metric, batches, gpt_losses)
    assert_as_found(model, before, draws=1)
    for each in (model, twin):
        gpt_mean_loss(each, batches[1]).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert bits(p.grad) == bits(q.grad), name


@pytest.mark.parametrize("style", GPT_STYLES)
@pytest.mark.parametrize("metric", DETERMINISTIC)
def test_bfloat16_weights_score_within_their_precision(metric, style):
    model, batches = random_gpt(style, dtype=torch.bfloat16, n_embd=8)
    exact = copy.deepcopy(model).double()
    scores = salience(model, metric, batches, gpt_losses)
    if metric in ("magnitude", "synflow"):  # no sum is ever rounded to bfloat16
        magnitudes = {name: w.abs() for name, w in weights_of(exact).items()}
        assert_close(scores, gpt_flow(exact) if metric == "synflow" else magnitudes)
    else:
        expected = loop_oracle(metric, exact, batches, gpt_losses)
        error = (join(scores) - join(expected)).norm() / join(expected).norm()
        assert error < (0.2 if metric == "grasp" else 0.1)


@pytest.mark.parametrize("metric", NEEDS_DATA)
@pytest.mark.parametrize("loss_fn", (sample_losses, mean_loss))
def test_many_bfloat16_batches_are_not_lost_in_rounding(metric, loss_fn):
    """A bfloat16 sum of equal terms stops growing after 256 of them."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).bfloat16()
    batch = tuple(torch.randn(1, width).bfloat16() for width in (3, 2))
    one = salience(model, metric, [batch], loss_fn)
    assert_close(salience(model, metric, [batch] * 400, loss_fn), one, rtol=0.03, atol=0.03)


# --- errors ---------------------------------------------------------------------------------------------


def fails(match, model, metric, batches, loss_fn=sample_losses, draws=0, **settings):
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        salience(model, metric, batches, loss_fn, **settings)
    assert_as_found(model, before, draws)


def fails_in_the_end(match, model, metric, batches, loss_fn=sample_losses, **settings):
    """Scoring itself goes well, and draws its number; what it returns is refused."""
    fails(match, model, metric, batches, loss_fn, draws=1, **settings)


def test_an_unknown_metric_is_named():
    model, batches = random_mlp(1)
    for name in ("hessian-trace", "Grad", ""):
        fails(name or "metric", model, name, batches)


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_a_metric_that_needs_data_refuses_empty_batches(metric):
    model, _ = random_mlp(1)
    fails("(?i)batch", model, metric, [])
    fails("(?i)batch", model, metric, iter(()))


def test_magnitude_and_random_need_no_data():
    model, _ = random_mlp(1)
    expected = {name: w.abs() for name, w in weights_of(model).items()}
    for nothing in ([], None):
        assert_same_tensors(salience(model, "magnitude", nothing, None), expected)
        assert list(salience(model, "random", nothing, None)) == list(linears(model))


@pytest.mark.parametrize("metric", ALL)
def test_no_matching_layer_is_an_error(metric):
    model, batches = random_mlp(1)
    fails("(?i)layer", model, metric, batches, layers=lambda name: False)
    fails("(?i)layer", nn.Sequential(nn.Tanh(), Special(2, 2)), metric, batches)


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("metric", DETERMINISTIC)
def test_a_non_finite_score_names_its_layer(metric, value):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("sane", nn.Linear(3, 4))
    model.add_module("broken", nn.Linear(4, 2))
    with torch.no_grad():
        model.broken.weight[1, 2] = value
    batch = torch.randn(3, 3), torch.randn(3, 2)
    fails_in_the_end("no finite score", model, metric, [batch])
    fails_in_the_end("layer 'broken' has no finite score", model, metric, [batch], layers="broken".__eq__)


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_a_loss_that_is_nan_is_an_error(metric):
    model, batches = random_mlp(1)
    fails_in_the_end("no finite score", model, metric, batches, lambda m, b: sample_losses(m, b) * math.nan)


@pytest.mark.parametrize("loss_fn", (sample_losses, mean_loss))
@pytest.mark.parametrize("scale", (1e-60, 1e60))
@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_scores_of_a_float64_model_may_leave_float32s_range(metric, scale, loss_fn):
    """As zeros or infinities they could not be ranked."""
    model, batches = random_mlp(1)
    scaled = lambda m, b: scale * loss_fn(m, b)  # noqa: E731
    expected = func_oracle(metric, model, batches, lambda m, b: scale * sample_losses(m, b))
    scores = salience(model, metric, batches, scaled)
    assert_close(scores, expected, atol=1e-8)
    top = join(expected).topk(3).values[-1]
    masks = select(scores, 3 / len(join(expected)), "global")
    wanted = {name: (s.flatten() >= top).nonzero().squeeze(1) for name, s in expected.items()}
    assert_same_tensors(masks, wanted)


@pytest.mark.parametrize("metric", ("grad", "snip", "force", "fisher", "grasp"))
def test_a_score_that_overflows_names_its_layer(metric):
    model, batches = random_mlp(1, torch.float32)
    huge = lambda m, b: 1e38 * (1e4 * sample_losses(m, b))  # noqa: E731
    fails_in_the_end("layer '0' has no finite score", model, metric, batches, huge)
