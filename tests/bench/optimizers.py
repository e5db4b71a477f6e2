"""What takes AdamW's place in ablations: built like it, by (params, weight_decay=..., fused=...)."""

import torch


def momentum(params, **adamw):
    """SGD with momentum: an entry moves as its gradient is large, not all as far as Adam has it."""
    return torch.optim.SGD(params, lr=0.0, momentum=0.9)


class LayerAdam(torch.optim.Optimizer):
    """Adam with one second moment for each parameter tensor, the mean over its entries (Adam-mini's idea).

    So layers move at the same speed, as under Adam, and the entries of a layer as their gradients are large.
    """

    def __init__(self, params, **adamw):
        super().__init__(params, {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros(())}
                state["step"] += 1
                state["mean"].lerp_(parameter.grad, 1 - first)
                state["square"].lerp_(parameter.grad.square().mean().cpu(), 1 - second)
                mean = state["mean"] / (1 - first ** state["step"])
                size = (state["square"] / (1 - second ** state["step"])).sqrt().item()
                parameter.sub_(mean, alpha=group["lr"] / (size + group["eps"]))
