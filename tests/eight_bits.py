"""AdamW in 8 bits with the states of bitsandbytes 0.50.2, for tests where that is not installed."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, SMALLEST = 256, 4096  # numbers that share a scale; a tensor with fewer keeps float32
WRAPPED = "quantized"


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments are bytes, places in a table of 256 values, and one scale for every block."""

    def __init__(self, parameters, lr, betas, eps, weight_decay):
        super().__init__(parameters, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.tables = torch.linspace(-1, 1, 256) ** 3, torch.linspace(0, 1, 256) ** 3

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group, self.state[parameter])

    def _step(self, parameter, group, state):
        if not state:
            state["step"] = 0
            for moment in "12":
                self._keep(state, moment, torch.zeros_like(parameter))
        state["step"] += 1
        mean, square = (self._kept(state, moment) for moment in "12")
        beta1, beta2 = group["betas"]
        mean = beta1 * mean + (1 - beta1) * parameter.grad
        square = beta2 * square + (1 - beta2) * parameter.grad**2
        root = (square / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean / (1 - beta1 ** state["step"]), root, value=-group["lr"])
        self._keep(state, "1", mean)
        self._keep(state, "2", square)

    def _keep(self, state: dict, moment: str, value: Tensor) -> None:
        if value.numel() < SMALLEST:
            state[f"state{moment}"] = value
            return
        table = self.tables[int(moment) - 1]
        blocks = F.pad(value.flatten(), (0, -value.numel() % BLOCK)).view(-1, BLOCK)
        top = blocks.abs().amax(dim=1)
        places = torch.bucketize(blocks / top.clamp(min=1e-30)[:, None], (table[1:] + table[:-1]) / 2)
        state[f"state{moment}"] = places.flatten()[: value.numel()].view_as(value).to(torch.uint8)
        state[f"qmap{moment}"], state[f"absmax{moment}"] = table, top

    def _kept(self, state: dict, moment: str) -> Tensor:
        value = state[f"state{moment}"]
        if value.dtype != torch.uint8:
            return value
        scale = state[f"absmax{moment}"].repeat_interleave(BLOCK)[: value.numel()].view_as(value)
        return state[f"qmap{moment}"][value.long()] * scale

    def state_dict(self) -> dict:
        """All tensors of a parameter stand in a mapping of their own, as in the library."""
        found = super().state_dict()
        states = {
            index: {"step": state["step"], WRAPPED: {k: v for k, v in state.items() if k != "step"}}
            for index, state in found["state"].items()
        }
        return found | {"state": states}

    def load_state_dict(self, saved: dict) -> None:
        """Without the casts of torch, which would make floats of the bytes."""
        stepped = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in saved["state"].items():
            self.state[stepped[index]] = {"step": state["step"], **state[WRAPPED]}
        for group, other in zip(self.param_groups, saved["param_groups"], strict=True):
            group |= {key: value for key, value in other.items() if key != "params"}
