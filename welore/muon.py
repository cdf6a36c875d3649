"""Muon for matrices and Adam for vectors, in one optimizer on float32 masters."""

import torch
from torch import nn

from welore.optim import Float32Masters


class _MuonAdamW(torch.optim.Muon):
    """`torch.optim.Muon` takes matrices only: norms and biases are a second group, which AdamW steps."""

    def __init__(self, parameters: list[nn.Parameter], lr, betas, eps, weight_decay, momentum):
        matrices, vectors = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]
        super().__init__(matrices, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
        self.plain = {"betas": betas, "adam_eps": eps}
        if vectors:
            self.add_param_group({"params": vectors, **self.plain})

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        try:
            self.param_groups = groups[:1]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups[1:]:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._adam(parameter, group, self.state[parameter])

    def _adam(self, parameter: nn.Parameter, group: dict, state: dict) -> None:
        if not state:
            state |= {"step": torch.zeros(()), "mean": torch.zeros_like(parameter)}
            state["square"] = torch.zeros_like(parameter)
        (beta1, beta2), gradient = group["betas"], parameter.grad
        state["step"] += 1
        step = int(state["step"])
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["square"] / (1 - beta2**step)).sqrt_().add_(group["adam_eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["mean"], root, value=-group["lr"] / (1 - beta1**step))


class MuonAdamW(Float32Masters, _MuonAdamW):
    """Matrices move by lr x 0.2 sqrt(max(M, N)) in a direction of orthogonal rows or columns (Newton-Schulz).

    The factor gives such a step the root mean square of one of AdamW, so that both groups share a learning rate.
    """
