"""Modes that train what `Full` trains, or the LRCs, with another optimizer than AdamW."""

import importlib.util
import math
from dataclasses import dataclass

import torch
from torch import nn

from welore.apollo import Apollo as ApolloOptimizer
from welore.apollo import Fira as FiraOptimizer
from welore.errors import Refused
from welore.modes import FLOAT32, Full, GaLore, Lora, Lrc, NLrc
from welore.optim import Float32Masters


class Limited(GaLore):
    """Whole gradients are stepped, of which the growth is held: a norm is kept of each."""

    def kept_bytes(self, parameters: list[nn.Parameter]) -> int:
        return super().kept_bytes(parameters) + FLOAT32 * sum(map(self._projects, parameters))


@dataclass
class Fira(Limited):
    """GaLore plus the rest of each gradient, scaled as Adam scales the projected part."""

    def step_bytes(self, parameters: list[nn.Parameter]) -> int:
        """GaLore's, or four matrices of the size of a weight: both parts of its update, one scaled, and the sum."""
        return max(super().step_bytes(parameters), 4 * FLOAT32 * max(p.numel() for p in parameters))

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return FiraOptimizer(parameters, rank=self.rank, gap=self.gap, scale=self.scale, **self.adam)


@dataclass
class Apollo(Limited):
    """Gradients scaled by channel or by tensor, as Adam in a random projection of rank `rank` would scale them."""

    per: str
    seed: int

    def __post_init__(self):
        super().__post_init__()
        if self.per not in ("channel", "tensor"):
            raise Refused(f"mode.per={self.per} is unknown. Write channel, or tensor (APOLLO-Mini, with mode.rank=1).")

    def step_bytes(self, parameters: list[nn.Parameter]) -> int:
        """Three matrices of the size of a weight, the scaled gradient and what the limit makes of it, and four
        projected ones. The projection is drawn, not computed."""
        return max(FLOAT32 * (3 * p.numel() + 4 * self.rank * max(p.shape)) for p in parameters)

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

    def kept_bytes(self, parameters: list[nn.Parameter]) -> int:
        """One momentum of a matrix, two moments of a vector."""
        return sum((1 if p.ndim == 2 else 2) * FLOAT32 * p.numel() for p in parameters)

    def step_bytes(self, parameters: list[nn.Parameter]) -> int:
        """Of one matrix: its momentum as the step uses it, two copies in bfloat16, and two products of its rows."""
        half = torch.bfloat16.itemsize
        matrices = [p for p in parameters if p.ndim == 2]
        return max((FLOAT32 + 2 * half) * p.numel() + 2 * half * min(p.shape) ** 2 for p in matrices)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        from welore.muon import MuonAdamW

        return MuonAdamW(parameters, momentum=self.momentum, **self.adam)


class EightBit:
    """Mixed in before a mode that trains with AdamW: its two moments take a byte each (bitsandbytes, on a GPU).

    Masters stay in float32. What is selected, and what it takes, can be told without a GPU.
    """

    def check_machine(self) -> None:
        if not torch.cuda.is_available():
            raise Refused(
                f"mode={self.name} keeps its moments in 8 bits, which needs a GPU, and torch sees none here. "
                f"Write mode={self.name.removesuffix('_8bit')}, or start where there is one."
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise Refused(
                f"mode={self.name} needs bitsandbytes, which is not installed. Run: pip install bitsandbytes"
            )

    def kept_bytes(self, parameters: list[nn.Parameter]) -> int:
        """What bitsandbytes keeps (read in version 0.50.2): for each moment a byte a number, and a float32 scale for
        every 256 of them. Tensors of less than 4,096 numbers keep float32. Two tables of 256 values are shared by all.
        """
        sizes = [p.numel() for p in parameters]
        whole = [size for size in sizes if size < 4096]
        cut = [size + FLOAT32 * math.ceil(size / 256) for size in sizes if size >= 4096]
        return 2 * (FLOAT32 * sum(whole) + sum(cut) + FLOAT32 * 256 * bool(cut))

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        self.check_machine()
        import bitsandbytes

        kind = type("AdamW8bit", (Float32Masters, bitsandbytes.optim.AdamW8bit), {})
        return kind(parameters, **self.adam)


@dataclass
class Lrc8bit(EightBit, Lrc):
    """`Lrc` with 8-bit moments."""


@dataclass
class NLrc8bit(EightBit, NLrc):
    """`NLrc` with 8-bit moments."""


@dataclass
class Lora8bit(EightBit, Lora):
    """`Lora` with 8-bit moments."""


@dataclass
class Full8bit(EightBit, Full):
    """`Full` with 8-bit moments."""
