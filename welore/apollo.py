"""APOLLO (Zhu et al., 2024) and Fira (Chen et al., 2024): the whole gradient, scaled as Adam would in a projection.

By hand because no library of them resumes: apollo-torch 1.0.3, fira 1.0.2 and pytorch-optimizer 4.1.0 keep a Python
projector in their state, which `torch.load(weights_only=True)` refuses. The arithmetic is that of the first two.

Shape suffixes: M, N = the sides of one weight, K = min(M, N), R = rank of the projection.
"""

import math

import torch
from torch import Tensor, nn

from welore.galore import directions, project, project_back, update_moments
from welore.optim import Float32Masters

GROWTH = 1.01  # the norm of a scaled gradient may grow by 1 % a step


def channel_scale(update: Tensor, low: Tensor, per: str) -> Tensor:
    """How much Adam changes the norm of a projected gradient: of each channel of the longer side, or of the tensor."""
    if per == "tensor":
        return update.norm() / (low.norm() + 1e-8)
    side = 0 if low.shape[0] < low.shape[1] else 1
    return update.norm(dim=side, keepdim=True) / (low.norm(dim=side, keepdim=True) + 1e-8)


class _Projected(torch.optim.Optimizer):
    """Adam where there is nothing to project; else Adam in a projection, and `combine` says what becomes of it."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._step(parameter, group, self.state[parameter], index)

    def _step(self, parameter: nn.Parameter, group: dict, state: dict, index: int) -> None:
        G_MN, step = parameter.grad, int(state.get("step", 0))
        projected = parameter.ndim == 2 and min(parameter.shape) > group["rank"]
        if projected and step % group["gap"] == 0:
            state["projection"] = self.projection(G_MN, group, step, index)
        low = project(G_MN, state["projection"]) if projected else G_MN
        beta1, beta2 = group["betas"]
        step = update_moments(state, low, group["betas"])
        # As in the reference code, the corrections for the first steps come after the limit on growth.
        lr = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        update = state["mean"] / (state["square"].sqrt() + group["eps"])
        if projected:
            update = self.combine(update, low, G_MN, group, state)
        parameter.add_(update, alpha=-lr).mul_(1 - group["lr"] * group["weight_decay"])

    def limit(self, update: Tensor, state: dict) -> Tensor:
        """Hold the growth of the norm from step to step under `GROWTH` (the norm-growth limiter of Fira)."""
        norm = update.norm()
        if "norm" in state:
            excess = (norm / (state["norm"] + 1e-8)).clamp(min=GROWTH) / GROWTH
            update, norm = update / excess, norm / excess
        state["norm"] = norm
        return update


class _Apollo(_Projected):
    def projection(self, G_MN: Tensor, group: dict, step: int, index: int) -> Tensor:
        # Drawn on the CPU: the same on every device.
        draw = torch.Generator().manual_seed(group["seed"] + 1_000_003 * index + step)
        random_KR = torch.randn(min(G_MN.shape), group["rank"], generator=draw) / math.sqrt(group["rank"])
        return random_KR.to(G_MN)

    def combine(self, update: Tensor, low: Tensor, G_MN: Tensor, group: dict, state: dict) -> Tensor:
        scaled_MN = G_MN * channel_scale(update, low, group["per"])
        return self.limit(scaled_MN, state) * math.sqrt(group["scale"])


class _Fira(_Projected):
    def projection(self, G_MN: Tensor, group: dict, step: int, index: int) -> Tensor:
        return directions(G_MN, group["rank"])

    def combine(self, update: Tensor, low: Tensor, G_MN: Tensor, group: dict, state: dict) -> Tensor:
        P_KR = state["projection"]
        rest_MN = G_MN - project_back(low, P_KR, G_MN.shape)
        rest_MN = self.limit(rest_MN * channel_scale(update, low, "channel"), state)
        return group["scale"] * (project_back(update, P_KR, G_MN.shape) + rest_MN)


class Apollo(Float32Masters, _Apollo):
    """The gradient times a scale for each channel, measured by Adam in a random projection, on float32 masters.

    `per=tensor` with `rank=1` is APOLLO-Mini. Vectors and matrices no wider than `rank` are stepped by Adam. The state
    is tensors only: moments and projection of rank `rank`, and one norm.
    """

    plain = {"rank": math.inf, "scale": 1.0}


class Fira(Float32Masters, _Fira):
    """GaLore plus the part of the gradient outside of its projection, scaled like the part inside, on float32 masters.

    `scale` multiplies both parts. State and exceptions are those of `Apollo`.
    """

    plain = {"rank": math.inf, "scale": 1.0}
