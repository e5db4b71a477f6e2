"""LoRA and PiSSA of tests/bench/baselines.py, against dense matrices."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import baselines  # noqa: E402
import speft  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from runs import argv, write_pairs, write_tiny  # noqa: E402


def tiny():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=40, block_size=16, n_layer=2, n_head=2, n_embd=32))


@pytest.mark.parametrize("method", (baselines.lora, baselines.pissa))
def test_the_start_is_the_base_and_merging_agrees(method):
    base, ids = tiny(), torch.arange(24).view(2, 12)
    adapted = copy.deepcopy(base)
    parameters = method(adapted, None, 0.1)
    assert {id(p) for p in adapted.parameters() if p.requires_grad} == {id(p) for p in parameters}
    torch.testing.assert_close(adapted(ids)[0], base(ids)[0], rtol=1e-4, atol=1e-5)
    for parameter in parameters:
        parameter.data += 0.05 * torch.randn_like(parameter)
    trained = adapted(ids)[0]
    assert (trained - base(ids)[0]).abs().max() > 0.01
    merged = baselines.merge(adapted)
    assert list(merged.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(merged(ids)[0], trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", (0.5, 2.0))
def test_gradients_are_those_of_the_dense_product(scale):
    torch.manual_seed(1)
    layer = baselines.LowRankLinear(torch.nn.Linear(7, 5), 3, scale)
    layer.B.data.normal_()
    x, dy = torch.randn(11, 7), torch.randn(11, 5)
    layer(x).backward(dy)
    dense = dy.T @ x  # the gradient of W + scale · B A
    torch.testing.assert_close(layer.A.grad, scale * layer.B.detach().T @ dense)
    torch.testing.assert_close(layer.B.grad, scale * dense @ layer.A.detach().T)
    assert layer.linear.weight.grad is None


@pytest.mark.parametrize("density", (0.0001, 0.03, 0.1, 0.5))
def test_ranks_come_as_near_to_the_density_as_whole_ranks_allow(density):
    layers = speft.linear_layers(tiny())
    chosen = baselines.ranks(layers, density)
    sizes = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    trained = sum(chosen[name] * sizes[name] for name in layers)
    wanted = density * sum(layer.weight.numel() for layer in layers.values())
    lowest = sum(sizes.values())
    assert min(chosen.values()) >= 1
    assert abs(trained - wanted) <= max(sizes.values()) / 2 or trained == lowest > wanted
    assert trained == sum(p.numel() for p in baselines.lora(tiny(), None, density))


@pytest.mark.parametrize("density", (0.001, 0.01, 0.1, 0.5, 1.0))
def test_a_block_is_all_of_some_rows_and_columns_but_for_the_last_line(density):
    torch.manual_seed(int(1000 * density))
    model = tiny()
    layers = speft.linear_layers(model)
    first, second = (baselines.block_mask(model, density) for _ in range(2))
    for name, index in first.items():
        n_rows, n_columns = layers[name].weight.shape
        assert len(index) == max(1, round(density * n_rows * n_columns))
        entries = {divmod(place, n_columns) for place in index.tolist()}
        rows, columns = {row for row, _ in entries}, {column for _, column in entries}
        assert len(rows) * len(columns) - len(entries) < max(len(rows), len(columns))
        assert max(len(rows) / n_rows, len(columns) / n_columns) < 2 * density**0.5 + 0.2
    moved = [name for name in first if first[name].tolist() != second[name].tolist()]
    assert moved if density < 1 else not moved


@pytest.mark.parametrize("seed", range(3))
def test_layers_rates_are_relative_to_their_weights(seed):
    torch.manual_seed(seed)
    base, batch = tiny(), (torch.randint(40, (2, 12)), torch.randint(40, (2, 12)))
    for layer in speft.linear_layers(base).values():
        layer.weight.data *= 0.1 + torch.rand(())
    plain, scaled = copy.deepcopy(base), copy.deepcopy(base)
    indices = baselines.gradient_mask(plain, [batch], 0.1)
    deltas, stand_ins = speft.sparsify(plain, indices), baselines.relative(scaled, [batch], 0.1)
    trained = {id(p) for p in scaled.parameters() if p.requires_grad and len(p)}
    assert trained == {id(p) for p in stand_ins}
    for model, parameters in ((plain, deltas), (scaled, stand_ins)):
        # Without its history AdamW moves every entry by the rate.
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=0.0, weight_decay=0.0)
        model.sample_losses(batch).mean().backward()
        optimizer.step()
        model(batch[0])  # the weights follow
    sizes = {name: layer.weight.pow(2).mean().sqrt() for name, layer in speft.linear_layers(base).items()}
    mean = sum(sizes.values()) / len(sizes)
    for name, index in indices.items():
        weights = (model.get_submodule(name).weight.data for model in (base, plain, scaled))
        before, once, other = (weight.view(-1)[index] for weight in weights)
        torch.testing.assert_close(other - before, (once - before) * sizes[name] / mean, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("method", baselines.METHODS)
def test_a_baseline_has_train_pys_flags_files_and_a_merged_model(tmp_path, method):
    tiny, pairs = write_tiny(tmp_path / "tiny"), write_pairs(tmp_path / "pairs.jsonl")
    flags = argv(tiny, tmp_path / "out", "--data", pairs, "--steps", 2, "--lr", 1e-2, "--density", 0.2)
    result = baselines.main([method, *flags, "--merge", str(tmp_path / "merged")])
    linear = 2 * 12 * 32**2
    assert result["steps_done"] == 2 and 0.15 < result["trained"] / linear < 0.25
    assert {"log.jsonl", "result.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    flags = argv(tmp_path / "merged", tmp_path / "again", "--data", pairs, "--method", "none")
    again = train.main(flags)
    assert again["val_before"] == pytest.approx(result["val_after"], abs=1e-4)
    assert abs(result["val_after"] - result["val_before"]) > 1e-3
