"""`speft.salience`: every metric against an oracle that reaches the same number by another road.

The oracles: `torch.func` on the joint vector of all scored weights, loops over samples, central differences
in float64, and networks linearised by hand for SynFlow.
"""

import contextlib
import copy
import functools
import math
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import speft
from model import GPT, GPTConfig

FIRST_ORDER = ("grad", "snip", "force", "taylor")
NEEDS_DATA = (*FIRST_ORDER, "grasp", "fisher")
ALL = ("random", "magnitude", *FIRST_ORDER, "synflow", "grasp", "fisher")
DETERMINISTIC = ALL[1:]

GPT_STYLES = {
    "gpt2": dict(qkv_bias=True),
    "llama": dict(gated_mlp=True, rms_norm=True, rope_theta=100.0, n_kv_head=1, tied_head=False,
                  activation="silu", qkv_bias=False, out_bias=False, mlp_bias=False),
}  # fmt: skip


# --- models, data, losses -------------------------------------------------------------------------------


def sample_losses(model, batch):
    """Mean squared error of every sample, (B,)."""
    x, y = batch
    return (model(x) - y).square().flatten(1).mean(1)


def mean_loss(model, batch):
    return sample_losses(model, batch).mean()


def gpt_losses(model, batch):
    return model(*batch, reduction="none")[1]


def gpt_mean_loss(model, batch):
    return model(*batch)[1]


def scramble(model, std=0.5):
    """Random values everywhere, gains and biases too, so that no term of an oracle is zero or one."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def make_mlp(seed, dtype=torch.float64):
    """A random chain of linear layers, activations and norms, with its batches of unequal sizes."""
    torch.manual_seed(seed)
    activation = [nn.Tanh(), nn.GELU(), nn.ReLU(inplace=True), nn.SiLU()][seed % 4]
    bias, norm = seed % 3 != 0, seed % 2 == 0
    widths = torch.randint(1, 5, (4,)).tolist()
    layers = []
    for fan_in, fan_out in zip(widths, widths[1:]):
        layers.append(nn.Linear(fan_in, fan_out, bias=bias))
        if norm and fan_out > 1:
            layers.append(nn.LayerNorm(fan_out))
        layers.append(activation)
    model = scramble(nn.Sequential(*layers[:-1])).to(dtype)
    batches = [
        (torch.randn(size, widths[0], dtype=dtype), torch.randn(size, widths[-1], dtype=dtype))
        for size in torch.randint(1, 5, (3,)).tolist() + [1]
    ]
    return model, batches


def make_gpt(style, seed=0, dtype=torch.float64, **changes):
    """A tiny GPT and batches whose samples have unequal numbers of counted targets (one sample has none)."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=7, block_size=5, n_layer=2, n_head=2, n_embd=4, n_inner=6)
    model = scramble(GPT(GPTConfig(**(shape | GPT_STYLES[style] | changes)))).to(dtype)
    batches = []
    for size, length in ((3, 5), (1, 4), (2, 3)):
        idx, targets = torch.randint(0, model.config.vocab_size, (2, size, length))
        targets[0, 1:] = -100
        batches.append((idx, targets))
    batches[-1][1][1] = -100
    return model, batches


def twin_of(model):
    """A deep copy that also has the gradients, which copy.deepcopy leaves out."""
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters()):
        q.grad = None if p.grad is None else p.grad.clone()
    return twin


def linear_names(model):
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def weights_of(model):
    return {name: model.get_submodule(name).weight.detach() for name in linear_names(model)}


# --- oracles --------------------------------------------------------------------------------------------


def split(vector, weights):
    """The joint vector of all weights -> name: matrix."""
    parts = vector.split([w.numel() for w in weights.values()])
    return {name: part.view_as(w) for (name, w), part in zip(weights.items(), parts)}


def join(tensors):
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def joint_losses(model, batches, loss_fn, names=None):
    """(f, vector): f maps the joint vector of the scored weights to the losses of all samples."""
    model = copy.deepcopy(model).eval()
    weights = {name: w for name, w in weights_of(model).items() if names is None or name in names}

    def losses(vector):
        values = {f"{name}.weight": w for name, w in split(vector, weights).items()}
        call = lambda *args, **kwargs: torch.func.functional_call(model, values, args, kwargs)  # noqa: E731
        return torch.cat([loss_fn(call, batch) for batch in batches])

    return losses, join(weights), weights


def scores_from(metric, weights, theta, gradients=None, hessian_times_gradient=None):
    """The paper's formulas on joint vectors; `gradients` has one row for each sample."""
    g = None if gradients is None else gradients.mean(0)
    joint = {
        "magnitude": lambda: theta.abs(),
        "grad": lambda: g.abs(),
        "snip": lambda: (g * theta).abs(),
        "force": lambda: -g * theta,
        "taylor": lambda: (g * theta) ** 2,
        "grasp": lambda: -hessian_times_gradient * theta,
        "fisher": lambda: (gradients**2).mean(0),
    }[metric]()
    return split(joint, weights)


def func_oracle(metric, model, batches, loss_fn, names=None):
    """`torch.func` on the joint vector: per-sample gradients by jacrev, the whole Hessian for GRaSP."""
    losses, theta, weights = joint_losses(model, batches, loss_fn, names)
    jacobian = torch.func.jacrev(losses)(theta)
    product = None
    if metric == "grasp":
        product = torch.func.hessian(lambda v: losses(v).mean())(theta) @ jacobian.mean(0)
    return scores_from(metric, weights, theta, jacobian, product)


def loop_oracle(metric, model, batches, loss_fn):
    """One sample after the other by plain autograd; H g by a central difference of gradients."""
    model = copy.deepcopy(model).eval()
    samples = [tuple(t[i : i + 1] for t in batch) for batch in batches for i in range(len(batch[0]))]
    weights = {name: model.get_submodule(name).weight for name in linear_names(model)}
    theta = join(weights).detach()

    def gradients(vector):
        with torch.no_grad():
            for name, value in split(vector, weights).items():
                weights[name].copy_(value)
        rows = []
        for sample in samples:
            loss = loss_fn(model, sample).sum()
            found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            rows.append(torch.cat([t.reshape(-1) for t in found]))
        return torch.stack(rows)

    rows = gradients(theta)
    product = None
    if metric == "grasp":
        g = rows.mean(0)
        step = 1e-5 / g.norm()
        product = (gradients(theta + step * g).mean(0) - gradients(theta - step * g).mean(0)) / (2 * step)
    return scores_from(metric, weights, theta, rows, product)


def chain_flow(model):
    """SynFlow on a Sequential without autograd: back ⊗ forward ⊙ abs(W). Returns the scores and R."""
    matrices = []
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            matrices.append((name, module.weight.detach().double().abs()))
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)):
            matrices.append((None, torch.diag(module.weight.detach().double().abs())))
    ahead = [torch.ones(matrices[0][1].size(1), dtype=torch.float64)]
    for _, matrix in matrices:
        ahead.append(matrix @ ahead[-1])
    scores, back = {}, torch.ones(matrices[-1][1].size(0), dtype=torch.float64)
    for (name, matrix), value in zip(reversed(matrices), reversed(ahead[:-1])):
        if name is not None:
            scores[name] = torch.outer(back, value) * matrix
        back = matrix.T @ back
    return {name: scores[name] for name, _ in matrices if name is not None}, ahead[-1].sum()


def gpt_flow(model):
    """SynFlow on a GPT: the linearised network written out over one position, differentiated in float64."""
    config = model.config
    p = {name: t.detach().double().abs().requires_grad_() for name, t in model.named_parameters()}
    x = torch.full((config.n_embd,), 1.0 if config.rope_theta else 2.0, dtype=torch.float64)
    for i in range(config.n_layer):
        block = f"blocks.{i}."
        v = p[block + "attn.v.weight"] @ (x * p[block + "norm1.weight"])
        heads = v.view(config.n_kv_head, config.head_dim)
        heads = heads[torch.arange(config.n_head) // (config.n_head // config.n_kv_head)]
        x = x + p[block + "attn.o.weight"] @ heads.flatten()
        h = x * p[block + "norm2.weight"]
        inner = p[block + "mlp.up.weight"] @ h
        if config.gated_mlp:
            inner = inner.sqrt() * (p[block + "mlp.gate.weight"] @ h).sqrt()
        x = x + p[block + "mlp.down.weight"] @ inner
    head = p["wte.weight" if config.tied_head else "head"]
    (head @ (x * p["norm.weight"])).sum().backward()
    flow = {name: p[f"{name}.weight"] for name in linear_names(model)}
    return {n: torch.zeros_like(w) if w.grad is None else (w.grad * w).detach() for n, w in flow.items()}


def assert_close(scores, expected, rtol=1e-6, atol=1e-8):
    """Every layer within rtol, or within atol of the largest score of all layers."""
    assert list(scores) == list(expected)
    largest = max(t.abs().max().item() for t in expected.values())
    for name, want in expected.items():
        message = lambda text: f"{name}: {text}"  # noqa: E731
        got = scores[name].double()
        torch.testing.assert_close(got, want.double(), rtol=rtol, atol=atol * largest, msg=message)


def assert_equal(scores, expected):
    assert list(scores) == list(expected)
    for name in expected:
        assert torch.equal(scores[name], expected[name]), name


def assert_close_up_to_a_power_of_two(scores, expected):
    """Returns the common exponent; entries that scaling moved among float32's subnormals are not compared."""
    got, want = join(scores).double(), join(expected)
    assert got.isfinite().all()
    counted = got.abs() > 1e-36
    assert counted.sum() >= (want != 0).sum() * 0.9
    exponents = (got[counted] / want[counted]).log2()
    exponent = exponents.mean().round()
    torch.testing.assert_close(exponents, exponent.expand_as(exponents), rtol=0, atol=1e-5)
    return int(exponent)


# --- the metrics that need data -------------------------------------------------------------------------


def test_the_metrics_are_the_nine():
    assert set(speft.METRICS) == set(ALL)


@functools.cache
def mlp_oracle(metric, seed):
    model, batches = make_mlp(seed)
    return func_oracle(metric, model, batches, sample_losses)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("metric", ("magnitude", *NEEDS_DATA))
def test_mlp_agrees_with_torch_func(metric, seed):
    model, batches = make_mlp(seed)
    assert_close(speft.salience(model, metric, batches, sample_losses), mlp_oracle(metric, seed))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("metric", ("magnitude", *NEEDS_DATA))
def test_float32_mlp_agrees_with_the_float64_oracle(metric, seed):
    model, batches = make_mlp(seed)
    model, batches = model.float(), [tuple(t.float() for t in batch) for batch in batches]
    scores = speft.salience(model, metric, batches, sample_losses)
    assert_close(scores, mlp_oracle(metric, seed), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("style", GPT_STYLES)
@pytest.mark.parametrize("metric", ("magnitude", *NEEDS_DATA))
def test_gpt_agrees_with_a_loop_over_samples(metric, style, seed):
    model, batches = make_gpt(style, seed)
    expected = loop_oracle(metric, model, batches, gpt_losses)
    rtol, atol = (1e-5, 1e-6) if metric == "grasp" else (1e-6, 1e-8)
    assert_close(speft.salience(model, metric, batches, gpt_losses), expected, rtol, atol)


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_float32_gpt_agrees_with_the_float64_oracle(metric):
    model, batches = make_gpt("llama")
    expected = loop_oracle(metric, model, batches, gpt_losses)
    assert_close(speft.salience(model.float(), metric, batches, gpt_losses), expected, rtol=1e-3, atol=1e-4)


def test_gradient_agrees_with_finite_differences():
    for seed in (0, 1, 5):  # the seeds of smooth activations
        model, batches = make_mlp(seed)
        losses, theta, weights = joint_losses(model, batches, sample_losses)
        steps = 1e-5 * torch.eye(len(theta), dtype=torch.float64)
        slopes = [(losses(theta + s).mean() - losses(theta - s).mean()) / 2e-5 for s in steps]
        scores = speft.salience(model, "force", batches, sample_losses)
        assert_close(scores, split(-torch.stack(slopes) * theta, weights), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_losses_of_samples_and_their_mean_give_the_same(metric):
    for model, batches, losses, mean in (
        (*make_mlp(4), sample_losses, mean_loss),
        (*make_gpt("gpt2"), gpt_losses, gpt_mean_loss),
    ):
        expected = speft.salience(model, metric, batches, losses)
        assert_close(speft.salience(model, metric, batches, mean), expected)


@pytest.mark.parametrize("metric", NEEDS_DATA)
@pytest.mark.parametrize("loss_fn", (sample_losses, mean_loss))
def test_the_split_into_batches_does_not_matter(metric, loss_fn):
    model, batches = make_mlp(7)
    whole = [tuple(torch.cat(tensors) for tensors in zip(*batches))]
    singles = [tuple(t[i : i + 1] for t in whole[0]) for i in range(len(whole[0][0]))]
    expected = speft.salience(model, metric, whole, loss_fn)
    assert_close(speft.salience(model, metric, batches, loss_fn), expected)
    assert_close(speft.salience(model, metric, singles, loss_fn), expected)


@pytest.mark.parametrize("metric", (*NEEDS_DATA, "synflow"))
def test_batches_may_be_a_generator(metric):
    model, batches = make_mlp(2)
    expected = speft.salience(model, metric, batches, sample_losses)
    assert_equal(speft.salience(model, metric, (batch for batch in batches), sample_losses), expected)


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_a_layer_that_the_loss_does_not_use_scores_zero(metric):
    model, batches = make_mlp(5)
    pair = nn.ModuleDict({"used": model, "unused": nn.Linear(3, 2).double()})
    used_losses = lambda pair, batch: sample_losses(pair["used"], batch)  # noqa: E731
    scores = speft.salience(pair, metric, batches, used_losses)
    unused = scores.pop("unused")
    assert unused.shape == (2, 3) and not unused.any()
    assert_close(scores, {f"used.{name}": score for name, score in mlp_oracle(metric, 5).items()})


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_scoring_runs_in_eval_mode(metric):
    model, batches = make_mlp(0)
    model.append(nn.BatchNorm1d(batches[0][1].size(1)).double())
    model.append(nn.Dropout(0.9))
    with torch.no_grad():
        for buffer in (model[-2].running_mean, model[-2].running_var):
            buffer.uniform_(1, 2)
    scores = speft.salience(model.train(), metric, batches, sample_losses)
    assert_close(scores, func_oracle(metric, model, batches, sample_losses))


# --- GRaSP and Fisher -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_fn", (lambda m, b: m(b[0]).sum(1), lambda m, b: m(b[0]).sum(1).mean()))
def test_grasp_is_zero_for_a_loss_linear_in_the_weights(loss_fn):
    torch.manual_seed(0)
    scores = speft.salience(nn.Linear(3, 2), "grasp", [(torch.randn(4, 3),), (torch.randn(1, 3),)], loss_fn)
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
    scores = speft.salience(model, "grasp", batches, loss_fn)
    assert not scores["straight"].any() and scores["bent"].any()
    assert_close(scores, func_oracle("grasp", model, batches, loss_fn))


@pytest.mark.parametrize("seed", range(3))
def test_grasp_takes_the_hessian_of_the_chosen_layers_only(seed):
    model, batches = make_mlp(seed)
    names = linear_names(model)[::2]
    scores = speft.salience(model, "grasp", batches, sample_losses, layers=names.__contains__)
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
    assert_close(speft.salience(model, metric, batches, loss_fn), expected, rtol, atol)


@pytest.mark.parametrize("make", (Pooled, Flattened))
@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_a_penalty_on_the_weights_in_the_loss_counts(metric, make):
    torch.manual_seed(0)
    model = make().double()
    batches = [tuple(torch.randn(2, size, 2, 3, dtype=torch.float64)) for size in (3, 2)]
    penalised = lambda m, batch: sample_losses(m, batch) + 0.3 * m.fc1.weight.square().sum()  # noqa: E731
    expected = loop_oracle(metric, model, batches, penalised)
    assert_close(speft.salience(model, metric, batches, penalised), expected, rtol=1e-5, atol=1e-6)


# --- SNIP and Taylor rank alike -------------------------------------------------------------------------


def assert_same_masks(model, batches, loss_fn):
    snip = speft.salience(model, "snip", batches, loss_fn)
    taylor = speft.salience(model, "taylor", batches, loss_fn)
    for scope in ("global", "local"):
        for density in (0.02, 0.1, 0.25, 0.5, 0.77, 1.0):
            assert_equal(speft.select(taylor, density, scope), speft.select(snip, density, scope))


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


# --- SynFlow --------------------------------------------------------------------------------------------


def synflow(model, *batch, **settings):
    """SynFlow has no use for a loss."""
    return speft.salience(model, "synflow", [batch], None, **settings)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("seed", range(8))
def test_synflow_on_a_chain_is_the_product_of_the_flows(seed, dtype):
    model, batches = make_mlp(seed, dtype)
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
        model, batches = make_gpt(style)
        before = synflow(model, *batches[0])
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, mean=3)
        nn.init.normal_(model.wte.weight if model.head is not None else model.wpe.weight, std=9)
        assert_equal(synflow(model, batches[1][0], batches[1][1]), before)
    model, batches = make_mlp(1)
    before = synflow(model, *batches[0])
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.bias, mean=-5)
    assert_equal(synflow(model, -7 * batches[1][0]), before)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("style", GPT_STYLES)
def test_synflow_on_a_gpt_is_the_network_linearised_by_hand(style, seed):
    for blocks in (1, 3):
        model, batches = make_gpt(style, seed, n_layer=blocks)
        assert_close(synflow(model, *batches[0]), gpt_flow(model))


@pytest.mark.parametrize("style", GPT_STYLES)
def test_synflow_gives_queries_and_keys_exactly_zero_and_all_others_more(style):
    model, batches = make_gpt(style, dtype=torch.float32)
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
    exponent = assert_close_up_to_a_power_of_two(scores, expected)
    assert exponent == 0 or join(expected).max() > torch.finfo(torch.float32).max


@pytest.mark.parametrize("std", (0.02, 0.5, 5.0))
def test_synflow_through_thirty_gated_blocks_stays_finite(std):
    """At 0.5 the flow leaves float32, at 5.0 its square, which is never formed, would leave float64."""
    model, batches = make_gpt("llama", n_layer=30, n_embd=16, n_inner=24, dtype=torch.float32)
    scramble(model, std)
    scores = synflow(model, *batches[0])
    exponent = assert_close_up_to_a_power_of_two(scores, gpt_flow(model))
    assert (exponent < 0) == (std >= 0.5)


def test_synflow_with_a_dead_gate_is_synflow_without_those_units():
    """The square root's slope at zero is infinite: units with a dead gate must score zero, not NaN."""
    model, batches = make_gpt("llama", n_inner=6)
    small, _ = make_gpt("llama", n_inner=4)
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
def test_synflow_beyond_float32_is_scaled_by_one_power_of_two(size, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(7))).to(dtype)
    for layer in model:
        nn.init.uniform_(layer.weight, 0.5 * size, 2 * size)
    scores, (expected, _) = synflow(model, torch.ones(1, 4, dtype=dtype)), chain_flow(model)
    exponent = assert_close_up_to_a_power_of_two(scores, expected)
    low, high = join(expected).aminmax()
    if 1e-36 < low and high < 3e38:
        assert exponent == 0


@pytest.mark.parametrize("part", ("attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "blocks.1"))
@pytest.mark.parametrize("metric", (*FIRST_ORDER, "synflow", "fisher"))
def test_a_subset_of_the_layers_scores_as_in_the_whole(metric, part):
    model, batches = make_gpt("llama")
    chosen = lambda name: part in name  # noqa: E731
    everything = speft.salience(model, metric, batches, gpt_losses)
    scores = speft.salience(model, metric, batches, gpt_losses, layers=chosen)
    assert_close(scores, {name: s for name, s in everything.items() if chosen(name)})


# --- which layers, what comes back ----------------------------------------------------------------------


@pytest.mark.parametrize("metric", ALL)
def test_scores_are_float32_of_the_weights_shape(metric):
    for dtype in (torch.float32, torch.float64):
        for model, batches, loss_fn in ((*make_mlp(6, dtype), sample_losses),
                                        (*make_gpt("llama", dtype=dtype), gpt_losses)):  # fmt: skip
            scores = speft.salience(model, metric, batches, loss_fn)
            assert list(scores) == linear_names(model)
            for name, score in scores.items():
                weight = model.get_submodule(name).weight
                assert score.dtype == torch.float32 and score.shape == weight.shape
                assert not score.requires_grad and score.data_ptr() != weight.data_ptr()
                assert score.isfinite().all()


@pytest.mark.parametrize("metric", ALL)
def test_the_predicate_chooses_layers_by_name(metric):
    model, batches = make_gpt("gpt2")
    asked = []

    def layers(name):
        asked.append(name)
        return name.endswith("attn.o") or name == "blocks.1.mlp.up"

    scores = speft.salience(model, metric, batches, gpt_losses, layers=layers)
    assert list(scores) == ["blocks.0.attn.o", "blocks.1.attn.o", "blocks.1.mlp.up"]
    assert set(linear_names(model)) <= set(asked)


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
    scores = speft.salience(model, metric, batches, sample_losses)
    assert list(scores) == ["plain", "other"]
    if metric in ("magnitude", *NEEDS_DATA):
        names = ["plain", "other"]
        assert_close(scores, func_oracle(metric, model, batches, sample_losses, names))


def test_a_shared_layer_is_found_before_the_predicate_narrows_the_choice():
    model = Assorted()
    with pytest.raises(ValueError, match="(?i)layer"):
        speft.salience(model, "magnitude", [], None, layers=("head", "first").__contains__)


def test_a_metric_of_ones_own_is_one_entry(monkeypatch):
    model, batches = make_mlp(3)
    seen = {}

    def cubes(scored_model, weights, scored_batches, loss_fn):
        seen.update(weights)
        assert scored_model is model and loss_fn is sample_losses
        assert [len(batch[0]) for batch in scored_batches] == [len(batch[0]) for batch in batches]
        return {name: weight.detach() ** 3 for name, weight in weights.items()}

    monkeypatch.setitem(speft.METRICS, "cubes", cubes)
    scores = speft.salience(model, "cubes", batches, sample_losses)
    assert list(seen) == linear_names(model)
    assert all(weight is model.get_submodule(name).weight for name, weight in seen.items())
    assert_equal(scores, {name: (w**3).float() for name, w in weights_of(model).items()})


def test_a_metric_of_ones_own_may_need_no_data_and_draw_random_numbers(monkeypatch):
    def coin(model, weights, batches, loss_fn):
        return {name: torch.rand(weight.shape) for name, weight in weights.items()}

    monkeypatch.setitem(speft.METRICS, "coin", coin)
    model, _ = make_mlp(1)
    first, second = (join(speft.salience(model, "coin", None, None)) for _ in range(2))
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
    model, batches = make_mlp(3)

    def shapeless(model, weights, batches, loss_fn):
        return {name: score(weight) for name, weight in weights.items()}

    monkeypatch.setitem(speft.METRICS, "shapeless", shapeless)
    fails("shapeless.*shape", model, "shapeless", batches)
    monkeypatch.setitem(speft.METRICS, "nothing", lambda *given: {})
    fails("nothing.*shape", model, "nothing", batches)


# --- random ---------------------------------------------------------------------------------------------


def test_random_draws_anew_and_repeats_under_a_seed():
    model, batches = make_mlp(1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = speft.salience(model, "random", batches, sample_losses)
    assert not torch.equal(torch.get_rng_state(), state)
    second = speft.salience(model, "random", batches, sample_losses)
    assert not torch.equal(join(first), join(second))
    torch.manual_seed(5)
    assert_equal(speft.salience(model, "random", batches, sample_losses), first)


def test_random_prefers_no_layer_and_no_weight():
    """A tenth of all weights falls on every layer in proportion, whatever its size, place and values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 100), nn.Linear(100, 100), nn.Linear(100, 20))
    model[1].weight.data *= 100
    scores = speft.salience(model, "random", [], None)
    for name, index in speft.select(scores, 0.1, "global").items():
        count = scores[name].numel()
        assert abs(len(index) - count / 10) < 5 * math.sqrt(count * 0.09)
        large = model.get_submodule(name).weight.abs().flatten()
        assert abs((large[index] > large.median()).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(len(index))


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


def bits(tensor):
    """dtype, shape, strides and every byte: -0.0 and 0.0 differ, NaN equals itself."""
    if tensor is None:
        return None
    data = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    return tensor.dtype, tensor.shape, tensor.stride(), bytes(data.tolist())


def snapshot(model):
    """Everything that scoring might leave behind, as comparable values."""
    state = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        state["parameter", name] = id(p), type(p), bits(p), p.requires_grad, p.is_leaf, p._backward_hooks
        state["later hooks", name] = bool(getattr(p, "_post_accumulate_grad_hooks", None))
        state["grad", name] = p.grad if p.grad is None else id(p.grad), bits(p.grad)
    for name, buffer in model.named_buffers():
        state["buffer", name] = id(buffer), bits(buffer)
    for name, module in model.named_modules():
        hooks = [(key, len(value)) for key, value in vars(module).items() if value and key.endswith("hooks")]
        state["module", name] = id(module), type(module), module.training, sorted(vars(module)), hooks
    cuda = torch.backends.cuda
    state["kernels"] = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
    state["modes"] = torch.is_grad_enabled(), torch.get_default_dtype(), torch._C._len_torch_function_stack()
    state["random"] = bits(torch.get_rng_state())
    return state


def assert_as_found(model, before, metric=""):
    after = snapshot(model)
    assert set(after) == set(before)
    changed = [key for key in before if before[key] != after[key] and not (key == "random" == metric)]
    assert not changed


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("grad_mode", (contextlib.nullcontext, torch.no_grad))
def test_the_model_is_left_as_found(metric, grad_mode):
    for model, batches, loss_fn in (
        (*worn_model(), sample_losses),
        (*make_gpt("gpt2", dtype=torch.float32), gpt_losses),
        (*make_gpt("llama", dtype=torch.float32), gpt_mean_loss),
    ):

        def noisy_loss(model, batch):
            return loss_fn(model, batch) + 0 * torch.rand(())  # a loss may draw random numbers

        with grad_mode():
            before = snapshot(model)
            speft.salience(model, metric, batches, noisy_loss)
            assert_as_found(model, before, metric)


@pytest.mark.parametrize("metric", ("grad", "snip", "force", "taylor", "fisher"))
def test_memory_holds_one_layers_gradient_at_a_time(metric):
    model, batches = make_gpt("llama", n_layer=3)
    held = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(other.grad is not None for other in model.parameters()))
        )
    scores = speft.salience(model, metric, batches, GPT.sample_losses)
    passes = sum(len(batch[0]) for batch in batches) if metric == "fisher" else len(batches)
    assert held == [1] * len(scores) * passes


@pytest.mark.parametrize("in_place", (True, False))
@pytest.mark.parametrize("metric", DETERMINISTIC)
def test_buffers_that_a_forward_pass_changes_are_restored(metric, in_place):
    model, batches = make_mlp(3)
    model.append(Counter(in_place))
    before = snapshot(model)
    speft.salience(model, metric, batches, sample_losses)
    assert_as_found(model, before)


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
        speft.salience(model, metric, batches, loss_fn)
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
        model, batches = make_gpt(style)
        expected = speft.salience(model, metric, batches, gpt_losses)
        model.requires_grad_(False)
        assert_equal(speft.salience(model, metric, batches, gpt_losses), expected)


@pytest.mark.parametrize("metric", DETERMINISTIC)
@pytest.mark.parametrize("loss_fn", (sample_losses, mean_loss))
def test_scoring_under_no_grad_gives_the_same(metric, loss_fn):
    model, batches = make_mlp(8)
    expected = speft.salience(model, metric, batches, loss_fn)
    with torch.no_grad():
        assert_equal(speft.salience(model, metric, batches, loss_fn), expected)


# --- sparse layers, bfloat16 ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("metric", ALL)
def test_a_sparse_model_scores_like_the_merged_one(metric, seed):
    plain, batches = make_gpt("llama" if seed % 2 else "gpt2", seed, dtype=torch.float32)
    sparse = copy.deepcopy(plain)
    indices = {name: torch.randperm(w.numel())[:5].sort().values for name, w in weights_of(plain).items()}
    indices.pop("blocks.0.mlp.up")  # sparse and plain layers side by side
    speft.sparsify(sparse, indices)
    for name, index in indices.items():
        delta = torch.randn(len(index))
        sparse.get_submodule(name).delta.data.copy_(delta)
        plain.get_submodule(name).weight.data.view(-1)[index] += delta
    twin = copy.deepcopy(sparse)
    torch.manual_seed(seed)
    scores = speft.salience(sparse, metric, batches, gpt_losses)
    torch.manual_seed(seed)
    assert_equal(scores, speft.salience(plain, metric, batches, gpt_losses))
    assert_equal(sparse.state_dict(), twin.state_dict())
    assert all(p.grad is None for p in sparse.parameters())


@pytest.mark.parametrize("metric", DETERMINISTIC)
def test_scoring_a_sparse_model_leaves_it_as_found(metric):
    model, batches = make_gpt("gpt2", dtype=torch.float32)
    deltas = speft.sparsify(model, {name: torch.arange(3) for name in linear_names(model)})
    for delta in deltas:
        nn.init.normal_(delta)
    gpt_mean_loss(model, batches[0]).backward()
    twin = twin_of(model)
    before = snapshot(model)
    speft.salience(model, metric, batches, gpt_losses)
    assert_as_found(model, before)
    for each in (model, twin):
        gpt_mean_loss(each, batches[1]).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert bits(p.grad) == bits(q.grad), name


@pytest.mark.parametrize("style", GPT_STYLES)
@pytest.mark.parametrize("metric", DETERMINISTIC)
def test_bfloat16_weights_score_within_their_precision(metric, style):
    model, batches = make_gpt(style, dtype=torch.bfloat16, n_embd=8)
    exact = copy.deepcopy(model).double()
    scores = speft.salience(model, metric, batches, gpt_losses)
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
    one = speft.salience(model, metric, [batch], loss_fn)
    assert_close(speft.salience(model, metric, [batch] * 700, loss_fn), one, rtol=0.03, atol=0.03)


# --- errors ---------------------------------------------------------------------------------------------


def fails(match, model, metric, batches, loss_fn=sample_losses, **settings):
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        speft.salience(model, metric, batches, loss_fn, **settings)
    assert_as_found(model, before, metric)


def test_an_unknown_metric_is_named():
    model, batches = make_mlp(1)
    for name in ("hessian-trace", "Grad", ""):
        fails(name or "metric", model, name, batches)


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_a_metric_that_needs_data_refuses_empty_batches(metric):
    model, _ = make_mlp(1)
    fails("(?i)batch", model, metric, [])
    fails("(?i)batch", model, metric, iter(()))


def test_magnitude_and_random_need_no_data():
    model, _ = make_mlp(1)
    expected = {name: w.abs().float() for name, w in weights_of(model).items()}
    assert_equal(speft.salience(model, "magnitude", [], None), expected)
    assert list(speft.salience(model, "random", [], None)) == linear_names(model)


@pytest.mark.parametrize("metric", ALL)
def test_no_matching_layer_is_an_error(metric):
    model, batches = make_mlp(1)
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
    fails("finite|nan|inf", model, metric, [(torch.randn(3, 3), torch.randn(3, 2))])
    only_broken = ("broken",).__contains__
    fails("broken", model, metric, [(torch.randn(3, 3), torch.randn(3, 2))], layers=only_broken)


@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_a_loss_that_is_nan_is_an_error(metric):
    model, batches = make_mlp(1)
    fails("finite|nan", model, metric, batches, lambda m, b: sample_losses(m, b) * math.nan)


@pytest.mark.parametrize("loss_fn", (sample_losses, mean_loss))
@pytest.mark.parametrize("scale", (1e-60, 1e60))
@pytest.mark.parametrize("metric", NEEDS_DATA)
def test_every_metric_is_scaled_into_float32_by_one_power_of_two(metric, scale, loss_fn):
    """Where float64 gradients leave float32's range; as zeros or infinities they could not be ranked."""
    model, batches = make_mlp(1)
    scaled = lambda m, b: scale * loss_fn(m, b)  # noqa: E731
    expected = func_oracle(metric, model, batches, lambda m, b: scale * sample_losses(m, b))
    assert_close_up_to_a_power_of_two(speft.salience(model, metric, batches, scaled), expected)
