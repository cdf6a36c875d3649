"""Inference in fewer products: weights that read the same input become one matrix.

A product of one token costs little more than its call, and an LRC needs two. Queries, keys and values read one input,
as gate and up do: their first factors, and those of them that stayed dense, are multiplied with it at once.

Shape suffixes: M = out_features, N = in_features, R = rank, S = rows of the joint matrix.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from welore.errors import Refused
from welore.lowrank import FAST, LowRankLinear
from welore.models import components


class Joint:
    """Linear layers that read one input, the first product of all of them as one.

    The parameters of the layers become views into the joint matrix: nothing is stored twice. Whichever layer is
    called first multiplies, and the others find their part, as long as they are called with the very same tensor.
    """

    def __init__(self, members: list[nn.Linear | LowRankLinear], multiple: int):
        firsts = [member.B if isinstance(member, LowRankLinear) else member for member in members]
        # Rows of 0 up to the next multiple meet columns of 0 in the second factor. A dense weight has no such partner.
        rows = [_padded(len(f.weight), multiple if f is not m else 1) for f, m in zip(firsts, members, strict=True)]
        self.sizes = rows
        self.W_SN = torch.cat([_wide(f.weight, size, 0) for f, size in zip(firsts, rows, strict=True)])
        for first, part_MN in zip(firsts, self.W_SN.split(rows), strict=True):
            first.weight = _frozen(part_MN[: len(first.weight)])
        self.bias_S = self._joint_bias(firsts)
        self._last = members[-1]
        self._held: tuple[Tensor, tuple[Tensor, ...]] | None = None
        for index, member in enumerate(members):
            member.forward = partial(self._forward, index, member, _second(member, rows[index]))

    def _joint_bias(self, firsts: list[nn.Linear]) -> Tensor | None:
        if all(first.bias is None for first in firsts):
            return None
        bias_S = self.W_SN.new_zeros(len(self.W_SN))
        for first, part_M in zip(firsts, bias_S.split(self.sizes), strict=True):
            if first.bias is not None:
                first.bias = _frozen(part_M.copy_(first.bias))
        return bias_S

    def _forward(self, index: int, member: nn.Module, A_MR: Tensor | None, x: Tensor) -> Tensor:
        held = self._held  # read once: another thread may be generating with the same model
        if held is None or held[0] is not x:
            held = x, F.linear(x, self.W_SN, self.bias_S).split(self.sizes, dim=-1)
        # Weights are called in one order: after the last of them nobody needs the input any more.
        self._held = None if member is self._last else held
        y = held[1][index]
        return y if A_MR is None else F.linear(y, A_MR, member.A.bias)


@torch.no_grad()
def fuse(model: PreTrainedModel, multiple: int | None = None) -> None:
    """Join the products of weights that read one input, for a model that is only used: it is frozen here.

    Outputs are the same up to rounding, and memory grows by what `multiple` pads alone: ranks are filled with zeros
    up to a multiple of it, by default of 8 on a GPU, where others may cost more than twice the time, and not at all
    on a CPU. Which weights share an input is read off one pass over a few tokens, so that any architecture will do.
    Move and cast the model before. Adapters keep their own products.
    """
    if multiple is None:
        multiple = FAST if model.get_input_embeddings().weight.is_cuda else 1
    if multiple < 1:
        raise Refused(f"multiple={multiple} pads nothing. Write 1 for ranks as they are, or 8.")
    unfuse(model)
    model.requires_grad_(False)
    for members in _readers(model):
        if len(members) > 1 or isinstance(members[0], LowRankLinear):
            Joint(members, multiple)


def unfuse(model: PreTrainedModel) -> None:
    """Every weight multiplies for itself again. Parameters stay views into what was joined."""
    for module in components(model).values():
        vars(module).pop("forward", None)


def _readers(model: PreTrainedModel) -> list[list[nn.Linear | LowRankLinear]]:
    """Weights by the tensor that they read, in the order of their calls; those that are called just once in a pass."""
    calls: list[tuple[Tensor, nn.Module]] = []
    plain = [module for module in components(model).values() if _is_plain(module)]
    handles = [m.register_forward_pre_hook(lambda m, args: calls.append((args[0], m))) for m in plain]
    try:
        device = model.get_input_embeddings().weight.device
        model(input_ids=torch.arange(2, device=device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    counts = [sum(module is other for _, other in calls) for _, module in calls]
    groups: dict[int, list[nn.Module]] = {}
    for (x, module), count in zip(calls, counts, strict=True):
        if count == 1:
            # The list keeps all inputs alive, so that no two have one id.
            groups.setdefault(id(x), []).append(module)
    return list(groups.values())


def _is_plain(module: nn.Module) -> bool:
    """Whether its forward pass is the product and nothing else: no adapter inside, no subclass."""
    parts = (module.A, module.B) if type(module) is LowRankLinear else (module,)
    return all(type(part) is nn.Linear for part in parts)


def _second(member: nn.Module, rows: int) -> Tensor | None:
    """The second factor of an LRC with as many columns as its first has rows now; None for a dense weight."""
    if not isinstance(member, LowRankLinear):
        return None
    A_MR = _wide(member.A.weight, rows, 1)
    member.A.weight = _frozen(A_MR[:, : member.rank])
    return A_MR


def _wide(W: Tensor, size: int, dim: int) -> Tensor:
    """A matrix with zeros behind it along `dim`; itself where it has that size."""
    if W.shape[dim] == size:
        return W.detach()
    extra = [(0, 0), (0, 0)]
    extra[dim] = (0, size - W.shape[dim])
    return F.pad(W.detach(), [*extra[1], *extra[0]])


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _frozen(W: Tensor) -> nn.Parameter:
    return nn.Parameter(W, requires_grad=False)
