"""The recipes, optimizers and measures of the studies in tests/bench/, against loops and autograd."""

import io
import json
import random
import sys
import tarfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import cause  # noqa: E402
import optimizers  # noqa: E402
import recipes  # noqa: E402
import sentiment  # noqa: E402
import speft  # noqa: E402
import studies  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402


def tiny(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=40, block_size=16, n_layer=2, n_head=2, n_embd=32))


def some_batches(seed=0, count=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(40, (count, 2, 3, 12), generator=generator)
    return [tuple(batch) for batch in ids]


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("density", (0.05, 0.2))
def test_a_recipe_trains_its_share_and_nothing_else(name, density):
    model = tiny()
    total = sum(layer.weight.numel() for layer in speft.linear_layers(model).values())
    parameters = recipes.RECIPES[name](model, some_batches(), density=density)
    trained = sum(p.numel() for p in parameters)
    assert abs(trained - density * total) <= 12  # rounded in every layer
    assert {id(p) for p in model.parameters() if p.requires_grad and p.numel()} == {id(p) for p in parameters}
    before = [p.detach().clone() for p in parameters]
    model.sample_losses(some_batches()[0]).mean().backward()
    torch.optim.SGD(parameters, lr=1.0).step()
    assert any(not torch.equal(p, old) for p, old in zip(parameters, before))


def entries(model, name):
    layer = model.get_submodule(name)
    return [divmod(place, layer.weight.shape[1]) for place in layer.index.tolist()]


@pytest.mark.parametrize("seed", range(3))
def test_columns_and_rows_are_whole_but_for_the_last(seed):
    for recipe, line in ((recipes.random_columns, 1), (recipes.random_rows, 0), (recipes.active_columns, 1)):
        model = tiny(seed)
        recipe(model, some_batches(seed), density=0.1)
        for name, layer in speft.linear_layers(model).items():
            lines = {entry[line] for entry in entries(model, name)}
            length = layer.weight.shape[1 - line]
            assert len(lines) == -(-len(layer.index) // length)


@pytest.mark.parametrize("seed", range(3))
def test_active_columns_are_those_of_the_largest_inputs(seed):
    model, batches = tiny(seed), some_batches(seed)
    seen = {}
    for name, layer in speft.linear_layers(model).items():
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0]))
    for batch in batches:
        model.sample_losses(batch)
    norms = recipes.inputs_norms(model, batches)
    for name, inputs in seen.items():
        wanted = sum(x.square().sum((0, 1)) / 36 for x in inputs[: len(batches)])
        torch.testing.assert_close(norms[name], wanted.detach())


@pytest.mark.parametrize("seed", range(3))
def test_entries_within_a_block_are_the_best_there(seed):
    model = tiny(seed)
    weights = {name: layer.weight.detach().clone() for name, layer in speft.linear_layers(model).items()}
    recipes.within_block(model, None, 0.05, 4, torch.abs)
    for name, weight in weights.items():
        kept = entries(model, name)
        rows, columns = sorted({row for row, _ in kept}), sorted({column for _, column in kept})
        assert len(rows) * len(columns) <= 0.25 * weight.numel() + weight.shape[0] + weight.shape[1]
        block = sorted(abs(weight[row, column].item()) for row in rows for column in columns)
        least = min(abs(weight[row, column].item()) for row, column in kept)
        # The larger block is cut off in its last line, so that a few entries of it do not take part.
        assert sum(value > least for value in block) - len(kept) < max(weight.shape)


@pytest.mark.parametrize("seed", range(20))
def test_a_cap_holds_and_costs_no_more_than_it_must(seed):
    generator = torch.Generator().manual_seed(seed)
    n_rows, n_columns = torch.randint(3, 20, (2,), generator=generator).tolist()
    score = torch.rand(n_rows, n_columns, generator=generator)
    score *= torch.rand(1, n_columns, generator=generator) ** 4
    count = max(1, score.numel() // 10)
    kept = recipes.capped(score, count, limit=2).tolist()
    assert len(kept) == len(set(kept)) and kept == sorted(kept)
    rows = [place // n_columns for place in kept]
    columns = [place % n_columns for place in kept]
    share = 2 * count / score.numel()
    most_in_row, most_in_column = max(1, round(share * n_columns)), max(1, round(share * n_rows))
    assert max(map(rows.count, rows)) <= most_in_row and max(map(columns.count, columns)) <= most_in_column
    worst = min(score.flatten()[kept])
    for place, value in enumerate(score.flatten().tolist()):
        if value > worst and place not in kept:  # it was in the way of better ones
            row, column = divmod(place, n_columns)
            better = [other for other in kept if score.flatten()[other] >= value]
            in_row = sum(other // n_columns == row for other in better)
            in_column = sum(other % n_columns == column for other in better)
            assert in_row == most_in_row or in_column == most_in_column


@pytest.mark.parametrize("seed", range(3))
def test_principal_entries_are_the_largest_of_the_low_rank_approximation(seed):
    model = tiny(seed)
    weights = {name: layer.weight.detach().clone() for name, layer in speft.linear_layers(model).items()}
    recipes.principal(model, None, 0.1)
    for name, weight in weights.items():
        values, vectors = torch.linalg.eigh(weight @ weight.T)
        rank = min(weight.shape) // 8
        main = vectors[:, -rank:]
        low = (main @ main.T @ weight).abs().flatten()
        wanted = low.topk(len(model.get_submodule(name).index)).indices.sort().values
        assert len(set(wanted.tolist()) ^ set(model.get_submodule(name).index.tolist())) <= 2  # near ties


@pytest.mark.parametrize("seed", range(3))
def test_adam_with_a_moment_a_layer_is_adam_where_a_layer_is_one_entry(seed):
    generator = torch.Generator().manual_seed(seed)
    mine = [torch.nn.Parameter(torch.randn(1, generator=generator)) for _ in range(3)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    pairs = [(optimizers.LayerAdam(mine), mine), (torch.optim.Adam(theirs, lr=0.0), theirs)]
    for step in range(10):
        gradients = [torch.randn(1, generator=generator) for _ in mine]
        for optimizer, parameters in pairs:
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(mine, theirs)
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = optimizers.LayerAdam([parameter])
    optimizer.param_groups[0]["lr"] = 1.0
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()  # by the gradient over its root mean square
    torch.testing.assert_close(parameter.data, -torch.tensor([3.0, 4.0]) / 12.5**0.5)


@pytest.mark.parametrize("seed", range(3))
def test_curvature_along_a_mask_is_that_of_the_whole_hessian(seed):
    model, batches = tiny(seed).requires_grad_(False), some_batches(seed)
    names = ["blocks.0.attn.v", "blocks.1.mlp.up"]
    indices = {name: torch.randperm(1024)[:5].sort().values for name in names}
    layers = [model.get_submodule(name) for name in names]
    base = [layer.weight.detach().clone() for layer in layers]

    def loss(moves):
        weights = {
            f"{name}.weight": weight.flatten().index_add(0, index, move).view_as(weight)
            for (name, index), weight, move in zip(indices.items(), base, moves.split(5))
        }
        losses = [torch.func.functional_call(model, weights, batch)[1] for batch in batches]
        return torch.stack(losses).mean()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.func.grad(loss)(torch.zeros(10))
        hessian = torch.func.hessian(loss)(torch.zeros(10))
    vectors = [torch.randn(10), torch.ones(10)]
    g, curved = cause.products(model, indices, batches, vectors)
    torch.testing.assert_close(g, gradient, rtol=1e-4, atol=1e-6)
    for vector, product in zip(vectors, curved):
        torch.testing.assert_close(product, hessian @ vector, rtol=1e-3, atol=1e-5)
    direction = torch.randn(10)
    moved = cause.moved_losses(model, indices, direction, batches)
    for distance in (0.0, 0.01, 0.3):
        assert moved[distance] == pytest.approx(loss(distance * direction).item(), abs=1e-5)
    for layer, weight in zip(layers, base):
        assert torch.equal(layer.weight, weight)


def archive(folder, lines):
    """A package archive with the ratings in an archive of their own."""

    def add(tar, name, content):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        add(tar, sentiment.RATED, "\n".join(lines).encode("latin-1"))
    with tarfile.open(folder / "package.tar.gz", "w:gz") as tar:
        add(tar, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return folder / "package.tar.gz"


def test_reviews_become_records_without_the_unclear_and_the_double(tmp_path, monkeypatch):
    monkeypatch.setattr(sentiment, "TEST", 2)
    lines = ["1\t2.3\tA fine caf\xe9 film.", "2\t-1.0\tDull.", "3\t0.9\tMiddling.", "4\t-0.99\tSo-so."]
    lines += ["5\t1.0\tBright.", "6\t-3.5\tAwful.", "7\t-3.5\tAwful."]
    ratings = sentiment.read_ratings(archive(tmp_path, lines))
    train, test = sentiment.make_records(ratings)
    assert len(test) == 2 and len(train) == 2
    assert {record["prompt"]: record["completion"] for record in train + test} == {
        "Review: A fine caf\xe9 film.\nSentiment:": " positive", "Review: Dull.\nSentiment:": " negative",
        "Review: Bright.\nSentiment:": " positive", "Review: Awful.\nSentiment:": " negative",
    }  # fmt: skip
    assert (train, test) == sentiment.make_records(ratings)


@pytest.mark.parametrize("seed", range(3))
def test_forced_choice_is_that_of_one_prompt_after_the_other(seed):
    class Tokenizer:
        special_tokens_set, begin, end = {"<|endoftext|>"}, None, None

        def encode_single_token(self, name):
            return 0

        def encode_ordinary(self, text):
            answers = (*sentiment.ANSWERS, ".")  # this one is a prompt's until there is an answer
            return [answers.index(text) + 1] if text in answers else [*map(int, text.split())]

    random.seed(seed)
    records = [
        {"prompt": " ".join(str(random.randrange(3, 40)) for _ in range(random.randrange(1, 12))),
         "completion": random.choice(sentiment.ANSWERS)}
        for _ in range(23)
    ]  # fmt: skip
    model = tiny(seed)
    right, losses = [], []
    for record in records:
        ids = torch.tensor([[0, *map(int, record["prompt"].split())]])
        logits, wanted = model(ids)[0][0, -1], sentiment.ANSWERS.index(record["completion"])
        right.append((logits[2] > logits[1]).item() == (wanted == 1))
        losses.append(-logits.log_softmax(0)[wanted + 1].item())
    found = sentiment.measure(model, Tokenizer(), records, batch_size=4)
    assert found["accuracy"] == sum(right) / 23
    assert found["right"] == "".join("1" if is_right else "0" for is_right in right)
    assert found["loss"] == pytest.approx(sum(losses) / 23, abs=1e-5)
    assert found["standard_error"] == pytest.approx((found["accuracy"] * (1 - found["accuracy"]) / 23) ** 0.5)


def test_every_study_has_its_files_read_as_json():
    for name in studies.STUDIES:
        path = Path(__file__).parent.parent / "data" / "results" / f"{name}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            assert json.loads(line)["study"] == name
