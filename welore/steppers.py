"""Modes that train what `Full` trains, or the LRCs, with another optimizer than AdamW."""

import importlib.util
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from welore.apollo import Apollo as ApolloOptimizer
from welore.apollo import Fira as FiraOptimizer
from welore.errors import Refused
from welore.modes import Full, GaLore, Lrc
from welore.optim import Float32Masters


@dataclass
class Fira(GaLore):
    """GaLore plus the rest of each gradient, scaled as Adam scales the projected part."""

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return FiraOptimizer(parameters, rank=self.rank, gap=self.gap, scale=self.scale, **self.adam)


@dataclass
class Apollo(GaLore):
    """Gradients scaled by channel or by tensor, as Adam in a random projection of rank `rank` would scale them."""

    per: str
    seed: int

    def __post_init__(self):
        super().__post_init__()
        if self.per not in ("channel", "tensor"):
            raise Refused(f"mode.per={self.per} is unknown. Write channel, or tensor (APOLLO-Mini, with mode.rank=1).")

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        drawn = dict(rank=self.rank, gap=self.gap, scale=self.scale, per=self.per, seed=self.seed)
        return ApolloOptimizer(parameters, **drawn, **self.adam)


@dataclass
class Muon(Full):
    """Orthogonalized momentum for matrices (`torch.optim.Muon`), AdamW for norms and biases."""

    momentum: float

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise Refused(f"mode.momentum={self.momentum} is not in [0, 1). Write 0.95.")
        if not hasattr(torch.optim, "Muon"):
            raise Refused(f"mode=muon needs torch.optim.Muon, and torch {torch.__version__} has none. Use torch 2.9.")

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        from welore.muon import MuonAdamW

        return MuonAdamW(parameters, momentum=self.momentum, **self.adam)


class EightBit:
    """Mixed in before a mode that trains with AdamW: its two moments take a byte each (bitsandbytes, on a GPU).

    Masters stay in float32. What is selected, and what it takes, can be told without a GPU.
    """

    def check(self, model: PreTrainedModel) -> None:
        super().check(model)
        self._check_library()

    def _check_library(self) -> None:
        if not torch.cuda.is_available():
            raise Refused(
                f"mode={self.name} keeps its moments in 8 bits, which needs a GPU, and torch sees none here. "
                f"Write mode={self.name.removesuffix('_8bit')}, or start where there is one."
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise Refused(
                f"mode={self.name} needs bitsandbytes, which is not installed. Run: pip install bitsandbytes"
            )

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        self._check_library()
        import bitsandbytes

        kind = type("AdamW8bit", (Float32Masters, bitsandbytes.optim.AdamW8bit), {})
        return kind(parameters, **self.adam)


@dataclass
class Lrc8bit(EightBit, Lrc):
    """`Lrc` with 8-bit moments."""


@dataclass
class Full8bit(EightBit, Full):
    """`Full` with 8-bit moments."""
