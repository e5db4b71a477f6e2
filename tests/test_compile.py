"""torch.compile takes a sparsified model whole: one graph, and the losses that it has without."""

import copy

import pytest
import torch
import torch.nn as nn
from torch._dynamo.testing import CompileCounterWithBackend

import speft
from helpers import GPT_STYLES, random_index
from model import GPT, GPTConfig

pytestmark = pytest.mark.slow


class Block(nn.Module):
    """A block of a GPT with a loss at its end."""

    def __init__(self, style):
        super().__init__()
        shape = dict(n_embd=64, n_head=4, n_layer=1, n_inner=128) | GPT_STYLES[style] | {"n_kv_head": 2}
        config = GPTConfig(**shape)
        self.block, self.turns = GPT(config).blocks[0], None
        if config.rope_theta:
            angles = torch.linspace(0, 1, 8 * 8).view(8, 8)
            self.turns = angles.cos(), angles.sin()

    def forward(self, x):
        return self.block(x, self.turns)


def mlp():
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 64, bias=False))


MODELS = {"mlp": mlp, "gpt2": lambda: Block("gpt2"), "llama": lambda: Block("llama")}
DENSITY = {"covered": 0.002, "dense": 0.9}  # of the plan that every layer's mask is given


def losses_of(whole, deltas, steps=4):
    """The losses of some steps on random data."""
    generator, losses = torch.Generator().manual_seed(1), []
    optimizer = torch.optim.AdamW(deltas, lr=0.05)
    for _ in range(steps):
        x, y = torch.randn(2, 2, 8, 64, generator=generator)
        optimizer.zero_grad()
        loss = (whole(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("plan", DENSITY)
@pytest.mark.parametrize("kind", MODELS)
def test_a_sparse_model_compiles_to_one_graph(kind, plan):
    torch.manual_seed(0)
    plain = MODELS[kind]()
    layers = speft.linear_layers(plain)
    masks = {name: random_index(layer.weight.numel(), max(1, round(DENSITY[plan] * layer.weight.numel())))
             for name, layer in layers.items()}  # fmt: skip
    compiled = copy.deepcopy(plain)
    deltas, others = speft.sparsify(plain, masks), speft.sparsify(compiled, masks)
    whole = [layer.planned[-1] == layer.in_features for layer in layers.values()]  # all columns are crowded
    assert all(found == (plan == "dense") for found in whole)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(compiled, backend=counter, fullgraph=True)
    wanted = losses_of(plain, deltas)
    assert losses_of(whole, others) == pytest.approx(wanted, rel=1e-5)
    assert counter.frame_count == 1 and wanted[-1] != pytest.approx(wanted[0], rel=1e-3)
    for delta, other in zip(deltas, others, strict=True):
        torch.testing.assert_close(other, delta, rtol=1e-3, atol=1e-4)
    # Names are those of before, and what was learned leaves it as usual.
    assert set(speft.adapter(whole)) == set(masks)


def test_a_mask_that_is_moved_or_loaded_keeps_its_plan_when_compiled():
    torch.manual_seed(0)
    model = mlp()
    masks = {"0": random_index(64 * 96, 12), "3": random_index(64 * 96, 12)}
    speft.sparsify(model, masks)
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    copied = copied.to(torch.float64).to(torch.float32)
    torch._dynamo.reset()
    whole = torch.compile(copied, backend="aot_eager", fullgraph=True)
    deltas, others = ([one.get_submodule(name).delta for name in masks] for one in (model, copied))
    assert losses_of(whole, others) == pytest.approx(losses_of(model, deltas), rel=1e-5)
