"""Nothing mixes devices: scoring, masks, training, adapters and generation on a pretend accelerator.

Run by test_device.py, in a process of its own.
"""

import copy
import functools

import pytest
import torch

import baselines
import data
import speft
import step
import train
from data.examples import Examples
from helpers import LLAMA_LIKE
from model import GPT, GPTConfig

pretend = pytest.importorskip("pretend", reason="this torch cannot pretend a device", exc_type=ImportError)

GPT2 = dict(vocab_size=40, block_size=24, n_layer=2, n_head=2, n_embd=32)
LLAMA = GPT2 | LLAMA_LIKE


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The device exists; torch.tensor, which no dispatch mode sees, can make tensors on it."""
    real = torch.tensor

    def tensor(*args, device=None, **kwargs):
        made = real(*args, **kwargs)
        return pretend.Pretend(made) if device == pretend.DEVICE else made

    monkeypatch.setattr(torch, "tensor", tensor)
    with pretend.Device():
        yield


def make(shape):
    """(a model on the CPU, examples of unequal length on the device)"""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape))
    samples = [(torch.randint(40, (n,)), torch.randint(40, (n,))) for n in (9, 12, 7, 12, 5, 12, 11, 10)]
    return model, Examples(samples, "pretend")


def test_it_refuses_what_cuda_refuses():
    ours, other = pretend.Pretend(torch.arange(6)), torch.arange(6)
    for mixed in (
        lambda: ours + other,
        lambda: other[ours],
        lambda: ours.index_select(0, other),
        lambda: torch.cat((other, ours)),
        lambda: torch.searchsorted(other, ours),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert (ours + other.to("pretend")).tolist() == (2 * other).tolist()
    assert ours[other].device == pretend.DEVICE and ours.sum().item() == 15


@pytest.mark.parametrize("metric", speft.METRICS)
@pytest.mark.parametrize("shape", (GPT2, LLAMA), ids=("gpt2", "llama"))
def test_every_metric_gives_the_mask_of_the_cpu(metric, shape):
    model, examples = make(shape)
    batches = examples.spread(6, 2)

    def masks(model, batches):
        torch.manual_seed(1)
        scores = speft.salience(model, metric, batches, GPT.sample_losses)
        return [speft.select(scores, 0.05, scope) for scope in ("global", "local")]

    on_cpu = masks(copy.deepcopy(model), pretend.back(batches))
    on_device = masks(pretend.put(model), batches)
    for wanted, found in zip(on_cpu, on_device):
        assert all(index.device == pretend.DEVICE for index in found.values())
        assert {name: index.tolist() for name, index in found.items()} == {
            name: index.tolist() for name, index in wanted.items()
        }


ADAPT = {
    "static": None, "dynamic": None, "full": None, "lora": baselines.lora, "pissa": baselines.pissa,
    "lines": functools.partial(baselines.moved, lines=True), "warmed": baselines.warmed,
    "entries": functools.partial(baselines.moved, lines=False), "relative": baselines.relative,
    "block": baselines.block,
}  # fmt: skip


@pytest.mark.parametrize("kind", ADAPT)
def test_training_and_resuming_from_the_cpu_agree(kind):
    base, examples = make(LLAMA)
    args = data.parse_args([], speft.METRICS)
    args.steps, args.batch_size, args.score_examples, args.density = 4, 2, 4, 0.05
    args.mask, args.refresh, args.checkpoint_every = "dynamic" if kind == "dynamic" else "static", 2, 3
    saved = []

    def save(progress):
        saved.append(pretend.back(progress | {"log": list(progress["log"])}))

    def fit(saved, save=None):
        torch.manual_seed(0)
        model = pretend.put(copy.deepcopy(base))
        params = list(model.requires_grad_().parameters()) if kind == "full" else None
        if ADAPT[kind]:
            params = ADAPT[kind](model, examples.draw(0, 4, 1, 2), density=0.05)
        log = []
        params = train.fit(model, params, examples, examples.spread(4, 2), args, log, saved, save)
        return model, log, params

    model, log, once = fit(None, save)
    assert [len(progress["log"]) for progress in saved] == [3, 4] and len(log) == 4
    _, _, again = fit(copy.deepcopy(saved[0]))
    assert sum(parameter.numel() for parameter in once) > 0
    assert all(parameter.device == pretend.DEVICE for parameter in once)
    assert [parameter.tolist() for parameter in once] == [parameter.tolist() for parameter in again]
    if kind in ("static", "dynamic"):
        other = pretend.put(copy.deepcopy(base))
        speft.load_adapter(other, pretend.back(speft.adapter(model)))
        loss, batches = data.mean_loss(model, examples.spread(8, 4)), examples.spread(8, 4)
        assert data.mean_loss(other, batches) == loss
        assert data.mean_loss(speft.merge(other), batches) == loss
        assert other.fingerprint() == speft.merge(model).fingerprint()


def test_generation_says_what_it_says_on_the_cpu():
    model, _ = make(LLAMA)
    prompts = [[1, 2, 3], [4], [5, 6]]
    wanted = copy.deepcopy(model).complete(prompts, 30, [7], 3)
    model = pretend.put(model)
    assert model.complete(prompts, 30, [7], 3) == wanted
    drawn = model.generate(torch.tensor([[1, 2]], device=pretend.DEVICE), 5, temperature=1.0, top_k=3)
    assert drawn.device == pretend.DEVICE and drawn.shape == (1, 7)


@pytest.mark.parametrize("variant", ("frozen", "full", "lora", "scatter", "gather", "cover"))
def test_the_benchmarked_steps_run(variant):
    model, examples = make(LLAMA)
    model, batch = pretend.put(model), examples.spread(2, 2)[0]
    indices = speft.select(speft.salience(model, "grad", [batch], step.losses), 0.05, "global")
    assert step.check_gradients(model, indices, batch) < 1e-5
    before = step.losses(model, batch).mean().item()
    parameters = step.VARIANTS[variant](model, indices, 0.05)
    for _ in range(3):
        optimizer = step.optimizer_for(parameters)
        step.step(model, optimizer, batch)
    assert (step.losses(model, batch).mean().item() < before) == bool(parameters)
