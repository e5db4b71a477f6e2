"""train.fit against the same loop written by hand: dense gradients, a formula for each line of AdamW."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

import data
import speft
import train
from helpers import GPT_STYLES, random_gpt

SEEDS = range(12)


class Samples:
    """Random token sequences, drawn by number like data's examples."""

    def __init__(self, vocabulary, count=40, length=9):
        self.all = torch.randint(vocabulary, (count, length + 1))
        self.note = ""

    def sample(self, count, seed, batch_size):
        return self.draw(0, count, seed, batch_size)

    def draw(self, start, count, seed, batch_size):
        which = [(start + n + 7 * seed) % len(self.all) for n in range(count)]
        rows = self.all[which]
        return [(part[:, :-1], part[:, 1:]) for part in rows.split(batch_size)]


def random_run(seed):
    """(model, examples, flags) by chance."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    model, _ = random_gpt(chance.choice(list(GPT_STYLES)), seed, n_embd=8, n_inner=16, block_size=9)
    args = SimpleNamespace(
        steps=chance.randint(3, 9), lr=10 ** chance.uniform(-3, -1), warmup=chance.choice((0, 0.2, 0.5, 1)),
        weight_decay=chance.choice((0, 0.1, 1)), clip=chance.choice((0.02, 0.3, 1e9)), seed=seed,
        batch_size=chance.randint(1, 3), accumulate=chance.randint(1, 3), eval_every=1000, eval_examples=2,
        metric=chance.choice(("grad", "random")), scope="local", density=0.1, mask="static", refresh=1000,
        layers="", score_examples=4, checkpoint_every=0,
    )  # fmt: skip
    return model, Samples(model.config.vocab_size), args


def rate_by_hand(step, args):
    """A ramp of ceil(warmup x steps) steps that ends at the rate, then a quarter turn's cosine squared."""
    ramp = math.ceil(args.warmup * args.steps)
    if step < ramp:
        return args.lr * (step + 1) / ramp
    return args.lr * math.cos(math.pi / 2 * (step - ramp) / (args.steps - ramp)) ** 2


def steps_by_hand(model, places, examples, args):
    """Train the entries `places` {name: mask} of a plain model; returns [(rate, loss, norm)], {name: moved}.

    Weight decay pulls what was added to an entry towards 0, and so the entry towards the base's value.
    """
    weights = {name: layer.weight for name, layer in speft.linear_layers(model).items() if name in places}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    mean, square = ({name: torch.zeros_like(w) for name, w in start.items()} for _ in range(2))
    rows, size = [], args.batch_size * args.accumulate
    for step in range(args.steps):
        model.zero_grad()
        ((inputs, targets),) = examples.draw(step * size, size, args.seed, size)
        loss = model.sample_losses((inputs, targets)).mean()
        loss.backward()
        gradients = {name: weight.grad * places[name] for name, weight in weights.items()}
        norm = sum(g.square().sum() for g in gradients.values()).sqrt().item()
        rate = rate_by_hand(step, args)
        rows.append((rate, loss.item(), norm))
        with torch.no_grad():
            for name, g in gradients.items():
                g = g * min(1, args.clip / (norm + 1e-6))
                mean[name] = 0.9 * mean[name] + 0.1 * g
                square[name] = 0.999 * square[name] + 0.001 * g**2
                spread = (square[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                moved = (weights[name] - start[name]) * (1 - rate * args.weight_decay)
                moved -= rate * mean[name] / (1 - 0.9 ** (step + 1)) / spread
                weights[name].copy_(start[name] + moved * places[name])
    return rows, {name: weights[name].detach() - start[name] for name in weights}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sparse_run_is_the_loop_by_hand(seed):
    model, examples, args = random_run(seed)
    plain, _, _ = random_run(seed)
    log = []
    deltas = train.fit(model, None, examples, None, args, log)
    learned = speft.adapter(model)
    assert sum(map(len, deltas)) == sum(len(index) for index, _, _ in learned.values()) > 50
    places = {}
    for name, (index, _, shape) in learned.items():
        places[name] = torch.zeros(shape).flatten().index_fill(0, index.long(), 1).view(shape)
    rows, moved = steps_by_hand(plain, places, examples, args)
    assert len(log) == args.steps and [row["step"] for row in log] == list(range(1, args.steps + 1))
    for row, (rate, loss, norm) in zip(log, rows):
        assert row["lr"] == pytest.approx(rate, rel=1e-9, abs=1e-15)
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["gradient_norm"] == pytest.approx(norm, rel=1e-3)
    for name, (index, values, _) in learned.items():
        expected = moved[name].flatten()[index.long()]
        assert (values - expected).norm() <= 1e-3 * expected.norm() + 1e-6, name


@pytest.mark.parametrize("seed", SEEDS)
def test_full_fine_tuning_is_adamw_on_every_parameter(seed):
    """Here torch's own optimizer, step by step, on the mean of a step's losses."""
    model, examples, args = random_run(seed)
    plain, _, _ = random_run(seed)
    log = []
    params = list(model.parameters())
    assert train.fit(model, params, examples, None, args, log) is params
    size = args.batch_size * args.accumulate
    others = list(plain.parameters())
    optimizer = torch.optim.AdamW(others, weight_decay=args.weight_decay, betas=(0.9, 0.999), eps=1e-8)
    for step in range(args.steps):
        optimizer.zero_grad()
        (batch,) = examples.draw(step * size, size, args.seed, size)
        plain.sample_losses(batch).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(others, args.clip).item()
        assert log[step]["gradient_norm"] == pytest.approx(norm, rel=1e-3)
        for group in optimizer.param_groups:
            group["lr"] = rate_by_hand(step, args)
        optimizer.step()
    for (name, mine), other in zip(model.named_parameters(), others):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=name)


def test_validation_is_measured_every_so_many_steps_after_the_step(monkeypatch):
    model, examples, args = random_run(0)
    args.steps, args.eval_every = 7, 3
    seen = []

    def mean_loss(model, batches):
        assert batches == "held out"
        seen.append(float(next(p.detach().sum() for p in model.parameters() if p.requires_grad)))
        return float(len(seen))

    monkeypatch.setattr(data, "mean_loss", mean_loss)
    log = []
    train.fit(model, list(model.parameters()), examples, "held out", args, log)
    assert [row.get("val") for row in log] == [None, None, 1.0, None, None, 2.0, None]
    assert seen[0] != seen[1]


def test_dynamic_masks_start_a_new_optimizer_and_read_new_examples():
    model, examples, args = random_run(1)
    args.steps, args.mask, args.refresh, args.metric, args.score_examples = 7, "dynamic", 3, "grad", 4
    asked, draw = [], examples.draw

    def watched(start, count, seed, batch_size):
        asked.append((start, count, seed, batch_size))
        return draw(start, count, seed, batch_size)

    examples.draw = watched
    log = []
    train.fit(model, None, examples, None, args, log)
    assert ["score_seconds" in row for row in log] == [True, False, False, True, False, False, True]
    scored = [request for request in asked if request[1] == 4 and request[2] != args.seed]
    assert [seed for _, _, seed, _ in scored] == [args.seed + 1, args.seed + 1001, args.seed + 2001]
    assert all(start == 0 and batch == args.batch_size for start, _, _, batch in scored)
    size = args.batch_size * args.accumulate
    steps = [request for request in asked if request not in scored]
    assert steps == [(n * size, size, args.seed, args.batch_size) for n in range(7)]


def random_masks_of(seed, drawn_before):
    """The entries that a run with a new random mask at every other step trains; so much was drawn before."""
    model, examples, args = random_run(3)
    args.steps, args.mask, args.refresh, args.metric, args.seed = 4, "dynamic", 2, "random", seed
    torch.rand(drawn_before)
    train.fit(model, None, examples, None, args, [])
    return {name: index.tolist() for name, (index, _, _) in speft.adapter(model).items()}


def test_random_masks_depend_on_the_seed_alone():
    masks = random_masks_of(seed=5, drawn_before=0)
    assert random_masks_of(seed=5, drawn_before=17) == masks
    assert random_masks_of(seed=6, drawn_before=0) != masks


def test_the_share_of_every_kind_of_layer_is_printed(capsys):
    model, examples, args = random_run(2)
    args.density, args.scope = 0.25, "local"
    train.fit(model, None, examples, None, args, [])
    printed = capsys.readouterr().out.splitlines()
    (told,) = [line for line in printed if line.startswith("training")]
    total = sum(layer.weight.numel() for layer in speft.linear_layers(model).values())
    assert told.startswith(f"training {total // 4} weights: attn.q 25.00%, ")
    kinds = {name.split(".", 2)[2] for name in speft.adapter(model)}
    assert told.count("25.00%") == told.count("%") == len(kinds)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_rate_rises_to_its_top_and_falls(seed):
    chance = random.Random(seed)
    steps, warmup = chance.randint(1, 200), chance.choice((0, 0.03, 1.0))
    args = SimpleNamespace(steps=steps, lr=chance.random(), warmup=warmup)
    rates = [train.learning_rate(step, args) for step in range(args.steps)]
    assert rates == pytest.approx([rate_by_hand(step, args) for step in range(args.steps)], abs=1e-12)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(args.lr) and min(rates) > 0
