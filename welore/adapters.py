"""Adapters of peft beyond plain LoRA, and how each becomes LRC and N-LRC again.

Shape suffixes: M = out_features, N = in_features, R = rank of an adapter.
"""

import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from welore.errors import Refused
from welore.lowrank import LowRankLinear, balanced, replace
from welore.models import components
from welore.modes import Adam, Lora, adapted, check_alpha, check_rank, forget_peft

INITS = ("kaiming", "pissa", "mica")


class VirtualWeight(LowRankLinear):
    """An LRC that shows peft its product as one weight. Every reading multiplies the factors: M R N operations."""

    @property
    def weight(self) -> Tensor:
        return (self.A.weight.float() @ self.B.weight.float()).to(self.A.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.A.bias


@dataclass
class Adapter(Lora):
    """LoRA in its variants, which compose where peft lets them.

    `rslora` scales by alpha / sqrt(rank). `dora` also trains the norm of every row of the adapted weight. `init=pissa`
    starts from the `rank` largest singular directions, which leave the frozen weight; `init=mica` trains, for the
    outputs of the smallest ones, what leads to them (on a product: of what compression has removed). `lr_ratio` is the
    learning rate of B over that of A (LoRA+). A factor thinner than `rank` takes an adapter of its own width there.
    """

    rslora: bool
    dora: bool
    init: str
    lr_ratio: float

    def __post_init__(self):
        super().__post_init__()
        if self.init not in INITS:
            raise Refused(f"mode.init={self.init} is unknown. Write {', '.join(INITS[:-1])} or {INITS[-1]}.")
        if not 0 < self.lr_ratio < math.inf:
            raise Refused(f"mode.lr_ratio={self.lr_ratio} does not train B. Write a number above 0; 1 is LoRA.")
        if self.dora and self.init == "mica":
            raise Refused("mode.dora=true and mode.init=mica: peft has no such adapter. Use one of the two.")
        if self.init == "mica" and self.lr_ratio != 1:
            raise Refused(f"mode.lr_ratio={self.lr_ratio} is of B, which mode.init=mica freezes. Write 1.")

    @property
    def foreseen(self) -> bool:
        return self.init == "kaiming" and not self.dora

    @property
    def refactors(self) -> bool:
        return self.init == "pissa" and self.lora_on == "merged"

    def prepare(self, model: PreTrainedModel) -> None:
        if self.lora_on == "merged":
            for name, module in components(model).items():
                if isinstance(module, LowRankLinear):
                    virtual = VirtualWeight.of(module.A.weight, module.B.weight, module.A.bias)
                    replace(model, name, virtual)
        super().prepare(model)
        if self.init == "pissa":
            _take_away(model)

    def variant(self, model: PreTrainedModel, targets: list[str]) -> dict[str, Any]:
        options: dict[str, Any] = {"use_rslora": self.rslora, "use_dora": self.dora}
        if self.init != "kaiming":
            thin = {name: _width(model.get_submodule(name), self.init) for name in targets}
            options["init_lora_weights"] = self.init
            options["rank_pattern"] = {re.escape(n): width for n, width in thin.items() if width < self.rank}
        return options

    def trainables(self, model: PreTrainedModel) -> list[nn.Parameter]:
        parts = [".lora_A.", ".lora_B.", ".lora_magnitude_vector."]
        if self.init == "mica":
            parts.remove(".lora_B.")
        adapters = {n: p for n, p in model.named_parameters() if any(part in n for part in parts)}
        self._fast = {id(p) for n, p in adapters.items() if ".lora_B." in n}
        return adapters and [*adapters.values(), *self.normalizations(model)]

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = super().optimizer(parameters)
        if self.lr_ratio != 1:
            (group,) = optimizer.param_groups
            stepped = list(zip(parameters, group["params"], strict=True))  # the parameters, or their masters
            group["params"] = [own for p, own in stepped if id(p) not in self._fast]
            fast = {"params": [own for p, own in stepped if id(p) in self._fast], "lr": self.lr * self.lr_ratio}
            optimizer.add_param_group(fast)
        return optimizer

    def row_scale(self, layer: nn.Module, up_MR: Tensor, down_RN: Tensor) -> Tensor | None:
        if not self.dora:
            return None
        adapter = next(iter(layer.lora_magnitude_vector))
        norm_M = (layer.get_base_layer().weight.float() + up_MR @ down_RN).norm(dim=1)
        return layer.lora_magnitude_vector[adapter].weight.float() / norm_M

    def finish(self, model: PreTrainedModel) -> None:
        super().finish(model)
        for name, module in components(model).items():
            if type(module) is VirtualWeight:
                replace(model, name, LowRankLinear.of(module.A.weight, module.B.weight, module.A.bias))


def _width(module: nn.Module, init: str) -> int:
    """How many singular directions there are to start from: of a product no more than its rank, for the largest."""
    if isinstance(module, LowRankLinear) and init == "pissa":
        return module.rank
    return min(module.in_features, module.out_features)


@torch.no_grad()
def _take_away(model: PreTrainedModel) -> None:
    """Leave in an LRC only the directions that its adapter did not start from: together they have the rank as before.

    peft does so for dense weights. It cannot for a product, whose weight it only reads.
    """
    from peft.tuners.lora.layer import LoraLayer

    for layer in [m for m in model.modules() if isinstance(m, LoraLayer)]:
        base = layer.get_base_layer()
        if isinstance(base, LowRankLinear):
            (rank,) = layer.r.values()
            A_MR, B_RN = balanced(base.A.weight, base.B.weight, base.rank, base.A.weight.dtype)
            layer.base_layer = VirtualWeight.of(A_MR[:, rank:].contiguous(), B_RN[rank:].contiguous(), base.A.bias)


@dataclass
class Inserted(Adam):
    """Adapters of peft that replace linear layers and add a full matrix: on the factors of LRCs, never on products,
    whose rank a full matrix would not leave small."""

    def inject(self, model: PreTrainedModel, config: Any) -> None:
        from peft import inject_adapter_in_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, model)

    def trainables(self, model: PreTrainedModel) -> list[nn.Parameter]:
        adapters = [p for name, p in model.named_parameters() if any(part in name for part in self.PARTS)]
        return adapters and adapters + self.normalizations(model)

    @torch.no_grad()
    def finish(self, model: PreTrainedModel) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
            base = layer.get_base_layer()
            base.weight.copy_(base.weight.float() + layer.get_delta_weight("default").float())
            replace(model, name, base)
        forget_peft(model)


@dataclass
class RandLora(Inserted):
    """Train the diagonals of a sum of frozen random products of rank `rank`: the higher, the fewer parameters.

    The random matrices follow the seed that torch was given last, which before a training is that of the run.
    """

    rank: int
    alpha: int
    dropout: float

    PARTS = (".randlora_lambda.", ".randlora_gamma.")

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise Refused(
                f"mode has rank={self.rank}, dropout={self.dropout}. Write a rank >= 1 and a share in [0, 1)."
            )
        check_alpha(self.alpha, instead=20 * self.rank)

    def check(self, model: PreTrainedModel) -> None:
        check_rank(self, model)

    def prepare(self, model: PreTrainedModel) -> None:
        from peft import RandLoraConfig

        check_rank(self, model)
        options = dict(r=self.rank, randlora_alpha=self.alpha, randlora_dropout=self.dropout)
        options["projection_prng_key"] = torch.initial_seed()
        self.inject(model, RandLoraConfig(target_modules=adapted(model, "factors"), **options))


@dataclass
class Osf(Inserted):
    """Freeze the largest singular directions of every weight and train the others, with gradients orthogonal to them.

    `frozen` is a share of the rank that the rank map gives a weight: R for an LRC, the shorter side for an N-LRC. It
    holds in both factors of an LRC, which are balanced first, so that their directions are those of the weight, and
    training leaves its rank at R. What compression has removed does not come back.
    """

    refactors = True
    frozen: float

    PARTS = (".osf_svd_params.",)

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.frozen < 1:
            raise Refused(f"mode.frozen={self.frozen} is not a share in (0, 1). Write 0.5 for half of every rank.")

    def prepare(self, model: PreTrainedModel) -> None:
        from peft import OSFConfig

        _balance(model)
        targets, frozen = [], {}
        for name in adapted(model, "factors"):
            layer = model.get_submodule(name)
            rank = min(layer.in_features, layer.out_features)
            if rank > 1:  # a single direction is frozen, and nothing is left to train
                targets.append(name)
                frozen[f"^{re.escape(name)}$"] = min(max(round(self.frozen * rank), 1), rank - 1)
        if targets:
            self.inject(model, OSFConfig(target_modules=targets, rank_pattern=frozen))


@torch.no_grad()
def _balance(model: PreTrainedModel) -> None:
    """Write every LRC in its singular directions, which its factors are not in unless they are plain."""
    for name, module in components(model).items():
        if isinstance(module, LowRankLinear):
            factors = balanced(module.A.weight, module.B.weight, module.rank, module.A.weight.dtype)
            replace(model, name, LowRankLinear.of(*factors, module.A.bias))
