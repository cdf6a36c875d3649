"""Which parameters a run trains, and with which optimizer. The config object is the strategy."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from welore.errors import Refused
from welore.galore import GaLoreAdamW
from welore.lowrank import LowRankLinear, replace
from welore.models import components
from welore.optim import AdamW
from welore.report import announce

FLOAT32 = torch.float32.itemsize  # of masters, gradients and moments, whatever a weight is stored in


@dataclass
class Mode:
    """What trains after compression."""

    name: str
    division = None  # LRCs are what is factored, unless `divide` tells otherwise
    foreseen = False  # whether its passes save what `welore.memory` tells from shapes alone

    @property
    def trains(self) -> bool:
        return True

    @property
    def refactors(self) -> bool:
        """Whether it takes LRCs apart anew, which leaves no zero of a pruned factor where it was."""
        return False

    @property
    def takes_turns(self) -> bool:
        """Whether which parameters train changes from step to step."""
        return False

    def divide(self, lrc: Mapping[str, int]) -> None:
        """Hear which weights are WeLore's LRCs, and at which ranks."""
        self.division = lrc

    def check_machine(self) -> None:
        """Refuse to train where this machine lacks what that needs: before the model is loaded."""

    def check(self, model: PreTrainedModel) -> None:
        """Refuse what no plan could make possible, on the dense model: before hours of compression."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Change the model before its parameters are chosen; most modes have nothing to change."""

    def trainables(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """The parameters to train. Everything else is frozen by `select`."""
        raise NotImplementedError

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        raise NotImplementedError

    def kept_bytes(self, parameters: list[nn.Parameter]) -> int:
        """What its optimizer keeps between steps, beside float32 masters."""
        raise NotImplementedError

    def step_bytes(self, parameters: list[nn.Parameter]) -> int:
        """What its optimizer works with, on top of that; nothing where it steps in place."""
        return 0

    def begin_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called before the first pass of every optimizer step, counted from 0; a resumed run calls it as well."""

    def finish(self, model: PreTrainedModel) -> None:
        """Bring the model back to LRC and N-LRC after training, so that what is measured is what is saved."""


@dataclass
class Untrained(Mode):
    """Compress and measure, no training (WeLore-COMP)."""

    @property
    def trains(self) -> bool:
        return False


@dataclass
class Adam(Mode):
    """Trains with AdamW on float32 masters. `norms` adds the weights of all normalization layers."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    norms: bool

    def __post_init__(self):
        betas = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        if not (0 < self.lr < math.inf and betas and self.eps > 0 and self.weight_decay >= 0):
            raise Refused(
                f"mode has lr={self.lr}, betas={list(self.betas)}, eps={self.eps}, weight_decay={self.weight_decay}. "
                f"Write lr > 0, two betas with 0 <= beta < 1, eps > 0 and weight_decay >= 0."
            )

    @property
    def adam(self) -> dict[str, Any]:
        """What every optimizer here takes."""
        return dict(lr=self.lr, betas=tuple(self.betas), eps=self.eps, weight_decay=self.weight_decay)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return AdamW(parameters, **self.adam)

    def kept_bytes(self, parameters: list[nn.Parameter]) -> int:
        return sum(2 * FLOAT32 * p.numel() for p in parameters)

    def normalizations(self, model: PreTrainedModel) -> list[nn.Parameter]:
        return norm_parameters(model) if self.norms else []


@dataclass
class Lrc(Adam):
    """Train the factors of the low-rank components only (WeLore-PEFT, Section 3.2)."""

    foreseen = True

    def trainables(self, model: PreTrainedModel) -> list[nn.Parameter]:
        parameters = side_parameters(model, self.division, lrc=True)
        return parameters and parameters + self.normalizations(model)


@dataclass
class NLrc(Adam):
    """Train the weights that stayed dense only (Figure 4)."""

    foreseen = True

    def trainables(self, model: PreTrainedModel) -> list[nn.Parameter]:
        parameters = side_parameters(model, self.division, lrc=False)
        return parameters and parameters + self.normalizations(model)


@dataclass
class Full(Adam):
    """Train LRCs and N-LRCs; embeddings and `lm_head` stay frozen, as in the authors' full fine-tuning."""

    foreseen = True

    def trainables(self, model: PreTrainedModel) -> list[nn.Parameter]:
        return component_parameters(model, nn.Module) + self.normalizations(model)


@dataclass
class GaLore(Full):
    """What `Full` trains, stepped by Adam in a rank-`rank` projection of each gradient, renewed every `gap` steps."""

    rank: int
    gap: int
    scale: float

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1 or self.gap < 1 or not 0 < self.scale < math.inf:
            raise Refused(
                f"mode has rank={self.rank}, gap={self.gap}, scale={self.scale}. Write a rank and a gap of 1 or more, "
                f"and a scale above 0."
            )

    def check(self, model: PreTrainedModel) -> None:
        self._check_rank([p for module in components(model).values() for p in module.parameters()])

    def trainables(self, model: PreTrainedModel) -> list[nn.Parameter]:
        parameters = super().trainables(model)
        self._check_rank(parameters)
        return parameters

    def _check_rank(self, parameters: list[nn.Parameter]) -> None:
        widest = max((min(p.shape) for p in parameters if p.ndim == 2), default=0)
        if parameters and widest <= self.rank:
            lower = f"a rank below {widest}, or " if widest > 1 else ""
            raise Refused(
                f"mode.rank={self.rank} projects nothing, so that mode={self.name} would be plain Adam: of all "
                f"matrices that it trains the longest shorter side is {widest}. Write {lower}mode=full."
            )

    def kept_bytes(self, parameters: list[nn.Parameter]) -> int:
        """Two moments of each projected gradient and its projection; two moments of what is not projected."""
        projected = [p for p in parameters if self._projects(p)]
        rest = [p for p in parameters if not self._projects(p)]
        low = sum(FLOAT32 * self.rank * (2 * max(p.shape) + min(p.shape)) for p in projected)
        return low + super().kept_bytes(rest)

    def step_bytes(self, parameters: list[nn.Parameter]) -> int:
        """The update of one weight, or the eigenvectors of the Gram matrix of its gradient."""
        double = torch.float64.itemsize
        matrices = [p for p in parameters if p.ndim == 2]
        return max(max(FLOAT32 * p.numel(), double * (3 * min(p.shape) ** 2 + p.numel())) for p in matrices)

    def _projects(self, parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and min(parameter.shape) > self.rank

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return GaLoreAdamW(parameters, rank=self.rank, gap=self.gap, scale=self.scale, **self.adam)


@dataclass
class Lora(Adam):
    """Train adapters beside every LRC and N-LRC, with the compressed model frozen: y = W x + (alpha / rank) B A x.

    `lora_on=factors` puts one adapter on each factor of an LRC, `merged` one on its product as a single virtual
    weight. A factor thinner than `rank` has an adapter of that rank all the same. After training the adapters are
    added into what they adapt: exactly, up to the dtype; on a virtual weight by appending them to its factors, so
    that its rank grows by `rank`.
    """

    foreseen = True
    rank: int
    alpha: float
    dropout: float
    lora_on: str

    def __post_init__(self):
        super().__post_init__()
        if self.lora_on not in ("factors", "merged"):
            raise Refused(f"mode.lora_on={self.lora_on} is unknown. Write factors or merged.")
        if self.rank < 1:
            raise Refused(f"mode.rank={self.rank} adapts nothing. Write 1 or more.")
        check_alpha(self.alpha, instead=2 * self.rank)
        if not 0 <= self.dropout < 1:
            raise Refused(f"mode.dropout={self.dropout} is not a share in [0, 1). Write 0 for none.")

    def check(self, model: PreTrainedModel) -> None:
        check_rank(self, model)

    def prepare(self, model: PreTrainedModel) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora.layer import Linear, LoraLayer

        check_rank(self, model)
        targets = adapted(model, self.lora_on)
        options = dict(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout)
        config = LoraConfig(target_modules=targets, **options | self.variant(model, targets))
        if not config.rank_pattern:  # those that start from singular directions stop at as many as there are
            announce_thin(self, model, targets)
        config._register_custom_module({LowRankLinear: Linear})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft does not know LowRankLinear by name, and needs only its two sizes
            inject_adapter_in_model(config, model)
        for layer in [m for m in model.modules() if isinstance(m, LoraLayer)]:
            if isinstance(base := layer.get_base_layer(), LowRankLinear):
                layer.to(base.A.weight.dtype)  # peft takes the dtype of a weight, and float32 where it finds none

    def variant(self, model: PreTrainedModel, targets: list[str]) -> dict[str, Any]:
        return {}  # options of peft beyond those of plain LoRA

    def row_scale(self, layer: nn.Module, up_MR: Tensor, down_RN: Tensor) -> Tensor | None:
        """What multiplies the rows of the adapted weight W + up down; None for 1."""
        return None

    def trainables(self, model: PreTrainedModel) -> list[nn.Parameter]:
        adapters = [p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]
        return adapters and adapters + self.normalizations(model)

    @torch.no_grad()
    def finish(self, model: PreTrainedModel) -> None:
        from peft.tuners.lora.layer import LoraLayer

        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
            base = layer.get_base_layer()
            adapter = next(iter(layer.lora_A))
            up_MR = layer.lora_B[adapter].weight.float() * layer.scaling[adapter]
            down_RN = layer.lora_A[adapter].weight.float()
            if (scale_M := self.row_scale(layer, up_MR, down_RN)) is not None:
                outer = base.A if isinstance(base, LowRankLinear) else base
                outer.weight.copy_(outer.weight.float() * scale_M[:, None])
                up_MR = up_MR * scale_M[:, None]
            if isinstance(base, LowRankLinear):
                A_MR = torch.cat([base.A.weight, up_MR.to(base.A.weight.dtype)], dim=1)
                B_RN = torch.cat([base.B.weight, down_RN.to(base.B.weight.dtype)], dim=0)
                base = LowRankLinear.of(A_MR, B_RN, base.A.bias)
            else:
                base.weight.copy_(base.weight.float() + up_MR @ down_RN)
            replace(model, name, base)
        forget_peft(model)


def adapted(model: PreTrainedModel, lora_on: str) -> list[str]:
    """The names of what adapters are put on: the N-LRCs, and the factors of every LRC or their product."""
    names = []
    for name, module in components(model).items():
        inside = isinstance(module, LowRankLinear) and lora_on == "factors"
        names += [f"{name}.A", f"{name}.B"] if inside else [name]
    return names


def check_alpha(alpha: float, instead: int) -> None:
    """Refuse a scale of adapters of 0, at which they have no gradient, or below, which turns what they add around; and
    one that is no number."""
    if not 0 < alpha < math.inf:
        turned = "what they add is turned around" if alpha < 0 else "what they add is no number"
        why = "they add nothing and never train" if alpha == 0 else turned
        raise Refused(f"mode.alpha={alpha} is no scale of adapters: {why}. Write a number above 0, such as {instead}.")


def check_rank(mode: Mode, model: PreTrainedModel) -> None:
    """Refuse a rank above the shorter side of the smallest compressible weight. Factors of an LRC may be thinner."""
    name, module = min(components(model).items(), key=lambda item: min(item[1].in_features, item[1].out_features))
    limit = min(module.in_features, module.out_features)
    if mode.rank > limit:
        shape = f"{module.out_features} x {module.in_features}"
        raise Refused(f"mode.rank={mode.rank} is above the rank of {name}, which is {shape}. Write {limit} or less.")


def announce_thin(mode: Mode, model: PreTrainedModel, targets: list[str]) -> None:
    """Say where an adapter is wider than the factor that it adapts: it spans no more, and holds more numbers."""
    layers = {name: model.get_submodule(name) for name in targets}
    sides = {name: min(layer.in_features, layer.out_features) for name, layer in layers.items()}
    if thin := {name: side for name, side in sides.items() if side < mode.rank}:
        name, side = min(thin.items(), key=lambda item: item[1])
        announce(
            f"mode.rank={mode.rank} is above the rank of {len(thin)} factors, such as {name} with {side}: their "
            f"adapters are wider than what they adapt. With mode.rank={side} or mode.lora_on=merged none is"
        )


def forget_peft(model: PreTrainedModel) -> None:
    """Remove what peft and transformers noted of adapters that are merged."""
    vars(model).pop("peft_config", None)
    model._hf_peft_config_loaded = False


def component_parameters(model: PreTrainedModel, kind: type[nn.Module]) -> list[nn.Parameter]:
    """All parameters, biases included, of the compressible weights of the given type."""
    return [p for module in components(model).values() if isinstance(module, kind) for p in module.parameters()]


def side_parameters(model: PreTrainedModel, division: Mapping[str, int] | None, lrc: bool) -> list[nn.Parameter]:
    """All parameters of one side of a division into LRC and N-LRC; without one, of what is factored or is not."""
    return [
        p
        for name, module in components(model).items()
        if (isinstance(module, LowRankLinear) if division is None else name in division) == lrc
        for p in module.parameters()
    ]


def norm_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights (and biases) of every normalization layer: LayerNorm, RMSNorm and their variants."""
    return [p for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)]


def select(model: PreTrainedModel, mode: Mode) -> list[nn.Parameter]:
    """Freeze the model except what the mode trains, and return that."""
    mode.prepare(model)
    parameters = mode.trainables(model)
    if not parameters:
        kinds = [type(module).__name__ for module in components(model).values()]
        found = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        raise Refused(
            f"mode={mode.name} selects no parameter. The compressible weights of the model are {found}. "
            f"Change err (or ranks.dense) so that there are LRCs and N-LRCs, or take mode=full."
        )
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters
