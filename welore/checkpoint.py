"""The compressed model on disk: an ordinary transformers folder whose config says which weights are factored.

Importing this module (or `welore`) teaches transformers the format, through its registry of quantization methods:
`AutoModelForCausalLM.from_pretrained(folder)` then builds the factored layers before it loads their weights.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from welore.lowrank import LowRankLinear, replace
from welore.models import components

METHOD = "welore"


@register_quantization_config(METHOD)
class WeloreConfig(QuantizationConfigMixin):
    """The part of `config.json` that makes a folder a compressed model: the rank of every factored weight."""

    def __init__(self, ranks: dict[str, int] | None = None, **_):
        self.quant_method = METHOD
        self.ranks = ranks or {}


@register_quantizer(METHOD)
class WeloreQuantizer(HfQuantizer):
    """Puts `LowRankLinear` where the config says, so that the factors load like any other weight."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_) -> None:
        for name, rank in self.quantization_config.ranks.items():
            dense = model.get_submodule(name)
            replace(model, name, _empty_like(dense, rank))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_) -> PreTrainedModel:
        # Factors are plain floating point: casting and training the model stay allowed.
        model.is_quantized = False
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _empty_like(dense: nn.Linear, rank: int) -> LowRankLinear:
    weight, bias = dense.weight, dense.bias is not None
    return LowRankLinear(dense.in_features, dense.out_features, rank, bias, device=weight.device, dtype=weight.dtype)


def factored_ranks(model: PreTrainedModel) -> dict[str, int]:
    """The rank of every LRC of a model."""
    return {name: module.rank for name, module in components(model).items() if isinstance(module, LowRankLinear)}


def save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write weights as safetensors, `config.json` with the ranks, generation config and tokenizer."""
    if ranks := factored_ranks(model):
        model.config.quantization_config = WeloreConfig(ranks)
    try:
        model.save_pretrained(folder)
    finally:
        if ranks and getattr(model, "hf_quantizer", None) is None:
            del model.config.quantization_config
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Multiply every pair of factors out, in place: an ordinary dense model that computes the same."""
    for name in factored_ranks(model):
        replace(model, name, model.get_submodule(name).merged())
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    return model
