"""The whole method on toy models: score, mask, train, save."""

import copy

import pytest
import torch

from helpers import LAYERS, gpt_losses, mlp, same_bits, sample_losses
from model import GPT, GPTConfig
from speft import adapter, load_adapter, merge, remask, salience, select, sparsify


def regression():
    torch.manual_seed(11)
    x = torch.randn(64, 6)
    return x, torch.stack((x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3] - x[:, 4], x[:, 5] ** 2), dim=1)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("refreshes", [1, 4], ids=["static", "dynamic"])
def test_training_lowers_the_loss_and_changes_masked_entries_only(refreshes, scope):
    batch = regression()
    model = mlp()
    before = sample_losses(model, batch).mean().item()
    union = {name: set() for name in LAYERS}
    for refresh in range(refreshes):
        masks = select(salience(model, "grad", [batch], sample_losses), 0.15, scope)
        deltas = remask(model, masks) if refresh else sparsify(model, masks)
        optimizer = torch.optim.AdamW(deltas, lr=0.03, weight_decay=0)
        for name, index in masks.items():
            union[name] |= set(index.tolist())
        for _ in range(40 // refreshes):
            optimizer.zero_grad()
            sample_losses(model, batch).mean().backward()
            optimizer.step()
    assert sample_losses(model, batch).mean().item() < 0.85 * before
    after, base = merge(model).state_dict(), mlp().state_dict()
    for name, tensor in after.items():
        changed = set((tensor != base[name]).flatten().nonzero().squeeze(1).tolist())
        allowed = union[name.removesuffix(".weight")] if name.removesuffix(".weight") in union else set()
        assert changed <= allowed, name
        assert len(changed) >= 0.5 * len(allowed), name


@pytest.mark.parametrize("refreshes", [1, 3], ids=["static", "dynamic"])
def test_a_gpt_trains_sparsely_and_its_adapter_gives_the_same_logits(refreshes):
    torch.manual_seed(0)
    base = GPT(GPTConfig(vocab_size=32, block_size=8, n_layer=2, n_head=2, n_embd=16))
    model = copy.deepcopy(base)
    tokens = torch.randint(32, (6, 9))
    batch = (tokens[:, :-1], tokens[:, 1:])
    before = gpt_losses(model, batch).mean().item()
    for refresh in range(refreshes):
        masks = select(salience(model, "grad", [batch], gpt_losses), 0.05, "global")
        deltas = remask(model, masks) if refresh else sparsify(model, masks)
        optimizer = torch.optim.AdamW(deltas, lr=0.01, fused=True)
        for _ in range(12 // refreshes):
            optimizer.zero_grad()
            gpt_losses(model, batch).mean().backward()
            optimizer.step()
    assert gpt_losses(model, batch).mean().item() < before - 0.1
    other = copy.deepcopy(base)
    load_adapter(other, adapter(model))
    with torch.no_grad():
        logits = model(batch[0])[0]
        assert same_bits(other(batch[0])[0], logits)
        assert same_bits(merge(model)(batch[0])[0], logits)
        load_adapter(other, {})
        assert same_bits(other(batch[0])[0], base(batch[0])[0])
