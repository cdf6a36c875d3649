"""Modes that train a part of the weights or of their singular values, by hand because no library has them.

Shape suffixes: M = out_features, N = in_features, R = rank, K = rows that train.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from welore.errors import Refused
from welore.lowrank import LowRankLinear, balanced, replace, singular
from welore.models import components, decoder_layers
from welore.modes import Adam, Full, check_rank
from welore.rules import outlier_share


class SingularLinear(LowRankLinear):
    """y = U (sigma * (V^T x)) + bias."""

    sigma: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return self.A(self.sigma * self.B(x))


@dataclass
class SingularValues(Adam):
    """Train the singular values of every LRC between its frozen singular vectors (SVFit); N-LRCs stay as they are."""

    @property
    def refactors(self) -> bool:
        return True

    @torch.no_grad()
    def prepare(self, model: PreTrainedModel) -> None:
        for name, module in components(model).items():
            if isinstance(module, LowRankLinear):
                U_MR, sigma_R, Vh_RN = (f.to(module.A.weight) for f in singular(module.A.weight, module.B.weight))
                layer = SingularLinear.of(U_MR, Vh_RN, module.A.bias)
                layer.sigma = nn.Parameter(sigma_R)
                replace(model, name, layer)

    def trainables(self, model: PreTrainedModel) -> list[nn.Parameter]:
        values = [module.sigma for module in model.modules() if isinstance(module, SingularLinear)]
        return values and values + self.normalizations(model)

    @torch.no_grad()
    def finish(self, model: PreTrainedModel) -> None:
        for name, module in components(model).items():
            if isinstance(module, SingularLinear):
                root_R, dtype = module.sigma.float().abs().sqrt(), module.sigma.dtype
                A_MR, B_RN = module.A.weight * (root_R * module.sigma.sign()), root_R[:, None] * module.B.weight
                replace(model, name, LowRankLinear.of(A_MR.to(dtype), B_RN.to(dtype), module.A.bias))


class CoreLinear(nn.Module):
    """y = W x + A (R (B x)) with frozen A and B, beside the layer that holds W."""

    def __init__(self, base: nn.Module, A_MR: Tensor, B_RN: Tensor):
        super().__init__()
        self.base = base
        self.register_buffer("A", A_MR, persistent=False)
        self.register_buffer("B", B_RN, persistent=False)
        self.core = nn.Parameter(torch.zeros(len(B_RN), len(B_RN), dtype=A_MR.dtype, device=A_MR.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(F.linear(x, self.B), self.core), self.A)


@dataclass
class LoraXs(Adam):
    """Train one rank x rank matrix for every weight, between its frozen largest singular vectors: U S R V^T (LoRA-XS).

    R starts at 0. An LRC is adapted as one weight, and keeps its rank, for the update lies in what it spans.
    """

    rank: int

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise Refused(f"mode.rank={self.rank} adapts nothing. Write 1 or more.")

    @property
    def refactors(self) -> bool:
        return True

    def check(self, model: PreTrainedModel) -> None:
        check_rank(self, model)

    @torch.no_grad()
    def prepare(self, model: PreTrainedModel) -> None:
        check_rank(self, model)
        for name, module in components(model).items():
            if isinstance(module, LowRankLinear):
                U, sigma, Vh = singular(module.A.weight, module.B.weight)
            else:
                U, sigma, Vh = torch.linalg.svd(module.weight.float(), full_matrices=False)
            rank, dtype = min(self.rank, len(sigma)), next(module.parameters()).dtype
            A_MR, B_RN = (U[:, :rank] * sigma[:rank]).to(dtype), Vh[:rank].to(dtype)
            replace(model, name, CoreLinear(module, A_MR, B_RN.contiguous()))

    def trainables(self, model: PreTrainedModel) -> list[nn.Parameter]:
        cores = [module.core for module in model.modules() if isinstance(module, CoreLinear)]
        return cores and cores + self.normalizations(model)

    @torch.no_grad()
    def finish(self, model: PreTrainedModel) -> None:
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, CoreLinear)]:
            base, A_MR = layer.base, layer.A.float() @ layer.core.float()
            if isinstance(base, LowRankLinear):
                wide = torch.cat([base.A.weight.float(), A_MR], dim=1), torch.cat([base.B.weight, layer.B])
                base = LowRankLinear.of(*balanced(*wide, base.rank, base.A.weight.dtype), base.A.bias)
            else:
                base.weight.copy_(base.weight.float() + A_MR @ layer.B.float())
            replace(model, name, base)


@dataclass
class Lisa(Full):
    """What `Full` trains, but only `layers` decoder layers at a time, drawn anew every `gap` steps (LISA).

    The others are frozen meanwhile, and have neither gradients nor moments: these start at 0 when their turn comes.
    Norms outside of the decoder layers always train. The draw depends on `seed` and the step alone.

    `sampling=outlier` draws a layer with a probability in proportion to its share of weights above `outlier` times
    their mean (OwLore). There |W| is weighed by the norms of its inputs; here it is not, so that no text is needed.
    """

    foreseen = False
    layers: int
    gap: int
    seed: int
    sampling: str
    outlier: float

    def __post_init__(self):
        super().__post_init__()
        if self.layers < 1 or self.gap < 1:
            raise Refused(f"mode has layers={self.layers}, gap={self.gap}. Write 1 or more of both.")
        if self.sampling not in ("uniform", "outlier"):
            raise Refused(f"mode.sampling={self.sampling} is unknown. Write uniform or outlier.")
        if not self.outlier > 0:
            raise Refused(f"mode.outlier={self.outlier} is no multiple of a mean. Write 5, or another above 0.")

    def check(self, model: PreTrainedModel) -> None:
        count = len(decoder_layers(model))
        if self.layers > count:
            raise Refused(f"mode.layers={self.layers}, and the model has {count}. Write {count} or less.")

    def trainables(self, model: PreTrainedModel) -> list[nn.Parameter]:
        self.check(model)
        blocks = list(decoder_layers(model).values())
        parameters = super().trainables(model)
        chosen = {id(p) for p in parameters}
        self._blocks = [[p for p in block.parameters() if id(p) in chosen] for block in blocks]
        if self.sampling == "outlier":
            self._shares = outlier_shares(model, self.outlier)
        return parameters

    def drawn(self, step: int) -> set[int]:
        """The decoder layers that train in a step."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step // self.gap)
        if self.sampling == "outlier":
            return set(torch.multinomial(self._shares, self.layers, generator=draw).tolist())
        return set(torch.randperm(len(self._blocks), generator=draw)[: self.layers].tolist())

    @property
    def takes_turns(self) -> bool:
        return True

    def begin_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        masters = {id(parameter): master for parameter, master in optimizer.pairs}
        drawn = self.drawn(step)
        for index, block in enumerate(self._blocks):
            for parameter in block:
                parameter.requires_grad_(index in drawn)
                if index not in drawn:
                    optimizer.state.pop(masters.get(id(parameter), parameter), None)


@torch.no_grad()
def outlier_shares(model: PreTrainedModel, multiple: float) -> Tensor:
    """The share of |W| above `multiple` times its mean, over all compressible weights of each decoder layer.

    An LRC counts as its product. A layer without outliers is drawn only where the others do not suffice.
    """
    weights = components(model)
    shares = []
    for prefix in decoder_layers(model):
        inside = [module for name, module in weights.items() if name.startswith(f"{prefix}.")]
        matrices = [m.merged() if isinstance(m, LowRankLinear) else m for m in inside]
        shares.append(outlier_share([m.weight.float().abs() for m in matrices], multiple))
    return torch.tensor(shares, dtype=torch.float64).clamp(min=1e-12)
