"""What a training step, or the reading of a prompt, holds at its peak, from shapes alone: the meta device is enough.

Decoders of LLaMA's shape (RMSNorm, rotary positions, fused attention, gated MLP) are counted tensor by tensor, as
autograd saves them; others are refused. Shape suffixes: B = sequences, L = tokens of one, T = B L tokens, D = hidden
size, I = intermediate size, N = inputs of a weight, R = rank.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from welore.errors import Refused
from welore.inference import cache_bytes, head_size
from welore.loss import chunk_tokens
from welore.lowrank import LowRankLinear
from welore.measure import GIB
from welore.models import DTYPES, count_bytes, decoder_layers
from welore.modes import FLOAT32, Mode

KNOWN = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Step:
    """The shape of a pass: `batch` sequences of `length` tokens, products in `autocast` (None: the weights' dtype).

    With `recompute` each decoder layer keeps its input alone, and is run again for its gradient.
    """

    batch: int
    length: int
    autocast: str | None
    recompute: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of a step, by what they are for.

    `held` is there all the time. Of the moments, all that counts is the one that is the largest.
    """

    held: dict[str, int]
    saved: dict[str, int]  # for the backward pass, when the forward pass ends
    loss: int  # logits of a chunk, on top of `saved`
    final_norm: int  # what its gradient works with, on top of `saved`
    layer: int  # when the backward pass is in its widest layer: what is saved still, gradients, and its work
    gradients: int  # of all that trains, when the backward pass ends
    stepping: int  # what the optimizer works with, on top of `gradients`

    @property
    def moments(self) -> dict[str, int]:
        """The candidates for the peak, above what is held."""
        saved = sum(self.saved.values())
        return {
            "end of the forward pass": saved + self.loss,
            "start of the backward pass": saved + self.final_norm,
            "backward pass of a layer": self.layer,
            "optimizer step": self.gradients + self.stepping,
        }

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + max(self.moments.values())


def predict(
    model: PreTrainedModel, mode: Mode, parameters: list[nn.Parameter], step: Step, masks: int = 0
) -> Footprint:
    """The footprint of a step of a mode, once it has selected its parameters (`welore.modes.select`) on the model.

    `masks` are the bytes that say where a pruned model is zero (`welore.prune.mask_bytes`).
    """
    _check_kind(model, "saved tensors", "one step instead: fit/peak_gib of a run")
    refuse_unforeseen(mode)
    layers = [_layer(model, block, step, flows) for block, flows in _blocks(model)]
    casts = _casts(model, step)
    saved = Counter()
    for layer in layers:
        saved.update(layer if not step.recompute else {"inputs of layers": _residual(model, step)})
    saved.update({"normalization": _norm(model, model.base_model.norm, step, True)})
    saved.update({"rotary positions": 2 * step.length * head_size(model.config) * _residual_itemsize(model)})
    saved.update(
        {"hidden states of the loss": step.batch * (step.length - 1) * _width(model) * _itemsize(model, step)}
    )
    saved.update({"casts of what trains": sum(size for size, trains in casts.values() if trains)})
    return Footprint(
        held={
            "weights": count_bytes(model),
            "masks of pruned weights": masks,
            "casts of frozen weights": sum(size for size, trains in casts.values() if not trains),
            "float32 masters": sum(FLOAT32 * p.numel() for p in parameters if p.dtype != torch.float32),
            "optimizer states": mode.kept_bytes(parameters),
        },
        saved=dict(saved),
        loss=_loss(model, step),
        final_norm=_final_norm(model, step),
        layer=_widest_layer(model, step, layers, casts),
        gradients=FLOAT32 * sum(p.numel() for p in parameters),
        stepping=mode.step_bytes(parameters),
    )


@dataclass(frozen=True)
class Prefill:
    """Bytes when a prompt is read, which is where inference has its peak."""

    weights: int
    cache: int
    layer: int  # what one layer works with, and the positions that all share

    @property
    def peak(self) -> int:
        return self.weights + self.cache + self.layer


def predict_prefill(model: PreTrainedModel, batch: int, length: int) -> Prefill:
    """Of `batch` prompts of `length` tokens, by a model that is not fused, in the dtype of its weights.

    The widest moment is the product in a gated MLP: both of its inputs and itself, beside the embeddings and the input
    of the layer, which their callers hold, the residual, and its normalization. Attention takes less where the
    intermediate size is more than twice the hidden size.
    """
    _check_kind(model, "activations", "them instead: scripts/bench_inference.py --rounds 0")
    size = _residual_itemsize(model)
    wide = 3 * model.config.intermediate_size + 4 * _width(model)
    positions = length * (2 * head_size(model.config) * size + torch.int64.itemsize)
    cache = cache_bytes(model.config, batch, length, size)
    return Prefill(count_bytes(model), cache, batch * length * wide * size + positions)


def refuse_unforeseen(mode: Mode) -> None:
    if not mode.trains:
        raise Refused(f"mode={mode.name} trains nothing. Write mode=welore, nlrc, full, lora or galore.")
    if not mode.foreseen:
        raise Refused(f"what mode={mode.name} saves and keeps is not known here. Measure it: fit/peak_gib of a run.")


def _check_kind(model: PreTrainedModel, what: str, instead: str) -> None:
    kind = model.config.model_type
    if kind not in KNOWN:
        raise Refused(
            f"the {what} of a {kind} model are not known here, only those of {', '.join(KNOWN)}. Measure {instead}."
        )


def largest_batch(
    model: PreTrainedModel, mode: Mode, parameters: list[nn.Parameter], step: Step, gib: float, masks: int = 0
) -> int:
    """The most sequences whose step fits, by bisection, since a footprint rises with the batch; 0 if none."""

    def fits(batch: int) -> bool:
        tried = Step(batch, step.length, step.autocast, step.recompute)
        return predict(model, mode, parameters, tried, masks).peak <= gib * GIB

    low, high = 0, 1
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _blocks(model: PreTrainedModel) -> list[tuple[nn.Module, bool]]:
    """Each decoder layer, and whether gradients flow into it: below the first weight that trains there are none."""
    blocks, flows = [], False
    for block in decoder_layers(model).values():
        blocks.append((block, flows))
        flows = flows or any(p.requires_grad for p in block.parameters())
    return blocks


def _layer(model: PreTrainedModel, block: nn.Module, step: Step, flows: bool) -> dict[str, int]:
    """Bytes that one decoder layer saves, by what saves them."""
    saved: Counter = Counter()
    T, size = step.tokens, _itemsize(model, step)
    attention, mlp = block.self_attn, block.mlp
    for norm, readers in (
        (block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        (block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
    ):
        saved["normalization"] += _norm(model, norm, step, flows)
        copies = [_reads(reader, step) for reader in readers]
        # Autocast casts an input once for each weight that reads it: nothing is shared.
        shared = sum(copies) if step.autocast else min(1, sum(copies))
        saved["inputs of weights"] += shared * T * _width(model) * size
        for reader in readers:
            saved["between factors"] += _between(reader) * T * size
        flows = flows or norm.weight.requires_grad or any(p.requires_grad for m in readers for p in m.parameters())
        if norm is block.input_layernorm and flows:
            saved["attention"] += _attention(model, step)
            # The input of o_proj is the output of attention, saved already, unless an adapter casts it.
            adapter = step.autocast is not None and _adapted(attention.o_proj)
            saved["inputs of weights"] += _reads(attention.o_proj, step) * T * _heads(model) * size * adapter
        if norm is block.input_layernorm:
            saved["between factors"] += _between(attention.o_proj) * T * size
            flows = flows or any(p.requires_grad for p in attention.o_proj.parameters())
    I_ = model.config.intermediate_size
    saved["gated MLP"] += 3 * T * I_ * size if flows else 0
    saved["inputs of weights"] += _reads(mlp.down_proj, step) * T * I_ * size
    saved["between factors"] += _between(mlp.down_proj) * T * size
    return saved


def _adapted(module: nn.Module) -> bool:
    """Whether what reads the input first is an adapter of peft."""
    return hasattr(module, "lora_A") or (isinstance(module, LowRankLinear) and hasattr(module.B, "lora_A"))


def _reads(module: nn.Module, step: Step) -> int:
    """How many copies of its input a projection saves: one if a weight that reads it trains."""
    if hasattr(module, "lora_A"):
        return int(any(p.requires_grad for p in module.lora_A.parameters()))
    if isinstance(module, LowRankLinear):
        return _reads(module.B, step)
    return int(module.weight.requires_grad)


def _between(module: nn.Module) -> int:
    """Numbers for each token that a projection saves inside: at its rank, and at the rank of its adapters."""
    if hasattr(module, "lora_A"):
        ranks = sum(adapter.out_features for adapter in module.lora_A.values())
        return ranks + _between(module.get_base_layer())
    if isinstance(module, LowRankLinear):
        own = module.rank if _reads(module.A, None) else 0
        return own + _between(module.B) + _between(module.A)
    return 0


def _norm(model: PreTrainedModel, norm: nn.Module, step: Step, flows: bool) -> int:
    """Its input in float32 and one number a token, where gradients flow; its output before the weight that trains."""
    wide = step.tokens * _width(model)
    inputs = wide * FLOAT32 + step.tokens * FLOAT32 if flows else 0
    return inputs + (wide * _residual_itemsize(model) if norm.weight.requires_grad else 0)


def _attention(model: PreTrainedModel, step: Step) -> int:
    """Queries, keys, values and the output of fused attention, and the float32 logarithm of its denominators."""
    config, size = model.config, _itemsize(model, step)
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return step.tokens * (heads * head_size(config) * size + config.num_attention_heads * FLOAT32)


def _casts(model: PreTrainedModel, step: Step) -> dict[int, tuple[int, bool]]:
    """Bytes of every weight in the autocast dtype and whether it trains, by the id of the weight.

    Frozen ones are cast once a training, the output matrix by the loss; those that train once a step.
    """
    if step.autocast is None:
        return {}
    dtype = DTYPES[step.autocast]
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)] + [model.get_output_embeddings().weight]
    return {id(w): (w.numel() * dtype.itemsize, w.requires_grad) for w in weights if w.dtype != dtype}


def _loss(model: PreTrainedModel, step: Step) -> int:
    """Logits of a chunk in float32, their logarithms, and one copy at a time in the dtype of the products."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    size, scored = chunk_tokens(vocabulary), step.batch * (step.length - 1)
    cast = _itemsize(model, step) if _itemsize(model, step) != FLOAT32 else 0
    return min(size, scored) * vocabulary * (2 * FLOAT32 + cast)


def _final_norm(model: PreTrainedModel, step: Step) -> int:
    """Five float32 numbers for each that it normalizes; what the loss saved is used up, and so is its own output."""
    wide, norm = step.tokens * _width(model), model.base_model.norm
    used = step.batch * (step.length - 1) * _width(model) * _itemsize(model, step)
    return 5 * wide * FLOAT32 - used - (_residual(model, step) if norm.weight.requires_grad else 0)


def _widest_layer(
    model: PreTrainedModel, step: Step, layers: list[dict[str, int]], casts: dict[int, tuple[int, bool]]
) -> int:
    """The widest moment of the widest layer: what layers before it have saved, gradients of all behind it, its own.

    The last layers have more saved before them, the first ones more gradients. A layer that is run again shares its
    input with its first norm where that needs no copy in float32, and casts its own weights anew; all others' casts
    are gone.
    """
    kept = 2 * step.length * head_size(model.config) * _residual_itemsize(model)
    kept += 0 if step.recompute else sum(size for size, trains in casts.values() if trains)
    behind, moments = _gradients(model), []
    for (block, flows), layer in zip(_blocks(model), layers, strict=True):
        behind -= _gradients(block)
        own = sum(layer.values()) + _gated(model, block, step)
        if step.recompute:
            kept += _residual(model, step)
            own += sum(casts.get(id(p), (0, False))[0] for p in block.parameters() if p.requires_grad)
            own -= _residual(model, step) if flows and _residual_itemsize(model) == FLOAT32 else 0
        moments.append(kept + own + behind + _gradients(block.mlp.down_proj))
        kept += 0 if step.recompute else sum(layer.values())
    return max(moments)


def _gated(model: PreTrainedModel, block: nn.Module, step: Step) -> int:
    """Gradients of a layer's output, of its gated product and of both of its factors; what down_proj saved is used."""
    down, wide = block.mlp.down_proj, step.tokens * model.config.intermediate_size
    size, used = _itemsize(model, step), _reads(down, step) * wide + _between(down) * step.tokens
    work = _residual(model, step) + (3 * wide - used) * size
    if step.recompute and step.autocast and _adapted(down):
        # While it is run again an adapter holds the product beside the float32 copy that peft makes of it.
        return max(work, wide * (FLOAT32 + size) + 2 * _residual(model, step))
    return work


def _gradients(module: nn.Module) -> int:
    return FLOAT32 * sum(p.numel() for p in module.parameters() if p.requires_grad)


def _residual(model: PreTrainedModel, step: Step) -> int:
    return step.tokens * _width(model) * _residual_itemsize(model)


def _residual_itemsize(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.element_size()


def _itemsize(model: PreTrainedModel, step: Step) -> int:
    return DTYPES[step.autocast].itemsize if step.autocast else _residual_itemsize(model)


def _width(model: PreTrainedModel) -> int:
    return model.config.hidden_size


def _heads(model: PreTrainedModel) -> int:
    return model.config.num_attention_heads * head_size(model.config)
