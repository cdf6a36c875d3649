"""The curvature of a language model, one weight at a time: eigenvalues, gaps, and where the gradient lies.

Shape suffixes: M, N = the sides of a weight, K = eigenvalues, T = tokens, V = vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from welore.curvature import Eigen, Product, gaps, gauss_newton, hessian, lanczos, outside, trace
from welore.errors import Refused
from welore.observe import Batch, Seen, gradients, layer_of, logits_and_labels, weights_of
from welore.probe import Emergence
from welore.subspace import stable_rank
from welore.svd import singular_values

OPERATORS = ("hessian", "gauss_newton")


def check_attention(model: PreTrainedModel) -> None:
    """Refuse attention that torch's math kernel cannot run in place of: the others have no second derivative."""
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise Refused(
            f"the model runs attention by {attention}, which cannot be differentiated twice, as curvature needs. "
            f"Load it with attn_implementation=sdpa or eager, or write probe.curvature_at=0."
        )


def curvature(
    model: PreTrainedModel, probe: Emergence, batches: dict[str, Batch], operators: Sequence[str] = OPERATORS
) -> Seen:
    """For each weight and operator: the largest eigenvalues with residuals, the gaps, and rho_k of three gradients.

    The curvature is that of the `same` batch; the gradients are of it and of the batches `other` and `large`. Top
    eigenvectors are reshaped to matrices, whose stable rank says whether a narrow Hessian means a low-rank update.
    """
    check_attention(model)
    weights, seen = weights_of(model, probe.layers), Seen()
    G = {name: gradients(model, weights, batch)[1] for name, batch in batches.items()}
    with sdpa_kernel(SDPBackend.MATH):
        logits_TV, labels_T = logits_and_labels(model, batches["same"])
        loss = F.cross_entropy(logits_TV, labels_T)
        for name, W_MN in weights.items():
            found = seen.numbers.setdefault(name, {})
            for operator in operators:
                # No name for the product here: it holds the graph of a backward pass until the next one is made.
                try:
                    eigen, found[operator] = _spectrum(
                        hessian(loss, W_MN) if operator == "hessian" else gauss_newton(logits_TV, W_MN), W_MN, probe
                    )
                except Refused as error:
                    raise Refused(f"{name}, {operator}: {error}") from error
                found[operator]["outside"] = {
                    which: {str(k): outside(G[which][name], eigen.vectors_KMN[:k]) for k in _ranks(probe)}
                    for which in G
                }
                if operator == "hessian":
                    top = eigen.vectors_KMN[: probe.eigenvalues]
                    seen.matrices[f"{name}/{operator}"] = top.to(torch.bfloat16).cpu()  # gigabytes, of a large model
    return seen


def _ranks(probe: Emergence) -> list[int]:
    return sorted({1, probe.eigenvalues})


def _spectrum(product: Product, W_MN: nn.Parameter, probe: Emergence) -> tuple[Eigen, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    eigen = lanczos(product, W_MN.detach(), probe.eigenvalues + 1, probe.steps, generator)
    of_trace = trace(product, eigen, probe.samples, generator)
    return eigen, {
        "values": eigen.values_K.tolist(),
        "residuals": eigen.residuals_K.tolist(),
        "lowest": eigen.lowest,
        "trace": of_trace,
        "gaps": gaps(eigen.values_K, of_trace, probe.eigenvalues),
        "stable_ranks": [stable_rank(singular_values(V_MN)) for V_MN in eigen.vectors_KMN[: probe.eigenvalues]],
    }


def products(model: PreTrainedModel, probe: Emergence) -> float:
    """How many passes over the whole model the products of one operator come to: one costs about a forward and a
    backward pass from the last layer down to that of its weight."""
    names = list(weights_of(model, probe.layers))
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    return (probe.steps + probe.samples) * sum((depth - layer_of(name)) / depth for name in names)


def memory(model: PreTrainedModel, probe: Emergence, vocabulary: int) -> int:
    """About how many bytes curvature takes beyond the weights: the Lanczos basis, and the graph of two passes.

    Twelve float32 copies of the logits, and of each layer sixty of its hidden states and twelve of its scores.
    """
    config = model.config.get_text_config(decoder=True)
    tokens = probe.curvature_windows * probe.length
    basis = (probe.steps + 1) * max(W.numel() for W in weights_of(model, probe.layers).values())
    layer = tokens * (60 * config.hidden_size + 12 * probe.length * config.num_attention_heads)
    return 4 * (basis + 12 * tokens * vocabulary + config.num_hidden_layers * layer)
