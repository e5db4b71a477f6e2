"""Every metric on a toy model, against numbers worked out by hand. To test a metric of your own, copy this.

The model is y = w relu(V x), without biases. Two samples are scored, with the loss ℓ = (y − t)² / 2:

               x     relu(V x)    y    t    e = y − t    ∂ℓ/∂V                ∂ℓ/∂w
    first   (1, 0)    (2, 1)      0    2       −2        [[−2, 0], [4, 0]]    (−4, −2)
    second  (0, 1)    (1, 0)      1   −1        2        [[ 0, 2], [0, 0]]    ( 2,  0)
    mean, the g of the formulas                          [[−1, 1], [2, 0]]    (−1, −1)

∂ℓ/∂w is e relu(V x). Row i of ∂ℓ/∂V is e wᵢ x where the unit i is on, else zero.
"""

import pytest
import torch
import torch.nn as nn

from speft import METRICS, salience

V = [[2.0, 1.0], [1.0, -3.0]]
W = [[1.0, -2.0]]
FIRST = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]])
SECOND = torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0]])

SCORES = {  # metric: the scores of V and of w
    # abs(θ)
    "magnitude": ([[2, 1], [1, 3]], [[1, 2]]),
    # abs(g)
    "grad": ([[1, 1], [2, 0]], [[1, 1]]),
    # abs(g ⊙ θ): g ⊙ V = [[−2, 1], [2, 0]] and g ⊙ w = (−1, 2)
    "snip": ([[2, 1], [2, 0]], [[1, 2]]),
    # −g ⊙ θ
    "force": ([[2, -1], [-2, 0]], [[1, -2]]),
    # (g ⊙ θ)²
    "taylor": ([[4, 1], [4, 0]], [[1, 4]]),
    # The mean of the samples' squared gradients: for w, ((−4)² + 2²) / 2 = 10 and ((−2)² + 0²) / 2 = 2.
    "fisher": ([[2, 2], [8, 0]], [[10, 2]]),
    # R = abs(w) abs(V) (1, 1) = (1, 2) · (3, 4) = 11. Every layer's scores add up to R.
    "synflow": ([[2, 1], [2, 6]], [[3, 8]]),
    # −(H g) ⊙ θ, where H g is how the gradient changes as V and w move along their g: relu' is the change of
    # relu(V x), w' = (−1, −1), and e' = w' · relu + w · relu'. Then ∂ℓ/∂w changes by e' relu + e relu', and
    # row i of ∂ℓ/∂V by (e' wᵢ + e w'ᵢ) x where the unit is on.
    # First: relu' = (−1, 2), e' = −3 − 5 = −8; for w (−16, −8) + (2, −4), for V [[−8 + 2, 0], [16 + 2, 0]].
    # Second: relu' = (1, 0), e' = −1 + 1 = 0; for w (2, 0), for V [[0, −2], [0, 0]].
    # Their mean: H g = [[−3, −1], [9, 0]] and (−6, −6).
    "grasp": ([[6, 1], [-9, 0]], [[6, -12]]),
}


def losses(model, batch):
    """The loss of every sample, (B,)."""
    x, t = batch
    return (model(x) - t).square().squeeze(1) / 2


def toy():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model[0].weight.data, model[2].weight.data = torch.tensor(V), torch.tensor(W)
    return model


@pytest.mark.parametrize("batches", ([FIRST, SECOND], [tuple(map(torch.cat, zip(FIRST, SECOND)))]))
@pytest.mark.parametrize("metric", SCORES)
def test_scores_are_those_worked_out_by_hand(metric, batches):
    scores = salience(toy(), metric, batches, losses)
    assert [scores["0"].tolist(), scores["2"].tolist()] == [*SCORES[metric]]


def test_random_scores_are_drawn_uniformly_layer_after_layer():
    model = toy()
    torch.manual_seed(0)
    expected = [torch.rand(2, 2).tolist(), torch.rand(1, 2).tolist()]
    torch.manual_seed(0)
    assert [score.tolist() for score in salience(model, "random", [], losses).values()] == expected


def test_no_metric_is_left_out():
    assert {*SCORES, "random"} == set(METRICS)
