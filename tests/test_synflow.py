"""SynFlow, against networks linearised by hand."""

import copy
import operator

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

from helpers import (
    GPT_STYLES, assert_as_found, assert_same_tensors, random_gpt, random_mlp, scramble, snapshot,
    weights_of)  # fmt: skip
from model import GPT, GPTConfig
from oracles import assert_close, chain_flow, gpt_flow, join
from speft import merge, salience, select, sparsify


def synflow(model, *batch, **settings):
    """SynFlow has no use for a loss."""
    return salience(model, "synflow", [batch], None, **settings)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("seed", range(8))
def test_synflow_on_a_chain_is_the_product_of_the_flows(seed, dtype):
    model, batches = random_mlp(seed, dtype)
    expected, total = chain_flow(model)
    scores = synflow(model, *batches[0])
    assert_close(scores, expected)
    for name, score in scores.items():
        assert score.double().sum().item() == pytest.approx(total.item(), rel=1e-5), name


@pytest.mark.parametrize(
    "activation",
    (nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid(),
     nn.LeakyReLU(), nn.ELU(), nn.Softplus(), nn.Hardswish(), nn.Mish(), nn.Dropout(0.5), nn.BatchNorm1d(4),
     nn.RMSNorm(4), nn.LayerNorm(4)),
    ids=repr,
)  # fmt: skip
def test_synflow_passes_every_activation_and_takes_a_norm_for_its_gain(activation):
    torch.manual_seed(0)
    model = scramble(nn.Sequential(nn.Linear(3, 4), copy.deepcopy(activation), nn.Linear(4, 2)))
    if hasattr(model[1], "weight"):
        model[1].weight.data[0] *= -1
    assert_close(synflow(model, torch.randn(5, 3)), chain_flow(model)[0])


class Spelled(nn.Module):
    """Two linear layers around an activation that is a function or a method."""

    def __init__(self, activation):
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(3, 4), nn.Linear(4, 2), activation

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


@pytest.mark.parametrize(
    "activation",
    (F.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, torch.relu, torch.relu_, F.relu_, lambda x: x.tanh(),
     lambda x: x.relu(), lambda x: x.relu_(), lambda x: x.sigmoid(), lambda x: x.tanh_(),
     lambda x: F.relu(x, inplace=True)),
)  # fmt: skip
def test_synflow_knows_activations_as_functions_and_methods(activation):
    torch.manual_seed(0)
    model = Spelled(activation)
    chain = nn.Sequential()
    chain.add_module("fc1", model.fc1)
    chain.add_module("fc2", model.fc2)
    assert_close(synflow(model, torch.randn(5, 3)), chain_flow(chain)[0])


def test_synflow_ignores_biases_and_data():
    for style in GPT_STYLES:
        model, batches = random_gpt(style)
        before = synflow(model, *batches[0])
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, mean=3)
        nn.init.normal_(model.wte.weight if model.head is not None else model.wpe.weight, std=9)
        assert_same_tensors(synflow(model, batches[1][0], batches[1][1]), before)
    model, batches = random_mlp(1)
    before = synflow(model, *batches[0])
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.bias, mean=-5)
    assert_same_tensors(synflow(model, -7 * batches[1][0]), before)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("style", GPT_STYLES)
def test_synflow_on_a_gpt_is_the_network_linearised_by_hand(style, seed):
    for blocks in (1, 3):
        model, batches = random_gpt(style, seed, n_layer=blocks)
        assert_close(synflow(model, *batches[0]), gpt_flow(model))


@pytest.mark.parametrize("style", GPT_STYLES)
def test_synflow_gives_queries_and_keys_exactly_zero_and_all_others_more(style):
    model, batches = random_gpt(style, dtype=torch.float32)
    for name, score in synflow(model, *batches[0]).items():
        if name.endswith(("attn.q", "attn.k")):
            assert not score.any(), name
        else:
            assert (score > 0).all(), name


@pytest.mark.parametrize("std", (0.02, 0.1, 0.3))
def test_synflow_is_right_on_eight_blocks(std):
    """A fused attention kernel's backward pass is wrong here, and only from about this depth on."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=32, block_size=4, n_layer=8, n_head=4, n_embd=128)
    model = GPT(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=std)
    scores, expected = synflow(model, torch.zeros(2, 3, dtype=torch.long)), gpt_flow(model)
    assert_close(scores, expected)


@pytest.mark.parametrize("std", (0.02, 0.5, 5.0))
def test_synflow_through_thirty_gated_blocks_stays_finite(std):
    """At 0.5 the flow leaves float32, at 5.0 its square, which is never formed, would leave float64."""
    model, batches = random_gpt("llama", n_layer=30, n_embd=16, n_inner=24, dtype=torch.float32)
    scramble(model, std)
    scores = synflow(model, *batches[0])
    assert_close(scores, gpt_flow(model))
    assert (join(scores).max() > torch.finfo(torch.float32).max) == (std >= 0.5)
    assert (join(scores).max().log2() > 512) == (std == 5.0)


def test_synflow_with_a_dead_gate_is_synflow_without_those_units():
    """The square root's slope at zero is infinite: units with a dead gate must score zero, not NaN."""
    model, batches = random_gpt("llama", n_inner=6)
    small, _ = random_gpt("llama", n_inner=4)
    for name, parameter in small.named_parameters():
        full = model.get_parameter(name)
        if ".mlp.gate." in name:
            full.data[4:] = 0
        parameter.data = full.data[tuple(slice(n) for n in parameter.shape)].clone()
    expected = synflow(small, *batches[0])
    for name, score in synflow(model, *batches[0]).items():
        rows, columns = expected[name].shape
        torch.testing.assert_close(score[:rows, :columns], expected[name], msg=name)
        assert not score[rows:].any() and not score[:, columns:].any(), name


class Aliased(nn.Module):
    """A layer and a norm that the module knows by two names, and two layers that share their weight."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4)
        )
        self.first, self.norm = self.layers[0], self.layers[1]
        self.layers[4].weight = self.layers[3].weight

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_synflow_leaves_modules_of_two_names_as_they_were(dtype):
    torch.manual_seed(0)
    model = scramble(Aliased()).to(dtype).eval()
    chain, x = copy.deepcopy(model.layers), torch.randn(2, 4, dtype=dtype)
    before, said = snapshot(model), model(x)
    (score,) = synflow(model, x).values()
    assert_as_found(model, before, draws=1)
    assert torch.equal(model(x), said)
    assert_close({"0": score}, {"0": chain_flow(chain)[0]["0"]})


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_synflow_reads_sparse_layers_as_they_stand_also_those_that_it_does_not_score(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    x = torch.randn(2, 4, dtype=dtype)
    for delta in sparsify(model, select(salience(model, "magnitude", [], None), 0.3, "global")):
        delta.data += 1.0  # which no one has read yet
    scores = synflow(model, x, layers=lambda name: name == "2")
    plain = merge(copy.deepcopy(model))
    assert_same_tensors(scores, synflow(plain, x, layers=lambda name: name == "2"))
    assert_close(scores, {"2": chain_flow(plain)[0]["2"]})


class Gains(nn.Module):
    """A learned factor is a weight: its product with an activation is no product of two activations."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.gain), "only the first element counts"


def test_synflow_multiplies_by_a_learned_gain_and_reads_the_first_output():
    torch.manual_seed(0)
    model = Gains()
    norm = nn.RMSNorm(4)
    norm.weight = model.gain
    chain = nn.Sequential()
    for name, module in (("fc1", model.fc1), ("norm", norm), ("fc2", model.fc2)):
        chain.add_module(name, module)
    assert_close(synflow(model, torch.randn(5, 3)), chain_flow(chain)[0])


class Gated(nn.Module):
    """A gated MLP whose product is spelled by `multiply`."""

    def __init__(self, multiply):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.multiply = multiply

    def forward(self, x):
        return self.down(self.multiply(F.silu(self.gate(x)), self.up(x)))


@pytest.mark.parametrize(
    "multiply",
    (operator.mul, torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.mul_, operator.imul),
    ids=("operator", "torch.mul", "torch.multiply", "method", "method in place", "operator in place"),
)
def test_synflow_takes_the_geometric_mean_however_a_gate_is_spelled(multiply):
    torch.manual_seed(0)
    model = Gated(multiply)
    p = {name: w.double().abs().requires_grad_() for name, w in weights_of(model).items()}
    (p["down"] @ (p["gate"].sum(1) * p["up"].sum(1)).sqrt()).sum().backward()
    expected = {name: (w.grad * w).detach() for name, w in p.items()}
    assert_close(synflow(model, torch.randn(5, 3)), expected)
    for name in p:  # an activation is one also where no scored weight lies behind it
        assert_close(synflow(model, torch.randn(5, 3), layers=name.__eq__), {name: expected[name]})


class ByKeyword(nn.Module):
    """Attention over linear layers, with torch's functions called by keyword."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = F.linear(x, weight=self.fc1.weight, bias=self.fc1.bias)
        y = F.scaled_dot_product_attention(value=y, query=0 * y, key=y)
        return F.linear(F.relu(input=y), self.fc2.weight)


def test_synflow_knows_functions_called_by_keyword():
    torch.manual_seed(0)
    model = ByKeyword()
    chain = nn.Sequential()
    chain.add_module("fc1", model.fc1)
    chain.add_module("fc2", model.fc2)
    assert_close(synflow(model, torch.randn(2, 1, 3)), chain_flow(chain)[0])


def test_synflow_takes_an_embedding_lookup_for_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    expected, _ = chain_flow(model)
    assert_close(synflow(model, torch.randint(0, 9, (2, 5))), expected)


@pytest.mark.parametrize("size", (1e-40, 1e-30, 1e-9, 1e-2, 1.0, 1e4, 1e9, 1e30))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_synflow_beyond_float32s_range_is_right(size, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(7))).to(dtype)
    for layer in model:
        nn.init.uniform_(layer.weight, 0.5 * size, 2 * size)
    scores, (expected, _) = synflow(model, torch.ones(1, 4, dtype=dtype)), chain_flow(model)
    assert join(expected).min() > 0
    assert_close(scores, expected, rtol=1e-9, atol=0)
