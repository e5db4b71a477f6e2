"""SynFlow on other people's networks: right, against networks linearised by hand, or refused by name."""

import dataclasses

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

from helpers import linears, scramble
from oracles import assert_close, chain_flow, join
from speft import salience


def synflow(model, batch, **settings):
    return salience(model, "synflow", [batch], None, **settings)


def positive(model):
    """Every parameter's absolute value in float64, by name; what trains in the network written by hand."""
    return {name: p.detach().double().abs().requires_grad_() for name, p in model.named_parameters()}


def flow(model, p, total):
    """The scores, of the network by hand whose outputs add up to `total`."""
    total.backward()
    weights = {name: p[f"{name}.weight"] for name in linears(model)}
    return {n: torch.zeros_like(w) if w.grad is None else (w.grad * w).detach() for n, w in weights.items()}


# --- modules of PyTorch's -------------------------------------------------------------------------------


def attention_by_hand(p, name, x):
    """Of ones everywhere, all positions are alike: their mean is each of them."""
    value = p[f"{name}.in_proj_weight"].chunk(3)[2]
    return x @ value.T @ p[f"{name}.out_proj.weight"].T


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("norm_first", (False, True))
@pytest.mark.parametrize("batch_first", (False, True))
def test_a_transformer_encoder(batch_first, norm_first, masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=norm_first)
    model = scramble(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    if masked:
        mask = nn.Transformer.generate_square_subsequent_mask(1 if not batch_first else 4)
        model.forward = lambda x: nn.TransformerEncoder.forward(model, x, mask=mask)
    p = positive(model)
    x = torch.ones((1, 4, 8), dtype=torch.float64)
    for i in range(2):
        n = f"layers.{i}"
        one, two = (p[f"{n}.norm{j}.weight"] for j in (1, 2))
        if norm_first:
            x = x + attention_by_hand(p, f"{n}.self_attn", x * one)
            x = x + (x * two) @ p[f"{n}.linear1.weight"].T @ p[f"{n}.linear2.weight"].T
        else:
            x = (x + attention_by_hand(p, f"{n}.self_attn", x)) * one
            x = (x + x @ p[f"{n}.linear1.weight"].T @ p[f"{n}.linear2.weight"].T) * two
    del p["layers.0.self_attn.out_proj.weight"], p["layers.1.self_attn.out_proj.weight"]
    expected = {f"layers.{i}.linear{j}": p[f"layers.{i}.linear{j}.weight"] for i in range(2) for j in (1, 2)}
    x.sum().backward()
    expected = {name: (w.grad * w).detach() for name, w in expected.items()}
    assert_close(synflow(model, (torch.randn(3, 4, 8),)), expected)


class Crossed(nn.Module):
    """Five latents attend to the input's positions, in a module and by the function."""

    def __init__(self, heads):
        super().__init__()
        self.latent, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 2 * heads), nn.Linear(4, 2 * heads)
        self.out, self.heads = nn.Linear(4, 3), heads

    def forward(self, x):
        query = self.latent(x[:, :5]).view(-1, 5, 2, 2).transpose(1, 2)
        key, value = self.key(x), self.value(x)
        key, value = (part.view(len(x), -1, self.heads, 2).transpose(1, 2) for part in (key, value))
        y = F.scaled_dot_product_attention(query, key, value, enable_gqa=self.heads == 1)
        return self.out(y.transpose(1, 2).reshape(-1, 5, 4))


@pytest.mark.parametrize("heads", (1, 2))
def test_grouped_heads_and_queries_of_another_number(heads):
    torch.manual_seed(0)
    model = scramble(Crossed(heads))
    p = positive(model)
    value = p["value.weight"].sum(1)
    y = torch.cat((value, value)) if heads == 1 else value
    expected = flow(model, p, 5 * (p["out.weight"] @ y).sum())
    assert_close(synflow(model, (torch.randn(2, 7, 4),)), expected)
    assert not expected["latent"].any() and not expected["key"].any()


class Residual(nn.Module):
    """Convolutions with norms and a shortcut, before a linear layer."""

    def __init__(self, norm):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, stride=1, padding=1, groups=2)
        self.norm, self.head = norm, nn.Linear(4, 5)

    def forward(self, x):
        x = self.first(x)
        x = x + F.relu(self.norm(self.second(x)))
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


NORMS = (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False))


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_a_residual_convolutional_network(norm):
    torch.manual_seed(0)
    model = scramble(Residual(norm))
    p = positive(model)
    x = F.conv2d(torch.ones(1, 3, 6, 6, dtype=torch.float64), p["first.weight"], padding=1)
    gain = p["norm.weight"].view(4, 1, 1) if "norm.weight" in p else 1
    x = x + gain * F.conv2d(x, p["second.weight"], padding=1, groups=2)
    expected = flow(model, p, (F.max_pool2d(x, 2).mean((2, 3)) @ p["head.weight"].T).sum())
    assert_close(synflow(model, (torch.randn(2, 3, 6, 6),)), expected)


# --- norms, attention and positions written by hand -----------------------------------------------------


class ByHand(nn.Module):
    """A linear layer, something between, and another."""

    def __init__(self, between, size=4):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, size), nn.Linear(size, 2)
        self.gain = nn.Parameter(torch.randn(size))
        self.between = between
        self.register_buffer("position", torch.randn(5, size))
        self.register_buffer("bias", torch.ones(1, 6, 6).tril())

    def forward(self, x):
        return self.fc2(self.between(self, self.fc1(x)))


def attend(m, x):
    scores = x @ x.transpose(-2, -1) / 2 + torch.full((5, 5), -torch.inf).triu(1)
    return scores.softmax(-1) @ x


def attend_by_function(m, x):
    return torch.bmm(F.softmax(torch.bmm(x, x.mT).masked_fill(torch.ones(5, 5).triu(1) > 0, -9e9), dim=2), x)


def write_to_zeros(m, x):
    out = torch.zeros_like(x)
    out[:, :2], out[:, 2:] = x[:, :2], x[:, 2:]
    return out


def by_root_mean_square(x):
    return x * (x**2).mean(-1, True).rsqrt()


def attend_by_keyword(m, x):
    weights = F.softmax(input=torch.matmul(input=x, other=x.transpose(-2, -1)), dim=-1)
    return torch.matmul(other=x, input=weights)


def attend_with_bias(m, x):
    """As in transformers' BLOOM."""
    scores = torch.baddbmm(m.bias[:, :5, :5].expand(len(x), 5, 5), x, x.transpose(-2, -1), alpha=0.5)
    return torch.bmm(F.softmax(scores, dim=-1), x)


def nano(m, x):
    """As in nanoGPT: the mask is called a bias, and is none."""
    scores = (x @ x.transpose(-2, -1)) * 0.5
    return F.softmax(scores.masked_fill(m.bias[:, :5, :5] == 0, float("-inf")), dim=-1) @ x


PLAIN = {  # what passes the signal on as it is, or for its gain
    "position": lambda m, x: x + m.position,
    "position first": lambda m, x: m.position + x,
    "minus a constant": lambda m, x: x - m.position,
    "in place": lambda m, x: x.add_(m.position).relu_(),
    "attention": attend,
    "attention as in nanoGPT": nano,
    "attention by keyword": attend_by_keyword,
    "attention with a bias": attend_with_bias,
    "in parts": write_to_zeros,
    "an added bias": lambda m, x: x + m.gain,
    "an added number": lambda m, x: x + 1.5,
    "to a number": lambda m, x: 2 + x,
    "a number in place": lambda m, x: x.add_(-3),
    "less a number": lambda m, x: torch.sub(x, 0.5, alpha=2),
    "the other way round": lambda m, x: -1.0 * x,
    "before more positions": lambda m, x: torch.concat((x, m.position.expand(len(x), -1, -1)), 1),
    "behind a class": lambda m, x: torch.cat((m.position[:1].expand(len(x), 1, 4), x), 1)[:, 1:],
    "joined": lambda m, x: torch.concatenate((x, m.position.expand(len(x), -1, -1)), -1)[..., :4],
    "beside": lambda m, x: torch.hstack((m.position.expand(len(x), -1, -1), x)),
    "on a stack": lambda m, x: torch.stack((m.position.expand(len(x), -1, -1), x)).sum(0),
    "subtract": lambda m, x: torch.subtract(x, m.position),
    "a matrix of float32": lambda m, x: x @ torch.eye(4),
    "masked": lambda m, x: x * torch.ones(5, 1, dtype=torch.bool),
    "divided": lambda m, x: torch.true_divide(torch.divide(x, torch.tensor(-1.0)), -1.0),
}
GAIN = {
    "rsqrt": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.gain,
    "gain first": lambda m, x: m.gain * (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()),
    "power": lambda m, x: x * (x**2).mean(-1, keepdim=True) ** -0.5 * m.gain,
    "as float32": lambda m, x: m.gain.float() * by_root_mean_square(x.float()).to(x.dtype),
    "plain": lambda m, x: x * m.gain,
    "layer norm": lambda m, x: F.layer_norm(x, (4,), m.gain, torch.ones(4)),
}


@pytest.mark.parametrize("spelled", (*PLAIN, *GAIN))
def test_norms_attention_and_positions_by_hand(spelled):
    torch.manual_seed(0)
    model = ByHand((PLAIN | GAIN)[spelled])
    p = positive(model)
    gain = p["gain"] if spelled in GAIN else 1
    expected = flow(model, p, 5 * (p["fc2.weight"] @ (p["fc1.weight"].sum(1) * gain)).sum())
    assert_close(synflow(model, (torch.randn(2, 5, 3),)), expected)


ACTIVATIONS = {  # GELU by hand, and what it takes off the signal: its 1 counts not at all
    "tanh": (lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.045 * torch.pow(x, 3.0)))), 0.5 * 0.8 * 1.045),
    "erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.4142)), 0.5 / 1.4142),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_by_hand_is_the_geometric_mean_of_its_factors(name):
    """In BERT and GPT-2, for example. A power passes the signal on."""
    torch.manual_seed(0)
    activation, factor = ACTIVATIONS[name]
    model = ByHand(lambda m, x: activation(x))
    p, factor = positive(model), factor**0.5
    expected = flow(model, p, factor * 5 * (p["fc2.weight"] @ p["fc1.weight"].sum(1)).sum())
    assert_close(synflow(model, (torch.randn(2, 5, 3),)), expected)


def test_a_norm_over_two_dimensions_is_its_gain():
    torch.manual_seed(0)
    model = ByHand(lambda m, x: m.norm(x))
    model.norm = nn.LayerNorm((5, 4))
    nn.init.normal_(model.norm.weight)
    p = positive(model)
    expected = flow(model, p, (p["fc1.weight"].sum(1) * p["norm.weight"] @ p["fc2.weight"].T).sum())
    assert_close(synflow(model, (torch.randn(2, 5, 3),)), expected)


# --- however it is spelled ------------------------------------------------------------------------------


def last_first(x):
    return x.transpose(-2, -1)


def as_conv1d(m, x):
    """transformers' Conv1D: the bias comes first."""
    return torch.addmm(m.shift_bias, x.reshape(-1, 4), m.square).view(x.shape)


KERNEL = {  # a convolution over positions, its bias and padding given in every way
    "by place": lambda m, x: F.conv1d(last_first(x), m.kernel, m.shift_bias, 1, 2),
    "by keyword": lambda m, x: F.conv1d(last_first(x), m.kernel, padding=2, bias=m.shift_bias),
    "all by keyword": lambda m, x: F.conv1d(
        padding=2, weight=m.kernel, bias=m.shift_bias, input=last_first(x)
    ),
    "without a bias": lambda m, x: F.conv1d(last_first(x), m.kernel, padding=2),
    "in a module": lambda m, x: m.conv(last_first(x)),
}
SQUARE = {  # a product with a matrix
    "matmul": lambda m, x: x @ m.square,
    "addmm": as_conv1d,
    "of a view": lambda m, x: x @ m.square.view(16).view(4, 4),
    "transposed": lambda m, x: F.linear(x, m.square.T, m.shift_bias),
    "einsum": lambda m, x: torch.einsum("btc,cd->btd", x, m.square),
    "of a buffer": lambda m, x: x @ m.constant,
    "of its positive part": lambda m, x: F.linear(x, (F.relu(m.square) + F.relu(-m.square)).T),
    "of a sum": lambda m, x: x @ (m.square - 2 * m.square),
    "with a bias of another name": lambda m, x: F.linear(x, m.square.T, m.gain),
    "in pieces": lambda m, x: torch.cat([x @ part for part in m.square.chunk(2, 1)], -1),
}
ONE_MORE_GAIN = {
    "a row": lambda m, x: x * m.gain[None],
    "one more than a matrix": lambda m, x: x * (1 + (m.gain - 1).expand(5, 4)),
    "its inverse's inverse": lambda m, x: x / (1 / m.gain),
    "einsum of a gain": lambda m, x: torch.einsum("btc,c->btc", x, m.gain),
    "by the signal's type": lambda m, x: x * m.gain.to(x) + m.position.to(x),
    "layer norm by keyword": lambda m, x: F.layer_norm(
        x, bias=m.shift_bias, weight=m.gain, normalized_shape=(4,)
    ),
    "layer norm, eps first": lambda m, x: F.rms_norm(x, (4,), eps=1e-6, weight=m.gain),
    "attention by keyword": lambda m, x: m.gain * F.scaled_dot_product_attention(value=x, key=-x, query=x),
}


class Spelled(ByHand):
    """Something of other parameters, of both signs, between two linear layers."""

    def __init__(self, between):
        super().__init__(between)
        self.kernel, self.square = nn.Parameter(torch.randn(4, 4, 5)), nn.Parameter(torch.randn(4, 4))
        self.shift_bias = nn.Parameter(torch.randn(4))
        self.conv = nn.Conv1d(4, 4, 5, padding=2)
        self.conv.weight = self.kernel
        self.register_buffer("constant", self.square.detach())


@pytest.mark.parametrize("spelled", (*KERNEL, *SQUARE, *ONE_MORE_GAIN))
def test_a_weight_counts_by_its_size_and_a_bias_not_at_all_however_they_are_spelled(spelled):
    torch.manual_seed(0)
    between = (KERNEL | SQUARE | ONE_MORE_GAIN)[spelled]
    model = Spelled((lambda m, x: last_first(between(m, x))) if spelled in KERNEL else between)
    p = positive(model)
    x = p["fc1.weight"].sum(1).expand(5, 4)
    if spelled in KERNEL:
        padded = F.pad(x, (0, 0, 2, 2))
        kernel = model.conv.weight.detach().double().abs()
        x = torch.stack([sum(kernel[:, :, k] @ padded[t + k] for k in range(5)) for t in range(5)])
    x = x @ p["square"] if spelled in SQUARE else x * p["gain"] if spelled in ONE_MORE_GAIN else x
    assert_close(synflow(model, (torch.randn(2, 5, 3),)), flow(model, p, (x @ p["fc2.weight"].T).sum()))


def test_a_scored_weight_is_followed_through_whatever_is_made_of_it():
    """Two linear layers as one product, and one the other way round."""
    torch.manual_seed(0)
    model = ByHand(None)
    joined = lambda m, x: F.linear(F.linear(x, m.fc1.weight), torch.cat((m.fc2.weight, m.fc2.weight.flip(1))))
    model.forward = lambda x: joined(model, x) @ torch.cat((model.fc2.weight, model.fc1.weight.T[:2]))[:, :3]
    p = positive(model)
    out = torch.cat((p["fc2.weight"], p["fc2.weight"].flip(1))) @ p["fc1.weight"].sum(1)
    back = torch.cat((p["fc2.weight"], p["fc1.weight"].T[:2]))[:, :3]
    assert_close(synflow(model, (torch.randn(2, 3),)), flow(model, p, (out @ back).sum()))


@pytest.mark.parametrize("dtype", (torch.uint8, torch.bool, torch.float16))
def test_pixels_are_no_token_ids(dtype):
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    expected, _ = chain_flow(chain)
    chain.forward = lambda pixels: nn.Sequential.forward(chain, pixels.float() / 4)
    scores = synflow(chain, (torch.ones(2, 5, 3).to(dtype),))
    assert_close(scores, {name: 5 / 4 * score for name, score in expected.items()})


class Placed(nn.Module):
    """Token embeddings and, through a linear layer of its own, a table of positions."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__()
        self.embedding, self.place = nn.Embedding(9, 4), nn.Linear(3, 4)
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("table", torch.randn(6, 3))

    def forward(self, ids):
        x = self.embedding(ids) + self.place(self.table[: ids.size(1)])
        return self.fc2(F.relu(self.fc1(x)))


@pytest.mark.parametrize("seed", range(5))
def test_a_layer_that_reads_no_signal_is_a_bias(seed):
    model = Placed(seed)
    p = positive(model)
    expected = flow(model, p, (p["fc2.weight"] @ p["fc1.weight"].sum(1)).sum())
    assert_close(synflow(model, (torch.randint(9, (2, 5)),)), expected)
    assert not expected["place"].any()


class OneHot(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(9, 4), nn.Linear(4, 2)

    def forward(self, ids):
        return self.fc2(self.fc1(F.one_hot(ids, 9).to(self.fc1.weight.dtype)))


def test_one_hot_vectors_count_as_ones_like_any_input():
    torch.manual_seed(0)
    model = OneHot()
    expected, _ = chain_flow(nn.Sequential(model.fc1, model.fc2))
    expected = {f"fc{int(name) + 1}": score for name, score in expected.items()}
    assert_close(synflow(model, (torch.randint(9, (2, 5)),)), expected)


def centred(m, x):
    x = x - x.mean(-1, keepdim=True)
    return x + 0 * x.square()


CUT_OFF = {
    "looked up by hand": lambda m, x: m.square[x.long().flatten() % 4],
    "centred": centred,
    "detached": lambda m, x: x.detach(),
    "times zero": lambda m, x: 0.0 * x,
}


@pytest.mark.parametrize("how", CUT_OFF)
def test_a_network_that_passes_no_signal_on_is_refused(how):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="SynFlow: the model subtracts, or no scored weight lies between"):
        synflow(Spelled(CUT_OFF[how]), (torch.randn(2, 5, 3),))


# --- what is refused ------------------------------------------------------------------------------------


def add_to_zeros(m, x):
    out = torch.zeros_like(x)
    out.index_add_(1, torch.arange(5), x)
    return out


REFUSED = {
    "exp": lambda m, x: x.exp(),
    "div": lambda m, x: x / x.norm(dim=-1, keepdim=True),
    "sqrt": lambda m, x: x * x.mean(-1, keepdim=True).sqrt(),
    "softmax": lambda m, x: x.softmax(-1),
    "log_softmax": lambda m, x: F.log_softmax(x, -1),
    "instance_norm": lambda m, x: F.instance_norm(x),
    "clamp": lambda m, x: x.clamp(max=1e-4),
    "masked_fill": attend_by_function,
    "index_add": add_to_zeros,
    "sin": lambda m, x: torch.sin(x),
}


@pytest.mark.parametrize("operation", REFUSED)
def test_what_is_not_linear_is_refused_by_name(operation):
    torch.manual_seed(0)
    model = ByHand(REFUSED[operation])
    with pytest.raises(ValueError, match=f"SynFlow: the operation {operation} of the model is not linear"):
        synflow(model, (torch.randn(2, 5, 3),))


@pytest.mark.parametrize("minus", (lambda x: x - x.mean(-1, keepdim=True), lambda x: x - 2 * x.flip(-1)))
def test_a_subtraction_of_signals_is_refused(minus):
    """A layer norm by hand would take the mean off, which is all of the flow."""
    torch.manual_seed(0)
    model = ByHand(lambda m, x: minus(x))
    with pytest.raises(ValueError, match="SynFlow: the model subtracts"):
        synflow(model, (torch.randn(2, 5, 3),))


# --- what a model takes and returns ---------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    loss: object
    logits: torch.Tensor


RETURNS = {
    "dict": lambda y: {"loss": None, "logits": y},
    "dataclass": lambda y: Output(None, y),
    "tuple": lambda y: (y, "more"),
    "nested": lambda y: [None, {"logits": (y, y)}],
}


@pytest.mark.parametrize("kind", RETURNS)
def test_the_first_tensor_of_what_is_returned_counts(kind):
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = chain

        def forward(self, x):
            return RETURNS[kind](self.chain(x))

    expected = {f"chain.{name}": score for name, score in chain_flow(chain)[0].items()}
    assert_close(synflow(Wrapped(), (torch.randn(2, 3),)), expected)


# --- transformers ---------------------------------------------------------------------------------------


def llama(heads, attention):
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=heads, max_position_embeddings=32, attn_implementation=attention)  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("heads", (1, 2, 4))
def test_the_llama_of_transformers(heads, attention):
    torch.manual_seed(0)
    model = scramble(llama(heads, attention), std=0.3)
    p, x = positive(model), torch.ones(16, dtype=torch.float64)
    for i in range(2):
        n = f"model.layers.{i}."
        value = p[n + "self_attn.v_proj.weight"] @ (x * p[n + "input_layernorm.weight"])
        value = value.view(heads, 4).repeat_interleave(4 // heads, 0).flatten()
        x = x + p[n + "self_attn.o_proj.weight"] @ value
        y = x * p[n + "post_attention_layernorm.weight"]
        gate, up = (p[n + f"mlp.{part}_proj.weight"] @ y for part in ("gate", "up"))
        x = x + p[n + "mlp.down_proj.weight"] @ (gate * up).sqrt()
    expected = flow(model, p, (p["lm_head.weight"] @ (x * p["model.norm.weight"])).sum())
    ids = torch.randint(31, (2, 5))
    scores = synflow(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert_close(scores, expected)
    assert (join(scores) > 0).any()


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_the_bert_of_transformers(attention):
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                     num_attention_heads=4, attn_implementation=attention)  # fmt: skip
    model = scramble(transformers.BertForSequenceClassification(config), std=0.3)
    p = positive(model)
    x = 3 * p["bert.embeddings.LayerNorm.weight"]  # word, place and kind
    for i in range(2):
        n = f"bert.encoder.layer.{i}."
        value = p[n + "attention.self.value.weight"] @ x
        x = (x + p[n + "attention.output.dense.weight"] @ value) * p[n + "attention.output.LayerNorm.weight"]
        inner = p[n + "intermediate.dense.weight"] @ x
        x = (x + p[n + "output.dense.weight"] @ inner) * p[n + "output.LayerNorm.weight"]
    expected = flow(model, p, (p["classifier.weight"] @ (p["bert.pooler.dense.weight"] @ x)).sum())
    assert_close(synflow(model, {"input_ids": torch.randint(31, (2, 5))}), expected)
