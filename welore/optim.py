"""AdamW in float32, whatever the dtype of the model: one policy for every mode.

A pure bfloat16 step at a learning rate of 5e-5 rounds most updates away, and unevenly across modes. Here a parameter
that is not float32 gets a float32 master copy, which the optimizer steps and which is rounded into the model.
"""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Float32Masters:
    """Mixed in before a `torch.optim.Optimizer`: it steps float32 masters of the parameters that it is given.

    A parameter that is float32 is its own master and is not copied. The gradient of any other moves to its master as
    soon as a backward pass has formed it, so that passes accumulate in float32 and no gradient is held twice: clip
    what is in `param_groups`. `state_dict` carries the masters: a resumed run continues from them to the bit.
    """

    plain: ClassVar[dict] = {}  # options of a group that is to be stepped by plain AdamW, where the others are not

    def __init__(self, parameters: list[nn.Parameter], **options):
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.hooks: list[RemovableHandle] = []
        super().__init__(self._masters(parameters), **options)

    def add(self, parameters: list[nn.Parameter], lr: float) -> None:
        """One more group of parameters, which plain AdamW steps at its own learning rate: nothing projects them."""
        self.add_param_group({"params": self._masters(parameters), "lr": lr, **self.plain})

    def _masters(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in parameters]
        pairs = [(p, master) for p, master in zip(parameters, masters, strict=True) if p is not master]
        self.pairs += pairs
        self._hook(pairs)
        return masters

    def _hook(self, pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
        for parameter, master in pairs:
            self.hooks.append(parameter.register_post_accumulate_grad_hook(partial(_move_gradient, master)))

    def attach(self) -> None:
        """Take the parameters up again after `release`."""
        if not self.hooks:
            self._hook(self.pairs)

    def release(self) -> None:
        """Let go of the parameters: their gradients and what moves them to masters, which else stay with the model."""
        self.zero_grad(set_to_none=True)
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        super().step()
        for parameter, master in self.pairs:
            parameter.copy_(master)
        return loss

    def state_dict(self) -> dict:
        return super().state_dict() | {"masters": [master.detach() for _, master in self.pairs]}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict({key: value for key, value in state.items() if key != "masters"})
        for (parameter, master), saved in zip(self.pairs, state["masters"], strict=True):
            master.copy_(saved)
            parameter.copy_(master)


@torch.no_grad()
def _move_gradient(master: nn.Parameter, parameter: nn.Parameter) -> None:
    gradient, parameter.grad = parameter.grad.float(), None
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)


class AdamW(Float32Masters, torch.optim.AdamW):
    """`torch.optim.AdamW` on float32 masters, fused."""

    def __init__(self, parameters: list[nn.Parameter], **options):
        super().__init__(parameters, fused=True, **options)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of everything that the optimizer keeps between steps, masters included; what parameters share, once."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    tensors += [master for _, master in getattr(optimizer, "pairs", [])]
    each = {id(tensor): tensor for tensor in tensors}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in each)
