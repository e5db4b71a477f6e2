"""The GPT: its losses, its cache, its sampling."""

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig

TINY = dict(vocab_size=23, block_size=12, n_layer=2, n_head=4, n_embd=16)
LLAMA = dict(n_kv_head=2, gated_mlp=True, rms_norm=True, rope_theta=100.0, tied_head=False, activation="silu",
             qkv_bias=False, out_bias=False, mlp_bias=False, head_dim=6, n_inner=20)  # fmt: skip


def tiny(seed=0, **switches):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**TINY, **switches))
    for parameter in model.parameters():  # away from the initial values, where much is zero or one
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("switches", ({}, LLAMA), ids=("gpt2", "llama"))
@pytest.mark.parametrize("seed", range(3))
def test_a_samples_loss_is_the_mean_over_its_counted_tokens(switches, seed):
    model = tiny(seed, **switches)
    idx, targets = torch.randint(0, 23, (2, 4, 9))
    targets[torch.rand(targets.shape) < 0.5] = -100
    targets[:, 0] = 3  # every sample counts something
    logits, none = model(idx)
    assert none is None and logits.shape == (4, 9, 23)
    expected = []
    for sample, wanted in zip(logits.log_softmax(-1), targets):
        nats = [-sample[t, token].item() for t, token in enumerate(wanted.tolist()) if token != -100]
        expected.append(sum(nats) / len(nats))
    none, losses = model(idx, targets, reduction="none")
    assert none is None
    torch.testing.assert_close(losses, torch.tensor(expected))
    torch.testing.assert_close(model(idx, targets)[1], torch.tensor(expected).mean())


def test_a_sample_without_counted_tokens_has_no_loss():
    model = tiny()
    targets = torch.tensor([[1, 2], [-100, -100]])
    losses = model(torch.tensor([[5, 6], [7, 8]]), targets, reduction="none")[1]
    assert losses[0] > 0 and losses[1] == 0
    losses.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_tokens_that_do_not_count_never_reach_the_head():
    rows = []

    class HeadInputs(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.linear and args[1].shape == (23, 16):
                rows.append(args[0].numel() // 16)
            return func(*args, **(kwargs or {}))

    targets = torch.full((3, 8), -100)
    targets[0, 2], targets[1, 5:] = 1, 2
    with HeadInputs():
        tiny()(torch.randint(0, 23, (3, 8)), targets)
    assert rows == [4]


def test_unknown_reductions_and_long_inputs_are_refused():
    with pytest.raises(ValueError, match="sum"):
        tiny()(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), reduction="sum")
    with pytest.raises(ValueError, match="13 positions.*12"):
        tiny()(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize("switches", ({}, LLAMA), ids=("gpt2", "llama"))
def test_padding_on_the_right_changes_no_loss(switches):
    model = tiny(**switches)
    idx, targets = torch.randint(0, 23, (2, 1, 7))
    padded = F.pad(idx, (0, 5)), F.pad(targets, (0, 5), value=-100)
    torch.testing.assert_close(model(*padded)[1], model(idx, targets)[1])


def test_loss_and_gradient_in_float64_keep_their_precision():
    model = tiny().double()
    idx, targets = torch.randint(0, 23, (2, 2, 5))
    loss = model(idx, targets)[1]
    assert loss.dtype == torch.float64
    loss.backward()
    weight, step = model.blocks[0].mlp.up.weight, 1e-6
    with torch.no_grad():
        weight[3, 4] += step
        above = model(idx, targets)[1]
        weight[3, 4] -= 2 * step
        below = model(idx, targets)[1]
    torch.testing.assert_close(weight.grad[3, 4], (above - below) / (2 * step), rtol=1e-6, atol=1e-9)


def greedy_without_cache(model, idx, count):
    for _ in range(count):
        logits = model(idx[:, -model.config.block_size :])[0]
        idx = torch.cat((idx, logits[:, -1:].argmax(-1)), dim=1)
    return idx


@pytest.mark.parametrize("switches", ({}, LLAMA), ids=("gpt2", "llama"))
@pytest.mark.parametrize("length", (1, 5, 12, 15))
@pytest.mark.parametrize("count", (0, 1, 6, 20))
def test_generation_with_the_cache_equals_generation_without(switches, length, count):
    model = tiny(length, **switches)
    idx = torch.randint(0, 23, (3, length))
    assert torch.equal(model.generate(idx, count), greedy_without_cache(model, idx, count))


def test_generation_stops_at_stop_tokens_only():
    model = tiny(1)
    idx = torch.randint(0, 23, (4, 3))
    free = model.generate(idx, 30)
    stop = free[0, 6].item()
    stopped = model.generate(idx, 30, stop=[stop])
    for sample, wanted in zip(stopped.tolist(), free.tolist()):
        end = wanted.index(stop, 3) + 1 if stop in wanted[3:] else len(wanted)
        assert sample[:end] == wanted[: min(end, len(sample))]
        assert set(sample[end:]) <= {stop}
    alone = model.generate(idx[:1], 30, stop=[stop])
    assert alone.tolist() == [free[0, : free[0].tolist().index(stop, 3) + 1].tolist()]


def test_sampling_follows_the_softmax_of_the_top_k():
    model = tiny(2)
    idx = torch.randint(0, 23, (1, 4))
    logits = model(idx)[0][0, -1] / 0.8
    kept = logits.topk(5).indices
    expected = torch.zeros(23).index_copy_(0, kept, logits[kept].softmax(0))
    torch.manual_seed(0)
    drawn = model.generate(idx.expand(4000, -1), 1, temperature=0.8, top_k=5)[:, -1]
    frequency = torch.bincount(drawn, minlength=23) / 4000
    assert (frequency[expected == 0] == 0).all()
    torch.testing.assert_close(frequency, expected, atol=0.03, rtol=0)  # four standard errors


@pytest.mark.parametrize("seed", range(6))
def test_prompts_of_any_length_are_continued_as_if_alone(seed):
    torch.manual_seed(seed)
    rotary = dict(rope_theta=1e4, rms_norm=True, n_kv_head=1) if seed % 2 else {}
    model = GPT(GPTConfig(vocab_size=13, block_size=24, n_layer=2, n_head=2, n_embd=16, **rotary))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    prompts = [torch.randint(13, (length,)).tolist() for length in (1, 9, 4, 4, 2, 15, 7)]
    stop = [3, 5]
    found = model.complete(prompts, 12, stop, batch_size=3)
    for prompt, completion in zip(prompts, found):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 12:  # the naive loop: everything read anew for every token
            logits = model(torch.tensor([tokens[-24:]]))[0][0, -1]
            if logits.argmax().item() in stop:
                break
            tokens.append(logits.argmax().item())
        assert completion == tokens[len(prompt) :]
