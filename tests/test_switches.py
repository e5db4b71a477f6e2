"""The switches that make the GPT an OPT-350m, a Mistral, a Qwen or a Gemma, and every metric through them."""

import math

import pytest
import torch
from torch import nn

import speft
from model import GPT, Cache, GPTConfig, attend

ROTARY = dict(rms_norm=True, gated_mlp=True, rope_theta=100.0, n_kv_head=1, activation="silu", n_inner=9,
              qkv_bias=False, out_bias=False, mlp_bias=False)  # fmt: skip
GEMMA = ROTARY | dict(norm_offset=True, out_norms=True, scale_wte=True, query_scalar=5.0, head_dim=6)
STYLES = {
    "opt350": dict(pre_norm=False, n_wte=5, activation="relu"),
    "mistral": ROTARY | dict(windows=[3, 3], tied_head=False),
    "qwen3": ROTARY | dict(qk_norm=True, windows=[None, 3]),
    "gemma2": GEMMA | dict(activation="gelu_pytorch_tanh", attn_cap=1.5, logit_cap=4.0, windows=[3, None]),
    "gemma3": GEMMA | dict(qk_norm=True, windows=[3, None], rope_local_theta=10.0),
}


def make(style, seed=0, std=0.4, **changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=8)
    model = GPT(GPTConfig(**(shape | STYLES[style] | changes))).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def linear_names(model):
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def batch_of(model, length=8):
    return tuple(torch.randint(0, model.config.vocab_size, (2, 3, length)))


# --- attention ------------------------------------------------------------------------------------------


def attend_by_hand(q, k, v, window, scale, cap):
    """One sample, one head, one new position at a time."""
    y = torch.zeros(*q.shape[:3], v.size(3), dtype=q.dtype)
    T, S = q.size(2), k.size(2)
    for b in range(q.size(0)):
        for h in range(q.size(1)):
            for t in range(T):
                at = S - T + t
                seen = range(0 if window is None else max(0, at - window + 1), at + 1)
                scores = [(q[b, h, t] @ k[b, h, s]).item() * scale for s in seen]
                if cap:
                    scores = [cap * math.tanh(score / cap) for score in scores]
                weights = [math.exp(score) for score in scores]
                for weight, s in zip(weights, seen):
                    y[b, h, t] += weight / sum(weights) * v[b, h, s]
    return y


@pytest.mark.parametrize("cap", (None, 0.7))
@pytest.mark.parametrize("window", (None, 1, 3, 6, 9))
def test_attention_agrees_with_a_loop_over_positions(window, cap):
    torch.manual_seed(0)
    for new, old in ((1, 0), (1, 5), (6, 0), (2, 4), (3, 1)):
        q = torch.randn(2, 3, new, 4, dtype=torch.float64)
        k, v = torch.randn(2, 2, 3, new + old, 4, dtype=torch.float64)
        for scale in (None, 0.9):
            expected = attend_by_hand(q, k, v, window, scale or 0.5, cap)
            torch.testing.assert_close(attend(q, k, v, window, scale, cap), expected)


@pytest.mark.parametrize("style", STYLES)
def test_the_cache_read_in_pieces_gives_the_same_and_keeps_no_more_than_the_window(style):
    model = make(style)
    idx = torch.randint(0, 11, (2, 16))
    cache, read = Cache(2), []
    for piece in idx.split([4, 1, 1, 5, 3, 2], dim=1):
        read.append(model.features(piece, cache))
    torch.testing.assert_close(torch.cat(read, dim=1), model.features(idx))
    for window, (keys, values) in zip(model.config.windows, cache.blocks):
        assert keys.size(2) == values.size(2) == (16 if window is None else window - 1)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", range(3))
def test_generation_goes_on_past_windows_and_context_as_without_a_cache(style, seed):
    model = make(style, seed)
    idx = torch.randint(0, 11, (3, 2 + seed))
    expected = idx
    for _ in range(20):
        logits = model(expected[:, -16:])[0]
        expected = torch.cat((expected, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(idx, 20), expected)


def test_a_layer_with_a_window_is_blind_to_what_lies_before_it():
    model = make("mistral", windows=[3, None])
    block = model.blocks[0]
    x = torch.randn(1, 8, 8, dtype=torch.float64)
    y = block(x)
    changed = x.clone()
    changed[:, 2] += 1
    differs = (block(changed) != y).any(-1)[0].tolist()
    assert differs == [False, False, True, True, True, False, False, False]


@pytest.mark.parametrize(("changes", "named"), [
    ({"windows": [3]}, "1 windows for 2 layers"),
    ({"n_head": 3, "head_dim": None}, "3 heads"),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        make("gemma3", **changes)


# --- metrics --------------------------------------------------------------------------------------------


def flow(model):
    """SynFlow's scores, the linearised network written out over one position."""
    config = model.config
    p = {name: t.detach().double() for name, t in model.named_parameters()}
    gains = {n: t + 1 if config.norm_offset and t.dim() == 1 else t for n, t in p.items()}
    p = {n: t.abs().requires_grad_() for n, t in gains.items()}
    x = torch.ones(config.n_wte, dtype=torch.float64)
    if config.scale_wte:
        x = x * config.n_embd**0.5
    if "proj_in.weight" in p:
        x = p["proj_in.weight"] @ x
    if not config.rope_theta:
        x = x + 1
    gain = lambda name, x: x * p[name] if name in p else x  # noqa: E731
    for i in range(config.n_layer):
        block = f"blocks.{i}."
        y = gain(block + "norm1.weight", x) if config.pre_norm else x
        heads = (p[block + "attn.v.weight"] @ y).view(config.n_kv_head, config.head_dim)
        heads = heads.repeat_interleave(config.n_head // config.n_kv_head, dim=0)
        y = p[block + "attn.o.weight"] @ heads.flatten()
        x = x + gain(block + "norm1_out.weight", y)
        x = x if config.pre_norm else gain(block + "norm1.weight", x)
        y = gain(block + "norm2.weight", x) if config.pre_norm else x
        inner = p[block + "mlp.up.weight"] @ y
        if config.gated_mlp:
            inner = inner.sqrt() * (p[block + "mlp.gate.weight"] @ y).sqrt()
        y = p[block + "mlp.down.weight"] @ inner
        x = x + gain(block + "norm2_out.weight", y)
        x = x if config.pre_norm else gain(block + "norm2.weight", x)
    x = gain("norm.weight", x)
    if "proj_out.weight" in p:
        x = p["proj_out.weight"] @ x
    (p["wte.weight" if config.tied_head else "head"] @ x).sum().backward()
    weights = {name: p[f"{name}.weight"] for name in linear_names(model)}
    return {n: torch.zeros_like(w) if w.grad is None else (w.grad * w).detach() for n, w in weights.items()}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("style", STYLES)
def test_synflow_is_the_network_linearised_by_hand(style, seed):
    model = make(style, seed)
    scores, expected = speft.salience(model, "synflow", [batch_of(model)], GPT.sample_losses), flow(model)
    largest = max(score.max() for score in expected.values())
    for name, score in scores.items():
        torch.testing.assert_close(score.double(), expected[name], rtol=1e-6, atol=1e-9 * largest)
        if name.endswith(("attn.q", "attn.k")):
            assert not score.any(), name  # the only position looks at itself, whatever it is asked
        else:
            assert (score > 0).all(), name


@pytest.mark.parametrize("style", ("gemma2", "gemma3"))
def test_synflow_through_thirty_blocks_stays_finite(style):
    """Products of queries and keys, which are never formed, would leave float64."""
    model = make(style, std=5.0, n_layer=30, n_embd=16, windows=[3, None] * 15)
    scores = speft.salience(model, "synflow", [batch_of(model)], GPT.sample_losses)
    for name, score in scores.items():
        assert score.isfinite().all() and bool(score.any()) != name.endswith(("attn.q", "attn.k")), name


@pytest.mark.parametrize("style", STYLES)
def test_grasp_agrees_with_finite_differences_of_the_gradient(style):
    model = make(style)
    batch = batch_of(model)
    weights = {name: model.get_submodule(name).weight for name in linear_names(model)}

    def gradient():
        return torch.autograd.grad(model(*batch)[1], list(weights.values()))

    scores, g, step = speft.salience(model, "grasp", [batch], GPT.sample_losses), gradient(), 1e-6
    beside = []
    for sign in (1, -2):  # to θ + εg, from there to θ − εg
        with torch.no_grad():
            for weight, part in zip(weights.values(), g):
                weight += sign * step * part
        beside.append(gradient())
    for (name, weight), part, above, below in zip(weights.items(), g, *beside):
        expected = -(above - below) / (2 * step) * (weight.detach() + step * part)
        torch.testing.assert_close(scores[name].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_every_metric_scores_every_layer_and_a_sparse_step_lowers_the_loss(style):
    model = make(style).float()
    batch = batch_of(model)
    for metric in speft.METRICS:
        scores = speft.salience(model, metric, [batch], GPT.sample_losses)
        assert list(scores) == linear_names(model) and all(s.isfinite().all() for s in scores.values())
        assert sum(score.count_nonzero() for score in scores.values()) > 0, metric
    deltas = speft.sparsify(model, speft.select(scores, 0.2, "global"))
    before = model(*batch)[1]
    before.backward()
    with torch.no_grad():
        for delta in deltas:
            delta -= 1e-3 * delta.grad
        assert model(*batch)[1] < before
