"""Training with every weight cut into one shard a process (FSDP): a layer has its weights whole while it computes.

Lightning's own strategies of this kind refuse a CPU, and their checkpoints leave out the float32 masters. This one is
torch's `fully_shard` in the processes of Lightning's DDP. A checkpoint holds whole tensors, as that of one process
does, and either goes on from the other's: the first process gathers them one by one in the memory of its CPU.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from welore import processes
from welore.models import decoder_layers


@contextmanager
def sharded(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A twin of the model to train, whose layers hold shards; meanwhile the model itself holds none of their weights.

    Embeddings and output matrix stay whole and are shared by both: they are frozen, and the loss multiplies with the
    output matrix outside of any layer. After training the weights are in the model again, in every process.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=shared)
    shard(twin)
    pairs = [(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True) if isinstance(q, DTensor)]
    for whole, _ in pairs:
        whole.data = whole.data.new_empty(0)
    yield twin
    for whole, part in pairs:
        whole.data = part.detach().full_tensor()


def shard(model: PreTrainedModel) -> None:
    """Cut the weights of the decoder layers, and what else trains, in place."""
    device = next(model.parameters()).device.type
    options = {
        "mesh": init_device_mesh(device, (processes.count(),)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),  # gradients are averaged as masters add them up
    }
    layers = list(decoder_layers(model).values())
    inside = {id(p) for layer in layers for p in layer.parameters()}
    whole = {p for p in model.parameters() if id(p) not in inside and not p.requires_grad}
    for layer in layers:
        fully_shard(layer, **options)
    # Cut again after each pass, as layers are: what stayed whole would not see the weights of a checkpoint.
    fully_shard(model.base_model, ignored_params=whole, reshard_after_forward=True, **options)


class Sharded(DDPStrategy):
    """The processes of DDP, for a model whose layers average their own gradients."""

    def configure_ddp(self) -> None:
        """There is nothing to wrap."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {name: _gathered(p) for name, p in self.lightning_module.named_parameters() if p.requires_grad}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return tree_map(_gathered, optimizer.state_dict())

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        parameters = dict(self.lightning_module.named_parameters())
        for name, saved in checkpoint["state_dict"].items():
            parameters[name].copy_(_cut_as(parameters[name], saved))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            stepped = [p for group in optimizer.param_groups for p in group["params"]]
            state = {index: _cut_all(stepped[index], moments) for index, moments in saved["state"].items()}
            masters = [_cut_as(own, whole) for (_, own), whole in zip(optimizer.pairs, saved["masters"], strict=True)]
            optimizer.load_state_dict(saved | {"state": state, "masters": masters})


def _gathered(value: Any) -> Any:
    """A tensor whole, in the first process; the others, which write no checkpoint, take part and keep nothing."""
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if processes.index() == 0 else None


def _cut_all(parameter: nn.Parameter, state: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer keeps of a parameter: moments are cut as it is, the number of steps is not."""
    alike = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape}
    return state | {key: _cut_as(parameter, value) for key, value in alike.items()}


def _cut_as(parameter: Tensor, whole: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
