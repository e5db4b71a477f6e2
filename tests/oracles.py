"""The scores that `speft.salience` should give, reached by other roads.

`torch.func` on the joint vector of all scored weights, loops over samples, central differences in float64,
and networks linearised by hand for SynFlow.
"""

import copy

import torch
import torch.nn as nn

from helpers import linears, weights_of


def split(vector, weights):
    """The joint vector of all weights -> name: matrix."""
    parts = vector.split([w.numel() for w in weights.values()])
    return {name: part.view_as(w) for (name, w), part in zip(weights.items(), parts)}


def join(tensors):
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def joint_losses(model, batches, loss_fn, names=None):
    """(f, vector): f maps the joint vector of the scored weights to the losses of all samples."""
    model = copy.deepcopy(model).eval()
    weights = {name: w for name, w in weights_of(model).items() if names is None or name in names}

    def losses(vector):
        values = {f"{name}.weight": w for name, w in split(vector, weights).items()}
        call = lambda *args, **kwargs: torch.func.functional_call(model, values, args, kwargs)  # noqa: E731
        return torch.cat([loss_fn(call, batch) for batch in batches])

    return losses, join(weights), weights


def scores_from(metric, weights, theta, gradients=None, hessian_times_gradient=None):
    """The paper's formulas on joint vectors; `gradients` has one row for each sample."""
    g = None if gradients is None else gradients.mean(0)
    joint = {
        "magnitude": lambda: theta.abs(),
        "grad": lambda: g.abs(),
        "snip": lambda: (g * theta).abs(),
        "force": lambda: -g * theta,
        "taylor": lambda: (g * theta) ** 2,
        "grasp": lambda: -hessian_times_gradient * theta,
        "fisher": lambda: (gradients**2).mean(0),
    }[metric]()
    return split(joint, weights)


def func_oracle(metric, model, batches, loss_fn, names=None):
    """`torch.func` on the joint vector: per-sample gradients by jacrev, the whole Hessian for GRaSP."""
    losses, theta, weights = joint_losses(model, batches, loss_fn, names)
    jacobian = torch.func.jacrev(losses)(theta)
    product = None
    if metric == "grasp":
        product = torch.func.hessian(lambda v: losses(v).mean())(theta) @ jacobian.mean(0)
    return scores_from(metric, weights, theta, jacobian, product)


def loop_oracle(metric, model, batches, loss_fn):
    """One sample after the other by plain autograd; H g by a central difference of gradients."""
    model = copy.deepcopy(model).eval()
    samples = [tuple(t[i : i + 1] for t in batch) for batch in batches for i in range(len(batch[0]))]
    weights = {name: model.get_submodule(name).weight for name in list(linears(model))}
    theta = join(weights).detach()

    def gradients(vector):
        with torch.no_grad():
            for name, value in split(vector, weights).items():
                weights[name].copy_(value)
        rows = []
        for sample in samples:
            loss = loss_fn(model, sample).sum()
            found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            rows.append(torch.cat([t.reshape(-1) for t in found]))
        return torch.stack(rows)

    rows = gradients(theta)
    product = None
    if metric == "grasp":
        g = rows.mean(0)
        step = 1e-5 / g.norm()
        product = (gradients(theta + step * g).mean(0) - gradients(theta - step * g).mean(0)) / (2 * step)
    return scores_from(metric, weights, theta, rows, product)


def chain_flow(model):
    """SynFlow on a Sequential without autograd: back ⊗ forward ⊙ abs(W). Returns the scores and R."""
    matrices = []
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            matrices.append((name, module.weight.detach().double().abs()))
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)):
            matrices.append((None, torch.diag(module.weight.detach().double().abs())))
    ahead = [torch.ones(matrices[0][1].size(1), dtype=torch.float64)]
    for _, matrix in matrices:
        ahead.append(matrix @ ahead[-1])
    scores, back = {}, torch.ones(matrices[-1][1].size(0), dtype=torch.float64)
    for (name, matrix), value in zip(reversed(matrices), reversed(ahead[:-1])):
        if name is not None:
            scores[name] = torch.outer(back, value) * matrix
        back = matrix.T @ back
    return {name: scores[name] for name, _ in matrices if name is not None}, ahead[-1].sum()


def gpt_flow(model):
    """SynFlow on a GPT: the linearised network written out over one position, differentiated in float64."""
    config = model.config
    p = {name: t.detach().double().abs().requires_grad_() for name, t in model.named_parameters()}
    x = torch.full((config.n_embd,), 1.0 if config.rope_theta else 2.0, dtype=torch.float64)
    for i in range(config.n_layer):
        block = f"blocks.{i}."
        v = p[block + "attn.v.weight"] @ (x * p[block + "norm1.weight"])
        heads = v.view(config.n_kv_head, config.head_dim)
        heads = heads[torch.arange(config.n_head) // (config.n_head // config.n_kv_head)]
        x = x + p[block + "attn.o.weight"] @ heads.flatten()
        h = x * p[block + "norm2.weight"]
        inner = p[block + "mlp.up.weight"] @ h
        if config.gated_mlp:
            inner = inner.sqrt() * (p[block + "mlp.gate.weight"] @ h).sqrt()
        x = x + p[block + "mlp.down.weight"] @ inner
    head = p["wte.weight" if config.tied_head else "head"]
    (head @ (x * p["norm.weight"])).sum().backward()
    flow = {name: p[f"{name}.weight"] for name in list(linears(model))}
    return {n: torch.zeros_like(w) if w.grad is None else (w.grad * w).detach() for n, w in flow.items()}


def assert_close(scores, expected, rtol=1e-6, atol=1e-8):
    """Every layer within rtol, or within atol of the largest score of all layers."""
    assert list(scores) == list(expected)
    largest = max(t.abs().max().item() for t in expected.values())
    for name, want in expected.items():
        message = lambda text: f"{name}: {text}"  # noqa: E731
        got = scores[name].double()
        torch.testing.assert_close(got, want.double(), rtol=rtol, atol=atol * largest, msg=message)
