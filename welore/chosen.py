"""Training one side of WeLore's division, whatever was factored, with as many parameters as its LRCs have."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from welore.errors import Refused
from welore.lowrank import factored_ranks
from welore.models import components
from welore.modes import Adam

WHO = ("lrc", "nlrc", "random", "all")


@dataclass
class Chosen(Adam):
    """Train whole weights of one side of WeLore's division: `lrc`, `nlrc`, `random` (either side) or `all`.

    Equal parameters: all but `all` train at most as many as the factors of WeLore's LRCs hold, sum of r (m + n), a
    random choice of weights filling that budget as far as whole weights can. `all` is the ceiling and trains more.
    Weights train in the form that the cut left them in: two factors or dense. Unless `divide` has told of another
    division, the LRCs are what is factored.
    """

    foreseen = True
    who: str
    seed: int

    def __post_init__(self):
        super().__post_init__()
        if self.who not in WHO:
            raise Refused(f"mode.who={self.who} is unknown. Write one of {', '.join(WHO)}.")

    def trainables(self, model: PreTrainedModel) -> list[nn.Parameter]:
        found = components(model)
        lrc = factored_ranks(model) if self.division is None else self.division
        if not lrc:
            raise Refused(
                f"mode={self.name} needs WeLore's division, and there is no LRC. Write ranks=welore or "
                f"ranks=partition, with an err at which some weights are factored."
            )
        sides = {"lrc": lrc.keys(), "nlrc": found.keys() - lrc.keys()}
        members = [name for name in found if name in sides.get(self.who, found)]
        sizes = {name: sum(p.numel() for p in found[name].parameters()) for name in members}
        if self.who != "all":
            members = within(sizes, held(lrc, found), self.seed)
        parameters = [p for name in members for p in found[name].parameters()]
        return parameters and parameters + self.normalizations(model)


def held(lrc: Mapping[str, int], found: Mapping[str, nn.Module]) -> int:
    """The parameters of WeLore's LRCs as factors, with their biases, however they are stored in this model."""
    total = 0
    for name, rank in lrc.items():
        module = found[name]
        bias = sum(p.numel() for part, p in module.named_parameters() if part.endswith("bias"))
        total += rank * (module.in_features + module.out_features) + bias
    return total


def within(sizes: Mapping[str, int], budget: int, seed: int) -> list[str]:
    """Names in a random order, each taken if it still fits; in the order of `sizes`."""
    names = list(sizes)
    taken, left = set(), budget
    for index in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist():
        if sizes[names[index]] <= left:
            taken.add(names[index])
            left -= sizes[names[index]]
    return [name for name in names if name in taken]
