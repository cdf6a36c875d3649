"""What one checkpoint shows: spectra of weights and gradients, products of heads, and what a truncated weight costs.

Shape suffixes: B = sequences, L = tokens of one, M, N = the sides of a weight, R = rank of a subspace.
"""

import math
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from welore.curvature import check_trains
from welore.errors import Refused
from welore.loss import IGNORED
from welore.models import components
from welore.probe import Emergence
from welore.subspace import Heads, cosine, describe, describe_spectrum, leading, shuffled, similarity
from welore.svd import decompose, singular_values

Batch = dict[str, Tensor]  # ids_BL and labels_BL
FORWARD_TOKENS = 2048  # sequences that run together
SIDES = ("left", "right")


@dataclass
class Seen:
    """Numbers of one checkpoint, and the matrices that those of another are compared with, by name of the weight.

    The matrices are on the CPU: those of a large model would take much of a GPU.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    matrices: dict[str, Tensor] = field(default_factory=dict)


def weights_of(model: PreTrainedModel, layers: Sequence[int] | None) -> dict[str, nn.Parameter]:
    """The compressible weights of these decoder layers (all where None), by the name of their module.

    Refused are layers that are not there and weights that autograd gives no gradient, such as factored or frozen ones.
    """
    modules = components(model)
    depth = 1 + max(layer_of(name) for name in modules)
    if odd := [layer for layer in layers or () if not 0 <= layer < depth]:
        raise Refused(f"probe.layers={list(layers)}: there is no layer {odd[0]}. The model has 0 to {depth - 1}.")
    found = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            raise Refused(f"{name} is factored. Probe the dense model: a run with err=0, or the model before its cut.")
        check_trains(module.weight, f"{name}.weight")
        if layers is None or layer_of(name) in layers:
            found[name] = module.weight
    return found


def layer_of(name: str) -> int:
    """The decoder layer in a name such as `model.layers.3.self_attn.q_proj`: its first number."""
    return int(re.search(r"\.(\d+)\.", name)[1])


def logits_and_labels(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Float32 logits (or wider) of the scored tokens, and these tokens."""
    device = next(model.parameters()).device
    logits_TV = model(input_ids=batch["ids_BL"].to(device), use_cache=False).logits[:, :-1].flatten(0, 1)
    labels_T = batch["labels_BL"][:, 1:].flatten().to(device)
    scored = labels_T != IGNORED
    logits_TV = logits_TV[scored]
    return logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float(), labels_T[scored]


def _parts(batch: Batch) -> list[Batch]:
    size = max(1, FORWARD_TOKENS // batch["ids_BL"].shape[1])
    ids, labels = (batch[key].split(size) for key in ("ids_BL", "labels_BL"))
    return [{"ids_BL": i, "labels_BL": y} for i, y in zip(ids, labels, strict=True)]


def gradients(
    model: PreTrainedModel, weights: dict[str, nn.Parameter], batch: Batch
) -> tuple[float, dict[str, Tensor]]:
    """The mean loss of the scored tokens in nats, and its gradient in each weight."""
    total, count, sums = 0.0, 0, None
    for part in _parts(batch):
        logits_TV, labels_T = logits_and_labels(model, part)
        loss = F.cross_entropy(logits_TV, labels_T, reduction="sum")
        found = torch.autograd.grad(loss, list(weights.values()))
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
        total, count = total + float(loss.detach()), count + len(labels_T)
    if not math.isfinite(total):
        raise Refused(f"the loss of the batch is {total}: the model is broken, and its gradients show nothing.")
    return total / count, {name: G / count for name, G in zip(weights, sums, strict=True)}


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batch: Batch) -> float:
    total, count = 0.0, 0
    for part in _parts(batch):
        logits_TV, labels_T = logits_and_labels(model, part)
        total, count = total + float(F.cross_entropy(logits_TV, labels_T, reduction="sum")), count + len(labels_T)
    return total / count


def look(model: PreTrainedModel, probe: Emergence, fixed: Batch, other: Batch) -> Seen:
    """Losses on both batches, and for each weight its spectrum, that of its gradient, and the floor of noise between
    the gradients of the two batches."""
    weights, seen = weights_of(model, probe.layers), Seen()
    loss, G_fixed = gradients(model, weights, fixed)
    other_loss, G_other = gradients(model, weights, other)
    found = {}
    for name, W_MN in weights.items():
        sigma_K, *bases = leading(G_fixed[name], max(probe.ranks))
        _, *others = leading(G_other[name], max(probe.ranks))
        found[name] = {
            "shape": list(W_MN.shape),
            "weight": _described(W_MN, singular_values(W_MN), probe.thresholds),
            "gradient": _described(G_fixed[name], sigma_K, probe.thresholds),
            "floor": {"cosine": cosine(G_fixed[name], G_other[name])} | alike(bases, others, probe.ranks),
        }
        seen.matrices |= {f"{name}/{side}": U.to("cpu", torch.float32) for side, U in zip(SIDES, bases, strict=True)}
        # 8 bits change a cosine by less than a thousandth, and take half of the disk.
        seen.matrices[f"{name}/gradient"] = G_fixed[name].to("cpu", torch.bfloat16)
    seen.numbers = {"loss": loss, "other_loss": other_loss, "weights": found, "heads": _head_spectra(model, probe)}
    return seen


def controls(model: PreTrainedModel, probe: Emergence) -> dict[str, dict[str, float]]:
    """What describes each weight with its entries in a random order."""
    generator = torch.Generator().manual_seed(0)
    found = weights_of(model, probe.layers)
    return {name: describe(shuffled(W_MN.detach(), generator), probe.thresholds) for name, W_MN in found.items()}


def _described(W_MN: Tensor, sigma_K: Tensor, thresholds: Sequence[float]) -> dict[str, Any]:
    scalars = describe_spectrum(sigma_K, tuple(W_MN.shape), float(W_MN.detach().double().std()), thresholds)
    return scalars | {"sigma": [float(f"{value:.5g}") for value in sigma_K.tolist()]}


def alike(ours: Sequence[Tensor], theirs: Sequence[Tensor], ranks: Sequence[int]) -> dict[str, float]:
    """phi_r of the left and the right bases of two gradients, such as `left_16`; an r beyond the sides is left out."""
    return {
        f"{side}_{rank}": similarity(U[:, :rank], V[:, :rank])
        for side, U, V in zip(SIDES, ours, theirs, strict=True)
        for rank in ranks
        if rank <= U.shape[1]
    }


def _head_spectra(model: PreTrainedModel, probe: Emergence) -> dict[str, dict[str, dict[str, float]]]:
    """Of each block with q, k, v and o: the mean over heads of what describes W_Q^T W_K (`qk`) and W_O W_V (`ov`).

    r_90 and entropy ranks are shares of the head size, which is all the rank that such a product has.
    """
    config = model.config.get_text_config(decoder=True)
    weights = weights_of(model, probe.layers)
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, W_MN in weights.items():
        block, _, part = name.rpartition(".")
        if part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            blocks.setdefault(block, {})[f"W_{part[0]}"] = W_MN.detach()
    queries = config.num_attention_heads
    heads = Heads(queries, getattr(config, "num_key_value_heads", None) or queries)
    found = {}
    for block, parts in blocks.items():
        if len(parts) == 4:
            size = len(parts["W_q"]) // queries
            found[block] = {
                kind: _mean([_in_head(P, size, probe.thresholds) for P in products])
                for kind, products in heads.products(**parts).items()
            }
    return found


def _in_head(P: Tensor, size: int, thresholds: Sequence[float]) -> dict[str, float]:
    return describe_spectrum(singular_values(P)[:size], tuple(P.shape), float(P.double().std()), thresholds)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def truncations(model: PreTrainedModel, probe: Emergence, batch: Batch) -> dict[str, dict[str, float]]:
    """How much the mean loss rises, in nats, where one weight alone keeps a share of its ranks (plain SVD)."""
    before, found = mean_loss(model, batch), {}
    for name, W_MN in weights_of(model, probe.layers).items():
        parts = decompose(W_MN)
        found[name] = {}
        for share in probe.kept:
            rank = max(1, int(share * min(W_MN.shape)))
            with _replaced(W_MN, parts.A_KM[:rank].T @ parts.B_KN[:rank]):
                found[name][f"{share:g}"] = mean_loss(model, batch) - before
    return found


@contextmanager
def _replaced(weight: nn.Parameter, W_MN: Tensor):
    original = weight.data
    try:
        weight.data = W_MN
        yield
    finally:
        weight.data = original
