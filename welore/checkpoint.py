"""The compressed model on disk: an ordinary transformers folder whose config says which weights are factored.

Importing this module (or `welore`) teaches transformers the format, through its registry of quantization methods:
`AutoModelForCausalLM.from_pretrained(folder)` then builds the factored layers before it loads their weights.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from welore.errors import Refused
from welore.lowrank import LowRankLinear, factored_ranks, replace

METHOD = "welore"
VERSION = 1  # of the format: raised when an older welore would misread a folder


@register_quantization_config(METHOD)
class WeloreConfig(QuantizationConfigMixin):
    """The part of `config.json` that makes a folder a compressed model: the rank of every factored weight."""

    def __init__(self, ranks: dict[str, int] | None = None, version: int = VERSION, **_):
        if version != VERSION:
            raise Refused(
                f"config.json holds a compressed model in version {version} of the format, and this welore reads "
                f"version {VERSION}. Load it with the welore that wrote it, or export it there with --merge."
            )
        wrong = {name: rank for name, rank in (ranks or {}).items() if type(rank) is not int or rank < 1}
        if wrong:
            raise Refused(f"config.json holds ranks that are no positive integers: {wrong}.")
        self.quant_method = METHOD
        self.version = version
        self.ranks = ranks or {}


@register_quantizer(METHOD)
class WeloreQuantizer(HfQuantizer):
    """Puts `LowRankLinear` where the config says, so that the factors load like any other weight."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, checkpoint_files=None, **_) -> None:
        _check_files(self.quantization_config.ranks, checkpoint_files or [])
        for name, rank in self.quantization_config.ranks.items():
            name = _name_in(model, name)
            replace(model, name, _empty_like(model.get_submodule(name), rank))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_) -> PreTrainedModel:
        # Factors are plain floating point, so casting and training stay allowed. Transformers would refuse both of a
        # model marked as quantized, and would cast the inputs of flash attention to the dtype of loading.
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return cast(merge(model), dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _check_files(ranks: dict[str, int], files: list[str]) -> None:
    """Refuse damaged files, and files that hold factors of other ranks than the config lists.

    Transformers only warns of missing weights and makes them up at random. Comparing ranks without their names keeps
    this true for models whose weights are renamed on the way to disk.
    """
    stored, files = [], [file for file in files if file.endswith(".safetensors")]
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                factors = [key for key in tensors.keys() if key.endswith(".A.weight")]  # noqa: SIM118, no mapping
                stored += [tensors.get_slice(key).get_shape()[1] for key in factors]
        except SafetensorError as error:
            raise Refused(f"{file} is damaged or not whole ({error}). Copy it again, or repeat its run.") from error
    if files and sorted(stored) != sorted(ranks.values()):
        raise Refused(
            f"config.json lists {len(ranks)} factored weights of {sum(ranks.values())} ranks in all, and the files "
            f"beside it hold {len(stored)} of {sum(stored)}: they belong to different models. Put the config.json and "
            f"the *.safetensors of one compressed model together."
        )


def _name_in(model: PreTrainedModel, name: str) -> str:
    """The name of a weight in this class of model: `AutoModel` lacks the prefix that `AutoModelForCausalLM` has."""
    known, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if isinstance(known.get(candidate), nn.Linear):
            return candidate
    raise Refused(
        f"config.json lists {name} as a factored weight, and {type(model).__name__} has no linear layer of that name. "
        f"Its quantization_config belongs to another model, or to another version of transformers."
    )


def _empty_like(dense: nn.Linear, rank: int) -> LowRankLinear:
    weight, bias = dense.weight, dense.bias is not None
    return LowRankLinear(dense.in_features, dense.out_features, rank, bias, device=weight.device, dtype=weight.dtype)


def save(model: PreTrainedModel, tokenizer: Any, folder: Path, **options) -> None:
    """Write weights as safetensors, `config.json` with the ranks, generation config and tokenizer.

    `options` are those of `save_pretrained`, such as `max_shard_size="2GB"`.
    """
    _describe(model)
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # written for their owner alone, unlike every other file
        weights.chmod((folder / "config.json").stat().st_mode)


def load(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any]:
    """The model in eval mode and the tokenizer that `save` has written."""
    trust = {"trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **trust)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **trust)


def _describe(model: PreTrainedModel) -> None:
    """Let the config say what the model is now: its ranks may have changed since it was loaded."""
    if ranks := factored_ranks(model):
        model.config.quantization_config = WeloreConfig(ranks)
    elif isinstance(getattr(model.config, "quantization_config", None), WeloreConfig):
        del model.config.quantization_config


def describe(model: PreTrainedModel, folder: Path) -> None:
    """Write the `config.json` from which `blank` builds a model of these shapes."""
    _describe(model)
    model.config.dtype = model.dtype
    if model._auto_class is not None:  # an architecture of its own
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)


def blank(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that the `config.json` of a folder describes, factored where it says so, with random weights."""
    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **trust)
    except (OSError, ValueError) as error:
        raise Refused(f"{folder} holds no readable config.json ({error}). Repeat its run with force=true.") from error
    factored = vars(config).pop("quantization_config", None)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype, **trust)
    for name, rank in WeloreConfig(**factored).ranks.items() if factored else ():
        replace(model, name, _empty_like(model.get_submodule(name), rank))
    _describe(model)
    return model


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Change the dtype of the weights, in place. Buffers such as the rotary frequencies stay in float32, as loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Multiply every pair of factors out, in place: an ordinary dense model that computes the same."""
    for name in factored_ranks(model):
        replace(model, name, model.get_submodule(name).merged())
    _describe(model)
    if isinstance(getattr(model, "hf_quantizer", None), WeloreQuantizer):
        model.hf_quantizer.remove_quantization_config(model)
    return model
