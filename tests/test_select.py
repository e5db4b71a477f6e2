"""`speft.select`: the masks, against a Python sort."""

import math
import random
import tracemalloc

import pytest
import torch

from helpers import Memory, assert_same_tensors
from speft import select


def by_sorting(scores, density, scope):
    """The naive ranking: highest score first, then the earlier layer, then the lower index."""
    entries = [
        (-value, layer, i)
        for layer, tensor in enumerate(scores.values())
        for i, value in enumerate(tensor.flatten().tolist())
    ]
    if scope == "global":
        kept = sorted(entries)[: round(density * len(entries))]
    else:
        kept = []
        for layer in range(len(scores)):
            own = sorted(entry for entry in entries if entry[1] == layer)
            kept += own[: max(1, round(density * len(own)))]
    return {name: sorted(i for _, at, i in kept if at == layer) for layer, name in enumerate(scores)}


DENORMAL = 2.0**-149
SCORES = {
    "normal": lambda shape: torch.randn(shape),
    "few values": lambda shape: torch.randint(-2, 3, shape).float(),
    "signed zeros": lambda shape: torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, -1.0])[torch.randint(6, shape)],
    "infinite": lambda shape: torch.tensor([-math.inf, -1, -0.0, 0, 1, math.inf])[torch.randint(6, shape)],
    "denormal": lambda shape: torch.randint(-3, 4, shape).float() * DENORMAL,
    "negative": lambda shape: -torch.rand(shape) - 1,
    "equal": lambda shape: torch.full(shape, -0.25),
    "extreme": lambda shape: torch.tensor([3.4e38, -3.4e38, 1.2e-38, -1.2e-38, 0])[torch.randint(5, shape)],
}


def random_scores(kind):
    shapes = [(random.randint(1, 9), random.randint(1, 9)) for _ in range(random.randint(1, 5))]
    return {f"layer.{i}": SCORES[kind](shape) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("kind", SCORES)
def test_select_agrees_with_a_naive_sort(kind, scope, seed):
    random.seed(seed)
    torch.manual_seed(seed)
    for density in (1, 1.0, 0.5, 0.25, *(random.uniform(0.01, 1) for _ in range(8))):
        scores = random_scores(kind)
        total = sum(s.numel() for s in scores.values())
        if scope == "global" and round(density * total) == 0:
            density = 0.75
        before = {name: tensor.clone() for name, tensor in scores.items()}
        masks = select(scores, density, scope)
        want = by_sorting(scores, density, scope)
        assert list(masks) == list(scores)
        for name, index in masks.items():
            assert index.dtype == torch.int64 and index.dim() == 1
            assert index.tolist() == want[name], (density, name)
        assert_same_tensors(scores, before)


@pytest.mark.parametrize("density", [1e-5, 0.013, 0.5, 0.999])
def test_select_counts_exactly_in_large_layers_with_many_ties(density):
    torch.manual_seed(0)
    shapes = [(300, 250), (70, 90), (250, 300)]
    scores = {str(shape): torch.randn(shape).mul(50).round().abs() for shape in shapes}
    flat = torch.cat([s.flatten() for s in scores.values()])
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[: round(density * len(flat))]] = True
    want = [part.nonzero().squeeze(1) for part in kept.split([s.numel() for s in scores.values()])]
    masks = select(scores, density, "global")
    assert all(torch.equal(got, expected) for got, expected in zip(masks.values(), want, strict=True))


def test_select_rounds_a_half_to_even_as_python_does():
    assert len(select({"a": torch.rand(1, 5)}, 0.5, "global")["a"]) == 2
    assert len(select({"a": torch.rand(1, 7)}, 0.5, "local")["a"]) == 4


def test_select_gives_layers_without_a_kept_weight_an_empty_entry():
    scores = {"low": torch.zeros(3, 3), "high": torch.ones(2, 2), "last": torch.zeros(1, 4)}
    masks = select(scores, 4 / 17, "global")
    assert list(masks) == ["low", "high", "last"]
    assert [index.tolist() for index in masks.values()] == [[], [0, 1, 2, 3], []]


@pytest.mark.parametrize("scale", (1e-300, 1e-100, 1.0, 1e100, 1e300))
@pytest.mark.parametrize("scope", ["global", "local"])
def test_select_ranks_float64_scores_beyond_float32s_range_and_resolution(scope, scale):
    torch.manual_seed(0)
    scores = {name: scale * (1 + 1e-9 * torch.randn(shape, dtype=torch.float64))
              for name, shape in (("a", (9, 7)), ("b", (8, 8)), ("c", (1, 30)))}  # fmt: skip
    for density in (0.1, 0.4, 1.0):
        found = {name: index.tolist() for name, index in select(scores, density, scope).items()}
        assert found == by_sorting(scores, density, scope)


@pytest.mark.parametrize("seed", range(5))
def test_select_compares_scores_of_several_types_exactly(seed):
    """What is equal as a narrower type is not equal: a tie of that kind would change the count."""
    torch.manual_seed(seed)
    types = (torch.bfloat16, torch.float32, torch.float64, torch.float32)
    scores = {str(i): (1 + 0.01 * torch.rand(20, 20, dtype=torch.float64)).to(t) for i, t in enumerate(types)}
    scores["tiny"] = torch.full((5, 5), 1e-300, dtype=torch.float64)
    scores["zero"] = torch.zeros(5, 5)
    for density in (0.01, 0.1, 0.5, 1610 / 1650):
        found = {name: index.tolist() for name, index in select(scores, density, "global").items()}
        assert found == by_sorting(scores, density, "global")


@pytest.mark.parametrize("scope", ["global", "local"])
def test_select_counts_row_major_also_for_non_contiguous_scores(scope):
    torch.manual_seed(0)
    scores = {"a": torch.randn(5, 4).t(), "b": torch.randn(6, 6)[::2, 1::2]}
    assert {n: i.tolist() for n, i in select(scores, 0.3, scope).items()} == by_sorting(scores, 0.3, scope)


def test_select_takes_scores_that_require_a_gradient():
    scores = {"a": torch.randn(30, 20)}
    wanted = select(scores, 0.1, "global")["a"]
    assert torch.equal(select({"a": scores["a"].requires_grad_()}, 0.1, "global")["a"], wanted)


def test_select_local_keeps_at_least_one_weight_of_each_layer():
    masks = select({"a": torch.rand(2, 2), "b": torch.tensor([[0.0, 2.0, 1.0]])}, 0.01, "local")
    assert len(masks["a"]) == 1 and masks["b"].tolist() == [1]


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf, -math.inf, "0.1", None])
def test_select_refuses_a_wrong_density(density, scope):
    with pytest.raises(ValueError, match="density"):
        select({"a": torch.rand(4, 4)}, density, scope)


def test_select_refuses_a_global_count_of_zero():
    with pytest.raises(ValueError, match="0.05 keeps none"):
        select({"a": torch.rand(2, 3), "b": torch.rand(2, 2)}, 0.05, "global")


def test_select_refuses_an_unknown_scope():
    with pytest.raises(ValueError, match="scope .* 'layer'"):
        select({"a": torch.rand(2, 3)}, 0.5, "layer")


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("sign", [1, -1])
def test_select_refuses_nan_scores(sign, scope, density):
    scores = {"a": torch.rand(4, 4), "b": torch.rand(3, 3)}
    scores["b"][1, 1] = math.copysign(math.nan, sign)
    with pytest.raises(ValueError, match="not a number"):
        select(scores, density, scope)


@pytest.mark.parametrize("spread", ["normal", "few values"])
def test_global_selection_forms_no_copy_of_all_scores(spread):
    torch.manual_seed(0)
    scores = {str(i): SCORES[spread]((200, 200)) for i in range(40)}
    with Memory() as tensors:
        select(scores, 0.01, "global")
    tracemalloc.start()  # NumPy's arrays
    select(scores, 0.01, "global")
    _, arrays = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # All scores take 6.4 MB; what is kept, and one layer at a time, some 0.3 MB.
    assert 0 < tensors.peak + arrays < 1.3e6
