"""GaLore: Adam in a low-rank projection of each gradient (Zhao et al., 2024).

Shape suffixes: M, N = the sides of one weight, K = min(M, N), R = rank of the projection.
"""

import math

import torch
from torch import Tensor, nn

from welore.optim import Float32Masters
from welore.svd import short_vectors


def project(G_MN: Tensor, P_KR: Tensor) -> Tensor:
    """The gradient in R directions of its shorter side: G P (M x R) if M >= N, else P^T G (R x N)."""
    return G_MN @ P_KR if G_MN.shape[0] >= G_MN.shape[1] else P_KR.T @ G_MN


def project_back(low: Tensor, P_KR: Tensor, shape: torch.Size) -> Tensor:
    """From the projection to the shape (M, N) of the weight."""
    return low @ P_KR.T if shape[0] >= shape[1] else P_KR @ low


def directions(G_MN: Tensor, rank: int) -> Tensor:
    """The `rank` largest singular vectors of the shorter side, K x R: of the columns of a square gradient, as in the
    reference code."""
    wide = G_MN.T if G_MN.shape[0] >= G_MN.shape[1] else G_MN
    return short_vectors(wide)[:, :rank].contiguous()


def update_moments(state: dict, low: Tensor, betas: tuple[float, float]) -> int:
    """Take a projected gradient into Adam's two moments, and return the number of the step, from 1.

    The moments are kept when the projection changes, as in the reference code.
    """
    if "step" not in state:
        state["step"] = torch.tensor(0.0)
        state["mean"], state["square"] = torch.zeros_like(low), torch.zeros_like(low)
    state["mean"].lerp_(low, 1 - betas[0])
    state["square"].mul_(betas[1]).addcmul_(low, low, value=1 - betas[1])
    state["step"] = state["step"] + 1
    return int(state["step"])


class _GaLoreAdamW(torch.optim.Optimizer):
    def __init__(self, parameters, lr, betas, eps, weight_decay, rank, gap, scale):
        options = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, rank=rank, gap=gap, scale=scale)
        super().__init__(parameters, options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group, self.state[parameter])

    def _step(self, parameter: nn.Parameter, group: dict, state: dict) -> None:
        gradient = parameter.grad
        projected = parameter.ndim == 2 and min(parameter.shape) > group["rank"]
        if projected and int(state.get("step", 0)) % group["gap"] == 0:
            state["projection"] = directions(gradient, group["rank"])
        low = project(gradient, state["projection"]) if projected else gradient
        beta1, beta2 = group["betas"]
        step = update_moments(state, low, group["betas"])
        corrected = (state["square"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = (state["mean"] / (1 - beta1**step)).div_(corrected)
        if projected:
            update = project_back(update, state["projection"], parameter.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * group["scale"])


class GaLoreAdamW(Float32Masters, _GaLoreAdamW):
    """AdamW on float32 masters whose moments live in a rank-`rank` projection of the gradient.

    The projection is taken from the gradient every `gap` steps, from the first on, and the update is multiplied by
    `scale`. A vector, or a matrix whose shorter side is at most `rank`, has nothing to project: it is stepped by plain
    AdamW at the same effective rate lr x scale (the reference code leaves out the scale there, which lets thin factors
    move 1 / scale times as fast as the rest).

    `eps` is added behind the bias correction, as in the paper and in torch's AdamW; the reference code adds it before,
    where it weighs up to 32 times as much in the first steps. Gradients of all weights are there at once, where the
    reference code can step each weight as soon as its gradient is there. Every state is a tensor, so checkpoints load
    with `weights_only=True` and a run resumes to the bit.
    """

    plain = {"rank": math.inf, "scale": 1.0}
